"""The samples of a task: read from its tars, decoded, cropped, and kept for the next checkpoint of the same run.

Nothing is passed over: a sample without an image or a label, an image that does not decode and a tar that ends too
early are errors, since scores on an evaluation set with holes do not compare. Images become RGB before the resize and
EXIF orientation is ignored, as in CLIP_benchmark.

What is kept is the cropped image in uint8; scaling and normalisation follow on the model's device. Most of the time of
evaluating a small model goes into decoding, and all checkpoints of a run see the same pixels.

Shapes: B images of a batch, C channels, H and W pixels.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torchvision.transforms import Normalize

from eval.tasks import CLASSIFICATION, TaskData, task_digest
from pipeline.core import clip_model, storage
from pipeline.core.artifact import canonical_json
from pipeline.core.clip_model import Clip
from pipeline.core.errors import ImageError, WinnowError
from pipeline.core.images import decode_rgb
from pipeline.core.tars import TarEnd, read_members

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")  # of several in one sample the first counts
CACHE_BYTES = 512 << 20  # per process


@dataclass(frozen=True)
class Batch:
    """Consecutive samples: `items` are `shard/key`, `pixels` [B, C, H, W] uint8, `targets` labels or caption lists."""

    items: list[str]
    pixels: torch.Tensor
    targets: list[Any]


class Cache:
    """Batches of whole sets, up to `max_bytes`. What came first stays: tasks are gone through in the same order for
    every checkpoint, and dropping the oldest would then drop each set just before it is wanted."""

    def __init__(self, max_bytes: int):
        self.max_bytes = max_bytes
        self.used_bytes = 0
        self.sets: dict[tuple, list[Batch]] = {}

    def keep(self, key: tuple, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches; the set is kept once they have all been read, if there is room for it."""
        kept: list[Batch] | None = []
        size_bytes = 0
        for batch in batches:
            if kept is not None:
                size_bytes += batch.pixels.nbytes
                kept.append(batch)
                if self.used_bytes + size_bytes > self.max_bytes:
                    kept = None
            yield batch
        if kept is not None:
            self.sets[key] = kept
            self.used_bytes += size_bytes


CACHE = Cache(CACHE_BYTES)


def read_batches(
    data: TaskData, clip: Clip, batch_size: int, threads: int = 1, cache: Cache = CACHE
) -> Iterator[Batch]:
    """All samples in the order of the tars, as pixels for this model; from the cache where an earlier call filled it.

    Raises:
        WinnowError: naming task, shard and sample, for anything that can't be used.
    """
    key = (data.digest or task_digest(data), batch_size, canonical_json(clip_model.preprocess_config(clip.model)))
    if key in cache.sets:
        return iter(cache.sets[key])
    return cache.keep(key, _decoded(data, _to_pixels(clip), batch_size, threads))


def model_input(clip: Clip, pixel_BCHW: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] float32 on the model's device: what `clip.preprocess` gives for these pixels, bit for bit on CPU."""
    normalize = clip.preprocess.transforms[-1]
    return normalize(pixel_BCHW.to(clip.device).to(torch.float32).div_(255))


def _to_pixels(clip: Clip) -> Callable[[bytes], torch.Tensor]:
    """Image bytes -> [C, H, W] uint8: the model's preprocessing up to the point where numbers become floats."""
    *steps, _, normalize = clip.preprocess.transforms
    if not isinstance(normalize, Normalize):
        raise WinnowError(f"preprocessing ends with {normalize}, expected open_clip's: crop, to tensor, normalise")

    def to_pixels(data: bytes) -> torch.Tensor:
        image = decode_rgb(data, apply_orientation=False)
        for step in steps:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    return to_pixels


def _decoded(
    data: TaskData, to_pixels: Callable[[bytes], torch.Tensor], batch_size: int, threads: int
) -> Iterator[Batch]:
    def decode(sample: tuple[str, bytes, Any]) -> torch.Tensor:
        item, image, _ = sample
        try:
            return to_pixels(image)
        except ImageError as error:
            raise WinnowError(f"{_place(data, item)}: {error}, expected every image to decode") from error

    def collect(chunk: list[tuple[str, bytes, Any]], pixels: list[torch.Tensor]) -> Batch:
        return Batch([item for item, _, _ in chunk], torch.stack(pixels), [target for _, _, target in chunk])

    samples = _samples(data)
    chunks = iter(lambda: list(itertools.islice(samples, batch_size)), [])
    if threads == 1:
        for chunk in chunks:
            yield collect(chunk, [decode(sample) for sample in chunk])
        return
    with ThreadPoolExecutor(threads) as pool:  # one batch is decoded while the model works on the one before it
        waiting: deque = deque()
        for chunk in chunks:
            waiting.append((chunk, [pool.submit(decode, sample) for sample in chunk]))
            if len(waiting) > 1:
                chunk, futures = waiting.popleft()
                yield collect(chunk, [future.result() for future in futures])
        for chunk, futures in waiting:
            yield collect(chunk, [future.result() for future in futures])


def _samples(data: TaskData) -> Iterator[tuple[str, bytes, Any]]:
    """(`shard/key`, image bytes, label or captions) of every sample."""
    empty = True
    for shard in data.shards:
        for item, files in _grouped(data, shard):
            empty = False
            images = [files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files]
            if not images:
                raise WinnowError(f"{_place(data, item)}: no image, expected one of .{', .'.join(IMAGE_SUFFIXES)}")
            yield item, images[0], _target(data, item, files)
    if empty:
        raise WinnowError(f"task {data.name}: {data.path} has no samples, expected at least one")


def _grouped(data: TaskData, shard: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Item and {suffix: bytes} of each sample of a shard; the members of one sample stand together."""
    number = storage.name_of(shard).removesuffix(".tar")
    end = TarEnd()
    seen: set[str] = set()
    item, files = "", {}
    with storage.open_read(storage.join(data.path, shard)) as file:
        for member in read_members(file, end):
            folder, _, name = member.name.rpartition("/")
            stem, dot, suffix = name.partition(".")
            if not stem or not dot or (stem.startswith("__") and stem.endswith("__")):
                continue
            new = f"{number}/{folder}/{stem}" if folder else f"{number}/{stem}"
            if new != item:
                if item:
                    yield item, files
                if new in seen:
                    raise WinnowError(f"{_place(data, new)}: a second sample of this key, expected one")
                seen.add(new)
                item, files = new, {}
            if member.data is None:
                raise WinnowError(f"{_place(data, new)}: {member.name} is cut off or too large, expected it whole")
            if suffix.lower() in files:
                raise WinnowError(f"{_place(data, new)}: a second {member.name}, expected one")
            files[suffix.lower()] = member.data
    if end.truncated:
        raise WinnowError(f"task {data.name}: {storage.join(data.path, shard)}: {end.truncated}, expected a whole tar")
    if item:
        yield item, files


def _target(data: TaskData, item: str, files: dict[str, bytes]) -> int | list[str]:
    """The sample's label, or its captions."""
    suffix = "cls" if data.task.type == CLASSIFICATION else "txt"
    if suffix not in files:
        what = "a label" if suffix == "cls" else "captions"
        raise WinnowError(f"{_place(data, item)}: no .{suffix}, expected {what}")
    try:
        text = files[suffix].decode("utf-8")
    except UnicodeDecodeError as error:
        raise WinnowError(f"{_place(data, item)}: .{suffix} = {files[suffix][:40]!r}, expected UTF-8") from error
    if suffix == "txt":
        captions = text.splitlines()
        if not captions:
            raise WinnowError(f"{_place(data, item)}: .txt is empty, expected at least one caption")
        return captions
    label = text.strip()
    if not (label.isascii() and label.isdigit() and len(label) < 10 and int(label) < len(data.classnames)):
        raise WinnowError(
            f"{_place(data, item)}: .cls = {label[:40]!r}, expected a label from 0 to {len(data.classnames) - 1}"
        )
    return int(label)


def _place(data: TaskData, item: str) -> str:
    shard, _, key = item.partition("/")
    folder = storage.join(data.path, data.shards[0].rpartition("/")[0])
    return f"task {data.name}: {folder}/{shard}.tar: {key}"
