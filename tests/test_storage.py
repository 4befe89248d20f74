"""Storage and artifacts behave alike on local paths and on a real S3 endpoint."""

from __future__ import annotations

import hashlib

import pytest

from pipeline.core import artifact, storage
from pipeline.core.errors import WinnowError


@pytest.fixture(params=["local", "s3"])
def folder(request, tmp_path):
    return str(tmp_path / "root") if request.param == "local" else request.getfixturevalue("s3_url")


def test_files_are_written_listed_read_and_deleted(folder):
    path = storage.join(folder, "a", "b.txt")
    storage.write_bytes(path, b"0123456789")
    assert storage.exists(path)
    assert storage.size_bytes(path) == 10
    assert storage.read_range(path, 2, 5) == b"234"
    assert storage.list_files(folder, recursive=True) == ["a/b.txt"]
    assert storage.list_folders(folder) == ["a"]
    assert storage.is_folder(storage.join(folder, "a"))
    assert not storage.is_folder(path)
    with storage.local_folder(storage.join(folder, "a")) as local, open(f"{local}/b.txt", "rb") as file:
        assert file.read() == b"0123456789"
    before = storage.stamp(path)
    storage.write_bytes(path, b"other")
    assert storage.stamp(path) != before
    storage.delete(storage.join(folder, "a"))
    assert storage.list_files(folder, recursive=True) == []


def test_a_block_that_fails_publishes_nothing(folder):
    path = storage.join(folder, "x.bin")
    storage.write_bytes(path, b"old")
    with pytest.raises(RuntimeError, match="half way"), storage.write_file(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(b"half")
        raise RuntimeError("half way")
    assert storage.read_bytes(path) == b"old"
    assert storage.list_files(folder, recursive=True) == ["x.bin"]


def test_a_file_that_was_lost_or_cut_since_is_named(folder):
    made = artifact.Artifact(folder, "thing", {"version": 1})
    for name in ("a.bin", "b/c.bin", ".DS_Store"):
        storage.write_bytes(storage.join(made.path, name), b"1234")
    record = artifact.finish(made, {})
    assert sorted(record["files"]) == ["a.bin", "b/c.bin"]
    artifact.check_sizes(made.path, record)
    storage.write_bytes(storage.join(made.path, "b/c.bin"), b"123")
    with pytest.raises(
        WinnowError, match=r"b/c\.bin: 3 bytes, expected 4 bytes as when it was finished: remove .*thing-"
    ):
        artifact.check_sizes(made.path, record)
    storage.delete(storage.join(made.path, "a.bin"))
    with pytest.raises(WinnowError, match=r"a\.bin: no file, expected 4 bytes"):
        artifact.check_sizes(made.path, record)


def test_an_artifact_is_complete_only_with_its_record(folder):
    made = artifact.Artifact(folder, "thing", {"version": 1, "inputs": {"pool": "abc"}})
    storage.write_bytes(storage.join(made.path, "00000.bin"), b"data")
    assert made.record() is None
    storage.write_bytes(storage.join(made.path, "times.jsonl"), b"1 s")
    record = artifact.finish(made, {"rows": 4}, fact_files=["times.jsonl"])
    assert made.record() == record
    assert record["files"]["00000.bin"]["bytes"] == 4
    digest = artifact.content_digest(record)
    storage.write_bytes(storage.join(made.path, "times.jsonl"), b"2 s")
    assert artifact.content_digest(artifact.finish(made, {"rows": 4}, fact_files=["times.jsonl"])) == digest
    storage.write_bytes(storage.join(made.path, "00000.bin"), b"DATA")
    assert artifact.content_digest(artifact.finish(made, {"rows": 4}, fact_files=["times.jsonl"])) != digest


def test_a_record_lists_what_is_there_whoever_hashed_it(folder):
    made = artifact.Artifact(folder, "thing", {"version": 1})
    contents = {"00000.bin": b"first", "below/00001.bin": b"second", "below/empty.bin": b""}
    for name, data in contents.items():
        storage.write_bytes(storage.join(made.path, name), data)
    storage.write_bytes(storage.join(made.path, f"00002.bin{storage.TEMPORARY_MARK}12345678"), b"half a third")
    expected = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in contents.items()
    }
    record = artifact.finish(made, {})
    assert record["files"] == expected
    assert storage.list_files(made.path, recursive=True) == sorted([artifact.RECORD, *contents])
    told = {"bytes": 5, "sha256": "f" * 64}  # of what was hashed when written, nothing is read
    again = artifact.finish(made, {}, known={"00000.bin": told}, file_notes={"00000.bin": {"rows": 3}})
    assert again["files"] == expected | {"00000.bin": told | {"rows": 3}}


def test_a_fingerprint_depends_on_values_and_refuses_what_json_cannot_hold():
    first = artifact.fingerprint({"a": 1, "b": [1.5, None, True]})
    assert first == artifact.fingerprint({"b": [1.5, None, True], "a": 1})
    assert len(first) == 12
    assert first != artifact.fingerprint({"a": 2, "b": [1.5, None, True]})
    for bad in (float("nan"), {1, 2}, b"bytes", object()):
        with pytest.raises(TypeError):
            artifact.fingerprint({"a": bad})


def test_the_first_difference_names_the_field():
    old = {"model": {"name": "ViT-B-32"}, "version": 1}
    new = {"model": {"name": "ViT-L-14"}, "version": 1}
    assert artifact.first_difference(old, new) == "model.name: ViT-B-32 -> ViT-L-14"
    assert artifact.first_difference(old, old) is None


def test_a_broken_json_file_is_named(tmp_path):
    path = str(tmp_path / "bad.json")
    storage.write_bytes(path, b"{")
    with pytest.raises(WinnowError, match=r"bad\.json: expected JSON"):
        storage.read_json(path)
