"""DataComp's seven baselines as configs/datacomp_*.yaml writes them, uid-identical to their source's rules.

The reference is written from DataComp's baselines/apply_filter.py: file by file, on the captions, sizes and scores of the
metadata; its threshold is an element of the sorted scores, and its uids are sorted as dtype u8,u8. What models decide
(the language, CLD3's language, the nearest centroid) is given to both sides.
"""

from __future__ import annotations

import importlib.util
import math
import pathlib

import numpy as np
import pyarrow as pa
import pytest

from pipeline import plan as planning
from pipeline.core import config
from stages import build_stage, stage_class
from stages.column_files import POOL_TYPES
from stages.selection.choose import select
from stages.selection.strategies import parse_strategies
from tests.duplicates_fixture import run_stage
from tests.engine_fixture import run_here
from tests.pool_fixture import random_uids, write_columns, write_pool
from tests.test_metadata_run import metadata
from tests.test_wordnet import synsets
from tests.wordnet_fixture import write_wordnet

CONFIGS = pathlib.Path(__file__).parent.parent / "configs"
SCALES = ("small", "medium", "large", "xlarge")
BASELINES = (
    "no_filter",
    "basic",
    "text_based",
    "image_based",
    "clip_score",
    "clip_score_b32",
    "image_based_and_clip_score",
    "laion2b",
)
TARGETS = {2, 3, 5, 8}  # the clusters that hold ImageNet's images
CLASSES = "n02084071\nn02512053\nn10787470\nn00381097\n"
FRACTIONS = (0.01, 0.29, 0.3, 0.45, 0.5, 0.999)
THRESHOLDS = (0.2, 0.25, 0.28, 0.281, 0.3, 0.7)
WORDS = ("a", "dog", "dogs", "womens", "fish,", "redder", "red", "IMG_0042.jpg", "x", "ö", "\u2605", "kisses")
BLANKS = (" ", " ", " ", "  ", "\n", "\t", "\u00a0", "\u2003", "\x1f")
SIDES_PX = (0, 1, 199, 200, 201, 599, 600, 601, 1024, 3000)


def strategies_of(name):
    """(the config's strategies, {column: type})"""
    found = config.load(str(CONFIGS / name))
    types = {**POOL_TYPES, **found.pool.source["carry"]}
    for entry in found.stages:
        types |= stage_class(entry if isinstance(entry, str) else entry["name"]).adds
    return found.strategies, types


def random_row(rng, uid):
    """A row of the metadata, and what the models say of it. Scores have few values, so that ties are everywhere."""

    def score():
        return [math.nan, None, round(float(rng.normal(0.25, 0.04)), 2)][min(2, int(rng.integers(12)))]

    words = rng.integers(0, 6)
    text = "".join(str(rng.choice(WORDS)) + str(rng.choice(BLANKS)) for _ in range(words))
    return {
        "uid": uid,
        "text": text if rng.random() < 0.5 else text.strip(),
        "original_width": None if rng.random() < 0.03 else int(rng.choice(SIDES_PX)),
        "original_height": int(rng.choice(SIDES_PX)),
        "clip_b32_similarity_score": score(),
        "clip_l14_similarity_score": score(),
        "language": str(rng.choice(["en", "en", "de"])),
        "cld3_language": str(rng.choice(["en", "en", "ja"])),
        "cluster": int(rng.integers(10)),
    }


class World:
    """A pool with its columns, and DataComp's metadata of the same rows: a list of files, each a list of rows."""

    def __init__(self, root, files):
        self.files = files
        rows = [row for file in files for row in file]
        self.root, self.runs = root, 0
        self.pool_path = write_pool(root, [[self._entry(row) for row in file] for file in files])
        (root / "ids.txt").write_text(CLASSES)
        self.wordnet = write_wordnet(root / "wordnet")
        words = {"wordnet": self.wordnet, "ids": str(root / "ids.txt")}
        self.columns = {}
        for name, parameters in {"caption_stats": {}, "image_stats": {}, "imagenet_words": words}.items():
            stage = build_stage(name, parameters, name)
            self.columns, _, _ = run_stage(self.pool_path, root / name, stage, self.columns)
        for name in ("clip_b32_similarity_score", "clip_l14_similarity_score"):
            values = pa.array([row[name] for row in rows], pa.float32(), from_pandas=False)
            self.columns |= write_columns(root, self.pool_path, {name: values})
        for name in ("language", "cld3_language"):
            values = pa.array([row[name] for row in rows], pa.string())
            self.columns |= write_columns(root, self.pool_path, {name: values})
        # Within caption_filter, as the config says: the others have no cluster.
        targets = [
            int(row["cluster"] in TARGETS) * 7 if passes_caption_filter(row) and row.get("ok", True) else None
            for row in rows
        ]
        self.columns |= write_columns(root, self.pool_path, {"cluster_targets": pa.array(targets, pa.int64())})

    @staticmethod
    def _entry(row):
        return {
            "image": None,
            "ok": row.get("ok", True),
            "error": None,
            "uid": row["uid"],
            "caption": row["text"],
            "original_width_px": row["original_width"],
            "original_height_px": row["original_height"],
        }

    def ours(self, strategies, name):
        """The bytes of the uid file."""
        self.runs += 1
        out = f"{self.root}/selection-{self.runs}"
        select(self.pool_path, self.columns, strategies, name, out)
        return np.load(f"{out}/uids.npy")

    def theirs(self, name):
        """What DataComp's command writes for the baseline; None where it fails."""
        files = [[row for row in file if row.get("ok", True)] for file in self.files]
        return reference(files, name, self.wordnet)


def passes_caption_filter(row):
    """DataComp's caption_filter, with fastText's own tokens."""
    from fasttext import tokenize

    return row["language"] == "en" and len(tokenize(row["text"])) > 1 and len(row["text"]) > 5


def reference(files, name, wordnet):
    """[n] of dtype u8,u8, sorted; None where DataComp's code raises."""
    arch = "b32" if "b32" in name or name == "laion2b" else "l14"
    key = f"clip_{arch}_similarity_score"
    threshold = {"laion2b": 0.28, "clip_score_b32": 0.281}.get(name)
    fraction = {"clip_score": 0.3, "image_based_and_clip_score": 0.3}.get(name)
    if "_threshold_" in name:
        threshold = float(name.rpartition("_")[2])
    if "_fraction_" in name:
        fraction = float(name.rpartition("_")[2])
    if fraction is not None:
        scores = np.array([row[key] for file in files for row in file], np.float32)  # None gives NaN, as pandas has it
        n = int(len(scores) * fraction)
        if n >= len(scores):
            return None
        threshold = -np.sort(-scores)[n]
    if not files:
        return None
    kept = []
    for file in files:
        frame = file
        if threshold is not None:
            column = np.array([row[key] for row in frame], np.float32)
            frame = [row for row, good in zip(frame, column >= np.float32(threshold), strict=True) if good]
        if name == "laion2b":
            frame = [row for row in frame if row["cld3_language"] == "en"]
        elif name == "basic":
            frame = [row for row in frame if passes_basic(row)]
        elif name == "text_based":
            frame = [row for row in frame if row["language"] == "en" and has_entity(row["text"], wordnet)]
        elif name.startswith("image_based"):
            frame = [row for row in frame if passes_caption_filter(row) and row["cluster"] in TARGETS]
        uids = [row["uid"] for row in frame]
        kept.append(np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8")))
    result = np.concatenate(kept)
    result.sort()
    return result


def passes_basic(row):
    """DataComp's basic_filter; a side that is not known fails every comparison, as NaN does."""
    sides = (row["original_width"], row["original_height"])
    if None in sides or min(sides) == 0:
        return False
    is_image_good = min(sides) >= 200 and max(sides) / min(sides) <= 3.0
    return row["language"] == "en" and len(row["text"].split()) > 2 and len(row["text"]) > 5 and is_image_good


def has_entity(text, wordnet):
    """DataComp's does_contain_text_entity."""
    entities = [int(line[1:]) for line in CLASSES.split()]
    for word in text.split():
        found = synsets(wordnet, word)
        if len(found) == 0:
            continue
        if found[0][1] in entities:
            return True
    return False


def check(world, minimum=0):
    """None; every baseline, as the config writes it, keeps the uids that DataComp's rule keeps."""
    mapping, types = strategies_of("datacomp_small.yaml")
    cuts = {
        f"l14_fraction_{value}": {"top": {"column": "clip_l14_similarity_score", "fraction": value, "cut": "datacomp"}}
        for value in FRACTIONS
    } | {
        f"b32_threshold_{value}": {"threshold": {"column": "clip_b32_similarity_score", "at_least": value}}
        for value in THRESHOLDS
    }
    strategies = parse_strategies(mapping | cuts, "strategies", types)
    sizes = {}
    for name in (*BASELINES, *cuts):
        expected = world.theirs(name)
        found = world.ours(strategies, name)
        if expected is not None:
            assert found.dtype == expected.dtype
            assert found.tolist() == expected.tolist(), name
        sizes[name] = len(found)
    for name in BASELINES:
        assert sizes[name] >= minimum, f"{name} keeps {sizes[name]} rows: too few to be a test"
    return sizes


@pytest.mark.parametrize("seed", range(4))
def test_random_pools(tmp_path, seed):
    rng = np.random.default_rng(seed)
    sizes = [int(size) for size in rng.integers(2, 200, size=3)] + [150, 1]
    uids = iter(random_uids(rng, sum(sizes)))
    world = World(tmp_path, [[random_row(rng, next(uids)) for _ in range(size)] for size in sizes])
    kept = check(world, minimum=2)
    assert len(set(kept.values())) > 12


@pytest.mark.parametrize("seed", range(6))
def test_small_pools(tmp_path, seed):
    rng = np.random.default_rng(100 + seed)
    sizes = [int(size) for size in rng.integers(1, 5, size=1 + seed % 3)]
    uids = iter(random_uids(rng, sum(sizes)))
    check(World(tmp_path, [[random_row(rng, next(uids)) for _ in range(size)] for size in sizes]))


def test_failed_rows_are_as_if_they_were_not_there(tmp_path):
    rng = np.random.default_rng(7)
    rows = [random_row(rng, uid) | {"ok": bool(rng.random() < 0.8)} for uid in random_uids(rng, 200)]
    check(World(tmp_path, [rows[:90], rows[90:]]), minimum=2)


@pytest.mark.parametrize(
    "scores",
    [
        [0.28] * 10,  # all tie: every fraction keeps all
        [math.nan] * 10,  # the cut falls among NaN: nothing is kept
        [0.3] * 2 + [math.nan] * 8,
        [0.3] * 3 + [math.nan] * 7,
        [0.3, 0.2, 0.1, None, math.nan],
        [math.inf, 0.3, -math.inf, math.inf],
        [0.281, 0.2809999, 0.2810001, 0.28, 0.2799999, 0.7, 0.25, 0.3],  # float32 on both sides of the thresholds
        [0.0, -0.0, 0.0, -0.0, -0.1],
        [0.9] * 7 + [0.5] * 6 + [0.1] * 7,
    ],
)
def test_ties_and_missing_scores(tmp_path, scores):
    rng = np.random.default_rng(3)
    rows = [random_row(rng, uid) for uid in random_uids(rng, len(scores))]
    for row, score in zip(rows, scores, strict=True):
        row |= {"text": "red dogs and fish", "language": "en", "cld3_language": "en", "cluster": 2}
        row |= {"clip_b32_similarity_score": score, "clip_l14_similarity_score": score}
    check(World(tmp_path, [rows[::2], rows[1::2]]))


def test_a_pool_of_failed_rows_keeps_nothing(tmp_path):
    rng = np.random.default_rng(9)
    rows = [random_row(rng, uid) | {"ok": False} for uid in random_uids(rng, 3)]
    assert set(check(World(tmp_path, [rows[:2], rows[2:]])).values()) == {0}


def test_datacomps_fraction_keeps_one_more_and_ours_does_not(tmp_path):
    rng = np.random.default_rng(5)
    rows = [random_row(rng, uid) | {"clip_l14_similarity_score": number / 100} for number, uid in
            enumerate(random_uids(rng, 100))]  # fmt: skip
    world = World(tmp_path, [rows])
    _, types = strategies_of("datacomp_small.yaml")
    top = {"column": "clip_l14_similarity_score", "fraction": 0.29}
    strategies = parse_strategies({"a": {"top": top | {"cut": "datacomp"}}, "b": {"top": top}}, "strategies", types)
    assert [len(world.ours(strategies, name)) for name in "ab"] == [29, 29]  # int(0.29 * 100) is 28
    top["fraction"] = 0.3
    strategies = parse_strategies({"a": {"top": top | {"cut": "datacomp"}}, "b": {"top": top}}, "strategies", types)
    assert [len(world.ours(strategies, name)) for name in "ab"] == [31, 30]


@pytest.mark.parametrize("name", [*(f"datacomp_{scale}.yaml" for scale in SCALES), "seeds.yaml"])
def test_the_shipped_configs_are_of_one_kind(name):
    found = config.load(str(CONFIGS / name))
    mapping, types = strategies_of(name)
    parse_strategies(mapping, name, types)
    for entry in found.stages:
        if isinstance(entry, dict):
            parameters = {key: value for key, value in entry.items() if key not in ("name", "within")}
            build_stage(entry["name"], parameters, name)
            assert entry.get("within", "caption_filter") in mapping
    assert f"recipe: {'small' if name == 'seeds.yaml' else name[9:-5]}" in (CONFIGS / name).read_text()
    for chosen in found.compare:  # beside each filter a random subset of its size
        if chosen != "no_filter" and not chosen.startswith("random_"):
            same_size = [other for other in found.compare if found.strategies[other].get("random") is not None]
            assert chosen in [found.strategies[other]["random"]["as_many_as"] for other in same_size]
    if name != "seeds.yaml":
        small = config.load(str(CONFIGS / "datacomp_small.yaml"))
        assert found.strategies == small.strategies
        assert found.compare == small.compare


def test_the_shipped_config_on_metadata_with_features(tmp_path):
    """All seven from DataComp's files alone: centroids, target features and WordNet given; CLD3 only where it is."""
    rows = metadata(tmp_path / "metadata")
    rng = np.random.default_rng(1)
    centroids, targets = rng.normal(size=(6, 12)).astype(np.float32), rng.normal(size=(4, 12)).astype(np.float32)
    np.save(tmp_path / "centroids.npy", centroids)
    np.save(tmp_path / "targets.npy", targets)
    (tmp_path / "ids.txt").write_text("n04962784\n")  # red
    place = str(CONFIGS / "datacomp_small.yaml")
    overrides = [
        f"root={tmp_path}/root",
        "pool.download=false",
        f"pool.source.path={tmp_path}/metadata/*.parquet",
        "pool.shard_size=90",
        "stages.2=language",
        f"stages.4.wordnet={write_wordnet(tmp_path / 'wordnet')}",
        f"stages.4.ids={tmp_path}/ids.txt",
        f"stages.5.centroids={tmp_path}/centroids.npy",
        f"stages.5.target_features=[{tmp_path}/targets.npy]",
    ]
    plan = planning.build(config.load(place, overrides), place)
    outcome = run_here(plan)
    is_cld3_there = importlib.util.find_spec("gcld3") is not None
    assert bool(plan.steps["language_cld3"].unavailable) != is_cld3_there

    english = [row["is_english"] or row["text"] in ("two words", "a b c") for row in rows]
    near = [int(np.argmax(centroids @ row["l14_img"].astype(np.float16).astype(np.float32))) for row in rows]
    hit = {int(np.argmax(centroids @ target)) for target in targets}
    assert 0 < sum(cluster in hit for cluster in near) < len(rows)
    scores = sorted((row["clip_l14_similarity_score"] for row in rows), reverse=True)
    threshold = scores[int(len(rows) * 0.3)]
    kept = {
        "text_based": [
            is_english and "red" in row["text"].split() for row, is_english in zip(rows, english, strict=True)
        ],
        "image_based": [
            is_english and len(row["text"]) > 5 and cluster in hit
            for row, is_english, cluster in zip(rows, english, near, strict=True)
        ],
        "clip_score": [row["clip_l14_similarity_score"] >= threshold for row in rows],
    }
    kept["image_based_and_clip_score"] = [a and b for a, b in zip(kept["image_based"], kept["clip_score"], strict=True)]
    for name, mask in kept.items():
        uids = sorted(row["uid"] for row, good in zip(rows, mask, strict=True) if good)
        assert 0 < len(uids) < len(rows)
        path = outcome.statuses[f"{name}/selection"].artifact.path
        found = np.load(f"{path}/uids.npy")
        assert found.tolist() == [(int(uid[:16], 16), int(uid[16:], 16)) for uid in uids], name
    assert (outcome.statuses["laion2b/selection"].state == "done") == is_cld3_there
