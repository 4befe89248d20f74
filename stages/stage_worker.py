"""The worker that scores shards: it loads each stage's state once, then does shard after shard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pipeline.core import artifact, storage
from pipeline.core.passes import Passes
from pipeline.core.pool import Shard
from stages.base import FACTS, LoadContext, Stage
from stages.column_files import Column, file_path
from stages.pool_blocks import blocks
from stages.score_shard import LoadedStage, score_shard


@dataclass(frozen=True)
class Reference:
    """Another pool that a stage compares the pool with, scored as that is: its columns are those that it needs."""

    pool_path: str
    shards: Sequence[Shard]
    columns: Mapping[str, Column]


@dataclass(frozen=True)
class StageJob:
    """One stage to run: where it writes, the columns that it needs, the model and the references that it names.

    `within` is the folder of a selection: the rows outside it are to the stage as failed rows are.
    """

    stage: Stage
    out_path: str
    columns: Mapping[str, Column] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None
    batch_size: int | None = None
    references: Mapping[str, Reference] = field(default_factory=dict)
    within: str | None = None


def fit_path(job: StageJob) -> str | None:
    """Where `fit` of a stage of the whole pool writes; None for other stages."""
    return storage.join(job.out_path, "fit") if job.stage.whole_pool else None


def fit(pool_path: str, job: StageJob, shards: Sequence[Shard], passes: Passes) -> Mapping[str, Any]:
    """Facts of what the stage found in the whole pool; it is in its folder, whole, when this returns.

    Args:
        passes: with fit_path(job) as their folder.
    """
    path = storage.join(passes.folder, FACTS)
    if not storage.exists(path):
        own = blocks(pool_path, shards, job.columns, within=job.within)
        if job.stage.uses_references:
            references = {
                name: blocks(reference.pool_path, reference.shards, reference.columns)
                for name, reference in job.references.items()
            }
            facts = job.stage.fit_against(own, references, passes)
        else:
            facts = job.stage.fit(own, passes)
        storage.write_json(path, facts)
    storage.delete(passes.work().folder)
    return storage.read_json(path)


class StageWorker:
    """Scores shards of one pool with several stages, all within the same selection or none; built once per actor."""

    def __init__(self, pool_path: str, jobs: Sequence[StageJob], device: str, threads: int):
        self.pool_path = pool_path
        self.threads = threads
        self.within = jobs[0].within
        self.stages = [
            LoadedStage(
                job.stage,
                job.stage.load(LoadContext(device, threads, job.model, fit_path(job))),
                job.out_path,
                job.batch_size,
                job.columns,
            )
            for job in jobs
        ]

    def process(self, shard: Shard) -> dict[str, Any]:
        """Facts of one shard: see score_shard. `known` has the files that were there already, too."""
        facts = score_shard(self.pool_path, shard, self.stages, self.threads, self.within)
        for entry in self.stages:
            path = file_path(entry.out_path, shard)
            if entry.out_path not in facts["known"]:  # the driver would hash one shard after another
                facts["known"][entry.out_path] = {storage.name_of(path): artifact.file_entry(path)}
        return facts
