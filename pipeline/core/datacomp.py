"""The 40 tasks of DataComp (Gadre et al., arXiv 2304.14108, 2023), a line each in data/datacomp_tasks.json.

    {"name": "vtab/pcam", "title": "PatchCamelyon", "type": "zeroshot_classification", "metric": "acc1", "chance": 0.5,
     "group": "VTAB", "counted": true, "clean": false, "images": 32768, "classes": 2}

`counted`: one of the 38 of its average. `clean`: one of the 33 of them that are not near chance at its scales (the
paper leaves out CLEVR x 2, PatchCamelyon, Camelyon17 and KITTI). It stands here as eval/ and the report both read it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any


def _read() -> dict[str, dict[str, Any]]:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "datacomp_tasks.json")
    with open(path, encoding="utf-8") as file:
        return {entry["name"]: entry for entry in json.load(file)}


DATACOMP_TASKS: Mapping[str, Mapping[str, Any]] = _read()
