"""The runs below a root: the newest one, and what --clean does (artifacts that no run refers to)."""

from __future__ import annotations

import re

from pipeline.core import artifact, log, storage
from pipeline.core.errors import WinnowError

ARTIFACT = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{12}$")
RUNS = "runs"


def unreferred(root: str) -> list[str]:
    """Sorted names of the artifact folders below the root that no run's plan.json names. Nothing else is looked at."""
    referred: set[str] = set()
    for run in storage.list_folders(storage.join(root, RUNS)):
        plan_path = storage.join(root, RUNS, run, "plan.json")
        if storage.exists(plan_path):
            referred |= {step["artifact"] for step in storage.read_json(plan_path)["steps"].values()}
    return [name for name in storage.list_folders(root) if ARTIFACT.match(name) and name not in referred]


def newest_run(root: str) -> str:
    """The folder of the newest run that got as far as a leaderboard. Raises WinnowError when there is none."""
    runs = storage.join(root, RUNS)
    for name in reversed(storage.list_folders(runs)):
        if storage.exists(storage.join(runs, name, "run.json")):
            return storage.join(runs, name)
    raise WinnowError(f"{runs}: expected a finished run to report on, found none")


def clean(root: str, remove: bool) -> int:
    """0; prints each artifact that no run refers to with its size, and removes it when `remove`."""
    found = unreferred(root)
    for name in found:
        path = storage.join(root, name)
        record = artifact.read_record(path)
        size = sum(entry["bytes"] for entry in record["files"].values()) if record else None
        state = f"{log.short_count(size)}B" if size is not None else "unfinished"
        print(f"{'removed' if remove else 'unused'}  {name}  {state}")
        if remove:
            storage.delete(storage.join(path, artifact.RECORD))  # first: half a folder must not look finished
            storage.delete(path)
    if not found:
        print(f"{root}: every artifact is referred to by a run")
    elif not remove:
        print(f"{len(found)} artifacts of {root} are referred to by no run; --clean --yes removes them")
    return 0
