"""What a user watches of a training: the lines of metrics.jsonl.

Shapes: B pairs, D embedding width.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Mapping
from typing import Any

from pipeline.core import log, storage

METRICS_FILE = "metrics.jsonl"
WRITE_EVERY_S = 10.0  # the file is written whole, as object stores can't append
RECENT_S = 600.0


class MetricsFile:
    """metrics.jsonl: the lines of an interrupted training up to the step where this one goes on, then new ones."""

    def __init__(self, out_path: str, first_step: int):
        self._path = storage.join(out_path, METRICS_FILE)
        self._written_s = time.monotonic()
        self._lines: list[str] = []
        self._own: list[Mapping[str, Any]] = []
        if storage.exists(self._path):
            self._warn_if_recent()
            for text in storage.read_bytes(self._path).decode().splitlines():
                if json.loads(text)["step"] <= first_step:
                    self._lines.append(text)

    def _warn_if_recent(self) -> None:
        if storage.is_url(self._path):
            return
        age_s = datetime.datetime.now().timestamp() - int(storage.stamp(self._path)) / 1e9
        if age_s < RECENT_S:
            log.logger.warning(
                "%s was written %.0f s ago: if another run trains here, both do the same work", self._path, age_s
            )

    def add(self, line: Mapping[str, Any]) -> None:
        self._own.append(line)
        self._lines.append(json.dumps(line))
        if time.monotonic() - self._written_s > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        storage.write_bytes(self._path, "".join(f"{line}\n" for line in self._lines).encode())
        self._written_s = time.monotonic()

    def samples_per_s(self) -> float | None:
        """Over this process's lines but the first, which carries what happens once; None with fewer than two."""
        counted = self._own[1:]
        seconds = sum(
            (line["samples_seen"] - before["samples_seen"]) / line["samples_per_s"]
            for before, line in zip(self._own, counted, strict=False)
        )
        if not seconds:
            return None
        return (counted[-1]["samples_seen"] - self._own[0]["samples_seen"]) / seconds
