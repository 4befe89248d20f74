"""The engine on a real Ray: order, retries, lost workers, honest failures; a deduplication whose workers are killed."""

from __future__ import annotations

import logging
import os
import pathlib
import time

import numpy as np
import pytest

from pipeline.core import engine as engines
from pipeline.core import pool
from pipeline.core.config import Resources
from pipeline.core.engine import Engine
from pipeline.core.errors import NetworkDownError, StepError, WinnowError
from pipeline.core.machines import Machine
from pipeline.core.passes import Passes
from stages import build_stage
from stages.stage_worker import StageJob, StageWorker, fit, fit_path
from tests.duplicates_fixture import run_stage
from tests.pool_fixture import drawing, random_uids, write_pool
from tests.test_caption_duplicates import corpus

pytestmark = pytest.mark.ray


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


def warn(number):
    logging.getLogger("winnow").warning("shard %d is slow", number)
    logging.getLogger("winnow").info("shard %d", number)
    return number


class Warner:
    process = staticmethod(warn)


def die(number):
    if number == 1:
        os.kill(os.getpid(), 9)
    return number


class Adder:
    def __init__(self, folder, base):
        if base is None:
            raise WinnowError("model x: weights can't be loaded")
        self.folder, self.base = folder, base
        pathlib.Path(folder, f"loaded-{os.getpid()}").touch()

    def process(self, number):
        return self.base + die_once(self.folder, number)


class Juggler(Adder):
    """Has several items in work at once; one of them kills it."""

    def __init__(self, folder, base):
        super().__init__(folder, base)
        self.busy = self.most = 0

    def process(self, number):
        self.busy += 1
        self.most = max(self.most, self.busy)
        if number == 99:
            raise NetworkDownError("nothing answers")
        time.sleep(0.2)
        done = super().process(number)
        self.busy -= 1
        return done, self.most


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


def test_an_item_that_kills_its_worker_is_named_and_the_others_are_done(engine, monkeypatch):
    told, done = [], []
    monkeypatch.setattr(engine, "_on_retry", lambda name, cause: told.append((name, cause)))
    with pytest.raises(StepError, match=r"1 of 4 failed: step/00001: its worker died"):
        engine.map(die, [(n,) for n in range(4)], names(4), Resources(), lambda index, _: done.append(index))
    assert sorted(done) == [0, 2, 3]
    assert [name for name, _ in told] == ["step/00001"] * 2  # the third time it is named
    assert all(cause.startswith("its worker died") for _, cause in told)


def test_warnings_of_workers_reach_the_driver_by_kind(engine):
    engine.map(warn, [(n,) for n in range(3)], names(3), Resources())
    engine.map_on_actors(Warner, (), [(n,) for n in range(3)], names(3), Resources())
    found, deadline_s = [], time.monotonic() + 20
    while sum(count for count, _ in found) < 6 and time.monotonic() < deadline_s:  # they come when they come
        time.sleep(0.1)
        found = [entry for entry in engine.warned().values() if "shard" in entry[1]]
    ((count, text),) = found
    assert count == 6 and text in {f"shard {n} is slow" for n in range(3)}


def test_what_items_held_is_counted(engine):
    cpu_hours, gpu_hours = engine.cpu_hours, engine.gpu_hours
    engine.map(time.sleep, [(0.2,), (0.3,)], names(2), Resources(cpus=0.5))
    assert 0.25 <= 3600 * (engine.cpu_hours - cpu_hours) < 1 and engine.gpu_hours == gpu_hours
    engine.spend(1.0, 2.0)
    assert engine.gpu_hours == gpu_hours + 2


@pytest.mark.parametrize(
    "waits_for, said",
    [
        (None, []),
        ((Resources(cpus=0.25), 2), []),
        ((Resources(cpus=999), 2), ["step  waits for room for 2 workers with 999 CPUs each, and there is for 0"]),
        ((Resources(labels={"m": "spot"}), 1), ["step  waits for a machine with 1 CPU, m spot, and there is none"]),
    ],
)
def test_an_item_that_waits_for_workers_in_vain_says_so_once(engine, monkeypatch, waits_for, said):
    heard = []
    monkeypatch.setattr(engines, "SAY_AFTER_S", 0.1)
    monkeypatch.setattr(engines, "LOOK_EVERY_S", 0.2)
    monkeypatch.setattr(engine, "_say", heard.append)
    engine.map(time.sleep, [(1.5,)], names(1), Resources(cpus=0), waits_for=waits_for)
    assert heard == said


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        ({"cpus": 1}, 8),
        ({"cpus": 0.1, "gpus": 0.1}, 20),
        ({"cpus": 4, "gpus": 2}, 1),
        ({"cpus": 16}, 0),
        ({"cpus": 0, "gpus": 0}, 8),
        ({"cpus": 0, "memory_gb": 5}, 3),
        ({"labels": {"kind": "spot"}}, 8),
        ({"labels": {"kind": "!spot"}}, 0),
        ({"labels": {"kind": "in(a, spot)", "zone": "!in(a,b)"}}, 8),
        ({"labels": {"zone": "c"}}, 0),
    ],
)
def test_how_many_workers_a_machine_holds(wanted, count):
    machine = Machine("a", {"CPU": 8.0, "GPU": 2.0, "memory": 15.5 * 2**30}, {"kind": "spot"})
    assert machine.holds(Resources(**wanted)) == count


def test_every_machine_answers_or_says_why(engine):
    ((name, found),) = engine.on_each_machine(square, 7)
    assert (name, found) == (engine.machines()[0].name, 49)
    ((_, error),) = engine.on_each_machine(fail_at, 1)
    assert isinstance(error, WinnowError) and str(error) == "bad input 1"


def test_actors_load_once_and_a_killed_one_is_replaced(engine, tmp_path):
    done = engine.map_on_actors(Adder, (str(tmp_path), 10), [(n,) for n in range(8)], names(8), Resources(workers=1))
    assert done == [10 + n for n in range(8)]
    assert len(list(tmp_path.glob("loaded-*"))) == 2  # the first, and the one that replaced it


def test_a_worker_that_cannot_load_says_why(engine, tmp_path):
    with pytest.raises(StepError, match="a worker did not start: .*weights can't be loaded"):
        engine.map_on_actors(Adder, (str(tmp_path), None), [(1,)], names(1), Resources(workers=1))


def test_an_actor_with_several_items_at_once_loses_only_those(engine, tmp_path):
    items = [(n,) for n in range(9)]
    counts = {}

    def on_done(index, result):
        counts[index] = counts.get(index, 0) + 1

    done = engine.map_on_actors(
        Juggler, (str(tmp_path), 10), items, names(9), Resources(workers=2, cpus=0.5), on_done, items_at_once=3
    )
    assert [value for value, _ in done] == [10 + n for n in range(9)]
    assert max(most for _, most in done) == 3
    assert counts == dict.fromkeys(range(9), 1)
    assert len(list(tmp_path.glob("loaded-*"))) in (2, 3)  # one is replaced if the other can't take all at once


def test_a_network_that_is_down_stops_the_whole_map(engine, tmp_path):
    items = [(n,) for n in (0, 1, 99, *range(3, 60))]
    done = []
    with pytest.raises(NetworkDownError, match="nothing answers"):
        engine.map_on_actors(
            Juggler,
            (str(tmp_path), 10),
            items,
            names(60),
            Resources(workers=1),
            lambda index, _: done.append(index),
            items_at_once=3,
        )
    assert len(done) < 10


def die_once_a_pass(folder, function, *item):
    """What a pass runs, on a worker that is killed at the first item of two of the passes."""
    mark = pathlib.Path(folder) / function.__name__
    if function.__name__ in ("write_keys", "write_groups") and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), 9)
    function(*item)


def test_the_same_survivors_for_any_workers_and_when_they_are_killed(engine, tmp_path):
    captions = corpus(600, seed=5)
    uids = random_uids(np.random.default_rng(0), len(captions))
    rows = [{"image": drawing(1), "caption": text, "uid": uid} for text, uid in zip(captions, uids, strict=True)]
    path = write_pool(tmp_path, [rows[:150], rows[150:350], rows[350:]])
    shards = pool.load_shards(path)
    columns, _, _ = run_stage(path, tmp_path / "minhash", build_stage("minhash", {}, ""))
    stage = build_stage("caption_duplicates", {}, "")

    def files(name: str) -> dict[str, bytes]:
        return {shard.name: (tmp_path / name / f"{shard.name}.parquet").read_bytes() for shard in shards}

    def files_on_ray(name: str, workers: int, killed: bool) -> dict[str, bytes]:
        job = StageJob(stage, str(tmp_path / name), columns)
        resources = Resources(cpus=0.5, workers=workers)
        marks = tmp_path / f"{name}_marks"
        marks.mkdir()

        def run(function, items, names, on_done):
            if killed:
                items = [(str(marks), function, *item) for item in items]
            engine.map(die_once_a_pass if killed else function, items, names, resources, on_done)

        fit(path, job, shards, Passes(run, fit_path(job)))
        names = [shard.name for shard in shards]
        engine.map_on_actors(StageWorker, (path, [job], "cpu", 1), [(shard,) for shard in shards], names, resources)
        assert len(list(marks.iterdir())) == (2 if killed else 0)
        return files(name)

    run_stage(path, tmp_path / "here", stage, columns)
    assert files_on_ray("two", 2, killed=False) == files("here")
    assert files_on_ray("four", 4, killed=True) == files("here")
