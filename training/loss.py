"""The contrastive losses, over one rank or many: CLIP's symmetric softmax (InfoNCE) and SigLIP's sigmoid (NCE).

Many ranks compute what open_clip's ClipLoss(local_loss=True, gather_with_grad=True) and SigLipLoss do, each its own
rows of the logits, with one difference: the ranks' parts of a batch may differ in size, so that any global batch and
any last partial one are exact. (torch deprecates the gather that ClipLoss calls, too.)
Shapes: n pairs of this rank, N of the batch, M of the largest part, R ranks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import distributed
from torch.nn import functional

MAX_LOGIT_SCALE = math.log(100)


class Features(NamedTuple):
    """What both towers say of a batch: L2-normalised float32 rows, and what makes logits of their cosines."""

    image_nD: torch.Tensor
    text_nD: torch.Tensor
    logit_scale: torch.Tensor  # the factor: exp of the parameter
    logit_bias: torch.Tensor | None = None


def contrastive_loss(
    features: Features,
    part_sizes: Sequence[int],
    rank: int,
    kind: str = "clip",
    num_negatives: int | None = None,
) -> torch.Tensor:
    """Scalar loss of this rank whose mean over ranks is the loss of the whole batch, and so with its gradients.

    Args:
        features: of this rank's pairs. Where part_sizes[rank] is 0 a filler pair, which is ignored.
        part_sizes: [R] how many pairs of the batch each rank has.
        kind: "clip", the mean of both directions' cross-entropy (Radford et al. 2021), or "siglip", the sum over an
            image's logits of -log sigmoid(+-logit), mean over images (Zhai et al. 2023).
        num_negatives: pair i is told from the pairs i + 1 .. i + num_negatives of the batch, in a ring; None: from all.
    """
    size, total = part_sizes[rank], sum(part_sizes)
    image_nD, text_nD = features.image_nD[:size], features.text_nD[:size]
    image_ND, text_ND = image_nD, text_nD
    if len(part_sizes) > 1:
        both_nD = torch.cat([image_nD, text_nD], dim=1)
        both_RMD = _Gather.apply(_padded(both_nD, max(part_sizes)), rank, len(part_sizes))
        both_ND = torch.cat([part[:length] for part, length in zip(both_RMD, part_sizes, strict=True)])
        image_ND, text_ND = both_ND.chunk(2, dim=1)
    own_n = sum(part_sizes[:rank]) + torch.arange(size, device=image_nD.device)
    outside_nN = None
    if num_negatives is not None and num_negatives < total - 1:
        outside_nN = (torch.arange(total, device=own_n.device) - own_n[:, None]) % total > num_negatives

    def logits(rows_nD: torch.Tensor, columns_ND: torch.Tensor) -> torch.Tensor:
        logits_nN = features.logit_scale * rows_nD @ columns_ND.T
        if features.logit_bias is not None:
            logits_nN = logits_nN + features.logit_bias
        return logits_nN if outside_nN is None else logits_nN.masked_fill(outside_nN, -math.inf)

    if kind == "siglip":
        logits_nN = logits(image_nD, text_ND)
        signs_nN = torch.full_like(logits_nN, -1).scatter_(1, own_n[:, None], 1)
        loss = -functional.logsigmoid(signs_nN * logits_nN).sum()
    else:
        image_loss = functional.cross_entropy(logits(image_nD, text_ND), own_n, reduction="sum")
        text_loss = functional.cross_entropy(logits(text_nD, image_ND), own_n, reduction="sum")
        loss = (image_loss + text_loss) / 2
    return loss * len(part_sizes) / total


def clamp_logit_scale(model: torch.nn.Module) -> None:
    """None; keeps the logit scale's logarithm in [0, ln 100], as CLIP and open_clip do after each step."""
    with torch.no_grad():
        model.logit_scale.clamp_(0, MAX_LOGIT_SCALE)


def _padded(rows_nD: torch.Tensor, length: int) -> torch.Tensor:
    return functional.pad(rows_nD, (0, 0, 0, length - len(rows_nD)))


class _Gather(torch.autograd.Function):
    """[M, D] of every rank as [R, M, D]; the gradient of each rank's rows is the sum over all ranks' losses."""

    @staticmethod
    def forward(ctx, local_MD, rank, world_size):
        ctx.rank = rank
        gathered = [torch.empty_like(local_MD) for _ in range(world_size)]
        distributed.all_gather(gathered, local_MD.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx, grad_RMD):
        grad_RMD = grad_RMD.clone(memory_format=torch.contiguous_format)
        if distributed.get_backend() != "nccl":  # gloo has no reduce_scatter
            distributed.all_reduce(grad_RMD)
            return grad_RMD[ctx.rank], None, None
        grad_MD = torch.empty_like(grad_RMD[0])
        distributed.reduce_scatter_tensor(grad_MD, grad_RMD)
        return grad_MD, None, None
