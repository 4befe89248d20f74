"""Reads parquet files whose rows hold an image's bytes and one caption or a list of them.

The image column is binary, or Hugging Face's struct {bytes, path}; a path alone is a failed row: nothing outside the
file is opened. Other columns are read a row group at a time, images in small batches. A part of the file that can't
be read costs the rows that it held, and they are counted.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import storage
from pipeline.core.errors import ConfigError
from stages.ingest.samples import (
    MAX_IMAGE_BYTES,
    ORIGINAL_NAME,
    Sample,
    Settings,
    Unit,
    UnreadableError,
    Watched,
    packed,
    with_captions,
    with_metadata,
)

IMAGE_COLUMNS = ("image", "jpg", "png", "webp", "image_bytes", "bytes", "img")  # looked for when none is named
CAPTION_COLUMNS = ("caption", "text", "captions", "txt", "TEXT")
IMAGES_PER_BATCH = 16
ROWS_PER_BATCH = 1024
MAX_LOST_ROWS = 1 << 20  # a broken file may claim any number of rows
UNFIT = b"\xff"  # no text and no number: a value that can't be read fails its row, and no other
NO_VALUE = (pa.ArrowException, ValueError, KeyError, OverflowError)  # of a value that Python has none for


@contextlib.contextmanager
def opened(path: str) -> Iterator[tuple[pq.ParquetFile, Watched]]:
    """The open file and its watch.

    Raises:
        UnreadableError: no parquet file, two columns of a name, or more rows than bytes.
    """
    with storage.open_read(path) as raw:
        watched = Watched(raw)
        try:
            file = pq.ParquetFile(watched, pre_buffer=False)
            sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
        except (pa.ArrowException, OSError, ValueError) as error:
            watched.reraise()
            raise UnreadableError(f"no readable parquet file: {error}") from error
        with file:
            names = file.schema_arrow.names
            repeated = sorted({name for name in names if names.count(name) > 1})
            if repeated:
                raise UnreadableError(f"no readable parquet file: two columns {listed(repeated)}")
            size_bytes = raw.seek(0, os.SEEK_END)
            if min(sizes, default=0) < 0 or sum(sizes) > size_bytes:  # each would become a row of the pool
                raise UnreadableError(f"no readable parquet file: {sum(sizes)} rows in {size_bytes} bytes")
            yield file, watched


def schema_of(path: str) -> pa.Schema:
    """The file's schema. Raises UnreadableError when it is no parquet file."""
    with opened(path) as (file, _):
        return file.schema_arrow


def resolved(settings: Settings, schema: pa.Schema, place: str) -> Settings:
    """The settings with the image and caption columns found. Raises ConfigError naming what columns there are."""
    image = found_column("image_column", settings.image_column, IMAGE_COLUMNS, schema.names, place)
    kind = schema.field(image).type
    if pa.types.is_struct(kind):
        fields = {kind.field(index).name: kind.field(index).type for index in range(kind.num_fields)}
        kind = fields.get("bytes", pa.null())
    if not is_bytes(kind):
        there = schema.field(image).type
        raise ConfigError(f"{place}: image_column {image} is {there}, expected bytes or {{bytes, path}}")
    caption = found_column("caption_column", settings.caption_column, CAPTION_COLUMNS, schema.names, place)
    kind = schema.field(caption).type
    if _is_list(kind):
        kind = kind.value_type
    if not (_is_text(kind) or is_bytes(kind)):
        raise ConfigError(f"{place}: caption_column {caption} is {schema.field(caption).type}, expected text or a list")
    for column in ([settings.uid_column] if settings.uid_column else []) + list(settings.carry):
        if column not in schema.names and column != ORIGINAL_NAME:
            raise ConfigError(f"{place}: no column {column}, expected one of {listed(schema.names)}")
    return replace(settings, image_column=image, caption_column=caption)


def units(name: str, settings: Settings, place: str, path: str, shard_size: int) -> list[Unit]:
    """Runs of row groups with at most `shard_size` rows each (a larger group stands alone)."""
    try:
        with opened(path) as (file, _):
            resolved(settings, file.schema_arrow, place)
            sizes = [file.metadata.row_group(index).num_rows for index in range(file.metadata.num_row_groups)]
    except UnreadableError as error:
        return [Unit(name, settings, place, path, extra=str(error))]
    return [Unit(name, settings, place, path, start, stop) for start, stop in packed(sizes, shard_size)]


def read(unit: Unit, images: bool = True) -> Iterator[Sample]:
    """One sample a caption, in the file's order.

    Args:
        images: False leaves the images out: quick, and enough where every row has a uid.
    """
    if unit.extra:
        yield Sample("").failed("bad_table", unit.extra)
        return
    with opened(unit.path) as (file, watched):
        for group in range(unit.start, unit.stop):
            yield from _group_samples(unit, file, watched, group, images)


def row_dicts(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    """The rows as mappings, text as bytes: a text column of a parquet file may hold anything."""
    columns = []
    for column in batch.columns:
        if _is_list(column.type) and _is_text(column.type.value_type):
            column = column.cast(pa.large_list(pa.large_binary()))
        elif _is_text(column.type) or _is_text(getattr(column.type, "value_type", None)):
            column = column.cast(pa.large_binary())
        columns.append(values_of(column))
    for values in zip(*columns, strict=True):
        yield dict(zip(batch.schema.names, values, strict=True))


def values_of(column: pa.Array) -> list[Any]:
    """The column's values; UNFIT for one that Python has none for, such as a day after the year 9999."""
    try:
        return column.to_pylist()
    except NO_VALUE:
        return [_value(one) for one in column]


def _value(one: pa.Scalar) -> Any:
    try:
        return one.as_py()
    except NO_VALUE:
        return UNFIT


def _group_samples(unit: Unit, file: pq.ParquetFile, watched: Watched, group: int, images: bool) -> Iterator[Sample]:
    settings = unit.settings
    named = [settings.caption_column, settings.uid_column or "uid", *settings.carry]
    wanted = [*named, "url", "original_width", "original_height", "status", "error_message"]
    columns = [name for name in dict.fromkeys(wanted) if name in file.schema_arrow.names]
    num_rows = file.metadata.row_group(group).num_rows
    pictures = _pictures(file, watched, group, settings.image_column or "", images)
    done = 0
    try:
        for batch in file.iter_batches(ROWS_PER_BATCH, row_groups=[group], columns=columns, use_threads=False):
            for values in row_dicts(batch):
                sample = Sample(f"row group {group}, row {done}")
                image, error, detail = next(pictures)
                status = values.get("status")
                if image is None and images and isinstance(status, bytes) and status != b"success":
                    message = str(values.get("error_message") or b"no message", "utf-8", "replace")
                    sample = sample.failed("download_failed", f"{str(status, 'utf-8', 'replace')}: {message}")
                elif error:
                    sample = sample.failed(error, detail)
                sample = with_metadata(replace(sample, image=image), settings, values)
                done += 1
                yield from with_captions(sample, values[settings.caption_column or ""])
    except (pa.ArrowException, OSError, ValueError) as error:
        watched.reraise()
        for row in range(done, min(num_rows, done + MAX_LOST_ROWS)):
            yield Sample(f"row group {group}, row {row}").failed("bad_table", f"can't be read: {error}")


def _pictures(
    file: pq.ParquetFile, watched: Watched, group: int, column: str, images: bool
) -> Iterator[tuple[bytes | None, str | None, str]]:
    """(bytes, error, detail) of each row of the group, without end: what can't be read has an error."""
    while not images:
        yield None, None, ""
    detail = "the row group ends early"
    try:
        is_struct = pa.types.is_struct(file.schema_arrow.field(column).type)
        columns = [f"{column}.bytes", f"{column}.path"] if is_struct else [column]
        for batch in file.iter_batches(IMAGES_PER_BATCH, row_groups=[group], columns=columns, use_threads=False):
            for value in batch.column(0):
                image, error, why = _picture(value)
                yield image, error, why
    except (pa.ArrowException, OSError, ValueError) as error:
        watched.reraise()
        detail = f"the images of the row group can't be read: {error}"
    while True:
        yield None, "bad_table", detail


def _picture(value: pa.Scalar) -> tuple[bytes | None, str | None, str]:
    if not value.is_valid:
        return None, "missing_image", "no image"
    if isinstance(value, pa.StructScalar):
        if not value["bytes"].is_valid:
            return None, "missing_image", "the image is a path to another file; expected its bytes"
        value = value["bytes"]
    size_bytes = value.as_buffer().size
    if size_bytes > MAX_IMAGE_BYTES:
        return None, "too_many_bytes", f"{size_bytes} bytes, at most {MAX_IMAGE_BYTES}"
    if size_bytes == 0:
        return None, "missing_image", "no bytes"
    return value.as_py(), None, ""


def found_column(setting: str, named: str | None, usual: Sequence[str], there: Sequence[str], place: str) -> str:
    """The column that the config names, or the only usual one that is there. Raises ConfigError with what there is."""
    if named is not None:
        if named not in there:
            raise ConfigError(f"{place}: no column {named} ({setting}), expected one of {listed(there)}")
        return named
    found = [name for name in usual if name in there]
    if len(found) != 1:
        problem = f"could be {' or '.join(found)}" if found else f"is none of {', '.join(usual)}"
        raise ConfigError(f"{place}: {setting} {problem}; set {setting} to one of {listed(there)}")
    return found[0]


def listed(names: Sequence[str]) -> str:
    """The first of the names, on one line whatever is in them."""
    text = ", ".join(names[:50]).encode("utf-8", "replace").decode()[:500]
    return " ".join(text.split())


def is_bytes(kind: pa.DataType) -> bool:
    """True for columns that can hold an image or a text as bytes."""
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)


def _is_text(kind: pa.DataType | None) -> bool:
    if kind is None:
        return False
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def _is_list(kind: pa.DataType) -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind)
