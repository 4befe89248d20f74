"""One training on several workers of a Ray cluster. A training of one worker is a plain call of training.loop.train.

The artifacts' root must be visible from every worker (a shared folder or an object store). The workers are placed all
together or not at all, so trainings side by side can't each hold a part of what the other waits for. A lost worker
restarts all of them from the newest step checkpoint; with `min_workers`, on as many as there is room for by then.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from pipeline.core import storage
from pipeline.core.config import Resources
from pipeline.core.errors import WinnowError, one_line
from training.recipe import Recipe, Seeds

MAX_FAILURES = 3  # restarts after errors and lost workers; those after announced preemptions are not counted
RAY_FOLDER = "ray_train"  # Ray's own files and the facts, while the training runs
FACTS_FILE = "facts.json"
COLLECTIVE_TIMEOUT_S = 1800  # a rank waits for the others no longer; rank 0's slowest checkpoint takes less
GROW_EVERY_S = 600.0  # how soon new nodes are taken in: that restarts the workers from the newest step checkpoint


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
    """Facts of the finished training on several workers, each with its cpus and at most one GPU. Ray is set up.

    Args:
        report: called by rank 0, in its process, with each line of the metrics; must pickle.
        options: further keywords of training.loop.train.

    Raises:
        WinnowError: a worker raised it, or the training failed more often than MAX_FAILURES times.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class StopAtWinnowError(UserCallback):
        """Makes an error final that trying again would only repeat."""

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            for error in worker_exceptions.values():
                if isinstance(error, WinnowError):
                    raise error

    each = {"CPU": resources.cpus, "GPU": resources.gpus}
    if resources.memory_gb is not None:
        each["memory"] = resources.memory_gb * 2**30
    scaling: dict[str, Any] = {"num_workers": resources.workers or 1}
    if resources.min_workers is not None:
        scaling["num_workers"] = (resources.min_workers, resources.workers or 1)
        scaling["elastic_resize_monitor_interval_s"] = GROW_EVERY_S
    if resources.labels:
        scaling["label_selector"] = resources.labels
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
        torch_config=TorchConfig(backend="nccl" if resources.gpus else "gloo", timeout_s=COLLECTIVE_TIMEOUT_S),
        scaling_config=ScalingConfig(
            use_gpu=resources.gpus > 0,
            resources_per_worker={name: amount for name, amount in each.items() if amount},
            **scaling,
        ),
        run_config=RunConfig(
            name=storage.name_of(out_path),
            failure_config=FailureConfig(MAX_FAILURES),
            callbacks=[StopAtWinnowError()],
            **where,
        ),
    )
    storage.delete(ray_path)  # of a run that was killed
    try:
        trainer.fit()
        return storage.read_json(storage.join(ray_path, FACTS_FILE))
    except TrainingFailedError as error:
        cause = root_cause(error)
        if isinstance(cause, WinnowError):
            raise cause from error
        raise WinnowError(f"{out_path}: training failed: {one_line(cause)}") from error
    finally:
        storage.delete(ray_path)


def root_cause(error: BaseException) -> BaseException:
    """What Ray Train's error comes from: of several workers' exceptions, not one that only tells of a lost peer."""
    causes = list(getattr(error, "worker_failures", {}).values()) or [getattr(error, "controller_failure", error)]
    cause = min(causes, key=_tells_of_a_peer)
    return getattr(cause, "health_check_failure", cause)


def _tells_of_a_peer(error: BaseException) -> bool:
    from torch import distributed

    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return of_gloo or isinstance(error, distributed.DistError)


def _train_rank(config: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import get_device

    from training import loop

    facts_path = storage.join(config["arguments"][1], RAY_FOLDER, FACTS_FILE)
    if storage.exists(facts_path):  # it had finished when a worker was lost
        return
    context = train.get_context()
    ranks = {"rank": context.get_world_rank(), "world_size": context.get_world_size()}
    facts = loop.train(*config["arguments"], device=str(get_device()), **ranks, **config["options"])
    if ranks["rank"] == 0:
        storage.write_json(facts_path, facts)
