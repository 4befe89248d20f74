"""A classifier of captions, trained on sets that the user gives: good against bad, or one topic against others.

The classifier is fastText's: Joulin et al., "Bag of Tricks for Efficient Text Classification", 2016 (arXiv 1607.01759).
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import Field

from pipeline.core import exchange, storage
from pipeline.core.errors import ConfigError, WinnowError, one_line, suggestion
from pipeline.core.log import logger
from pipeline.core.passes import Passes
from stages.base import Batch, LoadContext, Stage
from stages.pool_blocks import Block

LABEL = "__LABEL__"  # no word of a caption starts like this, as they are lower-case
END = "</s>"  # fastText's word at the end of each line
MODEL = "model.bin"
BUCKETS = 200_000  # of word n-grams, as in fastText's tutorial; its default of 2,000,000 takes ten times the memory
HELD_OUT_EVERY = 10
MIN_CAPTIONS = 50  # of a set: 5 of them are held out


@dataclass(frozen=True)
class CaptionClassifier(Stage):
    """The set that the caption is most like, and the probability of that one or of the one in `score_of`.

    A caption is lower-cased and its blanks are collapsed, in training as in prediction; a line that is in its set
    already counts once. Of each set every tenth caption, in the order of a hash, is held out: the record says how many
    of these are told right (`held_out_accuracy`, beside `largest_set_fraction`, which saying the largest set always
    would reach) and what is taken for what (`held_out_confusion`). A set's probability grows with its share of the
    captions, so sets of like size are fair. The model is the file fit/model.bin of the stage's artifact. It has the
    same bytes for the same sets, parameters, build of fastText and kind of processor.

    Args:
        sets: {label: path of a UTF-8 text file, one caption a line}, two or more. A caption in two sets is an error.
        score_of: the label whose probability is the score; empty: that of the likeliest label.
        epochs: how often each caption is seen; 25 as in fastText's tutorial.
        learning_rate: of the first step, falling to 0; 0.1 is fastText's default.
        word_ngrams: most words of a feature; 2 as in the paper.
        dimensions: of the features; 10 as in the paper.
        min_count: words that the sets have less often are left out; 1 is fastText's default.
        seed: of the order of the captions, of what is held out, and of the first weights.

    Cost: training sees about 100,000
    captions a second on one core, 25 epochs of 23,000 take 4 s; it holds the sets' text and 4 x dimensions x (words +
    200,000) bytes, every worker the latter; then about 75,000 captions a second and core. What the pool holds is of no
    consequence.
    """

    sets: Mapping[str, str]
    score_of: str = ""
    epochs: Annotated[int, Field(ge=1)] = 25
    learning_rate: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 0.1
    word_ngrams: Annotated[int, Field(ge=1, le=10)] = 2
    dimensions: Annotated[int, Field(ge=1, le=1000)] = 10
    min_count: Annotated[int, Field(ge=1)] = 1
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "caption"
    adds: ClassVar[Mapping[str, str]] = {"caption_class": "string", "caption_class_score": "float32"}
    whole_pool: ClassVar[bool] = True
    batch_size: ClassVar[int] = 2048

    def external_files(self) -> Mapping[str, str]:
        place = "stages.caption_classifier"
        if len(self.sets) < 2:
            raise ConfigError(f"{place}.sets has {len(self.sets)} labels, expected two or more: {{label: path}}")
        for label, path in self.sets.items():
            if label.split() != [label]:
                raise ConfigError(f"{place}.sets: the label '{label}', expected one word")
            if not storage.exists(path) or storage.is_folder(path):
                raise ConfigError(f"{place}.sets.{label} = {path}, expected a text file of one caption a line")
        if self.score_of and self.score_of not in self.sets:
            hint = suggestion(self.score_of, self.sets)
            raise ConfigError(f"{place}.score_of = {self.score_of}, expected a label of sets.{hint}")
        return {f"sets.{label}": path for label, path in self.sets.items()}

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """How large the sets are, and how well captions that were held out are told apart."""
        made = passes.run("training", write_model, [(self, storage.join(passes.folder, MODEL))])
        notes = exchange.read_notes(made.paths)
        labels = sorted(self.sets)
        confusion = {label: {other: notes.get(_pair(label, other), 0) for other in labels} for label in labels}
        held_out = {label: sum(confusion[label].values()) for label in labels}
        total = sum(held_out.values())
        accuracy = sum(confusion[label][label] for label in labels) / total
        largest = max(held_out.values()) / total
        logger.info(
            f"caption_classifier: {100 * accuracy:.1f} % of {total:,} held-out captions told right "
            f"(always saying the largest set: {100 * largest:.1f} %)"
        )
        return {
            "set_captions": {label: notes[label] for label in labels},
            "held_out_captions": held_out,
            "held_out_accuracy": accuracy,
            "held_out_confusion": confusion,
            "largest_set_fraction": largest,
        }

    def load(self, context: LoadContext) -> Any:
        """The trained model."""
        import fasttext

        path = storage.join(context.fit_path or "", MODEL)
        if not storage.is_url(path):
            return fasttext.load_model(path)
        with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
            local = os.path.join(folder, MODEL)
            storage.write_bytes(local, storage.read_bytes(path))
            return fasttext.load_model(local)

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        return dict(zip(self.adds, predicted(state, batch.columns["caption"], self.score_of), strict=True))


def normalised(caption: str) -> str:
    """The caption in lower case, blanks and newlines collapsed, without lone surrogates, which fastText can't take."""
    return " ".join(caption.lower().split()).encode("utf-8", "ignore").decode()


def predicted(model: Any, captions: Sequence[str], score_of: str) -> tuple[list[str], list[float]]:
    """The likeliest label of each caption, and the probability of `score_of`, or of that label where it is empty."""
    # The list form works with every build of fastText and numpy.
    labels, probabilities = model.predict([normalised(caption) for caption in captions], k=-1 if score_of else 1)
    classes = [found[0].removeprefix(LABEL) for found in labels]
    places = [found.index(LABEL + score_of) for found in labels] if score_of else [0] * len(classes)
    # It may say 1.00001.
    return classes, [min(float(found[at]), 1.0) for found, at in zip(probabilities, places, strict=True)]


def write_model(stage: CaptionClassifier, model_path: str, path: str) -> None:
    """None; writes the trained model, and then a file of counts: captions of each set, and of each pair of labels.

    Raises:
        WinnowError: a set that is no text, too small, or that shares a caption with another; training failed.
    """
    import fasttext

    sets = read_sets(stage.sets)
    ordered = {label: sorted(captions, key=lambda text: _hash(text, stage.seed)) for label, captions in sets.items()}
    train = [(text, label) for label, texts in ordered.items() for at, text in enumerate(texts) if at % HELD_OUT_EVERY]
    train.sort(key=lambda pair: _hash(pair[0], stage.seed))
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        lines = os.path.join(folder, "captions.txt")
        with open(lines, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(f"{LABEL}{label} {text}\n" for text, label in train)
        try:
            model = fasttext.train_supervised(
                lines,
                lr=stage.learning_rate,
                dim=stage.dimensions,
                epoch=stage.epochs,
                minCount=stage.min_count,
                wordNgrams=stage.word_ngrams,
                bucket=BUCKETS,
                seed=stage.seed,
                label=LABEL,
                loss="softmax",
                thread=1,  # with more, weights depend on who comes first
                verbose=0,
            )
        except (ValueError, RuntimeError, MemoryError) as error:
            raise WinnowError(
                f"stage caption_classifier: training on {', '.join(stage.sets.values())} with "
                f"learning_rate = {stage.learning_rate} failed: {one_line(error)}"
            ) from error
    if not set(model.words) - {END}:
        raise WinnowError(f"stage caption_classifier: min_count = {stage.min_count} leaves no word of the sets")
    with storage.write_file(model_path) as temporary:
        model.save_model(temporary)
    notes = {label: len(captions) for label, captions in sets.items()}
    for label, texts in ordered.items():
        for found in predicted(model, texts[::HELD_OUT_EVERY], "")[0]:
            notes[_pair(label, found)] = notes.get(_pair(label, found), 0) + 1
    exchange.write(path, {}, notes=notes)


def read_sets(paths: Mapping[str, str]) -> dict[str, list[str]]:
    """{label: its different captions, normalised}. Raises WinnowError: see write_model."""
    owners: dict[str, str] = {}
    shared: dict[tuple[str, str], list[str]] = {}
    for label, path in paths.items():
        for caption in _captions(path, label):
            owner = owners.setdefault(caption, label)
            if owner != label:
                shared.setdefault((owner, label), []).append(caption)
    for (one, other), captions in shared.items():
        raise WinnowError(
            f"stage caption_classifier: sets.{one} and sets.{other} share {len(set(captions))} captions, such as "
            f"'{captions[0][:80]}'; expected each in one set"
        )
    sets: dict[str, list[str]] = {label: [] for label in paths}
    for caption, label in owners.items():
        sets[label].append(caption)
    for label, captions in sets.items():
        if len(captions) < MIN_CAPTIONS:
            raise WinnowError(
                f"stage caption_classifier: sets.{label} = {paths[label]} has {len(captions)} different captions, "
                f"expected {MIN_CAPTIONS} or more"
            )
    return sets


def _captions(path: str, label: str) -> Iterator[str]:
    for number, line in enumerate(storage.read_bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        try:
            caption = normalised(line.decode())
        except UnicodeDecodeError as error:
            place = f"stage caption_classifier: sets.{label} = {path}, line {number}"
            raise WinnowError(f"{place}: {one_line(error)}, expected UTF-8 text") from error
        if caption:
            yield caption


def _hash(caption: str, seed: int) -> tuple[bytes, str]:
    return hashlib.blake2b(caption.encode(), digest_size=8, salt=seed.to_bytes(8, "little")).digest(), caption


def _pair(label: str, found: str) -> str:
    return f"{label} {found}"  # labels have no blanks
