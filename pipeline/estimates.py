"""What each step of a plan will write and take, before it runs: as last time where there was one, else reckoned.

Good to a factor of two or three, and never more exact than it is: two digits, and nothing where nothing is known. Rows
come from records, from footers and beginnings of source files, from what a config says; bytes and hours from finished
artifacts below the same root that are of the same sort, else from the constants below.

What a strategy's comparisons keep nobody knows before: half is assumed, unless the same strategy was chosen by before.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import clip_model, storage
from pipeline.core.images import EXTENSIONS
from pipeline.core.log import short_count
from pipeline.steps import Plan, Step, TaskImages, Training
from stages.base import Stage
from stages.ingest import demo_world, sources
from stages.ingest.fetch.settings import DownloadSettings
from stages.ingest.sources import Source
from stages.selection import strategies as algebra

if TYPE_CHECKING:
    from pipeline.states import Status

# Every constant, with where it was measured. Seconds are of one CPU core.

# CPU seconds for a million rows, columns and embeddings there already: docs/filters.md and docs/duplicates.md, from
# benchmarks/filters.py and benchmarks/duplicates.py; `hashes` on the demo's pictures (pHash of 64 px).
STAGE_CPU_S = {
    "image_stats": 5,
    "caption_stats": 7,
    "caption_patterns": 36,
    "caption_frequency": 11,
    "language": 43,
    "imagenet_words": 40,
    "language_cld3": 75,
    "domain_list": 12,
    "metaclip": 28,
    "caption_classifier": 24,
    "mix": 6,
    "soft_cap": 10,
    "classifier_head": 40,
    "clusters": 45,
    "density_pruning": 46,
    "normsim_d": 1_000,
    "d2": 900,
    "hashes": 350,
    "minhash": 24,
    "caption_duplicates": 90,
    "tmars": 900_000,
}
SELECT_S = 0.8e-6  # a row, of each choice: benchmarks/selection.py over 12.8M rows (docs/datacomp.md)
DRAW_S = 3e-3  # a pair of the demo world
ROW_S = 150e-6  # a row that is read, checked and written to a tar, beside decoding its image: the demo's train set
DECODE_S, DECODE_S_A_BYTE = 0.2e-3, 3e-8  # an image: the demo's of 2.4 kB; JPEGs of 960 px (docs/downloads.md)
RESIZE_S = 4e-3  # a downloaded image that is resized and stored, beside decoding: docs/downloads.md
PREPARE_S = 0.35e-3  # a pair on its way into a model, beside decoding: docs/training_speed.md
CPU_FLOP_PER_S = 40e9  # a core, forward and backward: 48e9 and 52e9 in docs/training_speed.md, 35e9 in the demo
# A GPU, captions not trimmed: an A100 takes 4 hours for DataComp's scale small (Gadre et al., arXiv 2304.14108), which
# are 39e12; the larger scales come to about the same. Not measured here; an H100 may do two to three times as much.
GPU_FLOP_PER_S = 40e12
MEAN_TOKENS = 20  # of a caption, without padding: 14 in Flickr8k, 13 words in docs/duplicates.md

# Bytes, from the records of configs/demo.yaml and tests/tiny.yaml.
TAR_SAMPLE_BYTES = 3_000  # of a sample in a tar beside its image: headers, padding, .txt, .json
DEMO_IMAGE_BYTES = 2_200
ROW_BYTES = 100  # of a row of a pool's parquet
FILE_BYTES = 1_000  # of any parquet file, beside its rows
INDEX_BYTES = 34  # of a sample in a train set's index
UID_BYTES = 17  # of a row in a column file: 16 random bytes, as compressed text
COLUMN_BYTES = {"bool": 0.2, "int32": 2, "int64": 3, "float32": 3.5, "string": 6, "binary": 512}  # of a value
HASH_BYTES = {"_sha256": 33, "_phash": 9, "_group": 3, "_survivor": 3}  # of a string, by the end of its name
METRICS_BYTES = 410  # of a training step's line
CHOICE_BYTES = 4  # of a row in a selection, beside
UIDS_BYTES = 16  # of a chosen row
PREDICTION_BYTES = 8  # of an image in results, beside their 1,500
GALLERY_BYTES, PROFILE_BYTES, SHARES_BYTES, RESULTS_BYTES = 12e3, 110e3, 5e3, 1_500
DEMO_TASKS_BYTES, DEMO_RETRIEVAL_IMAGES = 14.4e6, 180
DOWNLOADED_BYTES = 32e3  # of an image at 512 px: DataComp's pools, 450 GB of tars for 12.8M pairs (its README)
DOWNLOADED_SHARE = 0.85  # of URLs that still answer; a guess, as it falls with a list's age
STATE_BYTES = 12  # of a parameter in a step checkpoint: itself and two moments, in float32
KEPT_STATES = 3  # two, and the one that is being written

KEPT_BY_RULES = 0.5  # of the rows, by a strategy's comparisons or a stage's verdict
READ_BYTES = 1 << 20  # of a tar or a table, to tell how large a sample is
FOOTERS = 4  # of parquet files that are read; the rows of the others follow from their sizes
UNITS = ("written_bytes", "cpu_hours", "gpu_hours")


@dataclass(frozen=True)
class Estimate:
    """What a step will leave, and take; None where nothing can be known. GPU-hours are 0 for a step without GPUs.

    `passing_bytes` are below the root only while it runs, and `file_bytes` is the largest file that it writes: where
    the root is an object store, a worker has it in its temporary folder first.
    """

    written_bytes: float | None = None
    cpu_hours: float | None = None
    gpu_hours: float | None = None
    passing_bytes: float = 0.0
    file_bytes: float = 0.0


@dataclass(frozen=True)
class _Rows:
    """Of a pool: its rows, those with an image (of a table: all), their mean size, and the number of shards."""

    rows: float
    ok: float
    image_bytes: float
    shards: float

    @property
    def tar_bytes(self) -> float:
        return self.ok * (self.image_bytes + TAR_SAMPLE_BYTES) if self.image_bytes else 0.0

    @property
    def decode_s(self) -> float:
        return DECODE_S + DECODE_S_A_BYTE * self.image_bytes


Records = Mapping[str, Sequence[Mapping[str, Any]]]


def estimate(plan: Plan, statuses: Mapping[str, Status], records: Records | None = None) -> dict[str, Estimate]:
    """{step: what it will write and take} of every step that is to be done, now or once its inputs are there.

    Args:
        records: {kind: records} of finished artifacts below the root, to go by.
    """
    return _Reckoning(plan, statuses, records or {}).estimates


def total(estimates: Iterable[Estimate]) -> Estimate:
    """The sum of what is known; a figure is None where nothing is."""
    found = list(estimates)
    known = {unit: [value for one in found if (value := getattr(one, unit)) is not None] for unit in UNITS}
    return Estimate(**{unit: sum(values) if values else None for unit, values in known.items()})


def columns(found: Estimate | None) -> tuple[str, str, str]:
    """(bytes, time of CPUs, of GPUs) as `--plan` prints them: `~1.2 GB`, `~18 min`; `?` where nothing is known."""
    if found is None:
        return "", "", ""
    written = "?" if found.written_bytes is None else f"~{size(found.written_bytes)}"
    return written, _time_text(found.cpu_hours), _time_text(found.gpu_hours)


def _time_text(hours: float | None) -> str:
    if hours is None:
        return "?"
    for unit, name in ((1.0, "h"), (1 / 60, "min"), (1 / 3600, "s")):
        if hours >= unit:
            return f"~{two_digits(hours / unit)} {name}"
    return "<1 s" if hours else "0"


def summary(estimates: Iterable[Estimate]) -> str:
    """`~1.2 GB written, ~18 min of CPUs, ~40 h of GPUs`: the sums of what is known."""
    texts = zip(columns(total(estimates)), ("written", "of CPUs", "of GPUs"), strict=True)
    return ", ".join(f"{text} {words}" for text, words in texts if text not in ("?", "0"))


def size(num_bytes: float) -> str:
    """`1.2 GB`: two digits."""
    rounded = float(f"{num_bytes:.1e}")
    text = short_count(rounded) if rounded < 1e12 else f"{rounded / 1e12:.3g}T"
    number, letter = (text[:-1], text[-1]) if text[-1].isalpha() else (text, "")
    return f"{number} {letter.replace('B', 'G')}B"


def two_digits(value: float) -> str:
    """`1.2`, `34`, `340`, `12,000`."""
    rounded = float(f"{value:.1e}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:.2g}"


class _Reckoning:
    """One pass over the steps in their order, with what is known of each by then."""

    def __init__(self, plan: Plan, statuses: Mapping[str, Status], records: Records):
        self.plan, self.statuses, self.records = plan, statuses, records
        self.pools: dict[str, _Rows | None] = {}
        self.samples: dict[str, float | None] = {}  # of selections and train sets
        self.images: dict[str, float | None] = {}  # of tasks
        self.costs: dict[str, Cost | None] = {}  # of models
        self.estimates: dict[str, Estimate] = {}
        for name, step in plan.steps.items():
            status = statuses[name]
            if status.state not in ("done", "unavailable"):
                self.estimates[name] = self._of(name, step)
            if status.record is not None:  # a part of a finished one may be to be done again
                self._learn(name, step, status.record)

    def _learn(self, name: str, step: Step, record: Mapping[str, Any]) -> None:
        facts = record["facts"]
        if step.kind in ("pool", "urls"):
            self.pools[name] = _rows_of(record)
        elif step.kind == "selection":
            self.samples[name] = facts["kept_samples"]
        elif step.kind == "train_set":
            self.samples[name] = facts["num_samples"]
        elif step.kind == "task_images":
            self.images[step.work.task] = facts["images"]

    def _of(self, name: str, step: Step) -> Estimate:
        gpus, cpus = (getattr(self.plan.config.resources(step.resources), key) for key in ("gpus", "cpus"))
        if isinstance(step.work, Stage):
            return self._of_stage(step, gpus, cpus)
        if step.kind == "checkpoint":
            return self._of_training(step, gpus, cpus)
        if step.kind == "results":
            return self._of_results(step, gpus, cpus)
        found = {
            "pool": self._of_pool,
            "urls": self._of_pool,
            "selection": self._of_selection,
            "train_set": self._of_train_set,
            "task_images": self._of_task_images,
        }.get(step.kind)
        if found is not None:
            return found(name, step)
        pool_rows = self.pools.get(step.inputs.get("pool", ""))
        looking_s = SELECT_S * pool_rows.rows if pool_rows else None
        known = {
            "tasks": (DEMO_TASKS_BYTES, DRAW_S * 3_000),
            "gallery": (GALLERY_BYTES, looking_s),
            "shares": (SHARES_BYTES, looking_s),
            "profile": (PROFILE_BYTES, looking_s),
        }
        written, seconds = known.get(step.kind, (None, None))
        return Estimate(written, _hours(seconds), 0.0)

    # Pools and what is chosen from them.

    def _of_pool(self, name: str, step: Step) -> Estimate:
        settings = step.work if isinstance(step.work, DownloadSettings) else None
        if settings is not None:
            found, seconds = self._downloaded(step, settings)
        else:
            found, seconds = self._read(step)
        self.pools[name] = found
        if found is None:
            return Estimate(gpu_hours=0.0)
        written = found.tar_bytes + found.rows * ROW_BYTES + found.shards * FILE_BYTES
        file_bytes = found.tar_bytes / max(1, found.shards)
        return Estimate(written, _hours(seconds), 0.0, file_bytes=file_bytes)

    def _read(self, step: Step) -> tuple[_Rows | None, float]:
        """The rows of a pool that is read from its sources, and the seconds that this takes."""
        rows, ok, image_bytes, seconds = 0.0, 0.0, 0.0, 0.0
        for source in step.work.values():
            if source.layout == sources.DEMO:
                own_rows, own_bytes = float(source.pairs or 0), float(DEMO_IMAGE_BYTES)
            else:
                try:
                    own_rows, own_bytes = _measured(source)
                except Exception:  # each store has error classes of its own; what can't be read now is not known
                    return None, 0.0
            rows += own_rows
            image_bytes += own_rows * own_bytes
            ok += own_rows
            seconds += own_rows * (DRAW_S if source.layout == sources.DEMO else ROW_S + (DECODE_S if own_bytes else 0))
        seconds += DECODE_S_A_BYTE * image_bytes
        rows, ok, seconds = (step.values["sample"] * value for value in (rows, ok, seconds))
        shards = -(-rows // step.values["shard_size"])
        return _Rows(rows, ok, step.values["sample"] * image_bytes / ok if ok else 0.0, shards), seconds

    def _downloaded(self, step: Step, settings: DownloadSettings) -> tuple[_Rows | None, float]:
        urls = self.pools.get(step.inputs["urls"])
        if urls is None:
            return None, 0.0
        asked = self.samples.get(step.inputs["selection"]) if "selection" in step.inputs else urls.rows
        before = self._most_like("pool", lambda record: record["identity"].get("download") == settings.identity())
        if before is not None and before["facts"]["ok_rows"]:
            known = _rows_of(before)
            share, image_bytes = known.ok / known.rows, known.image_bytes
        else:
            share = DOWNLOADED_SHARE
            image_bytes = DOWNLOADED_BYTES * (min(settings.image.size_px, 1024) / 512) ** 2
        ok = share * (urls.rows if asked is None else asked)
        seconds = ok * (RESIZE_S + DECODE_S + DECODE_S_A_BYTE * DOWNLOADED_BYTES * 4)
        return _Rows(urls.rows, ok, image_bytes, urls.shards), seconds

    def _of_selection(self, name: str, step: Step) -> Estimate:
        found = self.pools.get(step.inputs["pool"])
        if found is None:
            self.samples[name] = None
            return Estimate(gpu_hours=0.0)
        chosen, strategy, *_ = step.work
        wanted = step.values["strategy"]
        before = self._most_like("selection", lambda record: record["identity"].get("strategy") == wanted)
        if before is not None and before["facts"]["ok_rows"]:
            kept = found.ok * before["facts"]["kept_samples"] / before["facts"]["ok_rows"]
        else:
            kept = _kept(chosen, strategy, found.ok)
        self.samples[name] = kept
        written = kept * UIDS_BYTES + found.rows * CHOICE_BYTES + found.shards * FILE_BYTES
        return Estimate(written, _hours(SELECT_S * found.rows), 0.0)

    def _of_train_set(self, name: str, step: Step) -> Estimate:
        found, samples = self.pools.get(step.inputs["pool"]), self.samples.get(step.inputs["selection"])
        self.samples[name] = samples
        if found is None or samples is None:
            return Estimate(gpu_hours=0.0)
        sample_bytes = found.image_bytes + TAR_SAMPLE_BYTES
        written = samples * (sample_bytes + INDEX_BYTES) + FILE_BYTES
        file_bytes = min(samples, step.values["shard_size"]) * sample_bytes
        return Estimate(written, _hours(samples * (ROW_S + found.decode_s)), 0.0, file_bytes=file_bytes)

    # Stages.

    def _of_stage(self, step: Step, gpus: float, cpus: float) -> Estimate:
        found = self.pools.get(step.inputs["pool"])
        if found is None:
            return Estimate(gpu_hours=None if gpus else 0.0)
        fields, device = step.values["fields"], "cuda" if gpus else "cpu"
        same = [
            record
            for record in self.records.get(step.kind, ())
            if record["identity"].get("fields") == fields and record["facts"].get("rows")
        ]
        before = next((record for record in same if record["facts"].get("device") == device), None)
        written = None
        if same:
            written = _bytes_of(same[-1]) * found.rows / same[-1]["facts"]["rows"]
        else:
            widths = [self._value_bytes(step.work, column, kind) for column, kind in step.work.adds.items()]
            if None not in widths:
                written = found.rows * (UID_BYTES + sum(widths)) + found.shards * FILE_BYTES  # type: ignore[arg-type]
        if before is not None:
            scale = found.rows / before["facts"]["rows"]
            return Estimate(written, *(before["facts"][key] * scale for key in ("cpu_hours", "gpu_hours")))
        seconds = STAGE_CPU_S.get(step.kind)
        if step.kind == "clusters" and seconds is not None:  # it grows with their number, which a file may hide
            seconds = seconds * step.work.clusters / 1000 if step.work.clusters else None
        own_s = None if seconds is None else found.ok * seconds / 1e6
        if step.kind == "clip":
            cost = self._cost(*self._architecture(step.work.model))
            if cost is None:
                return Estimate(written, None, None if gpus else 0.0)
            flops = found.ok * (cost.image_flops + cost.text_flops(MEAN_TOKENS))
            return Estimate(written, *_time(flops, found.ok * (PREPARE_S + found.decode_s), gpus, cpus))
        if own_s is not None and step.work.reads in ("bytes", "pixels"):
            own_s += found.ok * (found.decode_s if step.work.reads == "pixels" else 0)
        if gpus:
            return Estimate(written, None, None)
        return Estimate(written, _hours(own_s), 0.0)

    def _value_bytes(self, stage: Stage, column: str, kind: str) -> float | None:
        if kind == "float16[]":
            return None if (dim := self._embedding_dim(stage)) is None else 2.0 * dim
        if kind == "string":
            return next((width for end, width in HASH_BYTES.items() if column.endswith(end)), COLUMN_BYTES[kind])
        return COLUMN_BYTES[kind]

    def _embedding_dim(self, stage: Stage) -> int | None:
        if not stage.uses_model:
            return None
        architecture, _ = self._architecture(stage.model)  # type: ignore[attr-defined]
        return clip_model.known_config(architecture).get("embed_dim")

    def _architecture(self, name: str) -> tuple[Any, int | None]:
        """(architecture, image size or None for its own) of one of the config's models."""
        model = self.plan.config.models[name]
        if model.recipe is None:
            return model.architecture or "", None
        trained: Training = self.plan.steps[f"model/{name}"].work
        return trained.recipe.model, trained.recipe.image_size_px

    def _cost(self, architecture: Any, image_size_px: int | None) -> Cost | None:
        key = repr((architecture, image_size_px))
        if key not in self.costs:
            self.costs[key] = cost_of(architecture, image_size_px)
        return self.costs[key]

    # Trainings and evaluations.

    def _of_training(self, step: Step, gpus: float, cpus: float) -> Estimate:
        recipe, source = step.work.recipe, self.plan.steps[step.inputs["train_set"]]
        pool_rows = self.pools.get(source.inputs["pool"])
        cost = self._cost(recipe.model, recipe.image_size_px)
        written = passing = file_bytes = None
        if cost is not None:
            weights = 4 * cost.num_parameters
            written = recipe.num_checkpoints * weights + METRICS_BYTES * recipe.num_steps
            passing, file_bytes = KEPT_STATES * STATE_BYTES * cost.num_parameters, STATE_BYTES * cost.num_parameters
        alike = {"model": recipe.identity()["model"], "image_size_px": recipe.image_size_px}
        device = "cuda" if gpus else "cpu"
        before = self._most_like(
            "checkpoint",
            lambda record: (
                {key: record["identity"].get("recipe", {}).get(key) for key in alike} == alike
                and record["facts"].get("device") == device
                and record["facts"].get("samples_seen")
            ),
        )
        more = {"passing_bytes": passing or 0.0, "file_bytes": file_bytes or 0.0}
        if before is not None:
            scale = recipe.samples_seen / before["facts"]["samples_seen"]
            return Estimate(written, *(before["facts"][key] * scale for key in ("cpu_hours", "gpu_hours")), **more)
        if cost is None:
            return Estimate(written, None, None if gpus else 0.0, **more)
        # Published rates are of captions that are padded to the context; on a CPU they were measured trimmed.
        tokens = cost.context_length if gpus else MEAN_TOKENS
        flops = 3 * (cost.image_flops * (1 - recipe.patch_dropout) + cost.text_flops(tokens))
        reading_s = PREPARE_S + (pool_rows.decode_s if pool_rows else DECODE_S)
        spent = _time(recipe.samples_seen * flops, recipe.samples_seen * reading_s, gpus, cpus)
        return Estimate(written, *spent, **more)

    def _num_images(self, task: str) -> float | None:
        """Of a task: as its step found, as it was published, as the demo draws it, or by the sizes of its tars."""
        if task not in self.images:
            data = self.plan.tasks[task]
            if data is None:
                self.images[task] = DEMO_RETRIEVAL_IMAGES if task == "retrieval" else demo_world.TASK_IMAGES
            elif data.task.images:
                self.images[task] = data.task.images
            else:
                tars = [storage.join(data.path, shard) for shard in data.shards if shard.endswith(".tar")]
                try:
                    self.images[task] = _tar_samples({path: storage.size_bytes(path) for path in tars})[0] or None
                except Exception:  # as of a pool's sources
                    self.images[task] = None
        return self.images[task]

    def _of_task_images(self, name: str, step: Step) -> Estimate:
        work: TaskImages = step.work
        num_images = self._num_images(work.task)
        cost = self._cost(work.recipe.model, work.recipe.image_size_px)
        if num_images is None or cost is None:
            return Estimate(gpu_hours=0.0)
        written = num_images * (3 * cost.image_size_px**2 + PREDICTION_BYTES)
        seconds = num_images * (PREPARE_S + DECODE_S + DECODE_S_A_BYTE * DOWNLOADED_BYTES)
        return Estimate(written, _hours(seconds), 0.0, file_bytes=min(written, 1e9))

    def _of_results(self, step: Step, gpus: float, cpus: float) -> Estimate:
        num_images = self._num_images(step.work)
        recipe = self.plan.steps[step.inputs["checkpoint"]].work.recipe
        cost = self._cost(recipe.model, recipe.image_size_px)
        written = None if num_images is None else RESULTS_BYTES + PREDICTION_BYTES * num_images
        if num_images is None or cost is None:
            return Estimate(written, None, None if gpus else 0.0)
        data = self.plan.tasks[step.work]
        num_texts = len(data.classnames) * len(data.templates) if data and data.classnames else num_images
        flops = num_images * cost.image_flops + num_texts * cost.text_flops(MEAN_TOKENS)
        return Estimate(written, *_time(flops, num_texts * PREPARE_S, gpus, cpus))

    def _most_like(self, kind: str, is_alike: Any) -> Mapping[str, Any] | None:
        """The last of the finished artifacts of a kind that is alike; the plan's own ones are among them."""
        own = [self.statuses[name].record for name, step in self.plan.steps.items() if step.kind == kind]
        found = [record for record in (*self.records.get(kind, ()), *own) if record is not None and is_alike(record)]
        return found[-1] if found else None


@dataclass(frozen=True)
class Cost:
    """What a CLIP of two transformers costs: parameters, and FLOPs of a forward pass, a multiply-add as two."""

    num_parameters: float
    image_size_px: int
    image_flops: float
    text_width: int
    text_layers: int
    text_mlp: float
    embed_dim: int
    context_length: int

    def text_flops(self, num_tokens: float) -> float:
        """Of one text of so many tokens, or of the whole context where that is shorter."""
        blocks = self.text_layers * _block_flops(min(num_tokens, self.context_length), self.text_width, self.text_mlp)
        return blocks + 2 * self.text_width * self.embed_dim


def cost_of(architecture: clip_model.Architecture, image_size_px: int | None = None) -> Cost | None:
    """What a model of the architecture costs; None where it is no CLIP of two transformers, or not known here.

    Args:
        image_size_px: overrides the architecture's own.
    """
    known = clip_model.known_config(architecture)
    if not known:
        return None
    vision, text, dim = known["vision_cfg"], known["text_cfg"], known["embed_dim"]
    size_px, layers = image_size_px or vision.get("image_size", 224), vision.get("layers", 12)
    is_plain = isinstance(layers, int) and isinstance(size_px, int)
    if not is_plain or vision.get("timm_model_name") or text.get("hf_model_name"):
        return None
    width, patch, mlp = vision.get("width", 768), vision.get("patch_size", 16), vision.get("mlp_ratio", 4)
    patches = (size_px // patch) ** 2
    image = patches * 6 * patch**2 * width + 2 * width * dim + layers * _block_flops(patches + 1, width, mlp)
    text_width, text_layers = text.get("width", 512), text.get("layers", 12)
    text_mlp, context = text.get("mlp_ratio", 4), text.get("context_length", 77)
    parameters = (3 * patch**2 + patches + 2 + dim) * width + layers * _block_parameters(width, mlp)
    parameters += (text.get("vocab_size", 49408) + context + dim) * text_width
    parameters += text_layers * _block_parameters(text_width, text_mlp)
    return Cost(parameters, size_px, image, text_width, text_layers, text_mlp, dim, context)


def _block_flops(tokens: float, width: int, mlp_ratio: float) -> float:
    return tokens * 2 * (4 + 2 * mlp_ratio) * width**2 + 4 * tokens**2 * width


def _block_parameters(width: int, mlp_ratio: float) -> float:
    return (4 + 2 * mlp_ratio) * width**2 + (9 + mlp_ratio) * width


def _time(flops: float, reading_s: float, gpus: float, cpus: float) -> tuple[float, float]:
    """(CPU-hours, GPU-hours): on a CPU passes and reading add up; beside a GPU its CPUs are taken as long as it is."""
    if not gpus:
        return (flops / CPU_FLOP_PER_S + reading_s) / 3600, 0.0
    gpu_hours = flops / GPU_FLOP_PER_S / 3600
    return max(gpu_hours * cpus / gpus, reading_s / 3600), gpu_hours


def _hours(seconds: float | None) -> float | None:
    return None if seconds is None else seconds / 3600


def _bytes_of(record: Mapping[str, Any]) -> int:
    return sum(entry["bytes"] for entry in record["files"].values())


def _rows_of(record: Mapping[str, Any]) -> _Rows:
    facts, files = record["facts"], record["files"]
    tars = sum(entry["bytes"] for name, entry in files.items() if name.endswith(".tar"))
    shards = sum(name.endswith(".parquet") for name in files)
    ok = facts["ok_rows"]
    image_bytes = max(0.0, tars / ok - TAR_SAMPLE_BYTES) if tars and ok else 0.0
    return _Rows(facts["rows"], ok if tars else facts["rows"], image_bytes, shards)


def _kept(chosen: Mapping[str, algebra.Strategy], name: str, ok: float) -> float:
    """About how many rows a strategy keeps of so many; what its parts keep is taken to overlap."""

    def kept(strategy: str) -> float:
        sizes = [ok]
        for rule in chosen[strategy].rules:
            if isinstance(rule, algebra.Top):
                sizes.append(rule.fraction * (kept(rule.within) if rule.within else ok))
            elif isinstance(rule, algebra.Random):
                around = kept(rule.within) if rule.within else ok
                sizes.append(kept(rule.as_many_as) if rule.as_many_as else (rule.fraction or 0) * around)
            elif isinstance(rule, algebra.Algebra):
                parts = [kept(part) for part in rule.names]
                either = min(ok, sum(parts))
                found = {"all_of": min(parts), "any_of": either, "none_of": max(ok - either, KEPT_BY_RULES * ok)}
                sizes.append(found[rule.operator])
            elif isinstance(rule, algebra.Uids):
                sizes.append(storage.size_bytes(rule.path) / UIDS_BYTES)
            else:
                sizes.append(KEPT_BY_RULES * ok)
        return min(sizes)

    return kept(name)


def _measured(source: Source) -> tuple[float, float]:
    """(rows, bytes of an image) of a source: from footers, from the beginnings of tars and tables, from a listing."""
    found = sources.find(source)
    sizes = {storage.join(found.root, name): entry.size_bytes for name, entry in found.files.items()}
    tables = {path: size for path, size in sizes.items() if path.endswith(".parquet")}
    if source.layout == "folder":
        images = [size for path, size in sizes.items() if os.path.splitext(path)[1].lower().lstrip(".") in EXTENSIONS]
        return float(len(images)), sum(images) / max(1, len(images))
    if source.layout == "parquet":
        rows = _table_rows(tables)
        return rows, sum(tables.values()) / max(1.0, rows)
    if source.layout == sources.URLS:
        return _table_rows(tables or sizes), 0.0
    return _tar_samples({path: size for path, size in sizes.items() if path.endswith(".tar")})


def _spread(paths: Iterable[str]) -> list[str]:
    """Some of the paths, from all over."""
    ordered = sorted(paths)
    return ordered[:: -(-len(ordered) // FOOTERS)] if ordered else []


def _table_rows(sizes: Mapping[str, int]) -> float:
    """The rows of tables: counted in some of them, reckoned for the others by their sizes."""
    rows = read_bytes = 0.0
    for path in _spread(sizes):
        if path.endswith(".parquet"):
            with storage.open_read(path) as file:
                rows += pq.ParquetFile(file).metadata.num_rows
            read_bytes += sizes[path]
        else:
            data = storage.read_range(path, 0, min(READ_BYTES, sizes[path]))
            if path.endswith(".gz"):
                data, compressed = _inflated(data), len(data)
            else:
                compressed = len(data)
            rows += data.count(b"\n")
            read_bytes += compressed
    return rows * sum(sizes.values()) / read_bytes if read_bytes else 0.0


def _inflated(data: bytes) -> bytes:
    with pa.input_stream(io.BytesIO(data), compression="gzip") as stream:
        parts = []
        try:
            while part := stream.read(1 << 16):
                parts.append(part)
        except OSError:  # it is only the beginning of a file
            pass
        return b"".join(parts)


def _tar_samples(sizes: Mapping[str, int]) -> tuple[float, float]:
    """(samples, bytes of an image) of tars, from the beginnings of some."""
    samples = read_bytes = image_bytes = 0.0
    for path in _spread(sizes):
        data = storage.read_range(path, 0, min(READ_BYTES, sizes[path]))
        stems, end = set(), 0
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
                for member in tar:
                    stem, _, extension = member.name.rpartition(".")
                    stems.add(stem)
                    image_bytes += member.size if extension.lower() in EXTENSIONS else 0
                    end = member.offset_data + -(-member.size // 512) * 512
        except tarfile.TarError:  # it is only the beginning of a file
            pass
        samples += len(stems)
        read_bytes += max(end, 1)
    if not samples:
        return 0.0, 0.0
    return samples * sum(sizes.values()) / read_bytes, image_bytes / samples
