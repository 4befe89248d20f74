"""Passes over a pool: functions that each write one file per item, resumed by the files that are there.

A pass is a folder of files `00000.arrow ...`, one an item, each written whole by one task. A pass that was dropped,
once those that read it are complete, leaves the file DROPPED, so that a resumed run does not make it again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.core import storage

DROPPED = "dropped"


@dataclass(frozen=True)
class Pass:
    """The files of one finished pass."""

    folder: str
    num_files: int

    @property
    def paths(self) -> list[str]:
        """The files' paths, in the items' order."""
        return [self.path(number) for number in range(self.num_files)]

    def path(self, number: int) -> str:
        """The path of one item's file."""
        return storage.join(self.folder, f"{number:05d}.arrow")


class Passes:
    """Runs passes one after the other, each item a task.

    Args:
        run: (function, items, names, on_done), as Engine.map without its resources.
        folder: where the passes' folders are.
        on_progress: called with (name of the pass, items done, items in all).
    """

    def __init__(
        self,
        run: Callable[..., Any],
        folder: str,
        on_progress: Callable[[str, int, int], None] = lambda name, done, total: None,
    ):
        self.folder = folder
        self._run = run
        self._on_progress = on_progress

    def run(self, name: str, function: Callable[..., None], items: Sequence[tuple]) -> Pass:
        """The pass of this name, after function(*item, path) has written the file of every item.

        Args:
            function: of an importable module; it writes its file whole (pipeline.core.exchange.write).
        """
        made = Pass(storage.join(self.folder, name), len(items))
        there = set(storage.list_files(made.folder))
        todo = [number for number in range(len(items)) if storage.name_of(made.path(number)) not in there]
        if DROPPED in there or not todo:
            return made
        done = len(items) - len(todo)

        def count(index: int, result: Any) -> None:
            nonlocal done
            done += 1
            self._on_progress(name, done, len(items))

        self._run(
            function,
            [(*items[number], made.path(number)) for number in todo],
            [f"{name}/{number:05d}" for number in todo],
            count,
        )
        return made

    def drop(self, *passes: Pass) -> None:
        """None; removes the files of passes that nothing will read again."""
        for made in passes:
            if not storage.exists(storage.join(made.folder, DROPPED)):
                storage.write_bytes(storage.join(made.folder, DROPPED), b"")
            for path in storage.list_files(made.folder):
                if path != DROPPED:
                    storage.delete(storage.join(made.folder, path))

    def work(self) -> Passes:
        """Passes that nobody reads once the facts of all are written: their folder is deleted then."""
        return self.within("work")

    def within(self, name: str) -> Passes:
        """Passes whose folders lie in a folder of this name."""
        return Passes(self._run, storage.join(self.folder, name), self._on_progress)


def timed(function: Callable[..., Any], *item: Any) -> tuple[float, Any]:
    """(seconds, what the function returned): one item of a pass, with its cost."""
    started = time.perf_counter()
    found = function(*item)
    return time.perf_counter() - started, found
