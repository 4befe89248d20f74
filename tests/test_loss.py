"""The contrastive losses: closed forms by hand, open_clip's own classes, and many ranks against one, in float64."""

from __future__ import annotations

import math

import numpy as np
import open_clip
import pytest
import torch
from open_clip.loss import SigLipLoss
from torch import distributed
from torch.nn import functional

from tests.training_fixture import on_ranks
from training.loss import MAX_LOGIT_SCALE, Features, clamp_logit_scale, contrastive_loss

LOSSES = [("clip", None), ("siglip", None), ("clip", 1), ("siglip", 2), ("clip", 3)]  # (kind, num_negatives)
PART_SIZES = {
    2: [[3, 3], [2, 3], [3, 2], [0, 2], [0, 1], [1, 1]],
    4: [[2, 2, 2, 2], [1, 2, 1, 2], [0, 1, 0, 1], [0, 0, 0, 1], [3, 0, 1, 2]],
}


def features(images, texts, scale=1.0, bias=None, dtype=torch.float64):
    image, text, logit_scale = (
        torch.tensor(values, dtype=dtype, requires_grad=True) for values in (images, texts, scale)
    )
    return Features(image, text, logit_scale, None if bias is None else torch.tensor(bias, dtype=dtype))


def with_cosines(cosines, scale, bias=None):
    """Features whose image-text products are this matrix: images are the unit vectors."""
    return features(np.eye(len(cosines)).tolist(), np.array(cosines).T.tolist(), scale, bias)


def test_clip_of_two_pairs_by_hand():
    # Rows of scale x cosines: (2, 0) and (1, 3); columns: (2, 1) and (0, 3).
    loss = contrastive_loss(with_cosines([[1.0, 0.0], [0.5, 1.5]], scale=2.0), [2], 0)
    rows = math.log(1 + math.exp(0 - 2)) + math.log(1 + math.exp(1 - 3))
    columns = math.log(1 + math.exp(1 - 2)) + math.log(1 + math.exp(0 - 3))
    assert loss.item() == pytest.approx((rows + columns) / 4, rel=1e-14)


def test_siglip_of_two_pairs_by_hand():
    # Logits 2 x cosine - 1: pairs at 1 and 2, the others at -1 and 0.
    loss = contrastive_loss(with_cosines([[1.0, 0.0], [0.5, 1.5]], scale=2.0, bias=-1.0), [2], 0, "siglip")
    expected = [math.log(1 + math.exp(-logit)) for logit in (1, 2)] + [math.log(1 + math.exp(-1)), math.log(2)]
    assert loss.item() == pytest.approx(sum(expected) / 2, rel=1e-14)


def test_clip_of_three_pairs_by_hand_with_its_gradient():
    cosines, scale = np.array([[0.9, 0.2, -0.3], [0.1, 0.7, 0.4], [0.0, -0.5, 0.8]]), 5.0
    found = with_cosines(cosines, scale)
    loss = contrastive_loss(found, [3], 0)
    loss.backward()
    exponentials = np.exp(scale * cosines)
    of_rows, of_columns = exponentials / exponentials.sum(1, keepdims=True), exponentials / exponentials.sum(0)
    expected = -(np.log(np.diag(of_rows)) + np.log(np.diag(of_columns))).sum() / 6
    towards_logits = (of_rows + of_columns - 2 * np.eye(3)) / 6
    assert loss.item() == pytest.approx(expected, rel=1e-14)
    np.testing.assert_allclose(found.logit_scale.grad, (towards_logits * cosines).sum(), rtol=1e-12)
    np.testing.assert_allclose(found.text_nD.grad, scale * towards_logits.T, rtol=1e-12)


@pytest.mark.parametrize("num_pairs", [2, 3, 7])
def test_features_that_tell_nothing_cost_ln_n(num_pairs):
    """Identical captions, and captions orthogonal to every image: all logits of an image are equal."""
    images = np.eye(num_pairs, num_pairs + 1).tolist()
    orthogonal = contrastive_loss(features(images, [[0.0] * num_pairs + [1.0]] * num_pairs, 20.0), [num_pairs], 0)
    assert orthogonal.item() == pytest.approx(math.log(num_pairs), rel=1e-14)
    same = contrastive_loss(features([images[0]] * num_pairs, [images[0]] * num_pairs, 20.0), [num_pairs], 0)
    assert same.item() == pytest.approx(math.log(num_pairs), rel=1e-14)


def test_perfect_features():
    """Unit vectors: each direction costs ln(1 + (N - 1) exp(-scale)); at CLIP's largest scale next to nothing."""
    scale, num_pairs = 3.0, 5
    perfect = np.eye(num_pairs).tolist()
    loss = contrastive_loss(features(perfect, perfect, scale), [num_pairs], 0)
    assert loss.item() == pytest.approx(math.log(1 + (num_pairs - 1) * math.exp(-scale)), rel=1e-13)
    assert contrastive_loss(features(perfect, perfect, 100.0), [num_pairs], 0).item() < 1e-40


def drawn(num_pairs, seed=1):
    draws = torch.randn(2, num_pairs, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return draws.requires_grad_(), torch.tensor([7.0, -3.0], dtype=torch.float64, requires_grad=True)


def gradients(compute, num_pairs):
    """[loss, gradient of the draws, of scale and bias] of compute(image, text, scale, bias) on normalised draws."""
    draws, numbers = drawn(num_pairs)
    image, text = functional.normalize(draws, dim=-1)
    loss = compute(image, text, numbers[0], numbers[1])
    loss.backward()
    return [loss.detach(), draws.grad, numbers.grad]


@pytest.mark.parametrize("num_pairs", [1, 2, 9])
def test_losses_are_open_clips(num_pairs):
    for kind, theirs in (("clip", open_clip.ClipLoss()), ("siglip", SigLipLoss())):
        ours = gradients(
            lambda *values, kind=kind: contrastive_loss(Features(*values), [num_pairs], 0, kind), num_pairs
        )
        for found, expected in zip(ours, gradients(theirs, num_pairs), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_num_negatives(kind):
    def loss(num_negatives, num_pairs=6):
        return gradients(
            lambda *values: contrastive_loss(Features(*values), [num_pairs], 0, kind, num_negatives), num_pairs
        )

    for found, expected in zip(loss(5), loss(None), strict=True):
        assert torch.equal(found, expected)
    for num_negatives in (1, 2, 4):
        draws, (scale, bias) = drawn(6)
        image, text = functional.normalize(draws, dim=-1)
        logits = (scale * image @ text.T + bias).tolist()
        total = 0.0
        for i in range(6):
            others = [(i + step) % 6 for step in range(1, num_negatives + 1)]
            if kind == "siglip":
                total += math.log1p(math.exp(-logits[i][i])) + sum(math.log1p(math.exp(logits[i][j])) for j in others)
            else:
                total += math.log1p(sum(math.exp(logits[i][j] - logits[i][i]) for j in others)) / 2
                total += math.log1p(sum(math.exp(logits[j][i] - logits[i][i]) for j in others)) / 2
        found = loss(num_negatives)
        assert found[0].item() == pytest.approx(total / 6, rel=1e-12)
        assert all(torch.isfinite(value).all() for value in found)


def test_a_batch_of_one_teaches_nothing():
    for num_negatives in (None, 1, 5):
        loss, draws, numbers = gradients(
            lambda *values, k=num_negatives: contrastive_loss(Features(*values), [1], 0, "clip", k), 1
        )
        assert (loss.item(), draws.abs().max().item(), numbers.abs().max().item()) == (0, 0, 0)


def test_logit_scale_stays_in_its_range():
    model = torch.nn.Module()
    for value, expected in ((-0.5, 0.0), (2.0, 2.0), (9.0, MAX_LOGIT_SCALE)):
        model.logit_scale = torch.nn.Parameter(torch.tensor(value))
        clamp_logit_scale(model)
        assert model.logit_scale.item() == pytest.approx(expected, rel=1e-7)


def gradients_on_rank(rank, world_size):
    """{case: what gradients() gives of this rank's own pairs, after the mean that DistributedDataParallel takes}."""
    found = {}
    for sizes in PART_SIZES[world_size]:
        for kind, num_negatives in LOSSES:
            draws, numbers = drawn(sum(sizes))
            first = sum(sizes[:rank])
            own = draws.detach()[:, first : first + sizes[rank]]
            if not sizes[rank]:
                own = draws.detach()[:, :1]  # a filler
            own.requires_grad_()
            image, text = functional.normalize(own, dim=-1)
            loss = contrastive_loss(Features(image, text, *numbers), sizes, rank, kind, num_negatives)
            loss.backward()
            loss = loss.detach()
            for value in (loss, numbers.grad):
                distributed.all_reduce(value)
            parts = [loss, own.grad[:, : sizes[rank]], numbers.grad]
            found[str((sizes, kind, num_negatives))] = [part / world_size for part in parts]
            assert not own.grad[:, sizes[rank] :].any()
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_compute_what_one_does(world_size):
    of_rank = on_ranks(world_size, gradients_on_rank)
    for sizes in PART_SIZES[world_size]:
        for kind, num_negatives in LOSSES:
            expected = gradients(
                lambda *values, sizes=sizes, kind=kind, k=num_negatives: contrastive_loss(
                    Features(*values), [sum(sizes)], 0, kind, k
                ),
                sum(sizes),
            )
            found = [case[str((sizes, kind, num_negatives))] for case in of_rank]
            for loss, _, numbers in found:
                torch.testing.assert_close(loss, expected[0], rtol=1e-10, atol=1e-12)
                torch.testing.assert_close(numbers, expected[2], rtol=1e-10, atol=1e-12)
            together = torch.cat([draws for _, draws, _ in found], dim=1)
            torch.testing.assert_close(together, expected[1], rtol=1e-10, atol=1e-12)
