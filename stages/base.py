"""What a stage is: something that adds columns to every row of a pool, and never drops or reorders rows.

A stage is a frozen dataclass. Its fields are the parameters that change values, and so part of its identity; where
and how fast it runs (devices, workers, batch size) is `cluster:` in the config and never a field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from pipeline.core import storage
from pipeline.core.passes import Passes
from stages.pool_blocks import Block

if TYPE_CHECKING:
    import numpy as np

FACTS = "facts.json"  # what a finished `fit` returned, in its folder


@dataclass(frozen=True)
class Batch:
    """Consecutive ok rows of one shard.

    `columns` holds lists of equal length: `uid`, the pool's own columns (caption, width_px, ...) and those that the
    stage `needs`. `image_bytes` and `images` (PIL, RGB, upright) are there when the stage reads them. `shard` is the
    shard's name and `rows` [n] the rows' numbers in it, for a stage whose `fit` found a value for each row.
    """

    columns: Mapping[str, list]
    shard: str
    rows: np.ndarray
    image_bytes: Sequence[bytes] | None = None
    images: Sequence[Any] | None = None

    def __len__(self) -> int:
        return len(self.rows)


@dataclass(frozen=True)
class LoadContext:
    """What a worker offers a stage: `device` (`cpu`, `cuda`), `threads`, and the `model` that its config names.

    `model` is what pipeline.core.clip_model.load takes, or None for a stage without one. `fit_path` is the folder that
    `fit` wrote to, for a stage of the whole pool.
    """

    device: str = "cpu"
    threads: int = 1
    model: Mapping[str, Any] | None = None
    fit_path: str | None = None


@dataclass(frozen=True)
class Stage:
    """Columns of a row from that row alone, or with `whole_pool` also from what `fit` found in all rows."""

    version: ClassVar[int] = 1  # bump when any output value changes
    reads: ClassVar[str] = "caption"  # caption | bytes | pixels | columns
    needs: ClassVar[tuple[str, ...]] = ()  # columns of earlier stages
    adds: ClassVar[Mapping[str, str]] = {}  # column -> a key of column_files.ARROW_TYPES
    uses_model: ClassVar[bool] = False  # True: its field `model` names one of the config's `models`
    uses_references: ClassVar[bool] = False  # True: its field `against` names references, and fit_against is its fit
    assets: ClassVar[Mapping[str, str]] = {}  # external file that may be missing -> where to get it, in one line
    may_work_within: ClassVar[bool] = True  # False: what it finds is only true of the whole pool
    whole_pool: ClassVar[bool] = False  # True: `fit` comes first, and any change of the pool makes all files stale
    batch_size: ClassVar[int] = 256  # rows per process() call where `cluster:` does not say

    @property
    def needs_in_process(self) -> tuple[str, ...]:
        """Those of `needs` that process() reads; a stage of the whole pool may need them in `fit` alone."""
        return self.needs

    def external_files(self) -> Mapping[str, str]:
        """{parameter: path} of files outside the pool that decide values; their content is part of the identity.

        A parameter of several files (a mapping, a list, a folder) gives an entry for each: `parameter.key`.
        """
        return {}

    def empty_columns(self) -> Mapping[str, str]:
        """{column of `adds`: why} of those that have no value in any row with these parameters."""
        return {}

    def unavailable(self) -> str:
        """ "" where the stage can run, else one line: which asset is missing here, and where to get it.

        Such a stage does not run and nothing takes its place: strategies that need it are N/A.
        """
        files = self.external_files()
        for asset, where in self.assets.items():
            for parameter, path in files.items():
                if path and parameter.split(".")[0] == asset and not storage.exists(path):
                    return f"{parameter} = {path} is not there: {where}"
        return ""

    def check_needs(self, types: Mapping[str, str], owners: Mapping[str, Stage]) -> None:
        """None. Raises ConfigError, without a place, when a needed column can't serve.

        Args:
            types: {needed column: its type, as in `adds`}.
            owners: {needed column: the stage that adds it}, of those that are not the pool's own.
        """

    def notes(self) -> Mapping[str, str]:
        """What the stage's column files say of themselves, for later stages that read them."""
        return {}

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """Facts for the record, after passes over all rows have written what load() needs into passes.folder.

        Called where no heavy work may be done; that is for the passes' functions. A resumed run calls it again.
        """
        raise NotImplementedError

    def fit_against(
        self, blocks: Sequence[Block], references: Mapping[str, Sequence[Block]], passes: Passes
    ) -> Mapping[str, Any]:
        """As fit, of a stage of the whole pool that uses references: {name: blocks with the stage's `needs`}."""
        raise NotImplementedError

    def load(self, context: LoadContext) -> Any:
        """The state that process() gets: weights, tables. Called once per worker."""
        return None

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        """{column: one value per row} for exactly the columns of `adds`; None or NaN where there is no value."""
        raise NotImplementedError
