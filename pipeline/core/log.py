"""What a run says while it works: a live line per step in a terminal, plain lines otherwise, and log.jsonl always.

One logger, `winnow`. Events (a step's start, progress and end, items that are done again, tracebacks) go to the screen
and, as JSON lines, to the run's log.jsonl. A plain line looks like

    clip  412/1288 shards  32%  5.1k samples/s  failed 3 (2 truncated_tar, 1 undecodable)  eta 12m
"""

from __future__ import annotations

import datetime
import json
import logging
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.core import storage
from pipeline.core.errors import one_line, without_secrets

logger = logging.getLogger("winnow")
PLAIN_LINE_EVERY_S = 10.0
NAMED_REASONS = 4  # of failures, in a live line
STORE_EVERY_S = 60.0  # between the ends of steps, where the log is on an object store
STORE_GROWTH = 1.05  # and it has grown by so much: all that is written is then a small multiple of the log
STORE_WITHIN_S = 600.0  # however little it has grown


def setup() -> None:
    """None; sends the `winnow` logger to stderr, once."""
    if not logger.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False


def screen_width() -> int | None:
    """Columns of the terminal that stdout goes to; None when it goes to a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def short_count(number: float) -> str:
    """`950`, `5.1k`, `12.8M`, `1.3B`."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def short_time(seconds: float) -> str:
    """`45s`, `12m`, `3h05m`."""
    if seconds < 60:
        return f"{seconds:.0f}s"
    if seconds < 3600:
        return f"{seconds / 60:.0f}m"
    return f"{int(seconds // 3600)}h{int(seconds % 3600 // 60):02d}m"


@dataclass
class _Running:
    total: float
    unit: str
    started_s: float
    done: float = 0
    samples: int = 0
    failed: dict[str, int] = field(default_factory=dict)
    note: str = ""
    task_id: Any = None
    last_line_s: float = 0

    def counts(self) -> dict[str, Any]:
        """What an event says of how far a step is."""
        return {"done": self.done, "total": self.total, "samples": self.samples, "failed": self.failed}


class Meter(Protocol):
    """Who counts what is done for somebody else: the engine, for Ray's metrics."""

    def count(self, step: str, unit: str, units: float, samples: int, failed: Mapping[str, int]) -> None: ...

    def running(self, step: str, on: bool) -> None: ...


class Progress:
    """The run's screen and log file; methods may be called from any thread.

    `units` are those done so far of all steps, by unit; `retries` the items that were done again, by cause; `meter` is
    told of everything that is done.
    """

    def __init__(self, log_path: str | None = None):
        self.units: Counter[str] = Counter()
        self.retries: Counter[str] = Counter()
        self.meter: Meter | None = None
        self._log_path = log_path
        self._events: list[str] = []
        self._stored = 0  # how many of them are on the object store, and since when
        self._stored_s = time.monotonic()
        self._running: dict[str, _Running] = {}
        self._lock = threading.RLock()
        self._storing = threading.Lock()
        self._warned = False  # that the log can't be written
        self._live = None
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn
            from rich.progress import Progress as RichProgress

            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TextColumn("{task.fields[text]}"))
            self._live = RichProgress(*columns, console=Console(stderr=True), transient=True)
            self._live.start()

    def start(self, step: str, total: float, unit: str = "shards") -> None:
        """None; a step begins, with `total` units of work ahead."""
        with self._lock:
            running = _Running(total, unit, time.monotonic(), last_line_s=time.monotonic())
            if self._live:
                running.task_id = self._live.add_task(step, total=max(total, 1), text="")
            self._running[step] = running
            if self.meter:
                self.meter.running(step, True)
        self.event("start", step=step, total=total, unit=unit)

    def advance(
        self, step: str, units: float = 1, samples: int = 0, failed: Mapping[str, int] | None = None, note: str = ""
    ) -> None:
        """None; `units` of work are done, which covered `samples`; `failed` counts rows by reason."""
        with self._lock:
            running = self._running.get(step)
            if running is None:
                return
            running.done += units
            running.samples += samples
            running.note = note
            for reason, count in (failed or {}).items():
                running.failed[reason] = running.failed.get(reason, 0) + count
            self.units[running.unit] += units  # type: ignore[assignment]  # whole ones, whatever their type
            if self.meter:
                self.meter.count(step, running.unit, units, samples, failed or {})
            if self._live:
                self._live.update(running.task_id, completed=running.done, text=self._text(running))
            if time.monotonic() - running.last_line_s < PLAIN_LINE_EVERY_S:
                return
            running.last_line_s = time.monotonic()
            if not self._live:
                logger.info("%s  %s", step, self._text(running))
            counts = running.counts()
        self.event("progress", step=step, **counts)

    def end(self, step: str, summary: str = "") -> None:
        """None; the step is over, `summary` says how it ended."""
        with self._lock:
            running = self._running.pop(step, None)
            seconds = time.monotonic() - running.started_s if running else 0.0
            if running and self._live:
                self._live.remove_task(running.task_id)
            if running and self.meter:
                self.meter.running(step, False)
            rate = ""
            if running and running.samples and seconds >= 0.1:
                rate = f"  {short_count(running.samples)} samples, {short_count(running.samples / seconds)}/s"
            self.say(f"{step}  {summary or 'done'}  {seconds:.1f}s{rate}")
            counts = running.counts() if running and running.done else {}  # some steps count nothing
        self.event("end", step=step, summary=summary, seconds=round(seconds, 3), **counts)

    def drop(self, step: str) -> None:
        """None; takes a step's line away, where it goes on under other names or what it was a part of has failed."""
        with self._lock:
            running = self._running.pop(step, None)
            if running and self._live:
                self._live.remove_task(running.task_id)
            if running and self.meter:
                self.meter.running(step, False)

    def retry(self, item: str, cause: str) -> None:
        """None; an item is done again; `cause` is one line, counted by what stands before its first colon or comma."""
        with self._lock:
            self.retries[re.split("[:,]", cause, maxsplit=1)[0]] += 1
        self.event("retry", item=item, cause=cause)

    def say(self, text: str) -> None:
        """None; prints a line above the live ones, without secrets."""
        text = without_secrets(text.encode("utf-8", "replace").decode())  # a file's name may be no Unicode
        if self._live:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            logger.info("%s", text)

    def event(self, kind: str, **values: Any) -> None:
        """None; adds a line to log.jsonl."""
        now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds")
        line = json.dumps({"time": now, "event": kind, **values}, ensure_ascii=False, default=str)
        line = without_secrets(line.encode("utf-8", "replace").decode())  # a file's name may be no Unicode
        if self._log_path is None:
            return
        if storage.is_url(self._log_path):
            with self._lock:
                self._events.append(line)
                waited_s = time.monotonic() - self._stored_s
                has_grown = waited_s >= STORE_EVERY_S and len(self._events) >= STORE_GROWTH * self._stored
                is_due = kind == "end" or has_grown or waited_s >= STORE_WITHIN_S
            if is_due and self._storing.acquire(blocking=False):  # what another thread stores now has most of it
                try:
                    self._store()
                finally:
                    self._storing.release()
            return
        with self._lock:
            try:
                with open(self._log_path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")
            except OSError as error:  # a full disk ends the steps that write to it; what is logged must not
                if not self._warned:
                    self._warned = True
                    logger.warning("warning: %s can't be written: %s", self._log_path, one_line(error))

    def close(self) -> None:
        """None; gives the terminal back, and stores what is not stored yet of the log."""
        if self._live:
            self._live.stop()
            self._live = None
        with self._storing:
            if len(self._events) > self._stored:
                self._store()

    def _store(self) -> None:
        """None; an object store can't append: the whole log again. Not under the lock: a store may take its time."""
        with self._lock:
            events, self._stored_s = list(self._events), time.monotonic()
        try:
            storage.write_bytes(self._log_path or "", ("\n".join(events) + "\n").encode())
            self._stored = len(events)
        except Exception as error:  # of whatever class: what is logged must not fail what is done
            logger.warning("warning: %s was not written: %s", self._log_path, one_line(error))

    @staticmethod
    def _text(running: _Running) -> str:
        elapsed_s = max(time.monotonic() - running.started_s, 1e-9)
        parts = []
        if running.total:
            parts += [f"{running.done:g}/{running.total:g} {running.unit}", f"{running.done / running.total:.0%}"]
        if running.samples:
            parts.append(f"{short_count(running.samples / elapsed_s)} samples/s")
        if running.failed:
            most = sorted(running.failed.items(), key=lambda entry: (-entry[1], entry[0]))
            reasons = ", ".join(f"{count} {reason}" for reason, count in most[:NAMED_REASONS])
            reasons += ", ..." if len(most) > NAMED_REASONS else ""
            parts.append(f"failed {sum(running.failed.values())} ({reasons})")
        if running.note:
            parts.append(running.note)
        if running.total and 0 < running.done < running.total:
            parts.append(f"eta {short_time(elapsed_s * (running.total - running.done) / running.done)}")
        return "  ".join(parts)
