"""Samples of what a strategy keeps and removes, for people to look at: nearest to each cut, and at random.

Cuts are those of `top` and of comparisons of numbers with < <= > >=, as far as all of the strategy must pass them
(what stands inside any_of or none_of cuts no single side). Around a cut only rows that every other rule keeps are
shown: those on one side are in the selection, those on the other would be without this rule. Failed and excluded rows
never appear.

gallery.parquet holds a row a sample, group by group, nearest first, in SCHEMA:

    group='cut' rule=2 side='kept' uid='0c39..' value='0.2813' removed_by=None caption='two red stars' thumbnail=b'..'

`rule` and `removed_by` count choose.rule_names from 0. So the file says nothing of what strategies are called.

Cost: the cuts are found as in choose.py, then one pass over the columns that the strategy uses, then captions and
images of the samples only: at most (2 MAX_CUTS + 2) NUM_SAMPLES. Memory is that of one shard's columns, as in
choose.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core import pool, storage
from stages.column_files import Column
from stages.exclusion import NOTHING, Exclusion
from stages.selection import uids as uid_pairs
from stages.selection.choose import Evaluation, Judged, ShardView, flat_rules, rule_names
from stages.selection.exact_cut import descending_keys
from stages.selection.strategies import Comparison, Rule, Strategy, Top
from stages.selection.thumbnails import read_details

VERSION = 2  # bump when any output changes for the same inputs
FILE = "gallery.parquet"
NUM_SAMPLES = 8  # on each side of a cut, and of what is kept and removed at random
MAX_CUTS = 3
GALLERY_STREAM = 14  # which of equal values are shown, and the random samples
SCHEMA = pa.schema(
    [
        ("group", pa.string()),  # cut | random
        ("rule", pa.int32()),  # which rule cuts; null for random samples
        ("side", pa.string()),  # kept | removed
        ("uid", pa.string()),
        ("value", pa.string()),  # of the rule's column, as its type prints it; null for random samples
        ("removed_by", pa.int32()),  # the first rule that removes the row; null where it is kept
        ("caption", pa.string()),
        ("flagged", pa.bool_()),  # the row passes a comparison of the config's `flagged`
        ("thumbnail", pa.binary()),  # a JPEG, known faces blurred; null where the pool has no image that decodes
    ]
)


def write_gallery(
    pool_path: str,
    columns: Mapping[str, Column],
    strategies: Mapping[str, Strategy],
    name: str,
    out_path: str,
    exclude: Exclusion = NOTHING,
    flagged: Sequence[Comparison] = (),
) -> dict[str, Any]:
    """Facts of the gallery, {samples, pictures, flagged, rules}; its file is there when this returns.

    `rules` are the names of the strategy's rules, by number. The arguments are those of choose.select, and:

    Args:
        flagged: rows that pass any of these are marked, so that the page shows their pictures blurred.
    """
    evaluation = Evaluation(pool_path, columns, strategies, name, exclude)
    rules = list(flat_rules(strategies, name))
    cuts = cut_rules(rules)
    groups = [("cut", number, side) for number in cuts for side in ("kept", "removed")]
    groups += [("random", None, side) for side in ("kept", "removed")]
    nearest = {group: _Nearest.empty() for group in groups}
    for shard_number, view in enumerate(evaluation.views()):
        judged, hashes = view.judge(name), uid_pairs.hash64(view.uids, 0, GALLERY_STREAM)
        flags = flagged_rows(view, flagged)
        for group in groups:
            found = _candidates(view, shard_number, judged, hashes, group, rules, flags)
            nearest[group] = nearest[group].merged(found)
    names = [shard.name for shard in evaluation.shards]
    details = read_details(pool_path, names, {row for best in nearest.values() for row in best.rows})
    entries = [
        {
            "group": kind,
            "rule": number,
            "side": side,
            "uid": uid,
            "value": value,
            "removed_by": None if removed_by < 0 else removed_by,
            "flagged": is_flagged,
            **details[row],
        }
        for (kind, number, side), best in nearest.items()
        for row, uid, value, removed_by, is_flagged in zip(
            best.rows,
            uid_pairs.text(best.uids).to_pylist(),
            best.values,
            best.removed_by.tolist(),
            best.flagged.tolist(),
            strict=True,
        )
    ]
    table = pa.Table.from_pylist(entries, schema=SCHEMA)
    storage.write_bytes(storage.join(out_path, FILE), pool.table_bytes(table))
    return {
        "samples": len(entries),
        "pictures": table.num_rows - table["thumbnail"].null_count,
        "flagged": sum(entry["flagged"] for entry in entries),
        "rules": rule_names(strategies, name),
    }


def cut_rules(rules: list[Rule]) -> list[int]:
    """The numbers of the rules whose cuts are shown, ascending: `top` first, then comparisons, MAX_CUTS at most."""
    tops = [number for number, rule in enumerate(rules) if isinstance(rule, Top)]
    comparisons = [
        number
        for number, rule in enumerate(rules)
        if isinstance(rule, Comparison) and rule.operator in ("<", "<=", ">", ">=")
    ]
    return sorted([*tops, *comparisons][:MAX_CUTS])


@dataclass(frozen=True)
class _Nearest:
    """The samples of a group that are nearest to its cut so far, nearest first.

    Attributes:
        order: [n, 4] uint64: distance, hash, uid high, uid low; ascending.
        rows: [n] (number of the shard, row in it). values: [n] texts or None. removed_by: [n] int64, -1: kept.
        flagged: [n] bool.
    """

    order: np.ndarray
    rows: list[tuple[int, int]]
    values: list[str | None]
    removed_by: np.ndarray
    flagged: np.ndarray

    @staticmethod
    def empty() -> _Nearest:
        return _Nearest(np.empty((0, 4), np.uint64), [], [], np.empty(0, np.int64), np.empty(0, bool))

    @property
    def uids(self) -> np.ndarray:
        """[n, 2] uint64."""
        return self.order[:, 2:]

    def merged(self, other: _Nearest) -> _Nearest:
        """The nearest NUM_SAMPLES of both."""
        order = np.concatenate([self.order, other.order])
        first = np.lexsort(order.T[::-1])[:NUM_SAMPLES]
        rows, values = [*self.rows, *other.rows], [*self.values, *other.values]
        removed_by = np.concatenate([self.removed_by, other.removed_by])[first]
        flagged = np.concatenate([self.flagged, other.flagged])[first]
        return _Nearest(order[first], [rows[i] for i in first], [values[i] for i in first], removed_by, flagged)


def flagged_rows(view: ShardView, flagged: Sequence[Comparison]) -> np.ndarray:
    """[rows] bool: which rows pass any of the comparisons."""
    found = np.zeros(view.shard.rows, dtype=bool)
    for comparison in flagged:
        found |= view.rule_mask(comparison)
    return found


def _candidates(
    view: ShardView,
    shard_number: int,
    judged: Judged,
    hashes: np.ndarray,
    group: tuple[str, int | None, str],
    rules: list[Rule],
    flags: np.ndarray,
) -> _Nearest:
    """The nearest of one shard; `hashes` [rows] uint64 order equal values, and the random samples."""
    _, number, side = group
    chosen = judged.multiplicity > 0
    mask = chosen if side == "kept" else view.base & ~chosen
    rule = None if number is None else rules[number]
    if isinstance(rule, (Top, Comparison)):
        numbers, valid = view.numbers(rule.column)
        if side == "removed":
            mask = judged.only_removed & ~judged.kept_by_rule[number] & valid
            if isinstance(rule, Top):
                mask = mask & view.candidates(rule)
        rows = np.flatnonzero(mask)
        keeps_large = isinstance(rule, Top) or rule.operator in (">", ">=")
        descending = descending_keys(numbers[rows])
        distances = descending if keeps_large == (side == "removed") else ~descending
    else:
        rows, numbers = np.flatnonzero(mask), None
        distances = hashes[rows]
    if len(rows) > NUM_SAMPLES:  # equal values all stay: the hash decides among them
        near = distances <= np.partition(distances, NUM_SAMPLES - 1)[NUM_SAMPLES - 1]
        rows, distances = rows[near], distances[near]
    order = np.column_stack([distances, hashes[rows], view.uids[rows]])
    first = np.lexsort(order.T[::-1])[:NUM_SAMPLES]
    rows = rows[first]
    texts = [None if numbers is None else str(numbers[row]) for row in rows]
    removed_by = np.full(len(rows), -1, np.int64)
    for rule_number in reversed(range(len(judged.kept_by_rule))):
        removed_by[~judged.kept_by_rule[rule_number][rows]] = rule_number
    places = [(shard_number, row) for row in rows.tolist()]
    return _Nearest(order[first], places, texts, removed_by, flags[rows])
