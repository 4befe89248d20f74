"""The trainer: budgets, resume, ranks, checkpoints that plain open_clip loads, clear faults."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipeline.core import clip_model, images, storage
from pipeline.core.config import Resources
from pipeline.core.errors import ConfigError, WinnowError
from tests.conftest import ROOT
from tests.training_fixture import MODEL, loss_gradients, recipe, train_rank, write_train_set
from training import data
from training import recipe as recipes
from training.ledger import Ledger
from training.loop import train
from training.recipe import Seeds
from training.step import learning_rate

NUM_SAMPLES = 50


@pytest.fixture(scope="module")
def train_set_path(tmp_path_factory):
    return write_train_set(str(tmp_path_factory.mktemp("train_set")), NUM_SAMPLES)


@pytest.fixture(scope="module")
def uninterrupted(train_set_path, tmp_path_factory):
    """(folder, facts) of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, train(train_set_path, str(folder), recipe(), Seeds(0, 0))


def weights(folder):
    return load_file(f"{folder}/open_clip/open_clip_model.safetensors")


def lines(folder):
    return [json.loads(line) for line in storage.read_bytes(f"{folder}/metrics.jsonl").decode().splitlines()]


def assert_same_weights(folder, other):
    expected, found = weights(other), weights(folder)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_finished_checkpoint(uninterrupted, train_set_path):
    folder, facts = uninterrupted
    assert storage.list_files(str(folder), recursive=True) == [
        "ledger.json",
        "metrics.jsonl",
        "open_clip/open_clip_config.json",
        "open_clip/open_clip_model.safetensors",
    ]
    assert (facts["samples_seen"], facts["steps"], facts["unique_uids"], facts["max_repeats"]) == (100, 13, 50, 2)
    assert [line["samples_seen"] for line in lines(folder)][-2:] == [96, 100]
    assert lines(folder)[-1]["ln_batch"] == math.log(4)
    assert lines(folder)[0]["loss"] == pytest.approx(math.log(8), rel=0.2)
    record = storage.read_json(f"{folder}/ledger.json")
    assert record.pop("index_sha256") == data.index_digest(train_set_path)
    assert record.pop("version") == 1
    assert Ledger(**record).times_seen().tolist() == [2] * NUM_SAMPLES


def test_it_learns(train_set_path, tmp_path):
    train(train_set_path, str(tmp_path), recipe(samples_seen=2000, global_batch_size=25, crop_scale=None), Seeds(0, 0))
    assert lines(tmp_path)[-1]["loss"] < 0.7 * math.log(25)


def test_plain_open_clip_loads_the_checkpoint(uninterrupted, monkeypatch):
    folder, _ = uninterrupted
    path = f"{folder}/open_clip"
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{path}")
    picture, tokens = Image.new("RGB", (30, 20), (200, 10, 10)), open_clip.get_tokenizer(f"local-dir:{path}")(["a red"])
    ours = clip_model.load({"folder": path})
    with torch.no_grad():
        image = model.eval().encode_image(preprocess(picture)[None])
        assert torch.equal(image, ours.model.encode_image(ours.preprocess(picture)[None]))
        text = model.encode_text(tokens)
    config = storage.read_json(f"{path}/open_clip_config.json")
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "winnow-test", config["model_cfg"])
    by_name = open_clip.create_model("winnow-test", pretrained=f"{path}/open_clip_model.safetensors").eval()
    with torch.no_grad():
        torch.testing.assert_close(by_name.encode_text(tokens), text, rtol=0, atol=0)
        torch.testing.assert_close(by_name.encode_image(preprocess(picture)[None]), image, rtol=0, atol=0)


TRAIN_SLOWLY = """
import sys, time
from tests.training_fixture import recipe
from training.recipe import Seeds
from training.loop import train
train(sys.argv[1], sys.argv[2], recipe(), Seeds(0, 0), checkpoint_every_steps=2, report=lambda line: time.sleep(0.1))
"""


def test_killed_training_ends_like_an_uninterrupted_one(uninterrupted, train_set_path, tmp_path):
    out_path = str(tmp_path)
    process = subprocess.Popen([sys.executable, "-c", TRAIN_SLOWLY, train_set_path, out_path], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while not storage.exists(f"{out_path}/step_00000006/state.pt.sha256"):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
    assert not storage.exists(f"{out_path}/open_clip")
    newest, before = sorted(storage.list_folders(out_path), reverse=True)[:2]
    with open(f"{out_path}/{newest}/state.pt", "r+b") as file:  # as a full disk or a dying node would leave it
        file.truncate(1000)

    facts = train(train_set_path, out_path, recipe(), Seeds(0, 0))
    assert facts["resumed_at_step"] == int(before.removeprefix("step_"))
    assert_same_weights(out_path, uninterrupted[0])
    compared = ("step", "samples_seen", "loss", "lr", "logit_scale", "grad_norm")
    expected = [[line[name] for name in compared] for line in lines(uninterrupted[0])]
    assert [[line[name] for name in compared] for line in lines(out_path)] == expected
    assert storage.list_folders(out_path) == ["open_clip"]


class StoppedError(Exception):
    pass


def stop_at(step):
    def report(line):
        if line["step"] == step:
            raise StoppedError

    return report


def test_another_seed_does_not_resume(train_set_path, tmp_path):
    with pytest.raises(StoppedError):
        train(train_set_path, str(tmp_path), recipe(), Seeds(0, 0), checkpoint_every_steps=2, report=stop_at(5))
    assert train(train_set_path, str(tmp_path), recipe(), Seeds(1, 1))["resumed_at_step"] == 0


def test_on_an_object_store(uninterrupted, train_set_path, s3_url, tmp_path):
    remote = f"{s3_url}/train_set"
    for name in storage.list_files(train_set_path):
        storage.write_bytes(f"{remote}/{name}", storage.read_bytes(f"{train_set_path}/{name}"))
    out_path = f"{s3_url}/checkpoint"
    with pytest.raises(StoppedError):
        train(remote, out_path, recipe(), Seeds(0, 0), checkpoint_every_steps=2, report=stop_at(8))
    assert storage.list_folders(out_path) == ["step_00000004", "step_00000006"]
    assert train(remote, out_path, recipe(), Seeds(0, 0))["resumed_at_step"] == 6
    with storage.local_folder(out_path) as folder:
        assert_same_weights(folder, uninterrupted[0])
        assert len(lines(folder)) == len(lines(uninterrupted[0]))


def test_ranks_compute_what_one_does(train_set_path, tmp_path):
    """7 a batch are 3 and 4 on two ranks, and the last batch of 1 leaves the first rank without any."""
    alone, together, meeting_point = tmp_path / "alone", tmp_path / "together", str(tmp_path / "meeting")
    own, world_size = {"global_batch_size": 7, "samples_seen": 99, "grad_clip_norm": 1.0}, 2
    torch.multiprocessing.spawn(
        train_rank, (world_size, meeting_point, train_set_path, str(together), own), nprocs=world_size
    )
    train(train_set_path, str(alone), recipe(**own), Seeds(0, 0))
    losses = [[line["loss"] for line in lines(folder)] for folder in (alone, together)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-4, atol=1e-6)
    found, expected = weights(together), weights(alone)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-2, atol=1e-4)

    of_rank = [torch.load(f"{meeting_point}.gradients.{rank}", weights_only=True) for rank in range(world_size)]
    for sizes in of_rank[0]:
        loss, features, scale = loss_gradients(json.loads(sizes), 0, alone=True)
        gathered = torch.cat([gradients[sizes][1] for gradients in of_rank], dim=1)
        torch.testing.assert_close(gathered, features, rtol=1e-10, atol=1e-12)
        for gradients in of_rank:
            torch.testing.assert_close(gradients[sizes][0], loss, rtol=1e-10, atol=1e-12)
            torch.testing.assert_close(gradients[sizes][2], scale, rtol=1e-10, atol=1e-12)


def test_unused_tokens_need_no_optimizer(uninterrupted, train_set_path, tmp_path, monkeypatch):
    """The table of used tokens trains to what the full one does, decay of the unused ones included."""
    monkeypatch.setattr(data, "TOKEN_TABLE_ENTRIES", 0)
    train(train_set_path, str(tmp_path), recipe(), Seeds(0, 0))
    full, compact = weights(tmp_path), weights(uninterrupted[0])
    assert full["token_embedding.weight"].shape == (49408, 32)
    for name in full:
        torch.testing.assert_close(compact[name], full[name], rtol=1e-3, atol=1e-5)
    torch.manual_seed(0)
    start = clip_model.build(MODEL).model.token_embedding.weight
    unused = 12345
    assert not torch.equal(full["token_embedding.weight"][unused], start[unused])


def load_batches(train_set_path, own, **ranks):
    chosen = recipe(**own)
    train_set = data.open_train_set(train_set_path)
    clip = clip_model.build(chosen.model, chosen.image_size_px)
    ledger = Ledger(len(train_set), chosen.samples_seen, chosen.global_batch_size, 0, chosen.chunk_size)
    return clip, ledger, list(data.Loader(train_set, ledger, chosen, clip, **ranks).batches(0))


def test_images_are_what_the_model_sees_in_evaluation(train_set_path):
    clip, ledger, batches = load_batches(train_set_path, {"crop_scale": None})
    train_set = data.open_train_set(train_set_path)
    for batch in batches:
        for place, entry in enumerate(ledger.batch(batch.step)):
            start = int(train_set.offset_bytes[entry])
            tar = f"{train_set_path}/{train_set.tar_names[train_set.tar_of_entry[entry]]}"
            image = images.decode_rgb(storage.read_range(tar, start, start + int(train_set.size_bytes[entry])))
            expected = clip.preprocess(image)
            preprocess = clip_model.preprocess_config(clip.model)
            mean, std = (torch.tensor(preprocess[name]).view(3, 1, 1) for name in ("mean", "std"))
            found = batch.image_BSS3[place].permute(2, 0, 1).float().div(255).sub(mean).div(std)
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
            caption = train_set.captions[int(entry)].as_py()
            assert torch.equal(batch.tokens_BT[place], clip.tokenizer([caption])[0])


@pytest.mark.parametrize("cache_bytes", [0, 3000, 1 << 30])
def test_batches_are_the_same_for_any_ranks_threads_and_cache(train_set_path, monkeypatch, cache_bytes):
    _, _, alone = load_batches(train_set_path, {})
    monkeypatch.setattr(data, "CACHE_BYTES", cache_bytes)
    parts = [load_batches(train_set_path, {}, rank=rank, world_size=3, threads=2)[2] for rank in range(3)]
    for batch, *shares in zip(alone, *parts, strict=True):
        assert batch.part_sizes == [sum(shares[0].part_sizes)]
        assert torch.equal(torch.cat([share.image_BSS3 for share in shares]), batch.image_BSS3)
        tokens = [row for share in shares for row in share.tokens_BT]  # each rank's as long as its longest
        assert torch.equal(torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True), batch.tokens_BT)


def test_random_crops_are_torchvisions():
    """Area, ratio and place have torchvision's distribution; boxes lie inside, for extreme images too."""
    from torchvision.transforms import RandomResizedCrop

    count, (height, width), scale = 4000, (90, 120), (0.5, 1.0)
    ours = np.array(data.random_crops([(height, width)] * count, scale, 0, 5, 0), float)
    assert np.array_equal(ours[100:120], data.random_crops([(height, width)] * 20, scale, 0, 5, 100))
    assert not np.array_equal(ours[:20], data.random_crops([(height, width)] * 20, scale, 0, 6, 0))
    torch.manual_seed(0)
    pixels = torch.empty(3, height, width)
    drawn = [RandomResizedCrop.get_params(pixels, scale, data.CROP_RATIO) for _ in range(count)]
    theirs = np.array([(left, top, left + w, top + h) for top, left, h, w in drawn], float)
    error = np.sqrt((ours.var(axis=0) + theirs.var(axis=0)) / count)
    assert (np.abs(ours.mean(axis=0) - theirs.mean(axis=0)) < 4 * error).all()
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.08)
    for height, width in ((10, 400), (400, 10), (1, 1)):
        for left, top, right, bottom in data.random_crops([(height, width)] * 50, (0.9, 1.0), 0, 0, 0):
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height


def test_warm_start(uninterrupted, train_set_path, tmp_path):
    frozen = recipe(lr=1e-30, samples_seen=8)
    start = f"{uninterrupted[0]}/open_clip"
    train(train_set_path, str(tmp_path), frozen, Seeds(5, 5), start={"folder": start})
    assert_same_weights(tmp_path, uninterrupted[0])
    other = recipe(model={**MODEL, "embed_dim": 8})
    with pytest.raises(WinnowError, match="expected a model of the recipe's architecture"):
        train(train_set_path, str(tmp_path), other, Seeds(5, 5), start={"folder": start})


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_stay_close(precision, uninterrupted, train_set_path, tmp_path):
    train(train_set_path, str(tmp_path), recipe(precision=precision, grad_checkpointing=True), Seeds(0, 0))
    losses = [[line["loss"] for line in lines(folder)] for folder in (tmp_path, uninterrupted[0])]
    # fp16's first loss scale overflows here, so its second step is skipped, as the scaler is made to do.
    np.testing.assert_allclose(losses[0][:2], losses[1][:2], rtol=0.03)
    assert math.isfinite(losses[0][-1])
    assert all(value.dtype == torch.float32 for value in weights(tmp_path).values())


def test_batches_above_the_train_set_and_a_last_batch_of_one(tmp_path):
    path = write_train_set(str(tmp_path / "train_set"), 5)
    facts = train(path, str(tmp_path / "checkpoint"), recipe(global_batch_size=12, samples_seen=25), Seeds(0, 0))
    assert (facts["steps"], facts["unique_uids"], facts["max_repeats"]) == (3, 5, 5)


def test_faults_are_one_clear_line(train_set_path, tmp_path):
    with pytest.raises(WinnowError, match=r"loss = nan at step \d+ of 13, expected a finite number: lower lr"):
        train(train_set_path, str(tmp_path / "a"), recipe(lr=1e30), Seeds(0, 0))
    assert not storage.exists(str(tmp_path / "a" / "open_clip"))
    with pytest.raises(WinnowError, match=r"index.parquet is missing, expected the index of a train set"):
        train(str(tmp_path), str(tmp_path / "b"), recipe(), Seeds(0, 0))
    broken = write_train_set(str(tmp_path / "broken"), 20)
    (tmp_path / "broken" / "00001.tar").unlink()
    with pytest.raises(WinnowError, match=r"00001.tar is missing, expected a tar of the train set"):
        train(broken, str(tmp_path / "c"), recipe(), Seeds(0, 0))
    (tmp_path / "broken" / "00001.tar").write_bytes(b"\0" * 20_000)
    with pytest.raises(WinnowError, match=r"00001.tar: entry 1\d: .*expected an image that decodes"):
        train(broken, str(tmp_path / "d"), recipe(), Seeds(0, 0))


def test_learning_rate():
    chosen = recipe(lr=2.0, warmup_steps=4, samples_seen=80)
    assert [learning_rate(chosen, step) for step in range(10)] == pytest.approx(
        [0.5, 1.0, 1.5, 2.0, 2.0, *(1 + math.cos(math.pi * done / 6) for done in range(1, 6))]
    )
    assert learning_rate(recipe(lr=2.0, schedule="constant"), 12) == 2.0


def test_recipes_are_datacomps():
    table = {name: recipes.RECIPES[name] for name in ("debug", "small", "medium", "large", "xlarge")}
    found = [
        (r.model, r.global_batch_size, r.lr, r.warmup_steps, r.beta2, r.samples_seen, r.num_steps)
        for r in table.values()
    ]
    assert found == [
        ("ViT-B-32", 1024, 1e-4, 500, 0.98, 128_000, 125),
        ("ViT-B-32", 4096, 5e-4, 500, 0.98, 12_800_000, 3125),
        ("ViT-B-32", 4096, 5e-4, 500, 0.98, 128_000_000, 31_250),
        ("ViT-B-16", 8192, 5e-4, 500, 0.98, 1_280_000_000, 156_250),
        ("ViT-L-14", 90_112, 1e-3, 10_000, 0.95, 12_800_000_000, 142_046),
    ]
    for r in table.values():
        assert (r.beta1, r.eps, r.weight_decay, r.schedule, r.crop_scale) == (0.9, 1e-6, 0.2, "cosine", [0.9, 1.0])
    (warning,) = recipes.check(table["debug"])
    assert warning.startswith("warmup_steps = 500 exceeds the 125 steps")
    assert recipes.check(table["small"]) == []


def test_recipes_of_the_config():
    values = {"model": "ViT-B-32", "global_batch_size": 64, "samples_seen": 640, "lr": 1e-3}
    parsed = recipes.parse(values, "run.yaml: recipes.mine")
    assert parsed.identity() == {**parsed.identity(), **values}
    assert recipes.parse({**values, "grad_checkpointing": True}, "x").identity() == parsed.identity()
    assert recipes.parse({**values, "eps": 1e-8}, "x").identity() != parsed.identity()
    with pytest.raises(ConfigError, match=r"recipes.mine.*warmup is an unknown key. Did you mean warmup_steps"):
        recipes.parse({**values, "warmup": 3}, "run.yaml: recipes.mine")
    with pytest.raises(ConfigError, match=r"recipes.mine.*crop_scale.*expected \[smallest, largest\]"):
        recipes.parse({**values, "crop_scale": [1.0, 0.5]}, "run.yaml: recipes.mine")


@pytest.mark.ray
def test_two_workers_on_ray(train_set_path, uninterrupted, tmp_path):
    from pipeline.core.engine import Engine
    from training.worker import train_on_ray

    engine = Engine()
    try:
        facts = train_on_ray(train_set_path, str(tmp_path), recipe(), Seeds(0, 0), Resources(cpus=0.5, workers=2))
    finally:
        engine.close()
    assert (facts["num_workers"], facts["samples_seen"], facts["resumed_at_step"]) == (2, 100, 0)
    assert storage.list_folders(str(tmp_path)) == ["open_clip"]
    losses = [[line["loss"] for line in lines(folder)] for folder in (tmp_path, uninterrupted[0])]
    np.testing.assert_allclose(losses[0], losses[1], rtol=2e-4)


@pytest.mark.gpu
def test_gpu_computes_what_a_cpu_does(uninterrupted, train_set_path, tmp_path):
    train(train_set_path, str(tmp_path), recipe(), Seeds(0, 0), device="cuda")
    losses = [[line["loss"] for line in lines(folder)] for folder in (tmp_path, uninterrupted[0])]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
