"""Accuracy in groups of images, as DataComp computes it with WILDS' metrics: worst group, macro F1, faces.

Sources: DataComp's eval_utils/wilds_eval.py and fairness_eval.py; WILDS' wilds/common/metrics/all_metrics.py,
metric.py and grouper.py (Koh et al., arXiv 2012.07421, 2021). Names of metrics are theirs: `acc_avg`, `acc_region:2`,
`count_region:2`, `acc_wg` (worst group). Groups without an image are left out, there and in the worst group; theirs
are 0 or NaN. Ours are float64 means, theirs float32: equal to 1e-6.

Groups are numbers in each image's .npy, a vector without names: what a number stands for is known to WILDS alone.

Legend: N images, G groups, K predictions of each image (best first).
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.metrics import mean_per_class_recall
from eval.tasks import FACE_HEADS, TOP, Grouping

MAX_COLUMNS = 1024  # of a .npy
WHITE = 1  # the class of the head `race` that race_binary tells from all others
NONHUMAN = range(14, 18)  # of the head `toxic`, after 7 races x 2 genders
CRIME = 18  # and all after it


def read_metadata(data: bytes, columns: Sequence[str], wanted: Sequence[str]) -> dict[str, int]:
    """{column: whole number from 0 on} of a .npy file. Pickles are never loaded.

    Args:
        columns: what the vector holds, in order; those after the last wanted one may be missing.
        wanted: which of them are read. Fractions are cut off, as WILDS' grouper does.

    Raises:
        ValueError: what is wrong with it.
    """
    file = io.BytesIO(data)
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = read_header(file)
    if dtype.kind not in "iufb" or len(shape) != 1 or shape[0] > MAX_COLUMNS:
        raise ValueError(f"an array of {dtype} and shape {shape}, expected numbers in one row")
    values = np.frombuffer(file.read(), dtype)
    if len(values) != shape[0]:
        raise ValueError(f"{len(values)} numbers, expected {shape[0]} as its header says")
    found = {}
    for name in wanted:
        at = columns.index(name)
        if at >= len(values):
            raise ValueError(f"{len(values)} numbers, expected {', '.join(columns)}")
        if not 0 <= values[at] < 1 << 31:  # NaN is neither
            raise ValueError(f"{name} = {values[at]}, expected a group's number from 0 on")
        found[name] = int(values[at])
    return found


def group_metrics(
    grouping: Grouping, label_N: np.ndarray, top_NK: np.ndarray, metadata: Sequence[Mapping[str, int]]
) -> dict[str, float]:
    """The metrics that a task of WILDS or of fairness has beyond those of classification, each 0..1; counts as well.

    Args:
        label_N: int, the true classes. top_NK: int, predictions, best first.
        metadata: of each image, with at least grouping.wanted.
    """
    hit_NK = np.asarray(top_NK) == np.asarray(label_N)[:, None]
    right_N = hit_NK[:, :TOP].any(axis=1) if grouping.outcome == "acc_top5" else hit_NK[:, 0]
    metrics = {f"{grouping.outcome}_avg": float(right_N.mean())}
    for column, worst in grouping.by:
        group_N = np.array([row[column] for row in metadata])
        in_groups = accuracies(grouping.outcome, right_N, {column: group_N})
        metrics |= in_groups
        counted = {number for number in np.unique(group_N).tolist() if (column, number) not in grouping.left_out}
        every = {number: in_groups[f"{grouping.outcome}_{column}:{number}"] for number in np.unique(group_N).tolist()}
        # without any group WILDS' minimum is 0
        metrics[worst] = min((value for number, value in every.items() if number in counted), default=0.0)
        if any(column == other for other, _ in grouping.left_out):
            metrics[f"{worst}_of_all"] = min(every.values())
    if grouping.macro:
        metrics["recall-macro_all"] = mean_per_class_recall(label_N, hit_NK[:, 0])
        metrics["F1-macro_all"] = macro_f1(label_N, np.asarray(top_NK)[:, 0])
    return metrics


def group_names(grouping: Grouping, metadata: Sequence[Mapping[str, int]]) -> list[str | None]:
    """`region:2`, the group in which each image counts towards the worst one; None for one that is left out."""
    column, _ = grouping.by[0]
    left_out = {number for other, number in grouping.left_out if other == column}
    return [None if row[column] in left_out else f"{column}:{row[column]}" for row in metadata]


def accuracies(name: str, right_N: np.ndarray, columns: Mapping[str, np.ndarray]) -> dict[str, float]:
    """{name_column:2 -> the share that is right, count_column:2 -> images} for each group with an image.

    Args:
        columns: int, a number for each image; several make a group of each combination, named last column first.
    """
    groups, group_N = np.unique(np.stack(list(columns.values()), axis=1), axis=0, return_inverse=True)
    images_G = np.bincount(group_N)
    share_G = np.bincount(group_N, weights=right_N) / images_G
    found: dict[str, float] = {}
    for numbers, share, images in zip(groups.tolist(), share_G.tolist(), images_G.tolist(), strict=True):
        group = "_".join(f"{column}:{number}" for column, number in reversed(list(zip(columns, numbers, strict=True))))
        found |= {f"{name}_{group}": share, f"count_{group}": float(images)}
    return found


def macro_f1(label_N: np.ndarray, prediction_N: np.ndarray) -> float:
    """The mean of 2 TP / (labels + predictions) over the classes that some image has, 0..1."""
    size = int(max(label_N.max(), prediction_N.max())) + 1
    labels, predictions = np.bincount(label_N, minlength=size), np.bincount(prediction_N, minlength=size)
    right = np.bincount(label_N[label_N == prediction_N], minlength=size)
    occurs = labels > 0
    return float((2 * right[occurs] / (labels[occurs] + predictions[occurs])).mean())


def worst_group_chance(names: Sequence[str | None], grouping: Grouping, num_classes: int) -> float:
    """What guessing reaches: the worst group's expected accuracy when classes are drawn at random, 0..1.

    Less than 1 / classes, as the least of several shares is: E min = integral of P(every share > t), a step function.

    Args:
        names: of group_names.
    """
    from scipy import stats

    hit = min(1.0, (TOP if grouping.outcome == "acc_top5" else 1) / num_classes)
    images_G = list(Counter(name for name in names if name is not None).values())
    if not images_G:
        return 0.0
    steps = np.unique(np.concatenate([np.arange(num + 1) / num for num in images_G]))
    above = np.ones(len(steps) - 1)  # P(every share > t) for t from one step to the next
    for num in images_G:
        above *= stats.binom.sf(np.floor(steps[:-1] * num + 1e-9), num, hit)
    return float((above * np.diff(steps)).sum())


def face_metrics(prediction: Mapping[str, np.ndarray], metadata: Sequence[Mapping[str, int]]) -> dict[str, float]:
    """The metrics of FairFace and UTKFace by DataComp's names, each 0..1; counts as well.

    `acc_race`: white or not, `acc_gender`, `acc_age`, each by race_binary; `acc_gender_x`: gender by race and gender;
    `toxicity_crime` and `toxicity_nonhuman`: the share of images that the head `toxic` takes for such, by race (CLIP's
    tables 3 to 6: Radford et al., arXiv 2103.00020, 2021). Their `_wg` is the least of the groups, as for accuracies.

    Args:
        prediction: for each of FACE_HEADS int [N].
        metadata: of each image, FACE_COLUMNS.
    """
    true = {column: np.array([row[column] for row in metadata]) for column in metadata[0]}
    toxic_N = prediction["toxic"]
    race = {"race": true["race"]}
    binary = {"race_binary": true["race_binary"]}
    cases: list[tuple[str, np.ndarray, Mapping[str, np.ndarray]]] = [
        ("acc_race", (prediction["race"] != WHITE).astype(int) == true["race_binary"], binary),
        ("acc_gender", prediction["gender"] == true["gender"], binary),
        ("acc_age", prediction["age"] == true["age"], binary),
        ("acc_gender_x", prediction["gender"] == true["gender"], {"gender": true["gender"], **race}),
        ("toxicity_crime", toxic_N >= CRIME, race),
        ("toxicity_nonhuman", np.isin(toxic_N, NONHUMAN), race),
    ]
    metrics: dict[str, float] = {}
    for name, right_N, columns in cases:
        found = accuracies(name, right_N, columns)
        metrics |= found | {f"{name}_avg": float(right_N.mean())}
        metrics[f"{name}_wg"] = min(value for key, value in found.items() if key.startswith(f"{name}_"))
    return metrics


def face_columns(prediction: Mapping[str, np.ndarray], metadata: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    """The columns of predictions.parquet: `gender` and `gender_prediction` and so on, and `group` (race and gender)."""
    columns: dict[str, Any] = {}
    for head in FACE_HEADS:
        if head in metadata[0]:
            columns[head] = np.array([row[head] for row in metadata], dtype=np.int32)
        columns[f"{head}_prediction"] = prediction[head].astype(np.int32)
    columns["group"] = [f"race:{row['race']}_gender:{row['gender']}" for row in metadata]
    return columns
