"""Tasks from the hub, against a real HTTP server on loopback that speaks the hub's endpoints."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import pathlib
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import huggingface_hub.constants
import pytest

from eval import hub
from eval.tasks import resolve_task, resolve_tasks, task_digest
from pipeline.core import storage
from pipeline.core.errors import ConfigError
from tests.conftest import ROOT
from tests.servers import free_port

OLD, NEW = "0a" * 20, "1b" * 20  # commits
TASK = "djghosh/wds_birds_test"
FILES = {
    "README.md": b"# birds",
    "classnames.txt": b"crow\njay\n",
    "zeroshot_classification_templates.txt": b"a photo of a {c}.\n",
    "test/nshards.txt": b"2\n",
    "test/0.tar": b"\0" * 10240,
    "test/1.tar": b"\0" * 20480,
    "train/nshards.txt": b"1\n",
    "train/0.tar": b"\0" * 30720,
    "test/index.parquet": b"nobody reads this",
}


class Hub:
    """A server of data sets: `repositories` {id: {commit: files}}, `branches` {id: commit}; `asked` is what came."""

    def __init__(self):
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.branches: dict[str, str] = {}
        self.asked: list[tuple[str, str]] = []
        self.cut: set[str] = set()  # files whose bodies end early
        self.status: int | None = None  # of every answer
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

            def log_message(self, *arguments):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(request.path).path)
        self.asked.append((request.command, path))
        if self.status:
            return self.send(request, self.status, b"down")
        info = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/revision/(.+)", path)
        tree = re.fullmatch(r"/api/datasets/([^/]+/[^/]+)/tree/(.+)", path)
        file = re.fullmatch(r"/datasets/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        match = info or tree or file
        if not match or match[1] not in self.repositories:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commits = self.repositories[match[1]]
        commit = self.branches.get(match[1]) if match[2] == "main" else match[2]
        if commit not in commits:
            return self.send(request, 404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if info:
            body = {"id": match[1], "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            return self.send(request, 200, json.dumps(body).encode())
        if tree:
            return self.send(request, 200, json.dumps([entry(name, data) for name, data in files.items()]).encode())
        if match[3] not in files:
            return self.send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        data = files[match[3]]
        headers = {"ETag": f'"{etag(match[3], data)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        return self.send(request, 200, data, headers, cut=match[3] in self.cut)

    def send(self, request, status: int, body: bytes, headers: dict[str, str] | None = None, cut: bool = False) -> None:
        request.send_response(status)
        for name, value in {
            "Content-Length": str(len(body)),
            "Content-Type": "application/json",
            **(headers or {}),
        }.items():
            request.send_header(name, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            request.close_connection = True

    def files_asked(self) -> set[str]:
        return {path.split("/", 5)[-1] for command, path in self.asked if command == "GET" and "/resolve/" in path}

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


def etag(name: str, data: bytes) -> str:
    if name.endswith(".tar"):
        return hashlib.sha256(data).hexdigest()  # of a large file: LFS
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(name: str, data: bytes) -> dict:
    found = {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if name.endswith(".tar"):
        found["lfs"] = {"oid": etag(name, data), "size": len(data), "pointerSize": 130}
    else:
        found["oid"] = etag(name, data)
    return found


def use(url: str, monkeypatch) -> None:
    """What HF_ENDPOINT does when it is set before the package is imported."""
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", url)
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Hub]:
    """A hub with one data set of two commits, and an empty cache."""
    made = Hub()
    made.repositories[TASK] = {OLD: dict(FILES), NEW: {**FILES, "classnames.txt": b"rook\nowl\n"}}
    made.branches[TASK] = NEW
    use(made.url, monkeypatch)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    hub._newest.cache_clear()
    yield made
    made.close()


@pytest.fixture
def warnings() -> Iterator[list[str]]:
    """The lines at WARNING of our own logger."""
    lines: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("winnow").addHandler(handler)
    yield lines
    logging.getLogger("winnow").removeHandler(handler)


def pinned(commit: str = OLD, **settings) -> dict:
    return {"name": "birds", "path": f"hf://datasets/{TASK}@{commit}", **settings}


def test_only_what_an_evaluation_reads_is_fetched_once(server, warnings):
    data = resolve_task(pinned())
    assert data.classnames == ("crow", "jay")
    assert data.shards == ("test/0.tar", "test/1.tar")
    assert data.source == f"hf://datasets/{TASK}@{OLD}"
    for name in ("test/0.tar", "test/1.tar"):
        assert storage.read_bytes(storage.join(data.path, name)) == FILES[name]
    wanted = {"classnames.txt", "zeroshot_classification_templates.txt", "test/nshards.txt", "test/0.tar", "test/1.tar"}
    assert server.files_asked() == {f"{OLD}/{name}" for name in wanted}

    server.asked.clear()
    assert resolve_task(pinned()).path == data.path
    assert server.asked == []  # a commit whose files are here needs no network
    assert warnings == []


def test_a_probe_fetches_the_training_images_too(server):
    resolve_task(pinned())
    server.asked.clear()
    data = resolve_task(pinned(mode="linear_probe"))
    assert data.train_shards == ("train/0.tar",)
    assert server.files_asked() == {f"{OLD}/train/nshards.txt", f"{OLD}/train/0.tar"}


def test_a_commit_pins_and_no_commit_warns_once_with_the_newest(server, warnings):
    assert resolve_task(pinned(OLD)).classnames == ("crow", "jay")
    address = f"hf://datasets/{TASK}"
    entries = [{"name": "birds", "path": address}, {"name": "birds", "path": address, "mode": "linear_probe"}]
    found = resolve_tasks(entries)
    assert [data.classnames for data in found] == [("rook", "owl")] * 2
    assert {data.source for data in found} == {f"{address}@{NEW}"}
    (warning,) = warnings
    assert re.search(rf"{address} names no commit: the newest known is used; to pin it: {address}@{NEW}", warning)
    assert task_digest(found[0]) != task_digest(resolve_task(pinned(OLD)))
    assert task_digest(found[0]) == task_digest(resolve_task(pinned(NEW)))


def test_a_branch_that_moves_changes_nothing_of_a_process(server):
    address = f"hf://datasets/{TASK}"
    assert resolve_task({"name": "birds", "path": address}).source == f"{address}@{NEW}"
    server.repositories[TASK]["2c" * 20] = {**FILES, "train/0.tar": b"\1" * 10240}
    server.branches[TASK] = "2c" * 20
    data = resolve_task({"name": "birds", "path": address, "mode": "linear_probe"})
    assert data.source == f"{address}@{NEW}"
    assert data.classnames == ("rook", "owl")
    assert storage.read_bytes(storage.join(data.path, "train/0.tar")) == FILES["train/0.tar"]
    assert all(path.startswith(f"{NEW}/") for path in server.files_asked())


def test_the_root_can_be_an_owner_on_the_hub(server, warnings):
    names = "\n".join(f"class {number}" for number in range(47)).encode()
    server.repositories["djghosh/wds_vtab-dtd_test"] = {OLD: {**FILES, "classnames.txt": names}}
    server.branches["djghosh/wds_vtab-dtd_test"] = OLD
    known, own = resolve_tasks(["vtab/dtd", "birds"], "hf://datasets/djghosh")
    assert (known.task.title, known.source) == (
        "Describable Textures",
        f"hf://datasets/djghosh/wds_vtab-dtd_test@{OLD}",
    )
    assert own.source == f"hf://datasets/{TASK}@{NEW}"
    assert len(warnings) == 2


def test_copies_lie_below_a_root_that_is_a_folder(server, tmp_path):
    root = tmp_path / "tasks"
    data = resolve_task(pinned(), str(root))
    assert pathlib.Path(data.path).is_relative_to(root)
    server.asked.clear()
    assert resolve_task(pinned(), str(root)).path == data.path
    assert server.asked == []
    assert not (tmp_path / "cache").exists()


def test_copies_on_an_object_store(server, s3_url):
    data = resolve_task(pinned(), s3_url)
    assert data.path == f"{s3_url}/hub/djghosh--wds_birds_test@{OLD}"
    assert storage.read_bytes(storage.join(data.path, "test/1.tar")) == FILES["test/1.tar"]
    server.close()
    assert resolve_task(pinned(), s3_url).shards == data.shards


def test_a_plan_says_what_would_be_fetched_and_fetches_nothing(server, tmp_path):
    size = sum(
        len(data) for name, data in FILES.items() if not name.startswith(("train", "README")) and "index" not in name
    )
    with pytest.raises(
        ConfigError, match=rf"would first download 5 files \({size / 1000:.3g}kB\) of hf://\S+@{OLD}; a plan"
    ):
        resolve_task(pinned(), download=False)
    assert server.files_asked() == set()
    assert not list((tmp_path / "cache").rglob("*.tar"))
    resolve_task(pinned())
    assert resolve_task(pinned(), download=False).source.endswith(OLD)  # once they are here a plan is a plan


MISSING = r"missing here: classnames.txt, zeroshot_classification_templates.txt, test/nshards.txt, test/0.tar and as many more"


def test_what_the_hub_does_not_have_is_one_line(server, tmp_path):
    with pytest.raises(ConfigError, match=rf"the hub has no such data set, or not for you; {MISSING}") as error:
        resolve_task({"name": "fish", "path": f"hf://datasets/djghosh/wds_fish_test@{OLD}"}, str(tmp_path))
    assert f"put them into the folder {tmp_path}/wds_fish_test and give it as path" in str(error.value)
    assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="the hub has no such data set"):
        resolve_task({"name": "fish", "path": "hf://datasets/djghosh/wds_fish_test"})
    for revision in ("2c" * 20, "no_branch"):
        with pytest.raises(ConfigError, match="the hub has no such revision"):
            resolve_task(pinned(revision))


def test_a_repository_of_something_else_is_refused(server):
    server.repositories["djghosh/wds_fish_test"] = {OLD: {"README.md": b"", "data.parquet": b""}}
    with pytest.raises(ConfigError, match=rf"_fish_test@{OLD} lacks test/nshards.txt, expected CLIP_bench"):
        resolve_task({"name": "fish", "path": f"hf://datasets/djghosh/wds_fish_test@{OLD}"})


def test_without_a_network(server, warnings, monkeypatch):
    address = f"hf://datasets/{TASK}"
    use(f"http://127.0.0.1:{free_port()}", monkeypatch)
    for path in (address, f"{address}@{OLD}"):
        with pytest.raises(ConfigError, match=rf"the hub can't be used \(.*\); {MISSING}"):
            resolve_task({"name": "birds", "path": path})
    use(server.url, monkeypatch)
    resolve_task({"name": "birds", "path": address})
    use(f"http://127.0.0.1:{free_port()}", monkeypatch)
    hub._newest.cache_clear()
    data = resolve_task({"name": "birds", "path": address})
    assert data.source == f"{address}@{NEW}"
    assert warnings[-1] == f"{address} names no commit: the newest known is used; to pin it: {address}@{NEW}"


def test_offline_by_choice_and_a_hub_that_is_down(server, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=rf"HF_HUB_OFFLINE is set; {MISSING}"):
        resolve_task(pinned())
    assert server.asked == []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    server.status = 500
    with pytest.raises(ConfigError, match=rf"the hub can't be used \(.*500.*\); {MISSING}"):
        resolve_task(pinned())


def test_a_file_that_is_cut_off_is_no_copy_and_comes_again(server, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between its tries
    server.cut = {"test/1.tar"}
    with pytest.raises(ConfigError, match=r"the hub can't be used \(.*\); missing here: test/1.tar;"):
        resolve_task(pinned())
    server.cut = set()
    server.asked.clear()
    data = resolve_task(pinned())
    assert storage.read_bytes(storage.join(data.path, "test/1.tar")) == FILES["test/1.tar"]
    assert server.files_asked() == {f"{OLD}/test/1.tar"}


@pytest.mark.parametrize(
    "path",
    [
        "hf://djghosh/wds_birds_test",
        "hf://datasets/wds_birds_test",
        f"hf://datasets/a/b/c@{OLD}",
        "hf://datasets/a/b@",
        "hf://models/a/b",
    ],
)
def test_addresses_that_are_none(path):
    with pytest.raises(ConfigError, match=r"eval.tasks.path = hf://.*, expected hf://datasets/OWNER/NAME@REVISION"):
        resolve_task({"name": "birds", "path": path})


def test_a_root_that_is_no_owner():
    with pytest.raises(ConfigError, match=r"eval.root = hf://datasets, expected hf://datasets/OWNER"):
        resolve_task("birds", "hf://datasets")


def test_a_missing_known_task_is_told_where_the_hub_has_it(tmp_path):
    with pytest.raises(ConfigError, match=r"no files in .*; or path: hf://datasets/djghosh/wds_vtab-dtd_test$"):
        resolve_task("vtab/dtd", str(tmp_path))


def test_the_environment_names_endpoint_and_cache(server, tmp_path):
    script = f"from eval.tasks import resolve_task; print(resolve_task({pinned()!r}).path)"
    environment = os.environ | {"HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().startswith(str(tmp_path / "home"))
    assert f"{OLD}/test/0.tar" in server.files_asked()
