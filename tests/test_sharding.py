"""Parameters split over ranks: what one rank computes, and states and models that any number of ranks can take."""

from __future__ import annotations

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import distributed
from torch.distributed.fsdp import FSDPModule

from pipeline.core import storage
from pipeline.core.errors import ConfigError
from tests.pool_fixture import drawing, write_pool
from tests.test_step import NUM_PAIRS, assert_close, make_batch, make_learner, take_steps
from tests.training_fixture import MODEL, on_ranks, recipe, train_rank, write_train_set
from training import recipe as recipes
from training import sharding
from training.loop import train
from training.recipe import Seeds

CASES = {
    "clip": {},
    "siglip": {"loss": "siglip", "grad_checkpointing": True},
    "clipped": {"grad_clip_norm": 0.01},
}
CUTS = [(NUM_PAIRS, None), (NUM_PAIRS, 1), (1, None)]  # pairs, and the most of one forward pass
EMA = {"ema_decay": 0.9, "loss": "siglip", "grad_clip_norm": 0.5}


def sharded(own, rank, world_size, **options):
    return make_learner({**own, "shard_parameters": True}, rank=rank, world_size=world_size, **options)


def held_bytes(learner):
    """Of the memory behind a rank's weights and moments, whatever of it is in use."""
    state = learner.optimizer.state
    moments = [value for values in state.values() for name, value in values.items() if name.startswith("exp_avg")]
    return sum(
        value.untyped_storage().nbytes() for value in sharding.local([*learner.model.state_dict().values(), *moments])
    )


def steps_on_rank(rank, world_size):
    found = {}
    for case, own in CASES.items():
        for num_pairs, batch_size in CUTS:
            learner = sharded(own, rank, world_size, batch_size=batch_size)
            taken = learner.take_step(make_batch(0, num_pairs, rank, world_size), want_norm=True)
            distributed.all_reduce(taken.loss)
            found[f"{case} {num_pairs} {batch_size}"] = {
                "loss": taken.loss / world_size,
                "norm": taken.grad_norm,
                **{name: sharding.gathered(value.grad) for name, value in learner.model.named_parameters()},
            }
    learner = sharded(EMA, rank, world_size, batch_size=2)
    for step in range(3):
        learner.take_step(make_batch(step, NUM_PAIRS, rank, world_size))
    found["blocks"] = [name for name, module in learner.model.named_modules() if isinstance(module, FSDPModule)]
    found["state"], found["weights"] = learner.state(), learner.full_weights()
    whole = [copy.deepcopy(found["state"])]
    distributed.broadcast_object_list(whole)
    other = sharded(EMA, rank, world_size)
    other.load_state(whole[0])
    found["bytes"] = held_bytes(other)
    for step in range(3, 5):
        other.take_step(make_batch(step, NUM_PAIRS, rank, world_size))
    found["weights of 5"] = other.full_weights()
    return found


def test_sharded_ranks_compute_what_one_pass_does():
    """Gradients, norm, clipping, the moving average; also where a rank has fewer pairs than passes, or none."""
    of_rank = on_ranks(2, steps_on_rank)
    for case, own in CASES.items():
        for num_pairs, batch_size in CUTS:
            single = make_learner(own)
            taken = single.take_step(make_batch(0, num_pairs), want_norm=True)
            gradients = {name: value.grad for name, value in single.model.named_parameters()}
            for found in of_rank:
                expected = {"loss": taken.loss, "norm": taken.grad_norm, **gradients}
                assert_close(found[f"{case} {num_pairs} {batch_size}"], expected)

    single = make_learner(EMA)
    take_steps(single, [make_batch(step) for step in range(3)])
    for found in of_rank:
        assert found["blocks"] == ["visual.transformer.resblocks.0", "transformer.resblocks.0"]
        assert found["bytes"] < 0.55 * held_bytes(single)
    assert_close(of_rank[0]["weights"], single.full_weights(), rtol=1e-7, atol=1e-9)
    assert set(of_rank[1]["weights"].values()) == {None}
    taken_up = make_learner(EMA)
    taken_up.load_state(of_rank[0]["state"])
    torch.testing.assert_close(taken_up.state(), single.state(), rtol=1e-6, atol=1e-9)
    for learner in (single, taken_up):
        take_steps(learner, [make_batch(step) for step in range(3, 5)])
    for found in (of_rank[0]["weights of 5"], taken_up.full_weights()):
        assert_close(found, single.full_weights(), rtol=1e-7, atol=1e-9)


WORDS = ["red cat", "blue zebra", "green quilt", "white yak", "bad omen", "old lamp", "long road", "small fish"]
# With a scale that starts at its limit, and a decay that is seen in the rows of unused tokens.
START = {"model": {**MODEL, "init_logit_scale": 0.0}, "weight_decay": 10.0}
TRAINING = {**START, "ema_decay": 0.9, "num_checkpoints": 2, "samples_seen": 60}


@pytest.fixture(scope="module")
def train_set_path(tmp_path_factory):
    return write_train_set(str(tmp_path_factory.mktemp("train_set")), 50)


@pytest.fixture(scope="module")
def pool_path(tmp_path_factory):
    rows = [{"caption": f"a {word} on a wall", "image": drawing(place)} for place, word in enumerate(WORDS)]
    return write_pool(tmp_path_factory.mktemp("pool"), [rows])


@pytest.fixture(scope="module")
def unsharded(train_set_path, pool_path, tmp_path_factory):
    """The folder of a training on two ranks that have the whole model each."""
    folder = str(tmp_path_factory.mktemp("unsharded"))
    on_ranks(2, train_rank, train_set_path, folder, TRAINING, {"held_out_path": pool_path})
    return folder


def lines(folder):
    return [json.loads(line) for line in storage.read_bytes(f"{folder}/metrics.jsonl").decode().splitlines()]


def assert_same_training(folder, expected):
    """Files, lines and kept models, up to rounding."""
    names = storage.list_files(expected, recursive=True)
    assert storage.list_files(folder, recursive=True) == names
    assert [name for name in names if name.endswith(".safetensors")] == [
        "open_clip/open_clip_model.safetensors",
        "open_clip_32/open_clip_model.safetensors",
    ]
    for name in (name for name in names if name.endswith(".safetensors")):
        of_folder, of_expected = load_file(f"{folder}/{name}"), load_file(f"{expected}/{name}")
        assert of_folder.keys() == of_expected.keys()
        for key, value in of_expected.items():
            torch.testing.assert_close(of_folder[key], value, rtol=1e-2, atol=1e-4)
    for found, line in zip(lines(folder), lines(expected), strict=True):
        assert found["step"] == line["step"]
        for name in ("loss", "grad_norm", "logit_scale"):
            assert found[name] == pytest.approx(line[name], rel=2e-4)
        for name in ("clamp_hits", "train_recall_at_1", "held_out_recall_at_1"):
            assert found.get(name) == line.get(name)


def test_a_sharded_training_is_an_unsharded_one(unsharded, train_set_path, pool_path, tmp_path):
    own, options = {**TRAINING, "shard_parameters": True}, {"held_out_path": pool_path, "checkpoint_every_steps": 3}
    facts = on_ranks(2, train_rank, train_set_path, str(tmp_path), own, options)
    assert (facts[0]["steps"], facts[0]["num_workers"], facts[1]) == (8, 2, {})
    assert_same_training(str(tmp_path), unsharded)


class StoppedError(Exception):
    pass


def stop_at_5(line):
    if line["step"] == 5:
        raise StoppedError


def test_any_ranks_go_on_from_a_sharded_state(unsharded, train_set_path, pool_path, tmp_path):
    own, options = {**TRAINING, "shard_parameters": True}, {"held_out_path": pool_path}
    first, second = str(tmp_path / "first"), str(tmp_path / "second")
    with pytest.raises(torch.multiprocessing.ProcessRaisedException):
        stop = {"checkpoint_every_s": 0.0, "report": stop_at_5}  # a state after each of the first four steps
        on_ranks(2, train_rank, train_set_path, first, own, {**options, **stop})
    shutil.copytree(first, second)
    facts = on_ranks(2, train_rank, train_set_path, first, own, options)
    assert facts[0]["resumed_at_step"] == 4
    assert_same_training(first, unsharded)
    facts = train(train_set_path, second, recipe(**TRAINING), Seeds(0, 0), **options)
    assert facts["resumed_at_step"] == 4
    assert_same_training(second, unsharded)


def test_sharded_ranks_go_on_from_an_unsharded_state(unsharded, train_set_path, pool_path, tmp_path):
    options = {"held_out_path": pool_path}
    with pytest.raises(StoppedError):
        stop = {"checkpoint_every_steps": 2, "report": stop_at_5}
        train(train_set_path, str(tmp_path), recipe(**TRAINING), Seeds(0, 0), **options, **stop)
    own = {**TRAINING, "shard_parameters": True}
    facts = on_ranks(2, train_rank, train_set_path, str(tmp_path), own, options)
    assert facts[0]["resumed_at_step"] == 4
    assert_same_training(str(tmp_path), unsharded)


def test_one_rank_shards_nothing(train_set_path, tmp_path):
    for is_sharded in (False, True):
        own = recipe(samples_seen=16, shard_parameters=is_sharded)
        train(train_set_path, str(tmp_path / str(is_sharded)), own, Seeds(0, 0))
    names = [f"{tmp_path}/{is_sharded}/open_clip/open_clip_model.safetensors" for is_sharded in (False, True)]
    assert storage.read_bytes(names[0]) == storage.read_bytes(names[1])


def test_recipes():
    values = {"model": MODEL, "global_batch_size": 8, "samples_seen": 16, "lr": 1e-3}
    sharded = recipes.parse({**values, "shard_parameters": True}, "x")
    assert sharded.identity() == recipes.parse(values, "x").identity()
    for other, what in ({"precision": "fp16"}, "expected bf16 or fp32"), ({"compile": True}, "expected one of them"):
        with pytest.raises(ConfigError, match=f"x.*shard_parameters = true with .*{what}"):
            recipes.parse({**values, "shard_parameters": True, **other}, "x")
