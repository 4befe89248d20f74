"""The ledger: which entry of the train set is in which step, decided before the first one and checkable after the last.

A pure function of (number of entries N, samples seen, global batch, seed, chunk size), the same for any number of
ranks, loader threads and restarts:

- Pass p turns the N entries by phase(p) places and cuts them into chunks of c; a permutation seeded by (seed, p) says
  in which order the chunks are visited. The passes, one after another, are cut into global batches; the last batch is
  what the budget leaves. So the budget is exact and every entry is seen floor or ceil(samples_seen / N) times.
- Inside a pass no entry comes twice. In a batch that spans the end of pass p - 1 and the start of pass p, entries of
  pass p that the batch has already move behind the first fresh ones, into the next batch. With N >= global batch no
  batch holds an entry twice; below that repeats can't be avoided.

Randomness is splitmix64 of the arguments (Steele et al. 2014), and the permutation an 8-round Feistel network with
cycle walking: no generator state, no library whose streams may change. Cost of `batch`: time and memory of one batch;
a train set below two global batches also replays its pass boundaries up to the step, once.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pipeline.core.errors import WinnowError

VERSION = 1  # bump when the same arguments give another order

LEDGER_FILE = "ledger.json"  # to_json() and the digest of the train set's index, in a finished training's folder
ARGUMENTS = ("num_entries", "samples_seen", "global_batch_size", "seed", "chunk_size")
KEY_STREAM, PHASE_STREAM = 1, 2
FEISTEL_ROUNDS = 8
_MASK = (1 << 64) - 1


@dataclass(frozen=True)
class Ledger:
    """The order of one training: see the module's text. Not for several threads at once: it keeps the last pass."""

    num_entries: int
    samples_seen: int
    global_batch_size: int
    seed: int
    chunk_size: int
    _head_of: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)  # of the last pass asked

    def __post_init__(self) -> None:
        for name in ("num_entries", "samples_seen", "global_batch_size", "chunk_size"):
            if getattr(self, name) < 1:
                raise WinnowError(f"ledger: {name} = {getattr(self, name)}, expected at least 1")

    def to_json(self) -> dict[str, Any]:
        """The arguments as plain values, with the version of the rules: enough to recompute every batch."""
        return {"version": VERSION, **{name: getattr(self, name) for name in ARGUMENTS}}

    @classmethod
    def from_json(cls, record: Mapping[str, Any], place: str) -> Ledger:
        """The ledger of a record that to_json made; other fields are ignored. Raises WinnowError that names `place`."""
        version = record.get("version") if isinstance(record, Mapping) else None
        if version != VERSION:
            raise WinnowError(f"{place}: version = {version}, expected {VERSION}: another order than this code's")
        for name in ARGUMENTS:
            if type(record.get(name)) is not int:
                raise WinnowError(f"{place}: {name} = {record.get(name)}, expected a whole number")
        return cls(**{name: record[name] for name in ARGUMENTS})

    @property
    def num_steps(self) -> int:
        """Number of batches, a last partial one included."""
        return -(-self.samples_seen // self.global_batch_size)

    def batch_size(self, step: int) -> int:
        """Entries in the batch of a step (0 is the first): the global batch size, or for the last what is left."""
        if not 0 <= step < self.num_steps:
            raise WinnowError(f"ledger: step = {step}, expected 0 <= step < {self.num_steps}")
        return min(self.global_batch_size, self.samples_seen - step * self.global_batch_size)

    def batch(self, step: int) -> np.ndarray:
        """[batch_size(step)] int64 entries of the train set, in the order of the batch."""
        start = step * self.global_batch_size
        stop = start + self.batch_size(step)
        parts = []
        while start < stop:
            pass_index, first = divmod(start, self.num_entries)
            last = min(self.num_entries, first + stop - start)
            parts.append(self._entries(pass_index, first, last))
            start += last - first
        return np.concatenate(parts)

    def times_seen(self) -> np.ndarray:
        """[num_entries] int64: how often the whole training sees each entry."""
        passes, rest = divmod(self.samples_seen, self.num_entries)
        counts = np.full(self.num_entries, passes, np.int64)
        counts[self._entries(passes, 0, rest)] += 1
        return counts

    def _entries(self, pass_index: int, start: int, stop: int) -> np.ndarray:
        """Entries at positions start..stop of one pass."""
        if start >= self.global_batch_size:  # a head is never longer than a batch
            return self._chunked(pass_index, start, stop)
        head = self._head(pass_index)
        if stop <= len(head):
            return head[start:stop]
        return np.concatenate([head[start:], self._chunked(pass_index, max(start, len(head)), stop)])

    def _head(self, pass_index: int) -> np.ndarray:
        """The first entries of a pass, as far as their order gives way to the batch that the pass before began."""
        if self.num_entries < self.global_batch_size:
            return np.empty(0, np.int64)
        if pass_index not in self._head_of:
            first = pass_index
            if self.num_entries < 2 * self.global_batch_size:
                # The end of the pass before may lie in its own head, which needs the one before it, and so on.
                first = 1 + max((known for known in self._head_of if known < pass_index), default=-1)
            for index in range(first, pass_index + 1):
                head = self._fresh_first(index)
                self._head_of.clear()
                self._head_of[index] = head
        return self._head_of[pass_index]

    def _fresh_first(self, pass_index: int) -> np.ndarray:
        taken = pass_index * self.num_entries % self.global_batch_size  # places of the batch that are filled already
        if not taken:
            return np.empty(0, np.int64)
        before = self._entries(pass_index - 1, self.num_entries - taken, self.num_entries)
        order = self._chunked(pass_index, 0, self.global_batch_size)
        fresh = ~np.isin(order, before)
        missing = self.global_batch_size - taken
        length = int(np.flatnonzero(fresh)[missing - 1]) + 1
        order, fresh = order[:length], fresh[:length]
        return np.concatenate([order[fresh], order[~fresh]])

    def _chunked(self, pass_index: int, start: int, stop: int) -> np.ndarray:
        """Entries at positions start..stop of a pass in the order of its permuted chunks alone."""
        if start >= stop:
            return np.empty(0, np.int64)
        size, num_chunks = self.chunk_size, -(-self.num_entries // self.chunk_size)
        key = random_bits(self.seed, KEY_STREAM, pass_index)
        phase = random_bits(self.seed, PHASE_STREAM, pass_index) % self.num_entries
        # The last chunk lacks `short` entries; behind its place in the order everything comes that much earlier.
        short = num_chunks * size - self.num_entries
        short_place = _place_of_last(num_chunks, key)
        first, last = (
            position // size if position < (short_place + 1) * size - short else (position + short) // size
            for position in (start, stop - 1)
        )
        chunks = _permute(np.arange(first, last + 1), num_chunks, key)
        turned = (chunks[:, None] * size + np.arange(size)).reshape(-1)
        turned = turned[turned < self.num_entries]
        begin = first * size - (short if first > short_place else 0)
        return (turned[start - begin : stop - begin] + phase) % self.num_entries


def rank_slice(batch_size: int, rank: int, world_size: int) -> tuple[int, int]:
    """(first, last) positions of a batch that belong to a rank; the ranks' slices cover it in order, sizes +-1."""
    return batch_size * rank // world_size, batch_size * (rank + 1) // world_size


def random_bits(*values: int) -> int:
    """64 random bits that are a pure function of the integers: a chain of splitmix64."""
    state = 0
    for value in values:
        state = (state + value + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state


def _mix(state: np.ndarray) -> np.ndarray:
    """splitmix64's output for each uint64 state."""
    state = state + np.uint64(0x9E3779B97F4A7C15)
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _round_keys(key: int) -> list[np.uint64]:
    return [np.uint64(random_bits(key, index)) for index in range(FEISTEL_ROUNDS)]


@functools.lru_cache(maxsize=64)
def _place_of_last(size: int, key: int) -> int:
    """Where the permutation puts size - 1."""
    return int(_permute(np.array([size - 1]), size, key, inverse=True)[0])


def _permute(places: np.ndarray, size: int, key: int, inverse: bool = False) -> np.ndarray:
    """[K] int64 images of the places under the permutation of range(size) that the key decides."""
    half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
    mask, shift = np.uint64((1 << half_bits) - 1), np.uint64(half_bits)
    round_keys = _round_keys(key)
    found = places.astype(np.uint64)
    outside = np.ones(len(found), bool)
    while outside.any():  # walk each cycle until it is back inside
        left, right = found[outside] >> shift, found[outside] & mask
        for round_key in reversed(round_keys) if inverse else round_keys:
            if inverse:
                left, right = right ^ (_mix(left ^ round_key) & mask), left
            else:
                left, right = right, left ^ (_mix(right ^ round_key) & mask)
        found[outside] = (left << shift) | right
        outside = found >= np.uint64(size)
    return found.astype(np.int64)
