"""The algebra of strategies: parsing, exact cuts, and equality with sets written out by hand."""

from __future__ import annotations

import json
import math
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core import pool
from pipeline.core.errors import ConfigError, WinnowError
from stages.column_files import POOL_TYPES
from stages.exclusion import Exclusion
from stages.selection import exact_cut, uids
from stages.selection.choose import select
from stages.selection.strategies import definition, parse_strategies, used_columns, used_files
from tests.pool_fixture import random_uids, write_columns, write_pool

TYPES = {
    **POOL_TYPES,
    "score": "float32",
    "words": "int32",
    "weight": "float32",
    "language": "string",
    "flag": "bool",
    "embedding": "float16[]",
}


NAMES = {pa.int32(): "int32", pa.int64(): "int64", pa.float32(): "float32", pa.float64(): "float64"}


class World:
    """A random pool with columns, and the same rows as dicts."""

    def __init__(self, root, num_rows=400, seed=0, shard_rows=90):
        rng = np.random.default_rng(seed)
        self.root = root
        uid_list = random_uids(rng, num_rows)
        self.rows = []
        for uid in uid_list:
            ok = rng.random() > 0.1
            kind = rng.random()
            self.rows.append(
                {
                    "uid": uid,
                    "ok": bool(ok),
                    # few different values, so that ties are everywhere
                    "score": None
                    if kind < 0.05 or not ok
                    else math.nan
                    if kind < 0.1
                    else round(float(rng.normal()), 1),
                    "words": None if not ok else int(rng.integers(-3, 9)),
                    "weight": float(rng.random() * 3 - 0.5),
                    "language": None if rng.random() < 0.1 else str(rng.choice(["en", "de", "fr"])),
                    "flag": None if rng.random() < 0.1 else bool(rng.random() < 0.5),
                }
            )
        entries = [{"image": None, "caption": "x", "uid": row["uid"], "ok": row["ok"]} for row in self.rows]
        self.pool_path = write_pool(root, [entries[i : i + shard_rows] for i in range(0, num_rows, shard_rows)])
        types = {"score": pa.float32(), "words": pa.int32(), "weight": pa.float32(), "language": pa.string()}
        self.columns = {}
        for name, kind in {**types, "flag": pa.bool_()}.items():
            values = pa.array([row[name] for row in self.rows], type=kind, from_pandas=False)
            self.columns |= write_columns(root, self.pool_path, {name: values})
        for row in self.rows:  # what a float32 column holds
            for name in ("score", "weight"):
                if row[name] is not None:
                    row[name] = float(np.float32(row[name]))
        self.runs = 0

    def select(self, mapping, name, **options):
        """(facts, {uid: multiplicity})"""
        self.runs += 1
        out = f"{self.root}/selection-{self.runs}"
        strategies = parse_strategies(mapping, "strategies", TYPES)
        facts = select(self.pool_path, self.columns, strategies, name, out, **options)
        kept: dict[str, int] = {}
        for shard in pool.load_shards(self.pool_path):
            table = pq.read_table(f"{out}/{shard.name}.parquet")
            assert table.schema.metadata[pool.SHARD_DIGEST] == shard.digest.encode()
            rows = table["row"].to_pylist()
            assert rows == sorted(rows)
            shard_uids = pool.read_rows(self.pool_path, shard.name, ["uid"])["uid"].to_pylist()
            kept |= {
                shard_uids[row]: number for row, number in zip(rows, table["multiplicity"].to_pylist(), strict=True)
            }
        exported = np.load(f"{out}/uids.npy")
        assert exported.dtype == np.dtype("u8,u8")
        repeated = sorted(uid for uid, number in kept.items() for _ in range(number))
        assert [(int(uid[:16], 16), int(uid[16:], 16)) for uid in repeated] == exported.tolist()
        assert facts["kept_rows"] == len(kept)
        assert facts["kept_samples"] == len(exported)
        check_funnel(facts, len(self.rows))
        return facts, kept

    def chosen(self, mapping, name="it", **options):
        return set(self.select(mapping, name, **options)[1])

    def ok(self):
        return [row for row in self.rows if row["ok"]]

    def top(self, fraction, among=None):
        """The uids of the top rows by score, written out."""
        numbers = [
            row
            for row in (self.ok() if among is None else among)
            if row["score"] is not None and not math.isnan(row["score"])
        ]
        count = math.floor(Fraction(fraction) * len(numbers))
        ordered = sorted(numbers, key=lambda row: (-row["score"], row["uid"]))
        return {row["uid"] for row in ordered[:count]}


def check_funnel(facts, pool_rows):
    assert facts["pool_rows"] == pool_rows == facts["funnel"][0]["rows_in"]
    for before, after in zip(facts["funnel"], facts["funnel"][1:], strict=False):
        assert before["rows_kept"] == after["rows_in"]
    assert facts["funnel"][-1]["rows_kept"] == facts["kept_rows"]
    removed = sum(step["rows_in"] - step["rows_kept"] for step in facts["funnel"])
    assert removed + facts["kept_rows"] == pool_rows
    for step in facts["funnel"]:
        if "alone_kept" in step:
            assert step["rows_kept"] <= step["alone_kept"] <= facts["ok_rows"]
            assert step["only_removed"] <= facts["ok_rows"] - step["alone_kept"]
            assert step["only_removed"] <= step["rows_in"] - step["rows_kept"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("fraction", ["0.01", "0.29", "0.3", "0.5", "0.999", "1.0"])
@pytest.mark.parametrize("collect_rows", [0, 4_000_000])  # 0: histograms to the last bit
def test_top_takes_exactly_the_fraction_with_ties_by_uid(world, fraction, collect_rows, monkeypatch):
    monkeypatch.setattr(exact_cut, "COLLECT_ROWS", collect_rows)
    mapping = {"it": {"top": {"column": "score", "fraction": float(fraction)}}}
    assert world.chosen(mapping) == world.top(fraction)


def test_fraction_0_29_of_100_is_29(tmp_path):
    root = tmp_path
    path = write_pool(
        root, [[{"image": None, "caption": "x", "ok": True}] * 60, [{"image": None, "caption": "x", "ok": True}] * 40]
    )
    columns = write_columns(root, path, {"score": pa.array(np.zeros(100, dtype=np.float32))})
    mapping = {"it": {"top": {"column": "score", "fraction": 0.29}}, "lot": {"random": {"fraction": 0.29}}}
    strategies = parse_strategies(mapping, "s", TYPES)
    assert int(0.29 * 100) == 28
    assert select(path, columns, strategies, "it", f"{root}/a")["kept_rows"] == 29
    assert np.load(f"{root}/a/uids.npy")["f1"].tolist() == list(range(29))  # all tie: the smallest uids
    assert select(path, columns, strategies, "lot", f"{root}/b")["kept_rows"] == 29


def test_float32_values_are_compared_as_float32(tmp_path):
    values = [0.281, 0.7, 0.9]
    path = write_pool(tmp_path, [[{"image": None, "caption": "x", "ok": True}] * 3])
    columns = write_columns(tmp_path, path, {"score": pa.array(values, type=pa.float32())})
    for index, value in enumerate(values):
        for body in (
            {"where": [f"score >= {value}", f"score in [{value}]"]},
            {"threshold": {"column": "score", "at_least": value}},
        ):
            strategies = parse_strategies({"it": body}, "s", TYPES)
            select(path, columns, strategies, "it", f"{tmp_path}/out")
            assert index in np.load(f"{tmp_path}/out/uids.npy")["f1"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("score > 0.3", lambda row: row["score"] is not None and row["score"] > float(np.float32(0.3))),
        ("score != 0.5", lambda row: row["score"] is not None and not math.isnan(row["score"]) and row["score"] != 0.5),
        ("score <= -.5", lambda row: row["score"] is not None and row["score"] <= -0.5),
        ("words >= 4", lambda row: row["words"] >= 4),
        ("words in [1, 2, -3]", lambda row: row["words"] in (1, 2, -3)),
        ("words != 0", lambda row: row["words"] != 0),
        ("language == en", lambda row: row["language"] == "en"),
        ("language != 'en'", lambda row: row["language"] not in ("en", None)),
        ('language in [de, "fr"]', lambda row: row["language"] in ("de", "fr")),
        ("flag == false", lambda row: row["flag"] is False),
        ("flag != false", lambda row: row["flag"] is True),
        ("ok == true", lambda row: True),
    ],
)
def test_comparisons(world, text, expected):
    assert world.chosen({"it": {"where": [text]}}) == {row["uid"] for row in world.ok() if expected(row)}


def test_algebra_equals_sets(world):
    everything = {row["uid"] for row in world.ok()}
    english = {row["uid"] for row in world.ok() if row["language"] == "en"}
    long = {row["uid"] for row in world.ok() if row["words"] > 3}
    mapping = {
        "all": {},
        "english": {"where": ["language == en"]},
        "long": {"where": ["words > 3"]},
        "best": {"top": {"column": "score", "fraction": 0.4}},
        "best_english": {"top": {"column": "score", "fraction": 0.4, "within": "english"}},
        "both": {"all_of": ["english", "best"]},
        "either": {"any_of": ["long", "english"]},
        "neither": {"none_of": ["long", "english"]},
        "mixed": {"where": ["words > 0"], "any_of": ["both", "long"], "none_of": ["best_english"]},
        "deep": {"top": {"column": "score", "fraction": 0.5, "within": "mixed"}},
    }
    best = world.top("0.4")
    best_english = world.top("0.4", [row for row in world.rows if row["uid"] in english])
    positive = {row["uid"] for row in world.ok() if row["words"] > 0}
    mixed = (positive & ((english & best) | long)) - best_english
    expected = {
        "all": everything,
        "english": english,
        "best": best,
        "best_english": best_english,
        "both": english & best,
        "either": long | english,
        "neither": everything - (long | english),
        "mixed": mixed,
        "deep": world.top("0.5", [row for row in world.rows if row["uid"] in mixed]),
    }
    for name, rows in expected.items():
        assert world.chosen(mapping, name) == rows, name


@pytest.mark.parametrize("kind", [pa.int32(), pa.int64(), pa.float32(), pa.float64()])
def test_every_numeric_type_is_cut_exactly(tmp_path, kind):
    rng = np.random.default_rng(5)
    values = np.concatenate([rng.integers(-(2**31), 2**31 - 1, 500), rng.integers(-3, 4, 500)])
    path = write_pool(tmp_path, [[{"image": None, "caption": "x", "ok": True}] * 500] * 2)
    columns = write_columns(tmp_path, path, {"value": pa.array(values).cast(kind, safe=False)})
    stored = pa.array(values).cast(kind, safe=False).to_numpy()
    strategies = parse_strategies({"it": {"top": {"column": "value", "fraction": 0.61}}}, "s", {"value": NAMES[kind]})
    select(path, columns, strategies, "it", f"{tmp_path}/out")
    expected = np.lexsort((np.arange(1000), -stored.astype(np.float64)))[:610]
    assert np.load(f"{tmp_path}/out/uids.npy")["f1"].tolist() == sorted(expected.tolist())


def test_the_funnel_shows_each_comparison_of_all_parts(world):
    mapping = {
        "basic": {"where": ["words > 2", "language == en"]},
        "it": {"all_of": ["basic"], "top": {"column": "score", "fraction": 0.4}},
    }
    facts, _ = world.select(mapping, "it")
    assert [step["rule"] for step in facts["funnel"]] == ["ok", "words > 2", "language == en", "top 0.4 of score"]
    assert facts["ok_rows"] == len(world.ok()) == facts["funnel"][0]["rows_kept"]
    assert facts["funnel"][1]["rows_kept"] == sum(row["words"] > 2 for row in world.ok())


def test_the_funnel_counts_what_each_rule_does_alone(world):
    """Against the rules written out row by row; a repeat counts as the last rule."""
    taken = world.select({"it": {"repeat": {"column": "weight", "cap": 2}}}, "it")[1]
    english = {row["uid"] for row in world.ok() if row["language"] == "en"}
    excluded = sorted(row["uid"] for row in world.ok())[::7]
    path = f"{world.root}/taken_down.txt"
    with open(path, "w") as file:
        file.write("\n".join(excluded))
    rules = {
        "words > 2": lambda row: row["words"] > 2,
        "score < 0.5": lambda row: row["score"] is not None and row["score"] < 0.5,
        "any_of english, flagged": lambda row: row["uid"] in english or row["flag"] is True,
        "repeat weight": lambda row: row["uid"] in taken,
    }
    mapping = {
        "english": {"where": ["language == en"]},
        "flagged": {"where": ["flag == true"]},
        "basic": {"where": ["words > 2", "score < 0.5"]},
        "it": {"all_of": ["basic"], "any_of": ["english", "flagged"], "repeat": {"column": "weight", "cap": 2}},
    }
    facts, _ = world.select(mapping, "it", exclude=Exclusion((path,)))
    base = [row for row in world.ok() if row["uid"] not in excluded]
    assert [step["rule"] for step in facts["funnel"]] == ["ok", "exclude", *rules]
    assert [set(step) for step in facts["funnel"][:2]] == [{"rule", "rows_in", "rows_kept"}] * 2
    left = base
    for step, (name, keeps) in zip(facts["funnel"][2:], rules.items(), strict=True):
        others = [other for rule, other in rules.items() if rule != name]
        assert step["alone_kept"] == sum(map(keeps, base))
        assert step["only_removed"] == sum(not keeps(row) and all(other(row) for other in others) for row in base) > 0
        assert step["rows_in"] == len(left)
        left = [row for row in left if keeps(row)]
        assert step["rows_kept"] == len(left)


def test_random_subsets_nest_and_differ_by_seed(world):
    def chosen(fraction, seed=0, **more):
        return world.chosen(
            {"long": {"where": ["words > 3"]}, "it": {"random": {"fraction": fraction, "seed": seed, **more}}}
        )

    small, large = chosen(0.2), chosen(0.6)
    assert small < large
    assert len(small) == math.floor(Fraction("0.2") * len(world.ok()))
    assert chosen(0.2, seed=1) != small
    inside = chosen(0.5, within="long")
    assert inside < {row["uid"] for row in world.ok() if row["words"] > 3}
    assert chosen(1) == {row["uid"] for row in world.ok()}


def test_random_of_the_size_of_another_strategy(world):
    mapping = {"long": {"where": ["words > 3"]}, "it": {"random": {"as_many_as": "long"}}}
    assert len(world.chosen(mapping)) == len(world.chosen(mapping, "long"))
    assert world.chosen(mapping) != world.chosen(mapping, "long")


def test_random_does_not_follow_uid_order():
    pairs = np.stack([np.zeros(20_000, dtype=np.uint64), np.arange(20_000, dtype=np.uint64)], axis=1)
    hashed = uids.hash64(pairs, 0, 1)
    assert len(np.unique(hashed)) == 20_000
    low = np.sort(hashed)[:10_000]
    assert abs(np.isin(hashed[:10_000], low).sum() - 5000) < 250
    other = uids.hash64(pairs, 1, 1)
    assert abs(np.corrcoef(hashed.astype(float), other.astype(float))[0, 1]) < 0.03


@pytest.mark.parametrize("fraction", [0.1, 0.29, 0.5, 0.8, 0.95, 0.999])
def test_cut_datacomp_is_the_rule_of_its_source(world, fraction):
    mapping = {"it": {"top": {"column": "score", "fraction": fraction, "cut": "datacomp"}}}
    scores = np.array([math.nan if row["score"] is None else row["score"] for row in world.ok()], dtype=np.float32)
    threshold = -np.sort(-scores)[int(len(scores) * fraction)]  # baselines/utils.py: descending, NaN last
    expected = {row["uid"] for row, score in zip(world.ok(), scores, strict=True) if score >= threshold}
    assert world.chosen(mapping) == expected
    assert (fraction < 0.9) == bool(expected)  # a cut among NaN keeps nothing


def test_uids_file_and_exclude(world, tmp_path):
    _, kept = world.select({"it": {"where": ["words > 3"]}}, "it")
    path = f"{world.root}/selection-{world.runs}/uids.npy"
    mapping = {"again": {"uids": path}, "rest": {"none_of": ["again"]}}
    assert world.chosen(mapping, "again") == set(kept)
    everything = {row["uid"] for row in world.ok()}
    assert world.chosen(mapping, "rest") == everything - set(kept)
    facts, left = world.select({"it": {"top": {"column": "score", "fraction": 0.5}}}, "it", exclude=Exclusion((path,)))
    assert set(left) == world.top("0.5", [row for row in world.ok() if row["uid"] not in kept])
    assert facts["funnel"][1]["rule"] == "exclude"


def test_a_uids_file_that_repeats_uids_gives_multiplicities(world, tmp_path):
    ok = sorted(row["uid"] for row in world.ok())[:3]
    listed = [ok[0], ok[1], ok[1], ok[2], ok[2], ok[2], "f" * 32]
    pairs = np.array([(int(uid[:16], 16), int(uid[16:], 16)) for uid in listed], dtype="u8,u8")
    path = str(tmp_path / "subset.npy")
    np.save(path, pairs)
    assert world.select({"it": {"uids": path}}, "it")[1] == {ok[0]: 1, ok[1]: 2, ok[2]: 3}
    with pytest.raises(WinnowError, match=r"strategies.part.uids = .* repeats uids"):
        world.select({"part": {"uids": path}, "it": {"all_of": ["part"]}}, "it")
    np.save(path, pairs[::-1])
    with pytest.raises(WinnowError, match=r"uids = .*subset.npy is not sorted, expected a .npy of dtype u8,u8"):
        world.select({"it": {"uids": path}}, "it")
    np.save(path, np.arange(4))
    with pytest.raises(WinnowError, match="of dtype int64, expected"):
        world.select({"it": {"uids": path}}, "it")


def test_repeat_takes_the_whole_part_and_draws_the_rest(world):
    mapping = {"long": {"where": ["words > -4"]}, "it": {"all_of": ["long"], "repeat": {"column": "weight", "cap": 2}}}
    facts, kept = world.select(mapping, "it")
    drawn = 0
    for row in world.ok():
        capped = min(max(row["weight"], 0), 2)
        assert kept.get(row["uid"], 0) in (math.floor(capped), math.ceil(capped))
        drawn += capped
    assert facts["kept_samples"] == pytest.approx(drawn, rel=0.05)
    assert world.select(mapping, "it")[1] == kept
    mapping["it"]["repeat"]["seed"] = 1
    assert world.select(mapping, "it")[1] != kept


def test_uids_npy_is_sorted_when_it_is_written_in_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(uids, "RUN_ROWS", 100)
    rng = np.random.default_rng(0)
    pairs = rng.integers(0, 2**64, size=(900, 2), dtype=np.uint64)
    writer = uids.SubsetWriter(900)
    for part in np.array_split(pairs, 7):
        writer.add(part)
    writer.write(str(tmp_path / "uids.npy"))
    expected = np.sort(np.ascontiguousarray(pairs).view("u8,u8").reshape(-1))
    assert (tmp_path / "uids.npy").read_bytes() == save_bytes(tmp_path / "other.npy", expected)


def save_bytes(path, array):
    np.save(path, array)
    return path.read_bytes()


def test_uids_that_are_not_32_hex_digits_are_named(tmp_path):
    for wrong in ("abc", "g" * 32):
        path = write_pool(tmp_path / wrong, [[{"image": None, "caption": "x", "ok": True, "uid": wrong}]])
        with pytest.raises(WinnowError, match=f"00000.parquet: uid {wrong}, expected 32 hex digits"):
            select(path, {}, parse_strategies({"it": {}}, "s", TYPES), "it", str(tmp_path / "out"))


def test_stale_columns_are_refused(world, tmp_path):
    other = write_pool(tmp_path, [[{"image": None, "caption": "y", "ok": True}] * 90] * 5)
    strategies = parse_strategies({"it": {"where": ["words > 1"]}}, "s", TYPES)
    with pytest.raises(WinnowError, match="00000.parquet: computed from pool shard"):
        select(other, world.columns, strategies, "it", str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"a": {"were": []}}, r"strategies.a.were is an unknown key. Did you mean where\?"),
        ({"a": {"where": "words > 1"}}, "strategies.a.where = words > 1, expected a list"),
        ({"a": {"where": ["words >> 1"]}}, "strategies.a.where.0 = words >> 1, expected a number"),
        ({"a": {"where": ["words"]}}, "strategies.a.where.0 = words, expected COLUMN OP LITERAL"),
        ({"a": {"where": ["wrods > 1"]}}, r"where.0 = wrods > 1: wrods is an unknown column. Did you mean words\?"),
        ({"a": {"where": ["words > 1.5"]}}, "expected a whole number for a column of type int32"),
        ({"a": {"where": ["words > 3000000000"]}}, "expected a number that a column of type int32 can hold"),
        ({"a": {"where": ["words == many"]}}, "expected a number"),
        ({"a": {"where": ["score > nan"]}}, "expected a number"),
        ({"a": {"where": ["flag == 1"]}}, "expected true or false"),
        ({"a": {"where": ["language > en"]}}, "expected ==, != or in for the string column language"),
        ({"a": {"where": ["language in en"]}}, r"expected a list such as \[a, b\] after in"),
        ({"a": {"where": ["language == en or words > 1"]}}, "expected a word or text in quotes"),
        ({"a": {"where": ["embedding > 1"]}}, r"embedding is of type float16\[\], expected bool or int32"),
        (
            {"a": {"top": {"column": "score", "fraction": 1.5}}},
            "strategies.a.top.fraction = 1.5, expected a number <= 1",
        ),
        ({"a": {"top": {"column": "score", "fraction": 0}}}, "strategies.a.top.fraction = 0, expected a number > 0"),
        ({"a": {"top": {"column": "language", "fraction": 0.5}}}, "language is of type string, expected int32"),
        ({"a": {"top": {"column": "score", "fraction": 1.0, "cut": "datacomp"}}}, "expected a number < 1"),
        ({"a": {"top": {"column": "score", "fraction": 0.5, "within": "b"}}}, "top.within = b, expected a strategy"),
        ({"basic": {}, "a": {"all_of": ["basics"]}}, r"a.all_of = basics, expected a strategy. Did you mean basic\?"),
        ({"a": {"all_of": []}}, "strategies.a.all_of = .*, expected at least 1 entry"),
        ({"a": {"all_of": ["b"]}, "b": {"any_of": ["a"]}}, "a -> b -> a, expected strategies without a cycle"),
        ({"a": {"none_of": ["a"]}}, "a -> a, expected strategies without a cycle"),
        ({"a": {"random": {"seed": 1}}}, "strategies.a.random: expected either fraction or as_many_as"),
        ({"a": {"random": {"fraction": 0.1, "as_many_as": "b"}}, "b": {}}, "expected either fraction or as_many_as"),
        ({"a": {"where": ["language in ['a, b]"]}}, r"expected a list such as \[a, b\] after in"),
        ({"a": {"where": ["language in ['a' 'b']"]}}, r"expected a list such as \[a, b\] after in"),
        ({"a": {"where": ["language in [a, , b]"]}}, "expected a word or text in quotes"),
        ({"a": {"uids": "/nope.npy"}}, r"strategies.a.uids = /nope.npy, expected a subset file \(.npy\); no file is"),
        ({"a": {"uids": "/"}}, "strategies.a.uids = /, expected a subset file"),
        (
            {"a": {"repeat": {"column": "weight", "cap": 2}}, "b": {"any_of": ["a"]}},
            "expected a strategy without repeat",
        ),
        ({"a": {"threshold": {"column": "score", "at_least": "x"}}}, "a.threshold.at_least = x, expected a number"),
        ({"a": ["b"]}, "strategies.a = .*, expected a mapping"),
    ],
)
def test_config_errors_are_one_line(mapping, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse_strategies(mapping, "strategies", TYPES)
    assert "\n" not in str(caught.value)


def test_repeat_may_stand_anywhere():
    repeat, where = {"column": "weight", "cap": 2}, ["words > 1"]
    first = parse_strategies({"a": {"repeat": repeat, "where": where}}, "s", TYPES)
    assert first == parse_strategies({"a": {"where": where, "repeat": repeat}}, "s", TYPES)
    assert first["a"].repeat.cap == 2


def test_a_comma_in_quotes_does_not_split_a_list():
    found = parse_strategies({"a": {"where": ["language in ['a, b', \"c,d\" ,en]", "words in [1,2 , 3]"]}}, "s", TYPES)
    assert [rule.literal for rule in found["a"].rules] == [("a, b", "c,d", "en"), (1, 2, 3)]


def test_wrong_subset_files_are_one_line(tmp_path):
    np.savez(tmp_path / "a.npz", np.zeros(3, "u8,u8"))
    np.save(tmp_path / "objects.npy", np.array([None]), allow_pickle=True)
    np.save(tmp_path / "plain.npy", np.zeros(3))
    np.save(tmp_path / "cut.npy", np.zeros(3, "u8,u8"))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-5])
    (tmp_path / "zip.npy").write_bytes(b"PK\3\4 no zip")
    (tmp_path / "empty.npy").write_bytes(b"")
    for path in sorted(tmp_path.iterdir()):
        with pytest.raises(WinnowError, match=rf"s.a.uids = .*{path.name}.*, expected a .npy of dtype u8,u8") as caught:
            uids.read_subset(str(path), "s.a.uids")
        assert "\n" not in str(caught.value)


def test_a_definition_does_not_hold_names_or_paths(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.npy").touch()

    def parse(basic, path):
        mapping = {
            basic: {"where": ["words > 2"], "uids": path},
            "it": {"top": {"column": "score", "fraction": 0.5, "within": basic}, "random": {"as_many_as": basic}},
        }
        return parse_strategies(mapping, "s", TYPES)

    first, second = parse("basic", f"{tmp_path}/a/a.npy"), parse("renamed", f"{tmp_path}/b/b.npy")
    assert definition(first, "it") == definition(second, "it")
    json.dumps(definition(first, "it"))
    assert used_columns(first, "it") == {"words", "score"}
    assert used_files(first, "it") == [f"{tmp_path}/a/a.npy"]
    other = parse_strategies({"it": {"where": ["words > 3"]}}, "s", TYPES)
    assert definition(other, "it") != definition(parse_strategies({"it": {"where": ["words > 4"]}}, "s", TYPES), "it")


def test_nothing_kept_is_an_empty_selection(world):
    facts, kept = world.select({"it": {"where": ["words > 100"]}}, "it")
    assert kept == {}
    assert facts["kept_samples"] == 0
