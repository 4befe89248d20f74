"""Zero-shot tasks: what they are, and finding their files before any work starts.

TASKS holds the 40 tasks of DataComp (Gadre et al., arXiv 2304.14108, 2023; 38 of them counted in its average), one
line each in data/datacomp_tasks.json. Any other folder in CLIP_benchmark's layout is a task too:

    birds/classnames.txt                              one class a line, in the order of the labels
    birds/zeroshot_classification_templates.txt       one prompt a line: `a photo of a {c}.`
    birds/dataset_type.txt                            `retrieval`, else classification
    birds/test/nshards.txt                            1
    birds/test/0.tar                                  s0000000.jpg s0000000.cls (or .txt: a caption a line) ...

This module is light: it imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import os
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pipeline.core import storage
from pipeline.core.artifact import canonical_json
from pipeline.core.errors import ConfigError, WinnowError, suggestion

METRIC_VERSION = 1  # bump when any number in result.json or predictions.parquet changes for the same checkpoint

CLASSIFICATION = "zeroshot_classification"
RETRIEVAL = "zeroshot_retrieval"
RECALL_AT = (1, 5, 10)
METRICS = {  # what each type of task reports; the first is the main metric where nothing else is said
    CLASSIFICATION: ("acc1", "acc5", "mean_per_class_recall"),
    RETRIEVAL: tuple(f"{what}_recall@{k}" for k in RECALL_AT for what in ("mean", "image_retrieval", "text_retrieval")),
}
HASHED_BYTES = 1 << 30  # the tars of a task up to this size are identified by their bytes
TOP = 5  # how many predictions are kept of each image, and the k of acc5

SPLIT = "test"
TYPE_FILE = "dataset_type.txt"
CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
SHARDS_FILE = f"{SPLIT}/nshards.txt"

ENTRY_KEYS = {"name": str, "path": str, "metric": str, "chance": float, "group": str, "in_domain": bool, "title": str}


@dataclass(frozen=True)
class Task:
    """A benchmark. `metric` is its main one, a key of result.json's metrics; None has none that counts.

    `chance` is what guessing reaches (0..1): None means 1 / classes where that holds, else unknown. `images` and
    `classes` are those of the published task, None where nobody published any.
    """

    name: str
    title: str
    type: str
    metric: str | None
    chance: float | None = None
    group: str = ""
    in_domain: bool = False
    counted: bool = False  # in DataComp's average of 38
    images: int | None = None
    classes: int | None = None


@dataclass(frozen=True)
class TaskData:
    """A task and its files: everything that an evaluation needs to start. `digest` is task_digest, "" until known."""

    task: Task
    path: str
    shards: tuple[str, ...]  # relative to path, in order
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    digest: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def chance(self) -> float | None:
        """What guessing reaches (0..1); None where it is not known."""
        if self.task.chance is None and self.classnames:
            return min(1.0, (TOP if self.task.metric == "acc5" else 1) / len(self.classnames))
        return self.task.chance


def _load_tasks() -> dict[str, Task]:
    path = os.path.join(os.path.dirname(os.path.abspath(__file__)), "data", "datacomp_tasks.json")
    with open(path, encoding="utf-8") as file:
        return {entry["name"]: Task(**entry) for entry in json.load(file)}


TASKS: Mapping[str, Task] = _load_tasks()


def resolve_tasks(
    entries: Sequence[str | Mapping[str, Any]], root: str | None = None, place: str = "eval"
) -> list[TaskData]:
    """The tasks with their files found, in the order given.

    Args:
        entries: names, or mappings {name, path, metric, chance, group, in_domain, title}, as in the config.
        root: the folder that holds a folder for each task named without a path.
        place: where the entries stand, for messages.

    Raises:
        ConfigError: one line that names every task that can't be evaluated, and what is missing where.
    """
    found: list[TaskData] = []
    problems = []
    for index, entry in enumerate(entries):
        try:
            data = resolve_task(entry, root, f"{place}.tasks.{index}")
            if any(data.name == other.name for other in found):
                raise ConfigError(f"{place}.tasks.{index}.name = {data.name}, expected a name that no other task has")
            found.append(data)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return found


def resolve_task(entry: str | Mapping[str, Any], root: str | None = None, place: str = "eval.tasks") -> TaskData:
    """One task with its files found. See resolve_tasks."""
    settings = _settings(entry, place)
    name = settings["name"]
    path = settings.pop("path", None)
    known = TASKS.get(name)
    if known and known.type not in METRICS:
        raise ConfigError(
            f"{place} = {name}, expected a task of plain classification or retrieval: "
            f"{known.title} ({known.type}) is listed but not evaluated yet"
        )
    folder = _folder(name, path, root, place)
    kind, data = _read_folder(name, folder, place)
    if known and known.type != kind:
        raise ConfigError(f"{place} = {name}: {folder} holds {kind}, expected {known.type} as {known.title} is")
    if known and known.classes not in (None, len(data.classnames)):
        raise ConfigError(
            f"{place} = {name}: {folder}/{CLASSES_FILE} has {len(data.classnames)} classes, expected the "
            f"{known.classes} of {known.title}; give another task a name of its own"
        )
    task = replace(known or Task(name, name, kind, METRICS[kind][0]), **settings)
    if task.metric not in METRICS[kind] or (task.metric == "acc5" and len(data.classnames) < TOP):
        choices = [metric for metric in METRICS[kind] if metric != "acc5" or len(data.classnames) >= TOP]
        raise ConfigError(f"{place}.metric = {task.metric}, expected one of {kind}.{suggestion(task.metric, choices)}")
    return replace(data, task=task)


def task_digest(data: TaskData) -> str:
    """32 hex digits that identify what an evaluation reads, wherever it lies.

    Text files, and tars up to HASHED_BYTES in total, are read and hashed; of larger sets the tars' names, sizes and
    stamps (etag, or time of modification) stand for their bytes. Cost: at most 1 GiB read, a look at every tar.
    """
    names = [CLASSES_FILE, TEMPLATES_FILE] if data.task.type == CLASSIFICATION else []
    sizes = {name: storage.size_bytes(storage.join(data.path, name)) for name in [*names, *data.shards]}
    hashed = sum(sizes[name] for name in data.shards) <= HASHED_BYTES
    files = {}
    for name, size in sizes.items():
        path = storage.join(data.path, name)
        files[name] = [size, storage.sha256_file(path) if hashed or name in names else storage.stamp(path)]
    identity = {"type": data.task.type, "files": files}
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:32]


def _settings(entry: str | Mapping[str, Any], place: str) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"name": entry}
    settings = dict(entry)
    for key, value in settings.items():
        if key not in ENTRY_KEYS:
            raise ConfigError(f"{place}.{key}: no such setting of a task.{suggestion(key, ENTRY_KEYS)}")
        kind = ENTRY_KEYS[key]
        if kind is float and type(value) is int:
            settings[key] = value = float(value)
        if type(value) is not kind:
            words = {str: "text", float: "a number", bool: "true or false"}
            raise ConfigError(f"{place}.{key} = {value!r}, expected {words[kind]}")
    if not settings.get("name"):
        raise ConfigError(f"{place}.name is missing, expected a name for the task")
    if not 0 <= settings.get("chance", 0.0) <= 1:
        raise ConfigError(f"{place}.chance = {settings['chance']}, expected 0 <= chance <= 1")
    return settings


def _folder(name: str, path: str | None, root: str | None, place: str) -> str:
    """The folder that holds the task's files."""
    if path is not None:
        folder = storage.absolute(path)
        if not storage.is_folder(folder):
            raise ConfigError(f"{place}.path = {path}, expected the folder of task {name}; nothing is there")
        return folder
    if root is None:
        raise ConfigError(f"{place} = {name}: expected eval.root, the folder of all tasks, or a path of its own")
    root = storage.absolute(root)
    if not all(part not in ("", ".", "..") for part in name.split("/")):
        raise ConfigError(f"{place} = {name}, expected the name of a folder below {root}")
    places = list(dict.fromkeys([name, f"wds_{name.replace('/', '-')}_{SPLIT}", name.replace("/", "-")]))
    for folder in places:
        if storage.is_folder(storage.join(root, folder)):
            return storage.join(root, folder)
    if name not in TASKS:
        choices = [*storage.list_folders(root), *TASKS]
        raise ConfigError(f"{place} = {name}, expected a folder of {root} or a known task.{suggestion(name, choices)}")
    raise ConfigError(
        f"{place} = {name}: no files in {root}, expected a folder {' or '.join(places[:2])} with "
        f"{CLASSES_FILE if TASKS[name].type == CLASSIFICATION else TYPE_FILE}, {SHARDS_FILE} and {SPLIT}/0.tar"
    )


def _read_folder(name: str, folder: str, place: str) -> tuple[str, TaskData]:
    """The type of the task in this folder and its files. Raises ConfigError when any is missing or makes no sense."""
    files = set(storage.list_files(folder))
    in_split = set(storage.list_files(storage.join(folder, SPLIT)))
    files |= {f"{SPLIT}/{file}" for file in in_split}

    said = _text(folder, TYPE_FILE, place).strip().lower() if TYPE_FILE in files else "classification"
    kinds = {"classification": CLASSIFICATION, "retrieval": RETRIEVAL}
    if said not in kinds:
        raise ConfigError(f"{place} = {name}: {folder}/{TYPE_FILE} says {said}, expected classification or retrieval")
    kind = kinds[said]

    needed = [SHARDS_FILE] + ([CLASSES_FILE, TEMPLATES_FILE] if kind == CLASSIFICATION else [])
    missing = [file for file in needed if file not in files]
    shards: tuple[str, ...] = ()
    if SHARDS_FILE not in missing:
        count = _text(folder, SHARDS_FILE, place).strip()
        if not (count.isascii() and count.isdigit() and 0 < len(count) <= 6 and int(count) > 0):
            raise ConfigError(f"{place} = {name}: {folder}/{SHARDS_FILE} says {count[:20]!r}, expected a count of tars")
        shards = tuple(f"{SPLIT}/{number}.tar" for number in range(int(count)))
        missing += [shard for shard in shards if shard not in files]
    if missing:
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConfigError(f"{place} = {name}: {folder} lacks {named}, expected CLIP_benchmark's layout")
    if f"{SPLIT}/{len(shards)}.tar" in files:  # would be left out without a word
        raise ConfigError(
            f"{place} = {name}: {folder}/{SHARDS_FILE} says {len(shards)}, but {SPLIT}/{len(shards)}.tar is there too"
        )
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    if kind == CLASSIFICATION:
        classnames = _lines(folder, CLASSES_FILE, place)
        templates = _lines(folder, TEMPLATES_FILE, place)
        for number, template in enumerate(templates, 1):
            if not _is_template(template):
                raise ConfigError(
                    f"{place} = {name}: {folder}/{TEMPLATES_FILE} line {number} is {template[:80]!r}, "
                    "expected a prompt with the class as {c}"
                )
    return kind, TaskData(Task(name, name, kind, METRICS[kind][0]), folder, shards, classnames, templates)


def _is_template(template: str) -> bool:
    """True when the only slots are plain `{c}`: formatting can then reach nothing but the class name."""
    try:
        slots = [slot[1:] for slot in string.Formatter().parse(template) if slot[1] is not None]
    except ValueError:
        return False
    return bool(slots) and all(slot == ("c", "", None) for slot in slots)


def _text(folder: str, file: str, place: str) -> str:
    path = storage.join(folder, file)
    try:
        return storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{place}: {path}, expected text in UTF-8 ({error})") from error
    except OSError as error:
        raise WinnowError(f"{path}: can't be read: {error}") from error


def _lines(folder: str, file: str, place: str) -> tuple[str, ...]:
    lines = tuple(line.strip() for line in _text(folder, file, place).rstrip().splitlines())
    if not lines or "" in lines:  # a blank line would shift every label after it
        number = lines.index("") + 1 if lines else 1
        raise ConfigError(f"{place}: {folder}/{file} line {number} is blank, expected one entry a line")
    return lines
