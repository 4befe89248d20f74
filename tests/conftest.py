"""Fixtures shared by all tests: a clean environment, real data, a real S3 endpoint, a real Ray."""

from __future__ import annotations

import functools
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests import browser_fixture, servers

ROOT = pathlib.Path(__file__).resolve().parent.parent

for name in [name for name in os.environ if name.startswith("RAY_")]:
    del os.environ[name]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_ENABLE_UV_RUN_RUNTIME_ENV"] = "0"


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """How `-n 2` deals out tests: file by file, those with tests that start a Ray (marker `ray`) first, as they take longest.

    The files that use the finished run go to one worker, which makes it once.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "finished" if uses_finished_run(path) else path

    config.option.loadscopereorder = False
    return ByFile(config, log)


@functools.cache
def uses_finished_run(path: str) -> bool:
    return re.search(r"(?m)^def \w+\(.*\bfinished\b", (ROOT / path).read_text(encoding="utf-8")) is not None


def pytest_collection_modifyitems(items):
    """Skips what this machine can't run: GPU tests without CUDA, and outside CI those that lack real data or a browser."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    data = real_data_folder()
    for item in items:
        if item.get_closest_marker("gpu"):
            import torch

            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
        if item.get_closest_marker("real_data") and not data.is_dir() and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason=f"no real data at {data}; set WINNOW_REAL_DATA"))
        if item.get_closest_marker("browser") and browser_fixture.browser_path() is None and not os.environ.get("CI"):
            item.add_marker(pytest.mark.skip(reason=f"none of {', '.join(browser_fixture.NAMES)} on the PATH"))


def real_data_folder() -> pathlib.Path:
    return pathlib.Path(os.environ.get("WINNOW_REAL_DATA") or ROOT.parent / "shared" / "data").resolve()


@pytest.fixture(scope="session")
def real_data_path() -> pathlib.Path:
    """The folder of real image-text data; a test that asks for it fails in CI when it is missing."""
    folder = real_data_folder()
    assert folder.is_dir(), f"real data expected at {folder}; set WINNOW_REAL_DATA"
    return folder


@pytest.fixture(scope="module")
def browser():
    """A running Chromium; a test that asks for it fails in CI when there is none. Of a module, as its driver is a loop."""
    with browser_fixture.started_browser() as started:
        yield started


@pytest.fixture(scope="session")
def s3_endpoint():
    """The address of a real S3 server (moto) on loopback."""
    with servers.s3_server() as address:
        yield address


@pytest.fixture
def s3_url(s3_endpoint, monkeypatch, request):
    """`s3://bucket` of a fresh, empty bucket; credentials and endpoint are in the environment, as for users."""
    import boto3
    import fsspec

    settings = {
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_endpoint,
        "AWS_EC2_METADATA_DISABLED": "true",
    }
    for key, value in settings.items():
        monkeypatch.setenv(key, value)
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    bucket = "b" + str(abs(hash(request.node.nodeid)) % 10**12)
    boto3.client("s3").create_bucket(Bucket=bucket)
    yield f"s3://{bucket}"
    fsspec.get_filesystem_class("s3").clear_instance_cache()


MODEL = {
    "embed_dim": 16,
    "vision_cfg": {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1},
}


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The folder of a tiny CLIP of 32 pixels with random weights, always the same."""
    import torch

    from pipeline.core import clip_model

    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("model"))
    clip_model.save(clip_model.build(MODEL).model, MODEL, folder)
    return folder


TINY = ROOT / "tests" / "tiny.yaml"
RECORD = "_artifact.json"


class Winnow:
    """The command line as a user gives it, on the tiny config, in a subprocess."""

    @staticmethod
    def command(root, *more) -> list[str]:
        return [
            sys.executable,
            str(ROOT / "pipeline" / "run.py"),
            "--config",
            str(TINY),
            "--set",
            f"root={root}",
            *more,
        ]

    @classmethod
    def run(cls, root, *more, cwd=ROOT, check=0) -> subprocess.CompletedProcess:
        done = subprocess.run(cls.command(root, *more), cwd=cwd, capture_output=True, text=True, timeout=600)
        if check is not None:
            assert done.returncode == check, done.stdout[-4000:] + done.stderr[-4000:]
        return done

    @staticmethod
    def artifacts(root) -> dict[str, dict[str, str]]:
        """{artifact: {file: sha256}} of what is finished, without files that hold measurements."""
        found = {}
        for record in pathlib.Path(root).glob(f"*/{RECORD}"):
            files = json.loads(record.read_text())["files"]
            found[record.parent.name] = {
                name: entry["sha256"] for name, entry in files.items() if not entry.get("fact")
            }
        return found


@pytest.fixture(scope="session")
def winnow() -> type[Winnow]:
    return Winnow


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """(root, what was printed) of a finished tiny run, started from an unrelated working directory."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    root = tmp_path_factory.mktemp("finished") / "root"
    done = Winnow.run(root, cwd=elsewhere)
    assert list(elsewhere.iterdir()) == []  # nothing is left where the command was given
    return root, done
