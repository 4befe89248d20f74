"""Samples/s of our training step beside a plain loop over open_clip's model, tokenizer and loss.

    OMP_NUM_THREADS=1 python benchmarks/training_step.py [--device cuda --model ViT-B-32 --batch 256 --precision bf16]

Same model, weights, batch, precision and threads, in one process; the two alternate in rounds, and the ratio is the
median over rounds, so that other load on the machine hits both. The plain loop is what a user writes from open_clip's
README, fed with tensors that are ready: model(images, texts), ClipLoss, AdamW(fused=False, as open_clip_train makes
it), captions padded to the model's context. Ours is training.step.Learner on the same pairs, as uint8 pixels and with
everything it does (normalising, learning rate, clamp); `end to end` is training.loop.train reading, decoding and
cropping from a train set's tars, after its start-up.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import torch  # noqa: E402

from pipeline.core import clip_model  # noqa: E402
from tests.training_fixture import write_train_set  # noqa: E402
from training import loop, step, vocabulary  # noqa: E402
from training.data import Batch  # noqa: E402
from training.recipe import RECIPES, Recipe, Seeds  # noqa: E402

WORDS = ("a", "photo", "of", "two", "small", "red", "green", "blue", "stars", "on", "the", "wall", "with", "cat", "dog")


def captions(count: int, rng: np.random.Generator) -> list[str]:
    """Captions of 4 to 12 words, as web alt-text is: 14 tokens on average in flickr8k, of 77."""
    return [" ".join(rng.choice(WORDS, rng.integers(4, 13))) for _ in range(count)]


class Plain:
    """The loop of open_clip's README."""

    def __init__(self, recipe: Recipe, device: str, image_BSS3: torch.Tensor, texts: list[str]):
        torch.manual_seed(0)
        clip = clip_model.build(recipe.model, recipe.image_size_px)
        self.recipe, self.device, self.model = recipe, device, clip.model.train().to(device)
        self.loss = open_clip.ClipLoss()
        gains = [p for p in self.model.parameters() if p.ndim < 2]
        rest = [p for p in self.model.parameters() if p.ndim >= 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": gains, "weight_decay": 0.0}, {"params": rest, "weight_decay": recipe.weight_decay}],
            lr=recipe.lr,
            betas=(recipe.beta1, recipe.beta2),
            eps=recipe.eps,
        )
        mean, std = (
            torch.tensor(clip_model.preprocess_config(clip.model)[name]).view(3, 1, 1) for name in ("mean", "std")
        )
        self.image = ((image_BSS3.permute(0, 3, 1, 2).float() / 255 - mean) / std).contiguous().to(device)
        self.tokens = clip.tokenizer(texts).to(device)

    def step(self) -> None:
        """None; one optimizer step."""
        self.optimizer.zero_grad()
        with step.autocast(self.recipe.precision, self.device):
            loss = self.loss(**self.model(self.image, self.tokens))
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, 4.6052)


class Ours:
    """training.step.Learner on the same pairs."""

    def __init__(self, recipe: Recipe, device: str, image_BSS3: torch.Tensor, texts: list[str]):
        torch.manual_seed(0)
        clip = clip_model.build(recipe.model, recipe.image_size_px)
        model = clip.model.train()
        tokens = clip_model.trim(model, clip.tokenizer(texts))
        if vocabulary.can_shrink(model):
            used, places = np.unique(tokens.numpy(), return_inverse=True)
            vocabulary.shrink(model, used)
            tokens = torch.from_numpy(places.reshape(tokens.shape))
        self.learner = step.Learner(model.to(device), recipe, 0, device=device)
        lengths_B = clip_model.caption_lengths(model, tokens)
        self.batch = Batch(0, image_BSS3.to(device), tokens.to(device), [len(texts)], lengths_B)

    def step(self) -> None:
        """None; one optimizer step."""
        self.learner.take_step(self.batch)


def samples_per_s(loops: dict[str, Plain | Ours], batch: int, steps: int, rounds: int, device: str) -> dict:
    """{name: [rounds] samples/s}; the loops take turns."""
    found: dict[str, list[float]] = {name: [] for name in loops}
    for _ in range(rounds):
        for name, each in loops.items():
            each.step()
            _wait(device)
            started = time.perf_counter()
            for _ in range(steps):
                each.step()
            _wait(device)
            found[name].append(batch * steps / (time.perf_counter() - started))
    return found


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def main() -> None:
    """None; prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="demo", help="demo, demo77 (its model at context 77), or open_clip's name")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    demo = RECIPES["demo"]
    own = {"model": arguments.model, "crop_scale": [0.9, 1.0]}
    if arguments.model.startswith("demo"):
        text = {**demo.model["text_cfg"], "context_length": 77 if arguments.model == "demo77" else 16}
        own = {"model": {**demo.model, "text_cfg": text}}
    changes = {"global_batch_size": arguments.batch, "precision": arguments.precision, **own}
    changes["samples_seen"] = arguments.batch * arguments.steps * 8
    recipe = Recipe(**{**demo.model_dump(), **changes})

    rng = np.random.default_rng(0)
    size = clip_model.build(recipe.model).model.visual.image_size
    side = size if isinstance(size, int) else size[0]
    image_BSS3 = torch.from_numpy(rng.integers(0, 256, (arguments.batch, side, side, 3), dtype=np.uint8))
    texts = captions(arguments.batch, rng)
    loops = {kind.__name__.lower(): kind(recipe, arguments.device, image_BSS3, texts) for kind in (Plain, Ours)}
    found = samples_per_s(loops, arguments.batch, arguments.steps, arguments.rounds, arguments.device)
    del loops
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        train_set = write_train_set(f"{folder}/train_set", 2000)
        whole = {"device": arguments.device, "threads": arguments.threads}
        facts = loop.train(train_set, f"{folder}/checkpoint", recipe, Seeds(0, 0), **whole)
    plain = statistics.median(found["plain"])
    ratios = [ours / other for ours, other in zip(found["ours"], found["plain"], strict=True)]
    record = {
        **vars(arguments),
        "device_name": torch.cuda.get_device_name() if arguments.device.startswith("cuda") else "cpu",
        "plain_samples_per_s": round(plain, 1),
        "ours_samples_per_s": round(statistics.median(found["ours"]), 1),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        "end_to_end_samples_per_s": round(facts["samples_per_s"], 1),
        "end_to_end_ratio": round(facts["samples_per_s"] / plain, 3),
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
