"""The compiled loops over UTF-8 text: normalising ASCII, cutting into shingles, XXH64, SHA-1, minima.

Texts are one uint8 buffer and int64 offsets [n + 1], as Arrow keeps them. Shingles are slices of that buffer, so
nothing is copied.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import int64, uint8, uint32, uint64

from stages.compiled import Compiled

GROUP_BYTES = 1 << 17  # of text whose shingles are looked up among each other: what stays in a core's own cache
TABLE_ENTRIES = 1 << 15  # for that, at most
SHORT_BYTES = 55  # what SHA-1 takes in one block
SHA1_LANES = 16  # short shingles hashed together, in vector registers
_ROW = np.uint64(SHA1_LANES)
_ROUNDS, _ROTATED = _ROW * np.uint64(85), _ROW * np.uint64(170)  # where each of its two sequences begins
MINIMUM_LANES = 4  # values per pass over the minima; each pass loads and stores all of them
LOWER = np.array([32 if chr(c).isspace() else ord(chr(c).lower()) for c in range(128)] + [0] * 128, np.uint8)


def _foreign_texts(data, offsets, max_chars):
    """[n] bool: True where the text's first `max_chars` characters are not all ASCII."""
    foreign = np.zeros(len(offsets) - 1, np.bool_)
    for row in range(len(foreign)):
        start = offsets[row]
        seen = uint8(0)
        for at in range(start, min(offsets[row + 1], start + max_chars)):
            seen |= data[at]
        foreign[row] = seen > 127
    return foreign


def _normalised_texts(data, offsets, max_chars, foreign, foreign_data, foreign_offsets):
    """(data, offsets): ASCII texts cut, lower-cased, blanks collapsed; where `foreign`, the next of the given texts."""
    n = len(offsets) - 1
    capacity = len(foreign_data)
    for row in range(n):
        if not foreign[row]:
            capacity += min(offsets[row + 1] - offsets[row], max_chars)
    result = np.empty(capacity, np.uint8)
    result_offsets = np.zeros(n + 1, np.int64)
    end = 0
    foreign_row = 0
    for row in range(n):
        first = end
        if foreign[row]:
            for at in range(foreign_offsets[foreign_row], foreign_offsets[foreign_row + 1]):
                result[end] = foreign_data[at]
                end += 1
            foreign_row += 1
        else:
            after_blank = True
            start = offsets[row]
            for at in range(start, min(offsets[row + 1], start + max_chars)):  # no branches: they can't be foretold
                byte = LOWER[data[at]]
                result[end] = byte
                end += 0 if after_blank and byte == 32 else 1
                after_blank = byte == 32
            if after_blank and end > first:
                end -= 1
        result_offsets[row + 1] = end
    return result[:end].copy(), result_offsets


@numba.njit
def _cut(data, start, end, is_word, size, marks):
    """The number of shingles of a normalised text; shingle j is data[marks[j] : marks[j + width] - gap].

    Returns (shingles, width, gap); width is `size`, or less where the text has fewer words or characters than that.
    """
    if start == end:
        return 0, 1, 0
    num_units = 0
    if is_word:
        marks[0] = start
        num_units = 1
        for at in range(start, end):
            marks[num_units] = at + 1  # the next mark writes over it, unless this is a blank
            num_units += 1 if data[at] == 32 else 0
        marks[num_units] = end + 1
    else:
        for at in range(start, end):
            marks[num_units] = at
            num_units += 1 if data[at] & 0xC0 != 0x80 else 0  # but not after a character's second to last byte
        marks[num_units] = end
    width = min(size, num_units)
    return num_units - width + 1, width, 1 if is_word else 0


@numba.njit
def _little_endian(data, at, num_bytes):
    word = uint64(0)
    for k in range(num_bytes):
        word |= uint64(data[at + k]) << uint64(8 * k)
    return word


@numba.njit
def _rotated(word, bits):
    return (word << uint64(bits)) | (word >> uint64(64 - bits))


@numba.njit
def _xxh64_round(accumulator, word):
    return _rotated(accumulator + word * uint64(0xC2B2AE3D27D4EB4F), 31) * uint64(0x9E3779B185EBCA87)


@numba.njit
def _xxh64(data, start, end):
    """XXH64 with seed 0 of data[start:end] (github.com/Cyan4973/xxHash, doc/xxhash_spec.md)."""
    prime1, prime2 = uint64(0x9E3779B185EBCA87), uint64(0xC2B2AE3D27D4EB4F)
    prime3, prime4 = uint64(0x165667B19E3779F9), uint64(0x85EBCA77C2B2AE63)
    prime5 = uint64(0x27D4EB2F165667C5)
    at = start
    if end - start >= 32:
        lane1, lane2, lane3, lane4 = prime1 + prime2, prime2, uint64(0), uint64(0) - prime1
        while at + 32 <= end:
            lane1 = _xxh64_round(lane1, _little_endian(data, at, 8))
            lane2 = _xxh64_round(lane2, _little_endian(data, at + 8, 8))
            lane3 = _xxh64_round(lane3, _little_endian(data, at + 16, 8))
            lane4 = _xxh64_round(lane4, _little_endian(data, at + 24, 8))
            at += 32
        digest = _rotated(lane1, 1) + _rotated(lane2, 7) + _rotated(lane3, 12) + _rotated(lane4, 18)
        for lane in (lane1, lane2, lane3, lane4):
            digest = (digest ^ _xxh64_round(uint64(0), lane)) * prime1 + prime4
    else:
        digest = prime5
    digest += uint64(end - start)
    while at + 8 <= end:
        digest ^= _xxh64_round(uint64(0), _little_endian(data, at, 8))
        digest = _rotated(digest, 27) * prime1 + prime4
        at += 8
    if at + 4 <= end:
        digest ^= _little_endian(data, at, 4) * prime1
        digest = _rotated(digest, 23) * prime2 + prime3
        at += 4
    while at < end:
        digest ^= uint64(data[at]) * prime5
        digest = _rotated(digest, 11) * prime1
        at += 1
    digest = (digest ^ (digest >> uint64(33))) * prime2
    digest = (digest ^ (digest >> uint64(29))) * prime3
    return digest ^ (digest >> uint64(32))


@numba.njit
def _rotated32(word, bits):
    return uint32(word << uint32(bits)) | (word >> uint32(32 - bits))


@numba.njit
def _sha1_uint32(data, start, end, words):
    """The first four bytes of SHA-1 (FIPS 180-4) of data[start:end] as a little-endian number; scratch words [80]."""
    length = end - start
    num_blocks = (length + 72) // 64  # a byte 0x80 and the length in 8 bytes come after the message
    h0, h1, h2 = uint32(0x67452301), uint32(0xEFCDAB89), uint32(0x98BADCFE)
    h3, h4 = uint32(0x10325476), uint32(0xC3D2E1F0)
    for block in range(num_blocks):
        words[:16] = 0
        first = start + 64 * block
        for at in range(first, min(first + 64, end)):
            i = at - first
            words[i >> 2] |= uint32(data[at]) << uint32(24 - 8 * (i & 3))
        if end >= first and end < first + 64:
            i = end - first
            words[i >> 2] |= uint32(0x80) << uint32(24 - 8 * (i & 3))
        if block == num_blocks - 1:
            words[14] = uint32(uint64(length) >> uint64(29))
            words[15] = uint32(length << 3)
        for t in range(16, 80):
            words[t] = _rotated32(words[t - 3] ^ words[t - 8] ^ words[t - 14] ^ words[t - 16], 1)
        a, b, c, d, e = h0, h1, h2, h3, h4
        for t in range(20):
            mixed = uint32(_rotated32(a, 5) + (d ^ (b & (c ^ d))) + e + words[t] + uint32(0x5A827999))
            e, d, c, b, a = d, c, _rotated32(b, 30), a, mixed
        for t in range(20, 40):
            mixed = uint32(_rotated32(a, 5) + (b ^ c ^ d) + e + words[t] + uint32(0x6ED9EBA1))
            e, d, c, b, a = d, c, _rotated32(b, 30), a, mixed
        for t in range(40, 60):
            mixed = uint32(_rotated32(a, 5) + ((b & c) | (d & (b | c))) + e + words[t] + uint32(0x8F1BBCDC))
            e, d, c, b, a = d, c, _rotated32(b, 30), a, mixed
        for t in range(60, 80):
            mixed = uint32(_rotated32(a, 5) + (b ^ c ^ d) + e + words[t] + uint32(0xCA62C1D6))
            e, d, c, b, a = d, c, _rotated32(b, 30), a, mixed
        h0, h1, h2 = uint32(h0 + a), uint32(h1 + b), uint32(h2 + c)
        h3, h4 = uint32(h3 + d), uint32(h4 + e)
    return _bytes_reversed(h0)


@numba.njit
def _sha1_uint32_lanes(data, starts, lengths, ids, first, num_lanes, values, words):
    """None; sets `values` at ids[first : first + num_lanes] to _sha1_uint32 of those slices, each up to SHORT_BYTES.

    SHA-1 as two sequences of words, so that there is nothing to shuffle: `a` of all rounds, and `a` rotated by 30.
    Scratch words [3 * 85 * SHA1_LANES] holds the message schedule and both: one array, and loops over lanes without a
    branch, so that the compiler sees that lanes are independent; were their number a constant, it would unroll them.
    """
    words[: 16 * SHA1_LANES] = 0
    for lane in range(num_lanes):
        start, length = starts[ids[first + lane]], lengths[ids[first + lane]]
        for i in range(length):
            words[(i >> 2) * SHA1_LANES + lane] |= uint32(data[start + i]) << uint32(24 - 8 * (i & 3))
        words[(length >> 2) * SHA1_LANES + lane] |= uint32(0x80) << uint32(24 - 8 * (length & 3))
        words[15 * SHA1_LANES + lane] = uint32(length << 3)
    for t in range(16, 80):
        for i in _lanes(t, num_lanes):
            words[i] = _rotated32(
                words[i - _ROW * uint64(3)]
                ^ words[i - _ROW * uint64(8)]
                ^ words[i - _ROW * uint64(14)]
                ^ words[i - _ROW * uint64(16)],
                1,
            )
    # The initial words h4, h3 and h2, and h1 and h0 rotated by 30.
    for t, word in enumerate((0xC3D2E1F0, 0x10325476, 0x98BADCFE, 0x7BF36AE2, 0x59D148C0)):
        for i in _lanes(t, num_lanes):
            words[i + _ROTATED] = uint32(word)
    for i in _lanes(0, num_lanes):
        words[i + _ROUNDS + _ROW * uint64(3)] = uint32(0xEFCDAB89)
        words[i + _ROUNDS + _ROW * uint64(4)] = uint32(0x67452301)
    for t in range(20):
        for i in _lanes(t, num_lanes):
            x, y, z = _three_words(words, i)
            _sha1_round(words, i, uint32((z ^ (x & (y ^ z))) + uint32(0x5A827999)))
    for t in range(20, 40):
        for i in _lanes(t, num_lanes):
            x, y, z = _three_words(words, i)
            _sha1_round(words, i, uint32((x ^ y ^ z) + uint32(0x6ED9EBA1)))
    for t in range(40, 60):
        for i in _lanes(t, num_lanes):
            x, y, z = _three_words(words, i)
            _sha1_round(words, i, uint32(((x & y) | (z & (x | y))) + uint32(0x8F1BBCDC)))
    for t in range(60, 80):
        for i in _lanes(t, num_lanes):
            x, y, z = _three_words(words, i)
            _sha1_round(words, i, uint32((x ^ y ^ z) + uint32(0xCA62C1D6)))
    for lane in range(num_lanes):
        last = words[_ROUNDS + _ROW * uint64(84) + uint64(lane)]
        values[ids[first + lane]] = _bytes_reversed(uint32(last + uint32(0x67452301)))


@numba.njit
def _lanes(t, num_lanes):
    """The places of a round's message words. Unsigned: numba would wrap negative ones, which can't be vectorised."""
    return range(uint64(t * SHA1_LANES), uint64(t * SHA1_LANES + num_lanes))


@numba.njit
def _three_words(words, i):
    """b, c and d of the round whose message word is words[i]."""
    return words[i + _ROUNDS + _ROW * uint64(3)], words[i + _ROTATED + _ROW * uint64(2)], words[i + _ROTATED + _ROW]


@numba.njit
def _sha1_round(words, i, mixed):
    """None; writes the next `a`, and it rotated, given the round's function of three words plus its constant."""
    mixed = uint32(mixed + _rotated32(words[i + _ROUNDS + _ROW * uint64(4)], 5) + words[i + _ROTATED] + words[i])
    words[i + _ROUNDS + _ROW * uint64(5)] = mixed
    words[i + _ROTATED + _ROW * uint64(5)] = _rotated32(mixed, 30)


@numba.njit
def _bytes_reversed(word):
    word = uint32((word & uint32(0x00FF00FF)) << uint32(8)) | ((word >> uint32(8)) & uint32(0x00FF00FF))
    return uint32(word << uint32(16)) | (word >> uint32(16))


@numba.njit
def _fmix32(word):
    """MurmurHash3's finaliser."""
    word = uint32((word ^ (word >> uint32(16))) * uint32(0x85EBCA6B))
    word = uint32((word ^ (word >> uint32(13))) * uint32(0xC2B2AE35))
    return word ^ (word >> uint32(16))


def _sets(data, offsets, is_word, size):
    """(offsets [n + 1] int64, hashes [m] uint64): of each text the XXH64 of its shingles, ascending, each once."""
    n = len(offsets) - 1
    longest = 0
    for row in range(n):
        longest = max(longest, offsets[row + 1] - offsets[row])
    marks = np.empty(longest + 2, np.int64)
    # A text of L bytes has at most L characters, and (L + 1) / 2 words.
    hashes = np.empty((len(data) + n) // 2 + 1 if is_word else len(data), np.uint64)
    set_offsets = np.zeros(n + 1, np.int64)
    end = 0
    for row in range(n):
        num_shingles, width, gap = _cut(data, offsets[row], offsets[row + 1], is_word, size, marks)
        found = hashes[end : end + num_shingles]
        for j in range(num_shingles):
            found[j] = _xxh64(data, marks[j], marks[j + width] - gap)
        found.sort()
        for j in range(num_shingles):
            if j == 0 or found[j] != hashes[end - 1]:
                hashes[end] = found[j]
                end += 1
        set_offsets[row + 1] = end
    return set_offsets, hashes[:end].copy()


def _minima(data, offsets, is_word, size, a, b, is_affine):
    """[n, permutations] uint32: of each text the least permuted SHA-1 of its shingles; permutations (a, b) uint64."""
    n = len(offsets) - 1
    longest = 0
    for row in range(n):
        longest = max(longest, offsets[row + 1] - offsets[row])
    result = np.full((n, len(a)), 0xFFFFFFFF, np.uint32)
    a32, b32 = a.astype(np.uint32), b.astype(np.uint32)
    capacity = max(longest, min(GROUP_BYTES, len(data)))  # a group's shingles at most
    marks = np.empty(longest + 2, np.int64)
    row_values = np.empty(longest + MINIMUM_LANES, np.uint32)
    words = np.empty(3 * 85 * SHA1_LANES, np.uint32)
    long_words = np.empty(80, np.uint32)
    entries = 1
    while entries < TABLE_ENTRIES and entries < capacity:
        entries *= 2
    table = np.empty(entries, np.int64)
    row_shingles = np.empty(n, np.int64)
    shingle_ids = np.empty(capacity, np.int64)
    # By id: most shingles that repeat within the group share one.
    keys, values = np.empty(capacity, np.uint64), np.empty(capacity, np.uint32)
    starts, lengths = np.empty(capacity, np.int64), np.empty(capacity, np.int64)
    short_ids = np.empty(capacity, np.int64)
    row = 0
    while row < n:
        first_row = row
        table[:] = -1
        num_ids = 0
        num_shingles = 0
        while row < n and (row == first_row or offsets[row + 1] - offsets[first_row] <= capacity):
            num_cut, width, gap = _cut(data, offsets[row], offsets[row + 1], is_word, size, marks)
            for j in range(num_cut):
                start = marks[j]
                length = marks[j + width] - gap - start
                key = _xxh64(data, start, start + length)
                entry = int64(key & uint64(entries - 1))
                found = table[entry]
                if found >= 0 and not (
                    keys[found] == key and lengths[found] == length and _equal(data, start, starts[found], length)
                ):
                    found = -1
                if found < 0:
                    found = num_ids
                    num_ids += 1
                    keys[found], starts[found], lengths[found] = key, start, length
                    table[entry] = found
                shingle_ids[num_shingles + j] = found
            row_shingles[row] = num_cut
            num_shingles += num_cut
            row += 1

        num_short = 0
        for found in range(num_ids):
            if lengths[found] <= SHORT_BYTES:
                short_ids[num_short] = found
                num_short += 1
            else:
                start = starts[found]
                values[found] = _sha1_uint32(data, start, start + lengths[found], long_words)
        for first in range(0, num_short, SHA1_LANES):
            num_lanes = min(SHA1_LANES, num_short - first)
            _sha1_uint32_lanes(data, starts, lengths, short_ids, first, num_lanes, values, words)
        if is_affine:
            for found in range(num_ids):
                values[found] = _fmix32(values[found])

        at = 0
        for group_row in range(first_row, row):
            num_cut = row_shingles[group_row]
            for j in range(num_cut):
                row_values[j] = values[shingle_ids[at + j]]
            at += num_cut
            if is_affine:
                _affine_minima(row_values, num_cut, a32, b32, result[group_row])
            else:
                _legacy_minima(row_values, num_cut, a, b, result[group_row])
    return result


@numba.njit
def _equal(data, start, other, length):
    different = uint8(0)
    for k in range(length):
        different |= data[start + k] ^ data[other + k]
    return different == 0


@numba.njit
def _affine_minima(values, num_values, a, b, least):
    """None; lowers `least` to the least of a * value + b modulo 2**32."""
    if num_values == 0:
        return
    for j in range(
        num_values, num_values + MINIMUM_LANES - 1
    ):  # up to a multiple of the lanes; a repeated value adds nothing
        values[j] = values[num_values - 1]
    for j in range(0, num_values, MINIMUM_LANES):
        value0, value1, value2, value3 = values[j], values[j + 1], values[j + 2], values[j + 3]
        for k in range(len(a)):
            permuted0 = min(uint32(a[k] * value0 + b[k]), uint32(a[k] * value1 + b[k]))
            permuted1 = min(uint32(a[k] * value2 + b[k]), uint32(a[k] * value3 + b[k]))
            least[k] = min(least[k], min(permuted0, permuted1))


@numba.njit
def _legacy_minima(values, num_values, a, b, least):
    """None; lowers `least` to the least of (a * value + b modulo 2**64) modulo 2**61 - 1, of which the low 32 bits."""
    prime = uint64((1 << 61) - 1)
    for j in range(num_values):
        value = uint64(values[j])
        for k in range(len(a)):
            wrapped = a[k] * value + b[k]
            folded = (wrapped & prime) + (wrapped >> uint64(61))
            # Taking the prime off where it fits leaves the low 32 bits one higher, as the prime's own are all ones.
            least[k] = min(least[k], uint32(folded + ((folded + uint64(1)) >> uint64(61))))


_TEXT = 'Array(uint8, 1, "C", readonly=True), Array(int64, 1, "C", readonly=True)'
_FLAGS = 'Array(boolean, 1, "C", readonly=True)'
_PERMUTATION = 'Array(uint64, 1, "C", readonly=True)'

foreign_texts = Compiled(_foreign_texts, f"boolean[::1]({_TEXT}, int64)")
normalised_texts = Compiled(_normalised_texts, f"Tuple((uint8[::1], int64[::1]))({_TEXT}, int64, {_FLAGS}, {_TEXT})")
sets = Compiled(_sets, f"Tuple((int64[::1], uint64[::1]))({_TEXT}, boolean, int64)")
minima = Compiled(_minima, f"uint32[:, ::1]({_TEXT}, boolean, int64, {_PERMUTATION}, {_PERMUTATION}, boolean)")
