"""Run folders for tests of the report: real parquet and JSON files with simulated outcomes."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core.artifact import Artifact, finish

POOL_ROWS, POOL_OK, SAMPLES_SEEN = 10_000, 9_900, 16_000
# name: (fraction of the pool, ability in standard normal units, label, uses)
STRATEGIES = {
    "no_filter": (None, -0.9, "", ()),
    "random30": (0.3, -0.92, "", ()),
    "clip_top30": (0.3, -0.25, "", ("scorer: small CLIP trained on the trusted reference (3000 pairs)",)),
    "basic_and_clip": (0.21, -0.22, "", ("scorer: small CLIP trained on the trusted reference (3000 pairs)",)),
    "trusted_only": (0.05, -0.4, "", ("trusted reference: 3000 pairs",)),
    "planted_truth": (0.4, 0.5, "oracle", ("truth columns of the demo world",)),
}
TASKS = {
    "objects": ("zeroshot_classification", "acc1", 0.1),
    "objects_shifted": ("zeroshot_classification", "mean_per_class_recall", 0.1),
    "colours": ("zeroshot_classification", "acc5", 0.5),
    "retrieval": ("zeroshot_retrieval", "mean_recall@1", None),
}


def write_artifact(root: Path, kind: str, identity: dict, facts: dict, files: dict) -> str:
    artifact = Artifact(str(root), kind, identity)
    folder = root / artifact.name
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, folder / name)
        elif isinstance(content, np.ndarray):
            np.save(folder / name, content)
        else:
            (folder / name).write_text(content)
    finish(artifact, facts)
    return artifact.name


def write_selection(root: Path, name: str, fraction: float, uids: np.ndarray, rng) -> str:
    kept = int(POOL_OK * fraction)
    chosen = np.sort(rng.permutation(uids)[:kept], order=("f0", "f1"))
    funnel = [
        {"rule": "ok", "rows_in": POOL_ROWS, "rows_kept": POOL_OK},
        {"rule": "caption_words > 2", "rows_in": POOL_OK, "rows_kept": 8000},
        {"rule": f"top {fraction} by clip_score", "rows_in": 8000, "rows_kept": kept},
    ]
    facts = {"pool_rows": POOL_ROWS, "ok_rows": POOL_OK, "kept_rows": kept, "kept_samples": kept, "funnel": funnel}
    return write_artifact(root, "selection", {"name": name}, facts, {"uids.npy": chosen})


def predictions(kind: str, ability: float, rng, difficulty: np.ndarray, own: np.ndarray) -> tuple[pa.Table, dict]:
    """A probit model: item j is right when ability + difficulty_j + own_j + noise > 0."""
    right = ability + difficulty + own + rng.normal(size=len(difficulty)) > 0
    num = len(right)
    if kind != "zeroshot_retrieval":
        label = (np.arange(num) % 10).astype(np.int32)
        prediction = np.where(right, label, (label + 1) % 10).astype(np.int32)
        items = [f"item{j:05d}" for j in range(num)]
        second = np.where(rng.random(num) < 0.3, label, (label + 2) % 10).astype(np.int32)
        top5 = np.stack(
            [prediction, np.where(right, (label + 2) % 10, second), *[(label + c) % 10 for c in (3, 4, 5)]], 1
        )
        table = pa.table({"item": items, "label": label, "prediction": prediction, "correct": right})
        table = table.append_column("top5", pa.array(list(top5), pa.list_(pa.int32())))
        acc5 = (top5 == label[:, None]).any(axis=1).mean()
        per_class = [right[label == c].mean() for c in range(10)]
        return table, {"acc1": right.mean(), "acc5": acc5, "mean_per_class_recall": float(np.mean(per_class))}
    # five captions an image: rows 0..4 of each block of six start from a text, the last from the image
    direction = np.where(np.arange(num) % 6 < 5, "text_to_image", "image_to_text")
    group = np.arange(num) // 6
    table = pa.table({
        "item": [f"{g}/{j}" for j, g in enumerate(group)], "direction": direction,
        "group": [f"image{g:04d}" for g in group], "hit@1": right, "hit@5": right, "hit@10": right,
    })  # fmt: skip
    image, text = right[direction == "text_to_image"].mean(), right[direction == "image_to_text"].mean()
    metrics = {"image_retrieval_recall@1": image, "text_retrieval_recall@1": text, "mean_recall@1": (image + text) / 2}
    return table, metrics


def metrics_lines(ability: float, samples_seen: int, rng) -> str:
    """metrics.jsonl of a training: a loss that falls by what the ability is, recall on every fifth line."""
    lines = []
    for step in range(1, samples_seen // 64 + 1):
        loss = 1.6 - ability + 2.5 * np.exp(-step / 60) + rng.normal(0, 0.05)
        line = {"step": step, "samples_seen": step * 64, "loss": loss, "ln_batch": math.log(64), "lr": 1e-3}
        line |= {"chance_loss": math.log(64), "mutual_information_bound_nats": math.log(64) - loss, "logit_scale": 14.0}
        line |= {"grad_norm": None, "samples_per_s": 900.0, "data_wait_fraction": 0.25}
        if step % 5 == 0:
            line |= {"train_recall_at_1": 0.5, "held_out_recall_at_1": 0.4 if step * 64 == samples_seen else 0.1}
        lines.append(json.dumps(line) + "\n")
    return "".join(lines)


def write_run(
    root: Path,
    seeds=(0, 1, 2),
    strategies=STRATEGIES,
    tasks=TASKS,
    rename=None,
    num_items=600,
    budgets=(SAMPLES_SEEN,),
) -> Path:
    """A run folder; `rename` maps strategy and task names to others, to plant hostile ones.

    Each halving of the largest budget costs 0.3 of a strategy's ability.
    """
    rename = rename or {}
    rng = np.random.default_rng(7)
    uids = np.empty(POOL_OK, dtype="u8,u8")
    uids["f0"], uids["f1"] = rng.integers(0, 2**63, POOL_OK), rng.integers(0, 2**63, POOL_OK)
    difficulty = {task: np.repeat(rng.normal(0, 0.8, num_items // 6), 6) for task in tasks}
    data = {
        "config_name": "demo", "date": "2026-11-24T16:00:00Z", "winnow_version": "0.1.0", "metric_version": 1,
        "recipe": {"name": "demo", "samples_seen": SAMPLES_SEEN, "global_batch": 64, "model": {"embed_dim": 64}},
        "pool": {"path": "pool-3f2a91c0d4e7", "digest": "5d1e", "rows": POOL_ROWS, "ok": POOL_OK, "failed": {"undecodable": 100}},
        "strategies": [], "tasks": [], "trainings": [], "results": [], "baseline": "no_filter",
        "recipe_values": {"samples_seen": max(budgets), "lr": 1e-3, "model": {"embed_dim": 64}},
    }  # fmt: skip
    for task, (kind, metric, chance) in tasks.items():
        name = rename.get(task, task)
        data["tasks"].append({
            "name": name, "type": kind, "metric": metric, "chance": chance, "group": "", "in_domain": task == "colours",
            "title": name.capitalize() if name == task else name, "digest": f"digest of {task}",
        })  # fmt: skip
    for strategy, (fraction, ability, label, uses) in strategies.items():
        name = rename.get(strategy, strategy)
        selection = None if fraction is None else write_selection(root, strategy, fraction, uids, rng)
        data["strategies"].append({
            "name": name, "selection": selection, "train_set": f"train_set-{len(name):012x}", "compared": True,
            "label": label, "uses": [rename.get(use, use) for use in uses], "error": None,
        })  # fmt: skip
        own = {task: rng.normal(0, 0.4, num_items) for task in tasks}
        for samples_seen, seed in itertools.product(budgets, seeds):
            kept = POOL_OK if fraction is None else int(POOL_OK * fraction)
            now = ability - 0.3 * np.log2(max(budgets) / samples_seen)
            facts = {"samples_seen": samples_seen, "wall_s": 18.0, "gpu_hours": 0.0, "cpu_hours": 0.005}
            facts |= {"unique_uids": min(kept, samples_seen), "max_repeats": -(-samples_seen // kept)}
            facts |= {"samples_per_s": 900.0, "data_wait_fraction": 0.25, "warnings": []}
            facts |= {"train_recall_at_1": 0.5, "held_out_recall_at_1": 0.4 + 0.01 * seed}
            training = {"strategy": name, "samples_seen": samples_seen, "seed": seed}
            identity = training | {"strategy": strategy}
            checkpoint = write_artifact(
                root, "checkpoint", identity, facts, {"metrics.jsonl": metrics_lines(now, samples_seen, rng)}
            )
            data["trainings"].append({**training, "checkpoint": checkpoint, "error": None})
            luck = rng.normal(0, 0.08)
            for task, (kind, _, _) in tasks.items():
                table, metrics = predictions(kind, now + luck, rng, difficulty[task], own[task])
                result = {"dataset": task, "model": "demo", "pretrained": checkpoint, "task": kind, "language": "en"}
                result["metrics"] = {key: float(value) for key, value in metrics.items()}
                files = {"result.json": json.dumps(result), "predictions.parquet": table}
                path = write_artifact(root, "results", identity | {"task": task}, {}, files)
                data["results"].append({**training, "task": rename.get(task, task), "path": path, "error": None})
    run = root / "runs" / "2026-11-24T16-00-00Z_demo"
    run.mkdir(parents=True)
    (run / "run.json").write_text(json.dumps(data))
    (run / "config.yaml").write_text("root: runs\nstrategies:\n  no_filter: {}\n")
    return run


def edit_run(run: Path, change) -> None:
    data = json.loads((run / "run.json").read_text())
    change(data)
    (run / "run.json").write_text(json.dumps(data))
