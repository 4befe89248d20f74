"""Several map stages over one pool shard: its images are read and decoded once for all of them.

Rows go through in groups of GROUP_ROWS, each a row group of every output file, so that bytes do not depend on batch
sizes. Within a group, the ok rows form blocks: at most the largest batch size, and at most BLOCK_PIXELS of decoded
image (or one image). Memory: two blocks of images (the next is decoded while one is in work) and one group of rows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import images, pool, storage
from pipeline.core.errors import ImageError, WinnowError
from pipeline.core.pool import Shard
from stages.base import Batch, Stage
from stages.column_files import ARROW_TYPES, Column, file_path, is_current, open_columns, row_groups

GROUP_ROWS = 4096
BLOCK_PIXELS = 128_000_000  # 384 MB as RGB


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


def score_shard(pool_path: str, shard: Shard, stages: Sequence[LoadedStage], threads: int = 1) -> dict[str, Any]:
    """Facts of the pass; each stage's file of this shard is there, whole, when this returns.

    Files that are there already and belong to the shard as it is now are kept.

    Args:
        threads: threads that decode images, beside the caller's.

    Returns:
        {rows, ok_rows, image_bytes, seconds: {out_path: seconds in process()}} of what was computed now.

    Raises:
        WinnowError: an image that decoded when the pool was made does not now, or a stage breaks its contract.
    """
    pending = [entry for entry in stages if not is_current(entry.out_path, shard)]
    facts: dict[str, Any] = {"rows": shard.rows, "ok_rows": 0, "image_bytes": 0, "seconds": {}}
    if not pending:
        return facts
    facts["seconds"] = {entry.out_path: 0.0 for entry in pending}
    with contextlib.ExitStack() as stack:
        decoder = stack.enter_context(ThreadPoolExecutor(threads))
        writers = [_Writer(stack, entry, shard) for entry in pending]
        for group in _groups(stack, pool_path, shard, pending):
            ok_rows = np.flatnonzero(group.rows["ok"].to_numpy())
            facts["ok_rows"] += len(ok_rows)
            for block in _ahead(_blocks(pool_path, shard, group, ok_rows, pending, decoder)):
                facts["image_bytes"] += sum(map(len, block.image_bytes or ()))
                for entry, writer, extra in zip(pending, writers, group.columns, strict=True):
                    started = time.perf_counter()
                    writer.process(block, extra)
                    facts["seconds"][entry.out_path] += time.perf_counter() - started
            for writer in writers:
                writer.end_group(group.rows["uid"], ok_rows)
    return facts


@dataclass(frozen=True)
class _Group:
    """GROUP_ROWS rows of the pool, and for each stage the table of the columns that it needs (or None)."""

    rows: pa.Table
    columns: list[pa.Table | None]


@dataclass
class _Block:
    """Some ok rows of a group, their image bytes, and their images once decoded."""

    rows: np.ndarray
    columns: dict[str, list]
    image_bytes: list[bytes] | None
    decoding: list[Future] | None
    shard_place: str

    def images(self) -> list | None:
        if self.decoding is None:
            return None
        decoded = []
        for uid, future in zip(self.columns["uid"], self.decoding, strict=True):
            try:
                decoded.append(future.result())
            except ImageError as error:
                raise WinnowError(
                    f"{self.shard_place}: uid {uid}: {error}, expected an image that decodes as it did before"
                ) from error
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
        for name in entry.stage.needs:
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
    for table in row_groups(rows, names, GROUP_ROWS):
        extra = [next(reader) for reader in readers]
        columns = [pa.table({name: extra[index][0] for name, index in source.items()}) for source in sources]
        yield _Group(table, [needed if needed.num_columns else None for needed in columns])


def _blocks(
    pool_path: str,
    shard: Shard,
    group: _Group,
    ok_rows: np.ndarray,
    stages: Sequence[LoadedStage],
    decoder: ThreadPoolExecutor,
) -> Iterator[_Block]:
    reads = {entry.stage.reads for entry in stages}
    max_rows = max(entry.rows_per_call for entry in stages)
    table = group.rows.take(ok_rows)
    pixels = table["width_px"].to_numpy().astype(np.int64) * table["height_px"].to_numpy()
    start = 0
    while start < len(ok_rows):
        stop = min(start + max_rows, len(ok_rows))
        if "pixels" in reads:
            stop = start + max(1, int(np.searchsorted(np.cumsum(pixels[start:stop]), BLOCK_PIXELS, side="right")))
        part = table.slice(start, stop - start)
        data = list(pool.read_images(pool_path, shard.name, part)) if reads & {"bytes", "pixels"} else None
        decoding = [decoder.submit(images.decode_rgb, image) for image in data] if "pixels" in reads else None
        columns = {name: part[name].to_pylist() for name in part.column_names}
        yield _Block(ok_rows[start:stop], columns, data, decoding, f"{pool_path}/{shard.name}.tar")
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
        self.schema = pa.schema(fields, metadata={pool.SHARD_DIGEST: shard.digest})
        temporary = stack.enter_context(storage.write_file(file_path(entry.out_path, shard)))
        self.file = stack.enter_context(pq.ParquetWriter(temporary, self.schema, compression="zstd", version="2.6"))
        self.parts: dict[str, list[pa.Array]] = {name: [] for name in entry.stage.adds}

    def process(self, block: _Block, extra: pa.Table | None) -> None:
        columns = dict(block.columns)
        if extra is not None:
            picked = extra.take(block.rows)
            columns |= {name: _values(picked[name]) for name in picked.column_names}
        reads = self.entry.stage.reads
        decoded = block.images() if reads == "pixels" else None
        data = block.image_bytes if reads in ("bytes", "pixels") else None
        for start in range(0, len(block.rows), self.entry.rows_per_call):
            cut = slice(start, start + self.entry.rows_per_call)
            batch = Batch(
                {name: values[cut] for name, values in columns.items()},
                None if data is None else data[cut],
                None if decoded is None else decoded[cut],
            )
            self._keep(self.entry.stage.process(batch, self.entry.state), len(batch))

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
        array = pa.array(values)  # its own type first: pyarrow would cut 1.5 to an int32 without a word
        family = {"bool": pa.types.is_boolean, "string": pa.types.is_string}.get(kind, pa.types.is_primitive)
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
