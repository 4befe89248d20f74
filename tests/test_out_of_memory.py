"""A training whose memory does not suffice: one line with the ways out, in one process and on workers."""

from __future__ import annotations

import pytest
import torch

from pipeline.core import storage
from pipeline.core.errors import WinnowError
from tests.training_fixture import recipe, write_train_set
from training.loop import train
from training.recipe import Seeds


def allocate_a_petabyte(line):
    torch.empty(1 << 50, dtype=torch.uint8)


def fail_as_cuda_does(line):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has a total capacity of ...")


def fail_otherwise(line):
    raise RuntimeError("something else")


def test_out_of_memory_is_one_line_with_the_ways_out(tmp_path):
    path = write_train_set(str(tmp_path / "train_set"), 8)
    place, seeds = str(tmp_path / "checkpoint"), Seeds(0, 0)
    with pytest.raises(WinnowError) as caught:
        train(path, place, recipe(), seeds, report=allocate_a_petabyte)
    assert str(caught.value).startswith(
        f"{place}: out of memory on cpu with 8 pairs a forward pass, expected cluster.train.batch_size <= 4 or"
        " grad_checkpointing: true in the recipe (the same result but for rounding, patch dropout and batch statistics): "
    )
    with pytest.raises(WinnowError, match=r"with 2 pairs .*batch_size <= 1 \(the same .* 2\.00 GiB\. GPU 0"):
        train(path, place, recipe(grad_checkpointing=True), seeds, batch_size=2, report=fail_as_cuda_does)
    with pytest.raises(WinnowError, match=r"with 1 pairs a forward pass, expected a smaller model: "):
        train(path, place, recipe(grad_checkpointing=True), seeds, batch_size=1, report=fail_as_cuda_does)
    with pytest.raises(RuntimeError, match="something else"):
        train(path, place, recipe(), seeds, report=fail_otherwise)
    assert not storage.exists(storage.join(place, "open_clip"))
