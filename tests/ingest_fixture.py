"""Hand-made sources for tests of ingestion, and the whole way from a source to a pool."""

from __future__ import annotations

import io
import json
import pathlib
import tarfile
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core import pool
from stages.ingest import pool_shards, sources


def build(
    value: Any, out: str | pathlib.Path, shard_size: int = 1000, sample: float = 1.0, reverse: bool = False
) -> dict:
    """The facts of the pool that a source makes below `out`, with its shards' own under `shards`.

    Args:
        reverse: True runs the units and the shards in the opposite order.
    """
    step = -1 if reverse else 1
    parsed = sources.parse(value, "pool.source")
    units = sources.plan_units(parsed, shard_size)
    for number, unit in list(enumerate(units))[::step]:
        pool_shards.read_ids(unit, number, str(out))
    plan = pool_shards.plan_shards(units, shard_size, sample, sources.carried_columns(parsed), str(out))
    shards = [pool_shards.write_shard(shard, str(out)) for shard in plan.shards[::step]][::step]
    facts = pool_shards.pool_facts(plan.source_rows, plan.sampled_out_rows, shards)
    assert facts["source_rows"] == facts["rows"] + facts["sampled_out_rows"]
    assert facts["rows"] == facts["ok_rows"] + sum(facts["failed"].values())
    pool_shards.forget_ids(str(out))
    return {**facts, "shards": shards}


def rows(out: str | pathlib.Path) -> list[dict[str, Any]]:
    """All rows of the pool, in order."""
    found = []
    for path in sorted(pathlib.Path(out).glob("*.parquet")):
        found += pool.read_table(str(path)).to_pylist()
    return found


def files(out: str | pathlib.Path) -> dict[str, bytes]:
    """{name: bytes} of the pool's files."""
    return {path.name: path.read_bytes() for path in sorted(pathlib.Path(out).iterdir())}


def tar_bytes(members: Sequence[tuple[str, bytes | str | Mapping]]) -> bytes:
    """A tar of the members; text is encoded, mappings become JSON."""
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode="w") as archive:
        for name, content in members:
            if isinstance(content, Mapping):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return sink.getvalue()
