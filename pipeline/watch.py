"""What is seen of workers while they work: the lines of trainings and downloads, alarms, warnings, and trackers.

Workers post their newest numbers on the engine's board, which is looked at every second. Trackers get what is in a
training's metrics.jsonl, which is whole: the board may have missed a line, and a training that goes on after a kill has
lines from before.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from pipeline import trackers
from pipeline.core import log, storage
from pipeline.core.errors import one_line
from pipeline.core.training_metrics import METRICS_FILE

LOOK_EVERY_S = 1.0
READ_EVERY_S = 10.0  # the metrics, which are written about as often
WARN_EVERY_S = 60.0  # of one kind of warning


class Watch:
    """What workers post, looked at by a thread of its own from start() to stop()."""

    def __init__(
        self,
        engine: Any,
        progress: log.Progress,
        run_path: str,
        log_to: Sequence[str] = (),
    ):
        self._engine = engine
        self._progress = progress
        self._run_path = run_path
        self._log_to = log_to
        self._over = threading.Event()
        self._trainings: dict[str, _Training] = {}
        self._downloads: dict[str, dict[str, Mapping[str, Any]]] = {}  # what each worker posted last
        self._warned: dict[str, tuple[float, int]] = {}  # kind of warning -> (when it was said, how many there were)
        self._looking = threading.Lock()

    def start(self) -> None:
        """None; begins to look."""
        threading.Thread(target=self._keep_looking, daemon=True).start()

    def stop(self) -> None:
        """None; looks a last time, and no more."""
        self._over.set()
        self._look(is_last=True)

    @contextlib.contextmanager
    def training(self, label: str, samples_seen: int, out_path: str, settings: Mapping[str, Any]) -> Iterator[None]:
        """Watches a training while the block runs.

        Args:
            label: its step.
            samples_seen: its budget.
            settings: what trackers keep as its configuration.
        """
        watched = _Training(label, samples_seen, out_path, settings, self._progress, self._run_path, self._log_to)
        self._trainings[label] = watched
        try:
            yield
        finally:
            self._look()
            self._trainings.pop(label)
            watched.end()

    @contextlib.contextmanager
    def download(self, label: str) -> Iterator[None]:
        """Watches a download while the block runs."""
        self._downloads[label] = {}
        try:
            yield
        finally:
            self._look()
            self._downloads.pop(label)

    def _keep_looking(self) -> None:
        while not self._over.wait(LOOK_EVERY_S):
            self._look()

    def _look(self, is_last: bool = False) -> None:
        with self._looking:
            try:
                posted = self._engine.posted() if self._trainings or self._downloads else {}
                warned = self._engine.warned()
            except Exception as error:  # the board is a convenience: without it a run is only less talkative
                log.logger.debug("no progress to show: %s", error)
                return
            for label, before in list(self._downloads.items()):
                self._show_download(label, posted, before)
            for label, watched in list(self._trainings.items()):
                if label in posted:
                    watched.show(posted[label])
            for kind, (count, text) in warned.items():
                self._show_warning(kind, count, text, is_last)

    def _show_warning(self, kind: str, count: int, text: str, is_last: bool) -> None:
        """None; says the newest of a kind of warnings, at once the first time, and then now and then."""
        said_s, before = self._warned.get(kind, (0.0, 0))
        now_s = time.monotonic()
        if count == before or (before and not is_last and now_s - said_s < WARN_EVERY_S):
            return
        self._warned[kind] = (now_s, count)
        self._progress.event("warning", at=kind, count=count, text=text)
        more = f" ({count - before:,} such warnings since the last one)" if before else ""
        self._progress.say(f"warning: from a worker: {text}{more}")

    def _show_download(self, label: str, posted: Mapping[str, Mapping], seen: dict[str, Mapping[str, Any]]) -> None:
        """None; advances the download's line by what its workers posted since it was last looked at."""
        for worker, values in posted.items():
            if not worker.startswith(f"{label}@"):
                continue
            before = seen.get(worker, {"rows": 0, "ok_rows": 0, "failed": {}})
            seen[worker] = dict(values)
            failed = {reason: count - before["failed"].get(reason, 0) for reason, count in values["failed"].items()}
            new_rows = values["rows"] - before["rows"]
            if not new_rows:
                continue
            rows = sum(found["rows"] for found in seen.values())
            share = sum(found["ok_rows"] for found in seen.values()) / rows
            speed = sum(found["bytes"] / found["seconds"] for found in seen.values())
            note = f"{log.short_count(speed)}B/s  {share:.0%} ok"
            self._progress.advance(label, new_rows, values["ok_rows"] - before["ok_rows"], failed, note)


class _Training:
    """One training; show() and end() may be called from different threads."""

    def __init__(
        self,
        label: str,
        samples_seen: int,
        out_path: str,
        settings: Mapping[str, Any],
        progress: log.Progress,
        run_path: str,
        log_to: Sequence[str],
    ):
        self._label, self._total, self._progress = label, samples_seen, progress
        self._metrics_path = storage.join(out_path, METRICS_FILE)
        self._settings, self._run_path = settings, run_path
        self._lock = threading.Lock()
        self._ended = False
        self._seen: int | None = None
        self._alarms: set[str] = set()
        self._waiting = list(log_to)  # trackers that are opened with the first line
        self._trackers: dict[str, trackers.Tracker] = {}
        self._tracked_step = 0
        self._read_s = time.monotonic()

    def show(self, values: Mapping[str, Any]) -> None:
        """None; puts the newest line on the screen."""
        with self._lock:
            if self._ended:
                return
            self._warn(values)
            if self._seen is None:  # it may have waited for a place, or goes on from a saved step
                self._seen = values["from_samples"]
                self._progress.start(self._label, self._total - self._seen, "samples")
            self._advance(values)
            if (self._waiting or self._trackers) and time.monotonic() - self._read_s > READ_EVERY_S:
                self._track(self._lines())

    def end(self) -> None:
        """None; the training is over: what was not seen yet is said and tracked."""
        with self._lock:
            self._ended = True
            lines = self._lines()
            for line in lines:
                self._warn(line)
            if lines and self._seen is not None:
                self._advance(lines[-1])
            self._track(lines)
            for name, tracker in list(self._trackers.items()):
                self._try(name, tracker.close)

    def _advance(self, line: Mapping[str, Any]) -> None:
        new = line["samples_seen"] - (self._seen or 0)
        if new > 0:  # less where the training went on from an earlier state
            self._seen = line["samples_seen"]
            self._progress.advance(self._label, new, new, note=note(line))

    def _warn(self, line: Mapping[str, Any]) -> None:
        alarm = line.get("alarm")
        if alarm and alarm not in self._alarms:
            self._alarms.add(alarm)
            self._progress.event("alarm", step=self._label, text=alarm)
            self._progress.say(f"warning: {self._label}: {alarm}")

    def _lines(self) -> list[dict[str, Any]]:
        self._read_s = time.monotonic()
        try:
            text = storage.read_bytes(self._metrics_path).decode()
        except Exception as error:  # it may not be there yet; and what is seen must not fail what is trained
            log.logger.debug("%s: no metrics to show: %s", self._label, error)
            return []
        return [json.loads(line) for line in text.splitlines()]

    def _track(self, lines: Sequence[Mapping[str, Any]]) -> None:
        new = [line for line in lines if line["step"] > self._tracked_step]
        if not new:
            return
        self._tracked_step = new[-1]["step"]
        for name in self._waiting:
            self._try(name, self._open, name)
        self._waiting = []
        for name, tracker in list(self._trackers.items()):
            self._try(name, self._add, tracker, new)

    def _open(self, name: str) -> None:
        self._trackers[name] = trackers.TRACKERS[name](self._run_path, self._label, self._settings)

    @staticmethod
    def _add(tracker: trackers.Tracker, lines: Sequence[Mapping[str, Any]]) -> None:
        for line in lines:
            tracker.add(line)
        tracker.flush()

    def _try(self, name: str, action: Callable[..., None], *arguments: Any) -> None:
        """None; a tracker that fails is given up: metrics.jsonl has it all, and the training goes on."""
        try:
            action(*arguments)
        except Exception as error:  # of whatever class: packages and servers have their own
            self._trackers.pop(name, None)
            self._progress.say(f"warning: {self._label}: no more lines for {name}: {one_line(error)}")


def note(line: Mapping[str, Any]) -> str:
    """What the live line of a training says beside its speed: `loss 3.512 (ln batch 4.159)  data wait 3%`."""
    chance = "at chance" if line["ln_batch"] is None else "ln batch"
    return f"loss {line['loss']:.3f} ({chance} {line['chance_loss']:.3f})  data wait {line['data_wait_fraction']:.0%}"
