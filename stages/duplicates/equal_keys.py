"""The equality join: from a column of hashes to edges between the rows that have the same one.

    keys    block by block: (key, row) of the first row that has it, by partition; the block's other rows are set aside
    copies  block by block: edges from these other rows to the first one
    stars   partition by partition: edges from a key's lowest row to the first rows of other blocks

So a key that a million rows share costs a million edges, and a partition no more than one row a block of it. Bytes a
row: 8 and 8 a word of its key, once. Memory: a block's keys, and PARTITION_ROWS of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import exchange
from pipeline.core.passes import Pass, Passes
from stages.pool_blocks import Block
from stages.selection import uids

PARTITION_ROWS = 2_000_000  # about 100 bytes each while they are sorted


def num_partitions(blocks: Sequence[Block]) -> int:
    """How many partitions the keys of these blocks are in."""
    return max(1, -(-sum(block.rows for block in blocks) // PARTITION_ROWS))


def edges(
    blocks: Sequence[Block], passes: Passes, column: str, num_words: int
) -> tuple[list[Pass], dict[str, int], Pass]:
    """(passes of (a, b), {rows, different} with a key, the pass of keys, which the caller drops).

    Args:
        column: of hex digits, null where a row is like no other.
        num_words: 1 or 2: how many times 16 digits are compared, from the first on.
    """
    parts = num_partitions(blocks)
    keys = passes.run(f"{column}_keys", write_keys, [(block, column, num_words, parts) for block in blocks])
    return *joined(passes, column, keys, parts), keys


def joined(passes: Passes, name: str, keys: Pass, parts: int) -> tuple[list[Pass], dict[str, int]]:
    """(passes of (a, b), {rows, different} with a key) of what write_by_key wrote for each block."""
    copies = passes.run(f"{name}_copies", write_copies, [(path, parts) for path in keys.paths])
    stars = passes.run(f"{name}_stars", write_stars, [(keys, number) for number in range(parts)])
    return [copies, stars], exchange.read_notes([*copies.paths, *stars.paths])


def write_keys(block: Block, column: str, num_words: int, parts: int, path: str) -> None:
    """None; writes the keys of the block's ok rows: see write_by_key."""
    keys, rows = [np.empty((0, num_words), np.uint64)], [np.empty(0, np.uint64)]
    start = block.first_row
    for shard in block.shards:
        table = block.table(shard, ["ok", column])
        known = np.flatnonzero(pc.and_(table["ok"], table[column].is_valid()).to_numpy())
        digits = pc.utf8_slice_codeunits(table[column].take(known), 0, 16 * num_words)
        keys.append(uids.parse(pc.utf8_rpad(digits, 32, "0"), f"{column} of pool shard {shard.name}")[:, :num_words])
        rows.append(known.astype(np.uint64) + np.uint64(start))
        start += shard.rows
    write_by_key(path, np.concatenate(keys), np.concatenate(rows), parts)


def write_by_key(path: str, key: np.ndarray, row: np.ndarray, parts: int) -> None:
    """None; writes (key, row) of the first row with each key, by key. In one more partition are the other rows, with
    the first row in place of the key.

    Args:
        key: [n, words] uint64 of rows of one block.
        row: [n] uint64, ascending.
        parts: see num_partitions.
    """
    key, row, first = _by_key(key, row)
    head = row == first
    words = [np.concatenate([word[head], first[~head]]) for word in key.T]
    partitions = np.full(len(row), parts)
    partitions[: head.sum()] = exchange.by_hash(uids.mix(key[head, 0]), parts)
    columns = {f"key{number}": word for number, word in enumerate(words)}
    exchange.write(path, {**columns, "row": np.concatenate([row[head], row[~head]])}, partitions)


def _by_key(key: np.ndarray, row: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(key, row, first) by key, then as they came: `first` is the first row that has the entry's key."""
    order = np.lexsort(key.T[::-1])
    key, row = key[order], row[order]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (key[1:] != key[:-1]).any(axis=1)
    return key, row, row[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]


def write_copies(keys_path: str, parts: int, path: str) -> None:
    """None; writes (a, b) of the first row with a key and each other one of the block."""
    rows = exchange.read([keys_path], parts)
    nothing = pa.array([], pa.uint64())
    a, b = (nothing, nothing) if rows is None else (rows["key0"], rows["row"])
    exchange.write(path, {"a": a, "b": b}, notes={"rows": len(a)})


def keyed_rows(keys: Pass, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(key [n, words], row, first): of one partition, by key; `first` is the lowest row with the entry's key."""
    rows = exchange.read(keys.paths, number)
    if rows is None:
        return np.empty((0, 1), np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint64)
    key = np.stack([rows[name].to_numpy() for name in rows.column_names if name != "row"], axis=1)
    return _by_key(key, rows["row"].to_numpy())  # as files come in the order of blocks, rows of a key ascend


def write_stars(keys: Pass, number: int, path: str) -> None:
    """None; writes (a, b) of each key's lowest row and its rows in other blocks."""
    _, row, first = keyed_rows(keys, number)
    leaf = row != first
    notes = {"rows": len(row), "different": len(row) - int(leaf.sum())}
    exchange.write(path, {"a": first[leaf], "b": row[leaf]}, notes=notes)
