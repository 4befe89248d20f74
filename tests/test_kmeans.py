"""k-means against Lloyd's algorithm in plain float64, and the same whatever the order, the parts and the tiles."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core import exchange, pool
from pipeline.core.errors import WinnowError
from stages import kmeans
from stages.kmeans import Centroids, KMeans, exponents, on_grid, read_centroids
from stages.pool_blocks import blocks
from stages.selection import uids
from stages.unit_vectors import pieces, unit
from tests.embedding_fixture import near_copies, vector_pool
from tests.passes_fixture import passes_here
from tests.pool_fixture import scattered_uids


def trained(folder, vectors, names, shards=2, piece_rows=200, **parameters):
    """(centroids, notes) that a pool of these vectors gives."""
    path, columns = vector_pool(folder, vectors, names, shards)
    found = KMeans(**{"column": "vector", "seed": 0, "iterations": 6, **parameters}).centroids(
        pieces(blocks(path, pool.load_shards(path), columns), piece_rows), passes_here(folder / "passes")
    )
    return read_centroids(found), exchange.read_notes(found.paths)


def lloyd(vectors, names, num_clusters, iterations, metric, seed=0):
    """[k, d] float64: Lloyd's algorithm from the rows with the lowest hashes; empty clusters are not expected."""
    wide = vectors.astype(np.float64)
    if metric == "cosine":
        wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    hashed = uids.hash64(uids.parse(pa.array(names), ""), seed, kmeans.SAMPLE_STREAM)
    centroids = wide[np.argsort(hashed)[:num_clusters]]
    for _ in range(iterations):
        if metric == "cosine":
            nearest = (wide @ centroids.T).argmax(axis=1)
        else:
            nearest = ((wide[:, None] - centroids[None]) ** 2).sum(axis=2).argmin(axis=1)
        assert len(set(nearest)) == num_clusters
        centroids = np.stack([wide[nearest == number].mean(axis=0) for number in range(num_clusters)])
        if metric == "cosine":
            centroids /= np.linalg.norm(centroids, axis=1, keepdims=True)
    return centroids


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("scale", [1, 0.01, 30])
def test_centroids_are_those_of_lloyds_algorithm(metric, scale, tmp_path):
    rng = np.random.default_rng(0)
    vectors = ((rng.normal(size=(8, 12))[rng.integers(8, size=300)] + rng.normal(size=(300, 12))) * scale).astype("f2")
    for iterations in (1, 4):
        folder = tmp_path / str(iterations)
        found, notes = trained(
            folder, vectors, scattered_uids(300), num_clusters=7, iterations=iterations, metric=metric
        )
        expected = lloyd(vectors, scattered_uids(300), 7, iterations, metric)
        assert np.abs(found - expected).max() < 1e-6 * (scale if metric == "l2" else 1)
        assert (notes["sampled"], notes["iterations"], notes["empty"]) == (300, iterations, 0)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_order_shards_parts_and_tiles_change_nothing(metric, tmp_path, monkeypatch):
    vectors, _ = near_copies(400, 16, seed=1)
    vectors *= np.random.default_rng(2).uniform(0.5, 9, size=(400, 1)).astype(np.float16)
    vectors[5:20] = vectors[4]
    names = scattered_uids(400)
    parameters = {"num_clusters": 25, "metric": metric, "sample": 300, "iterations": 3}
    first, notes = trained(tmp_path / "a", vectors, names, **parameters)
    order = np.random.default_rng(0).permutation(400)
    for name, value in (("PART_ROWS", 60), ("PART_ROWS_A_CLUSTER", 1), ("TILE_ROWS", 17), ("TILE_CENTROIDS", 4)):
        monkeypatch.setattr(kmeans, name, value)
    moved = [names[at] for at in order]
    again, other = trained(tmp_path / "b", vectors[order], moved, shards=9, piece_rows=40, **parameters)
    assert (first == again).all()
    assert notes == other
    assert 250 < notes["sampled"] < 350
    seeded, _ = trained(tmp_path / "c", vectors, names, seed=1, **parameters)
    assert (seeded != first).any()


def test_samples_are_as_large_as_they_are_said_to_be(tmp_path, monkeypatch):
    vectors, _ = near_copies(500, 4, seed=3)
    for number, (sample, expected) in enumerate([(100, 100), (0.5, 250), (1.0, 500), (10**6, 500), (None, 120)]):
        monkeypatch.setattr(kmeans, "ROWS_A_CLUSTER", 30)
        _, notes = trained(
            tmp_path / str(number), vectors, scattered_uids(500), num_clusters=4, sample=sample, iterations=1
        )
        assert abs(notes["sampled"] - expected) <= (0 if expected == 500 else 45)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_training_gains_with_every_iteration_and_splits_the_largest_for_empty_clusters(metric, tmp_path):
    rng = np.random.default_rng(2)
    centres = rng.normal(size=(6, 24))
    vectors = (np.repeat(centres, 30, axis=0) + 0.1 * rng.normal(size=(180, 24))).astype(np.float16)
    names = scattered_uids(180)
    lowest = np.argsort(uids.hash64(uids.parse(pa.array(names), ""), 0, kmeans.SAMPLE_STREAM))[:6]
    vectors[lowest] = vectors[lowest[0]]  # so that all centroids start at one place
    losses = []
    for rounds in (1, 2, 3, 20):
        centroids, notes = trained(
            tmp_path / str(rounds), vectors, names, num_clusters=6, iterations=rounds, metric=metric
        )
        wide = unit(vectors) if metric == "cosine" else vectors.astype(np.float64)
        losses.append(((wide[:, None] - centroids[None]) ** 2).sum(axis=2).min(axis=1).sum())
        if rounds == 1:
            assert notes["empty"] == 5
    assert losses == sorted(losses, reverse=True)
    assert notes["empty"] == 0
    assert notes["iterations"] < 20
    assert losses[-1] < 0.5 * losses[0]


def test_a_split_takes_halves_of_what_is_the_largest_then():
    centroids = np.repeat(np.arange(1.0, 6)[:, None], 40, axis=1)
    kmeans._split(centroids, np.array([0, 8, 0, 3, 0]))
    assert (centroids[3] == 4).all()
    halves = centroids[[0, 1, 2, 4]] / 2  # 8 -> 4 + 4 -> 4 + 2 + 2 -> 2 + 2 + 2 + 2; the cluster of 3 stays
    steps = (halves - 1) / kmeans.SPLIT  # each was changed twice
    assert set(np.rint(steps).ravel()) == {-2, 0, 2}
    assert len(np.unique(halves, axis=0)) == 4
    few = np.ones((3, 2))
    kmeans._split(few, np.array([3, 0, 0]))  # 3 -> 2 + 1 -> 1 + 1 + 1
    assert len(np.unique(few)) > 1
    alone = np.arange(3.0)[:, None]
    kmeans._split(alone, np.array([1, 0, 1]))  # nothing to split
    assert alone.ravel().tolist() == [0, 1, 2]


def test_fewer_vectors_than_clusters_equal_ones_and_none(tmp_path):
    vectors = np.repeat(np.array([[3, 4, 0]], np.float16), 5, axis=0)
    for metric, length in (("l2", 5), ("cosine", 1)):
        found, notes = trained(tmp_path / metric, vectors, scattered_uids(5), num_clusters=3, metric=metric)
        assert found.shape == (3, 3)
        assert notes["empty"] == 2
        assert np.linalg.norm(found, axis=1) == pytest.approx([length] * 3, rel=2e-3)
        few, notes = trained(tmp_path / f"few {metric}", vectors, scattered_uids(5), num_clusters=9, metric=metric)
        assert len(few) == 5
        none, notes = trained(
            tmp_path / f"none {metric}", [None, np.zeros(3)], scattered_uids(2), num_clusters=2, metric=metric
        )
        assert none.shape == (0, 0)
        assert (notes["sampled"], notes["iterations"]) == (0, 1)
        one, _ = trained(tmp_path / f"one {metric}", vectors[:1], scattered_uids(1), num_clusters=1, metric=metric)
        assert one[0] == pytest.approx(np.array([3, 4, 0]) / (1 if metric == "l2" else 5))
    opposite = np.stack([vectors[0], -vectors[0]])
    found, _ = trained(tmp_path / "opposite", opposite, scattered_uids(2), num_clusters=1, metric="cosine")
    assert np.isfinite(found).all()


def test_a_killed_training_goes_on_where_it_was(tmp_path):
    vectors, _ = near_copies(200, 8, seed=4)
    parameters = {"num_clusters": 12, "metric": "l2", "iterations": 5}
    whole, notes = trained(tmp_path / "a", vectors, scattered_uids(200), **parameters)
    trained(tmp_path / "b", vectors, scattered_uids(200), **{**parameters, "iterations": 2})
    for name in ("sample", "sums_002"):  # as if the kill had come before these were dropped
        folder = tmp_path / "b" / "passes" / name
        for file in folder.iterdir():
            file.unlink()
    path = tmp_path / "b" / "passes" / "centroids_002" / "00000.arrow"
    path.unlink()
    again, other = trained(tmp_path / "b", vectors, scattered_uids(200), **parameters)
    assert (again == whole).all()
    assert notes == other


@pytest.mark.parametrize("num_dimensions", [3, 32])
def test_the_nearest_centroid_is_the_lowest_of_equal_ones(num_dimensions):
    rng = np.random.default_rng(1)
    vectors = (rng.normal(size=(500, num_dimensions)) * rng.uniform(0.1, 40, size=(500, 1))).astype(np.float16)
    centroids = (rng.normal(size=(40, num_dimensions)) * rng.uniform(0.1, 9, size=(40, 1))).astype(np.float32)
    centroids[4] *= 40 / np.linalg.norm(centroids[4])
    centroids[30] = centroids[4]
    wide = vectors.astype(np.float64)
    by_cosine = wide / np.linalg.norm(wide, axis=1, keepdims=True)
    lengths = np.linalg.norm(centroids.astype(np.float64), axis=1)
    for metric, products in (
        ("cosine", by_cosine @ (centroids / lengths[:, None]).T),
        ("l2", wide @ centroids.astype(np.float64).T),
    ):
        products[:, 30] = -np.inf  # equal to 4
        cluster, similarity = Centroids(centroids, metric).nearest(vectors)
        assert cluster.tolist() == products.argmax(axis=1).tolist()
        assert similarity == pytest.approx(products.max(axis=1), rel=1e-6, abs=1e-7)
        assert 4 in cluster
    with pytest.raises(WinnowError, match="vectors of 2 values and centroids of"):
        Centroids(centroids, "l2").nearest(np.ones((1, 2), np.float16))


@pytest.mark.parametrize("of_distances", [True, False])
def test_many_equal_and_nearly_equal_centroids_are_told_apart_exactly(of_distances, monkeypatch):
    rng = np.random.default_rng(5)
    centroids = on_grid(rng.normal(size=(60, 8)), 3)
    centroids[rng.integers(60, size=20)] = centroids[7]
    centroids[rng.integers(60, size=20)] = centroids[7] + 2.0**-26 * rng.integers(-2, 3, size=(20, 8))
    rows = on_grid(rng.normal(size=(200, 8)), 3)
    exact = rows @ centroids.T - (centroids**2).sum(axis=1) / 2 * of_distances
    for tile_rows, tile_centroids in ((4096, 8192), (7, 11)):
        monkeypatch.setattr(kmeans, "TILE_ROWS", tile_rows)
        monkeypatch.setattr(kmeans, "TILE_CENTROIDS", tile_centroids)
        assert kmeans._Search(centroids, of_distances).places(rows).tolist() == exact.argmax(axis=1).tolist()


def test_products_are_exact_after_scaling():
    rng = np.random.default_rng(0)
    vectors = (rng.normal(size=(100, 512)) * 7).astype(np.float16)
    power = exponents(vectors)
    scaled = on_grid(vectors, power)
    lengths = np.linalg.norm(vectors.astype(np.float64), axis=1)
    assert (lengths < 2.0**power).all()
    assert (lengths >= 2.0 ** (power - 1)).all()
    assert np.abs(scaled * 2.0 ** power[:, None] - vectors).max() <= 2.0 ** (power.max() - 27)
    products = scaled @ scaled.T
    shuffled = rng.permutation(512)
    assert (scaled[:, shuffled] @ scaled[:, shuffled].T == products).all()
    unscaled = (rng.normal(size=(20, 8)) / 4).astype(np.float16)
    assert (on_grid(unscaled, exponents(unscaled)) * 2.0 ** exponents(unscaled)[:, None] == unscaled).all()
    assert exponents(np.zeros((1, 3))).tolist() == [0]
