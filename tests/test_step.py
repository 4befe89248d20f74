"""The optimizer step: cached gradients, ranks, precisions, the moving average and a state, on a tiny model."""

from __future__ import annotations

import copy
import functools
import io
import logging
import math

import pytest
import torch
from torch import distributed

from pipeline.core import clip_model
from pipeline.core.errors import WinnowError
from tests.training_fixture import MODEL, in_child, on_ranks, recipe
from training import step as optimizer_step
from training.data import Batch
from training.ledger import rank_slice
from training.step import Learner, average_decay, learning_rate

VOCABULARY = 40
SMALL = {**MODEL, "text_cfg": {**MODEL["text_cfg"], "vocab_size": VOCABULARY}}
RESNET = {**SMALL, "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}}
NUM_PAIRS = 7
CASES = {  # of what must not depend on ranks or on how a batch is cut into forward passes
    "clip": {},
    "siglip": {"loss": "siglip"},
    "2 negatives": {"num_negatives": 2},
    "clipped": {"grad_clip_norm": 0.01},
    "checkpointed": {"grad_checkpointing": True},
}


@functools.cache
def built(architecture, loss, patch_dropout):
    torch.manual_seed(3)
    bias = -10.0 if loss == "siglip" else None
    return clip_model.build(
        {"ViT": SMALL, "ResNet": RESNET}[architecture],
        init_logit_bias=bias,
        force_patch_dropout=patch_dropout or None,
    ).model


def make_learner(own, dtype=torch.float64, architecture="ViT", **options):
    chosen = recipe(**{"model": SMALL, "global_batch_size": NUM_PAIRS, **own})
    model = copy.deepcopy(built(architecture, chosen.loss, chosen.patch_dropout)).to(dtype).train()
    if chosen.grad_checkpointing:
        model.set_grad_checkpointing(True)
    return Learner(model, chosen, order_seed=5, **options)


def make_batch(number=0, num_pairs=NUM_PAIRS, rank=0, world_size=1, side_px=16):
    """A rank's part of a drawn batch, captions of unequal lengths."""
    generator = torch.Generator().manual_seed(100 + number)
    image_BSS3 = torch.randint(0, 256, (num_pairs, side_px, side_px, 3), generator=generator).to(torch.uint8)
    tokens_BT = torch.randint(1, VOCABULARY - 1, (num_pairs, 9), generator=generator)
    for row in range(num_pairs):
        tokens_BT[row, 3 + row % 6 :] = 0
        tokens_BT[row, 3 + row % 6] = VOCABULARY - 1
    sizes = [rank_slice(num_pairs, index, world_size) for index in range(world_size)]
    first, last = sizes[rank] if sizes[rank][0] < sizes[rank][1] else (0, 1)
    part_sizes = [stop - start for start, stop in sizes]
    tokens_BT = tokens_BT[first:last]
    return Batch(number, image_BSS3[first:last], tokens_BT, part_sizes, tokens_BT.argmax(dim=-1) + 1)


def take_steps(learner, batches):
    """{loss, gradient of every parameter} of the last step, on one rank."""
    for batch in batches:
        taken = learner.take_step(batch)
    gradients = {name: value.grad.clone() for name, value in learner.model.named_parameters()}
    return {"loss": taken.loss, **gradients}


def assert_close(found, expected, rtol=1e-9, atol=1e-12):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("case", CASES)
def test_every_caching_factor_gives_the_gradients_of_one_pass(case):
    """logit_scale's and logit_bias's among them, which open_clip's accumulation counts once a part."""
    expected = take_steps(make_learner(CASES[case]), [make_batch()])
    assert all(value.abs().max() > 0 for name, value in expected.items() if name != "logit_bias")
    for batch_size in range(1, NUM_PAIRS + 1):
        found = take_steps(make_learner(CASES[case], batch_size=batch_size), [make_batch()])
        assert_close(found, expected)


def steps_on_rank(rank, world_size):
    """{case: loss and gradients of one step on the whole batch}, and the weights after three steps."""
    found = {}
    for case, own in CASES.items():
        for num_pairs in (NUM_PAIRS, 2):
            for batch_size in (None, 1, 2):
                learner = make_learner(own, rank=rank, world_size=world_size, batch_size=batch_size)
                step = take_steps(learner, [make_batch(0, num_pairs, rank, world_size)])
                distributed.all_reduce(step["loss"])
                step["loss"] /= world_size
                found[f"{case} {num_pairs} {batch_size}"] = step
    learner = make_learner({"ema_decay": 0.9}, rank=rank, world_size=world_size, batch_size=1)
    take_steps(learner, [make_batch(step, NUM_PAIRS, rank, world_size) for step in range(3)])
    with learner.averaged():
        found["weights"] = {name: value.clone() for name, value in learner.model.state_dict().items()}
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_with_cached_gradients_compute_what_one_pass_does(world_size):
    of_rank = on_ranks(world_size, steps_on_rank)
    for case, own in CASES.items():
        for num_pairs in (NUM_PAIRS, 2):  # 2 leave two of four ranks without a pair
            expected = take_steps(make_learner(own), [make_batch(0, num_pairs)])
            for batch_size in (None, 1, 2):
                for found in of_rank:
                    assert_close(found[f"{case} {num_pairs} {batch_size}"], expected)
    learner = make_learner({"ema_decay": 0.9})
    take_steps(learner, [make_batch(step) for step in range(3)])
    with learner.averaged():
        for found in of_rank:
            assert_close(found["weights"], learner.model.state_dict(), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("batch_size", [None, 3])
def test_gradient_is_the_losss_slope_under_patch_dropout(batch_size):
    """Central differences of the loss agree only where a part is computed again with the patches it had before."""
    own = {"patch_dropout": 0.5, "loss": "siglip"}
    learner = make_learner(own, batch_size=batch_size)
    assert learner.model.visual.patch_dropout.prob == 0.5
    generator = torch.Generator().manual_seed(0)
    direction = [
        torch.randn(value.shape, generator=generator, dtype=value.dtype) for value in learner.model.parameters()
    ]

    def loss_at(distance):
        moved = make_learner(own, batch_size=batch_size)
        with torch.no_grad():
            for value, towards in zip(moved.model.parameters(), direction, strict=True):
                value += distance * towards
        return moved.take_step(make_batch()).loss.item()

    found = take_steps(learner, [make_batch()])
    slope = sum(
        (found[name] * towards).sum()
        for (name, _), towards in zip(learner.model.named_parameters(), direction, strict=True)
    )
    assert slope.item() == pytest.approx((loss_at(1e-6) - loss_at(-1e-6)) / 2e-6, rel=1e-6)


def test_patches_dropped_differ_by_step_and_part():
    def features(learner, step):
        batch = make_batch()._replace(step=step)
        return learner.take_step(batch).features.image_nD

    own = {"patch_dropout": 0.5}
    first = features(make_learner(own), 0)
    assert torch.equal(first, features(make_learner(own), 0))
    assert not torch.equal(first, features(make_learner(own), 1))
    assert not torch.equal(first, features(make_learner(own, batch_size=4), 0))
    assert not torch.equal(first, features(make_learner({}), 0))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_with_cached_gradients(precision):
    exact = take_steps(make_learner({}, torch.float32), [make_batch()])
    chosen = {"precision": precision, "grad_checkpointing": True}
    for batch_size in (None, 3):
        learner = make_learner(chosen, torch.float32, batch_size=batch_size)
        learner._scaler._init_scale = 2.0**10  # the usual 2^16 overflows on purpose in its first steps
        found = take_steps(learner, [make_batch()])
        assert found["loss"].item() == pytest.approx(exact["loss"].item(), rel=0.01)
        for name, value in exact.items():
            if name != "loss":
                assert (found[name] - value).norm() < 0.1 * value.norm(), name


def test_fp16_skips_a_step_whose_gradients_overflow():
    learner = make_learner({"precision": "fp16", "grad_clip_norm": 1.0}, torch.float32, batch_size=3)
    learner._scaler._init_scale = 2.0**120
    before = copy.deepcopy(learner.model.state_dict())
    taken = learner.take_step(make_batch())
    assert math.isfinite(taken.loss)
    assert not math.isfinite(taken.grad_norm)
    assert all(torch.equal(value, before[name]) for name, value in learner.model.state_dict().items())
    assert learner.state()["scaler"]["scale"] == 2.0**119


def test_gradient_norm_is_that_before_clipping():
    """Asking for it changes nothing; clipped gradients have the asked norm, with the scaler's factor taken out."""
    plain = make_learner({}, batch_size=2)
    assert plain.take_step(make_batch()).grad_norm is None
    asked = make_learner({})
    norm = asked.take_step(make_batch(), want_norm=True).grad_norm
    gradients = [value.grad for value in asked.model.parameters()]
    assert norm.item() == pytest.approx(math.sqrt(sum(value.square().sum().item() for value in gradients)))
    clipped = make_learner({"grad_clip_norm": 0.01}, batch_size=2)
    assert clipped.take_step(make_batch()).grad_norm.item() == pytest.approx(norm.item(), rel=1e-9)
    length = math.sqrt(sum(value.grad.square().sum().item() for value in clipped.model.parameters()))
    assert length == pytest.approx(0.01, rel=1e-3)


def test_moving_average_by_hand():
    learner = make_learner({"ema_decay": 0.3, "lr": 0.01})
    expected = {name: value.clone() for name, value in learner.model.state_dict().items()}
    for step in range(6):
        learner.take_step(make_batch(step))
        decay = min(0.3, (1 + step) / (10 + step))
        assert average_decay(learner.recipe, step) == decay
        for name, value in learner.model.state_dict().items():
            expected[name] = decay * expected[name] + (1 - decay) * value
    own = copy.deepcopy(learner.model.state_dict())
    with learner.averaged():
        assert_close(dict(learner.model.state_dict()), expected)
    assert all(torch.equal(value, own[name]) for name, value in learner.model.state_dict().items())
    assert not torch.equal(own["visual.proj"], expected["visual.proj"])


@pytest.mark.parametrize("own", [{"ema_decay": 0.9, "patch_dropout": 0.5, "loss": "siglip"}, {"precision": "fp16"}])
def test_a_learner_goes_on_from_its_state(own):
    batches = [make_batch(step) for step in range(5)]
    whole = make_learner(own, torch.float32, batch_size=3)
    take_steps(whole, batches)
    first = make_learner(own, torch.float32, batch_size=3)
    take_steps(first, batches[:2])
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second = make_learner(own, torch.float32, batch_size=3)
    take_steps(second, batches[3:])  # leaves traces that the state must undo
    second.load_state(torch.load(file, weights_only=True))
    take_steps(second, batches[2:])
    torch.testing.assert_close(second.state(), whole.state(), rtol=0, atol=0)


def test_batch_statistics_are_those_of_a_part(caplog):
    """Which is said, and whose running means the moving average follows; the model still trains."""
    batch = make_batch(side_px=32)
    with caplog.at_level(logging.WARNING, "winnow"):
        whole = make_learner({"ema_decay": 0.5}, torch.float32, "ResNet")
    assert not [record for record in caplog.records if record.name == "winnow"]
    with caplog.at_level(logging.WARNING, "winnow"):
        cached = make_learner({"ema_decay": 0.5}, torch.float32, "ResNet", batch_size=4)
    (message,) = [record.getMessage() for record in caplog.records if record.name == "winnow"]
    assert message.startswith("the model normalises over a batch, here over the 4 pairs")
    for learner in (whole, cached):
        losses = [learner.take_step(batch._replace(step=step)).loss.item() for step in range(20)]
        assert losses[-1] < losses[0]
        own = learner.model.visual.bn1.running_mean.clone()
        with learner.averaged():
            averaged = learner.model.visual.bn1.running_mean.clone()
            assert all(value.isfinite().all() for value in learner.model.state_dict().values())
        assert not torch.equal(averaged, own)
        torch.testing.assert_close(averaged, own, rtol=0.5, atol=0.5)


def compile_without_a_compiler(message_path):
    from torch._inductor import config

    config.cpp.cxx = (None, "/nowhere/g++")
    with pytest.raises(WinnowError) as caught:
        make_learner({"compile": True}, torch.float32).take_step(make_batch())
    with open(message_path, "w") as file:
        file.write(str(caught.value))


@pytest.mark.slow
def test_compiling_without_a_compiler_is_one_clear_line(tmp_path):
    assert in_child(compile_without_a_compiler, str(tmp_path / "message")) == 0
    message = (tmp_path / "message").read_text()
    assert message.startswith(
        "recipe: compile = true, expected a model and a machine for it: InvalidCxxCompiler: No working"
    )
    assert message.endswith("'/nowhere/g++')")


@pytest.mark.slow
def test_compiled_steps_are_close():
    plain, compiled = make_learner({}, torch.float32), make_learner({"compile": True}, torch.float32, batch_size=4)
    for step, num_pairs in ((0, 7), (1, 7), (2, 3)):
        batch = make_batch(step, num_pairs)
        assert_close(take_steps(compiled, [batch]), take_steps(plain, [batch]), rtol=1e-2, atol=1e-4)


def test_learning_rate():
    chosen = recipe(lr=2.0, warmup_steps=4, samples_seen=80)
    assert [learning_rate(chosen, step) for step in range(10)] == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 2.0, *(1 + math.cos(math.pi * done / 6) for done in range(1, 6))]
    )
    assert learning_rate(recipe(lr=2.0, schedule="constant"), 12) == 2.0


def test_captions_in_groups_of_like_length_give_the_same_gradients(monkeypatch):
    """Seven captions of 4 to 9 tokens in four groups, images one by one, beside all at once."""
    at_once = take_steps(make_learner({}), [make_batch()])
    monkeypatch.setattr(optimizer_step, "GROUP_PAIRS", 1)
    grouped = make_learner({})
    assert grouped._groups(make_batch().lengths_B).lengths == [4, 6, 8, 9]
    assert_close(take_steps(grouped, [make_batch()]), at_once)
