"""What runs remotely and is not a stage's: trainings and evaluations, as plain functions that a worker imports.

torch and what needs it come in there, never in the driver.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval import tasks as eval_tasks
from pipeline.core import clip_model
from pipeline.core.config import Resources
from pipeline.core.engine import post
from training.recipe import Recipe, Seeds
from training.worker import any_leaves, this_machine, train_on_ray


def train_one(
    train_set_path: str,
    out_path: str,
    recipe: Recipe,
    seeds: Seeds,
    device: str,
    threads: int,
    report: Callable[[dict[str, Any]], None],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Facts of one training in this process, a worker of Ray's.

    Args:
        report: posts its progress.
        options: further keywords of training.loop.train.
    """
    from training.loop import train

    leaving = functools.partial(any_leaves, frozenset([this_machine()]))
    where = {"device": device, "threads": threads, "leaving": leaving}
    return train(train_set_path, out_path, recipe, seeds, **where, report=report, **options)


def train_on_several(
    train_set_path: str,
    out_path: str,
    recipe: Recipe,
    seeds: Seeds,
    resources: Resources,
    report: Callable[[dict[str, Any]], None],
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """Facts of one training on several workers; this process only waits for them."""
    return train_on_ray(train_set_path, out_path, recipe, seeds, resources, report=report, **options)


def preprocess_of(
    architecture: clip_model.Architecture, image_size_px: int | None, start: Mapping[str, Any] | None
) -> dict[str, Any]:
    """clip_model.preprocess_config of the models that a recipe trains.

    Args:
        start: what they start from, as clip_model.load takes it.
    """
    clip = clip_model.load(start) if start else clip_model.build(architecture, image_size_px)
    return clip_model.preprocess_config(clip.model)


def store_pixels(
    data: eval_tasks.TaskData, shard: str, preprocess: Mapping[str, Any], out_path: str, threads: int
) -> dict[str, int]:
    """Facts {images, bytes} of one tar of a task, decoded for all checkpoints."""
    from eval.samples import store_pixels

    return store_pixels(data, shard, preprocess, out_path, threads)


def evaluate_all(
    source: Mapping[str, Any],
    model: str,
    pretrained: str,
    tasks: Sequence[eval_tasks.TaskData],
    pixels_paths: Sequence[str],
    out_paths: Sequence[str],
    device: str,
    batch_size: int | None,
    threads: int,
) -> list[tuple[dict[str, Any] | None, str | None]]:
    """(facts, error) of each task of one checkpoint."""
    from eval.evaluate import Checkpoint, evaluate

    done = evaluate(
        [Checkpoint(source, model, pretrained)],
        tasks,
        [out_paths],
        pixels_paths=pixels_paths,
        device=device,
        batch_size=batch_size,
        threads=threads,
    )
    return [(task.facts, task.error) for task in done]


def post_download(board: Any, label: str, worker: str, values: dict[str, Any]) -> None:
    """None; posts one download worker's counts."""
    post(board, f"{label}@{worker}", values)
