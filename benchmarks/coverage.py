"""How often the report's intervals and claims are right, by simulation with known truth (table: docs/statistics.md).

    python benchmarks/coverage.py [--repetitions 2000]

Five strategies (a baseline, two filters, and a random control for each) are trained with 2, 3, 5 or 10 seeds and answer
three tasks: accuracy, mean per-class recall, and recall of a retrieval whose captions share an image. Item j of a task
is answered rightly when

    ability_i + seed_is + task_seed_ist + difficulty_j + own_ij + noise_isj > 0,   noise standard normal

so the expected score over seeds and items is Phi(ability_i / sqrt(1 + the variances' sum)): the truth. A regime says
where the noise comes from. `coverage` is how often the 95 % interval holds the truth, with strategies that differ; the
rest is among equals, where a claim is always false. Nominal: 95 % of intervals hold, 5 % of experiments make a claim.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
from scipy import optimize, special  # noqa: E402

from pipeline.report import uncertainty  # noqa: E402
from pipeline.report.items import MEAN, Items  # noqa: E402
from pipeline.report.records import Result  # noqa: E402
from pipeline.report.scores import Scores  # noqa: E402
from pipeline.report.uncertainty import could_be_best, rank_intervals  # noqa: E402

STRATEGIES = ("no_filter", "first", "random_first", "second", "random_second")
BASELINE = dict.fromkeys(STRATEGIES[1:], "no_filter")
CONTROLS = {"first": "random_first", "second": "random_second"}
EQUAL = (-0.5,) * 5
SPREAD = (-0.8, -0.4, -0.6, -0.1, -0.5)
CAPTIONS = 5
NUM_DRAWS = 10_000  # of a critical value: coarser than the report's, which shifts a rate by 0.2 points, and quicker


@dataclass(frozen=True)
class Regime:
    """Standard deviations: of seeds (in all tasks, in one), of the items' difficulty, of a strategy's own with each."""

    name: str
    seed: float
    task_seed: float
    difficulty: float
    own: float
    num_items: int


REGIMES = (
    Regime("seeds", seed=0.2, task_seed=0.1, difficulty=0.3, own=0.0, num_items=600),
    Regime("items", seed=0.01, task_seed=0.0, difficulty=0.8, own=0.8, num_items=180),
    Regime("both", seed=0.08, task_seed=0.05, difficulty=0.7, own=0.5, num_items=300),
)
NUM_SEEDS = (2, 3, 5, 10)


def experiment(
    regime: Regime, num_seeds: int, abilities: tuple[float, ...], rng: np.random.Generator
) -> tuple[Scores, np.ndarray]:
    """Results of every strategy, seed and task, and the true score of each strategy."""
    results = []
    seed_Sn = rng.normal(0, regime.seed, (len(STRATEGIES), num_seeds))
    for task in ("objects", "classes", "captions"):
        num = regime.num_items
        if task == "captions":  # the captions of an image are as hard as the image, and one is the image's own question
            unit = np.arange(num) // (CAPTIONS + 1)
            stratum = (np.arange(num) % (CAPTIONS + 1) == CAPTIONS).astype(int)
        else:
            unit, stratum = np.arange(num), np.arange(num) % 10 if task == "classes" else np.zeros(num, dtype=int)
        first = None
        difficulty_J = rng.normal(0, regime.difficulty, num)[unit]
        for i, (name, ability) in enumerate(zip(STRATEGIES, abilities, strict=True)):
            own_J = rng.normal(0, regime.own, num)[unit]
            for seed in range(num_seeds):
                luck = seed_Sn[i, seed] + rng.normal(0, regime.task_seed)
                right = ability + luck + difficulty_J + own_J + rng.normal(size=num) > 0
                items = Items(MEAN, right.astype(np.float64), stratum, unit)
                first = first or items
                items = items.sharing(first)
                results.append(Result(name, 0, seed, task, None, None, items.value, items))
    spread = 1 + regime.seed**2 + regime.task_seed**2 + regime.difficulty**2 + regime.own**2
    return Scores(results), special.ndtr(np.array(abilities) / np.sqrt(spread))


def simulate(regime: Regime, num_seeds: int, repetitions: int, seed: int = 0) -> dict[str, float]:
    """Fractions of the experiments, by what they are of."""
    rng = np.random.default_rng([seed, num_seeds, REGIMES.index(regime)])
    seeds = {name: range(num_seeds) for name in STRATEGIES}
    tasks = ("objects", "classes", "captions")
    counts: dict[str, list[float]] = {}

    def count(name: str, values: Sequence[bool] | np.ndarray) -> None:
        counts.setdefault(name, []).append(float(np.mean(values)))

    for _ in range(repetitions):
        scores, truth = experiment(regime, num_seeds, SPREAD, rng)
        measured = scores.measure(seeds, tasks)
        true = dict(zip(STRATEGIES, truth, strict=True))
        found = {name: measured.estimate(name, ()) for name in STRATEGIES}
        count("mean", [abs(found[name].value - true[name]) <= found[name].half_width for name in STRATEGIES])
        for kind, pairs in (("to baseline", BASELINE), ("to control", CONTROLS)):
            against = measured.differences(pairs)
            gaps = {name: true[name] - true[other] for name, other in pairs.items()}
            count(kind, [abs(against[name].value - gaps[name]) <= against[name].half_width for name in pairs])

        measured = experiment(regime, num_seeds, EQUAL, rng)[0].measure(seeds, tasks)
        for kind, pairs in (("claim to baseline", BASELINE), ("claim to control", CONTROLS)):
            count(kind, [any(one.verdict != "tie" for one in measured.differences(pairs).values())])
        count("best excluded", ~could_be_best(measured.means, measured.uncertainty))
        places = rank_intervals(measured.means, measured.uncertainty)
        count("ranks", [bool((places == [1, len(STRATEGIES)]).all())])
    return {name: float(np.mean(values)) for name, values in counts.items()}


def detectable_difference(num_seeds: int, num_strategies: int, level: float) -> float:
    """The true difference that a t-test at this level finds in four of five runs, in deviations between seeds.

    Both means are over `num_seeds`, the variance is pooled over `num_strategies`; the power is a noncentral t's.
    """
    df = num_strategies * (num_seeds - 1)
    edge = special.stdtrit(df, 1 - level / 2)

    def lacking(effect: float) -> float:
        return special.nctdtr(df, effect, edge) - 0.2

    return float(optimize.brentq(lacking, 0.1, 15) * np.sqrt(2 / num_seeds))


COLUMNS = {
    "mean": "mean",
    "to baseline": "difference to the baseline",
    "to control": "difference to the control",
    "ranks": "all rank intervals",
    "claim to baseline": "false claim to the baseline",
    "claim to control": "false claim to the control",
    "best excluded": "one of the best excluded",
}


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=2000)
    repetitions = parser.parse_args().repetitions
    uncertainty.NUM_DRAWS = NUM_DRAWS
    print("| noise from | seeds | " + " | ".join(COLUMNS.values()) + " |")
    print("|---|" + "---:|" * (len(COLUMNS) + 1))
    for regime in REGIMES:
        for num_seeds in NUM_SEEDS:
            rates = simulate(regime, num_seeds, repetitions)
            texts = [f"{100 * rates[name]:.1f}" for name in COLUMNS]
            print(f"| {regime.name} | {num_seeds} | " + " | ".join(texts) + " |", flush=True)
    error = 100 * np.sqrt(0.95 * 0.05 / repetitions)
    print(f"\nPercent, {repetitions} experiments a line; a simulation error of {error:.1f} points.\n")
    print("| seeds | one comparison | the hardest of five by Holm |")
    print("|---:|---:|---:|")
    for num_seeds in NUM_SEEDS:
        found = [detectable_difference(num_seeds, 6, level) for level in (0.05, 0.05 / 5)]
        print(f"| {num_seeds} | {found[0]:.2f} | {found[1]:.2f} |")
    print("\nThe difference of two of six strategies found in four of five runs, in deviations between seeds.")


if __name__ == "__main__":
    main()
