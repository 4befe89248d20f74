"""The stage clusters against DataComp's image-based rule in plain float64, with given and with trained centroids."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.core import pool
from pipeline.core.errors import ConfigError, WinnowError
from stages import kmeans
from stages.columns import clusters
from stages.columns.clusters import Clusters
from stages.pool_blocks import blocks
from tests.duplicates_fixture import run_stage
from tests.embedding_fixture import near_copies, vector_pool, vector_references
from tests.passes_fixture import passes_here
from tests.pool_fixture import scattered_uids


def run(folder, vectors, names, shards=2, references=None, **parameters):
    """({column: values in the rows' order}, facts of the fit)."""
    path, columns = vector_pool(folder, vectors, names, shards)
    others = vector_references(folder, references or {})
    stage = Clusters(embedding="vector", against=tuple(others), **parameters)
    _, rows, facts = run_stage(path, folder / "out", stage, columns, others)
    return {name: [row[name] for row in rows] for name in Clusters.adds}, facts


def datacomp_rule(vectors, centroids, targets):
    """(cluster of each vector, whether DataComp keeps it): both by plain loops in float64."""

    def nearest(vector):
        best, found = -np.inf, -1
        for number, centroid in enumerate(centroids):
            product = sum(float(a) * float(b) for a, b in zip(vector, centroid, strict=True))
            if product > best:
                best, found = product, number
        return found

    hit = {nearest(target) for target in targets}
    cluster = [nearest(vector) for vector in vectors]
    return cluster, [number in hit for number in cluster]


def test_only_rows_that_count_decide_how_many_clusters_there_are(tmp_path):
    vectors = [*near_copies(49, 8, 0)[0], *[None] * 300]  # failed rows; those outside `within` are as these
    found, facts = run(tmp_path, vectors, scattered_uids(349), shards=7, sample=1.0)
    assert facts["training"]["sampled"] == 49
    assert len(set(found["cluster_id"]) - {None}) == 7


def test_given_centroids_and_targets_choose_what_datacomp_chooses(tmp_path):
    rng = np.random.default_rng(0)
    for seed, num_dimensions in enumerate((2, 5, 16)):
        folder = tmp_path / str(seed)
        folder.mkdir()
        vectors, _ = near_copies(120, num_dimensions, seed)
        centroids = (rng.normal(size=(30, num_dimensions)) * rng.uniform(0.2, 1.5, size=(30, 1))).astype(np.float32)
        centroids[11] = centroids[3]  # a tie, which goes to the lower number
        targets = rng.normal(size=(9, num_dimensions)).astype(np.float32)
        torch.save(centroids, folder / "small_centroids_l14.pt")
        torch.save({"image_features": torch.from_numpy(targets[:4])}, folder / "in1k_0.pt")
        torch.save({"image_features": targets[4:]}, folder / "in1k_1.pt")
        files = (str(folder / "in1k_0.pt"), str(folder / "in1k_1.pt"))
        found, facts = run(
            folder,
            vectors,
            scattered_uids(120),
            centroids=str(folder / "small_centroids_l14.pt"),
            target_features=files,
        )
        cluster, kept = datacomp_rule(vectors, centroids, targets)
        assert found["cluster_id"] == cluster
        assert [number > 0 for number in found["cluster_targets"]] == kept
        assert 0 < sum(kept) < 120
        assert found["cluster_rows"] == [cluster.count(number) for number in cluster]
        products = [vector.astype(float) @ centroids[number] for vector, number in zip(vectors, cluster, strict=True)]
        assert found["cluster_similarity"] == pytest.approx(products, rel=1e-6)
        assert (facts["clusters"], facts["targets"], facts["rows_with_targets"]) == (30, 9, sum(kept))
        assert facts["training"] == {}
        assert 11 not in cluster


@pytest.mark.parametrize("metric", ["l2", "cosine"])
def test_trained_centroids_are_those_of_kmeans_and_references_are_targets(metric, tmp_path):
    vectors, _ = near_copies(200, 12, seed=3)
    vectors *= np.random.default_rng(1).uniform(0.3, 3, size=(200, 1)).astype(np.float16)
    reference = list(np.random.default_rng(2).normal(size=(7, 12)).astype(np.float16))
    reference[5] = None
    parameters = {"clusters": 15, "metric": metric, "iterations": 4, "seed": 3}
    found, facts = run(tmp_path, vectors, scattered_uids(200), references={"trusted": reference}, **parameters)
    path, columns = vector_pool(tmp_path / "again", vectors, scattered_uids(200), 1)
    passes = passes_here(tmp_path / "passes")
    whole = blocks(path, pool.load_shards(path), columns)
    centroids = kmeans.read_centroids(kmeans.KMeans("vector", 15, 3, 4, metric).centroids(whole, passes))
    rows, targets = vectors.astype(float), [vector for vector in reference if vector is not None]
    if metric == "cosine":
        rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    cluster, kept = datacomp_rule(rows, centroids, targets)
    assert found["cluster_id"] == cluster
    assert [number > 0 for number in found["cluster_targets"]] == kept
    assert facts["training"] == {"seed": 3, "sampled": 200, "iterations": 4, "empty": 0}
    assert facts["targets"] == 6
    assert sum(dict(zip(cluster, found["cluster_targets"], strict=True)).values()) <= 6


def test_order_and_shards_change_nothing(tmp_path, monkeypatch):
    vectors, _ = near_copies(150, 8, seed=5)
    reference = np.random.default_rng(2).normal(size=(20, 8)).astype(np.float16)
    first, facts = run(
        tmp_path / "a", vectors, scattered_uids(150), references={"r": reference}, clusters=11, iterations=5
    )
    order = np.random.default_rng(0).permutation(150)
    monkeypatch.setattr(clusters, "PIECE_ROWS", 30)
    monkeypatch.setattr(kmeans, "PART_ROWS", 20)
    moved = [scattered_uids(150)[at] for at in order]
    again, other = run(
        tmp_path / "b", vectors[order], moved, 7, references={"r": reference[::-1]}, clusters=11, iterations=5
    )
    for name in first:
        assert [first[name][at] for at in order] == again[name]
    assert {**facts, "shards": None} == {**other, "shards": None}


def test_without_targets_and_without_vectors_columns_are_null(tmp_path):
    vectors = list(np.random.default_rng(0).normal(size=(6, 4)).astype(np.float16))
    vectors[1], vectors[4] = None, np.zeros(4, np.float16)
    found, facts = run(tmp_path / "a", vectors, scattered_uids(6), clusters=2)
    assert found["cluster_targets"] == [None] * 6
    for name in ("cluster_id", "cluster_similarity", "cluster_rows"):
        assert [value is None for value in found[name]] == [at in (1, 4) for at in range(6)]
    assert facts["rows_with_vectors"] == 4
    assert "targets" not in facts
    found, facts = run(tmp_path / "b", [None, np.zeros(4)], scattered_uids(2), references={"r": vectors})
    assert found == {name: [None, None] for name in Clusters.adds}
    assert facts["clusters"] == 0
    found, _ = run(tmp_path / "c", vectors[:1], scattered_uids(1))
    assert (found["cluster_id"], found["cluster_rows"]) == ([0], [1])


def test_what_does_not_fit_is_named(tmp_path):
    vectors = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float16)
    np.save(tmp_path / "five.npy", np.ones((3, 5), np.float32))
    with pytest.raises(WinnowError, match="vectors of 4 values and centroids of 5"):
        run(tmp_path / "a", vectors, scattered_uids(6), centroids=str(tmp_path / "five.npy"))
    with pytest.raises(WinnowError, match=r"five.npy: vectors of 5 values, expected 4 as centroids have"):
        run(tmp_path / "b", vectors, scattered_uids(6), target_features=(str(tmp_path / "five.npy"),))
    np.save(tmp_path / "zero.npy", np.array([[1, 0, 0, 0], [0, 0, 0, 0]], np.float32))
    with pytest.raises(WinnowError, match=r"zero.npy: a centroid of length 0, expected none with metric: cosine"):
        run(tmp_path / "d", vectors, scattered_uids(6), centroids=str(tmp_path / "zero.npy"), metric="cosine")
    found, _ = run(tmp_path / "e", vectors, scattered_uids(6), centroids=str(tmp_path / "zero.npy"))
    assert found["cluster_id"] == [0 if vector[0] >= 0 else 1 for vector in vectors]
    with pytest.raises(WinnowError, match="no target has a vector"):
        run(tmp_path / "c", vectors, scattered_uids(6), references={"r": [np.zeros(4), None]})
    for parameters, message in (
        ({"clusters": 5}, "clusters.clusters = 5, expected nothing, as centroids are given"),
        ({"sample": 0.5}, "clusters.sample = 0.5, expected nothing"),
        ({"iterations": 3}, "clusters.iterations = 3, expected nothing"),
    ):
        with pytest.raises(ConfigError, match=message):
            Clusters(centroids="a.npy", **parameters)


def test_missing_files_make_the_stage_unavailable(tmp_path):
    np.save(tmp_path / "a.npy", np.ones((3, 5), np.float32))
    there, missing = str(tmp_path / "a.npy"), str(tmp_path / "b.npy")
    assert Clusters(centroids=there, target_features=(there,)).unavailable() == ""
    assert Clusters().unavailable() == ""
    text = Clusters(target_features=(there, missing)).unavailable()
    assert text.startswith(f"target_features.1 = {missing} is not there: DataComp's are in1k_clip_vit_l14_{{0..4}}.pt")
    assert "centroids_l14.pt" in Clusters(centroids=missing).unavailable()
