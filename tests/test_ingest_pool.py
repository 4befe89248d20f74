"""From samples to shards: every loss is a counted row, uids are unique, bytes depend on nothing but the source."""

from __future__ import annotations

import io
import random
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core import pool
from pipeline.core.errors import FAILURES, WinnowError
from stages.ingest import pool_shards, samples, sources, tar_samples
from tests.ingest_fixture import build, files, rows, tar_bytes
from tests.pool_fixture import drawing

PNG = [drawing(number, kind="PNG") for number in range(8)]
JPG = [drawing(number, kind="JPEG") for number in range(8)]
UIDS = [f"{number:032x}" for number in range(8)]


def ingest(tmp_path, data: bytes, **options) -> tuple[dict, list[dict]]:
    """(facts, rows) of the pool that this tar makes."""
    (tmp_path / "in.tar").write_bytes(data)
    facts = build({"path": str(tmp_path / "in.tar"), **options}, tmp_path / "out")
    return facts, rows(tmp_path / "out")


def huge_png(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims these pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def test_every_kind_of_broken_sample_is_a_row_with_its_reason(tmp_path, monkeypatch):
    monkeypatch.setattr(tar_samples, "MAX_IMAGE_BYTES", 50_000)
    planted = {
        "missing_image": [("a.txt", "no image")],
        "missing_caption": [("b.png", PNG[0]), ("b.txt", " \n")],
        "bad_caption": [("c.png", PNG[0]), ("c.txt", b"caf\xe9")],
        "bad_metadata": [("d.png", PNG[0]), ("d.txt", "d"), ("d.json", b"{broken")],
        "bad_uid": [("e.png", PNG[0]), ("e.txt", "e"), ("e.json", {"id": "17"})],
        "undecodable": [("f.jpg", JPG[0][: len(JPG[0]) // 2]), ("f.txt", "f"), ("f.json", {"id": UIDS[1]})],
        "unsupported_format": [("g.png", b"<html>not found</html>"), ("g.txt", "g"), ("g.json", {"id": UIDS[2]})],
        "too_many_pixels": [("h.png", huge_png(9000, 9000)), ("h.txt", "h"), ("h.json", {"id": UIDS[3]})],
        "too_many_bytes": [("i.png", b"\0" * 50_001), ("i.txt", "i"), ("i.json", {"id": UIDS[4]})],
        "repeated_uid": [("k.png", PNG[1]), ("k.txt", "k"), ("k.json", {"id": UIDS[0]})],
        "repeated_key": [("j.png", PNG[1]), ("j.txt", "j again"), ("j.json", {"id": UIDS[6]})],
    }
    members = [("j.png", PNG[0]), ("j.txt", "j"), ("j.json", {"id": UIDS[0]})]
    for reason, broken in planted.items():
        members += broken
        if reason in ("missing_image", "missing_caption", "bad_caption"):
            members.append((broken[0][0][0] + ".json", {"id": f"{len(members):032x}"}))
    members += [("z.heic", b"x"), ("z.txt", "z"), ("z.json", {"id": UIDS[7]})]
    facts, found = ingest(tmp_path, without_end_mark(members), uid_column="id")
    counts = dict.fromkeys(planted, 1) | {"unsupported_format": 2, "truncated_tar": 1}
    assert facts["failed"] == dict(sorted(counts.items()))
    assert set(facts["failed"]) <= set(FAILURES)
    assert [row["error"] for row in found] == [None, *planted, "unsupported_format", "truncated_tar"]
    assert len({row["uid"] for row in found}) == len(found)
    for row in found:
        assert row["ok"] == (row["error"] is None) == (row["image_offset_bytes"] is not None)
        assert row["ok"] or "in.tar" in row["error_detail"]
        assert str(tmp_path) not in str(row)
    assert found[8]["url"] is None


def without_end_mark(members: list) -> bytes:
    """A tar that is cut after its last member."""
    data = tar_bytes(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        archive.getmembers()
        return data[: archive.offset]


def three_samples() -> tuple[bytes, list[int]]:
    """A tar of three samples of image, text and json, and where each member's header starts; then the end mark."""
    members = []
    for number in range(3):
        members += [
            (f"{number}.png", PNG[number]),
            (f"{number}.txt", f"caption {number}"),
            (f"{number}.json", {"n": number}),
        ]
    data = tar_bytes(members)
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        starts = [member.offset for member in archive.getmembers()]
    end = starts[-1] + 1024
    return data, [*starts, end]


@pytest.mark.parametrize(
    "member, shift, ok_rows, truncated",
    [
        (3, 700, 1, 1),  # inside an image
        (4, 515, 1, 1),  # inside a text
        (5, 100, 1, 1),  # inside a header: the json's
        (3, 100, 1, 1),  # inside a header: the next sample's
        (3, 0, 1, 1),  # between samples: an extra row says that something may be lost
        (4, 0, 1, 1),  # between image and text
        (5, 0, 1, 1),  # between text and json, which the first sample has
        (9, 0, 3, 1),  # after the last member: only the end mark is gone
        (9, 100, 3, 1),  # inside the end mark
        (1, 0, 0, 1),  # inside the first sample
        (0, 300, 0, 1),  # inside the first header
        (0, 0, 0, 1),  # empty
    ],
)
def test_truncated_tars(tmp_path, member, shift, ok_rows, truncated):
    data, starts = three_samples()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(data[: starts[member] + shift])
    (tmp_path / "in" / "1.tar").write_bytes(tar_bytes([("0.png", PNG[7]), ("0.txt", "the next shard is whole")]))
    facts = build(str(tmp_path / "in"), tmp_path / "out")
    assert (facts["ok_rows"], facts["failed"]) == (ok_rows + 1, {"truncated_tar": truncated})
    captions = [row["caption"] for row in rows(tmp_path / "out") if row["ok"]]
    assert captions == [f"caption {number}" for number in range(ok_rows)] + ["the next shard is whole"]


def test_tar_with_a_wiped_header_or_a_second_archive(tmp_path):
    data, starts = three_samples()
    wiped = data[: starts[3]] + b"\0" * 512 + data[starts[3] + 512 :]
    facts, _ = ingest(tmp_path, wiped)
    assert (facts["ok_rows"], facts["failed"]) == (1, {"truncated_tar": 1})


def test_truncated_tar_with_img2dataset_parquet_names_what_is_lost(tmp_path):
    data, starts = three_samples()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.tar").write_bytes(data[: starts[4]])
    table = {
        "key": ["0", "1", "2"],
        "status": ["success"] * 3,
        "caption": [f"caption {n}" for n in range(3)],
        "uid": UIDS[:3],
    }
    pq.write_table(pa.table(table), tmp_path / "in" / "0.parquet")
    facts = build(str(tmp_path / "in"), tmp_path / "out")
    assert (facts["ok_rows"], facts["failed"]) == (1, {"truncated_tar": 2})
    assert [row["uid"] for row in rows(tmp_path / "out")] == UIDS[:3]
    (tmp_path / "in" / "0.parquet").write_bytes(b"PAR1 killed while writing")
    assert build(str(tmp_path / "in"), tmp_path / "again")["failed"] == {"bad_table": 1, "truncated_tar": 1}


def test_given_uids_first_one_wins(tmp_path):
    members = []
    for number, uid in enumerate([UIDS[1].upper(), UIDS[1], "no uid", UIDS[1], UIDS[2]]):
        members += [(f"{number}.png", PNG[number]), (f"{number}.txt", f"c{number}"), (f"{number}.json", {"uid": uid})]
    facts, found = ingest(tmp_path, tar_bytes(members))
    assert facts["failed"] == {"repeated_uid": 2}
    assert [row["error"] for row in found] == [None, "repeated_uid", None, "repeated_uid", None]
    assert found[0]["uid"] == UIDS[1]
    assert found[2]["uid"] == pool.derived_uid(PNG[2], "c2", 0)
    assert len({row["uid"] for row in found}) == 5


def test_derived_uids_number_exact_repeats(tmp_path):
    members = []
    for number in range(4):
        members += [(f"{number}.png", PNG[0]), (f"{number}.txt", "same" if number < 3 else "other")]
    facts, found = ingest(tmp_path, tar_bytes(members))
    assert facts["ok_rows"] == 4
    assert len({row["uid"] for row in found}) == 4
    assert found[0]["uid"] == pool.derived_uid(PNG[0], "same", 0)
    assert found[3]["uid"] == pool.derived_uid(PNG[0], "other", 0)


def test_no_given_uid_can_make_two_rows_equal(tmp_path):
    """Given uids that equal derived ones, and those of their repeats, as a pool of ours read beside its source has."""
    plain = []
    for number in range(3):
        plain += [(f"p{number}.png", PNG[0]), (f"p{number}.txt", "same")]
    _, first = ingest(tmp_path, tar_bytes(plain))
    taken = [row["uid"] for row in first]
    given = []
    for number, uid in enumerate([*taken, taken[1]]):
        given += [(f"g{number}.png", PNG[1]), (f"g{number}.txt", "given"), (f"g{number}.json", {"uid": uid})]
    (tmp_path / "in.tar").write_bytes(tar_bytes([*plain, *given]))
    facts = build(str(tmp_path / "in.tar"), tmp_path / "both")
    found = rows(tmp_path / "both")
    assert facts["failed"] == {"repeated_uid": 1}
    assert [row["uid"] for row in found[3:6]] == taken
    assert len({row["uid"] for row in found}) == 7


def mixed_source(folder) -> dict:
    """Several sources with repeats among them, broken samples, and units that are cut and packed."""
    folder.mkdir()
    generator = random.Random(0)
    for tar in range(5):
        members = []
        for number in range(generator.randint(1, 14)):
            image = generator.choice([*PNG, JPG[0], b"broken"])
            members += [(f"{number}.png", image), (f"{number}.txt", generator.choice(["a", "b", ""]))]
        (folder / f"{tar}.tar").write_bytes(tar_bytes(members)[: -11_000 if tar == 3 else None])
    uids = [generator.choice(UIDS) for _ in range(20)]
    table = pa.table({"image": [generator.choice(PNG) for _ in uids], "caption": ["c"] * 20, "uid": uids})
    (folder / "rows").mkdir()
    pq.write_table(table, folder / "rows" / "0.parquet", row_group_size=3)
    return {"tars": f"{folder}/*.tar", "rows": f"{folder}/rows", "drawn": {"layout": "demo", "pairs": 9}}


def test_bytes_depend_on_nothing_but_the_source(tmp_path):
    source = mixed_source(tmp_path / "in")
    facts = build(source, tmp_path / "a", shard_size=7)
    again = build(source, tmp_path / "b", shard_size=7, reverse=True)
    assert len(facts["shards"]) > 5
    assert {key: facts[key] for key in ("rows", "failed")} == {key: again[key] for key in ("rows", "failed")}
    assert files(tmp_path / "a") == files(tmp_path / "b")
    whole = build(source, tmp_path / "c", shard_size=1000)
    assert len(whole["shards"]) == 1
    ignored = ("key", "image_offset_bytes")
    strip = [{name: value for name, value in row.items() if name not in ignored} for row in rows(tmp_path / "a")]
    assert strip == [
        {name: value for name, value in row.items() if name not in ignored} for row in rows(tmp_path / "c")
    ]
    for shard in facts["shards"]:
        assert shard["rows"] <= 7


def test_finished_shards_are_kept_and_lost_ones_made_again(tmp_path):
    source = mixed_source(tmp_path / "in")
    before = build(source, tmp_path / "out", shard_size=7)
    bytes_before = files(tmp_path / "out")
    (tmp_path / "out" / "00001.parquet").unlink()
    (tmp_path / "out" / "00001.tar").write_bytes(b"half")
    kept = (tmp_path / "out" / "00002.parquet").stat().st_mtime_ns
    after = build(source, tmp_path / "out", shard_size=7)
    assert files(tmp_path / "out") == bytes_before
    assert (tmp_path / "out" / "00002.parquet").stat().st_mtime_ns == kept
    assert [shard["failed"] for shard in after["shards"]] == [shard["failed"] for shard in before["shards"]]


def test_small_units_are_packed_and_large_ones_cut(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for tar, count in enumerate([2, 2, 2, 5, 13, 1]):
        members = []
        for number in range(count):
            members += [(f"{number}.png", PNG[0]), (f"{number}.txt", f"{tar} {number}")]
        (folder / f"{tar}.tar").write_bytes(tar_bytes(members))
    facts = build(str(folder), tmp_path / "out", shard_size=5)
    assert [shard["rows"] for shard in facts["shards"]] == [4, 2, 5, 5, 5, 4]
    assert [row["caption"] for row in rows(tmp_path / "out")] == [
        f"{tar} {number}" for tar, count in enumerate([2, 2, 2, 5, 13, 1]) for number in range(count)
    ]


def test_samples_nest_and_are_counted(tmp_path):
    source = {"layout": "demo", "pairs": 400}
    chosen = {}
    for fraction in (1.0, 0.5, 0.2):
        # The pictures are drawn for kept rows' shards only once each: 400 small ones.
        parsed = sources.parse(source, "p")
        units = sources.plan_units(parsed, 100)
        out = str(tmp_path / str(fraction))
        for number, unit in enumerate(units):
            pool_shards.read_ids(unit, number, out)
        plan = pool_shards.plan_shards(units, 100, fraction, sources.carried_columns(parsed), out)
        assert plan.source_rows == 400
        assert (
            sum(span.stop - span.start for shard in plan.shards for span in shard.spans) == 400 - plan.sampled_out_rows
        )
        tables = [pool_shards._load(pool_shards._ids_path(out, "final", number)) for number in range(len(units))]
        table = np.concatenate(tables)
        chosen[fraction] = set(table["id"][table["state"] != pool_shards.LEFT_OUT].tolist())
    assert len(chosen[1.0]) == 400
    assert chosen[0.2] < chosen[0.5] < chosen[1.0]
    assert 160 < len(chosen[0.5]) < 240
    assert 50 < len(chosen[0.2]) < 110


def test_sampled_pools_hold_the_same_rows(tmp_path):
    source = mixed_source(tmp_path / "in")
    everything = {row["uid"]: row["caption"] for row in (build(source, tmp_path / "a"), rows(tmp_path / "a"))[1]}
    facts = build(source, tmp_path / "b", shard_size=6, sample=0.4)
    part = {row["uid"]: row["caption"] for row in rows(tmp_path / "b")}
    assert 0 < facts["sampled_out_rows"] < facts["source_rows"]
    assert len(part) == facts["rows"]
    assert part.items() <= everything.items()


def test_source_that_changes_between_the_passes_is_named(tmp_path):
    def write(count):
        members = []
        for number in range(count):
            members += [(f"{number}.png", PNG[0]), (f"{number}.txt", str(number))]
        (tmp_path / "in.tar").write_bytes(tar_bytes(members))

    write(3)
    parsed = sources.parse(str(tmp_path / "in.tar"), "p")
    units = sources.plan_units(parsed, 10)
    pool_shards.read_ids(units[0], 0, str(tmp_path / "out"))
    plan = pool_shards.plan_shards(units, 10, 1.0, {}, str(tmp_path / "out"))
    for count in (2, 4):
        write(count)
        with pytest.raises(WinnowError, match=r"in.tar: expected the 3 samples of the run's first pass"):
            pool_shards.write_shard(plan.shards[0], str(tmp_path / "out"))
    assert not list((tmp_path / "out").glob("00000*"))


def test_pool_without_a_usable_row_says_why(tmp_path):
    (tmp_path / "in.tar").write_bytes(tar_bytes([("a.png", PNG[0]), ("b.png", PNG[1])]))
    with pytest.raises(WinnowError, match=r"none of 2 rows is usable \(2 missing_caption\)"):
        build(str(tmp_path / "in.tar"), tmp_path / "out")


def test_parquet_rows_that_cannot_be_used(tmp_path):
    images = [PNG[0], None, b"", PNG[1], PNG[2]]
    captions = pa.array([b"fine", b"no image", b"empty", b"caf\xe9", None]).cast(pa.binary())
    text = pa.Array.from_buffers(pa.string(), 5, captions.buffers())  # a text column can hold invalid UTF-8
    status = ["success", "failed_to_download", "success", "success", "success"]
    message = [None, "HTTP Error 410: Gone", None, None, None]
    table = pa.table(
        {"jpg": images, "caption": text, "status": status, "error_message": message, "n": ["1", "x", "", None, "4"]}
    )
    (tmp_path / "in").mkdir()
    pq.write_table(table, tmp_path / "in" / "0.parquet")
    (tmp_path / "in" / "1.parquet").write_bytes(b"PAR1 no footer")
    facts = build({"path": str(tmp_path / "in"), "carry": {"n": "int32"}}, tmp_path / "out")
    found = rows(tmp_path / "out")
    expected = [None, "download_failed", "missing_image", "bad_caption", "missing_caption", "bad_table"]
    assert [row["error"] for row in found] == expected
    assert [row["n"] for row in found] == [1, None, None, None, 4, None]
    assert facts["failed"]["download_failed"] == 1


def test_parquet_with_damaged_images_keeps_its_captions(tmp_path):
    generator = np.random.default_rng(0)
    images = [generator.bytes(20_000) for _ in range(40)]
    table = pa.table({"caption": [f"caption {n}" for n in range(40)], "image": images})
    path = tmp_path / "a.parquet"
    pq.write_table(table, path, compression="zstd", row_group_size=10, use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + 3000] = b"\xff" * 3000
    path.write_bytes(data)
    parsed = sources.parse(str(path), "p")
    units = sources.plan_units(parsed, 100)
    found = list(pool_shards.read_samples(units[0]))
    assert [sample.caption for sample in found] == table["caption"].to_pylist()
    assert [sample.error for sample in found] == [None] * 10 + ["bad_table"] * 10 + [None] * 20


def test_memory_of_an_archive_that_claims_too_much(tmp_path):
    """A header of 'extended attributes' that says it is 8 GB long is damage, not a reason to allocate."""
    data, starts = three_samples()
    lying = tarfile.TarInfo("x")
    lying.type, lying.size = tarfile.XHDTYPE, 8 << 30
    facts, _ = ingest(tmp_path, data[: starts[3]] + lying.tobuf(tarfile.GNU_FORMAT) + data[starts[3] :])
    assert (facts["ok_rows"], facts["failed"]) == (1, {"truncated_tar": 1})


def test_the_store_failing_is_no_damage():
    class Broken(io.BytesIO):
        def read(self, size=-1):
            raise OSError("the network is down")

    watched = samples.Watched(Broken())
    with pytest.raises(OSError, match="network"):
        watched.read(4)
    with pytest.raises(OSError, match="network"):
        watched.reraise()


@pytest.mark.parametrize("kind", ["tar", "img2dataset", "parquet", "folder"])
def test_mutated_files_are_errors_or_counted_rows(tmp_path, kind):
    """Bytes flipped, cut, doubled, zeroed: never a crash, never a hang, and what is read adds up."""
    generator = random.Random(kind)
    table = {
        "key": ["0", "1", "2"],
        "status": ["success", "success", "failed"],
        "caption": ["a", "b", "c"],
        "uid": UIDS[:3],
    }
    sink = io.BytesIO()
    if kind == "parquet":
        pq.write_table(
            pa.table({"image": PNG[:3], "caption": [["a", "b"], ["c"], []], "uid": UIDS[:3]}), sink, row_group_size=2
        )
    else:
        pq.write_table(pa.table(table), sink)
    tar, _ = three_samples()
    folder = tmp_path / "in"
    folder.mkdir()
    names = {
        "tar": ["0.tar"],
        "img2dataset": ["0.parquet"],
        "parquet": ["0.parquet"],
        "folder": ["a.png", "a.json", "c.csv"],
    }
    originals = {
        "b.png": PNG[1],
        "0.tar": tar,
        "0.parquet": sink.getvalue(),
        "a.png": PNG[0],
        "a.json": b'{"uid": "%s"}' % UIDS[0].encode(),
    }
    originals["c.csv"] = b'file_name,caption\na.png,"one, two"\nb.png,x\n'
    source = {"path": str(folder), "layout": {"tar": "webdataset", "img2dataset": "webdataset"}.get(kind, kind)}
    if kind == "folder":
        source["captions"] = "c.csv"
    beside = {"img2dataset": ["0.tar"], "folder": ["b.png"]}
    counted, refused = 0, []
    for round_number in range(120):
        for name in {*names[kind], *beside.get(kind, ())}:
            (folder / name).write_bytes(originals[name])
        name = generator.choice(names[kind])
        (folder / name).write_bytes(mutated(originals[name], generator))
        try:
            facts = build(source, tmp_path / f"out{round_number}")
            counted += facts["rows"]
        except WinnowError as error:
            refused.append(str(error))
    assert counted > 50
    assert len(refused) < 110
    assert not any("\n" in message for message in refused)


def mutated(data: bytes, generator: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(generator.randint(1, 3)):
        start = generator.randrange(len(changed) + 1)
        length = generator.choice([1, 1, 4, 100, 512])
        match generator.randrange(5):
            case 0:
                del changed[start:]
            case 1:
                changed[start : start + length] = bytes(min(length, len(changed) - start))
            case 2:
                changed[start : start + length] = generator.randbytes(length)
            case 3:
                changed[start:start] = changed[start : start + length]
            case _:
                del changed[start : start + length]
    return bytes(changed)
