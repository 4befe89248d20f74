"""How a metric follows from the items of a task, and how much it depends on which items the task happens to hold.

A metric is one of three functions of predictions.parquet:

    mean    the mean over strata of the mean in each: accuracy (one stratum), mean per class, recall over directions,
            Jaccard over instances
    worst   the least of the strata's means: worst group's accuracy
    f1      the mean over the labels that occur of F1 = 2 TP / (labels + predictions): macro F1 as WILDS computes it
            (wilds/common/metrics/all_metrics.py: f1_score over the labels of the items, not of the predictions)

Its item noise is kept as **influence** (the infinitesimal jackknife: Jaeckel 1972; Efron, The Jackknife, the Bootstrap
and Other Resampling Plans, 1982, chapter 6): what each independent unit adds to the deviation from the expectation.
Squares of it sum to the variance, products to the covariance of two checkpoints on the same items.

Shapes: J items, G independent units (an item, or an image with its captions), C strata or labels, B resamples.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from scipy import sparse

from pipeline.report.uncertainty import CONFIDENCE

NUM_RESAMPLES = 10_000
CHUNK_WEIGHTS = 1 << 19  # draws held at once: as many as stay in the cache
MEAN, WORST, F1 = "mean", "worst", "f1"


@dataclass(frozen=True, eq=False)
class Items:
    """The rows of predictions.parquet that a metric counts.

    Attributes:
        rule: MEAN, WORST or F1.
        outcome: [J] float64 in 0..1, 1 is right; F1: int, the predicted label.
        stratum: [J] class or direction, one value for a plain mean; WORST: the group; F1: the label.
        unit: [J] items that share one are not independent of one another.
        uncounted: names of further units, those in no group that counts.
    """

    rule: str
    outcome: np.ndarray
    stratum: np.ndarray
    unit: np.ndarray
    uncounted: np.ndarray | None = None

    @functools.cached_property
    def value(self) -> float:
        """The metric, 0..1."""
        code_J, num_C = self._strata
        if self.rule == F1:
            return float(_f1(*self._counts).mean())
        mean_C = np.bincount(code_J, weights=self.outcome) / num_C
        return float(mean_C.min() if self.rule == WORST else mean_C.mean())

    @functools.cached_property
    def units(self) -> np.ndarray:
        """[G] sorted, unique names of the independent units."""
        return self._by_unit[0]

    @functools.cached_property
    def influence(self) -> np.ndarray:
        """[G] float64: what each of `units` adds to the metric's deviation; the sum of squares is the variance.

        mean: u_j = (x_j - mean_c) / (C sqrt(n_c (n_c - 1))) for item j of stratum c, summed within units; the sum of
        u^2 is the stratified variance  sum_c s_c^2 / n_c / C^2  (Cochran, Sampling Techniques, 1977, 5.3; summing
        within units first is the cluster-robust form, Liang and Zeger 1986; Miller, arXiv 2411.00640, 2.2). A stratum
        of one item tells nothing about its variance and adds none.

        f1: u_j = sum_c (2 TP_jc - F1_c (L_jc + P_jc)) / (L_c + P_c) / C, the derivative by the weight of item j, times
        sqrt(J / (J - 1)). L, P, TP: label, prediction, or both are c. Which labels occur is taken as given.

        worst: a minimum has no derivative where groups tie. Each group's influence is weighted by how often it is the
        worst in the bootstrap (the derivative of the bootstrap's mean: Efron, Journal of the American Statistical
        Association 2014, 109, 991-1007, theorem 1), and all are scaled such that the squares sum to the bootstrap's
        variance of the minimum itself. Where one group is clearly the worst this is its accuracy's own. At an exact
        tie the bootstrap's variance is on average above the true one (by a fifth for two groups), so intervals are
        wide rather than narrow; and the score itself lies below the worst group's expected accuracy, whose items were
        lucky: what is estimated is the expected score on a test set of this size.
        """
        code_J, num_C = self._strata
        num_J = len(code_J)
        if self.rule == F1:
            label_C, predicted_C, right_C = self._counts
            f1_C, size_C = _f1(label_C, predicted_C, right_C), label_C + predicted_C
            labels = np.unique(self.stratum)
            predicted_J = np.searchsorted(labels, self.outcome).clip(max=len(labels) - 1)
            known_J = labels[predicted_J] == self.outcome  # predictions of a label that no item has are counted nowhere
            u_J = (2.0 * (known_J & (predicted_J == code_J)) - f1_C[code_J]) / size_C[code_J]
            u_J -= np.where(known_J, f1_C[predicted_J] / size_C[predicted_J], 0.0)
            u_J *= np.sqrt(num_J / max(num_J - 1, 1)) / len(labels)
        else:
            mean_C = np.bincount(code_J, weights=self.outcome) / num_C
            u_J = (self.outcome - mean_C[code_J]) / np.sqrt(num_C * np.maximum(num_C - 1.0, 1.0))[code_J]
            u_J *= self._worst_weights[code_J] if self.rule == WORST else 1 / len(num_C)
        _, unit_J = self._by_unit
        return np.bincount(unit_J, weights=u_J, minlength=len(self.units))

    @property
    def num_equivalent(self) -> float:
        """The size of a plain sample that has this metric's variance where all outcomes are the same."""
        _, num_C = self._strata
        if self.rule == MEAN:
            return float(min(len(num_C) ** 2 / (1 / num_C).sum(), len(self.units)))
        return float(num_C[self._worst_weights > 0].min() if self.rule == WORST else len(self.units))

    def sharing(self, other: Items) -> Items:
        """The same, with the arrays of another checkpoint's items on this task where they are equal: held once."""
        if self.rule != other.rule or not np.array_equal(self.stratum, other.stratum):
            return self
        if not np.array_equal(self.unit, other.unit):
            return self
        shared = Items(self.rule, self.outcome, other.stratum, other.unit, other.uncounted)
        shared.__dict__.update(_strata=other._strata, _by_unit=other._by_unit)
        return shared

    def asks_about(self, names: np.ndarray) -> np.ndarray:
        """[len(names)] bool: there is a unit of this name, counted or not."""
        found = np.isin(names, self.units)
        return found if self.uncounted is None else found | np.isin(names, self.uncounted)

    def left_by(self, without: np.ndarray) -> Items | None:
        """The items of other units than these names, or None when nothing is left."""
        left_J = ~np.isin(self.unit, without)
        return Items(self.rule, self.outcome[left_J], self.stratum[left_J], self.unit[left_J]) if left_J.any() else None

    @functools.cached_property
    def _strata(self) -> tuple[np.ndarray, np.ndarray]:
        """[J] number of each item's stratum, and [C] their sizes."""
        _, code_J, num_C = np.unique(self.stratum, return_inverse=True, return_counts=True)
        return code_J, num_C

    @functools.cached_property
    def _by_unit(self) -> tuple[np.ndarray, np.ndarray]:
        names, unit_J = np.unique(self.unit, return_inverse=True)
        return names, unit_J

    @functools.cached_property
    def _counts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """F1: [C] items, predictions and right predictions of each label."""
        labels, code_J, label_C = np.unique(self.stratum, return_inverse=True, return_counts=True)
        found, num = np.unique(self.outcome, return_counts=True)
        predicted_C = np.zeros(len(labels), dtype=np.int64)
        known = np.isin(found, labels)
        predicted_C[np.searchsorted(labels, found[known])] = num[known]
        right_C = np.bincount(code_J, weights=self.outcome == self.stratum, minlength=len(labels))
        return label_C, predicted_C, right_C

    @functools.cached_property
    def _worst_weights(self) -> np.ndarray:
        """WORST: [C] what each group's mean has to be multiplied by in the minimum's influence; see `influence`."""
        code_J, num_C = self._strata
        mean_C = np.bincount(code_J, weights=self.outcome) / num_C
        rng = np.random.Generator(np.random.PCG64(0))
        # items within a group are exchangeable, so the number that is right is binomial
        drawn_BC = rng.binomial(num_C, mean_C, (NUM_RESAMPLES, len(num_C))) / num_C
        least_B = drawn_BC.min(axis=1)
        worst_BC = drawn_BC == least_B[:, None]
        share_C = (worst_BC / worst_BC.sum(axis=1, keepdims=True)).mean(axis=0)
        smoothed = float((share_C**2 * mean_C * (1 - mean_C) / num_C).sum())
        return share_C * np.sqrt(least_B.var() / smoothed) if smoothed > 0 else share_C


def _f1(label: np.ndarray, predicted: np.ndarray, right: np.ndarray) -> np.ndarray:
    return 2 * right / np.maximum(label + predicted, 1)


def items_of(table: pa.Table, metric: str) -> Items | None:
    """The items that this metric is computed from, or None where the predictions do not tell.

    Args:
        table: predictions.parquet. metric: a key of result.json's metrics.
    """
    name = metric.removeprefix("lp_")  # a linear probe's predictions have the same columns
    if name in ("acc1", "acc_avg", "acc5", "acc_top5_avg", "mean_per_class_recall", "recall-macro_all"):
        correct = _in_top5(table) if name in ("acc5", "acc_top5_avg") else _numpy(table["correct"])
        if correct is None:
            return None
        label = _numpy(table["label"])
        stratum = label if name in ("mean_per_class_recall", "recall-macro_all") else np.zeros_like(label)
        return Items(MEAN, correct.astype(np.float64), stratum, _numpy(table["item"]))
    if metric in ("acc_worst_region", "acc_wg", "acc_top5_wg"):
        counts = pc.is_valid(table["group"])
        uncounted = _numpy(table.filter(pc.invert(counts))["item"])
        table = table.filter(counts)
        correct = _in_top5(table) if metric == "acc_top5_wg" else _numpy(table["correct"])
        if correct is None or not len(correct):
            return None
        return Items(WORST, correct.astype(np.float64), _numpy(table["group"]), _numpy(table["item"]), uncounted)
    if metric == "F1-macro_all":
        return Items(F1, _numpy(table["prediction"]), _numpy(table["label"]), _numpy(table["item"]))
    if "jaccard_score" in metric:
        counts = _has_candidates(table, metric)
        if counts is None:
            return None
        uncounted = _numpy(table.filter(pc.invert(counts))["item"])
        table = table.filter(counts)
        jaccard = _numpy(table["jaccard"]).astype(np.float64)
        if not len(jaccard):
            return None
        return Items(MEAN, jaccard, np.zeros(len(jaccard)), _numpy(table["item"]), uncounted)
    match = re.fullmatch(r"(image_retrieval|text_retrieval|mean)_recall@(\d+)", metric)
    if match and f"hit@{match[2]}" in table.column_names:
        # CLIP_benchmark's names say what is retrieved: image_retrieval starts from a text
        start = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}.get(match[1])
        if start:
            table = table.filter(pc.equal(table["direction"], start))
        hits = _numpy(table[f"hit@{match[2]}"]).astype(np.float64)
        return Items(MEAN, hits, _numpy(table["direction"]), _numpy(table["group"]))
    return None


def _has_candidates(table: pa.Table, metric: str) -> pa.ChunkedArray | None:
    """[J] bool: the question is one of those that this Jaccard score is over, told by its number of candidates."""
    if metric == "jaccard_score_10-12":
        return table["counted"]
    match = re.fullmatch(r"(?:avg_jaccard_score|jaccard_score_(\d+)(?:-(\d+))?)", metric)
    if match is None:
        return None
    low, high = (match[1], match[2] or match[1]) if match[1] else (0, 1 << 30)
    return pc.and_(pc.greater_equal(table["candidates"], int(low)), pc.less_equal(table["candidates"], int(high)))


def _in_top5(table: pa.Table) -> np.ndarray | None:
    """[J] bool: the label is among the five best."""
    if "top5" not in table.column_names:
        return None
    label, top = _numpy(table["label"]), table["top5"].combine_chunks()
    owner = np.repeat(np.arange(len(label)), _numpy(pc.list_value_length(top)))
    return np.bincount(owner, weights=_numpy(pc.list_flatten(top)) == label[owner], minlength=len(label)) > 0


def _numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    array = column.to_numpy(zero_copy_only=False)
    return array.astype(str) if array.dtype == object else array


def difference_interval(first: Sequence[Items], second: Sequence[Items]) -> tuple[float, float] | None:
    """The 95 % interval, from the choice of items alone, of the mean metric of `first` minus that of `second`.

    A paired bootstrap of 10,000 resamples from a fixed seed (Efron and Tibshirani, An Introduction to the Bootstrap,
    1993, 13.3, percentiles): units are drawn with replacement, the same for all checkpoints, and the metric is computed
    again; within strata where every unit lies in one, as the strata are part of the task. Units whose outcomes are the
    same are drawn together, as a multinomial count, which changes nothing but the time.

    Args:
        first, second: the checkpoints of two strategies on one task, one for each seed.

    Returns:
        None where the two do not have the same items.
    """
    every = [*first, *second]
    rule, units = every[0].rule, every[0].units
    if any(items.rule != rule or not np.array_equal(items.units, units) for items in every):
        return None
    rng = np.random.Generator(np.random.PCG64(0))
    weight_M = np.array([1 / len(first)] * len(first) + [-1 / len(second)] * len(second))
    resampled = {MEAN: _resampled_mean, WORST: _resampled_worst, F1: _resampled_f1}[rule](every, weight_M, rng)
    if resampled is None:
        return None
    low, high = np.quantile(resampled, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _resampled_mean(every: Sequence[Items], weight_M: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """[B] the weighted sum of the checkpoints' means over strata. A mean is linear, so their sum stands for them."""
    strata = np.unique(every[0].stratum)
    _, unit_J = every[0]._by_unit
    cells = np.unique(unit_J * len(strata) + np.searchsorted(strata, every[0].stratum), return_counts=True)
    total = np.zeros(len(cells[0]))
    for items, weight in zip(every, weight_M, strict=True):
        _, unit_J = items._by_unit
        key_J = unit_J * len(strata) + np.searchsorted(strata, items.stratum).clip(max=len(strata) - 1)
        keys, num = np.unique(key_J, return_counts=True)
        if not np.array_equal(np.unique(items.stratum), strata) or not all(map(np.array_equal, (keys, num), cells)):
            return None
        total += weight * np.bincount(np.searchsorted(keys, key_J), weights=items.outcome)
    unit, stratum = np.divmod(cells[0], len(strata))
    if len(cells[0]) == len(every[0].units):  # every unit lies in one stratum
        blocks = [
            (stratum == c, total[stratum == c][:, None], cells[1][stratum == c][:, None]) for c in range(len(strata))
        ]
    else:
        sums, nums = (np.zeros((len(every[0].units), len(strata))) for _ in range(2))
        sums[unit, stratum], nums[unit, stratum] = total, cells[1]
        blocks = [(None, sums, nums)]
    result = np.zeros(NUM_RESAMPLES)
    for _, sums, nums in blocks:
        patterns, counts = np.unique(np.concatenate([sums, nums], axis=1), axis=0, return_counts=True)
        drawn = np.concatenate([weights @ patterns for weights in _weights(counts, rng)])
        width = sums.shape[1]
        result += (drawn[:, :width] / np.maximum(drawn[:, width:], 1)).sum(axis=1) / len(strata)
    return result


def _resampled_worst(every: Sequence[Items], weight_M: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """[B] the weighted sum of the checkpoints' worst groups, each of its own."""
    outcome_JM, stratum = _aligned(every)
    if stratum is None:
        return None
    least_BM = np.full((NUM_RESAMPLES, len(every)), np.inf)
    for group in np.unique(stratum):
        patterns, counts = np.unique(outcome_JM[stratum == group], axis=0, return_counts=True)
        drawn = np.concatenate([weights @ patterns for weights in _weights(counts, rng)])
        least_BM = np.minimum(least_BM, drawn / counts.sum())
    return least_BM @ weight_M


def _resampled_f1(every: Sequence[Items], weight_M: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """[B] the weighted sum of the checkpoints' macro F1 over the labels that a resample holds."""
    outcome_JM, stratum = _aligned(every)
    if stratum is None:
        return None
    labels, code_J = np.unique(stratum, return_inverse=True)
    patterns, counts = np.unique(np.column_stack([code_J, outcome_JM]), axis=0, return_counts=True)
    label_K, num = patterns[:, 0], len(labels)
    rows, columns = [label_K], [np.arange(len(label_K))]  # of a 0/1 matrix that sums patterns to L, P_m and TP_m
    for m, predicted_K in enumerate(patterns[:, 1:].T):
        code_K = np.searchsorted(labels, predicted_K).clip(max=num - 1)
        known = np.flatnonzero(labels[code_K] == predicted_K)
        right = np.flatnonzero((labels[code_K] == predicted_K) & (code_K == label_K))
        rows += [(1 + 2 * m) * num + code_K[known], (2 + 2 * m) * num + code_K[right]]
        columns += [known, right]
    place = (np.concatenate(rows), np.concatenate(columns))
    sums = sparse.csr_matrix((np.ones(len(place[0]), np.float32), place), ((1 + 2 * len(every)) * num, len(label_K)))
    parts = []
    for weights in _weights(counts, rng):
        totals = (
            (sums @ np.ascontiguousarray(weights.T, dtype=np.float32)).astype(np.float64).reshape(-1, num, len(weights))
        )
        there, of_seed = totals[0] > 0, np.zeros(len(weights))
        for m, weight in enumerate(weight_M):
            of_seed += weight * _f1(totals[0], totals[1 + 2 * m], totals[2 + 2 * m]).sum(axis=0, where=there)
        parts.append(of_seed / there.sum(axis=0))
    return np.concatenate(parts)


def _aligned(every: Sequence[Items]) -> tuple[np.ndarray, np.ndarray | None]:
    """[J, M] outcomes in the order of the units, and [J] their strata; None where those differ between checkpoints."""
    orders = [np.argsort(items.unit, kind="stable") for items in every]
    strata = [items.stratum[order] for items, order in zip(every, orders, strict=True)]
    outcome_JM = np.column_stack([items.outcome[order] for items, order in zip(every, orders, strict=True)])
    return outcome_JM, strata[0] if all(np.array_equal(strata[0], other) for other in strata) else None


def _weights(counts: np.ndarray, rng: np.random.Generator) -> Iterator[np.ndarray]:
    """[b, K] int64: how often each pattern is drawn when sum(counts) units are, in blocks of NUM_RESAMPLES rows in all.

    Args:
        counts: [K] units of each pattern.
    """
    num, size = int(counts.sum()), len(counts)
    few = size * 20 < num  # a binomial for each pattern costs some 20 draws of a unit
    rows = max(1, CHUNK_WEIGHTS // (size if few else num))
    owner = None if few else np.repeat(np.arange(size), counts)
    for start in range(0, NUM_RESAMPLES, rows):
        left = min(rows, NUM_RESAMPLES - start)
        if owner is None:
            yield rng.multinomial(num, counts / num, left)
        else:
            drawn = owner[rng.integers(0, num, (left, num), dtype=np.uint32)] + size * np.arange(left)[:, None]
            yield np.bincount(drawn.ravel(), minlength=left * size).reshape(left, size)
