"""The nearest other rows of each row of a pool, by vectors that are made of one or several columns.

A point is a row that has a finite score and a vector in every column; its vectors, each at length 1, are laid side by
side. The squared distance of two points is the sum of 2 - 2 cosine over the columns.

Up to EXACT_ROWS points all pairs are compared. Beyond that, points are dealt to clusters (spherical k-means of a
sample), and each looks for its neighbours among those of the `probes` clusters whose centroids are nearest to it: an
inverted file without compression. What is found this way has its true distance; what is missed is a neighbour in
another cluster. benchmarks/d2.py measures the recall.

The same neighbours come out whatever the order of rows and shards, the blocks, the tiles and the threads: cosines are
exact (stages/unit_vectors.py), screened in float32 where that decides, and equal ones are ranked by uid.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from pipeline.core import exchange
from pipeline.core.errors import WinnowError
from pipeline.core.passes import Pass, Passes
from stages.kmeans import Centroids, KMeans, highest_hash, read_centroids, write_sampled
from stages.pool_blocks import Block
from stages.row_scores import read_scores, write_scores
from stages.unit_vectors import Gathered, Vectors, float32_error, packed, pieces, read_vectors, unit, unpacked

SAMPLE_STREAM = 24  # of the seed: see uids.hash64
EXACT_ROWS = 100_000  # points up to which all pairs are compared
PIECE_ROWS = 50_000  # points whose vectors a task holds while it looks for their clusters, unless a shard has more
PARTITION_ROWS = 500_000  # about as many points of whole clusters are searched by one task
SHARE_ROWS = 20_000  # points that a task looks for the neighbours of where all pairs are compared
ROWS_A_CLUSTER = 64  # that centroids are trained on
MOST_SAMPLED = 131_072
ITERATIONS = 10
TILE_ROWS = 1024
TILE_MEMBERS = 4096
MOST_FOUND = 4_000_000  # pairs that wait in memory for the nearest of each row to be taken: 40 bytes each
ITSELF = -2.0  # instead of a cosine


@dataclass(frozen=True)
class Search:
    """What is looked for.

    Args:
        columns: of vectors.
        score: a column without a number in which a row is no point.
        neighbours: how many for each point.
        probes: clusters that each point looks into, where not all pairs are compared.
        seed: of the sample that the clusters come from.
    """

    columns: tuple[str, ...]
    score: str
    neighbours: int
    probes: int
    seed: int


@dataclass(frozen=True)
class Points(Vectors):
    """Rows with a finite `score` [n] float64, and with their vectors as stored, side by side."""

    score: np.ndarray


def find_neighbours(search: Search, blocks: Sequence[Block], work: Passes) -> tuple[Pass, Pass, dict[str, int]]:
    """(points, neighbours, facts), the passes in the order of the pool's rows.

    points: (row, high, low, score). neighbours: (row, other, cosine), as many for each point as were found, the nearest
    first; the squared distance is 2 (1 - cosine) a column. facts: how many `points` there are, into how many `clusters`
    they were dealt, and how many were `sampled` for that (0: all pairs were compared).
    """
    parts = pieces(blocks, PIECE_ROWS)
    points = work.run("points", write_points, [(block, search) for block in parts])
    num_points = exchange.read_notes(points.paths)["rows"]
    num_partitions = num_shares = num_clusters = 1
    facts, centroids = {"sampled": 0}, None
    if num_points > EXACT_ROWS:
        num_clusters = choose_clusters(num_points, search.probes)
        num_partitions = min(num_clusters, -(-num_points // PARTITION_ROWS))
        centroids = find_centroids(search, parts, num_points, num_clusters, work)
        facts = exchange.read_notes(centroids.paths)
    else:
        num_shares = max(1, -(-num_points // SHARE_ROWS))
    dealt = work.run("dealt", write_dealt, [(block, search, centroids, num_partitions) for block in parts])
    starts = np.array([block.first_row for block in parts], np.uint64)
    shares = itertools.product(range(num_partitions), range(num_shares))
    items = [(dealt, partition, share, num_shares, search, starts) for partition, share in shares]
    near = work.run("near", write_near, items)
    work.drop(dealt)
    neighbours = work.run("neighbours", write_nearest, [(near, block.number, search) for block in parts])
    work.drop(near)
    return points, neighbours, {"points": num_points, "clusters": num_clusters, "sampled": facts["sampled"]}


def find_centroids(search: Search, parts: Sequence[Block], num_points: int, num_clusters: int, work: Passes) -> Pass:
    """The pass of one file with the centroids of a sample of the points: see stages.kmeans.read_centroids."""
    kmeans = KMeans(", ".join(search.columns), num_clusters, search.seed, ITERATIONS)
    highest = highest_hash(min(MOST_SAMPLED, ROWS_A_CLUSTER * num_clusters), num_points)
    sample = work.run("sample", write_sample, [(block, search, highest) for block in parts])
    return kmeans.trained(sample, [sample.paths], work)


def choose_clusters(num_points: int, probes: int) -> int:
    """sqrt(probes x points), rounded: finding a point's clusters then costs as much as searching them."""
    return max(1, min(MOST_SAMPLED // 8, round((probes * num_points) ** 0.5)))


def read_points(block: Block, search: Search) -> Iterator[Points]:
    """The points of each shard. Raises WinnowError as read_vectors and read_scores do, and where lengths differ."""
    readers = [read_vectors(block, column) for column in search.columns]
    lengths: dict[str, int] = {}
    for scores, *columns in zip(read_scores(block, search.score), *readers, strict=True):
        row = scores.row
        for vectors in columns:
            row = np.intersect1d(row, vectors.row, assume_unique=True)
        places = np.searchsorted(scores.row, row)
        found = [vectors.vector[np.searchsorted(vectors.row, row)] for vectors in columns]
        if len(row):
            lengths |= {column: part.shape[1] for column, part in zip(search.columns, found, strict=True)}
            if len(set(lengths.values())) > 1:
                listed = ", ".join(f"{column} {length}" for column, length in lengths.items())
                raise WinnowError(f"pool {block.pool_path}: vectors of lengths {listed}, expected one length")
        vector = np.concatenate(found, axis=1) if len(row) else np.empty((0, 0), np.float16)
        yield Points(row, scores.uid[places], vector, scores.score[places])


def point_vectors(vectors: np.ndarray, num_columns: int) -> np.ndarray:
    """[n, d] float64 of length 1 whose cosines are the means of the columns' cosines: see stages/unit_vectors.py.

    Args:
        vectors: [n, d] float16, of num_columns vectors of the same length side by side.
    """
    return unit(np.concatenate([unit(part) for part in np.split(vectors, num_columns, axis=1)], axis=1))


def write_points(block: Block, search: Search, path: str) -> None:
    """None; writes (row, high, low, score) of the block's points."""
    write_scores(path, read_points(block, search))


def write_sample(block: Block, search: Search, highest: int, path: str) -> None:
    """None; writes the block's points with a hash of at most `highest`: see stages.kmeans.write_sampled."""
    write_sampled(path, read_points(block, search), search.seed, SAMPLE_STREAM, highest)


def write_dealt(block: Block, search: Search, centroids: Pass | None, num_partitions: int, path: str) -> None:
    """None; writes (row, high, low, clusters, vector) of the block's points, by each partition that they look into.

    `clusters` [probes] int32 are those of the partition that a point looks into, -1 instead of others; the first one is
    the point's own, and -1 in all partitions but that of its own cluster. A cluster belongs to the partition of that
    one of the first num_partitions centroids which is nearest, so that most of a point's clusters share a partition.

    Args:
        centroids: see find_centroids; None: all points are in cluster 0.
    """
    centres = partition_of = None
    if centroids is not None:
        narrow = read_centroids(centroids)
        centres, partition_of = unit(narrow), Centroids(narrow[:num_partitions], "cosine").nearest(narrow)[0]
    tables, partitions = [], []
    for points in read_points(block, search):
        if not len(points):
            continue
        if centres is None:
            clusters = np.zeros((len(points), 1), np.int32)
            place, partition = np.arange(len(points)), np.zeros(len(points), np.int64)
        else:
            clusters = _nearest_clusters(points.vector, len(search.columns), centres, search.probes)
            wanted = np.arange(len(points))[:, None] * len(centres) + partition_of[clusters]
            place, partition = np.divmod(np.unique(wanted), len(centres))
            clusters = np.where(partition_of[clusters[place]] == partition[:, None], clusters[place], -1)
        own = points.take(place)
        vectors = {"clusters": packed(clusters.astype(np.int32)), "vector": packed(own.vector)}
        tables.append(pa.table({**own.columns(), **vectors}))
        partitions.append(partition)
    table = pa.concat_tables(tables) if tables else pa.table({})
    columns = {name: table[name] for name in table.column_names}
    exchange.write(path, columns, np.concatenate(partitions) if tables else None)


def _nearest_clusters(vectors: np.ndarray, num_columns: int, centres: np.ndarray, probes: int) -> np.ndarray:
    """[n, probes] int64 of each point's nearest clusters, the nearest first; equally near ones by number."""
    found = []
    narrow = centres.astype(np.float32)
    for start in range(0, len(vectors), TILE_ROWS):
        tile = point_vectors(vectors[start : start + TILE_ROWS], num_columns)
        place, cosine = _highest(tile, centres, narrow, np.full(len(tile), -1), probes)
        order = np.lexsort((place, -cosine), axis=1)
        found.append(np.take_along_axis(place, order, axis=1))
    return np.concatenate(found)


def write_near(
    dealt: Pass, partition: int, share: int, num_shares: int, search: Search, starts: np.ndarray, path: str
) -> None:
    """None; writes (row, other, cosine, high and low of the other's uid) by row's part.

    Of the points that look into the partition (a share of them), the nearest ones in it.

    Args:
        starts: [parts] uint64, first rows of the pool's parts.
    """
    tables = list(exchange.read_each(dealt.paths, partition))
    best = _Best(search.neighbours)
    if tables:
        row, high, low = (
            np.concatenate([table[name].to_numpy() for table in tables]) for name in ("row", "high", "low")
        )
        clusters = np.concatenate([unpacked(table["clusters"], np.int32) for table in tables])
        vectors = Gathered([unpacked(table["vector"]) for table in tables])
        by_uid = np.lexsort((low, high))
        row, high, low, clusters = row[by_uid], high[by_uid], low[by_uid], clusters[by_uid]
        bounds = share * len(row) // num_shares, (share + 1) * len(row) // num_shares
        members = _by_cluster(clusters[:, :1], 0, len(row))
        for cluster, looking in _by_cluster(clusters, *bounds).items():
            inside = members.get(cluster, np.empty(0, np.int64))
            for first in range(0, len(inside), TILE_MEMBERS):
                own = inside[first : first + TILE_MEMBERS]
                member = point_vectors(vectors.take(by_uid[own]), len(search.columns))
                narrow = member.astype(np.float32)
                for start in range(0, len(looking), TILE_ROWS):
                    queries = looking[start : start + TILE_ROWS]
                    query = point_vectors(vectors.take(by_uid[queries]), len(search.columns))
                    at = np.minimum(np.searchsorted(own, queries), len(own) - 1)
                    itself = np.where(own[at] == queries, at, -1)
                    place, cosine = _highest(query, member, narrow, itself, search.neighbours)
                    kept = np.nonzero(cosine > ITSELF)
                    other = own[place[kept]]
                    best.add(row[queries[kept[0]]], row[other], cosine[kept], high[other], low[other])
    columns = best.taken()
    exchange.write(path, columns, np.searchsorted(starts, columns["row"], side="right") - 1)


def _by_cluster(clusters: np.ndarray, start: int, stop: int) -> dict[int, np.ndarray]:
    """{cluster: the points from `start` to `stop` that name it, ascending}."""
    place, column = np.nonzero(clusters[start:stop] >= 0)
    named = clusters[start:stop][place, column]
    order = np.argsort(named, kind="stable")
    bounds = np.flatnonzero(np.diff(named[order], prepend=-1, append=-1))
    return {int(named[order[first]]): place[order[first:last]] + start for first, last in itertools.pairwise(bounds)}


def _highest(
    query: np.ndarray, member: np.ndarray, narrow: np.ndarray, itself: np.ndarray, num: int
) -> tuple[np.ndarray, np.ndarray]:
    """([n, num], [n, num]): places of the members with the highest cosines, in any order, and those cosines, exact.

    Of equal cosines, the first places; `num` is less where there are fewer members.

    Args:
        query, member: what point_vectors gives.
        narrow: the members in float32.
        itself: [n] the query's place among the members, or -1; its cosine is ITSELF.
    """
    num = min(num, len(member))
    known = np.flatnonzero(itself >= 0)
    place = np.broadcast_to(np.arange(num), (len(query), num)).copy()
    if num < len(member):
        cosines = query.astype(np.float32) @ narrow.T
        cosines[known, itself[known]] = ITSELF
        place = np.argpartition(-cosines, num, axis=1)[:, : num + 1]
        highest = np.take_along_axis(cosines, place, axis=1)
        gap = highest[:, :num].min(axis=1) - highest[:, num]
        place = place[:, :num]
        unclear = np.flatnonzero(gap <= 2 * float32_error(query.shape[1]))
        if len(unclear):
            exact = query[unclear] @ member.T
            there = np.flatnonzero(itself[unclear] >= 0)
            exact[there, itself[unclear[there]]] = ITSELF
            place[unclear] = np.argsort(-exact, axis=1, kind="stable")[:, :num]
    cosine = np.empty(place.shape)
    for column in range(num):
        cosine[:, column] = np.einsum("ij,ij->i", query, member[place[:, column]])
    cosine[place == itself[:, None]] = ITSELF
    return place, cosine


class _Best:
    """The nearest others of each row: at most num, equally near ones by uid."""

    def __init__(self, num: int):
        self._num = num
        kinds = {"row": np.uint64, "other": np.uint64, "cosine": np.float64, "high": np.uint64, "low": np.uint64}
        self._parts = [{name: np.empty(0, kind) for name, kind in kinds.items()}]
        self._waiting, self._most = 0, MOST_FOUND

    def add(self, row: np.ndarray, other: np.ndarray, cosine: np.ndarray, high: np.ndarray, low: np.ndarray) -> None:
        """None; takes in pairs, with the uid of the other."""
        self._parts.append({"row": row, "other": other, "cosine": cosine, "high": high, "low": low})
        self._waiting += len(row)
        if self._waiting > self._most:
            self._parts = [self.taken()]
            self._waiting = len(self._parts[0]["row"])
            self._most = max(MOST_FOUND, 2 * self._waiting)

    def taken(self) -> dict[str, np.ndarray]:
        """{row, other, cosine, high, low}, by row, the nearest first."""
        whole = {name: np.concatenate([part[name] for part in self._parts]) for name in self._parts[0]}
        order = np.lexsort((whole["low"], whole["high"], -whole["cosine"], whole["row"]))
        kept = order[place_in_run(whole["row"][order]) < self._num]
        return {name: values[kept] for name, values in whole.items()}


def place_in_run(values: np.ndarray) -> np.ndarray:
    """[n] int64: how many equal values come right before each one."""
    starts = np.flatnonzero(np.diff(values, prepend=~values[:1]))
    return np.arange(len(values)) - np.repeat(starts, np.diff(starts, append=len(values)))


def write_nearest(near: Pass, number: int, search: Search, path: str) -> None:
    """None; writes (row, other, cosine) of a part's points: the nearest of all that were found."""
    table = exchange.read(near.paths, number)
    best = _Best(search.neighbours)
    if table is not None:
        best.add(*(table[name].to_numpy() for name in ("row", "other", "cosine", "high", "low")))
    columns = best.taken()
    exchange.write(path, {name: columns[name] for name in ("row", "other", "cosine")})
