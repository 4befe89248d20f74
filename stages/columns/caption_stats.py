"""Lengths of the caption, as DataComp's basic filter counts them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.base import Batch, Stage


@dataclass(frozen=True)
class CaptionStats(Stage):
    """Word and character counts. Words are what `str.split()` gives; characters are code points, blanks included.

    Cost: about a microsecond a row.
    """

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "caption"
    adds: ClassVar[Mapping[str, str]] = {"caption_words": "int32", "caption_chars": "int32"}

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        captions = batch.columns["caption"]
        return {
            "caption_words": [len(caption.split()) for caption in captions],
            "caption_chars": [len(caption) for caption in captions],
        }
