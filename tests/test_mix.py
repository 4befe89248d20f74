"""The mix: weights against its rule by bisection in plain Python, and what is said of groups that fall short."""

from __future__ import annotations

import json
import logging
import math
import pathlib
import random

import numpy as np
import pyarrow as pa
import pytest

from pipeline import plan as planning
from pipeline.core import config, pool
from pipeline.core.errors import ConfigError
from stages import build_stage
from stages.columns.mix import Mix, filled, rounded, weight_keys
from stages.selection import choose, strategies
from tests.duplicates_fixture import run_stage
from tests.engine_fixture import run_here
from tests.golden_fixture import check_golden
from tests.pool_fixture import drawing, even_shards, random_uids, write_columns, write_pool

IMAGE = drawing(1, 8, 6)
TINY = str(pathlib.Path(__file__).parent / "tiny.yaml")


def mixed(folder, groups, weights=None, failed=(), shards=3, kind=None, weight_kind=None, ids=None, **parameters):
    """(weight of each row, facts) of a pool with the columns `topic` and, where given, `quality`."""
    ids = ids or [f"{at:032x}" for at in range(len(groups))]
    rows = [{"image": None if at in failed else IMAGE, "caption": "a", "uid": uid} for at, uid in enumerate(ids)]
    path = write_pool(folder / "root", even_shards(rows, shards))
    columns = write_columns(folder / "root", path, {"topic": pa.array(groups, kind)})
    if weights is not None:
        columns |= write_columns(folder / "root", path, {"quality": pa.array(weights, weight_kind or pa.float32())})
        parameters["weight_by"] = "quality"
    _, found, facts = run_stage(path, folder / "out", Mix(column="topic", **parameters), columns)
    return [row["mix_weight"] for row in found], facts["mix"]


def by_rule(groups, weights, failed, shares, samples_fraction, cap):
    """[n] the largest min(cap, t x weight) of each group whose sum is at most its samples, t by bisection."""
    ok = [at for at in range(len(groups)) if at not in failed]
    found = [None if at in failed else 0.0 for at in range(len(groups))]
    for value, share in shares.items():
        target = share * samples_fraction * len(ok)
        own = [(at, weights[at]) for at in ok if groups[at] == value]
        own = [(at, w) for at, w in own if w is not None and math.isfinite(w) and w > 0]
        low, high = 0.0, 1e60
        for _ in range(1000):
            middle = math.sqrt(low * high) if low else high / 2
            if math.fsum(min(cap, middle * weight) for _, weight in own) <= target:
                low = middle
            else:
                high = middle
        for at, weight in own:
            found[at] = min(cap, low * weight)
    return found


@pytest.mark.parametrize("seed", range(6))
def test_weights_are_those_of_the_rule(seed, tmp_path):
    draw = random.Random(seed)
    num = draw.choice([40, 300])
    groups = [draw.choice(["a", "a", "a", "b", "c", "d", None]) for _ in range(num)]
    weights = [draw.choice([draw.random(), draw.random() ** 8 * 100, 1.0, 0.25]) for _ in range(num)]
    for at, odd in enumerate([None, math.nan, -1.0, 0.0, math.inf, 1e-45, -math.inf, 3e38][: 2 + seed]):
        weights[at * 4] = odd
    weights = [None if weight is None else float(np.float32(weight)) for weight in weights]
    failed = {5, 17}
    parameters = {
        "shares": {"a": 0.5, "b": 0.125, "c": 0.375} if seed % 2 else {"c": 0.2, "b": 0.01, "a": 0.6},
        "samples_fraction": draw.choice([0.3, 1.0, 2.0]),
        "cap": draw.choice([1.0, 4.0, 2.5]),
    }
    found, facts = mixed(tmp_path, groups, weights, failed, **parameters)
    expected = by_rule(groups, weights, failed, **parameters)
    for one, other in zip(found, expected, strict=True):
        assert one == other if one is None else one == pytest.approx(other, rel=3e-4, abs=1e-30)
    for group in facts["groups"]:
        own = [w for w, value in zip(found, groups, strict=True) if value == group["value"] and w]
        assert math.fsum(own) == pytest.approx(group["samples"], rel=1e-6)
        assert group["rows_at_cap"] == sum(w >= parameters["cap"] * (1 - 1e-7) for w in own)
        assert group["weighted_rows"] == len(own)
        if group["rows_at_cap"] < group["weighted_rows"]:
            assert group["samples"] == pytest.approx(group["share"] * parameters["samples_fraction"] * (num - 2))


def test_without_weights_a_group_is_spread_evenly(tmp_path):
    groups = ["a"] * 6 + ["b"] * 2 + ["c"] * 2 + [None, "a"]
    found, facts = mixed(tmp_path, groups, failed={11}, shares={"a": 0.25, "b": 0.75}, samples_fraction=0.8)
    # 11 ok rows, a mix of 8.8: 2.2 for six rows of a, 6.6 for two of b
    assert found == [pytest.approx(2.2 / 6)] * 6 + [pytest.approx(3.3)] * 2 + [0, 0, 0, None]
    assert facts == {
        "ok_rows": 11,
        "other_rows": 3,
        "samples": pytest.approx(8.8),
        "groups": [
            {"value": "a", "share": 0.25, "rows": 6, "weighted_rows": 6, "rows_at_cap": 0, "samples": pytest.approx(2.2), "pool_share": 6 / 11, "mix_share": pytest.approx(0.25)},
            {"value": "b", "share": 0.75, "rows": 2, "weighted_rows": 2, "rows_at_cap": 0, "samples": pytest.approx(6.6), "pool_share": 2 / 11, "mix_share": pytest.approx(0.75)},
        ],
    }  # fmt: skip


def test_what_the_cap_cuts_off_goes_to_the_others_of_the_group(tmp_path):
    weights = [100.0, 1.0, 2.0, 1.0, 7.0]
    found, facts = mixed(tmp_path, ["a"] * 4 + ["b"], weights, shares={"a": 1.0}, cap=2.0, samples_fraction=0.8)
    assert found == [2.0, 0.5, 1.0, 0.5, 0.0]  # 4 samples: 2 for the first row, 2 for the others by 1 : 2 : 1
    assert facts["groups"][0]["rows_at_cap"] == 1


def test_groups_that_fall_short_are_named(tmp_path, caplog):
    groups = ["a"] * 8 + ["b"] * 2 + ["c"] * 2
    with caplog.at_level(logging.WARNING, "winnow"):
        found, facts = mixed(
            tmp_path, groups, [1.0] * 10 + [0.0, None], shares={"a": 0.2, "b": 0.4, "c": 0.2, "none": 0.1}, cap=2.0
        )
    (record,) = caplog.records
    assert record.getMessage() == (
        "mix: 2 rows have topic == b with quality > 0, at cap 2 these are 4 of 5 samples; "
        "0 rows have topic == c with quality > 0, at cap 2 these are 0 of 2 samples; "
        "no row has topic == none, expected 1 samples of it"
    )
    assert found == [pytest.approx(0.3)] * 8 + [2.0] * 2 + [0.0] * 2
    assert [group["samples"] for group in facts["groups"]] == [pytest.approx(2.4), 4.0, 0.0, 0.0]
    assert facts["samples"] == pytest.approx(6.4)
    assert facts["groups"][1]["mix_share"] == pytest.approx(4 / 6.4)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "winnow"):
        mixed(tmp_path / "whole", ["a"] * 4, shares={"a": 1.0}, samples_fraction=4.0)  # all at the cap, and enough
    assert not caplog.records


def test_a_pool_without_ok_rows_and_one_without_the_column(tmp_path):
    found, facts = mixed(tmp_path / "failed", ["a", "b"], failed={0, 1}, shards=1, shares={"a": 1.0})
    assert found == [None, None]
    assert facts["samples"] == facts["ok_rows"] == 0
    found, facts = mixed(tmp_path / "null", [None, None, None], kind=pa.string(), shares={"a": 1.0})
    assert found == [0, 0, 0]
    assert facts["other_rows"] == 3


@pytest.mark.parametrize(
    ("values", "kind", "shares"),
    [
        ([3, 3, -1, 0, None], pa.int32(), {"3": 0.5, "-1": 0.5}),
        ([3, 3, -1, 0, None], pa.int64(), {"3": 0.5, "-1": 0.5}),
        ([True, True, False, None, None], pa.bool_(), {"true": 0.5, "false": 0.5}),
    ],
)
def test_values_that_are_no_text(values, kind, shares, tmp_path):
    found, _ = mixed(tmp_path, values, kind=kind, shares=shares)
    assert found == [1.25, 1.25, 2.5, 0, 0]


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.float64()])
def test_weights_of_other_types(kind, tmp_path):
    weights = [1, 2, 0, -5, None, 3 * 2**20]
    found, _ = mixed(tmp_path, ["a"] * 6, weights, weight_kind=kind, shares={"a": 1.0}, cap=5.0)
    assert found == [pytest.approx(1 / 3), pytest.approx(2 / 3), 0, 0, 0, 5.0]


def test_weights_do_not_depend_on_shards_or_their_order(tmp_path):
    rng = np.random.default_rng(0)
    ids = random_uids(rng, 200)
    groups = [str(value) for value in rng.choice(list("abc"), 200)]
    weights = rng.random(200).astype(np.float32).tolist()
    parameters = {"shares": {"a": 0.3, "b": 0.3, "c": 0.4}, "samples_fraction": 0.7, "cap": 1.0}
    found = []
    for number, shards in enumerate((1, 4, 7)):
        order = rng.permutation(200)
        rows = [[values[at] for at in order] for values in (groups, weights, ids)]
        own, facts = mixed(tmp_path / str(number), rows[0], rows[1], ids=rows[2], shards=shards, **parameters)
        found.append((sorted(zip(rows[2], own, strict=True)), facts))
    assert found[0] == found[1] == found[2]


def test_golden_weights(tmp_path):
    groups = [["a", "b", "c", None][at * 7 % 4] for at in range(24)]
    weights = [(at * 37 % 23) / 16 for at in range(24)]
    found, _ = mixed(tmp_path, groups, weights, {3}, shares={"a": 0.5, "b": 0.25, "c": 0.125}, cap=2.0)
    check_golden("mix", {"version": Mix.version, "weights": found})


def test_rounding_of_weights():
    rng = np.random.default_rng(1)
    values = np.concatenate([rng.random(1000), np.exp(rng.uniform(-80, 80, 1000)), [1.0, 4096.0, 3.4028235e38, 2047.5]])
    found = rounded(weight_keys(values))
    np.testing.assert_allclose(found, values, rtol=2.0**-12)
    assert found[-4:-1].tolist() == [1.0, 4096.0, pytest.approx(3.4028235e38, rel=2.0**-11)]
    assert rounded(weight_keys(found)).tolist() == found.tolist()
    odd = np.array([0.0, -0.0, -1.0, np.nan, np.inf, -np.inf, 1e300, -1e300, 1e-60])
    assert rounded(weight_keys(odd)).tolist() == [0] * 9


def test_sums_are_exact_however_far_apart_the_weights_are():
    weights = np.array([2.0**127, 1.0, 2.0**-140])
    from fractions import Fraction

    factor, at_cap, samples = filled(weights, np.array([1, 1, 2**40]), Fraction(2), Fraction(1))
    # Both large ones would be at the cap only if nothing were left for the small ones: they get the rest exactly.
    assert at_cap == 1 and samples == 2
    assert factor * 1.0 + factor * 2.0**-140 * 2**40 == pytest.approx(1.0)


def test_a_strategy_takes_as_many_samples_as_the_mix_says(tmp_path):
    rng = np.random.default_rng(3)
    groups = [str(value) for value in rng.choice(["a", "b", "c"], 3000, p=[0.7, 0.2, 0.1])]
    weights = rng.random(3000).astype(np.float32)
    rows = [{"image": IMAGE, "caption": "a", "uid": uid} for uid in random_uids(rng, 3000)]
    path = write_pool(tmp_path / "root", [rows[:1000], rows[1000:]])
    columns = write_columns(tmp_path / "root", path, {"topic": pa.array(groups), "quality": pa.array(weights)})
    stage = Mix(column="topic", shares={"a": 0.2, "b": 0.4, "c": 0.4}, weight_by="quality", samples_fraction=0.5)
    columns, _, facts = run_stage(path, tmp_path / "out", stage, columns)
    parsed = strategies.parse_strategies(
        {"mixed": {"repeat": {"column": "mix_weight", "cap": 4}}}, "here", {"mix_weight": "float32"}
    )
    choose.select(path, columns, parsed, "mixed", str(tmp_path / "chosen"))
    taken = []
    for shard in pool.load_shards(path):
        table = pool.read_table(f"{tmp_path}/chosen/{shard.name}.parquet", ["row", "multiplicity"])
        times = np.zeros(shard.rows, int)
        times[table["row"].to_numpy()] = table["multiplicity"].to_numpy()
        taken += times.tolist()
    assert max(taken) <= 4
    for group in facts["mix"]["groups"]:
        samples = sum(times for times, value in zip(taken, groups, strict=True) if value == group["value"])
        assert abs(samples - group["samples"]) < 4 * math.sqrt(group["rows"] / 4)


def test_a_run_mixes_topics_that_it_has_learnt_within_a_strategy(tmp_path):
    def plan_of(folder, words):
        folder.mkdir()
        for label in words:
            lines = [f"{word} {words[label][0]} {number}" for word in words[label] for number in range(60)]
            (folder / f"{label}.txt").write_text("\n".join(lines))
        sets = json.dumps({label: str(folder / f"{label}.txt") for label in words})
        stages = f"""stages=[image_stats, caption_stats, language,
            {{name: caption_classifier, as: topic, sets: {sets}}},
            {{name: mix, column: topic_caption_class, shares: {{one: 0.5, two: 0.25}}, within: some}}]"""
        strategies = "strategies={some: {random: {fraction: 0.3}}, mixed: {all_of: [some], repeat: {column: mix_weight, cap: 4}}}"
        overrides = [f"root={tmp_path}/root", stages, strategies, "compare=[mixed]", "models={}"]
        return planning.build(config.load(TINY, overrides), TINY)

    words = {"one": ["red", "photo"], "two": ["blue", "drawing"]}
    plan = plan_of(tmp_path / "here", words)
    outcome = run_here(plan, ["mixed/selection"])
    assert not outcome.failures
    record = {
        name: outcome.statuses[name].record["facts"] for name in ("topic", "mix", "mix/within", "mixed/selection")
    }
    assert record["topic"]["held_out_accuracy"] > 0.9
    assert record["mix"]["mix"]["ok_rows"] == record["mix/within"]["kept_rows"]
    assert abs(record["mixed/selection"]["kept_samples"] - record["mix"]["mix"]["samples"]) < 10
    again = run_here(plan_of(tmp_path / "there", words), ["mix"]).statuses
    assert again["mix"].artifact.name == outcome.statuses["mix"].artifact.name  # wherever the sets are
    other = run_here(plan_of(tmp_path / "other", words | {"two": ["green"]}), ["topic"]).statuses
    assert other["topic"].artifact.name != outcome.statuses["topic"].artifact.name


@pytest.mark.parametrize(
    ("parameters", "types", "message"),
    [
        ({"shares": {"a": 0.7, "b": 0.4}}, {"topic": "string"}, r"^shares: 1.1 together, expected at most 1"),
        ({"shares": {"a": 1.0}}, {"topic": "float32"}, "^column = topic of type float32, expected string or bool or"),
        ({"shares": {"yes": 1.0}}, {"topic": "bool"}, "^shares.yes: no value of topic, expected true or false"),
        ({"shares": {"01": 1.0}}, {"topic": "int32"}, "^shares.01: no value of topic, expected a whole number"),
        ({"shares": {"a": 1.0}, "weight_by": "q"}, {"topic": "string", "q": "bool"}, "^weight_by = q of type bool"),
    ],
)
def test_columns_that_can_not_serve_are_refused(parameters, types, message):
    with pytest.raises(ConfigError, match=message):
        Mix(column="topic", **parameters).check_needs(types, {})


def test_wrong_parameters():
    good = {"column": "topic", "shares": {"a": 0.1, "b": 0.2, "c": 0.7}}
    build_stage("mix", good, "here").check_needs({"topic": "string"}, {})  # 0.1 + 0.2 + 0.7 is 1 in decimals
    for change, message in (
        ({"shares": {}}, "here.shares"),
        ({"shares": {"a": 0.0}}, r"here.shares.a = 0.0, expected a number > 0"),
        ({"shares": {"a": 1.5}}, r"here.shares.a = 1.5, expected a number <= 1"),
        ({"samples_fraction": 0.0}, "here.samples_fraction = 0.0, expected a number > 0"),
        ({"cap": 0.0}, "here.cap = 0.0, expected a number > 0"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_stage("mix", good | change, "here")
