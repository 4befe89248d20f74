"""Locality-sensitive hashing of MinHash signatures: how many bands of how many rows, what they find, and their keys.

Two captions are candidates when all rows of some band of their signatures agree. With similarity s, b bands and r rows
a band that has the probability 1 - (1 - s^r)^b (Leskovec, Rajaraman, Ullman, "Mining of Massive Datasets", 3.4).
"""

from __future__ import annotations

import numpy as np

from stages.compiled import Compiled


def found_probability(similarity: float, bands: int, rows: int) -> float:
    """The probability in 0..1 that a pair of this Jaccard similarity becomes a candidate."""
    return 1 - (1 - similarity**rows) ** bands


def choose_bands(threshold: float, num_permutations: int, recall: float) -> tuple[int, int]:
    """(bands, rows) that find a pair at the threshold with at least the probability `recall`.

    Of all such choices the one with most rows a band, so with the fewest candidates that are none, and then the fewest
    bands. datasketch's own choice weighs areas under the curve: it finds .44 of the pairs at 0.7 and .31 at 0.9.

    Raises:
        ValueError: no choice does with so few permutations.
    """
    for rows in range(num_permutations, 0, -1):
        for bands in range(1, num_permutations // rows + 1):
            if found_probability(threshold, bands, rows) >= recall:
                return bands, rows
    raise ValueError(f"{num_permutations} permutations can't find pairs at {threshold} with probability {recall}")


def band_keys(signatures: np.ndarray, first_band: int, num_bands: int, rows: int) -> np.ndarray:
    """[num_bands, n] uint64: a hash of the band's number and its rows, for bands from `first_band` on.

    Args:
        signatures: [n, P] uint32, P >= (first_band + num_bands) * rows.
    """
    return _keys(np.ascontiguousarray(signatures), first_band, num_bands, rows)


def _keys_loop(signatures, first_band, num_bands, rows):
    """splitmix64's finaliser over band number and rows, one after the other."""
    keys = np.empty((num_bands, len(signatures)), np.uint64)
    for entry in range(len(signatures)):
        for number in range(num_bands):
            start = (first_band + number) * rows
            key = np.uint64(first_band + number + 1) * np.uint64(0x9E3779B97F4A7C15)
            for at in range(start, start + rows):
                key ^= np.uint64(signatures[entry, at])
                key ^= key >> np.uint64(30)
                key *= np.uint64(0xBF58476D1CE4E5B9)
                key ^= key >> np.uint64(27)
                key *= np.uint64(0x94D049BB133111EB)
                key ^= key >> np.uint64(31)
            keys[number, entry] = key
    return keys


_keys = Compiled(_keys_loop, 'uint64[:, ::1](Array(uint32, 2, "C", readonly=True), int64, int64, int64)')
