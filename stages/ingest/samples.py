"""What every reader of a source yields: samples, and the rules that all layouts share for captions, uids and columns.

A reader never drops a sample: what is wrong with it is in `error`, a key of errors.FAILURES. One sample, verbatim:

    key='photos/cat.jpg' image=b'\\xff\\xd8..' caption='a cat' uid=None url=None original_width_px=None
    original_height_px=None carried={'similarity': 0.31} error=None detail=''
"""

from __future__ import annotations

import ctypes
import datetime
import hashlib
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from pipeline.core import tars
from pipeline.core.images import EXTENSIONS

UID = re.compile(r"[0-9a-f]{32}")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_IMAGE_BYTES = 256 << 20
MAX_CAPTION_BYTES = 1 << 20
# Formats that people have and that are not read here: their files become failed rows.
UNREAD_EXTENSIONS = frozenset({"heic", "heif", "avif", "jxl", "jp2", "svg", "ico", "psd", "dng", "cr2", "nef", "arw"})
IMAGE_EXTENSIONS = frozenset(EXTENSIONS) | UNREAD_EXTENSIONS
CARRIED_TYPES = {
    "string": pa.string(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "float16[]": pa.list_(pa.float16()),  # a vector: a numpy array in `carried`
}
EXPECTED_SHA256 = "expected_sha256"  # of the original bytes, as a table of URLs says
FACE_BOXES = "face_bboxes"  # JSON text: [[x_min, y_min, x_max, y_max], ...]
ORIGINAL_NAME = "original_name"  # a column that `carry` can always keep: the sample's name in its source
ORIGINAL_FILE = "original_file"  # one that it can keep of tars: which of them the sample is from


# What converting a value of the wrong kind raises: a whole number beyond floats, lists within lists without end.
UNFIT_ERRORS = (KeyError, TypeError, ValueError, ArithmeticError, RecursionError)


class UnreadableError(Exception):
    """A file that can't be read at all as what it is called; its message is made one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.split()))


@dataclass(frozen=True)
class Settings:
    """How samples of a source are read, whatever its layout. Columns are keys of the json where there is no table."""

    layout: str
    image_column: str | None = None
    caption_column: str | None = None
    uid_column: str | None = None
    carry: Mapping[str, str] = field(default_factory=dict)
    url_column: str | None = None
    sha256_column: str | None = None  # becomes the column EXPECTED_SHA256
    face_boxes_column: str | None = None  # becomes the column FACE_BOXES


@dataclass(frozen=True)
class Unit:
    """What one task reads: a tar, rows or row groups of a table, a run of image files, or rows of the demo world.

    `source` is the source's name and `place` the file or folder relative to the source, for messages. `path` is where
    it lies; start..stop are row groups or rows; `extra` is what only the layout's own reader knows.
    """

    source: str
    settings: Settings
    place: str
    path: str
    start: int = 0
    stop: int = 0
    extra: Any = None


@dataclass(frozen=True)
class Sample:
    """One image-caption pair as found. `uid` is only there where the source gives a valid one."""

    key: str
    image: bytes | None = None
    caption: str | None = None
    uid: str | None = None
    url: str | None = None
    original_width_px: int | None = None
    original_height_px: int | None = None
    carried: Mapping[str, Any] = field(default_factory=dict)
    error: str | None = None
    detail: str = ""

    def failed(self, error: str, detail: str) -> Sample:
        """The sample with this failure, unless it has one already: the first is the cause of the others."""
        return self if self.error else self.having(error=error, detail=detail)

    def having(self, **values: Any) -> Sample:
        """The sample with these values: a quicker dataclasses.replace, as every row comes by here."""
        changed = object.__new__(Sample)
        changed.__dict__.update(self.__dict__, **values)
        return changed


class Watched:
    """A file that refuses huge reads, and remembers when the store failed.

    An archive may claim a header of any length, and parsers would try to read it. What goes wrong in the store (the
    network) must not be taken for broken data: `reraise` tells the two apart.
    """

    def __init__(self, file: BinaryIO):
        self._file = file
        self._error: BaseException | None = None
        self.closed = False

    def read(self, size: int = -1) -> bytes:
        if size > tars.MAX_MEMBER_BYTES + tars.BLOCK_BYTES:
            raise ValueError(f"{size} bytes in one piece, expected at most {tars.MAX_MEMBER_BYTES}")
        try:
            return self._file.read(size)
        except Exception as error:
            self._error = error
            raise

    def readinto(self, buffer: Any) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def tell(self) -> int:
        return self._file.tell()

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return False

    def seekable(self) -> bool:
        return True

    def flush(self) -> None:
        pass

    def close(self) -> None:
        self.closed = True

    def reraise(self) -> None:
        """None; raises what the store raised, if it did."""
        if self._error is not None:
            raise self._error


def with_caption(sample: Sample, raw: Any) -> Sample:
    """The sample with this caption (text or UTF-8 bytes), or with the reason why it can't be used."""
    if raw is None:
        return sample.failed("missing_caption", "no caption")
    if not isinstance(raw, (str, bytes)):
        return sample.failed("bad_caption", f"a caption of type {type(raw).__name__}, expected text")
    try:
        data = raw.encode("utf-8") if isinstance(raw, str) else raw
        if len(data) > MAX_CAPTION_BYTES:
            return sample.failed("bad_caption", f"{len(data)} bytes, at most {MAX_CAPTION_BYTES}")
        text = data.decode("utf-8")
    except UnicodeError as error:
        return sample.failed("bad_caption", f"not valid UTF-8 ({error.reason})")
    if not text.strip():
        return sample.failed("missing_caption", "a blank caption")
    return sample.having(caption=text)


def with_captions(sample: Sample, raw: Any) -> Iterator[Sample]:
    """One sample a caption: `raw` is a caption, or a list of several for the same image.

    A uid that the source gives names the first; the others get uids derived from it and their position.
    """
    captions = raw if isinstance(raw, list) else [raw]
    for position, caption in enumerate(captions or [None]):
        uid = sample.uid if position == 0 or sample.uid is None else numbered_uid(sample.uid, "caption", position)
        yield with_caption(sample if position == 0 else sample.having(uid=uid), caption)


def numbered_uid(uid: str, what: str, number: int) -> str:
    """32 hex digits: the uid of the `number`th caption (or repeat) that goes with the row of this uid."""
    return hashlib.sha256(f"{uid} {what} {number}".encode()).hexdigest()[:32]


def with_metadata(sample: Sample, settings: Settings, values: Mapping[str, Any]) -> Sample:
    """The sample with uid, url, original sizes and carried columns from a row or json.

    A uid is kept where it is 32 hex digits. Another value is a failure if the config names the uid column, and else
    ignored: the row gets a derived uid.
    """
    uid, problem = None, None
    given = values.get(settings.uid_column or "uid")
    given = _text(given)
    if isinstance(given, str) and UID.fullmatch(given.lower()):
        uid = given.lower()
    elif settings.uid_column:
        problem = ("bad_uid", f"{settings.uid_column} = {_shown(given)}, expected 32 hex digits")
    carried: dict[str, Any] = {}
    for column, kind in settings.carry.items():
        value = sample.key if column == ORIGINAL_NAME and column not in values else _text(values.get(column))
        try:
            carried[column] = _converted(value, kind)
        except UNFIT_ERRORS:
            carried[column] = None
            problem = problem or ("bad_metadata", f"{column} = {_shown(value)}, expected {kind}")
    if settings.sha256_column:
        digest = _text(values.get(settings.sha256_column))
        known = isinstance(digest, str) and SHA256.fullmatch(digest.lower())
        carried[EXPECTED_SHA256] = digest.lower() if known else None
    if settings.face_boxes_column:
        boxes = _text(values.get(settings.face_boxes_column))
        try:
            carried[FACE_BOXES] = _boxes_text(boxes)
        except UNFIT_ERRORS:
            carried[FACE_BOXES] = None
            found = f"{settings.face_boxes_column} = {_shown(boxes)}"
            problem = problem or ("bad_metadata", f"{found}, expected a list of boxes of four numbers")
    sample = sample.having(
        uid=uid,
        url=_clean(values.get(settings.url_column or "url")),
        original_width_px=_pixels(values.get("original_width")),
        original_height_px=_pixels(values.get("original_height")),
        carried=carried,
    )
    return sample.failed(*problem) if problem else sample


def file_text(data: bytes) -> bytes:
    """The caption in a text file: without a byte order mark and the line ends that editors add."""
    return data.removeprefix(b"\xef\xbb\xbf").rstrip(b"\r\n")


def parse_json(data: bytes | str) -> dict[str, Any]:
    """The json of a sample. Raises ValueError when it is no mapping."""
    try:
        values = json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(values, dict):
        raise ValueError(f"a {type(values).__name__}, expected a mapping")
    return values


def extension(name: str) -> str:
    """What follows the last dot of a file's name, in lower case; "" for none."""
    stem, dot, last = name.rsplit("/", 1)[-1].rpartition(".")
    return last.lower() if dot and stem else ""


def packed(sizes: Iterable[int], most: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of runs of consecutive entries whose sizes sum to at most `most`; a larger entry stands alone."""
    start = stop = total = 0
    for size in sizes:
        if total and total + size > most:
            yield start, stop
            start, total = stop, 0
        total += size
        stop += 1
    if stop > start:
        yield start, stop


def _text(value: Any) -> Any:
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def _shown(value: Any) -> str:
    """The start of a value for a message."""
    try:
        return repr(str(value)[:80])
    except (RecursionError, ValueError):  # too deep, or a whole number of too many digits
        return f"a {type(value).__name__}"


def _clean(value: Any) -> str | None:
    """Text that any file can hold: what is not UTF-8 becomes a question mark."""
    value = _text(value)
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else None


def _pixels(value: Any) -> int | None:
    return int(value) if isinstance(value, (int, float)) and 0 < value < 1 << 31 else None


def _boxes_text(boxes: Any) -> str | None:
    """The boxes as compact JSON. Raises where there are others: a face would stay visible."""
    if isinstance(boxes, str):
        boxes = json.loads(boxes) if boxes.strip() else None
    if boxes is None:
        return None
    if boxes == []:
        return "[]"  # as most images have no face
    if not isinstance(boxes, list):
        raise TypeError
    found = []
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4:
            raise TypeError
        found.append([float(side) for side in box])
        if not all(map(math.isfinite, found[-1])):
            raise ValueError
    return json.dumps(found, separators=(",", ":"))


def _json_text(value: Any) -> str:
    """What stands in JSON for a value that it has no type for."""
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return value.isoformat() if isinstance(value, (datetime.date, datetime.time)) else str(value)


def _converted(value: Any, kind: str) -> Any:
    if value is None:
        return None
    if kind == "float16[]":
        vector = np.asarray(value)
        if vector.ndim != 1 or vector.dtype.kind not in "fiu":
            raise TypeError
        with np.errstate(over="raise"):
            return vector.astype(np.float16)
    if kind == "string":
        if not isinstance(value, str):
            value = json.dumps(value, default=_json_text)
        value.encode("utf-8")
    elif value == "":
        return None  # an empty field of a csv
    elif kind == "bool":
        value = {True: True, False: False, "true": True, "false": False}[value]
    elif isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    elif kind.startswith("int"):
        if float(value) != int(value):
            raise ValueError
        value = int(value)
        bits = 31 if kind == "int32" else 63
        if not -(1 << bits) <= value < 1 << bits:
            raise OverflowError
    else:
        value = float(value)
        if kind == "float32":
            value = ctypes.c_float(value).value
    return value
