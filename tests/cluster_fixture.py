"""Real Ray clusters on this machine: nodes that can be added, killed, preempted and frozen, and jobs submitted to them.

    with LocalCluster(workers=3) as cluster:                        # a head without CPUs and three nodes of one CPU
        done = cluster.submit("--config", "tests/tiny.yaml")        # `ray job submit`, waited for
        job = cluster.start_job("--config", "tests/tiny.yaml")      # the same in the background: a Popen
        cluster.kill_node("w1")                                     # all processes of that node at once, as a power cut
        cluster.preempt_node("w2", deadline_s=5)                    # told, then ended, as a spot machine
        cluster.add_node(cpus=2, labels={"zone": "b"})              # "w4"
        env = cluster.environment                                   # for a driver outside: RAY_ADDRESS is in it

Every node is a `ray start --block` in a session of its own, with ports and a folder of its own, since strangers' Rays run
on the same machine (`ray stop` would end those, too). What a node needs in its environment (AWS_*) is given as `env`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tests.servers import free_port

ROOT = pathlib.Path(__file__).resolve().parent.parent
BIN = pathlib.Path(sys.executable).parent
RAY = str(BIN / "ray")
MARK = "WINNOW_LOCAL_CLUSTER"  # in the environment of every process of a cluster: its folder
OBJECT_STORE_BYTES = 80_000_000
PATIENCE_S = 600  # for what takes seconds on a machine with nothing else to do
STARTS = 5  # of a node that ends before it is part of the cluster
# A killed node refuses connections: five refused checks make it dead. One that is silent has much longer, as on a busy
# machine nodes that are well answer late.
DEATH_SETTINGS = {"RAY_health_check_initial_delay_ms": "0", "RAY_health_check_period_ms": "500"}
IDLE_S = 6.0  # after which the autoscaler ends a node
HEAD_TYPE = "ray.head.default"
HEAD_ID = "fffffffffffffffffffffffffffffffffffffffffffffffffff00000"  # Ray's fake provider takes no other
AUTOSCALER_SETTINGS = {  # of the head, as Ray's own ray.cluster_utils.AutoscalingCluster has them
    "RAY_FAKE_CLUSTER": "1",
    "RAY_enable_autoscaler_v2": "1",
    "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
    "AUTOSCALER_UPDATE_INTERVAL_S": "1",
}


def ray_environment(**more: str) -> dict[str, str]:
    """The environment of a Ray node or a driver: nothing of a surrounding Ray, our Python first."""
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "OMP_NUM_THREADS": "1"}
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    return env | more


def wait_for(condition: Callable[[], Any], what: str, within_s: float = PATIENCE_S) -> Any:
    """The first true value of the condition. Raises TimeoutError that names `what`."""
    end = time.monotonic() + within_s
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError(f"{what}: did not come within {within_s:.0f} s")
        time.sleep(0.05)
    return value


class LocalCluster:
    """A Ray cluster on loopback, ended with all of its processes by `close` or at the end of its `with`.

    Attributes:
        address: `host:port` of the head's GCS.
        dashboard: the address of its dashboard and job server.
        environment: of a driver outside of the cluster that connects to it.
    """

    def __init__(
        self,
        workers: int = 0,
        head_cpus: float = 0,
        worker_cpus: float = 1,
        env: Mapping[str, str] | None = None,
        node_types: Mapping[str, Mapping[str, Any]] | None = None,
    ):
        """Starts the head, named `head`, and `workers` nodes `w1`, `w2`, ... of `worker_cpus` each.

        Args:
            env: added to the environment of every node; RAY_health_check_... of the head are here, too.
            node_types: {type: {resources, max_workers, labels}} of nodes that Ray's autoscaler starts when work waits
                for them and ends when they have been idle for IDLE_S. Those are in `nodes` as `type/...`.
        """
        self._folder = tempfile.mkdtemp(prefix="ray")  # short: the paths of sockets may have 107 letters
        self._env = ray_environment(**DEATH_SETTINGS, **{MARK: self._folder}) | dict(env or {})
        self._nodes: dict[str, subprocess.Popen] = {}
        self._sessions: set[int] = set()  # of all nodes that there ever were
        self._lock = threading.Lock()  # nodes may be added and killed from a thread beside the test
        self._made = 0
        self._head_env = AUTOSCALER_SETTINGS if node_types else {}
        port, dashboard_port = free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard_port}"
        self.environment = ray_environment(RAY_ADDRESS=self.address) | dict(env or {})
        try:
            head = ("--head", f"--port={port}", f"--dashboard-port={dashboard_port}", "--dashboard-host=127.0.0.1")
            head += (f"--ray-client-server-port={free_port()}",)
            if node_types:
                head += (f"--autoscaling-config={self._write_node_types(node_types)}",)
            self._start_node("head", head_cpus, *head)
            self._wait_until_alive("head")
            names = [self.add_node(worker_cpus, wait=False) for _ in range(workers)]
            self._wait_until_alive(*names)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> LocalCluster:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def nodes(self) -> dict[str, str]:
        """{name: id in hex} of the nodes that Ray holds for alive."""
        from ray.core.generated.gcs_pb2 import GcsNodeInfo

        alive = {
            node_id.hex(): info
            for node_id, info in self._gcs.get_all_node_info(timeout=60).items()
            if info.state == GcsNodeInfo.ALIVE
        }
        names = {node_id: info.node_name for node_id, info in alive.items()}
        for node_id, info in alive.items():
            if info.node_name not in ("head", *(f"w{number}" for number in range(1, self._made + 1))):
                names[node_id] = f"{info.node_type_name}/{info.instance_id[-5:]}"  # the autoscaler's
        return {name: node_id for node_id, name in names.items()}

    def worker_names(self) -> list[str]:
        """The nodes beside the head whose processes are there, whatever Ray knows of them yet."""
        with self._lock:
            return [name for name, process in self._nodes.items() if name != "head" and process.poll() is None]

    def add_node(
        self, cpus: float = 1, *options: str, labels: Mapping[str, str] | None = None, wait: bool = True
    ) -> str:
        """The name of a new node: `w1`, `w2`, ...; with `wait`, once Ray holds it for alive.

        Args:
            options: further ones of `ray start`, such as `--num-gpus=1` or `--resources={"disk": 1}`.
        """
        with self._lock:
            self._made += 1
            name = f"w{self._made}"
        if labels:
            options = (*options, f"--labels={','.join(f'{key}={value}' for key, value in labels.items())}")
        self._start_node(name, cpus, f"--address={self.address}", *options)
        if wait:
            self._wait_until_alive(name)
        return name

    def kill_node(self, name: str, wait: bool = False) -> None:
        """None; SIGKILL to every process of the node at once; with `wait`, once Ray holds it for dead."""
        with self._lock:
            process = self._nodes.pop(name)
        _kill(process)
        if wait:
            wait_for(lambda: name not in self.nodes(), f"the death of {name}")

    def preempt_node(self, name: str, deadline_s: float, wait: bool = True) -> None:
        """None; Ray is told that the node will go, which at the deadline gets SIGTERM and a second later SIGKILL.

        Args:
            wait: for Ray to hold it for dead; False does the ending in a thread of its own, and the node counts in
                `worker_names` until its end.
        """
        from ray.core.generated import autoscaler_pb2

        accepted, why = self._gcs.drain_node(
            self.nodes()[name],
            autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION"),
            "preempted by a test",
            int((time.time() + deadline_s) * 1000),
            timeout=60,
        )
        assert accepted, why
        process = self._nodes[name]

        def end() -> None:
            with contextlib.suppress(subprocess.TimeoutExpired):  # an idle node that is drained goes by itself
                process.wait(deadline_s)
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(1)
            with contextlib.suppress(KeyError):  # the cluster may be closed by now
                self.kill_node(name)

        if wait:
            end()
            wait_for(lambda: name not in self.nodes(), f"the death of {name}")
        else:
            threading.Thread(target=end, daemon=True).start()

    def freeze_node(self, name: str) -> None:
        """None; SIGSTOP to every process of the node: it is silent, as behind a broken network."""
        with self._lock:
            _stop(self._nodes[name].pid)

    def processes(self, name: str) -> list[int]:
        """The processes of a node: `ray start`, and all below it, workers and what they started."""
        return _tree(self._nodes[name].pid)

    def submit(self, *arguments: str, timeout_s: float = 600) -> subprocess.CompletedProcess:
        """The ended `ray job submit --working-dir . -- python pipeline/run.py` with these arguments."""
        job = self.start_job(*arguments)
        try:
            output, errors = job.communicate(timeout=timeout_s)
        finally:
            job.kill()
        return subprocess.CompletedProcess(job.args, job.returncode, output, errors)

    def start_job(self, *arguments: str, program: Sequence[str] = ("pipeline/run.py",), upload: bool = True) -> Any:
        """The running `ray job submit` of `python PROGRAM` with these arguments: a Popen, its output in pipes.

        Args:
            upload: False where the nodes find our packages by PYTHONPATH in `env`; paths are then absolute. Nodes that
                the autoscaler starts share a folder of Ray's and would unpack an upload under each other's workers.
        """
        command = [RAY, "job", "submit", "--address", self.dashboard, *(["--working-dir", "."] if upload else [])]
        command += ["--", "python", *program, *arguments]
        # on a busy machine the head's job agent comes up later than its dashboard
        wait_for(self._takes_jobs, "the head's job agent")
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen(command, cwd=ROOT, env=ray_environment(), **pipes)

    def close(self) -> None:
        """None; ends every process of the cluster and removes its folder. Raises AssertionError when one is left."""
        with self._lock:
            nodes, self._nodes = self._nodes, {}
        for process in nodes.values():
            _kill(process)
        with contextlib.suppress(TimeoutError):  # a worker whose node ended by itself goes as soon as it sees that
            wait_for(lambda: not self.leftovers(), "the end of the workers", 60)
        left = self.leftovers()
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self._folder, ignore_errors=True)
        assert not left, f"processes of {self._folder} outlived their nodes: {left}"

    def leftovers(self) -> dict[int, str]:
        """{process: command} of this machine's that a node of this cluster started and that is in no node now."""
        alive = {pid for process in list(self._nodes.values()) for pid in _tree(process.pid)}
        mark = f"{MARK}={self._folder}".encode()
        found = {}
        for path in pathlib.Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                command = (path / "cmdline").read_bytes()
                if int(path.name) in alive or not command:  # an ended one that waits for its parent has none
                    continue
                ours = os.getsid(int(path.name)) in self._sessions or f"{self._folder}/".encode() in command
                if ours or mark in (path / "environ").read_bytes():
                    found[int(path.name)] = command.replace(b"\0", b" ").decode(errors="replace").strip()
        return found

    def _write_node_types(self, node_types: Mapping[str, Mapping[str, Any]]) -> str:
        """The file for Ray's autoscaler, which starts nodes of these types on this machine."""
        types = {name: {"node_config": {}, "min_workers": 0, **of} for name, of in node_types.items()}
        for of in types.values():
            of["resources"] = {**of["resources"], "object_store_memory": OBJECT_STORE_BYTES}
        types[HEAD_TYPE] = {"node_config": {}, "max_workers": 0, "resources": {"CPU": 0}}
        config = {
            "cluster_name": "winnow",
            "max_workers": sum(of["max_workers"] for of in types.values()),
            "idle_timeout_minutes": IDLE_S / 60,
            "provider": {  # Ray's fake multi-node provider; under its own name, Ray misses a file that its wheels lack
                "type": "external",
                "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
                "gcs_address": self.address,
                "launch_multiple": True,
                "head_node_id": HEAD_ID,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
            },
            **{name: {} for name in ("auth", "docker", "file_mounts")},
            **{f"{kind}setup_commands": [] for kind in ("", "head_", "worker_")},
            **{f"{kind}_start_ray_commands": [] for kind in ("head", "worker")},
            "initialization_commands": [],
            "cluster_synced_files": [],
            "available_node_types": types,
            "head_node_type": HEAD_TYPE,
        }
        path = pathlib.Path(self._folder, "autoscaler.yaml")
        path.write_text(json.dumps(config))
        return str(path)

    def _start_node(self, name: str, cpus: float, *options: str) -> None:
        # The agent's port is a fixed one by default, which another Ray on this machine may hold: no job could be submitted.
        options += (f"--dashboard-agent-listen-port={free_port()}", f"--node-name={name}")
        options += (f"--num-cpus={cpus:g}", f"--object-store-memory={OBJECT_STORE_BYTES}")
        options += ("--node-ip-address=127.0.0.1", "--include-log-monitor=false")
        # In one folder for all, the agent of each node would unpack the job's files anew, under the others' workers.
        options += (f"--temp-dir={self._folder}/{name}",)
        self._launch(name, [RAY, "start", "--block", "--disable-usage-stats", *options])

    def _launch(self, name: str, command: Any) -> None:
        with open(f"{self._folder}/{name}.log", "wb") as log:
            pipes = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
            env = self._env | (self._head_env if name == "head" else {})
            process = subprocess.Popen(command, env=env, start_new_session=True, **pipes)
        with self._lock:
            self._nodes[name] = process
            self._sessions.add(process.pid)

    def _wait_until_alive(self, *names: str) -> None:
        from ray.exceptions import RpcError

        starts = dict.fromkeys(names, 1)

        def all_alive() -> bool:
            for name in names:
                process = self._nodes[name]
                if (
                    process.poll() is not None
                ):  # Ray gives up when a node's agents need 15 s to start, as on a busy machine
                    assert starts[name] < STARTS, self._why_ended(name)
                    starts[name] += 1
                    _kill(process)
                    shutil.rmtree(f"{self._folder}/{name}", ignore_errors=True)
                    self.__dict__.pop("_gcs", None)  # another head is another cluster
                    self._launch(name, process.args)
            with contextlib.suppress(RpcError):  # a head that ended just now
                return self._answers() and set(names) <= set(self.nodes())
            return False

        wait_for(all_alive, f"the nodes {names}")

    def _why_ended(self, name: str) -> str:
        printed = pathlib.Path(self._folder, f"{name}.log").read_text(errors="replace")
        return f"the node {name} ended with {self._nodes[name].returncode}: {printed[-2000:]}"

    def _answers(self) -> bool:
        with contextlib.suppress(OSError):  # the dashboard starts after the GCS
            urllib.request.urlopen(f"{self.dashboard}/api/version", timeout=5).close()
            return True
        return False

    @functools.cached_property
    def _gcs(self) -> Any:
        from ray._raylet import GcsClient

        return GcsClient(address=self.address)

    def _takes_jobs(self) -> bool:
        from ray._private.ray_constants import KV_NAMESPACE_DASHBOARD
        from ray.dashboard.consts import DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX

        key = f"{DASHBOARD_AGENT_ADDR_NODE_ID_PREFIX}{self.nodes()['head']}"
        return self._gcs.internal_kv_get(key.encode(), namespace=KV_NAMESPACE_DASHBOARD, timeout=60) is not None


def _children() -> dict[int, list[int]]:
    found: dict[int, list[int]] = {}
    for path in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, parent = path.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state != "Z":
                found.setdefault(int(parent), []).append(int(path.parent.name))
    return found


def _tree(pid: int) -> list[int]:
    """The process and all below it, parents first; in whatever session or group they are."""
    children, found = _children(), [pid]
    for parent in found:
        found += children.get(parent, [])
    return found


def _stop(pid: int) -> list[int]:
    """The stopped processes: the given one and all below it. Parents first, so that none starts another unseen."""
    stopped: set[int] = set()
    while more := [each for each in _tree(pid) if each not in stopped]:
        for each in more:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGSTOP)
        stopped.update(more)
    return list(stopped)


def _kill(process: subprocess.Popen) -> None:
    if process.poll() is None:
        for pid in _stop(process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    with contextlib.suppress(ProcessLookupError):  # what a head that ended by itself left in its session
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
