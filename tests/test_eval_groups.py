"""The tasks of WILDS, of fairness and WinoGAViL against plain implementations of DataComp's code, on made sets."""

from __future__ import annotations

import csv
import io
import itertools
import json
import re

import numpy as np
import pytest
import torch

from eval import groups, winogavil
from eval.evaluate import Checkpoint, Loaded
from eval.metrics import retrieval_chance
from eval.samples import read_batches, store_pixels
from eval.tasks import GROUPINGS, TASKS, TaskData, resolve_task, task_digest
from eval.winogavil import association_chance, association_metrics, jaccard, read_questions
from pipeline.core import clip_model
from pipeline.core.errors import ConfigError
from tests.conftest import MODEL
from tests.task_fixture import failure, npy, picture, scored, write_files, write_tars

TEMPLATES = "a photo of {c}.\n{c}\n"
NUM = 120


@pytest.fixture(scope="module")
def sharp(tmp_path_factory) -> str:
    """A model folder with random weights, large enough that features of different images differ."""
    folder = str(tmp_path_factory.mktemp("sharp"))
    torch.manual_seed(1)
    model = clip_model.build(MODEL).model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    clip_model.save(model, MODEL, folder)
    return folder


# DataComp's code, line by line in plain Python. Metadata as lists, one for each image.


def accuracy_by_group(name: str, right: list[bool], metadata: list[list], fields: list[str], by: list[str]):
    """WILDS' standard_group_eval: (results without groups that no image is in, the worst group)."""
    at = [index for index, field in enumerate(fields) if field in by]
    rows = [[int(row[index]) for index in at] for row in metadata]
    sizes = [max(row[column] for row in rows) + 1 for column in range(len(at))]
    factors = [1, *itertools.accumulate(sizes, lambda a, b: a * b)]
    members: dict[int, list[bool]] = {}
    for row, hit in zip(rows, right, strict=True):
        members.setdefault(sum(value * factor for value, factor in zip(row, factors, strict=False)), []).append(hit)
    results = {f"{name}_avg": sum(right) / len(right)}
    means = []
    for group in range(factors[-1]):
        values = [group // factor % size for factor, size in zip(factors, sizes, strict=False)]
        words = "_".join(f"{by[index]}:{values[index]}" for index in reversed(range(len(by))))
        if group in members:
            means.append((words, sum(members[group]) / len(members[group])))
            results[f"{name}_{words}"] = means[-1][1]
            results[f"count_{words}"] = len(members[group])
    return results, means


def f1_macro(labels: list[int], predictions: list[int]) -> float:
    """sklearn's f1_score(y_true, y_pred, average="macro", labels=unique(y_true))."""
    scores = []
    for one in sorted(set(labels)):
        tp = sum(a == one == b for a, b in zip(labels, predictions, strict=True))
        fp = sum(a != one == b for a, b in zip(labels, predictions, strict=True))
        fn = sum(a == one != b for a, b in zip(labels, predictions, strict=True))
        scores.append(2 * tp / (2 * tp + fp + fn))
    return sum(scores) / len(scores)


def recall_macro(labels: list[int], predictions: list[int]) -> float:
    shares = []
    for one in sorted(set(labels)):
        own = [b == one for a, b in zip(labels, predictions, strict=True) if a == one]
        shares.append(sum(own) / len(own))
    return sum(shares) / len(shares)


def made(
    tmp_path, name: str, metadata: list[list], labels: list[int], suffixes=("cls", "npy"), dtype=np.int64
) -> TaskData:
    """The task with a .cls and a .npy beside each image, in two tars; two of its classes have the same name."""
    num_classes = TASKS[name].classes
    names = [f"thing {number}" for number in range(num_classes)]
    names[1] = names[0]  # an exact tie, which the lower number wins
    members = [
        [
            (f"s{row:07d}.webp", picture(row, "WEBP")),
            *(
                (f"s{row:07d}.{suffix}", data)
                for suffix, data in (("cls", str(labels[row]).encode()), ("npy", npy(np.array(metadata[row], dtype))))
                if suffix in suffixes
            ),
        ]
        for row in range(len(labels))
    ]
    half = len(members) // 2
    tars = [[member for row in part for member in row] for part in (members[:half], members[half:])]
    files = {"classnames.txt": "\n".join(names) + "\n", "zeroshot_classification_templates.txt": TEMPLATES}
    folder = name.removeprefix("fairness/").replace("/", "-")
    write_tars(tmp_path / f"wds_{folder}_test", tars, files)
    return resolve_task(name, str(tmp_path))


def drawn(seed: int, sizes: list[int], num: int = NUM) -> list[list[int]]:
    """Metadata: random numbers below each size."""
    rng = np.random.default_rng(seed)
    return [[int(rng.integers(size)) for size in sizes] for _ in range(num)]


def some_labels(
    sharp: str, tmp_path, name: str, metadata, num: int = NUM, dtype=np.int64
) -> tuple[TaskData, list[int]]:
    """A task whose labels are what the model predicts for about half of the images, else another class."""
    data = made(tmp_path / "first", name, metadata, [0] * num, dtype=dtype)
    _, rows, _ = scored(sharp, data, tmp_path / "first" / "out")
    rng = np.random.default_rng(5)
    choices = TASKS[name].classes
    labels = [
        row["prediction"]
        if rng.random() < 0.5
        else row["top5"][-1]
        if rng.random() < 0.5
        else int(rng.integers(choices))
        for row in rows
    ]
    return made(tmp_path / "second", name, metadata, labels, dtype=dtype), labels


def check(metrics: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, abs=1e-12), name


def test_iwildcam_is_macro_f1_over_the_labels_that_occur(tmp_path, sharp):
    data, labels = some_labels(sharp, tmp_path, "wilds/iwildcam", drawn(0, [3, 9]), 60)
    metrics, rows, facts = scored(sharp, data, tmp_path / "out")
    predictions = [row["prediction"] for row in rows]
    assert set(predictions) - set(labels), "expected predictions of a class that no image has"
    expected = {
        "F1-macro_all": f1_macro(labels, predictions),
        "recall-macro_all": recall_macro(labels, predictions),
        "mean_per_class_recall": recall_macro(labels, predictions),
        "acc_avg": sum(a == b for a, b in zip(labels, predictions, strict=True)) / 60,
    }
    check(metrics, expected)
    assert 0 < metrics["F1-macro_all"] < 1
    assert (facts["metric"], facts["value"], facts["chance"]) == ("F1-macro_all", metrics["F1-macro_all"], 0.143056)
    assert list(rows[0]) == ["item", "label", "prediction", "top5", "correct"]


def test_iwildcam_needs_no_metadata(tmp_path, sharp):
    data = made(tmp_path, "wilds/iwildcam", drawn(0, [2], 6), [0] * 6, suffixes=("cls",))
    assert scored(sharp, data, tmp_path / "out")[2]["images"] == 6


def test_camelyon17_by_slide(tmp_path, sharp):
    metadata = [[2, [20, 21, 28][row % 3], row % 2] for row in range(NUM)]
    data, labels = some_labels(sharp, tmp_path, "wilds/camelyon17", metadata)
    metrics, rows, facts = scored(sharp, data, tmp_path / "out")
    right = [row["prediction"] == label for row, label in zip(rows, labels, strict=True)]
    expected, means = accuracy_by_group("acc", right, metadata, ["hospital", "slide", "y"], ["slide"])
    check(metrics, expected | {"acc_wg": min(value for _, value in means), "acc1": sum(right) / NUM})
    assert metrics["acc5"] is None
    assert "acc_slide:0" not in metrics
    assert (facts["metric"], facts["chance"]) == ("acc1", 0.5)
    assert [row["group"] for row in rows] == [f"slide:{row[1]}" for row in metadata]
    assert {row["prediction"] for row in rows} == {0}, "of two classes with the same prompts the first wins every tie"


def test_fmow_leaves_out_the_region_other_and_says_what_datacomps_code_gets(tmp_path, sharp):
    metadata = [[[0, 1, 2, 4][row % 4], row % 7 + 1, 0] for row in range(NUM - 4)] + [[5, 3, 0]] * 4
    data = made(tmp_path / "first", "wilds/fmow", metadata, [0] * NUM)
    _, rows, _ = scored(sharp, data, tmp_path / "first" / "out")
    right = [row % 3 > 0 and metadata[row][0] != 5 for row in range(NUM)]
    labels = [rows[row]["prediction"] if right[row] else (rows[row]["prediction"] + 7) % 62 for row in range(NUM)]
    data = made(tmp_path / "second", "wilds/fmow", metadata, labels)
    metrics, rows, facts = scored(sharp, data, tmp_path / "out")
    assert [row["correct"] for row in rows] == right
    fields = ["region", "year", "y"]
    years, by_year = accuracy_by_group("acc", right, metadata, fields, ["year"])
    regions, by_region = accuracy_by_group("acc", right, metadata, fields, ["region"])
    check(metrics, years | regions)
    named = [value for group, value in by_region if group != "region:5"]
    assert metrics["acc_worst_region"] == min(named) > 0
    assert metrics["acc_worst_region_of_all"] == metrics["acc_region:5"] == 0
    assert metrics["acc_worst_year"] == min(value for _, value in by_year)
    assert "acc_region:3" not in metrics
    assert [row["group"] for row in rows[-5:]] == ["region:4"] + [None] * 4
    assert (facts["value"], facts["chance"]) == (min(named), 0.027193)


def test_fmow_with_the_region_other_alone_has_no_worst_region():
    right = np.array([[1, 0], [0, 1]])
    metadata = [{"region": 5, "year": 0}] * 2
    found = groups.group_metrics(GROUPINGS["wilds/fmow"], np.array([1, 1]), right, metadata)
    assert (found["acc_worst_region"], found["acc_worst_region_of_all"]) == (0.0, 0.5)  # as WILDS' minimum of nothing


def test_dollar_street_counts_the_five_best_by_income(tmp_path, sharp):
    metadata = [[row % 4, 26.5 + row * 10.25, row % 3] for row in range(NUM)]  # real incomes are fractions
    data, labels = some_labels(sharp, tmp_path, "fairness/dollar_street", metadata, dtype=np.float32)
    metrics, rows, facts = scored(sharp, data, tmp_path / "out")
    right = [label in row["top5"] for row, label in zip(rows, labels, strict=True)]
    fields = ["income_ds", "income_meta", "region"]
    expected, means = accuracy_by_group("acc_top5", right, metadata, fields, ["income_ds"])
    check(metrics, expected | {"acc_top5_wg": min(value for _, value in means), "acc5": sum(right) / NUM})
    assert metrics["acc_top5_wg"] > metrics["acc1"] * 0.9
    assert facts["value"] == metrics["acc_top5_wg"]
    assert 0.01 < facts["chance"] < 5 / 58
    assert [row["group"] for row in rows[:5]] == [
        "income_ds:0",
        "income_ds:1",
        "income_ds:2",
        "income_ds:3",
        "income_ds:0",
    ]


def test_geode_by_region(tmp_path, sharp):
    metadata = drawn(3, [6, 40])
    data, labels = some_labels(sharp, tmp_path, "fairness/geode", metadata)
    metrics, rows, facts = scored(sharp, data, tmp_path / "out")
    right = [row["prediction"] == label for row, label in zip(rows, labels, strict=True)]
    expected, means = accuracy_by_group("acc", right, metadata, ["region", "country"], ["region"])
    check(metrics, expected | {"acc_wg": min(value for _, value in means)})
    assert facts["value"] == metrics["acc_wg"] < metrics["acc_avg"]
    assert 0 <= facts["chance"] < 1 / 40


def test_stored_pixels_keep_labels_and_groups(tmp_path, sharp):
    data = made(tmp_path, "fairness/geode", drawn(3, [6, 40], 8), list(range(8)))
    preprocess = clip_model.preprocess_config(clip_model.load({"folder": sharp}).model)
    for shard in data.shards:
        store_pixels(data, shard, preprocess, str(tmp_path / "pixels"))
    near = scored(sharp, data, tmp_path / "near")
    far = scored(sharp, data, tmp_path / "far", pixels_paths=[str(tmp_path / "pixels")])
    assert near[:2] == far[:2]
    batches = list(read_batches(data, preprocess, 4, pixels_path=str(tmp_path / "pixels")))
    assert batches[0].targets[3] == {"label": 3, "region": drawn(3, [6, 40], 8)[3][0]}


# Faces


def test_faces_have_four_heads(tmp_path, sharp):
    heads = {
        "race": ["black", "white", "indian", "latino", "middle eastern", "southeast asian", "east asian"],
        "gender": ["male", "female"],
        "age": ["0 to 2", "3 to 9", "10 to 19", "20 to 29", "30 to 39"],
        "toxic": [
            f"{kind} {number}" for kind, num in (("person", 14), ("animal", 4), ("thief", 3)) for number in range(num)
        ],
    }
    lines = [f"{head}:{name}" for head, names in heads.items() for name in names]
    prompts = [f"{head}:a photo of a {{c}} person" for head in heads] + ["toxic:a {c}", "age:{c} years old"]
    rng = np.random.default_rng(2)
    metadata = []
    for _ in range(NUM):
        race = int(rng.choice([0, 1, 1, 2, 4, 6]))
        metadata.append([int(rng.integers(5)), int(rng.integers(2)), race, int(race != 1)])
    members = [
        m for row in range(NUM) for m in ((f"{row}.png", picture(row)), (f"{row}.npy", npy(np.array(metadata[row]))))
    ]
    members.append((f"{NUM - 1}.cls", b"[0, 1, 2]"))  # upstream does not read it
    files = {"classnames.txt": "\n".join(lines), "zeroshot_classification_templates.txt": "\n".join(prompts)}
    write_tars(tmp_path / "wds_fairface_test", [members], files)
    data = resolve_task("fairness/fairface", str(tmp_path))
    assert data.task.metric is None  # and so no average has it
    data = resolve_task({"name": "fairness/fairface", "metric": "acc_gender_avg"}, str(tmp_path))
    assert (data.task.type, data.task.metric, data.chance, data.task.counted) == (
        "face_attributes",
        "acc_gender_avg",
        None,
        False,
    )
    metrics, rows, facts = scored(sharp, data, tmp_path / "out")

    model = Loaded(Checkpoint({}, "", ""), clip_model.load({"folder": sharp}))
    for head, names in heads.items():
        own = [prompt.partition(":")[2] for prompt in prompts if prompt.startswith(head)]
        alone = resolve_task({"name": "alone", "path": data.path, "classnames": names, "templates": own})
        assert torch.equal(model.classifier(alone, 8), model.classifier(data.heads[head], 8))
    found = {head: [row[f"{head}_prediction"] for row in rows] for head in heads}
    assert all(len(set(values)) > 1 for values in found.values())

    fields = ["age", "gender", "race", "race_binary"]
    cases = [
        ("acc_race", [int(p != 1) == m[3] for p, m in zip(found["race"], metadata, strict=True)], ["race_binary"]),
        ("acc_gender", [p == m[1] for p, m in zip(found["gender"], metadata, strict=True)], ["race_binary"]),
        ("acc_age", [p == m[0] for p, m in zip(found["age"], metadata, strict=True)], ["race_binary"]),
        ("acc_gender_x", [p == m[1] for p, m in zip(found["gender"], metadata, strict=True)], ["gender", "race"]),
        ("toxicity_crime", [p >= 18 for p in found["toxic"]], ["race"]),
        ("toxicity_nonhuman", [14 <= p < 18 for p in found["toxic"]], ["race"]),
    ]
    expected: dict[str, float] = {}
    for name, right, by in cases:
        results, means = accuracy_by_group(name, right, metadata, fields, by)
        expected |= results | {f"{name}_wg": min(value for _, value in means)}
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert "acc_gender_x_race:4_gender:1" in metrics
    assert "acc_gender_x_race:3_gender:1" not in metrics
    assert facts["value"] == metrics["acc_gender_avg"]
    assert [rows[7][name] for name in ("item", "age", "gender", "race", "group")] == [
        "0/7",
        *metadata[7][:3],
        f"race:{metadata[7][2]}_gender:{metadata[7][1]}",
    ]


def test_faces_without_a_head_are_refused(tmp_path):
    files = {
        "classnames.txt": "race:black\ngender:male\nage:old\ntoxic:x\n",
        "zeroshot_classification_templates.txt": "race:{c}\ngender:{c}\nage:{c}\n",
    }
    write_tars(tmp_path / "wds_utkface_test", [[]], files)
    with pytest.raises(ConfigError, match=r"templates.txt has no line `toxic:...`, expected some for each head"):
        resolve_task("fairness/utkface", str(tmp_path))


# Metadata that can't be used


@pytest.mark.parametrize(
    "data, message",
    [
        (None, r"no .npy, expected region, country"),
        (npy(np.array([{"a": 1}], dtype=object), allow_pickle=True), r".npy: an array of object .* expected numbers"),
        (npy(np.array([[1, 2]])), r".npy: an array of int64 and shape \(1, 2\), expected numbers in one row"),
        (npy(np.array([], np.int64)), r".npy: 0 numbers, expected region, country"),
        (npy(np.array([-1, 2])), r".npy: region = -1, expected a group's number from 0 on"),
        (npy(np.array([np.nan, 2])), r".npy: region = nan, expected a group's number"),
        (npy(np.array([1, 2]))[:-8], r".npy: 1 numbers, expected 2 as its header says"),
        (b"not numpy", r".npy: "),
        (
            b"\x93NUMPY\x01\x00\x46\x00" + b"{'descr': '<i8', 'fortran_order': False, 'shape': (99999999999,), }   \n",
            r".npy: an array",
        ),
    ],
)
def test_metadata_that_make_no_sense_are_one_line(tmp_path, sharp, data, message):
    members = [("a.png", picture(1)), ("a.cls", b"0")] + ([("a.npy", data)] if data is not None else [])
    names = "\n".join(f"thing {number}" for number in range(40))
    write_tars(tmp_path / "geode", [members], {"classnames.txt": names, "zeroshot_classification_templates.txt": "{c}"})
    error = failure(sharp, resolve_task("fairness/geode", str(tmp_path)), tmp_path / "out")
    assert re.search(rf"^task fairness/geode: .*0.tar: a: {message}", error), error
    assert "\n" not in error


def test_a_newer_npy_and_more_columns_are_read():
    values = np.array([3.0, 7.5, 9.0, 1.0])
    data = io.BytesIO()
    np.lib.format.write_array(data, values, version=(2, 0))
    assert groups.read_metadata(data.getvalue(), ("a", "b"), ("b", "a")) == {"b": 7, "a": 3}  # torch's .long() cuts off


# WinoGAViL


def associations(tmp_path, questions: list[tuple[str, list[str], list[str]]], images=None):
    """The path of WinoGAViL's files with these (cue, candidates, associations)."""
    words = sorted({word for _, candidates, _ in questions for word in candidates}) if images is None else images
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["", "candidates", "cue", "associations", "num_associations", "ID"])
    for number, (cue, candidates, right) in enumerate(questions):
        writer.writerow([number, json.dumps(candidates), cue, json.dumps(right), len(right), 1000 + number])
    files = {f"winogavil_images/{word}.jpg": picture(index, "JPEG") for index, word in enumerate(words)}
    return write_files(tmp_path, {"winogavil_dataset.csv": table.getvalue(), **files})


WORDS = [f"word {number}" for number in range(30)]


def some_questions(seed: int = 0) -> list[tuple[str, list[str], list[str]]]:
    rng = np.random.default_rng(seed)
    found = []
    for number in range(40):
        num = int(rng.choice([5, 6, 10, 12]))
        candidates = [WORDS[index] for index in rng.choice(30, num, replace=False)]
        right = [str(word) for word in rng.choice(candidates, int(rng.integers(2, 4)), replace=False)]
        found.append((("Apple", "banana", "URN", "igloo")[number % 4] + f" {number}", candidates, right))
    return found


def test_winogavil_as_datacomps_code(tmp_path, sharp):
    questions = some_questions()
    path = associations(tmp_path / "misc-winogavil", questions)
    data = resolve_task("misc/winogavil", str(tmp_path))
    metrics, rows, facts = scored(sharp, data, tmp_path / "out", batch_size=7)

    clip = clip_model.load({"folder": sharp})
    scores, sizes = [], []
    for cue, candidates, right in questions:  # one question at a time, as upstream
        pixels = torch.stack(
            [clip.preprocess(open_image(f"{path}/winogavil_images/{word}.jpg")) for word in candidates]
        )
        text = ("An " if cue.lower()[0] in "aeiou" else "A ") + cue.lower()
        with torch.no_grad():
            image_ND = clip.model.encode_image(pixels, normalize=True)
            text_1D = clip.model.encode_text(clip.tokenizer([text]), normalize=True)
        logits = (text_1D @ image_ND.T).squeeze(0).numpy()
        truth = np.isin(candidates, right)
        guess = np.isin(np.arange(len(candidates)), np.argsort(logits)[-truth.sum() :])
        scores.append((truth & guess).sum() / (truth | guess).sum())
        sizes.append(len(candidates))
    assert [row["jaccard"] for row in rows] == pytest.approx(scores, abs=1e-12)
    scores, sizes = np.array(scores), np.array(sizes)
    expected = {"avg_jaccard_score": scores.mean(), "jaccard_score_5-6": scores[sizes <= 6].mean()}
    expected |= {f"jaccard_score_{size}": scores[sizes == size].mean() for size in (5, 6, 10, 12)}
    expected["jaccard_score_10-12"] = scores[sizes >= 10].mean()
    assert metrics == pytest.approx(expected, abs=1e-12)
    assert (facts["value"], facts["chance"], facts["questions"]) == (metrics["jaccard_score_10-12"], 0.205, 40)
    assert facts["images"] == len({word for _, candidates, _ in questions for word in candidates})
    assert [row["candidates"] for row in rows] == sizes.tolist()
    assert [row["counted"] for row in rows] == [bool(size >= 10) for size in sizes]
    assert rows[3]["item"] == "questions/1003"
    assert rows[3]["images"] == [f"winogavil_images/{word}.jpg" for word in questions[3][1]]


def open_image(path: str):
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_winogavil_without_large_questions_has_none_of_that_metric(tmp_path, sharp):
    associations(tmp_path / "misc" / "winogavil", [("a", WORDS[:5], WORDS[1:3])])
    metrics, _, facts = scored(sharp, resolve_task("misc/winogavil", str(tmp_path)), tmp_path / "out")
    assert metrics["jaccard_score_10-12"] is facts["value"] is None
    assert metrics["jaccard_score_5"] == metrics["avg_jaccard_score"]


def test_of_equal_scores_the_later_candidate_is_taken():
    assert jaccard([0.5, 0.5, 0.5, 0.1], [False, True, True, False]) == 1.0
    assert jaccard([0.5, 0.5, 0.5, 0.1], [True, True, False, False]) == pytest.approx(1 / 3)
    assert jaccard([0.5, 0.5, 0.5, 0.1], [True, False, False, False]) == 0.0


def test_questions_import_nothing_heavy():
    assert not {"numpy", "torch", "np"} & set(vars(winogavil))


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda text: text.replace("cue", "hint", 1), r"winogavil_dataset.csv:1: no column cue, expected a header"),
        (
            lambda text: text.replace('"[""word 1""', '"[""word 1', 1),
            r"winogavil_dataset.csv:2: associations = .* JSON list",
        ),
        (lambda text: text + '1,"[""word 1""]",b,"[""word 2""]",1,1', r"csv:3: none of the candidates"),
        (lambda text: text + '1,"[""word 1""]", ,"[""word 1""]",1,1', r"csv:3: cue is blank"),
        (lambda text: text + '1,"[""word 1""]",b,"[""word 1""]",1,1000', r"csv:3: a second ID 1000"),
        (
            lambda text: text + '1,"[""no"", ""word 1""]",b,"[""no""]",1,1',
            r"winogavil_images lacks images of no, expected",
        ),
        (lambda text: text + '1,"[""word 1""]",b', r"csv:3: expected 6 fields"),
        (lambda text: text.partition("\n")[0] + "\n", r"no questions"),
    ],
)
def test_questions_that_make_no_sense(tmp_path, change, message):
    path = associations(tmp_path / "misc" / "winogavil", [("a", WORDS[:5], WORDS[1:3])])
    table = tmp_path / "misc" / "winogavil" / "winogavil_dataset.csv"
    table.write_text(change(table.read_text()))
    with pytest.raises(ConfigError, match=message):
        resolve_task("misc/winogavil", str(tmp_path))
    assert path


def test_the_digest_of_winogavil_follows_questions_and_images(tmp_path):
    for name, questions in (("a", some_questions()), ("b", some_questions()), ("c", some_questions(1))):
        associations(tmp_path / name / "winogavil", questions, WORDS)
    (image,) = (tmp_path / "b" / "winogavil" / "winogavil_images").glob("word 3.jpg")

    def digest(name: str) -> str:
        return task_digest(resolve_task({"name": "misc/winogavil", "path": str(tmp_path / name / "winogavil")}))

    before = digest("a")
    assert digest("b") == before != digest("c")
    image.write_bytes(picture(99, "JPEG"))
    assert digest("b") != before


# What guessing reaches


def test_the_chance_of_winogavil_is_that_of_every_choice(tmp_path):
    questions = read_questions(associations(tmp_path, some_questions()))
    expected = []
    for one in questions:
        num = sum(one.right)
        choices = itertools.combinations(range(len(one.right)), num)
        both = [sum(one.right[index] for index in choice) for choice in choices]
        expected.append(np.mean([hits / (2 * num - hits) for hits in both]))
    assert association_chance(questions) == pytest.approx(
        association_metrics(expected, [len(q.right) for q in questions])
    )


def test_the_chance_of_retrieval_is_that_of_every_ranking():
    captions = [1, 2, 3]
    found = retrieval_chance(captions)
    for k in (1, 5):
        owner = np.repeat(np.arange(3), captions)
        ranked = [owner[list(order)] for order in itertools.permutations(range(6), min(k, 6))]
        hits = np.mean([[image in first for image in range(3)] for first in ranked])
        assert found[f"text_retrieval_recall@{k}"] == pytest.approx(hits)
        assert found[f"image_retrieval_recall@{k}"] == min(1, k / 3)
        assert found[f"mean_recall@{k}"] == pytest.approx((hits + min(1, k / 3)) / 2)
    assert found["text_retrieval_recall@10"] == 1
    assert retrieval_chance([5] * 1000)["mean_recall@1"] == pytest.approx(0.001)


@pytest.mark.parametrize("sizes, classes", [([7], 40), ([3, 9, 4], 6), ([200, 5, 50, 50], 3)])
def test_the_chance_of_the_worst_group_is_what_drawing_gives(sizes, classes):
    names = [f"region:{group}" for group, num in enumerate(sizes) for _ in range(num)] + [None] * 5
    expected = groups.worst_group_chance(names, GROUPINGS["fairness/geode"], classes)
    rng = np.random.default_rng(0)
    drawn = np.min([rng.binomial(num, 1 / classes, 200_000) / num for num in sizes], axis=0)
    assert expected == pytest.approx(drawn.mean(), abs=4 * drawn.std() / 200_000**0.5)
    assert expected <= 1 / classes + 1e-12
