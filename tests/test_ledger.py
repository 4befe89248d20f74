"""The ledger: budgets to the sample, even repeats, no entry twice in a batch, any step at once."""

from __future__ import annotations

import hashlib
import itertools

import numpy as np
import pytest

from pipeline.core.errors import WinnowError
from training.ledger import Ledger, rank_slice


def all_batches(ledger):
    return [ledger.batch(step) for step in range(ledger.num_steps)]


@pytest.mark.parametrize("num_entries", [1, 2, 3, 5, 8, 13])
def test_budget_is_exact_and_repeats_are_even(num_entries):
    for batch, chunk in itertools.product((1, 2, 3, 5, 8), (1, 2, 3, 5, 32)):
        for budget in {1, batch, 2 * num_entries + 3, 5 * num_entries + 1}:
            ledger = Ledger(num_entries, budget, batch, seed=3, chunk_size=chunk)
            batches = all_batches(ledger)
            seen = np.concatenate(batches)
            counts = np.bincount(seen, minlength=num_entries)
            assert len(seen) == budget
            assert counts.min() >= budget // num_entries
            assert counts.max() <= -(-budget // num_entries)
            np.testing.assert_array_equal(counts, ledger.times_seen())
            assert [len(entries) for entries in batches[:-1]] == [batch] * (len(batches) - 1)
            if num_entries >= batch:
                assert all(len(np.unique(entries)) == len(entries) for entries in batches)


@pytest.mark.parametrize("num_entries, batch", [(7, 5), (50, 8), (16, 16)])
def test_any_step_is_found_without_the_steps_before(num_entries, batch):
    arguments = (num_entries, 12 * num_entries + 3, batch, 1, 4)
    in_order = all_batches(Ledger(*arguments))
    for step in range(len(in_order) - 1, -1, -7):
        np.testing.assert_array_equal(Ledger(*arguments).batch(step), in_order[step])
    backwards = Ledger(*arguments)
    for step in reversed(range(len(in_order))):
        np.testing.assert_array_equal(backwards.batch(step), in_order[step])


def test_each_pass_has_another_order_and_other_chunks():
    ledger = Ledger(640, 3 * 640, 640, seed=0, chunk_size=32)
    passes = all_batches(ledger)
    assert all(sorted(entries) == list(range(640)) for entries in passes)
    cuts = [set(entries[1:][np.diff(entries) != 1]) for entries in passes]
    assert len(cuts[0] & cuts[1]) <= 2
    assert not np.array_equal(passes[0], passes[1])
    assert not np.array_equal(passes[0], all_batches(Ledger(640, 640, 640, seed=1, chunk_size=32))[0])


def test_reads_are_long():
    """Samples come in runs of the chunk size, a range read each; only chunks at the ends of passes may be cut."""
    ledger = Ledger(10_000, 20_000, 256, seed=0, chunk_size=32)
    runs = sum(1 + int((np.diff(entries) != 1).sum()) for entries in all_batches(ledger))
    assert runs <= 1.02 * 20_000 / 32 + 2 * ledger.num_steps


@pytest.mark.parametrize("num_chunks", [3, 5, 40])
def test_the_order_is_random(num_chunks):
    """Over seeds every entry comes to every place about equally often (5 standard errors)."""
    trials = 1000
    counts = np.zeros((num_chunks, num_chunks))
    for seed in range(trials):
        counts[np.arange(num_chunks), Ledger(num_chunks, num_chunks, num_chunks, seed, 1).batch(0)] += 1
    expected = trials / num_chunks
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected)


def test_ranks_share_a_batch():
    for size, ranks in itertools.product((0, 1, 2, 7, 8, 100), (1, 2, 3, 8)):
        slices = [rank_slice(size, rank, ranks) for rank in range(ranks)]
        assert [place for first, last in slices for place in range(first, last)] == list(range(size))
        lengths = [last - first for first, last in slices]
        assert max(lengths) - min(lengths) <= 1


def test_a_step_of_datacomp_xlarge_takes_the_memory_of_a_batch():
    ledger = Ledger(1_400_000_000, 12_800_000_000, 90_112, seed=0, chunk_size=32)
    assert ledger.num_steps == 142_046
    assert ledger.batch_size(142_045) == 40_960
    entries = ledger.batch(142_045)
    assert len(np.unique(entries)) == 40_960
    assert 0 <= entries.min() < entries.max() < 1_400_000_000


def test_the_order_is_pinned():
    """Recorded ledgers must mean the same forever: another order needs another VERSION."""
    ledger = Ledger(1000, 5000, 96, seed=7, chunk_size=16)
    digest = hashlib.sha256(np.concatenate(all_batches(ledger)).astype("<i8").tobytes()).hexdigest()
    assert (ledger.to_json()["version"], digest[:16]) == (1, "7b81c62c83c9412c")


def test_faults_are_named():
    with pytest.raises(WinnowError, match="num_entries = 0, expected at least 1"):
        Ledger(0, 1, 1, 0, 1)
    with pytest.raises(WinnowError, match="step = 2, expected 0 <= step < 2"):
        Ledger(10, 4, 2, 0, 1).batch(2)
