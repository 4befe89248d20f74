"""What trainings did: their curves over samples seen, their sums as a table, and the score of each budget.

Where a run has several budgets, curves and table are of the largest. Names are as they are: whoever renders a table
escapes them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.core import training_metrics
from pipeline.report.leaderboard import Estimate, Leaderboard, number, percent
from pipeline.report.records import Training

BUDGETS = "Average over all tasks of trainings with different budgets, each with a schedule of its own."
DID = (
    "Means over seeds. Loss and what it bounds are of the last tenth of the lines of whole batches; ln N - loss is a "
    "lower bound on the mutual information of images and captions as the model sees them, in nats."
)
MAX_CURVE_POINTS = 200
LOSS, BOUND = "loss", "mutual_information_bound_nats"
TRAIN_RECALL, HELD_OUT_RECALL = "train_recall_at_1", "held_out_recall_at_1"


@dataclass(frozen=True)
class Curve:
    """A value over samples seen, of one strategy: ([P], [P]) float64, the mean over seeds, and each seed alone."""

    strategy: str
    mean: tuple[np.ndarray, np.ndarray]
    seeds: tuple[tuple[np.ndarray, np.ndarray], ...]


@dataclass(frozen=True)
class Did:
    """What the trainings of one strategy did, means over seeds; None where it is not known.

    `repeats` is how often a uid was seen in the mean, `max_repeats` how often the most frequent one.
    """

    strategy: str
    unique_uids: float | None
    repeats: float | None
    max_repeats: float | None
    final_loss: float | None
    bound_nats: float | None
    train_recall: float | None
    held_out_recall: float | None
    samples_per_s: float | None
    data_wait_fraction: float | None
    warnings: tuple[str, ...]


def curves(board: Leaderboard, key: str) -> list[Curve]:
    """The curve of each strategy whose lines have the value, in the order of the config."""
    found = []
    for strategy in board.run.compared:
        lines = [_points(training, key) for training in board.run.trainings if training.strategy == strategy.name]
        lines = [line for line in lines if len(line)]
        mean = _binned([point for line in lines for point in line])
        if len(mean[0]) > 1:
            found.append(Curve(strategy.name, mean, tuple(_binned(line) for line in lines)))
    return found


def chance_loss(board: Leaderboard) -> tuple[float, str] | None:
    """(loss of a model that guesses, what it is called) with the whole batch; None where no line has it."""
    chance, ln_batch = (_most(board, name) for name in ("chance_loss", "ln_batch"))
    if chance is None:
        return None
    return chance, f"{chance:.2f}" if ln_batch is None else f"ln({math.exp(ln_batch):.0f}) = {chance:.2f}"


def _most(board: Leaderboard, name: str) -> float | None:
    """The largest of a value over all lines; None where no line has it."""
    values = (training_metrics.finite(line.get(name)) for training in board.run.trainings for line in training.curve)
    return max((value for value in values if value is not None), default=None)


def what_they_did(board: Leaderboard) -> list[Did]:
    """One for each strategy with a finished training, in the order of the config."""
    return [
        _did(strategy.name, trainings)
        for strategy in board.run.compared
        if (trainings := [t for t in board.run.trainings if t.strategy == strategy.name and t.facts])
    ]


def _did(strategy: str, trainings: Sequence[Training]) -> Did:
    def mean(values: Sequence[float | None]) -> float | None:
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if known else None

    def fact(name: str) -> float | None:
        return mean([training_metrics.finite(training.facts.get(name)) for training in trainings])

    uids, seen = fact("unique_uids"), fact("samples_seen")
    return Did(
        strategy,
        uids,
        seen / uids if uids and seen else None,
        fact("max_repeats"),
        mean([training_metrics.last_mean(training.curve, LOSS) for training in trainings]),
        mean([training_metrics.last_mean(training.curve, BOUND) for training in trainings]),
        fact(TRAIN_RECALL),
        fact(HELD_OUT_RECALL),
        fact("samples_per_s"),
        fact("data_wait_fraction"),
        _warnings(trainings),
    )


def _warnings(trainings: Sequence[Training]) -> tuple[str, ...]:
    """What the trainings warned of, alarms included, each once, with its seeds where not all did."""
    seeds: dict[str, list[int]] = {}
    for training in trainings:
        for text in dict.fromkeys(training.facts.get("warnings", ())):
            seeds.setdefault(str(text), []).append(training.seed)
    return tuple(
        text if len(some) == len(trainings) else f"seed{'s' * (len(some) > 1)} {', '.join(map(str, some))}: {text}"
        for text, some in seeds.items()
    )


def warning_lines(board: Leaderboard) -> list[str]:
    """`basic, oracle: the loss stays ...`, one a warning, over all budgets."""
    found: dict[str, list[str]] = {}
    for part in board.by_budget:
        budget = f" at {number(part.samples_seen)} samples" if board.smaller else ""
        for did in what_they_did(part):
            for text in did.warnings:
                found.setdefault(text, []).append(did.strategy + budget)
    return [f"{', '.join(names)}: {text}" for text, names in found.items()]


def did_cells(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts a strategy; columns that nothing is known of are left out."""
    columns = {
        "distinct samples": lambda did: number(did.unique_uids),
        "repeats": lambda did: _text(did.repeats, "{:.3g}") + _text(did.max_repeats, ", at most {:.0f}", ""),
        "final loss": lambda did: _text(did.final_loss, "{:.3f}"),
        "ln N - loss": lambda did: _text(did.bound_nats, "{:.3f}"),
        "train recall@1": lambda did: "-" if did.train_recall is None else f"{percent(did.train_recall)} %",
        "held-out recall@1": lambda did: "-" if did.held_out_recall is None else f"{percent(did.held_out_recall)} %",
        "samples/s": lambda did: number(did.samples_per_s),
        "data wait": lambda did: "-" if did.data_wait_fraction is None else f"{percent(did.data_wait_fraction)} %",
        "warnings": lambda did: str(len(did.warnings) or "-"),
    }
    all_did = what_they_did(board)
    texts = {name: [text(did) for did in all_did] for name, text in columns.items()}
    shown = {name: column for name, column in texts.items() if set(column) - {"-"}}
    body = [[did.strategy, *(column[line] for column in shown.values())] for line, did in enumerate(all_did)]
    return ["strategy", *shown], body


def did_record(did: Did) -> dict[str, Any]:
    """The numbers of did_cells, for JSON."""
    return {**{key: value for key, value in vars(did).items() if key != "strategy"}, "warnings": list(did.warnings)}


def version_lines(board: Leaderboard) -> list[str]:
    """`torch          2.9.1`, one a package that decides values, as the trainings found them; differing ones each."""
    found: dict[str, list[str]] = {"winnow": [str(board.run.header["winnow_version"])]}
    for training in (training for part in board.by_budget for training in part.run.trainings):
        facts = training.facts
        versions = {"code": facts.get("code"), **(facts.get("versions") or {})}
        for name, version in versions.items():
            if version is not None and str(version) not in found.setdefault(str(name), []):
                found[str(name)].append(str(version))
    return [f"{name:<20} {', '.join(versions)}" for name, versions in found.items() if versions]


def budget_cells(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts a strategy: its average at each budget, the smallest first."""
    parts = board.by_budget[::-1]
    by_name = [{row.strategy.name: row.average for row in part.rows} for part in parts]
    names = ["strategy", *(f"{number(part.samples_seen)} samples" for part in parts)]
    body = [[row.strategy.name, *(_average_text(found[row.strategy.name]) for found in by_name)] for row in board.rows]
    return names, body


def _average_text(average: Estimate) -> str:
    return "N/A" if average.value is None else f"{percent(average.value)} ± {percent(average.half_width)}"


def _text(value: float | None, form: str, missing: str = "-") -> str:
    return missing if value is None else form.format(value)


def _points(training: Training, key: str) -> list[tuple[float, float]]:
    """(samples seen, value) of each line that has it; losses only of whole batches."""
    lines = training_metrics.whole_batches(training.curve) if key == LOSS else training.curve
    pairs = [
        (training_metrics.finite(line.get("samples_seen")), training_metrics.finite(line.get(key))) for line in lines
    ]
    return [(x, y) for x, y in pairs if x is not None and y is not None]


def _binned(points: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """The points in order of x, averaged in at most MAX_CURVE_POINTS bins of as many x each."""
    if not points:
        return np.empty(0), np.empty(0)
    x, y = np.array(sorted(points)).T
    steps, index = np.unique(x, return_inverse=True)
    bins = index * min(MAX_CURVE_POINTS, len(steps)) // len(steps)
    count = np.bincount(bins)
    return np.bincount(bins, weights=x) / count, np.bincount(bins, weights=y) / count
