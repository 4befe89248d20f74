"""Groups of rows whose embeddings are nearly the same, by comparing every row with every other one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.core import exchange
from pipeline.core.passes import Pass, Passes
from stages.duplicates.groups import DuplicateStage, group_columns
from stages.nearest_neighbours import place_in_run
from stages.pool_blocks import Block
from stages.unit_vectors import Vectors, concatenate, float32_error, pieces, read_vectors, unit

PIECE_ROWS = 65_536  # a task compares the rows of two pieces, unless a shard has more
TILE_ROWS = 2048
PAIRS_AT_ONCE = 1_000_000
MOST_PAIRS = 4_000_000  # that wait in memory for the best of each row to be taken: about 100 bytes each


@dataclass(frozen=True)
class EmbeddingDuplicates(DuplicateStage):
    """Groups of rows that are joined by cosines of `threshold` or more, each row with the `top_k` nearest to it.

    Exact: all pairs are compared. A pair counts when one of the two is among the nearest `top_k` others of the other
    one; what is equally near is ranked by uid. So a heap of a million equal vectors is one group, at top_k pairs a row.
    A row without a vector (or with one of zeros) is in no group. Cosines are compared as float32, as strategies do,
    and are the same for any order of rows, size of tiles, or number of threads: see stages/unit_vectors.py.

    Args:
        embedding: a column of vectors: clip_image or clip_text.
        threshold: least cosine of two rows.
        top_k: how many of the nearest others count.

    Meant for up to about a million rows. Cost: for n rows of d dimensions n^2 d operations in float32 (a million of
    512: three hours of a core), the column read n / 65,536 times, at most 36 top_k bytes exchanged for each row and
    piece, though as a rule only for duplicates. Memory of a task: 12 d bytes a row of PIECE_ROWS (0.4 GB at 512), and
    0.4 GB where nearly all rows are alike.
    """

    embedding: str = "clip_image"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.95
    top_k: Annotated[int, Field(ge=1)] = 16

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = group_columns("embedding")

    def compared(self) -> tuple[str, ...]:
        return (self.embedding,)

    def find_edges(self, blocks: Sequence[Block], passes: Passes) -> tuple[list[Pass], dict[str, Any]]:
        parts = pieces(blocks, PIECE_ROWS)
        items = [(one, other, self) for at, one in enumerate(parts) for other in parts[: at + 1]]
        near = passes.run("near", write_near, items)
        edges = passes.run("edges", write_edges, [(near, block.number, self.top_k) for block in parts])
        passes.drop(near)
        return [edges], exchange.read_notes(edges.paths)


def write_near(one: Block, other: Block, stage: EmbeddingDuplicates, path: str) -> None:
    """None; writes (row, other, cosine, high and low of the other's uid) of near pairs of two pieces, by row's piece.

    Of each row, the nearest top_k in the other piece, from the highest cosine on.
    """
    compared = [one] if one.number == other.number else [one, other]
    sides = [concatenate(list(read_vectors(block, stage.embedding))) for block in compared]
    both = concatenate(sides)
    ranks = np.empty(len(both), np.int64)
    by_uid = np.lexsort((both.uid[:, 1], both.uid[:, 0]))
    ranks[by_uid] = np.arange(len(both))
    best = _Best(stage.top_k)
    first = ranks[: len(sides[0])]
    if len(sides) == 1:
        _compare(sides[0], first, None, first, np.float32(stage.threshold), best)
    elif len(sides[0]) and len(sides[1]):
        _compare(sides[0], first, sides[1], ranks[len(first) :], np.float32(stage.threshold), best)
    row, found, cosine = best.taken()
    row, found = by_uid[row], by_uid[found]
    columns = {
        "row": both.row[row],
        "other": both.row[found],
        "cosine": cosine,
        "high": both.uid[found, 0],
        "low": both.uid[found, 1],
    }
    exchange.write(path, columns, np.where(row < len(sides[0]), one.number, other.number))


def _compare(
    left: Vectors,
    left_ranks: np.ndarray,
    right: Vectors | None,
    right_ranks: np.ndarray,
    threshold: np.float32,
    best: _Best,
) -> None:
    """None; `best` has all pairs of one row of each side, or with right = None, all pairs of left."""
    other = left if right is None else right
    if not len(other):
        return
    narrow = np.concatenate(
        [unit(other.vector[at : at + TILE_ROWS]).astype(np.float32) for at in range(0, len(other), TILE_ROWS)]
    )
    least = threshold - np.float32(2 * float32_error(narrow.shape[1]))
    for start in range(0, len(left), TILE_ROWS):
        tile = narrow[start : start + TILE_ROWS] if right is None else None
        if tile is None:
            tile = unit(left.vector[start : start + TILE_ROWS]).astype(np.float32)
        for begin in range(0, start + 1 if right is None else len(other), TILE_ROWS):
            close = tile @ narrow[begin : begin + TILE_ROWS].T >= least
            if right is None and begin == start:
                close &= np.tri(len(tile), k=-1, dtype=bool)
            rows, columns = np.flatnonzero(close.any(axis=1)), np.flatnonzero(close.any(axis=0))
            if not len(rows):
                continue
            exact = unit(left.vector[start + rows]) @ unit(other.vector[begin + columns]).T
            cosines = np.where(close[np.ix_(rows, columns)], exact, -2).astype(np.float32)
            a, b = np.nonzero(cosines >= threshold)
            for at in range(0, len(a), PAIRS_AT_ONCE):
                i, j = a[at : at + PAIRS_AT_ONCE], b[at : at + PAIRS_AT_ONCE]
                best.add(left_ranks[start + rows[i]], right_ranks[begin + columns[j]], cosines[i, j])


class _Best:
    """The pairs with the highest cosines of each row: at most top_k, equal ones by rank."""

    def __init__(self, top_k: int):
        self._top_k = top_k
        self._parts = [(np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32))]
        self._num, self._most = 0, MOST_PAIRS

    def add(self, a: np.ndarray, b: np.ndarray, cosine: np.ndarray) -> None:
        """None; takes in pairs, for both of their rows."""
        self._parts += [(a, b, cosine), (b, a, cosine)]
        self._num += 2 * len(a)
        if self._num > self._most:
            self._parts = [self.taken()]
            self._num = len(self._parts[0][0])
            self._most = max(MOST_PAIRS, 2 * self._num)

    def taken(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(row, other, cosine), by row."""
        row, other, cosine = (np.concatenate(values) for values in zip(*self._parts, strict=True))
        order = np.lexsort((other, -cosine, row))
        row, other, cosine = row[order], other[order], cosine[order]
        kept = place_in_run(row) < self._top_k
        return row[kept], other[kept], cosine[kept]


def write_edges(near: Pass, number: int, top_k: int, path: str) -> None:
    """None; writes (a, b): the piece's rows, and the top_k nearest of all that were near to each."""
    table = exchange.read(near.paths, number)
    if table is None:
        exchange.write(path, {"a": np.empty(0, np.uint64), "b": np.empty(0, np.uint64)}, notes={"pairs": 0})
        return
    row, other, cosine, high, low = (table[name].to_numpy() for name in ("row", "other", "cosine", "high", "low"))
    order = np.lexsort((low, high, -cosine, row))
    kept = order[place_in_run(row[order]) < top_k]
    exchange.write(path, {"a": row[kept], "b": other[kept]}, notes={"pairs": len(kept)})
