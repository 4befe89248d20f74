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

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed

from pipeline.core import artifact, clip_model, log, storage
from pipeline.core.errors import WinnowError
from training import checkpoint, vocabulary, watch
from training import recipe as recipes
from training.data import Batch, Loader, count_repeats, index_digest, open_train_set
from training.ledger import Ledger
from training.recipe import Recipe, Seeds
from training.step import Learner, learning_rate

LEDGER_FILE, MODEL_FOLDER = "ledger.json", "open_clip"
LINES = 100  # a curve of about this many points, at least one every MOST_STEPS_A_LINE
MOST_STEPS_A_LINE = 100
SIGLIP_START = {"init_logit_scale": math.log(10), "init_logit_bias": -10.0}  # Zhai et al. 2023


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
) -> dict[str, Any]:
    """Facts of the finished training, whose files lie in out_path. Goes on from its newest step checkpoint.

    Args:
        device: cpu, cuda or cuda:N.
        threads: of torch on a CPU, and of the loader.
        batch_size: the most pairs of one forward pass of a rank; gradients are cached above it (step.py).
        start: a model to start from, as clip_model.load takes it; None draws the weights.
        held_out_path: a pool that is not trained on, to watch recall on.
        report: called by rank 0 with each line of the metrics.
        checkpoint_every_s, checkpoint_every_steps: whichever comes first; neither changes the result.

    Raises:
        WinnowError: the train set can't be read, the loss is not finite.
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
        architecture |= SIGLIP_START
    torch.manual_seed(seeds.initialisation)
    clip = clip_model.build(architecture, recipe.image_size_px, force_patch_dropout=recipe.patch_dropout or None)
    model = clip.model.train()
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
    # fp16 skips steps whose gradients overflow, decay included: there the rows left out would not be known.
    used, full_table = None, None
    if vocabulary.can_shrink(model) and recipe.precision != "fp16" and (used := loader.compact_tokens()) is not None:
        full_table = vocabulary.shrink(model, used)
    model.to(device)
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
    first_step = 0
    if state is not None:
        first_step = state["step"]
        learner.load_state(state)
        del state

    def keep_model(done: int) -> None:
        """Writes the model after `done` steps: its moving average, with the whole token table."""
        last = done == recipe.num_steps
        name = MODEL_FOLDER if last else f"{MODEL_FOLDER}_{done * recipe.global_batch_size}"
        with learner.averaged():
            tensors = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        if used is not None:
            factor = vocabulary.unused_factor(recipe, done)
            tensors["token_embedding.weight"] = vocabulary.restored(
                tensors["token_embedding.weight"], used, full_table, factor
            )
        clip_model.save(model, architecture, storage.join(out_path, name), tensors)

    metrics = watch.MetricsFile(out_path, first_step) if rank == 0 else None
    line_every = max(1, min(MOST_STEPS_A_LINE, recipe.num_steps // LINES))
    line_s = saved_s = time.monotonic()
    line_samples, wait_s, loss_value = 0, 0.0, math.nan
    batches = loader.batches(first_step)
    for step in range(first_step, recipe.num_steps):
        asked_s = time.monotonic()
        batch = next(batches)
        wait_s += time.monotonic() - asked_s
        batch = _to_device(batch, device)
        done = step + 1
        is_line = done % line_every == 0 or step == 0 or done == recipe.num_steps
        taken = learner.take_step(batch, want_norm=is_line)
        line_samples += sum(batch.part_sizes)

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
            if metrics is not None:
                now_s = time.monotonic()
                line = {
                    "step": done,
                    "samples_seen": step * recipe.global_batch_size + sum(batch.part_sizes),
                    "loss": loss_value,
                    "ln_batch": math.log(sum(batch.part_sizes)),
                    "lr": learning_rate(recipe, step),
                    "logit_scale": model.logit_scale.exp().item(),
                    # An fp16 step whose gradients overflowed was skipped; JSON has no infinity.
                    "grad_norm": norm if math.isfinite(norm := taken.grad_norm.item()) else None,
                    "samples_per_s": line_samples / (now_s - line_s),
                    "data_wait_fraction": wait_s / (now_s - line_s),
                }
                metrics.add(line)
                line_s, line_samples, wait_s = now_s, 0, 0.0
                if report is not None:
                    report(line)

        if rank == 0 and done in recipe.kept_steps:
            keep_model(done)
        is_due = checkpoint_every_steps is not None and done % checkpoint_every_steps == 0
        if rank == 0 and done < recipe.num_steps and (is_due or time.monotonic() - saved_s > checkpoint_every_s):
            metrics.write()  # before the state: lines up to its step are never lost
            checkpoint.save(out_path, done, {"identity": identity, "step": done, **learner.state()})
            saved_s = time.monotonic()
    batches.close()

    facts: dict[str, Any] = {}
    if rank == 0:
        storage.write_json(storage.join(out_path, LEDGER_FILE), ledger_record)
        metrics.write()
        seconds = time.monotonic() - started_s
        facts = {
            "samples_seen": recipe.samples_seen,
            "steps": recipe.num_steps,
            "num_samples": len(train_set),
            **count_repeats(train_set_path, ledger.times_seen()),
            "seeds": seeds.to_json(),
            "final_loss": loss_value,
            "num_parameters": num_parameters,
            "resumed_at_step": first_step,
            "device": device,
            "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
            "num_workers": world_size,
            "threads": threads,
            "batch_size": batch_size,
            "train_s": round(seconds, 3),
            "cpu_hours": seconds * threads * world_size / 3600,
            "gpu_hours": seconds * world_size / 3600 if device.startswith("cuda") else 0.0,
            "samples_per_s": metrics.samples_per_s(),
            "warnings": recipes.check(recipe),
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
