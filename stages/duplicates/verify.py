"""Which candidates are really alike: the exact Jaccard of sets, or the agreement of signatures, bucket by bucket.

A bucket's rows are compared pair by pair, but rows that are joined already are not compared again, and equal ones
count as one: a bucket of a million times the same caption costs a million steps. A bucket of more than MOST_COMPARED
different ones is compared in runs of so many, under ORDERS orders in which like stands near like (by MinHashes of its
own), so its cost stays linear as well. Only such a bucket can lose a pair, and the record says how many there were.
"""

from __future__ import annotations

import numpy as np

from stages.compiled import Compiled
from stages.selection.uids import mix

MOST_COMPARED = 1024
ORDERS = 4


def joined_pairs(
    bucket: np.ndarray, row: np.ndarray, offsets: np.ndarray, values: np.ndarray, threshold: float, as_sets: bool
) -> tuple[np.ndarray, np.ndarray, dict[str, int]]:
    """(a, b, counts): rows that are alike, as a forest in each bucket; and {compared, cut_buckets}.

    Args:
        bucket: [n] which bucket each entry is in.
        row: [n] uint64, the entry's row in the pool.
        offsets, values: [n+1] int64 and [m] uint64: what is compared: sorted sets, or signatures.
        threshold: least similarity, in (0, 1].
        as_sets: True: Jaccard of sets; False: fraction of places of the signatures that agree.
    """
    identity = digests(offsets, values)
    order = np.lexsort((row, identity, bucket))
    bucket, identity = bucket[order], identity[order]
    same = np.zeros(len(order), dtype=bool)
    same[1:] = (bucket[1:] == bucket[:-1]) & (identity[1:] == identity[:-1])
    heads = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
    copies = np.flatnonzero(same)
    a, b = [row[order[heads[copies]]]], [row[order[copies]]]
    entries, starts = order[~same], np.flatnonzero(np.diff(bucket[~same], prepend=-1))
    sizes = np.diff(starts, append=len(entries))
    runs = [(entries, np.append(starts, len(entries)).astype(np.int64))]
    cut = sizes > MOST_COMPARED
    if cut.any():
        small = np.repeat(~cut, sizes)
        runs = [(entries[small], np.append(0, np.cumsum(sizes[~cut])).astype(np.int64))]
        for start, size in zip(starts[cut], sizes[cut], strict=True):
            runs += _runs(entries[start : start + size], offsets, values)
    compared = 0
    for members, run_starts in runs:
        left, right, done = _join(members, run_starts, offsets, values, threshold, as_sets)
        compared += done
        a.append(row[left])
        b.append(row[right])
    return np.concatenate(a), np.concatenate(b), {"compared": int(compared), "cut_buckets": int(cut.sum())}


def _runs(entries: np.ndarray, offsets: np.ndarray, values: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """A large bucket's entries in ORDERS orders, each cut into runs."""
    found = []
    for number in range(ORDERS):
        hashes = [_least_mixed(entries, offsets, values, 2 * number + part) for part in range(2)]
        ordered = entries[np.lexsort((entries, hashes[1], hashes[0]))]
        found.append((ordered, np.append(np.arange(0, len(ordered), MOST_COMPARED), len(ordered)).astype(np.int64)))
    return found


def _least_mixed(entries: np.ndarray, offsets: np.ndarray, values: np.ndarray, seed: int) -> np.ndarray:
    """[n] uint64: a MinHash of each entry's values."""
    sizes = offsets[entries + 1] - offsets[entries]
    places = np.repeat(offsets[entries] - np.append(0, np.cumsum(sizes)[:-1]), sizes) + np.arange(sizes.sum())
    mixed = mix(values[places] ^ mix(np.array([seed], dtype=np.uint64)))
    filled = np.maximum(sizes, 1)  # reduceat needs a value each
    if (sizes == 0).any():
        found = np.zeros(len(entries), dtype=np.uint64)
        found[sizes > 0] = np.minimum.reduceat(mixed, np.append(0, np.cumsum(sizes[sizes > 0])[:-1]))
        return found
    return np.minimum.reduceat(mixed, np.append(0, np.cumsum(filled)[:-1]))


def _digest_loop(offsets, values):
    found = np.empty(len(offsets) - 1, np.uint64)
    for entry in range(len(found)):
        digest = np.uint64(0x9E3779B97F4A7C15) ^ np.uint64(offsets[entry + 1] - offsets[entry])
        for at in range(offsets[entry], offsets[entry + 1]):
            digest ^= values[at]
            digest ^= digest >> np.uint64(30)
            digest *= np.uint64(0xBF58476D1CE4E5B9)
            digest ^= digest >> np.uint64(27)
            digest *= np.uint64(0x94D049BB133111EB)
            digest ^= digest >> np.uint64(31)
        found[entry] = digest
    return found


def _join_loop(members, starts, offsets, values, threshold, as_sets):
    left = np.empty(len(members), np.int64)
    right = np.empty(len(members), np.int64)
    parent = np.empty(len(members), np.int64)
    num = 0
    compared = 0
    for run in range(len(starts) - 1):
        first, last = starts[run], starts[run + 1]
        for i in range(first, last):
            parent[i] = i
            start_i, end_i = offsets[members[i]], offsets[members[i] + 1]
            size_i = end_i - start_i
            for j in range(first, i):
                top = i
                while parent[top] != top:
                    top = parent[top]
                other = j
                while parent[other] != other:
                    other = parent[other]
                parent[j] = other
                if top == other:
                    continue
                start_j, end_j = offsets[members[j]], offsets[members[j] + 1]
                size_j = end_j - start_j
                shared = 0
                union = size_i
                if as_sets:
                    if min(size_i, size_j) < threshold * max(size_i, size_j) - 1e-9:
                        continue
                    compared += 1
                    at, to = start_i, start_j
                    needed = threshold / (1 + threshold) * (size_i + size_j) - 1e-9
                    while at < end_i and to < end_j and shared + min(end_i - at, end_j - to) >= needed:
                        if values[at] == values[to]:
                            shared += 1
                            at += 1
                            to += 1
                        elif values[at] < values[to]:
                            at += 1
                        else:
                            to += 1
                    union = size_i + size_j - shared
                else:
                    compared += 1
                    for k in range(size_i):
                        shared += values[start_i + k] == values[start_j + k]
                if union == 0 or shared / union >= threshold:
                    parent[max(top, other)] = min(top, other)
                    left[num], right[num] = members[j], members[i]
                    num += 1
    return left[:num].copy(), right[:num].copy(), compared


_VALUES = 'Array(uint64, 1, "C", readonly=True)'
_INTEGERS = 'Array(int64, 1, "C", readonly=True)'
digests = Compiled(_digest_loop, f"uint64[::1]({_INTEGERS}, {_VALUES})")
_join = Compiled(
    _join_loop,
    f"Tuple((int64[::1], int64[::1], int64))({_INTEGERS}, {_INTEGERS}, {_INTEGERS}, {_VALUES}, float64, boolean)",
)
