"""Shares of values in a pool and in a selection, against counting row by row."""

from __future__ import annotations

import collections

import numpy as np
import pyarrow as pa
import pytest

from pipeline.core import pool, storage
from pipeline.core.errors import WinnowError
from stages.column_files import file_path
from stages.selection import shares
from tests.pool_fixture import write_columns, write_pool

TOPICS = ["cats", "dogs", "", "a, b", None]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """(root, pool, columns, rows as dicts): `taken` is how often the selection takes a row."""
    root = tmp_path_factory.mktemp("world")
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(300):
        row = {"ok": bool(rng.random() > 0.2), "source": str(rng.choice(["web", "shop"])), "caption": "x"}
        row |= {"topic": TOPICS[rng.integers(5)], "flag": [True, False, None][rng.integers(3)]}
        row |= {"cluster": int(rng.integers(0, 120)), "taken": int(rng.integers(0, 4)) if row["ok"] else 0}
        rows.append(row)
    entries = [{"image": None} | {key: row[key] for key in ("ok", "source", "caption")} for row in rows]
    path = write_pool(root, [entries[:170], entries[170:]])
    columns = {}
    for name, kind in {"topic": pa.string(), "flag": pa.bool_(), "cluster": pa.int32()}.items():
        columns |= write_columns(root, path, {name: pa.array([row[name] for row in rows], type=kind)})
    start = 0
    for shard in pool.load_shards(path):
        taken = np.array([row["taken"] for row in rows[start : start + shard.rows]], dtype=np.int32)
        chosen = np.flatnonzero(taken).astype(np.int32)
        table = pa.table({"row": chosen, "multiplicity": taken[chosen]})
        storage.write_bytes(file_path(f"{root}/selection", shard), pool.table_bytes(table))
        start += shard.rows
    return str(root), path, columns, rows


def test_shares_are_counted_as_row_by_row(world):
    root, path, columns, rows = world
    names = ["topic", "source", "flag", "cluster"]
    facts = shares.write_shares(path, f"{root}/selection", columns, names, f"{root}/out")
    found = storage.read_json(f"{root}/out/{shares.FILE}")
    text = {"flag": {True: "true", False: "false", None: None}}
    for name in names:
        in_pool, taken = collections.Counter(), collections.Counter()
        for row in rows:
            if row["ok"]:
                value = text.get(name, {}).get(row[name], row[name])
                value = None if value is None else str(value)
                in_pool[value] += 1
                taken[value] += row["taken"]
        order = sorted(in_pool, key=lambda value: (-in_pool[value], value is None, value or ""))
        assert found[name]["values"] == [[value, in_pool[value], taken[value]] for value in order[:50]]
        rest = order[50:]
        assert found[name]["other"] == [len(rest), sum(in_pool[v] for v in rest), sum(taken[v] for v in rest)]
        assert facts["values"][name] == len(order)
    assert found["cluster"]["other"][0] > 50


def test_the_bytes_do_not_depend_on_the_order_of_rows(world, tmp_path):
    root, path, columns, _ = world
    shares.write_shares(path, f"{root}/selection", columns, ["topic", "cluster"], f"{root}/out")
    before = storage.read_bytes(f"{root}/out/{shares.FILE}")
    shares.write_shares(path, f"{root}/selection", columns, ["cluster", "topic"], f"{root}/again")
    assert storage.read_bytes(f"{root}/again/{shares.FILE}") == before


def test_a_column_of_many_values_is_refused(world, monkeypatch):
    root, path, columns, _ = world
    monkeypatch.setattr(shares, "MAX_VALUES", 20)
    with pytest.raises(WinnowError, match="shares: cluster has more than 20 values, expected a column of few"):
        shares.write_shares(path, f"{root}/selection", columns, ["cluster"], f"{root}/out")
