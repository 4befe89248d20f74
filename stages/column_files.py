"""Column artifacts: per pool shard one parquet with `uid` and a stage's columns, same rows, same order, nulls on
failed rows. Each file names the digest of the pool shard that it was computed from, and is stale when that changed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import pool, storage
from pipeline.core.errors import WinnowError
from pipeline.core.pool import Shard

ARROW_TYPES = {
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "string": pa.string(),
    "binary": pa.binary(),
    "float16[]": pa.list_(pa.float16()),
}
POOL_TYPES = {
    field.name: name for field in pool.SCHEMA for name, arrow_type in ARROW_TYPES.items() if arrow_type == field.type
}  # the pool's own columns, typed as a stage's `adds` are


@dataclass(frozen=True)
class Column:
    """Where a column is stored: a column artifact's folder, and the column's name in its files.

    The name that the config uses may differ (`as:` prefixes it); files carry the stage's own names.
    """

    path: str
    name: str


def file_path(path: str, shard: Shard) -> str:
    """The path of the column file of one shard."""
    return storage.join(path, f"{shard.name}.parquet")


def is_current(path: str, shard: Shard) -> bool:
    """True when the artifact's folder has this shard's file, computed from the shard as it is now."""
    try:
        with storage.open_read(file_path(path, shard)) as file:
            metadata = pq.read_schema(file).metadata or {}
    except FileNotFoundError:
        return False
    return metadata.get(pool.SHARD_DIGEST) == shard.digest.encode()


def open_columns(path: str, shard: Shard) -> pq.ParquetFile:
    """The open column file of one shard. Raises WinnowError when it is missing, stale or of another length."""
    place = file_path(path, shard)
    try:
        file = pq.ParquetFile(storage.open_read(place))
    except FileNotFoundError as error:
        raise WinnowError(f"{place} is missing, expected the columns of pool shard {shard.name}") from error
    digest = (file.schema_arrow.metadata or {}).get(pool.SHARD_DIGEST, b"").decode()
    if digest != shard.digest:
        raise WinnowError(f"{place}: computed from pool shard {digest or '(unknown)'}, expected {shard.digest}")
    if file.metadata.num_rows != shard.rows:
        raise WinnowError(f"{place}: {file.metadata.num_rows} rows, expected the pool shard's {shard.rows}")
    return file


def chosen_rows(selection_path: str, shard: Shard) -> np.ndarray:
    """[rows] bool: which rows of the shard are in a selection; of how often, nothing is said."""
    chosen = np.zeros(shard.rows, dtype=bool)
    chosen[pool.read_table(file_path(selection_path, shard), ["row"])["row"].to_numpy()] = True
    return chosen


def row_groups(file: pq.ParquetFile, columns: Sequence[str], num_rows: int) -> Iterator[pa.Table]:
    """The file's rows as tables of exactly `num_rows` rows (the last one may be shorter), streamed."""
    pending: pa.Table | None = None
    for batch in file.iter_batches(batch_size=num_rows, columns=list(columns)):
        table = pa.Table.from_batches([batch])
        pending = table if pending is None else pa.concat_tables([pending, table])
        while pending.num_rows >= num_rows:
            yield pending.slice(0, num_rows)
            pending = pending.slice(num_rows)
    if pending is not None and pending.num_rows:
        yield pending
