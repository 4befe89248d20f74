"""Runs that lose machines at random end in the same artifacts: see benchmarks/chaos.py."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks import chaos


@pytest.fixture
def store(s3_endpoint):
    return chaos.Store(s3_endpoint, f"chaos{os.getpid()}")


@pytest.fixture
def alone(finished):
    """What tests/tiny.yaml gives without a cluster."""
    return chaos.made_in_folder(finished[0])


@pytest.mark.ray
@pytest.mark.slow
def test_twenty_seeds_over_stages_and_trainings(tmp_path):
    """Longer trainings, which write their states to the store: about two minutes a seed on two free cores."""
    assert chaos.main(["--seeds", "0:20", "--folder", str(tmp_path)]) == 0


@pytest.fixture
def copy(store, finished):
    """The prefix of a finished root on the store: its records as they are, the other files empty."""
    for path in finished[0].rglob("*"):
        if path.is_file():
            name = path.relative_to(finished[0]).as_posix()
            store.write("copy", name, path.read_bytes() if path.name == chaos.RECORD else b"")
    return "copy"


def change(store, prefix, kind, edit):
    """None; edits the record of the first artifact of a kind."""
    key = min(key for key in store.keys(prefix) if key.startswith(f"{kind}-") and key.endswith(chaos.RECORD))
    record = json.loads(store.read(prefix, key))
    edit(record)
    store.write(prefix, key, json.dumps(record).encode())
    return key.partition("/")[0]


def test_the_judge_accepts_a_copy_and_names_what_was_spoilt(alone, store, copy):
    assert chaos.differences(alone, store, copy) == []
    store.write(copy, "clip-000000000000/00000.parquet", b"")
    store.write(copy, f"{next(iter(alone.files))}/00000.parquet.tmp", b"")
    (stray,) = chaos.differences(alone, store, copy)
    assert stray.startswith("2 files in no record: ") and "clip-000000000000/00000.parquet" in stray

    name = change(store, copy, "checkpoint", lambda record: next(iter(record["files"].values())).update(sha256="0"))
    assert f"{name}: other files" in chaos.differences(alone, store, copy)
    name = change(store, copy, "pool", lambda record: record["facts"].update(ok_rows=0))
    found = " ".join(chaos.differences(alone, store, copy))
    assert f"{name}: counts" in found and "do not add up" in found
    name = min(name for name in alone.files if name.startswith("selection-"))
    store.delete(f"{copy}/{name}")
    assert f"{name}: missing" in chaos.differences(alone, store, copy)
