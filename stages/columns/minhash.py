"""MinHash signatures of the caption, from which near-duplicate captions are found."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from stages.base import Batch, LoadContext, Stage
from stages.duplicates.shingles import Shingling
from stages.duplicates.signatures import rensa_signatures, require_rensa, signatures

NOTES = "minhash"  # the key under which column files tell the stage's fields


@dataclass(frozen=True)
class MinHash(Stage):
    """The caption's signature: `num_permutations` little-endian uint32, all ones for a caption without a word.

    Captions are cut to `max_chars` code points, then put into NFKC form, case folded, their blanks collapsed. Two
    signatures agree in about as large a fraction of values as the captions share shingles (their Jaccard index).

    Args:
        shingle: what a shingle is made of: words split on blanks, or characters (blanks included).
        shingle_size: how many in a row; a shorter caption is one shingle.
        scheme: `affine32`: datasketch's default since 2.0, value by value; `legacy`: its only one before;
            `rensa`: RMinHash of the package rensa (its algorithm version 2). No two can be compared.

    Cost: about 2 microseconds a caption of 13 words; 4 bytes a permutation and row.
    """

    shingle: Literal["word", "character"] = "word"
    shingle_size: Annotated[int, Field(ge=1, le=64)] = 1
    max_chars: Annotated[int, Field(ge=1)] = 10_000
    num_permutations: Annotated[int, Field(ge=16, le=1024)] = 128
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 1
    scheme: Literal["affine32", "legacy", "rensa"] = "affine32"

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "caption"
    adds: ClassVar[Mapping[str, str]] = {"minhash_signature": "binary"}
    batch_size: ClassVar[int] = 4096

    def __post_init__(self) -> None:
        if self.scheme == "rensa":
            require_rensa("stages.minhash.scheme")

    def notes(self) -> Mapping[str, str]:
        return {NOTES: json.dumps(asdict(self), sort_keys=True)}

    @property
    def shingling(self) -> Shingling:
        """What a shingle of a caption is."""
        return Shingling(self.shingle, self.shingle_size, self.max_chars)

    def load(self, context: LoadContext) -> Any:
        if self.scheme == "rensa":
            require_rensa("stages.minhash.scheme")  # a stage that was sent to this worker was not built here

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        captions = batch.columns["caption"]
        if self.scheme == "rensa":
            found = rensa_signatures(captions, self.shingling, self.num_permutations, self.seed)
        else:
            found = signatures(captions, self.shingling, self.scheme, self.num_permutations, self.seed)
        data = np.ascontiguousarray(found, "<u4")
        offsets = np.arange(len(data) + 1, dtype=np.int32) * np.int32(4 * self.num_permutations)
        buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
        return {"minhash_signature": pa.Array.from_buffers(pa.binary(), len(data), buffers)}
