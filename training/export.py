"""A trained checkpoint as a folder to upload to the Hugging Face hub: `python training/export.py CHECKPOINT OUT`.

CHECKPOINT is a finished checkpoint's folder or an open_clip folder in it, a local path or a URL. OUT then holds

    README.md                                           the model card: what is known of the training, and what not
    open_clip_config.json, open_clip_model.safetensors  as in the checkpoint, for open_clip's hf-hub: and local-dir:
    config.json, model.safetensors                      transformers.CLIPModel
    preprocessor_config.json                            transformers.CLIPImageProcessor
    vocab.json, merges.txt, tokenizer_config.json       transformers.CLIPTokenizer

The last three lines are written where transformers.CLIPModel can compute the same features: a ViT and CLIP's own text
tower without options that it lacks. The exporter maps names and values itself and does not need transformers.
OUT appears whole or not at all.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import sys
import uuid
from collections.abc import Mapping
from typing import Any

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if __name__ == "__main__":  # our packages are found from the folder above training/, before any of the same name
    sys.path = [ROOT, *(path for path in sys.path if os.path.abspath(path or ".") not in (ROOT, f"{ROOT}/training"))]

from pipeline.core import artifact, storage  # noqa: E402
from pipeline.core.clip_model import CONFIG_FILE, WEIGHTS_FILE, check_architecture  # noqa: E402
from pipeline.core.errors import ConfigError, WinnowError, one_line  # noqa: E402

# Options of an architecture that CLIPModel has too, or that only matter in training. Others must be at their default.
MODEL_OPTIONS = {"embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "init_logit_scale"}
VISION_OPTIONS = {"layers", "width", "head_width", "mlp_ratio", "patch_size", "image_size", "patch_dropout"}
TEXT_OPTIONS = {"layers", "width", "heads", "mlp_ratio", "context_length", "vocab_size"}

# Weights: name in open_clip -> in transformers ("pre_layrnorm" is how it is spelt there). A name of a module stands for
# its weight and bias.
WEIGHTS = {
    "logit_scale": "logit_scale",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.proj": "visual_projection.weight",
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text_projection": "text_projection.weight",
}
MODULES = {
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
    "ln_final": "text_model.final_layer_norm",
}
BLOCK_MODULES = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
TRANSPOSED = {"visual.proj", "text_projection"}  # open_clip multiplies from the left, torch.nn.Linear from the right

BICUBIC, BILINEAR = 3, 2  # PIL's numbers
INITIAL_LOGIT_SCALE = 2.6592  # ln(1 / 0.07); the trained one is in the weights


def main(arguments: list[str] | None = None) -> int:
    """The exit code of one command line."""
    parser = argparse.ArgumentParser(
        prog="training/export.py",
        description="Writes a trained checkpoint as a folder to upload to the Hugging Face hub.",
        allow_abbrev=False,
    )
    parser.add_argument("checkpoint", help="a checkpoint's folder or an open_clip folder in it, a path or a URL")
    parser.add_argument("out", help="the folder to write, which must not exist or be empty")
    options = parser.parse_args(arguments)
    try:
        lacking = export(options.checkpoint, options.out)
    except WinnowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    readers = "open_clip and transformers"
    if lacking is not None:
        readers = f"open_clip alone, as transformers.CLIPModel can't hold {lacking}"
    print(f"{options.out}: a model for {readers}")
    return 0


def export(checkpoint: str, out: str) -> str | None:
    """What CLIPModel can't hold of this model, so that the folder is for open_clip alone; None: it is for both.

    Args:
        checkpoint: a finished checkpoint's artifact folder, or a model folder; a path or a URL.
        out: a local folder that does not exist or is empty.

    Raises:
        ConfigError: no such checkpoint, or `out` is in use.
        WinnowError: an unfinished or damaged checkpoint, a full disk. Nothing is left in `out`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = _free_folder(out)
    model_path, record, ledger = _find_model(checkpoint)
    with storage.local_folder(model_path) as folder:
        source = {name: os.path.join(folder, name) for name in (CONFIG_FILE, WEIGHTS_FILE)}
        model_name = storage.name_of(model_path)
        for name in source if record else ():
            if record["files"][f"{model_name}/{name}"]["sha256"] != storage.sha256_file(source[name]):
                raise WinnowError(f"{model_path}/{name} is not the file that {artifact.RECORD} lists: it was altered")
        config = storage.read_json(source[CONFIG_FILE])
        if not isinstance(config, dict) or not isinstance(config.get("model_cfg"), dict):
            raise WinnowError(f"{model_path}/{CONFIG_FILE}: model_cfg is missing, expected what open_clip writes")
        check_architecture(config["model_cfg"], f"{model_path}/{CONFIG_FILE}: model_cfg")
        try:
            weights = load_file(source[WEIGHTS_FILE])
        except SafetensorError as error:
            raise WinnowError(f"{model_path}/{WEIGHTS_FILE} can't be read: {one_line(error)}") from error
        lacking = not_in_transformers(config, weights)
        temporary = f"{path}{storage.TEMPORARY_MARK}{uuid.uuid4().hex[:8]}"
        try:
            os.makedirs(temporary)
            for name, file_path in source.items():
                shutil.copyfile(file_path, os.path.join(temporary, name))
            files = transformers_files(config, weights) if lacking is None else {}
            card = model_card(config, model_name, record, ledger, for_transformers=lacking is None)
            for name, data in {**files, "README.md": card.encode()}.items():
                storage.write_bytes(os.path.join(temporary, name), data)
            os.rename(temporary, path)  # replaces an empty folder, and no other
        except OSError as error:
            raise WinnowError(f"{out} can't be written: {one_line(error)}") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return lacking


def _free_folder(out: str) -> str:
    if storage.is_url(out):
        raise ConfigError(f"out = {out}, expected a local folder")
    path = os.path.realpath(os.path.expanduser(out))
    if os.path.exists(path) and not (os.path.isdir(path) and not os.listdir(path)):
        raise ConfigError(f"out = {out}, expected a folder that does not exist or is empty")
    return path


def _find_model(checkpoint: str) -> tuple[str, dict[str, Any] | None, dict[str, Any] | None]:
    """(model folder, the checkpoint's record, its ledger.json); None for records that did not come along."""
    from training.ledger import LEDGER_FILE
    from training.loop import MODEL_FOLDER

    path = storage.absolute(checkpoint)
    try:
        is_model = storage.exists(storage.join(path, CONFIG_FILE))
        model_path = path if is_model else storage.join(path, MODEL_FOLDER)
        whole = all(storage.exists(storage.join(model_path, name)) for name in (CONFIG_FILE, WEIGHTS_FILE))
        artifact_path = model_path.rsplit("/", 1)[0]
        record = artifact.read_record(artifact_path)
        ledger_path = storage.join(artifact_path, LEDGER_FILE)
        ledger = storage.read_json(ledger_path) if storage.exists(ledger_path) else None
    except WinnowError:
        raise
    except Exception as error:  # every store has its own error classes; all mean the same to the user
        raise ConfigError(
            f"checkpoint = {checkpoint}, expected a folder that can be read: {one_line(error)}"
        ) from error
    if not whole:
        raise ConfigError(
            f"checkpoint = {checkpoint}, expected the folder of a finished checkpoint, or an {MODEL_FOLDER} folder"
            f" with {CONFIG_FILE} and {WEIGHTS_FILE}"
        )
    names = [f"{storage.name_of(model_path)}/{name}" for name in (CONFIG_FILE, WEIGHTS_FILE)]
    if record is not None and record["kind"] == "checkpoint" and all(name in record["files"] for name in names):
        return model_path, record, ledger
    if not is_model:
        raise WinnowError(f"{checkpoint}: {artifact.RECORD} is missing, expected a finished checkpoint")
    return model_path, None, None


def not_in_transformers(config: Mapping[str, Any], weights: Mapping[str, Any]) -> str | None:
    """The first thing in which the model is no plain CLIP, such as `text_cfg.no_causal_mask = True`; None if it is one.

    Args:
        config: open_clip_config.json.
        weights: by name.

    Raises:
        WinnowError: the weights are not of this model.
    """
    from open_clip.model import CLIPTextCfg, CLIPVisionCfg
    from open_clip.tokenizer import SimpleTokenizer

    model, vision, text = config["model_cfg"], _vision(config), _text(config)
    unusual = [f"{key} = {value}" for key, value in model.items() if key not in MODEL_OPTIONS and value]
    for place, defaults, carried in (
        ("vision_cfg", CLIPVisionCfg(), VISION_OPTIONS),
        ("text_cfg", CLIPTextCfg(), TEXT_OPTIONS),
    ):
        known = dataclasses.asdict(defaults)
        rest = {key: value for key, value in model[place].items() if key not in carried}
        unusual += [f"{place}.{key} = {value}" for key, value in rest.items() if value != known.get(key)]
    for key in ("layers", "image_size", "patch_size"):  # the parts of a ResNet, or oblong
        if not isinstance(vision[key], int):
            unusual.append(f"vision_cfg.{key} = {vision[key]}")
    if text["vocab_size"] != SimpleTokenizer().vocab_size:
        unusual.append(f"text_cfg.vocab_size = {text['vocab_size']}")
    resize_mode = _preprocess(config)["resize_mode"]
    if resize_mode not in ("shortest", "squash"):
        unusual.append(f"preprocess_cfg.resize_mode = {resize_mode}")
    if not unusual:
        expected = set(renamed_weights(vision["layers"], text["layers"]))
        if missing := sorted(expected - set(weights)):
            raise WinnowError(f"{WEIGHTS_FILE}: {missing[0]} is missing, expected the weights of the model's config")
        unusual = [f"the weight {name}" for name in sorted(set(weights) - expected)]
        if weights["logit_scale"].ndim:
            unusual.append("a logit_scale that is no scalar")
    return " ".join(unusual[0].split()) if unusual else None


def _vision(config: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip.model import CLIPVisionCfg

    return {**dataclasses.asdict(CLIPVisionCfg()), **config["model_cfg"]["vision_cfg"]}


def _text(config: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip.model import CLIPTextCfg

    return {**dataclasses.asdict(CLIPTextCfg()), **config["model_cfg"]["text_cfg"]}


def _preprocess(config: Mapping[str, Any]) -> dict[str, Any]:
    from open_clip.transform import PreprocessCfg

    return {**dataclasses.asdict(PreprocessCfg()), **(config.get("preprocess_cfg") or {})}


def renamed_weights(num_vision_layers: int, num_text_layers: int) -> dict[str, list[str]]:
    """{name in open_clip: names in transformers} of a plain CLIP's weights; three names: queries, keys, values."""
    modules = dict(MODULES)
    renamed = {name: [new] for name, new in WEIGHTS.items()}
    towers = (("visual.", "vision_model", num_vision_layers), ("", "text_model", num_text_layers))
    for prefix, new_prefix, num_layers in towers:
        for layer in range(num_layers):
            block = f"{prefix}transformer.resblocks.{layer}"
            new_block = f"{new_prefix}.encoder.layers.{layer}"
            modules |= {f"{block}.{name}": f"{new_block}.{new}" for name, new in BLOCK_MODULES.items()}
            for part in ("weight", "bias"):
                renamed[f"{block}.attn.in_proj_{part}"] = [
                    f"{new_block}.self_attn.{letter}_proj.{part}" for letter in "qkv"
                ]
    for name, new in modules.items():
        renamed |= {f"{name}.{part}": [f"{new}.{part}"] for part in ("weight", "bias")}
    return renamed


def transformers_files(config: Mapping[str, Any], weights: Mapping[str, Any]) -> dict[str, bytes]:
    """{file name: content} of a transformers.CLIPModel, its image processor and its tokenizer, for a plain CLIP."""
    from safetensors.torch import save as to_bytes

    state = {}
    for name, new_names in renamed_weights(_vision(config)["layers"], _text(config)["layers"]).items():
        tensor = weights[name].T if name in TRANSPOSED else weights[name]
        parts = [part.clone() for part in tensor.chunk(3)] if len(new_names) == 3 else [tensor.contiguous()]
        state |= dict(zip(new_names, parts, strict=True))
    jsons = {
        "config.json": transformers_config(config),
        "preprocessor_config.json": image_processor_config(config),
        "tokenizer_config.json": tokenizer_config(_text(config)["context_length"]),
    }
    texts = {name: json.dumps(value, indent=1, ensure_ascii=False) + "\n" for name, value in jsons.items()}
    texts |= vocabulary_files()
    files = {name: text.encode() for name, text in texts.items()}
    return {**files, "model.safetensors": to_bytes(state, metadata={"format": "pt"})}


def transformers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config.json of transformers.CLIPModel for a plain CLIP's open_clip_config.json."""
    from open_clip.tokenizer import SimpleTokenizer

    model, vision, text, tokenizer = config["model_cfg"], _vision(config), _text(config), SimpleTokenizer()
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"

    def tower(options: Mapping[str, Any], num_heads: int) -> dict[str, Any]:
        return {
            "hidden_size": options["width"],
            "intermediate_size": int(options["width"] * options["mlp_ratio"]),
            "num_hidden_layers": options["layers"],
            "num_attention_heads": num_heads,
            "hidden_act": activation,
            "layer_norm_eps": 1e-5,
            "projection_dim": model["embed_dim"],
        }

    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": model["embed_dim"],
        "logit_scale_init_value": INITIAL_LOGIT_SCALE,
        "text_config": {
            **tower(text, text["heads"]),
            "model_type": "clip_text_model",
            "vocab_size": text["vocab_size"],
            "max_position_embeddings": text["context_length"],
            "bos_token_id": tokenizer.sot_token_id,
            # Its feature is taken at the first such token; open_clip takes the largest id, which is the same one.
            "eos_token_id": tokenizer.eot_token_id,
            "pad_token_id": tokenizer.eot_token_id,
        },
        "vision_config": {
            **tower(vision, vision["width"] // vision["head_width"]),
            "model_type": "clip_vision_model",
            "num_channels": 3,
            "image_size": vision["image_size"],
            "patch_size": vision["patch_size"],
        },
    }


def image_processor_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The preprocessor_config.json of transformers.CLIPImageProcessor that does what open_clip's preprocessing does."""
    preprocess, side_px = _preprocess(config), _vision(config)["image_size"]
    square = {"height": side_px, "width": side_px}
    is_squash = preprocess["resize_mode"] == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "processor_class": "CLIPProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": square if is_squash else {"shortest_edge": side_px},
        "resample": BILINEAR if preprocess["interpolation"] == "bilinear" else BICUBIC,
        "do_center_crop": not is_squash,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(preprocess["mean"]),
        "image_std": list(preprocess["std"]),
    }


def tokenizer_config(context_length: int) -> dict[str, Any]:
    """The tokenizer_config.json of transformers.CLIPTokenizer that splits captions as open_clip's own tokenizer does.

    The two special tokens keep open_clip's names, so that a caption which spells one out gives the same tokens too.
    Padding is with the end-of-text token, as in CLIP's published tokenizers: the text tower is causal and pools at the
    first of them, so what follows has no influence.
    """
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    start, end = (tokenizer.decoder[number] for number in (tokenizer.sot_token_id, tokenizer.eot_token_id))
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False, "special": True}
    return {
        "tokenizer_class": "CLIPTokenizer",
        "processor_class": "CLIPProcessor",
        "model_max_length": context_length,
        "bos_token": start,
        "eos_token": end,
        "pad_token": end,
        "unk_token": end,
        "do_lower_case": True,
        "errors": "replace",
        "clean_up_tokenization_spaces": False,
        "added_tokens_decoder": {str(tokenizer.encoder[token]): {"content": token, **flags} for token in (start, end)},
    }


def vocabulary_files() -> dict[str, str]:
    """{file name: text} of vocab.json and merges.txt, from the byte pair encoding that open_clip bundles."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer = SimpleTokenizer()
    merges = ["#version: 0.2", *(" ".join(pair) for pair in tokenizer.bpe_ranks)]
    return {
        "vocab.json": json.dumps(tokenizer.encoder, ensure_ascii=False),
        "merges.txt": "\n".join(merges) + "\n",
    }


CARD_HEAD = """---
library_name: open_clip
pipeline_tag: zero-shot-image-classification
tags:
- clip
- winnow
{tags}---

# CLIP trained with winnow

## Use

`NAME` is this repository's `owner/name`. For a local folder, write `local-dir:` in place of `hf-hub:`.

```python
import open_clip

model, _, preprocess = open_clip.create_model_and_transforms("hf-hub:NAME")
tokenizer = open_clip.get_tokenizer("hf-hub:NAME")
```
"""

USE_TRANSFORMERS = """
```python
from transformers import CLIPModel, CLIPProcessor

model, processor = CLIPModel.from_pretrained("NAME"), CLIPProcessor.from_pretrained("NAME")
values = processor(text=captions, images=images, padding="max_length", truncation=True, return_tensors="pt")
features = model(**values)
```

Both give the same features for the same tokens and pixels; this `model` also takes what open_clip's `tokenizer` and
`preprocess` make (`input_ids`, `pixel_values`). On RGB images, transformers' processor differs from these in this:

- open_clip first repairs captions with ftfy and resolves HTML entities: curly quotes, ligatures, `&amp;`;
- where 3, 7, 11, ... pixels are cropped from the resized image, its crop lies one pixel beside open_clip's;
- from version 5 on it rounds resized pixels differently, by up to 1 of 255 (`CLIPImageProcessorPil` does not).
"""

FACTS = {  # in the checkpoint's record: what the card calls it
    "samples_seen": "samples seen",
    "steps": "optimizer steps",
    "num_samples": "entries of the train set",
    "unique_uids": "distinct pairs seen",
    "max_repeats": "times that the most frequent pair was seen",
    "final_loss": "loss, mean of the last tenth of the lines",
    "num_parameters": "parameters",
}
OF_THE_TRAINING = {"num_samples", "num_parameters"}  # the same for a model that was kept before the end


def model_card(
    config: Mapping[str, Any],
    model_name: str,
    record: Mapping[str, Any] | None,
    ledger: Mapping[str, Any] | None,
    for_transformers: bool,
) -> str:
    """The README.md of the hub: front matter, what the checkpoint's records say, and what they do not.

    Text that comes from a config is only in JSON blocks, no line of which can end the block.

    Args:
        model_name: the model folder's; `open_clip_3200` is the model after 3,200 samples.
        record, ledger: _artifact.json and ledger.json; None when the folder came without them.
    """
    facts, seeds = dict(record["facts"]) if record else {}, record["identity"].get("seeds", {}) if record else {}
    rows = [("checkpoint", f"checkpoint-{record['fingerprint']}" if record else "unknown")]
    kept_at = model_name.rpartition("_")[2]
    if record and kept_at.isdigit():
        rows.append(("samples seen by the whole training", _number(facts.get("samples_seen"))))
        facts = {name: value for name, value in facts.items() if name in OF_THE_TRAINING}
        facts["samples_seen"] = int(kept_at)
    rows += [(title, _number(facts.get(name))) for name, title in FACTS.items()]
    rows += [(f"seed of the {name}", _number(seeds.get(name))) for name in seeds or ("initialisation", "order")]
    parts = [CARD_HEAD.format(tags="- transformers\n" if for_transformers else "")]
    if for_transformers:
        parts.append(USE_TRANSFORMERS)
    parts.append("\n## Training\n\n| | |\n|---|---|\n" + "".join(f"| {title} | {value} |\n" for title, value in rows))
    if record:
        parts += ["\nThe recipe and all else that the checkpoint's fingerprint is computed from:\n"]
        parts += [_json_block(record["identity"])]
    if ledger:
        parts += ["\nThe order in which the entries were seen follows from its ledger:\n", _json_block(ledger)]
    parts += ["\nThe model and its preprocessing, in open_clip's terms:\n", _json_block(config)]
    parts.append("\n## Unknown\n\nThe files that this card was made from do not say:\n\n")
    if not record:
        parts.append("- how the model was trained: the folder came without its checkpoint's records;\n")
    parts.append("- what the pairs were, how they were chosen, and in which languages;\n")
    parts.append("- how the model scores on any task;\n- its licence: add `license:` above before you publish it.\n")
    return "".join(parts)


def _number(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "unknown"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _json_block(value: Any) -> str:
    return f"\n```json\n{json.dumps(value, indent=1, sort_keys=True)}\n```\n"


if __name__ == "__main__":
    sys.exit(main())
