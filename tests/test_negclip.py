"""negCLIPLoss against its formula in float64, given the same batches; its batches; the same in any order."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.errors import ConfigError, WinnowError
from stages import build_stage
from stages.columns import negclip
from stages.columns.negclip import NegClip, batch_scores
from stages.selection import uids
from tests.duplicates_fixture import fit_in_two, run_stage
from tests.embedding_fixture import vector_column, vector_pool
from tests.pool_fixture import random_uids, write_columns


def pairs(num, dimensions, seed=0, common=0.3):
    """([num, d], [num, d]) float16 of any length: images, and captions that are about as near to them as CLIP's."""
    rng = np.random.default_rng(seed)
    image = rng.normal(size=(num, dimensions)) + common * dimensions**0.5 * rng.normal(size=dimensions)
    text = 0.4 * image + rng.normal(size=(num, dimensions))
    return image.astype(np.float16), text.astype(np.float16)


def run(folder, image, text, ids, shards=3, **parameters):
    """(scores, facts)."""
    path, columns = vector_pool(folder, image, ids, shards)
    columns |= write_columns(folder / "root", path, {"text": vector_column(text)})
    stage = build_stage("negclip", {"image": "vector", "text": "text", **parameters}, "negclip")
    _, rows, facts = run_stage(path, folder / "out", stage, columns)
    return [row["negclip_score"] for row in rows], facts


def deal(ids, batch, rounds, seed):
    """Per round a list of batches: the places of rows, by the hashes of their uids, in equal shares."""
    numbers = uids.parse(pa.array(ids), "")
    num_batches = math.ceil(len(ids) / batch)
    found = []
    for number in range(rounds):
        hashes = uids.hash64(numbers, seed, negclip.DEAL_STREAM, np.full(len(ids), number, np.uint64))
        order = sorted(range(len(ids)), key=lambda at: (int(hashes[at]), ids[at]))
        bounds = [place * len(ids) // num_batches for place in range(num_batches + 1)]
        found.append([order[start:end] for start, end in itertools.pairwise(bounds)])
    return found


def formula(image, text, batches, temperature, batch):
    """[n] float64: the published formula with loops, and the share of a batch that is smaller than a full one."""
    image, text = (rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (np.float64(image), np.float64(text)))
    full = min(batch, len(image))
    total = np.zeros(len(image))
    for own in (own for one in batches for own in one):
        for i in own:
            by_image = math.log(math.fsum(math.exp(image[i] @ text[j] / temperature) for j in own))
            by_text = math.log(math.fsum(math.exp(image[j] @ text[i] / temperature) for j in own))
            total[i] += image[i] @ text[i] - temperature / 2 * (by_image + by_text)
            total[i] -= temperature * math.log(full / len(own))
    return total / len(batches)


@pytest.mark.parametrize(
    ("num", "batch", "rounds", "temperature"),
    [(90, 20, 3, 0.01), (90, 20, 2, 0.07), (90, 1000, 2, 0.01), (64, 64, 1, 0.2), (31, 1, 2, 0.01), (65, 64, 1, 0.05)],
)
def test_scores_are_those_of_the_formula_in_the_same_batches(num, batch, rounds, temperature, tmp_path):
    image, text = pairs(num, 48, seed=num)
    ids = random_uids(np.random.default_rng(num), num)
    found, facts = run(tmp_path, image, text, ids, batch=batch, rounds=rounds, temperature=temperature, seed=5)
    expected = formula(image, text, deal(ids, batch, rounds, 5), temperature, batch)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
    assert (facts["rows_with_vectors"], facts["batches"]) == (num, math.ceil(num / batch))


def test_batches_are_random_equal_in_size_and_others_each_round():
    ids = random_uids(np.random.default_rng(0), 1003)
    rounds = deal(ids, 100, 3, 0)
    assert {len(own) for one in rounds for own in one} == {91, 92}
    assert len({frozenset(own) for one in rounds for own in one}) == 33
    assert deal(ids, 100, 1, 0) != deal(ids, 100, 1, 1)
    together = [sum(len(set(own) & set(other)) == 0 for own in rounds[0] for other in rounds[1])]
    assert together[0] < 10  # batches of two rounds have some 8 rows in common


def test_smaller_batches_score_as_full_ones_do():
    image, text = pairs(4000, 32, seed=1)
    whole = batch_scores(image, text, 0.2)[:500]
    half = batch_scores(image[:2000], text[:2000], 0.2)[:500]
    assert (half - whole).mean() == pytest.approx(0.2 * math.log(2), rel=0.02)


def test_nothing_overflows_and_identical_rows_are_equal(tmp_path):
    one = np.ones((6, 8), np.float16) * 500
    found, _ = run(tmp_path / "same", one, one, [f"{number:032x}" for number in range(6)], rounds=2)
    assert found == pytest.approx([-0.01 * math.log(6)] * 6, abs=1e-7)  # cosines of 1: e^100 is no float32
    opposite, _ = run(tmp_path / "opposite", one, -one, [f"{number:032x}" for number in range(6)], rounds=1)
    assert opposite == pytest.approx([-0.01 * math.log(6)] * 6, abs=1e-7)
    image = np.concatenate([np.eye(8)[:4], -np.eye(8)[:4]]).astype(np.float16)
    ids = [f"{number:032x}" for number in range(8)]
    cold, _ = run(tmp_path / "cold", image, image, ids, rounds=1, temperature=0.001)
    assert cold == pytest.approx([0.0] * 8, abs=1e-7)
    lonely, facts = run(tmp_path / "lonely", image[:1], image[:1] * 2, ids[:1])
    assert (lonely, facts["batches"]) == ([0.0], 1)


def test_rows_without_both_vectors_are_null_and_in_no_batch(tmp_path):
    image, text = (list(rows) for rows in pairs(9, 16))
    ids = [f"{number:032x}" for number in range(9)]
    image[1] = None  # a failed row
    image[2] = np.zeros(16, np.float16)
    text[4] = None
    text[5] = np.full(16, np.nan)
    image[6] = np.full(16, np.inf)
    found, facts = run(tmp_path / "some", image, text, ids, shards=4, batch=3, rounds=2)
    left = [0, 3, 7, 8]
    assert [at for at in range(9) if found[at] is not None] == left
    alone, _ = run(
        tmp_path / "alone",
        *([rows[at] for at in left] for rows in (image, text)),
        [ids[at] for at in left],
        batch=3,
        rounds=2,
    )
    assert [found[at] for at in left] == alone
    assert (facts["rows_with_vectors"], facts["batches"]) == (4, 2)
    none, facts = run(tmp_path / "none", [None, np.zeros(4)], [np.ones(4), np.ones(4)], ids[:2])
    assert (none, facts["rows_with_vectors"], facts["batches"]) == ([None, None], 0, 0)


def test_order_shards_pieces_and_partitions_change_nothing(tmp_path, monkeypatch):
    image, text = pairs(200, 24, seed=2)
    ids = random_uids(np.random.default_rng(2), 200)
    first, _ = run(tmp_path / "a", image, text, ids, batch=30, rounds=3)
    order = np.random.default_rng(0).permutation(200)
    monkeypatch.setattr(negclip, "PIECE_ROWS", 40)
    monkeypatch.setattr(negclip, "TASK_ROWS", 45)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (120,))
    again, _ = run(tmp_path / "b", image[order], text[order], [ids[at] for at in order], 8, batch=30, rounds=3)
    assert [first[at] for at in order] == again
    monkeypatch.setattr(negclip, "TILE_ROWS", {"cpu": 7})
    tiled, _ = run(tmp_path / "c", image, text, ids, batch=30, rounds=3)
    np.testing.assert_allclose(tiled, first, rtol=0, atol=2e-6)


def test_a_killed_fit_goes_on_from_the_rounds_that_are_done(tmp_path):
    image, text = pairs(60, 16)
    ids = random_uids(np.random.default_rng(3), 60)
    parameters = {"batch": 20, "rounds": 3}
    whole, _ = run(tmp_path / "whole", image, text, ids, **parameters)
    path, columns = vector_pool(tmp_path / "cut", image, ids, 3)
    columns |= write_columns(tmp_path / "cut" / "root", path, {"text": vector_column(text)})
    stage = NegClip("vector", "text", **parameters)
    done = fit_in_two(path, tmp_path / "cut" / "out", stage, columns, "scored_001")
    assert done == ["scored_001", "dealt_002", "scored_002", "found"]
    _, rows, _ = run_stage(path, tmp_path / "cut" / "out", stage, columns)
    assert [row["negclip_score"] for row in rows] == whole


def test_wrong_columns_and_parameters_are_named(tmp_path):
    with pytest.raises(WinnowError, match="columns vector and text: vectors of 3 and 4 values"):
        run(tmp_path, [np.ones(3)], [np.ones(4)], ["0" * 32])
    with pytest.raises(ConfigError, match="negclip.text = clip_image, expected another column"):
        build_stage("negclip", {"text": "clip_image"}, "negclip")
    with pytest.raises(ConfigError, match="negclip.temperature = 0"):
        build_stage("negclip", {"temperature": 0}, "negclip")
