"""The one thin layer on Ray: tasks and actors over shards, with retries, a window, and honest failures.

Functions that run remotely are plain functions of importable modules; they know nothing of Ray. A lost worker or node
is retried by Ray or here; an exception is retried too (a store may have hiccuped), unless it is a WinnowError, which
says that the input is at fault. What still fails is collected and named: nothing is dropped.
"""

from __future__ import annotations

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # Ray's uv hook would build a second environment
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; silences its warning

import ray
from ray.exceptions import RayActorError, RayTaskError

from pipeline.core.config import Resources, in_job
from pipeline.core.errors import ConfigError, NetworkDownError, StepError, WinnowError, one_line

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ATTEMPTS = 3  # of one item, counting exceptions and lost actors
NAMED_FAILURES = 5  # how many failed items a message names
STOP_AFTER_FAILURES = 20  # a step that fails everywhere stops early


class Engine:
    """A connection to Ray: the cluster of RAY_ADDRESS or of the surrounding job, else one on this machine."""

    def __init__(self) -> None:
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        if in_job():
            pass  # address and working_dir come from the job; passing them again is an error of Ray's
        elif os.environ.get("RAY_ADDRESS"):
            options["runtime_env"] = {"working_dir": ROOT}
        else:
            # Workers of a local cluster inherit this environment: our packages resolve to this folder first.
            paths = [ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
            options |= {"address": "local", "include_dashboard": False, "object_store_memory": 256 << 20}
            # Ray ends idle workers beyond one per CPU after a second. Ours have imported torch, at 5 to 15 s each.
            options["_system_config"] = {"num_workers_soft_limit": 4 * (os.cpu_count() or 1)}
        self.local = "address" in options
        handler = signal.getsignal(signal.SIGTERM)
        ray.init(**options)
        signal.signal(signal.SIGTERM, handler)  # Ray puts one of its own there, with an exit code of its own
        self._cancelled = threading.Event()
        self._board = ray.remote(num_cpus=0, max_restarts=-1)(_Board).remote()

    def check_fits(self, resources: Resources, place: str) -> None:
        """None. Raises ConfigError when no machine of a local Ray can hold one worker; a cluster may yet grow."""
        have = self.cluster_resources()
        for name, wanted in (("CPU", resources.cpus), ("GPU", resources.gpus)):
            if self.local and wanted > have.get(name, 0):
                raise ConfigError(
                    f"{place}.{name.lower()}s = {wanted:g}, expected at most the {have.get(name, 0):g} here"
                )

    def cluster_resources(self) -> dict[str, float]:
        """{CPU, GPU, memory, ...} of the cluster as it is now."""
        return dict(ray.cluster_resources())

    def cpus_of_nodes(self) -> list[float]:
        """The CPUs of each node that has any (head nodes often advertise none), smallest first."""
        cpus = (node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])
        return sorted(count for count in cpus if count > 0)

    def board(self) -> Any:
        """A handle for remote functions to post progress on: see `post`."""
        return self._board

    def posted(self) -> dict[str, dict]:
        """The newest progress that remote functions posted, by step name."""
        return ray.get(self._board.snapshot.remote(), timeout=30)

    def cancel(self) -> None:
        """None; makes running maps stop soon; their steps fail as cancelled."""
        self._cancelled.set()

    def close(self) -> None:
        """None; ends everything that this process started on the cluster."""
        ray.shutdown()

    def map(
        self,
        function: Callable[..., Any],
        items: Sequence[tuple],
        names: Sequence[str],
        resources: Resources,
        on_done: Callable[[int, Any], None] | None = None,
    ) -> list[Any]:
        """function(*item) of every item, in the items' order, computed in Ray tasks.

        Args:
            names: what each item is called in messages and in Ray's dashboard (`clip/00003`).
            on_done: called in this thread with (index, result) as results arrive, in any order.

        Raises:
            StepError: items that failed after their retries, by name and cause.
        """
        remote = ray.remote(function)
        options = _options(resources) | {"max_retries": ATTEMPTS, "retry_exceptions": False}
        window = resources.workers or max(4, 4 * int(self.cluster_resources().get("CPU", 1)))
        todo = deque((index, 1) for index in range(len(items)))
        running: dict[Any, tuple[int, int]] = {}
        results: list[Any] = [None] * len(items)
        failures: list[tuple[str, BaseException]] = []
        try:
            while (todo or running) and len(failures) < STOP_AFTER_FAILURES:
                while todo and len(running) < window:
                    index, attempt = todo.popleft()
                    ref = remote.options(name=names[index], **options).remote(*items[index])
                    running[ref] = (index, attempt)
                for ref in self._wait(running):
                    index, attempt = running.pop(ref)
                    try:
                        results[index] = ray.get(ref)
                    except Exception as error:  # the shard boundary: recorded, retried or named
                        cause = _cause(error)
                        if attempt < ATTEMPTS and not isinstance(cause, WinnowError):
                            todo.append((index, attempt + 1))
                        else:
                            failures.append((names[index], cause))
                        continue
                    if on_done:
                        on_done(index, results[index])
        finally:
            for ref in running:
                ray.cancel(ref, force=True)
        _raise_failures(failures, len(items))
        return results

    def map_on_actors(
        self,
        worker_class: type,
        arguments: tuple,
        items: Sequence[tuple],
        names: Sequence[str],
        resources: Resources,
        on_done: Callable[[int, Any], None] | None = None,
        items_at_once: int = 1,
    ) -> list[Any]:
        """worker.process(*item) of every item, on actors that each built worker_class(*arguments) once.

        As `map`; actors that die are replaced and their items are done again; all actors end with the call.

        Args:
            items_at_once: how many items an actor has in work, each in a thread of its own; such actors are spread
                over the nodes.

        Raises:
            StepError: items that failed after their retries, by name and cause.
            NetworkDownError: a worker raised it, and the whole map stopped.
        """
        cpus = self.cluster_resources().get("CPU", 1)
        most = resources.workers or max(1, int(cpus // resources.cpus) if resources.cpus else int(cpus))
        options = _options(resources)
        if items_at_once > 1:
            options |= {"max_concurrency": items_at_once, "scheduling_strategy": "SPREAD"}
        actor_class = ray.remote(_Actor).options(**options)
        idle: list[Any] = []
        todo = deque((index, 1) for index in range(len(items)))
        actors: list[Any] = []
        running: dict[Any, tuple[Any, int | None, int]] = {}  # ref -> (actor, item or None while it starts, attempt)
        results: list[Any] = [None] * len(items)
        failures: list[tuple[str, BaseException]] = []
        lost_starts = 0

        def start_actor() -> None:
            actor = actor_class.remote(worker_class, arguments)
            actors.append(actor)
            running[actor.ready.remote()] = (actor, None, 0)

        try:
            busy = 0
            while (todo or busy) and len(failures) < STOP_AFTER_FAILURES:
                starting = sum(index is None for _, index, _ in running.values())
                while len(actors) < most and len(todo) > len(idle) + starting * items_at_once:
                    start_actor()
                    starting += 1
                while todo and idle:
                    index, attempt = todo.popleft()
                    actor = idle[-1] if items_at_once == 1 else max(idle, key=idle.count)  # the least busy one
                    idle.remove(actor)
                    running[actor.process.options(name=names[index]).remote(items[index])] = (actor, index, attempt)
                    busy += 1
                for ref in self._wait(running):
                    actor, index, attempt = running.pop(ref)
                    busy -= index is not None
                    alive = True
                    try:
                        result = ray.get(ref)
                    except Exception as error:  # the shard boundary: recorded, retried or named
                        cause = _cause(error)
                        alive = not isinstance(cause, RayActorError)
                        if isinstance(cause, NetworkDownError):
                            raise cause from error
                        if index is None:  # it could not load: the same for all actors, unless its node was lost
                            lost_starts += 1
                            if alive or lost_starts > ATTEMPTS * most:
                                raise StepError(f"a worker did not start: {one_line(cause)}") from cause
                        elif attempt < ATTEMPTS and not isinstance(cause, WinnowError):
                            todo.append((index, attempt + 1))
                        else:
                            failures.append((names[index], cause))
                    else:
                        if index is not None:
                            results[index] = result
                            if on_done:
                                on_done(index, result)
                    if alive:
                        idle += [actor] * (1 if index is not None else items_at_once)
                    elif actor in actors:  # once for all of its items
                        actors.remove(actor)
                        idle = [other for other in idle if other is not actor]
                        ray.kill(actor)  # it may be alive, and only out of reach
                for actor in [actor for actor in set(idle) if not todo and idle.count(actor) == items_at_once]:
                    # Its resources are somebody's; should an item come back, one is started anew.
                    idle = [other for other in idle if other is not actor]
                    actors.remove(actor)
                    ray.kill(actor)
        finally:
            for actor in actors:
                ray.kill(actor)
        _raise_failures(failures, len(items))
        return results

    def _wait(self, running: Iterable[Any]) -> list[Any]:
        refs = list(running)
        while refs:
            if self._cancelled.is_set():
                raise StepError("cancelled")
            ready, _ = ray.wait(refs, num_returns=1, timeout=0.5)
            if ready:
                more, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
                return more
        return []


def post(board: Any, step: str, values: dict) -> None:
    """None; posts a remote function's progress under a step's name (fire and forget)."""
    if board is not None:
        board.put.remote(step, values)


class _Board:
    def __init__(self) -> None:
        self._values: dict[str, dict] = {}

    def put(self, step: str, values: dict) -> None:
        self._values[step] = values

    def snapshot(self) -> dict[str, dict]:
        return self._values


class _Actor:
    """Holds one worker. It is built in a method: from there its exceptions arrive as they were raised."""

    def __init__(self, worker_class: type, arguments: tuple):
        self._build = (worker_class, arguments)
        self._worker: Any = None

    def ready(self) -> None:
        worker_class, arguments = self._build
        self._worker = worker_class(*arguments)

    def process(self, item: tuple) -> Any:
        return self._worker.process(*item)


def _options(resources: Resources) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if resources.memory_gb is not None:
        options["memory"] = int(resources.memory_gb * 2**30)
    if resources.labels:
        options["label_selector"] = dict(resources.labels)
    return options


def _cause(error: BaseException) -> BaseException:
    """The exception that our function raised, out of Ray's wrapping."""
    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        error.cause.remote_traceback = str(error)  # type: ignore[attr-defined]  # for those that are bugs of ours
        return error.cause
    return error


def _raise_failures(failures: list[tuple[str, BaseException]], num_items: int) -> None:
    if not failures:
        return
    named = "; ".join(f"{name}: {one_line(error)}" for name, error in failures[:NAMED_FAILURES])
    more = f"; and {len(failures) - NAMED_FAILURES} more" if len(failures) > NAMED_FAILURES else ""
    raise StepError(f"{len(failures)} of {num_items} failed: {named}{more}") from failures[0][1]
