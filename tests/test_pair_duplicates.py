"""Which rows repeat each other as pairs, and the policies beside that; the demo world's planted copies as truth."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.errors import ConfigError
from stages import build_stage
from stages.duplicates import equal_keys
from tests.duplicates_fixture import run_stage
from tests.pool_fixture import drawing, random_uids, write_columns, write_pool

IMAGE = drawing(1)
A, B, C = ("a" * 32, "b" * 32, "c" * 32)
#          image group, caption group, rows in the caption's group
ROWS = [
    (A, B, 4),  # 0 and 1 repeat each other
    (A, B, 4),
    (A, None, 1),  # the same image with another caption
    (None, B, 4),  # the same caption under another image
    (C, B, 4),  # the same caption under an image that repeats elsewhere
    (C, A, 3),  # 5 and 6 repeat each other
    (C, A, 3),
    (B, A, 3),
    (None, None, 1),
]


def run(folder, rows=ROWS, uids=None, shards=(5, 4), **parameters):
    """(rows, facts) of the stage over these groups."""
    uids = uids or [f"{number:032x}" for number in range(len(rows))]
    entries = [{"image": IMAGE, "caption": "x", "uid": uid} for uid in uids]
    path = write_pool(folder, [entries[: shards[0]], entries[shards[0] :]])
    values = [
        pa.array(values, kind)
        for values, kind in zip(zip(*rows, strict=True), (pa.string(), pa.string(), pa.int32()), strict=True)
    ]
    names = ("image_group", "caption_group", "caption_group_size")
    columns = write_columns(folder, path, dict(zip(names, values, strict=True)))
    _, found, facts = run_stage(path, folder / "pairs", build_stage("pair_duplicates", parameters, ""), columns)
    return found, facts


def test_image_and_caption_must_repeat(tmp_path):
    found, facts = run(tmp_path)
    assert [row["pair_is_duplicate"] for row in found] == [False, True, False, False, False, False, True, False, False]
    assert [row["pair_group_size"] for row in found] == [2, 2, 1, 1, 1, 2, 2, 1, 1]
    assert found[1]["pair_survivor"] == found[0]["uid"] == found[1]["pair_group"]
    assert found[3]["pair_survivor"] is None
    assert (facts["groups"], facts["duplicates"]) == (2, 2)


def test_captions_above_a_count_are_duplicates_whatever_their_images(tmp_path):
    found, _ = run(tmp_path, caption_above=3)
    assert [row["pair_is_duplicate"] for row in found] == [False, True, False, True, True, False, True, False, False]
    assert [row["pair_group_size"] for row in found] == [4, 4, 1, 4, 4, 2, 2, 1, 1]


def test_shards_and_partitions_change_nothing(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    names = [f"{number:032x}" for number in range(12)]
    rows = [(*(names[at] if at < 12 else None for at in rng.integers(0, 14, 2)), 3) for _ in range(200)]
    uids = random_uids(rng, 200)
    first, _ = run(tmp_path / "a", rows, uids)
    monkeypatch.setattr(equal_keys, "PARTITION_ROWS", 30)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (100,))
    order = rng.permutation(200)
    again, _ = run(tmp_path / "b", [rows[at] for at in order], [uids[at] for at in order], shards=(90, 110))
    assert sorted(again, key=lambda row: row["uid"]) == sorted(first, key=lambda row: row["uid"])
    by_pair: dict = {}
    for row, uid in zip(rows, uids, strict=True):
        if None not in row[:2]:
            by_pair.setdefault(row[:2], []).append(uid)
    duplicates = {uid for members in by_pair.values() for uid in members if uid != min(members)}
    assert {row["uid"] for row in first if row["pair_is_duplicate"]} == duplicates


def test_what_has_no_sense_is_refused():
    with pytest.raises(ConfigError, match="stages.2.caption_above = 0, expected a number >= 1"):
        build_stage("pair_duplicates", {"caption_above": 0}, "stages.2")
