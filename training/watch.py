"""What a user watches of a training: the lines of metrics.jsonl. docs/training.md explains every number of a line.

Numbers about features are of rank 0's part of the step that a line is written after, and of its first ROWS pairs where
pairs are compared with each other. They and what is counted come from the device with one transfer a line.
Shapes: B pairs of rank 0's part, n of them that are compared, D embedding width, T tokens.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional

from pipeline.core import log, storage
from pipeline.core.clip_model import Clip
from pipeline.core.errors import one_line
from pipeline.core.training_metrics import METRICS_FILE, last_mean
from training import checkpoint, probe
from training.data import Batch
from training.flops import PairFlops, peak_tflop_per_s
from training.loss import MAX_LOGIT_SCALE, Features
from training.recipe import Recipe
from training.step import Step
from training.train_set import TrainSet

LINES = 100  # a curve of about this many points, at least one every MOST_STEPS_A_LINE
MOST_STEPS_A_LINE = 100
WRITE_EVERY_S = 10.0  # the file is written whole, as object stores can't append
RECENT_S = 600.0
ROWS = 1024
RANK_EVERY_LINES = 5  # the rank of 512 numbers' features takes a GPU about as long as a fast step of 256 pairs
RANKME_EPS = 1e-7  # Garrido et al. 2023, for float32
TIMED = ("samples_per_s", "data_wait_fraction", "tflop_per_s", "mfu_useful", "mfu_padded")  # differ from run to run

CHANCE_FRACTION, CHANCE_STEPS = 0.99, 20
DUPLICATES_FRACTION, RECENT_LINES = 0.3, 5
WAIT_FRACTION, WAIT_S = 0.5, 10.0
CHANCE_ALARM = (
    "the loss stays at chance, which is what guessing gives: lr may be too low or too high, the captions all alike,"
    " or images and captions not belong together"
)
DUPLICATES_ALARM = (
    "more than 30 % of a batch's captions are in it twice, so that right pairs are taught as wrong ones: leave"
    " duplicate captions out, or take a smaller global_batch_size"
)
WAIT_ALARM = (
    "the training waits for data more than half of the time: raise cluster.train.cpus, which are the threads that"
    " decode images"
)


class Watch:
    """Rank 0's view of a training: note() after every step, line() now and then, facts() at the end.

    Args:
        clip: its model on its device, in training; where parameters are sharded, a copy of it.
        held_out_path, threads, batch_size: see probe.Probe.
        kept_weights: a block in which the model after so many steps has the weights that would be kept of it.
        logit_scale: the parameter that is trained.
        first_step, state: where the training goes on, and what state() gave there; None at the start.
    """

    def __init__(
        self,
        out_path: str,
        recipe: Recipe,
        clip: Clip,
        train_set: TrainSet,
        held_out_path: str | None,
        *,
        device: str,
        threads: int,
        batch_size: int | None,
        kept_weights: Callable[[int], contextlib.AbstractContextManager],
        logit_scale: torch.Tensor,
        first_step: int,
        state: Mapping[str, Any] | None,
    ):
        self._recipe, self._logit_scale, self._kept_weights = recipe, logit_scale, kept_weights
        entries = probe.first_entries(train_set)
        self._num_pairs = len(entries)
        self._probe = probe.Probe(
            clip, train_set, entries, held_out_path, recipe, device=device, threads=threads, batch_size=batch_size
        )
        found = (repeats_warning(self._num_pairs, recipe), self._probe.warning)
        self._warnings = [warning for warning in found if warning is not None]
        for warning in self._warnings:
            log.logger.warning("%s: %s", out_path, warning)
        self._flops = None
        try:
            self._flops = PairFlops(clip.model)
        except RuntimeError as error:
            log.logger.warning("%s: no FLOPs and no MFU: its forward pass needs values: %s", out_path, one_line(error))
        self._peak_tflop_per_s = None
        if device.startswith("cuda"):
            rounded = recipe.precision == "fp32" and torch.get_float32_matmul_precision() != "highest"
            name = torch.cuda.get_device_name(device)
            self._peak_tflop_per_s = peak_tflop_per_s(name, "tf32" if rounded else recipe.precision)
        self._rank_steps = set(sorted(line_steps(recipe))[::-RANK_EVERY_LINES])
        self._clamp_hits = torch.tensor(state["clamp_hits"] if state else 0, device=device)
        self._metrics = MetricsFile(out_path, first_step)
        self._line_s, self._num_samples, self._num_own, self._wait_s = time.monotonic(), 0, 0, 0.0

    def note(self, batch: Batch, wait_s: float) -> None:
        """None; counts a finished step, which waited so long for its batch. Does not wait for the device."""
        self._num_samples += sum(batch.part_sizes)
        self._num_own += batch.part_sizes[0]
        self._wait_s += wait_s
        scale = self._logit_scale.detach()
        self._clamp_hits += ((scale <= 0) | (scale >= MAX_LOGIT_SCALE)).any()

    def line(self, batch: Batch, taken: Step, loss: float, lr: float) -> dict[str, Any]:
        """The line after a step, which is in the file before long.

        Args:
            batch, taken: rank 0's part, and what the step left behind.
            loss: of the whole batch.
        """
        done, size, total = batch.step + 1, batch.part_sizes[0], sum(batch.part_sizes)
        samples_seen = batch.step * self._recipe.global_batch_size + total
        num_candidates = min(total, (self._recipe.num_negatives or total) + 1)
        tokens_BT = batch.tokens_BT[:size]
        length_B = tokens_BT.argmax(dim=1) + 1.0 if size else torch.zeros(1, device=tokens_BT.device)
        found = _numbers(
            {
                "logit_scale": taken.features.logit_scale,
                "clamp_hits": self._clamp_hits,
                "grad_norm": taken.grad_norm,
                "tokens": length_B.mean(),
                "square_tokens": length_B.square().mean(),
                **feature_measures(
                    taken.features,
                    tokens_BT,
                    self._recipe.num_negatives,
                    loss=self._recipe.loss,
                    with_rank=done in self._rank_steps,
                ),
            }
        )
        tokens, square_tokens = found.pop("tokens"), found.pop("square_tokens")
        now_s = time.monotonic()
        seconds = now_s - self._line_s
        is_clip = self._recipe.loss == "clip"
        line = {
            "step": done,
            "samples_seen": samples_seen,
            "repeats_per_uid": samples_seen / self._num_pairs,
            "loss": loss,
            "ln_batch": math.log(num_candidates) if is_clip else None,
            "chance_loss": chance_loss(self._recipe.loss, num_candidates),
            "mutual_information_bound_nats": math.log(num_candidates) - loss if is_clip else None,
            "lr": lr,
            **found,
            "clamp_hits": int(found["clamp_hits"]),
            "samples_per_s": self._num_samples / seconds,
            "data_wait_fraction": self._wait_s / seconds,
            **self._speed(self._num_own / seconds, tokens, square_tokens),
        }
        self._clamp_hits.zero_()
        self._line_s, self._num_samples, self._num_own, self._wait_s = now_s, 0, 0, 0.0
        if done in probe.steps(self._recipe):
            with self._kept_weights(done):
                line |= self._probe.recalls()
        if found_alarm := alarm([*self._metrics.lines, line], self._recipe, self._metrics.num_earlier):
            line["alarm"] = found_alarm
        self._metrics.add(line)
        return line

    def _speed(self, own_samples_per_s: float, tokens: float, square_tokens: float) -> dict[str, float | None]:
        if self._flops is None:
            return dict.fromkeys(("tflop_per_s", "mfu_useful", "mfu_padded"))
        useful = own_samples_per_s * self._flops.useful(tokens, square_tokens) / 1e12
        padded = own_samples_per_s * self._flops.padded / 1e12
        peak = self._peak_tflop_per_s
        return {
            "tflop_per_s": useful,
            "mfu_useful": useful / peak if peak else None,
            "mfu_padded": padded / peak if peak else None,
        }

    def state(self) -> dict[str, Any]:
        """What a step checkpoint keeps of it; the lines so far are in the file when this returns."""
        self._metrics.write()
        return {"clamp_hits": int(self._clamp_hits)}

    def facts(self) -> dict[str, Any]:
        """Facts of the finished training; the file is whole when this returns."""
        self._metrics.write()
        lines = self._metrics.lines
        return {
            "final_loss": last_mean(lines, "loss"),
            "train_recall_at_1": lines[-1]["train_recall_at_1"],
            "held_out_recall_at_1": lines[-1].get("held_out_recall_at_1"),
            "recall_pairs": self._probe.num_pairs,
            **{name: self._metrics.mean(name) for name in TIMED},
            "warnings": [*self._warnings, *(line["alarm"] for line in lines if "alarm" in line)],
        }


def line_steps(recipe: Recipe) -> set[int]:
    """Numbers of finished steps after which a line is written."""
    every = max(1, min(MOST_STEPS_A_LINE, recipe.num_steps // LINES))
    return {1, recipe.num_steps, *range(every, recipe.num_steps, every)} | probe.steps(recipe)


def chance_loss(kind: str, num_candidates: int) -> float:
    """The least loss, in nats, of a model that scores all pairs alike: for "clip" ln of the candidates of each pair.

    For "siglip" a model may still learn, as its bias, how many of the pairs are positive: with C candidates it is
    C times the entropy of a coin that shows 1 in C, about ln C + 1.
    """
    if num_candidates < 2 or kind == "clip":
        return math.log(num_candidates)
    return math.log(num_candidates) + (num_candidates - 1) * math.log(num_candidates / (num_candidates - 1))


def feature_measures(
    features: Features,
    tokens_BT: torch.Tensor,
    num_negatives: int | None = None,
    *,
    loss: str = "clip",
    with_rank: bool = True,
) -> dict[str, torch.Tensor | None]:
    """Scalars on the device by name; all are None where there are fewer than two pairs.

    Args:
        features: of B pairs at least; more are left out.
        tokens_BT: their captions: those that are alike up to the end of the context are duplicates.
        loss: the recipe's, which decides what a negative weighs; a logit bias may be there in either.
        with_rank: False leaves rankme None, which is most of the work.
    """
    names = ("alignment", "uniformity_image", "uniformity_text", "modality_gap", "rankme_image", "rankme_text")
    names = (*names, "effective_negatives", "batch_recall_at_1", "duplicate_captions_fraction")
    if len(tokens_BT) < 2:
        return dict.fromkeys(names)
    caption_B = _caption_numbers(tokens_BT)
    rows = min(ROWS, len(tokens_BT))
    image_nD, text_nD = features.image_nD[:rows], features.text_nD[:rows]
    logits_nn = features.logit_scale * image_nD @ text_nD.T
    if features.logit_bias is not None:
        logits_nn = logits_nn + features.logit_bias
    values = (
        (image_nD - text_nD).square().sum(dim=1).mean(),
        uniformity(image_nD),
        uniformity(text_nD),
        (image_nD.mean(dim=0) - text_nD.mean(dim=0)).norm(),
        rankme(image_nD) if with_rank else None,
        rankme(text_nD) if with_rank else None,
        effective_negatives(logits_nn, num_negatives, is_sigmoid=loss == "siglip"),
        probe.mean_recall_at_1(image_nD, text_nD, caption_B[:rows]),
        duplicates_fraction(caption_B),
    )
    return dict(zip(names, values, strict=True))


def uniformity(rows_nD: torch.Tensor) -> torch.Tensor:
    """Scalar: ln of the mean over pairs of rows of exp(-2 squared distance), 0 where all are equal, -4 where evenly
    spread over a sphere of many dimensions (Wang and Isola 2020). Rows are L2-normalised."""
    kernel_nn = torch.exp(4 * (rows_nD @ rows_nD.T - 1)).fill_diagonal_(0)
    return (kernel_nn.sum() / (len(rows_nD) * (len(rows_nD) - 1))).log()


def rankme(rows_nD: torch.Tensor) -> torch.Tensor:
    """Scalar float64: the effective rank, exp of the entropy of the normalised singular values (Garrido et al. 2023).

    Singular values are roots of the smaller Gram matrix's eigenvalues, in float64: many times faster, and exact enough.
    """
    rows_nD = rows_nD.double()
    gram = rows_nD @ rows_nD.T if len(rows_nD) <= rows_nD.shape[1] else rows_nD.T @ rows_nD
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    return torch.special.entr(singular / singular.sum() + RANKME_EPS).sum().exp()


def effective_negatives(logits_nn: torch.Tensor, num_negatives: int | None, *, is_sigmoid: bool) -> torch.Tensor:
    """Scalar: how many negatives a pair learns from: exp of the entropy of their shares of its gradient, the mean over
    rows in both directions. n - 1, or num_negatives, where all weigh alike; 1 where one has it all.

    A negative's share of the gradient goes with exp(logit) in the softmax loss, with sigmoid(logit) in the sigmoid one.
    """
    place_n = torch.arange(len(logits_nn), device=logits_nn.device)
    after_nn = (place_n - place_n[:, None]) % len(logits_nn)
    outside_nn = (after_nn == 0) | (after_nn > (num_negatives or len(logits_nn)))

    def mean_count(logits_nn: torch.Tensor) -> torch.Tensor:
        weight_nn = functional.logsigmoid(logits_nn) if is_sigmoid else logits_nn
        shares_nn = weight_nn.masked_fill(outside_nn, -math.inf).softmax(dim=1)
        return torch.special.entr(shares_nn).sum(dim=1).exp().mean()

    return (mean_count(logits_nn) + mean_count(logits_nn.T)) / 2


def duplicates_fraction(caption_B: torch.Tensor) -> torch.Tensor:
    """Scalar: the share of pairs whose caption another pair has, too: false negatives of each other.

    Args:
        caption_B: a number for each caption.
    """
    ordered_B = caption_B.sort().values
    as_next_B = functional.pad(ordered_B[1:] == ordered_B[:-1], (0, 1))
    return (as_next_B | as_next_B.roll(1)).float().mean()


def _caption_numbers(tokens_BT: torch.Tensor) -> torch.Tensor:
    """[B] int64, equal for equal tokens: a random hash of 64 bits, as exact numbers would wait for the device."""
    draws = torch.Generator().manual_seed(0)
    weights_T = torch.randint(-(2**63), 2**63 - 1, (tokens_BT.shape[1],), generator=draws)
    return (tokens_BT * weights_T.to(tokens_BT.device)).sum(dim=1)


def _numbers(values: Mapping[str, torch.Tensor | None]) -> dict[str, float | None]:
    """The scalars as numbers, with one transfer. What is not finite becomes None, as JSON has no infinity: the gradient
    norm of an fp16 step that overflowed, and was skipped."""
    known = [value.detach().double().reshape(()) for value in values.values() if value is not None]
    numbers = iter(torch.stack(known).tolist())
    found = {name: None if value is None else next(numbers) for name, value in values.items()}
    return {name: None if value is None or not math.isfinite(value) else value for name, value in found.items()}


def repeats_warning(num_pairs: int, recipe: Recipe) -> str | None:
    """One line where a pair has more candidates than there are distinct pairs; else None."""
    size = min(recipe.global_batch_size, recipe.samples_seen)
    if num_pairs >= min(size, (recipe.num_negatives or size) + 1):
        return None
    return (
        f"train set of {num_pairs} distinct pairs, global_batch_size = {recipe.global_batch_size}: every batch repeats"
        " pairs, which are then negatives of themselves"
    )


def alarm(lines: Sequence[Mapping[str, Any]], recipe: Recipe, num_earlier: int) -> str | None:
    """One sentence with advice where the newest line shows that something is amiss which no line before said.

    Args:
        num_earlier: of the lines, those that processes before this one wrote.
    """
    said = {line.get("alarm") for line in lines}
    checks = {
        CHANCE_ALARM: _is_at_chance(lines, recipe),
        DUPLICATES_ALARM: _has_duplicates(lines),
        WAIT_ALARM: _waits(lines[num_earlier:]),
    }
    return next((text for text, is_amiss in checks.items() if is_amiss and text not in said), None)


def _is_at_chance(lines: Sequence[Mapping[str, Any]], recipe: Recipe) -> bool:
    """True where no loss of a tenth of the steps, 20 at least, all after the warmup, was 1 % below chance."""
    first = lines[-1]["step"] - max(CHANCE_STEPS, recipe.num_steps // 10)
    if first < recipe.warmup_steps:
        return False
    return all(line["loss"] >= CHANCE_FRACTION * line["chance_loss"] for line in lines if line["step"] > first)


def _has_duplicates(lines: Sequence[Mapping[str, Any]]) -> bool:
    """True where the mean of the last lines is above the limit."""
    last = [line["duplicate_captions_fraction"] for line in lines[-RECENT_LINES:]]
    recent = [fraction for fraction in last if fraction is not None]
    return len(recent) == RECENT_LINES and sum(recent) / len(recent) > DUPLICATES_FRACTION


def _waits(own: Sequence[Mapping[str, Any]]) -> bool:
    """True where the process waited for most of the time of its last lines: as many as it takes for WAIT_S of waiting,
    and RECENT_LINES at least. Its first line has what happens once, and doesn't count."""
    waited_s = spent_s = 0.0
    for count, (line, before) in enumerate(itertools.pairwise(reversed(own)), start=1):
        seconds = _seconds(before, line)
        spent_s += seconds
        waited_s += seconds * line["data_wait_fraction"]
        if count >= RECENT_LINES and waited_s >= WAIT_S:
            return waited_s > WAIT_FRACTION * spent_s
    return False


def _seconds(before: Mapping[str, Any], line: Mapping[str, Any]) -> float:
    """What passed between two neighbouring lines of one process."""
    return (line["samples_seen"] - before["samples_seen"]) / line["samples_per_s"]


class MetricsFile:
    """metrics.jsonl: the lines of an interrupted training up to the step where this one goes on, then new ones."""

    def __init__(self, out_path: str, first_step: int):
        self._path = storage.join(out_path, METRICS_FILE)
        self._written_s = time.monotonic()
        self.lines: list[Mapping[str, Any]] = []
        if storage.exists(self._path):
            self._warn_if_recent()
            lines = [json.loads(text) for text in storage.read_bytes(self._path).decode().splitlines()]
            self.lines = [line for line in lines if line["step"] <= first_step]
        self.num_earlier = len(self.lines)

    def _warn_if_recent(self) -> None:
        if storage.is_url(self._path):
            return
        age_s = datetime.datetime.now().timestamp() - int(storage.stamp(self._path)) / 1e9
        if age_s < RECENT_S:
            log.logger.warning(
                "%s was written %.0f s ago: if another run trains here, both do the same work", self._path, age_s
            )

    def add(self, line: Mapping[str, Any]) -> None:
        """None; writes the file where that was long ago."""
        self.lines.append(line)
        if time.monotonic() - self._written_s > WRITE_EVERY_S:
            self.write()

    def write(self) -> None:
        """None; the file has all lines when this returns."""
        with checkpoint.written(self._path):
            storage.write_bytes(self._path, "".join(f"{json.dumps(line)}\n" for line in self.lines).encode())
        self._written_s = time.monotonic()

    def mean(self, name: str) -> float | None:
        """A value's mean over the time of this process's lines but the first, which carries what happens once.

        None where a line has none, or there are fewer than two lines.
        """
        own = self.lines[self.num_earlier :]
        weighted = spent_s = 0.0
        for before, line in itertools.pairwise(own):
            if line[name] is None:
                return None
            seconds = _seconds(before, line)
            weighted += seconds * line[name]
            spent_s += seconds
        return weighted / spent_s if spent_s else None
