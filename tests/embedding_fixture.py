"""Pools whose rows have planted vectors."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from tests.pool_fixture import drawing, write_columns, write_pool

IMAGE = drawing(1)


def vector_pool(folder, vectors: Sequence, ids: Sequence[str], shards: int):
    """(pool path, columns): rows with these uids and the column `vector`; a failed row where there is none."""
    rows = [
        {"image": None if vector is None else IMAGE, "caption": "a", "uid": uid}
        for vector, uid in zip(vectors, ids, strict=True)
    ]
    bounds = np.linspace(0, len(rows), min(shards, len(rows)) + 1).astype(int)
    path = write_pool(folder / "root", [rows[start:end] for start, end in itertools.pairwise(bounds)])
    lists = [None if vector is None else np.asarray(vector, np.float16) for vector in vectors]
    column = pa.array(lists, type=pa.list_(pa.float16()))
    return path, write_columns(folder / "root", path, {"vector": column})


def near_copies(num: int, num_dimensions: int, seed: int, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """([num, d] float16, [num]): random vectors, every third one an earlier one with noise; and of which."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num, num_dimensions))
    original = np.arange(num)
    for at in range(2, num, 3):
        original[at] = original[rng.integers(at)]
        vectors[at] = vectors[original[at]] + noise * rng.normal(size=num_dimensions)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16), original
