"""Vectors of a pool's rows (embeddings), and cosines of them that are the same however they are computed.

A cosine here is the product of two unit vectors whose values are whole multiples of 2^-26. Every product is then a
multiple of 2^-52, and no sum of some of them exceeds 2: float64 adds them without rounding. So a cosine has the same
bits in any tile, in any order of rows, with any number of threads and with any BLAS. Rounding to such multiples costs
about 1e-8, less than a float32 can tell. Two equal vectors have a cosine of exactly 1 in float32, and none has more.

What is large is screened in float32 first: `float32_error` bounds how far such a cosine can be off, whatever the order
of its sum, so what lies further from a decision than that needs no second look.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from pipeline.core.errors import WinnowError
from stages.pool_blocks import Block
from stages.selection import uids

GRID = 2.0**26
CACHED_ROWS = 128  # that `unit` works on at once


def unit(vectors: np.ndarray) -> np.ndarray:
    """[n, d] float64, the vectors at length 1 (its square within 2^-26), with values that are multiples of 2^-26.

    Args:
        vectors: [n, d] finite, none of length 0.
    """
    found = np.empty(vectors.shape)
    for start in range(0, len(found), CACHED_ROWS):
        wide = found[start : start + CACHED_ROWS]
        wide[:] = vectors[start : start + CACHED_ROWS]
        wide *= GRID / np.sqrt(np.einsum("ij,ij->i", wide, wide))[:, None]
        np.rint(wide, out=wide)
        wide *= 1 / GRID
        largest = np.arange(len(wide)), np.abs(wide).argmax(axis=1)
        missing = 1 - np.einsum("ij,ij->i", wide, wide)  # of the squared length, by the rounding
        wide[largest] += np.rint(missing * GRID / (2 * wide[largest])) / GRID
    return found


def float32_error(num_dimensions: int) -> float:
    """The most by which a cosine in float32 of `unit` vectors can be off."""
    return (num_dimensions + 4) * 2.0**-24


@dataclass(frozen=True)
class Vectors:
    """Rows of a pool with a vector: `row` [n] uint64 in the pool, `uid` [n, 2] uint64, `vector` [n, d] float16."""

    row: np.ndarray
    uid: np.ndarray
    vector: np.ndarray

    def __len__(self) -> int:
        return len(self.row)

    def take(self, places: np.ndarray) -> Vectors:
        """The rows at these places."""
        return Vectors(self.row[places], self.uid[places], self.vector[places])

    def columns(self) -> dict[str, np.ndarray]:
        """(row, high, low): the rows' numbers and uids as pipeline.core.exchange takes them."""
        return {"row": self.row, "high": self.uid[:, 0], "low": self.uid[:, 1]}


def concatenate(parts: Sequence[Vectors]) -> Vectors:
    """All rows of the parts; of no dimension where there is none. Raises WinnowError where vectors differ in length."""
    parts = [part for part in parts if len(part)]
    lengths = sorted({part.vector.shape[1] for part in parts})
    if len(lengths) > 1:
        raise WinnowError(f"vectors of {lengths[0]} to {lengths[-1]} values in one column, expected one length")
    if not parts:
        return Vectors(np.empty(0, np.uint64), np.empty((0, 2), np.uint64), np.empty((0, 0), np.float16))
    return Vectors(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("row", "uid", "vector")))


def read_vectors(block: Block, column: str) -> Iterator[Vectors]:
    """The rows of each shard that are ok and have a vector: one that is finite and not all zeros.

    Raises:
        WinnowError: the column is not float16[], or its vectors differ in length.
    """
    start = block.first_row
    for shard in block.shards:
        place = f"pool shard {shard.name}, column {column}"
        table = block.table(shard, ["uid", "ok", column])
        if not (pa.types.is_list(table.schema.field(column).type) and table[column].type.value_type == pa.float16()):
            raise WinnowError(f"{place}: {table[column].type}, expected vectors (float16[])")
        row = np.flatnonzero(np.asarray(table["ok"].combine_chunks()) & np.asarray(table[column].is_valid()))
        table = table.take(row)
        vectors = _lists(table[column], place)
        length = np.einsum("ij,ij->i", vectors, vectors, dtype=np.float64, casting="safe")
        usable = np.isfinite(length) & (length > 0)
        uid = uids.parse(table["uid"], f"pool shard {shard.name}")
        yield Vectors((row + start).astype(np.uint64)[usable], uid[usable], vectors[usable])
        start += shard.rows


def _lists(column: pa.ChunkedArray, place: str) -> np.ndarray:
    """[n, d] float16 of lists without nulls."""
    if not len(column):
        return np.empty((0, 0), np.float16)
    whole = column.combine_chunks()
    lists = whole if isinstance(whole, pa.Array) else pa.concat_arrays(whole.chunks)
    lengths = np.diff(lists.offsets.to_numpy())
    if (lengths != lengths[0]).any():
        raise WinnowError(f"{place}: vectors of {lengths.min()} to {lengths.max()} values, expected one length")
    values = lists.flatten()
    if values.null_count:
        raise WinnowError(f"{place}: a vector with a null in it, expected numbers")
    return values.to_numpy(zero_copy_only=False).reshape(len(lists), int(lengths[0]))


def pieces(blocks: Sequence[Block], most_rows: int) -> list[Block]:
    """The blocks cut into smaller ones, of as many shards each as have at most `most_rows` rows, but at least one."""
    found: list[Block] = []
    for block in blocks:
        first_row, group = block.first_row, []
        for number, shard in enumerate(block.shards, block.first_shard):
            group.append(shard)
            rows = sum(one.rows for one in group)
            last = number + 1 - block.first_shard == len(block.shards)
            if last or rows + block.shards[number + 1 - block.first_shard].rows > most_rows:
                first_shard = number + 1 - len(group)
                found.append(
                    replace(block, number=len(found), shards=tuple(group), first_shard=first_shard, first_row=first_row)
                )
                first_row, group = first_row + rows, []
    return found


def packed(vectors: np.ndarray) -> pa.Array:
    """The vectors as an Arrow column for pipeline.core.exchange; `unpacked` gives them back."""
    data = np.ascontiguousarray(vectors)
    width = data.shape[1] * data.itemsize
    return pa.Array.from_buffers(pa.binary(width), len(data), [None, pa.py_buffer(data)])


def unpacked(column: pa.ChunkedArray, dtype: type = np.float16) -> np.ndarray:
    """[n, d] of a column that `packed` made, of one chunk: a view of its memory."""
    array = column.chunk(0)
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8, len(array) * width, array.offset * width)
    return data.view(dtype).reshape(len(array), -1)


class Gathered:
    """Vectors in several arrays, mapped from files, as if in one."""

    def __init__(self, parts: Sequence[np.ndarray]):
        self._parts = parts
        self._starts = np.cumsum([0, *(len(part) for part in parts[:-1])])

    def take(self, places: np.ndarray) -> np.ndarray:
        """[n, d] the vectors at these places."""
        found = np.empty((len(places), self._parts[0].shape[1]), self._parts[0].dtype)
        where = np.searchsorted(self._starts, places, side="right") - 1
        for number in np.unique(where):
            own = np.flatnonzero(where == number)
            found[own] = self._parts[number][places[own] - self._starts[number]]
        return found
