"""Deduplication on a real Ray: the same columns for any number of workers, when workers are killed, when it resumes."""

from __future__ import annotations

import os
import pathlib

import numpy as np
import pytest

from pipeline.core import pool
from pipeline.core.config import Resources
from pipeline.core.engine import Engine
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


def die_once(folder, function, *item):
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

    def files(name: str, workers: int, killed: bool) -> dict[str, bytes]:
        job = StageJob(stage, str(tmp_path / name), columns)
        resources = Resources(cpus=0.5, workers=workers)
        marks = tmp_path / f"{name}_marks"
        marks.mkdir()

        def run(function, items, names, on_done):
            if killed:
                items = [(str(marks), function, *item) for item in items]
            engine.map(die_once if killed else function, items, names, resources, on_done)

        fit(path, job, shards, Passes(run, fit_path(job)))
        engine.map_on_actors(
            StageWorker,
            (path, [job], "cpu", 1),
            [(shard,) for shard in shards],
            [shard.name for shard in shards],
            resources,
        )
        assert len(list(marks.iterdir())) == (2 if killed else 0)
        return {shard.name: (tmp_path / name / f"{shard.name}.parquet").read_bytes() for shard in shards}

    one = files("one", 1, killed=False)
    assert files("two", 2, killed=False) == one
    assert files("four", 4, killed=True) == one
