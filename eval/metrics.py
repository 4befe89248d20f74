"""Metrics of zero-shot tasks, as CLIP_benchmark defines them, on plain arrays.

Legend: N images, K predictions of each (best first), Q queries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from eval.tasks import RECALL_AT, TOP


def classification_metrics(label_N: np.ndarray, top_NK: np.ndarray) -> dict[str, float | None]:
    """{acc1, acc5, mean_per_class_recall}, each 0..1.

    Args:
        label_N: int, the true classes. top_NK: int, the K classes with the highest logits, best first.

    Returns:
        acc5 is None with fewer than 5 predictions: fewer than 5 classes.
    """
    hit_NK = np.asarray(top_NK) == np.asarray(label_N)[:, None]
    return {
        "acc1": float(hit_NK[:, 0].mean()),
        "acc5": float(hit_NK[:, :TOP].any(axis=1).mean()) if hit_NK.shape[1] >= TOP else None,
        "mean_per_class_recall": mean_per_class_recall(label_N, hit_NK[:, 0]),
    }


def mean_per_class_recall(label_N: np.ndarray, correct_N: np.ndarray) -> float:
    """The mean over classes of the share of their images that is correct, 0..1. Classes without an image don't count.

    Args:
        label_N: int, the true classes. correct_N: bool.
    """
    images = np.bincount(label_N)
    hits = np.bincount(label_N, weights=correct_N)
    return float((hits[images > 0] / images[images > 0]).mean())


def retrieval_metrics(image_rank_Q: np.ndarray, text_rank_Q: np.ndarray) -> dict[str, float]:
    """{image_retrieval_recall@k, text_retrieval_recall@k, mean_recall@k} for k = 1, 5, 10, each 0..1.

    The names say what is retrieved: image_retrieval starts from a text.

    Args:
        image_rank_Q: [texts] int, how many images stand before the text's own. text_rank_Q: [images] int, how many
            texts stand before the best of the image's own.
    """
    metrics: dict[str, float] = {}
    for k in RECALL_AT:
        both: Mapping[str, float] = {"image": recall(image_rank_Q, k), "text": recall(text_rank_Q, k)}
        metrics |= {f"{what}_retrieval_recall@{k}": value for what, value in both.items()}
        metrics[f"mean_recall@{k}"] = (both["image"] + both["text"]) / 2
    return metrics


def recall(rank_Q: np.ndarray, k: int) -> float:
    """The share of queries with a positive among the first k, 0..1.

    Args:
        rank_Q: int, how many items stand before the query's best positive.
    """
    return float((np.asarray(rank_Q) < k).mean())


def retrieval_chance(captions_I: Sequence[int]) -> dict[str, float]:
    """What guessing reaches of retrieval_metrics: their expectation when every ranking is drawn at random, each 0..1.

    A text finds its image among the first k of I with probability k / I; an image one of its c texts among the first
    k of T with 1 - C(T - c, k) / C(T, k).

    Args:
        captions_I: how many texts each image has.
    """
    num_images, num_texts = len(captions_I), int(np.sum(captions_I))
    metrics: dict[str, float] = {}
    for k in RECALL_AT:
        image = min(1.0, k / num_images)
        missed_I = np.ones(num_images)
        for step in range(min(k, num_texts)):
            missed_I *= np.maximum(num_texts - np.asarray(captions_I) - step, 0) / (num_texts - step)
        text = float(1 - missed_I.mean())
        metrics |= {f"image_retrieval_recall@{k}": image, f"text_retrieval_recall@{k}": text}
        metrics[f"mean_recall@{k}"] = (image + text) / 2
    return metrics
