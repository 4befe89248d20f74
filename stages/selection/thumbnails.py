"""Captions and small pictures of a few rows of a pool, for people to look at; known faces are blurred in them.

Boxes of faces are those of samples.FACE_BOXES, fractions of the original as it lies. They fit a stored picture of the
original's proportions. Where that is not so (cropped, padded, turned), or a box can't be read, the whole picture is
blurred: a face that might show does not.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from pipeline.core import images, pool, storage
from pipeline.core.errors import ImageError
from stages.ingest.samples import FACE_BOXES

if TYPE_CHECKING:
    from PIL import Image

THUMBNAIL_PX = 96  # the longer side
JPEG_QUALITY = 60
CAPTION_CHARS = 300  # a longer caption is cut
FACE_MARGIN = 0.1  # of a box's longer side, as img2dataset and our downloads have it
BLUR = 0.5  # sigma of the Gaussian, of the longer side of what is blurred: nothing of a face is left
MIN_BLUR_PX = 3
UPRIGHT = ("1", "Horizontal (normal)")  # as our downloads and img2dataset's write it
WHOLE = (0.0, 0.0, 1.0, 1.0)
SIZES = ("width_px", "height_px", "original_width_px", "original_height_px")
COLUMNS = ("caption", "image_offset_bytes", "image_size_bytes", *SIZES)
Box = tuple[float, float, float, float]  # left, top, right, bottom as fractions


def read_details(
    pool_path: str, names: Sequence[str], rows: Iterable[tuple[int, int]]
) -> dict[tuple[int, int], dict[str, Any]]:
    """{(number of the shard, row): {caption, thumbnail}}; the thumbnail is a JPEG, None where no image decodes.

    Args:
        names: of all shards, by number.
    """
    by_shard: dict[int, set[int]] = {}
    for shard_number, row in rows:
        by_shard.setdefault(shard_number, set()).add(row)
    found = {}
    for shard_number, inside in sorted(by_shard.items()):
        name = names[shard_number]
        with storage.open_read(storage.join(pool_path, f"{name}.parquet")) as file:
            there = pq.read_schema(file).names
        wanted = [*COLUMNS, *(column for column in (FACE_BOXES, "exif") if column in there)]
        table = pool.read_rows(pool_path, name, wanted).take(sorted(inside))
        stored = table["image_offset_bytes"].is_valid()
        data = pool.read_images(pool_path, name, table.filter(stored)) if any(stored.to_pylist()) else iter(())
        for row, values in zip(sorted(inside), table.to_pylist(), strict=True):
            caption = values["caption"] or ""
            text = caption[:CAPTION_CHARS] + ("…" if len(caption) > CAPTION_CHARS else "")
            has_image = values["image_offset_bytes"] is not None
            picture = thumbnail(next(data), face_boxes(values)) if has_image else None
            found[shard_number, row] = {"caption": text, "thumbnail": picture}
    return found


def thumbnail(data: bytes, boxes: Sequence[Box]) -> bytes | None:
    """A small JPEG of the image, the boxes blurred; None where it does not decode."""
    try:
        image = images.decode_rgb(data)
        with images.no_warnings():
            turned = images.open_image(data).getexif().get(images.ORIENTATION_TAG, 1) != 1
    except ImageError:  # in a pool by another tool: the page goes on without this picture
        return None
    image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    if boxes:
        image = _blurred(image, [WHOLE] if turned else boxes)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return jpeg.getvalue()


def face_boxes(row: Mapping[str, Any]) -> list[Box]:
    """What to blur in the row's stored picture: its faces' boxes, [WHOLE] where they can't be placed for certain."""
    text = row.get(FACE_BOXES)
    if text is None or not text.strip():
        return []
    try:
        boxes = [_box(sides) for sides in json.loads(text) or ()]
    except (TypeError, ValueError, OverflowError, RecursionError):
        return [WHOLE]
    return boxes if not boxes or _has_proportions(row) else [WHOLE]


def _box(sides: Any) -> Box:
    """The part of a box that is inside the picture. Raises where there is none, or no box."""
    left, top, right, bottom = (float(side) for side in sides)
    if not all(map(math.isfinite, (left, top, right, bottom))):
        raise ValueError
    left, top, right, bottom = (min(1.0, max(0.0, side)) for side in (left, top, right, bottom))
    if left >= right or top >= bottom:  # outside, or in pixels
        raise ValueError
    return left, top, right, bottom


def _has_proportions(row: Mapping[str, Any]) -> bool:
    """True where the stored picture lies as the original does, neither cropped nor padded, up to a pixel."""
    width, height, original_width, original_height = (row[name] for name in SIZES)
    if None in (width, height, original_width, original_height) or _is_turned(row.get("exif")):
        return False
    scale = max(width / original_width, height / original_height)
    return abs(width - original_width * scale) <= 1.5 and abs(height - original_height * scale) <= 1.5


def _is_turned(exif: str | None) -> bool:
    """Whether the original's EXIF tags (a download's column) say so, or can't be read."""
    try:
        tags = json.loads(exif) if exif else {}
        return str(tags.get("Image Orientation", "1")) not in UPRIGHT
    except (ValueError, AttributeError, RecursionError):
        return True


def _blurred(image: Image.Image, boxes: Sequence[Box]) -> Image.Image:
    """The image with each box, grown by FACE_MARGIN, blurred beyond recognition; the rest is untouched."""
    from PIL import ImageFilter

    result = image.copy()
    for left, top, right, bottom in boxes:
        longest_px = max((right - left) * image.width, (bottom - top) * image.height)
        margin_px = FACE_MARGIN * longest_px
        area = (
            max(0, math.floor(left * image.width - margin_px)),
            max(0, math.floor(top * image.height - margin_px)),
            min(image.width, math.ceil(right * image.width + margin_px)),
            min(image.height, math.ceil(bottom * image.height + margin_px)),
        )
        blurred = image.filter(ImageFilter.GaussianBlur(max(MIN_BLUR_PX, BLUR * longest_px)))
        result.paste(blurred.crop(area), area)
    return result
