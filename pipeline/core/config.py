"""The experiment's configuration: one strict YAML file, then `--set a.b=value` on top.

No includes, no inheritance, no environment. Every error is one line with file, key, value and expectation, before any
work starts. What a name means (a stage's parameters, a recipe, a task) is checked by whoever owns it; this module
owns the shape of the file.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
import yaml
from pydantic import Field

from pipeline.core import storage
from pipeline.core.errors import ConfigError, one_line, short, suggestion

NAME = re.compile(r"[a-z][a-z0-9_]*$")
Seed = Annotated[int, Field(ge=0, lt=2**32)]
MAX_VALUES = 1_000_000  # an alias of aliases stands for more values than there is memory
MAX_DEPTH = 50
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
RESERVED = ("pool", "urls", "tasks", "reference", "model", "profile", "stages")  # steps are called so


def in_job() -> bool:
    """True inside `ray job submit`, where Ray itself brings our code to the workers."""
    return "RAY_JOB_CONFIG_JSON_ENV_VAR" in os.environ


class Model(pydantic.BaseModel):
    """Base of all parts of the config: frozen, strict, unknown keys refused."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True)


class Resources(Model):
    """What one worker of a step gets. `workers` is the most that run at once; None: as many as the cluster holds."""

    cpus: float = Field(1, ge=0)
    gpus: float = Field(0, ge=0)
    memory_gb: float | None = Field(None, gt=0)
    workers: int | None = Field(None, ge=1)
    min_workers: int | None = Field(None, ge=1)  # of a training, with which it goes on where nodes are gone; None: all
    labels: dict[str, str] = {}
    batch_size: int | None = Field(None, ge=1)
    max_concurrent: int | None = Field(None, ge=1)

    @property
    def num_together(self) -> int:
        """How many workers one training needs at the same time, to begin or to go on."""
        return self.min_workers or self.workers or 1


class PoolConfig(Model):
    """Where pairs come from: one source, or several by name; and how they are cut into shards.

    `download` and `only` are for sources that are tables of URLs; `only` names a strategy that needs no image. With
    `download: false` the pool is the rows of the tables, without images, and a run ends at the selections.
    """

    source: Any
    shard_size: int = Field(10_000, ge=1, le=1_000_000)
    sample: float = Field(1.0, gt=0, le=1)
    download: dict[str, Any] | Literal[False] | None = None
    only: str | None = None


class ExcludeConfig(Model):
    """What must not be used, wherever it is: files of uids, and domains (or a file with one a line)."""

    uids: str | list[str] = []
    domains: str | list[str] = []


class ModelConfig(Model):
    """A model that scores: published weights (architecture, pretrained), or a training in this run (recipe, on)."""

    architecture: str | dict[str, Any] | None = None
    pretrained: str | None = None
    recipe: str | None = None
    on: str | None = None
    seed: Seed | None = None  # of a training in this run; 0 where it is not given


class TrainConfig(Model):
    """The budget that all strategies share, its repetitions, and what is watched of them."""

    recipe: str
    # One training a seed, which draws its first weights and its order; a part with a seed of its own below is the same
    # in all of them. A train set's shuffle has the config's `seed`, a random selection the one in its strategy.
    seeds: list[Seed] = Field([0], min_length=1)
    initialisation_seed: Seed | None = None
    order_seed: Seed | None = None
    budgets: list[Annotated[int, Field(ge=1)]] = []  # samples seen, each with a schedule of its own; []: the recipe's
    held_out: str | None = None  # a reference: pairs whose recall is measured while training
    log_to: list[Literal["tensorboard", "wandb"]] = []  # beside metrics.jsonl, which is always there
    checkpoint_every_s: float = Field(300, ge=0)  # how much work a lost worker can cost; changes no result


class EvalConfig(Model):
    """The tasks, by name below `root` or with a path each.

    `root` is a folder, an owner on the hub (`hf://datasets/OWNER`), or `demo` for the demo world's own.
    `leave_out` names a stage that is `against: tasks`: images that it found in the pool count in no score.
    """

    tasks: list[str | dict[str, Any]] = Field(min_length=1)
    root: str | None = None
    leave_out: str | None = None


class BesideConfig(Model):
    """What a report shows beside its run: another run (its folder, or a root: its newest), or a file of results.

    `rows` are patterns (`ViT-B-32 *`) of names in a file; `unit` is said of plain tables only, which do not say it.
    """

    run: str | None = None
    results: str | None = None  # a path, or a pattern of paths
    rows: list[str] = []
    name: str | None = None  # what it is called; None: as its folder or file is
    unit: Literal["fraction", "percent"] | None = None


class ReportConfig(Model):
    """What the report shows beside this run. It changes no artifact."""

    beside: list[BesideConfig] = []


class Config(Model):
    """One experiment."""

    root: str
    seed: int = Field(0, ge=0)  # of the train sets' shuffle
    pool: PoolConfig
    references: dict[str, PoolConfig] = {}
    exclude: ExcludeConfig = ExcludeConfig()
    models: dict[str, ModelConfig] = {}
    recipes: dict[str, dict[str, Any]] = {}
    stages: list[str | dict[str, Any]] = []
    strategies: dict[str, dict[str, Any] | None] = Field(min_length=1)
    compare: list[str] = Field(min_length=1)
    baseline: str | None = None
    shares: list[str] = []  # columns of few values: the report shows how each strategy's mix differs from the pool's
    flagged: list[str] = []  # comparisons as in `where`: pictures of rows that pass any are shown blurred
    published: dict[str, Annotated[float, Field(ge=0, le=100)]] = {}  # averages in percent, shown beside ours
    published_note: str = ""  # what they are
    train: TrainConfig
    eval: EvalConfig
    report: ReportConfig = ReportConfig()
    cluster: dict[str, Resources] = {}

    def resources(self, name: str) -> Resources:
        """The resources of a step, by the name it has in `cluster:`."""
        return self.cluster.get(name, Resources())


def load(path: str, overrides: Sequence[str] = ()) -> Config:
    """The checked configuration, with absolute paths for `root`.

    A relative root is refused inside a Ray job: it would land in Ray's own session folder.

    Args:
        overrides: `a.b=value` strings; values are YAML. A list takes an index (`eval.tasks.0=x`).

    Raises:
        ConfigError: naming file, key, value and what was expected.
    """
    try:
        text = storage.read_bytes(path).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read as a config: {error}") from error
    data = parse_yaml(text, path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping at the top, found {type(data).__name__}")
    for override in overrides:
        apply_override(data, override)
    config = validate(Config, data, path)
    if not storage.is_url(config.root) and not os.path.isabs(os.path.expanduser(config.root)) and in_job():
        raise ConfigError(f"{path}: root = {config.root}, expected an absolute path or a URL inside a Ray job")
    _check_names(config, path)
    return config.model_copy(update={"root": storage.absolute(config.root), "report": _absolute(config.report)})


def _absolute(report: ReportConfig) -> ReportConfig:
    """The same with absolute paths: a report is made again from elsewhere."""
    if not report.beside:
        return report  # as it is: a list that is not given is unlike an empty one
    beside = [
        entry.model_copy(
            update={key: storage.absolute(getattr(entry, key)) for key in ("run", "results") if getattr(entry, key)}
        )
        for entry in report.beside
    ]
    return report.model_copy(update={"beside": beside})


class _Loader(yaml.SafeLoader):
    """Safe YAML with the traps taken out: 5e-4 is a number, on/off/yes/no and 12:30 are words, keys are unique."""


_YAML = "tag:yaml.org,2002:"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, regex) for tag, regex in entries if tag == _YAML + "null"]
    for first, entries in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_YAML + "bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
_Loader.add_implicit_resolver(_YAML + "int", re.compile(r"^[-+]?(?:0|[1-9][0-9_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    _YAML + "float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.[0-9]*|\.[0-9]+|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+.0123456789"),
)


def _unique_mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict:
    seen: dict[Any, Any] = {}
    for key_node, value_node in node.value:
        key = loader.construct_object(key_node, deep=True)
        if not isinstance(key, str):
            key = key_node.value  # `5:` or `true:` as a key is a name
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"the key {key} is there twice", key_node.start_mark)
        seen[key] = loader.construct_object(value_node, deep=True)
    return seen


_Loader.add_constructor(_YAML + "map", _unique_mapping)


def parse_yaml(text: str, path: str) -> Any:
    """The parsed YAML: mappings with text as keys, lists, text, finite numbers, true, false and null.

    Raises ConfigError naming file and line.
    """
    try:
        data = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else path
        problem = getattr(error, "problem", None) or " ".join(str(error).split())
        raise ConfigError(f"{where}: {problem}, expected YAML") from error
    except RecursionError as error:
        raise ConfigError(f"{path}: nested too deeply, expected YAML") from error
    except (ValueError, TypeError, LookupError, AttributeError) as error:  # of `!!int x`, `? [a]`, 5,000 digits
        raise ConfigError(f"{path}: {one_line(error, 200)}, expected YAML") from error
    _check_values(data, path)
    return data


def _check_values(data: Any, path: str) -> None:
    """None. Raises ConfigError for what no config means and code further on could not take."""
    waiting, num_values = [(data, 0)], 0
    while waiting:
        value, depth = waiting.pop()
        num_values += 1
        if num_values > MAX_VALUES or depth > MAX_DEPTH:
            raise ConfigError(f"{path}: more than {MAX_VALUES} values or {MAX_DEPTH} levels, expected fewer")
        if isinstance(value, dict):
            waiting += [(inner, depth + 1) for pair in value.items() for inner in pair]
        elif isinstance(value, list):
            waiting += [(inner, depth + 1) for inner in value]
        elif isinstance(value, str):
            if CONTROL.search(value):
                raise ConfigError(f"{path}: {value[:80]!r}, expected text without control characters")
            if value.encode("utf-8", "replace").decode() != value:
                raise ConfigError(f"{path}: {value[:80]!r}, expected text that is Unicode")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}: {value}, expected a finite number")
        elif value is not None and not isinstance(value, (bool, int, float)):
            raise ConfigError(f"{path}: a {type(value).__name__}, expected a mapping, a list, text or a number")


def apply_override(data: dict[str, Any], override: str) -> None:
    """None; sets one `a.b.c=value` in the parsed file. Raises ConfigError when it has no `=` or no such place."""
    key, separator, text = override.partition("=")
    if not separator or key.split() != [key]:
        raise ConfigError(f"--set {short(override)}: expected KEY=VALUE, such as train.recipe=debug")
    *parents, last = key.split(".")
    target: Any = data
    for depth, name in enumerate(parents):
        place = ".".join(parents[: depth + 1])
        target = _child(target, name, place, create=True)
    value = parse_yaml(text, f"--set {key}")
    if isinstance(target, list):
        target[_index(target, last, key)] = value
    elif isinstance(target, dict):
        target[last] = value
    else:
        raise ConfigError(f"--set {key}: {'.'.join(parents)} is {target!r}, expected a mapping or a list")


def _child(target: Any, name: str, place: str, create: bool) -> Any:
    if isinstance(target, list):
        return target[_index(target, name, place)]
    if isinstance(target, dict):
        if create and target.get(name) is None:
            target[name] = {}
        return target[name]
    raise ConfigError(f"--set {place}: there is {target!r}, expected a mapping or a list")


def _index(target: list, name: str, place: str) -> int:
    if not (name.isascii() and name.isdigit() and len(name) < 10) or int(name) >= len(target):
        raise ConfigError(f"--set {place}: expected an index below {len(target)}, found {name}")
    return int(name)


def validate(kind: type[pydantic.BaseModel], data: Any, place: str) -> Any:
    """The checked model of class `kind`. Raises ConfigError with the first fault as one line that starts with `place`.

    Other modules use this for the parts of the config that they own.
    """
    try:
        return kind.model_validate(data)
    except pydantic.ValidationError as error:
        raise ConfigError(_describe(error, kind, place)) from error


EXPECTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "missing": lambda c: "a value (the key is missing)",
    "int_type": lambda c: "a whole number",
    "int_from_float": lambda c: "a whole number",
    "float_type": lambda c: "a number",
    "string_type": lambda c: "text",
    "bool_type": lambda c: "true or false",
    "list_type": lambda c: "a list",
    "tuple_type": lambda c: "a list",
    "dict_type": lambda c: "a mapping",
    "model_type": lambda c: "a mapping",
    "model_attributes_type": lambda c: "a mapping",
    "greater_than": lambda c: f"a number > {c['gt']:g}",
    "greater_than_equal": lambda c: f"a number >= {c['ge']:g}",
    "less_than": lambda c: f"a number < {c['lt']:g}",
    "less_than_equal": lambda c: f"a number <= {c['le']:g}",
    "literal_error": lambda c: f"one of {c['expected']}",
    "too_short": lambda c: f"at least {c['min_length']} entry",
    "finite_number": lambda c: "a finite number",
}


def _describe(error: pydantic.ValidationError, kind: type[pydantic.BaseModel], place: str) -> str:
    faults = error.errors()
    # An unknown key explains most other faults beside it: name it first.
    fault = next((fault for fault in faults if fault["type"] == "extra_forbidden"), faults[0])
    path = [str(part) for part in fault["loc"] if not _is_union_tag(part)]
    key = ".".join(path)
    joint = ": " if place.endswith((".yaml", ".yml", ".json")) or storage.is_url(place) else "."
    where = f"{place}{joint}{key}" if key else place
    if fault["type"] == "extra_forbidden":
        known = _fields_at(kind, path[:-1])
        return f"{where} is an unknown key.{suggestion(path[-1], known)}"
    if fault["type"] == "value_error":
        return f"{where}: {fault['ctx']['error']}"
    if fault["type"] == "missing":
        return f"{where} is missing, expected a value"
    expected = EXPECTED.get(fault["type"], lambda c: fault["msg"])(fault.get("ctx", {}))
    value = fault["input"]
    hint = ""
    if isinstance(value, str) and fault["type"] in ("float_type", "int_type"):
        hint = " (a number without quotes)"
    return f"{where} = {short(value)}, expected {expected}{hint}"


def _is_union_tag(part: Any) -> bool:
    kinds = ("dict[", "list[", "constrained-")
    return isinstance(part, str) and (part in ("str", "int", "float", "bool") or part.startswith(kinds))


def _fields_at(kind: Any, path: Sequence[str]) -> list[str]:
    for name in path:
        field = kind.model_fields.get(name) if hasattr(kind, "model_fields") else None
        if field is None:
            continue  # a key of a dict of models, or a list index
        kind = field.annotation
        for inner in getattr(kind, "__args__", ()):
            if isinstance(inner, type) and issubclass(inner, pydantic.BaseModel):
                kind = inner
    return list(kind.model_fields) if hasattr(kind, "model_fields") else []


def _check_train(config: Config, place: str) -> None:
    """Trainings that differ, names that are there, and no option without an effect."""
    train = config.train
    for key in ("seeds", "budgets", "log_to"):
        values = getattr(train, key)
        if len(set(values)) != len(values):
            raise ConfigError(
                f"{place}.{key} = {values}, expected different {'names' if key == 'log_to' else 'numbers'}"
            )
    if train.initialisation_seed is not None and train.order_seed is not None and len(train.seeds) > 1:
        raise ConfigError(
            f"{place}.seeds = {train.seeds}, expected one seed: with both initialisation_seed and order_seed given all"
            " trainings would be the same"
        )
    if train.held_out is not None and train.held_out not in config.references:
        hint = suggestion(train.held_out, config.references)
        raise ConfigError(f"{place}.held_out = {train.held_out}, expected one of the references.{hint}")


def _check_beside(config: Config, place: str) -> None:
    """One thing an entry, and no option without an effect."""
    for index, entry in enumerate(config.report.beside):
        where = f"{place}.{index}"
        if bool(entry.run) == bool(entry.results):
            raise ConfigError(f"{where}: expected either run or results")
        for key in ("rows", "unit"):
            if entry.run and getattr(entry, key):
                raise ConfigError(f"{where}.{key} has no effect on a run, expected it to be left out")
        if entry.name is not None and not entry.name.strip():
            raise ConfigError(f"{where}.name = {entry.name!r}, expected a name")
    if config.report.beside and config.pool.download is False:
        raise ConfigError(f"{place} has no effect on selections (pool.download: false), expected it to be left out")


def _check_names(config: Config, path: str) -> None:
    """Names are lower-case words, and every name that is used is defined."""
    for section in ("references", "models", "strategies", "recipes"):
        for name in getattr(config, section):
            if not NAME.match(name):
                raise ConfigError(
                    f"{path}: {section}.{name}: expected a name of a-z, 0-9 and _, starting with a letter"
                )
    for index, name in enumerate(config.compare):
        if name not in config.strategies:
            raise ConfigError(
                f"{path}: compare.{index} = {name}, expected a strategy.{suggestion(name, config.strategies)}"
            )
    if len(set(config.compare)) != len(config.compare):
        raise ConfigError(f"{path}: compare = {config.compare}, expected each strategy once")
    if config.baseline is not None and config.baseline not in config.compare:
        raise ConfigError(
            f"{path}: baseline = {config.baseline}, expected a compared strategy."
            + suggestion(config.baseline, config.compare)
        )
    for name in config.published:
        if name not in config.compare:
            raise ConfigError(
                f"{path}: published.{name}: expected a compared strategy.{suggestion(name, config.compare)}"
            )
    if config.published_note and not config.published:
        raise ConfigError(f"{path}: published_note has no effect without published, expected it to be left out")
    _check_train(config, f"{path}: train")
    _check_beside(config, f"{path}: report.beside")
    if config.pool.only is not None and config.pool.only not in config.strategies:
        raise ConfigError(
            f"{path}: pool.only = {config.pool.only}, expected a strategy."
            + suggestion(config.pool.only, config.strategies)
        )
    for name, reference in config.references.items():
        if reference.only is not None:
            raise ConfigError(f"{path}: references.{name}.only has no effect, expected it to be left out")
    for name in config.strategies:
        if name in config.references:
            raise ConfigError(f"{path}: strategies.{name}: a reference has this name, expected another one")
        if name in RESERVED:
            raise ConfigError(f"{path}: strategies.{name}: the name is that of a step, expected another one")
    for name, model in config.models.items():
        place = f"{path}: models.{name}"
        if (model.recipe is None) != (model.on is None):
            raise ConfigError(f"{place}: expected recipe and on together (a training in this run)")
        unread = [key for key in ("architecture", "pretrained") if model.recipe and getattr(model, key)]
        unread += ["seed"] if model.architecture is not None and model.seed is not None else []
        if unread:
            raise ConfigError(f"{place}.{unread[0]} has no effect here, expected it to be left out")
        if (model.recipe is None) == (model.architecture is None):
            raise ConfigError(f"{place}: expected either architecture and pretrained, or recipe and on")
        if model.architecture is not None and not model.pretrained:
            raise ConfigError(
                f"{place}.pretrained is missing, expected a tag or a weights file; an untrained model can't score"
            )
        if model.on is not None and model.on not in config.references and model.on not in config.strategies:
            choices = [*config.references, *config.strategies]
            raise ConfigError(
                f"{place}.on = {model.on}, expected a reference or a strategy.{suggestion(model.on, choices)}"
            )
