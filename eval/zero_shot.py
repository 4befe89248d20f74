"""Zero-shot classification: class prompts to a linear classifier, images to predictions.

Shapes: B images of a batch, C classes, D embedding width, K predictions of each image.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn import functional

from eval.tasks import TOP
from pipeline.core import clip_model
from pipeline.core.clip_model import Clip

LOGIT_SCALE = 100.0  # CLIP_benchmark's, whatever the model's own


@torch.no_grad()
def build_classifier(clip: Clip, classnames: Sequence[str], templates: Sequence[str], batch_size: int) -> torch.Tensor:
    """[D, C] float32 on the model's device: column c is the unit mean of the unit features of class c's prompts.

    Args:
        templates: prompts with the class name as `{c}`, checked by eval.tasks.
        batch_size: prompts a forward pass; classes stay whole, so one pass holds at least one class.
    """
    step = max(1, batch_size // len(templates))
    columns = []
    for start in range(0, len(classnames), step):
        names = classnames[start : start + step]
        prompts = [template.format(c=name) for name in names for template in templates]
        tokens_BT = clip_model.trim(clip.model, clip.tokenizer(prompts)).to(clip.device)
        features_BD = clip_model.encode_text(clip.model, tokens_BT)
        mean_CD = features_BD.reshape(len(names), len(templates), -1).mean(dim=1)
        columns.append(mean_CD / mean_CD.norm(dim=1, keepdim=True))
    return torch.cat(columns).T.contiguous()


@torch.no_grad()
def predict(image_BD: torch.Tensor, classifier_DC: torch.Tensor) -> torch.Tensor:
    """[B, K] int64 on the CPU: the K = min(5, C) classes with the highest logits, best first, ties by class number.

    Args:
        image_BD: float32, rows L2-normalised. classifier_DC: of build_classifier, on the same device.
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
