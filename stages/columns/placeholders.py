"""Images that stand behind many URLs: "image not found" pictures and the like, which servers send as a success."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.core import pool, storage
from pipeline.core.pool import Shard
from stages.base import Batch, LoadContext, Stage

COUNTED_ROWS = 20_000_000  # in memory at once: 16 bytes each, and as much again while sorting
FILE = "urls_by_image.npy"


@dataclass(frozen=True)
class Placeholders(Stage):
    """How many different URLs gave these very bytes (sha256), and whether they are `min_urls` or more.

    Rows without a URL count as one URL a row. Images are told apart by 64 bits of their sha256. Cost: two columns of
    the pool read once per COUNTED_ROWS rows, in one task.
    """

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "columns"
    adds: ClassVar[Mapping[str, str]] = {"image_num_urls": "int32", "is_placeholder": "bool"}
    whole_pool: ClassVar[bool] = True

    min_urls: Annotated[int, Field(ge=2)] = 10

    def fit(self, pool_path: str, shards: Sequence[Shard], out_path: str) -> None:
        """None; writes (image, URLs) of the images with more than one URL, sorted by image."""
        passes = max(1, -(-sum(shard.rows for shard in shards) // COUNTED_ROWS))
        found = []
        for number in range(passes):
            pairs = [_pairs(pool_path, shard, passes, number) for shard in shards]
            images, counts = np.unique(np.unique(np.concatenate(pairs), axis=0)[:, 0], return_counts=True)
            found.append(np.stack([images[counts > 1], counts[counts > 1].astype(np.uint64)], axis=1))
        table = np.concatenate(found)
        with storage.write_file(storage.join(out_path, FILE)) as temporary, open(temporary, "wb") as file:
            np.save(file, table[np.argsort(table[:, 0])], allow_pickle=False)

    def load(self, context: LoadContext) -> Any:
        """[n, 2] uint64: image, URLs."""
        with storage.open_read(storage.join(context.fit_path or "", FILE)) as file:
            return np.load(file, allow_pickle=False)

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        images = _first_64_bits(batch.columns["sha256"])
        counts = np.ones(len(images), dtype=np.int32)
        if len(state):
            places = np.minimum(np.searchsorted(state[:, 0], images), len(state) - 1)
            same = state[places, 0] == images
            counts[same] = state[places[same], 1].astype(np.int32)
        return {"image_num_urls": counts, "is_placeholder": counts >= self.min_urls}


def _pairs(pool_path: str, shard: Shard, passes: int, number: int) -> np.ndarray:
    """[n, 2] uint64: (image, hash of the URL) of the shard's ok rows whose image belongs to this pass."""
    rows = pool.read_rows(pool_path, shard.name, ["uid", "ok", "sha256", "url"])
    rows = rows.filter(rows["ok"])
    urls = [url or uid for url, uid in zip(rows["url"].to_pylist(), rows["uid"].to_pylist(), strict=True)]
    images = _first_64_bits(rows["sha256"].to_pylist())
    hashed = (int.from_bytes(hashlib.blake2b(url.encode(), digest_size=8).digest(), "big") for url in urls)
    pairs = np.stack([images, np.fromiter(hashed, dtype=np.uint64, count=len(urls))], axis=1)
    return pairs[images % np.uint64(passes) == number]


def _first_64_bits(digests: Sequence[str]) -> np.ndarray:
    return np.fromiter((int(digest[:16], 16) for digest in digests), dtype=np.uint64, count=len(digests))
