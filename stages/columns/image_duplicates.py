"""Groups of rows with the same image: by its bytes, by its pixels, and by how it looks, over the whole pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.errors import ConfigError
from pipeline.core.passes import Pass, Passes
from stages.duplicates.groups import DuplicateStage, group_columns
from stages.pool_blocks import Block

PHASH_BITS = 4


@dataclass(frozen=True)
class ImageDuplicates(DuplicateStage):
    """Groups of images that have a hash in common, or pHashes that differ in at most `phash_bits` bits.

    An image joins a group when it is like one of it. A row without an image is in no group; one without a pHash (a flat
    picture) is compared by the other hashes. Of a sha256 the first 128 bits count. Every pair is found: nothing is left
    to chance. Cost: a column read once for each hash and 24 bytes a row exchanged (pHash: 16), then for the
    bits 80 bytes a different pHash at the default: see stages/duplicates/bit_distance.py.

    A pHash knows outlines and shading. Of 6,841 photographs (Flickr8k) none met another one within 6 bits. Of 5,643
    product pictures on white, 146 had the pHash of another product, and at 4 bits 1,708 were in groups, one of them of
    640: shoes that stand alike. For such pools leave image_phash out.

    Args:
        by: the hashes that are compared.
        phash_bits: of 64 that may differ; 0: none. Within 2 are other sizes and JPEG qualities down to 50; 3 % cut off
            each side is within 4 for four in ten pictures, within 8 for nine in ten. Of N random hashes, N * 4e-14
            (4 bits), N * 5e-12 (6) or N * 3e-10 (8) are so close to a given one.
        hashes: the stage that pixels_sha256 and image_phash come from, by its name or its `as:`.
    """

    by: Annotated[tuple[Literal["sha256", "pixels_sha256", "image_phash"], ...], Field(strict=False, min_length=1)] = (
        "sha256",
        "pixels_sha256",
        "image_phash",
    )
    phash_bits: Annotated[int, Field(ge=0, le=8)] = PHASH_BITS
    hashes: str = "hashes"

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = group_columns("image")

    def __post_init__(self) -> None:
        if len(set(self.by)) < len(self.by):
            raise ConfigError(f"image_duplicates.by = {', '.join(self.by)}, expected each hash once")
        if self.phash_bits != PHASH_BITS and "image_phash" not in self.by:
            raise ConfigError(
                f"image_duplicates.phash_bits = {self.phash_bits} has no effect, expected image_phash in `by`"
            )
        if self.hashes != "hashes" and self.by == ("sha256",):
            raise ConfigError(f"image_duplicates.hashes = {self.hashes} has no effect, expected one of them in `by`")

    def compared(self) -> tuple[str, ...]:
        prefix = "" if self.hashes == "hashes" else f"{self.hashes}_"
        return tuple(name if name == "sha256" else prefix + name for name in self.by)

    def find_edges(self, blocks: Sequence[Block], passes: Passes) -> tuple[list[Pass], dict[str, Any]]:
        from stages.duplicates import bit_distance, equal_keys

        found: list[Pass] = []
        facts: dict[str, int] = {}
        for name, column in zip(self.by, self.compared(), strict=True):
            edges, counts, keys = equal_keys.edges(blocks, passes, column, 1 if name == "image_phash" else 2)
            found += edges
            if name == "image_phash" and self.phash_bits:
                pairs, more = bit_distance.edges(
                    keys,
                    equal_keys.num_partitions(blocks),
                    passes,
                    sum(block.rows for block in blocks),
                    self.phash_bits,
                )
                found.append(pairs)
                counts |= more
            passes.drop(keys)
            facts |= {f"{name}_{key}": count for key, count in counts.items()}
        return found, facts
