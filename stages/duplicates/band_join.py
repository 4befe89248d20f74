"""The LSH join: from signatures and shingle sets to edges between captions that are really alike.

    contents   block by block: what is compared (sets or signatures) of each different caption; copies are set aside
    keys       block by block: a key for each band of each different caption, by group of bands and partition
    then, for one group of bands after the other, so that only its rows are on the move:
    buckets    partition by partition: rows that share a key with another row
    payloads   block by block: what is compared of these rows, sent to their buckets
    verified   partition by partition: edges between rows that are alike (stages.duplicates.verify)

A group is as many bands as have GROUP_ROWS keys together, at least one. Bytes a different caption: 16 a band for its
key; and for each band in which it meets another one 16 and what is compared: 8 a shingle, or 8 a permutation.
Memory: a block's keys of all bands, and PARTITION_ROWS keys or payloads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import exchange
from pipeline.core.errors import WinnowError
from pipeline.core.passes import Pass, Passes
from stages.duplicates.bands import band_keys
from stages.duplicates.shingles import Shingling, shingle_sets
from stages.duplicates.verify import digests, joined_pairs
from stages.pool_blocks import Block

GROUP_ROWS = 4_000_000
PARTITION_ROWS = 1_000_000


@dataclass(frozen=True)
class BandJoin:
    """What is joined, and how.

    Args:
        signatures: the column of signatures, little-endian uint32.
        shingling: how captions become sets, for the exact Jaccard; None: the signatures' agreement is compared.
    """

    signatures: str
    shingling: Shingling | None
    threshold: float
    bands: int
    rows: int


def edges(blocks: Sequence[Block], passes: Passes, join: BandJoin) -> tuple[list[Pass], dict[str, Any]]:
    """The passes of (a, b), and {candidates, compared, cut_buckets, ...} of the join."""
    total = sum(block.rows for block in blocks)
    bands_at_once = max(1, min(join.bands, GROUP_ROWS // max(1, total)))
    num_partitions = max(1, -(-total * bands_at_once // PARTITION_ROWS))
    starts = np.array([block.first_row for block in blocks], dtype=np.uint64)
    contents = passes.run("contents", write_contents, [(block, join) for block in blocks])
    copies = passes.run("copies", write_copies, [(path,) for path in contents.paths])
    keys = passes.run("keys", write_keys, [(block, join, contents, bands_at_once, num_partitions) for block in blocks])
    found = [copies]
    for group in range(-(-join.bands // bands_at_once)):
        parts = [group * num_partitions + number for number in range(num_partitions)]
        buckets = passes.run(f"buckets{group}", write_buckets, [(keys, part, starts) for part in parts])
        payloads = passes.run(f"payloads{group}", write_payloads, [(block, contents, buckets) for block in blocks])
        items = [(payloads, number, join) for number in range(num_partitions)]
        found.append(passes.run(f"verified{group}", write_verified, items))
        passes.drop(buckets, payloads)
    passes.drop(contents, keys)
    counts = exchange.read_notes([path for made in found[1:] for path in made.paths])
    return found, {"different_captions": exchange.read_notes(copies.paths)["different"], **counts}


def _signatures(column: pa.ChunkedArray, place: str) -> np.ndarray:
    """[n, P] uint32 of a column of signatures without nulls."""
    parts = []
    for chunk in column.chunks:
        offsets = np.frombuffer(chunk.buffers()[1], dtype=np.int32)[chunk.offset : chunk.offset + len(chunk) + 1]
        size_bytes = int(offsets[1] - offsets[0]) if len(chunk) else 0
        if chunk.null_count or (np.diff(offsets) != size_bytes).any():
            raise WinnowError(
                f"{place}: signatures are missing or of several lengths, expected {size_bytes} bytes each"
            )
        if len(chunk):
            data = np.frombuffer(chunk.buffers()[2], "<u4", count=len(chunk) * size_bytes // 4, offset=int(offsets[0]))
            parts.append(data.reshape(len(chunk), -1))
    return np.concatenate(parts) if parts else np.empty((0, 1), dtype=np.uint32)


def write_contents(block: Block, join: BandJoin, path: str) -> None:
    """None; writes (row, content) of each different caption of the block in partition 0, (row, first row with the same
    content) of the others in partition 1."""
    rows, offsets, values, num_values = [], [np.zeros(1, np.int64)], [], 0
    start = block.first_row
    for shard in block.shards:
        table = block.table(shard, ["ok", "caption" if join.shingling else join.signatures])
        ok = np.flatnonzero(table["ok"].to_numpy())
        taken = table.column(1).filter(table["ok"])
        if join.shingling:
            shard_offsets, shard_values = shingle_sets(taken.combine_chunks(), join.shingling)
        else:
            signatures = _signatures(taken, f"pool shard {shard.name}")
            shard_offsets = np.arange(len(signatures) + 1, dtype=np.int64) * signatures.shape[1]
            shard_values = signatures.reshape(-1).astype(np.uint64)
        rows.append(ok.astype(np.uint64) + np.uint64(start))
        offsets.append(shard_offsets[1:] + num_values)
        values.append(shard_values)
        num_values += len(shard_values)
        start += shard.rows
    row, offset, value = np.concatenate(rows), np.concatenate(offsets), np.concatenate(values)
    first = _first_equal(offset, value)
    own = first == np.arange(len(row))
    content = pa.LargeListArray.from_arrays(pa.array(offset), pa.array(value))
    order = np.argsort(~own, kind="stable")
    nothing = pa.nulls(int((~own).sum()), content.type)
    exchange.write(
        path,
        {
            "row": row[order],
            "first": row[first][order],
            "content": pa.chunked_array([content.take(np.flatnonzero(own)), nothing]),
        },
        (~own)[order].astype(np.int64),
    )


def _first_equal(offsets: np.ndarray, values: np.ndarray) -> np.ndarray:
    """[n] int64: for each entry the first one with the same values."""
    digest = digests(offsets, values)
    order = np.argsort(digest, kind="stable")
    new = np.ones(len(order), dtype=bool)
    new[1:] = digest[order][1:] != digest[order][:-1]
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[np.maximum.accumulate(np.where(new, np.arange(len(order)), 0))]
    return first


def write_copies(contents_path: str, path: str) -> None:
    """None; writes (a, b) of the block's rows and the first one with the same content."""
    rows = exchange.read([contents_path], 1)
    nothing = np.empty(0, np.uint64)
    a, b = (nothing, nothing) if rows is None else (rows["first"].to_numpy(), rows["row"].to_numpy())
    different = exchange.read([contents_path], 0)
    exchange.write(path, {"a": a, "b": b}, notes={"different": 0 if different is None else different.num_rows})


def write_keys(
    block: Block, join: BandJoin, contents: Pass, bands_at_once: int, num_partitions: int, path: str
) -> None:
    """None; writes (key, row) for each band of the block's different captions, by group of bands and partition."""
    found = exchange.read([contents.path(block.number)], 0)
    row = np.empty(0, np.uint64) if found is None else found["row"].to_numpy()
    if found is not None and join.shingling:  # an empty set is like no other
        row = row[pc.list_value_length(found["content"]).to_numpy() > 0]
    columns: list[list[np.ndarray]] = [[] for _ in range(-(-join.bands // bands_at_once))]
    start = block.first_row
    for shard in block.shards:
        wanted = row[np.searchsorted(row, start) : np.searchsorted(row, start + shard.rows)] - np.uint64(start)
        if len(wanted):
            chosen = np.zeros(shard.rows, dtype=bool)
            chosen[wanted] = True
            column = block.table(shard, [join.signatures])[join.signatures].filter(pa.array(chosen))
            signatures = _signatures(column, f"pool shard {shard.name}")
            for group, keys in enumerate(columns):
                first = group * bands_at_once
                keys.append(band_keys(signatures, first, min(bands_at_once, join.bands - first), join.rows))
        start += shard.rows
    key, rows, part = [], [], []
    for group, keys in enumerate(columns):
        group_keys = np.concatenate(keys, axis=1).reshape(-1) if keys else np.empty(0, np.uint64)
        parts = exchange.by_hash(group_keys, num_partitions)
        order = np.argsort(parts.astype(np.uint16 if num_partitions < 1 << 16 else np.int64), kind="stable")
        key.append(group_keys[order])
        rows.append(np.tile(row, len(group_keys) // max(1, len(row)))[order])
        part.append(parts[order] + group * num_partitions)
    exchange.write(path, {"key": np.concatenate(key), "row": np.concatenate(rows)}, np.concatenate(part))


def write_buckets(keys: Pass, part: int, block_starts: np.ndarray, path: str) -> None:
    """None; writes (bucket, row) of the rows that share their key with another row, by block."""
    found = exchange.read(keys.paths, part)
    bucket, row = np.empty(0, np.int64), np.empty(0, np.uint64)
    if found is not None:
        key, row = found["key"].to_numpy(), found["row"].to_numpy()
        order = np.argsort(key)  # rows of a bucket in any order: they are sorted when they are compared
        key, row = key[order], row[order]
        new = np.ones(len(key), dtype=bool)
        new[1:] = key[1:] != key[:-1]
        number = np.cumsum(new) - 1
        shared = np.bincount(number)[number] > 1
        bucket, row = number[shared], row[shared]
    exchange.write(path, {"bucket": bucket, "row": row}, np.searchsorted(block_starts, row, side="right") - 1)


def write_payloads(block: Block, contents: Pass, buckets: Pass, path: str) -> None:
    """None; writes (bucket, row, content) of the block's rows that are in a bucket, by the buckets' partition."""
    found = exchange.read([contents.path(block.number)], 0)
    columns, parts = [], []
    for number in range(buckets.num_files):
        wanted = exchange.read([buckets.path(number)], block.number)
        if wanted is not None and found is not None:
            places = np.searchsorted(found["row"].to_numpy(), wanted["row"].to_numpy())
            columns.append(wanted.append_column("content", found["content"].take(pa.array(places))))
            parts.append(np.full(wanted.num_rows, number))
    if not columns:
        exchange.write(path, {"bucket": np.empty(0, np.int64)})
        return
    table = pa.concat_tables(columns)
    exchange.write(path, dict(zip(table.column_names, table.columns, strict=True)), np.concatenate(parts))


def write_verified(payloads: Pass, number: int, join: BandJoin, path: str) -> None:
    """None; writes (a, b) of rows in the partition's buckets that are alike."""
    found = exchange.read(payloads.paths, number)
    a = b = np.empty(0, np.uint64)
    counts = {"compared": 0, "cut_buckets": 0}
    if found is not None:
        content = found["content"].combine_chunks()
        content = content if isinstance(content, pa.Array) else pa.concat_arrays(content.chunks)
        offsets = content.offsets.to_numpy()
        a, b, counts = joined_pairs(
            found["bucket"].to_numpy(),
            found["row"].to_numpy(),
            offsets - offsets[0],
            content.flatten().to_numpy(),
            join.threshold,
            join.shingling is not None,
        )
    exchange.write(path, {"a": a, "b": b}, notes={**counts, "met": 0 if found is None else found.num_rows})
