"""Makes a pool's shards from its sources: every sample becomes a row, the usable ones also members of a tar.

Four steps, each plain functions that can run anywhere, in any order, and again:

    units = sources.plan_units(sources, shard_size)        one task
    read_ids(unit, number, out_path)                        a task per unit: 16 bytes a row
    plan = plan_shards(units, shard_size, sample, out_path) one task: uids, the sample, what goes where
    write_shard(shard, out_path)                            a task per shard

uids are kept where the source gives them (the first of equal ones in the pool's order; the others are failed rows
`repeated_uid`) and else derived from the image (or the URL of one that is not there) and the caption. Of equal pairs
without given uids every one is kept: the first has the derived uid, the others numbered ones. So uids are unique, and
no order of work can change them.

Cost: given uids: one pass over the bytes (two over tars); derived ones: two passes. plan_shards needs about 80 bytes
a row; everything else one sample at a time, and a shard's rows without their images.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.core import images, pool, storage
from pipeline.core.errors import ImageError, WinnowError
from stages.ingest import demo_world, image_folder, parquet_rows, shard_writer, sources, tar_samples, url_table
from stages.ingest.samples import CARRIED_TYPES, ORIGINAL_FILE, Sample, Unit, numbered_uid
from stages.ingest.shard_writer import ShardWriter
from stages.ingest.sources import DEMO, URLS

VERSION = 3  # bump when a pool's bytes change for the same source
MAX_SHARDS = 100_000  # five digits
MAX_DETAIL_CHARS = 300
IDS_FOLDER = f"ids{storage.TEMPORARY_MARK}pool"  # by its mark no part of the finished artifact

# What read_ids and plan_shards keep of a row.
ROW = np.dtype([("id", "S16"), ("state", "u1")])
DERIVED, GIVEN, REPEATED, LEFT_OUT = range(4)


@dataclass(frozen=True)
class Span:
    """Rows start..stop of a unit; `number` is the unit's place in the plan."""

    unit: Unit
    number: int
    start: int
    stop: int


@dataclass(frozen=True)
class ShardPlan:
    """What a shard of the pool is made of: `columns` are the carried ones of all sources, with their types."""

    name: str
    spans: tuple[Span, ...]
    columns: Mapping[str, str]

    @property
    def is_table(self) -> bool:
        """True when the rows are of tables of URLs: no source with images stands beside one."""
        return self.spans[0].unit.settings.layout == URLS


@dataclass(frozen=True)
class PoolPlan:
    """The shards in order. source_rows = rows in the shards + sampled_out_rows."""

    shards: tuple[ShardPlan, ...]
    source_rows: int
    sampled_out_rows: int


def read_samples(unit: Unit, with_images: bool = True) -> Iterator[Sample]:
    """The unit's samples in order, the same ones every time.

    Args:
        with_images: False may leave images (and vectors) out where that is cheaper.
    """
    if unit.settings.layout == DEMO:
        return _demo_samples(unit, with_images)
    if unit.settings.layout == URLS:
        return url_table.read(unit, vectors=with_images)
    if unit.settings.layout == "parquet":
        return parquet_rows.read(unit, with_images)
    if unit.settings.layout == "folder":
        return image_folder.read(unit)
    return tar_samples.read(unit)


def read_ids(unit: Unit, number: int, out_path: str) -> int:
    """How many rows the unit has; their ids are in a file below `out_path` afterwards. Kept when it is there."""
    path = _ids_path(out_path, "read", number)
    if storage.exists(path):
        return len(_load(path))
    ids = None
    if unit.settings.layout == URLS:
        ids = _given(url_table.given_uids(unit))
    if ids is None and unit.settings.layout in (DEMO, "parquet", URLS):
        ids = _ids(read_samples(unit, with_images=False), derive=False)
    if ids is None:
        ids = _ids(read_samples(unit), derive=True)
    assert ids is not None  # with derive there is always an answer
    _save(path, ids)
    return len(ids)


def plan_shards(
    units: Sequence[Unit], shard_size: int, sample: float, columns: Mapping[str, str], out_path: str
) -> PoolPlan:
    """Which rows of which units make which shard; every row's final uid is in a file below `out_path` afterwards.

    A unit's rows stay together where they fit into a shard: shards then hold between half and all of `shard_size`.
    Memory: about 80 bytes a row of the sources.

    Args:
        sample: the fraction of rows to keep, by a hash of the uid: a smaller one keeps a subset.
        columns: the carried columns of all sources.

    Raises:
        WinnowError: nothing is left, or more than MAX_SHARDS shards.
    """
    tables = [_load(_ids_path(out_path, "read", number)) for number in range(len(units))]
    sizes = [len(table) for table in tables]
    rows = np.concatenate(tables) if tables else np.empty(0, ROW)
    del tables
    _make_unique(rows)
    rows["state"][~sampled(rows["id"], sample)] = LEFT_OUT
    kept_sizes = []
    for number, (size, start) in enumerate(zip(sizes, np.cumsum([0, *sizes])[:-1], strict=True)):
        unit_rows = rows[start : start + size]
        _save(_ids_path(out_path, "final", number), unit_rows)
        kept_sizes.append(int(np.count_nonzero(unit_rows["state"] != LEFT_OUT)))
    kept = sum(kept_sizes)
    if not kept:
        raise WinnowError(f"pool.sample = {sample} keeps none of the sources' {len(rows)} rows, expected at least one")
    spans = _shard_spans(units, kept_sizes, shard_size)
    if len(spans) > MAX_SHARDS:
        raise WinnowError(f"pool.shard_size = {shard_size} makes {len(spans)} shards, expected at most {MAX_SHARDS}")
    shards = tuple(ShardPlan(f"{index:05d}", group, columns) for index, group in enumerate(spans))
    return PoolPlan(shards, len(rows), len(rows) - kept)


def write_shard(shard: ShardPlan, out_path: str) -> dict[str, Any]:
    """{rows, ok_rows, failed: {reason: rows}, known: {file: {bytes, sha256}}}, once the shard's files are there.

    The same bytes for the same sources, whenever and wherever it runs; a finished shard is kept. Images are written
    as they came; each is decoded once, to know that it can be. Rows of a table of URLs have no image: no tar.

    Raises:
        WinnowError: a source has changed since its ids were read.
    """
    done = shard_writer.finished(out_path, shard.name)
    if done is not None:
        return done
    further = {column: CARRIED_TYPES[kind] for column, kind in shard.columns.items()}
    checker = _ImageCheck()
    with ShardWriter(out_path, shard.name, further, has_tar=not shard.is_table) as writer:
        if shard.is_table:
            _add_table_rows(writer, shard, out_path)
        else:
            for number, (unit, sample, uid, repeated) in enumerate(_shard_samples(shard, out_path)):
                row = _row(unit, _once(sample, repeated), uid, _key(shard, number), checker)
                writer.add(row, sample.image)
    return writer.facts


def pool_facts(source_rows: int, sampled_out_rows: int, shards: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """{source_rows, sampled_out_rows, rows, ok_rows, failed: {reason: rows}} of the pool from its shards' facts.

    Raises:
        WinnowError: not one row is usable; says what most of them failed at.
    """
    failed: Counter[str] = Counter()
    for facts in shards:
        failed.update(facts["failed"])
    rows = sum(facts["rows"] for facts in shards)
    ok_rows = sum(facts["ok_rows"] for facts in shards)
    if not ok_rows:
        reasons = ", ".join(f"{count} {reason}" for reason, count in failed.most_common(3))
        raise WinnowError(f"pool: none of {rows} rows is usable ({reasons}), expected at least one")
    return {
        "source_rows": source_rows,
        "sampled_out_rows": sampled_out_rows,
        "rows": rows,
        "ok_rows": ok_rows,
        "failed": dict(sorted(failed.items())),
    }


def forget_ids(out_path: str) -> None:
    """None; removes what the first steps left for the last one."""
    storage.delete(storage.join(out_path, IDS_FOLDER))


def sampled(ids: np.ndarray, fraction: float) -> np.ndarray:
    """[N] bool: which of the ids ([N] S16) are in the sample. A smaller fraction's sample is a subset."""
    words = np.frombuffer(ids.astype("S16").tobytes(), ">u8").reshape(-1, 2).astype(np.uint64)
    mixed = words[:, 0] ^ (words[:, 1] * np.uint64(0x9E3779B97F4A7C15))
    mixed ^= mixed >> np.uint64(30)  # splitmix64's finish: given uids need not be random in every bit
    mixed *= np.uint64(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> np.uint64(27)
    mixed *= np.uint64(0x94D049BB133111EB)
    mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(11)) < np.uint64(math.floor(fraction * 2**53))


def _demo_samples(unit: Unit, with_images: bool) -> Iterator[Sample]:
    """uids of the demo world are given: drawing a picture costs more than everything else that happens to it."""
    num_pairs, seed, clean = unit.extra
    name = f"demo {demo_world.VERSION} {num_pairs} {seed} {clean}"
    rows = demo_world.pairs(num_pairs, seed, clean, unit.start, unit.stop) if with_images else None
    for row in range(unit.start, unit.stop):
        uid = hashlib.sha256(f"{name} {row}".encode()).hexdigest()[:32]
        if rows is None:
            yield Sample(str(row), uid=uid)
            continue
        pair = next(rows)
        carried = {column: pair[column] for column in sources.TRUTH_COLUMNS}
        yield Sample(str(row), pair["image"], pair["caption"], uid, carried=carried)


def _ids(samples: Iterator[Sample], derive: bool) -> np.ndarray | None:
    """[rows] ROW: given uids, and derived ones as if nothing came twice. None: `derive` is False and one is missing."""
    found = io.BytesIO()
    for sample in samples:
        if sample.uid is not None:
            uid, state = sample.uid, GIVEN
        elif derive:
            what = sample.image if sample.image is not None else (sample.url or "").encode()
            uid, state = pool.derived_uid(what, sample.caption or "", 0), DERIVED
        else:
            return None
        found.write(bytes.fromhex(uid) + bytes([state]))
    return np.frombuffer(found.getvalue(), ROW).copy()


def _given(uids: np.ndarray | None) -> np.ndarray | None:
    """[rows] ROW of uids that the source gives."""
    if uids is None:
        return None
    found = np.zeros(len(uids), ROW)
    found["id"], found["state"] = uids, GIVEN
    return found


def _make_unique(rows: np.ndarray) -> None:
    """None; gives every repeated id another one: a given one becomes REPEATED, a derived one is numbered."""
    order = np.argsort(rows["id"], kind="stable")
    ids = rows["id"][order]
    same = np.flatnonzero(ids[1:] == ids[:-1]) + 1
    if not len(same):
        return
    involved = order[np.union1d(same, same - 1)]
    # A given uid comes before derived ones, wherever they stand: it is the one that others know.
    involved = involved[np.lexsort((involved, rows["state"][involved] != GIVEN))]
    taken: set[bytes] = set()
    numbers: dict[tuple[bytes, int], int] = {}
    for index in involved.tolist():
        first, state = bytes(rows["id"][index]), int(rows["state"][index])
        if first not in taken:
            taken.add(first)
            continue
        what = "repeat" if state == GIVEN else "occurrence"
        number = numbers.get((first, state), 0) + 1
        while True:
            new = bytes.fromhex(numbered_uid(first.ljust(16, b"\0").hex(), what, number)).rstrip(b"\0")
            place = int(np.searchsorted(ids, np.array(new, "S16")))
            if new not in taken and not (place < len(ids) and ids[place] == np.array(new, "S16")):
                break
            number += 1  # a source that gives such a uid has read a pool of ours, or our code
        numbers[first, state] = number
        taken.add(new)
        rows["id"][index] = new
        if state == GIVEN:
            rows["state"][index] = REPEATED


def _shard_spans(units: Sequence[Unit], sizes: Sequence[int], shard_size: int) -> list[tuple[Span, ...]]:
    """The shards' spans; sizes and spans count kept rows only."""
    shards: list[tuple[Span, ...]] = []
    current: list[Span] = []
    room = shard_size
    for number, (unit, size) in enumerate(zip(units, sizes, strict=True)):
        start = 0
        while start < size:
            if current and size - start > room:
                shards.append(tuple(current))
                current, room = [], shard_size
            stop = min(size, start + shard_size)
            current.append(Span(unit, number, start, stop))
            room -= stop - start
            start = stop
    if current:
        shards.append(tuple(current))
    return shards


def _shard_samples(shard: ShardPlan, out_path: str) -> Iterator[tuple[Unit, Sample, str, bool]]:
    """(unit, sample, uid, whether it is repeated) of the shard's rows in order."""
    for span in shard.spans:
        rows = _load(_ids_path(out_path, "final", span.number))
        changed = _has_changed(span, len(rows))
        kept = np.flatnonzero(rows["state"] != LEFT_OUT)[span.start : span.stop]
        samples = read_samples(span.unit)
        position = 0
        for index in kept.tolist():
            sample = next(islice(samples, index - position, None), None)
            position = index + 1
            if sample is None:
                raise changed
            uid = bytes(rows["id"][index]).ljust(16, b"\0").hex()
            yield span.unit, sample, uid, bool(rows["state"][index] == REPEATED)
        if position == len(rows) and next(samples, None) is not None:
            raise changed


def _add_table_rows(writer: ShardWriter, shard: ShardPlan, out_path: str) -> None:
    """None; the shard's rows as _shard_samples gives them, as columns where all rows of a piece are usable."""
    number = 0
    for span in shard.spans:
        rows = _load(_ids_path(out_path, "final", span.number))
        kept = np.flatnonzero(rows["state"] != LEFT_OUT)[span.start : span.stop]
        position = 0
        for piece in url_table.read_pieces(span.unit):
            columns = piece.columns
            samples = piece.samples() if columns is None else []
            size = len(samples) if columns is None else columns.num_rows
            inside = kept[np.searchsorted(kept, position) : np.searchsorted(kept, position + size)]
            uids = _hex(rows["id"][inside])
            repeated = rows["state"][inside] == REPEATED
            if columns is not None and len(inside) and not repeated.any():
                if len(inside) < size:
                    columns = columns.take(inside - position)
                writer.add_table(_table_columns(columns, span.unit, uids, shard, number), len(inside))
            elif len(inside):
                samples = samples or piece.samples()
                for at, index in enumerate((inside - position).tolist()):
                    sample = _once(samples[index], bool(repeated[at]))
                    writer.add(_row(span.unit, sample, uids[at], _key(shard, number + at), None), None)
            number += len(inside)
            position += size
            if position > kept[-1] and kept[-1] + 1 < len(rows):
                break  # what follows is another shard's
        if position <= kept[-1] or (kept[-1] + 1 == len(rows) and position != len(rows)):
            raise _has_changed(span, len(rows))


def _table_columns(columns: pa.Table, unit: Unit, uids: list[str], shard: ShardPlan, number: int) -> dict[str, Any]:
    """The pool's columns of usable rows of a table, the first of which is row `number` of the shard."""
    found = {name: columns[name] for name in columns.column_names}
    found["uid"] = pa.array(uids, pa.string())
    found["key"] = pa.array([_key(shard, number + at) for at in range(len(uids))], pa.string())
    found["source"] = pa.repeat(unit.source, len(uids))
    found["ok"] = pa.repeat(True, len(uids))
    return found


def _key(shard: ShardPlan, number: int) -> str:
    return f"{shard.name}{number:06d}"


def _hex(ids: np.ndarray) -> list[str]:
    """The uids of [n] S16, which holds no zeros at their ends, as 32 hex digits each."""
    digits = ids.tobytes().hex()
    return [digits[start : start + 32] for start in range(0, len(digits), 32)]


def _once(sample: Sample, repeated: bool) -> Sample:
    return sample.failed("repeated_uid", "an earlier row has this uid") if repeated else sample


def _has_changed(span: Span, num_rows: int) -> WinnowError:
    place = f"source {span.unit.source}: {span.unit.place or span.unit.path}"
    return WinnowError(f"{place}: expected the {num_rows} samples of the run's first pass; it has changed")


class _ImageCheck:
    """Decodes each image once: several captions of one image come one after the other with the same bytes."""

    def __init__(self) -> None:
        self._image: bytes | None = None
        self._answer: tuple[dict[str, Any], tuple[str, str] | None] = ({}, None)

    def columns(self, image: bytes) -> tuple[dict[str, Any], tuple[str, str] | None]:
        """The columns that the image alone decides, and why it can't be used (reason, detail) or None."""
        if image is not self._image:
            self._image, self._answer = image, self._check(image)
        return self._answer

    def _check(self, image: bytes) -> tuple[dict[str, Any], tuple[str, str] | None]:
        digest = hashlib.sha256(image).hexdigest()
        columns: dict[str, Any] = {"sha256": digest, "image_id": digest[:32]}
        try:
            # Pillow calls photos with an embedded preview MPO; they are JPEG files.
            columns["image_format"] = images.FORMATS.get(images.open_image(image).format or "", "jpg")
            decoded = images.decode_rgb(image)
        except ImageError as error:
            return columns, (error.reason, error.detail)
        columns["width_px"], columns["height_px"] = decoded.size
        return columns, None


def _row(unit: Unit, sample: Sample, uid: str, key: str, checker: _ImageCheck | None) -> dict[str, Any]:
    """The pool's row, without where its image lies."""
    row: dict[str, Any] = {"uid": uid, "key": key, "caption": sample.caption, "source": unit.source, "url": sample.url}
    row |= sample.carried
    if unit.settings.carry.get(ORIGINAL_FILE) == "string" and row.get(ORIGINAL_FILE) is None:
        row[ORIGINAL_FILE] = unit.place
    if sample.image is not None and checker is not None:
        columns, problem = checker.columns(sample.image)
        row |= columns
        if problem:
            sample = sample.failed(*problem)
    elif unit.settings.layout != URLS:
        sample = sample.failed("missing_image", "no image")
    row["original_width_px"] = sample.original_width_px or row.get("width_px")
    row["original_height_px"] = sample.original_height_px or row.get("height_px")
    row["ok"], row["error"] = sample.error is None, sample.error
    if sample.error:
        where = " ".join(part for part in (unit.place, sample.key) if part)
        detail = f"{where}: {sample.detail}" if where else sample.detail
        row["error_detail"] = " ".join(detail.encode("utf-8", "replace").decode().split())[:MAX_DETAIL_CHARS]
    return row


def _ids_path(out_path: str, step: str, number: int) -> str:
    return storage.join(out_path, IDS_FOLDER, f"{step}-{number:06d}.npy")


def _save(path: str, rows: np.ndarray) -> None:
    sink = io.BytesIO()
    np.save(sink, rows, allow_pickle=False)
    storage.write_bytes(path, sink.getvalue())


def _load(path: str) -> np.ndarray:
    return np.load(io.BytesIO(storage.read_bytes(path)), allow_pickle=False)
