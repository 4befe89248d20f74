"""Pools: image-text pairs in fixed shards, one row each, with a uid.

A pool is an artifact with, per shard, `00000.tar` (the usable pairs, in img2dataset's layout: KEY.jpg KEY.txt
KEY.json) and `00000.parquet` (every row, failed ones included, in order). Both carry the same rows in the same order
for ever; stages add columns beside them and never drop or reorder. One row, verbatim:

    uid='0c39..' key='00000000017' image_id='77ab..' caption='two red stars' source='web' ok=True error=None
    error_detail=None sha256='77ab..' width_px=64 height_px=48 original_width_px=64 original_height_px=48
    image_format='png' image_offset_bytes=31744 image_size_bytes=2048 url=None
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import artifact, storage
from pipeline.core.errors import WinnowError

SCHEMA = pa.schema(
    [
        ("uid", pa.string()),  # 32 hex digits, unique in the pool
        ("key", pa.string()),  # the sample's name in the tar
        ("image_id", pa.string()),  # rows of the same image share it; null without an image
        ("caption", pa.string()),
        ("source", pa.string()),  # the source's name in the config
        ("ok", pa.bool_()),
        ("error", pa.string()),  # a key of errors.FAILURES, null when ok
        ("error_detail", pa.string()),
        ("sha256", pa.string()),  # of the image's bytes as the source gave them
        ("width_px", pa.int32()),
        ("height_px", pa.int32()),
        ("original_width_px", pa.int32()),  # before any resize, where the source says so; else as stored
        ("original_height_px", pa.int32()),
        ("image_format", pa.string()),  # jpg | png | webp | gif | bmp | tiff, by content
        ("image_offset_bytes", pa.int64()),  # where the image lies in the shard's tar
        ("image_size_bytes", pa.int64()),
        ("url", pa.string()),
    ]
)
SHARD_DIGEST = b"pool_shard_sha256"  # key in a column file's metadata


@dataclass(frozen=True)
class Shard:
    """One shard: its name (`00000`), the digest of its content, and its number of rows."""

    name: str
    digest: str
    rows: int


def derived_uid(image: bytes, caption: str, occurrence: int) -> str:
    """32 hex digits from the image's bytes, the caption and the how-many-th such pair it is (0 for the first)."""
    digest = hashlib.sha256()
    for part in (image, caption.encode("utf-8", "surrogatepass"), str(occurrence).encode()):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.hexdigest()[:32]


def shards(record: Mapping[str, Any]) -> list[Shard]:
    """The pool's shards in order, from its record."""
    found = []
    for name, entry in sorted(record["files"].items()):
        if name.endswith(".parquet"):
            stem = name.removesuffix(".parquet")
            tar = record["files"].get(f"{stem}.tar", {}).get("sha256", "")
            digest = hashlib.sha256(f"{entry['sha256']} {tar}".encode()).hexdigest()[:32]
            found.append(Shard(stem, digest, entry["rows"]))
    return found


def load_shards(pool_path: str) -> list[Shard]:
    """The shards of the finished pool in this folder. Raises WinnowError when it is not finished."""
    record = artifact.read_record(pool_path)
    if record is None:
        raise WinnowError(f"{pool_path}: expected a finished pool, found no {artifact.RECORD}")
    return shards(record)


def read_table(path: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The parquet file's table, for local paths and URLs."""
    with storage.open_read(path) as file:
        return pq.read_table(file, columns=None if columns is None else list(columns))


def table_bytes(table: pa.Table, metadata: Mapping[bytes, bytes] | None = None) -> bytes:
    """The table as parquet bytes: equal tables give equal bytes.

    Vectors get no dictionary: their numbers hardly repeat, and looking for repeats costs three times the writing.
    """
    if metadata:
        table = table.replace_schema_metadata({**(table.schema.metadata or {}), **metadata})
    sink = pa.BufferOutputStream()
    names = [field.name for field in table.schema if not pa.types.is_list(field.type)]
    pq.write_table(table, sink, compression="zstd", version="2.6", use_dictionary=names or False)
    return sink.getvalue().to_pybytes()


def read_rows(pool_path: str, shard: str, columns: Sequence[str] | None = None) -> pa.Table:
    """The shard's rows, failed ones included, in order."""
    return read_table(storage.join(pool_path, f"{shard}.parquet"), columns)


def read_images(pool_path: str, shard: str, rows: pa.Table) -> Iterator[bytes]:
    """The image bytes of the given ok rows of one shard, in their order.

    Args:
        rows: a table with `image_offset_bytes` and `image_size_bytes`; offsets ascending is fastest.
    """
    offsets = rows["image_offset_bytes"].to_pylist()
    sizes = rows["image_size_bytes"].to_pylist()
    with storage.open_read(storage.join(pool_path, f"{shard}.tar")) as file:
        for offset_bytes, size in zip(offsets, sizes, strict=True):
            file.seek(offset_bytes)
            data = file.read(size)
            if len(data) != size:
                raise WinnowError(f"{pool_path}/{shard}.tar: ends inside the image at byte {offset_bytes}")
            yield data
