"""Density-based pruning against its formula in plain loops, and its projection against a solver and all choices."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest
from scipy.optimize import lsq_linear

from pipeline.core.errors import ConfigError, WinnowError
from stages.columns import density_pruning
from stages.columns.clusters import Clusters
from stages.columns.density_pruning import DensityPruning, mean_neighbour_distances, quotas
from stages.unit_vectors import unit
from tests.duplicates_fixture import run_stage
from tests.embedding_fixture import near_copies, vector_pool
from tests.pool_fixture import scattered_uids, write_columns


def run(folder, vectors, cluster, names, shards=3, **parameters):
    """(kept, rank, facts), values in the rows' order."""
    path, columns = vector_pool(folder, vectors, names, shards)
    columns |= write_columns(folder / "c", path, {"cluster_id": pa.array(cluster, pa.int32())})
    _, rows, facts = run_stage(path, folder / "out", DensityPruning(embedding="vector", **parameters), columns)
    return [row["density_kept"] for row in rows], [row["density_rank"] for row in rows], facts


def published(vectors, cluster, names, fraction, temperature, neighbours):
    """(kept, rank): the paper's rule in plain loops, its quadratic programme solved by scipy, then rounded to the sum."""
    rows = vectors.astype(np.float64)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    numbers = sorted(set(cluster))
    members = {number: [at for at in range(len(rows)) if cluster[at] == number] for number in numbers}
    centroids = {number: rows[members[number]].sum(axis=0) for number in numbers}
    centroids = {number: vector / np.linalg.norm(vector) for number, vector in centroids.items()}
    distance = [1 - rows[at] @ centroids[cluster[at]] for at in range(len(rows))]
    intra = [np.mean([distance[at] for at in members[number]]) for number in numbers]
    inter = []
    for number in numbers:
        others = sorted(1 - centroids[number] @ centroids[other] for other in numbers if other != number)
        inter.append(np.mean(others[:neighbours]))
    complexity = [a * b for a, b in zip(intra, inter, strict=True)]
    share = [math.exp(value / temperature) for value in complexity]
    num_kept = round(fraction * len(rows))
    wanted = np.array(share) / sum(share) * num_kept
    sizes = [len(members[number]) for number in numbers]
    kept_of = dict(zip(numbers, rounded(solved(wanted, sizes, num_kept), num_kept), strict=True))
    kept, rank = [False] * len(rows), [0] * len(rows)
    for number in numbers:
        for place, at in enumerate(sorted(members[number], key=lambda at: (-distance[at], names[at]))):
            kept[at], rank[at] = place < kept_of[number], place
    return kept, rank


def solved(wanted, sizes, num_kept):
    """The x nearest to `wanted` with this sum and min(1, N_j - 1) <= x_j <= N_j, by a general solver.

    The sum is one more row of the least squares, of so much weight that it holds within about 1e-8.
    """
    rows = np.vstack([np.eye(len(sizes)), np.full(len(sizes), 1e5)])
    bounds = [min(1, size - 1) for size in sizes], sizes
    found = lsq_linear(rows, np.append(wanted, 1e5 * num_kept), bounds, method="bvls", tol=1e-15, max_iter=1000)
    assert found.x.sum() == pytest.approx(num_kept, abs=1e-6)
    return found.x


def rounded(x, total):
    """Whole numbers with this sum: the largest remainders are rounded up."""
    whole = [math.floor(value + 1e-6) for value in x]
    for at in sorted(range(len(x)), key=lambda at: whole[at] - x[at])[: total - sum(whole)]:
        whole[at] += 1
    return whole


@pytest.mark.parametrize(("fraction", "temperature", "neighbours"), [(0.5, 0.1, 20), (0.3, 0.02, 2), (0.9, 0.5, 3)])
def test_rows_kept_are_those_of_the_published_rule(fraction, temperature, neighbours, tmp_path):
    rng = np.random.default_rng(int(10 * fraction))
    centres = rng.normal(size=(9, 10))
    cluster = np.minimum(rng.geometric(0.25, size=260) - 1, 8)
    cluster[:4] = (15, 12, 12, 12)  # of one row and of few; of two, both are equally far but for rounding
    spread = rng.uniform(0.1, 2, size=16)
    centres = rng.normal(size=(16, 10))
    vectors = (centres[cluster] + spread[cluster, None] * rng.normal(size=(260, 10))).astype(np.float16)
    parameters = {"fraction": fraction, "temperature": temperature, "neighbours": neighbours}
    kept, rank, facts = run(tmp_path, vectors, cluster, scattered_uids(260), **parameters)
    expected, places = published(vectors, cluster.tolist(), scattered_uids(260), fraction, temperature, neighbours)
    assert kept == expected
    assert rank == places
    assert facts["kept_rows"] == sum(kept) == round(fraction * 260)
    assert (facts["clusters"], facts["rows_with_clusters"]) == (len(set(cluster)), 260)


def test_quotas_are_the_solvers_and_meet_their_sum():
    rng = np.random.default_rng(0)
    for _ in range(60):
        num = int(rng.integers(2, 12))
        counts = rng.integers(1, 40, size=num)
        complexity = rng.random(num)
        temperature = float(rng.choice([0.02, 0.1, 0.5]))
        lower = int(np.minimum(1, counts - 1).sum())
        num_kept = int(rng.integers(lower, counts.sum() + 1))
        found = quotas(complexity, counts, num_kept, temperature)
        share = np.exp(complexity / temperature)
        exact = solved(share / share.sum() * num_kept, counts.tolist(), num_kept)
        assert found.sum() == num_kept
        assert (found >= np.minimum(1, counts - 1)).all()
        assert (found <= counts).all()
        assert np.abs(found - exact).max() < 1 + 1e-4


def test_no_other_whole_numbers_are_nearer():
    rng = np.random.default_rng(1)
    for _ in range(60):
        counts = rng.integers(1, 6, size=4)
        complexity = rng.random(4)
        lower = np.minimum(1, counts - 1)
        num_kept = int(rng.integers(lower.sum(), counts.sum() + 1))
        share = np.exp(complexity / 0.1)
        wanted = share / share.sum() * num_kept
        choices = [
            x
            for x in itertools.product(*(range(low, high + 1) for low, high in zip(lower, counts, strict=True)))
            if sum(x) == num_kept
        ]
        best = min(((np.array(x) - wanted) ** 2).sum() for x in choices)
        assert ((quotas(complexity, counts, num_kept, 0.1) - wanted) ** 2).sum() == pytest.approx(best)


def test_quotas_at_the_edges():
    assert quotas(np.zeros(1), np.array([7]), 3, 0.1).tolist() == [3]
    assert quotas(np.zeros(3), np.array([2, 2, 2]), 4, 0.1).tolist() == [2, 1, 1]  # equal remainders: the first
    assert quotas(np.zeros(3), np.array([1, 1, 1]), 0, 0.1).tolist() == [0, 0, 0]  # of one row may lose it
    assert quotas(np.array([0, 500.0]), np.array([50, 50]), 60, 0.1).tolist() == [10, 50]  # exp(5000) is no number
    assert quotas(np.array([0, 500.0]), np.array([50, 50]), 30, 0.1).tolist() == [1, 29]
    counts = np.random.default_rng(0).integers(1, 10**7, size=1000)
    found = quotas(np.random.default_rng(1).random(1000), counts, int(counts.sum() // 3), 0.1)
    assert found.sum() == counts.sum() // 3
    assert quotas(np.random.default_rng(1).random(1000), counts, int(counts.sum()), 0.1).tolist() == counts.tolist()
    with pytest.raises(WinnowError, match="fraction: 1 of 6 rows, expected at least the 3 clusters of two rows"):
        quotas(np.zeros(3), np.array([2, 2, 2]), 1, 0.1)


def test_distances_to_neighbours():
    centroids = unit(np.random.default_rng(0).normal(size=(30, 6)))
    centroids[7] = centroids[3]  # a copy is a neighbour, not the centroid itself
    for neighbours in (1, 4, 29, 50):
        expected = []
        for at in range(30):
            others = sorted(1 - centroids[at] @ centroids[other] for other in range(30) if other != at)[:neighbours]
            expected.append(sum(others) / len(others))
        assert mean_neighbour_distances(centroids, neighbours) == pytest.approx(expected, abs=1e-8)
    assert mean_neighbour_distances(centroids, 1)[[3, 7]] == pytest.approx([0, 0], abs=1e-8)
    assert mean_neighbour_distances(centroids[:1], 20).tolist() == [0]


def test_order_shards_and_partitions_change_nothing(tmp_path, monkeypatch):
    vectors, _ = near_copies(240, 12, seed=2)
    vectors[50:60] = vectors[49]  # equally far: by uid
    path, columns = vector_pool(tmp_path, vectors, scattered_uids(240), 2)
    _, rows, _ = run_stage(path, tmp_path / "k", Clusters(embedding="vector", clusters=9, metric="cosine"), columns)
    cluster = [row["cluster_id"] for row in rows]
    first = run(tmp_path / "a", vectors, cluster, scattered_uids(240), fraction=0.4)
    order = np.random.default_rng(0).permutation(240)
    monkeypatch.setattr(density_pruning, "PIECE_ROWS", 50)
    monkeypatch.setattr(density_pruning, "PARTITION_ROWS", 60)
    monkeypatch.setattr(density_pruning, "TILE_ROWS", 12)
    moved = [scattered_uids(240)[at] for at in order]
    again = run(tmp_path / "b", vectors[order], [cluster[at] for at in order], moved, 7, fraction=0.4)
    for one, two in zip(first[:2], again[:2], strict=True):
        assert [one[at] for at in order] == two
    assert sum(first[0]) == 96


def test_rows_without_a_vector_or_a_cluster_are_null(tmp_path):
    vectors = list(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float16))
    vectors[2], vectors[5] = None, np.zeros(4, np.float16)
    cluster = [0, 3, None, 0, None, 3, 3, 0]
    kept, rank, facts = run(tmp_path / "a", vectors, cluster, scattered_uids(8), fraction=0.8)
    for column in (kept, rank):
        assert [value is None for value in column] == [at in (2, 4, 5) for at in range(8)]
    assert (kept.count(True), facts["rows_with_clusters"], facts["clusters"]) == (4, 5, 2)
    kept, rank, facts = run(tmp_path / "b", [None, vectors[0]], [None, None], scattered_uids(2))
    assert (kept, rank, facts["clusters"], facts["kept_rows"]) == ([None] * 2, [None] * 2, 0, 0)
    kept, rank, _ = run(tmp_path / "c", vectors[:1], [4], scattered_uids(1), fraction=1.0)
    assert (kept, rank) == ([True], [0])
    opposite = np.array([[1, 0], [-1, 0], [0, 1]], np.float16)  # two that cancel out have no mean direction
    kept, _, _ = run(tmp_path / "d", opposite, [0, 0, 1], scattered_uids(3), fraction=0.67)
    assert kept.count(True) == 2


def test_what_does_not_fit_is_named(tmp_path, monkeypatch):
    vectors = np.ones((2, 4), np.float16)
    with pytest.raises(WinnowError, match="column cluster_id: -1 to 0, expected 0 to"):
        run(tmp_path / "a", vectors, [-1, 0], scattered_uids(2))
    with pytest.raises(WinnowError, match="fraction: 0 of 2 rows, expected at least the 1 clusters"):
        run(tmp_path / "b", vectors, [0, 0], scattered_uids(2), fraction=0.1)
    path, columns = vector_pool(tmp_path / "c", [np.ones(3), np.ones(4)], scattered_uids(2), 2)
    columns |= write_columns(tmp_path / "c", path, {"cluster_id": pa.array([0, 0], pa.int32())})
    monkeypatch.setattr(density_pruning, "PIECE_ROWS", 1)
    with pytest.raises(WinnowError, match="vectors of 3 to 4 values, expected one length"):
        run_stage(path, tmp_path / "d", DensityPruning(embedding="vector"), columns)
    stage = DensityPruning(clusters="fine")
    assert stage.needs == ("clip_image", "fine_cluster_id")
    with pytest.raises(ConfigError, match="fine_cluster_id is of type string, expected the cluster_id"):
        stage.check_needs({"clip_image": "float16[]", "fine_cluster_id": "string"}, {})
