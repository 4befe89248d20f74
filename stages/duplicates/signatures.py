"""MinHash signatures of captions: datasketch's, value by value, and rensa's."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipeline.core.errors import ConfigError
from stages.duplicates.shingles import Shingling, normalised_bytes, shingle_sets

EMPTY = 2**32 - 1  # each value of a caption without shingles
RENSA_ALGORITHM = 2  # rensa 0.5: its digests are equal wherever this number is


def signatures(
    captions: Sequence[str] | pa.Array,
    shingling: Shingling,
    scheme: str = "affine32",
    num_permutations: int = 128,
    seed: int = 1,
) -> np.ndarray:
    """The MinHash signatures that datasketch gives, several times faster. Releases the GIL for most of its time.

    They are those of datasketch.MinHash(num_permutations, seed, scheme=scheme) updated with the caption's shingles in
    UTF-8 (lone surrogates by "surrogatepass"): SHA-1's first four bytes, permuted by datasketch's own parameters.

    Args:
        captions: as they are in the pool: see shingles.normalised_bytes.
        scheme: affine32, datasketch's default since 2.0; or legacy, its only one before.

    Returns:
        [n, num_permutations] uint32; EMPTY throughout for a caption without shingles.

    Raises:
        ValueError: another scheme.
    """
    from stages.duplicates import kernels

    if scheme not in ("affine32", "legacy"):
        raise ValueError(f"scheme = {scheme}, expected affine32 or legacy")
    a, b = _permutations(scheme, num_permutations, seed)
    data, offsets = normalised_bytes(captions, shingling.max_chars)
    return kernels.minima(data, offsets, shingling.unit == "word", shingling.size, a, b, scheme == "affine32")


def rensa_signatures(
    captions: Sequence[str] | pa.Array, shingling: Shingling, num_permutations: int = 128, seed: int = 1
) -> np.ndarray:
    """The digests of rensa's RMinHash over the hashes of shingle_sets; comparable with each other alone.

    Returns:
        [n, num_permutations] uint32; EMPTY throughout for a caption without shingles.
    """
    import rensa

    offsets, hashes = shingle_sets(captions, shingling)
    if len(offsets) == 1:
        return np.empty((0, num_permutations), np.uint32)
    digests = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, num_permutations, seed)
    return np.array(digests.to_rows(), dtype=np.uint32)


def require_rensa(place: str) -> None:
    """None. Raises ConfigError naming `place` when rensa is not installed, or gives other digests than we record."""
    try:
        import rensa
    except ImportError as error:
        raise ConfigError(f"{place} = rensa, expected the package rensa: pip install 'rensa>=0.5,<0.6'") from error
    found = getattr(rensa.RMinHash, "ALGORITHM_VERSION", 1)
    if found != RENSA_ALGORITHM:
        raise ConfigError(
            f"{place} = rensa, expected rensa's algorithm {RENSA_ALGORITHM}, not {found}: pip install 'rensa>=0.5,<0.6'"
        )


@functools.cache
def _permutations(scheme: str, num_permutations: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(a, b): [num_permutations] uint64, as datasketch draws them."""
    import datasketch

    a, b = datasketch.MinHash(num_perm=num_permutations, seed=seed, scheme=scheme).permutations
    return np.ascontiguousarray(a, np.uint64), np.ascontiguousarray(b, np.uint64)
