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

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import special

CONFIDENCE = 0.95
NORMAL_DF = 1e6  # Student's t with this many degrees of freedom is the normal distribution to six digits
NUM_DRAWS = 200_000  # for Dunnett's critical value: its standard error is then about 0.005


@dataclass(frozen=True)
class Influence:
    """What each group of items adds to a metric's deviation from its expectation, per seed.

    Attributes:
        groups: [G] sorted, unique names.
        by_seed: [n, G] float64. A metric's item variance is the sum of squares over G of a row.
    """

    groups: np.ndarray
    by_seed: np.ndarray


def influence_of_items(correct: np.ndarray, stratum: np.ndarray, group: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sorted group names [G] and the influence of each on a mean over strata of the mean in each stratum, [G] float64.

    u_j = (x_j - mean_c) / (C sqrt(n_c (n_c - 1))) for item j of stratum c, summed within groups; the sum of u^2 is then
    the stratified variance  sum_c s_c^2 / n_c / C^2  (Cochran, Sampling Techniques, 1977, 5.3; summing within groups
    first is the cluster-robust form, Liang and Zeger 1986; Miller, arXiv 2411.00640, 2.2). A stratum of one item
    tells nothing about its variance and adds none.

    Args:
        correct: [J] 0 or 1 (or any value). stratum: [J] class or direction; one value for a plain mean.
        group: [J] items that share a group are not independent.
    """
    _, stratum_index, counts = np.unique(stratum, return_inverse=True, return_counts=True)
    x = np.asarray(correct, dtype=np.float64)
    means = np.bincount(stratum_index, weights=x) / counts
    scale = len(counts) * np.sqrt(counts * np.maximum(counts - 1.0, 1.0))
    u = (x - means[stratum_index]) / scale[stratum_index]
    groups, group_index = np.unique(group, return_inverse=True)
    return groups, np.bincount(group_index, weights=u, minlength=len(groups))


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


def item_covariance(influences: Sequence[Influence]) -> tuple[np.ndarray, int]:
    """[S, S] covariance of the strategies' means over seeds that comes from the choice of items, and its df, G - 1.

    cov_il = sum_g u_ig u_lg, u being the mean over seeds. On the diagonal, u also holds what differs from seed to
    seed on the same item; that part is in the seed variance already, so  sum_g sum_s (u_isg - u_ig)^2 / (n (n - 1))
    is taken off (the two-way random effects identity  var = MS_seed/n + MS_item/G - MS_error/(nG), Searle, Casella
    and McCulloch, Variance Components, 1992, 4.3). With one seed nothing can be taken off. Negative eigenvalues,
    which the subtraction can leave, are set to zero.
    """
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
    scores: Sequence[np.ndarray], influences_by_task: Sequence[Sequence[Influence]], num_tasks: int = 1
) -> Uncertainty:
    """The uncertainty of each strategy's mean over seeds of the average over tasks.

    Args:
        scores: per strategy [n_i], the average over tasks of each seed.
        influences_by_task: per task with known items, per strategy, the seeds in the order of `scores`.
        num_tasks: how many tasks the average is over, those without known items included.
    """
    variance, df = pooled_seed_variance(scores)
    covariances = [item_covariance(influences) for influences in influences_by_task]
    return Uncertainty(
        seed=np.array([variance / len(y) for y in scores]),
        seed_df=df,
        items=[covariance / num_tasks**2 for covariance, _ in covariances],
        items_df=[df for _, df in covariances],
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


def dunnett_critical_value(correlation: np.ndarray, df: float) -> float:
    """The one-sided 95 % point of the largest of several correlated t statistics that share their variance estimate.

    P(max_j T_j <= d) = 0.95, T multivariate t (Dunnett, Journal of the American Statistical Association 1955).
    Found as the quantile of a fixed sample: the same number every time, within about 0.01 of the tables.

    Args:
        correlation: [m, m] of the statistics; 0.5 off the diagonal for equal seeds and no item noise.
    """
    rng = np.random.Generator(np.random.PCG64(0))
    values, vectors = np.linalg.eigh(correlation)
    root = vectors * np.sqrt(np.maximum(values, 0.0))
    normal = rng.standard_normal((NUM_DRAWS, len(correlation))) @ root.T
    scale = np.sqrt(rng.chisquare(df, NUM_DRAWS) / df) if df < NORMAL_DF else 1.0
    return float(np.quantile(normal.max(axis=1) / scale, CONFIDENCE))


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
        others = [j for j in range(num) if j != i]
        contrasts = np.array([np.eye(num)[i] - np.eye(num)[j] for j in others])
        between = contrasts @ covariance @ contrasts.T
        errors = np.sqrt(np.maximum(np.diag(between), 0.0))
        safe = np.where(errors > 0, errors, 1.0)
        correlation = between / np.outer(safe, safe)
        np.fill_diagonal(correlation, 1.0)
        df = min(uncertainty.of_contrast(contrast)[1] for contrast in contrasts)
        d = dunnett_critical_value(correlation, df)
        gaps = means[i] - means[others]
        result[i] = bool(np.all((gaps + d * errors > 0) | (gaps >= 0)))
    return result
