"""What is stored of a downloaded image: img2dataset's recipe on guarded, upright, 8-bit RGB pixels.

Sizes, filters, borders and face blur are img2dataset 1.47's. It differs where that is wrong: EXIF orientation is
applied (unless the recipe says no), 16 bits become 8 by their high byte, gray is stored as RGB, and bombs are refused
before their pixels are decoded.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import ExifTags, Image

from pipeline.core.errors import ImageError
from pipeline.core.images import FORMATS, MAX_PIXELS, ORIENTATION_TAG, gif_frames, no_warnings, open_image
from stages.ingest.fetch.area_resize import area_resize
from stages.ingest.fetch.jpeg_check import sure_jpeg
from stages.ingest.fetch.settings import ImageRecipe

cv2.setNumThreads(1)  # many threads store pictures at once; each is one core's work

MAX_SIDE_PX = {"jpg": 65_500, "png": 1 << 30, "webp": 16_383}  # of the encoders
PLAIN_MODES = {"1", "L", "P", "RGB"}  # what decode_rgb reads without loss of meaning, transparency aside
EXIF_IFD = 0x8769
# Places (GPS), opaque or large (maker's note, XMP, IPTC, ICC), and pointers to other folders.
PRIVATE_OR_OPAQUE_TAGS = {0x8769, 0x8825, 0xA005, 0x927C, 0x02BC, 0x83BB, 0x8649, 0x8773, 0xC4A5, 0x9286, 0xEA1C}
MAX_EXIF_CHARS = 200


@dataclass(frozen=True)
class Picture:
    """A stored image. Sizes are as people see it; `exif` is a JSON object of the source's tags, as text."""

    data: bytes
    format: str  # a value of FORMATS
    width_px: int
    height_px: int
    original_width_px: int
    original_height_px: int
    exif: str


def stored_picture(data: bytes, recipe: ImageRecipe, face_boxes: Sequence[Sequence[float]] | None) -> Picture:
    """What the recipe stores of an image; the same bytes for the same input, in any thread.

    `face_boxes` are [left, top, right, bottom] as fractions of the source as it lies, before EXIF orientation.

    Raises:
        ImageError: undecodable, unsupported_format, too_many_pixels or too_many_frames.
    """
    frames = gif_frames(data, recipe.max_frames + 1) if data[:4] == b"GIF8" else 1
    if frames > recipe.max_frames:
        raise ImageError("too_many_frames", f"more than {recipe.max_frames} frames")
    sure = sure_jpeg(data)
    try:
        boxes = _usable_boxes(face_boxes) if recipe.blur_faces else []
        if recipe.keep_original and not boxes and sure is not None and sure.is_bare:  # Pillow has nothing to add
            size = (sure.width_px, sure.height_px)
            if math.prod(size) <= min(MAX_PIXELS, recipe.max_pixels) and _target_sizes(size, recipe) == (size, size):
                return Picture(data, "jpg", *size, *size, "{}")
        with no_warnings():
            image = open_image(data, recipe.max_pixels)
            animated = frames > 1 or _is_animated(image, recipe.max_frames)
            is_jpeg = image.format not in FORMATS or image.format == "JPEG"  # an MPO is a JPEG with more JPEGs behind
            if not is_jpeg:
                image.load()
            size = image.size
            tags = _tags(image)
            # The orientation has a say even where it is not applied: readers of kept bytes would apply it.
            orientation = tags.get(ORIENTATION_TAG, 1) if tags is not None else 1
            turned = isinstance(orientation, int) and 2 <= orientation <= 8
            if not (turned and recipe.apply_orientation):
                orientation = 1
            upright = size[::-1] if orientation >= 5 else size
            resized, final = _target_sizes(upright, recipe)
            kept = recipe.keep_original and not boxes and not turned and not animated and tags is not None
            kept = kept and size == resized == final and _is_plain(image, data) and math.prod(size) <= MAX_PIXELS
            exif = _exif_text(tags) if tags else "{}"
            if kept and is_jpeg:
                image.draft(image.mode, (max(1, size[0] // 8), max(1, size[1] // 8)))
            bgr = None if kept or sure is None else _opencv_pixels(data)
            if bgr is None and (not kept or sure is None):
                image.load()
            rgb = None if kept or bgr is not None else _rgb(image)
    except ImageError:
        raise
    except Exception as error:  # a hostile body can raise almost anything inside Pillow
        raise ImageError("undecodable", f"{type(error).__name__}: {error}") from error
    if kept:
        return Picture(data, FORMATS[image.format], *size, *size, exif)
    if math.prod(resized) > MAX_PIXELS or math.prod(final) > MAX_PIXELS:
        # Two images in a million are slivers that a recipe which scales the short side would blow up without end.
        raise ImageError("too_many_pixels", f"{resized[0]} x {resized[1]} pixels once resized, at most {MAX_PIXELS}")
    if max(final) > MAX_SIDE_PX[recipe.format]:
        raise ImageError("too_many_pixels", f"{max(final)} px, a {recipe.format} has {MAX_SIDE_PX[recipe.format]}")
    # Turned last, when it is smallest, and blurred before, as the boxes are of the source as it lies.
    if bgr is not None or boxes or orientation != 1 or not size == resized == final:
        pixels = np.asarray(rgb) if bgr is None else bgr
        pixels = _resized(pixels, resized[::-1] if orientation >= 5 else resized)
        pixels = _blurred(pixels, boxes)
        pixels = np.ascontiguousarray(_cropped_or_padded(_turned(pixels, orientation), final))
        stored = _encoded_pixels(pixels, recipe, is_bgr=bgr is not None)
    else:
        stored = _encoded(rgb, recipe)
    return Picture(stored, recipe.format, *final, *upright, exif)


def _is_animated(image: Image.Image, max_frames: int) -> bool:
    """Whether the file has more than one frame, told from headers; raises ImageError above the cap."""
    if image.format == "TIFF":  # a chain of pages, without a count
        if image.is_animated:
            try:
                image.seek(max_frames)
            except EOFError:
                image.seek(0)
            else:
                raise ImageError("too_many_frames", f"more than {max_frames} pages")
        return image.is_animated
    if image.format == "GIF":
        return False  # counted before; Pillow would walk over all that follows the first frame
    frames = getattr(image, "n_frames", 1)
    if frames > max_frames:
        raise ImageError("too_many_frames", f"{frames} frames, at most {max_frames}")
    return frames > 1


def _is_plain(image: Image.Image, data: bytes) -> bool:
    """Whether any reader sees the picture as meant: 8 bit, opaque, gray, palette or RGB."""
    deep_png = image.format == "PNG" and data[24:25] == b"\x10"
    return image.format in FORMATS and image.mode in PLAIN_MODES and "transparency" not in image.info and not deep_png


def _rgb(image: Image.Image) -> Image.Image:
    """The image as 8-bit RGB: transparency over white, 16 bits by their high byte, the rest as Pillow does."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # the latter in Pillow < 11
        high = (np.asarray(image) >> 8).astype(np.uint8)
        return Image.fromarray(high).convert("RGB")
    if image.mode in {"RGBA", "LA", "PA", "RGBa", "La"} or "transparency" in image.info:
        rgba = np.asarray(image.convert("RGBA"))
        rgb = np.empty((*rgba.shape[:2], 3), np.uint8)
        for y in range(0, len(rgba), 64):  # in strips, as the products take twice the memory
            strip = rgba[y : y + 64]
            alpha = strip[:, :, 3:].astype(np.uint16)
            # round(alpha / 255 * color + 255 - alpha), exactly
            rgb[y : y + 64] = (strip[:, :, :3] * alpha + 127) // 255 + (255 - alpha)
        return Image.fromarray(rgb)
    return image if image.mode == "RGB" else image.convert("RGB")


def _target_sizes(size: tuple[int, int], recipe: ImageRecipe) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) after the resize, and after the crop or border that follows; by img2dataset's rounding."""
    by_short_side = recipe.resize in ("keep_ratio", "center_crop")
    side_px = min(size) if by_short_side else max(size)
    if recipe.resize == "no" or (recipe.only_if_bigger and side_px <= recipe.size_px):
        return size, size
    scale = recipe.size_px / side_px
    resized = (max(1, round(size[0] * scale)), max(1, round(size[1] * scale)))
    square = (recipe.size_px, recipe.size_px)
    return resized, square if recipe.resize in ("center_crop", "border") else resized


def _resized(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The pixels at (width, height): area average where smaller, OpenCV's Lanczos where larger."""
    height_px, width_px = pixels.shape[:2]
    if (width_px, height_px) == size:
        return pixels
    if size[0] * size[1] < width_px * height_px:
        return area_resize(pixels, size[1], size[0])
    return cv2.resize(pixels, size, interpolation=cv2.INTER_LANCZOS4)


def _turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """The pixels upright, given their EXIF orientation (1 to 8)."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return pixels


def _cropped_or_padded(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The centre of the pixels at (width, height), or the pixels centred on white."""
    height_px, width_px = pixels.shape[:2]
    left, top = (width_px - size[0]) // 2, (height_px - size[1]) // 2
    pixels = pixels[max(0, top) :, max(0, left) :][: size[1], : size[0]]
    missing_y, missing_x = size[1] - pixels.shape[0], size[0] - pixels.shape[1]
    if not missing_y and not missing_x:
        return pixels
    result = np.full((size[1], size[0], 3), 255, np.uint8)
    result[missing_y // 2 :, missing_x // 2 :][: pixels.shape[0], : pixels.shape[1]] = pixels
    return result


def _usable_boxes(face_boxes: Sequence[Sequence[float]] | None) -> list[tuple[float, float, float, float]]:
    """The boxes with an area, clipped to the image; anything else is left out."""
    boxes = []
    for box in face_boxes if face_boxes is not None else ():
        try:
            left, top, right, bottom = (min(1.0, max(0.0, float(value))) for value in box)
            whole = not any(math.isnan(float(value)) for value in box)
        except (TypeError, ValueError, OverflowError):  # none, or not four numbers
            continue
        if whole and left < right and top < bottom:
            boxes.append((left, top, right, bottom))
    return boxes


def _blurred(pixels: np.ndarray, boxes: list[tuple[float, float, float, float]]) -> np.ndarray:
    """The pixels with the boxes blurred, by img2dataset's rule; pixels beyond the blurred edge are untouched.

    Each box grows by a tenth of its longer side; one Gaussian, for the largest of them, blurs image and mask, and the
    blurred mask blends the two.
    """
    height_px, width_px = pixels.shape[:2]
    areas = []
    longest_px = 0
    for box in boxes:
        left, top, right, bottom = (int(share * n) for share, n in zip(box, (width_px, height_px) * 2, strict=True))
        side_px = max(right - left, bottom - top)
        longest_px = max(longest_px, side_px)
        left, right = (min(max(int(x), 0), width_px - 1) for x in (left - 0.1 * side_px, right + 0.1 * side_px))
        top, bottom = (min(max(int(y), 0), height_px - 1) for y in (top - 0.1 * side_px, bottom + 0.1 * side_px))
        if left < right and top < bottom:
            areas.append((left, top, right, bottom))
    if not areas:
        return pixels
    radius_px = max(1, math.ceil(0.1 * longest_px))
    kernel = (2 * radius_px + 1, 2 * radius_px + 1)
    # Only this window is computed: the blurred mask reaches one radius beyond the boxes, its pixels' sources two.
    x0, y0 = (max(0, min(area[i] for area in areas) - 2 * radius_px) for i in (0, 1))
    x1, y1 = (min(n, max(area[i] for area in areas) + 2 * radius_px) for i, n in ((2, width_px), (3, height_px)))
    mask = np.zeros((y1 - y0, x1 - x0), np.float32)
    for left, top, right, bottom in areas:
        mask[top - y0 : bottom - y0, left - x0 : right - x0] = 1
    mask = cv2.GaussianBlur(mask, kernel, 0)[:, :, None]
    window = pixels[y0:y1, x0:x1].astype(np.float32)
    blended = window * (1 - mask) + cv2.GaussianBlur(window, kernel, 0) * mask
    result = np.array(pixels)
    result[y0:y1, x0:x1] = np.rint(blended).clip(0, 255).astype(np.uint8)
    return result


def _opencv_pixels(data: bytes) -> np.ndarray | None:
    """The pixels of a sound JPEG as it lies, blue first, as Pillow decodes them, without its copies; None: not read."""
    return cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR | cv2.IMREAD_IGNORE_ORIENTATION)


def _encoded_pixels(pixels: np.ndarray, recipe: ImageRecipe, is_bgr: bool) -> bytes:
    """The pixels as a file of the recipe's format. A JPEG has the bytes that Pillow writes: the encoder is the same."""
    if is_bgr != (recipe.format == "jpg"):
        pixels = cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR)  # the same swap in both directions
    if recipe.format == "jpg":
        return cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, recipe.quality])[1].tobytes()
    return _encoded(Image.fromarray(pixels), recipe)


def _encoded(image: Image.Image, recipe: ImageRecipe) -> bytes:
    """The RGB image as a file of the recipe's format, without metadata."""
    image.info = {}  # some writers take profiles and metadata from there
    out = io.BytesIO()
    if recipe.format == "jpg":
        image.save(out, "JPEG", quality=recipe.quality, subsampling="4:2:0")
    elif recipe.format == "webp":
        image.save(out, "WEBP", quality=recipe.quality)
    else:
        image.save(out, "PNG", compress_level=6)
    return out.getvalue()


def _tags(image: Image.Image) -> Image.Exif | None:
    """The image's EXIF tags, or None where they can't be read."""
    try:
        return image.getexif()
    except Exception:  # hostile or broken EXIF can raise almost anything; it says nothing about the pixels
        return None


def _exif_text(tags: Image.Exif) -> str:
    """The tags as a JSON object in ASCII, named as in img2dataset's column: {"Image Make": "Canon", ...}."""
    texts = {}
    for folder in ("Image", "EXIF"):
        try:
            values = dict(tags if folder == "Image" else tags.get_ifd(EXIF_IFD))
        except Exception:  # as in _tags
            continue
        for tag, value in values.items():
            if tag in PRIVATE_OR_OPAQUE_TAGS or tag not in ExifTags.TAGS:
                continue
            text = _tag_text(value)
            if text is not None and 0 < len(text) <= MAX_EXIF_CHARS:
                texts[f"{folder} {ExifTags.TAGS[tag]}"] = text
    return json.dumps(texts)


def _tag_text(value: object) -> str | None:
    """An EXIF value as text without control characters, or None where it is too long or not of text or numbers."""
    if isinstance(value, (bytes, str)):
        if len(value) > 2 * MAX_EXIF_CHARS:
            return None
        text = value.decode("ascii", "replace") if isinstance(value, bytes) else value
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become question marks
        text = "".join(char for char in text if char.isprintable()).strip()
        return None if isinstance(value, bytes) and "\ufffd" in text else text
    if isinstance(value, tuple):
        parts = [_tag_text(part) for part in value[: MAX_EXIF_CHARS + 1]]
        return None if None in parts else f"[{', '.join(parts)}]"
    try:
        numerator, denominator = int(value.numerator), int(value.denominator)  # integers have both
    except (AttributeError, TypeError, ValueError, OverflowError):
        return str(value) if isinstance(value, float) else None
    divisor = math.gcd(numerator, denominator) or 1
    numerator, denominator = numerator // divisor, denominator // divisor
    return str(numerator) if denominator == 1 else f"{numerator}/{denominator}"
