"""Pools without images, and columns of vectors for them."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from pipeline.core import artifact, pool, storage


def write_pool(root: str, ids: pa.Array, shard_rows: int) -> str:
    """The path of a pool of rows with these uids, all of them ok."""
    made = artifact.Artifact(root, "pool", {"rows": len(ids)})
    notes = {}
    for index, start in enumerate(range(0, len(ids), shard_rows)):
        part = ids.slice(start, shard_rows)
        columns = {field.name: pa.nulls(len(part), field.type) for field in pool.SCHEMA}
        columns |= {"uid": part, "ok": pa.array(np.ones(len(part), dtype=bool))}
        table = pa.table(columns, schema=pool.SCHEMA)
        storage.write_bytes(storage.join(made.path, f"{index:05d}.parquet"), pool.table_bytes(table))
        notes[f"{index:05d}.parquet"] = {"rows": len(part)}
    artifact.finish(made, {}, file_notes=notes)
    return made.path


def vector_column(rows_ND: np.ndarray) -> pa.Array:
    """The vectors as a column of lists."""
    offsets = pa.array(np.arange(len(rows_ND) + 1, dtype=np.int32) * rows_ND.shape[1])
    return pa.ListArray.from_arrays(offsets, pa.array(rows_ND.reshape(-1)))
