"""The exact k-th smallest of keys that are too many to hold: histograms of 16 bits a pass, then the rest in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

COLLECT_ROWS = 4_000_000  # once this few keys share the cut's bucket they are collected: 32 MB
DIGIT_BITS = 16


@dataclass(frozen=True)
class Cut:
    """The k-th smallest key, how many keys are smaller, and how many equal it."""

    key: int
    num_smaller: int
    num_equal: int


def kth_smallest(keys: Callable[[], Iterable[np.ndarray]], k: int) -> Cut:
    """The cut at the k-th smallest key (from 1); there must be at least k.

    Two to five passes, of which two are the rule: a histogram, and collecting what falls into the cut's bucket.

    Args:
        keys: gives all keys as [n] uint64 arrays, anew for every pass.
    """
    prefix, shift, num_smaller = 0, 64, 0
    while True:
        shift -= DIGIT_BITS
        counts = np.zeros(1 << DIGIT_BITS, dtype=np.int64)
        for part in keys():
            counts += _histogram(part, shift, prefix)
        reached = num_smaller + np.cumsum(counts)
        digit = int(np.searchsorted(reached, k))
        inside = int(counts[digit])
        num_smaller = int(reached[digit]) - inside
        prefix = (prefix << DIGIT_BITS) | digit
        if shift == 0:
            return Cut(prefix, num_smaller, inside)
        if inside <= COLLECT_ROWS:
            break
    found = np.concatenate([part[(part >> np.uint64(shift)) == np.uint64(prefix)] for part in keys()])
    key = np.partition(found, k - num_smaller - 1)[k - num_smaller - 1]
    return Cut(int(key), num_smaller + int((found < key).sum()), int((found == key).sum()))


def _histogram(keys: np.ndarray, shift: int, prefix: int) -> np.ndarray:
    """[65536] int64: how often each 16-bit digit at `shift` occurs among the keys whose higher bits are `prefix`."""
    if shift + DIGIT_BITS < 64:
        keys = keys[(keys >> np.uint64(shift + DIGIT_BITS)) == np.uint64(prefix)]
    digits = (keys >> np.uint64(shift)) & np.uint64((1 << DIGIT_BITS) - 1)
    return np.bincount(digits.astype(np.int64), minlength=1 << DIGIT_BITS)


def descending_keys(values: np.ndarray) -> np.ndarray:
    """[n] uint64 that ascend as the values descend; equal values (0.0 and -0.0 too) give equal keys. No NaN."""
    sign = np.uint64(1 << 63)
    size_bytes = values.dtype.itemsize
    if values.dtype.kind == "f":
        values = values + values.dtype.type(0)  # turns -0.0 into 0.0
    bits = values.view(f"u{size_bytes}").astype(np.uint64) << np.uint64(64 - 8 * size_bytes)
    if values.dtype.kind == "f":
        return ~np.where(bits & sign, ~bits, bits | sign)
    return ~(bits ^ sign)
