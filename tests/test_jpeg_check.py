"""Which JPEGs surely decode, beside what Pillow does with them."""

from __future__ import annotations

import io
import tarfile

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter

import stages.ingest.fetch.picture
from pipeline.core.errors import ImageError
from pipeline.core.images import decode_rgb
from stages.ingest.fetch.jpeg_check import sure_jpeg
from stages.ingest.fetch.picture import stored_picture
from stages.ingest.fetch.settings import ImageRecipe

KINDS = [
    {},
    {"subsampling": 0},
    {"subsampling": 1},
    {"progressive": True},
    {"progressive": True, "restart_marker_rows": 1},
    {"optimize": True, "restart_marker_blocks": 1},
    {"mode": "L"},
    {"mode": "L", "progressive": True, "quality": 30},
    {"keep_rgb": True},
    {"comment": "by hand", "icc_profile": b"profile" * 20_000},
]


def jpeg(width_px=19, height_px=17, mode="RGB", **options) -> bytes:
    noise = np.random.default_rng(5).integers(0, 256, (height_px, width_px, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).filter(ImageFilter.GaussianBlur(1)).convert(mode).save(out, "JPEG", **options)
    return out.getvalue()


def segments(data: bytes) -> list[tuple[int, int]]:
    """(start, end) of a JPEG's segments up to its first scan."""
    found = [(2, 4 + int.from_bytes(data[4:6], "big"))]
    while data[found[-1][0] + 1] != 0xDA:
        at = found[-1][1]
        found.append((at, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")))
    return found


def is_sure(data: bytes) -> bool:
    """Whether the file is called sure; fails where it is, and its decoder raises or sees another size."""
    sure = sure_jpeg(data)
    if sure is None:
        return False
    if sure.width_px * sure.height_px < 1_000_000:  # sizes are damaged as well, and many large ones are slow
        assert decode_rgb(data, apply_orientation=False).size == (sure.width_px, sure.height_px)
    return True


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("size", [(1, 1), (8, 8), (33, 17), (200, 150)])
def test_common_files_are_sure(size, options):
    data = jpeg(*size, **options)
    assert sure_jpeg(data) == (*size, True)
    assert sure_jpeg(data + b"what follows the end is not read") == (*size, True)


@pytest.mark.parametrize("sampling", ["411", "420", "422", "440", "444"])
def test_samplings(sampling):
    options = [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, getattr(cv2, f"IMWRITE_JPEG_SAMPLING_FACTOR_{sampling}")]
    data = cv2.imencode(".jpg", np.full((31, 45, 3), 90, np.uint8), options)[1].tobytes()
    assert is_sure(data) and sure_jpeg(data) == (45, 31, True)


def test_metadata_are_left_to_pillow():
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    xmp = b'<x tiff:Orientation="6"/>'
    for data in (jpeg(exif=exif), jpeg(xmp=xmp), b"\xff\xd8\xff\xe0\0\6JFIF" + jpeg()[2:]):
        assert sure_jpeg(data) == (19, 17, False)


def test_real_photos_are_sure(real_data_path):
    with tarfile.open(real_data_path / "web_metadata" / "cc12m_sample_32.tar") as archive:
        files = [archive.extractfile(member).read() for member in archive if member.name.endswith("jpg")]
    assert len(files) == 32 and all(is_sure(data) for data in files)
    assert sum(sure_jpeg(data).is_bare for data in files) == 30


def test_what_is_uncommon_is_not_sure():
    data = jpeg()
    frame, scan = data.index(b"\xff\xc0"), data.index(b"\xff\xda")
    for other in (b"", b"\xff\xd8", data[:4], data[:-1], data[:-2], data[: len(data) // 2], jpeg(mode="CMYK")):
        assert not is_sure(other)
    assert not is_sure(data[:frame] + b"\xff\xc9" + data[frame + 2 :])  # arithmetic codes
    assert not is_sure(data[: frame + 5] + b"\0\0" + data[frame + 7 :])  # a height that is told later
    assert not is_sure(data[:scan] + data[frame:])  # two frames
    assert not is_sure(data[:-2] + data[scan:])  # two scans of a baseline file
    assert not is_sure(data[:2] + data[2:20] * 600 + data[20:])
    progressive = jpeg(progressive=True)
    last = progressive[progressive.rindex(b"\xff\xda") : -2]
    assert not is_sure(progressive[:-2] + last * 60 + progressive[-2:])  # which takes a decoder long


def test_mean_values_that_leave_32_bits():
    """The one thing inside a scan that makes a decoder raise: 65,537 times the largest difference."""

    def segment(kind, body):
        return b"\xff" + bytes([kind]) + (len(body) + 2).to_bytes(2, "big") + body

    def file(side_px, difference_bits):
        data = b"\xff\xd8" + segment(0xDB, bytes(1) + b"\1" * 64)
        data += segment(0xC2, b"\x08" + side_px.to_bytes(2, "big") * 2 + b"\1\1\x11\0")
        data += segment(0xC4, b"\0\1" + bytes(15) + bytes([difference_bits]))
        blocks = "0" + "1" * difference_bits + "0" * (15 - difference_bits)
        scan = bytes.fromhex(f"{int(blocks, 2):04x}").replace(b"\xff", b"\xff\0") * (side_px // 8) ** 2
        return data + segment(0xDA, b"\1\1\0\0\0\0") + scan + b"\xff\xd9"

    assert sure_jpeg(file(64, 11)) == (64, 64, True)
    with pytest.raises(ImageError):
        decode_rgb(file(2056, 15))
    assert not is_sure(file(2056, 15))
    with pytest.raises(ImageError):
        stored_picture(file(2056, 15), ImageRecipe(keep_original=True, resize="no"), None)


@pytest.mark.parametrize("options", KINDS[:-1])
def test_no_damage_makes_a_sure_file_raise(options):
    """Each byte of the headers at many values, segments that are missing, doubled or swapped, scans with anything."""
    random = np.random.default_rng(11)
    whole = jpeg(**options)
    parts = segments(whole)
    scan = parts[-1][1]
    outcomes = []
    for at in range(2, scan):
        bits = whole[at] ^ (1 << int(random.integers(8)))
        for value in {0, 1, 2, 3, 16, 0x11, 0x22, 0x41, 63, 255, bits, int(random.integers(256))} - {whole[at]}:
            outcomes.append(is_sure(whole[:at] + bytes([value]) + whole[at + 1 :]))
    for start, end in parts:
        outcomes.append(is_sure(whole[:start] + whole[end:]))
        for first, last in parts:
            outcomes.append(is_sure(whole[:first] + whole[start:end] + whole[first:]))
            outcomes.append(is_sure(whole[:first] + whole[start:end] + whole[last:]))
    for _ in range(400):
        data = bytearray(whole)
        for at in random.integers(scan, len(data), random.integers(1, 6)):
            data[at : at + 1] = random.choice([b"\xff", b"\xff\xd9", b"\xff\xd3", b"\xff\0", b"\xff\xc4", b"", b"\x5a"])
        outcomes.append(is_sure(bytes(data)))
    outcomes += [is_sure(whole[:at]) for at in range(len(whole))]
    assert 0.2 < np.mean(outcomes) < 0.8


@pytest.mark.parametrize("options", [*KINDS, {"exif": True}])
def test_what_is_stored_is_what_pillow_alone_would_store(options, monkeypatch):
    if options.get("exif"):
        options = {"exif": Image.Exif()}
        options["exif"][0x010F] = "Maker"
    random = np.random.default_rng(2)
    whole = jpeg(60, 40, **options)
    cases = [whole] + [bytes(whole[:at]) for at in random.integers(0, len(whole), 5)]
    for _ in range(40):
        data = bytearray(whole)
        data[random.integers(2, len(data))] = random.integers(256)
        cases.append(bytes(data))

    def outcomes():
        for data in cases:
            for recipe in (ImageRecipe(keep_original=True), ImageRecipe(keep_original=True, size_px=59)):
                try:
                    yield stored_picture(data, recipe, None)
                except ImageError as error:
                    yield error.reason, str(error)

    with_check = list(outcomes())
    monkeypatch.setattr(stages.ingest.fetch.picture, "sure_jpeg", lambda data: None)
    assert list(outcomes()) == with_check
