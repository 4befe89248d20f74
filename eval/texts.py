"""Texts to features: tokenised once for all models that share a tokenizer, encoded without padding.

Equal texts get one feature, so that they tie exactly whatever batch they came in.

Shapes: T texts, U distinct texts, L tokens of the longest, D embedding width.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import torch

from pipeline.core import clip_model
from pipeline.core.captions import CaptionTokenizer
from pipeline.core.clip_model import Clip

KEPT_LISTS = 4  # a task has one list of prompts or captions, or one for each of its heads


class Tokeniser:
    """A tokenizer that keeps what it made of the last lists of texts, since the next model asks for the same ones."""

    def __init__(self, tokenizer: Callable[[list[str]], torch.Tensor]):
        self.tokenizer = tokenizer
        self._tokenise = CaptionTokenizer(tokenizer)
        self._kept: dict[tuple[str, ...], torch.Tensor] = {}
        self._lock = threading.Lock()  # a second model waits for the first rather than tokenise the same again

    def __call__(self, texts: Sequence[str]) -> torch.Tensor:
        """[T, L] int64 on the CPU, padded to the model's context."""
        key = tuple(texts)
        with self._lock:
            if key not in self._kept:
                while len(self._kept) >= KEPT_LISTS:
                    del self._kept[next(iter(self._kept))]
                self._kept[key] = torch.from_numpy(self._tokenise(texts).astype(np.int64))
            return self._kept[key]


def tokenisers(tokenizers: Sequence[Callable]) -> list[Tokeniser]:
    """A Tokeniser for each of these; tokenizers that do the same share one."""
    found: list[Tokeniser] = []
    for tokenizer in tokenizers:
        same = next((one for one in found if _is_same(one.tokenizer, tokenizer)), None)
        found.append(same or Tokeniser(tokenizer))
    return found


def _is_same(one: Callable, other: Callable) -> bool:
    """True when both have one class and equal settings. A tokenizer that wraps another library's equals itself only."""
    if type(one) is not type(other):
        return False
    settings = [{key: value for key, value in vars(each).items() if key != "cache"} for each in (one, other)]
    return settings[0] == settings[1]


def distinct_texts(texts: Sequence[str]) -> tuple[list[str], torch.Tensor]:
    """The distinct texts in order of appearance, and [T] int64, which of them each text is."""
    distinct = list(dict.fromkeys(texts))
    number = {text: index for index, text in enumerate(distinct)}
    return distinct, torch.tensor([number[text] for text in texts])


@torch.no_grad()
def encode_tokens(clip: Clip, tokens_UL: torch.Tensor, batch_size: int) -> torch.Tensor:
    """[U, D] float32 on the model's device, rows L2-normalised; texts of like length share a batch."""
    length_U = clip_model.caption_lengths(clip.model, tokens_UL)
    order_U = torch.argsort(length_U, stable=True)
    features = []
    start = 0
    while start < len(order_U):
        # the shorter they are, the more of them are as much work as batch_size texts that fill the context
        stop = start + batch_size * tokens_UL.shape[1] // int(length_U[order_U[start]])
        tokens_BL = clip_model.trim(clip.model, tokens_UL[order_U[start:stop]]).to(clip.device)
        features.append(clip_model.encode_text(clip.model, tokens_BL))
        start = stop
    sorted_UD = torch.cat(features)
    text_UD = torch.empty_like(sorted_UD)
    text_UD[order_U.to(clip.device)] = sorted_UD
    return text_UD
