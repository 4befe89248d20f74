"""The same command on real Ray clusters on this machine: a submitted job, a killed node, S3 as the root."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

pytestmark = pytest.mark.ray

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = "_artifact.json"
BIN = pathlib.Path(sys.executable).parent
RAY = str(BIN / "ray")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def environment(**more):
    env = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    env |= {"RAY_AUTH_MODE": "disabled", "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0", "OMP_NUM_THREADS": "1"}
    env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}", "RAY_USAGE_STATS_ENABLED": "0"}
    return env | more


@contextlib.contextmanager
def ray_node(*options, env):
    """A Ray node as processes of its own group, ended with it: `ray stop` would end strangers' too."""
    # The agent's port is a fixed one by default, which another Ray on this machine may hold: no job could be submitted.
    process = subprocess.Popen(
        [RAY, "start", "--block", "--disable-usage-stats", f"--dashboard-agent-listen-port={free_port()}", *options],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """(GCS address, dashboard address) of a head with one CPU."""
    port, dashboard = free_port(), free_port()
    temporary = f"/tmp/winnow-ray-{os.getpid()}"  # Ray's sockets need a short path
    options = ("--head", f"--port={port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1")
    options += (f"--ray-client-server-port={free_port()}",)
    options += (
        "--num-cpus=1",
        "--object-store-memory=100000000",
        f"--temp-dir={temporary}",
        "--node-ip-address=127.0.0.1",
    )
    with ray_node(*options, env=environment()):
        address = f"http://127.0.0.1:{dashboard}"
        for _ in range(600):
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"{address}/api/version", timeout=1).close()
                break
            time.sleep(0.1)
        else:
            raise RuntimeError("the Ray head did not start")
        yield f"127.0.0.1:{port}", address


def submit(dashboard, *arguments):
    command = [RAY, "job", "submit", "--address", dashboard, "--working-dir", ".", "--", "python", "pipeline/run.py"]
    for _ in range(10):  # on a busy machine the head's job agent comes up later than its dashboard
        done = subprocess.run(
            [*command, *arguments], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600
        )
        if "No available agent to submit job" not in done.stderr + done.stdout:
            break
        time.sleep(2)
    return done


@pytest.fixture
def local(winnow, finished):
    """The artifacts of the same run on this machine without a cluster."""
    return winnow.artifacts(finished[0])


def test_a_submitted_job_gives_the_same_artifacts_and_exit_codes(winnow, cluster, local, tmp_path):
    _, dashboard = cluster
    done = submit(dashboard, "--config", "tests/tiny.yaml", "--set", f"root={tmp_path}/root")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "leaderboard:" in done.stdout
    assert winnow.artifacts(tmp_path / "root") == local

    refused = submit(dashboard, "--config", "tests/tiny.yaml")
    assert refused.returncode == 1  # ray's own code for any failure; ours is printed
    assert "expected an absolute path or a URL inside a Ray job" in refused.stdout + refused.stderr
    assert "exit code 2" in refused.stdout + refused.stderr or "code 2" in refused.stdout + refused.stderr


def test_a_killed_node_loses_nothing(winnow, cluster, local, tmp_path):
    """A second node joins, does part of the work and is killed in the middle; the artifacts are the same."""
    address, _ = cluster
    root = tmp_path / "root"
    env = environment(RAY_ADDRESS=address)
    worker = ("--address", address, "--num-cpus=2", "--object-store-memory=100000000")
    with ray_node(*worker, env=environment()) as node:
        command = [*winnow.command(root), "--until", "basic_and_clip/selection"]
        # Four slow columns files a stage: the kill comes while some are made and others are not.
        run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            end = time.monotonic() + 300
            while not list(root.glob("language-*/0000*.parquet")):
                assert run.poll() is None, run.stdout.read()
                assert time.monotonic() < end, "the moment to kill the node did not come"
                time.sleep(0.05)
            os.killpg(node.pid, signal.SIGKILL)
            output, _ = run.communicate(timeout=600)
        finally:
            run.kill()
    assert run.returncode == 0, output[-4000:]
    made = winnow.artifacts(root)
    assert made.items() <= local.items() and any(name.startswith("selection-") for name in made)


def test_one_training_on_two_workers_through_ray_train(finished, tmp_path):
    """`cluster.train.workers: 2`: the losses are those of one worker, to rounding."""
    root = tmp_path / "root"
    settings = (f"root={root}", "stages=[]", "models={}", "compare=[no_filter]", "strategies={no_filter: {}}")
    settings += ("eval.tasks=[colours]", "cluster.train={workers: 2, cpus: 0.5}")
    command = [sys.executable, "pipeline/run.py", "--config", "tests/tiny.yaml"]
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    losses = {}
    for path in (finished[0], root):
        trainings = json.loads(next(path.glob("runs/*/run.json")).read_text())["trainings"]
        (name,) = (training["checkpoint"] for training in trainings if training["strategy"] == "no_filter")
        workers = json.loads((path / name / RECORD).read_text())["facts"]["num_workers"]
        losses[workers] = [
            json.loads(line)["loss"] for line in (path / name / "metrics.jsonl").read_text().splitlines()
        ]
    assert len(losses[1]) == 10
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


def test_a_root_on_s3_gives_the_same_artifacts(local, s3_url):
    import fsspec

    settings = (f"root={s3_url}/root", "compare=[oracle]", "baseline=oracle")
    command = [sys.executable, "pipeline/run.py", "--config", "tests/tiny.yaml"]
    command += [word for setting in settings for word in ("--set", setting)]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    fs = fsspec.filesystem("s3")
    bucket = s3_url.removeprefix("s3://")
    found = {}
    for path in fs.glob(f"{bucket}/root/*/{RECORD}"):
        files = json.loads(fs.cat_file(path))["files"]
        found[path.split("/")[-2]] = {name: entry["sha256"] for name, entry in files.items() if not entry.get("fact")}
    assert found.items() <= local.items()
    assert {name.split("-")[0] for name in found} == {name.split("-")[0] for name in local}
    assert fs.glob(f"{bucket}/root/runs/*/leaderboard.html")
