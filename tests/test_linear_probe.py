"""Linear probes: the optimum against an independent solver, the choice of strength, the draws, and whole evaluations."""

from __future__ import annotations

import hashlib
import io
import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.optimize
import torch
from PIL import Image
from scipy.special import log_softmax

from eval.evaluate import Checkpoint, evaluate
from eval.linear_probe import UNCHOSEN_L2, Regression, draw_shots, fit_probe
from eval.samples import store_pixels
from eval.tasks import resolve_task, resolve_tasks, task_digest
from pipeline.core import clip_model
from pipeline.core.errors import ConfigError, WinnowError
from pipeline.core.tars import TarWriter

CLASSES = ("red", "green", "blue", "dark", "light", "grey")
COLOURS = ((220, 40, 40), (40, 200, 60), (50, 60, 220), (30, 30, 30), (230, 230, 230), (128, 128, 128))


# The optimum


def features(num: int, dims: int, classes: int, spread: float, seed: int = 0) -> tuple[torch.Tensor, np.ndarray]:
    """Unit features around a common direction, on axes of very unequal length, as frozen features are."""
    rng = np.random.default_rng(seed)
    label_N = rng.integers(0, classes, num)
    centre_CD = rng.normal(size=(classes, dims))
    image_ND = spread * centre_CD[label_N] + rng.normal(size=(num, dims)) * np.logspace(0, -1.5, dims)
    image_ND = image_ND + 2 * rng.normal(size=dims)
    image_ND /= np.linalg.norm(image_ND, axis=1, keepdims=True)
    return torch.from_numpy(image_ND.astype(np.float32)), label_N


def plain_loss(flat: np.ndarray, image_ND: np.ndarray, label_N: np.ndarray, classes: int, l2: float):
    """The loss of the module's docstring and its gradient, as plainly as they can be written."""
    point = flat.reshape(-1, classes)
    log_NC = log_softmax(image_ND @ point[:-1] + point[-1], axis=1)
    excess_NC = np.exp(log_NC) - np.eye(classes)[label_N]
    gradient = np.vstack([image_ND.T @ excess_NC + l2 * point[:-1], excess_NC.sum(axis=0)])
    loss = -log_NC[np.arange(len(label_N)), label_N].sum() + l2 / 2 * (point[:-1] ** 2).sum()
    return loss, gradient.ravel()


def plain_optimum(image_ND: np.ndarray, label_N: np.ndarray, classes: int, l2: float) -> np.ndarray:
    """[D + 1, C] by Newton's method with conjugate gradients, from zero."""
    arguments = (image_ND, label_N, classes, l2)

    def along(flat: np.ndarray, step: np.ndarray, *_) -> np.ndarray:  # exact: the Hessian times a step
        point, step = flat.reshape(-1, classes), step.reshape(-1, classes)
        share_NC = np.exp(log_softmax(image_ND @ point[:-1] + point[-1], axis=1))
        moved_NC = image_ND @ step[:-1] + step[-1]
        moved_NC = share_NC * (moved_NC - (share_NC * moved_NC).sum(axis=1, keepdims=True))
        return np.vstack([image_ND.T @ moved_NC + l2 * step[:-1], moved_NC.sum(axis=0)]).ravel()

    start = np.zeros((image_ND.shape[1] + 1) * classes)
    found = scipy.optimize.minimize(
        plain_loss,
        start,
        arguments,
        jac=True,
        hessp=along,
        method="trust-ncg",
        options={"gtol": 1e-10, "maxiter": 2000},
    )
    return found.x.reshape(-1, classes)


@pytest.mark.parametrize("l2", [30.0, 0.3, 1e-2])
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_the_optimum_is_that_of_an_independent_solver(l2, spread):
    image_ND, label_N = features(300, 24, 5, spread)
    weight_DC, bias_C = Regression(image_ND, torch.from_numpy(label_N), 5).fit(l2, exactly=True)
    expected = plain_optimum(image_ND.double().numpy(), label_N, 5, l2)
    nearness = (1e-6 if l2 > 0.1 else 1e-5) * np.abs(expected).max()  # the weaker the penalty, the flatter the loss
    np.testing.assert_allclose(weight_DC, expected[:-1], atol=nearness)
    shift = expected[-1] - expected[-1].mean()  # the same number for all classes changes nothing
    np.testing.assert_allclose(bias_C - bias_C.mean(), shift, atol=nearness)
    ours = np.vstack([weight_DC, bias_C[None]]).ravel()
    loss, gradient = plain_loss(ours, image_ND.double().numpy(), label_N, 5, l2)
    best, _ = plain_loss(expected.ravel(), image_ND.double().numpy(), label_N, 5, l2)
    assert loss == pytest.approx(best, rel=1e-9)
    assert np.abs(gradient).max() < 1e-5


def test_where_a_fit_starts_does_not_matter():
    image_ND, label_N = features(200, 16, 4, 0.3)
    regression = Regression(image_ND, torch.from_numpy(label_N), 4)
    cold = regression.fit(0.1, exactly=True)
    warm = regression.fit(0.1, start=regression.fit(1e4), exactly=True)
    np.testing.assert_allclose(cold[0], warm[0], atol=1e-6)


def test_two_points_have_a_known_optimum():
    """One image at +1 and one at -1: weights are (w, -w), where w minimises 2 log(1 + exp(-2 w)) + l2 w^2."""
    image_ND = torch.tensor([[1.0], [-1.0]])
    weight_DC, bias_C = Regression(image_ND, torch.tensor([0, 1]), 2).fit(0.5, exactly=True)
    slope = scipy.optimize.brentq(lambda w: 2 * 0.5 * w - 4 / (1 + np.exp(2 * w)), 0, 10)
    np.testing.assert_allclose(weight_DC.ravel(), [slope, -slope], atol=1e-8)
    np.testing.assert_allclose(bias_C, [0, 0], atol=1e-8)


# The strength


def names(num: int) -> list[str]:
    return [f"0/s{number:07d}" for number in range(num)]


def accuracy(probe, image_ND, label_N) -> float:
    return float((probe.predict(image_ND)[:, 0] == label_N).mean())


def test_a_separable_set_is_learned_and_noise_is_not():
    image_ND, label_N = features(600, 16, 6, 3.0)
    probe = fit_probe(image_ND[:400], label_N[:400], names(400))
    assert accuracy(probe, image_ND[400:], label_N[400:]) == 1
    shuffled_N = np.random.default_rng(1).permutation(label_N)
    noise = fit_probe(image_ND[:400], shuffled_N[:400], names(400))
    assert accuracy(noise, image_ND[400:], shuffled_N[400:]) < 0.3
    assert noise.l2 > probe.l2  # what can't be learned is damped


def test_the_chosen_strength_is_on_the_grid_and_no_worse_than_its_neighbours():
    """With the split into parts read off the probe's own rule, and every fit by the independent solver."""
    image_ND, label_N = features(240, 12, 4, 0.35, seed=3)
    probe = fit_probe(image_ND, label_N, names(240))
    eighths = np.log10(probe.l2) * 8
    assert eighths == pytest.approx(round(eighths), abs=1e-9)
    held_N = np.zeros(240, dtype=bool)
    for one in range(4):
        rows = np.flatnonzero(label_N == one)
        rows = sorted(rows, key=lambda row: hashlib.sha256(f"validation 0/{names(240)[row]}".encode()).digest())
        held_N[rows[: len(rows) // 5]] = True

    def score(l2: float) -> tuple[float, float]:
        wide_ND = image_ND.double().numpy()
        found = plain_optimum(wide_ND[~held_N], label_N[~held_N], 4, l2)
        log_NC = log_softmax(wide_ND[held_N] @ found[:-1] + found[-1], axis=1)
        right = label_N[held_N]
        return float((log_NC.argmax(axis=1) == right).mean()), float(log_NC[np.arange(len(right)), right].mean())

    chosen = score(probe.l2)
    coarse = [10.0**decade for decade in (-2, 0, 2, 4, 6)]
    for other in [*coarse, probe.l2 * 10**0.125, probe.l2 / 10**0.125]:
        assert chosen >= score(other) or chosen == pytest.approx(score(other), abs=1e-4), other
    every = plain_optimum(image_ND.double().numpy(), label_N, 4, probe.l2)  # those held out are fitted to at last
    assert probe.weight_DC.numpy() == pytest.approx(every[:-1], rel=1e-3, abs=0.01)


def test_a_class_without_training_images_is_never_predicted():
    image_ND, label_N = features(300, 16, 6, 2.0)
    seen_N = label_N != 2
    probe = fit_probe(image_ND[seen_N], label_N[seen_N], names(int(seen_N.sum())))
    top_NK = probe.predict(image_ND)
    assert top_NK.shape == (300, 5)
    assert 2 not in top_NK
    assert set(top_NK.ravel().tolist()) == {0, 1, 3, 4, 5}
    assert (top_NK[seen_N, 0] == label_N[seen_N]).mean() > 0.95


def test_one_image_a_class_leaves_the_strength_unchosen():
    image_ND, label_N = features(200, 16, 4, 3.0)
    first = [int(np.flatnonzero(label_N == one)[0]) for one in range(4)]
    probe = fit_probe(image_ND[first], label_N[first], names(4))
    assert probe.l2 == UNCHOSEN_L2
    assert accuracy(probe, image_ND, label_N) > 0.9


# The draws


def test_shots_are_balanced_and_follow_names_not_order():
    rng = np.random.default_rng(0)
    label_N = np.repeat([0, 1, 2], [40, 25, 12])
    items = names(len(label_N))
    row_N = draw_shots(items, label_N, "abc", 8, draw=1)
    assert np.bincount(label_N[row_N]).tolist() == [8, 8, 8]
    assert (np.diff(row_N) > 0).all()
    order = rng.permutation(len(items))
    turned_N = draw_shots([items[row] for row in order], label_N[order], "abc", 8, draw=1)
    assert {items[order[row]] for row in turned_N} == {items[row] for row in row_N}
    assert set(draw_shots(items, label_N, "abc", 8, draw=2).tolist()) != set(row_N.tolist())
    assert set(row_N[:8].tolist()) != set(range(8))  # not simply the first ones


def test_more_shots_than_there_are_is_an_error_that_names_the_class():
    label_N = np.repeat([0, 1, 2], [40, 3, 12])
    message = r"class 1 \(dog\) has 3 training images, expected at least the 4 shots"
    with pytest.raises(WinnowError, match=message):
        draw_shots(names(55), label_N, ["cat", "dog", "emu"], 4, draw=0)
    with pytest.raises(WinnowError, match=r"class 3 \(fox\) has 0"):
        draw_shots(names(55), label_N, ["cat", "dog", "emu", "fox"], 1, draw=0)


# Whole evaluations


def picture(label: int, seed: int) -> bytes:
    """An image of its class's colour with noise; not square."""
    rng = np.random.default_rng([label, seed])
    pixels = np.array(COLOURS[label]) + rng.normal(0, 45, (20, 26, 3)) + rng.normal(0, 25, 3)
    data = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(data, "PNG")
    return data.getvalue()


def write_split(folder: pathlib.Path, split: str, shards: list[list[tuple[int, bytes]]], suffix: str = "png") -> None:
    (folder / split).mkdir(parents=True)
    (folder / split / "nshards.txt").write_text(f"{len(shards)}\n")
    for number, samples in enumerate(shards):
        with TarWriter(str(folder / split / f"{number}.tar")) as tar:
            for row, (label, image) in enumerate(samples):
                tar.add(f"s{row:07d}.{suffix}", image)
                tar.add(f"s{row:07d}.cls", str(label).encode())


def write_names(folder: pathlib.Path) -> None:
    (folder / "classnames.txt").write_text("\n".join(CLASSES))
    (folder / "zeroshot_classification_templates.txt").write_text("a {c} picture")


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> str:
    """A root with the folder `colours`: 60 test images, 96 training images in two tars."""
    root = tmp_path_factory.mktemp("root")
    folder = root / "colours"
    write_split(folder, "test", [[(row % 6, picture(row % 6, row)) for row in range(60)]])
    train = [(row % 6, picture(row % 6, 1000 + row)) for row in range(96)]
    write_split(folder, "train", [train[:50], train[50:]])
    write_names(folder)
    return str(root)


ENTRIES = [
    "colours",
    {"name": "colours", "mode": "linear_probe", "metric": "lp_mean_per_class_recall"},
    {"name": "colours", "mode": "few_shot", "shots": 4, "draws": 2},
]


def run(model_folder: str, tasks, out: pathlib.Path, **options) -> list:
    checkpoint = Checkpoint({"folder": model_folder}, "tiny", "checkpoint-0")
    return list(evaluate([checkpoint], tasks, [[str(out / data.name) for data in tasks]], **options))


def bytes_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_probe_stands_beside_zero_shot_under_a_name_of_its_own(colours):
    tasks = [data.task for data in resolve_tasks(ENTRIES, colours)]
    assert [(task.name, task.type, task.group) for task in tasks] == [
        ("colours", "zeroshot_classification", ""),
        ("colours_linear_probe", "linear_probe", "linear probe"),
        ("colours_4_shot", "linear_probe", "few-shot"),
    ]
    assert [task.title for task in tasks[1:]] == ["colours, linear probe", "colours, 4-shot"]
    assert not any(task.counted or task.clean for task in tasks[1:])
    assert [task.metric for task in tasks] == ["acc1", "lp_mean_per_class_recall", "lp_acc1"]


def test_evaluations_report_metrics_strength_and_predictions(colours, model_folder, tmp_path):
    tasks = resolve_tasks(ENTRIES, colours)
    zero_shot, probe, shots = run(model_folder, tasks, tmp_path)
    assert (zero_shot.error, probe.error, shots.error) == (None, None, None)
    result = json.loads((tmp_path / "colours_linear_probe" / "result.json").read_text())
    assert (result["dataset"], result["task"]) == ("colours_linear_probe", "linear_probe")
    assert result["metrics"].keys() == {"lp_acc1", "lp_acc5", "lp_mean_per_class_recall", "l2"}
    assert probe.facts["value"] == result["metrics"]["lp_mean_per_class_recall"] > 0.8  # colours survive random weights
    assert probe.facts["chance"] == pytest.approx(1 / 6)
    assert (probe.facts["images"], probe.facts["train_images"]) == (60, 96)
    assert probe.facts["fits"][0]["l2"] == pytest.approx(result["metrics"]["l2"])
    table = pq.read_table(tmp_path / "colours_linear_probe" / "predictions.parquet")
    assert table.column_names == ["item", "label", "prediction", "top5", "correct"]
    assert np.mean(table["correct"].to_pylist()) == pytest.approx(result["metrics"]["lp_acc1"])

    few = json.loads((tmp_path / "colours_4_shot" / "result.json").read_text())["metrics"]
    assert few["fewshot_k"] == 4
    table = pq.read_table(tmp_path / "colours_4_shot" / "predictions.parquet")
    assert table["draw"].to_pylist() == [draw for draw in range(2) for _ in range(60)]
    assert np.mean(table["correct"].to_pylist()) == pytest.approx(few["lp_acc1"])
    fits = shots.facts["fits"]
    assert [(fit["draw"], fit["train_images"]) for fit in fits] == [(0, 24), (1, 24)]
    assert np.mean([fit["lp_acc1"] for fit in fits]) == pytest.approx(few["lp_acc1"])
    assert few["lp_acc1"] > 0.5


def test_threads_batch_sizes_and_stored_pixels_change_no_byte(colours, model_folder, tmp_path):
    tasks = resolve_tasks(ENTRIES[1:], colours)
    run(model_folder, tasks, tmp_path / "plain", batch_size=7)
    expected = bytes_of(tmp_path / "plain")
    run(model_folder, tasks, tmp_path / "threads", batch_size=256, threads=2)
    preprocess = clip_model.preprocess_config(clip_model.load({"folder": model_folder}).model)
    pixels = []
    for data in tasks:
        pixels.append(str(tmp_path / "pixels" / data.name))
        assert len(data.shards + data.train_shards) == 3
        for shard in data.shards + data.train_shards:
            store_pixels(data, shard, preprocess, pixels[-1])
    run(model_folder, tasks, tmp_path / "stored", batch_size=16, pixels_paths=pixels)
    assert len(expected) == 4
    assert bytes_of(tmp_path / "threads") == expected
    assert bytes_of(tmp_path / "stored") == expected


def test_the_number_of_threads_changes_no_bit_of_a_fit():
    image_ND, label_N = features(3000, 96, 7, 0.2)
    found = []
    threads = torch.get_num_threads()
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        probe = fit_probe(image_ND, label_N, names(3000))
        found.append((probe.l2, probe.weight_DC.numpy().tobytes(), probe.bias_C.numpy().tobytes()))
        assert torch.get_num_threads() == count
    torch.set_num_threads(threads)
    assert found[0] == found[1] == found[2]


def test_too_few_shots_fail_alone(colours, model_folder, tmp_path):
    tasks = resolve_tasks([{"name": "colours", "mode": "few_shot", "shots": 17}, "colours"], colours)
    shots, zero_shot = run(model_folder, tasks, tmp_path)
    assert "has 16 training images, expected at least the 17 shots" in shots.error
    assert shots.facts is None
    assert zero_shot.error is None


def test_a_broken_training_image_is_named_with_its_split(colours, model_folder, tmp_path):
    folder = tmp_path / "broken"
    write_split(folder, "test", [[(row % 6, picture(row % 6, row)) for row in range(6)]])
    write_split(folder, "train", [[(0, b"no image")]])
    write_names(folder)
    (outcome,) = run(model_folder, [resolve_task({"name": "broken", "mode": "linear_probe"}, str(tmp_path))], tmp_path)
    assert "broken/train/0.tar: s0000000" in outcome.error


# What is accepted


def test_the_digest_covers_training_images_shots_and_draws(colours, tmp_path):
    entries = [
        "colours",
        {"name": "colours", "mode": "linear_probe"},
        {"name": "colours", "mode": "few_shot", "shots": 4},
        {"name": "colours", "mode": "few_shot", "shots": 4, "draws": 2},
        {"name": "colours", "mode": "few_shot", "shots": 8},
    ]
    digests = [task_digest(resolve_task(entry, colours)) for entry in entries]
    assert len(set(digests)) == len(digests)
    other = tmp_path / "colours"
    write_split(other, "test", [[(row % 6, picture(row % 6, row)) for row in range(60)]])
    write_split(other, "train", [[(row % 6, picture(row % 6, row)) for row in range(6)]])
    write_names(other)
    assert task_digest(resolve_task("colours", str(tmp_path))) == digests[0]
    assert task_digest(resolve_task(entries[1], str(tmp_path))) != digests[1]


@pytest.mark.parametrize(
    "settings, message",
    [
        (
            {"mode": "probe"},
            r"mode = probe, expected a way to evaluate.* Choose from: few_shot, linear_probe, zero_shot",
        ),
        ({"mode": "few_shot"}, r"shots is missing, expected the number of training images of each class"),
        ({"mode": "few_shot", "shots": 0}, r"shots = 0, expected at least 1"),
        ({"mode": "few_shot", "shots": 4, "draws": 0}, r"draws = 0, expected at least 1"),
        ({"mode": "few_shot", "shots": "4"}, r"shots = '4', expected a whole number"),
        ({"mode": "linear_probe", "shots": 4}, r"shots has no effect with mode: linear_probe, expected mode: few_shot"),
        ({"draws": 4}, r"draws has no effect with mode: zero_shot"),
        ({"mode": "linear_probe", "metric": "acc1"}, r"metric = acc1, expected one of linear_probe.*lp_acc1"),
    ],
)
def test_settings_without_effect_or_sense_are_refused(colours, settings, message):
    with pytest.raises(ConfigError, match=message):
        resolve_task({"name": "colours", **settings}, colours)


def test_a_missing_train_split_is_one_line(tmp_path):
    write_split(tmp_path / "colours", "test", [[(0, picture(0, 0))]])
    write_names(tmp_path / "colours")
    entry = {"name": "colours", "mode": "linear_probe"}
    with pytest.raises(ConfigError, match=r"colours: mode linear_probe: .*/colours lacks train/nshards.txt"):
        resolve_task(entry, str(tmp_path))
    (tmp_path / "colours" / "train").mkdir()
    (tmp_path / "colours" / "train" / "nshards.txt").write_text("2")
    with pytest.raises(ConfigError, match=r"lacks train/0.tar, train/1.tar, expected CLIP_benchmark's layout"):
        resolve_task(entry, str(tmp_path))


def test_retrieval_and_plain_folders_have_no_probe(tmp_path):
    write_split(tmp_path / "photos", "test", [[]])
    (tmp_path / "photos" / "dataset_type.txt").write_text("retrieval")
    for name in ("cats", "dogs"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "0.png").write_bytes(picture(0, 0))
    for name in ("photos", "pets"):
        with pytest.raises(
            ConfigError, match=rf"mode = linear_probe, expected zero_shot for {name}: only tasks of class"
        ):
            resolve_task({"name": name, "mode": "linear_probe"}, str(tmp_path))


@pytest.mark.real_data
@pytest.mark.parametrize("name, num_train, above", [("cifar10", 2000, 0.25), ("caltech101", 1212, 0.04)])
def test_real_images(name, num_train, above, real_data_path, model_folder, tmp_path):
    """A random model's features still tell classes apart far better than guessing (0.1 and 0.01)."""
    source, folder = real_data_path / "zeroshot" / name, tmp_path / name
    rows = pq.read_table(source / "train" / "0.parquet", columns=["image", "label"]).to_pylist()
    step = len(rows) // num_train
    write_split(folder, "train", [[(row["label"], row["image"]) for row in rows[::step][:num_train]]], "jpg")
    for file in ("test", "classnames.txt", "zeroshot_classification_templates.txt"):
        (folder / file).symlink_to(source / file)
    entries = [{"name": name, "path": str(folder), "mode": mode} for mode in ("linear_probe", "few_shot")]
    probe, shots = run(
        model_folder, resolve_tasks([entries[0], entries[1] | {"shots": 5, "draws": 2}]), tmp_path / "out"
    )
    assert probe.error is None and shots.error is None
    assert probe.facts["value"] > shots.facts["value"] > probe.facts["chance"]
    assert probe.facts["value"] > above
