"""Stages that work within a strategy: rows outside are to them as failed rows are."""

from __future__ import annotations

import pathlib

import numpy as np
import pyarrow as pa
import pytest

from pipeline import plan as planning
from pipeline.core import config, pool
from pipeline.core.errors import ConfigError
from stages.columns.caption_duplicates import CaptionDuplicates
from stages.columns.minhash import MinHash
from stages.columns.semdedup import SemDeDup
from stages.selection import choose, uids
from stages.selection.strategies import parse_strategies
from tests.download_fixture import uid_of, write_table
from tests.duplicates_fixture import run_stage
from tests.engine_fixture import run_here
from tests.pool_fixture import drawing, write_columns, write_pool

TINY = str(pathlib.Path(__file__).resolve().parent / "tiny.yaml")
CAPTIONS = [f"a photo of thing {number % 7} and more words beside it" for number in range(40)]


def plan_of(tmp_path, *overrides):
    return planning.build(config.load(TINY, [f"root={tmp_path}/root", *overrides]), TINY)


def columns_of(pool_path, out, stages, columns, within=None):
    """{column: its values in the pool's order} of stages that run one after the other on the pool."""
    found = {}
    for number, stage in enumerate(stages):
        columns, rows, _ = run_stage(pool_path, f"{out}/{number}", stage, columns, within=within)
        found |= {name: [row[name] for row in rows] for name in stage.adds}
    return found


def test_rows_outside_are_as_failed_rows(tmp_path):
    chosen = np.random.default_rng(0).random(40) < 0.6
    vectors = np.random.default_rng(1).normal(size=(40, 8)).astype(np.float16)

    def made(name, there):
        rows = [{"image": drawing(n) if there[n] else None, "caption": CAPTIONS[n]} for n in range(40)]
        path = write_pool(tmp_path / name, [rows[:13], rows[13:14], rows[14:]])
        kept = pa.array([vector if there[n] else None for n, vector in enumerate(vectors)], pa.list_(pa.float16()))
        return path, write_columns(tmp_path / name, path, {"clip_image": kept})

    path, columns = made("whole", np.ones(40, bool))
    wanted = write_columns(tmp_path / "whole", path, {"wanted": pa.array(chosen)})
    strategies = parse_strategies({"s": {"where": ["wanted == true"]}}, "s", {"wanted": "bool"})
    selection = str(tmp_path / "selection")
    choose.select(path, wanted, strategies, "s", selection)
    failed_path, failed_columns = made("failed", chosen)

    stages = [MinHash(), CaptionDuplicates(), SemDeDup(clusters=3)]
    found = columns_of(path, tmp_path / "a", stages, columns, within=selection)
    expected = columns_of(failed_path, tmp_path / "b", stages, failed_columns)
    assert found == expected
    for values in found.values():
        assert [value is not None for value in values] == chosen.tolist()


def test_a_run_scores_within_what_a_strategy_chose(tmp_path):
    stage = "stages=[image_stats, caption_stats, language, {name: hashes, within: some}, {name: hashes, as: all}]"
    plan = plan_of(
        tmp_path, stage, "strategies={some: {random: {fraction: 0.3}}, oracle: {}}", "compare=[oracle]", "models={}"
    )
    assert plan.steps["hashes"].inputs == {"pool": "pool", "within": "hashes/within"}
    outcome = run_here(plan, ["hashes", "all"])
    assert not outcome.failures
    path = {name: outcome.statuses[name].artifact.path for name in ("pool", "hashes", "all", "hashes/within")}
    inside = 0
    for shard in pool.load_shards(path["pool"]):
        some, everything = (pool.read_table(f"{path[name]}/{shard.name}.parquet") for name in ("hashes", "all"))
        rows = pool.read_table(f"{path['hashes/within']}/{shard.name}.parquet")["row"].to_pylist()
        for name in ("pixels_sha256", "caption_sha256"):
            values = everything[name].to_pylist()
            assert some[name].to_pylist() == [value if row in rows else None for row, value in enumerate(values)]
        inside += len(rows)
    assert 60 < inside == outcome.statuses["hashes/within"].record["facts"]["kept_rows"] < 80


def test_before_a_download_a_stage_works_within_as_well(tmp_path):
    english, german = "a photo of the red car in the street", "ein rotes Auto steht auf der Straße vor dem Haus"
    captions = [english if number % 2 else german for number in range(20)]
    table = write_table(tmp_path / "t.parquet", ["http://example.org/1.jpg"] * 20, caption=captions)
    plan = plan_of(
        tmp_path, f"pool={{source: {{path: {table}, caption_column: caption}}, only: first}}", "models={}",
        "stages=[language, {name: caption_stats, within: english}]", "compare=[first]",
        "strategies={english: {where: [language == en]}, first: {where: [caption_words > 0]}}",
    )  # fmt: skip
    outcome = run_here(plan, ["urls/selection"])
    assert not outcome.failures
    assert plan.steps["urls/caption_stats"].inputs["within"] == "urls/caption_stats/within"
    assert outcome.statuses["urls/selection"].record["facts"]["kept_rows"] == 10


def test_what_is_excluded_is_nobodys_copy(tmp_path):
    """Of two equal captions the one with the lower uid survives, unless it may not be used at all."""
    captions = ["a photo of one red car in the street"] * 2 + ["two blue birds on a long wire"]
    table = write_table(tmp_path / "t.parquet", ["http://example.org/1.jpg"] * 3, caption=captions)
    excluded = tmp_path / "takedown.txt"
    excluded.write_text(f"{uid_of(1)}\n")

    def kept(*more):
        plan = plan_of(
            tmp_path, f"pool={{source: {{path: {table}, caption_column: caption}}, download: false}}", "models={}",
            "stages=[minhash, caption_duplicates]", "strategies={once: {where: [caption_is_duplicate == false]}}",
            "compare=[once]", "references={}", *more,
        )  # fmt: skip
        outcome = run_here(plan, ["once/selection"])
        assert not outcome.failures
        path = outcome.statuses["once/selection"].artifact.path
        return uids.text(uids.read_subset(f"{path}/uids.npy", "")).to_pylist()

    assert set(kept()) == {uid_of(1), uid_of(2)}
    assert set(kept(f"exclude.uids={excluded}")) == {uid_of(0), uid_of(2)}


def test_another_choice_within_is_another_identity(tmp_path):
    def fingerprint(fraction):
        stages = "stages=[image_stats, caption_stats, language, {name: hashes, within: some}]"
        strategies = f"strategies={{some: {{random: {{fraction: {fraction}}}}}, oracle: {{}}}}"
        plan = plan_of(tmp_path, stages, strategies, "compare=[oracle]", "models={}")
        return run_here(plan, ["hashes"]).statuses["hashes"].artifact.name

    assert fingerprint(0.3) != fingerprint(0.4)
    assert fingerprint(0.3) == fingerprint(0.3)


@pytest.mark.parametrize(
    "stages, strategies, message",
    [
        ("[{name: hashes, within: sume}]", "{some: {}}", r"stages\.hashes\.within = sume, expected a strategy\. Did you"),
        (
            "[{name: caption_stats, within: some}]",
            "{some: {where: [caption_words > 3]}}",
            "stages.caption_stats -> stages.caption_stats: a cycle, expected none",
        ),
        ("[{name: hashes, within: some}]", "{some: {reference: trusted}}", r"within = some, expected a strategy"),
    ],
)  # fmt: skip
def test_what_nothing_can_work_within_is_refused(tmp_path, stages, strategies, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, f"stages={stages}", f"strategies={strategies}", "compare=[some]", "models={}")
