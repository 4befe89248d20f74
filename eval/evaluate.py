"""Evaluation of one checkpoint on tasks: a folder of two files for each.

result.json has CLIP_benchmark's schema, and no times, so equal work gives equal bytes. It does hold the task's name
and the name of the checkpoint's folder: the same numbers under another name are other bytes.

    {"dataset": "cifar10", "language": "en", "metrics": {"acc1": 0.43, "acc5": 0.89, "mean_per_class_recall": 0.43},
     "model": "ViT-B-32", "pretrained": "checkpoint-0f3a..", "task": "zeroshot_classification"}

predictions.parquet has a row for each question that was asked: an image to classify (item, label, prediction, top5,
correct), or an image or text to retrieve for (item, direction, group, hit@1, hit@5, hit@10; `group` is the image that
the question belongs to). `item` is `shard/key`, a text's with `#` and its number.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from eval.metrics import classification_metrics, retrieval_metrics
from eval.retrieval import encode_texts, retrieval_ranks
from eval.samples import model_input, read_batches
from eval.tasks import CLASSIFICATION, RECALL_AT, TaskData
from eval.zero_shot import build_classifier, encode_images, predict
from pipeline.core import clip_model, storage
from pipeline.core.clip_model import Clip
from pipeline.core.errors import WinnowError, one_line

RESULT_FILE = "result.json"
PREDICTIONS_FILE = "predictions.parquet"


@dataclass(frozen=True)
class Evaluated:
    """One task's outcome: `facts`, or the `error` that kept it from having any, in one line."""

    data: TaskData
    out_path: str
    facts: dict[str, Any] | None
    error: str | None


def evaluate(
    source: Mapping[str, Any],
    tasks: Sequence[TaskData],
    out_paths: Sequence[str],
    *,
    model: str,
    pretrained: str,
    device: str = "cpu",
    batch_size: int = 256,
    threads: int = 1,
) -> Iterator[Evaluated]:
    """The outcome of each task as it is finished. The model is loaded once; a task that fails, fails alone.

    Args:
        source: the checkpoint, as clip_model.load takes it.
        out_paths: the folder of each task's two files.
        model, pretrained: how result.json calls the architecture and the checkpoint; no paths.
        batch_size: images, prompts or captions a forward pass.
        threads: of torch in this process, and for decoding.
    """
    torch.set_num_threads(threads)
    clip = clip_model.load(source, device)
    for data, out_path in zip(tasks, out_paths, strict=True):
        facts = error = None
        try:
            facts = evaluate_task(
                clip, data, out_path, model=model, pretrained=pretrained, batch_size=batch_size, threads=threads
            )
        except WinnowError as reason:
            error = one_line(reason)
        yield Evaluated(data, out_path, facts, error)


def evaluate_task(
    clip: Clip,
    data: TaskData,
    out_path: str,
    *,
    model: str,
    pretrained: str,
    batch_size: int = 256,
    threads: int = 1,
) -> dict[str, Any]:
    """Facts {metric, value, chance, images, published_images, seconds, ...}; the two files are there. See evaluate."""
    start_s = time.perf_counter()
    run = _classification if data.task.type == CLASSIFICATION else _retrieval
    metrics, predictions, counts = run(clip, data, batch_size, threads)
    with storage.write_file(storage.join(out_path, PREDICTIONS_FILE)) as temporary:
        pq.write_table(predictions, temporary, compression="zstd")
    result = {
        "dataset": data.name,
        "model": model,
        "pretrained": pretrained,
        "task": data.task.type,
        "metrics": metrics,
        "language": "en",
    }
    storage.write_json(storage.join(out_path, RESULT_FILE), result)
    return {
        "metric": data.task.metric,
        "value": metrics[data.task.metric],
        "chance": data.chance,
        **counts,
        "published_images": data.task.images,
        "seconds": time.perf_counter() - start_s,
    }


Outcome = tuple[dict[str, float | None], pa.Table, dict[str, int]]  # metrics, predictions, counts


def _classification(clip: Clip, data: TaskData, batch_size: int, threads: int) -> Outcome:
    classifier_DC = _finite(build_classifier(clip, data.classnames, data.templates, batch_size), data, "prompts")
    items: list[str] = []
    labels: list[int] = []
    tops = []
    for batch in read_batches(data, clip, batch_size, threads):
        image_BD = _finite(encode_images(clip, model_input(clip, batch.pixels)), data, "images")
        items += batch.items
        labels += batch.targets
        tops.append(predict(image_BD, classifier_DC).numpy().astype(np.int32))
    label_N, top_NK = np.array(labels, dtype=np.int32), np.concatenate(tops)
    predictions = pa.table(
        {
            "item": pa.array(items, pa.string()),
            "label": label_N,
            "prediction": top_NK[:, 0],
            "top5": pa.array(list(top_NK), pa.list_(pa.int32())),
            "correct": top_NK[:, 0] == label_N,
        }
    )
    counts = {"images": len(items), "classes": len(data.classnames)}
    return classification_metrics(label_N, top_NK), predictions, counts


def _retrieval(clip: Clip, data: TaskData, batch_size: int, threads: int) -> Outcome:
    items: list[str] = []
    captions: list[list[str]] = []
    images = []
    for batch in read_batches(data, clip, batch_size, threads):
        images.append(_finite(encode_images(clip, model_input(clip, batch.pixels)), data, "images"))
        items += batch.items
        captions += batch.targets
    texts = [caption for of_image in captions for caption in of_image]
    text_UD, distinct_T = encode_texts(clip, texts, batch_size)
    owner_T = np.repeat(np.arange(len(items)), [len(of_image) for of_image in captions])
    ranks = retrieval_ranks(
        torch.cat(images), _finite(text_UD, data, "captions"), distinct_T, torch.from_numpy(owner_T).to(clip.device)
    )
    image_rank_T, text_rank_I = (rank.numpy() for rank in ranks)
    rank_Q = np.concatenate([text_rank_I, image_rank_T])
    text_items = [f"{items[image]}#{number}" for image, some in enumerate(captions) for number in range(len(some))]
    columns = {
        "item": pa.array(items + text_items, pa.string()),
        "direction": pa.array(["image_to_text"] * len(items) + ["text_to_image"] * len(texts), pa.string()),
        "group": pa.array(items + [items[owner] for owner in owner_T], pa.string()),
    }
    predictions = pa.table(columns | {f"hit@{k}": rank_Q < k for k in RECALL_AT})
    counts = {"images": len(items), "captions": len(texts)}
    return retrieval_metrics(image_rank_T, text_rank_I), predictions, counts


def _finite(feature_BD: torch.Tensor, data: TaskData, what: str) -> torch.Tensor:
    """The same features. NaN passes no comparison, so a broken model would look like one that never misses."""
    if not torch.isfinite(feature_BD).all():
        raise WinnowError(
            f"task {data.name}: features of {what} are not finite, expected a model that has not diverged"
        )
    return feature_BD
