"""Stages of the whole pool run on small pools, without a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from pipeline.core import pool
from pipeline.core.passes import Passes
from stages.base import LoadContext, Stage
from stages.column_files import Column
from stages.score_shard import LoadedStage, score_shard
from stages.stage_worker import Reference, StageJob, fit, fit_path
from tests.passes_fixture import passes_here, run_here


def run_stage(
    pool_path: str,
    out_path: str,
    stage: Stage,
    columns: Mapping[str, Column] | None = None,
    references: Mapping[str, Reference] | None = None,
    within: str | None = None,
) -> tuple[dict[str, Column], list[dict[str, Any]], dict[str, Any]]:
    """(columns with those that the stage adds, its rows in the pool's order, facts of its fit).

    Args:
        references, within: see StageJob.
    """
    columns = dict(columns or {})
    shards = pool.load_shards(pool_path)
    needed = {name: column for name, column in columns.items() if name in stage.needs}
    job = StageJob(stage, str(out_path), needed, references=references or {}, within=within)
    facts: dict[str, Any] = {}
    if stage.whole_pool:
        facts = dict(fit(pool_path, job, shards, passes_here(fit_path(job))))
    entry = LoadedStage(stage, stage.load(LoadContext(fit_path=fit_path(job))), job.out_path, None, job.columns)
    rows = []
    for shard in shards:
        score_shard(pool_path, shard, [entry], within=within)
        rows += pool.read_table(f"{out_path}/{shard.name}.parquet").to_pylist()
    return columns | {name: Column(job.out_path, name) for name in stage.adds}, rows, facts


class _KilledError(Exception):
    pass


def fit_in_two(
    pool_path: str, out_path: str, stage: Stage, columns: Mapping[str, Column] | None, killed_at: str
) -> list[str]:
    """The passes that a second fit ran, the first one having been killed as this pass began.

    run_stage with the same arguments goes on from what they leave.
    """
    job = StageJob(stage, str(out_path), dict(columns or {}))
    done: list[str] = []

    def run_until(function, items, names, on_done):
        if names[0].startswith(killed_at + "/"):
            raise _KilledError
        run_here(function, items, names, on_done)

    def run_on(function, items, names, on_done):
        done.extend(dict.fromkeys(name.split("/")[0] for name in names))
        run_here(function, items, names, on_done)

    with pytest.raises(_KilledError):
        fit(pool_path, job, pool.load_shards(pool_path), Passes(run_until, fit_path(job)))
    fit(pool_path, job, pool.load_shards(pool_path), Passes(run_on, fit_path(job)))
    return done
