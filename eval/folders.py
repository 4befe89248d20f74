"""Tasks that are no tars: a folder of images for each class, and images with captions in a table. Users' own tasks.

    birds/tench/1.jpg                    a sub-folder of images a class; its name is the class, `_` read as a space
    photos/captions.csv                  filename,caption
    photos/trips/7.jpg                   trips/7.jpg,"a boat, far away"          several lines an image allowed
    photos.parquet                       image (bytes, or struct<bytes, ..>), caption (text, or a list of texts)

Their shards are no files but runs of FILES_A_SHARD images, named `0`, `1`, .. in the order of the file names, or the
parquet files themselves. The item of an image is its path below the folder, of a parquet's row `file/row`.

This module is light, as eval.tasks is: it imports no torch and no numpy.
"""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pipeline.core import storage
from pipeline.core.errors import ConfigError, WinnowError
from pipeline.core.images import EXTENSIONS
from pipeline.core.storage import FileEntry

FILES_A_SHARD = 4096
READERS = 16  # files read side by side: on an object store each is a request
ROWS_A_READ = 256  # of a parquet file at once
MAX_TEXT_BYTES = 16 << 20  # of one field of a table
CAPTIONS_FILE = "captions.csv"
FILE_COLUMN, CAPTION_COLUMN = "filename", "caption"
IMAGE_COLUMN = "image"


def list_images(folder: str) -> dict[str, FileEntry]:
    """{path below the folder: entry} of all files, by name; hidden ones (`.DS_Store`, `__MACOSX/`) are left out."""
    files: dict[str, FileEntry] = {}
    if storage.is_url(folder):
        files = storage.list_entries(folder, recursive=True)
    else:
        for name in storage.list_files(folder, recursive=True):
            status = os.stat(storage.join(folder, name))
            files[name] = FileEntry(status.st_size, str(status.st_mtime_ns))
    hidden = (".", "__MACOSX")
    return {
        name: files[name]
        for name in sorted(files)
        if name and not any(part.startswith(hidden) or not part for part in name.split("/"))
    }


def is_image(name: str) -> bool:
    """True when the name ends as one of the image formats that are read."""
    return posixpath.splitext(name)[1][1:].lower() in EXTENSIONS


def class_folders(folder: str, place: str) -> tuple[str, ...]:
    """The sub-folders that hold images, sorted. Raises ConfigError for a file that belongs to no class or no image."""
    found = set()
    for name in list_images(folder):
        first, slash, _ = name.partition("/")
        if slash and is_image(name):
            found.add(first)
        elif is_image(name):
            raise ConfigError(f"{place}: {folder}/{name} lies beside the classes' folders, expected it in one of them")
        elif slash:
            raise ConfigError(f"{place}: {folder}/{name} is no image, expected nothing else in a class's folder")
    return tuple(sorted(found))


def read_rows(path: str, columns: Sequence[str]) -> Iterator[tuple[int, dict[str, str]]]:
    """(line, {column: text}) of each row of a csv with a header, in UTF-8.

    Raises:
        ConfigError: `file:line`, where a column is missing, a row has other fields than the header, or it is no csv.
    """
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: expected text in UTF-8 ({error})") from error
    except OSError as error:
        raise WinnowError(f"{path}: can't be read: {error}") from error
    csv.field_size_limit(MAX_TEXT_BYTES)
    # an unclosed quote would swallow the rest of the file without a word: strict says where
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        there = reader.fieldnames or []
        missing = [column for column in columns if column not in there]
        if missing:
            raise ConfigError(f"{path}:1: no column {', '.join(missing)}, expected a header with {', '.join(columns)}")
        for row in reader:
            if None in row or None in row.values():
                raise ConfigError(
                    f"{path}:{reader.line_num}: expected {len(there)} fields as in the header, and quotes around a "
                    "text with a comma"
                )
            yield reader.line_num, row
    except csv.Error as error:
        raise ConfigError(f"{path}:{reader.line_num + 1}: expected comma-separated values ({error})") from error


def read_captions(folder: str, table: str, files: Mapping[str, FileEntry]) -> dict[str, list[str]]:
    """{image file: its captions, in the table's order}, by name. Raises ConfigError with `file:line`.

    Args:
        files: of list_images; an image that no line names is not part of the task.
    """
    path = storage.join(folder, table)
    captions: dict[str, list[str]] = {}
    for line, row in read_rows(path, (FILE_COLUMN, CAPTION_COLUMN)):
        name = posixpath.normpath(row[FILE_COLUMN])
        if name not in files or not is_image(name):
            raise ConfigError(f"{path}:{line}: {FILE_COLUMN} = {name[:200]}, expected an image below {folder}")
        if not row[CAPTION_COLUMN].strip():
            raise ConfigError(f"{path}:{line}: {CAPTION_COLUMN} is blank, expected a caption")
        captions.setdefault(name, []).append(row[CAPTION_COLUMN])
    return dict(sorted(captions.items()))


def num_shards(num_images: int) -> int:
    """How many runs of FILES_A_SHARD the images make."""
    return -(-num_images // FILES_A_SHARD)


def read_run(folder: str, images: Sequence[tuple[str, Any]], shard: str) -> Iterator[tuple[str, bytes, Any]]:
    """(item, image bytes, target) of the images of one run.

    Args:
        images: (path below the folder, target) of the whole task. shard: the number of the run.
    """
    start = int(shard) * FILES_A_SHARD
    run = images[start : start + FILES_A_SHARD]
    with ThreadPoolExecutor(READERS) as pool:
        for at in range(0, len(run), READERS):
            some = run[at : at + READERS]
            data = pool.map(lambda image: storage.read_bytes(storage.join(folder, image[0])), some)
            yield from ((name, image, target) for (name, target), image in zip(some, data, strict=True))


def check_parquet(path: str) -> None:
    """None. Raises ConfigError when the file has no images with captions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with storage.open_read(path) as file:
            schema = pq.read_schema(file)
    except (pa.ArrowException, OSError) as error:
        raise ConfigError(f"{path}: expected a parquet file ({error})".replace("\n", " ")) from error
    missing = [column for column in (IMAGE_COLUMN, CAPTION_COLUMN) if column not in schema.names]
    if missing:
        raise ConfigError(
            f"{path}: no column {', '.join(missing)}, expected {IMAGE_COLUMN} (bytes) and {CAPTION_COLUMN} (text, or a "
            "list of texts)"
        )


def read_parquet(path: str, refuse: Callable[[str, str], WinnowError]) -> Iterator[tuple[str, bytes, list[str]]]:
    """(item, image bytes, captions) of each row.

    Args:
        refuse: (item, what is wrong with it) -> the error to raise.
    """
    import pyarrow.parquet as pq

    stem = storage.name_of(path).removesuffix(".parquet")
    row = 0
    with storage.open_read(path) as file:
        batches = pq.ParquetFile(file).iter_batches(ROWS_A_READ, columns=[IMAGE_COLUMN, CAPTION_COLUMN])
        for batch in batches:
            for image, caption in zip(
                *(batch[name].to_pylist() for name in (IMAGE_COLUMN, CAPTION_COLUMN)), strict=True
            ):
                item = f"{stem}/{row}"
                image = image.get("bytes") if isinstance(image, dict) else image
                captions = [caption] if isinstance(caption, str) else caption
                if not isinstance(image, bytes):
                    raise refuse(item, f"{IMAGE_COLUMN} holds no bytes, expected an image")
                if not isinstance(captions, list) or not captions or not all(isinstance(one, str) for one in captions):
                    raise refuse(item, f"{CAPTION_COLUMN} holds no text, expected at least one caption")
                yield item, image, captions
                row += 1
