"""Does our training loop give as good a model as open_clip's own command? The final score of both, over seeds.

    OMP_NUM_THREADS=1 uv run benchmarks/parity.py [--seeds 5]

The demo's recipe (with open_clip's random crops, which its command can't be told to leave out) on the demo world's
clean pairs: the same tars, samples seen, batch, schedule, optimizer and augmentation, one thread and one loader worker
each, precision fp32. The score is the mean over the demo's five tasks, by our evaluation, of `open_clip/` (ours) and of
`epoch_1.pt` (theirs). The order of the samples differs, and theirs drops each pass's last partial batch. A seed draws
the initial weights of both, but the interval takes the two samples as independent: Welch's, Student's t, 95 %.

Progress goes to stderr, one JSON to stdout.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import torch  # noqa: E402

from benchmarks import open_clip_train as beside  # noqa: E402
from eval.evaluate import Checkpoint, evaluate  # noqa: E402
from eval.tasks import TaskData, resolve_tasks  # noqa: E402
from pipeline.core.errors import WinnowError  # noqa: E402
from pipeline.report.uncertainty import half_width, two_sided_p  # noqa: E402
from stages.ingest import demo_world  # noqa: E402
from training.recipe import RECIPES, Recipe  # noqa: E402

NUM_PAIRS = 10_000
NUM_TARS = 8
WAYS = ("ours", "open_clip")


def scores(source: dict, tasks: list[TaskData], folder: str) -> dict[str, float]:
    """{task: its main metric} of a trained model."""
    outs = [os.path.join(folder, "results", data.name) for data in tasks]
    found = {}
    for done in evaluate([Checkpoint(source, "demo", "parity")], tasks, [outs]):
        if done.facts is None:
            raise WinnowError(f"{done.data.name}: {done.error}")
        found[done.data.name] = done.facts["value"]
    return found


def train_and_score(
    way: str, recipe: Recipe, seed: int, train_set: str, tasks: list[TaskData], folder: str, environment: str
) -> dict[str, float]:
    """{task: its main metric} after a training of one way with one seed."""
    if way == "ours":
        out = os.path.join(folder, "ours")
        order = {"train_set": train_set, "out": out, "recipe": recipe.model_dump(mode="json"), "seed": seed}
        beside.run_ours({**order, "device": "cpu", "trim": True}, folder, 1)
        return scores({"folder": f"{out}/open_clip"}, tasks, folder)
    name = beside.write_model(dict(recipe.model), os.path.join(folder, "vit"))
    words = beside.open_clip_arguments(recipe, train_set, name, seed=seed, workers=1, device="cpu")
    beside.run_open_clip(words, folder, environment, 1)
    weights = f"{folder}/logs/run/checkpoints/epoch_1.pt"
    return scores({"architecture": recipe.model, "pretrained": weights}, tasks, folder)


def difference(ours: np.ndarray, theirs: np.ndarray) -> dict[str, float]:
    """{difference, half_width, p}: mean of ours minus theirs, its 95 % interval and test (Welch, Biometrika 1947)."""
    parts = np.array([each.var(ddof=1) / len(each) for each in (ours, theirs)])
    variance = parts.sum()
    df = variance**2 / (parts**2 / np.array([len(ours) - 1, len(theirs) - 1])).sum() if variance else 1.0
    gap = float(ours.mean() - theirs.mean())
    return {
        "difference": round(gap, 4),
        "half_width": round(half_width(variance, df), 4),
        "p": round(two_sided_p(gap, variance, df), 3),
    }


def main() -> None:
    """None; prints the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="2 or more")
    parser.add_argument("--samples", type=int, default=RECIPES["demo"].samples_seen, help="a multiple of the batch")
    parser.add_argument("--environment", help="a folder with webdataset <= 0.2.86; made with uv when not given")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    environment = beside.make_environment(arguments.environment)
    changes = {"crop_scale": [0.9, 1.0], "samples_seen": arguments.samples}
    recipe = Recipe(**{**RECIPES["demo"].model_dump(), **changes})
    found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        tasks = resolve_tasks(demo_world.write_tasks(f"{folder}/tasks", 0), f"{folder}/tasks")
        drawn = demo_world.pairs(NUM_PAIRS, 0, True, 0, NUM_PAIRS)
        pairs = ((row["image"], row["caption"]) for row in drawn)
        beside.write_train_set(f"{folder}/train_set", pairs, NUM_PAIRS, NUM_TARS)
        for seed in range(arguments.seeds):
            for way in WAYS:
                found[way].append(train_and_score(way, recipe, seed, f"{folder}/train_set", tasks, folder, environment))
                print(f"seed {seed} {way}: {found[way][-1]}", file=sys.stderr, flush=True)
    averages = {way: np.array([np.mean(list(one.values())) for one in found[way]]) for way in WAYS}
    record = {
        **vars(arguments),
        "average": {way: [round(float(value), 4) for value in averages[way]] for way in WAYS},
        "mean": {way: round(float(averages[way].mean()), 4) for way in WAYS},
        "average_difference": difference(*averages.values()),
        "task_differences": {
            data.name: difference(*(np.array([one[data.name] for one in found[way]]) for way in WAYS)) for data in tasks
        },
        "chance": {data.name: data.chance for data in tasks},
        "recipe": recipe.model_dump(mode="json"),
    }
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
