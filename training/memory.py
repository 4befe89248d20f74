"""What a training that runs out of memory says: one line with the ways out, from one process and from many workers."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from pipeline.core.errors import WinnowError
from training.recipe import Recipe, Seeds

CPU_ALLOCATOR_FAILED = "DefaultCPUAllocator"  # on a CPU torch raises a plain RuntimeError, with this in it


def explains_out_of_memory(train: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """The training function, whose lack of memory is a WinnowError: trying again would end in the same way."""

    @functools.wraps(train)
    def explained(train_set_path: str, out_path: str, recipe: Recipe, seeds: Seeds, **options: Any) -> dict[str, Any]:
        try:
            return train(train_set_path, out_path, recipe, seeds, **options)
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and CPU_ALLOCATOR_FAILED not in str(error):
                raise
            num_pairs = -(-recipe.global_batch_size // options.get("world_size", 1))
            num_pairs = min(num_pairs, options.get("batch_size") or num_pairs)
            ways = [f"cluster.train.batch_size <= {num_pairs // 2}"] if num_pairs > 1 else []
            ways += [] if recipe.grad_checkpointing else ["grad_checkpointing: true in the recipe"]
            advice = (
                " or ".join(ways) + " (the same result but for rounding, patch dropout and batch statistics)"
                if ways
                else "a smaller model"
            )
            raise WinnowError(
                f"{out_path}: out of memory on {options.get('device', 'cpu')} with {num_pairs} pairs a forward pass,"
                f" expected {advice}: {' '.join(str(error).split())[:200]}"
            ) from error

    return explained
