"""A run folder as plain values: everything that the report says comes from here.

`<root>/runs/<id>/run.json` names what the run compared and which artifacts hold it, for example:

    {"config_name": "demo", "date": "2026-01-31T12:00:00Z", "metric_version": 1, "recipe": {"samples_seen": 16000, ...},
     "pool": {"path": "pool-3f2a91c0d4e7", "rows": 10000, "ok": 9900, "failed": {"undecodable": 100}},
     "strategies": [{"name": "no_filter", "selection": null, "compared": true, "label": "", "uses": [], "error": null}],
     "tasks": [{"name": "objects", "type": "zeroshot_classification", "metric": "acc1", "chance": 0.1, ...}],
     "trainings": [{"strategy": "no_filter", "seed": 0, "checkpoint": "checkpoint-0f..", "error": null}],
     "results": [{"strategy": "no_filter", "seed": 0, "task": "objects", "path": "results-cd..", "error": null}],
     "contamination": [{"stage": "contamination", "path": "contamination-9b..", "error": null}],
     "baseline": "no_filter"}

Artifact paths are relative to the root. What can't be read becomes a reason in place of a value: a report never fails
because one training did.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core import storage
from pipeline.core.artifact import read_record
from pipeline.core.errors import WinnowError, one_line
from pipeline.report.uncertainty import influence_of_items

# Labels of strategies that are shown and compete with nobody: one reads planted truth, the other is no choice from the
# pool but a whole reference.
OUTSIDE_LABELS = ("oracle", "reference")
MAX_OVERLAP_UIDS = 1_000_000  # per strategy; larger selections are compared on a sample by hash of the uid


@dataclass(frozen=True)
class Task:
    """A benchmark: its metric (a key of result.json's metrics) and the value that guessing reaches, if known."""

    name: str
    kind: str
    metric: str
    chance: float | None = None
    group: str = ""
    in_domain: bool = False
    title: str = ""


@dataclass(frozen=True)
class Strategy:
    """A strategy and what it kept. Counts are None where its selection is missing."""

    name: str
    compared: bool = True  # False: a part of other strategies; not trained
    label: str = ""
    uses: tuple[str, ...] = ()
    error: str | None = None
    selection: str | None = None
    train_set: str | None = None
    kept_rows: int | None = None
    kept_fraction: float | None = None  # of the pool; None where the rows are not the pool's
    kept_samples: int | None = None
    funnel: tuple[tuple[str, int, int], ...] = ()  # (rule, rows in, rows kept)


@dataclass(frozen=True)
class Training:
    """One training: facts of the checkpoint's record, and the lines of metrics.jsonl."""

    strategy: str
    seed: int
    checkpoint: str | None
    error: str | None
    facts: dict[str, Any] = field(default_factory=dict)
    curve: tuple[dict[str, float], ...] = ()


@dataclass(frozen=True)
class Result:
    """One checkpoint on one task: the metric's value (0..1), or the reason why there is none.

    `groups` [G] and `influence` [G] say what each group of items adds to the value's item noise; None when unknown.
    """

    strategy: str
    seed: int
    task: str
    path: str | None
    error: str | None
    value: float | None = None
    groups: np.ndarray | None = None
    influence: np.ndarray | None = None


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
    overlap: np.ndarray | None  # [S, S] Jaccard index of the compared strategies; NaN where unknown
    overlap_one_in: int  # 1: exact; n: measured on every n-th uid by hash
    notes: tuple[str, ...]
    contamination: tuple[Contamination, ...] = ()

    @property
    def compared(self) -> list[Strategy]:
        """The strategies that the run trains, in the order of the config."""
        return [strategy for strategy in self.strategies if strategy.compared]


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
        strategies = tuple(_strategy(root, entry, data["pool"], notes) for entry in data["strategies"])
        tasks = tuple(_task(entry) for entry in data["tasks"] if entry["metric"] is not None)
        notes += [
            f"{e['name']}: no metric that counts, so it is left out" for e in data["tasks"] if e["metric"] is None
        ]
        by_name = {task.name: task for task in tasks}
        header = {key: data.get(key) for key in ("config_name", "date", "winnow_version", "metric_version")}
        header |= {"recipe": data.get("recipe") or {}, "pool": data["pool"]}
        trainings = tuple(_training(root, entry) for entry in data["trainings"])
        found = [_contamination(root, entry) for entry in data.get("contamination", ())]
        pairs = [
            _result(root, entry, by_name[entry["task"]], found, notes)
            for entry in data["results"]
            if entry["task"] in by_name
        ]
        results = tuple(result for result, _ in pairs)
        contamination = tuple(
            replace(one, results=tuple(without[number] for _, without in pairs)) for number, one in enumerate(found)
        )
        baseline = data.get("baseline") or "no_filter"
    except KeyError as error:
        raise WinnowError(f"{place}: {error} is missing, expected what execute.py writes") from error
    overlap, one_in = _overlap(root, [s for s in strategies if s.compared], data["pool"], notes)
    return Run(
        name=storage.name_of(run_path),
        header=header,
        config_text=_config_text(run_path),
        baseline=baseline,
        tasks=tasks,
        strategies=strategies,
        trainings=trainings,
        results=results,
        overlap=overlap,
        overlap_one_in=one_in,
        notes=tuple(notes),
        contamination=contamination,
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


def _strategy(root: str, entry: Mapping[str, Any], pool: Mapping[str, Any], notes: list[str]) -> Strategy:
    facts: dict[str, Any] = {}
    error = entry.get("error")
    if entry.get("selection"):
        try:
            facts = _facts(storage.join(root, entry["selection"]))
        except (OSError, WinnowError) as reason:
            notes.append(f"{entry['name']}: {one_line(reason)}")
    elif not error:  # without a selection a strategy is the whole pool
        facts = {"kept_rows": pool["ok"], "kept_samples": pool["ok"]}
    return Strategy(
        name=entry["name"],
        compared=bool(entry.get("compared", True)),
        label=entry.get("label") or "",
        uses=tuple(entry.get("uses") or ()),
        error=error,
        selection=entry.get("selection"),
        train_set=entry.get("train_set"),
        kept_rows=facts.get("kept_rows"),
        kept_fraction=_kept_fraction(entry, facts, pool),
        kept_samples=facts.get("kept_samples"),
        funnel=tuple((step["rule"], step["rows_in"], step["rows_kept"]) for step in facts.get("funnel", ())),
    )


def _training(root: str, entry: Mapping[str, Any]) -> Training:
    checkpoint, error = entry.get("checkpoint"), entry.get("error")
    facts: dict[str, Any] = {}
    curve: list[dict[str, float]] = []
    if checkpoint and not error:
        path = storage.join(root, checkpoint)
        try:
            facts = _facts(path)
            lines = storage.read_bytes(storage.join(path, "metrics.jsonl")).decode().splitlines()
            curve = [json.loads(line) for line in lines if line.strip()]
        except (OSError, WinnowError, ValueError) as reason:
            error = None if facts else one_line(reason)  # a training without its curve is still a training
    return Training(entry["strategy"], int(entry["seed"]), checkpoint, error, facts, tuple(curve))


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
    root: str, entry: Mapping[str, Any], task: Task, found: Sequence[Contamination], notes: list[str]
) -> tuple[Result, list[Result]]:
    """The result, and the same without the items that each contamination stage found in the pool."""
    path, error = entry.get("path"), entry.get("error")
    empty = Result(entry["strategy"], int(entry["seed"]), task.name, path, error)
    if not path or error:
        return empty, [empty] * len(found)
    try:
        metrics = storage.read_json(storage.join(root, path, "result.json"))["metrics"]
        if task.metric not in metrics:
            raise WinnowError(f"{path}: result.json has no metric {task.metric}, only {', '.join(sorted(metrics))}")
        value = float(metrics[task.metric])
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(root, path, "predictions.parquet"))))
        items = _items(table, task.metric)
    except (OSError, WinnowError, pa.ArrowException, KeyError, TypeError, ValueError) as reason:
        broken = replace(empty, error=one_line(reason))
        return broken, [broken] * len(found)
    groups = influence = None
    if items is None:
        note = f"{task.name}: the item noise of {task.metric} is not known here; intervals that hold it are too narrow"
        if note not in notes:
            notes.append(note)
    else:
        groups, influence = influence_of_items(*items)
        again = _mean_of_means(items[0], items[1])
        if abs(again - value) > 1e-4:
            notes.append(f"{path}: result.json says {task.metric} = {value:.6f}, its predictions say {again:.6f}")
    result = replace(empty, value=value, groups=groups, influence=influence)
    return result, [_without(result, task, items, one) for one in found]


def _without(
    result: Result, task: Task, items: tuple[np.ndarray, np.ndarray, np.ndarray] | None, found: Contamination
) -> Result:
    """The result over the items that are not in the pool, or the reason why it can't be known."""
    reason = found.error
    if reason is None and task.name not in found.tasks:
        reason = "its images were not compared with the pool"
    if reason is None:
        matched = found.tasks[task.name].matched
        if not matched:
            return result
        if items is None:
            reason = f"the predictions do not tell {task.metric} of single items"
        else:
            outcome, stratum, group = items
            left = ~np.isin(group, np.array(sorted(matched)))
            missing = len(matched) - len(np.unique(group[~left]))
            if missing:
                reason = f"{missing} of {len(matched)} images in the pool are not among the predictions"
            elif not left.any():
                reason = "every image is in the pool"
            else:
                groups, influence = influence_of_items(outcome[left], stratum[left], group[left])
                value = _mean_of_means(outcome[left], stratum[left])
                return replace(result, value=value, groups=groups, influence=influence)
    return replace(result, value=None, groups=None, influence=None, error=reason)


def _items(table: pa.Table, metric: str) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Outcome, stratum and group of each item, such that the metric is the mean over strata of the mean in each."""
    if metric in ("acc1", "acc5", "mean_per_class_recall"):
        label = _numpy(table["label"])
        if metric == "acc5":
            if "top5" not in table.column_names:
                return None
            top = table["top5"].combine_chunks()
            owner = np.repeat(np.arange(len(label)), _numpy(pc.list_value_length(top)))
            correct = np.bincount(owner, weights=_numpy(pc.list_flatten(top)) == label[owner], minlength=len(label))
        else:
            correct = _numpy(table["correct"]).astype(np.float64)
        return correct, label if metric == "mean_per_class_recall" else np.zeros_like(label), _numpy(table["item"])
    match = re.fullmatch(r"(image_retrieval|text_retrieval|mean)_recall@(\d+)", metric)
    if match and f"hit@{match[2]}" in table.column_names:
        # CLIP_benchmark's names say what is retrieved: image_retrieval starts from a text
        start = {"image_retrieval": "text_to_image", "text_retrieval": "image_to_text"}.get(match[1])
        if start:
            table = table.filter(pc.equal(table["direction"], start))
        hits = _numpy(table[f"hit@{match[2]}"]).astype(np.float64)
        return hits, _numpy(table["direction"]), _numpy(table["group"])
    return None


def _numpy(column: pa.ChunkedArray | pa.Array) -> np.ndarray:
    array = column.to_numpy(zero_copy_only=False)
    return array.astype(str) if array.dtype == object else array


def _mean_of_means(values: np.ndarray, stratum: np.ndarray) -> float:
    return float(np.mean([values[stratum == one].mean() for one in np.unique(stratum)]))


def _overlap(
    root: str, strategies: list[Strategy], pool: Mapping[str, Any], notes: list[str]
) -> tuple[np.ndarray | None, int]:
    """[S, S] Jaccard index of the kept rows. The whole pool needs no list: its overlap is the kept fraction."""
    largest = max((s.kept_rows or 0 for s in strategies if s.selection), default=0)
    one_in = max(1, -(-largest // MAX_OVERLAP_UIDS))
    keys: dict[str, np.ndarray | None] = {}
    for strategy in strategies:
        keys[strategy.name] = None
        if strategy.selection and strategy.kept_rows is not None:
            try:
                keys[strategy.name] = _uid_keys(storage.join(root, strategy.selection, "uids.npy"), one_in)
            except (OSError, WinnowError, ValueError) as reason:
                notes.append(f"{strategy.name}: no overlap: {one_line(reason)}")
    matrix = np.full((len(strategies), len(strategies)), np.nan)
    for i, first in enumerate(strategies):
        for j, second in enumerate(strategies[:i]):
            a, b = keys[first.name], keys[second.name]
            wholes = [s for s in (first, second) if s.selection is None and s.kept_rows is not None]
            if a is not None and b is not None:
                both = len(np.intersect1d(a, b, assume_unique=True))
                either = len(a) + len(b) - both
                matrix[i, j] = both / either if either else np.nan
            elif wholes and first.kept_rows is not None and second.kept_rows is not None:
                matrix[i, j] = min(first.kept_rows, second.kept_rows) / max(pool["ok"], 1)
            matrix[j, i] = matrix[i, j]
        matrix[i, i] = 1.0 if first.kept_rows else np.nan
    return (matrix if len(strategies) > 1 else None), one_in


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
