"""Means over seeds and tasks, and differences of strategies, each with its 95 % interval.

Which interval is which: with seeds, an estimate's and a difference's half width is of Student's t, from seeds and items
(uncertainty.py). `items` is beside it where one task is measured, from item noise alone: Wilson's for a value, a paired
bootstrap's for a difference. With one seed that is all that is known, and the half width is half of its length.

Shapes: S strategies, T tasks, n seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from pipeline.report.items import Items, difference_interval
from pipeline.report.records import Result
from pipeline.report.uncertainty import (
    CONFIDENCE,
    Influence,
    Uncertainty,
    half_width,
    holm,
    item_covariance,
    two_sided_p,
    uncertainty_of_means,
    wilson,
)

LEVEL = 1 - CONFIDENCE


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds with half of its 95 % interval; both None where tasks are missing.

    `items` is the 95 % interval from item noise alone, for one task with known items: these checkpoints, other items.
    """

    value: float | None = None
    half_width: float | None = None
    missing: tuple[str, ...] = ()
    items: tuple[float, float] | None = None


@dataclass(frozen=True)
class Difference:
    """A strategy minus the baseline, or minus its control: as many rows at random.

    `p` is the t-test's, `p_holm` the same adjusted for the number of strategies; both None with one seed.
    `verdict`: better, worse, tie, or "item noise only". `items` as in Estimate, by a paired bootstrap.
    """

    value: float
    half_width: float
    p: float | None = None
    p_holm: float | None = None
    verdict: str = "item noise only"
    items: tuple[float, float] | None = None


@dataclass(frozen=True)
class Measured:
    """The means of the strategies that have every task asked for, and their uncertainty. S may be 0.

    `scores` are what the means are of: [n] of each strategy. `items` are those of one task, by strategy and seed, where
    that task is all that was asked for; else empty.
    """

    names: list[str]
    means: np.ndarray
    scores: list[np.ndarray]
    uncertainty: Uncertainty
    items: dict[str, list[Items]]

    def estimate(self, name: str, missing: tuple[str, ...]) -> Estimate:
        if name not in self.names:
            return Estimate(missing=missing)
        i = self.names.index(name)
        width = half_width(*self.uncertainty.of_contrast(np.eye(len(self.names))[i]))
        value = float(self.means[i])
        interval = item_interval(self.items[name], value) if name in self.items else None
        return Estimate(value, self._shown(width, interval), items=interval)

    def _shown(self, width: float, items: tuple[float, float] | None) -> float:
        """One way for one number: with one seed, all noise that is known is that of the items."""
        return width if items is None or self.uncertainty.seed_df else (items[1] - items[0]) / 2

    def contrast(self, name: str, other: str) -> tuple[float, float, float]:
        """Value, variance and degrees of freedom of one strategy minus another."""
        unit = np.eye(len(self.names))
        weights = unit[self.names.index(name)] - unit[self.names.index(other)]
        return (float(weights @ self.means), *self.uncertainty.of_contrast(weights))

    def differences(self, pairs: Mapping[str, str]) -> dict[str, Difference]:
        """Each strategy minus its other in `pairs`, where both are measured; p-values adjusted for their number."""
        pairs = {name: other for name, other in pairs.items() if name in self.names and other in self.names}
        contrasts = {name: self.contrast(name, other) for name, other in pairs.items()}
        seeds = self.uncertainty.seed_df > 0
        p_values = [two_sided_p(*contrast) for contrast in contrasts.values()] if seeds else []
        adjusted = dict(zip(contrasts, holm(p_values), strict=seeds))
        result = {}
        for number, (name, (value, variance, df)) in enumerate(contrasts.items()):
            both = (self.items.get(name), self.items.get(pairs[name]))
            items = difference_interval(*both) if both[0] and both[1] else None
            found = Difference(value, self._shown(half_width(variance, df), items), items=items)
            if seeds:
                verdict = "tie" if adjusted[name] > LEVEL else "better" if value > 0 else "worse"
                found = replace(found, p=p_values[number], p_holm=adjusted[name], verdict=verdict)
            result[name] = found
        return result


class Scores:
    """Results by strategy, seed and task. The covariance of a task's items is computed once for all averages."""

    def __init__(self, results: Sequence[Result]) -> None:
        self.values = {(r.strategy, r.seed, r.task): r for r in results if r.value is not None}
        self._covariances: dict[tuple[str, tuple[tuple[str, tuple[int, ...]], ...]], tuple[np.ndarray, int] | None] = {}

    def measure(
        self, seeds: Mapping[str, Sequence[int]], tasks: Sequence[str], chance: Mapping[str, float] | None = None
    ) -> Measured:
        """The means over these seeds of the average over tasks; with `chance`, of (x - chance) / (1 - chance)."""
        names = list(seeds)
        offset_T = np.array([chance[task] if chance else 0.0 for task in tasks])
        scale_T = 1 / (1 - offset_T)
        scores = []
        for name in names:
            value_nT = np.array([[self.values[name, seed, task].value for task in tasks] for seed in seeds[name]])
            scores.append(((value_nT - offset_T) * scale_T).mean(axis=1))
        covariances = []
        for task, scale in zip(tasks, scale_T, strict=True):
            found = self._covariance(task, seeds) if names else None
            if found is not None:
                covariances.append((found[0] * (scale / len(tasks)) ** 2, found[1]))
        items = {}
        if len(tasks) == 1 and chance is None:
            by_name = {name: [self.values[name, seed, tasks[0]].items for seed in seeds[name]] for name in names}
            items = {name: found for name, found in by_name.items() if all(one is not None for one in found)}
        uncertainty = uncertainty_of_means(scores, covariances)
        return Measured(names, np.array([y.mean() for y in scores]), scores, uncertainty, items)

    def _covariance(self, task: str, seeds: Mapping[str, Sequence[int]]) -> tuple[np.ndarray, int] | None:
        key = (task, tuple((name, tuple(counted)) for name, counted in seeds.items()))
        if key not in self._covariances:
            found = [[self.values[name, seed, task].items for seed in counted] for name, counted in seeds.items()]
            known = all(items is not None for of_name in found for items in of_name)
            self._covariances[key] = item_covariance([_influence(of_name) for of_name in found]) if known else None
        return self._covariances[key]


def _influence(found: Sequence[Items]) -> Influence:
    first = found[0].units
    if all(items.units is first or np.array_equal(items.units, first) for items in found):
        return Influence(first, np.stack([items.influence for items in found]))
    groups = np.unique(np.concatenate([items.units for items in found]))
    by_seed = np.zeros((len(found), len(groups)))
    for row, items in zip(by_seed, found, strict=True):
        row[np.searchsorted(groups, items.units)] = items.influence
    return Influence(groups, by_seed)


def item_interval(found: Sequence[Items], value: float) -> tuple[float, float]:
    """The 95 % interval of a task's mean over these checkpoints, from the choice of its items alone.

    Wilson's, for as many plain items as say as much; exactly his for the share of items that one checkpoint gets right.
    """
    variance = float((_influence(found).by_seed.mean(axis=0) ** 2).sum())
    num = value * (1 - value) / variance + 1 if variance > 0 else min(items.num_equivalent for items in found)
    return wilson(value, num)
