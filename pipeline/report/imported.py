"""Results from elsewhere, read from the files that other programs write. A format is known by its content:

    open_clip's results CSV        name,pretrained,...,Average perf. on 38 datasets,ImageNet 1k,Caltech-101,...
    CLIP_benchmark, a JSON a task  {"dataset": "wds/imagenet1k", "model": "ViT-B-32", "pretrained": "openai",
                                    "task": "zeroshot_classification", "metrics": {"acc1": 0.63, ...}, "language": "en"}
    CLIP_benchmark, built CSV      acc1,acc5,...,dataset,model,pretrained,task (columns in any order)
    DataComp's eval_results.jsonl  {"key": "imagenet1k", "dataset": "ImageNet 1k", "metrics": {"acc1": 0.03, ...}}
    a plain list                   name,task,value[,unit]
    a plain table                  name,<task>,<task>,...

Fractions 0..1 and percent are told apart by what is said, never by the size of the numbers. What is no score (a model's
size, an average that the file states) is listed, not dropped. A value that is not there is an empty cell or a NaN of
CLIP_benchmark, which writes one for acc5 where a task has fewer than five classes.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from pipeline.core import storage
from pipeline.core.config import BesideConfig
from pipeline.core.datacomp import DATACOMP_TASKS
from pipeline.core.errors import ConfigError, one_line, short, suggestion
from pipeline.report.records import Task

MAX_FILE_BYTES = 64 << 20
MAX_FILES = 10_000
ITS_METRIC = ""  # in place of a metric's name where a file does not say it: the one that the task has
UNITS = ("fraction", "percent")
# A metric that is a fraction. Others (weight_decay, epochs, seed of a linear probe) are settings.
SCORE = re.compile(r"(lp_)?(acc|mean_per_class_recall|F1|jaccard|mean_average_precision)|.*recall@\d+$")
AVERAGE = re.compile(r"Average perf\. on \d+ datasets$")
TITLES = ("name", "strategy")  # of the first column of a plain table
# Names under which CLIP_benchmark and its webdatasets have a task of DataComp, beside the key, its last part and the
# title. Its flickr30k and mscoco_captions are the test splits of Karpathy and Fei-Fei (CVPR 2015), as DataComp's are.
ALIASES = {
    "vtab/cifar10": "cifar10",
    "flickr30k": "retrieval/flickr_1k_test_image_text_retrieval",
    "mscoco_captions": "retrieval/mscoco_2014_5k_test_image_text_retrieval",
}


@dataclass(frozen=True)
class Cell:
    """A value as it stands in a file: text or a number, where, and whether it is a fraction or percent."""

    value: str | float
    place: str
    unit: str

    def fraction(self) -> float:
        """The value, 0..1. Raises ConfigError naming its place where it is none."""
        largest, expected = (100, "a percentage 0..100") if self.unit == "percent" else (1, "a fraction 0..1")
        try:
            number = math.nan if "_" in str(self.value) else float(self.value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= largest:
            raise ConfigError(f"{self.place} = {short(self.value)}, expected {expected}")
        return number / largest


@dataclass(frozen=True)
class FoundRow:
    """One model of a file: its cells by the file's name of a task and the metric's; the average that it states."""

    name: str
    cells: dict[str, dict[str, Cell]]
    stated_average: Cell | None = None


@dataclass(frozen=True)
class Results:
    """The rows of one entry of `report.beside`, and what its files hold beside scores."""

    source: str
    rows: tuple[FoundRow, ...]
    left_out: tuple[str, ...] = ()


def read_results(entry: BesideConfig, place: str) -> Results:
    """The rows of the files that the entry names, those alone that match its `rows`.

    Raises:
        ConfigError: one line that names the entry (`place`) or the file and line, what is there, and what was expected.
    """
    paths = _paths(entry.results or "", place)
    texts = [(path, _text(path, place)) for path in paths]
    found = [_read_one(path, text, entry, place, alone=len(texts) == 1) for path, text in texts]
    rows: dict[str, FoundRow] = {}
    for row in (row for part in found for row in part.rows):
        rows[row.name] = _joined(rows[row.name], row) if row.name in rows else row
    if not rows:
        raise ConfigError(f"{place}.results = {entry.results}, expected at least one row of results")
    chosen = [row for row in rows.values() if not entry.rows or any(fnmatchcase(row.name, p) for p in entry.rows)]
    if not chosen:
        raise ConfigError(f"{place}.rows = {entry.rows}, expected a pattern of a row's name.{suggestion('', rows)}")
    source = entry.name or storage.name_of(entry.results or "")
    left_out = dict.fromkeys(name for part in found for name in part.left_out)
    return Results(source, tuple(chosen), tuple(left_out))


def task_names(tasks: Sequence[Task]) -> dict[str, str]:
    """Our name of a task by each name that files have for it (see `canonical`); these tasks before DataComp's 40."""
    found = {canonical(alias): name for alias, name in ALIASES.items()}
    for name, entry in DATACOMP_TASKS.items():
        found |= {canonical(form): name for form in (entry["title"], name.rpartition("/")[2], name)}
    for task in tasks:
        found |= {canonical(form): task.name for form in (task.title or task.name, task.name)}
    return found


def canonical(name: str) -> str:
    """The name as it is compared: `wds/vtab/pets` and the folder wds_vtab-pets_test are both `vtab-pets`."""
    text = " ".join(name.casefold().split())
    if text.startswith("wds_") and text.endswith("_test"):
        text = text[len("wds_") : -len("_test")]
    return text.removeprefix("wds/").replace("/", "-")


def _paths(pattern: str, place: str) -> list[str]:
    paths = [pattern] if storage.exists(pattern) else storage.glob(pattern)
    if not paths:
        raise ConfigError(f"{place}.results = {pattern}, expected a file that is there, or a pattern of such")
    if len(paths) > MAX_FILES:
        raise ConfigError(f"{place}.results = {pattern}: {len(paths):,} files, expected at most {MAX_FILES:,}")
    return paths


def _text(path: str, place: str) -> str:
    try:
        if storage.size_bytes(path) > MAX_FILE_BYTES:
            raise ConfigError(f"{path}: {storage.size_bytes(path):,} bytes, expected at most {MAX_FILE_BYTES:,}")
        return storage.read_bytes(path).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}.results = {path}, expected text in UTF-8 ({one_line(error)})") from error


def _joined(first: FoundRow, second: FoundRow) -> FoundRow:
    """One row of two files. Raises ConfigError where both have one score."""
    cells = {task: dict(by_metric) for task, by_metric in first.cells.items()}
    for task, by_metric in second.cells.items():
        for metric, cell in by_metric.items():
            _add(cells, first.name, task, metric, cell)
    return FoundRow(first.name, cells, first.stated_average or second.stated_average)


def _add(cells: dict[str, dict[str, Cell]], row: str, task: str, metric: str, cell: Cell) -> None:
    other = cells.setdefault(task, {}).setdefault(metric, cell)
    if other is not cell:
        raise ConfigError(
            f"{cell.place}: {short(task)} of {short(row)} is in {other.place}, too, expected each result once"
        )


def _read_one(path: str, text: str, entry: BesideConfig, place: str, alone: bool) -> Results:
    """The rows of one file. `alone`: the entry names no other, so its `name` can be that of a file's only row."""
    if text.lstrip()[:1] in ("{", "["):
        documents = list(_documents(path, text))
        _no_unit(entry, place)
        if all(_is_datacomp(document) for _, document in documents):
            folder = path.rstrip("/").rsplit("/", 2)[-2:]
            return _datacomp(documents, entry.name if alone and entry.name else "/".join(folder))
        if all(_is_clip_benchmark(document) for _, document in documents):
            return _clip_benchmark(documents)
    else:
        lines = _lines(path, text)
        head = lines[0][1] if lines else []
        if len(set(head)) != len(head):
            twice = next(name for name in head if head.count(name) > 1)
            raise ConfigError(f"{path}:1: the column {short(twice)} is there twice, expected each once")
        if {"name", "pretrained"} <= set(head) and any(AVERAGE.match(name) for name in head):
            _no_unit(entry, place)
            return _open_clip(lines)
        if {"dataset", "model", "pretrained", "task"} <= set(head):
            _no_unit(entry, place)
            return _clip_benchmark([(where, _nested(line)) for where, line in _dicts(lines)])
        if {"name", "task", "value"} <= set(head):
            return _plain_list(lines, entry, place)
        if len(head) > 1 and head[0] in TITLES:
            return _plain_table(lines, entry, place)
    raise ConfigError(
        f"{place}.results = {path}, expected results of open_clip (CSV), CLIP_benchmark (JSON, CSV) or DataComp "
        "(eval_results.jsonl), or columns name,task,value or name,<task>,..."
    )


def _no_unit(entry: BesideConfig, place: str) -> None:
    if entry.unit is not None:
        raise ConfigError(f"{place}.unit = {entry.unit} has no effect, expected it to be left out: these are fractions")


def _documents(path: str, text: str) -> Iterable[tuple[str, Any]]:
    """(place, parsed) of the one JSON document, or of each line's."""
    try:
        yield path, json.loads(text)
        return
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply, expected JSON") from error
    except ValueError:
        pass
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield f"{path}:{number}", json.loads(line)
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path}:{number}: expected JSON ({error})") from error


def _is_datacomp(document: Any) -> bool:
    return isinstance(document, dict) and isinstance(document.get("metrics"), dict) and "key" in document


def _is_clip_benchmark(document: Any) -> bool:
    names = ("dataset", "model", "pretrained", "task")
    is_one = isinstance(document, dict) and isinstance(document.get("metrics"), dict)
    return is_one and all(isinstance(document.get(name), str) for name in names)


def _datacomp(documents: Sequence[tuple[str, Mapping[str, Any]]], name: str) -> Results:
    """One row. A task is known by its key alone: an older Flickr with this title was another set of images."""
    cells: dict[str, dict[str, Cell]] = {}
    for place, document in documents:
        for metric, cell in _metrics(document["metrics"], place).items():
            _add(cells, name, str(document["key"]), metric, cell)
    return Results("", (FoundRow(name, cells),))


def _clip_benchmark(documents: Sequence[tuple[str, Mapping[str, Any]]]) -> Results:
    """A row a model; scores in another language than English are those of another task."""
    rows: dict[str, dict[str, dict[str, Cell]]] = {}
    for place, document in documents:
        name = f"{document['model']} {document['pretrained']}"
        language = document.get("language") or "en"
        task = document["dataset"] if language == "en" else f"{document['dataset']} ({language})"
        cells = rows.setdefault(name, {})
        cells.setdefault(task, {})
        for metric, cell in _metrics(document["metrics"], place).items():
            _add(cells, name, task, metric, cell)
    return Results("", tuple(FoundRow(name, cells) for name, cells in rows.items()))


def _nested(line: Mapping[str, str]) -> dict[str, Any]:
    """A line of CLIP_benchmark's CSV as its JSON has it."""
    names = ("dataset", "model", "pretrained", "task", "language", "model_fullname")
    metrics = {name: value for name, value in line.items() if name not in names and value.strip()}
    return {name: line.get(name, "") for name in names} | {"metrics": metrics}


def _metrics(metrics: Mapping[str, Any], place: str) -> dict[str, Cell]:
    """The scores among the metrics, each of which is a fraction; NaN is none."""
    found = {}
    for metric, value in metrics.items():
        if not SCORE.match(metric) or value is None or str(value).strip().casefold() == "nan":
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ConfigError(f"{place}: {metric} = {short(value)}, expected a fraction 0..1")
        found[metric] = Cell(value, f"{place}: {metric}", "fraction")
        found[metric].fraction()  # a metric that no task has is checked, too
    both = [found.get(f"{kind}_retrieval_recall@1") for kind in ("image", "text")]
    if all(both) and "mean_recall@1" not in found:  # CLIP_benchmark leaves the mean to its reader
        mean = sum(cell.fraction() for cell in both if cell) / 2
        found["mean_recall@1"] = Cell(mean, f"{place}: mean_recall@1", "fraction")
    return found


def _lines(path: str, text: str) -> list[tuple[str, list[str]]]:
    """(place, cells) of each line that is not empty, the head first."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    lines = []
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                lines.append((f"{path}:{reader.line_num}", [cell.strip() for cell in cells]))
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: expected CSV ({error})") from error
    for place, cells in lines[1:]:
        if len(cells) != len(lines[0][1]):
            raise ConfigError(f"{place}: {len(cells)} cells, expected {len(lines[0][1])} as in the head")
    return lines


def _dicts(lines: Sequence[tuple[str, list[str]]]) -> list[tuple[str, dict[str, str]]]:
    return [(place, dict(zip(lines[0][1], cells, strict=True))) for place, cells in lines[1:]]


def _open_clip(lines: Sequence[tuple[str, list[str]]]) -> Results:
    """A row a model, `architecture tag`. Columns that are no task (parameters, FLOPs) have no score."""
    known = task_names(())
    head = lines[0][1]
    average = next(name for name in head if AVERAGE.match(name))
    tasks = [name for name in head if canonical(name) in known]
    rows: dict[str, FoundRow] = {}
    for place, line in _dicts(lines):
        name = f"{line['name']} {line['pretrained']}"
        stated = Cell(line[average], f"{place}: {average}", "fraction") if line[average] else None
        row = FoundRow(name, _table_cells(line, tasks, place, "fraction"), stated)
        rows[name] = _joined(rows[name], row) if name in rows else row
    left_out = [name for name in head if name not in ("name", "pretrained", average, *tasks)]
    return Results("", tuple(rows.values()), tuple(left_out))


def _plain_list(lines: Sequence[tuple[str, list[str]]], entry: BesideConfig, place: str) -> Results:
    rows: dict[str, dict[str, dict[str, Cell]]] = {}
    head = lines[0][1]
    unit = None if "unit" in head else _said_unit(entry, place)
    if unit is None and entry.unit is not None:
        raise ConfigError(f"{place}.unit = {entry.unit} has no effect, expected it to be left out: there is a column")
    for where, line in _dicts(lines):
        own = unit or line["unit"]
        if own not in UNITS:
            raise ConfigError(f"{where}: unit = {short(own)}, expected one of {', '.join(UNITS)}")
        _need_name(line["name"], where)
        cells = rows.setdefault(line["name"], {})
        if line["value"]:
            _add(cells, line["name"], line["task"], ITS_METRIC, Cell(line["value"], f"{where}: {line['task']}", own))
    left_out = [name for name in head if name not in ("name", "task", "value", "unit")]
    return Results("", tuple(FoundRow(name, cells) for name, cells in rows.items()), tuple(left_out))


def _plain_table(lines: Sequence[tuple[str, list[str]]], entry: BesideConfig, place: str) -> Results:
    """Columns that are no task stay among the cells: which names a run has for its tasks is not known here."""
    unit = _said_unit(entry, place)
    head = lines[0][1]
    rows: dict[str, FoundRow] = {}
    for where, line in _dicts(lines):
        name = _need_name(line[head[0]], where)
        row = FoundRow(name, _table_cells(line, head[1:], where, unit))
        rows[name] = _joined(rows[name], row) if name in rows else row
    return Results("", tuple(rows.values()))


def _table_cells(line: Mapping[str, str], tasks: Sequence[str], place: str, unit: str) -> dict[str, dict[str, Cell]]:
    return {task: {ITS_METRIC: Cell(line[task], f"{place}: {task}", unit)} for task in tasks if line[task]}


def _need_name(name: str, place: str) -> str:
    if not name:
        raise ConfigError(f"{place}: the name is empty, expected that of a row")
    return name


def _said_unit(entry: BesideConfig, place: str) -> str:
    if entry.unit is None:
        raise ConfigError(f"{place}.unit is missing, expected one of {', '.join(UNITS)}: the file does not say it")
    return entry.unit
