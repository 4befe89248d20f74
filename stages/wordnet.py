"""WordNet 3.0, read from its own dictionary files: which synset a word means first, as NLTK 3.8.1 answers.

A folder of WordNet has a file of lemmas and one of irregular forms for each part of speech:

    index.noun      dog n 7 5 @ ~ #m #p %p 7 1 02084071 10114209 ...    lemma, part of speech, numbers of synsets and
                    pointer kinds, these kinds, number of synsets again, how many are ranked, the offsets of the synsets
    noun.exc        abaci abacus                                        irregular form, its lemmas

The rule is that of NLTK's `synsets`: parts of speech in the order noun, verb, adjective (satellites are among them),
adverb; in each the lemmas that `_morphy` finds; of the first lemma its first synset. `_morphy` of NLTK 3.8.1, which
DataComp pins, takes endings off again and again until a lemma is found; that of 3.10 does so once. Only offsets are
asked for, and these are in the index: the data files are not read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from pipeline.core import storage
from pipeline.core.errors import WinnowError, one_line

RELEASE = "WordNet 3.0 Copyright"  # in the licence that opens each index file
WORD_CHARS_MAX = 256  # the longest lemma has 71 characters
WORDS_REMEMBERED = 1 << 17

# {file ending: (part of speech in the index, [(ending, what takes its place)])}, in NLTK's order.
ENDINGS: Mapping[str, tuple[str, Sequence[tuple[str, str]]]] = {
    "noun": (
        "n",
        (
            ("s", ""),
            ("ses", "s"),
            ("ves", "f"),
            ("xes", "x"),
            ("zes", "z"),
            ("ches", "ch"),
            ("shes", "sh"),
            ("men", "man"),
            ("ies", "y"),
        ),
    ),
    "verb": (
        "v",
        (("s", ""), ("ies", "y"), ("es", "e"), ("es", ""), ("ed", "e"), ("ed", ""), ("ing", "e"), ("ing", "")),
    ),
    "adj": ("a", (("er", ""), ("est", ""), ("er", "e"), ("est", "e"))),
    "adv": ("r", ()),
}
FILES = tuple(name for ending in ENDINGS for name in (f"index.{ending}", f"{ending}.exc"))


class _PartOfSpeech(NamedTuple):
    first_offsets: Mapping[str, int]  # lemma -> its first synset
    irregular: Mapping[str, Sequence[str]]  # form -> its lemmas
    endings: Sequence[tuple[str, str]]


class WordNet:
    """The words of a WordNet folder. Files are read when it is built: 6 MB, held in about 15 MB."""

    def __init__(self, folder: str):
        """Raises WinnowError when a file is missing or is not WordNet 3.0's."""
        self._parts = [
            _PartOfSpeech(
                _read_index(storage.join(folder, f"index.{ending}"), letter),
                _read_exceptions(storage.join(folder, f"{ending}.exc")),
                endings,
            )
            for ending, (letter, endings) in ENDINGS.items()
        ]
        self._remembered = lru_cache(WORDS_REMEMBERED)(self._look_up)

    def first_synset_offset(self, word: str) -> int | None:
        """What `nltk.corpus.wordnet.synsets(word)[0].offset()` is in NLTK 3.8.1; None where it has no synset.

        Offsets of different parts of speech may be equal. A word of more than WORD_CHARS_MAX characters has no synset
        here; NLTK would take its endings off one by one.
        """
        return self._remembered(word) if len(word) <= WORD_CHARS_MAX else None

    def _look_up(self, word: str) -> int | None:
        form = word.lower()
        for part in self._parts:
            lemma = _first_lemma(form, part)
            if lemma is not None:
                return part.first_offsets[lemma]
        return None


def _first_lemma(form: str, part: _PartOfSpeech) -> str | None:
    """The first of the lemmas that NLTK 3.8.1's `_morphy` gives, or None."""
    lemmas = part.first_offsets
    if form in part.irregular:
        return _first_in(lemmas, (form, *part.irregular[form]))  # no ending is taken off such a form
    if form in lemmas:
        return form
    forms = [form]
    while forms := _shortened(forms, part.endings):
        found = _first_in(lemmas, forms)
        if found is not None:
            return found
    return None


def _shortened(forms: list[str], endings: Sequence[tuple[str, str]]) -> list[str]:
    """The forms with one ending less, in the order of forms, then endings.

    The same form comes out of several rules: once is enough, and keeps their number from doubling each round.
    """
    found = []
    for form in forms:
        for ending, instead in endings:
            if form.endswith(ending):
                shorter = form[: -len(ending)] + instead
                if shorter not in found:
                    found.append(shorter)
    return found


def _first_in(lemmas: Mapping[str, int], forms: Iterable[str]) -> str | None:
    return next((form for form in forms if form in lemmas), None)


def _read_index(path: str, letter: str) -> dict[str, int]:
    """{lemma: offset of its first synset}."""
    first_offsets: dict[str, int] = {}
    is_release = False
    for number, line in enumerate(_lines(path), 1):
        if line.startswith(" "):
            is_release |= RELEASE in line
            continue
        try:
            lemma, part, num_synsets, num_pointers, *rest = line.split()
            offsets = rest[int(num_pointers) + 2 :]
            if part != letter or not offsets or len(offsets) != int(num_synsets):
                raise ValueError
            first_offsets[lemma] = int(offsets[0])
        except ValueError as error:
            raise WinnowError(
                f"{path}: line {number} is no line of a WordNet index of part of speech {letter}"
            ) from error
    if not is_release:
        raise WinnowError(f"{path}, expected the index of WordNet 3.0, whose licence opens the file")
    return first_offsets


def _read_exceptions(path: str) -> dict[str, tuple[str, ...]]:
    """{irregular form: its lemmas}."""
    irregular: dict[str, tuple[str, ...]] = {}
    for number, line in enumerate(_lines(path), 1):
        form, *lemmas = line.split() or [""]
        if not lemmas:
            raise WinnowError(f"{path}: line {number} = {line}, expected an irregular form and its lemmas")
        irregular[form] = tuple(lemmas)
    return irregular


def _lines(path: str) -> list[str]:
    try:
        return storage.read_bytes(path).decode("utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise WinnowError(f"{path}, expected a file of WordNet 3.0: {one_line(error)}") from error
