"""Artifacts: folders `kind-fingerprint/` below the root, complete when `_artifact.json` exists.

Identity is a fingerprint of kind, version, the values that change the result, and the digests of the inputs' content.
Names that a user gives, absolute paths, workers, devices and batch sizes are never in it. The record is written last;
it lists every file with its size and sha256, and `facts` (counts, seconds, versions), which are not identity.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from pipeline.core import storage
from pipeline.core.errors import WinnowError

RECORD = "_artifact.json"
READ_THREADS = 16  # of files that nobody has hashed yet: they mostly wait for the store


def canonical_json(value: Any) -> str:
    """The value as JSON with sorted keys and no spaces. Raises TypeError for what JSON can't hold, NaN included."""

    def check(item: Any) -> None:
        if isinstance(item, Mapping):
            for key, inner in item.items():
                if not isinstance(key, str):
                    raise TypeError(f"key {key!r} of type {type(key).__name__}, expected a string")
                check(inner)
        elif isinstance(item, (list, tuple)):
            for inner in item:
                check(inner)
        elif isinstance(item, float) and not math.isfinite(item):
            raise TypeError(f"{item!r}, expected a finite number")
        elif item is not None and type(item) not in (str, int, float, bool):
            raise TypeError(f"{item!r} of type {type(item).__name__} can't be part of an identity")

    check(value)
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """12 hex digits of the sha256 over the identity's canonical JSON."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:12]


@dataclass(frozen=True)
class Artifact:
    """A folder below the root that holds one step's files, finished or not."""

    root: str
    kind: str
    identity: dict[str, Any]

    @property
    def name(self) -> str:
        """`kind-fingerprint`, the folder's name."""
        return f"{self.kind}-{fingerprint(self.identity)}"

    @property
    def path(self) -> str:
        """The folder's path or URL."""
        return storage.join(self.root, self.name)

    def record(self) -> dict[str, Any] | None:
        """The record, or None while the artifact is unfinished."""
        return read_record(self.path)


def read_record(path: str) -> dict[str, Any] | None:
    """The record of the artifact in this folder, or None while it is unfinished."""
    try:
        return storage.read_json(storage.join(path, RECORD))
    except FileNotFoundError:
        return None


def reopen(path: str) -> None:
    """None; the artifact in this folder counts as unfinished from now on, its files stay."""
    storage.delete(storage.join(path, RECORD))


def content_digest(record: Mapping[str, Any]) -> str:
    """32 hex digits over names and sha256 of the artifact's files, without those that hold only facts.

    This is what an artifact contributes to the identity of whatever depends on it.
    """
    files = {name: entry["sha256"] for name, entry in record["files"].items() if not entry.get("fact")}
    return hashlib.sha256(canonical_json(files).encode()).hexdigest()[:32]


def finish(
    artifact: Artifact,
    facts: Mapping[str, Any],
    fact_files: Iterable[str] = (),
    file_notes: Mapping[str, Mapping[str, Any]] | None = None,
    known: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Any]:
    """The record, written last: from now on the artifact counts as complete.

    Hidden files are none of ours: `.DS_Store`, `.nfs0000...`.

    Args:
        facts: counts, seconds, versions; not identity.
        fact_files: names of files that hold measurements (times); listed, but no part of the content digest.
        file_notes: further entries per file name, such as the digest of the shard that it was computed from.
        known: {name: {bytes, sha256}} of files that were hashed when written; the others are read and hashed here.
    """
    known, notes, facts_only = known or {}, file_notes or {}, set(fact_files)
    names = [name for name in remove_temporaries(artifact.path) if name != RECORD and not storage.is_hidden(name)]
    unknown = [name for name in names if name not in known]
    with ThreadPoolExecutor(READ_THREADS) as readers:
        paths = [storage.join(artifact.path, name) for name in unknown]
        found = dict(zip(unknown, readers.map(file_entry, paths), strict=True))
    entries: dict[str, dict[str, Any]] = {}
    for name in names:
        entry = dict(known[name] if name in known else found[name])
        if name in facts_only:
            entry["fact"] = True
        entries[name] = entry | dict(notes.get(name, {}))
    if not entries:
        raise WinnowError(f"{artifact.path}: no files were written, expected at least one")
    record = {
        "kind": artifact.kind,
        "fingerprint": fingerprint(artifact.identity),
        "identity": artifact.identity,
        "files": entries,
        "facts": dict(facts),
    }
    storage.write_json(storage.join(artifact.path, RECORD), record)
    return record


def check_sizes(path: str, record: Mapping[str, Any]) -> None:
    """None. Raises WinnowError naming a file of a finished artifact that is gone, or has another size than then.

    Files of measurements are passed over: another run that makes the same artifact may write its own.
    """
    there = storage.list_sizes(path)
    for name, entry in record["files"].items():
        if not entry.get("fact") and there.get(name) != entry["bytes"]:
            found = f"{there[name]:,} bytes" if name in there else "no file"
            raise WinnowError(
                f"{path}/{name}: {found}, expected {entry['bytes']:,} bytes as when it was finished: remove {path}, "
                "and the same command makes it again"
            )


def file_entry(path: str) -> dict[str, Any]:
    """{bytes, sha256} of a file, as a record lists it."""
    num_bytes, digest = storage.size_and_sha256(path)
    return {"bytes": num_bytes, "sha256": digest}


def remove_temporaries(path: str) -> list[str]:
    """The names of the folder's other files, after what killed workers left in it was removed.

    A live worker of another run whose temporary file was removed finds out and tries again.
    """
    names = storage.list_files(path, recursive=True)
    for name in names:
        if storage.TEMPORARY_MARK in storage.name_of(name):
            storage.delete(storage.join(path, name))
    return [name for name in names if storage.TEMPORARY_MARK not in name]


def first_difference(old: Any, new: Any, place: str = "") -> str | None:
    """The first field in which two identities differ, as `a.b: old -> new`; None when they are equal."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in sorted(set(old) | set(new)):
            inner = f"{place}.{key}" if place else str(key)
            if key not in old:
                return f"{inner}: (absent) -> {new[key]}"
            if key not in new:
                return f"{inner}: {old[key]} -> (absent)"
            found = first_difference(old[key], new[key], inner)
            if found:
                return found
        return None
    return None if old == new else f"{place}: {old} -> {new}"
