"""What is seen of trainings while they run: live lines, alarms, and what trackers get; and a run that has it all."""

from __future__ import annotations

import datetime
import json
import pathlib
import threading

import pytest
import yaml

from pipeline import plan as planning
from pipeline import runs, states, trackers, watch
from pipeline.core import config, log
from pipeline.report import build_report
from tests.engine_fixture import run_here

TINY = pathlib.Path(__file__).resolve().parent / "tiny.yaml"
LABEL = "no_filter/seed0/train"
STUCK = "the loss stays at chance"


def line(step: int, **more) -> dict:
    values = {"step": step, "samples_seen": step * 32, "loss": 3.5 - step / 10, "ln_batch": 3.466, "grad_norm": None}
    return values | {"chance_loss": 3.466, "samples_per_s": 900.0, "data_wait_fraction": 0.031} | more


class Board:
    """What workers posted last."""

    def __init__(self):
        self.values, self.warnings = {}, {}
        self.looked = threading.Event()

    def posted(self):
        return dict(self.values)

    def warned(self):
        self.looked.set()
        return dict(self.warnings)


def look_again(board: Board) -> None:
    """None; returns after what is posted now was shown."""
    for _ in range(2):  # the first look may have begun before
        board.looked.clear()
        assert board.looked.wait(20)


def events(run: pathlib.Path) -> list[dict]:
    return [json.loads(text) for text in (run / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def watched(tmp_path, monkeypatch):
    """(board, Watch) that looks all the time."""
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.001)
    board, progress = Board(), log.Progress(str(tmp_path / "log.jsonl"))
    watching = watch.Watch(board, progress, str(tmp_path))
    watching.start()
    yield board, watching
    watching.stop()


def test_the_live_line_has_loss_beside_ln_batch_and_the_wait_for_data():
    assert watch.note(line(5)) == "loss 3.000 (ln batch 3.466)  data wait 3%"
    assert watch.note(line(5, ln_batch=None, chance_loss=4.4)) == "loss 3.000 (at chance 4.400)  data wait 3%"


def test_an_alarm_is_said_once_though_every_line_has_it(watched, tmp_path):
    board, watching = watched
    with watching.training(LABEL, 320, str(tmp_path / "none"), {}):
        for step in (1, 2, 3):
            board.values[LABEL] = line(step, alarm=STUCK if step > 1 else None, from_samples=32)
            look_again(board)
    alarms = [event for event in events(tmp_path) if event["event"] == "alarm"]
    assert [(event["step"], event["text"]) for event in alarms] == [(LABEL, STUCK)]
    starts = [event for event in events(tmp_path) if event["event"] == "start"]
    # one line was done in an earlier attempt
    assert [(event["step"], event["total"]) for event in starts] == [(LABEL, 320 - 32)]


def test_warnings_of_workers_are_said_at_once_and_then_now_and_then(watched, tmp_path, monkeypatch):
    board, watching = watched
    said = []
    monkeypatch.setattr(watching._progress, "say", said.append)
    for count in (1, 3, 5):
        board.warnings["patience:156"] = (count, f"s3://bucket/{count} can't be read yet")
        look_again(board)
    assert said == ["warning: from a worker: s3://bucket/1 can't be read yet"]
    watching.stop()
    assert said[1:] == ["warning: from a worker: s3://bucket/5 can't be read yet (4 such warnings since the last one)"]
    found = [event for event in events(tmp_path) if event["event"] == "warning"]
    assert [(event["at"], event["count"]) for event in found] == [("patience:156", 1), ("patience:156", 5)]


def test_the_samples_of_a_training_are_counted_to_the_last_though_the_board_missed_them(watched, tmp_path):
    """One that went on from the 64 samples of an earlier attempt, and whose last lines came between two looks."""
    board, watching = watched
    with watching.training(LABEL, 320, str(tmp_path), {}):
        board.values[LABEL] = line(3, from_samples=64)
        look_again(board)
        (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line(step)) + "\n" for step in range(1, 11)))
    assert watching._progress.units == {"samples": 320 - 64}
    (start,) = [event for event in events(tmp_path) if event["event"] == "start"]
    assert start["total"] == 320 - 64


def test_an_alarm_that_the_board_missed_is_in_the_metrics(watched, tmp_path):
    _, watching = watched
    with watching.training(LABEL, 320, str(tmp_path), {}):
        text = "".join(json.dumps(line(step, alarm=STUCK if step == 2 else None)) + "\n" for step in (1, 2, 3))
        (tmp_path / "metrics.jsonl").write_text(text)
    assert [event["text"] for event in events(tmp_path) if event["event"] == "alarm"] == [STUCK]


def test_what_is_tracked_is_numbers():
    assert trackers.numbers(line(3, alarm=STUCK, resumed=True, lr=1)) == {
        "samples_seen": 96, "loss": 3.2, "ln_batch": 3.466, "chance_loss": 3.466, "samples_per_s": 900.0,
        "data_wait_fraction": 0.031, "lr": 1,
    }  # fmt: skip


def test_a_tracker_that_fails_does_not_fail_the_training(tmp_path, monkeypatch):
    (tmp_path / trackers.TENSORBOARD).write_text("a file where the folder should be")
    (tmp_path / "metrics.jsonl").write_text(json.dumps(line(1)) + "\n")
    progress = log.Progress(str(tmp_path / "log.jsonl"))
    said = []
    monkeypatch.setattr(progress, "say", said.append)
    with watch.Watch(Board(), progress, str(tmp_path), ["tensorboard"]).training(LABEL, 320, str(tmp_path), {}):
        pass
    assert len(said) == 1
    assert said[0].startswith(f"warning: {LABEL}: no more lines for tensorboard: ")


def scalars(folder: pathlib.Path) -> dict[str, list[tuple[int, float]]]:
    """{tag: (step, value) of each point} of the event files in a folder, as TensorBoard itself reads them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder))
    found.Reload()
    tags = found.Tags()["tensors"]
    return {tag: [(event.step, event.tensor_proto.float_val[0]) for event in found.Tensors(tag)] for tag in tags}


def test_tensorboard_gets_every_line_once(tmp_path, monkeypatch):
    """Also those of before a kill, and those that came between two looks at the file."""
    monkeypatch.setattr(watch, "READ_EVERY_S", 0.0)
    monkeypatch.setattr(watch, "LOOK_EVERY_S", 0.001)
    board, progress = Board(), log.Progress(str(tmp_path / "log.jsonl"))
    watching = watch.Watch(board, progress, str(tmp_path), ["tensorboard"])
    watching.start()
    metrics, events_path = tmp_path / "metrics.jsonl", tmp_path / "tensorboard" / "no_filter.seed0.train"
    lines = [json.dumps(line(step)) + "\n" for step in range(1, 8)]
    with watching.training(LABEL, 320, str(tmp_path), {}):
        for count in (3, 4, 6):  # the first three are there at once: the training went on from step 2
            metrics.write_text("".join(lines[:count]))
            board.values[LABEL] = line(count, from_samples=64)
            look_again(board)
        assert len(scalars(events_path)["loss"]) >= 4
        metrics.write_text("".join(lines))
    watching.stop()
    found = scalars(events_path)
    assert set(found) == set(trackers.numbers(line(1)))
    assert found["loss"] == [(step, pytest.approx(3.5 - step / 10)) for step in range(1, 8)]


def test_a_run_with_budgets_a_start_and_held_out_pairs(tmp_path):
    """From the plan over trainings to the report, in this process."""
    warm = yaml.safe_load(TINY.read_text())["recipes"]["tiny"] | {"start_from": "first"}
    overrides = [
        f"root={tmp_path}", "stages=[image_stats]", "strategies={wide: {where: [aspect_ratio > 1]}}", "compare=[wide]",
        f"recipes.warm={yaml.safe_dump(warm)}", "models={first: {recipe: tiny, on: trusted}}",
        "references.held={source: {layout: demo, pairs: 40, clean: true, seed: 5}, shard_size: 40}",
        "train={recipe: warm, seeds: [1], budgets: [64, 128], held_out: held, log_to: [tensorboard]}",
        "cluster.train={batch_size: 8}", "eval.tasks=[colours]",
    ]  # fmt: skip
    plan = planning.build(config.load(str(TINY), overrides), "tiny.yaml")
    outcome = run_here(plan)
    assert outcome.failures == {}
    assert all(status.state == "done" for status in states.resolve(plan).values())
    facts = outcome.statuses["wide/samples64/seed1/train"].record["facts"]
    assert facts["seeds"] == {"initialisation": 1, "order": 1}
    assert (facts["samples_seen"], facts["batch_size"]) == (64, 8)
    run = tmp_path / "runs" / "here"
    date = datetime.datetime(2026, 11, 24, 16, 0, tzinfo=datetime.timezone.utc)
    (run / "run.json").write_text(json.dumps(runs.run_record(plan, outcome, "tiny", date)))
    board = build_report(str(run))
    assert board.notes == ()
    assert [part.samples_seen for part in board.by_budget] == [128, 64]
    assert all(row.average.value is not None for part in board.by_budget for row in part.rows)
    assert board.run.header["recipe"]["start_from"] == "first"
    labels = [f"wide.samples{num}.seed1.train" for num in (64, 128)]
    assert {path.name for path in (run / "tensorboard").iterdir()} == {"model.first", *labels}
    checkpoint = pathlib.Path(outcome.statuses["wide/samples128/seed1/train"].artifact.path)
    lines = [json.loads(text) for text in (checkpoint / "metrics.jsonl").read_text().splitlines()]
    assert 0 <= lines[-1]["held_out_recall_at_1"] == board.run.trainings[0].facts["held_out_recall_at_1"] <= 1
    tracked = scalars(run / "tensorboard" / labels[1])
    assert tracked["loss"] == [(one["step"], pytest.approx(one["loss"])) for one in lines]
