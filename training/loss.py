"""The symmetric contrastive loss (InfoNCE), over one rank or many.

One rank is open_clip's ClipLoss. Many ranks compute what ClipLoss(local_loss=True, gather_with_grad=True) does, each
its own rows of the logits in both directions, with one difference: the ranks' parts of a batch may differ in size, so
that any global batch and any last partial one are exact. (torch deprecates the gather that ClipLoss calls, too.)
Shapes: n pairs of this rank, N of the batch, M of the largest part, R ranks, D width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from open_clip import ClipLoss
from torch import distributed
from torch.nn import functional

MAX_LOGIT_SCALE = math.log(100)


def contrastive_loss(
    image_nD: torch.Tensor, text_nD: torch.Tensor, logit_scale: torch.Tensor, part_sizes: Sequence[int], rank: int
) -> torch.Tensor:
    """Scalar loss of this rank whose mean over ranks is the loss of the whole batch, and so with its gradients.

    Args:
        image_nD, text_nD: L2-normalised float32 features. Where part_sizes[rank] is 0 a filler pair, which is ignored.
        logit_scale: the factor on cosines (exp of the parameter).
        part_sizes: [R] how many pairs of the batch each rank has.
    """
    world_size, size = len(part_sizes), part_sizes[rank]
    if world_size == 1:
        return ClipLoss()(image_nD, text_nD, logit_scale)
    image_nD, text_nD = image_nD[:size], text_nD[:size]
    both_RMD = _Gather.apply(_padded(torch.cat([image_nD, text_nD], dim=1), max(part_sizes)), rank, world_size)
    both_ND = torch.cat([part[:length] for part, length in zip(both_RMD, part_sizes, strict=True)])
    images_ND, texts_ND = both_ND.chunk(2, dim=1)
    own = sum(part_sizes[:rank]) + torch.arange(size, device=image_nD.device)
    image_loss = functional.cross_entropy(logit_scale * image_nD @ texts_ND.T, own, reduction="sum")
    text_loss = functional.cross_entropy(logit_scale * text_nD @ images_ND.T, own, reduction="sum")
    return (image_loss + text_loss) / 2 * world_size / sum(part_sizes)


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
