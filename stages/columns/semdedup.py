"""SemDeDup: how alike a row is to another one of its cluster that would be kept before it.

Abbas et al., "SemDeDup: Data-efficient learning at web-scale through semantic deduplication", 2023 (arXiv 2303.09540).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.core import exchange
from pipeline.core.passes import Pass, Passes
from stages.kmeans import Centroids, KMeans, choose_clusters, read_centroids
from stages.pool_blocks import Block, num_ok_rows
from stages.selection import uids
from stages.shard_values import FOUND, SHARDS, FittedStage, shard_names, shard_starts, write_by_shard
from stages.unit_vectors import Gathered, packed, pieces, unit, unpacked

ORDER_STREAM = 22  # of the seed: see uids.hash64
PIECE_ROWS = 250_000  # rows whose vectors a task holds, unless a shard has more
PARTITION_ROWS = 250_000  # about as many rows of whole clusters are compared by one task
TILE_ROWS = 1024
NO_EARLIER = -1.0


@dataclass(frozen=True)
class SemDeDup(FittedStage):
    """The row's cluster, its cosine with the centroid, and its highest cosine with an earlier row of the cluster.

    SemDeDup's rule with its epsilon is `where: [semdedup_similarity <= X]`, X = 1 - epsilon: nothing is computed again
    for another one. As published, a row counts as a copy of an earlier one even if that one is dropped as well. Order
    in a cluster: see `keep`; among equals, by uid. The first row of a cluster has the similarity -1, a number, as
    comparisons never choose rows without one. All three columns are null for a row without a vector (or with one of
    zeros). Copies in different clusters do not meet; embedding_duplicates finds all of them.

    Args:
        embedding: a column of vectors, of any length other than 0: clip_image or clip_text.
        clusters: null: the square root of the ok rows (within), at most 50,000.
        keep: which row of a cluster comes first: hard: the one farthest from the centroid, as published by default;
            easy: the nearest; random: by a hash of uid and seed.
        seed: of the centroids' sample and of the random order.
        iterations: of k-means, at most.

    Cost: for n rows of d dimensions the column read twice and exchanged once (2 d + 32 bytes a row), 2 n d clusters
    operations for the clusters (their training: stages/kmeans.py), and d times the sum of the squared cluster sizes for
    the cosines, each cluster in one task: for up to some hundred million rows. Memory of a task: 6 d bytes a row of
    PIECE_ROWS, and 28 d bytes a cluster. A cluster of any size is compared in tiles and takes 60 bytes a row; on an
    object store its vectors as well, 2 d bytes a row.
    """

    embedding: str = "clip_image"
    clusters: Annotated[int, Field(ge=1)] | None = None
    keep: Literal["hard", "easy", "random"] = "hard"
    seed: Annotated[int, Field(ge=0)] = 0
    iterations: Annotated[int, Field(ge=1)] = 20

    version: ClassVar[int] = 2
    adds: ClassVar[Mapping[str, str]] = {
        "semdedup_cluster": "int32",
        "semdedup_centroid_cosine": "float32",
        "semdedup_similarity": "float32",
    }
    found_types: ClassVar[Mapping[str, pa.DataType]] = {
        "cluster": pa.int32(),
        "centroid_cosine": pa.float32(),
        "similarity": pa.float32(),
    }

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.embedding,)

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """Counts of clusters and rows; a file of values for each part of the clusters."""
        work = passes.work()
        parts = pieces(blocks, PIECE_ROWS)
        num_rows = num_ok_rows(parts, work)
        num_clusters = self.clusters or choose_clusters(num_rows)
        centroids = KMeans(self.embedding, num_clusters, self.seed, self.iterations).centroids(parts, work)
        num_partitions = min(num_clusters, max(1, -(-num_rows // PARTITION_ROWS)))
        members = work.run(
            "members", write_members, [(block, self.embedding, centroids, num_partitions) for block in parts]
        )
        starts = shard_starts(blocks)
        items = [(members, number, self.keep, self.seed, starts) for number in range(num_partitions)]
        found = passes.run(FOUND, write_similarities, items)
        return {**exchange.read_notes(found.paths), SHARDS: shard_names(blocks)}


def write_members(block: Block, column: str, centroids: Pass, num_partitions: int, path: str) -> None:
    """None; writes (row, high, low, cluster, cosine with its centroid, vector) of the block's rows, by cluster."""
    centres = read_centroids(centroids)
    vectors, cluster, cosine = Centroids(centres, "cosine").assigned(block, column)
    columns = {
        **vectors.columns(),
        "cluster": cluster,
        "cosine": cosine,
        "vector": packed(vectors.vector),
    }
    exchange.write(path, columns, cluster.astype(np.int64) * num_partitions // max(1, len(centres)))


def write_similarities(members: Pass, partition: int, keep: str, seed: int, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, cluster, centroid_cosine, similarity) of the partition's rows, by shard.

    Args:
        keep, seed: see SemDeDup.
        starts: see stages.shard_values.shard_starts.
    """
    tables = list(exchange.read_each(members.paths, partition))
    if not tables:
        exchange.write(path, {}, notes={"clusters": 0, "rows_with_vectors": 0})
        return
    row, high, low, cluster, cosine = (
        np.concatenate([table[name].to_numpy() for table in tables])
        for name in ("row", "high", "low", "cluster", "cosine")
    )
    vectors = Gathered([unpacked(table["vector"]) for table in tables])
    first = {
        "hard": lambda: cosine,
        "easy": lambda: -cosine,
        "random": lambda: uids.hash64(np.stack([high, low], axis=1), seed, ORDER_STREAM),
    }[keep]()
    order = np.lexsort((low, high, first, cluster))
    similarity = np.empty(len(order), np.float32)
    bounds = np.flatnonzero(np.diff(cluster[order], prepend=-1, append=-1))
    for start, end in itertools.pairwise(bounds):
        places = order[start:end]
        similarity[places] = earlier_cosines(lambda a, b, places=places: vectors.take(places[a:b]), len(places))
    columns = {"cluster": cluster, "centroid_cosine": cosine, "similarity": similarity}
    write_by_shard(path, row, columns, starts, {"clusters": len(bounds) - 1, "rows_with_vectors": len(row)})


def earlier_cosines(read: Callable[[int, int], np.ndarray], num_rows: int) -> np.ndarray:
    """[num_rows] float32: the highest cosine of each row with an earlier one; -1 for the first.

    Args:
        read: (start, stop) -> float16 vectors of the rows from start up to stop, or up to the last one.
    """
    found = np.full(num_rows, NO_EARLIER)
    for start in range(0, num_rows, TILE_ROWS):
        later = unit(read(start, start + TILE_ROWS))
        own = found[start : start + TILE_ROWS]
        for first in range(0, start, TILE_ROWS):
            np.maximum(own, (later @ unit(read(first, first + TILE_ROWS)).T).max(axis=1), out=own)
        cosines = later @ later.T
        cosines[~np.tri(len(later), k=-1, dtype=bool)] = NO_EARLIER
        np.maximum(own, cosines.max(axis=1), out=own)
    return found.astype(np.float32)
