"""Item noise of every metric: the metric itself, its influence against a bootstrap that computes it again, and intervals.

Each metric is written down a second time here, in plain Python over rows of predictions.parquet.
"""

from __future__ import annotations

import collections

import numpy as np
import pyarrow as pa
import pytest

from pipeline.report.items import MEAN, WORST, Items, difference_interval, items_of

NUM = 400
RESAMPLES = 1000
ALIKE = 0.08  # of two standard errors; one of 1,000 resamples has an error of 2.2 % by itself


def classification_rows(seed: int, accuracy: float = 0.45, num: int = NUM, num_classes: int = 8) -> list[dict]:
    """Rows of an image each; items and labels depend on nothing, what is hard is the same for every seed."""
    rng, always = np.random.default_rng(seed), np.random.default_rng(99)
    label = always.integers(0, num_classes, num)
    hard = always.normal(0, 0.2, num)
    right = rng.random(num) + hard < accuracy
    wrong = (label + 1 + rng.integers(0, num_classes - 1, num)) % num_classes
    rows = []
    for j in range(num):
        first = int(label[j] if right[j] else wrong[j])
        others = [int(c) for c in rng.permutation(num_classes) if c != first][:4]
        group = [None, "Asia", "Europe", "Africa"][always.choice(4, p=[0.1, 0.3, 0.3, 0.3])]
        rows.append({
            "item": f"test/{j:05d}", "label": int(label[j]), "prediction": first, "top5": [first, *others],
            "correct": first == int(label[j]), "group": group,
        })  # fmt: skip
    for row in rows:  # one group is clearly the worst
        if row["group"] == "Africa" and rng.random() < 0.5:
            row["correct"], row["top5"] = False, [c for c in row["top5"] if c != row["label"]]
    return rows


def retrieval_rows(seed: int, images: int = 90) -> list[dict]:
    rng, always = np.random.default_rng(seed), np.random.default_rng(98)
    rows = []
    for image in range(images):
        hard = always.normal(0, 0.8)
        for caption in range(3 + image % 3):
            rows.append(
                {
                    "item": f"{image}#{caption}",
                    "direction": "text_to_image",
                    "group": f"{image:04d}",
                    "hit@1": bool(rng.normal(hard) > 0.5),
                }
            )
        rows.append(
            {
                "item": f"{image}",
                "direction": "image_to_text",
                "group": f"{image:04d}",
                "hit@1": bool(rng.normal(hard) > 0.2),
            }
        )
    return rows  # fmt: skip


def association_rows(seed: int) -> list[dict]:
    rng, always = np.random.default_rng(seed), np.random.default_rng(97)
    candidates = always.choice([5, 6, 10, 12], 300).tolist()
    return [
        {"item": f"{j:04d}", "jaccard": float(rng.choice([0, 0.2, 0.5, 1])), "candidates": n, "counted": n >= 10}
        for j, n in enumerate(candidates)
    ]


def mean(values) -> float:
    values = list(values)
    return sum(values) / len(values)


def by(rows: list[dict], key: str) -> dict:
    found = collections.defaultdict(list)
    for row in rows:
        found[row[key]].append(row)
    return found


def macro_f1(rows: list[dict]) -> float:
    """f1_score(average="macro", labels=the labels of the items), as WILDS calls it."""
    found = []
    for label, of_label in by(rows, "label").items():
        right = sum(row["prediction"] == label for row in of_label)
        predicted = sum(row["prediction"] == label for row in rows)
        found.append(2 * right / (len(of_label) + predicted))
    return mean(found)


def recall(rows: list[dict], *directions: str) -> float:
    split = by(rows, "direction")
    return mean(mean(row["hit@1"] for row in split[direction]) for direction in directions)


def worst(rows: list[dict], right) -> float:
    return min(mean(right(row) for row in found) for name, found in by(rows, "group").items() if name is not None)


def correct(row: dict) -> bool:
    return row["correct"]


def in_top5(row: dict) -> bool:
    return row["label"] in row["top5"]


# metric -> (rows, the metric over rows, the column of what is resampled, the column of strata within which it is)
METRICS = {
    "acc1": (classification_rows, lambda rows: mean(map(correct, rows)), "item", None),
    "acc_avg": (classification_rows, lambda rows: mean(map(correct, rows)), "item", None),
    "lp_acc1": (classification_rows, lambda rows: mean(map(correct, rows)), "item", None),
    "acc5": (classification_rows, lambda rows: mean(map(in_top5, rows)), "item", None),
    "mean_per_class_recall": (classification_rows, lambda rows: mean(mean(map(correct, one)) for one in by(rows, "label").values()), "item", "label"),
    "lp_mean_per_class_recall": (classification_rows, lambda rows: mean(mean(map(correct, one)) for one in by(rows, "label").values()), "item", "label"),
    "acc_wg": (classification_rows, lambda rows: worst(rows, correct), "item", "group"),
    "acc_worst_region": (classification_rows, lambda rows: worst(rows, correct), "item", "group"),
    "acc_top5_wg": (classification_rows, lambda rows: worst(rows, in_top5), "item", "group"),
    "F1-macro_all": (classification_rows, macro_f1, "item", None),
    "image_retrieval_recall@1": (retrieval_rows, lambda rows: recall(rows, "text_to_image"), "group", None),
    "mean_recall@1": (retrieval_rows, lambda rows: recall(rows, "text_to_image", "image_to_text"), "group", None),
    "jaccard_score_5-6": (association_rows, lambda rows: mean(row["jaccard"] for row in rows if row["candidates"] <= 6), "item", None),
    "jaccard_score_10-12": (association_rows, lambda rows: mean(row["jaccard"] for row in rows if row["counted"]), "item", None),
}  # fmt: skip


def bootstrap(metric: str, *tables: list[dict]) -> np.ndarray:
    """[tables, RESAMPLES] the metric of each, computed again on the same drawn units."""
    _, compute, unit, stratum = METRICS[metric]
    units = [list(by(rows, unit).values()) for rows in tables]
    strata = by([{"at": i, "in": stratum and one[0][stratum]} for i, one in enumerate(units[0])], "in")
    blocks = [[entry["at"] for entry in entries] for entries in strata.values()]
    rng = np.random.default_rng(5)
    result = np.zeros((len(tables), RESAMPLES))
    for b in range(RESAMPLES):
        drawn = [i for block in blocks for i in rng.choice(block, len(block))]
        for t, of_table in enumerate(units):
            result[t, b] = compute([row for i in drawn for row in of_table[i]])
    return result


def items(metric: str, rows: list[dict]) -> Items:
    found = items_of(pa.Table.from_pylist(rows), metric)
    assert found is not None
    return found


@pytest.mark.parametrize("metric", METRICS)
def test_the_metric_and_its_noise_are_those_of_a_bootstrap_that_computes_it_again(metric):
    make, compute, *_ = METRICS[metric]
    tables = make(1), make(2)
    first, second = (items(metric, rows) for rows in tables)
    assert first.value == pytest.approx(compute(tables[0]), abs=1e-12)
    drawn = bootstrap(metric, *tables)
    for one, again in zip((first, second), drawn, strict=True):
        assert np.sqrt((one.influence**2).sum()) == pytest.approx(again.std(), rel=ALIKE)
        assert one.influence.sum() == pytest.approx(0, abs=1e-9)
    difference = drawn[0] - drawn[1]
    assert np.array_equal(first.units, second.units)
    paired = np.sqrt(((first.influence - second.influence) ** 2).sum())
    assert paired == pytest.approx(difference.std(), rel=ALIKE)
    low, high = difference_interval([first], [second])
    assert low < high
    assert (low, high) == pytest.approx(np.quantile(difference, [0.025, 0.975]), abs=0.25 * difference.std())


@pytest.mark.parametrize("metric", ["acc1", "mean_per_class_recall", "acc_wg", "F1-macro_all", "mean_recall@1"])
def test_the_interval_of_a_difference_over_seeds_is_that_of_the_mean_over_them(metric):
    make, *_ = METRICS[metric]
    tables = [make(seed) for seed in range(5)]
    drawn = bootstrap(metric, *tables)
    difference = drawn[:3].mean(axis=0) - drawn[3:].mean(axis=0)
    found = [items(metric, rows) for rows in tables]
    low, high = difference_interval(found[:3], found[3:])
    assert (low, high) == pytest.approx(np.quantile(difference, [0.025, 0.975]), abs=0.25 * difference.std())
    assert difference_interval(found[:3], found[3:]) == (low, high)  # the same every time
    shuffled = [items(metric, rows[::-1]) for rows in tables]
    assert difference_interval(shuffled[:3], shuffled[3:]) == pytest.approx((low, high))


def test_there_is_no_interval_where_the_items_differ():
    first = classification_rows(1)
    assert difference_interval([items("acc1", first)], [items("acc1", first[:-1])]) is None
    other = [row | {"label": (row["label"] + (row["item"] == "test/00003")) % 8} for row in first]
    for metric in ("mean_per_class_recall", "F1-macro_all"):
        assert difference_interval([items(metric, first)], [items(metric, other)]) is None


def test_item_variance_of_a_mean_is_the_textbook_one():
    x = np.array([1, 0, 1, 1, 0, 1, 0.0])
    u = Items(MEAN, x, np.zeros(7), np.arange(7)).influence
    assert (u**2).sum() == pytest.approx(x.var(ddof=1) / 7)


def test_item_variance_of_mean_per_class_recall_is_stratified():
    x, label = np.array([1, 0, 1, 1, 0, 1.0, 0, 0]), np.array([0, 0, 0, 1, 1, 1, 1, 1])
    u = Items(MEAN, x, label, np.arange(8)).influence
    assert (u**2).sum() == pytest.approx((x[:3].var(ddof=1) / 3 + x[3:].var(ddof=1) / 5) / 4)


def test_captions_of_one_image_are_one_observation():
    x = np.repeat([1, 0, 1, 1, 0, 0, 1, 0, 1, 0.0], 5)  # five captions each, all with the same outcome
    alone = Items(MEAN, x, np.zeros(50), np.arange(50))
    together = Items(MEAN, x, np.zeros(50), np.repeat(np.arange(10), 5))
    assert len(together.units) == 10
    assert (together.influence**2).sum() == pytest.approx(5 * (alone.influence**2).sum())


def worst_groups(rng: np.random.Generator, accuracy: np.ndarray, num: int) -> Items:
    right = np.concatenate([rng.random(num) < p for p in accuracy]).astype(np.float64)
    return Items(WORST, right, np.repeat(np.arange(len(accuracy)), num), np.arange(num * len(accuracy)))


@pytest.mark.parametrize(
    ("accuracy", "least", "most"),
    [((0.4, 0.7, 0.8), 0.95, 1.05), ((0.4, 0.46, 0.5), 0.92, 1.1), ((0.4, 0.4), 1.0, 1.15), ((0.4,) * 5, 1.0, 1.25)],
)
def test_the_noise_of_the_worst_group_is_the_true_one_and_not_below_it_at_ties(accuracy, least, most):
    rng = np.random.default_rng(3)
    found = [worst_groups(rng, np.array(accuracy), 300) for _ in range(400)]
    stated = np.sqrt(np.mean([(one.influence**2).sum() for one in found]))
    true = (rng.binomial(300, accuracy, (50_000, len(accuracy))) / 300).min(axis=1).std()
    assert least <= stated / true <= most


def test_a_worst_group_without_a_right_answer_has_no_noise_and_its_own_size():
    rng = np.random.default_rng(0)
    found = worst_groups(rng, np.array([0.0, 0.5]), 50)
    assert found.value == 0
    assert not found.influence.any()
    assert found.num_equivalent == 50


def test_items_in_no_counted_group_are_asked_about_and_do_not_count():
    rows = classification_rows(1)
    found = items("acc_wg", rows)
    alone = [row["item"] for row in rows if row["group"] is None]
    assert len(found.units) == NUM - len(alone)
    assert found.asks_about(np.array([alone[0], found.units[0], "elsewhere"])).tolist() == [True, True, False]
    left = found.left_by(np.array([row["item"] for row in rows if row["group"] == "Africa"]))
    assert set(left.stratum.tolist()) == {"Asia", "Europe"}
    assert found.left_by(found.units) is None


def test_f1_counts_no_label_that_no_item_has():
    rows = [row | {"prediction": 50} if j % 9 == 0 else row for j, row in enumerate(classification_rows(1))]
    found = items("F1-macro_all", rows)
    assert found.value == pytest.approx(macro_f1(rows))
    again = bootstrap("F1-macro_all", rows)[0]
    assert np.sqrt((found.influence**2).sum()) == pytest.approx(again.std(), rel=ALIKE)


def test_what_the_predictions_do_not_tell_is_none():
    table = pa.Table.from_pylist(classification_rows(1))
    assert items_of(table.drop_columns(["top5"]), "acc5") is None
    assert items_of(table.drop_columns(["top5"]), "acc_top5_wg") is None
    assert items_of(table, "macro_precision") is None
    everywhere = table.set_column(table.column_names.index("group"), "group", pa.nulls(NUM, pa.string()))
    assert items_of(everywhere, "acc_wg") is None
    assert items_of(pa.Table.from_pylist(retrieval_rows(1)), "mean_recall@5") is None
