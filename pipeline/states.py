"""What state each step of a plan is in, and why: by its identity, and by what is finished below the root.

A step's identity is its values and the digests of its inputs' content, so it is known once the inputs are finished:
until then the step is *pending*. Column steps are identified by the pool's fingerprint instead, and each of their files
by the digest of the pool shard that it was computed from: when a shard changes, that file alone is stale. A downloaded
pool with `retry` is to be done once more in a run.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import estimates
from pipeline.core import artifact, pool, storage
from pipeline.steps import Plan, Step
from stages.base import Stage
from stages.ingest import download
from stages.ingest.fetch.settings import DownloadSettings

FAITH = "each to a factor of two or three (`?`: not known)"


@dataclass(frozen=True)
class Status:
    """`state` is done, todo, pending or unavailable; `why` says what made it so.

    The artifact is known of what is done or to be done.
    """

    state: str
    artifact: artifact.Artifact | None
    why: str
    record: Mapping[str, Any] | None = None

    @functools.cached_property
    def digest(self) -> str:
        """What a done step is to the identity of those that depend on it: found once, as records are large."""
        assert self.record is not None  # done steps have one
        return artifact.content_digest(self.record)


def resolve(
    plan: Plan, known: dict[str, Status] | None = None, records: estimates.Records | None = None
) -> dict[str, Status]:
    """The state of every step, by looking at what is finished below the root.

    Args:
        known: earlier answers; steps that were done then are not looked at again.
        records: see finished; to say of a step to be done how it differs from a finished artifact.
    """
    root = plan.config.root
    found: dict[str, Status] = {}
    for name, step in plan.steps.items():
        before = (known or {}).get(name)
        if before is not None and before.state == "done":
            found[name] = before
            continue
        if step.unavailable:
            found[name] = Status("unavailable", None, step.unavailable)
            continue
        lost = [other for other in step.inputs.values() if found[other].state == "unavailable"]
        if lost:
            found[name] = Status("unavailable", None, f"needs {lost[0]}")
            continue
        waiting = [other for other in step.inputs.values() if found[other].state != "done"]
        if waiting:
            found[name] = Status("pending", None, f"waits for {waiting[0]}")
            continue
        made = artifact.Artifact(root, step.kind, identity(step, found))
        record = made.record()
        if record is not None:
            again = _rows_to_retry(step, record, plan.run_id)
            if again:
                found[name] = Status("todo", made, f"retry: {again} failed rows", record)
                continue
            stale = stale_shards(step, record, found)
            if not stale:
                found[name] = Status("done", made, "finished", record)
                continue
            found[name] = Status("todo", made, f"{len(stale)} shards of the pool changed", record)
            continue
        found[name] = Status("todo", made, _why(made, (records or {}).get(step.kind, [])))
    return found


def _rows_to_retry(step: Step, record: Mapping[str, Any], run_id: str) -> int:
    """How many rows of a finished download this run shall fetch again."""
    if not isinstance(step.work, DownloadSettings) or record["facts"].get("retried_by") == run_id:
        return 0
    retried = download.retried_failures(step.work)
    return sum(count for reason, count in record["facts"]["failed"].items() if reason in retried)


def identity(step: Step, found: Mapping[str, Status]) -> dict[str, Any]:
    """The identity of a step whose inputs are done."""
    inputs = {}
    for role, name in step.inputs.items():
        status = found[name]
        assert status.record is not None  # done steps have one
        by_name = isinstance(step.work, Stage) and role not in ("model", "within") and not step.work.whole_pool
        inputs[role] = status.record["fingerprint"] if by_name else status.digest
    return {"version": step.version, **step.values, "inputs": inputs}


def stale_shards(step: Step, record: Mapping[str, Any] | None, found: Mapping[str, Status]) -> list[pool.Shard]:
    """The pool's shards for which a stage has no columns yet, or columns of another content. [] for other steps."""
    if not isinstance(step.work, Stage):
        return []
    pool_record = found[step.inputs["pool"]].record
    assert pool_record is not None
    files = record["files"] if record else {}
    return [
        shard
        for shard in pool.shards(pool_record)
        if files.get(f"{shard.name}.parquet", {}).get("pool_shard") != shard.digest
    ]


def finished(root: str) -> dict[str, list[Mapping[str, Any]]]:
    """{kind: records} of all finished artifacts below the root."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for folder in storage.list_folders(root):
        record = artifact.read_record(storage.join(root, folder)) if "-" in folder else None
        if record:
            found.setdefault(record["kind"], []).append(record)
    return found


def _why(made: artifact.Artifact, siblings: Sequence[Mapping[str, Any]]) -> str:
    """Why a step is to be done: the first field that differs from the finished sibling that shares most with it."""
    if not siblings:
        return "not made yet"
    differences = [
        (artifact.first_difference(other["identity"], made.identity) or "", f"{made.kind}-{other['fingerprint']}")
        for other in siblings
    ]
    difference, folder = min(differences, key=lambda pair: (len(pair[0]), pair))
    return f"differs from {folder} in {difference}"


def describe(plan: Plan, wanted: list[str]) -> tuple[str, dict[str, Status], dict[str, estimates.Estimate]]:
    """(what --plan prints, the state of every step, what each that is to be done will write and take).

    A line a step: its state, estimates where it is to be done, its artifact, and why; then sums.
    """
    statuses = resolve(plan)
    records: estimates.Records = {}
    if any(status.state == "todo" for status in statuses.values()):
        records = finished(plan.config.root)
        statuses = resolve(plan, statuses, records)
    found = estimates.estimate(plan, statuses, records)
    names = plan.ancestors(wanted)
    rows = [("step", "state", "writes", "CPU time", "GPU time", "artifact, and why")]
    for name in names:
        status = statuses[name]
        why = f"{status.artifact.name}  {status.why}" if status.artifact else status.why
        rows.append((name, status.state, *estimates.columns(found.get(name)), why))
    remaining = [found[name] for name in names if name in found]
    shown = [0, 1, *((2, 3) if remaining else ()), *((4,) if any(one.gpu_hours != 0 for one in remaining) else ()), 5]
    widths = [max(len(row[column]) for row in rows) for column in range(5)] + [0]
    numbers = (2, 3, 4)
    lines = [
        "  ".join(row[at].rjust(widths[at]) if at in numbers else row[at].ljust(widths[at]) for at in shown)
        for row in rows
    ]
    counts = {state: sum(row[1] == state for row in rows) for state in ("done", "todo", "pending", "unavailable")}
    told = [f"{count} {state}" for state, count in counts.items() if count or state != "unavailable"]
    lines.append(f"root {plan.config.root}: " + ", ".join(told))
    if remaining:
        lines.append(f"to come: {estimates.summary(remaining)}, {FAITH}")
    return "\n".join(lines), statuses, found
