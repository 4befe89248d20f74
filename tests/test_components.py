"""Components of graphs that are hard for one rule or another, whatever the memory, against scipy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from pipeline.core import exchange
from stages.duplicates.components import components
from tests.passes_fixture import passes_here

ROWS = 100_000


def chain(rng):
    return np.arange(ROWS - 1), np.arange(1, ROWS)


def shuffled_chain(rng):
    order = rng.permutation(ROWS)
    return order[:-1], order[1:]


def stars(rng):
    leaves = np.arange(ROWS)
    centres = leaves // 1000 * 1000 + 999  # the highest row is the centre
    return centres, leaves


def one_giant(rng):
    a, b = rng.integers(0, ROWS, (2, 3 * ROWS))
    return a, b


def many_small(rng):
    a = rng.integers(0, ROWS, ROWS // 3)
    return a, np.minimum(a + rng.integers(0, 5, len(a)), ROWS - 1)


def binary_tree(rng):
    nodes = np.arange(1, ROWS)
    names = rng.permutation(ROWS)
    return names[nodes], names[(nodes - 1) // 2]


def nothing(rng):
    return np.empty(0, int), np.empty(0, int)


def run(a, b, folder, num_files, most_edges, num_blocks=7):
    passes = passes_here(folder)
    made = passes.run(
        "edges", write_edges, [(a[number::num_files], b[number::num_files]) for number in range(num_files)]
    )
    starts = np.linspace(0, ROWS, num_blocks, endpoint=False).astype(np.uint64)
    labels, rounds = components([made], passes, starts, most_edges)
    found = {}
    for block, start in enumerate(starts):
        table = exchange.read(labels.paths, block)
        if table is not None:
            rows = table["row"].to_numpy()
            end = starts[block + 1] if block + 1 < num_blocks else ROWS
            assert ((rows >= start) & (rows < end)).all()
            for row, label in zip(rows.tolist(), table["label"].to_pylist(), strict=True):
                assert found.setdefault(row, label) == label
    return found, rounds


def write_edges(a, b, path):
    exchange.write(path, {"a": a.astype(np.uint64), "b": b.astype(np.uint64)})


def expected(a, b):
    a, b = a[a != b], b[a != b]
    graph = coo_matrix((np.ones(len(a)), (a, b)), shape=(ROWS, ROWS))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return {row: int(first[component[row]]) for row in np.union1d(a, b).tolist()}


@pytest.mark.parametrize("graph", [chain, shuffled_chain, stars, one_giant, many_small, binary_tree, nothing])
@pytest.mark.parametrize("num_files, most_edges", [(1, 1 << 60), (3, 30_000)])
def test_labels_are_scipys(graph, num_files, most_edges, tmp_path):
    a, b = graph(np.random.default_rng(0))
    found, rounds = run(a, b, tmp_path, num_files, most_edges)
    assert found == expected(a, b)
    if most_edges == 30_000 and len(a) > 2 * most_edges:
        assert 1 <= rounds <= 2 * np.log2(ROWS)
    if most_edges == 1 << 60:
        assert rounds == 0


def test_files_are_merged_as_long_as_that_shrinks_them(tmp_path):
    """The same edges in all files end in one file without a round; a chain in pieces goes through rounds."""
    a, b = many_small(np.random.default_rng(0))
    found, rounds = run(np.repeat(a, 6), np.repeat(b, 6), tmp_path / "a", 6, 70_000)
    assert (found, rounds) == (expected(a, b), 0)
    a, b = shuffled_chain(np.random.default_rng(0))
    found, rounds = run(a, b, tmp_path / "b", 6, 60_000)
    assert found == expected(a, b)
    assert rounds > 1


def test_a_resumed_run_does_only_what_is_missing(tmp_path):
    a, b = stars(np.random.default_rng(1))
    first, _ = run(a, b, tmp_path, 4, 30_000)
    labels = sorted((tmp_path / "labels").iterdir())
    kept = labels[0].stat().st_mtime_ns
    labels[1].unlink()
    again, _ = run(a, b, tmp_path, 4, 30_000)
    assert again == first
    assert labels[0].stat().st_mtime_ns == kept
