"""What a user watches of a training: each number against its formula, recall on fixed pairs, alarms."""

from __future__ import annotations

import json
import math

import numpy as np
import open_clip
import pyarrow as pa
import pytest
import torch
from torch.nn import functional

from eval.retrieval import retrieval_ranks
from pipeline.core import clip_model, images, pool, storage, training_metrics
from pipeline.core.errors import WinnowError
from tests.pool_fixture import drawing, write_pool
from tests.training_fixture import MODEL, on_ranks, recipe, train_rank, write_train_set
from training import checkpoint, flops, probe, watch
from training.ledger import Ledger
from training.loop import train
from training.loss import Features, contrastive_loss
from training.recipe import Seeds
from training.train_set import open_train_set

NUM_SAMPLES = 50
EVERY_WORD = {"crop_scale": [0.5, 1.0], "patch_dropout": 0.25, "ema_decay": 0.9}  # what evaluation must not see


@pytest.fixture(scope="module")
def train_set_path(tmp_path_factory):
    return write_train_set(str(tmp_path_factory.mktemp("train_set")), NUM_SAMPLES)


@pytest.fixture(scope="module")
def held_out_path(tmp_path_factory):
    """A pool with failed rows, words that no training caption has, and a caption that two rows share."""
    rows = [{"image": drawing(n), "caption": f"zebra number {n} and a harbour"} for n in range(30)]
    rows[3]["image"] = rows[17]["image"] = None
    rows[5]["caption"] = rows[6]["caption"]
    return write_pool(tmp_path_factory.mktemp("pool"), [rows[:12], rows[12:]])


def lines(folder):
    return [json.loads(line) for line in storage.read_bytes(f"{folder}/metrics.jsonl").decode().splitlines()]


def weights(folder):
    return storage.read_bytes(f"{folder}/open_clip/open_clip_model.safetensors")


def drawn_features(num, width, seed=0, bias=None):
    draws = torch.randn(2, num, width, generator=torch.Generator().manual_seed(seed))
    image, text = functional.normalize(draws + draws.mean(dim=1, keepdim=True), dim=-1)
    return Features(image, text, torch.tensor(7.0), bias)


def entropy_exp(shares):
    shares = shares[shares > 0]
    return np.exp(-(shares * np.log(shares)).sum())


@pytest.mark.parametrize("num_negatives", [None, 3])
def test_measures_of_features(num_negatives):
    count, caption = 9, [0, 1, 2, 3, 1, 4, 5, 1, 6]
    features = drawn_features(count, 5)
    tokens = torch.tensor([[49406, word + 300, 49407, 0] for word in caption])
    found = watch.feature_measures(features, tokens, num_negatives)
    image, text = features.image_nD.double().numpy(), features.text_nD.double().numpy()
    assert found["alignment"] == pytest.approx(
        np.mean([((i - t) ** 2).sum() for i, t in zip(image, text, strict=True)])
    )
    for name, rows in (("image", image), ("text", text)):
        kernel = [np.exp(-2 * ((rows[i] - rows[j]) ** 2).sum()) for i in range(count) for j in range(i)]
        assert found[f"uniformity_{name}"] == pytest.approx(np.log(np.mean(kernel)), rel=1e-5)
        singular = np.linalg.svd(rows, compute_uv=False)
        assert found[f"rankme_{name}"] == pytest.approx(entropy_exp(singular / singular.sum() + 1e-7), rel=1e-4)
    assert found["modality_gap"] == pytest.approx(np.linalg.norm(image.mean(axis=0) - text.mean(axis=0)), rel=1e-5)

    counts, hits = [], []
    for queries, items in ((image, text), (text, image)):
        for row in range(count):
            scores = 7 * queries[row] @ items.T
            others = [(row + step) % count for step in range(1, (num_negatives or count - 1) + 1)]
            shares = np.exp(scores[others])
            counts.append(entropy_exp(shares / shares.sum()))
            hits.append(caption[int(np.argmax(scores))] == caption[row])
    assert found["effective_negatives"] == pytest.approx(np.mean(counts), rel=1e-4)
    assert found["batch_recall_at_1"] == pytest.approx(np.mean(hits))
    assert found["duplicate_captions_fraction"] == pytest.approx(3 / 9)


def test_measures_at_their_limits():
    apart, alike = torch.eye(6), torch.tensor([[1.0, 0.0]]).expand(6, 2)
    assert watch.rankme(apart) == pytest.approx(6, rel=1e-4)
    assert watch.rankme(alike) == pytest.approx(1, rel=1e-4)
    assert watch.uniformity(apart) == pytest.approx(-4)  # squared distances of 2
    assert watch.uniformity(alike) == pytest.approx(0, abs=1e-6)
    level, one_sided = torch.zeros(6, 6), torch.zeros(6, 6)
    one_sided[:, 2], one_sided[2] = 80, 80
    for is_sigmoid in (False, True):
        assert watch.effective_negatives(level, None, is_sigmoid=is_sigmoid) == pytest.approx(5)
        assert watch.effective_negatives(level, 2, is_sigmoid=is_sigmoid) == pytest.approx(2)
    # Every row but the third has one negative that weighs; that row has five, all alike.
    assert watch.effective_negatives(one_sided, None, is_sigmoid=False) == pytest.approx((5 * 1 + 5) / 6)
    assert watch.duplicates_fraction(torch.tensor([4, 1, 4, 4, 2, 1])) == pytest.approx(5 / 6)
    assert watch.duplicates_fraction(torch.arange(5)) == 0
    alone = watch.feature_measures(drawn_features(1, 4), torch.ones(1, 3, dtype=torch.long))
    assert set(alone.values()) == {None}


def test_shares_of_the_gradient_are_what_negatives_weigh():
    """effective_negatives of both losses, from the gradient itself."""
    for kind, bias in (("clip", None), ("siglip", torch.tensor(-2.0))):
        features = drawn_features(6, 4, bias=bias)
        logits = 7.0 * features.image_nD @ features.text_nD.T + (0 if bias is None else bias)
        logits.requires_grad_()
        if kind == "clip":
            functional.cross_entropy(logits, torch.arange(6)).backward()
        else:
            (-functional.logsigmoid((2 * torch.eye(6) - 1) * logits)).sum().backward()
        rows = []
        for matrix in (logits.grad, None if kind == "clip" else logits.grad.T):
            if matrix is not None:
                shares = matrix.masked_fill(torch.eye(6, dtype=torch.bool), 0).double().numpy()
                rows += [entropy_exp(row / row.sum()) for row in shares]
        logits = logits.detach()
        if kind == "clip":
            logits_t = logits.T.clone().requires_grad_()
            functional.cross_entropy(logits_t, torch.arange(6)).backward()
            shares = logits_t.grad.masked_fill(torch.eye(6, dtype=torch.bool), 0).double().numpy()
            rows += [entropy_exp(row / row.sum()) for row in shares]
        found = watch.effective_negatives(logits, None, is_sigmoid=kind == "siglip")
        assert found == pytest.approx(np.mean(rows), rel=1e-4)


def test_the_loss_decides_what_a_negative_weighs():
    """A model_cfg may bring a logit bias into a training with the softmax loss."""
    plain, biased = drawn_features(6, 4), drawn_features(6, 4, bias=torch.tensor(-2.0))
    tokens = torch.arange(6)[:, None]

    def weighing(features, loss):
        return float(watch.feature_measures(features, tokens, loss=loss)["effective_negatives"])

    assert weighing(biased, "clip") == pytest.approx(weighing(plain, "clip"))
    assert weighing(biased, "siglip") > weighing(biased, "clip") + 0.05  # a sigmoid saturates


def test_only_the_first_rows_of_a_large_batch_are_compared(monkeypatch):
    features, tokens = drawn_features(40, 5), torch.arange(40)[:, None] % 30
    monkeypatch.setattr(watch, "ROWS", 16)
    found = watch.feature_measures(features, tokens)
    part = Features(features.image_nD[:16], features.text_nD[:16], features.logit_scale)
    expected = watch.feature_measures(part, tokens[:16])
    assert found.pop("duplicate_captions_fraction") == pytest.approx(20 / 40)  # of all, as it is cheap
    assert expected.pop("duplicate_captions_fraction") == 0
    assert found == expected


def test_chance_is_the_best_that_a_model_of_equal_scores_reaches():
    for total, num_negatives in ((7, None), (7, 3), (2, None)):
        alike = torch.tensor([[1.0, 0.0]]).expand(total, 2)
        candidates = (num_negatives or total - 1) + 1
        clip = contrastive_loss(Features(alike, alike, torch.tensor(9.0)), [total], 0, "clip", num_negatives)
        assert watch.chance_loss("clip", candidates) == pytest.approx(clip.item())
        losses = [
            contrastive_loss(
                Features(alike, alike, torch.tensor(1.0), torch.tensor(bias)), [total], 0, "siglip", num_negatives
            ).item()
            for bias in np.arange(-8, 4, 0.01)
        ]
        assert watch.chance_loss("siglip", candidates) == pytest.approx(min(losses), rel=1e-4)
    assert watch.chance_loss("clip", 1) == watch.chance_loss("siglip", 1) == 0


def test_recall_is_that_of_the_evaluation():
    """Of distinct captions what eval.retrieval says; equal captions are right for each other; alike features guess."""
    features = drawn_features(60, 6)
    order = torch.arange(60)
    images_found, texts_found = retrieval_ranks(features.image_nD, features.text_nD, order, order)
    expected = ((images_found == 0).float().mean() + (texts_found == 0).float().mean()) / 2
    assert 0 < expected < 1
    assert probe.mean_recall_at_1(features.image_nD, features.text_nD, order) == pytest.approx(expected.item())
    alike = torch.ones(60, 6) / 6**0.5
    assert probe.mean_recall_at_1(alike, alike, order) == pytest.approx(1 / 60)
    assert probe.mean_recall_at_1(alike, alike, order // 2) == pytest.approx(2 / 60)
    assert probe.mean_recall_at_1(torch.eye(4), torch.eye(4)[[1, 0, 2, 3]], torch.tensor([5, 5, 6, 7])) == 1


def test_flops_are_open_clips():
    """14.78 GFLOPs a pair and 8.82 an image are in open_clip's docs/model_profile.csv for ViT-B-32 at 224 px."""
    with torch.device("meta"):
        model = open_clip.CLIP(**clip_model.model_config("ViT-B-32"))
    counted = flops.PairFlops(model.train())
    assert counted.padded / 3e9 == pytest.approx(14.78, abs=0.005)
    assert counted.useful(77, 77**2) == pytest.approx(counted.padded)
    # By hand: 12 layers of 12 width^2 a token and 4 width tokens^2, and the projection.
    text = 12 * (2 * 12 * 512**2 * 20 + 4 * 512 * 20**2) + 2 * 512 * 512
    assert counted.useful(20, 400) / 3e9 == pytest.approx(8.82 + text / 1e9, abs=0.005)
    mixed = (counted.useful(10, 100) + counted.useful(30, 900)) / 2
    assert counted.useful(20, 500) == pytest.approx(mixed)


def test_flops_of_dropped_patches_are_not_counted():
    whole = flops.PairFlops(clip_model.build(MODEL, 64).model.train())
    halved = flops.PairFlops(clip_model.build(MODEL, 64, force_patch_dropout=0.5).model.train())
    assert halved.padded < 0.7 * whole.padded


def test_a_model_whose_flops_cannot_be_counted_trains(train_set_path, tmp_path, monkeypatch, caplog):
    model = clip_model.build(MODEL).model
    monkeypatch.setattr(model.visual, "forward", lambda image: image * image.sum().item())
    with pytest.raises(RuntimeError) as raised:
        flops.PairFlops(model)

    def counts_nothing(model):
        raise raised.value

    monkeypatch.setattr(watch, "PairFlops", counts_nothing)
    facts = train(train_set_path, str(tmp_path), recipe(samples_seen=24), Seeds(0, 0))
    assert "no FLOPs and no MFU" in caplog.text
    assert facts["tflop_per_s"] is facts["mfu_useful"] is lines(tmp_path)[-1]["tflop_per_s"] is None


def test_peaks_of_devices():
    expected = {
        ("NVIDIA H100 80GB HBM3", "bf16"): 989.4,
        ("NVIDIA H100 PCIe", "bf16"): 756,
        ("NVIDIA H100 NVL", "fp16"): 835,
        ("NVIDIA H200", "tf32"): 494.7,
        ("NVIDIA A100-SXM4-40GB", "bf16"): 312,
        ("NVIDIA A100 80GB PCIe", "fp32"): 19.5,
        ("NVIDIA L4", "bf16"): 121,
        ("NVIDIA L40S", "bf16"): 362,
        ("Tesla T4", "fp16"): 65,
        ("Tesla T4", "bf16"): None,
        ("Tesla V100-SXM2-16GB", "fp16"): 125,
        ("Tesla V100-PCIE-16GB", "fp16"): 112,
        ("NVIDIA GeForce RTX 4090", "bf16"): 165.2,
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16"): None,
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"): None,
        ("NVIDIA GH200 480GB", "bf16"): None,
        ("NVIDIA B200", "bf16"): 2250,
        ("cpu", "fp32"): None,
    }
    assert {key: flops.peak_tflop_per_s(*key) for key in expected} == expected


def test_lines_of_a_training(train_set_path, tmp_path):
    facts = train(train_set_path, str(tmp_path), recipe(num_negatives=3), Seeds(0, 0))
    found = lines(tmp_path)
    assert [line["step"] for line in found] == list(range(1, 14))
    for line in found:
        assert line["ln_batch"] == line["chance_loss"] == math.log(4)
        assert line["mutual_information_bound_nats"] == math.log(4) - line["loss"]
        assert line["repeats_per_uid"] == line["samples_seen"] / NUM_SAMPLES
        assert 1 <= line["effective_negatives"] <= 3
        assert line["tflop_per_s"] > 0
        assert line["mfu_useful"] is line["mfu_padded"] is None
        assert line["clamp_hits"] == 0
    train_set, ledger = open_train_set(train_set_path), Ledger(NUM_SAMPLES, 100, 8, 0, 4)
    tokenizer = clip_model.build(MODEL).tokenizer
    for step, line in enumerate(found):
        captions = train_set.captions.take(ledger.batch(step)).to_pylist()
        cut = [tuple(row.tolist()) for row in tokenizer(captions)]
        assert line["duplicate_captions_fraction"] == pytest.approx(np.mean([cut.count(row) > 1 for row in cut]))
    assert [line["step"] for line in found if line["rankme_image"] is not None] == [3, 8, 13]
    assert [line["step"] for line in found if "train_recall_at_1" in line] == [2, 5, 7, 10, 13]
    assert (facts["recall_pairs"], facts["held_out_recall_at_1"]) == (NUM_SAMPLES, None)
    assert facts["train_recall_at_1"] == found[-1]["train_recall_at_1"]
    assert facts["final_loss"] == pytest.approx((found[-2]["loss"] + found[-1]["loss"]) / 2)


def test_lines_of_a_sigmoid_training(train_set_path, tmp_path):
    facts = train(train_set_path, str(tmp_path), recipe(loss="siglip"), Seeds(0, 0))
    found = lines(tmp_path)
    first = found[0]
    assert first["ln_batch"] is first["mutual_information_bound_nats"] is None
    assert first["chance_loss"] == pytest.approx(math.log(8) + 7 * math.log(8 / 7))
    assert 1 <= first["effective_negatives"] <= 7
    assert found[-1]["chance_loss"] < first["chance_loss"]  # the last batch is of 4 pairs, and its loss no final one
    assert facts["final_loss"] == pytest.approx((found[10]["loss"] + found[11]["loss"]) / 2)


def test_an_interrupted_trainings_lines_are_those_of_an_uninterrupted_one(train_set_path, held_out_path, tmp_path):
    """A line every 2 steps; the state it goes on from lies between two, and the logit scale is at its limit."""
    model = {**MODEL, "init_logit_scale": math.log(100) + 0.1}
    own = recipe(model=model, global_batch_size=4, samples_seen=800, lr=1e-9, grad_clip_norm=1.0)
    whole, parts = str(tmp_path / "whole"), str(tmp_path / "parts")
    train(train_set_path, whole, own, Seeds(0, 0), held_out_path=held_out_path)

    class StoppedError(Exception):
        pass

    def stop(line):
        if line["step"] == 100:
            raise StoppedError

    options = {"checkpoint_every_steps": 33, "held_out_path": held_out_path}
    with pytest.raises(StoppedError):
        train(train_set_path, parts, own, Seeds(0, 0), report=stop, **options)
    assert train(train_set_path, parts, own, Seeds(0, 0), **options)["resumed_at_step"] == 99
    expected, found = lines(whole), lines(parts)
    assert [line["step"] for line in expected[:4]] == [1, 2, 4, 6]
    assert [line["clamp_hits"] for line in expected] == [1, 1, *[2] * 99]
    for line in (*expected, *found):
        for name in watch.TIMED:
            del line[name]
        if line.get("alarm") == watch.WAIT_ALARM:
            del line["alarm"]
    assert found == expected
    assert [line["alarm"] for line in found if "alarm" in line] == [watch.CHANCE_ALARM]


def test_the_time_of_an_interrupted_training_is_that_of_all_attempts(train_set_path, tmp_path):
    class StoppedError(Exception):
        pass

    def stop(line):
        if line["step"] == 7:
            raise StoppedError

    with pytest.raises(StoppedError):
        train(train_set_path, str(tmp_path), recipe(), Seeds(0, 0), report=stop, checkpoint_every_steps=6, threads=2)
    state = torch.load(tmp_path / "step_00000006" / "state.pt", weights_only=True)
    spent = state["spent"]
    assert spent["train_s"] > 0
    assert spent == {**spent, "cpu_hours": pytest.approx(spent["train_s"] * 2 / 3600), "gpu_hours": 0}
    state["spent"] = {"train_s": 7200.0, "cpu_hours": 16.0, "gpu_hours": 2.0}
    checkpoint.save(str(tmp_path), 6, state)
    facts = train(train_set_path, str(tmp_path), recipe(), Seeds(0, 0))
    assert facts["resumed_at_step"] == 6
    assert facts["train_s"] > 7200
    assert facts["cpu_hours"] - 16 == pytest.approx((facts["train_s"] - 7200) / 3600)
    assert facts["gpu_hours"] == 2


def test_clamp_hits_are_steps_that_end_at_the_limit(train_set_path, tmp_path):
    model = {**MODEL, "init_logit_scale": math.log(100)}
    train(train_set_path, str(tmp_path), recipe(model=model, lr=1e-2, samples_seen=400), Seeds(0, 0))
    found = lines(tmp_path)
    at_limit = [line["logit_scale"] > 99.9999 for line in found]
    assert [bool(line["clamp_hits"]) for line in found[:-1]] == at_limit[1:]
    assert not all(at_limit)


def test_recall_of_the_probe_is_that_of_the_kept_model(train_set_path, held_out_path, tmp_path, caplog):
    """With crops, dropped patches, a moving average and a token table that lacks the pool's words."""
    own = recipe(samples_seen=600, **EVERY_WORD)
    facts = train(train_set_path, str(tmp_path), own, Seeds(0, 0), held_out_path=held_out_path)
    assert facts["recall_pairs"] == 28  # usable rows of the pool, and as many of the train set
    few = "recall is measured on 28 pairs, all that the held-out pool has, expected at least 100"
    assert facts["warnings"] == [f"{few}: a single pair is 3.6 % of it"]
    assert f"{tmp_path}: {few}" in caplog.text
    clip = clip_model.load({"folder": f"{tmp_path}/open_clip"})

    train_set = open_train_set(train_set_path)
    files = []
    for entry in range(28):
        start, tar = int(train_set.offset_bytes[entry]), train_set.tar_names[train_set.tar_of_entry[entry]]
        files.append(storage.read_range(f"{train_set_path}/{tar}", start, start + int(train_set.size_bytes[entry])))
    expected = {"train_recall_at_1": recall(clip, files, train_set.captions[:28].to_pylist())}
    files, captions = [], []
    for shard in ("00000", "00001"):
        rows = pool.read_rows(held_out_path, shard)
        rows = rows.filter(rows["ok"])
        files += pool.read_images(held_out_path, shard, rows)
        captions += rows["caption"].to_pylist()
    expected["held_out_recall_at_1"] = recall(clip, files, captions)
    assert {name: facts[name] for name in expected} == pytest.approx(expected)
    assert len(set(expected.values())) == 2


def recall(clip, files, captions):
    """The mean of both directions; a hit is that the best item has the query's caption, as far as the model reads it."""
    with torch.no_grad():
        pixels = torch.stack([clip.preprocess(images.decode_rgb(file)) for file in files])
        image = clip.model.encode_image(pixels, normalize=True)
        text = clip.model.encode_text(clip.tokenizer(captions), normalize=True)
    captions = [tuple(row.tolist()) for row in clip.tokenizer(captions)]
    hits = [
        captions[int(scores.argmax())] == captions[row]
        for score in (image @ text.T, text @ image.T)
        for row, scores in enumerate(score)
    ]
    return float(np.mean(hits))


def test_watching_changes_nothing_that_is_trained(train_set_path, held_out_path, tmp_path, monkeypatch):
    watched, unwatched = tmp_path / "watched", tmp_path / "unwatched"
    train(train_set_path, str(watched), recipe(**EVERY_WORD), Seeds(0, 0), held_out_path=held_out_path)
    assert [line["held_out_recall_at_1"] for line in lines(watched) if "held_out_recall_at_1" in line]
    monkeypatch.setattr(probe, "steps", lambda recipe: {recipe.num_steps})
    train(train_set_path, str(unwatched), recipe(**EVERY_WORD), Seeds(0, 0))
    assert weights(watched) == weights(unwatched)


def test_two_ranks_are_watched_by_the_first(train_set_path, held_out_path, tmp_path):
    """7 a batch are 3 and 4, and the last batch of 1 leaves the first rank without a pair to say something of."""
    alone, together = str(tmp_path / "alone"), str(tmp_path / "together")
    own, options = {"global_batch_size": 7, "samples_seen": 50}, {"held_out_path": held_out_path}
    train(train_set_path, alone, recipe(**own), Seeds(0, 0), **options)
    facts, nothing = on_ranks(2, train_rank, train_set_path, together, own, options)
    assert (nothing, facts["recall_pairs"]) == ({}, 28)
    expected, found = lines(alone), lines(together)
    for name in ("step", "samples_seen", "repeats_per_uid", "ln_batch", "clamp_hits"):
        assert [line[name] for line in found] == [line[name] for line in expected]
    for name in ("mutual_information_bound_nats", "grad_norm", "logit_scale"):
        np.testing.assert_allclose([line[name] for line in found], [line[name] for line in expected], 1e-3, 1e-5)
    for name in ("train_recall_at_1", "held_out_recall_at_1"):
        assert found[-1][name] == pytest.approx(expected[-1][name], abs=3 / 56)  # near ties
    assert [1 <= line["rankme_image"] <= 3.01 for line in found if line["rankme_image"] is not None] == [True]
    assert found[-1]["alignment"] is found[-1]["batch_recall_at_1"] is None
    assert found[-1]["tflop_per_s"] == 0


def test_a_pool_without_usable_pairs(train_set_path, tmp_path):
    empty = write_pool(tmp_path, [[{"image": None, "caption": "lost"}]])
    with pytest.raises(WinnowError, match="no usable pairs, expected some to measure recall on"):
        train(train_set_path, str(tmp_path / "out"), recipe(), Seeds(0, 0), held_out_path=empty)


def test_distinct_pairs_of_a_train_set(tmp_path):
    uids = ["b", "a", "b", "c", "a", "c", "d"]
    numbers = {"image_offset_bytes": [0] * 7, "image_size_bytes": [1] * 7}
    table = pa.table({"uid": uids, "tar": ["00000.tar"] * 7, **numbers, "caption": uids})
    storage.write_bytes(f"{tmp_path}/index.parquet", pool.table_bytes(table))
    assert probe.first_entries(open_train_set(str(tmp_path))).tolist() == [0, 1, 3, 6]


def test_alarm_of_a_training_that_learns_nothing(tmp_path, train_set_path):
    """Images that say nothing of their captions, and a learning rate that moves nothing; then a healthy training."""
    own = {"global_batch_size": 25, "samples_seen": 1000, "crop_scale": None}
    facts = train(train_set_path, str(tmp_path / "stuck"), recipe(lr=1e-9, **own), Seeds(0, 0))
    few = "recall is measured on 50 pairs, all that the train set has, expected at least 100: a single pair is 2.0 % of it"
    assert facts["warnings"] == [few, watch.CHANCE_ALARM]
    (at,) = [line["step"] for line in lines(tmp_path / "stuck") if "alarm" in line]
    assert at == 23  # 20 steps after the warmup
    facts = train(train_set_path, str(tmp_path / "healthy"), recipe(**own), Seeds(0, 0))
    assert facts["warnings"] == [few]
    assert not [line for line in lines(tmp_path / "healthy") if "alarm" in line]


def test_alarm_of_duplicate_captions(tmp_path, caplog):
    path = write_train_set(str(tmp_path / "train_set"), 5)
    facts = train(path, str(tmp_path / "out"), recipe(global_batch_size=12, samples_seen=120), Seeds(0, 0))
    assert watch.DUPLICATES_ALARM in facts["warnings"]
    assert lines(tmp_path / "out")[0]["duplicate_captions_fraction"] == 1
    few = (
        "train set of 5 distinct pairs, global_batch_size = 12: every batch repeats pairs, which are then negatives of"
        " themselves"
    )
    assert few in facts["warnings"]
    assert few in caplog.text


def test_warning_of_fewer_pairs_than_candidates():
    def is_warned(num_pairs, **own):
        return watch.repeats_warning(num_pairs, recipe(**own)) is not None

    assert [is_warned(num_pairs) for num_pairs in (7, 8, 50)] == [True, False, False]
    assert [is_warned(num_pairs, samples_seen=5) for num_pairs in (4, 5)] == [True, False]
    assert [is_warned(num_pairs, num_negatives=3) for num_pairs in (3, 4)] == [True, False]  # four in a row differ


def test_last_values_are_those_of_whole_batches():
    found = [{"loss": float(step), "chance_loss": 4.0} for step in range(30)]
    assert training_metrics.last_mean(found, "loss") == 28
    assert training_metrics.last_mean([*found, {"loss": 0.1, "chance_loss": 3.0}], "loss") == 28
    assert training_metrics.last_mean([*found[:-1], {"loss": None, "chance_loss": 4.0}], "loss") == 27.5
    assert (
        training_metrics.last_mean([{"loss": 0.1, "chance_loss": 3.0}], "loss") == 0.1
    )  # the only batch is a small one
    assert training_metrics.last_mean([{"loss": 2.0}], "loss") == 2
    assert training_metrics.last_mean(found, "lr") is training_metrics.last_mean([], "loss") is None


def line_at(step, **own):
    """A line after every step, of 10 s."""
    calm = {"loss": 1.0, "chance_loss": 2.0, "duplicate_captions_fraction": 0.1, "data_wait_fraction": 0.1}
    return {"step": step, "samples_seen": 8 * step, "samples_per_s": 0.8, **calm, **own}


def test_alarms_say_a_thing_once_and_after_enough_lines():
    chosen = recipe(samples_seen=8 * 300, warmup_steps=100)

    def said(steps, **own):
        found = []
        for step in steps:
            found.append(line_at(step, **own))
            if text := watch.alarm(found, chosen, 0):
                found[-1]["alarm"] = text
        return [(line["step"], line["alarm"]) for line in found if "alarm" in line]

    assert said(range(3, 301, 3)) == []
    assert said(range(3, 301, 3), loss=1.97) == []
    assert said(range(3, 301, 3), loss=1.99) == [(132, watch.CHANCE_ALARM)]  # a tenth of the steps after the warmup
    assert said(range(3, 301, 3), loss=2.5) == [(132, watch.CHANCE_ALARM)]
    assert said(range(1, 6), data_wait_fraction=0.6) == []
    assert said(range(1, 20), data_wait_fraction=0.6) == [(6, watch.WAIT_ALARM)]
    assert said(range(1, 20), duplicate_captions_fraction=0.31) == [(5, watch.DUPLICATES_ALARM)]
    both = said(range(1, 20), duplicate_captions_fraction=0.31, data_wait_fraction=0.6)
    assert both == [(5, watch.DUPLICATES_ALARM), (6, watch.WAIT_ALARM)]
    assert said(range(1, 20), duplicate_captions_fraction=None) == []


def test_the_alarm_of_waiting_is_of_some_seconds_of_one_process():
    chosen = recipe(samples_seen=8 * 300, warmup_steps=100)

    def said(num_lines, num_earlier=0, **own):
        found = [line_at(step, **own) for step in range(1, num_lines + 1)]
        return watch.alarm(found, chosen, num_earlier)

    assert said(6, data_wait_fraction=0.6) == watch.WAIT_ALARM
    assert said(6, num_earlier=1, data_wait_fraction=0.6) is None
    assert said(12, num_earlier=6, data_wait_fraction=0.6) == watch.WAIT_ALARM
    # Lines of 0.1 s, 0.08 s of it waiting: it takes 10 s of that.
    short = {"samples_per_s": 80, "data_wait_fraction": 0.8}
    assert said(125, **short) is None
    assert said(127, **short) == watch.WAIT_ALARM
    slow = [line_at(step, data_wait_fraction=0.6) for step in range(1, 6)]
    assert watch.alarm([line_at(0, data_wait_fraction=1.0), *slow], chosen, 0) == watch.WAIT_ALARM
    slow[2] |= {"samples_per_s": 0.4, "data_wait_fraction": 0.1}  # the longest line counts as much as it lasts
    assert watch.alarm([line_at(0, data_wait_fraction=1.0), *slow], chosen, 0) is None


def test_means_are_over_time_and_leave_out_what_happens_once(tmp_path):
    earlier = watch.MetricsFile(str(tmp_path), 0)
    earlier.add({"step": 1, "samples_seen": 10, "samples_per_s": 999.0, "mfu_useful": 0.9})
    earlier.write()
    metrics = watch.MetricsFile(str(tmp_path), 1)
    assert metrics.mean("samples_per_s") is None
    metrics.add({"step": 2, "samples_seen": 20, "samples_per_s": 1.0, "mfu_useful": 0.9})
    metrics.add({"step": 3, "samples_seen": 120, "samples_per_s": 100.0, "mfu_useful": 0.4})
    metrics.add({"step": 4, "samples_seen": 220, "samples_per_s": 25.0, "mfu_useful": 0.1})
    assert metrics.mean("samples_per_s") == pytest.approx(200 / 5)
    assert metrics.mean("mfu_useful") == pytest.approx((0.4 * 1 + 0.1 * 4) / 5)
    assert metrics.mean("step") == pytest.approx((3 * 1 + 4 * 4) / 5)


@pytest.mark.gpu
def test_a_line_on_a_gpu_is_that_of_a_cpu(train_set_path, held_out_path, tmp_path):
    for device in ("cpu", "cuda"):
        out_path = str(tmp_path / device)
        train(train_set_path, out_path, recipe(), Seeds(0, 0), device=device, held_out_path=held_out_path)
    for on_cpu, on_gpu in zip(lines(tmp_path / "cpu"), lines(tmp_path / "cuda"), strict=True):
        for name in on_cpu.keys() - {*watch.TIMED, "alarm", "train_recall_at_1", "held_out_recall_at_1"}:
            assert on_gpu[name] == pytest.approx(on_cpu[name], rel=0.02, abs=0.02)
