"""uids as pairs of 64-bit numbers: parsing, hashing, and DataComp's subset files.

A uid is 32 hex digits. A subset file is a .npy of dtype `u8,u8` (first and last 16 digits), sorted, with a repeated
entry for a repeated sample. Arrays of uids here are [n, 2] uint64 (high, low).
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
from numpy.lib import format as npy

from pipeline.core import storage
from pipeline.core.errors import WinnowError, one_line
from stages.tensor_files import UNREADABLE

SUBSET_DTYPE = np.dtype("u8,u8")
RUN_ROWS = (
    1 << 22
)  # uids sorted in memory at once when a subset file is written: 64 MB, and as much again while sorting

_NIBBLES = np.full(256, 255, dtype=np.uint8)
for _digits in ("0123456789abcdef", "0123456789ABCDEF"):
    _NIBBLES[np.frombuffer(_digits.encode(), dtype=np.uint8)] = np.arange(16)


def parse(column: pa.ChunkedArray | pa.Array, place: str) -> np.ndarray:
    """[n, 2] uint64 of a string column of uids. Raises WinnowError naming `place` for what is not 32 hex digits."""
    if isinstance(column, pa.ChunkedArray):
        parts = [parse(chunk, place) for chunk in column.chunks]
        return np.concatenate(parts) if parts else np.empty((0, 2), dtype=np.uint64)
    lengths = np.diff(np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset :][: len(column) + 1])
    if column.null_count or (lengths != 32).any():
        wrong = next(uid for uid in column.to_pylist() if uid is None or len(uid) != 32)
        raise WinnowError(f"{place}: uid {str(wrong)[:80]}, expected 32 hex digits")
    if not len(column):
        return np.empty((0, 2), dtype=np.uint64)
    start = int(np.frombuffer(column.buffers()[1], dtype=np.int32)[column.offset])
    digits = np.frombuffer(column.buffers()[2], dtype=np.uint8, count=32 * len(column), offset=start)
    nibbles = _NIBBLES[digits].reshape(len(column), 32)
    if nibbles.max() > 15:
        wrong = column[int(np.flatnonzero((nibbles > 15).any(axis=1))[0])].as_py()
        raise WinnowError(f"{place}: uid {str(wrong)[:80]}, expected 32 hex digits")
    pairs = (nibbles[:, 0::2] << 4) | nibbles[:, 1::2]
    return pairs.view(">u8").astype(np.uint64)


def text(uids: np.ndarray) -> pa.Array:
    """[n] strings of 32 hex digits of [n, 2] uint64: what `parse` reads."""
    data = np.ascontiguousarray(uids).astype(">u8").view(np.uint8)
    digits = np.frombuffer(b"0123456789abcdef", dtype=np.uint8)
    nibbles = np.stack([digits[data >> 4], digits[data & 15]], axis=-1)
    offsets = pa.array(np.arange(len(uids) + 1, dtype=np.int32) * 32).buffers()[1]
    return pa.StringArray.from_buffers(len(uids), offsets, pa.py_buffer(nibbles.tobytes()))


def mix(values: np.ndarray) -> np.ndarray:
    """[n] uint64: splitmix64's finaliser, a bijection that spreads every bit over all others."""
    values = values ^ (values >> np.uint64(30))
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values = values ^ (values >> np.uint64(27))
    values = values * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


def hash64(uids: np.ndarray, seed: int, stream: int, copies: np.ndarray | None = None) -> np.ndarray:
    """[n] uint64, uniform: mix(mix(mix(key ^ high) ^ low) ^ copy) with key = mix of seed and stream.

    Args:
        seed: any whole number >= 0; its low 64 bits count.
        stream: a small number that keeps the uses of one seed independent.
        copies: [n] uint64, the how-many-th copy of a uid; None: 0.
    """
    key = mix(mix(np.array([(seed + 0x9E3779B97F4A7C15) % 2**64], dtype=np.uint64)) ^ np.uint64(stream))
    hashed = mix(mix(key ^ uids[:, 0]) ^ uids[:, 1])
    return mix(hashed if copies is None else hashed ^ copies)


def read_subset(path: str, place: str) -> np.ndarray:
    """[n, 2] uint64 of a subset file. Raises WinnowError naming `place` when it is no such file or not sorted."""
    expected = "expected a .npy of dtype u8,u8, sorted (DataComp's subset file)"
    try:
        with storage.open_read(path) as file:
            found = npy.read_array(file, allow_pickle=False)  # np.load also opens archives and pickles
    except UNREADABLE as error:
        raise WinnowError(f"{place} = {path}, {expected}: {one_line(error)}") from error
    if found.dtype != SUBSET_DTYPE or found.ndim != 1:
        raise WinnowError(f"{place} = {path} of dtype {found.dtype}, {expected}")
    uids = found.view(np.uint64).reshape(-1, 2)
    high, low = uids[:, 0], uids[:, 1]
    if not ((high[:-1] < high[1:]) | ((high[:-1] == high[1:]) & (low[:-1] <= low[1:]))).all():
        raise WinnowError(f"{place} = {path} is not sorted, {expected}")
    return uids


def count_in(uids: np.ndarray, subset: np.ndarray) -> np.ndarray:
    """[n] int64: how often each uid is in the sorted subset. Both columns of `subset` should be contiguous."""
    high, low = subset[:, 0], subset[:, 1]
    first = np.searchsorted(high, uids[:, 0], side="left")
    last = np.searchsorted(high, uids[:, 0], side="right")
    counts = np.zeros(len(uids), dtype=np.int64)
    step, active = 0, np.flatnonzero(first < last)
    while len(active):  # one round for each entry that shares its first 16 digits: nearly always one
        counts[active] += low[first[active] + step] == uids[active, 1]
        step += 1
        active = active[first[active] + step < last[active]]
    return counts


class SubsetWriter:
    """Collects uids in any order and writes them as one sorted subset file, in memory of RUN_ROWS uids.

    Above that, uids wait in temporary files by their leading bits (uids are hashes, so these fill evenly).
    """

    def __init__(self, max_rows: int):
        self._bits = max(0, (max_rows - 1) // RUN_ROWS).bit_length()
        self._parts: list[np.ndarray] = []
        self._folder = tempfile.TemporaryDirectory(prefix="winnow-") if self._bits else None
        self._names = (
            [os.path.join(self._folder.name, str(run)) for run in range(1 << self._bits)] if self._bits else []
        )
        self.num_rows = 0

    def add(self, uids: np.ndarray) -> None:
        """None; `uids` is [n, 2] uint64, repeated samples repeated."""
        self.num_rows += len(uids)
        if not self._folder:
            self._parts.append(uids)
            return
        bucket = uids[:, 0] >> np.uint64(64 - self._bits)
        for index in np.unique(bucket):
            with open(self._names[index], "ab") as file:
                uids[bucket == index].tofile(file)

    def write(self, path: str) -> None:
        """None; the subset file is there, whole, when this returns."""
        with storage.write_file(path) as temporary, open(temporary, "wb") as file:
            header = {"descr": [("f0", "<u8"), ("f1", "<u8")], "fortran_order": False, "shape": (self.num_rows,)}
            np.lib.format.write_array_header_1_0(file, header)
            for run in self._runs():
                _sorted(run).tofile(file)
        if self._folder:
            self._folder.cleanup()

    def _runs(self) -> Iterable[np.ndarray]:
        if not self._folder:
            yield np.concatenate(self._parts) if self._parts else np.empty((0, 2), dtype=np.uint64)
        for name in self._names:
            if os.path.exists(name):
                yield np.fromfile(name, dtype=np.uint64).reshape(-1, 2)


def _sorted(uids: np.ndarray) -> np.ndarray:
    # Big-endian 16-byte strings sort like the pairs, and several times faster than dtype u8,u8.
    keys = np.ascontiguousarray(uids.astype(">u8")).view("S16").reshape(-1)
    keys.sort()
    return keys.view(">u8").astype("<u8")
