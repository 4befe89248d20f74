"""Groups of rows that repeat each other as pairs: image and caption both; the policy of deduplication."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.core.passes import Pass, Passes
from stages.duplicates.groups import DuplicateStage, group_columns
from stages.pool_blocks import Block
from stages.selection import uids


@dataclass(frozen=True)
class PairDuplicates(DuplicateStage):
    """Groups of rows that are in the same group of images and in the same group of captions.

    So a caption that repeats under different images is kept, and so are an image's different captions. With
    `caption_above`, captions that repeat more often than that are duplicates whatever their images are: boilerplate.
    Where an image alone, or a caption alone, shall count, `image_is_duplicate` and `caption_is_duplicate` say so.
    Cost: three columns read once, and 24 bytes exchanged for each row that has duplicates of both kinds.

    Args:
        images: the column of groups of images: image_duplicates' or embedding_duplicates'.
        captions: the column of groups of captions.
        caption_above: a group of captions with more rows than this is a group of duplicates; None: never.
    """

    images: str = "image_group"
    captions: str = "caption_group"
    caption_above: Annotated[int, Field(ge=1)] | None = None

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = group_columns("pair")

    def compared(self) -> tuple[str, ...]:
        return (self.images, self.captions, *([f"{self.captions}_size"] if self.caption_above else []))

    def find_edges(self, blocks: Sequence[Block], passes: Passes) -> tuple[list[Pass], dict[str, Any]]:
        from stages.duplicates import equal_keys

        parts = equal_keys.num_partitions(blocks)
        items = [(block, self.compared(), self.caption_above, parts) for block in blocks]
        keys = passes.run("pair_keys", write_pair_keys, items)
        edges, counts = equal_keys.joined(passes, "pair", keys, parts)
        passes.drop(keys)
        return edges, counts


def write_pair_keys(block: Block, columns: Sequence[str], caption_above: int | None, parts: int, path: str) -> None:
    """None; writes (key, row) of the block's rows that are in a group of images and in one of captions, by key."""
    from stages.duplicates import equal_keys

    keys, rows = [np.empty((0, 2), np.uint64)], [np.empty(0, np.uint64)]
    start = block.first_row
    for shard in block.shards:
        table = block.table(shard, columns)
        image, caption = table[0], table[1]
        both = np.flatnonzero(image.is_valid().to_numpy() & caption.is_valid().to_numpy())
        place = f"{columns[0]}, {columns[1]} of pool shard {shard.name}"
        images, captions = uids.parse(image.take(both), place), uids.parse(caption.take(both), place)
        keys.append(uids.mix(uids.mix(images) ^ captions))
        rows.append(both.astype(np.uint64) + np.uint64(start))
        if caption_above is not None:
            often = np.flatnonzero(table[2].fill_null(1).to_numpy() > caption_above)
            keys.append(uids.parse(caption.take(often), place))
            rows.append(often.astype(np.uint64) + np.uint64(start))
        start += shard.rows
    equal_keys.write_by_key(path, np.concatenate(keys), np.concatenate(rows), parts)
