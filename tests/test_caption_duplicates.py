"""Near-duplicate captions: against datasketch's LSH and brute force, the same whatever the order, size or kill."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from datasketch import MinHash, MinHashLSH

from pipeline.core import storage
from pipeline.core.errors import ConfigError
from stages import build_stage
from stages.duplicates import band_join, components, groups, verify
from stages.duplicates.bands import band_keys, choose_bands, found_probability
from stages.duplicates.shingles import Shingling, python_shingles
from stages.duplicates.signatures import signatures
from tests.duplicates_fixture import run_stage
from tests.pool_fixture import drawing, even_shards, random_uids, write_pool

IMAGE = drawing(1)


def corpus(num: int, seed: int = 0) -> list[str]:
    """Captions of a small vocabulary: copies, captions with some words changed, file names, boilerplate."""
    rng = np.random.default_rng(seed)
    words = [f"word{number}" for number in range(2000)]
    found: list[str] = []
    for number in range(num):
        kind = rng.random()
        if found and kind < 0.3:
            changed = found[rng.integers(len(found))].split()
            for _ in range(rng.integers(0, 4)):
                changed[rng.integers(len(changed))] = words[rng.integers(2000)]
            found.append(" ".join(changed))
        elif kind < 0.35:
            found.append("Image " if number % 2 else "image")
        elif kind < 0.4:
            found.append(f"IMG_{number:06d}.jpg")
        else:
            found.append(" ".join(words[at] for at in rng.integers(0, 2000, rng.integers(1, 15))))
    return found


def jaccard(one: set, two: set) -> float:
    return len(one & two) / len(one | two) if one | two else 1.0


def groups_of(pairs, num: int) -> set[frozenset[int]]:
    """The components with more than one member."""
    if not pairs:
        return set()
    row, label = components.labels(*(np.array(list(side), dtype=np.uint64) for side in zip(*pairs, strict=True)))
    members: dict[int, set[int]] = {}
    for one, name in zip(row.tolist(), label.tolist(), strict=True):
        members.setdefault(name, set()).add(one)
    return {frozenset(found) for found in members.values()}


def run(folder, captions, shards=3, uids=None, minhash=None, keep_column=None, **parameters):
    """(rows, facts) of the stage over a pool of the captions; failed rows where the caption is None."""
    rows = [{"image": IMAGE if text is not None else None, "caption": text or ""} for text in captions]
    for row, uid in zip(rows, uids or [f"{number:032x}" for number in range(len(rows))], strict=True):
        row["uid"] = uid
    if keep_column is not None:
        for row, value in zip(rows, keep_column, strict=True):
            row["original_width_px"] = value
    path = write_pool(folder / "root", even_shards(rows, shards))
    columns, _, _ = run_stage(path, folder / "minhash", build_stage("minhash", minhash or {}, ""))
    stage = build_stage("caption_duplicates", parameters, "")
    _, found, facts = run_stage(path, folder / "duplicates", stage, columns)
    return found, facts


def found_groups(rows) -> set[frozenset[int]]:
    """The groups as sets of places among the rows."""
    members: dict[str, set[int]] = {}
    for place, row in enumerate(rows):
        if row["caption_group"] is not None:
            members.setdefault(row["caption_group"], set()).add(place)
    return {frozenset(found) for found in members.values()}


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_groups_are_those_of_datasketchs_lsh_verified_by_brute_force(threshold, tmp_path):
    captions = corpus(1500)
    bands, rows = choose_bands(threshold, 128, 0.9)
    lsh = MinHashLSH(num_perm=128, params=(bands, rows))
    sets = [set(python_shingles(text, Shingling())) for text in captions]
    pairs = set()
    for number, found in enumerate(sets):
        sketch = MinHash(num_perm=128, seed=1, scheme="affine32")
        sketch.update_batch([word.encode() for word in found])
        pairs |= {(other, number) for other in lsh.query(sketch)}
        lsh.insert(number, sketch)
    alike = [(one, two) for one, two in pairs if jaccard(sets[one], sets[two]) >= threshold]
    assert len(alike) < len(pairs) or threshold == 0.9
    found, facts = run(tmp_path, captions, threshold=threshold)
    assert found_groups(found) == groups_of(alike, len(captions))
    assert facts["cut_buckets"] == 0
    assert facts["expected_recall_at_threshold"] >= 0.9


def test_signature_agreement_is_the_cheap_check(tmp_path):
    captions = corpus(600)
    found, _ = run(tmp_path, captions, verify="signature", bands=20, rows=6)
    values = signatures(captions, Shingling())
    keys = band_keys(values, 0, 20, 6)
    pairs = [
        (one, two)
        for one, two in itertools.combinations(range(len(captions)), 2)
        if (keys[:, one] == keys[:, two]).any() and (values[one] == values[two]).mean() >= 0.7
    ]
    assert found_groups(found) == groups_of(pairs, len(captions))


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9])
def test_chosen_bands_find_what_they_promise(threshold):
    """Pairs of sets with a Jaccard of just the threshold, all possible word counts being round."""
    rng = np.random.default_rng(1)
    shared = {0.5: 10, 0.6: 15, 0.7: 14, 0.8: 16, 0.9: 18}[threshold]
    own = {0.5: 10, 0.6: 10, 0.7: 6, 0.8: 4, 0.9: 2}[threshold]
    pairs = []
    for _ in range(1500):
        words = [f"w{number}" for number in rng.choice(10**9, shared + own, replace=False)]
        pairs.append((" ".join(words[: shared + own // 2]), " ".join(words[:shared] + words[shared + own // 2 :])))
    assert jaccard(set(pairs[0][0].split()), set(pairs[0][1].split())) == pytest.approx(threshold)
    bands, rows = choose_bands(threshold, 128, 0.9)
    expected = found_probability(threshold, bands, rows)
    keys = [band_keys(signatures(side, Shingling()), 0, bands, rows) for side in zip(*pairs, strict=True)]
    recall = (keys[0] == keys[1]).any(axis=0).mean()
    assert expected >= 0.9
    assert abs(recall - expected) < 4 * np.sqrt(expected * (1 - expected) / len(pairs))
    assert bands * rows <= 128


def test_no_choice_of_bands_is_an_error():
    with pytest.raises(ValueError, match="16 permutations can't find pairs at 0.1 with probability 0.99"):
        choose_bands(0.1, 16, 0.99)


def test_shards_order_blocks_and_partitions_change_nothing(tmp_path, monkeypatch):
    captions = [*corpus(400), None, None]
    rng = np.random.default_rng(3)
    uids = random_uids(rng, len(captions))
    first, _ = run(tmp_path / "a", captions, uids=uids)
    order = rng.permutation(len(captions))
    monkeypatch.setattr(band_join, "GROUP_ROWS", 900)
    monkeypatch.setattr(band_join, "PARTITION_ROWS", 300)
    monkeypatch.setattr(groups, "PARTITION_ROWS", 50)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (150,))
    again, facts = run(tmp_path / "b", [captions[at] for at in order], shards=7, uids=[uids[at] for at in order])
    assert sorted(again, key=lambda row: row["uid"]) == sorted(first, key=lambda row: row["uid"])
    assert first[-1]["caption_is_duplicate"] is None
    assert facts["duplicates"] == sum(row["caption_is_duplicate"] or False for row in first)


def test_the_survivor_has_the_highest_value_then_the_lowest_uid(tmp_path):
    captions = ["a b c d"] * 5 + ["e f g"] * 2 + ["only one"]
    uids = [f"{9 - number:032x}" for number in range(8)]
    found, _ = run(
        tmp_path, captions, uids=uids, keep="original_width_px", keep_column=[3, 8, 8, None, 1, None, None, 4]
    )
    assert [row["caption_survivor"] for row in found] == [uids[2]] * 5 + [uids[6]] * 2 + [None]
    assert [row["caption_group"] for row in found] == [uids[4]] * 5 + [uids[6]] * 2 + [None]
    assert [row["caption_is_duplicate"] for row in found] == [True, True, False, True, True, True, False, False]
    assert [row["caption_group_size"] for row in found] == [5] * 5 + [2] * 2 + [1]


def test_file_names_do_not_chain_and_boilerplate_is_kept_together(tmp_path):
    captions = [f"IMG_{number:06d}.jpg" for number in range(300)] + ["image"] * 700
    found, facts = run(tmp_path, captions, minhash={"shingle": "character", "shingle_size": 5}, threshold=0.7)
    sets = [set(python_shingles(text, Shingling("character", 5))) for text in captions[:300]]
    close = [pair for pair in itertools.combinations(range(300), 2) if jaccard(sets[pair[0]], sets[pair[1]]) >= 0.7]
    groups_found = found_groups(found)
    assert frozenset(range(300, 1000)) in groups_found
    assert facts["different_captions"] <= 300 + 3  # one of the copies a block
    alike = groups_of(close, 1000)
    assert all(any(group <= real for real in alike) for group in groups_found - {frozenset(range(300, 1000))})


def test_a_large_bucket_of_different_captions_costs_no_pairs(monkeypatch):
    """Twice as many rows, about twice as many comparisons; and like rows still meet."""
    monkeypatch.setattr(verify, "MOST_COMPARED", 64)
    rng = np.random.default_rng(0)
    compared = []
    for num in (2000, 4000):
        base = rng.integers(0, 2**63, (num // 2, 13)).astype(np.uint64)
        near = base.copy()
        near[:, 0] = rng.integers(0, 2**63, num // 2)
        sets = np.sort(np.concatenate([base, near]), axis=1)
        rows = np.arange(num, dtype=np.uint64)
        offsets = np.arange(num + 1, dtype=np.int64) * 13
        a, b, counts = verify.joined_pairs(np.zeros(num, np.int64), rows, offsets, sets.reshape(-1), 0.7, True)
        assert counts["cut_buckets"] == 1
        row, label = components.labels(a, b)
        together = dict(zip(row.tolist(), label.tolist(), strict=True))
        pairs = sum(
            together.get(one) is not None and together[one] == together.get(one + num // 2) for one in range(num // 2)
        )
        assert pairs > 0.97 * num / 2
        compared.append(counts["compared"])
    assert compared[1] < 2.5 * compared[0]


def test_an_exact_threshold_counts(tmp_path):
    found, _ = run(tmp_path, ["a b c d e f g", "a b c d e f g h i j"], threshold=0.7, bands=64, rows=2)
    assert found_groups(found) == {frozenset({0, 1})}
    found, _ = run(tmp_path / "b", ["a b c d e f g", "a b c d e f g h i j"], threshold=0.71, bands=64, rows=2)
    assert found_groups(found) == set()


def test_a_resumed_fit_goes_on_from_its_files(tmp_path, monkeypatch):
    captions = corpus(300)
    whole, _ = run(tmp_path / "a", captions)
    calls = []
    original = band_join.write_verified

    def failing(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        original(*arguments)

    monkeypatch.setattr(band_join, "write_verified", failing)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "b", captions)
    passes = tmp_path / "b" / "duplicates" / "fit" / "work"
    kept = {path: path.stat().st_mtime_ns for path in passes.rglob("*.arrow")}
    assert kept
    monkeypatch.setattr(band_join, "write_contents", None)  # must not be called again
    monkeypatch.setattr(band_join, "write_keys", None)
    again, _ = run(tmp_path / "b", captions)
    assert again == whole
    assert not passes.exists()


def test_what_does_not_fit_together_is_named():
    with pytest.raises(ConfigError, match="bands = 3, rows = None, expected both or none"):
        build_stage("caption_duplicates", {"bands": 3}, "")
    owners = {"minhash_signature": build_stage("minhash", {}, "")}
    types = {"minhash_signature": "binary", "language": "string"}
    for parameters, message in (
        ({"bands": 30, "rows": 6}, "bands = 30, rows = 6: 180, expected at most minhash's 128 permutations"),
        ({"threshold": 0.01}, "threshold = 0.01: 128 permutations can't find pairs at 0.01 with probability 0.9"),
        ({"keep": "language"}, "keep = language, expected a column of numbers, found string"),
        ({"signatures": "language"}, "signatures = language, expected a column of the stage minhash"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_stage("caption_duplicates", parameters, "").check_needs(types, owners)


@pytest.mark.parametrize("verify", ["jaccard", "signature"])
def test_shards_without_a_usable_row(verify, tmp_path):
    found, facts = run(tmp_path / "a", [None, None, "a b c", "a b c", None, None], verify=verify)
    assert [row["caption_is_duplicate"] for row in found] == [None, None, False, True, None, None]
    found, facts = run(tmp_path / "b", [None] * 3, verify=verify)
    assert [row["caption_group_size"] for row in found] == [None] * 3
    assert (facts["groups"], facts["duplicates"], facts["different_captions"]) == (0, 0, 0)


def test_an_object_store_gives_the_same(tmp_path, s3_url):
    captions = corpus(60)
    local, _ = run(tmp_path, captions)
    rows = [{"image": IMAGE, "caption": text, "uid": f"{number:032x}"} for number, text in enumerate(captions)]
    path = write_pool(f"{s3_url}/root", [rows[:20], rows[20:40], rows[40:]])
    columns, _, _ = run_stage(path, f"{s3_url}/minhash", build_stage("minhash", {}, ""))
    _, found, _ = run_stage(path, f"{s3_url}/duplicates", build_stage("caption_duplicates", {}, ""), columns)
    assert found == local
    assert storage.list_files(f"{s3_url}/duplicates/fit/work", recursive=True) == []
