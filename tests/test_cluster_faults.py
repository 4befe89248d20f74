"""Every fault of the catalogue is done to a run under way: what is printed, how it ends, and what the artifacts are."""

from __future__ import annotations

import contextlib
import os
import pathlib
import re
import subprocess

import pytest

from tests import cluster_faults, s3_faults
from tests.cluster_faults import FAULTS, Run, cluster_with, of_scene, seen

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A cluster of one node with two CPUs, for the scenes that leave it as it was."""
    with cluster_with(tmp_path_factory.mktemp("cluster") / "points", workers=1, worker_cpus=2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def undisturbed(cluster, tmp_path_factory):
    """The artifacts of a run that nothing disturbed."""
    with Run(tmp_path_factory.mktemp("undisturbed"), cluster) as run:
        run.finish()
        return run.artifacts()


def check_told(row, run):
    """What the fault's run, the newest one, says of it."""
    for line in row.sees:
        assert seen(line, run.output()), f"{row.name}: no line like {line!r} in\n{run.output()}"
    if row.again:
        assert seen(row.again, run.again()), f"{row.name}: no {row.again!r} in\n{run.again()}"
        cause = row.again.partition(": ")[2].partition(":")[0].partition(",")[0]
        assert seen(f"again    ... item... (...{cause}: ...)", run.output()), run.output()
    assert "Traceback" not in run.output() and "(raylet)" not in run.output(), run.output()


def play_together(scene, run, undisturbed):
    """All faults of the scene in one run; another one after it, where they end it."""
    rows = of_scene(scene)
    run.set_points([point for row in rows for point in row.points])
    run.start()
    for row in rows:
        row.inject(run)
    assert {run.wait()} == {row.exit_code for row in rows}, run.output()
    for row in rows:
        check_told(row, run)
    if run.wait():
        run.finish()
    assert run.artifacts() == undisturbed
    assert run.strays() == []


def play_in_turn(scene, run, undisturbed):
    """The faults of the scene one after the other, each in a command of its own on the same root; then one without."""
    for row in of_scene(scene):
        run.set_points(row.points)
        row.inject(run)
        assert run.wait() == row.exit_code, run.output()
        check_told(row, run)
    run.finish()
    assert run.artifacts() == undisturbed
    assert run.strays() == []


def test_every_row_is_shown_by_a_test_that_is_there():
    for row in FAULTS.values():
        file, _, name = row.test.partition("::")
        assert re.search(rf"(?m)^def {name}\(", (ROOT / "tests" / file).read_text()), f"{row.name}: no {row.test}"


def test_the_page_is_the_table():
    assert (ROOT / "docs" / "cluster_faults.md").read_text() == cluster_faults.markdown()


@pytest.mark.ray
def test_workers(cluster, undisturbed, tmp_path):
    """Workers killed, ended, crashed, frozen, and errors that go away: one run, which does each item again."""
    with Run(tmp_path, cluster) as run:
        play_together("workers", run, undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_poison(cluster, undisturbed, tmp_path):
    """A shard that kills every worker: it is named after a bounded number of tries, and what can be done is done."""
    with Run(tmp_path, cluster) as run:
        play_together("poison", run, undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_driver(cluster, undisturbed, tmp_path):
    """Drivers that end in every way, on a cluster that lives on."""
    with Run(tmp_path, cluster) as run:
        play_in_turn("driver", run, undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_files(cluster, undisturbed, tmp_path):
    """Files that are not as the run left them."""
    with Run(tmp_path, cluster) as run:
        play_in_turn("files", run, undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_disk(cluster, undisturbed, tmp_path):
    """A root on a disk of its own, which fills up and can't be written to."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", str(disk)], capture_output=True).returncode:
        pytest.skip("may not mount here")
    try:
        with Run(tmp_path, cluster, str(disk / "root")) as run:
            play_in_turn("disk", run, undisturbed)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.ray
@pytest.mark.slow
def test_nodes(undisturbed, tmp_path):
    """A run from whose cluster one node after the other is taken, in every way."""
    with cluster_with(tmp_path / "points", workers=1) as cluster, Run(tmp_path, cluster) as run:
        play_together("nodes", run, undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_head(cluster, undisturbed, tmp_path):
    """The head node is killed: the driver ends; the same command goes on, on another cluster."""
    (row,) = of_scene("head")
    with Run(tmp_path) as run:
        # Without a head the other nodes end by themselves, which `close` may find some of their workers in.
        with contextlib.suppress(AssertionError), cluster_with(tmp_path / "points", workers=1) as run.cluster:
            run.set_points(row.points)
            run.start()
            row.inject(run)
            code = run.wait()
        assert code == row.exit_code, run.output()
        check_told(row, run)
        run.cluster = cluster
        run.finish()
        assert run.artifacts() == undisturbed
        assert run.strays() == []


@pytest.mark.ray
@pytest.mark.slow
def test_out_of_memory(undisturbed, tmp_path):
    """Ray's memory monitor kills the worker that takes it all."""
    env = cluster_faults.MONITOR | {"RAY_memory_usage_threshold": cluster_faults.memory_threshold(room_gb=3)}
    with cluster_with(tmp_path / "points", env, workers=1) as cluster, Run(tmp_path, cluster) as run:
        play_together("out_of_memory", run, undisturbed)


@pytest.mark.ray
@pytest.mark.slow
def test_object_store(undisturbed, tmp_path):
    """No object can be put on the one node that works, from the first stage to the end."""
    cluster = cluster_with(tmp_path / "points", cluster_faults.STORE_IS_FULL, workers=1)
    with cluster, Run(tmp_path, cluster) as run:
        play_together("object_store", run, undisturbed)


@pytest.fixture
def faulty_run(s3_endpoint, s3_url, tmp_path):
    """A run whose root is on S3, behind a proxy that is `store`."""
    with s3_faults.FaultyStore(s3_endpoint) as store:
        env = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
        cluster = cluster_with(tmp_path / "points", env | {"AWS_ENDPOINT_URL": store.url}, workers=1, worker_cpus=2)
        with cluster, Run(tmp_path, cluster, f"{s3_url}/root") as run:
            run.store = store
            yield run


@pytest.mark.ray
@pytest.mark.slow
def test_store(undisturbed, faulty_run):
    """A store on a very bad day."""
    play_together("store", faulty_run, undisturbed)
    assert set(faulty_run.store.injected) == {
        "slow_down_503", "skewed_403", "internal_500", "reset", "body_cut", "hang", "answer_lost",
    }  # fmt: skip


@pytest.mark.ray
@pytest.mark.slow
def test_store_refuses(undisturbed, faulty_run):
    """Answers that waiting does not mend: one line, and the same command goes on when the cause is gone."""
    play_in_turn("store_refuses", faulty_run, undisturbed)
