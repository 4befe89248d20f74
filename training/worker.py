"""One training on several workers of a Ray cluster. A training of one worker is a plain call of training.loop.train.

The artifacts' root must be visible from every worker (a shared folder or an object store). The workers are placed all
together or not at all, so trainings side by side can't each hold a part of what the other waits for. A lost worker
restarts all of them from the newest step checkpoint; with `min_workers`, on as many as there is room for by then.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping
from typing import Any

from pipeline.core import storage
from pipeline.core.config import Resources
from pipeline.core.errors import WinnowError, one_line
from training.recipe import Recipe, Seeds

MAX_FAILURES = 3  # restarts with no new step checkpoint between them; those after announced preemptions do not count
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
        report: as of training.loop.train; called in rank 0's process, so it must pickle.
        options: further keywords of training.loop.train.

    Raises:
        WinnowError: a worker raised it, or the training failed more than MAX_FAILURES times without getting on.
    """
    os.environ.setdefault("RAY_TRAIN_V2_ENABLED", "1")
    from ray.exceptions import OutOfMemoryError
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError, UserCallback
    from ray.train.torch import TorchConfig, TorchTrainer

    class Callback(UserCallback):
        """Makes errors final that trying again would only repeat."""

        def __init__(self) -> None:
            self.failures = Failures(out_path)

        def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
            if (error := self.failures.final(worker_exceptions)) is not None:
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
            "waits_on": this_machine(),
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
            failure_config=FailureConfig(-1),  # Failures counts
            callbacks=[Callback()],
            **where,
        ),
    )
    storage.delete(ray_path)  # of a run that was killed
    try:
        trainer.fit()
        return storage.read_json(storage.join(ray_path, FACTS_FILE))
    except TrainingFailedError as error:
        causes = getattr(error, "worker_failures", {}).values() or [getattr(error, "controller_failure", error)]
        cause = root_cause(*causes)
        if isinstance(cause, WinnowError):
            raise cause from error
        failure = _failure(out_path, cause)
        # Killed as they start, workers may have come to a machine that others had filled just then.
        failure.transient = isinstance(cause, OutOfMemoryError)
        raise failure from error
    finally:
        storage.delete(ray_path)


def this_machine() -> str:
    """Ray's id of the machine that this process runs on; "" where it is no worker of Ray's."""
    import ray

    return ray.get_runtime_context().get_node_id() if ray.is_initialized() else ""


def any_leaves(machines: frozenset[str]) -> bool:
    """True when Ray was told that one of these machines will go."""
    from pipeline.core.engine import leaving_machines

    return not machines.isdisjoint(leaving_machines())


class Failures:
    """The failures of one training, and which of them ends it: on a big cluster, workers are lost all the time."""

    def __init__(self, out_path: str):
        self._out_path = out_path
        self._newest_state, self._count = "", 0

    def final(self, errors: Mapping[int, Exception]) -> WinnowError | None:
        """The error that ends the training, given its ranks' errors; None when it starts again."""
        for error in errors.values():
            if isinstance(error, WinnowError) and not error.transient:
                return error
        causes = [getattr(error, "health_check_failure", error) for error in errors.values()]
        if any(getattr(cause, "preempted", False) for cause in causes):
            return None
        names = storage.list_folders(self._out_path)
        newest_state = max((name for name in names if name.startswith("step_")), default="")
        self._count = 1 if newest_state > self._newest_state else self._count + 1
        self._newest_state = newest_state
        return _failure(self._out_path, root_cause(*errors.values())) if self._count > MAX_FAILURES else None


def root_cause(*errors: BaseException) -> BaseException:
    """What a training failed of: of several workers' exceptions, not one that only tells of a lost peer."""
    cause = min(errors, key=_tells_of_a_peer)
    return getattr(cause, "health_check_failure", cause)


def _failure(out_path: str, cause: BaseException) -> WinnowError:
    from ray.exceptions import OutOfMemoryError

    if isinstance(cause, OutOfMemoryError):  # Ray's memory monitor killed a worker, and tells a page of it
        return WinnowError(
            f"{out_path}: a worker was killed as its machine had too little memory, expected more"
            f" cluster.train.memory_gb, which is kept free for each worker: {str(cause).splitlines()[0]}"
        )
    return WinnowError(f"{out_path}: training failed: {one_line(cause)}")


def _tells_of_a_peer(error: BaseException) -> bool:
    from torch import distributed

    of_gloo = isinstance(error, RuntimeError) and "gloo" in str(error).lower()
    return of_gloo or isinstance(error, distributed.DistError)


def _train_rank(config: dict[str, Any]) -> None:
    from ray import train
    from ray.train.torch import get_device
    from torch import distributed

    from training import loop

    facts_path = storage.join(config["arguments"][1], RAY_FOLDER, FACTS_FILE)
    if storage.exists(facts_path):  # it had finished when a worker was lost
        return
    context = train.get_context()
    ranks = {"rank": context.get_world_rank(), "world_size": context.get_world_size()}
    machines = [this_machine()] * ranks["world_size"]
    if ranks["world_size"] > 1:
        distributed.all_gather_object(machines, this_machine())
    # Ray Train's controller is where the training is waited for, and goes with that machine.
    leaving = functools.partial(any_leaves, frozenset([config["waits_on"], *machines]))
    where = {"device": str(get_device()), "leaving": leaving}
    facts = loop.train(*config["arguments"], **where, **ranks, **config["options"])
    if ranks["rank"] == 0:
        storage.write_json(facts_path, facts)
