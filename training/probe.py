"""Recall on fixed pairs while a model trains: some of its train set, and as many that it does not train on.

Both are measured in the same way, so that the gap between them is what the model knows by heart.
Shapes: n pairs, S image side, T tokens, D embedding width, Q queries, N items.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from pipeline.core import clip_model, images, pool, storage
from pipeline.core.clip_model import Clip
from pipeline.core.errors import ImageError, WinnowError
from training.data import until_tensor
from training.recipe import Recipe
from training.step import TwoTowers, autocast
from training.train_set import TrainSet, pairs

EVALUATIONS = 5  # at equal parts of the budget
FEWEST_PAIRS, MOST_PAIRS = 100, 1000
SAMPLES_A_PAIR = 200  # of the budget: two sets, five times, a forward pass a third of a step: 2 % of a training
BATCH_SIZE = 256


class Pairs(NamedTuple):
    """Pairs as a model sees them in evaluation, on the CPU; captions that it reads alike have equal numbers."""

    image_nSS3: torch.Tensor
    tokens_nT: torch.Tensor
    caption_n: torch.Tensor


class ImageFile(NamedTuple):
    """Where an image lies in a tar, in bytes, and what it is called in an error."""

    name: str
    path: str
    start: int
    stop: int


def first_entries(train_set: TrainSet) -> np.ndarray:
    """[U] ascending: the first entry of each distinct pair of the train set."""
    pair_N = pairs(train_set.path).indices.to_numpy()  # numbered as they first appear
    return np.flatnonzero(np.diff(np.maximum.accumulate(pair_N), prepend=-1))


def recall_at_1(score_QN: torch.Tensor, positive_QN: torch.Tensor) -> torch.Tensor:
    """Scalar float32: the share of queries whose best item is a positive; of equal scores the first item's counts."""
    best_Q1 = score_QN.argmax(dim=1, keepdim=True)
    return positive_QN.gather(1, best_Q1).float().mean()


def mean_recall_at_1(image_nD: torch.Tensor, text_nD: torch.Tensor, caption_n: torch.Tensor) -> torch.Tensor:
    """Scalar float32: the mean of both directions' recall@1 among n pairs. Pairs of equal captions are all right.

    Args:
        image_nD, text_nD: float32, rows L2-normalised.
        caption_n: int64, equal for equal captions.
    """
    score_nn = image_nD @ text_nD.T
    same_nn = caption_n[:, None] == caption_n
    return (recall_at_1(score_nn, same_nn) + recall_at_1(score_nn.T, same_nn)) / 2


def steps(recipe: Recipe) -> set[int]:
    """Numbers of finished steps after which recall is measured."""
    return {recipe.num_steps * part // EVALUATIONS for part in range(1, EVALUATIONS + 1)} - {0}


class Probe:
    """Pairs in memory and the model that trains.

    Args:
        entries: of the train set, of distinct pairs; the first are taken.
        held_out_path: a pool; its first usable rows by uid are taken. None: only the train set's recall.
        batch_size: the most pairs of a forward pass.

    `warning` is one line where the smaller of the two sets is small, else None.

    Raises:
        WinnowError: the train set or the pool can't be read, the pool has no usable row.
    """

    def __init__(
        self,
        clip: Clip,
        train_set: TrainSet,
        entries: np.ndarray,
        held_out_path: str | None,
        recipe: Recipe,
        *,
        device: str,
        threads: int,
        batch_size: int | None,
    ):
        self.num_pairs = min(MOST_PAIRS, len(entries), max(FEWEST_PAIRS, recipe.samples_seen // SAMPLES_A_PAIR))
        self._clip, self._device = clip, device
        self._precision = recipe.precision
        self._resize = until_tensor(clip.preprocess)
        self._batch_size = min(BATCH_SIZE, batch_size or BATCH_SIZE)
        self._towers = TwoTowers(clip.model).to(device)
        files: dict[str, list[ImageFile]] = {}
        captions: dict[str, list[str]] = {}
        if held_out_path is not None:
            rows = _usable_rows(held_out_path, self.num_pairs)
            self.num_pairs = len(rows)
            files["held_out_recall_at_1"] = _files_of_pool(held_out_path, rows)
            captions["held_out_recall_at_1"] = rows["caption"].to_pylist()
        self.warning = None
        if self.num_pairs < FEWEST_PAIRS:
            decides = "train set" if self.num_pairs == len(entries) else "held-out pool"
            self.warning = (
                f"recall is measured on {self.num_pairs} pairs, all that the {decides} has, expected at least"
                f" {FEWEST_PAIRS}: a single pair is {100 / self.num_pairs:.1f} % of it"
            )
        chosen = entries[: self.num_pairs]
        files["train_recall_at_1"] = _files_of_train_set(train_set, chosen)
        captions["train_recall_at_1"] = pc.take(train_set.captions, pa.array(chosen)).to_pylist()
        with ThreadPoolExecutor(threads) as executor:
            self._sets = {
                name: self._pairs(list(executor.map(self._picture, files[name])), captions[name]) for name in files
            }

    def _picture(self, file: ImageFile) -> np.ndarray:
        """[S, S, 3] uint8: the model's own preprocessing of an evaluation, up to where it makes a tensor."""
        try:
            image = images.decode_rgb(storage.read_range(file.path, file.start, file.stop))
        except FileNotFoundError as error:
            raise WinnowError(f"{file.path} is missing, expected a tar of the train set or the pool") from error
        except ImageError as error:
            raise WinnowError(f"{file.path}: {file.name}: {error}, expected an image that decodes") from error
        return np.asarray(self._resize(image))

    def _pairs(self, pictures: Sequence[np.ndarray], captions: Sequence[str]) -> Pairs:
        tokens_nT = self._clip.tokenizer(captions)
        caption_n = tokens_nT.unique(dim=0, return_inverse=True)[1]
        return Pairs(torch.from_numpy(np.stack(pictures)), tokens_nT, caption_n)

    @torch.no_grad()
    def recalls(self) -> dict[str, float]:
        """{train_recall_at_1, held_out_recall_at_1}, the latter where there is a pool. The model has its whole table.

        Draws no random number and leaves the model in training mode, as it was.
        """
        model = self._clip.model.eval()
        try:
            return {name: self._recall(found) for name, found in self._sets.items()}
        finally:
            model.train()

    def _recall(self, chosen: Pairs) -> float:
        found = []
        for start in range(0, len(chosen.image_nSS3), self._batch_size):
            rows = slice(start, start + self._batch_size)
            tokens_nT = clip_model.trim(self._clip.model, chosen.tokens_nT[rows])
            with autocast(self._precision, self._device):
                found.append(self._towers(chosen.image_nSS3[rows].to(self._device), tokens_nT.to(self._device)))
        image_nD, text_nD = (torch.cat([getattr(part, name) for part in found]) for name in ("image_nD", "text_nD"))
        return mean_recall_at_1(image_nD, text_nD, chosen.caption_n.to(self._device)).item()


def _usable_rows(pool_path: str, most: int) -> pa.Table:
    """The pool's first rows by uid that have an image, at most so many, with a column `shard`."""
    found = []
    for shard in pool.load_shards(pool_path):
        rows = pool.read_rows(pool_path, shard.name, ("uid", "ok", "caption", "image_offset_bytes", "image_size_bytes"))
        rows = rows.filter(rows["ok"])
        found.append(rows.append_column("shard", pa.repeat(shard.name, len(rows))))
        found = [pa.concat_tables(found).sort_by("uid").slice(0, most)]
    if not found or not len(found[0]):
        raise WinnowError(f"{pool_path}: no usable pairs, expected some to measure recall on")
    return found[0]


def _files_of_pool(pool_path: str, rows: pa.Table) -> list[ImageFile]:
    found = []
    for row in rows.to_pylist():
        start, path = row["image_offset_bytes"], storage.join(pool_path, f"{row['shard']}.tar")
        found.append(ImageFile(row["uid"], path, start, start + row["image_size_bytes"]))
    return found


def _files_of_train_set(train_set: TrainSet, entries: np.ndarray) -> list[ImageFile]:
    found = []
    for entry in entries.tolist():
        start, tar = int(train_set.offset_bytes[entry]), train_set.tar_names[train_set.tar_of_entry[entry]]
        path = storage.join(train_set.path, tar)
        found.append(ImageFile(f"entry {entry}", path, start, start + int(train_set.size_bytes[entry])))
    return found
