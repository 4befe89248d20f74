"""The identities of docs/contrastive.md, in float64: what each loss's best scores are, and what bounds ln N - L."""

from __future__ import annotations

import itertools
import math
import random
import statistics

import pytest
import torch
from torch.nn import functional

from benchmarks import contrastive
from benchmarks.contrastive import infonce, log_density_ratio, nce
from stages.ingest import demo_world
from training.loss import Features, contrastive_loss
from training.recipe import RECIPES
from training.train_set import open_train_set

JOINT = torch.tensor(contrastive.JOINT, dtype=torch.float64)


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def gradient(loss, *values: torch.Tensor) -> float:
    values = [value.clone().requires_grad_() for value in values]
    loss(*values).backward()
    return max(value.grad.abs().max().item() for value in values)


def test_the_trainers_loss_is_cross_entropy_over_one_positive_and_k_negatives():
    image, text = functional.normalize(drawn(2, 7, 4), dim=-1)
    scale, num_negatives = torch.tensor(3.0, dtype=torch.float64), 2
    losses = []
    for rows, columns in ((image, text), (text, image)):
        for pair in range(7):
            candidates = columns[[(pair + step) % 7 for step in range(num_negatives + 1)]]
            losses.append(functional.cross_entropy(scale * candidates @ rows[pair], torch.tensor(0)))
    found = contrastive_loss(Features(image, text, scale), [7], 0, num_negatives=num_negatives)
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_siglip_is_binary_cross_entropy_and_at_the_prior_the_posterior_of_nce():
    image, text = functional.normalize(drawn(2, 7, 4), dim=-1)
    scale, bias = torch.tensor(3.0, dtype=torch.float64), torch.tensor(-math.log(6), dtype=torch.float64)
    ratio = (scale * image @ text.T).exp()  # a density ratio of which the scores are the logarithm
    posterior = ratio / (ratio + 6)  # of the positive among it and 6 noise samples
    own = torch.eye(7, dtype=torch.float64)
    expected = functional.binary_cross_entropy(posterior, own, reduction="sum") / 7
    torch.testing.assert_close(contrastive_loss(Features(image, text, scale, bias), [7], 0, kind="siglip"), expected)


def test_the_expected_infonce_is_the_sum_over_all_draws_of_negatives():
    scores, captions = drawn(4, 5), range(5)
    chance = JOINT.sum(0)
    total = 0.0
    for x, y, first, second in itertools.product(range(4), captions, captions, captions):
        loss = functional.cross_entropy(scores[x, [y, first, second]], torch.tensor(0))
        total += (JOINT[x, y] * chance[first] * chance[second] * loss).item()
    assert infonce(scores, JOINT, 2).item() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("num_negatives", [1, 4])
def test_all_losses_are_smallest_at_the_log_density_ratio(num_negatives):
    ratio, prior = log_density_ratio(JOINT), torch.tensor(-math.log(num_negatives), dtype=torch.float64)
    of_row = drawn(4, 1)
    assert gradient(lambda scores: infonce(scores, JOINT, num_negatives), ratio + of_row) < 1e-14
    assert gradient(lambda scores: nce(scores, JOINT, num_negatives, prior), ratio) < 1e-14
    assert gradient(lambda scores, bias: nce(scores, JOINT, num_negatives, bias), ratio, prior) < 1e-14
    # NCE knows the constants of the rows, and where they are wrong it says so; a score of its own is wrong for both.
    assert gradient(lambda scores: nce(scores, JOINT, num_negatives, prior), ratio + of_row) > 0.01
    assert gradient(lambda scores: infonce(scores, JOINT, num_negatives), ratio + drawn(4, 5)) > 0.01


def test_fitting_finds_the_ratio_from_zero_and_siglips_bias_from_minus_ten():
    information = (JOINT * log_density_ratio(JOINT)).sum().item()
    bounds = []
    for num_negatives in (1, 3):
        found = contrastive.fit_losses(JOINT, num_negatives)
        assert max(found["infonce"], found["nce"], found["siglip"]) < 1e-5
        assert found["bias"] == pytest.approx(-math.log(num_negatives), abs=1e-5)
        bounds.append(math.log(num_negatives + 1) - found["infonce_loss"])
    assert 0 < bounds[0] < bounds[1] < information


def test_siglips_loss_at_the_start():
    assert contrastive.start_loss(63, 0.0) == pytest.approx(64 * math.log(2))
    assert contrastive.start_loss(63, -math.log(63)) == pytest.approx(math.log(64) + 63 * math.log(64 / 63))


def test_the_bound_of_the_best_scores():
    assert contrastive.optimal_bound(3, 2) == pytest.approx(math.log(3) - math.log(2) / 2 - math.log(3) / 4)
    bounds = [contrastive.optimal_bound(2**power, 180) for power in range(1, 14)]
    assert bounds == sorted(bounds)
    assert all(bound < min(power * math.log(2), math.log(180)) for power, bound in enumerate(bounds, 1))
    assert bounds[-1] > math.log(180) - 0.02


def test_the_measured_bound_agrees_with_the_expected_one_and_other_scores_stay_below():
    contents = random.Random(0).choices(contrastive.demo_contents(), k=2048)
    expected = contrastive.optimal_bound(64, 180)
    found = contrastive.measured_bounds(contrastive.content_logits(contents), 2048, 64)
    assert len(found) == contrastive.DRAWS * 32
    assert abs(statistics.mean(found) - expected) < 4 * statistics.stdev(found) / len(found) ** 0.5
    noise = drawn(2048, 2048)
    assert statistics.mean(contrastive.measured_bounds(lambda rows: noise[rows][:, rows], 2048, 64)) < 0


def test_a_clean_caption_names_the_content_of_its_picture_and_nothing_else_of_it():
    pairs = list(contrastive.demo_pairs("clean", 0, 150))
    truths = [(pair["truth_object"], pair["truth_colour"], pair["truth_count"]) for pair in pairs]
    assert [contrastive.read_caption(pair["caption"]) for pair in pairs] == truths
    assert set(truths) <= set(contrastive.demo_contents())
    assert len(contrastive.demo_contents()) == 180
    for pair, short in zip(pairs, contrastive.demo_pairs("object only", 0, 150), strict=True):
        words = short["caption"].split()
        assert f"{pair['truth_object']}s" in words
        assert not set(words) & {*demo_world.COLOURS, *demo_world.COUNTS}
        assert len(words) == len(pair["caption"].split()) - 2


def test_train_sets_hold_what_decodes(tmp_path, monkeypatch):
    monkeypatch.setattr(contrastive, "TRAIN_PAIRS", 150)
    unfiltered = open_train_set(contrastive.write_train_set(str(tmp_path / "unfiltered"), "unfiltered"))
    corrupt = [pair["truth_fault"] for pair in demo_world.pairs(150, 0, False, 0, 150)].count("corrupt")
    assert 0 < corrupt == 150 - len(unfiltered)


def test_another_batch_keeps_the_samples_and_the_share_of_warmup():
    demo = RECIPES["demo"]
    recipe = contrastive.at_batch(demo, 16)
    assert (recipe.samples_seen, recipe.num_steps, recipe.warmup_steps) == (demo.samples_seen, 900, 120)
    assert recipe.lr == pytest.approx(demo.lr / 2)
