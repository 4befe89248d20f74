"""Other runs and results from elsewhere beside a run: what joins the comparison, what stands apart, what is refused."""

from __future__ import annotations

import csv
import dataclasses
import datetime
import io
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from pipeline import plan as planning
from pipeline import run as command
from pipeline import runs
from pipeline.core import config, storage
from pipeline.core.config import BesideConfig, ReportConfig
from pipeline.core.errors import ConfigError
from pipeline.report import build_report, check_beside, make_leaderboard, read_run, terminal_table
from pipeline.report.elsewhere import unlike_in, with_beside
from pipeline.report.elsewhere_page import beside_sections
from pipeline.report.imported import canonical, read_results, task_names
from pipeline.report.uncertainty import wilson
from tests.engine_fixture import run_here
from tests.report_fixture import STRATEGIES, TASKS, edit_run, write_run

GOLDEN = Path(__file__).parent / "golden" / "datacomp_published.csv"
TINY = Path(__file__).parent / "tiny.yaml"
RUN = "2026-11-24T16-00-00Z_demo"
# In the order of open_clip's file, with the tag that open_clip has for each of the published checkpoints.
TAGS = {"openai": "openai", "s_none": "commonpool_s_s13m_b4k", "s_clip": "commonpool_s_clip_s13m_b4k"}
COUNTED = [
    ("imagenet1k", "acc1", 0.0505), ("mnist", "acc1", 0.0874), ("vtab/pcam", "acc1", 0.6367),
    ("vtab/pets", "mean_per_class_recall", 0.0796),
]  # fmt: skip


def published() -> dict[str, dict[str, str]]:
    """{column: {task's title: value}} of DataComp's released checkpoints."""
    with open(GOLDEN, encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    title, *columns = lines[0]
    return {column: {line[title]: line[column] for line in lines} for column in columns}


def write_open_clip(path: Path, change=lambda lines: None) -> str:
    """docs/openclip_results.csv of open_clip, with rows of three checkpoints."""
    values = published()
    lines = []
    for column, tag in TAGS.items():
        found = next(scores for name, scores in values.items() if name.split()[0] == column)
        lines.append({"name": "ViT-B-32", "pretrained": tag, "params (M)": "151.28", "FLOPs (B)": "14.78"} | found)
    change(lines)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        writer.writeheader()
        writer.writerows(lines)
    return str(path)


def write_clip_benchmark(folder: Path, name: str = "ViT-B-32", **changes) -> str:
    """Files of `clip_benchmark eval`: one a task, acc5 a bare NaN where there are fewer than five classes."""
    folder.mkdir(exist_ok=True)
    metrics = {
        "wds/imagenet1k": {"acc1": 0.63334, "acc5": 0.88778, "mean_per_class_recall": 0.63284},
        "wds/vtab/pcam": {"acc1": 0.6223, "acc5": float("nan"), "mean_per_class_recall": 0.6224},
        "wds_vtab-pets_test": {"acc1": 0.8720, "acc5": 0.9984, "mean_per_class_recall": 0.8700},
        "wds/flickr30k": {"image_retrieval_recall@1": 0.5882, "text_retrieval_recall@1": 0.7886},
        "wds/fer2013": {"acc1": 0.4113, "acc5": 0.9450, "mean_per_class_recall": 0.3597},
    } | changes
    for dataset, found in metrics.items():
        kind = "zeroshot_retrieval" if "flickr" in dataset else "zeroshot_classification"
        record = {"dataset": dataset, "model": name, "pretrained": "openai", "task": kind}
        text = json.dumps(record | {"metrics": found, "language": "en"})
        (folder / f"{dataset.replace('/', '_')}_openai_{name}_en_{kind}.json").write_text(text)
    return str(folder / "*.json")


def write_datacomp(path: Path, lines=None) -> str:
    """eval_results.jsonl of DataComp's evaluate.py."""
    if lines is None:
        lines = [
            {"key": key, "dataset": key, "metrics": {"acc1": value, "acc5": float("nan"), metric: value}}
            for key, metric, value in COUNTED
        ]
        lines.append(
            {"key": "fairness/fairface", "dataset": "FairFace", "metrics": {"acc_gender": 0.5, "main_metric": None}}
        )
        lines.append({"key": "retrieval/flickr30k", "dataset": "Flickr", "metrics": {"mean_recall@1": 0.0257}})
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def rows_of(entry: BesideConfig):
    return {row.name: row for row in read_results(entry, "report.beside.0").rows}


def read(path, **more):
    return rows_of(BesideConfig(results=str(path), **more))


def value(row, task, metric=""):
    return row.cells[task][metric].fraction()


# ---- another run ----


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    tasks = {name: TASKS[name] for name in ("objects", "retrieval")}
    return write_run(tmp_path_factory.mktemp("whole"), tasks=tasks, num_items=60)


def part_of(whole: Path, tmp_path: Path, name: str, keep) -> Path:
    """A copy of the run with the trainings, and the strategies that have any, for which keep(strategy, seed) holds."""
    run = tmp_path / name / "runs" / RUN
    shutil.copytree(whole.parents[1], tmp_path / name)

    def change(data):
        for part in ("trainings", "results"):
            data[part] = [entry for entry in data[part] if keep(entry["strategy"], entry["seed"])]
        left = {entry["strategy"] for entry in data["trainings"]}
        data["strategies"] = [entry for entry in data["strategies"] if entry["name"] in left]

    edit_run(run, change)
    return run


def beside(*entries) -> list[BesideConfig]:
    return [BesideConfig(**entry) for entry in entries]


def numbers(board, names=lambda name: name):
    """All that the leaderboard says of each strategy, by name."""
    found = {}
    for row in board.rows:
        kept = {key: getattr(row, key) for key in ("rank", "average", "task_scores", "standing", "difference")}
        kept |= {key: getattr(row, key) for key in ("task_differences", "rank_interval", "aggregates", "checkpoints")}
        found[names(row.strategy.name)] = kept
    return found


def test_two_halves_of_a_run_give_the_numbers_of_the_whole(whole, tmp_path):
    first = {"no_filter", "clip_top30", "random30"}
    here = part_of(whole, tmp_path, "here", lambda strategy, seed: strategy in first)
    other = part_of(whole, tmp_path, "other", lambda strategy, seed: strategy not in first)
    board = build_report(str(here), beside({"run": str(other), "name": "later"}))
    expected = make_leaderboard(read_run(str(whole)))
    added = [name for name in STRATEGIES if name not in first]
    assert {row.strategy.name for row in board.rows} == first | {f"{name} @ later" for name in added}
    assert numbers(board, lambda name: name.removesuffix(" @ later")) == numbers(expected)
    assert board.headline.replace(" @ later", "") == expected.headline
    assert board.beside.joined[0].added == tuple(f"{name} @ later" for name in added)
    order = [s.name for s in expected.run.compared]
    index = [order.index(s.name.removesuffix(" @ later")) for s in board.run.compared]
    assert np.array_equal(board.run.overlap.jaccard, expected.run.overlap.jaccard[np.ix_(index, index)])


@pytest.mark.parametrize("shared", [1, 0])
def test_more_seeds_of_the_same_strategies_count_for_them(whole, tmp_path, shared):
    here = part_of(whole, tmp_path, "here", lambda strategy, seed: seed < 2)
    other = part_of(whole, tmp_path, "other", lambda strategy, seed: seed >= 2 - shared)
    board = build_report(str(here), beside({"run": str(other)}))
    assert numbers(board) == numbers(make_leaderboard(read_run(str(whole))))
    (joined,) = board.beside.joined
    assert (joined.added, joined.more_seeds) == ((), dict.fromkeys(STRATEGIES, 1))
    assert "counted once: no_filter" in board.beside.remarks[0]


def test_the_same_run_changes_nothing_and_is_said(whole, tmp_path):
    here = part_of(whole, tmp_path, "here", lambda strategy, seed: True)
    board = build_report(str(here), beside({"run": str(whole)}))
    assert numbers(board) == numbers(make_leaderboard(read_run(str(whole))))
    assert board.beside.joined[0].more_seeds == {}
    assert len(board.run.trainings) == len(STRATEGIES) * 3


def test_a_checkpoint_under_another_name_is_not_counted_twice(whole, tmp_path):
    other = part_of(whole, tmp_path, "other", lambda strategy, seed: strategy in ("no_filter", "clip_top30"))

    def change(data):
        for part in ("strategies", "trainings", "results"):
            for entry in data[part]:
                key = "name" if part == "strategies" else "strategy"
                entry[key] = {"clip_top30": "my_filter"}.get(entry[key], entry[key])
        data["strategies"][1]["train_set"] = "train_set-000000000000"

    edit_run(other, change)
    board = build_report(str(whole), beside({"run": str(other)}))
    assert [row.strategy.name for row in board.rows if "@" in row.strategy.name] == []
    assert board.beside.joined[0].same == {"no_filter": "no_filter", "my_filter": "clip_top30"}
    assert "my_filter (clip_top30 here)" in terminal_table(board)


def test_records_that_disagree_stay_two_rows_and_share_no_training(whole, tmp_path):
    other = part_of(whole, tmp_path, "other", lambda strategy, seed: strategy == "no_filter")
    edit_run(other, lambda data: data["trainings"][2].update(checkpoint=data["trainings"][0]["checkpoint"]))
    run, found = with_beside(read_run(str(whole)), beside({"run": str(other), "name": "x"}))
    assert found.joined[0].added == ("no_filter @ x",)
    assert [t for t in run.trainings if t.strategy == "no_filter @ x"] == []


def test_a_strategys_control_is_renamed_with_it(whole, tmp_path):
    other = part_of(whole, tmp_path, "other", lambda strategy, seed: strategy in ("clip_top30", "random30"))
    edit_run(other, lambda data: data["strategies"][1].update(control="random30"))
    here = part_of(whole, tmp_path, "here", lambda strategy, seed: strategy == "no_filter")
    board = build_report(str(here), beside({"run": str(other), "name": "x"}))
    row = next(row for row in board.rows if row.strategy.name == "clip_top30 @ x")
    assert row.control == "random30 @ x"
    assert row.control_difference is not None


@pytest.mark.parametrize(
    "change, unlike",
    [
        (lambda data: data["pool"].update(path="pool-000000000000"), "its pool pool-000000000000 (here pool-3f2a91c0"),
        (lambda data: data["pool"].update(digest="0000"), "what is in pool-3f2a91c0d4e7"),
        (lambda data: data["recipe_values"].update(lr=0.5), "its recipe: lr 0.5 (here 0.001)"),
        (lambda data: data.pop("recipe_values"), "not all values are in the records"),
        (lambda data: data.update(metric_version=2), "its metric version 2 (here 1)"),
        (lambda data: data["tasks"][0].update(metric="acc5"), "its metric of objects: acc5 (here acc1)"),
        (lambda data: data["tasks"][0].update(digest="x"), "its files of objects"),
        (lambda data: data["tasks"].pop(0), "its tasks: without objects"),
    ],
)
def test_what_a_run_is_unlike_in(whole, tmp_path, change, unlike):
    other = part_of(whole, tmp_path, "other", lambda strategy, seed: True)
    edit_run(other, change)
    assert unlike in "; ".join(unlike_in(read_run(str(whole)), read_run(str(other))))


def test_a_run_that_is_unlike_stands_apart_in_every_file(whole, tmp_path):
    other = part_of(whole, tmp_path, "other", lambda strategy, seed: True)
    edit_run(other, lambda data: data["recipe_values"].update(lr=0.5))
    before = numbers(make_leaderboard(read_run(str(whole))))
    board = build_report(str(whole), beside({"run": str(other), "name": "another"}))
    assert numbers(board) == before
    (part,) = board.beside.apart
    assert numbers(part.board) == before
    unlike = "its recipe: lr 0.5 (here 0.001)"
    assert part.unlike == (unlike,)
    assert f"another is another run, not in this comparison: it is unlike this one in {unlike}." in terminal_table(
        board
    )
    markdown = (whole / "leaderboard.md").read_text().partition("## Beside: another")[2]
    assert unlike in markdown
    assert "- metric version: 1" in markdown
    lines = list(csv.DictReader(io.StringIO((whole / "leaderboard.csv").read_text())))
    assert [line["source"] for line in lines] == [""] * 6 + ["another"] * 6
    data = json.loads((whole / "leaderboard.json").read_text())["beside"]
    assert [row["strategy"] for row in data["apart"][0]["rows"]] == [line["strategy"] for line in lines[6:]]
    (html,) = map(str, beside_sections(board))
    assert html.count("<tr>") == 7
    assert part.board.headline in html


def test_trainings_at_budgets_of_the_other_run_alone_are_left_out(tmp_path):
    here = write_run(tmp_path / "here", seeds=(0,))
    other = write_run(tmp_path / "other", seeds=(1,), budgets=(8000, 16000))
    run, found = with_beside(read_run(str(here)), beside({"run": str(other)}))
    assert run.budgets == [16000]
    assert found.joined[0].left_out == (8000,)
    assert "left out: its trainings of 8,000 samples" in found.remarks[0]


def test_a_source_that_is_gone_is_a_remark_and_the_report_is_made(whole, tmp_path):
    path = tmp_path / "other"
    (path / "broken").mkdir(parents=True)
    (path / "broken" / "run.json").write_text('{"strategies": 3, "pool": {"rows": 1, "ok": 1}, "tasks": []}')
    entries = [{"run": str(path / "none")}, {"run": str(path / "broken")}, {"results": str(path / "gone.csv")}]
    board = build_report(str(whole), beside(*entries))
    assert [bool(re.match(r"\S+ is not shown: ", remark)) for remark in board.beside.remarks] == [True] * 3
    assert numbers(board) == numbers(make_leaderboard(read_run(str(whole))))


# ---- results from elsewhere: formats ----


def test_names_of_tasks_in_other_programs():
    names = task_names(())
    found = {name: names.get(canonical(name)) for name in (
        "ImageNet 1k", "wds/imagenet1k", "wds_imagenet1k_test", "wds_vtab-pets_test", "wds/vtab/cifar10", "CIFAR-10",
        "vtab/cifar10", "Oxford-IIIT Pet", "wds/mscoco_captions", "retrieval/flickr30k", "params (M)", "wds/fer2013",
    )}  # fmt: skip
    assert found == {
        "ImageNet 1k": "imagenet1k", "wds/imagenet1k": "imagenet1k", "wds_imagenet1k_test": "imagenet1k",
        "wds_vtab-pets_test": "vtab/pets", "wds/vtab/cifar10": "cifar10", "CIFAR-10": "cifar10",
        "vtab/cifar10": "cifar10", "Oxford-IIIT Pet": "vtab/pets",
        "wds/mscoco_captions": "retrieval/mscoco_2014_5k_test_image_text_retrieval",
        "retrieval/flickr30k": None,  # DataComp's first Flickr: 31,014 images
        "params (M)": None, "wds/fer2013": None,
    }  # fmt: skip


def test_open_clips_csv(tmp_path):
    path = write_open_clip(tmp_path / "openclip_results.csv")
    rows = read(path)
    assert list(rows) == [f"ViT-B-32 {tag}" for tag in TAGS.values()]
    assert value(rows["ViT-B-32 openai"], "ImageNet 1k") == 0.6332
    assert list(read(path, rows=["* commonpool_s_*"])) == [f"ViT-B-32 {tag}" for tag in list(TAGS.values())[1:]]
    left_out = read_results(BesideConfig(results=path), "x").left_out
    assert left_out == ("params (M)", "FLOPs (B)")


def test_clip_benchmarks_files_are_one_row_a_model(tmp_path):
    pattern = write_clip_benchmark(tmp_path / "clip_benchmark")
    write_clip_benchmark(tmp_path / "clip_benchmark", "ViT-B-16")
    rows = read(pattern)
    assert sorted(rows) == ["ViT-B-16 openai", "ViT-B-32 openai"]
    row = rows["ViT-B-32 openai"]
    assert value(row, "wds/imagenet1k", "acc1") == 0.63334
    assert "acc5" not in row.cells["wds/vtab/pcam"]  # a bare NaN
    assert value(row, "wds/flickr30k", "mean_recall@1") == pytest.approx((0.5882 + 0.7886) / 2)


def test_clip_benchmarks_built_csv_is_the_same(tmp_path):
    pattern = write_clip_benchmark(tmp_path / "clip_benchmark")
    records = [json.loads(path.read_text()) for path in sorted((tmp_path / "clip_benchmark").iterdir())]
    lines = []
    for record in records:  # as `clip_benchmark build` does; its columns are in the order of a set
        lines.append(record["metrics"] | {key: record[key] for key in record if key != "metrics"})
        lines[-1]["model_fullname"] = f"{record['model']} {record['pretrained']}"
    path = tmp_path / "benchmark.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, sorted({key for line in lines for key in line}, reverse=True))
        writer.writeheader()
        writer.writerows(lines)

    def plain(rows):
        return {
            (name, task, metric): cell.fraction()
            for name, row in rows.items()
            for task, by_metric in row.cells.items()
            for metric, cell in by_metric.items()
        }

    assert plain(read(path)) == plain(read(pattern))


def test_another_language_is_another_task(tmp_path):
    record = {"dataset": "wds/imagenet1k", "model": "m", "pretrained": "p", "task": "zeroshot_classification"}
    path = tmp_path / "cn.json"
    path.write_text(json.dumps(record | {"metrics": {"acc1": 0.4}, "language": "cn"}))
    assert list(read(path)["m p"].cells) == ["wds/imagenet1k (cn)"]


def test_datacomps_lines_are_one_row_named_by_the_entry_or_the_folder(tmp_path):
    (tmp_path / "mine").mkdir()
    path = write_datacomp(tmp_path / "mine" / "eval_results.jsonl")
    row = read(path, name="ours")["ours"]
    assert value(row, "vtab/pets", "mean_per_class_recall") == 0.0796
    assert list(read(path)) == ["mine/eval_results.jsonl"]
    (tmp_path / "theirs").mkdir()
    write_datacomp(tmp_path / "theirs" / "eval_results.jsonl")
    pattern = tmp_path / "*" / "eval_results.jsonl"
    assert list(read(pattern, name="x")) == ["mine/eval_results.jsonl", "theirs/eval_results.jsonl"]


def test_plain_lists_and_tables_say_their_unit(tmp_path):
    (tmp_path / "list.csv").write_text(
        "name,task,value,unit\na,MNIST,8.74,percent\nb,MNIST,0.5,fraction\nb,GTSRB,,fraction\n"
    )
    rows = read(tmp_path / "list.csv")
    assert value(rows["a"], "MNIST") == pytest.approx(0.0874)
    assert value(rows["b"], "MNIST") == 0.5
    assert "GTSRB" not in rows["b"].cells
    (tmp_path / "table.csv").write_text("\ufeffstrategy,mnist,cars\nno_filter,0.9,\nclip,12,3\n")
    rows = read(tmp_path / "table.csv", unit="percent")
    assert value(rows["no_filter"], "mnist") == pytest.approx(0.009)  # 0.9 percent: never guessed
    assert list(rows["no_filter"].cells) == ["mnist"]


TWICE = '{"key": "mnist", "dataset": "MNIST", "metrics": {"acc1": 0.5}}'
BENCH = '{"dataset": "mnist", "model": "m", "pretrained": "p", "task": "t", "metrics": {"acc1": %s}}'


@pytest.mark.parametrize(
    "text, more, message",
    [
        ("", {}, r"f\.txt, expected results of open_clip \(CSV\), CLIP_benchmark"),
        ("hello\nworld\n", {}, r"f\.txt, expected results of open_clip"),
        ('{"accuracy": 0.5}', {}, r"f\.txt, expected results of open_clip"),
        ("[1, 2]", {}, r"f\.txt, expected results of open_clip"),
        ("[" * 100_000, {}, r"f\.txt(:1)?: (nested too deeply, )?expected JSON"),
        (f"{TWICE}\n{{broken\n", {}, r"f\.txt:2: expected JSON \(Expecting property name"),
        (f"{TWICE}\n{TWICE}\n", {}, r"f\.txt:2: acc1: mnist of .* is in .*f\.txt:1: acc1, too, expected each result once"),
        (BENCH % "1.2", {}, r"f\.txt: acc1 = 1\.2, expected a fraction 0\.\.1"),
        (BENCH % "-0.1", {}, r"acc1 = -0\.1, expected a fraction 0\.\.1"),
        (BENCH % "Infinity", {}, r"acc1 = inf, expected a fraction 0\.\.1"),
        (BENCH % "true", {}, r"acc1 = True, expected a fraction 0\.\.1"),
        (BENCH % "[0.5]", {}, r"acc1 = \[0\.5\], expected a fraction 0\.\.1"),
        (BENCH % "0.5", {"unit": "percent"}, r"report\.beside\.0\.unit = percent has no effect"),
        (BENCH % "0.5", {"rows": ["q *"]}, r"report\.beside\.0\.rows = \['q \*'\], expected a pattern.*Choose from: m p"),
        ("name,mnist\na,50\n", {}, r"report\.beside\.0\.unit is missing, expected one of fraction, percent"),
        ("name,mnist\na,50\n", {"unit": "fraction"}, r"f\.txt:2: mnist = 50, expected a fraction 0\.\.1"),
        ("name,mnist\na,101\n", {"unit": "percent"}, r"f\.txt:2: mnist = 101, expected a percentage 0\.\.100"),
        ("name,mnist\na,nan\n", {"unit": "percent"}, r"f\.txt:2: mnist = nan, expected a percentage"),
        ("name,mnist\na,5_0\n", {"unit": "percent"}, r"f\.txt:2: mnist = 5_0, expected a percentage"),
        ("name,mnist\na,50\na,51\n", {"unit": "percent"}, r"f\.txt:3: mnist: mnist of a is in .*:2: mnist, too"),
        ("name,mnist,mnist\na,50,51\n", {"unit": "percent"}, r"f\.txt:1: the column mnist is there twice"),
        ("name,mnist,MNIST\na,50,51\n", {"unit": "percent"}, r"f\.txt:2: MNIST: mnist is in .*f\.txt:2: mnist, too"),
        ("name,mnist\na,50,51\n", {"unit": "percent"}, r"f\.txt:2: 3 cells, expected 2 as in the head"),
        ("name,mnist\n,50\n", {"unit": "percent"}, r"f\.txt:2: the name is empty"),
        ('name,mnist\n"a,50\n', {"unit": "percent"}, r"f\.txt:2: expected CSV"),
        ("name,mnist\n", {"unit": "percent"}, r"f\.txt, expected at least one row"),
        ("name,task,value,unit\na,mnist,5,%\n", {}, r"f\.txt:2: unit = %, expected one of fraction, percent"),
        ("name,task,value\na,mnist,5\n", {}, r"unit is missing"),
        ("name,task,value,unit\na,mnist,5,percent\n", {"unit": "percent"}, r"unit = percent has no effect.*column"),
    ],
)  # fmt: skip
def test_faults_are_one_line_before_any_work(tmp_path, monkeypatch, text, more, message):
    (tmp_path / "f.txt").write_text(text)
    entry = {"results": str(tmp_path / "f.txt")} | more
    with pytest.raises(ConfigError, match=message) as error:
        check_beside(load(tmp_path, {"beside": [entry]}))
    assert "\n" not in str(error.value)


def test_files_that_are_missing_or_no_text(tmp_path):
    with pytest.raises(ConfigError, match=r"results = .*none\*\.csv, expected a file that is there"):
        read(tmp_path / "none*.csv")
    (tmp_path / "x").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"expected text in UTF-8"):
        read(tmp_path / "x")


# ---- results from elsewhere: what is made of them ----


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported")
    run = write_run(folder / "root", seeds=(0, 1))

    def broken_average(lines):
        lines[1]["Average perf. on 38 datasets"] = "030282.6305070175546877"  # as published once

    (folder / "list.csv").write_text("name,task,value,unit\npaper,Objects,61.5,percent\npaper,colours,0.9,fraction\n")
    entries = beside(
        {"results": write_open_clip(folder / "openclip_results.csv", broken_average)},
        {"results": write_clip_benchmark(folder / "clip_benchmark"), "name": "clip_benchmark"},
        {"results": write_datacomp(folder / "eval_results.jsonl"), "name": "ours"},
        {"results": str(folder / "list.csv")},
    )
    return build_report(str(run), entries), run


def row_of(board, name):
    return next(row for row in board.beside.rows if row.name == name and row.source != "clip_benchmark")


def test_published_averages_are_reproduced_from_single_tasks(imported):
    board, _ = imported
    values = published()
    for column, tag in TAGS.items():
        stated = next(scores for name, scores in values.items() if name.split()[0] == column)
        row = row_of(board, f"ViT-B-32 {tag}")
        assert row.aggregates["datacomp"].value == pytest.approx(
            float(stated["Average perf. on 38 datasets"]), abs=5e-5
        )
        assert row.aggregates["imagenet"].value == float(stated["ImageNet 1k"])
    # Table 3 of the paper: CLIP L/14 30 % at the small scale
    row = row_of(board, "ViT-B-32 commonpool_s_clip_s13m_b4k")
    for name, expected in {"imagenet": 0.051, "shifts": 0.055, "vtab": 0.190, "retrieval": 0.119}.items():
        assert row.aggregates[name].value == pytest.approx(expected, abs=0.002)


def test_a_stated_average_that_is_wrong_is_said(imported):
    board, _ = imported
    (remark,) = [line for line in board.beside.remarks if "is not the mean of its tasks" in line]
    assert "commonpool_s_s13m_b4k" in remark
    assert "030282.63" in remark


def test_item_noise_is_wilsons_where_the_number_of_images_tells_it(imported):
    board, _ = imported
    row = row_of(board, "ViT-B-32 openai")
    one = row.scores["imagenet1k"]
    assert one.items == wilson(0.6332, 50_000)
    assert one.half_width == pytest.approx(1.96 * np.sqrt(0.6332 * 0.3668 / 50_000), rel=1e-3)
    assert row.scores["vtab/pets"].half_width is None  # a mean of classes
    assert {"vtab/pets", "wilds/fmow", "misc/winogavil"} <= set(row.unknown_noise)
    assert "vtab/pcam" not in row.unknown_noise
    shifts = next(a for a in board.beside.aggregates if a.name == "shifts")
    widths = [row.scores[task].half_width for task in shifts.tasks]
    assert row.aggregates["shifts"].half_width == pytest.approx(np.sqrt(np.sum(np.square(widths))) / 6)


def test_no_average_is_over_some_tasks(imported):
    board, _ = imported
    row = row_of(board, "ours")
    assert row.aggregates["imagenet"].value == 0.0505
    assert row.aggregates["datacomp"].value is None
    assert len(row.aggregates["datacomp"].missing) == 34
    paper = row_of(board, "paper")
    assert paper.scores["objects"].value == pytest.approx(0.615)
    assert paper.average.missing == ("objects_shifted", "retrieval")
    # the size of this run's own test set: 600 items
    assert paper.scores["objects"].items == pytest.approx(wilson(0.615, 600))


def test_imported_rows_compete_with_nobody(imported):
    board, run = imported
    assert numbers(board) == numbers(make_leaderboard(read_run(str(run))))
    assert all(row.strategy.name not in ("paper", "ours") for row in board.rows)
    record = json.loads((run / "leaderboard.json").read_text())["beside"]["imported"][0]
    assert record["num_seeds"] == 1
    assert "p" not in json.dumps(sorted(record)).replace("source", "").replace("strategy", "").split('"')


def test_all_that_is_left_out_is_listed(imported):
    text = terminal_table(imported[0])
    assert "3 rows of openclip_results.csv: measured elsewhere" in text
    for name in ("params (M)", "FLOPs (B)", "wds/fer2013", "retrieval/flickr30k"):
        assert name in text
    assert "ours has other metrics than the task's own of fairness/fairface (acc_gender)" in text


def test_imported_rows_are_in_every_file(imported):
    board, run = imported
    lines = list(csv.DictReader(io.StringIO((run / "leaderboard.csv").read_text())))
    found = {(line["source"], line["strategy"]): line for line in lines if line["source"]}
    line = found["openclip_results.csv", "ViT-B-32 openai"]
    assert float(line["imagenet1k"]) == 0.6332
    assert (line["num_seeds"], line["standing"], line["p"]) == ("1", "", "")
    markdown = (run / "leaderboard.md").read_text()
    assert "## Results from elsewhere" in markdown
    assert "| ViT-B-32 openai | openclip\\_results.csv |" in markdown.replace("openclip_results", "openclip\\_results")
    html = str(beside_sections(board)[0])
    assert "63.3 ± 0.4" in html
    assert "52.5 ± &gt;0.2" in html
    json.loads((run / "leaderboard.json").read_text())


def test_fmow_is_said_to_be_another_number_elsewhere(imported):
    assert sum("acc_worst_region_of_all" in line for line in imported[0].beside.remarks) == 1


def test_a_metric_that_the_row_has_not_is_said(tmp_path):
    run = write_run(tmp_path / "root", seeds=(0,))
    folder = tmp_path / "clip_benchmark"
    pattern = write_clip_benchmark(folder, **{"wds/mscoco_captions": {"image_retrieval_recall@5": 0.56}})
    board = build_report(str(run), beside({"results": pattern}))
    expected = "retrieval/mscoco_2014_5k_test_image_text_retrieval (image_retrieval_recall@5)"
    assert any(expected in line for line in board.beside.remarks)


def test_another_metric_does_not_stand_in_the_tasks_column(tmp_path):
    tasks = dict.fromkeys(("imagenet1k", "objects"), ("zeroshot_classification", "acc5", 0.005))
    run = write_run(tmp_path / "root", seeds=(0,), num_items=120, tasks=tasks)
    pattern = write_clip_benchmark(tmp_path / "one", name="named", **{"wds/imagenet1k": {"acc1": 0.6}})
    (tmp_path / "plain.csv").write_text("name,imagenet1k,objects\nunnamed,60,80\n")
    board = build_report(
        str(run), beside({"results": pattern}, {"results": str(tmp_path / "plain.csv"), "unit": "percent"})
    )
    for row in board.beside.rows:
        assert row.scores["imagenet1k"].value is None
        assert row.aggregates["imagenet"].value == 0.6
        assert row.average.value is None
    assert sum("other metrics than the task's own of imagenet1k (acc1)" in line for line in board.beside.remarks) == 2
    lines = list(csv.DictReader(io.StringIO((run / "leaderboard.csv").read_text())))
    assert [line["imagenet1k"] for line in lines if line["source"]] == ["", ""]


HOSTILE = '</table><script>alert("x")</script>=1+1 \u202e\x1b[31m|`*'


def test_hostile_names_are_only_text(whole, tmp_path):
    path = tmp_path / "evil.csv"
    path.write_text("name,task,value,unit\n" + f'"{HOSTILE.replace(chr(34), chr(34) * 2)}",MNIST,5,percent\n')
    other = part_of(whole, tmp_path, "other", lambda strategy, seed: True)
    edit_run(other, lambda data: data["pool"].update(path=HOSTILE))
    entries = [{"results": str(path), "name": f"@{HOSTILE}"}, {"run": str(other), "name": HOSTILE}]
    board = build_report(str(whole), beside(*entries))
    text = terminal_table(board)
    html = "".join(map(str, beside_sections(board)))
    assert all(line.isprintable() for line in text.splitlines())
    assert "<script>alert" not in html
    assert "&lt;script&gt;" in html
    assert "\u202e" not in html + text
    assert "<script" not in (whole / "leaderboard.md").read_text()
    for line in csv.reader(io.StringIO((whole / "leaderboard.csv").read_text())):
        assert not any(cell.startswith(("=", "@")) for cell in line)


# ---- the config, and --report ----

CONFIG = {
    "pool": {"source": "demo"},
    "recipes": {},
    "strategies": {"no_filter": {}},
    "compare": ["no_filter"],
    "train": {"recipe": "demo"},
    "eval": {"tasks": ["objects"], "root": "demo"},
}


def load(folder: Path, report, root: str = "root", **more) -> config.Config:
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(CONFIG | {"root": str(folder / root), "report": report} | more))
    return config.load(str(path))


@pytest.mark.parametrize(
    "entry, message",
    [
        ({}, r"report\.beside\.0: expected either run or results"),
        ({"run": "a", "results": "b"}, r"report\.beside\.0: expected either run or results"),
        ({"run": "a", "rows": ["x"]}, r"report\.beside\.0\.rows has no effect on a run"),
        ({"run": "a", "unit": "percent"}, r"report\.beside\.0\.unit has no effect on a run"),
        ({"results": "a", "unit": "points"}, r"report\.beside\.0\.unit = points, expected one of"),
        ({"results": "a", "name": " "}, r"report\.beside\.0\.name = ' ', expected a name"),
        ({"result": "a"}, r"report\.beside\.0\.result is an unknown key\. Did you mean results"),
    ],
)
def test_faults_of_the_config(tmp_path, entry, message):
    with pytest.raises(ConfigError, match=message):
        load(tmp_path, {"beside": [entry]})


def test_beside_has_no_effect_on_selections(tmp_path):
    with pytest.raises(ConfigError, match=r"report\.beside has no effect on selections"):
        load(tmp_path, {"beside": [{"results": "a"}]}, pool={"source": "demo", "download": False})


def test_a_root_is_its_newest_other_run(whole, tmp_path):
    first = part_of(whole, tmp_path, "root", lambda strategy, seed: True)
    second = first.with_name("2026-12-01T00-00-00Z_demo")
    shutil.copytree(first, second)
    (first.with_name("2026-12-02T00-00-00Z_selections")).mkdir()
    (first.with_name("2026-12-02T00-00-00Z_selections") / "run.json").write_text('{"trainings": []}')
    loaded = load(tmp_path, {"beside": [{"run": str(tmp_path / "root")}]})
    assert runs.find_beside(loaded).report.beside[0].run == str(second)
    assert runs.find_beside(loaded, str(second)).report.beside[0].run == str(first)
    with pytest.raises(ConfigError, match=r"report\.beside\.0\.run = .*nothing, expected another run that trained"):
        runs.find_beside(load(tmp_path, {"beside": [{"run": str(tmp_path / "nothing")}]}))
    (second / "run.json").write_text("{")
    with pytest.raises(ConfigError, match=r"run\.json: expected JSON"):
        runs.find_beside(loaded)


def test_two_runs_of_one_name_need_names(whole, tmp_path):
    entry = {"run": str(whole)}
    with pytest.raises(ConfigError, match=rf"report\.beside\.1\.name = {RUN}, expected a name that no other run has"):
        check_beside(load(tmp_path, {"beside": [entry, entry]}))
    check_beside(load(tmp_path, {"beside": [entry, entry | {"name": "x"}]}))


def test_report_shows_what_set_says_else_what_the_run_recorded(whole, tmp_path, capsys):
    here = part_of(whole, tmp_path, "root", lambda strategy, seed: strategy == "no_filter")
    other = part_of(whole, tmp_path, "other", lambda strategy, seed: strategy != "no_filter")
    path = write_datacomp(tmp_path / "eval_results.jsonl")
    load(tmp_path, {})
    (tmp_path / "c.yaml").write_text((tmp_path / "c.yaml").read_text().replace("report: {}\n", ""))
    edit_run(here, lambda data: data.update(beside=[{"run": str(other), "name": "recorded"}]))
    line = ["--config", str(tmp_path / "c.yaml"), "--report"]
    assert command.main(line) == 0
    assert "clip_top30 @ recorded" in capsys.readouterr().out
    bytes_before = {name: (here / f"leaderboard.{name}").read_bytes() for name in ("md", "json", "csv", "html")}
    assert command.main([*line, "--set", f"report.beside=[{{results: {path}, name: ours}}]"]) == 0
    out = capsys.readouterr().out
    assert "1 row of ours: measured elsewhere" in out
    assert "@ recorded" not in out
    assert command.main([*line, "--set", "report.beside=[]"]) == 0
    assert "elsewhere" not in capsys.readouterr().out
    assert command.main(line) == 0
    assert {name: (here / f"leaderboard.{name}").read_bytes() for name in bytes_before} == bytes_before
    assert command.main([*line, "--set", "report.beside=[{results: missing.csv}]"]) == 2
    assert "expected a file that is there" in capsys.readouterr().err


SMALL = ["recipes.tiny.samples_seen=64", "compare=[no_filter]", "eval.tasks=[colours]"]


def test_real_records_of_two_roots_join_and_no_artifact_changes(tmp_path):
    made = {}
    now = datetime.datetime(2026, 1, 1)
    for name, more in {
        "first": ["train.seeds=[0]"],
        "second": ["train.seeds=[1]", f"report.beside=[{{run: {tmp_path / 'first'}, name: first}}]"],
    }.items():
        overrides = [f"root={tmp_path / name}", *SMALL, *more]
        loaded = runs.find_beside(config.load(str(TINY), overrides))
        check_beside(loaded)
        plan = planning.build(loaded, str(TINY))
        outcome = run_here(plan, [step for step in plan.steps if "/eval/" in step])
        assert not outcome.failures
        made[name] = tmp_path / name / "runs" / "2026-01-01T00-00-00Z_tiny"
        made[name].mkdir()
        (made[name] / "run.json").write_text(json.dumps(runs.run_record(plan, outcome, "tiny", now)))
    board = build_report(str(made["second"]))  # what the run recorded
    (joined,) = board.beside.joined
    assert (joined.added, joined.more_seeds) == ((), {"no_filter": 1})
    assert [row.seeds for row in board.rows] == [(1, 0)]
    assert not board.one_seed

    signed = BesideConfig(results="https://user:password@host/results.csv?signature=1")
    report = ReportConfig(beside=[signed])
    signing = dataclasses.replace(plan, config=loaded.model_copy(update={"report": report}))
    record = runs.run_record(signing, outcome, "tiny", now)
    assert record["beside"] == [{"results": "https://host/results.csv"}]

    def identities(loaded):
        steps = planning.build(loaded, str(TINY)).steps
        return {name: (step.kind, step.version, dict(step.values), dict(step.inputs)) for name, step in steps.items()}

    bare = config.load(str(TINY), [override for override in overrides if not override.startswith("report.")])
    assert identities(bare) == identities(loaded)


def test_a_run_and_results_on_an_object_store(whole, tmp_path, s3_url):
    for path in whole.parents[1].rglob("*"):
        if path.is_file():
            storage.write_bytes(f"{s3_url}/root/{path.relative_to(whole.parents[1])}", path.read_bytes())
    path = write_datacomp(tmp_path / "eval_results.jsonl")
    storage.write_bytes(f"{s3_url}/results/eval_results.jsonl", Path(path).read_bytes())
    here = part_of(whole, tmp_path, "here", lambda strategy, seed: strategy == "no_filter")
    entries = [{"run": f"{s3_url}/root", "name": "far"}, {"results": f"{s3_url}/results/*.jsonl", "name": "ours"}]
    loaded = runs.find_beside(load(tmp_path, {"beside": entries}))
    check_beside(loaded)
    board = build_report(str(here), loaded.report.beside)
    near = build_report(str(here), beside({"run": str(whole), "name": "far"}, {"results": path, "name": "ours"}))
    assert numbers(board) == numbers(near)
    assert board.beside.rows == near.beside.rows
    assert len(board.rows) == 6


def test_unlike_in_nothing(whole):
    run = read_run(str(whole))
    assert unlike_in(run, run) == ()
