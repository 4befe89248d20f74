"""Averages over fixed lists of tasks: DataComp's published rows give its published averages; none is over some tasks."""

from __future__ import annotations

import csv
import pathlib

import pytest

from pipeline.core.datacomp import DATACOMP_TASKS
from pipeline.report.aggregates import aggregates_of, datacomp_aggregates
from pipeline.report.leaderboard import Leaderboard, make_leaderboard
from pipeline.report.records import Result, Run, Strategy, Task, Training

# Per-task results of released ViT-B-32 checkpoints: open_clip's docs/openclip_results.csv; s_ and m_ are DataComp's
# small and medium scale, clip is CLIP L/14's best 30 %, int the same within image clusters.
PUBLISHED = pathlib.Path(__file__).parent / "golden" / "datacomp_published.csv"
# DataComp's table 3 (arXiv 2304.14108): ImageNet, shifts, VTAB, retrieval, average of 38
TABLE_3 = {
    "s_none": (0.025, 0.033, 0.145, 0.114, 0.132),
    "s_basic": (0.038, 0.043, 0.150, 0.118, 0.142),
    "s_text": (0.046, 0.052, 0.169, 0.125, 0.157),
    "s_laion": (0.031, 0.040, 0.136, 0.092, 0.133),
    "s_clip": (0.051, 0.055, 0.190, 0.119, 0.173),
    "s_int": (0.039, 0.045, 0.162, 0.094, 0.144),
    "m_none": (0.176, 0.152, 0.259, 0.219, 0.258),
    "m_basic": (0.226, 0.193, 0.284, 0.251, 0.285),
    "m_text": (0.255, 0.215, 0.328, 0.249, 0.307),
    "m_image": (0.268, 0.213, 0.319, 0.256, 0.312),
    "m_laion": (0.230, 0.198, 0.307, 0.233, 0.292),
    "m_clip": (0.273, 0.230, 0.338, 0.251, 0.328),
    "m_int": (0.297, 0.239, 0.346, 0.231, 0.328),
}


def published() -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """{model: {task: value}} of the 38 tasks, and the average that the file states for each model."""
    with open(PUBLISHED, encoding="utf-8", newline="") as file:
        head, *lines = list(csv.reader(file))
    names = {entry["title"]: name for name, entry in DATACOMP_TASKS.items()}
    values: dict[str, dict[str, float]] = {model: {} for model in head[1:]}
    for title, *cells in lines[1:]:
        for model, cell in zip(values, cells, strict=True):
            values[model][names[title]] = float(cell)
    return values, dict(zip(values, map(float, lines[0][1:]), strict=True))


def datacomp_task(name: str, **other) -> Task:
    entry = DATACOMP_TASKS[name]
    fields = {"kind": entry["type"]} | {key: entry[key] for key in ("metric", "chance", "group", "counted", "clean")}
    return Task(name, **(fields | other))


def board_of(values: dict[str, dict[str, float]], tasks: list[Task]) -> Leaderboard:
    """The leaderboard of these values, one seed each."""
    run = Run(
        name="published",
        header={"config_name": "", "recipe": {}, "pool": {"path": "-", "rows": 0, "ok": 0}},
        config_text="",
        baseline="s_none",
        tasks=tuple(tasks),
        strategies=tuple(map(Strategy, values)),
        trainings=tuple(Training(name, 1, 0, f"checkpoint-{name}", None) for name in values),
        results=tuple(
            Result(name, 1, 0, task.name, None, None, values[name][task.name])
            for name in values
            for task in tasks
            if task.name in values[name]
        ),
        overlap=None,
        notes=(),
    )
    return make_leaderboard(run)


@pytest.fixture(scope="module")
def board() -> Leaderboard:
    return board_of(published()[0], [datacomp_task(name) for name, entry in DATACOMP_TASKS.items() if entry["counted"]])


def test_the_lists_are_datacomps():
    found = {aggregate.name: aggregate for aggregate in datacomp_aggregates()}
    assert {name: len(one.tasks) for name, one in found.items()} == {
        "imagenet": 1, "shifts": 6, "vtab": 13, "retrieval": 3, "datacomp": 38, "datacomp_clean": 33,
    }  # fmt: skip
    assert "sun397" in found["vtab"].tasks
    assert set(found["datacomp"].tasks) - set(found["datacomp_clean"].tasks) == {
        "vtab/clevr_count_all",
        "vtab/clevr_closest_object_distance",
        "vtab/pcam",
        "wilds/camelyon17",
        "vtab/kitti_closest_vehicle_distance",
    }
    assert [one.title for one in found.values()][1:] == [
        "shifts (6)", "VTAB (13)", "retrieval (3)", "DataComp (38)", "clean (33)",
    ]  # fmt: skip


def test_published_rows_give_the_published_average_of_38(board):
    stated = published()[1]
    assert len(board.rows) == len(stated) == 14
    for row in board.rows:
        # to the printed digit: each of the 38 values and the average are rounded at the fourth
        assert row.aggregates["datacomp"].value == pytest.approx(stated[row.strategy.name], abs=6e-5)
        assert row.average.value == pytest.approx(row.aggregates["datacomp"].value, abs=1e-12)


def test_published_rows_give_the_groups_of_the_papers_table(board):
    names = ("imagenet", "shifts", "vtab", "retrieval", "datacomp")
    rows = {row.strategy.name: [row.aggregates[name].value for name in names] for row in board.rows}
    for model, expected in TABLE_3.items():
        if model != "s_none":
            assert rows[model] == pytest.approx(expected, abs=2e-3), model
    # The released small checkpoint without a filter is another training than the table's: .142 against .132, which is
    # what a seed is worth here (VTAB's tasks near chance most). The file's own average holds for it, see above.
    apart = [found - stated for found, stated in zip(rows["s_none"], TABLE_3["s_none"], strict=True)]
    assert apart == pytest.approx([0.002, 0.0045, 0.013, 0.003, 0.010], abs=1e-3)


def test_the_clean_tasks_give_the_same_picture(board):
    clean = {row.strategy.name: row.aggregates["datacomp_clean"].value for row in board.rows}
    best = {scale: max((name for name in TABLE_3 if name.startswith(scale)), key=clean.get) for scale in ("s_", "m_")}
    assert best == {"s_": "s_clip", "m_": "m_clip"}
    values = published()[0]["m_int"]
    left = [value for name, value in values.items() if DATACOMP_TASKS[name]["clean"]]
    assert clean["m_int"] == pytest.approx(sum(left) / 33)


def test_no_average_is_over_some_of_its_tasks():
    names = [name for name, entry in DATACOMP_TASKS.items() if entry["group"] in ("retrieval", "ImageNet")]
    values = {model: {name: found[name] for name in names} for model, found in published()[0].items()}
    del values["m_int"]["misc/winogavil"]
    board = board_of(values, [datacomp_task(name) for name in names])
    rows = {row.strategy.name: row.aggregates for row in board.rows}
    assert rows["m_clip"]["retrieval"].value == pytest.approx(0.2507, abs=1e-4)
    assert rows["m_clip"]["imagenet"].value == 0.2725
    assert rows["m_clip"]["datacomp"].value is None
    assert len(rows["m_clip"]["datacomp"].missing) == 34
    assert "vtab/pcam" in rows["m_clip"]["datacomp"].missing
    assert rows["m_int"]["retrieval"].value is None
    assert rows["m_int"]["retrieval"].missing == ("misc/winogavil",)
    assert rows["m_int"]["imagenet"].value == 0.2972


def test_another_metric_of_the_task_is_not_datacomps():
    tasks = [datacomp_task("imagenet1k", metric="acc5"), datacomp_task("cifar10")]
    board = board_of({"s_none": {"imagenet1k": 0.4, "cifar10": 0.5}}, tasks)
    assert board.rows[0].aggregates["imagenet"].missing == ("imagenet1k",)
    own = [Task("imagenet1k", "zeroshot_classification", "acc1", 0.001, "ImageNet")]  # a user's own of that name
    assert [aggregate.name for aggregate in aggregates_of(own)] == ["chance_adjusted"]
    assert aggregates_of([]) == ()


def test_scores_are_adjusted_for_chance_where_it_is_known_for_every_task():
    tasks = [Task("a", "zeroshot_classification", "acc1", 0.1), Task("b", "zeroshot_classification", "acc1", 0.5)]
    board = board_of({"s_none": {"a": 0.1, "b": 0.75}, "other": {"a": 1.0, "b": 0.4}}, tasks)
    found = {row.strategy.name: row.aggregates["chance_adjusted"].value for row in board.rows}
    assert found == {"s_none": pytest.approx((0 + 0.5) / 2), "other": pytest.approx((1 - 0.2) / 2)}
    unknown = [tasks[0], Task("b", "zeroshot_retrieval", "mean_recall@1", None)]
    (row,) = board_of({"s_none": {"a": 0.1, "b": 0.75}}, unknown).rows
    assert row.aggregates["chance_adjusted"].missing == ("chance of b",)
