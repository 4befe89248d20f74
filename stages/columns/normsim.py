"""NormSim: how near a row's image is to those of a target set, by all of them (NormSim_2, VAS) or by the nearest one.

Wang et al., "CLIPLoss and Norm-Based Data Selection Methods for Multimodal Contrastive Learning", NeurIPS 2024 (arXiv
2405.19547), and "Variance Alignment Score", 2024 (arXiv 2402.02055); code: ypwang61/negCLIPLoss_NormSim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.core import exchange
from pipeline.core.errors import ConfigError, WinnowError
from pipeline.core.passes import Pass, Passes
from stages.base import Stage
from stages.pool_blocks import Block
from stages.second_moment import SecondMoment, quadratic_forms
from stages.shard_values import FOUND, SHARDS, FittedStage, shard_names, shard_starts, write_by_shard
from stages.targets import DATACOMP_ASSETS, Targets, list_targets
from stages.task_device import narrow, task_device
from stages.unit_vectors import CACHED_ROWS, concatenate, packed, pieces, read_vectors, unit, unpacked

PIECE_ROWS = 65_536  # rows whose vectors a task holds, unless a shard has more
TARGET_ROWS = 16_384  # targets that are held at once
TILE_ROWS = {"cpu": 512, "cuda": 16_384}  # rows that are compared with all these at once


@dataclass(frozen=True)
class NormSim(FittedStage):
    """normsim_2: ||F f||_2, and normsim_inf: the largest |<t, f>|; F has the target vectors t as rows, f is the row's.

    All vectors are taken at length 1. As in the published code the largest *absolute* cosine counts. VAS, f^T S f with
    S = F^T F / n, is normsim_2^2 / n and ranks rows alike: `top: {column: normsim_2}` is VAS too. Each row of a
    reference is a target, as is each row of a file; those without a vector (or with one of zeros) are not. Published:
    ImageNet's training images as targets, or the training sets of 24 tasks; CLIP score or negCLIPLoss first (stage
    negclip), then this. Both columns are null for a row without a vector.

    normsim_2 is summed in float64, F^T F without any rounding, and rounded to float32. normsim_inf is the cosine,
    exact and then rounded to float32, of the target that a comparison in float32 puts first among each 16,384: of
    nearly equal ones it may not be the nearest, and so be too low by at most (d + 4) 2^-23 (9e-5 at 768 dimensions;
    none was seen to be). Neither depends on the order of rows, shards and targets beyond that.

    Args:
        embedding: a column of vectors, that the references have as well; published: clip_image.
        against: names of `references:` whose rows are targets.
        target_features: files of target vectors [n, d], .npy, .npz, .safetensors, or .pt as DataComp publishes them,
            which is read without executing what is in it.
        norms: which of the two is found; the other column is null.

    Cost: for n rows and m targets of d dimensions the column read once, and once for each file (or 65,536 rows) of
    targets; 6 m d^2 operations for F^T F and 2 n d^2 for normsim_2, in float64; 2 n m d in float32 for normsim_inf. For
    a million rows and ImageNet's 1.28 million at 768: 3 minutes of a core for normsim_2, and for normsim_inf 16 hours
    (or, by its rate, 40 s of a GPU of 50 TFLOPS). Kept while it runs: 4 d bytes a target. Memory of a task: 14 d bytes
    a row of PIECE_ROWS (0.7 GB at 768), 60 d^2 bytes, and a file of targets whole.
    """

    embedding: str = "clip_image"
    against: Annotated[tuple[str, ...], Field(strict=False)] = ()
    target_features: Annotated[tuple[str, ...], Field(strict=False)] = ()
    norms: Annotated[tuple[Literal[2, "inf"], ...], Field(strict=False, min_length=1)] = (2, "inf")

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = {"normsim_2": "float32", "normsim_inf": "float32"}
    found_types: ClassVar[Mapping[str, pa.DataType]] = {"2": pa.float32(), "inf": pa.float32()}
    uses_references: ClassVar[bool] = True
    assets: ClassVar[Mapping[str, str]] = {
        "target_features": "ImageNet's training images by CLIP ViT-L/14 are in1k_clip_vit_l14_{0..4}.pt at "
        + DATACOMP_ASSETS
    }

    def empty_columns(self) -> Mapping[str, str]:
        return {f"normsim_{norm}": f"norms has no {norm}" for norm in (2, "inf") if norm not in self.norms}

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.embedding,)

    def external_files(self) -> Mapping[str, str]:
        return {f"target_features.{number}": path for number, path in enumerate(self.target_features)}

    def check_needs(self, types: Mapping[str, str], owners: Mapping[str, Stage]) -> None:
        if not (self.against or self.target_features):
            raise ConfigError("against is empty, expected targets there or in target_features")

    def fit_against(
        self, blocks: Sequence[Block], references: Mapping[str, Sequence[Block]], passes: Passes
    ) -> Mapping[str, Any]:
        """{rows_with_vectors, targets}; a file of both norms for each piece of the pool."""
        work = passes.work()
        parts = pieces(blocks, PIECE_ROWS)
        given = list_targets(references, self.target_features, PIECE_ROWS)
        targets = work.run("targets", write_targets, [(one, self.embedding) for one in given])
        num_targets = exchange.read_notes(targets.paths).get("targets", 0)
        if not num_targets:
            named = ", ".join([*self.against, *self.target_features]) or "against and target_features are empty"
            raise WinnowError(f"normsim: no target with a vector ({named}), expected some")
        summed = None
        if 2 in self.norms:
            moments = work.run("moments", write_moment, [(path,) for path in targets.paths])
            summed = work.run("moment", write_sum, [(moments,)])
        largest: list[list[str]] = [[] for _ in parts]
        if "inf" in self.norms:
            items = [(block, self.embedding, path) for block in parts for path in targets.paths]
            paths = iter(work.run("largest", write_largest, items).paths)
            largest = [[next(paths) for _ in given] for _ in parts]
        starts = shard_starts(blocks)
        items = [(block, self, summed, own, starts) for block, own in zip(parts, largest, strict=True)]
        found = passes.run(FOUND, write_norms, items)
        return {**exchange.read_notes(found.paths), "targets": num_targets, SHARDS: shard_names(blocks)}


def write_targets(targets: Targets, column: str, path: str) -> None:
    """None; writes (target), float32 vectors as they are, TARGET_ROWS in a partition; its notes count them."""
    rows = targets.read(column).astype(np.float32)
    partition = np.arange(len(rows)) // TARGET_ROWS
    notes = {"targets": len(rows), "partitions": -(-len(rows) // TARGET_ROWS)}
    exchange.write(path, {"target": packed(rows)}, partition, notes)


def read_targets(path: str) -> Iterator[np.ndarray]:
    """The file's targets, [n, d] float32 with n <= TARGET_ROWS, one array after the other."""
    for partition in range(exchange.read_notes([path])["partitions"]):
        table = exchange.read([path], partition)
        assert table is not None  # by the notes
        yield unpacked(table["target"], np.float32)


def write_moment(targets_path: str, path: str) -> None:
    """None; writes the second moment of one file's targets, or nothing where it has none."""
    moment = None
    for rows in read_targets(targets_path):
        moment = moment or SecondMoment(rows.shape[1])
        moment.add(rows)
    _write_moment(path, moment)


def _write_moment(path: str, moment: SecondMoment | None) -> None:
    parts = np.empty((0, 0)) if moment is None else moment.parts.reshape(-1, moment.parts.shape[-1])
    exchange.write(path, {"row": packed(parts)})


def _read_moment(path: str) -> SecondMoment | None:
    table = exchange.read([path])
    if table is None:
        return None
    rows = unpacked(table["row"], np.float64)
    return SecondMoment(rows.shape[1], rows.reshape(3, rows.shape[1], rows.shape[1]))


def write_sum(moments: Pass, path: str) -> None:
    """None; writes the second moment of all targets. Raises WinnowError where sources differ in length."""
    whole = None
    for one in moments.paths:
        moment = _read_moment(one)
        if whole is None or moment is None:
            whole = whole or moment
            continue
        _check_length(moment.parts.shape[-1], whole.parts.shape[-1])
        whole.add_moment(moment)
    _write_moment(path, whole)


def _check_length(of_targets: int, expected: int) -> None:
    if of_targets != expected:
        raise WinnowError(f"normsim: targets with vectors of {of_targets} values, expected {expected} as others have")


def write_largest(block: Block, column: str, targets_path: str, path: str) -> None:
    """None; writes (largest), float64, of each of the block's rows with a vector: of |cosine| with a file's targets."""
    device = task_device()
    rows = concatenate(list(read_vectors(block, column))).vector
    found = np.zeros(len(rows))
    tile = TILE_ROWS[device.type]
    narrow_rows = narrow(rows, device)
    for targets in read_targets(targets_path) if len(rows) else ():
        _check_length(targets.shape[1], rows.shape[1])
        narrow_targets = narrow(targets, device)
        place = np.empty(len(rows), np.int64)
        for start in range(0, len(rows), tile):
            cosines = narrow_rows[start : start + tile] @ narrow_targets.T
            place[start : start + tile] = cosines.abs_().max(dim=1).indices.cpu().numpy()
        for start in range(0, len(rows), CACHED_ROWS):
            own = slice(start, start + CACHED_ROWS)
            exact = np.einsum("ij,ij->i", unit(rows[own]), unit(targets[place[own]]))
            np.maximum(found[own], np.abs(exact), out=found[own])
    exchange.write(path, {"largest": found})


def write_norms(
    block: Block, stage: NormSim, summed: Pass | None, largest: Sequence[str], starts: np.ndarray, path: str
) -> None:
    """None; writes (row in the shard, 2, inf) of the block's rows with a vector, by shard.

    Args:
        summed: the pass of the targets' second moment; None: `2` is null.
        largest: files of write_largest for this block; none: `inf` is null.
        starts: see stages.shard_values.shard_starts.
    """
    vectors = concatenate(list(read_vectors(block, stage.embedding)))
    columns: dict[str, Any] = {name: pa.nulls(len(vectors), kind) for name, kind in stage.found_types.items()}
    if summed and len(vectors):
        moment = _read_moment(summed.path(0))
        assert moment is not None  # there are targets
        _check_length(moment.parts.shape[-1], vectors.vector.shape[1])
        squares = quadratic_forms(vectors.vector, moment.matrix)
        columns["2"] = np.sqrt(np.maximum(squares, 0)).astype(np.float32)
    if largest and len(vectors):
        found = np.max([table["largest"].to_numpy() for table in exchange.read_each(largest)], axis=0)
        columns["inf"] = found.astype(np.float32)
    write_by_shard(path, vectors.row, columns, starts, {"rows_with_vectors": len(vectors)})
