"""Training only those rows of the token embedding that the train set's captions use.

A row whose token is in no caption has gradient 0, so AdamW's moments for it stay 0 and all that ever happens to it is
the weight decay: row x prod(1 - lr(t) x weight_decay). So the model trains with a table of the used rows and the rest
is filled in at the end: the weights of the full table's training, up to rounding in rows that nothing was learned for.
With 49,408 tokens, of which a small train set uses a few hundred, the full table is most of a small model's
parameters and, on a CPU, a large part of its step. Token ids keep their order, so the pooled end-of-text token, which
has the largest id, still does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from pipeline.core import clip_model
from training.recipe import Recipe
from training.step import average_decay, learning_rate

TABLE = "token_embedding.weight"  # among the weights of a model that can shrink


def can_shrink(model: Any) -> bool:
    """True for CLIP's own text tower, which uses the table for nothing but looking up tokens."""
    return clip_model.is_causal(model) and isinstance(model.token_embedding, torch.nn.Embedding)


def shrink(model: Any, used: np.ndarray) -> torch.Tensor:
    """The full table [V, D] as it was; the model's is now [len(used), D], for ids that are places in `used`."""
    full = model.token_embedding.weight.detach().clone()
    model.token_embedding = torch.nn.Embedding.from_pretrained(full[torch.from_numpy(used)], freeze=False)
    return full


def restored(trained: torch.Tensor, used: np.ndarray, full: torch.Tensor, factor: float) -> torch.Tensor:
    """The full table [V, D]: trained rows where used, the others as they were times `factor`."""
    table = full * factor
    table[torch.from_numpy(used)] = trained.to(table)
    return table


@contextlib.contextmanager
def whole(model: Any, used: np.ndarray, full: torch.Tensor, factor: float) -> Iterator[None]:
    """The model has the table that restored() makes meanwhile: tokens are the tokenizer's, whatever the caption."""
    compact = model.token_embedding
    table = restored(compact.weight.detach().cpu(), used, full, factor)
    model.token_embedding = torch.nn.Embedding.from_pretrained(table.to(compact.weight.device))
    try:
        yield
    finally:
        model.token_embedding = compact


def unused_factor(recipe: Recipe, num_steps: int) -> float:
    """What so many steps do to a row that no caption uses: its weight decay, seen through the moving average if any."""
    row = mean = 1.0
    for step in range(num_steps):
        row *= 1 - learning_rate(recipe, step) * recipe.weight_decay
        if recipe.ema_decay is not None:
            mean += (1 - average_decay(recipe, step)) * (row - mean)
    return row if recipe.ema_decay is None else mean
