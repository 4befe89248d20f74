"""Connected components of a graph of any size, exactly: files of edges in, a label for every row with an edge out.

Files of edges are merged while one task can hold them: a graph is replaced by its spanning stars, so the same edge
found many times over costs once. What is larger goes through rounds of large-star and small-star (Kiveris et al.,
"Connected Components in MapReduce and Beyond", SoCC 2014), each an exchange by node, until every component is a star.

Cost: 16 bytes an edge and round; memory of a task about 80 bytes times `most_edges`.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pipeline.core import exchange
from pipeline.core.passes import Pass, Passes
from stages.selection import uids

MOST_EDGES = 16_000_000  # that one task holds


def components(
    edges: Sequence[Pass], passes: Passes, block_starts: np.ndarray, most_edges: int = MOST_EDGES
) -> tuple[Pass, int]:
    """The pass of labels, and how many star rounds it took.

    Its files hold (row, label), one partition a block: of every row with an edge, the lowest row of its component.
    A row may be there more than once.

    Args:
        edges: files of (a, b), uint64 rows; loops and repeats are allowed.
        block_starts: [num_blocks] uint64 number of each block's first row.
        most_edges: that one task may hold.
    """
    current = [path for made in edges for path in made.paths]
    counts = [exchange.num_rows([path]) for path in current]
    merges = 0
    while len(current) > 1 and max(counts) <= most_edges:
        groups = _groups(counts, most_edges)
        if len(groups) == len(current):
            break
        merged = passes.run(f"merge{merges}", write_stars, [([current[at] for at in group],) for group in groups])
        before, current = sum(counts), merged.paths
        counts = [exchange.num_rows([path]) for path in current]
        merges += 1
        if len(current) > 1 and sum(counts) > 0.8 * before:
            break
    rounds = 0
    if len(current) > 1 or (counts and counts[0] > most_edges):
        num_partitions = max(1, -(-4 * sum(counts) // most_edges))
        finished = False
        while not finished:
            large, unfinished = _star_round(passes, f"large{rounds}", current, num_partitions, large_star)
            finished = not unfinished
            small, _ = _star_round(passes, f"small{rounds}", large.paths, num_partitions, small_star)
            current = small.paths
            rounds += 1
    return passes.run("labels", write_labels, [([path], block_starts) for path in current]), rounds


def _star_round(passes: Passes, name: str, paths: Sequence[str], num_partitions: int, star) -> tuple[Pass, int]:
    """The pass of new edges, and how many nodes were not yet part of a star."""
    sent = passes.run(f"{name}_sent", write_by_node, [(path, num_partitions, star is large_star) for path in paths])
    made = passes.run(name, write_star_round, [(sent, number, star) for number in range(num_partitions)])
    unfinished = exchange.read_notes(made.paths).get("unfinished", 0)
    passes.drop(sent)
    return made, unfinished


def _groups(counts: Sequence[int], most_edges: int) -> list[list[int]]:
    """Consecutive files in groups of at most `most_edges`."""
    groups: list[list[int]] = [[]]
    total = 0
    for at, count in enumerate(counts):
        if groups[-1] and total + count > most_edges:
            groups.append([])
            total = 0
        groups[-1].append(at)
        total += count
    return groups


def write_stars(paths: Sequence[str], path: str) -> None:
    """None; writes the spanning stars of the files' edges."""
    row, label = labels(*_edges(paths))
    leaf = row != label
    exchange.write(path, {"a": label[leaf], "b": row[leaf]})


def write_labels(paths: Sequence[str], block_starts: np.ndarray, path: str) -> None:
    """None; writes (row, label) of every row with an edge in files that are a forest of stars together, by block."""
    row, label = labels(*_edges(paths))
    exchange.write(path, {"row": row, "label": label}, np.searchsorted(block_starts, row, side="right") - 1)


def labels(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(row, label): each row that has an edge to another, ascending, and the lowest row of its component.

    Args:
        a, b: [n] uint64, the ends of the edges.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    joined = a != b
    a, b = a[joined], b[joined]
    rows, places = np.unique(np.concatenate([a, b]), return_inverse=True)
    start, end = places[: len(a)], places[len(a) :]
    graph = coo_matrix((np.ones(len(a), np.int8), (start, end)), shape=(len(rows), len(rows)))
    _, component = connected_components(graph, directed=False)
    _, first = np.unique(component, return_index=True)
    return rows, rows[first[component]]


def write_by_node(edge_path: str, num_partitions: int, both_ways: bool, path: str) -> None:
    """None; writes the edges of one file as (node, other) by node: from both ends, or from the larger one alone."""
    a, b = _edges([edge_path])
    node, other = (
        (np.concatenate([a, b]), np.concatenate([b, a])) if both_ways else (np.maximum(a, b), np.minimum(a, b))
    )
    parts = exchange.by_hash(uids.mix(node), num_partitions)
    exchange.write(path, {"node": node, "other": other}, parts)


def write_star_round(sent: Pass, partition: int, star, path: str) -> None:
    """None; writes the edges that large_star or small_star makes of the partition's nodes."""
    rows = exchange.read(sent.paths, partition)
    node = other = np.empty(0, np.uint64)
    if rows is not None:
        node, other = rows["node"].to_numpy(), rows["other"].to_numpy()
        order = np.lexsort((other, node))
        node, other = node[order], other[order]
        new = np.ones(len(node), bool)
        new[1:] = (node[1:] != node[:-1]) | (other[1:] != other[:-1])
        new &= node != other
        node, other = node[new], other[new]
    a, b, unfinished = star(node, other)
    exchange.write(path, {"a": a, "b": b}, notes={"unfinished": unfinished})


def large_star(node: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(a, b, unfinished): each node's larger neighbours joined to the least of it and its neighbours.

    Args:
        node, other: [n] uint64, each edge from both ends, sorted by node, then other; no repeats.

    Returns:
        the new edges, and how many nodes are neither the centre nor a leaf of a star.
    """
    starts = np.flatnonzero(np.diff(node, prepend=~node[:1]))
    sizes = np.diff(starts, append=len(node))
    least = np.repeat(np.minimum(node[starts], other[starts]), sizes)
    larger = other > node
    num_smaller = np.add.reduceat(~larger, starts) if len(starts) else np.empty(0, int)
    inner = (num_smaller > 1) | ((num_smaller == 1) & (sizes > 1))
    return least[larger], other[larger], int(inner.sum())


def small_star(node: np.ndarray, other: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """(a, b, 0): each node and its smaller neighbours joined to the least of them.

    Args:
        node, other: [n] uint64, each edge from its larger end, sorted by node, then other; no repeats.
    """
    starts = np.flatnonzero(np.diff(node, prepend=~node[:1]))
    least = np.repeat(other[starts], np.diff(starts, append=len(node)))
    rest = other != least
    return (
        np.concatenate([other[starts], least[rest]]),
        np.concatenate([node[starts], other[rest]]),
        0,
    )


def _edges(paths: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    table = exchange.read(paths)
    if table is None:
        return np.empty(0, np.uint64), np.empty(0, np.uint64)
    return table["a"].to_numpy(), table["b"].to_numpy()
