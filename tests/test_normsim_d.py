"""NormSim-D against its rounds in plain numpy, and the same whatever the order, the shards and the sizes."""

from __future__ import annotations

import math

import numpy as np
import pytest

from pipeline.core.errors import ConfigError, WinnowError
from stages import build_stage, second_moment
from stages.columns import normsim_d
from stages.columns.normsim_d import NormSimD
from stages.second_moment import SecondMoment, quadratic_forms
from stages.unit_vectors import unit
from tests.duplicates_fixture import fit_in_two, run_stage
from tests.embedding_fixture import vector_pool
from tests.pool_fixture import random_uids


def run(folder, vectors, ids, shards=3, **parameters):
    """(kept, round) of each row, and facts."""
    path, columns = vector_pool(folder, vectors, ids, shards)
    stage = build_stage("normsim_d", {"embedding": "vector", **parameters}, "normsim_d")
    _, rows, facts = run_stage(path, folder / "out", stage, columns)
    return [row["normsim_d_kept"] for row in rows], [row["normsim_d_round"] for row in rows], facts


def published(vectors, ids, target, iterations):
    """[n] the round that drops each row, the next number for those left: every score anew in every round."""
    rows = np.float64(vectors)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    left, found, number = list(range(len(rows))), np.zeros(len(rows), int), 1
    at_once = math.ceil((len(rows) - target) / iterations)
    while len(left) > target:
        moment = rows[left].T @ rows[left]
        score = {at: np.float32(rows[at] @ moment @ rows[at]) for at in left}
        for at in sorted(left, key=lambda at: (score[at], -int(ids[at], 16)))[: min(at_once, len(left) - target)]:
            found[at] = number
            left.remove(at)
        number += 1
    found[left] = number
    return found


def clustered(num, dimensions, seed=0):
    """[num, d] float16 of any length: about a few directions, some of them rare, as images' embeddings are."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(8, dimensions)) + rng.normal(size=dimensions)
    group = np.minimum(rng.geometric(0.4, num) - 1, 7)
    return (centres[group] + rng.normal(size=(num, dimensions)) * rng.uniform(0.2, 2, (num, 1))).astype(np.float16)


@pytest.mark.parametrize(
    ("num", "dimensions", "target", "iterations"),
    [(160, 16, 50, 40), (160, 16, 51, 7), (90, 64, 60, 1), (60, 8, 1, 500), (40, 4, 40, 10), (30, 3, 80, 3)],
)
def test_rounds_are_those_of_the_published_rule(num, dimensions, target, iterations, tmp_path):
    vectors = clustered(num, dimensions, seed=num)
    ids = random_uids(np.random.default_rng(num), num)
    kept, rounds, facts = run(tmp_path, vectors, ids, rows=target, iterations=iterations)
    expected = published(vectors, ids, target, iterations)
    assert rounds == expected.tolist()
    assert kept == (expected == expected.max()).tolist()
    assert (facts["kept"], facts["rounds"]) == (min(target, num), expected.max() - 1)


@pytest.mark.parametrize("seed", range(4))
def test_random_vectors_without_clusters(seed, tmp_path):
    vectors = np.random.default_rng(seed).normal(size=(100, 12)) + (0.5 if seed % 2 else 0)
    ids = random_uids(np.random.default_rng(seed), 100)
    _, rounds, facts = run(tmp_path, vectors.astype(np.float16), ids, fraction=0.29, iterations=25)
    assert rounds == published(vectors.astype(np.float16), ids, 29, 25).tolist()
    assert facts["kept"] == 29


def test_equal_scores_are_ranked_by_uid_and_copies_stay_longest(tmp_path):
    vectors = np.repeat(np.eye(6), [1, 1, 1, 4, 4, 4], axis=0).astype(np.float16)
    ids = [f"{(number * 7) % 15:032x}" for number in range(15)]
    _, rounds, _ = run(tmp_path, vectors, ids, rows=5, iterations=10)
    assert rounds == published(vectors, ids, 5, 10).tolist()
    assert sorted(rounds[:3]) == [1, 2, 3]
    assert np.argsort(rounds[:3]).tolist() == np.argsort(ids[:3])[::-1].tolist()


def test_few_rows_are_scored_again(tmp_path, monkeypatch):
    monkeypatch.setattr(normsim_d, "MORE_ROWS", 16)
    scored = []

    def count(vectors, matrix):
        scored.append(len(vectors))
        return quadratic_forms(vectors, matrix)

    monkeypatch.setattr(normsim_d, "quadratic_forms", count)
    vectors = clustered(400, 16, seed=3)
    ids = random_uids(np.random.default_rng(3), 400)
    _, rounds, _ = run(tmp_path, vectors, ids, rows=200, iterations=100)
    assert rounds == published(vectors, ids, 200, 100).tolist()
    assert sum(scored) < 0.35 * sum(400 - 2 * number for number in range(100))


def test_order_shards_pieces_and_tiles_change_nothing(tmp_path, monkeypatch):
    vectors = clustered(120, 24, seed=4)
    vectors[7] = vectors[100]
    ids = random_uids(np.random.default_rng(4), 120)
    first = run(tmp_path / "a", vectors, ids, fraction=0.3, iterations=60)
    order = np.random.default_rng(0).permutation(120)
    monkeypatch.setattr(normsim_d, "PIECE_ROWS", 40)
    monkeypatch.setattr(normsim_d, "ROUNDS_A_TASK", 7)
    monkeypatch.setattr(normsim_d, "GATHERED_ROWS", 11)
    monkeypatch.setattr(normsim_d, "MORE_ROWS", 5)
    monkeypatch.setattr(second_moment, "TILE_ROWS", 3)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (60,))
    again = run(tmp_path / "b", vectors[order], [ids[at] for at in order], 8, fraction=0.3, iterations=60)
    for one, two in zip(first[:2], again[:2], strict=True):
        assert [one[at] for at in order] == two
    assert {**first[2], "shards": None} == {**again[2], "shards": None}


def test_a_killed_fit_goes_on_from_the_rounds_that_are_done(tmp_path, monkeypatch):
    monkeypatch.setattr(normsim_d, "ROUNDS_A_TASK", 10)
    vectors = clustered(80, 8, seed=5)
    ids = random_uids(np.random.default_rng(5), 80)
    path, columns = vector_pool(tmp_path, vectors, ids, 3)
    stage = NormSimD("vector", rows=20, iterations=30)
    done = fit_in_two(path, tmp_path / "out", stage, columns, "rounds_000020")
    assert done == ["rounds_000020", "rounds_000030", "found"]
    _, rows, _ = run_stage(path, tmp_path / "out", stage, columns)
    assert [row["normsim_d_round"] for row in rows] == published(vectors, ids, 20, 30).tolist()


def test_rows_without_a_vector_are_null_and_not_counted(tmp_path):
    vectors = list(clustered(9, 4))
    vectors[2] = None  # a failed row
    vectors[5] = np.zeros(4, np.float16)
    vectors[6] = np.array([1, np.nan, 0, 0], np.float16)
    ids = [f"{number:032x}" for number in range(9)]
    kept, rounds, facts = run(tmp_path / "some", vectors, ids, shards=4, iterations=2)
    assert [at for at in range(9) if kept[at] is None] == [2, 5, 6]
    assert [value is None for value in rounds] == [value is None for value in kept]
    assert (facts["rows_with_vectors"], facts["kept"], kept.count(True)) == (6, 3, 3)
    kept, rounds, facts = run(tmp_path / "none", [None, np.zeros(4)], ids[:2])
    assert (kept, rounds, facts["kept"], facts["rounds"]) == ([None] * 2, [None] * 2, 0, 0)
    kept, rounds, _ = run(tmp_path / "one", vectors[:1], ids[:1], fraction=1.0)
    assert (kept, rounds) == ([True], [1])


def test_wrong_parameters_and_columns_are_named(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"normsim_d.fraction = 0.3, expected nothing, as rows are given"):
        NormSimD(fraction=0.3, rows=3)
    monkeypatch.setattr(normsim_d, "PIECE_ROWS", 1)
    with pytest.raises(WinnowError, match="normsim_d: vectors of 3 to 4 values, expected one length"):
        run(tmp_path, [np.ones(3), np.ones(4)], ["0" * 32, "1" * 32], 2)


def test_second_moments_are_exact_sums_in_any_order():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(5000, 20)).astype(np.float16)
    rows = unit(vectors)
    moment = SecondMoment(20)
    moment.add(vectors)
    shuffled = SecondMoment(20)
    for part in np.array_split(rng.permutation(5000), 37):
        shuffled.add(vectors[part])
    assert (moment.parts == shuffled.parts).all()
    exact = [[math.fsum(rows[:, i] * rows[:, j]) for j in range(20)] for i in range(20)]  # of products without error
    np.testing.assert_allclose(moment.matrix, exact, rtol=0, atol=1e-12)
    some = SecondMoment(20)
    some.add(vectors[:3000])
    rest = SecondMoment(20)
    rest.add(vectors[3000:])
    moment.subtract(some)
    assert (moment.parts == rest.parts).all()
    rest.add_moment(some)
    assert (rest.parts == shuffled.parts).all()
    score = quadratic_forms(vectors[:50], shuffled.matrix)
    np.testing.assert_allclose(score, ((rows[:50] @ rows.T) ** 2).sum(axis=1), rtol=1e-12)
