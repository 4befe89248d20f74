"""Evaluating a strategy over a pool, shard by shard, into a selection.

Only cuts need the whole pool: the value, and the uid at a tie, at which `top` and `random` stop. They are found by
exact_cut in a few streaming passes over one column; with its cut known, every strategy can be decided row by row.
So memory is that of one shard's columns, plus the uids that are kept while they are sorted (16 bytes each, at most
RUN_ROWS at once), plus the subset files that are named (16 bytes a uid). Cost: each cut reads its column about twice,
and the columns of its `within` as often; then one pass over all columns that are used, and the uids.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core import pool, storage
from pipeline.core.errors import WinnowError
from pipeline.core.pool import Shard
from stages.column_files import Column, file_path, open_columns
from stages.exclusion import NOTHING, URL_COLUMNS, Exclusion
from stages.selection import uids as uid_pairs
from stages.selection.exact_cut import descending_keys, kth_smallest
from stages.selection.strategies import (
    Algebra,
    Comparison,
    Random,
    Repeat,
    Rule,
    Strategy,
    Top,
    Uids,
    exact_count,
    used_strategies,
)

VERSION = 1  # bump when any output changes for the same inputs
RANDOM_STREAM, REPEAT_STREAM = 1, 2
EVERYTHING = (2**64 - 1,) * 3


def select(
    pool_path: str,
    columns: Mapping[str, Column],
    strategies: Mapping[str, Strategy],
    name: str,
    out_path: str,
    exclude: Exclusion = NOTHING,
) -> dict[str, Any]:
    """Facts of the selection; its files are there when this returns: per pool shard (row, multiplicity), and uids.npy.

    Args:
        columns: {name in the config: where it is stored} for the stages' columns that the strategy uses; the pool's own
            need no entry.
        exclude: rows that count as if the pool did not have them.

    Returns:
        {pool_rows, ok_rows, kept_rows, kept_samples, funnel: [{rule, rows_in, rows_kept, alone_kept, only_removed}]}.
        The funnel starts with the whole pool and ends with kept_rows; each rule starts with what the one before kept.
        alone_kept and only_removed are of the rows that can be chosen at all (ok and not excluded): how many pass the
        rule by itself, and how many every other rule keeps and this one does not. Steps before them have neither.
    """
    evaluation = Evaluation(pool_path, columns, strategies, name, exclude)
    rules = rule_names(strategies, name)
    in_order, alone, only = (np.zeros(len(rules), dtype=np.int64) for _ in range(3))
    pool_rows = ok_rows = not_excluded = kept_rows = 0
    writer = uid_pairs.SubsetWriter(sum(shard.rows for shard in evaluation.shards))
    for view in evaluation.views():
        pool_rows += view.shard.rows
        ok_rows += int(view.ok.sum())
        mask = view.base
        not_excluded += int(mask.sum())
        judged = view.judge(name)
        for index, kept in enumerate(judged.kept_by_rule):
            mask = mask & kept
            in_order[index] += int(mask.sum())
            alone[index] += int(kept.sum())
            only[index] += int((judged.only_removed & ~kept).sum())
        multiplicity = judged.multiplicity
        rows = np.flatnonzero(multiplicity).astype(np.int32)
        kept_rows += len(rows)
        if len(rows):
            writer.add(np.repeat(view.uids[rows], multiplicity[rows], axis=0))
        table = pa.table({"row": rows, "multiplicity": multiplicity[rows].astype(np.int32)})
        data = pool.table_bytes(table, {pool.SHARD_DIGEST: view.shard.digest.encode()})
        storage.write_bytes(file_path(out_path, view.shard), data)
    writer.write(storage.join(out_path, "uids.npy"))
    funnel: list[dict[str, Any]] = [{"rule": "ok", "rows_in": pool_rows, "rows_kept": ok_rows}]
    if exclude:
        funnel.append({"rule": "exclude", "rows_in": ok_rows, "rows_kept": not_excluded})
    counts = zip(in_order.tolist(), alone.tolist(), only.tolist(), strict=True)
    for rule, (rows_kept, alone_kept, only_removed) in zip(rules, counts, strict=True):
        rows_in = funnel[-1]["rows_kept"]
        step = {"rule": rule, "rows_in": rows_in, "rows_kept": rows_kept}
        funnel.append(step | {"alone_kept": alone_kept, "only_removed": only_removed})
    return {
        "pool_rows": pool_rows,
        "ok_rows": ok_rows,
        "kept_rows": kept_rows,
        "kept_samples": writer.num_rows,
        "funnel": funnel,
    }


def rule_names(strategies: Mapping[str, Strategy], name: str) -> list[str]:
    """What the funnel calls each of flat_rules, and the strategy's `repeat` where it has one."""
    repeat = strategies[name].repeat
    return [*map(str, flat_rules(strategies, name)), *([f"repeat {repeat.column}"] if repeat else [])]


def flat_rules(strategies: Mapping[str, Strategy], name: str) -> Iterator[Rule]:
    """The strategy's rules with `all_of` written out, so that the funnel shows each comparison."""
    for rule in strategies[name].rules:
        if isinstance(rule, Algebra) and rule.operator == "all_of":
            for part in rule.names:
                yield from flat_rules(strategies, part)
        else:
            yield rule


@dataclass(frozen=True)
class Judged:
    """What each rule says of one shard's rows. Rows that can't be chosen at all pass no rule and fail none alone.

    Attributes:
        kept_by_rule: for each of rule_names, [rows] bool: which rows pass the rule by itself.
        only_removed: [rows] bool: rows that exactly one of the rules removes.
        multiplicity: [rows] int64: how often the strategy takes each row.
    """

    kept_by_rule: list[np.ndarray]
    only_removed: np.ndarray
    multiplicity: np.ndarray


@dataclass
class _Subset:
    uids: np.ndarray
    has_repeats: bool


class Evaluation:
    """A strategy over a pool, with the cuts of `top` and `random` and the subset files resolved."""

    def __init__(
        self,
        pool_path: str,
        columns: Mapping[str, Column],
        strategies: Mapping[str, Strategy],
        name: str,
        exclude: Exclusion,
    ):
        self.pool_path = pool_path
        self.columns = columns
        self.strategies = strategies
        self.shards = pool.load_shards(pool_path)
        self.excluded = exclude.load() if exclude else None
        self.subsets: dict[str, _Subset] = {}
        self.cuts: dict[Rule, tuple[int, int, int]] = {}  # a row is in when (key, uid high, uid low) <= the cut
        for part in used_strategies(strategies, name):
            for rule in strategies[part].rules:
                if isinstance(rule, Uids) and rule.path not in self.subsets:
                    self.subsets[rule.path] = _load_subset(rule.path, "uids")
                    if self.subsets[rule.path].has_repeats and part != name:
                        raise WinnowError(
                            f"strategies.{part}.uids = {rule.path} repeats uids, expected each once where a strategy "
                            "is part of another"
                        )
                if isinstance(rule, (Top, Random)) and rule not in self.cuts:
                    self.cuts[rule] = self._cut(rule)

    def views(self) -> Iterator[ShardView]:
        """A view of each shard in turn."""
        for shard in self.shards:
            view = ShardView(self, shard)
            yield view
            view.close()

    def _cut(self, rule: Top | Random) -> tuple[int, int, int] | None:
        """Where the rule stops, or None when it keeps nothing."""
        num_rows = num_numbers = num_model = 0
        for view in self.views():
            num_rows += int(view.candidates(rule).sum())
            num_numbers += len(view.candidate_keys(rule)[0])
            if isinstance(rule, Random) and rule.as_many_as:
                num_model += int(view.mask(rule.as_many_as).sum())
        if isinstance(rule, Random) and rule.as_many_as:
            k = min(num_model, num_numbers)
        elif isinstance(rule, Top) and rule.datacomp:
            k = int(num_rows * rule.fraction) + 1
            if k > num_numbers:
                return None
        else:
            k = exact_count(rule.fraction, num_numbers)
        if k == 0:
            return None
        cut = kth_smallest(lambda: (view.candidate_keys(rule)[0] for view in self.views()), k)
        rest = k - cut.num_smaller
        if rest == cut.num_equal or (isinstance(rule, Top) and rule.datacomp):
            return (cut.key, *EVERYTHING[1:])
        high = kth_smallest(lambda: (uids[:, 0] for uids in self._tied(rule, cut.key)), rest)
        rest -= high.num_smaller
        if rest == high.num_equal:
            return cut.key, high.key, EVERYTHING[2]
        same = (uids[uids[:, 0] == np.uint64(high.key), 1] for uids in self._tied(rule, cut.key))
        lows = np.sort(np.concatenate(list(same)))
        return cut.key, high.key, int(lows[rest - 1])

    def _tied(self, rule: Top | Random, key: int) -> Iterator[np.ndarray]:
        for view in self.views():
            keys, rows = view.candidate_keys(rule)
            tied = rows[keys == np.uint64(key)]
            if len(tied):
                yield view.uids[tied]


class ShardView:
    """One shard: its columns, read on first use, and the masks of rules and strategies."""

    def __init__(self, evaluation: Evaluation, shard: Shard):
        self.evaluation = evaluation
        self.shard = shard
        self._files: dict[str, pq.ParquetFile] = {}
        self._columns: dict[str, pa.Array] = {}
        self._masks: dict[str, np.ndarray] = {}
        self._uids: np.ndarray | None = None
        self.ok = np.asarray(self.column("ok"))
        self.base = self.ok  # rows that can be chosen at all
        if evaluation.excluded:
            urls = (self.column(name).to_pylist() for name in URL_COLUMNS if self._has(name))
            self.base = self.base & ~evaluation.excluded.rows(self.uids, urls)

    @property
    def uids(self) -> np.ndarray:
        """[rows, 2] uint64."""
        if self._uids is None:
            place = f"{self.evaluation.pool_path}/{self.shard.name}.parquet"
            self._uids = uid_pairs.parse(self.column("uid"), place)
        return self._uids

    def column(self, name: str) -> pa.Array:
        """The column with this name in the config, or the pool's own."""
        if name not in self._columns:
            column = self.evaluation.columns.get(name) or Column(self.evaluation.pool_path, name)
            if column.path not in self._files:
                self._files[column.path] = self._open(column.path)
            table = self._files[column.path].read([column.name], use_threads=False)
            if table.num_columns != 1:
                raise WinnowError(f"{file_path(column.path, self.shard)}: no column {column.name}, expected it there")
            self._columns[name] = table[0].chunk(0) if table[0].num_chunks == 1 else table[0].combine_chunks()
        return self._columns[name]

    def _has(self, name: str) -> bool:
        """True when the pool itself has the column."""
        path = self.evaluation.pool_path
        if path not in self._files:
            self._files[path] = self._open(path)
        return name in self._files[path].schema_arrow.names

    def _open(self, path: str) -> pq.ParquetFile:
        if path != self.evaluation.pool_path:
            return open_columns(path, self.shard)
        return pq.ParquetFile(storage.open_read(file_path(path, self.shard)))

    def close(self) -> None:
        """None; closes the shard's files."""
        for file in self._files.values():
            file.close(force=True)

    def numbers(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """The column's values in its own type (anything where there is no number), and where there is a number."""
        return numbers_of(self.column(name))

    def mask(self, name: str) -> np.ndarray:
        """[rows] bool: which rows are in the strategy."""
        if name not in self._masks:
            mask = self.base
            for rule in self.evaluation.strategies[name].rules:
                mask = mask & self.rule_mask(rule)
            self._masks[name] = mask
        return self._masks[name]

    def judge(self, name: str) -> Judged:
        """What each of the strategy's flat rules says of the rows."""
        strategies = self.evaluation.strategies
        kept = [self.base & self.rule_mask(rule) for rule in flat_rules(strategies, name)]
        everything = self.multiplicities(strategies[name], self.base)  # as if no rule removed a row
        if strategies[name].repeat:
            kept.append(everything > 0)
        num_kept = np.zeros(self.shard.rows, dtype=np.int32)
        for mask in kept:
            num_kept += mask
        chosen = self.base & (num_kept == len(kept))
        return Judged(kept, self.base & (num_kept == len(kept) - 1), everything * chosen)

    def rule_mask(self, rule: Rule) -> np.ndarray:
        """[rows] bool: which rows pass the rule; rows outside `base` may be anything."""
        if isinstance(rule, Comparison):
            return self._compare(rule)
        if isinstance(rule, Uids):
            return uid_pairs.count_in(self.uids, self.evaluation.subsets[rule.path].uids) > 0
        if isinstance(rule, Algebra):
            masks = [self.mask(part) for part in rule.names]
            if rule.operator == "all_of":
                return np.logical_and.reduce(masks)
            union = np.logical_or.reduce(masks)
            return union if rule.operator == "any_of" else ~union
        mask = np.zeros(self.shard.rows, dtype=bool)
        cut = self.evaluation.cuts[rule]
        if cut is None:
            return mask
        keys, rows = self.candidate_keys(rule)
        key, high, low = (np.uint64(value) for value in cut)
        mask[rows[keys < key]] = True
        tied = rows[keys == key]
        if (int(high), int(low)) == EVERYTHING[1:]:
            mask[tied] = True
        elif len(tied):
            uids = self.uids[tied]
            mask[tied] = (uids[:, 0] < high) | ((uids[:, 0] == high) & (uids[:, 1] <= low))
        return mask

    def candidates(self, rule: Top | Random) -> np.ndarray:
        """[rows] bool: the rows among which the rule takes its share."""
        return self.mask(rule.within) if rule.within else self.base

    def candidate_keys(self, rule: Top | Random) -> tuple[np.ndarray, np.ndarray]:
        """Keys that ascend in the order in which the rule takes rows, and those rows; without rows of no number."""
        rows = self.candidates(rule)
        if isinstance(rule, Random):
            rows = np.flatnonzero(rows)
            return uid_pairs.hash64(self.uids[rows], rule.seed, RANDOM_STREAM), rows
        values, valid = self.numbers(rule.column)
        rows = np.flatnonzero(rows & valid)
        return descending_keys(values[rows]), rows

    def _compare(self, rule: Comparison) -> np.ndarray:
        column = self.column(rule.column)
        if pa.types.is_string(column.type) or pa.types.is_boolean(column.type):
            if rule.operator == "in":
                found = pc.is_in(column, value_set=pa.array(rule.literal, type=column.type))
                return np.asarray(pc.and_(found, column.is_valid()))
            compare = pc.equal if rule.operator == "==" else pc.not_equal
            return np.asarray(compare(column, pa.scalar(rule.literal, type=column.type)).fill_null(False))
        values, valid = self.numbers(rule.column)
        literal = rule.literal
        if values.dtype.kind == "f":  # in the column's own type: float32 0.281 is at least 0.281
            literal = np.asarray(literal, dtype=values.dtype)
        if rule.operator == "in":
            return valid & np.isin(values, np.asarray(literal))
        operator = {
            "==": np.equal,
            "!=": np.not_equal,
            "<": np.less,
            "<=": np.less_equal,
            ">": np.greater,
            ">=": np.greater_equal,
        }[rule.operator]
        return valid & operator(values, literal)

    def multiplicities(self, strategy: Strategy, mask: np.ndarray) -> np.ndarray:
        """[rows] int64: how often each row is taken, 0 outside `mask`."""
        result = mask.astype(np.int64)
        if strategy.repeat:
            return result * self._repeats(strategy.repeat)
        for rule in strategy.rules:
            if isinstance(rule, Uids) and self.evaluation.subsets[rule.path].has_repeats:
                result *= uid_pairs.count_in(self.uids, self.evaluation.subsets[rule.path].uids)
        return result

    def _repeats(self, repeat: Repeat) -> np.ndarray:
        values, valid = self.numbers(repeat.column)
        capped = np.clip(np.where(valid, values, 0).astype(np.float64), 0, repeat.cap)
        whole = np.floor(capped)
        # 53 bits of the hash as a number in [0, 1)
        draw = (uid_pairs.hash64(self.uids, repeat.seed, REPEAT_STREAM) >> np.uint64(11)) * 2.0**-53
        return (whole + (draw < capped - whole)).astype(np.int64)


def numbers_of(column: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """The values in the column's own type (anything where there is no number), and where there is a number."""
    valid = np.ones(len(column), dtype=bool)
    if column.null_count:
        valid = np.asarray(column.is_valid())
        column = column.fill_null(0)
    values = np.asarray(column)
    if values.dtype.kind == "f":
        valid = valid & ~np.isnan(values)
    return values, valid


def _load_subset(path: str, place: str) -> _Subset:
    uids = uid_pairs.read_subset(path, place)
    repeats = bool((uids[1:] == uids[:-1]).all(axis=1).any())
    return _Subset(np.asfortranarray(uids), repeats)  # both columns contiguous, as searchsorted wants them
