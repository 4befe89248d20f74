"""Linear probes: logistic regression on frozen image features, from all training images or from k of each class.

    loss(W, b) = - sum over images of log softmax(x W + b)[label]  +  l2 / 2 |W|^2

The protocol is that of CLIP (Radford et al., arXiv 2103.00020, 2021, appendix A.3): L-BFGS with at most 1,000
iterations; `l2` from 1e-6 to 1e6 by the accuracy on a validation part, first at 7 strengths, then in ever smaller
steps around the best until there are 8 a decade; at last a fit on all training images. Of two strengths of equal
accuracy the one with the lower cross-entropy is taken. Features are L2-normalised, as in CLIP_benchmark. The
validation part is a fifth of each class, at least one image; a class of one image has none in it. Where no class has
two, as with one shot, l2 is UNCHOSEN_L2.

Which images are drawn or validated on follows from the hash of item and draw, not from their order. On a CPU equal
features give equal bytes, whatever the number of threads: sums are made by one thread.

Shapes: N images, B of a block, C classes with training images, D embedding width, K predictions of each image.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from eval.zero_shot import top_classes
from pipeline.core.errors import WinnowError

STEPS_A_DECADE = 8
DECADES = 6  # from 1 to either side
FIRST_STEP = 2 * STEPS_A_DECADE
UNCHOSEN_L2 = 1.0
VALIDATION_PART = 5  # one in so many images of a class
MAX_ITERATIONS = 1000
BLOCK_ROWS = 8192


@dataclass(frozen=True)
class Probe:
    """A fitted classifier: `weight_DC` and `bias_C` float64, for the classes whose numbers are `class_C`."""

    l2: float
    class_C: torch.Tensor
    weight_DC: torch.Tensor
    bias_C: torch.Tensor

    def predict(self, image_ND: torch.Tensor) -> np.ndarray:
        """[N, K] int32: the K = min(5, C) classes with the highest logits, best first, ties by class number."""
        tops = []
        with _one_thread(image_ND):
            for image_BD in image_ND.split(BLOCK_ROWS):
                top_BK = top_classes(torch.addmm(self.bias_C, image_BD.double(), self.weight_DC))
                tops.append(self.class_C.cpu()[top_BK].numpy().astype(np.int32))
        return np.concatenate(tops)


def draw_shots(
    items: Sequence[str], label_N: np.ndarray, classnames: Sequence[str], shots: int, draw: int
) -> np.ndarray:
    """[classes x shots] int64, ascending: the rows that are drawn, so many of each class.

    Raises:
        WinnowError: naming the class with the fewest images when it has too few.
    """
    num_C = np.bincount(label_N, minlength=len(classnames))
    fewest = int(num_C.argmin())
    if num_C[fewest] < shots:
        raise WinnowError(
            f"class {fewest} ({classnames[fewest]}) has {num_C[fewest]} training images, expected at least the {shots} "
            "shots of each class"
        )
    return np.flatnonzero(_rank_in_class(items, label_N, f"draw {draw}") < shots)


def fit_probe(image_ND: torch.Tensor, label_N: np.ndarray, items: Sequence[str], draw: int = 0) -> Probe:
    """The probe of these training images, its strength chosen by the protocol.

    Args:
        image_ND: float32, rows L2-normalised. label_N: int, their classes. items: their names, all different.
        draw: another number gives another validation part.
    """
    classes, target_N = np.unique(label_N, return_inverse=True)
    num_C = np.bincount(target_N)
    rank_N = _rank_in_class(items, target_N, f"validation {draw}")
    held_N = rank_N < np.where(num_C > 1, np.maximum(1, num_C // VALIDATION_PART), 0)[target_N]
    device = image_ND.device
    labels_N = torch.from_numpy(target_N.astype(np.int64)).to(device)
    l2, start = UNCHOSEN_L2, None
    with _one_thread(image_ND):
        if held_N.any():
            held = torch.from_numpy(np.flatnonzero(held_N)).to(device)
            left = torch.from_numpy(np.flatnonzero(~held_N)).to(device)
            l2, start = _choose(image_ND[left], labels_N[left], image_ND[held], labels_N[held], len(classes))
        fitted = Regression(image_ND, labels_N, len(classes)).fit(l2, start, exactly=True)
    return Probe(l2, torch.from_numpy(classes.astype(np.int64)).to(device), *fitted)


def _choose(
    fit_ND: torch.Tensor, fit_label_N: torch.Tensor, held_ND: torch.Tensor, held_label_N: torch.Tensor, num_classes: int
) -> tuple[float, tuple[torch.Tensor, torch.Tensor]]:
    """The strength that is best on the images held out, and what was fitted with it to the others."""
    regression = Regression(fit_ND, fit_label_N, num_classes)
    fits: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by exponent in steps
    scores: dict[int, tuple[float, float]] = {}
    end, step = DECADES * STEPS_A_DECADE, FIRST_STEP
    wanted = list(range(end, -end - 1, -step))
    while True:
        for point in wanted:
            start = fits[min(fits, key=lambda other: (abs(other - point), -other))] if fits else None
            fits[point] = regression.fit(_strength(point), start)
            scores[point] = _validate(held_ND, held_label_N, *fits[point])
        best = max(scores, key=lambda point: (scores[point], point))
        if step == 1:
            return _strength(best), fits[best]
        step //= 2
        wanted = [point for point in (best + step, best - step) if abs(point) <= end]


def _strength(point: int) -> float:
    return 10.0 ** (point / STEPS_A_DECADE)


def _validate(
    image_ND: torch.Tensor, label_N: torch.Tensor, weight_DC: torch.Tensor, bias_C: torch.Tensor
) -> tuple[float, float]:
    """(accuracy, -cross-entropy) of a fitted classifier: the larger the better."""
    hits = log_likelihood = 0.0
    for image_BD, label_B in zip(image_ND.split(BLOCK_ROWS), label_N.split(BLOCK_ROWS), strict=True):
        log_BC = torch.log_softmax(torch.addmm(bias_C, image_BD.double(), weight_DC), dim=1)
        hits += float((log_BC.argmax(dim=1) == label_B).sum())
        log_likelihood += float(log_BC.gather(1, label_B[:, None]).sum())
    return hits / len(label_N), log_likelihood / len(label_N)


class Regression:
    """Multinomial logistic regression on fixed images, for several strengths of its L2 penalty.

    Images are centred and turned to their principal axes: the penalty is blind to the turn and the bias takes up the
    shift, so the optimum is the same. Along these axes each coordinate is scaled by the curvature that the loss has
    there, which L-BFGS would else have to learn: frozen features have axes of very unequal length.
    """

    def __init__(self, image_ND: torch.Tensor, label_N: torch.Tensor, num_classes: int):
        wide_ND = image_ND.double()
        self.mean_D = wide_ND.mean(dim=0)
        wide_ND -= self.mean_D
        self.square_D, self.axes_DD = torch.linalg.eigh(wide_ND.T @ wide_ND)
        self.image_ND = wide_ND @ self.axes_DD
        self.label_N = label_N
        self.num_classes = num_classes

    def fit(
        self, l2: float, start: tuple[torch.Tensor, torch.Tensor] | None = None, exactly: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weights [D, C] and biases [C] in float64 at the minimum of the loss.

        Args:
            start: where to begin, as returned for another strength or other images.
            exactly: until the loss changes by less than 1e-14 an image; else as near as accuracies need, 1e-9.
        """
        num, num_dims = self.image_ND.shape
        point = torch.zeros(num_dims + 1, self.num_classes, dtype=torch.float64, device=self.image_ND.device)
        if start is not None:
            weight_DC, bias_C = start
            point[:-1] = self.axes_DD.T @ weight_DC
            point[-1] = bias_C + self.mean_D @ weight_DC
        curvature = self._curvature(point)
        curvatures = torch.cat([curvature * self.square_D.clamp(min=0) + l2, point.new_tensor([curvature * num])])
        scale = (num / curvatures).sqrt()[:, None]
        scaled = (point / scale).requires_grad_()
        optimizer = torch.optim.LBFGS(
            [scaled],
            max_iter=MAX_ITERATIONS,
            max_eval=2 * MAX_ITERATIONS,
            tolerance_grad=1e-9 if exactly else 1e-6,
            tolerance_change=1e-14 if exactly else 1e-9,
            history_size=10,
            line_search_fn="strong_wolfe",
        )

        def closure() -> torch.Tensor:
            loss, gradient = self._loss(scaled.detach() * scale, l2)
            scaled.grad = gradient * scale / num
            return loss / num

        optimizer.step(closure)
        point = scaled.detach() * scale
        weight_DC = self.axes_DD @ point[:-1]
        return weight_DC, point[-1] - self.mean_D @ weight_DC

    def _curvature(self, point: torch.Tensor) -> float:
        """The mean of p (1 - p) over images and classes: how much the loss curves for a feature of length one."""
        total = 0.0
        for image_BD in self.image_ND.split(BLOCK_ROWS):
            share_BC = torch.softmax(torch.addmm(point[-1], image_BD, point[:-1]), dim=1)
            total += float((share_BC * (1 - share_BC)).sum())
        return max(total / (len(self.image_ND) * self.num_classes), 1e-9)

    def _loss(self, point: torch.Tensor, l2: float) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss at a point [D + 1, C], whose last row is the biases, and its gradient."""
        gradient = torch.zeros_like(point)
        loss = l2 / 2 * point[:-1].square().sum()
        gradient[:-1] = l2 * point[:-1]
        for image_BD, label_B in zip(self.image_ND.split(BLOCK_ROWS), self.label_N.split(BLOCK_ROWS), strict=True):
            log_BC = torch.log_softmax(torch.addmm(point[-1], image_BD, point[:-1]), dim=1)
            loss -= log_BC.gather(1, label_B[:, None]).sum()
            excess_BC = log_BC.exp_()
            excess_BC[torch.arange(len(label_B), device=label_B.device), label_B] -= 1
            gradient[:-1] += image_BD.T @ excess_BC
            gradient[-1] += excess_BC.sum(dim=0)
        return loss, gradient


def _rank_in_class(items: Sequence[str], label_N: np.ndarray, salt: str) -> np.ndarray:
    """[N] int64: how many items of the same class come before each, in the order of their hashes."""
    digests = [hashlib.sha256(f"{salt}/{item}".encode("utf-8", "surrogatepass")).digest() for item in items]
    order_N = np.array(sorted(range(len(items)), key=digests.__getitem__), dtype=np.int64)
    by_class_N = order_N[np.argsort(label_N[order_N], kind="stable")]
    num_C = np.bincount(label_N)
    rank_N = np.empty(len(items), dtype=np.int64)
    rank_N[by_class_N] = np.arange(len(items)) - np.repeat(np.cumsum(num_C) - num_C, num_C)
    return rank_N


@contextlib.contextmanager
def _one_thread(tensor: torch.Tensor) -> Iterator[None]:
    """On a CPU the block's sums are made by one thread: how several share one changes its last bits."""
    threads = torch.get_num_threads()
    if tensor.device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
