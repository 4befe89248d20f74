"""What each filter costs: its stage alone, on one core, over a synthetic pool whose columns are there already.

    python benchmarks/filters.py [NAME ...] [--rows 1000000] [--dimensions 512]

Every filter runs in a process of its own, all passes and all shards one after the other with one thread: its seconds
are core seconds, its memory the most that the process had (some 150 MB of it are Python, numpy and pyarrow). Some are
too long for a million rows here: FEWER names how many they get, and how the time grows from there. Captions are those
of benchmarks/duplicates.py; embeddings are unit vectors around 2,000 directions, a caption's 0.3 from its image's.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402

from benchmarks.duplicates import write_pool  # noqa: E402
from benchmarks.vector_pool import vector_column  # noqa: E402
from pipeline.core import pool, storage  # noqa: E402

DIRECTIONS = 2000
TARGETS = 10_000
ENTRIES = 500_000  # of MetaCLIP's metadata
FEWER = {
    "negclip": (50_000, "rows x batch"),
    "d2": (200_000, "rows x sqrt(rows)"),
    "embedding_duplicates": (100_000, "rows x rows"),
}
FILTERS = {
    "image_stats": {},
    "caption_stats": {},
    "language": {},
    "caption_patterns": {},
    "caption_frequency": {},
    "metaclip": {"metadata": "entries.txt", "threshold": 20_000},
    "caption_classifier": {"sets": {"short": "short.txt", "long": "long.txt"}},
    "mix": {"column": "source", "shares": {"web": 0.7, "shop": 0.3}, "weight_by": "clip_score"},
    "soft_cap": {"score": "clip_score", "scale": 100.0},
    "classifier_head": {"path": "head.safetensors"},
    "clusters": {"clusters": 1000, "target_features": ["targets.npy"]},
    "density_pruning": {"fraction": 0.3},
    "normsim": {"target_features": ["targets.npy"]},
    "normsim_d": {"fraction": 0.3},
    "negclip": {},
    "d2": {},
    "semdedup": {},
    "minhash": {},
    "caption_duplicates": {},
    "embedding_duplicates": {"min_cosine": 0.95},
}
BEFORE = {"density_pruning": ["clusters"], "caption_duplicates": ["minhash"]}  # stages whose columns it needs


def write_inputs(root: str, num_rows: int, dimensions: int) -> None:
    """None; the pool, its columns clip_image, clip_text, clip_score and source, and the files that filters name."""
    from safetensors.numpy import save_file

    path = write_pool(root, num_rows)
    rng = np.random.default_rng(0)
    directions = rng.normal(size=(DIRECTIONS, dimensions)).astype(np.float32)
    for shard in pool.load_shards(path):
        own = rng.integers(0, DIRECTIONS, shard.rows)
        image = _unit(directions[own] + 0.7 * rng.normal(size=(shard.rows, dimensions)).astype(np.float32))
        text = _unit(image + 0.3 * rng.normal(size=image.shape).astype(np.float32))
        columns = {
            "clip_image": vector_column(image.astype(np.float16)),
            "clip_text": vector_column(text.astype(np.float16)),
            "clip_score": pa.array((image * text).sum(axis=1)),
            "source": pa.array(np.where(own % 3, "web", "shop")),
        }
        table = pa.table(columns)
        data = pool.table_bytes(table, {pool.SHARD_DIGEST: shard.digest.encode()})
        storage.write_bytes(f"{root}/columns/{shard.name}.parquet", data)
    captions = pool.read_table(f"{path}/00000.parquet")["caption"].to_pylist()
    np.save(
        f"{root}/targets.npy", _unit(directions[rng.integers(0, 400, TARGETS)] + rng.normal(size=(TARGETS, dimensions)))
    )
    pathlib.Path(root, "short.txt").write_text(
        "\n".join(f"{caption[:20]} short {n}" for n, caption in enumerate(captions))
    )
    pathlib.Path(root, "long.txt").write_text(
        "\n".join(f"{caption} and more {n}" for n, caption in enumerate(captions))
    )
    words = [f"w{number}" for number in range(50_000)]
    pairs = (f"{words[a]} {words[b]}" for a, b in rng.integers(0, 50_000, (ENTRIES - len(words), 2)))
    pathlib.Path(root, "entries.txt").write_text("\n".join([*words, *pairs]))
    widths = (dimensions, 1024, 128, 64, 16, 1)
    layers = {}
    for number, (wide, narrow) in enumerate(itertools.pairwise(widths)):
        layers[f"layers.{number}.weight"] = rng.normal(size=(narrow, wide)).astype(np.float32) * 0.05
        layers[f"layers.{number}.bias"] = np.zeros(narrow, np.float32)
    save_file(layers, f"{root}/head.safetensors")


def _unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def run(root: str, name: str, num_rows: int) -> dict:
    """{rows, seconds, peak_mb} of one filter over the first shards, up to num_rows."""
    from pipeline.core.passes import Passes
    from stages import build_stage
    from stages.column_files import Column
    from stages.stage_worker import StageJob, StageWorker, fit, fit_path

    def here(function, items, names, on_done):
        for number, item in enumerate(items):
            on_done(number, function(*item))

    path = next(str(found) for found in pathlib.Path(root).glob("pool-*"))
    every = pool.load_shards(path)
    shards = every[: max(1, sum(np.cumsum([shard.rows for shard in every]) <= num_rows))]
    columns = {one: Column(f"{root}/columns", one) for one in ("clip_image", "clip_text", "clip_score", "source")}
    seconds = 0.0
    for one in [*BEFORE.get(name, []), name]:
        parameters = {key: _placed(root, value) for key, value in FILTERS[one].items()}
        stage = build_stage(one, parameters, one)
        job = StageJob(stage, f"{root}/out-{name}-{one}", {key: columns[key] for key in stage.needs if key in columns})
        start = time.process_time()
        if stage.whole_pool:
            fit(path, job, shards, Passes(here, fit_path(job) or "", lambda *_: None))
        worker = StageWorker(path, [job], "cpu", 1)
        for shard in shards:
            worker.process(shard)
        seconds = time.process_time() - start
        columns |= {column: Column(job.out_path, column) for column in stage.adds}
    return {"rows": sum(shard.rows for shard in shards), "seconds": seconds, "peak_mb": peak_mb()}


def peak_mb() -> float:
    """The most memory that this process has had; getrusage would start from its parent's."""
    line = next(line for line in pathlib.Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def _placed(root: str, value):
    """The value with the names of files made paths below the root."""
    if isinstance(value, dict):
        return {key: _placed(root, one) for key, one in value.items()}
    if isinstance(value, list):
        return [_placed(root, one) for one in value]
    return f"{root}/{value}" if isinstance(value, str) and value.endswith((".txt", ".npy", ".safetensors")) else value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", default=list(FILTERS))
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--dimensions", type=int, default=512)
    parser.add_argument("--one", help=argparse.SUPPRESS)  # a filter of the pool in this folder, in this process
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run(options.one, options.names[0], options.rows)))
        return 0
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    env |= dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")
    failed = 0
    with tempfile.TemporaryDirectory(prefix="winnow-") as root:
        write_inputs(root, options.rows, options.dimensions)
        print(f"{'filter':24}{'rows':>12}{'seconds':>10}{'us a row':>10}{'peak MB':>10}")
        for name in options.names:
            rows, growth = FEWER.get(name, (options.rows, ""))
            command = [sys.executable, __file__, name, "--one", root, "--rows", str(min(rows, options.rows))]
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                failed = 1
                print(f"{name:24} failed: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            found = json.loads(done.stdout.strip().splitlines()[-1])
            each_us = 1e6 * found["seconds"] / found["rows"]
            growth = f"   grows as {growth}" if growth and rows < options.rows else ""
            print(
                f"{name:24}{found['rows']:12,}{found['seconds']:10.1f}{each_us:10.1f}{found['peak_mb']:10.0f}{growth}",
                flush=True,
            )
    return failed


if __name__ == "__main__":
    sys.exit(main())
