"""The statistics of the report, against tables, against scipy, and against simulations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from benchmarks.coverage import REGIMES, STRATEGIES, detectable_difference, experiment, simulate
from pipeline.report.items import MEAN, Items, difference_interval
from pipeline.report.records import Result
from pipeline.report.scores import Scores
from pipeline.report.uncertainty import (
    Influence,
    Uncertainty,
    could_be_best,
    critical_value,
    equal_seed_variance_p,
    half_width,
    holm,
    item_covariance,
    pooled_seed_variance,
    rank_intervals,
    two_sided_p,
    uncertainty_of_means,
    wilson,
)


def test_identical_answers_have_no_item_noise_in_their_difference():
    rng = np.random.default_rng(0)
    items = Items(MEAN, (rng.random(200) < 0.3).astype(np.float64), np.zeros(200), np.arange(200))
    same = Influence(items.units, items.influence[None])
    uncertainty = uncertainty_of_means([np.array([0.3])] * 2, [item_covariance([same, same])])
    assert uncertainty.of_contrast(np.array([1.0, 0.0]))[0] > 1e-4
    assert uncertainty.of_contrast(np.array([1.0, -1.0]))[0] == pytest.approx(0, abs=1e-12)


def test_different_item_sets_share_only_what_they_share():
    rng = np.random.default_rng(0)
    u = rng.normal(size=6)
    covariance, _ = item_covariance([Influence(np.arange(6), u[None]), Influence(np.arange(3, 6), u[None, 3:])])
    assert covariance == pytest.approx(np.array([[u @ u, u[3:] @ u[3:]], [u[3:] @ u[3:], u[3:] @ u[3:]]]))


def test_what_differs_between_seeds_on_an_item_is_no_item_noise():
    rng = np.random.default_rng(0)
    num, found = 400, []
    for _ in range(40):  # an item's own deviation 0.3 in all seeds, and another 0.6 in each
        u_nG = rng.normal(0, 0.3, num) + rng.normal(0, 0.6, (2, num))
        u_nG = (u_nG - u_nG.mean(axis=1, keepdims=True)) / np.sqrt(num * (num - 1))
        found.append(item_covariance([Influence(np.arange(num), u_nG)])[0].item())
    assert np.mean(found) == pytest.approx(0.3**2 / num, rel=0.1)  # 0.27 / num with the seeds' part


def test_pooled_variance_and_t_match_scipy():
    a, b = np.array([0.31, 0.35, 0.33]), np.array([0.40, 0.44, 0.45])
    variance, df = pooled_seed_variance([a, b])
    p = two_sided_p(b.mean() - a.mean(), variance * (1 / 3 + 1 / 3), df)
    assert df == 4
    assert p == pytest.approx(stats.ttest_ind(a, b).pvalue)
    assert pooled_seed_variance([a[:1], b[:1]]) == (0.0, 0)
    assert half_width(4.0, 4) == pytest.approx(2 * 2.7764, abs=1e-3)
    assert half_width(4.0, 1e6) == pytest.approx(2 * 1.95996, abs=1e-4)


def test_holm_on_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@pytest.mark.parametrize(
    ("num", "df", "expected"),
    [(1, 10, 1.81), (2, 10, 2.15), (3, 10, 2.34), (4, 20, 2.30), (3, 1e6, 2.06), (9, 1e6, 2.42)],
)
def test_differences_to_one_mean_have_dunnetts_value(num, df, expected):
    contrasts = np.eye(num + 1)[0] - np.eye(num + 1)[1:]
    assert critical_value(contrasts, 0.01 * np.eye(num + 1), df) == pytest.approx(expected, abs=0.02)


def test_the_value_of_an_uneven_covariance_matches_scipy():
    covariance = np.array([[1, 0.8, 0.2], [0.8, 1, 0.6], [0.2, 0.6, 4]])
    errors = np.sqrt(np.diag(covariance))
    d = critical_value(np.eye(3), covariance, 8)
    correlation = covariance / np.outer(errors, errors)
    assert stats.multivariate_t.cdf([d] * 3, shape=correlation, df=8, random_state=0) == pytest.approx(0.95, abs=0.003)


@pytest.mark.parametrize(("num", "df"), [(2, 4), (3, 10), (6, 12), (10, 1e6)])
def test_differences_of_all_pairs_have_tukeys_value(num, df):
    first, second = np.triu_indices(num, 1)
    found = critical_value(np.eye(num)[first] - np.eye(num)[second], 0.3 * np.eye(num), df, two_sided=True)
    assert found == pytest.approx(stats.studentized_range.ppf(0.95, num, min(df, 1e5)) / np.sqrt(2), rel=0.01)


def test_wilsons_interval_is_the_published_one():
    # Newcombe, Statistics in Medicine 1998, 17, 857-872, table I: method 3 for 81/263, 15/148, 0/20, 1/29
    for right, num, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        assert wilson(right / num, num) == pytest.approx((low, high), abs=5e-5)
    assert wilson(1.0, 20) == pytest.approx((1 - 0.1611, 1), abs=5e-5)


def certain(means: list[float], error: float) -> tuple[np.ndarray, Uncertainty]:
    """Means with independent errors that are known."""
    return np.array(means), Uncertainty(np.full(len(means), error**2), 10**7, [], [])


def test_places_follow_from_all_pairs():
    # Tukey's value of four means is 2.569: 0.0363 apart with errors of 0.01 each
    assert rank_intervals(*certain([0.5, 0.47, 0.44, 0.1], 0.01)).tolist() == [[1, 2], [1, 3], [2, 3], [4, 4]]
    assert rank_intervals(*certain([0.2, 0.2, 0.2], 0.01)).tolist() == [[1, 3]] * 3
    assert rank_intervals(*certain([0.1, 0.2], 0.0)).tolist() == [[2, 2], [1, 1]]


@pytest.fixture
def coarse(monkeypatch):
    monkeypatch.setattr("pipeline.report.uncertainty.NUM_DRAWS", 4_000)


# the benchmark runs 2,000 experiments and asks for two points; the error of 150 is 1.8 points, of their intervals 1
@pytest.mark.parametrize(("regime", "num_seeds"), [(0, 2), (0, 3), (1, 3), (2, 2)])
def test_intervals_and_claims_are_right_as_often_as_they_say(coarse, regime, num_seeds):
    rates = simulate(REGIMES[regime], num_seeds, 150)
    for name in ("mean", "to baseline", "to control"):
        assert 0.92 <= rates[name] <= 0.98, name
    for name in ("claim to baseline", "claim to control", "best excluded"):
        assert rates[name] <= 0.1, name
    assert rates["ranks"] >= 0.9


def test_a_best_one_is_found_and_kept(coarse):
    rng = np.random.default_rng(3)
    seeds = {name: range(3) for name in STRATEGIES}
    kept, sole, first = [], [], []
    for _ in range(60):
        scores, _ = experiment(REGIMES[2], 3, (-0.5, -0.5, -0.4, 0.8, -0.5), rng)
        measured = scores.measure(seeds, ("objects", "classes", "captions"))
        possible = could_be_best(measured.means, measured.uncertainty)
        kept.append(possible[3])
        sole.append(possible.sum() == 1)
        first.append(rank_intervals(measured.means, measured.uncertainty)[3].tolist() == [1, 1])
    assert np.mean(kept) == 1.0
    assert np.mean(sole) >= 0.95
    assert np.mean(first) >= 0.95


def test_with_one_seed_a_tasks_intervals_are_wilsons_and_a_paired_bootstraps():
    rng = np.random.default_rng(0)
    right = rng.random((2, 500)) < np.array([[0.03], [0.06]])
    items = [Items(MEAN, x.astype(np.float64), np.zeros(500), np.arange(500)) for x in right]
    results = [Result(name, 0, 0, "objects", None, None, one.value, one) for name, one in zip("ab", items, strict=True)]
    measured = Scores(results).measure({"a": [0], "b": [0]}, ("objects",))
    estimate = measured.estimate("a", ())
    assert estimate.items == pytest.approx(wilson(right[0].mean(), 500))
    assert estimate.half_width == pytest.approx((estimate.items[1] - estimate.items[0]) / 2)
    difference = measured.differences({"b": "a"})["b"]
    assert difference.items == difference_interval([items[1]], [items[0]])
    assert difference.half_width == pytest.approx((difference.items[1] - difference.items[0]) / 2)
    assert difference.verdict == "item noise only"
    several = Scores(
        [*results, *(Result(r.strategy, 0, 1, r.task, None, None, r.value + 0.01, r.items) for r in results)]
    )
    with_seeds = several.measure({"a": [0, 1], "b": [0, 1]}, ("objects",))
    assert with_seeds.estimate("a", ()).half_width > estimate.half_width
    assert with_seeds.estimate("a", ()).items is not None


@pytest.mark.parametrize("accuracy", [0.02, 0.3])
def test_intervals_from_items_alone_hold_the_score_on_other_items(accuracy):
    rng = np.random.default_rng(4)
    inside, between = [], []
    for _ in range(400):
        hard = rng.normal(0, 0.7, 250)
        right = [hard + rng.normal(size=250) > stats.norm.isf(p) * np.sqrt(1.49) for p in (accuracy, 1.5 * accuracy)]
        found = [Items(MEAN, x.astype(np.float64), np.zeros(250), np.arange(250)) for x in right]
        results = [Result(n, 0, 0, "t", None, None, one.value, one) for n, one in zip("ab", found, strict=True)]
        measured = Scores(results).measure({"a": [0], "b": [0]}, ("t",))
        low, high = measured.estimate("a", ()).items
        inside.append(low <= accuracy <= high)
        low, high = measured.differences({"b": "a"})["b"].items
        between.append(low <= accuracy / 2 <= high)
    assert 0.92 <= np.mean(inside) <= 0.99
    assert 0.92 <= np.mean(between) <= 0.98


def test_unlike_deviations_between_seeds_are_found_and_like_ones_are_not():
    rng = np.random.default_rng(0)
    like = [equal_seed_variance_p([rng.normal(0, 0.01, 3) for _ in range(5)]) for _ in range(400)]
    unlike = [equal_seed_variance_p([rng.normal(0, sd, 5) for sd in (0.001, 0.01, 0.01)]) for _ in range(100)]
    assert np.mean(np.array(like) < 0.05) == pytest.approx(0.05, abs=0.03)
    assert np.mean(np.array(unlike) < 0.01) > 0.8
    assert equal_seed_variance_p([np.array([0.1, 0.1]), np.array([0.1, 0.2]), np.array([0.3])]) is None
    equal = np.array([0.1 + 0.2, 0.3])
    assert np.ptp(equal) > 0  # by rounding alone
    assert equal_seed_variance_p([equal, np.array([0.1, 0.2])]) is None


@pytest.mark.parametrize("num_seeds", [2, 3, 10])
def test_the_detectable_difference_is_found_in_four_of_five_runs(num_seeds):
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(20_000, 6, num_seeds))
    scores[:, 0] += detectable_difference(num_seeds, 6, 0.05)
    error = np.sqrt(scores.var(axis=2, ddof=1).mean(axis=1) * 2 / num_seeds)
    t = (scores[:, 0].mean(axis=1) - scores[:, 1].mean(axis=1)) / error
    assert np.mean(t > stats.t.ppf(0.975, 6 * (num_seeds - 1))) == pytest.approx(0.8, abs=0.015)
