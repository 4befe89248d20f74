"""The profile of a pool as plain values; stages/selection/pool_profile.py writes it, and says what each of them is."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import storage
from pipeline.core.artifact import read_record
from pipeline.core.errors import WinnowError, one_line

MAX_CAPTION_CHARS = 300  # of a sample
JPEG_START = b"\xff\xd8\xff"
GOOD = ""  # the planted fault of a row without one


@dataclass(frozen=True)
class Sample:
    """A row that a page shows. `removed_by` is the first rule that removes it, empty where it is kept."""

    uid: str
    caption: str
    value: str | None  # of the column that is shown
    removed_by: str
    jpeg: bytes | None
    flagged: bool = False  # the page shows its picture blurred


@dataclass(frozen=True)
class Histogram:
    """Counts in bins of equal width, and how many numbers lie below the first and above the last."""

    start: float
    width: float
    counts: tuple[int, ...]
    below: int
    above: int


@dataclass(frozen=True)
class Numbers:
    """A column of numbers. `deciles` are the numbers of the last rows of the first nine tenths, highest first.

    `values` are (value, rows) where there are few different ones.
    """

    kind: str
    rows: int
    nulls: int
    nans: int
    infinite: int
    lowest: float | None
    highest: float | None
    mean: float | None
    deciles: tuple[float | None, ...]
    values: tuple[tuple[int, int], ...] | None
    histogram: Histogram | None


@dataclass(frozen=True)
class Values:
    """A column of texts or bools: its most frequent values with their rows, and what the others are together.

    `unsure_below` is how frequent a value can be at most that is not listed though it should be; 0: none is.
    """

    kind: str
    rows: int
    nulls: int
    values: tuple[tuple[str, int], ...]
    num_other: int
    other_rows: int
    unsure_below: int


@dataclass(frozen=True)
class Decile:
    """A tenth of the rows by a score. `faults` are the planted ones with their rows, None where truth is not known."""

    rows: int
    highest: float | None
    lowest: float | None
    faults: Mapping[str, int] | None
    samples: tuple[Sample, ...]

    @property
    def good_rows(self) -> int:
        return (self.faults or {}).get(GOOD, 0)


@dataclass(frozen=True)
class Example:
    """A group of duplicates, and some of its rows."""

    size: int
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class Duplicates:
    """What a stage found: how many groups, the rows in them, groups by size (smallest first), the largest sizes."""

    groups: int
    rows: int
    sizes: Mapping[int, int]
    largest: tuple[int, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Profile:
    """What is in a pool: see stages/selection/pool_profile.py. Mappings are by column."""

    path: str
    rows: int
    ok_rows: int
    excluded_rows: int
    flagged_rows: int
    flagged: tuple[str, ...]  # the comparisons of the config
    failed: Mapping[str, int]
    numbers: Mapping[str, Numbers]
    values: Mapping[str, Values]
    scores: Mapping[str, tuple[Decile, ...]]
    truth: Mapping[str, int] | None  # rows by planted fault
    duplicates: Mapping[str, Duplicates]
    keeps_low: frozenset[str] = frozenset()  # the scores of which strategies keep the low end


def read_profile(root: str, entry: Mapping[str, Any] | None, notes: list[str]) -> Profile | None:
    """The profile that run.json names; None, and a note that says why, where it can't be read."""
    if not entry:
        return None
    path = entry.get("path")
    if not path or entry.get("error"):
        notes.append(f"the pool's profile: {entry.get('error') or 'not done'}")
        return None
    folder = storage.join(root, path)
    try:
        if read_record(folder) is None:
            raise WinnowError(f"{path} is missing or unfinished")
        table = pq.read_table(io.BytesIO(storage.read_bytes(storage.join(folder, "samples.parquet"))))
        rows = {row["uid"]: row for row in table.to_pylist()}
        return _profile(path, storage.read_json(storage.join(folder, "profile.json")), rows, entry)
    except (OSError, WinnowError, pa.ArrowException, KeyError, IndexError, TypeError, ValueError) as reason:
        notes.append(f"the pool's profile: {one_line(reason)}")
        return None


def _profile(path: str, data: Mapping[str, Any], rows: Mapping[str, Any], entry: Mapping[str, Any]) -> Profile:
    def sample(uid: str, value: str | None = None) -> Sample:
        row = rows[uid]
        jpeg = row["thumbnail"]
        if jpeg is not None and not jpeg.startswith(JPEG_START):
            raise WinnowError(f"{path}: uid {uid}: a thumbnail is no JPEG")
        return Sample(uid, row["caption"][: MAX_CAPTION_CHARS + 1], value, "", jpeg, bool(row["flagged"]))

    def decile(found: Mapping[str, Any]) -> Decile:
        shown = tuple(sample(uid, str(value)) for uid, value in found["samples"])
        return Decile(int(found["rows"]), found["highest"], found["lowest"], found["faults"], shown)

    def duplicates(found: Mapping[str, Any]) -> Duplicates:
        examples = [Example(int(one["size"]), tuple(map(sample, one["samples"]))) for one in found["examples"]]
        sizes = {int(size): int(num) for size, num in found["sizes"].items()}
        largest = tuple(map(int, found["largest"]))
        return Duplicates(int(found["groups"]), int(found["rows"]), sizes, largest, tuple(examples))

    keeps_low = frozenset(entry.get("keeps_low") or ())

    def order(name: str) -> tuple[bool, bool, str]:  # what is called a score comes first, limits last
        return name in keeps_low, not name.endswith("score"), name

    return Profile(
        path=path,
        **{name: int(data[name]) for name in ("rows", "ok_rows", "excluded_rows", "flagged_rows")},
        flagged=tuple(map(str, entry.get("flagged") or ())),
        failed={reason: int(count) for reason, count in data["failed"].items()},
        numbers={name: _numbers(found) for name, found in data["numbers"].items()},
        values={name: _values(found) for name, found in data["values"].items()},
        scores={name: tuple(map(decile, data["scores"][name])) for name in sorted(data["scores"], key=order)},
        truth=data["truth"],
        duplicates={name: duplicates(found) for name, found in data["duplicates"].items()},
        keeps_low=keeps_low,
    )


def _numbers(found: Mapping[str, Any]) -> Numbers:
    bins = found["histogram"]
    few = found["values"]
    return Numbers(
        kind=found["type"],
        **{name: int(found[name]) for name in ("rows", "nulls", "nans", "infinite")},
        lowest=found["min"],
        highest=found["max"],
        mean=found["mean"],
        deciles=tuple(found["deciles"]),
        values=None if few is None else tuple((int(value), int(count)) for value, count in few),
        histogram=bins
        and Histogram(
            float(bins["start"]),
            float(bins["width"]),
            tuple(map(int, bins["counts"])),
            int(bins["below"]),
            int(bins["above"]),
        ),
    )


def _values(found: Mapping[str, Any]) -> Values:
    num_other, other_rows = found["other"]
    return Values(
        kind=found["type"],
        rows=int(found["rows"]),
        nulls=int(found["nulls"]),
        values=tuple((str(value), int(count)) for value, count in found["values"]),
        num_other=int(num_other),
        other_rows=int(other_rows),
        unsure_below=int(found["unsure_below"]),
    )
