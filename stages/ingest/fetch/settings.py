"""What `pool.download` in the config may say: how images are fetched, and what is stored of them.

    download: {contact: "mailto:me@example.org", image: {size_px: 256, keep_original: true}, retries: 3}

The defaults store what DataComp's own call of img2dataset stores (512 px, keep_ratio_largest, only if bigger, JPEG 95).
"""

from __future__ import annotations

import ipaddress
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pipeline.core.config import Model
from pipeline.core.images import MAX_PIXELS

Resize = Literal["no", "border", "keep_ratio", "keep_ratio_largest", "center_crop"]  # img2dataset's names
# Settings that change how rows come, not what they are once they came: no part of a pool's identity.
NOT_IDENTITY = {
    "contact",
    "proxies",
    "concurrency",
    "per_host_concurrency",
    "per_host_requests_per_s",
    "connect_timeout_s",
    "first_byte_timeout_s",
    "total_timeout_s",
    "retries",
    "allow_addresses",
    "retry",
}
# What img2dataset itself can do; first_byte_timeout_s is its timeout (of each read), concurrency its threads.
IMG2DATASET_HAS = {
    "engine",
    "image",
    "checksum",
    "obey_x_robots_tag",
    "contact",
    "concurrency",
    "first_byte_timeout_s",
    "retries",
    "retry",
}
IMG2DATASET_IMAGE_HAS = {"size_px", "resize", "only_if_bigger", "format", "quality", "keep_original", "blur_faces"}


class ImageRecipe(Model):
    """What is stored of a downloaded image."""

    size_px: int = Field(512, ge=8, le=16_384)
    resize: Resize = "keep_ratio_largest"
    only_if_bigger: bool = True
    format: Literal["jpg", "png", "webp"] = "jpg"
    quality: int = Field(95, ge=1, le=100)  # of jpg and webp
    keep_original: bool = False  # the original bytes, untouched, where nothing must change
    apply_orientation: bool = True  # EXIF; False: as img2dataset, which stores rotated photos as they lie
    blur_faces: bool = True  # where the source has face boxes
    max_pixels: int = Field(MAX_PIXELS, ge=1)
    max_frames: int = Field(1_000, ge=1)  # of an animation, whose first frame is taken

    @model_validator(mode="after")
    def _no_idle_option(self) -> ImageRecipe:
        if self.format == "png" and "quality" in self.model_fields_set:
            raise ValueError("quality has no effect with format png, expected it to be left out")
        return self


class DownloadSettings(Model):
    """How a pool's images are fetched. Limits a host hold for the whole cluster; the others for each node."""

    engine: Literal["winnow", "img2dataset"] = "winnow"
    image: ImageRecipe = ImageRecipe()
    checksum: Literal["reject", "flag", "accept"] = "flag"  # original bytes against the source's sha256_column
    obey_x_robots_tag: bool = True
    obey_robots_txt: bool = False
    contact: str | None = None  # in the User-Agent
    proxies: Literal["none", "environment"] = "none"
    concurrency: int = Field(256, ge=1, le=10_000)  # requests in flight a node
    per_host_concurrency: int = Field(16, ge=1)
    per_host_requests_per_s: float = Field(50, gt=0)
    connect_timeout_s: float = Field(10, gt=0)
    first_byte_timeout_s: float = Field(15, gt=0)
    total_timeout_s: float = Field(60, gt=0)  # of one attempt, redirects included
    retries: int = Field(2, ge=0, le=20)  # after the first attempt, of what may heal
    max_redirects: int = Field(5, ge=0, le=50)
    max_header_bytes: int = Field(64 << 10, ge=1 << 10)  # of one response, all lines
    max_body_bytes: int = Field(64 << 20, ge=1)  # after decompression
    allow_addresses: list[str] = []  # networks that are fetched from although they are private: tests, an intranet
    retry: str | list[str] | None = None  # of a pool that is there: failed rows again, or these classes

    @model_validator(mode="after")
    def _no_idle_option(self) -> DownloadSettings:
        if self.engine == "img2dataset":
            idle = sorted(self.model_fields_set - IMG2DATASET_HAS)
            idle += sorted(f"image.{name}" for name in self.image.model_fields_set - IMG2DATASET_IMAGE_HAS)
            if idle:
                raise ValueError(f"{idle[0]} has no effect with engine img2dataset, expected it to be left out")
        return self

    @field_validator("allow_addresses")
    @classmethod
    def _networks(cls, values: list[str]) -> list[str]:
        for value in values:
            ipaddress.ip_network(value)  # its ValueError names the value
        return values

    @field_validator("contact")
    @classmethod
    def _one_line(cls, value: str | None) -> str | None:
        if value is not None and not (0 < len(value) <= 200 and value.isascii() and value.isprintable()):
            raise ValueError(f"contact = {value!r}, expected up to 200 printable ASCII characters")
        return value

    @field_validator("retry")
    @classmethod
    def _failed_or_classes(cls, value: str | list[str] | None) -> str | list[str] | None:
        if isinstance(value, str) and value != "failed":
            raise ValueError(f"{value!r}, expected failed, or a list of classes: [{value}]")
        return value

    def identity(self) -> dict[str, Any]:
        """The settings that decide what a row becomes once its server answers."""
        return self.model_dump(mode="json", exclude=NOT_IDENTITY)
