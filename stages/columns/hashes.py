"""Hashes of the pixels, of the picture as seen, and of the caption. Of the image's bytes the pool has `sha256`."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.base import Batch, Stage

FLAT_GREY_LEVELS = 4.0  # a picture whose 32 x 32 grey version varies less (standard deviation of 0..255) is flat


@dataclass(frozen=True)
class Hashes(Stage):
    """Three hashes as hex digits.

    pixels_sha256: of size and RGB pixels (upright), 64 digits: equal for lossless copies in other formats.
    image_phash: ImageHash's 64-bit pHash (DCT), 16 digits. Null for flat pictures, whose pHashes are noise: 27 of 28
        pairs of different plain pictures lie within 4 bits of each other.
    caption_sha256: of the caption in NFKC form, case folded, blanks collapsed; 64 digits.

    Cost: a decode, and about as much again.
    """

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "pixels"
    adds: ClassVar[Mapping[str, str]] = {"pixels_sha256": "string", "image_phash": "string", "caption_sha256": "string"}

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        return {
            "pixels_sha256": [pixels_sha256(image) for image in batch.images],
            "image_phash": [image_phash(image) for image in batch.images],
            "caption_sha256": [caption_sha256(caption) for caption in batch.columns["caption"]],
        }


def pixels_sha256(image: Any) -> str:
    """64 hex digits over the RGB image's width, height and pixels."""
    digest = hashlib.sha256(b"%d x %d " % image.size)
    digest.update(image.tobytes())
    return digest.hexdigest()


def image_phash(image: Any) -> str | None:
    """16 hex digits, or None for a flat picture."""
    import imagehash
    import numpy as np
    from PIL import Image

    grey = image.convert("L").resize((32, 32), Image.Resampling.LANCZOS)
    if np.asarray(grey, dtype=np.float32).std() < FLAT_GREY_LEVELS:
        return None
    return str(imagehash.phash(grey))  # which is its own first step: the hash of `grey` is the hash of `image`


def caption_sha256(caption: str) -> str:
    """64 hex digits over the normalised caption."""
    text = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
