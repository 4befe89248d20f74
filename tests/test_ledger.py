"""The ledger: budgets to the sample, even repeats, no entry twice in a batch, any step at once; and its checker."""

from __future__ import annotations

import hashlib
import itertools
import re
import subprocess
import sys

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipeline.core import storage
from pipeline.core.errors import WinnowError
from tests.conftest import ROOT
from tests.training_fixture import recipe, write_train_set
from training import check_ledger
from training.ledger import Ledger, rank_slice
from training.loop import train
from training.recipe import Seeds


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


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(checkpoint, train set) of a real training: 100 samples of 50 pairs in batches of 8."""
    train_set_path = write_train_set(str(tmp_path_factory.mktemp("train_set")), 50)
    checkpoint_path = str(tmp_path_factory.mktemp("checkpoint"))
    train(train_set_path, checkpoint_path, recipe(), Seeds(0, 7))
    return checkpoint_path, train_set_path


def check(*arguments, cwd):
    command = [sys.executable, str(ROOT / "training" / "check_ledger.py"), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True)


def test_a_finished_training_is_checked_from_anywhere(trained, tmp_path):
    done = check(*trained, "--times-seen", "seen.parquet", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[1:] == [
        "samples seen   100, exactly the budget",
        "steps          13 of 8, the last of 4",
        "entries        50, each seen 2 to 2 times",
        "pairs          50, each seen 2 to 2 times",
    ]
    seen = pq.read_table(tmp_path / "seen.parquet").to_pydict()
    assert seen == {"uid": [f"{number:032x}" for number in range(50)], "times_seen": [2] * 50}

    ledger = Ledger(50, 100, 8, 7, 4)
    asked = check(*trained, "--step", "12", cwd=tmp_path)
    assert asked.stdout.split() == [f"{entry:032x}" for entry in ledger.batch(12)]
    asked = check(*trained, "--uid", f"{17:032x}", cwd=tmp_path)
    assert asked.stdout.split() == [str(step) for step in range(13) if 17 in ledger.batch(step)]


def test_a_ledger_on_an_object_store(trained, s3_url, capsys):
    for path, name in zip(trained, ("checkpoint", "train_set"), strict=True):
        for file in ("ledger.json", "metrics.jsonl", "index.parquet"):
            if storage.exists(f"{path}/{file}"):
                storage.write_bytes(f"{s3_url}/{name}/{file}", storage.read_bytes(f"{path}/{file}"))
    remote = [f"{s3_url}/checkpoint", f"{s3_url}/train_set"]
    assert check_ledger.main([*remote, "--times-seen", f"{s3_url}/seen.parquet"]) == 0
    assert "samples seen   100, exactly the budget" in capsys.readouterr().out
    assert storage.exists(f"{s3_url}/seen.parquet")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"samples_seen": 96}, r"metrics.jsonl: ends at step 13 after 100 samples, expected 12 and 96"),
        ({"num_entries": 49}, r"num_entries = 49, expected the 50 of"),
        ({"index_sha256": "0" * 64}, r"index_sha256 = 0+, expected [0-9a-f]{64}: .* is not the train set of this"),
        ({"version": 0}, r"version = 0, expected 1: another order than this code's"),
        ({"seed": None}, r"seed = None, expected a whole number"),
    ],
)
def test_a_ledger_that_does_not_hold(change, message, trained, tmp_path, capsys):
    checkpoint_path, train_set_path = trained
    record = storage.read_json(f"{checkpoint_path}/ledger.json")
    storage.write_json(str(tmp_path / "ledger.json"), record | change)
    storage.write_bytes(str(tmp_path / "metrics.jsonl"), storage.read_bytes(f"{checkpoint_path}/metrics.jsonl"))
    assert check_ledger.main([str(tmp_path), train_set_path]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert re.fullmatch(rf"error: .*{message}.*\n", printed.err)


def test_questions_without_an_answer(trained, tmp_path, capsys):
    checkpoint_path, train_set_path = trained
    for arguments, message in (
        ([checkpoint_path, train_set_path, "--step", "13"], "step = 13, expected 0 <= step < 13"),
        ([checkpoint_path, train_set_path, "--uid", "abc"], "--uid = abc, expected a pair of the train set"),
        ([str(tmp_path), train_set_path], "ledger.json is missing, expected the ledger of a finished training"),
        ([checkpoint_path, str(tmp_path)], "index.parquet is missing, expected the index of a train set"),
    ):
        assert check_ledger.main(arguments) == 1
        assert message in capsys.readouterr().err


class Wrong(Ledger):
    """A ledger whose batch of one step is another one."""

    def batch(self, step):
        entries = super().batch(step)
        return self.wrong(entries) if step == 2 else entries


@pytest.mark.parametrize(
    "wrong, message",
    [
        (lambda entries: entries[:-1], "step 2: 7 entries, expected 8"),
        (lambda entries: np.concatenate([entries[:-1], entries[:1]]), "step 2: an entry comes twice"),
        (lambda entries: entries + 50, "step 2: expected entries from 0 to 49"),
        (lambda entries: np.setdiff1d(np.arange(50), entries)[:8], "an entry 1 to 3 times, expected 100 and 2 to 2"),
    ],
)
def test_batches_that_break_the_rules_are_found(wrong, message, monkeypatch):
    monkeypatch.setattr(Wrong, "wrong", staticmethod(wrong), raising=False)
    check_ledger.count_batches(Ledger(50, 100, 8, 7, 4))
    with pytest.raises(WinnowError, match=message):
        check_ledger.count_batches(Wrong(50, 100, 8, 7, 4))


def test_the_checker_is_light():
    code = "import sys, training.check_ledger; print([name for name in ('torch', 'PIL') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
