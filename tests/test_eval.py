"""Zero-shot evaluation against planted answers and against the plainest implementation of each definition."""

from __future__ import annotations

import io
import json
import pathlib
import re
import shutil
from dataclasses import replace

import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from eval.evaluate import Checkpoint, Loaded, evaluate
from eval.metrics import classification_metrics, mean_per_class_recall, retrieval_metrics
from eval.retrieval import best_rank, retrieval_ranks
from eval.samples import model_input, read_batches, store_pixels
from eval.tasks import TaskData, resolve_task, task_digest
from eval.texts import tokenisers
from eval.zero_shot import top_classes
from pipeline.core import clip_model
from pipeline.core.captions import CaptionTokenizer
from tests.task_fixture import write_tars

ARCHITECTURE = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "width": 32, "heads": 2, "layers": 1},
}
CLASSES = ("red square", "green circle", "blue star", "old photo", "map", "small boat", "tree")
TEMPLATES = ("a photo of a {c}.", "{c}", "a drawing of one {c} on a wall")
NAMES = {"model": "tiny", "pretrained": "checkpoint-0"}
FILES = ("result.json", "predictions.parquet")


def write_model(folder: pathlib.Path, seed: int = 0, image_size_px: int = 16, **changes) -> str:
    """A model folder with random weights, large enough that features of different images differ."""
    torch.manual_seed(seed)
    vision = {**ARCHITECTURE["vision_cfg"], "image_size": image_size_px}
    architecture = {**ARCHITECTURE, "vision_cfg": vision}
    model = clip_model.build(architecture).model
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(4)
    for name, value in changes.items():
        model.visual.preprocess_cfg[name] = value
    clip_model.save(model, architecture, str(folder))
    return str(folder)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def clip(model_folder):
    return clip_model.load({"folder": model_folder})


@pytest.fixture(scope="module")
def checkpoint(model_folder) -> Checkpoint:
    return Checkpoint({"folder": model_folder}, **NAMES)


def run(checkpoint: Checkpoint, data: TaskData, out, **options) -> dict:
    """The facts of one checkpoint on one task."""
    (found,) = evaluate([checkpoint], [data], [[str(out)]], **options)
    assert found.error is None, found.error
    return found.facts


def failure(checkpoint: Checkpoint, data: TaskData, out, **options) -> str:
    """Why one checkpoint fails on one task; nothing is written."""
    (found,) = evaluate([checkpoint], [data], [[str(out)]], **options)
    assert found.facts is None
    assert not pathlib.Path(out).exists()
    return found.error


def written(out) -> list[bytes]:
    return [(pathlib.Path(out) / name).read_bytes() for name in FILES]


def encoded(seed: int, mode: str = "RGB", kind: str = "PNG", **options) -> bytes:
    """An image of random blocks, its size not square."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((20 + seed % 5, 24), 0)
    data = io.BytesIO()
    blocks.convert(mode).save(data, kind, **options)
    return data.getvalue()


def classification_files(classes=CLASSES) -> dict[str, str]:
    return {
        "classnames.txt": "\n".join(classes) + "\n",
        "zeroshot_classification_templates.txt": "\n".join(TEMPLATES) + "\n",
    }


def labelled(rows, classes=7) -> list[tuple[str, bytes]]:
    return [
        member
        for row in rows
        for member in ((f"s{row:07d}.png", encoded(row)), (f"s{row:07d}.cls", str(row * row % classes).encode()))
    ]


@pytest.fixture
def shapes(tmp_path) -> TaskData:
    """23 images in two shards, 7 classes, of which some have no image."""
    path = write_tars(tmp_path / "shapes", [labelled(range(15)), labelled(range(15, 23))], classification_files())
    return resolve_task({"name": "shapes", "path": path, "metric": "mean_per_class_recall"})


CAPTIONS = [  # to the random model, those of small numbers are alike but for a rounding error
    [f"photo {37 * row} of a thing", "a thing", *(["seen from above", ""] if row % 3 == 0 else [])] for row in range(12)
]


@pytest.fixture
def photos(tmp_path) -> TaskData:
    """12 images with two or four captions each, some shared by all, some empty."""
    members = [
        member
        for row, captions in enumerate(CAPTIONS)
        for member in ((f"{row}.jpg", encoded(row, kind="JPEG")), (f"{row}.txt", ("\n".join(captions) + "\n").encode()))
    ]
    path = write_tars(tmp_path / "photos", [members], {"dataset_type.txt": "retrieval\n"})
    return resolve_task({"name": "photos", "path": path})


# Metrics


def test_classification_metrics_by_hand():
    label_N = np.array([0, 0, 0, 0, 3, 3])
    top_NK = np.array(
        [[0, 1, 2, 3, 4], [1, 0, 2, 3, 4], [0, 4, 1, 2, 3], [5, 1, 2, 3, 4], [1, 2, 3, 4, 5], [3, 0, 1, 2, 4]]
    )
    metrics = classification_metrics(label_N, top_NK)
    assert metrics["acc1"] == 3 / 6
    assert metrics["acc5"] == 5 / 6
    assert metrics["mean_per_class_recall"] == (2 / 4 + 1 / 2) / 2  # the classes without an image do not count
    assert classification_metrics(label_N, top_NK[:, :4])["acc5"] is None


def test_mean_per_class_recall_weighs_classes_equally():
    assert mean_per_class_recall(np.array([0] * 98 + [1, 2]), np.array([True] * 98 + [False, False])) == 1 / 3


def test_retrieval_metrics_by_hand():
    metrics = retrieval_metrics(np.array([0, 1, 4, 5, 9, 10]), np.array([0, 0, 7]))
    assert metrics["image_retrieval_recall@1"] == 1 / 6
    assert metrics["image_retrieval_recall@5"] == 3 / 6
    assert metrics["image_retrieval_recall@10"] == 5 / 6
    assert metrics["text_retrieval_recall@1"] == 2 / 3
    assert metrics["text_retrieval_recall@10"] == 1.0
    assert metrics["mean_recall@1"] == (1 / 6 + 2 / 3) / 2


def test_equal_logits_go_to_the_lower_class():
    logits_BC = torch.zeros(2, 300)
    logits_BC[1, 200] = 1.0
    assert top_classes(logits_BC).tolist() == [[0, 1, 2, 3, 4], [200, 0, 1, 2, 3]]
    assert top_classes(torch.tensor([[0.1, 0.3, 0.2]])).tolist() == [[1, 2, 0]]


# Retrieval


def plain_ranks(score: np.ndarray, positive: np.ndarray) -> np.ndarray:
    """Rank of the first positive in a stable sort of each row of a dense score matrix."""
    order = np.argsort(-score, axis=1, kind="stable")
    return np.take_along_axis(positive, order, axis=1).argmax(axis=1)


@pytest.mark.parametrize("chunk_scores", [1, 50, 1 << 22])
def test_ranks_equal_a_dense_sort_with_ties_and_uneven_numbers_of_captions(chunk_scores):
    rng = np.random.default_rng(1)
    owner_T = np.repeat(np.arange(40), rng.integers(1, 7, 40))
    # few distinct values in few dimensions: many exact ties, exact sums
    image_ID = torch.from_numpy(rng.integers(-2, 3, (40, 3)).astype(np.float32))
    text_UD = torch.from_numpy(rng.integers(-2, 3, (30, 3)).astype(np.float32))
    distinct_T = rng.integers(0, 30, len(owner_T))
    image_rank, text_rank = retrieval_ranks(
        image_ID, text_UD, torch.from_numpy(distinct_T), torch.from_numpy(owner_T), chunk_scores=chunk_scores
    )
    score_TI = (text_UD[distinct_T] @ image_ID.T).numpy()
    positive_TI = owner_T[:, None] == np.arange(40)
    np.testing.assert_array_equal(image_rank.numpy(), plain_ranks(score_TI, positive_TI))
    np.testing.assert_array_equal(text_rank.numpy(), plain_ranks(score_TI.T, positive_TI.T))


def test_a_model_that_says_nothing_is_at_chance():
    same = torch.ones(50, 4)
    image_rank, text_rank = retrieval_ranks(same, same, torch.arange(50), torch.arange(50))
    metrics = retrieval_metrics(image_rank.numpy(), text_rank.numpy())
    assert metrics["mean_recall@1"] == pytest.approx(1 / 50)
    assert metrics["mean_recall@10"] == pytest.approx(10 / 50)


def test_any_positive_counts_and_the_best_one_decides():
    score = torch.tensor([[0.9, 0.8, 0.7, 0.1], [0.5, 0.5, 0.5, 0.9]])
    assert best_rank(score, torch.tensor([[3, 1], [2, 2]])).tolist() == [1, 3]


def test_equal_captions_share_one_feature(clip):
    texts = ["a long caption of many words here", "dog", "cat", "dog", ""]
    text_UD, distinct_T = Loaded(Checkpoint({}, "tiny", "tiny"), clip).encode_texts(texts, batch_size=2)
    assert len(text_UD) == 4
    plain = clip.model.encode_text(clip.tokenizer(texts), normalize=True)
    torch.testing.assert_close(text_UD[distinct_T], plain, atol=1e-5, rtol=0)


# Classification


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
def test_the_classifier_equals_open_clips(clip, shapes, batch_size):
    assert (shapes.classnames, shapes.templates) == (CLASSES, TEMPLATES)
    ours = Loaded(Checkpoint({}, "tiny", "tiny"), clip).classifier(shapes, batch_size)
    templates = [lambda c, template=template: template.format(c=c) for template in TEMPLATES]
    theirs = open_clip.build_zero_shot_classifier(clip.model, clip.tokenizer, CLASSES, templates)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_pixels_equal_the_models_own_preprocessing(tmp_path, clip):
    orientation = Image.Exif()
    orientation[0x0112] = 6
    images = [
        encoded(1), encoded(2, "RGBA"), encoded(3, "L"), encoded(4, "P"), encoded(5, "1"), encoded(6, "CMYK", "JPEG"),
        encoded(7, kind="JPEG", exif=orientation), encoded(8, kind="WEBP", lossless=True),
    ]  # fmt: skip
    members = [m for n, data in enumerate(images) for m in ((f"{n}.jpg", data), (f"{n}.cls", b"0"))]
    data = resolve_task({"name": "t", "path": write_tars(tmp_path / "t", [members], classification_files())})
    (batch,) = read_batches(data, clip_model.preprocess_config(clip.model), 100)
    plain = torch.stack([clip.preprocess(Image.open(io.BytesIO(image)).convert("RGB")) for image in images])
    assert torch.equal(model_input(clip, batch.pixels), plain)


@torch.no_grad()
def plain_predictions(clip, rows: int) -> list[list[int]]:
    """One image and one prompt at a time, with open_clip alone."""
    columns = []
    for name in CLASSES:
        features = [clip.model.encode_text(clip.tokenizer([t.format(c=name)]), normalize=True)[0] for t in TEMPLATES]
        column = torch.stack(features).mean(0)
        columns.append(column / column.norm())
    ranked = []
    for row in range(rows):
        image = clip.preprocess(Image.open(io.BytesIO(encoded(row))).convert("RGB"))[None]
        feature = clip.model.encode_image(image, normalize=True)[0]
        logits = [float(100 * feature @ column) for column in columns]
        ranked.append(sorted(range(len(CLASSES)), key=lambda c: -logits[c])[:5])
    return ranked


def test_classification_equals_one_image_at_a_time(tmp_path, clip, checkpoint, shapes):
    facts = run(checkpoint, shapes, tmp_path / "out", batch_size=4)
    table = pq.read_table(tmp_path / "out" / "predictions.parquet").to_pydict()
    ranked = plain_predictions(clip, 23)
    labels = [row * row % len(CLASSES) for row in range(23)]
    assert table["item"][:1] + table["item"][15:16] == ["0/s0000000", "1/s0000015"]
    assert table["label"] == labels
    assert table["top5"] == ranked
    assert table["prediction"] == [row[0] for row in ranked]
    assert table["correct"] == [row[0] == label for row, label in zip(ranked, labels, strict=True)]
    assert len(set(table["prediction"])) > 1

    result = json.loads((tmp_path / "out" / "result.json").read_text())
    metrics = result.pop("metrics")
    assert result == {"dataset": "shapes", "task": "zeroshot_classification", "language": "en", **NAMES}
    assert metrics["acc1"] == pytest.approx(np.mean(table["correct"]))
    assert metrics["acc5"] == pytest.approx(np.mean([label in row for row, label in zip(ranked, labels, strict=True)]))
    recalls = [
        np.mean([c for c, label in zip(table["correct"], labels, strict=True) if label == one]) for one in set(labels)
    ]
    assert metrics["mean_per_class_recall"] == pytest.approx(np.mean(recalls))
    assert (facts["value"], facts["images"], facts["classes"]) == (metrics["mean_per_class_recall"], 23, 7)
    assert facts["chance"] == pytest.approx(1 / 7)


def test_acc5_is_null_with_fewer_than_five_classes(tmp_path, checkpoint):
    path = write_tars(tmp_path / "few", [labelled(range(6), 3)], classification_files(CLASSES[:3]))
    run(checkpoint, resolve_task({"name": "few", "path": path}), tmp_path / "out")
    assert json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]["acc5"] is None


def test_retrieval_equals_a_dense_matrix(tmp_path, clip, checkpoint, photos):
    facts = run(checkpoint, photos, tmp_path / "out", batch_size=5)
    texts = [caption for captions in CAPTIONS for caption in captions]
    owner_T = np.repeat(np.arange(12), [len(captions) for captions in CAPTIONS])
    with torch.no_grad():
        images = [clip.preprocess(Image.open(io.BytesIO(encoded(n, kind="JPEG"))).convert("RGB")) for n in range(12)]
        image_ID = clip.model.encode_image(torch.stack(images), normalize=True)
        feature = {text: clip.model.encode_text(clip.tokenizer([text]), normalize=True)[0] for text in texts}
    text_TD = torch.stack([feature[text] for text in texts]).double()
    score_TI = (text_TD[:, None] * image_ID.double()[None]).sum(-1).numpy()  # equal captions tie exactly
    positive_TI = owner_T[:, None] == np.arange(12)
    table = pq.read_table(tmp_path / "out" / "predictions.parquet")
    assert table.num_rows == facts["images"] + facts["captions"] == 12 + len(texts)
    metrics = json.loads((tmp_path / "out" / "result.json").read_text())["metrics"]
    for k in (1, 5, 10):
        for direction, prefix, score, positive in (
            ("image_to_text", "text", score_TI.T, positive_TI.T),
            ("text_to_image", "image", score_TI, positive_TI),
        ):
            mask = [said == direction for said in table["direction"].to_pylist()]
            hits = np.array(table[f"hit@{k}"].to_pylist())[mask]
            np.testing.assert_array_equal(hits, plain_ranks(score, positive) < k)
            assert metrics[f"{prefix}_retrieval_recall@{k}"] == pytest.approx(hits.mean())
    rows = table.to_pylist()
    assert (rows[3]["item"], rows[3]["group"]) == ("0/3", "0/3")
    assert (rows[12 + 5]["item"], rows[12 + 5]["group"]) == ("0/1#1", "0/1")
    assert facts["value"] == metrics["mean_recall@1"]
    assert facts["chance"] == pytest.approx(1 / 12)  # a text: one image of 12; an image: on average a 12th of all texts


# Files, and what several checkpoints share


def test_reruns_threads_and_batch_sizes_give_the_same_bytes(tmp_path, checkpoint, shapes, photos):
    seen = []
    for number, options in enumerate(({}, {}, {"threads": 3}, {"batch_size": 5}, {"batch_size": 5, "threads": 2})):
        outs = [tmp_path / f"{number}-{data.name}" for data in (shapes, photos)]
        outcomes = list(evaluate([checkpoint], [shapes, photos], [[str(out) for out in outs]], **options))
        assert [outcome.error for outcome in outcomes] == [None, None]
        seen.append([written(out) for out in outs])
    assert all(files == seen[0] for files in seen[1:])


@pytest.fixture(scope="module")
def unlike(tmp_path_factory) -> list[Checkpoint]:
    """Models that see other pixels: of another size, squashed, normalised in another way; and two that see the same."""
    folder = tmp_path_factory.mktemp("unlike")
    models = {
        "first": write_model(folder / "first"),
        "second": write_model(folder / "second", seed=1),
        "large": write_model(folder / "large", seed=2, image_size_px=24),
        "squashed": write_model(folder / "squashed", resize_mode="squash"),
        "dark": write_model(folder / "dark", mean=(0.1, 0.2, 0.3)),
    }
    return [Checkpoint({"folder": path}, "tiny", name) for name, path in models.items()]


@pytest.mark.parametrize("threads", [1, 2])
def test_several_checkpoints_at_once_give_the_bytes_of_one_at_a_time(tmp_path, unlike, shapes, photos, threads):
    tasks = (shapes, photos)
    together = [[tmp_path / "together" / one.pretrained / data.name for data in tasks] for one in unlike]
    paths = [[str(out) for out in row] for row in together]
    outcomes = list(evaluate(unlike, tasks, paths, threads=threads, batch_size=4))
    assert [(outcome.data.name, outcome.checkpoint) for outcome in outcomes] == [
        (data.name, one) for data in tasks for one in unlike
    ]
    for place, one in enumerate(unlike):
        for number, data in enumerate(tasks):
            out = tmp_path / "alone" / one.pretrained / data.name
            facts = run(one, data, out, batch_size=4)
            assert written(out) == written(together[place][number])
            of_pair = outcomes[number * len(unlike) + place]
            assert {k: v for k, v in facts.items() if not k.endswith("seconds") and k != "forward_s"} == {
                k: v for k, v in of_pair.facts.items() if not k.endswith("seconds") and k != "forward_s"
            }
            assert 0 < of_pair.facts["forward_s"] < of_pair.facts["seconds"]
    predictions = {written(row[0])[1] for row in together}
    assert len(predictions) == len(unlike)  # the preprocessings differ in what is predicted


def test_a_pair_without_a_folder_is_left_out(tmp_path, unlike, shapes, photos):
    paths = [[None, str(tmp_path / "0")], [str(tmp_path / "1"), None]]
    outcomes = list(evaluate(unlike[:2], [shapes, photos], paths))
    assert [(outcome.data.name, outcome.out_path) for outcome in outcomes] == [
        ("shapes", paths[1][0]),
        ("photos", paths[0][1]),
    ]


def store(checkpoint: Checkpoint, data: TaskData, path) -> str:
    preprocess = clip_model.preprocess_config(clip_model.load(checkpoint.source).model)
    for shard in data.shards:
        store_pixels(data, shard, preprocess, str(path))
    return str(path)


def test_stored_pixels_give_the_same_bytes_as_decoding(tmp_path, unlike, shapes, photos):
    tasks = (shapes, photos)
    stored = [store(unlike[0], data, tmp_path / "pixels" / data.name) for data in tasks]
    near = [[tmp_path / "near" / one.pretrained / data.name for data in tasks] for one in unlike]
    far = [[tmp_path / "far" / one.pretrained / data.name for data in tasks] for one in unlike]
    for outs, pixels in ((near, None), (far, stored)):
        found = evaluate(unlike, tasks, [[str(out) for out in row] for row in outs], pixels_paths=pixels, batch_size=4)
        assert [outcome.error for outcome in found] == [None] * 10
    assert [written(out) for row in near for out in row] == [written(out) for row in far for out in row]


def test_stored_pixels_are_read_in_place_of_the_tars_where_they_fit(tmp_path, unlike, shapes):
    stored = store(unlike[0], shapes, tmp_path / "pixels")
    for shard in shapes.shards:
        (pathlib.Path(shapes.path) / shard).unlink()
    outs = [[str(tmp_path / one.pretrained)] for one in unlike]
    found = list(evaluate(unlike, [shapes], outs, pixels_paths=[stored]))
    assert all("0.tar" in outcome.error for outcome in found)  # some models need the tars
    same = [unlike[0], unlike[1], unlike[4]]
    found = list(evaluate(same, [shapes], outs[:3], pixels_paths=[stored]))
    assert [outcome.facts["images"] for outcome in found] == [23] * 3


def test_stored_pixels_that_are_cut_off_are_an_error(tmp_path, checkpoint, shapes):
    stored = store(checkpoint, shapes, tmp_path / "pixels")
    path = tmp_path / "pixels" / "test" / "1.npy"
    path.write_bytes(path.read_bytes()[:-1])
    assert "1.npy is cut off, expected 8 images" in failure(checkpoint, shapes, tmp_path / "out", pixels_paths=[stored])


def test_an_empty_tar_among_others_changes_nothing(tmp_path, checkpoint):
    parts = [labelled(range(15)), [], labelled(range(15, 23))]
    tasks = [
        resolve_task({"name": "t", "path": write_tars(tmp_path / name, shards, classification_files())})
        for name, shards in (("with", parts), ("without", [parts[0], parts[2]]))
    ]
    stored = store(checkpoint, tasks[0], tmp_path / "pixels")
    for number, (data, pixels) in enumerate(((tasks[1], None), (tasks[0], None), (tasks[0], stored))):
        assert run(checkpoint, data, tmp_path / str(number), pixels_paths=[pixels])["images"] == 23
    assert written(tmp_path / "1") == written(tmp_path / "2")
    tables = [pq.read_table(tmp_path / str(number) / FILES[1]).drop(["item"]) for number in range(2)]
    assert tables[0] == tables[1]


@pytest.fixture
def counted_texts(monkeypatch):
    """Every list of texts that is tokenised from now on."""
    lists = []
    tokenise = CaptionTokenizer.__call__

    def counted(self, texts):
        lists.append(list(texts))
        return tokenise(self, texts)

    monkeypatch.setattr(CaptionTokenizer, "__call__", counted)
    return lists


def test_equal_prompts_are_encoded_once_a_model_and_tokenised_once_for_all(
    tmp_path, unlike, shapes, photos, counted_texts, monkeypatch
):
    encoded = []
    encode = clip_model.encode_text
    monkeypatch.setattr(clip_model, "encode_text", lambda *given: encoded.append(len(given[1])) or encode(*given))
    again = replace(shapes, task=replace(shapes.task, name="again"))
    tasks = [shapes, again, photos]
    paths = [[str(tmp_path / one.pretrained / data.name) for data in tasks] for one in unlike]
    assert all(outcome.error is None for outcome in evaluate(unlike, tasks, paths, threads=2))
    texts = {text for captions in CAPTIONS for text in captions}
    assert [len(one) for one in counted_texts] == [len(CLASSES) * len(TEMPLATES), len(texts)]
    assert sum(encoded) == len(unlike) * (len(CLASSES) * len(TEMPLATES) + len(texts))


def test_tokenizers_share_only_what_they_do_alike():
    kinds = [
        open_clip.SimpleTokenizer(),
        open_clip.SimpleTokenizer(context_length=16),
        open_clip.SimpleTokenizer(),
        open_clip.SimpleTokenizer(clean="whitespace"),
        open_clip.SimpleTokenizer(reduction_mask="syntax"),
    ]
    kinds[0](["a word"])  # fills its cache
    found = tokenisers(kinds)
    assert found[0] is found[2]
    assert len(set(map(id, found))) == 4
    assert found[1](("A dog",)).shape == (1, 16)


# Failures


@pytest.mark.parametrize(
    "members, message",
    [
        ([("a.png", encoded(1))], r"task t: .*/test/0.tar: a: no .cls, expected a label"),
        ([("a.cls", b"0")], r"0.tar: a: no image, expected one of .webp, .png, .jpg, .jpeg"),
        ([("a.png", encoded(1)), ("a.cls", b"7")], r"a: .cls = '7', expected a label from 0 to 6"),
        ([("a.png", encoded(1)), ("a.cls", b"-1")], r"a: .cls = '-1', expected a label"),
        ([("a.png", encoded(1)[:80]), ("a.cls", b"0")], r"0.tar: a: undecodable: .* expected every image to decode"),
        ([("a.png", b"<html>"), ("a.cls", b"0")], r"a: unsupported_format"),
        ([*labelled([1]), *labelled([2]), *labelled([1])], r"s0000001: a second sample of this key"),
        ([*labelled([1]), ("s0000001.cls", b"1")], r"s0000001: a second s0000001.cls"),
        ([], r"has no samples"),
    ],
)
@pytest.mark.parametrize("threads", [1, 2])
def test_a_set_with_holes_is_an_error(tmp_path, checkpoint, members, message, threads):
    data = resolve_task({"name": "t", "path": write_tars(tmp_path / "t", [members], classification_files())})
    assert re.search(message, failure(checkpoint, data, tmp_path / "out", threads=threads))


@pytest.mark.parametrize("at", [-700, -2048, 1024])
def test_a_tar_that_ends_too_early_is_an_error(tmp_path, checkpoint, at):
    path = write_tars(tmp_path / "t", [labelled(range(40))], classification_files())
    tar = tmp_path / "t" / "test" / "0.tar"
    whole = tar.read_bytes().rstrip(b"\0")
    tar.write_bytes(whole[: at - at % 512] if at < 0 else whole[:at])
    data = resolve_task({"name": "t", "path": path})
    assert re.search(r"task t: .*0.tar", failure(checkpoint, data, tmp_path / "out", batch_size=4))


def test_images_without_captions_and_bad_text_are_errors(tmp_path, checkpoint):
    for name, text, message in (("a", b"", "a: .txt is empty"), ("b", b"\xff\xfe", "b: .txt = .* expected UTF-8")):
        members = [(f"{name}.png", encoded(1)), (f"{name}.txt", text)]
        path = write_tars(tmp_path / name, [members], {"dataset_type.txt": "retrieval"})
        assert re.search(message, failure(checkpoint, resolve_task({"name": "t", "path": path}), tmp_path / "out"))


def test_a_diverged_model_fails_alone_beside_a_good_one(tmp_path, unlike, photos, shapes):
    clip = clip_model.load(unlike[1].source)
    clip.model.visual.proj.fill_(float("nan"))
    clip_model.save(clip.model, ARCHITECTURE, str(tmp_path / "diverged"))
    models = [Checkpoint({"folder": str(tmp_path / "diverged")}, "tiny", "diverged"), unlike[0]]
    tasks = [photos, shapes]
    paths = [[str(tmp_path / "out" / one.pretrained / data.name) for data in tasks] for one in models]
    outcomes = list(evaluate(models, tasks, paths))
    for data, failed, good in zip(tasks, outcomes[::2], outcomes[1::2], strict=True):
        assert failed.error.startswith(f"task {data.name}: features of images are not finite")
        assert not pathlib.Path(failed.out_path).exists()
        run(unlike[0], data, tmp_path / "alone" / data.name)
        assert written(good.out_path) == written(tmp_path / "alone" / data.name)


def test_a_checkpoint_that_can_not_be_loaded_fails_alone(tmp_path, unlike, shapes):
    shutil.copytree(unlike[0].source["folder"], tmp_path / "broken")
    weights = tmp_path / "broken" / clip_model.WEIGHTS_FILE
    weights.write_bytes(weights.read_bytes()[:-100])
    broken = [Checkpoint({"folder": str(tmp_path / name)}, "tiny", name) for name in ("broken", "missing")]
    paths = [[str(tmp_path / "out" / str(number))] for number in range(3)]
    found = list(evaluate([*broken, unlike[0]], [shapes], paths))
    assert [outcome.error is None for outcome in found] == [False, False, True]
    assert str(tmp_path / "broken") in found[0].error
    assert "\n" not in found[0].error
    assert "expected a model folder" in found[1].error


def test_a_failed_task_fails_alone(tmp_path, checkpoint, shapes, photos):
    bad = write_tars(tmp_path / "bad", [[("a.cls", b"0")]], classification_files())
    gone = write_tars(tmp_path / "gone", [labelled(range(3))], classification_files())
    tasks = [resolve_task({"name": "bad", "path": bad}), resolve_task({"name": "gone", "path": gone}), shapes]
    (tmp_path / "gone" / "test" / "0.tar").unlink()  # after the plan was made
    outcomes = list(evaluate([checkpoint], tasks, [[str(tmp_path / str(number)) for number in range(3)]]))
    assert outcomes[0].facts is None
    assert outcomes[0].error.startswith("task bad: ")
    assert "\n" not in outcomes[0].error
    assert "0.tar" in outcomes[1].error
    assert outcomes[2].error is None
    assert outcomes[2].facts["images"] == 23


def test_tasks_pixels_and_results_on_an_object_store(tmp_path, checkpoint, shapes, s3_url):
    import fsspec

    fs = fsspec.filesystem("s3")
    fs.put(shapes.path + "/", f"{s3_url}/tasks/shapes/", recursive=True)
    far = resolve_task({"name": "shapes", "metric": "mean_per_class_recall"}, f"{s3_url}/tasks")
    assert task_digest(far) == task_digest(shapes)
    run(checkpoint, shapes, tmp_path / "near")
    stored = store(checkpoint, far, f"{s3_url}/pixels")
    for number, pixels in enumerate((None, stored)):
        run(checkpoint, far, f"{s3_url}/far{number}", pixels_paths=[pixels], batch_size=4)
        assert [fs.cat(f"{s3_url}/far{number}/{name}") for name in FILES] == written(tmp_path / "near")


@pytest.mark.real_data
def test_real_sets_are_read_whole_and_an_untrained_model_is_near_chance(tmp_path, checkpoint, real_data_path):
    entries = [
        {"name": "cifar10", "path": str(real_data_path / "zeroshot" / "cifar10"), "in_domain": True},
        {
            "name": "caltech101",
            "path": str(real_data_path / "zeroshot" / "caltech101"),
            "metric": "mean_per_class_recall",
        },
        {"name": "flickr8k", "path": str(real_data_path / "retrieval" / "flickr8k")},
    ]
    tasks = [resolve_task(entry) for entry in entries]
    paths = [str(tmp_path / data.name) for data in tasks]
    cifar10, caltech101, flickr8k = (outcome.facts for outcome in evaluate([checkpoint], tasks, [paths], threads=2))
    assert (cifar10["images"], cifar10["classes"], cifar10["published_images"]) == (2000, 10, 10000)
    assert (caltech101["images"], caltech101["classes"]) == (1010, 101)
    assert (flickr8k["images"], flickr8k["captions"]) == (1000, 5000)
    assert abs(cifar10["value"] - cifar10["chance"]) < 0.05
    assert abs(caltech101["value"] - caltech101["chance"]) < 0.03
    assert flickr8k["value"] < 0.01
    assert pq.read_metadata(tmp_path / "flickr8k" / "predictions.parquet").num_rows == 6000


@pytest.mark.gpu
def test_a_gpu_predicts_nearly_what_the_cpu_predicts(tmp_path, checkpoint, shapes, photos):
    tables = {}
    for device in ("cpu", "cuda"):
        paths = [str(tmp_path / f"{device}-{data.name}") for data in (shapes, photos)]
        outcomes = evaluate([checkpoint], [shapes, photos], [paths], device=device, threads=2)
        assert [outcome.error for outcome in outcomes] == [None, None]
        tables[device] = [pq.read_table(f"{path}/predictions.parquet") for path in paths]
    for near, far in zip(tables["cpu"], tables["cuda"], strict=True):
        column = "prediction" if "prediction" in near.column_names else "hit@5"
        same = np.array(near[column].to_pylist()) == np.array(far[column].to_pylist())
        assert same.mean() > 0.9  # tf32 may turn a near tie
