"""Training of k-means, as the stage clusters does it, beside faiss.Clustering, which DataComp uses: loss and CPU time.

    uv run --with faiss-cpu benchmarks/kmeans.py [--rows 100000 --dimensions 512 --clusters 1000 --iterations 20]

Both train on all rows by Euclidean distance, from a random sample of them, and split the clusters that lose all rows.
Ours reads the sample from a file in every iteration, exchanges sums through files, and gives the same centroids for any
order of rows; faiss holds float32 vectors in memory. The loss is the sum of squared distances to the nearest centroid,
measured by faiss; two seeds of faiss say how much of a difference is chance. One thread; CPU seconds of the process.
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

from benchmarks.embedding_duplicates import random_pool, vectors  # noqa: E402
from benchmarks.vector_pool import vector_column  # noqa: E402
from pipeline.core import exchange, pool  # noqa: E402
from stages.kmeans import KMeans, read_centroids  # noqa: E402
from stages.pool_blocks import blocks  # noqa: E402
from tests.passes_fixture import passes_here  # noqa: E402
from tests.pool_fixture import write_columns  # noqa: E402


def main() -> int:
    """0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("rows", 100_000), ("dimensions", 512), ("clusters", 1000), ("iterations", 20)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    import faiss

    faiss.omp_set_num_threads(1)
    rows, _ = vectors(args.rows, args.dimensions)
    wide = rows.astype(np.float32)

    def loss(centroids: np.ndarray) -> float:
        index = faiss.IndexFlatL2(args.dimensions)
        index.add(np.ascontiguousarray(centroids))
        return float(index.search(wide, 1)[0].sum(dtype=np.float64))

    def faiss_centroids(seed: int) -> tuple[np.ndarray, float]:
        clustering = faiss.Clustering(args.dimensions, args.clusters)
        clustering.niter, clustering.seed, clustering.max_points_per_centroid = args.iterations, seed, 10_000_000
        started = time.process_time()
        clustering.train(wide, faiss.IndexFlatL2(args.dimensions))
        took = time.process_time() - started
        return faiss.vector_to_array(clustering.centroids).reshape(args.clusters, args.dimensions), took

    with tempfile.TemporaryDirectory() as folder:
        pool_path = random_pool(folder, args.rows)
        columns = write_columns(folder, pool_path, {"vector": vector_column(rows)})
        how = KMeans("vector", args.clusters, 0, args.iterations, "l2", sample=1.0)
        started = time.process_time()
        found = how.centroids(blocks(pool_path, pool.load_shards(pool_path), columns), passes_here(f"{folder}/passes"))
        ours_s = time.process_time() - started
        ours, notes = read_centroids(found), exchange.read_notes(found.paths)
    (first, faiss_s), (second, _) = faiss_centroids(0), faiss_centroids(1)
    base = loss(first)
    print(f"{args.rows:,} rows of {args.dimensions}, {args.clusters} clusters, {args.iterations} iterations")
    print(f"faiss {faiss_s:.1f} CPU s, loss 1; with another seed {loss(second) / base:.5f}")
    print(f"ours  {ours_s:.1f} CPU s ({ours_s / faiss_s:.2f} times), loss {loss(ours) / base:.5f}, {notes}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
