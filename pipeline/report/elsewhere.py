"""What a report shows beside its run: other runs, and results from elsewhere.

Another run of the same pool, recipe, tasks and metric version joins the comparison: its records are merged with the
run's own, and all statistics are those of the merged records. A strategy that is the same in both (the same
checkpoints, or the same train set) stays one row: no training of it counts twice, and further seeds count for it. A
run that is unlike in any of these has a leaderboard of its own, with what is unlike. Imported rows are one training
each, by others: they have item noise where the number of test items is known, and no standing, difference or p-value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from pipeline.core import storage
from pipeline.core.config import BesideConfig, Config, validate
from pipeline.core.datacomp import DATACOMP_TASKS
from pipeline.core.errors import ConfigError, WinnowError, one_line, short
from pipeline.report.aggregates import CHANCE_ADJUSTED, Aggregate, aggregates_of, datacomp_aggregates
from pipeline.report.imported import ITS_METRIC, Cell, FoundRow, Results, canonical, read_results, task_names
from pipeline.report.items import MEAN
from pipeline.report.leaderboard import MANY_TASKS, Leaderboard, make_leaderboard, number, percent
from pipeline.report.records import Contamination, Result, Run, Strategy, Task, Training, overlap_of, read_run
from pipeline.report.scores import Estimate
from pipeline.report.uncertainty import wilson

# Each is a mean over items of a value 0..1, so its variance is at most value (1 - value) / items. Of a mean of classes,
# a worst group or an F1 the number of images alone says nothing of the kind.
MEANS_OVER_ITEMS = ("acc1", "acc5", "lp_acc1", "lp_acc5", "mean_recall@1")
FMOW = (
    "FMoW from elsewhere: DataComp's code counts the region Other, 4 images, so compare it with "
    "acc_worst_region_of_all, not with acc_worst_region."
)
MAX_NAMES = 12  # listed in a sentence


@dataclass(frozen=True)
class JoinedRun:
    """A run whose strategies are in this comparison.

    Attributes:
        added: their names there.
        same: its names of strategies that are this run's too, with theirs.
        more_seeds: how many of its trainings count for a strategy of this run, by that one's name.
        left_out: samples seen of its trainings at budgets that this run has not.
    """

    label: str
    added: tuple[str, ...]
    same: dict[str, str]
    more_seeds: dict[str, int]
    left_out: tuple[int, ...]


@dataclass(frozen=True)
class ApartRun:
    """A run that is unlike this one, with its own leaderboard; `unlike` says in what, a phrase each."""

    label: str
    board: Leaderboard
    unlike: tuple[str, ...]


@dataclass(frozen=True)
class ImportedRow:
    """One model of a file of results: one training, by others.

    `scores` are by task; `average` is over this run's tasks; `aggregates` are by Aggregate.name. Half widths are item
    noise alone, without that of the tasks in `unknown_noise`.
    """

    name: str
    source: str
    scores: dict[str, Estimate]
    average: Estimate
    aggregates: dict[str, Estimate]
    unknown_noise: tuple[str, ...]


@dataclass(frozen=True)
class Beside:
    """All that is shown beside a run. `remarks` is a sentence each on what came of every entry."""

    joined: tuple[JoinedRun, ...] = ()
    apart: tuple[ApartRun, ...] = ()
    rows: tuple[ImportedRow, ...] = ()
    own_tasks: tuple[str, ...] = ()  # this run's
    tasks: tuple[str, ...] = ()  # of the imported rows: this run's, then DataComp's
    aggregates: tuple[Aggregate, ...] = ()  # of the imported rows
    remarks: tuple[str, ...] = ()


def check_beside(config: Config) -> None:
    """None; reads all result files that `report.beside` names, before any work.

    Raises:
        ConfigError: with the first fault, as one line.
    """
    entries = [task if isinstance(task, str) else str(task.get("name", "")) for task in config.eval.tasks]
    names = task_names([Task(name, "", ITS_METRIC) for name in entries])
    labels: set[str] = set()
    for index, entry in enumerate(config.report.beside):
        place = f"report.beside.{index}"
        if entry.run is None:
            for row in read_results(entry, place).rows:
                _values(row, names)
            continue
        label = _label(entry)
        if label in labels:
            raise ConfigError(f"{place}.name = {label}, expected a name that no other run has")
        labels.add(label)


def with_beside(run: Run, entries: Sequence[BesideConfig]) -> tuple[Run, Beside]:
    """The run with the strategies of the runs that join it, and what is shown beside it.

    A report is made at the end of a run, or years later: what can't be read then is a remark, not an error.
    """
    joined, apart, remarks, results = [], [], [], []
    for index, entry in enumerate(entries):
        label = _label(entry)
        try:
            if entry.run is None:
                results.append(read_results(entry, f"report.beside.{index}"))
                continue
            other = _read_other(entry.run)
            unlike = unlike_in(run, other)
            if unlike:
                apart.append(ApartRun(label, make_leaderboard(other), unlike))
                remarks.append(
                    f"{label} is another run, not in this comparison: it is unlike this one in {'; '.join(unlike)}."
                )
                continue
            if label in [one.label for one in joined]:
                raise WinnowError("another run is called so, too")
            run, one = merge(run, other, label)
            joined.append(one)
            remarks.append(_joined_remark(one))
        except (OSError, WinnowError) as error:
            remarks.append(f"{label} is not shown: {one_line(error)}")
    beside = Beside(tuple(joined), tuple(apart))
    return run, _with_rows(replace(beside, remarks=tuple(remarks)), run, results)


def _read_other(path: str) -> Run:
    """The run in this folder, which may be anyone's."""
    try:
        return read_run(path)
    except (AttributeError, TypeError, ValueError) as error:
        raise WinnowError(f"{path}/run.json: {one_line(error)}, expected what a run writes") from error


def recorded(run: Run) -> list[BesideConfig]:
    """The entries of `report.beside` in the run's records."""
    return [validate(BesideConfig, entry, f"run.json: beside.{i}") for i, entry in enumerate(run.beside)]


def _label(entry: BesideConfig) -> str:
    return entry.name or storage.name_of(entry.run or entry.results or "")


def unlike_in(run: Run, other: Run) -> tuple[str, ...]:
    """In what the runs are unlike, a phrase each; empty when their strategies can be compared."""
    found = []
    theirs, ours = other.header["pool"], run.header["pool"]
    if theirs["path"] != ours["path"] or not ours["path"]:
        found.append(f"its pool {theirs['path']} (here {ours['path']})")
    elif theirs.get("digest") != ours.get("digest") or not ours.get("digest"):
        found.append(f"what is in {ours['path']}")  # another download of the same URLs
    theirs, ours = other.recipe_values, run.recipe_values
    if not (theirs and ours):
        found.append("its recipe, as far as is known: not all values are in the records")
    changed = [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]
    if theirs and ours and changed:
        values = [f"{key} {short(theirs.get(key))} (here {short(ours.get(key))})" for key in changed]
        found.append(f"its recipe: {_listed(values, ', ')}")
    found += _tasks_unlike(run, other)
    versions = [one.header["metric_version"] for one in (other, run)]
    if versions[0] != versions[1]:
        found.append(f"its metric version {versions[0]} (here {versions[1]})")
    if other.items_left_out != run.items_left_out:
        found.append("which images of the tasks it leaves out")
    return tuple(found)


def _tasks_unlike(run: Run, other: Run) -> list[str]:
    theirs, ours = ({task.name: task for task in one.tasks} for one in (other, run))
    found = []
    more, fewer = [name for name in theirs if name not in ours], [name for name in ours if name not in theirs]
    if more or fewer:
        parts = [f"{word} {_listed(names, ', ')}" for word, names in (("with", more), ("without", fewer)) if names]
        found.append(f"its tasks: {', '.join(parts)}")
    both = [(theirs[name], ours[name]) for name in theirs if name in ours]
    found += [f"its metric of {a.name}: {a.metric} (here {b.metric})" for a, b in both if a.metric != b.metric]
    files = [a.name for a, b in both if a.digest != b.digest or not a.digest]
    return found + ([f"its files of {_listed(files, ', ')}"] if files else [])


def merge(run: Run, other: Run, label: str) -> tuple[Run, JoinedRun]:
    """The run with the other's strategies, named `name @ label`; both are alike in all that `unlike_in` looks at."""
    budgets = set(run.budgets)
    theirs = [training for training in other.trainings if training.samples_seen in budgets]
    names = {s.name: _same_strategy(run, other, s) or f"{s.name} @ {label}" for s in other.compared}
    ours = {strategy.name for strategy in run.compared}
    same = {name: new for name, new in names.items() if new in ours}
    there = {(t.strategy, t.samples_seen, t.seed) for t in run.trainings}
    checkpoints = {t.checkpoint for t in run.trainings if t.checkpoint}
    added: dict[tuple[str, int, int], Training] = {}  # by what a training is called here
    for training in theirs:
        key = (names.get(training.strategy, ""), training.samples_seen, training.seed)
        if training.strategy in names and key not in there and training.checkpoint not in checkpoints:
            added.setdefault(key, training)
    keys = {(t.strategy, t.samples_seen, t.seed) for t in added.values()}

    def own(results: Sequence[Result]) -> tuple[Result, ...]:
        return tuple(
            replace(r, strategy=names[r.strategy]) for r in results if (r.strategy, r.samples_seen, r.seed) in keys
        )

    strategies = [_renamed(s, names) for s in other.compared if s.name not in same]
    notes = [f"{label}: {note}" for note in other.notes]
    compared = [*run.compared, *strategies]
    overlap = overlap_of(compared, notes) if strategies else run.overlap
    published = dict.fromkeys(note for note in (run.published_note, other.published_note) if note)
    merged = replace(
        run,
        strategies=(*run.strategies, *strategies),
        trainings=(*run.trainings, *(replace(t, strategy=name) for (name, _, _), t in added.items())),
        results=(*run.results, *own(other.results)),
        whole_results=None
        if run.whole_results is None or other.whole_results is None
        else (*run.whole_results, *own(other.whole_results)),
        overlap=overlap,
        notes=tuple(dict.fromkeys((*run.notes, *notes))),
        contamination=tuple(_both(one, other.contamination, own) for one in run.contamination),
        shares=tuple(dict.fromkeys((*run.shares, *other.shares))),
        published_note="; ".join(published),
    )
    seeds = [name for name, samples_seen, _ in added if name in ours and samples_seen == max(budgets)]
    more_seeds = {name: seeds.count(name) for name in dict.fromkeys(seeds)}
    left_out = sorted({t.samples_seen for t in other.trainings} - budgets)
    return merged, JoinedRun(label, tuple(s.name for s in strategies), same, more_seeds, tuple(left_out))


def _same_strategy(run: Run, other: Run, strategy: Strategy) -> str | None:
    """The strategy of this run that is the other's: by a checkpoint that both have, or by the train set.

    None where a training of both, with the same seed, made two checkpoints: then their records disagree, and both stay.
    """
    theirs = {(t.samples_seen, t.seed): t.checkpoint for t in other.trainings if t.strategy == strategy.name}
    found = []
    for ours in run.compared:
        made = {(t.samples_seen, t.seed): t.checkpoint for t in run.trainings if t.strategy == ours.name}
        both = [(made[key], theirs[key]) for key in made.keys() & theirs.keys() if made[key] and theirs[key]]
        alike = any(a == b for a, b in both) or (ours.train_set is not None and ours.train_set == strategy.train_set)
        if alike and all(a == b for a, b in both):
            found.append(ours.name)
    return strategy.name if strategy.name in found else next(iter(found), None)


def _renamed(strategy: Strategy, names: Mapping[str, str]) -> Strategy:
    control = names.get(strategy.control) if strategy.control else None
    return replace(strategy, name=names[strategy.name], control=control)


def _both(one: Contamination, others: Sequence[Contamination], own: Any) -> Contamination:
    """The stage with the scores of both runs, where both have the same artifact."""
    same = next((other for other in others if other.path == one.path and one.path), None)
    return one if same is None else replace(one, results=(*one.results, *own(same.results)))


def _joined_remark(joined: JoinedRun) -> str:
    parts = [f"{joined.label} is another run of this pool, recipe and tasks"]
    if joined.added:
        names = [name.removesuffix(f" @ {joined.label}") for name in joined.added]
        parts.append(f"in this comparison with its {_listed(names, ', ')}")
    if joined.same:
        pairs = [a if a == b else f"{a} ({b} here)" for a, b in joined.same.items()]
        parts.append(f"the same in both and counted once: {_listed(pairs, ', ')}")
    if joined.more_seeds:
        more = [f"{name} {count}" for name, count in joined.more_seeds.items()]
        parts.append(f"trainings of it that count for strategies here: {_listed(more, ', ')}")
    if joined.left_out:
        parts.append(f"left out: its trainings of {', '.join(map(number, joined.left_out))} samples")
    return f"{'; '.join(parts)}."


def _values(row: FoundRow, names: Mapping[str, str]) -> tuple[dict[tuple[str, str], float], list[str]]:
    """({(our task, metric): value}, names that are no task). Raises ConfigError for a value that is none."""
    found: dict[tuple[str, str], Cell] = {}
    unknown = []
    for name, by_metric in row.cells.items():
        task = names.get(canonical(name))
        if task is None:
            unknown.append(name)
            continue
        for metric, cell in by_metric.items():
            other = found.setdefault((task, metric), cell)
            if other is not cell:
                raise ConfigError(f"{cell.place}: {task} is in {other.place}, too, expected each result once")
    return {key: cell.fraction() for key, cell in found.items()}, unknown


def _with_rows(beside: Beside, run: Run, results: Sequence[Results]) -> Beside:
    """The same with the imported rows."""
    names, remarks, sizes = task_names(run.tasks), list(beside.remarks), _Sizes(run)
    read: list[tuple[FoundRow, str, dict[tuple[str, str], float]]] = []
    for found in results:
        unknown: dict[str, None] = dict.fromkeys(found.left_out)
        try:
            values = [(row, *_values(row, names)) for row in found.rows]
        except WinnowError as error:
            remarks.append(f"{found.source} is not shown: {one_line(error)}")
            continue
        read += [(row, found.source, by_key) for row, by_key, _ in values]
        unknown |= dict.fromkeys(name for _, _, more in values for name in more)
        some = "1 row" if len(values) == 1 else f"{len(values)} rows"
        remark = f"{some} of {found.source}: measured elsewhere, one training each, so they compete with nobody"
        remarks.append(f"{remark}; no task here: {_listed(list(unknown), ', ')}." if unknown else f"{remark}.")
    known = {task for _, _, values in read for task, _ in values}
    ours = tuple(task.name for task in run.averaged)
    tasks = (
        (*ours, *(name for name, e in DATACOMP_TASKS.items() if name in known and e["metric"] and name not in ours))
        if read
        else ()
    )
    aggregates = aggregates_of(run.averaged)
    if known & DATACOMP_TASKS.keys():
        aggregates = tuple(dict.fromkeys((*aggregates, *datacomp_aggregates())))
    rows = [_imported(row.name, source, values, run.averaged, tasks, aggregates, sizes) for row, source, values in read]
    for source in dict.fromkeys(row.source for row in rows):
        of_source = [(row, values) for row, (_, _, values) in zip(rows, read, strict=True) if row.source == source]
        remarks += _other_metrics_remark(source, of_source)
    for row, (found, _, _) in zip(rows, read, strict=True):
        remarks += _stated_remark(found, row)
    if any(("wilds/fmow", metric) in values for _, _, values in read for metric in ("acc_worst_region", ITS_METRIC)):
        remarks.append(FMOW)
    return replace(
        beside,
        rows=tuple(rows),
        own_tasks=ours,
        tasks=tasks,
        aggregates=aggregates if rows else (),
        remarks=tuple(remarks),
    )


class _Sizes:
    """How many independent items a task's value is a mean of: published, or those of this run's results."""

    def __init__(self, run: Run) -> None:
        self._items = {result.task: result.items for result in run.results if result.items is not None}

    def of(self, task: str, metric: str) -> float | None:
        """The number, or None where it is not known."""
        entry, items = DATACOMP_TASKS.get(task), self._items.get(task)
        if entry is not None and metric in MEANS_OVER_ITEMS:
            return float(entry["images"])
        if items is None or items.rule != MEAN or (entry is not None and len(items.units) != entry["images"]):
            return None
        return items.num_equivalent


def _imported(
    name: str,
    source: str,
    values: Mapping[tuple[str, str], float],
    own: Sequence[Task],
    tasks: Sequence[str],
    aggregates: Sequence[Aggregate],
    sizes: _Sizes,
) -> ImportedRow:
    metrics = {task: entry["metric"] for task, entry in DATACOMP_TASKS.items() if entry["metric"]}
    own_metrics = {task.name: task.metric for task in own}

    def scores(metric_of: Mapping[str, str], said: Mapping[str, str]) -> dict[str, Estimate]:
        """By task; a value without its metric's name is of the metric in `said`."""
        found = {}
        for task, metric in metric_of.items():
            value = values.get((task, metric), values.get((task, ITS_METRIC)) if said.get(task) == metric else None)
            if value is not None:
                found[task] = _one_value(value, sizes.of(task, metric))
        return found

    # An unnamed metric is DataComp's own where the task is DataComp's, else that of this run.
    said = own_metrics | metrics
    here, datacomp = scores(own_metrics, said), scores(metrics, said)
    # A column has one metric: of a task that is this run's, too, its own.
    shown = {task: (here if task in own_metrics else datacomp).get(task) or Estimate(missing=(task,)) for task in tasks}
    chance = {task.name: task.chance for task in own if task.chance is not None and task.chance < 1}
    found = {}
    for aggregate in aggregates:
        if aggregate.name == CHANCE_ADJUSTED:
            lacking = tuple(f"chance of {task}" for task in aggregate.missing(chance))
            found[aggregate.name] = Estimate(missing=lacking) if lacking else _mean(here, aggregate.tasks, chance)
        else:
            found[aggregate.name] = _mean(datacomp, aggregate.tasks)
    unknown = tuple(task for task, e in shown.items() if e.value is not None and e.half_width is None)
    average = _mean(here, tuple(own_metrics)) if own else Estimate()
    return ImportedRow(name, source, shown, average, found, unknown)


def _one_value(value: float, size: float | None) -> Estimate:
    if size is None:
        return Estimate(value)
    low, high = wilson(value, size)
    return Estimate(value, (high - low) / 2, items=(low, high))


def _mean(scores: Mapping[str, Estimate], tasks: Sequence[str], chance: Mapping[str, float] | None = None) -> Estimate:
    """The mean over all tasks, adjusted for chance where that is given, or what is missing.

    Half widths of independent means add up as their squares (Zou and Donner, Statistics in Medicine 2008, 27,
    1693-1702).
    """
    missing = tuple(task for task in tasks if task not in scores)
    if missing:
        return Estimate(missing=missing)
    offset = {task: chance[task] if chance else 0.0 for task in tasks}
    values = [(scores[task].value - offset[task]) / (1 - offset[task]) for task in tasks]
    widths = [scores[task].half_width / (1 - offset[task]) for task in tasks if scores[task].half_width is not None]
    half_width = float(np.sqrt(np.sum(np.square(widths))) / len(tasks)) if widths else None
    return Estimate(float(np.mean(values)), half_width)


def _other_metrics_remark(
    source: str, rows: Sequence[tuple[ImportedRow, Mapping[tuple[str, str], float]]]
) -> list[str]:
    """A sentence on the tasks of which rows have metrics, and not the one that the task has."""
    metrics: dict[str, dict[str, None]] = {}
    for row, values in rows:
        for task, metric in values:
            estimate = row.scores.get(task)
            name = metric or DATACOMP_TASKS.get(task, {}).get("metric")
            if name and (estimate is None or estimate.value is None):
                metrics.setdefault(task, {})[name] = None
    texts = [f"{task} ({', '.join(found)})" for task, found in metrics.items()]
    return [f"{source} has other metrics than the task's own of {_listed(texts, ', ')}."] if texts else []


def _stated_remark(row: FoundRow, made: ImportedRow) -> list[str]:
    """A sentence where the average of 38 that a file states is not the mean of its 38 values."""
    own = made.aggregates.get("datacomp")
    if row.stated_average is None or own is None or own.value is None:
        return []
    try:
        stated = float(row.stated_average.value)
    except ValueError:
        stated = float("nan")
    if abs(stated - own.value) <= 5e-4:
        return []
    where = f"{storage.name_of(row.stated_average.place)} = {short(row.stated_average.value)}"
    return [f"{row.name}: {where} is not the mean of its tasks, {own.value:.4f}, which is shown."]


def apart_about(part: ApartRun) -> str:
    """What the leaderboard of a run says that stands apart."""
    return f"Not comparable with this run: unlike in {'; '.join(part.unlike)}. {part.board.headline}"


def imported_cells(beside: Beside) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts an imported row. Where tasks are many, JSON and CSV have the single ones."""

    def known(tasks: Sequence[str]) -> bool:
        return any(row.scores[task].value is not None for row in beside.rows for task in tasks)

    tasks = [task for task in beside.tasks if known((task,))]
    tasks = tasks if len(tasks) <= MANY_TASKS else []
    averages = [
        aggregate
        for aggregate in beside.aggregates
        if any(row.aggregates[aggregate.name].value is not None for row in beside.rows)
        and aggregate.tasks not in [(task,) for task in tasks]
    ]
    averages.sort(key=lambda aggregate: aggregate.name != "datacomp")  # what such rows are compared by
    of_own = [f"average ({len(beside.own_tasks)})"] if known(beside.own_tasks) else []
    body = []
    for row in beside.rows:
        texts = [row.name, row.source, *([_text(row, row.average, beside.own_tasks)] if of_own else [])]
        texts += [_text(row, row.aggregates[a.name], a.tasks) for a in averages]
        texts += [_text(row, row.scores[task], (task,)) for task in tasks]
        body.append([*texts, "1", "-"])
    return ["row", "from", *of_own, *(a.title for a in averages), *tasks, "seeds", "standing"], body


def imported_about(beside: Beside) -> str:
    """What the table of the imported rows says."""
    about = "Measured elsewhere, as their files give them: one training each, by others, so no difference is tested."
    about += " Percent; ± is half of the 95 % interval from item noise alone, by the number of test images."
    if any(row.unknown_noise for row in beside.rows):
        about += " ± > lacks tasks whose item noise that number does not tell (means of classes, worst groups, F1)."
    return about


def _text(row: ImportedRow, estimate: Estimate, tasks: Sequence[str]) -> str:
    if estimate.value is None:
        return "N/A" if len(tasks) == 1 else f"N/A ({len(estimate.missing)} of {len(tasks)} missing)"
    if estimate.half_width is None:
        return percent(estimate.value)
    more = ">" if any(task in row.unknown_noise for task in tasks) else ""
    return f"{percent(estimate.value)} ± {more}{percent(estimate.half_width)}"


def _listed(names: Sequence[str], between: str) -> str:
    """The first names, and how many more there are."""
    more = len(names) - MAX_NAMES
    return between.join(map(short, names[:MAX_NAMES])) + (f"{between}{more} more" if more > 0 else "")
