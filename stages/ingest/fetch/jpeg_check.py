"""Which JPEGs surely decode, told from their structure: in 40 us where decoding takes 300.

A decoder (libjpeg) raises on what stands around the scans: wrong lengths, missing or impossible tables, scans that
make no sense, no end. Inside a scan a bad code, a wrong restart or an early marker is a warning, and what is missing
becomes gray; but it raises where the mean values, each told by its difference to the one before, leave 32 bits. So
where all segments are of common kinds and sound, their differences are small, and each scan ends at the next segment,
the last one at the end marker, decoding can't fail; trying it would tell nothing more.
"""

from __future__ import annotations

from typing import NamedTuple

from pipeline.core.images import NEXT_MARKER

MAX_SIDE_PX = 65_500  # of libjpeg
MAX_BLOCKS = 1 << 20  # of 8 x 8 pixels: as many differences of at most 2,047 stay within 32 bits
MAX_DIFFERENCE_BITS = 11  # of two mean values, as the standard has it for 8 bits
MAX_SEGMENTS = 500  # common files have 10 to 30, with long profiles 100
MAX_SCANS = 50  # each one costs a pass over all blocks; progressive photos have 10
# Segments that Pillow looks into: what they start with, and the bytes up to which it then relies on them.
_READ_BY_PILLOW = {0xE0: (b"JFIF\0", 12), 0xE2: (b"ICC_PROFILE\0", 14), 0xEE: (b"Adobe", 12)}


class SureJpeg(NamedTuple):
    """A JPEG that surely decodes once Pillow has read its metadata, if there are any that can matter."""

    width_px: int
    height_px: int
    is_bare: bool  # no EXIF, no XMP, no second image, nothing that Pillow could stumble over


class _Frame(NamedTuple):
    """The header of a JPEG's picture."""

    is_progressive: bool
    width_px: int
    height_px: int
    tables: dict[int, int]  # by component, in order: the index of its quantization table


def sure_jpeg(data: bytes) -> SureJpeg | None:
    """The size of a JPEG that surely decodes, or None for one that may or may not.

    Only the common kinds can be sure: 8 bits, Huffman codes, gray or colours with the brightness first, baseline in
    one scan or progressive.
    """
    if data[:2] != b"\xff\xd8":
        return None
    frame = None
    quantization: set[int] = set()  # the tables so far
    huffman: set[int] = set()  # the DC tables by 0 to 3, the AC tables by 16 to 19
    at, scans, is_bare = 2, 0, True
    for _ in range(MAX_SEGMENTS):
        head = data[at : at + 4]
        end = at + 2 + int.from_bytes(head[2:], "big")
        if len(head) < 4 or head[0] != 0xFF or end < at + 4 or end > len(data):
            return None
        kind, body = head[1], data[at + 4 : end]
        if kind == 0xC4:
            tables = _huffman_tables(body)
            if not tables:
                return None
            huffman |= tables
        elif kind == 0xDA:
            scans += 1
            marker = NEXT_MARKER.search(data, end)
            if marker is None or scans > MAX_SCANS or frame is None:
                return None
            if not _is_sound_scan(body, frame, scans == 1, quantization, huffman):
                return None
            end = marker.start()
            if data[end + 1] == 0xD9:
                return SureJpeg(frame.width_px, frame.height_px, is_bare)
            if not frame.is_progressive:
                return None
        elif kind == 0xDD:
            if len(body) != 2:
                return None
        elif scans:
            return None  # whatever else may stand between scans
        elif kind == 0xDB:
            indices = body[::65]
            if len(body) % 65 or max(indices, default=9) > 3:  # other than one or more tables of 8 bits
                return None
            quantization.update(indices)
        elif kind in (0xC0, 0xC2):
            if frame is not None:
                return None
            frame = _frame(kind, body)
            if frame is None:
                return None
        elif 0xE0 <= kind <= 0xEF:
            start, least_bytes = _READ_BY_PILLOW.get(kind, (b"", 0))
            is_bare = is_bare and kind not in (0xE1, 0xED) and body.startswith(start) and len(body) >= least_bytes
        elif kind != 0xFE:
            return None
        at = end
    return None


def _frame(kind: int, body: bytes) -> _Frame | None:
    """The frame that a SOF0 or SOF2 segment announces, or None where it is not a common one."""
    if len(body) not in (9, 15) or body[0] != 8 or len(body) != 6 + 3 * body[5]:
        return None
    height_px, width_px = int.from_bytes(body[1:3], "big"), int.from_bytes(body[3:5], "big")
    tables = dict(zip(body[6::3], body[8::3], strict=True))
    samplings = body[7::3]
    across, down = samplings[0] >> 4, samplings[0] & 15
    if not (1 <= width_px <= MAX_SIDE_PX and 1 <= height_px <= MAX_SIDE_PX and len(tables) == body[5]):
        return None
    if (width_px // 8 + 4) * (height_px // 8 + 4) > MAX_BLOCKS:  # filled up to whole units of 4 x 4 blocks at most
        return None
    # Colours at the brightness's own or a whole fraction of its resolution, 10 blocks a unit at most.
    if not (1 <= across <= 4 and 1 <= down <= 4 and across * down <= 8) or any(one != 0x11 for one in samplings[1:]):
        return None
    return _Frame(kind == 0xC2, width_px, height_px, tables)


def _huffman_tables(body: bytes) -> set[int]:
    """The tables that a DHT segment defines, DC by 0 to 3 and AC by 16 to 19; empty where any is not sound."""
    tables = set()
    at = 0
    while at < len(body):
        table, counts = body[at], body[at + 1 : at + 17]
        symbols = body[at + 17 : at + 17 + sum(counts)]
        if table & 0xEC or table in tables or len(counts) < 16 or not 1 <= sum(counts) <= 256:
            return set()
        if len(symbols) < sum(counts) or (table < 16 and max(symbols) > MAX_DIFFERENCE_BITS):
            return set()
        code = 0
        for bits, count in enumerate(counts, 1):
            code = 2 * code + count
            if code >= 1 << bits:  # more codes than there are, or one of ones alone
                return set()
        tables.add(table)
        at += 17 + len(symbols)
    return tables


def _is_sound_scan(body: bytes, frame: _Frame, is_first: bool, quantization: set[int], huffman: set[int]) -> bool:
    """Whether an SOS segment announces a scan of the frame that can be decoded with these tables."""
    count = body[0] if body else 0
    if not 1 <= count <= 3 or len(body) != 4 + 2 * count:
        return False
    components, choices = body[1:-3:2], body[2:-3:2]
    first, last, shifts = body[-3:]
    if len(set(components)) < count or not frame.tables.keys() >= set(components):
        return False
    if is_first and (list(components) != list(frame.tables) or not quantization >= set(frame.tables.values())):
        return False
    needed = {choice >> 4 for choice in choices}
    if not frame.is_progressive:
        return (first, last, shifts) == (0, 63, 0) and huffman >= needed | {16 + (choice & 15) for choice in choices}
    earlier_shift, shift = shifts >> 4, shifts & 15
    if shift > 13 or (earlier_shift and shift != earlier_shift - 1):
        return False
    if first == 0:  # mean values; they need no table where they are refined
        return last == 0 and (huffman >= needed if not earlier_shift else not is_first)
    return not is_first and first <= last <= 63 and count == 1 and 16 + (choices[0] & 15) in huffman
