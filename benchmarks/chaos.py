"""Whether runs that lose machines at random end in the same artifacts as one that loses none.

    python benchmarks/chaos.py [--seeds 0:20] [--config tests/tiny.yaml] [--set KEY=VALUE ...] [--folder runs/chaos]

Each seed is a fresh Ray cluster on this machine, a head and three nodes of one CPU, and an empty prefix of a real S3
server (moto) as the root. `ray job submit` starts the run; while it works, nodes are killed (SIGKILL to all of their
processes at once) or preempted (Ray is told, then they end), and others join. Which, how and when is drawn from the
seed: the times are places in the run's own progress, in finished artifacts, and a pause after that. The head stays.

A seed is `equal` when the command exits 0, the artifacts and their files' sha256 are those of the same config on one
machine without a cluster, the counts in their records are the same and add up, the bucket holds no file that no record
lists and no upload that nobody ended, and no process outlives the cluster.

A line a seed is printed and kept in FOLDER/outcomes.jsonl: the same command goes on where it was stopped. Of seeds that
are not equal FOLDER/seedN.txt has the output and log.jsonl. Without --config, a tiny run: two minutes a seed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import pathlib
import random
import re
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

from tests.cluster_fixture import LocalCluster, ray_environment  # noqa: E402
from tests.servers import s3_server  # noqa: E402

RECORD = "_artifact.json"
TINY = "tests/tiny.yaml"
# Enough shards for three nodes, trainings of some seconds each, and their states on the store every second.
TINY_SETTINGS = ("pool.shard_size=20", "recipes.tiny.samples_seen=6000", "train.checkpoint_every_s=1")
NODES, MOST_NODES = 3, 4  # beside the head
COUNTS = (
    "rows", "ok_rows", "failed", "source_rows", "sampled_out_rows", "pool_rows", "kept_rows", "kept_samples", "funnel",
    "num_samples", "samples_seen", "steps", "unique_uids", "max_repeats", "images", "value", "tasks", "flagged",
)  # fmt: skip # of an artifact's facts: the same whatever happened
RUN_WITHIN_S = 1800


@dataclass(frozen=True)
class Made:
    """What is in a root: {artifact: {file: sha256}}, and {artifact: its counts}."""

    files: dict[str, dict[str, str]]
    counts: dict[str, dict[str, Any]]


@dataclass
class Outcome:
    """What one seed came to. `hit`: {step: how often a node was lost that had it in hand}."""

    seed: int
    what: str  # the config and its settings
    seconds: float = 0.0
    kills: int = 0
    drains: int = 0
    adds: int = 0
    hit: dict[str, int] = field(default_factory=dict)
    retries: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)  # why it is not equal

    def line(self) -> str:
        """What is printed of it."""
        hit = ", ".join(f"{step} x{count}" if count > 1 else step for step, count in sorted(self.hit.items()))
        retries = ", ".join(f"{count} {cause}" for cause, count in sorted(self.retries.items()))
        counts = f"{self.kills} killed, {self.drains} drained, {self.adds} added"
        verdict = "equal" if not self.faults else "NOT EQUAL: " + "; ".join(self.faults)
        return (
            f"seed {self.seed}: {self.seconds:.0f} s, {counts}; hit: {hit or 'nothing'}; "
            f"{sum(self.retries.values())} retries{f' ({retries})' if retries else ''}; {verdict}"
        )


class Store:
    """A bucket of an S3 server at an endpoint."""

    def __init__(self, endpoint: str, bucket: str):
        import boto3

        self.environment = {
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": endpoint,
            "AWS_EC2_METADATA_DISABLED": "true",
        }
        secrets = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
        self._client = boto3.client("s3", endpoint_url=endpoint, **secrets)
        self._bucket = bucket
        self._client.create_bucket(Bucket=bucket)

    def url(self, prefix: str) -> str:
        """The root of a run."""
        return f"s3://{self._bucket}/{prefix}"

    def keys(self, prefix: str) -> list[str]:
        """The keys below the prefix, relative to it."""
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=f"{prefix}/")
        return [entry["Key"][len(prefix) + 1 :] for page in pages for entry in page.get("Contents", [])]

    def read(self, prefix: str, key: str) -> bytes:
        """The object's bytes."""
        return self._client.get_object(Bucket=self._bucket, Key=f"{prefix}/{key}")["Body"].read()

    def write(self, prefix: str, key: str, data: bytes) -> None:
        """None; puts an object there."""
        self._client.put_object(Bucket=self._bucket, Key=f"{prefix}/{key}", Body=data)

    def uploads(self, prefix: str) -> list[str]:
        """The keys of uploads in parts that nobody ended."""
        found = self._client.list_multipart_uploads(Bucket=self._bucket, Prefix=f"{prefix}/").get("Uploads", [])
        return [upload["Key"] for upload in found]

    def delete(self, prefix: str) -> None:
        """None; removes all below the prefix."""
        for key in self.keys(prefix):
            self._client.delete_object(Bucket=self._bucket, Key=f"{prefix}/{key}")


class Chaos(threading.Thread):
    """Takes nodes away from a cluster and adds others while a run works, as the seed says, until `stop`."""

    def __init__(self, cluster: LocalCluster, store: Store, prefix: str, num_artifacts: int, outcome: Outcome):
        super().__init__(name="chaos", daemon=True)
        self._cluster, self._store, self._prefix = cluster, store, prefix
        self._random, self._outcome = random.Random(outcome.seed), outcome
        losses = self._random.randint(3, 6)
        self._places = sorted(self._random.uniform(0.3, num_artifacts) for _ in range(losses))
        self._leaving: set[str] = set()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """None; nothing more happens to the cluster when this returns."""
        self._stopped.set()
        self.join()

    def run(self) -> None:
        try:
            for place in self._places:
                self._wait_for_progress(place)
                self._pause(6)
                if self._stopped.is_set():
                    return
                self._lose_node()
                alone = not self._staying()
                if alone or self._random.random() < 0.7:
                    self._pause(8)
                    self._add_node()
        except Exception:  # it fails the seed, with its traceback
            if not self._stopped.is_set():
                self._outcome.faults.append(f"the chaos broke: {traceback.format_exc()}")

    def _staying(self) -> list[str]:
        return [name for name in self._cluster.worker_names() if name not in self._leaving]

    def _wait_for_progress(self, place: float) -> None:
        while not self._stopped.wait(0.3):
            if sum(key.endswith(f"/{RECORD}") for key in self._store.keys(self._prefix)) >= int(place):
                return
            if not self._staying():  # Ray held the last one for dead
                self._add_node()

    def _pause(self, most_s: float) -> None:
        self._stopped.wait(self._random.uniform(0, most_s))

    def _lose_node(self) -> None:
        names = sorted(set(self._staying()) & set(self._cluster.nodes()))
        drain, deadline_s = self._random.random() < 0.35, self._random.uniform(1, 8)
        if not names:
            return
        name = self._random.choice(names)
        for step in _steps_on(self._cluster, name):
            self._outcome.hit[step] = self._outcome.hit.get(step, 0) + 1
        if drain:
            self._leaving.add(name)
            self._cluster.preempt_node(name, deadline_s, wait=False)
            self._outcome.drains += 1
        else:
            self._cluster.kill_node(name)
            self._outcome.kills += 1

    def _add_node(self) -> None:
        if not self._stopped.is_set() and len(self._cluster.worker_names()) < MOST_NODES:
            self._cluster.add_node()
            self._outcome.adds += 1


def _steps_on(cluster: LocalCluster, name: str) -> set[str]:
    """The steps that workers of the node have in hand: Ray writes the names of tasks into the titles of processes."""
    found = set()
    for pid in cluster.processes(name):
        with contextlib.suppress(OSError):
            title = pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            match = re.match(r"ray::(?!IDLE|[A-Z_])(\S+)", title)
            if match:
                found.add(re.sub(r"/\d{5}$", "", match.group(1)))
    return found


def made_in_folder(root: pathlib.Path) -> Made:
    """What a finished run left in a local root."""
    records = {path.parent.name: json.loads(path.read_text()) for path in root.glob(f"*/{RECORD}")}
    return _made(records)


def _made(records: Mapping[str, Mapping[str, Any]]) -> Made:
    return Made(
        {
            name: {file: entry["sha256"] for file, entry in record["files"].items() if not entry.get("fact")}
            for name, record in records.items()
        },
        {
            name: {count: record["facts"][count] for count in COUNTS if count in record["facts"]}
            for name, record in records.items()
        },
    )


def run_alone(config: str, settings: Sequence[str], root: pathlib.Path) -> Made:
    """What the config gives on one machine without a cluster."""
    command = [sys.executable, "pipeline/run.py", *_arguments(config, settings, str(root))]
    done = subprocess.run(command, cwd=ROOT, env=ray_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return made_in_folder(root)


def _arguments(config: str, settings: Sequence[str], root: str) -> list[str]:
    return ["--config", config, *(word for each in (f"root={root}", *settings) for word in ("--set", each))]


def run_seed(seed: int, config: str, settings: Sequence[str], expected: Made, store: Store, folder: str) -> Outcome:
    """What came of the config on a cluster that loses nodes as the seed says."""
    prefix = f"seed{seed}"
    outcome = Outcome(seed, " ".join([config, *settings]))
    store.delete(prefix)  # of an earlier try
    started = time.monotonic()
    text = ""
    try:
        with LocalCluster(workers=NODES, env=store.environment) as cluster:
            job = cluster.start_job(*_arguments(config, settings, store.url(prefix)))
            chaos = Chaos(cluster, store, prefix, len(expected.files), outcome)
            chaos.start()
            try:
                output, errors = job.communicate(timeout=RUN_WITHIN_S)
                text = output + errors
                if job.returncode:
                    outcome.faults.append(f"exit code {job.returncode}")
            except subprocess.TimeoutExpired:
                job.kill()
                output, errors = job.communicate()
                text = output + errors
                outcome.faults.append(f"it did not end within {RUN_WITHIN_S} s")
            finally:
                chaos.stop()
    except (AssertionError, TimeoutError) as error:  # the cluster did not start, or left processes
        outcome.faults.append(str(error))
    outcome.seconds = round(time.monotonic() - started, 1)
    logs = [store.read(prefix, key).decode() for key in store.keys(prefix) if key.endswith("/log.jsonl")]
    events = [json.loads(line) for log in logs for line in log.splitlines()]
    causes = (re.split("[:,]", event["cause"], maxsplit=1)[0] for event in events if event["event"] == "retry")
    outcome.retries = dict(Counter(causes))
    outcome.faults += differences(expected, store, prefix)
    if outcome.faults:
        pathlib.Path(folder, f"{prefix}.txt").write_text(f"{outcome.line()}\n\n{text}\n\n{''.join(logs)}")
    else:
        store.delete(prefix)
    return outcome


def differences(expected: Made, store: Store, prefix: str) -> list[str]:
    """How what is below the prefix differs from what was expected; [] where it does not."""
    keys = set(store.keys(prefix))
    records = {key.partition("/")[0]: json.loads(store.read(prefix, key)) for key in keys if key.endswith(f"/{RECORD}")}
    found, faults = _made(records), []
    for name in sorted(expected.files.keys() | found.files.keys()):
        if expected.files.get(name) != found.files.get(name):
            is_where = "missing" if name not in found.files else "new" if name not in expected.files else "other files"
            faults.append(f"{name}: {is_where}")
        elif expected.counts[name] != found.counts[name]:
            faults.append(f"{name}: counts {found.counts[name]}, expected {expected.counts[name]}")
    for name, counts in found.counts.items():
        if (
            "ok_rows" in counts
            and "failed" in counts
            and counts["rows"] != counts["ok_rows"] + sum(counts["failed"].values())
        ):
            faults.append(f"{name}: {counts} do not add up")
    listed = {f"{name}/{file}" for name, record in records.items() for file in (*record["files"], RECORD)}
    stray = sorted(key for key in keys - listed if not key.startswith("runs/"))
    faults += [f"{len(stray)} files in no record: {', '.join(stray[:5])}"] if stray else []
    uploads = store.uploads(prefix)
    return faults + ([f"uploads that nobody ended: {', '.join(uploads[:5])}"] if uploads else [])


def expected_of(config: str, settings: Sequence[str], folder: pathlib.Path) -> Made:
    """As `run_alone`, which is done once for a folder."""
    digest = hashlib.sha256(json.dumps([(ROOT / config).read_text(), list(settings)]).encode()).hexdigest()[:12]
    root = folder / f"alone-{digest}"
    kept = folder / f"alone-{digest}.json"
    if not kept.exists():
        started = time.monotonic()
        kept.write_text(json.dumps(asdict(run_alone(config, settings, root))))
        print(f"alone: {time.monotonic() - started:.0f} s", flush=True)
    return Made(**json.loads(kept.read_text()))


def main(arguments: Sequence[str]) -> int:
    """0 when all seeds were equal."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", default="0:1", help="FIRST:END, END not included")
    parser.add_argument("--config", help="another config than the tiny one")
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--folder", default="runs/chaos", type=pathlib.Path)
    options = parser.parse_args(arguments)
    config = options.config or TINY
    settings = [*(() if options.config else TINY_SETTINGS), *options.settings]
    first, end = (int(number) for number in options.seeds.split(":"))
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "outcomes.jsonl"
    kept = [Outcome(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    outcomes = {each.seed: each for each in kept if each.what == " ".join([config, *settings]) and not each.faults}
    expected = expected_of(config, settings, folder)
    with s3_server() as endpoint:
        store = Store(endpoint, "chaos")
        for seed in range(first, end):
            if seed not in outcomes:
                outcomes[seed] = run_seed(seed, config, settings, expected, store, str(folder))
                with path.open("a") as file:
                    file.write(json.dumps(asdict(outcomes[seed])) + "\n")
            print(outcomes[seed].line(), flush=True)
    chosen = [outcomes[seed] for seed in range(first, end)]
    print(total_line(chosen))
    return int(any(each.faults for each in chosen))


def total_line(outcomes: Sequence[Outcome]) -> str:
    """What is printed of all seeds."""
    equal = sum(not each.faults for each in outcomes)
    hit = sum((Counter(each.hit) for each in outcomes), Counter())
    trainings = sum(count for step, count in hit.items() if step.endswith("/train") or step.startswith("model/"))
    losses = f"{sum(each.kills for each in outcomes)} nodes killed, {sum(each.drains for each in outcomes)} drained"
    retries = sum(sum(each.retries.values()) for each in outcomes)
    return (
        f"{equal} of {len(outcomes)} equal; {losses}, {sum(each.adds for each in outcomes)} added; "
        f"{sum(hit.values())} steps hit, {trainings} of them trainings; {retries} retries; "
        f"{sum(each.seconds for each in outcomes):.0f} s"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
