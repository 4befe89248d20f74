"""Planted faults are what they say, and the table counts what selections kept of them."""

from __future__ import annotations

import collections
import io

import numpy as np
import pytest
from PIL import Image

from benchmarks import planted_faults
from tests.pool_fixture import drawing

CLASSES = ("cat", "ship", "frog")


def pairs_of(num: int, name: str = "row") -> list[planted_faults.Pair]:
    return [
        planted_faults.Pair(
            f"{name}-{number}",
            drawing(number, kind="PNG"),
            f"a {CLASSES[number % 3]} number {number}",
            frozenset([CLASSES[number % 3]]),
            ("eine Katze", "un bateau"),
        )
        for number in range(num)
    ]


@pytest.fixture(scope="module")
def planted():
    """(pairs, rows) of a small pool."""
    pairs = pairs_of(800)
    return pairs, list(planted_faults.planted_rows(pairs, pairs_of(200, "translated")))


def test_every_kind_of_fault_is_there_at_its_rate(planted):
    counts = collections.Counter(row["truth_fault"] for row in planted[1])
    assert set(counts) == {"", *planted_faults.FAULTS}
    for fault, rate in planted_faults.FAULTS.items():
        assert abs(counts[fault] - rate * 800) < 5 * (800 * rate) ** 0.5, fault


def test_each_row_has_its_fault_and_no_other(planted):
    pairs, rows = planted
    earlier = set()
    for pair, row in zip(pairs, rows, strict=True):
        fault, image, caption = row["truth_fault"], row["image"], row["caption"]
        if fault == "corrupt":
            with pytest.raises(OSError):
                Image.open(io.BytesIO(image)).convert("RGB")
            continue
        width, height = Image.open(io.BytesIO(image)).size
        assert (max(width, height) > 3 * min(width, height)) == (fault == "extreme_aspect")
        assert (min(width, height) < 32) == (fault == "tiny")
        own_words = caption == pair.caption
        assert own_words == (fault in ("", "tiny", "extreme_aspect")), fault
        if fault in ("mismatched", "rendered_text"):
            assert not pair.names & set(caption.split())
        if fault == "exact_duplicate":
            assert (image, caption) in earlier
        if fault == "near_duplicate":
            assert (image, caption) not in earlier
            assert any(before in caption for _, before in earlier)
        if not fault:
            assert image == pair.image
            earlier.add((image, caption))


def test_rows_do_not_depend_on_those_after_them(planted):
    pairs, rows = planted
    kinds = ("boilerplate", "exact_duplicate", "near_duplicate", "tiny")  # all but those that draw from the whole pool
    again = list(planted_faults.planted_rows(pairs[:400], pairs_of(200, "translated")))
    for one, other in zip(rows, again, strict=False):
        assert one["truth_fault"] == other["truth_fault"]
        if one["truth_fault"] in kinds:
            assert one == other


def test_the_table_counts_rows_that_decoded():
    truth = np.array(["", "", "", "tiny", "tiny", "mismatched", None], object)
    chosen = {
        "all": np.array([1, 1, 1, 1, 1, 1, 0], bool),
        "some": np.array([1, 1, 0, 1, 0, 0, 0], bool),
        "none": np.zeros(7, bool),
    }
    lines = planted_faults.as_table(truth, chosen).splitlines()
    assert lines[0].startswith("7 rows: 3 good, 3 with a fault, 1 that failed")
    assert lines[2:] == [
        "| strategy | kept | precision | recall | tiny (2) | mismatched (1) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| all | 6 | 50 | 100 | 0 | 0 |",
        "| some | 3 | 67 | 67 | 50 | 100 |",
        "| none | 0 | - | 0 | 100 | 100 |",
    ]


@pytest.mark.ray
def test_the_table_of_a_finished_run(finished):
    root, _ = finished
    truth, chosen = planted_faults.read_choices(str(root))
    assert chosen and all(len(mask) == len(truth) for mask in chosen.values())
    failed = np.array([fault is None for fault in truth])
    assert failed.any() and not any(mask[failed].any() for mask in chosen.values())
    assert "trusted_only" not in chosen
    assert (chosen["oracle"] == (truth == "")).all()
