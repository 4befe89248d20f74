"""The end of a run: counts that reconcile or are called out, what was done, and what it cost."""

from __future__ import annotations

import copy
import json
import pathlib
import re
import shutil

import pytest

from pipeline import summary
from pipeline.core.log import Progress
from pipeline.steps import Step
from stages import stage_class

STEPS = {
    "pool": Step("pool", "pool", 1, {}),
    "reference/trusted": Step("reference/trusted", "pool", 1, {}),
    "hashes": Step("hashes", "hashes", 1, {}, {"pool": "pool"}, work=stage_class("hashes")()),
    "basic/selection": Step("basic/selection", "selection", 1, {}, {"pool": "pool"}),
    "basic/train_set": Step("basic/train_set", "train_set", 1, {}, {"pool": "pool", "selection": "basic/selection"}),
}
POOL = {
    "source_rows": 110,
    "sampled_out_rows": 10,
    "rows": 100,
    "ok_rows": 93,
    "failed": {"undecodable": 2, "not_found": 5},
}
REFERENCE = {"source_rows": 9, "sampled_out_rows": 0, "rows": 9, "ok_rows": 9, "failed": {}}
FUNNEL = [
    {"rule": "ok", "rows_in": 100, "rows_kept": 93},
    {"rule": "caption_words > 2", "rows_in": 93, "rows_kept": 40},
]


SPENT = summary.Spent(90.0, 1.5, 0.25)


def record(kind: str, facts: dict, files: dict) -> dict:
    return {"kind": kind, "facts": facts, "files": files}


RECORDS = {
    "pool": record("pool", POOL, {"0.parquet": {"bytes": 10, "rows": 60}, "1.parquet": {"bytes": 10, "rows": 40}, "0.tar": {"bytes": 980}}),
    "reference/trusted": record("pool", REFERENCE, {"0.parquet": {"bytes": 7, "rows": 9}}),
    "hashes": record("hashes", {"rows": 100, "cpu_hours": 1.5, "gpu_hours": 0.25}, {"0.parquet": {"bytes": 4000}}),
    "basic/selection": record(
        "selection", {"pool_rows": 100, "ok_rows": 93, "kept_rows": 40, "kept_samples": 41, "funnel": FUNNEL}, {"uids.npy": {"bytes": 5}}
    ),
    "basic/train_set": record("train_set", {"num_samples": 41}, {"0.tar": {"bytes": 8}}),
}  # fmt: skip


def summarise(records, made=(), failed=(), units=None, retries=None):
    return summary.summarise(STEPS, records, made, failed, units or {}, retries or {}, SPENT)


def test_what_a_run_did_and_cost():
    units = {"shards": 3, "samples": 12_800_000}
    retries = {"its machine was lost": 2, "OSError": 11}
    found = summarise(RECORDS, ["hashes", "basic/selection"], (), units, retries)
    assert found.lines() == [
        "rows     100 = 93 ok + 7 failed (5 not_found, 2 undecodable); references: 9 = 9 ok",
        "steps    2 done now (3 shards, 12.8M samples), 3 reused",
        "again    13 items (OSError: 11, its machine was lost: 2)",
        "written  4kB in 2 artifacts",
        "time     2m",
        "compute  1.5 CPU-h and 0.25 GPU-h",
    ]
    assert json.loads(json.dumps(found.to_json()))["spent"] == {"seconds": 90.0, "cpu_hours": 1.5, "gpu_hours": 0.25}


def test_a_run_that_found_everything_done_cost_nothing():
    assert summarise(RECORDS).lines()[1:] == ["steps    0 done now, 5 reused", "time     2m"]


def test_a_run_without_a_pool_has_no_rows():
    left = len(STEPS) - 1
    steps = f"steps    0 done now, 0 reused, 1 failed, {left} not done"
    assert left > 0 and summarise({}, failed=["pool"]).lines() == [steps, "time     2m"]


@pytest.mark.parametrize(
    "step, change, problem",
    [
        ("pool", {"ok_rows": 92}, "pool: 99 rows (92 ok + 7 failed), expected 100"),
        ("pool", {"failed": {"undecodable": 8}}, "pool: 101 rows (93 ok + 8 failed), expected 100"),
        ("pool", {"source_rows": 111}, "pool: 110 rows and those left out by `sample`, expected 111"),
        ("pool", {"rows": 101, "ok_rows": 94, "source_rows": 111}, "pool: 100 rows of its shards, expected 101"),
        ("hashes", {"rows": 99}, "hashes: 99 rows, expected 100"),
        ("basic/selection", {"pool_rows": 99}, "basic/selection: 99 rows that were judged, expected 100"),
        ("basic/selection", {"ok_rows": 94}, "basic/selection: 94 ok rows, expected 93"),
        ("basic/selection", {"kept_rows": 39}, "basic/selection: 39 rows that are kept, expected 40"),
        (
            "basic/selection",
            {"funnel": [FUNNEL[0], FUNNEL[1] | {"rows_in": 92}]},
            "basic/selection: 92 rows that reach the rule 'caption_words > 2', expected 93",
        ),
        ("basic/train_set", {"num_samples": 40}, "basic/train_set: 40 samples, expected 41"),
    ],
)
def test_counts_that_do_not_reconcile_are_called_out(step, change, problem):
    records = copy.deepcopy(RECORDS)
    records[step]["facts"] |= change
    found = summarise(records)
    assert problem in found.problems
    assert f"ERROR    the counts do not reconcile: {problem}" in found.lines()
    assert summarise(RECORDS).problems == []


def test_a_finished_run_says_it_and_logs_it(finished):
    """Of a real run: the rows of its pool, every step, and hours that are those of the records."""
    root, done = finished
    printed = [
        line
        for line in done.stderr.splitlines()
        if line.split(" ")[0] in ("rows", "steps", "written", "time", "compute")
    ]
    assert [line.split()[0] for line in printed] == ["rows", "steps", "written", "time", "compute"]
    log = min(pathlib.Path(root).glob("runs/*/log.jsonl"))  # others may have come after it
    events = [json.loads(line) for line in log.read_text().splitlines()]
    end = events[-1]
    assert (end["event"], end["failures"], end["problems"]) == ("run_end", {}, [])
    steps = json.loads((log.parent / "plan.json").read_text())["steps"]  # some of them share an artifact
    names = {step["artifact"] for step in steps.values()}
    records = [json.loads(pathlib.Path(root, name, "_artifact.json").read_text()) for name in names]
    assert (end["made"], end["reused"], end["failed"]) == (len(records), len(steps) - len(records), 0)
    assert end["written_bytes"] == sum(entry["bytes"] for one in records for entry in one["files"].values())
    # with what the stages share, their workers' start, and the steps whose records say no hours
    assert end["spent"]["cpu_hours"] > sum(one["facts"].get("cpu_hours", 0) for one in records) > 0
    assert end["pool"]["rows"] == 240 == end["pool"]["ok_rows"] + sum(end["pool"]["failed"].values())
    assert end["units"]["shards"] >= 4 and end["units"]["tars"] >= 4
    units = {event["step"]: event["unit"] for event in events if event["event"] == "start"}
    counted = [event for event in events if event["event"] == "end" and units.get(event["step"]) in ("shards", "tars")]
    assert len(counted) >= 8 and all(event["done"] == event["total"] for event in counted)


def test_a_record_that_contradicts_another_fails_a_run_that_has_nothing_to_do(winnow, finished, tmp_path):
    root = tmp_path / "root"
    shutil.copytree(finished[0], root, ignore=shutil.ignore_patterns("runs"))
    changed = 0
    for path in root.glob("pool-*/_artifact.json"):
        found = json.loads(path.read_text())
        if found["facts"]["rows"] == 240:
            found["facts"]["failed"] = {"undecodable": 1}
            path.write_text(json.dumps(found))
            changed += 1
    assert changed == 1
    done = winnow.run(root, check=1)
    assert re.search(r"(?m)^steps    0 done now, \d+ reused$", done.stderr)
    assert re.search(
        r"(?m)^ERROR    the counts do not reconcile: pool: \d+ rows \(\d+ ok \+ 1 failed\), expected 240$", done.stderr
    )


class Meter:
    """Writes down what it is told."""

    def __init__(self):
        self.told = []

    def count(self, *values):
        self.told.append(values)

    def running(self, step, on):
        self.told.append((step, on))


def test_what_is_done_is_counted_told_and_logged(tmp_path):
    progress = Progress(str(tmp_path / "log.jsonl"))
    progress.meter = meter = Meter()
    progress.start("clip", 2)
    progress.advance("clip", 1, 60, {"undecodable": 3})
    progress.advance("clip", 1, 40)
    progress.retry("clip/00001", "its machine was lost")
    progress.retry("clip/00001", "OSError: the store is away, try again")
    progress.end("clip", "FAILED: no")
    progress.end("never", "FAILED: it did not start")
    assert meter.told == [
        ("clip", True),
        ("clip", "shards", 1, 60, {"undecodable": 3}),
        ("clip", "shards", 1, 40, {}),
        ("clip", False),
    ]
    assert progress.units == {"shards": 2}
    assert progress.retries == {"its machine was lost": 1, "OSError": 1}
    start, first, second, end, never = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert (start["event"], start["step"], start["total"], start["unit"]) == ("start", "clip", 2, "shards")
    assert (first["event"], first["item"], first["cause"]) == ("retry", "clip/00001", "its machine was lost")
    assert second["cause"] == "OSError: the store is away, try again"
    assert {key: end[key] for key in ("event", "step", "summary", "done", "total", "samples", "failed")} == {
        "event": "end", "step": "clip", "summary": "FAILED: no", "done": 2, "total": 2, "samples": 100, "failed": {"undecodable": 3},
    }  # fmt: skip
    assert (never["event"], never["seconds"]) == ("end", 0)


def test_a_log_on_an_object_store_is_there_after_each_step_and_at_the_end(s3_url):
    from pipeline.core import storage

    path = f"{s3_url}/runs/a/log.jsonl"
    progress = Progress(path)
    progress.start("clip", 2)
    assert not storage.exists(path)
    progress.end("clip")
    assert [json.loads(line)["event"] for line in storage.read_bytes(path).splitlines()] == ["start", "end"]
    progress.event("run_end")
    progress.close()
    assert [json.loads(line)["event"] for line in storage.read_bytes(path).splitlines()] == ["start", "end", "run_end"]


def test_a_log_that_can_not_be_written_fails_nothing(s3_url, caplog):
    progress = Progress(f"{s3_url}-nowhere/runs/a/log.jsonl")
    progress.start("clip", 1)
    progress.end("clip")
    assert "log.jsonl was not written: " in caplog.text
