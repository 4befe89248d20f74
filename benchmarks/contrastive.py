"""The numbers of docs/contrastive.md as Markdown tables: what contrastive losses learn, how many negatives help.

    python benchmarks/contrastive.py [--downstream]

1. Losses of a small joint distribution with known probabilities, in expectation and in float64: no samples, no noise.
2. The bound ln N - L on the mutual information of a demo pair, of the best possible scores and of a trained model.
3. With --downstream: the demo recipe at half its budget with K negatives a pair at its own batch, and at other batches,
   scored on the demo's tasks: 69 trainings. Mean and sample standard deviation over three seeds.

Train sets of 5,000 pairs: `clean`; `unfiltered`, those of the pool's first 5,000 rows that decode; `object only`, the
clean ones with captions that name the object alone, 10 contents in place of 180. One thread a training.
Shapes: X pictures and Y captions of the small joint, M draws of negatives, N pairs of a batch, D width.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import pathlib
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
os.environ["OMP_NUM_THREADS"] = "1"

import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402
import torch  # noqa: E402
from torch.nn import functional  # noqa: E402

from eval import tasks as eval_tasks  # noqa: E402
from eval.evaluate import Checkpoint, evaluate  # noqa: E402
from pipeline.core import clip_model, images, storage  # noqa: E402
from pipeline.core.errors import ImageError  # noqa: E402
from pipeline.core.tars import TarWriter  # noqa: E402
from stages.ingest import demo_world  # noqa: E402
from training import loop  # noqa: E402
from training.recipe import RECIPES, Recipe, Seeds  # noqa: E402

JOINT = (  # p(x, y), made up: dependent, no zeros, unequal marginals
    (0.20, 0.02, 0.01, 0.04, 0.03),
    (0.03, 0.15, 0.02, 0.01, 0.04),
    (0.01, 0.03, 0.12, 0.02, 0.02),
    (0.02, 0.01, 0.05, 0.10, 0.07),
)
SIGLIP_BIAS = -10.0
TRAIN_PAIRS, HELD_OUT_PAIRS = 5000, 8192
WATCHED_PAIRS = 1024  # of the held-out pairs, in part 3
DRAWS = 4  # of batches from the held-out pairs
NUM_NEGATIVES = (1, 3, 7, 15, 31, 63)
BATCHES = (8, 16, 32, 128, 256)  # beside the demo's 64, where K = 63 is all others
SEEDS = (0, 1, 2)
TRAIN_SETS = {  # the tasks that can be learned from each
    "clean": demo_world.TASKS,
    "unfiltered": demo_world.TASKS,
    "object only": ("objects", "objects_shift"),
}


# 1. Losses in expectation over p(x, y), negatives drawn from p(y).


def log_density_ratio(joint_XY: torch.Tensor) -> torch.Tensor:
    """[X, Y] ln p(x, y) / (p(x) p(y)), the pointwise mutual information."""
    return (joint_XY / (joint_XY.sum(1, keepdim=True) * joint_XY.sum(0, keepdim=True))).log()


def infonce(score_XY: torch.Tensor, joint_XY: torch.Tensor, num_negatives: int) -> torch.Tensor:
    """Expected cross-entropy of picking the positive among it and its negatives (van den Oord et al. 2018, eq. 4)."""
    num_captions = joint_XY.shape[1]
    count_MY = torch.zeros(math.comb(num_captions + num_negatives - 1, num_negatives), num_captions).to(joint_XY)
    for row, chosen in enumerate(itertools.combinations_with_replacement(range(num_captions), num_negatives)):
        for caption in chosen:
            count_MY[row, caption] += 1
    # How probable each draw is: the multinomial distribution.
    log_orders_M = math.lgamma(num_negatives + 1) - torch.lgamma(count_MY + 1).sum(1)
    weight_M = (log_orders_M + count_MY @ joint_XY.sum(0).log()).exp()
    negatives_X1M = (score_XY.exp() @ count_MY.T)[:, None]
    log_sum_XYM = (score_XY.exp()[:, :, None] + negatives_X1M).log()
    return (joint_XY * (log_sum_XYM @ weight_M - score_XY)).sum()


def nce(score_XY: torch.Tensor, joint_XY: torch.Tensor, num_negatives: int, bias: torch.Tensor) -> torch.Tensor:
    """Expected binary cross-entropy of a positive and its negatives at the log odds score + bias.

    With bias = -ln K noise-contrastive estimation (Gutmann & Hyvarinen 2010; Mnih & Teh 2012 for K noise samples), with
    a learned one SigLIP (Zhai et al. 2023).
    """
    noise_XY = joint_XY.sum(1, keepdim=True) * joint_XY.sum(0, keepdim=True)
    logit_XY = score_XY + bias
    return (joint_XY * functional.softplus(-logit_XY) + num_negatives * noise_XY * functional.softplus(logit_XY)).sum()


def fitted(loss: Callable[[list[torch.Tensor]], torch.Tensor], starts: list[torch.Tensor]) -> list[torch.Tensor]:
    """The values at which the loss is smallest, found by L-BFGS from `starts`."""
    values = [start.clone().requires_grad_() for start in starts]
    optimizer = torch.optim.LBFGS(
        values, max_iter=2000, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        value = loss(values)
        value.backward()
        return value

    optimizer.step(closure)
    return [value.detach() for value in values]


def fit_losses(joint_XY: torch.Tensor, num_negatives: int) -> dict[str, float]:
    """How far each loss's best scores are from the log density ratio, and the bias that SigLIP learns.

    `siglip` is about scores + bias + ln K: only the sum is determined. `bias` is what is left when the scores are
    moved by the constant that makes the mean density ratio, of exp(scores) over p(x) p(y), 1.
    """
    ratio_XY, zeros_XY = log_density_ratio(joint_XY), torch.zeros_like(joint_XY)
    prior = math.log(num_negatives)
    (by_infonce,) = fitted(lambda values: infonce(values[0], joint_XY, num_negatives), [zeros_XY])
    offset_XY = by_infonce - ratio_XY
    (by_nce,) = fitted(lambda values: nce(values[0], joint_XY, num_negatives, torch.tensor(-prior)), [zeros_XY])
    start = torch.tensor(SIGLIP_BIAS, dtype=joint_XY.dtype)
    by_siglip, bias = fitted(lambda values: nce(values[0], joint_XY, num_negatives, values[1]), [zeros_XY, start])
    noise_XY = joint_XY.sum(1, keepdim=True) * joint_XY.sum(0, keepdim=True)
    return {
        "infonce": (offset_XY - offset_XY.mean(1, keepdim=True)).abs().max().item(),
        "infonce_loss": infonce(ratio_XY, joint_XY, num_negatives).item(),
        "nce": (by_nce - ratio_XY).abs().max().item(),
        "siglip": (by_siglip + bias + prior - ratio_XY).abs().max().item(),
        "bias": (bias + (noise_XY * by_siglip.exp()).sum().log()).item(),
    }


def start_loss(num_negatives: int, bias: float) -> float:
    """SigLIP's loss where all scores are 0, as they nearly are at the start."""
    return (
        functional.softplus(torch.tensor([-bias, bias], dtype=torch.float64))
        .dot(torch.tensor([1.0, num_negatives], dtype=torch.float64))
        .item()
    )


# 2. The bound on mutual information.


def demo_contents() -> list[tuple[str, str, int]]:
    """What a picture can show: object, colour and count, all combinations equally likely."""
    return list(itertools.product(demo_world.GLYPHS, demo_world.COLOURS, range(1, len(demo_world.COUNTS) + 1)))


def read_caption(caption: str) -> tuple[str, str, int]:
    """The object, colour and count that a clean caption names; all else in it was drawn apart from the picture."""
    words = caption.split()
    noun = next(noun for word in words for noun in demo_world.GLYPHS if word in (noun, f"{noun}s"))
    colour = next(word for word in words if word in demo_world.COLOURS)
    return noun, colour, 1 + next(demo_world.COUNTS.index(word) for word in words if word in demo_world.COUNTS)


def optimal_bound(batch: int, num_contents: int) -> float:
    """Expected ln N - L of the log density ratio as scores, where a caption fits all pictures of its content.

    L is the mean of ln(1 + m), m other captions of the batch that fit too: binomial with N - 1 draws at 1 / contents.
    """
    chance, others = 1 / num_contents, torch.arange(batch, dtype=torch.float64)
    draws = torch.tensor(batch - 1.0, dtype=torch.float64)
    log_ways = torch.lgamma(draws + 1) - torch.lgamma(others + 1) - torch.lgamma(draws - others + 1)
    weights = (log_ways + others * math.log(chance) + (draws - others) * math.log1p(-chance)).exp()
    return math.log(batch) - (weights * (others + 1).log()).sum().item()


def measured_bounds(logit_of: Callable[[torch.Tensor], torch.Tensor], num_pairs: int, batch: int) -> list[float]:
    """ln N - L of each batch, DRAWS times all pairs; L is the mean of both directions.

    Args:
        logit_of: rows [N] int64 to their [N, N] logits, image by caption.
    """
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(DRAWS):
        for rows_N in torch.randperm(num_pairs, generator=generator).split(batch):
            if len(rows_N) == batch:
                logit_NN, own_N = logit_of(rows_N), torch.arange(batch)
                both = (functional.cross_entropy(logits, own_N).item() for logits in (logit_NN, logit_NN.T))
                found.append(math.log(batch) - sum(both) / 2)
    return found


def content_logits(contents: list[tuple[str, str, int]]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The log density ratio of the pairs' pictures and captions, up to a constant: 0 where they fit, else -inf."""
    number = {content: index for index, content in enumerate(demo_contents())}
    content_P = torch.tensor([number[content] for content in contents])

    def logit_of(rows_N: torch.Tensor) -> torch.Tensor:
        fits_NN = content_P[rows_N, None] == content_P[rows_N]
        return torch.zeros(fits_NN.shape).masked_fill(~fits_NN, -math.inf)

    return logit_of


def model_logits(folder: str, pairs: list[dict]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The logits that a trained model gives these pairs."""
    clip = clip_model.load({"folder": folder})
    scale, parts = clip.model.logit_scale.exp().item(), []
    with ThreadPoolExecutor(1) as threads:
        for start in range(0, len(pairs), 256):
            some = pairs[start : start + 256]
            pictures = [images.decode_rgb(pair["image"]) for pair in some]
            parts.append(clip_model.embed(clip, pictures, [pair["caption"] for pair in some], threads))
    image_PD, text_PD = (torch.cat(features) for features in zip(*parts, strict=True))
    return lambda rows_N: scale * image_PD[rows_N] @ text_PD[rows_N].T


# 3. Trainings.


def demo_pairs(train_set: str, start: int, stop: int) -> Iterator[dict]:
    """Rows of the demo world that decode. Training and held-out rows are different rows of one world."""
    for pair in demo_world.pairs(TRAIN_PAIRS + HELD_OUT_PAIRS, 0, train_set != "unfiltered", start, stop):
        try:
            images.decode_rgb(pair["image"])
        except ImageError:
            continue
        yield pair | {"caption": object_only(pair)} if train_set == "object only" else pair


def object_only(pair: dict) -> str:
    """The pair's caption without colour and count: "two red stars on old paper" becomes "stars on old paper"."""
    noun, left_out = pair["truth_object"], (pair["truth_colour"], demo_world.COUNTS[pair["truth_count"] - 1])
    return " ".join(f"{noun}s" if word == noun else word for word in pair["caption"].split() if word not in left_out)


def write_train_set(path: str, train_set: str) -> str:
    """The path of this train set, in one tar."""
    rows = []
    with storage.write_file(storage.join(path, "00000.tar")) as temporary, TarWriter(temporary) as tar:
        for place, pair in enumerate(demo_pairs(train_set, 0, TRAIN_PAIRS)):
            extension = "png" if pair["image"].startswith(b"\x89PNG") else "jpg"
            offset = tar.add(f"{place:09d}.{extension}", pair["image"])
            rows.append((f"{place:032x}", "00000.tar", offset, len(pair["image"]), pair["caption"]))
    names = ("uid", "tar", "image_offset_bytes", "image_size_bytes", "caption")
    with storage.write_file(storage.join(path, "index.parquet")) as temporary:
        pq.write_table(pa.Table.from_pylist([dict(zip(names, row, strict=True)) for row in rows]), temporary)
    return path


def at_batch(recipe: Recipe, batch: int) -> Recipe:
    """The recipe at another batch: the same samples and share of warmup; lr by the square root of the batch.

    (Malladi et al. 2022: Adam's square root scaling rule.)
    """
    factor = batch / recipe.global_batch_size
    return recipe.model_copy(
        update={
            "global_batch_size": batch,
            "lr": recipe.lr * factor**0.5,
            "warmup_steps": round(recipe.warmup_steps / factor),
        }
    )


@dataclass(frozen=True)
class Training:
    """One of part 3. `kind` is K (negatives varied) or N (the batch varied), `value` how many."""

    kind: str
    value: int
    train_set: str
    seed: int

    def recipe(self, samples_seen: int) -> Recipe:
        """The demo's recipe, changed."""
        base = RECIPES["demo"].model_copy(update={"samples_seen": samples_seen})
        return base.model_copy(update={"num_negatives": self.value}) if self.kind == "K" else at_batch(base, self.value)


def train_and_score(training: Training, samples_seen: int, folder: str) -> tuple[float, float]:
    """(mean of the main metrics of the train set's tasks, ln N - L of held-out pairs at the demo's batch)."""
    out_path = f"{folder}/{training.kind}_{training.value}_{training.train_set}_{training.seed}"
    seeds = Seeds(training.seed, training.seed)
    loop.train(f"{folder}/{training.train_set}", out_path, training.recipe(samples_seen), seeds)
    model_folder = storage.join(out_path, loop.MODEL_FOLDER)
    tasks = eval_tasks.resolve_tasks(TRAIN_SETS[training.train_set], f"{folder}/tasks")
    places = [storage.join(out_path, task.name) for task in tasks]
    found = list(evaluate([Checkpoint({"folder": model_folder}, "demo", "demo")], tasks, [places]))
    score = statistics.mean(evaluated.facts["value"] for evaluated in found)
    logit_of = model_logits(model_folder, held_out_pairs(training.train_set))
    bound = statistics.mean(measured_bounds(logit_of, WATCHED_PAIRS, RECIPES["demo"].global_batch_size))
    print(f"{out_path.removeprefix(folder)}: {score:.3f}, {bound:.3f}", file=sys.stderr, flush=True)
    return score, bound


@functools.cache
def held_out_pairs(train_set: str) -> list[dict]:
    """WATCHED_PAIRS clean pairs, with captions as the train set's."""
    return list(
        demo_pairs("clean" if train_set == "unfiltered" else train_set, TRAIN_PAIRS, TRAIN_PAIRS + WATCHED_PAIRS)
    )


# Tables.


def print_table(title: str, names: list[str], rows: list[list]) -> None:
    """None; Markdown on standard output."""
    print(f"\n{title}\n\n| {' | '.join(names)} |\n|{'---|' * len(names)}")
    for row in rows:
        print(f"| {' | '.join(str(value) for value in row)} |", flush=True)


def print_losses() -> None:
    """None; part 1."""
    joint_XY = torch.tensor(JOINT, dtype=torch.float64)
    information = (joint_XY * log_density_ratio(joint_XY)).sum().item()
    rows = []
    for num_negatives in (1, 3, 7):
        found = fit_losses(joint_XY, num_negatives)
        errors = [f"{found[name]:.0e}" for name in ("infonce", "nce", "siglip")]
        bound = math.log(num_negatives + 1) - found["infonce_loss"]
        rows.append([num_negatives, *errors, f"{found['bias']:.4f}", f"{-math.log(num_negatives):.4f}", f"{bound:.4f}"])
    names = ["K", "InfoNCE", "NCE", "SigLIP", "SigLIP's bias", "-ln K", "ln (K + 1) - L"]
    print_table(
        f"Small joint, mutual information {information:.4f} nats: largest error of the fitted scores", names, rows
    )

    rows = []
    for batch in (64, 4096, 32768):
        biases = (0.0, -math.log(batch - 1), SIGLIP_BIAS)
        rows.append([batch, *(f"{start_loss(batch - 1, bias):.2f}" for bias in biases)])
    print_table("SigLIP's loss at scores of 0", ["N", "bias 0", "bias -ln (N - 1)", "bias -10"], rows)


def print_bounds(folder: str, samples_seen: int, num_pairs: int) -> None:
    """None; part 2."""
    held_out = list(demo_pairs("clean", TRAIN_PAIRS, TRAIN_PAIRS + num_pairs))
    contents = [(pair["truth_object"], pair["truth_colour"], pair["truth_count"]) for pair in held_out]
    assert contents == [read_caption(pair["caption"]) for pair in held_out]
    train_set = write_train_set(f"{folder}/clean", "clean")
    recipe = RECIPES["demo"].model_copy(update={"samples_seen": samples_seen})
    loop.train(train_set, f"{folder}/trained", recipe, Seeds(0, 0))
    best = content_logits(contents)
    trained = model_logits(f"{folder}/trained/{loop.MODEL_FOLDER}", held_out)
    num_contents = len(demo_contents())
    rows, batch = [], 2
    while batch <= num_pairs // 2:
        expected = optimal_bound(batch, num_contents)
        means = [statistics.mean(measured_bounds(logit_of, num_pairs, batch)) for logit_of in (best, trained)]
        values = (math.log(batch), expected, *means, math.log(batch) - expected)
        rows.append([batch, *(f"{value:.3f}" for value in values)])
        batch *= 2
    names = ["N", "ln N", "best scores, expected", "best scores, held-out", "trained, held-out", "least loss"]
    title = f"ln N - L; mutual information ln {num_contents} = {math.log(num_contents):.3f} nats"
    print_table(f"{title}; a model trained on {samples_seen:,} samples; {num_pairs:,} held-out pairs", names, rows)


def print_downstream(folder: str, samples_seen: int, processes: int) -> None:
    """None; part 3."""
    demo_world.write_tasks(f"{folder}/tasks", 0)
    for name in TRAIN_SETS:
        write_train_set(f"{folder}/{name}", name)
    cases = [("K", value, name) for value in NUM_NEGATIVES for name in TRAIN_SETS]
    cases += [("N", value, "clean") for value in BATCHES]
    trainings = [Training(*case, seed) for seed in SEEDS for case in cases]
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        score = functools.partial(train_and_score, samples_seen=samples_seen, folder=folder)
        found = dict(zip(trainings, pool.map(score, trainings), strict=True))

    def cells(kind: str, value: int, train_set: str) -> list[str]:
        scores, bounds = zip(*(found[Training(kind, value, train_set, seed)] for seed in SEEDS), strict=True)
        return [f"{statistics.mean(scores):.3f} ± {statistics.stdev(scores):.3f}", f"{statistics.mean(bounds):.2f}"]

    batch = RECIPES["demo"].global_batch_size
    names = [f"{name}: {what}" for name in TRAIN_SETS for what in ("score", f"ln {batch} - L")]
    rows = [[value, *itertools.chain(*(cells("K", value, name) for name in TRAIN_SETS))] for value in NUM_NEGATIVES]
    print_table(f"K varied at N = {batch}, {samples_seen:,} samples", ["K", *names], rows)
    rows = []
    for value in sorted((*BATCHES, batch)):
        recipe = at_batch(RECIPES["demo"].model_copy(update={"samples_seen": samples_seen}), value)
        outcome = cells("K", batch - 1, "clean") if value == batch else cells("N", value, "clean")
        rows.append([value, recipe.num_steps, f"{recipe.lr:.1e}", *outcome])
    print_table(f"N varied, K = N - 1, {samples_seen:,} samples", ["N", "steps", "lr", *names[:2]], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--downstream", action="store_true", help="part 3 too")
    parser.add_argument("--processes", type=int, default=2, help="trainings of part 3 side by side")
    parser.add_argument("--samples", type=int, default=RECIPES["demo"].samples_seen, help="of part 2; part 3 has half")
    parser.add_argument("--held-out", type=int, default=HELD_OUT_PAIRS, help="pairs of part 2")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print_losses()
    with tempfile.TemporaryDirectory(prefix="winnow-") as folder:
        print_bounds(folder, arguments.samples, arguments.held_out)
        if arguments.downstream:
            print_downstream(folder, arguments.samples // 2, arguments.processes)


if __name__ == "__main__":
    main()
