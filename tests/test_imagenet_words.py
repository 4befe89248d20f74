"""Words that name a class: counted as DataComp's text_based filter finds them, word by word."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.core.errors import ConfigError, WinnowError
from stages import build_stage
from stages.base import Batch, LoadContext
from stages.wordnet import FILES
from tests.duplicates_fixture import run_stage
from tests.pool_fixture import drawing, write_pool
from tests.test_wordnet import synsets
from tests.wordnet_fixture import write_wordnet

# n02084071 dog, n02512053 fish, n10787470 woman, n02764044 ax, n00381097 red (an adjective's offset)
IDS = "n02084071\nn02512053\nn10787470\nn02764044\nn00381097\n"
CAPTIONS = {
    "two Dogs and a fish": 2,
    "dog dog\tdog\nDOG": 4,
    "dog, fish.": 0,
    "redder than red": 1,  # red is a noun first; redder is an adjective only, and its offset is in the list
    "axes of the womens": 2,
    "dog\u00a0fish\u2003dogs": 3,
    "dogfish": 0,
    "": 0,
    " \n ": 0,
    "\u2605": 0,
}


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "ids.txt").write_text(IDS)
    parameters = {"wordnet": write_wordnet(tmp_path / "wordnet"), "ids": str(tmp_path / "ids.txt")}
    return build_stage("imagenet_words", parameters, "stages.0")


def counts(stage, captions):
    batch = Batch({"caption": captions}, "00000", np.arange(len(captions)))
    return stage.process(batch, stage.load(LoadContext()))["caption_imagenet_words"]


def test_counts_of_captions_that_are_known(stage):
    assert dict(zip(CAPTIONS, counts(stage, list(CAPTIONS)), strict=True)) == CAPTIONS


def test_equals_datacomps_rule_on_random_captions(stage, tmp_path):
    rng = np.random.default_rng(0)
    words = [
        "dog",
        "dogs",
        "Fishing",
        "fish",
        "woman",
        "women",
        "womens",
        "axes",
        "ax",
        "red",
        "redder",
        "well",
        "kiss,",
    ]
    words += ["x", "be", "leaves", "ice-cream_cone", "\u00e9", "\ud800"]
    blanks = [" ", "  ", "\n", "\u00a0", "\x1f", "\t"]
    captions = [
        "".join(str(rng.choice(words)) + str(rng.choice(blanks)) for _ in range(rng.integers(0, 9))) for _ in range(300)
    ]
    entities = [int(line.strip()[1:]) for line in IDS.splitlines()]
    expected = []
    for caption in captions:
        found = 0
        for word in caption.split():
            of_word = synsets(str(tmp_path / "wordnet"), word)
            if len(of_word) > 0 and of_word[0][1] in entities:
                found += 1
        expected.append(found)
    assert sum(count > 0 for count in expected) > 100
    assert counts(stage, captions) == expected


def test_as_a_column_of_a_pool(stage, tmp_path):
    entries = [{"image": drawing(number), "caption": caption} for number, caption in enumerate(CAPTIONS)]
    entries.insert(3, {"image": None, "caption": "a dog"})
    path = write_pool(tmp_path, [entries[:4], entries[4:]])
    _, rows, _ = run_stage(path, tmp_path / "out", stage)
    found = [row["caption_imagenet_words"] for row in rows]
    assert found.pop(3) is None
    assert found == list(CAPTIONS.values())
    assert stage.version == 1  # when one of these counts changes, so must the version


def test_files_are_part_of_the_identity_and_may_be_missing(stage, tmp_path):
    folder = tmp_path / "wordnet"
    files = {f"wordnet.{name}": str(folder / name) for name in FILES} | {"ids": str(tmp_path / "ids.txt")}
    assert stage.external_files() == files
    assert stage.unavailable() == ""
    (folder / "verb.exc").unlink()
    assert stage.unavailable().startswith(f"wordnet.verb.exc = {folder}/verb.exc is not there: nltk.download")
    write_wordnet(folder)
    (tmp_path / "ids.txt").unlink()
    assert "imagenet21k_wordnet_ids.txt" in stage.unavailable()
    with pytest.raises(WinnowError, match="ids.txt can't be read"):
        stage.load(LoadContext())


@pytest.mark.parametrize("text", ["", "02084071", "n2084071", "n02084071 dog", "n02084071\n\n", "\u00e9"])
def test_a_wrong_list_is_one_line(stage, tmp_path, text):
    (tmp_path / "ids.txt").write_text(text)
    with pytest.raises(WinnowError, match="stages.imagenet_words.ids = .*ids.txt"):
        stage.load(LoadContext())


def test_both_paths_are_asked_for():
    with pytest.raises(ConfigError, match="stages.0.wordnet is missing"):
        build_stage("imagenet_words", {"ids": "x"}, "stages.0")
    with pytest.raises(ConfigError, match="stages.0.ids is missing"):
        build_stage("imagenet_words", {"wordnet": "x"}, "stages.0")
