"""The same command on real Ray clusters on this machine: a submitted job, a killed node, S3 as the root."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pytest

from tests.cluster_fixture import LocalCluster, ray_environment, wait_for

pytestmark = pytest.mark.ray

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = "_artifact.json"


@pytest.fixture(scope="module")
def cluster():
    """A head with one CPU."""
    with LocalCluster(head_cpus=1) as cluster:
        yield cluster


@pytest.fixture
def local(winnow, finished):
    """The artifacts of the same run on this machine without a cluster."""
    return winnow.artifacts(finished[0])


def test_a_submitted_job_gives_the_same_artifacts_and_exit_codes(winnow, cluster, local, tmp_path):
    done = cluster.submit("--config", "tests/tiny.yaml", "--set", f"root={tmp_path}/root")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "leaderboard:" in done.stdout
    assert winnow.artifacts(tmp_path / "root") == local

    refused = cluster.submit("--config", "tests/tiny.yaml")
    assert refused.returncode == 1  # ray's own code for any failure; ours is printed
    assert "expected an absolute path or a URL inside a Ray job" in refused.stdout + refused.stderr
    assert "exit code 2" in refused.stdout + refused.stderr or "code 2" in refused.stdout + refused.stderr


@pytest.mark.slow
def test_a_killed_node_loses_nothing(winnow, cluster, local, tmp_path):
    """A second node joins, does part of the work and is killed in the middle; the artifacts are the same."""
    root = tmp_path / "root"
    node = cluster.add_node(cpus=2)
    command = [*winnow.command(root), "--until", "basic_and_clip/selection"]
    # Four slow columns files a stage: the kill comes while some are made and others are not.
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    run = subprocess.Popen(command, cwd=ROOT, env=cluster.environment, **pipes)

    def is_time() -> bool:
        assert run.poll() is None, run.stdout.read()
        return bool(list(root.glob("language-*/0000*.parquet")))

    try:
        wait_for(is_time, "the moment to kill the node")
        cluster.kill_node(node)
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
    done = subprocess.run(command, cwd=ROOT, env=ray_environment(), capture_output=True, text=True, timeout=600)
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
    done = subprocess.run(command, cwd=ROOT, env=ray_environment(), capture_output=True, text=True, timeout=600)
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
