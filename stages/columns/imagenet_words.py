"""Words of the caption that name an ImageNet-21k class by their first meaning: DataComp's text_based filter."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.core import storage
from pipeline.core.errors import WinnowError, one_line
from stages import wordnet
from stages.base import Batch, LoadContext, Stage

CLASS_ID = re.compile(r"[a-z]\d{8}")  # n02084071: part of speech and offset in WordNet 3.0


@dataclass(frozen=True)
class ImagenetWords(Stage):
    """How many words of the caption mean, first of all, something that is in a list of WordNet synsets.

    Words are what `str.split()` gives, punctuation included, so `dog,` is none. A word counts when its first synset's
    offset is in the list; whether it is a noun is not asked, as in DataComp (baselines/apply_filter.py), whose filter
    text_based is `where: [language == en, caption_imagenet_words > 0]`.

    Args:
        wordnet: the folder of WordNet 3.0's dictionary files (index.noun, noun.exc, ...).
        ids: a text file with a synset a line, such as n02084071.

    Cost: about 30,000 captions a second and core; 45 MB of memory.
    """

    wordnet: str
    ids: str

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "caption"
    adds: ClassVar[Mapping[str, str]] = {"caption_imagenet_words": "int32"}
    assets: ClassVar[Mapping[str, str]] = {
        "wordnet": "nltk.download('wordnet'), then unzip its corpora/wordnet.zip and name that folder; or the folder "
        "dict of WNdb-3.0 from https://wordnet.princeton.edu/download",
        "ids": "imagenet21k_wordnet_ids.txt, release v0.1.0-alpha of https://github.com/sagadre/datacomp_baseline_assets",
    }
    batch_size: ClassVar[int] = 2048

    def external_files(self) -> Mapping[str, str]:
        return {f"wordnet.{name}": storage.join(self.wordnet, name) for name in wordnet.FILES} | {"ids": self.ids}

    def load(self, context: LoadContext) -> Any:
        return wordnet.WordNet(self.wordnet), read_ids(self.ids)

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        words, offsets = state
        first = words.first_synset_offset
        return {
            "caption_imagenet_words": [
                sum(first(word) in offsets for word in caption.split()) for caption in batch.columns["caption"]
            ]
        }


def read_ids(path: str) -> frozenset[int]:
    """The offsets in a file of synsets. Raises WinnowError for a line that is not such as n02084071."""
    try:
        lines = storage.read_bytes(path).decode("ascii").splitlines()
    except (OSError, ValueError) as error:
        raise WinnowError(f"stages.imagenet_words.ids = {path} can't be read: {one_line(error)}") from error
    if not lines:
        raise WinnowError(f"stages.imagenet_words.ids = {path} is empty, expected lines of n and 8 digits")
    for number, line in enumerate(lines, 1):
        if not CLASS_ID.fullmatch(line.strip()):
            raise WinnowError(
                f"stages.imagenet_words.ids = {path}: line {number} = {line[:80]}, expected n and 8 digits"
            )
    return frozenset(int(line.strip()[1:]) for line in lines)
