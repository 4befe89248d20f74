"""What the report says of trainings: their curves, what they did, warnings, and scores against samples seen."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pytest

from pipeline.report import build_report, make_leaderboard, read_run, terminal_table, trainings
from tests.report_fixture import SAMPLES_SEEN, STRATEGIES, edit_run, write_run

FEW = {name: STRATEGIES[name] for name in ("no_filter", "clip_top30", "random30")}
BUDGETS = (SAMPLES_SEEN // 4, SAMPLES_SEEN)


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("root"), strategies=FEW, budgets=BUDGETS)


@pytest.fixture(scope="module")
def board(several):
    return build_report(str(several))


def checkpoints(run: Path, strategy: str, samples_seen: int = SAMPLES_SEEN) -> list[Path]:
    """The checkpoint of each seed."""
    entries = json.loads((run / "run.json").read_text())["trainings"]
    wanted = (strategy, samples_seen)
    return [run.parents[1] / one["checkpoint"] for one in entries if (one["strategy"], one["samples_seen"]) == wanted]


def lines_of(checkpoint: Path) -> list[dict]:
    return [json.loads(line) for line in (checkpoint / "metrics.jsonl").read_text().splitlines()]


def rewrite(checkpoint: Path, change) -> None:
    """None; the metrics after change(lines)."""
    lines = lines_of(checkpoint)
    change(lines)
    (checkpoint / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def section(html: str, title: str) -> str:
    return next(part for part in html.split("<section>") if part.startswith(f"<h2>{title}</h2>"))


def test_the_main_table_is_the_largest_budget(board, several):
    assert board.samples_seen == SAMPLES_SEEN
    assert [part.samples_seen for part in board.smaller] == [SAMPLES_SEEN // 4]
    alone = make_leaderboard(read_run(str(several)).at(SAMPLES_SEEN))
    assert [row.average for row in alone.rows] == [row.average for row in board.rows]
    assert alone.headline == board.headline
    for row in board.rows:
        assert row.seeds_planned == len(row.checkpoints) == 3
        assert row.samples_seen == SAMPLES_SEEN
    smaller = {row.strategy.name: row for row in board.smaller[0].rows}
    for row in board.rows:  # a quarter of the samples costs two thirds of a standard deviation of ability
        assert smaller[row.strategy.name].average.value < row.average.value - 0.1


def test_scores_of_each_budget_are_in_every_format(board, several):
    rows = list(csv.DictReader(io.StringIO((several / "leaderboard.csv").read_text())))
    assert [row["samples_seen"] for row in rows] == [str(SAMPLES_SEEN)] * 3 + [str(SAMPLES_SEEN // 4)] * 3
    data = json.loads((several / "leaderboard.json").read_text())
    (smaller,) = data["smaller_budgets"]
    assert smaller["samples_seen"] == SAMPLES_SEEN // 4
    assert [float(row["average"]) for row in rows[3:]] == [row["average"]["value"] for row in smaller["rows"]]
    assert {result["samples_seen"] for result in data["results"]} == set(BUDGETS)
    best = board.rows[1]
    small = next(row for row in board.smaller[0].rows if row.strategy.name == best.strategy.name)
    texts = [f"{100 * row.average.value:.1f} ± {100 * row.average.half_width:.1f}" for row in (small, best)]
    line = f"| {best.strategy.name} | {texts[0]} | {texts[1]} |"
    markdown = (several / "leaderboard.md").read_text()
    assert "## Score against samples seen" in markdown
    assert "| strategy | 4,000 samples | 16,000 samples |" in markdown
    assert line in markdown
    html = section((several / "leaderboard.html").read_text(), "Score against samples seen")
    assert all(text in html for text in texts)
    plot = ElementTree.fromstring(re.search(r"<svg.*?</svg>", html, flags=re.DOTALL)[0])
    assert len(plot.findall(".//circle")) == 6
    assert len(plot.findall(".//path")) == 3
    assert {"4k", "16k"} <= {text.text for text in plot.findall("text")}


def test_a_budget_that_was_not_reached_is_na_and_the_others_stay(several, tmp_path):
    run = write_run(tmp_path, strategies=FEW, budgets=BUDGETS, seeds=(0, 1))

    def change(data):
        data["results"] = [
            one for one in data["results"] if (one["strategy"], one["samples_seen"]) != ("random30", SAMPLES_SEEN // 4)
        ]

    edit_run(run, change)
    board = build_report(str(run))
    names, body = trainings.budget_cells(board)
    assert names == ["strategy", "4,000 samples", "16,000 samples"]
    cells = {line[0]: line[1:] for line in body}
    assert cells["random30"][0] == "N/A"
    assert "±" in cells["random30"][1]
    html = section((run / "leaderboard.html").read_text(), "Score against samples seen")
    assert html.count("<circle") == 5


def test_curves_are_means_over_seeds_of_at_most_200_points(board, several):
    (found,) = [curve for curve in trainings.curves(board, "loss") if curve.strategy == "clip_top30"]
    lines = [lines_of(path) for path in checkpoints(several, "clip_top30")]
    assert len(lines[0]) == 250
    assert len(found.mean[0]) == trainings.MAX_CURVE_POINTS
    assert [len(x) for x, _ in found.seeds] == [trainings.MAX_CURVE_POINTS] * 3
    losses = np.array([[line["loss"] for line in seed] for seed in lines])
    # 250 steps in 200 bins: four of five bins hold one step, each fifth holds two
    steps_of_bin = np.arange(250) * 200 // 250
    expected = [losses[:, steps_of_bin == number].mean() for number in range(200)]
    assert found.mean[1] == pytest.approx(expected)
    assert found.seeds[1][1] == pytest.approx([losses[1, steps_of_bin == number].mean() for number in range(200)])
    recall = trainings.curves(board, "held_out_recall_at_1")
    assert [len(curve.mean[0]) for curve in recall] == [50] * 3  # on every fifth line
    assert trainings.curves(board, "never_measured") == []


def test_lines_without_a_number_are_left_out_of_curves(tmp_path):
    run = write_run(tmp_path, strategies={"no_filter": STRATEGIES["no_filter"]}, seeds=(0,))

    def change(lines):
        del lines[100:]
        lines[3]["loss"], lines[4]["loss"], lines[5]["loss"] = None, math.nan, "much"
        del lines[6]["samples_seen"]

    rewrite(checkpoints(run, "no_filter")[0], change)
    (curve,) = trainings.curves(build_report(str(run)), "loss")
    assert len(curve.mean[0]) == 96
    assert np.isfinite(curve.mean[1]).all()


@pytest.mark.parametrize(
    "values, text",
    [
        ({}, "guessing: ln(64) = 4.16"),
        ({"chance_loss": math.log(8), "ln_batch": math.log(8)}, "guessing: ln(8) = 2.08"),  # seven negatives
        ({"chance_loss": 5.15, "ln_batch": None}, "guessing: 5.15"),  # SigLIP
        ({"chance_loss": None, "ln_batch": None}, None),
    ],
)
def test_the_loss_is_drawn_beside_what_guessing_gives(tmp_path, values, text):
    run = write_run(tmp_path, strategies={"no_filter": STRATEGIES["no_filter"]}, seeds=(0,), num_items=60)

    def change(lines):
        for line in lines:
            line |= values
        if text is not None:  # the last batch is smaller
            lines[-1] |= {"chance_loss": 0.1, "ln_batch": lines[-1]["ln_batch"] and 0.1}

    rewrite(checkpoints(run, "no_filter")[0], change)
    build_report(str(run))
    html = section((run / "leaderboard.html").read_text(), "Training curves")
    assert re.findall("guessing: [^<]*", html) == ([] if text is None else [text])


def test_the_table_says_what_the_trainings_did(board, several):
    found = {did.strategy: did for did in trainings.what_they_did(board)}["clip_top30"]
    lines = [lines_of(path) for path in checkpoints(several, "clip_top30")]
    final = np.mean([line["loss"] for seed in lines for line in seed[-25:]])
    assert found.final_loss == pytest.approx(final)
    assert found.bound_nats == pytest.approx(math.log(64) - final)
    assert (found.unique_uids, found.max_repeats) == (2970, 6)
    assert found.repeats == pytest.approx(SAMPLES_SEEN / 2970)
    assert (found.train_recall, found.held_out_recall) == (0.5, pytest.approx(0.41))  # over seeds
    assert (found.samples_per_s, found.data_wait_fraction, found.warnings) == (900.0, pytest.approx(0.25), ())
    names, body = trainings.did_cells(board)
    cells = dict(zip(names, next(line for line in body if line[0] == "clip_top30"), strict=True))
    assert cells["repeats"] == "5.39, at most 6"
    assert cells["held-out recall@1"] == "41.0 %"
    assert cells["data wait"] == "25.0 %"
    assert "warnings" not in names  # there are none
    markdown = (several / "leaderboard.md").read_text()
    assert "## What the trainings did" in markdown
    record = json.loads((several / "leaderboard.json").read_text())["trainings"]["clip_top30"]
    assert record["final_loss"] == pytest.approx(final, rel=1e-7)
    assert record["warnings"] == []


def test_a_loss_that_bounds_nothing_has_no_bound(tmp_path):
    run = write_run(tmp_path, strategies={"no_filter": STRATEGIES["no_filter"]}, seeds=(0,), num_items=60)
    rewrite(
        checkpoints(run, "no_filter")[0],
        lambda lines: [line.update(mutual_information_bound_nats=None) for line in lines],
    )
    names, _ = trainings.did_cells(build_report(str(run)))
    assert "final loss" in names
    assert "ln N - loss" not in names


def test_the_loss_of_a_smaller_last_batch_is_left_out(tmp_path):
    run = write_run(tmp_path, strategies={"no_filter": STRATEGIES["no_filter"]}, seeds=(0,), num_items=60)
    (path,) = checkpoints(run, "no_filter")
    smaller = {"chance_loss": math.log(4), "ln_batch": math.log(4), "loss": 0.01, "mutual_information_bound_nats": 1.4}
    rewrite(path, lambda lines: lines[-1].update(smaller))
    board = build_report(str(run))
    whole = [line["loss"] for line in lines_of(path)[:-1]]
    (curve,) = trainings.curves(board, "loss")
    assert curve.mean[0][-1] <= 249 * 64
    assert curve.mean[1].min() >= min(whole)
    (did,) = trainings.what_they_did(board)
    assert did.final_loss == pytest.approx(np.mean(whole[-25:]))
    assert did.bound_nats == pytest.approx(math.log(64) - did.final_loss)
    (recall,) = trainings.curves(board, "held_out_recall_at_1")
    assert recall.mean[0][-1] == SAMPLES_SEEN  # which does not depend on the batch


def test_alarms_and_warnings_are_said_once_with_their_seeds(tmp_path):
    run = write_run(tmp_path, strategies=FEW, num_items=60)
    alarm = "the loss stays within 1 % of <b>ln N</b>"
    warmup = "warmup_steps = 500 exceeds the 250 steps"
    warned = {path: [warmup] for name in ("no_filter", "clip_top30") for path in checkpoints(run, name)}
    warned |= {path: [alarm, alarm] for path in checkpoints(run, "random30")[1:]}
    for path, texts in warned.items():
        record = json.loads((path / "_artifact.json").read_text())
        record["facts"]["warnings"] = texts
        (path / "_artifact.json").write_text(json.dumps(record))
    board = build_report(str(run))
    assert trainings.warning_lines(board) == [
        "no_filter, clip_top30: warmup_steps = 500 exceeds the 250 steps",
        f"random30: seeds 1, 2: {alarm}",
    ]
    names, body = trainings.did_cells(board)
    assert [line[names.index("warnings")] for line in body] == ["1", "1", "1"]
    text = terminal_table(board)
    assert text.count(alarm) == 1
    html = section((run / "leaderboard.html").read_text(), "What the trainings did")
    assert "random30: seeds 1, 2: the loss stays within 1 % of &lt;b&gt;ln N" in html


def test_a_run_whose_trainings_have_no_metrics_has_no_curves(tmp_path):
    run = write_run(tmp_path, strategies=FEW, seeds=(0, 1), num_items=60)
    for path in Path(tmp_path).glob("checkpoint-*/metrics.jsonl"):
        path.unlink()
    board = build_report(str(run))
    assert board.rows[0].average.value is not None
    html = (run / "leaderboard.html").read_text()
    assert "No metrics yet." in section(html, "Training curves")
    names, _ = trainings.did_cells(board)
    assert "final loss" not in names
    assert "distinct samples" in names
