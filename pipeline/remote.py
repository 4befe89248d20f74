"""What runs remotely and is not a stage's: trainings and evaluations, as plain functions that a worker imports.

torch and what needs it come in there, never in the driver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from eval import tasks as eval_tasks
from pipeline.core.config import Resources
from pipeline.core.engine import post
from training.recipe import Recipe, Seeds
from training.worker import train_on_ray


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
    """Facts of one training in this process.

    Args:
        report: posts its progress.
        options: further keywords of training.loop.train.
    """
    from training.loop import train

    return train(train_set_path, out_path, recipe, seeds, device=device, threads=threads, report=report, **options)


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


def evaluate_all(
    source: Mapping[str, Any],
    tasks: Sequence[eval_tasks.TaskData],
    out_paths: Sequence[str],
    model: str,
    pretrained: str,
    device: str,
    batch_size: int,
    threads: int,
) -> list[tuple[dict[str, Any] | None, str | None]]:
    """(facts, error) of each task of one checkpoint."""
    from eval.evaluate import evaluate

    done = evaluate(
        source,
        tasks,
        out_paths,
        model=model,
        pretrained=pretrained,
        device=device,
        batch_size=batch_size,
        threads=threads,
    )
    return [(task.facts, task.error) for task in done]


def post_download(board: Any, label: str, worker: str, values: dict[str, Any]) -> None:
    """None; posts one download worker's counts."""
    post(board, f"{label}@{worker}", values)
