"""negCLIPLoss: the stage negclip beside the published code's way.

    python benchmarks/negclip.py [--rows 16384 --dimensions 512 --batch 4096 --rounds 2]

Ours: `fit` of the stage over a pool of shards of 10,000 rows: dealing, exchanging, scoring, one task after the other.
The published code's way (baselines/vas2.py, cal_new_clip_score, on a CPU): the vectors in memory as float32; for each
round and batch the whole matrix of cosines, its exponential without a shift, sums over both axes, logarithms. It gets
the batches that ours deals, so that scores can be compared; its own come from torch.randperm within one file. One
thread each; CPU seconds of the process. It takes the stored float16 vectors as they are, ours at length 1: the second
difference is to its way with those. Vectors: images about a common direction, captions near them, as CLIP's are.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
os.environ["OMP_NUM_THREADS"] = "1"

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402

from benchmarks.vector_pool import vector_column, write_pool  # noqa: E402
from pipeline.core import exchange, pool, storage  # noqa: E402
from stages.columns.negclip import DEAL_STREAM, FOUND, NegClip  # noqa: E402
from stages.selection import uids  # noqa: E402
from stages.stage_worker import StageJob, fit, fit_path  # noqa: E402
from stages.unit_vectors import unit  # noqa: E402
from tests.passes_fixture import passes_here  # noqa: E402
from tests.pool_fixture import random_uids, write_columns  # noqa: E402

SHARD_ROWS = 10_000
TEMPERATURE = 0.01


def pairs(num_rows: int, num_dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """Two [n, d] float16 of length 1: images and captions, own cosines about 0.25 and others about 0.15."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(2, num_dimensions)).astype(np.float32)
    image = rng.standard_normal((num_rows, num_dimensions), dtype=np.float32) + 0.8 * directions[0]
    text = rng.standard_normal((num_rows, num_dimensions), dtype=np.float32) + 0.8 * directions[1]
    text += 0.15 * image + 0.2 * directions[0]
    return tuple((rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float16) for rows in (image, text))


def run_ours(
    folder: str, ids: pa.Array, image: np.ndarray, text: np.ndarray, stage: NegClip
) -> tuple[np.ndarray, float]:
    """([n] float32 scores, CPU seconds)."""
    path = write_pool(folder, ids, SHARD_ROWS)
    columns = {}
    for name, rows in (("image", image), ("text", text)):
        columns |= write_columns(folder, path, {name: vector_column(rows)})
    job = StageJob(stage, f"{folder}/negclip", columns)
    started = time.process_time()
    fit(path, job, pool.load_shards(path), passes_here(fit_path(job)))
    took = time.process_time() - started
    files = [storage.join(fit_path(job), FOUND, file) for file in storage.list_files(f"{fit_path(job)}/{FOUND}")]
    shards = [exchange.read(files, number).sort_by("row") for number in range(-(-len(ids) // SHARD_ROWS))]
    return np.concatenate([table["score"].to_numpy() for table in shards]), took


def dealt(ids: pa.Array, stage: NegClip) -> list[list[np.ndarray]]:
    """Per round the rows of each of the stage's batches."""
    numbers = uids.parse(ids, "benchmark")
    num_batches = -(-len(ids) // stage.batch)
    bounds = [number * len(ids) // num_batches for number in range(1, num_batches)]
    rounds = []
    for number in range(stage.rounds):
        hashes = uids.hash64(numbers, stage.seed, DEAL_STREAM, np.full(len(ids), number, np.uint64))
        rounds.append(np.split(np.argsort(hashes), bounds))
    return rounds


def run_published_way(image: np.ndarray, text: np.ndarray, rounds: list[list[np.ndarray]]) -> tuple[np.ndarray, float]:
    """([n] float32 scores, CPU seconds)."""
    started = time.process_time()
    image_ND, text_ND = torch.from_numpy(image).float(), torch.from_numpy(text).float()
    total = torch.zeros(len(image))
    for batches in rounds:
        for rows in batches:
            own = torch.from_numpy(rows)
            cosines = image_ND[own] @ text_ND[own].T
            exponentials = torch.exp(cosines / TEMPERATURE)
            by_image = 0.5 * TEMPERATURE * torch.log(exponentials.sum(dim=1))
            by_text = 0.5 * TEMPERATURE * torch.log(exponentials.sum(dim=0))
            total[own] += torch.diag(cosines) - by_image - by_text
    return (total / len(rounds)).numpy(), time.process_time() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=16_384)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--batch", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    image, text = pairs(arguments.rows, arguments.dimensions)
    ids = pa.array(random_uids(np.random.default_rng(1), arguments.rows))
    stage = NegClip("image", "text", TEMPERATURE, arguments.batch, arguments.rounds)
    with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as folder:
        ours, ours_s = run_ours(folder, ids, image, text, stage)
    published, published_s = run_published_way(image, text, dealt(ids, stage))
    at_length_1, _ = run_published_way(unit(image), unit(text), dealt(ids, stage))
    ranks = (np.argsort(np.argsort(scores)) for scores in (ours, published))
    found = {
        "ours_cpu_s": round(ours_s, 2),
        "published_way_cpu_s": round(published_s, 2),
        "ratio": round(published_s / ours_s, 2),
        "max_difference": float(np.abs(ours - published).max()),
        "max_difference_at_length_1": float(np.abs(ours - at_length_1).max()),
        "rank_correlation": float(np.corrcoef(*ranks)[0, 1]),
    }
    print(json.dumps({"benchmark": "negclip", **vars(arguments), **found}))


if __name__ == "__main__":
    main()
