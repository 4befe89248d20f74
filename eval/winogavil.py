"""WinoGAViL (Bitton et al., arXiv 2207.12576, 2022): which of 5 to 12 images belong to a cue?

Read as its authors publish it; the images are those of winogavil_images.zip, unpacked:

    winogavil_dataset.csv       ,candidates,cue,associations,..,ID
                                0,"[""eagle"", ""teepee"", ""ash""]",bald,"[""eagle"", ""ash""]",..,0
    winogavil_images/eagle.jpg

Scored as DataComp does (eval_utils/wino_eval.py): the prompt is `A cue` or `An cue`, the images with the highest
cosine are taken, as many as are right, and compared with the right ones by the Jaccard index. Of equal scores the
later image is taken first, as numpy's argsort leaves them there (it promises no order).

This module is light: it imports no torch and no numpy.
"""

from __future__ import annotations

import json
import math
import posixpath
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from eval import folders
from pipeline.core import storage
from pipeline.core.errors import ConfigError

QUESTIONS_FILE = "winogavil_dataset.csv"
IMAGES_FOLDER = "winogavil_images"
COUNTED_CANDIDATES = 10  # questions with so many candidates are the task's main metric
SIZES: Mapping[str, tuple[int, int]] = {  # upstream's names: least and most candidates
    "jaccard_score_10-12": (COUNTED_CANDIDATES, 1 << 30),
    "jaccard_score_5-6": (0, 6),
    "jaccard_score_5": (5, 5),
    "jaccard_score_6": (6, 6),
    "jaccard_score_10": (10, 10),
    "jaccard_score_12": (12, 12),
    "avg_jaccard_score": (0, 1 << 30),
}


@dataclass(frozen=True)
class Question:
    """A cue and its candidate images, files below the task's folder; `right` says which of them belong to it."""

    item: str
    cue: str
    candidates: tuple[str, ...]
    right: tuple[bool, ...]

    @property
    def prompt(self) -> str:
        """The text that stands for the cue."""
        cue = self.cue.lower()
        return f"{'An' if cue[0] in 'aeiou' else 'A'} {cue}"


def read_questions(folder: str) -> list[Question]:
    """The questions in the table's order, `questions/ID`. Raises ConfigError with `file:line`, or naming the images."""
    path = storage.join(folder, QUESTIONS_FILE)
    files: dict[str, str] = {}
    for name in folders.list_images(storage.join(folder, IMAGES_FOLDER)):
        stem = posixpath.splitext(name)[0]
        if folders.is_image(name) and stem in files:
            raise ConfigError(f"{folder}/{IMAGES_FOLDER}: {name} and {files[stem]}, expected one image of {stem}")
        if folders.is_image(name):
            files[stem] = name
    questions: list[Question] = []
    missing: dict[str, None] = {}
    seen: set[str] = set()
    for line, row in folders.read_rows(path, ("ID", "cue", "candidates", "associations")):
        place = f"{path}:{line}"
        candidates, associations = (
            _names(row[column], f"{place}: {column}") for column in ("candidates", "associations")
        )
        right = tuple(candidate in set(associations) for candidate in candidates)
        if not row["cue"].strip():
            raise ConfigError(f"{place}: cue is blank, expected a text")
        if not any(right):
            raise ConfigError(f"{place}: none of the candidates is among the associations, expected at least one")
        if row["ID"] in seen:
            raise ConfigError(f"{place}: a second ID {row['ID'][:40]}, expected each once")
        seen.add(row["ID"])
        missing |= dict.fromkeys(candidate for candidate in candidates if candidate not in files)
        images = tuple(f"{IMAGES_FOLDER}/{files.get(candidate, '')}" for candidate in candidates)
        questions.append(Question(f"questions/{row['ID']}", row["cue"].strip(), images, right))
    if missing:
        some = ", ".join(list(missing)[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise ConfigError(f"{folder}/{IMAGES_FOLDER} lacks images of {some}, expected one for each candidate of {path}")
    if not questions:
        raise ConfigError(f"{path}: no questions, expected at least one")
    return questions


def _names(text: str, place: str) -> list[str]:
    try:
        names = json.loads(text)
    except ValueError:
        names = None
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"{place} = {text[:80]!r}, expected a JSON list of words")
    return names


def jaccard(scores: Sequence[float], right: Sequence[bool]) -> float:
    """The Jaccard index of the right candidates and as many with the highest scores, 0..1."""
    num = sum(right)
    taken = sorted(range(len(scores)), key=scores.__getitem__)[-num:]
    both = sum(right[index] for index in taken)
    return both / (2 * num - both)


def association_metrics(jaccard_Q: Sequence[float], candidates_Q: Sequence[int]) -> dict[str, float | None]:
    """{jaccard_score_10-12, .., avg_jaccard_score}: means over questions by their number of candidates, each 0..1.

    None where no question has so many.
    """
    found: dict[str, float | None] = {}
    for name, (least, most) in SIZES.items():
        values = [value for value, num in zip(jaccard_Q, candidates_Q, strict=True) if least <= num <= most]
        found[name] = math.fsum(values) / len(values) if values else None
    return found


def association_chance(questions: Iterable[Question]) -> dict[str, float | None]:
    """The same metrics for guessing: the expected Jaccard index of a random choice (hypergeometric)."""
    pairs = [(len(question.right), sum(question.right)) for question in questions]
    return association_metrics([_expected(*pair) for pair in pairs], [num for num, _ in pairs])


def _expected(num: int, right: int) -> float:
    ways = ((both, math.comb(right, both) * math.comb(num - right, right - both)) for both in range(right + 1))
    return sum(both / (2 * right - both) * count for both, count in ways) / math.comb(num, right)
