"""DataComp's baselines over a synthetic table of 12.8M rows: the strategies beside DataComp's way of doing the same.

    python benchmarks/selection.py [--rows 12800000] [--only clip_score ...]

Ours: the strategies of configs/datacomp_small.yaml, through stages/selection/choose.py from shards of 100,000 rows as a
pool and its column artifacts store them. DataComp's way (baselines/apply_filter.py, with its rules vectorised over the
same columns): a whole score column concatenated and sorted for a fraction's threshold, then file by file the rules,
uids split by slicing, all concatenated, sorted and saved. Each runs in a process of its own, so that peak memory is its
own, and neither finds languages, words or clusters anew: those are columns on both sides.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from pipeline.core import artifact, config, pool, storage  # noqa: E402
from stages.column_files import Column  # noqa: E402
from stages.selection.choose import select  # noqa: E402
from stages.selection.strategies import parse_strategies  # noqa: E402

SHARD_ROWS = 100_000
CONFIG = ROOT / "configs" / "datacomp_small.yaml"
BASELINES = (
    "no_filter",
    "basic",
    "text_based",
    "image_based",
    "clip_score",
    "clip_score_b32",
    "image_based_and_clip_score",
    "laion2b",
)
COLUMNS = {  # stage -> {column: type}; `published` stands for what DataComp's metadata carries
    "image_stats": {"min_side_px": "int32", "aspect_ratio": "float32"},
    "caption_stats": {"caption_words": "int32", "caption_chars": "int32", "caption_tokens": "int32"},
    "language": {"language": "string"},
    "language_cld3": {"cld3_language": "string"},
    "imagenet_words": {"caption_imagenet_words": "int32"},
    "clusters": {"cluster_targets": "int64"},
    "published": {"clip_b32_similarity_score": "float32", "clip_l14_similarity_score": "float32"},
}
STAGE_OF = {column: stage for stage, types in COLUMNS.items() for column in types}
L14, B32 = "clip_l14_similarity_score", "clip_b32_similarity_score"
MAX_SECONDS = 60
MAX_MEMORY_GB = 2.0


def write_table(root: str, num_rows: int) -> None:
    """None; writes a pool (without tars) and the columns of COLUMNS."""
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
        languages = np.array(["en", "de", "fr", "es", "ru"])
        score = rng.normal(0.21, 0.06, rows)
        values = {
            "min_side_px": np.exp(rng.normal(5.6, 0.8, rows)).astype(np.int32) + 1,
            "aspect_ratio": (1 + rng.exponential(0.5, rows)).astype(np.float32),
            "caption_words": rng.poisson(8, rows).astype(np.int32),
            "caption_chars": rng.poisson(50, rows).astype(np.int32),
            "caption_tokens": rng.poisson(8, rows).astype(np.int32),
            "language": languages[np.minimum(rng.geometric(0.5, rows) - 1, 4)],
            "cld3_language": languages[np.minimum(rng.geometric(0.2, rows) - 1, 4)],
            "caption_imagenet_words": rng.poisson(0.7, rows).astype(np.int32),
            "cluster_targets": np.maximum(rng.integers(-20, 12, rows), 0),
            L14: score.astype(np.float32),
            B32: (score + rng.normal(0.04, 0.02, rows)).astype(np.float32),
        }
        captions = (values["language"] == "en") & (values["caption_tokens"] > 1) & (values["caption_chars"] > 5)
        for stage, names in COLUMNS.items():
            missing = failed | ~captions if stage == "clusters" else failed  # which works within caption_filter
            columns = {name: pa.array(values[name], mask=missing) for name in names}
            data = pool.table_bytes(pa.table({"uid": table["uid"], **columns}), digest)
            storage.write_bytes(storage.join(root, stage, f"{shard.name}.parquet"), data)


def run_ours(root: str, name: str) -> int:
    """Rows kept."""
    types = {column: kind for columns in COLUMNS.values() for column, kind in columns.items()}
    columns = {column: Column(f"{root}/{stage}", column) for column, stage in STAGE_OF.items()}
    strategies = parse_strategies(config.load(str(CONFIG)).strategies, "strategies", types)
    return select(pool_folder(root), columns, strategies, name, f"{root}/ours_{name}")["kept_rows"]


def run_datacomp_way(root: str, name: str) -> int:
    """Rows kept."""
    folder = pathlib.Path(pool_folder(root))
    shards = sorted(path.name for path in folder.glob("*.parquet"))

    def read(shard: str, columns: tuple[str, ...]) -> dict[str, np.ndarray]:
        """The columns of the rows that are ok: its metadata has no others."""
        ok = pq.read_table(folder / shard, columns=["ok"])["ok"].to_numpy()
        frame = {}
        for column in columns:
            path = folder / shard if column == "uid" else f"{root}/{STAGE_OF[column]}/{shard}"
            frame[column] = pq.read_table(path, columns=[column])[column].to_numpy()[ok]
        return frame

    rules: dict[str, tuple[tuple[str, ...], Callable[[dict], np.ndarray]]] = {
        "basic": (
            ("language", "caption_words", "caption_chars", "min_side_px", "aspect_ratio"),
            lambda f: (
                (f["language"] == "en")
                & ((f["caption_words"] > 2) & (f["caption_chars"] > 5))
                & ((f["min_side_px"] >= 200) & (f["aspect_ratio"] <= 3.0))
            ),
        ),
        "text_based": (
            ("language", "caption_imagenet_words"),
            lambda f: (f["language"] == "en") & (f["caption_imagenet_words"] > 0),
        ),
        "image_based": (
            ("language", "caption_tokens", "caption_chars", "cluster_targets"),
            lambda f: (
                (f["language"] == "en")
                & (f["caption_tokens"] > 1)
                & (f["caption_chars"] > 5)
                & (f["cluster_targets"] > 0)
            ),
        ),
        "laion2b": (("cld3_language",), lambda f: f["cld3_language"] == "en"),
    }
    key = B32 if name in ("clip_score_b32", "laion2b") else L14
    threshold = {"clip_score_b32": np.float32(0.281), "laion2b": np.float32(0.28)}.get(name)
    if name in ("clip_score", "image_based_and_clip_score"):
        scores = np.concatenate([read(shard, (key,))[key] for shard in shards])
        threshold = -np.sort(-scores)[int(len(scores) * 0.3)]
    needed, rule = rules.get(name.removesuffix("_and_clip_score"), ((), None))
    kept = []
    for shard in shards:
        frame = read(shard, ("uid", *needed, *((key,) if threshold is not None else ())))
        mask = np.ones(len(frame["uid"]), dtype=bool)
        if threshold is not None:
            mask &= frame[key] >= threshold
        if rule is not None:
            mask &= rule(frame)
        uids = frame["uid"][mask]
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
    parser.add_argument("--only", nargs="*", default=BASELINES, choices=BASELINES)
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
        for name in arguments.only:
            for way in ("ours", "datacomp_way"):
                found = results[f"{way} {name}"] = measure(root, way, name)
                print(
                    f"{name:26} {way:13} {found['seconds']:7.1f} s  {found['cpu_s']:7.1f} CPU s  "
                    f"{found['peak_gb']:.2f} GB  kept {found['kept']}",
                    flush=True,
                )
            ours, theirs = pathlib.Path(root) / f"ours_{name}" / "uids.npy", pathlib.Path(root) / f"theirs_{name}.npy"
            equal = ours.read_bytes() == theirs.read_bytes()
            found, other = results[f"ours {name}"], results[f"datacomp_way {name}"]
            ratio = results[f"ratio {name}"] = other["cpu_s"] / found["cpu_s"]
            is_met = found["seconds"] < MAX_SECONDS and found["peak_gb"] < MAX_MEMORY_GB
            print(f"{name:26} ratio {ratio:.2f} of CPU seconds  same uids: {equal}  within a minute and 2 GB: {is_met}")
            shutil.rmtree(ours.parent)
            theirs.unlink()
        print(json.dumps({"benchmark": "selection", "rows": arguments.rows, **results}))


if __name__ == "__main__":
    main()
