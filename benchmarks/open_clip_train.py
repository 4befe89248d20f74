"""Samples/s of our training beside open_clip's own command, end to end from the same tars.

    uv run benchmarks/open_clip_train.py [--image-size 32 64] [--captions short long] [--workers 2 1] [--rounds 3]
    uv run benchmarks/open_clip_train.py --device cuda --model ViT-B-32 --image-size 224 --batch 1024 --precision bf16

Theirs: `python -m open_clip_train.main`, a process with W loader workers and W torch threads, with webdataset 0.2.86
(which it needs) in a folder of its own before this interpreter's packages; all else (torch, open_clip) is the same.
Ours: training.loop.train in a process with W threads. Same tars, model, batch, precision, optimizer and augmentation;
one pass, so that no image is decoded twice; the two take turns, and ratios are medians over the rounds. As third,
`ours untrimmed` gets every caption padded to the model's context.

    samples_per_s         all samples / time from the start of the data work to the end of the last step: theirs from
                          "Start epoch", ours from before its loader is made, which tokenises all captions
    steady_samples_per_s  from about step steps/4 to the eighth step before the last one
    data_wait_fraction    of the steady steps: what the loop waited for its next batch
    optimizer_fraction    of ours; the rest is forward, backward and what a step does besides
    data_cpu_ms, step_cpu_ms   CPU time a sample of the loader (threads, processes), and of all else; torch's threads
                          spin while they wait, so on a busy machine only --workers 1 says what the work costs

Pairs: drawn pictures with a photo's spectrum as JPEG, captions of words of the tokenizer's vocabulary whose frequency
falls as in English (Zipf): short ones of 14 tokens on average, as flickr8k's, and long ones of 50, 39 % of them cut at
77, as openstax's. `--pairs FOLDER` takes real ones instead: parquet files with columns `image` and `text`. A line of
metrics comes every 4 steps on both sides, as in ours of 400 steps. With a GPU whose peak is known (training/flops.py),
MFU is 3 x forward FLOPs x steady samples/s / peak: `padded` counts captions as if they filled the context, `useful` to
their end; and `synthetic` is our step alone, on tensors that are ready.

Progress goes to stderr, one JSON and a Markdown table to stdout. Reads CPU times from /proc: Linux only.
"""

from __future__ import annotations

import argparse
import glob
import io
import json
import os
import pathlib
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import open_clip  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from PIL import Image  # noqa: E402
from torch.nn import functional  # noqa: E402

from pipeline.core import clip_model, storage  # noqa: E402
from pipeline.core.tars import TarWriter  # noqa: E402
from stages.selection.train_set import INDEX_SCHEMA  # noqa: E402
from training.flops import PairFlops, peak_tflop_per_s  # noqa: E402
from training.recipe import Recipe, Seeds  # noqa: E402

WEBDATASET = "webdataset==0.2.86"  # open_clip_train's own pin is <= 0.2.86; newer ones end it with KeyError 'fname'
SMALL = {
    "embed_dim": 128,
    "vision_cfg": {"patch_size": 8, "width": 128, "layers": 4, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
TARGETS = {32: 1.4, 64: 1.2}  # image size in px -> times open_clip's samples/s on a CPU
DISTINCT_IMAGES = 2000
VOCABULARY_WORDS = 10_000
TARS_A_WORKER = 8
LINE_STEPS = 4
AHEAD_STEPS = 8  # loaders are this many batches ahead at most, so the last steps wait for nothing
WAYS = ("open_clip", "ours", "ours untrimmed")
COLUMNS = (
    "image px",
    "source px",
    "captions: tokens, at the context",
    "workers",
    "open_clip, samples/s",
    "ours",
    "ratio",
    "ours untrimmed",
    "target",
    "CPU ratio",
    "data wait: theirs, ours",
    "optimizer",
    "CPU ms a sample, data + step: theirs",
    "ours",
)


@dataclass(frozen=True)
class Case:
    """One comparison: what both trainings get."""

    image_size_px: int
    source_px: int
    captions: str
    workers: int
    steps: int


def make_environment(folder: str | None) -> str:
    """A folder that holds the webdataset which open_clip_train needs, to be first on its path; made when missing."""
    folder = folder or os.path.join(tempfile.gettempdir(), "winnow-open-clip-train")
    if not os.path.isdir(os.path.join(folder, "webdataset")):
        subprocess.run(["uv", "pip", "install", "--quiet", "--no-deps", "--target", folder, WEBDATASET], check=True)
    return folder


def open_clip_arguments(recipe: Recipe, train_set: str, model: str, *, seed: int, workers: int, device: str) -> list:
    """Arguments of open_clip_train.main that train `recipe` on the tars of a train set in one epoch.

    Args:
        model: a name of open_clip's or local-dir:FOLDER.
        workers: recipe.samples_seen must be a multiple of workers x batch: it rounds up to that.
    """
    rounded = recipe.global_batch_size * workers
    if recipe.samples_seen % rounded:
        raise ValueError(f"samples_seen = {recipe.samples_seen}, expected a multiple of {rounded}")
    tars = sorted(glob.glob(f"{train_set}/*.tar"))
    values = {
        "train-data": f"{train_set}/{{00000..{len(tars) - 1:05d}}}.tar" if len(tars) > 1 else tars[0],
        "dataset-type": "webdataset",
        "train-num-samples": recipe.samples_seen,
        "epochs": 1,
        "model": model,
        "batch-size": recipe.global_batch_size,
        "precision": {"fp32": "fp32", "bf16": "amp_bf16", "fp16": "amp"}[recipe.precision],
        "lr": recipe.lr,
        "wd": recipe.weight_decay,
        "beta1": recipe.beta1,
        "beta2": recipe.beta2,
        "eps": recipe.eps,
        "warmup": recipe.warmup_steps,
        "lr-scheduler": {"cosine": "cosine", "constant": "const"}[recipe.schedule],
        "seed": seed,
        "workers": workers,
        "device": device,
        "log-every-n-steps": LINE_STEPS,
        "logs": "logs",
        "name": "run",
    }
    if recipe.image_size_px:
        values["force-image-size"] = recipe.image_size_px
    more = ["--grad-checkpointing"] if recipe.grad_checkpointing else []
    return [*(word for name, value in values.items() for word in (f"--{name}", str(value))), *more]


def run_open_clip(arguments: Sequence[str], folder: str, environment: str, threads: int) -> dict[str, Any]:
    """What open_clip's command measured; it ran in `folder`, and its checkpoint is logs/run/checkpoints/epoch_1.pt.

    {lines: [(seconds since the start of the training, samples, data-wait seconds a step, seconds a step)], cpu_s:
    (loader, all else), wall_s}.
    """
    shutil.rmtree(os.path.join(folder, "logs"), ignore_errors=True)
    started_s = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "open_clip_train.main", *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": environment, "OMP_NUM_THREADS": str(threads)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    pattern = re.compile(r"Train Epoch: \d+ \[\s*(\d+)/.*Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+)")
    heard, lines, cpu_s = [], [], (0.0, 0.0)
    epoch_s = before_s = 0.0
    for text in process.stderr:
        heard.append(text)
        if "Start epoch" in text:
            epoch_s, before_s = time.monotonic(), _process_cpu_s(process.pid)
        elif found := pattern.search(text):
            now_s = time.monotonic() - epoch_s
            lines.append((now_s, int(found[1]), float(found[2]), float(found[3])))
            cpu_s = (_children_cpu_s(process.pid), _process_cpu_s(process.pid) - before_s)
    if process.wait():
        raise RuntimeError(f"open_clip_train.main ended with {process.returncode}:\n{''.join(heard[-30:])}")
    return {"lines": lines, "cpu_s": cpu_s, "wall_s": time.monotonic() - started_s}


def run_ours(order: dict[str, Any], folder: str, threads: int) -> dict[str, Any]:
    """What our training measured, in a process of its own: as run_open_clip's, with optimizer_s."""
    started_s = time.monotonic()
    order_path, found_path = os.path.join(folder, "order.json"), os.path.join(folder, "found.json")
    storage.write_json(order_path, {**order, "threads": threads})
    command = [sys.executable, __file__, "--order", order_path, "--found", found_path]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
    return {**storage.read_json(found_path), "wall_s": time.monotonic() - started_s}


def train_here(order: dict[str, Any]) -> dict[str, Any]:
    """What our training measured, in this process. See run_ours."""
    from training import loop, step, watch

    watch.LINES = max(1, order["recipe"]["samples_seen"] // order["recipe"]["global_batch_size"] // LINE_STEPS)
    if not order["trim"]:
        clip_model.encode_text = _encode_padded
    optimizer_s = _time_optimizer(step, order["device"])
    make_loader, start, loader_s = loop.Loader, {}, {}
    lines: list[tuple[float, int, float, float]] = []

    def started_loader(*arguments: Any, **options: Any) -> Any:
        start.update(wall_s=time.monotonic(), cpu_s=time.process_time())
        return make_loader(*arguments, **options)

    def on_line(line: dict[str, Any]) -> None:
        step_s = order["recipe"]["global_batch_size"] / line["samples_per_s"]
        waited_s = step_s * line["data_wait_fraction"]
        lines.append((time.monotonic() - start["wall_s"], line["samples_seen"], waited_s, step_s))
        for thread in threading.enumerate():
            if thread is not threading.main_thread():
                loader_s[thread.ident] = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        children_s = _children_cpu_s(os.getpid())
        data_s = sum(loader_s.values()) + children_s
        start["found_cpu_s"] = data_s, time.process_time() - start["cpu_s"] - (data_s - children_s)

    loop.Loader = started_loader
    shutil.rmtree(order["out"], ignore_errors=True)
    loop.train(
        order["train_set"],
        order["out"],
        Recipe(**order["recipe"]),
        Seeds(order["seed"], order["seed"]),
        device=order["device"],
        threads=order["threads"],
        report=on_line,
    )
    return {"lines": lines, "cpu_s": start["found_cpu_s"], "optimizer_s": sum(optimizer_s())}


def _encode_padded(model: Any, tokens_BT: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    """Features of captions padded to the model's context, as open_clip's command computes them."""
    missing = model.context_length - tokens_BT.shape[1]
    return model.encode_text(functional.pad(tokens_BT, (0, missing)), normalize=True)


def _time_optimizer(step: Any, device: str) -> Callable[[], list[float]]:
    """Gives the seconds of each optimizer step of the training that follows."""
    times: list[Any] = []
    make = step.make_optimizer

    def clock() -> Any:
        if not device.startswith("cuda"):
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def made(*arguments: Any, **options: Any) -> torch.optim.Optimizer:
        optimizer = make(*arguments, **options)
        optimizer.register_step_pre_hook(lambda *_: times.append(clock()))
        optimizer.register_step_post_hook(lambda *_: times.append(clock()))
        return optimizer

    def seconds() -> list[float]:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
            return [start.elapsed_time(stop) / 1000 for start, stop in zip(times[::2], times[1::2], strict=True)]
        return [stop - start for start, stop in zip(times[::2], times[1::2], strict=True)]

    step.make_optimizer = made
    return seconds


def _process_cpu_s(pid: int) -> float:
    """CPU seconds of a process, its threads included and its children not."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except FileNotFoundError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _children_cpu_s(pid: int) -> float:
    """CPU seconds of the children that a process has now."""
    total = 0.0
    for path in glob.glob(f"/proc/{pid}/task/*/children"):
        with open(path) as file:
            total += sum(_process_cpu_s(int(child)) for child in file.read().split())
    return total


def figures(measured: dict[str, Any], steps: int, batch: int) -> dict[str, float]:
    """The figures of one training, named in the module's text, from its lines."""
    lines = measured["lines"]
    middle = [line for line in lines if steps // 4 <= line[1] // batch <= steps - AHEAD_STEPS]
    waited_s, took_s = (sum(line[place] for line in middle[1:]) for place in (2, 3))
    data_s, step_s = measured["cpu_s"]
    found = {
        "samples_per_s": lines[-1][1] / lines[-1][0],
        "steady_samples_per_s": (middle[-1][1] - middle[0][1]) / (middle[-1][0] - middle[0][0]),
        "data_wait_fraction": waited_s / took_s,
        "data_cpu_ms": 1000 * data_s / lines[-1][1],
        "step_cpu_ms": 1000 * step_s / lines[-1][1],
        "wall_s": measured["wall_s"],
    }
    if "optimizer_s" in measured:
        found["optimizer_fraction"] = measured["optimizer_s"] / lines[-1][0]
    return {name: round(value, 4) for name, value in found.items()}


def picture(source_px: int, rng: np.random.Generator) -> bytes:
    """A JPEG whose shorter side is source_px: noise whose amplitude falls with its frequency, as in photographs."""
    width, height = [(4, 3), (3, 4), (3, 2), (1, 1)][rng.integers(4)]
    width, height = source_px * width // min(width, height), source_px * height // min(width, height)
    total = np.zeros((height, width, 3), np.float32)
    cells = 2
    while cells <= source_px:
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), np.float32) - 128) / cells**0.6
        cells *= 2
    pixels = np.clip(128 + total * (55 / total.std()), 0, 255).astype(np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=85)
    return data.getvalue()


def drawn_pairs(count: int, source_px: int, captions: str) -> Iterator[tuple[bytes, str]]:
    """(JPEG, caption) of drawn pairs: see the module's text."""
    rng = np.random.default_rng(0)
    images = [picture(source_px, rng) for _ in range(min(count, DISTINCT_IMAGES))]
    encoder = open_clip.get_tokenizer("ViT-B-32").encoder
    words = [word.removesuffix("</w>") for word in encoder if re.fullmatch(r"[a-z]{3,}</w>", word)][:VOCABULARY_WORDS]
    frequency = 1 / np.arange(1, len(words) + 1)
    for number in range(count):
        if captions == "short":
            length = 4 + rng.gamma(4, 2)
        else:
            length = 80 if rng.random() < 0.39 else rng.uniform(5, 60)
        chosen = rng.choice(len(words), round(length), p=frequency / frequency.sum())
        yield images[number % len(images)], " ".join(words[place] for place in chosen)


def real_pairs(folder: str, count: int) -> Iterator[tuple[bytes, str]]:
    """(image bytes, caption) of `count` rows of a folder's parquet files, again from the first where they are fewer."""
    paths = sorted(glob.glob(f"{folder}/*.parquet"))
    rows = [row for path in paths for row in pq.read_table(path, columns=["image", "text"]).to_pylist()]
    if not rows:
        raise SystemExit(f"--pairs = {folder}, expected parquet files with columns image and text")
    order = np.random.default_rng(0).permutation(len(rows))
    for number in range(count):
        row = rows[order[number % len(rows)]]
        yield row["image"], row["text"]


def write_train_set(path: str, pairs: Iterator[tuple[bytes, str]], count: int, num_tars: int) -> None:
    """None; `count` pairs are a train set there, as stages.selection.train_set writes it."""
    rows = []
    for number in range(num_tars):
        name = f"{number:05d}.tar"
        with storage.write_file(storage.join(path, name)) as temporary, TarWriter(temporary) as tar:
            for place in range(count * number // num_tars, count * (number + 1) // num_tars):
                image, caption = next(pairs)
                uid = f"{place:032x}"
                extension = "png" if image.startswith(b"\x89PNG") else "jpg"
                offset = tar.add(f"{place:09d}.{extension}", image)
                tar.add(f"{place:09d}.txt", caption.encode())
                tar.add(f"{place:09d}.json", json.dumps({"uid": uid, "caption": caption}).encode())
                rows.append((uid, name, offset, len(image), caption))
    with storage.write_file(storage.join(path, "index.parquet")) as temporary:
        columns = [list(column) for column in zip(*rows, strict=True)]
        pq.write_table(pa.table(columns, schema=INDEX_SCHEMA), temporary, compression="zstd")


def caption_tokens(train_set: str, context_length: int) -> dict[str, float]:
    """{mean, mean_square, at_context}: tokens a caption with both its ends; the share that fills the context."""
    captions = pq.read_table(f"{train_set}/index.parquet", columns=["caption"])["caption"].to_pylist()[:2000]
    tokens_NT = open_clip.get_tokenizer("ViT-B-32")(captions, context_length=context_length)
    lengths = tokens_NT.argmax(dim=-1) + 1
    return {
        "mean": round(lengths.double().mean().item(), 1),
        "mean_square": round(lengths.double().square().mean().item(), 1),
        "at_context": round((lengths == context_length).float().mean().item(), 3),
    }


def write_model(model: dict[str, Any], folder: str) -> str:
    """The name by which open_clip's command knows a model_cfg: a folder that holds nothing else."""
    storage.write_json(os.path.join(folder, clip_model.CONFIG_FILE), {"model_cfg": model})
    return f"local-dir:{folder}"


def run_case(case: Case, arguments: argparse.Namespace, folder: str, environment: str) -> dict[str, Any]:
    """The record of one case: {case, caption_tokens, ways: {way: figures}, ratios}."""
    is_small = arguments.model == "small"
    model: Any = arguments.model
    if is_small:
        model = {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": case.image_size_px}}
    recipe = Recipe(
        model=model,
        image_size_px=None if is_small else case.image_size_px,
        global_batch_size=arguments.batch,
        samples_seen=arguments.batch * case.steps,
        lr=5e-4,
        warmup_steps=10,
        precision=arguments.precision,
    )
    train_set = os.path.join(folder, "train_set")
    shutil.rmtree(train_set, ignore_errors=True)
    pairs = (
        real_pairs(arguments.pairs, recipe.samples_seen)
        if arguments.pairs
        else drawn_pairs(recipe.samples_seen, case.source_px, case.captions)
    )
    write_train_set(train_set, pairs, recipe.samples_seen, TARS_A_WORKER * case.workers)
    name = write_model(model, os.path.join(folder, "vit")) if is_small else model
    options = {"seed": 0, "workers": case.workers, "device": arguments.device}
    words = open_clip_arguments(recipe, train_set, name, **options)
    order = {"train_set": train_set, "out": os.path.join(folder, "ours"), "recipe": recipe.model_dump(mode="json")}
    order |= {"seed": 0, "device": arguments.device}
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for number in range(arguments.rounds):
        for way in WAYS:
            if way == "open_clip":
                measured = run_open_clip(words, folder, environment, case.workers)
            else:
                measured = run_ours({**order, "trim": way == "ours"}, folder, case.workers)
            found[way].append(figures(measured, case.steps, arguments.batch))
            print(f"{case} round {number} {way}: {found[way][-1]}", file=sys.stderr, flush=True)
    ways = {
        way: {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
        for way, rounds in found.items()
    }
    ratios = {}
    for way in WAYS[1:]:
        both = list(zip(found[way], found["open_clip"], strict=True))
        for figure in ("samples_per_s", "steady_samples_per_s"):
            ratios[f"{way}: {figure}"] = spread([ours[figure] / theirs[figure] for ours, theirs in both])
        ratios[f"{way}: cpu"] = spread([cpu_ms(theirs) / cpu_ms(ours) for ours, theirs in both])
    built = clip_model.build(model, recipe.image_size_px).model
    tokens = caption_tokens(train_set, built.context_length)
    for one in ways.values():
        one |= mfu(built, recipe, one["steady_samples_per_s"], tokens, arguments.device)
    return {"case": asdict(case), "caption_tokens": tokens, "ways": ways, "ratios": ratios}


def mfu(
    model: torch.nn.Module, recipe: Recipe, samples_per_s: float, tokens: dict[str, float], device: str
) -> dict[str, float]:
    """{mfu_padded, mfu_useful, peak_tflop_per_s}; nothing where the device's peak is not known."""
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "cpu"
    peak = peak_tflop_per_s(name, recipe.precision)
    if peak is None:
        return {}
    flops = PairFlops(model)
    useful = flops.useful(tokens["mean"], tokens["mean_square"])
    rate = samples_per_s / (peak * 1e12)
    return {
        "mfu_padded": round(rate * flops.padded, 4),
        "mfu_useful": round(rate * useful, 4),
        "peak_tflop_per_s": peak,
    }


def cpu_ms(one: dict[str, float]) -> float:
    """CPU milliseconds a sample, all in all."""
    return one["data_cpu_ms"] + one["step_cpu_ms"]


def spread(values: Sequence[float]) -> dict[str, float]:
    """{median, min, max}."""
    return {name: round(of(values), 3) for name, of in (("median", statistics.median), ("min", min), ("max", max))}


def synthetic(arguments: argparse.Namespace, image_size_px: int) -> dict[str, float]:
    """{samples_per_s, mfu_padded, mfu_useful, ...} of our step alone, on short captions."""
    from training.data import Batch
    from training.step import Learner

    torch.manual_seed(0)
    clip = clip_model.build(arguments.model, image_size_px)
    recipe = Recipe(
        model=arguments.model,
        global_batch_size=arguments.batch,
        samples_seen=arguments.batch * 1000,
        lr=5e-4,
        precision=arguments.precision,
    )
    learner = Learner(clip.model.train().to(arguments.device), recipe, 0, device=arguments.device)
    shape = (arguments.batch, image_size_px, image_size_px, 3)
    image_BSS3 = torch.from_numpy(np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8))
    texts = [caption for _, caption in drawn_pairs(arguments.batch, 32, "short")]
    tokens_BT = clip_model.trim(clip.model, clip.tokenizer(texts)).contiguous()
    lengths_B = clip_model.caption_lengths(clip.model, tokens_BT)
    lengths = lengths_B.double()
    batch = Batch(0, image_BSS3.to(arguments.device), tokens_BT.to(arguments.device), [arguments.batch], lengths_B)
    rates = []
    for _ in range(4):  # the first one warms up
        torch.cuda.synchronize()
        started_s = time.monotonic()
        for _ in range(20):
            learner.take_step(batch)
        torch.cuda.synchronize()
        rates.append(20 * arguments.batch / (time.monotonic() - started_s))
    rate = statistics.median(rates[1:])
    tokens = {"mean": lengths.mean().item(), "mean_square": lengths.square().mean().item()}
    return {"samples_per_s": round(rate, 1), **mfu(clip.model, recipe, rate, tokens, arguments.device)}


def table(records: Sequence[dict[str, Any]]) -> str:
    """The cases as a Markdown table; samples/s and its ratio over the whole training, steady ones in brackets."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for record in records:
        case, ways, ratios = record["case"], record["ways"], record["ratios"]
        rate = {way: f"{one['samples_per_s']:.0f} ({one['steady_samples_per_s']:.0f})" for way, one in ways.items()}
        ratio = {
            way: "{:.2f} ({:.2f})".format(
                *(ratios[f"{way}: {name}"]["median"] for name in ("samples_per_s", "steady_samples_per_s"))
            )
            for way in WAYS[1:]
        }
        cpu = {way: f"{one['data_cpu_ms']:.2f} + {one['step_cpu_ms']:.2f}" for way, one in ways.items()}
        tokens = record["caption_tokens"]
        cells = [
            case["image_size_px"],
            case["source_px"],
            f"{case['captions']}: {tokens['mean']}, {tokens['at_context']:.0%}",
            case["workers"],
            rate["open_clip"],
            rate["ours"],
            ratio["ours"],
            ratio["ours untrimmed"],
            TARGETS.get(case["image_size_px"], ""),
            ratios["ours: cpu"]["median"],
            f"{ways['open_clip']['data_wait_fraction']:.0%}, {ways['ours']['data_wait_fraction']:.0%}",
            f"{ways['ours']['optimizer_fraction']:.0%}",
            cpu["open_clip"],
            cpu["ours"],
        ]
        lines.append("| " + " | ".join(str(cell) for cell in cells) + " |")
    return "\n".join(lines)


def main() -> None:
    """None; prints the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", default="small", help="small: ViT 128 x 4, text 64 x 2; or an open_clip name")
    parser.add_argument("--image-size", type=int, nargs="+", default=[32, 64], help="px")
    parser.add_argument("--source-px", type=int, nargs="+", help="shorter side of the JPEGs; 128, with a GPU 256")
    parser.add_argument("--captions", nargs="+", default=["short", "long"], choices=["short", "long"])
    parser.add_argument("--pairs", help="a folder of parquet files with real images and texts instead of drawn ones")
    parser.add_argument("--workers", type=int, nargs="+", help="and torch threads, each; 2, with a GPU one a core")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--steps", type=int, default=48, help="24 or more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environment", help="a folder with webdataset <= 0.2.86; made with uv when not given")
    parser.add_argument("--order", help=argparse.SUPPRESS)  # of run_ours
    parser.add_argument("--found", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.order:
        storage.write_json(arguments.found, train_here(storage.read_json(arguments.order)))
        return

    if arguments.steps < 24:
        parser.error(f"--steps = {arguments.steps}, expected at least 24, so that some are steady")
    on_gpu = arguments.device.startswith("cuda")
    environment = make_environment(arguments.environment)
    records = []
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        for image_size_px in arguments.image_size:
            for source_px in [0] if arguments.pairs else arguments.source_px or [256 if on_gpu else 128]:
                for captions in ["as they are"] if arguments.pairs else arguments.captions:
                    for workers in arguments.workers or [os.cpu_count() if on_gpu else 2]:
                        steps = -(-arguments.steps // workers) * workers  # open_clip rounds up to this
                        case = Case(image_size_px, source_px, captions, workers, steps)
                        records.append(run_case(case, arguments, folder, environment))
    name = torch.cuda.get_device_name() if on_gpu else f"{os.cpu_count()} CPUs"
    whole = {"device_name": name, "torch": torch.__version__, "open_clip": open_clip.__version__}
    whole |= {"arguments": vars(arguments), "cases": records}
    if on_gpu:
        whole["synthetic"] = {size: synthetic(arguments, size) for size in arguments.image_size}
    print(json.dumps(whole, indent=1))
    print(table(records))


if __name__ == "__main__":
    main()
