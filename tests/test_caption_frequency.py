"""Counts of captions against a Counter, and the same whatever the order, the shards and the sizes."""

from __future__ import annotations

import unicodedata
from collections import Counter

import numpy as np
import pytest

from stages.columns import caption_frequency
from stages.columns.caption_frequency import CaptionFrequency
from stages.duplicates import equal_keys
from tests.duplicates_fixture import fit_in_two, run_stage
from tests.pool_fixture import drawing, even_shards, scattered_uids, write_pool

IMAGE = drawing(1)


def written(folder, captions, shards=3):
    """The path of a pool; a caption of None is that of a failed row."""
    rows = [
        {"image": IMAGE if text is not None else None, "caption": "image" if text is None else text, "uid": uid}
        for text, uid in zip(captions, scattered_uids(len(captions)), strict=True)
    ]
    return write_pool(folder, even_shards(rows, shards))


def run(folder, captions, shards=3):
    """(count of each caption, facts)."""
    _, found, facts = run_stage(written(folder, captions, shards), folder / "out", CaptionFrequency())
    return [row["caption_count"] for row in found], facts


def counted(captions):
    texts = [
        None if text is None else " ".join(unicodedata.normalize("NFKC", text).casefold().split()) for text in captions
    ]
    counts = Counter(texts)
    return [None if text is None else counts[text] for text in texts], len(counts.keys() - {None})


def some_captions(num):
    rng = np.random.default_rng(num)
    words = ["red", "RED", "Red ", "ｒed", "Straße", "STRASSE", "", " ", "image", "\u0301", "红", "x" * 700]
    captions = ["".join(rng.choice(words, rng.integers(0, 4))) for _ in range(num)]
    captions[:: num // 9] = [None] * len(captions[:: num // 9])
    return [*captions, *["image"] * (num // 2)]


def test_counts_are_those_of_a_counter(tmp_path):
    captions = some_captions(200)
    expected, different = counted(captions)
    found, facts = run(tmp_path, captions)
    assert found == expected
    assert max(value for value in expected if value) >= 100
    assert (facts["captions"], facts["rows"]) == (different, sum(text is not None for text in captions))


def test_order_shards_blocks_and_partitions_change_nothing(tmp_path, monkeypatch):
    captions = some_captions(120)
    first, facts = run(tmp_path / "a", captions)
    order = np.random.default_rng(0).permutation(len(captions))
    monkeypatch.setattr(equal_keys, "PARTITION_ROWS", 30)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (20,))
    again, other = run(tmp_path / "b", [captions[at] for at in order], shards=11)
    assert [first[at] for at in order] == again
    assert {**facts, "shards": None} == {**other, "shards": None}


def test_a_caption_that_most_rows_have_costs_a_partition_one_entry_a_block(tmp_path, monkeypatch):
    sizes = []
    original = caption_frequency.write_totals

    def counting(keys, number, first_rows, path):
        rows = caption_frequency.exchange.read(keys.paths, number)
        sizes.append(rows.num_rows)
        original(keys, number, first_rows, path)

    monkeypatch.setattr(caption_frequency, "write_totals", counting)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (20,))
    found, _ = run(tmp_path, ["image"] * 100, shards=10)
    assert found == [100] * 100
    assert sizes == [5]


@pytest.mark.parametrize("captions", [[None, None], ["a"], [None, "a"], ["a", "A "]])
def test_small_pools(tmp_path, captions):
    assert run(tmp_path, captions, shards=2)[0] == counted(captions)[0]


def test_a_resumed_fit_goes_on_from_its_files(tmp_path):
    captions = some_captions(60)
    path = written(tmp_path, captions)
    assert fit_in_two(path, tmp_path / "out", CaptionFrequency(), {}, "counts") == ["counts"]
    _, rows, _ = run_stage(path, tmp_path / "out", CaptionFrequency())
    assert [row["caption_count"] for row in rows] == counted(captions)[0]
    assert not (tmp_path / "out" / "fit" / "work").exists()
