"""Parameters split over the ranks of a training, for models that are too large for a copy on each (torch's FSDP2).

A rank holds its part of every weight, gradient and moment. A transformer block is gathered while it computes, and what
is in no block (embeddings, projections, towers without such blocks) while the towers do. Gradients are means over ranks
as in DistributedDataParallel, so it is the same training. Scalars, such as the logit scale, can't be split: every rank
has them. What is gathered here is gathered by all ranks together.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import distributed
from torch.utils import _pytree

BLOCKS = "resblocks"  # what open_clip's own towers call the list of their transformer blocks


def shard(towers: torch.nn.Module, device: str) -> None:
    """None; all ranks split rank 0's parameters among them, in place."""
    from torch.distributed.device_mesh import init_device_mesh  # half a second that other trainings spare
    from torch.distributed.fsdp import fully_shard

    for value in towers.state_dict().values():  # as DistributedDataParallel does: ranks may have drawn other ones
        distributed.broadcast(value, 0)
    mesh = init_device_mesh(torch.device(device).type, (distributed.get_world_size(),))
    scalars = {parameter for parameter in towers.parameters() if parameter.ndim == 0}
    lists = [module for name, module in towers.named_modules() if name.endswith(f".{BLOCKS}")]
    for block in (block for blocks in lists for block in blocks):
        fully_shard(block, mesh=mesh, ignored_params=scalars)
    fully_shard(towers, mesh=mesh, ignored_params=scalars)


def average_scalars(towers: torch.nn.Module) -> None:
    """None; the gradients of what is not split become the mean over ranks, too."""
    gradients = [value.grad for value in towers.parameters() if value.ndim == 0 and value.grad is not None]
    if gradients:
        mean = torch.stack(gradients)
        distributed.all_reduce(mean)
        torch._foreach_copy_(gradients, list((mean / distributed.get_world_size()).unbind()))


@contextlib.contextmanager
def no_sync(towers: Any) -> Iterator[None]:
    """Backward passes meanwhile add to gradients of a rank's own, which the next one outside adds up over ranks."""
    towers.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        towers.set_requires_gradient_sync(True)


def local(values: Iterable[torch.Tensor]) -> list[torch.Tensor]:
    """What this rank has of each tensor, split or not: the same memory."""
    return [value.to_local() if _is_split(value) else value for value in values]


def gathered(value: torch.Tensor) -> torch.Tensor:
    """The whole tensor, on the device of each rank; itself where it is not split."""
    return value.full_tensor() if _is_split(value) else value


def on_rank_0(state: Any, rank: int) -> Any:
    """The containers with whole tensors on the CPU in place of split ones; on ranks but 0 with None for each."""

    def whole(value: torch.Tensor) -> torch.Tensor | None:
        value = gathered(value)
        return value.detach().to("cpu", copy=True) if rank == 0 else None

    return _pytree.tree_map_only(torch.Tensor, whole, state)


def part_like(whole: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A whole tensor, split as `like` is; itself where that is not split. Every rank has the whole one."""
    if not _is_split(like) or whole.shape != like.shape:
        return whole
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(whole, like.device_mesh, like.placements, src_data_rank=None)


def said_by_rank_0(answer: bool, device: str) -> bool:
    """Rank 0's answer, on all ranks."""
    said = torch.tensor(int(answer), device=device)
    distributed.broadcast(said, 0)
    return bool(said)


def _is_split(value: torch.Tensor) -> bool:
    """True for torch's DTensor, whose module not every training needs to import."""
    return hasattr(value, "full_tensor")
