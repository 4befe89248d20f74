"""Recipes: the fixed training budget that all strategies of a comparison share. Light to import: no torch.

debug .. xlarge are DataComp's scales with every constant that its train.py passes to open_clip 2.16.1, or that is
open_clip's default there (betas, eps, weight decay, augmentation). Its "amp" is fp16 autocast with a loss scaler.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core import clip_model, config, storage
from pipeline.core.errors import ConfigError, WinnowError, one_line

VERSION = 2  # bump when the same recipe, train set and seeds give other weights

NOT_IDENTITY = {"grad_checkpointing", "shard_parameters"}  # trade time for memory: the same values


@dataclass(frozen=True)
class Seeds:
    """Where a training's randomness comes from. Which pairs it sees is the selection's, with a seed of its own."""

    initialisation: int  # the first weights
    order: int  # which pair is in which batch, random crops, patch dropout

    def to_json(self) -> dict[str, int]:
        """The seeds as plain values."""
        return asdict(self)


class Recipe(config.Model):
    """What one training does, on whatever train set; nothing in it says where. Defaults are open_clip's for ViTs."""

    model: str | dict[str, Any]  # an architecture of open_clip, or a model_cfg mapping; in a config also its JSON file
    image_size_px: int | None = Field(None, ge=1)  # None: the architecture's own
    start_from: str | None = None  # one of the config's models, of this architecture; None: random weights
    global_batch_size: int = Field(ge=2)  # pairs a step over all ranks: every other pair of the batch is a negative
    samples_seen: int = Field(ge=1)  # the budget, met to the sample: the last batch may be a smaller one
    loss: Literal["clip", "siglip"] = "clip"  # softmax over the batch, or a sigmoid of each pair with a learned bias
    num_negatives: int | None = Field(None, ge=1)  # each pair's, the next ones of the batch; None: all others
    lr: float = Field(gt=0, allow_inf_nan=False)
    warmup_steps: int = Field(0, ge=0)  # linear
    schedule: Literal["cosine", "constant"] = "cosine"  # after the warmup; cosine ends at 0
    weight_decay: float = Field(0.2, ge=0, allow_inf_nan=False)  # not on parameters of fewer than two dimensions
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-6, gt=0, allow_inf_nan=False)
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # bf16, fp16: autocast over fp32 parameters
    crop_scale: list[float] | None = [0.9, 1.0]  # RandomResizedCrop's range of area; None: resize and centre crop
    patch_dropout: float = Field(
        0.0, ge=0, lt=1
    )  # of the image's patches, while training (Li et al. 2023, FLIP); 0: the architecture's own
    ema_decay: float | None = Field(None, gt=0, lt=1)  # the checkpoint is the moving average of the weights
    grad_clip_norm: float | None = Field(None, gt=0, allow_inf_nan=False)
    num_checkpoints: int = Field(1, ge=1)  # models that are kept, at equal parts of the budget, the last included
    chunk_size: int = Field(32, ge=1)  # consecutive samples of the train set that stay together: see ledger.py
    compile: bool = False  # torch.compile: other rounding
    grad_checkpointing: bool = False
    shard_parameters: bool = False  # several workers split weights, gradients and moments, whole on each otherwise

    @field_validator("crop_scale")
    @classmethod
    def _check_crop_scale(cls, scale: list[float] | None) -> list[float] | None:
        if scale is not None and not (len(scale) == 2 and 0 < scale[0] <= scale[1] <= 1):
            raise ValueError(f"{scale}, expected [smallest, largest] with 0 < smallest <= largest <= 1")
        return scale

    @model_validator(mode="after")
    def _check_together(self) -> Recipe:
        if self.num_negatives is not None and self.num_negatives >= self.global_batch_size:
            raise ValueError(
                f"num_negatives = {self.num_negatives}, expected fewer than the {self.global_batch_size} of a batch"
            )
        if self.num_checkpoints > self.num_steps:
            raise ValueError(f"num_checkpoints = {self.num_checkpoints}, expected at most its {self.num_steps} steps")
        if self.shard_parameters and self.precision == "fp16":  # torch's loss scaler can't take split gradients
            raise ValueError("shard_parameters = true with precision = fp16, expected bf16 or fp32")
        if self.shard_parameters and self.compile:
            raise ValueError("shard_parameters = true with compile = true, expected one of them")
        return self

    @property
    def num_steps(self) -> int:
        """Optimizer steps: samples_seen / global_batch_size, rounded up."""
        return -(-self.samples_seen // self.global_batch_size)

    @property
    def kept_steps(self) -> list[int]:
        """Numbers of finished steps after which the model is kept, the last step among them."""
        return [self.num_steps * part // self.num_checkpoints for part in range(1, self.num_checkpoints + 1)]

    def identity(self) -> dict[str, Any]:
        """The fields that change the trained weights, as plain values."""
        return self.model_dump(mode="json", exclude=NOT_IDENTITY)


def parse(values: Mapping[str, Any], place: str) -> Recipe:
    """The recipe that a config spells out, with what a JSON file that it names as its model says in the name's place.

    Raises:
        ConfigError: the first fault, as one line that names `place`.
    """
    values = dict(values)
    if str(values.get("model")).endswith(".json"):
        values["model"] = _model_of_file(str(values["model"]), f"{place}.model")
    parsed = config.validate(Recipe, values, place)
    clip_model.check_trainable(parsed.model, parsed.image_size_px, f"{place}.model")
    return parsed


def _model_of_file(path: str, place: str) -> dict[str, Any]:
    """The model_cfg of a file of its own, as open_clip's are, or of an open_clip_config.json."""
    try:
        found = storage.read_json(storage.absolute(path))
    except (OSError, WinnowError) as error:
        raise ConfigError(f"{place} = {path}, expected a JSON file that can be read: {one_line(error)}") from error
    if isinstance(found, dict):
        found = found.get("model_cfg", found)
    if not isinstance(found, dict):
        raise ConfigError(f"{place} = {path}, expected a file with a model_cfg, found {type(found).__name__}")
    return found


def check(recipe: Recipe) -> list[str]:
    """Warnings, one line each: what is allowed and probably not meant."""
    warnings = []
    if recipe.warmup_steps > recipe.num_steps:
        warnings.append(
            f"warmup_steps = {recipe.warmup_steps} exceeds the {recipe.num_steps} steps of the whole training:"
            f" the learning rate never reaches {recipe.lr:g}"
        )
    if recipe.samples_seen < recipe.global_batch_size:
        warnings.append(
            f"samples_seen = {recipe.samples_seen} is below global_batch_size = {recipe.global_batch_size}:"
            " the only batch is a partial one"
        )
    return warnings


def _datacomp(**own: Any) -> Recipe:
    common: dict[str, Any] = {
        "model": "ViT-B-32",
        "image_size_px": 224,
        "global_batch_size": 4096,
        "lr": 5e-4,
        "warmup_steps": 500,
        "schedule": "cosine",
        "weight_decay": 0.2,
        "beta1": 0.9,
        "beta2": 0.98,
        "eps": 1e-6,
        "precision": "fp16",
        "crop_scale": [0.9, 1.0],
        "grad_checkpointing": True,
    }
    return Recipe(**{**common, **own})


# The demo's budget: found by search so that five strategies times three seeds train in about two minutes on two cores,
# while a clean selection of the demo world clears chance on every task. Its scorer is trained briefly on purpose: at
# 24,000 samples it tells right from wrong as well as the planted truth does.
_DEMO = Recipe(
    model={
        "embed_dim": 96,
        "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 96, "layers": 3, "head_width": 32},
        "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
    },
    global_batch_size=64,
    samples_seen=14_400,
    lr=1.2e-3,
    warmup_steps=30,
    weight_decay=0.1,
    eps=1e-8,
    crop_scale=None,
    chunk_size=8,
)

RECIPES: dict[str, Recipe] = {
    "debug": _datacomp(global_batch_size=1024, samples_seen=128_000, lr=1e-4),  # never leaves its warmup, as there
    "small": _datacomp(samples_seen=12_800_000),
    "medium": _datacomp(samples_seen=128_000_000),
    "large": _datacomp(model="ViT-B-16", global_batch_size=8192, samples_seen=1_280_000_000),
    "xlarge": _datacomp(
        model="ViT-L-14",
        global_batch_size=90_112,
        samples_seen=12_800_000_000,
        lr=1e-3,
        warmup_steps=10_000,
        beta2=0.95,
        precision="bf16",  # fp16 costs accuracy at this scale: DataComp's pull request 47
    ),
    "demo": _DEMO,
    "demo_scorer": _DEMO.model_copy(update={"samples_seen": 6_400}),
}
