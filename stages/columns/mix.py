"""How often each row is to be taken for a mix of given shares: so much of each topic, source or cluster.

The most that a row is repeated is 4 by default: Muennighoff et al., "Scaling Data-Constrained Language Models", 2023
(arXiv 2305.16264), find up to 4 epochs of the same data nearly as good as new data. That is text; nobody has measured
it for image-text pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from pipeline.core import exchange, storage
from pipeline.core.errors import ConfigError
from pipeline.core.log import logger
from pipeline.core.passes import Pass, Passes
from stages.base import Batch, LoadContext, Stage
from stages.pool_blocks import Block
from stages.row_scores import NUMBERS, check_type

FACTORS = "factors"  # the pass that load() reads
GROUPED_BY = ("string", "bool", "int32", "int64")
DROPPED_BITS = 12  # of a float32: 11 of the mantissa are kept
LARGEST_KEY = 0x7F7FF  # of a finite number
SMALLEST = 2.0**-149  # float32 numbers are whole multiples of it


@dataclass(frozen=True)
class Mix(Stage):
    """How often the row is to be taken, on average, for the mix; for `repeat` with the same cap or a higher one.

    A group, the rows with one value of `column`, gets shares[value] x samples_fraction x (ok rows) samples: spread
    evenly over its rows, or in proportion to `weight_by`. No row gets more than `cap`; what that cuts off goes to the
    other rows of the group in the same proportion, so the group has its share unless all of its rows are at the cap.
    Such a group, and one without rows, falls short: a warning and the record (`mix`) say so, and no other group takes
    its place. Rows with a value without a share, or with none, get 0. A strategy that cuts these rows down further
    changes the shares: give the stage `within: THAT_STRATEGY`.

    Args:
        column: of text, whole numbers or true and false: a topic, `source`, a cluster.
        shares: {value: fraction of the mix}, together at most 1; what is missing to 1 is left empty.
        samples_fraction: samples of the mix to ok rows of the pool (or of `within`).
        weight_by: a column of numbers, such as a classifier's score; taken in 12 significant bits (within 0.02 %).
            NaN, null, infinite and values <= 0 count as 0. Empty: all rows of a group alike.
        cap: most samples of a row.

    Sums are of whole numbers, so the weights have the same bits for any shards. Cost: the two columns read twice, 1 s a
    million rows; for each group and different value of `weight_by` (at most 520,192, some thousands where they lie
    within a few powers of two) 20 bytes in a file for each million rows, and 50 bytes in the memory of one task.
    """

    column: str
    shares: Annotated[Mapping[str, Annotated[float, Field(gt=0, le=1)]], Field(min_length=1)]
    samples_fraction: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    weight_by: str = ""
    cap: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "columns"
    adds: ClassVar[Mapping[str, str]] = {"mix_weight": "float32"}
    whole_pool: ClassVar[bool] = True
    batch_size: ClassVar[int] = 4096

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys(filter(None, (self.column, self.weight_by))))

    def check_needs(self, types: Mapping[str, str], owners: Mapping[str, Stage]) -> None:
        check_type("column", self.column, types[self.column], GROUPED_BY)
        if self.weight_by:
            check_type("weight_by", self.weight_by, types[self.weight_by], NUMBERS)
        for value in self.shares:
            if types[self.column] == "bool" and value not in ("true", "false"):
                raise ConfigError(f"shares.{value}: no value of {self.column}, expected true or false")
            if types[self.column] in ("int32", "int64") and not _is_whole(value):
                raise ConfigError(f"shares.{value}: no value of {self.column}, expected a whole number")
        if (total := sum(map(exactly, self.shares.values()))) > 1:
            raise ConfigError(f"shares: {float(total):g} together, expected at most 1")

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """What the mix has of each value beside what the pool has; groups that fall short, in a warning."""
        counts = passes.work().run("counts", write_counts, [(block, self) for block in blocks])
        factors = passes.run(FACTORS, write_factors, [(counts, self)])
        num_rows = exchange.read_notes(factors.paths)["ok_rows"]
        groups = _read_groups(factors.paths)
        samples = sum(group["samples"] for group in groups)
        for group in groups:
            group["pool_share"] = group["rows"] / num_rows if num_rows else 0.0
            group["mix_share"] = group["samples"] / samples if samples else 0.0
            del group["factor"]
        if lines := [line for group in groups if (line := self._shortfall(group, num_rows))]:
            logger.warning(f"mix: {'; '.join(lines)}")
        others = num_rows - sum(group["rows"] for group in groups)
        return {"mix": {"ok_rows": num_rows, "other_rows": others, "samples": samples, "groups": groups}}

    def _shortfall(self, group: Mapping[str, Any], num_rows: int) -> str:
        if group["rows_at_cap"] < group["weighted_rows"] or not num_rows:
            return ""
        asked = float(self._samples(group["value"], num_rows))
        if group["samples"] >= asked:
            return ""
        place = f"{self.column} == {group['value']}"
        if not group["rows"]:
            return f"no row has {place}, expected {asked:,.0f} samples of it"
        positive = f" with {self.weight_by} > 0" if self.weight_by else ""
        return (
            f"{group['weighted_rows']:,} rows have {place}{positive}, at cap {self.cap:g} these are "
            f"{group['samples']:,.0f} of {asked:,.0f} samples"
        )

    def _samples(self, value: str, num_rows: int) -> Fraction:
        return exactly(self.shares[value]) * exactly(self.samples_fraction) * num_rows

    def load(self, context: LoadContext) -> Any:
        """{value: factor of its rows' `weight_by`}."""
        folder = storage.join(context.fit_path or "", FACTORS)
        groups = _read_groups([storage.join(folder, name) for name in storage.list_files(folder)])
        return {group["value"]: group["factor"] for group in groups}

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        factors = np.array([state.get(_text(value), 0.0) for value in batch.columns[self.column]])
        weights = np.ones(len(batch))
        if self.weight_by:
            found = batch.columns[self.weight_by]
            weights = rounded(weight_keys(np.array([np.nan if one is None else one for one in found], np.float64)))
        taken = (weights > 0) & (factors > 0)
        found = np.zeros(len(batch))
        found[taken] = np.minimum(factors[taken] * weights[taken], self.cap)
        return {"mix_weight": found.astype(np.float32)}


def exactly(number: float) -> Fraction:
    """The number as the decimal that it is written as: 0.1 is a tenth."""
    return Fraction(repr(number))


def _is_whole(text: str) -> bool:
    try:
        return str(int(text)) == text
    except ValueError:
        return False


def _text(value: Any) -> str | None:
    """A value of the column as a share names it: what Arrow's cast to text gives."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return None if value is None else str(value)


def weight_keys(values: np.ndarray) -> np.ndarray:
    """[n] uint32: float32 values rounded to 12 significant bits, without the bits that are then 0; 0 for no number > 0.

    Args:
        values: [n] float64.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        single = values.astype(np.float32)
    usable = np.isfinite(single) & (single > 0)
    bits = np.where(usable, single, np.float32(0)).view(np.uint32)
    return np.minimum((bits + np.uint32(1 << (DROPPED_BITS - 1))) >> np.uint32(DROPPED_BITS), np.uint32(LARGEST_KEY))


def rounded(keys: np.ndarray) -> np.ndarray:
    """[n] float64: the numbers that weight_keys stands for."""
    return (keys << np.uint32(DROPPED_BITS)).view(np.float32).astype(np.float64)


def write_counts(block: Block, stage: Mix, path: str) -> None:
    """None; writes (group, key, rows) of the block: how many rows of each group have each value of `weight_by`."""
    names = pa.array(list(stage.shares), pa.string())
    found = np.empty((0, 2), np.int64)
    ok_rows = 0
    for table in block.tables(["ok", *stage.needs]):
        table = table.filter(table["ok"])
        ok_rows += len(table)
        group = pc.index_in(table[stage.column].cast(pa.string()), value_set=names).fill_null(-1)
        group = group.to_numpy().astype(np.int64)
        keys = np.zeros(len(table), np.int64)
        if stage.weight_by:
            numbers = table[stage.weight_by].cast(pa.float64(), safe=False).fill_null(np.nan).to_numpy()
            keys = weight_keys(numbers).astype(np.int64)
        own, rows = np.unique((group << 20 | keys)[group >= 0], return_counts=True)
        found = _added(np.concatenate([found, np.stack([own, rows], axis=1)]))
    columns = {"group": found[:, 0] >> 20, "key": (found[:, 0] & 0xFFFFF).astype(np.uint32), "rows": found[:, 1]}
    exchange.write(path, columns, notes={"ok_rows": ok_rows})


def _added(counts: np.ndarray) -> np.ndarray:
    """[m, 2] of [n, 2] (what, how many): each `what` once, with the sum."""
    what, places = np.unique(counts[:, 0], return_inverse=True)
    total = np.zeros(len(what), np.int64)
    np.add.at(total, places, counts[:, 1])
    return np.stack([what, total], axis=1)


def write_factors(counts: Pass, stage: Mix, path: str) -> None:
    """None; writes a row for each share: (value, rows, weighted_rows, rows_at_cap, samples, share, factor)."""
    found = np.empty((0, 2), np.int64)
    for table in exchange.read_each(counts.paths):
        what = table["group"].to_numpy() << 20 | table["key"].to_numpy().astype(np.int64)
        found = _added(np.concatenate([found, np.stack([what, table["rows"].to_numpy()], axis=1)]))
    ok_rows = exchange.read_notes(counts.paths)["ok_rows"]
    cap = exactly(stage.cap)
    groups = []
    for number, (value, share) in enumerate(stage.shares.items()):
        own = found[found[:, 0] >> 20 == number]
        keys, rows = (own[:, 0] & 0xFFFFF).astype(np.uint32), own[:, 1]
        group = {"value": value, "share": share, "rows": int(rows.sum())}
        if not stage.weight_by:
            keys = np.full(len(keys), weight_keys(np.ones(1))[0])
        weights, rows = rounded(keys)[keys > 0], rows[keys > 0]
        factor, at_cap, samples = filled(weights, rows, stage._samples(value, ok_rows), cap)
        group |= {"weighted_rows": int(rows.sum()), "rows_at_cap": at_cap, "samples": samples, "factor": factor}
        groups.append(group)
    exchange.write(path, pa.Table.from_pylist(groups).to_pydict(), notes={"ok_rows": ok_rows})


def filled(weights: np.ndarray, rows: np.ndarray, samples: Fraction, cap: Fraction) -> tuple[float, int, float]:
    """(factor, rows at the cap, samples): with min(cap, factor x weight) each, the rows have the samples together.

    Where they can't, the factor is infinite. All sums are exact.

    Args:
        weights: [n] float64 of float32 numbers > 0, each once.
        rows: [n] how many rows have it.
    """
    num_rows = int(rows.sum())
    if samples >= cap * num_rows:
        return float("inf"), num_rows, float(cap * num_rows)
    unit = samples.denominator * cap.denominator  # everything in whole numbers of 1 / unit
    left, most = int(samples * unit), int(cap * unit)
    order = np.argsort(-weights)
    pairs = [(int(weights[at] / SMALLEST), int(rows[at])) for at in order]
    total = sum(weight * count for weight, count in pairs)
    at_cap = 0
    for weight, count in pairs:
        if left * weight <= most * total:
            break
        left, total, at_cap = left - most * count, total - weight * count, at_cap + count
    return float(Fraction(left, unit * total) / Fraction(SMALLEST)), at_cap, float(samples)


def _read_groups(paths: Sequence[str]) -> list[dict[str, Any]]:
    table = exchange.read(paths)
    assert table is not None  # a mix has a share
    return table.to_pylist()
