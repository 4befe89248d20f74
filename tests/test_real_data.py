"""`configs/folder.yaml` as a user runs it on real photos: Flickr8k and CIFAR-10 pairs, a third of them mismatched."""

from __future__ import annotations

import csv
import hashlib
import json
import os
import pathlib
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from benchmarks.planted_faults import PHRASES

pytestmark = pytest.mark.ray

ROOT = pathlib.Path(__file__).resolve().parent.parent
MISMATCHED_OF_1000 = 330
PHOTOS = 1500
SMALL_PICTURES = 3000


def draw(text: str, below: int) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % below


def write_photos(folder: pathlib.Path, data: pathlib.Path) -> int:
    """How many pairs are mismatched on purpose; the folder has the images and captions.csv."""
    pairs = []
    for shard in sorted((data / "captions_pool/flickr8k/train").glob("*.parquet")):
        for row in pq.read_table(shard, columns=["key", "captions", "image"]).to_pylist():
            if len(pairs) < PHOTOS:
                pairs.append((f"flickr-{row['key']}.jpg", row["captions"][draw(row["key"], 5)], row["image"]))
    table = pq.read_table(data / "zeroshot/cifar10/train/0.parquet", columns=["key", "classname", "image"])
    for row in table.slice(0, SMALL_PICTURES).to_pylist():
        phrase = PHRASES[draw(row["key"], len(PHRASES))]
        pairs.append((f"cifar-{row['key']}.jpg", phrase.format(row["classname"]), row["image"]))
    folder.mkdir()
    mismatched = 0
    with open(folder / "captions.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["file_name", "caption"])
        for name, caption, image in pairs:
            (folder / name).write_bytes(image)
            if draw("swap" + name, 1000) < MISMATCHED_OF_1000:
                caption = pairs[draw("with" + name, len(pairs))][1]
                mismatched += 1
            writer.writerow([name, caption])
    return mismatched


@pytest.mark.real_data
def test_the_whole_job_on_a_folder_of_real_photos(real_data_path, tmp_path):
    photos = tmp_path / "photos"
    assert write_photos(photos, real_data_path) > 1000
    tasks = [
        {"name": "cifar10_sample", "path": str(real_data_path / "zeroshot/cifar10"), "in_domain": True},
        {
            "name": "caltech101_sample",
            "path": str(real_data_path / "zeroshot/caltech101"),
            "metric": "mean_per_class_recall",
        },
        {"name": "flickr8k", "path": str(real_data_path / "retrieval/flickr8k")},
    ]
    settings = {
        "root": str(tmp_path / "root"),
        "pool.source": json.dumps({"path": str(photos), "captions": "captions.csv"}),
        "eval.tasks": json.dumps(tasks),
        "compare": "[no_filter, basic_and_clip]",
        "train.seeds": "[0]",
        "recipes.folder.samples_seen": os.environ.get("WINNOW_TEST_SAMPLES", "6400"),
    }
    command = [sys.executable, "pipeline/run.py", "--config", "configs/folder.yaml"]
    for key, value in settings.items():
        command += ["--set", f"{key}={value}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1200)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    root = tmp_path / "root"
    board = json.loads(next(root.glob("runs/*/leaderboard.json")).read_text())
    assert {row["strategy"] for row in board["rows"]} == {"no_filter", "basic_and_clip"}
    run = json.loads(next(root.glob("runs/*/run.json")).read_text())
    assert run["pool"]["rows"] == PHOTOS + SMALL_PICTURES == run["pool"]["ok"] + sum(run["pool"]["failed"].values())
    scores: dict[tuple[str, str], list[float]] = {}
    for result in run["results"]:
        metrics = json.loads((root / result["path"] / "result.json").read_text())["metrics"]
        task = next(task for task in run["tasks"] if task["name"] == result["task"])
        scores.setdefault((result["strategy"], result["task"]), []).append(metrics[task["metric"]])
    # CIFAR-10 is in the pool: every strategy learns something of it, far above the chance of 0.1.
    for name in ("no_filter", "basic_and_clip"):
        values = scores[name, "cifar10_sample"]
        assert sum(values) / len(values) > 0.14, (name, values)
