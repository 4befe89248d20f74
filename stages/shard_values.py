"""Values that `fit` of a whole-pool stage found for single rows: written shard by shard, and read back by process().

The last pass of such a fit writes its rows by shard, whatever it computed them by; a worker that scores a shard takes
that shard's rows out of every file. The shards' names, in their order, are in the facts that fit returns.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.core import exchange, storage
from stages.base import FACTS, Batch, LoadContext, Stage
from stages.pool_blocks import Block

FOUND = "found"  # the name of most passes that write these rows
SHARDS = "shards"  # the fact under which ShardValues finds the shards' names


def shard_names(blocks: Sequence[Block]) -> list[str]:
    """The shards' names, in the pool's order: what fit returns as its fact SHARDS."""
    return [shard.name for block in blocks for shard in block.shards]


def shard_starts(blocks: Sequence[Block]) -> np.ndarray:
    """[num_shards] uint64 number of each shard's first row."""
    sizes = [shard.rows for block in blocks for shard in block.shards]
    return np.cumsum([0, *sizes[:-1]], dtype=np.uint64)


def write_by_shard(
    path: str,
    row: np.ndarray,
    columns: Mapping[str, Any],
    starts: np.ndarray,
    notes: Mapping[str, int] | None = None,
) -> None:
    """None; the file has the columns of the rows, by shard.

    Args:
        row: [n] uint64, numbers of the rows in the pool.
        columns: {name: one value a row}, numpy or Arrow arrays.
        starts: see shard_starts.
        notes: see pipeline.core.exchange.write.
    """
    shard = np.searchsorted(starts, row, side="right") - 1
    exchange.write(path, {"row": (row - starts[shard]).astype(np.int64), **columns}, shard, notes)


class ShardValues:
    """Reads what write_by_shard wrote; keeps the rows of the last shard.

    Args:
        fit_path: the folder of the stage's fit.
        name: of the pass that wrote the rows.
        types: of its columns without `row`, for a shard of which there is no row.
    """

    def __init__(self, fit_path: str, name: str, types: Mapping[str, pa.DataType]):
        folder = storage.join(fit_path, name)
        self._paths = [storage.join(folder, file) for file in storage.list_files(folder)]
        names = storage.read_json(storage.join(fit_path, FACTS))[SHARDS]
        self._numbers = {shard: number for number, shard in enumerate(names)}
        self._none = pa.table(
            {"row": pa.array([], pa.int64()), **{key: pa.array([], kind) for key, kind in types.items()}}
        )
        self._shard = ""
        self._table = self._none

    def of(self, batch: Batch) -> dict[str, pa.ChunkedArray]:
        """{column: one value a row of the batch}, null for rows of which nothing was written."""
        if batch.shard != self._shard:
            table = exchange.read(self._paths, self._numbers[batch.shard])
            self._table = self._none if table is None else table.sort_by("row").combine_chunks()
            self._shard = batch.shard
        row = self._table["row"].to_numpy()
        places = np.searchsorted(row, batch.rows)
        places[places == len(row)] = 0
        there = row[places] == batch.rows if len(row) else np.zeros(len(batch), dtype=bool)
        wanted = pa.array(places, mask=~there)
        return {name: self._table[name].take(wanted) for name in self._none.column_names if name != "row"}


@dataclass(frozen=True)
class FittedStage(Stage):
    """A stage of the whole pool whose fit finds the values of all rows; process() hands them out.

    `found_types` are the columns that the pass `found_in` wrote with write_by_shard, in the order of `adds`.
    """

    reads: ClassVar[str] = "columns"
    whole_pool: ClassVar[bool] = True
    batch_size: ClassVar[int] = 4096
    found_types: ClassVar[Mapping[str, pa.DataType]]
    found_in: ClassVar[str] = FOUND

    @property
    def needs_in_process(self) -> tuple[str, ...]:
        return ()

    def load(self, context: LoadContext) -> Any:
        """Reads the values of a shard's rows."""
        return ShardValues(context.fit_path or "", self.found_in, self.found_types)

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        return dict(zip(self.adds, state.of(batch).values(), strict=True))
