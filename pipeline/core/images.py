"""Guarded decoding of untrusted image bytes.

The header is read first; nothing above the pixel cap is decoded, and nothing whose structure alone would take a reader
minutes or gigabytes (scans, chunks, comments, tags, tiles). Only formats of FORMATS are opened, whatever the bytes
claim. Orientation (EXIF) is applied only where asked: training data wants the picture as people see it, while
published benchmarks ignore it.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pipeline.core.errors import ImageError

if TYPE_CHECKING:
    from PIL import Image

MAX_PIXELS = 64_000_000  # 8000 x 8000; open_clip's own header check is 25M, photos of phones reach 50M
FORMATS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "BMP": "bmp", "TIFF": "tiff"}
EXTENSIONS = {
    "jpg": "jpg",
    "jpeg": "jpg",
    "png": "png",
    "webp": "webp",
    "gif": "gif",
    "bmp": "bmp",
    "tif": "tiff",
    "tiff": "tiff",
}
ORIENTATION_TAG = 0x0112
MAX_JPEG_SCANS = 100  # each one costs a pass over all blocks, however few its bytes; progressive photos have 10
MAX_JPEG_SEGMENTS = 5_000  # Pillow keeps them at many times their size; 64 MB of XMP are 1,000
MAX_JPEG_FILL_BYTES = 1 << 16  # between segments, where Pillow reads one byte at a time
MAX_PNG_CHUNKS = 100_000  # 64 MB in chunks of the usual 8 kB are 8,000
MAX_GIF_HEADER_BYTES = 1 << 20  # before the first frame; Pillow's time grows with the square of a comment's length
MAX_TIFF_PARTS = 100_000  # strips or tiles, which Pillow keeps at a hundred times their size
MAX_TAGS = 1 << 16
MAX_TAG_BYTES = 64 << 20  # beyond twice the file: tags may lie over each other, and Pillow < 13 copies each
NEXT_MARKER = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # what ends a JPEG's scan: neither stuffing nor a restart
TIFF_STARTS = (b"II*\0", b"II\0*", b"II+\0", b"MM\0*", b"MM*\0", b"MM\0+")  # those that Pillow opens
EXIF_START = b"Exif\0\0"
TAG_TYPE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8, 4, 0, 0, 8, 8, 8)  # of one value, by the number of its type
TAG_FOLDERS = (0x8769, 0x8825, 0xA005)  # EXIF, GPS and interoperability: the value is where further tags lie
TIFF_PARTS_TAGS, TIFF_TILE_TAGS = (273, 324), (322, 323)
_quiet_lock = threading.Lock()
_quiet_count = 0
_quiet_filters = None


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    """A block without Python warnings, in any number of threads at once: Pillow warns of odd metadata.

    `warnings.catch_warnings` alone, entered by several threads, restores the filters in the wrong order.
    """
    global _quiet_count, _quiet_filters
    with _quiet_lock:
        _quiet_count += 1
        if _quiet_count == 1:
            _quiet_filters = warnings.catch_warnings()
            _quiet_filters.__enter__()
            warnings.simplefilter("ignore")
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_count -= 1
            if _quiet_count == 0:
                _quiet_filters.__exit__(None, None, None)


def open_image(data: bytes, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The image with its header read and its pixels not yet decoded. Raises ImageError."""
    from PIL import Image, UnidentifiedImageError

    if not data:
        raise ImageError("undecodable", "no bytes")
    _guard(data, max_pixels)
    try:
        with no_warnings():  # size limits are ours, below
            image = Image.open(io.BytesIO(data), formats=list(FORMATS))
    except UnidentifiedImageError as error:
        raise ImageError("unsupported_format", f"{len(data)} bytes of no known image format") from error
    except Image.DecompressionBombError as error:  # Pillow's own cap, far above ours
        raise ImageError("too_many_pixels", f"{error}") from error
    except Exception as error:  # a hostile header can raise almost anything inside Pillow
        raise ImageError("undecodable", f"{type(error).__name__}: {error}") from error
    width_px, height_px = image.size
    if width_px * height_px > max_pixels:
        raise ImageError("too_many_pixels", f"{width_px} x {height_px} pixels, at most {max_pixels}")
    if width_px < 1 or height_px < 1:
        raise ImageError("undecodable", f"{width_px} x {height_px} pixels")
    return image


def decode_rgb(
    data: bytes, apply_orientation: bool = True, max_pixels: int = MAX_PIXELS, min_side_px: int | None = None
) -> Image.Image:
    """The decoded image, mode RGB (alpha dropped as `convert` does, which is what open_clip trains on).

    Args:
        min_side_px: where given, the image comes at the smallest of 1/1, 1/2, 1/4 and 1/8 of its size whose shorter
            side still has that many pixels, without what is left of a pixel at its right and lower edge. A JPEG is
            decoded at that scale, which saves most of the work; other formats are averaged after the decode.

    Raises:
        ImageError: not an image, truncated, or above the pixel cap.
    """
    from PIL import ImageOps

    image = open_image(data, max_pixels)
    try:
        with no_warnings():
            width_px, height_px = image.size
            scale = 1
            if min_side_px is not None:
                scale = next((s for s in (8, 4, 2) if min(width_px, height_px) // s >= min_side_px), 1)
            is_scaled = scale > 1 and image.draft("RGB", (width_px // scale, height_px // scale)) is not None
            image.load()
            if is_scaled and (width_px % scale or height_px % scale):
                image = image.crop((0, 0, width_px // scale, height_px // scale))
            if apply_orientation and image.getexif().get(ORIENTATION_TAG, 1) != 1:
                image = ImageOps.exif_transpose(image)
            if image.mode == "P" and "transparency" in image.info:
                image = image.convert("RGBA")
            if image.mode != "RGB":
                image = image.convert("RGB")
            if scale > 1 and not is_scaled:
                width_px, height_px = (side // scale * scale for side in image.size)
                image = image.reduce(scale, (0, 0, width_px, height_px))
            return image
    except Exception as error:  # a hostile body can raise almost anything inside Pillow
        raise ImageError("undecodable", f"{type(error).__name__}: {error}") from error


def gif_frames(data: bytes, most: int) -> int:
    """The number of a GIF's frames, `most` at most, counted by walking over their blocks, no pixel decoded.

    Raises ImageError where what comes before the first is too long.
    """
    frames = 0
    try:
        at = 13 + _color_table_bytes(data[10])
        while data[at] != 0x3B and frames < most:
            kind = data[at]
            if kind == 0x2C:
                frames += 1
                at += 11 + _color_table_bytes(data[at + 9])
            elif kind == 0x21:
                at += 2
            elif frames:
                break  # junk; the first frame is all that is read
            else:
                at += 1
                if at > MAX_GIF_HEADER_BYTES:
                    raise ImageError("undecodable", f"{at} bytes of junk before the first frame")
                continue
            while frames < most and data[at]:
                at += data[at] + 1
            at += 1
            if not frames and at > MAX_GIF_HEADER_BYTES:
                raise ImageError("undecodable", f"more than {MAX_GIF_HEADER_BYTES} bytes before the first frame")
    except IndexError:  # the data end early; whether the first frame is whole, the decoder says
        if not frames and len(data) > MAX_GIF_HEADER_BYTES:
            raise ImageError("undecodable", f"{len(data)} bytes without a whole frame") from None
    return frames


def _guard(data: bytes, max_pixels: int) -> None:
    """None; raises ImageError where reading the file's structure alone would take a reader minutes or gigabytes."""
    if data[:2] == b"\xff\xd8":
        _guard_jpeg(data)
    elif data[:4] == b"\x89PNG":
        _guard_png(data)
    elif data[:4] == b"GIF8":
        gif_frames(data, 1)
    elif data[:4] == b"RIFF":
        _guard_webp(data)
    elif data[:4] in TIFF_STARTS:
        _guard_tags(data, max_pixels)


def _guard_jpeg(data: bytes) -> None:
    # Only a real scan counts: the bytes of one may be in a thumbnail, or in a video behind the photo.
    at, segments, scans, exif = 2, 0, 0, b""
    many_scans = data.count(b"\xff\xda") > MAX_JPEG_SCANS
    while (marker := NEXT_MARKER.search(data, at)) is not None:
        if not scans and marker.end() - at > MAX_JPEG_FILL_BYTES:
            raise ImageError("undecodable", f"more than {MAX_JPEG_FILL_BYTES} bytes between two segments")
        kind, at = data[marker.end() - 1], marker.end()
        if kind == 0xD9 or (kind == 0xDA and not many_scans):
            break
        segments += 1
        scans += kind == 0xDA
        if segments > MAX_JPEG_SEGMENTS or scans > MAX_JPEG_SCANS:
            limits = f"{MAX_JPEG_SEGMENTS} segments or {MAX_JPEG_SCANS} scans"
            raise ImageError("undecodable", f"more than {limits} in a JPEG")
        if kind not in (0x01, 0xD8):
            end = at + int.from_bytes(data[at : at + 2], "big")
            if kind == 0xE1 and data[at + 2 : at + 8] == EXIF_START:
                exif += data[at + 8 : end]  # Pillow joins them, too
            at = end
    _guard_tags(exif)


def _guard_png(data: bytes) -> None:
    at, chunks = 8, 0
    while at < len(data):
        chunks += 1
        if chunks > MAX_PNG_CHUNKS:
            raise ImageError("undecodable", f"more than {MAX_PNG_CHUNKS} chunks in a PNG")
        end = at + 8 + int.from_bytes(data[at : at + 4], "big")
        if data[at + 4 : at + 8] == b"eXIf":
            _guard_tags(data[at + 8 : end])
        at = end + 4


def _guard_webp(data: bytes) -> None:
    at = 12
    while at < len(data):
        end = at + 8 + int.from_bytes(data[at + 4 : at + 8], "little")
        if data[at : at + 4] == b"EXIF":
            _guard_tags(data[at + 8 : end].removeprefix(EXIF_START))
        at = end + end % 2


def _guard_tags(data: bytes, max_pixels: int = MAX_PIXELS) -> None:
    """None; raises ImageError where a TIFF, or EXIF in the same form, claims more than Pillow and libtiff can take."""
    order: Any = "little" if data[:2] == b"II" else "big"

    def number(at: int, size_bytes: int) -> int:
        return int.from_bytes(data[at : at + size_bytes], order)

    is_big = number(2, 2) == 43  # BigTIFF
    word_bytes, count_bytes, entry_bytes = (8, 8, 20) if is_big else (4, 2, 12)
    folders, seen, tags, claimed_bytes = [number(8 if is_big else 4, word_bytes)], set(), 0, 0
    while folders:
        start = folders.pop()
        if start in seen:
            continue
        seen.add(start)
        first = start + count_bytes
        places = range(first, min(first + number(start, count_bytes) * entry_bytes, len(data)), entry_bytes)
        tags += len(places)
        if tags > MAX_TAGS:
            raise ImageError("undecodable", f"more than {MAX_TAGS} tags")
        sides_px = {}
        for at in places:
            tag, kind, count = number(at, 2), number(at + 2, 2), number(at + 4, word_bytes)
            one_bytes = TAG_TYPE_BYTES[kind] if kind < len(TAG_TYPE_BYTES) else 0
            size_bytes = count * one_bytes
            claimed_bytes += min(size_bytes, len(data)) if size_bytes > word_bytes else 0
            value = number(at + 4 + word_bytes, min(one_bytes, word_bytes))
            if tag in TAG_FOLDERS:
                folders.append(value)
            elif tag in TIFF_PARTS_TAGS and count > MAX_TIFF_PARTS:
                raise ImageError("undecodable", f"{count} strips or tiles, at most {MAX_TIFF_PARTS}")
            elif tag in TIFF_TILE_TAGS:
                sides_px[tag] = value
        if claimed_bytes > 2 * len(data) + MAX_TAG_BYTES:
            raise ImageError("undecodable", f"tags of {claimed_bytes} bytes in a file of {len(data)}")
        if len(sides_px) == 2 and math.prod(sides_px.values()) > max_pixels:  # decoded whole, however small the image
            raise ImageError("too_many_pixels", f"tiles of {' x '.join(map(str, sides_px.values()))} pixels")


def _color_table_bytes(flags: int) -> int:
    """The bytes of the GIF colour table that the flags announce."""
    return 3 * (2 << (flags & 7)) if flags & 0x80 else 0
