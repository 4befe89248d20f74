"""What object stores do on bad days, done to winnow by a proxy before a real S3 server (tests/s3_faults.py).

Run: pytest tests/test_store_faults.py -n0
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import logging
import pickle
import random
import signal
import subprocess
import sys
import tarfile
import time

import boto3
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import run
from pipeline.core import patience, storage
from pipeline.core.errors import StoreError, WinnowError
from tests.conftest import ROOT, TINY
from tests.s3_faults import Fault, FaultyStore
from tests.servers import free_port

BUCKET = "faults"
URL = f"s3://{BUCKET}"
DATA = random.Random(0).randbytes(300_000)
SECRET = "hunter2secret"
PART_BYTES = 5 << 20  # the least that S3 takes
LARGE = random.Random(1).randbytes(2 * PART_BYTES + 1000)
ANSWERED = (
    "slow_down_503", "internal_500", "bad_gateway_502", "unavailable_503", "gateway_timeout_504", "too_many_429",
    "request_timeout_400", "skewed_403",
)  # fmt: skip
LOST = ("reset", "close", "answer_lost", "hang")
SPOILT = ("body_cut", "body_reset", "body_stalls")


@pytest.fixture(scope="module")
def server(s3_endpoint):
    """A client of the S3 server itself, past the proxy, and the proxy; the bucket has files."""
    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    with pytest.MonkeyPatch.context() as patch, FaultyStore(s3_endpoint) as proxy:
        for key, value in settings.items():
            patch.setenv(key, value)
        client = boto3.client("s3", endpoint_url=s3_endpoint)
        client.create_bucket(Bucket=BUCKET)
        patch.setenv("AWS_ENDPOINT_URL", proxy.url)
        patch.setenv("AWS_MAX_ATTEMPTS", "1")  # botocore's own tries, which wait for seconds, are tested by themselves
        filesystem = fsspec.get_filesystem_class("s3")
        patch.setattr(filesystem, "read_timeout", 1)
        filesystem.clear_instance_cache()
        for key in ("data.bin", "folder/0.tar", "folder/1.tar", "folder/deep/2.tar"):
            storage.write_bytes(f"{URL}/{key}", DATA)
        yield client, proxy
        filesystem.clear_instance_cache()


@pytest.fixture
def client(server):
    return server[0]


@pytest.fixture
def store(server, monkeypatch):
    """The proxy without rules; winnow's pauses are short, and a file of 10 MB is sent in parts."""
    monkeypatch.setattr(patience, "FIRST_PAUSE_S", 0.01)
    monkeypatch.setattr(patience, "LONGEST_PAUSE_S", 0.05)
    monkeypatch.setattr(storage, "PART_BYTES", PART_BYTES)
    yield server[1]
    server[1].forget()


def streamed(path: str) -> bytes:
    """The file as a reader of an archive takes it: a bit from its end first, then all of it in pieces."""
    with storage.open_read(path) as file:
        file.seek(-10, io.SEEK_END)
        assert file.read() == DATA[-10:]
        file.seek(0)
        return b"".join(iter(lambda: file.read(70_000), b""))


def written(path: str, data: bytes = DATA) -> bytes:
    with storage.write_file(path) as temporary, open(temporary, "wb") as file:
        file.write(data)
    return storage.read_bytes(path)


# name: (the S3 operation that fails, the call, what it gives)
READS = {
    "read_bytes": ("get", lambda: storage.read_bytes(f"{URL}/data.bin"), DATA),
    "read_range": ("get", lambda: storage.read_range(f"{URL}/data.bin", 5000, 90_000), DATA[5000:90_000]),
    "open_read": ("get", lambda: streamed(f"{URL}/data.bin"), DATA),
    "sha256_file": ("get", lambda: storage.sha256_file(f"{URL}/data.bin"), hashlib.sha256(DATA).hexdigest()),
    "list_files": ("list", lambda: storage.list_files(f"{URL}/folder"), ["0.tar", "1.tar"]),
    "list_below": ("list", lambda: storage.list_files(f"{URL}/folder", True), ["0.tar", "1.tar", "deep/2.tar"]),
    "list_folders": ("list", lambda: storage.list_folders(f"{URL}/folder"), ["deep"]),
    "glob": ("list", lambda: storage.glob(f"{URL}/f*/[01].tar"), [f"{URL}/folder/0.tar", f"{URL}/folder/1.tar"]),
}  # fmt: skip
QUESTIONS = {
    "exists": ("head", lambda: storage.exists(f"{URL}/data.bin"), True),
    "size_bytes": ("head", lambda: storage.size_bytes(f"{URL}/data.bin"), len(DATA)),
    "is_folder": ("head", lambda: storage.is_folder(f"{URL}/folder"), True),
}
WRITES = {
    "write_bytes": ("put", lambda: (storage.write_bytes(f"{URL}/b", DATA), storage.read_bytes(f"{URL}/b"))[1], DATA),
    "write_file": ("put", lambda: written(f"{URL}/new.bin"), DATA),
    "delete": ("delete", lambda: (storage.delete(f"{URL}/gone"), storage.list_files(f"{URL}/gone", True))[1], []),
}
PARTS = {
    "create_upload": ("create_upload", lambda: written(f"{URL}/large.bin", LARGE), LARGE),
    "upload_part": ("upload_part", lambda: written(f"{URL}/large.bin", LARGE), LARGE),
    "complete_upload": ("complete_upload", lambda: written(f"{URL}/large.bin", LARGE), LARGE),
}
ALL = READS | QUESTIONS | WRITES | PARTS
TYPICAL = ("open_read", "list_files", "write_file")
TRANSIENT = [
    *((kind, name) for kind in (*ANSWERED, *LOST) for name in TYPICAL),
    *((kind, name) for kind in SPOILT for name in ("read_bytes", "read_range", "open_read", "list_files")),
    *(("internal_500", name) for name in ALL if name not in TYPICAL),
    ("reset", "upload_part"),
    *((kind, "size_bytes") for kind in ("request_timeout_400", "skewed_403", "hang")),
    ("answer_lost", "upload_part"),
    ("answer_lost", "complete_upload"),
    ("answer_lost", "delete"),
    ("complete_200_error", "complete_upload"),
    ("wrong_bytes", "read_bytes"),
]


@pytest.mark.parametrize("kind, name", TRANSIENT)
def test_a_store_that_stumbles_is_asked_again(store, kind, name):
    operation, call, expected = ALL[name]
    if name == "delete":
        for number in range(3):
            storage.write_bytes(f"{URL}/gone/{number}", b"x")
        store.forget()
    slow_or_alone = kind in ("hang", "body_stalls") or (kind, name) in (
        ("answer_lost", "delete"),  # done all the same
        ("skewed_403", "size_bytes"),  # no answer says why
    )
    times = 1 if slow_or_alone else 2
    store.add(Fault(kind, operation, times=times))
    assert call() == expected
    assert store.injected == {kind: times}
    tries = len(store.requests(operation))
    if name in ("read_bytes", "read_range", "sha256_file", "write_bytes", "write_file", "list_files", "size_bytes"):
        assert tries == times + 1
    assert tries <= times + 8  # no layer multiplies another's tries


PERMANENT = {
    "denied_403": "these credentials may not do that",
    "wrong_key_403": "the store does not know the access key; AWS_ACCESS_KEY_ID",
    "wrong_signature_403": "AWS_SECRET_ACCESS_KEY",
    "expired_400": "the credentials have expired",
    "no_bucket_404": "there is no such bucket at this endpoint",
}


@pytest.mark.parametrize(
    "kind, name",
    [(kind, name) for kind in PERMANENT for name in (READS | QUESTIONS | WRITES if kind == "denied_403" else TYPICAL)]
    + [(kind, "exists") for kind in PERMANENT],
)
def test_what_waiting_cannot_mend_fails_at_once_in_one_line(store, kind, name):
    store.add(Fault(kind, times=None))
    start_s = time.monotonic()
    with pytest.raises(StoreError, match=PERMANENT[kind]) as caught:
        ALL[name][1]()
    assert time.monotonic() - start_s < 20
    assert len(store.requests()) <= 5
    assert str(caught.value).startswith(URL)
    assert "\n" not in str(caught.value) and SECRET not in str(caught.value)
    assert not caught.value.transient


@pytest.mark.parametrize("name", ["exists", *TYPICAL])
def test_no_credentials_are_said_to_be_missing(store, monkeypatch, tmp_path, name):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    with fresh_connections(), pytest.raises(StoreError, match="no credentials; AWS_ACCESS_KEY_ID and AWS_SECRET"):
        ALL[name][1]()
    assert store.requests() == []


@contextlib.contextmanager
def fresh_connections():
    """New clients, which read the environment, in the block; those that there were are gone after it."""
    filesystem = fsspec.get_filesystem_class("s3")
    filesystem.clear_instance_cache()
    yield
    filesystem.clear_instance_cache()


@pytest.mark.parametrize(
    "url, message",
    [
        ("s3://no-such-bucket/a", "there is no such bucket"),
        ("s3://no-such-bucket", "there is no such bucket"),
        ("s3://wrong name/a", "that is no bucket's name"),
        (f"s3://key:{SECRET}@bucket/a", "that is no bucket's name"),
        ("nosuch://bucket/a", "Protocol not known: nosuch"),
    ],
)
def test_a_wrong_url_is_no_file_that_is_missing(store, url, message):
    calls = [
        storage.exists, storage.is_folder, storage.size_bytes, storage.stamp, storage.list_files, storage.list_folders,
        storage.delete, lambda url: storage.write_bytes(f"{url}/b", b""), lambda url: storage.glob(f"{url}/*.tar"),
    ]  # fmt: skip
    if url.count("/") > 2:
        calls += [storage.read_bytes, storage.open_read, storage.sha256_file]
    for call in calls:
        with pytest.raises(StoreError, match=message) as caught:
            call(url)
        assert SECRET not in str(caught.value) and len(str(caught.value)) < 200


def test_what_is_not_there_is_a_missing_file_and_nothing_else(store):
    for path in (f"{URL}/none", f"{URL}/folder/none/none.bin"):
        assert not storage.exists(path) and not storage.is_folder(path)
        assert storage.list_files(path) == storage.list_files(path, True) == storage.list_folders(path) == []
        assert storage.glob(f"{path}/*") == storage.glob(path) == []
        storage.delete(path)
        for call in (storage.size_bytes, storage.stamp, storage.read_bytes, storage.open_read, storage.sha256_file):
            with pytest.raises(FileNotFoundError, match=path):
                call(path)
    for call in (storage.read_bytes, storage.open_read):
        with pytest.raises(FileNotFoundError, match="folder"):
            call(f"{URL}/folder")


@pytest.mark.parametrize("name", ["exists", *TYPICAL])
def test_patience_ends(store, monkeypatch, caplog, name):
    monkeypatch.setattr(patience, "PATIENCE_S", 1.0)
    monkeypatch.setattr(logging.getLogger("winnow"), "propagate", True)
    store.add(Fault("slow_down_503", times=None))
    with caplog.at_level(logging.WARNING, "winnow"), pytest.raises(StoreError, match="HTTP 503.*; tried for") as caught:
        ALL[name][1]()
    assert caught.value.transient
    assert len(store.requests()) > 2
    assert [record.message for record in caplog.records if "trying again for" in record.message]


def test_a_body_that_is_always_short_is_never_content(store, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    store.add(Fault("body_cut", "get", times=None))
    for name in ("read_bytes", "read_range", "open_read", "sha256_file"):
        with pytest.raises(StoreError, match="the body came short"):
            READS[name][1]()


def test_a_store_that_never_answers_does_not_hang_a_run(store, monkeypatch):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.1)
    store.add(Fault("hang", times=None))
    for name in ("read_bytes", "list_files", "write_bytes"):
        with pytest.raises(StoreError, match="no answer in time"):
            ALL[name][1]()


def test_an_endpoint_that_is_not_there_is_named_without_its_secrets(store, monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setattr(patience, "FIRST_PATIENCE_S", 0.1)
    monkeypatch.setattr(patience, "answered", set())
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
    with fresh_connections(), pytest.raises(StoreError, match=f"the endpoint http://{address} can't be") as caught:
        storage.read_bytes(f"{URL}/data.bin?X-Amz-Signature={SECRET}")
    assert caught.value.transient
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("address", [f"http://user:{SECRET}@127.0.0.1:1", f"user:{SECRET}@127.0.0.1:1", "127.0.0.1:1"])
def test_an_address_that_is_none_is_said_to_be_wrong_without_its_secrets(store, monkeypatch, address):
    monkeypatch.setenv("AWS_ENDPOINT_URL", address)
    with fresh_connections(), pytest.raises(StoreError, match="AWS_ENDPOINT_URL") as caught:
        storage.exists(f"{URL}/data.bin")
    assert SECRET not in str(caught.value) and not caught.value.transient


def test_botocore_tries_by_itself_first(store, monkeypatch, caplog):
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "2")
    with fresh_connections(), caplog.at_level(logging.WARNING, "winnow"):
        store.add(Fault("slow_down_503", "get"))
        assert storage.read_bytes(f"{URL}/data.bin") == DATA
        store.add(Fault("internal_500", "upload_part", first=2))
        assert written(f"{URL}/large.bin", LARGE) == LARGE
    assert store.injected == {"slow_down_503": 1, "internal_500": 1}
    assert len(store.requests("create_upload")) == 1  # a part was sent again, not the whole
    assert caplog.records == []


@pytest.mark.parametrize(
    "kind, operation",
    [("denied_403", "upload_part"), ("reset", "upload_part"), ("slow_down_503", "complete_upload")],
)
def test_an_upload_that_fails_leaves_what_was_there_and_no_parts(store, client, monkeypatch, kind, operation):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    path = f"{URL}/kept.bin"
    storage.write_bytes(path, b"old")
    store.add(Fault(kind, operation, first=2 if operation == "upload_part" else 1, times=None))
    with pytest.raises(StoreError, match="kept.bin can't be written"):
        written(path, LARGE)
    with pytest.raises(StoreError, match="kept.bin can't be written"):
        storage.write_bytes(path, LARGE)
    assert storage.read_bytes(path) == b"old"
    uploads = client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", [])
    assert [upload for upload in uploads if upload["Key"] == "kept.bin"] == []
    assert len(store.requests("abort_upload")) == 2


def test_a_cause_is_not_hidden_by_an_upload_that_can_not_be_given_up(store):
    store.add(Fault("expired_400", "upload_part", times=None))
    store.add(Fault("denied_403", "abort_upload", times=None))
    with pytest.raises(StoreError, match="the credentials have expired"):
        written(f"{URL}/large.bin", LARGE)


def test_a_writer_that_is_killed_leaves_parts_and_no_object(store, client):
    store.add(Fault("hang", "upload_part", first=3, times=None))
    code = (
        "from pipeline.core import storage\n"
        f"storage.PART_BYTES = {PART_BYTES}\n"
        f"storage.write_bytes('{URL}/killed.bin', bytes({len(LARGE)}))\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    try:
        deadline_s = time.monotonic() + 120
        while len(store.requests("upload_part")) < 3:
            assert writer.poll() is None and time.monotonic() < deadline_s
            time.sleep(0.05)
    finally:
        writer.send_signal(signal.SIGKILL)
        writer.wait(30)
    assert not storage.exists(f"{URL}/killed.bin")
    uploads = client.list_multipart_uploads(Bucket=BUCKET)["Uploads"]
    assert "killed.bin" in [upload["Key"] for upload in uploads]  # for a lifecycle rule: docs/troubleshooting.md


def test_keys_that_were_not_deleted_are_no_success(store):
    storage.write_bytes(f"{URL}/stays/a", b"x")
    store.add(Fault("delete_200_denied", "delete", times=1))
    storage.delete(f"{URL}/stays")
    assert not storage.exists(f"{URL}/stays")
    storage.write_bytes(f"{URL}/stays/a", b"x")
    store.add(Fault("delete_200_denied", "delete", times=None))
    with pytest.raises(StoreError, match="stays can't be deleted: it is still there"):
        storage.delete(f"{URL}/stays")


def test_a_file_that_changes_while_it_is_read_is_not_mixed(store, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 1 << 16)
    path = f"{URL}/changing.bin"
    storage.write_bytes(path, bytes(1 << 20))
    with storage.open_read(path) as file:
        file.read(100_000)
        storage.write_bytes(path, b"\1" * (1 << 20))
        with pytest.raises(StoreError, match="the object changed while it was read") as caught:
            file.read()
    assert caught.value.transient


def test_readers_of_archives_see_the_stores_error_and_not_a_broken_file(store, monkeypatch):
    monkeypatch.setattr(storage, "CHUNK_BYTES", 1 << 16)
    table = pa.table({"a": pa.array(random.Random(0).randbytes(20) for _ in range(20_000))})
    with storage.write_file(f"{URL}/table.parquet") as temporary:
        pq.write_table(table, temporary, row_group_size=2_000)
    with storage.write_file(f"{URL}/a.tar") as temporary, tarfile.open(temporary, "w") as archive:
        for number in range(3):
            member = tarfile.TarInfo(str(number))
            member.size = len(DATA)
            archive.addfile(member, io.BytesIO(DATA))

    def read_table():
        with storage.open_read(f"{URL}/table.parquet") as file:
            return pq.read_table(file)

    def read_tar():
        with storage.open_read(f"{URL}/a.tar") as file, tarfile.open(fileobj=file) as archive:
            return [archive.extractfile(member).read() for member in archive]

    for kind in ("slow_down_503", "body_cut"):
        store.add(Fault(kind, "get", every=2, times=2))
        assert read_table() == table
        assert read_tar() == [DATA] * 3
    store.forget()
    monkeypatch.setattr(patience, "PATIENCE_S", 0.05)
    for read in (read_table, read_tar):
        outage = store.add(Fault("unavailable_503", "get", times=None))
        with pytest.raises(StoreError, match="the store is busy or failing"):
            read()
        store.remove(outage)


def test_an_error_of_a_store_keeps_its_parts_between_processes():
    error = StoreError("s3://b/a?X-Amz-Signature=1", "read", f"no https://u:{SECRET}@host/x", transient=True)
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error) == "s3://b/a can't be read: no https://host/x"
    assert copy.transient and copy.cause == error.cause
    assert not WinnowError("x").transient


def test_reads_beyond_the_end_are_short_as_those_of_local_files(store):
    assert storage.read_range(f"{URL}/data.bin", len(DATA) - 5, len(DATA) + 100) == DATA[-5:]
    assert storage.read_range(f"{URL}/data.bin", 7, 7) == b""
    storage.write_bytes(f"{URL}/empty", b"")
    assert storage.read_bytes(f"{URL}/empty") == b""
    with storage.open_read(f"{URL}/empty") as file:
        assert file.read() == b""


# what a config names: (the key, its value)
NAMED = {
    "root": ("root", f"{URL}/root"),
    "pool_folder": ("pool", f"{{source: {URL}/folder, shard_size: 60}}"),
    "pool_pattern": ("pool", f"{{source: '{URL}/folder/*.tar', shard_size: 60}}"),
    "reference": ("references.trusted", f"{{source: {URL}/folder, shard_size: 60}}"),
    "exclude_uids": ("exclude.uids", f"{URL}/data.bin"),
    "exclude_domains": ("exclude.domains", f"{URL}/data.bin"),
    "weights": ("models.scorer", f"{{architecture: ViT-B-32, pretrained: {URL}/data.bin}}"),
    "language_model": ("stages", f"[{{name: language, model: {URL}/data.bin}}]"),
    "model_config": ("recipes.tiny.model", f"{URL}/model.json"),
    "strategy_uids": ("strategies.basic", f"{{uids: {URL}/data.bin}}"),
    "eval_root": ("eval", f"{{root: {URL}/folder, tasks: [cifar10]}}"),
    "report_beside": ("report.beside", f"[{{run: {URL}/runs}}]"),
}


@pytest.mark.parametrize("kind", ["denied_403", "unavailable_503"])
@pytest.mark.parametrize("place", NAMED)
def test_a_config_on_a_store_that_fails_ends_in_one_line(store, monkeypatch, capsys, tmp_path, place, kind):
    monkeypatch.setattr(patience, "PATIENCE_S", 0.0)
    monkeypatch.setattr(logging.getLogger("winnow"), "handlers", [])
    store.add(Fault(kind, times=None))
    key, value = NAMED[place]
    arguments = ["--config", str(TINY), "--set", f"root={tmp_path}", "--set", f"{key}={value}"]
    code = run.main(arguments + ([] if place == "root" else ["--plan"]))
    printed = capsys.readouterr().err.splitlines()
    assert code in (1, 2), printed
    (line,) = [line for line in printed if "trying again" not in line]
    assert line.startswith("error: ") and URL in line
    assert ("these credentials may not" if kind == "denied_403" else "HTTP 503") in line
    assert SECRET not in line
