"""How often the pool has a caption: boilerplate ("image", a shop's slogan) stands beside many pictures.

    keys     block by block: (hash, first row that has it, how many do) by partition; and of each row, the first one
    totals   partition by partition: (first row, how many rows of the pool have its caption), by block
    counts   block by block: (row, how many), by shard

So a caption that a million rows share costs a partition no more than one entry a block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa

from pipeline.core import exchange
from pipeline.core.passes import Pass, Passes
from stages.duplicates import equal_keys
from stages.pool_blocks import Block
from stages.selection import uids
from stages.shard_values import SHARDS, FittedStage, shard_names, shard_starts, write_by_shard

COUNTS = "counts"  # the pass that load() reads


@dataclass(frozen=True)
class CaptionFrequency(FittedStage):
    """How many ok rows of the pool, the row itself included, have its caption.

    Captions are the same when they are in NFKC form, case folded, with blanks collapsed: what the stage hashes takes
    `caption_sha256` of, and caption_duplicates compares. They are told apart by 128 bits of that hash.

    Cost: captions read once, about ten microseconds a row in all; at most 64 bytes a row exchanged once, 16 more by
    block and 16 by shard. Memory of a task: about 300 bytes a row of a block (300 MB), or 100 a row of a partition of
    2 million captions.
    """

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = {"caption_count": "int64"}
    found_in: ClassVar[str] = COUNTS
    found_types: ClassVar[Mapping[str, pa.DataType]] = {"count": pa.int64()}

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """Numbers of ok rows and of different captions; a file of counts for each block."""
        work = passes.work()
        parts = equal_keys.num_partitions(blocks)
        first_rows = np.array([block.first_row for block in blocks], dtype=np.uint64)
        keys = work.run("keys", write_keys, [(block, parts) for block in blocks])
        totals = work.run("totals", write_totals, [(keys, number, first_rows) for number in range(parts)])
        starts = shard_starts(blocks)
        items = [(keys.path(number), parts, totals, number, starts) for number in range(len(blocks))]
        passes.run(COUNTS, write_counts, items)
        return {**exchange.read_notes([*keys.paths, *totals.paths]), SHARDS: shard_names(blocks)}


def write_keys(block: Block, parts: int, path: str) -> None:
    """None; writes (key0, key1, row, count) of the block's different captions by key, and in one more partition each
    row, with the first row of its caption in place of a key."""
    from stages.duplicates.shingles import normalised

    hashes, rows = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint64)]
    start = block.first_row
    for shard in block.shards:
        table = block.table(shard, ["ok", "caption"])
        known = np.flatnonzero(table["ok"].to_numpy())
        texts = normalised(table["caption"].take(known).combine_chunks())
        digests = b"".join(hashlib.sha256(text.as_buffer()).digest()[:16] for text in texts)
        hashes.append(np.frombuffer(digests, ">u8").reshape(-1, 2).astype(np.uint64))
        rows.append(known.astype(np.uint64) + np.uint64(start))
        start += shard.rows
    key, row = np.concatenate(hashes), np.concatenate(rows)
    order = np.lexsort(key.T[::-1])
    key, row = key[order], row[order]
    heads, counts = _runs(key)
    columns = {
        "key0": np.concatenate([key[heads, 0], np.repeat(row[heads], counts)]),
        "key1": np.concatenate([key[heads, 1], np.zeros(len(row), np.uint64)]),
        "row": np.concatenate([row[heads], row]),
        "count": np.concatenate([counts, np.zeros(len(row), np.int64)]),
    }
    partitions = np.full(len(heads) + len(row), parts)
    partitions[: len(heads)] = exchange.by_hash(uids.mix(key[heads, 0]), parts)
    exchange.write(path, columns, partitions, {"rows": len(row)})


def write_totals(keys: Pass, number: int, first_rows: np.ndarray, path: str) -> None:
    """None; writes (first row of a block that has a caption, how many rows of the pool have it), by block."""
    rows = exchange.read(keys.paths, number)
    if rows is None:
        exchange.write(path, {}, notes={"captions": 0})
        return
    key = np.stack([rows["key0"].to_numpy(), rows["key1"].to_numpy()], axis=1)
    order = np.lexsort(key.T[::-1])
    heads, counts = _runs(key[order])
    total = np.empty(len(order), np.int64)
    total[order] = np.repeat(np.add.reduceat(rows["count"].to_numpy()[order], heads), counts)
    row = rows["row"].to_numpy()
    block = np.searchsorted(first_rows, row, side="right") - 1
    exchange.write(path, {"row": row, "total": total}, block, {"captions": len(heads)})


def write_counts(keys_path: str, parts: int, totals: Pass, number: int, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, count) of the block's rows, by shard.

    Args:
        keys_path: what write_keys wrote for the block.
        number: the block's.
        starts: see stages.shard_values.shard_starts.
    """
    rows = exchange.read([keys_path], parts)
    found = exchange.read(totals.paths, number)
    if rows is None or found is None:
        exchange.write(path, {})
        return
    order = np.argsort(found["row"].to_numpy())
    places = np.searchsorted(found["row"].to_numpy()[order], rows["key0"].to_numpy())
    count = found["total"].to_numpy()[order][places]
    write_by_shard(path, rows["row"].to_numpy(), {"count": count}, starts)


def _runs(key: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(where each run of equal keys starts, its length) of sorted [n, 2] keys."""
    new = np.ones(len(key), dtype=bool)
    new[1:] = (key[1:] != key[:-1]).any(axis=1)
    heads = np.flatnonzero(new)
    return heads, np.diff(np.append(heads, len(key)))
