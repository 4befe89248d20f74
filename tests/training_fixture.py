"""A tiny train set of drawn shapes, in the train set's format, and a recipe that trains on it in a second."""

from __future__ import annotations

import datetime
import io
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageDraw
from torch import distributed

from pipeline.core import storage
from pipeline.core.tars import TarWriter
from training.loop import train
from training.recipe import Recipe, Seeds

COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 220), "white": (240, 240, 240)}
SHAPES = ("ellipse", "rectangle", "line")
MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16},
    "text_cfg": {"context_length": 12, "width": 32, "heads": 2, "layers": 1},
}


def recipe(**own) -> Recipe:
    values = {"model": MODEL, "global_batch_size": 8, "samples_seen": 100, "lr": 1e-3, "warmup_steps": 3}
    return Recipe(**{**values, "chunk_size": 4, **own})


def write_train_set(path: str, num_samples: int, samples_a_tar: int = 16) -> str:
    """The path, with `num_samples` pictures of coloured shapes there, png and jpg, wide and high."""
    rng = np.random.default_rng(0)
    rows = []
    for start in range(0, num_samples, samples_a_tar):
        name = f"{start // samples_a_tar:05d}.tar"
        with storage.write_file(storage.join(path, name)) as temporary, TarWriter(temporary) as tar:
            for place in range(start, min(start + samples_a_tar, num_samples)):
                colour, shape = list(COLOURS)[rng.integers(len(COLOURS))], SHAPES[rng.integers(len(SHAPES))]
                size, background = rng.integers(18, 40, 2).tolist(), rng.integers(0, 90, 3).tolist()
                image = Image.new("RGB", tuple(size), tuple(background))
                getattr(ImageDraw.Draw(image), shape)((3, 3, 14, 13), fill=COLOURS[colour])
                file, extension = io.BytesIO(), ("png", "jpg")[place % 2]
                image.save(file, {"png": "PNG", "jpg": "JPEG"}[extension])
                caption, uid = f"a {colour} {shape} on a wall, picture {place}", f"{place:032x}"
                offset = tar.add(f"{place:09d}.{extension}", file.getvalue())
                tar.add(f"{place:09d}.txt", caption.encode())
                tar.add(f"{place:09d}.json", json.dumps({"uid": uid, "caption": caption}).encode())
                rows.append((uid, name, offset, len(file.getvalue()), caption))
    names = ("uid", "tar", "image_offset_bytes", "image_size_bytes", "caption")
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]), table)
    storage.write_bytes(storage.join(path, "index.parquet"), table.getvalue())
    return path


PRELOADED = ["open_clip", "tests.training_fixture", "training.loop"]  # by the process that others are forks of


def in_child(function: Callable, *arguments: Any) -> int:
    """The exit code of function(*arguments) in a process of its own, -9 where it was killed."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    process = context.Process(target=function, args=arguments)
    process.start()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def on_ranks(world_size: int, function: Callable, *arguments: Any) -> list[Any]:
    """What function(rank, world_size, *arguments) returns on each rank of a gloo group, a process a rank.

    The processes are forks of one that has imported what they need, so that many ranks start as fast as one.
    """
    multiprocessing.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.start_processes(
            _run_rank, (world_size, folder, function, arguments), nprocs=world_size, start_method="forkserver"
        )
        return [torch.load(f"{folder}/{rank}", weights_only=True) for rank in range(world_size)]


def _run_rank(rank: int, world_size: int, folder: str, function: Callable, arguments: tuple) -> None:
    distributed.init_process_group(
        "gloo",
        f"file://{folder}/meeting",
        rank=rank,
        world_size=world_size,
        timeout=datetime.timedelta(seconds=90),  # for the others, where one of them waits for what never comes
    )
    torch.save(function(rank, world_size, *arguments), f"{folder}/{rank}")
    distributed.destroy_process_group()


def train_rank(rank: int, world_size: int, train_set_path: str, out_path: str, own: dict, options: dict) -> dict:
    """Facts of a training's rank."""
    return train(train_set_path, out_path, recipe(**own), Seeds(0, 0), rank=rank, world_size=world_size, **options)
