"""Evaluation of checkpoints on tasks: a folder of two files for each pair of them.

Every model is loaded once and every image set is read once: its batches go through all models, whose features are kept
and scored by the task's type, while the images of the next task are read. Memory: the models, and of two tasks images x
embedding width in float32 for each model.

Threads work on batches of their own, each from the decoding to the last model's forward pass; torch's operators run on
one thread. So nothing waits at barriers, and on a CPU the results do not depend on the number of threads. On a GPU
forward passes come one at a time.

result.json has CLIP_benchmark's schema, and no times, so equal work gives equal bytes. It does hold the task's name
and the name of the checkpoint's folder: the same numbers under another name are other bytes.

    {"dataset": "cifar10", "language": "en", "metrics": {"acc1": 0.43, "acc5": 0.89, "mean_per_class_recall": 0.43},
     "model": "ViT-B-32", "pretrained": "checkpoint-0f3a..", "task": "zeroshot_classification"}

predictions.parquet has a row for each question that was asked: an image to classify (item, label, prediction, top5,
correct; where the task has groups also `group`, null for an image that the worst one is not chosen from; of few shots
also `draw`), an image or text to retrieve for (item, direction, group, hit@1, hit@5, hit@10; `group` is the image that
the question belongs to), or a cue of WinoGAViL (item, jaccard, candidates, counted, images). `item` is `shard/key`, a
text's with `#` and its number.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from eval import groups, winogavil
from eval.linear_probe import draw_shots, fit_probe
from eval.metrics import classification_metrics, retrieval_chance, retrieval_metrics
from eval.retrieval import retrieval_ranks
from eval.samples import Batch, label_of, model_input, read_batches
from eval.tasks import ASSOCIATION, CLASSIFICATION, FACES, LINEAR_PROBE, RECALL_AT, RETRIEVAL, TaskData
from eval.texts import Tokeniser, distinct_texts, encode_tokens, tokenisers
from eval.zero_shot import average_prompts, encode_images, predict, prompts
from pipeline.core import clip_model, storage
from pipeline.core.artifact import canonical_json
from pipeline.core.clip_model import Clip
from pipeline.core.errors import WinnowError, one_line

RESULT_FILE = "result.json"
PREDICTIONS_FILE = "predictions.parquet"
CPU_BATCH = 32  # images, prompts or captions of a forward pass: more do not fit a core's cache, and take longer
GPU_BATCH = 256
GPU = threading.Lock()  # held by the one forward pass at a time


@dataclass(frozen=True)
class Checkpoint:
    """A model to evaluate: `source` as clip_model.load takes it; `model` and `pretrained` are its names in result.json.

    The names are no paths: they say what the architecture and the checkpoint are called.
    """

    source: Mapping[str, Any]
    model: str
    pretrained: str


@dataclass(frozen=True)
class Evaluated:
    """One checkpoint's outcome on one task: `facts`, or the `error` that kept it from having any, in one line."""

    checkpoint: Checkpoint
    data: TaskData
    out_path: str
    facts: dict[str, Any] | None
    error: str | None


@dataclass
class Loaded:
    """A loaded checkpoint, and the classifiers that were built for it, by class names and templates.

    `forward_s` are the seconds of the text tower's forward passes.
    """

    checkpoint: Checkpoint
    clip: Clip
    tokenise: Tokeniser | None = None
    classifiers: dict[tuple, torch.Tensor] = field(default_factory=dict)
    building: Any = field(default_factory=threading.Lock)
    forward_s: float = 0.0

    def classifier(self, data: TaskData, batch_size: int) -> torch.Tensor:
        """[D, C] float32 on the model's device, as zero_shot.average_prompts'; tasks with the same prompts share it."""
        key = (data.classnames, data.templates)
        with self.building:
            if key not in self.classifiers:
                found = self.encode_texts(prompts(data.classnames, data.templates), batch_size)
                built = average_prompts(*found, len(data.templates))
                self.classifiers[key] = finite(built, data, "prompts")
            return self.classifiers[key]

    def encode_texts(self, texts: Sequence[str], batch_size: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[U, D] float32 features of the distinct texts and [T] int64, which of them each text is."""
        distinct, number_T = distinct_texts(texts)
        tokens_UL = (self.tokenise or self.clip.tokenizer)(distinct)
        text_UD, seconds = forward(self.clip, lambda: encode_tokens(self.clip, tokens_UL, batch_size))
        self.forward_s += seconds
        return text_UD, number_T.to(self.clip.device)


@dataclass(frozen=True)
class Encoded:
    """A task's samples as one model sees them: `image_ND` float32 on its device, rows L2-normalised.

    `decode_s` and `forward_s` are the seconds that they took, the first as this model's share; `train` are those that a
    probe is fitted to.
    """

    items: list[str]
    targets: list[Any]
    image_ND: torch.Tensor
    decode_s: float = 0.0
    forward_s: float = 0.0
    train: Encoded | None = None


def evaluate(
    checkpoints: Sequence[Checkpoint],
    tasks: Sequence[TaskData],
    out_paths: Sequence[Sequence[str | None]],
    *,
    pixels_paths: Sequence[str | None] | None = None,
    device: str = "cpu",
    batch_size: int | None = None,
    threads: int = 1,
) -> Iterator[Evaluated]:
    """The outcome of each pair of a task and a checkpoint, task by task. A pair that fails, fails alone.

    Facts: {metric, value, chance, images, published_images, seconds, forward_s, ...}; `seconds` are those that threads
    spent on this pair, with its share of the decoding, and `forward_s` those of its forward passes among them.

    Args:
        out_paths: for each checkpoint the folder of each task's two files; None: this pair is left out.
        pixels_paths: for each task where samples.store_pixels put its images; None: they are decoded.
        batch_size: images, prompts or captions a forward pass; None: CPU_BATCH or GPU_BATCH.
        threads: that decode and compute.
    """
    on_cpu = device == "cpu"
    if on_cpu:
        torch.set_num_threads(1)
    batch_size = batch_size or (CPU_BATCH if on_cpu else GPU_BATCH)
    waiting: deque[Future | Evaluated] = deque()
    with ThreadPoolExecutor(threads) as pool:
        models, errors = _load(checkpoints, device, pool)
        for number, data in enumerate(tasks):
            wanted = [place for place, paths in enumerate(out_paths) if paths[number] is not None]
            loaded = {place: models[place] for place in wanted if place in models}
            pixels_path = pixels_paths[number] if pixels_paths else None
            encoded, error = _encode_task(loaded, data, pixels_path, batch_size, threads)
            for place in wanted:
                out_path = out_paths[place][number]
                if place in encoded:
                    waiting.append(pool.submit(_score, models[place], data, encoded[place], out_path, batch_size))
                else:
                    waiting.append(Evaluated(checkpoints[place], data, out_path, None, errors.get(place, error)))
            del encoded
            while len(waiting) > len(wanted):  # those of the task before
                yield _outcome(waiting.popleft())
        while waiting:
            yield _outcome(waiting.popleft())


def _outcome(found: Future | Evaluated) -> Evaluated:
    return found if isinstance(found, Evaluated) else found.result()


def _load(
    checkpoints: Sequence[Checkpoint], device: str, pool: ThreadPoolExecutor
) -> tuple[dict[int, Loaded], dict[int, str]]:
    """The models by their place among the checkpoints, and why others can't be loaded."""
    loads = [pool.submit(clip_model.load, checkpoint.source, device) for checkpoint in checkpoints]
    clips, errors = {}, {}
    for place, load in enumerate(loads):
        try:
            clips[place] = load.result()
        except WinnowError as error:
            errors[place] = one_line(error)
    shared = tokenisers([clip.tokenizer for clip in clips.values()])
    models = {
        place: Loaded(checkpoints[place], clip, tokenise)
        for (place, clip), tokenise in zip(clips.items(), shared, strict=True)
    }
    return models, errors


def forward(clip: Clip, compute: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What `compute` returns, and the seconds of that; on a GPU it runs alone, and is done."""
    on_cpu = clip.device == "cpu"
    with contextlib.nullcontext() if on_cpu else GPU:
        start_s = time.perf_counter()
        result = compute()
        if not on_cpu:
            torch.cuda.synchronize(clip.device)
        return result, time.perf_counter() - start_s


def _encode_task(
    models: Mapping[int, Loaded], data: TaskData, pixels_path: str | None, batch_size: int, threads: int
) -> tuple[dict[int, Encoded], str | None]:
    """What each model makes of the task's images, or why they can't be read."""
    try:
        encoded = _encode(models, data, pixels_path, batch_size, threads)
        if data.train_shards:
            train = _encode(models, data.train_split(), pixels_path, batch_size, threads)
            encoded = {place: replace(test, train=train[place]) for place, test in encoded.items()}
    except (WinnowError, OSError) as error:
        return {}, one_line(error)
    return encoded, None


def _encode(
    models: Mapping[int, Loaded], data: TaskData, pixels_path: str | None, batch_size: int, threads: int
) -> dict[int, Encoded]:
    """What each model makes of the task's images. Models of one preprocessing share each batch."""
    encoded: dict[int, Encoded] = {}
    alike: dict[str, list[int]] = {}
    for place, model in models.items():
        alike.setdefault(canonical_json(clip_model.preprocess_config(model.clip.model)), []).append(place)
    for places in alike.values():
        clips = [models[place].clip for place in places]
        preprocess = clip_model.preprocess_config(clips[0].model)

        def encode(
            batch: Batch, clips: list[Clip] = clips
        ) -> tuple[list, list, float, list[tuple[torch.Tensor, float]]]:
            image_BCHW = model_input(clips[0], batch.pixels)
            found = [forward(clip, functools.partial(encode_images, clip, image_BCHW)) for clip in clips]
            return batch.items, batch.targets, batch.seconds, found

        done = list(read_batches(data, preprocess, batch_size, threads, pixels_path, encode))
        if not done:
            raise WinnowError(f"task {data.name}: {data.path} has no samples, expected at least one")
        items = [item for of_batch, _, _, _ in done for item in of_batch]
        targets = [target for _, of_batch, _, _ in done for target in of_batch]
        decode_s = sum(seconds for _, _, seconds, _ in done) / len(places)
        for number, place in enumerate(places):
            parts = [found[number] for _, _, _, found in done]
            forward_s = sum(seconds for _, seconds in parts)
            image_ND = torch.cat([image_BD for image_BD, _ in parts])
            encoded[place] = Encoded(items, targets, image_ND, decode_s, forward_s)
    return encoded


def _score(model: Loaded, data: TaskData, encoded: Encoded, out_path: str, batch_size: int) -> Evaluated:
    """One model's outcome on one task; its two files are there."""
    start_s = time.perf_counter()
    model = replace(model, forward_s=0.0)  # of this task alone
    try:
        finite(encoded.image_ND, data, "images")
        metrics, predictions, counts = SCORERS[data.task.type](model, data, encoded, batch_size)
        _write(out_path, model.checkpoint, data, metrics, predictions)
    except (WinnowError, OSError) as error:
        return Evaluated(model.checkpoint, data, out_path, None, one_line(error))
    images_s = [(one.decode_s, one.forward_s) for one in (encoded, encoded.train) if one is not None]
    forward_s = sum(spent for _, spent in images_s)
    facts = {
        "metric": data.task.metric,
        "value": metrics.get(data.task.metric or ""),
        **counts,
        "chance": counts.get("chance") if data.chance is None else data.chance,
        "published_images": data.task.images,
        "forward_s": forward_s + model.forward_s,
        "seconds": sum(spent for spent, _ in images_s) + forward_s + time.perf_counter() - start_s,
    }
    return Evaluated(model.checkpoint, data, out_path, facts, None)


def _write(
    out_path: str,
    checkpoint: Checkpoint,
    data: TaskData,
    metrics: Mapping[str, float | None],
    predictions: pa.Table,
) -> None:
    with storage.write_file(storage.join(out_path, PREDICTIONS_FILE)) as temporary:
        pq.write_table(predictions, temporary, compression="zstd")
    result = {
        "dataset": data.name,
        "model": checkpoint.model,
        "pretrained": checkpoint.pretrained,
        "task": data.task.type,
        "metrics": metrics,
        "language": "en",
    }
    storage.write_json(storage.join(out_path, RESULT_FILE), result)


# Metrics, predictions, counts; among the counts `chance` where it follows from the images.
Outcome = tuple[dict[str, float | None], pa.Table, dict[str, Any]]


def _classification(model: Loaded, data: TaskData, encoded: Encoded, batch_size: int) -> Outcome:
    classifier_DC = model.classifier(data, batch_size)
    tops = [
        predict(image_BD, classifier_DC).numpy().astype(np.int32) for image_BD in encoded.image_ND.split(batch_size)
    ]
    label_N, top_NK = _labels(encoded), np.concatenate(tops)
    predictions = _prediction_table(encoded.items, label_N, top_NK)
    metrics = classification_metrics(label_N, top_NK)
    counts: dict[str, Any] = {"images": len(encoded.items), "classes": len(data.classnames)}
    if data.grouping:
        metrics |= groups.group_metrics(data.grouping, label_N, top_NK, encoded.targets)
    if data.grouping and data.grouping.by:
        names = groups.group_names(data.grouping, encoded.targets)
        predictions = predictions.append_column("group", pa.array(names, pa.string()))
        if data.task.metric == data.grouping.by[0][1]:
            counts["chance"] = groups.worst_group_chance(names, data.grouping, len(data.classnames))
    return metrics, predictions, counts


def _labels(encoded: Encoded) -> np.ndarray:
    return np.array([label_of(target) for target in encoded.targets], dtype=np.int32)


def _prediction_table(items: list[str], label_N: np.ndarray, top_NK: np.ndarray) -> pa.Table:
    return pa.table(
        {
            "item": pa.array(items, pa.string()),
            "label": label_N,
            "prediction": top_NK[:, 0],
            "top5": pa.array(list(top_NK), pa.list_(pa.int32())),
            "correct": top_NK[:, 0] == label_N,
        }
    )


def _linear_probe(model: Loaded, data: TaskData, encoded: Encoded, batch_size: int) -> Outcome:
    """Each draw of few shots has rows of its own in the predictions; metrics are means over the draws."""
    train = encoded.train
    assert train is not None  # a probe has train_shards
    finite(train.image_ND, data, "training images")
    train_label_N, label_N = _labels(train), _labels(encoded)
    found, tables, fits = [], [], []
    for draw in range(data.draws):
        row_N = np.arange(len(train.items))
        if data.shots:
            row_N = draw_shots(train.items, train_label_N, data.classnames, data.shots, draw)
        items = [train.items[row] for row in row_N.tolist()]
        probe = fit_probe(train.image_ND[torch.from_numpy(row_N)], train_label_N[row_N], items, draw)
        top_NK = probe.predict(encoded.image_ND)
        table = _prediction_table(encoded.items, label_N, top_NK)
        tables.append(table.append_column("draw", pa.array([draw] * len(table), pa.int32())) if data.shots else table)
        found.append({f"lp_{name}": value for name, value in classification_metrics(label_N, top_NK).items()})
        fits.append({"draw": draw, "l2": probe.l2, "train_images": len(items), **found[-1]})
    values = {name: [one[name] for one in found] for name in found[0]}
    metrics = {name: None if None in some else float(np.mean(some)) for name, some in values.items()}
    metrics["l2"] = float(np.exp(np.mean([np.log(fit["l2"]) for fit in fits])))
    if data.shots:
        metrics["fewshot_k"] = data.shots
    counts = {"images": len(encoded.items), "classes": len(data.classnames), "train_images": len(train.items)}
    return metrics, pa.concat_tables(tables), counts | {"fits": fits}


def _retrieval(model: Loaded, data: TaskData, encoded: Encoded, batch_size: int) -> Outcome:
    clip, items, captions = model.clip, encoded.items, encoded.targets
    texts = [caption for of_image in captions for caption in of_image]
    text_UD, distinct_T = model.encode_texts(texts, batch_size)
    owner_T = np.repeat(np.arange(len(items)), [len(of_image) for of_image in captions])
    ranks = retrieval_ranks(
        encoded.image_ND, finite(text_UD, data, "captions"), distinct_T, torch.from_numpy(owner_T).to(clip.device)
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
    counts: dict[str, Any] = {"images": len(items), "captions": len(texts)}
    counts["chance"] = retrieval_chance([len(some) for some in captions])[data.task.metric or ""]
    return retrieval_metrics(image_rank_T, text_rank_I), predictions, counts


def _faces(model: Loaded, data: TaskData, encoded: Encoded, batch_size: int) -> Outcome:
    prediction = {}
    for head, one in data.heads.items():
        classifier_DC = model.classifier(one, batch_size)
        tops = [predict(image_BD, classifier_DC)[:, 0] for image_BD in encoded.image_ND.split(batch_size)]
        prediction[head] = torch.cat(tops).numpy()
    columns = {"item": pa.array(encoded.items, pa.string())} | groups.face_columns(prediction, encoded.targets)
    metrics = groups.face_metrics(prediction, encoded.targets)
    return metrics, pa.table(columns), {"images": len(encoded.items)}


def _association(model: Loaded, data: TaskData, encoded: Encoded, batch_size: int) -> Outcome:
    questions = winogavil.read_questions(data.path)
    text_UD, distinct_Q = model.encode_texts([one.prompt for one in questions], batch_size)
    finite(text_UD, data, "cues")
    row = {item: number for number, item in enumerate(encoded.items)}
    found = []
    for one, distinct in zip(questions, distinct_Q.tolist(), strict=True):
        image_CD = encoded.image_ND[[row[image] for image in one.candidates]]
        found.append(winogavil.jaccard((image_CD @ text_UD[distinct]).tolist(), one.right))
    sizes = [len(one.candidates) for one in questions]
    predictions = pa.table(
        {
            "item": pa.array([one.item for one in questions], pa.string()),
            "jaccard": pa.array(found, pa.float64()),
            "candidates": pa.array(sizes, pa.int32()),
            "counted": pa.array([size >= winogavil.COUNTED_CANDIDATES for size in sizes], pa.bool_()),
            "images": pa.array([list(one.candidates) for one in questions], pa.list_(pa.string())),
        }
    )
    counts = {"images": len(encoded.items), "questions": len(questions)}
    counts["chance"] = winogavil.association_chance(questions)[data.task.metric or ""]
    return winogavil.association_metrics(found, sizes), predictions, counts


SCORERS: Mapping[str, Callable[[Loaded, TaskData, Encoded, int], Outcome]] = {
    CLASSIFICATION: _classification,
    LINEAR_PROBE: _linear_probe,
    RETRIEVAL: _retrieval,
    FACES: _faces,
    ASSOCIATION: _association,
}


def finite(feature_BD: torch.Tensor, data: TaskData, what: str) -> torch.Tensor:
    """The same features. NaN passes no comparison, so a broken model would look like one that never misses."""
    if not torch.isfinite(feature_BD).all():
        raise WinnowError(
            f"task {data.name}: features of {what} are not finite, expected a model that has not diverged"
        )
    return feature_BD
