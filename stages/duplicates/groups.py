"""From edges between rows to columns: which group of duplicates a row is in, how large it is, and who survives.

What every stage of duplicates shares. A subclass finds the edges; groups are their connected components. The survivor
of a group is its row with the highest value of `keep`, rows without a value last, and among equals the one with the
lowest uid: never the one that came first, so it is the same whatever the order of shards or of completion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.core import exchange
from pipeline.core.errors import ConfigError
from pipeline.core.passes import Pass, Passes
from stages.base import Batch, Stage
from stages.duplicates.components import components
from stages.pool_blocks import Block
from stages.selection import uids
from stages.shard_values import SHARDS, FittedStage, shard_names, shard_starts, write_by_shard

GROUPS = "groups"  # the pass that load() reads
PARTITION_ROWS = 4_000_000  # rows with duplicates that are put in order in memory at once: about 100 bytes each


def group_columns(prefix: str) -> dict[str, str]:
    """{column: type} of the columns that a stage of duplicates adds."""
    return {
        f"{prefix}_group": "string",
        f"{prefix}_group_size": "int32",
        f"{prefix}_is_duplicate": "bool",
        f"{prefix}_survivor": "string",
    }


@dataclass(frozen=True)
class DuplicateStage(FittedStage):
    """Four columns: group (the lowest uid in it), group size, whether the row is a duplicate, and the survivor's uid.

    A row without duplicates has no group and no survivor, and size 1. Nothing is ever deleted: a strategy says
    `where: [..._is_duplicate == false]`.
    """

    keep: str = ""  # the numeric column whose highest value survives; empty: the lowest uid does

    found_in: ClassVar[str] = GROUPS
    found_types: ClassVar[Mapping[str, pa.DataType]] = {
        "group": pa.string(),
        "size": pa.int32(),
        "is_duplicate": pa.bool_(),
        "survivor": pa.string(),
    }

    def find_edges(self, blocks: Sequence[Block], passes: Passes) -> tuple[list[Pass], dict[str, Any]]:
        """Passes of (a, b), uint64 numbers of rows that are duplicates of each other; and facts about them."""
        raise NotImplementedError

    def compared(self) -> tuple[str, ...]:
        """The columns that find_edges reads."""
        raise NotImplementedError

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.compared(), *([self.keep] if self.keep else []))

    def check_needs(self, types: Mapping[str, str], owners: Mapping[str, Stage]) -> None:
        if self.keep and types[self.keep] not in ("int32", "int64", "float32"):
            raise ConfigError(f"keep = {self.keep}, expected a column of numbers, found {types[self.keep]}")

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        work = passes.work()
        edges, facts = self.find_edges(blocks, work)
        block_starts = np.array([block.first_row for block in blocks], dtype=np.uint64)
        labels, rounds = components(edges, work.within("components"), block_starts)
        num_partitions = max(1, -(-exchange.num_rows(labels.paths) // PARTITION_ROWS))
        members = work.run("members", write_members, [(block, labels, self.keep, num_partitions) for block in blocks])
        starts = shard_starts(blocks)
        groups = passes.run(GROUPS, write_groups, [(members, number, starts) for number in range(num_partitions)])
        return {**facts, **exchange.read_notes(groups.paths), "component_rounds": rounds, SHARDS: shard_names(blocks)}

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        found = state.of(batch)
        columns = (
            found["group"],
            found["size"].fill_null(1),
            found["is_duplicate"].fill_null(False),
            found["survivor"],
        )
        return dict(zip(self.adds, columns, strict=True))


def write_members(block: Block, labels: Pass, keep: str, num_partitions: int, path: str) -> None:
    """None; writes (row, label, uid, value to keep by) of the block's rows that are in a group, by group."""
    found = exchange.read(labels.paths, block.number)
    row = label = np.empty(0, np.uint64)
    if found is not None:
        row, first = np.unique(found["row"].to_numpy(), return_index=True)
        label = found["label"].to_numpy()[first]
    ids, values = [np.empty((0, 2), np.uint64)], [np.empty(0)]
    start = block.first_row
    for shard in block.shards:
        wanted = row[np.searchsorted(row, start) : np.searchsorted(row, start + shard.rows)] - np.uint64(start)
        if len(wanted):
            table = block.table(shard, ["uid", *([keep] if keep else [])]).take(wanted)
            ids.append(uids.parse(table["uid"], f"pool shard {shard.name}"))
            values.append(_numbers(table[keep]) if keep else np.zeros(len(wanted)))
        start += shard.rows
    uid = np.concatenate(ids)
    columns = {"row": row, "label": label, "high": uid[:, 0], "low": uid[:, 1], "value": np.concatenate(values)}
    exchange.write(path, columns, exchange.by_hash(uids.mix(label), num_partitions))


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """[n] float64; NaN where there is no value."""
    return column.cast(pa.float64()).to_numpy(zero_copy_only=False)


def write_groups(members: Pass, partition: int, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, group, size, is_duplicate, survivor) of the partition's groups, by shard.

    Args:
        starts: see stages.shard_values.shard_starts.
    """
    table = exchange.read(members.paths, partition)
    if table is None:
        exchange.write(path, {}, notes={"groups": 0, "duplicates": 0})
        return
    row, label, high, low, value = (table[name].to_numpy() for name in ("row", "label", "high", "low", "value"))
    order = np.lexsort((low, high, np.where(np.isnan(value), np.inf, -value), label))
    row, label, uid = row[order], label[order], np.stack([high[order], low[order]], axis=1)
    heads = np.flatnonzero(np.diff(label, prepend=~label[:1]))
    sizes = np.diff(heads, append=len(label))
    survivor = np.repeat(uid[heads], sizes, axis=0)
    by_uid = np.lexsort((low, high, table["label"].to_numpy()))  # the same groups at the same places
    lowest = np.repeat(np.stack([high, low], axis=1)[by_uid][heads], sizes, axis=0)
    duplicate = np.ones(len(row), dtype=bool)
    duplicate[heads] = False
    columns = {
        "group": uids.text(lowest),
        "size": np.repeat(sizes, sizes).astype(np.int32),
        "is_duplicate": duplicate,
        "survivor": uids.text(survivor),
    }
    write_by_shard(path, row, columns, starts, {"groups": len(heads), "duplicates": int(duplicate.sum())})
