"""CLIP embeddings of image and caption, and their cosine, with any open_clip model.

Shapes: B batch, T tokens, D embedding width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.core.errors import WinnowError
from stages.base import Batch, LoadContext, Stage

TEXT_GROUPS = 4  # captions of a batch are encoded in this many groups of like length, to spare padding


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
        from concurrent.futures import ThreadPoolExecutor

        import torch

        from pipeline.core import clip_model

        if context.model is None:
            raise WinnowError(f"stage clip: model = {self.model}, but the worker was given no model to load")
        torch.set_num_threads(context.threads)
        return clip_model.load(context.model, context.device), ThreadPoolExecutor(context.threads)

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        import torch

        from pipeline.core import clip_model

        clip, threads = state
        with torch.inference_mode():
            images_BCHW = torch.stack(list(threads.map(clip.preprocess, batch.images))).to(clip.device)
            image_BD = clip.model.encode_image(images_BCHW, normalize=True).float()
            tokens_BT = clip.tokenizer(batch.columns["caption"])
            order = torch.argsort((tokens_BT != 0).sum(dim=1), stable=True)
            text_BD = torch.empty_like(image_BD)
            for rows in order.chunk(TEXT_GROUPS):
                tokens = tokens_BT[rows].to(clip.device)
                text_BD[rows.to(clip.device)] = clip_model.encode_text(clip.model, tokens, normalize=True).float()
            score_B = (image_BD * text_BD).sum(dim=-1)
        return {
            "clip_score": score_B.cpu().numpy(),
            "clip_image": image_BD.half().cpu().numpy(),
            "clip_text": text_BD.half().cpu().numpy(),
        }
