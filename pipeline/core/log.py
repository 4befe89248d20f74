"""What a run says while it works: a live line per step in a terminal, plain lines otherwise, and log.jsonl always.

One logger, `winnow`. Events (a step's start, progress and end) go to the screen and, as JSON lines, to the run's
log.jsonl. A plain line looks like

    clip  412/1288 shards  32%  5.1k samples/s  failed 3 (2 truncated_tar, 1 undecodable)  eta 12m
"""

from __future__ import annotations

import datetime
import json
import logging
import shutil
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.core import storage
from pipeline.core.errors import without_secrets

logger = logging.getLogger("winnow")
PLAIN_LINE_EVERY_S = 10.0
NAMED_REASONS = 4  # of failures, in a live line


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


class Progress:
    """The run's screen and log file; methods may be called from any thread."""

    def __init__(self, log_path: str | None = None):
        self._log_path = log_path
        self._events: list[str] = []
        self._running: dict[str, _Running] = {}
        self._lock = threading.RLock()
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
            if self._live:
                self._live.update(running.task_id, completed=running.done, text=self._text(running))
            elif time.monotonic() - running.last_line_s >= PLAIN_LINE_EVERY_S:
                running.last_line_s = time.monotonic()
                logger.info("%s  %s", step, self._text(running))
                self.event("progress", step=step, done=running.done, total=running.total, samples=running.samples)

    def end(self, step: str, summary: str = "") -> None:
        """None; the step is over, `summary` says how it ended."""
        with self._lock:
            running = self._running.pop(step, None)
            seconds = time.monotonic() - running.started_s if running else 0.0
            if running and self._live:
                self._live.remove_task(running.task_id)
            rate = ""
            if running and running.samples and seconds > 0:
                rate = f"  {short_count(running.samples)} samples, {short_count(running.samples / seconds)}/s"
            self.say(f"{step}  {summary or 'done'}  {seconds:.1f}s{rate}")
            self.event("end", step=step, summary=summary, seconds=round(seconds, 3))

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
        with self._lock:
            if self._log_path is None:
                return
            if storage.is_url(self._log_path):
                self._events.append(line)
                if kind in ("end", "run_end"):  # an object store can't append: the whole log again, now and then
                    storage.write_bytes(self._log_path, ("\n".join(self._events) + "\n").encode())
            else:
                with open(self._log_path, "a", encoding="utf-8") as file:
                    file.write(line + "\n")

    def close(self) -> None:
        """None; gives the terminal back."""
        if self._live:
            self._live.stop()
            self._live = None

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
