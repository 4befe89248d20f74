"""Reading and writing files by path or URL (fsspec), atomically.

A path is a local path or an fsspec URL (`s3://bucket/key`). Files appear whole or not at all: locally a temporary
file beside the target and `os.replace`, on an object store one PUT, or one upload in parts that is given up as a whole.
S3 credentials and endpoint come from the environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...) as boto reads them:
never from the config.

With URLs every function here tries again while the store stumbles (patience.py), and raises StoreError, one line, when
it fails for good; FileNotFoundError means that the store says that there is no such file. Files from `open_read` too.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import os
import re
import shutil
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

import fsspec
from fsspec.utils import glob_translate

from pipeline.core import patience
from pipeline.core.errors import ConfigError, StoreError, WinnowError

CHUNK_BYTES = 8 << 20
BUFFER_BYTES = 64 << 10
PART_BYTES = 50 << 20  # a file of twice this size is sent to S3 in parts of this size
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
WILDCARDS = re.compile(r"[*?\[]")
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


def is_hidden(name: str) -> bool:
    """True for files that systems leave behind (`.DS_Store`, `._photo.jpg`, `__MACOSX/`): nobody means them."""
    return any((part.startswith(".") and part != ".") or part == "__MACOSX" for part in name.split("/"))


def _filesystem(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The store's filesystem, and the path as it knows it. Nothing is asked of the store."""
    # a listing kept from before another worker wrote is a file that is missing
    fs, inner = fsspec.core.url_to_fs(path, use_listings_cache=False)
    if _is_s3(fs):
        fs.retries = 1  # botocore tries again, and patience.py does; s3fs in between would multiply them
    return fs, inner


def _is_s3(fs: fsspec.AbstractFileSystem) -> bool:
    return "s3" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _ask(path: str, doing: str, request: Callable[[fsspec.AbstractFileSystem, str], Any]) -> Any:
    """What request(filesystem, inner path) returns. Raises FileNotFoundError and StoreError as `patiently` does."""

    def probe() -> None:
        fs, inner = _filesystem(path)
        if _is_s3(fs):
            bucket, key, _ = fs.split_path(inner)
            fs.call_s3("list_objects_v2", Bucket=bucket, Prefix=key, MaxKeys=1)

    return patience.patiently(path, doing, lambda: request(*_filesystem(path)), probe)


def _info(path: str) -> dict[str, Any]:
    return _ask(path, "read", lambda fs, inner: fs.info(inner))


def exists(path: str) -> bool:
    """True when a file or folder is there."""
    if not is_url(path):
        return os.path.exists(path)
    try:
        _info(path)
    except FileNotFoundError:
        return False
    return True


def is_folder(path: str) -> bool:
    """True when the path is a folder (on an object store: a prefix with something below it)."""
    if not is_url(path):
        return os.path.isdir(path)
    try:
        return _info(path)["type"] == "directory"
    except FileNotFoundError:
        return False


def size_bytes(path: str) -> int:
    """The file's size in bytes."""
    return int(_info(path)["size"]) if is_url(path) else os.path.getsize(path)


def stamp(path: str) -> str:
    """A string that changes when the file does: the store's etag, else the modification time in ns."""
    return _stamp(_info(path)) if is_url(path) else str(os.stat(path).st_mtime_ns)


def _stamp(info: dict[str, Any]) -> str:
    return str(info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or "")


@dataclass(frozen=True)
class FileEntry:
    """A file as listed: its size, and a string that changes when it does."""

    size_bytes: int
    stamp: str


def list_entries(url: str, recursive: bool = False) -> dict[str, FileEntry]:
    """{path relative to the folder: entry} of the files in a store's folder (below it when recursive), by name.

    Empty when it is missing.
    """

    def entries(fs: fsspec.AbstractFileSystem, inner: str) -> dict[str, FileEntry]:
        inner = inner.rstrip("/")
        # not find(maxdepth=1), which passes over what it can't list
        listed = fs.find(inner, detail=True).values() if recursive else fs.ls(inner, detail=True)
        files = {
            info["name"][len(inner) + 1 :]: FileEntry(int(info["size"] or 0), _stamp(info))
            for info in listed
            if info["type"] == "file" and info["name"].startswith(f"{inner}/") and not info["name"].endswith("/")
        }
        return dict(sorted(files.items()))

    try:
        return _ask(url, "listed", entries)
    except FileNotFoundError:
        return {}


def list_files(path: str, recursive: bool = False) -> list[str]:
    """Sorted paths relative to the folder, of the files in it (below it when recursive). Empty when it is missing."""
    if is_url(path):
        return list(list_entries(path, recursive))
    if not os.path.isdir(path):
        return []
    if not recursive:
        return sorted(entry.name for entry in os.scandir(path) if entry.is_file())
    found = []
    for folder, _, names in os.walk(path):
        below = os.path.relpath(folder, path)
        found += [name if below == "." else f"{below}/{name}".replace(os.sep, "/") for name in names]
    return sorted(found)


def list_sizes(path: str) -> dict[str, int]:
    """{path relative to the folder: bytes} of the files in it and below it, by name. Empty when it is missing."""
    if is_url(path):
        return {name: entry.size_bytes for name, entry in list_entries(path, recursive=True).items()}
    return {name: os.path.getsize(join(path, name)) for name in list_files(path, recursive=True)}


def list_folders(path: str) -> list[str]:
    """Sorted names of the folders directly inside a folder."""
    if not is_url(path):
        return sorted(entry.name for entry in os.scandir(path) if entry.is_dir()) if os.path.isdir(path) else []
    try:
        entries = _ask(path, "listed", lambda fs, inner: fs.ls(inner.rstrip("/"), detail=True))
    except FileNotFoundError:
        return []
    return sorted(name_of(entry["name"]) for entry in entries if entry["type"] == "directory")


def glob(pattern: str) -> list[str]:
    """Sorted full paths of what matches a pattern (`*`, `?`, `[..]`, `**`); on an object store of the files only."""
    if not is_url(pattern):
        fs, inner = _filesystem(pattern)
        return sorted(fs.glob(inner))
    parts = pattern.split("/")
    fixed = next((number for number, part in enumerate(parts) if WILDCARDS.search(part)), len(parts))
    if fixed == len(parts):
        return [pattern] if exists(pattern) else []
    if fixed < 3:
        raise WinnowError(f"{pattern}: a wildcard in the bucket's name, expected them after it")
    root = "/".join(parts[:fixed])
    matches = re.compile(glob_translate("/".join(parts[fixed:]))).match
    files = list_files(root, recursive=fixed < len(parts) - 1 or "**" in parts[-1])
    return [join(root, name) for name in files if matches(name)]


def open_read(path: str) -> BinaryIO:
    """An open binary file; random access works for local files and object stores."""
    if not is_url(path):
        return open(path, "rb")
    return io.BufferedReader(_StoreFile(path), BUFFER_BYTES)


class _StoreFile(io.RawIOBase):
    """An object that is read by range requests, each of which is tried again while the store stumbles."""

    def __init__(self, path: str):
        super().__init__()
        self._path = path
        self._at = 0
        self._file = _ask(path, "read", self._opened)
        self._size = getattr(self._file, "size", None)
        self._details = getattr(self._file, "details", {})
        if self._details.get("type") == "directory":
            raise FileNotFoundError(errno.ENOENT, "a folder, no file", path)

    @staticmethod
    def _opened(fs: fsspec.AbstractFileSystem, inner: str) -> Any:
        return fs.open(inner, "rb", cache_type="readahead", block_size=CHUNK_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        if base is None:
            raise StoreError(self._path, "read", "the store does not say how long it is")
        if base + offset < 0:
            raise ValueError(f"{self._path}: position {base + offset}, expected 0 or more")
        self._at = base + offset
        return self._at

    def readinto(self, buffer: Any) -> int:
        data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return self._read(None)

    def close(self) -> None:
        if not self.closed and self._file is not None:
            self._file.close()
        super().close()

    def _read(self, num_bytes: int | None) -> bytes:
        data = _ask(self._path, "read", functools.partial(self._read_once, num_bytes=num_bytes))
        self._at += len(data)
        return data

    def _read_once(self, fs: fsspec.AbstractFileSystem, inner: str, num_bytes: int | None) -> bytes:
        if self._file is None:  # the last try failed; what it had cached may be half of something
            file = self._opened(fs, inner)
            if _stamp(getattr(file, "details", {})) != _stamp(self._details):
                raise patience.ObjectChangedError
            self._file = file
        file, self._file = self._file, None
        file.seek(self._at)
        data = file.read(-1 if num_bytes is None else num_bytes)
        if self._size is not None:
            there = max(0, self._size - self._at)
            if len(data) != (there if num_bytes is None else min(there, num_bytes)):
                raise patience.ShortReadError
        self._file = file
        return data


def read_bytes(path: str) -> bytes:
    """The whole file."""
    if not is_url(path):
        with open(path, "rb") as file:
            return file.read()
    # not open_read: S3 sends its checksum, which botocore looks at, only with a whole object
    return _ask(path, "read", lambda fs, inner: fs.cat_file(inner))


def read_range(path: str, start: int, stop: int) -> bytes:
    """Bytes start..stop of the file, fewer where it ends before; by one range request on an object store."""
    if not is_url(path):
        with open(path, "rb") as file:
            file.seek(start)
            return file.read(stop - start)

    def read(fs: fsspec.AbstractFileSystem, inner: str) -> bytes:
        data = fs.cat_file(inner, start=start, end=stop)
        if len(data) != stop - start and start + len(data) != fs.size(inner):
            raise patience.ShortReadError
        return data

    return _ask(path, "read", read) if stop > start else b""


def read_json(path: str) -> Any:
    """The parsed JSON file. Raises WinnowError naming the file when it is not JSON."""
    try:
        return json.loads(read_bytes(path))
    except ValueError as error:
        raise WinnowError(f"{path}: expected JSON ({error})") from error


def write_bytes(path: str, data: bytes) -> None:
    """None; the file is there, whole, when this returns."""
    if is_url(path):
        _ask(path, "written", lambda fs, inner: fs.pipe_file(inner, data, **_parts(fs)))
        return
    with write_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)


def _parts(fs: fsspec.AbstractFileSystem) -> dict[str, Any]:
    """How a large file is sent. When a part fails for good, s3fs gives up the upload, and the store drops its parts."""
    return {"chunksize": PART_BYTES} if _is_s3(fs) else {}


def write_json(path: str, value: Any) -> None:
    """None; writes readable JSON with sorted keys, so equal values give equal bytes."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    write_bytes(path, (text + "\n").encode())


@contextlib.contextmanager
def write_file(path: str) -> Iterator[str]:
    """A local temporary path to write to; published under `path` when the block ends without an error.

    Raises:
        WinnowError: the disk is full, or read-only.
    """
    with _room_for(path), contextlib.ExitStack() as stack:
        if is_url(path):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="winnow-"))
            temporary = os.path.join(folder, name_of(path))
            yield temporary
            _ask(path, "written", lambda fs, inner: fs.put_file(temporary, inner, **_parts(fs)))
            return
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        temporary = f"{path}{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}"
        stack.callback(_remove, temporary)
        yield temporary
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)


@contextlib.contextmanager
def _room_for(path: str) -> Iterator[None]:
    """Errors of a disk that can take nothing, whoever met it, in one line: trying again would not help."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise WinnowError(f"{path} can't be written: {os.strerror(error.errno)}") from error


def _remove(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.remove(path)


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

    def remove(fs: fsspec.AbstractFileSystem, inner: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            fs.rm(inner, recursive=True)

    for _ in range(3):  # one request deletes many files, and s3fs does not look at what it says of each
        if not exists(path):
            return
        _ask(path, "deleted", remove)
    if exists(path):
        raise StoreError(path, "deleted", "it is still there; these credentials may lack s3:DeleteObject")


def sha256_file(path: str) -> str:
    """The file's sha256 as 64 hex digits."""
    return size_and_sha256(path)[1]


def size_and_sha256(path: str) -> tuple[int, str]:
    """(bytes, sha256 as 64 hex digits) of the file, which is read once."""
    digest, num_bytes = hashlib.sha256(), 0
    with open_read(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
            num_bytes += len(chunk)
    return num_bytes, digest.hexdigest()


def free_bytes(path: str) -> int | None:
    """Free space in bytes where a local path would be written; None on an object store."""
    if is_url(path):
        return None
    while not os.path.exists(path):
        path = os.path.dirname(path) or "."
    return shutil.disk_usage(path).free


def check_writable(path: str, place: str) -> None:
    """None. Raises ConfigError naming `place` when nothing can be written below the folder; nothing stays there."""
    probe = join(path, f".winnow{TEMPORARY_MARK}{uuid.uuid4().hex[:8]}")
    try:
        write_bytes(probe, b"")
        delete(probe)
    except StoreError as error:
        raise ConfigError(f"{place} = {path}, expected a folder that can be written: {error.cause}") from error
    except OSError as error:
        raise ConfigError(f"{place} = {path}, expected a folder that can be written: {error}") from error
