"""A run from a table of URLs to train sets, as a user gives it: chosen before the download, killed, fetched again."""

from __future__ import annotations

import collections
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import plan as planning
from pipeline.core.config import load
from tests import engine_fixture
from tests.download_faults import FAULTS
from tests.download_fixture import FAST, uid_of, write_table
from tests.image_server import ImageServer
from tests.pool_fixture import drawing

pytestmark = pytest.mark.ray

ROOT = pathlib.Path(__file__).resolve().parent.parent
IMAGES = [drawing(number, 40 + number, 48, "JPEG") for number in range(60)]
# Faults that answer at once and the same way every time.
QUICK = [
    "status_404",
    "status_410",
    "status_403",
    "status_451",
    "status_204",
    "html_page",
    "html_as_jpeg",
    "svg_as_png",
    "empty_body",
    "noise_as_jpeg",
    "half_jpeg_without_length",
    "redirect_loop",
    "redirect_to_file",
    "redirect_to_loopback",
    "robots_noai",
    "png_bomb",
    "gif_5000_frames",
    "false_gzip",
    "invalid_status_line",
    "negative_length",
    "header_flood",
    "huge_declared_body",
    "url_ftp",
]


@pytest.fixture(scope="module")
def server():
    with ImageServer(IMAGES) as running:
        yield running


def config(folder: pathlib.Path, table: str, **changes) -> pathlib.Path:
    """The path of a config that trains nothing: its targets are named with --until."""
    values = {
        "root": str(folder / "root"),
        "pool": {"source": {"path": table}, "shard_size": 50, "download": {**FAST, "image": {"size_px": 64}}},
        "stages": ["image_stats", "caption_stats"],
        "strategies": {"big": {"where": ["min_side_px > 20"]}, "long": {"where": ["caption_words > 2"]}},
        "compare": ["big"],
        "train": {"recipe": "demo"},
        "eval": {"root": "demo", "tasks": ["colours"]},
    }
    values["pool"] |= changes.pop("pool", {})
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(values | changes))
    return path


def command(path: pathlib.Path, *more: str) -> list[str]:
    return [sys.executable, str(ROOT / "pipeline" / "run.py"), "--config", str(path), *more]


def run(path: pathlib.Path, *more: str, code: int = 0) -> str:
    done = subprocess.run(command(path, *more), capture_output=True, text=True, timeout=1200)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def here(path: pathlib.Path, until: str, *overrides: str) -> None:
    """The same run in this process, without Ray."""
    plan = planning.build(load(str(path), overrides), str(path))
    assert not engine_fixture.run_here(plan, planning.targets(plan, until)).failures


def pool_of(root: pathlib.Path) -> tuple[pathlib.Path, dict]:
    """The finished pool's folder and record."""
    (path,) = root.glob("pool-*/_artifact.json")
    return path.parent, json.loads(path.read_text())


def digests(root: pathlib.Path) -> dict[str, dict[str, str]]:
    """{artifact: {file: sha256}} without facts."""
    found = {}
    for path in root.glob("*/_artifact.json"):
        files = json.loads(path.read_text())["files"]
        found[path.parent.name] = {name: entry["sha256"] for name, entry in files.items() if not entry.get("fact")}
    return found


def test_chosen_before_the_download_excluded_and_fetched_again(server, tmp_path):
    urls = [server.url(f"/img/{number % 60}.jpg?{number}", server.hosts[number % 7]) for number in range(150)]
    urls[60] = server.url("/fault/rate_limit_heals.jpg?run")
    table = write_table(tmp_path / "t.parquet", urls)
    rows = pq.read_table(table)
    captions = [f"a red star number {number}" if number % 3 else "star" for number in range(150)]
    captions[60] = "the one that heals"
    pq.write_table(rows.set_column(2, "text", pa.array(captions)), table)
    # At first its server is too busy, and there are no retries.
    settings = {**FAST, "image": {"size_px": 64}, "retries": 0}
    path = config(tmp_path, table, pool={"only": "long", "download": settings}, exclude={"domains": ["127.0.0.8"]})
    printed = run(path, "--until", "train_set")
    out, record = pool_of(tmp_path / "root")
    facts = record["facts"]
    excluded = {number for number in range(150) if number % 7 == 6}
    excluded.discard(60)
    assert facts["rows"] == 150 == facts["ok_rows"] + sum(facts["failed"].values())
    assert facts["failed"]["excluded"] == len(excluded)
    assert facts["failed"]["not_chosen"] == 50 - len([number for number in excluded if number % 3 == 0]) - 1
    assert facts["failed"]["rate_limited"] == 1
    assert facts["failures_by_host"] == [{"host": "127.0.0.2", "failed": 1, "reasons": {"rate_limited": 1}}]
    assert re.search(r"pool  127\.0\.0\.2: 1 failed \(1 rate_limited\)", printed)
    asked = [path for path in server.requests() if path.startswith("/img/")]
    assert len(asked) == facts["ok_rows"]
    before = digests(tmp_path / "root")
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "root").glob("image_stats-*/*.parquet")}
    assert "retry: 1 failed rows" in run(path, "--set", "pool.download.retry=failed", "--plan")
    here(path, "train_set", "pool.download.retry=failed")
    out, record = pool_of(tmp_path / "root")
    assert record["facts"]["ok_rows"] == facts["ok_rows"] + 1
    after = digests(tmp_path / "root")
    changed = {name for name in after[out.name] if after[out.name][name] != before[out.name][name]}
    assert changed == {"00001.tar", "00001.parquet"}
    # Later stages recomputed that shard alone; the train set has the row.
    touched = {file.name for file, stamp in files.items() if file.stat().st_mtime_ns != stamp}
    assert touched == {"00001.parquet"}
    indices = [
        pq.read_table(file, columns=["uid"])["uid"].to_pylist() for file in out.parent.glob("train_set-*/index.parquet")
    ]
    assert sorted(uid_of(60) in uids for uids in indices) == [False, True]

    # A takedown leaves every later artifact, and nothing is downloaded again.
    requests = server.requests()
    (tmp_path / "takedowns.txt").write_text(uid_of(61))
    here(path, "train_set", f"exclude.uids={tmp_path}/takedowns.txt")
    assert server.requests() == requests
    indices = [
        pq.read_table(file, columns=["uid"])["uid"].to_pylist() for file in out.parent.glob("train_set-*/index.parquet")
    ]
    assert sorted(uid_of(61) in uids for uids in indices) == [False, True, True]


@pytest.mark.parametrize("num_urls, kills", [(1_200, 1), pytest.param(50_000, 3, marks=pytest.mark.slow)])
def test_kills_change_no_byte(server, tmp_path, num_urls, kills):
    """20 % faults, SIGKILL of the driver and its Ray; the pool equals that of an uninterrupted run."""
    urls = []
    for number in range(num_urls):
        host = server.hosts[number % 7]
        if number % 5 == 4:
            fault = FAULTS[QUICK[number // 5 % len(QUICK)]]
            url = (fault.url or "").format(name=fault.name, host=host, **server.names)
        else:
            url = server.url(f"/img/{number % 60}.jpg?{number}", host)
        urls.append(url)
    table = write_table(tmp_path / "t.parquet", urls)
    pool = {"shard_size": num_urls // 24, "download": {**FAST, "image": {"size_px": 64}, "retries": 0}}
    pool["download"] |= {"per_host_concurrency": 4, "concurrency": 16}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    straight.mkdir()
    killed.mkdir()
    here(config(straight, table, pool=pool), "pool")
    path = config(killed, table, pool=pool)
    for kill in range(kills):
        process = subprocess.Popen(
            command(path, "--until", "pool"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            deadline_s = time.monotonic() + 300
            before = len(list(killed.glob("root/pool-*/*.parquet")))
            while len(list(killed.glob("root/pool-*/*.parquet"))) < before + 2 + kill:
                assert process.poll() is None, "the run ended before it was killed"
                assert time.monotonic() < deadline_s
                time.sleep(0.005)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    kept = {file: file.stat().st_mtime_ns for file in killed.glob("root/pool-*/*.parquet")}
    assert kept
    run(path, "--until", "pool")
    assert digests(killed / "root") == digests(straight / "root")
    assert all(file.stat().st_mtime_ns == stamp for file, stamp in kept.items())
    out, record = pool_of(killed / "root")
    assert not [file for file in out.iterdir() if ".tmp-" in file.name or file.name.endswith(".next")]
    facts = record["facts"]
    counts: collections.Counter[str] = collections.Counter()
    for number, file in enumerate(sorted(out.glob("*.parquet"))):
        rows = pq.read_table(file, columns=["uid", "ok", "error", "url"]).to_pylist()
        start = number * (num_urls // 24)
        assert [row["uid"] for row in rows] == [uid_of(start + index) for index in range(len(rows))]
        counts.update(row["error"] or "ok" for row in rows)
    assert sum(counts.values()) == num_urls == facts["rows"]
    assert counts.pop("ok") == facts["ok_rows"] == num_urls * 4 // 5
    assert dict(counts) == facts["failed"]


def test_a_network_that_is_gone_ends_the_run_early_with_its_cause(tmp_path):
    urls = [f"http://127.0.0.{2 + number % 7}:9/{number}.jpg" for number in range(2_000)]  # nothing listens there
    settings = {**FAST, "retries": 0}
    path = config(tmp_path, write_table(tmp_path / "t.parquet", urls), pool={"shard_size": 500, "download": settings})
    plan = planning.build(load(str(path), []), str(path))
    failures = engine_fixture.run_here(plan, ["pool"]).failures
    assert re.search(r"^download stopped: .* none was answered: \d+ connect_failed", failures["pool"])
    assert not list(tmp_path.glob("root/pool-*/*.parquet"))
