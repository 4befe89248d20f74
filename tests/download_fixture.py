"""Downloads without Ray: a table of URLs to a finished `urls` artifact, and its shards through a worker."""

from __future__ import annotations

import hashlib
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import artifact, pool
from stages.ingest import pool_shards, sources
from stages.ingest.download import DownloadJob, DownloadWorker
from stages.ingest.fetch.settings import DownloadSettings

# One server on loopback stands for the whole web: what protects a single real host is lifted.
FAST = {
    "per_host_concurrency": 64,
    "per_host_requests_per_s": 100_000.0,
    "allow_addresses": ["127.0.0.2/31", "127.0.0.4/30", "127.0.0.8/32"],  # the secret server is at 127.0.0.1
}


def uid_of(number: int) -> str:
    """32 hex digits."""
    return hashlib.md5(str(number).encode()).hexdigest()


def write_table(path: str | pathlib.Path, urls: Sequence[str | None], **columns: Sequence[Any]) -> str:
    """The path of a parquet file of uid, url, text and further columns."""
    table = {"uid": [uid_of(number) for number in range(len(urls))], "url": pa.array(urls, pa.string())}
    table["text"] = [f"caption {number}" for number in range(len(urls))]
    pq.write_table(pa.table(table | columns), path)
    return str(path)


def write_urls(root: str | pathlib.Path, source: Any, shard_size: int = 1000) -> artifact.Artifact:
    """The finished artifact of a table's rows."""
    made = artifact.Artifact(str(root), "urls", {"shard_size": shard_size})
    parsed = sources.parse(source, "pool.source")
    units = sources.plan_units(parsed, shard_size)
    for number, unit in enumerate(units):
        pool_shards.read_ids(unit, number, made.path)
    columns = sources.carried_columns(parsed)
    plan = pool_shards.plan_shards(units, shard_size, 1.0, columns, made.path)
    done = [pool_shards.write_shard(shard, made.path) for shard in plan.shards]
    pool_shards.forget_ids(made.path)
    notes = {f"{shard.name}.parquet": {"rows": facts["rows"]} for shard, facts in zip(plan.shards, done, strict=True)}
    artifact.finish(made, {"columns": columns}, file_notes=notes)
    return made


def download(
    urls: artifact.Artifact,
    out: str | pathlib.Path,
    settings: Mapping[str, Any],
    threads: int = 2,
    lifted: bool = True,
    **more: Any,
) -> list[dict[str, Any]]:
    """The facts of each shard of the pool below `out`; with `lifted` the settings are those of FAST and these."""
    record = urls.record()
    checked = DownloadSettings.model_validate({**(FAST if lifted else {}), **settings})
    worker = DownloadWorker(DownloadJob(urls.path, str(out), checked, record["facts"]["columns"], 1, **more), threads)
    try:
        return [worker.process(shard) for shard in pool.shards(record)]
    finally:
        worker.close()


def rows(out: str | pathlib.Path) -> list[dict[str, Any]]:
    """All rows of the pool, in order."""
    return [row for path in sorted(pathlib.Path(out).glob("*.parquet")) for row in pq.read_table(path).to_pylist()]


def files(out: str | pathlib.Path) -> dict[str, str]:
    """{name: sha256} of the pool's files but those that hold times."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(pathlib.Path(out).iterdir())
        if not path.name.endswith("_stats.json")
    }
