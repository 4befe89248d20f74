"""Several map stages over one pool shard: its images are read and decoded once for all of them.

Rows go through in groups of GROUP_ROWS, each a row group of every output file, so that bytes do not depend on batch
sizes. Within a group, a stage's batches start at the multiples of its own batch size among the ok rows; one of a stage
that reads pixels is cut where its images would have more than BATCH_PIXELS. So what process() sees, last bits of a
model's output included, depends on the shard and on the stage's own batch size alone, never on the stages beside it.

Images are read and decoded in blocks, the next one while one is in work, and dropped once every stage has had them.
Memory: one group of rows, two blocks, and of each row that a stage's next batch waits for its bytes and image.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import artifact, images, pool, storage
from pipeline.core.errors import ImageError, WinnowError
from pipeline.core.pool import Shard
from stages.base import Batch, Stage
from stages.column_files import ARROW_TYPES, Column, chosen_rows, file_path, is_current, open_columns, row_groups

GROUP_ROWS = 4096
BATCH_PIXELS = 128_000_000  # of one batch, or one image: 384 MB as RGB
BLOCK_ROWS = 256
BLOCK_PIXELS = 64_000_000


@dataclass(frozen=True)
class LoadedStage:
    """A stage ready to run: its state, the folder it writes to, and where the columns that it `needs` are."""

    stage: Stage
    state: Any
    out_path: str
    batch_size: int | None = None
    columns: Mapping[str, Column] = field(default_factory=dict)

    @property
    def rows_per_call(self) -> int:
        """Rows per process() call."""
        return self.batch_size or self.stage.batch_size


def score_shard(
    pool_path: str, shard: Shard, stages: Sequence[LoadedStage], threads: int = 1, within: str | None = None
) -> dict[str, Any]:
    """Facts of the pass; each stage's file of this shard is there, whole, when this returns.

    Files that are there already and belong to the shard as it is now are kept.

    Args:
        threads: threads that decode images, beside the caller's.
        within: the folder of a selection; its rows are scored, the others get nulls as failed rows do.

    Returns:
        {rows, ok_rows, image_bytes, seconds: {out_path: seconds in process()}} of what was computed now, and
        known: {out_path: {file name: {bytes, sha256}}} of the files that were written now.

    Raises:
        WinnowError: an image that decoded when the pool was made does not now, or a stage breaks its contract.
    """
    pending = [entry for entry in stages if not is_current(entry.out_path, shard)]
    facts: dict[str, Any] = {"rows": 0, "ok_rows": 0, "image_bytes": 0, "seconds": {}, "known": {}}
    if not pending:
        return facts | {"rows": shard.rows}
    facts["seconds"] = {entry.out_path: 0.0 for entry in pending}
    chosen = None if within is None else chosen_rows(within, shard)
    with contextlib.ExitStack() as stack:
        decoder = stack.enter_context(ThreadPoolExecutor(threads))
        writers = [_Writer(stack, entry, shard) for entry in pending]
        for group in _groups(stack, pool_path, shard, pending):
            ok = group.rows["ok"].to_numpy()
            ok_rows = np.flatnonzero(ok if chosen is None else ok & chosen[group.first_row :][: len(ok)])
            facts["rows"] += len(ok)
            facts["ok_rows"] += len(ok_rows)
            _score_group(pool_path, shard, group, ok_rows, writers, decoder, facts)
            for writer in writers:
                writer.end_group(group.rows["uid"], ok_rows)
        for writer in writers:
            facts["known"][writer.entry.out_path] = {f"{shard.name}.parquet": writer.close()}
    return facts


@dataclass(frozen=True)
class _Group:
    """GROUP_ROWS rows of the pool, and for each stage the table of the columns that it needs (or None)."""

    first_row: int
    rows: pa.Table
    columns: list[pa.Table | None]


def _score_group(
    pool_path: str,
    shard: Shard,
    group: _Group,
    ok_rows: np.ndarray,
    writers: Sequence[_Writer],
    decoder: ThreadPoolExecutor,
    facts: dict[str, Any],
) -> None:
    """None; every stage has had all ok rows of the group, in its own batches."""
    table = group.rows.take(ok_rows)
    sides_px = (table[name].fill_null(0).to_numpy().astype(np.int64) for name in ("width_px", "height_px"))
    pixels = np.multiply(*sides_px)  # zeros before a download
    shared = _Lists({name: table[name] for name in table.column_names})
    own = []  # of each stage: its columns of the group
    queues = []  # of each stage: the ends of the batches that are left, the next one last
    for writer, needed in zip(writers, group.columns, strict=True):
        extra = needed.take(ok_rows) if needed is not None else None
        own.append(_Lists({name: extra[name] for name in extra.column_names} if extra is not None else {}, shared))
        of_stage = pixels if writer.entry.stage.reads == "pixels" else None
        queues.append(_batch_ends(len(ok_rows), writer.entry.rows_per_call, of_stage)[::-1])
    starts = [0] * len(writers)
    window: dict[str, _Window] = {"bytes": _Window(), "pixels": _Window()}
    readers = {what: [at for at, writer in enumerate(writers) if writer.entry.stage.reads == what] for what in window}
    for block in _ahead(_blocks(pool_path, shard, table, pixels, {what for what in window if readers[what]}, decoder)):
        facts["image_bytes"] += sum(map(len, block.image_bytes or ()))
        window["bytes"].add(block.image_bytes)
        window["pixels"].add(block.images())
        for at, (writer, queue) in enumerate(zip(writers, queues, strict=True)):
            reads = writer.entry.stage.reads
            while queue and queue[-1] <= block.stop:
                start, stop = starts[at], queue.pop()
                batch = Batch(
                    _Slices(own[at], start, stop),
                    shard.name,
                    group.first_row + ok_rows[start:stop],
                    window["bytes"].get(start, stop) if reads in window else None,
                    window["pixels"].get(start, stop) if reads == "pixels" else None,
                )
                started = time.perf_counter()
                writer.process(batch)
                facts["seconds"][writer.entry.out_path] += time.perf_counter() - started
                starts[at] = stop
        # A stage that reads pixels may look at the bytes as well.
        window["bytes"].drop_before(min((starts[at] for what in window for at in readers[what]), default=0))
        window["pixels"].drop_before(min((starts[at] for at in readers["pixels"]), default=0))


def _batch_ends(num_rows: int, rows_per_call: int, pixels: np.ndarray | None) -> list[int]:
    """Where the batches of one group of ok rows end.

    Args:
        pixels: [num_rows] of the images, for a stage that reads them.
    """
    ends = []
    for first in range(0, num_rows, rows_per_call):
        start, last = first, min(first + rows_per_call, num_rows)
        while pixels is not None and pixels[start:last].sum() > BATCH_PIXELS and last - start > 1:
            start += max(1, int(np.searchsorted(np.cumsum(pixels[start:last]), BATCH_PIXELS, side="right")))
            ends.append(start)
        ends.append(last)
    return ends


class _Lists(Mapping):
    """Columns of a group of rows as lists, each made when it is first asked for."""

    def __init__(self, columns: Mapping[str, pa.ChunkedArray], beneath: Mapping[str, list] | None = None):
        self._columns = columns
        self._beneath = beneath or {}
        self._lists: dict[str, list] = {}

    def __getitem__(self, name: str) -> list:
        if name not in self._columns:
            return self._beneath[name]
        if name not in self._lists:
            self._lists[name] = _values(self._columns[name])
        return self._lists[name]

    def __iter__(self) -> Iterator[str]:
        return iter({**self._beneath, **self._columns})

    def __len__(self) -> int:
        return len({**self._beneath, **self._columns})


class _Slices(Mapping):
    """The same rows of each of a group's columns."""

    def __init__(self, columns: Mapping[str, list], start: int, stop: int):
        self._columns = columns
        self._rows = slice(start, stop)

    def __getitem__(self, name: str) -> list:
        return self._columns[name][self._rows]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)


class _Window:
    """The images (or their bytes) of a group's rows that a stage still waits for."""

    def __init__(self) -> None:
        self.start = 0
        self.entries: list[Any] = []

    def add(self, entries: Sequence[Any] | None) -> None:
        self.entries += entries or ()

    def get(self, start: int, stop: int) -> list[Any]:
        return self.entries[start - self.start : stop - self.start]

    def drop_before(self, start: int) -> None:
        del self.entries[: start - self.start]
        self.start = start


@dataclass
class _Block:
    """The ok rows of a group up to `stop`: image bytes, and images once decoded, of those after the last block."""

    stop: int
    uids: list[str]
    image_bytes: list[bytes] | None
    decoding: list[Future] | None
    shard_place: str

    def images(self) -> list | None:
        if self.decoding is None:
            return None
        decoded = []
        for uid, future in zip(self.uids, self.decoding, strict=True):
            try:
                decoded.append(future.result())
            except ImageError as error:
                raise WinnowError(
                    f"{self.shard_place}: uid {uid}: {error}, expected an image that decodes as it did before"
                ) from error
        self.decoding = None  # the window holds them from here on
        return decoded


def _groups(
    stack: contextlib.ExitStack, pool_path: str, shard: Shard, stages: Sequence[LoadedStage]
) -> Iterator[_Group]:
    place = storage.join(pool_path, f"{shard.name}.parquet")
    rows = pq.ParquetFile(stack.enter_context(storage.open_read(place)))
    if rows.metadata.num_rows != shard.rows:
        raise WinnowError(f"{place}: {rows.metadata.num_rows} rows, expected {shard.rows} as the pool's record says")
    readers: list[Iterator[pa.Table]] = []
    sources: list[dict[str, int]] = []  # per stage: needed column -> reader
    carried = set()  # needed columns that the pool itself has, beyond those that every pool has
    for entry in stages:
        sources.append({})
        for name in entry.stage.needs_in_process:
            column = entry.columns.get(name)
            if column is None:
                carried.add(name)
                continue
            file = open_columns(column.path, shard)
            stack.callback(file.close, force=True)
            sources[-1][name] = len(readers)
            readers.append(row_groups(file, [column.name], GROUP_ROWS))
    names = [*pool.SCHEMA.names, *sorted(carried.difference(pool.SCHEMA.names))]
    if missing := sorted(carried.difference(rows.schema_arrow.names)):
        raise WinnowError(f"{place}: no column {missing[0]}, which a stage needs")
    first_row = 0
    for table in row_groups(rows, names, GROUP_ROWS):
        extra = [next(reader) for reader in readers]
        columns = [pa.table({name: extra[index][0] for name, index in source.items()}) for source in sources]
        yield _Group(first_row, table, [needed if needed.num_columns else None for needed in columns])
        first_row += table.num_rows


def _blocks(
    pool_path: str, shard: Shard, table: pa.Table, pixels: np.ndarray, reads: set[str], decoder: ThreadPoolExecutor
) -> Iterator[_Block]:
    """The rows of `table` (ok ones) in blocks; a single one without images where no stage reads them."""
    place = f"{pool_path}/{shard.name}.tar"
    image_bytes = pool.read_images(pool_path, shard.name, table)  # one open file: on an object store each is a request
    start = 0
    while start < table.num_rows:
        stop = min(start + BLOCK_ROWS, table.num_rows) if reads else table.num_rows
        if "pixels" in reads:
            stop = start + max(1, int(np.searchsorted(np.cumsum(pixels[start:stop]), BLOCK_PIXELS, side="right")))
        part = table.slice(start, stop - start)
        data = list(itertools.islice(image_bytes, part.num_rows)) if reads else None
        decoding = [decoder.submit(images.decode_rgb, image) for image in data or ()] if "pixels" in reads else None
        yield _Block(stop, part["uid"].to_pylist(), data, decoding, place)
        start = stop


def _ahead(blocks: Iterator[_Block]) -> Iterator[_Block]:
    """The same blocks; the next one is already being decoded while one is in use."""
    current = next(blocks, None)
    while current is not None:
        following = next(blocks, None)
        yield current
        current = following


class _Writer:
    """One stage's output file: checks what process() gives and puts nulls where rows failed."""

    def __init__(self, stack: contextlib.ExitStack, entry: LoadedStage, shard: Shard):
        self.entry = entry
        self.place = f"stage {type(entry.stage).__name__}, shard {shard.name}"
        fields = [("uid", pa.string()), *((name, ARROW_TYPES[kind]) for name, kind in entry.stage.adds.items())]
        self.schema = pa.schema(fields, metadata={pool.SHARD_DIGEST: shard.digest, **entry.stage.notes()})
        self.temporary = stack.enter_context(storage.write_file(file_path(entry.out_path, shard)))
        hashes = [field.name for field in self.schema if field.type == pa.binary()]  # neither repeat nor shrink
        others = [name for name in self.schema.names if name not in hashes]
        writer = pq.ParquetWriter(
            self.temporary,
            self.schema,
            compression=dict.fromkeys(others, "zstd") | dict.fromkeys(hashes, "none"),
            use_dictionary=others,
            version="2.6",
        )
        self.file = stack.enter_context(writer)
        self.parts: dict[str, list[pa.Array]] = {name: [] for name in entry.stage.adds}

    def process(self, batch: Batch) -> None:
        self._keep(self.entry.stage.process(batch, self.entry.state), len(batch))

    def close(self) -> dict[str, Any]:
        """{bytes, sha256} of the file, which is whole now but not yet under its name."""
        self.file.close()
        return artifact.file_entry(self.temporary)

    def _keep(self, found: Mapping[str, Sequence], num_rows: int) -> None:
        adds = self.entry.stage.adds
        if set(found) != set(adds):
            raise WinnowError(f"{self.place}: gave columns {sorted(found)}, expected {sorted(adds)}")
        for name, values in found.items():
            if len(values) != num_rows:
                raise WinnowError(f"{self.place}: {name} has {len(values)} values, expected {num_rows}")
            try:
                self.parts[name].append(_arrow(values, adds[name]))
            except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, TypeError, ValueError) as error:
                raise WinnowError(f"{self.place}: {name}: expected {adds[name]} values: {error}") from error

    def end_group(self, uids: pa.ChunkedArray, ok_rows: np.ndarray) -> None:
        places = np.zeros(len(uids), dtype=np.int64)
        places[ok_rows] = np.arange(len(ok_rows))
        failed = np.ones(len(uids), dtype=bool)
        failed[ok_rows] = False
        order = pa.array(places, mask=failed)
        arrays = [uids.combine_chunks()]
        for name, kind in self.entry.stage.adds.items():
            values = pa.concat_arrays(self.parts[name]) if self.parts[name] else pa.array([], type=ARROW_TYPES[kind])
            arrays.append(values.take(order) if len(values) else pa.nulls(len(uids), ARROW_TYPES[kind]))
            self.parts[name] = []
        self.file.write_table(pa.Table.from_arrays(arrays, schema=self.schema))


def _arrow(values: Sequence, kind: str) -> pa.Array:
    if kind != "float16[]":
        if isinstance(values, pa.ChunkedArray):
            values = values.combine_chunks()
        # Its own type first: pyarrow would cut 1.5 to an int32 without a word.
        array = values if isinstance(values, pa.Array) else pa.array(values)
        families = {"bool": pa.types.is_boolean, "string": pa.types.is_string, "binary": pa.types.is_binary}
        family = families.get(kind, pa.types.is_primitive)
        if not (family(array.type) or pa.types.is_null(array.type)):
            raise TypeError(f"found {array.type}")
        return array.cast(ARROW_TYPES[kind])
    if isinstance(values, np.ndarray) and values.ndim == 2:
        offsets = np.arange(len(values) + 1, dtype=np.int32) * values.shape[1]
        return pa.ListArray.from_arrays(offsets, pa.array(values.astype(np.float16).reshape(-1)))
    vectors = [None if vector is None else np.asarray(vector, dtype=np.float16) for vector in values]
    return pa.array(vectors, type=ARROW_TYPES[kind])


def _values(column: pa.ChunkedArray) -> list:
    """The column as a list; vectors stay numpy arrays."""
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    return [scalar.values.to_numpy() if scalar.is_valid else None for scalar in column]
