"""What is refused before any work: by hand-made machines, and on a real cluster with odd nodes."""

from __future__ import annotations

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from pipeline import estimates, execute, preflight, states
from pipeline import plan as planning
from pipeline.core import config, machines, storage
from pipeline.core.config import Resources
from pipeline.core.machines import Machine
from tests import cluster_fixture
from tests.conftest import TINY
from tests.engine_fixture import EngineHere
from tests.task_fixture import write_files

GIB = 2.0**30
HEAD = Machine("10.0.0.1", {"CPU": 0.0, "memory": 4 * GIB}, {"ray.io/node-id": "a"})
SMALL = Machine("10.0.0.2", {"CPU": 8.0, "memory": 32 * GIB}, {"ray.io/node-id": "b", "zone": "a"})
GPUS = Machine("10.0.0.3", {"CPU": 16.0, "GPU": 4.0, "memory": 64 * GIB}, {"ray.io/node-id": "c", "zone": "b"})
MANAGED = Machine("10.0.0.4", {"CPU": 2.0, "memory": 4 * GIB}, {"ray.io/node-id": "d", "ray.io/node-group": "cpu"})


def plan_of(tmp_path, *overrides):
    return planning.build(config.load(str(TINY), [f"root={tmp_path}/root", *overrides]), str(TINY))


def problems(plan, engine, targets=None):
    statuses = states.resolve(plan)
    targets = targets or list(plan.steps)
    return preflight.problems(plan, targets, statuses, engine, estimates.estimate(plan, statuses))


class Cluster(EngineHere):
    """Machines that are not asked about CUDA: what they would say is given."""

    def __init__(self, *there, num_cuda_devices=None):
        super().__init__(there, local=False)
        self.num_cuda_devices = num_cuda_devices or {}

    def on_each_machine(self, function, *arguments):
        *others, asks_for_cuda = arguments
        answers = super().on_each_machine(function, *others, False)
        for name, answer in answers if asks_for_cuda else ():
            object.__setattr__(answer, "num_cuda_devices", self.num_cuda_devices.get(name, 0))
        return answers


@pytest.mark.parametrize(
    "cluster, there, expected",
    [
        ("{clip: {cpus: 8, memory_gb: 32}}", (HEAD, SMALL), []),
        ("{clip: {cpus: 9}}", (HEAD, SMALL), ["cluster.clip.cpus = 9, expected at most the 8 of the largest machine, 10.0.0.2"]),
        ("{clip: {cpus: 9}}", (HEAD, SMALL, MANAGED), []),  # others may come, and Ray does not tell which
        ("{train: {gpus: 8}}", (HEAD, GPUS), ["cluster.train.gpus = 8, expected at most the 4 of the largest machine, 10.0.0.3"]),
        ("{train: {gpus: 4, cpus: 65, memory_gb: 600}}", (HEAD, GPUS), [
            "cluster.train.cpus = 65, expected at most the 16 of the largest machine, 10.0.0.3",
            "cluster.train.memory_gb = 600, expected at most the 64 of the largest machine, 10.0.0.3"]),
        ("{hashes: {cpus: 8, gpus: 4}, eval: {gpus: 0.5}}", (HEAD, SMALL, GPUS), []),
        ("{hashes: {cpus: 12, memory_gb: 60}}", (Machine("a", {"CPU": 16.0, "memory": 8 * GIB}, {}), Machine("b", {"CPU": 4.0, "memory": 64 * GIB}, {})), [
            "cluster.hashes: 12 CPUs, 60 GB of memory a worker, expected what one machine has: a has 16 CPUs, 0 GPUs, 8 GB of memory; b has 4 CPUs, 0 GPUs, 64 GB of memory"]),
        ("{clip: {labels: {zone: b}}}", (HEAD, SMALL, GPUS), []),
        ("{clip: {labels: {zone: '!a'}}}", (HEAD, SMALL, GPUS), []),
        ("{clip: {labels: {zone: 'in(b, c)'}, cpus: 9}}", (HEAD, SMALL, GPUS), []),
        ("{clip: {labels: {zone: '!in(b, c)'}, cpus: 9}}", (HEAD, SMALL, GPUS), ["cluster.clip.cpus = 9, expected at most the 8 of the largest machine, 10.0.0.2"]),
        ("{clip: {labels: {zone: c}}}", (HEAD, SMALL, GPUS), ["cluster.clip.labels = {zone: c}, expected labels that a machine has; there are zone: a, zone: b"]),
        ("{clip: {labels: {zone: c}}}", (HEAD, SMALL, MANAGED), []),
        ("{train: {workers: 4, gpus: 1, cpus: 4}}", (HEAD, GPUS), []),
        ("{train: {workers: 5, gpus: 1, cpus: 4}}", (HEAD, GPUS), [
            "cluster.train.workers = 5, expected at most the 4 workers with 4 CPUs, 1 GPU each that the cluster has room for at the same time"]),
        ("{train: {workers: 80, gpus: 1, cpus: 4}}", (HEAD, GPUS, MANAGED), []),
        ("{train: {workers: 100, min_workers: 5, gpus: 1}}", (HEAD, GPUS), [
            "cluster.train.min_workers = 5, expected at most the 4 workers with 1 CPU, 1 GPU each that the cluster has room for at the same time"]),
        ("{train: {workers: 5, min_workers: 2, gpus: 1, cpus: 4}}", (HEAD, GPUS), []),  # it starts with fewer
        ("{clip: {cpus: 9}}", (HEAD,), []),  # a head alone: nobody knows what will come
    ],
)  # fmt: skip
def test_requests_fit_what_is_there_or_may_come(tmp_path, cluster, there, expected):
    plan = plan_of(tmp_path, f"cluster={cluster}")
    cuda = {machine.name: int(machine.resources.get("GPU", 0)) for machine in there}
    assert problems(plan, Cluster(*there, num_cuda_devices=cuda)) == expected


def test_only_what_is_still_to_be_done_must_fit(tmp_path):
    plan = plan_of(tmp_path, "cluster.train={gpus: 8}")
    assert problems(plan, Cluster(SMALL), ["clip", "hashes"])  # clip needs a training
    assert not problems(plan, Cluster(SMALL), ["hashes", "language"])


def test_images_are_decoded_without_the_gpus_of_eval(tmp_path):
    plan = plan_of(tmp_path, "cluster.eval={gpus: 8}")
    (line,) = problems(plan, Cluster(SMALL, num_cuda_devices={}))
    assert line.startswith("cluster.eval.gpus = 8, expected at most the 0 of")
    assert not problems(plan, Cluster(SMALL), ["images/colours"])


def test_gpus_that_torch_does_not_see(tmp_path):
    """Only on nodes that would run a step with GPUs: torch's answer comes from a process of its own."""
    plan = plan_of(tmp_path, "cluster.train={gpus: 1}")
    (line,) = problems(plan, Cluster(SMALL, GPUS, num_cuda_devices={"10.0.0.3": 1}))
    assert line.startswith("node 10.0.0.3: torch sees 1 CUDA devices, expected the 4 GPUs that Ray was told of")
    assert not problems(plan, Cluster(SMALL, GPUS, num_cuda_devices={"10.0.0.3": 4}))
    assert not problems(plan_of(tmp_path), Cluster(SMALL, GPUS))
    import torch

    assert machines._num_cuda_devices() == torch.cuda.device_count()


def test_this_machine_is_looked_at_where_there_is_no_engine(tmp_path):
    here = machines.this_machine()
    assert 1 <= here.resources["CPU"] <= os.cpu_count() and here.resources["memory"] > GIB
    assert not problems(plan_of(tmp_path), None)
    too_many = int(here.resources["CPU"]) + 1
    (line,) = problems(plan_of(tmp_path, f"cluster.clip.cpus={too_many}"), None)
    assert line == f"cluster.clip.cpus = {too_many}, expected at most the {too_many - 1} of this machine"
    assert not (tmp_path / "root").exists()


def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    """What is missing must be more than an estimate may be wrong by; what a stopped run wrote is there."""
    plan = plan_of(tmp_path)
    expected = estimates.estimate(plan, states.resolve(plan)).values()
    needed = estimates.total(expected).written_bytes + max(one.passing_bytes for one in expected)
    monkeypatch.setattr(storage, "free_bytes", lambda path: int(0.8 * needed))
    assert not problems(plan, None)
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1_000_000)
    (line,) = problems(plan, None)
    assert re.fullmatch(
        rf"root = {tmp_path}/root: 1 MB are free, expected about \d\d MB for what is to be written, "
        "most of it by tasks 14 MB",
        line,
    )
    assert len(problems(plan, None, ["pool"])) == 0
    monkeypatch.setattr(storage, "free_bytes", lambda path: 500_000)
    assert len(problems(plan, None, ["pool"])) == 1
    left = pathlib.Path(states.resolve(plan)["pool"].artifact.path)
    left.mkdir(parents=True)
    (left / "00000.tar").write_bytes(bytes(900_000))
    assert not problems(plan, None, ["pool"])


def test_files_for_an_object_store_must_fit_a_nodes_temporary_folder(tmp_path, monkeypatch, s3_url):
    plan = plan_of(tmp_path, f"root={s3_url}/root", "pool.source.pairs=100000", "pool.shard_size=50000")
    assert not problems(plan, Cluster(SMALL))
    monkeypatch.setattr(storage, "free_bytes", lambda path: None if storage.is_url(path) else 200_000_000)
    (line,) = problems(plan, Cluster(HEAD, SMALL, Machine("10.0.0.4", SMALL.resources, {})))
    # 8 workers a node, each with a tar of half of the pool, which has but two
    assert line.startswith(
        "nodes 10.0.0.2, 10.0.0.4: 200 MB are free in its temporary folder, expected about 530 MB for the files that pool"
    )
    assert not problems(plan_of(tmp_path, f"root={s3_url}/root"), Cluster(SMALL))


def test_what_workers_read_is_known(tmp_path):
    tasks = write_files(
        tmp_path / "tasks" / "shapes",
        {
            "classnames.txt": "star\nbox\n",
            "zeroshot_classification_templates.txt": "a {c}.\n",
            "test/nshards.txt": "1\n",
            "test/0.tar": bytes(10240),
        },
    )
    (tmp_path / "weights.pt").write_bytes(b"weights")
    (tmp_path / "domains.txt").write_text("example.org\n")
    (tmp_path / "takedowns.txt").write_text("0" * 32 + "\n")
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(bytes(5000))
    (photos / "a.txt").write_text("a photo of nothing much")
    plan = plan_of(
        tmp_path,
        f"models={{given: {{architecture: ViT-B-32, pretrained: {tmp_path}/weights.pt}}}}",
        f"stages=[language, {{name: clip, model: given}}, {{name: domain_list, path: {tmp_path}/domains.txt}}]",
        f"references.trusted.source={{mine: {photos}}}",
        f"exclude.uids={tmp_path}/takedowns.txt",
        "strategies={no_filter: {}, trusted_only: {reference: trusted}}",
        "compare=[no_filter, trusted_only]",
        f"eval={{root: {pathlib.Path(tasks).parent}, tasks: [shapes]}}",
    )
    needs = {(need.place, need.path) for step in plan.steps.values() for need in preflight.needs(plan, step)}
    assert needs == {
        ("models.given.pretrained", f"{tmp_path}/weights.pt"),
        ("stages.domain_list.path", f"{tmp_path}/domains.txt"),
        ("references.trusted.source.mine", f"{photos}/a.jpg"),
        ("exclude.uids", f"{tmp_path}/takedowns.txt"),
        ("eval.tasks: shapes", f"{tasks}/classnames.txt"),
        ("eval.tasks: shapes", f"{tasks}/zeroshot_classification_templates.txt"),
        ("eval.tasks: shapes", f"{tasks}/test/0.tar"),
    }
    assert not problems(plan, Cluster(SMALL))
    shutil.rmtree(tasks)
    lines = problems(plan, Cluster(SMALL, GPUS), ["images/shapes", "hashes" if "hashes" in plan.steps else "language"])
    assert len(lines) == 3
    assert all(line.startswith("nodes 10.0.0.2, 10.0.0.3: eval.tasks: shapes = ") for line in lines)
    assert "can't be read there, expected it on all nodes: FileNotFoundError" in lines[0]
    labelled = plan.config.model_copy(update={"cluster": {"eval": Resources(labels={"zone": "b"})}})
    import dataclasses

    lines = problems(dataclasses.replace(plan, config=labelled), Cluster(SMALL, GPUS), ["images/shapes"])
    assert len(lines) == 3 and all(line.startswith("node 10.0.0.3: ") for line in lines)


def test_a_url_is_read_on_the_nodes(tmp_path, s3_url):
    storage.write_bytes(f"{s3_url}/weights.pt", b"weights")
    model = f"models={{given: {{architecture: ViT-B-32, pretrained: '{s3_url}/weights.pt'}}}}"
    plan = plan_of(tmp_path, model, "stages=[{name: clip, model: given}]", "strategies={no_filter: {}}", "compare=[no_filter]", f"root={s3_url}/root")  # fmt: skip
    assert not problems(plan, Cluster(SMALL))
    storage.delete(f"{s3_url}/weights.pt")
    (line,) = problems(plan, Cluster(SMALL))
    assert line.startswith(f"node 10.0.0.2: models.given.pretrained = {s3_url}/weights.pt can't be read there")
    assert storage.list_files(s3_url, recursive=True) == []  # no probe is left


class Deaf(Cluster):
    """One machine raises."""

    def on_each_machine(self, function, *arguments):
        return [*super().on_each_machine(function, *arguments)[:-1], (self.there[-1].name, OSError("no such module"))]


def test_a_node_that_can_not_answer_is_named_and_no_probe_is_left(tmp_path):
    (line,) = problems(plan_of(tmp_path), Deaf(SMALL, GPUS))
    assert line == "node 10.0.0.3: it can't be asked about itself: OSError: no such module"
    assert not problems(plan_of(tmp_path), Deaf(SMALL, HEAD))  # it would run nothing
    assert problems(plan_of(tmp_path, "cluster.train={workers: 2}"), Deaf(SMALL, HEAD))  # but this one's driver
    assert not (tmp_path / "root").exists()


def test_a_root_that_can_not_be_written_is_one_line(tmp_path):
    plan = plan_of(tmp_path)
    statuses = states.resolve(plan)
    (tmp_path / "root").write_text("a file")
    message = r"root = .*root, expected a folder that can be written"
    with pytest.raises(preflight.PreflightError, match=message):
        preflight.check(plan, list(plan.steps), statuses, Cluster(SMALL))
    with pytest.raises(preflight.PreflightError, match=message):
        preflight.show(plan, list(plan.steps))


def test_a_refused_run_leaves_no_run(tmp_path, monkeypatch, capsys):
    """Each problem is an error of its own on the screen, and exit code 2."""
    from pipeline.run import main

    engine = EngineHere([Machine("this machine", {"CPU": 2.0}, {})])
    engine.close = lambda: None
    monkeypatch.setattr(execute, "Engine", lambda *_: engine)
    settings = [f"root={tmp_path}/root", "cluster={clip: {cpus: 3}, train: {gpus: 1}}"]
    code = main(["--config", str(TINY), *(word for setting in settings for word in ("--set", setting))])
    assert code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert lines == [
        "error: cluster.train.gpus = 1, expected at most the 0 of this machine",
        "error: cluster.clip.cpus = 3, expected at most the 2 of this machine",
    ]
    assert [str(path.relative_to(tmp_path)) for path in sorted(tmp_path.rglob("*"))] == ["root", "root/runs"]


# On a real cluster.


class OddCluster(cluster_fixture.LocalCluster):
    """A cluster to which nodes can be added that are unlike the others."""

    before = ()  # the command that starts a node: what stands before it is done again with it

    def add_odd_node(self, env=(), hidden=()):
        """The name of a node with these `KEY=VALUE`, which sees empty folders in place of the hidden ones."""
        mounts = "".join(f"mount -t tmpfs none {folder} && " for folder in hidden)
        self.before = ("unshare", "--mount", "sh", "-c", f'{mounts} exec "$@"', "sh") if hidden else ()
        self.before += ("env", *env)
        try:
            return self.add_node(wait=False)
        finally:
            self.before = ()

    def _launch(self, name, command):
        super()._launch(name, [*self.before, *command])


def may_mount():
    """Whether a process here can have mounts of its own."""
    probe = ["unshare", "--mount", "sh", "-c", "mount -t tmpfs none /mnt"]
    return shutil.which("unshare") is not None and subprocess.run(probe, capture_output=True).returncode == 0


def command(root, *settings, more=()):
    words = [word for setting in (f"root={root}", *settings) for word in ("--set", setting)]
    return [sys.executable, "pipeline/run.py", "--config", str(TINY), *words, *more]


@pytest.mark.ray
def test_nodes_that_will_not_do_are_named_before_any_work(tmp_path):
    """First a request that fits nothing; then nodes with another package, without the root, without the weights."""
    root, shared = tmp_path / "root", tmp_path / "shared"
    for folder in (root, shared):
        folder.mkdir()
    (shared / "weights.pt").write_bytes(b"weights")
    other = tmp_path / "other" / "numpy-99.1.dist-info"
    other.mkdir(parents=True)
    (other / "METADATA").write_text("Metadata-Version: 2.1\nName: numpy\nVersion: 99.1\n")
    model = f"models={{scorer: {{architecture: ViT-B-32, pretrained: {shared}/weights.pt}}}}"
    with OddCluster(workers=1) as cluster:

        def run(*settings, more=()):
            return subprocess.run(
                command(root, model, *settings, more=more),
                cwd=cluster_fixture.ROOT,
                env=cluster.environment,
                capture_output=True,
                text=True,
                timeout=600,
            )

        refused = run("cluster.clip={cpus: 3}")
        assert refused.returncode == 2, refused.stdout + refused.stderr
        (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
        assert re.fullmatch(
            r"error: cluster\.clip\.cpus = 3, expected at most the 1 of the largest machine, [\d.]+ \(\w{8}\)",
            line,
        )
        assert "FAILED" not in refused.stderr and [path.name for path in root.rglob("*")] == ["runs"]

        shadowed = cluster.add_odd_node(env=[f"PYTHONPATH={tmp_path}/other"])
        hiding = cluster.add_odd_node(hidden=(root, shared)) if may_mount() else None
        odd = [name for name in (shadowed, hiding) if name]
        cluster_fixture.wait_for(lambda: set(odd) <= set(cluster.nodes()), f"the nodes {odd}")
        nodes = {name: rf"node [\d.]+ \({node_id[:8]}\): " for name, node_id in cluster.nodes().items()}
        looked = run(more=["--plan"])
        assert looked.returncode == 2, looked.stdout + looked.stderr
        found = [line.removeprefix("error: ") for line in looked.stderr.splitlines() if line.startswith("error: ")]
        expected = [rf"{nodes[shadowed]}numpy 99\.1, expected .* as on the driver; use one image for all nodes"]
        if hiding:
            start = nodes[hiding]
            expected += [
                rf"{start}root = {root} is not what it is on the driver, expected one .*: FileNotFoundError: .*",
                rf"{start}models\.scorer\.pretrained = {shared}/weights\.pt can't be read there, .*",
            ]
        assert len(found) == len(expected), found
        for pattern in expected:
            assert [line for line in found if re.fullmatch(pattern, line)], (pattern, found)
        assert "to come: " in looked.stdout
        assert [path.name for path in root.rglob("*")] == ["runs"]  # no probe is left
