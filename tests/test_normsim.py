"""NormSim against its definition in float64, with targets from references and files; the same in any order."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from pipeline.core.errors import ConfigError, WinnowError
from stages import build_stage, second_moment
from stages.columns import normsim
from tests.duplicates_fixture import run_stage
from tests.embedding_fixture import vector_pool, vector_references
from tests.golden_fixture import check_golden
from tests.pool_fixture import scattered_uids


def run(folder, vectors, references=(), files=(), shards=3, **parameters):
    """(normsim_2, normsim_inf) of each row, and facts.

    Args:
        references: [(name, vectors)].
        files: [(file's name, what writes the file to a path)].
    """
    paths = []
    for name, save in files:
        paths.append(str(folder / name))
        folder.mkdir(exist_ok=True)
        save(paths[-1])
    path, columns = vector_pool(folder, vectors, scattered_uids(len(vectors)), shards)
    pools = vector_references(folder, dict(references))
    given = {"embedding": "vector", "against": list(pools), "target_features": paths, **parameters}
    stage = build_stage("normsim", given, "normsim")
    _, rows, facts = run_stage(path, folder / "out", stage, columns, pools)
    return [row["normsim_2"] for row in rows], [row["normsim_inf"] for row in rows], facts


def norms(vectors, targets):
    """([n], [n]): ||F f||_2 and the largest |<t, f>|, pair by pair in float64."""
    rows, goals = (
        one / np.linalg.norm(one, axis=1, keepdims=True) for one in (np.float64(vectors), np.float64(targets))
    )
    cosines = np.array([[row @ goal for goal in goals] for row in rows])
    return np.sqrt((cosines**2).sum(axis=1)), np.abs(cosines).max(axis=1)


def random(num, dimensions, seed):
    rng = np.random.default_rng(seed)
    return (rng.normal(size=(num, dimensions)) * rng.uniform(0.1, 9, (num, 1))).astype(np.float16)


@pytest.mark.parametrize(("num", "num_targets", "dimensions"), [(80, 60, 32), (40, 1, 8), (1, 30, 16), (60, 90, 3)])
def test_norms_are_those_of_the_definition(num, num_targets, dimensions, tmp_path):
    vectors, targets = random(num, dimensions, 1), random(num_targets, dimensions, 2)
    two, largest, facts = run(tmp_path, vectors, [("targets", targets)])
    expected = norms(vectors, targets)
    np.testing.assert_allclose(two, expected[0], rtol=3e-7, atol=1e-7)
    np.testing.assert_allclose(largest, expected[1], rtol=0, atol=2e-7)
    assert (facts["rows_with_vectors"], facts["targets"]) == (num, num_targets)
    rows, goals = (
        one / np.linalg.norm(one, axis=1, keepdims=True) for one in (np.float64(vectors), np.float64(targets))
    )
    vas = np.einsum("ij,jk,ik->i", rows, goals.T @ goals / num_targets, rows)  # of Variance Alignment Score
    np.testing.assert_allclose(np.float64(two) ** 2 / num_targets, vas, rtol=1e-6, atol=1e-8)


def test_the_absolute_cosine_counts(tmp_path):
    vectors = np.array([[1, 0, 0], [0, 1, 0], [0, 1, 1], [0, -3, 0]], np.float16)
    two, largest, _ = run(tmp_path, vectors, [("targets", np.array([[-2, 0, 0], [0, 1, 0], [0, 1, 0]], np.float16))])
    assert largest == [1, 1, np.float32(0.5**0.5), 1]
    assert two == [1, np.float32(2**0.5), 1, np.float32(2**0.5)]


def test_targets_of_references_and_files_are_one_set(tmp_path):
    vectors, targets = random(50, 16, 3), random(120, 16, 4)
    rows = targets.astype(np.float32)
    files = [
        ("a.npy", partial(lambda part, path: np.save(path, part), rows[60:90])),
        ("b.pt", partial(lambda part, path: torch.save({"image_features": part}, path), rows[90:])),
    ]
    two, largest, facts = run(tmp_path / "both", vectors, [("x", targets[:25]), ("y", targets[25:60])], files)
    assert facts["targets"] == 120
    alone = run(tmp_path / "one", vectors, [("x", targets)])
    assert (two, largest) == alone[:2]
    expected = norms(vectors, targets)
    np.testing.assert_allclose(largest, expected[1], rtol=0, atol=2e-7)


def test_order_shards_pieces_and_tiles_change_nothing(tmp_path, monkeypatch):
    vectors, targets = random(100, 24, 5), random(90, 24, 6)
    first = run(tmp_path / "a", vectors, [("x", targets)])
    order, other = (np.random.default_rng(0).permutation(num) for num in (100, 90))
    monkeypatch.setattr(normsim, "PIECE_ROWS", 17)
    monkeypatch.setattr(normsim, "TARGET_ROWS", 13)
    monkeypatch.setattr(normsim, "TILE_ROWS", {"cpu": 7})
    monkeypatch.setattr(second_moment, "TILE_ROWS", 5)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (40,))
    again = run(tmp_path / "b", vectors[order], [("x", targets[other])], shards=7)
    for one, two in zip(first[:2], again[:2], strict=True):
        assert [one[at] for at in order] == two


def test_one_norm_alone_leaves_the_other_null(tmp_path):
    vectors, targets = random(10, 8, 7), random(10, 8, 8)
    both = run(tmp_path / "both", vectors, [("x", targets)])
    two, none, _ = run(tmp_path / "two", vectors, [("x", targets)], norms=[2])
    assert (two, none) == (both[0], [None] * 10)
    none, largest, _ = run(tmp_path / "inf", vectors, [("x", targets)], norms=["inf"])
    assert (none, largest) == ([None] * 10, both[1])


def test_rows_and_targets_without_vectors_do_not_count(tmp_path):
    vectors, targets = list(random(6, 8, 9)), list(random(6, 8, 10))
    for rows in (vectors, targets):
        rows[1] = None  # a failed row
        rows[2] = np.zeros(8, np.float16)
        rows[3] = np.array([np.nan] * 8, np.float16)
    file = np.stack([np.zeros(8), np.ones(8)]).astype(np.float32)
    two, largest, facts = run(
        tmp_path, vectors, [("x", targets)], [("a.npy", lambda path: np.save(path, file))], shards=6
    )
    assert (
        [value is None for value in two] == [value is None for value in largest] == [at in (1, 2, 3) for at in range(6)]
    )
    assert (facts["rows_with_vectors"], facts["targets"]) == (3, 4)
    left = [0, 4, 5]
    expected = norms([vectors[at] for at in left], [*(targets[at] for at in left), np.ones(8)])
    np.testing.assert_allclose([two[at] for at in left], expected[0], rtol=3e-7)
    none, _, facts = run(tmp_path / "none", [None, np.zeros(4)], [("x", random(3, 4, 0))])
    assert (none, facts["rows_with_vectors"]) == ([None, None], 0)


def test_what_is_missing_or_does_not_fit_is_named(tmp_path):
    stage = build_stage("normsim", {}, "normsim")
    with pytest.raises(ConfigError, match="against is empty, expected targets there or in target_features"):
        stage.check_needs({}, {})
    stage = build_stage("normsim", {"target_features": [str(tmp_path / "no.pt")]}, "normsim")
    stage.check_needs({}, {})
    assert "no.pt is not there: ImageNet's training images" in stage.unavailable()
    with pytest.raises(ConfigError, match="normsim.norms"):
        build_stage("normsim", {"norms": [3]}, "normsim")
    with pytest.raises(ConfigError, match="normsim.norms"):
        build_stage("normsim", {"norms": []}, "normsim")
    vectors = random(3, 8, 0)
    with pytest.raises(WinnowError, match=r"no target with a vector \(x\), expected some"):
        run(tmp_path / "a", vectors, [("x", [None, np.zeros(8)])])
    for name in (2, "inf"):
        with pytest.raises(WinnowError, match="targets with vectors of 5 values, expected 8"):
            run(tmp_path / f"b{name}", vectors, [("x", random(3, 5, 0))], norms=[name])
    with pytest.raises(WinnowError, match="targets with vectors of .* values, expected"):
        run(tmp_path / "c", vectors, [("x", random(3, 8, 0)), ("y", random(3, 5, 0))], norms=[2])


def test_golden_norms(tmp_path):
    two, largest, _ = run(tmp_path, random(12, 8, 11), [("x", random(9, 8, 12))])
    found = [[round(value, 4) for value in column] for column in (two, largest)]
    check_golden("normsim", {"version": normsim.NormSim.version, "normsim_2": found[0], "normsim_inf": found[1]})
