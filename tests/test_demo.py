"""The demo itself, once: its leaderboard's large gaps are real, and its filters find what was planted."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

pytestmark = pytest.mark.ray

ROOT = pathlib.Path(__file__).resolve().parent.parent
SEEDS = 2  # of the three that the demo has, as each takes a minute
COMPARED = "[no_filter, random_same_size, basic_and_clip, oracle]"  # tests/tiny.yaml has one of a reference, too


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(root, run.json, leaderboard.json, what was printed) of the demo."""
    root = tmp_path_factory.mktemp("demo") / "root"
    command = [
        sys.executable,
        "pipeline/run.py",
        "--config",
        "configs/demo.yaml",
        "--set",
        f"root={root}",
        "--set",
        f"train.seeds={list(range(SEEDS))}",
        "--set",
        f"compare={COMPARED}",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1500)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run = next(root.glob("runs/*/run.json"))
    board = json.loads((run.parent / "leaderboard.json").read_text())
    return root, json.loads(run.read_text()), board, done.stdout


def table(root, pattern):
    paths = [path for path in root.glob(pattern) if (path.parent / "_artifact.json").exists()]
    return {path.name: pq.read_table(path) for path in paths}


def test_the_oracle_is_above_no_filter_and_the_gap_is_significant(demo):
    _, _, board, printed = demo
    rows = {row["strategy"]: row for row in board["rows"]}
    assert len(rows) == 4
    assert all(row["average"]["value"] is not None for row in rows.values())
    assert rows["oracle"]["difference"]["verdict"] == "better"
    assert rows["oracle"]["average"]["value"] - rows["no_filter"]["average"]["value"] > 0.1
    assert rows["basic_and_clip"]["average"]["value"] > rows["random_same_size"]["average"]["value"]
    assert rows["basic_and_clip"]["kept_rows"] == rows["random_same_size"]["kept_rows"]
    assert "oracle" in printed


def test_the_oracle_clears_chance_by_five_standard_errors_on_every_task(demo):
    root, run, _, _ = demo
    for task in run["tasks"]:
        values, items = [], 0
        for result in run["results"]:
            if result["strategy"] == "oracle" and result["task"] == task["name"]:
                folder = root / result["path"]
                values.append(json.loads((folder / "result.json").read_text())["metrics"][task["metric"]])
                items = pq.read_metadata(folder / "predictions.parquet").num_rows
        assert len(values) == SEEDS
        # Of retrieval, chance is one image in 180, or three captions in 540.
        chance = task["chance"] if task["chance"] is not None else 1 / 180
        error = np.sqrt(chance * (1 - chance) / items)
        assert np.mean(values) > chance + 5 * error, (task["name"], values)


def test_filters_find_what_was_planted(demo):
    """Precision and recall of the basic rule and of the scorer against the truth column that no filter reads."""
    root, run, _, _ = demo
    pool = root / run["pool"]["path"]
    truth, kept = [], {name: [] for name in ("basic_and_clip", "random_same_size", "oracle")}
    for shard in sorted(pool.glob("*.parquet")):
        rows = pq.read_table(shard, columns=["ok", "truth_fault"])
        truth += [fault if ok else "failed" for ok, fault in zip(*(rows[c].to_pylist() for c in ("ok", "truth_fault")), strict=True)]  # fmt: skip
        for entry in run["strategies"]:
            if entry["name"] in kept:
                chosen = np.zeros(len(rows), bool)
                chosen[pq.read_table(root / entry["selection"] / shard.name)["row"].to_numpy()] = True
                kept[entry["name"]] += chosen.tolist()
    truth = np.array(truth)
    good = truth == ""
    chosen = {name: np.array(mask) for name, mask in kept.items()}
    precision = {name: good[mask].mean() for name, mask in chosen.items()}
    recall = {name: mask[good].mean() for name, mask in chosen.items()}
    print("precision", precision, "recall", recall)
    assert precision["oracle"] == recall["oracle"] == 1
    assert abs(precision["random_same_size"] - good[truth != "failed"].mean()) < 0.04
    assert precision["basic_and_clip"] > precision["random_same_size"] + 0.2
    assert recall["basic_and_clip"] > 1.5 * recall["random_same_size"]
    for fault in ("tiny", "extreme_aspect", "other_language"):  # what the basic rule is made for
        assert chosen["basic_and_clip"][truth == fault].mean() < 0.1, fault
