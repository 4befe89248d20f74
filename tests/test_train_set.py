"""Train sets: what was chosen, shuffled, in tars that other readers open."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import random
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.core import artifact, pool
from pipeline.core.errors import WinnowError
from stages.column_files import POOL_TYPES
from stages.selection import train_set
from stages.selection.choose import select
from stages.selection.strategies import parse_strategies
from stages.selection.train_set import finish_train_set, plan_train_set, write_train_set, write_train_tar
from tests.pool_fixture import drawing, random_uids, write_columns, write_pool

NUM_ROWS = 70


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A pool, a selection of it with multiplicities, and {uid: (multiplicity, caption, image bytes)}."""
    root = tmp_path_factory.mktemp("chosen")
    uids = random_uids(np.random.default_rng(3), NUM_ROWS)
    rows = []
    for number, uid in enumerate(uids):
        kind = ("JPEG", "PNG", "WEBP", "GIF")[number % 4]
        image = None if number % 10 == 9 else drawing(number, kind=kind)
        rows.append({"image": image, "caption": f"a caption: “{number}”\n", "uid": uid})
    path = write_pool(root, [rows[:30], rows[30:]])
    weights = pa.array([float(number % 3) for number in range(NUM_ROWS)], type=pa.float32())
    columns = write_columns(root, path, {"weight": weights})
    mapping = {"it": {"repeat": {"column": "weight", "cap": 5}}}
    strategies = parse_strategies(mapping, "s", {**POOL_TYPES, "weight": "float32"})
    select(path, columns, strategies, "it", f"{root}/selection")
    expected = {
        row["uid"]: (number % 3, row["caption"], row["image"])
        for number, row in enumerate(rows)
        if row["image"] and number % 3
    }
    return path, f"{root}/selection", expected


def digests(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in pathlib.Path(folder).iterdir()}


def index_of(folder):
    return pq.read_table(f"{folder}/index.parquet").to_pylist()


def test_every_chosen_sample_is_there_as_often_as_chosen(chosen, tmp_path):
    path, selection, expected = chosen
    facts = write_train_set(path, selection, str(tmp_path), seed=0, shard_size=16)
    index = index_of(tmp_path)
    counts = {uid: sum(row["uid"] == uid for row in index) for uid in expected}
    assert counts == {uid: number for uid, (number, _, _) in expected.items()}
    assert facts["num_samples"] == len(index) == sum(counts.values())
    assert sorted(digests(tmp_path)) == [*(f"{i:05d}.tar" for i in range(4)), "index.parquet", "wids.json"]
    for row in index:
        _, caption, image = expected[row["uid"]]
        assert row["caption"] == caption
        with open(tmp_path / row["tar"], "rb") as file:
            file.seek(row["image_offset_bytes"])
            data = file.read(row["image_size_bytes"])
        assert data == image or (image[:3] == b"GIF" and data[:4] == b"\x89PNG")
    for name, entry in facts["known"].items():
        data = (tmp_path / name).read_bytes()
        assert entry == {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def test_members_are_in_img2dataset_layout_without_time_or_owner(chosen, tmp_path):
    path, selection, expected = chosen
    write_train_set(path, selection, str(tmp_path), seed=0, shard_size=16)
    keys = []
    for name in sorted(tmp_path.glob("*.tar")):
        with tarfile.open(name) as archive:
            members = archive.getmembers()
            assert {(member.mtime, member.uid, member.uname) for member in members} == {(0, 0, "")}
            for image, text, meta in zip(members[0::3], members[1::3], members[2::3], strict=True):
                key = image.name.split(".")[0]
                keys.append(key)
                assert image.name.split(".")[1] in ("jpg", "png", "webp")
                assert (text.name, meta.name) == (f"{key}.txt", f"{key}.json")
                found = json.loads(archive.extractfile(meta).read())
                assert found["caption"].encode() == archive.extractfile(text).read()
                assert expected[found["uid"]][1] == found["caption"]
    assert keys == [f"{number:09d}" for number in range(len(index_of(tmp_path)))]


def test_webdataset_reads_every_sample_in_the_index_order(chosen, tmp_path):
    import webdataset

    path, selection, _ = chosen
    write_train_set(path, selection, str(tmp_path), seed=0, shard_size=16)
    tars = [str(name) for name in sorted(tmp_path.glob("*.tar"))]
    # as open_clip's loader does
    samples = (
        webdataset.WebDataset(tars, shardshuffle=False)
        .decode("pilrgb")
        .rename(image="jpg;png;jpeg;webp", text="txt")
        .to_tuple("image", "text", "json")
    )
    index = index_of(tmp_path)
    found = list(samples)
    assert [meta["uid"] for _, _, meta in found] == [row["uid"] for row in index]
    assert [text for _, text, _ in found] == [row["caption"] for row in index]
    assert {image.size for image, _, _ in found} == {(64, 48)}


def test_wids_opens_the_set_by_its_index(chosen, tmp_path, monkeypatch):
    import wids

    path, selection, _ = chosen
    write_train_set(path, selection, str(tmp_path), seed=0, shard_size=16)
    monkeypatch.setenv("WIDS_CACHE", str(tmp_path / "cache"))
    data = wids.ShardListDataset(str(tmp_path / "wids.json"), transformations=[])
    index = index_of(tmp_path)
    assert len(data) == len(index)
    for number in (0, 17, len(index) - 1):
        assert json.load(data[number][".json"])["uid"] == index[number]["uid"]
    for shard in json.loads((tmp_path / "wids.json").read_text())["shardlist"]:
        assert shard["filesize"] == (tmp_path / shard["url"]).stat().st_size


def test_the_same_bytes_on_a_rerun_in_any_order_and_for_any_run_size(chosen, tmp_path, monkeypatch):
    path, selection, _ = chosen
    write_train_set(path, selection, str(tmp_path / "a"), seed=0, shard_size=16)
    monkeypatch.setattr(train_set, "RUN_ROWS", 9)
    monkeypatch.setattr(train_set, "WINDOW", 5)
    out = str(tmp_path / "b")
    plan = plan_train_set(path, selection, out, 0, 16)
    assert plan == {"num_samples": len(index_of(tmp_path / "a")), "num_tars": 4}
    for number in random.Random(0).sample(range(4), 4):
        write_train_tar(path, out, number, 16)
    finish_train_set(out, 4)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_a_restart_keeps_what_is_there(chosen, tmp_path):
    path, selection, _ = chosen
    write_train_set(path, selection, str(tmp_path / "a"), seed=0, shard_size=16)
    out = tmp_path / "b"
    plan_train_set(path, selection, str(out), 0, 16)
    write_train_tar(path, str(out), 2, 16)
    written = (out / "00002.tar").stat().st_mtime_ns
    write_train_set(path, selection, str(out), seed=0, shard_size=16)
    assert (out / "00002.tar").stat().st_mtime_ns == written
    assert digests(tmp_path / "a") == digests(out)


@pytest.mark.parametrize("left", [0, 1, 3])
def test_finish_can_be_retried_after_it_removed_its_inputs(chosen, tmp_path, left):
    path, selection, _ = chosen
    out = str(tmp_path / "a")
    plan = plan_train_set(path, selection, out, 0, 16)
    for number in range(plan["num_tars"]):
        write_train_tar(path, out, number, 16)
    parts = {name.name: name.read_bytes() for name in (tmp_path / "a").glob("*.part.parquet")}
    facts = finish_train_set(out, plan["num_tars"])
    finished = digests(out)
    for name in sorted(parts)[:left]:  # a worker that was lost before it had removed all of them
        (tmp_path / "a" / name).write_bytes(parts[name])
    assert finish_train_set(out, plan["num_tars"]) == facts
    assert digests(out) == finished


def test_many_runs_need_few_open_files(chosen, tmp_path, monkeypatch):
    import resource

    path, selection, _ = chosen
    write_train_set(path, selection, str(tmp_path / "a"), seed=0, shard_size=16)
    monkeypatch.setattr(train_set, "RUN_ROWS", 1)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    in_use = len(os.listdir("/proc/self/fd"))  # new files take the smallest free numbers
    resource.setrlimit(resource.RLIMIT_NOFILE, (in_use + 20, hard))
    try:
        plan_train_set(path, selection, str(tmp_path / "b"), 0, 16)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    write_train_set(path, selection, str(tmp_path / "b"), seed=0, shard_size=16)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_the_order_is_a_shuffle_that_the_seed_decides(chosen, tmp_path):
    path, selection, expected = chosen
    orders = []
    for seed in (0, 1):
        write_train_set(path, selection, str(tmp_path / str(seed)), seed=seed, shard_size=100)
        orders.append([row["uid"] for row in index_of(tmp_path / str(seed))])
    assert sorted(orders[0]) == sorted(orders[1])
    assert orders[0] != orders[1]
    assert len({orders[0].index(uid) < 20 for uid in expected}) == 2
    first_shard = set(pool.read_rows(path, "00000", ["uid"])["uid"].to_pylist())
    inside = [uid in first_shard for uid in orders[0]]
    assert 0.2 < np.mean(inside[: len(inside) // 2]) < 0.8  # not in the pool's order


def test_an_image_that_does_not_decode_names_its_uid(tmp_path):
    path = write_pool(tmp_path, [[{"image": drawing(1, kind="PNG"), "caption": "a"}] * 3])
    strategies = parse_strategies({"it": {}}, "s", POOL_TYPES)
    select(path, {}, strategies, "it", f"{tmp_path}/selection")
    tar = pathlib.Path(path) / "00000.tar"
    data = bytearray(tar.read_bytes())
    row = pool.read_rows(path, "00000").to_pylist()[1]
    data[row["image_offset_bytes"] + 60 : row["image_offset_bytes"] + 90] = b"\0" * 30
    tar.write_bytes(data)
    with pytest.raises(WinnowError, match=f"00000.tar: uid {row['uid']}: undecodable.*expected an image that decodes"):
        write_train_set(path, f"{tmp_path}/selection", str(tmp_path / "out"), seed=0)
    assert not list((tmp_path / "out").glob("*.tar*"))


def test_an_empty_or_foreign_selection_is_refused(chosen, tmp_path):
    path, selection, _ = chosen
    strategies = parse_strategies({"it": {"where": ["width_px > 9999"]}}, "s", POOL_TYPES)
    select(path, {}, strategies, "it", f"{tmp_path}/empty")
    with pytest.raises(WinnowError, match="no row was selected"):
        write_train_set(path, f"{tmp_path}/empty", str(tmp_path / "out"), seed=0)
    other = write_pool(tmp_path, [[{"image": drawing(1), "caption": "a"}], [{"image": drawing(2), "caption": "b"}]])
    with pytest.raises(WinnowError, match="00000.parquet: chosen from another pool"):
        write_train_set(other, selection, str(tmp_path / "out"), seed=0)


def test_an_artifact_on_s3_equals_a_local_one(chosen, tmp_path, s3_url):
    path, selection, _ = chosen
    made = artifact.Artifact(s3_url, "train_set", {"seed": 0})
    facts = write_train_set(path, selection, made.path, seed=0, shard_size=40)
    record = artifact.finish(made, {}, known=facts["known"])
    write_train_set(path, selection, str(tmp_path), seed=0, shard_size=40)
    assert {name: entry["sha256"] for name, entry in record["files"].items()} == digests(tmp_path)
