"""What a training reads: the train set's index, and batches of decoded images and tokens in the ledger's order.

A batch is a pure function of (train set, recipe, seed, step, rank): threads only fetch ahead. The consecutive entries
of a chunk are one range read. Decoded images stay in memory as uint8 until CACHE_BYTES are used, per process: as the
model sees them, or, when the recipe crops at random, as they were decoded. The index keeps the captions and some 20
bytes an entry in memory.
Shapes: B pairs, S image side in px, T tokens: of the context, in a batch of its longest caption.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from PIL import Image

from pipeline.core import clip_model, images, storage
from pipeline.core.clip_model import Clip
from pipeline.core.errors import ImageError, WinnowError
from training.ledger import Ledger, rank_slice
from training.recipe import Recipe

CACHE_BYTES = 1 << 30
BATCHES_AHEAD = 3
PART_SAMPLES = 64  # of a batch, loaded by one thread at a time
MAX_GAP_BYTES = 1 << 16  # between neighbours of a tar: the caption, the json and padding
TOKEN_TABLE_ENTRIES = 200_000  # up to here all captions are tokenised at the start: some 10 s, 60 MB
GPU_TOKENS_MULTIPLE = 8  # captions of a batch are cut to such a length there: few shapes, whole tensor core tiles
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
CROP_RATIO = (3 / 4, 4 / 3)  # its default range of width / height, which open_clip keeps
CROP_STREAM = 3


@dataclass(frozen=True)
class TrainSet:
    """The index of a train set: where each entry's image is, and its caption."""

    path: str
    tar_names: list[str]
    tar_of_entry: np.ndarray
    offset_bytes: np.ndarray
    size_bytes: np.ndarray
    captions: pa.ChunkedArray

    def __len__(self) -> int:
        return len(self.offset_bytes)


def open_train_set(path: str) -> TrainSet:
    """The train set in this folder. Raises WinnowError when it has no index, or no entries."""
    tars = _index_column(path, "tar").combine_chunks().dictionary_encode()
    if not len(tars):
        raise WinnowError(f"{path}/index.parquet: no entries, expected at least one to train on")
    return TrainSet(
        path,
        tars.dictionary.to_pylist(),
        tars.indices.to_numpy(),
        _index_column(path, "image_offset_bytes").to_numpy(),
        _index_column(path, "image_size_bytes").to_numpy(),
        _index_column(path, "caption"),
    )


def index_digest(path: str) -> str:
    """sha256 of the train set's index, which lists its entries in order: what a ledger's numbers refer to."""
    return storage.sha256_file(storage.join(path, "index.parquet"))


def count_repeats(path: str, times_seen: np.ndarray) -> dict[str, int]:
    """{unique_uids, max_repeats}: distinct pairs that were seen, and how often the most frequent one was."""
    codes = _index_column(path, "uid").combine_chunks().dictionary_encode().indices.to_numpy()
    counts = np.bincount(codes, weights=times_seen)
    return {"unique_uids": int((counts > 0).sum()), "max_repeats": int(counts.max())}


def _index_column(path: str, name: str) -> pa.ChunkedArray:
    place = storage.join(path, "index.parquet")
    try:
        with storage.open_read(place) as file:
            return pq.read_table(file, columns=[name])[name]
    except FileNotFoundError as error:
        raise WinnowError(f"{place} is missing, expected the index of a train set") from error


class Batch(NamedTuple):
    """One rank's part of a step's batch; `part_sizes` says how many pairs each rank has.

    A rank without a pair of its own (a last batch smaller than the number of ranks) gets the batch's first as a filler.
    """

    step: int
    image_BSS3: torch.Tensor
    tokens_BT: torch.Tensor
    part_sizes: list[int]


class Loader:
    """Batches in order, fetched ahead by `threads` threads. `used_tokens` is set when all captions are tokenised."""

    def __init__(
        self,
        train_set: TrainSet,
        ledger: Ledger,
        recipe: Recipe,
        clip: Clip,
        *,
        rank: int = 0,
        world_size: int = 1,
        threads: int = 1,
        pin_memory: bool = False,
    ):
        self._train_set, self._ledger = train_set, ledger
        self._rank, self._world_size = rank, world_size
        self._threads, self._pin_memory = threads, pin_memory
        self._model, self._tokenizer = clip.model, clip.tokenizer
        self._trim_to = GPU_TOKENS_MULTIPLE if pin_memory else 1
        self._crop_scale = recipe.crop_scale
        size = clip.model.visual.image_size
        self._size_px = size if isinstance(size, int) else size[0]
        self._resize = _until_tensor(clip.preprocess)
        self._cache: dict[int, np.ndarray] = {}
        self._cached_bytes = 0
        self._token_table: tuple[np.ndarray, torch.Tensor] | None = None
        if len(train_set) <= TOKEN_TABLE_ENTRIES:
            captions = train_set.captions.combine_chunks().dictionary_encode()
            self._token_table = (captions.indices.to_numpy(), self._tokenizer(captions.dictionary.to_pylist()))

    def compact_tokens(self) -> np.ndarray | None:
        """[K] ascending token ids that occur; from now on tokens are places in it. None when there are too many."""
        if self._token_table is None:
            return None
        caption_of_entry, tokens = self._token_table
        used, places = np.unique(tokens.numpy(), return_inverse=True)
        self._token_table = (caption_of_entry, torch.from_numpy(places.reshape(tokens.shape)))
        return used

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The batches of first_step and all later steps."""
        steps = iter(range(first_step, self._ledger.num_steps))
        ahead: deque[tuple[int, list[int], list[Future]]] = deque()
        with ThreadPoolExecutor(self._threads, thread_name_prefix="loader") as threads:
            try:
                while True:
                    while len(ahead) < BATCHES_AHEAD and (step := next(steps, None)) is not None:
                        ahead.append(self._start(threads, step))
                    if not ahead:
                        return
                    step, part_sizes, parts = ahead.popleft()
                    loaded = [part.result() for part in parts]
                    image_BSS3 = torch.from_numpy(np.concatenate([image for image, _ in loaded]))
                    tokens_BT = torch.cat([tokens for _, tokens in loaded])
                    tokens_BT = clip_model.trim(self._model, tokens_BT, self._trim_to).contiguous()
                    if self._pin_memory:
                        image_BSS3, tokens_BT = image_BSS3.pin_memory(), tokens_BT.pin_memory()
                    yield Batch(step, image_BSS3, tokens_BT, part_sizes)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _start(self, threads: ThreadPoolExecutor, step: int) -> tuple[int, list[int], list[Future]]:
        entries = self._ledger.batch(step)
        slices = [rank_slice(len(entries), rank, self._world_size) for rank in range(self._world_size)]
        first, last = slices[self._rank]
        if first == last:
            first, last = 0, 1
        parts = [
            threads.submit(self._load, entries[start : min(start + PART_SAMPLES, last)], step, start)
            for start in range(first, last, PART_SAMPLES)
        ]
        return step, [stop - start for start, stop in slices], parts

    def _load(self, entries: np.ndarray, step: int, position: int) -> tuple[np.ndarray, torch.Tensor]:
        """Images [B, S, S, 3] uint8 and tokens [B, T] of a run of the batch that starts at `position`."""
        found = [self._cache.get(entry) for entry in entries.tolist()]
        missing = [place for place, image in enumerate(found) if image is None]
        for place, data in zip(missing, self._read(entries[missing]), strict=True):
            entry = int(entries[place])
            image = self._decode(entry, data)
            found[place] = np.asarray(image if self._crop_scale else self._resize(image))
            if self._cached_bytes + found[place].nbytes <= CACHE_BYTES:
                self._cached_bytes += found[place].nbytes
                self._cache[entry] = found[place]
        if self._crop_scale:
            sizes = [image.shape[:2] for image in found]
            boxes = random_crops(sizes, self._crop_scale, self._ledger.seed, step, position)
            side = (self._size_px, self._size_px)
            found = [
                np.asarray(Image.fromarray(image).crop(box).resize(side, Image.Resampling.BICUBIC))
                for image, box in zip(found, boxes, strict=True)
            ]
        return np.stack(found), self._tokens(entries)

    def _tokens(self, entries: np.ndarray) -> torch.Tensor:
        if self._token_table is not None:
            caption_of_entry, tokens = self._token_table
            return tokens[torch.from_numpy(caption_of_entry[entries]).long()]
        return self._tokenizer(pc.take(self._train_set.captions, pa.array(entries)).to_pylist())

    def _read(self, entries: np.ndarray) -> Iterator[bytes]:
        """The image bytes of each entry; neighbours in a tar come with one range read."""
        index = self._train_set
        starts = index.offset_bytes[entries]
        stops = starts + index.size_bytes[entries]
        tars = index.tar_of_entry[entries]
        run = 0
        while run < len(entries):
            end = run + 1
            while end < len(entries) and tars[end] == tars[run] and 0 <= starts[end] - stops[end - 1] <= MAX_GAP_BYTES:
                end += 1
            place = storage.join(index.path, index.tar_names[tars[run]])
            try:
                data = storage.read_range(place, int(starts[run]), int(stops[end - 1]))
            except FileNotFoundError as error:
                raise WinnowError(f"{place} is missing, expected a tar of the train set") from error
            for entry in range(run, end):
                yield data[starts[entry] - starts[run] : stops[entry] - starts[run]]
            run = end

    def _decode(self, entry: int, data: bytes) -> Image.Image:
        try:
            return images.decode_rgb(data)
        except ImageError as error:
            name = self._train_set.tar_names[self._train_set.tar_of_entry[entry]]
            raise WinnowError(
                f"{self._train_set.path}/{name}: entry {entry}: {error}, expected an image that decodes"
            ) from error


def random_crops(
    sizes: Sequence[tuple[int, int]], scale: Sequence[float], seed: int, step: int, position: int
) -> list[tuple[int, int, int, int]]:
    """Boxes (left, top, right, bottom) in px of torchvision's RandomResizedCrop for a run of a batch.

    A pure function of (seed, step, place in the global batch), whatever part of the batch is asked for: each place
    has CROP_ATTEMPTS blocks of a Philox counter of its own, four numbers an attempt.

    Args:
        sizes: (height, width) of each image.
        position: place in the global batch of the first one.
    """
    stream = np.random.Philox(np.random.SeedSequence([seed, CROP_STREAM, step])).advance(position * CROP_ATTEMPTS)
    draws = np.random.Generator(stream).random((len(sizes), CROP_ATTEMPTS, 4))
    areas = scale[0] + (scale[1] - scale[0]) * draws[..., 0]
    low, high = math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])
    ratios = np.exp(low + (high - low) * draws[..., 1])
    height, width = np.array(sizes, float).T[:, :, None]
    crop_width = np.rint(np.sqrt(areas * height * width * ratios))
    crop_height = np.rint(np.sqrt(areas * height * width / ratios))
    fits = (crop_width >= 1) & (crop_width <= width) & (crop_height >= 1) & (crop_height <= height)
    boxes = []
    for row, attempt in enumerate(fits.argmax(axis=1)):
        if not fits[row, attempt]:
            boxes.append(_central_box(*sizes[row]))
            continue
        w, h = int(crop_width[row, attempt]), int(crop_height[row, attempt])
        top = int(draws[row, attempt, 2] * (sizes[row][0] - h + 1))
        left = int(draws[row, attempt, 3] * (sizes[row][1] - w + 1))
        boxes.append((left, top, left + w, top + h))
    return boxes


def _central_box(height: int, width: int) -> tuple[int, int, int, int]:
    """The largest central box whose ratio is allowed: for images where no attempt fitted."""
    w, h = width, height
    if width / height < CROP_RATIO[0]:
        h = min(height, round(width / CROP_RATIO[0]))
    elif width / height > CROP_RATIO[1]:
        w = min(width, round(height * CROP_RATIO[1]))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def _until_tensor(preprocess: Any) -> Any:
    """The model's own evaluation preprocessing up to where it makes a tensor: PIL image -> PIL image."""
    steps = []
    for step in preprocess.transforms:
        if type(step).__name__ in ("ToTensor", "MaybeToTensor"):
            break
        steps.append(step)

    def apply(image: Image.Image) -> Image.Image:
        for step in steps:
            image = step(image)
        return image

    return apply
