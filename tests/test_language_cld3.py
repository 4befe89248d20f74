"""CLD3's languages: the answers of the package with wheels are those recorded from gcld3 3.0.13."""

from __future__ import annotations

import numpy as np
import pytest

from stages import build_stage
from stages.base import Batch, LoadContext

ANSWERS = {
    "a photo of a dog on the beach": ("ga", 0.73685),
    "ein Hund l\u00e4uft \u00fcber die gr\u00fcne Wiese": ("de", 1.0),
    "une photo de la vieille maison": ("fr", 0.99981),
    "IMG_0042.jpg": ("af", 0.48463),
    "two words": ("en", 0.99997),
    "two red stars\npainted on a wall": ("en", 0.99998),
    "": ("ja", 0.78376),
    "\u2605\u2665": ("ja", 0.78376),
    "a\ud800 photo of a house": ("en", 0.90107),
    "\u5317\u4eac\u7684\u8857\u9053": ("zh", 0.99995),
}


@pytest.fixture
def stage():
    return build_stage("language_cld3", {}, "stages.0")


def test_without_the_package_it_is_unavailable_and_says_how_to_get_it(stage, monkeypatch):
    assert stage.unavailable() == ""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = stage.unavailable()
    assert text.startswith("the package gcld3 is not there: ")
    assert "cld3-py" in text
    assert "\n" not in text


def test_languages_equal_those_of_the_reference(stage):
    batch = Batch({"caption": list(ANSWERS)}, "00000", np.arange(len(ANSWERS)))
    found = stage.process(batch, stage.load(LoadContext()))
    assert found["cld3_language"] == [language for language, _ in ANSWERS.values()]
    expected = [probability for _, probability in ANSWERS.values()]
    assert found["cld3_probability"] == pytest.approx(expected, abs=1e-5)
