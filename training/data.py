"""What a training reads: batches of decoded images and tokens in the ledger's order.

A batch is a pure function of (train set, recipe, seed, step, rank): threads only fetch ahead. The consecutive entries
of a chunk are one range read.

Without random crops an image is to the bit what the model sees in evaluation. With them, pictures of more than twice
DETAIL times the size that is needed are decoded at 1/2, 1/4 or 1/8 (images.decode_rgb), from which the crop is taken
and resized by torch's antialiased bicubic filter. Measured on photos of 128 to 512 px for a model of 32 (64) px, that
changes a pixel by 0.34 (0.17) of 255 levels on average, next to a full decode and Pillow's filter; an image saved as
JPEG of quality 95 changes by 3.9 (3.1), and a bilinear filter makes 2.5 (2.1).

Threads, not processes: decoding, resizing and copying run without Python's lock (GIL). What can hold it is at most
0.13 ms a sample (measured as all of the work on images of 16 px), which by that reckoning leaves room for 7,000
samples/s in one process that has the cores. A sample takes one core 0.6 ms at 32 px and 0.7 ms at 64 from photos of
128 to 512 px, and 2.4 ms at 224 from photos of 512 x 640 px.

Decoded images stay in memory as uint8 until CACHE_BYTES are used, per process: as the model sees them, or, when the
recipe crops at random, as they were decoded.
Shapes: B pairs, S image side in px, T tokens: of the context, in a batch of its longest caption; U captions.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch.nn import functional

from pipeline.core import clip_model, images, storage
from pipeline.core.captions import CaptionTokenizer
from pipeline.core.clip_model import Clip
from pipeline.core.errors import ImageError, WinnowError
from training.ledger import Ledger, rank_slice
from training.recipe import Recipe
from training.train_set import TrainSet

CACHE_BYTES = 1 << 30
BATCHES_AHEAD = 3
PART_SAMPLES = 64  # of a batch, loaded by one thread at a time
MAX_GAP_BYTES = 1 << 16  # between neighbours of a tar: the caption, the json and padding
TOKEN_TABLE_ENTRIES = 1_000_000  # up to here all captions are tokenised at the start: some 10 s, 154 MB of 77 tokens
DETAIL = 2.0  # pixels of the smallest crop for one of the model's, at least; Pillow's thumbnails have as many
CROP_ATTEMPTS = 10  # as torchvision's RandomResizedCrop
CROP_RATIO = (3 / 4, 4 / 3)  # its default range of width / height, which open_clip keeps
CROP_STREAM = 3


class Batch(NamedTuple):
    """One rank's part of a step's batch; `part_sizes` says how many pairs each rank has.

    A rank without a pair of its own (a last batch smaller than the number of ranks) gets the batch's first as a filler.
    """

    step: int
    image_BSS3: torch.Tensor
    tokens_BT: torch.Tensor
    part_sizes: list[int]
    lengths_B: torch.Tensor  # int64: tokens of each caption up to its end, always on the CPU


class Loader:
    """Batches in order, fetched ahead by `threads` threads; pinned ones are filled where they lie."""

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
        self._model = clip.model
        size = clip.model.visual.image_size
        self._size_px = size if isinstance(size, int) else size[0]
        self._resize = until_tensor(clip.preprocess)
        self._crop_scale, self._min_side_px = recipe.crop_scale, None
        if recipe.crop_scale:
            # A crop of a fraction f of the area has at least f of the shorter side.
            self._min_side_px = math.ceil(DETAIL * self._size_px / recipe.crop_scale[0])
        self._cache: dict[int, np.ndarray] = {}
        self._cached_bytes = 0
        self._tokenizer, self._context = CaptionTokenizer(clip.tokenizer), clip.tokenizer.context_length
        self._token_table: tuple[np.ndarray, np.ndarray] | None = None
        if len(train_set) <= TOKEN_TABLE_ENTRIES:
            captions = train_set.captions.dictionary_encode()
            self._token_table = (captions.indices.to_numpy(), self._tokenizer(captions.dictionary.to_pylist()))

    def compact_tokens(self) -> np.ndarray | None:
        """[K] ascending token ids that occur; from now on tokens are places in it. None when there are too many."""
        if self._token_table is None:
            return None
        caption_of_entry, tokens_UT = self._token_table
        used = np.flatnonzero(np.bincount(tokens_UT.ravel()))
        places = np.zeros(used[-1] + 1, tokens_UT.dtype)
        places[used] = np.arange(len(used))
        self._token_table = (caption_of_entry, places[tokens_UT])
        return used

    def batches(self, first_step: int) -> Iterator[Batch]:
        """The batches of first_step and all later steps."""
        steps = iter(range(first_step, self._ledger.num_steps))
        ahead: deque[tuple[Batch, list[Future]]] = deque()
        parts_ahead = 0
        with ThreadPoolExecutor(self._threads, thread_name_prefix="loader") as threads:
            try:
                while True:
                    while len(ahead) < BATCHES_AHEAD or parts_ahead < 2 * self._threads:
                        if (step := next(steps, None)) is None:
                            break
                        ahead.append(self._start(threads, step))
                        parts_ahead += len(ahead[-1][1])
                    if not ahead:
                        return
                    batch, parts = ahead.popleft()
                    parts_ahead -= len(parts)
                    for part in parts:
                        part.result()
                    lengths_B = clip_model.caption_lengths(self._model, batch.tokens_BT)
                    tokens_BT = batch.tokens_BT[:, : int(lengths_B.max())].contiguous()
                    if self._pin_memory:
                        tokens_BT = tokens_BT.pin_memory()
                    yield batch._replace(tokens_BT=tokens_BT, lengths_B=lengths_B)
            finally:
                threads.shutdown(wait=False, cancel_futures=True)

    def _start(self, threads: ThreadPoolExecutor, step: int) -> tuple[Batch, list[Future]]:
        """A batch that is being filled, and what fills it."""
        entries = self._ledger.batch(step)
        slices = [rank_slice(len(entries), rank, self._world_size) for rank in range(self._world_size)]
        first, last = slices[self._rank]
        if first == last:
            first, last = 0, 1
        batch = Batch(
            step,
            torch.empty(
                (last - first, self._size_px, self._size_px, 3), dtype=torch.uint8, pin_memory=self._pin_memory
            ),
            torch.empty((last - first, self._context), dtype=torch.int64),
            [stop - start for start, stop in slices],
            torch.zeros(last - first, dtype=torch.int64),
        )
        parts = []
        for start in range(first, last, PART_SAMPLES):
            own = slice(start - first, min(start + PART_SAMPLES, last) - first)
            into = batch.image_BSS3[own].numpy(), batch.tokens_BT[own].numpy()
            parts.append(threads.submit(self._load, entries[first:last][own], step, start, *into))
        return batch, parts

    def _load(
        self, entries: np.ndarray, step: int, position: int, image_BSS3: np.ndarray, tokens_BT: np.ndarray
    ) -> None:
        """None; fills in a run of the batch that starts at `position`."""
        found = [self._cache.get(entry) for entry in entries.tolist()]
        missing = [place for place, image in enumerate(found) if image is None]
        with images.no_warnings():  # once for the part, not for each image: it costs more than a small crop
            for place, data in zip(missing, self._read(entries[missing]), strict=True):
                entry = int(entries[place])
                found[place] = self._decode(entry, data)
                if self._cached_bytes + found[place].nbytes <= CACHE_BYTES:
                    self._cached_bytes += found[place].nbytes
                    self._cache[entry] = found[place]
        if self._crop_scale:
            sizes = [image.shape[:2] for image in found]
            boxes = random_crops(sizes, self._crop_scale, self._ledger.seed, step, position)
            for place, (left, top, right, bottom) in enumerate(boxes):
                image_BSS3[place] = _resized(found[place][top:bottom, left:right], self._size_px)
        else:
            for place, image in enumerate(found):
                image_BSS3[place] = image
        if self._token_table is not None:
            caption_of_entry, tokens_UT = self._token_table
            tokens_BT[...] = tokens_UT[caption_of_entry[entries]]
        else:
            tokens_BT[...] = self._tokenizer(self._train_set.captions.take(pa.array(entries)).to_pylist())

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

    def _decode(self, entry: int, data: bytes) -> np.ndarray:
        """[S, S, 3] uint8 as evaluation sees it, or with random crops [H, W, 4] as decoded, the fourth unused."""
        try:
            image = images.decode_rgb(data, min_side_px=self._min_side_px)
        except ImageError as error:
            name = self._train_set.tar_names[self._train_set.tar_of_entry[entry]]
            raise WinnowError(
                f"{self._train_set.path}/{name}: entry {entry}: {error}, expected an image that decodes"
            ) from error
        return _pixels(image) if self._crop_scale else _pixels(self._resize(image))[..., :3].copy()


def _pixels(image: Image.Image) -> np.ndarray:
    """[H, W, 4] uint8, an RGB image's own memory, whose fourth channel is padding.

    np.asarray would copy it, holding Python's lock for as long as a small image takes to decode.
    """
    try:
        buffer = pa.array(image).buffers()[-1]
    except ValueError:  # Pillow keeps an image above 16 MB in several blocks
        return np.asarray(image.convert("RGBX"))
    return np.frombuffer(buffer, np.uint8).reshape(image.height, image.width, 4)


def _resized(image_HW4: np.ndarray, size_px: int) -> np.ndarray:
    """[S, S, 3] uint8. Within one level of Pillow's bicubic filter where it shrinks, in a third of the time."""
    pixels_14HW = torch.from_numpy(image_HW4.copy()).permute(2, 0, 1)[None]  # torch's own copy would start threads
    resized_14SS = functional.interpolate(pixels_14HW, (size_px, size_px), mode="bicubic", antialias=True)
    return resized_14SS[0].permute(1, 2, 0).numpy()[..., :3]


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


def until_tensor(preprocess: Any) -> Callable[[Image.Image], Image.Image]:
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
