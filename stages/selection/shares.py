"""Of what a pool and a selection are made: how many rows have each value of a column of few values (topic, source).

shares.json, for example:

    {"topic": {"values": [["animals", 4100, 2950], [null, 12, 3]], "other": [3, 40, 20]}}

Each value with the pool's ok rows and the selection's samples (a row that is taken twice counts twice), most frequent
in the pool first; `other` is how many further values there are, and their rows and samples. Bools are `true` and
`false`.

Cost: one pass over the columns and the selection's row numbers; memory of one shard's columns, and of MAX_VALUES values
a column.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import pool, storage
from pipeline.core.errors import WinnowError
from stages.column_files import Column, file_path, open_columns

VERSION = 1  # bump when any output changes for the same inputs
FILE = "shares.json"
TYPES = ("string", "bool", "int32")  # of columns that have shares
NUM_VALUES = 50  # listed; the others are counted together
MAX_VALUES = 10_000  # of a column: one with more is no column of few values


def write_shares(
    pool_path: str, selection_path: str, columns: Mapping[str, Column], names: Sequence[str], out_path: str
) -> dict[str, Any]:
    """Facts, {values: {column: number of its values}}; the file is there when this returns.

    Args:
        columns: {name in the config: where it is stored} of the stages' columns; the pool's own need no entry.
        names: the columns to count.

    Raises:
        WinnowError: a column has more than MAX_VALUES values.
    """
    counts: dict[str, dict[Any, np.ndarray]] = {name: {} for name in names}  # [ok rows, samples]
    for shard in pool.load_shards(pool_path):
        taken = np.zeros(shard.rows, dtype=np.int64)
        chosen = pool.read_table(file_path(selection_path, shard), ["row", "multiplicity"])
        taken[chosen["row"].to_numpy()] = chosen["multiplicity"].to_numpy()
        own = [name for name in names if name not in columns]
        table = pool.read_rows(pool_path, shard.name, ["ok", *own])
        ok = table["ok"].combine_chunks()
        for name in names:
            values = table[name] if name in own else _column(columns[name], shard)
            _count(counts[name], values.combine_chunks().filter(ok), taken[np.asarray(ok)])
            if len(counts[name]) > MAX_VALUES:
                raise WinnowError(f"shares: {name} has more than {MAX_VALUES:,} values, expected a column of few")
    found = {name: _listed(counted) for name, counted in counts.items()}
    storage.write_json(storage.join(out_path, FILE), found)
    return {"values": {name: len(counted) for name, counted in counts.items()}}


def _column(column: Column, shard: pool.Shard) -> pa.ChunkedArray:
    file = open_columns(column.path, shard)
    try:
        return file.read([column.name], use_threads=False)[column.name]
    finally:
        file.close(force=True)


def _count(counts: dict[Any, np.ndarray], values: pa.Array, taken: np.ndarray) -> None:
    """None; adds one shard's ok rows and how often each is taken to the counts by value."""
    encoded = pc.dictionary_encode(values, null_encoding="encode")
    index = np.asarray(encoded.indices)
    names = encoded.dictionary.to_pylist()
    rows = np.bincount(index, minlength=len(names))
    samples = np.zeros(len(names), dtype=np.int64)
    np.add.at(samples, index, taken)
    for name, pair in zip(names, np.column_stack([rows, samples]), strict=True):
        counts[name] = counts.get(name, 0) + pair


def _listed(counts: Mapping[Any, np.ndarray]) -> dict[str, Any]:
    texts = [(_text(value), *map(int, pair)) for value, pair in counts.items()]
    texts.sort(key=lambda entry: (-entry[1], entry[0] is None, entry[0] or ""))
    rest = texts[NUM_VALUES:]
    other = [len(rest), sum(rows for _, rows, _ in rest), sum(samples for *_, samples in rest)]
    return {"values": [list(entry) for entry in texts[:NUM_VALUES]], "other": other}


def _text(value: Any) -> str | None:
    return None if value is None else str(value).lower() if isinstance(value, bool) else str(value)
