"""A pool as a pass over all of it sees it: blocks of consecutive shards, with the columns that stages have added.

Rows are numbered through the pool in the order of its shards; passes hand these numbers (uint64) to each other. Names
and numbers are of no consequence to what comes out: whatever is decided is decided by content and uid.

A stage that works `within` a strategy sees the rows outside it as it sees failed rows: not ok, and without values.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core import exchange, storage
from pipeline.core.passes import Passes
from pipeline.core.pool import Shard
from stages.column_files import Column, chosen_rows, open_columns

BLOCK_ROWS = 1_000_000  # most rows of a block of more than one shard


@dataclass(frozen=True)
class Block:
    """Consecutive shards of a pool, and where the columns of its rows are; small, as it goes to every task.

    `within` is the folder of the selection outside which no row counts; None: all rows do.
    """

    number: int
    pool_path: str
    shards: tuple[Shard, ...]
    first_shard: int  # number of the first shard in the pool
    first_row: int
    columns: Mapping[str, Column]
    within: str | None = None

    @property
    def rows(self) -> int:
        """How many rows the block has, failed ones included."""
        return sum(shard.rows for shard in self.shards)

    def tables(self, names: Sequence[str]) -> Iterator[pa.Table]:
        """The named columns of each shard, all rows in order; of the pool itself where no stage has them."""
        for shard in self.shards:
            yield self.table(shard, names)

    def table(self, shard: Shard, names: Sequence[str]) -> pa.Table:
        """The named columns of one shard."""
        found: dict[str, pa.ChunkedArray] = {}
        own = [name for name in names if name not in self.columns]
        if own:
            with storage.open_read(storage.join(self.pool_path, f"{shard.name}.parquet")) as file:
                table = pq.read_table(file, columns=own)
            found |= {name: table[name] for name in own}
        by_path: dict[str, list[str]] = {}
        for name in names:
            if name in self.columns:
                by_path.setdefault(self.columns[name].path, []).append(name)
        for path, wanted in by_path.items():
            file = open_columns(path, shard)
            try:
                table = file.read(columns=[self.columns[name].name for name in wanted])
                found |= {name: table[self.columns[name].name] for name in wanted}
            finally:
                file.close(force=True)
        if self.within is not None:
            chosen = chosen_rows(self.within, shard)
            found = {name: _hidden(name, column, chosen) for name, column in found.items()}
        return pa.table({name: found[name] for name in names})

    def metadata(self, name: str) -> Mapping[bytes, bytes]:
        """What the stage that made a column says of itself: see Stage.notes."""
        column = self.columns[name]
        file = open_columns(column.path, self.shards[0])
        try:
            return dict(file.schema_arrow.metadata or {})
        finally:
            file.close(force=True)


def num_ok_rows(blocks: Sequence[Block], passes: Passes) -> int:
    """How many rows of the blocks are ok and, where a stage works within a selection, inside it. A pass of its own."""
    counted = passes.run("ok_rows", write_num_ok_rows, [(block,) for block in blocks])
    return exchange.read_notes(counted.paths).get("ok_rows", 0)


def write_num_ok_rows(block: Block, path: str) -> None:
    """None; notes how many rows of the block are ok."""
    ok_rows = sum(pc.sum(table["ok"], min_count=0).as_py() for table in block.tables(["ok"]))
    exchange.write(path, {}, notes={"ok_rows": ok_rows})


def _hidden(name: str, column: pa.ChunkedArray, chosen: np.ndarray) -> pa.ChunkedArray:
    """The column as it is for a stage that works within a selection. uids stay: they say nothing of a row."""
    if name == "uid":
        return column
    outside = pa.scalar(False if name == "ok" else None, column.type)
    return pc.if_else(pa.array(chosen), column, outside)


def blocks(
    pool_path: str,
    shards: Sequence[Shard],
    columns: Mapping[str, Column],
    most_rows: int = BLOCK_ROWS,
    *,
    within: str | None = None,
) -> list[Block]:
    """The pool's blocks in order: as many shards each as have at most `most_rows` rows together, but at least one.

    Args:
        within: see Block.
    """
    found: list[Block] = []
    group: list[Shard] = []
    first_row = rows = 0

    def close(next_shard: int) -> None:
        nonlocal first_row, rows
        if group:
            first_shard = next_shard - len(group)
            found.append(Block(len(found), pool_path, tuple(group), first_shard, first_row, columns, within))
        first_row, rows = first_row + rows, 0
        group.clear()

    for number, shard in enumerate(shards):
        if group and rows + shard.rows > most_rows:
            close(number)
        group.append(shard)
        rows += shard.rows
    close(len(shards))
    return found
