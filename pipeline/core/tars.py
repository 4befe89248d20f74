"""Tar archives: reading that notices every loss, writing that gives the same bytes for the same members.

webdataset's own reader passes silently over archives cut at a member boundary or inside a header; this one does not.
"""

from __future__ import annotations

import hashlib
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

BLOCK_BYTES = 512
MAX_MEMBER_BYTES = 1 << 30  # an archive that claims more for one member is hostile or not ours
MAX_HEADER_BYTES = 16 << 10  # of all headers before one member: its name, pax records, the map of a sparse file
MANY_DIGITS = re.compile(rb"[0-9]{300}")  # tarfile's patterns take the square of their number (CVE-2024-6232)
BROKEN = (  # what tarfile raises for a hostile header; an OSError is the store's
    tarfile.TarError,
    EOFError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    ArithmeticError,
    RecursionError,
)


@dataclass(frozen=True)
class Member:
    """One file of an archive; `data` is None where the archive ends inside it or it is above MAX_MEMBER_BYTES."""

    name: str
    offset_bytes: int
    size_bytes: int
    data: bytes | None


@dataclass
class TarEnd:
    """What was found at the end of an archive: `truncated` holds the reason, or None when it ends as it should."""

    truncated: str | None = None


class _Headers:
    """The file as tarfile sees it, which reads headers alone: `left_bytes` is what it may still read."""

    def __init__(self, file: BinaryIO):
        self._file = file
        self.left_bytes = MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        if not 0 <= size <= self.left_bytes:
            raise tarfile.HeaderError(f"headers of more than {MAX_HEADER_BYTES} bytes")
        self.left_bytes -= size
        data = self._file.read(size)
        if MANY_DIGITS.search(data):
            raise tarfile.HeaderError("a number of more than 300 digits")
        return data

    def seek(self, offset_bytes: int) -> int:
        return self._file.seek(offset_bytes)

    def tell(self) -> int:
        return self._file.tell()


def read_members(file: BinaryIO, end: TarEnd) -> Iterator[Member]:
    """The regular files of an uncompressed tar in order; `end.truncated` tells afterwards whether something is lost.

    Links, devices, folders and sparse files are passed over: nothing is ever extracted, so no member can escape. What
    is not UTF-8 in a name becomes a question mark.
    """
    headers = _Headers(file)
    try:
        archive = tarfile.open(fileobj=headers, mode="r:")  # noqa: SIM115 (closed below; the file belongs to the caller)
    except BROKEN as error:
        end.truncated = f"no readable tar header ({error})"
        return
    with archive:
        while True:
            headers.left_bytes = MAX_HEADER_BYTES
            try:
                info = archive.next()
            except BROKEN as error:
                end.truncated = f"unreadable header at byte {archive.offset} ({error})"
                return
            if info is None:
                break
            archive.members = []  # type: ignore[attr-defined]  # tarfile keeps every header otherwise
            if info.size < 0 or archive.offset <= info.offset:  # else it leads back, for ever (CVE-2025-8194)
                end.truncated = f"a negative size at byte {info.offset}"
                return
            if not info.isreg() or info.issparse():
                continue
            name = info.name.encode("utf-8", "replace").decode()
            data = None
            if info.size <= MAX_MEMBER_BYTES:
                file.seek(info.offset_data)
                data = file.read(info.size)
                if len(data) < info.size:
                    end.truncated = f"ends inside {name}"
                    yield Member(name, info.offset_data, info.size, None)
                    return
            yield Member(name, info.offset_data, info.size, data)
        # A whole archive ends with a block of zeros. tarfile stops without a word at a cut between members, too.
        file.seek(archive.offset)
        tail = file.read(BLOCK_BYTES)
        if len(tail) < BLOCK_BYTES or tail.strip(b"\0"):
            end.truncated = f"no end mark at byte {archive.offset}"


def _header(name: str, size_bytes: int) -> bytes:
    """The 512 bytes before a file's data, as tarfile makes them (ten times slower): ustar, mode 0444, all else 0."""
    encoded = name.encode("ascii", "replace")
    if len(encoded) > 100 or not name.isascii() or size_bytes >= 8**11:
        info = tarfile.TarInfo(name)
        info.size, info.mode = size_bytes, 0o444
        return info.tobuf(tarfile.USTAR_FORMAT)
    size = b"%011o" % size_bytes
    checksum = _HEADER_SUM + sum(encoded) + sum(size)
    return b"".join((encoded.ljust(100, b"\0"), _MODE_TO_SIZE, size, _MTIME, b"%06o\0 0" % checksum, _AFTER_TYPE))


_MODE_TO_SIZE = b"0000444\0" + b"0000000\0" * 2
_MTIME = b"\0" + b"00000000000\0"
_AFTER_TYPE = (b"\0" * 100 + b"ustar\x0000").ljust(355, b"\0")
_HEADER_SUM = sum(_MODE_TO_SIZE + _MTIME + b" " * 8 + b"0" + _AFTER_TYPE)  # the checksum's own field counts as blanks


class TarWriter:
    """Writes members in the order given, with no time, owner or name of a machine in them.

    `sha256` and `size_bytes` describe the file once it is closed.
    """

    def __init__(self, path: str):
        self._file = open(path, "wb")  # noqa: SIM115 (closed in close)
        self._digest = hashlib.sha256()
        self.size_bytes = 0

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self.size_bytes += len(data)

    def add(self, name: str, data: bytes) -> int:
        """The byte offset at which the member's data starts."""
        offset_bytes = self.size_bytes + BLOCK_BYTES
        self._write(b"".join((_header(name, len(data)), data, b"\0" * (-len(data) % BLOCK_BYTES))))
        return offset_bytes

    def close(self) -> None:
        """None; ends the archive with the two blocks of zeros, padded to tar's record size."""
        self._write(b"\0" * (2 * BLOCK_BYTES))
        if padding := -self.size_bytes % tarfile.RECORDSIZE:
            self._write(b"\0" * padding)
        self._file.close()

    @property
    def entry(self) -> dict:
        """{bytes, sha256} of the closed file, as an artifact's record lists it."""
        return {"bytes": self.size_bytes, "sha256": self._digest.hexdigest()}

    def __enter__(self) -> TarWriter:
        return self

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()
