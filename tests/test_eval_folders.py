"""Users' own tasks: plain folders and tables give what the same images give in CLIP_benchmark's layout."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from eval import folders
from eval.samples import store_pixels
from eval.tasks import resolve_task, resolve_tasks, task_digest
from pipeline.core import clip_model
from pipeline.core.errors import ConfigError
from tests.task_fixture import failure, picture, scored, write_files, write_tars

BIRDS = {  # in the order of their names
    "great_tit/1.png": picture(1),
    "great_tit/young/2.PNG": picture(2),
    "kite/a.b.jpeg": picture(3, "JPEG"),
    "kite/c.webp": picture(4, "WEBP"),
    "n01440764/x.jpg": picture(5, "JPEG"),
}
LABELS = (0, 0, 1, 1, 2)
CAPTIONS = {
    "a.png": ["a boat", "a boat, far away"],
    "trips/b.png": ['a "blue" star'],
    "trips/c.png": ["a tree\nin two lines", "a boat", "drei B\u00e4ume"],
}


@pytest.fixture
def birds(tmp_path) -> str:
    return write_files(tmp_path / "birds", BIRDS)


def table(rows: list[tuple[str, str]]) -> str:
    quoted = [f'{name},"{caption.replace(chr(34), chr(34) * 2)}"\n' for name, caption in rows]
    return "filename,caption\n" + "".join(quoted)


def photos(folder) -> str:
    """A folder of images with captions; one more image that no line names; lines of one image stand apart."""
    rows = [(name, captions[at]) for at in range(3) for name, captions in CAPTIONS.items() if at < len(captions)]
    images = {name: picture(number) for number, name in enumerate(CAPTIONS)}
    return write_files(folder, {"captions.csv": table(rows), "other.png": picture(50), **images})


def parquet(path, rows: list[dict], image_type=None, caption_type=None) -> str:
    schema = pa.schema([("image", image_type or pa.binary()), ("caption", caption_type or pa.list_(pa.string()))])
    pq.write_table(pa.Table.from_pylist(rows, schema), path)
    return str(path)


# A folder for each class


def test_five_lines_of_yaml_are_a_task(tmp_path, birds, model_folder):
    text = f"""
    tasks:
      - name: birds
        path: {birds}
        templates: ["a photo of a {{c}}, a bird."]
        classnames: {{n01440764: tench, kite: red kite, great_tit: great tit}}
        metric: mean_per_class_recall
    """
    (data,) = resolve_tasks(yaml.safe_load(text)["tasks"])
    assert (data.classnames, data.class_folders) == (
        ("great tit", "red kite", "tench"),
        ("great_tit", "kite", "n01440764"),
    )
    assert (data.shards, data.task.type, data.chance) == (("0",), "zeroshot_classification", pytest.approx(1 / 3))
    metrics, rows, facts = scored(model_folder, data, tmp_path / "out", threads=2, batch_size=2)
    assert [(row["item"], row["label"]) for row in rows] == list(zip(BIRDS, LABELS, strict=True))

    members = [
        member
        for row, (name, image) in enumerate(BIRDS.items())
        for member in ((f"s{row}.{name.rpartition('.')[2]}", image), (f"s{row}.cls", str(LABELS[row]).encode()))
    ]
    files = {"classnames.txt": "great tit\nred kite\ntench\n"}
    files["zeroshot_classification_templates.txt"] = "a photo of a {c}, a bird.\n"
    same = resolve_task({"name": "birds", "path": write_tars(tmp_path / "same", [members], files)})
    expected, expected_rows, _ = scored(model_folder, same, tmp_path / "expected")
    assert metrics == expected
    assert facts["value"] == metrics["mean_per_class_recall"]
    assert [row["top5"] for row in rows] == [row["top5"] for row in expected_rows]


def test_names_of_folders_are_names_of_classes(tmp_path, birds):
    data = resolve_task("birds", str(tmp_path))
    assert data.classnames == ("great tit", "kite", "n01440764")
    assert data.templates == ("a photo of a {c}.",)
    listed = resolve_task({"name": "birds", "path": birds, "classnames": ["A", "B", "C"]})
    assert listed.classnames == ("A", "B", "C")
    more = resolve_task(
        {"name": "b", "path": birds, "classnames": {name: name for name in ("kite", "n01440764", "great_tit", "owl")}}
    )
    assert more.class_folders == ("great_tit", "kite", "n01440764", "owl")  # a class without an image is a candidate


def test_runs_of_images_are_shards(tmp_path, birds, model_folder, monkeypatch):
    whole = resolve_task("birds", str(tmp_path))
    near = scored(model_folder, whole, tmp_path / "near")
    monkeypatch.setattr(folders, "FILES_A_SHARD", 2)
    data = resolve_task("birds", str(tmp_path))
    assert data.shards == ("0", "1", "2")
    assert task_digest(data) == task_digest(whole)
    preprocess = clip_model.preprocess_config(clip_model.load({"folder": model_folder}).model)
    stored = [store_pixels(data, shard, preprocess, str(tmp_path / "pixels")) for shard in data.shards]
    assert [facts["images"] for facts in stored] == [2, 2, 1]
    far = scored(model_folder, data, tmp_path / "far", pixels_paths=[str(tmp_path / "pixels")])
    assert near[:2] == far[:2]


def test_hidden_files_are_no_images(tmp_path, birds):
    before = task_digest(resolve_task("birds", str(tmp_path)))
    write_files(
        tmp_path / "birds",
        {".DS_Store": b"x", "kite/.thumbs/1.jpg": b"x", "__MACOSX/kite/._c.webp": b"x", "README.md": "x"},
    )
    data = resolve_task("birds", str(tmp_path))
    assert data.classnames == ("great tit", "kite", "n01440764")
    assert task_digest(data) == before


@pytest.mark.parametrize(
    "files, settings, message",
    [
        ({"kite/labels.txt": "x"}, {}, r"birds/kite/labels.txt is no image, expected nothing else in a class's folder"),
        ({"z.jpg": b"x"}, {}, r"birds/z.jpg lies beside the classes' folders, expected it in one of them"),
        ({}, {"classnames": ["a", "b"]}, r"classnames has 2 names, expected 3, one for each folder of"),
        (
            {},
            {"classnames": {"kite": "a", "great_tit": "b", "n0144": "c"}},
            r"lacks n01440764, a folder of .* Did you mean",
        ),
        ({}, {"metric": "acc5"}, r"metric = acc5, expected one of zeroshot_classification"),
        ({}, {"type": "retrieval"}, r"birds lacks captions.csv or .parquet files"),
    ],
)
def test_folders_that_make_no_sense(tmp_path, birds, files, settings, message):
    write_files(tmp_path / "birds", files)
    with pytest.raises(ConfigError, match=message):
        resolve_task({"name": "birds", "path": birds, **settings})


def test_a_folder_of_nothing_says_what_a_task_can_be(tmp_path):
    (tmp_path / "void" / "kite").mkdir(parents=True)
    with pytest.raises(
        ConfigError, match=r"0 sub-folders of images, expected one a class, captions.csv with captions, or CLIP_b"
    ):
        resolve_task("void", str(tmp_path))
    write_files(tmp_path / "void", {"kite/1.png": picture(1)})
    with pytest.raises(ConfigError, match=r"1 sub-folders of images, expected one a class"):
        resolve_task("void", str(tmp_path))


def test_a_broken_image_is_named(tmp_path, birds, model_folder):
    (tmp_path / "birds" / "kite" / "c.webp").write_bytes(BIRDS["kite/c.webp"][:50])
    error = failure(model_folder, resolve_task("birds", str(tmp_path)), tmp_path / "out")
    assert error.startswith(f"task birds: {birds}/kite/c.webp: ")


def test_the_digest_of_a_folder_follows_names_images_and_prompts(tmp_path, birds):
    def digest(**settings) -> str:
        return task_digest(resolve_task({"name": "birds", "path": birds, **settings}))

    before = digest()
    write_files(tmp_path / "again", dict(reversed(BIRDS.items())))
    assert task_digest(resolve_task("again", str(tmp_path))) == before
    assert digest(classnames=["great tit", "kite", "n01440764"]) == before
    found = {before, digest(templates=["{c}"]), digest(classnames=["great tit", "red kite", "tench"])}
    (tmp_path / "birds" / "kite" / "c.webp").rename(tmp_path / "birds" / "great_tit" / "c.webp")
    found.add(digest())
    write_files(tmp_path / "birds", {"great_tit/c.webp": picture(9, "WEBP")})
    found.add(digest())
    assert len(found) == 5


def test_large_folders_are_known_by_sizes_and_stamps(tmp_path, birds, monkeypatch):
    data = resolve_task("birds", str(tmp_path))
    monkeypatch.setattr("eval.tasks.HASHED_BYTES", 10)
    before = task_digest(data)
    assert task_digest(data) == before
    path = tmp_path / "birds" / "kite" / "c.webp"
    path.touch()
    assert task_digest(data) != before


# Captions


def expected_photos(tmp_path, model_folder):
    members = [
        member
        for row, (name, captions) in enumerate(CAPTIONS.items())
        for member in (
            (f"{row}.png", picture(list(CAPTIONS).index(name))),
            (f"{row}.txt", "\n".join(caption.replace("\n", " ") for caption in captions).encode()),
        )
    ]
    path = write_tars(tmp_path / "tars", [members], {"dataset_type.txt": "retrieval\n"})
    return scored(model_folder, resolve_task({"name": "photos", "path": path}), tmp_path / "expected")


def test_a_table_of_captions_is_a_task_of_retrieval(tmp_path, model_folder):
    path = photos(tmp_path / "photos")
    metrics, rows, facts = scored(model_folder, resolve_task("photos", str(tmp_path)), tmp_path / "out")
    expected, expected_rows, expected_facts = expected_photos(tmp_path, model_folder)
    assert metrics == expected
    assert [row["hit@1"] for row in rows] == [row["hit@1"] for row in expected_rows]
    assert [row["item"] for row in rows[:4]] == [*CAPTIONS, "a.png#0"]
    assert (facts["images"], facts["captions"]) == (3, 6)
    chance = (1 / 3 + (2 / 6 + 1 / 6 + 3 / 6) / 3) / 2
    assert facts["chance"] == expected_facts["chance"] == pytest.approx(chance)

    by_file = resolve_task({"name": "photos", "path": f"{path}/captions.csv", "type": "retrieval", "chance": 0.25})
    assert scored(model_folder, by_file, tmp_path / "by_file")[:2] == (metrics, rows)
    assert by_file.chance == 0.25
    assert task_digest(by_file) == task_digest(resolve_task("photos", str(tmp_path)))


@pytest.mark.parametrize(
    "text, message",
    [
        ("file,caption\na.png,x\n", r"captions.csv:1: no column filename, expected a header with filename, caption"),
        ("filename,caption\na.png,x\nb.png,y\n", r"captions.csv:3: filename = b.png, expected an image below"),
        (
            "filename,caption\n../birds/kite/c.webp,x\n",
            r"captions.csv:2: filename = ../birds/kite/c.webp, expected an image",
        ),
        ("filename,caption\na.png,x, y\n", r"captions.csv:2: expected 2 fields as in the header, and quotes"),
        ("filename,caption\na.png\n", r"captions.csv:2: expected 2 fields"),
        ('filename,caption\na.png,"x\nb.png,y\n', r"captions.csv:2: expected comma-separated values"),
        ("filename,caption\na.png, \n", r"captions.csv:2: caption is blank, expected a caption"),
        ("filename,caption\n", r"captions.csv has no rows"),
        ("", r"captions.csv:1: no column filename"),
        (b"filename,caption\na.png,\xff\n", r"captions.csv: expected text in UTF-8"),
        ("filename,caption\ncaptions.csv,x\n", r"captions.csv:2: filename = captions.csv, expected an image"),
    ],
)
def test_tables_that_make_no_sense_are_named_by_line(tmp_path, birds, text, message):
    photos(tmp_path / "photos")
    (tmp_path / "photos" / "captions.csv").write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_task("photos", str(tmp_path))
    assert "\n" not in str(caught.value)


def test_prompts_have_no_effect_on_retrieval(tmp_path):
    photos(tmp_path / "photos")
    entry = {"name": "photos", "path": str(tmp_path / "photos"), "templates": ["{c}"]}
    with pytest.raises(ConfigError, match=r"eval.tasks.templates has no effect on a task of retrieval"):
        resolve_task(entry)


def parquet_rows() -> list[dict]:
    return [{"image": picture(row), "caption": captions} for row, captions in enumerate(CAPTIONS.values())]


def test_parquet_files_with_images_and_captions_are_a_task_of_retrieval(tmp_path, model_folder):
    rows = parquet_rows()
    (tmp_path / "photos").mkdir()
    parquet(tmp_path / "photos" / "0.parquet", rows[:2])
    as_hub = [{"image": {"bytes": row["image"], "path": "x.png"}, "caption": row["caption"]} for row in rows[2:]]
    hub_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    parquet(tmp_path / "photos" / "1.parquet", as_hub, hub_type)
    data = resolve_task("photos", str(tmp_path))
    assert data.shards == ("0.parquet", "1.parquet")
    metrics, found, facts = scored(model_folder, data, tmp_path / "out")
    expected, expected_rows, _ = expected_photos(tmp_path, model_folder)
    assert (metrics, facts["captions"]) == (expected, 6)
    assert [row["hit@1"] for row in found] == [row["hit@1"] for row in expected_rows]
    assert [row["item"] for row in found[:3]] == ["0/0", "0/1", "1/0"]
    preprocess = clip_model.preprocess_config(clip_model.load({"folder": model_folder}).model)
    for shard in data.shards:
        store_pixels(data, shard, preprocess, str(tmp_path / "pixels"))
    assert scored(model_folder, data, tmp_path / "far", pixels_paths=[str(tmp_path / "pixels")])[:2] == (metrics, found)

    flat = [{"image": row["image"], "caption": row["caption"][0]} for row in rows]
    one = resolve_task({"name": "one", "path": parquet(tmp_path / "flat.parquet", flat, caption_type=pa.string())})
    assert scored(model_folder, one, tmp_path / "one")[2]["captions"] == 3
    assert task_digest(one) != task_digest(data)


def test_parquet_that_makes_no_sense(tmp_path, model_folder):
    pq.write_table(pa.table({"jpg": [b"x"], "caption": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet: no column image, expected image \(bytes\) and caption"):
        resolve_task({"name": "a", "path": str(tmp_path / "a.parquet")})
    (tmp_path / "b.parquet").write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match=r"b.parquet: expected a parquet file"):
        resolve_task({"name": "b", "path": str(tmp_path / "b.parquet")})
    write_files(tmp_path / "both", {"captions.csv": "filename,caption\n", "0.parquet": b""})
    with pytest.raises(ConfigError, match=r"both holds captions.csv and parquet files, expected one of them"):
        resolve_task("both", str(tmp_path))
    for number, row in enumerate(({"image": None, "caption": ["x"]}, {"image": picture(1), "caption": []})):
        path = parquet(tmp_path / f"c{number}.parquet", [*parquet_rows(), row])
        error = failure(model_folder, resolve_task({"name": "c", "path": path}), tmp_path / "out")
        assert error.startswith(f"task c: {path}: row 3: {'image' if number == 0 else 'caption'} holds no"), error


# Object stores, and the whole way


def test_plain_folders_on_an_object_store(tmp_path, birds, model_folder, s3_url):
    import fsspec

    photos(tmp_path / "photos")
    parquet(tmp_path / "rows.parquet", parquet_rows())
    fs = fsspec.filesystem("s3")
    for name in ("birds", "photos"):
        fs.put(str(tmp_path / name) + "/", f"{s3_url}/tasks/{name}/", recursive=True)
    fs.put_file(str(tmp_path / "rows.parquet"), f"{s3_url}/tasks/rows.parquet")
    near = [resolve_task(name, str(tmp_path)) for name in ("birds", "photos")]
    far = [resolve_task(name, f"{s3_url}/tasks") for name in ("birds", "photos")]
    near.append(resolve_task({"name": "rows", "path": str(tmp_path / "rows.parquet")}))
    far.append(resolve_task({"name": "rows", "path": f"{s3_url}/tasks/rows.parquet"}))
    for here, there in zip(near, far, strict=True):
        assert task_digest(here) == task_digest(there)
        assert (
            scored(model_folder, here, tmp_path / here.name / "near")[:2]
            == scored(model_folder, there, tmp_path / here.name / "far")[:2]
        )


@pytest.mark.real_data
def test_real_images_as_a_plain_folder_score_as_their_tar(tmp_path, model_folder, real_data_path):
    import tarfile

    source = real_data_path / "zeroshot" / "trashnet"
    names = (source / "classnames.txt").read_text().split("\n")
    with tarfile.open(source / "test" / "0.tar") as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    images = {}
    for name, label in ((name, int(data)) for name, data in files.items() if name.endswith(".cls")):
        stem = name.removesuffix(".cls")
        (image,) = (other for other in files if other.startswith(stem) and other != name)
        images[f"{label:02d}/{image}"] = files[image]
    prompts = (source / "zeroshot_classification_templates.txt").read_text().split("\n")
    entry = {
        "name": "trashnet",
        "path": write_files(tmp_path / "plain", images),
        "classnames": {f"{label:02d}": name for label, name in enumerate(names) if name},
        "templates": [prompt for prompt in prompts if prompt],
    }
    plain = scored(model_folder, resolve_task(entry), tmp_path / "out")
    tars = scored(model_folder, resolve_task({"name": "trashnet", "path": str(source)}), tmp_path / "expected")
    assert plain[2]["images"] == tars[2]["images"] == 510
    assert {**plain[0]} == pytest.approx(tars[0], abs=1e-9)
