"""What is in a pool: its failures, and of every column its numbers or values, in exact counts; with samples to look at.

profile.json, for example (fractions nowhere, counts everywhere):

    {"rows": 10000, "ok_rows": 9900, "excluded_rows": 0, "flagged_rows": 0, "failed": {"undecodable": 100},
     "numbers": {"clip_score": {"type": "float32", "rows": 9900, "nulls": 0, "nans": 0, "infinite": 0, "min": -0.2,
         "max": 0.4, "mean": 0.2, "deciles": [0.31, ...9], "values": null,
         "histogram": {"start": -0.2, "width": 0.015, "counts": [3, ...40], "below": 0, "above": 0}}},
     "values": {"language": {"type": "string", "rows": 9900, "nulls": 0, "values": [["en", 9000], ...], "other": [3, 9],
         "unsure_below": 0}},
     "scores": {"clip_score": [{"rows": 990, "highest": 0.4, "lowest": 0.31, "faults": {"": 950, "mismatched": 40},
         "samples": [["0c39..", "0.3513"], ...]}, ...10]},
     "truth": {"": 6000, "mismatched": 3600},
     "duplicates": {"image": {"groups": 120, "rows": 250, "sizes": {"2": 110, "3": 10}, "largest": [3, 3, 2, 2, 2],
         "examples": [{"group": "0c39..", "size": 3, "samples": ["0c39..", ...]}]}}}

Rows are those that can be chosen at all: ok and not excluded. A decile is the next tenth of the rows that have a
number, highest first, ties by uid, so the first three are the rows that `top` with fraction 0.3 keeps. samples.parquet
has caption and thumbnail of each row that is named, in SAMPLES; which rows, the hash of their uid decides. Nothing
depends on how the pool is cut into shards, or on the order of its rows.

Cost: two to four passes over the columns as a rule (ten at most, where uids share their first digits), then one more;
then captions and images of the samples: NUM_SAMPLES a decile, and a few groups of duplicates. In one process, 26 s for
a million rows of 18 columns, six of them scores, and 35 MB beyond the imports. Memory is one shard's columns, and at
most about 12 MB a column: histograms, and the numbers around its cuts. A text column also keeps the values that share
one of COUNTED_BUCKETS of NUM_BUCKETS hashes with others: of 10 million different ones, 40,000.
"""

from __future__ import annotations

import hashlib
import math
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import pool, storage
from stages.column_files import Column
from stages.exclusion import NOTHING, Exclusion, host_of
from stages.ingest.samples import EXPECTED_SHA256, FACE_BOXES, ORIGINAL_FILE, ORIGINAL_NAME
from stages.selection import uids as uid_pairs
from stages.selection.choose import Evaluation, ShardView, numbers_of
from stages.selection.exact_cut import Cuts, descending_keys, values_of_keys
from stages.selection.gallery import flagged_rows
from stages.selection.strategies import NUMERIC, Comparison, Strategy
from stages.selection.thumbnails import read_details

VERSION = 1  # bump when any output changes for the same inputs
FILE, SAMPLES_FILE = "profile.json", "samples.parquet"
NUM_DECILES = 10
NUM_SAMPLES = 6  # of a decile, and of a group of duplicates
NUM_BINS = 40
NUM_VALUES = 20  # listed; the others are counted together
MAX_FEW = 1_000  # whole numbers of at most so many values are counted by value, too
MAX_FAULTS = 50  # planted ones; a column of more values is something else
MAX_TEXT_CHARS = 200  # of a value; a longer one is cut
COLLECT_ROWS = 1 << 17  # of a column, see exact_cut.Cuts
NUM_BUCKETS, COUNTED_BUCKETS = 1 << 18, 1_000
TAIL = 40  # a histogram may leave out one in so many at each end, when the others would all be in a few bins
LARGEST_GROUPS, DRAWN_GROUPS, LARGEST_SIZES = 3, 3, 10
PROFILE_STREAM = 15  # which rows are samples
TRUTH = "truth_fault"  # the demo world's column: what was done to a row, "" for a good one
SAMPLES = pa.schema(
    [
        ("uid", pa.string()),
        ("caption", pa.string()),
        ("flagged", pa.bool_()),  # the row passes a comparison of the config's `flagged`
        ("thumbnail", pa.binary()),  # a JPEG, known faces blurred; null where the pool has no image that decodes
    ]
)
# Of the pool's own columns, those that say nothing of what is in it: names, places, and words for `error`.
NOT_DESCRIBED = {
    *("uid", "key", "image_id", "sha256", "ok", "error", "error_detail", "image_offset_bytes", "url", "exif"),
    *("status", "error_message", "width", "height", "original_width", "original_height", "final_url"),
    *(EXPECTED_SHA256, FACE_BOXES, ORIGINAL_FILE, ORIGINAL_NAME),
}
# Columns made here where no stage adds one of the name: (of which column of the pool, type).
MADE = {"caption_words": ("caption", "int32"), "caption_chars": ("caption", "int32"), "url_host": ("url", "string")}
NOT_BLANK = r"[^\x{9}-\x{d}\x{1c}-\x{20}\x{85}\x{a0}\x{1680}\x{2000}-\x{200a}\x{2028}\x{2029}\x{202f}\x{205f}\x{3000}]+"
HOST = r"^\s*[A-Za-z][A-Za-z0-9+.-]*://(?:[^/?#@]*@)?(?P<host>\[[^\]/?#]*\]|[^/?#:\s]*)"


def described(own: Mapping[str, str], added: Mapping[str, str], groups: Mapping[str, Mapping[str, str]]) -> dict:
    """{column: type} of what a profile describes, by name.

    Args:
        own, added: {column: type} of the pool's own columns, and of those of its stages.
        groups: see write_profile. What identifies a group is left out.
    """
    names = {column for columns in groups.values() for column in (columns["group"], columns["survivor"])}
    found = {column: kind for column, kind in own.items() if column not in NOT_DESCRIBED}
    found |= {column: kind for column, (source, kind) in MADE.items() if source in own}
    found |= {column: kind for column, kind in added.items() if column not in names}
    return {name: kind for name, kind in sorted(found.items()) if kind in (*NUMERIC, "string", "bool")}


def write_profile(
    pool_path: str,
    columns: Mapping[str, Column],
    types: Mapping[str, str],
    scores: Sequence[str],
    groups: Mapping[str, Mapping[str, str]],
    out_path: str,
    exclude: Exclusion = NOTHING,
    flagged: Sequence[Comparison] = (),
) -> dict[str, Any]:
    """Facts of the profile, {columns, scores, samples, pictures, flagged}; its two files are there when this returns.

    Args:
        columns: {name in the config: where it is stored} of the stages' columns; the pool's own need no entry.
        types: see described.
        scores: the numeric columns of which deciles are shown.
        groups: {name: {"group", "size", "survivor": column}} of stages that find groups of duplicates.
        flagged: see gallery.write_gallery.
    """
    evaluation = Evaluation(pool_path, columns, {"": Strategy("", ())}, "", exclude)
    made = {name: source for name, (source, _) in MADE.items() if name in types and name not in columns}
    counted = _Rows()
    numbers = {name: _Numbers(name, name in scores) for name, kind in types.items() if kind in NUMERIC}
    values = {name: _Values(name) for name, kind in types.items() if kind not in NUMERIC}
    duplicates = {name: _Groups(found["group"], found["size"]) for name, found in sorted(groups.items())}
    todo: list[Any] = [counted, *numbers.values(), *values.values(), *duplicates.values()]
    while todo:
        _pass(evaluation, made, todo)
        for part in todo:
            part.end_pass()
        todo = [part for part in todo if not part.done]

    has_truth = TRUTH in values and 0 < values[TRUTH].num_values <= MAX_FAULTS
    histograms = {name: _Histogram(name, part) for name, part in numbers.items()}
    deciles = {name: _Deciles(name, numbers[name], has_truth) for name in sorted(scores)}
    members = {name: _Members(part) for name, part in duplicates.items()}
    flags = _Flagged(flagged)
    _pass(evaluation, made, [*histograms.values(), *deciles.values(), *members.values(), flags])

    places = {uid: place for part in (*deciles.values(), *members.values()) for uid, place in part.places.items()}
    facts = _write_samples(evaluation, places, flagged, storage.join(out_path, SAMPLES_FILE))
    found = {
        **counted.to_json(),
        "flagged_rows": flags.num_rows,
        "numbers": {name: part.to_json(types[name], histograms[name]) for name, part in numbers.items()},
        "values": {name: part.to_json(types[name]) for name, part in values.items()},
        "scores": {name: part.to_json() for name, part in deciles.items()},
        "truth": dict(values[TRUTH].listed(MAX_FAULTS)) if has_truth else None,
        "duplicates": {name: part.to_json(members[name]) for name, part in duplicates.items()},
    }
    storage.write_json(storage.join(out_path, FILE), found)
    return {"columns": len(types), "scores": len(deciles), **facts}


class _Shard:
    """The rows of one shard that can be chosen at all, by column."""

    def __init__(self, view: ShardView, number: int, made: Mapping[str, str]):
        self.view = view
        self.number = number
        self.rows = np.flatnonzero(view.base)
        self._made = made
        self._columns: dict[str, pa.Array] = {}
        self._uids: np.ndarray | None = None

    def column(self, name: str) -> pa.Array:
        """[n] the column's values in these rows."""
        if name not in self._columns:
            whole = self.view.column(self._made.get(name, name))
            column = whole if len(self.rows) == len(whole) else whole.take(pa.array(self.rows))
            self._columns[name] = _make(name, column) if name in self._made else column
        return self._columns[name]

    @property
    def uids(self) -> np.ndarray:
        """[n, 2] uint64."""
        if self._uids is None:
            self._uids = self.view.uids[self.rows]
        return self._uids


def _pass(evaluation: Evaluation, made: Mapping[str, str], parts: Iterable[Any]) -> None:
    for number, view in enumerate(evaluation.views()):
        shard = _Shard(view, number, made)
        for part in parts:
            part.add(shard)


def _make(name: str, column: pa.Array) -> pa.Array:
    """One of MADE: words are those of str.split, hosts those of exclusion.host_of."""
    if name == "caption_words":
        return pc.count_substring_regex(column, NOT_BLANK)
    if name == "caption_chars":
        return pc.utf8_length(column)
    hosts = pc.struct_field(pc.extract_regex(column, HOST), "host").dictionary_encode()
    known = pa.array([host_of(f"//{host}") or None for host in hosts.dictionary.to_pylist()], pa.string())
    return known.take(hosts.indices)


class _Rows:
    """How many rows there are, and what the failed ones failed at."""

    def __init__(self) -> None:
        self.done = False
        self._counts = Counter[str]()
        self._failed = Counter[str]()

    def add(self, shard: _Shard) -> None:
        view = shard.view
        ok_rows = int(view.ok.sum())
        self._counts.update(rows=view.shard.rows, ok_rows=ok_rows, excluded_rows=ok_rows - len(shard.rows))
        errors = view.column("error").filter(pa.array(~view.ok)).fill_null("unknown")
        self._failed.update({entry["values"]: entry["counts"] for entry in errors.value_counts().to_pylist()})

    def end_pass(self) -> None:
        self.done = True

    def to_json(self) -> dict[str, Any]:
        counts = {name: self._counts[name] for name in ("rows", "ok_rows", "excluded_rows")}
        return {**counts, "failed": dict(sorted(self._failed.items()))}


class _Numbers:
    """A column of numbers: counts, range, mean, and the cuts between its deciles. Infinite ones are in these alone."""

    def __init__(self, name: str, is_score: bool):
        self.name = name
        self.dtype = np.dtype(np.float32)  # known after the first pass
        self.num_rows = self.num_nulls = self.num_nans = self.num_infinite = 0
        self.lowest: Any = None
        self.highest: Any = None
        self.cuts: Cuts | None = None
        self._is_score = is_score
        self._is_first = True
        self._sum = Fraction()
        self._few: Counter[int] | None = Counter()

    @property
    def done(self) -> bool:
        return self.cuts is None or self.cuts.done

    def add(self, shard: _Shard) -> None:
        column = shard.column(self.name)
        numbers, valid = numbers_of(column)
        numbers = numbers[valid]
        if self._is_first:
            self._describe(column, numbers)
        if self.cuts is None:
            bits = min(64, 8 * self.dtype.itemsize)
            self.cuts = Cuts(cut_ranks, (bits, 64, 64) if self._is_score else (bits,), COLLECT_ROWS)
        words = [self.words(numbers)]
        if self.cuts.num_words > 1:
            uids = shard.uids[valid]
            words += [np.ascontiguousarray(uids[:, 0]), np.ascontiguousarray(uids[:, 1])]
        self.cuts.add(*words)

    def words(self, numbers: np.ndarray) -> np.ndarray:
        """[n] uint64 keys that ascend as the numbers descend, in as many bits as these have."""
        return descending_keys(numbers) >> np.uint64(64 - 8 * numbers.dtype.itemsize)

    def numbers(self, words: Sequence[int]) -> np.ndarray:
        """What `words` were made of."""
        keys = np.array(words, np.uint64) << np.uint64(64 - 8 * self.dtype.itemsize)
        return values_of_keys(keys, self.dtype)

    def _describe(self, column: pa.Array, numbers: np.ndarray) -> None:
        self.dtype = numbers.dtype
        self.num_rows += len(column)
        self.num_nulls += column.null_count
        self.num_nans += len(column) - column.null_count - len(numbers)
        finite = numbers[np.isfinite(numbers)] if self.dtype.kind == "f" else numbers
        self.num_infinite += len(numbers) - len(finite)
        if len(finite):
            low, high = finite.min(), finite.max()
            self.lowest = low if self.lowest is None else min(low, self.lowest)
            self.highest = high if self.highest is None else max(high, self.highest)
            self._sum += _exact_sum(finite)
        if self.dtype.kind == "f":
            self._few = None
        elif self._few is not None:
            for value, count in zip(*(part.tolist() for part in np.unique(numbers, return_counts=True)), strict=True):
                self._few[value] += count
            if len(self._few) > MAX_FEW:
                self._few = None

    def end_pass(self) -> None:
        self._is_first = False
        if self.cuts is not None:
            self.cuts.end_pass()

    @property
    def num_numbers(self) -> int:
        return self.cuts.num_keys if self.cuts is not None else 0

    def at(self, rank: int) -> Any:
        """The number of this rank, 1 for the highest; one of cut_ranks."""
        assert self.cuts is not None
        return self.numbers([self.cuts.found[rank].key])[0]

    def to_json(self, kind: str, histogram: _Histogram) -> dict[str, Any]:
        num_finite = self.num_numbers - self.num_infinite
        few = self._few if self._few and len(self._few) <= NUM_VALUES else None
        return {
            "type": kind,
            "rows": self.num_rows,
            "nulls": self.num_nulls,
            "nans": self.num_nans,
            "infinite": self.num_infinite,
            "min": _number(self.lowest),
            "max": _number(self.highest),
            "mean": float(self._sum / num_finite) if num_finite else None,
            "deciles": [_number(self.at(rank)) if rank else None for rank in decile_ranks(self.num_numbers)],
            "values": None if few is None else [[value, few[value]] for value in sorted(few)],
            "histogram": histogram.to_json(),
        }


def decile_ranks(num: int) -> list[int]:
    """The ranks of the last rows of the first nine deciles, 1 for the highest; 0: no row is in them yet."""
    return [num * decile // NUM_DECILES for decile in range(1, NUM_DECILES)]


def cut_ranks(num: int) -> set[int]:
    """decile_ranks, and the ranks between which a histogram may be drawn."""
    return ({*decile_ranks(num), max(1, num // TAIL), num - num // TAIL} if num else set()) - {0}


def _exact_sum(numbers: np.ndarray) -> Fraction:
    """The sum without rounding, so that no order of rows changes it. Finite numbers, at most a shard's."""
    if numbers.dtype.kind != "f":
        whole = numbers.astype(np.int64)
        return Fraction((int((whole >> 32).sum()) << 32) + int((whole & 0xFFFFFFFF).sum()))
    mantissa, exponent = np.frexp(numbers.astype(np.float64))
    whole = np.ldexp(mantissa, 53).astype(np.int64)
    offset = int(exponent.min())
    high = np.bincount(exponent - offset, weights=whole >> 27)  # exact: below 2**53 for 2**26 rows
    low = np.bincount(exponent - offset, weights=whole & ((1 << 27) - 1))
    total = Fraction()
    for place in np.flatnonzero((high != 0) | (low != 0)).tolist():
        total += Fraction((int(high[place]) << 27) + int(low[place])) * Fraction(2) ** (place + offset - 53)
    return total


def _number(value: Any) -> int | float | None:
    """The number as JSON has it, with as many digits as its type needs; None for none or an infinite one."""
    if value is None or not np.isfinite(value):
        return None
    return int(value) if value.dtype.kind != "f" else float(str(value))


class _Histogram:
    """Counts in NUM_BINS equal bins from the lowest to the highest number; of whole numbers, bins of whole width.

    Where the middle 95 % would fill less than a third of the bins, these are over the middle 95 % alone.
    """

    def __init__(self, name: str, part: _Numbers):
        self.name = name
        self.counts: np.ndarray | None = None
        self.below = self.above = 0
        if part.lowest is None:
            return
        low, high = part.lowest.item(), part.highest.item()
        top, bottom = (part.at(rank).item() for rank in (max(1, part.num_numbers // TAIL), _bottom_rank(part)))
        if bottom < top and high - low > 3 * (top - bottom) and math.isfinite(top - bottom):
            low, high = bottom, top
        if not math.isfinite(high - low):
            return
        self.low, self.high = low, high
        if part.dtype.kind == "f":
            self.width = (high - low) / NUM_BINS
        else:
            self.width = -(-(high - low + 1) // NUM_BINS)
        num_bins = NUM_BINS if part.dtype.kind == "f" else -(-(high - low + 1) // self.width)
        self.counts = np.zeros(num_bins if self.width else 1, np.int64)

    def add(self, shard: _Shard) -> None:
        if self.counts is None:
            return
        numbers, valid = numbers_of(shard.column(self.name))
        numbers = numbers[valid].astype(np.float64 if numbers.dtype.kind == "f" else np.int64)
        self.below += int((numbers < self.low).sum())
        self.above += int((numbers > self.high).sum())
        numbers = numbers[(numbers >= self.low) & (numbers <= self.high)]
        if self.width:
            places = (
                (numbers - self.low) / self.width if numbers.dtype.kind == "f" else (numbers - self.low) // self.width
            )
            places = np.minimum(places.astype(np.int64), len(self.counts) - 1)
        else:
            places = np.zeros(len(numbers), np.int64)
        self.counts += np.bincount(places, minlength=len(self.counts))

    def to_json(self) -> dict[str, Any] | None:
        if self.counts is None:
            return None
        start = {"start": self.low, "width": self.width}
        return {**start, "counts": self.counts.tolist(), "below": self.below, "above": self.above}


def _bottom_rank(part: _Numbers) -> int:
    return part.num_numbers - part.num_numbers // TAIL


class _Values:
    """The most frequent values of a column of texts or bools, counted exactly.

    Values are hashed to buckets, and those of the fullest buckets are counted one by one in a second pass. So a value
    that is not counted is no more frequent than the fullest bucket that was left out.
    """

    def __init__(self, name: str):
        self.name = name
        self.done = False
        self.num_rows = self.num_nulls = 0
        self._buckets = np.zeros(NUM_BUCKETS, np.int64)
        self._counted: np.ndarray | None = None  # [NUM_BUCKETS] bool
        self._counts = Counter[str]()

    def add(self, shard: _Shard) -> None:
        column = shard.column(self.name)
        if pa.types.is_boolean(column.type):
            column = column.cast(pa.string())
        encoded = column.dictionary_encode()
        values = encoded.dictionary.cast(pa.binary()).to_pylist()
        counts = np.bincount(np.asarray(encoded.indices.drop_null()), minlength=len(values))
        buckets = np.array([zlib.crc32(value) % NUM_BUCKETS for value in values], np.int64)
        if self._counted is None:
            self.num_rows += len(column)
            self.num_nulls += column.null_count
            np.add.at(self._buckets, buckets, counts)
            return
        for place in np.flatnonzero(self._counted[buckets]).tolist():
            self._counts[_text(values[place])] += int(counts[place])

    def end_pass(self) -> None:
        if self._counted is not None:
            self.done = True
            return
        order = np.lexsort((np.arange(NUM_BUCKETS), -self._buckets))
        chosen = order[: min(COUNTED_BUCKETS, int((self._buckets > 0).sum()))]
        self._counted = np.zeros(NUM_BUCKETS, bool)
        self._counted[chosen] = True

    @property
    def num_values(self) -> int:
        """How many different values there are, where few; otherwise about how many, by the share of buckets in use.

        The estimate is linear counting (Whang, Vander-Zanden and Taylor, 1990).
        """
        filled = int((self._buckets > 0).sum())
        if filled <= COUNTED_BUCKETS:
            return len(self._counts)
        return round(-NUM_BUCKETS * math.log(max(1, NUM_BUCKETS - filled) / NUM_BUCKETS))

    @property
    def unsure_below(self) -> int:
        """A value that is not listed is at most so frequent; 0 where every value was counted."""
        assert self._counted is not None
        return int(self._buckets[~self._counted].max())

    def listed(self, most: int) -> list[tuple[str, int]]:
        """The most frequent values and their rows, ties by value."""
        return sorted(self._counts.items(), key=lambda entry: (-entry[1], entry[0]))[:most]

    def to_json(self, kind: str) -> dict[str, Any]:
        listed = self.listed(NUM_VALUES)
        rest = self.num_rows - self.num_nulls - sum(count for _, count in listed)
        return {
            "type": kind,
            "rows": self.num_rows,
            "nulls": self.num_nulls,
            "values": [list(entry) for entry in listed],
            "other": [max(0, self.num_values - len(listed)), rest],
            "unsure_below": self.unsure_below,
        }


def _text(value: bytes) -> str:
    text = value.decode("utf-8", "replace")
    if len(text) <= MAX_TEXT_CHARS:
        return text
    return f"{text[:MAX_TEXT_CHARS]}… [{hashlib.sha256(value).hexdigest()[:8]}]"  # others may start the same


class _Drawn:
    """The rows of smallest rank, at most `most`: [n, 3] uint64 (rank, uid high, uid low), and where each is."""

    def __init__(self, most: int):
        self.most = most
        self.order = np.empty((0, 3), np.uint64)
        self.places: list[tuple[int, int]] = []
        self.notes: list[str] = []

    def add(self, rank: np.ndarray, uids: np.ndarray, places: Sequence[tuple[int, int]], notes: Sequence[str]) -> None:
        order = np.concatenate([self.order, np.column_stack([rank, uids])])
        first = np.lexsort(order.T[::-1])[: self.most]
        places, notes = [*self.places, *places], [*self.notes, *notes]
        self.order, self.places, self.notes = order[first], [places[i] for i in first], [notes[i] for i in first]

    @property
    def uids(self) -> list[str]:
        return uid_pairs.text(self.order[:, 1:]).to_pylist()


class _Deciles:
    """The ten deciles of a score: rows, range, planted faults, and samples."""

    def __init__(self, name: str, part: _Numbers, has_truth: bool):
        self.name = name
        self._part = part
        ranks = decile_ranks(part.num_numbers)
        found = part.cuts.found if part.cuts is not None else {}
        self._ends = [found[rank].words if rank else None for rank in ranks]
        self._rows = np.zeros(NUM_DECILES, np.int64)
        self._range: list[list[int]] = [[] for _ in range(NUM_DECILES)]  # words of the highest and the lowest number
        self._faults = [Counter[str]() for _ in range(NUM_DECILES)] if has_truth else None
        self._drawn = [_Drawn(NUM_SAMPLES) for _ in range(NUM_DECILES)]

    def add(self, shard: _Shard) -> None:
        numbers, valid = numbers_of(shard.column(self.name))
        rows = np.flatnonzero(valid)
        numbers = numbers[rows]
        words = self._part.words(numbers)
        decile = self._decile(words, shard.uids, rows)
        self._rows += np.bincount(decile, minlength=NUM_DECILES)
        if self._faults is not None:
            faults = shard.column(TRUTH).take(pa.array(rows)).fill_null("").dictionary_encode()
            names = faults.dictionary.to_pylist()
            both = np.bincount(decile * len(names) + np.asarray(faults.indices), minlength=NUM_DECILES * len(names))
            for number, counts in enumerate(both.reshape(NUM_DECILES, -1).tolist()):
                self._faults[number].update({name: n for name, n in zip(names, counts, strict=True) if n})
        hashes = uid_pairs.hash64(shard.uids[rows], 0, PROFILE_STREAM)
        for number, drawn in enumerate(self._drawn):
            inside = decile == number
            if not inside.any():
                continue
            own = self._range[number]
            self._range[number] = [
                min([*own[:1], int(words[inside].min())]),
                max([*own[1:], int(words[inside].max())]),
            ]
            if len(drawn.places) == NUM_SAMPLES:
                inside &= hashes <= drawn.order[-1, 0]
            (near,) = np.nonzero(inside)
            if len(near) > NUM_SAMPLES:
                near = near[hashes[near] <= np.partition(hashes[near], NUM_SAMPLES - 1)[NUM_SAMPLES - 1]]
            places = [(shard.number, row) for row in shard.rows[rows[near]].tolist()]
            drawn.add(hashes[near], shard.uids[rows[near]], places, [str(value) for value in numbers[near]])

    def _decile(self, words: np.ndarray, uids: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """[n] int64: how many deciles end before each row, in the order of number, then uid."""
        found = np.zeros(len(words), np.int64)
        for end in self._ends:
            if end is None:
                found += 1
                continue
            word, high, low = (np.uint64(value) for value in end)
            found += words > word
            tied = np.flatnonzero(words == word)
            if len(tied):
                own = uids[rows[tied]]
                found[tied] += (own[:, 0] > high) | ((own[:, 0] == high) & (own[:, 1] > low))
        return found

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        return {uid: place for drawn in self._drawn for uid, place in zip(drawn.uids, drawn.places, strict=True)}

    def to_json(self) -> list[dict[str, Any]]:
        found = []
        for number, drawn in enumerate(self._drawn):
            ends = [_number(value) for value in self._part.numbers(self._range[number])] or [None, None]
            faults = None if self._faults is None else dict(sorted(self._faults[number].items()))
            samples = [list(pair) for pair in zip(drawn.uids, drawn.notes, strict=True)]
            entry = {"rows": int(self._rows[number]), "highest": ends[0], "lowest": ends[1]}
            found.append({**entry, "faults": faults, "samples": samples})
        return found


class _Groups:
    """Groups of duplicates by their first rows: a group is called by the lowest uid in it."""

    def __init__(self, group: str, size: str):
        self.group = group
        self.done = False
        self.num_rows = 0
        self._size = size
        self._sizes = Counter[int]()
        self._largest = _Drawn(LARGEST_GROUPS)
        self._drawn = _Drawn(DRAWN_GROUPS)

    def add(self, shard: _Shard) -> None:
        groups = shard.column(self.group)
        self.num_rows += len(groups) - groups.null_count
        (heads,) = np.nonzero(np.asarray(pc.equal(groups, shard.column("uid")).fill_null(False)))
        sizes = shard.column(self._size).take(pa.array(heads)).to_numpy(zero_copy_only=False).astype(np.int64)
        self._sizes.update(sizes.tolist())
        if len(heads):
            uids = shard.uids[heads]
            places = [(shard.number, row) for row in shard.rows[heads].tolist()]
            notes = [str(size) for size in sizes.tolist()]
            self._largest.add(descending_keys(sizes), uids, places, notes)
            self._drawn.add(uid_pairs.hash64(uids, 0, PROFILE_STREAM), uids, places, notes)

    def end_pass(self) -> None:
        self.done = True

    @property
    def examples(self) -> dict[str, int]:
        """{group: size}: the largest, and some at random."""
        pairs = (
            (uid, int(size))
            for part in (self._largest, self._drawn)
            for uid, size in zip(part.uids, part.notes, strict=True)
        )
        return dict(pairs)

    def to_json(self, members: _Members) -> dict[str, Any]:
        largest: list[int] = []
        for size in sorted(self._sizes, reverse=True):
            largest += [size] * min(self._sizes[size], LARGEST_SIZES - len(largest))
        return {
            "groups": self._sizes.total(),
            "rows": self.num_rows,
            "sizes": {str(size): self._sizes[size] for size in sorted(self._sizes)[:NUM_VALUES]},
            "largest": largest,
            "examples": [
                {"group": group, "size": size, "samples": members.drawn[group].uids}
                for group, size in self.examples.items()
            ],
        }


class _Members:
    """The rows of the groups that are shown, those of lowest uid first."""

    def __init__(self, groups: _Groups):
        self._column = groups.group
        self.drawn = {group: _Drawn(NUM_SAMPLES) for group in groups.examples}

    def add(self, shard: _Shard) -> None:
        if not self.drawn:
            return
        names = list(self.drawn)
        indices = pc.index_in(shard.column(self._column), value_set=pa.array(names, pa.string()))
        if indices.null_count == len(indices):
            return
        number = np.asarray(indices.fill_null(-1))
        for index in np.unique(number[number >= 0]).tolist():
            (rows,) = np.nonzero(number == index)
            rows = rows[np.lexsort(shard.uids[rows].T[::-1])[:NUM_SAMPLES]]
            places = [(shard.number, row) for row in shard.rows[rows].tolist()]
            self.drawn[names[index]].add(np.zeros(len(rows), np.uint64), shard.uids[rows], places, [""] * len(rows))

    @property
    def places(self) -> dict[str, tuple[int, int]]:
        return {uid: place for part in self.drawn.values() for uid, place in zip(part.uids, part.places, strict=True)}


class _Flagged:
    """How many rows pass a comparison of `flagged`."""

    def __init__(self, flagged: Sequence[Comparison]):
        self.num_rows = 0
        self._flagged = flagged

    def add(self, shard: _Shard) -> None:
        self.num_rows += int(flagged_rows(shard.view, self._flagged)[shard.rows].sum())


def _write_samples(
    evaluation: Evaluation, places: Mapping[str, tuple[int, int]], flagged: Sequence[Comparison], path: str
) -> dict[str, int]:
    """{samples, pictures, flagged}; the file of the samples is there when this returns, by uid."""
    names = [shard.name for shard in evaluation.shards]
    details = read_details(evaluation.pool_path, names, places.values())
    marked: set[tuple[int, int]] = set()
    wanted = {number for number, _ in places.values()} if flagged else set()
    for number in sorted(wanted):
        view = ShardView(evaluation, evaluation.shards[number])
        marked |= {(number, row) for row in np.flatnonzero(flagged_rows(view, flagged)).tolist()}
        view.close()
    entries = [{"uid": uid, "flagged": place in marked, **details[place]} for uid, place in sorted(places.items())]
    table = pa.Table.from_pylist(entries, schema=SAMPLES)
    storage.write_bytes(path, pool.table_bytes(table))
    pictures = len(entries) - table["thumbnail"].null_count
    return {"samples": len(entries), "pictures": pictures, "flagged": sum(entry["flagged"] for entry in entries)}
