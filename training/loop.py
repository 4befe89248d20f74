"""The training loop, top to bottom: one recipe on one train set, to the sample.

    out_path/open_clip/      open_clip_config.json, open_clip_model.safetensors: what plain open_clip loads
             open_clip_3200/ the model after 3,200 samples, where the recipe keeps more than the last (num_checkpoints)
             metrics.jsonl   {"step": 10, "samples_seen": 640, "loss": 4.1, "ln_batch": 4.16, "lr": 6e-4, ...} a line
             ledger.json     what a checker needs to recompute who was seen when: see check_ledger.py
             step_00000123/  while it runs: see checkpoint.py

Everything after the initial weights is a pure function of the step: the batch (ledger.py), crops (data.py), the
learning rate and patch dropout (step.py). So a state needs no generator in it, and a training that was killed at any
moment ends with the weights of an uninterrupted one (on a CPU to the bit, for the same number of threads and ranks).
The ranks of a distributed training all call train() with a process group set up.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import distributed

from pipeline.core import artifact, clip_model, log, storage
from pipeline.core.errors import ConfigError, WinnowError
from training import checkpoint, probe, sharding, vocabulary, watch
from training import recipe as recipes
from training.data import Batch, Loader
from training.ledger import LEDGER_FILE, Ledger
from training.memory import explains_out_of_memory
from training.recipe import Recipe, Seeds
from training.step import Learner, learning_rate
from training.train_set import count_repeats, index_digest, open_train_set

MODEL_FOLDER = "open_clip"
ASK_EVERY_STEPS = 10  # sharded, the ranks ask rank 0 so often whether a state is due
SIGLIP_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # Zhai et al. 2023


@explains_out_of_memory
def train(
    train_set_path: str,
    out_path: str,
    recipe: Recipe,
    seeds: Seeds,
    *,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    threads: int = 1,
    batch_size: int | None = None,
    start: Mapping[str, Any] | None = None,
    held_out_path: str | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    checkpoint_every_s: float = 300.0,
    checkpoint_every_steps: int | None = None,
    leaving: Callable[[], bool] | None = None,
) -> dict[str, Any]:
    """Facts of the finished training, whose files lie in out_path. Goes on from its newest step checkpoint.

    Args:
        device: cpu, cuda or cuda:N.
        threads: of torch on a CPU, and of the loader.
        batch_size: the most pairs of one forward pass of a rank; gradients are cached above it (step.py).
        start: a model to start from, as clip_model.load takes it; None draws the weights.
        held_out_path: a pool that is not trained on, to watch recall on.
        report: called by rank 0 with each line of the metrics, and the `from_samples` where this attempt began.
        checkpoint_every_s, checkpoint_every_steps: whichever comes first; neither changes the result.
        leaving: whether a machine of this training will soon go; asked by rank 0 about every second. While it says so,
            states are saved every few seconds.

    Raises:
        WinnowError: the train set can't be read, the loss is not finite, the memory does not suffice.
    """
    started_s = time.monotonic()
    torch.set_num_threads(threads)
    train_set = open_train_set(train_set_path)
    ledger = Ledger(len(train_set), recipe.samples_seen, recipe.global_batch_size, seeds.order, recipe.chunk_size)
    ledger_record = {**ledger.to_json(), "index_sha256": index_digest(train_set_path)}
    if rank == 0:
        for warning in recipes.check(recipe):
            log.logger.warning("recipe: %s", warning)

    architecture = clip_model.model_config(recipe.model)
    if recipe.loss == "siglip":
        architecture = SIGLIP_START | architecture
    torch.manual_seed(seeds.initialisation)
    clip = clip_model.build(architecture, recipe.image_size_px, force_patch_dropout=recipe.patch_dropout or None)
    model = clip.model.train()
    if recipe.patch_dropout and not any("PatchDropout" in type(module).__name__ for module in model.modules()):
        raise ConfigError(
            f"recipe: patch_dropout = {recipe.patch_dropout} has no effect, expected an image tower of patches"
        )
    if start is not None:
        _copy_weights(start, model)
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing(True)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    loader = Loader(
        train_set,
        ledger,
        recipe,
        clip,
        rank=rank,
        world_size=world_size,
        threads=threads,
        pin_memory=device.startswith("cuda"),
    )
    # Sharded, the model that trains is on no rank: what is measured and kept is a copy of it that rank 0 has.
    is_sharded = recipe.shard_parameters and world_size > 1
    kept = dataclasses.replace(clip, model=copy.deepcopy(model)) if is_sharded and rank == 0 else clip
    # fp16 skips steps whose gradients overflow, decay included: there the rows left out would not be known.
    used, full_table = None, None
    if vocabulary.can_shrink(model) and recipe.precision != "fp16" and (used := loader.compact_tokens()) is not None:
        full_table = vocabulary.shrink(model, used)
    model.to(device)
    kept.model.to(device)
    learner = Learner(
        model, recipe, seeds.order, device=device, rank=rank, world_size=world_size, batch_size=batch_size
    )

    # Where an interrupted training goes on. Rank 0 looks; what it finds is read by all.
    identity = artifact.canonical_json({"recipe": recipe.identity(), "seeds": seeds.to_json(), "ledger": ledger_record})
    state = checkpoint.load_newest(out_path, identity) if rank == 0 else None
    if world_size > 1:
        found = [state["step"] if state else None]
        distributed.broadcast_object_list(found, device=torch.device(device))
        if rank > 0 and found[0] is not None:
            state = checkpoint.load_newest(out_path, identity)
            if state is None or state["step"] != found[0]:
                raise WinnowError(f"{out_path}: rank {rank} does not see step {found[0]}, expected a shared folder")
    first_step, watched, earlier = 0, None, {}
    if state is not None:
        first_step, watched, earlier = state["step"], state["watch"], state["spent"]
        learner.load_state(state)
        del state
    from_samples = first_step * recipe.global_batch_size

    def spent() -> dict[str, float]:
        """What the training took so far, with the attempts before this one up to the states that went on."""
        train_s = time.monotonic() - started_s
        worker_hours = train_s * world_size / 3600
        own = {
            "train_s": train_s,
            "cpu_hours": worker_hours * threads,
            "gpu_hours": worker_hours if device.startswith("cuda") else 0.0,
        }
        return {name: value + earlier.get(name, 0.0) for name, value in own.items()}

    @contextlib.contextmanager
    def kept_weights(done: int) -> Iterator[None]:
        """The model has what is kept of it after `done` steps: its moving average, the whole token table."""
        if is_sharded:  # copy_to_rank_0() saw to it
            yield
            return
        with contextlib.ExitStack() as both:
            both.enter_context(learner.averaged())
            if used is not None:
                factor = vocabulary.unused_factor(recipe, done)
                both.enter_context(vocabulary.whole(model, used, full_table, factor))
            yield

    def copy_to_rank_0(done: int) -> None:
        """The copy has what kept_weights() promises. All ranks call it together."""
        weights = learner.full_weights()
        if rank == 0:
            if used is not None:
                factor = vocabulary.unused_factor(recipe, done)
                table = weights[vocabulary.TABLE]
                weights[vocabulary.TABLE] = vocabulary.restored(table, used, full_table, factor)
            kept.model.load_state_dict(weights)

    def keep_model(done: int) -> None:
        """Writes the model after `done` steps."""
        last = done == recipe.num_steps
        name = MODEL_FOLDER if last else f"{MODEL_FOLDER}_{done * recipe.global_batch_size}"
        place = storage.join(out_path, name)
        with kept_weights(done), checkpoint.written(place):
            if not all(tensor.isfinite().all() for tensor in kept.model.state_dict().values()):
                raise WinnowError(f"{place}: weights after step {done} that are not finite, expected numbers: lower lr")
            clip_model.save(kept.model, architecture, place)

    watcher = None
    if rank == 0:
        watcher = watch.Watch(
            out_path,
            recipe,
            kept,
            train_set,
            held_out_path,
            device=device,
            threads=threads,
            batch_size=batch_size,
            kept_weights=kept_weights,
            logit_scale=model.logit_scale,
            first_step=first_step,
            state=watched,
        )
    line_steps = watch.line_steps(recipe)
    copied_steps = probe.steps(recipe) | set(recipe.kept_steps) if is_sharded else set()
    schedule = checkpoint.Schedule(checkpoint_every_s, leaving)
    batches = loader.batches(first_step)
    for step in range(first_step, recipe.num_steps):
        asked_s = time.monotonic()
        batch = next(batches)
        wait_s = time.monotonic() - asked_s
        batch = _to_device(batch, device)
        done = step + 1
        is_line = done in line_steps
        taken = learner.take_step(batch, want_norm=is_line)
        if watcher is not None:
            watcher.note(batch, wait_s)
        if done in copied_steps:
            copy_to_rank_0(done)

        if is_line:
            loss = taken.loss
            if world_size > 1:
                distributed.all_reduce(loss)
                loss /= world_size
            loss_value = loss.item()
            if not math.isfinite(loss_value):
                raise WinnowError(
                    f"{out_path}: loss = {loss_value} at step {done} of {recipe.num_steps}, expected a finite number:"
                    f" lower lr ({recipe.lr:g})" + (" or use bf16 or fp32" if recipe.precision == "fp16" else "")
                )
            if watcher is not None:
                line = watcher.line(batch, taken, loss_value, learning_rate(recipe, step))
                if report is not None:
                    report({**line, "from_samples": from_samples})

        if rank == 0 and done in recipe.kept_steps:
            keep_model(done)
        is_asked = checkpoint_every_steps is not None and done % checkpoint_every_steps == 0
        # Sharded, all ranks take part and ask rank 0 now and then.
        can_save = not is_sharded or is_line or is_asked or done % ASK_EVERY_STEPS == 0
        is_due = rank == 0 and can_save and (is_asked or schedule.is_due())
        # A loss that is not a number ends the training at the next line: until then the states are those before it.
        is_due = is_due and done < recipe.num_steps and math.isfinite(taken.loss.item())
        if is_sharded and can_save:
            is_due = sharding.said_by_rank_0(is_due, device)
        if is_due:
            with schedule.saving():
                of_learner = learner.state()
                if rank == 0:
                    counted = watcher.state()  # before the state is written: lines up to its step are never lost
                    state = {"identity": identity, "step": done, "watch": counted, "spent": spent(), **of_learner}
                    checkpoint.save(out_path, done, state)
                    del state
                del of_learner
    batches.close()

    facts: dict[str, Any] = {}
    if rank == 0:
        with checkpoint.written(storage.join(out_path, LEDGER_FILE)):
            storage.write_json(storage.join(out_path, LEDGER_FILE), ledger_record)
        seen = watcher.facts()
        facts = {
            "samples_seen": recipe.samples_seen,
            "steps": recipe.num_steps,
            "num_samples": len(train_set),
            **count_repeats(train_set_path, ledger.times_seen()),
            "seeds": seeds.to_json(),
            "num_parameters": num_parameters,
            "resumed_at_step": first_step,
            "device": device,
            "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
            "num_workers": world_size,
            "threads": threads,
            "batch_size": batch_size,
            **spent(),
            "warnings": [*recipes.check(recipe), *seen.pop("warnings")],
            **seen,
        }
        checkpoint.delete_all(out_path)
    if world_size > 1:
        distributed.barrier()
    return facts


def _copy_weights(start: Mapping[str, Any], model: torch.nn.Module) -> None:
    weights = clip_model.load(start).model.state_dict()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        place = start.get("folder") or start.get("pretrained")
        raise WinnowError(f"{place}: expected a model of the recipe's architecture: {error}") from error


def _to_device(batch: Batch, device: str) -> Batch:
    image_BSS3 = batch.image_BSS3.to(device, non_blocking=True)
    return batch._replace(image_BSS3=image_BSS3, tokens_BT=batch.tokens_BT.to(device, non_blocking=True))
