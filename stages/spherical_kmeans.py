"""k-means of unit vectors (spherical k-means) over a pool: centroids from a sample, and the nearest one of each row.

The same centroids come out whatever the order of rows and shards, the blocks, the tiles and the threads: rows are drawn
by a hash of uid and seed, sums and cosines are exact (stages/unit_vectors.py), and what is equally near goes to the
cluster of the lower number. Dhillon and Modha, "Concept Decompositions for Large Sparse Text Data using Clustering",
Machine Learning 42 (2001).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.core import exchange
from pipeline.core.passes import Pass, Passes
from stages.pool_blocks import Block
from stages.selection import uids
from stages.unit_vectors import GRID, Vectors, concatenate, float32_error, packed, read_vectors, unit, unpacked

SAMPLE_STREAM = 21  # of the seed: see uids.hash64
ROWS_A_CLUSTER = 256  # that centroids are trained on, as in faiss
MOST_SAMPLED = 500_000
MOST_CLUSTERS = 50_000  # by default
TILE_ROWS = 4096
TILE_CENTROIDS = 8192


def choose_clusters(num_rows: int) -> int:
    """The square root of the number of rows, rounded, at most MOST_CLUSTERS.

    Then finding each row's cluster costs as much as comparing all rows within their clusters.
    """
    return max(1, min(MOST_CLUSTERS, round(num_rows**0.5)))


@dataclass(frozen=True)
class KMeans:
    """How centroids are found.

    A sample of about ROWS_A_CLUSTER rows a cluster (at most MOST_SAMPLED in all), the rows with the lowest hashes,
    starts from those with the lowest of all and goes through at most `iterations` rounds, fewer when nothing changes.
    Clusters that lost all their rows start again, the first from the row of the largest cluster that is farthest from
    its centroid, the next from that of the second largest, and so on; one whose rows cancel out stays where it is.

    Cost: the column read once; then one task, with 6 d bytes a sampled row and 24 d bytes a cluster of memory,
    and 2 num_clusters d operations a sampled row and iteration.
    """

    column: str
    num_clusters: int
    seed: int
    iterations: int

    def centroids(self, blocks: Sequence[Block], passes: Passes) -> Pass:
        """The pass of one file with the centroids: see read_centroids.

        There are fewer than num_clusters where the sample has fewer rows. Notes: {sampled, iterations, empty}.
        """
        num_rows = sum(block.rows for block in blocks)
        most = min(MOST_SAMPLED, ROWS_A_CLUSTER * self.num_clusters)
        highest = min(2**64 - 1, (most << 64) // max(1, num_rows))
        sample = passes.run("sample", write_sample, [(block, self, highest) for block in blocks])
        found = passes.run("centroids", write_centroids, [(sample, self)])
        passes.drop(sample)
        return found


def read_centroids(centroids: Pass) -> np.ndarray:
    """[k, d] float32, of length 1; [0, 0] for a pool without vectors."""
    table = exchange.read(centroids.paths)
    return np.empty((0, 0), np.float32) if table is None else unpacked(table["centroid"], np.float32)


def write_sample(block: Block, kmeans: KMeans, highest: int, path: str) -> None:
    """None; writes (hash, high, low, vector) of the block's rows with a hash of at most `highest`."""
    parts, hashes = [], []
    for vectors in read_vectors(block, kmeans.column):
        hashed = uids.hash64(vectors.uid, kmeans.seed, SAMPLE_STREAM)
        wanted = np.flatnonzero(hashed <= np.uint64(highest))
        parts.append(vectors.take(wanted))
        hashes.append(hashed[wanted])
    sample = concatenate(parts)
    columns = {"hash": np.concatenate(hashes), "high": sample.uid[:, 0], "low": sample.uid[:, 1]}
    exchange.write(path, {**columns, "vector": packed(sample.vector)})


def write_centroids(sample: Pass, kmeans: KMeans, path: str) -> None:
    """None; writes the centroids that the sample leads to."""
    table = exchange.read(sample.paths)
    if table is None:
        exchange.write(path, {"centroid": packed(np.empty((0, 0), np.float32))}, notes=_notes(0, 0, 0))
        return
    order = np.lexsort((table["low"].to_numpy(), table["high"].to_numpy(), table["hash"].to_numpy()))
    found, iterations, empty = train(unpacked(table["vector"])[order], kmeans.num_clusters, kmeans.iterations)
    exchange.write(path, {"centroid": packed(found)}, notes=_notes(len(order), iterations, empty))


def _notes(sampled: int, iterations: int, empty: int) -> dict[str, int]:
    return {"sampled": sampled, "iterations": iterations, "empty": empty}


def train(vectors: np.ndarray, num_clusters: int, iterations: int) -> tuple[np.ndarray, int, int]:
    """(centroids, iterations, empty): [k, d] float32 of length 1, k = num_clusters or the number of vectors.

    Args:
        vectors: [n, d] float16, finite, none of length 0; the first ones are where the centroids start.

    Returns:
        also how many iterations it took, and how many clusters had no row in the last of them.
    """
    whole = np.empty(vectors.shape, np.int32)  # the unit vectors as multiples of 1 / GRID
    for start in range(0, len(whole), TILE_ROWS):
        whole[start : start + TILE_ROWS] = unit(vectors[start : start + TILE_ROWS]) * GRID
    centroids = unit(vectors[:num_clusters])
    sums, counts = np.zeros(centroids.shape), np.zeros(len(centroids), np.int64)
    cluster = np.full(len(whole), -1, np.int32)
    empty = 0
    for done in range(iterations):
        search = _Search(centroids)
        num_moved = 0
        for start in range(0, len(whole), TILE_ROWS):
            tile, before = whole[start : start + TILE_ROWS], cluster[start : start + TILE_ROWS]
            narrow = tile.astype(np.float32) * np.float32(1 / GRID)
            now = search.places(narrow, lambda rows, tile=tile: tile[rows] * (1 / GRID))
            moved = np.flatnonzero(now != before)
            num_moved += len(moved)
            exact = tile[moved] * (1 / GRID)
            _add_by_cluster(exact, now[moved], 1, sums, counts)
            if done:
                _add_by_cluster(exact, before[moved], -1, sums, counts)
            before[:] = now
        if not num_moved:
            return centroids.astype(np.float32), done, empty
        known = np.flatnonzero(np.einsum("ij,ij->i", sums, sums) > 0)
        centroids[known] = unit(unit(sums[known]).astype(np.float32))  # what a reader of the float32 ones has
        without = np.flatnonzero(counts == 0)
        empty = len(without)
        if empty:
            donors = np.argsort(-counts, kind="stable")[: min(empty, len(counts) - empty)]
            centroids[without[: len(donors)]] = unit(vectors[_farthest(whole, cluster, search.centroids)[donors]])
    return centroids.astype(np.float32), iterations, empty


def _add_by_cluster(exact: np.ndarray, cluster: np.ndarray, sign: int, sums: np.ndarray, counts: np.ndarray) -> None:
    """None; the unit vectors are added to (or taken from) their clusters' sums, exactly."""
    from scipy.sparse import csr_matrix

    if len(cluster):
        present, places, number = np.unique(cluster, return_inverse=True, return_counts=True)
        belongs = csr_matrix((np.ones(len(exact)), (places, np.arange(len(exact)))), shape=(len(present), len(exact)))
        sums[present] += sign * (belongs @ exact)
        counts[present] += sign * number


def _farthest(whole: np.ndarray, cluster: np.ndarray, centroids: np.ndarray) -> np.ndarray:
    """[k] the row of each cluster with the lowest cosine, the first of equal ones; any row of an empty one."""
    cosine = np.empty(len(whole))
    for start in range(0, len(whole), TILE_ROWS):
        own = slice(start, start + TILE_ROWS)
        cosine[own] = np.einsum("ij,ij->i", whole[own] * (1 / GRID), centroids[cluster[own]])
    by_cluster = np.lexsort((cosine, cluster))
    places = np.searchsorted(cluster[by_cluster], np.arange(len(centroids)))
    return by_cluster[np.minimum(places, len(whole) - 1)]


def nearest(vectors: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([n] int32, [n] float32): the cluster whose centroid has the highest cosine with each vector, and that cosine.

    Args:
        vectors: [n, d] float16, finite, none of length 0.
        centroids: [k, d], k > 0, what `unit` gives (of read_centroids).
    """
    cluster = np.empty(len(vectors), np.int32)
    cosine = np.empty(len(vectors), np.float32)
    search = _Search(centroids)
    for start in range(0, len(vectors), TILE_ROWS):
        own = slice(start, min(start + TILE_ROWS, len(vectors)))
        tile = unit(vectors[own])
        cluster[own] = search.places(tile.astype(np.float32), tile.__getitem__)
        cosine[own] = np.einsum("ij,ij->i", tile, centroids[cluster[own]])
    return cluster, cosine


class _Search:
    """Finds the nearest of the centroids: in float32, and exactly where two are too close to tell."""

    def __init__(self, centroids: np.ndarray):
        self.centroids = centroids.copy()
        self._narrow = centroids.astype(np.float32)
        self._margin = np.float32(2 * float32_error(centroids.shape[1]))

    def places(self, narrow: np.ndarray, exact: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
        """[n] int32: which centroid is nearest to each unit vector, given in float32; `exact` gives some as float64."""
        place, best, second = _highest(narrow, self._narrow)
        close = np.flatnonzero(best - second <= self._margin)
        if len(close):
            place[close], _, _ = _highest(exact(close), self.centroids)
        return place


def _highest(tile: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(place, highest, second highest): of the cosines of each row with the centroids; the first of equal ones."""
    rows = np.arange(len(tile))
    place = np.zeros(len(tile), np.int32)
    best = np.full(len(tile), -2, tile.dtype)
    second = best.copy()
    for first in range(0, len(centroids), TILE_CENTROIDS):
        cosines = tile @ centroids[first : first + TILE_CENTROIDS].T
        at = cosines.argmax(axis=1)
        highest = cosines[rows, at]
        cosines[rows, at] = -2
        second = np.maximum(np.maximum(second, cosines.max(axis=1)), np.minimum(best, highest))
        place[highest > best] = (at + first)[highest > best]
        best = np.maximum(best, highest)
    return place, best, second


def assigned(block: Block, column: str, centroids: np.ndarray) -> tuple[Vectors, np.ndarray, np.ndarray]:
    """(vectors, cluster, cosine) of the block's rows with a vector: see read_vectors and nearest.

    Args:
        centroids: see read_centroids.
    """
    exact = unit(centroids) if len(centroids) else centroids
    vectors, cluster, cosine = [], [np.empty(0, np.int32)], [np.empty(0, np.float32)]
    for part in read_vectors(block, column):
        if len(part):
            vectors.append(part)
            found = nearest(part.vector, exact)
            cluster.append(found[0])
            cosine.append(found[1])
    return concatenate(vectors), np.concatenate(cluster), np.concatenate(cosine)
