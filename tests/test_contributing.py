"""The filter that CONTRIBUTING shows works as it stands there."""

from __future__ import annotations

import pathlib
import re
import sys

import pytest
import yaml

import stages
from pipeline import plan as planning
from pipeline.core import config, pool
from tests.engine_fixture import run_here

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def block(language):
    return re.search(rf"```{language}\n(.*?)```", TEXT, re.DOTALL).group(1)


@pytest.fixture
def title_case(tmp_path, monkeypatch):
    (tmp_path / "title_case.py").write_text(block("python"))
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setitem(stages.STAGES, "title_case", "title_case:TitleCase")
    yield
    sys.modules.pop("title_case", None)


def test_the_filter_of_20_lines_chooses(tmp_path, title_case):
    assert sum(bool(line.strip()) for line in block("python").splitlines()) <= 20
    path = str(ROOT / "tests" / "tiny.yaml")
    shown = yaml.safe_load(block("yaml"))
    overrides = [
        f"root={tmp_path}/root",
        f"stages={shown['stages']}",
        f"strategies={yaml.safe_dump(shown['strategies'])}",
    ]
    plan = planning.build(config.load(path, [*overrides, "compare=[sentences, as_many]", "models={}"]), path)
    outcome = run_here(plan, ["sentences/selection", "as_many/selection"])
    assert not outcome.failures
    kept = [outcome.statuses[f"{name}/selection"].record["facts"]["kept_rows"] for name in shown["strategies"]]
    assert kept[0] == kept[1] > 100
    made = outcome.statuses["title_case"].artifact.path
    pool_path = outcome.statuses["pool"].artifact.path
    for shard in pool.load_shards(pool_path):
        captions = pool.read_table(f"{pool_path}/{shard.name}.parquet")["caption"].to_pylist()
        shares = pool.read_table(f"{made}/{shard.name}.parquet")["caption_title_fraction"].to_pylist()
        for caption, share in zip(captions, shares, strict=True):
            if share is not None:
                assert share == pytest.approx(
                    sum(w[0].isupper() for w in caption.split()) / max(1, len(caption.split()))
                )
