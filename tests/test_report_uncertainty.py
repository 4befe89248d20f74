"""The statistics of the report, against tables, against scipy, and against simulations whose truth is known."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from pipeline.report.uncertainty import (
    Influence,
    could_be_best,
    dunnett_critical_value,
    half_width,
    holm,
    influence_of_items,
    item_covariance,
    pooled_seed_variance,
    two_sided_p,
    uncertainty_of_means,
)


def test_item_variance_of_a_mean_is_the_textbook_one():
    x = np.array([1, 0, 1, 1, 0, 1, 0.0])
    _, u = influence_of_items(x, np.zeros(7), np.arange(7))
    assert (u**2).sum() == pytest.approx(x.var(ddof=1) / 7)


def test_item_variance_of_mean_per_class_recall_is_stratified():
    x, label = np.array([1, 0, 1, 1, 0, 1.0, 0, 0]), np.array([0, 0, 0, 1, 1, 1, 1, 1])
    _, u = influence_of_items(x, label, np.arange(8))
    assert (u**2).sum() == pytest.approx((x[:3].var(ddof=1) / 3 + x[3:].var(ddof=1) / 5) / 4)


def test_captions_of_one_image_are_one_observation():
    x = np.repeat([1, 0, 1, 1, 0, 0, 1, 0, 1, 0.0], 5)  # five captions each, all with the same outcome
    _, alone = influence_of_items(x, np.zeros(50), np.arange(50))
    groups, u = influence_of_items(x, np.zeros(50), np.repeat(np.arange(10), 5))
    assert len(groups) == 10
    assert (u**2).sum() == pytest.approx(5 * (alone**2).sum())


def test_identical_answers_have_no_item_noise_in_their_difference():
    rng = np.random.default_rng(0)
    groups, u = influence_of_items(rng.random(200) < 0.3, np.zeros(200), np.arange(200))
    same = Influence(groups, u[None])
    uncertainty = uncertainty_of_means([np.array([0.3])] * 2, [[same, same]])
    assert uncertainty.of_contrast(np.array([1.0, 0.0]))[0] > 1e-4
    assert uncertainty.of_contrast(np.array([1.0, -1.0]))[0] == pytest.approx(0, abs=1e-12)


def test_different_item_sets_share_only_what_they_share():
    rng = np.random.default_rng(0)
    u = rng.normal(size=6)
    covariance, _ = item_covariance([Influence(np.arange(6), u[None]), Influence(np.arange(3, 6), u[None, 3:])])
    assert covariance == pytest.approx(np.array([[u @ u, u[3:] @ u[3:]], [u[3:] @ u[3:], u[3:] @ u[3:]]]))


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
def test_dunnett_matches_the_published_table(num, df, expected):
    correlation = np.full((num, num), 0.5) + 0.5 * np.eye(num)
    assert dunnett_critical_value(correlation, df) == pytest.approx(expected, abs=0.02)


def test_dunnett_of_an_uneven_correlation_matches_scipy():
    correlation = np.array([[1, 0.8, 0.1], [0.8, 1, 0.3], [0.1, 0.3, 1]])
    d = dunnett_critical_value(correlation, 8)
    assert stats.multivariate_t.cdf([d] * 3, shape=correlation, df=8, random_state=0) == pytest.approx(0.95, abs=0.003)


def probit_outcomes(rng, means, num_seeds, num_items, seed_sd, item_sd, own_sd):
    """[S, n, J] outcomes and the true expected scores [S] over all seeds and items."""
    num = len(means)
    latent = (
        np.asarray(means)[:, None, None]
        + rng.normal(0, seed_sd, (num, num_seeds, 1))
        + rng.normal(0, item_sd, (1, 1, num_items))
        + rng.normal(0, own_sd, (num, 1, num_items))
        + rng.normal(size=(num, num_seeds, num_items))
    )
    truth = stats.norm.cdf(np.asarray(means) / np.sqrt(1 + seed_sd**2 + item_sd**2 + own_sd**2))
    return latent > 0, truth


def estimates(outcomes):
    """Means [S] and their uncertainty, one task."""
    items = np.arange(outcomes.shape[2])
    influences = []
    for of_strategy in outcomes:
        rows = [influence_of_items(x, np.zeros(len(items)), items)[1] for x in of_strategy]
        influences.append(Influence(items, np.stack(rows)))
    scores = list(outcomes.mean(axis=2))
    return np.array([y.mean() for y in scores]), uncertainty_of_means(scores, [influences])


@pytest.mark.parametrize(
    ("what", "seed_sd", "item_sd", "own_sd", "num_items"),
    [("seeds", 0.2, 0.3, 0.0, 400), ("items", 0.01, 1.0, 1.0, 100), ("both", 0.1, 0.7, 0.5, 200)],
)
def test_intervals_of_differences_cover_the_truth_with_three_seeds(what, seed_sd, item_sd, own_sd, num_items):
    rng = np.random.default_rng(11)
    inside = []
    for _ in range(500):
        outcomes, truth = probit_outcomes(rng, [-0.8, -0.6, -0.6, -0.3, 0.0], 3, num_items, seed_sd, item_sd, own_sd)
        means, uncertainty = estimates(outcomes)
        contrast = np.array([-1.0, 0, 0, 1, 0])
        width = half_width(*uncertainty.of_contrast(contrast))
        inside.append(abs(contrast @ (means - truth)) <= width)
    # the standard error of 500 draws at 95 % is 1 point
    assert 0.925 <= np.mean(inside) <= 0.98, what


def test_the_best_is_excluded_in_at_most_one_of_twenty_experiments(monkeypatch):
    monkeypatch.setattr("pipeline.report.uncertainty.NUM_DRAWS", 10_000)  # 240 experiments: coarser, and quick
    rng = np.random.default_rng(3)
    kept_equal, kept_best, sole = [], [], []
    for _ in range(120):
        outcomes, _ = probit_outcomes(rng, [-0.5] * 4, 3, 100, 0.15, 0.6, 0.2)
        means, uncertainty = estimates(outcomes)
        kept_equal.append(could_be_best(means, uncertainty)[0])
        outcomes, _ = probit_outcomes(rng, [-0.5, -0.5, -0.4, 0.8], 3, 100, 0.15, 0.6, 0.2)
        possible = could_be_best(*estimates(outcomes))
        kept_best.append(possible[3])
        sole.append(possible.sum() == 1)
    assert np.mean(kept_equal) >= 0.90  # nominal 95 %, standard error 2 points
    assert np.mean(kept_best) == 1.0
    assert np.mean(sole) >= 0.95
