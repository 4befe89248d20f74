"""How sure a comparison is: two sources of noise, intervals, tests, and who could be the best.

Two things make a score differ when the experiment is repeated: the **seed** of the training and the **items** that
the tasks happen to contain. Seed variance is pooled over strategies (equal variances are assumed: with three seeds
a variance of one's own has two degrees of freedom and says little). Item noise is taken from per-item outcomes, paired:
the strategies answer the same items, so what is hard for both cancels in a difference. Tasks are fixed and their items
independent of one another.

With one seed for every strategy there is no seed variance: intervals then hold item noise only, and nothing here
names a winner.

Shapes: S strategies, G independent groups of items (one item, or one image with all its captions).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special, stats

CONFIDENCE = 0.95
NORMAL_DF = 1e6  # Student's t with this many degrees of freedom is the normal distribution to six digits
ROUNDING = 1e-12  # averages of fractions that are equal but for the order of their sum differ by less
NUM_DRAWS = 200_000  # for a critical value: its standard error is then about 0.005


@dataclass(frozen=True)
class Influence:
    """What each group of items adds to a metric's deviation from its expectation, per seed.

    Attributes:
        groups: [G] sorted, unique names.
        by_seed: [n, G] float64. A metric's item variance is the sum of squares over G of a row.
    """

    groups: np.ndarray
    by_seed: np.ndarray


@dataclass(frozen=True)
class Uncertainty:
    """Variances and covariances of the strategies' means, by source.

    Attributes:
        seed: [S] variance of each mean from seeds; zeros where no strategy has two.
        seed_df: degrees of freedom of the pooled seed variance; 0 means item noise only.
        items: one [S, S] covariance per task with known items, positive semi-definite.
        items_df: degrees of freedom of each, G - 1.
    """

    seed: np.ndarray
    seed_df: int
    items: list[np.ndarray]
    items_df: list[int]

    def subset(self, index: list[int]) -> Uncertainty:
        """The same for some of the strategies; the seed variance stays pooled over all."""
        items = [covariance[np.ix_(index, index)] for covariance in self.items]
        return Uncertainty(self.seed[index], self.seed_df, items, self.items_df)

    def of_contrast(self, weights: np.ndarray) -> tuple[float, float]:
        """Variance and degrees of freedom of the weighted sum of the means.

        Sources add up; degrees of freedom by Satterthwaite (Biometrics Bulletin 1946): v^2 / sum_k v_k^2 / df_k.
        """
        parts = [(float(weights**2 @ self.seed), self.seed_df)] if self.seed_df else []
        parts += [(float(weights @ c @ weights), df) for c, df in zip(self.items, self.items_df, strict=True)]
        parts = [(max(variance, 0.0), df) for variance, df in parts]
        total = sum(variance for variance, _ in parts)
        spread = sum(variance**2 / df for variance, df in parts)
        return total, min(total**2 / spread, NORMAL_DF) if spread > 0 else NORMAL_DF

    def covariance(self) -> np.ndarray:
        """[S, S] covariance of the means from all sources."""
        return sum(self.items, np.diag(self.seed) if self.seed_df else np.zeros((len(self.seed),) * 2))


def pooled_seed_variance(scores: Sequence[np.ndarray]) -> tuple[float, int]:
    """Variance of one training's score between seeds, pooled over strategies, and its degrees of freedom.

    s_p^2 = sum_i sum_s (y_is - mean_i)^2 / sum_i (n_i - 1): the within mean square of a one-way analysis of variance.
    (0, 0) when no strategy has two seeds.
    """
    df = sum(len(y) - 1 for y in scores)
    squares = sum(float(((y - y.mean()) ** 2).sum()) for y in scores)
    return (squares / df, df) if df else (0.0, 0)


def equal_seed_variance_p(scores: Sequence[np.ndarray]) -> float | None:
    """The p-value of equal variances between seeds, or None where fewer than two strategies have two unlike scores.

    Bartlett's test (Proceedings of the Royal Society A 1937, 160, 268-282). Pooling takes equal variances for granted.
    """
    several = [y for y in scores if len(y) > 1 and np.ptp(y) > ROUNDING]
    return float(stats.bartlett(*several).pvalue) if len(several) > 1 else None


def item_covariance(influences: Sequence[Influence]) -> tuple[np.ndarray, int]:
    """[S, S] covariance of the strategies' means over seeds that comes from the choice of items, and its df, G - 1.

    cov_il = sum_g u_ig u_lg, u being the mean over seeds. On the diagonal, u also holds what differs from seed to
    seed on the same item; that part is in the seed variance already, so  sum_g sum_s (u_isg - u_ig)^2 / (n (n - 1))
    is taken off (the two-way random effects identity  var = MS_seed/n + MS_item/G - MS_error/(nG), Searle, Casella
    and McCulloch, Variance Components, 1992, 4.3). With one seed nothing can be taken off. Negative eigenvalues,
    which the subtraction can leave, are set to zero.
    """
    names = influences[0].groups
    if any(influence.groups is not names for influence in influences):
        names = np.unique(np.concatenate([influence.groups for influence in influences]))
    mean_SG = np.zeros((len(influences), len(names)))
    extra_S = np.zeros(len(influences))
    for i, influence in enumerate(influences):
        u_nG = influence.by_seed
        mean_SG[i, np.searchsorted(names, influence.groups)] = u_nG.mean(axis=0)
        n = len(u_nG)
        if n > 1:
            extra_S[i] = ((u_nG - u_nG.mean(axis=0)) ** 2).sum() / (n * (n - 1))
    values, vectors = np.linalg.eigh(mean_SG @ mean_SG.T - np.diag(extra_S))
    return (vectors * np.maximum(values, 0.0)) @ vectors.T, max(len(names) - 1, 1)


def uncertainty_of_means(
    scores: Sequence[np.ndarray], item_covariances: Sequence[tuple[np.ndarray, int]]
) -> Uncertainty:
    """The uncertainty of each strategy's mean over seeds of the average over tasks.

    Args:
        scores: per strategy [n_i], the average over tasks of each seed.
        item_covariances: item_covariance of each task with known items, times the square of its weight in the average.
    """
    variance, df = pooled_seed_variance(scores)
    return Uncertainty(
        seed=np.array([variance / len(y) for y in scores]),
        seed_df=df,
        items=[covariance for covariance, _ in item_covariances],
        items_df=[df for _, df in item_covariances],
    )


def half_width(variance: float, df: float) -> float:
    """Half of the two-sided 95 % interval: t_{0.975, df} sqrt(variance) (Student, Biometrika 1908)."""
    return float(special.stdtrit(df, 0.5 + CONFIDENCE / 2) * np.sqrt(variance))


def two_sided_p(difference: float, variance: float, df: float) -> float:
    """p-value of the t-test of no difference: 2 P(T_df > |difference| / sqrt(variance))."""
    if variance <= 0:
        return 1.0 if difference == 0 else 0.0
    return float(2 * special.stdtr(df, -abs(difference) / np.sqrt(variance)))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number: the chance of any false claim stays below the level of each.

    In increasing order, p_(k) becomes max over j <= k of min(1, (m - j + 1) p_(j)) (Holm, Scandinavian Journal of
    Statistics 1979).
    """
    m = len(p_values)
    adjusted = [0.0] * m
    running = 0.0
    for position, index in enumerate(sorted(range(m), key=lambda i: p_values[i])):
        running = max(running, min(1.0, (m - position) * p_values[index]))
        adjusted[index] = running
    return adjusted


def wilson(value: float, num: float) -> tuple[float, float]:
    """The 95 % interval of a proportion in `num` independent items (Wilson, Journal of the American Statistical
    Association 1927, 22, 209-212).

    It stays within 0..1, and is no point where no item or every item is right. For an average that is no plain
    proportion, `num` is the number of items of one with the same variance: value (1 - value) / variance + 1 (as for
    surveys: Franco, Little, Louis and Slud, Journal of Survey Statistics and Methodology 2019, 7, 334-364).
    """
    z = float(special.ndtri(0.5 + CONFIDENCE / 2))
    centre = (value + z**2 / (2 * num)) / (1 + z**2 / num)
    half = z / (1 + z**2 / num) * np.sqrt(value * (1 - value) / num + z**2 / (4 * num**2))
    return max(float(centre - half), 0.0), min(float(centre + half), 1.0)


def critical_value(contrasts: np.ndarray, covariance: np.ndarray, df: float, two_sided: bool = False) -> float:
    """The 95 % point of the largest of several correlated t statistics that share their variance estimate.

    P(max_j T_j <= d) = 0.95, T multivariate t: Dunnett's value (Journal of the American Statistical Association 1955)
    for the differences to one mean; with two_sided, of |T_j|, Tukey's (The Problem of Multiple Comparisons, 1953) for
    the differences of all pairs. Found as the quantile of a fixed sample: the same number every time, within about 0.01
    of the tables.

    Args:
        contrasts: [m, S] weights of the means in each difference. covariance: [S, S] of the means.
        df: of the variance estimate; NORMAL_DF and more is the normal distribution.
    """
    errors = _errors(contrasts, covariance)
    if not errors.any():
        return 0.0
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    normal_NS = _standard_normal(NUM_DRAWS, len(covariance)) @ root.T
    chi_square = np.random.Generator(np.random.PCG64(1)).chisquare
    scale_N = np.sqrt(chi_square(df, NUM_DRAWS) / df) if df < NORMAL_DF else 1.0
    largest_N = np.full(NUM_DRAWS, -np.inf)
    for weights, error in zip(contrasts, errors, strict=True):
        if error > 0:
            t_N = normal_NS[:, weights != 0] @ (weights[weights != 0] / error)
            np.maximum(largest_N, np.abs(t_N) if two_sided else t_N, out=largest_N)
    return float(np.quantile(largest_N / scale_N, CONFIDENCE))


@functools.lru_cache(maxsize=2)
def _standard_normal(num_draws: int, num: int) -> np.ndarray:
    return np.random.Generator(np.random.PCG64(0)).standard_normal((num_draws, num))


def _errors(contrasts: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    return np.sqrt(np.maximum(np.einsum("ms,st,mt->m", contrasts, covariance, contrasts), 0.0))


def could_be_best(means: np.ndarray, uncertainty: Uncertainty) -> np.ndarray:
    """[S] bool: which strategies the data do not exclude as the best, at 95 % for all statements together.

    Hsu's multiple comparisons with the best (Annals of Statistics 1981; Multiple Comparisons, 1996, chapter 4):
    strategy i could be the best when  mean_i - mean_j + d_i se_ij > 0  for every other j, d_i being Dunnett's value
    with i as the control. When one alone could be the best, it is the best. Overlap of intervals is not used: it is
    wrong in half of the cases among equals.

    Args:
        means: [S]. uncertainty: of these means, in this order; at least two strategies.
    """
    num = len(means)
    covariance = uncertainty.covariance()
    result = np.ones(num, dtype=bool)
    for i in range(num):
        others = np.delete(np.arange(num), i)
        contrasts = np.eye(num)[i] - np.eye(num)[others]
        df = min(uncertainty.of_contrast(contrast)[1] for contrast in contrasts)
        d = critical_value(contrasts, covariance, df)
        gaps = means[i] - means[others]
        result[i] = bool(np.all((gaps + d * _errors(contrasts, covariance) > 0) | (gaps >= 0)))
    return result


def rank_intervals(means: np.ndarray, uncertainty: Uncertainty) -> np.ndarray:
    """[S, 2] int: the best and the worst place that each strategy can have, at 95 % for all of them together.

    From all pairwise comparisons: 1 + how many are better than it beyond Tukey's value, S - how many are worse (Al
    Mohamad, Goeman and van Zwet, Simultaneous confidence intervals for ranks with application to ranking institutions,
    Biometrics 2022, 78, 238-247; arXiv 1708.02428). Equals share all of their places.

    Args:
        means: [S]. uncertainty: of these means, in this order; at least two strategies.
    """
    num = len(means)
    first, second = np.triu_indices(num, 1)
    contrasts = np.eye(num)[first] - np.eye(num)[second]
    covariance = uncertainty.covariance()
    df = min(uncertainty.of_contrast(contrast)[1] for contrast in contrasts)
    gaps = contrasts @ means
    apart = np.abs(gaps) > critical_value(contrasts, covariance, df, two_sided=True) * _errors(contrasts, covariance)
    better = np.zeros((num, num), dtype=bool)  # [i, j]: i is better than j
    better[first, second], better[second, first] = apart & (gaps > 0), apart & (gaps < 0)
    return np.stack([1 + better.sum(axis=0), num - better.sum(axis=1)], axis=1)
