"""Writes one shard of a pool: the tar of its usable pairs, and the parquet of all its rows.

The tar is published first and the parquet names its sha256, so a shard is there when its parquet is, and a replaced
shard can be finished or forgotten after a kill at any point: see `recover`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import pool, storage, tars

TAR_SHA256, TAR_BYTES = b"tar_sha256", b"tar_bytes"  # keys in the metadata of a shard's parquet
NEXT = "parquet.next"  # a parquet that waits for its tar to be replaced
# json of a pair in a tar: our column -> img2dataset's name.
IMG2DATASET_NAMES = {
    "uid": "uid",
    "caption": "caption",
    "key": "key",
    "sha256": "sha256",
    "width_px": "width",
    "height_px": "height",
    "original_width_px": "original_width",
    "original_height_px": "original_height",
    "url": "url",
}


class ShardWriter:
    """Takes a shard's rows in order and publishes both files when the block ends without an error.

    Args:
        further: columns beyond pool.SCHEMA. Those that JSON can hold are written to the pairs' json as well.
    """

    def __init__(self, out_path: str, name: str, further: Mapping[str, pa.DataType], has_tar: bool = True):
        self.out_path = out_path
        self.name = name
        self.schema = pa.schema([*pool.SCHEMA, *further.items()])
        self._in_json = [name for name, kind in further.items() if not pa.types.is_list(kind)]
        self._columns: dict[str, list] = {column: [] for column in self.schema.names}
        self._tables: list[pa.Table] = []  # of the rows before those in _columns
        self._has_tar = has_tar
        self.facts: dict[str, Any] = {}

    def __enter__(self) -> ShardWriter:
        if self._has_tar:
            self._file = storage.write_file(storage.join(self.out_path, f"{self.name}.tar"))
            self._archive = tars.TarWriter(self._file.__enter__())
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._has_tar:
            self._archive.__exit__(kind, error, trace)
        if kind is not None:
            if self._has_tar:
                self._file.__exit__(kind, error, trace)
            return
        metadata, known = {}, {}
        if self._has_tar:
            entry = self._archive.entry
            metadata = {TAR_SHA256: entry["sha256"].encode(), TAR_BYTES: str(entry["bytes"]).encode()}
            known[f"{self.name}.tar"] = entry
        self._end_table()
        table = pa.concat_tables(self._tables).combine_chunks()  # in one piece, so that its bytes tell of its rows only
        data = pool.table_bytes(table, metadata)
        parquet_path = storage.join(self.out_path, f"{self.name}.parquet")
        replaces = self._has_tar and storage.exists(parquet_path)
        if replaces:
            storage.write_bytes(storage.join(self.out_path, f"{self.name}.{NEXT}"), data)
        if self._has_tar:
            self._file.__exit__(None, None, None)
        storage.write_bytes(parquet_path, data)
        if replaces:
            storage.delete(storage.join(self.out_path, f"{self.name}.{NEXT}"))
        known[f"{self.name}.parquet"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        self.facts = _facts(table, known)

    def add(self, row: Mapping[str, Any], image: bytes | None, details: Mapping[str, Any] | None = None) -> None:
        """None; the shard's next row. A row that is ok comes with its image; the others are in the parquet alone.

        Args:
            row: columns by name; those left out are null.
            details: further entries of the pair's json.
        """
        values = dict(row)
        if row["ok"] and self._has_tar:
            assert image is not None and row["caption"] is not None  # else the row has failed
            key = row["key"]
            values["image_offset_bytes"] = self._archive.add(f"{key}.{row['image_format']}", image)
            values["image_size_bytes"] = len(image)
            self._archive.add(f"{key}.txt", row["caption"].encode())
            self._archive.add(f"{key}.json", self._json(row, details or {}))
        for name, column in self._columns.items():
            column.append(values.get(name))

    def add_table(self, columns: Mapping[str, pa.Array], num_rows: int) -> None:
        """None; the shard's next rows, of a shard without a tar. Columns that are left out are null."""
        assert not self._has_tar
        self._end_table()
        full = [
            columns[field.name].cast(field.type) if field.name in columns else pa.nulls(num_rows, field.type)
            for field in self.schema
        ]
        self._tables.append(pa.table(full, schema=self.schema))

    def _end_table(self) -> None:
        self._tables.append(pa.table(self._columns, schema=self.schema))
        self._columns = {column: [] for column in self.schema.names}

    def _json(self, row: Mapping[str, Any], details: Mapping[str, Any]) -> bytes:
        values = {theirs: row.get(ours) for ours, theirs in IMG2DATASET_NAMES.items()}
        for column in self._in_json:
            value = row.get(column)
            values[column] = None if isinstance(value, float) and not math.isfinite(value) else value
        return json.dumps({**values, **details}, ensure_ascii=False, allow_nan=False).encode()


def finished(out_path: str, name: str) -> dict[str, Any] | None:
    """Facts of the shard as ShardWriter gives them, or None when it is not there; a half-replaced one is mended."""
    _recover(out_path, name)
    try:
        with storage.open_read(storage.join(out_path, f"{name}.parquet")) as file:
            table = pq.read_table(file, columns=["ok", "error"])
    except FileNotFoundError:
        return None
    metadata = table.schema.metadata or {}
    known = {}
    if TAR_SHA256 in metadata:
        known[f"{name}.tar"] = {"bytes": int(metadata[TAR_BYTES]), "sha256": metadata[TAR_SHA256].decode()}
    return _facts(table, known)


def _recover(out_path: str, name: str) -> None:
    """None; after a kill in the middle of a replacement, both files are the old ones or both are the new ones."""
    waiting = storage.join(out_path, f"{name}.{NEXT}")
    if not storage.exists(waiting):
        return
    with storage.open_read(waiting) as file:
        expected = (pq.read_schema(file).metadata or {}).get(TAR_SHA256, b"").decode()
    if storage.sha256_file(storage.join(out_path, f"{name}.tar")) == expected:
        storage.write_bytes(storage.join(out_path, f"{name}.parquet"), storage.read_bytes(waiting))
    storage.delete(waiting)


def _facts(table: pa.Table, known: Mapping[str, Any]) -> dict[str, Any]:
    """{rows, ok_rows, failed: {reason: rows}, known: {file: {bytes, sha256}}}."""
    failed = Counter(table["error"].drop_null().to_pylist())
    ok_rows = sum(table["ok"].to_pylist())
    return {"rows": len(table), "ok_rows": ok_rows, "failed": dict(sorted(failed.items())), "known": dict(known)}
