"""Captions as sets of shingles: how a caption is normalised, cut short, and cut into words or characters in a row."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

SHORT_CHARS = 500  # up to here normalising is fast whatever the text


@dataclass(frozen=True)
class Shingling:
    """What a caption's shingles are.

    Args:
        unit: "word" (what `str.split()` gives, joined by one space) or "character" (code points, blanks included).
        size: how many units in a row make a shingle. A caption with fewer, but at least one, is one shingle.
        max_chars: the caption's first code points that are looked at; counted before it is normalised, so that a
            hostile caption costs no more than that.
    """

    unit: str = "word"
    size: int = 1
    max_chars: int = 10_000

    def __post_init__(self) -> None:
        if self.unit not in ("word", "character"):
            raise ValueError(f"unit = {self.unit}, expected word or character")
        if self.size < 1 or self.max_chars < 1:
            raise ValueError(f"size = {self.size}, max_chars = {self.max_chars}, expected at least 1")


def python_shingles(caption: str, shingling: Shingling) -> list[str]:
    """The caption's shingles in order, repeated ones too: the definition that the compiled code is tested against."""
    text = " ".join(unicodedata.normalize("NFKC", caption[: shingling.max_chars]).casefold().split())
    units = text.split() if shingling.unit == "word" else list(text)
    if not units:
        return []
    joint = " " if shingling.unit == "word" else ""
    count = max(1, len(units) - shingling.size + 1)
    return [joint.join(units[first : first + shingling.size]) for first in range(count)]


def shingle_sets(captions: Sequence[str] | pa.Array, shingling: Shingling) -> tuple[np.ndarray, np.ndarray]:
    """Each caption's set of shingles as hashes, for the exact Jaccard index. Releases the GIL for most of its time.

    Args:
        captions: as they are in the pool, not normalised: see normalised_bytes.

    Returns:
        offsets: [n + 1] int64; caption i has hashes[offsets[i] : offsets[i + 1]].
        hashes: [m] uint64, XXH64 (seed 0) of the shingles in UTF-8, ascending and each once per caption. The same on
            every machine. Two of 10,000 different shingles share a hash with probability 3e-12.
    """
    from stages.duplicates import kernels

    data, offsets = normalised_bytes(captions, shingling.max_chars)
    return kernels.sets(data, offsets, shingling.unit == "word", shingling.size)


def normalised(captions: Sequence[str] | pa.Array, max_chars: int | None = None) -> pa.Array:
    """[n] large_binary: UTF-8 of `" ".join(unicodedata.normalize("NFKC", caption).casefold().split())`.

    The arguments and errors are those of normalised_bytes.
    """
    data, offsets = normalised_bytes(captions, max_chars)
    return pa.Array.from_buffers(pa.large_binary(), len(offsets) - 1, [None, pa.py_buffer(offsets), pa.py_buffer(data)])


def normalised_bytes(captions: Sequence[str] | pa.Array, max_chars: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """The captions in NFKC form, case folded, stripped, blanks in a row made one space. Time is linear in their length.

    Args:
        captions: strings, or an Arrow array of strings or of binary in UTF-8; null counts as empty. Lone surrogates
            are kept, encoded by "surrogatepass".
        max_chars: the code points of a caption, before normalising, that are looked at; None for all.

    Returns:
        data: [bytes] uint8, UTF-8.
        offsets: [n + 1] int64 into it.

    Raises:
        UnicodeDecodeError: a caption in an Arrow array is not UTF-8 and not ASCII.
    """
    from stages.duplicates import kernels

    raw, raw_offsets = _buffers(captions)
    max_chars = max_chars or max(len(raw), 1)
    foreign = kernels.foreign_texts(raw, raw_offsets, max_chars)
    texts = []
    for row in np.flatnonzero(foreign):
        text = raw[raw_offsets[row] : raw_offsets[row + 1]].tobytes().decode("utf-8", "surrogatepass")
        text = " ".join(nfkc(text[:max_chars]).casefold().split())
        texts.append(text.encode("utf-8", "surrogatepass"))
    ends = np.cumsum([0, *map(len, texts)], dtype=np.int64)
    return kernels.normalised_texts(
        raw, raw_offsets, max_chars, foreign, np.frombuffer(b"".join(texts), np.uint8), ends
    )


def nfkc(text: str) -> str:
    """`unicodedata.normalize("NFKC", text)` in linear time.

    CPython sorts combining marks by insertion: 40,000 of them take two seconds. Here a long text comes to it
    decomposed, its runs of marks already in canonical order (stable, by combining class; Unicode 3.11, D108-D109).
    """
    if len(text) <= SHORT_CHARS or text.isascii():
        return unicodedata.normalize("NFKC", text)
    ordered: list[str] = []
    marks: list[str] = []
    for character in "".join(unicodedata.normalize("NFKD", character) for character in text):
        if unicodedata.combining(character):
            marks.append(character)
            continue
        ordered += sorted(marks, key=unicodedata.combining)
        marks.clear()
        ordered.append(character)
    ordered += sorted(marks, key=unicodedata.combining)
    return unicodedata.normalize("NFKC", "".join(ordered))


def _buffers(captions: Sequence[str] | pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """(data [bytes] uint8, offsets [n + 1] int64) of the captions in UTF-8."""
    if not isinstance(captions, pa.Array):
        try:
            captions = pa.array(captions, pa.large_string())
        except UnicodeEncodeError:  # a lone surrogate
            captions = pa.array([caption.encode("utf-8", "surrogatepass") for caption in captions], pa.large_binary())
    array = captions.cast(pa.large_binary())
    if array.null_count:
        array = array.fill_null(b"")
    _, offsets, data = array.buffers()
    if not len(array):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    found = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    return np.frombuffer(data, np.uint8) if data is not None else np.empty(0, np.uint8), found
