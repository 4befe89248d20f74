"""Groups of captions that say the same in nearly the same words: MinHash LSH, verified, over the whole pool."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from pipeline.core.errors import ConfigError
from pipeline.core.passes import Pass, Passes
from stages.base import Stage
from stages.columns.minhash import NOTES, MinHash
from stages.duplicates.bands import choose_bands, found_probability
from stages.duplicates.groups import DuplicateStage, group_columns
from stages.pool_blocks import Block


@dataclass(frozen=True)
class CaptionDuplicates(DuplicateStage):
    """Groups of captions whose sets of shingles have a Jaccard similarity of `threshold` or more, by MinHash LSH.

    A caption joins a group when it is alike to one of it; captions with the same set are always together. Captions
    without a shingle (empty ones) are each other's duplicates. Cost: captions and signatures read once, then the join:
    see stages/duplicates/band_join.py.

    Args:
        signatures: the column of the stage `minhash`, which also says what a shingle is.
        threshold: least similarity of two captions.
        recall: of a pair exactly at the threshold; decides bands and rows where they are not given.
        bands, rows: of the LSH, both or none.
        verify: jaccard: candidates are compared by their sets. signature: by the places in which their signatures
            agree, an estimate with a standard error of .04 at 0.7 and 128 permutations.
    """

    signatures: str = "minhash_signature"
    threshold: Annotated[float, Field(gt=0, le=1)] = 0.7
    recall: Annotated[float, Field(gt=0, lt=1)] = 0.9
    bands: Annotated[int, Field(ge=1)] | None = None
    rows: Annotated[int, Field(ge=1)] | None = None
    verify: Literal["jaccard", "signature"] = "jaccard"

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = group_columns("caption")

    def __post_init__(self) -> None:
        if (self.bands is None) != (self.rows is None):
            raise ConfigError(f"caption_duplicates: bands = {self.bands}, rows = {self.rows}, expected both or none")

    def compared(self) -> tuple[str, ...]:
        return (self.signatures,)

    def check_needs(self, types: Mapping[str, str], owners: Mapping[str, Stage]) -> None:
        super().check_needs(types, owners)
        minhash = owners.get(self.signatures)
        if not isinstance(minhash, MinHash):
            raise ConfigError(f"signatures = {self.signatures}, expected a column of the stage minhash")
        bands, rows = self.bands_and_rows(minhash.num_permutations)
        if bands * rows > minhash.num_permutations:
            expected = f"at most minhash's {minhash.num_permutations} permutations"
            raise ConfigError(f"bands = {bands}, rows = {rows}: {bands * rows}, expected {expected}")

    def bands_and_rows(self, num_permutations: int) -> tuple[int, int]:
        """Bands and rows of the LSH. Raises ConfigError when none do."""
        if self.bands is not None and self.rows is not None:
            return self.bands, self.rows
        try:
            return choose_bands(self.threshold, num_permutations, self.recall)
        except ValueError as error:
            raise ConfigError(f"threshold = {self.threshold}: {error}, expected a higher one") from error

    def find_edges(self, blocks: Sequence[Block], passes: Passes) -> tuple[list[Pass], dict[str, Any]]:
        from stages.duplicates.band_join import BandJoin, edges

        minhash = MinHash(**json.loads(blocks[0].metadata(self.signatures)[NOTES.encode()]))
        bands, rows = self.bands_and_rows(minhash.num_permutations)
        shingling = minhash.shingling if self.verify == "jaccard" else None
        found, facts = edges(blocks, passes, BandJoin(self.signatures, shingling, self.threshold, bands, rows))
        expected = round(found_probability(self.threshold, bands, rows), 4)
        return found, {**facts, "bands": bands, "rows_a_band": rows, "expected_recall_at_threshold": expected}
