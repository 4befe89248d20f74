"""The engine on a real Ray: order, retries, lost workers, honest failures."""

from __future__ import annotations

import os
import pathlib
import time

import pytest

from pipeline.core.config import Resources
from pipeline.core.engine import Engine
from pipeline.core.errors import StepError, WinnowError


@pytest.fixture(scope="module")
def engine():
    engine = Engine()
    yield engine
    engine.close()


def square(number):
    time.sleep(0.05 * (number % 3))
    return number * number


def fail_at(number):
    if number % 2:
        raise WinnowError(f"bad input {number}")
    return number


def die_once(folder, number):
    mark = pathlib.Path(folder) / f"{number}.died"
    if number == 2 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    return number


def stumble_once(folder, number):
    mark = pathlib.Path(folder) / f"{number}.stumbled"
    if not mark.exists():
        mark.touch()
        raise OSError("a hiccup of the store")
    return number


class Adder:
    def __init__(self, folder, base):
        if base is None:
            raise WinnowError("model x: weights can't be loaded")
        self.folder, self.base = folder, base
        pathlib.Path(folder, f"loaded-{os.getpid()}").touch()

    def process(self, number):
        return self.base + die_once(self.folder, number)


def names(count):
    return [f"step/{index:05d}" for index in range(count)]


def test_results_keep_the_items_order(engine):
    seen = []
    done = engine.map(square, [(n,) for n in range(7)], names(7), Resources(), lambda i, r: seen.append((i, r)))
    assert done == [n * n for n in range(7)]
    assert sorted(seen) == [(n, n * n) for n in range(7)]


def test_failed_items_are_named_with_their_causes(engine):
    with pytest.raises(StepError, match=r"2 of 4 failed: .*step/00001: bad input 1.*") as caught:
        engine.map(fail_at, [(n,) for n in range(4)], names(4), Resources())
    assert "step/00003: bad input 3" in str(caught.value)


def test_an_exception_is_retried_and_a_killed_worker_too(engine, tmp_path):
    items = [(str(tmp_path), n) for n in range(4)]
    assert engine.map(stumble_once, items, names(4), Resources()) == [0, 1, 2, 3]
    assert engine.map(die_once, items, names(4), Resources()) == [0, 1, 2, 3]
    assert (tmp_path / "2.died").exists()


def test_actors_load_once_and_a_killed_one_is_replaced(engine, tmp_path):
    done = engine.map_on_actors(Adder, (str(tmp_path), 10), [(n,) for n in range(8)], names(8), Resources(workers=1))
    assert done == [10 + n for n in range(8)]
    assert len(list(tmp_path.glob("loaded-*"))) == 2  # the first, and the one that replaced it


def test_a_worker_that_cannot_load_says_why(engine, tmp_path):
    with pytest.raises(StepError, match="a worker did not start: .*weights can't be loaded"):
        engine.map_on_actors(Adder, (str(tmp_path), None), [(1,)], names(1), Resources(workers=1))
