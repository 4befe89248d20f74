"""Wall time of evaluating checkpoints on task folders beside CLIP_benchmark's command, and equality of every metric.

    uv run benchmarks/evaluation.py [--data FOLDER] [--models demo small] [--checkpoints 1 6] [--threads 2] [--rounds 3]

FOLDER holds zeroshot/ and retrieval/ with task folders in CLIP_benchmark's layout; by default the real data of the
tests. Models, random weights in open_clip's model folders: `demo`, the demo's (ViT 96 x 3 on 32 px, text 32 x 1 with 16
tokens), and `small`, that of the trainer's benchmark (ViT 128 x 4, text 64 x 2 with 77 tokens) on 64 px.

Theirs: `clip_benchmark eval` 1.6.2 in fp32 (--no_amp), batches of 256, in one process for everything; it is called
twice in there, as one call takes one type of task. It is in a folder of its own before this interpreter's packages,
with numpy < 2.4, which it needs; torch and open_clip are the same. T torch threads and one loader worker: more workers
than tars are an error. Ours: `python -m eval --threads T`. Both from the start of the process to its end,
taking turns, results written; ratios are medians over the rounds.

    ratio          theirs / ours, wall time
    CPU            seconds, user and system, of the process and its children; torch's threads spin while they wait for
                   each other, so on a busy machine theirs says little with T > 1
    forward        share of ours that is spent in the towers
    bound          the ratio if nothing but our forward passes took time, on T cores

Progress goes to stderr, one JSON and a Markdown table to stdout. Exit code 1 when a metric differs by more than 1e-6.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import pathlib
import re
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import torch  # noqa: E402

from benchmarks.open_clip_train import SMALL  # noqa: E402
from pipeline.core import clip_model, storage  # noqa: E402
from training.recipe import RECIPES  # noqa: E402

# With what its imports need and this interpreter's packages lack. The Java parts of pycocoevalcap are never started.
PACKAGES = (
    "clip-benchmark==1.6.2",
    "numpy<2.4",
    "scikit-learn",
    "joblib",
    "threadpoolctl",
    "cloudpickle",
    "narwhals",
    "pycocoevalcap==1.2",
    "pycocotools",
)
KINDS = {"zeroshot": "zeroshot_classification", "retrieval": "zeroshot_retrieval"}
MODELS = {
    "demo": RECIPES["demo"].model,
    "small": {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 64}},
    "small_32": {**SMALL, "vision_cfg": {**SMALL["vision_cfg"], "image_size": 32}},
}
TARGETS = {("demo", 1): 2.0, ("demo", 6): 4.0}  # (model, checkpoints) -> ratio
TOLERANCE = 1e-6
CALLS = """
import json, sys
from clip_benchmark import cli
for words in json.loads(sys.argv[1]):
    sys.argv = ["clip_benchmark", *words]
    cli.main()
"""
COLUMNS = ("model", "checkpoints", "clip_benchmark, s", "ours, s", "ratio", "target", "bound", "forward", "CPU s")


def make_environment(folder: str | None) -> str:
    """A folder with clip_benchmark and what it needs, to be first on its path; made when missing."""
    folder = folder or os.path.join(tempfile.gettempdir(), "winnow-clip-benchmark")
    if not os.path.isdir(os.path.join(folder, "clip_benchmark")):
        command = ["uv", "pip", "install", "--quiet", "--no-deps", "--python", sys.executable, "--target", folder]
        subprocess.run([*command, *PACKAGES], check=True)
    return folder


def write_models(folder: str, name: str, count: int) -> list[str]:
    """Paths of model folders with random weights."""
    paths = []
    for number in range(count):
        torch.manual_seed(number)
        paths.append(os.path.join(folder, f"{name}_{number}"))
        clip_model.save(clip_model.build(MODELS[name]).model, MODELS[name], paths[-1])
    return paths


def timed(command: Sequence[str], environment: dict[str, str], folder: str) -> tuple[float, float, str]:
    """(wall seconds, CPU seconds with children, stdout) of a command."""
    before, start_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **environment}, cwd=folder, capture_output=True, text=True)
    wall_s, after = time.perf_counter() - start_s, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        raise RuntimeError(f"{command[:4]} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    return wall_s, sum(after[:2]) - sum(before[:2]), done.stdout


def run_theirs(models: Sequence[str], data: str, out: str, environment: str, threads: int) -> dict[str, Any]:
    """{wall_s, cpu_s, metrics: {(checkpoint, task): {metric: value}}} of clip_benchmark's command."""
    shutil.rmtree(out, ignore_errors=True)
    os.makedirs(out)
    options = ["--no_amp", "--batch_size", "256", "--num_workers", "1", "--recall_k", "1", "5", "10", "--quiet"]
    # open_clip ignores the second of the two words after local-dir:, but it names the output
    names = [f"local-dir:{path},{os.path.basename(path)}" for path in models]
    calls = [
        ["eval", "--dataset", *(f"wds/{kind}/{task}" for task in storage.list_folders(f"{data}/{kind}"))]
        + ["--dataset_root", f"{data}/{{dataset}}", "--task", task_type, "--pretrained_model", *names]
        + ["--output", f"{out}/{{pretrained}}:{kind}:{{dataset}}.json", *options]
        for kind, task_type in KINDS.items()
    ]
    command = [sys.executable, "-c", CALLS, json.dumps(calls)]
    variables = {"PYTHONPATH": environment, "OMP_NUM_THREADS": str(threads)}
    wall_s, cpu_s, _ = timed(command, variables, out)
    metrics = {}
    for name in storage.list_files(out):
        model, kind, dataset = name.removesuffix(".json").split(":")
        metrics[model, f"{kind}/{dataset.removeprefix(kind + '_')}"] = storage.read_json(f"{out}/{name}")["metrics"]
    return {"wall_s": wall_s, "cpu_s": cpu_s, "metrics": metrics}


def run_ours(models: Sequence[str], data: str, out: str, threads: int) -> dict[str, Any]:
    """The same of our command, with the seconds of its threads and those of forward passes among them."""
    shutil.rmtree(out, ignore_errors=True)
    tasks = [f"{kind}/{task}" for kind in KINDS for task in storage.list_folders(f"{data}/{kind}")]
    command = [sys.executable, "-m", "eval", "--root", data, "--tasks", *tasks, "--out", out]
    command += ["--device", "cpu", "--threads", str(threads), *models]
    wall_s, cpu_s, text = timed(command, {}, str(ROOT))
    forward_s, threads_s = map(float, re.search(r"took ([\d.]+) s of the threads' ([\d.]+) s", text).groups())
    metrics = {
        (os.path.basename(model), task): storage.read_json(f"{out}/{os.path.basename(model)}/{task}/result.json")
        for model in models
        for task in tasks
    }
    found = {"wall_s": wall_s, "cpu_s": cpu_s, "metrics": {pair: one["metrics"] for pair, one in metrics.items()}}
    return {**found, "forward_s": forward_s, "threads_s": threads_s}


def differences(ours: dict[tuple[str, str], dict], theirs: dict[tuple[str, str], dict]) -> list[tuple[float, str]]:
    """(difference, where) of every metric that theirs has, the largest first; NaN and our null are the same."""
    if ours.keys() != theirs.keys():
        raise RuntimeError(f"pairs that only one has: {sorted(ours.keys() ^ theirs.keys())}")
    found = []
    for pair, metrics in theirs.items():
        for name, value in metrics.items():
            own = ours[pair][name]
            gap = 0.0 if own is None and math.isnan(value) else abs(float("nan" if own is None else own) - value)
            found.append((math.inf if math.isnan(gap) else gap, f"{pair[0]} on {pair[1]}: {name}"))
    return sorted(found, reverse=True)


def run_case(name: str, count: int, arguments: argparse.Namespace, folder: str, environment: str) -> dict[str, Any]:
    """The figures of one model and number of checkpoints."""
    models = write_models(folder, name, count)
    rounds = []
    for number in range(arguments.rounds):
        ours = run_ours(models, arguments.data, f"{folder}/ours", arguments.threads)
        theirs = run_theirs(models, arguments.data, f"{folder}/theirs", environment, arguments.threads)
        gaps = differences(ours.pop("metrics"), theirs.pop("metrics"))
        one = {"ours": ours, "theirs": theirs, "metrics": len(gaps), "largest_difference": gaps[0]}
        rounds.append(one)
        print(f"{name}, {count} checkpoints, round {number}: {one}", file=sys.stderr, flush=True)

    def median(figure: Any) -> float:
        return round(statistics.median(figure(one) for one in rounds), 3)

    return {
        "model": name,
        "image_size_px": MODELS[name]["vision_cfg"]["image_size"],
        "checkpoints": count,
        "theirs_s": median(lambda one: one["theirs"]["wall_s"]),
        "ours_s": median(lambda one: one["ours"]["wall_s"]),
        "ratio": median(lambda one: one["theirs"]["wall_s"] / one["ours"]["wall_s"]),
        "bound": median(lambda one: one["theirs"]["wall_s"] * arguments.threads / one["ours"]["forward_s"]),
        "forward_fraction": median(lambda one: one["ours"]["forward_s"] / one["ours"]["threads_s"]),
        "theirs_cpu_s": median(lambda one: one["theirs"]["cpu_s"]),
        "ours_cpu_s": median(lambda one: one["ours"]["cpu_s"]),
        "metrics": rounds[0]["metrics"],
        "largest_difference": max(one["largest_difference"] for one in rounds),
        "rounds": rounds,
    }


def table(cases: Sequence[dict[str, Any]]) -> str:
    """The cases as a Markdown table."""
    lines = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    for case in cases:
        name, count = case["model"], case["checkpoints"]
        cells = [
            f"{name}, {case['image_size_px']} px",
            count,
            f"{case['theirs_s']:.1f}",
            f"{case['ours_s']:.1f}",
            f"{case['ratio']:.2f}",
        ]
        cells += [TARGETS.get((name, count), ""), f"{case['bound']:.2f}", f"{case['forward_fraction']:.0%}"]
        cells += [f"{case['theirs_cpu_s']:.0f}, {case['ours_cpu_s']:.0f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> int:
    """0 when all metrics are the same; prints the figures."""
    real = os.environ.get("WINNOW_REAL_DATA", str(ROOT.parent / "shared" / "data"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default=real, help="a folder with zeroshot/ and retrieval/")
    parser.add_argument("--models", nargs="+", default=["demo", "small"], choices=list(MODELS))
    parser.add_argument("--checkpoints", type=int, nargs="+", default=[1, 6])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--environment", help="a folder with clip_benchmark; made with uv when not given")
    arguments = parser.parse_args()
    if not storage.list_folders(f"{arguments.data}/zeroshot"):
        print(f"--data = {arguments.data}, expected a folder with zeroshot/ and retrieval/; nothing was measured")
        return 0
    environment = make_environment(arguments.environment)
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        cases = [
            run_case(name, count, arguments, folder, environment)
            for name in arguments.models
            for count in arguments.checkpoints
        ]
    gap, where = max(case["largest_difference"] for case in cases)
    print(json.dumps({"cpus": os.cpu_count(), "torch": torch.__version__, "cases": cases}, indent=1))
    print(table(cases))
    print(f"{sum(case['metrics'] for case in cases)} metrics compared; the largest difference is {gap:.1e} ({where})")
    return 0 if gap <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
