"""`engine: img2dataset`: the package itself fetches the rows, for those who need its exact behaviour.

Its Downloader runs once per shard in a process of its own (it redirects file descriptors and seeds global random
numbers); a shard that it gives up is a failure here. None of winnow's guards, deadlines and per-host limits hold: it
follows redirects to private addresses and opens file: URLs. Rows that it loses are counted as download_failed.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import images
from pipeline.core.errors import ImageError, NetworkDownError, WinnowError
from stages.exclusion import host_of

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ROW = "winnow_row"  # a column that img2dataset carries through: the row's place in the shard
READ_ROWS = 64
DOWN_URLS, DOWN_HOSTS = 20, 5  # from so many on, not one answer means that the network is down
# What its error messages mean, first match first.
FAILURES = (
    (r"HTTP Error (404|410)", "not_found"),
    (r"HTTP Error (401|402|403|451)", "forbidden"),
    (r"HTTP Error 429", "rate_limited"),
    (r"HTTP Error 5\d\d", "server_error"),
    (r"HTTP Error", "http_error"),
    (r"X-Robots-Tag", "opted_out"),
    (r"Temporary failure in name resolution", "dns_unavailable"),
    (r"Name or service not known|No address associated|nodename nor servname", "dns_failed"),
    (r"CERTIFICATE|SSL|certificate", "tls_failed"),
    (r"IncompleteRead", "truncated_body"),
    (r"closed connection|reset by peer|BadStatusLine", "disconnected"),
    (r"Connection refused|No route to host|unreachable", "connect_failed"),
    (r"timed out", "total_timeout"),
    (r"unknown url type|no host given|nonnumeric port|control characters|unexpected url", "bad_url"),
    (r"Image decoding error", "undecodable"),
)
AFTER_STATUS = {"opted_out", "truncated_body"}  # known only from a response of status 200
UNANSWERED = {"dns_unavailable", "dns_failed", "connect_failed", "total_timeout", "disconnected"}


class Img2datasetEngine:
    """Fetches the rows of one shard at a time through img2dataset."""

    def __init__(self, settings: Any, threads: int, count: Callable[[Any], None]):
        self.settings = settings
        self.threads = threads
        self.count = count

    def results(self, rows: Sequence[Mapping[str, Any]], spool: Any, watched: bool) -> list[Any]:
        """The result of every row, in the rows' order.

        Args:
            watched: stop when not one of them is answered.

        Raises:
            WinnowError: img2dataset gave up.
            NetworkDownError: not one host answered.
        """
        from stages.ingest.download import Result

        if not rows:
            return []
        found: dict[int, Result] = {}
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
            for values, image in self._run(rows, folder):
                result = Result(self._columns(rows[int(values[ROW])], values))
                if image is not None and result.values["ok"]:
                    result.values |= _described(image)
                if result.values["ok"]:
                    result.offset_bytes, result.size_bytes = spool.append(image), len(image)
                found[int(values[ROW])] = result
                self.count(result)
        lost = {"ok": False, "error": "download_failed", "error_detail": "img2dataset wrote no row", "attempts": None}
        results = [found.get(place) or Result(dict(lost)) for place in range(len(rows))]
        hosts = {host_of(row["url"]) for row in rows}
        if watched and len(rows) >= DOWN_URLS and len(hosts) >= DOWN_HOSTS:
            errors = [result.values["error"] for result in results]
            if all(error in UNANSWERED for error in errors):
                most = max(set(errors), key=errors.count)
                raise NetworkDownError(
                    f"download stopped: none of {len(rows)} URLs of {len(hosts)} hosts was answered, most of them "
                    f"{most}; is the network or its name server down?"
                )
        return results

    def close(self) -> None:
        """None; nothing of a shard outlives it."""

    def _run(self, rows: Sequence[Mapping[str, Any]], folder: str) -> Iterator[tuple[dict[str, Any], bytes | None]]:
        """(img2dataset's columns, image or None) of the rows that it wrote."""
        columns = {
            "url": [row["url"] for row in rows],
            "caption": [row["caption"] for row in rows],
            ROW: [str(place) for place in range(len(rows))],
        }
        if self.settings.image.blur_faces and any(row.get("face_bboxes") for row in rows):
            columns["face_bboxes"] = [json.loads(row["face_bboxes"] or "[]") for row in rows]
        path = os.path.join(folder, "rows.arrow")
        table = pa.table(columns)
        with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
        recipe = self.settings.image
        spec = {
            "folder": folder,
            "rows": path,
            "columns": list(columns),
            "num_rows": len(rows),
            "resizer": {
                "image_size": recipe.size_px,
                "resize_mode": recipe.resize,
                "resize_only_if_bigger": recipe.only_if_bigger,
                "encode_quality": 6 if recipe.format == "png" else recipe.quality,
                "encode_format": recipe.format,
                "skip_reencode": recipe.keep_original,
            },
            "thread_count": self.settings.concurrency,
            "timeout": self.settings.first_byte_timeout_s,
            "retries": self.settings.retries,
            "user_agent_token": self.settings.contact,
            "directives": ["noai", "noimageai", "noindex", "noimageindex"] if self.settings.obey_x_robots_tag else None,
        }
        spec_path = os.path.join(folder, "spec.json")
        with open(spec_path, "w", encoding="utf-8") as file:
            json.dump(spec, file)
        done = subprocess.run(
            [sys.executable, "-m", "stages.ingest.img2dataset_engine", spec_path],
            cwd=ROOT,
            env={**os.environ, "NO_ALBUMENTATIONS_UPDATE": "1", "PYTHONPATH": ROOT},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            last = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()][-3:]
            raise WinnowError(f"img2dataset gave up a shard of {len(rows)} rows: {' / '.join(last)}")
        with pq.ParquetFile(os.path.join(folder, "00000.parquet")) as file:
            for batch in file.iter_batches(batch_size=READ_ROWS):
                for values in batch.to_pylist():
                    yield values, values.pop(recipe.format)

    def _columns(self, row: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
        """Our columns of a row, from img2dataset's."""
        from stages.ingest.download import check_sha256

        message = values["error_message"]
        error = None if values["status"] == "success" else failure(message)
        refused = re.search(r"HTTP Error (\d{3})", message or "")
        answered = values["status"] != "failed_to_download" or error in AFTER_STATUS
        found: dict[str, Any] = {
            "ok": values["status"] == "success",
            "error": error,
            "error_detail": message and message[:300],
            "http_status": int(refused.group(1)) if refused else 200 if answered else None,
            "exif": values["exif"],
            "original_width_px": values["original_width"],
            "original_height_px": values["original_height"],
            "sha256": values["sha256"],
            "image_id": values["sha256"] and values["sha256"][:32],
        }
        if found["ok"]:
            found |= check_sha256(row, values["sha256"], self.settings.checksum)
        return found


def failure(message: str | None) -> str:
    """The class of one of img2dataset's error messages."""
    return next((name for pattern, name in FAILURES if re.search(pattern, message or "")), "download_failed")


def _described(image: bytes) -> dict[str, Any]:
    """The columns that the stored image decides, or why it can't be used: OpenCV takes what Pillow does not."""
    try:
        name = images.open_image(image).format or ""
        decoded = images.decode_rgb(image)
    except ImageError as error:
        return {"ok": False, "error": error.reason, "error_detail": error.detail[:300]}
    return {
        "image_format": images.FORMATS.get(name, "jpg"),
        "width_px": decoded.width,
        "height_px": decoded.height,
    }


def _download(spec: Mapping[str, Any]) -> None:
    """None; img2dataset's parquet of the shard is in the folder. Exits with 1 when it gave up."""
    from img2dataset.blurrer import BoundingBoxBlurrer
    from img2dataset.downloader import Downloader
    from img2dataset.resizer import Resizer
    from img2dataset.writer import ParquetSampleWriter

    boxes = "face_bboxes" if "face_bboxes" in spec["columns"] else None
    resizer = Resizer(**spec["resizer"], blurrer=BoundingBoxBlurrer() if boxes else None)
    downloader = Downloader(
        sample_writer_class=ParquetSampleWriter,
        resizer=resizer,
        thread_count=spec["thread_count"],
        save_caption=True,
        extract_exif=True,
        output_folder=spec["folder"],
        column_list=spec["columns"],
        timeout=spec["timeout"],
        number_sample_per_shard=max(10, spec["num_rows"]),
        oom_shard_count=5,
        compute_hash="sha256",
        verify_hash_type=None,
        encode_format=spec["resizer"]["encode_format"],
        retries=spec["retries"],
        user_agent_token=spec["user_agent_token"],
        disallowed_header_directives=spec["directives"],
        blurring_bbox_col=boxes,
    )
    succeeded, _ = downloader((0, spec["rows"]))
    if not succeeded:
        raise SystemExit(1)


if __name__ == "__main__":
    with open(sys.argv[1], encoding="utf-8") as spec_file:
        _download(json.load(spec_file))
