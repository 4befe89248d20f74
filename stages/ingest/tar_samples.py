"""Reads webdataset tars: img2dataset's shards and CLIP_benchmark's task folders.

    000000003.jpg  000000003.json  000000003.txt      img2dataset, often with a parquet of the same name beside
    s0000000.jpg   s0000000.txt                       CLIP_benchmark retrieval: one caption a line
    s0000000.jpg   s0000000.cls                       CLIP_benchmark classification: the number of a class

A sample is a run of members with the same key: the name up to its last dot, except that `a.seg.png` beside `a.jpg`
is a side file of sample `a`. Losses are rows: a key that comes again, a sample that the end of the archive cuts, and
one row for whatever an archive without its end mark may have held after its last whole sample. With img2dataset's
parquet, every row of it that has no sample in the tar follows at the end: failed downloads with their message.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from pipeline.core import storage
from pipeline.core.tars import MAX_MEMBER_BYTES, Member, TarEnd, read_members
from stages.ingest import parquet_rows
from stages.ingest.samples import (
    IMAGE_EXTENSIONS,
    MAX_IMAGE_BYTES,
    UNREAD_EXTENSIONS,
    Sample,
    Settings,
    Unit,
    UnreadableError,
    Watched,
    extension,
    file_text,
    parse_json,
    with_caption,
    with_captions,
    with_metadata,
)

STATUS_COLUMNS = ("key", "status")  # a parquet beside a tar that has both is img2dataset's
READ_EXTENSIONS = IMAGE_EXTENSIONS | {"txt", "json", "cls"}
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class TarExtra:
    """What belongs to a tar: img2dataset's parquet, and the captions of classes. `has_tar` False: only the parquet."""

    has_tar: bool = True
    table_path: str | None = None
    class_captions: tuple[str, ...] | None = None


@dataclass
class _Group:
    """The members of one sample. `repeated`: an earlier sample of the archive has the same key."""

    key: str
    repeated: bool
    members: dict[str, Member] = field(default_factory=dict)


def read(unit: Unit) -> Iterator[Sample]:
    """The samples of the tar in order, then the rows of img2dataset's parquet that the tar does not have."""
    extra: TarExtra = unit.extra
    table: dict[str, dict[str, Any]] = {}
    broken_table = ""
    if extra.table_path:
        try:
            table = _status_rows(extra.table_path, unit.settings)
        except UnreadableError as error:
            broken_table = str(error)
    unseen = dict(table)
    end = TarEnd()
    if extra.has_tar:
        for sample in _tar_samples(unit, table, end):
            unseen.pop(sample.key, None)
            yield sample
    for key, row in unseen.items():
        sample = with_metadata(Sample(key), unit.settings, row)
        named = row.get(unit.settings.caption_column or "caption")
        if named is not None:
            with_text = with_caption(Sample(key), named)
            sample = replace(sample, caption=with_text.caption)
        if row["status"] != b"success":
            message = _readable(row.get("error_message"))
            yield sample.failed("download_failed", f"{_readable(row['status'])}: {message}")
        elif end.truncated:
            yield sample.failed("truncated_tar", end.truncated)
        else:
            yield sample.failed("missing_image", "a success in the parquet, but not in the tar")
    if broken_table:
        yield Sample(storage.name_of(extra.table_path or "")).failed("bad_table", broken_table)


def is_status_table(path: str) -> bool:
    """True when the parquet file is one of img2dataset's, or can't be read and so may have been one."""
    try:
        return set(STATUS_COLUMNS) <= set(parquet_rows.schema_of(path).names)
    except UnreadableError:
        return True


def _tar_samples(unit: Unit, table: Mapping[str, Mapping[str, Any]], end: TarEnd) -> Iterator[Sample]:
    expected: set[str] | None = None  # the kinds of members that the first sample has
    last: _Group | None = None
    with storage.open_read(unit.path) as file:
        watched = Watched(file)
        for group in _groups(read_members(watched, end), end):  # type: ignore[arg-type]
            if last is not None:
                yield from _samples(unit, last, table)
                expected = expected or _kinds(last)
            last = group
        watched.reraise()
        if not end.truncated:
            end.truncated = _after_the_end(watched)
    whole = True
    if last is not None:
        cut = any(member.data is None and member.size_bytes <= MAX_MEMBER_BYTES for member in last.members.values())
        expected = expected or {"image", "txt" if unit.extra.class_captions is None else "cls"}
        whole = not end.truncated or (not cut and expected <= _kinds(last))
        if whole:
            yield from _samples(unit, last, table)
        else:
            sample = _metadata(Sample(last.key), unit.settings, last, table.get(last.key))
            yield replace(sample, error=None).failed("truncated_tar", end.truncated or "")
    if end.truncated and whole and not table:
        after = f"after sample {last.key}" if last else "no sample before"
        yield Sample("").failed("truncated_tar", f"{end.truncated}; {after}")


def _groups(members: Iterator[Member], end: TarEnd) -> Iterator[_Group]:
    seen: set[str] = set()
    group: _Group | None = None
    for member in members:
        name = member.name.removeprefix("./")
        kind = extension(name)
        if not kind or storage.is_hidden(name):
            continue
        key = name[: -len(kind) - 1]
        folder, _, base = key.rpartition("/")
        first = f"{folder}/{base.split('.')[0]}" if folder else base.split(".")[0]
        if group is not None and key != group.key and first == group.key:
            continue  # a.seg.png beside a.jpg
        if group is None or key != group.key or kind in group.members:
            if group is not None:
                yield group
            group = _Group(key, repeated=key in seen)
            seen.add(key)
        group.members[kind] = member if kind in READ_EXTENSIONS else replace(member, data=b"")
    if group is not None:
        yield group


def _kinds(group: _Group) -> set[str]:
    return {"image" if kind in IMAGE_EXTENSIONS else kind for kind in group.members}


def _metadata(sample: Sample, settings: Settings, group: _Group, row: Mapping[str, Any] | None) -> Sample:
    values: dict[str, Any] = dict(row or {})
    member = group.members.get("json")
    if member is not None and member.data is not None:
        try:
            values |= parse_json(member.data)
        except ValueError as error:
            sample = sample.failed("bad_metadata", f"{group.key}.json: {error}")
    return with_metadata(sample, settings, values)


def _samples(unit: Unit, group: _Group, table: Mapping[str, Mapping[str, Any]]) -> Iterator[Sample]:
    """One sample a caption."""
    sample = Sample(group.key)
    if group.repeated:
        sample = sample.failed("repeated_key", "an earlier sample of the archive has this key")
    kind = next((kind for kind in group.members if kind in IMAGE_EXTENSIONS), None)
    if kind is None:
        sample = sample.failed("missing_image", f"only {', '.join(f'.{kind}' for kind in group.members)}")
    elif kind in UNREAD_EXTENSIONS:
        sample = sample.failed("unsupported_format", f".{kind} is not read here")
    else:
        member = group.members[kind]
        if member.data is None or member.size_bytes > MAX_IMAGE_BYTES:
            sample = sample.failed("too_many_bytes", f"{member.size_bytes} bytes, at most {MAX_IMAGE_BYTES}")
        else:
            sample = replace(sample, image=member.data)
    sample = _metadata(sample, unit.settings, group, table.get(group.key))
    yield from with_captions(sample, _caption(unit, group, table.get(group.key)))


def _caption(unit: Unit, group: _Group, row: Mapping[str, Any] | None) -> Any:
    """The raw caption, or a list of them; None where there is none."""
    classes = unit.extra.class_captions
    if classes is not None:
        member = group.members.get("cls")
        text = (member.data or b"").strip() if member else b""
        return classes[int(text)] if text.isdigit() and len(text) < 10 and int(text) < len(classes) else None
    if unit.settings.caption_column is None and "txt" in group.members:
        data = group.members["txt"].data
        if unit.settings.layout != "clip_benchmark" or data is None:
            return None if data is None else file_text(data)
        try:
            return data.decode("utf-8").splitlines() or None
        except UnicodeDecodeError:
            return data
    name = unit.settings.caption_column or "caption"
    member = group.members.get("json")
    if member is not None and member.data is not None:
        try:
            values = parse_json(member.data)
        except ValueError:
            values = {}
        if name in values:
            return values[name]
    return row.get(name) if row else None


def _status_rows(path: str, settings: Settings) -> dict[str, dict[str, Any]]:
    """{key: row} of img2dataset's parquet, {} of another parquet. Raises UnreadableError when it is broken."""
    named = [settings.caption_column or "caption", settings.uid_column or "uid", *settings.carry]
    wanted = [*STATUS_COLUMNS, "error_message", "url", "original_width", "original_height", *named]
    rows = {}
    with parquet_rows.opened(path) as (file, watched):
        try:
            columns = [name for name in dict.fromkeys(wanted) if name in file.schema_arrow.names]
            if not set(STATUS_COLUMNS) <= set(columns):
                return {}
            for batch in file.iter_batches(batch_size=1024, columns=columns, use_threads=False):
                for row in parquet_rows.row_dicts(batch):
                    if row["key"] is not None:
                        rows[_readable(row["key"])] = row
        except (pa.ArrowException, OSError) as error:
            watched.reraise()
            raise UnreadableError(f"can't be read: {error}") from error
    return rows


def _after_the_end(watched: Watched) -> str | None:
    """What is wrong when something follows the end mark: a wiped header, or a second archive."""
    offset_bytes = watched.tell()
    while chunk := watched.read(CHUNK_BYTES):
        if chunk.strip(b"\0"):
            return f"more data after an end mark at byte {offset_bytes}"
    return None


def _readable(value: Any) -> str:
    if isinstance(value, bytes):
        return value.decode("utf-8", "replace")
    return "no message" if value is None else str(value)
