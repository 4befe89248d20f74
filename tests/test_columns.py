"""Map stages: what they say about a pair, and how score_shard runs them."""

from __future__ import annotations

import hashlib
import io
import json
import math
import pathlib
from dataclasses import MISSING, dataclass, fields
from typing import ClassVar

import fasttext
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core import images, pool
from pipeline.core.errors import ConfigError, WinnowError
from stages import STAGES, build_stage, score_shard, stage_class
from stages.base import Batch, LoadContext, Stage
from stages.column_files import Column, is_current
from stages.columns import placeholders
from stages.columns.caption_stats import num_tokens
from stages.columns.hashes import image_phash
from stages.score_shard import LoadedStage
from stages.stage_worker import StageJob, StageWorker, fit, fit_path
from tests.duplicates_fixture import run_stage
from tests.golden_fixture import check_golden, read_golden
from tests.passes_fixture import passes_here
from tests.pool_fixture import drawing, write_columns, write_pool

CAPTIONS = [
    "two red stars painted on a plain wall near the harbour",
    "ein Hund läuft über die grüne Wiese hinter dem Haus",
    "une photo de la vieille maison au bord de la mer",
    "IMG_0042.jpg",
    "a\tlate\u00a0evening\nin  town ",
    "\u2605\u2665 \U0001f600",
    "Ｆull width and Straße",
    "x" * 300,
]


@pytest.fixture(scope="module")
def pool_path(tmp_path_factory):
    shards = [[], []]
    for number in range(24):
        broken = number in (0, 5, 23)
        image = None if broken else drawing(number, 40 + number * 3, 30 + (number * 11) % 50)
        caption = CAPTIONS[number % len(CAPTIONS)]
        shards[number // 14].append({"image": image, "caption": None if number == 5 else caption})
    return write_pool(tmp_path_factory.mktemp("pool"), shards)


def score(pool_path, out, stages, shard=0, model=None, batch_size=None, threads=1):
    shards = pool.load_shards(pool_path)
    found = shards[shard]
    loaded = []
    for name, stage in stages.items():
        job = StageJob(stage, f"{out}/{name}", model=model)
        if stage.whole_pool:
            fit(pool_path, job, shards, passes_here(fit_path(job)))
        context = LoadContext(model=model, fit_path=fit_path(job))
        loaded.append(LoadedStage(stage, stage.load(context), job.out_path, batch_size))
    facts = score_shard.score_shard(pool_path, found, loaded, threads)
    return facts, {name: pq.read_table(f"{out}/{name}/{found.name}.parquet") for name in stages}


def batch_of(**columns):
    """The first rows of a shard."""
    return Batch(columns, "00000", np.arange(len(columns["uid"])))


def bare_stages():
    """The names of the stages that need no parameter; the others have goldens in their own tests."""
    kinds = {name: stage_class(name) for name in STAGES}
    return [name for name, kind in kinds.items() if all(field.default is not MISSING for field in fields(kind))]


def deterministic():
    """Stages that need neither a parameter nor the columns of another stage."""
    stages = {name: build_stage(name, {}, name) for name in bare_stages()}
    return {name: stage for name, stage in stages.items() if not stage.needs and not stage.unavailable()}


def test_rows_stay_in_order_and_failed_ones_are_null(pool_path, tmp_path):
    facts, tables = score(pool_path, tmp_path, deterministic())
    rows = pool.read_rows(pool_path, "00000").to_pylist()
    assert facts["rows"] == 14
    assert facts["ok_rows"] == 12
    for name, table in tables.items():
        assert table.schema.names == ["uid", *build_stage(name, {}, name).adds]
        assert table["uid"].to_pylist() == [row["uid"] for row in rows]
        for found, row in zip(table.to_pylist(), rows, strict=True):
            if not row["ok"]:
                assert set(list(found.values())[1:]) == {None}
    for row, found in zip(rows, tables["caption_stats"].to_pylist(), strict=True):
        if row["ok"]:
            assert found["caption_words"] == len(row["caption"].split())
            assert found["caption_chars"] == len(row["caption"])
            assert found["caption_tokens"] == len(fasttext.tokenize(row["caption"]))


def test_tokens_are_those_of_fasttext():
    rng = np.random.default_rng(0)
    alphabet = [*" \n\r\t\v\f\0ab.é\u3000\u00a0\u2028\u0085\u001c\u200b\U0001f600", "</s>", "\r\n"]
    texts = ["".join(rng.choice(alphabet, rng.integers(0, 12))) for _ in range(3000)]
    texts += ["", "\n", "\n\n", "a\n", "\0", "a\0b", " ", "word " * 5000, "x" * 100_000, *CAPTIONS]
    for text in texts:
        assert num_tokens(text) == len(fasttext.tokenize(text)), repr(text)
    assert num_tokens("a \udc80") == 2  # which can't be passed to fastText


def test_bytes_do_not_depend_on_batch_size_or_threads(pool_path, tmp_path, monkeypatch):
    score(pool_path, tmp_path / "a", deterministic(), batch_size=3)
    monkeypatch.setattr(score_shard, "BLOCK_PIXELS", 5000)
    monkeypatch.setattr(score_shard, "BATCH_PIXELS", 9000)
    score(pool_path, tmp_path / "b", deterministic(), threads=3)
    for name in deterministic():
        first, second = ((tmp_path / side / name / "00000.parquet").read_bytes() for side in "ab")
        assert first == second


@dataclass(frozen=True)
class Recorded(Stage):
    """Records the uids of its batches."""

    reads: ClassVar[str] = "pixels"
    adds: ClassVar = {"width": "int32"}
    batch_size: ClassVar[int] = 4

    def load(self, context):
        return []

    def process(self, batch, state):
        assert [image.width for image in batch.images] == batch.columns["width_px"]
        assert [Image.open(io.BytesIO(data)).size for data in batch.image_bytes] == [i.size for i in batch.images]
        state.append(batch.columns["uid"])
        return {"width": [image.width for image in batch.images]}


@dataclass(frozen=True)
class Larger(Recorded):
    batch_size: ClassVar[int] = 7


@dataclass(frozen=True)
class OfCaptions(Recorded):
    reads: ClassVar[str] = "caption"
    batch_size: ClassVar[int] = 5

    def process(self, batch, state):
        return {"width": [len(caption) for caption in batch.columns["caption"]]}


@pytest.mark.parametrize("block_rows", [3, 256])
@pytest.mark.parametrize(("batch_pixels", "sizes"), [(10**9, [4, 4, 4]), (12_000, [4, 3, 1, 3, 1])])
def test_a_stages_batches_do_not_depend_on_the_others(
    pool_path, tmp_path, monkeypatch, block_rows, batch_pixels, sizes
):
    monkeypatch.setattr(score_shard, "BLOCK_ROWS", block_rows)
    monkeypatch.setattr(score_shard, "BLOCK_PIXELS", 8000)
    monkeypatch.setattr(score_shard, "BATCH_PIXELS", batch_pixels)
    shard = pool.load_shards(pool_path)[0]
    seen = []
    for number, others in enumerate([(), (Larger(),), (OfCaptions(), Larger()), (OfCaptions(),)]):
        loaded = [
            LoadedStage(stage, [], f"{tmp_path}/{number}-{index}") for index, stage in enumerate((*others, Recorded()))
        ]
        score_shard.score_shard(pool_path, shard, loaded)
        seen.append(loaded[-1].state)
    assert [len(uids) for uids in seen[0]] == sizes
    assert all(batches == seen[0] for batches in seen)
    rows = pool.read_rows(pool_path, shard.name).to_pylist()
    assert [uid for batch in seen[0] for uid in batch] == [row["uid"] for row in rows if row["ok"]]


def test_few_images_are_held_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(score_shard, "BLOCK_PIXELS", 2 * 64 * 48)
    monkeypatch.setattr(score_shard, "BATCH_PIXELS", 4 * 64 * 48)
    most = []
    add = score_shard._Window.add
    monkeypatch.setattr(
        score_shard._Window, "add", lambda window, new: (add(window, new), most.append(len(window.entries)))
    )
    path = write_pool(tmp_path, [[{"image": drawing(number), "caption": "a"} for number in range(40)]])
    score(path, tmp_path / "out", {"one": Recorded(), "two": Larger()})
    assert max(most) <= 6  # a batch and a block


def test_written_files_come_with_their_digests(pool_path, tmp_path):
    stages = deterministic()
    score(pool_path, tmp_path, {"caption_stats": stages["caption_stats"]})
    facts, _ = score(pool_path, tmp_path, stages)
    assert sorted(facts["known"]) == sorted(f"{tmp_path}/{name}" for name in stages if name != "caption_stats")
    for path, files in facts["known"].items():
        data = pathlib.Path(path, "00000.parquet").read_bytes()
        assert files == {"00000.parquet": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def test_a_worker_tells_the_digests_of_files_that_were_there_too(pool_path, tmp_path):
    shard = pool.load_shards(pool_path)[0]
    jobs = [StageJob(stage, f"{tmp_path}/{name}") for name, stage in deterministic().items()]
    first = StageWorker(pool_path, jobs[:1], "cpu", 1).process(shard)
    both = StageWorker(pool_path, jobs[:2], "cpu", 1).process(shard)
    again = StageWorker(pool_path, jobs[:2], "cpu", 1).process(shard)
    assert both["known"] == again["known"]
    assert both["known"][jobs[0].out_path] == first["known"][jobs[0].out_path]
    assert again["seconds"] == {}
    for path, files in again["known"].items():
        data = pathlib.Path(path, "00000.parquet").read_bytes()
        assert files == {"00000.parquet": {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}}


def test_rows_beyond_one_group(pool_path, tmp_path, monkeypatch):
    monkeypatch.setattr(score_shard, "GROUP_ROWS", 4)
    _, small = score(pool_path, tmp_path / "a", deterministic())
    monkeypatch.setattr(score_shard, "GROUP_ROWS", 4096)
    _, large = score(pool_path, tmp_path / "b", deterministic())
    for name in small:
        assert small[name].equals(large[name])


def test_images_are_decoded_once_for_all_stages_and_not_for_captions(pool_path, tmp_path, monkeypatch):
    calls = []
    decode = images.decode_rgb
    monkeypatch.setattr(images, "decode_rgb", lambda data: calls.append(len(data)) or decode(data))
    score(pool_path, tmp_path / "a", {"caption_stats": build_stage("caption_stats", {}, "")})
    assert calls == []
    hashes = build_stage("hashes", {}, "")
    score(pool_path, tmp_path / "b", {"one": hashes, "two": hashes})
    assert len(calls) == 12


def test_finished_files_are_kept_until_the_pool_shard_changes(pool_path, tmp_path):
    stages = {"caption_stats": build_stage("caption_stats", {}, "")}
    score(pool_path, tmp_path, stages)
    written = (tmp_path / "caption_stats" / "00000.parquet").stat().st_mtime_ns
    facts, _ = score(pool_path, tmp_path, stages)
    assert facts["seconds"] == facts["known"] == {}
    assert (tmp_path / "caption_stats" / "00000.parquet").stat().st_mtime_ns == written
    shard = pool.load_shards(pool_path)[0]
    assert is_current(f"{tmp_path}/caption_stats", shard)
    assert not is_current(f"{tmp_path}/caption_stats", pool.Shard(shard.name, "0" * 32, shard.rows))


def test_an_image_that_no_longer_decodes_fails_the_shard(tmp_path):
    path = write_pool(tmp_path, [[{"image": drawing(1, kind="PNG"), "caption": "a"}] * 2])
    tar = pathlib.Path(path) / "00000.tar"
    data = bytearray(tar.read_bytes())
    row = pool.read_rows(path, "00000").to_pylist()[1]
    data[row["image_offset_bytes"] + 60 : row["image_offset_bytes"] + 90] = b"\0" * 30
    tar.write_bytes(data)
    with pytest.raises(WinnowError, match=f"uid {row['uid']}: undecodable.*expected an image that decodes"):
        score(path, tmp_path / "out", {"hashes": build_stage("hashes", {}, "")})
    assert not list((tmp_path / "out").rglob("*.parquet*"))


@dataclass(frozen=True)
class Planted(Stage):
    """Gives what the test plants."""

    reads: ClassVar[str] = "columns"
    adds: ClassVar = {"value": "int32"}
    given: tuple = ()

    def process(self, batch, state):
        return dict(self.given) if self.given else {"value": batch.columns["caption_words"]}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"other": [1] * 12}, r"gave columns \['other'\], expected \['value'\]"),
        ({"value": [1] * 11}, "value has 11 values, expected 12"),
        ({"value": ["x"] * 12}, "value: expected int32 values"),
        ({"value": [1.5] * 12}, "value: expected int32 values"),
        ({"value": [2**40] * 12}, "value: expected int32 values"),
    ],
)
def test_a_stage_that_breaks_its_contract_is_named(pool_path, tmp_path, given, message):
    with pytest.raises(WinnowError, match=f"stage Planted, shard 00000: {message}"):
        score(pool_path, tmp_path, {"planted": Planted(tuple(given.items()))})


def test_a_stage_gets_the_columns_that_it_needs(pool_path, tmp_path):
    @dataclass(frozen=True)
    class Doubled(Planted):
        needs: ClassVar = ("caption_words",)

    _, tables = score(pool_path, tmp_path, {"caption_stats": build_stage("caption_stats", {}, "")})
    shard = pool.load_shards(pool_path)[0]
    columns = {"caption_words": Column(f"{tmp_path}/caption_stats", "caption_words")}
    score_shard.score_shard(pool_path, shard, [LoadedStage(Doubled(), None, f"{tmp_path}/doubled", 5, columns)])
    found = pq.read_table(tmp_path / "doubled" / "00000.parquet")
    assert found["value"].to_pylist() == tables["caption_stats"]["caption_words"].to_pylist()


def test_a_stage_gets_the_columns_that_the_pool_carries(tmp_path):
    @dataclass(frozen=True)
    class Doubled(Stage):
        reads: ClassVar[str] = "columns"
        needs: ClassVar = ("truth_count", "width_px")
        adds: ClassVar = {"value": "int64"}

        def process(self, batch, state):
            pairs = zip(batch.columns["truth_count"], batch.columns["width_px"], strict=True)
            return {"value": [count + width_px for count, width_px in pairs]}

    path = write_pool(tmp_path, [[{"image": drawing(1, 50), "caption": "a", "truth_count": 3}]])
    _, tables = score(path, tmp_path, {"doubled": Doubled()})
    assert tables["doubled"]["value"].to_pylist() == [53]


def test_image_stats_use_the_original_size():
    batch = batch_of(
        uid=["0" * 32] * 2, original_width_px=[600, 100], original_height_px=[200, 301], image_size_bytes=[7, 8]
    )
    found = build_stage("image_stats", {}, "").process(batch, None)
    assert found["min_side_px"] == [200, 100]
    assert found["max_side_px"] == [600, 301]
    assert np.array(found["aspect_ratio"], dtype=np.float32).tolist() == [3.0, np.float32(3.01)]


def test_language_of_text_that_fasttext_dislikes():
    stage = build_stage("language", {}, "")
    state = stage.load(LoadContext())
    texts = ["a dog runs\nacross the green field", "ein Hund läuft über die Wiese", "a\0b\ud800", "", "\U0001f600"]
    found = stage.process(batch_of(uid=texts, caption=texts), state)
    assert found["language"][:2] == ["en", "de"]
    assert all(0 < confidence <= 1 for confidence in found["language_confidence"])
    assert found["language_confidence"][3] < 0.2
    assert pathlib.Path(stage.external_files()["model"]).stat().st_size > 100_000


def test_the_packaged_language_model_leaves_fasttext_whole():
    import fasttext

    assert hasattr(fasttext, "train_supervised")


def test_no_language_model_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr("stages.columns.language.packaged_model", lambda: None)
    with pytest.raises(ConfigError, match=r"model is empty, expected the path of a model, .*fasttext.cc"):
        build_stage("language", {}, "").external_files()
    text = build_stage("language", {"model": "/nowhere.bin"}, "").unavailable()
    assert text.startswith("model = /nowhere.bin is not there: lid.176.bin and lid.176.ftz are at https://fasttext.cc")


def test_a_language_model_that_is_none_is_one_line(tmp_path):
    import fasttext

    (tmp_path / "text.bin").write_text("no model")
    (tmp_path / "empty.bin").touch()
    for wrong in (tmp_path, tmp_path / "text.bin", tmp_path / "empty.bin"):
        with pytest.raises(ConfigError, match=f"stages.language.model = {wrong}, expected a fastText model file"):
            build_stage("language", {"model": str(wrong)}, "").external_files()
    (tmp_path / "words.txt").write_text("a few words are enough here\n" * 20)
    vectors = fasttext.train_unsupervised(str(tmp_path / "words.txt"), dim=4, bucket=100, thread=1, verbose=0)
    vectors.save_model(str(tmp_path / "vectors.bin"))
    stage = build_stage("language", {"model": str(tmp_path / "vectors.bin")}, "")
    stage.external_files()
    with pytest.raises(WinnowError, match="vectors.bin, expected a fastText model of languages: ") as caught:
        stage.load(LoadContext())
    assert "\n" not in str(caught.value)


def test_phash_finds_a_smaller_copy_and_leaves_flat_pictures_out():
    picture = Image.open(io.BytesIO(drawing(3, 300, 200)))
    other = Image.open(io.BytesIO(drawing(11, 300, 200)))
    hashes = [int(image_phash(image), 16) for image in (picture, picture.resize((150, 100)), other)]
    assert (hashes[0] ^ hashes[1]).bit_count() <= 4
    assert (hashes[0] ^ hashes[2]).bit_count() > 10
    rng = np.random.default_rng(0)
    for level in (0, 90, 255):
        noise = np.clip(level + rng.normal(0, 2, (60, 60, 3)), 0, 255).astype(np.uint8)
        assert image_phash(Image.fromarray(noise)) is None


def test_hashes_see_through_formats_and_spelling(tmp_path):
    rows = [
        {"image": drawing(4, kind="PNG"), "caption": "A  Red\nSTAR"},
        {"image": drawing(4, kind="BMP"), "caption": "a red ｓtar "},
        {"image": drawing(5, kind="BMP"), "caption": "a blue star"},
    ]
    _, tables = score(write_pool(tmp_path, [rows]), tmp_path, {"hashes": build_stage("hashes", {}, "")})
    for name in ("pixels_sha256", "caption_sha256", "image_phash"):
        first, second, third = tables["hashes"][name].to_pylist()
        assert first == second != third


def test_clip_score_is_the_cosine_of_plain_open_clip(pool_path, model_folder, tmp_path):
    import open_clip
    import torch

    stage = build_stage("clip", {"model": "tiny"}, "")
    _, tables = score(pool_path, tmp_path, {"clip": stage}, model={"folder": model_folder}, batch_size=5)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{model_folder}")
    model.eval()
    tokenizer = open_clip.get_tokenizer(f"local-dir:{model_folder}")
    rows = pool.read_rows(pool_path, "00000")
    data = pool.read_images(pool_path, "00000", rows.filter(rows["ok"]))
    for row, found in zip(rows.to_pylist(), tables["clip"].to_pylist(), strict=True):
        if not row["ok"]:
            assert found["clip_score"] is found["clip_image"] is found["clip_text"] is None
            continue
        with torch.no_grad():
            image = model.encode_image(preprocess(images.decode_rgb(next(data)))[None], normalize=True)[0]
            text = model.encode_text(tokenizer([row["caption"]]), normalize=True)[0]
        assert found["clip_score"] == pytest.approx(float(image @ text), abs=1e-5)
        np.testing.assert_allclose(found["clip_image"], image.numpy(), atol=1e-3)
        np.testing.assert_allclose(found["clip_text"], text.numpy(), atol=1e-3)


def test_clip_refuses_random_weights():
    with pytest.raises(ConfigError, match="an untrained model can't score"):
        build_stage("clip", {"model": "b32"}, "").load(LoadContext(model={"architecture": "ViT-B-32"}))


def test_placeholders_are_images_behind_many_urls(tmp_path, monkeypatch):
    monkeypatch.setattr(placeholders, "PARTITION_ROWS", 7)  # several partitions
    sorry, banner = drawing(1), drawing(2)
    rows = [{"image": sorry, "caption": "x", "url": f"http://a.test/{number}.jpg"} for number in range(5)]
    rows += [{"image": banner, "caption": "x", "url": f"http://b.test/{number % 2}.jpg"} for number in range(6)]
    rows += [{"image": drawing(number), "caption": "x", "url": f"http://c.test/{number}.jpg"} for number in range(3, 9)]
    rows.append({"image": None, "caption": "x", "url": "http://a.test/9.jpg"})
    rows[-2]["url"] = None
    path = write_pool(tmp_path, [rows[:9], rows[9:]])
    stage = build_stage("placeholders", {"min_urls": 3}, "placeholders")
    found = [row for shard in (0, 1) for row in score(path, tmp_path, {"it": stage}, shard)[1]["it"].to_pylist()]
    assert [row["image_num_urls"] for row in found] == [5] * 5 + [2] * 6 + [1] * 6 + [None]
    assert [row["is_placeholder"] for row in found] == [True] * 5 + [False] * 12 + [None]


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        (
            "languages",
            {},
            r"stages.2 = languages, expected a stage. Did you mean language\? Choose from: caption_",
        ),
        ("language", {"modle": "x"}, r"stages.2.modle is an unknown key. Did you mean model\?"),
        ("language", {"model": 3}, "stages.2.model = 3, expected text"),
        ("clip", {}, "stages.2.model is missing, expected a value"),
        ("caption_stats", {"min": 1}, "stages.2.min is an unknown key"),
    ],
)
def test_wrong_parameters_are_one_line(name, parameters, message):
    with pytest.raises(ConfigError, match=message):
        build_stage(name, parameters, "stages.2")


def test_every_stage_is_named_like_its_module_and_documented():
    for name, target in STAGES.items():
        assert target.startswith(f"stages.columns.{name}:")
        assert "Cost:" in (stage_class(name).__doc__ or ""), name


def owners(stage):
    """The stages that a stage needs columns of, each after those that it needs itself."""
    found = []
    for name in bare_stages():
        if set(stage.needs) & set(stage_class(name).adds):
            found += [*owners(build_stage(name, {}, name)), name]
    return list(dict.fromkeys(found))


@pytest.mark.parametrize("name", sorted(set(bare_stages()) - {"contamination", "language_cld3", "normsim"}))
def test_golden_outputs(pool_path, tmp_path, name):
    stage = build_stage(name, {}, name)
    vectors = np.random.default_rng(0).normal(size=(24, 8))
    vectors[20:] = vectors[10:14]
    columns = write_columns(tmp_path, pool_path, {"clip_image": pa.array(list(vectors.astype(np.float16)))})
    others = np.random.default_rng(1).normal(size=(24, 9))
    columns |= write_columns(tmp_path, pool_path, {"clip_text": pa.array(list(others[:, :8].astype(np.float16)))})
    columns |= write_columns(tmp_path, pool_path, {"clip_score": pa.array(others[:, 8].astype(np.float32) / 10 + 0.2)})
    for other in owners(stage):
        columns, _, _ = run_stage(pool_path, tmp_path / other, build_stage(other, {}, other), columns)
    _, rows, _ = run_stage(pool_path, tmp_path / name, stage, columns)
    for row in rows:
        for column, value in row.items():
            if isinstance(value, bytes):
                row[column] = value.hex()
            if isinstance(value, float):  # the last bits of fastText's probabilities depend on the processor
                row[column] = None if math.isnan(value) else round(value, 3)
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    check_golden(name, {"version": stage.version, "sha256": digest})


def test_golden_clip_scores(pool_path, model_folder, tmp_path):
    stage = build_stage("clip", {"model": "tiny"}, "clip")
    _, tables = score(pool_path, tmp_path, {"clip": stage}, model={"folder": model_folder})
    recorded = read_golden("clip")
    found = [None if score is None else round(score, 4) for score in tables["clip"]["clip_score"].to_pylist()]
    assert recorded["version"] == stage.version
    assert found == pytest.approx(recorded["scores"], abs=2e-4), f"scores changed: bump clip's version, record {found}"
