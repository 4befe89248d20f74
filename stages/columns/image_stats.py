"""Sizes of the image: what DataComp's basic filter and most others ask about the picture's shape."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.base import Batch, Stage


@dataclass(frozen=True)
class ImageStats(Stage):
    """Shorter and longer side, their ratio (longer / shorter, at least 1) and the size of the file.

    Sides are those before any resize where the source knows them, as in DataComp's rule; `width_px` and `height_px`
    of the pool are those of the stored image. No image is read: the pool knows its size. Cost: negligible.
    """

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "columns"
    adds: ClassVar[Mapping[str, str]] = {
        "min_side_px": "int32",
        "max_side_px": "int32",
        "aspect_ratio": "float32",
        "image_bytes": "int64",
    }

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        sides = list(zip(batch.columns["original_width_px"], batch.columns["original_height_px"], strict=True))
        known = [None not in pair for pair in sides]  # before a download: where the table says them
        return {
            "min_side_px": [min(pair) if there else None for pair, there in zip(sides, known, strict=True)],
            "max_side_px": [max(pair) if there else None for pair, there in zip(sides, known, strict=True)],
            # A source may claim 0.
            "aspect_ratio": [
                max(pair) / min(pair) if there and min(pair) else None for pair, there in zip(sides, known, strict=True)
            ],
            "image_bytes": batch.columns["image_size_bytes"],
        }
