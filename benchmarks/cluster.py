"""What the layer on Ray costs: throughput over workers, time a shard beyond the stage's own, and S3 requests a shard.

    python benchmarks/cluster.py [--only throughput overhead requests] [--images 4000] [--shards 10000] [--rows 8]

throughput: a stage that decodes every image (hashes) and one of captions (caption_stats) over one pool, by 1 and by 2
workers, through the executor as a run does it; beside what a user would write, a ray.util.ActorPool whose actors read
a shard's tar with tarfile, compute the same columns, and write a parquet.

overhead: caption_stats over --shards shards of --rows rows, so that nearly all of the time is the layer's: CPU seconds
of driver, workers and Ray, and the wall time, of each shard beyond the first 20. Beside it the same number of calls
that do nothing, and an ActorPool that reads each shard's parquet, computes the same columns and writes a parquet. Then
what the driver does when all is finished (as `--plan` and a resumed run), the size of the records, and its peak memory.

requests: the same with a root on S3 (moto, on loopback), pool to train set, in two sizes: how many requests of which
operation a shard costs, by their difference, and what there is once, by the rest. Beside the stage: fsspec and pyarrow.
Steps run in this process, as requests are the same wherever they come from.

Each part runs in a process of its own, the first two on a Ray of their own.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import io
import itertools
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import tracemalloc
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from dataclasses import astuple, dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import fsspec  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from pipeline import execute, states  # noqa: E402
from pipeline import plan as planning  # noqa: E402
from pipeline.core import artifact, config, log, pool, storage  # noqa: E402
from pipeline.core.engine import Engine  # noqa: E402
from pipeline.runs import Outcome  # noqa: E402
from pipeline.steps import Plan  # noqa: E402
from stages import build_stage  # noqa: E402
from stages.base import Batch  # noqa: E402
from stages.ingest.shard_writer import ShardWriter  # noqa: E402
from stages.stage_worker import StageJob, StageWorker  # noqa: E402
from tests import servers  # noqa: E402
from tests.engine_fixture import EngineHere  # noqa: E402

EXPERIMENT = """
root: {root}
pool: {{source: {{layout: demo, pairs: {pairs}}}, shard_size: {rows}}}
recipes: {{none: {{model: ViT-B-32, samples_seen: 2, global_batch_size: 2, lr: 1.0e-3, warmup_steps: 0}}}}
stages: [hashes, caption_stats]
strategies:
  half: {{top: {{column: caption_chars, fraction: 0.5}}}}
  everything: {{}}
compare: [half, everything]
train: {{recipe: none}}
eval: {{root: demo, tasks: [colours]}}
cluster: {{hashes: {{workers: {workers}}}, caption_stats: {{workers: {workers}}}}}
"""
WORDS = "a photo of two small dogs running across the wet green field behind an old house near the sea"
PHOTOS = 64  # different ones; a pool repeats them
SHARD_IMAGES = 500
PLAIN_BATCH = 256
ROUNDS = 3
SAMPLE_SHARDS = 1000  # done in one process, to know what a worker does with one
REQUEST_SHARDS = 4, 12
REQUEST_STEPS = (
    "pool",
    "caption_stats",
    "hashes",
    "everything/selection",
    "half/selection",
    "half/train_set",
    "profile",
)
LOOK_EVERY_S = 0.5
FEW = 20  # shards, to take away what a step costs once
CLOCK_MS = ("wall_ms", "driver_ms", "ray_ms", "workers_ms")
PARTS = ("throughput", "overhead", "requests")
OPERATIONS = {  # of S3, by method and what is in the query
    "GET": {"list-type": "ListObjectsV2", "uploadId": "ListParts", "location": "GetBucketLocation", "": "GetObject"},
    "HEAD": {"": "HeadObject"},
    "PUT": {"partNumber": "UploadPart", "": "PutObject"},
    "POST": {"delete": "DeleteObjects", "uploads": "CreateMultipartUpload", "uploadId": "CompleteMultipartUpload"},
    "DELETE": {"": "DeleteObject"},
}


class PlainWorker:
    """What a user would write: an actor that reads a shard, computes a stage's columns, and writes them."""

    def __init__(self, stage_name: str | None, pool_path: str, out_path: str):
        self.stage = build_stage(stage_name, {}, stage_name) if stage_name else None
        self.pool_path, self.out_path = pool_path, out_path

    def process(self, name: str) -> None:
        """None; a worker without a stage does nothing."""
        if self.stage is None:
            return
        rows = pq.read_table(f"{self.pool_path}/{name}.parquet", columns=["uid", "caption"])
        captions = rows["caption"].to_pylist()
        found: dict[str, list] = {column: [] for column in self.stage.adds}
        size = PLAIN_BATCH if self.stage.reads == "pixels" else len(captions)
        photos = self._photos(name) if self.stage.reads == "pixels" else None
        for start in range(0, len(captions), size):
            part = captions[start : start + size]
            images = None if photos is None else list(itertools.islice(photos, len(part)))
            batch = Batch({"caption": part}, name, np.arange(start, start + len(part)), None, images)
            for column, values in self.stage.process(batch, None).items():
                found[column] += values
        pq.write_table(pa.table({"uid": rows["uid"], **found}), f"{self.out_path}/{name}.parquet", compression="zstd")

    def _photos(self, name: str) -> Iterator[Any]:
        from PIL import Image

        with tarfile.open(f"{self.pool_path}/{name}.tar") as archive:
            for member in archive:
                if member.name.endswith(".jpg"):
                    yield Image.open(archive.extractfile(member)).convert("RGB")


def experiment(folder: str, root: str, shards: int, rows: int, workers: int = 2) -> Plan:
    """The plan of EXPERIMENT, with a pool of this size."""
    path = os.path.join(folder, "experiment.yaml")
    pathlib.Path(path).write_text(EXPERIMENT.format(root=root, pairs=shards * rows, rows=rows, workers=workers))
    return planning.build(config.load(path), path)


def write_pool(plan: Plan, shards: int, rows: int, size_px: tuple[int, int]) -> str:
    """The path of the plan's pool, finished, with photographs of this size in place of its source's drawings."""
    made = states.resolve(plan)["pool"].artifact
    assert made is not None  # a pool waits for nothing
    rng = np.random.default_rng(0)
    photos = [_photo(rng, *size_px) for _ in range(min(PHOTOS, rows))]
    known = {}
    for index in range(shards):
        name = f"{index:05d}"
        with ShardWriter(made.path, name, {}) as writer:
            for row in range(rows):
                number, image = index * rows + row, photos[row % len(photos)]
                caption = " ".join(rng.choice(WORDS.split(), size=rng.integers(5, 26)))
                values = {"uid": f"{number * 0x9E3779B97F4A7C15 % 2**128:032x}", "key": f"{name}{row:06d}"}
                values |= {"caption": caption, "source": "", "ok": True, "image_format": "jpg"}
                values |= dict(zip(("width_px", "height_px"), size_px, strict=True))
                writer.add(values, image)
        known |= writer.facts["known"]
    notes = {name: {"rows": rows} for name in known if name.endswith(".parquet")}
    facts = {"rows": shards * rows, "ok_rows": shards * rows, "failed": {}, "columns": {}}
    artifact.finish(made, facts, file_notes=notes, known=known)
    return made.path


def _photo(rng: np.random.Generator, width_px: int, height_px: int) -> bytes:
    from PIL import Image

    coarse = rng.integers(0, 256, size=(24, 32, 3), dtype=np.uint8)
    data = io.BytesIO()
    Image.fromarray(coarse).resize((width_px, height_px), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
    return data.getvalue()


def run_step(plan: Plan, engine: Engine, name: str, run_path: str) -> Mapping[str, Any]:
    """The record's facts of a step that a run has just done, with what it needed."""
    executor = execute.Executor(plan, engine, log.Progress(), run_path)
    outcome = executor.run([name], Outcome(states.resolve(plan)))
    if outcome.failures:
        sys.exit(f"{name} failed: {outcome.failures}")
    return outcome.statuses[name].record["facts"]


def forget(plan: Plan, name: str) -> None:
    """None; the step is to be done again."""
    made = states.resolve(plan)[name].artifact
    assert made is not None
    storage.delete(made.path)


def run_plain(stage_name: str | None, pool_path: str, out_path: str, names: list[str], workers: int) -> None:
    """None; PlainWorkers have done the shards."""
    import ray
    from ray.util import ActorPool

    os.makedirs(out_path, exist_ok=True)
    worker = ray.remote(PlainWorker).options(num_cpus=1)
    actors = [worker.remote(stage_name, pool_path, out_path) for _ in range(workers)]
    for _ in ActorPool(actors).map_unordered(lambda actor, name: actor.process.remote(name), names):
        pass
    for actor in actors:
        ray.kill(actor)


@dataclass(frozen=True)
class Clock:
    """Seconds so far: wall time, and CPU time of this process, of Ray's own processes, and of its workers."""

    wall_s: float
    driver_s: float
    ray_s: float
    workers_s: float

    def __sub__(self, other: Clock) -> Clock:
        return Clock(*(mine - theirs for mine, theirs in zip(astuple(self), astuple(other), strict=True)))

    @property
    def cpu_s(self) -> float:
        return self.driver_s + self.ray_s + self.workers_s


class Meter:
    """Looks at this process's descendants twice a second: nobody tells the CPU time of those that have been killed."""

    def __init__(self) -> None:
        self._found: dict[tuple[str, str], tuple[bool, float]] = {}  # (id, start) -> (is it a worker, CPU seconds)
        self._own_s = 0.0  # of the looking itself
        self._lock = threading.Lock()
        threading.Thread(target=self._keep_looking, daemon=True).start()

    def clock(self) -> Clock:
        """The clock now."""
        self._look()
        times = list(self._found.values())
        ray_s, workers_s = (sum(spent for is_worker, spent in times if is_worker is which) for which in (False, True))
        return Clock(time.perf_counter(), time.process_time() - self._own_s, ray_s, workers_s)

    def _keep_looking(self) -> None:
        while True:
            time.sleep(LOOK_EVERY_S)
            self._look()

    def _look(self) -> None:
        with self._lock:
            started, parents, times = time.thread_time(), {}, {}
            for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
                with contextlib.suppress(OSError):
                    name, _, rest = path.read_text().partition(" (")[2].rpartition(") ")
                    fields = rest.split()
                    parents[path.parent.name] = fields[1]
                    seconds = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
                    times[path.parent.name, fields[19]] = (name.startswith("ray::"), seconds)
            mine = str(os.getpid())
            for process, start in times:
                above = parents[process]
                while above in parents and above != mine:
                    above = parents[above]
                if above == mine:
                    was_worker = self._found.get((process, start), (False, 0.0))[0]
                    is_worker, seconds = times[process, start]
                    self._found[process, start] = (is_worker or was_worker, seconds)
            self._own_s += time.thread_time() - started


def memory_mb() -> float:
    """This process's peak resident memory."""
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6


def throughput(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """Rows a second of both stages, by 1 and 2 workers, ours and plain."""
    shards = max(2, options.images // SHARD_IMAGES)
    root = os.path.join(folder, "root")
    pool_path = write_pool(experiment(folder, root, shards, SHARD_IMAGES), shards, SHARD_IMAGES, (512, 384))
    names = [shard.name for shard in pool.load_shards(pool_path)]
    engine, meter = Engine(), Meter()
    found: dict[str, Any] = {}
    try:
        for stage in ("hashes", "caption_stats"):
            for workers in (1, 2):
                plan = experiment(folder, root, shards, SHARD_IMAGES, workers)
                for number in range(-1, ROUNDS):  # the first round starts processes and is not counted
                    for way in ("ours", "plain"):
                        before = meter.clock()
                        if way == "ours":
                            run_step(plan, engine, stage, os.path.join(folder, "run"))
                            forget(plan, stage)
                        else:
                            run_plain(stage, pool_path, os.path.join(folder, "plain"), names, workers)
                        spent = meter.clock() - before
                        if number >= 0:
                            rate = found.setdefault(f"{stage} {way} {workers}", {"rows_per_s": [], "cpu_s": []})
                            rate["rows_per_s"].append(shards * SHARD_IMAGES / spent.wall_s)
                            rate["cpu_s"].append(spent.cpu_s)
    finally:
        engine.close()
    for stage in ("hashes", "caption_stats"):
        for way in ("ours", "plain"):
            one, two = (statistics.median(found[f"{stage} {way} {workers}"]["rows_per_s"]) for workers in (1, 2))
            cpu_s = statistics.median(found[f"{stage} {way} 1"]["cpu_s"])
            print(f"{stage:14} {way:6} {one:9.0f} rows/s by 1 worker, {two:9.0f} by 2 (x {two / one:.2f}); "
                  f"{cpu_s * 1e6 / (shards * SHARD_IMAGES):.0f} CPU s a million rows", flush=True)  # fmt: skip
        ratio = statistics.median(found[f"{stage} ours 2"]["rows_per_s"])
        ratio /= statistics.median(found[f"{stage} plain 2"]["rows_per_s"])
        print(f"{stage:14} ratio {ratio:.2f} of the plain rate, by 2 workers")
        found[f"{stage} ratio"] = ratio
    return found


def overhead(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a shard costs beyond the stage's own time, and the driver at rest."""
    shards, rows, workers = options.shards, options.rows, options.workers
    plans = {size: experiment(folder, os.path.join(folder, str(size)), size, rows, workers) for size in (FEW, shards)}
    pools = {size: write_pool(plan, size, rows, (32, 24)) for size, plan in plans.items()}
    plan, pool_path = plans[shards], pools[shards]
    plain_path = os.path.join(folder, "plain")
    names = {size: [shard.name for shard in pool.load_shards(path)] for size, path in pools.items()}
    engine, meter = Engine(), Meter()
    found: dict[str, Any] = {"driver_start_mb": memory_mb()}
    facts: dict[int, Mapping[str, Any]] = {}

    def ours(size: int) -> None:
        facts[size] = run_step(plans[size], engine, "caption_stats", os.path.join(folder, "run"))

    ways = {
        "calls that do nothing": lambda size: run_plain(None, pools[size], plain_path, names[size], workers),
        "plain": lambda size: run_plain("caption_stats", pools[size], plain_path, names[size], workers),
        "ours": ours,
    }
    try:
        run_plain(None, pool_path, plain_path, names[FEW], workers)  # starts processes
        for way, work in ways.items():
            spent = {}
            for size in (FEW, shards):
                before = meter.clock()
                work(size)
                spent[size] = meter.clock() - before
            more = astuple(spent[shards] - spent[FEW])
            found[way] = dict(zip(CLOCK_MS, (1e3 * seconds / (shards - FEW) for seconds in more), strict=True))
            found[way]["few_s"], found[way]["all_s"] = spent[FEW].wall_s, spent[shards].wall_s
            each = ", ".join(f"{name.removesuffix('_ms')} {found[way][name]:.2f}" for name in CLOCK_MS)
            print(
                f"{way:22} {spent[FEW].wall_s:6.1f} s for {FEW} shards, {spent[shards].wall_s:7.1f} s for {shards}; "
                f"each more, in ms: {each}",
                flush=True,
            )
    finally:
        engine.close()
    found["driver_mb"] = memory_mb()
    stage_ms = found["stage_ms"] = facts[shards]["cpu_hours"] * 3.6e6 / shards
    found["overhead_ms"] = found["ours"]["wall_ms"] * workers - stage_ms
    found["ratio"] = found["ours"]["wall_ms"] / found["plain"]["wall_ms"]
    cpu_ms = {way: sum(found[way][name] for name in CLOCK_MS[1:]) for way in ways}
    found["cpu_ratio"] = cpu_ms["ours"] / cpu_ms["plain"]
    print(f"the stage's own {stage_ms:.2f} ms a shard; beyond it {found['overhead_ms']:.2f} ms of a worker's time")
    print(f"ratio {found['ratio']:.2f} of plain's wall time, {found['cpu_ratio']:.2f} of its CPU time")

    some = pool.load_shards(pool_path)[:SAMPLE_SHARDS]
    stage = build_stage("caption_stats", {}, "caption_stats")
    worker = StageWorker(pool_path, [StageJob(stage, os.path.join(folder, "here"))], "cpu", 1)
    found["worker_here_ms"] = _ms(lambda: [worker.process(shard) for shard in some]) / len(some)
    os.makedirs(os.path.join(folder, "plain_here"))
    bare = PlainWorker("caption_stats", pool_path, os.path.join(folder, "plain_here"))
    found["plain_here_ms"] = _ms(lambda: [bare.process(shard.name) for shard in some]) / len(some)
    in_process = f"ours {found['worker_here_ms']:.2f} CPU ms a shard, plain {found['plain_here_ms']:.2f}"
    print(f"in one process, without Ray: {in_process}")

    statuses = states.resolve(plan)
    found["resolve_ms"] = _ms(lambda: states.resolve(plan)) / shards
    known = {name: status for name, status in statuses.items() if status.state == "done"}
    found["resolve_again_ms"] = _ms(lambda: states.resolve(plan, known)) / shards
    for name in ("pool", "caption_stats"):
        made = statuses[name].artifact
        found[f"{name}_record_bytes"] = storage.size_bytes(storage.join(made.path, artifact.RECORD)) / shards
        tracemalloc.start()
        record = made.record()
        found[f"{name}_record_held_bytes"] = tracemalloc.get_traced_memory()[0] / shards
        tracemalloc.stop()
        there = {file: {key: entry[key] for key in ("bytes", "sha256")} for file, entry in record["files"].items()}
        for what, known_files in (("known", there), ("hashed", None)):
            found[f"{name}_finish_{what}_ms"] = (
                _ms(lambda k=known_files, m=made, r=record: artifact.finish(m, r["facts"], known=k)) / shards
            )
    for name, value in found.items():
        if isinstance(value, float):
            print(f"{name:28} {value:10.3f}")
    return found


def _ms(work: Callable[[], Any]) -> float:
    """CPU milliseconds of this process."""
    before = time.process_time()
    work()
    return 1e3 * (time.process_time() - before)


class RequestLog:
    """What an S3 server of moto was asked, by its log."""

    def __init__(self, path: str):
        self.path = path
        self._read_bytes = 0

    def new(self) -> collections.Counter[str]:
        """{operation: requests} since this was asked last."""
        data = pathlib.Path(self.path).read_bytes()
        text, self._read_bytes = re.sub(r"\x1b\[\d+m", "", data[self._read_bytes :].decode()), len(data)
        found: collections.Counter[str] = collections.Counter()
        for method, address in re.findall(r'"([A-Z]+) (\S+) HTTP', text):
            query = urllib.parse.urlparse(address).query
            keys = [*urllib.parse.parse_qs(query, keep_blank_values=True), ""]
            names = OPERATIONS.get(method, {})
            found[next((names[key] for key in keys if key in names), method)] += 1
        return found


@contextlib.contextmanager
def counted_store(folder: str) -> Iterator[RequestLog]:
    """A server on loopback with a bucket `winnow`; the environment's credentials and endpoint are its own."""
    path = os.path.join(folder, "requests.log")
    with servers.s3_server(path) as address:
        os.environ |= {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "testing", "AWS_ENDPOINT_URL": address}
        os.environ |= {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true"}
        fsspec.filesystem("s3").mkdir("winnow")
        yield RequestLog(path)


def requests(folder: str, options: argparse.Namespace) -> dict[str, Any]:
    """{step: {operation: [requests a shard, requests once]}}."""
    small, large = REQUEST_SHARDS
    counts: dict[str, dict[int, collections.Counter[str]]] = collections.defaultdict(dict)
    with counted_store(folder) as asked:
        for shards in (small, large):
            plan = experiment(folder, f"s3://winnow/{shards}", shards, options.rows)
            for step in REQUEST_STEPS:
                statuses = states.resolve(plan)
                asked.new()
                executor = execute.Executor(plan, EngineHere(), log.Progress(), os.path.join(folder, "run"))
                outcome = executor.run([step], Outcome(statuses))
                if outcome.failures:
                    sys.exit(f"{step} failed: {outcome.failures}")
                counts[step][shards] = asked.new()
            states.resolve(plan)
            counts["--plan"][shards] = asked.new()
        made = outcome.statuses["pool"].artifact
        assert made is not None  # all steps came after it
        with fsspec.open(f"{made.path}/00000.parquet") as file:
            captions = pq.read_table(file, columns=["uid", "caption"])
        with fsspec.open("s3://winnow/plain/00000.parquet", "wb") as file:
            pq.write_table(captions, file)
        plain = asked.new()
    found: dict[str, Any] = {"plain stage": {operation: [float(count), 0.0] for operation, count in plain.items()}}
    for step, by_size in counts.items():
        found[step] = {}
        for operation in sorted(by_size[small] | by_size[large]):
            slope = (by_size[large][operation] - by_size[small][operation]) / (large - small)
            found[step][operation] = [slope, by_size[small][operation] - slope * small]
    for step, operations in found.items():
        told = ", ".join(f"{slope:.2f} {operation}" for operation, (slope, _) in operations.items() if slope)
        once = ", ".join(f"{count:.0f} {operation}" for operation, (_, count) in operations.items() if round(count))
        print(f"{step:20} a shard: {told or 'none'};  once: {once or 'none'}")
    ours = sum(slope for slope, _ in found["caption_stats"].values())
    ratio = found["ratio"] = ours / sum(plain.values())
    print(f"ratio {ratio:.2f} of a plain stage's requests a shard")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=PARTS, choices=PARTS)
    parser.add_argument("--images", type=int, default=4000)
    parser.add_argument("--shards", type=int, default=10_000)
    parser.add_argument("--rows", type=int, default=8, help="a shard, of overhead and requests")
    parser.add_argument("--workers", type=int, default=2, help="of overhead")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as folder:
            found = {"throughput": throughput, "overhead": overhead, "requests": requests}[options.part](
                folder, options
            )
        sizes = {"images": options.images, "shards": options.shards, "rows": options.rows, "workers": options.workers}
        print(json.dumps({"benchmark": f"cluster {options.part}", **sizes, **found}))
        return
    for part in options.only:  # each in a process of its own, as peak memory is a process's
        print(f"-- {part}", flush=True)
        subprocess.run([sys.executable, __file__, *sys.argv[1:], "--part", part], check=True)


if __name__ == "__main__":
    main()
