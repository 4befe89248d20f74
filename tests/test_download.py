"""Downloads: shards of URLs to shards of a pool, against a real server on loopback."""

from __future__ import annotations

import io
import json
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from pipeline.core import storage
from pipeline.core.errors import DOWNLOAD_FAILURES, ConfigError, NetworkDownError
from stages import exclusion
from stages.ingest import shard_writer
from stages.ingest.fetch import fetcher
from tests.download_faults import FAULTS
from tests.download_fixture import download, files, rows, uid_of, write_table, write_urls
from tests.image_server import ImageServer
from tests.pool_fixture import drawing

IMAGES = [drawing(number, 60 + number, 50, kind) for number in range(40) for kind in ("JPEG", "PNG")]
PIXELS = {"format": "png", "size_px": 64}


@pytest.fixture(scope="module")
def server():
    with ImageServer(IMAGES) as running:
        yield running


@pytest.fixture
def urls(server):
    """80 images and 20 that are not there."""
    found = []
    for number in range(80):
        found.append(server.url(f"/img/{number}.jpg", server.hosts[number % 7]))
        if number % 4 == 0:
            found.append(server.url(f"/missing/{number}.jpg"))
    return found


def test_a_shard_has_img2datasets_layout_and_ours(server, urls, tmp_path):
    made = write_urls(tmp_path, {"path": write_table(tmp_path / "t.parquet", urls)}, shard_size=60)
    facts = download(made, tmp_path / "pool", {"image": {"size_px": 64}})
    assert [shard["rows"] for shard in facts] == [60, 40]
    assert sum(shard["ok_rows"] for shard in facts) == 80
    found = rows(tmp_path / "pool")
    assert [row["url"] for row in found] == urls
    assert [row["uid"] for row in found] == [uid_of(number) for number in range(100)]
    for row in found:
        assert row["ok"] == (row["status"] == "success") == (row["error"] is None) == ("/img/" in row["url"])
        assert row["attempts"] == 1
        if row["ok"]:
            assert row["http_status"] == 200
            assert max(row["width"], row["height"]) <= 64
            assert row["final_url"] == row["url"]
        else:
            assert (row["status"], row["error"], row["http_status"]) == ("failed_to_download", "not_found", 404)
            assert row["error_message"].startswith("not_found: ")
            assert row["width"] is None
    # The tars, as webdataset and img2dataset's users read them.
    samples = list(webdataset.WebDataset(str(tmp_path / "pool" / "00000.tar"), shardshuffle=False))
    successes = [row for row in found[:60] if row["ok"]]
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in successes]
    for sample, row in zip(samples, successes, strict=True):
        values = json.loads(sample["json"])
        assert sample["txt"].decode() == row["caption"] == values["caption"]
        assert values["status"] == "success"
        assert values["sha256"] == row["sha256"]
        assert Image.open(io.BytesIO(sample["jpg"])).size == (values["width"], values["height"])
        assert "." not in row["key"]
    stats = json.loads((tmp_path / "pool" / "00000_stats.json").read_text())
    assert stats["count"] == 60 == stats["successes"] + stats["failed_to_download"] + stats["failed_to_resize"]
    assert sum(stats["status_dict"].values()) == 60
    with tarfile.open(tmp_path / "pool" / "00000.tar") as archive:
        assert {member.mtime for member in archive} == {0}
    # As a source it is a pool again, with the same uids.
    from tests import ingest_fixture

    again = ingest_fixture.build(str(tmp_path / "pool"), tmp_path / "again")
    assert again["ok_rows"] == 80
    assert again["rows"] == 100
    assert {row["uid"] for row in ingest_fixture.rows(tmp_path / "again")} == {row["uid"] for row in found}


def test_equal_responses_give_equal_bytes_and_finished_shards_stay(server, urls, tmp_path):
    made = write_urls(tmp_path, {"path": write_table(tmp_path / "t.parquet", urls)}, shard_size=60)
    settings = {"image": PIXELS}
    download(made, tmp_path / "a", settings, threads=1)
    download(made, tmp_path / "b", settings | {"concurrency": 3}, threads=3)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    before = server.requests()
    (tmp_path / "b" / "00001.parquet").unlink()  # as a kill between its tar and its parquet leaves it
    download(made, tmp_path / "b", settings)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    asked = {path for path, count in server.requests().items() if count != before.get(path, 0)}
    assert asked == {"/" + url.split("/", 3)[3] for url in urls[60:]}


def test_the_stored_bytes_can_be_the_original_ones(server, tmp_path):
    paths = [server.url(f"/img/{number}.jpg") for number in range(20)]
    made = write_urls(tmp_path, {"path": write_table(tmp_path / "t.parquet", paths)})
    download(made, tmp_path / "pool", {"image": {"keep_original": True}})
    with tarfile.open(tmp_path / "pool" / "00000.tar") as archive:
        stored = [archive.extractfile(member).read() for member in archive if member.name.endswith(("jpg", "png"))]
    assert stored == IMAGES[:20]


def test_failed_rows_are_fetched_again_in_place(server, tmp_path):
    paths = [server.url(f"/img/{number}.jpg", server.hosts[number % 7]) for number in range(30)]
    paths[7] = server.url("/fault/heals_500.jpg")  # two failures, then an image
    paths[8] = server.url("/gone.jpg")
    made = write_urls(tmp_path, {"path": write_table(tmp_path / "t.parquet", paths)}, shard_size=10)
    out = tmp_path / "pool"
    once = {"image": PIXELS, "retries": 0}
    download(made, out, once)
    first, before = rows(out), files(out)
    assert [row["error"] for row in first if row["error"]] == ["server_error", "not_found"]
    download(made, out, once | {"retry": ["not_found"]})
    assert files(out) == before  # nothing came: not a byte changed
    download(made, out, once | {"retry": "failed"})
    assert files(out) == before  # the second of the two failures
    asked = server.requests()
    facts = download(made, out, once | {"retry": "failed"})
    assert [shard["ok_rows"] for shard in facts] == [9, 10, 10]
    now = server.requests()
    assert {path for path in now if now[path] != asked.get(path, 0)} == {"/fault/heals_500.jpg", "/gone.jpg"}
    after = files(out)
    assert {name for name in after if after[name] != before[name]} == {"00000.tar", "00000.parquet"}
    second = rows(out)
    assert [row["uid"] for row in second] == [row["uid"] for row in first]
    assert second[7]["ok"]
    for row, old in zip(second, first, strict=True):  # the others are what they were, wherever they lie now
        if row["uid"] != second[7]["uid"]:
            assert {**row, "image_offset_bytes": None} == {**old, "image_offset_bytes": None}
    # It is what one run would have made, had the server not failed.
    download(made, tmp_path / "healed", once)
    assert files(tmp_path / "healed") == after


@pytest.mark.parametrize("killed", ["before the tar", "after the tar"])
def test_a_kill_in_a_replacement_leaves_one_whole_shard(server, tmp_path, monkeypatch, killed):
    paths = [server.url(f"/img/{number}.jpg") for number in range(5)] + [server.url(f"/fault/heals_503.jpg?{killed}")]
    made = write_urls(tmp_path, {"path": write_table(tmp_path / "t.parquet", paths)})
    out = tmp_path / "pool"
    once = {"image": PIXELS, "retries": 0}
    download(made, out, once)
    before = files(out)
    while True:  # until the server has healed, which is when a shard is replaced
        real = storage.write_bytes

        def dies(path, data, real=real):
            tar_is_there = path.endswith("00000.parquet")
            real(path, data) if not tar_is_there else None
            if path.endswith(shard_writer.NEXT if killed == "before the tar" else "00000.parquet"):
                raise KeyboardInterrupt

        monkeypatch.setattr(storage, "write_bytes", dies)
        try:
            download(made, out, once | {"retry": "failed"})
        except KeyboardInterrupt:
            break
        finally:
            monkeypatch.undo()
    facts = download(made, out, once)
    assert set(files(out)) == set(before)
    found = rows(out)
    with tarfile.open(out / "00000.tar") as archive:
        names = [member.name for member in archive if member.name.endswith(".png")]
    assert names == [f"{row['key']}.png" for row in found if row["ok"]]
    assert len(names) == facts[0]["ok_rows"] == (5 if killed == "before the tar" else 6)


def test_checksums_of_the_metadata_reject_flag_or_are_not_looked_at(server, tmp_path):
    import hashlib

    sums = [hashlib.sha256(image).hexdigest() for image in IMAGES[:4]]
    sums[1], sums[2], sums[3] = "0" * 64, None, sums[3].upper()
    paths = [server.url(f"/img/{number}.jpg") for number in range(4)]
    table = write_table(tmp_path / "t.parquet", paths, sha256=pa.array(sums, pa.string()))
    made = write_urls(tmp_path, {"path": table})
    expected = {
        "reject": ([True, False, None, True], [None, "checksum_mismatch", None, None]),
        "flag": ([True, False, None, True], [None] * 4),
        "accept": ([None] * 4, [None] * 4),
    }
    for policy, (matches, errors) in expected.items():
        download(made, tmp_path / policy, {"checksum": policy})
        found = rows(tmp_path / policy)
        assert [row["checksum_ok"] for row in found] == matches
        assert [row["error"] for row in found] == errors
        assert [row["sha256"] for row in found] == [hashlib.sha256(image).hexdigest() for image in IMAGES[:4]]


def test_excluded_and_unchosen_rows_are_rows_that_were_not_asked_for(server, tmp_path):
    paths = [server.url(f"/img/{number}.jpg?x", f"127.0.0.{2 + number % 4}") for number in range(12)]
    made = write_urls(tmp_path, {"path": write_table(tmp_path / "t.parquet", paths)})
    (tmp_path / "takedowns.txt").write_text(f"{uid_of(0)}\n{uid_of(4)}\n")
    out_of = exclusion.parse([str(tmp_path / "takedowns.txt")], ["127.0.0.3"], "exclude")
    chosen = tmp_path / "selection"
    chosen.mkdir()
    pq.write_table(pa.table({"row": pa.array([0, 1, 2, 3, 6], pa.int32())}), chosen / "00000.parquet")
    before = server.requests()
    facts = download(made, tmp_path / "pool", {}, selection_path=str(chosen), exclude=out_of)
    found = rows(tmp_path / "pool")
    errors = ["excluded", "excluded", None, None, "excluded", "excluded", None, *["not_chosen"] * 5]
    errors[9] = "excluded"
    assert [row["error"] for row in found] == errors
    asked = {path for path, count in server.requests().items() if count != before.get(path, 0)}
    assert asked == {f"/img/{number}.jpg?x" for number in (2, 3, 6)}
    assert facts[0]["failed"] == {"excluded": 5, "not_chosen": 4}
    assert facts[0]["hosts"] == {}
    assert all(row["attempts"] == 0 and row["error_detail"] for row in found if row["error"])


def test_faces_are_blurred_and_vectors_carried(server, tmp_path):
    paths = [server.url(f"/img/{number}.jpg") for number in (0, 0)]
    boxes = [[[0.0, 0.0, 0.6, 0.6]], []]
    vectors = np.arange(8, dtype=np.float32).reshape(2, 4)
    table = write_table(tmp_path / "t.parquet", paths, face_bboxes=boxes, score=[0.5, float("nan")])
    np.savez_compressed(tmp_path / "t.npz", l14_img=vectors)
    carry = {"l14_img": "float16[]", "score": "float32"}
    made = write_urls(tmp_path, {"path": table, "carry": carry})
    download(made, tmp_path / "pool", {"image": {"format": "png"}})
    found = rows(tmp_path / "pool")
    assert [row["l14_img"] for row in found] == vectors.tolist()
    with tarfile.open(tmp_path / "pool" / "00000.tar") as archive:
        names = archive.getnames()
        pictures = [np.asarray(Image.open(archive.extractfile(name))) for name in names if name.endswith(".png")]
        values = [json.loads(archive.extractfile(name).read()) for name in names if name.endswith(".json")]
    assert [value["face_bboxes"] for value in values] == boxes
    assert [value["score"] for value in values] == [0.5, None]
    blurred, sharp = pictures
    assert (blurred[-4:, -4:] == sharp[-4:, -4:]).all()
    assert (blurred != sharp).any()


def test_a_dead_network_stops_the_download_and_says_why(tmp_path):
    hosts = [f"http://127.0.0.{2 + number % 6}:9/{number}.jpg" for number in range(60)]
    made = write_urls(tmp_path, {"path": write_table(tmp_path / "t.parquet", hosts)})
    with pytest.raises(NetworkDownError, match=r"download stopped: .* connect_failed.*is the network"):
        download(made, tmp_path / "pool", {"retries": 0})
    assert not [name for name in files(tmp_path / "pool") if name.endswith(("tar", "parquet"))]


def test_both_engines_make_the_same_shard(server, tmp_path):
    paths = [server.url(f"/img/{number}.jpg", server.hosts[number % 7]) for number in range(40)]
    for name in ("status_404", "status_403", "always_503", "truncated_body", "robots_noai", "noise_as_jpeg"):
        paths.insert(7, server.fault_url(FAULTS[name]))
    boxes = [[[0.1, 0.1, 0.5, 0.5]] if number % 5 == 0 else [] for number in range(len(paths))]
    table = write_table(tmp_path / "t.parquet", paths, face_bboxes=boxes)
    made = write_urls(tmp_path, {"path": table})
    recipe = {"image": {"size_px": 64, "format": "png"}, "retries": 0, "concurrency": 16}
    download(made, tmp_path / "ours", recipe)
    download(made, tmp_path / "theirs", recipe | {"engine": "img2dataset"}, lifted=False)
    same = ["uid", "key", "caption", "url", "ok", "status", "http_status", "sha256", "image_id", "checksum_ok"]
    same += ["width", "height", "original_width", "original_height", "width_px", "height_px", "image_format"]
    errors = {}
    for ours, theirs in zip(rows(tmp_path / "ours"), rows(tmp_path / "theirs"), strict=True):
        if ours["error"] != "unsupported_format":  # fetched, and no image: img2dataset keeps no sha256 of it
            assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
        if not ours["ok"]:
            errors[ours["error"]] = theirs["error"]
    assert errors == {
        **{name: name for name in ("not_found", "forbidden", "server_error", "truncated_body", "opted_out")},
        "unsupported_format": "undecodable",  # OpenCV does not say which
    }
    members = []
    for side in ("ours", "theirs"):
        with tarfile.open(tmp_path / side / "00000.tar") as archive:
            members.append({member.name: archive.extractfile(member).read() for member in archive})
    ours, theirs = members
    assert list(ours) == list(theirs)
    for name, data in ours.items():
        if name.endswith(".png"):
            pair = [np.asarray(Image.open(io.BytesIO(side)).convert("RGB"), dtype=int) for side in (data, theirs[name])]
            assert np.abs(pair[0] - pair[1]).max() <= 2  # img2dataset cuts off where we round
        elif name.endswith(".txt"):
            assert data == theirs[name]
    stats = [json.loads((tmp_path / side / "00000_stats.json").read_text()) for side in ("ours", "theirs")]
    for name in ("count", "successes", "failed_to_download", "failed_to_resize"):
        assert stats[0][name] == stats[1][name]


def test_what_stays_dead_can_be_fetched_again_and_ends(server, tmp_path):
    dead = [f"http://127.0.0.{2 + number % 7}:9/{number}.jpg" for number in range(40)]
    alive = [server.url(f"/img/{number}.jpg", server.hosts[number % 7]) for number in range(60)]
    made = write_urls(tmp_path, {"path": write_table(tmp_path / "t.parquet", alive + dead)}, shard_size=60)
    once = {"image": PIXELS, "retries": 0}
    facts = download(made, tmp_path / "pool", once)  # the second shard is dead to the last row, the first was not
    assert [shard["ok_rows"] for shard in facts] == [60, 0]
    before = files(tmp_path / "pool")
    download(made, tmp_path / "pool", once | {"retry": ["connect_failed", "host_down"]})
    assert files(tmp_path / "pool") == before


def test_a_slow_host_keeps_no_other_row_waiting(server, tmp_path):
    slow = [server.url(f"/fault/slow_but_whole.jpg?{number}") for number in range(30)]
    quick = [server.url(f"/img/{number}.jpg", server.hosts[1 + number % 6]) for number in range(60)]
    made = write_urls(tmp_path, {"path": write_table(tmp_path / "t.parquet", slow + quick)})
    asked = []

    class Watched(fetcher.Fetcher):
        async def fetch(self, url):
            found = await super().fetch(url)
            asked.append(url)
            return found

    patch = pytest.MonkeyPatch()
    patch.setattr(fetcher, "Fetcher", Watched)
    try:
        download(made, tmp_path / "pool", {"concurrency": 4, "per_host_concurrency": 2, "image": PIXELS})
    finally:
        patch.undo()
    last_quick = max(place for place, url in enumerate(asked) if "/img/" in url)
    assert sum("slow" in url for url in asked[last_quick:]) >= 15  # most of them ended after all of the others


def test_domains_are_excluded_however_they_are_written():
    excluded = exclusion.parse([], ["m\u00fcnchen.de", "Example.org."], "exclude").load()
    for host, found in [
        ("http://xn--mnchen-3ya.de/a.jpg", True),
        ("http://bilder.m\u00fcnchen.de/a.jpg", True),
        ("http://\uff45xample.org/", True),
        ("https://EXAMPLE.ORG:8080/a", True),
        ("http://example.org.evil.net/", False),
        ("http://notexample.org/", False),
        ("no url", False),
    ]:
        assert excluded.host(exclusion.host_of(host)) == found, host


def test_settings_without_effect_are_errors():
    from pipeline.core.config import validate
    from stages.ingest.fetch.settings import DownloadSettings

    for values, message in [
        ({"engine": "img2dataset", "max_redirects": 3}, "max_redirects has no effect with engine img2dataset"),
        ({"engine": "img2dataset", "image": {"apply_orientation": True}}, "image.apply_orientation has no effect"),
        ({"image": {"format": "png", "quality": 90}}, "quality has no effect with format png"),
        ({"allow_addresses": ["nonsense"]}, "nonsense"),
        ({"image": {"resize": "keep_ration"}}, "keep_ration"),
        ({"retry": "connect_failed"}, r"'connect_failed', expected failed, or a list of classes: \[connect_failed\]"),
        ({"contact": "a\nb"}, r"contact = 'a\\nb', expected up to 200 printable"),
    ]:
        with pytest.raises(ConfigError, match=message):
            validate(DownloadSettings, values, "pool.download")
    assert {"excluded", "not_chosen"} < set(DOWNLOAD_FAILURES)
