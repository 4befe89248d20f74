"""Pools with planted copies of evaluation images: what is found, by what, and what the leaderboard says of it."""

from __future__ import annotations

import datetime
import io
import json
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import account, execute, report, runs, steps
from pipeline import plan as planning
from pipeline.core import config, pool
from pipeline.core.errors import ConfigError
from stages.columns import contamination
from stages.columns.contamination import Contamination
from stages.duplicates.nearest_reference import CloseHashes, EqualKeys, NearVectors
from stages.stage_worker import Reference, StageJob, fit, fit_path
from stages.unit_vectors import unit
from tests.embedding_fixture import vector_pool
from tests.engine_fixture import EngineHere, run_here
from tests.ingest_fixture import tar_bytes
from tests.passes_fixture import passes_here
from tests.pool_fixture import write_columns

METHODS = ("sha256", "pixels_sha256", "image_phash")


def photo(number: int) -> Image.Image:
    """A picture with structure at all scales, another one for each number."""
    rng = np.random.default_rng(number)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize((96, 72), Image.Resampling.BICUBIC)
    fine = rng.integers(-12, 13, (72, 96, 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + fine, 0, 255).astype(np.uint8))


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def write_tasks(folder: pathlib.Path) -> str:
    """The root of two tasks: `shapes` (classes; 12 images in two tars) and `sights` (retrieval; 6, two captions each)."""
    shapes, sights = folder / "shapes", folder / "sights"
    (shapes / "test").mkdir(parents=True)
    (sights / "test").mkdir(parents=True)
    for tar, rows in enumerate((range(7), range(7, 12))):
        members = [m for row in rows for m in ((f"./s{row}.png", encoded(photo(row))), (f"./s{row}.cls", str(row % 3)))]
        (shapes / "test" / f"{tar}.tar").write_bytes(
            tar_bytes([(name.removeprefix("./"), data) for name, data in members])
        )
    (shapes / "test" / "nshards.txt").write_text("2")
    (shapes / "classnames.txt").write_text("one\ntwo\nthree\n")
    (shapes / "zeroshot_classification_templates.txt").write_text("a photo of {c}\n")
    members = [
        m
        for row in range(6)
        for m in (
            (f"v{row}.jpg", encoded(photo(100 + row), "JPEG", quality=95)),
            (f"v{row}.txt", f"view {row}\nsight {row}\n"),
        )
    ]
    (sights / "test" / "0.tar").write_bytes(tar_bytes(members))
    (sights / "test" / "nshards.txt").write_text("1")
    (sights / "dataset_type.txt").write_text("retrieval")
    return str(folder)


# caption in the pool: (its image, the task's item that it is a copy of, the method by which they match)
PLANTED = {
    "byte copy": (encoded(photo(1)), ("shapes", "0/s1"), "sha256"),
    "again": (encoded(photo(1)), ("shapes", "0/s1"), "sha256"),
    "other format": (encoded(photo(8), "BMP"), ("shapes", "1/s8"), "pixels_sha256"),
    "re-encoded": (encoded(photo(9), "JPEG", quality=60), ("shapes", "1/s9"), "image_phash"),
    "smaller": (encoded(photo(103).resize((48, 36)), "JPEG"), ("sights", "0/v3"), "image_phash"),
}


def write_pool(folder: pathlib.Path) -> str:
    folder.mkdir()
    clean = {f"nothing {number}": encoded(photo(1000 + number), "JPEG") for number in range(30)}
    clean["flat"] = encoded(Image.new("RGB", (40, 40), (9, 9, 9)))
    pairs = clean | {caption: image for caption, (image, _, _) in PLANTED.items()}
    table = pa.table({"image": list(pairs.values()), "caption": list(pairs)})
    pq.write_table(
        table.append_column("truth", pa.array([caption in PLANTED for caption in pairs])), folder / "a.parquet"
    )
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("data")
    return {"tasks": write_tasks(folder / "tasks"), "pool": write_pool(folder / "pool")}


def plan_of(data, root, *overrides, stages="[hashes, contamination]"):
    tiny = pathlib.Path(__file__).with_name("tiny.yaml")
    own = [
        f"root={root}", f"pool={{source: {{path: {data['pool']}, carry: {{truth: bool}}}}, shard_size: 11}}", "references={}", "models={}",
        f"stages={stages}", "strategies={no_filter: {}, clean: {where: [is_contaminated == false]}}", "compare=[no_filter, clean]",
        f"eval={{root: {data['tasks']}, tasks: [shapes, sights]}}", "train.seeds=[0, 1]", "recipes.tiny.samples_seen=96",
    ]  # fmt: skip
    return planning.build(config.load(str(tiny), [*own, *overrides]), "test.yaml")


@pytest.fixture(scope="module")
def done(data, tmp_path_factory):
    """(plan, outcome, run folder) of a whole run: training, evaluation and report."""
    root = tmp_path_factory.mktemp("root")
    plan = plan_of(data, root)
    outcome = run_here(plan)
    assert outcome.failures == {}
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    run = root / "runs" / "here"
    (run / "run.json").write_text(json.dumps(runs.run_record(plan, outcome, "demo", now)))
    return plan, outcome, run


def tables(outcome, step="contamination"):
    """({caption: the stage's columns}, rows of matches, rows of items, facts)."""
    made = outcome.statuses[step]
    by_uid = {}
    for name in ("pool", step):
        for path in sorted(pathlib.Path(outcome.statuses[name].artifact.path).glob("*.parquet")):
            for row in pq.read_table(path).to_pylist():
                by_uid.setdefault(row["uid"], {}).update(row)
    folder = pathlib.Path(made.artifact.path) / "fit"
    matches = [row for path in sorted((folder / "matches").glob("*")) for row in pq.read_table(path).to_pylist()]
    return by_uid, matches, pq.read_table(folder / "items.parquet").to_pylist(), made.record["facts"]


def test_every_planted_copy_is_found_by_the_surest_method_and_nothing_else(done):
    _, outcome, _ = done
    by_uid, matches, items, facts = tables(outcome)
    assert len(by_uid) == 36
    for row in by_uid.values():
        _, place, method = PLANTED.get(row["caption"], (None, (None, None), None))
        assert row["is_contaminated"] == (method is not None)
        assert (row["contaminated_by"], row["contamination_method"]) == (place[0], method)
        if method in METHODS[:2]:
            assert row["contamination_distance"] == 0
    assert [row["uid"] for row in matches] == sorted(uid for uid, row in by_uid.items() if row["is_contaminated"])
    assert {(by_uid[row["uid"]]["caption"], row["reference"], row["item"], row["method"]) for row in matches} == {
        (caption, *place, method) for caption, (_, place, method) in PLANTED.items()
    }
    found = [(row["reference"], row["item"], row["rows"], row["method"]) for row in items]
    assert found == [
        ("shapes", "0/s1", 2, "sha256"), ("shapes", "1/s8", 1, "pixels_sha256"), ("shapes", "1/s9", 1, "image_phash"),
        ("sights", "0/v3", 1, "image_phash"),
    ]  # fmt: skip
    assert facts["contaminated_rows"] == 5
    assert facts["rows_by_method"] == {"sha256": 2, "pixels_sha256": 1, "image_phash": 2}
    assert facts["references"]["shapes"] == {
        "images": 12, "not_compared": 0, "rows": 4, "matched": 3,
        "matched_by_method": {"sha256": 1, "pixels_sha256": 1, "image_phash": 1},
    }  # fmt: skip
    assert facts["references"]["sights"]["images"] == 6  # whose captions are rows of their own


def test_a_strategy_leaves_the_copies_out_and_says_what_it_used(done):
    plan, outcome, _ = done
    assert outcome.statuses["clean/selection"].record["facts"]["kept_rows"] == 31
    assert account.uses(plan, "clean") == ["compared with shapes, sights"]
    assert account.uses(plan, "no_filter") == []


def predictions(run, result) -> list[dict]:
    return pq.read_table(run.parents[1] / result["path"] / "predictions.parquet").to_pylist()


def test_scores_without_the_copies_are_those_of_the_other_items(done):
    _, _, run = done
    board = report.build_report(str(run))
    (cleaned,) = board.cleaned
    assert cleaned.tasks == ("shapes", "sights")
    expected = {"shapes": [], "sights": []}
    for result in json.loads((run / "run.json").read_text())["results"]:
        if result["strategy"] != "clean":
            continue
        rows = predictions(run, result)
        if result["task"] == "shapes":
            left = [row["correct"] for row in rows if row["item"] not in ("0/s1", "1/s8", "1/s9")]
            assert len(left) == 9
            expected["shapes"].append(np.mean(left))
        else:
            rows = [row for row in rows if row["group"] != "0/v3"]
            both = [
                [row["hit@1"] for row in rows if row["direction"] == way] for way in ("image_to_text", "text_to_image")
            ]
            assert [len(way) for way in both] == [5, 10]
            expected["sights"].append(np.mean([np.mean(way) for way in both]))
    for task, values in expected.items():
        everything, left = cleaned.scores["clean"][task]
        assert left.value == pytest.approx(np.mean(values))
        assert everything == next(row for row in board.rows if row.strategy.name == "clean").task_scores[task]
    assert cleaned.averages["clean"][1].value == pytest.approx(np.mean([np.mean(v) for v in expected.values()]))
    record = json.loads((run / "leaderboard.json").read_text())["contamination"][0]
    assert record["tasks"]["shapes"]["matched"] == 3
    assert record["scores"]["clean"]["shapes"]["without"]["value"] == pytest.approx(np.mean(expected["shapes"]))
    assert "## Contamination" in (run / "leaderboard.md").read_text()
    assert "<h2>Contamination</h2>" in (run / "leaderboard.html").read_text()


def test_images_in_the_pool_can_be_left_out_of_every_score(data, done):
    """`eval.leave_out` changes no artifact: only which items the leaderboard counts."""
    plan, outcome, run = done
    leaving = plan_of(data, plan.config.root, "eval.leave_out=contamination")
    assert [step.values for step in leaving.steps.values()] == [step.values for step in plan.steps.values()]
    again = run.with_name("leaving")
    again.mkdir()
    now = datetime.datetime(2026, 1, 1, tzinfo=datetime.timezone.utc)
    (again / "run.json").write_text(json.dumps(runs.run_record(leaving, outcome, "demo", now)))
    board, whole = report.build_report(str(again)), report.build_report(str(run))
    assert board.cleaned[0].scores == whole.cleaned[0].scores  # with and without, as before
    for row in board.rows:
        _, left = whole.cleaned[0].scores[row.strategy.name]["shapes"]
        assert row.task_scores["shapes"].value == left.value
        assert row.average.value == whole.cleaned[0].averages[row.strategy.name][1].value
    assert "contamination found in the pool count in no score" in (again / "leaderboard.md").read_text()


def test_order_shards_and_runs_change_nothing(data, done, tmp_path, monkeypatch):
    _, outcome, _ = done
    monkeypatch.setattr(contamination, "RUN_ROWS", 3)
    monkeypatch.setattr(contamination, "PIECE_ROWS", 5)
    monkeypatch.setattr(contamination, "PARTITION_ROWS", 9)
    table = pq.read_table(pathlib.Path(data["pool"]) / "a.parquet")
    (tmp_path / "pool").mkdir()
    pq.write_table(table.take(np.random.default_rng(0).permutation(len(table))), tmp_path / "pool" / "a.parquet")
    again = run_here(plan_of(data | {"pool": str(tmp_path / "pool")}, tmp_path / "root", "pool.shard_size=4", "eval.tasks=[sights, shapes]"), ["contamination"])  # fmt: skip
    assert again.failures == {}
    one, other = tables(outcome), tables(again)
    names = [*Contamination.adds]
    assert {uid: [row[name] for name in names] for uid, row in one[0].items()} == {
        uid: [row[name] for name in names] for uid, row in other[0].items()
    }
    assert one[1] == other[1]  # in the same order
    assert one[2] == other[2]
    del one[3]["shards"], other[3]["shards"]
    assert {key: one[3][key] for key in ("contaminated_rows", "rows_by_method", "references")} == {
        key: other[3][key] for key in ("contaminated_rows", "rows_by_method", "references")
    }


def test_a_reference_is_compared_as_tasks_are(data, tmp_path):
    plan = plan_of(
        data, tmp_path, f"references={{mine: {{source: {{path: {data['tasks']}/sights/test}}}}}}",
        stages="[hashes, {name: contamination, against: [mine], phash_bits: 0}]",
    )  # fmt: skip
    outcome = run_here(plan, ["contamination"])
    by_uid, matches, _, facts = tables(outcome)
    assert facts["references"]["mine"]["images"] == 12  # pairs: a reference's captions are rows
    assert all(row["item"] == row["reference_uid"] for row in matches)
    assert {row["caption"] for row in by_uid.values() if row["is_contaminated"]} <= {"smaller"}
    assert runs.run_record(plan, outcome, "demo", datetime.datetime.now())["contamination"] == []


@pytest.mark.parametrize(
    "stages, override, message",
    [
        ("[hashes, contamination]", "eval={root: demo, tasks: [colours]}", r"against = tasks: the demo world draws its tasks apart"),
        ("[contamination]", "seed=0", r"stages\.contamination needs the column pixels_sha256, which no stage adds"),
        ("[hashes, {name: contamination, against: [trused]}]", "references={trusted: {source: demo}}", r"trused, expected tasks or names of references\. Did you mean trusted"),
        ("[hashes, {name: contamination, against: task}]", "seed=0", r"against = task, expected tasks or a list"),
        ("[hashes, {name: contamination, min_cosine: 0.9}]", "seed=0", r"expected embedding and min_cosine together"),
        ("[hashes, {name: contamination, embedding: truth, min_cosine: 0.9}]", "seed=0", r"needs the column truth, which shapes does not have"),
        ("[hashes, {name: contamination, phash_bits: 40}]", "seed=0", r"phash_bits = 40"),
    ],
)  # fmt: skip
def test_what_cannot_be_compared_is_refused_in_one_line(data, tmp_path, stages, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        plan_of(data, tmp_path, override, stages=stages)
    assert "\n" not in str(caught.value)


def test_tasks_of_a_model_s_embedding_need_that_model(data, tmp_path):
    plan = plan_of(
        data, tmp_path, "models={b32: {architecture: ViT-B-32, pretrained: openai}}",
        stages="[hashes, {name: clip, model: b32}, {name: contamination, embedding: clip_image, min_cosine: 0.95}]",
    )  # fmt: skip
    inputs = plan.steps["contamination"].inputs
    assert inputs["reference/sights/column/clip_image"] == "reference/task_sights/clip"
    assert steps.references_of(plan.steps["contamination"]) == ["shapes", "sights"]
    renamed = plan_of(data, tmp_path, "seed=5")
    assert renamed.steps["contamination"].values == plan_of(data, tmp_path).steps["contamination"].values


def test_vectors_are_compared_exactly_and_the_nearest_counts(tmp_path):
    rng = np.random.default_rng(3)
    images = rng.normal(size=(40, 16)).astype(np.float16)
    rows = np.concatenate([images[:20] + 0.3 * rng.normal(size=(20, 16)), rng.normal(size=(30, 16))]).astype(np.float16)
    own_ids = [f"{number:032x}" for number in range(50)]
    ids = [f"{900 - number:032x}" for number in range(40)]
    pool_path, own = vector_pool(tmp_path / "pool", [*rows[:-1], None], own_ids, 4)
    other_path, other = vector_pool(tmp_path / "other", images, ids, 2)
    for name, path, columns in (("a", pool_path, own), ("b", other_path, other)):  # all rows show the same image
        digests = [f"{name}{number:063x}" for number in range(sum(shard.rows for shard in pool.load_shards(path)))]
        hashes = {method: pa.array(digests) for method in ("sha256", "pixels_sha256")}
        columns |= write_columns(tmp_path / name, path, hashes)
    stage = Contamination(against=("other",), phash_bits=None, embedding="vector", min_cosine=0.8)
    references = {"other": Reference(other_path, pool.load_shards(other_path), other)}
    job = StageJob(stage, str(tmp_path / "out"), own, references=references)
    fit(pool_path, job, pool.load_shards(pool_path), passes_here(fit_path(job)))
    found = pq.read_table(tmp_path / "out" / "fit" / "matches").to_pylist()
    cosines = (unit(rows[:-1]) @ unit(images).T).astype(np.float32)
    for at, line in enumerate(cosines):
        near = [(float(np.float32(1 - (unit(rows[at : at + 1]) @ unit(images[j : j + 1]).T)[0, 0])), ids[j]) for j in np.flatnonzero(line >= np.float32(0.8))]  # fmt: skip
        assert [(row["distance"], row["reference_uid"]) for row in found if row["uid"] == own_ids[at]] == sorted(near)
    assert 10 < len({row["uid"] for row in found}) < 50


def test_a_fit_that_was_killed_goes_on_to_the_same_bytes(done, tmp_path, monkeypatch):
    plan, outcome, _ = done
    made = outcome.statuses["contamination"].artifact
    executor = execute.Executor(plan, EngineHere(), None, str(tmp_path))
    step, pool_status = plan.steps["contamination"], outcome.statuses["pool"]
    job = StageJob(
        step.work, str(tmp_path / "out"), executor._columns(step, outcome.statuses),
        references=executor._references(step, outcome.statuses),
    )  # fmt: skip
    shards = pool.shards(pool_status.record)

    def killed(*arguments):
        raise KeyboardInterrupt

    for place in ("write_matches", "write_items"):
        with monkeypatch.context() as patch:
            patch.setattr(contamination, place, killed)
            with pytest.raises(KeyboardInterrupt):
                fit(pool_status.artifact.path, job, shards, passes_here(fit_path(job)))
    fit(pool_status.artifact.path, job, shards, passes_here(fit_path(job)))

    def files(folder):
        return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}

    assert files(tmp_path / "out" / "fit") == files(pathlib.Path(made.path) / "fit")


# What is compared, against all pairs


@pytest.mark.parametrize("most_bits", [0, 1, 3, 4, 7, 12])
def test_close_hashes_are_all_pairs_within_the_bits(most_bits):
    rng = np.random.default_rng(most_bits)
    references = rng.integers(0, 2**64, 300, dtype=np.uint64)
    references[7] = references[8]
    rows = references[rng.integers(0, 300, 400)]
    for _ in range(most_bits + 2):
        rows = rows ^ (np.uint64(1) << rng.integers(0, 64, 400, dtype=np.uint64)) * rng.integers(
            0, 2, 400, dtype=np.uint64
        )
    names = np.arange(1000, 1300)
    row, reference, bits = CloseHashes(references, names, most_bits).pairs(rows)
    distance = np.bitwise_count(rows[:, None] ^ references[None])
    expected = {(i, names[j], distance[i, j]) for i, j in zip(*np.nonzero(distance <= most_bits), strict=True)}
    assert len(row) == len(expected)
    assert set(zip(row.tolist(), reference.tolist(), bits.tolist(), strict=True)) == expected


def test_more_pairs_than_rows_are_all_there():
    same = np.full(50, 7, np.uint64)
    assert len(CloseHashes(same, np.arange(50), 4).pairs(same)[0]) == 2500


def test_equal_keys_and_nulls():
    keys = EqualKeys(pa.chunked_array([["b", "a", None], ["b", "c"]]))
    row, reference, distance = keys.pairs(pa.array(["b", None, "z", "c", "b"]))
    assert list(zip(row.tolist(), reference.tolist(), strict=True)) == [(0, 0), (0, 3), (3, 4), (4, 0), (4, 3)]
    assert not distance.any()
    assert len(EqualKeys(pa.array([None], pa.string())).pairs(pa.array(["b", None]))[0]) == 0


def test_near_vectors_decide_at_the_threshold_itself():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(200, 32)).astype(np.float16)
    cosines = (unit(vectors) @ unit(vectors).T).astype(np.float32)
    threshold = np.sort(cosines.ravel())[-500]  # the cosine of one of the pairs
    row, reference, _ = NearVectors(vectors, np.arange(200), float(threshold)).pairs(vectors)
    assert set(zip(row.tolist(), reference.tolist(), strict=True)) == set(zip(*map(np.ndarray.tolist, np.nonzero(cosines >= threshold)), strict=True))  # fmt: skip
