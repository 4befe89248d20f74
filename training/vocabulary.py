"""Training only those rows of the token embedding that the train set's captions use.

A row whose token is in no caption has gradient 0, so AdamW's moments for it stay 0 and all that ever happens to it is
the weight decay: row x prod(1 - lr(t) x weight_decay). So the model trains with a table of the used rows and the rest
is filled in at the end: the weights of the full table's training, up to rounding in rows that nothing was learned for.
With 49,408 tokens, of which a small train set uses a few hundred, the full table is most of a small model's
parameters and, on a CPU, a large part of its step. Token ids keep their order, so the pooled end-of-text token, which
has the largest id, still does.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch


def can_shrink(model: Any) -> bool:
    """True for CLIP's own text tower, which uses the table for nothing but looking up tokens."""
    return (
        isinstance(getattr(model, "token_embedding", None), torch.nn.Embedding)
        and getattr(model, "text_pool_type", None) == "argmax"
        and getattr(model, "attn_mask", None) is not None
    )


def shrink(model: Any, used: np.ndarray) -> torch.Tensor:
    """The full table [V, D] as it was; the model's is now [len(used), D], for ids that are places in `used`."""
    full = model.token_embedding.weight.detach().clone()
    model.token_embedding = torch.nn.Embedding.from_pretrained(full[torch.from_numpy(used)], freeze=False)
    return full


def restore(model: Any, used: np.ndarray, full: torch.Tensor, decay: float) -> None:
    """None; the model has its full table again: trained rows where used, the others times `decay`."""
    table = full * decay
    table[torch.from_numpy(used)] = model.token_embedding.weight.detach().to(table)
    model.token_embedding = torch.nn.Embedding.from_pretrained(table, freeze=False)
