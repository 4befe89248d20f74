"""Reads tables of URLs and captions: parquet (DataComp, LAION), csv, tsv, json (a list) and jsonl, these also as .gz.

    uid,url,text,original_width,original_height,sha256,face_bboxes           tables with named columns
    a cat on a mat<TAB>http://example.org/cat.jpg                            CC3M, CC12M: no header; columns 0 and 1

One sample a row and caption, without an image, in the file's order; rows that can't be read are failed rows. A tsv
has no quotes. DataComp's features (`x.npz` beside `x.parquet`: row i belongs to row i) are read as vectors where
`carry` names one of their keys.

Cost: a parquet file is cut into ranges of rows, and a range in the middle of a row group costs the decoding of the
rows before it (0.3 to 0.5 microseconds each). Where all of a batch's rows are usable they are read as columns, in a
few microseconds a row, and else one by one, in some tens. Features are inflated from the array's start,
so a worker keeps its place in an array for the next range. Planning reads csv, tsv and jsonl once, to cut them at rows;
a range of a .gz costs the inflating of what is before it. A json is one unit: every shard made of it reads it from its
start. Memory: one batch of rows, and one line or object of text.
"""

from __future__ import annotations

import atexit
import codecs
import contextlib
import csv
import functools
import gzip
import io
import json
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.core import storage
from pipeline.core.errors import ConfigError, WinnowError
from stages.ingest import parquet_rows
from stages.ingest.samples import (
    CARRIED_TYPES,
    EXPECTED_SHA256,
    FACE_BOXES,
    MAX_CAPTION_BYTES,
    ORIGINAL_FILE,
    ORIGINAL_NAME,
    Sample,
    Settings,
    Unit,
    UnreadableError,
    Watched,
    extension,
    packed,
    parse_json,
    with_captions,
    with_metadata,
)
from stages.tensor_files import UNREADABLE

URL_COLUMNS = ("URL", "url", "image_url", "image_link", "img_url", "src")  # looked for when none is named
CAPTION_COLUMNS = ("text", "TEXT", "caption", "alt_text", "alt", "title")
SHA256_COLUMN = "sha256"
FACE_BOXES_COLUMN = "face_bboxes"
TEXT_KINDS = ("csv", "tsv", "json", "jsonl")
VECTOR = "float16[]"
URL = re.compile(r"\s*https?://", re.IGNORECASE)
ROWS_PER_BATCH = 4096
BUFFER_BYTES = 1 << 20
MAX_LINE_BYTES = 16 << 20  # of a line, or of one object in a json list
MAX_RECORD_LINES = 1000  # of one quoted row of a csv
MAX_VECTOR_VALUES = 1 << 16
ROWS_FOR_NAMES = 1000  # objects of a json or jsonl whose keys count as the table's columns

# A row as found: (where it stands, its values) or (where it stands, why it can't be read).
Row = tuple[str, "Mapping[str, Any] | str"]


def kind_of(name: str) -> str | None:
    """What the file is by its name: parquet, csv, tsv, json or jsonl (.gz or not); None for no table."""
    kind = extension(name)
    if kind == "gz":
        kind = extension(name[:-3])
        return kind if kind in TEXT_KINDS else None
    return kind if kind == "parquet" or kind in TEXT_KINDS else None


def features_path(path: str) -> str:
    """Where the features of a parquet file lie, if there are any."""
    return f"{path.rpartition('.')[0]}.npz"


def has_urls(schema: pa.Schema) -> bool:
    """True when the parquet file has a column of URLs and none with the bytes of images."""
    for name in set(parquet_rows.IMAGE_COLUMNS) & set(schema.names):
        kind = schema.field(name).type
        if pa.types.is_struct(kind) or parquet_rows.is_bytes(kind):
            return False
    return bool(set(URL_COLUMNS) & set(schema.names))


def resolved(settings: Settings, path: str, place: str) -> Settings:
    """The settings with the columns found. Reads a footer, or the first rows of a text table.

    Raises:
        ConfigError: a column that is not there, or of another type: names what columns there are.
        UnreadableError: no readable table.
    """
    kind = kind_of(path)
    if kind == "parquet":
        with parquet_rows.opened(path) as (file, _):
            schema, num_rows = file.schema_arrow, file.metadata.num_rows
        there = list(schema.names)
    else:
        there, guessed = _text_columns(path, settings)
        settings = replace(
            settings,
            url_column=settings.url_column or guessed.get("url"),
            caption_column=settings.caption_column or guessed.get("caption"),
        )
    for setting, named in (("uid_column", settings.uid_column), ("sha256_column", settings.sha256_column)):
        if named is not None:
            parquet_rows.found_column(setting, named, (), there, place)
    boxes, sha256 = settings.face_boxes_column, settings.sha256_column
    if boxes is not None:
        parquet_rows.found_column("face_boxes_column", boxes, (), there, place)
    settings = replace(
        settings,
        url_column=parquet_rows.found_column("url_column", settings.url_column, URL_COLUMNS, there, place),
        caption_column=parquet_rows.found_column(
            "caption_column", settings.caption_column, CAPTION_COLUMNS, there, place
        ),
        sha256_column=sha256 or (SHA256_COLUMN if SHA256_COLUMN in there else None),
        face_boxes_column=boxes or (FACE_BOXES_COLUMN if FACE_BOXES_COLUMN in there else None),
    )
    for column, wanted in settings.carry.items():
        if column not in there and column != ORIGINAL_NAME:
            if kind != "parquet" or wanted != VECTOR:
                raise ConfigError(f"{place}: no column {column}, expected one of {parquet_rows.listed(there)}")
            _check_features(path, column, num_rows, there, place)
        elif wanted == VECTOR and kind in ("csv", "tsv"):
            raise ConfigError(f"{place}: carry.{column} = {VECTOR}, expected another type: a {kind} has no vectors")
    if kind == "parquet":
        _check_types(settings, schema, place)
    return settings


def units(name: str, settings: Settings, place: str, path: str, shard_size: int, unsafe: str = "") -> list[Unit]:
    """What tasks read of one file: ranges of at most `shard_size` rows; a json is read whole.

    Args:
        settings: with the columns found.
        unsafe: why the file is never opened: a link that leads elsewhere.
    """
    if unsafe:
        return [Unit(name, settings, place, path, extra=("unsafe_file", unsafe))]
    kind = kind_of(path)
    try:
        if kind not in ("json", "jsonl"):  # whose rows may each have other keys
            resolved(settings, path, place)
        if kind != "parquet":
            return _text_units(name, settings, place, path, shard_size)
        with parquet_rows.opened(path) as (file, _):
            sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    except UnreadableError as error:
        return [Unit(name, settings, place, path, extra=("bad_table", str(error)))]
    found: list[Unit] = []
    first = 0
    for start, stop in packed(sizes, shard_size):
        size = sum(sizes[start:stop])
        cuts = range(first, first + size, shard_size)
        found += [Unit(name, settings, place, path, cut, min(cut + shard_size, first + size)) for cut in cuts]
        first += size
    return found


def read(unit: Unit, vectors: bool = True) -> Iterator[Sample]:
    """One sample a row and caption, in the file's order.

    Args:
        vectors: False leaves carried vectors out: much quicker where there are features.
    """
    if isinstance(unit.extra, tuple):  # why the file can't be read at all
        yield Sample("").failed(*unit.extra)
        return
    settings = unit.settings
    if not vectors:
        carry = {column: kind for column, kind in settings.carry.items() if kind != VECTOR}
        settings = replace(settings, carry=carry)
    if kind_of(unit.path) != "parquet":
        yield from _samples(_text_rows(unit, settings), settings)
        return
    for part in _parts(unit, settings):
        yield from _samples(_part_rows(part), settings)


@dataclass(frozen=True)
class Piece:
    """Some consecutive samples: `columns` are those of the pool that they decide, where all are usable, else None."""

    columns: pa.Table | None
    samples: Callable[[], list[Sample]]


def read_pieces(unit: Unit) -> Iterator[Piece]:
    """What `read` gives, in pieces of at most some thousand rows."""
    if isinstance(unit.extra, tuple) or kind_of(unit.path) != "parquet":
        samples = read(unit)
        while some := list(islice(samples, ROWS_PER_BATCH)):
            yield Piece(None, functools.partial(list, some))
        return
    for part in _parts(unit, unit.settings):

        def one_by_one(part: _Part = part) -> list[Sample]:
            return list(_samples(_part_rows(part), unit.settings))

        yield Piece(_usable_columns(part, unit.settings), one_by_one)


def given_uids(unit: Unit) -> np.ndarray | None:
    """[rows] S16: the uids that the table gives, or None where that takes a look at whole rows."""
    if isinstance(unit.extra, tuple) or kind_of(unit.path) != "parquet":
        return None
    settings = replace(unit.settings, carry={}, url_column=None, sha256_column=None, face_boxes_column=None)
    found = []
    for part in _parts(unit, settings):
        try:
            if part.batch is None or not _is_text(part.batch.column(settings.caption_column or "").type):
                return None  # broken, or a list of captions, which is several samples
            found.append(_hex_bytes(_text_column(part.batch, settings.uid_column or "uid")))
        except UNUSUAL:
            return None
    return np.concatenate(found) if found else np.empty(0, "S16")


def _samples(rows: Iterable[Row], settings: Settings) -> Iterator[Sample]:
    url_column, caption_column = settings.url_column or "", settings.caption_column or ""
    empty = Sample("")
    for key, values in rows:
        sample = empty.having(key=key)
        if isinstance(values, str):
            yield sample.failed("bad_table", values)
            continue
        url = values.get(url_column)
        if not isinstance(url, (str, bytes)) or not url.strip():
            found = "no URL" if url is None else "a blank URL" if isinstance(url, (str, bytes)) else f"{url!r:.80}"
            sample = sample.failed("missing_url", f"{found} in {url_column}")
        yield from with_captions(with_metadata(sample, settings, values), values.get(caption_column))


# Parquet.


@dataclass(frozen=True)
class _Part:
    """Rows of a parquet file from row `first` on: the table's columns and the features, or why they can't be read."""

    first: int
    num_rows: int
    batch: pa.RecordBatch | None
    vectors: Mapping[str, np.ndarray]
    problem: str = ""


def _parts(unit: Unit, settings: Settings) -> Iterator[_Part]:
    """The unit's rows in their order, at most ROWS_PER_BATCH at once where they can be read."""
    named = [settings.url_column, settings.caption_column, settings.uid_column or "uid"]
    named += [settings.sha256_column, settings.face_boxes_column, "original_width", "original_height", *settings.carry]
    with parquet_rows.opened(unit.path) as (whole, watched):
        # Buffered: pages are read as they are needed, and not a row group's whole columns.
        file = pq.ParquetFile(watched, metadata=whole.metadata, buffer_size=BUFFER_BYTES, pre_buffer=False)
        names = file.schema_arrow.names
        columns = [name for name in dict.fromkeys(named) if name in names]
        features = [name for name, kind in settings.carry.items() if kind == VECTOR and name not in names]
        npz = features_path(unit.path)
        first = 0
        for group in range(file.metadata.num_row_groups):
            size = file.metadata.row_group(group).num_rows
            start, stop = max(unit.start, first), min(unit.stop, first + size)
            done = start
            problem = "the row group ends early"
            try:
                for row, batch in _batches(file, group, columns, start - first, stop - first):
                    vectors = {key: _vectors(npz, key, first + row, len(batch)) for key in features}
                    yield _Part(done, len(batch), batch, vectors)
                    done += len(batch)
            except (pa.ArrowException, OSError, ValueError) as error:
                watched.reraise()
                problem = f"can't be read: {error}"
            if done < stop:
                yield _Part(done, stop - done, None, {}, problem)
            first += size


def _part_rows(part: _Part) -> Iterator[Row]:
    problem = part.problem
    if part.batch is not None:
        try:
            lists = [_values(column) for column in part.batch.columns] + list(part.vectors.values())
        except (pa.ArrowException, OSError, ValueError) as error:
            problem = f"can't be read: {error}"
        else:
            keys = [*part.batch.schema.names, *part.vectors]
            for row, values in enumerate(zip(*lists, strict=True), part.first):
                yield f"row {row}", dict(zip(keys, values, strict=True))
            return
    for row in range(part.first, part.first + part.num_rows):
        yield f"row {row}", problem


# Rows as columns: for batches in which all is as it should be. They give what samples.with_metadata, with_caption and
# `read` give of each row, and leave what they are not sure of to these.

UNUSUAL = (pa.ArrowException, ArithmeticError, KeyError, TypeError, ValueError)
HEX_32 = "(?i)^[0-9a-f]{32}$"
HEX_64 = "^[0-9a-f]{64}$"


def _usable_columns(part: _Part, settings: Settings) -> pa.Table | None:
    """The columns of the pool that the rows decide. None: a row is not usable, or of a type that needs a look."""
    batch = part.batch
    if batch is None or {ORIGINAL_NAME, ORIGINAL_FILE} & set(settings.carry):
        return None
    try:
        if settings.uid_column:
            _hex_bytes(_text_column(batch, settings.uid_column))
        urls = _text_column(batch, settings.url_column or "")
        captions = _text_column(batch, settings.caption_column or "")
        if urls.null_count or not pc.all(pc.greater(pc.binary_length(pc.ascii_trim_whitespace(urls)), 0)).as_py():
            return None
        if captions.null_count or pc.max(pc.binary_length(captions)).as_py() > MAX_CAPTION_BYTES:
            return None
        # Of whitespace beyond ASCII, Python has the last word.
        doubtful = captions.filter(pc.invert(pc.match_substring_regex(captions, "[!-~]")))
        if not all(text.strip() for text in doubtful.to_pylist()):
            return None
        columns = {"url": urls, "caption": captions}
        for side in ("width", "height"):
            columns[f"original_{side}_px"] = _sizes(batch, f"original_{side}")
        for name, kind in settings.carry.items():
            columns[name] = _vector_lists(part.vectors[name]) if name in part.vectors else _carried(batch, name, kind)
        if settings.sha256_column:
            digests = pc.utf8_lower(_text_column(batch, settings.sha256_column))
            known = pc.match_substring_regex(digests, HEX_64)
            columns[EXPECTED_SHA256] = pc.if_else(known, digests, pa.scalar(None, digests.type))
        if settings.face_boxes_column:
            columns[FACE_BOXES] = _boxes_column(batch.column(settings.face_boxes_column))
    except UNUSUAL:
        return None
    return pa.table(columns)


def _text_column(batch: pa.RecordBatch, name: str) -> pa.Array:
    """The column of valid text. Raises one of UNUSUAL for another one."""
    column = batch.column(name)
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        raise TypeError(name)
    column.validate(full=True)
    return column


def _hex_bytes(uids: pa.Array) -> np.ndarray:
    """[rows] S16 of texts of 32 hex digits. Raises ValueError where one is something else."""
    if uids.null_count or not pc.all(pc.match_substring_regex(uids, HEX_32)).as_py():
        raise ValueError("no uid")
    return np.frombuffer(bytes.fromhex("".join(uids.to_pylist())), "S16")


def _sizes(batch: pa.RecordBatch, name: str) -> pa.Array:
    if name not in batch.schema.names:
        return pa.nulls(len(batch), pa.int32())
    column = batch.column(name)
    if not pa.types.is_integer(column.type):
        raise TypeError(name)
    known = pc.and_(pc.greater(column, 0), pc.less(column, 1 << 31))
    return pc.if_else(known, column, pa.scalar(None, column.type)).cast(pa.int32())


def _carried(batch: pa.RecordBatch, name: str, kind: str) -> pa.Array:
    column, wanted = batch.column(name), CARRIED_TYPES[kind]
    if kind == "string":
        return _text_column(batch, name)
    if pa.types.is_floating(wanted) and column.type in (pa.float32(), pa.float64()):
        return column.cast(wanted, safe=False)
    if pa.types.is_integer(wanted) and pa.types.is_integer(column.type):
        return column.cast(wanted)
    if column.type != wanted or kind == VECTOR:
        raise TypeError(name)
    return column


def _vector_lists(vectors: np.ndarray) -> pa.Array:
    with np.errstate(over="raise"):
        narrow = np.ascontiguousarray(vectors.astype(np.float16))
    offsets = np.arange(len(narrow) + 1, dtype=np.int32) * narrow.shape[1]
    return pa.ListArray.from_arrays(offsets, pa.array(narrow.reshape(-1)))


def _boxes_column(column: pa.Array) -> pa.Array:
    """JSON text of each row's boxes, as samples.with_metadata writes it."""
    kind = column.type
    if not (_is_list(kind) and _is_list(kind.value_type) and pa.types.is_floating(kind.value_type.value_type)):
        raise TypeError(kind)
    boxes = column.flatten()
    sides = boxes.flatten()
    if boxes.null_count or sides.null_count or not pc.all(pc.equal(pc.list_value_length(boxes), 4)).as_py():
        raise ValueError("not four numbers a box")
    values = sides.to_numpy().astype(np.float64)
    if not np.isfinite(values).all():
        raise ValueError("not finite")
    counts = pc.list_value_length(column).to_pylist()
    ends = np.cumsum([count or 0 for count in counts]).tolist()
    texts = []
    for count, end in zip(counts, ends, strict=True):
        if not count:
            texts.append(None if count is None else "[]")
            continue
        texts.append(json.dumps(values[4 * (end - count) : 4 * end].reshape(-1, 4).tolist(), separators=(",", ":")))
    return pa.array(texts, pa.string())


def _batches(
    file: pq.ParquetFile, group: int, columns: list[str], start: int, stop: int
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """(its first row, batch) of the rows start..stop of the group."""
    first = 0
    if start >= stop:
        return
    for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns, use_threads=False):
        low, high = max(start - first, 0), min(stop - first, len(batch))
        if low < high:
            yield first + low, batch.slice(low, high - low)
        first += len(batch)
        if first >= stop:
            return


def _values(column: pa.Array) -> Sequence[Any]:
    """The column's values: text as bytes (it may hold anything), times as ISO text, decimals as text."""
    kind = column.type
    if pa.types.is_dictionary(kind):
        column = column.dictionary_decode()
        kind = column.type
    if _is_text(kind):
        return column.cast(pa.large_binary()).to_pylist()
    if _is_list(kind) and _is_text(kind.value_type):
        return column.cast(pa.large_list(pa.large_binary())).to_pylist()
    try:
        if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
            return _iso_text(column).to_pylist()
        if _is_list(kind) and pa.types.is_floating(kind.value_type):
            return [one.values.to_numpy(zero_copy_only=False) if one.is_valid else None for one in column]
    except parquet_rows.NO_VALUE:
        pass
    return parquet_rows.values_of(column)


def _iso_text(column: pa.Array) -> pa.Array:
    kind, suffix = column.type, ""
    try:
        text = column.cast(pa.string())
    except pa.ArrowException:
        if not pa.types.is_timestamp(kind):
            raise
        text, suffix = column.cast(pa.timestamp(kind.unit)).cast(pa.string()), "Z"  # a zone that is not known here
    text = pc.replace_substring(text, " ", "T", max_replacements=1)
    return pc.binary_join_element_wise(text, suffix, "") if suffix else text


# Features: arrays of an npz beside the parquet file.

_places: dict[tuple[str, str, str], _Features] = {}  # where this process stands in arrays: the last ones that it read
MAX_PLACES = 8


class _Features:
    """Rows of an array in an npz, read forward: neither the file nor the array is ever whole in memory.

    Raises one of UNREADABLE for what is no array of rows of floats.
    """

    def __init__(self, path: str, key: str):
        self._file = storage.open_read(path)
        try:
            self._stream = zipfile.ZipFile(self._file).open(f"{key}.npy")  # noqa: SIM115 (close() closes it)
            version = np.lib.format.read_magic(self._stream)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            self.shape, is_fortran, self._dtype = header(self._stream)
            if len(self.shape) != 2 or is_fortran or self._dtype.kind != "f" or self._dtype.itemsize > 8:
                raise ValueError(
                    f"is {self._dtype} of shape {self.shape}, expected rows of float16, float32 or float64"
                )
            if not 1 <= self.shape[1] <= MAX_VECTOR_VALUES:
                raise ValueError(f"has {self.shape[1]} values a row, expected 1 to {MAX_VECTOR_VALUES}")
        except BaseException:
            self._file.close()
            raise
        self._start_bytes = self._stream.tell()
        self.next_row = 0

    def read(self, row: int, count: int) -> np.ndarray:
        """[count, D] of the rows from `row` on, which is next_row or later."""
        row_bytes = self._dtype.itemsize * self.shape[1]
        self._stream.seek(self._start_bytes + row * row_bytes)
        data = self._stream.read(count * row_bytes)
        if len(data) != count * row_bytes:
            raise ValueError("the array ends early")
        self.next_row = row + count
        return np.frombuffer(data, self._dtype).reshape(count, self.shape[1])

    def close(self) -> None:
        self._file.close()


def _vectors(path: str, key: str, row: int, count: int) -> np.ndarray:
    """[count, D] of the rows from `row` on. Raises WinnowError when the npz is broken, or has changed its size."""
    place = (path, key, storage.stamp(path))
    features = _places.pop(place, None)
    if features is not None and row < features.next_row:
        features.close()
        features = None
    try:
        features = features or _Features(path, key)
        found = features.read(row, count)
    except UNREADABLE as error:
        if features is not None:
            features.close()
        raise WinnowError(f"{path}: {key} can't be read at row {row}: {error}; expected the whole npz") from error
    _places[place] = features
    while len(_places) > MAX_PLACES:
        _places.pop(next(iter(_places))).close()
    return found


@atexit.register
def _close_places() -> None:
    for features in _places.values():
        features.close()


def _check_features(path: str, key: str, num_rows: int, there: Sequence[str], place: str) -> None:
    """None. Raises ConfigError unless the npz beside the table has the key, with a row for each of the table's."""
    npz = features_path(path)
    columns = parquet_rows.listed(there)
    problem = f"{place}: no column {key}, expected one of {columns}, or a key of {storage.name_of(npz)} beside it"
    if not storage.exists(npz):
        raise ConfigError(f"{problem}, which is not there")
    try:
        features = _Features(npz, key)
    except KeyError as error:
        raise ConfigError(f"{problem}, which has no {key}") from error
    except UNREADABLE as error:
        raise ConfigError(f"{place}: {key} in {storage.name_of(npz)}: {error}") from error
    features.close()
    if features.shape[0] != num_rows:
        raise ConfigError(
            f"{place}: {key} in {storage.name_of(npz)} has {features.shape[0]} rows, expected the table's {num_rows}"
        )


# Text tables.


class _Lines:
    """Lines of a text table for csv.reader, which asks for more of them inside quotes.

    Lines of a record that can't be read are given again, but for the first: a lost quote costs one row.

    Args:
        stream: stands at byte `start`; lines that begin at `stop` or later are not given (0: all are).
        lines_before: how many lines there are before `start`.
    """

    def __init__(self, stream: Any, watched: Watched, start: int = 0, stop: int = 0, lines_before: int = 0):
        self._stream, self._watched, self._stop = stream, watched, stop
        self._again: deque[tuple[str, int]] = deque()
        self._taken: list[tuple[str, int]] = []
        self.offset_bytes, self.lines_before = start, lines_before  # of the next line
        self.place = ""  # of the record, in words
        self.ended = ""  # why the file ends early

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if len(self._taken) >= MAX_RECORD_LINES:
            raise csv.Error(f"a quote is open for {MAX_RECORD_LINES} lines")
        line, size_bytes = self._again.popleft() if self._again else self._read()
        self.offset_bytes += size_bytes
        self.lines_before += 1
        self._taken.append((line, size_bytes))
        if size_bytes > MAX_LINE_BYTES:
            raise csv.Error(f"a line of more than {MAX_LINE_BYTES} bytes")
        if "\0" in line:
            raise csv.Error("a NUL in the line")
        return line

    def begin(self) -> None:
        """None; the next line is the first of a record."""
        self._taken.clear()
        self.place = f"line {self.lines_before + 1}"

    def back(self) -> None:
        """None; gives the record's lines again, but for the first."""
        lines = self._taken[1:]
        self._again.extendleft(reversed(lines))
        self.lines_before -= len(lines)
        self.offset_bytes -= sum(size_bytes for _, size_bytes in lines)

    def _read(self) -> tuple[str, int]:
        is_over = self.ended or (self._stop and self.offset_bytes >= self._stop)
        data = b"" if is_over else self._part()
        if not data:
            raise StopIteration
        size_bytes = len(data)
        if size_bytes > MAX_LINE_BYTES:
            rest = data
            while rest and not rest.endswith(b"\n"):
                rest = self._part()
                size_bytes += len(rest)
        if self.offset_bytes == 0:
            data = data.removeprefix(codecs.BOM_UTF8)
        return data.decode("utf-8", "surrogateescape"), size_bytes

    def _part(self) -> bytes:
        try:
            return self._stream.readline(MAX_LINE_BYTES + 1)
        except (EOFError, OSError, zlib.error) as error:
            self._watched.reraise()
            self.ended = f"the file ends early: {error}"
            return b""


@contextlib.contextmanager
def _opened_text(path: str) -> Iterator[tuple[Any, Watched]]:
    """The stream of the file's bytes, inflated, and the watch of the file."""
    with storage.open_read(path) as raw:
        watched = Watched(raw)
        if extension(path) == "gz":
            with gzip.GzipFile(fileobj=watched) as stream:  # type: ignore[call-overload]
                yield stream, watched
        else:
            yield io.BufferedReader(watched, BUFFER_BYTES), watched  # type: ignore[arg-type]


def _text_rows(unit: Unit, settings: Settings) -> Iterator[Row]:
    kind = kind_of(unit.path)
    with _opened_text(unit.path) as (stream, watched):
        if kind == "json":
            yield from _json_rows(stream, watched)
            return
        header: list[str] = []
        if kind != "jsonl":
            _, record = next(_records(_Lines(stream, watched), kind), ("", "no rows"))
            if isinstance(record, str):
                raise WinnowError(f"{unit.path}: the header can't be read any more: {record}")
            header = _header(record, settings)
            stream.seek(unit.start)
        lines = _Lines(stream, watched, unit.start, unit.stop, unit.extra)
        if kind == "jsonl":
            stream.seek(unit.start)
            yield from _jsonl_rows(lines)
            return
        for key, record in _records(lines, kind):
            if isinstance(record, str):
                yield key, record
            elif len(record) != len(header):
                yield key, f"{len(record)} fields, expected {len(header)}"
            else:
                values: dict[str, Any] = dict(zip(header, record, strict=True))
                for column in ("original_width", "original_height"):
                    if column in values:
                        values[column] = _number(values[column])
                yield key, values


def _text_units(name: str, settings: Settings, place: str, path: str, shard_size: int) -> list[Unit]:
    """Ranges of bytes with `shard_size` rows each; `extra` is the number of lines before."""
    kind = kind_of(path)
    if kind == "json":
        return [Unit(name, settings, place, path, extra=0)]
    cuts: list[tuple[int, int]] = []
    with _opened_text(path) as (stream, watched):
        lines = _Lines(stream, watched)
        rows = _jsonl_rows(lines) if kind == "jsonl" else _records(lines, kind)
        if kind != "jsonl":
            _, record = next(rows, ("", ""))
            if isinstance(record, list) and _header(record, settings) is not record:
                cuts.append((0, 0))
        number = len(cuts)
        before = (lines.offset_bytes, lines.lines_before)
        for _ in rows:
            if number % shard_size == 0:
                cuts.append(before)
            number += 1
            before = (lines.offset_bytes, lines.lines_before)
    stops = [start for start, _ in cuts[1:]] + [0]
    return [
        Unit(name, settings, place, path, start, stop, lines_before)
        for (start, lines_before), stop in zip(cuts, stops, strict=False)
    ]


def _records(lines: _Lines, kind: str | None) -> Iterator[tuple[str, list[str] | str]]:
    """(where it stands, fields or why they can't be read) of each record of a csv or tsv, the header included."""
    csv.field_size_limit(MAX_CAPTION_BYTES)
    # An unclosed quote would swallow rows without a word: strict says so. A tsv has no quotes.
    style: dict[str, Any] = {"strict": True} if kind == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.reader(lines, **style)
    while True:
        lines.begin()
        try:
            record = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if lines.ended:
                break
            lines.back()
            yield lines.place, str(error)
            continue
        if record:  # else a blank line
            yield lines.place, record
    if lines.ended:
        yield lines.place, lines.ended


def _jsonl_rows(lines: _Lines) -> Iterator[Row]:
    while True:
        lines.begin()
        try:
            line = next(lines)
            if line.strip():
                yield lines.place, parse_json(line)
        except StopIteration:
            break
        except (csv.Error, ValueError) as error:
            yield lines.place, f"not a JSON mapping: {error}"
    if lines.ended:
        yield lines.place, lines.ended


def _json_rows(stream: Any, watched: Watched) -> Iterator[Row]:
    """The objects of a list, one after the other; after broken syntax the rest of the file is one failed row."""
    decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
    parse = json.JSONDecoder().raw_decode
    text, position, number, is_whole, ended = "", 0, 0, False, ""

    def more() -> None:
        nonlocal text, position, is_whole, ended
        data = b""
        try:
            data = stream.read1(max(BUFFER_BYTES, len(text) - position))
        except (EOFError, OSError, zlib.error) as error:
            watched.reraise()
            ended = f"the file ends early: {error}"
        is_whole = not data
        text, position = text[position:] + decode(data, is_whole), 0

    def skip_space() -> str:
        """The next character that is no space; "" at the end."""
        nonlocal position
        while True:
            while position < len(text) and text[position] in " \t\r\n\ufeff":
                position += 1
            if position < len(text) or is_whole:
                return text[position : position + 1]
            more()

    problem = ""
    if skip_space() != "[":
        problem = "expected a list of objects; a file with one object a line is named .jsonl"
    position += 1
    while not problem:
        first = skip_space()
        if first == "]" and number == 0:
            position += 1
            break
        try:
            value, end = parse(text, position)
            if end == len(text) and not is_whole:  # it may go on: 12 of 123
                more()
                continue
        except (ValueError, RecursionError) as error:
            if not is_whole and len(text) - position < MAX_LINE_BYTES and not isinstance(error, RecursionError):
                more()
                continue
            problem = ended or f"the rest can't be read: {error}"
            break
        position = end
        is_object = isinstance(value, dict)
        yield f"element {number}", value if is_object else f"a {type(value).__name__}, expected a mapping"
        number += 1
        following = skip_space()
        position += 1
        if following == "]":
            break
        if following != ",":
            problem = ended or f"the rest can't be read: {following!r} after an element"
    if problem or (skip_space() and not ended):
        yield f"element {number}", problem or "there is more after the list"
    elif ended:
        yield f"element {number}", ended


def _header(record: list[str], settings: Settings) -> list[str]:
    """The columns' names: the first record itself (the same object), or numbers where it is a row already."""
    named = settings.url_column or ""
    is_row = any(URL.match(field) for field in record) or (named.isdigit() and named not in record)
    return [str(number) for number in range(len(record))] if is_row else record


def _text_columns(path: str, settings: Settings) -> tuple[list[str], dict[str, str]]:
    """The table's columns; and which hold URLs and captions as far as a row without header says so."""
    kind = kind_of(path)
    with _opened_text(path) as (stream, watched):
        try:
            start = stream.read(2)
        except (EOFError, OSError, zlib.error) as error:
            watched.reraise()
            raise UnreadableError(f"no readable {kind}: {error}") from error
        if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UnreadableError(f"no readable {kind}: UTF-16, expected UTF-8")
        stream.seek(0)
        if kind in ("json", "jsonl"):
            rows = _json_rows(stream, watched) if kind == "json" else _jsonl_rows(_Lines(stream, watched))
            names: dict[str, None] = {}
            problem = "no rows"
            for _, values in islice(rows, ROWS_FOR_NAMES):
                if isinstance(values, str):
                    problem = values
                else:
                    names |= dict.fromkeys(values)
            if not names:
                raise UnreadableError(f"no readable {kind}: {problem}")
            return list(names), {}
        _, record = next(_records(_Lines(stream, watched), kind), ("", "no rows"))
    if isinstance(record, str):
        raise UnreadableError(f"no readable {kind}: {record}")
    header = _header(record, settings)
    if header is record:
        repeated = sorted({name for name in header if header.count(name) > 1})
        if repeated:
            raise UnreadableError(f"no readable {kind}: two columns {', '.join(repeated)}")
        return header, {}
    urls = [name for name, field in zip(header, record, strict=True) if URL.match(field)]
    guessed = {"url": urls[0]} if len(urls) == 1 else {}
    others = [name for name in header if name != (settings.url_column or guessed.get("url"))]
    if len(others) == 1:
        guessed["caption"] = others[0]
    return header, guessed


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


# Columns.


def _check_types(settings: Settings, schema: pa.Schema, place: str) -> None:
    def refuse(setting: str, column: str, expected: str) -> None:
        raise ConfigError(f"{place}: {setting} {column} is {schema.field(column).type}, expected {expected}")

    for setting, column in (("url_column", settings.url_column), ("sha256_column", settings.sha256_column)):
        if column is not None and not _is_text_like(schema.field(column).type):
            refuse(setting, column, "text")
    caption, boxes = settings.caption_column, settings.face_boxes_column
    if caption is not None:
        kind = schema.field(caption).type
        if not _is_text_like(kind.value_type if _is_list(kind) else kind):
            refuse("caption_column", caption, "text or a list")
    if boxes is not None:
        kind = schema.field(boxes).type
        if not (_is_text_like(kind) or _is_list(kind)):
            refuse("face_boxes_column", boxes, "lists of four numbers, or their JSON text")
    for column, wanted in settings.carry.items():
        if wanted == VECTOR and column in schema.names and not _is_list(schema.field(column).type):
            refuse(f"carry.{column} = {VECTOR}:", column, "a list of numbers")


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_text_like(kind: pa.DataType) -> bool:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return _is_text(kind) or parquet_rows.is_bytes(kind) or pa.types.is_null(kind)
