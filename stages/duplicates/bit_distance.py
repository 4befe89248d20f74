"""The Hamming join: edges between rows whose 64-bit hashes differ in few bits, exactly, without comparing all pairs.

    bit_keys   partition by partition of the different hashes: (hash, row), once for each key, by key
    bit_pairs  partition by partition of these keys: edges between the hashes of a bucket that are close

Two hashes that differ in at most d bits agree in at least m - d of m blocks of bits, so they share one of C(m, d) keys,
each the bits of m - d blocks (the pigeonhole principle of multi-index hashing: Norouzi, Punjani, Fleet, "Fast Exact
Search in Hamming Space with Multi-Index Hashing", 2014). m is d + 1, and more only where a bucket would be too large
for a task. A bucket of many hashes is cut again in the same way, by those of its bits that are not all the same, in
memory: see _joined_loop.

Bytes a different hash: 16 a key; for 4 bits that are 5 keys up to 256M rows, then 15, and 35 beyond 4 billion. Memory:
about 100 bytes times PARTITION_ROWS, or times the hashes that share the most frequent key: see choose_blocks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numba
import numpy as np
from numba import uint64

from pipeline.core import exchange
from pipeline.core.passes import Pass, Passes
from stages.compiled import Compiled
from stages.duplicates.equal_keys import keyed_rows
from stages.selection import uids

PARTITION_ROWS = 2_000_000
MOST_BUCKET_ROWS = 4_000_000
COMPARED_AT_ONCE = 96  # hashes of a bucket are compared pair by pair up to so many
CUT_PAIRS = 40  # comparisons that cost as much as sorting a hash into a part of a bucket
MOST_CUT_BITS = 16


def edges(keys: Pass, num_parts: int, passes: Passes, num_rows: int, most_bits: int) -> tuple[Pass, dict[str, int]]:
    """(pass of (a, b), {compared, close}) of the rows whose hashes differ in 1 to `most_bits` bits.

    The edges are as many as it takes to connect these rows: not one for each pair.

    Args:
        keys, num_parts: the hashes: see stages.duplicates.equal_keys; of rows with the same one the lowest counts.
        num_rows: at least as many as there are different hashes.
        most_bits: 1 to 16; beyond 8 keys are many or buckets large.
    """
    num_blocks = choose_blocks(num_rows, most_bits)
    num_keys = math.comb(num_blocks, most_bits)
    parts_a_key = max(1, -(-num_rows // PARTITION_ROWS))
    sent = passes.run(
        "bit_keys",
        write_bit_keys,
        [(keys, number, num_blocks, most_bits, parts_a_key) for number in range(num_parts)],
    )
    num_tasks = max(1, -(-num_keys * num_rows // PARTITION_ROWS))
    shares = np.array_split(np.arange(num_keys * parts_a_key), num_tasks)
    items = [(sent, share.tolist(), num_blocks, most_bits, parts_a_key) for share in shares]
    pairs = passes.run("bit_pairs", write_bit_pairs, items)
    passes.drop(sent)
    return pairs, exchange.read_notes(pairs.paths)


def choose_blocks(num_rows: int, most_bits: int) -> int:
    """The fewest blocks of bits with which a bucket has up to about MOST_BUCKET_ROWS hashes.

    Bits of real pHashes go together: of 12,399 photographs' the most frequent key of b bits had a share of 1.1 %
    (b = 12), 2.5 % (9) and 5 % (7), which is less than 2^(-b / 2).
    """
    num_blocks = most_bits + 1
    while num_rows > MOST_BUCKET_ROWS << (64 // num_blocks * (num_blocks - most_bits) // 2):
        num_blocks += 1
    return num_blocks


def spread(hashes: np.ndarray, num_blocks: int) -> np.ndarray:
    """[n] uint64: the hashes with their bits dealt out to the blocks in turn, as neighbours in a pHash go together."""
    found = np.zeros_like(hashes)
    dealt = [bit for first in range(num_blocks) for bit in range(first, 64, num_blocks)]
    for to, bit in enumerate(dealt):
        found |= ((hashes >> np.uint64(bit)) & np.uint64(1)) << np.uint64(to)
    return found


class Blocks:
    """The blocks of bits of a hash that `spread` has made ready, and the keys that are made of them.

    Attributes:
        keys: of each key the blocks that it is made of, ascending.
    """

    def __init__(self, num_blocks: int, most_bits: int):
        bounds = [64 * number // num_blocks for number in range(num_blocks + 1)]
        self._widths = np.diff(bounds).tolist()
        self._shifts = bounds[:-1]
        self.keys = list(itertools.combinations(range(num_blocks), num_blocks - most_bits))

    def key_bits(self, number: int) -> int:
        """How many bits the key of this number has."""
        return sum(self._widths[block] for block in self.keys[number])

    def ahead(self, hashes: np.ndarray, number: int) -> np.ndarray:
        """[n] uint64: the hashes with the bits of one key moved to the front, the rest behind; distances stay."""
        key = self.keys[number]
        moved = np.zeros_like(hashes)
        for block in (*key, *(block for block in range(len(self._widths)) if block not in key)):
            bits = (hashes >> np.uint64(self._shifts[block])) & np.uint64((1 << self._widths[block]) - 1)
            moved = (moved << np.uint64(self._widths[block])) | bits
        return moved

    def earlier(self, number: int) -> np.ndarray:
        """[number] uint64: the bits of each earlier key, as they lie after `ahead` with this number."""
        masks = [
            sum(((1 << self._widths[block]) - 1) << self._shifts[block] for block in key) for key in self.keys[:number]
        ]
        return self.ahead(np.array(masks, dtype=np.uint64), number)


def write_bit_keys(keys: Pass, number: int, num_blocks: int, most_bits: int, parts_a_key: int, path: str) -> None:
    """None; writes (hash, row) of the partition's different hashes for each key, by number and value of the key."""
    key, row, first = keyed_rows(keys, number)
    head = row == first
    blocks = Blocks(num_blocks, most_bits)
    hashes, row = spread(key[head, 0], num_blocks), row[head]
    columns: list[list[np.ndarray]] = [[], [], []]
    for at in range(len(blocks.keys)):
        value = blocks.ahead(hashes, at) >> np.uint64(64 - blocks.key_bits(at))
        parts = exchange.by_hash(uids.mix(value), parts_a_key)
        order = np.argsort(parts, kind="stable")
        for column, values in zip(columns, (hashes, row, parts + at * parts_a_key), strict=True):
            column.append(values[order])
    hashes, row, parts = (np.concatenate(column) for column in columns)
    exchange.write(path, {"hash": hashes, "row": row}, parts)


def write_bit_pairs(
    sent: Pass, share: Sequence[int], num_blocks: int, most_bits: int, parts_a_key: int, path: str
) -> None:
    """None; writes (a, b) of rows with close hashes in these partitions of keys."""
    blocks = Blocks(num_blocks, most_bits)
    a, b, compared = [np.empty(0, np.uint64)], [np.empty(0, np.uint64)], 0
    for part in share:
        rows = exchange.read(sent.paths, part)
        if rows is not None:
            left, right, done = close_pairs(rows["hash"].to_numpy(), blocks, part // parts_a_key, most_bits)
            row = rows["row"].to_numpy()
            a.append(row[left])
            b.append(row[right])
            compared += done
    one, two = np.concatenate(a), np.concatenate(b)
    exchange.write(path, {"a": one, "b": two}, notes={"compared": compared, "close": len(one)})


def close_pairs(hashes: np.ndarray, blocks: Blocks, number: int, most_bits: int) -> tuple[np.ndarray, np.ndarray, int]:
    """(left, right, compared): places of hashes that share the key of this number and differ in few bits.

    With the pairs of all earlier keys, they connect whatever has such a pair. `compared` counts pairs.

    Args:
        hashes: [n] uint64, all different.
    """
    moved = blocks.ahead(hashes, number)
    order = np.argsort(moved)
    moved = moved[order]
    value = moved >> np.uint64(64 - blocks.key_bits(number))
    new = np.ones(len(value), dtype=bool)
    new[1:] = value[1:] != value[:-1]
    starts = np.append(np.flatnonzero(new), len(value)).astype(np.int64)
    left, right, compared = _joined(moved, starts, most_bits, blocks.earlier(number))
    return order[left], order[right], int(compared)


@numba.njit
def num_bits(word):
    """How many bits of a uint64 are set; compilers know this form as one instruction."""
    word -= (word >> uint64(1)) & uint64(0x5555555555555555)
    word = (word & uint64(0x3333333333333333)) + ((word >> uint64(2)) & uint64(0x3333333333333333))
    word = (word + (word >> uint64(4))) & uint64(0x0F0F0F0F0F0F0F0F)
    return (word * uint64(0x0101010101010101)) >> uint64(56)


@numba.njit
def _root(parent, at):
    while parent[at] != at:
        parent[at] = parent[parent[at]]
        at = parent[at]
    return at


@numba.njit
def _join(one, two, difference, parent, earlier, left, right, num):
    """The number of edges, after one more if these two were not joined yet.

    A pair that shares an earlier key is joined here without an edge: that key's bucket has connected it.
    """
    one_root, two_root = _root(parent, one), _root(parent, two)
    if one_root == two_root:
        return num
    parent[max(one_root, two_root)] = min(one_root, two_root)
    for mask in earlier:
        if difference & mask == 0:
            return num
    left[num], right[num] = one, two
    return num + 1


@numba.njit
def _join_all(hashes, places, start, end, most_bits, parent, earlier, left, right, num):
    """The number of edges, after comparing all pairs of a range."""
    for i in range(start + 1, end):
        one = hashes[i]
        for j in range(start, i):
            difference = one ^ hashes[j]
            if num_bits(difference) <= uint64(most_bits):
                num = _join(places[i], places[j], difference, parent, earlier, left, right, num)
    return num


@numba.njit
def _cut(hashes, start, end, bits, part, parts, num_bits, keys):
    """None; sets keys[start:end] to one part of the hashes: bits[part], bits[part + parts], ..., `num_bits` of them."""
    for at in range(start, end):
        key = uint64(0)
        for k in range(num_bits):
            key |= ((hashes[at] >> bits[part + k * parts]) & uint64(1)) << uint64(k)
        keys[at] = key


def _joined_loop(sorted_hashes, starts, most_bits, earlier):
    """(left, right, compared): a forest of close pairs in each bucket.

    Ranges of hashes are on a stack, first the buckets. A range of many is cut into d + 1 parts of its bits, those that
    are the same in all of it left out; for each part in turn it is sorted by that part (a counting sort), and the
    ranges of equal parts come onto the stack. Where the parts would leave as many pairs as there are, all pairs are
    compared; where no more than d bits differ, all belong together; and what is together already is left alone.
    """
    n = len(sorted_hashes)
    hashes, next_hashes = sorted_hashes.copy(), np.empty(n, np.uint64)
    places, next_places = np.arange(n), np.empty(n, np.int64)
    keys = np.empty(n, np.uint64)
    parent = np.arange(n)
    left, right = np.empty(n, np.int64), np.empty(n, np.int64)
    num = 0
    compared = 0
    ends = np.zeros((1 << MOST_CUT_BITS) + 1, np.int64)
    varying_bits = np.empty(64, np.uint64)
    parts = most_bits + 1
    stack = np.empty((64 * (n // COMPARED_AT_ONCE + 2), 3), np.int64)  # a cut fixes a bit, and leaves so many at most
    for bucket in range(len(starts) - 1):
        stack[0, 0], stack[0, 1], stack[0, 2] = starts[bucket], starts[bucket + 1], 0
        height = 1
        while height:
            height -= 1
            start, end, part = stack[height, 0], stack[height, 1], stack[height, 2]
            size = end - start
            if size <= COMPARED_AT_ONCE:
                num = _join_all(hashes, places, start, end, most_bits, parent, earlier, left, right, num)
                compared += size * (size - 1) // 2
                continue
            varying = uint64(0)
            together = True
            root = _root(parent, places[start])
            for at in range(start, end):
                varying |= hashes[at] ^ hashes[start]
                together = together and _root(parent, places[at]) == root
            if together:
                continue
            num_varying = 0
            for bit in range(uint64(64)):
                if (varying >> bit) & uint64(1):
                    varying_bits[num_varying] = bit
                    num_varying += 1
            if num_varying <= most_bits:
                for at in range(start + 1, end):
                    difference = hashes[at] ^ hashes[start]
                    num = _join(places[at], places[start], difference, parent, earlier, left, right, num)
                continue
            width = min(num_varying // parts, MOST_CUT_BITS)
            while 1 << width > 2 * size:
                width -= 1
            if part == 0:
                pairs = 0
                for number in range(parts):
                    _cut(hashes, start, end, varying_bits, number, parts, width, keys)
                    ends[: (1 << width) + 1] = 0
                    for at in range(start, end):
                        pairs += ends[keys[at]]
                        ends[keys[at]] += 1
                if pairs + CUT_PAIRS * size * parts > size * (size - 1) // 2:
                    num = _join_all(hashes, places, start, end, most_bits, parent, earlier, left, right, num)
                    compared += size * (size - 1) // 2
                    continue
            _cut(hashes, start, end, varying_bits, part, parts, width, keys)
            ends[: (1 << width) + 1] = 0
            for at in range(start, end):
                ends[keys[at] + uint64(1)] += 1
            for key in range(1 << width):
                ends[key + 1] += ends[key]
            for at in range(start, end):
                to = start + ends[keys[at]]
                ends[keys[at]] += 1
                next_hashes[to], next_places[to] = hashes[at], places[at]
            for at in range(start, end):
                hashes[at], places[at] = next_hashes[at], next_places[at]
            if part < most_bits:
                stack[height, 0], stack[height, 1], stack[height, 2] = start, end, part + 1
                height += 1
            first = start
            for key in range(1 << width):  # ends[key] is now where the key's range ends
                last = start + ends[key]
                if last - first > COMPARED_AT_ONCE:
                    stack[height, 0], stack[height, 1], stack[height, 2] = first, last, 0
                    height += 1
                elif last - first > 1:
                    num = _join_all(hashes, places, first, last, most_bits, parent, earlier, left, right, num)
                    compared += (last - first) * (last - first - 1) // 2
                first = last
    return left[:num].copy(), right[:num].copy(), compared


_joined = Compiled(
    _joined_loop,
    "Tuple((int64[::1], int64[::1], int64))"
    '(Array(uint64, 1, "C", readonly=True), Array(int64, 1, "C", readonly=True), int64, uint64[::1])',
)
