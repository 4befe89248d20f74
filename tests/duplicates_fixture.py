"""Stages of the whole pool run on small pools, without a cluster."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline.core import pool
from stages.base import LoadContext, Stage
from stages.column_files import Column
from stages.score_shard import LoadedStage, score_shard
from stages.stage_worker import StageJob, fit, fit_path
from tests.passes_fixture import passes_here


def run_stage(
    pool_path: str, out_path: str, stage: Stage, columns: Mapping[str, Column] | None = None
) -> tuple[dict[str, Column], list[dict[str, Any]], dict[str, Any]]:
    """(columns with those that the stage adds, its rows in the pool's order, facts of its fit)."""
    columns = dict(columns or {})
    shards = pool.load_shards(pool_path)
    job = StageJob(stage, str(out_path), {name: column for name, column in columns.items() if name in stage.needs})
    facts: dict[str, Any] = {}
    if stage.whole_pool:
        facts = dict(fit(pool_path, job, shards, passes_here(fit_path(job))))
    entry = LoadedStage(stage, stage.load(LoadContext(fit_path=fit_path(job))), job.out_path, None, job.columns)
    rows = []
    for shard in shards:
        score_shard(pool_path, shard, [entry])
        rows += pool.read_table(f"{out_path}/{shard.name}.parquet").to_pylist()
    return columns | {name: Column(job.out_path, name) for name in stage.adds}, rows, facts
