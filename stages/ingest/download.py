"""Downloads the images of a pool's rows: shards of URLs in, shards of a pool out.

    worker = DownloadWorker(job, threads, report)      one a node: an event loop, connections, per-host limits
    worker.process(shard)                              several shards at once, each from a thread of its own

A shard of the pool has img2dataset's layout: 00000.tar of the successes, 00000.parquet of all rows with its columns
beside ours, 00000_stats.json. Rows come in any order and are spooled to an unnamed file; the shard is written in the
table's order, so equal responses give equal bytes. What a server, a URL or an image does is a row's error, never a
shard's. Memory: the rows of the shards in work without their images, and the images in flight.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
import os
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.core import pool, storage
from pipeline.core.errors import DOWNLOAD_FAILURES, ImageError, NetworkDownError
from pipeline.core.pool import Shard
from stages.column_files import chosen_rows
from stages.exclusion import Exclusion, host_of
from stages.ingest.fetch.settings import DownloadSettings
from stages.ingest.samples import CARRIED_TYPES
from stages.ingest.shard_writer import ShardWriter, finished
from stages.selection import uids as uid_pairs

VERSION = 1  # bump when a shard's bytes change for the same responses
SHARDS_AT_ONCE = 3  # a worker's: the slow last rows of one do not leave it idle
ROWS_IN_FLIGHT_PER_REQUEST = 8  # of a shard: rows that wait for their host's turn must not keep others from theirs
BODIES_PER_THREAD = 16  # fetched and not yet decoded; above that no further request starts
QUEUED_BYTES = 256 << 20  # of such bodies; the same
REPORT_EVERY_S = 1.0
NAMED_HOSTS = 20
# Columns of a downloaded pool beyond those of every pool: img2dataset's by its names, then ours.
COLUMNS = {
    "status": pa.string(),  # success | failed_to_download | failed_to_resize
    "error_message": pa.string(),
    "width": pa.int32(),
    "height": pa.int32(),
    "original_width": pa.int32(),
    "original_height": pa.int32(),
    "exif": pa.string(),  # JSON
    "final_url": pa.string(),  # after redirects, without signatures
    "http_status": pa.int32(),
    "body_bytes": pa.int64(),  # as received, decompressed
    "attempts": pa.int32(),  # 0: nothing was asked
    "checksum_ok": pa.bool_(),  # null where the metadata has no sha256, or checksum is accept
}
NOT_ASKED = {"excluded", "not_chosen"}  # decided before any request
IMAGE_FAULTS = ("undecodable", "unsupported_format", "too_many_pixels", "too_many_frames")  # img2dataset: resize


@dataclass(frozen=True)
class DownloadJob:
    """What all workers of one download share. `num_workers` divides what holds for a host in the whole cluster."""

    urls_path: str
    out_path: str
    settings: DownloadSettings
    carried: Mapping[str, str]  # columns of the source, with types
    num_workers: int
    selection_path: str | None = None  # the choice of rows, or all
    exclude: Exclusion = field(default_factory=Exclusion)


@dataclass
class Result:
    """What became of one row: columns by name, and where its image lies in the spool."""

    values: dict[str, Any]
    offset_bytes: int = 0
    size_bytes: int = 0


class Spool:
    """Images in the order in which they came, in a file without a name: nothing is left of it after a kill."""

    def __init__(self, out_path: str):
        folder = None if storage.is_url(out_path) else out_path  # /tmp may be memory
        if folder:
            os.makedirs(folder, exist_ok=True)
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed in close)
        self._lock = threading.Lock()
        self._size_bytes = 0

    def append(self, data: bytes) -> int:
        """The offset at which the image lies from now on."""
        with self._lock:
            offset_bytes = self._size_bytes
            self._file.write(data)
            self._size_bytes += len(data)
        return offset_bytes

    def read(self, result: Result) -> bytes:
        """The image of a result."""
        self._file.seek(result.offset_bytes)
        return self._file.read(result.size_bytes)

    def close(self) -> None:
        """None; the file is gone."""
        self._file.close()


class DownloadWorker:
    """Downloads shards; `process` may be called from several threads at once."""

    def __init__(self, job: DownloadJob, threads: int, report: Callable[[str, dict[str, Any]], None] | None = None):
        self.job = job
        self.excluded = job.exclude.load()
        self.came = False
        self.counts = _Counts(report)
        if job.settings.engine == "img2dataset":
            from stages.ingest.img2dataset_engine import Img2datasetEngine

            self.engine: Any = Img2datasetEngine(job.settings, threads, self.counts.add)
        else:
            self.engine = _WinnowEngine(job, threads, self.excluded.host, self.counts.add)

    def close(self) -> None:
        """None; ends connections and threads. A worker of Ray's just ends with its process."""
        self.engine.close()

    def process(self, shard: Shard) -> dict[str, Any]:
        """Facts of the pool's shard once its files are there: {rows, ok_rows, kept_rows, failed, bytes, hosts, known}.

        A shard that is there is kept; with `retry` its rows of these failures are fetched again, and the files replaced
        when one came.

        Raises:
            NetworkDownError: nothing answers any more; nothing of the shard was written.
        """
        started_s = time.time()
        out_path, retry = self.job.out_path, retried_failures(self.job.settings)
        done = finished(out_path, shard.name)
        old = None
        if done is not None:
            if not retry & set(done["failed"]):
                return self._facts(shard, done, shard.rows, started_s)
            old = pool.read_rows(out_path, shard.name)
        table = pool.read_rows(self.job.urls_path, shard.name)
        rows = _rows(table)
        reasons = self._reasons(shard, table, rows, old, retry)
        spool = Spool(out_path)
        try:
            wanted = [row for row, reason in zip(rows, reasons, strict=True) if reason is None]
            # What failed before and fails again says nothing about the network, nor does what is left of a table.
            watched = old is None and not self._anything_came()
            found = self.engine.results(wanted, spool, watched)
            results = dict(zip((row["index"] for row in wanted), found, strict=True))
            if old is not None and not any(result.values.get("ok") for result in results.values()):
                # Not one came: the shard stays as it was, byte for byte.
                return self._facts(shard, done, shard.rows - len(wanted), started_s)
            storage.delete(storage.join(out_path, f"{shard.name}_stats.json"))  # of the shard as it was
            done = self._write(shard, rows, reasons, results, spool, old)
        finally:
            spool.close()
            self.counts.flush()
        return self._facts(shard, done, shard.rows - len(wanted), started_s)

    def _anything_came(self) -> bool:
        """Whether a finished shard has an image: then a shard in which nothing answers is no sign of a dead network."""
        if not self.came:
            for name in storage.list_files(self.job.out_path):
                if name.endswith(".parquet") and not self.came:
                    table = pool.read_table(storage.join(self.job.out_path, name), ["ok"])
                    self.came = bool(pc.any(table["ok"]).as_py())
        return self.came

    def _reasons(
        self, shard: Shard, table: pa.Table, rows: Sequence[dict], old: pa.Table | None, retry: set[str]
    ) -> list[str | None]:
        """Why each row is not fetched: a failure's name, `old` for one that stays as it is, or None: it is."""
        reasons: list[str | None] = list(table["error"].to_pylist())
        excluded = np.zeros(len(rows), dtype=bool)
        if self.job.exclude:
            pairs = uid_pairs.parse(table["uid"], f"{self.job.urls_path}/{shard.name}.parquet")
            excluded = self.excluded.rows(pairs, [table["url"].to_pylist()])
        chosen = np.ones(len(rows), dtype=bool)
        if self.job.selection_path is not None:
            chosen = chosen_rows(self.job.selection_path, shard)
        before = [None] * len(rows) if old is None else old["error"].to_pylist()
        for index, reason in enumerate(reasons):
            if old is not None and before[index] not in retry:
                reasons[index] = "old"
            elif reason is None and excluded[index]:
                reasons[index] = "excluded"
            elif reason is None and not chosen[index]:
                reasons[index] = "not_chosen"
        return reasons

    def _write(
        self,
        shard: Shard,
        rows: Sequence[dict],
        reasons: Sequence[str | None],
        results: Mapping[int, Result],
        spool: Spool,
        old: pa.Table | None,
    ) -> dict[str, Any]:
        further = {name: CARRIED_TYPES[kind] for name, kind in self.job.carried.items()} | COLUMNS
        old_rows = None if old is None else _rows(old)
        with ShardWriter(self.job.out_path, shard.name, further) as writer, _OldImages(self.job, shard, old) as images:
            for row, reason in zip(rows, reasons, strict=True):
                if reason == "old":
                    assert old_rows is not None  # only then is there this reason
                    row, image = old_rows[row["index"]], images.read(row["index"])
                elif reason is not None:
                    row |= {"ok": False, "error": reason, "attempts": 0}
                    row["error_detail"] = row["error_detail"] or DOWNLOAD_FAILURES.get(reason)
                    image = None
                else:
                    result = results[row["index"]]
                    row |= result.values
                    image = spool.read(result) if row["ok"] else None
                boxes = row.get("face_bboxes")
                writer.add(row | _img2dataset_columns(row), image, {"face_bboxes": json.loads(boxes)} if boxes else {})
        return writer.facts

    @staticmethod
    def _write_stats(path: str, table: pa.Table, started_s: float) -> None:
        """None; img2dataset's _stats.json. Times are facts: this file is no part of the pool's content."""
        statuses = Counter(table["status"].to_pylist())
        now_s = time.time()
        stats = {
            "count": len(table),
            "successes": statuses["success"],
            "failed_to_download": statuses["failed_to_download"],
            "failed_to_resize": statuses["failed_to_resize"],
            "duration": now_s - started_s,
            "start_time": started_s,
            "end_time": now_s,
            "status_dict": dict(Counter(message or "success" for message in table["error_message"].to_pylist())),
        }
        storage.write_json(path, stats)

    def _facts(self, shard: Shard, done: dict[str, Any], kept_rows: int, started_s: float) -> dict[str, Any]:
        """{rows, ok_rows, failed, known} of ShardWriter, and {kept_rows, bytes, hosts: {host: {reason: rows}}}.

        Args:
            kept_rows: rows that were not fetched now.
            started_s: when the work on the shard began, in seconds since the epoch.
        """
        columns = ["url", "error", "body_bytes", "status", "error_message"]
        table = pool.read_table(storage.join(self.job.out_path, f"{shard.name}.parquet"), columns)
        stats_path = storage.join(self.job.out_path, f"{shard.name}_stats.json")
        if not storage.exists(stats_path):  # the parquet was written just now, or before a kill
            self._write_stats(stats_path, table, started_s)
        hosts: dict[str, Counter] = {}
        for url, error in zip(table["url"].to_pylist(), table["error"].to_pylist(), strict=True):
            if error in DOWNLOAD_FAILURES and error not in NOT_ASKED:
                hosts.setdefault(host_of(url) or "(none)", Counter())[error] += 1
        body_bytes = sum(filter(None, table["body_bytes"].to_pylist()))
        done = done | {"kept_rows": kept_rows, "bytes": body_bytes}
        return done | {"hosts": {host: dict(counts) for host, counts in hosts.items()}}


class _WinnowEngine:
    """Fetches rows on one event loop, and turns bodies into what is stored in threads."""

    def __init__(
        self,
        job: DownloadJob,
        threads: int,
        excluded_host: Callable[[str], bool],
        count: Callable[[Result], None],
    ):
        self.settings = job.settings
        self.count = count
        self.pictures = concurrent.futures.ThreadPoolExecutor(threads, thread_name_prefix="picture")
        self.most_bodies = BODIES_PER_THREAD * threads
        self.bodies = self.queued_bytes = 0  # fetched, and not yet through
        self.lock = threading.Lock()
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, name="fetch", daemon=True)
        self.thread.start()
        self._on_loop(self._start(job, excluded_host))

    def results(self, rows: Sequence[Mapping[str, Any]], spool: Spool, watched: bool) -> list[Result]:
        """The result of every row, in the rows' order.

        Args:
            watched: stop also when not one of a shard's few rows is answered.

        Raises:
            NetworkDownError: hardly anything is answered any more.
        """
        order = _by_turns([host_of(row["url"]) for row in rows])
        results: list[Result | None] = [None] * len(rows)
        found = self._on_loop(self._results([rows[place] for place in order], spool, watched))
        for place, (result, kept) in zip(order, found, strict=True):
            if kept is not None:
                kept.result()
            results[place] = result
        return results  # type: ignore[return-value]  # every place was in the order

    def close(self) -> None:
        """None; the event loop and the threads end."""
        self._on_loop(self.fetcher.close())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()
        self.pictures.shutdown()

    def _on_loop(self, coroutine: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result()

    async def _start(self, job: DownloadJob, excluded_host: Callable[[str], bool]) -> None:
        from stages.ingest.fetch.fetcher import Fetcher

        self.fetcher = Fetcher(job.settings, job.num_workers, excluded_host)

    async def _results(
        self, rows: Sequence[Mapping[str, Any]], spool: Spool, watched: bool
    ) -> list[tuple[Result, concurrent.futures.Future | None]]:
        tasks: list[asyncio.Task] = []
        room = asyncio.Semaphore(ROWS_IN_FLIGHT_PER_REQUEST * self.settings.concurrency)
        try:
            for row in rows:
                await room.acquire()
                if self.fetcher.collapse and self.settings.retry is None:
                    break
                task = self.loop.create_task(self._result(row, spool))
                task.add_done_callback(lambda _: room.release())
                tasks.append(task)
            results = [await task for task in tasks]
            cause = self.fetcher.collapse_at_end() if watched else self.fetcher.collapse
            if cause and self.settings.retry is None:
                raise NetworkDownError(f"download stopped: {cause}")
            return results
        finally:
            for task in tasks:
                task.cancel()

    async def _result(self, row: Mapping[str, Any], spool: Spool) -> tuple[Result, concurrent.futures.Future | None]:
        """The row's result, and the work in a thread that completes it."""
        fetched = await self.fetcher.fetch(row["url"])
        values: dict[str, Any] = {
            "ok": fetched.error is None,
            "error": fetched.error,
            "error_detail": fetched.detail or None,
            "final_url": fetched.final_url,
            "http_status": fetched.http_status,
            "attempts": fetched.attempts,
            "body_bytes": fetched.body_bytes,
        }
        result = Result(values)
        if fetched.error is not None:
            self.count(result)
            return result, None
        with self.lock:
            self.bodies += 1
            self.queued_bytes += fetched.body_bytes
            if self.bodies >= self.most_bodies or self.queued_bytes >= QUEUED_BYTES:
                self.fetcher.gate.clear()
        return result, self.pictures.submit(self._complete, row, fetched.body, result, spool)

    def _complete(self, row: Mapping[str, Any], body: bytes, result: Result, spool: Spool) -> None:
        """None; the result of a body, in a thread. Requests go on once half of those that wait are through."""
        try:
            self._keep(row, body, result, spool)
            self.count(result)
        finally:
            with self.lock:
                self.bodies -= 1
                self.queued_bytes -= len(body)
                if not self.fetcher.gate.is_set() and self._has_room():
                    self.loop.call_soon_threadsafe(self._open_gate)

    def _has_room(self) -> bool:
        return self.bodies <= self.most_bodies // 2 and self.queued_bytes <= QUEUED_BYTES // 2

    def _open_gate(self) -> None:
        with self.lock:
            if self._has_room():
                self.fetcher.gate.set()

    def _keep(self, row: Mapping[str, Any], body: bytes, result: Result, spool: Spool) -> None:
        from stages.ingest.fetch.picture import stored_picture

        digest = hashlib.sha256(body).hexdigest()
        values = result.values
        values |= {"sha256": digest, "image_id": digest[:32]}
        checksum = check_sha256(row, digest, self.settings.checksum)
        values |= checksum
        if values["error"]:
            return
        boxes = None
        if self.settings.image.blur_faces and row.get("face_bboxes"):
            boxes = json.loads(row["face_bboxes"])
        try:
            picture = stored_picture(body, self.settings.image, boxes)
        except ImageError as error:
            detail = error.detail[:300].encode("utf-8", "replace").decode()
            values |= {"ok": False, "error": error.reason, "error_detail": detail}
            return
        values |= {
            "width_px": picture.width_px,
            "height_px": picture.height_px,
            "original_width_px": picture.original_width_px,
            "original_height_px": picture.original_height_px,
            "image_format": picture.format,
            "exif": picture.exif,
        }
        result.offset_bytes, result.size_bytes = spool.append(picture.data), len(picture.data)


class _OldImages:
    """The images of a shard that is being replaced."""

    def __init__(self, job: DownloadJob, shard: Shard, old: pa.Table | None):
        self._file = None
        if old is not None:
            self._file = storage.open_read(storage.join(job.out_path, f"{shard.name}.tar"))
            self._offsets = old["image_offset_bytes"].to_pylist()
            self._sizes = old["image_size_bytes"].to_pylist()

    def read(self, index: int) -> bytes | None:
        """The image of the row, or None where it failed."""
        if self._file is None or self._offsets[index] is None:
            return None
        self._file.seek(self._offsets[index])
        return self._file.read(self._sizes[index])

    def __enter__(self) -> _OldImages:
        return self

    def __exit__(self, *problem: Any) -> None:
        if self._file is not None:
            self._file.close()


class _Counts:
    """What a worker has done so far, posted now and then."""

    def __init__(self, report: Callable[[str, dict[str, Any]], None] | None):
        self._report = report
        self._worker = uuid.uuid4().hex[:8]
        self._started_s = time.monotonic()
        self._lock = threading.Lock()
        self._values: dict[str, Any] = {"rows": 0, "ok_rows": 0, "bytes": 0}
        self._failed: Counter[str] = Counter()
        self._last_s = 0.0

    def add(self, result: Result) -> None:
        """None; one more row is through."""
        with self._lock:
            self._values["rows"] += 1
            self._values["bytes"] += result.values.get("body_bytes") or 0
            if result.values["ok"]:
                self._values["ok_rows"] += 1
            else:
                self._failed[result.values["error"]] += 1
            due = time.monotonic() - self._last_s >= REPORT_EVERY_S
        if due:
            self.flush()

    def flush(self) -> None:
        """None; posts what there is."""
        if self._report is None:
            return
        with self._lock:
            self._last_s = time.monotonic()
            seconds = max(self._last_s - self._started_s, 1e-3)
            values = {**self._values, "failed": dict(self._failed), "seconds": seconds}
        self._report(self._worker, values)


def retried_failures(settings: DownloadSettings) -> set[str]:
    """Which failures of rows are fetched again: none, those named, or all that another try could mend."""
    if settings.retry == "failed":
        return set(DOWNLOAD_FAILURES) - NOT_ASKED | set(IMAGE_FAULTS)
    return set(settings.retry or ())


def check_sha256(row: Mapping[str, Any], digest: str, policy: str) -> dict[str, Any]:
    """The columns that the checksum decides: checksum_ok, and a failure where the policy rejects."""
    expected = row.get("expected_sha256")
    if policy == "accept" or expected is None:
        return {}
    values: dict[str, Any] = {"checksum_ok": digest == expected}
    if digest != expected and policy == "reject":
        detail = f"sha256 {digest}, expected {expected}"
        values |= {"ok": False, "error": "checksum_mismatch", "error_detail": detail}
    return values


def worst_hosts(shards: Iterable[Mapping[str, Mapping[str, int]]]) -> list[dict[str, Any]]:
    """The hosts with most failures, worst first: [{host, failed, reasons: {reason: rows}}], at most NAMED_HOSTS."""
    hosts: dict[str, Counter] = {}
    for shard in shards:
        for host, reasons in shard.items():
            hosts.setdefault(host, Counter()).update(reasons)
    worst = sorted(hosts.items(), key=lambda entry: (-sum(entry[1].values()), entry[0]))[:NAMED_HOSTS]
    return [
        {"host": host, "failed": sum(found.values()), "reasons": dict(sorted(found.items()))} for host, found in worst
    ]


def _by_turns(hosts: Sequence[str]) -> list[int]:
    """The places of rows in the order to ask in: every host's first, every host's second, ... So rows of one slow host
    do not stand before those of many others."""
    seen: Counter[str] = Counter()
    turns = []
    for place, host in enumerate(hosts):
        turns.append((seen[host], place))
        seen[host] += 1
    return [place for _, place in sorted(turns)]


def _rows(table: pa.Table) -> list[dict[str, Any]]:
    """The rows as mappings with their `index`; vectors stay numpy arrays."""
    columns = {}
    for name in table.column_names:
        column = table[name]
        if pa.types.is_list(column.type):
            columns[name] = [entry.values.to_numpy() if entry.is_valid else None for entry in column]
        else:
            columns[name] = column.to_pylist()
    names = list(columns)
    return [
        {"index": index, **dict(zip(names, values, strict=True))}
        for index, values in enumerate(zip(*columns.values(), strict=True))
    ]


def _img2dataset_columns(row: Mapping[str, Any]) -> dict[str, Any]:
    """img2dataset's columns of a row, from ours."""
    status, message = "success", None
    if not row["ok"]:
        status = "failed_to_resize" if row["error"] in IMAGE_FAULTS else "failed_to_download"
        message = f"{row['error']}: {row.get('error_detail') or ''}".rstrip(": ")
    stored = row["ok"]
    return {
        "status": status,
        "error_message": message,
        "width": row["width_px"] if stored else None,
        "height": row["height_px"] if stored else None,
        "original_width": row["original_width_px"] if stored else None,
        "original_height": row["original_height_px"] if stored else None,
    }
