"""DataComp's own metadata without its images: selections equal to its rules, and nothing is downloaded or trained."""

from __future__ import annotations

import datetime
import pathlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import plan as planning
from pipeline import report, runs, states
from pipeline.core import config, pool, storage
from pipeline.core.errors import ConfigError
from tests.engine_fixture import EngineHere, run_here

ENGLISH = "a photo of a red car that stands in the street number {}"
GERMAN = "ein Foto von einem roten Auto, das auf der Straße steht, Nummer {}"
LENGTHS = {"b32_img": 8, "b32_txt": 8, "l14_img": 12, "l14_txt": 12}
ROWS = (230, 1, 170)  # of the three files

CONFIG = {
    "pool": {"source": {"carry": {"clip_b32_similarity_score": "float32", "clip_l14_similarity_score": "float32",
                                  "l14_img": "float16[]"}},
             "shard_size": 90, "download": False},
    "stages": ["image_stats", "caption_stats", "language",
               {"name": "embedding_duplicates", "embedding": "l14_img", "threshold": 0.999}],
    "strategies": {
        "no_filter": {},
        "basic": {"where": ["language == en", "caption_words > 2", "caption_chars > 5", "min_side_px >= 200",
                            "aspect_ratio <= 3.0"]},
        "clip_30": {"top": {"column": "clip_l14_similarity_score", "fraction": 0.3, "cut": "datacomp"}},
        "clip_threshold": {"where": ["clip_b32_similarity_score >= 0.28"]},
        "both": {"all_of": ["basic", "clip_30"]},
        "either": {"any_of": ["basic", "clip_30"]},
        "deduplicated": {"all_of": ["clip_30"], "where": ["embedding_is_duplicate == false"]},
    },
    "train": {"recipe": "debug"},
    "eval": {"tasks": ["imagenet1k"]},
    "shares": ["language"],
}  # fmt: skip


def metadata(folder, rows_of_files=ROWS, seed=0):
    """The rows of a folder of metadata in DataComp's layout, as the files were written: parquet and npz by stem."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    rows = []
    stems = sorted(rng.bytes(16).hex() for _ in rows_of_files)
    for number, (stem, num_rows) in enumerate(zip(stems, rows_of_files, strict=True)):
        features = {key: rng.normal(size=(num_rows, length)) for key, length in LENGTHS.items()}
        features["l14_img"][5:8] = features["l14_img"][0]
        table = []
        for row in range(num_rows):
            is_english = bool(rng.integers(2))
            text = str(
                rng.choice([(ENGLISH if is_english else GERMAN).format(row), "two words", "a b c"], p=[0.8, 0.1, 0.1])
            )
            width, height = (int(side) for side in rng.choice([199, 200, 201, 512, 600, 601, 1024], 2))
            scores = np.round(rng.normal(0.25, 0.05, 2), 2).astype(np.float32)  # many ties
            table.append(
                {
                    "uid": rng.bytes(16).hex(),
                    "url": f"http://{number}.example.org/{row}.jpg",
                    "text": text,
                    "original_width": width,
                    "original_height": height,
                    "clip_b32_similarity_score": scores[0],
                    "clip_l14_similarity_score": scores[1],
                    "face_bboxes": [[0.1, 0.2, 0.3, 0.4]] * int(rng.integers(2)),
                    "sha256": rng.bytes(32).hex(),
                }
            )
            rows.append(table[-1] | {"is_english": is_english, "l14_img": features["l14_img"][row].astype(np.float32)})
        schema = pa.schema(
            {
                **dict.fromkeys(("uid", "url", "text", "sha256"), pa.string()),
                **dict.fromkeys(("original_width", "original_height"), pa.int64()),
                **dict.fromkeys(("clip_b32_similarity_score", "clip_l14_similarity_score"), pa.float32()),
                "face_bboxes": pa.list_(pa.list_(pa.float64())),
            }
        )
        pq.write_table(pa.Table.from_pylist(table, schema=schema), folder / f"{stem}.parquet", row_group_size=100)
        arrays = {key: values.astype(np.float32) for key, values in features.items()}
        np.savez_compressed(folder / f"{stem}.npz", dedup=np.zeros(num_rows), **arrays)
    return rows


def plan_of(tmp_path, *overrides, root="root", **changes):
    data = {"root": str(tmp_path / root), "compare": list(CONFIG["strategies"]), **CONFIG, **changes}
    path = tmp_path / "metadata.yaml"
    path.write_text(yaml.safe_dump(data))
    source = f"pool.source.path={tmp_path}/metadata/*.parquet"
    return planning.build(config.load(str(path), [source, *overrides]), str(path))


def subset(uids):
    """DataComp's subset file of the uids, as its baselines write it."""
    pairs = np.array([(int(uid[:16], 16), int(uid[16:32], 16)) for uid in uids], np.dtype("u8,u8"))
    pairs.sort()
    return pairs


def expected_uids(rows):
    """{strategy: uids} by DataComp's rules, row by row."""

    def is_basic(row):
        words_of_english = row["text"] in ("two words", "a b c") or row["is_english"]
        width, height = row["original_width"], row["original_height"]
        return (
            words_of_english and len(row["text"].split()) > 2 and len(row["text"]) > 5
            and min(width, height) >= 200 and max(width, height) / min(width, height) <= 3.0
        )  # fmt: skip

    l14 = [float(row["clip_l14_similarity_score"]) for row in rows]
    threshold = sorted(l14, reverse=True)[int(len(rows) * 0.3)]
    basic = {row["uid"] for row in rows if is_basic(row)}
    clip = {row["uid"] for row, score in zip(rows, l14, strict=True) if score >= threshold}
    vectors = np.stack([row["l14_img"].astype(np.float16) for row in rows]).astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    same = vectors @ vectors.T >= 0.999
    first = {
        rows[i]["uid"]
        for i in range(len(rows))
        if rows[i]["uid"] == min(rows[j]["uid"] for j in np.flatnonzero(same[i]))
    }
    assert len(basic) > 50 and int(len(rows) * 0.3) + 1 < len(clip) < 300 and len(first) == len(rows) - 6
    return {
        "no_filter": {row["uid"] for row in rows},
        "basic": basic,
        "clip_30": clip,
        "clip_threshold": {row["uid"] for row in rows if row["clip_b32_similarity_score"] >= np.float32(0.28)},
        "both": basic & clip,
        "either": basic | clip,
        "deduplicated": clip & first,
    }


class Backwards(EngineHere):
    """Does the last item of every step first."""

    def map(self, function, items, names, resources, on_done=None):
        order = range(len(items))[::-1]
        done = {index: function(*items[index]) for index in order}
        for index in order:
            if on_done:
                on_done(index, done[index])
        return [done[index] for index in range(len(items))]


def test_metadata_alone_gives_the_subsets_of_datacomp(tmp_path, monkeypatch):
    rows = metadata(tmp_path / "metadata")
    plan = plan_of(tmp_path)
    assert {step.kind for step in plan.steps.values()} == {
        "urls", "image_stats", "caption_stats", "language", "embedding_duplicates", "selection", "gallery", "shares",
            "profile",
    }  # fmt: skip
    outcome = run_here(plan)
    assert not outcome.failures
    folders = {name: status.artifact.path for name, status in outcome.statuses.items()}
    for strategy, uids in expected_uids(rows).items():
        found = np.load(f"{folders[strategy + '/selection']}/uids.npy", allow_pickle=False)
        assert found.dtype == np.dtype("u8,u8")
        np.testing.assert_array_equal(found, subset(uids), err_msg=strategy)
    record = outcome.statuses["pool"].record
    shards = pool.shards(record)
    table = pa.concat_tables([pool.read_rows(folders["pool"], shard.name) for shard in shards])
    assert table["uid"].to_pylist() == [row["uid"] for row in rows]
    assert table["ok"].to_pylist() == [True] * len(rows)
    assert table["image_offset_bytes"].null_count == len(rows)
    for vector, row in zip(table["l14_img"].to_pylist(), rows, strict=True):
        np.testing.assert_array_equal(np.array(vector, np.float16), row["l14_img"].astype(np.float16))

    # The same bytes whatever is done first.
    engine = Backwards()
    monkeypatch.setattr("tests.engine_fixture.EngineHere", lambda: engine)
    again = run_here(plan_of(tmp_path, root="again"))
    for name, status in again.statuses.items():
        assert status.artifact.name == outcome.statuses[name].artifact.name
        for file in storage.list_files(status.artifact.path):
            if not file.endswith("json"):
                assert storage.read_bytes(f"{status.artifact.path}/{file}") == storage.read_bytes(
                    f"{folders[name]}/{file}"
                )

    # The download starts from the rows that are there.
    later = states.resolve(plan_of(tmp_path, "pool.download={}", "eval.root=demo", "eval.tasks=[objects]"))
    assert later["urls"].state == "done" and later["urls"].artifact.name == outcome.statuses["pool"].artifact.name
    assert later["pool"].state == "todo" and later["basic/train_set"].state == "pending"
    chosen = states.resolve(
        plan_of(tmp_path, "pool.download={}", "pool.only=both", "eval.root=demo", "eval.tasks=[objects]")
    )
    assert {name: status.state for name, status in chosen.items() if name.startswith("urls")} == {
        "urls": "done", "urls/image_stats": "done", "urls/caption_stats": "done", "urls/language": "done",
        "urls/selection": "done",
    }  # fmt: skip


def test_the_report_says_what_was_kept_and_where(tmp_path):
    rows = metadata(tmp_path / "metadata")
    plan = plan_of(tmp_path)
    outcome = run_here(plan)
    run_path = f"{plan.config.root}/runs/here"
    now = datetime.datetime(2026, 1, 31, tzinfo=datetime.timezone.utc)
    storage.write_json(f"{run_path}/run.json", runs.run_record(plan, outcome, "metadata", now))
    shown = report.write_report(run_path, 80)
    expected = expected_uids(rows)
    for strategy, uids in expected.items():
        line = next(line for line in shown.splitlines() if line.startswith(f"{strategy} "))
        _, kept, share, _, path = line.split()
        assert (kept, share) == (str(len(uids)), f"{100 * len(uids) / len(rows):.1f}")
        assert len(np.load(path)) == len(uids)
    assert "401 rows, 401 ok" in shown and "nothing was trained" in shown and "leaderboard" not in shown
    whole = pathlib.Path(run_path, "selections.txt").read_text()
    assert f"funnels and overlaps: {run_path}/selections.txt" in shown
    assert "top 0.3 of clip_l14_similarity_score" in whole and "Jaccard" in whole
    found = storage.read_json(f"{run_path}/selections.json")
    assert [one["kept_rows"] for one in found["strategies"]] == [len(uids) for uids in expected.values()]
    both = len(expected["both"]) / len(expected["either"])
    assert found["jaccard"][1][2] == pytest.approx(both, abs=1e-7)
    assert not pathlib.Path(run_path, "leaderboard.html").exists()


def test_what_needs_images_is_refused_in_one_line(tmp_path):
    metadata(tmp_path / "metadata", (3,))
    stage = "the stage {} needs images or a model, expected only stages that read captions or columns"
    for changes, message in (
        ({"stages": [*CONFIG["stages"], "hashes"]}, "pool.download = false: " + stage.format("hashes")),
        (
            {
                "stages": [*CONFIG["stages"], {"name": "clip", "model": "openai"}],
                "models": {"openai": {"architecture": "ViT-B-32", "pretrained": "openai"}},
            },
            "pool.download = false: " + stage.format("clip"),
        ),
        (
            {"strategies": {**CONFIG["strategies"], "no_filter": {"where": ["width_px > 3"]}}},
            "strategies.no_filter: uses width_px, expected only columns that are known before the download",
        ),
        (
            {"references": {"web": {"source": {"path": str(tmp_path / "metadata"), "layout": "urls"}}}},
            "references.web.download: nothing is downloaded with pool.download = false, expected false",
        ),
    ):
        with pytest.raises(ConfigError) as caught:
            plan_of(tmp_path, **changes)
        assert message in str(caught.value) and "\n" not in str(caught.value)
    for override, message in (
        ("pool.only=basic", "pool.only has no effect with download: false, expected it to be left out"),
        ("pool.download=true", "pool.download = True, expected a mapping"),
        ("pool.source={layout: demo}", "pool.download has no effect: the source is no table of URLs"),
        ("stages.3.embedding=image_offset_bytes", "image_offset_bytes"),
    ):
        with pytest.raises(ConfigError, match=message):
            plan_of(tmp_path, override)


def test_a_reference_may_be_metadata_too(tmp_path):
    metadata(tmp_path / "metadata", (3,))
    reference = {"source": {"path": str(tmp_path / "metadata"), "layout": "urls"}, "download": False}
    plan = plan_of(tmp_path, references={"web": reference})
    assert plan.steps["reference/web"].kind == "urls"
    with pytest.raises(ConfigError, match=r"no_filter: references\.web\.download = false, expected images"):
        plan_of(
            tmp_path, "pool.download={}", "eval.root=demo", "eval.tasks=[objects]",
            references={"web": reference}, strategies={**CONFIG["strategies"], "no_filter": {"reference": "web"}},
        )  # fmt: skip
