"""Rows handed from one pass over a pool to the next, by key: files whose rows are grouped by partition.

A writer sorts its rows by partition; a reader of one partition takes its rows out of every writer's file. So an
exchange of any size needs the memory of one file and of one partition, leaves files that a killed run goes on from,
and works the same on a disk and on an object store. Files are Arrow IPC, one record batch a partition.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core import storage

_BATCHES = b"partitions"  # key in a file's metadata: the partition of each record batch
_NOTES = b"notes"


def write(
    path: str,
    columns: Mapping[str, Any],
    partitions: np.ndarray | None = None,
    notes: Mapping[str, int] | None = None,
) -> None:
    """None; the rows are in the file, grouped by partition, in their order within each.

    Args:
        columns: {name: one value a row}, numpy or Arrow arrays.
        partitions: [n] whole numbers; None: all rows belong to partition 0.
        notes: counts that go with the file: see read_notes.
    """
    table = pa.table(dict(columns))
    pieces: list[tuple[int, pa.Table]] = [(0, table)]
    if partitions is not None and len(partitions):
        if (partitions[1:] < partitions[:-1]).any():
            order = np.argsort(partitions, kind="stable")
            table, partitions = table.take(order), partitions[order]
        starts = np.flatnonzero(np.diff(partitions, prepend=-1))
        ends = np.append(starts[1:], len(partitions))
        pieces = [
            (int(partitions[start]), table.slice(start, end - start)) for start, end in zip(starts, ends, strict=True)
        ]
    pieces = [(number, piece) for number, piece in pieces if piece.num_rows]
    batches = json.dumps([number for number, _ in pieces])
    schema = table.schema.with_metadata({_BATCHES: batches, _NOTES: json.dumps(dict(notes or {}))})
    with (
        storage.write_file(path) as temporary,
        pa.OSFile(temporary, "wb") as sink,
        pa.ipc.new_file(sink, schema) as out,
    ):
        for _, piece in pieces:
            out.write_batch(pa.record_batch([_whole(column) for column in piece.columns], schema=schema))


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    return whole if isinstance(whole, pa.Array) else pa.concat_arrays(whole.chunks)


def read(paths: Sequence[str], partition: int | None = None) -> pa.Table | None:
    """The rows of one partition (None: of all) of all files, in the files' order; None where there is none.

    Local files are mapped, not read: only what is used is loaded.
    """
    tables = []
    for path in paths:
        file = _open(path)
        numbers = json.loads(file.schema.metadata[_BATCHES])
        wanted = [index for index, number in enumerate(numbers) if partition is None or number == partition]
        if wanted:
            batches = [file.get_batch(index) for index in wanted]
            tables.append(pa.Table.from_batches(batches).replace_schema_metadata())
    return pa.concat_tables(tables).combine_chunks() if tables else None


def read_each(paths: Sequence[str], partition: int | None = None) -> Iterator[pa.Table]:
    """As read, file by file, without the files that have no such row."""
    return (table for path in paths if (table := read([path], partition)) is not None)


def num_rows(paths: Sequence[str]) -> int:
    """How many rows the files hold together."""
    files = map(_open, paths)
    return sum(file.get_batch(index).num_rows for file in files for index in range(file.num_record_batches))


def read_notes(paths: Sequence[str]) -> dict[str, int]:
    """{name: sum over the files} of the counts that went with them."""
    total: dict[str, int] = {}
    for path in paths:
        for name, count in json.loads(_open(path).schema.metadata[_NOTES]).items():
            total[name] = total.get(name, 0) + count
    return total


def _open(path: str) -> pa.RecordBatchFileReader:
    return pa.ipc.open_file(storage.open_read(path) if storage.is_url(path) else pa.memory_map(path))


def by_hash(keys: np.ndarray, num_partitions: int) -> np.ndarray:
    """[n] int64 partition of each uint64 key: the same for equal keys, balanced for well mixed ones."""
    return (((keys >> np.uint64(32)) * np.uint64(num_partitions)) >> np.uint64(32)).astype(np.int64)
