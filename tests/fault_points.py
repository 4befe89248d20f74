"""Faults at chosen places inside the real processes of a run: this file is their `sitecustomize`.

    env = put(folder, [Point("killed", "stages.score_shard:score_shard", holds="'00002'")])   # for the run and its cluster
    os.kill(pid_at(folder, "killed"), signal.SIGKILL)

Every Python process with that environment (driver, workers) wraps the named functions when their modules are imported;
nothing else of the product changes. The first `times` calls, of all processes together, whose arguments hold the text
meet the fault: the process waits (for a signal from outside, or for `release`), kills itself, allocates, or raises.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.machinery
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

POINTS_FILE = "points.json"


@dataclass(frozen=True)
class Point:
    """A place, `module:function` or `module:Class.method`, and what the calls there meet.

    `do` is wait, allocate, pause (half a second), the name of a signal or that of a built-in exception.
    """

    name: str
    place: str
    holds: str = ""
    do: str = "wait"
    times: int = 1


def put(folder: str, points: Sequence[Point]) -> dict[str, str]:
    """{PYTHONPATH: ...} of processes that shall meet the points; the folder must be there, empty."""
    os.symlink(os.path.abspath(__file__), os.path.join(folder, "sitecustomize.py"))
    write(folder, points)
    return {"PYTHONPATH": folder}


def write(folder: str, points: Sequence[Point]) -> None:
    """None; from now on new processes meet these points, and those before no more."""
    text = json.dumps([dataclasses.asdict(point) for point in points])
    with open(os.path.join(folder, f"{POINTS_FILE}.new"), "w", encoding="utf-8") as file:
        file.write(text)
    os.replace(os.path.join(folder, f"{POINTS_FILE}.new"), os.path.join(folder, POINTS_FILE))


def pid_at(folder: str, name: str, number: int = 0) -> int | None:
    """The process that met the point as the `number`-th; None when none did yet."""
    try:
        with open(os.path.join(folder, f"{name}.{number}"), encoding="utf-8") as file:
            return int(file.read() or 0) or None
    except FileNotFoundError:
        return None


def release(folder: str, name: str) -> None:
    """None; who waits at the point goes on."""
    with open(os.path.join(folder, f"{name}.go"), "w", encoding="utf-8"):
        pass


def _meet(folder: str, point: Point, arguments: object) -> None:
    if point.holds not in repr(arguments):
        return
    for number in range(point.times):
        try:
            place = os.open(os.path.join(folder, f"{point.name}.{number}"), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            continue
        os.write(place, str(os.getpid()).encode())
        os.close(place)
        break
    else:
        return
    if point.do == "wait":
        while not os.path.exists(os.path.join(folder, f"{point.name}.go")):
            time.sleep(0.02)
    elif point.do == "pause":
        time.sleep(0.5)
    elif point.do == "allocate":
        taken = []
        while True:
            taken.append(b"\1" * (32 << 20))
            time.sleep(0.02)
    elif point.do.startswith("SIG"):
        os.kill(os.getpid(), getattr(signal, point.do))
        time.sleep(600)  # a signal may take its time
    else:
        import builtins

        raise getattr(builtins, point.do)("made by a test")


class _Finder:
    """Finds the modules of the points as they are found anyway, and wraps their functions once they are there."""

    def __init__(self, folder: str, points: Sequence[Point]):
        self.folder = folder
        self.points: dict[str, list[Point]] = {}
        for point in points:
            self.points.setdefault(point.place.partition(":")[0], []).append(point)

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name not in self.points:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: Any) -> None:
                run(module)
                for point in self.points[name]:
                    self._wrap(module, point)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def _wrap(self, module: Any, point: Point) -> None:
        *owners, name = point.place.partition(":")[2].split(".")
        owner = functools.reduce(getattr, owners, module)
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def wrapped(*arguments: Any, **named: Any) -> Any:
            _meet(self.folder, point, (arguments, named))
            return function(*arguments, **named)

        setattr(owner, name, wrapped)


if __name__ == "sitecustomize":
    _folder = os.path.dirname(__file__)  # of the link
    with open(os.path.join(_folder, POINTS_FILE), encoding="utf-8") as _file:
        _points = [Point(**entry) for entry in json.load(_file)]
    sys.meta_path.insert(0, _Finder(_folder, _points))  # type: ignore[arg-type]
