"""The command of `python -m eval`: checkpoints on tasks, without a run and without a cluster.

    RESULTS/<checkpoint>/<task>/result.json           CLIP_benchmark's schema
    RESULTS/<checkpoint>/<task>/predictions.parquet   a row for each question that was asked
    RESULTS/<checkpoint>/<task>/identity              what both were made from; written last

A pair of a checkpoint and a task is finished when its `identity` is that of the same weights, the same task files and
the same METRIC_VERSION. Finished pairs are not evaluated again.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from eval import winogavil
from eval.evaluate import PREDICTIONS_FILE, RESULT_FILE, Checkpoint, evaluate
from eval.folders import CAPTIONS_FILE
from eval.tasks import METRIC_VERSION, SHARDS_FILE, TASKS, TaskData, folder_names, resolve_task, task_digest
from pipeline.core import clip_model, storage
from pipeline.core.artifact import canonical_json
from pipeline.core.errors import ConfigError, WinnowError

IDENTITY_FILE = "identity"  # no .json: CLIP_benchmark's `build` takes every .json of a folder for a result
MODEL_FOLDER = "open_clip"  # in the artifact of a checkpoint


@dataclass(frozen=True)
class Candidate:
    """A checkpoint of the command line. `name` is that of its folder of results, `digest` identifies its weights."""

    name: str
    checkpoint: Checkpoint
    digest: str


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    made = argparse.ArgumentParser(
        prog="python -m eval",
        description="Evaluates CLIP checkpoints on tasks: zero-shot classification and retrieval.",
        allow_abbrev=False,
    )
    made.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="a model folder (open_clip_config.json and weights), a finished training's folder with an open_clip/ in "
        "it, or ARCHITECTURE,TAG_OR_FILE as in ViT-B-32,openai",
    )
    made.add_argument("--root", required=True, metavar="TASKS", help="the folder of the tasks' folders, a path or URL")
    made.add_argument("--tasks", nargs="+", metavar="TASK", help="names of tasks; else every task below the root")
    made.add_argument("--out", required=True, metavar="RESULTS", help="the folder to write to, a path or URL")
    made.add_argument("--device", help="cpu or cuda; else cuda where there is one")
    made.add_argument("--threads", type=int, help="that decode and compute; else one a core")
    made.add_argument("--batch-size", type=int, help="images or texts of a forward pass")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command line."""
    options = parser().parse_args(arguments)
    try:
        device, threads = _resources(options)
        tasks = find_tasks(options.root, options.tasks)
        candidates = [find_checkpoint(text) for text in options.checkpoints]
        names = [one.name for one in candidates]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"CHECKPOINT: {names.count(name)} are called {name}, expected names that differ")
        out = storage.absolute(options.out)
        storage.check_writable(out, "--out")
    except WinnowError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return run(candidates, tasks, out, device, threads, options.batch_size)


def _resources(options: argparse.Namespace) -> tuple[str, int]:
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.partition(":")[0] not in ("cpu", "cuda"):
        raise ConfigError(f"--device = {device}, expected cpu or cuda")
    if device != "cpu" and not torch.cuda.is_available():
        raise ConfigError(f"--device = {device}, expected cpu: there is no CUDA device here")
    for name in ("threads", "batch_size"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} = {value}, expected at least 1")
    return device, options.threads or len(os.sched_getaffinity(0))


def find_tasks(root: str, names: Sequence[str] | None) -> list[TaskData]:
    """The tasks with their files and digests.

    Args:
        names: of the tasks; None: every folder directly below the root, or one further down, that is one.

    Raises:
        ConfigError: one line that says what is missing where.
    """
    found, problems = [], []
    for name in names if names is not None else _names_of_tasks(storage.absolute(root)):
        try:
            data = resolve_task(name, root, "--tasks")
            if any(data.name == other.name for other in found):
                raise ConfigError(f"--tasks = {data.name} twice, expected each task once")
            found.append(replace(data, digest=task_digest(data)))
        except ConfigError as error:
            problems.append(str(error))
    if problems:
        raise ConfigError("; ".join(problems))
    if not found:
        raise ConfigError(f"--root = {root}, expected a folder that holds folders with {SHARDS_FILE}; there are none")
    return found


def _names_of_tasks(root: str) -> list[str]:
    """Names of what is a task below the root: a known task's own, else the folder's."""
    known = {folder: name for name in TASKS for folder in reversed(folder_names(name))}
    found, others = [], []
    for folder in storage.list_folders(root):
        inner = [folder]
        if not _is_task(storage.join(root, folder)):
            inner = [f"{folder}/{below}" for below in storage.list_folders(storage.join(root, folder))]
        of_folder = [known.get(one, one) for one in inner if one == folder or _is_task(storage.join(root, one))]
        found += of_folder
        others += [folder] if not of_folder and _may_be_plain(storage.join(root, folder)) else []
    if others:
        print(
            f"left out, as they have no {SHARDS_FILE}: {', '.join(others)}; --tasks names a plain folder",
            file=sys.stderr,
        )
    return list(dict.fromkeys(found))


def _may_be_plain(folder: str) -> bool:
    """True for what could be a plain folder of images, which only its name makes a task."""
    return bool(storage.list_folders(folder)) or storage.exists(storage.join(folder, CAPTIONS_FILE))


def _is_task(folder: str) -> bool:
    return any(storage.exists(storage.join(folder, file)) for file in (SHARDS_FILE, winogavil.QUESTIONS_FILE))


def find_checkpoint(text: str) -> Candidate:
    """The checkpoint that a word of the command line means. Cost: its weights are read once.

    Raises:
        ConfigError: there is none.
    """
    path = storage.absolute(text)
    for folder in (path, storage.join(path, MODEL_FOLDER)):
        if storage.exists(storage.join(folder, clip_model.CONFIG_FILE)):
            return _model_folder(text, folder)
    architecture, comma, pretrained = text.partition(",")
    if not comma:
        raise ConfigError(
            f"CHECKPOINT = {text}, expected a model folder with {clip_model.CONFIG_FILE}, a folder with such an "
            f"{MODEL_FOLDER}/ in it, or ARCHITECTURE,TAG_OR_FILE"
        )
    clip_model.check_architecture(architecture, "CHECKPOINT")
    identity: dict[str, Any] = {"architecture": architecture}
    if storage.exists(storage.absolute(pretrained)):
        pretrained = storage.absolute(pretrained)
        identity["sha256"] = storage.sha256_file(pretrained)
    else:
        clip_model.check_tag(architecture, pretrained, f"CHECKPOINT = {text}: weights")
        identity["tag"] = pretrained
    name = storage.name_of(pretrained)
    checkpoint = Checkpoint({"architecture": architecture, "pretrained": pretrained}, architecture, name)
    return Candidate(f"{architecture},{name}".replace("/", "-"), checkpoint, _digest(identity))


def _model_folder(text: str, folder: str) -> Candidate:
    files = storage.list_files(folder)
    if not any(name.endswith(clip_model.WEIGHTS_SUFFIXES) for name in files):
        raise ConfigError(f"CHECKPOINT = {text}: {folder} has no weights, expected {clip_model.WEIGHTS_FILE}")
    name = storage.name_of(folder)
    if name == MODEL_FOLDER:
        name = storage.name_of(folder.rsplit("/", 1)[0])
    identity = {file: storage.sha256_file(storage.join(folder, file)) for file in files}
    return Candidate(name, Checkpoint({"folder": folder}, "custom", name), _digest(identity))


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def run(
    candidates: Sequence[Candidate],
    tasks: Sequence[TaskData],
    out: str,
    device: str = "cpu",
    threads: int = 1,
    batch_size: int | None = None,
) -> int:
    """0 when every pair is finished, else 1. Prints a line for each that fails, the table, and where the time went."""
    start_s = time.perf_counter()
    identities = {(one.name, data.name): _identity(one, data) for one in candidates for data in tasks}
    paths = {(name, task): storage.join(out, name, task) for name, task in identities}
    is_done = {pair: _is_finished(paths[pair], identities[pair]) for pair in identities}
    for pair, done in is_done.items():
        if not done:
            storage.delete(storage.join(paths[pair], IDENTITY_FILE))
    left = [one for one in candidates if not all(is_done[one.name, data.name] for data in tasks)]
    out_paths = [
        [None if is_done[one.name, data.name] else paths[one.name, data.name] for data in tasks] for one in left
    ]
    num_left = sum(not done for done in is_done.values())
    print(
        f"{num_left} of {len(is_done)} pairs of a checkpoint and a task to evaluate, "
        f"on {device} with {threads} thread{'s' if threads > 1 else ''}",
        file=sys.stderr,
    )
    spent_s = forward_s = 0.0
    failed = set()
    pair_of = {path: pair for pair, path in paths.items()}
    evaluated = evaluate(
        [one.checkpoint for one in left], tasks, out_paths, device=device, batch_size=batch_size, threads=threads
    )
    for found in evaluated if left else ():
        pair = pair_of[found.out_path]
        if found.facts is None:
            failed.add(pair)
            print(f"{pair[0]} on {pair[1]} failed: {found.error}", file=sys.stderr)
            continue
        storage.write_bytes(storage.join(found.out_path, IDENTITY_FILE), identities[pair])
        spent_s += found.facts["seconds"]
        forward_s += found.facts["forward_s"]
    print(table([one.name for one in candidates], tasks, out, failed))
    if num_left > len(failed):
        print(
            f"{num_left - len(failed)} pairs in {time.perf_counter() - start_s:.1f} s; forward passes took "
            f"{forward_s:.1f} s of the threads' {spent_s:.1f} s, {100 * forward_s / spent_s:.0f} %"
        )
    if failed:
        print(f"error: {len(failed)} of {len(is_done)} pairs failed", file=sys.stderr)
    return 1 if failed else 0


def _identity(candidate: Candidate, data: TaskData) -> bytes:
    return f"metric_version {METRIC_VERSION}\ntask {data.digest}\ncheckpoint {candidate.digest}\n".encode()


def _is_finished(path: str, identity: bytes) -> bool:
    names = (IDENTITY_FILE, RESULT_FILE, PREDICTIONS_FILE)
    return all(storage.exists(storage.join(path, name)) for name in names) and (
        storage.read_bytes(storage.join(path, IDENTITY_FILE)) == identity
    )


def table(names: Sequence[str], tasks: Sequence[TaskData], out: str, failed: set[tuple[str, str]]) -> str:
    """The main metrics in percent as lines of text: a row for each task and the average, a column for each checkpoint.

    A task without a main metric has none here. The average is left out where a task of the checkpoint failed.
    """
    counted = [data for data in tasks if data.task.metric is not None]
    value: dict[tuple[str, str], float | None] = {}
    for name in names:
        for data in counted:
            pair = (name, data.name)
            path = storage.join(out, *pair, RESULT_FILE)
            value[pair] = None if pair in failed else storage.read_json(path)["metrics"][data.task.metric]
    rows = [["task", "metric", *names]]
    for data in counted:
        rows.append([data.name, data.task.metric or "", *(_percent(value[name, data.name]) for name in names)])
    averages = []
    for name in names:
        of_name = [value[name, data.name] for data in counted]
        averages.append(None if None in of_name or not of_name else sum(map(float, of_name)) / len(of_name))
    rows.append([f"average of {len(counted)}", "", *map(_percent, averages)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f}"
