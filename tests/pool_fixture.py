"""Small pools for tests, written as ingestion writes them."""

from __future__ import annotations

import functools
import hashlib
import io
import itertools
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.core import artifact, images, pool, storage
from pipeline.core.tars import TarWriter
from stages.column_files import Column


def drawing(number: int, width_px: int = 64, height_px: int = 48, kind: str = "BMP") -> bytes:
    """The bytes of a picture of shapes, another one for each number. BMP bytes are the same on every machine."""
    image = Image.new("RGB", (width_px, height_px), ((number * 37) % 256, (number * 91) % 256, 120))
    draw = ImageDraw.Draw(image)
    for step in range(4):
        left, top = (number * 13 + step * 17) % width_px, (number * 7 + step * 11) % height_px
        colour = ((step * 60 + number) % 256, (200 + number * 5) % 256, (step * 90) % 256)
        (draw.rectangle if step % 2 else draw.ellipse)(
            (left, top, left + width_px // 4 + number % 9, top + height_px // 3), fill=colour
        )
    data = io.BytesIO()
    image.save(data, kind)
    return data.getvalue()


def write_pool(root: str | pathlib.Path, shards: Sequence[Sequence[Mapping[str, Any]]]) -> str:
    """The path of a finished pool. A row is {"image": bytes or None, "caption": text}, and any columns of the pool's;
    a row without an image has failed. uids are derived where not given."""
    made = artifact.Artifact(str(root), "pool", {"test": [len(shard) for shard in shards]})
    notes = {}
    number = 0
    for index, entries in enumerate(shards):
        rows = []
        name = f"{index:05d}"
        with storage.write_file(storage.join(made.path, f"{name}.tar")) as temporary, TarWriter(temporary) as tar:
            for entry in entries:
                rows.append(_row(tar, number, entry))
                number += 1
        carried = {key: pa.infer_type([value]) for key, value in rows[0].items() if key not in pool.SCHEMA.names}
        table = pa.Table.from_pylist(rows, schema=pa.schema([*pool.SCHEMA, *carried.items()]))
        storage.write_bytes(storage.join(made.path, f"{name}.parquet"), pool.table_bytes(table))
        notes[f"{name}.parquet"] = {"rows": len(rows)}
    artifact.finish(made, {}, file_notes=notes)
    return made.path


def _row(tar: TarWriter, number: int, entry: Mapping[str, Any]) -> dict[str, Any]:
    key = f"{number:011d}"
    row = {"key": key, "uid": f"{number:032x}", "caption": entry["caption"], "ok": False, "error": "undecodable"}
    if entry["image"] is not None:
        row |= {"ok": True, "error": None, **_image_columns(entry["image"])}
        row["image_offset_bytes"] = tar.add(f"{key}.{row['image_format']}", entry["image"])
        tar.add(f"{key}.txt", entry["caption"].encode())
        tar.add(f"{key}.json", json.dumps({"uid": row["uid"]}).encode())
    return row | {name: value for name, value in entry.items() if name != "image"}


@functools.lru_cache(maxsize=16)
def _image_columns(data: bytes) -> dict[str, Any]:
    """What a row says of its image; many pools here have the same one in every row."""
    image = images.open_image(data)
    sizes = dict(zip(("width_px", "height_px"), image.size, strict=True))
    sizes |= dict(zip(("original_width_px", "original_height_px"), image.size, strict=True))
    sha256 = hashlib.sha256(data).hexdigest()
    return {"image_format": images.FORMATS[image.format], "image_size_bytes": len(data), "sha256": sha256, **sizes}


def write_columns(root: str | pathlib.Path, pool_path: str, columns: Mapping[str, pa.Array]) -> dict[str, Column]:
    """{name: Column} of a column artifact that holds the given columns, over all rows of the pool in order."""
    path = storage.join(str(root), "columns-" + "-".join(columns))
    start = 0
    for shard in pool.load_shards(pool_path):
        table = pa.table({name: column.slice(start, shard.rows) for name, column in columns.items()})
        data = pool.table_bytes(table, {pool.SHARD_DIGEST: shard.digest.encode()})
        storage.write_bytes(storage.join(path, f"{shard.name}.parquet"), data)
        start += shard.rows
    return {name: Column(path, name) for name in columns}


def even_shards(rows: Sequence[Any], num: int) -> list[Sequence[Any]]:
    """The rows in so many parts of about the same size, in their order."""
    bounds = np.linspace(0, len(rows), min(num, len(rows)) + 1).astype(int)
    return [rows[start:end] for start, end in itertools.pairwise(bounds)]


def scattered_uids(num: int) -> list[str]:
    """Different uids of 32 hex digits whose order is not that of their numbers."""
    return [f"{number * 104729 % 1000003:032x}" for number in range(num)]


def random_uids(rng: np.random.Generator, num: int) -> list[str]:
    """Different uids of 32 hex digits."""
    return [f"{int(high):016x}{int(low):016x}" for high, low in rng.integers(0, 2**63, size=(num, 2))]
