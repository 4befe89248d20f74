"""Before any work, and under --plan: will the machines, the root and the files do for what is to be done?

Every failure is one line that names a place, a value and what was expected. On a cluster each node is asked about
itself, once and all at the same time; what it lacks counts only where it could run a step that needs it. A Ray of our
own on this machine is what the driver is, and is not asked: files and versions are the driver's.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pipeline import estimates, states
from pipeline.core import machines, storage
from pipeline.core.config import Resources
from pipeline.core.errors import ConfigError, WinnowError, one_line, without_secrets
from pipeline.core.machines import Machine, Report, amounts
from pipeline.estimates import Estimate
from pipeline.states import Status
from pipeline.steps import Plan, Step
from stages.base import Stage
from stages.ingest import sources
from stages.ingest.fetch.settings import DownloadSettings
from stages.selection import strategies as algebra

if TYPE_CHECKING:
    from pipeline.core.engine import Engine

ROOM = 0.5  # of the bytes that steps are thought to write: with less room than that, they surely don't fit
NAMED_NODES = 5  # that a line names
MOST_PATHS = 500  # that a node is asked to read: the first ones of each step
SETTINGS = {"CPU": ("cpus", "CPUs"), "GPU": ("gpus", "GPUs"), "memory": ("memory_gb", "GB of memory")}


class PreflightError(ConfigError):
    """What is wrong before any work starts: `lines`, each of them an error of its own."""

    def __init__(self, lines: Sequence[str]):
        super().__init__("; ".join(lines))
        self.lines = tuple(lines)


@dataclass(frozen=True)
class Request:
    """What one worker of some steps asks for; `num_together` of them are placed at once or not at all."""

    place: str  # in the config: `cluster.train`
    resources: Resources
    num_together: int = 1


@dataclass(frozen=True)
class Need:
    """A path outside the root that some steps' workers read; `place` is where the config says it."""

    place: str
    path: str


def check(plan: Plan, targets: Sequence[str], statuses: Mapping[str, Status], engine: Engine) -> None:
    """None. Raises PreflightError when something is wrong; nothing was started and nothing stays behind."""
    found = problems(plan, targets, statuses, engine, estimates.estimate(plan, statuses))
    if found:
        raise PreflightError(found)


def show(plan: Plan, targets: Sequence[str]) -> int:
    """The exit code of --plan, which prints the plan, and then what a run would stop at: 0, or 2 where there is any.

    It asks the cluster that a run would be on; where a run would start a Ray here, it looks at this machine alone.
    """
    _check_root(plan.config.root)
    text, statuses, expected = states.describe(plan, list(targets))
    print(text, flush=True)
    engine = None
    if machines.cluster_is_there() and _remaining(plan, targets, statuses):
        from pipeline.core.engine import Engine

        engine = Engine()
    try:
        found = problems(plan, targets, statuses, engine, expected)
    finally:
        if engine is not None:
            engine.close()
    for line in found:
        print(f"error: {without_secrets(line)}", file=sys.stderr)
    if found and engine is None:
        print("that is of this machine; in a Ray job, or with RAY_ADDRESS, --plan asks the cluster", file=sys.stderr)
    return PreflightError.exit_code if found else 0


def problems(
    plan: Plan,
    targets: Sequence[str],
    statuses: Mapping[str, Status],
    engine: Engine | None,
    expected: Mapping[str, Estimate],
) -> list[str]:
    """What is wrong, a line each; [] when the steps that are to be done can start.

    Args:
        engine: None before there is one: then this machine is looked at, as the one that a Ray will be started on.
        expected: what the steps will write.
    """
    names = _remaining(plan, targets, statuses)
    if not names:
        return []
    needed = {name: requests(plan, plan.steps[name]) for name in names}
    there = [machines.this_machine()] if engine is None else engine.machines()
    is_here = engine is None or engine.local
    lines = _unfit(needed, there, is_here) + _too_little_disk(plan, names, statuses, expected)
    asks_for_cuda = any(request.resources.gpus for name in names for request in needed[name])
    if is_here:
        if engine is not None and asks_for_cuda:
            lines += _without_cuda(there, needed, _reports(engine.on_each_machine(machines.report, "", b"", (), True)))
        here = {there[0].name: storage.free_bytes(tempfile.gettempdir()) or 0}
        return lines + _too_little_temporary(plan, names, there, here, needed, expected)
    assert engine is not None
    return lines + _of_nodes(plan, names, needed, there, engine, expected, asks_for_cuda)


def _check_root(root: str) -> None:
    """None. Raises ConfigError for a root that can't be written; nothing stays there, nor is a folder made."""
    if storage.is_url(root):
        storage.check_writable(root, "root")
        return
    folder = root
    while not os.path.exists(folder):
        folder = os.path.dirname(folder)
    if not (os.path.isdir(folder) and os.access(folder, os.R_OK | os.W_OK | os.X_OK)):
        raise PreflightError([f"root = {root}, expected a folder that can be written: {folder} is none"])


def _remaining(plan: Plan, targets: Sequence[str], statuses: Mapping[str, Status]) -> list[str]:
    """The steps that are to be done, now or once their inputs are there."""
    return [name for name in plan.ancestors(targets) if statuses[name].state in ("todo", "pending")]


def requests(plan: Plan, step: Step) -> list[Request]:
    """What the workers of a step ask Ray for, as pipeline.execute does."""
    resources = plan.config.resources(step.resources)
    place = f"cluster.{step.resources}"
    if step.kind == "task_images":  # decoding needs no GPU
        return [Request(place, resources.model_copy(update={"gpus": 0.0}))]
    if step.kind == "checkpoint":
        return [Request(place, resources, resources.num_together)]
    if isinstance(step.work, DownloadSettings) and "cpus" not in resources.model_fields_set:
        return [Request(place, resources.model_copy(update={"cpus": 1.0}))]  # all of the smallest node's
    return [Request(place, resources)]


# What machines offer.


def _unfit(needed: Mapping[str, Sequence[Request]], there: Sequence[Machine], is_here: bool) -> list[str]:
    """Requests that no machine holds, and workers that the cluster does not hold together.

    None where machines may come, as Ray does not tell which: a step that waits for one in vain says so.
    """
    if any(machine.is_managed for machine in there) or not any(machine.resources.get("CPU") for machine in there):
        return []
    lines = []
    for request in _distinct(request for found in needed.values() for request in found):
        places = sum(machine.holds(request.resources) for machine in there)
        if not places:
            lines += _why_unfit(request, there, is_here)
        elif places < request.num_together:
            asked = _asked(request.resources)
            key = "min_workers" if request.resources.min_workers else "workers"
            lines.append(
                f"{request.place}.{key} = {request.num_together}, expected at most the {places} workers with "
                f"{asked} each that {'this machine' if is_here else 'the cluster'} has room for at the same time"
            )
    return list(dict.fromkeys(lines))  # steps of one name ask for different things


def _distinct(found: Iterable[Request]) -> Iterator[Request]:
    seen: list[Request] = []
    for request in found:
        if request not in seen:
            seen.append(request)
            yield request


def _why_unfit(request: Request, offers: Sequence[Machine], is_here: bool) -> list[str]:
    """The settings of a request that no machine can hold: each one that is too large by itself, else all of them."""
    meant = [one for one in offers if one.is_meant(request.resources.labels)]
    if not meant:
        labels = ", ".join(f"{key}: {value}" for key, value in request.resources.labels.items())
        known = sorted({f"{key}: {one.labels[key]}" for one in offers for key in one.labels if _is_own(key)})
        there = f"; there are {', '.join(known)}" if known else ""
        return [f"{request.place}.labels = {{{labels}}}, expected labels that a machine has{there}"]
    lines = []
    for name, amount in amounts(request.resources).items():
        best = max(meant, key=lambda machine: machine.resources.get(name, 0))
        if amount > best.resources.get(name, 0):
            setting, _ = SETTINGS[name]
            whose = "this machine" if is_here else f"the largest machine, {best.name}"
            unit = 2**30 if name == "memory" else 1
            most = best.resources.get(name, 0) / unit
            lines.append(f"{request.place}.{setting} = {amount / unit:g}, expected at most the {most:.4g} of {whose}")
    if lines:
        return lines
    offered = "; ".join(f"{one.name} has {_offered(one)}" for one in meant[:NAMED_NODES])
    return [f"{request.place}: {_asked(request.resources)} a worker, expected what one machine has: {offered}"]


def _is_own(label: str) -> bool:
    """Every node has an id for a label, which says nothing to a reader."""
    return label != "ray.io/node-id"


def _asked(resources: Resources) -> str:
    asked = {name: amount for name, amount in amounts(resources).items() if amount}
    return _listed(asked or {"CPU": 0})


def _offered(machine: Machine) -> str:
    return _listed({name: machine.resources.get(name, 0) for name in SETTINGS})


def _listed(found: Mapping[str, float]) -> str:
    texts = []
    for name, amount in found.items():
        number = f"{amount / (2**30 if name == 'memory' else 1):.4g}"
        unit = SETTINGS[name][1]
        texts.append(f"{number} {unit.removesuffix('s') if number == '1' else unit}")
    return ", ".join(texts)


# Room for what will be written.


def _too_little_disk(
    plan: Plan, names: Sequence[str], statuses: Mapping[str, Status], expected: Mapping[str, Estimate]
) -> list[str]:
    """Only where there is not half of the room: an estimate may be wrong. Each step looks again before it starts.

    What a strategy will keep is not known before it has chosen, so train sets count only where it has.
    """
    root = plan.config.root
    free = storage.free_bytes(root)
    if free is None:
        return []
    names = [name for name in names if plan.steps[name].kind != "train_set" or statuses[name].state != "pending"]
    needed = sum(expected[name].written_bytes or 0 for name in names)
    needed += max((expected[name].passing_bytes for name in names), default=0)
    for name in names:
        status = statuses[name]
        if status.artifact is not None:  # what a run that was stopped has left is written
            folder = status.artifact.path
            there = sum(storage.size_bytes(storage.join(folder, file)) for file in storage.list_files(folder))
            needed -= min(there, expected[name].written_bytes or 0)
    if free >= ROOM * needed:
        return []
    largest = max(names, key=lambda name: expected[name].written_bytes or 0)
    most = f"{largest} {estimates.size(expected[largest].written_bytes or 0)}"
    sizes = f"{estimates.size(free)} are free, expected about {estimates.size(needed)}"
    return [f"root = {root}: {sizes} for what is to be written, most of it by {most}"]


def _too_little_temporary(
    plan: Plan,
    names: Sequence[str],
    there: Sequence[Machine],
    free_bytes: Mapping[str, int],
    needed: Mapping[str, Sequence[Request]],
    expected: Mapping[str, Estimate],
) -> list[str]:
    """Where the root is an object store, a worker has a file in its temporary folder before it is sent."""
    if not storage.is_url(plan.config.root):
        return []
    lines: dict[str, list[str]] = {}
    for machine in there:
        if machine.name not in free_bytes:
            continue
        wanted = {
            name: _files_at_once(plan.steps[name], expected[name], machine, request)
            for name in names
            for request in needed[name]
        }
        name = max(wanted, key=lambda one: wanted[one])
        if free_bytes[machine.name] < ROOM * wanted[name]:
            line = (
                f"{estimates.size(free_bytes[machine.name])} are free in its temporary folder, expected about "
                f"{estimates.size(wanted[name])} for the files that {name} writes there before they are sent; "
                "set TMPDIR to a larger disk"
            )
            lines.setdefault(line, []).append(machine.name)
    return [f"{_nodes(found)}: {line}" for line, found in lines.items()]


def _files_at_once(step: Step, expected: Estimate, machine: Machine, request: Request) -> float:
    """The bytes of the files that the workers of a step have in a machine's temporary folder at the same time."""
    if step.kind == "checkpoint":  # one worker writes, whatever their number
        return expected.file_bytes
    workers = min(machine.holds(request.resources), request.resources.workers or sys.maxsize)
    return min(expected.file_bytes * workers, expected.written_bytes or sys.maxsize)


# What nodes say of themselves.


def _of_nodes(
    plan: Plan,
    names: Sequence[str],
    needed: Mapping[str, Sequence[Request]],
    there: Sequence[Machine],
    engine: Engine,
    expected: Mapping[str, Estimate],
    asks_for_cuda: bool,
) -> list[str]:
    read_by: dict[Need, list[str]] = {}  # what is read -> the steps whose workers do
    for name in names:
        for need in needs(plan, plan.steps[name]):
            read_by.setdefault(need, []).append(name)
    paths = list(dict.fromkeys(need.path for need in read_by))[:MOST_PATHS]
    with _probe(plan.config.root) as (probe_path, token):
        answers = engine.on_each_machine(machines.report, probe_path, token, paths, asks_for_cuda)
    reports = _reports(answers)
    lines: dict[str, list[str]] = {}  # one for all nodes of which the same is true

    def tell(line: str, node: str) -> None:
        lines.setdefault(line, []).append(node)

    def runs(machine: Machine, steps: Iterable[str]) -> bool:
        """True where a worker of the steps fits; the driver of a training on several needs no CPU."""
        wanted = [request for name in steps for request in needed[name]]
        return any(request.num_together > 1 or machine.holds(request.resources) for request in wanted)

    own = {"python": platform.python_version(), **machines.versions()}
    root = plan.config.root
    by_name = {machine.name: machine for machine in there}
    for node, answer in answers:
        machine = by_name.get(node)
        if machine is None or not runs(machine, names):
            continue  # it joined just now, or it is a head that runs nothing
        if not isinstance(answer, Report):
            if reports and isinstance(answer, WinnowError):
                continue  # it did not answer in time, others did: one of many may be about to go
            tell(f"it can't be asked about itself: {one_line(answer)}", node)
            continue
        for package, version in answer.versions.items():
            if own.get(package) not in ("absent", version):
                tell(
                    f"{package} {version}, expected {own.get(package)} as on the driver; use one image for all nodes",
                    node,
                )
        if why := answer.unreadable.get(probe_path):
            tell(f"root = {root} is not what it is on the driver, expected one that all nodes share: {why}", node)
        elif answer.unwritable:
            tell(f"root = {root} can't be written there: {answer.unwritable}", node)
        for need, steps in read_by.items():
            if need.path in answer.unreadable and runs(machine, steps):
                tell(
                    f"{need.place} = {need.path} can't be read there, expected it on all nodes: "
                    f"{answer.unreadable[need.path]}",
                    node,
                )
    found = [f"{_nodes(nodes)}: {line}" for line, nodes in lines.items()]
    free = {node: report.free_temporary_bytes for node, report in reports.items()}
    found += _without_cuda(there, needed, reports) if asks_for_cuda else []
    return found + _too_little_temporary(plan, names, there, free, needed, expected)


def _reports(answers: Sequence[tuple[str, Any]]) -> dict[str, Report]:
    return {node: answer for node, answer in answers if isinstance(answer, Report)}


def _without_cuda(
    there: Sequence[Machine], needed: Mapping[str, Sequence[Request]], reports: Mapping[str, Report]
) -> list[str]:
    """Machines that say they have GPUs, which torch does not see."""
    on_gpus = [request.resources for found in needed.values() for request in found if request.resources.gpus]
    lines = []
    for machine in there:
        claimed, seen = machine.resources.get("GPU", 0), getattr(reports.get(machine.name), "num_cuda_devices", None)
        if seen is not None and seen < claimed and any(machine.holds(resources) for resources in on_gpus):
            lines.append(
                f"{_nodes([machine.name])}: torch sees {seen} CUDA devices, expected the {claimed:g} GPUs that Ray was "
                "told of; look at the driver and at torch's build"
            )
    return lines


def _nodes(names: Sequence[str]) -> str:
    """`node 10.0.0.3`, `nodes 10.0.0.3, 10.0.0.4`, with many `... and 38 more`."""
    if names == ["this machine"]:
        return names[0]
    more = f" and {len(names) - NAMED_NODES} more" if len(names) > NAMED_NODES else ""
    return f"node{'s' if len(names) > 1 else ''} {', '.join(names[:NAMED_NODES])}{more}"


@contextlib.contextmanager
def _probe(root: str) -> Iterator[tuple[str, bytes]]:
    """(path, content) of a file right below the root, which is gone afterwards."""
    token = uuid.uuid4().hex
    path = storage.join(root, f".winnow{storage.TEMPORARY_MARK}{token[:8]}")
    was_there = storage.is_url(root) or os.path.isdir(root)
    try:
        storage.write_bytes(path, token.encode())
    except Exception as error:  # each store has error classes of its own; all mean the same to the user
        raise PreflightError([f"root = {root}, expected a folder that can be written: {one_line(error)}"]) from error
    try:
        yield path, token.encode()
    finally:
        storage.delete(path)
        if not was_there:
            with contextlib.suppress(OSError):
                os.rmdir(root)


# What workers read beyond the root.


def needs(plan: Plan, step: Step) -> list[Need]:
    """What the workers of a step read that no step has made: of many files alike, the first ones."""
    found: list[Need] = []
    if isinstance(step.work, Stage):
        alias = step.resources
        given = {name.split(".")[0]: getattr(step.work, name.split(".")[0]) for name in step.work.external_files()}
        for parameter, path in step.work.external_files().items():
            if given[parameter.split(".")[0]]:  # else a package brings it, wherever that is installed
                found.append(Need(f"stages.{alias}.{parameter}", path))
        if step.work.uses_model and "model" not in step.inputs:
            found += _weights(plan, step.work.model)
    elif step.kind in ("checkpoint", "task_images"):
        if step.work.start is not None:
            found += _weights(plan, step.work.recipe.start_from)
    elif step.kind in ("pool", "urls") and not isinstance(step.work, DownloadSettings):
        for name, source in step.work.items():
            found += _source_files(step.name, name, source)
    elif step.kind in ("selection", "gallery"):
        chosen, strategy, *_ = step.work
        found += [Need("strategies: uids", path) for path in algebra.used_files(chosen, strategy)]
    if plan.exclude.uid_paths and (step.kind in ("selection", "gallery", "profile") or step.resources == "download"):
        found += [Need("exclude.uids", path) for path in plan.exclude.uid_paths]
    if step.kind in ("task_images", "results"):
        found += _task_files(plan, step.work if step.kind == "results" else step.work.task)
    return found


def _weights(plan: Plan, name: str) -> list[Need]:
    """The weights file of a model; none where a tag names them, which open_clip downloads or has in its cache."""
    pretrained = plan.config.models[name].pretrained or ""
    if storage.is_url(pretrained) or storage.exists(pretrained):
        return [Need(f"models.{name}.pretrained", storage.absolute(pretrained))]
    return []


def _source_files(step_name: str, source_name: str, source: sources.Source) -> list[Need]:
    if source.layout == sources.DEMO:
        return []
    owner = step_name.removesuffix("/urls").replace("reference/", "references.")
    place = f"{'pool' if owner == 'urls' else owner}.source"
    place += f".{source_name}" if source_name != sources.SINGLE else ""
    try:
        found = sources.find(source, place)
    except WinnowError as error:
        raise PreflightError([str(error)]) from error
    names = [next((name for name, entry in found.files.items() if not entry.unsafe), "")]
    if source.captions:
        names.append(source.captions)
    return [Need(place, storage.join(found.root, name) if not os.path.isabs(name) else name) for name in names if name]


def _task_files(plan: Plan, task: str) -> list[Need]:
    data = plan.tasks[task]
    if data is None:  # drawn by a step
        return []
    files = [name for name in (*data.shards[:1], *data.train_shards[:1]) if name.endswith((".tar", ".parquet"))]
    paths = [storage.join(data.path, name) for name in (*data.texts, *files)] or [data.path]
    return [Need(f"eval.tasks: {task}", path) for path in paths]
