"""Zero-shot tasks: what they are, and finding their files before any work starts.

TASKS holds the 40 tasks of DataComp (Gadre et al., arXiv 2304.14108, 2023; 38 of them counted in its average), one
line each in pipeline/core/data/datacomp_tasks.json. Any other folder in CLIP_benchmark's layout is a task too, and so
are plain folders of images (eval.folders):

    birds/classnames.txt                              one class a line, in the order of the labels
    birds/zeroshot_classification_templates.txt       one prompt a line: `a photo of a {c}.`
    birds/dataset_type.txt                            `retrieval`, else classification
    birds/test/nshards.txt                            1
    birds/test/0.tar                                  s0000000.jpg s0000000.cls (or .txt: a caption a line) ...
    birds/train/nshards.txt, birds/train/0.tar        the same for training images, which only probes read

The tasks of WILDS and of fairness have numbers about each image in a .npy beside it (GROUPINGS, FACE_COLUMNS), and
WinoGAViL comes as its authors publish it: winogavil_dataset.csv and winogavil_images/.

This module is light: it imports no torch.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

from eval import folders, hub, winogavil
from pipeline.core import storage
from pipeline.core.artifact import canonical_json
from pipeline.core.datacomp import DATACOMP_TASKS
from pipeline.core.errors import ConfigError, WinnowError, suggestion

METRIC_VERSION = 1  # bump when any number in result.json or predictions.parquet changes for the same checkpoint
PIXELS_VERSION = 1  # bump when any byte that samples.store_pixels writes changes for the same tar and preprocessing

CLASSIFICATION = "zeroshot_classification"
RETRIEVAL = "zeroshot_retrieval"
LINEAR_PROBE = "linear_probe"
FACES = "face_attributes"
ASSOCIATION = "image_association"
RECALL_AT = (1, 5, 10)
FACE_HEADS = ("race", "gender", "age", "toxic")  # each with classes and prompts of its own: lines `race:white`
FACE_COLUMNS = ("age", "gender", "race", "race_binary")  # of each image's .npy
METRICS = {  # what each type of task reports; the first is the main metric where nothing else is said
    CLASSIFICATION: ("acc1", "acc5", "mean_per_class_recall"),
    LINEAR_PROBE: ("lp_acc1", "lp_acc5", "lp_mean_per_class_recall"),
    RETRIEVAL: tuple(f"{what}_recall@{k}" for k in RECALL_AT for what in ("mean", "image_retrieval", "text_retrieval")),
    FACES: tuple(
        f"{what}_{of}"
        for what in ("acc_gender", "acc_race", "acc_age", "acc_gender_x", "toxicity_crime", "toxicity_nonhuman")
        for of in ("avg", "wg")
    ),
    ASSOCIATION: (
        *(f"jaccard_score_{size}" for size in ("10-12", "5-6", "5", "6", "10", "12")),
        "avg_jaccard_score",
    ),
}
HASHED_BYTES = 1 << 30  # the tars of a task up to this size are identified by their bytes
TOP = 5  # how many predictions are kept of each image, and the k of acc5

SPLIT = "test"
TRAIN_SPLIT = "train"
TYPE_FILE = "dataset_type.txt"
CLASSES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"
SHARDS_FILE = f"{SPLIT}/nshards.txt"
MODES = {"zero_shot": "zero-shot", "linear_probe": "linear probe", "few_shot": "few-shot"}  # their group, but the first
DRAWS = 5  # of few shots, where the entry says nothing
TYPES = {"classification": CLASSIFICATION, "retrieval": RETRIEVAL}  # as dataset_type.txt and entries say them
TABLES = (".csv", ".parquet")  # files that are a task by themselves
DEFAULT_TEMPLATES = ("a photo of a {c}.",)  # of a plain folder whose entry gives none

ENTRY_KEYS = {
    "name": str,
    "path": str,
    "type": str,  # classification or retrieval, where the folder does not say
    "classnames": (dict, list),  # of folders, {folder: name} or in their order
    "templates": list,
    "metric": str,
    "chance": float,
    "group": str,
    "in_domain": bool,
    "title": str,
    "mode": str,  # one of MODES
    "shots": int,  # training images of each class
    "draws": int,  # of them, each with a probe of its own
}


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
    clean: bool = False  # in its paper's average of 33
    images: int | None = None
    classes: int | None = None


@dataclass(frozen=True)
class Grouping:
    """How the images of a task fall into groups, as WILDS and DataComp evaluate them (see eval.groups).

    Attributes:
        columns: what the numbers in each image's .npy are, in order.
        outcome: what is averaged: `acc`, or `acc_top5` (the label is among the five best).
        by: (column, name of its worst group's accuracy); the first also says each prediction's group.
        left_out: (column, number) of groups that the worst one is not chosen from.
        macro: recall-macro_all and F1-macro_all are reported as well.
    """

    outcome: str = "acc"
    columns: tuple[str, ...] = ()
    by: tuple[tuple[str, str], ...] = ()
    left_out: tuple[tuple[str, int], ...] = ()
    macro: bool = False

    @property
    def wanted(self) -> tuple[str, ...]:
        """The columns that are read."""
        return tuple(column for column, _ in self.by)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it adds to METRICS[CLASSIFICATION]."""
        of_all = [f"{worst}_of_all" for column, worst in self.by if any(column == other for other, _ in self.left_out)]
        macro = ("F1-macro_all", "recall-macro_all") if self.macro else ()
        return (f"{self.outcome}_avg", *(worst for _, worst in self.by), *of_all, *macro)


# WILDS numbers FMoW's regions Asia, Europe, Africa, Americas, Oceania, Other (4 of 22,108 images). Its own evaluation
# leaves Other out, and so is it meant in DataComp's (wilds_eval.py); but there the groups have no names, and Other does
# count: hence the zeros of its published rows. `acc_worst_region_of_all` is what DataComp's code computes.
FMOW_OTHER = 5
GROUPINGS: Mapping[str, Grouping] = {
    "wilds/iwildcam": Grouping(macro=True),
    "wilds/camelyon17": Grouping("acc", ("hospital", "slide", "y"), (("slide", "acc_wg"),)),
    "wilds/fmow": Grouping(
        "acc",
        ("region", "year", "y"),
        (("region", "acc_worst_region"), ("year", "acc_worst_year")),
        (("region", FMOW_OTHER),),
    ),
    "fairness/dollar_street": Grouping(
        "acc_top5", ("income_ds", "income_meta", "region"), (("income_ds", "acc_top5_wg"),)
    ),
    "fairness/geode": Grouping("acc", ("region", "country"), (("region", "acc_wg"),)),
}


@dataclass(frozen=True)
class TaskData:
    """A task and its files: everything that an evaluation needs to start. `digest` is task_digest, "" until known."""

    task: Task
    path: str
    shards: tuple[str, ...]  # tars and parquet files relative to path, or runs of images (eval.folders), in order
    classnames: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()  # the text files that say what is what, relative to path
    class_folders: tuple[str, ...] = ()  # of a plain folder, in the order of the labels
    train_shards: tuple[str, ...] = ()  # of a probe: the tars that it is fitted to
    shots: int | None = None  # of a probe from so many training images of each class; None: from all
    draws: int = 1  # of these shots
    source: str = field(default="", compare=False)  # of a copy from the hub: its address with the commit
    digest: str = field(default="", compare=False)

    @property
    def name(self) -> str:
        """The task's name."""
        return self.task.name

    @property
    def chance(self) -> float | None:
        """What guessing reaches (0..1); None where it is not known before the images are read."""
        if self.task.chance is None and self.task.type in (CLASSIFICATION, LINEAR_PROBE):
            metric = (self.task.metric or "").removeprefix("lp_")
            hits = {"acc1": 1, "acc_avg": 1, "mean_per_class_recall": 1, "acc5": TOP, "acc_top5_avg": TOP}
            return min(1.0, hits[metric] / len(self.classnames)) if metric in hits else None
        return self.task.chance

    @property
    def in_files(self) -> bool:
        """True when the shards are files: tars or parquet. Else they are runs of image files."""
        return self.shards[0].endswith((".tar", ".parquet"))

    @property
    def grouping(self) -> Grouping | None:
        """How its images fall into groups; None where nobody says."""
        return GROUPINGS.get(self.name)

    @property
    def metrics(self) -> tuple[str, ...]:
        """What can be its main metric."""
        own = METRICS[self.task.type] + (self.grouping.metrics if self.grouping else ())
        return tuple(one for one in own if one not in ("acc5", "lp_acc5") or len(self.classnames) >= TOP)

    def train_split(self) -> TaskData:
        """The same task with its training images in place of those that are evaluated."""
        return replace(self, shards=self.train_shards)

    @property
    def heads(self) -> dict[str, TaskData]:
        """{head: the same with the class names and prompts of this head alone}, of a task of FACES."""
        found = {}
        for head in FACE_HEADS:
            start = f"{head}:"
            names, prompts = (
                tuple(line.removeprefix(start) for line in lines if line.startswith(start))
                for lines in (self.classnames, self.templates)
            )
            found[head] = replace(self, classnames=names, templates=prompts)
        return found


TASKS: Mapping[str, Task] = {name: Task(**entry) for name, entry in DATACOMP_TASKS.items()}


def resolve_tasks(
    entries: Sequence[str | Mapping[str, Any]], root: str | None = None, place: str = "eval", download: bool = True
) -> list[TaskData]:
    """The tasks with their files found, in the order given.

    Args:
        entries: names, or mappings {name, path, metric, chance, group, in_domain, title, ...}, as in the config.
        root: the folder that holds a folder for each task named without a path, or an owner on the hub.
        place: where the entries stand, for messages.
        download: files of the hub that are not here are fetched; else they are an error that says what would be.

    Raises:
        ConfigError: one line that names every task that can't be evaluated, and what is missing where.
    """
    found: list[TaskData] = []
    problems = []
    for index, entry in enumerate(entries):
        try:
            data = resolve_task(entry, root, f"{place}.tasks.{index}", download)
            if any(data.name == other.name for other in found):
                raise ConfigError(f"{place}.tasks.{index}.name = {data.name}, expected a name that no other task has")
            found.append(data)
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    return found


def resolve_task(
    entry: str | Mapping[str, Any], root: str | None = None, place: str = "eval.tasks", download: bool = True
) -> TaskData:
    """One task with its files found. See resolve_tasks."""
    settings = _settings(entry, place)
    name = settings["name"]
    path = settings.pop("path", None)
    own = {key: settings.pop(key) for key in ("type", "classnames", "templates") if key in settings}
    probe = {key: settings.pop(key) for key in ("mode", "shots", "draws") if key in settings}
    known = TASKS.get(name)
    if known and own:
        raise ConfigError(
            f"{place}.{next(iter(own))} is said for {name}, whose files say it, expected none; "
            "give a task of your own a name of its own"
        )
    copy = None
    if hub.is_address(path) or (path is None and hub.is_address(root)):
        probed = probe.get("mode", "zero_shot") != "zero_shot"
        copy = _fetch(name, path, root, (SPLIT, TRAIN_SPLIT) if probed else (SPLIT,), place, download)
    folder = copy.path if copy else _folder(name, path, root, place)
    data = _read_task(known or name, folder, own, place)
    if copy:
        data = replace(data, source=str(copy.repository))
    kind = data.task.type
    if known and known.type != kind:
        raise ConfigError(f"{place} = {name}: {folder} holds {kind}, expected {known.type} as {known.title} is")
    if known and known.classes not in (None, len(data.classnames)):
        raise ConfigError(
            f"{place} = {name}: {folder}/{CLASSES_FILE} has {len(data.classnames)} classes, expected the "
            f"{known.classes} of {known.title}; give another task a name of its own"
        )
    if probe.get("mode", "zero_shot") != "zero_shot":
        data = _as_probe(replace(data, task=known or data.task), place, **probe)
        known, kind, settings["name"] = known and data.task, data.task.type, data.name
    if known and settings.get("metric", known.metric) != known.metric:
        known = replace(known, chance=None)  # the published one is that of its own metric
    data = replace(data, task=replace(known or data.task, **settings))
    if data.task.metric is not None and data.task.metric not in data.metrics:
        hint = suggestion(data.task.metric or "", data.metrics)
        raise ConfigError(f"{place}.metric = {data.task.metric}, expected one of {kind}.{hint}")
    return data


def task_digest(data: TaskData) -> str:
    """32 hex digits that identify what an evaluation reads, wherever it lies.

    Text files, and tars or images up to HASHED_BYTES in total, are read and hashed; of larger sets the names, sizes
    and stamps (etag, time of modification, or commit on the hub) stand for their bytes. Cost: at most 1 GiB read, a
    look at every file.
    """
    texts = {name: storage.size_bytes(storage.join(data.path, name)) for name in data.texts}
    listed = {} if data.in_files else folders.list_images(data.path)
    if data.in_files:
        shards = data.shards + data.train_shards
        images = {name: storage.size_bytes(storage.join(data.path, name)) for name in shards}
    else:
        images = {name: listed[name].size_bytes for name, _ in listed_images(data)}
    hashed = list(texts | images) if sum(images.values()) <= HASHED_BYTES else list(texts)
    paths = [storage.join(data.path, name) for name in hashed]
    with ThreadPoolExecutor(folders.READERS) as pool:  # thousands of images on an object store are as many requests
        found = dict(zip(hashed, pool.map(storage.sha256_file, paths), strict=True))
    for name in images.keys() - found.keys():
        found[name] = listed[name].stamp if listed else data.source or storage.stamp(storage.join(data.path, name))
    files = {name: [size, found[name]] for name, size in (texts | images).items()}
    identity: dict[str, Any] = {"type": data.task.type, "files": files}
    if CLASSES_FILE not in texts and data.classnames:
        identity["classnames"] = [data.classnames, data.class_folders]
    if data.shots:
        identity["shots"] = [data.shots, data.draws]
    if TEMPLATES_FILE not in texts and data.templates:
        identity["templates"] = data.templates
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()[:32]


def _settings(entry: str | Mapping[str, Any], place: str) -> dict[str, Any]:
    if isinstance(entry, str):
        return {"name": entry}
    settings = dict(entry)
    for key, value in settings.items():
        if key not in ENTRY_KEYS:
            raise ConfigError(f"{place}.{key}: no such setting of a task.{suggestion(key, ENTRY_KEYS)}")
        kind = ENTRY_KEYS[key]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if kind is float and type(value) is int:
            settings[key] = value = float(value)
        if type(value) not in kinds:
            words = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}
            words |= {list: "a list", dict: "a mapping"}
            raise ConfigError(f"{place}.{key} = {value!r}, expected {' or '.join(words[kind] for kind in kinds)}")
    mode = settings.get("mode", "zero_shot")
    if mode not in MODES:
        raise ConfigError(f"{place}.mode = {mode}, expected a way to evaluate.{suggestion(mode, MODES)}")
    for key in ("shots", "draws"):
        if key in settings and mode != "few_shot":
            raise ConfigError(f"{place}.{key} has no effect with mode: {mode}, expected mode: few_shot")
        if settings.get(key, 1) < 1:
            raise ConfigError(f"{place}.{key} = {settings[key]}, expected at least 1")
    if mode == "few_shot" and "shots" not in settings:
        raise ConfigError(f"{place}.shots is missing, expected the number of training images of each class")
    if not settings.get("name"):
        raise ConfigError(f"{place}.name is missing, expected a name for the task")
    if not 0 <= settings.get("chance", 0.0) <= 1:
        raise ConfigError(f"{place}.chance = {settings['chance']}, expected 0 <= chance <= 1")
    if settings.get("type", "classification") not in TYPES:
        raise ConfigError(f"{place}.type = {settings['type']}, expected {' or '.join(TYPES)}")
    if "templates" in settings:
        settings["templates"] = tuple(settings["templates"])
        for template in settings["templates"] or ("",):
            if not isinstance(template, str) or not _is_template(template):
                raise ConfigError(
                    f"{place}.templates: {str(template)[:80]!r}, expected prompts with the class as {{c}}"
                )
    if "classnames" in settings:
        given = settings["classnames"]
        names = given.values() if isinstance(given, dict) else given
        if not given or not all(isinstance(name, str) and name.strip() for name in names):
            raise ConfigError(f"{place}.classnames: expected the text of each class's name")
    return settings


def _folder(name: str, path: str | None, root: str | None, place: str) -> str:
    """The folder that holds the task's files, or the table that is its file."""
    if path is not None:
        folder = storage.absolute(path)
        if not storage.is_folder(folder) and not (folder.endswith(TABLES) and storage.exists(folder)):
            raise ConfigError(f"{place}.path = {path}, expected the folder of task {name}; nothing is there")
        return folder
    if root is None:
        raise ConfigError(f"{place} = {name}: expected eval.root, the folder of all tasks, or a path of its own")
    root = storage.absolute(root)
    if not all(part not in ("", ".", "..") for part in name.split("/")):
        raise ConfigError(f"{place} = {name}, expected the name of a folder below {root}")
    places = folder_names(name)
    for folder in places:
        if storage.is_folder(storage.join(root, folder)):
            return storage.join(root, folder)
    if name not in TASKS:
        choices = [*storage.list_folders(root), *TASKS]
        raise ConfigError(f"{place} = {name}, expected a folder of {root} or a known task.{suggestion(name, choices)}")
    on_hub = "" if TASKS[name].type in (RETRIEVAL, ASSOCIATION) else f"; or path: {hub.repository_of(name, SPLIT)}"
    raise ConfigError(
        f"{place} = {name}: no files in {root}, expected a folder {' or '.join(places[:2])} with "
        f"{_files_of(TASKS[name])}{on_hub}"
    )


def folder_names(name: str) -> list[str]:
    """The folders below eval.root that may hold a task of this name, the first that is there counts."""
    # DataComp's own folders of the tasks of fairness lack that word
    flat = name.removeprefix("fairness/").replace("/", "-")
    return list(dict.fromkeys([name, f"wds_{flat}_{SPLIT}", f"wds_{name.replace('/', '-')}_{SPLIT}", flat]))


def _fetch(
    name: str, path: str | None, root: str | None, splits: Sequence[str], place: str, download: bool
) -> hub.Copy:
    """The copy of a task on the hub, of which the entry gives the path, or eval.root the owner."""
    if path is not None:
        place, repository = f"{place}.path", hub.parse(path, f"{place}.path")
    else:
        repository = hub.repository_of(name, SPLIT, hub.owner_of(root or "", "eval.root"))
    texts: tuple[str, ...] = (CLASSES_FILE, TEMPLATES_FILE)
    optional: tuple[str, ...] = (TYPE_FILE,)
    if name in TASKS and TASKS[name].type == RETRIEVAL:
        texts, optional = optional, ()
    root = None if hub.is_address(root) else root
    return hub.fetch(repository, root, texts, splits, place, optional=optional, download=download)


def _files_of(known: Task) -> str:
    """What a known task's folder holds, in words."""
    if known.type == ASSOCIATION:
        return f"{winogavil.QUESTIONS_FILE} and {winogavil.IMAGES_FOLDER}/"
    first = TYPE_FILE if known.type == RETRIEVAL else f"{CLASSES_FILE}, {TEMPLATES_FILE}"
    return f"{first}, {SHARDS_FILE} and {SPLIT}/0.tar, ..."


def _read_task(known: Task | str, folder: str, own: Mapping[str, Any], place: str) -> TaskData:
    """The files of the task in this folder, of the type that they say. Raises ConfigError when they make no sense.

    Args:
        known: one of TASKS, or the name of a user's own. folder: may be a table. own: what the entry says itself.
    """
    name = known if isinstance(known, str) else known.name
    at = f"{place} = {name}"
    if not isinstance(known, str) and known.type == ASSOCIATION:
        data = _read_questions(name, folder, at)
    elif folder.endswith(TABLES) and not storage.is_folder(folder):
        data = _read_pairs(name, folder.rpartition("/")[0], [storage.name_of(folder)], at)
    else:
        files = set(storage.list_files(folder))
        files |= {f"{SPLIT}/{file}" for file in storage.list_files(storage.join(folder, SPLIT))}
        tables = [file for file in sorted(files) if file == folders.CAPTIONS_FILE or file.endswith(".parquet")]
        tables = [file for file in tables if "/" not in file]
        if files & {CLASSES_FILE, TEMPLATES_FILE, TYPE_FILE, SHARDS_FILE, f"{SPLIT}/0.tar"}:
            data = _read_tars(known, folder, files, own, at)
        elif tables and own.get("type") != "classification":
            if len({file.endswith(".csv") for file in tables}) > 1:
                raise ConfigError(
                    f"{at}: {folder} holds {folders.CAPTIONS_FILE} and parquet files, expected one of them"
                )
            data = _read_pairs(name, folder, tables, at)
        elif own.get("type") == "retrieval" or not isinstance(known, str):
            needed = _files_of(known) if isinstance(known, Task) else f"{folders.CAPTIONS_FILE} or .parquet files"
            raise ConfigError(f"{at}: {folder} lacks {needed}")
        else:
            data = _read_classes(name, folder, own, at)
    said = own.get("type")
    if said and TYPES[said] != data.task.type:
        raise ConfigError(f"{place}.type = {said}, but {folder} holds {data.task.type}, expected one of the two")
    if data.task.type == RETRIEVAL and set(own) - {"type"}:
        raise ConfigError(f"{place}.{min(set(own) - {'type'})} has no effect on a task of retrieval, expected none")
    return data


def _read_tars(known: Task | str, folder: str, files: set[str], own: Mapping[str, Any], at: str) -> TaskData:
    """The task in CLIP_benchmark's layout."""
    name = known if isinstance(known, str) else known.name
    said = _text(folder, TYPE_FILE, at).strip().lower() if TYPE_FILE in files else "classification"
    if said not in TYPES:
        raise ConfigError(f"{at}: {folder}/{TYPE_FILE} says {said[:40]!r}, expected classification or retrieval")
    kind = TYPES[said]
    if kind == CLASSIFICATION and isinstance(known, Task) and known.type == FACES:
        kind = FACES
    texts = {CLASSES_FILE: "classnames", TEMPLATES_FILE: "templates"} if kind != RETRIEVAL else {}
    texts = {file: key for file, key in texts.items() if key not in own}

    shards = _tars(folder, SPLIT, files, texts, at)
    lines = {key: _lines(folder, file, at) for file, key in texts.items()}
    for number, template in enumerate(lines.get("templates", ()), 1):
        if not _is_template(template):
            raise ConfigError(
                f"{at}: {folder}/{TEMPLATES_FILE} line {number} is {template[:80]!r}, "
                "expected a prompt with the class as {c}"
            )
    if isinstance(own.get("classnames"), dict):
        raise ConfigError(f"{at}: classnames, expected a list in the order of the labels: {folder} holds no folders")
    lines = {key: tuple(values) for key, values in ({**lines, **own}).items() if key != "type"}
    data = TaskData(_own_task(name, kind), folder, shards, **lines, texts=tuple(texts))
    for head, one in data.heads.items() if kind == FACES else ():
        if not one.classnames or not one.templates:
            file = CLASSES_FILE if not one.classnames else TEMPLATES_FILE
            raise ConfigError(f"{at}: {folder}/{file} has no line `{head}:...`, expected some for each head")
    return data


def _tars(folder: str, split: str, files: set[str], texts: Iterable[str], at: str) -> tuple[str, ...]:
    """The tars of a split in CLIP_benchmark's layout. Raises ConfigError naming what is missing, also of `texts`."""
    counted = f"{split}/nshards.txt"
    missing = [file for file in [counted, *texts] if file not in files]
    shards: tuple[str, ...] = ()
    if counted not in missing:
        count = _text(folder, counted, at).strip()
        if not (count.isascii() and count.isdigit() and 0 < len(count) <= 6 and int(count) > 0):
            raise ConfigError(f"{at}: {folder}/{counted} says {count[:20]!r}, expected a count of tars")
        shards = tuple(f"{split}/{number}.tar" for number in range(int(count)))
        missing += [shard for shard in shards if shard not in files]
    if missing:
        named = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConfigError(f"{at}: {folder} lacks {named}, expected CLIP_benchmark's layout")
    if f"{split}/{len(shards)}.tar" in files:  # would be left out without a word
        raise ConfigError(f"{at}: {folder}/{counted} says {len(shards)}, but {split}/{len(shards)}.tar is there too")
    return shards


def _as_probe(data: TaskData, place: str, mode: str, shots: int | None = None, draws: int = DRAWS) -> TaskData:
    """The task with a classifier fitted to its training images in place of prompts. DataComp does not count it."""
    task, at = data.task, f"{place} = {data.name}"
    if task.type != CLASSIFICATION or not data.shards[0].startswith(f"{SPLIT}/"):
        raise ConfigError(
            f"{place}.mode = {mode}, expected zero_shot for {data.name}: only tasks of classification in "
            "CLIP_benchmark's layout have training images"
        )
    listed = storage.list_files(storage.join(data.path, TRAIN_SPLIT))
    shards = _tars(data.path, TRAIN_SPLIT, {f"{TRAIN_SPLIT}/{file}" for file in listed}, (), f"{at}: mode {mode}")
    metric = f"lp_{task.metric}"
    probe = Task(
        name=f"{task.name}_{shots}_shot" if shots else f"{task.name}_{mode}",
        title=f"{task.title}, {f'{shots}-shot' if shots else MODES[mode]}",
        type=LINEAR_PROBE,
        metric=metric if metric in METRICS[LINEAR_PROBE] else METRICS[LINEAR_PROBE][0],
        chance=task.chance if metric in METRICS[LINEAR_PROBE] else None,
        group=MODES[mode],
        images=task.images,
        classes=task.classes,
    )
    texts = tuple(file for file in data.texts if file != TEMPLATES_FILE)
    data = replace(data, task=probe, templates=(), texts=texts, train_shards=shards)
    return replace(data, shots=shots, draws=draws) if shots else data


def _read_pairs(name: str, folder: str, tables: Sequence[str], at: str) -> TaskData:
    """The task of retrieval with its captions in a csv beside the images, or in parquet files with them."""
    task = _own_task(name, RETRIEVAL)
    if not tables[0].endswith(".csv"):
        for table in tables:
            folders.check_parquet(storage.join(folder, table))
        return TaskData(task, folder, tuple(tables))
    captions = folders.read_captions(folder, tables[0], folders.list_images(folder))
    if not captions:
        raise ConfigError(f"{at}: {folder}/{tables[0]} has no rows, expected images with captions")
    return TaskData(task, folder, _runs(len(captions)), texts=(tables[0],))


def _read_questions(name: str, folder: str, at: str) -> TaskData:
    """The files of WinoGAViL."""
    if winogavil.QUESTIONS_FILE not in storage.list_files(folder):
        raise ConfigError(
            f"{at}: {folder} lacks {winogavil.QUESTIONS_FILE}, expected it and {winogavil.IMAGES_FOLDER}/"
        )
    images = {image for question in winogavil.read_questions(folder) for image in question.candidates}
    return TaskData(_own_task(name, ASSOCIATION), folder, _runs(len(images)), texts=(winogavil.QUESTIONS_FILE,))


def _read_classes(name: str, folder: str, own: Mapping[str, Any], at: str) -> TaskData:
    """The task of a folder with a sub-folder of images for each class."""
    found = folders.class_folders(folder, at)
    given = own.get("classnames")
    if isinstance(given, dict):
        names = {str(key): text.strip() for key, text in sorted(given.items(), key=lambda item: str(item[0]))}
        unnamed = [one for one in found if one not in names]
        if unnamed:
            hint = suggestion(unnamed[0], list(names))
            raise ConfigError(f"{at}: classnames lacks {unnamed[0]}, a folder of {folder}, expected its name.{hint}")
    elif given is not None:
        if len(given) != len(found):
            raise ConfigError(
                f"{at}: classnames has {len(given)} names, expected {len(found)}, one for each folder of {folder}"
            )
        names = dict(zip(found, (text.strip() for text in given), strict=True))
    else:
        names = {one: " ".join(one.split("_")).strip() for one in found}
    if len(names) < 2 or not found:
        raise ConfigError(
            f"{at}: {folder} has {len(found)} sub-folders of images, expected one a class, {folders.CAPTIONS_FILE} "
            f"with captions, or CLIP_benchmark's layout ({CLASSES_FILE}, {SHARDS_FILE}, {SPLIT}/0.tar)"
        )
    templates = own.get("templates", DEFAULT_TEMPLATES)
    data = TaskData(
        _own_task(name, CLASSIFICATION), folder, (), tuple(names.values()), templates, class_folders=tuple(names)
    )
    return replace(data, shards=_runs(len(listed_images(data))))


def _own_task(name: str, kind: str) -> Task:
    return Task(name, name, kind, METRICS[kind][0])


def _runs(num_images: int) -> tuple[str, ...]:
    return tuple(str(number) for number in range(folders.num_shards(num_images)))


def listed_images(data: TaskData) -> list[tuple[str, Any]]:
    """(path below the folder, target) of the images of a task whose shards are runs of them, in order.

    The target is a label or a list of captions; None for WinoGAViL, whose images stand in several questions.
    """
    if data.task.type == ASSOCIATION:
        questions = winogavil.read_questions(data.path)
        return [(image, None) for image in sorted({image for one in questions for image in one.candidates})]
    files = folders.list_images(data.path)
    if data.task.type == RETRIEVAL:
        return list(folders.read_captions(data.path, data.texts[0], files).items())
    label = {folder: number for number, folder in enumerate(data.class_folders)}
    return [(name, label[name.partition("/")[0]]) for name in files if "/" in name and folders.is_image(name)]


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
