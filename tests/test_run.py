"""The whole job as a user runs it: in a subprocess, from the repository's root and from elsewhere."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time

import pyarrow.parquet as pq
import pytest

from pipeline import plan as planning
from pipeline.core import config
from pipeline.core.errors import ConfigError
from pipeline.run import parser, run
from tests.conftest import TINY
from tests.engine_fixture import run_here

pytestmark = pytest.mark.ray

ROOT = pathlib.Path(__file__).resolve().parent.parent
RECORD = "_artifact.json"


def test_the_leaderboard_is_printed_with_the_path_of_its_page(finished):
    _, done = finished
    for strategy in ("no_filter", "basic_and_clip", "trusted_only", "oracle"):
        assert strategy in done.stdout
    page = pathlib.Path(re.search(r"leaderboard: (.*\.html)", done.stdout).group(1))
    assert "<svg" in page.read_text()
    assert {path.name for path in page.parent.iterdir()} >= {
        "config.yaml", "plan.json", "log.jsonl", "run.json",
        "leaderboard.md", "leaderboard.json", "leaderboard.csv", "leaderboard.html",
    }  # fmt: skip


def test_counts_reconcile_and_every_failed_row_has_a_reason(finished):
    root, _ = finished
    pools = [path for path in pathlib.Path(root).glob("pool-*") if len(list(path.glob("*.tar"))) > 1]
    assert len(pools) == 1
    facts = json.loads((pools[0] / RECORD).read_text())["facts"]
    assert facts["rows"] == 240 == facts["ok_rows"] + sum(facts["failed"].values())
    rows = [row for path in pools[0].glob("*.parquet") for row in pq.read_table(path).to_pylist()]
    assert len({row["uid"] for row in rows}) == 240
    assert all(row["ok"] == (row["error"] is None) for row in rows)
    for selection in pathlib.Path(root).glob("selection-*"):
        funnel = json.loads((selection / RECORD).read_text())["facts"]["funnel"]
        for before, after in itertools.pairwise(funnel):
            assert after["rows_in"] == before["rows_kept"]


def test_a_second_run_has_nothing_to_do(winnow, finished):
    root, _ = finished
    before = winnow.artifacts(root)
    times = {path: path.stat().st_mtime_ns for path in pathlib.Path(root).glob(f"*/{RECORD}")}
    plan = winnow.run(root, "--plan")
    assert re.search(r"0 todo, 0 pending", plan.stdout), plan.stdout
    winnow.run(root)
    assert winnow.artifacts(root) == before
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_the_plan_says_what_changed(winnow, finished):
    root, _ = finished
    plan = winnow.run(root, "--plan", "--set", "recipes.tiny.lr=2e-3")
    line = next(line for line in plan.stdout.splitlines() if line.startswith("no_filter/seed0/train"))
    assert "todo" in line
    assert "recipe.lr: 0.001 -> 0.002" in line
    assert "pending" in next(line for line in plan.stdout.splitlines() if line.startswith("clip "))


def test_a_renamed_strategy_is_not_trained_again(winnow, finished):
    root, _ = finished
    renamed = ("strategies.everything={}", "compare=[everything, oracle]", "baseline=everything")
    plan = winnow.run(root, "--plan", *(word for setting in renamed for word in ("--set", setting)))
    assert "0 todo, 0 pending" in plan.stdout, plan.stdout


def test_the_report_is_rebuilt_from_records_alone(winnow, finished):
    root, _ = finished
    run = sorted(pathlib.Path(root).glob("runs/*/leaderboard.html"))[-1].parent
    before = {name: (run / name).read_bytes() for name in ("leaderboard.html", "leaderboard.json", "leaderboard.md")}
    for name in before:
        (run / name).unlink()
    winnow.run(root, "--report")
    assert {name: (run / name).read_bytes() for name in before} == before


def test_clean_lists_and_removes_only_what_no_run_refers_to(winnow, finished):
    root, _ = finished
    stray = pathlib.Path(root) / "pool-0123456789ab"
    stray.mkdir()
    (stray / "00000.tar").write_bytes(b"x")
    before = winnow.artifacts(root)
    assert "unused  pool-0123456789ab" in winnow.run(root, "--clean").stdout
    assert stray.exists()
    assert "removed  pool-0123456789ab" in winnow.run(root, "--clean", "--yes").stdout
    assert not stray.exists()
    assert winnow.artifacts(root) == before


@pytest.mark.parametrize(
    "more, message",
    [
        (["--set", "strategies.basic.where=['caption_wrds > 2']"], r"caption_wrds"),
        (["--set", "strategies.basic.top={column: clip_score, fraction: 1.5}"], r"fraction = 1\.5"),
        (["--set", "eval.tasks=[objcts]"], r"eval\.tasks\.0 = objcts, .*Did you mean objects"),
        (["--set", "train.recipe=smal"], r"train\.recipe = smal, expected a recipe\. Did you mean small"),
        (["--set", "models.scorer.on=basic_and_clip"], r"a cycle"),
        (["--set", "pool.source=/nothing/here"], r"/nothing/here"),
        (["--until", "selektion"], r"--until selektion: no such step"),
        (["--plan", "--report"], r"--plan and --report: expected one"),
        (["--yes"], r"--yes has no effect"),
    ],
)
def test_config_errors_come_before_any_work(winnow, tmp_path, more, message):
    options = parser().parse_args(winnow.command(tmp_path / "root", *more)[2:])
    with pytest.raises(ConfigError, match=message) as caught:
        run(options)
    assert caught.value.exit_code == 2 and "\n" not in str(caught.value)
    assert not (tmp_path / "root").exists()


def test_a_config_error_is_one_line_and_exits_2(winnow, tmp_path):
    done = winnow.run(tmp_path / "root", "--set", "stages=[caption_stat]", check=2)
    (line,) = done.stderr.strip().splitlines()
    assert re.search(r"stages\.0 = caption_stat, expected a stage\. Did you mean caption_stats", line)
    assert not (tmp_path / "root").exists()


def test_no_arguments_print_the_usage_and_the_demo():
    done = subprocess.run([sys.executable, str(ROOT / "pipeline" / "run.py")], capture_output=True, text=True)
    assert done.returncode == 0
    assert "--config configs/demo.yaml" in done.stdout


def test_a_failed_step_leaves_the_others_running_and_its_row_na(winnow, tmp_path):
    """A strategy that keeps nothing can't be trained: its row is N/A, the others are complete, the exit code is 1."""
    root = tmp_path / "root"
    settings = ("models={}", "references={}", "stages=[caption_stats]", "compare=[no_filter, none]")
    settings += ("strategies={no_filter: {}, none: {where: ['caption_words > 1000']}}", "eval.tasks=[colours]")
    done = winnow.run(root, *(word for setting in settings for word in ("--set", setting)), check=1)
    assert re.search(r"FAILED.*none/train_set: .*no row was selected", done.stderr + done.stdout)
    assert "N/A" in next(line for line in done.stdout.splitlines() if re.search(r"\bnone\b", line))
    board = json.loads(next(root.glob("runs/*/leaderboard.json")).read_text())
    average = {row["strategy"]: row["average"]["value"] for row in board["rows"]}
    assert average["none"] is None and average["no_filter"] is not None
    assert len(list(root.glob(f"checkpoint-*/{RECORD}"))) == 1


def started(command):
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )


def wait_for(root, pattern, process) -> bool:
    """Whether such a file is there; False: the run ended before anyone saw one."""
    end = time.monotonic() + 600
    while not list(root.glob(pattern)):
        if process.poll() is not None:
            return False
        assert time.monotonic() < end, "the run hangs"
        time.sleep(0.01)
    return True


def kill_at(root, pattern, command, unless=None) -> None:
    """SIGKILL of the driver and the Ray that it started, once such a file is there and before one like `unless` is.

    The moment may be missed where this process has to wait: then the artifact is made again.
    """
    for _ in range(5):
        process = started(command)
        was_seen = wait_for(root, pattern, process)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if was_seen and not (unless and list(root.glob(unless))):
            return
        for path in root.glob(pattern.partition("/")[0]):
            shutil.rmtree(path)
    raise AssertionError("the moment to kill the run was missed five times")


def test_a_killed_run_goes_on_to_the_same_bytes(winnow, finished, tmp_path):
    """SIGKILL in the middle of a training; the rerun's artifacts equal those of an uninterrupted run."""
    root = tmp_path / "root"
    more = ("--set", "compare=[basic_and_clip]", "--set", "baseline=basic_and_clip")
    kill_at(root, "checkpoint-*/step_*", winnow.command(root, *more))
    winnow.run(root, *more)
    made = winnow.artifacts(root)
    assert len([name for name in made if name.startswith("checkpoint-")]) == 2  # the scorer and the strategy's
    assert made.items() <= winnow.artifacts(finished[0]).items()
    assert not [path for path in root.glob("*-*/**/*.tmp-*") if path.is_file()]


@pytest.mark.slow
def test_deduplication_that_was_killed_goes_on_to_the_same_bytes(winnow, tmp_path):
    """SIGKILL of driver and workers in the middle of a stage's shards, and then between passes over the whole pool."""
    settings = {
        "stages": "[hashes, minhash, caption_duplicates, image_duplicates, pair_duplicates]",
        "strategies": "{once: {where: [pair_is_duplicate == false]}}",
        "compare": "[once]",
        "models": "{}",
    }
    more = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    more += ["--until", "once/selection"]
    whole, root = tmp_path / "whole", tmp_path / "root"
    plan = planning.build(config.load(str(TINY), [f"root={whole}", *more[1:-2:2]]), str(TINY))
    assert not run_here(plan, planning.targets(plan, "once/selection")).failures
    command = winnow.command(root, *more)
    kill_at(root, "hashes-*/00001.parquet", command)
    kill_at(root, "caption_duplicates-*/fit/work/keys/00000.arrow", command, f"caption_duplicates-*/{RECORD}")
    winnow.run(root, *more)
    assert winnow.artifacts(root) == winnow.artifacts(whole)
    assert {path.name.split("-")[0] for path in whole.glob("*_duplicates-*")} == {
        "caption_duplicates", "image_duplicates", "pair_duplicates",
    }  # fmt: skip
    assert not list(root.glob("*/fit/work"))


@pytest.mark.parametrize("sign, code", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_run_leaves_nothing_half_written(winnow, tmp_path, sign, code):
    root = tmp_path / "root"
    process = started(winnow.command(root))
    assert wait_for(root, "pool-*/00000.parquet", process)
    process.send_signal(sign)
    assert process.wait(timeout=300) == code
    time.sleep(1)
    assert not [path for path in root.glob("*-*/**/*.tmp-*") if path.is_file()]
    for record in root.glob(f"*/{RECORD}"):
        for name, entry in json.loads(record.read_text())["files"].items():
            assert (record.parent / name).stat().st_size == entry["bytes"]
