"""Reading and writing files by path or URL (fsspec), atomically.

A path is a local path or an fsspec URL (`s3://bucket/key`). Files appear whole or not at all: locally a temporary
file beside the target and `os.replace`, on an object store one PUT. S3 credentials and endpoint come from the
environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...) as boto reads them: never from the config.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from typing import Any, BinaryIO

import fsspec

from pipeline.core.errors import WinnowError

CHUNK_BYTES = 8 << 20
TEMPORARY_MARK = ".tmp-"  # files with this in their name are leftovers of a killed process, never data


def is_url(path: str) -> bool:
    """True for `s3://...` and the like, False for a local path."""
    return "://" in path


def absolute(path: str) -> str:
    """The path made absolute, `~` expanded; URLs are returned without a trailing slash."""
    if is_url(path):
        return path.rstrip("/")
    return os.path.abspath(os.path.expanduser(path))


def join(path: str, *names: str) -> str:
    """The path of a file below a folder, for local paths and URLs alike."""
    return "/".join([path.rstrip("/"), *names])


def name_of(path: str) -> str:
    """The last component of a path or URL."""
    return path.rstrip("/").rsplit("/", 1)[-1]


def _filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    fs, inner = fsspec.core.url_to_fs(path)
    return fs, inner


def exists(path: str) -> bool:
    """True when a file or folder is there."""
    if not is_url(path):
        return os.path.exists(path)
    fs, inner = _filesystem(path)
    fs.invalidate_cache()
    return fs.exists(inner)


def is_folder(path: str) -> bool:
    """True when the path is a folder (on an object store: a prefix with something below it)."""
    if not is_url(path):
        return os.path.isdir(path)
    fs, inner = _filesystem(path)
    fs.invalidate_cache()
    return fs.isdir(inner)


def size_bytes(path: str) -> int:
    """The file's size in bytes."""
    if not is_url(path):
        return os.path.getsize(path)
    fs, inner = _filesystem(path)
    fs.invalidate_cache()
    return int(fs.size(inner))


def stamp(path: str) -> str:
    """A string that changes when the file does: the store's etag, else the modification time in ns."""
    if not is_url(path):
        return str(os.stat(path).st_mtime_ns)
    fs, inner = _filesystem(path)
    fs.invalidate_cache()
    info = fs.info(inner)
    return str(info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or "")


def list_files(path: str, recursive: bool = False) -> list[str]:
    """Sorted paths relative to the folder, of the files in it (below it when recursive). Empty when it is missing."""
    if not is_url(path):
        if not os.path.isdir(path):
            return []
        if not recursive:
            return sorted(entry.name for entry in os.scandir(path) if entry.is_file())
        found = []
        for folder, _, names in os.walk(path):
            below = os.path.relpath(folder, path)
            found += [name if below == "." else f"{below}/{name}".replace(os.sep, "/") for name in names]
        return sorted(found)
    fs, inner = _filesystem(path)
    fs.invalidate_cache()
    inner = inner.rstrip("/")
    try:
        found = fs.find(inner, maxdepth=None if recursive else 1)
    except FileNotFoundError:
        return []
    return sorted(file[len(inner) + 1 :] for file in found if len(file) > len(inner) + 1)


def list_folders(path: str) -> list[str]:
    """Sorted names of the folders directly inside a folder."""
    if not is_url(path):
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []
    fs, inner = _filesystem(path)
    fs.invalidate_cache()
    try:
        entries = fs.ls(inner, detail=True)
    except FileNotFoundError:
        return []
    return sorted(name_of(entry["name"]) for entry in entries if entry["type"] == "directory")


def glob(pattern: str) -> list[str]:
    """Sorted full paths that match a pattern (`*`, `?`, `[..]`, `**`), for local paths and URLs."""
    fs, inner = _filesystem(pattern)
    if is_url(pattern):
        fs.invalidate_cache()
        return sorted(fs.unstrip_protocol(path) for path in fs.glob(inner))
    return sorted(fs.glob(inner))


def open_read(path: str) -> BinaryIO:
    """An open binary file; random access works for local files and object stores."""
    if not is_url(path):
        return open(path, "rb")
    fs, inner = _filesystem(path)
    return fs.open(inner, "rb", cache_type="readahead", block_size=CHUNK_BYTES)


def read_bytes(path: str) -> bytes:
    """The whole file."""
    with open_read(path) as file:
        return file.read()


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes start..stop of the file, by one range request on an object store."""
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)
    fs, inner = _filesystem(path)
    return fs.cat_file(inner, start=start, end=stop)


def read_json(path: str) -> Any:
    """The parsed JSON file. Raises WinnowError naming the file when it is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise WinnowError(f"{path}: expected JSON ({error})") from error


def write_bytes(path: str, data: bytes) -> None:
    """None; the file is there, whole, when this returns."""
    if is_url(path):
        fs, inner = _filesystem(path)
        fs.pipe_file(inner, data)
        return
    with write_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def write_json(path: str, value: Any) -> None:
    """None; writes readable JSON with sorted keys, so equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


@contextlib.contextmanager
def write_file(path: str) -> Iterator[str]:
    """A local temporary path to write to; published under `path` when the block ends without an error."""
    if is_url(path):
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
            temporary = os.path.join(folder, name_of(path))
            yield temporary
            fs, inner = _filesystem(path)
            fs.put_file(temporary, inner)
        return
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    temporary = f"{path}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}"
    try:
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(temporary)


@contextlib.contextmanager
def local_folder(path: str) -> Iterator[str]:
    """A local folder with the same files: the folder itself, or a temporary copy of one on an object store."""
    if not is_url(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        for name in list_files(path, recursive=True):
            target = os.path.join(folder, *name.split("/"))
            os.makedirs(os.path.dirname(target), exist_ok=True)
            with open(target, "wb") as file:
                file.write(read_bytes(join(path, name)))
        yield folder


def delete(path: str) -> None:
    """None; removes a file or a whole folder; nothing there is no error."""
    if not is_url(path):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        return
    fs, inner = _filesystem(path)
    fs.invalidate_cache()
    if fs.exists(inner):
        fs.rm(inner, recursive=True)


def sha256_file(path: str) -> str:
    """The file's sha256 as 64 hex digits."""
    digest = hashlib.sha256()
    with open_read(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()


def free_bytes(path: str) -> int | None:
    """Free space in bytes where a local path would be written; None on an object store."""
    if is_url(path):
        return None
    while not os.path.exists(path):
        path = os.path.dirname(path) or "."
    return shutil.disk_usage(path).free


def check_writable(path: str, place: str) -> None:
    """None. Raises WinnowError naming `place` when nothing can be written below the folder."""
    probe = join(path, f".winnow{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except Exception as error:  # every store has its own error classes; all mean the same to the user
        raise WinnowError(f"{place} = {path}, expected a folder that can be written: {error}") from error
