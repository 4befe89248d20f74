"""Exact near-duplicates of embeddings against brute force, and the same whatever the order, the shards and sizes."""

from __future__ import annotations

import numpy as np
import pytest

from stages.columns import embedding_duplicates
from stages.columns.embedding_duplicates import EmbeddingDuplicates
from stages.duplicates.components import labels
from stages.unit_vectors import unit
from tests.duplicates_fixture import run_stage
from tests.embedding_fixture import near_copies, vector_pool
from tests.pool_fixture import scattered_uids


def run(folder, vectors, ids, shards=3, **parameters):
    """(rows, facts) of the stage over a pool of the vectors."""
    path, columns = vector_pool(folder, vectors, ids, shards)
    _, rows, facts = run_stage(path, folder / "out", EmbeddingDuplicates(embedding="vector", **parameters), columns)
    return rows, facts


def expected_pairs(vectors, ids, threshold, top_k):
    """Directed pairs (row, other), by sorting all others of each row."""
    cosines = (unit(vectors) @ unit(vectors).T).astype(np.float32)
    pairs = set()
    for row in range(len(vectors)):
        others = sorted((at for at in range(len(vectors)) if at != row), key=lambda at: (-cosines[row, at], ids[at]))
        pairs |= {(row, other) for other in others[:top_k] if cosines[row, other] >= np.float32(threshold)}
    return pairs


def groups_of(pairs):
    """The components, as sets of rows."""
    row, label = labels(*(np.array(side, dtype=np.uint64) for side in zip(*pairs, strict=True)))
    return {frozenset(row[label == name].tolist()) for name in set(label.tolist())}


def found_groups(rows):
    """The groups, as sets of places among the rows."""
    members: dict[str, set[int]] = {}
    for place, row in enumerate(rows):
        if row["embedding_group"] is not None:
            members.setdefault(row["embedding_group"], set()).add(place)
    return {frozenset(found) for found in members.values()}


@pytest.mark.parametrize(("threshold", "top_k"), [(0.9, 16), (0.5, 3), (0.3, 1), (0.2, 2)])
def test_groups_are_those_of_brute_force(threshold, top_k, tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_duplicates, "PIECE_ROWS", 100)
    monkeypatch.setattr(embedding_duplicates, "TILE_ROWS", 32)
    vectors, _ = near_copies(300, 24, seed=1)
    ids = scattered_uids(300)
    rows, facts = run(tmp_path, vectors, ids, shards=6, threshold=threshold, top_k=top_k)
    pairs = expected_pairs(vectors, ids, threshold, top_k)
    assert facts["pairs"] == len(pairs) > 100
    assert found_groups(rows) == groups_of(pairs)


def test_equal_ones_at_the_last_rank_are_taken_by_uid(tmp_path, monkeypatch):
    monkeypatch.setattr(embedding_duplicates, "PIECE_ROWS", 10)
    monkeypatch.setattr(embedding_duplicates, "MOST_PAIRS", 8)
    monkeypatch.setattr(embedding_duplicates, "PAIRS_AT_ONCE", 7)
    rng = np.random.default_rng(2)
    vectors = rng.normal(size=(5, 16)).astype(np.float16)[rng.integers(0, 5, 40)]  # heaps of equal vectors
    ids = [f"{number:032x}" for number in rng.permutation(40)]
    for top_k in (1, 3):
        rows, facts = run(tmp_path / str(top_k), vectors, ids, shards=4, threshold=1.0, top_k=top_k)
        pairs = expected_pairs(vectors, ids, 1.0, top_k)
        assert facts["pairs"] == len(pairs)
        assert found_groups(rows) == groups_of(pairs)
        assert facts["groups"] == len({vector.tobytes() for vector in vectors})


def test_planted_copies_are_found_and_the_lowest_uid_survives(tmp_path):
    vectors, original = near_copies(200, 64, seed=3, noise=0.02)
    ids = [f"{number:032x}" for number in range(200)]
    rows, facts = run(tmp_path, vectors, ids)
    for number, row in enumerate(rows):
        alone = (original == original[number]).sum() == 1
        assert row["embedding_survivor"] == (None if alone else ids[original[number]])
        assert row["embedding_is_duplicate"] == (original[number] != number)
    assert facts["duplicates"] == (original != np.arange(200)).sum()


def test_order_shards_and_tiles_change_nothing(tmp_path, monkeypatch):
    vectors, _ = near_copies(240, 32, seed=4)
    ids = scattered_uids(240)
    first, facts = run(tmp_path / "a", vectors, ids, threshold=0.6, top_k=2)
    order = np.random.default_rng(0).permutation(240)
    monkeypatch.setattr(embedding_duplicates, "PIECE_ROWS", 80)
    monkeypatch.setattr(embedding_duplicates, "TILE_ROWS", 7)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (90,))
    again, other = run(tmp_path / "b", vectors[order], [ids[at] for at in order], shards=6, threshold=0.6, top_k=2)
    assert [first[at] for at in order] == again
    assert facts["pairs"] == other["pairs"]


def test_rows_without_a_vector_are_in_no_group(tmp_path):
    vectors = [np.ones(4), None, np.ones(4), np.zeros(4), np.zeros(4), [1, np.inf, 0, 0]]
    ids = [f"{number:032x}" for number in range(6)]
    rows, facts = run(tmp_path, vectors, ids)
    assert [row["embedding_group_size"] for row in rows] == [2, None, 2, 1, 1, 1]
    assert [row["embedding_is_duplicate"] for row in rows] == [False, None, True, False, False, False]
    rows, facts = run(tmp_path / "none", [None, None], ids[:2])
    assert facts["groups"] == facts["pairs"] == 0
