"""The profile of a pool against counting row by row, whatever the order of rows and however they are cut into shards."""

from __future__ import annotations

import collections
import math
import random
from fractions import Fraction

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core import storage
from stages.exclusion import Exclusion, host_of
from stages.selection import exact_cut, pool_profile, uids
from stages.selection.strategies import parse_comparisons
from tests.pool_fixture import drawing, random_uids, write_columns, write_pool

ARROW = {
    "score": pa.float32(), "limit": pa.int32(), "bytes": pa.int64(), "wide": pa.float64(), "nothing": pa.float32(),
    "flag": pa.bool_(), "language": pa.string(), "image_group": pa.string(), "image_group_size": pa.int32(),
    "image_survivor": pa.string(),
}  # fmt: skip
ADDED = {name: str(kind).replace("float", "float32").replace("double", "float64") for name, kind in ARROW.items()}
GROUPS = {"image": {"group": "image_group", "size": "image_group_size", "survivor": "image_survivor"}}
SCORES = ("limit", "score", "wide")
FAULTS = ["", "", "mismatched", "tiny"]
URLS = ["https://a.example.org/x", "http://user:pw@B.example.org:80/y?z", "nonsense", None, "https://münchen.de/"]


def planted_rows(num, seed=0):
    rng = np.random.default_rng(seed)
    rows = []
    for uid in random_uids(rng, num):
        score = float(np.float32(round(float(rng.normal()), 1)))  # ties everywhere
        row = {"uid": uid, "ok": bool(rng.random() > 0.1), "source": str(rng.choice(["web", "shop"]))}
        row |= {"caption": "x " * int(rng.integers(1, 9)) + "\u2003é", "truth_fault": FAULTS[rng.integers(4)]}
        row |= {"error": None if row["ok"] else str(rng.choice(["timeout", "undecodable"]))}
        row |= {"url": URLS[rng.integers(5)], "score": [score, score, score, math.nan, None, math.inf][rng.integers(6)]}
        row |= {"limit": int(rng.integers(0, 7)), "bytes": int(rng.integers(-(2**62), 2**62)), "nothing": None}
        row |= {"wide": float(rng.normal() * 10.0 ** rng.integers(-8, 8)), "flag": bool(rng.random() < 0.8)}
        row |= {"language": [None, "en", "en", "de", f"l{rng.integers(90)}"][rng.integers(5)]}
        row |= {"image_group": None, "image_group_size": 1, "image_survivor": None}
        rows.append(row)
    ok = [row for row in rows if row["ok"]]
    for first, size in ((0, 9), (20, 2), (30, 2), (40, 3), (50, 2), (60, 2), (70, 2), (80, 2)):
        group = ok[first : first + size]
        lowest = min(row["uid"] for row in group)
        for row in group:
            row |= {"image_group": lowest, "image_group_size": size, "image_survivor": lowest}
    return rows


class World:
    """A pool of rows in shards of so many, with their columns; every fifth has a picture."""

    def __init__(self, root, rows, shard_rows=120):
        self.root, self.rows = str(root), rows
        own = ("uid", "ok", "error", "source", "caption", "truth_fault", "url")
        entries = [
            {"image": drawing(int(row["uid"], 16) % 97) if int(row["uid"], 16) % 5 == 0 and row["ok"] else None}
            | {name: row[name] for name in own}
            for row in rows
        ]
        shards = [entries[start : start + shard_rows] for start in range(0, len(entries), shard_rows)]
        self.pool_path = write_pool(root, shards)
        self.columns = {}
        for name, kind in ARROW.items():
            values = pa.array([row[name] for row in rows], type=kind, from_pandas=False)
            self.columns |= write_columns(root, self.pool_path, {name: values})
        own_types = {"source": "string", "caption": "string", "truth_fault": "string", "url": "string"}
        self.types = pool_profile.described(own_types, ADDED, GROUPS)

    def profile(self, scores=SCORES, out="out", **options):
        """(facts, profile.json, {uid: sample})"""
        arguments = (self.pool_path, self.columns, self.types, scores, GROUPS, f"{self.root}/{out}")
        facts = pool_profile.write_profile(*arguments, **options)
        table = pq.read_table(f"{self.root}/{out}/{pool_profile.SAMPLES_FILE}")
        assert table.schema.equals(pool_profile.SAMPLES)
        data = storage.read_json(f"{self.root}/{out}/{pool_profile.FILE}")
        return facts, data, {row["uid"]: row for row in table.to_pylist()}

    def bytes(self, out="out"):
        files = (pool_profile.FILE, pool_profile.SAMPLES_FILE)
        return [storage.read_bytes(f"{self.root}/{out}/{name}") for name in files]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"), planted_rows(700))


@pytest.fixture(scope="module")
def made(world):
    return world.profile()


def has_number(value):
    return value is not None and not math.isnan(value)


def ranked(rows, name):
    """The rows that have a number, highest first, ties by uid."""
    return sorted((row for row in rows if has_number(row[name])), key=lambda row: (-row[name], row["uid"]))


def rank_of(uid):
    pair = np.array([[int(uid[:16], 16), int(uid[16:], 16)]], dtype=np.uint64)
    return int(uids.hash64(pair, 0, pool_profile.PROFILE_STREAM)[0])


def test_rows_and_failures_reconcile(world, made):
    _, data, _ = made
    failed = collections.Counter(row["error"] for row in world.rows if not row["ok"])
    assert data["failed"] == dict(failed) and len(failed) == 2
    assert data["rows"] == len(world.rows) == data["ok_rows"] + sum(data["failed"].values())
    assert data["excluded_rows"] == data["flagged_rows"] == 0


@pytest.mark.parametrize("name", ["score", "limit", "bytes", "wide", "nothing", "image_group_size"])
def test_numbers_are_counted_as_row_by_row(world, made, name):
    _, data, _ = made
    rows = [row[name] for row in world.rows if row["ok"]]
    found, numbers = data["numbers"][name], [value for value in rows if has_number(value)]
    finite = [value for value in numbers if math.isfinite(value)]
    assert found["rows"] == len(rows) and found["nulls"] == rows.count(None)
    assert found["nans"] == len(rows) - len(numbers) - rows.count(None)
    assert found["infinite"] == len(numbers) - len(finite)
    ordered = sorted(numbers, reverse=True)
    expected = [ordered[len(ordered) * decile // 10 - 1] if ordered else None for decile in range(1, 10)]
    shown = [None if value is None or math.isinf(value) else value for value in expected]
    as_type = np.dtype(ARROW[name].to_pandas_dtype()).type
    assert [None if v is None else as_type(v) for v in found["deciles"]] == [
        None if v is None else as_type(v) for v in shown
    ]
    if not finite:
        assert (found["min"], found["max"], found["mean"], found["histogram"]) == (None,) * 4
        return
    exact = sum(map(Fraction, finite)) / len(finite)
    assert found["mean"] == float(exact)
    assert (as_type(found["min"]), as_type(found["max"])) == (as_type(min(finite)), as_type(max(finite)))
    bins = found["histogram"]
    assert sum(bins["counts"]) + bins["below"] + bins["above"] == len(numbers)
    assert len(bins["counts"]) <= pool_profile.NUM_BINS
    few = collections.Counter(finite)
    listed = [[value, few[value]] for value in sorted(few)]
    assert found["values"] == (listed if name in ("limit", "image_group_size") else None)


def test_deciles_are_those_of_numpy_on_numbers_without_ties(world, made):
    _, data, _ = made
    numbers = np.array([row["wide"] for row in world.rows if row["ok"]])
    shares = 1 - np.arange(1, 10) / 10
    nearest = np.quantile(numbers, shares, method="inverted_cdf")
    ordered = np.sort(numbers)
    for ours, theirs in zip(data["numbers"]["wide"]["deciles"], nearest, strict=True):  # floor(n d / 10): a rank apart
        assert abs(np.searchsorted(ordered, ours) - np.searchsorted(ordered, theirs)) <= 1


def test_a_histogram_of_whole_numbers_has_whole_bins_and_leaves_far_ones_out():
    class Part:
        dtype, num_numbers = np.dtype(np.int64), 1000
        lowest, highest = np.int64(0), np.int64(10**6)

        def at(self, rank):
            return np.int64(1000 - rank)

    histogram = pool_profile._Histogram("x", Part())
    assert (histogram.low, histogram.high, histogram.width) == (25, 975, 24)
    assert len(histogram.counts) == 40


@pytest.mark.parametrize("name", ["language", "flag", "source", "caption", "url_host", "truth_fault"])
def test_values_are_counted_as_row_by_row(world, made, name):
    _, data, _ = made
    source = {"url_host": "url"}.get(name, name)
    rows = [row[source] for row in world.rows if row["ok"]]
    if name == "url_host":
        rows = [host_of(value) or None for value in rows]
        assert set(rows) == {"a.example.org", "b.example.org", None, "xn--mnchen-3ya.de"}
    texts = [str(value).lower() if isinstance(value, bool) else value for value in rows if value is not None]
    counts = sorted(collections.Counter(texts).items(), key=lambda entry: (-entry[1], entry[0]))
    found = data["values"][name]
    assert found["rows"] == len(rows) and found["nulls"] == len(rows) - len(texts)
    assert found["values"] == [list(entry) for entry in counts[:20]]
    assert found["other"] == [max(0, len(counts) - 20), sum(count for _, count in counts[20:])]
    assert found["unsure_below"] == 0


def test_captions_are_measured_as_python_does_where_no_stage_does(world, made):
    _, data, _ = made
    captions = [row["caption"] for row in world.rows if row["ok"]]
    for name, measure in (("caption_words", lambda text: len(text.split())), ("caption_chars", len)):
        counts = collections.Counter(map(measure, captions))
        assert data["numbers"][name]["values"] == [[value, counts[value]] for value in sorted(counts)]
    odd = ["", "  ", "a\u00a0b", "a\x1cb\x1dc", "a\u200bb", "\u3000x\u2028y\x85z", "tab\tnew\nline\x0bv", "ä ö"]
    words = pool_profile._make("caption_words", pa.array(odd)).to_pylist()
    assert words == [len(text.split()) for text in odd]
    hosts = ["HTTP://Ä.de/x", "https://[::1]:80/", "ftp://u@h.org", "//no.scheme", "https://", " http://trim.org ", "x"]
    assert pool_profile._make("url_host", pa.array(hosts)).to_pylist() == [
        (host_of(url) or None) if "://" in url else None for url in hosts
    ]


@pytest.mark.parametrize("name", SCORES)
def test_deciles_are_tenths_with_ties_by_uid_and_samples_by_hash(world, made, name):
    _, data, samples = made
    order = ranked([row for row in world.rows if row["ok"]], name)
    num = len(order)
    for decile, found in enumerate(data["scores"][name]):
        rows = order[num * decile // 10 : num * (decile + 1) // 10]
        assert found["rows"] == len(rows)
        ends = [value if math.isfinite(value) else None for value in (rows[0][name], rows[-1][name])]
        assert [found["highest"], found["lowest"]] == pytest.approx(ends)
        assert found["faults"] == dict(collections.Counter(row["truth_fault"] for row in rows))
        drawn = sorted(rows, key=lambda row: rank_of(row["uid"]))[: pool_profile.NUM_SAMPLES]
        assert [uid for uid, _ in found["samples"]] == [row["uid"] for row in drawn]
        as_type = np.dtype(ARROW[name].to_pandas_dtype()).type
        assert [value for _, value in found["samples"]] == [str(as_type(row[name])) for row in drawn]
        for row in drawn:
            assert samples[row["uid"]]["caption"] == row["caption"]
    assert data["truth"] == dict(collections.Counter(row["truth_fault"] for row in world.rows if row["ok"]))


def test_groups_of_duplicates_are_counted_and_shown(world, made):
    _, data, samples = made
    found = data["duplicates"]["image"]
    assert (found["groups"], found["rows"], found["sizes"]) == (8, 24, {"2": 6, "3": 1, "9": 1})
    assert found["largest"] == [9, 3, 2, 2, 2, 2, 2, 2]
    groups = collections.defaultdict(list)
    for row in world.rows:
        groups[row["image_group"]].append(row["uid"])
    del groups[None]
    largest = sorted(groups, key=lambda group: (-len(groups[group]), group))[:3]
    drawn = sorted(groups, key=rank_of)[:3]
    assert [one["group"] for one in found["examples"]] == list(dict.fromkeys([*largest, *drawn]))
    for one in found["examples"]:
        assert one["size"] == len(groups[one["group"]])
        assert one["samples"] == sorted(groups[one["group"]])[: pool_profile.NUM_SAMPLES]
        assert set(one["samples"]) <= samples.keys()
    assert "image_group" not in data["values"] and "image_survivor" not in data["values"]


def test_the_bytes_do_not_depend_on_shards_or_order(world, made, tmp_path):
    rows = list(world.rows)
    random.Random(1).shuffle(rows)
    other = World(tmp_path, rows, shard_rows=333)
    other.profile()
    assert other.bytes() == world.bytes()
    named = {sample["uid"] for sample in made[2].values()}
    assert any(made[2][uid]["thumbnail"] for uid in named)
    assert made[0]["pictures"] == sum(sample["thumbnail"] is not None for sample in made[2].values()) > 0


def test_few_keys_in_memory_give_the_same(world, made, monkeypatch):
    monkeypatch.setattr(pool_profile, "COLLECT_ROWS", 5)
    world.profile(out="again")
    assert world.bytes("again") == world.bytes()


def test_values_that_are_too_many_to_count_are_exact_or_said_to_be_unsure(world, tmp_path, monkeypatch):
    monkeypatch.setattr(pool_profile, "NUM_BUCKETS", 64)
    monkeypatch.setattr(pool_profile, "COUNTED_BUCKETS", 4)
    found = world.profile(out="few")[1]["values"]["language"]
    counts = collections.Counter(row["language"] for row in world.rows if row["ok"])
    assert found["values"][:2] == [["en", counts["en"]], ["de", counts["de"]]]
    assert all(counts[value] == count for value, count in found["values"])
    listed = {value for value, _ in found["values"]} | {None}
    missed = max(count for value, count in counts.items() if value not in listed)
    assert missed <= found["unsure_below"] < counts["de"]
    assert found["other"][1] == sum(count for value, count in counts.items() if value not in listed)


def test_excluded_rows_are_left_out_and_flagged_ones_are_marked(world, tmp_path):
    excluded = {row["uid"] for row in world.rows[::3]}
    path = tmp_path / "taken_down.txt"
    path.write_text("\n".join(excluded))
    flagged = parse_comparisons(["limit >= 5", "language == de"], "flagged", ADDED)
    facts, data, samples = world.profile(out="less", exclude=Exclusion((str(path),)), flagged=flagged)
    left = [row for row in world.rows if row["ok"] and row["uid"] not in excluded]
    marked = {row["uid"] for row in left if row["limit"] >= 5 or row["language"] == "de"}
    assert data["excluded_rows"] == sum(row["ok"] for row in world.rows) - len(left) > 0
    assert data["flagged_rows"] == len(marked)
    assert data["numbers"]["limit"]["rows"] == len(left)
    scored = {uid for deciles in data["scores"].values() for decile in deciles for uid, _ in decile["samples"]}
    assert scored and not scored & excluded
    assert all(samples[uid]["flagged"] == (uid in marked) for uid in scored)
    assert facts["flagged"] == sum(sample["flagged"] for sample in samples.values()) > 0


def test_fewer_rows_than_deciles_and_none_at_all(tmp_path):
    rows = planted_rows(120, seed=3)[113:118]
    assert sum(has_number(row["score"]) for row in rows if row["ok"]) < 10
    data = World(tmp_path / "few", rows).profile()[1]
    assert sum(decile["rows"] for decile in data["scores"]["limit"]) == sum(row["ok"] for row in rows)
    for row in rows:
        row["ok"] = False
    data = World(tmp_path / "none", rows).profile()[1]
    assert data["ok_rows"] == 0 and data["truth"] is None
    assert [decile["rows"] for decile in data["scores"]["score"]] == [0] * 10
    assert data["numbers"]["limit"]["min"] is None and data["values"]["language"]["values"] == []


def test_a_sum_is_exact_in_any_order():
    rng = np.random.default_rng(0)
    numbers = rng.normal(size=2000) * 10.0 ** rng.integers(-300, 300, 2000)
    numbers = np.concatenate([numbers, -numbers[::2], [5e-324, 0.0, -0.0]])
    exact = sum(map(Fraction, numbers.tolist()))
    assert pool_profile._exact_sum(numbers) == exact
    whole = rng.integers(-(2**63), 2**63 - 1, 1000)
    assert pool_profile._exact_sum(whole) == sum(whole.tolist())


@pytest.mark.parametrize("limit", [0, 10, 300, 10**6])
@pytest.mark.parametrize("bits", [(64,), (32,), (32, 64, 64), (64, 64, 64)])
def test_cuts_at_several_ranks_are_those_of_a_sort(limit, bits):
    rng = np.random.default_rng(0)
    words = [rng.integers(0, 5 if len(bits) == 3 and bits[0] == 32 else 2**32 - 1, 2000, dtype=np.uint64)]
    words += [rng.integers(0, 2**64 - 1, 2000, dtype=np.uint64, endpoint=True) for _ in bits[1:]]
    if len(words) > 1:
        words[1][:1000] = 7  # ties in the second word, too
    ordered = sorted(zip(*(word.tolist() for word in words), strict=True))
    ranks = [1, 20, 200, 201, 999, 1000, 2000]
    cuts = exact_cut.Cuts(lambda num: ranks, bits, limit)
    while not cuts.done:
        for part in np.array_split(np.arange(2000), 7):
            cuts.add(*(word[part] for word in words[: cuts.num_words]))
        cuts.end_pass()
    for rank in ranks:
        key = ordered[rank - 1]
        expected = (key, sum(other < key for other in ordered), ordered.count(key))
        assert (cuts.found[rank].words, cuts.found[rank].num_smaller, cuts.found[rank].num_equal) == expected
