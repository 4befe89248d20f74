"""Tables of URLs as sources: every format gives the same samples, and nothing that a table holds loses a row."""

from __future__ import annotations

import csv
import datetime
import decimal
import gzip
import io
import json
import os
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core import pool, storage
from pipeline.core.errors import ConfigError, WinnowError
from stages.ingest import pool_shards, sources, url_table

NUM_ROWS = 23
HASH = "AB" * 32


def parsed(value):
    return sources.parse(value, "pool.source")


def samples(value, shard_size=10):
    """All samples of the source, unit after unit."""
    units = sources.plan_units(parsed(value), shard_size)
    found = [list(url_table.read(unit)) for unit in units]
    return [sample for unit in found for sample in unit]


def plain(sample):
    """What the sample says beside its name in the file."""
    return {
        name: value for name, value in vars(sample).items() if name not in ("key", "detail")
    }  # fmt: skip


def table_rows():
    rows = []
    for number in range(NUM_ROWS):
        rows.append(
            {
                "uid": f"{number:032x}",
                "url": f"https://example.org/ä b/{number}.jpg?x=1,2",
                "text": f'picture, "{number}"\nwith a second line',
                "original_width": 640 + number,
                "original_height": 480,
                "score": number / 4,
                "sha256": HASH if number % 3 else "not a hash",
                "face_bboxes": [[0.1, 0.2, 0.3, 0.5]] * (number % 3),
            }
        )
    return rows


def written(folder, kind, rows):
    """The path of a table of this kind with the rows."""
    folder.mkdir(exist_ok=True)
    path = folder / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
        return path
    text = io.StringIO()
    if kind.startswith(("csv", "tsv")):
        flat = [{**row, "face_bboxes": json.dumps(row["face_bboxes"])} for row in rows]
        if kind.startswith("csv"):
            writer = csv.DictWriter(text, list(rows[0]))
            writer.writeheader()
            writer.writerows(flat)
        else:
            lines = [list(rows[0]), *[[str(value) for value in row.values()] for row in flat]]
            text.write("\n".join("\t".join(line) for line in lines))
    elif kind.startswith("jsonl"):
        text.write("\n\n".join(json.dumps(row) for row in rows))
    else:
        json.dump(rows, text, indent=1, ensure_ascii=False)
    data = b"\xef\xbb\xbf" + text.getvalue().encode()
    path.write_bytes(gzip.compress(data) if kind.endswith(".gz") else data)
    return path


KINDS = ("csv", "tsv", "json", "jsonl", "csv.gz", "tsv.gz", "json.gz", "jsonl.gz")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shard_size", [4, 1000])
def test_every_format_gives_the_same_samples(tmp_path, kind, shard_size):
    rows = table_rows()
    if kind.startswith("tsv"):
        rows = [{**row, "text": row["text"].replace("\n", " ")} for row in rows]
    carry = {"score": "float32"}
    one = {"path": str(written(tmp_path / "parquet", "parquet", rows)), "carry": carry}
    other = {"path": str(written(tmp_path / "text", kind, rows)), "carry": carry}
    expected, found = samples(one, shard_size), samples(other, shard_size)
    assert [plain(sample) for sample in found] == [plain(sample) for sample in expected]
    assert [sample.uid for sample in found] == [row["uid"] for row in rows]
    last = plain(found[-1])
    assert last == {
        "image": None, "caption": rows[-1]["text"], "uid": rows[-1]["uid"], "url": rows[-1]["url"],
        "original_width_px": 662, "original_height_px": 480, "error": None,
        "carried": {"score": 5.5, "expected_sha256": HASH.lower(), "face_bboxes": "[[0.1,0.2,0.3,0.5]]"},
    }  # fmt: skip
    assert found[0].carried["expected_sha256"] is None
    assert found[0].carried["face_bboxes"] == "[]"
    columns = {"score": "float32", "expected_sha256": "string", "face_bboxes": "string"}
    assert sources.carried_columns(parsed(one)) == sources.carried_columns(parsed(other)) == columns
    if kind in ("csv", "tsv", "jsonl"):
        assert len(sources.plan_units(parsed(other), shard_size)) == -(-NUM_ROWS // shard_size)


def test_tables_without_a_header(tmp_path):
    (tmp_path / "cc3m.tsv").write_text('a "cat"\thttp://x.org/1.jpg\n\ttwo\n\nlost\n dog\thttp://x.org/2.jpg\n')
    found = samples({"path": str(tmp_path / "cc3m.tsv"), "carry": {"original_name": "string"}}, shard_size=2)
    assert [(one.caption, one.url, one.error) for one in found] == [
        ('a "cat"', "http://x.org/1.jpg", None), (None, "two", "missing_caption"),
        (None, None, "bad_table"), (" dog", "http://x.org/2.jpg", None),
    ]  # fmt: skip
    assert [one.key for one in found] == ["line 1", "line 2", "line 4", "line 5"]
    (tmp_path / "cc12m.csv").write_text("https://x.org/1.jpg,a cat\nhttps://x.org/2.jpg,a dog\n")
    assert [one.caption for one in samples(str(tmp_path / "cc12m.csv"))] == ["a cat", "a dog"]
    (tmp_path / "three.tsv").write_text("1\thttp://x.org/1.jpg\ta cat\n")
    with pytest.raises(ConfigError, match="caption_column is none of .*; set caption_column to one of 0, 1, 2"):
        parsed(str(tmp_path / "three.tsv"))
    found = samples({"path": str(tmp_path / "three.tsv"), "caption_column": "2", "carry": {"0": "int32"}})
    assert (found[0].caption, found[0].carried) == ("a cat", {"0": 1})


def test_broken_rows_of_a_csv_cost_only_themselves(tmp_path):
    text = b'url,text\nu0,"fine\nstill"\nu1,"open\nu2,two\nu3,a "b" c\nu4,"x"y\nu5,nul\0\nu6\nu7,a,b\n\nu8,\xff\n,x\nu9,"end'
    (tmp_path / "a.csv").write_bytes(text.replace(b"\n", b"\r\n"))
    for shard_size in (1, 3, 100):
        found = samples(str(tmp_path / "a.csv"), shard_size)
        assert [(one.url, one.error) for one in found] == [
            ("u0", None), (None, "bad_table"), ("u2", None), ("u3", None), (None, "bad_table"), (None, "bad_table"),
            (None, "bad_table"), (None, "bad_table"), ("u8", "bad_caption"), ("", "missing_url"), (None, "bad_table"),
        ]  # fmt: skip
        assert found[0].caption == "fine\r\nstill"


def test_broken_json_is_a_failed_row(tmp_path):
    lines = ['{"url": "u0", "text": "a"}', "{", "[1]", '{"url": 5, "text": "b"}', '{"url": "u1", "text": ["c", "d"]}']
    lines += ["[" * 100_000, '{"url": "u\\ud800", "text": "e"}', '{"text": "no url", "url": null}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    found = samples(str(tmp_path / "a.jsonl"))
    assert [(one.url, one.caption, one.error) for one in found] == [
        ("u0", "a", None), (None, None, "bad_table"), (None, None, "bad_table"), (None, "b", "missing_url"),
        ("u1", "c", None), ("u1", "d", None), (None, None, "bad_table"), ("u?", "e", None),
        (None, "no url", "missing_url"),
    ]  # fmt: skip
    for text, errors in (
        ('[{"url": "u", "text": "t"}, 12, "x", {"url": "v", "text": "t"}]', [None, "bad_table", "bad_table", None]),
        ('[{"url": "u", "text": "t"}, {"url": ', [None, "bad_table"]),
        ('[{"url": "u", "text": "t"}; 1]', [None, "bad_table"]),
        ('[{"url": "u", "text": "t"}] x', [None, "bad_table"]),
        ('[{"url": "u", "text": "t"}, ' + "[" * 100_000, [None, "bad_table"]),
    ):
        (tmp_path / "b.json").write_text(text)
        assert [one.error for one in samples(str(tmp_path / "b.json"))] == errors, text[:60]
    (tmp_path / "b.json").write_text('{"url": "u", "text": "t"}')
    with pytest.raises(ConfigError, match="a file with one object a line is named .jsonl"):
        parsed(str(tmp_path / "b.json"))


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl", "json"])
def test_a_truncated_gzip_keeps_the_rows_before(tmp_path, kind):
    rows = [{"url": f"https://x.org/{os.urandom(8).hex()}", "text": f"picture {number}"} for number in range(5000)]
    path = written(tmp_path / "in", f"{kind}.gz", [{**row, "face_bboxes": []} for row in rows])
    path.write_bytes(path.read_bytes()[:-20_000])
    found = samples(str(path), 700)
    assert [one.error for one in found] == [None] * (len(found) - 1) + ["bad_table"]
    assert 1000 < len(found) < 5000
    assert [one.url for one in found[:-1]] == [row["url"] for row in rows[: len(found) - 1]]
    assert "ends early" in found[-1].detail


def test_times_decimals_and_nested_values_lose_no_row(tmp_path):
    moment = datetime.datetime(2020, 1, 2, 3, 4, 5, 678901)
    columns = {
        "url": pa.array(["u0", None, "u2"]),
        "text": pa.StringArray.from_buffers(
            3, pa.py_buffer(np.array([0, 1, 2, 3], "<i4")), pa.py_buffer(b"ab\xff")
        ),
        "seen": pa.array([1577934245678901234, None, -(2**62)], pa.int64()).cast(pa.timestamp("ns")),
        "zone": pa.array([moment] * 3, pa.timestamp("us", "UTC")),
        "nowhere": pa.array([1, 2, 3], pa.int64()).cast(pa.timestamp("us", "No/Where")),
        "day": pa.array([0, 1, 2**31 - 1], pa.int32()).cast(pa.date32()),
        "price": pa.array([decimal.Decimal("1.50")] * 3),
        "nested": pa.array([{"a": [1, 2], "b": moment}, None, {"a": [], "b": None}]),
        "kind": pa.array(["x", "y", "x"]).dictionary_encode(),
        "tags": pa.array([["p", "q"], [], None]),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    carry = dict.fromkeys(list(columns)[2:], "string") | {"price": "float32"}
    first, second, third = samples({"path": str(tmp_path / "a.parquet"), "carry": carry})
    assert first.carried["seen"] == "2020-01-02T03:04:05.678901234"
    assert first.carried["zone"] == "2020-01-02T03:04:05.678901Z"
    assert first.carried["day"] == "1970-01-01"
    assert first.carried["price"] == 1.5
    assert json.loads(first.carried["nested"]) == {"a": [1, 2], "b": moment.isoformat()}
    assert (first.carried["kind"], first.carried["tags"], second.carried["tags"]) == ("x", '["p", "q"]', "[]")
    assert (first.url, first.caption) == ("u0", "a")
    assert (second.error, second.carried["seen"], second.carried["kind"]) == ("missing_url", None, "y")
    assert first.carried["nowhere"] == "1970-01-01T00:00:00.000001Z"
    assert [one.error for one in (first, second, third)] == [None, "missing_url", "bad_caption"]


def datacomp(folder, num_rows=25, dim=6, dtype="f4", save=np.savez_compressed):
    """A table and its features as DataComp has them; returns the features."""
    folder.mkdir(exist_ok=True)
    rows = [{"uid": f"{number:032x}", "url": f"u{number}", "text": f"t{number}"} for number in range(num_rows)]
    table = pa.Table.from_pylist(rows)
    lists = [[number, 0.5] for number in range(num_rows)]
    table = table.append_column("pair", pa.array(lists, pa.list_(pa.float64())))
    pq.write_table(table, folder / "a.parquet", row_group_size=20)
    arrays = {
        key: np.random.default_rng(7).normal(size=(num_rows, dim)).astype(dtype) for key in ("l14_img", "b32_txt")
    }
    save(folder / "a.npz", **arrays)
    return arrays


@pytest.mark.parametrize("dtype, save", [("f4", np.savez_compressed), ("f2", np.savez), (">f8", np.savez_compressed)])
def test_features_are_read_by_position(tmp_path, dtype, save):
    arrays = datacomp(tmp_path / "in", dtype=dtype, save=save)
    value = {"path": str(tmp_path / "in" / "*.parquet"), "carry": {"l14_img": "float16[]", "pair": "float16[]"}}
    assert sources.carried_columns(parsed(value)) == {"l14_img": "float16[]", "pair": "float16[]"}
    units = sources.plan_units(parsed(value), 4)
    assert [(unit.start, unit.stop) for unit in units] == [
        (0, 4), (4, 8), (8, 12), (12, 16), (16, 20), (20, 24), (24, 25)
    ]  # fmt: skip
    expected = arrays["l14_img"].astype(np.float16)
    for order in (1, -1):  # units run in any order
        for unit in units[::order]:
            for row, sample in zip(range(unit.start, unit.stop), url_table.read(unit), strict=True):
                assert sample.url == f"u{row}"
                assert sample.carried["l14_img"].dtype == np.float16
                np.testing.assert_array_equal(sample.carried["l14_img"], expected[row])
                assert sample.carried["pair"].tolist() == [row, 0.5]
    assert "l14_img" not in next(url_table.read(units[0], vectors=False)).carried


def test_features_that_do_not_fit_the_table(tmp_path):
    value = {"path": str(tmp_path / "in"), "carry": {"l14_img": "float16[]"}}
    datacomp(tmp_path / "in")
    units = sources.plan_units(parsed(value), 10)
    broken = bytearray((tmp_path / "in" / "a.npz").read_bytes())
    broken[200:260] = bytes(60)
    (tmp_path / "in" / "a.npz").write_bytes(broken)
    with pytest.raises((WinnowError, ConfigError), match="l14_img"):
        [list(url_table.read(unit)) for unit in units]
    for arrays, message in (
        ({"l14_img": np.zeros((24, 6), "f4")}, r"l14_img in a.npz has 24 rows, expected the table's 25"),
        (
            {"other": np.zeros((25, 6), "f4")},
            r"no column l14_img, expected one of uid, .* a key of a.npz .* has no l14",
        ),
        ({"l14_img": np.zeros(25, "f4")}, r"is float32 of shape \(25,\), expected rows of float16"),
        ({"l14_img": np.zeros((25, 6), "i4")}, r"is int32 of shape"),
        ({"l14_img": np.array([[{}]] * 25)}, r"is object of shape"),
        ({"l14_img": np.zeros((25, 6), "f4", order="F")}, r"expected rows of float16"),
    ):
        np.savez(tmp_path / "in" / "a.npz", **arrays)
        with pytest.raises(ConfigError, match=message):
            parsed(value)
    os.unlink(tmp_path / "in" / "a.npz")
    with pytest.raises(ConfigError, match="which is not there"):
        parsed(value)


def test_digest_follows_tables_and_features(tmp_path):
    def digest(**options):
        return sources.source_digest(parsed({"path": str(tmp_path / "in"), **options})["source"])

    datacomp(tmp_path / "in")
    without, before = digest(), digest(carry={"l14_img": "float16[]"})
    assert before != without
    np.savez(tmp_path / "in" / "a.npz", l14_img=np.ones((25, 6), "f4"))
    assert digest() == without
    changed = digest(carry={"l14_img": "float16[]"})
    assert changed != before
    one_file = {"path": str(tmp_path / "in" / "a.parquet"), "carry": {"l14_img": "float16[]"}}
    assert sources.source_digest(parsed(one_file)["source"]) == changed
    table = pq.read_table(tmp_path / "in" / "a.parquet")
    pq.write_table(table.set_column(1, "url", pa.array(["v"] * 25)), tmp_path / "in" / "a.parquet")
    assert digest() != without


def image_parquet(path):
    pq.write_table(pa.table({"url": ["u"], "text": ["t"], "image": [b"x"]}), path)


def url_parquet(path, **columns):
    pq.write_table(pa.table({"URL": ["u"], "TEXT": ["t"], **columns}), path)


def test_layouts_are_recognised(tmp_path):
    for name in ("images", "urls", "texts"):
        (tmp_path / name).mkdir()
    image_parquet(tmp_path / "images" / "a.parquet")
    url_parquet(tmp_path / "urls" / "a.parquet")
    (tmp_path / "urls" / "README.md").write_text("x")
    (tmp_path / "texts" / "a.csv").write_text("URL,TEXT\nu,t\n")
    (tmp_path / "texts" / "b.csv.gz").write_bytes(gzip.compress(b"URL,TEXT\nv,t\n"))
    found = parsed({"one": str(tmp_path / "urls"), "two": str(tmp_path / "texts")})
    assert {source.layout for source in found.values()} == {"urls"}
    assert [one.url for one in samples(str(tmp_path / "texts"))] == ["u", "v"]
    assert parsed(str(tmp_path / "images"))["source"].layout == "parquet"
    assert parsed({"path": str(tmp_path / "images"), "layout": "urls"})["source"].url_column == "url"
    assert parsed({"path": str(tmp_path / "images"), "url_column": "url"})["source"].layout == "urls"
    with pytest.raises(ConfigError, match="either downloaded or read: web is a table of URLs, shop has layout parquet"):
        parsed({"web": str(tmp_path / "urls"), "shop": str(tmp_path / "images")})


@pytest.mark.parametrize(
    "value, message",
    [
        ({"path": "urls", "url_column": "link"}, r"no column link \(url_column\), expected one of URL, TEXT, size"),
        ({"path": "urls", "url_column": "size"}, "url_column size is int64, expected text"),
        ({"path": "urls", "caption_column": "size"}, "caption_column size is int64, expected text or a list"),
        ({"path": "urls", "sha256_column": "hash"}, r"no column hash \(sha256_column\)"),
        ({"path": "urls", "face_boxes_column": "size"}, "face_boxes_column size is int64, expected lists of four"),
        ({"path": "urls", "carry": {"sizes": "int32"}}, "no column sizes, expected one of URL, TEXT, size"),
        ({"path": "urls", "carry": {"size": "float16[]"}}, r"carry.size = float16\[\]: size is int64, expected a list"),
        ({"path": "boxes", "carry": {"face_bboxes": "string"}}, "carry.face_bboxes: the pool has a column of this name"),
        ({"path": "urls", "image_column": "URL", "layout": "urls"}, "image_column has no effect with layout urls"),
        ({"path": "twice", }, "url_column could be URL or url; set url_column to one of"),
        ({"path": "kinds", }, r"expected tables of one kind; found .csv and .jsonl: give a pattern such as \*.csv"),
        ({"path": "pictures", "layout": "urls"}, "expected tables of one kind; found .png"),
        ({"path": "kinds/a.csv", "carry": {"TEXT": "float16[]"}}, "a csv has no vectors"),
        ({"path": "utf16.csv"}, "none can be read as one .*UTF-16, expected UTF-8"),
        ({"path": "broken.csv.gz"}, "none can be read as one .*[Nn]ot a gzipped file"),
        ({"path": "empty.csv"}, "none can be read as one .*no rows"),
        ({"path": "repeated.csv"}, "none can be read as one .*two columns url"),
        ({"path": "demo.csv"}, "url_column is none of URL, url"),
    ],
)  # fmt: skip
def test_wrong_tables_are_config_errors(tmp_path, monkeypatch, value, message):
    monkeypatch.chdir(tmp_path)
    for name in ("urls", "boxes", "twice", "kinds", "pictures"):
        (tmp_path / name).mkdir()
    url_parquet(tmp_path / "urls" / "a.parquet", size=[1])
    url_parquet(tmp_path / "boxes" / "a.parquet", face_bboxes=["[]"])
    url_parquet(tmp_path / "twice" / "a.parquet", url=["u"])
    (tmp_path / "kinds" / "a.csv").write_text("URL,TEXT\nu,t\n")
    (tmp_path / "kinds" / "a.jsonl").write_text('{"URL": "u", "TEXT": "t"}')
    (tmp_path / "pictures" / "a.png").write_bytes(b"x")
    (tmp_path / "utf16.csv").write_bytes("url,text\n".encode("utf-16"))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "broken.csv.gz").write_text("url,text\nu,t\n")
    (tmp_path / "repeated.csv").write_text("url,url,text\n")
    (tmp_path / "demo.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ConfigError, match=message) as caught:
        parsed(value)
    assert "\n" not in str(caught.value)


def test_face_boxes_that_can_not_be_read_fail_the_row(tmp_path):
    boxes = ["[[0,0,1,1]]", "", "null", "[[0,0,1]]", "x", '["1234"]', "[[0,0,1,NaN]]", "{}"]
    rows = [f'u{number},t,"{text.replace(chr(34), chr(34) * 2)}"\n' for number, text in enumerate(boxes)]
    (tmp_path / "a.csv").write_text("url,text,face_bboxes\n" + "".join(rows))
    found = samples(str(tmp_path / "a.csv"))
    assert [one.carried["face_bboxes"] for one in found] == ["[[0.0,0.0,1.0,1.0]]"] + [None] * 7
    assert [one.error for one in found] == [None] * 3 + ["bad_metadata"] * 5


def test_unreadable_files_among_others_are_failed_rows(tmp_path):
    url_parquet(tmp_path / "b.parquet")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 broken")
    assert [one.error for one in samples(str(tmp_path))] == ["bad_table", None]
    (tmp_path / "texts").mkdir()
    (tmp_path / "secret").write_text("url,text\nsecret,secret\n")
    (tmp_path / "texts" / "a.csv").symlink_to(tmp_path / "secret")
    (tmp_path / "texts" / "b.csv").write_text("url,text\nu,t\n")
    (tmp_path / "texts" / "c.csv").write_text("url,text\n")
    assert [(one.url, one.error) for one in samples(str(tmp_path / "texts"))] == [(None, "unsafe_file"), ("u", None)]


def test_a_broken_row_group_costs_its_own_rows(tmp_path):
    rows = [{"url": f"https://x.org/{os.urandom(8).hex()}", "text": f"t{number}"} for number in range(400)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=100, use_dictionary=False)
    column = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1).column(0)
    data = bytearray((tmp_path / "a.parquet").read_bytes())
    start = column.data_page_offset
    data[start : start + column.total_compressed_size] = bytes(column.total_compressed_size)
    (tmp_path / "a.parquet").write_bytes(data)
    found = samples(str(tmp_path / "a.parquet"), 30)
    assert [one.error for one in found] == [None] * 100 + ["bad_table"] * 100 + [None] * 200
    assert [one.url for one in found[200:]] == [row["url"] for row in rows[200:]]


def test_a_large_row_group_is_read_in_little_memory(tmp_path):
    num_rows = 300_000
    rng = np.random.default_rng(0)
    text = rng.bytes(16 * num_rows).hex()
    uids = [text[start : start + 32] for start in range(0, len(text), 32)]
    urls = [f"https://example.org/{uid}" for uid in uids]
    pq.write_table(pa.table({"uid": uids, "url": urls, "text": urls}), tmp_path / "a.parquet", row_group_size=num_rows)
    del urls, text
    units = sources.plan_units(parsed(str(tmp_path / "a.parquet")), 10_000)
    assert [(unit.start, unit.stop) for unit in units] == [
        (start, start + 10_000) for start in range(0, num_rows, 10_000)
    ]
    tracemalloc.start()
    before = pa.total_allocated_bytes()
    largest = 0
    for unit in (units[0], units[15], units[-1]):
        for row, sample in enumerate(url_table.read(unit), unit.start):
            if sample.uid != uids[row]:
                raise AssertionError(f"row {row}: {sample}")
            if row % 1000 == 0:
                largest = max(largest, pa.total_allocated_bytes() - before)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 16 << 20
    assert largest < 16 << 20


def test_tables_on_s3(tmp_path, s3_url):
    datacomp(tmp_path / "in")
    written(tmp_path / "text", "csv.gz", table_rows())
    for folder in ("in", "text"):
        for name in os.listdir(tmp_path / folder):
            storage.write_bytes(f"{s3_url}/{folder}/{name}", (tmp_path / folder / name).read_bytes())
    for folder, carry in (("in/*.parquet", {"l14_img": "float16[]"}), ("text", {})):
        here = samples({"path": f"{tmp_path}/{folder}", "carry": carry}, 7)
        there = samples({"path": f"{s3_url}/{folder}", "carry": carry}, 7)
        assert len(here) in (25, NUM_ROWS)
        assert [(one.url, one.caption) for one in here] == [(one.url, one.caption) for one in there]
        if carry:
            assert all((a.carried["l14_img"] == b.carried["l14_img"]).all() for a, b in zip(here, there, strict=True))


@pytest.mark.real_data
@pytest.mark.parametrize("name, num_rows, blank", [("laion_alt_text", 9000, 0), ("cc3m_validation", 14249, 0)])
def test_real_metadata(real_data_path, name, num_rows, blank):
    path = real_data_path / "web_metadata" / f"{name}.parquet"
    table = pq.read_table(path)
    found = samples(str(path), 1000)
    assert len(found) == num_rows
    assert [one.url for one in found] == table["url"].to_pylist()
    assert [one.uid for one in found] == table["uid"].to_pylist()
    assert sum(one.error is not None for one in found) == blank
    assert [one.caption for one in found] == table["text"].to_pylist()


def odd_table(**columns):
    """A table of six usable rows as DataComp has them, with values that need care; `columns` replace some."""
    table = {
        "uid": pa.array([f"{number:031X}A" for number in range(6)]),
        "url": pa.array(["http://x.org/ä", " u", "\x1cu", "u\tv", "u", "u"]),
        "text": pa.array(["a", "\xa0b\xa0", "é", "\u200b", "\x00", "猫"]),
        "original_width": pa.array([1, 0, -5, 1 << 31, (1 << 31) - 1, None], pa.int64()),
        "original_height": pa.array([7, 7, 7, 7, 7, 7], pa.int64()),
        "similarity": pa.array([0.1, float("nan"), None, float("-inf"), 1e300, -0.0], pa.float64()),
        "score": pa.array([0.1, float("nan"), None, 3.0, 2.0, 1.0], pa.float32()),
        "rank": pa.array([1, 2, None, 4, 5, 6], pa.int16()),
        "note": pa.array(["x", None, "", "ä", "y", "z"], pa.large_string()),
        "flag": pa.array([True, None, False, True, True, True]),
        "sha256": pa.array(["AB" * 32, "ab" * 32, None, "", "g" * 64, "a" * 63]),
        "face_bboxes": pa.array(
            [[], None, [[0.1, 0.2, 0.3, 1.0]], [[1e-7, 2, 3, 4], [0.0, -0.0, 1 / 3, 1e22]], [], []],
            pa.list_(pa.list_(pa.float64())),
        ),
    }
    return pa.table(table | columns)


ODD_CARRY = {
    "similarity": "float32", "score": "float64", "rank": "int64", "note": "string", "flag": "bool", "l14_img": "float16[]"
}  # fmt: skip


def odd_pieces(folder, table, **options):
    """The pieces of the table, read as one unit, and the samples that they stand for."""
    pq.write_table(table, folder / "a.parquet")
    np.savez(folder / "a.npz", l14_img=np.random.default_rng(1).normal(size=(len(table), 4)))
    value = {"path": str(folder / "a.parquet"), "carry": ODD_CARRY, "layout": "urls", **options}
    (unit,) = sources.plan_units(parsed(value), 1000)
    pieces = list(url_table.read_pieces(unit))
    found = [sample for piece in pieces for sample in piece.samples()]
    assert [repr(one) for one in found] == [repr(one) for one in url_table.read(unit)]
    return unit, pieces, found


def test_columns_of_a_batch_say_what_its_samples_say(tmp_path):
    unit, (piece,), found = odd_pieces(tmp_path, odd_table())
    columns = piece.columns
    assert len(columns) == 6 and all(sample.error is None for sample in found)
    for row, sample in zip(columns.to_pylist(), found, strict=True):
        expected = {
            "url": sample.url, "caption": sample.caption, **sample.carried,
            "original_width_px": sample.original_width_px, "original_height_px": sample.original_height_px,
        }  # fmt: skip
        assert set(row) == set(expected)
        for name, value in expected.items():
            if name == "l14_img":
                np.testing.assert_array_equal(np.array(row[name], np.float16), value)
            else:
                assert repr(row[name]) == repr(value), name
    ids = url_table.given_uids(unit)
    assert [one.ljust(16, b"\0").hex() for one in ids.tolist()] == [sample.uid for sample in found]


@pytest.mark.parametrize(
    "columns",
    [
        {"url": pa.array(["u", None, "u", "u", "u", "u"])},
        {"url": pa.array(["u", " \t\r", "u", "u", "u", "u"])},
        {"url": pa.array(["u"] * 6).dictionary_encode()},
        {"text": pa.array(["t", None, "t", "t", "t", "t"])},
        {"text": pa.array(["t", "\xa0\u3000", "t", "t", "t", "t"])},
        {"text": pa.array(["t", "\x1c", "t", "t", "t", "t"])},
        {"text": pa.array(["t", "t" * (1 << 20) + "t", "t", "t", "t", "t"])},
        {"text": pa.array([["t", "u"]] * 6)},
        {"text": pa.array([b"t", b"\xff"] * 3).cast(pa.binary())},
        {"original_width": pa.array([1.5] * 6)},
        {"rank": pa.array([1 << 63] * 6, pa.uint64())},
        {"rank": pa.array(["7"] * 6)},
        {"score": pa.array([7] * 6)},
        {"flag": pa.array(["true"] * 6)},
        {"note": pa.array([7] * 6)},
        {"face_bboxes": pa.array([[[0.0, 1.0, 2.0]]] * 6, pa.list_(pa.list_(pa.float64())))},
        {"face_bboxes": pa.array([[[0.0, 1.0, 2.0, float("inf")]]] * 6, pa.list_(pa.list_(pa.float64())))},
        {"face_bboxes": pa.array([[None]] * 6, pa.list_(pa.list_(pa.float64())))},
        {"face_bboxes": pa.array(["[]"] * 6)},
    ],
)
def test_a_batch_with_an_unusual_row_is_read_row_by_row(tmp_path, columns):
    _, pieces, found = odd_pieces(tmp_path, odd_table(**columns))
    assert [piece.columns for piece in pieces] == [None]
    assert len(found) == (12 if pa.types.is_list(columns.get("text", pa.array([""])).type) else 6)


def test_uids_that_are_none_are_derived_or_fail(tmp_path):
    table = odd_table(uid=pa.array(["0" * 32, "7", None, "g" * 32, "0" * 33, "0" * 32]))
    unit, (piece,), found = odd_pieces(tmp_path, table)
    assert piece.columns is not None and url_table.given_uids(unit) is None
    assert [sample.uid is None for sample in found] == [False, True, True, True, True, False]
    _, (piece,), found = odd_pieces(tmp_path, table, uid_column="uid")
    assert piece.columns is None
    assert [sample.error for sample in found] == [None, *["bad_uid"] * 4, None]


@pytest.mark.parametrize("sample", [1.0, 0.6])
def test_a_pool_is_the_same_from_columns_and_from_rows(tmp_path, sample):
    """jsonl is read row by row; a failed row and a repeated uid in the parquet's last batch are as well."""
    rows = [{**row, "sha256": HASH, "text": "a\nb"} for row in table_rows() * 100]
    rows = [{**row, "uid": f"{number:032x}"} for number, row in enumerate(rows)]
    rows[-2]["url"] = " "
    rows[-1]["uid"] = rows[0]["uid"]
    made = {}
    for kind in ("parquet", "jsonl"):
        path = written(tmp_path / kind, kind, rows)
        value = {"path": str(path), "carry": {"score": "float32"}}
        units = sources.plan_units(parsed(value), 1500)
        out_path = str(tmp_path / f"{kind}_pool")
        for number, unit in enumerate(units):
            pool_shards.read_ids(unit, number, out_path)
        plan = pool_shards.plan_shards(units, 1200, sample, sources.carried_columns(parsed(value)), out_path)
        done = [pool_shards.write_shard(shard, out_path) for shard in plan.shards]
        tables = [pool.read_rows(out_path, shard.name) for shard in plan.shards]
        whole = pa.concat_tables(tables)
        # Where a failed row stands, its file says in its own words.
        made[kind] = whole.drop_columns(["key", "error_detail"]), sum(facts["rows"] for facts in done)
        if sample == 1:
            assert whole["error"].to_pylist()[-2:] == ["missing_url", "repeated_uid"]
            assert whole["ok"].to_pylist().count(False) == 2
    assert made["parquet"][0].equals(made["jsonl"][0])
    assert made["parquet"][1] == made["jsonl"][1] == (2300 if sample == 1 else len(made["jsonl"][0]))
