"""D2 pruning: rows that are good and unlike those picked before, by messages on a graph of nearest neighbours.

Maharana, Yadav and Bansal, "D2 Pruning: Message Passing for Balancing Diversity and Difficulty in Data Pruning", 2023
(arXiv 2310.07931); its constants for DataComp are those of its authors' code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.core import exchange
from pipeline.core.errors import ConfigError
from pipeline.core.passes import Pass, Passes
from stages.base import Stage
from stages.compiled import Compiled
from stages.nearest_neighbours import Search, find_neighbours
from stages.pool_blocks import Block
from stages.row_scores import NUMBERS, VECTORS, check_type
from stages.shard_values import FOUND, SHARDS, FittedStage, shard_names, shard_starts, write_by_shard

LEAST_SCORE = 1e-7  # of a shifted score, as in the authors' code


@dataclass(frozen=True)
class D2(FittedStage):
    """How many rows D2 picks after this one: `top: {column: d2_score, fraction: 0.3}` is D2 pruning at 30 %.

    s = max(score + shift, 1e-7); NN(i) are the nearest other rows of row i by the squared distance d, the sum of
    2 - 2 cosine over the embeddings. At first u_i = s_i + sum of exp(-gamma_forward d_ij) s_j over j in NN(i). Then,
    until no row is left, the row with the largest u is picked, of equal ones that of the lowest uid, and
    exp(-gamma_reverse d_ij) u_i is taken from u_j of each j in NN(i). The order of picks does not depend on how many
    are kept, so one column serves all fractions. Null for rows without a finite score or a vector in every embedding.

    Where this differs from the authors' code: a row is left out of its own neighbours by its number, not as the first
    one found, which with duplicates may be another row. Neighbours are not those of a product quantiser of 16 bytes:
    up to 100,000 rows they are exact, beyond that see stages/nearest_neighbours.py. And the largest u is the largest:
    the authors' code goes through the rows in their first order, sets one aside when its u fell below that of the next
    row alone, and picks it again as soon as it has at least the u of the next row in line. So it hardly uses what was
    taken away: at 30 % it keeps, but for a few rows in a thousand, those of the largest u at first
    (benchmarks/d2.py). `gamma_reverse: 1.0e+9`, which takes from equal rows alone, comes nearest to it.

    Args:
        embeddings: columns of vectors of one length; [clip_image] is the published D2 (image), both D2 (image + text).
        score: the column that says how good a row is.
        shift: makes scores positive; published: 0.115 for the CLIP score of L/14.
        neighbours: k; published: 1 for DataComp.
        gamma_forward, gamma_reverse: how fast messages fade with distance; published: 1 for DataComp.
        probes: clusters that a row looks into for its neighbours, in a pool of more than 100,000 rows.
        seed: of the sample that those clusters come from.

    Cost: for n rows and vectors of d dimensions in all, up to 100,000 rows n^2 d multiplications in float32. Beyond
    that 2 d n sqrt(probes n), half to deal the rows to clusters and half to search, and k-means of at most 131,072
    rows, each of its ten rounds one task: at d = 1536 about a quarter of an hour of a core for a million rows, five
    hours for 12.8 million; more where a cluster holds many near copies, as it is searched in the square of its size.
    The columns are read three times; a row's vector (2 d bytes) is exchanged once for each partition of 500,000 rows
    that it looks into, mostly one or two. Memory of a task: 12 d bytes a row of 50,000 and a cluster. The picks are one
    task: 130 + 60 neighbours bytes a row, and 3 microseconds (12.8 million: 40 s and 2.4 GB).
    """

    embeddings: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] = ("clip_image", "clip_text")
    score: str = "clip_score"
    shift: Annotated[float, Field(allow_inf_nan=False)] = 0.115
    neighbours: Annotated[int, Field(ge=1, le=1000)] = 1
    gamma_forward: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    gamma_reverse: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 1.0
    probes: Annotated[int, Field(ge=1, le=1000)] = 8
    seed: Annotated[int, Field(ge=0)] = 0

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = {"d2_score": "int64"}
    found_types: ClassVar[Mapping[str, pa.DataType]] = {"score": pa.int64()}

    def __post_init__(self) -> None:
        if len(set(self.embeddings)) < len(self.embeddings):
            raise ConfigError(f"d2.embeddings = {list(self.embeddings)}, expected each column once")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.embeddings, self.score)

    def check_needs(self, types: Mapping[str, str], owners: Mapping[str, Stage]) -> None:
        for column in self.embeddings:
            check_type("embeddings", column, types[column], (VECTORS,))
        check_type("score", self.score, types[self.score], NUMBERS)

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """Counts of points, clusters and sampled points; a file of the picks."""
        search = Search(self.embeddings, self.score, self.neighbours, self.probes, self.seed)
        points, neighbours, facts = find_neighbours(search, blocks, passes.work())
        passes.run(FOUND, write_picks, [(points, neighbours, self, shard_starts(blocks))])
        return {**facts, SHARDS: shard_names(blocks)}


def write_picks(points: Pass, neighbours: Pass, stage: D2, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, score) of all points, by shard.

    Args:
        points, neighbours: see stages.nearest_neighbours.find_neighbours.
        starts: see stages.shard_values.shard_starts.
    """
    table, pairs = exchange.read(points.paths), exchange.read(neighbours.paths)
    if table is None:
        exchange.write(path, {})
        return
    row, high, low, score = (table[name].to_numpy() for name in ("row", "high", "low", "score"))
    rank = np.empty(len(row), np.int64)
    rank[np.lexsort((low, high))] = np.arange(len(row))
    del high, low
    first, other, distance = np.zeros(len(row) + 1, np.int64), np.empty(0, np.int32), np.empty(0)
    if pairs is not None:
        first[:-1] = np.searchsorted(pairs["row"].to_numpy(), row)
        first[-1] = len(pairs)
        other = np.searchsorted(row, pairs["other"].to_numpy()).astype(np.int32)
        distance = 2 * len(stage.embeddings) * (1 - pairs["cosine"].to_numpy())
        del pairs
    scores = np.maximum(score + stage.shift, LEAST_SCORE)
    values = scores.copy()
    with np.errstate(under="ignore"):
        forward, reverse = np.exp(-stage.gamma_forward * distance), np.exp(-stage.gamma_reverse * distance)
    _send(first, other, forward, scores, values)
    del forward, distance
    picked = np.lexsort((rank, -values)).astype(np.int32)  # sorted, and so a heap
    picks = np.empty(len(row), np.int64)
    _pick(first, other, reverse, rank, values, picked, picks)
    write_by_shard(path, row, {"score": len(row) - 1 - picks}, starts)


def _send_loop(first, other, weight, scores, values):
    """None; adds to each row's value what its neighbours send it."""
    for at in range(len(values)):
        for edge in range(first[at], first[at + 1]):
            values[at] += weight[edge] * scores[other[edge]]


def _pick_loop(first, other, weight, rank, values, heap, picks):
    """None; picks[row] is when it is picked, from 0. The root of the heap has the largest value, or of equal ones the
    lowest rank; a row moves in it when its value changes, up or down, as a negative value picked raises others.
    """
    size = len(heap)
    place = np.empty(size, np.int32)
    for at in range(size):
        place[heap[at]] = at
    for pick in range(len(heap)):
        top = heap[0]
        picks[top] = pick
        place[top] = -1
        size -= 1
        for edge in range(first[top] - 1, first[top + 1]):
            if edge < first[top]:  # the last row of the heap is to be placed again, from the root on
                if size == 0:
                    continue
                moved = heap[size]
                at = 0
            else:
                moved = other[edge]
                at = place[moved]
                if at < 0:
                    continue
                values[moved] -= weight[edge] * values[top]
            while at > 0:
                above = heap[(at - 1) // 2]
                if values[above] > values[moved] or (values[above] == values[moved] and rank[above] < rank[moved]):
                    break
                heap[at] = above
                place[above] = at
                at = (at - 1) // 2
            while 2 * at + 1 < size:
                side = 2 * at + 1
                below = heap[side]
                if side + 1 < size:
                    right = heap[side + 1]
                    if values[right] > values[below] or (values[right] == values[below] and rank[right] < rank[below]):
                        side += 1
                        below = right
                if values[moved] > values[below] or (values[moved] == values[below] and rank[moved] < rank[below]):
                    break
                heap[at] = below
                place[below] = at
                at = side
            heap[at] = moved
            place[moved] = at


_send = Compiled(_send_loop, "void(int64[::1], int32[::1], float64[::1], float64[::1], float64[::1])")
_pick = Compiled(
    _pick_loop, "void(int64[::1], int32[::1], float64[::1], int64[::1], float64[::1], int32[::1], int64[::1])"
)
