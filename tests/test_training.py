"""The trainer: budgets, resume, ranks, checkpoints that plain open_clip loads, clear faults."""

from __future__ import annotations

import importlib.util
import json
import math

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from eval import zero_shot
from eval.evaluate import Checkpoint, Loaded
from eval.tasks import CLASSIFICATION, Task, TaskData
from pipeline.core import clip_model, images, storage
from pipeline.core.errors import ConfigError, WinnowError
from tests.training_fixture import COLOURS, MODEL, SHAPES, recipe, write_train_set
from training import data, watch
from training import recipe as recipes
from training.ledger import Ledger
from training.loop import train
from training.recipe import Seeds
from training.train_set import index_digest, open_train_set

NUM_SAMPLES = 50


@pytest.fixture(scope="module")
def train_set_path(tmp_path_factory):
    return write_train_set(str(tmp_path_factory.mktemp("train_set")), NUM_SAMPLES)


@pytest.fixture(scope="module")
def uninterrupted(train_set_path, tmp_path_factory):
    """(folder, facts) of a training that nothing disturbed."""
    folder = tmp_path_factory.mktemp("checkpoint")
    return folder, train(train_set_path, str(folder), recipe(), Seeds(0, 0))


def weights(folder, kept="open_clip"):
    return load_file(f"{folder}/{kept}/open_clip_model.safetensors")


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
    assert record.pop("index_sha256") == index_digest(train_set_path)
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


@pytest.mark.parametrize("own", [{}, {"ema_decay": 0.9, "num_checkpoints": 2}])
def test_unused_tokens_need_no_optimizer(own, train_set_path, tmp_path, monkeypatch):
    """The table of used tokens trains to what the full one does, decay of the unused ones included, averaged or not."""
    compact, full = str(tmp_path / "compact"), str(tmp_path / "full")
    train(train_set_path, compact, recipe(**own), Seeds(0, 0))
    monkeypatch.setattr(data, "TOKEN_TABLE_ENTRIES", 0)
    train(train_set_path, full, recipe(**own), Seeds(0, 0))
    torch.manual_seed(0)
    start, unused = clip_model.build(MODEL).model.token_embedding.weight[12345], 12345
    for kept in storage.list_folders(full):
        of_full, of_compact = weights(full, kept), weights(compact, kept)
        table = of_full["token_embedding.weight"]
        assert table.shape == (49408, 32)
        assert 0.9 < (table[unused] / start).mean() < 1
        torch.testing.assert_close(of_compact["token_embedding.weight"][unused], table[unused], rtol=1e-6, atol=0)
        for name in of_full:
            torch.testing.assert_close(of_compact[name], of_full[name], rtol=1e-3, atol=1e-5)


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


def test_siglip(tmp_path):
    """Starts at a scale of 10 and a bias of -10; its checkpoint is open_clip's, and names colours without training."""
    frozen, learned = str(tmp_path / "frozen"), str(tmp_path / "learned")
    path = write_train_set(str(tmp_path / "train_set"), 200)
    train(path, frozen, recipe(loss="siglip", lr=1e-30, samples_seen=8), Seeds(0, 0))
    assert weights(frozen)["logit_scale"].item() == pytest.approx(math.log(10))
    assert weights(frozen)["logit_bias"].item() == -10
    own = {"loss": "siglip", "samples_seen": 3000, "global_batch_size": 25, "lr": 3e-3, "crop_scale": None}
    train(path, learned, recipe(**own), Seeds(0, 0))
    model = open_clip.create_model(f"local-dir:{learned}/open_clip")
    assert model.logit_bias.item() == weights(learned)["logit_bias"].item() != -10

    clip, train_set = clip_model.load({"folder": f"{learned}/open_clip"}), open_train_set(path)
    templates = [f"a {{c}} {shape} on a wall, picture 7" for shape in SHAPES]
    task = Task("colours", "Colours", CLASSIFICATION, "acc1")
    data = TaskData(task, "", (), classnames=tuple(COLOURS), templates=tuple(templates))
    classifier_DC = Loaded(Checkpoint({}, "siglip", "learned"), clip).classifier(data, 64)
    pixels = []
    for entry, start in enumerate(train_set.offset_bytes.tolist()):
        tar = f"{path}/{train_set.tar_names[train_set.tar_of_entry[entry]]}"
        stop = start + int(train_set.size_bytes[entry])
        pixels.append(clip.preprocess(images.decode_rgb(storage.read_range(tar, start, stop))))
    found = zero_shot.predict(zero_shot.encode_images(clip, torch.stack(pixels)), classifier_DC)[:, 0].tolist()
    right = [
        list(COLOURS)[place] in caption for place, caption in zip(found, train_set.captions.to_pylist(), strict=True)
    ]
    assert np.mean(right) > 0.4  # guessing among four: 0.25 with a standard deviation of 0.03


RESNET = {**MODEL, "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "head_width": 16}}
ARCHITECTURES = {
    "quick_gelu": {**MODEL, "quick_gelu": True},
    "custom_text": {**MODEL, "custom_text": True},
    "mean_of_tokens": {**MODEL, "text_cfg": {**MODEL["text_cfg"], "no_causal_mask": True, "pool_type": "last"}},
    "resnet": RESNET,
    "timm_vit": {**MODEL, "vision_cfg": {"timm_model_name": "test_vit", "timm_pool": "", "image_size": 32}},
    "timm_resnet": {**MODEL, "vision_cfg": {"timm_model_name": "test_resnet", "timm_proj": "linear", "image_size": 64}},
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_other_architectures(name, train_set_path, tmp_path):
    """Train, in parts and with a moving average, and are loaded by plain open_clip with every weight."""
    chosen = recipe(model=ARCHITECTURES[name], samples_seen=16, ema_decay=0.5)
    recipes.parse(chosen.model_dump(), "x")
    train(train_set_path, str(tmp_path), chosen, Seeds(0, 0), batch_size=4)
    path = f"local-dir:{tmp_path}/open_clip"
    loaded = open_clip.create_model(path).state_dict()
    assert loaded.keys() == weights(tmp_path).keys()
    assert all(torch.equal(value, loaded[name]) for name, value in weights(tmp_path).items())
    torch.manual_seed(0)
    start = clip_model.build(ARCHITECTURES[name]).model.state_dict()
    unmoved = [name for name in start if torch.equal(start[name], loaded[name])]
    assert all(name.endswith("attnpool.k_proj.bias") for name in unmoved)  # it has no effect: softmax is blind to it


def test_architecture_by_name(train_set_path, tmp_path):
    """open_clip's smallest, at a few pixels; the checkpoint says that size."""
    chosen = recipe(model="ViT-S-32-alt", image_size_px=32, samples_seen=2, global_batch_size=2)
    train(train_set_path, str(tmp_path), chosen, Seeds(0, 0))
    config = storage.read_json(f"{tmp_path}/open_clip/open_clip_config.json")["model_cfg"]
    assert (config["vision_cfg"]["image_size"], config["embed_dim"]) == (32, 256)
    assert open_clip.create_model(f"local-dir:{tmp_path}/open_clip").visual.image_size == (32, 32)


def test_architectures_that_do_not_fit(tmp_path, train_set_path, monkeypatch):
    values = {"model": MODEL, "global_batch_size": 8, "samples_seen": 16, "lr": 1e-3}

    def parse(model):
        return recipes.parse({**values, "model": model}, "run.yaml: recipes.mine")

    with pytest.raises(
        ConfigError, match=r"mine.model = coca_ViT-B-32: a model that writes captions .*expected an image"
    ):
        parse("coca_ViT-B-32")
    with pytest.raises(ConfigError, match=r"mine.model: a model that writes captions"):
        parse({**MODEL, "multimodal_cfg": {}})
    with pytest.raises(ConfigError, match=r"mine.model: vision_cfg.image_size = \[32, 16\], expected a square"):
        parse({**MODEL, "vision_cfg": {**MODEL["vision_cfg"], "image_size": [32, 16]}})
    with pytest.raises(ConfigError, match=r"x = RN5O, expected an architecture of open_clip. Did you mean RN50\?"):
        clip_model.check_architecture("RN5O", "x")
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, own=importlib.util.find_spec: None if name == "timm" else own(name),
    )
    with pytest.raises(ConfigError, match=r"x = convnext_base: vision_cfg.timm_model_name = .* needs the package timm"):
        clip_model.check_architecture("convnext_base", "x")
    monkeypatch.undo()
    with pytest.raises(ConfigError, match=r"patch_dropout = 0.5 has no effect, expected an image tower of patches"):
        train(train_set_path, str(tmp_path), recipe(model=RESNET, patch_dropout=0.5), Seeds(0, 0))
    unknown = {**MODEL, "vision_cfg": {**MODEL["vision_cfg"], "patches": 3}}
    with pytest.raises(WinnowError, match=r"expected what open_clip can build: TypeError: .*patches"):
        train(train_set_path, str(tmp_path), recipe(model=unknown), Seeds(0, 0))
    assert storage.list_files(str(tmp_path), recursive=True) == []


def test_model_of_a_json_file(tmp_path):
    """Its content is the recipe's, wherever the file lies: as open_clip's own files, or with a model_cfg in it."""
    values = {"model": MODEL, "global_batch_size": 8, "samples_seen": 16, "lr": 1e-3}
    storage.write_json(str(tmp_path / "mine.json"), MODEL)
    storage.write_json(str(tmp_path / "a" / "open_clip_config.json"), {"model_cfg": MODEL, "preprocess_cfg": {}})
    expected = recipes.parse(values, "x")
    for path in ("mine.json", "a/open_clip_config.json"):
        assert recipes.parse({**values, "model": str(tmp_path / path)}, "x") == expected
    storage.write_json(str(tmp_path / "list.json"), [])
    storage.write_bytes(str(tmp_path / "broken.json"), b"{")
    for name, fault in (
        ("list", "expected a file with a model_cfg, found list"),
        ("broken", "expected a JSON file that can be read"),
        ("none", "expected a JSON file that can be read: FileNotFoundError"),
    ):
        with pytest.raises(ConfigError, match=rf"x.model = {tmp_path}/{name}.json, {fault}"):
            recipes.parse({**values, "model": str(tmp_path / f"{name}.json")}, "x")


def test_batches_above_the_train_set_and_a_last_batch_of_one(tmp_path):
    path = write_train_set(str(tmp_path / "train_set"), 5)
    facts = train(path, str(tmp_path / "checkpoint"), recipe(global_batch_size=12, samples_seen=25), Seeds(0, 0))
    assert (facts["steps"], facts["unique_uids"], facts["max_repeats"]) == (3, 5, 5)
    assert [line["loss"] for line in lines(tmp_path / "checkpoint")][-1] == 0  # of one pair, told from no other


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


def test_numbers_that_are_not_finite_between_two_lines(train_set_path, tmp_path, monkeypatch):
    """End at the next line, and leave no state and no kept model of what they spoilt."""
    monkeypatch.setattr(watch, "line_steps", lambda recipe: {1, 13})
    own = {"num_checkpoints": 4, "lr": 1e30}  # models would be kept after 3, 6 and 9 steps
    with pytest.raises(WinnowError, match=r"open_clip_24: weights after step 3 .*expected numbers: lower lr"):
        train(train_set_path, str(tmp_path / "a"), recipe(**own), Seeds(0, 0))
    with pytest.raises(WinnowError, match=r"loss = nan at step 13 of 13"):
        train(train_set_path, str(tmp_path / "b"), recipe(lr=1e30), Seeds(0, 0), checkpoint_every_steps=1)
    assert not [name for folder in "ab" for name in storage.list_folders(str(tmp_path / folder)) if "open" in name]
    for name in storage.list_folders(str(tmp_path / "b")):
        state = torch.load(tmp_path / "b" / name / "state.pt", weights_only=True)
        assert state["step"] < 3, "a state from after the first loss that was not a number"


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


@pytest.mark.gpu
def test_gpu_computes_what_a_cpu_does(uninterrupted, train_set_path, tmp_path):
    train(train_set_path, str(tmp_path), recipe(), Seeds(0, 0), device="cuda")
    losses = [[line["loss"] for line in lines(folder)] for folder in (tmp_path, uninterrupted[0])]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3)
