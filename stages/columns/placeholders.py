"""Images that stand behind many URLs: "image not found" pictures and the like, which servers send as a success."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.core import exchange, storage
from pipeline.core.passes import Pass, Passes
from stages.base import Batch, LoadContext, Stage
from stages.pool_blocks import Block

PARTITION_ROWS = 8_000_000  # counted in memory at once: 16 bytes each, and as much again while sorting
COUNTS = "counts"


@dataclass(frozen=True)
class Placeholders(Stage):
    """How many different URLs gave these very bytes (sha256), and whether they are `min_urls` or more.

    Rows without a URL count as one URL a row. Images are told apart by 64 bits of their sha256. Cost: two columns of
    the pool read once, and 16 bytes a row exchanged.
    """

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "columns"
    needs: ClassVar[tuple[str, ...]] = ("sha256",)
    adds: ClassVar[Mapping[str, str]] = {"image_num_urls": "int32", "is_placeholder": "bool"}
    whole_pool: ClassVar[bool] = True

    min_urls: Annotated[int, Field(ge=2)] = 10

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """The number of images with more than one URL; a file of (image, URLs) for each part of them."""
        num_partitions = max(1, -(-sum(block.rows for block in blocks) // PARTITION_ROWS))
        urls = passes.run("urls", write_urls, [(block, num_partitions) for block in blocks])
        counts = passes.run(COUNTS, write_counts, [(urls, number) for number in range(num_partitions)])
        passes.drop(urls)
        return {"images_with_several_urls": exchange.num_rows(counts.paths)}

    def load(self, context: LoadContext) -> Any:
        """(image [n] uint64, sorted; URLs [n] int32)."""
        folder = storage.join(context.fit_path or "", COUNTS)
        table = exchange.read([storage.join(folder, name) for name in storage.list_files(folder)])
        if table is None:
            return np.empty(0, np.uint64), np.empty(0, np.int32)
        images, counts = table["image"].to_numpy(), table["urls"].to_numpy()
        order = np.argsort(images)
        return images[order], counts[order]

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        images = _first_64_bits(batch.columns["sha256"])
        counts = np.ones(len(images), dtype=np.int32)
        several, their_counts = state
        if len(several):
            places = np.minimum(np.searchsorted(several, images), len(several) - 1)
            same = several[places] == images
            counts[same] = their_counts[places[same]]
        return {"image_num_urls": counts, "is_placeholder": counts >= self.min_urls}


def write_urls(block: Block, num_partitions: int, path: str) -> None:
    """None; writes (image, hash of the URL) of the block's ok rows, by image."""
    images, hashes = [], []
    for rows in block.tables(["uid", "ok", "sha256", "url"]):
        rows = rows.filter(rows["ok"])
        urls = [url or uid for url, uid in zip(rows["url"].to_pylist(), rows["uid"].to_pylist(), strict=True)]
        images.append(_first_64_bits(rows["sha256"].to_pylist()))
        hashed = (int.from_bytes(hashlib.blake2b(url.encode(), digest_size=8).digest(), "big") for url in urls)
        hashes.append(np.fromiter(hashed, dtype=np.uint64, count=len(urls)))
    image = np.concatenate(images)
    exchange.write(path, {"image": image, "url": np.concatenate(hashes)}, exchange.by_hash(image, num_partitions))


def write_counts(urls: Pass, partition: int, path: str) -> None:
    """None; writes (image, URLs) of the partition's images that have more than one URL."""
    rows = exchange.read(urls.paths, partition)
    pairs = np.empty((0, 2), np.uint64)
    if rows is not None:
        pairs = np.unique(np.stack([rows["image"].to_numpy(), rows["url"].to_numpy()], axis=1), axis=0)
    images, counts = np.unique(pairs[:, 0], return_counts=True)
    several = counts > 1
    exchange.write(path, {"image": images[several], "urls": counts[several].astype(np.int32)})


def _first_64_bits(digests: Sequence[str]) -> np.ndarray:
    return np.fromiter((int(digest[:16], 16) for digest in digests), dtype=np.uint64, count=len(digests))
