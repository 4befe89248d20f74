"""The export: the same features from open_clip and from transformers, the model card, and what ends it with one line."""

from __future__ import annotations

import json
import os
import pathlib
import re
import resource
import shutil
import subprocess
import sys

import huggingface_hub.constants
import numpy as np
import open_clip
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from open_clip.tokenizer import basic_clean
from PIL import Image
from safetensors.torch import load_file, save_file

from pipeline.core import artifact, clip_model, storage
from pipeline.core.errors import WinnowError
from tests.conftest import ROOT
from tests.training_fixture import recipe, write_train_set
from training.export import export, main
from training.loop import train
from training.recipe import Seeds

MODEL = {  # no two sizes are equal where they could be swapped
    "embed_dim": 24,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 48, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 20, "width": 32, "heads": 4, "layers": 3},
}
OPEN_CLIP_FILES = ["README.md", "open_clip_config.json", "open_clip_model.safetensors"]
TRANSFORMERS_FILES = [
    *("config.json", "merges.txt", "model.safetensors", "preprocessor_config.json"),
    *("tokenizer_config.json", "vocab.json"),
]
CAPTIONS = [
    "a photo of a cat",
    "A Photo of TWO Dogs, running!! (in the park) don't it's",
    "",
    "naïve café, e\u0301 combined, 日本語 のテキスト 😀😀 İstanbul ΑΣ ß",
    "longer than the context, " * 20,
    "tabs\tand\nlines   a''s b'S !!'s '''  1234567 abc123 x_y/z",
    "<end_of_text> first, <start_of_text> then <END_OF_TEXT>",
    "<|endoftext|> of others <|startoftext|>",
    "“quoted” ‘so’ &amp; &lt;b&gt; ﬁne ＷＩＤＥ",
]
SIZES = [(32, 32), (64, 64), (40, 32), (32, 33), (20, 20), (333, 517), (300, 280), (100, 104)]  # no crop of 4 n + 3


def write_model(folder, architecture=MODEL, preprocess=()) -> str:
    """The model folder, with weights so far from their start that each matters."""
    torch.manual_seed(1)
    model = clip_model.build(architecture).model
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    clip_model.save(model, architecture, str(folder))
    edit_json(folder / "open_clip_config.json", preprocess_cfg=dict(preprocess))
    return str(folder)


def edit_json(path, **changes) -> None:
    values = json.loads(path.read_text())
    for name, change in changes.items():
        values[name] |= change
    path.write_text(json.dumps(values))


def photos(sizes) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    coarse = (rng.integers(0, 256, (high // 4 + 2, wide // 4 + 2, 3), dtype=np.uint8) for wide, high in sizes)
    return [
        Image.fromarray(rows).resize(size, Image.Resampling.BICUBIC) for rows, size in zip(coarse, sizes, strict=True)
    ]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("source") / "open_clip")


@pytest.fixture(scope="module")
def exported(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "hub"
    assert export(model, str(out)) is None
    return out


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The finished artifact of a training that kept its model once before the end, as the pipeline makes it."""
    root = tmp_path_factory.mktemp("root")
    train_set = write_train_set(str(root / "train_set"), 50)
    own, seeds = recipe(num_checkpoints=2), Seeds(3, 7)
    identity = {
        "version": 1,
        "recipe": own.identity(),
        "seeds": seeds.to_json(),
        "ledger": 1,
        "inputs": {"train_set": "x"},
    }
    made = artifact.Artifact(str(root), "checkpoint", identity)
    facts = train(train_set, made.path, own, seeds)
    artifact.finish(made, facts, ["metrics.jsonl"])
    return pathlib.Path(made.path)


@pytest.mark.parametrize(
    "own, preprocess",
    [
        ({}, {}),
        ({"quick_gelu": True}, {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.5], "interpolation": "bilinear"}),
        ({"text_cfg": {**MODEL["text_cfg"], "mlp_ratio": 2.5}}, {"resize_mode": "squash"}),
    ],
    ids=["plain", "quick_gelu", "squash"],
)
def test_transformers_computes_our_features(tmp_path, own, preprocess):
    source, out = write_model(tmp_path / "source", {**MODEL, **own}, preprocess), str(tmp_path / "out")
    assert export(source, out) is None
    assert sorted(os.listdir(out)) == sorted(OPEN_CLIP_FILES + TRANSFORMERS_FILES)
    clip = clip_model.load({"folder": source})
    images = photos(SIZES)
    pixels = torch.stack([clip.preprocess(image) for image in images])
    captions = [basic_clean(caption) for caption in CAPTIONS]

    model, loading = transformers.CLIPModel.from_pretrained(out, output_loading_info=True)
    assert not any(loading.values()), loading
    processor = transformers.CLIPProcessor.from_pretrained(out)
    processor.image_processor = transformers.CLIPImageProcessorPil.from_pretrained(out)
    values = processor(text=captions, images=images, padding="max_length", truncation=True, return_tensors="pt")
    assert values["input_ids"].shape == (len(captions), 20)
    torch.testing.assert_close(values["pixel_values"], pixels, rtol=0, atol=1e-5)
    with torch.no_grad():
        theirs = model(**values)
        tokens = clip.tokenizer(captions)
        image_BD, text_BD = (
            clip.model.encode_image(pixels, normalize=True),
            clip.model.encode_text(tokens, normalize=True),
        )
        logits = clip.model.get_logits(pixels, tokens)[0]
        shorter = model(**processor(text=captions, images=images, padding=True, truncation=True, return_tensors="pt"))
        zero_padded = model(input_ids=tokens, pixel_values=pixels)
    assert (image_BD[0] - image_BD[1]).abs().max() > 1e-2 and (text_BD[0] - text_BD[1]).abs().max() > 1e-2
    torch.testing.assert_close(theirs.image_embeds, image_BD, rtol=0, atol=1e-5)
    for output in (theirs, shorter, zero_padded):
        torch.testing.assert_close(output.text_embeds, text_BD, rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.logits_per_image, logits, rtol=0, atol=1e-4)


def test_the_default_image_processor_rounds_by_at_most_one_of_255(exported):
    preprocess = clip_model.load({"folder": str(exported)}).preprocess
    processor = transformers.AutoProcessor.from_pretrained(str(exported)).image_processor
    std = torch.tensor(processor.image_std).view(3, 1, 1)
    for image in photos(SIZES):
        theirs = processor(images=image, return_tensors="pt")["pixel_values"][0]
        levels = ((theirs - preprocess(image)) * std * 255).abs()
        assert levels.max() < 1.01
        assert levels.mean() < 0.02


def assert_same_tokens(captions, folder):
    """Equal but for the padding, which is 0 here and the end-of-text token there."""
    mine, end = open_clip.get_tokenizer(f"local-dir:{folder}"), 49407
    theirs = transformers.CLIPTokenizer.from_pretrained(str(folder))
    texts = [basic_clean(caption) for caption in captions]
    ids = theirs(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    tokens = mine(captions)
    assert ids.shape == tokens.shape
    for caption, row, own in zip(captions, ids.tolist(), tokens.tolist(), strict=True):
        length = len(own) - own[::-1].index(end)
        assert row == own[:length] + [end] * (len(own) - length), caption


def test_transformers_splits_captions_as_open_clip_does(exported):
    assert_same_tokens(CAPTIONS, exported)


@pytest.mark.real_data
def test_transformers_splits_real_captions_as_open_clip_does(exported, real_data_path):
    for path in sorted(real_data_path.glob("captions_pool/*/val/*.parquet")) + [
        *real_data_path.glob("captions_pool/openstax/train/00000.parquet")
    ]:
        assert_same_tokens(pq.read_table(path, columns=["text"])["text"].to_pylist()[:500], exported)


def test_open_clip_opens_it_from_the_hub(exported, model, tmp_path, monkeypatch):
    """`hf-hub:` reads a cache that holds what an upload of the folder would; the network is not asked."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    stored = tmp_path / "models--owner--name"
    shutil.copytree(exported, stored / "snapshots" / ("0" * 40))
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("0" * 40)
    opened, _, preprocess = open_clip.create_model_and_transforms("hf-hub:owner/name", cache_dir=str(tmp_path))
    tokenizer = open_clip.get_tokenizer("hf-hub:owner/name", cache_dir=str(tmp_path))
    clip = clip_model.load({"folder": model})
    assert all(torch.equal(value, opened.state_dict()[name]) for name, value in clip.model.state_dict().items())
    assert torch.equal(tokenizer(CAPTIONS), clip.tokenizer(CAPTIONS))
    assert torch.equal(preprocess(photos([(50, 40)])[0]), clip.preprocess(photos([(50, 40)])[0]))


def rows_of(card: str) -> dict[str, str]:
    return dict(re.findall(r"^\| (\S.*?) \| (.*?) \|$", card, re.MULTILINE))


def test_the_command_line_from_elsewhere(checkpoint, tmp_path):
    command = [sys.executable, str(ROOT / "training" / "export.py"), str(checkpoint), "hub"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "hub: a model for open_clip and transformers\n"
    assert os.listdir(tmp_path) == ["hub"]
    card = (tmp_path / "hub" / "README.md").read_text()
    head = card.split("---\n")[1].splitlines()
    assert head[:2] == ["library_name: open_clip", "pipeline_tag: zero-shot-image-classification"]
    assert head[2:] == ["tags:", "- clip", "- winnow", "- transformers"]
    rows, facts = rows_of(card), artifact.read_record(str(checkpoint))["facts"]
    assert rows["checkpoint"] == checkpoint.name
    assert (rows["samples seen"], rows["entries of the train set"], rows["optimizer steps"]) == ("100", "50", "13")
    assert (rows["distinct pairs seen"], rows["times that the most frequent pair was seen"]) == ("50", "2")
    assert (rows["seed of the initialisation"], rows["seed of the order"]) == ("3", "7")
    assert rows["loss, mean of the last tenth of the lines"] == f"{facts['final_loss']:.4g}"
    assert "unknown" not in rows.values()
    assert '"lr": 0.001' in card and '"index_sha256"' in card
    assert "its checkpoint's records" not in card and "which languages" in card and "licence" in card


def test_a_model_that_was_kept_before_the_end_has_its_own_facts(checkpoint, tmp_path):
    (kept,) = (name for name in os.listdir(checkpoint) if name.startswith("open_clip_"))
    assert export(str(checkpoint / kept), str(tmp_path / "hub")) is None
    rows = rows_of((tmp_path / "hub" / "README.md").read_text())
    assert (rows["samples seen"], rows["samples seen by the whole training"]) == (kept.rpartition("_")[2], "100")
    assert rows["checkpoint"] == checkpoint.name
    assert rows["loss, mean of the last tenth of the lines"] == rows["distinct pairs seen"] == "unknown"


def test_what_is_unknown_of_a_bare_model_folder_is_said(exported):
    card = (exported / "README.md").read_text()
    assert set(rows_of(card).values()) == {"unknown"}
    assert "the folder came without its checkpoint's records" in card


def test_text_of_a_config_cannot_leave_its_block(checkpoint, tmp_path):
    copy = tmp_path / checkpoint.name
    shutil.copytree(checkpoint, copy)
    spoiled = "x\n```\n# [click](http://example.com)\n---\n"
    edit_json(copy / "_artifact.json", identity={"recipe": {"model": spoiled, "```": spoiled}})
    export(str(copy), str(tmp_path / "hub"))
    card = (tmp_path / "hub" / "README.md").read_text()
    assert "click" in card
    assert not [line for line in card.splitlines() if line.startswith("# [")]
    blocks = re.split(r"^```.*\n", card, flags=re.MULTILINE)
    assert sum("click" in block for block in blocks) == 1
    assert json.loads(next(block for block in blocks if "click" in block))["recipe"]["model"] == spoiled


@pytest.mark.parametrize(
    "part, change, lacking",
    [
        ("text_cfg", {"no_causal_mask": True}, "text_cfg.no_causal_mask = True"),
        ("vision_cfg", {"no_ln_pre": True}, "vision_cfg.no_ln_pre = True"),
        ("vision_cfg", {"layers": [3, 4, 6, 3]}, "vision_cfg.layers = [3, 4, 6, 3]"),
        ("vision_cfg", {"image_size": [32, 64]}, "vision_cfg.image_size = [32, 64]"),
        ("vision_cfg", {"timm_model_name": "vit_tiny"}, "vision_cfg.timm_model_name = vit_tiny"),
        ("text_cfg", {"hf_tokenizer_name": "owner/name"}, "text_cfg.hf_tokenizer_name = owner/name"),
        ("text_cfg", {"vocab_size": 32000}, "text_cfg.vocab_size = 32000"),
        (None, {"custom_text": True}, "custom_text = True"),
        ("preprocess_cfg", {"resize_mode": "longest"}, "preprocess_cfg.resize_mode = longest"),
    ],
)
def test_what_transformers_lacks_is_exported_for_open_clip_alone(model, tmp_path, capsys, part, change, lacking):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(model, source)
    path = source / "open_clip_config.json"
    config = json.loads(path.read_text())
    values = config if part == "preprocess_cfg" else config["model_cfg"]
    (values[part] if part else values).update(change)
    path.write_text(json.dumps(config))
    assert main([str(source), str(out)]) == 0
    printed = capsys.readouterr().out
    assert printed == f"{out}: a model for open_clip alone, as transformers.CLIPModel can't hold {lacking}\n"
    assert sorted(os.listdir(out)) == sorted(OPEN_CLIP_FILES)
    assert "transformers" not in (out / "README.md").read_text()


def test_a_siglip_model_is_for_open_clip_alone(tmp_path):
    source = write_model(tmp_path / "source", {**MODEL, "init_logit_bias": -10.0})
    assert export(source, str(tmp_path / "out")) == "init_logit_bias = -10.0"
    opened = clip_model.load({"folder": str(tmp_path / "out")}).model
    assert torch.equal(opened.logit_bias, clip_model.load({"folder": source}).model.logit_bias)


def test_weights_that_transformers_lacks_are_noticed(model, tmp_path):
    shutil.copytree(model, tmp_path / "source")
    path = tmp_path / "source" / "open_clip_model.safetensors"
    save_file({**load_file(path), "logit_bias": torch.zeros(())}, path)
    assert export(str(tmp_path / "source"), str(tmp_path / "out")) == "the weight logit_bias"


def test_an_empty_folder_is_filled_and_an_object_store_is_read(exported, model, tmp_path, s3_url):
    for name in ("open_clip_config.json", "open_clip_model.safetensors"):
        storage.write_bytes(f"{s3_url}/a/open_clip/{name}", (pathlib.Path(model) / name).read_bytes())
    (tmp_path / "out").mkdir()
    assert main([f"{s3_url}/a/open_clip", str(tmp_path / "out")]) == 0
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(exported))
    for name in os.listdir(exported):
        assert (tmp_path / "out" / name).read_bytes() == (exported / name).read_bytes(), name


def no_checkpoint(source, out):
    shutil.rmtree(source / "open_clip")


def unfinished(source, out):
    (source / "_artifact.json").unlink()


def altered(source, out):
    path = source / "open_clip" / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"x")


def truncated(source, out):
    unfinished(source, out)
    path = source / "open_clip" / "open_clip_model.safetensors"
    path.write_bytes(path.read_bytes()[:1000])


def no_text_tower(source, out):
    unfinished(source, out)
    path = source / "open_clip" / "open_clip_config.json"
    config = json.loads(path.read_text())
    del config["model_cfg"]["text_cfg"]
    path.write_text(json.dumps(config))


def missing_weight(source, out):
    unfinished(source, out)
    path = source / "open_clip" / "open_clip_model.safetensors"
    save_file({name: value for name, value in load_file(path).items() if name != "ln_final.bias"}, path)


def out_in_use(source, out):
    out.mkdir()
    (out / "mine").write_text("mine")


def out_is_a_file(source, out):
    out.write_text("mine")


@pytest.mark.parametrize(
    "spoil, given, code, message",
    [
        (no_checkpoint, ".", 2, "expected the folder of a finished checkpoint, or an open_clip folder"),
        (unfinished, ".", 1, "_artifact.json is missing, expected a finished checkpoint"),
        (altered, ".", 1, "open_clip_model.safetensors is not the file that _artifact.json lists"),
        (altered, "open_clip", 1, "open_clip_model.safetensors is not the file that _artifact.json lists"),
        (truncated, "open_clip", 1, "open_clip_model.safetensors can't be read"),
        (no_text_tower, "open_clip", 2, "model_cfg.text_cfg is missing"),
        (missing_weight, "open_clip", 1, "ln_final.bias is missing"),
        (out_in_use, ".", 2, "expected a folder that does not exist or is empty"),
        (out_is_a_file, ".", 2, "expected a folder that does not exist or is empty"),
    ],
)
def test_what_cannot_be_exported_is_one_line_and_leaves_nothing(
    checkpoint, tmp_path, capsys, spoil, given, code, message
):
    source, out = tmp_path / "source", tmp_path / "out"
    shutil.copytree(checkpoint, source)
    spoil(source, out)
    before = sorted(tmp_path.rglob("*"))
    assert main([str(source / given), str(out)]) == code
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert message in error
    assert sorted(tmp_path.rglob("*")) == before


def test_an_object_store_is_no_place_to_write(checkpoint, capsys):
    assert main([str(checkpoint), "s3://bucket/out"]) == 2
    assert "out = s3://bucket/out, expected a local folder" in capsys.readouterr().err


def test_a_full_disk_leaves_nothing(checkpoint, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))  # writing more fails, as on a full disk
    try:
        with pytest.raises(WinnowError, match="out can't be written: OSError"):
            export(str(checkpoint), str(tmp_path / "out"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path) == []
