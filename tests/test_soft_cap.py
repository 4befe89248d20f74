"""Soft-cap sampling against its published loop with numpy's choice, its law exactly, its totals and its determinism."""

from __future__ import annotations

import hashlib
import itertools
import json
import math

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.errors import ConfigError
from stages import build_stage
from stages.columns import soft_cap
from stages.columns.soft_cap import SoftCap, draw
from stages.selection import uids
from tests.duplicates_fixture import run_stage
from tests.golden_fixture import check_golden
from tests.pool_fixture import drawing, even_shards, random_uids, write_columns, write_pool

IMAGE = drawing(1, 8, 6)


def run(folder, scores, ids, shards=3, kind=None, **parameters):
    """(soft_cap_draws of each row, facts); a row of the score "failed" is not ok."""
    rows = [
        {"image": None if score == "failed" else IMAGE, "caption": "a", "uid": uid}
        for uid, score in zip(ids, scores, strict=True)
    ]
    path = write_pool(folder / "root", even_shards(rows, shards))
    values = pa.array([None if score == "failed" else score for score in scores], kind or pa.float32())
    columns = write_columns(folder / "root", path, {"clip_score": values})
    _, found, facts = run_stage(path, folder / "out", SoftCap(score="clip_score", **parameters), columns)
    return [row["soft_cap_draws"] for row in found], facts


def hashes_of(num, seed=0):
    return np.random.default_rng(seed).integers(0, 2**64, size=num, dtype=np.uint64)


def chances(logits, num):
    """[n] the probability that each is among the first `num` drawn without replacement, over all orders."""
    weights = [math.exp(logit) for logit in logits]
    found = np.zeros(len(logits))
    for order in itertools.permutations(range(len(logits)), num):
        chance, left = 1.0, sum(weights)
        for at in order:
            chance *= weights[at] / left
            left -= weights[at]
        found[list(order)] += chance
    return found


@pytest.mark.parametrize("num", [1, 2, 3, 5])
def test_a_round_draws_without_replacement_in_proportion_to_exp(num):
    logits = np.array([0.0, 1.0, -1.0, 2.5, 0.3, -3.0])
    rounds = 4000
    draws, done = draw(logits, hashes_of(6), rounds * num, num, penalty=0.0)
    assert done == rounds
    expected = chances(logits, num)
    assert np.abs(draws / rounds - expected).max() < 4 * np.sqrt(0.25 / rounds)  # four standard errors at most


def published(logits, num_draws, round_draws, penalty, rng):
    """How often each is drawn, as in the authors' notebook."""
    logits, draws = logits.copy(), np.zeros(len(logits))
    left = num_draws
    while left:
        chance = np.exp(logits - logits.max())
        batch = rng.choice(len(logits), min(round_draws, left), replace=False, p=chance / chance.sum())
        logits[batch] -= penalty
        draws[batch] += 1
        left -= len(batch)
    return draws


def test_draws_are_those_of_the_published_loop_on_average():
    logits = np.random.default_rng(1).normal(size=30) * 3
    rng = np.random.default_rng(2)
    ours = np.array([draw(logits, hashes_of(30, seed), 123, 5, 0.4)[0] for seed in range(150)])
    theirs = np.array([published(logits, 123, 5, 0.4, rng) for _ in range(150)])
    assert set(ours.sum(axis=1)) == set(theirs.sum(axis=1)) == {123}
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / 150)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) <= 5 * error + 1e-9).all()
    assert np.allclose(ours.std(axis=0), theirs.std(axis=0), atol=0.35)


def plain(logits, hashes, num_draws, round_draws, penalty):
    """The same draws in plain loops: the highest logits and noises of each round, all computed and sorted."""
    draws = [0] * len(logits)
    left, number = num_draws, 0
    while left:
        mixed = uids.mix(hashes ^ uids.mix(np.array([number + 1], np.uint64))[0])
        keys = []
        for at, value in enumerate(mixed.tolist()):
            uniform = ((value >> 12) + 0.5) * 2.0**-52
            keys.append((-(logits[at] - penalty * draws[at] - math.log(-math.log1p(-uniform))), at))
        taken = sorted(keys)[: min(left, round_draws)]
        for _, at in taken:
            draws[at] += 1
        left -= len(taken)
        number += 1
    return draws


@pytest.mark.parametrize(
    ("spread", "num_draws", "round_draws", "penalty"),
    [
        (1, 300, 7, 0.15),
        (30, 300, 20, 0.15),
        (0.01, 100, 39, 2.0),
        (1e6, 200, 11, 5e4),
        (5, 130, 40, 0.1),
        (1, 33, 90, 0),
    ],
)
def test_screening_by_a_level_changes_nothing(spread, num_draws, round_draws, penalty):
    logits = np.random.default_rng(3).normal(size=40) * spread
    logits[7] = logits[30]
    found, _ = draw(logits, hashes_of(40), num_draws, round_draws, penalty)
    assert found.tolist() == plain(logits, hashes_of(40), num_draws, min(round_draws, 40), penalty)


def test_equal_rows_go_by_uid():
    found, _ = draw(np.zeros(4), np.full(4, 5, np.uint64), 6, 3, 0.5)
    assert found.tolist() == [2, 2, 1, 1]  # rounds: 0 1 2, then 3 and the first two of the others


def test_totals_nulls_and_defaults(tmp_path):
    rng = np.random.default_rng(4)
    scores = [float(score) for score in rng.normal(size=40)]
    scores[3], scores[8], scores[9], scores[10], scores[11] = "failed", None, math.nan, math.inf, -math.inf
    ids = random_uids(rng, 40)
    found, facts = run(tmp_path / "a", scores, ids)
    assert {at for at, draws in enumerate(found) if draws is None} == {3, 8, 9, 10, 11}
    assert sum(draws or 0 for draws in found) == 35
    assert (facts["rows_with_scores"], facts["rounds"], facts["draws"]) == (35, 35, 35)
    found, facts = run(tmp_path / "b", scores, ids, samples_fraction=0.29, round_draws=4)
    assert sum(draws or 0 for draws in found) == facts["draws"] == 10  # floor(0.29 x 35)
    assert max(draws or 0 for draws in found) <= facts["rounds"] == 3
    found, facts = run(tmp_path / "c", scores, ids, samples_fraction=100, scale=3)
    assert (sum(draws or 0 for draws in found), facts["rounds"]) == (3500, 1167)  # 3 a round
    best = max((at for at in range(40) if found[at] is not None), key=lambda at: scores[at])
    assert found[best] > 120
    found, facts = run(tmp_path / "d", scores, ids, samples_fraction=2, round_draws=1000)
    assert {draws for draws in found if draws is not None} == {2}  # a round draws no row twice


def test_numbers_of_other_kinds_one_row_and_none(tmp_path):
    found, _ = run(tmp_path / "int", [3, 1, 2], [f"{at:032x}" for at in range(3)], kind=pa.int32(), round_draws=1)
    assert sum(found) == 3
    found, _ = run(tmp_path / "one", [0.5], ["0" * 32], shards=1, samples_fraction=7)
    assert found == [7]
    found, facts = run(tmp_path / "none", [None, "failed"], ["0" * 32, "1" * 32], shards=2)
    assert found == [None, None]
    assert (facts["rounds"], facts["draws"]) == (0, 0)
    found, facts = run(tmp_path / "few", [0.1, 0.2], ["0" * 32, "1" * 32], shards=1, samples_fraction=0.3)
    assert (found, facts["draws"]) == ([0, 0], 0)


def test_order_shards_and_blocks_change_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(5)
    scores = rng.normal(size=200).astype(np.float32).tolist()
    ids = random_uids(rng, 200)
    first, facts = run(tmp_path / "a", scores, ids, samples_fraction=3, round_draws=17, seed=4)
    order = rng.permutation(200)
    monkeypatch.setattr(soft_cap, "SCREEN_ROWS", 7)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (60,))
    again, other = run(
        tmp_path / "b",
        [scores[at] for at in order],
        [ids[at] for at in order],
        shards=9,
        samples_fraction=3,
        round_draws=17,
        seed=4,
    )
    assert [first[at] for at in order] == again
    assert {**facts, "shards": None} == {**other, "shards": None}
    seeded, _ = run(tmp_path / "c", scores, ids, samples_fraction=3, round_draws=17, seed=5)
    assert seeded != first
    kept = [at for at in range(200) if at % 5]  # each row's noise is its own
    expected, _ = draw(
        np.array([scores[at] for at in sorted(kept, key=lambda at: ids[at])], np.float64),
        uids.hash64(uids.parse(pa.array(sorted(ids[at] for at in kept)), ""), 4, soft_cap.DRAW_STREAM),
        480,
        17,
        0.15,
    )
    found, _ = run(
        tmp_path / "d",
        [scores[at] for at in kept],
        [ids[at] for at in kept],
        samples_fraction=3,
        round_draws=17,
        seed=4,
    )
    assert [found[kept.index(at)] for at in sorted(kept, key=lambda at: ids[at])] == expected.tolist()


def test_golden_draws(tmp_path):
    rng = np.random.default_rng(6)
    found, _ = run(tmp_path, rng.normal(size=500).astype(np.float32).tolist(), random_uids(rng, 500), round_draws=20)
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()
    check_golden("soft_cap", {"version": SoftCap.version, "sha256": digest})


def test_the_column_must_be_named():
    with pytest.raises(ConfigError, match="stages.0.score is missing, expected a value"):
        build_stage("soft_cap", {}, "stages.0")
    stage = build_stage("soft_cap", {"score": "x"}, "stages.0")
    assert stage.needs == ("x",)
    stage.check_needs({"x": "int64"}, {})
    with pytest.raises(ConfigError, match="score = x of type string, expected float32"):
        stage.check_needs({"x": "string"}, {})
