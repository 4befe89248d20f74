"""The exact k-th smallest of keys that are too many to hold: histograms of 16 bits a pass, then the rest in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

COLLECT_ROWS = 4_000_000  # once this few keys share the cuts' buckets they are collected: 32 MB a word
DIGIT_BITS = 16


@dataclass(frozen=True)
class Cut:
    """The k-th smallest key by its words, how many keys are smaller, and how many equal it."""

    words: tuple[int, ...]
    num_smaller: int
    num_equal: int

    @property
    def key(self) -> int:
        """The first word: the whole key where there is one."""
        return self.words[0]


@dataclass
class _Bucket:
    """The keys whose first digits are `words` (each as far as it is known): those in which some of the cuts lie."""

    words: tuple[int, ...]
    ranks: list[int]
    num_smaller: int
    num_inside: int


class Cuts:
    """The k-th smallest keys for several k at once. All keys are added anew in every pass, until it is `done`.

    Two to five passes for keys of one word, of which two or three are the rule: histograms, and collecting what falls
    into the buckets of the cuts. Memory: 0.5 MB a histogram, one for each different bucket, and the collected keys.
    """

    def __init__(
        self,
        ranks: Callable[[int], Iterable[int]],
        bits: Sequence[int] = (64,),
        collect_rows: int | None = None,
    ):
        """
        Args:
            ranks: each k (from 1, at most the number of keys) from the number of keys, known after the first pass.
            bits: how many of each word's bits are in use, multiples of 16; the first word counts most.
            collect_rows: so many keys are held in memory, over all cuts; None: COLLECT_ROWS.
        """
        self.num_keys = 0
        self.found: dict[int, Cut] = {}  # by k
        self.done = False
        self._ranks = ranks
        self._bits = tuple(bits)
        self._collect_rows = COLLECT_ROWS if collect_rows is None else collect_rows
        self._word, self._shift = 0, self._bits[0] - DIGIT_BITS  # of the digit that this pass counts
        self._buckets = [_Bucket((0,), [], 0, 0)]
        self._counts = [np.zeros(1 << DIGIT_BITS, np.int64)]
        self._collected: list[list[np.ndarray]] | None = None  # of each bucket, in the last pass
        self._is_first = True

    def add(self, *words: np.ndarray) -> None:
        """None; `words` are [n] uint64 each, as many as `bits`. Words that this pass does not need may be left out."""
        if self._is_first:
            self.num_keys += len(words[0])
        for index, bucket in enumerate(self._buckets):
            inside = self._inside(bucket, words)
            if self._collected is not None:
                self._collected[index].append(np.stack([word[inside] for word in words], axis=1))
            else:
                digits = (words[self._word][inside] >> np.uint64(self._shift)) & np.uint64((1 << DIGIT_BITS) - 1)
                self._counts[index] += np.bincount(digits.astype(np.int64), minlength=1 << DIGIT_BITS)

    @property
    def num_words(self) -> int:
        """How many words `add` needs in this pass."""
        return len(self._bits) if self._collected is not None else self._word + 1

    def _inside(self, bucket: _Bucket, words: Sequence[np.ndarray]) -> slice | np.ndarray:
        """Which keys are in the bucket."""
        inside: slice | np.ndarray = slice(None)
        for number, value in enumerate(bucket.words):
            shift = 0 if number < self._word else self._shift + DIGIT_BITS
            if shift < self._bits[number]:
                same = words[number] >> np.uint64(shift) == np.uint64(value)
                inside = same if isinstance(inside, slice) else inside & same
        return inside

    def end_pass(self) -> None:
        """None; all keys were added once more. Afterwards it is done, or wants them again."""
        if self._is_first:
            self._is_first = False
            self._buckets[0].ranks = sorted(set(self._ranks(self.num_keys)))
        if self._collected is not None:
            for bucket, parts in zip(self._buckets, self._collected, strict=True):
                self._finish(bucket, np.concatenate(parts))
            self._collected, self.done = None, True
            return
        self._buckets = [
            inner
            for bucket, counts in zip(self._buckets, self._counts, strict=True)
            for inner in self._narrowed(bucket, counts)
        ]
        if self._shift == 0 and self._word == len(self._bits) - 1:
            for bucket in self._buckets:
                cut = Cut(bucket.words, bucket.num_smaller, bucket.num_inside)
                self.found |= dict.fromkeys(bucket.ranks, cut)
            self._counts, self.done = [], True
        elif not self._buckets:
            self._counts, self.done = [], True
        elif sum(bucket.num_inside for bucket in self._buckets) <= self._collect_rows:
            self._counts, self._collected = [], [[] for _ in self._buckets]
        else:
            self._next_digit()
            self._counts = [np.zeros(1 << DIGIT_BITS, np.int64) for _ in self._buckets]
        if self._collected is not None:  # what _inside compares is the digit that was counted last
            self._next_digit()

    def _next_digit(self) -> None:
        self._shift -= DIGIT_BITS
        if self._shift < 0 and self._word + 1 < len(self._bits):
            self._word += 1
            self._shift = self._bits[self._word] - DIGIT_BITS
            for bucket in self._buckets:
                bucket.words = (*bucket.words, 0)

    def _narrowed(self, bucket: _Bucket, counts: np.ndarray) -> list[_Bucket]:
        """The buckets of one digit more in which the bucket's cuts lie."""
        found: dict[int, _Bucket] = {}
        reached = bucket.num_smaller + np.cumsum(counts)
        for rank in bucket.ranks:
            digit = int(np.searchsorted(reached, rank))
            if digit not in found:
                inside = int(counts[digit])
                words = (*bucket.words[:-1], (bucket.words[-1] << DIGIT_BITS) | digit)
                found[digit] = _Bucket(words, [], int(reached[digit]) - inside, inside)
            found[digit].ranks.append(rank)
        return list(found.values())

    def _finish(self, bucket: _Bucket, keys: np.ndarray) -> None:
        """None; the cuts of a bucket from all of its keys, [n, words]."""
        ordered = keys[np.lexsort(keys.T[::-1])] if keys.shape[1] > 1 else np.sort(keys, axis=0)
        for rank in bucket.ranks:
            key = ordered[rank - bucket.num_smaller - 1]
            equal = np.flatnonzero((ordered == key).all(axis=1))
            smaller = bucket.num_smaller + int(equal[0])
            self.found[rank] = Cut(tuple(map(int, key)), smaller, len(equal))


def kth_smallest(keys: Callable[[], Iterable[np.ndarray]], k: int) -> Cut:
    """The cut at the k-th smallest key (from 1); there must be at least k.

    Args:
        keys: gives all keys as [n] uint64 arrays, anew for every pass.
    """
    cuts = Cuts(lambda num_keys: [k])
    while not cuts.done:
        for part in keys():
            cuts.add(part)
        cuts.end_pass()
    return cuts.found[k]


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


def values_of_keys(keys: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """[n] the values that descending_keys made the keys of; 0.0 for -0.0."""
    sign, bits = np.uint64(1 << 63), ~keys
    bits = np.where(bits & sign, bits ^ sign, ~bits) if dtype.kind == "f" else bits ^ sign
    return (bits >> np.uint64(64 - 8 * dtype.itemsize)).astype(f"u{dtype.itemsize}").view(dtype)
