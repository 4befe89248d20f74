"""A tiny train set of drawn shapes, in the train set's format, and a recipe that trains on it in a second."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from pipeline.core import storage
from pipeline.core.tars import TarWriter
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


def train_rank(rank: int, world_size: int, meeting_point: str, train_set_path: str, out_path: str, own: dict) -> None:
    """None; one of several gloo ranks: gradients of the loss in float64, then a whole training."""
    import torch
    from torch import distributed

    from training.loop import train

    distributed.init_process_group("gloo", f"file://{meeting_point}", rank=rank, world_size=world_size)
    gradients = {}
    for sizes in ([3] * world_size, [2] * (world_size - 1) + [3], [0] * (world_size - 1) + [2]):
        gradients[str(sizes)] = loss_gradients(sizes, rank)
    torch.save(gradients, f"{meeting_point}.gradients.{rank}")
    train(train_set_path, out_path, recipe(**own), Seeds(0, 0), rank=rank, world_size=world_size)
    distributed.destroy_process_group()


def loss_gradients(part_sizes: list[int], rank: int, alone: bool = False) -> list:
    """[loss, gradient of the rank's own images and texts, of the scale] on drawn features; `alone`: as one rank."""
    import torch
    from torch import distributed
    from torch.nn import functional

    from training.loss import Features, contrastive_loss

    draws = torch.randn(2, sum(part_sizes), 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    first = sum(part_sizes[:rank])
    own = draws if alone else draws[:, first : first + max(1, part_sizes[rank])]  # a rank without pairs has a filler
    features = own.clone().requires_grad_()
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    image, text = functional.normalize(features, dim=-1)
    loss = contrastive_loss(
        Features(image, text, scale), [sum(part_sizes)] if alone else part_sizes, 0 if alone else rank
    )
    loss.backward()
    loss = loss.detach()
    if not alone:  # what DistributedDataParallel does to gradients of shared parameters
        for value in (loss, scale.grad):
            distributed.all_reduce(value)
            value /= len(part_sizes)
        features.grad /= len(part_sizes)
    return [loss, features.grad[:, : part_sizes[rank]] if not alone else features.grad, scale.grad]
