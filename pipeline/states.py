"""What state each step of a plan is in, and why: by its identity, and by what is finished below the root.

A step's identity is its values and the digests of its inputs' content, so it is known once the inputs are finished:
until then the step is *pending*. Column steps are identified by the pool's fingerprint instead, and each of their files
by the digest of the pool shard that it was computed from: when a shard changes, that file alone is stale. A downloaded
pool with `retry` is to be done once more in a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pipeline.core import artifact, pool, storage
from pipeline.steps import Plan, Step
from stages.base import Stage
from stages.ingest import download
from stages.ingest.fetch.settings import DownloadSettings


@dataclass(frozen=True)
class Status:
    """`state` is done, todo, pending or unavailable; `why` says what made it so.

    The artifact is known of what is done or to be done.
    """

    state: str
    artifact: artifact.Artifact | None
    why: str
    record: Mapping[str, Any] | None = None


def resolve(plan: Plan, known: dict[str, Status] | None = None, explain: bool = False) -> dict[str, Status]:
    """The state of every step, by looking at what is finished below the root.

    Args:
        known: earlier answers; steps that were done then are not looked at again.
        explain: look at all finished artifacts to say of a step to be done how it differs from one that is.
    """
    root = plan.config.root
    found: dict[str, Status] = {}
    siblings: dict[str, list[tuple[str, Mapping[str, Any]]]] | None = None
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
        if siblings is None:
            siblings = _finished_by_kind(root) if explain else {}
        found[name] = Status("todo", made, _why(made, siblings.get(step.kind, [])))
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
        record = found[name].record
        assert record is not None  # done steps have one
        by_name = isinstance(step.work, Stage) and role not in ("model", "within") and not step.work.whole_pool
        inputs[role] = record["fingerprint"] if by_name else artifact.content_digest(record)
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


def _finished_by_kind(root: str) -> dict[str, list[tuple[str, Mapping[str, Any]]]]:
    found: dict[str, list[tuple[str, Mapping[str, Any]]]] = {}
    for folder in storage.list_folders(root):
        record = artifact.read_record(storage.join(root, folder)) if "-" in folder else None
        if record:
            found.setdefault(record["kind"], []).append((folder, record["identity"]))
    return found


def _why(made: artifact.Artifact, siblings: list[tuple[str, Mapping[str, Any]]]) -> str:
    """Why a step is to be done: the first field that differs from the finished sibling that shares most with it."""
    if not siblings:
        return "not made yet"
    differences = [(artifact.first_difference(other, made.identity) or "", folder) for folder, other in siblings]
    difference, folder = min(differences, key=lambda pair: (len(pair[0]), pair))
    return f"differs from {folder} in {difference}"


def describe(plan: Plan, wanted: list[str]) -> str:
    """What --plan prints: step, state, artifact, and why; then the counts."""
    statuses = resolve(plan, explain=True)
    names = plan.ancestors(wanted)
    rows = []
    for name in names:
        status = statuses[name]
        artifact_name = status.artifact.name if status.artifact else "-"
        rows.append((name, status.state, artifact_name, status.why))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows
    ]
    counts = {state: sum(row[1] == state for row in rows) for state in ("done", "todo", "pending", "unavailable")}
    told = [f"{count} {state}" for state, count in counts.items() if count or state != "unavailable"]
    lines.append(f"root {plan.config.root}: " + ", ".join(told))
    return "\n".join(lines)
