"""Zero-shot classification: class prompts to a linear classifier, images to predictions.

Shapes: B images of a batch, C classes, P prompts, T templates, U distinct prompts, D embedding width, K predictions.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from eval.tasks import TOP
from pipeline.core.clip_model import Clip

LOGIT_SCALE = 100.0  # CLIP_benchmark's, whatever the model's own


def prompts(classnames: Sequence[str], templates: Sequence[str]) -> list[str]:
    """Every class in every template, class by class."""
    return [template.format(c=name) for name in classnames for template in templates]


def average_prompts(text_UD: torch.Tensor, number_P: torch.Tensor, num_templates: int) -> torch.Tensor:
    """[D, C] float32: column c is the unit mean of the features of class c's prompts.

    Args:
        text_UD: float32, rows L2-normalised, of the distinct prompts. number_P: int64, which of them each prompt is.
    """
    mean_CD = torch.stack([text_UD[number_T].mean(dim=0) for number_T in number_P.split(num_templates)])
    return (mean_CD / mean_CD.norm(dim=1, keepdim=True)).T.contiguous()


@torch.no_grad()
def predict(image_BD: torch.Tensor, classifier_DC: torch.Tensor) -> torch.Tensor:
    """[B, K] int64 on the CPU: the K = min(5, C) classes with the highest logits, best first, ties by class number.

    Args:
        image_BD: float32, rows L2-normalised. classifier_DC: of average_prompts, on the same device.
    """
    return top_classes(LOGIT_SCALE * image_BD @ classifier_DC)


def top_classes(logits_BC: torch.Tensor) -> torch.Tensor:
    """[B, K] int64 on the CPU: the K = min(5, C) classes with the highest logits, best first, ties by class number."""
    order_BC = torch.sort(logits_BC, dim=1, descending=True, stable=True).indices  # topk breaks ties as it likes
    return order_BC[:, :TOP].cpu()


@torch.no_grad()
def encode_images(clip: Clip, image_BCHW: torch.Tensor) -> torch.Tensor:
    """[B, D] float32 on the model's device, rows L2-normalised.

    Args:
        image_BCHW: float32 on the model's device, preprocessed.
    """
    return functional.normalize(clip.model.encode_image(image_BCHW), dim=-1)
