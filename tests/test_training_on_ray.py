"""One training on two Ray workers that are lost: the driver, a worker, a whole node; and errors of one of them."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from pipeline.core import storage
from pipeline.core.config import Resources
from pipeline.core.errors import WinnowError
from tests.training_fixture import on_ranks, recipe, train_rank, write_train_set
from training.recipe import Seeds
from training.worker import MAX_FAILURES, Failures, root_cause, train_on_ray

ROOT = pathlib.Path(__file__).resolve().parent.parent  # not the conftest's: it drops RAY_ variables, in workers too
TWO_WORKERS, FIXED = Resources(cpus=1, workers=2, min_workers=1), Resources(cpus=1, workers=2)
WEIGHTS = "open_clip_model.safetensors"
LONG = {"samples_seen": 2400}  # 300 steps, a line every third
NODE = {"num_cpus": 1, "object_store_memory": 80_000_000}


@pytest.fixture(scope="module")
def train_set_path(tmp_path_factory):
    return write_train_set(str(tmp_path_factory.mktemp("train_set")), 50)


@pytest.fixture(scope="module")
def uninterrupted(train_set_path, tmp_path_factory):
    """The folder of a training on two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    on_ranks(2, train_rank, train_set_path, str(folder), {}, {})
    return folder


@pytest.fixture(scope="module")
def cluster():
    """A Ray of two nodes of one CPU, to which this process is connected."""
    import ray
    from ray.cluster_utils import Cluster

    environment = {
        "PYTHONPATH": str(ROOT),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
        "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "4",  # a lost node still counts as there for up to 20 s
        "RAY_health_check_period_ms": "1000",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
        try:
            cluster.add_node(**NODE)
            ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
            yield cluster
        finally:
            ray.shutdown()
            cluster.shutdown()


def note(folder, line):
    with open(f"{folder}/steps", "a") as file:
        file.write(f"{line['step']}\n")


def noted(folder):
    return [int(step) for step in (folder / "steps").read_text().split()]


def wait_at(steps, folder, line):
    """At each of `steps`, the first time that it comes, rank 0 waits for being killed."""
    note(folder, line)
    place = pathlib.Path(folder) / f"waits_at_{line['step']}"
    if line["step"] in steps and not place.exists():
        storage.write_bytes(str(place), str(os.getpid()).encode())
        time.sleep(600)


def wait_for_state(step, out_path, folder, line):
    """From the step on each line takes a second, until there is a state: then, once, rank 0 waits for being killed."""
    note(folder, line)
    found = pathlib.Path(folder) / "state"
    if line["step"] < step or found.exists():
        return
    storage.write_bytes(f"{folder}/waits_at_{step}", str(os.getpid()).encode())
    time.sleep(1)
    if states := [name for name in storage.list_folders(out_path) if name.startswith("step_")]:
        storage.write_bytes(str(found), states[-1].encode())
        time.sleep(600)


def fail_at(step, folder, line):
    note(folder, line)
    if line["step"] == step:
        raise WinnowError(f"step = {step}, expected none of it")


def process_that_waits(folder, step, alive=lambda: True):
    """The process of rank 0, once it waits at the step."""
    place = pathlib.Path(folder) / f"waits_at_{step}"
    wait_for(place.exists, alive)
    return int(place.read_text())


def wait_for(condition, alive=lambda: True):
    deadline = time.monotonic() + 300
    while not condition():
        assert alive()
        assert time.monotonic() < deadline, "what was waited for did not come"
        time.sleep(0.02)


@contextlib.contextmanager
def in_background(function, *arguments, **options):
    """A future of the function's result, waited for at the end."""
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function, *arguments, **options)


def lines(folder):
    return [json.loads(line) for line in storage.read_bytes(f"{folder}/metrics.jsonl").decode().splitlines()]


@pytest.mark.ray
def test_lost_workers_and_a_lost_node_change_nothing(cluster, train_set_path, uninterrupted, tmp_path):
    """A worker is killed at step 6, the node of one removed for good at step 9: one worker ends what two began."""
    out_path = tmp_path / "checkpoint"
    arguments = (train_set_path, str(out_path), recipe(), Seeds(0, 0), TWO_WORKERS)
    report = functools.partial(wait_at, (6, 9), str(tmp_path))
    with in_background(train_on_ray, *arguments, report=report, checkpoint_every_steps=2) as future:
        os.kill(process_that_waits(tmp_path, 6, lambda: not future.done()), signal.SIGKILL)
        process_that_waits(tmp_path, 9, lambda: not future.done())
        (node,) = cluster.worker_nodes
        cluster.remove_node(node, allow_graceful=False)
        facts = future.result()
    assert (facts["num_workers"], facts["samples_seen"], facts["resumed_at_step"]) == (1, 100, 8)
    assert (facts["unique_uids"], facts["max_repeats"]) == (50, 2)
    assert noted(tmp_path) == [*range(1, 7), *range(5, 10), *range(9, 14)]
    assert storage.list_folders(str(out_path)) == ["open_clip"]

    assert storage.read_json(f"{out_path}/ledger.json") == storage.read_json(f"{uninterrupted}/ledger.json")
    found, expected = lines(out_path), lines(uninterrupted)
    for name in ("step", "samples_seen", "lr"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    losses = [[line["loss"] for line in place] for place in (found, expected)]
    assert losses[0][:8] == pytest.approx(losses[1][:8], rel=1e-6)  # of two workers each
    assert losses[0] == pytest.approx(losses[1], rel=2e-4)
    found, expected = (load_file(f"{place}/open_clip/{WEIGHTS}") for place in (out_path, uninterrupted))
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-4)


DRIVER = """
import functools, sys
import ray
from tests.test_training_on_ray import FIXED, recipe, train_on_ray, wait_at
from training.recipe import Seeds
address, train_set_path, out_path, notes = sys.argv[1:]
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
report = functools.partial(wait_at, (6,), notes)
train_on_ray(train_set_path, out_path, recipe(), Seeds(0, 0), FIXED, report=report, checkpoint_every_steps=2)
"""


@pytest.mark.ray
@pytest.mark.slow
def test_a_killed_driver_and_a_final_error_leave_step_checkpoints_only(cluster, train_set_path, tmp_path):
    """The driver is killed at step 6; the next one goes on at step 5, and has what a worker raises at once."""
    if not cluster.worker_nodes:
        cluster.add_node(**NODE)
    out_path = str(tmp_path / "checkpoint")
    command = [sys.executable, "-c", DRIVER, cluster.address, train_set_path, out_path, str(tmp_path)]
    driver = subprocess.Popen(command, cwd=ROOT)
    try:
        process_that_waits(tmp_path, 6, lambda: driver.poll() is None)
    finally:
        os.kill(driver.pid, signal.SIGKILL)
        driver.wait()
    assert storage.list_folders(out_path) == ["ray_train", "step_00000002", "step_00000004"]

    report = functools.partial(fail_at, 6, str(tmp_path))
    with pytest.raises(WinnowError, match=r"^step = 6, expected none of it$"):
        train_on_ray(train_set_path, out_path, recipe(), Seeds(0, 0), FIXED, report=report, checkpoint_every_steps=2)
    assert noted(tmp_path) == [*range(1, 7), 5, 6]
    assert storage.list_folders(out_path) == ["step_00000002", "step_00000004"]


ENGINE = """
import functools, json, sys
from pipeline import remote
from pipeline.core.config import Resources
from pipeline.core.engine import Engine
from tests.test_training_on_ray import LONG, recipe, wait_for_state
from training.recipe import Seeds
train_set_path, out_path, notes = sys.argv[1:]
report = functools.partial(wait_for_state, 6, out_path, notes)
engine = Engine(lambda name, cause: print(f"{name}: {cause}"))
arguments = (train_set_path, out_path, recipe(**LONG), Seeds(0, 0), "cpu", 1, report, {})
print(json.dumps(engine.map(remote.train_one, [arguments], ["training"], Resources())[0]))
"""


@contextlib.contextmanager
def ended(command, environment, **options):
    """A process of its own group, which is ended with the block."""
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **options)
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def assert_went_on(folder, facts):
    """From the state that was saved after Ray was told: no line before it came twice."""
    state = int((folder / "state").read_text().removeprefix("step_"))
    assert facts["resumed_at_step"] == state > 6
    steps = noted(folder)
    again = next(place for place, (step, later) in enumerate(itertools.pairwise(steps), 1) if later <= step)
    assert state < steps[again] <= steps[again - 1]
    assert steps[-1] == facts["steps"]
    assert storage.list_folders(str(folder / "checkpoint")) == ["open_clip"]


@pytest.mark.ray
@pytest.mark.slow
def test_trainings_that_each_take_the_whole_cluster_take_turns(cluster, train_set_path, tmp_path):
    """Neither holds a part of what the other waits for."""
    from concurrent.futures import ThreadPoolExecutor

    if not cluster.worker_nodes:
        cluster.add_node(**NODE)
    report, short = functools.partial(note, str(tmp_path)), recipe(samples_seen=16)
    with ThreadPoolExecutor(2) as pool:
        trainings = [
            pool.submit(train_on_ray, train_set_path, str(tmp_path / name), short, Seeds(0, 0), FIXED, report=report)
            for name in ("one", "other")
        ]
    assert [training.result()["num_workers"] for training in trainings] == [2, 2]
    assert noted(tmp_path) == [1, 2, 1, 2]


@pytest.mark.ray
@pytest.mark.slow
def test_a_preempted_node_of_two_workers_saves_a_state_first(cluster, train_set_path, tmp_path):
    """Ray is told that it will go, and it goes: one worker ends what two began, with all that they did."""
    import ray
    from ray.core.generated.autoscaler_pb2 import DrainNodeReason

    if not cluster.worker_nodes:
        cluster.add_node(**NODE)
    (node,) = cluster.worker_nodes
    out_path = str(tmp_path / "checkpoint")
    report = functools.partial(wait_for_state, 6, out_path, str(tmp_path))
    arguments = (train_set_path, out_path, recipe(**LONG), Seeds(0, 0), TWO_WORKERS)
    with in_background(train_on_ray, *arguments, report=report) as future:
        process_that_waits(tmp_path, 6, lambda: not future.done())
        assert storage.list_folders(out_path) == ["ray_train"]
        preempted, deadline_ms = DrainNodeReason.DRAIN_NODE_REASON_PREEMPTION, int(1000 * (time.time() + 10))
        ray._private.worker.global_worker.gcs_client.drain_node(node.node_id, preempted, "spot", deadline_ms)
        wait_for((tmp_path / "state").exists, lambda: not future.done())
        cluster.remove_node(node, allow_graceful=False)
        facts = future.result()
    assert facts["num_workers"] == 1
    assert_went_on(tmp_path, facts)


@pytest.mark.ray
@pytest.mark.slow
def test_a_machine_that_is_told_to_go_saves_a_state_first(cluster, train_set_path, tmp_path):
    """SIGTERM to the node of a training of one worker, as Kubernetes sends it: Ray drains it for a while, then it ends."""
    import ray
    from ray.util import placement_group, remove_placement_group

    out_path, started = tmp_path / "checkpoint", pathlib.Path(sys.executable).parent / "ray"
    environment = os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "15", "RAY_ADDRESS": cluster.address}
    start = [started, "start", "--block", f"--address={cluster.address}", "--num-cpus=1"]
    command = [sys.executable, "-c", ENGINE, train_set_path, str(out_path), str(tmp_path)]
    held = placement_group([{"CPU": 1}] * int(ray.cluster_resources()["CPU"]))  # so that it runs on the new node
    assert held.wait(60)
    with contextlib.ExitStack() as processes:
        node = processes.enter_context(ended(start, environment))
        driver = processes.enter_context(ended(command, environment, stdout=subprocess.PIPE, text=True))
        process_that_waits(tmp_path, 6, lambda: driver.poll() is None)
        assert storage.list_folders(str(out_path)) == []
        node.send_signal(signal.SIGTERM)
        wait_for((tmp_path / "state").exists, lambda: node.poll() is None and driver.poll() is None)
        remove_placement_group(held)
        output, _ = driver.communicate(timeout=300)
    assert driver.returncode == 0
    *told, facts = output.splitlines()
    assert told == ["training: its machine was lost"]
    assert_went_on(tmp_path, json.loads(facts))


def test_failures_end_a_training_that_does_not_get_on(tmp_path):
    """Lost workers end it only when there is no new state between them; announced preemptions never; our errors at once."""
    from ray.exceptions import OutOfMemoryError, RayActorError
    from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError

    lost = RayActorError(error_msg="The actor died")
    died, told = (WorkerHealthCheckFailedError("", error) for error in (lost, RayActorError(preempted=True)))
    peer = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    failures, own = Failures(str(tmp_path)), WinnowError("a fault of the train set")
    for step in (3, 12, 100):
        for _ in range(MAX_FAILURES):
            assert failures.final({0: peer, 1: died}) is None
            assert failures.final({0: peer, 1: told}) is None
        storage.write_bytes(f"{tmp_path}/step_{step:08d}/state.pt", b"")
    for _ in range(MAX_FAILURES):
        assert failures.final({0: peer, 1: died}) is None
    assert str(failures.final({0: peer, 1: died})) == f"{tmp_path}: training failed: RayActorError: The actor died"
    killed = OutOfMemoryError("1 worker(s) were killed due to the node running low on memory.\nA page of advice")
    expected = "too little memory, expected more cluster.train.memory_gb, .* low on memory.$"
    assert re.search(expected, str(failures.final({0: peer, 1: WorkerHealthCheckFailedError("", killed)})))
    assert Failures(str(tmp_path)).final({0: peer, 1: own}) is own
    own.transient = True
    assert Failures(str(tmp_path)).final({0: own}) is None


def test_the_cause_is_not_what_a_peer_tells_of_it():
    own = ValueError("a fault of our own")
    lost = RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1234")
    assert root_cause(lost, own, lost) is own
    assert root_cause(torch.distributed.DistBackendError("NCCL"), own) is own
    assert root_cause(lost) is lost
