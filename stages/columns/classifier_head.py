"""A classifier's score of an embedding: a few linear layers, given as a file, on top of CLIP."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np

from pipeline.core.errors import WinnowError
from stages.base import Batch, LoadContext, Stage
from stages.row_scores import VECTORS, check_type
from stages.tensor_files import read_state_dict

NAME = re.compile(r"(?:(?P<layer>.*)\.)?(?P<part>weight|bias)")  # layers.2.weight, linear_1.bias, weight
NORM = "norm.mean", "norm.variance"  # of LAION's NSFW heads for B/32 and L/14: of each value of the embedding
NORM_EPSILON = 1e-10  # added to the square root of the variance


@dataclass(frozen=True)
class Layer:
    """`weight` [out, in] and `bias` [out] float64; after_gap: its number is not the one after that of the layer before.

    In an nn.Sequential, that says that something without weights lies between: an activation, or dropout.
    """

    weight: np.ndarray
    bias: np.ndarray
    after_gap: bool


@dataclass(frozen=True)
class ClassifierHead(Stage):
    """The output of the head for the row's embedding at length 1; null without a vector (or with one of zeros).

    The head is linear layers, in the order of the numbers in the weights' names, with the activation between two of
    them; dropout does nothing here. `norm.mean` and `norm.variance` in the file standardise the embedding first.

    LAION's aesthetic predictors have no activation and give about 1 to 10. Its NSFW heads for OpenAI's B/32 and L/14
    are `activation: relu, output: sigmoid`; the one for H/14 is `activation: relu_in_gaps`, as it has no ReLU between
    its last two layers. Each is for embeddings of the CLIP that it was trained on, which their length alone hints at:
    512 for B/32, 768 for L/14, 1024 for H/14.

    Args:
        path: the weights: .pth or .pt of torch.save, .safetensors, .npz; names end in `weight` and `bias`.
        embedding: a column of vectors, as long as the first layer takes.
        activation: which the file does not say; relu: between any two layers; relu_in_gaps: where the numbers leave a
            place for it (layers.12, layers.15), as nn.Sequential's do, and not elsewhere (layers.15, layers.16).
        output: sigmoid where the last layer gives the logit of a probability.

    Computed in float64, so that batches and threads change no more than, rarely, a last bit.

    Cost: about 80 microseconds a row for the five layers of the aesthetic predictor (900,000 weights), 10 for a single
    one; 8 bytes a weight and 16 a value of a batch's embeddings of memory.
    """

    path: str
    embedding: str = "clip_image"
    activation: Literal["none", "relu", "relu_in_gaps"] = "none"
    output: Literal["linear", "sigmoid"] = "linear"

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "columns"
    adds: ClassVar[Mapping[str, str]] = {"head_score": "float32"}
    assets: ClassVar[Mapping[str, str]] = {
        "path": "for aesthetics, sac+logos+ava1-l14-linearMSE.pth of "
        "https://github.com/christophschuhmann/improved-aesthetic-predictor or sa_0_4_vit_l_14_linear.pth of "
        "https://github.com/LAION-AI/aesthetic-predictor; for NSFW, the .pth files of "
        "https://github.com/LAION-AI/CLIP-based-NSFW-Detector",
    }
    batch_size: ClassVar[int] = 2048

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.embedding,)

    def external_files(self) -> Mapping[str, str]:
        return {"path": self.path}

    def check_needs(self, types: Mapping[str, str], owners: Mapping[str, Stage]) -> None:
        check_type("embedding", self.embedding, types[self.embedding], (VECTORS,))

    def load(self, context: LoadContext) -> Any:
        return read_layers(self.path)

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        vectors = batch.columns[self.embedding]
        lengths = np.array([0.0 if one is None else np.linalg.norm(one.astype(np.float64)) for one in vectors])
        rows = np.flatnonzero(np.isfinite(lengths) & (lengths > 0))
        found: list[float | None] = [None] * len(vectors)
        if len(rows):
            widths = {len(vectors[row]) for row in rows}
            expected = state[0].weight.shape[1]
            if widths != {expected}:
                raise WinnowError(
                    f"column {self.embedding}: vectors of {', '.join(map(str, sorted(widths)))} values, expected the "
                    f"{expected} that {self.path} takes"
                )
            values = np.stack([vectors[row] for row in rows]).astype(np.float64) / lengths[rows, None]
            for row, score in zip(rows, self.scores(values, state), strict=True):
                found[row] = float(score)
        return {"head_score": found}

    def scores(self, values: np.ndarray, layers: Sequence[Layer]) -> np.ndarray:
        """[n] float64 of [n, d] float64."""
        for number, layer in enumerate(layers):
            if number and (self.activation == "relu" or (self.activation == "relu_in_gaps" and layer.after_gap)):
                values = np.maximum(values, 0)
            values = values @ layer.weight.T + layer.bias
        if self.output == "linear":
            return values[:, 0]
        return 0.5 * (1 + np.tanh(0.5 * values[:, 0]))  # 1 / (1 + exp(-x)), which can't overflow


def read_layers(path: str) -> list[Layer]:
    """The file's linear layers, in order.

    Raises:
        WinnowError: the file can't be read, or holds something else than linear layers that fit together and end in one
            number.
    """
    state = read_state_dict(path)
    for name, array in state.items():
        if not np.isfinite(array).all():
            raise WinnowError(f"{path}: {name} has NaN or infinite numbers, expected finite ones")
    norm = [state.pop(name).astype(np.float64) for name in NORM] if set(NORM) <= set(state) else None
    parts: dict[tuple[int, ...], dict[str, np.ndarray]] = {}
    owners: dict[tuple[int, ...], str] = {}
    for name, array in state.items():
        match = NAME.fullmatch(name)
        if not match or array.ndim != {"weight": 2, "bias": 1}[match["part"]] or not array.size:
            shape = list(array.shape)
            raise WinnowError(f"{path}: {name} of shape {shape}, expected weights [out, in] and biases [out] alone")
        layer = match["layer"] or ""
        number = tuple(map(int, re.findall(r"\d+", layer)))
        if owners.setdefault(number, layer) != layer:
            raise WinnowError(f"{path}: layers {owners[number]} and {layer}, expected different numbers in their names")
        parts.setdefault(number, {})[match["part"]] = array.astype(np.float64)
    layers: list[Layer] = []
    before: tuple[int, ...] = ()
    for number in sorted(parts):
        place = f"{path}: layer {owners[number] or 'weight'}"
        if "weight" not in parts[number]:
            raise WinnowError(f"{place} has a bias alone, expected a weight")
        weight = parts[number]["weight"]
        bias = parts[number].get("bias", np.zeros(len(weight)))
        if len(bias) != len(weight):
            raise WinnowError(
                f"{place} has a weight of {len(weight)} outputs and a bias of {len(bias)}, expected as many"
            )
        if layers and weight.shape[1] != len(layers[-1].weight):
            given = len(layers[-1].weight)
            raise WinnowError(f"{place} takes {weight.shape[1]} values, expected the {given} that the one before gives")
        follows = bool(before) and number == (*before[:-1], before[-1] + 1)
        layers.append(Layer(weight, bias, not follows))
        before = number
    if not layers or len(layers[-1].weight) != 1:
        raise WinnowError(
            f"{path}: the last layer gives {len(layers[-1].weight) if layers else 0} values, expected one"
        )
    return [_standardising(layers[0], norm, path), *layers[1:]] if norm else layers


def _standardising(layer: Layer, norm: Sequence[np.ndarray], path: str) -> Layer:
    """The layer, taking values that are still to be standardised with this mean and variance."""
    mean, variance = norm
    expected = (layer.weight.shape[1],)
    if mean.shape != expected or variance.shape != expected or (variance < 0).any():
        raise WinnowError(
            f"{path}: norm.mean of shape {list(mean.shape)}, norm.variance of shape {list(variance.shape)}, expected "
            f"{expected[0]} numbers each, variances >= 0"
        )
    weight = layer.weight / (np.sqrt(variance) + NORM_EPSILON)
    return Layer(weight, layer.bias - weight @ mean, layer.after_gap)
