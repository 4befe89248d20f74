"""A numeric column of a pool's rows, as passes over the whole pool read it; the types that stages ask of columns."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.core import exchange
from pipeline.core.errors import ConfigError, WinnowError
from stages.pool_blocks import Block
from stages.selection import uids

VECTORS = "float16[]"
NUMBERS = ("float32", "float64", "int32", "int64")


def check_type(parameter: str, column: str, kind: str, expected: tuple[str, ...]) -> None:
    """None. Raises ConfigError, for Stage.check_needs, when the column that a parameter names is of another type."""
    if kind not in expected:
        raise ConfigError(f"{parameter} = {column} of type {kind}, expected {' or '.join(expected)}")


@dataclass(frozen=True)
class Scores:
    """Rows with a number: `row` [n] uint64 in the pool, ascending, `uid` [n, 2] uint64, `score` [n] float64."""

    row: np.ndarray
    uid: np.ndarray
    score: np.ndarray

    def __len__(self) -> int:
        return len(self.row)


def write_scores(path: str, parts: Iterable[Scores]) -> None:
    """None; writes (row, high, low, score); its notes count the `rows`."""
    row, uid, score = (
        np.concatenate(values) for values in zip(*((part.row, part.uid, part.score) for part in parts), strict=True)
    )
    columns = {"row": row, "high": uid[:, 0], "low": uid[:, 1], "score": score}
    exchange.write(path, columns, notes={"rows": len(row)})


def read_scores(block: Block, column: str) -> Iterator[Scores]:
    """The rows of each shard that are ok and have a finite number in the column.

    Raises:
        WinnowError: the column is not of numbers.
    """
    start = block.first_row
    for shard in block.shards:
        table = block.table(shard, ["uid", "ok", column])
        kind = table.schema.field(column).type
        if not (pa.types.is_floating(kind) or pa.types.is_integer(kind)):
            raise WinnowError(f"pool shard {shard.name}, column {column}: {kind}, expected numbers")
        score = table[column].cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy()
        place = np.flatnonzero(np.asarray(table["ok"].combine_chunks()) & np.isfinite(score))
        uid = uids.parse(table["uid"], f"pool shard {shard.name}")
        yield Scores((place + start).astype(np.uint64), uid[place], score[place])
        start += shard.rows
