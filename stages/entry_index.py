"""Which of many phrases stand in a text, as whole words: a hash table of all phrases and of their beginnings.

A phrase stands in a text when it does between two blanks, so both are cut at single blanks, and a phrase is some words
in a row. From each word of the text on, the table is asked for one word, two words, ... as long as some phrase begins
so. What the table finds is compared byte by byte: hashes decide nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stages.compiled import Compiled

START = 0xCBF29CE484222325  # of FNV-1a, whose running hash grows byte by byte
PRIME = 0x100000001B3
BLANK = 32
_START, _PRIME = np.uint64(START), np.uint64(PRIME)
_MIX1, _MIX2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)  # splitmix64's finaliser
_1, _27, _30, _31, _32 = np.uint64(1), np.uint64(27), np.uint64(30), np.uint64(31), np.uint64(32)
_LOW = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True)
class EntryIndex:
    """Phrases, ready to be found.

    Args:
        data: [bytes] uint8, the phrases' UTF-8 in a row.
        offsets: [phrases + 1] int64 into it.
        slots: [a power of two] uint64, more than half of them 0, which is empty. In the others, by open addressing, the
            upper half of a hash, and below it the phrase's number + 2, or 1 where some phrase only begins so.
    """

    data: np.ndarray
    offsets: np.ndarray
    slots: np.ndarray

    def matches(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """(offsets [n + 1] int64, phrases [m] int64): the different phrases that stand in each text, ascending.

        Args:
            texts: as they are: see spaced.
        """
        data, offsets = _utf8(texts)
        return _find(data, offsets, self.data, self.offsets, self.slots)


def build(phrases: Sequence[str]) -> EntryIndex:
    """The index of different phrases, none of them empty; 16 to 32 bytes a word of theirs, and their text."""
    data, offsets = _utf8(phrases)
    num_slots = 16
    while num_slots < 2 * (len(phrases) + int((data == BLANK).sum())) + 2:
        num_slots *= 2
    return EntryIndex(data, offsets, _fill(data, offsets, num_slots))


def spaced(text: str) -> str:
    """The text as it is searched: MetaCLIP's `spacing`, the definition that the compiled code is tested against.

    A blank at both ends, one on either side of each of `, . ; : ? ! ` and the backtick, and one in place of a tab, a
    newline or a carriage return. Nothing else is changed: capitals stay, and two blanks stay two.
    """
    text = f" {text} "
    for mark in ",.;:?!`":
        text = text.replace(mark, f" {mark} ")
    for blank in "\t\n\r":
        text = text.replace(blank, " ")
    return text


def _utf8(texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(data [bytes] uint8, offsets [n + 1] int64)."""
    encoded = [text.encode("utf-8", "surrogatepass") for text in texts]
    offsets = np.zeros(len(encoded) + 1, np.int64)
    np.cumsum([len(text) for text in encoded], out=offsets[1:])
    return np.frombuffer(b"".join(encoded), np.uint8), offsets


def _fill_slots(data, offsets, num_slots):
    """The slots of EntryIndex."""
    slots = np.zeros(num_slots, np.uint64)
    mask = np.uint64(num_slots - 1)
    for phrase in range(len(offsets) - 1):
        hashed = _START
        for at in range(offsets[phrase], offsets[phrase + 1] + 1):
            last = at == offsets[phrase + 1]
            byte = BLANK if last else data[at]
            if byte == BLANK:
                key = hashed ^ (hashed >> _30)
                key = key * _MIX1
                key = (key ^ (key >> _27)) * _MIX2
                key = key ^ (key >> _31)
                slot = key & mask
                # A phrase may take the slot of a beginning with its hash, but not that of another phrase.
                while slots[slot] != 0 and (slots[slot] >> _32 != key >> _32 or (last and slots[slot] & _LOW != _1)):
                    slot = (slot + _1) & mask
                if last:
                    slots[slot] = (key & ~_LOW) | np.uint64(phrase + 2)
                elif slots[slot] == 0:
                    slots[slot] = (key & ~_LOW) | _1
            hashed = (hashed ^ np.uint64(byte)) * _PRIME
    return slots


def _find_phrases(data, offsets, phrase_data, phrase_offsets, slots):
    """(offsets, phrases) of EntryIndex.matches."""
    n = len(offsets) - 1
    mask = np.uint64(len(slots) - 1)
    longest = 0
    for row in range(n):
        longest = max(longest, offsets[row + 1] - offsets[row])
    text = np.empty(3 * longest + 2, np.uint8)
    seen = np.full(len(phrase_offsets) - 1, -1, np.int64)
    found = np.empty(8 * n + 16, np.int64)
    found_offsets = np.zeros(n + 1, np.int64)
    num_found = 0
    for row in range(n):
        text[0] = BLANK
        end = 1
        for at in range(offsets[row], offsets[row + 1]):
            byte = data[at]
            if byte == 44 or byte == 46 or byte == 58 or byte == 59 or byte == 63 or byte == 33 or byte == 96:
                text[end] = BLANK
                text[end + 1] = byte
                text[end + 2] = BLANK
                end += 3
            else:
                text[end] = BLANK if byte == 9 or byte == 10 or byte == 13 else byte
                end += 1
        text[end] = BLANK
        end += 1
        for start in range(1, end):
            if text[start - 1] != BLANK:
                continue
            hashed = _START
            for at in range(start, end):
                if text[at] == BLANK:
                    key = hashed ^ (hashed >> _30)
                    key = key * _MIX1
                    key = (key ^ (key >> _27)) * _MIX2
                    key = key ^ (key >> _31)
                    slot = key & mask
                    begins = False
                    while slots[slot] != 0:
                        if slots[slot] >> _32 == key >> _32:
                            begins = True
                            phrase = np.int64(slots[slot] & _LOW) - 2
                            if phrase >= 0 and seen[phrase] != row:
                                first = phrase_offsets[phrase]
                                same = phrase_offsets[phrase + 1] - first == at - start
                                if same:
                                    for k in range(at - start):
                                        if phrase_data[first + k] != text[start + k]:
                                            same = False
                                            break
                                if same:
                                    seen[phrase] = row
                                    if num_found == len(found):
                                        grown = np.empty(2 * num_found, np.int64)
                                        grown[:num_found] = found
                                        found = grown
                                    found[num_found] = phrase
                                    num_found += 1
                        slot = (slot + _1) & mask
                    if not begins:
                        break
                hashed = (hashed ^ np.uint64(text[at])) * _PRIME
        found[found_offsets[row] : num_found].sort()
        found_offsets[row + 1] = num_found
    return found_offsets, found[:num_found].copy()


_BYTES = 'Array(uint8, 1, "C", readonly=True)'
_NUMBERS = 'Array(int64, 1, "C", readonly=True)'
_SLOTS = 'Array(uint64, 1, "C", readonly=True)'
_fill = Compiled(_fill_slots, f"uint64[::1]({_BYTES}, {_NUMBERS}, int64)")
_find = Compiled(
    _find_phrases, f"Tuple((int64[::1], int64[::1]))({_BYTES}, {_NUMBERS}, {_BYTES}, {_NUMBERS}, {_SLOTS})"
)
