"""Guarded decoding of untrusted image bytes.

The header is read first; nothing above the pixel cap is decoded. Only formats of FORMATS are opened, whatever the
bytes claim. Orientation (EXIF) is applied only where asked: training data wants the picture as people see it, while
published benchmarks ignore it.
"""

from __future__ import annotations

import contextlib
import io
import threading
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

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
