"""Image and text retrieval with any number of captions an image, in bounded memory.

A query's rank is the number of items that stand before the best of its positives, so a hit among the first k is
`rank < k` for every k at once, without sorting and without a matrix of texts x images. Ties are decided by position
in the data set: a model that scores everything alike is at chance.

Shapes: I images, T texts, U distinct texts, D embedding width, Q queries, N items, P positives of a query.
"""

from __future__ import annotations

import torch

CHUNK_SCORES = 1 << 22  # scores held at once: 16 MB in float32, and masks of the same shape


@torch.no_grad()
def retrieval_ranks(
    image_ID: torch.Tensor,
    text_UD: torch.Tensor,
    distinct_T: torch.Tensor,
    owner_T: torch.Tensor,
    chunk_scores: int = CHUNK_SCORES,
) -> tuple[torch.Tensor, torch.Tensor]:
    """[T] int64 rank of each text's image among the images, and [I] int64 rank of each image's best text, on the CPU.

    Args:
        image_ID, text_UD: float32, rows L2-normalised, on one device.
        distinct_T: int64, which row of text_UD each text is. owner_T: int64 ascending, the image each text belongs
            to; every image has at least one.
        chunk_scores: how many scores are held at once.
    """
    texts_I = torch.bincount(owner_T, minlength=len(image_ID))
    first_I = texts_I.cumsum(0) - texts_I
    # Positions of each image's texts; rows shorter than the longest repeat their first, which changes no best.
    column_P = torch.arange(int(texts_I.max()), device=image_ID.device)
    own_IP = first_I[:, None] + torch.where(column_P < texts_I[:, None], column_P, 0)

    image_rank, text_rank = [], []
    step = max(1, chunk_scores // len(image_ID))
    for start in range(0, len(distinct_T), step):
        score_QN = text_UD[distinct_T[start : start + step]] @ image_ID.T
        image_rank.append(best_rank(score_QN, owner_T[start : start + step, None]).cpu())
    step = max(1, chunk_scores // len(distinct_T))
    for start in range(0, len(image_ID), step):
        score_QU = image_ID[start : start + step] @ text_UD.T
        text_rank.append(best_rank(score_QU[:, distinct_T], own_IP[start : start + step]).cpu())
    return torch.cat(image_rank), torch.cat(text_rank)


def best_rank(score_QN: torch.Tensor, positive_QP: torch.Tensor) -> torch.Tensor:
    """[Q] int64: how many items stand before the query's best positive; of equal scores the earlier item is first.

    Args:
        score_QN: float32, higher is better. positive_QP: int64, items that are right for the query; may repeat.
    """
    own_QP = score_QN.gather(1, positive_QP)
    best_Q1 = own_QP.max(dim=1, keepdim=True).values
    where_Q1 = torch.where(own_QP == best_Q1, positive_QP, score_QN.shape[1]).min(dim=1, keepdim=True).values
    item_N = torch.arange(score_QN.shape[1], device=score_QN.device)
    before_QN = (score_QN > best_Q1) | ((score_QN == best_Q1) & (item_N < where_Q1))
    return before_QN.sum(dim=1)
