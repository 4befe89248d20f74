"""One optimizer step: both towers, the loss of the whole batch, AdamW, the moving average of the weights.

A batch beyond memory is taken in forward passes of at most `batch_size` pairs, with cached gradients (GradCache, Gao et
al. 2021): features of all parts without a graph, the loss of the whole batch once with its gradients to the features,
then each part again with a graph, through which those gradients go back. So the loss is that of the full batch, and
the logit scale gets its gradient once. Two things still depend on how a batch is cut into passes and ranks: which
patches are dropped, and batch normalisation, whose statistics are those of one pass (a warning says so).
Shapes: B pairs, S image side, T tokens, D embedding width.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from pipeline.core import clip_model, log
from pipeline.core.errors import WinnowError, one_line
from training import sharding
from training.data import Batch
from training.ledger import random_bits
from training.loss import Features, clamp_logit_scale, contrastive_loss
from training.recipe import Recipe

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}
DROPOUT_STREAM = 4
TEXT_GROUPS, GROUP_PAIRS = 4, 64  # groups of captions of like length; the fewest pairs of one, and a CPU's images
GPU_LENGTHS = 8  # there a group's length is a multiple of this: few shapes, whole tensor core tiles


class TwoTowers(torch.nn.Module):
    """The model as one forward pass over both towers, from uint8 pixels and trimmed tokens."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model
        self.has_statistics = any(isinstance(module, _BatchNorm) for module in model.modules())
        preprocess = clip_model.preprocess_config(model)
        for name in ("mean", "std"):
            values = torch.tensor(preprocess[name], dtype=model.logit_scale.dtype)
            self.register_buffer(name, values.view(3, 1, 1), persistent=False)

    def forward(
        self, image_BSS3: torch.Tensor, tokens_BT: torch.Tensor, groups: clip_model.LengthGroups | None = None
    ) -> Features:
        """Features of B pairs, whose captions are computed in groups of like length."""
        pixels_B3SS = image_BSS3.permute(0, 3, 1, 2).to(self.mean.dtype).div(255).sub(self.mean).div(self.std)
        # A CPU takes few images at once, whose activations stay in its cache: a tenth faster at 64 px and 256 pairs.
        most = GROUP_PAIRS if pixels_B3SS.device.type == "cpu" and not self.has_statistics else len(pixels_B3SS)
        image_BD = torch.cat([self.model.encode_image(part, normalize=True) for part in pixels_B3SS.split(most)])
        text_BD = clip_model.encode_text(self.model, tokens_BT, groups)
        logit_scale, logit_bias = self.model.logit_scale.exp(), getattr(self.model, "logit_bias", None)
        if logit_bias is not None:
            logit_bias = logit_bias.clone()  # not the parameter itself: FSDP hangs a hook on each output of each pass
        return Features(_at_least_float32(image_BD), _at_least_float32(text_BD), logit_scale, logit_bias)


def autocast(precision: str, device: str) -> contextlib.AbstractContextManager:
    """A block in which both towers compute in a recipe's precision, with float32 weights."""
    if precision == "fp32":
        return contextlib.nullcontext()
    return torch.autocast(torch.device(device).type, AUTOCAST[precision])


class Step(NamedTuple):
    """What a step leaves behind; on the device, not waited for."""

    loss: torch.Tensor  # of this rank
    grad_norm: torch.Tensor | None  # before clipping; None unless asked for, infinite where an fp16 step overflowed
    features: Features  # of this rank's pairs, without a graph


def learning_rate(recipe: Recipe, step: int) -> float:
    """The rate of a step (0 is the first), as open_clip's: linear warmup, then cosine to 0 or constant."""
    if step < recipe.warmup_steps:
        return recipe.lr * (step + 1) / recipe.warmup_steps
    if recipe.schedule == "constant":
        return recipe.lr
    done = (step - recipe.warmup_steps) / (recipe.num_steps - recipe.warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * done)) * recipe.lr


def average_decay(recipe: Recipe, step: int) -> float:
    """The moving average's decay at a step: the recipe's, less at the start, as TensorFlow's is with num_updates.

    Without that a short training's average would mostly be its random weights.
    """
    assert recipe.ema_decay is not None
    return min(recipe.ema_decay, (1 + step) / (10 + step))


def make_optimizer(model: torch.nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW, fused; no weight decay on gains, biases, the class embedding and the logit scale, as in open_clip."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": recipe.weight_decay},
    ]
    return torch.optim.AdamW(groups, lr=recipe.lr, betas=(recipe.beta1, recipe.beta2), eps=recipe.eps, fused=True)


class Learner:
    """A model with what its steps need. The model is on its device, its token table as it is trained.

    Args:
        order_seed: of patch dropout.
        batch_size: the most pairs of one forward pass; None: a rank's whole part of the batch.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        recipe: Recipe,
        order_seed: int,
        *,
        device: str = "cpu",
        rank: int = 0,
        world_size: int = 1,
        batch_size: int | None = None,
    ):
        self.model, self.recipe = model, recipe
        self._order_seed, self._rank, self._batch_size = order_seed, rank, batch_size
        self._device, self._kind = device, torch.device(device).type
        self._is_sharded = recipe.shard_parameters and world_size > 1
        self._scaler = torch.amp.GradScaler(self._kind, enabled=recipe.precision == "fp16")
        self._bare = TwoTowers(model).to(device)
        if recipe.compile:
            self._bare.compile()
        self._towers: torch.nn.Module = self._bare
        if self._is_sharded:
            sharding.shard(self._bare, device)
        elif world_size > 1:
            with warnings.catch_warnings():  # newer torch has another word for broadcast_buffers, which ours may lack
                warnings.simplefilter("ignore", FutureWarning)
                self._towers = torch.nn.parallel.DistributedDataParallel(
                    self._bare,
                    device_ids=[torch.device(device)] if self._kind == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
        self.optimizer = make_optimizer(model, recipe)
        self._average: list[torch.Tensor] | None = None
        if recipe.ema_decay is not None:
            self._average = [value.clone() for value in self._averaged_values()]
        num_pairs = -(-recipe.global_batch_size // world_size)
        if batch_size is not None:
            num_pairs = min(num_pairs, batch_size)
        if rank == 0 and self._bare.has_statistics and num_pairs < recipe.global_batch_size:
            log.logger.warning(
                "the model normalises over a batch, here over the %d pairs of a rank's forward pass: with other ranks"
                " or another batch_size it becomes another model",
                num_pairs,
            )

    def take_step(self, batch: Batch, want_norm: bool = False) -> Step:
        """What one optimizer step on this rank's part of a batch, which is on the model's device, leaves behind."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.recipe, batch.step)
        self.optimizer.zero_grad(set_to_none=True)
        # All ranks take one way or the other, or their collective calls would come in different orders.
        num_parts = 1 if self._batch_size is None else -(-max(batch.part_sizes) // self._batch_size)
        if num_parts == 1:
            features = self._forward(self._towers, batch, slice(None))
            loss = self._loss(features, batch)
            self._scaler.scale(loss).backward()
        else:
            loss, features = self._cached_gradients(_filled(batch, num_parts), num_parts)
        if self._is_sharded:
            sharding.average_scalars(self.model)
        norm = None
        if want_norm or self.recipe.grad_clip_norm is not None:
            self._scaler.unscale_(self.optimizer)
            parameters = list(self.model.parameters())
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
            norm = sharding.gathered(norm)
            if self.recipe.grad_clip_norm is not None:
                torch.nn.utils.clip_grads_with_norm_(parameters, self.recipe.grad_clip_norm, norm)
        self._scaler.step(self.optimizer)
        self._scaler.update()
        clamp_logit_scale(self.model)
        if self._average is not None:
            decay = average_decay(self.recipe, batch.step)
            torch._foreach_lerp_(sharding.local(self._average), sharding.local(self._averaged_values()), 1 - decay)
        return Step(loss.detach(), norm, _detached(features))

    def _loss(self, features: Features, batch: Batch) -> torch.Tensor:
        return contrastive_loss(features, batch.part_sizes, self._rank, self.recipe.loss, self.recipe.num_negatives)

    def _forward(self, towers: torch.nn.Module, batch: Batch, rows: slice) -> Features:
        """Features of a part of the batch; its patch dropout is a function of step, rank and the part's place."""
        torch.manual_seed(random_bits(self._order_seed, DROPOUT_STREAM, batch.step, self._rank, rows.start or 0) >> 1)
        with autocast(self.recipe.precision, self._device), self._compiler():
            return Features(*towers(batch.image_BSS3[rows], batch.tokens_BT[rows], self._groups(batch.lengths_B[rows])))

    def _groups(self, lengths_B: torch.Tensor) -> clip_model.LengthGroups | None:
        """The captions' groups; None where there are too few of them, and all are computed at once."""
        count = min(TEXT_GROUPS, len(lengths_B) // GROUP_PAIRS)
        if count < 2:
            return None
        return clip_model.length_groups(lengths_B, count, self._device, GPU_LENGTHS if self._kind == "cuda" else 1)

    @contextlib.contextmanager
    def _compiler(self) -> Iterator[None]:
        """Turns what torch.compile can't do here into one line."""
        if not self.recipe.compile:
            yield
            return
        from torch._dynamo.exc import TorchDynamoException

        try:
            yield
        except TorchDynamoException as error:
            reason = one_line(error).removeprefix("InductorError: ").partition(" Set TORCHDYNAMO_VERBOSE")[0]
            raise WinnowError(f"recipe: compile = true, expected a model and a machine for it: {reason}") from error

    def _cached_gradients(self, batch: Batch, num_parts: int) -> tuple[torch.Tensor, Features]:
        """(loss, features) of the batch; its gradients are in the parameters."""
        edges = [len(batch.image_BSS3) * part // num_parts for part in range(num_parts + 1)]
        parts = [slice(start, stop) for start, stop in itertools.pairwise(edges)]
        with torch.no_grad():
            found = [self._forward(self._bare, batch, rows) for rows in parts]
        leaves = Features(
            torch.cat([part.image_nD for part in found]),
            torch.cat([part.text_nD for part in found]),
            found[0].logit_scale,
            found[0].logit_bias,
        )
        features = Features(*(None if value is None else value.detach().requires_grad_() for value in leaves))
        loss = self._loss(features, batch)
        self._scaler.scale(loss).backward()
        for rows in parts:
            is_last = rows is parts[-1]
            with contextlib.nullcontext() if is_last else self._no_sync():
                part = self._forward(self._towers, batch, rows)
                towards = (part.image_nD * features.image_nD.grad[rows]).sum()
                towards = towards + (part.text_nD * features.text_nD.grad[rows]).sum()
                if is_last:
                    towards = towards + part.logit_scale * features.logit_scale.grad
                    if part.logit_bias is not None:
                        towards = towards + part.logit_bias * features.logit_bias.grad
                towards.backward()
        return loss, features

    def _no_sync(self) -> contextlib.AbstractContextManager:
        """A block in which backward passes leave the ranks' gradients apart, to be added up by the next one after."""
        if self._is_sharded:
            return sharding.no_sync(self._towers)
        return contextlib.nullcontext() if self._towers is self._bare else self._towers.no_sync()

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """The model has its moving average as weights meanwhile, where the recipe asks for one."""
        if self._average is None:
            yield
            return
        values = sharding.local(self._averaged_values())
        own = [value.clone() for value in values]
        torch._foreach_copy_(values, sharding.local(self._average))
        try:
            yield
        finally:
            torch._foreach_copy_(values, own)

    def _averaged_values(self) -> list[torch.Tensor]:
        """The weights and, where the model normalises over batches, its running statistics."""
        return [value for value in self.model.state_dict().values() if value.is_floating_point()]

    def full_weights(self) -> dict[str, torch.Tensor]:
        """On rank 0 all weights on the CPU, the moving average where there is one. All ranks call it together."""
        with self.averaged():
            return sharding.on_rank_0(dict(self.model.state_dict()), self._rank)

    def state(self) -> dict[str, Any]:
        """Everything that later steps depend on, as tensors and plain containers, for any number of ranks.

        Where parameters are sharded all ranks call it together, and only rank 0's has the tensors.
        """
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self._scaler.state_dict(),
            "average": self._average,
        }
        return sharding.on_rank_0(state, self._rank) if self._is_sharded else state

    def load_state(self, state: Mapping[str, Any]) -> None:
        """None; goes on where a state() was taken, sharded or not."""
        own = self.model.state_dict()
        self.model.load_state_dict(
            {name: sharding.part_like(value, own[name]) for name, value in state["model"].items()}
        )
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        moments = {
            place: {name: sharding.part_like(value, parameters[place]) for name, value in values.items()}
            for place, values in state["optimizer"]["state"].items()
        }
        self.optimizer.load_state_dict({**state["optimizer"], "state": moments})
        self._scaler.load_state_dict(state["scaler"])
        if self._average is not None:
            parts = [
                sharding.part_like(value, mine) for value, mine in zip(state["average"], self._average, strict=True)
            ]
            torch._foreach_copy_(sharding.local(self._average), sharding.local(parts))


def _at_least_float32(values: torch.Tensor) -> torch.Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _detached(features: Features) -> Features:
    return Features(*(None if value is None else value.detach() for value in features))


def _filled(batch: Batch, num_pairs: int) -> Batch:
    """The batch with its last pair again until there are so many, so that all ranks take as many forward passes."""
    if len(batch.image_BSS3) >= num_pairs:
        return batch
    rows = torch.arange(num_pairs).clamp(max=len(batch.image_BSS3) - 1)
    image_BSS3, tokens_BT = (values[rows.to(values.device)] for values in (batch.image_BSS3, batch.tokens_BT))
    return batch._replace(image_BSS3=image_BSS3, tokens_BT=tokens_BT, lengths_B=batch.lengths_B[rows])
