"""Reads folders of image files with captions in `.txt` beside them, or in one table of file names and captions.

    photos/cat.jpg  photos/cat.txt  [photos/cat.json]        or captions.csv:  file_name,caption
                                                                              photos/cat.jpg,a cat on a mat

The table is a csv, tsv or jsonl with a header; a file may stand in several rows. One row of the pool per caption, in
the order of the file names. Images without a caption and captions without an image are failed rows. Without a table,
every `.txt` counts as a caption where some image has one beside it (a README.txt as well: one failed row), every
`.json` where images have only those; else such files are ignored. Nothing outside the folder is read: links that leave
it, and names with `..`, are failed rows too.
"""

from __future__ import annotations

import csv
import io
import posixpath
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pipeline.core import storage
from pipeline.core.errors import ConfigError
from stages.ingest.samples import (
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    MAX_IMAGE_BYTES,
    UNREAD_EXTENSIONS,
    Sample,
    Settings,
    Unit,
    extension,
    file_text,
    parse_json,
    with_captions,
    with_metadata,
)

FILE_COLUMNS = ("file_name", "filename", "file", "image", "image_path", "path", "name")  # looked for when none is named
CAPTION_COLUMNS = ("caption", "text", "captions", "comment", "description")
TABLE_EXTENSIONS = ("csv", "tsv", "jsonl")


@dataclass(frozen=True)
class FileEntry:
    """A file as listed. `unsafe` says why it is never opened: a link that leaves the folder, a device."""

    size_bytes: int
    stamp: str
    unsafe: str = ""
    is_folder: bool = False  # a link to a folder, which is not followed


@dataclass(frozen=True)
class ImageFile:
    """One image file of a folder (relative name), or a caption's file name without a file (`problem` says why)."""

    name: str
    size_bytes: int = 0
    text_file: str | None = None
    json_file: str | None = None
    rows: tuple[Mapping[str, Any], ...] | None = None  # of the captions table
    problem: tuple[str, str] | None = None


def units(
    name: str, settings: Settings, folder: str, files: Mapping[str, FileEntry], table: str | None, shard_size: int
) -> list[Unit]:
    """Runs of at most `shard_size` rows in the order of the file names.

    Args:
        files: what is in the folder, by relative name.
        table: the path of the captions table; None where captions stand in `.txt` files.
    """
    rows = None if table is None else read_table(table, settings)
    images = [_image_file(file, files, rows) for file in sorted(files) if extension(file) in IMAGE_EXTENSIONS]
    images += [
        ImageFile(file, rows=tuple(entries), problem=_missing(file, files))
        for file, entries in (rows or {}).items()
        if file not in files or extension(file) not in IMAGE_EXTENSIONS
    ]
    if rows is None:
        images += _lone_captions(images, files)
    images += [
        ImageFile(file, problem=("unsafe_file", entry.unsafe))
        for file, entry in sorted(files.items())
        if entry.is_folder and extension(file) not in IMAGE_EXTENSIONS
    ]
    runs = [tuple(images[start : start + shard_size]) for start in range(0, len(images), shard_size)]
    return [Unit(name, settings, "", folder, extra=run) for run in runs]


def read(unit: Unit) -> Iterator[Sample]:
    """One sample a caption."""
    for file in unit.extra:
        yield from _samples(unit, file)


def read_table(path: str, settings: Settings) -> dict[str, list[dict[str, Any]]]:
    """{file name: its rows} in the table's order; each row has its caption under "caption".

    Raises:
        ConfigError: a table that can't be read, or without the two columns: names those that it has.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    names: tuple[str, str] | None = None
    for row in _table_rows(path):
        if names is None:
            names = (
                _column(path, "image_column", settings.image_column, FILE_COLUMNS, list(row)),
                _column(path, "caption_column", settings.caption_column, CAPTION_COLUMNS, list(row)),
            )
        file = row.get(names[0])
        file = posixpath.normpath(file) if isinstance(file, str) and file else str(file)
        found.setdefault(file, []).append({**row, "caption": row.get(names[1])})
    if names is None:
        raise ConfigError(f"{path}: no rows, expected a header and captions")
    return found


def _table_rows(path: str) -> Iterator[dict[str, Any]]:
    kind = extension(path)
    if kind not in TABLE_EXTENSIONS:
        raise ConfigError(f"{path}: expected a table of captions that ends in .csv, .tsv or .jsonl")
    text = storage.read_bytes(path).decode("utf-8-sig", "surrogateescape")
    if kind == "jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield parse_json(line)
                except ValueError as error:
                    raise ConfigError(f"{path}:{number}: expected a JSON mapping ({error})") from error
        return
    csv.field_size_limit(MAX_CAPTION_BYTES)
    # An unclosed quote would swallow the rest of a csv without a word: strict says where. A tsv has no quotes.
    style: dict[str, Any] = {"strict": True} if kind == "csv" else {"delimiter": "\t", "quoting": csv.QUOTE_NONE}
    reader = csv.DictReader(io.StringIO(text, newline=""), **style)
    try:
        for row in reader:
            if None in row:
                raise ConfigError(
                    f"{path}:{reader.line_num}: more fields than the header's {len(row) - 1}; "
                    "expected quotes around a caption with a comma"
                )
            yield row
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num}: can't be read as a table: {error}") from error


def _column(path: str, setting: str, named: str | None, usual: Sequence[str], there: list[str]) -> str:
    found = [named] if named in there else [] if named else [name for name in usual if name in there]
    if len(found) == 1:
        return found[0]
    problem = f"no column {named}" if named else f"could be {' or '.join(found)}" if found else "is none of the usual"
    columns = ", ".join(str(name) for name in there).encode("utf-8", "replace").decode()[:300]
    raise ConfigError(f"{path}: {setting}: {problem}; set {setting} to one of {' '.join(columns.split())}")


def _image_file(
    name: str, files: Mapping[str, FileEntry], rows: Mapping[str, list[dict[str, Any]]] | None
) -> ImageFile:
    entry = files[name]
    stem = name[: -len(extension(name)) - 1]
    text_file, json_file = (f"{stem}.{kind}" if f"{stem}.{kind}" in files else None for kind in ("txt", "json"))
    problem: tuple[str, str] | None = None
    if extension(name) in UNREAD_EXTENSIONS:
        problem = ("unsupported_format", f".{extension(name)} is not read here")
    elif entry.size_bytes > MAX_IMAGE_BYTES:
        problem = ("too_many_bytes", f"{entry.size_bytes} bytes, at most {MAX_IMAGE_BYTES}")
    for file in filter(None, (name, text_file, json_file)):
        if files[file].unsafe:
            problem = ("unsafe_file", files[file].unsafe)
        elif file != name and files[file].size_bytes > MAX_CAPTION_BYTES:
            problem = problem or ("bad_caption", f"{file}: {files[file].size_bytes} bytes, at most {MAX_CAPTION_BYTES}")
    own_rows = None if rows is None else tuple(rows.get(name, ()))
    return ImageFile(name, entry.size_bytes, text_file, json_file, own_rows, problem)


def _lone_captions(images: Sequence[ImageFile], files: Mapping[str, FileEntry]) -> list[ImageFile]:
    """The caption files that have no image beside them, as the module says which files count as such."""
    kind = "txt" if any(image.text_file for image in images) else "json"
    used = {image.text_file if kind == "txt" else image.json_file for image in images}
    problem = ("missing_image", "a caption file without an image beside it")
    lone = sorted(file for file in files if extension(file) == kind and file not in used)
    return [ImageFile(file, problem=problem) for file in lone if used != {None}]


def _missing(name: str, files: Mapping[str, FileEntry]) -> tuple[str, str]:
    if name.startswith(("/", "..")) or storage.is_url(name):
        return "unsafe_file", "a name that leads out of the folder"
    if name in files:
        return "unsupported_format", f"{name} is no image file"
    return "missing_image", "the captions table names a file that is not in the folder"


def _samples(unit: Unit, file: ImageFile) -> Iterator[Sample]:
    sample = Sample(file.name)
    if file.problem:
        sample = sample.failed(*file.problem)
    else:
        sample = replace(sample, image=storage.read_bytes(storage.join(unit.path, file.name)))
    values: dict[str, Any] = {}
    if file.json_file and not file.problem:
        try:
            values = parse_json(storage.read_bytes(storage.join(unit.path, file.json_file)))
        except ValueError as error:
            sample = sample.failed("bad_metadata", f"{file.json_file}: {error}")
    if file.rows is not None:
        for row in file.rows:
            yield from with_captions(with_metadata(sample, unit.settings, values | row), row["caption"])
        if file.rows:
            return
        caption = None
    elif file.text_file and not file.problem:
        caption = file_text(storage.read_bytes(storage.join(unit.path, file.text_file)))
    else:
        caption = values.get(unit.settings.caption_column or "caption")
    yield from with_captions(with_metadata(sample, unit.settings, values), caption)
