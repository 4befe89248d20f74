"""The caption's language by Google's CLD3, which LAION-2B was filtered with and DataComp's laion2b filter repeats."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stages.base import Batch, LoadContext, Stage

PACKAGE = "gcld3"
MAX_NUM_BYTES = 1000  # of a caption that count; with 0 as the least these are DataComp's settings


@dataclass(frozen=True)
class LanguageCld3(Stage):
    """Most likely language (CLD3's code, a BCP 47 tag such as `en` or `zh-Latn`) and its probability.

    Newlines count as blanks, as in DataComp (baselines/apply_filter.py), whose filter laion2b is
    `where: [cld3_language == en]` with a CLIP B/32 score of at least 0.28. CLD3 is made for longer texts: of DataComp's
    captions it calls 20 % English where fastText calls 49 %, and one without letters `ja`. Without the package nothing
    takes its place. Cost: about 13,000 captions a second and core.
    """

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "caption"
    adds: ClassVar[Mapping[str, str]] = {"cld3_language": "string", "cld3_probability": "float32"}
    batch_size: ClassVar[int] = 2048

    def unavailable(self) -> str:
        if importlib.util.find_spec(PACKAGE) is None:
            return (
                f"the package {PACKAGE} is not there: `uv pip install cld3-py` has wheels of it; gcld3 itself is built "
                "from source and needs protobuf's compiler and headers"
            )
        return super().unavailable()

    def load(self, context: LoadContext) -> Any:
        import gcld3

        return gcld3.NNetLanguageIdentifier(min_num_bytes=0, max_num_bytes=MAX_NUM_BYTES)

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        # Lone surrogates can't be passed to it.
        texts = [text.replace("\n", " ").encode("utf-8", "ignore").decode() for text in batch.columns["caption"]]
        found = [state.FindLanguage(text=text) for text in texts]
        return {
            "cld3_language": [result.language for result in found],
            "cld3_probability": [result.probability for result in found],
        }
