"""The leaderboard: what each strategy reached, how it differs from the baseline, and what may be concluded.

A seed counts for a strategy when its training has a result for every task; averages are over these seeds only, and
there is no average over some of the tasks. Fractions are 0..1 here; percent is made where text is made.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from pipeline.core import storage
from pipeline.core.config import BesideConfig
from pipeline.report.aggregates import CHANCE_ADJUSTED, Aggregate, aggregates_of, is_datacomp
from pipeline.report.records import OUTSIDE_LABELS, Contamination, Result, Run, Strategy, Task, Training, read_run
from pipeline.report.scores import Difference, Estimate, Measured, Scores
from pipeline.report.uncertainty import could_be_best, equal_seed_variance_p, half_width, rank_intervals

if TYPE_CHECKING:
    from pipeline.report.elsewhere import Beside

UNEQUAL_LEVEL = 0.01  # of the test that seeds matter equally for all strategies
MANY_TASKS = 8  # above this, tables show the averages of groups in place of their tasks


@dataclass(frozen=True)
class Column:
    """A column of scores: one task, or the average of a group."""

    name: str
    tasks: tuple[str, ...]

    @property
    def is_group(self) -> bool:
        return self.tasks != (self.name,)


@dataclass(frozen=True)
class Row:
    """One strategy. `rank` is 0 for the baseline, then by average; None without an average.

    `rank_interval` is the best and the worst place that it can have among those that compete (the baseline does), at
    95 % for all rows together; None with one seed and for those outside. `control` is the compared strategy that takes
    as many rows at random.
    """

    rank: int | None
    strategy: Strategy
    scores: dict[str, Estimate]  # by column
    task_scores: dict[str, Estimate]
    average: Estimate
    standing: str  # best, could be best, not best, oracle, reference, or "" when nothing can be said
    difference: Difference | None
    task_differences: dict[str, Difference]
    seeds: tuple[int, ...]  # that count
    seeds_planned: int
    samples_seen: int | None
    repeats: float | None
    cpu_hours: float | None  # mean of its trainings
    gpu_hours: float | None
    checkpoints: tuple[str, ...]
    reasons: tuple[str, ...]  # why something is missing, one line each
    control: str | None = None
    control_difference: Difference | None = None
    rank_interval: tuple[int, int] | None = None
    aggregates: dict[str, Estimate] = field(default_factory=dict)  # by Aggregate.name


@dataclass(frozen=True)
class Cleaned:
    """Scores with and without the images that one contamination stage found in the pool, over the same seeds.

    `scores` are {strategy: {task with such images: (with, without)}}, `averages` {strategy: (with, without)} over all
    tasks; `reasons` say why something is missing, one line each.
    """

    found: Contamination
    tasks: tuple[str, ...]  # with images that are in the pool
    scores: dict[str, dict[str, tuple[Estimate, Estimate]]]
    averages: dict[str, tuple[Estimate, Estimate]]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Leaderboard:
    """All rows of one budget, and what they say. `smaller` are the leaderboards of smaller ones, the largest first.

    `run` has the trainings of this budget alone.
    """

    run: Run
    samples_seen: int | None  # None without a training
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    one_seed: bool
    headline: str
    notes: tuple[str, ...]
    cleaned: tuple[Cleaned, ...] = ()
    smaller: tuple[Leaderboard, ...] = ()
    aggregates: tuple[Aggregate, ...] = ()
    beside: Beside | None = None

    @property
    def by_budget(self) -> tuple[Leaderboard, ...]:
        """This leaderboard and the smaller ones."""
        return (self, *self.smaller)


def build_report(run_path: str, beside: Sequence[BesideConfig] | None = None) -> Leaderboard:
    """The leaderboard of the run in this folder, written beside run.json as leaderboard.{md,json,csv,html}.

    Args:
        beside: what is shown beside it; None: what the run recorded.
    """
    from pipeline.report.elsewhere import recorded, with_beside
    from pipeline.report.page import html_page
    from pipeline.report.tables import csv_text, json_text, markdown_text

    run = read_run(run_path)
    run, found = with_beside(run, recorded(run) if beside is None else beside)
    board = replace(make_leaderboard(run), beside=found)
    folder = storage.absolute(run_path)
    texts = {"md": markdown_text(board), "json": json_text(board), "csv": csv_text(board), "html": html_page(board)}
    for extension, text in texts.items():
        storage.write_bytes(storage.join(folder, f"leaderboard.{extension}"), text.encode("utf-8", "replace"))
    return board


def make_leaderboard(run: Run) -> Leaderboard:
    """The leaderboard of these records: of the largest budget, with those of the smaller ones."""
    boards = [_make_one(run.at(samples_seen), samples_seen) for samples_seen in reversed(run.budgets)]
    first, *smaller = boards or [_make_one(run, None)]
    return replace(first, smaller=tuple(smaller))


def _make_one(run: Run, samples_seen: int | None) -> Leaderboard:
    scores = Scores(run.results)
    values = scores.values
    trainings = {s.name: [t for t in run.trainings if t.strategy == s.name] for s in run.compared}
    names = [s.name for s in run.compared]
    all_tasks = tuple(task.name for task in run.tasks)
    columns = _columns(run.tasks)

    def seeds_with(tasks: Sequence[str], strategy: str) -> list[int]:
        return [t.seed for t in trainings[strategy] if all((strategy, t.seed, task) in values for task in tasks)]

    averaged = tuple(task.name for task in run.averaged)
    complete = {name: seeds_with(averaged, name) if averaged else [] for name in names}

    def measure(tasks: tuple[str, ...], chance: Mapping[str, float] | None = None) -> Measured:
        inside = set(tasks) <= set(averaged)
        seeds = {name: (inside and complete[name]) or seeds_with(tasks, name) for name in names}
        return scores.measure({name: found for name, found in seeds.items() if found}, tasks, chance)

    by_column = {column.name: measure(column.tasks) for column in columns}
    by_task = {task: measure((task,)) for task in all_tasks}
    average = scores.measure({name: seeds for name, seeds in complete.items() if seeds}, averaged)

    to_baseline = {name: run.baseline for name in names if name != run.baseline}
    controls = {s.name: s.control for s in run.compared if s.control in names}
    differences, control_differences = average.differences(to_baseline), average.differences(controls)
    task_differences = {task: measured.differences(to_baseline) for task, measured in by_task.items()}
    standings, rank_intervals_ = _standings(run.compared, average)
    ranks = _ranks(average, run.baseline)
    aggregates = aggregates_of(run.averaged)
    estimates = {a.name: _aggregate_estimates(a, run.averaged, names, values, measure) for a in aggregates}
    rows = []
    for strategy in run.compared:
        name = strategy.name
        done = [t for t in trainings[name] if t.checkpoint and not t.error]
        seen = [t.facts["samples_seen"] for t in done if t.facts.get("samples_seen") is not None]
        rows.append(
            Row(
                rank=ranks.get(name),
                strategy=strategy,
                scores={c.name: by_column[c.name].estimate(name, _missing(c.tasks, name, values)) for c in columns},
                task_scores={t: by_task[t].estimate(name, _missing((t,), name, values)) for t in all_tasks},
                average=average.estimate(name, _missing_for_average(averaged, trainings[name], values)),
                standing=standings.get(name, ""),
                difference=differences.get(name),
                task_differences={t: found[name] for t, found in task_differences.items() if name in found},
                seeds=tuple(complete[name]),
                seeds_planned=len(trainings[name]),
                samples_seen=max(seen) if seen else None,
                repeats=max(seen) / strategy.kept_samples if seen and strategy.kept_samples else None,
                cpu_hours=_mean_fact(done, "cpu_hours"),
                gpu_hours=_mean_fact(done, "gpu_hours"),
                checkpoints=tuple(t.checkpoint for t in done if t.checkpoint),
                reasons=_reasons(run, strategy, trainings[name], values),
                control=controls.get(name),
                control_difference=control_differences.get(name),
                rank_interval=rank_intervals_.get(name),
                aggregates={a.name: estimates[a.name][name] for a in aggregates},
            )
        )
    rows.sort(key=lambda row: (row.rank is None, row.rank or 0, row.strategy.name != run.baseline))
    one_seed = bool(average.names) and average.uncertainty.seed_df == 0
    headline = _headline(rows, run.baseline, len(averaged), one_seed, average)
    whole = scores if run.whole_results is None else Scores(run.whole_results)
    cleaned = tuple(_cleaned(found, run, whole) for found in run.contamination)
    return Leaderboard(
        run=run,
        samples_seen=samples_seen,
        columns=columns,
        rows=tuple(rows),
        one_seed=one_seed,
        headline=headline,
        notes=(*run.notes, *_unequal_seeds(average)),
        cleaned=cleaned,
        aggregates=aggregates,
    )


def _aggregate_estimates(
    aggregate: Aggregate,
    tasks: Sequence[Task],
    names: Sequence[str],
    values: Mapping[tuple[str, int, str], Result],
    measure: Callable[..., Measured],
) -> dict[str, Estimate]:
    """The average of each strategy, or what it lacks."""
    if aggregate.name == CHANCE_ADJUSTED:
        chance = {task.name: task.chance for task in tasks if task.chance is not None and task.chance < 1}
        lacking = tuple(f"chance of {task}" for task in aggregate.missing(chance))
        measured = measure(aggregate.tasks, chance) if not lacking else None
    else:
        lacking = aggregate.missing({task.name for task in tasks if is_datacomp(task)})
        measured = measure(aggregate.tasks) if not lacking else None
    if measured is None:
        return {name: Estimate(missing=lacking) for name in names}
    return {name: measured.estimate(name, _missing(aggregate.tasks, name, values)) for name in names}


def _cleaned(found: Contamination, run: Run, scores: Scores) -> Cleaned:
    left = Scores(found.results)
    names = [strategy.name for strategy in run.compared]
    seeds = {name: [t.seed for t in run.trainings if t.strategy == name] for name in names}

    def measure(tasks: Sequence[str]) -> dict[str, tuple[Estimate, Estimate]]:
        both = {
            name: [seed for seed in seeds[name] if all((name, seed, task) in left.values for task in tasks)]
            for name in names
        }
        there = {name: counted for name, counted in both.items() if counted}
        pair = (scores.measure(there, tasks), left.measure(there, tasks))
        missing = {name: _missing(tasks, name, left.values) for name in names}
        return {name: (pair[0].estimate(name, missing[name]), pair[1].estimate(name, missing[name])) for name in names}

    tasks = tuple(task.name for task in run.tasks if task.name in found.tasks and found.tasks[task.name].matched)
    by_task = {task: measure((task,)) for task in tasks}
    whole = run.results if run.whole_results is None else run.whole_results
    errors = {(r.strategy, r.seed, r.task): r.error for r in whole}
    reasons = [
        f"{r.task}: {r.error}" for r in found.results if r.error and r.error != errors[r.strategy, r.seed, r.task]
    ]
    return Cleaned(
        found,
        tasks,
        {name: {task: by_task[task][name] for task in tasks} for name in names},
        measure(tuple(task.name for task in run.averaged)) if run.tasks else {},
        tuple(dict.fromkeys(reasons)),
    )


def _columns(tasks: Sequence[Task]) -> tuple[Column, ...]:
    if len(tasks) <= MANY_TASKS or not any(task.group for task in tasks):
        return tuple(Column(task.name, (task.name,)) for task in tasks)
    members: dict[str, list[str]] = {}
    for task in tasks:
        members.setdefault(task.group or task.name, []).append(task.name)
    return tuple(Column(name, tuple(inside)) for name, inside in members.items())


def _missing(tasks: Sequence[str], name: str, values: Mapping[tuple[str, int, str], Result]) -> tuple[str, ...]:
    have = {task for strategy, _, task in values if strategy == name}
    return tuple(task for task in tasks if task not in have) or tuple(tasks)


def _missing_for_average(
    tasks: Sequence[str], trainings: Sequence[Training], values: Mapping[tuple[str, int, str], Result]
) -> tuple[str, ...]:
    """The tasks that some seed lacks, when no seed has all."""
    return tuple(
        task for task in tasks if not trainings or any((t.strategy, t.seed, task) not in values for t in trainings)
    )


def _mean_fact(trainings: Sequence[Training], name: str) -> float | None:
    found = [float(t.facts[name]) for t in trainings if t.facts.get(name) is not None]
    return sum(found) / len(found) if found else None


def _reasons(
    run: Run, strategy: Strategy, trainings: Sequence[Training], values: Mapping[tuple[str, int, str], Result]
) -> tuple[str, ...]:
    if strategy.error:
        return (strategy.error,)
    seeds_by_reason: dict[str, list[int]] = {}
    by_key = {(r.seed, r.task): r for r in run.results if r.strategy == strategy.name}
    for training in trainings:
        if training.error or not training.checkpoint:
            seeds_by_reason.setdefault(f"training: {training.error or 'not done'}", []).append(training.seed)
            continue
        for task in run.tasks:
            if (strategy.name, training.seed, task.name) not in values:
                result = by_key.get((training.seed, task.name))
                reason = f"{task.name}: {(result and result.error) or 'no result'}"
                seeds_by_reason.setdefault(reason, []).append(training.seed)
    return tuple(
        f"seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}: {reason}"
        for reason, seeds in seeds_by_reason.items()
    )


def _ranks(average: Measured, baseline: str) -> dict[str, int]:
    """Rank by name: 0 the baseline, then by average; equal averages by name."""
    means = dict(zip(average.names, average.means, strict=True))
    others = sorted((name for name in means if name != baseline), key=lambda name: (-means[name], name))
    return {name: rank for rank, name in enumerate(others, start=1)} | ({baseline: 0} if baseline in means else {})


def _unequal_seeds(average: Measured) -> list[str]:
    """A note where seeds matter more for some strategies than for others: the pooled variance is not theirs."""
    p = equal_seed_variance_p(average.scores)
    if p is None or p > UNEQUAL_LEVEL:
        return []
    deviations = {
        name: float(y.std(ddof=1)) for name, y in zip(average.names, average.scores, strict=True) if len(y) > 1
    }
    most, least = max(deviations, key=deviations.__getitem__), min(deviations, key=deviations.__getitem__)
    note = (
        f"Seeds differ by {percent(deviations[most])} points (standard deviation) with {most} and by "
        f"{percent(deviations[least])} with {least} (Bartlett's test, {p_text(p)}); one deviation is taken for all, so "
        f"intervals are too narrow for {most} and too wide for {least}"
    )
    return [note]


def _standings(strategies: Sequence[Strategy], average: Measured) -> tuple[dict[str, str], dict[str, tuple[int, int]]]:
    """Best, could be best, worse, and the places that each can have; an outsider's label: it competes with nobody."""
    outside = {s.name: s.label for s in strategies if s.label in OUTSIDE_LABELS}
    contenders = [i for i, name in enumerate(average.names) if name not in outside]
    standings = {name: outside[name] for name in average.names if name in outside}
    if len(contenders) < 2 or average.uncertainty.seed_df == 0:
        return standings, {}
    means, uncertainty = average.means[contenders], average.uncertainty.subset(contenders)
    possible = could_be_best(means, uncertainty)
    for i, could in zip(contenders, possible, strict=True):
        standings[average.names[i]] = ("best" if possible.sum() == 1 else "could be best") if could else "not best"
    places = rank_intervals(means, uncertainty).tolist()
    return standings, {average.names[i]: (best, worst) for i, (best, worst) in zip(contenders, places, strict=True)}


def _headline(rows: Sequence[Row], baseline: str, num_tasks: int, one_seed: bool, average: Measured) -> str:
    """Who won, by how much, whether that is more than noise, and more than as many rows at random."""
    ranked = [row for row in rows if row.average.value is not None]
    contenders = sorted(
        (row for row in ranked if row.strategy.label not in OUTSIDE_LABELS),
        key=lambda row: (-row.average.value, row.strategy.name),
    )
    if not contenders:
        return "No strategy has results for every task, so there is nothing to compare."
    first = contenders[0]
    tasks = "1 task" if num_tasks == 1 else f"{num_tasks} tasks"
    reached = f"{percent(first.average.value)} % on average over {tasks}"
    if len(contenders) == 1:
        return f"Only {first.strategy.name} has results for every task ({reached}), so there is nothing to compare."
    if one_seed:
        return (
            f"{first.strategy.name} has the highest average, {percent(first.average.value)} %, but with one seed "
            "the intervals hold item noise only; cannot name a winner."
        )
    remark = control_remark(first)
    beyond = f" {remark}" if remark else ""
    if first.standing == "best" and (first.difference is None or first.difference.verdict == "better"):
        second = contenders[1]
        value, variance, df = average.contrast(first.strategy.name, second.strategy.name)
        margin = f"{percent(value)} ± {percent(half_width(variance, df))} points"
        ahead = f"{margin} ahead of {second.strategy.name}"
        if first.strategy.name == baseline:
            return f"{baseline} wins: {reached}, {ahead}. No filter helped here."
        if second.strategy.name == baseline:
            return f"{first.strategy.name} wins: {reached}, {ahead}{_meaning(first)}.{beyond}"
        return f"{first.strategy.name} wins: {reached}, {_over(first, baseline)}, and {ahead}.{beyond}"
    tied = [row.strategy.name for row in contenders[1:] if row.standing == "could be best"]
    lead = f"{first.strategy.name} leads with {reached}"
    if first.strategy.name != baseline:
        lead += f", {_over(first, baseline)}"
    if not tied:
        return f"{lead}.{beyond}"
    if len(tied) == 1:
        return f"{lead}. It is a tie with {tied[0]}: either could be best.{beyond}"
    return f"{lead}. It is a tie with {', '.join(tied[:-1])} and {tied[-1]}: any of them could be best.{beyond}"


def control_remark(row: Row) -> str:
    """What to think of a strategy that beats the baseline and not, or not known, as many rows at random; else empty."""
    against = row.control_difference
    if row.control is None or row.difference is None or row.difference.verdict != "better":
        return ""
    if against is None:
        return f"Whether {row.strategy.name} beats as many rows at random is not known: {row.control} has no average."
    if against.verdict == "better":
        return ""
    size = f"{points(against.value)} ± {percent(against.half_width)} points, {p_text(against.p_holm)}"
    verb = "is worse than" if against.verdict == "worse" else "does not beat"
    return (
        f"But {row.strategy.name} {verb} as many rows at random ({row.control}: {size}): "
        "the gain is that of a smaller set, not shown to be that of better data."
    )


def _over(row: Row, baseline: str) -> str:
    if row.difference is None:
        return f"with no {baseline} to compare with"
    width = percent(row.difference.half_width)
    direction = "above" if row.difference.value >= 0 else "below"
    return f"{percent(abs(row.difference.value))} ± {width} points {direction} {baseline}{_meaning(row)}"


def _meaning(row: Row) -> str:
    if row.difference is None:
        return ""
    more = "more than noise" if row.difference.verdict in ("better", "worse") else "within noise"
    return f" ({more}, {p_text(row.difference.p_holm)})"


def percent(fraction: float) -> str:
    """The fraction in percent with one decimal, without a sign: `43.2`."""
    return f"{100 * fraction:.1f}"


def plain(text: object) -> str:
    """The text on one line without control, direction or other unprintable characters."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\N{REPLACEMENT CHARACTER}" for c in str(text))


def number(value: int | float | None) -> str:
    """A count with thousands separated, or a dash."""
    return "-" if value is None else f"{value:,.0f}"


def points(fraction: float) -> str:
    """A difference in percentage points with its sign: `+3.1`."""
    text = f"{100 * fraction:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text.replace("-", "\N{MINUS SIGN}")


def has_published(board: Leaderboard) -> bool:
    """True when the config gives published values to show beside the averages."""
    return any(strategy.published is not None for strategy in board.run.compared)


def published_text(row: Row) -> str:
    """The published average in percent with one decimal, more where the config gives more; a dash without one."""
    if row.strategy.published is None:
        return "-"
    value = round(100 * row.strategy.published, 6)
    return f"{value:.1f}" if value == round(value, 1) else f"{value:g}"


def p_text(p: float | None) -> str:
    """A p-value as `p = 0.012` or `p < 0.001`."""
    if p is None:
        return ""
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"
