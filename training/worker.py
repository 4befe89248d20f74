"""One training on several workers of a Ray cluster. A training of one worker is a plain call of training.loop.train.

The artifacts' root must be visible from every worker (a shared folder or an object store). A lost worker restarts all
of them from the newest step checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pipeline.core import storage
from pipeline.core.config import Resources
from pipeline.core.errors import WinnowError, one_line
from training.recipe import Recipe, Seeds

MAX_FAILURES = 3
RAY_FOLDER = "ray_train"  # Ray's own files and the outcome, while the training runs
OUTCOME_FILE = "outcome.json"


def train_on_ray(
    train_set_path: str,
    out_path: str,
    recipe: Recipe,
    seeds: Seeds,
    resources: Resources,
    *,
    report: Callable[[dict[str, Any]], None] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Facts of the finished training on resources.workers workers, each with its cpus and gpus. Ray is set up.

    Args:
        report: called by rank 0, in its process, with each line of the metrics; must pickle.
        options: further keywords of training.loop.train.

    Raises:
        WinnowError: the training failed, on its workers, more often than MAX_FAILURES times or for good.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    each = {"CPU": resources.cpus, "GPU": resources.gpus}
    if resources.memory_gb is not None:
        each["memory"] = resources.memory_gb * 2**30
    placement = {"label_selector": resources.labels} if resources.labels else {}
    ray_path = storage.join(out_path, RAY_FOLDER)
    where: dict[str, Any] = {"storage_path": ray_path}
    if storage.is_url(out_path):
        import fsspec
        from pyarrow.fs import FSSpecHandler, PyFileSystem

        fs, inner = fsspec.core.url_to_fs(ray_path)
        where = {"storage_path": inner, "storage_filesystem": PyFileSystem(FSSpecHandler(fs))}
    trainer = TorchTrainer(
        _train_rank,
        train_loop_config={
            "arguments": (train_set_path, out_path, recipe, seeds),
            "options": {**options, "threads": max(1, int(resources.cpus)), "report": report},
        },
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=resources.workers or 1,
            use_gpu=resources.gpus > 0,
            resources_per_worker={name: amount for name, amount in each.items() if amount},
            **placement,
        ),
        run_config=RunConfig(name=storage.name_of(out_path), failure_config=FailureConfig(MAX_FAILURES), **where),
    )
    try:
        trainer.fit()
        outcome = storage.read_json(storage.join(ray_path, OUTCOME_FILE))
    except TrainingFailedError as error:
        raise WinnowError(f"{out_path}: training failed: {one_line(error)}") from error
    finally:
        storage.delete(ray_path)
    if "error" in outcome:
        raise WinnowError(outcome["error"])
    return outcome["facts"]


def _train_rank(config: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import get_device

    from training import loop

    context = train.get_context()
    ranks = {"rank": context.get_world_rank(), "world_size": context.get_world_size()}
    try:
        facts = loop.train(*config["arguments"], device=str(get_device()), **ranks, **config["options"])
        outcome = {"facts": facts}
    except WinnowError as error:  # trying again would end in the same way
        outcome = {"error": one_line(error)}
    if ranks["rank"] == 0 or "error" in outcome:
        storage.write_json(storage.join(config["arguments"][1], RAY_FOLDER, OUTCOME_FILE), outcome)
