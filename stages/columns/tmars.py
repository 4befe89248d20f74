"""T-MARS: the CLIP score of a pair whose image has its text painted over.

Maini et al., "T-MARS: Improving Visual Representations by Circumventing Text Feature Learning", ICLR 2024 (arXiv
2307.03132). Its released code detects and reads text; the painting is built here from the paper's words, "the average
colour of the surrounding pixels".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.core import storage
from pipeline.core.errors import WinnowError, one_line
from stages.base import Batch, LoadContext, Stage

SURROUNDING = 0.25  # of a box's shorter side: how far the pixels around it go whose mean fills it. Ours
SURROUNDING_LEAST_PX = 2
LEAST_SIDE_PX = 3  # of a box on the detector's map, as in DB's code


@dataclass(frozen=True)
class TMars(Stage):
    """The cosine of `clip` after the text was painted over, and the share of the image's pixels that was.

    Each box that the detector finds is filled with the mean colour of the pixels around it, up to a quarter of its
    shorter side and 2 pixels away, that are in no box; where there are none, of all pixels in no box. An image without
    text keeps its clip_score. T-MARS is `threshold` or `top` on the score; its authors keep 0.281 and more of a B/32
    at DataComp medium. Its detector is FAST; here it is any one that gives a map of text probabilities, from which
    boxes are made as by DB (Liao et al., "Real-time Scene Text Detection with Differentiable Binarization", 2020): the
    smallest rectangle, at any angle, around each connected set of pixels. So the paper's numbers are not to be
    expected to the digit.

    Args:
        model: name of a model of the config, as in `clip`.
        detector: path of an ONNX file that OpenCV can run: [1, 3, height, width] in, one map of probabilities out.
        input_width_px, input_height_px: what images are resized to for it; multiples of 32 for DB.
        mean: taken off blue, green and red, of 0 to 255.
        scale: by which the rest is multiplied.
        binary_threshold: pixels with a higher probability are text.
        polygon_threshold: least mean probability in a box.
        max_candidates: most boxes that are looked at.
        unclip_ratio: boxes grow by area x ratio / perimeter on each side.

    All defaults are those of OpenCV's guide to its DB models (DB_TD500). Equal for the same builds of OpenCV and torch
    and the same device and batch; else about as near as clip_score. Cost: one pass of the detector a row, on the CPU in
    any case, and one of both towers of CLIP. At 736 x 736 pixels a ResNet-18 alone takes five times as long as the
    image tower of a B/32.
    """

    model: str
    detector: str
    input_width_px: Annotated[int, Field(ge=32, le=4096)] = 736
    input_height_px: Annotated[int, Field(ge=32, le=4096)] = 736
    mean: Annotated[Sequence[float], Field(min_length=3, max_length=3)] = (122.67891434, 116.66876762, 104.00698793)
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1 / 255
    binary_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.3
    polygon_threshold: Annotated[float, Field(gt=0, lt=1)] = 0.5
    max_candidates: Annotated[int, Field(ge=1)] = 200
    unclip_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2.0

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "pixels"
    uses_model: ClassVar[bool] = True
    adds: ClassVar[Mapping[str, str]] = {"tmars_score": "float32", "tmars_text_fraction": "float32"}
    assets: ClassVar[Mapping[str, str]] = {
        "detector": "a DB text detector as ONNX, such as DB_TD500_resnet18.onnx of "
        "https://docs.opencv.org/4.x/d4/d43/tutorial_dnn_text_spotting.html"
    }
    batch_size: ClassVar[int] = 64

    def external_files(self) -> Mapping[str, str]:
        return {"detector": self.detector}

    def load(self, context: LoadContext) -> Any:
        """(CLIP, threads, detector)."""
        import cv2

        from stages.columns.clip import loaded

        cv2.setNumThreads(context.threads)
        detector = self.load_detector()
        return *loaded(context, f"stage tmars: model = {self.model}"), detector

    def load_detector(self) -> Any:
        """OpenCV's network of the file. Raises WinnowError when it can't run, or does not give one map."""
        import cv2

        try:
            detector = cv2.dnn.readNetFromONNX(np.frombuffer(storage.read_bytes(self.detector), np.uint8))
            self.text_map(detector, np.zeros((self.input_height_px, self.input_width_px, 3), np.uint8))
        except cv2.error as error:
            raise WinnowError(
                f"stage tmars: detector = {self.detector}, expected an ONNX model that OpenCV can run on "
                f"{self.input_width_px} x {self.input_height_px} pixels: {one_line(error)}"
            ) from error
        return detector

    def text_map(self, detector: Any, pixels: np.ndarray) -> np.ndarray:
        """[h, w] float32 probabilities of text in the image, at the detector's own resolution.

        Args:
            pixels: [height, width, 3] uint8, RGB.
        """
        import cv2

        size = (self.input_width_px, self.input_height_px)
        detector.setInput(cv2.dnn.blobFromImage(pixels[..., ::-1], self.scale, size, tuple(self.mean)))
        found = detector.forward()
        if found.ndim < 2 or found.size != found.shape[-2] * found.shape[-1]:
            shape = " x ".join(map(str, found.shape))
            raise WinnowError(f"stage tmars: detector = {self.detector} gives {shape} numbers, expected one map")
        return found.reshape(found.shape[-2:])

    def text_boxes(self, text_map: np.ndarray, width_px: int, height_px: int) -> list[np.ndarray]:
        """Four corners (x, y) of each box with text, [4, 2] int32, in the pixels of an image of this size."""
        import cv2

        outlines, _ = cv2.findContours(
            (text_map > self.binary_threshold).astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_SIMPLE
        )
        found = []
        for outline in outlines[: self.max_candidates]:
            centre, sides, angle = cv2.minAreaRect(outline)
            if min(sides) < LEAST_SIDE_PX:
                continue
            inside = np.zeros(text_map.shape, np.uint8)
            cv2.fillPoly(inside, [np.int32(cv2.boxPoints((centre, sides, angle)))], 1)
            if text_map[inside > 0].mean(dtype=np.float64) < self.polygon_threshold:
                continue
            growth = self.unclip_ratio * sides[0] * sides[1] / (sides[0] + sides[1])  # of both sides together
            corners = cv2.boxPoints((centre, (sides[0] + growth, sides[1] + growth), angle))
            scale = np.array([width_px, height_px]) / text_map.shape[::-1]
            found.append(np.rint(corners * scale).astype(np.int32))
        return found

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        from PIL import Image

        from pipeline.core import clip_model

        clip, threads, detector = state
        images, fractions = [], []
        for image in batch.images or ():
            pixels = np.asarray(image)
            boxes = self.text_boxes(self.text_map(detector, pixels), image.width, image.height)
            painted, fraction = painted_over(pixels, boxes)
            images.append(Image.fromarray(painted) if boxes else image)
            fractions.append(fraction)
        image_BD, text_BD = clip_model.embed(clip, images, batch.columns["caption"], threads)
        return {"tmars_score": (image_BD * text_BD).sum(dim=-1).cpu().numpy(), "tmars_text_fraction": fractions}


def painted_over(pixels: np.ndarray, boxes: Sequence[np.ndarray]) -> tuple[np.ndarray, float]:
    """The image with every box filled with the colour around it, and the fraction of its pixels that lie in boxes.

    Args:
        pixels: [height, width, 3] uint8.
        boxes: see TMars.text_boxes; they may reach out of the image.
    """
    import cv2

    height, width = pixels.shape[:2]
    covered = np.zeros((height, width), np.uint8)
    for corners in boxes:
        cv2.fillPoly(covered, [corners], 1)
    painted = pixels.copy()
    for corners in boxes:
        reach = max(SURROUNDING_LEAST_PX, round(SURROUNDING * shorter_side_px(corners)))
        left, top = np.maximum(corners.min(axis=0) - reach, 0)
        right, bottom = np.minimum(corners.max(axis=0) + reach + 1, (width, height))
        if left >= right or top >= bottom:
            continue  # outside the image
        part = slice(top, bottom), slice(left, right)
        own = np.zeros((bottom - top, right - left), np.uint8)
        cv2.fillPoly(own, [corners - np.int32((left, top))], 1)
        near = (cv2.distanceTransform(1 - own, cv2.DIST_C, 3) <= reach) & (covered[part] == 0)
        around = pixels[part][near] if near.any() else pixels[covered == 0]
        if len(around):  # else the whole image is text, and is left as it is
            painted[part][own > 0] = np.rint(around.mean(axis=0, dtype=np.float64))
    return painted, float(covered.mean())


def shorter_side_px(corners: np.ndarray) -> float:
    """The length of the shorter one of two neighbouring sides."""
    first, second, third = corners[:3].astype(np.float64)
    return float(min(np.linalg.norm(second - first), np.linalg.norm(third - second)))
