"""k-means of a pool's vectors: centroids from a sample, and the centroid that each row belongs to.

Two metrics. `cosine` is spherical k-means (Dhillon and Modha, "Concept Decompositions for Large Sparse Text Data using
Clustering", Machine Learning 42, 2001): of unit vectors, centroids of length 1. `l2` is what DataComp's image-based
filter does with faiss: centroids are the means of the vectors as they are, trained by Euclidean distance, and in the
end each row goes to the centroid with the highest inner product, whatever the centroid's length.

The same centroids come out whatever the order of rows and shards, the blocks, the parts, the tiles and the threads:
rows are drawn by a hash of uid and seed, sums and products are exact (stages/unit_vectors.py; vectors of the metric l2
are divided by a power of two so that none is longer than 1, then rounded to the same grid), and what is equally near
goes to the cluster of the lower number.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.core import exchange
from pipeline.core.errors import WinnowError
from pipeline.core.passes import Pass, Passes
from stages.pool_blocks import Block, num_ok_rows
from stages.selection import uids
from stages.selection.strategies import exact_count
from stages.unit_vectors import GRID, Vectors, concatenate, float32_error, packed, read_vectors, unit, unpacked

Metric = Literal["l2", "cosine"]

SAMPLE_STREAM = 21  # of the seed: see uids.hash64
ROWS_A_CLUSTER = 256  # that centroids are trained on, as in faiss
MOST_SAMPLED = 500_000  # by default
MOST_CLUSTERS = 50_000  # by default
PART_ROWS = 100_000  # of the sample that a task assigns, or PART_ROWS_A_CLUSTER a cluster where those are more
PART_ROWS_A_CLUSTER = 4  # so that sums, 8 d bytes a cluster and task, are no more than the vectors they are of
SPLIT = 1 / 1024  # by which the two halves of a cluster that is split differ from it, as in faiss
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

    A sample of the rows, those with the lowest hashes, starts from the ones with the lowest of all and goes through at
    most `iterations` rounds, fewer when nothing changes. A cluster that lost all its rows takes half of the largest
    one, as in faiss: the centroids of the two are that one's, each coordinate times 1 +- SPLIT; the next one takes half
    of what is then the largest. (faiss draws the cluster at random, and its signs alternate: then halves of halves can
    coincide. Here each split has signs of its own.) A cluster whose unit vectors cancel out stays where it is.

    `sample` is about how many rows (int) or which fraction of them (float); None: ROWS_A_CLUSTER rows a cluster, as in
    faiss, at most MOST_SAMPLED in all.

    Cost: the column read once; for each iteration the sample read once, 2 num_clusters d operations a sampled row,
    spread over tasks of PART_ROWS rows or more, and one task that adds up their sums (8 d bytes a cluster and task).
    Memory of a task: 28 d bytes a cluster. 4 d bytes a cluster and iteration stay in the work folder until the end.
    """

    column: str
    num_clusters: int
    seed: int
    iterations: int
    metric: Metric = "cosine"
    sample: int | float | None = None

    def centroids(self, blocks: Sequence[Block], passes: Passes) -> Pass:
        """The pass of one file with the centroids: see read_centroids.

        There are fewer than num_clusters where the sample has fewer rows. Notes: {sampled, iterations, empty}, the last
        being how many clusters had no row in the last iteration.
        """
        num_rows = num_ok_rows(blocks, passes)
        most = self._most_sampled(num_rows)
        highest = highest_hash(most, num_rows)
        sample = passes.run("sample", write_sample, [(block, self, highest) for block in blocks])
        return self.trained(sample, self._parts(blocks, sample, most / max(1, num_rows)), passes)

    def trained(self, sample: Pass, parts: Sequence[Sequence[str]], passes: Passes) -> Pass:
        """See centroids.

        Args:
            sample: files of write_sampled; dropped in the end.
            parts: these files, in groups that a task assigns.
        """
        found = passes.run("centroids_000", write_start, [(sample, self)])
        for number in range(1, self.iterations + 1):
            sums = passes.run(f"sums_{number:03d}", write_sums, [(paths, found, self.metric) for paths in parts])
            found = passes.run(f"centroids_{number:03d}", write_centroids, [(sums, found, self.metric)])
            passes.drop(sums)
            if not exchange.read_notes(found.paths)["changed"]:
                break
        passes.drop(sample)
        return found

    def _most_sampled(self, num_rows: int) -> int:
        if self.sample is None:
            return min(MOST_SAMPLED, ROWS_A_CLUSTER * self.num_clusters)
        return self.sample if isinstance(self.sample, int) else exact_count(self.sample, num_rows)

    def _parts(self, blocks: Sequence[Block], sample: Pass, fraction: float) -> list[list[str]]:
        """The files of the sample, in groups of about as many rows as a task assigns."""
        most = max(PART_ROWS, PART_ROWS_A_CLUSTER * self.num_clusters)
        parts: list[list[str]] = [[]]
        rows = 0.0
        for block, path in zip(blocks, sample.paths, strict=True):
            expected = block.rows * min(1.0, fraction)
            if parts[-1] and rows + expected > most:
                parts.append([])
                rows = 0.0
            parts[-1].append(path)
            rows += expected
        return parts


def read_centroids(centroids: Pass) -> np.ndarray:
    """[k, d] float32, of length 1 with the metric cosine; [0, 0] for a pool without vectors."""
    table = exchange.read(centroids.paths)
    return np.empty((0, 0), np.float32) if table is None else unpacked(table["centroid"], np.float32)


def highest_hash(most: int, num_rows: int) -> int:
    """The highest hash that a row of a sample of about `most` of all rows has."""
    return min(2**64 - 1, (most << 64) // max(1, num_rows))


def write_sample(block: Block, kmeans: KMeans, highest: int, path: str) -> None:
    """None; writes the block's rows with a hash of at most `highest`: see write_sampled."""
    write_sampled(path, read_vectors(block, kmeans.column), kmeans.seed, SAMPLE_STREAM, highest)


def write_sampled(path: str, parts: Iterable[Vectors], seed: int, stream: int, highest: int) -> None:
    """None; writes (row, high, low, hash, vector, exponent) of the rows with a hash of at most `highest`.

    Args:
        seed, stream: of the hash: see stages.selection.uids.hash64.
    """
    wanted = (part.take(uids.hash64(part.uid, seed, stream) <= np.uint64(highest)) for part in parts)
    sample = concatenate(list(wanted))
    columns = {**sample.columns(), "hash": uids.hash64(sample.uid, seed, stream)}
    exchange.write(path, {**columns, "vector": packed(sample.vector), "exponent": exponents(sample.vector)})


def write_start(sample: Pass, kmeans: KMeans, path: str) -> None:
    """None; writes the centroids that the training starts from, the vectors of the rows with the lowest hashes."""
    keys, vectors, sampled, exponent = np.empty((0, 3), np.uint64), None, 0, 0
    for table in exchange.read_each(sample.paths):
        largest = int(table["exponent"].to_numpy().max())
        exponent = max(exponent, largest) if sampled else largest
        sampled += len(table)
        own = np.stack([table[name].to_numpy() for name in ("hash", "high", "low")], axis=1)
        own_vectors = unpacked(table["vector"])
        vectors = own_vectors[:0] if vectors is None else vectors
        if own_vectors.shape[1] != vectors.shape[1]:
            raise WinnowError(
                f"column {kmeans.column}: vectors of {vectors.shape[1]} and of {own_vectors.shape[1]} values, "
                "expected one length"
            )
        keys = np.concatenate([keys, own])
        lowest = np.lexsort((keys[:, 2], keys[:, 1], keys[:, 0]))[: kmeans.num_clusters]
        early = len(vectors)
        chosen = np.empty((len(lowest), own_vectors.shape[1]), np.float16)
        chosen[lowest < early] = vectors[lowest[lowest < early]]
        chosen[lowest >= early] = own_vectors[lowest[lowest >= early] - early]
        keys, vectors = keys[lowest], chosen
    start = np.empty((0, 0)) if vectors is None else vectors
    if kmeans.metric == "cosine" and len(start):
        start = unit(start)
    notes = {"sampled": sampled, "exponent": exponent, "iterations": 0, "empty": 0, "changed": len(start)}
    exchange.write(path, {"centroid": packed(start.astype(np.float32))}, notes=notes)


def write_sums(paths: Sequence[str], centroids: Pass, metric: Metric, path: str) -> None:
    """None; writes (cluster, count, sum) of the rows of these files of the sample, for clusters with any.

    A sum is exact: of unit vectors, or with the metric l2 of vectors divided by two to the power of the `exponent` in
    the centroids' notes.
    """
    before = read_centroids(centroids)
    exponent = exchange.read_notes(centroids.paths)["exponent"]
    exact = unit if metric == "cosine" else lambda vectors: on_grid(vectors, exponent)
    search = _Search(exact(before) if len(before) else before, of_distances=metric == "l2")
    sums, counts = np.zeros(before.shape), np.zeros(len(before), np.int64)
    for one in paths:
        table = exchange.read([one])
        vectors = np.empty((0, 0), np.float16) if table is None else unpacked(table["vector"])
        for start in range(0, len(vectors), TILE_ROWS):
            tile = exact(vectors[start : start + TILE_ROWS])
            add_by_cluster(tile, search.places(tile), sums, counts)
    present = np.flatnonzero(counts)
    exchange.write(path, {"cluster": present, "count": counts[present], "sum": packed(sums[present])})


def read_sums(paths: Sequence[str], sums: np.ndarray, counts: np.ndarray) -> None:
    """None; adds what write_sums wrote to the [k, d] float64 sums and [k] int64 counts."""
    for table in exchange.read_each(paths):
        cluster = table["cluster"].to_numpy()
        sums[cluster] += unpacked(table["sum"], np.float64)
        counts[cluster] += table["count"].to_numpy()


def write_centroids(sums: Pass, before: Pass, metric: Metric, path: str) -> None:
    """None; writes the centroids of the clusters with these sums; the empty ones split the largest."""
    old, notes = read_centroids(before), exchange.read_notes(before.paths)
    total, counts = np.zeros(old.shape), np.zeros(len(old), np.int64)
    read_sums(sums.paths, total, counts)
    new = old.astype(np.float64)
    if metric == "cosine":
        known = np.flatnonzero(np.einsum("ij,ij->i", total, total) > 0)
        new[known] = unit(total[known])
    else:
        known = np.flatnonzero(counts)
        new[known] = np.ldexp(total[known] / counts[known, None], notes["exponent"])
    num_empty = int((counts == 0).sum())
    _split(new, counts)
    centroids = new.astype(np.float32)
    changed = int((centroids != old).any(axis=1).sum())
    now = {"iterations": notes["iterations"] + 1, "empty": num_empty, "changed": changed}
    exchange.write(path, {"centroid": packed(centroids)}, notes=notes | now)


def _split(centroids: np.ndarray, counts: np.ndarray) -> None:
    """None; each empty cluster takes half of the largest, the lowest of equal ones; see KMeans."""
    largest = [(-int(count), number) for number, count in enumerate(counts) if count > 1]
    heapq.heapify(largest)
    dimensions = np.arange(centroids.shape[1], dtype=np.uint64)
    for number, empty in enumerate(np.flatnonzero(counts == 0).tolist()):
        if not largest:
            return
        count, donor = largest[0]
        change = np.where(uids.mix(dimensions + np.uint64(number << 32)) & np.uint64(1), SPLIT, -SPLIT)
        centroids[empty] = centroids[donor] * (1 + change)
        centroids[donor] *= 1 - change
        given = -count // 2
        heapq.heapreplace(largest, (count + given, donor))
        if given > 1:
            heapq.heappush(largest, (-given, empty))
        if -largest[0][0] < 2:
            heapq.heappop(largest)


def add_by_cluster(exact: np.ndarray, cluster: np.ndarray, sums: np.ndarray, counts: np.ndarray) -> None:
    """None; the vectors, multiples of 1 / GRID, are added to their clusters' sums, exactly."""
    from scipy.sparse import csr_matrix

    present, places, number = np.unique(cluster, return_inverse=True, return_counts=True)
    belongs = csr_matrix((np.ones(len(exact)), (places, np.arange(len(exact)))), shape=(len(present), len(exact)))
    sums[present] += belongs @ exact
    counts[present] += number


def exponents(vectors: np.ndarray) -> np.ndarray:
    """[n] int32: the least power of two above each vector's length; 0 for one of length 0.

    Args:
        vectors: [n, d] finite.
    """
    wide = vectors.astype(np.float64)
    return np.frexp(np.sqrt(np.einsum("ij,ij->i", wide, wide)))[1].astype(np.int32)


def on_grid(vectors: np.ndarray, exponent: np.ndarray | int) -> np.ndarray:
    """[n, d] float64: the vectors divided by two to the power of `exponent`, and rounded to multiples of 1 / GRID.

    Args:
        exponent: at least what `exponents` gives; of each vector [n], or one for all.
    """
    scale = np.ldexp(GRID, -np.asarray(exponent))
    wide = vectors.astype(np.float64)
    wide *= scale if scale.ndim == 0 else scale[:, None]
    np.rint(wide, out=wide)
    wide *= 1 / GRID
    return wide


class Centroids:
    """Centroids that rows are assigned to: by cosine, or with the metric l2 by the inner product.

    Args:
        centroids: [k, d] float32, finite; see read_centroids.
    """

    def __init__(self, centroids: np.ndarray, metric: Metric):
        self.metric = metric
        self.num_dimensions = centroids.shape[1]
        self._exponent = int(exponents(centroids).max()) if len(centroids) else 0
        self._search = _Search(unit(centroids) if metric == "cosine" else on_grid(centroids, self._exponent))

    def nearest(self, vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """([n] int32, [n] float32): the centroid with the highest similarity to each vector, and that similarity.

        Args:
            vectors: [n, d] float16 or float32, finite, none of length 0.
        """
        if vectors.shape[1] != self.num_dimensions:
            raise WinnowError(
                f"vectors of {vectors.shape[1]} values and centroids of {self.num_dimensions}, expected one length"
            )
        cluster = np.empty(len(vectors), np.int32)
        similarity = np.empty(len(vectors), np.float32)
        for start in range(0, len(vectors), TILE_ROWS):
            own = slice(start, min(start + TILE_ROWS, len(vectors)))
            exponent = 0 if self.metric == "cosine" else exponents(vectors[own])
            tile = unit(vectors[own]) if self.metric == "cosine" else on_grid(vectors[own], exponent)
            cluster[own] = self._search.places(tile)
            found = np.einsum("ij,ij->i", tile, self._search.centroids[cluster[own]])
            similarity[own] = found if self.metric == "cosine" else np.ldexp(found, exponent + self._exponent)
        return cluster, similarity

    def assigned(self, block: Block, column: str) -> tuple[Vectors, np.ndarray, np.ndarray]:
        """(vectors, cluster, similarity) of the block's rows with a vector: see read_vectors and nearest."""
        vectors, cluster, similarity = [], [np.empty(0, np.int32)], [np.empty(0, np.float32)]
        for part in read_vectors(block, column):
            if len(part):
                vectors.append(part)
                found = self.nearest(part.vector)
                cluster.append(found[0])
                similarity.append(found[1])
        return concatenate(vectors), np.concatenate(cluster), np.concatenate(similarity)


class _Search:
    """Finds the nearest of the centroids: in float32, and exactly where two are too close to tell.

    Args:
        centroids: [k, d] float64, multiples of 1 / GRID, not longer than about 1.
        of_distances: nearest is what has the least Euclidean distance, not the highest product. For the order,
            the squared distance is the vector's, which counts for nothing, less twice (product - half the centroid's).
    """

    def __init__(self, centroids: np.ndarray, of_distances: bool = False):
        self.centroids = centroids
        self._offset = np.einsum("ij,ij->i", centroids, centroids) / 2 if of_distances else None
        self._narrow = centroids.astype(np.float32)
        self._narrow_offset = None if self._offset is None else self._offset.astype(np.float32)
        self._margin = np.float32(2 * float32_error(centroids.shape[1] + 4 * of_distances))

    def places(self, tile: np.ndarray) -> np.ndarray:
        """[n] int32: which centroid is nearest to each vector, given as multiples of 1 / GRID of length 1 at most."""
        narrow = tile.astype(np.float32)
        rows = np.arange(len(tile))
        place = np.zeros(len(tile), np.int32)
        best = np.full(len(tile), -np.inf, np.float32)
        second = best.copy()
        for first, products in self._products(narrow):
            at = products.argmax(axis=1)
            highest = products[rows, at]
            products[rows, at] = -np.inf
            second = np.maximum(np.maximum(second, products.max(axis=1)), np.minimum(best, highest))
            place[highest > best] = (at + first)[highest > best]
            best = np.maximum(best, highest)
        close = np.flatnonzero(best - second <= self._margin)
        if len(close):
            place[close] = self._exact_places(tile[close], narrow[close], best[close] - self._margin)
        return place

    def _products(self, narrow: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
        """(number of the first centroid, products less the offset) in float32, TILE_CENTROIDS at a time."""
        for first in range(0, len(self._narrow), TILE_CENTROIDS):
            products = narrow @ self._narrow[first : first + TILE_CENTROIDS].T
            if self._narrow_offset is not None:
                products -= self._narrow_offset[first : first + TILE_CENTROIDS]
            yield first, products

    def _exact_places(self, tile: np.ndarray, narrow: np.ndarray, least: np.ndarray) -> np.ndarray:
        """[n] of rows for which several centroids have at least the product `least` in float32: the exactly nearest."""
        place = np.zeros(len(tile), np.int32)
        best = np.full(len(tile), -np.inf)
        for first, products in self._products(narrow):
            rows, numbers = np.nonzero(products >= least[:, None])
            numbers += first
            for start in range(0, len(rows), TILE_ROWS):
                row, number = rows[start : start + TILE_ROWS], numbers[start : start + TILE_ROWS]
                exact = np.einsum("ij,ij->i", tile[row], self.centroids[number])
                if self._offset is not None:
                    exact -= self._offset[number]
                order = np.lexsort((number, -exact, row))
                order = order[np.flatnonzero(np.diff(row[order], prepend=-1))]  # the best of each row
                order = order[exact[order] > best[row[order]]]  # an earlier one is of a lower number
                best[row[order]], place[row[order]] = exact[order], number[order]
        return place
