"""Strategies: named sets of rows over the whole pool, written in YAML.

A strategy is a mapping; its parts are intersected. `{}` is every ok row.

    where: ["caption_words > 2", "language == en", "source in [web, shop]"]
    top: {column: clip_score, fraction: 0.3, within: basic}     # cut: datacomp for DataComp's own rule
    threshold: {column: clip_score, at_least: 0.281}
    random: {fraction: 0.3, seed: 0}                            # or as_many_as: another strategy
    all_of: [basic, clip_top30]      any_of: [...]      none_of: [...]
    uids: subset.npy
    repeat: {column: weight, cap: 4, seed: 0}                   # how often each chosen row is taken

Rules of value: NaN and null never pass a comparison, `!=` included. Numbers are compared in the column's own type, so
`clip_score >= 0.281` keeps a float32 0.281. A fraction takes exactly floor(fraction x candidates) in decimals;
candidates are the ok rows (of `within`) that have a number; ties go to the smaller uid. `random` takes the rows whose
hash of (uid, seed) is smallest, so smaller fractions lie inside larger ones. `cut: datacomp` keeps every score that is
at least the n-th largest counted from 0, n = int(fraction x rows), NaN last: one row more, ties included.

`repeat` comes last, wherever it stands in the mapping, and a strategy with it is no part of another.

This module parses and checks; choose.py evaluates.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core import storage
from pipeline.core.config import Model, validate
from pipeline.core.errors import ConfigError, suggestion

COMPARISON = re.compile(r"\s*([A-Za-z_]\w*)\s*(==|!=|<=|>=|<|>|in\b)\s*(.+?)\s*")
NUMBER = re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?")
ITEM = re.compile(r"""\s*('[^']*'|"[^"]*"|[^,'"]*?)\s*,""")  # of a list after `in`; quotes may hold commas
WORD = re.compile(r"'([^']*)'|\"([^\"]*)\"|([\w.:/@+-]+)")
LARGEST = {
    "int32": 2**31 - 1,
    "int64": 2**63 - 1,
    "float32": Decimal("3.4e38"),
    "float64": Decimal("1.7e308"),  # no stage adds it, but a pool may carry it
}
NUMERIC = tuple(LARGEST)
REPEAT_MAX = 1_000_000


@dataclass(frozen=True)
class Comparison:
    """`column operator literal`; the literal is of the type of the column, for `in` a tuple of such."""

    column: str
    operator: str
    literal: Any

    def __str__(self) -> str:
        return f"{self.column} {self.operator} {_literal_text(self.literal)}"


@dataclass(frozen=True)
class Top:
    """The rows with the largest values; `within` names a strategy, empty for all ok rows."""

    column: str
    fraction: float
    within: str
    datacomp: bool

    def __str__(self) -> str:
        text = f"top {self.fraction} of {self.column}" + (f" within {self.within}" if self.within else "")
        return text + (" (cut: datacomp)" if self.datacomp else "")


@dataclass(frozen=True)
class Random:
    """The rows with the smallest hash of uid and seed: a fraction, or as many as another strategy keeps."""

    fraction: float | None
    as_many_as: str
    seed: int
    within: str

    def __str__(self) -> str:
        size = f"as many as {self.as_many_as}" if self.as_many_as else str(self.fraction)
        return f"random {size}, seed {self.seed}" + (f" within {self.within}" if self.within else "")


@dataclass(frozen=True)
class Algebra:
    """Intersection (`all_of`), union (`any_of`) or complement of the union (`none_of`) of named strategies."""

    operator: str
    names: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.operator} {', '.join(self.names)}"


@dataclass(frozen=True)
class Uids:
    """The rows that a subset file lists."""

    path: str

    def __str__(self) -> str:
        return f"uids {storage.name_of(self.path)}"


@dataclass(frozen=True)
class Repeat:
    """How often a row is taken: the column's value, at most `cap`; its fraction decides by a hash of uid and seed.

    value 2.3 -> 2 for 70 % of such rows, 3 for 30 %. NaN, null and values <= 0 -> not taken.
    """

    column: str
    cap: float
    seed: int


Rule = Comparison | Top | Random | Algebra | Uids


@dataclass(frozen=True)
class Strategy:
    """A named set: the intersection of its rules, in the order in which the funnel counts them."""

    name: str
    rules: tuple[Rule, ...]
    repeat: Repeat | None = None


class _Top(Model):
    column: str
    fraction: float = Field(gt=0, le=1)
    within: str = ""
    cut: Literal["exact", "datacomp"] = "exact"


class _Threshold(Model):
    column: str
    at_least: Annotated[float, Field(allow_inf_nan=False)]


class _Random(Model):
    fraction: float | None = Field(None, gt=0, le=1)
    as_many_as: str = ""
    seed: int = Field(0, ge=0)
    within: str = ""


class _Repeat(Model):
    column: str
    cap: float = Field(gt=0, le=REPEAT_MAX)
    seed: int = Field(0, ge=0)


class _Body(Model):
    where: list[str] | None = Field(None, min_length=1)
    top: _Top | None = None
    threshold: _Threshold | None = None
    random: _Random | None = None
    all_of: list[str] | None = Field(None, min_length=1)
    any_of: list[str] | None = Field(None, min_length=1)
    none_of: list[str] | None = Field(None, min_length=1)
    uids: str | None = None
    repeat: _Repeat | None = None


def parse_strategies(
    mapping: Mapping[str, Mapping[str, Any] | None], place: str, columns: Mapping[str, str]
) -> dict[str, Strategy]:
    """The checked strategies by name.

    Args:
        mapping: the config's `strategies`.
        place: how error lines start, such as `configs/demo.yaml: strategies`.
        columns: {column: type} of all that can be asked for: the pool's own and those of all stages.

    Raises:
        ConfigError: an unknown key, column or strategy, a wrong literal, a cycle, algebra over a `repeat`.
    """
    strategies = {name: _parse(name, body or {}, f"{place}.{name}", columns) for name, body in mapping.items()}
    for name, strategy in strategies.items():
        for key, other in _references(strategy):
            where = f"{place}.{name}.{key}"
            if other not in strategies:
                raise ConfigError(f"{where} = {other}, expected a strategy.{suggestion(other, strategies)}")
            if strategies[other].repeat:
                raise ConfigError(f"{where} = {other}, expected a strategy without repeat, as it is part of another")
        _check_acyclic(strategies, name, place)
    return strategies


def parse_comparisons(texts: Sequence[str], place: str, columns: Mapping[str, str]) -> tuple[Comparison, ...]:
    """The checked comparisons. Raises ConfigError for an unknown column or a wrong literal.

    Args:
        columns: see parse_strategies.
    """
    return tuple(_comparison(text, f"{place}.{index}", columns) for index, text in enumerate(texts))


def used_strategies(strategies: Mapping[str, Strategy], name: str, sizes: bool = True) -> list[str]:
    """The names of the strategy and of all that it is made of, parts before what uses them.

    Args:
        sizes: False leaves out strategies that only say how many rows to take (`as_many_as`), not which.
    """
    found: list[str] = []

    def visit(current: str) -> None:
        if current not in found:
            for key, other in _references(strategies[current]):
                if sizes or key != "random.as_many_as":
                    visit(other)
            found.append(current)

    visit(name)
    return found


def used_columns(strategies: Mapping[str, Strategy], name: str, sizes: bool = True) -> set[str]:
    """The columns that the strategy needs, its parts included. See used_strategies for `sizes`."""
    columns = set()
    for part in used_strategies(strategies, name, sizes):
        strategy = strategies[part]
        columns |= {rule.column for rule in strategy.rules if isinstance(rule, (Comparison, Top))}
        if strategy.repeat:
            columns.add(strategy.repeat.column)
    return columns


def used_files(strategies: Mapping[str, Strategy], name: str) -> list[str]:
    """The subset files that the strategy reads; their content is part of a selection's identity."""
    parts = [strategies[part] for part in used_strategies(strategies, name)]
    return sorted({rule.path for strategy in parts for rule in strategy.rules if isinstance(rule, Uids)})


def definition(strategies: Mapping[str, Strategy], name: str) -> dict[str, Any]:
    """The strategy as JSON values with every named part written out: what identifies it, whatever it is called.

    Paths of subset files are left out (their content counts): each is its index in used_files().
    """
    files = used_files(strategies, name)

    def of(current: str) -> dict[str, Any]:
        strategy = strategies[current]
        result: dict[str, Any] = {"rules": [rule_of(rule) for rule in strategy.rules]}
        if strategy.repeat:
            result["repeat"] = vars(strategy.repeat)
        return result

    def rule_of(rule: Rule) -> Any:
        if isinstance(rule, Comparison):
            literal = list(rule.literal) if isinstance(rule.literal, tuple) else rule.literal
            return [rule.column, rule.operator, literal]
        if isinstance(rule, Algebra):
            return {rule.operator: [of(part) for part in rule.names]}
        if isinstance(rule, Uids):
            return {"uids": files.index(rule.path)}
        values = dict(vars(rule))
        for key in ("within", "as_many_as"):
            if values.get(key):
                values[key] = of(values[key])
        return {"top" if isinstance(rule, Top) else "random": values}

    return of(name)


def exact_count(fraction: float, num_candidates: int) -> int:
    """floor(fraction x candidates), the fraction taken as the decimal that it is written as: 0.29 of 100 is 29."""
    return int(Decimal(repr(fraction)) * num_candidates)


def _references(strategy: Strategy) -> Iterator[tuple[str, str]]:
    for rule in strategy.rules:
        if isinstance(rule, Algebra):
            yield from ((rule.operator, name) for name in rule.names)
        if isinstance(rule, Random) and rule.as_many_as:
            yield "random.as_many_as", rule.as_many_as
        if isinstance(rule, (Top, Random)) and rule.within:
            yield ("top" if isinstance(rule, Top) else "random") + ".within", rule.within


def _check_acyclic(strategies: Mapping[str, Strategy], start: str, place: str) -> None:
    path: list[str] = []

    def visit(name: str) -> None:
        if name in path:
            cycle = " -> ".join([*path[path.index(name) :], name])
            raise ConfigError(f"{place}.{name} = {cycle}, expected strategies without a cycle")
        path.append(name)
        for _, other in _references(strategies[name]):
            if other in strategies:
                visit(other)
        path.pop()

    visit(start)


def _parse(name: str, body: Mapping[str, Any], place: str, columns: Mapping[str, str]) -> Strategy:
    checked: _Body = validate(_Body, body, place)
    rules: list[Rule] = []
    repeat = None
    # In the order of the file: the funnel counts the rules in it.
    for key in body:
        value = getattr(checked, key)
        where = f"{place}.{key}"
        if value is None:
            raise ConfigError(f"{where} is empty, expected a value")
        if key == "where":
            rules += parse_comparisons(value, where, columns)
        elif key == "top":
            _check_column(value.column, where, columns, NUMERIC)
            if value.cut == "datacomp" and value.fraction == 1:
                raise ConfigError(f"{where}.fraction = 1, expected a number < 1, as cut: datacomp fails at 1")
            rules.append(Top(value.column, value.fraction, value.within, value.cut == "datacomp"))
        elif key == "threshold":
            kind = _check_column(value.column, where, columns, NUMERIC)
            rules.append(Comparison(value.column, ">=", _number(repr(value.at_least), kind, f"{where}.at_least")))
        elif key == "random":
            if (value.fraction is None) == (not value.as_many_as):
                raise ConfigError(f"{where}: expected either fraction or as_many_as")
            rules.append(Random(value.fraction, value.as_many_as, value.seed, value.within))
        elif key == "uids":
            path = storage.absolute(value)
            if not storage.exists(path) or storage.is_folder(path):
                raise ConfigError(f"{where} = {value}, expected a subset file (.npy); no file is there")
            rules.append(Uids(path))
        elif key == "repeat":
            _check_column(value.column, where, columns, NUMERIC)
            repeat = Repeat(value.column, value.cap, value.seed)
        else:
            rules.append(Algebra(key, tuple(value)))
    return Strategy(name, tuple(rules), repeat)


def _check_column(column: str, place: str, columns: Mapping[str, str], kinds: Sequence[str]) -> str:
    if column not in columns:
        raise ConfigError(f"{place}: {column} is an unknown column.{suggestion(column, columns)}")
    if columns[column] not in kinds:
        raise ConfigError(f"{place}: {column} is of type {columns[column]}, expected {' or '.join(kinds)}")
    return columns[column]


def _comparison(text: str, place: str, columns: Mapping[str, str]) -> Comparison:
    match = COMPARISON.fullmatch(text)
    if not match:
        raise ConfigError(f"{place} = {text}, expected COLUMN OP LITERAL with OP one of == != < <= > >= in")
    column, operator, literal = match.groups()
    kind = _check_column(column, f"{place} = {text}", columns, ("bool", *NUMERIC, "string"))
    parse: Callable[[str, str, str], Any] = {"bool": _bool, "string": _word}.get(kind, _number)
    if operator == "in":
        if not (literal.startswith("[") and literal.endswith("]")) or not literal[1:-1].strip():
            raise ConfigError(f"{place} = {text}, expected a list such as [a, b] after in")
        rest, items, end = f"{literal[1:-1]},", [], 0
        while end < len(rest):
            item = ITEM.match(rest, end)
            if not item:
                raise ConfigError(f"{place} = {text}, expected a list such as [a, b] after in")
            items.append(item[1])
            end = item.end()
        return Comparison(column, operator, tuple(parse(item, kind, f"{place} = {text}") for item in items))
    if kind in ("bool", "string") and operator not in ("==", "!="):
        raise ConfigError(f"{place} = {text}, expected ==, != or in for the {kind} column {column}")
    return Comparison(column, operator, parse(literal, kind, f"{place} = {text}"))


def _bool(text: str, kind: str, place: str) -> bool:
    if text not in ("true", "false"):
        raise ConfigError(f"{place}, expected true or false")
    return text == "true"


def _number(text: str, kind: str, place: str) -> int | float:
    if not NUMBER.fullmatch(text):
        raise ConfigError(f"{place}, expected a number")
    value = Decimal(text)
    if abs(value) > LARGEST[kind]:
        raise ConfigError(f"{place}, expected a number that a column of type {kind} can hold")
    if kind.startswith("float"):
        return float(value)
    if value != int(value):
        raise ConfigError(f"{place}, expected a whole number for a column of type {kind}")
    return int(value)


def _word(text: str, kind: str, place: str) -> str:
    match = WORD.fullmatch(text)
    if not match:
        raise ConfigError(f"{place}, expected a word or text in quotes")
    return next(group for group in match.groups() if group is not None)


def _literal_text(literal: Any) -> str:
    if isinstance(literal, tuple):
        return f"[{', '.join(map(_literal_text, literal))}]"
    return str(literal).lower() if isinstance(literal, bool) else str(literal)
