"""Outputs that are recorded for a version of a stage, in tests/golden."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Mapping
from typing import Any

GOLDEN = pathlib.Path(__file__).parent / "golden"


def read_golden(name: str) -> dict[str, Any]:
    """What is recorded for the stage."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


def check_golden(name: str, current: Mapping[str, Any]) -> None:
    """None. Outputs are those recorded. After a change that is meant: bump the stage's `version` and record what the
    failure shows."""
    assert current == read_golden(name), f"outputs of {name} changed: bump its version, record {json.dumps(current)}"
