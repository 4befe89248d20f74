"""Near-duplicates of embeddings: semdedup and embedding_duplicates beside faiss and the published SemDeDup code's way.

    uv run --with faiss-cpu benchmarks/embedding_duplicates.py [--rows 50000 --dimensions 512]

Ours: `fit` of both stages over a pool of shards of 10,000 rows, reading and exchanging files, one task after the other.
The other way: the vectors in memory; faiss.Kmeans(spherical, 20 iterations, 256 rows a cluster) and its index's search,
then per cluster the product of all rows in torch, its upper triangle and maximum, as the published code does; and
faiss.IndexFlatIP for the 17 nearest of each row. One thread each; CPU seconds of the process. Without faiss only ours
is measured. Vectors: points of a few directions with noise, one in five a near copy of an earlier one.
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

from benchmarks.vector_pool import vector_column, write_pool  # noqa: E402
from pipeline.core import exchange, pool, storage  # noqa: E402
from stages.column_files import Column  # noqa: E402
from stages.columns.embedding_duplicates import EmbeddingDuplicates  # noqa: E402
from stages.columns.semdedup import FOUND, SemDeDup  # noqa: E402
from stages.duplicates.groups import GROUPS  # noqa: E402
from stages.kmeans import choose_clusters  # noqa: E402
from stages.stage_worker import StageJob, fit, fit_path  # noqa: E402
from tests.passes_fixture import passes_here  # noqa: E402
from tests.pool_fixture import random_uids, write_columns  # noqa: E402

SHARD_ROWS = 10_000
THRESHOLD = 0.95
TOP_K = 16
ITERATIONS = 20


def vectors(num_rows: int, num_dimensions: int) -> tuple[np.ndarray, np.ndarray]:
    """([n, d] float16 of length 1, [n]): the vectors, and of which row each is a near copy (of itself: of none)."""
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(64, num_dimensions)).astype(np.float32)
    found = (rng.normal(size=(num_rows, 64)) * np.linspace(2, 0.2, 64)).astype(np.float32) @ directions
    found += 1.5 * rng.standard_normal(found.shape, dtype=np.float32)
    original = np.arange(num_rows)
    copies = np.flatnonzero(rng.random(num_rows) < 0.2)[1:]
    original[copies] = (rng.random(len(copies)) * copies).astype(np.int64)
    original[copies] = original[original[copies]]  # mostly, but not always, an original
    spread = np.linalg.norm(found, axis=1)[original[copies], None] * rng.uniform(0.05, 0.4, (len(copies), 1))
    noise = rng.standard_normal((len(copies), num_dimensions), dtype=np.float32) / num_dimensions**0.5
    found[copies] = found[original[copies]] + spread * noise
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float16), original


def random_pool(root: str, num_rows: int) -> str:
    """The path of a pool without images."""
    return write_pool(root, pa.array(random_uids(np.random.default_rng(1), num_rows)), SHARD_ROWS)


def fitted(pool_path: str, stage, name: str, column: Column, out_path: str) -> tuple[pa.Table, float]:
    """(the rows of the fit's last pass, CPU seconds of the fit)."""
    job = StageJob(stage, out_path, {"vector": column})
    started = time.process_time()
    fit(pool_path, job, pool.load_shards(pool_path), passes_here(fit_path(job)))
    took = time.process_time() - started
    folder = storage.join(fit_path(job), name)
    return exchange.read([storage.join(folder, file) for file in storage.list_files(folder)]), took


def faiss_semdedup(rows_ND: np.ndarray, num_clusters: int) -> tuple[np.ndarray, float, float]:
    """([n] similarities, CPU seconds of k-means and of the comparison), as the published code does it."""
    import faiss
    import torch

    torch.set_num_threads(1)
    faiss.omp_set_num_threads(1)
    started = time.process_time()
    kmeans = faiss.Kmeans(rows_ND.shape[1], num_clusters, niter=ITERATIONS, spherical=True, seed=0)
    kmeans.train(rows_ND)
    cosine, cluster = kmeans.index.search(rows_ND, 1)
    middle = time.process_time()
    found = np.zeros(len(rows_ND), np.float32)
    for number in range(num_clusters):
        own = np.flatnonzero(cluster[:, 0] == number)
        own = own[np.argsort(cosine[own, 0], kind="stable")]
        rows = torch.from_numpy(rows_ND[own])
        if len(own):
            found[own] = torch.triu(rows @ rows.T, diagonal=1).max(dim=0).values.numpy()
    return found, middle - started, time.process_time() - middle


def faiss_near(rows_ND: np.ndarray) -> tuple[int, float]:
    """(number of near pairs, CPU seconds) of the TOP_K nearest of each row."""
    import faiss

    faiss.omp_set_num_threads(1)
    started = time.process_time()
    index = faiss.IndexFlatIP(rows_ND.shape[1])
    index.add(rows_ND)
    cosine, place = index.search(rows_ND, TOP_K + 1)
    near = (cosine >= THRESHOLD) & (place != np.arange(len(rows_ND))[:, None])
    return int(near.sum()), time.process_time() - started


def main() -> int:
    """0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--dimensions", type=int, default=512)
    args = parser.parse_args()
    try:
        import faiss  # noqa: F401

        with_faiss = True
    except ImportError:
        with_faiss = False
    rows, original = vectors(args.rows, args.dimensions)
    num_clusters = choose_clusters(args.rows)
    with tempfile.TemporaryDirectory() as folder:
        pool_path = random_pool(folder, args.rows)
        placed = write_columns(folder, pool_path, {"vector": vector_column(rows)})["vector"]
        semdedup = SemDeDup(embedding="vector", iterations=ITERATIONS)
        table, semdedup_s = fitted(pool_path, semdedup, FOUND, placed, f"{folder}/semdedup")
        exact = EmbeddingDuplicates(embedding="vector", threshold=THRESHOLD, top_k=TOP_K)
        _, exact_s = fitted(pool_path, exact, GROUPS, placed, f"{folder}/exact")
        facts = storage.read_json(f"{folder}/exact/fit/facts.json")
    dropped = int((table["similarity"].to_numpy() > np.float32(THRESHOLD)).sum())
    copies = int((original != np.arange(args.rows)).sum())
    print(f"{args.rows:,} rows of {args.dimensions}, {num_clusters} clusters, {copies:,} copies, cosine {THRESHOLD}")
    print(f"ours    semdedup {semdedup_s:.1f} CPU s, {dropped:,} rows dropped")
    print(f"ours    exact    {exact_s:.1f} CPU s, {facts['duplicates']:,} rows dropped, {facts['pairs']:,} pairs")
    if not with_faiss:
        print("faiss is not installed: uv run --with faiss-cpu benchmarks/embedding_duplicates.py")
        return 0
    wide = rows.astype(np.float32)
    wide /= np.linalg.norm(wide, axis=1, keepdims=True)
    similarity, kmeans_s, cosines_s = faiss_semdedup(wide, num_clusters)
    num_pairs, near_s = faiss_near(wide)
    num_dropped, faiss_s = int((similarity > THRESHOLD).sum()), kmeans_s + cosines_s
    print(
        f"faiss   semdedup {faiss_s:.1f} CPU s ({kmeans_s:.1f} k-means), {num_dropped:,} rows dropped; "
        f"ours takes {semdedup_s / faiss_s:.2f} of it"
    )
    print(f"faiss   exact    {near_s:.1f} CPU s, {num_pairs:,} pairs; ours takes {exact_s / near_s:.2f} of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
