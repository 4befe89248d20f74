"""T-MARS: boxes by DB's rule, painting by the paper's words, and the score of what is left, with a real ONNX file."""

from __future__ import annotations

import io
import json

import cv2
import numpy as np
import pytest
from PIL import Image

from pipeline.core import pool
from pipeline.core.errors import ConfigError, WinnowError
from stages import build_stage
from stages.base import LoadContext
from stages.columns.clip import Clip
from stages.columns.tmars import TMars, painted_over, shorter_side_px
from stages.score_shard import LoadedStage, score_shard
from tests.golden_fixture import read_golden
from tests.pool_fixture import drawing, write_pool

WIDTH_PX, HEIGHT_PX = 192, 96


def varint(number: int) -> bytes:
    return bytes([number]) if number < 128 else bytes([number & 127 | 128]) + varint(number >> 7)


def entry(number: int, value: int | str | bytes) -> bytes:
    """One field of a Protocol Buffers message."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    data = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(data)) + data


def onnx_detector(maps: int = 1, channels: tuple[int, int, int] = (1, 1, 1)) -> bytes:
    """An ONNX file that sees text wherever a pixel within 4 is dark in the channels: convolution, maximum, sigmoid.

    Field numbers are those of onnx.proto: graph 7 {node 1, name 2, initializer 5, input 11, output 12}, and so on.
    """

    def node(operator: str, inputs: list[str], output: str, **sizes: list[int]) -> bytes:
        attributes = b"".join(
            entry(5, entry(1, name) + b"".join(entry(8, size) for size in given) + entry(20, 7))
            for name, given in sizes.items()
        )
        return entry(
            1, b"".join(entry(1, name) for name in inputs) + entry(2, output) + entry(4, operator) + attributes
        )

    def weights(name: str, values: np.ndarray) -> bytes:
        data = values.astype("<f4")
        return entry(
            5, b"".join(entry(1, size) for size in data.shape) + entry(2, 1) + entry(8, name) + entry(9, data.tobytes())
        )

    def tensor(number: int, name: str, shape: list[int]) -> bytes:
        sizes = b"".join(entry(1, entry(1, size)) for size in shape)
        return entry(number, entry(1, name) + entry(2, entry(1, entry(1, 1) + entry(2, sizes))))

    graph = node("Conv", ["image", "weight", "bias"], "dark", kernel_shape=[1, 1])
    graph += node("MaxPool", ["dark"], "near", kernel_shape=[9, 9], strides=[1, 1], pads=[4, 4, 4, 4])
    graph += node("Sigmoid", ["near"], "text") + entry(2, "detector")
    graph += weights(
        "weight", np.tile(np.reshape(channels, (3, 1, 1)) * -40 / sum(channels), (maps, 1, 1, 1))
    ) + weights("bias", np.full(maps, -8.0))
    graph += tensor(11, "image", [1, 3, HEIGHT_PX, WIDTH_PX]) + tensor(12, "text", [1, maps, HEIGHT_PX, WIDTH_PX])
    return entry(1, 7) + entry(8, entry(1, "") + entry(2, 11)) + entry(7, graph)


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "detector.onnx").write_bytes(onnx_detector())
    return TMars("tiny", str(tmp_path / "detector.onnx"), WIDTH_PX, HEIGHT_PX)


def picture(number: int, words: str = "", width_px: int = 256, height_px: int = 128) -> np.ndarray:
    """[height, width, 3]: pale shapes on white, with black words."""
    rng = np.random.default_rng(number)
    pixels = np.full((height_px, width_px, 3), 255, np.uint8)
    for _ in range(5):
        left, top = int(rng.integers(width_px - 40)), int(rng.integers(height_px - 30))
        pixels[top : top + 30, left : left + 40] = rng.integers(170, 256, 3)
    cv2.putText(pixels, words, (50, 70), cv2.FONT_HERSHEY_SIMPLEX, 0.9, (0, 0, 0), 2)
    return pixels


def encoded(pixels: np.ndarray) -> bytes:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    return data.getvalue()


def score(folder, stage, pixels, model_folder, batch_size=None):
    """A row of columns for each picture."""
    path = write_pool(
        folder, [[{"image": encoded(one), "caption": f"words number {at}"} for at, one in enumerate(pixels)]]
    )
    (shard,) = pool.load_shards(path)
    state = stage.load(LoadContext(model={"folder": model_folder}))
    score_shard(path, shard, [LoadedStage(stage, state, str(folder / "out"), batch_size)])
    return pool.read_table(f"{folder}/out/{shard.name}.parquet").to_pylist()


def test_the_score_is_that_of_the_image_with_its_text_painted_over_by_hand(stage, model_folder, tmp_path):
    pixels = [picture(1, "SALE"), picture(2), picture(3, "fifty % off"), picture(4, "now", 90, 110)]
    found = score(tmp_path / "tmars", stage, pixels, model_folder)
    detector = stage.load(LoadContext(model={"folder": model_folder}))[2]
    by_hand = []
    for one in pixels:
        boxes = stage.text_boxes(stage.text_map(detector, one), one.shape[1], one.shape[0])
        by_hand.append(one.copy())
        mask = np.zeros(one.shape[:2], np.uint8)
        for corners in boxes:
            cv2.fillPoly(mask, [corners], 1)
        for corners in boxes:
            reach = max(2, round(shorter_side_px(corners) / 4))
            inside = cv2.fillPoly(np.zeros_like(mask), [corners], 1) > 0
            around = cv2.dilate(inside.astype(np.uint8), np.ones((2 * reach + 1,) * 2, np.uint8)) > mask
            by_hand[-1][inside] = np.rint(one[around].astype(float).mean(axis=0))
        assert (one.min() < 100) == bool(boxes)
        assert by_hand[-1].min() > 160  # no black is left
    expected = score(tmp_path / "by_hand", Clip("tiny"), by_hand, model_folder)
    as_they_are = score(tmp_path / "as_they_are", Clip("tiny"), pixels, model_folder)
    for at, row in enumerate(found):
        assert row["tmars_score"] == pytest.approx(expected[at]["clip_score"], abs=1e-6)
        covered = (by_hand[at] != pixels[at]).any(axis=2).mean()
        assert (
            covered - 1e-6 <= row["tmars_text_fraction"] <= covered + 0.25
        )  # filled with white, a pixel may not differ
        changed = abs(row["tmars_score"] - as_they_are[at]["clip_score"])
        assert (changed > 1e-4) == (row["tmars_text_fraction"] > 0) == (at != 1)
    assert found[1]["tmars_score"] == pytest.approx(as_they_are[1]["clip_score"], abs=1e-6)


def test_golden_scores(stage, model_folder, tmp_path):
    """Values are those recorded for this version. After a change that is meant: bump `version` and record these."""
    rows = score(tmp_path, stage, [picture(number, "text" * (number % 3)) for number in range(6)], model_folder)
    found = {name: [round(row[name], 4) for row in rows] for name in TMars.adds}
    recorded = read_golden("tmars")
    message = f"bump tmars' version, record {json.dumps(found)}"
    assert recorded["version"] == TMars.version, message
    for name in TMars.adds:
        assert found[name] == pytest.approx(recorded[name], abs=2e-4), message


def test_values_do_not_depend_on_the_batch(stage, model_folder, tmp_path):
    pixels = [picture(number, "text" * (number % 2)) for number in range(5)]
    one = score(tmp_path / "one", stage, pixels, model_folder, batch_size=1)
    all_at_once = score(tmp_path / "all", stage, pixels, model_folder)
    for first, second in zip(one, all_at_once, strict=True):
        assert first["tmars_text_fraction"] == second["tmars_text_fraction"]
        assert first["tmars_score"] == pytest.approx(second["tmars_score"], abs=1e-5)


def test_a_failed_row_has_no_score(stage, model_folder, tmp_path):
    path = write_pool(tmp_path / "root", [[{"image": None, "caption": "a"}, {"image": drawing(1), "caption": "a"}]])
    (shard,) = pool.load_shards(path)
    state = stage.load(LoadContext(model={"folder": model_folder}))
    score_shard(path, shard, [LoadedStage(stage, state, str(tmp_path / "out"))])
    failed, ok = pool.read_table(f"{tmp_path}/out/{shard.name}.parquet").to_pylist()
    assert failed["tmars_score"] is failed["tmars_text_fraction"] is None
    assert -1 <= ok["tmars_score"] <= 1


def test_boxes_are_those_of_db():
    """A rectangle of w x h pixels grows by w h ratio / (2 (w + h)) on each side, and is scaled to the image."""
    stage = TMars("tiny", "none.onnx", unclip_ratio=1.5)
    text_map = np.zeros((100, 200), np.float32)
    text_map[20:41, 50:121] = 0.9  # 70 x 20 between the centres of its outer pixels
    (box,) = stage.text_boxes(text_map, 400, 100)
    growth = 70 * 20 * 1.5 / (2 * 90)
    assert sorted(box[:, 0]) == pytest.approx([2 * (50 - growth)] * 2 + [2 * (120 + growth)] * 2, abs=0.51)
    assert sorted(box[:, 1]) == pytest.approx([20 - growth] * 2 + [40 + growth] * 2, abs=0.51)
    text_map[60:90, 10:13] = 0.9  # 2 wide: too thin
    text_map[60:90, 150:170] = 0.4  # above the first threshold, below the second
    text_map[0:10, 0:10] = 0.3  # not above the first one
    assert len(stage.text_boxes(text_map, 400, 100)) == 1
    assert len(TMars("tiny", "none.onnx", polygon_threshold=0.35).text_boxes(text_map, 400, 100)) == 2
    assert (
        len(TMars("tiny", "none.onnx", polygon_threshold=0.2, binary_threshold=0.2).text_boxes(text_map, 400, 100)) == 3
    )
    assert len(TMars("tiny", "none.onnx", polygon_threshold=0.35, max_candidates=1).text_boxes(text_map, 400, 100)) == 1
    assert stage.text_boxes(np.zeros((100, 200), np.float32), 400, 100) == []


def test_a_probability_at_the_threshold_is_no_text():
    text_map = np.full((60, 60), 0.25, np.float32)
    text_map[20:40, 20:40] = 0.26
    (box,) = TMars("tiny", "none.onnx", binary_threshold=0.25, polygon_threshold=0.1).text_boxes(text_map, 60, 60)
    assert box.min() > 5 and box.max() < 55


def test_the_detector_gets_blue_first(tmp_path):
    (tmp_path / "blue.onnx").write_bytes(onnx_detector(channels=(1, 0, 0)))
    stage = TMars("tiny", str(tmp_path / "blue.onnx"), WIDTH_PX, HEIGHT_PX)
    detector = stage.load_detector()
    for colour, found in (((255, 255, 0), True), ((0, 255, 255), False)):
        pixels = np.full((HEIGHT_PX, WIDTH_PX, 3), 255, np.uint8)
        pixels[30:60, 50:150] = colour
        assert bool(stage.text_boxes(stage.text_map(detector, pixels), WIDTH_PX, HEIGHT_PX)) == found


def test_slanted_text_gets_a_slanted_box():
    text_map = np.zeros((200, 200), np.float32)
    cv2.fillPoly(text_map, [np.array([[40, 60], [140, 160], [126, 174], [26, 74]], np.int32)], 0.9)
    (box,) = TMars("tiny", "none.onnx", unclip_ratio=0.001).text_boxes(text_map, 200, 200)
    sides = sorted(np.linalg.norm(box[at] - box[at - 1]) for at in (1, 2))
    assert sides == pytest.approx([np.hypot(14, 14), np.hypot(100, 100)], abs=2)


def painted_by_loops(pixels, boxes):
    """The same for boxes with upright sides, pixel by pixel: corners (left, top) and (right, bottom), both inside."""
    height, width, _ = pixels.shape
    inside = [[[l <= x <= r and t <= y <= b for x in range(width)] for y in range(height)] for l, t, r, b in boxes]  # noqa: E741
    covered = np.any(inside, axis=0) if boxes else np.zeros((height, width), bool)
    found = pixels.copy()
    for (left, top, right, bottom), own in zip(boxes, inside, strict=True):
        reach = max(2, round(0.25 * min(right - left, bottom - top)))
        at = [(y, x) for y in range(height) for x in range(width) if not covered[y, x]]
        near = [
            (y, x)
            for y, x in at
            if any(
                own[v][u]
                for v in range(max(0, y - reach), min(height, y + reach + 1))
                for u in range(max(0, x - reach), min(width, x + reach + 1))
            )
        ]
        used = near or at
        if used:
            mean = [round(sum(int(pixels[y, x, channel]) for y, x in used) / len(used)) for channel in range(3)]
            for y in range(height):
                for x in range(width):
                    if own[y][x]:
                        found[y, x] = mean
    return found, covered.mean()


@pytest.mark.parametrize(
    "boxes",
    [
        [],
        [(5, 6, 14, 10)],
        [(5, 6, 14, 10), (12, 8, 20, 15)],  # overlapping
        [(-5, -3, 6, 8), (20, 10, 40, 40)],  # reaching out of the image
        [(3, 3, 25, 16), (8, 7, 12, 9)],  # one inside another: nothing around it
        [(0, 0, 29, 19)],  # all of it
        [(0, 0, 29, 9), (10, 10, 29, 19), (0, 12, 9, 19)],
        [(40, 40, 50, 50)],  # outside
    ],
)
def test_painting_is_that_of_plain_loops(boxes):
    pixels = np.random.default_rng(len(boxes)).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    before = pixels.copy()
    corners = [np.array([[l, b], [l, t], [r, t], [r, b]], np.int32) for l, t, r, b in boxes]  # noqa: E741
    painted, fraction = painted_over(pixels, corners)
    expected, covered = painted_by_loops(pixels, boxes)
    assert painted.tolist() == expected.tolist()
    assert fraction == pytest.approx(covered)
    assert (pixels == before).all()


def test_a_detector_that_is_none_is_one_line(model_folder, tmp_path):
    for data, message in (
        (b"no model", "expected an ONNX model that OpenCV can run on 192 x 96 pixels: error: .*"),
        (b"", "expected an ONNX model that OpenCV can run"),
        (onnx_detector()[:200], "expected an ONNX model that OpenCV can run"),
        (onnx_detector(maps=2), "gives 1 x 2 x 96 x 192 numbers, expected one map"),
    ):
        (tmp_path / "wrong.onnx").write_bytes(data)
        stage = TMars("tiny", str(tmp_path / "wrong.onnx"), WIDTH_PX, HEIGHT_PX)
        with pytest.raises(WinnowError, match=f"stage tmars: detector = .*wrong.onnx,? {message}") as caught:
            stage.load(LoadContext(model={"folder": model_folder}))
        assert "\n" not in str(caught.value)


def test_without_a_detector_the_stage_says_where_to_get_one(stage, tmp_path):
    assert stage.unavailable() == ""
    gone = TMars("tiny", str(tmp_path / "gone.onnx"))
    assert gone.unavailable().startswith(f"detector = {tmp_path}/gone.onnx is not there: a DB text detector as ONNX")
    assert stage.external_files() == {"detector": str(tmp_path / "detector.onnx")}


def test_wrong_parameters():
    good = {"model": "tiny", "detector": "a.onnx", "mean": [0, 0, 0]}
    assert build_stage("tmars", good, "here").scale == 1 / 255
    for change, message in (
        ({"mean": [1.0]}, "here.mean"),
        ({"binary_threshold": 1.0}, "here.binary_threshold = 1.0, expected a number < 1"),
        ({"input_width_px": 1}, "here.input_width_px = 1, expected a number >= 32"),
        ({"detector": None}, "here.detector"),
    ):
        with pytest.raises(ConfigError, match=message):
            build_stage("tmars", good | change, "here")
