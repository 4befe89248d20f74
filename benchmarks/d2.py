"""D2 pruning (image + text, 30 %): the stage d2 beside the way of the authors' code, with faiss.

    uv run --with faiss-cpu benchmarks/d2.py [--rows 30000 --dimensions 512]

Ours: `fit` over a pool of shards of 10,000 rows, reading and exchanging files, one task after the other; once comparing
all pairs, which is what everything else is measured by, and once with clusters, as a pool of more than 100,000 rows is.
The other way: the vectors in memory; faiss.IndexIVFPQ (nlist 100, m 16, 8 bits, nprobe 1), trained on 2 % of the rows
but at least 10,000; of the two nearest found the first one dropped, its distance subtracted; one argsort and a list of
rows set aside. One thread each; CPU seconds of the process. Without faiss only ours is measured.

Recall: rows whose neighbour is the nearest one, or as near. Agreement: how much of the 30 % kept the exact way keeps.
Vectors: points of a few directions with noise, one in five a near copy of an earlier one, of both image and text.
"""

from __future__ import annotations

import argparse
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

from benchmarks.embedding_duplicates import random_pool, vectors  # noqa: E402
from benchmarks.vector_pool import vector_column  # noqa: E402
from pipeline.core import exchange, pool  # noqa: E402
from stages import nearest_neighbours  # noqa: E402
from stages.columns.d2 import D2, FOUND  # noqa: E402
from stages.nearest_neighbours import Search, find_neighbours  # noqa: E402
from stages.pool_blocks import blocks  # noqa: E402
from stages.stage_worker import StageJob, fit, fit_path  # noqa: E402
from stages.unit_vectors import unit  # noqa: E402
from tests.passes_fixture import passes_here  # noqa: E402
from tests.pool_fixture import write_columns  # noqa: E402

FRACTION = 0.3
SHIFT = 0.115
TILE_ROWS = 1000


def ours(pool_path: str, columns: dict, folder: str, exact_rows: int) -> tuple[np.ndarray, np.ndarray, float, float]:
    """(neighbour of each row or -1, d2_score, CPU seconds of the neighbours, of the picks)."""
    nearest_neighbours.EXACT_ROWS = exact_rows
    stage = D2()
    job = StageJob(stage, folder, columns)
    passes = passes_here(fit_path(job))
    shards = pool.load_shards(pool_path)
    search = Search(stage.embeddings, stage.score, stage.neighbours, stage.probes, stage.seed)
    started = time.process_time()
    _, near, _ = find_neighbours(search, blocks(pool_path, shards, columns), passes.work())
    near_s = time.process_time() - started
    table = exchange.read(near.paths)
    neighbour = np.full(sum(shard.rows for shard in shards), -1)
    neighbour[table["row"].to_numpy()] = table["other"].to_numpy()
    started = time.process_time()
    fit(pool_path, job, shards, passes)  # goes on from the neighbours
    picks_s = time.process_time() - started
    found = f"{fit_path(job)}/{FOUND}/00000.arrow"
    parts = [exchange.read([found], number)["score"].to_numpy() for number in range(len(shards))]
    return neighbour, np.concatenate(parts), near_s, picks_s


def faiss_neighbours(rows_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """(neighbour of each row, distance, CPU seconds), as the authors' code finds them."""
    import faiss

    faiss.omp_set_num_threads(1)
    started = time.process_time()
    num_dimensions = rows_ND.shape[1]
    quantiser = faiss.IndexFlatL2(num_dimensions)
    index = faiss.IndexIVFPQ(quantiser, num_dimensions, 100, 16, 8)
    sampled = np.random.default_rng(0).permutation(len(rows_ND))[: max(10_000, len(rows_ND) // 50)]
    index.train(rows_ND[sampled])
    index.add(rows_ND)
    distance, place = index.search(rows_ND, 2)
    return place[:, 1], distance[:, 1] - distance[:, 0], time.process_time() - started


def set_aside(
    neighbour: np.ndarray, distance: np.ndarray, scores: np.ndarray, num_kept: int
) -> tuple[list, float, float]:
    """(rows kept, CPU seconds, share of them that have the largest values at first).

    One argsort, and a list of rows whose value fell below that of the next in line, as in the authors' code.
    """
    started = time.process_time()
    base = np.maximum(scores + SHIFT, 1e-7)
    weight = np.exp(-distance)
    values = base + weight * base[neighbour]
    in_line = np.argsort(-values)
    highest = set(in_line[:num_kept].tolist())
    kept: list[int] = []
    aside: list[int] = []
    at = 0
    while len(kept) < num_kept:
        row = -1
        if aside:
            best = int(np.argmax(values[aside]))
            if values[aside[best]] >= values[in_line[at]]:
                row = aside.pop(best)
        if row < 0:
            row = int(in_line[at])
            at += 1
            if values[row] < values[in_line[at]]:
                aside.append(row)
                continue
        kept.append(row)
        values[neighbour[row]] -= values[row] * weight[row]
    return kept, time.process_time() - started, len(highest.intersection(kept)) / num_kept


def cosine_sums(images: np.ndarray, texts: np.ndarray, neighbour: np.ndarray) -> np.ndarray:
    """[n] of each row with its neighbour; -2 where it has none."""
    found = np.full(len(images), -2.0)
    for start in range(0, len(images), TILE_ROWS):
        rows = np.arange(start, min(start + TILE_ROWS, len(images)))
        others = np.maximum(neighbour[rows], 0)
        sums = sum(np.einsum("ij,ij->i", unit(part[rows]), unit(part[others])) for part in (images, texts))
        found[rows] = np.where(neighbour[rows] < 0, -2, sums)
    return found


def main() -> int:
    """0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=30_000)
    parser.add_argument("--dimensions", type=int, default=512)
    args = parser.parse_args()
    images, original = vectors(args.rows, args.dimensions)
    rng = np.random.default_rng(3)
    order = rng.permutation(args.dimensions)
    texts = np.roll(images[:, order], 1, axis=1)  # alike where the images are, and no more than they
    noise = rng.standard_normal(texts.shape, dtype=np.float32) * np.float32(0.3 / args.dimensions**0.5)
    texts = (texts.astype(np.float32) + noise).astype(np.float16)
    scores = rng.normal(0.2, 0.05, args.rows).astype(np.float32)
    num_kept = int(FRACTION * args.rows)
    with tempfile.TemporaryDirectory() as folder:
        pool_path = random_pool(folder, args.rows)
        columns = {}
        for name, column in {
            "clip_image": vector_column(images),
            "clip_text": vector_column(texts),
            "clip_score": pa.array(scores),
        }.items():
            columns |= write_columns(folder, pool_path, {name: column})
        exact, exact_score, exact_near_s, exact_picks_s = ours(pool_path, columns, f"{folder}/exact", args.rows)
        probed, probed_score, probed_near_s, probed_picks_s = ours(pool_path, columns, f"{folder}/probed", 0)
    truth = cosine_sums(images, texts, exact)

    def recall(neighbour: np.ndarray) -> float:
        return float((cosine_sums(images, texts, neighbour) >= truth).mean())

    kept = set(np.argsort(-exact_score)[:num_kept].tolist())

    def agreement(rows: list) -> float:
        return len(kept.intersection(rows)) / num_kept

    copies = int((original != np.arange(args.rows)).sum())
    print(f"{args.rows:,} rows of 2 x {args.dimensions}, {copies:,} near copies, {FRACTION:.0%} kept, 1 neighbour")
    print(f"ours    all pairs  {exact_near_s:.1f} CPU s and {exact_picks_s:.1f} of picks")
    print(
        f"ours    clusters   {probed_near_s:.1f} CPU s and {probed_picks_s:.1f} of picks, recall {recall(probed):.3f}, "
        f"agreement {agreement(np.argsort(-probed_score)[:num_kept].tolist()):.3f}"
    )
    distance = 4 - 2 * truth
    rows, loop_s, first = set_aside(exact, distance, scores, num_kept)
    print(
        f"authors' picks, on all pairs' neighbours: {loop_s:.1f} CPU s, agreement {agreement(rows):.3f}; "
        f"{first:.3f} of them have the largest values at first"
    )
    try:
        import faiss  # noqa: F401
    except ImportError:
        print("faiss is not installed: uv run --with faiss-cpu benchmarks/d2.py")
        return 0
    both = np.concatenate([images, texts], axis=1).astype(np.float32)
    neighbour, distance, faiss_s = faiss_neighbours(both)
    rows, loop_s, _ = set_aside(neighbour, distance, scores, num_kept)
    ratio = (probed_near_s + probed_picks_s) / (faiss_s + loop_s)
    print(
        f"faiss   IVFPQ      {faiss_s:.1f} CPU s and {loop_s:.1f} of picks, recall {recall(neighbour):.3f}, "
        f"agreement {agreement(rows):.3f}; ours with clusters takes {ratio:.1f} times as long"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
