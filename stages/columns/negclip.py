"""negCLIPLoss (s-CLIPLoss): the CLIP score less what image and caption have in common with all others.

Wang et al., "CLIPLoss and Norm-Based Data Selection Methods for Multimodal Contrastive Learning", NeurIPS 2024 (arXiv
2405.19547), and its code, ypwang61/negCLIPLoss_NormSim.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.core import exchange
from pipeline.core.errors import ConfigError, WinnowError
from pipeline.core.passes import Pass, Passes
from stages.pool_blocks import Block
from stages.selection import uids
from stages.shard_values import FOUND, SHARDS, FittedStage, shard_names, shard_starts, write_by_shard
from stages.task_device import narrow, task_device
from stages.unit_vectors import CACHED_ROWS, Vectors, concatenate, packed, pieces, read_vectors, unit, unpacked

DEAL_STREAM = 31  # of the seed: see uids.hash64
PIECE_ROWS = 65_536  # rows whose vectors a task deals, unless a shard has more
TASK_ROWS = 65_536  # about as many rows of whole batches are scored by one task, unless a batch has more
TILE_ROWS = {"cpu": 256, "cuda": 8192}  # images that are compared with all captions of a batch at once
LEAST_SUM = 1e-26  # of exponentials, about e^-60: what is lost then is a millionth of a millionth of it


@dataclass(frozen=True)
class NegClip(FittedStage):
    """negclip_score: a pair's cosine less half of both log-sum-exps of the cosines with a random batch.

        s_i = <f_i, g_i> - t/2 (log sum_j exp(<f_i, g_j> / t) + log sum_j exp(<f_j, g_i> / t)),    t = temperature

    over the pairs j of a batch that holds i, averaged over `rounds` batches; higher is better. A round deals all rows
    of the pool with both vectors into batches by a hash of uid, seed and round. The published code deals within one
    parquet file, leaves a short last batch, which scores too high, and overflows where cosine / t exceeds 88. Here the
    batches' sizes differ by at most one, t log(min(batch, rows) / size) is subtracted, so that scores are those of
    batches of the full size, and exponentials are of differences. Published: the top 30 % of the pool, of which the
    next cut is NormSim's (stage normsim).

    Null for a row without one of the two vectors (or with one of zeros). Vectors are taken at length 1.

    Values are within 2e-6 of the formula in float64, a bound that grows with the number of dimensions (measured below
    2e-7 at 768 on a CPU). On the same kind of device they are the same whatever the order of rows and shards, the
    blocks and workers; between a CPU and a GPU they differ as little as from the formula.

    Args:
        image, text: columns of vectors of the same length.
        temperature: t. Published: 0.01 for OpenAI's CLIP, 0.07 for features of a DFN trained on public data.
        batch: rows of a batch, at most.
        rounds: batches that a row's score is averaged over; published: 10, and 5 are nearly as good.
        seed: of the batches.

    Cost: for n rows of d dimensions 2 n batch d rounds operations in float32: at 768 and as published 500 million a
    row, so that a million rows take 4 hours of a core (or, by its rate, 10 s of a GPU of 50 TFLOPS). Both columns read
    once a round, 4 d + 40 bytes a row exchanged a round, of which one round's lie in the root at a time, and 16 a row
    and round. Memory of a task: 16 d bytes a row of a batch or of PIECE_ROWS (0.8 GB at 768) and 3 kB a row of a batch;
    on a GPU 8 d bytes and 100 kB a row of a batch (3.5 GB).
    """

    image: str = "clip_image"
    text: str = "clip_text"
    temperature: Annotated[float, Field(gt=0, le=1)] = 0.01
    batch: Annotated[int, Field(ge=1)] = 32_768
    rounds: Annotated[int, Field(ge=1, le=1000)] = 10
    seed: Annotated[int, Field(ge=0)] = 0

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = {"negclip_score": "float32"}
    found_types: ClassVar[Mapping[str, pa.DataType]] = {"score": pa.float32()}

    def __post_init__(self) -> None:
        if self.image == self.text:
            raise ConfigError(f"negclip.text = {self.text}, expected another column than image")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.image, self.text)

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """{rows_with_vectors, batches of a round}; a file of scores for each piece of the pool."""
        work = passes.work()
        parts = pieces(blocks, PIECE_ROWS)
        num_rows = sum(block.rows for block in blocks)
        num_partitions = max(1, -(-num_rows // max(self.batch, TASK_ROWS)))
        first_rows = np.array([block.first_row for block in parts], np.uint64)
        scored = []
        for number in range(self.rounds):
            dealt = work.run(
                f"dealt_{number:03d}", write_dealt, [(block, self, number, num_partitions) for block in parts]
            )
            items = [(dealt, partition, num_partitions, self, first_rows) for partition in range(num_partitions)]
            scored.append(work.run(f"scored_{number:03d}", write_scored, items))
            work.drop(dealt)
        starts = shard_starts(blocks)
        found = passes.run(FOUND, write_means, [(scored, number, starts) for number in range(len(parts))])
        notes = exchange.read_notes(found.paths)
        num_batches = exchange.read_notes(scored[0].paths)["batches"]
        return {**notes, "batches": num_batches, SHARDS: shard_names(blocks)}


def read_pairs(block: Block, image: str, text: str) -> tuple[Vectors, np.ndarray]:
    """(rows with their images' vectors, [n, d] float16 vectors of their captions), of rows that have both."""
    images, texts = [], []
    for one, other in zip(read_vectors(block, image), read_vectors(block, text), strict=True):
        both, first, second = np.intersect1d(one.row, other.row, assume_unique=True, return_indices=True)
        if not len(both):
            continue
        if one.vector.shape[1] != other.vector.shape[1]:
            raise WinnowError(
                f"columns {image} and {text}: vectors of {one.vector.shape[1]} and {other.vector.shape[1]} values, "
                "expected one length"
            )
        images.append(one.take(first))
        texts.append(other.vector[second])
    texts = texts or [np.empty((0, 0), np.float16)]
    return concatenate(images), np.concatenate(texts)


def write_dealt(block: Block, stage: NegClip, number: int, num_partitions: int, path: str) -> None:
    """None; writes (row, hash, high, low, image, text) of the block's pairs by their hashes in this round.

    The notes count the pairs of each partition; of two partitions the first one has the lower hashes.
    """
    pairs, text = read_pairs(block, stage.image, stage.text)
    rounds = np.full(len(pairs), number, np.uint64)
    hashes = uids.hash64(pairs.uid, stage.seed, DEAL_STREAM, rounds)
    partition = exchange.by_hash(hashes, num_partitions)
    columns = {**pairs.columns(), "hash": hashes, "image": packed(pairs.vector), "text": packed(text)}
    numbers, counts = np.unique(partition, return_counts=True)
    notes = dict(zip(map(str, numbers.tolist()), counts.tolist(), strict=True))
    exchange.write(path, columns, partition, notes)


class _Deal:
    """All pairs of a round in the order of their hashes; holds one partition at a time."""

    def __init__(self, dealt: Pass, num_partitions: int):
        notes = exchange.read_notes(dealt.paths)
        counts = [notes.get(str(number), 0) for number in range(num_partitions)]
        self._paths = dealt.paths
        self._bounds = np.cumsum([0, *counts])
        self._number = -1
        self._columns: tuple[np.ndarray, ...] = ()
        self.num_pairs = int(self._bounds[-1])

    def pairs(self, start: int, stop: int) -> list[np.ndarray]:
        """[row [n], image [n, d], text [n, d]] of the pairs from the start-th up to the stop-th, which are not none."""
        found = []
        first, last = np.searchsorted(self._bounds, [start, stop - 1], side="right") - 1
        for number in range(first, last + 1):
            begin, end = self._bounds[number : number + 2]
            if begin < end:
                order, *columns = self._partition(number)
                own = order[max(start, begin) - begin : min(stop, end) - begin]
                found.append([column[own] for column in columns])
        return [np.concatenate(parts) for parts in zip(*found, strict=True)]

    def _partition(self, number: int) -> tuple[np.ndarray, ...]:
        if number != self._number:
            self._columns = ()  # so that two are never held
            table = exchange.read(self._paths, number)
            assert table is not None  # the notes count its rows
            hashes, high, low, row = (table[name].to_numpy() for name in ("hash", "high", "low", "row"))
            order = np.lexsort((low, high, hashes))
            self._columns = (order, row, unpacked(table["image"]), unpacked(table["text"]))
            self._number = number
        return self._columns


def write_scored(
    dealt: Pass, partition: int, num_partitions: int, stage: NegClip, first_rows: np.ndarray, path: str
) -> None:
    """None; writes (row, score) of the batches that fall to this partition, by the piece that the rows are in.

    Args:
        first_rows: [num_pieces] uint64 number of each piece's first row.
    """
    deal = _Deal(dealt, num_partitions)
    num_batches = -(-deal.num_pairs // stage.batch)
    own = range(partition * num_batches // num_partitions, (partition + 1) * num_batches // num_partitions)
    full = min(stage.batch, deal.num_pairs)
    rows, scores = [np.empty(0, np.uint64)], [np.empty(0)]
    for number in own:
        start, stop = (place * deal.num_pairs // num_batches for place in (number, number + 1))
        row, image, text = deal.pairs(start, stop)
        rows.append(row)
        scores.append(batch_scores(image, text, stage.temperature))
        scores[-1] -= stage.temperature * np.log(full / (stop - start))
    row = np.concatenate(rows)
    piece = np.searchsorted(first_rows, row, side="right") - 1
    exchange.write(path, {"row": row, "score": np.concatenate(scores)}, piece, {"batches": len(own)})


def batch_scores(image: np.ndarray, text: np.ndarray, temperature: float) -> np.ndarray:
    """[B] float64: s_i of the pairs of one batch (see NegClip), with cosines and exponentials in float32.

    Args:
        image, text: [B, d] float16 or float32, finite, none of length 0.
    """
    import torch

    device = task_device()
    scaled_BD, text_BD = narrow(image, device) / temperature, narrow(text, device)
    tile = TILE_ROWS[device.type]
    by_image = torch.empty(len(image), dtype=torch.float64, device=device)
    by_text = torch.full_like(by_image, -torch.inf)
    for start in range(0, len(image), tile):
        own_images, own_texts = _log_sum_exps(scaled_BD[start : start + tile] @ text_BD.T)
        by_image[start : start + tile] = own_images
        torch.logaddexp(by_text, own_texts, out=by_text)
    common = (by_image + by_text).cpu().numpy()
    own = np.empty(len(image))
    for start in range(0, len(image), CACHED_ROWS):
        some = slice(start, start + CACHED_ROWS)
        own[some] = np.einsum("ij,ij->i", unit(image[some]), unit(text[some]))
    return own - temperature / 2 * common


def _log_sum_exps(logits: Any) -> tuple[Any, Any]:
    """([n], [m]) float64 log-sum-exps of the rows and of the columns of [n, m] float32 logits.

    Both come from one exponential of what the logits lack to the highest of all, unless some row or column lies so far
    below that one that its own terms would be lost: those below e^-87.
    """
    import torch

    highest = logits.max()
    exponentials = torch.exp(logits - highest)
    sums = exponentials.sum(dim=1), exponentials.sum(dim=0)
    if min(one.min() for one in sums) < LEAST_SUM:
        return torch.logsumexp(logits, dim=1).double(), torch.logsumexp(logits, dim=0).double()
    by_row, by_column = (one.double().log_() + highest for one in sums)
    return by_row, by_column


def write_means(scored: Sequence[Pass], number: int, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, score) of one piece's rows, the mean over the rounds, by shard.

    Args:
        scored: a pass a round.
        number: of the piece.
        starts: see stages.shard_values.shard_starts.
    """
    rows, total = np.empty(0, np.uint64), np.empty(0)
    for at, one in enumerate(scored):
        table = exchange.read(one.paths, number)
        if table is None:
            break  # then it has no rows in any round
        row = table["row"].to_numpy()
        order = np.argsort(row)
        score = table["score"].to_numpy()[order]
        rows, total = row[order], total + score if at else score
    mean = (total / len(scored)).astype(np.float32)
    write_by_shard(path, rows, {"score": mean}, starts, {"rows_with_vectors": len(rows)})
