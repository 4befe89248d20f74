"""The samples of a task: read from its tars, decoded and cropped; or their pixels as an earlier step stored them.

Nothing is passed over: a sample without an image or a label, an image that does not decode and a tar that ends too
early are errors, since scores on an evaluation set with holes do not compare. Images become RGB before the resize and
EXIF orientation is ignored, as in CLIP_benchmark.

Pixels are the cropped image in uint8; scaling and normalisation follow on the model's device. Most of the time of
evaluating a small model goes into decoding, so a run decodes each set once, for all its checkpoints: `store_pixels`
writes two files a tar, which `read_batches` then reads in place of it.

    test/0.npy       uint8 [N, C, H, W]
    test/0.parquet   item='0/s0000000' target='3' (JSON)

A target is a label, a list of captions, or what the numbers of a .npy say: {"label": 3, "region": 2}.

Shapes: N images of a tar, B of a batch, C channels, H and W pixels.
"""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torchvision.transforms import Normalize

from eval import folders, groups
from eval.tasks import FACE_COLUMNS, FACES, RETRIEVAL, TaskData, listed_images
from pipeline.core import clip_model, storage
from pipeline.core.clip_model import Clip
from pipeline.core.errors import ImageError, WinnowError
from pipeline.core.images import decode_rgb, no_warnings
from pipeline.core.tars import TarEnd, read_members

IMAGE_SUFFIXES = ("webp", "png", "jpg", "jpeg")  # of several in one sample the first counts
PREPROCESS_FILE = "preprocess.json"
STORED_BATCH = 64  # images that a thread decodes at a time for store_pixels


@dataclass(frozen=True)
class Batch:
    """Consecutive samples: `items` are `shard/key`, `pixels` [B, C, H, W] uint8, `targets` are JSON values.

    `seconds` is what its thread took to make it.
    """

    items: list[str]
    pixels: torch.Tensor
    targets: list[Any]
    seconds: float = 0.0


def read_batches(
    data: TaskData,
    preprocess: Mapping[str, Any],
    batch_size: int,
    threads: int = 1,
    pixels_path: str | None = None,
    then: Callable[[Batch], Any] | None = None,
) -> Iterator[Any]:
    """All samples in the order of the tars: a Batch each time, or what `then` makes of it.

    Each of the threads decodes a batch of its own and calls `then` with it, so that decoding and a model's forward
    passes share the cores without waiting for each other; this thread reads the tars.

    Args:
        preprocess: clip_model.preprocess_config of the model that they are for.
        pixels_path: a folder of store_pixels with the whole set; its pixels are used where they are for this
            preprocessing, else the tars are decoded.
        then: is called in any thread.

    Raises:
        WinnowError: naming task, shard and sample, for anything that can't be used.
    """
    if pixels_path is not None and storage.read_json(storage.join(pixels_path, PREPROCESS_FILE)) == shape_of(
        preprocess
    ):
        made = _stored(data, batch_size, pixels_path)
    else:
        made = _decoded(data, data.shards, preprocess, batch_size)
    return _in_threads(made, threads, then)


def store_pixels(
    data: TaskData, shard: str, preprocess: Mapping[str, Any], out_path: str, threads: int = 1
) -> dict[str, int]:
    """Facts {images, bytes} of one tar; its two files are there, and preprocess.json, which all tars share.

    Memory: a few batches, whatever the tar's size. Disk: width x height x 3 bytes an image, 150 kB at 224 px.

    Args:
        shard: one of the task's shards.
    """
    stem = storage.join(out_path, shard.removesuffix(".tar"))
    items: list[str] = []
    targets: list[str] = []
    shape: tuple[int, ...] = ()
    with storage.write_file(f"{stem}.npy") as temporary, open(temporary, "wb") as file:
        for batch in _in_threads(_decoded(data, (shard,), preprocess, STORED_BATCH), threads):
            if not items:
                shape = tuple(batch.pixels.shape[1:])
                _write_header(file, (0, *shape))
            file.write(batch.pixels.numpy().data)
            items += batch.items
            targets += [json.dumps(target, ensure_ascii=False) for target in batch.targets]
        file.seek(0)
        _write_header(file, (len(items), *shape))  # as long as the first: numpy leaves room for the number to grow
    table = {"item": items, "target": targets}
    with storage.write_file(f"{stem}.parquet") as temporary:
        pq.write_table(pa.table(table, pa.schema([("item", pa.string()), ("target", pa.string())])), temporary)
    storage.write_json(storage.join(out_path, PREPROCESS_FILE), shape_of(preprocess))
    return {"images": len(items), "bytes": len(items) * math.prod(shape)}


def _write_header(file: IO[bytes], shape: tuple[int, ...]) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})


def shape_of(preprocess: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a preprocessing that decides pixels: all but how they are normalised. Values as JSON has them."""
    return json.loads(json.dumps({key: value for key, value in preprocess.items() if key not in ("mean", "std")}))


def model_input(clip: Clip, pixel_BCHW: torch.Tensor) -> torch.Tensor:
    """[B, C, H, W] float32 on the model's device: what `clip.preprocess` gives for these pixels, bit for bit on CPU."""
    normalize = clip.preprocess.transforms[-1]
    return normalize(pixel_BCHW.to(clip.device).to(torch.float32).div_(255))


def _in_threads(
    made: Iterator[Callable[[], Batch]], threads: int, then: Callable[[Batch], Any] | None = None
) -> Iterator[Any]:
    """What `then` makes of each batch, in order. At most 2 x threads are held."""

    def work(make: Callable[[], Batch]) -> Any:
        start_s = time.perf_counter()
        batch = make()
        batch = replace(batch, seconds=time.perf_counter() - start_s)
        return then(batch) if then else batch

    waiting: deque[Future] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for make in made:
                waiting.append(pool.submit(work, make))
                if len(waiting) == 2 * threads:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _stored(data: TaskData, batch_size: int, pixels_path: str) -> Iterator[Callable[[], Batch]]:
    for shard in data.shards:
        stem = storage.join(pixels_path, shard.removesuffix(".tar"))
        table = pq.read_table(io.BytesIO(storage.read_bytes(f"{stem}.parquet")))
        items, targets = table["item"].to_pylist(), table["target"].to_pylist()
        with storage.open_read(f"{stem}.npy") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            size_bytes = int(np.prod(shape[1:]))
            for start in range(0, shape[0], batch_size):
                num = min(batch_size, shape[0] - start)
                block = bytearray(file.read(num * size_bytes))
                if len(block) != num * size_bytes or dtype != np.uint8:
                    raise WinnowError(f"task {data.name}: {stem}.npy is cut off, expected {shape[0]} images")
                pixels = torch.frombuffer(block, dtype=torch.uint8).reshape(num, *shape[1:])
                end = start + num
                found = [json.loads(target) for target in targets[start:end]]
                yield functools.partial(Batch, items[start:end], pixels, found)


def _to_pixels(preprocess: Mapping[str, Any]) -> Callable[[bytes], torch.Tensor]:
    """Image bytes -> [C, H, W] uint8: the model's preprocessing up to the point where numbers become floats."""
    *steps, _, normalize = clip_model.preprocessing(preprocess).transforms
    if not isinstance(normalize, Normalize):
        raise WinnowError(f"preprocessing ends with {normalize}, expected open_clip's: crop, to tensor, normalise")

    def to_pixels(data: bytes) -> torch.Tensor:
        image = decode_rgb(data, apply_orientation=False)
        for step in steps:
            image = step(image)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    return to_pixels


def _decoded(
    data: TaskData, shards: tuple[str, ...], preprocess: Mapping[str, Any], batch_size: int
) -> Iterator[Callable[[], Batch]]:
    to_pixels = _to_pixels(preprocess)

    def decode(item: str, image: bytes) -> torch.Tensor:
        try:
            return to_pixels(image)
        except ImageError as error:
            raise WinnowError(f"{_place(data, item)}: {error}, expected every image to decode") from error

    def make(chunk: list[tuple[str, bytes, Any]]) -> Batch:
        with no_warnings():  # once for all of them
            pixels = [decode(item, image) for item, image, _ in chunk]
        return Batch([item for item, _, _ in chunk], torch.stack(pixels), [target for _, _, target in chunk])

    samples = _samples(data, shards)
    for chunk in iter(lambda: list(itertools.islice(samples, batch_size)), []):
        yield functools.partial(make, chunk)


def _samples(data: TaskData, shards: tuple[str, ...]) -> Iterator[tuple[str, bytes, Any]]:
    """(`shard/key`, image bytes, target) of every sample."""
    listed = [] if data.in_files else listed_images(data)
    for shard in shards:
        if not data.in_files:
            yield from folders.read_run(data.path, listed, shard)
            continue
        if shard.endswith(".parquet"):
            path = storage.join(data.path, shard)
            yield from folders.read_parquet(path, lambda item, reason: WinnowError(f"{_place(data, item)}: {reason}"))
            continue
        for item, files in _grouped(data, shard):
            images = [files[suffix] for suffix in IMAGE_SUFFIXES if suffix in files]
            if not images:
                raise WinnowError(f"{_place(data, item)}: no image, expected one of .{', .'.join(IMAGE_SUFFIXES)}")
            yield item, images[0], _target(data, item, files)


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


def _target(data: TaskData, item: str, files: dict[str, bytes]) -> int | list[str] | dict[str, int]:
    """The sample's label, its captions, or its label and groups."""
    if data.task.type == FACES:
        return _metadata(data, item, files, FACE_COLUMNS, FACE_COLUMNS)
    if data.task.type == RETRIEVAL:
        captions = _text(data, item, files, "txt", "captions").splitlines()
        if not captions:
            raise WinnowError(f"{_place(data, item)}: .txt is empty, expected at least one caption")
        return captions
    label = _text(data, item, files, "cls", "a label").strip()
    if not (label.isascii() and label.isdigit() and len(label) < 10 and int(label) < len(data.classnames)):
        raise WinnowError(
            f"{_place(data, item)}: .cls = {label[:40]!r}, expected a label from 0 to {len(data.classnames) - 1}"
        )
    if data.grouping and data.grouping.by:
        return {"label": int(label)} | _metadata(data, item, files, data.grouping.columns, data.grouping.wanted)
    return int(label)


def label_of(target: int | Mapping[str, int]) -> int:
    """The label of a target of classification, with or without groups."""
    return target["label"] if isinstance(target, Mapping) else target


def _text(data: TaskData, item: str, files: dict[str, bytes], suffix: str, what: str) -> str:
    if suffix not in files:
        raise WinnowError(f"{_place(data, item)}: no .{suffix}, expected {what}")
    try:
        return files[suffix].decode("utf-8")
    except UnicodeDecodeError as error:
        raise WinnowError(f"{_place(data, item)}: .{suffix} = {files[suffix][:40]!r}, expected UTF-8") from error


def _metadata(
    data: TaskData, item: str, files: dict[str, bytes], columns: tuple[str, ...], wanted: tuple[str, ...]
) -> dict[str, int]:
    if "npy" not in files:
        raise WinnowError(f"{_place(data, item)}: no .npy, expected {', '.join(columns)}")
    try:
        return groups.read_metadata(files["npy"], columns, wanted)
    except ValueError as error:
        raise WinnowError(f"{_place(data, item)}: .npy: {error}") from error


def _place(data: TaskData, item: str) -> str:
    shard, _, key = item.partition("/")
    if not data.shards[0].endswith(".tar"):
        return f"task {data.name}: {data.path}/{item if not data.in_files else f'{shard}.parquet: row {key}'}"
    folder = storage.join(data.path, data.shards[0].rpartition("/")[0])
    return f"task {data.name}: {folder}/{shard}.tar: {key}"
