"""All pairs of 64-bit hashes that differ in few bits: the join of image_duplicates beside a linear scan.

    python benchmarks/bit_distance.py [--rows 1000000 10000000] [--bits 4] [--queries 5000]

Hashes: random ones, and for one in ten another one with 0 to 8 bits changed. Ours: the passes bit_keys and bit_pairs,
one after the other in this process, from different hashes to files of edges. Beside it what is exact and usual: faiss'
IndexBinaryFlat.range_search (with `pip install faiss-cpu`; popcounts in C++), otherwise numpy's bitwise_count; of
`queries` hashes against all, and its time for all hashes from that, as a scan's cost is the same for each. Both on one
core. The pairs of the queries must come out connected, all of them.
"""

from __future__ import annotations

import argparse
import pathlib
import resource
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402

from pipeline.core import exchange  # noqa: E402
from pipeline.core.passes import Passes  # noqa: E402
from stages.duplicates import bit_distance, components, equal_keys  # noqa: E402
from stages.selection import uids  # noqa: E402


def made_hashes(num_rows: int) -> np.ndarray:
    """[n] uint64, about a tenth of them planted near another one; all different."""
    rng = np.random.default_rng(0)
    own = rng.integers(0, 2**64, num_rows - num_rows // 10, dtype=np.uint64)
    near = own[: num_rows // 10].copy()
    num_bits = rng.integers(0, 9, len(near))
    for step in range(8):
        flip = np.uint64(1) << rng.integers(0, 64, len(near), dtype=np.uint64)
        near = np.where(num_bits > step, near ^ flip, near)
    return rng.permutation(np.unique(np.concatenate([own, near])))


def run(function, items, names, on_done):
    """None; the `run` of Passes, in this process."""
    for number, item in enumerate(items):
        on_done(number, function(*item))


def ours(hashes: np.ndarray, most_bits: int, folder: str) -> tuple[float, np.ndarray, dict[str, int]]:
    """(seconds, edges [n, 2], facts)."""
    passes = Passes(run, folder)
    num_parts = -(-len(hashes) // equal_keys.PARTITION_ROWS)
    sent = exchange.by_hash(uids.mix(hashes), num_parts)
    rows = np.arange(len(hashes), dtype=np.uint64)
    keys = passes.run("keys", write_hashes, [(hashes, rows, sent)])
    bit_distance.close_pairs(hashes[:1000], bit_distance.Blocks(5, 4), 0, 4)  # compiles
    start = time.perf_counter()
    pairs, facts = bit_distance.edges(keys, num_parts, passes, len(hashes), most_bits)
    seconds = time.perf_counter() - start
    table = exchange.read(pairs.paths)
    return seconds, np.stack([table["a"].to_numpy(), table["b"].to_numpy()], axis=1), facts


def write_hashes(hashes: np.ndarray, rows: np.ndarray, parts: np.ndarray, path: str) -> None:
    """None; the file that equal_keys would have written."""
    exchange.write(path, {"key0": hashes, "row": rows}, parts)


def scan(hashes: np.ndarray, most_bits: int, num_queries: int) -> tuple[str, float, np.ndarray]:
    """(name, seconds, pairs [n, 2]) of the first hashes against all."""
    try:
        import faiss
    except ImportError:
        start = time.perf_counter()
        found = [
            np.stack([np.full(len(close), query), close], axis=1)
            for query in range(num_queries)
            for close in [np.flatnonzero(np.bitwise_count(hashes ^ hashes[query]) <= most_bits)]
        ]
        return "numpy", time.perf_counter() - start, np.concatenate(found)
    faiss.omp_set_num_threads(1)
    data = np.ascontiguousarray(hashes).view(np.uint8).reshape(-1, 8)
    index = faiss.IndexBinaryFlat(64)
    index.add(data)
    start = time.perf_counter()
    bounds, _, close = index.range_search(data[:num_queries], most_bits + 1)  # it returns what is strictly nearer
    seconds = time.perf_counter() - start
    queries = np.repeat(np.arange(num_queries), np.diff(bounds.astype(np.int64)))
    return "faiss IndexBinaryFlat", seconds, np.stack([queries, close], axis=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--queries", type=int, default=5000)
    arguments = parser.parse_args()
    for num_rows in arguments.rows:
        hashes = made_hashes(num_rows)
        with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as folder:
            seconds, edges, facts = ours(hashes, arguments.bits, folder)
        peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
        name, scanned, pairs = scan(hashes, arguments.bits, arguments.queries)
        pairs = pairs[pairs[:, 0] != pairs[:, 1]]
        label = np.arange(len(hashes), dtype=np.uint64)
        row, lowest = components.labels(edges[:, 0], edges[:, 1])
        label[row.astype(np.int64)] = lowest
        lost = int((label[pairs[:, 0]] != label[pairs[:, 1]]).sum())
        expected = scanned / arguments.queries * len(hashes)
        print(
            f"{len(hashes):>11,} hashes, {arguments.bits} bits: {seconds:.1f} s, peak {peak_gb:.2f} GB, {facts}\n"
            f"    {name}: {scanned:.2f} s for {arguments.queries:,} queries, {expected:,.0f} s for all: "
            f"{expected / seconds:,.0f} times as long; {len(pairs):,} of its pairs, {lost} not connected by ours",
            flush=True,
        )
        if lost:
            raise SystemExit("pairs were lost")


if __name__ == "__main__":
    main()
