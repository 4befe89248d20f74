"""A run folder as plain values: everything that the report says comes from here.

`<root>/runs/<id>/run.json` names what the run compared and which artifacts hold it, for example:

    {"config_name": "demo", "date": "2026-01-31T12:00:00Z", "metric_version": 1, "recipe": {"samples_seen": 16000, ...},
     "pool": {"path": "pool-3f2a91c0d4e7", "digest": "5d1e..", "rows": 10000, "ok": 9900, "failed": {"too_large": 100}},
     "strategies": [{"name": "no_filter", "selection": null, "compared": true, "label": "", "uses": [], "error": null}],
     "tasks": [{"name": "objects", "type": "zeroshot_classification", "metric": "acc1", "chance": 0.1, ...}],
     "trainings": [{"strategy": "no_filter", "samples_seen": 16000, "seed": 0, "checkpoint": "checkpoint-0f..", ...}],
     "results": [{"strategy": "no_filter", "samples_seen": 16000, "seed": 0, "task": "objects", "path": ..., ...}],
     "contamination": [{"stage": "contamination", "path": "contamination-9b..", "error": null}],
     "shares": ["topic"], "published": {"no_filter": 13.2}, "published_note": "an older metric",
     "recipe_values": {"lr": 0.001, ...}, "beside": [{"run": "/elsewhere/runs/..."}], "baseline": "no_filter"}

A strategy's `gallery` and `shares` are artifacts too: samples around its cuts, and of what its choice is made. So is
the pool's `profile`: {"path": ..., "error": null, "keeps_low": ["aspect_ratio"], "flagged": ["nsfw_score >= 0.5"]}.
Artifact paths are relative to the root. What can't be read becomes a reason in place of a value: a report never fails
because one training did.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import storage
from pipeline.core.artifact import read_record
from pipeline.core.errors import WinnowError, one_line
from pipeline.core.training_metrics import METRICS_FILE
from pipeline.report.items import Items, items_of
from pipeline.report.pool_profile import JPEG_START, MAX_CAPTION_CHARS, Profile, Sample, read_profile

# Labels of strategies that are shown and compete with nobody: one reads planted truth, the other is no choice from the
# pool but a whole reference.
OUTSIDE_LABELS = ("oracle", "reference")
PROBE = "linear_probe"  # the kind of task that fits a classifier to frozen features
MAX_OVERLAP_UIDS = 1_000_000  # per strategy; larger selections are compared on a sample by hash of the uid


@dataclass(frozen=True)
class Task:
    """A benchmark: its metric (a key of result.json's metrics) and the value that guessing reaches, if known.

    `counted`: one of the 38 of DataComp's average; `clean`: one of the 33 of them that its paper calls clean.
    """

    name: str
    kind: str
    metric: str
    chance: float | None = None
    group: str = ""
    in_domain: bool = False
    title: str = ""
    counted: bool = False
    clean: bool = False
    digest: str = ""  # of its files


@dataclass(frozen=True)
class FunnelStep:
    """What one rule left of the rows that the rule before left.

    `alone_kept` is how many of the rows that can be chosen at all pass the rule by itself, `only_removed` how many of
    them every other rule keeps and this one removes; both None for steps that say what can be chosen at all.
    """

    rule: str
    rows_in: int
    rows_kept: int
    alone_kept: int | None = None
    only_removed: int | None = None


@dataclass(frozen=True)
class SampleGroup:
    """Samples on one side, `kept` or `removed`: of a rule's cut, nearest first; at random where `rule` is empty."""

    rule: str
    side: str
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Share:
    """The pool's ok rows, and the samples of a strategy, that have one value of a column."""

    pool_rows: int
    samples: int


@dataclass(frozen=True)
class Mix:
    """Shares of one column in what one strategy chose, most frequent in the pool first; None is a null's."""

    values: dict[str | None, Share]
    other: Share
    num_other: int  # how many values `other` stands for


@dataclass(frozen=True)
class Strategy:
    """A strategy and what it kept. Counts are None where its selection is missing."""

    name: str
    compared: bool = True  # False: a part of other strategies; not trained
    label: str = ""
    uses: tuple[str, ...] = ()
    choosing: dict[str, float] = field(default_factory=dict)  # {samples_seen, cpu_hours, gpu_hours} before its training
    error: str | None = None
    selection: str | None = None
    train_set: str | None = None
    kept_rows: int | None = None
    kept_fraction: float | None = None  # of the pool; None where the rows are not the pool's
    kept_samples: int | None = None
    funnel: tuple[FunnelStep, ...] = ()
    gallery: str | None = None
    samples: tuple[SampleGroup, ...] = ()
    mixes: dict[str, Mix] = field(default_factory=dict)  # by column
    published: float | None = None  # an average from elsewhere, 0..1
    control: str | None = None  # the compared strategy that takes as many rows at random
    root: str = ""  # where its artifacts are


@dataclass(frozen=True)
class Training:
    """One training: its budget, facts of the checkpoint's record, and the lines of metrics.jsonl."""

    strategy: str
    samples_seen: int
    seed: int
    checkpoint: str | None
    error: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    curve: tuple[dict[str, Any], ...] = ()


@dataclass(frozen=True)
class Result:
    """One checkpoint on one task: the metric's value (0..1), or the reason why there is none.

    `items` are what the value is computed from; None when unknown.
    """

    strategy: str
    samples_seen: int
    seed: int
    task: str
    path: str | None
    error: str | None
    value: float | None = None
    items: Items | None = None


@dataclass(frozen=True)
class TaskImages:
    """How many images of a task were compared with the pool, and which of them (its items) are like one of its rows."""

    images: int
    not_compared: int
    matched: frozenset[str]
    matched_by_method: dict[str, int]
    rows: int  # of the pool that are like one


@dataclass(frozen=True)
class Contamination:
    """What a stage found that compared the pool with the tasks' images; or the reason why there is nothing.

    `results` are the run's, over the images that are not like any row of the pool; the others' questions are left out.
    """

    stage: str
    path: str | None
    error: str | None
    rows: int | None = None  # of the pool that are like an image of any task
    rows_by_method: dict[str, int] = field(default_factory=dict)
    tasks: dict[str, TaskImages] = field(default_factory=dict)
    results: tuple[Result, ...] = ()


@dataclass(frozen=True)
class Overlap:
    """How much the compared strategies' kept rows have in common, in the order of the config; NaN where unknown.

    Attributes:
        jaccard: [S, S] rows in both, of rows in either.
        shared_rows: [S, S] rows in both; what each keeps on the diagonal.
        one_in: 1: exact; n: measured on every n-th uid by hash, and shared_rows multiplied by n.
    """

    jaccard: np.ndarray
    shared_rows: np.ndarray
    one_in: int


@dataclass(frozen=True)
class Run:
    """All records of one run."""

    name: str
    header: dict[str, Any]
    config_text: str
    baseline: str
    tasks: tuple[Task, ...]
    strategies: tuple[Strategy, ...]
    trainings: tuple[Training, ...]
    results: tuple[Result, ...]
    overlap: Overlap | None  # None with one strategy
    notes: tuple[str, ...]
    contamination: tuple[Contamination, ...] = ()
    profile: Profile | None = None
    shares: tuple[str, ...] = ()  # columns of `mixes`
    published_note: str = ""
    recipe_values: dict[str, Any] = field(default_factory=dict)  # all that decides weights; empty where not recorded
    items_left_out: str | None = None  # the artifact that names the items of tasks that count in no score
    whole_results: tuple[Result, ...] | None = None  # over all items, where some are left out of `results`
    beside: tuple[dict[str, Any], ...] = ()  # `report.beside` of its config

    @property
    def compared(self) -> list[Strategy]:
        """The strategies that the run trains, in the order of the config."""
        return [strategy for strategy in self.strategies if strategy.compared]

    @property
    def averaged(self) -> tuple[Task, ...]:
        """The tasks that averages are over: all but probes of frozen features, unless there are these alone."""
        return tuple(task for task in self.tasks if task.kind != PROBE) or self.tasks

    @property
    def budgets(self) -> list[int]:
        """How many samples its trainings see, in increasing order."""
        return sorted({training.samples_seen for training in self.trainings})

    def at(self, samples_seen: int) -> Run:
        """The same run with the trainings of one budget alone."""

        def own(results: Sequence[Result]) -> tuple[Result, ...]:
            return tuple(result for result in results if result.samples_seen == samples_seen)

        return replace(
            self,
            trainings=tuple(training for training in self.trainings if training.samples_seen == samples_seen),
            results=own(self.results),
            whole_results=None if self.whole_results is None else own(self.whole_results),
            contamination=tuple(replace(found, results=own(found.results)) for found in self.contamination),
        )


def read_run(run_path: str) -> Run:
    """The records of the run in this folder. Raises WinnowError when run.json is missing or lacks a part."""
    run_path = storage.absolute(run_path)
    place = storage.join(run_path, "run.json")
    try:
        data = storage.read_json(place)
    except FileNotFoundError as error:
        raise WinnowError(f"{place} is missing, expected the folder of a run that has started") from error
    root = run_path.rsplit("/", 2)[0]
    notes: list[str] = []
    try:
        published = data.get("published") or {}
        strategies = tuple(_strategy(root, entry, data["pool"], published, notes) for entry in data["strategies"])
        tasks = tuple(_task(entry) for entry in data["tasks"] if entry["metric"] is not None)
        notes += [
            f"{e['name']}: no metric that counts, so it is left out" for e in data["tasks"] if e["metric"] is None
        ]
        by_name = {task.name: task for task in tasks}
        header = {key: data.get(key) for key in ("config_name", "date", "winnow_version", "metric_version")}
        header |= {"recipe": data.get("recipe") or {}, "pool": data["pool"]}
        trainings = tuple(_training(root, entry) for entry in data["trainings"])
        first_items: dict[str, Items] = {}
        found = [_contamination(root, entry) for entry in data.get("contamination", ())]
        pairs = [
            _result(root, entry, by_name[entry["task"]], found, notes, first_items)
            for entry in data["results"]
            if entry["task"] in by_name
        ]
        results = tuple(result for result, _ in pairs)
        contamination = tuple(
            replace(one, results=tuple(without[number] for _, without in pairs)) for number, one in enumerate(found)
        )
        baseline = data.get("baseline") or "no_filter"
        left_out = next((one for one in contamination if one.stage == data.get("leave_out")), None)
    except KeyError as error:
        raise WinnowError(f"{place}: {error} is missing, expected what pipeline/runs.py writes") from error
    overlap = overlap_of([s for s in strategies if s.compared], notes)
    profile = read_profile(root, data.get("profile"), notes)
    return Run(
        name=storage.name_of(run_path),
        header=header,
        config_text=_config_text(run_path),
        baseline=baseline,
        tasks=tasks,
        strategies=strategies,
        trainings=trainings,
        results=results if left_out is None else left_out.results,
        whole_results=None if left_out is None else results,
        overlap=overlap,
        notes=tuple(notes),
        contamination=contamination,
        profile=profile,
        shares=tuple(data.get("shares") or ()),
        published_note=data.get("published_note") or "",
        recipe_values=data.get("recipe_values") or {},
        items_left_out=left_out and left_out.path,
        beside=tuple(data.get("beside") or ()),
    )


def _config_text(run_path: str) -> str:
    try:
        return storage.read_bytes(storage.join(run_path, "config.yaml")).decode("utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _task(entry: Mapping[str, Any]) -> Task:
    return Task(
        name=entry["name"],
        kind=entry["type"],
        metric=entry["metric"],
        chance=entry.get("chance"),
        group=entry.get("group") or "",
        in_domain=bool(entry.get("in_domain")),
        title=entry.get("title") or entry["name"],
        counted=bool(entry.get("counted")),
        clean=bool(entry.get("clean")),
        digest=entry.get("digest") or "",
    )


def _facts(path: str) -> dict[str, Any]:
    record = read_record(path)
    if record is None:
        raise WinnowError(f"{storage.name_of(path)} is missing or unfinished")
    return record["facts"]


def _kept_fraction(entry: Mapping[str, Any], facts: Mapping[str, Any], pool: Mapping[str, Any]) -> float | None:
    if facts.get("kept_rows") is None or not pool["rows"] or entry.get("label") in OUTSIDE_LABELS[1:]:
        return None
    return facts["kept_rows"] / pool["rows"]


def _strategy(
    root: str, entry: Mapping[str, Any], pool: Mapping[str, Any], published: Mapping[str, float], notes: list[str]
) -> Strategy:
    facts: dict[str, Any] = {}
    error = entry.get("error")
    if entry.get("selection"):
        try:
            facts = _facts(storage.join(root, entry["selection"]))
        except (OSError, WinnowError) as reason:
            notes.append(f"{entry['name']}: {one_line(reason)}")
    elif not error:  # without a selection a strategy is the whole pool
        facts = {"kept_rows": pool["ok"], "kept_samples": pool["ok"]}
    gallery, mixes = entry.get("gallery"), {}
    samples: tuple[SampleGroup, ...] = ()
    try:
        samples = _samples(storage.join(root, gallery)) if gallery else ()
        mixes = _mixes(storage.join(root, entry["shares"])) if entry.get("shares") else {}
    except (OSError, WinnowError, pa.ArrowException, KeyError, IndexError, TypeError, ValueError) as reason:
        notes.append(f"{entry['name']}: {one_line(reason)}")
    return Strategy(
        name=entry["name"],
        compared=bool(entry.get("compared", True)),
        label=entry.get("label") or "",
        uses=tuple(entry.get("uses") or ()),
        choosing=dict(entry.get("choosing") or {}),
        error=error,
        selection=entry.get("selection"),
        train_set=entry.get("train_set"),
        kept_rows=facts.get("kept_rows"),
        kept_fraction=_kept_fraction(entry, facts, pool),
        kept_samples=facts.get("kept_samples"),
        funnel=tuple(_step(step) for step in facts.get("funnel", ())),
        gallery=gallery,
        samples=samples,
        mixes=mixes,
        published=published[entry["name"]] / 100 if entry["name"] in published else None,
        control=entry.get("control"),
        root=root,
    )


def _step(step: Mapping[str, Any]) -> FunnelStep:
    """Older records know only the counts in order."""
    return FunnelStep(
        step["rule"], step["rows_in"], step["rows_kept"], step.get("alone_kept"), step.get("only_removed")
    )


def _samples(path: str) -> tuple[SampleGroup, ...]:
    """The groups of a gallery, in its order. See stages/selection/gallery.py for its file."""
    rules = _facts(path)["rules"]
    table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(path, "gallery.parquet"))))
    groups: dict[tuple[int | None, str], list[Sample]] = {}
    for row in table.to_pylist():
        jpeg = row["thumbnail"]
        if jpeg is not None and not jpeg.startswith(JPEG_START):
            raise WinnowError(f"{storage.name_of(path)}: uid {row['uid']}: a thumbnail is no JPEG")
        removed_by = "" if row["removed_by"] is None else rules[row["removed_by"]]
        caption = row["caption"][: MAX_CAPTION_CHARS + 1]
        sample = Sample(row["uid"], caption, row["value"], removed_by, jpeg, bool(row.get("flagged")))
        groups.setdefault((row["rule"], row["side"]), []).append(sample)
    return tuple(
        SampleGroup("" if number is None else rules[number], side, tuple(samples))
        for (number, side), samples in groups.items()
    )


def _mixes(path: str) -> dict[str, Mix]:
    """The mix of each column. See stages/selection/shares.py for its file."""
    _facts(path)  # a finished one
    return {
        column: Mix(
            {value: Share(pool_rows, samples) for value, pool_rows, samples in found["values"]},
            Share(*found["other"][1:]),
            found["other"][0],
        )
        for column, found in storage.read_json(storage.join(path, "shares.json")).items()
    }


def _training(root: str, entry: Mapping[str, Any]) -> Training:
    checkpoint, error = entry.get("checkpoint"), entry.get("error")
    facts: dict[str, Any] = {}
    curve: list[dict[str, Any]] = []
    if checkpoint and not error:
        path = storage.join(root, checkpoint)
        try:
            facts = _facts(path)
            lines = storage.read_bytes(storage.join(path, METRICS_FILE)).decode().splitlines()
            curve = [json.loads(line) for line in lines if line.strip()]
        except (OSError, WinnowError, ValueError) as reason:
            error = None if facts else one_line(reason)  # a training without its curve is still a training
    return Training(
        entry["strategy"], int(entry["samples_seen"]), int(entry["seed"]), checkpoint, error, facts, tuple(curve)
    )


def _contamination(root: str, entry: Mapping[str, Any]) -> Contamination:
    path, error = entry["path"], entry.get("error")
    if not path or error:
        return Contamination(entry["stage"], path, error or "not done")
    try:
        facts = _facts(storage.join(root, path))
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(root, path, "fit", "items.parquet"))))
        matched: dict[str, set[str]] = {name: set() for name in facts["references"]}
        for name, item in zip(table["reference"].to_pylist(), table["item"].to_pylist(), strict=True):
            matched[name].add(item)
        tasks = {
            name: TaskImages(
                counts["images"],
                counts["not_compared"],
                frozenset(matched[name]),
                counts["matched_by_method"],
                counts["rows"],
            )
            for name, counts in facts["references"].items()
        }
        return Contamination(entry["stage"], path, None, facts["contaminated_rows"], facts["rows_by_method"], tasks)
    except (OSError, WinnowError, pa.ArrowException, KeyError, TypeError, ValueError) as reason:
        return Contamination(entry["stage"], path, one_line(reason))


def _result(
    root: str,
    entry: Mapping[str, Any],
    task: Task,
    found: Sequence[Contamination],
    notes: list[str],
    first_items: dict[str, Items],
) -> tuple[Result, list[Result]]:
    """The result, and the same without the items that each contamination stage found in the pool."""
    path, error = entry.get("path"), entry.get("error")
    empty = Result(entry["strategy"], int(entry["samples_seen"]), int(entry["seed"]), task.name, path, error)
    if not path or error:
        return empty, [empty] * len(found)
    try:
        metrics = storage.read_json(storage.join(root, path, "result.json"))["metrics"]
        if task.metric not in metrics:
            raise WinnowError(f"{path}: result.json has no metric {task.metric}, only {', '.join(sorted(metrics))}")
        value = float(metrics[task.metric])
        if not 0 <= value <= 1:  # NaN is neither
            raise WinnowError(f"{path}: result.json says {task.metric} = {value}, expected a fraction 0..1")
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(root, path, "predictions.parquet"))))
        items = items_of(table, task.metric)
        if items is not None:
            items = items.sharing(first_items.setdefault(task.name, items))
    except (OSError, WinnowError, pa.ArrowException, KeyError, TypeError, ValueError) as reason:
        gone = isinstance(reason, FileNotFoundError)
        broken = replace(empty, error=f"{path} is missing or unfinished" if gone else one_line(reason))
        return broken, [broken] * len(found)
    if items is None:
        note = f"{task.name}: the item noise of {task.metric} is not known here; intervals that hold it are too narrow"
        if note not in notes:
            notes.append(note)
    elif abs(items.value - value) > 1e-4:
        notes.append(f"{path}: result.json says {task.metric} = {value:.6f}, its predictions say {items.value:.6f}")
    result = replace(empty, value=value, items=items)
    return result, [_without(result, task, one) for one in found]


def _without(result: Result, task: Task, found: Contamination) -> Result:
    """The result over the items that are not in the pool, or the reason why it can't be known."""
    reason = found.error
    if reason is None and task.name not in found.tasks:
        reason = "its images were not compared with the pool"
    if reason is None:
        matched = found.tasks[task.name].matched
        if not matched:
            return result
        if result.items is None:
            reason = f"the predictions do not tell {task.metric} of single items"
        else:
            names = np.array(sorted(matched))
            missing = len(matched) - int(result.items.asks_about(names).sum())
            left = result.items.left_by(names)
            if missing:
                reason = f"{missing} of {len(matched)} images in the pool are not among the predictions"
            elif left is None:
                reason = "every image is in the pool"
            else:
                return replace(result, value=left.value, items=left)
    return replace(result, value=None, items=None, error=reason)


def overlap_of(strategies: Sequence[Strategy], notes: list[str]) -> Overlap | None:
    """What the kept rows of one pool have in common; None with one strategy. What can't be read is added to `notes`.

    The whole pool needs no list: every strategy's rows lie in it.
    """
    if len(strategies) < 2:
        return None
    largest = max((s.kept_rows or 0 for s in strategies if s.selection), default=0)
    one_in = max(1, -(-largest // MAX_OVERLAP_UIDS))
    keys: list[np.ndarray | None] = []
    for strategy in strategies:
        keys.append(None)
        if strategy.selection and strategy.kept_rows is not None:
            try:
                keys[-1] = _uid_keys(storage.join(strategy.root, strategy.selection, "uids.npy"), one_in)
            except (OSError, WinnowError, ValueError) as reason:
                notes.append(f"{strategy.name}: no overlap: {one_line(reason)}")
    shared = _shared(keys) * one_in
    known = np.array([np.nan if s.kept_rows is None else s.kept_rows for s in strategies])
    sizes = np.where(np.isnan(np.diag(shared)), known, np.diag(shared))
    for i, strategy in enumerate(strategies):
        if strategy.selection is None and strategy.kept_rows is not None:
            shared[i], shared[:, i] = sizes, sizes
    either = sizes[:, None] + sizes[None, :] - shared
    with np.errstate(divide="ignore", invalid="ignore"):
        jaccard = np.where(either > 0, shared / either, np.nan)
    return Overlap(jaccard, shared, one_in)


def _shared(keys: Sequence[np.ndarray | None]) -> np.ndarray:
    """[S, S] float64: how many keys each two have in common; NaN where a list is missing."""
    shared = np.full((len(keys), len(keys)), np.nan)
    for i, first in enumerate(keys):
        for j, second in enumerate(keys[: i + 1]):
            if first is not None and second is not None:
                both = len(first) if i == j else len(np.intersect1d(first, second, assume_unique=True))
                shared[i, j] = shared[j, i] = both
    return shared


def _uid_keys(path: str, one_in: int) -> np.ndarray:
    """Sorted 64-bit keys of the uids in a `u8,u8` file, every `one_in`-th by hash. Read in blocks."""
    blocks = []
    with storage.open_read(path) as file:
        version = np.lib.format.read_magic(file)
        if version != (1, 0):
            raise WinnowError(f"{storage.name_of(path)}: npy version {version}, expected (1, 0)")
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        if dtype != np.dtype("u8,u8") or len(shape) != 1:
            raise WinnowError(f"{storage.name_of(path)}: dtype {dtype}, expected one column of u8,u8")
        left = shape[0] * dtype.itemsize
        while left > 0:
            data = file.read(min(left, storage.CHUNK_BYTES))
            if not data or len(data) % dtype.itemsize:
                raise WinnowError(f"{storage.name_of(path)}: the file is truncated")
            left -= len(data)
            uids = np.frombuffer(data, dtype)
            keys = uids["f0"] * np.uint64(0x9E3779B97F4A7C15) + uids["f1"]
            if one_in > 1:
                mixed = (keys ^ (keys >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
                keys = keys[(mixed ^ (mixed >> np.uint64(29))) % np.uint64(one_in) == 0]
            blocks.append(keys)
    return np.unique(np.concatenate(blocks)) if blocks else np.empty(0, np.uint64)
