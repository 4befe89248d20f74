"""Every reader of what users, tables and servers give, on mutated and hostile files: an error or a counted row, no more.

A child process reads the inputs, since a C decoder may take the process with it: it names each input before it reads
it, stops itself where one takes longer than LIMIT_S, and can't have more than MEMORY_BYTES beyond what it started with.
`python -m tests.test_fuzz GROUP START STOP` reads a run of inputs again; each is a function of its group and number.
"""

from __future__ import annotations

import faulthandler
import gzip
import io
import json
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import struct
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core import config, images
from pipeline.core.errors import FAILURES, WinnowError
from tests.ingest_fixture import build, rows, tar_bytes
from tests.pool_fixture import drawing

ROOT = pathlib.Path(__file__).resolve().parent.parent
LIMIT_S = 20  # of one input, on a busy machine
MEMORY_BYTES = 1 << 30  # that the largest input may take
SPACE_BYTES = 8 << 30  # of addresses, so that a bomb ends the child and not the machine
SECRET = "the words that lie outside of every source"
COUNTS = {"archives": 750, "tables": 700, "images": 2400, "tensors": 700, "configs": 900, "tasks": 250, "results": 900}

Files = dict[str, bytes]


# Originals: one small file of every kind that a source, a stage or a task can be given.


def picture(number: int, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    Image.open(io.BytesIO(drawing(number, 40, 30))).save(sink, kind, **options)
    return sink.getvalue()


def exif_of(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = orientation, "a camera"
    exif.get_ifd(0x8769)[0x9286] = b"a comment"
    return exif


def all_pictures() -> dict[str, bytes]:
    first = Image.open(io.BytesIO(drawing(1, 40, 30)))
    moving = {"save_all": True, "append_images": [first.rotate(90), first.rotate(180)]}
    palette = io.BytesIO()
    first.quantize(16).save(palette, "PNG", transparency=3)
    profile = b"\0\0\2\0lcms" + bytes(504)
    return {
        "jpg": picture(0, "JPEG", exif=exif_of(6), icc_profile=profile),
        "progressive.jpg": picture(1, "JPEG", progressive=True, comment=b"words"),
        "cmyk.jpg": encoded(first.convert("CMYK"), "JPEG"),
        "png": picture(2, "PNG", exif=exif_of(3), icc_profile=profile),
        "palette.png": palette.getvalue(),
        "deep.png": encoded(first.convert("I;16"), "PNG"),
        "webp": picture(3, "WEBP", exif=exif_of(8)),
        "lossless.webp": picture(4, "WEBP", lossless=True),
        "moving.webp": encoded(first, "WEBP", **moving),
        "gif": encoded(first.quantize(32), "GIF", **moving),
        "bmp": picture(5, "BMP"),
        "tiff": picture(6, "TIFF", exif=exif_of(6)),
        "deflate.tiff": picture(7, "TIFF", compression="tiff_adobe_deflate"),
        "lzw.tiff": picture(8, "TIFF", compression="tiff_lzw"),
        "jpeg.tiff": picture(9, "TIFF", compression="jpeg"),
        "pages.tiff": encoded(first, "TIFF", **moving),
    }


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def sample_members(number: int) -> list[tuple[str, bytes | str | Mapping]]:
    uid = f"{number:032x}"
    values = {"uid": uid, "url": "http://a.example/b.jpg", "note": [1, {"a": None}], "score": 0.5, "original_width": 9}
    kind = ("jpg", "png", "webp")[number % 3]
    image = picture(number, {"jpg": "JPEG"}.get(kind, kind.upper()))
    return [
        (f"{number:09d}.{kind}", image),
        (f"{number:09d}.txt", f"a picture {number}"),
        (f"{number:09d}.json", values),
    ]


def archive(kind: int, more: Iterator[tarfile.TarInfo] | tuple = ()) -> bytes:
    """A tar of three samples in one of tarfile's formats, then members without data."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w", format=kind) as file:
        for number in range(3):
            for name, content in sample_members(number):
                data = json.dumps(content) if isinstance(content, Mapping) else content
                data = data.encode() if isinstance(data, str) else data
                info = tarfile.TarInfo(f"{'long/' * 30 if kind != tarfile.USTAR_FORMAT and number == 1 else ''}{name}")
                info.size = len(data)
                if kind == tarfile.PAX_FORMAT:
                    info.pax_headers = {"comment": "a comment", "mtime": "1.5", "SCHILY.xattr.user.a": "b"}
                file.addfile(info, io.BytesIO(data))
        for info in more:
            file.addfile(info)
    return sink.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def escaping() -> tuple[tarfile.TarInfo, ...]:
    return (
        member("000000007.txt", tarfile.SYMTYPE, "../outside/secret.txt"),
        member("000000007.jpg", tarfile.LNKTYPE, "/etc/passwd"),
        member("../outside/000000008.txt"),
        member("/tmp/000000008.jpg"),
        member("000000009.jpg", tarfile.CHRTYPE),
        member("000000009.txt", tarfile.FIFOTYPE),
        member("folder", tarfile.DIRTYPE),
    )


def parquet(columns: Mapping[str, Any] | pa.Table, **options: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), sink, **options)
    return sink.getvalue()


UIDS = [f"{number:032x}" for number in range(12)]
URLS = [f"http://a.example/{number}.jpg?w={number}" for number in range(12)]
CAPTIONS = [f"a caption, {number}" for number in range(12)]
STATUS = {"key": [f"{number:09d}" for number in range(3)], "status": ["success", "success", "failed_to_download"]}


def url_columns() -> dict[str, Any]:
    boxes = pa.array([[[0.1, 0.2, 0.3, 0.4]], []] * 6, pa.list_(pa.list_(pa.float32())))
    return {
        "uid": UIDS, "url": URLS, "text": CAPTIONS, "sha256": ["0" * 64] * 12, "face_bboxes": boxes,
        "original_width": [64] * 12, "note": pa.array(["a", "b"] * 6).dictionary_encode(), "score": [0.5] * 12,
    }  # fmt: skip


def url_text(kind: str) -> bytes:
    listed = [
        {"uid": uid, "url": url, "text": caption, "note": {"deep": [1]}, "score": 2}
        for uid, url, caption in zip(UIDS, URLS, CAPTIONS, strict=True)
    ]
    if kind == "json":
        return json.dumps(listed).encode()
    if kind == "jsonl":
        return "\n".join(map(json.dumps, listed)).encode()
    mark = "," if kind == "csv" else "\t"
    lines = [mark.join(("uid", "url", "text", "note", "score"))]
    for uid, url, caption in zip(UIDS, URLS, CAPTIONS, strict=True):
        lines.append(mark.join((uid, url, f'"{caption}"' if kind == "csv" else caption, "b", "0.5")))
    return "\r\n".join(lines).encode()


def random_table(dice: random.Random) -> pa.Table:
    """A table of URLs or images with columns of any type, some of them twice."""
    size = 6
    far, near = 2**62, 2**31 - 1
    choices: list[Callable[[], pa.Array]] = [
        lambda: pa.array(CAPTIONS[:size]),
        lambda: pa.array(CAPTIONS[:size], pa.large_string()),
        lambda: pa.array(CAPTIONS[:size], pa.string_view()),
        lambda: pa.array([b"\xff\xfe"] * size, pa.binary()),
        lambda: pa.array([picture(0, "PNG")] * size, pa.large_binary()),
        lambda: pa.array([b"abcd"] * size, pa.binary(4)),
        lambda: pa.array([near, -near] * 3, pa.date32()),
        lambda: pa.array([far, -far] * 3, pa.timestamp("ms", "Nowhere/Land")),
        lambda: pa.array([far, -far] * 3, pa.timestamp("ns")),
        lambda: pa.array([far, -far] * 3, pa.duration("s")),
        lambda: pa.array([1, 2] * 3, pa.decimal256(60, 3)),
        lambda: pa.array([2**63 - 1, -(2**63)] * 3, pa.int64()),
        lambda: pa.array([2**64 - 1] * size, pa.uint64()),
        lambda: pa.array([float("nan"), float("inf")] * 3, pa.float32()),
        lambda: pa.array([None] * size, pa.null()),
        lambda: pa.array([["a"], None, [], ["b", None], ["c"], ["d"]]),
        lambda: pa.array([[[1.0, 2, 3, float("nan")]], None, [], [[]], [None], [[1.0]]]),
        lambda: pa.array([{"bytes": picture(0, "PNG"), "path": "a.png"}] * size),
        lambda: pa.array([{"bytes": None, "path": "/etc/passwd"}] * size),
        lambda: pa.array([[("a", 1)]] * size, pa.map_(pa.string(), pa.int32())),
        lambda: pa.array([True, False] * 3),
        lambda: pa.array(["a", "b"] * 3).dictionary_encode(),
        lambda: pa.array(UIDS[:size]),
        lambda: pa.array(URLS[:size]),
    ]
    names = ["uid", "note", "score", "original_width", dice.choice(["url", "image"]), dice.choice(["text", "caption"])]
    if dice.random() < 0.2:
        names.append(dice.choice(names))
    likely = {"uid": -2, "url": -1, "image": 4, "text": 0, "caption": 0}
    arrays = [
        choices[likely[name]]() if name in likely and dice.random() < 0.6 else dice.choice(choices)() for name in names
    ]
    return pa.Table.from_arrays(arrays, names=names)


# Mutations. Each is a function of the dice alone.

EXTREMES = (0, 1, 2, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, 2**63 - 1, 2**63, 2**64 - 1)
WORDS = (
    b"\0", b"\xff", b'"', b"'", b"\n", b"\r", b"\t", b",", b"{", b"[", b"]", b"}", b":", b"&a ", b"*a", b"!!int x",
    b"!!timestamp x", b"!!binary x", b"!!set {a}", b"!!python/object/apply:os.system ['touch x']", b"? [a]\n: b",
    b"NaN", b"1e999", b"-1", b"9" * 5000, b"[" * 900, b'{"a":' * 900, b"\\ud800", b"\\u0000", b"\xed\xa0\x80", b"../",
    b"/etc/passwd", b"file:///etc/passwd", b"\xe2\x80\xae", b"null", b"true", b"0x10", b"\xef\xbb\xbf", b"--- ", b"%YAML 9",
    b"a" * 70_000,
)  # fmt: skip


def mutated(data: bytes, dice: random.Random, other: bytes, words: bool = False, most: int = 4) -> bytes:
    """The data with one to `most` of: bits flipped, a cut, a splice, a field set to an extreme, bytes lost or doubled."""
    changed = bytearray(data)
    for _ in range(dice.randint(1, most)):
        at, size = dice.randrange(len(changed) + 1), dice.choice((1, 1, 2, 4, 8, 64, 512))
        match dice.randrange(9 if words else 8):
            case 0:
                for place in (dice.randrange(len(changed)) for _ in range(dice.randint(1, 8)) if changed):
                    changed[place] ^= 1 << dice.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                start = dice.randrange(len(other) + 1)
                changed[at : at + size] = other[start : start + dice.choice((1, 4, 64, 512))]
            case 3:
                width = dice.choice((1, 2, 4, 8))
                value = dice.choice(EXTREMES) % (1 << 8 * width)
                changed[at : at + width] = value.to_bytes(width, dice.choice(("little", "big")))
            case 4:
                changed[at : at + size] = bytes(min(size, len(changed) - at))
            case 5:
                changed[at : at + size] = dice.randbytes(size)
            case 6:
                changed[at:at] = changed[at : at + size]
            case 7:
                del changed[at : at + size]
            case _:
                changed[at : at + dice.choice((0, 1, 5))] = dice.choice(WORDS)
    return bytes(changed)


def mutated_tar(data: bytes, dice: random.Random) -> bytes:
    """The tar with a header's field replaced and its sum made right, or with a hostile header before a member."""
    heads = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    at = dice.choice(heads)
    if dice.random() < 0.4:
        return data[:at] + hostile_header(dice) + data[at:]
    fields = {(0, 100): (b"../../x.jpg", b"/etc/passwd", b"\xff\xfe.txt", b"a\nb.jpg", b"", b"." * 100, b".txt"),
              (124, 12): (b"77777777777\0", b"\x80" + bytes(3) + b"\xff" * 8, number_field(-512), number_field(-1), b"x" * 12, b""),
              (156, 1): tuple(bytes([kind]) for kind in b"0123456789LKxgSDMNVXZ\0"),
              (157, 100): (b"../outside/secret.txt", b"/etc/passwd"),
              (345, 155): (b"..", b"/", b"a" * 155),
              (482, 1): (b"\1",)}  # fmt: skip
    (start, size), values = dice.choice(list(fields.items()))
    head = bytearray(data[at : at + 512])
    head[start : start + size] = dice.choice(values).ljust(size, b"\0")[:size]
    return data[:at] + summed(head) + data[at + 512 :]


def number_field(value: int) -> bytes:
    return b"\xff" + (256**11 + value).to_bytes(11, "big") if value < 0 else b"\x80" + value.to_bytes(11, "big")


def summed(head: bytearray) -> bytes:
    head[148:156] = b" " * 8
    head[148:156] = b"%06o\0 " % sum(head)
    return bytes(head)


def header(name: str, kind: bytes, size_field: bytes) -> bytes:
    head = bytearray(member(name, kind).tobuf(tarfile.GNU_FORMAT))
    head[124:136] = size_field
    return summed(head)


def extended(kind: bytes, body: bytes) -> bytes:
    """A header of tar's `x`, `g`, `L` or `K`, with its body."""
    return header("x", kind, b"%011o\0" % len(body)) + body + bytes(-len(body) % 512)


def record(key: str, value: str) -> bytes:
    size = len(f" {key}={value}\n".encode())
    return next(
        f"{size + digits} {key}={value}\n".encode() for digits in range(1, 9) if len(str(size + digits)) == digits
    )


def hostile_header(dice: random.Random) -> bytes:
    pax = [("path", "../../x.jpg"), ("path", "\udcff"), ("path", ""), ("size", "-1536"), ("size", "9" * 400), ("size", "x"),
           ("hdrcharset", "BINARY"), ("GNU.sparse.major", "1"), ("GNU.sparse.size", "-1"), ("GNU.sparse.map", "1,2,3"),
           ("GNU.sparse.realsize", "99999999999"), ("GNU.sparse.name", "/etc/x.jpg"), ("linkpath", "/etc/passwd"), ("mtime", "nan")]  # fmt: skip
    chosen = dice.sample(pax, dice.randint(1, 4))
    body = b"".join(record(key, value.encode("utf-8", "surrogateescape").decode("latin-1")) for key, value in chosen)
    return dice.choice(
        [
            extended(dice.choice((b"x", b"g", b"X")), body),
            extended(b"x", dice.choice((b"1" * 12_000, b"0 =\n", b"5 a\n", b"99999999999 a=b\n", b"\xff" * 40))),
            extended(dice.choice((b"L", b"K")), dice.choice((b"", b"a" * 9000, b"\xff\xfe\0", b"../" * 40))),
            extended(b"x", body) * 40,
            header("s.jpg", b"S", number_field(dice.choice((5, 1 << 40)))),
            header("x", dice.choice((b"x", b"L", b"g")), number_field(dice.choice((-512, 8 << 30)))),
        ]
    )


def mutated_zip(data: bytes, dice: random.Random) -> bytes:
    """The zip with a member of another method, size or name, twice, or with a header of numpy's that lies."""
    with zipfile.ZipFile(io.BytesIO(data)) as old:
        members = {name: old.read(name) for name in old.namelist()}
    sink = io.BytesIO()
    shapes = (
        "(-1, 4)",
        "(9999999999999, 4)",
        "(4, 9999999999999999999999)",
        "(4, -3)",
        "()",
        "(True, 4)",
        "'x'",
        "((" * 90,
    )
    kinds = ("'|O'", "'<f8'", "[('a', '<f4')]", "'<M8[ns]'", "'|V9999999'", "'<U99999999'", "None", "'\\x00'")
    with zipfile.ZipFile(sink, "w", dice.choice((zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA))) as new:
        for name, content in members.items():
            if dice.random() < 0.6:
                text = f"{{'descr': {dice.choice(kinds)}, 'fortran_order': False, 'shape': {dice.choice(shapes)}, }}".encode()
                content = b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text + content[80:]
            new.writestr(dice.choice((name, name, f"../{name}", f"/tmp/{name}", "x")), content)
            if dice.random() < 0.2:
                new.writestr(f"{name}2", content)
    changed = sink.getvalue()
    return mutated(changed, dice, data) if dice.random() < 0.4 else changed


# Inputs by group: files, and what reads them. A reader returns (ok rows, failed rows, reasons).

Reader = Callable[[pathlib.Path, pathlib.Path], tuple[int, int, str]]


def pool_of(**source: Any) -> Reader:
    def read(folder: pathlib.Path, out: pathlib.Path) -> tuple[int, int, str]:
        value = {"path": str(folder)} | source
        value["path"] = str(folder / source.get("path", "")).rstrip("/")
        facts = build(value, out, shard_size=4)
        assert set(facts["failed"]) <= set(FAILURES)
        for row in rows(out):
            assert row["ok"] == (row["error"] is None)
            assert SECRET not in (row["caption"] or "")
        return facts["ok_rows"], sum(facts["failed"].values()), ", ".join(facts["failed"])

    return read


CARRY = {"note": "string", "score": "float32"}
IMAGES_TABLE = {"uid": UIDS[:6], "image": [picture(n, "PNG") for n in range(6)], "caption": [[c, "b"] for c in CAPTIONS[:6]],
                "note": ["a"] * 6, "score": [1.5] * 6}  # fmt: skip


def archives(dice: random.Random) -> tuple[Files, Reader]:
    kind = dice.choice(["ustar", "gnu", "pax", "links", "img2dataset", "clip_benchmark"])
    reader = pool_of(layout="webdataset", carry={**CARRY, "original_file": "string"})
    formats = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
    data = archive(formats.get(kind, tarfile.GNU_FORMAT), escaping() if kind == "links" else ())
    files = {"0.tar": data}
    if kind == "img2dataset":
        table = parquet({**STATUS, "caption": CAPTIONS[:3], "uid": UIDS[:3], "url": URLS[:3], "note": ["a"] * 3})
        files["0.parquet"] = mutated(table, dice, data)
        if dice.random() < 0.2:
            files["0.parquet"] = parquet(random_table(dice).append_column("key", [STATUS["key"] * 2]).append_column("status", [STATUS["status"] * 2]))  # fmt: skip
        return files, reader
    if kind == "clip_benchmark":
        reader = pool_of(layout="clip_benchmark", path="test")
        members = [
            (f"s{n}.{k}", content)
            for n in range(3)
            for k, content in (("jpg", picture(n, "JPEG")), ("cls", str(n % 2)))
        ]
        texts = {"classnames.txt": b"cat\ndog", "zeroshot_classification_templates.txt": b"a photo of a {c}."}
        files = {"test/nshards.txt": b"1", "test/0.tar": tar_bytes(members), **texts}
        name = dice.choice(sorted(files))
        files[name] = mutated(files[name], dice, data, words=True)
        return files, reader
    files["0.tar"] = mutated_tar(data, dice) if dice.random() < 0.6 else data
    if files["0.tar"] is data or dice.random() < 0.3:
        files["0.tar"] = mutated(files["0.tar"], dice, data)
    return files, reader


def tables(dice: random.Random) -> tuple[Files, Reader]:
    kind = dice.choice(
        ["parquet", "urls", "schema", "features", "csv", "tsv", "json", "jsonl", "gz", "folder", "folder"]
    )
    urls = pool_of(layout="urls", carry=CARRY, face_boxes_column="face_bboxes")
    if kind == "parquet":
        data = parquet(
            IMAGES_TABLE, row_group_size=dice.choice((2, 6)), compression=dice.choice(("none", "snappy", "zstd"))
        )
        return {"0.parquet": mutated_parquet(data, dice)}, pool_of(layout="parquet", carry=CARRY)
    if kind == "urls":
        data = parquet(
            url_columns(), row_group_size=dice.choice((5, 12)), data_page_version=dice.choice(("1.0", "2.0"))
        )
        return {"0.parquet": mutated_parquet(data, dice)}, urls
    if kind == "schema":
        table = random_table(dice)
        layout = "urls" if "url" in table.schema.names else "parquet"
        return {"0.parquet": parquet(table)}, pool_of(layout=layout, carry=CARRY)
    if kind == "features":
        sink = io.BytesIO()
        np.savez_compressed(sink, l14_img=np.ones((12, 4), np.float16))
        files = {"0.parquet": parquet(url_columns()), "0.npz": mutated_zip(sink.getvalue(), dice)}
        if dice.random() < 0.4:
            files["0.npz"] = mutated(sink.getvalue(), dice, files["0.parquet"])
        return files, pool_of(layout="urls", carry={"l14_img": "float16[]"})
    if kind in ("csv", "tsv", "json", "jsonl"):
        return {f"0.{kind}": mutated(url_text(kind), dice, url_text("json"), words=True)}, pool_of(
            layout="urls", carry=CARRY
        )
    if kind == "gz":
        inner = dice.choice(("csv", "jsonl", "json"))
        data = gzip.compress(mutated(url_text(inner), dice, b"", words=True), mtime=0)
        return {f"0.{inner}.gz": mutated(data, dice, data) if dice.random() < 0.7 else data}, pool_of(
            layout="urls", carry=CARRY
        )
    table = dice.choice(["csv", "tsv", "jsonl"])
    mark = "\t" if table == "tsv" else ","
    lines = [
        mark.join(line)
        for line in (("file_name", "caption"), ("a.jpg", "one"), ("b/b.png", "two"), ("../outside/secret.txt", "out"))
    ]
    if table == "jsonl":
        lines = [json.dumps({"file_name": name, "caption": "words"}) for name in ("a.jpg", "b/b.png", "/etc/passwd")]
    files = {
        "a.jpg": picture(0, "JPEG"), "b/b.png": picture(1, "PNG"), "a.json": b'{"note": {"a": [1]}, "score": 3}',
        f"c.{table}": "\n".join(lines).encode(),
    }  # fmt: skip
    name = dice.choice(sorted(files))
    files[name] = mutated(files[name], dice, files["a.jpg"], words=not name.endswith("g"))
    return files, pool_of(layout="folder", captions=f"c.{table}", carry=CARRY)


def mutated_parquet(data: bytes, dice: random.Random) -> bytes:
    """The parquet file mutated anywhere, in its footer, or at the start of its first page."""
    where = dice.random()
    if where < 0.3:
        return mutated(data, dice, data)
    footer_bytes = int.from_bytes(data[-8:-4], "little")
    start = len(data) - 8 - footer_bytes if where < 0.8 else 4
    stop = len(data) - 8 if where < 0.8 else 4 + 60
    changed = mutated(data[start:stop], dice, data[-footer_bytes:])
    if where < 0.8:  # the footer's length stays right, so that its content is read
        return data[:start] + changed + len(changed).to_bytes(4, "little") + data[-4:]
    return data[:start] + changed.ljust(stop - start, b"\0")[: stop - start] + data[stop:]


def pictures(dice: random.Random) -> tuple[Files, Reader]:
    originals = PICTURES
    name = dice.choice(sorted(originals))
    return {name: mutated(originals[name], dice, originals[dice.choice(sorted(originals))])}, read_picture


def read_picture(folder: pathlib.Path, out: pathlib.Path) -> tuple[int, int, str]:
    from stages.ingest.fetch.picture import stored_picture
    from stages.ingest.fetch.settings import ImageRecipe

    data = next(path for path in folder.iterdir()).read_bytes()
    done, reasons = [], set()
    for read in (
        lambda: images.decode_rgb(data),
        lambda: images.decode_rgb(data, apply_orientation=False, min_side_px=8),
        lambda: stored_picture(data, ImageRecipe(size_px=16), [[0.1, 0.1, 0.5, 0.5]]),
        lambda: stored_picture(
            data, ImageRecipe(keep_original=True, format="webp", resize="center_crop", size_px=32), None
        ),
    ):
        try:
            read()
            done.append(True)
        except images.ImageError as error:
            done.append(False)
            reasons.add(error.reason)
    assert reasons <= set(FAILURES)
    return sum(done), len(done) - sum(done), ""


def tensors(dice: random.Random) -> tuple[Files, Reader]:
    import safetensors.numpy
    import torch

    array = np.arange(24, dtype=np.float32).reshape(6, 4)
    kind = dice.choice(["npy", "npz", "safetensors", "pt", "legacy.pt", "uids.npy", "uids.txt"])
    sink = io.BytesIO()
    if kind in ("npy", "npz"):
        np.save(sink, array) if kind == "npy" else np.savez_compressed(sink, image_features=array)
    elif kind == "safetensors":
        sink.write(safetensors.numpy.save({"image_features": array}))
    elif kind == "uids.npy":
        np.save(sink, np.array([(0, number) for number in range(6)], "u8,u8"))
    elif kind == "uids.txt":
        sink.write("\n".join(UIDS).encode())
    else:
        new = kind == "pt"
        value = {"image_features": torch.from_numpy(array), "a": array} if new else array
        torch.save(value, sink, _use_new_zipfile_serialization=new)
    data = sink.getvalue()
    changed = (
        mutated_zip(data, dice)
        if kind == "npz" and dice.random() < 0.7
        else mutated(data, dice, data, words=kind == "uids.txt")
    )
    if kind in ("npy", "uids.npy", "safetensors") and dice.random() < 0.5:
        changed = with_numbers(data, dice)
    return {f"a.{kind}": changed}, read_tensors


def with_numbers(data: bytes, dice: random.Random) -> bytes:
    """The file with one number in its text header replaced."""
    numbers = ("-1", "0", "99999999999999", "9" * 30, "9" * 5000, "1.5", "True", "[" * 300, "-" * 4000 + "1")
    places = [at for at in range(10, min(len(data), 200)) if data[at : at + 1].isdigit()]
    at = dice.choice(places)
    return data[:at] + dice.choice(numbers).encode() + data[at + 1 :]


def read_tensors(folder: pathlib.Path, out: pathlib.Path) -> tuple[int, int, str]:
    from stages import exclusion, tensor_files

    path = next(str(path) for path in folder.iterdir())
    if ".uids." in path:
        exclusion.parse(path, (), "exclude")
        return 1, 0, ""
    done, messages = 0, []
    for read in (tensor_files.read_rows, tensor_files.read_state_dict):
        try:
            read(path)
            done += 1
        except WinnowError as error:
            messages.append(str(error))
    assert not any("\n" in message for message in messages)
    return done, 2 - done, ""


CONFIG = b"""root: runs/a
pool: {source: {layout: demo, pairs: 240}, shard_size: 60}
recipes: {tiny: {lr: 1e-3, model: {width: 32}}}
stages: [image_stats, {name: clip, model: "scorer"}]
strategies:
  no_filter: {}
  basic: {where: [caption_words > 2, language == en]}
compare: [no_filter, &b basic]
train: {recipe: tiny, seeds: [0, 1]}
eval: {root: demo, tasks: [colours, {name: x, path: /a, chance: 0.5}]}
cluster: {clip: {gpus: 0.5, labels: {a: b}}}
"""


def configs(dice: random.Random) -> tuple[Files, Reader]:
    overrides = [
        f"{key}={value}" for key, value in (("train.seeds.0", "1"), ("pool.sample", "0.5"), ("eval.tasks.1.name", "y"))
    ]
    some = [mutated(word.encode(), dice, CONFIG, words=True, most=1) for word in overrides if dice.random() < 0.3]
    text = mutated(CONFIG, dice, CONFIG, words=True, most=1) if not some or dice.random() < 0.5 else CONFIG
    return {"a.yaml": text, "set": b"\1".join(some)}, read_config


def read_config(folder: pathlib.Path, out: pathlib.Path) -> tuple[int, int, str]:
    overrides = [os.fsdecode(word) for word in (folder / "set").read_bytes().split(b"\1") if word]
    loaded = config.load(str(folder / "a.yaml"), overrides)
    json.dumps(loaded.model_dump(mode="json"), allow_nan=False).encode()
    return 1, 0, ""


def tasks(dice: random.Random) -> tuple[Files, Reader]:
    is_retrieval = dice.random() < 0.4
    members: list[tuple[str, Any]] = []
    for number in range(4):
        text = ("txt", f"words {number}\nmore") if is_retrieval else ("cls", str(number % 2))
        members += [(f"s{number:07d}.jpg", picture(number, "JPEG")), (f"s{number:07d}.{text[0]}", text[1])]
    data = tar_bytes(members)
    files = {"test/nshards.txt": b"1", "test/0.tar": data}
    if is_retrieval:
        files["dataset_type.txt"] = b"retrieval"
    else:
        files |= {"classnames.txt": b"cat\ndog", "zeroshot_classification_templates.txt": b"a photo of a {c}."}
    name = "test/0.tar" if dice.random() < 0.6 else dice.choice(sorted(files))
    files[name] = (
        mutated_tar(data, dice)
        if name == "test/0.tar" and dice.random() < 0.5
        else mutated(files[name], dice, data, words=name != "test/0.tar")
    )
    return files, read_task


def read_task(folder: pathlib.Path, out: pathlib.Path) -> tuple[int, int, str]:
    from eval import samples
    from eval import tasks as eval_tasks

    data = eval_tasks.resolve_task({"name": "a_task", "path": str(folder)})
    preprocess = {
        "size": 16,
        "mode": "RGB",
        "mean": [0.5] * 3,
        "std": [0.5] * 3,
        "interpolation": "bicubic",
        "resize_mode": "shortest",
        "fill_color": 0,
    }
    found = sum(len(batch.items) for batch in samples.read_batches(data, preprocess, 2))
    return found, 0, ""


RESULTS = {  # of other programs, for report.beside
    "open_clip.csv": b"""name,pretrained,params (M),Average perf. on 38 datasets,ImageNet 1k,Caltech-101
ViT-B-32,openai,151.3,0.5,0.63,"0.87"
ViT-L-14,"laion, 2b",427.6,0.6,0.75,
""",
    "one.json": b"""{"dataset": "wds/imagenet1k", "model": "ViT-B-32", "pretrained": "openai", "language": "en",
"task": "zeroshot_classification", "metrics": {"acc1": 0.63, "acc5": NaN, "mean_per_class_recall": 0.6, "epochs": 3}}""",
    "built.csv": b"""acc1,acc5,dataset,model,pretrained,task,language
0.63,0.9,wds/imagenet1k,ViT-B-32,openai,zeroshot_classification,en
""",
    "eval_results.jsonl": b"""{"key": "imagenet1k", "dataset": "ImageNet 1k", "metrics": {"acc1": 0.03, "acc5": 0.1}}
{"key": "vtab/pets", "dataset": "Pets", "metrics": {"acc1": 0.1, "image_retrieval_recall@1": 1, "text_retrieval_recall@1": 0}}
""",
    "list.csv": b"name,task,value,unit\na,imagenet1k,12.5,percent\nb,cifar10,0.5,fraction\n",
    "table.csv": b"name,imagenet1k,cifar10\na,12.5,\nb,50,1e1\n",
}  # fmt: skip


def results(dice: random.Random) -> tuple[Files, Reader]:
    name = dice.choice(sorted(RESULTS))
    text = mutated(RESULTS[name], dice, RESULTS[dice.choice(sorted(RESULTS))], words=True, most=2)
    return {name: text, "unit": b"percent" if name == "table.csv" else b""}, read_result


def read_result(folder: pathlib.Path, out: pathlib.Path) -> tuple[int, int, str]:
    from pipeline.report import imported

    (path,) = (path for path in folder.iterdir() if path.name != "unit")
    entry = config.BesideConfig(results=str(path), unit=(folder / "unit").read_text() or None)
    found = imported.read_results(entry, "report.beside.0")
    cells = [cell for row in found.rows for by_metric in row.cells.values() for cell in by_metric.values()]
    assert all(0 <= cell.fraction() <= 1 for cell in cells)
    return len(found.rows), 0, ""


GROUPS: dict[str, Callable[[random.Random], tuple[Files, Reader]]] = {
    "archives": archives, "tables": tables, "images": pictures, "tensors": tensors, "configs": configs, "tasks": tasks,
    "results": results,
}  # fmt: skip
PICTURES = all_pictures()


# Inputs that were found to harm, or are known to have harmed other readers: (its making, what must become of it).


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png_of(width: int, height: int, *chunks: bytes, rows_of: bytes = b"") -> bytes:
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + chunk(b"IDAT", zlib.compress(rows_of)) + chunk(b"IEND", b"")


def tags(entries: list[tuple[int, int, int, int]], after: bytes = b"") -> bytes:
    """A TIFF, or EXIF, of these (tag, type, count, value); a value of -1 is where `after` begins."""
    start = 10 + 12 * len(entries) + 4
    listed = [
        struct.pack("<HHII", tag, kind, count, start if value < 0 else value) for tag, kind, count, value in entries
    ]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(listed) + bytes(4) + after


def tiff(width: int, more: list[tuple[int, int, int, int]], after: bytes) -> bytes:
    plain = [(256, 4, 1, width), (257, 4, 1, width), (258, 3, 1, 8), (262, 3, 1, 1), (277, 3, 1, 1)]
    return tags(sorted(plain + more), after)


def heaped(count: int, size_bytes: int) -> bytes:
    """EXIF whose tags all lie over the same bytes."""
    return tags(
        [(0x0112, 3, 1, 6)] + [(1000 + number, 1, size_bytes, -1) for number in range(count)], bytes(size_bytes)
    )


def many_scans() -> bytes:
    data = encoded(Image.new("L", (3000, 3000), 9), "JPEG", progressive=True)
    return data[:-2] + data[data.rindex(b"\xff\xda") : -2] * 3000 + data[-2:]


def tile_bomb() -> bytes:
    data = zlib.compress(bytes(1 << 20), 9)
    return tiff(
        16, [(259, 3, 1, 8), (322, 4, 1, 32768), (323, 4, 1, 32768), (324, 4, 1, -1), (325, 4, 1, len(data))], data
    )


def laughs() -> bytes:
    """A root that stands for 9 ** 11 words."""
    lines = ["a0: &a0 [x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
    return CONFIG.replace(b"root: runs/a", b"references: {%s}\nroot: *a11" % ", ".join(lines).encode())


def npz_of(text: str, method: int = zipfile.ZIP_DEFLATED, body: bytes = bytes(96)) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w", method) as file:
        file.writestr("l14_img.npy", b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode() + body)
    return sink.getvalue()


def of_image(data: bytes) -> tuple[Files, Reader]:
    return {"a.jpg": data}, read_picture


def of_tar(data: bytes) -> tuple[Files, Reader]:
    return {"0.tar": data}, pool_of(layout="webdataset", carry=CARRY)


def of_urls(name: str, data: bytes, **more: bytes) -> tuple[Files, Reader]:
    carry = {"l14_img": "float16[]"} if more else CARRY
    boxes = {} if more or name.endswith("csv") else {"face_boxes_column": "face_bboxes"}
    return {name: data, **{f"0.{kind}": value for kind, value in more.items()}}, pool_of(
        layout="urls", carry=carry, **boxes
    )


def of_config(text: bytes, override: bytes = b"") -> tuple[Files, Reader]:
    return {"a.yaml": text, "set": override}, read_config


def of_tensor(name: str, data: bytes) -> tuple[Files, Reader]:
    return {name: data}, read_tensors


def npy_of(descr: str, shape: str, body: bytes = bytes(96)) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}\n"
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(text)) + text.encode() + body


def one_sample() -> bytes:
    """A tar of one sample, without its end mark."""
    data = tar_bytes(sample_members(0)).rstrip(b"\0")
    return data + bytes(-len(data) % 512)


def days(value: int) -> bytes:
    return parquet({**IMAGES_TABLE, "note": pa.array([value] * 6, pa.date32())})


def claimed_rows() -> bytes:
    """A parquet of URLs whose only row group says that it has 200 million rows."""
    data = parquet({"url": URLS * 2, "text": CAPTIONS * 2}, compression="none")
    footer_bytes = int.from_bytes(data[-8:-4], "little")
    body, footer = data[: -8 - footer_bytes], data[-8 - footer_bytes : -8]
    # Thrift's zigzag varint: 24 rows are 0x30; it stands for num_rows, in the file's and in the row group's metadata.
    changed = footer.replace(b"\x16\x30", b"\x16" + bytes([0x80, 0x88, 0xDE, 0xBE, 0x01]))
    return body + changed + len(changed).to_bytes(4, "little") + b"PAR1"


END = bytes(1024)
NEXT = tar_bytes([("5.jpg", picture(0, "JPEG")), ("5.txt", "words")])
HOSTILE: dict[str, tuple[Callable[[], tuple[Files, Reader]], str]] = {
    # Archives. In Python < 3.11.14 a negative size leads back, for ever (CVE-2025-8194), and digits take their square (CVE-2024-6232).
    "a size that leads back": (lambda: of_tar(one_sample() + header("5.jpg", b"0", number_field(-512)) + END), "1 ok, 1 failed: truncated_tar"),
    "a size that leads back, of an unknown kind": (lambda: of_tar(one_sample() + header("5", b"Z", number_field(-512)) + END), "1 ok, 1 failed: truncated_tar"),
    "a pax size that leads back": (lambda: of_tar(one_sample() + extended(b"x", record("size", "-1536")) + NEXT), "1 ok, 1 failed: truncated_tar"),
    "names of names": (lambda: of_tar(one_sample() + extended(b"L", b"abcd\0") * 3000 + NEXT), "1 ok, 1 failed: truncated_tar"),
    "pax headers of pax headers": (lambda: of_tar(one_sample() + extended(b"x", record("path", "a")) * 3000 + NEXT), "1 ok, 1 failed: truncated_tar"),
    "a sparse map without end": (lambda: of_tar(one_sample() + summed(bytearray(header("5.jpg", b"S", number_field(5))[:482] + b"\1" + bytes(29)))), "1 ok, 1 failed: truncated_tar"),
    "a first header of pax that is none": (lambda: of_tar(extended(b"x", record("GNU.sparse.major", "1") + record("GNU.sparse.minor", "0")) + tar_bytes([("a.txt", "999999999\n")])), "none of 1 rows is usable .1 truncated_tar"),
    "a pax header of digits": (lambda: of_tar(one_sample() + extended(b"x", b"1" * 400_000) + NEXT), "1 ok, 1 failed: truncated_tar"),
    "a pax header of many keys": (lambda: of_tar(one_sample() + extended(b"x", b"4 a\n" * 60_000 + b"=") + NEXT), "1 ok, 1 failed: truncated_tar"),
    "links, devices and names that leave": (lambda: of_tar(archive(tarfile.GNU_FORMAT, escaping())), "3 ok, 1 failed: missing_caption"),
    "a name that is no Unicode": (lambda: of_tar(one_sample() + extended(b"x", record("path", "X").replace(b"X", b"\xff.txt").replace(b"9 path", b"13 path")) + NEXT), "ok"),
    "classes that are no text": (lambda: ({"classnames.txt": b"\xff\xfe", "zeroshot_classification_templates.txt": b"{c}", "test/nshards.txt": b"1", "test/0.tar": tar_bytes([("a.jpg", picture(0, "JPEG")), ("a.cls", "0")])}, pool_of(layout="clip_benchmark", path="test")), "expected text in UTF-8"),
    # Images.
    "many scans": (lambda: of_image(many_scans()), "4 failed"),
    "many chunks": (lambda: of_image(png_of(8, 8, chunk(b"teXt", b"") * 500_000, rows_of=bytes(72))), "4 failed"),
    "a comment in small blocks": (lambda: of_image(picture(0, "GIF")[:13] + b"!\xfe" + (b"\xff" + b"a" * 255) * (1 << 18)), "4 failed"),
    "more pixels than memory": (lambda: of_image(png_of(60_000, 60_000)), "4 failed"),
    "tiles larger than the image": (lambda: of_image(tile_bomb()), "4 failed"),
    "tags over the same bytes": (lambda: of_image(tiff(1, [(1000 + n, 1, 1 << 20, -1) for n in range(1500)], bytes(1 << 20))), "4 failed"),
    "EXIF over the same bytes, in a PNG": (lambda: of_image(png_of(8, 8, chunk(b"eXIf", heaped(1500, 1 << 20)), rows_of=bytes(72))), "4 failed"),
    "EXIF over the same bytes, in a JPEG": (lambda: of_image(encoded(Image.new("L", (8, 8)), "JPEG", exif=b"Exif\0\0" + heaped(2600, 33_000))), "4 failed"),
    "EXIF that points to itself": (lambda: of_image(encoded(Image.new("L", (8, 8)), "JPEG", exif=b"Exif\0\0" + tags([(0x8769, 4, 1, 8), (0x8825, 4, 1, 8), (0x0112, 3, 1, 6)]))), "ok"),
    "strips without number": (lambda: of_image(tiff(9, [(259, 3, 1, 1), (273, 4, 1 << 20, -1), (278, 4, 1, 1), (279, 4, 1 << 20, -1)], bytes(4 << 20))), "4 failed"),
    # Tables.
    "a day after the year 9999": (lambda: ({"0.parquet": days(2**31 - 1)}, pool_of(layout="parquet", carry=CARRY)), "12 bad_metadata"),
    "two columns of a name": (lambda: ({"0.parquet": parquet(pa.Table.from_arrays([pa.array([b"a"]), pa.array([b"b"]), pa.array(["c"])], ["image", "image", "caption"]))}, pool_of(layout="parquet")), "expected parquet files; none of them can be read"),
    "two columns of URLs": (lambda: ({"0.parquet": parquet(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["url", "url", "text"]))}, pool_of(layout="urls")), "two columns url"),
    "200 million rows in a kilobyte": (lambda: ({"0.parquet": claimed_rows()}, pool_of(layout="urls")), "200000000 rows in"),
    "boxes beyond floats": (lambda: of_urls("0.jsonl", json.dumps({"url": URLS[0], "text": "a", "note": 1, "score": 1, "face_bboxes": [[0, 0, 1, 10**400]]}).encode()), "none of 1 rows|1 failed: bad_metadata"),
    "values within values": (lambda: of_urls("0.jsonl", b'{"url": "a", "text": "b", "score": 1, "note": ' + b"[" * 900 + b"]" * 900 + b', "face_bboxes": ' + b"[" * 900 + b"]" * 900 + b"}"), "1 bad_metadata"),
    "features with a negative width": (lambda: of_urls("0.parquet", parquet({"url": URLS, "text": CAPTIONS}), npz=npz_of("{'descr': '<f4', 'fortran_order': False, 'shape': (12, -2), }")), "expected 1 to 65536"),
    "features in LZMA that are none": (lambda: of_urls("0.parquet", parquet({"url": URLS, "text": CAPTIONS}), npz=npz_of("{'descr': '<f4', 'fortran_order': False, 'shape': (12, 2), }", zipfile.ZIP_LZMA)[:60] + b"\xff" * 30 + npz_of("{'descr': '<f4', 'fortran_order': False, 'shape': (12, 2), }", zipfile.ZIP_LZMA)[90:]), "l14_img"),
    "features of a header that is code": (lambda: of_urls("0.parquet", parquet({"url": URLS, "text": CAPTIONS}), npz=npz_of("__import__('os').system('touch x')")), "l14_img"),
    # Arrays.
    "uids of more than 64 bits": (lambda: of_tensor("a.uids.npy", npy_of("[('f0', '<u8'), ('f1', '<u8')]", f"({'9' * 30},)")), "expected a .npy of dtype u8,u8"),
    "uids whose header is a chain of signs": (lambda: of_tensor("a.uids.npy", npy_of("'<u8'", "-" * 4000 + "1")), "expected a .npy of dtype u8,u8"),
    "uids of a million gigabytes": (lambda: of_tensor("a.uids.npy", npy_of("[('f0', '<u8'), ('f1', '<u8')]", f"({1 << 50},)")), "expected a .npy of dtype u8,u8"),
    "an array that is a pickle": (lambda: of_tensor("a.npy", npy_of("'|O'", "(1,)", pickle.dumps(Touch()))), "0 ok, 2 failed"),
    "a tensor that is a pickle": (lambda: of_tensor("a.pt", pickle.dumps(Touch())), "0 ok, 2 failed"),
    "arrays in an old tar of torch": (lambda: of_tensor("a.pt", archive(tarfile.GNU_FORMAT, (member("storages", tarfile.SYMTYPE, "/etc"),))), "0 ok, 2 failed"),
    # Configs.
    "aliases of aliases": (lambda: of_config(laughs()), "more than 1000000 values"),
    "an alias of itself": (lambda: of_config(b"root: &a [*a]"), "expected YAML"),
    "a mapping in itself": (lambda: of_config(b"root: &a {b: *a}"), "expected YAML"),
    "a whole number of 5,000 digits": (lambda: of_config(CONFIG + b"seed: " + b"9" * 5000), "expected YAML"),
    "an infinite number": (lambda: of_config(CONFIG.replace(b"1e-3", b"1e999")), "expected a finite number"),
    "a tag of a number on a word": (lambda: of_config(CONFIG + b"seed: !!int x"), "expected YAML"),
    "a tag of a time on a word": (lambda: of_config(CONFIG + b"seed: !!timestamp x"), "expected YAML"),
    "a tag of a bool on a word": (lambda: of_config(CONFIG + b"seed: !!bool x"), "expected YAML"),
    "a tag that is code": (lambda: of_config(CONFIG + b"seed: !!python/object/apply:os.system ['touch x']"), "expected YAML"),
    "a date": (lambda: of_config(CONFIG + b"seed: !!timestamp 2020-01-01"), "a date, expected a mapping"),
    "a list as a key": (lambda: of_config(CONFIG + b"? [a]\n: b"), "expected YAML"),
    "half of a character": (lambda: of_config(CONFIG + b'published: {basic: 1}\npublished_note: "\\ud800"'), "expected text that is Unicode"),
    "a path with a zero": (lambda: of_config(CONFIG + b'baseline: "a\\0b"'), "without control characters"),
    "a value of two lines": (lambda: of_config(CONFIG + b'seed: "a\\nb"'), "seed = a b, expected a whole number"),
    "no text at all": (lambda: of_config(b"\0\1\2"), "expected YAML"),
    "an index that is a power": (lambda: of_config(CONFIG, "compare.²=x".encode()), "expected an index below 2"),
}  # fmt: skip


class Touch:
    def __reduce__(self):
        return (os.system, ("touch executed",))


# The child.


def memory_kb(field: str) -> int:
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def run_inputs(group: str, inputs: Iterator[tuple[str, Callable[[], tuple[Files, Reader]]]]) -> None:
    """None; reads the inputs one by one, and prints their names before and what became of them after."""
    space = pathlib.Path.cwd().parent
    folder, out = space / "in", space / "out"
    for name, make in inputs:
        files, reader = make()
        for file, data in files.items():
            path = folder / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        print(json.dumps(["begin", name]), flush=True)
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak of memory is that of now
        before_kb = memory_kb("VmHWM")
        faulthandler.dump_traceback_later(LIMIT_S, exit=True)
        try:
            ok, failed, note = reader(folder, out)
            outcome = f"{ok} ok, {failed} failed: {note}"
        except WinnowError as error:
            ok, failed, outcome = 0, 0, str(error)
            assert outcome.strip() and "\n" not in outcome, outcome
        faulthandler.cancel_dump_traceback_later()
        print(json.dumps(["end", name, ok, failed, outcome]), flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(out, ignore_errors=True)
        used_kb = memory_kb("VmHWM") - before_kb
        assert used_kb < MEMORY_BYTES >> 10, f"{used_kb >> 10} MB"
        left = sorted(str(path.relative_to(space)) for path in space.rglob("*") if path.is_file())
        assert left == ["outside/secret.txt"], left
        assert (space / "outside" / "secret.txt").read_text() == SECRET


def child(group: str, start: int, stop: int) -> None:
    if group == "hostile":
        cases: Any = [(name, make) for name, (make, _) in HOSTILE.items()]
    else:
        cases = (
            (str(number), lambda number=number: GROUPS[group](random.Random(f"{group} {number}")))
            for number in range(start, stop)
        )
    pages = int(pathlib.Path("/proc/self/statm").read_text().split()[0])
    limit_bytes = pages * resource.getpagesize() + SPACE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit_bytes, limit_bytes))
    run_inputs(group, cases)


# The tests.


def read_in_child(tmp_path: pathlib.Path, group: str, start: int = 0, stop: int = 0) -> list[tuple[str, int, int, str]]:
    """(name, ok rows, failed rows, outcome) of each input; fails where one was too much for the reader."""
    space = tmp_path / "space"
    for name in ("cwd", "tmp", "outside"):
        (space / name).mkdir(parents=True)
    (space / "outside" / "secret.txt").write_text(SECRET)
    env = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(space / "tmp"),
        "PYTHONWARNINGS": "ignore",
        "MALLOC_ARENA_MAX": "2",
    }
    command = [sys.executable, "-m", "tests.test_fuzz", group, str(start), str(stop)]
    with open(tmp_path / "errors", "w+b") as errors, open(tmp_path / "outcomes", "w+b") as outcomes:
        done = subprocess.run(command, cwd=space / "cwd", env=env, stdout=outcomes, stderr=errors, timeout=1800)
        outcomes.seek(0)
        lines = [json.loads(line) for line in outcomes.read().decode().splitlines()]
        errors.seek(0)
        last = next((line[1] for line in reversed(lines) if line[0] == "begin"), "none")
        message = errors.read().decode(errors="replace")[-4000:]
    assert done.returncode == 0, f"{group}, input {last}: the reader ended with {done.returncode}\n{message}"
    return [tuple(line[1:]) for line in lines if line[0] == "end"]


def check_group(tmp_path: pathlib.Path, group: str, start: int, stop: int) -> None:
    found = read_in_child(tmp_path, group, start, stop)
    assert len(found) == stop - start
    ok, failed = sum(line[1] for line in found), sum(line[2] for line in found)
    refused = sum(not line[1] + line[2] for line in found)
    assert ok > len(found) // 50 and failed + refused > len(found) // 10  # neither all whole nor all broken


@pytest.mark.parametrize("group", GROUPS)
def test_mutated_files_are_errors_or_counted_rows(tmp_path, group):
    check_group(tmp_path, group, 0, COUNTS[group])


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
def test_many_more_mutated_files(tmp_path, group):
    check_group(tmp_path, group, 100_000, 100_000 + 20 * COUNTS[group])


def test_hostile_files(tmp_path):
    found = {name: outcome for name, *_, outcome in read_in_child(tmp_path, "hostile")}
    assert list(found) == list(HOSTILE)
    wrong = {name: found[name] for name, (_, expected) in HOSTILE.items() if not re.search(expected, found[name])}
    assert not wrong


if __name__ == "__main__":
    child(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
