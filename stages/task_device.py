"""The device that a task of a pass computes on: torch's, for what is worth a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np

from stages.unit_vectors import CACHED_ROWS, unit


def task_device() -> Any:
    """torch's device: the GPU that the task was given (`cluster:` of its stage), else the CPU.

    A task sees no GPU but its own, so nothing is asked of the machine beyond that. Matrix products are float32 in full:
    a GPU's shortcut through TF32 is off, as torch has it by default.
    """
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def narrow(vectors: np.ndarray, device: Any) -> Any:
    """[n, d] float32 tensor on the device: the vectors at length 1, as stages.unit_vectors.unit has them, rounded.

    Args:
        vectors: [n, d] float16 or float32, finite, none of length 0.
    """
    import torch

    found = np.empty(vectors.shape, np.float32)
    for start in range(0, len(found), CACHED_ROWS):
        found[start : start + CACHED_ROWS] = unit(vectors[start : start + CACHED_ROWS])
    return torch.from_numpy(found).to(device)
