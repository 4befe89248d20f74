"""The catalogue of faults that a run meets: what happens when, what the user sees, and what is lost.

A fault is a function that does it to a run of winnow under way: a real command, on a real Ray, with real files. Those of
one scene are done to one run, in the order in which they stand here; tests/test_cluster_faults.py plays the scenes and
holds each row to its word. `python -m tests.cluster_faults > docs/cluster_faults.md` writes the page.

What is done again is in the run's `log.jsonl` as it happens (`log:` below, with the item and the cause), and its sum is printed at
the end: `again    11 items (its worker died: 9, MemoryError: 1, OSError: 1)`. `...` stands for what differs from run to run (names of files, times, addresses).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests import fault_points, s3_faults
from tests.cluster_fixture import RAY, LocalCluster, ray_environment, wait_for
from tests.fault_points import Point

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = "_artifact.json"
NO_RAY = "error: Ray did not start on this machine"  # within 30 s, which Ray does not let one set
# Twelve shards, one stage, two trainings of ten steps: every kind of step, in seconds.
SETTINGS = {
    "pool.shard_size": "20",
    "models": "{}",
    "references": "{}",
    "stages": "[caption_stats]",
    "strategies": "{all: {}, worded: {where: [caption_words > 2]}}",
    "compare": "[all, worded]",
    "eval.tasks": "[colours]",
}


@dataclass(frozen=True)
class Fault:
    """A row of the table. `test` proves it: a scene of test_cluster_faults.py, or a test elsewhere.

    `sees` are lines that are printed, `again` is what the run's log says of an item that is done again. `exit_code` is
    that of the run in which it happens; after another one than 0 the same command finishes.
    """

    name: str
    kind: str
    when: str
    sees: tuple[str, ...]
    lost: str
    test: str
    exit_code: int = 0
    again: str = ""
    points: tuple[Point, ...] = ()
    inject: Callable[[Run], None] | None = None


FAULTS: dict[str, Fault] = {}


def fault(
    scene: str, kind: str, when: str, *sees: str, lost: str, points: Sequence[Point] = (), **more: Any
) -> Callable:
    """A decorator that enters a function in FAULTS under its own name, as a fault of the scene."""

    def enter(inject: Callable[[Run], None]) -> Callable:
        test = f"test_cluster_faults.py::test_{scene}"
        FAULTS[inject.__name__] = Fault(
            inject.__name__, kind, when, sees, lost, test, points=tuple(points), inject=inject, **more
        )
        return inject

    return enter


def shown_by(test: str, name: str, kind: str, when: str, *sees: str, lost: str, **more: Any) -> None:
    """None; enters a fault that a test elsewhere shows."""
    FAULTS[name] = Fault(name, kind, when, sees, lost, test, **more)


def of_scene(scene: str) -> list[Fault]:
    """The faults of a scene, in their order."""
    return [row for row in FAULTS.values() if row.test == f"test_cluster_faults.py::test_{scene}" and row.inject]


class Run:
    """Commands of winnow on one root, one after the other, with faults at the points that are set.

    Args:
        folder: an empty one, for the root and the output.
        cluster: of `cluster_with`, to connect to; None: winnow starts a Ray of its own.
        root: where not `folder/root`.
        env: of the commands, and of a Ray that they start.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        cluster: LocalCluster | None = None,
        root: str | None = None,
        env: Mapping[str, str] | None = None,
    ):
        self.folder, self.cluster = folder, cluster
        self.root = root or str(folder / "root")
        self.env = dict(env or {})
        self.store: s3_faults.FaultyStore | None = None
        self.process: Any = None  # of the newest command
        self._started: list[subprocess.Popen] = []
        self._others: list[subprocess.Popen] = []
        self._own_points = folder / "points"

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def arguments(self) -> list[str]:
        """The command line, as a user gives it."""
        settings = SETTINGS | {"root": self.root}
        given = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
        return ["pipeline/run.py", "--config", "tests/tiny.yaml", *given]

    @property
    def points_folder(self) -> str:
        """Where the points are: the cluster's, or those of the Ray that winnow starts."""
        if self.cluster is not None:
            return self.cluster.environment["PYTHONPATH"]
        if not self._own_points.exists():
            self._own_points.mkdir()
            fault_points.put(str(self._own_points), [])
        return str(self._own_points)

    def set_points(self, points: Sequence[Point]) -> None:
        """None; what the next command, and the workers that Ray starts for it, will meet."""
        fault_points.write(self.points_folder, points)

    def start(self, job: str = "") -> None:
        """None; starts the command; `job`: as a Ray job of this name."""
        self._job = job
        command = [sys.executable, *self.arguments]
        env = ray_environment(PYTHONPATH=self.points_folder)
        if self.cluster is not None and not job:
            env = dict(self.cluster.environment)
        if job:
            submit = [RAY, "job", "submit", "--address", self.cluster.dashboard, "--submission-id", job]
            command = [*submit, "--working-dir", ".", "--", "python", *self.arguments]
        with open(self._output(len(self._started)), "wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env | self.env,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
            )
        self._started.append(self.process)

    def waits(self, name: str, number: int = 0) -> int:
        """The process that met the point as the `number`-th."""

        def look() -> int | None:
            found = fault_points.pid_at(self.points_folder, name, number)
            if not found and self.is_over():
                raise AssertionError(f"the run ended with {self.process.returncode} before {name}:\n{self.output()}")
            return found

        return wait_for(look, f"{name}, number {number}")

    def signal(self, name: str, sign: int, number: int = 0) -> None:
        """None; the process that met the point as the `number`-th gets the signal."""
        os.kill(self.waits(name, number), sign)

    def release(self, name: str) -> None:
        """None; who waits at the point goes on."""
        fault_points.release(self.points_folder, name)

    def fill(self, node_id: str) -> None:
        """None; another driver fills the node's object store, until the run is ended."""
        command = [sys.executable, "-c", FILL, self.cluster.address, node_id]
        filler = subprocess.Popen(
            command, env=ray_environment(), stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self._others.append(filler)
        assert int(filler.stdout.readline()) > 60_000_000

    def wait(self) -> int:
        """The exit code, once the command has ended."""
        wait_for(self.is_over, "the end of the run", 1200)
        return self.process.returncode

    def output(self, back: int = 0) -> str:
        """What the newest command has printed so far, or the one so many before it."""
        return self._output(len(self._started) - 1 - back).read_text(errors="replace")

    def finish(self) -> str:
        """The output of the same command, given once more and undisturbed, which must end well."""
        self.set_points([])
        self.start()
        assert self.wait() == 0, self.output()
        return self.output()

    def end(self) -> None:
        """None; ends the processes of all commands, and of the Rays that they started."""
        for process in [*self._started, *self._others]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        mark = str(self.folder).encode()
        for path in pathlib.Path("/proc").glob("[0-9]*/environ"):
            with contextlib.suppress(OSError):
                if mark in path.read_bytes() and int(path.parent.name) != os.getpid() and self.cluster is None:
                    os.kill(int(path.parent.name), signal.SIGKILL)

    def artifacts(self) -> dict[str, dict[str, str]]:
        """{artifact: {file: sha256}} of what is finished below the root, by hashing what is there; records must agree.

        Files that hold measurements (times) are left out.
        """
        found = {}
        for record in sorted(self._files().glob(f"*/{RECORD}")):
            entries = json.loads(record.read_text())["files"]
            sums = {name: hashlib.sha256((record.parent / name).read_bytes()).hexdigest() for name in entries}
            assert sums == {name: entry["sha256"] for name, entry in entries.items()}, record
            found[record.parent.name] = {name: sums[name] for name, entry in entries.items() if not entry.get("fact")}
        return found

    def again(self) -> str:
        """`item: cause` of what the newest run's log says was done again, a line each."""
        log = sorted(self._files().glob("runs/*/log.jsonl"))[-1].read_text().splitlines()
        found = [json.loads(line) for line in log]
        return "\n".join(f"{line['item']}: {line['cause']}" for line in found if line["event"] == "retry")

    def strays(self) -> list[str]:
        """Files of artifacts that their records do not list, artifacts without a record, and temporary files."""
        root, found = self._files(), []
        for folder in sorted(root.glob("*-*")):
            record = folder / RECORD
            listed = set(json.loads(record.read_text())["files"]) if record.exists() else set()
            there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} - {RECORD}
            found += [f"{folder.name}/{name}" for name in sorted(there - listed)]
        return found + [str(path.relative_to(root)) for path in sorted(root.rglob("*.tmp-*"))]

    def _files(self) -> pathlib.Path:
        """The root, or a copy of one on a store."""
        if "://" not in self.root:
            return pathlib.Path(self.root)
        import fsspec

        copy = self.folder / "copy"
        shutil.rmtree(copy, ignore_errors=True)
        store = fsspec.filesystem("s3")
        store.invalidate_cache()
        store.get(self.root, str(copy), recursive=True)
        return copy

    def is_over(self) -> bool:
        """Whether the newest command has ended; one that ended as this machine is too busy for Ray is given again."""
        if self.process.poll() is None:
            return False
        if NO_RAY in self.output():
            self.start(self._job)
            return False
        return True

    def _output(self, number: int) -> pathlib.Path:
        return self.folder / f"output{number}"


def seen(pattern: str, output: str) -> bool:
    """Whether a line of the output is like the pattern, in which `...` stands for anything."""
    parts = (re.escape(part) for part in pattern.split("..."))
    return re.search(rf"(?m)^{'.*'.join(parts)}$", output) is not None


# One worker after the other: each fault is another item's, so that none has more than the tries it is given.

STAGE = "stages.score_shard:score_shard"


@fault(
    "workers",
    "worker",
    "SIGKILL while it writes a shard of the pool",
    again="pool/00003: its worker died",
    lost="nothing: the shard is written again, its half-written files are removed",
    points=[Point("pool_writer_killed", "pipeline.core.tars:TarWriter.add", "'00003000010.")],
)
def pool_writer_killed(run: Run) -> None:
    run.signal("pool_writer_killed", signal.SIGKILL)


@fault(
    "workers",
    "worker",
    "SIGKILL while it loads a stage",
    lost="nothing: another worker is started",
    again=".../start: its worker died",
    points=[Point("worker_killed_while_loading", "stages.stage_worker:StageWorker.__init__")],
)
def worker_killed_while_loading(run: Run) -> None:
    run.signal("worker_killed_while_loading", signal.SIGKILL)


@fault(
    "workers",
    "worker",
    "SIGKILL in a stage",
    again="caption_stats/00000: its worker died",
    lost="nothing: the shard in hand is done again",
    points=[Point("stage_worker_killed", STAGE, "name='00000'")],
)
def stage_worker_killed(run: Run) -> None:
    run.signal("stage_worker_killed", signal.SIGKILL)


@fault(
    "workers",
    "worker",
    "SIGTERM in a stage",
    again="caption_stats/00001: its worker died",
    lost="nothing: the shard in hand is done again",
    points=[Point("stage_worker_terminated", STAGE, "name='00001'")],
)
def stage_worker_terminated(run: Run) -> None:
    run.signal("stage_worker_terminated", signal.SIGTERM)


@fault(
    "workers",
    "worker",
    "SIGSEGV in a stage (a bug in a native library)",
    again="caption_stats/00002: its worker died",
    lost="nothing: the shard in hand is done again",
    points=[Point("stage_worker_segfault", STAGE, "name='00002'")],
)
def stage_worker_segfault(run: Run) -> None:
    run.signal("stage_worker_segfault", signal.SIGSEGV)


@fault(
    "workers",
    "worker",
    "frozen (SIGSTOP) in a stage, and killed after a while",
    again="caption_stats/00003: its worker died",
    lost="nothing: the shard in hand is done again",
    points=[Point("stage_worker_frozen", STAGE, "name='00003'")],
)
def stage_worker_frozen(run: Run) -> None:
    run.signal("stage_worker_frozen", signal.SIGSTOP)
    time.sleep(2)
    run.signal("stage_worker_frozen", signal.SIGKILL)


@fault(
    "workers",
    "memory",
    "MemoryError in a stage",
    again="caption_stats/00004: MemoryError: made by a test",
    lost="nothing: the shard is done again",
    points=[Point("memory_error", STAGE, "name='00004'", do="MemoryError")],
)
def memory_error(run: Run) -> None:
    run.waits("memory_error")


@fault(
    "workers",
    "store",
    "an OSError in a stage (a hiccup of a network drive)",
    again="caption_stats/00005: OSError: made by a test",
    lost="nothing: the shard is done again",
    points=[Point("os_error", STAGE, "name='00005'", do="OSError")],
)
def os_error(run: Run) -> None:
    run.waits("os_error")


@fault(
    "workers",
    "worker",
    "SIGKILL while a strategy chooses",
    again=".../selection: its worker died",
    lost="nothing: the selection is made again",
    points=[Point("selection_killed", "stages.selection.choose:select")],
)
def selection_killed(run: Run) -> None:
    run.signal("selection_killed", signal.SIGKILL)


@fault(
    "workers",
    "worker",
    "SIGKILL while a train set's tar is written",
    again=".../train_set/00000: its worker died",
    lost="nothing: the tar is written again",
    points=[Point("train_set_writer_killed", "stages.selection.train_set:_read_image")],
)
def train_set_writer_killed(run: Run) -> None:
    run.signal("train_set_writer_killed", signal.SIGKILL)


@fault(
    "workers",
    "worker",
    "SIGKILL in a training, at step 5 of 10",
    again=".../seed0/train: its worker died",
    lost="the steps since the newest step checkpoint, done again to the same weights",
    points=[Point("training_killed", "pipeline.core.engine:post", "'step': 5,")],
)
def training_killed(run: Run) -> None:
    run.signal("training_killed", signal.SIGKILL)


@fault(
    "workers",
    "worker",
    "SIGKILL in an evaluation",
    again=".../seed0/eval/colours: its worker died",
    lost="nothing: the checkpoint's tasks are evaluated again",
    points=[Point("evaluation_killed", "eval.zero_shot:predict")],
)
def evaluation_killed(run: Run) -> None:
    run.signal("evaluation_killed", signal.SIGKILL)


# A worker that dies at the same item every time.


@fault(
    "poison",
    "worker",
    "SIGKILL at the same shard, every time (an image that crashes a decoder)",
    exit_code=1,
    again="caption_stats/00002: its worker died",
    lost="nothing: the other strategy is compared, its row alone is missing; without the shard's fault the same command finishes",
    points=[Point("poisoned_shard", STAGE, "name='00002'", do="SIGKILL", times=99)],
)
def poisoned_shard(run: Run) -> None:
    run.waits("poisoned_shard", 2)


# Nodes of a cluster, one after the other; for each that is lost another one joins.


TIMES = 9  # that a point may be met: who waits there may be lost to an earlier fault and come again


def cluster_with(folder: pathlib.Path, env: Mapping[str, str] = {}, **options: Any) -> LocalCluster:
    """A new cluster whose processes meet the points of the folder, which is made; none are set yet."""
    folder.mkdir()
    env = fault_points.put(str(folder), []) | dict(env)
    return LocalCluster(env=env, **options)


def node_at(run: Run, name: str) -> str:
    """The node one of whose processes waits at the point."""

    def look() -> str | None:
        assert not run.is_over(), f"the run ended before {name}:\n{run.output()}"
        waiting = {fault_points.pid_at(run.points_folder, name, number) for number in range(TIMES)}
        nodes = run.cluster.worker_names()
        return next((node for node in nodes if waiting & set(run.cluster.processes(node))), None)

    return wait_for(look, name)


def raylet_of(run: Run, node: str) -> int:
    """The process of a node that is its raylet."""
    for pid in run.cluster.processes(node):
        with contextlib.suppress(OSError):
            if pathlib.Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].endswith(b"/raylet"):
                return pid
    raise AssertionError(f"no raylet in {node}")


@fault(
    "nodes",
    "node",
    "a node joins in the middle of a stage",
    lost="nothing: it is used from then on",
    points=[Point("held", STAGE, "name='00000'"), Point("node_joins", STAGE, "name='00001'")],
)
def node_joins(run: Run) -> None:
    before = node_at(run, "held")
    joined = run.cluster.add_node()
    assert before != joined == node_at(run, "node_joins")
    run.release("held")
    run.release("node_joins")


@fault(
    "nodes",
    "node",
    "SIGKILL to all of a node's processes, in a stage",
    again="caption_stats/00002: its machine was lost",
    lost="nothing: the shard in hand is done again",
    points=[Point("node_killed", STAGE, "name='00002'")],
)
def node_killed(run: Run) -> None:
    run.cluster.kill_node(node_at(run, "node_killed"))
    run.cluster.add_node()


@fault(
    "nodes",
    "node",
    "SIGKILL to the raylet alone, in a stage",
    again="caption_stats/00003: its machine was lost",
    lost="nothing: the shard in hand is done again",
    points=[Point("raylet_killed", STAGE, "name='00003'")],
)
def raylet_killed(run: Run) -> None:
    node = node_at(run, "raylet_killed")
    os.kill(raylet_of(run, node), signal.SIGKILL)
    run.cluster.add_node()
    wait_for(lambda: node not in run.cluster.nodes(), f"the death of {node}")
    run.cluster.kill_node(node)


@fault(
    "nodes",
    "node",
    "SIGTERM to a node (`ray start`), in a stage",
    again="caption_stats/00004: its machine was lost",
    lost="nothing: the shard in hand is done again",
    points=[Point("node_terminated", STAGE, "name='00004'")],
)
def node_terminated(run: Run) -> None:
    node = node_at(run, "node_terminated")
    os.kill(run.cluster.processes(node)[0], signal.SIGTERM)
    run.cluster.add_node()
    wait_for(lambda: node not in run.cluster.nodes(), f"the death of {node}")
    run.cluster.kill_node(node)


@fault(
    "nodes",
    "node",
    "preempted (Ray is told, with a deadline) in a stage, ended at the deadline",
    lost="nothing: the shard in hand is finished, and no other is begun there",
    points=[Point("node_preempted", STAGE, "name='00005'")],
)
def node_preempted(run: Run) -> None:
    node = node_at(run, "node_preempted")
    run.cluster.preempt_node(node, 60, wait=False)
    time.sleep(5)  # long enough for the run to know of it
    run.release("node_preempted")
    run.cluster.add_node()
    wait_for(lambda: node not in run.cluster.worker_names(), f"the end of {node}")


@fault(
    "nodes",
    "node",
    "the raylet is silent for 8 s (SIGSTOP, SIGCONT; a network that comes back), in a stage",
    lost="nothing, not even time",
    points=[Point("raylet_silent", STAGE, "name='00006'")],
)
def raylet_silent(run: Run) -> None:
    raylet = raylet_of(run, node_at(run, "raylet_silent"))
    os.kill(raylet, signal.SIGSTOP)
    time.sleep(8)
    os.kill(raylet, signal.SIGCONT)
    run.release("raylet_silent")


@fault(
    "nodes",
    "node",
    "a node is silent for good (SIGSTOP; a network that does not come back), in a stage",
    again="caption_stats/00007: its machine was lost",
    lost="nothing: the shard in hand is done again, once Ray gives the node up",
    points=[Point("node_frozen", STAGE, "name='00007'")],
)
def node_frozen(run: Run) -> None:
    node = node_at(run, "node_frozen")
    run.cluster.freeze_node(node)
    run.cluster.add_node()
    wait_for(lambda: node not in run.cluster.nodes(), f"the death of {node}")
    run.cluster.kill_node(node)


@fault(
    "nodes",
    "node",
    "SIGKILL to all nodes that can do work, in a stage; others come once the run says that it waits",
    "...  waits for a machine with 1 CPU, and there is none",
    again="caption_stats/00008: its machine was lost",
    lost="nothing: the shards in hand are done again",
    points=[Point("all_nodes_killed", STAGE, "name='00008'")],
)
def all_nodes_killed(run: Run) -> None:
    run.waits("all_nodes_killed")
    for node in run.cluster.worker_names():
        run.cluster.kill_node(node)
    wait_for(lambda: "waits for a machine" in run.output() or run.is_over(), "that it says so")
    run.cluster.add_node()
    run.cluster.add_node()


@fault(
    "nodes",
    "node",
    "SIGKILL to all of a node's processes, in a training, at step 5 of 10",
    again=".../seed0/train: its machine was lost",
    lost="the steps since the newest step checkpoint, done again to the same weights",
    points=[Point("node_killed_in_training", "pipeline.core.engine:post", "'step': 5,", times=TIMES)],
)
def node_killed_in_training(run: Run) -> None:
    run.cluster.kill_node(node_at(run, "node_killed_in_training"))
    run.release("node_killed_in_training")
    run.cluster.add_node()


@fault(
    "nodes",
    "node",
    "SIGKILL to all of a node's processes, in an evaluation",
    again=".../seed0/eval/colours: its machine was lost",
    lost="nothing: the checkpoint's tasks are evaluated again",
    points=[Point("node_killed_in_evaluation", "eval.zero_shot:predict", times=TIMES)],
)
def node_killed_in_evaluation(run: Run) -> None:
    run.cluster.kill_node(node_at(run, "node_killed_in_evaluation"))
    run.release("node_killed_in_evaluation")
    run.cluster.add_node()


# Memory. Ray's monitor looks at the whole machine: the threshold is put above what is used when the run starts.

MONITOR = {"RAY_memory_monitor_refresh_ms": "100"}


def memory_threshold(room_gb: float) -> str:
    """The fraction of the machine's memory that is used now, and so much more."""
    sizes = {}
    for line in pathlib.Path("/proc/meminfo").read_text().splitlines():
        name, _, value = line.partition(":")
        sizes[name] = int(value.split()[0]) / 2**20
    return f"{(sizes['MemTotal'] - sizes['MemAvailable'] + room_gb) / sizes['MemTotal']:.4f}"


@fault(
    "out_of_memory",
    "memory",
    "a stage takes ever more memory, until Ray's monitor kills its worker",
    again="caption_stats/00002: its worker was killed as the machine had too little memory, expected more memory_gb for it",
    lost="nothing: the shard in hand is done again",
    points=[Point("out_of_memory", STAGE, "name='00002'", do="allocate")],
)
def out_of_memory(run: Run) -> None:
    run.waits("out_of_memory")


# A node whose object store is full to the last byte, and whose disk takes nothing more for it.

STORE_IS_FULL = {"RAY_local_fs_capacity_threshold": "0.0001"}
FILL = """
import sys, time
import numpy, ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

@ray.remote(num_cpus=0)
class Holder:
    def __init__(self):
        self.held = []

    def fill(self):
        size = 8 << 20
        while size > 64 << 10:
            try:
                self.held.append(ray.put(numpy.ones(size, "u1")))
            except ray.exceptions.RayError:
                size //= 2
        return sum(len(ray.get(ref)) for ref in self.held)

ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
place = NodeAffinitySchedulingStrategy(sys.argv[2], soft=False)
holder = Holder.options(scheduling_strategy=place).remote()
print(ray.get(holder.fill.remote()), flush=True)
time.sleep(3600)
"""


@fault(
    "object_store",
    "memory",
    "another job fills a node's object store, and the disk has no room to spill it",
    lost="nothing: what winnow sends between processes is small, rows and images are in files",
    points=[Point("object_store_full", STAGE, "name='00001'")],
)
def object_store_full(run: Run) -> None:
    node = node_at(run, "object_store_full")
    run.fill(run.cluster.nodes()[node])
    run.release("object_store_full")


# The driver: commands on one root of one cluster, each ended in its own way; the next one goes on.


def end_driver(run: Run, sign: int) -> None:
    """None; the driver gets the signal, and has ended when this returns."""
    os.kill(run.process.pid, sign)
    run.wait()


@fault(
    "driver",
    "driver",
    "SIGKILL in a stage, on a cluster that lives on",
    exit_code=-9,
    lost="the shards in hand",
    points=[Point("driver_killed", STAGE, "name='00001'")],
)
def driver_killed(run: Run) -> None:
    run.start()
    worker = run.waits("driver_killed")
    end_driver(run, signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{worker}"), "the end of its workers")


@fault(
    "driver",
    "driver",
    "SIGTERM in a stage (a spot machine, a queue's time limit)",
    "stopped; the same command goes on where it stopped",
    exit_code=143,
    lost="the shards in hand",
    points=[Point("driver_terminated", STAGE, "name='00003'")],
)
def driver_terminated(run: Run) -> None:
    run.start()
    run.waits("driver_terminated")
    end_driver(run, signal.SIGTERM)


@fault(
    "driver",
    "driver",
    "Ctrl-C twice in a stage",
    "stopped; the same command goes on where it stopped",
    exit_code=130,
    lost="the shards in hand",
    points=[Point("interrupted_twice", STAGE, "name='00005'")],
)
def interrupted_twice(run: Run) -> None:
    run.start()
    run.waits("interrupted_twice")
    os.kill(run.process.pid, signal.SIGINT)
    time.sleep(0.3)
    with contextlib.suppress(ProcessLookupError):
        os.kill(run.process.pid, signal.SIGINT)
    run.wait()


@fault(
    "driver",
    "driver",
    "`ray job stop` in a stage",
    "...Job 'stopped' was stopped...",
    lost="the shards in hand",
    points=[Point("job_stopped", STAGE, "name='00007'")],
)
def job_stopped(run: Run) -> None:
    run.start(job="stopped")
    run.waits("job_stopped")
    stop = [RAY, "job", "stop", "--address", run.cluster.dashboard, "stopped"]
    subprocess.run(stop, env=ray_environment(), check=True, capture_output=True, timeout=300)
    run.wait()


@fault(
    "driver",
    "driver",
    "SIGKILL in a training, at step 5 of 10",
    exit_code=-9,
    lost="the steps since the newest step checkpoint, done again to the same weights",
    points=[Point("driver_killed_in_training", "pipeline.core.engine:post", "'step': 5,")],
)
def driver_killed_in_training(run: Run) -> None:
    run.start()
    run.waits("driver_killed_in_training")
    end_driver(run, signal.SIGKILL)


@fault(
    "driver",
    "driver",
    "two commands of the same config on the same root at once",
    lost="nothing: both do the same work, and write the same bytes",
)
def two_at_once(run: Run) -> None:
    run.start()
    first = run.process
    run.start()
    assert first.wait(1200) == 0, run.output(1)
    assert run.wait() == 0, run.output()


@fault(
    "driver",
    "driver",
    "SIGKILL while the report is written",
    exit_code=-9,
    lost="the report alone; nothing else is done again",
    points=[Point("killed_in_report", "pipeline.report.selections:write_report")],
)
def killed_in_report(run: Run) -> None:
    run.start()
    run.waits("killed_in_report")
    end_driver(run, signal.SIGKILL)


@fault(
    "head",
    "node",
    "SIGKILL to the head node, in a training; a new cluster is started",
    "...Failed to connect to GCS within 60 seconds. GCS may have been killed....",
    exit_code=1,
    lost="the steps since the newest step checkpoint, done again to the same weights",
    points=[Point("head_killed", "pipeline.core.engine:post", "'step': 5,")],
)
def head_killed(run: Run) -> None:
    run.waits("head_killed")
    run.cluster.kill_node("head")


# The store: a proxy before a real S3 server.


def answer_all(run: Run, kind: str, times: int) -> None:
    """None; the next so many requests get this answer."""
    rule = run.store.add(s3_faults.Fault(kind, times=times))
    wait_for(lambda: run.store.injected[kind] == times or run.is_over(), f"{times} requests")
    run.store.remove(rule)


@fault(
    "store",
    "store",
    "S3 throttles: the first 20 requests get 503 SlowDown",
    "s3://... too many requests (HTTP 503 SlowDown); trying again for 120 s",
    lost="nothing",
)
def store_throttles(run: Run) -> None:
    answer_all(run, "slow_down_503", 20)


@fault(
    "store",
    "store",
    "the store finds the machine's clock wrong for a while: five requests get 403 RequestTimeTooSkewed",
    lost="nothing",
)
def clock_skewed(run: Run) -> None:
    answer_all(run, "skewed_403", 5)


@fault(
    "store",
    "store",
    "S3 answers every tenth request with 500, throughout",
    lost="nothing",
)
def store_errs(run: Run) -> None:
    run.store.add(s3_faults.Fault("internal_500", every=10, first=7, times=None))


@fault(
    "store",
    "store",
    "every 23rd connection is reset without an answer, throughout",
    lost="nothing",
)
def store_resets(run: Run) -> None:
    run.store.add(s3_faults.Fault("reset", every=23, times=None))


@fault(
    "store",
    "store",
    "every ninth body that is read is cut in half, throughout",
    "s3://... can't be read yet: the body came short; trying again for 120 s",
    lost="nothing",
)
def store_cuts(run: Run) -> None:
    run.store.add(s3_faults.Fault("body_cut", operation="get", every=9, times=None))


@fault(
    "store",
    "store",
    "a request is never answered, twice",
    lost="nothing",
)
def store_hangs(run: Run) -> None:
    run.store.add(s3_faults.Fault("hang", first=31, every=40, times=2))


@fault(
    "store",
    "store",
    "a write is done, and its answer is lost, three times",
    lost="nothing",
)
def store_answer_lost(run: Run) -> None:
    run.store.add(s3_faults.Fault("answer_lost", operation="put", first=5, every=6, times=3))


def store_refuses(name: str, kind: str, when: str, key: str, *sees: str, lost: str) -> None:
    """None; enters a fault: from the first write of such a key on, the store gives every request the same answer."""

    def inject(run: Run) -> None:
        run.start()
        wait_for(lambda: run.store.requests("put", key) or run.is_over(), f"a write of {key}")
        rule = run.store.add(s3_faults.Fault(kind, times=None))
        run.wait()
        run.store.remove(rule)

    inject.__name__ = name
    fault("store_refuses", "store", when, *sees, lost=lost, exit_code=1)(inject)


store_refuses(
    "credentials_expired",
    "expired_400",
    "the credentials expire, in a stage",
    "*/caption_stats-*.parquet",
    "...s3://... can't be ...: the credentials have expired; fresh ones go where these came from (AWS_SESSION_TOKEN, ...)...",
    lost="the shards in hand",
)
store_refuses(
    "access_denied",
    "denied_403",
    "the right to write is taken away, in a training",
    "*/checkpoint-*/step_*",
    "...s3://... can't be ...: these credentials may not do that; winnow needs ...",
    lost="the steps since the newest step checkpoint, done again to the same weights",
)
store_refuses(
    "bucket_gone",
    "no_bucket_404",
    "the bucket is gone (and comes back), in an evaluation",
    "*/results-*/*",
    "...s3://... can't be ...: there is no such bucket at this endpoint; create it, or see AWS_ENDPOINT_URL...",
    lost="the evaluations in hand",
)


# A disk, and files that are not as they were left.


def mounted(*options: str) -> None:
    subprocess.run(["mount", *options], check=True, capture_output=True)


@fault(
    "disk",
    "store",
    "the disk of a local root is full, in a stage (other programs' files)",
    "...can't be written: No space left on device...",
    exit_code=1,
    lost="the shards in hand",
    points=[Point("disk_full", STAGE, "name='00003'")],
)
def disk_full(run: Run) -> None:
    run.start()
    run.waits("disk_full")
    filler = pathlib.Path(run.root).parent / "filler"
    with contextlib.suppress(OSError), open(filler, "wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    run.release("disk_full")
    run.wait()
    filler.unlink()


@fault(
    "disk",
    "store",
    "a local root becomes read-only, in a stage",
    "...can't be written: Read-only file system...",
    exit_code=1,
    lost="the shards in hand",
    points=[Point("root_read_only", STAGE, "name='00004'")],
)
def root_read_only(run: Run) -> None:
    run.start()
    run.waits("root_read_only")
    disk = str(pathlib.Path(run.root).parent)
    mounted("-o", "remount,ro", disk)
    run.release("root_read_only")
    run.wait()
    mounted("-o", "remount,rw", disk)


@fault(
    "files",
    "files",
    "a half-written temporary file of a killed process is in an unfinished artifact",
    lost="nothing: the file is removed",
    points=[Point("killed", STAGE, "name='00004'")],
)
def half_written_file(run: Run) -> None:
    run.start()
    run.waits("killed")
    end_driver(run, signal.SIGKILL)
    (folder,) = pathlib.Path(run.root).glob("caption_stats-*")
    (folder / "00007.parquet.tmp-0badcafe").write_bytes(b"PAR1")
    run.start()
    run.wait()


@fault(
    "files",
    "files",
    "a file that is none of ours is in an unfinished artifact (`.nfs...`, `.DS_Store`)",
    lost="nothing: it is no part of the artifact",
)
def stray_file(run: Run) -> None:
    strays = []
    for folder in pathlib.Path(run.root).glob("results-*"):
        (folder / RECORD).unlink()
        strays.append(folder / ".nfs000000000000002a00000001")
        strays[-1].write_bytes(b"mine")
    run.start()
    run.wait()
    for path in strays:
        path.unlink()


@fault(
    "files",
    "files",
    "a file of a finished artifact was cut short by something else",
    "FAILED  .../seed0/train: .../train_set-.../00000.tar: 20,000 bytes, expected ... bytes as when it was finished: "
    "remove .../train_set-..., and the same command makes it again",
    exit_code=1,
    lost="the artifact: once its folder is removed, the same command makes it again",
)
def truncated_file(run: Run) -> None:
    root = pathlib.Path(run.root)
    for folder in [*root.glob("results-*"), *root.glob("checkpoint-*")]:
        shutil.rmtree(folder)
    spoilt = sorted(root.glob("train_set-*"))[0]
    with open(spoilt / "00000.tar", "r+b") as file:
        file.truncate(20000)
    run.start()
    run.wait()
    shutil.rmtree(spoilt)


# What tests elsewhere show.

shown_by(
    "test_training_on_ray.py::test_lost_workers_and_a_lost_node_change_nothing",
    "training_of_several_workers",
    "worker",
    "a training on two workers loses one (SIGKILL), then a node for good (`min_workers: 1`)",
    lost="the steps since the newest step checkpoint; one worker ends what two began, to rounding",
)
shown_by(
    "test_training_on_ray.py::test_a_machine_that_is_told_to_go_saves_a_state_first",
    "preempted_in_training",
    "node",
    "preempted (Ray is told, with a deadline) in a training",
    lost="nothing: a step checkpoint is written at once, and the training goes on from it elsewhere",
)
shown_by(
    "test_training_on_ray.py::test_a_preempted_node_of_two_workers_saves_a_state_first",
    "preempted_with_several_workers",
    "node",
    "one of the two nodes of a training is preempted",
    lost="nothing: a step checkpoint is written at once, and the training goes on from it",
)
shown_by(
    "test_training_on_ray.py::test_a_killed_driver_and_a_final_error_leave_step_checkpoints_only",
    "driver_of_several_workers",
    "driver",
    "SIGKILL to the driver, in a training on two workers",
    lost="the steps since the newest step checkpoint",
    exit_code=-9,
)
shown_by(
    "test_out_of_memory.py::test_out_of_memory_is_one_line_with_the_ways_out",
    "training_out_of_memory",
    "memory",
    "a training's model and batch do not fit the GPU or the memory",
    "...: out of memory on ... with 8 pairs a forward pass, expected cluster.train.batch_size <= 4 or grad_checkpointing: true in the recipe...",
    lost="the steps since the newest step checkpoint; trying again would only repeat it, so it ends at once",
    exit_code=1,
)
shown_by(
    "test_run.py::test_deduplication_that_was_killed_goes_on_to_the_same_bytes",
    "killed_between_passes",
    "driver",
    "SIGKILL to driver and workers, in a stage and between passes over the whole pool",
    lost="the files in hand",
    exit_code=-9,
)
shown_by(
    "test_run.py::test_a_killed_run_goes_on_to_the_same_bytes",
    "killed_with_its_ray",
    "driver",
    "SIGKILL to driver and workers of a Ray of its own, in a training",
    lost="the steps since the newest step checkpoint, done again to the same weights",
    exit_code=-9,
)
shown_by(
    "test_run.py::test_a_stopped_run_leaves_nothing_half_written",
    "stopped_while_a_pool_is_written",
    "driver",
    "Ctrl-C while a pool is written",
    "stopped; the same command goes on where it stopped",
    lost="the shards in hand",
    exit_code=130,
)

KINDS = {
    "worker": "Workers",
    "node": "Nodes",
    "memory": "Memory",
    "driver": "The driver",
    "store": "Stores and disks",
    "files": "Files",
}
PAGE = """# What becomes of a run when something breaks

{count} faults, each done to a real run of winnow under way: processes of a real Ray are killed, frozen or starved, the root is on
a real disk or behind a proxy before a real S3 server. Afterwards, or after the same command once more where the exit code is not 0,
every artifact is byte for byte that of an undisturbed run, each file is the one that its record says, and nothing is left
over: no temporary file, no half an artifact. What is lost is time, and the column says which.

What is done again is in the run's `log.jsonl` as it happens (`log:` below, with the item and the cause), and its sum is printed
at the end: `again    11 items (its worker died: 9, MemoryError: 1, OSError: 1)`. `...` stands for what differs from run to run.
The faults of downloads are in [download_faults.md](download_faults.md), those of single requests to a store in
`tests/test_store_faults.py`. Made by `python -m tests.cluster_faults`, from the table that the tests hold to its word.
"""


def markdown() -> str:
    """The page docs/cluster_faults.md."""
    lines = [PAGE.format(count=len(FAULTS))]
    for kind, title in KINDS.items():
        lines += [
            f"## {title}",
            "",
            "| what happens | the user sees | exit code | lost | shown by |",
            "|---|---|---|---|---|",
        ]
        for row in FAULTS.values():
            if row.kind == kind:
                told = [f"`{line}`" for line in row.sees] + ([f"log: `{row.again}`"] if row.again else [])
                code = "killed" if row.exit_code == -signal.SIGKILL else str(row.exit_code)
                sees = "<br>".join(told).replace("|", "\\|") or "nothing"
                lines.append(f"| {row.when} | {sees} | {code} | {row.lost} | `{row.test}` |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n"


if __name__ == "__main__":
    print(markdown(), end="")
