"""Every fault of the catalogue against a real server in a network of its own, with the guards as in production."""

from __future__ import annotations

import json
import os
import pathlib
import sys

import pytest

from pipeline.core.errors import FAILURES
from tests.download_faults import FAULTS
from tests.image_server import can_isolate, in_isolation

SCRIPT = pathlib.Path(__file__).with_name("download_fault_table.py")


def table(engine: str) -> dict:
    """What download_fault_table.py prints."""
    done = in_isolation([sys.executable, str(SCRIPT), engine], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_no_fault_kills_a_shard_leaks_a_fetch_or_passes_a_cap():
    if not can_isolate():
        assert not os.environ.get("CI"), "network namespaces are needed in CI"
        pytest.skip("no network namespaces here")
    found = table("winnow")
    assert found["leaks"] == {}
    wrong = {}
    for name, fault in FAULTS.items():
        row = found["faults"][name]
        assert row["got"] == "ok" or row["got"] in FAILURES
        if row["got"] not in fault.expected:
            wrong[name] = (row, fault.expected)
        elif row["got"] == "ok":
            if fault.size_px and tuple(row["size_px"]) != fault.size_px:
                wrong[name] = (row["size_px"], fault.size_px)
            if fault.rgb and max(abs(a - b) for a, b in zip(row["mean_rgb"], fault.rgb, strict=True)) > 12:
                wrong[name] = (row["mean_rgb"], fault.rgb)
    assert not wrong
    assert found["peak_mb"] < 1000
