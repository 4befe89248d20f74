"""CLIP embeddings of image and caption, and their cosine, with any open_clip model.

Shapes: B batch, T tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.core.errors import WinnowError
from stages.base import Batch, LoadContext, Stage


@dataclass(frozen=True)
class Clip(Stage):
    """Embeddings (L2-normalised, stored as float16) and `clip_score`, their cosine, taken in float32 before rounding.

    Equal for the same device, batch and package versions; else within about 1e-5 in float32. Cost: one forward pass
    of both towers a row; 4 D bytes a row stored.

    Args:
        model: name of a model of the config: published weights, a file, or a training in the same run.
    """

    model: str

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "pixels"
    uses_model: ClassVar[bool] = True
    adds: ClassVar[Mapping[str, str]] = {"clip_score": "float32", "clip_image": "float16[]", "clip_text": "float16[]"}

    def load(self, context: LoadContext) -> Any:
        return loaded(context, f"stage clip: model = {self.model}")

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        from pipeline.core import clip_model

        clip, threads = state
        image_BD, text_BD = clip_model.embed(clip, batch.images, batch.columns["caption"], threads)
        return {
            "clip_score": (image_BD * text_BD).sum(dim=-1).cpu().numpy(),
            "clip_image": image_BD.half().cpu().numpy(),
            "clip_text": text_BD.half().cpu().numpy(),
        }


def loaded(context: LoadContext, place: str) -> tuple[Any, Any]:
    """(the model that the worker was given, threads that preprocess images). `place` starts the error's line."""
    from concurrent.futures import ThreadPoolExecutor

    import torch

    from pipeline.core import clip_model

    if context.model is None:
        raise WinnowError(f"{place}, but the worker was given no model to load")
    torch.set_num_threads(context.threads)
    return clip_model.load(context.model, context.device), ThreadPoolExecutor(context.threads)
