"""Sources: every layout becomes the pool that its files say; wrong ones are one clear line before any work."""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.core import pool, storage
from pipeline.core.errors import ConfigError
from stages.ingest import demo_world, sources
from tests.ingest_fixture import build, files, rows, tar_bytes
from tests.pool_fixture import drawing

PNG = [drawing(number, kind="PNG") for number in range(12)]
UIDS = [f"{number:032x}" for number in range(12)]


def sample(number: int, key: str | None = None) -> list:
    key = key or f"{number:06d}"
    return [(f"{key}.png", PNG[number]), (f"{key}.txt", f"picture {number}"), (f"{key}.json", {"uid": UIDS[number]})]


def test_webdataset_tars_keep_bytes_uids_and_order(tmp_path):
    first = [*sample(1, "b"), *sample(0, "a")]
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "00000.tar").write_bytes(tar_bytes(first))
    (tmp_path / "in" / "00001.tar").write_bytes(tar_bytes(sample(2)))
    facts = build(str(tmp_path / "in"), tmp_path / "out")
    found = rows(tmp_path / "out")
    assert facts["ok_rows"] == 3
    assert [row["uid"] for row in found] == [UIDS[1], UIDS[0], UIDS[2]]
    assert [row["caption"] for row in found] == ["picture 1", "picture 0", "picture 2"]
    assert [row["key"] for row in found] == ["00000000000", "00000000001", "00000000002"]
    assert (found[0]["width_px"], found[0]["height_px"], found[0]["image_format"]) == (64, 48, "png")
    table = pool.read_rows(str(tmp_path / "out"), "00000")
    assert list(pool.read_images(str(tmp_path / "out"), "00000", table)) == [PNG[1], PNG[0], PNG[2]]
    assert [row["sha256"] for row in found] == [hashlib.sha256(PNG[number]).hexdigest() for number in (1, 0, 2)]


def test_webdataset_library_reads_a_pool_shard(tmp_path):
    (tmp_path / "in.tar").write_bytes(tar_bytes([*sample(0), *sample(1), ("bad.png", b"x"), ("bad.txt", "bad")]))
    build({"path": str(tmp_path / "in.tar"), "carry": {"original_name": "string"}}, tmp_path / "out")
    with open(tmp_path / "out" / "00000.tar", "rb") as stream:
        members = list(
            webdataset.tariterators.tar_file_expander(
                [{"stream": stream, "url": "x"}], handler=webdataset.reraise_exception
            )
        )
    grouped = list(webdataset.tariterators.group_by_keys([member for member in members if "fname" in member]))
    assert [one["png"] for one in grouped] == PNG[:2]
    assert [one["txt"] for one in grouped] == [b"picture 0", b"picture 1"]
    values = json.loads(grouped[1]["json"])
    assert values["uid"] == UIDS[1]
    assert values["original_name"] == "000001"
    assert values["key"] == grouped[1]["__key__"] == "00000000001"


def test_files_around_a_sample(tmp_path):
    """Side files, hidden files, folders in names, dots in names, upper case, captions in the json alone."""
    members = [
        ("a/1.jpg", drawing(1, kind="JPEG")), ("a/1.seg.png", PNG[2]), ("a/1.txt", "side file\n"),
        ("a/._2.png", b"resource fork"), ("./a/2.PNG", PNG[3]), ("./a/2.json", {"caption": "in the json"}),
        ("IMG.2020.png", PNG[4]), ("IMG.2020.txt", "dots"), ("IMG.2021.png", PNG[5]), ("IMG.2021.txt", "more dots"),
        ("README", b"not a sample"), ("b.webp", drawing(6, kind="WEBP")), ("b.txt", "webp"),
    ]  # fmt: skip
    (tmp_path / "in.tar").write_bytes(tar_bytes(members))
    assert build(str(tmp_path / "in.tar"), tmp_path / "out")["ok_rows"] == 5
    found = rows(tmp_path / "out")
    assert [row["caption"] for row in found] == ["side file", "in the json", "dots", "more dots", "webp"]
    assert [row["image_format"] for row in found] == ["jpg", "png", "png", "png", "webp"]


def img2dataset_table(path, entries: list[dict]) -> None:
    columns = ("key", "status", "error_message", "url", "caption", "uid", "original_width", "similarity")
    table = {name: [entry.get(name) for entry in entries] for name in columns}
    types = [pa.string()] * 6 + [pa.int32(), pa.float64()]
    pq.write_table(
        pa.table([pa.array(table[name], kind) for name, kind in zip(columns, types, strict=True)], columns), path
    )


def test_img2dataset_parquet_brings_back_failed_downloads(tmp_path):
    good = {"key": "000000000", "status": "success", "url": "http://x/0", "caption": "picture 0", "uid": UIDS[0],
            "original_width": 640, "similarity": 0.5}  # fmt: skip
    refused = {"key": "000000001", "status": "failed_to_download", "error_message": "HTTP Error 404: Not Found",
               "url": "http://x/1", "caption": "lost", "uid": UIDS[1]}  # fmt: skip
    vanished = {"key": "000000002", "status": "success", "url": "http://x/2", "caption": "gone", "uid": UIDS[2]}
    (tmp_path / "in").mkdir()
    members = [("000000000.png", PNG[0]), ("000000000.txt", "picture 0")]
    (tmp_path / "in" / "00000.tar").write_bytes(tar_bytes(members))
    img2dataset_table(tmp_path / "in" / "00000.parquet", [good, refused, vanished])
    img2dataset_table(tmp_path / "in" / "00001.parquet", [{**refused, "key": "000010000", "uid": UIDS[3]}])
    (tmp_path / "in" / "00000_stats.json").write_text("{}")
    source = {"path": str(tmp_path / "in"), "carry": {"similarity": "float32"}}
    facts = build(source, tmp_path / "out")
    assert facts["failed"] == {"download_failed": 2, "missing_image": 1}
    found = rows(tmp_path / "out")
    assert [row["uid"] for row in found] == UIDS[:4]
    assert [row["similarity"] for row in found] == [0.5, None, None, None]
    assert [row["url"] for row in found] == ["http://x/0", "http://x/1", "http://x/2", "http://x/1"]
    assert found[0]["original_width_px"] == 640
    assert found[1]["caption"] == "lost"
    assert "HTTP Error 404" in found[1]["error_detail"]
    assert build({**source, "path": str(tmp_path / "in" / "*.tar")}, tmp_path / "pattern")["rows"] == 3


def test_other_parquet_files_beside_tars_are_ignored(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_bytes(sample(0)))
    for name in ("0.parquet", "index.parquet"):
        pq.write_table(pa.table({"key": ["000000", "000001"], "label": [1, 2]}), tmp_path / name)
    assert build(str(tmp_path), tmp_path / "out" / "pool")["rows"] == 1


@pytest.mark.parametrize("as_struct", [False, True])
def test_parquet_with_captions_in_a_list(tmp_path, as_struct):
    images = [{"bytes": data, "path": f"{index}.png"} for index, data in enumerate(PNG[:3])] if as_struct else PNG[:3]
    captions = [["one", "two"], [], ["three"]]
    table = pa.table({"image": images, "captions": captions, "score": [1, 2, 3]})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    facts = build({"path": str(tmp_path), "carry": {"score": "int32"}}, tmp_path / "out", shard_size=2)
    found = rows(tmp_path / "out")
    assert facts["failed"] == {"missing_caption": 1}
    assert [row["caption"] for row in found] == ["one", "two", None, "three"]
    assert [row["score"] for row in found] == [1, 1, 2, 3]
    assert found[0]["image_id"] == found[1]["image_id"] != found[3]["image_id"]
    assert len({row["uid"] for row in found}) == 4
    assert found[0]["uid"] == pool.derived_uid(PNG[0], "one", 0)


def test_parquet_uids_name_the_first_of_several_captions(tmp_path):
    pq.write_table(pa.table({"image": PNG[:2], "text": [["a", "b"], ["c"]], "uid": UIDS[:2]}), tmp_path / "a.parquet")
    build(str(tmp_path / "a.parquet"), tmp_path / "out")
    found = [row["uid"] for row in rows(tmp_path / "out")]
    assert (found[0], found[2]) == (UIDS[0], UIDS[1])
    assert len(set(found)) == 3


@pytest.fixture
def photos(tmp_path):
    folder = tmp_path / "photos"
    (folder / "trip").mkdir(parents=True)
    for number, name in enumerate(["b.png", "trip/a.PNG", "c.png"]):
        (folder / name).write_bytes(PNG[number])
    return folder


def test_folder_with_text_files(photos, tmp_path):
    for name in ("b", "trip/a", "c"):
        (photos / f"{name}.txt").write_bytes(b"\xef\xbb\xbfcaption of " + name.encode() + b"\r\n")
    (photos / "c.json").write_text(json.dumps({"uid": UIDS[7], "licence": "mine"}))
    (photos / ".DS_Store").write_bytes(b"x")
    source = {"path": str(photos), "carry": {"licence": "string", "original_name": "string"}}
    assert build(source, tmp_path / "out", shard_size=2)["ok_rows"] == 3
    found = rows(tmp_path / "out")
    assert [row["caption"] for row in found] == ["caption of b", "caption of c", "caption of trip/a"]
    assert [row["licence"] for row in found] == [None, "mine", None]
    assert [row["original_name"] for row in found] == ["b.png", "c.png", "trip/a.PNG"]
    assert found[1]["uid"] == UIDS[7]


def test_captions_without_an_image_are_failed_rows(photos, tmp_path):
    for name in ("b", "lost", "trip/lost", "README"):
        (photos / f"{name}.txt").write_text(name)
    (photos / "notes.json").write_text("{}")
    assert build(str(photos), tmp_path / "out")["failed"] == {"missing_caption": 2, "missing_image": 3}
    found = [row for row in rows(tmp_path / "out") if row["error"] == "missing_image"]
    assert {row["error_detail"] for row in found} == {
        f"{name}.txt: a caption file without an image beside it" for name in ("lost", "trip/lost", "README")
    }
    for name in ("b", "lost", "trip/lost", "README"):  # now only json captions: a .txt is none
        (photos / f"{name}.txt").rename(photos / f"{name}.json" if name in ("b", "lost") else photos / f"{name}.txt")
    (photos / "b.json").write_text('{"caption": "b"}')
    assert build(str(photos), tmp_path / "json")["failed"] == {"missing_caption": 2, "missing_image": 2}


CSV = 'file_name,caption,score\r\nb.png,"one, two",0.5\r\nb.png,again,\r\nmissing.png,lost,1\r\n../secret.png,out,1\r\n'
TSV = "image\ttext\tscore\nb.png\tone, two\t0.5\nb.png\tagain\t\nmissing.png\tlost\t1\n../secret.png\tout\t1\n"
JSONL = "\n".join(
    json.dumps(row)
    for row in [
        {"file": "b.png", "captions": ["one, two", "again"], "score": 0.5},
        {"file": "missing.png", "captions": "lost"},
        {"file": "../secret.png", "captions": "out"},
    ]
)


@pytest.mark.parametrize("name, text", [("captions.csv", CSV), ("captions.tsv", TSV), ("captions.jsonl", JSONL)])
def test_folder_with_a_captions_table(photos, tmp_path, name, text):
    (tmp_path / "secret.png").write_bytes(PNG[9])
    (photos / name).write_bytes(text.encode())
    facts = build({"path": str(photos), "captions": name, "carry": {"score": "float32"}}, tmp_path / "out")
    assert facts["failed"] == {"missing_caption": 2, "missing_image": 1, "unsafe_file": 1}
    found = rows(tmp_path / "out")
    assert [(row["caption"], row["ok"]) for row in found if row["ok"]] == [("one, two", True), ("again", True)]
    assert found[0]["score"] == 0.5
    assert {row["caption"]: row["error"] for row in found if not row["ok"] and row["caption"]} == {
        "lost": "missing_image", "out": "unsafe_file",
    }  # fmt: skip


def test_links_that_leave_the_folder_are_never_read(photos, tmp_path):
    (tmp_path / "secret.txt").write_text("secret")
    (tmp_path / "secret.png").write_bytes(PNG[8])
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "hidden.png").write_bytes(PNG[9])
    (photos / "ok.txt").write_text("fine")
    os.symlink(photos / "c.png", photos / "ok.png")
    os.symlink(tmp_path / "secret.txt", photos / "b.txt")
    os.symlink(tmp_path / "secret.png", photos / "out.png")
    os.symlink(tmp_path / "nowhere.png", photos / "dangling.png")
    os.symlink(tmp_path / "elsewhere", photos / "folder")
    os.mkfifo(photos / "pipe.png")
    facts = build(str(photos), tmp_path / "out")
    assert facts["failed"] == {"missing_caption": 2, "unsafe_file": 5}
    found = rows(tmp_path / "out")
    assert [row["caption"] for row in found if row["ok"]] == ["fine"]
    assert not any("secret" in str(row["caption"]) for row in found)
    assert not any(row["sha256"] for row in found if row["error"] == "unsafe_file")


def test_links_to_tars_are_followed(tmp_path):
    """Hugging Face's cache keeps its files elsewhere and links to them."""
    (tmp_path / "blob").write_bytes(tar_bytes(sample(0)))
    (tmp_path / "in").mkdir()
    os.symlink(tmp_path / "blob", tmp_path / "in" / "0.tar")
    assert build(str(tmp_path / "in"), tmp_path / "out")["ok_rows"] == 1


def test_clip_benchmark_retrieval(tmp_path):
    task = tmp_path / "task"
    (task / "test").mkdir(parents=True)
    (task / "dataset_type.txt").write_text("retrieval")
    (task / "test" / "nshards.txt").write_text("1")
    members = [("s0.png", PNG[0]), ("s0.txt", "one\ntwo\n"), ("s1.png", PNG[1]), ("s1.txt", "three")]
    (task / "test" / "0.tar").write_bytes(tar_bytes(members))
    facts = build(str(task), tmp_path / "out")
    assert facts["ok_rows"] == 3
    assert [row["caption"] for row in rows(tmp_path / "out")] == ["one", "two", "three"]
    assert len({row["image_id"] for row in rows(tmp_path / "out")}) == 2


def test_clip_benchmark_classification_uses_the_first_template(tmp_path):
    task = tmp_path / "task"
    for split in ("test", "train"):
        (task / split).mkdir(parents=True)
        (task / split / "nshards.txt").write_text("1")
        members = [("s0.png", PNG[0]), ("s0.cls", "1"), ("s1.png", PNG[1]), ("s1.cls", "7"), ("s2.png", PNG[2])]
        (task / split / "0.tar").write_bytes(tar_bytes(members))
    (task / "classnames.txt").write_text("cat\ndog\n")
    (task / "zeroshot_classification_templates.txt").write_text("a photo of a {c}.\nart of {c}\n")
    with pytest.raises(ConfigError, match="expected one split; give the path of test or train"):
        sources.parse(str(task), "pool.source")
    facts = build(str(task / "train"), tmp_path / "out")
    assert facts["failed"] == {"missing_caption": 2}
    assert rows(tmp_path / "out")[0]["caption"] == "a photo of a dog."
    before = sources.source_digest(sources.parse(str(task / "train"), "p")["source"])
    (task / "classnames.txt").write_text("cat\nwolf\n")
    assert sources.source_digest(sources.parse(str(task / "train"), "p")["source"]) != before


def test_demo_world_rows_carry_the_truth(tmp_path):
    facts = build({"layout": "demo", "pairs": 30, "seed": 3}, tmp_path / "out", shard_size=20)
    found = rows(tmp_path / "out")
    expected = list(demo_world.pairs(30, 3, False, 0, 30))
    assert facts["rows"] == 30
    assert [row["caption"] for row in found] == [pair["caption"] for pair in expected]
    for column in ("truth_fault", "truth_object", "truth_colour", "truth_count"):
        assert [row[column] for row in found] == [pair[column] for pair in expected]
    assert all((row["truth_fault"] == "corrupt") == (not row["ok"]) for row in found)
    assert len({row["uid"] for row in found}) == 30


def test_several_sources_by_name(tmp_path, photos):
    (photos / "b.txt").write_text("a photo")
    (tmp_path / "in.tar").write_bytes(tar_bytes(sample(0)))
    value = {"web": str(tmp_path / "in.tar"), "mine": {"path": str(photos)}, "drawn": {"layout": "demo", "pairs": 2}}
    build(value, tmp_path / "out")
    found = rows(tmp_path / "out")
    assert [row["source"] for row in found] == ["drawn"] * 2 + ["mine"] * 3 + ["web"]
    assert found[0]["truth_count"] is not None
    assert found[-1]["truth_count"] is None


@pytest.mark.parametrize(
    "value, message",
    [
        ("nowhere", r"pool.source.path = .*/nowhere, expected a file, a folder or a pattern; nothing is there"),
        ("*.tar", "expected a pattern that matches files; it matches none"),
        ("empty", "expected files in the folder; it is empty"),
        ("notes", r"the layout can't be recognised from .md; expected tars"),
        ({"path": "table", "image_column": "pic"}, "could be caption or text; set .* to one of pic, caption"),
        ({"path": "table", "caption_column": "caption"}, r"image_column is none of .*; set image_column to one of pic"),
        ({"path": "table", "caption_column": "caption", "image_column": "size"}, "size is int64, expected bytes"),
        ({"path": "table", "caption_column": "size", "image_column": "pic"}, "size is int64, expected text"),
        ({"path": "table", "image_column": "pic", "caption_column": "txt"}, "no column txt .*, expected one of pic"),
        ({"path": "table", "caption_column": "text", "image_column": "pic", "carry": {"x": "int32"}}, "no column x"),
        ({"path": "table", "carry": {"size": "int"}}, r"carry.size = int, expected a type. Did you mean int64\?"),
        ({"path": "table", "carry": {"uid": "string"}}, "every pool has a column of this name"),
        ({"path": "table", "pairs": 3}, "pool.source.pairs has no effect with layout parquet"),
        ({"path": "table", "caption_columm": "x"}, "caption_columm is an unknown key. Did you mean caption_column?"),
        ({"path": "table", "layout": "tars"}, "layout = tars, expected one of 'auto'"),
        ({"path": "table", "layout": "webdataset"}, "expected files that end in .tar"),
        ({"path": "table", "layout": "folder"}, "expected image files; found .parquet"),
        ({"path": "pictures", "captions": "c.csv"}, "captions = c.csv, expected a table in"),
        ("pictures", r"expected captions in .txt files beside the images; found wrong.csv: name it with captions"),
        ({"path": "pictures", "captions": "wrong.csv"}, r"caption_column: is none of .*; set .* file_name, words"),
        ({"path": "pictures", "captions": "wide.csv"}, r"wide.csv:3: more fields than the header's 2; expected quotes"),
        ({"path": "pictures", "captions": "open.csv"}, r"open.csv:\d: can't be read as a table"),
        ({"layout": "demo", "path": "x"}, "expected no path and no carry with layout: demo"),
        ({"layout": "demo", "pairs": 0}, "pairs = 0, expected a number >= 1"),
        ({"web": "a", "seed": {"path": "b"}}, "pool.source.seed: seed is an option of a source, expected another name"),
        ({"clean": "/data/clean"}, "pool.source.clean: clean is an option of a source"),
        ({"path": "a", "web": "s3://b/*.tar"}, "pool.source.path: path is an option of a source"),
        ({"path": "a", "pathh": "b/c"}, r"pathh is an unknown key. Did you mean path\?"),
        (7, "pool.source = 7, expected a path"),
        ({"layout": "folder"}, "path is missing"),
    ],
)  # fmt: skip
def test_wrong_sources_are_config_errors(tmp_path, monkeypatch, value, message):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "notes", "table", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "notes" / "a.md").write_text("x")
    pq.write_table(
        pa.table({"pic": PNG[:1], "caption": ["a"], "text": ["b"], "size": [1]}), tmp_path / "table" / "a.parquet"
    )
    (tmp_path / "pictures" / "a.png").write_bytes(PNG[0])
    (tmp_path / "pictures" / "wrong.csv").write_text("file_name,words\na.png,x\n")
    if isinstance(value, dict) and value.get("captions", "").startswith(("wide", "open")):
        (tmp_path / "pictures" / "wide.csv").write_text("file_name,caption\na.png,x\na.png,x, y\n")
        (tmp_path / "pictures" / "open.csv").write_text('file_name,caption\na.png,"x\nb.png,y\n')
    with pytest.raises(ConfigError, match=message) as caught:
        sources.parse(value, "pool.source")
    assert "\n" not in str(caught.value)


def test_relative_paths_become_absolute(photos, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (photos / "b.txt").write_text("b")
    parsed = sources.parse({"all": "photos", "some": {"path": "./photos/*.png"}}, "p")
    assert [source.path for source in parsed.values()] == [f"{tmp_path}/photos", f"{tmp_path}/photos/*.png"]


def test_digest_follows_content_and_not_the_place(tmp_path, photos, monkeypatch):
    def digest(path, **options):
        return sources.source_digest(sources.parse({"path": str(path), **options}, "pool.source")["source"])

    for name in ("b", "trip/a", "c"):
        (photos / f"{name}.txt").write_text(name)
    before = digest(photos)
    moved = tmp_path / "moved"
    shutil.copytree(photos, moved)
    assert digest(moved) == before
    assert digest(moved, carry={"original_name": "string"}) != before
    (moved / "c.txt").write_text("C")
    assert digest(moved) != before
    monkeypatch.setattr(sources, "HASHED_BYTES", 10)
    stamped = digest(photos)
    assert stamped != before
    os.utime(photos / "c.txt", (1, 1))
    assert digest(photos) != stamped


def test_digest_of_the_demo_world_is_its_parameters():
    def digest(**options):
        return sources.source_digest(sources.parse({"layout": "demo", **options}, "p")["source"])

    assert digest() == digest(pairs=10_000, seed=0, clean=False)
    assert len({digest(), digest(seed=1), digest(pairs=5), digest(clean=True)}) == 4


def test_sources_and_pools_on_s3(tmp_path, s3_url):
    storage.write_bytes(f"{s3_url}/in/00000.tar", tar_bytes([*sample(0), *sample(1)])[:-11000])
    storage.write_bytes(f"{s3_url}/in/00001.tar", tar_bytes(sample(2)))
    storage.write_bytes(f"{s3_url}/photos/sub/a.png", PNG[3])
    storage.write_bytes(f"{s3_url}/photos/sub/a.txt", b"a photo")
    sink = io.BytesIO()
    pq.write_table(pa.table({"image": PNG[4:6], "caption": ["a", "b"]}), sink)
    storage.write_bytes(f"{s3_url}/rows/a.parquet", sink.getvalue())
    value = {"tars": f"{s3_url}/in/*.tar", "photos": f"{s3_url}/photos", "rows": f"{s3_url}/rows/"}
    facts = build(value, f"{s3_url}/out")
    local = tmp_path / "local"
    for name in storage.list_files(s3_url, recursive=True):
        (local / name).parent.mkdir(parents=True, exist_ok=True)
        (local / name).write_bytes(storage.read_bytes(f"{s3_url}/{name}"))
    here = {"tars": f"{local}/in/*.tar", "photos": f"{local}/photos", "rows": f"{local}/rows"}
    assert build(here, tmp_path / "out")["failed"] == facts["failed"] == {"truncated_tar": 1}
    assert files(local / "out") == files(tmp_path / "out")
    remote, on_disk = sources.parse(value, "p"), sources.parse(here, "p")
    assert all(sources.source_digest(remote[name]) == sources.source_digest(on_disk[name]) for name in value)


@pytest.mark.real_data
def test_real_flickr8k_and_cc12m(tmp_path, real_data_path):
    facts = build(
        {"path": str(real_data_path / "captions_pool" / "flickr8k" / "val"), "caption_column": "captions"},
        tmp_path / "a",
    )
    found = rows(tmp_path / "a")
    assert facts["ok_rows"] == facts["rows"] == 1250
    assert len({row["image_id"] for row in found}) == 250
    assert found[0]["caption"] == "The three children are playing in a fountain ."
    assert len({row["uid"] for row in found}) == 1250
    facts = build(str(real_data_path / "web_metadata" / "cc12m_sample_32.tar"), tmp_path / "b")
    found = rows(tmp_path / "b")
    assert facts["ok_rows"] == facts["rows"] == 32
    assert found[0]["caption"] == "Red Square is a city square in Moscow, Russia."
    assert found[0]["original_width_px"] == 1024
    assert found[0]["url"].startswith("https://")


def test_photos_with_an_embedded_preview_are_jpegs(tmp_path):
    data = io.BytesIO()
    Image.new("RGB", (40, 30), (9, 9, 9)).save(
        data, "MPO", save_all=True, append_images=[Image.new("RGB", (20, 15), (1, 2, 3))]
    )
    (tmp_path / "in.tar").write_bytes(tar_bytes([("a.jpg", data.getvalue()), ("a.txt", "a phone's photo")]))
    build(str(tmp_path / "in.tar"), tmp_path / "out")
    assert rows(tmp_path / "out")[0]["image_format"] == "jpg"
