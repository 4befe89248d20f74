"""What is stored of a downloaded image, beside img2dataset's Resizer, OpenCV's area filter and Pillow's decoder."""

from __future__ import annotations

import concurrent.futures
import io
import json
import os
import resource
import struct
import tarfile
import warnings
import zlib

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter
from PIL.TiffImagePlugin import IFDRational

from pipeline.core.errors import ImageError
from pipeline.core.images import decode_rgb
from stages.ingest.fetch.area_resize import area_resize
from stages.ingest.fetch.picture import stored_picture
from stages.ingest.fetch.settings import ImageRecipe

MODES = ["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]
BOXES = [[0.2, 0.3, 0.45, 0.6], [0.7, 0.05, 0.8, 0.2]]


@pytest.fixture(scope="module")
def img2dataset():
    """img2dataset's (Resizer, BoundingBoxBlurrer)."""
    os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from img2dataset.blurrer import BoundingBoxBlurrer
        from img2dataset.resizer import Resizer
    return Resizer, BoundingBoxBlurrer


@pytest.fixture(scope="module")
def photos(real_data_path) -> list[Image.Image]:
    """Four real photos of the web."""
    with tarfile.open(real_data_path / "web_metadata" / "cc12m_sample_32.tar") as archive:
        members = [member for member in archive if member.name.endswith("jpg")][:4]
        return [Image.open(io.BytesIO(archive.extractfile(member).read())).convert("RGB") for member in members]


def picture_like(width_px=61, height_px=47, seed=0) -> Image.Image:
    """A smooth synthetic picture without any symmetry."""
    noise = np.random.default_rng(seed).integers(0, 256, (height_px, width_px, 3), np.uint8)
    return Image.fromarray(noise).filter(ImageFilter.GaussianBlur(3))


def encoded(image: Image.Image, image_format="PNG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, image_format, **options)
    return out.getvalue()


def stored(data: bytes, boxes=None, **recipe) -> tuple[np.ndarray, object]:
    """The pixels that decode_rgb gives of what is stored, and the Picture."""
    picture = stored_picture(data, ImageRecipe(**recipe), boxes)
    pixels = np.asarray(decode_rgb(picture.data))
    assert pixels.shape == (picture.height_px, picture.width_px, 3)
    return pixels.astype(int), picture


def reason(data: bytes, **recipe) -> str:
    with pytest.raises(ImageError) as error:
        stored_picture(data, ImageRecipe(**recipe), None)
    return error.value.reason


def theirs(img2dataset, data, boxes=None, **recipe):
    """(pixels, width, height, original width, original height) of img2dataset's Resizer, stored as PNG."""
    resizer_class, blurrer_class = img2dataset
    resizer = resizer_class(
        recipe["size_px"],
        recipe["resize"],
        recipe["only_if_bigger"],
        encode_quality=1,
        encode_format="png",
        blurrer=blurrer_class() if boxes is not None else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file, *sizes, error = resizer(io.BytesIO(data), boxes)
    assert error is None
    return np.asarray(Image.open(io.BytesIO(file)).convert("RGB")).astype(int), sizes


@pytest.mark.real_data
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("only_if_bigger", [True, False])
def test_photos_as_img2dataset_stores_them(photos, img2dataset, mode, only_if_bigger):
    for photo, longest_px in zip(photos, (413, 140, 256, 100), strict=True):
        photo = photo.copy()
        photo.thumbnail((longest_px, longest_px))
        data = encoded(photo, "JPEG", quality=90)
        recipe = {"size_px": 128, "resize": mode, "only_if_bigger": only_if_bigger}
        for boxes in (None, BOXES):
            expected, sizes = theirs(img2dataset, data, boxes, **recipe)
            pixels, picture = stored(data, boxes, format="png", **recipe)
            assert sizes == [
                picture.width_px, picture.height_px, picture.original_width_px, picture.original_height_px,
            ]  # fmt: skip
            # img2dataset cuts off the fractions of a blurred photo, in and outside the boxes
            assert np.abs(pixels - expected).max() <= (1 if boxes is None else 2)
            if boxes is None:
                assert (pixels != expected).mean() < 1e-3


@pytest.mark.real_data
def test_jpeg_is_the_one_opencv_would_write(photos):
    data = encoded(photos[0], "JPEG", quality=90)
    as_png, _ = stored(data, format="png", size_px=200)
    as_jpg, picture = stored(data, size_px=200)
    _, expected = cv2.imencode(".jpg", as_png.astype(np.uint8)[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert np.abs(as_jpg - np.asarray(decode_rgb(expected.tobytes())).astype(int)).max() <= 1
    assert picture.format == "jpg"
    assert "exif" not in Image.open(io.BytesIO(picture.data)).info


def test_area_filter_is_opencv_s():
    random = np.random.default_rng(1)
    different = total = 0
    for _ in range(150):
        height_px, width_px = random.integers(1, 300, 2)
        target = (int(random.integers(1, height_px + 1)), int(random.integers(1, width_px + 1)))
        pixels = random.integers(0, 256, (height_px, width_px, 3), np.uint8)
        expected = cv2.resize(pixels, target[::-1], interpolation=cv2.INTER_AREA).reshape(*target, 3).astype(int)
        result = area_resize(pixels, *target).astype(int)
        assert np.abs(result - expected).max() <= 1
        different += np.count_nonzero(result != expected)
        total += result.size
    assert different / total < 1e-3
    white = np.full((97, 61, 3), 255, np.uint8)
    assert (area_resize(white, 40, 25) == 255).all()  # no overflow of the sums


def test_area_filter_without_a_place_for_its_cache(tmp_path):
    """A read-only install, as on a cluster's shared disk: the filter is compiled anew, and works."""
    import pathlib
    import shutil
    import subprocess
    import sys

    root = pathlib.Path(__file__).resolve().parent.parent
    module = tmp_path / "area_resize.py"
    shutil.copy(root / "stages/ingest/fetch/area_resize.py", module)
    # A cache folder that is a file can't be written by any user, root included.
    (tmp_path / "__pycache__").write_text("")
    blocked = tmp_path / "blocked"
    blocked.write_text("")
    code = "import area_resize, numpy; print(area_resize.area_resize(numpy.ones((9, 9, 3), numpy.uint8), 4, 4).sum())"
    environment = {**os.environ, "HOME": str(blocked), "XDG_CACHE_HOME": str(blocked), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.split() == ["48"], done.stderr


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("resize", ["no", "center_crop", "border"])
def test_orientation_is_applied(orientation, resize):
    upright = picture_like(90, 61)
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    lying = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(lying, exif=exif)
    recipe = {"format": "png", "size_px": 40, "resize": resize}
    expected, _ = stored(encoded(upright), **recipe)
    pixels, picture = stored(data, **recipe)
    assert np.abs(pixels - expected).max() <= 1
    assert (picture.original_width_px, picture.original_height_px) == (90, 61)
    assert json.loads(picture.exif)["Image Orientation"] == str(orientation)
    # With a switch, as it lies; a reader must not turn it later, so original bytes with the tag are not kept.
    as_it_lies, picture = stored(data, apply_orientation=False, keep_original=True, format="png", resize="no")
    np.testing.assert_array_equal(as_it_lies, np.asarray(lying))
    assert (picture.original_width_px, picture.original_height_px) == lying.size


def test_boxes_turn_with_the_photo():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise: the top left of the lying photo is seen at the top right
    photo = picture_like(200, 100)
    data = encoded(photo, exif=exif)
    plain, _ = stored(data, format="png")
    blurred, _ = stored(data, [[0.1, 0.1, 0.3, 0.4]], format="png")
    ys, xs = np.nonzero((plain != blurred).any(axis=2))
    assert xs.min() > 50 and xs.max() < 100 and ys.max() < 80 and xs.size > 500


def test_blur_stays_at_its_boxes():
    photo = picture_like(200, 150)
    plain, _ = stored(encoded(photo), format="png")
    blurred, _ = stored(encoded(photo), [[0.25, 0.2, 0.5, 0.6]], format="png")
    changed = (plain != blurred).any(axis=2)
    box = np.zeros_like(changed)
    box[30 - 18 : 90 + 18, 50 - 18 : 100 + 18] = True  # 60 px long: grown by 6 px, blurred over 6 px, and room
    assert not changed[~box].any()
    assert changed[35:85, 55:95].mean() > 0.9
    assert np.abs(np.diff(blurred[35:85, 55:95], axis=1)).mean() < np.abs(np.diff(plain[35:85, 55:95], axis=1)).mean()
    without, _ = stored(encoded(photo), [[0.25, 0.2, 0.5, 0.6]], format="png", blur_faces=False)
    np.testing.assert_array_equal(without, plain)


@pytest.mark.parametrize(
    "box",
    [[float("nan"), 0, 1, 1], [0.5, 0.5, 0.5, 0.9], [0.9, 0.1, 0.2, 0.5], [2, 2, 3, 3], [1], None, "abcd", [None] * 4],
)
def test_unusable_boxes_are_left_out(box):
    data = encoded(picture_like(), "JPEG")
    assert stored_picture(data, ImageRecipe(keep_original=True), [box]).data == data


def test_boxes_beyond_the_image_are_clipped():
    data = encoded(picture_like())
    expected, _ = stored(data, [[0.5, 0.5, 1, 1]], format="png")
    pixels, _ = stored(data, np.array([[0.5, 0.5, 7.0, np.inf]]), format="png")
    np.testing.assert_array_equal(pixels, expected)
    plain, _ = stored(data, format="png")
    assert (plain != expected).any()


def png16(pixels: np.ndarray) -> bytes:
    """A 16-bit PNG of uint16 [H, W, channels]."""
    height_px, width_px, channels = pixels.shape
    color_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width_px, height_px, 16, color_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_16_bits_become_8(channels):
    pixels8 = np.asarray(picture_like())[:, :, [0, 1, 2, 0][:channels]]
    if channels in (2, 4):
        pixels8 = np.array(pixels8)
        pixels8[:, :, -1] = 255
    data = png16(pixels8.astype(np.uint16) * 257)
    pixels, picture = stored(data, format="png", keep_original=True)
    colors = pixels8[:, :, : 3 if channels > 2 else 1].astype(int)
    np.testing.assert_array_equal(pixels, np.broadcast_to(colors, pixels.shape))
    assert picture.data != data


def test_colors_are_those_that_people_see():
    photo = picture_like()
    expected = np.asarray(photo).astype(int)
    for data, tolerance in (
        (encoded(photo.convert("CMYK"), "JPEG", quality=100), 4),
        (encoded(photo, "TIFF"), 0),
        (encoded(photo, "BMP"), 0),
        (encoded(photo, "WEBP", lossless=True), 0),
        (encoded(photo.convert("RGBA")), 0),
    ):
        pixels, picture = stored(data, format="png", keep_original=True)
        assert np.abs(pixels - expected).max() <= tolerance
        assert picture.data == data or Image.open(io.BytesIO(data)).mode in ("CMYK", "RGBA")
    gray = photo.convert("L")
    pixels, picture = stored(encoded(gray), format="jpg", quality=100)
    assert np.abs(pixels - np.asarray(gray)[:, :, None].astype(int)).max() <= 2
    assert Image.open(io.BytesIO(picture.data)).mode == "RGB"


def test_transparency_is_white(img2dataset):
    rgba = picture_like().convert("RGBA")
    rgba.putalpha(picture_like(seed=1).convert("L"))
    recipe = {"size_px": 512, "resize": "no", "only_if_bigger": True}
    expected, _ = theirs(img2dataset, encoded(rgba), **recipe)
    pixels, _ = stored(encoded(rgba), format="png", keep_original=True, **recipe)
    np.testing.assert_array_equal(pixels, expected)

    palette = Image.new("P", (20, 10), 1)
    palette.putpalette([0, 0, 0, 200, 30, 60])
    palette.paste(0, (0, 0, 10, 10))
    for image_format in ("PNG", "GIF"):
        pixels, _ = stored(encoded(palette, image_format, transparency=0), format="png", keep_original=True)
        assert pixels[5, 2].tolist() == [255, 255, 255] and pixels[5, 15].tolist() == [200, 30, 60]
    keyed = Image.new("RGB", (20, 10), (1, 2, 3))
    pixels, _ = stored(encoded(keyed, transparency=(1, 2, 3)), format="png", keep_original=True)
    assert (pixels == 255).all()


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations(image_format):
    frames = [Image.new("RGB", (30, 20), (60 * i, 0, 200)) for i in range(4)]
    options = {"lossless": True} if image_format == "WEBP" else {}
    data = encoded(frames[0], image_format, save_all=True, append_images=frames[1:], **options)
    pixels, picture = stored(data, format="png", keep_original=True, max_frames=4)
    assert (pixels == [0, 0, 200]).all() and picture.format == "png"
    assert reason(data, max_frames=3) == "too_many_frames"


def lying_header(width_px, height_px) -> bytes:
    """A small JPEG that claims other sizes."""
    data = bytearray(encoded(picture_like(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height_px, width_px)
    return bytes(data)


def test_bombs_are_refused_without_their_memory():
    row = zlib.compress(bytes(1 + 20_000 * 3))
    header = struct.pack(">IIBBBBB", 20_000, 20_000, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", header), (b"IDAT", row), (b"IEND", b"")):
        png += struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
    sliver = encoded(Image.new("RGB", (60_000, 1)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert reason(png) == "too_many_pixels"
    assert reason(lying_header(60_000, 60_000)) == "too_many_pixels"
    assert reason(encoded(Image.new("1", (2_000, 2_000))), max_pixels=3_999_999) == "too_many_pixels"
    # Scaled by its short side, a sliver of 60,000 pixels would become 15.7 billion.
    assert reason(sliver, resize="keep_ratio", only_if_bigger=False) == "too_many_pixels"
    assert reason(sliver, resize="no", format="webp") == "too_many_pixels"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64_000  # kB
    # Whatever a reader would refuse later is no success now.
    large = encoded(Image.new("1", (9_000, 9_000)))
    assert reason(large, resize="no", keep_original=True, max_pixels=100_000_000) == "too_many_pixels"


def test_files_that_would_take_forever():
    comment = b"\x21\xfe" + (b"\xff" + bytes(255)) * 40_000 + b"\0"
    gif = encoded(picture_like().quantize(16), "GIF")
    at = 13 + 3 * (2 << (gif[10] & 7))
    assert reason(gif[:at] + comment + gif[at:]) == "undecodable"
    jpeg = encoded(picture_like(), "JPEG", progressive=True)
    scan = jpeg[jpeg.rindex(b"\xff\xda") : -2]
    assert reason(jpeg[:-2] + scan * 200 + jpeg[-2:]) == "undecodable"
    assert reason(jpeg[:2] + b"\xff\xe1\0\4ab" * 10_000 + jpeg[2:]) == "undecodable"
    assert reason(jpeg[:2] + b"\xff" * 100_000 + jpeg[2:]) == "undecodable"
    png = encoded(picture_like())
    empty = struct.pack(">I", 0) + b"teXt" + struct.pack(">I", zlib.crc32(b"teXt"))
    assert reason(png[:33] + empty * 200_000 + png[33:]) == "undecodable"
    # What only looks like scans is none: a video behind the photo, as phones write it.
    assert stored(jpeg + b"\xff\xda\0\2" * 500)[1].width_px == 61


def test_what_is_no_picture():
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    ico = encoded(picture_like(16, 16), "ICO")
    for data in (svg, ico, b"<html>", b"GIF", b"\xff\xd8\xff", b"x" * 100):
        assert reason(data) == "unsupported_format"
    for image_format in ("JPEG", "PNG", "GIF", "WEBP", "TIFF"):
        data = encoded(picture_like(200, 200), image_format)
        for recipe in ({}, {"keep_original": True}):
            assert reason(data[: len(data) * 2 // 3], **recipe) == "undecodable"


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"subsampling": 0}, {"restart_marker_rows": 1}])
def test_kept_bytes_always_decode(options):
    """The cheap check of a JPEG that is kept agrees with its full decode, for any damage."""
    random = np.random.default_rng(7)
    whole = encoded(picture_like(150, 130), "JPEG", quality=85, **options)
    damaged = [whole[: len(whole) * percent // 100] for percent in range(5, 100, 5)] + [whole[:-1], whole[:-2]]
    for _ in range(120):
        data = bytearray(whole)
        for at in random.integers(2, len(data), random.integers(1, 4)):
            data[at] = random.choice([0, 255, 0xD9, int(random.integers(256))])
        damaged.append(bytes(data))
    outcomes = set()
    for data in damaged:
        try:
            expected = decode_rgb(data).size
        except ImageError as error:
            expected = error.reason
        try:
            picture = stored_picture(data, ImageRecipe(keep_original=True), None)
            assert picture.data != data or expected == (picture.width_px, picture.height_px)
            outcome = "stored"
        except ImageError as error:
            outcome = error.reason
        assert outcome == (expected if isinstance(expected, str) else "stored")
        outcomes.add(outcome)
    assert outcomes >= {"stored", "undecodable"}


@pytest.mark.parametrize(
    "image_format, name",
    [("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp"), ("GIF", "gif"), ("BMP", "bmp"), ("TIFF", "tiff")],
)
def test_original_bytes_are_kept_where_nothing_must_change(image_format, name):
    data = encoded(picture_like(100, 80), image_format)
    pixels, picture = stored(data, keep_original=True, size_px=100)
    assert picture.data == data and picture.format == name and pixels.shape == (80, 100, 3)
    for boxes, recipe in (
        (None, {"keep_original": False}),
        (None, {"keep_original": True, "size_px": 99}),
        (None, {"keep_original": True, "size_px": 100, "only_if_bigger": False, "resize": "border"}),
        (BOXES, {"keep_original": True}),
    ):
        _, picture = stored(data, boxes, **recipe)
        assert picture.data != data and picture.format == "jpg"


@pytest.mark.parametrize("quality", [30, 75, 90, 95, 100])
def test_a_jpg_is_written_as_by_pillow(quality):
    """4:2:0 with the quality's usual tables, whether the picture was resized or not."""
    photo = picture_like(90, 60)
    for size_px in (45, 90):
        pixels, _ = stored(encoded(photo), size_px=size_px, format="png")
        theirs = encoded(Image.fromarray(pixels.astype(np.uint8)), "JPEG", quality=quality, subsampling="4:2:0")
        ours = stored(encoded(photo), size_px=size_px, quality=quality)[1].data
        with Image.open(io.BytesIO(ours)) as image, Image.open(io.BytesIO(theirs)) as expected:
            assert image.layer == expected.layer and image.quantization == expected.quantization
            assert image.info.keys() == expected.info.keys()
            assert np.abs(np.asarray(image).astype(int) - np.asarray(expected)).max() <= 2


def test_exif():
    exif = Image.Exif()
    exif[0x010F] = "Make\ud800r\0"
    exif[0x010E] = "x" * 300
    exif[0x8825] = {1: "N", 2: (51.0, 28.0, 38.0)}
    exif.get_ifd(0x8769)[0x829A] = IFDRational(10, 1000)
    exif.get_ifd(0x8769)[0x8827] = 400
    exif.get_ifd(0x8769)[0x927C] = b"secret"
    photo = picture_like()
    try:
        data = encoded(photo, "JPEG", exif=exif)
    except UnicodeEncodeError:  # Pillow's writer; its reader is what matters
        exif[0x010F] = "Maker"
        data = encoded(photo, "JPEG", exif=exif)
    text = stored_picture(data, ImageRecipe(), None).exif
    tags = json.loads(text)
    assert tags == {"Image Make": tags["Image Make"], "EXIF ExposureTime": "1/100", "EXIF ISOSpeedRatings": "400"}
    assert tags["Image Make"].startswith("Make") and text.isascii()
    assert stored_picture(encoded(photo), ImageRecipe(), None).exif == "{}"

    random = np.random.default_rng(3)
    at = data.index(b"Exif\0\0")
    for _ in range(200):  # hostile EXIF never raises, and never lets bytes be kept that a reader refuses
        hostile = bytearray(data)
        for place in random.integers(at + 6, at + 150, 8):
            hostile[place] = random.integers(256)
        picture = stored_picture(bytes(hostile), ImageRecipe(keep_original=True), None)
        assert isinstance(json.loads(picture.exif), dict)
        picture.exif.encode("ascii")
        assert decode_rgb(picture.data).size == (picture.width_px, picture.height_px)


def test_threads_store_the_same_bytes():
    files = [encoded(picture_like(300 + 7 * i, 200, seed=i), "JPEG") for i in range(12)]
    recipe = ImageRecipe(size_px=128)
    expected = [stored_picture(data, recipe, BOXES).data for data in files]
    filters = list(warnings.filters)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            assert [
                picture.data for picture in pool.map(lambda data: stored_picture(data, recipe, BOXES), files)
            ] == expected
    assert warnings.filters == filters  # silence ends with the last picture
