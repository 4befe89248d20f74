"""MetaCLIP's balancing against a plain loop over all entries, as its own code first did it."""

from __future__ import annotations

import hashlib
import json
import pathlib

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline import plan as planning
from pipeline.core import config, pool
from pipeline.core.errors import ConfigError
from stages import build_stage, entry_index
from stages.columns import metaclip
from stages.columns.metaclip import MetaClip, read_entries, tail_threshold
from tests.duplicates_fixture import fit_in_two, run_stage
from tests.engine_fixture import run_here
from tests.golden_fixture import check_golden
from tests.pool_fixture import drawing, even_shards, write_pool

TINY = str(pathlib.Path(__file__).parent / "tiny.yaml")
IMAGE = drawing(1)
WORDS = ["red", "Red", "car", "cars", "a", "blue", "dog", "of", "the", "Straße", "红", "U.S.", "can't", "x" * 80]
GLUE = [" ", " ", " ", " ", ", ", ". ", "; ", ":", "?", "!", "`", "  ", "\t", "\n", "\r\n", "-", "\u00a0", "\u3000"]


def some_entries(rng, num):
    entries = [
        "red",
        "car",
        "red car",
        "a red car",
        "of the",
        "the",
        "U.S.",
        "U",
        "S",
        ".",
        ", ",
        " a",
        "a ",
        "  ",
        "红",
    ]
    entries += ["red  car", "can't", "of the red car of the red dog", "x" * 80, "nowhere", "Straße"]
    while len(entries) < num:
        entries.append(" ".join(rng.choice(WORDS, rng.integers(1, 5))))
    return list(dict.fromkeys(entries))


def some_captions(rng, num):
    captions = []
    for _ in range(num):
        words = rng.choice(WORDS, rng.integers(0, 12))
        captions.append("".join(word + str(rng.choice(GLUE)) for word in words))
    return [*captions, "", " ", "  ", "\n", ".", "red", "car red", "redcar", "a" * 1000, "red car " * 300]


def spaced(text):
    found = " "
    for character in text:
        if character in (",", ".", ";", ":", "?", "!", "`"):
            found += " " + character + " "
        elif character in ("\t", "\n", "\r"):
            found += " "
        else:
            found += character
    return found + " "


def matched(entries, caption):
    text = spaced(caption)
    return [number for number, entry in enumerate(entries) if f" {entry} " in text]


def balanced(entries, captions, t=None, tail_fraction=None):
    """(probability and number of matches of each caption, t, t's share of the tail); None for a failed row."""
    found = [None if caption is None else matched(entries, caption) for caption in captions]
    count = [0] * len(entries)
    for numbers in found:
        for number in numbers or ():
            count[number] += 1
    if tail_fraction is not None:
        so_far, best = 0, None
        for one in sorted(count):
            so_far += one
            away = abs(so_far / sum(count) - tail_fraction)
            if best is None or away < best:
                best, t = away, max(1, one)
    rows = []
    for numbers in found:
        lost = 1.0
        for number in numbers or ():
            lost *= 1 - min(1, t / count[number])
        rows.append((None, None) if numbers is None else (float(np.float32(1 - lost)), len(numbers)))
    return rows, t, sum(one for one in count if one < t) / sum(count)


def written(folder, captions, shards=3):
    """The path of a pool; a caption of None is that of a failed row."""
    rows = [
        {"image": IMAGE if caption is not None else None, "caption": "red car" if caption is None else caption}
        for caption in captions
    ]
    return write_pool(folder, even_shards(rows, shards))


def run(folder, captions, metadata, shards=3, **parameters):
    """(probability and number of matches of each caption, facts)."""
    stage = build_stage("metaclip", {"metadata": str(metadata), **parameters}, "")
    _, found, facts = run_stage(written(folder, captions, shards), folder / "out", stage)
    return [(row["metaclip_probability"], row["metaclip_matches"]) for row in found], facts


def write_entries(folder, entries):
    path = folder / "metadata.json"
    path.write_text(json.dumps(entries))
    return path


@pytest.fixture(scope="module")
def world():
    """(entries, captions, some of them failed)."""
    rng = np.random.default_rng(0)
    captions = some_captions(rng, 300)
    captions[::17] = [None] * len(captions[::17])
    return some_entries(rng, 200), captions


@pytest.mark.parametrize("parameters", [{"threshold": 7}, {"threshold": 1}, {"tail_fraction": 0.06}])
def test_probabilities_are_those_of_a_loop_over_all_entries(tmp_path, world, parameters):
    entries, captions = world
    found, facts = run(tmp_path, captions, write_entries(tmp_path, entries), **parameters)
    rows, t, tail = balanced(entries, captions, parameters.get("threshold"), parameters.get("tail_fraction"))
    assert found == rows
    assert (facts["threshold"], facts["entries"]) == (t, len(entries))
    assert facts["tail_fraction"] == pytest.approx(tail)
    assert facts["matches"] == sum(number for _, number in rows if number)
    probabilities = {probability for probability, _ in rows if probability is not None}
    assert {0.0, 1.0} < probabilities


def test_what_is_found_is_what_python_finds():
    rng = np.random.default_rng(1)
    entries, captions = some_entries(rng, 1500), some_captions(rng, 400)
    captions += ["a \ud800 b", "red car. " * 2000]
    entries += ["\ud800", "\ud800 b"]
    offsets, numbers = entry_index.build(entries).matches(captions)
    for row, caption in enumerate(captions):
        assert entry_index.spaced(caption) == spaced(caption)
        assert numbers[offsets[row] : offsets[row + 1]].tolist() == matched(entries, caption), caption
    offsets, numbers = entry_index.build(entries).matches([])
    assert (offsets.tolist(), numbers.tolist()) == ([0], [])


def test_equal_hashes_hide_nothing(monkeypatch):
    """With a hash that is the same for all phrases but the empty one."""
    rng = np.random.default_rng(2)
    entries = some_entries(rng, 60)
    captions = [caption for caption in some_captions(rng, 30) if len(caption) < 60]
    monkeypatch.setattr(entry_index, "_PRIME", np.uint64(0))
    data, offsets = entry_index._utf8(entries)
    texts, text_offsets = entry_index._utf8(captions)
    with np.errstate(over="ignore"):
        slots = entry_index._fill_slots(data, offsets, 256)
        found, numbers = entry_index._find_phrases(texts, text_offsets, data, offsets, slots)
    assert len(set((slots[slots > 0] >> np.uint64(32)).tolist())) <= 2
    for row, caption in enumerate(captions):
        assert numbers[found[row] : found[row + 1]].tolist() == matched(entries, caption)


def test_order_shards_blocks_and_ranges_change_nothing(tmp_path, world, monkeypatch):
    entries, captions = world
    path = write_entries(tmp_path, entries)
    first, facts = run(tmp_path / "a", captions, path, tail_fraction=0.2)
    order = np.random.default_rng(0).permutation(len(captions))
    monkeypatch.setattr(metaclip, "RANGE_ENTRIES", 33)
    monkeypatch.setattr(metaclip, "PIECE_ROWS", 7)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (50,))
    again, other = run(tmp_path / "b", [captions[at] for at in order], path, shards=9, tail_fraction=0.2)
    assert [first[at] for at in order] == again
    assert facts == other


def test_a_resumed_fit_goes_on_from_its_files(tmp_path, world):
    entries, captions = world
    stage = MetaClip(str(write_entries(tmp_path, entries)), threshold=5)
    path = written(tmp_path, captions)
    assert fit_in_two(path, tmp_path / "out", stage, {}, "totals") == ["totals", "probabilities"]
    _, rows, _ = run_stage(path, tmp_path / "out", stage)
    expected, _, _ = balanced(entries, captions, 5)
    assert [(row["metaclip_probability"], row["metaclip_matches"]) for row in rows] == expected


@pytest.mark.parametrize("captions", [[None, None], ["nothing here"], [None, "red"]])
def test_small_pools(tmp_path, captions):
    path = write_entries(tmp_path, ["red", "red car"])
    found, facts = run(tmp_path, captions, path, shards=2, tail_fraction=0.5)
    assert found == [(None, None) if text is None else (1.0, 1) if text == "red" else (0.0, 0) for text in captions]
    assert facts["threshold"] == 1
    assert facts["tail_fraction"] == (0.0 if "red" in captions else None)


def test_the_tail_is_that_of_metaclip():
    """p_to_t of MetaCLIP's curation/curate.py, in numpy."""
    rng = np.random.default_rng(3)
    for _ in range(200):
        count = rng.zipf(1.3, 500).clip(max=10**9) * rng.integers(0, 2, 500)
        fraction = rng.random()
        ordered = np.sort(count)
        t = ordered[np.abs(np.cumsum(ordered) / ordered.sum() - fraction).argmin()]
        assert tail_threshold(count, fraction) == max(1, t)
    assert tail_threshold(np.zeros(5, np.int64), 0.5) == 1


def test_entries_are_read_from_json_and_text(tmp_path):
    entries = ["red", " two  blanks ", "red", "", "ü", "\u2028"]
    (tmp_path / "a.json").write_text(json.dumps(entries))
    (tmp_path / "a.txt").write_bytes("\r\n".join(["\ufeffred", *entries[1:]]).encode())
    expected = ["red", " two  blanks ", "ü", "\u2028"]
    assert read_entries(str(tmp_path / "a.json")) == read_entries(str(tmp_path / "a.txt")) == expected
    for name, text, message in (
        ("b.json", '{"a": 1}', "is a JSON dict, expected a list of entries"),
        ("b.json", '["a", 1]', "entry 1, expected text"),
        ("b.json", "[" * 100_000, "expected a JSON list"),
        ("b.json", "a\nb", "expected a JSON list"),
        ("b.txt", "\n\n", "has no entry, expected at least one"),
        ("b.txt", b"\xff", "expected a JSON list, or a text of one entry a line"),
    ):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(ConfigError, match=message) as caught:
            read_entries(str(tmp_path / name))
        assert str(caught.value).startswith(f"stages.metaclip.metadata = {tmp_path / name}")
        assert "\n" not in str(caught.value)


def test_wrong_parameters_and_a_missing_list_are_one_line(tmp_path):
    for parameters in ({}, {"threshold": 3, "tail_fraction": 0.1}):
        with pytest.raises(ConfigError, match="expected exactly one of both"):
            build_stage("metaclip", {"metadata": "a.json", **parameters}, "")
    for parameters in ({"threshold": 0}, {"tail_fraction": 0.0}, {"tail_fraction": 1.0}, {"tail_fraction": "nan"}):
        with pytest.raises(ConfigError, match=next(iter(parameters))):
            build_stage("metaclip", {"metadata": "a.json", **parameters}, "stages.1")
    stage = build_stage("metaclip", {"metadata": str(tmp_path / "nowhere.json"), "threshold": 3}, "")
    assert (
        "nowhere.json is not there: metadata.json of https://github.com/facebookresearch/MetaCLIP"
        in stage.unavailable()
    )


def test_golden_outputs(tmp_path):
    captions = ["a red car", "red car, red dog", "Red car", "the dog of the car", "nothing", None, "red", "car"] * 3
    found, _ = run(tmp_path, captions, write_entries(tmp_path, ["red", "car", "red car", "dog", "of the"]), threshold=4)
    rows = [(None if value is None else round(value, 6), number) for value, number in found]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    check_golden("metaclip", {"version": MetaClip.version, "sha256": digest})
    table = pq.read_table(tmp_path / "out" / "00000.parquet")
    assert [str(kind) for kind in table.schema.types] == ["string", "float", "int32"]


def test_a_run_draws_the_balanced_subset(tmp_path):
    """Rows with probability 1 are chosen, those without a match are not, and of the others about as many as expected."""
    (tmp_path / "entries.txt").write_text("red\nblue\nsmall\nstar\n")
    overrides = [
        f"root={tmp_path}/root",
        f"stages=[{{name: metaclip, metadata: {tmp_path}/entries.txt, threshold: 12}}]",
        "strategies={balanced: {repeat: {column: metaclip_probability, cap: 1}}, oracle: {}}",
        "compare=[balanced]",
        "models={}",
    ]
    plan = planning.build(config.load(TINY, overrides), TINY)
    outcome = run_here(plan, ["balanced/selection"])
    assert not outcome.failures
    path = {name: outcome.statuses[name].artifact.path for name in ("pool", "metaclip", "balanced/selection")}
    expected = variance = kept = 0
    for shard in pool.load_shards(path["pool"]):
        columns = pool.read_table(f"{path['metaclip']}/{shard.name}.parquet")
        chosen = pool.read_table(f"{path['balanced/selection']}/{shard.name}.parquet")["row"].to_pylist()
        for row, value in enumerate(columns["metaclip_probability"].to_pylist()):
            assert (row in chosen) == bool(value) or 0 < value < 1
            expected += value or 0
            variance += (value or 0) * (1 - (value or 0))
        kept += len(chosen)
    assert variance > 5
    assert abs(kept - expected) < 4 * variance**0.5
