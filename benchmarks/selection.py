"""Selection over a synthetic table of 12.8M rows, beside DataComp's way of doing the same.

    python benchmarks/selection.py [--rows 12800000]

Ours: clip_top30, and basic AND clip_top30, through stages/selection/choose.py from shards of 100,000 rows as a pool and
its column artifacts store them. DataComp's way (baselines/apply_filter.py, with its rules vectorised): a whole score
column concatenated and sorted for the threshold, then shard by shard the comparisons, uids split by slicing, all
concatenated, sorted and saved. Each runs in a process of its own, so that peak memory is its own.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from pipeline.core import artifact, pool, storage  # noqa: E402
from stages.column_files import Column  # noqa: E402
from stages.selection.choose import select  # noqa: E402
from stages.selection.strategies import parse_strategies  # noqa: E402

SHARD_ROWS = 100_000
COLUMNS = {
    "image_stats": ("min_side_px", "aspect_ratio"),
    "caption_stats": ("caption_words", "caption_chars"),
    "language": ("language",),
    "clip": ("clip_score",),
}
BASIC = ["caption_words > 2", "caption_chars > 5", "min_side_px >= 200", "aspect_ratio <= 3", "language == en"]
STRATEGIES = {
    "basic": {"where": BASIC},
    "clip_top30": {"top": {"column": "clip_score", "fraction": 0.3, "cut": "datacomp"}},
    "basic_and_clip": {"all_of": ["basic", "clip_top30"]},
}
MAX_MEMORY_GB = 2.0


def write_table(root: str, num_rows: int) -> None:
    """None; writes a pool (without tars) and the columns of four stages."""
    rng = np.random.default_rng(0)
    made = artifact.Artifact(root, "pool", {"rows": num_rows})
    sizes = [min(SHARD_ROWS, num_rows - start) for start in range(0, num_rows, SHARD_ROWS)]
    for index, rows in enumerate(sizes):
        digits = np.frombuffer(b"0123456789abcdef", dtype="S1")[rng.integers(0, 16, size=(rows, 32), dtype=np.uint8)]
        columns = {name: pa.nulls(rows, kind) for name, kind in zip(pool.SCHEMA.names, pool.SCHEMA.types, strict=True)}
        columns["uid"] = pa.array(np.ascontiguousarray(digits).view("S32").reshape(-1)).cast(pa.string())
        columns["ok"] = pa.array(rng.random(rows) < 0.98)
        table = pa.table(columns, schema=pool.SCHEMA)
        storage.write_bytes(storage.join(made.path, f"{index:05d}.parquet"), pool.table_bytes(table))
    artifact.finish(made, {}, file_notes={f"{index:05d}.parquet": {"rows": rows} for index, rows in enumerate(sizes)})
    for shard in pool.load_shards(made.path):
        rows, digest = shard.rows, {pool.SHARD_DIGEST: shard.digest.encode()}
        table = pool.read_rows(made.path, shard.name, ["uid", "ok"])
        failed = ~np.asarray(table["ok"].combine_chunks())
        score = rng.normal(0.21, 0.06, rows).astype(np.float32)
        values = {
            "min_side_px": np.exp(rng.normal(5.6, 0.8, rows)).astype(np.int32) + 1,
            "aspect_ratio": (1 + rng.exponential(0.5, rows)).astype(np.float32),
            "caption_words": rng.poisson(8, rows).astype(np.int32),
            "caption_chars": rng.poisson(50, rows).astype(np.int32),
            "language": np.array(["en", "de", "fr", "es", "ru"])[np.minimum(rng.geometric(0.5, rows) - 1, 4)],
            "clip_score": score,
        }
        for stage, names in COLUMNS.items():
            columns = {name: pa.array(values[name], mask=failed) for name in names}
            data = pool.table_bytes(pa.table({"uid": table["uid"], **columns}), digest)
            storage.write_bytes(storage.join(root, stage, f"{shard.name}.parquet"), data)


def run_ours(root: str, name: str) -> int:
    """Rows kept."""
    types = {
        "min_side_px": "int32",
        "aspect_ratio": "float32",
        "caption_words": "int32",
        "caption_chars": "int32",
        "language": "string",
        "clip_score": "float32",
    }
    columns = {column: Column(f"{root}/{stage}", column) for stage, names in COLUMNS.items() for column in names}
    strategies = parse_strategies(STRATEGIES, "strategies", types)
    return select(pool_folder(root), columns, strategies, name, f"{root}/ours_{name}")["kept_rows"]


def run_datacomp_way(root: str, name: str) -> int:
    """Rows kept."""
    folder = pathlib.Path(pool_folder(root))
    shards = sorted(path.name for path in folder.glob("*.parquet"))
    needed = COLUMNS if name != "clip_top30" else {"clip": COLUMNS["clip"]}

    def read(shard: str, stages: dict) -> dict[str, np.ndarray]:
        frame = {}
        for stage, names in stages.items():
            frame |= {name: column.to_numpy() for name, column in columns_of(f"{root}/{stage}/{shard}", names).items()}
        return frame

    def columns_of(path: str, names: tuple) -> dict[str, pa.ChunkedArray]:
        table = pq.read_table(path, columns=list(names))
        return {column: table[column] for column in names}

    scores = []
    for shard in shards:
        ok = columns_of(f"{folder}/{shard}", ("ok",))["ok"].to_numpy()
        scores.append(read(shard, {"clip": COLUMNS["clip"]})["clip_score"][ok])  # its metadata has ok rows only
    scores = np.concatenate(scores)
    threshold = -np.sort(-scores)[int(len(scores) * 0.3)]
    kept = []
    for shard in shards:
        pool_columns = columns_of(f"{folder}/{shard}", ("uid", "ok"))
        frame = read(shard, needed)
        mask = pool_columns["ok"].to_numpy() & (frame["clip_score"] >= threshold)
        if name != "clip_top30":
            mask &= (frame["caption_words"] > 2) & (frame["caption_chars"] > 5) & (frame["language"] == "en")
            mask &= (frame["min_side_px"] >= 200) & (frame["aspect_ratio"] <= 3.0)
        uids = pool_columns["uid"].to_numpy()[mask]
        kept.append(np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8")))
    result = np.concatenate(kept)
    result.sort()
    np.save(f"{root}/theirs_{name}.npy", result)
    return len(result)


def pool_folder(root: str) -> str:
    """The pool's folder below the root."""
    return str(next(pathlib.Path(root).glob("pool-*")))


def peak_gb() -> float:
    """This process's peak resident memory. (getrusage's would include what the parent had before the exec.)"""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e9


def measure(root: str, way: str, name: str) -> dict:
    """{seconds, cpu_s, peak_gb, kept} of one run in a process of its own."""
    command = [sys.executable, __file__, "--run", way, name, root]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=12_800_000)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        way, name, root = arguments.run
        start, cpu = time.perf_counter(), time.process_time()
        kept = {"ours": run_ours, "datacomp_way": run_datacomp_way}[way](root, name)
        found = {"seconds": time.perf_counter() - start, "cpu_s": time.process_time() - cpu}
        print(json.dumps({**found, "peak_gb": peak_gb(), "kept": kept}))
        return
    with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as root:
        write_table(root, arguments.rows)
        results = {}
        for name in ("clip_top30", "basic_and_clip"):
            for way in ("ours", "datacomp_way"):
                found = results[f"{way} {name}"] = measure(root, way, name)
                print(
                    f"{name:15} {way:13} {found['seconds']:7.1f} s  {found['cpu_s']:7.1f} CPU s  "
                    f"{found['peak_gb']:.2f} GB  kept {found['kept']}"
                )
            ours = (pathlib.Path(root) / f"ours_{name}" / "uids.npy").read_bytes()
            equal = ours == (pathlib.Path(root) / f"theirs_{name}.npy").read_bytes()
            ratio = results[f"datacomp_way {name}"]["seconds"] / results[f"ours {name}"]["seconds"]
            peak = results[f"ours {name}"]["peak_gb"]
            print(f"{name:15} ratio {ratio:.2f}  same uids: {equal}  peak {peak:.2f} GB (limit {MAX_MEMORY_GB:.0f} GB)")
            results[f"ratio {name}"] = ratio
        print(json.dumps({"benchmark": "selection", "rows": arguments.rows, **results}))


if __name__ == "__main__":
    main()
