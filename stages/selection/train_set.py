"""Train sets: what a selection chose, written once as globally shuffled WebDataset tars.

Members of a sample, KEY being its place in the shuffled order in 9 digits or more:

    000000017.jpg   the image's bytes, untouched (gif, bmp and tiff become png: CLIP loaders know jpg, png and webp)
    000000017.txt   two red stars
    000000017.json  {"caption": "two red stars", "uid": "0c39..."}

Beside the tars: index.parquet (uid, tar, image_offset_bytes, image_size_bytes, caption; one row a sample, in order)
and wids.json, webdataset's index for random access, with each tar's sha256. A uid with multiplicity m is there m times.

Order: ascending by the 128 bits hash64(uid, seed, 11, copy), hash64(uid, seed, 12, copy) of stages/selection/uids.py,
copy counting a uid's repetitions from 0. So it is a pure function of the seed and the chosen uids.

Three steps, so that tars can be written anywhere in parallel: plan_train_set (the order, once), write_train_tar (one
per tar), finish_train_set. Each can be run again after its worker was lost. Cost: the plan reads the chosen rows'
captions and offsets once, spills them to local disk by their hash's leading bits and sorts RUN_ROWS at a time in
memory, with one file open at a time; a tar costs one range read a sample, a decode (so that none can fail in training)
and the memory of WINDOW images.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import images, pool, storage
from pipeline.core.errors import ImageError, WinnowError
from pipeline.core.tars import TarWriter
from stages.column_files import file_path
from stages.selection import uids as uid_pairs

VERSION = 1  # bump when any output changes for the same inputs
ORDER_STREAMS = 11, 12
PLAN_SUFFIX, PART_SUFFIX = ".plan.parquet", ".part.parquet"  # only while the train set is being written
RUN_ROWS = 1 << 21  # samples ordered in memory at once: some 400 MB
WINDOW = 256  # images held in memory while a tar is written
READ_THREADS = 8  # they mostly wait for the store
TRAINABLE = ("jpg", "png", "webp")
INDEX_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("tar", pa.string()),
        ("image_offset_bytes", pa.int64()),
        ("image_size_bytes", pa.int64()),
        ("caption", pa.string()),
    ]
)
POOL_COLUMNS = ("uid", "caption", "image_format", "image_offset_bytes", "image_size_bytes")
PLAN_SCHEMA = pa.schema(
    [("order_0", pa.uint64()), ("order_1", pa.uint64()), ("pool_tar", pa.string())]
    + [(name, pool.SCHEMA.field(name).type) for name in POOL_COLUMNS]
)


def write_train_set(
    pool_path: str, selection_path: str, out_path: str, seed: int, shard_size: int = 10_000
) -> dict[str, Any]:
    """Facts of the train set, written here and now: the three steps one after another. See finish_train_set."""
    plan = plan_train_set(pool_path, selection_path, out_path, seed, shard_size)
    for index in range(plan["num_tars"]):
        write_train_tar(pool_path, out_path, index, shard_size)
    return finish_train_set(out_path, plan["num_tars"])


def plan_train_set(pool_path: str, selection_path: str, out_path: str, seed: int, shard_size: int) -> dict[str, int]:
    """{num_samples, num_tars}; each tar's samples, in order, are in a plan file when this returns.

    Raises:
        WinnowError: nothing was selected, or the selection is of another pool.
    """
    shards = pool.load_shards(pool_path)
    num_samples = sum(int(_read_selection(selection_path, shard)[1].sum()) for shard in shards)
    if not num_samples:
        raise WinnowError(f"{selection_path}: no row was selected, expected at least one to train on")
    num_runs = 1 << max(0, (num_samples - 1) // RUN_ROWS).bit_length()
    num_tars = 0
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        names = [os.path.join(folder, str(run)) for run in range(num_runs)]
        held: list[pa.Table] = []
        num_held = 0
        for shard in shards:
            held.append(_chosen_rows(pool_path, shard, *_read_selection(selection_path, shard), seed))
            num_held += held[-1].num_rows
            if num_held >= RUN_ROWS:
                _spill(pa.concat_tables(held), names)
                held, num_held = [], 0
        _spill(pa.concat_tables([PLAN_SCHEMA.empty_table(), *held]), names)
        del held
        waiting = PLAN_SCHEMA.empty_table()
        for run, name in enumerate(names):  # each holds a range of hashes: sorted one by one, all are sorted
            rows = _read_spilled(name)
            rows = pa.concat_tables([waiting, rows.sort_by([("order_0", "ascending"), ("order_1", "ascending")])])
            stop = rows.num_rows if run == num_runs - 1 else rows.num_rows - rows.num_rows % shard_size
            for start in range(0, stop, shard_size):
                part = rows.slice(start, shard_size).drop_columns(["order_0", "order_1"]).combine_chunks()
                storage.write_bytes(storage.join(out_path, f"{num_tars:05d}{PLAN_SUFFIX}"), pool.table_bytes(part))
                num_tars += 1
            waiting = rows.slice(stop)
    return {"num_samples": num_samples, "num_tars": num_tars}


def write_train_tar(pool_path: str, out_path: str, index: int, shard_size: int) -> dict[str, Any]:
    """{samples, bytes} of one tar of a planned train set; the tar is there, whole, when this returns.

    A tar that is there already is kept.

    Raises:
        WinnowError: naming the uid of an image that does not decode.
    """
    name = f"{index:05d}.tar"
    tar_path, part_path = storage.join(out_path, name), storage.join(out_path, f"{index:05d}{PART_SUFFIX}")
    plan = pool.read_table(storage.join(out_path, f"{index:05d}{PLAN_SUFFIX}"))
    if storage.exists(tar_path) and storage.exists(part_path):
        return {"samples": plan.num_rows, "bytes": storage.size_bytes(tar_path)}
    offsets, sizes = [], []
    with storage.write_file(tar_path) as temporary, TarWriter(temporary) as tar:
        for place, (row, extension, image) in enumerate(_images(pool_path, plan)):
            key = f"{index * shard_size + place:09d}"
            offsets.append(tar.add(f"{key}.{extension}", image))
            sizes.append(len(image))
            tar.add(f"{key}.txt", row["caption"].encode())
            text = json.dumps({"uid": row["uid"], "caption": row["caption"]}, ensure_ascii=False, sort_keys=True)
            tar.add(f"{key}.json", text.encode())
    part = pa.table([plan["uid"], [name] * plan.num_rows, offsets, sizes, plan["caption"]], schema=INDEX_SCHEMA)
    storage.write_bytes(part_path, pool.table_bytes(part, {b"tar": json.dumps(tar.entry).encode()}))
    return {"samples": plan.num_rows, "bytes": tar.size_bytes}


def finish_train_set(out_path: str, num_tars: int) -> dict[str, Any]:
    """Facts of the whole: {num_samples, tar_bytes, known}; writes index.parquet and wids.json.

    `known` is {name: {bytes, sha256}} of the tars, for artifact.finish. What only the writing needed is removed last;
    run again after that, it gives the same facts.
    """
    wids_path = storage.join(out_path, "wids.json")
    parts = [storage.join(out_path, f"{number:05d}{PART_SUFFIX}") for number in range(num_tars)]
    there = set(storage.list_files(out_path))
    if "wids.json" in there and not there.issuperset(map(storage.name_of, parts)):  # it was written last: all else is
        shard_list = storage.read_json(wids_path)["shardlist"]
    else:
        shard_list = _write_index(out_path, parts)
        wids = {"__kind__": "wids-shard-index-v1", "wids_version": 1, "name": "train_set", "shardlist": shard_list}
        storage.write_json(wids_path, wids)
    with ThreadPoolExecutor(READ_THREADS) as deleters:
        leftovers = [name for name in there if name.endswith((PLAN_SUFFIX, PART_SUFFIX))]
        list(deleters.map(storage.delete, [storage.join(out_path, name) for name in leftovers]))
    return {
        "num_samples": sum(entry["nsamples"] for entry in shard_list),
        "tar_bytes": sum(entry["filesize"] for entry in shard_list),
        "known": {entry["url"]: {"bytes": entry["filesize"], "sha256": entry["sha256"]} for entry in shard_list},
    }


def _write_index(out_path: str, parts: list[str]) -> list[dict[str, Any]]:
    """The tars as wids.json lists them; index.parquet is there afterwards."""
    shard_list = []
    with (
        storage.write_file(storage.join(out_path, "index.parquet")) as temporary,
        pq.ParquetWriter(temporary, INDEX_SCHEMA, compression="zstd", version="2.6") as index,
    ):
        for path in parts:
            part = pool.read_table(path)
            tar = json.loads(part.schema.metadata[b"tar"])
            name = storage.name_of(path).removesuffix(PART_SUFFIX) + ".tar"
            entry = {"url": name, "nsamples": part.num_rows, "filesize": tar["bytes"], "sha256": tar["sha256"]}
            shard_list.append(entry)
            index.write_table(part.replace_schema_metadata(None))
    return shard_list


def _spill(rows: pa.Table, names: list[str]) -> None:
    """None; each row was appended to the file of its range of hashes."""
    run_bits = len(names).bit_length() - 1
    # numpy gives 0 for a shift of 64 only by luck of the processor
    run_of_row = rows["order_0"].to_numpy() >> np.uint64(64 - run_bits) if run_bits else np.zeros(len(rows), np.uint64)
    order = np.argsort(run_of_row, kind="stable")
    bounds = np.searchsorted(run_of_row[order], np.arange(len(names) + 1, dtype=np.uint64)).tolist()
    rows = rows.take(order)
    options = pa.ipc.IpcWriteOptions(compression="zstd")
    for name, start, stop in zip(names, bounds[:-1], bounds[1:], strict=True):
        if start < stop:
            with open(name, "ab") as file, pa.ipc.new_stream(file, PLAN_SCHEMA, options=options) as stream:
                stream.write_table(rows.slice(start, stop - start))


def _read_spilled(name: str) -> pa.Table:
    """What _spill appended to the file, stream after stream."""
    tables = [PLAN_SCHEMA.empty_table()]
    if os.path.exists(name):
        with pa.OSFile(name) as file:
            while file.tell() < file.size():
                tables.append(pa.ipc.open_stream(file).read_all())
    return pa.concat_tables(tables)


def _read_selection(selection_path: str, shard: pool.Shard) -> tuple[np.ndarray, np.ndarray]:
    place = file_path(selection_path, shard)
    table = pool.read_table(place)
    if (table.schema.metadata or {}).get(pool.SHARD_DIGEST) != shard.digest.encode():
        raise WinnowError(f"{place}: chosen from another pool, expected shard {shard.digest}")
    return table["row"].to_numpy(), table["multiplicity"].to_numpy()


def _chosen_rows(pool_path: str, shard: pool.Shard, rows: np.ndarray, multiplicity: np.ndarray, seed: int) -> pa.Table:
    """One pool shard's samples with their hashes, as PLAN_SCHEMA."""
    table = pool.read_rows(pool_path, shard.name, POOL_COLUMNS).take(rows)
    uids = np.repeat(uid_pairs.parse(table["uid"], f"{pool_path}/{shard.name}.parquet"), multiplicity, axis=0)
    first = np.repeat(np.cumsum(multiplicity) - multiplicity, multiplicity)
    copies = (np.arange(len(uids)) - first).astype(np.uint64)
    table = table.take(np.repeat(np.arange(len(rows)), multiplicity))
    hashes = [uid_pairs.hash64(uids, seed, stream, copies) for stream in ORDER_STREAMS]
    return pa.table([*hashes, [f"{shard.name}.tar"] * len(uids), *table.columns], schema=PLAN_SCHEMA)


def _images(pool_path: str, plan: pa.Table) -> Iterator[tuple[dict[str, Any], str, bytes]]:
    """(row of the plan, extension, image bytes) of each sample in order, read and decoded WINDOW at a time."""
    with ThreadPoolExecutor(READ_THREADS) as readers:
        for start in range(0, plan.num_rows, WINDOW):
            rows = plan.slice(start, WINDOW).to_pylist()
            for row, found in zip(rows, readers.map(_read_image, [pool_path] * len(rows), rows), strict=True):
                yield row, *found


def _read_image(pool_path: str, row: dict[str, Any]) -> tuple[str, bytes]:
    start = row["image_offset_bytes"]
    data = storage.read_range(storage.join(pool_path, row["pool_tar"]), start, start + row["image_size_bytes"])
    try:
        image = images.decode_rgb(data)
    except ImageError as error:
        raise WinnowError(
            f"{pool_path}/{row['pool_tar']}: uid {row['uid']}: {error}, expected an image that decodes"
        ) from error
    if row["image_format"] in TRAINABLE:
        return row["image_format"], data
    converted = io.BytesIO()
    image.save(converted, "PNG")
    return "png", converted.getvalue()
