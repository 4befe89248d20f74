"""Density-based pruning: how many rows of each cluster are kept follows from how complex the cluster is.

Abbas, Rusak et al., "Effective pruning of web-scale datasets based on complexity of concept clusters", ICLR 2024 (arXiv
2401.04578), and its code (github.com/amro-kamal/effective_pruning).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.core import exchange
from pipeline.core.errors import ConfigError, WinnowError
from pipeline.core.passes import Pass, Passes
from stages.base import Stage
from stages.kmeans import TILE_ROWS, add_by_cluster, read_sums
from stages.pool_blocks import Block
from stages.selection.strategies import exact_count
from stages.shard_values import FOUND, SHARDS, FittedStage, shard_names, shard_starts, write_by_shard
from stages.unit_vectors import Vectors, concatenate, packed, pieces, read_vectors, unit, unpacked

PIECE_ROWS = 250_000  # rows whose vectors a task holds, unless a shard has more
PARTITION_ROWS = 1_000_000  # about as many rows of whole clusters are sorted by one task
MOST_CLUSTERS = 1_000_000
DISTANCE_GRID = 2.0**32  # distances are rounded to multiples of 1 / this, so that sums of a billion are exact


@dataclass(frozen=True)
class DensityPruning(FittedStage):
    """Whether the row is kept, and its place in its cluster, from the one farthest from the centroid (0).

    Complexity of cluster j: C_j = d_intra * d_inter, the mean cosine distance (1 - cosine) of its rows to its centroid,
    times that of its centroid to its nearest `neighbours`. P = softmax(C / temperature), and of N_j rows x_j are kept:
    of all x with sum `fraction` of the rows and min(1, N_j - 1) <= x_j <= N_j, the one nearest to P times that sum.
    Kept are the x_j rows farthest from the centroid (of equals, the first by uid). As published, the rows should have
    been deduplicated and filtered by CLIP score before: work `within` such a strategy.

    Where upstream's code differs: it rounds each x_j alone, so that the sum misses its target; here it is met, the
    largest remainders rounded up (of equals, the lower cluster). A solver finds x there; it is a projection,
    x = clip(P n + t, lower, N_j), whose t is found by bisection. Upstream's int(fraction n) can be one less than the
    decimal fraction's. Its lower bound is by default half of n / clusters (--cls-bal-ratio 0.5); the paper's is 1, with
    min(1, N_j - 1) so that a cluster of one row may lose it. Centroids are the normalised means of the rows in scope,
    which is what spherical k-means comes to, and clusters without a row have none and take no part.

    Columns are null for rows without a vector or a cluster.

    Args:
        embedding: the column of vectors that was clustered. The paper: distilled DINOv2-L/14.
        clusters: the stage that gives cluster_id, by its name or its `as:`. The paper: spherical k-means, so metric:
            cosine, into 100 clusters at DataComp medium, 500 for LAION.
        fraction: how much of the rows is kept; 0.8 as in upstream's code, a guess for any other pool.
        temperature: 0.1 as in the paper; upstream's code has 0.5. The higher, the more alike the clusters' shares.
        neighbours: l, 20 as published; all others where there are fewer.

    Cost: for n rows of d dimensions and k clusters the vectors read twice, 4 n d operations, k^2 d for the centroids,
    and 40 bytes a row exchanged. Memory of a task: 14 d bytes a row of PIECE_ROWS, 16 d bytes a cluster, and 60 bytes a
    row of a cluster, which one task sorts.
    """

    embedding: str = "clip_image"
    clusters: str = "clusters"
    fraction: Annotated[float, Field(gt=0, le=1)] = 0.8
    temperature: Annotated[float, Field(ge=1e-6)] = 0.1
    neighbours: Annotated[int, Field(ge=1)] = 20

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = {"density_kept": "bool", "density_rank": "int32"}
    found_types: ClassVar[Mapping[str, pa.DataType]] = {"kept": pa.bool_(), "rank": pa.int32()}

    @property
    def cluster_column(self) -> str:
        """The column that says which cluster a row is in."""
        return "cluster_id" if self.clusters == "clusters" else f"{self.clusters}_cluster_id"

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.embedding, self.cluster_column)

    def check_needs(self, types: Mapping[str, str], owners: Mapping[str, Stage]) -> None:
        if types[self.cluster_column] != "int32":
            raise ConfigError(
                f"clusters = {self.clusters}: {self.cluster_column} is of type {types[self.cluster_column]}, "
                "expected the cluster_id of a stage clusters"
            )

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """Counts of clusters and rows; a file of values for each part of the clusters."""
        work = passes.work()
        parts = pieces(blocks, PIECE_ROWS)
        num_rows = sum(block.rows for block in blocks)
        sums = work.run("sums", write_sums, [(block, self) for block in parts])
        centroids = work.run("centroids", write_centroids, [(sums,)])
        num_partitions = max(1, -(-num_rows // PARTITION_ROWS))
        members = work.run("members", write_members, [(block, self, centroids, num_partitions) for block in parts])
        quota = work.run("quota", write_quota, [(self, members, centroids)])
        starts = shard_starts(blocks)
        items = [(members, quota, number, starts) for number in range(num_partitions)]
        found = passes.run(FOUND, write_ranks, items)
        return {**exchange.read_notes(quota.paths), **exchange.read_notes(found.paths), SHARDS: shard_names(blocks)}


def _clustered(block: Block, stage: DensityPruning) -> tuple[Vectors, np.ndarray]:
    """(vectors, [n] int64 cluster) of the block's rows that have both."""
    vectors = concatenate(list(read_vectors(block, stage.embedding)))
    columns = [table[stage.cluster_column] for table in block.tables([stage.cluster_column])]
    column = pa.chunked_array([chunk for one in columns for chunk in one.chunks], columns[0].type)
    there = column.is_valid().to_numpy()
    cluster = column.fill_null(0).to_numpy().astype(np.int64)
    row = (vectors.row - np.uint64(block.first_row)).astype(np.int64)
    vectors, cluster = vectors.take(there[row]), cluster[row][there[row]]
    if len(cluster) and not 0 <= cluster.min() <= cluster.max() < MOST_CLUSTERS:
        raise WinnowError(
            f"column {stage.cluster_column}: {cluster.min()} to {cluster.max()}, expected 0 to {MOST_CLUSTERS - 1:,}"
        )
    return vectors, cluster


def write_sums(block: Block, stage: DensityPruning, path: str) -> None:
    """None; writes (cluster, count, sum of unit vectors, exact) of the block's rows, for clusters with any."""
    vectors, cluster = _clustered(block, stage)
    present, place = np.unique(cluster, return_inverse=True)
    sums, counts = np.zeros((len(present), vectors.vector.shape[1])), np.zeros(len(present), np.int64)
    for start in range(0, len(vectors), TILE_ROWS):
        add_by_cluster(unit(vectors.vector[start : start + TILE_ROWS]), place[start : start + TILE_ROWS], sums, counts)
    exchange.write(path, {"cluster": present, "count": counts, "sum": packed(sums)})


def write_centroids(sums: Pass, path: str) -> None:
    """None; writes (cluster, count, centroid of length 1, in float64) of the clusters with rows, by number.

    Where rows cancel out there is no mean direction; any will do, and it is the first axis.
    """
    tables = list(exchange.read_each(sums.paths))
    if not tables:
        exchange.write(path, {})
        return
    lengths = sorted({unpacked(table["sum"], np.float64).shape[1] for table in tables})
    if len(lengths) > 1:
        raise WinnowError(f"density_pruning: vectors of {lengths[0]} to {lengths[-1]} values, expected one length")
    present = np.unique(np.concatenate([table["cluster"].to_numpy() for table in tables]))
    num_clusters = int(present[-1]) + 1
    total, counts = np.zeros((num_clusters, lengths[0])), np.zeros(num_clusters, np.int64)
    read_sums(sums.paths, total, counts)
    total = total[present]
    total[np.einsum("ij,ij->i", total, total) == 0, 0] = 1
    exchange.write(path, {"cluster": present, "count": counts[present], "centroid": packed(unit(total))})


def write_members(block: Block, stage: DensityPruning, centroids: Pass, num_partitions: int, path: str) -> None:
    """None; writes (row, high, low, place of the cluster, distance from it) of the block's rows, by cluster."""
    vectors, cluster = _clustered(block, stage)
    distance = np.empty(len(vectors))
    place = partition = cluster
    if len(vectors):
        table = exchange.read(centroids.paths)
        centres = unpacked(table["centroid"], np.float64)
        place = np.searchsorted(table["cluster"].to_numpy(), cluster)
        for start in range(0, len(vectors), TILE_ROWS):
            own = slice(start, start + TILE_ROWS)
            distance[own] = 1 - np.einsum("ij,ij->i", unit(vectors.vector[own]), centres[place[own]])
        partition = place * num_partitions // len(centres)
    exchange.write(path, {**vectors.columns(), "cluster": place, "distance": distance}, partition)


def write_quota(stage: DensityPruning, members: Pass, centroids: Pass, path: str) -> None:
    """None; writes [k] how many rows of each cluster are kept."""
    table = exchange.read(centroids.paths)
    if table is None:
        exchange.write(path, {}, notes={"clusters": 0, "rows_with_clusters": 0})
        return
    counts = table["count"].to_numpy()
    total = np.zeros(len(counts), np.int64)
    for part in exchange.read_each(members.paths):
        steps = np.rint(part["distance"].to_numpy() * DISTANCE_GRID).astype(np.int64)
        np.add.at(total, part["cluster"].to_numpy(), steps)
    intra = total / DISTANCE_GRID / counts
    inter = mean_neighbour_distances(unpacked(table["centroid"], np.float64), stage.neighbours)
    kept = quotas(intra * inter, counts, exact_count(stage.fraction, int(counts.sum())), stage.temperature)
    notes = {"clusters": len(counts), "rows_with_clusters": int(counts.sum())}
    exchange.write(path, {"kept": kept}, notes=notes)


def mean_neighbour_distances(centroids: np.ndarray, neighbours: int) -> np.ndarray:
    """[k] float64: the mean cosine distance of each centroid to its nearest others; 0 where it is alone.

    Args:
        centroids: [k, d] what `unit` gives.
        neighbours: how many others; all where there are fewer.
    """
    num = min(neighbours, len(centroids) - 1)
    found = np.zeros(len(centroids))
    for start in range(0, len(centroids) if num else 0, TILE_ROWS // 4):
        tile = centroids[start : start + TILE_ROWS // 4]
        distance = 1 - tile @ centroids.T
        distance[np.arange(len(tile)), np.arange(start, start + len(tile))] = np.inf
        nearest = np.partition(distance, num - 1, axis=1)[:, :num]
        found[start : start + len(tile)] = np.rint(nearest * DISTANCE_GRID).sum(axis=1) / DISTANCE_GRID / num
    return found


def quotas(complexity: np.ndarray, counts: np.ndarray, num_kept: int, temperature: float) -> np.ndarray:
    """[k] int64: how many rows of each cluster are kept, num_kept in all; see DensityPruning.

    Args:
        complexity: [k] float64, d_intra times d_inter.
        counts: [k] int64, rows in each cluster, at least 1.

    Raises:
        WinnowError: num_kept is less than the clusters' lower bounds together.
    """
    lower = np.minimum(1, counts - 1)
    if num_kept < lower.sum():
        raise WinnowError(
            f"density_pruning.fraction: {num_kept} of {counts.sum()} rows, expected at least the {lower.sum()} "
            "clusters of two rows or more, of which each keeps one"
        )
    share = np.exp((complexity - complexity.max()) / temperature)
    wanted = share / share.sum() * num_kept
    low, high = float((lower - wanted).min()), float((counts - wanted).max())
    while True:  # the sum of what is kept grows with the shift
        shift = (low + high) / 2
        if not low < shift < high:
            break
        low, high = (shift, high) if np.clip(wanted + shift, lower, counts).sum() < num_kept else (low, shift)
    exact = np.clip(wanted + high, lower, counts)
    kept = np.floor(exact).astype(np.int64)
    for step in (1, -1):  # the second where the last bits of the sum hid a whole row
        missing = step * (num_kept - int(kept.sum()))
        room = np.flatnonzero(kept < counts if step == 1 else kept > lower)
        if missing > 0:
            kept[room[np.argsort(-step * (exact - kept)[room], kind="stable")[:missing]]] += step
    return kept


def write_ranks(members: Pass, quota: Pass, partition: int, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, kept, rank) of the partition's rows, by shard."""
    table = exchange.read(members.paths, partition)
    if table is None:
        exchange.write(path, {}, notes={"kept_rows": 0})
        return
    row, high, low, cluster, distance = (table[name].to_numpy() for name in table.column_names)
    order = np.lexsort((low, high, -distance, cluster))
    rank = np.empty(len(order), np.int64)
    sorted_cluster = cluster[order]
    rank[order] = np.arange(len(order)) - np.searchsorted(sorted_cluster, sorted_cluster)
    kept = rank < exchange.read(quota.paths)["kept"].to_numpy()[cluster]
    columns = {"kept": pa.array(kept), "rank": rank.astype(np.int32)}
    write_by_shard(path, row, columns, starts, {"kept_rows": int(kept.sum())})
