"""Nothing secret is in what a run writes or prints: planted in the environment, the command line, the config and URLs."""

from __future__ import annotations

import json
import pathlib
import sys
import tarfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from pipeline import execute, runs
from pipeline import plan as planning
from pipeline.core import config, log, patience, storage
from pipeline.core.errors import WinnowError, one_line, without_secrets
from tests.conftest import TINY
from tests.download_fixture import FAST, uid_of
from tests.engine_fixture import EngineHere
from tests.image_server import ImageServer
from tests.pool_fixture import drawing
from tests.s3_faults import Fault, FaultyStore

IMAGES = [drawing(number, 40, 30, "JPEG") for number in range(12)]
# Every planted secret has this in it, and nothing else does.
MARK = "hunter2"
ENVIRONMENT = (
    "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "WANDB_API_KEY", "RAY_AUTH_TOKEN", "GITHUB_TOKEN",
    "AZURE_STORAGE_CONNECTION_STRING", "WINNOW_ANYTHING",
)  # fmt: skip
STORE = f"memory://user:{MARK}pw@store"
SIGNATURES = (
    f"X-Amz-Signature={MARK}sig&X-Amz-Credential={MARK}id", f"sv=2020&sig={MARK}azure", f"token={MARK}token",
    f"w=64&access_token={MARK}", f"X-Goog-Signature={MARK}goog", f"Signature={MARK}&Key-Pair-Id={MARK}",
)  # fmt: skip


class Closing(EngineHere):
    def __init__(self, *_):
        super().__init__()

    def close(self):
        return None

    def running(self, step, is_running):
        return None

    def count(self, step, unit, units, samples, failed):
        return None


@pytest.fixture(autouse=True)
def logs_as_a_run(monkeypatch, capfd):
    """The `winnow` logger as the command line sets it up, on the stderr of this test only."""
    monkeypatch.setattr(log.logger, "handlers", [])
    monkeypatch.setattr(log.logger, "propagate", True)
    level = log.logger.level
    log.setup()
    yield
    log.logger.setLevel(level)


@pytest.fixture(scope="module")
def server():
    with ImageServer(IMAGES) as running:
        yield running


def planted_table(server: ImageServer) -> pa.Table:
    """URLs of images with signatures, and of failures that name theirs."""
    signed = [server.url(f"/img/{number}.jpg?{SIGNATURES[number % len(SIGNATURES)]}") for number in range(len(IMAGES))]
    failing = [
        server.url(f"/fault/status_404.jpg?{SIGNATURES[0]}"),
        server.url(f"/fault/redirect_loop.jpg?{SIGNATURES[1]}"),
        server.url(f"/img/1.jpg?{SIGNATURES[2]}").replace("http://", f"http://user:{MARK}@"),
        f"http://127.0.0.1:1/a.jpg?{SIGNATURES[3]}",
        f"ftp://user:{MARK}@a.example/b.jpg?{SIGNATURES[4]}",
        f"http://a b/?{SIGNATURES[5]}",
    ]
    urls = signed + failing
    return pa.table(
        {"uid": list(map(uid_of, range(len(urls)))), "url": urls, "text": ["a picture of shapes"] * len(urls)}
    )


def test_a_run_writes_and_prints_no_secret(tmp_path, server, monkeypatch, capfd):
    for name in ENVIRONMENT:
        monkeypatch.setenv(name, f"{MARK}{name}")
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--token", f"{MARK}argument"])
    monkeypatch.setattr(execute, "Engine", Closing)
    with fsspec.open(f"{STORE}/tables/0.parquet", "wb") as file:
        pq.write_table(planted_table(server), file)
    with fsspec.open(f"{STORE}/takedowns.txt", "w") as file:
        file.write(uid_of(0))
    tiny = yaml.safe_load(TINY.read_text())["recipes"]["tiny"] | {"samples_seen": 64, "lr": 1e-3}
    values = {
        "root": str(tmp_path / "root"),
        "pool": {"source": f"{STORE}/tables", "shard_size": 100, "download": {**FAST, "retries": 0}},
        "exclude": {"uids": f"{STORE}/takedowns.txt"},
        "recipes": {"tiny": tiny},
        "stages": ["image_stats", "caption_stats"],
        "strategies": {"no_filter": {}, "small": {"where": ["min_side_px >= 30"]}},
        "compare": ["no_filter", "small"],
        "train": {"recipe": "tiny"},
        "eval": {"root": "demo", "tasks": ["colours"]},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    loaded = config.load(
        str(path), [f"published_note=see https://user:{MARK}@a.example/b?token={MARK}", "published.small=1"]
    )
    plan = planning.build(loaded, str(path))
    assert MARK in plan.config.pool.source
    assert execute.run(plan, str(path), list(plan.steps), runs.run_record) == 0

    printed = capfd.readouterr()
    assert "no_filter" in printed.out
    assert MARK not in printed.out + printed.err
    read = 0
    for file in sorted((tmp_path / "root").rglob("*")):
        if file.is_file():
            read += 1
            assert MARK not in str(file)
            assert MARK.encode() not in without_source_urls(file), file
    assert read > 30
    logs = (next((tmp_path / "root").glob("runs/*/log.jsonl"))).read_text()
    assert '"url"' not in logs and all(json.loads(line) for line in logs.splitlines())


def test_a_run_on_an_object_store_writes_and_prints_no_credentials(tmp_path, s3_endpoint, s3_url, monkeypatch, capfd):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"):
        monkeypatch.setenv(name, f"{MARK}{name}")
    monkeypatch.setattr(execute, "Engine", Closing)
    values = {
        "root": f"{s3_url}/root",
        "pool": {"source": {"layout": "demo", "pairs": 40}, "shard_size": 40},
        "stages": ["image_stats"],
        "strategies": {"no_filter": {}},
        "compare": ["no_filter"],
        "recipes": {"tiny": yaml.safe_load(TINY.read_text())["recipes"]["tiny"]},
        "train": {"recipe": "tiny"},
        "eval": {"root": "demo", "tasks": ["colours"]},
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(values))
    with FaultyStore(s3_endpoint) as store:
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        store.add(Fault("slow_down_503", "put", "*/_artifact.json", times=1))
        plan = planning.build(config.load(str(path), []), str(path), until=planning.STAGES)
        assert execute.run(plan, str(path), planning.targets(plan, planning.STAGES), runs.stages_record) == 0
        written = storage.list_files(s3_url, recursive=True)
        assert len(written) > 8
        for name in written:
            assert MARK not in name and MARK.encode() not in storage.read_bytes(f"{s3_url}/{name}"), name
        store.add(Fault("wrong_signature_403", times=None))
        with pytest.raises(WinnowError, match="AWS_SECRET_ACCESS_KEY") as caught:
            planning.build(config.load(str(path), [f"exclude.uids={s3_url}/a?X-Amz-Signature={MARK}"]), str(path))
        assert MARK not in str(caught.value)
    printed = capfd.readouterr()
    assert "can't be written yet" in printed.err and "image_stats" in printed.err
    assert MARK not in printed.out + printed.err


def without_source_urls(path: pathlib.Path) -> bytes:
    """The file's content without a pool's column `url`, which stays as the table has it, in its parquet and its tar."""
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        kept = [name for name in table.column_names if name != "url"]
        return repr((table.select(kept).to_pylist(), table.schema.metadata)).encode()
    if path.suffix == ".tar":
        parts = []
        with tarfile.open(path) as archive:
            for member in archive:
                data = archive.extractfile(member).read()
                if member.name.endswith(".json"):
                    data = json.dumps({key: value for key, value in json.loads(data).items() if key != "url"}).encode()
                parts.append(member.name.encode() + data)
        return b"".join(parts)
    return path.read_bytes()


@pytest.mark.parametrize(
    "text, shown",
    [
        (f"no https://user:{MARK}@host/a/b.tar?X-Amz-Signature={MARK}&x=1 here", "no https://host/a/b.tar here"),
        (f"s3://key:{MARK}@bucket/a", "s3://bucket/a"),
        (f"'https://host/a?sig={MARK}' is", "'https://host/a' is"),
        (f"https://user:p@{MARK}@host/a", "https://host/a"),
        (f"filecache::HTTPS://user:{MARK}@host/a#t={MARK}", "filecache::HTTPS://host/a"),
        ("s3://bucket/part-0000?.tar", "s3://bucket/part-0000?.tar"),
        ("mail a@b.c, 3 > 2?", "mail a@b.c, 3 > 2?"),
    ],
)
def test_what_is_left_of_a_url(text, shown):
    assert without_secrets(text) == shown
    assert one_line(WinnowError(text)) == shown


def test_a_failure_is_logged_without_its_secrets(tmp_path, capfd):
    progress = log.Progress(str(tmp_path / "log.jsonl"))
    trace = f'File "a"\nOSError: "https://user:{MARK}@host/a?token={MARK}" \udcff'
    progress.event("traceback", step="a/00001", text=trace, causes={"a": [trace]})
    progress.say(trace)
    progress.start("a", 1)
    progress.end("a", f"FAILED: {trace}")
    progress.close()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert lines[0]["text"] == 'File "a"\nOSError: "https://host/a" ?'
    printed = capfd.readouterr()
    assert MARK not in (tmp_path / "log.jsonl").read_text() + printed.out + printed.err
    assert "https://host/a" in printed.err
