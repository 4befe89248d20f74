"""Floating-point operations of a model's training, and how many of them a device can do: what MFU is made of.

Model FLOPs utilisation (Chowdhery et al. 2022, PaLM) counts what the mathematics needs, a multiply-add as two: three
times the forward pass. Passes that are run again to save memory (grad_checkpointing, cached gradients) are not counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pipeline.core import clip_model

BACKWARD_AND_FORWARD = 3

# Peak dense TFLOP/s by a part of torch.cuda.get_device_name, the first that fits; matrix products that add in fp32.
# From NVIDIA's data sheets of each product (halved where they give it with sparsity), the RTX 4090's from its Ada
# white paper. fp32 is without tensor cores. What a device has no unit for is left out.
PEAK_TFLOP_PER_S: dict[str, dict[str, float]] = {
    "B200": {"bf16": 2250, "fp16": 2250, "tf32": 1125, "fp32": 75},
    "H200": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},
    "H100 PCIe": {"bf16": 756, "fp16": 756, "tf32": 378, "fp32": 51},
    "H100 NVL": {"bf16": 835, "fp16": 835, "tf32": 417, "fp32": 60},
    "H100": {"bf16": 989.4, "fp16": 989.4, "tf32": 494.7, "fp32": 66.9},  # SXM
    "A100": {"bf16": 312, "fp16": 312, "tf32": 156, "fp32": 19.5},
    "L40S": {"bf16": 362, "fp16": 362, "tf32": 183, "fp32": 91.6},
    "L4": {"bf16": 121, "fp16": 121, "tf32": 60, "fp32": 30.3},
    "T4": {"fp16": 65, "fp32": 8.1},
    "V100-PCIE": {"fp16": 112, "fp32": 14},
    "V100": {"fp16": 125, "fp32": 15.7},  # SXM2
    "RTX 4090": {"bf16": 165.2, "fp16": 165.2, "tf32": 82.6, "fp32": 82.6},
}
OTHER_PARTS = {"MIG", "Laptop", "D"}  # in names of a part of a device, or of a slower one of like name


def peak_tflop_per_s(device_name: str, precision: str) -> float | None:
    """What a device can do at most; None where it is not known.

    Args:
        device_name: as torch.cuda.get_device_name gives it; anything else, such as "cpu", is not known.
        precision: bf16, fp16, fp32, or tf32 for fp32 whose products may be rounded to it.
    """
    words = device_name.replace("-", " ").split()
    if OTHER_PARTS.intersection(words):
        return None
    for part, peaks in PEAK_TFLOP_PER_S.items():
        wanted = part.replace("-", " ").split()
        if all(word in words for word in wanted):
            return peaks.get(precision)
    return None


class PairFlops:
    """FLOPs of one pair's training step. The model computes nothing here: its tensors have no values (torch's meta)."""

    def __init__(self, model: torch.nn.Module):
        self.context_length = int(model.context_length)
        self._is_causal = clip_model.is_causal(model)
        size = model.visual.image_size
        height, width = size if isinstance(size, Sequence) else (size, size)
        # Two images: normalising over a batch of one may not be possible.
        self._image = _forward_flops(_Tower(model, "image"), torch.empty(2, 3, height, width, device="meta")) // 2
        # Projections grow with the tokens and attention with their square, so three lengths tell all.
        lengths = [self.context_length]
        if self._is_causal:
            lengths = [1, self.context_length // 2, self.context_length]
        tower = _Tower(model, "text")
        found = [_forward_flops(tower, torch.zeros(1, length, dtype=torch.long, device="meta")) for length in lengths]
        self._text = np.polyfit(lengths, found, len(lengths) - 1)

    @property
    def padded(self) -> float:
        """Of a caption that fills the context, as open_clip trains: for comparison with published figures."""
        return BACKWARD_AND_FORWARD * (self._image + float(np.polyval(self._text, self.context_length)))

    def useful(self, mean_tokens: float, mean_square_tokens: float) -> float:
        """The mean over captions of this mean length, counted to the end-of-text token, and mean square of it.

        A text tower that is not causal needs the whole context for any caption.
        """
        if not self._is_causal:
            return self.padded
        square, linear, constant = self._text
        text = square * mean_square_tokens + linear * mean_tokens + constant
        return BACKWARD_AND_FORWARD * (self._image + float(text))


class _Tower(torch.nn.Module):
    def __init__(self, model: Any, kind: str):
        super().__init__()
        self.model, self.kind = model, kind

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        if self.kind == "image":
            return self.model.encode_image(values, normalize=True)
        return clip_model.encode_text(self.model, values)


def _forward_flops(tower: _Tower, values: torch.Tensor) -> int:
    named = [*tower.named_parameters(), *tower.named_buffers()]
    tensors = {name: tensor.detach().to("meta") for name, tensor in named}
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        functional_call(tower, tensors, (values,))
    return counter.get_total_flops()
