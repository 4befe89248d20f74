"""D2 pruning against its published rule in plain loops, and the same whatever the order, the shards and the sizes."""

from __future__ import annotations

import math

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.errors import ConfigError, WinnowError
from stages import build_stage, nearest_neighbours, unit_vectors
from stages.columns.d2 import D2
from tests.duplicates_fixture import fit_in_two, run_stage
from tests.embedding_fixture import near_copies, vector_column, vector_pool
from tests.pool_fixture import write_columns


def written(folder, images, texts, scores, ids, shards=3):
    """(pool path, columns)."""
    path, columns = vector_pool(folder, images, ids, shards)
    columns = {"image": columns["vector"], **write_columns(folder, path, {"text": vector_column(texts)})}
    return path, columns | write_columns(folder, path, {"clip_score": pa.array(scores, type=pa.float32())})


def run(folder, images, texts, scores, ids, shards=3, embeddings=("image", "text"), **parameters):
    """(d2_score of each row, facts)."""
    path, columns = written(folder, images, texts, scores, ids, shards)
    _, rows, facts = run_stage(path, folder / "out", D2(embeddings=embeddings, **parameters), columns)
    return [row["d2_score"] for row in rows], facts


def graph(images, texts, scores, ids, k, shift=0.115):
    """(neighbours [(j, distance)] of each row, s): from all squared distances of the vectors at length 1."""
    points = []
    for image, text in zip(images, texts, strict=True):
        parts = [np.asarray(part, np.float64) for part in (image, text) if part is not None]
        points.append(np.concatenate([part / math.sqrt((part * part).sum()) for part in parts]))
    near = []
    for i in range(len(points)):
        distances = [float(((points[i] - other) ** 2).sum()) for other in points]
        others = sorted((round(distances[j], 7), ids[j], j) for j in range(len(points)) if j != i)
        near.append([(j, distances[j]) for _, _, j in others[:k]])
    return near, [max(float(np.float32(score)) + shift, 1e-7) for score in scores]


def published(images, texts, scores, ids, k, gamma_forward=1.0, gamma_reverse=1.0, shift=0.115, order=None):
    """The order of picks by an argmax for each; with `order`, that one, checked pick for pick to be an argmax as well.

    Values that differ by rounding alone are equal, which the argmax decides by uid and an order may decide as it likes.
    """
    near, base = graph(images, texts, scores, ids, k, shift)
    values = [base[i] + sum(math.exp(-gamma_forward * d) * base[j] for j, d in near[i]) for i in range(len(base))]
    left, picks = set(range(len(base))), []
    while left:
        top = min(left, key=lambda i: (-round(values[i], 6), ids[i]))
        if order is not None:
            assert values[order[len(picks)]] >= values[top] - 1e-6
            top = order[len(picks)]
        picks.append(top)
        left.remove(top)
        for j, distance in near[top]:
            values[j] -= values[top] * math.exp(-gamma_reverse * distance)
    return picks


def order_of(found):
    return sorted((at for at in range(len(found)) if found[at] is not None), key=lambda at: -found[at])


def pool_of(num, seed, num_dimensions=12):
    rng = np.random.default_rng(seed)
    images, _ = near_copies(num, num_dimensions, seed=seed)
    texts, _ = near_copies(num, num_dimensions, seed=seed + 100)
    scores = rng.normal(0.2, 0.1, num).astype(np.float32)
    scores[::7] = -0.5  # below the least one after the shift
    return images, texts, scores, [f"{number * 7919 % 100_003:032x}" for number in range(num)]


@pytest.mark.parametrize(("k", "gammas"), [(1, (1.0, 1.0)), (5, (1.0, 0.1)), (12, (0.5, 2.0)), (3, (0.0, 0.0))])
def test_picks_are_those_of_the_published_rule(k, gammas, tmp_path):
    images, texts, scores, ids = pool_of(120, seed=k)
    found, facts = run(
        tmp_path, images, texts, scores, ids, neighbours=k, gamma_forward=gammas[0], gamma_reverse=gammas[1]
    )
    order = order_of(found)
    assert order == published(images, texts, scores, ids, k, *gammas, order=order)
    firsts = published(images, texts, scores, ids, k, *gammas)[:60]
    assert order[:60] == firsts  # those that differ by more than rounding
    assert sorted(found) == list(range(120))
    assert (facts["points"], facts["clusters"], facts["sampled"]) == (120, 1, 0)


def test_one_column_and_another_shift(tmp_path):
    images, texts, scores, ids = pool_of(60, seed=3)
    found, _ = run(tmp_path, images, texts, scores, ids, embeddings=("image",), shift=0.5)
    order = order_of(found)
    assert order == published(images, [None] * 60, scores, ids, 1, shift=0.5, order=order)


def test_duplicates_and_ties_go_by_uid(tmp_path):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(12, 8)).astype(np.float16)
    texts = rng.normal(size=(12, 8)).astype(np.float16)
    for at in (4, 7, 9):  # four equal points: each has the lowest uid of the others as its neighbour
        images[at], texts[at] = images[1], texts[1]
    scores = np.full(12, 0.3, np.float32)
    ids = [f"{99 - number:032x}" for number in range(12)]
    for k in (1, 2, 11, 40):  # more neighbours than rows
        found, _ = run(tmp_path / str(k), images, texts, scores, ids, neighbours=k)
        assert order_of(found) == published(images, texts, scores, ids, k)
    found, _ = run(tmp_path / "one", images, texts, scores, ids)
    assert order_of(found)[0] == 9  # the lowest uid of the four, which have the largest value
    equal = np.ones((5, 3), np.float16)
    found, _ = run(tmp_path / "equal", equal, equal, scores[:5], ids[:5])
    assert order_of(found) == published(equal, equal, scores[:5], ids[:5], 1)


def test_rows_without_a_value_are_null_and_nobodys_neighbours(tmp_path):
    images, texts, scores, ids = pool_of(30, seed=5)
    images, texts, scores = list(images), list(texts), list(scores)
    images[3] = None  # a failed row
    images[4] = np.zeros(12, np.float16)
    texts[8] = None
    scores[11] = None
    scores[12] = math.nan
    scores[13] = math.inf
    found, facts = run(tmp_path, images, texts, scores, ids, neighbours=2)
    without = {3, 4, 8, 11, 12, 13}
    assert {at for at, value in enumerate(found) if value is None} == without
    kept = [at for at in range(30) if at not in without]
    order = [kept.index(at) for at in order_of(found)]
    assert order == published(*[[values[at] for at in kept] for values in (images, texts, scores, ids)], 2, order=order)
    assert facts["points"] == 24


def test_one_row_and_none(tmp_path):
    found, _ = run(tmp_path / "one", [np.ones(3)], [np.ones(3)], [0.3], ["0" * 32], shards=1)
    assert found == [0]
    found, facts = run(tmp_path / "none", [None, np.zeros(3)], [None, None], [None, 0.1], ["0" * 32, "1" * 32])
    assert found == [None, None]
    assert facts["points"] == 0


@pytest.mark.parametrize("exact_rows", [100_000, 0])
def test_order_shards_tiles_and_partitions_change_nothing(exact_rows, tmp_path, monkeypatch):
    images, texts, scores, ids = pool_of(200, seed=6)
    images[17], texts[17], scores[17] = images[150], texts[150], scores[150]
    monkeypatch.setattr(nearest_neighbours, "EXACT_ROWS", exact_rows)
    first, facts = run(tmp_path / "a", images, texts, scores, ids, neighbours=3)
    assert (facts["clusters"] > 1) == (exact_rows == 0)
    order = np.random.default_rng(0).permutation(200)
    for name, value in {
        "PIECE_ROWS": 50,
        "SHARE_ROWS": 70,
        "TILE_ROWS": 13,
        "TILE_MEMBERS": 6,
        "MOST_FOUND": 100,
    }.items():
        monkeypatch.setattr(nearest_neighbours, name, value)
    if exact_rows:
        monkeypatch.setattr(nearest_neighbours, "PARTITION_ROWS", 1)
    monkeypatch.setattr(unit_vectors, "CACHED_ROWS", 3)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (120,))
    again, other = run(
        tmp_path / "b", images[order], texts[order], scores[order], [ids[at] for at in order], shards=8, neighbours=3
    )
    assert [first[at] for at in order] == again
    assert {**facts, "shards": None} == {**other, "shards": None}


def test_partitions_change_nothing_that_is_found(tmp_path, monkeypatch):
    images, texts, scores, ids = pool_of(160, seed=7)
    monkeypatch.setattr(nearest_neighbours, "EXACT_ROWS", 0)
    first, facts = run(tmp_path / "a", images, texts, scores, ids, neighbours=3)
    monkeypatch.setattr(nearest_neighbours, "PARTITION_ROWS", 40)
    again, _ = run(tmp_path / "b", images, texts, scores, ids, neighbours=3)
    assert first == again
    assert facts["sampled"] == 160
    everywhere, _ = run(tmp_path / "c", images, texts, scores, ids, neighbours=3, probes=1000)
    monkeypatch.setattr(nearest_neighbours, "EXACT_ROWS", 160)
    exact, _ = run(tmp_path / "d", images, texts, scores, ids, neighbours=3)
    assert everywhere == exact != first  # a row that looks into all clusters misses nothing


def test_most_nearest_neighbours_are_found_in_few_clusters():
    rng = np.random.default_rng(1)
    directions = rng.normal(size=(20, 32))
    points = rng.normal(size=(1500, 20)) @ directions + 0.5 * rng.normal(size=(1500, 32))
    vectors = points.astype(np.float16)
    rows = unit_vectors.unit(vectors)
    centres = rows[:77]
    clusters = nearest_neighbours._nearest_clusters(vectors, 1, centres, 4)
    cosines = rows @ centres.T
    assert (np.sort(-cosines, axis=1)[:, :4] == -np.take_along_axis(cosines, clusters, axis=1)).all()
    pairs = rows @ rows.T
    np.fill_diagonal(pairs, -2)
    found = (clusters[pairs.argmax(axis=1), :1] == clusters).any(axis=1)
    assert 0.6 < found.mean() < 1


def test_a_resumed_fit_gives_the_same(tmp_path, monkeypatch):
    images, texts, scores, ids = pool_of(80, seed=8)
    monkeypatch.setattr(nearest_neighbours, "EXACT_ROWS", 0)
    first, _ = run(tmp_path / "a", images, texts, scores, ids)
    path, columns = written(tmp_path / "b", images, texts, scores, ids)
    stage = D2(embeddings=("image", "text"))
    # the sample, the exchanged vectors and their matches were dropped
    assert fit_in_two(path, tmp_path / "out", stage, columns, "found") == ["found"]
    _, rows, _ = run_stage(path, tmp_path / "out", stage, columns)
    assert [row["d2_score"] for row in rows] == first


def test_what_is_no_column_of_vectors_or_numbers_is_named(tmp_path):
    images, texts, scores, ids = pool_of(4, seed=9)
    with pytest.raises(WinnowError, match="vectors of lengths image 12, text 5, expected one length"):
        run(tmp_path / "a", images, texts[:, :5], scores, ids)
    with pytest.raises(WinnowError, match="column caption: string, expected numbers"):
        run(tmp_path / "b", images, texts, scores, ids, score="caption")
    with pytest.raises(ConfigError, match=r"embeddings = image of type string, expected float16\[\]"):
        D2(embeddings=("image",)).check_needs({"image": "string", "clip_score": "float32"}, {})
    with pytest.raises(ConfigError, match="score = clip_score of type bool, expected float32 or float64 or int32"):
        D2(embeddings=("image",)).check_needs({"image": "float16[]", "clip_score": "bool"}, {})
    with pytest.raises(ConfigError, match=r"d2.embeddings = \['clip_image', 'clip_image'\], expected each column once"):
        build_stage("d2", {"embeddings": ["clip_image", "clip_image"]}, "stages.0")
