"""The one thin layer on Ray: tasks and actors over shards, with retries, a window, and honest failures.

Functions that run remotely are plain functions of importable modules; they know nothing of Ray. What raised an
exception is tried again, unless that is a WinnowError which is not `transient`, as then the input is at fault; so is
what a worker died with. What was lost with its machine is done again as often as machines are lost. What still fails is
collected and named: nothing is dropped.
"""

from __future__ import annotations

import heapq
import logging
import os
import random
import signal
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")  # Ray's uv hook would build a second environment
os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")  # a call after close() would connect to any Ray, or start one
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's future default; silences its warning

import ray
from ray import exceptions
from ray.util import metrics
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline.core.config import Resources, in_job
from pipeline.core.errors import NetworkDownError, StepError, WinnowError, one_line
from pipeline.core.machines import Machine, cluster_is_there
from pipeline.core.passes import timed

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ATTEMPTS = 3  # of one item, counting exceptions and workers that died by themselves
LOSSES = 20  # of one item with its machine
PAUSE_S = 1.0  # before an item is tried again; twice as long before the third time
NAMED_FAILURES = 5  # how many failed items a message names
STOP_AFTER_FAILURES = 20  # a step that fails everywhere stops early
LOOK_EVERY_S = 2.0  # at the cluster's machines
SAY_AFTER_S = 30.0  # that a step waits for a machine, where there is none that could hold it
ANSWER_WITHIN_S = 120.0  # a machine that is asked about itself
LEAST_QUEUED, MOST_QUEUED = 4, 256  # workers that Ray is asked for beyond those that the cluster holds


class Engine:
    """A connection to Ray: the cluster of RAY_ADDRESS or of the surrounding job, else one on this machine.

    Args:
        on_retry: told, in the thread of the map, (an item's name, the cause in one line) of each that is tried again.
        say: prints a line for the user.
    """

    def __init__(self, on_retry: Callable[[str, str], None] | None = None, say: Callable[[str], None] | None = None):
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
        self.local = not cluster_is_there()
        if in_job():
            pass  # address and working_dir come from the job; passing them again is an error of Ray's
        elif not self.local:
            options["runtime_env"] = {"working_dir": ROOT}
        else:
            # Workers of a local cluster inherit this environment: our packages resolve to this folder first.
            paths = [ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
            os.environ["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(paths))
            options |= {"address": "local", "include_dashboard": False, "object_store_memory": 256 << 20}
            # Ray ends idle workers beyond one per CPU after a second. Ours have imported torch, at 5 to 15 s each.
            options["_system_config"] = {"num_workers_soft_limit": 4 * (os.cpu_count() or 1)}
        handler = signal.getsignal(signal.SIGTERM)
        # Of each dead worker and raylet Ray prints a page, whatever log_to_driver says; on_retry is told in one line.
        ray._private.worker.print_to_stdstream = lambda *arguments, **options: None
        try:
            ray.init(**options)
        except Exception as error:  # of any class; all mean that there is no Ray
            where = (
                "start on this machine" if self.local else f"connect to {os.environ.get('RAY_ADDRESS', 'the cluster')}"
            )
            raise WinnowError(f"Ray did not {where}: {one_line(error)}") from error
        signal.signal(signal.SIGTERM, handler)  # Ray puts one of its own there, with an exit code of its own
        self._on_retry, self._say = on_retry, say
        self._cancelled = threading.Event()
        # Beside the driver: on another node, it would keep an autoscaler from taking that away.
        beside = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        board = ray.remote(num_cpus=0, max_restarts=-1, scheduling_strategy=beside)(_Board)
        self._board = board.remote()
        self._counters = None if self.local else _Counters()  # without a dashboard nobody could see them
        self._machines: tuple[float, list[Machine]] = (0.0, [])
        self.cpu_hours = self.gpu_hours = 0.0  # that the finished items held
        self._spending = threading.Lock()

    def machines(self) -> list[Machine]:
        """The nodes that are alive, in the order of their names."""
        return sorted(_alive_nodes().values(), key=lambda machine: machine.name)

    def places(self, resources: Resources) -> int:
        """How many workers with these resources the cluster holds now."""
        asked_s, machines = self._machines
        if time.monotonic() - asked_s > LOOK_EVERY_S:
            machines = self.machines()
            self._machines = (time.monotonic(), machines)
        return sum(machine.holds(resources) for machine in machines)

    def queued(self, resources: Resources) -> int:
        """How many workers with these resources Ray is asked for beyond those it holds: an autoscaler follows that.

        Which nodes it may start Ray does not tell. It starts some, the cluster holds more, and so on.
        """
        return 0 if self.local else min(max(LEAST_QUEUED, 3 * self.places(resources)), MOST_QUEUED)

    def on_each_machine(self, function: Callable[..., Any], *arguments: Any) -> list[tuple[str, Any]]:
        """(machine's name, function(*arguments) or the exception) of every node that is alive, whatever its CPUs.

        A node that is lost meanwhile is left out.
        """
        asked = []
        for node_id, machine in _alive_nodes().items():
            place = NodeAffinitySchedulingStrategy(node_id, soft=False)
            options = {"num_cpus": 0, "scheduling_strategy": place, "max_retries": ATTEMPTS}
            asked.append((machine.name, node_id, ray.remote(function).options(**options).remote(*arguments)))
        ray.wait([ref for _, _, ref in asked], num_returns=len(asked), timeout=ANSWER_WITHIN_S)
        found = []
        for name, node_id, ref in sorted(asked, key=lambda entry: entry[0]):
            try:
                found.append((name, ray.get(ref, timeout=0)))
            except exceptions.GetTimeoutError:
                ray.cancel(ref, force=True)
                found.append((name, WinnowError(f"{name} did not answer within {ANSWER_WITHIN_S:g} s")))
            except Exception as error:  # it is the answer
                if node_id in _alive_nodes():
                    found.append((name, _cause(error)))
        return found

    def cpus_of_nodes(self) -> list[float]:
        """The CPUs of each node that has any (head nodes often advertise none), smallest first."""
        cpus = (machine.resources.get("CPU", 0) for machine in self.machines())
        return sorted(count for count in cpus if count > 0)

    def board(self) -> Any:
        """A handle for remote functions to post progress on: see `post`."""
        return self._board

    def posted(self) -> dict[str, dict]:
        """The newest progress that remote functions posted, by step name."""
        return ray.get(self._board.snapshot.remote(), timeout=10)

    def warned(self) -> dict[str, tuple[int, str]]:
        """{what is the same for warnings of one kind: (how many workers gave so far, the newest)}."""
        return ray.get(self._board.warned.remote(), timeout=10)

    def spend(self, cpu_hours: float, gpu_hours: float) -> None:
        """None; adds what workers held that were not started here."""
        with self._spending:
            self.cpu_hours += cpu_hours
            self.gpu_hours += gpu_hours

    def count(self, step: str, unit: str, units: float, samples: int, failed: Mapping[str, int]) -> None:
        """None; adds to the counters of Ray's metrics: finished units, their samples, failed rows by reason."""
        if self._counters is not None:
            self._counters.add(step, unit, units, samples, failed)

    def running(self, step: str, on: bool) -> None:
        """None; says of a step, in Ray's metrics, that it runs or ended."""
        if self._counters is not None:
            self._counters.steps.set(float(on), {"step": step})

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
        waits_for: tuple[Resources, int] | None = None,
    ) -> list[Any]:
        """function(*item) of every item, in the items' order, computed in Ray tasks.

        Args:
            names: what each item is called in messages and in Ray's dashboard (`clip/00003`).
            on_done: called in this thread with (index, result) as results arrive, in any order.
            waits_for: (resources of each, how many together) of the workers that an item starts itself.

        Raises:
            StepError: items that failed after their retries, by name and cause.
        """
        remote = ray.remote(_call)
        options = _options(resources) | {"max_retries": 0, "retry_exceptions": False}  # that is decided here
        todo = _Todo(names, self._told)
        running: dict[Any, int] = {}
        results: list[Any] = [None] * len(items)
        try:
            while todo.goes_on(bool(running)):
                window = resources.workers or max(4, 4 * self.places(resources)) + self.queued(resources)
                while len(running) < window and (index := todo.take()) is not None:
                    ref = remote.options(name=names[index], **options).remote(self._board, function, items[index])
                    running[ref] = index
                for ref in self._wait(running, todo, *(waits_for or (resources, 1))):
                    index = running.pop(ref)
                    try:
                        seconds, results[index] = ray.get(ref)
                    except Exception as error:  # the shard boundary: recorded, tried again or named
                        todo.put_back(index, _cause(error))
                        continue
                    self._held(seconds, resources)
                    if on_done:
                        on_done(index, results[index])
        finally:
            for ref in running:
                ray.cancel(ref, force=True)
        todo.raise_failures()
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

        As `map`; actors that die are replaced and their items are done again; those on a machine that will go are
        replaced after the item in hand; all actors end with the call.

        Args:
            items_at_once: how many items an actor has in work, each in a thread of its own; such actors are spread
                over the nodes.

        Raises:
            StepError: items that failed after their retries, by name and cause.
            NetworkDownError: a worker raised it, and the whole map stopped.
        """
        options = _options(resources)
        if items_at_once > 1:
            options |= {"max_concurrency": items_at_once, "scheduling_strategy": "SPREAD"}
        actor_class = ray.remote(_Actor).options(**options)
        todo = _Todo(names, self._told)
        actors: dict[Any, _Seat] = {}
        running: dict[Any, tuple[Any, _Seat, int | None]] = {}  # ref -> (actor, .., its item, None while it starts)
        results: list[Any] = [None] * len(items)
        # Starts that failed since one succeeded; the most actors there were, and may be; when one may start again.
        lost_starts, peak, room, start_s = 0, 0, len(items), 0.0
        looked_s = time.monotonic()

        def end(actor: Any) -> None:
            if actors.pop(actor, None) is not None:
                ray.kill(actor)  # it may be alive, and only out of reach

        try:
            while todo.goes_on(any(index is not None for _, _, index in running.values())):
                most = resources.workers or max(1, self.places(resources)) + self.queued(resources)
                starting = sum(not seat.node for seat in actors.values())
                free = sum(max(0, seat.free) for seat in actors.values())
                most = min(most, room) if time.monotonic() >= start_s else 0
                while len(actors) < most and todo.ready() > free + starting * items_at_once:
                    actor = actor_class.remote(self._board, worker_class, arguments)
                    actors[actor] = _Seat()
                    running[actor.ready.remote()] = (actor, actors[actor], None)
                    starting += 1
                peak = max(peak, len(actors))
                while free > 0 and (index := todo.take()) is not None:
                    actor, seat = max(actors.items(), key=lambda entry: entry[1].free)  # the least busy one
                    seat.free -= 1
                    free -= 1
                    running[actor.process.options(name=names[index]).remote(items[index])] = (actor, seat, index)
                for ref in self._wait(running, todo, resources):
                    actor, seat, index = running.pop(ref)
                    try:
                        result = ray.get(ref)
                    except Exception as error:  # the shard boundary: recorded, tried again or named
                        cause = _cause(error, seat.node)
                        if isinstance(cause, NetworkDownError):
                            raise cause from error
                        if index is not None:
                            todo.put_back(index, cause)
                        elif actor in actors:  # it could not load: the same for all, unless its machine was lost
                            lost_starts += not isinstance(cause, _MachineLostError)
                            is_final = isinstance(cause, WinnowError) and not cause.transient
                            tries = max(ATTEMPTS, peak) if isinstance(cause, _WorkerLostError) else ATTEMPTS
                            is_hopeless = lost_starts >= tries and not any(seat.node for seat in actors.values())
                            if is_final or is_hopeless:
                                raise StepError(f"a worker did not start: {one_line(cause)}") from cause
                            self._told(f"{todo.step}/start", cause)
                            start_s = time.monotonic() + PAUSE_S * lost_starts
                            if isinstance(cause, _OutOfMemoryError):
                                room = max(1, len(actors) - 1)
                        if index is None or isinstance(cause, _WorkerLostError):
                            end(actor)
                        seat.free += 1
                    else:
                        if index is None:
                            seat.node, seat.free, lost_starts = result, items_at_once, 0
                        else:
                            seat.free += 1
                            seconds, results[index] = result
                            self._held(seconds / items_at_once, resources)
                            if on_done:
                                on_done(index, results[index])
                if time.monotonic() - looked_s > LOOK_EVERY_S:
                    looked_s, leaving = time.monotonic(), leaving_machines()
                    for seat in actors.values():
                        if seat.node in leaving and not seat.leaves:
                            seat.leaves, seat.free = True, seat.free - items_at_once
                for actor, seat in list(actors.items()):
                    # Its resources are somebody's; should an item come back, one is started anew.
                    is_idle = bool(seat.node) and seat.free == (0 if seat.leaves else items_at_once)
                    if (is_idle and seat.leaves) or (not todo.waits() and (is_idle or not seat.node)):
                        end(actor)
        finally:
            for actor in list(actors):
                end(actor)
        todo.raise_failures()
        return results

    def _held(self, seconds: float, resources: Resources) -> None:
        self.spend(seconds / 3600 * resources.cpus, seconds / 3600 * resources.gpus)

    def _wait(self, running: Iterable[Any], todo: _Todo, resources: Resources, together: int = 1) -> list[Any]:
        """What is finished, at least one; [] when nothing is within LOOK_EVERY_S, or when an item's pause is over.

        Args:
            resources: of a worker, and how many are needed `together`: where they are not there, that is said.
        """
        refs = list(running)
        deadline_s = time.monotonic() + min(LOOK_EVERY_S, todo.pause_s())
        while True:
            if self._cancelled.is_set():
                raise StepError("cancelled")
            left_s = max(0.0, min(0.5, deadline_s - time.monotonic()))
            if refs:
                ready, _ = ray.wait(refs, num_returns=1, timeout=left_s)
                if ready:
                    todo.moved_s = time.monotonic()
                    ready, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
                    return ready
            else:
                self._cancelled.wait(left_s)
            if time.monotonic() >= deadline_s:
                break
        is_late = time.monotonic() - todo.moved_s > SAY_AFTER_S
        if is_late and todo.waits_for_nothing and self._say and (places := self.places(resources)) < together:
            todo.waits_for_nothing = False
            wanted, step = _wanted(resources), todo.step
            if together == 1:
                self._say(f"{step}  waits for a machine with {wanted}, and there is none")
            else:
                self._say(
                    f"{step}  waits for room for {together} workers with {wanted} each, and there is for {places}"
                )
        return []

    def _told(self, name: str, cause: BaseException) -> None:
        if self._counters is not None:
            kind = cause.kind if isinstance(cause, _WorkerLostError) else "exception"
            self._counters.retries.inc(1, {"step": _step_of(name), "cause": kind})
        if self._on_retry:
            is_ours = isinstance(cause, WinnowError) and not isinstance(cause, _WorkerLostError)
            self._on_retry(name, (f"{type(cause).__name__}: " if is_ours else "") + one_line(cause))


def post(board: Any, step: str, values: dict) -> None:
    """None; posts a remote function's progress under a step's name (fire and forget)."""
    if board is not None:
        board.put.remote(step, values)


def leaving_machines() -> frozenset[str]:
    """The ids of nodes that Ray was told will go (preempted, scaled down); none where this process is not Ray's."""
    if not ray.is_initialized():  # asking would connect to any Ray that is found
        return frozenset()
    return frozenset(ray._private.state.state.get_draining_nodes())


class _Board:
    def __init__(self) -> None:
        self._values: dict[str, dict] = {}
        self._warnings: dict[str, tuple[int, str]] = {}

    def put(self, step: str, values: dict) -> None:
        self._values[step] = values

    def snapshot(self) -> dict[str, dict]:
        return self._values

    def warn(self, kind: str, text: str) -> None:
        self._warnings[kind] = (self._warnings.get(kind, (0, ""))[0] + 1, text)

    def warned(self) -> dict[str, tuple[int, str]]:
        return self._warnings


class _ToBoard(logging.Handler):
    """Takes a worker's warnings to the driver. Those of one line of code are of one kind."""

    def __init__(self, board: Any):
        super().__init__(logging.WARNING)
        self._board = board

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._board.warn.remote(f"{record.module}:{record.lineno}", record.getMessage())
        except Exception:  # of whatever class; logging has one place for them
            self.handleError(record)


def _warn_on(board: Any) -> None:
    logger = logging.getLogger("winnow")
    if not any(isinstance(handler, _ToBoard) for handler in logger.handlers):
        logger.addHandler(logging.StreamHandler())  # Ray's own log of the worker, as without any handler
        logger.addHandler(_ToBoard(board))


def _call(board: Any, function: Callable[..., Any], item: tuple) -> tuple[float, Any]:
    """(seconds, function(*item)), on a worker."""
    _warn_on(board)
    return timed(function, *item)


class _Actor:
    """Holds one worker. It is built in a method: from there its exceptions arrive as they were raised."""

    def __init__(self, board: Any, worker_class: type, arguments: tuple):
        self._board, self._build = board, (worker_class, arguments)
        self._worker: Any = None

    def ready(self) -> str:
        """The id of the node that it is on, once it has loaded."""
        _warn_on(self._board)
        worker_class, arguments = self._build
        self._worker = worker_class(*arguments)
        return ray.get_runtime_context().get_node_id()

    def process(self, item: tuple) -> tuple[float, Any]:
        return timed(self._worker.process, *item)


@dataclass
class _Seat:
    """An actor's node, "" while it starts, and how many items more it may have in work.

    One that leaves is given no more: its `free` is the negative of what it has in work.
    """

    node: str = ""
    free: int = 0
    leaves: bool = False


class _WorkerLostError(WinnowError):
    """A worker died with an item in hand, by itself."""

    kind = "worker died"
    transient = True


class _OutOfMemoryError(_WorkerLostError):
    kind = "out of memory"


class _MachineLostError(_WorkerLostError):
    """An item was lost with its machine, or on the way."""

    kind = "machine lost"


class _Todo:
    """The items of one map that wait to be done, or to be done again, and those that failed for good."""

    def __init__(self, names: Sequence[str], told: Callable[[str, BaseException], None]):
        self._names, self._told = names, told
        self._ready = deque(range(len(names)))
        self._paused: list[tuple[float, int]] = []  # a heap of (when it is tried again, item)
        self._tries: Counter[int] = Counter()
        self._losses: Counter[int] = Counter()
        self._failures: list[tuple[str, BaseException]] = []
        self.moved_s = time.monotonic()  # when an item was done last
        self.waits_for_nothing = True  # and nobody has been told

    @property
    def step(self) -> str:
        """What the items belong to."""
        return _step_of(self._names[0])

    def ready(self) -> int:
        """How many items could be done now."""
        while self._paused and self._paused[0][0] <= time.monotonic():
            self._ready.append(heapq.heappop(self._paused)[1])
        return len(self._ready)

    def waits(self) -> bool:
        """True while an item is not in work, nor done or failed."""
        return bool(self._ready or self._paused)

    def pause_s(self) -> float:
        """How long until an item that pauses is to be tried again."""
        self.ready()  # takes out those whose pause is over
        return self._paused[0][0] - time.monotonic() if self._paused else float("inf")

    def goes_on(self, is_busy: bool) -> bool:
        """False when all is done, or too much failed."""
        return (is_busy or self.waits()) and len(self._failures) < STOP_AFTER_FAILURES

    def take(self) -> int | None:
        """The next item to be done; None when there is none now."""
        return self._ready.popleft() if self.ready() else None

    def put_back(self, index: int, cause: BaseException) -> None:
        """None; the item was not done: it is tried again, after a pause, or it has failed."""
        is_lost = isinstance(cause, _MachineLostError)
        counts, most = (self._losses, LOSSES + 1) if is_lost else (self._tries, ATTEMPTS)
        counts[index] += 1
        is_final = isinstance(cause, WinnowError) and not cause.transient
        if is_final or counts[index] >= most:
            self._failures.append((self._names[index], cause))
            return
        self._told(self._names[index], cause)
        if is_lost:
            self._ready.append(index)
        else:
            pause_s = PAUSE_S * 2 ** (counts[index] - 1) * random.uniform(0.5, 1.5)
            heapq.heappush(self._paused, (time.monotonic() + pause_s, index))

    def raise_failures(self) -> None:
        """None. Raises StepError naming the items that failed, and their causes."""
        if not self._failures:
            return
        named = "; ".join(f"{name}: {one_line(error)}" for name, error in self._failures[:NAMED_FAILURES])
        more = f"; and {len(self._failures) - NAMED_FAILURES} more" if len(self._failures) > NAMED_FAILURES else ""
        count = f"{len(self._failures)} of {len(self._names)} failed"
        raise StepError(f"{count}: {named}{more}") from self._failures[0][1]


class _Counters:
    """What Ray's metrics export of a run, for Prometheus."""

    def __init__(self) -> None:
        self._units = metrics.Counter("winnow_units", "Finished shards, tars, ... of a step", ("step", "unit"))
        self._samples = metrics.Counter("winnow_samples", "Samples that a step is done with", ("step",))
        self._failed = metrics.Counter("winnow_failed_rows", "Failed rows of a step", ("step", "reason"))
        self.retries = metrics.Counter("winnow_retries", "Items that are done again", ("step", "cause"))
        self.steps = metrics.Gauge("winnow_steps_running", "1 while a step runs", ("step",))

    def add(self, step: str, unit: str, units: float, samples: int, failed: Mapping[str, int]) -> None:
        for counter, amount, tags in (
            (self._units, units, {"step": step, "unit": unit}),
            (self._samples, samples, {"step": step}),
            *((self._failed, count, {"step": step, "reason": reason}) for reason, count in failed.items()),
        ):
            if amount > 0:  # Ray's counters take nothing else
                counter.inc(amount, tags)


def _options(resources: Resources) -> dict[str, Any]:
    options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus}
    if resources.memory_gb is not None:
        options["memory"] = int(resources.memory_gb * 2**30)
    if resources.labels:
        options["label_selector"] = dict(resources.labels)
    return options


def _wanted(resources: Resources) -> str:
    """`4 CPUs, 1 GPU, 16 GB, market-type spot`."""
    counts = ((resources.cpus, "CPU"), (resources.gpus, "GPU"))
    parts = [f"{count:g} {name}{'' if count == 1 else 's'}" for count, name in counts if count] or ["any CPU"]
    parts += [f"{resources.memory_gb:g} GB"] if resources.memory_gb else []
    return ", ".join([*parts, *(f"{key} {value}" for key, value in resources.labels.items())])


def _alive_nodes() -> dict[str, Machine]:
    """{id: machine} of the nodes that are alive; those at one address have a part of their ids in their names."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    shared = Counter(node["NodeManagerAddress"] for node in nodes)
    found = {}
    for node in nodes:
        address, node_id = node["NodeManagerAddress"], node["NodeID"]
        name = f"{address} ({node_id[:8]})" if shared[address] > 1 else address
        found[node_id] = Machine(name, node["Resources"], node.get("Labels") or {})
    return found


def _cause(error: BaseException, node: str = "") -> BaseException:
    """The exception that our function raised, out of Ray's wrapping; or what became of its worker.

    Args:
        node: where it ran, if that is known.
    """
    if isinstance(error, exceptions.RayTaskError):
        if isinstance(error.cause, BaseException):
            error.cause.remote_traceback = str(error)  # type: ignore[attr-defined]  # for those that are bugs of ours
            return error.cause
        return error
    if not isinstance(error, exceptions.RayError):
        return error
    text = str(error)
    if isinstance(error, exceptions.OutOfMemoryError) or "memory usage threshold" in text:  # Ray's monitor's own words
        return _OutOfMemoryError(
            "its worker was killed as the machine had too little memory, expected more memory_gb for it"
        )
    if isinstance(error, exceptions.RayActorError):
        is_lost = isinstance(error, exceptions.ActorUnavailableError) or error.preempted
        is_lost = is_lost or "node has died" in text or (bool(node) and node not in _alive_nodes())
        return _MachineLostError("its machine was lost") if is_lost else _WorkerLostError("its worker died")
    if isinstance(error, exceptions.WorkerCrashedError):
        return _WorkerLostError("its worker died")
    if isinstance(error, exceptions.NodeDiedError | exceptions.ObjectLostError | exceptions.LocalRayletDiedError):
        return _MachineLostError("its machine was lost")
    return error


def _step_of(name: str) -> str:
    """The step of an item: `clip` of `clip/00003`; a step that is one item has its own name."""
    step, _, last = name.rpartition("/")
    return step if step and last.isdigit() else name
