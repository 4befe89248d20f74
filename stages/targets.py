"""Target vectors that a pool's rows are compared with: those of the rows of references, and those in files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stages.pool_blocks import Block
from stages.unit_vectors import concatenate, pieces, read_vectors

DATACOMP_ASSETS = "https://github.com/sagadre/datacomp_baseline_assets"


@dataclass(frozen=True)
class Targets:
    """Some of them: those of a reference's block, or without one those of the file that `source` is."""

    source: str
    block: Block | None = None

    def read(self, column: str) -> np.ndarray:
        """[n, d] float16 or float32: those that are not zeros; [0, 0] of a block without any.

        Raises:
            WinnowError: see stages.unit_vectors.read_vectors and stages.tensor_files.read_rows.
        """
        if self.block is not None:
            return concatenate(list(read_vectors(self.block, column))).vector
        from stages.tensor_files import read_rows

        rows = read_rows(self.source)
        return rows[rows.any(axis=1)]


def list_targets(references: Mapping[str, Sequence[Block]], files: Sequence[str], most_rows: int) -> list[Targets]:
    """All targets, in parts: of references in pieces of at most `most_rows` rows, or one shard; then file by file."""
    parts = [Targets(name, block) for name in sorted(references) for block in pieces(references[name], most_rows)]
    return [*parts, *(Targets(path) for path in files)]
