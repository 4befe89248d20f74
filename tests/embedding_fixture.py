"""Pools whose rows have planted vectors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from pipeline.core import pool
from stages.stage_worker import Reference
from tests.pool_fixture import drawing, even_shards, scattered_uids, write_columns, write_pool

IMAGE = drawing(1, 8, 6)


def vector_pool(folder, vectors: Sequence, ids: Sequence[str], shards: int):
    """(pool path, columns): rows with these uids and the column `vector`; a failed row where there is none."""
    rows = [
        {"image": None if vector is None else IMAGE, "caption": "a", "uid": uid}
        for vector, uid in zip(vectors, ids, strict=True)
    ]
    path = write_pool(folder / "root", even_shards(rows, shards))
    return path, write_columns(folder / "root", path, {"vector": vector_column(vectors)})


def vector_column(vectors: Sequence) -> pa.Array:
    """A column float16[] of these vectors; null for None."""
    lists = [None if vector is None else np.asarray(vector, np.float16) for vector in vectors]
    return pa.array(lists, type=pa.list_(pa.float16()))


def vector_references(folder, vectors: Mapping[str, Sequence]) -> dict[str, Reference]:
    """References of these names, pools of two shards with these vectors in the column `vector`."""
    found = {}
    for name, own in vectors.items():
        path, columns = vector_pool(folder / name, own, scattered_uids(len(own)), 2)
        found[name] = Reference(path, pool.load_shards(path), columns)
    return found


def near_copies(num: int, num_dimensions: int, seed: int, noise: float = 0.2) -> tuple[np.ndarray, np.ndarray]:
    """([num, d] float16, [num]): random vectors, every third one an earlier one with noise; and of which."""
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(num, num_dimensions))
    original = np.arange(num)
    for at in range(2, num, 3):
        original[at] = original[rng.integers(at)]
        vectors[at] = vectors[original[at]] + noise * rng.normal(size=num_dimensions)
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float16), original
