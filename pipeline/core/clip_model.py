"""open_clip models: building, loading, saving, and encoding text without padding.

An **architecture** is a name of open_clip's (`ViT-B-32`) or a model_cfg mapping, as in open_clip_config.json:

    {embed_dim: 64, vision_cfg: {image_size: 24, patch_size: 8, width: 96, layers: 3, head_width: 32},
     text_cfg: {context_length: 12, width: 64, heads: 2, layers: 1}}

A **model folder** is what open_clip's `local-dir:` schema reads: open_clip_config.json (model and preprocessing) and
open_clip_model.safetensors. Only this module knows how open_clip loads things; torch is imported inside functions.
Shapes: B batch, T tokens, D embedding width.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.core import storage
from pipeline.core.errors import ConfigError, WinnowError, one_line, suggestion

CONFIG_FILE = "open_clip_config.json"
WEIGHTS_FILE = "open_clip_model.safetensors"
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pth")  # where open_clip looks for weights in a folder
TEXT_GROUPS = 4  # captions of a batch are encoded in this many groups of like length, to spare padding

Architecture = str | Mapping[str, Any]


@dataclass(frozen=True)
class Clip:
    """A model with what belongs to it: `preprocess` (PIL image -> [3, H, W] float32) and `tokenizer`."""

    model: Any
    preprocess: Any
    tokenizer: Any
    device: str


def check_architecture(architecture: Architecture, place: str) -> None:
    """None. Raises ConfigError when open_clip can't build such an architecture here. Imports no torch."""
    if isinstance(architecture, str):
        known = _known_architectures()
        if architecture in known:
            _check_packages(storage.read_json(known[architecture]), f"{place} = {architecture}")
        elif not architecture.startswith("hf-hub:"):
            hint = suggestion(architecture, known)
            raise ConfigError(f"{place} = {architecture}, expected an architecture of open_clip.{hint}")
        return
    for part, kind in (("embed_dim", int), ("vision_cfg", Mapping), ("text_cfg", Mapping)):
        if part not in architecture:
            raise ConfigError(
                f"{place}.{part} is missing, expected a model_cfg with embed_dim, vision_cfg and text_cfg"
            )
        if not isinstance(architecture[part], kind):
            what = "a whole number" if kind is int else "a mapping"
            raise ConfigError(f"{place}.{part} = {architecture[part]}, expected {what}")
    _check_packages(architecture, place)


def check_trainable(architecture: Architecture, image_size_px: int | None, place: str) -> None:
    """None. Raises ConfigError for more than two towers, or images that are no squares of whole patches."""
    config = known_config(architecture)
    if isinstance(architecture, str):
        place = f"{place} = {architecture}"
    if "multimodal_cfg" in config:
        raise ConfigError(f"{place}: a model that writes captions (multimodal_cfg), expected an image and a text tower")
    vision = config.get("vision_cfg")
    if not isinstance(vision, Mapping):
        return
    size, patch = image_size_px or vision.get("image_size"), vision.get("patch_size")
    if isinstance(size, Sequence) and len(set(size)) > 1:
        raise ConfigError(f"{place}: vision_cfg.image_size = {list(size)}, expected a square")
    if isinstance(size, int) and isinstance(patch, int) and size % patch:
        raise ConfigError(f"{place}: images of {size} px, expected a multiple of its patches of {patch} px")


def known_config(architecture: Architecture) -> Mapping[str, Any]:
    """The model_cfg of an architecture as far as it is known without a network and without torch; else empty."""
    if not isinstance(architecture, str):
        return architecture
    known = _known_architectures()
    return storage.read_json(known[architecture]) if architecture in known else {}


def _check_packages(config: Mapping[str, Any], place: str) -> None:
    for part, keys, package in (
        ("vision_cfg", ("timm_model_name",), "timm"),
        ("text_cfg", ("hf_model_name", "hf_tokenizer_name"), "transformers"),
    ):
        found = next((key for key in keys if config[part].get(key)), None)
        if found and importlib.util.find_spec(package) is None:
            raise ConfigError(
                f"{place}: {part}.{found} = {config[part][found]}, which needs the package {package}, expected it here"
            )


def _known_architectures() -> dict[str, str]:
    """{open_clip's own names: their files}, as importing it takes seconds."""
    spec = importlib.util.find_spec("open_clip")
    folders = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    found = {}
    for folder in (os.path.join(folder, "model_configs") for folder in folders):
        for name in storage.list_files(folder):
            if name.endswith(".json"):
                found[name.removesuffix(".json")] = os.path.join(folder, name)
    return found


def check_tag(architecture: Architecture, pretrained: str, place: str) -> None:
    """None. Raises ConfigError when open_clip has no published weights of this tag for the architecture."""
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(architecture) if isinstance(architecture, str) else []
    if pretrained not in tags and not str(architecture).startswith("hf-hub:"):
        hint = suggestion(pretrained, tags)
        raise ConfigError(f"{place} = {pretrained}, expected a weights file that exists or a tag of open_clip.{hint}")


def model_config(architecture: Architecture) -> dict[str, Any]:
    """The model_cfg mapping of an architecture given by name or as a mapping."""
    if not isinstance(architecture, str):
        return json.loads(json.dumps(architecture))
    import open_clip

    config = open_clip.get_model_config(architecture)
    if config is None:
        raise WinnowError(f"architecture = {architecture}, expected one of open_clip's")
    return config


def build(architecture: Architecture, image_size_px: int | None = None, **options: Any) -> Clip:
    """A model with random weights on the CPU in float32, for training. Seed torch before the call.

    Args:
        image_size_px: overrides the architecture's own; None keeps it.
        options: keywords of open_clip.create_model_and_transforms (`init_logit_scale`, `force_patch_dropout`, ...).

    Raises:
        WinnowError: open_clip can't make a model of this.
    """
    import open_clip

    try:
        if isinstance(architecture, str):
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=None, force_image_size=image_size_px, output_dict=True, **options
            )
            return Clip(model, preprocess, open_clip.get_tokenizer(architecture), "cpu")
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
            _write_config(folder, architecture, preprocess=None)
            return _open_folder(folder, load_weights=False, force_image_size=image_size_px, **options)
    except (TypeError, ValueError, AssertionError, ArithmeticError, RuntimeError) as error:  # how it and timm refuse
        raise WinnowError(f"model = {architecture}, expected what open_clip can build: {one_line(error)}") from error


def _open_folder(folder: str, load_weights: bool, **options: Any) -> Clip:
    import open_clip

    name = f"local-dir:{folder}"
    root = logging.getLogger()  # open_clip warns there of random weights, which are what is asked for
    if not load_weights:
        root.addFilter(_is_no_warning)
    try:
        model, _, preprocess = open_clip.create_model_and_transforms(
            name, load_weights=load_weights, output_dict=True, **options
        )
    finally:
        root.removeFilter(_is_no_warning)
    return Clip(model, preprocess, open_clip.get_tokenizer(name), "cpu")


def _is_no_warning(record: logging.LogRecord) -> bool:
    return record.levelno != logging.WARNING


def _write_config(folder: str, architecture: Architecture, preprocess: Mapping[str, Any] | None) -> None:
    config: dict[str, Any] = {"model_cfg": model_config(architecture), "preprocess_cfg": dict(preprocess or {})}
    with open(os.path.join(folder, CONFIG_FILE), "w", encoding="utf-8") as file:
        json.dump(config, file, indent=1, sort_keys=True)


def preprocess_config(model: Any) -> dict[str, Any]:
    """The preprocessing of an open_clip model as plain values: size, mean, std, interpolation, resize_mode."""
    import open_clip

    config = open_clip.get_model_preprocess_cfg(model)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in config.items()}


def preprocessing(config: Mapping[str, Any]) -> Any:
    """The evaluation transform (PIL image -> [3, H, W] float32) of what preprocess_config returns."""
    from open_clip.transform import PreprocessCfg, image_transform_v2

    values = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    return image_transform_v2(PreprocessCfg(**values), is_train=False)


def save(model: Any, architecture: Architecture, folder: str) -> None:
    """None; writes a model folder that plain open_clip opens as `local-dir:FOLDER`, with its preprocessing.

    Its open_clip_model.safetensors also loads as `pretrained=` of an architecture known by name.
    """
    from safetensors.torch import save as to_bytes

    config = model_config(architecture)
    size = model.visual.image_size
    config["vision_cfg"] = {**config["vision_cfg"], "image_size": size[0] if isinstance(size, tuple) else size}
    with tempfile.TemporaryDirectory(prefix="winnow-") as temporary:
        _write_config(temporary, config, preprocess_config(model))
        with open(os.path.join(temporary, CONFIG_FILE), "rb") as file:
            storage.write_bytes(storage.join(folder, CONFIG_FILE), file.read())
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    storage.write_bytes(storage.join(folder, WEIGHTS_FILE), to_bytes(state))


def load(source: Mapping[str, Any], device: str = "cpu") -> Clip:
    """A trained model in eval mode on `device`.

    Args:
        source: {"folder": model folder} or {"architecture": name or mapping, "pretrained": open_clip tag or weights
            file}. Random weights are refused: scores of an untrained model look like scores.

    Raises:
        ConfigError: no weights, an unknown tag.
        WinnowError: weights that can't be fetched or do not fit.
    """
    import open_clip

    if source.get("folder"):
        with storage.local_folder(source["folder"]) as folder:
            if not os.path.exists(os.path.join(folder, CONFIG_FILE)):
                raise WinnowError(f"{source['folder']}: expected a model folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
            if not any(name.endswith(WEIGHTS_SUFFIXES) for name in os.listdir(folder)):
                raise WinnowError(f"{source['folder']}: no weights, expected {WEIGHTS_FILE}")
            try:
                clip = _open_folder(folder, load_weights=True)
            except Exception as error:  # open_clip, safetensors and pickle have classes of their own for a bad file
                raise WinnowError(f"{source['folder']}: the model can't be loaded: {one_line(error)}") from error
        return _ready(clip, device)
    architecture, pretrained = source.get("architecture"), source.get("pretrained")
    if not pretrained:
        raise ConfigError(f"model {architecture}: no pretrained weights given; an untrained model can't score")
    if not (storage.is_url(pretrained) or os.path.exists(pretrained)):
        check_tag(architecture, pretrained, f"model {architecture}: pretrained")
    try:
        if isinstance(architecture, str) and not storage.is_url(pretrained):
            model, _, preprocess = open_clip.create_model_and_transforms(
                architecture, pretrained=pretrained, output_dict=True
            )
            return _ready(Clip(model, preprocess, open_clip.get_tokenizer(architecture), "cpu"), device)
        clip = build(architecture)
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
            weights = pretrained
            if storage.is_url(pretrained):
                weights = os.path.join(folder, storage.name_of(pretrained))
                with open(weights, "wb") as file:
                    file.write(storage.read_bytes(pretrained))
            open_clip.load_checkpoint(clip.model, weights)
        return _ready(clip, device)
    except WinnowError:
        raise
    except Exception as error:  # as above
        raise WinnowError(f"model {architecture}: weights {pretrained} can't be loaded: {one_line(error)}") from error


def _ready(clip: Clip, device: str) -> Clip:
    model = clip.model.to(device).eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return Clip(model, clip.preprocess, clip.tokenizer, device)


def embed(clip: Clip, images: Sequence[Any], captions: Sequence[str], threads: Executor) -> tuple[Any, Any]:
    """Features of images and of captions: two [B, D] float32 tensors, rows L2-normalised, on the model's device.

    Args:
        images: [B] PIL, RGB.
        threads: that preprocess images.
    """
    import torch

    with torch.inference_mode():
        images_BCHW = torch.stack(list(threads.map(clip.preprocess, images))).to(clip.device)
        image_BD = clip.model.encode_image(images_BCHW, normalize=True).float()
        tokens_BT = clip.tokenizer(captions)
        groups = length_groups(caption_lengths(clip.model, tokens_BT), TEXT_GROUPS, clip.device)
        text_BD = encode_text(clip.model, tokens_BT.to(clip.device), groups)
    return image_BD, text_BD.float()


class LengthGroups(NamedTuple):
    """Captions of like length together, so that each group is computed without the padding of the longest."""

    rows: list[Any]  # of each group, on the model's device
    lengths: list[int]  # tokens of each group's longest
    back_B: Any  # puts the groups' rows, one after another, back in order


def caption_lengths(model: Any, tokens_BT: Any) -> Any:
    """[B] int64: tokens up to the end-of-text, which has the largest id.

    Under a causal mask what follows can't change a caption's feature. Text towers of another kind need the context.
    """
    import torch

    if not is_causal(model):
        return torch.full((len(tokens_BT),), tokens_BT.shape[1])
    return tokens_BT.argmax(dim=-1) + 1


def length_groups(lengths_B: Any, count: int, device: Any, multiple: int = 1) -> LengthGroups:
    """Groups of equal size but the last; their lengths are rounded up to a multiple. Wants lengths_B on the CPU."""
    import torch

    order_B = torch.argsort(lengths_B, stable=True)
    rows = order_B.chunk(count)
    lengths = [-(-int(lengths_B[group[-1]]) // multiple) * multiple for group in rows]
    return LengthGroups([group.to(device) for group in rows], lengths, torch.argsort(order_B).to(device))


def trim(model: Any, tokens_BT: Any) -> Any:
    """[B, L] the tokens up to the longest caption of the batch. Call it on the CPU: it waits for their values."""
    return tokens_BT[:, : int(caption_lengths(model, tokens_BT).max())]


def encode_text(model: Any, tokens_BT: Any, groups: LengthGroups | None = None) -> Any:
    """[B, D] L2-normalised text features, equal to model.encode_text's up to rounding.

    Args:
        tokens_BT: may be trimmed.
        groups: of these captions; None: all at once.
    """
    import torch
    from open_clip.transformer import text_global_pool
    from torch.nn import functional

    if groups is not None:
        parts = zip(groups.rows, groups.lengths, strict=True)
        features = [encode_text(model, tokens_BT[rows, :length]) for rows, length in parts]
        return torch.cat(features).index_select(0, groups.back_B)
    length = tokens_BT.shape[1]
    if not is_causal(model):
        return model.encode_text(tokens_BT, normalize=True)
    dtype = model.transformer.get_cast_dtype()
    hidden_BTD = model.token_embedding(tokens_BT).to(dtype) + model.positional_embedding[:length].to(dtype)
    hidden_BTD = model.transformer(hidden_BTD, attn_mask=model.attn_mask[:length, :length])
    features_BD = text_global_pool(model.ln_final(hidden_BTD), tokens_BT, "argmax")
    if model.text_projection is not None:
        project = model.text_projection
        features_BD = project(features_BD) if isinstance(project, torch.nn.Linear) else features_BD @ project
    return functional.normalize(features_BD, dim=-1)


def is_causal(model: Any) -> bool:
    """True for CLIP's own text tower: a causal mask, and the feature of the end-of-text token."""
    return getattr(model, "attn_mask", None) is not None and getattr(model, "text_pool_type", None) == "argmax"
