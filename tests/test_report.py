"""The report on run folders of report_fixture.py: rows, differences, what is said, and how it is written."""

from __future__ import annotations

import base64
import csv
import dataclasses
import hashlib
import io
import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core.errors import WinnowError
from pipeline.report import build_report, make_leaderboard, markup, plots, read_run, terminal_table
from pipeline.report.leaderboard import percent
from pipeline.report.page import html_page
from pipeline.report.tables import places_text
from pipeline.report.trainings import version_lines
from pipeline.report.uncertainty import wilson
from tests.report_fixture import SAMPLES_SEEN, STRATEGIES, TASKS, edit_run, write_artifact, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("root"))


@pytest.fixture(scope="module")
def board(run):
    return build_report(str(run))


def row_of(board, name):
    return next(row for row in board.rows if row.strategy.name == name)


def test_baseline_is_row_0_then_by_average(board):
    assert [row.rank for row in board.rows] == list(range(6))
    assert board.rows[0].strategy.name == "no_filter"
    averages = [row.average.value for row in board.rows[1:]]
    assert averages == sorted(averages, reverse=True)


def test_average_is_the_mean_of_tasks_and_seeds(board, run):
    data = json.loads((run / "run.json").read_text())
    metric = {task["name"]: task["metric"] for task in data["tasks"]}
    values = [
        json.loads((run.parents[1] / r["path"] / "result.json").read_text())["metrics"][metric[r["task"]]]
        for r in data["results"]
        if r["strategy"] == "clip_top30"
    ]
    assert len(values) == 12
    assert row_of(board, "clip_top30").average.value == pytest.approx(np.mean(values), abs=1e-12)


def test_planted_gaps_are_found_and_equals_tie(board):
    assert row_of(board, "clip_top30").difference.verdict == "better"
    assert row_of(board, "basic_and_clip").difference.verdict == "better"
    assert row_of(board, "random30").difference.verdict == "tie"
    assert row_of(board, "no_filter").standing == row_of(board, "random30").standing == "not best"
    assert row_of(board, "planted_truth").standing == "oracle"
    # abilities -0.25 and -0.22 with a seed noise of 0.08: neither excludes the other
    assert {row_of(board, name).standing for name in ("clip_top30", "basic_and_clip")} == {"could be best"}
    assert "tie" in board.headline
    assert "planted_truth" not in board.headline


def test_a_clear_winner_is_named_with_its_margin(tmp_path):
    strategies = {name: STRATEGIES[name] for name in ("no_filter", "clip_top30")} | {"sharp": (0.2, 0.8, "", ())}
    board = make_leaderboard(read_run(str(write_run(tmp_path, strategies=strategies))))
    assert row_of(board, "sharp").standing == "best"
    number = r"\d+\.\d"
    expected = (
        rf"sharp wins: {number} % on average over 4 tasks, {number} ± {number} points above no_filter "
        rf"\(more than noise, p < 0\.001\), and {number} ± {number} points ahead of clip_top30\."
    )
    assert re.fullmatch(expected, board.headline)


def test_one_seed_names_no_winner(tmp_path):
    board = build_report(str(write_run(tmp_path, seeds=(0,))))
    assert board.one_seed
    assert "item noise only; cannot name a winner" in board.headline
    assert {row.standing for row in board.rows} == {"", "oracle"}
    for row in board.rows[1:]:
        assert row.difference.verdict == "item noise only"
        assert row.difference.p is None
        assert 0 < row.difference.half_width < 0.05
    assert "item noise only" in (tmp_path / "runs/2026-11-24T16-00-00Z_demo/leaderboard.html").read_text()


def test_probes_stand_beside_the_average(tmp_path):
    run = write_run(tmp_path, seeds=(0, 1))
    plain = build_report(str(run))

    def change(data):
        data["tasks"][0]["type"] = "linear_probe"

    edit_run(run, change)
    board = build_report(str(run))
    probe, *others = (task.name for task in board.run.tasks)
    for row, before in zip(
        *(sorted(one.rows, key=lambda row: row.strategy.name) for one in (board, plain)), strict=True
    ):
        assert row.strategy.name == before.strategy.name
        assert row.task_scores[probe] == before.task_scores[probe]
        assert row.average.value == pytest.approx(np.mean([before.task_scores[task].value for task in others]))
    text = (run / "leaderboard.md").read_text()
    assert f"Averages are over the {len(others)} zero-shot tasks" in text
    assert f"average ({len(others)})" in text


def test_missing_task_gives_no_average(tmp_path):
    run = write_run(tmp_path)

    def change(data):
        data["results"] = [r for r in data["results"] if (r["strategy"], r["task"]) != ("clip_top30", "colours")]
        training = next(t for t in data["trainings"] if (t["strategy"], t["seed"]) == ("random30", 1))
        training |= {"checkpoint": None, "error": "CUDA out of memory"}
        for result in data["results"]:
            if (result["strategy"], result["seed"]) == ("random30", 1):
                result |= {"path": None, "error": "needs a training that failed"}
        data["strategies"][4]["error"] = "trusted: no such reference"
        data["trainings"] = [t for t in data["trainings"] if t["strategy"] != "trusted_only"]
        data["results"] = [r for r in data["results"] if r["strategy"] != "trusted_only"]

    edit_run(run, change)
    board = build_report(str(run))
    text = terminal_table(board)
    row = row_of(board, "clip_top30")
    assert row.rank is None
    assert row.average.value is None
    assert row.difference is None
    assert row.task_scores["objects"].value is not None
    assert row.task_scores["colours"].value is None
    assert "N/A (missing: colours)" in text
    assert "clip_top30: seeds 0, 1, 2: colours: no result" in text
    row = row_of(board, "random30")
    assert row.seeds == (0, 2)
    assert row.seeds_planned == 3
    assert row.average.value is not None
    assert row.reasons == ("seed 1: training: CUDA out of memory",)
    assert "2 of 3" in text
    assert "trusted_only: trusted: no such reference" in text
    assert [row.strategy.name for row in board.rows if row.rank is None] == ["clip_top30", "trusted_only"]


def test_unreadable_results_are_reasons_not_crashes(tmp_path):
    run = write_run(tmp_path)
    results = json.loads((run / "run.json").read_text())["results"]
    (tmp_path / results[0]["path"] / "predictions.parquet").write_bytes(b"not parquet")
    (tmp_path / results[1]["path"] / "result.json").write_text('{"metrics": {"acc1": 0.5}}')
    (tmp_path / results[2]["path"] / "result.json").unlink()
    reasons = " | ".join(row_of(build_report(str(run)), "no_filter").reasons)
    assert "seed 0: objects: ArrowInvalid" in reasons
    assert "has no metric mean_per_class_recall, only acc1" in reasons
    assert re.search(r"seed 0: colours: results-\w+ is missing or unfinished", reasons)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-0.2", "57.3"])
def test_a_score_that_is_no_fraction_is_a_reason_and_counts_nowhere(tmp_path, value):
    run = write_run(tmp_path, seeds=(0, 1), num_items=120)
    path = json.loads((run / "run.json").read_text())["results"][0]["path"]
    (tmp_path / path / "result.json").write_text(f'{{"metrics": {{"acc1": {value}}}}}')
    board = build_report(str(run))
    row = row_of(board, "no_filter")
    assert row.seeds == (1,)
    assert re.fullmatch(rf"seed 0: objects: .*acc1 = {float(value)}, expected a fraction 0\.\.1", row.reasons[0])
    assert all(0 <= row.average.value <= 1 for row in board.rows)


def test_tasks_tested_with_more_seeds_than_the_average_are_not_called_untested(tmp_path):
    run = write_run(tmp_path, seeds=(0, 1), num_items=120)

    def change(data):  # clip_top30 has two seeds of all but one task, the others one seed of every task
        for result in data["results"]:
            if result["task"] == "colours" and (result["strategy"] == "clip_top30" or result["seed"] == 1):
                result |= {"path": None, "error": "lost"}

    edit_run(run, change)
    board = build_report(str(run))
    assert board.one_seed
    assert row_of(board, "clip_top30").task_differences["objects"].p is not None
    page = (run / "leaderboard.html").read_text()
    assert "With one seed none can be called significant" not in page
    assert "Bold with a dot" in page


def test_result_that_contradicts_its_predictions_is_noted(tmp_path):
    run = write_run(tmp_path, seeds=(0, 1))
    path = tmp_path / json.loads((run / "run.json").read_text())["results"][0]["path"] / "result.json"
    path.write_text(json.dumps({"metrics": {"acc1": 0.75}}))
    assert any("result.json says acc1 = 0.750000, its predictions say" in note for note in build_report(str(run)).notes)


def test_tasks_without_a_metric_are_left_out_and_unknown_item_noise_is_said(tmp_path):
    run = write_run(tmp_path, seeds=(0, 1))

    def change(data):
        data["tasks"][0]["metric"] = None
        for result in data["results"]:
            path = tmp_path / result["path"] / "result.json"
            content = json.loads(path.read_text())
            if result["task"] == "objects_shifted":
                content["metrics"]["macro_f1"] = content["metrics"]["acc1"]
            path.write_text(json.dumps(content))
        data["tasks"][1]["metric"] = "macro_f1"

    edit_run(run, change)
    board = build_report(str(run))
    assert [column.name for column in board.columns] == ["objects_shifted", "colours", "retrieval"]
    assert board.rows[1].average.value is not None
    assert "objects: no metric that counts, so it is left out" in board.notes
    assert sum("the item noise of macro_f1 is not known here" in note for note in board.notes) == 1


def test_rebuild_gives_the_same_bytes(run, board):
    names = [f"leaderboard.{extension}" for extension in ("md", "json", "csv", "html")]
    before = {name: (run / name).read_bytes() for name in names}
    build_report(str(run))
    assert {name: (run / name).read_bytes() for name in names} == before
    assert str(run.parents[1]) not in before["leaderboard.html"].decode() + before["leaderboard.json"].decode()


def test_a_url_gives_the_same_files(run, board):
    before = (run / "leaderboard.html").read_bytes()
    build_report(f"file://{run}")
    assert (run / "leaderboard.html").read_bytes() == before


def test_csv_and_json_hold_the_numbers(run, board):
    rows = list(csv.DictReader(io.StringIO((run / "leaderboard.csv").read_text())))
    data = json.loads((run / "leaderboard.json").read_text())
    assert [row["strategy"] for row in rows] == [row["strategy"] for row in data["rows"]]
    first = data["rows"][1]
    assert (
        float(rows[1]["average"]) == first["average"]["value"] == pytest.approx(board.rows[1].average.value, rel=1e-7)
    )
    assert first["kept_rows"] == 3960
    assert first["kept_fraction"] == 0.396
    assert first["repeats"] == pytest.approx(SAMPLES_SEEN / 3960)
    assert len(data["results"]) == 6 * 3 * 4


def test_overlap_of_known_sets(board):
    names = [strategy.name for strategy in board.run.compared]
    found = board.run.overlap
    overlap = {(a, b): found.jaccard[i, j] for i, a in enumerate(names) for j, b in enumerate(names)}
    assert overlap["no_filter", "no_filter"] == overlap["planted_truth", "planted_truth"] == 1
    assert overlap["no_filter", "random30"] == pytest.approx(0.3, abs=1e-3)
    # independent choices of shares a and b share a b of all: a b / (a + b - a b)
    assert overlap["random30", "planted_truth"] == pytest.approx(0.12 / 0.58, abs=0.02)
    assert found.one_in == 1
    assert np.diag(found.shared_rows).tolist() == [s.kept_rows for s in board.run.compared]
    kept = [s.kept_rows for s in board.run.compared]
    for i, j in np.ndindex(found.shared_rows.shape):
        shared = found.shared_rows[i, j]
        assert found.jaccard[i, j] == pytest.approx(shared / (kept[i] + kept[j] - shared))


def test_repeated_uids_count_once_in_the_overlap(tmp_path):
    run = write_run(tmp_path, seeds=(0,))
    before = read_run(str(run)).overlap.jaccard
    entries = json.loads((run / "run.json").read_text())["strategies"]
    path = tmp_path / next(e["selection"] for e in entries if e["name"] == "random30") / "uids.npy"
    np.save(path, np.repeat(np.load(path), 3))  # a strategy that ends with `repeat`
    assert np.array_equal(read_run(str(run)).overlap.jaccard, before)


def test_overlap_of_large_selections_is_measured_on_a_sample(run, board, monkeypatch):
    monkeypatch.setattr("pipeline.report.records.MAX_OVERLAP_UIDS", 1000)
    sampled = read_run(str(run))
    assert sampled.overlap.one_in == 4
    assert np.nanmax(abs(sampled.overlap.jaccard - board.run.overlap.jaccard)) < 0.05
    assert sampled.overlap.shared_rows[1, 1] == pytest.approx(2970, rel=0.1)


def test_groups_stand_for_their_tasks_when_there_are_many(tmp_path):
    tasks = {f"task{i}": ("zeroshot_classification", "acc1", 0.1) for i in range(9)}
    run = write_run(tmp_path, seeds=(0, 1), tasks=tasks, num_items=60)
    edit_run(
        run, lambda data: [task.update(group="even" if i % 2 == 0 else "odd") for i, task in enumerate(data["tasks"])]
    )
    board = build_report(str(run))
    assert [(column.name, len(column.tasks)) for column in board.columns] == [("even", 5), ("odd", 4)]
    row = board.rows[1]
    weighted = (5 * row.scores["even"].value + 4 * row.scores["odd"].value) / 9
    assert row.average.value == pytest.approx(weighted)  # the average is over tasks, not over groups
    assert "even (5)" in terminal_table(board)
    assert "leaderboard.md has the scores of the single tasks." in terminal_table(board)
    score = row.task_scores["task3"]
    expected = f"{percent(score.value)} ± {percent(score.half_width)}"
    lines = (run / "leaderboard.md").read_text().splitlines()
    cells_of_task = [cell.strip() for cell in next(line for line in lines if line.startswith("| task3 |")).split("|")]
    assert cells_of_task[2:4] == ["acc1", "10.0"] and cells_of_task[4 + 1] == expected


def test_many_tasks_of_no_group_do_not_fill_the_tables(tmp_path):
    tasks = {f"task{i}": ("zeroshot_classification", "acc1", 0.1) for i in range(12)}
    run = write_run(tmp_path, seeds=(0, 1), tasks=tasks, num_items=60)
    edit_run(run, lambda data: [task.update(group="shifts") for task in data["tasks"][:2]])
    board = build_report(str(run))
    (head,) = [line for line in terminal_table(board, width=120).splitlines() if line.startswith("#")]
    assert "shifts (2)" in head and "average (12)" in head and "kept" in head and "task5" not in head
    assert len(head) <= 120
    markdown = (run / "leaderboard.md").read_text()
    assert markdown.count("| task5 | acc1 | 10.0 |") == 1


def test_a_task_that_is_broken_for_all_says_so_once(tmp_path):
    run = write_run(tmp_path, seeds=(0, 1))

    def change(data):
        for result in data["results"]:
            if result["task"] == "colours":
                result.update(path=None, error="images/colours: 0.tar: truncated")
        data["trainings"][0].update(checkpoint=None, error="CUDA out of memory")

    edit_run(run, change)
    board = build_report(str(run))
    text = terminal_table(board)
    assert text.count("truncated") == 2  # no_filter has one training less, so its seeds are others
    others = ", ".join(row.strategy.name for row in board.rows if row.strategy.name != "no_filter")
    assert f"{others}: seeds 0, 1: colours: images/colours: 0.tar: truncated" in text
    assert "no_filter: seed 0: training: CUDA out of memory" in text
    html = (run / "leaderboard.html").read_text()
    assert html.count("0.tar: truncated") == 2


def test_terminal_table_fits_the_width_it_is_given(board):
    wide, narrow = terminal_table(board), terminal_table(board, width=150)
    assert "checkpoint-" in wide
    assert "checkpoint-" not in narrow
    table = [line for line in narrow.splitlines() if re.match(r"\s*(#|\d) ", line)]
    assert len(table) == 7
    assert max(map(len, table)) <= 150
    assert "Left out here for want of width: checkpoint" in narrow
    assert "Used beyond the pool by basic_and_clip, clip_top30: scorer: small CLIP" in narrow
    for fact in ("chance 10.0 %", "colours*", "in-domain", "planted_truth (oracle)", "metric version: 1"):
        assert fact in narrow


def test_missing_run_is_one_line(tmp_path):
    with pytest.raises(WinnowError, match=r"run.json is missing, expected the folder of a run"):
        read_run(str(tmp_path))
    (tmp_path / "run.json").write_text('{"pool": {}}')
    with pytest.raises(WinnowError, match=r"run.json: 'strategies' is missing"):
        read_run(str(tmp_path))


def test_a_run_with_nothing_finished_still_gives_a_report(tmp_path):
    run = write_run(tmp_path, seeds=(0,), strategies={"no_filter": STRATEGIES["no_filter"]})
    edit_run(run, lambda data: data.update(trainings=[], results=[]))
    assert "nothing to compare" in build_report(str(run)).headline


HOSTILE = {
    "clip_top30": '<script>alert("strategy")</script>',
    "objects": "<img src=x onerror=alert(1)>",
    "trusted reference: 3000 pairs": "</style></title><script>alert('uses')</script>",
    "random30": "=HYPERLINK(1) | a\x1b[31m \u202e`b`\n$x_1$",
}


class Page(HTMLParser):
    """Counts elements, and attributes that could run or fetch something."""

    def __init__(self):
        super().__init__()
        self.tags: list[str] = []
        self.active: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.active += [name for name, _ in attrs if name.startswith("on") or name in ("src", "href", "srcset")]


def test_hostile_names_are_only_text(tmp_path):
    run = write_run(tmp_path, seeds=(0, 1), rename=HOSTILE)

    def change(data):
        data["trainings"][-1]["error"] = "</pre><script>alert('error')</script>"
        data["config_name"] = "<b onclick=x>demo</b>"

    edit_run(run, change)
    (run / "config.yaml").write_text("a: </pre><script>alert('config')</script>\n")
    text = terminal_table(build_report(str(run)))
    html = (run / "leaderboard.html").read_text()
    page = Page()
    page.feed(html)
    assert not page.active
    assert not set(page.tags) & {"img", "iframe", "object", "embed", "link", "a", "base"}
    assert page.tags.count("script") == 1  # ours; test_page.py shows in a browser that no other runs
    assert page.tags.count("style") == page.tags.count("title") - html.count("<title>", html.index("<body")) == 1
    assert html.count("&lt;script&gt;") >= 4
    assert "default-src 'none'" in html.replace("&#x27;", "'")
    assert "\x1b" not in text + html
    assert "\u202e" not in text + html
    assert all(line.isprintable() for line in text.splitlines())
    markdown = (run / "leaderboard.md").read_text()
    assert "<" not in markdown
    assert markdown.partition("\n## ")[0].count("\n| ") == 7
    for line in csv.reader(io.StringIO((run / "leaderboard.csv").read_text())):
        assert not any(cell.startswith(("=", "@")) for cell in line)


def test_page_is_complete_and_its_plots_are_well_formed(run, board):
    html = (run / "leaderboard.html").read_text()
    plots = re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL)
    labels = [ElementTree.fromstring(plot).get("aria-label") for plot in plots]
    kinds = ["Differences:", "Average", "Average", "Differences", *["Training"] * 3]
    assert [label.split()[0] for label in labels] == kinds
    dots = [plot.count("<circle") for plot in plots]
    assert dots == [5, 6, 6, 20, 0, 0, 0]
    for plot in plots[4:]:  # loss, recall of trained pairs, recall of held-out ones
        assert plot.count('class="curve"') == 6
        assert plot.count('class="seed"') == 6 * 3
    assert "guessing: ln(64) = 4.16" in plots[4]
    assert not re.search(r"\b(nan|inf)\b", "".join(plots))
    assert "http" not in html.replace("http-equiv", "")
    titles = re.findall(r"<h2>(.*?)</h2>", html)
    assert titles[:3] == ["Better than no_filter?", "Score against kept fraction", "Leaderboard"]
    assert {"Funnel", "Overlap", "Used and spent", "Tasks", "Where it comes from"} <= set(titles)
    assert {"Training curves", "What the trainings did"} <= set(titles)
    assert "Score against samples seen" not in titles  # one budget


@pytest.mark.parametrize("repeats", [[0.3, 1.6, 40.0], [2.0, 2.0, 2.0]])
def test_repeats_are_drawn_where_they_are(tmp_path, monkeypatch, repeats):
    """A doubling is as wide everywhere."""
    board = build_report(str(write_run(tmp_path, (0,), {name: STRATEGIES[name] for name in list(STRATEGIES)[:3]})))
    for row, value in zip(board.rows, repeats, strict=True):
        object.__setattr__(row, "repeats", value)
    plot = plots.score_against_repeats(board)
    x = [float(value) for value in re.findall(r'<circle cx="([\d.]+)"', plot)]
    ticks = {
        float(text): float(at) for at, text in re.findall(r'<text x="([\d.]+)" y="288" [^>]*>([\d.]+)</text>', plot)
    }
    low, high = min(ticks), max(ticks)
    assert low <= min(repeats) and max(repeats) <= high
    for value, place in zip(repeats, x, strict=True):
        share = np.log(value / low) / np.log(high / low)
        assert place == pytest.approx(ticks[low] + share * (ticks[high] - ticks[low]), abs=0.2)


def test_the_policy_names_the_hash_of_the_one_script(run, board):
    html = (run / "leaderboard.html").read_text()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.DOTALL)
    policy = re.search(r'content="(default-src[^"]*)"', html)[1].replace("&#x27;", "'")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}';" in policy
    assert "unsafe-eval" not in policy and "unsafe-inline" not in policy.partition("style-src")[0]
    assert re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", script) is None
    assert script == "".join((Path(markup.__file__).parent / name).read_text() for name in markup.SCRIPTS)


def test_versions_are_those_of_the_trainings(run, board):
    trainings = list(board.run.trainings)
    for i, version in ((0, "2.9.1"), (1, "2.9.1"), (2, "2.10.0")):
        facts = trainings[i].facts | {"versions": {"torch": version, "open_clip_torch": "3.2.0"}, "code": "abc1234"}
        trainings[i] = dataclasses.replace(trainings[i], facts=facts)
    changed = dataclasses.replace(board, run=dataclasses.replace(board.run, trainings=tuple(trainings)))
    lines = [line.split(None, 1) for line in version_lines(changed)]
    assert lines == [["winnow", "0.1.0"], ["code", "abc1234"], ["torch", "2.9.1, 2.10.0"], ["open_clip_torch", "3.2.0"]]
    assert "torch                2.9.1, 2.10.0" in html_page(changed)


def add_contamination(run: Path, matched: dict[str, list[str]], **own) -> None:
    """None; the run gets a stage that found these items of the tasks in the pool."""
    items = [(task, item) for task, some in matched.items() for item in some]
    table = pa.table({"reference": [task for task, _ in items], "item": [item for _, item in items]})
    counts = {
        task: {"images": 600, "not_compared": 2, "rows": 3 * len(some), "matched": len(some), "matched_by_method": {"sha256": len(some)}}
        for task, some in matched.items()
    }  # fmt: skip
    facts = {"contaminated_rows": 3 * len(items), "rows_by_method": {"sha256": 3 * len(items)}, "references": counts}
    path = write_artifact(run.parents[1], "contamination", {"items": len(items)}, facts, {"fit/items.parquet": table})
    edit_run(
        run, lambda data: data.update(contamination=[{"stage": "contamination", "path": path, "error": None} | own])
    )


def predicted(run: Path, strategy: str, task: str) -> list[list[dict]]:
    """The predictions of each seed."""
    results = json.loads((run / "run.json").read_text())["results"]
    paths = [entry["path"] for entry in results if (entry["strategy"], entry["task"]) == (strategy, task)]
    return [pq.read_table(run.parents[1] / path / "predictions.parquet").to_pylist() for path in paths]


def test_items_in_the_pool_are_left_out_of_the_second_score(tmp_path):
    run = write_run(tmp_path, seeds=(0, 1))
    matched = {
        "objects": [f"item{j:05d}" for j in range(0, 600, 7)],
        "objects_shifted": [f"item{j:05d}" for j in range(0, 600, 10)],  # all of class 0
        "colours": [f"item{j:05d}" for j in range(40)],
        "retrieval": ["image0003", "image0050"],
    }
    add_contamination(run, matched)
    (cleaned,) = build_report(str(run)).cleaned
    expected: dict[str, list[float]] = {task: [] for task in matched}
    for rows in predicted(run, "clip_top30", "objects"):
        expected["objects"].append(np.mean([row["correct"] for row in rows if row["item"] not in matched["objects"]]))
    for rows in predicted(run, "clip_top30", "objects_shifted"):
        left = [row for row in rows if row["item"] not in matched["objects_shifted"]]
        recalls = [np.mean([row["correct"] for row in left if row["label"] == label]) for label in range(1, 10)]
        expected["objects_shifted"].append(np.mean(recalls))
    for rows in predicted(run, "clip_top30", "colours"):
        expected["colours"].append(np.mean([row["label"] in row["top5"] for row in rows[40:]]))
    for rows in predicted(run, "clip_top30", "retrieval"):
        left = [row for row in rows if row["group"] not in matched["retrieval"]]
        ways = ("image_to_text", "text_to_image")
        expected["retrieval"].append(
            np.mean([np.mean([row["hit@1"] for row in left if row["direction"] == way]) for way in ways])
        )
    for task, values in expected.items():
        everything, left = cleaned.scores["clip_top30"][task]
        assert left.value == pytest.approx(np.mean(values))
        assert left.value != everything.value
        assert left.half_width > 0
    average = np.mean([np.mean(values) for values in expected.values()])
    assert cleaned.averages["clip_top30"][1].value == pytest.approx(average)
    assert cleaned.reasons == ()
    markdown = (run / "leaderboard.md").read_text()
    assert "| objects | 600 | 2 | 86 | 14.3 % | 86 | 258 |" in markdown
    assert "<h2>Contamination</h2>" in (run / "leaderboard.html").read_text()
    assert "contamination: 564 rows of the pool have an image of a task" in markdown


def test_what_a_score_without_them_lacks_is_said(tmp_path):
    run = write_run(tmp_path, seeds=(0,))
    add_contamination(run, {
        "objects": [f"item{j:05d}" for j in range(600)], "objects_shifted": ["item00001", "elsewhere/7"], "colours": [],
    })  # fmt: skip
    board = build_report(str(run))
    (cleaned,) = board.cleaned
    assert cleaned.tasks == ("objects", "objects_shifted")
    assert cleaned.scores["no_filter"]["objects"][1].value is None
    assert cleaned.averages["no_filter"][1].value is None
    assert set(cleaned.reasons) == {
        "objects: every image is in the pool",
        "objects_shifted: 1 of 2 images in the pool are not among the predictions",
        "retrieval: its images were not compared with the pool",
    }
    assert row_of(board, "no_filter").average.value is not None
    assert "N/A (missing: objects)" in (run / "leaderboard.md").read_text()


def test_a_metric_that_single_items_do_not_tell_has_no_second_score(tmp_path):
    run = write_run(tmp_path, seeds=(0,), tasks={"colours": TASKS["colours"]})
    add_contamination(run, {"colours": ["item00001"]})
    for path in tmp_path.glob("results-*/predictions.parquet"):
        pq.write_table(pq.read_table(path).drop_columns(["top5"]), path)
    (cleaned,) = build_report(str(run)).cleaned
    assert cleaned.reasons == ("colours: the predictions do not tell acc5 of single items",)
    assert cleaned.scores["no_filter"]["colours"][1].value is None


def test_a_contamination_stage_that_failed_gives_its_reason(tmp_path):
    run = write_run(tmp_path, seeds=(0,))
    add_contamination(run, {"objects": ["item00001"]}, path=None, error="hashes: <b>no disk</b>")
    board = build_report(str(run))
    assert board.cleaned[0].tasks == ()
    assert "hashes: &lt;b&gt;no disk" in (run / "leaderboard.html").read_text()
    assert json.loads((run / "leaderboard.json").read_text())["contamination"][0]["error"] == "hashes: <b>no disk</b>"


def with_control(data) -> None:
    """The run's clip_top30 has random30 as its control: as many rows at random."""
    next(entry for entry in data["strategies"] if entry["name"] == "clip_top30")["control"] = "random30"


def test_a_filter_is_compared_with_as_many_rows_at_random(tmp_path):
    run = write_run(tmp_path)
    edit_run(run, with_control)
    board = build_report(str(run))
    row = row_of(board, "clip_top30")
    assert row.control == "random30"
    found = row.control_difference
    assert found.value == pytest.approx(row.average.value - row_of(board, "random30").average.value)
    assert found.verdict == "better"
    assert found.p_holm == found.p  # the only one
    assert row_of(board, "basic_and_clip").control_difference is None
    assert "as many rows at random (" not in board.headline
    text = f"+{100 * found.value:.1f} ± {100 * found.half_width:.1f}, better"
    markdown = (run / "leaderboard.md").read_text()
    assert "| vs random |" in markdown
    assert text in markdown
    (record,) = [row for row in json.loads((run / "leaderboard.json").read_text())["rows"] if row["control"]]
    assert record["strategy"] == "clip_top30"
    assert record["control_difference"]["verdict"] == "better"
    lines = {line["strategy"]: line for line in csv.DictReader(io.StringIO((run / "leaderboard.csv").read_text()))}
    assert lines["clip_top30"]["control"] == "random30"
    assert float(lines["clip_top30"]["control_difference"]) == pytest.approx(found.value, rel=1e-7)
    assert lines["no_filter"]["control_verdict"] == ""


def test_a_filter_that_only_beats_the_baseline_is_not_called_better_data(tmp_path):
    strategies = {
        "no_filter": (None, -1.2, "", ()),
        "random30": (0.3, -0.3, "", ()),
        "clip_top30": (0.3, -0.1, "", ()),
    }
    run = write_run(tmp_path, strategies=strategies)
    edit_run(run, with_control)
    board = build_report(str(run))
    row = row_of(board, "clip_top30")
    assert (row.difference.verdict, row.control_difference.verdict) == ("better", "tie")
    remark = r"But clip_top30 does not beat as many rows at random \(random30: \S+ ± \d\.\d points, p = \d\.\d{3}\): "
    remark += "the gain is that of a smaller set, not shown to be that of better data."
    assert board.rows[1].strategy.name == "clip_top30"
    assert re.search(remark, board.headline)
    assert len(re.findall(remark, terminal_table(board))) == 1
    second = make_leaderboard(
        read_run(str(write_run(tmp_path / "other", strategies=strategies | {"sharp": (0.2, 0.8, "", ())})))
    )
    assert "at random" not in second.headline
    run = next((tmp_path / "other" / "runs").iterdir())
    edit_run(run, with_control)
    board = build_report(str(run))
    assert "at random" not in board.headline  # it is not about the one that leads
    assert len(re.findall(remark, terminal_table(board))) == 1


def test_an_average_adjusted_for_one_chance_has_the_averages_noise_on_its_scale(tmp_path):
    tasks = {name: (kind, metric, 0.2) for name, (kind, metric, _) in TASKS.items()}
    for row in make_leaderboard(read_run(str(write_run(tmp_path, num_items=120, tasks=tasks)))).rows:
        adjusted = row.aggregates["chance_adjusted"]
        assert adjusted.value == pytest.approx((row.average.value - 0.2) / 0.8)
        assert adjusted.half_width == pytest.approx(row.average.half_width / 0.8)


def test_a_control_that_is_not_there_gives_no_difference(tmp_path):
    run = write_run(tmp_path, seeds=(0, 1))

    def change(data):
        with_control(data)
        data["strategies"][3]["control"] = "random21"  # not compared
        data["results"] = [r for r in data["results"] if (r["strategy"], r["task"]) != ("random30", "objects")]

    edit_run(run, change)
    board = build_report(str(run))
    assert row_of(board, "clip_top30").control == "random30"
    assert row_of(board, "basic_and_clip").control is None
    assert not any(row.control_difference for row in board.rows)
    remark = "Whether clip_top30 beats as many rows at random is not known: random30 has no average."
    assert row_of(board, "clip_top30").difference.verdict == "better"
    assert terminal_table(board).count(remark) == 1


def test_places_hold_the_place_by_average(board, tmp_path):
    contenders = [row for row in board.rows if row.strategy.label == ""]
    by_average = sorted(contenders, key=lambda row: -row.average.value)
    for place, row in enumerate(by_average, start=1):
        best, worst = row.rank_interval
        assert 1 <= best <= place <= worst <= len(contenders)
    assert row_of(board, "planted_truth").rank_interval is None
    assert row_of(board, "clip_top30").rank_interval[0] == 1
    assert row_of(board, "no_filter").rank_interval[1] == len(contenders)
    assert places_text(row_of(board, "clip_top30")) in ("1 to 2", "1 to 3")
    one = make_leaderboard(read_run(str(write_run(tmp_path / "one", seeds=(0,)))))
    assert not any(row.rank_interval for row in one.rows)


def test_json_has_item_noise_of_every_value_and_difference(run, board):
    data = json.loads((run / "leaderboard.json").read_text())
    for row in data["rows"]:
        for name, estimate in row["tasks"].items():
            low, high = estimate["items"]
            assert 0 <= low < estimate["value"] < high <= 1
            if row["strategy"] != "no_filter":
                found = row["task_differences"][name]
                assert found["items"][0] <= found["value"] <= found["items"][1]
        assert row["average"]["items"] is None
    one = next(result for result in data["results"] if result["task"] == "objects")
    assert one["items"] == pytest.approx(wilson(one["value"], 600), rel=1e-6)


def test_averages_over_lists_of_tasks_are_in_every_format(tmp_path):
    tasks = {
        "retrieval/flickr_1k_test_image_text_retrieval": ("zeroshot_retrieval", "mean_recall@1", 0.01),
        "retrieval/mscoco_2014_5k_test_image_text_retrieval": ("zeroshot_retrieval", "mean_recall@1", 0.01),
        "imagenet1k": ("zeroshot_classification", "acc1", 0.001),
    }
    run = write_run(tmp_path, seeds=(0, 1), tasks=tasks, num_items=60)
    edit_run(run, lambda data: [task.update(counted=True, clean=True) for task in data["tasks"]])
    board = build_report(str(run))
    row = row_of(board, "clip_top30")
    assert row.aggregates["imagenet"].value == row.task_scores["imagenet1k"].value
    assert row.aggregates["retrieval"].missing == ("misc/winogavil",)
    assert len(row.aggregates["datacomp"].missing) == 35
    expected = np.mean(
        [(row.task_scores[name].value - chance) / (1 - chance) for name, (_, _, chance) in tasks.items()]
    )
    assert row.aggregates["chance_adjusted"].value == pytest.approx(expected)
    assert row.aggregates["chance_adjusted"].half_width > row.average.half_width
    markdown = (run / "leaderboard.md").read_text()
    assert "| strategy | chance-adjusted | ImageNet |" in markdown
    data = json.loads((run / "leaderboard.json").read_text())
    assert data["aggregates"]["vtab"]["title"] == "VTAB (13)"
    assert data["rows"][1]["aggregates"]["retrieval"]["missing"] == ["misc/winogavil"]
    (line,) = [
        line
        for line in csv.DictReader(io.StringIO((run / "leaderboard.csv").read_text()))
        if line["strategy"] == "clip_top30"
    ]
    assert float(line["imagenet"]) == pytest.approx(row.aggregates["imagenet"].value, rel=1e-7)
    assert line["datacomp"] == ""


def test_seeds_that_matter_more_for_one_strategy_are_noted(tmp_path, board):
    assert not any("Bartlett" in note for note in board.notes)
    run = write_run(tmp_path, seeds=(0, 1, 2, 3), tasks={"objects": TASKS["objects"]})
    for number, result in enumerate(json.loads((run / "run.json").read_text())["results"]):
        step = 0.2 if result["strategy"] == "random30" else 0.001
        path = tmp_path / result["path"] / "result.json"
        path.write_text(json.dumps({"metrics": {"acc1": 0.4 + step * (number % 2)}}))
    notes = [note for note in build_report(str(run)).notes if "Bartlett" in note]
    assert len(notes) == 1
    assert notes[0].startswith("Seeds differ by 11.5 points (standard deviation) with random30 and by 0.1 with ")
    assert "p < 0.001" in notes[0]
