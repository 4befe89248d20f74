"""States and kept models: kills at random moments, altered files, other numbers of ranks, object stores, full disks."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from pipeline.core import storage
from pipeline.core.errors import WinnowError
from tests.training_fixture import in_child, on_ranks, recipe, train_rank, write_train_set
from training import checkpoint
from training.loop import train
from training.recipe import Seeds
from training.watch import TIMED

OWN = {"num_checkpoints": 3, "ema_decay": 0.9, "loss": "siglip", "patch_dropout": 0.5}
KEPT = ["open_clip", "open_clip_32", "open_clip_64"]  # after 4, 8 and 13 of 13 steps
KILLS = 3  # of each sort
MOST_CALLS = 250_000  # of any function between a child's first step and its death: two steps or so
MOST_FILE_CALLS = 14_000  # of those in modules that write files: two steps or so, too
FILE_MODULES = ("checkpoint.py", "storage.py", "clip_model.py")


@pytest.fixture(scope="module")
def train_set_path(tmp_path_factory):
    return write_train_set(str(tmp_path_factory.mktemp("train_set")), 50)


@pytest.fixture(scope="module")
def uninterrupted(train_set_path, tmp_path_factory):
    """The folder of a training that nothing disturbed."""
    folder = str(tmp_path_factory.mktemp("checkpoint"))
    train(train_set_path, folder, recipe(**OWN), Seeds(0, 0), batch_size=3)
    return folder


def assert_same_files(out_path, expected_path):
    """All kept models to the byte, the ledger, and the lines but for their clocks."""
    assert storage.list_folders(out_path) == storage.list_folders(expected_path) == KEPT
    for name in storage.list_files(expected_path, recursive=True):
        if name != "metrics.jsonl":
            found = storage.read_bytes(storage.join(out_path, name))
            assert found == storage.read_bytes(storage.join(expected_path, name)), name
    timed = {*TIMED, "alarm"}  # an alarm may be of the time that data took
    found, expected = (
        [{name: line[name] for name in line.keys() - timed} for line in lines(path)]
        for path in (out_path, expected_path)
    )
    assert found == expected


def lines(out_path):
    text = storage.read_bytes(storage.join(out_path, "metrics.jsonl")).decode()
    return [json.loads(line) for line in text.splitlines()]


def train_until_call(train_set_path, out_path, num_calls, of_files):
    """Trains, saving a state a step, and kills its own process at the num_calls-th call after its first step."""
    count = itertools.count()

    def on_event(frame, event, argument):
        if of_files and os.path.basename(frame.f_code.co_filename) not in FILE_MODULES:
            return
        if next(count) == num_calls:
            os.kill(os.getpid(), signal.SIGKILL)

    train(
        train_set_path,
        out_path,
        recipe(**OWN),
        Seeds(0, 0),
        batch_size=3,
        checkpoint_every_steps=1,
        report=lambda line: sys.setprofile(on_event),
    )


def test_kills_at_random_moments(train_set_path, uninterrupted, tmp_path):
    """Between any two calls of any function, and while a state, its checksum or a kept model is written."""
    out_path, draws, newest = str(tmp_path), random.Random(4), []
    for most, of_files in [(MOST_CALLS, False), (MOST_FILE_CALLS, True)] * KILLS:
        died = in_child(train_until_call, train_set_path, out_path, draws.randrange(most), of_files)
        assert died == -signal.SIGKILL
        newest.append(max((name for name in storage.list_folders(out_path) if name.startswith("step")), default=""))
    assert len(set(newest)) > 2  # it got on between kills
    facts = train(train_set_path, out_path, recipe(**OWN), Seeds(0, 0), batch_size=3)
    assert facts["resumed_at_step"] > 0
    assert_same_files(out_path, uninterrupted)


def train_with_a_state_a_step(train_set_path, out_path):
    train(train_set_path, out_path, recipe(**OWN), Seeds(0, 0), batch_size=3, checkpoint_every_steps=1)


def test_two_at_once_in_one_folder(train_set_path, uninterrupted, tmp_path):
    """As for some seconds after a driver was killed and the same command given again: neither harms the other."""
    processes = [
        multiprocessing.get_context("spawn").Process(
            target=train_with_a_state_a_step, args=(train_set_path, str(tmp_path))
        )
        for _ in range(2)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert_same_files(str(tmp_path), uninterrupted)


def test_a_machine_that_will_go_makes_states_due(train_set_path, uninterrupted, tmp_path, monkeypatch):
    """From when it is known to when it is not, and not before; nothing of the result changes."""
    monkeypatch.setattr(checkpoint, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "LEAVING_EVERY_S", 0.0)
    monkeypatch.setattr(checkpoint, "SAVING_FACTOR", 0.0)
    reached, newest = [0], {}

    def see(line):
        reached.append(line["step"])
        newest[line["step"]] = max(
            (name for name in storage.list_folders(str(tmp_path)) if "step_" in name), default=""
        )

    options = {"batch_size": 3, "checkpoint_every_s": 1e6, "report": see}
    train(train_set_path, str(tmp_path), recipe(**OWN), Seeds(0, 0), leaving=lambda: 4 <= reached[-1] < 8, **options)
    assert newest == {step: f"step_{min(step - 1, 7):08d}" if step > 4 else "" for step in range(1, 14)}
    assert_same_files(str(tmp_path), uninterrupted)


@pytest.mark.parametrize(("every_s", "took_s", "due_s"), [(300, 0.1, 5), (300, 20, 40), (300, 1000, 300), (3, 0.1, 3)])
def test_how_often_states_are_due_while_a_machine_will_go(every_s, took_s, due_s, monkeypatch):
    """Soon, but most of the time is left to the training however long it takes to save a state; asked once a second."""
    now_s, asked, leaves = [1000.0], [], [False]

    def leaving():
        asked.append(now_s[0])
        return leaves[0]

    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now_s[0])
    schedule = checkpoint.Schedule(every_s, leaving)
    with schedule.saving():
        now_s[0] += took_s
    saved_s = now_s[0]
    now_s[0] = saved_s + every_s
    assert not schedule.is_due()
    now_s[0] += 0.01
    assert schedule.is_due()

    leaves[0], now_s[0] = True, now_s[0] + 1
    with schedule.saving():
        now_s[0] += took_s
    saved_s, asked[:] = now_s[0], []
    for place in range(round(due_s * 10) + 1):
        now_s[0] = saved_s + place / 10
        assert not schedule.is_due()
    now_s[0] += 0.1
    assert schedule.is_due()
    assert all(later - sooner >= checkpoint.LOOK_EVERY_S for sooner, later in itertools.pairwise(asked))
    assert len(asked) >= due_s / 1.2


def save_without_checksum(out_path, step):
    def kill(path, data):
        os.kill(os.getpid(), signal.SIGKILL)

    storage.write_bytes = kill
    checkpoint.save(out_path, step, state_of(step))


def state_of(step):
    return {"identity": "mine", "step": step, "weights": torch.full((100,), float(step))}


def test_killed_between_a_state_and_its_checksum(tmp_path):
    """Such states are passed over, and do not crowd out whole ones, however many and however new they are."""
    out_path = str(tmp_path)
    checkpoint.save(out_path, 4, state_of(4))
    for step in (9, 8, 6):
        assert in_child(save_without_checksum, out_path, step) == -signal.SIGKILL
        assert storage.exists(f"{out_path}/step_{step:08d}/state.pt")
        assert checkpoint.load_newest(out_path, "mine")["step"] == 4
    for step, kept in ((5, {4, 5}), (7, {5, 7}), (10, {7, 10})):
        checkpoint.save(out_path, step, state_of(step))
        assert checkpoint.load_newest(out_path, "mine")["step"] == step
        left = {leftover for leftover in (6, 8, 9) if leftover > step}
        assert {int(name[5:]) for name in storage.list_folders(out_path)} == kept | left


@pytest.mark.parametrize("where", ["local", "s3"])
def test_altered_states_are_passed_over(where, tmp_path, request):
    out_path = str(tmp_path / "states") if where == "local" else request.getfixturevalue("s3_url") + "/states"
    assert checkpoint.load_newest(out_path, "mine") is None
    for step in (1, 2, 3):
        checkpoint.save(out_path, step, state_of(step))
    assert storage.list_folders(out_path) == ["step_00000002", "step_00000003"]
    newest = storage.join(out_path, "step_00000003", "state.pt")
    data = bytearray(storage.read_bytes(newest))
    for altered in (data[:-1], data[:999] + bytes([data[999] ^ 1]) + data[1000:], b""):
        storage.write_bytes(newest, bytes(altered))
        assert checkpoint.load_newest(out_path, "mine")["step"] == 2
    storage.delete(newest)
    assert checkpoint.load_newest(out_path, "mine")["step"] == 2
    assert checkpoint.load_newest(out_path, "of another recipe") is None
    checkpoint.save(out_path, 3, state_of(3))  # where its leftovers are
    assert torch.equal(checkpoint.load_newest(out_path, "mine")["weights"], state_of(3)["weights"])
    checkpoint.delete_all(out_path)
    assert storage.list_folders(out_path) == []


class StoppedError(Exception):
    pass


@dataclass(frozen=True)
class StopAt:
    """A report that ends the training, of all ranks, after the line of a step."""

    step: int

    def __call__(self, line):
        if line["step"] == self.step:
            raise StoppedError


def test_on_an_object_store(uninterrupted, train_set_path, s3_url):
    """Train set, states and kept models; the newest state is corrupt."""
    remote, out_path = f"{s3_url}/train_set", f"{s3_url}/checkpoint"
    for name in storage.list_files(train_set_path):
        storage.write_bytes(f"{remote}/{name}", storage.read_bytes(f"{train_set_path}/{name}"))
    with pytest.raises(StoppedError):
        options = {"batch_size": 3, "checkpoint_every_steps": 2, "report": StopAt(9)}
        train(remote, out_path, recipe(**OWN), Seeds(0, 0), **options)
    assert storage.list_folders(out_path) == [*KEPT[1:], "step_00000006", "step_00000008"]
    storage.write_bytes(f"{out_path}/step_00000008/state.pt", b"cut short")
    assert train(remote, out_path, recipe(**OWN), Seeds(0, 0), batch_size=3)["resumed_at_step"] == 6
    assert_same_files(out_path, uninterrupted)


@pytest.mark.parametrize("own", [{"lr": 2e-3}, {"samples_seen": 99}, {"ema_decay": 0.8}])
def test_another_recipe_or_seed_does_not_resume(own, train_set_path, tmp_path):
    with pytest.raises(StoppedError):
        train(train_set_path, str(tmp_path), recipe(), Seeds(0, 0), checkpoint_every_steps=2, report=StopAt(5))
    with pytest.raises(StoppedError):
        train(train_set_path, str(tmp_path), recipe(**own), Seeds(0, 0), report=StopAt(1))  # so it began anew
    with pytest.raises(StoppedError):
        train(train_set_path, str(tmp_path), recipe(), Seeds(0, 1), report=StopAt(1))


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 3)])
def test_resume_with_another_number_of_ranks(before, after, train_set_path, tmp_path):
    """The ledger is the same to the byte, the weights up to the order of sums."""
    own = {"grad_clip_norm": 1.0, "ema_decay": 0.9, "global_batch_size": 7, "samples_seen": 99}
    out_path, alone = str(tmp_path / "out"), str(tmp_path / "alone")
    train(train_set_path, alone, recipe(**own), Seeds(0, 0))
    stop = {"checkpoint_every_steps": 2, "report": StopAt(7)}
    if before == 1:
        with pytest.raises(StoppedError):
            train(train_set_path, out_path, recipe(**own), Seeds(0, 0), **stop)
    else:
        with pytest.raises(torch.multiprocessing.ProcessRaisedException):
            on_ranks(before, train_rank, train_set_path, out_path, own, stop)
    if after == 1:
        facts = [train(train_set_path, out_path, recipe(**own), Seeds(0, 0))]
    else:
        facts = on_ranks(after, train_rank, train_set_path, out_path, own, {})
    assert facts[0]["resumed_at_step"] == 6
    assert storage.read_bytes(f"{out_path}/ledger.json") == storage.read_bytes(f"{alone}/ledger.json")
    assert [line["samples_seen"] for line in lines(out_path)] == [line["samples_seen"] for line in lines(alone)]
    losses = [[line["loss"] for line in lines(path)] for path in (out_path, alone)]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4, atol=1e-6)
    found, expected = (load_file(f"{path}/open_clip/open_clip_model.safetensors") for path in (out_path, alone))
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-4)


def train_on_a_full_disk(train_set_path, out_path, most_bytes, every_steps, own, message_path):
    resource.setrlimit(resource.RLIMIT_FSIZE, (most_bytes, most_bytes))
    try:
        train(train_set_path, out_path, recipe(**own), Seeds(0, 0), checkpoint_every_steps=every_steps)
    except WinnowError as error:
        with open(message_path, "w") as file:
            file.write(str(error))


@pytest.mark.parametrize(
    ("most_bytes", "every_steps", "own", "named"),
    [
        (200_000, 2, {}, "step_00000002/state.pt"),
        (1_000_000, 2, {"num_checkpoints": 13}, "open_clip_8"),
        (2_000, 9, {}, "metrics.jsonl"),
    ],
)
def test_a_full_disk_is_one_clear_line(most_bytes, every_steps, own, named, train_set_path, tmp_path):
    """With nothing half-written that counts: the same command goes on once there is space."""
    out_path, message_path = str(tmp_path / "out"), str(tmp_path / "message")
    assert in_child(train_on_a_full_disk, train_set_path, out_path, most_bytes, every_steps, own, message_path) == 0
    message = storage.read_bytes(message_path).decode()
    assert message.startswith(f"{out_path}/{named} can't be written: OSError: [Errno 27] File too large")
    assert "\n" not in message
    assert not [name for name in storage.list_files(out_path, recursive=True) if storage.TEMPORARY_MARK in name]
    assert checkpoint.load_newest(out_path, "any") is None
    assert not storage.exists(f"{out_path}/open_clip/open_clip_model.safetensors")
