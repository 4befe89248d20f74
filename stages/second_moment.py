"""The second moment of vectors, sum f f^T: exact, so that it is the same in any order, and rows can be taken out again.

A unit vector here has values that are multiples of 2^-26 (stages/unit_vectors.py). Each is cut into a high part, a
multiple of 2^-13, and a low one, of at most 2^-14. The sums of high x high, high x low and low x low are kept apart:
each is of multiples of one power of two, so small that float64 adds up to 2^27 rows without rounding.
"""

from __future__ import annotations

import numpy as np

from stages.unit_vectors import unit

CUT = 2.0**13
TILE_ROWS = 4096


class SecondMoment:
    """A sum of f f^T over unit vectors f of d dimensions; starts at 0, or from the `parts` of another one.

    Args:
        parts: [3, d, d] float64.
    """

    def __init__(self, num_dimensions: int, parts: np.ndarray | None = None):
        self.parts = np.zeros((3, num_dimensions, num_dimensions)) if parts is None else parts.copy()

    def add(self, vectors: np.ndarray) -> None:
        """None; takes in [n, d] vectors that are finite and not zero, at length 1. Memory: 40 d bytes a tile's row."""
        for start in range(0, len(vectors), TILE_ROWS):
            whole = unit(vectors[start : start + TILE_ROWS])
            high = np.rint(whole * CUT) / CUT
            low = whole - high
            self.parts += np.stack([high.T @ high, high.T @ low, low.T @ low])

    def add_moment(self, other: SecondMoment) -> None:
        """None; takes in what is in the other one."""
        self.parts += other.parts

    def subtract(self, other: SecondMoment) -> None:
        """None; takes out what is in the other one."""
        self.parts -= other.parts

    @property
    def matrix(self) -> np.ndarray:
        """[d, d] float64: the sum, rounded once a part."""
        high, mixed, low = self.parts
        return high + (mixed + mixed.T) + low


def quadratic_forms(vectors: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    """[n] float64: f^T M f of each vector at length 1, within about 1e-13 of its size.

    Args:
        vectors: [n, d] finite, none of length 0.
        matrix: [d, d] float64.
    """
    found = np.empty(len(vectors))
    for start in range(0, len(vectors), TILE_ROWS):
        whole = unit(vectors[start : start + TILE_ROWS])
        found[start : start + TILE_ROWS] = np.einsum("ij,ij->i", whole @ matrix, whole)
    return found
