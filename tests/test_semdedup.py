"""SemDeDup against its rule in plain numpy, and the same whatever the order, the shards and the sizes."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.errors import WinnowError
from stages import kmeans, unit_vectors
from stages.columns import semdedup
from stages.columns.semdedup import SemDeDup, earlier_cosines
from stages.selection import uids
from stages.unit_vectors import unit
from tests.duplicates_fixture import run_stage
from tests.embedding_fixture import near_copies, vector_pool
from tests.pool_fixture import scattered_uids


def run(folder, vectors, ids, shards=3, **parameters):
    """(cluster, centroid cosine, similarity) of each vector, and facts; NaN or None where null."""
    path, columns = vector_pool(folder, vectors, ids, shards)
    _, rows, facts = run_stage(path, folder / "out", SemDeDup(embedding="vector", **parameters), columns)
    return [[row[name] for row in rows] for name in SemDeDup.adds], facts


def published(vectors, cluster, cosine, ids, keep):
    """[n] the published code's M: per cluster, the largest of the upper triangle's column, from sorted rows."""
    found = np.full(len(vectors), -1.0)
    rows = unit(vectors)
    for number in set(cluster):
        own = [at for at in range(len(vectors)) if cluster[at] == number]
        own.sort(key=lambda at: (cosine[at] if keep == "hard" else -cosine[at], ids[at]))
        similarity = np.triu(rows[own] @ rows[own].T, k=1)
        for at in range(1, len(own)):
            found[own[at]] = similarity[:at, at].max()
    return found.astype(np.float32)


@pytest.mark.parametrize("keep", ["hard", "easy"])
def test_similarities_are_those_of_the_published_rule(keep, tmp_path):
    vectors, _ = near_copies(400, 24, seed=1)
    ids = scattered_uids(400)
    (cluster, cosine, similarity), facts = run(tmp_path, vectors, ids, keep=keep, clusters=9)
    assert np.float32(similarity).tolist() == published(vectors, cluster, cosine, ids, keep).tolist()
    assert facts["clusters"] == len(set(cluster)) <= 9
    assert facts["rows_with_vectors"] == 400
    assert similarity.count(-1.0) == facts["clusters"]
    pairs = unit(vectors) @ unit(vectors).T
    assert [pairs[at].max() > 0.9 for at in range(400)].count(True) > 50


def test_the_random_order_is_by_a_hash_of_uid_and_seed(tmp_path):
    vectors, _ = near_copies(60, 8, seed=2)
    ids = [f"{number:032x}" for number in range(60)]
    numbers = uids.parse(pa.array(ids), "")
    for seed in (0, 5):
        (_, _, similarity), _ = run(tmp_path / str(seed), vectors, ids, keep="random", clusters=1, seed=seed)
        order = np.argsort(uids.hash64(numbers, seed, semdedup.ORDER_STREAM))
        rows = unit(vectors)[order]
        expected = [-1.0, *((rows[:at] @ rows[at]).max() for at in range(1, 60))]
        assert np.float32(similarity)[order].tolist() == np.float32(expected).tolist()


def test_planted_copies_are_found_and_nothing_else(tmp_path):
    vectors, original = near_copies(500, 64, seed=3, noise=0.02)
    ids = [f"{number:032x}" for number in range(500)]
    (cluster, _, similarity), _ = run(tmp_path, vectors, ids)
    assert len(set(cluster)) > 15
    dropped = np.array(similarity) > 0.95
    groups = {}
    for at, source in enumerate(original):
        groups.setdefault((source, cluster[at]), []).append(at)
    assert all(dropped[own].sum() == len(own) - 1 for own in groups.values())
    assert dropped.sum() > 80


def test_order_shards_tiles_and_partitions_change_nothing(tmp_path, monkeypatch):
    vectors, _ = near_copies(300, 32, seed=4)
    vectors[7] = vectors[200]
    ids = scattered_uids(300)
    first, facts = run(tmp_path / "a", vectors, ids, clusters=12)
    order = np.random.default_rng(0).permutation(300)
    monkeypatch.setattr(semdedup, "PIECE_ROWS", 50)
    monkeypatch.setattr(semdedup, "PARTITION_ROWS", 40)
    monkeypatch.setattr(semdedup, "TILE_ROWS", 5)
    monkeypatch.setattr(kmeans, "PART_ROWS", 70)
    monkeypatch.setattr(kmeans, "TILE_ROWS", 17)
    monkeypatch.setattr(kmeans, "TILE_CENTROIDS", 5)
    monkeypatch.setattr(unit_vectors, "CACHED_ROWS", 3)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (120,))
    again, other = run(tmp_path / "b", vectors[order], [ids[at] for at in order], shards=8, clusters=12)
    for one, two in zip(first, again, strict=True):
        assert [one[at] for at in order] == two
    assert {**facts, "shards": None} == {**other, "shards": None}


def test_a_sample_trains_the_same_centroids_in_any_order(tmp_path, monkeypatch):
    monkeypatch.setattr(kmeans, "ROWS_A_CLUSTER", 10)
    vectors, _ = near_copies(300, 16, seed=5)
    ids = scattered_uids(300)
    first, _ = run(tmp_path / "a", vectors, ids, clusters=8)
    again, _ = run(tmp_path / "b", vectors[::-1], ids[::-1], shards=5, clusters=8)
    assert [column[::-1] for column in again] == first
    other, _ = run(tmp_path / "c", vectors, ids, clusters=8, seed=1)
    assert other[0] != first[0]


def test_equal_vectors_are_one_apart_in_order_only(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(6, 16)).astype(np.float16)
    vectors[4] = vectors[1]
    ids = [f"{9 - number:032x}" for number in range(6)]
    (cluster, _, similarity), _ = run(tmp_path, vectors, ids, clusters=6)
    assert cluster[1] == cluster[4]
    assert (similarity[4], similarity[1]) == (-1.0, 1.0)  # uid 5 comes before uid 8
    (cluster, cosine, similarity), _ = run(tmp_path / "b", vectors, ids, clusters=50)  # more than rows
    assert len(set(cluster)) == 5
    assert [similarity[at] for at in (0, 2, 3, 5)] == [-1.0] * 4
    assert cosine == pytest.approx([1.0] * 6)


def test_rows_without_a_vector_are_null(tmp_path):
    vectors = list(np.random.default_rng(0).normal(size=(8, 4)).astype(np.float16))
    ids = [f"{number:032x}" for number in range(8)]
    vectors[2] = None  # a failed row
    vectors[5] = np.zeros(4, np.float16)
    vectors[6] = np.array([1, np.nan, 0, 0], np.float16)
    columns, facts = run(tmp_path, vectors, ids, clusters=2)
    for column in columns:
        assert [value is None for value in column] == [at in (2, 5, 6) for at in range(8)]
    assert facts["rows_with_vectors"] == 5
    columns, facts = run(tmp_path / "none", [None, np.zeros(4, np.float16)], ids[:2])
    assert columns == [[None, None]] * 3
    assert (facts["clusters"], facts["rows_with_vectors"]) == (0, 0)


def test_columns_that_hold_no_vectors_are_named(tmp_path):
    path, columns = vector_pool(tmp_path, [np.ones(3), np.ones(3)], ["0" * 32, "1" * 32], 1)
    with pytest.raises(WinnowError, match="column caption: string, expected vectors"):
        run_stage(path, tmp_path / "a", SemDeDup(embedding="caption"), columns)
    path, columns = vector_pool(tmp_path / "b", [np.ones(3), np.ones(4)], ["0" * 32, "1" * 32], 1)
    with pytest.raises(WinnowError, match="vectors of 3 to 4 values, expected one length"):
        run_stage(path, tmp_path / "c", SemDeDup(embedding="vector"), columns)


def test_cosines_are_exact_and_equal_vectors_are_at_one():
    rng = np.random.default_rng(0)
    vectors = np.concatenate([rng.normal(size=(200, 512)), np.abs(rng.normal(size=(50, 512))), np.eye(512)[:20] * -3])
    rows = unit(vectors.astype(np.float16))
    assert (rows * 2.0**26 == np.rint(rows * 2.0**26)).all()
    cosines = rows @ rows.T
    assert (np.diag(cosines).astype(np.float32) == 1).all()
    assert cosines.astype(np.float32).max() == 1
    shuffled = rng.permutation(512)
    assert (rows[:, shuffled][:100] @ rows[:, shuffled].T == cosines[:100]).all()
    direct = vectors.astype(np.float16).astype(np.float64)
    direct /= np.linalg.norm(direct, axis=1, keepdims=True)
    assert np.abs(direct @ direct.T - cosines).max() < 2e-7
    narrow = rows.astype(np.float32)
    assert np.abs(narrow @ narrow.T - cosines).max() < unit_vectors.float32_error(512)


def test_earlier_cosines_of_one_row_and_none():
    assert earlier_cosines(lambda start, stop: np.ones((1, 3), np.float16)[start:stop], 1).tolist() == [-1.0]
    assert earlier_cosines(lambda start, stop: np.ones((0, 3), np.float16), 0).tolist() == []
