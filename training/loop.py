"""The training loop, top to bottom: one recipe on one train set, to the sample.

    out_path/open_clip/     open_clip_config.json, open_clip_model.safetensors: what plain open_clip loads
             metrics.jsonl  {"step": 10, "samples_seen": 640, "loss": 4.1, "ln_batch": 4.16, "lr": 6e-4, ...} a line
             ledger.json    what a checker needs to recompute who was seen when
             step_00000123/ while it runs: see checkpoint.py

Everything after the initial weights is a pure function of the step: the batch (ledger.py), crops (data.py), the
learning rate, and torch's generators, which are seeded anew at each step. So a state needs no generator in it, and a
training that was killed at any moment ends with the weights of an uninterrupted one (on a CPU to the bit, for the same
number of threads and ranks). The ranks of a distributed training all call train() with a process group set up.
Shapes: B pairs, S image side, T tokens, D embedding width.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import distributed

from pipeline.core import artifact, clip_model, log, storage
from pipeline.core.errors import WinnowError
from training import checkpoint, vocabulary
from training import recipe as recipes
from training.data import Batch, Loader, count_repeats, index_digest, open_train_set
from training.ledger import Ledger
from training.loss import clamp_logit_scale, contrastive_loss
from training.recipe import Recipe

METRICS_FILE, LEDGER_FILE, MODEL_FOLDER = "metrics.jsonl", "ledger.json", "open_clip"
METRICS_EVERY_S = 10.0  # the file is written whole, as object stores can't append
METRICS_LINES = 100  # a curve of about this many points, at least one every MOST_STEPS_A_LINE
MOST_STEPS_A_LINE = 100
RECENT_S = 600.0
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TwoTowers(torch.nn.Module):
    """The model as one forward pass over both towers, from uint8 pixels, captions cut to the batch's longest."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        preprocess = clip_model.preprocess_config(model)
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(preprocess[name]).view(3, 1, 1), persistent=False)

    def forward(self, image_BSS3: torch.Tensor, tokens_BT: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Normalised float32 image and text features [B, D], and the factor on their cosines."""
        pixels_B3SS = image_BSS3.permute(0, 3, 1, 2).float().div(255).sub(self.mean).div(self.std)
        image_BD = self.model.encode_image(pixels_B3SS, normalize=True)
        text_BD = clip_model.encode_text(self.model, tokens_BT, normalize=True)
        return image_BD.float(), text_BD.float(), self.model.logit_scale.exp()


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of a step (0 is the first), as open_clip's: linear warmup, then cosine to 0 or constant."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    done = (step - recipe.warmup_steps) / (recipe.num_steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done)) * recipe.lr


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, fused; no weight decay on gains, biases, the class embedding and the logit scale, as in open_clip."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True)


def take_step(
    towers: torch.nn.Module,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    recipe: Recipe,
    batch: Batch,
    rank: int,
    want_norm: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(loss of this rank, gradient norm or None) of one optimizer step; no value is waited for.

    Args:
        towers: TwoTowers of `model`, wrapped or not.
        batch: on the model's device.
    """
    kind = batch.image_BSS3.device.type
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(recipe, batch.step)
    optimizer.zero_grad(set_to_none=True)
    autocast = torch.autocast(kind, AUTOCAST[recipe.precision]) if recipe.precision != "fp32" else None
    with autocast or contextlib.nullcontext():
        image_BD, text_BD, logit_scale = towers(batch.image_BSS3, batch.tokens_BT)
    loss = contrastive_loss(image_BD, text_BD, logit_scale, batch.part_sizes, rank)
    scaler.scale(loss).backward()
    norm = None
    if want_norm or recipe.grad_clip_norm is not None:
        scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.grad_clip_norm or math.inf)
    scaler.step(optimizer)
    scaler.update()
    clamp_logit_scale(model)
    return loss.detach(), norm


def train(
    train_set_path: str,
    out_path: str,
    recipe: Recipe,
    seed: int,
    *,
    device: str = "cpu",
    rank: int = 0,
    world_size: int = 1,
    threads: int = 1,
    initial_model: str | None = None,
    report: Callable[[dict[str, Any]], None] | None = None,
    checkpoint_every_s: float = 300.0,
    checkpoint_every_steps: int | None = None,
) -> dict[str, Any]:
    """Facts of the finished training, whose files lie in out_path. Goes on from its newest step checkpoint.

    Args:
        device: cpu, cuda or cuda:N.
        threads: of torch on a CPU, and of the loader.
        initial_model: a model folder to start from; None draws the weights with `seed`.
        report: called by rank 0 with each line of the metrics.
        checkpoint_every_s, checkpoint_every_steps: whichever comes first; neither changes the result.

    Raises:
        WinnowError: the train set can't be read, the loss is not finite.
    """
    started_s = time.monotonic()
    torch.set_num_threads(threads)
    train_set = open_train_set(train_set_path)
    ledger = Ledger(len(train_set), recipe.samples_seen, recipe.global_batch_size, seed, recipe.chunk_size)
    ledger_record = {**ledger.to_json(), "index_sha256": index_digest(train_set_path)}
    if rank == 0:
        for warning in recipes.check(recipe):
            log.logger.warning("recipe: %s", warning)

    # The model, with the whole of its randomness from `seed`.
    torch.manual_seed(seed)
    clip = clip_model.build(recipe.model, recipe.image_size_px)
    model = clip.model.train()
    if initial_model is not None:
        _copy_weights(initial_model, model)
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
    optimizer = make_optimizer(model, recipe)
    scaler = torch.amp.GradScaler(torch.device(device).type, enabled=recipe.precision == "fp16")

    # Where an interrupted training goes on. Rank 0 looks; what it finds is read by all.
    identity = artifact.canonical_json({"recipe": recipe.identity(), "seed": seed, "ledger": ledger_record})
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
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        del state
    metrics = _Metrics(out_path, first_step) if rank == 0 else None

    towers: torch.nn.Module = TwoTowers(model).to(device)
    if world_size > 1:
        towers = torch.nn.parallel.DistributedDataParallel(
            towers,
            device_ids=[torch.device(device)] if device.startswith("cuda") else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )
    line_every = max(1, min(MOST_STEPS_A_LINE, recipe.num_steps // METRICS_LINES))
    line_s = saved_s = time.monotonic()
    line_samples, wait_s, loss_value = 0, 0.0, math.nan
    batches = loader.batches(first_step)
    for step in range(first_step, recipe.num_steps):
        asked_s = time.monotonic()
        batch = next(batches)
        wait_s += time.monotonic() - asked_s
        torch.manual_seed(((seed << 40) + (step << 12) + rank) & 0x7FFF_FFFF_FFFF_FFFF)
        batch = _to_device(batch, device)
        done = step + 1
        is_line = done % line_every == 0 or step == 0 or done == recipe.num_steps
        loss, norm = take_step(towers, model, optimizer, scaler, recipe, batch, rank, want_norm=is_line)
        line_samples += sum(batch.part_sizes)

        if is_line:
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
                    "grad_norm": norm.item() if norm is not None and math.isfinite(norm.item()) else None,
                    "samples_per_s": line_samples / (now_s - line_s),
                    "data_wait_fraction": wait_s / (now_s - line_s),
                }
                metrics.add(line)
                line_s, line_samples, wait_s = now_s, 0, 0.0
                if report is not None:
                    report(line)

        is_due = checkpoint_every_steps is not None and done % checkpoint_every_steps == 0
        if rank == 0 and done < recipe.num_steps and (is_due or time.monotonic() - saved_s > checkpoint_every_s):
            metrics.write()  # before the state: lines up to its step are never lost
            states = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
            checkpoint.save(out_path, done, {"identity": identity, "step": done, **states})
            saved_s = time.monotonic()
    batches.close()

    facts: dict[str, Any] = {}
    if rank == 0:
        model.to("cpu")
        if used is not None:
            decays = (1 - learning_rate(recipe, step) * recipe.weight_decay for step in range(recipe.num_steps))
            vocabulary.restore(model, used, full_table, math.prod(decays))
        clip_model.save(model, recipe.model, storage.join(out_path, MODEL_FOLDER))
        storage.write_json(storage.join(out_path, LEDGER_FILE), ledger_record)
        metrics.write()
        seconds = time.monotonic() - started_s
        facts = {
            "samples_seen": recipe.samples_seen,
            "steps": recipe.num_steps,
            "num_samples": len(train_set),
            **count_repeats(train_set_path, ledger.times_seen()),
            "final_loss": loss_value,
            "num_parameters": num_parameters,
            "resumed_at_step": first_step,
            "device": device,
            "device_name": torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu",
            "num_workers": world_size,
            "threads": threads,
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


def _copy_weights(folder: str, model: torch.nn.Module) -> None:
    weights = clip_model.load({"folder": folder}).model.state_dict()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise WinnowError(f"{folder}: expected a model of the recipe's architecture: {error}") from error


def _to_device(batch: Batch, device: str) -> Batch:
    image_BSS3 = batch.image_BSS3.to(device, non_blocking=True)
    return Batch(batch.step, image_BSS3, batch.tokens_BT.to(device, non_blocking=True), batch.part_sizes)


class _Metrics:
    """metrics.jsonl: the lines of an interrupted training up to the step where this one goes on, then new ones."""

    def __init__(self, out_path: str, first_step: int):
        self._path = storage.join(out_path, METRICS_FILE)
        self._written_s = time.monotonic()
        self._lines: list[str] = []
        self._own: list[Mapping[str, Any]] = []
        if storage.exists(self._path):
            self._warn_if_recent()
            for text in storage.read_bytes(self._path).decode().splitlines():
                if json.loads(text)["step"] <= first_step:
                    self._lines.append(text)

    def _warn_if_recent(self) -> None:
        if storage.is_url(self._path):
            return
        age_s = datetime.datetime.now().timestamp() - int(storage.stamp(self._path)) / 1e9
        if age_s < RECENT_S:
            log.logger.warning(
                "%s was written %.0f s ago: if another run trains here, both do the same work", self._path, age_s
            )

    def add(self, line: Mapping[str, Any]) -> None:
        self._own.append(line)
        self._lines.append(json.dumps(line))
        if time.monotonic() - self._written_s > METRICS_EVERY_S:
            self.write()

    def write(self) -> None:
        storage.write_bytes(self._path, "".join(f"{line}\n" for line in self._lines).encode())
        self._written_s = time.monotonic()

    def samples_per_s(self) -> float | None:
        """Over this process's lines but the first, which carries what happens once; None with fewer than two."""
        counted = self._own[1:]
        seconds = sum(
            (line["samples_seen"] - before["samples_seen"]) / line["samples_per_s"]
            for before, line in zip(self._own, counted, strict=False)
        )
        if not seconds:
            return None
        return (counted[-1]["samples_seen"] - self._own[0]["samples_seen"]) / seconds
