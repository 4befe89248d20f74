"""Ray's own autoscaler, whose nodes are processes of this machine: up for what waits, down when nothing does."""

from __future__ import annotations

import pathlib
import time

import pytest

from pipeline.core.config import Resources
from pipeline.core.engine import Engine
from tests.cluster_fixture import PATIENCE_S, LocalCluster, wait_for

pytestmark = pytest.mark.ray

ROOT = pathlib.Path(__file__).resolve().parent.parent
TYPES = {
    "small": {"resources": {"CPU": 1}, "max_workers": 3},
    "fast": {"resources": {"CPU": 1}, "max_workers": 1, "labels": {"disk": "fast"}},
}


@pytest.fixture(scope="module")
def cluster():
    """A head without CPUs, to which nodes of TYPES come and go."""
    with LocalCluster(env={"PYTHONPATH": str(ROOT)}, node_types=TYPES) as cluster:
        yield cluster


class Meeting:
    """A worker whose items end when two nodes have one in work at the same time."""

    def __init__(self, folder: str):
        self.folder = pathlib.Path(folder)

    def process(self, item: int) -> str:
        import ray

        node = ray.get_runtime_context().get_node_id()
        (self.folder / f"node-{node}").touch()
        wait_for(lambda: len(list(self.folder.glob("node-*"))) > 1, "a second node")
        return node


def meet(folder: str) -> None:
    """None; a driver: maps six items, says so, and stays connected until it is told to go."""
    engine = Engine()
    try:
        arguments = [(number,) for number in range(6)], [f"meeting/{number}" for number in range(6)]
        nodes = engine.map_on_actors(Meeting, (folder,), *arguments, Resources(cpus=1))
        pathlib.Path(folder, "met").write_text(" ".join(nodes))
        wait_for(lambda: pathlib.Path(folder, "go").exists(), "the word to go", 2 * PATIENCE_S)
    finally:
        engine.close()


def finish(job) -> str:
    """What the job printed. Its exit code was 0."""
    output, errors = job.communicate(timeout=600)
    assert job.returncode == 0, output[-4000:] + errors[-4000:]
    return output


def test_queued_items_start_nodes_and_a_finished_map_lets_them_go(cluster, tmp_path):
    """More actors than nodes wait at first, which start nodes; none of them waits on when all items are done."""
    code = f"from tests.test_autoscaling import meet; meet({str(tmp_path)!r})"
    job = cluster.start_job(program=("-c", code), upload=False)
    try:

        def is_over(name: str) -> bool:
            assert job.poll() is None, job.communicate()
            return (tmp_path / name).exists()

        wait_for(lambda: is_over("met"), "the end of the map", 2 * PATIENCE_S)
        assert len(set((tmp_path / "met").read_text().split())) > 1
        wait_for(lambda: job.poll() is not None or set(cluster.nodes()) == {"head"}, "the end of all nodes")
        assert job.poll() is None, job.communicate()  # the driver is still there, and nothing of it keeps a node
        (tmp_path / "go").touch()
        finish(job)
    finally:
        job.kill()


@pytest.mark.slow
def test_a_run_on_nodes_that_come_and_go_gives_the_same_artifacts(cluster, winnow, finished, tmp_path):
    """Nothing is there at first; shards that wait start nodes, those of one stage the only type with its label."""
    root = tmp_path / "root"
    settings = (f"root={root}", "pool.shard_size=60", "cluster.hashes={labels: {disk: fast}}")
    words = [word for each in settings for word in ("--set", each)]
    words = ["--config", str(ROOT / "tests" / "tiny.yaml"), *words, "--until", "stages"]
    job = cluster.start_job(*words, program=(str(ROOT / "pipeline" / "run.py"),), upload=False)
    most = {"small": 0, "fast": 0}
    try:
        end = time.monotonic() + 600
        while job.poll() is None and time.monotonic() < end:
            for name in most:
                most[name] = max(most[name], sum(node.startswith(f"{name}/") for node in cluster.nodes()))
            time.sleep(0.2)
        finish(job)
    finally:
        job.kill()
    assert most["small"] > 1 and most["fast"] == 1, most
    made, expected = winnow.artifacts(root), winnow.artifacts(finished[0])
    assert made.items() <= expected.items() and any(name.startswith("hashes-") for name in made)
    wait_for(lambda: set(cluster.nodes()) == {"head"}, "the end of all nodes")
