"""Near-duplicate captions end to end: 0.1M, 1M and 10M synthetic captions, beside datasketch's MinHashLSH.

    python benchmarks/duplicates.py [--rows 100000 1000000 10000000] [--datasketch-rows 100000]

Ours: the stages minhash and caption_duplicates (Jaccard 0.7, verified exactly) over a pool of shards of 10,000 rows, on
a Ray of this machine, from captions to columns. datasketch's way: MinHash.bulk, MinHashLSH with the same bands, each
caption inserted and queried, candidates verified by exact Jaccard, groups by union-find; in one process, at the
size that it can hold. Captions: 13 words of a Zipf vocabulary of 50,000; one in ten an earlier caption with a word
changed, one in twenty an exact copy, one in twenty out of 50 boilerplates.

Each runs in processes of its own. Memory is the largest sum over its processes of private and shared memory, without
pages of mapped files, which the system takes back when it needs them.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import subprocess
import sys
import tempfile
import threading
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.compute as pc  # noqa: E402

from pipeline.core import artifact, pool, storage  # noqa: E402

SHARD_ROWS = 10_000
CHUNK_ROWS = 100_000
WORDS = 13
VOCABULARY = 50_000
BOILERPLATES = 50
THRESHOLD = 0.7
MAX_MEMORY_GB = 6.0


def captions(num_rows: int) -> pa.Array:
    """The first captions of a stream of chunks; near-duplicates stem from the same chunk."""
    words = pa.array([f"w{number}" for number in range(VOCABULARY)])
    boilerplate = pa.array([f"click here to see picture {number} of our shop" for number in range(BOILERPLATES)])
    chunks = []
    for number in range(-(-num_rows // CHUNK_ROWS)):
        rng = np.random.default_rng(number)
        ids = np.minimum(rng.zipf(1.2, (CHUNK_ROWS, WORDS)), VOCABULARY) - 1
        ids = (ids + rng.integers(0, 2, ids.shape) * rng.integers(0, VOCABULARY, ids.shape)) % VOCABULARY
        kind = rng.random(CHUNK_ROWS)
        kind[0] = 1
        earlier = (rng.random(CHUNK_ROWS) * np.arange(CHUNK_ROWS)).astype(np.int64)
        alike = kind < 0.15
        ids[alike] = ids[earlier[alike]]
        changed = np.flatnonzero(kind < 0.1)
        ids[changed, rng.integers(0, WORDS, len(changed))] = rng.integers(0, VOCABULARY, len(changed))
        offsets = pa.array(np.arange(CHUNK_ROWS + 1, dtype=np.int32) * WORDS)
        text = pc.binary_join(pa.ListArray.from_arrays(offsets, words.take(pa.array(ids.reshape(-1)))), " ")
        text = pc.if_else(
            pa.array(kind > 0.95), boilerplate.take(pa.array(rng.integers(0, BOILERPLATES, CHUNK_ROWS))), text
        )
        chunks.append(text)
    return pa.concat_arrays(chunks).slice(0, num_rows)


def write_pool(root: str, num_rows: int) -> str:
    """The path of a pool (without tars) of the captions."""
    made = artifact.Artifact(root, "pool", {"rows": num_rows})
    text = captions(num_rows)
    rng = np.random.default_rng(1)
    notes = {}
    for index, start in enumerate(range(0, num_rows, SHARD_ROWS)):
        part = text.slice(start, SHARD_ROWS)
        digits = np.frombuffer(b"0123456789abcdef", dtype="S1")[rng.integers(0, 16, (len(part), 32), dtype=np.uint8)]
        columns = {
            name: pa.nulls(len(part), kind) for name, kind in zip(pool.SCHEMA.names, pool.SCHEMA.types, strict=True)
        }
        columns["uid"] = pa.array(np.ascontiguousarray(digits).view("S32").reshape(-1)).cast(pa.string())
        columns["ok"] = pa.array(np.ones(len(part), dtype=bool))
        columns["caption"] = part
        name = f"{index:05d}.parquet"
        storage.write_bytes(storage.join(made.path, name), pool.table_bytes(pa.table(columns, schema=pool.SCHEMA)))
        notes[name] = {"rows": len(part)}
    artifact.finish(made, {}, file_notes=notes)
    return made.path


def run_ours(root: str, num_rows: int) -> dict:
    """{seconds of each part, groups, duplicates, bytes written}."""
    from pipeline.core.config import Resources
    from pipeline.core.engine import Engine
    from pipeline.core.passes import Passes
    from stages import build_stage
    from stages.column_files import Column
    from stages.stage_worker import StageJob, StageWorker, fit, fit_path

    path = next(str(found) for found in pathlib.Path(root).glob("pool-*"))
    shards = pool.load_shards(path)
    engine = Engine()
    resources = Resources()
    timings: dict[str, float] = {}
    passes: dict[str, float] = {}
    last = [time.perf_counter()]

    def run(function, items, names, on_done):
        engine.map(function, items, names, resources, on_done)
        spent, last[0] = time.perf_counter() - last[0], time.perf_counter()
        name = names[0].rpartition("/")[0].rstrip("0123456789")
        passes[name] = passes.get(name, 0) + spent

    def score(job: StageJob) -> None:
        start = time.perf_counter()
        names = [shard.name for shard in shards]
        engine.map_on_actors(StageWorker, (path, [job], "cpu", 1), [(shard,) for shard in shards], names, resources)
        timings[type(job.stage).__name__] = time.perf_counter() - start

    minhash = StageJob(build_stage("minhash", {}, ""), f"{root}/minhash")
    score(minhash)
    column = Column(minhash.out_path, "minhash_signature")
    job = StageJob(
        build_stage("caption_duplicates", {"threshold": THRESHOLD}, ""), f"{root}/duplicates", {column.name: column}
    )
    start = last[0] = time.perf_counter()
    facts = fit(path, job, shards, Passes(run, fit_path(job) or ""))
    timings["fit"] = time.perf_counter() - start
    score(job)
    engine.close()
    return {
        **{f"{name} s": round(seconds, 1) for name, seconds in {**timings, **passes}.items()},
        **{name: facts[name] for name in ("groups", "duplicates", "compared", "cut_buckets", "met", "bands")},
    }


def run_datasketch(root: str, num_rows: int) -> dict:
    """{groups, duplicates} of datasketch's LSH with the same bands."""
    from datasketch import MinHash, MinHashLSH

    from stages.duplicates.bands import choose_bands

    bands, rows = choose_bands(THRESHOLD, 128, 0.9)
    sets = [set(text.split()) for text in captions(num_rows).to_pylist()]
    signatures = MinHash.generator([[word.encode() for word in found] for found in sets], num_perm=128)
    lsh = MinHashLSH(num_perm=128, params=(bands, rows))
    parent = list(range(num_rows))

    def find(row: int) -> int:
        while parent[row] != row:
            parent[row] = parent[parent[row]]
            row = parent[row]
        return row

    for row, signature in enumerate(signatures):
        for other in lsh.query(signature):
            one, two = find(row), find(other)
            if one != two:
                shared = len(sets[row] & sets[other])
                if shared / (len(sets[row]) + len(sets[other]) - shared) >= THRESHOLD:
                    parent[max(one, two)] = min(one, two)
        lsh.insert(row, signature, check_duplication=False)
    roots = [find(row) for row in range(num_rows)]
    sizes = np.unique(roots, return_counts=True)[1]
    return {"groups": int((sizes > 1).sum()), "duplicates": int((sizes - 1).sum())}


def memory_gb(pid: int) -> float:
    """Private and shared memory of a process and all that it started, without mapped files."""
    parents = {}
    for entry in pathlib.Path("/proc").glob("[0-9]*"):
        try:
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
        except (OSError, ValueError):
            continue
    family = {pid}
    grown = True
    while grown:
        more = {child for child, parent in parents.items() if parent in family} - family
        grown = bool(more)
        family |= more
    total = 0
    for member in family:
        try:
            text = pathlib.Path(f"/proc/{member}/smaps_rollup").read_text()
        except OSError:
            continue
        for line in text.splitlines():
            if line.startswith(("Pss_Anon:", "Pss_Shmem:")):
                total += int(line.split()[1])
    return total * 1024 / 1e9


def measure(root: str, way: str, rows: int) -> dict:
    """What the run in processes of its own printed, with seconds and peak_gb."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, __file__, "--run", way, str(rows), root], stdout=subprocess.PIPE, text=True
    )
    peak = 0.0
    over = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.5):
            peak = max(peak, memory_gb(process.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    text = process.communicate()[0]
    over.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(f"{way} with {rows} rows failed")
    found = json.loads(text.splitlines()[-1])
    return {"seconds": round(time.perf_counter() - start, 1), "peak_gb": round(peak, 2), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000, 10_000_000])
    parser.add_argument("--datasketch-rows", type=int, default=100_000)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        way, rows, root = arguments.run
        print(json.dumps({"ours": run_ours, "datasketch": run_datasketch}[way](root, int(rows))))
        return
    results = {}
    for way, sizes in (("datasketch", [arguments.datasketch_rows]), ("ours", arguments.rows)):
        for rows in sizes:
            with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as root:
                if way == "ours":
                    write_pool(root, rows)
                found = results[f"{way} {rows}"] = measure(root, way, rows)
            rate = rows / found["seconds"]
            print(
                f"{way:11} {rows:>11,} captions {found['seconds']:8.1f} s {rate:9,.0f} captions/s  "
                f"{found['peak_gb']:.2f} GB  {found['groups']:,} groups, {found['duplicates']:,} duplicates"
            )
            print("   ", {key: value for key, value in found.items() if key.endswith(" s")}, flush=True)
    theirs = arguments.datasketch_rows / results[f"datasketch {arguments.datasketch_rows}"]["seconds"]
    for rows in arguments.rows:
        found = results[f"ours {rows}"]
        ratio = rows / found["seconds"] / theirs
        print(f"{rows:>11,}: {ratio:.1f} times datasketch's rate; peak {found['peak_gb']} GB (limit {MAX_MEMORY_GB})")
    print(json.dumps({"benchmark": "duplicates", **results}))


if __name__ == "__main__":
    main()
