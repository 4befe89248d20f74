"""What --plan says of bytes and hours: beside what a finished run wrote, and beside counted FLOPs."""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import estimates, states
from pipeline import plan as planning
from pipeline.core import clip_model, config
from pipeline.estimates import Estimate, _kept, _measured, columns, cost_of, estimate, summary
from stages.ingest import sources
from stages.selection import strategies as algebra
from tests.conftest import MODEL, RECORD, TINY
from tests.engine_fixture import run_here

ROOT = pathlib.Path(__file__).resolve().parent.parent


def plan_of(root, *overrides):
    return planning.build(config.load(str(TINY), [f"root={root}", *overrides]), str(TINY))


@pytest.mark.ray
def test_bytes_are_what_a_run_writes(finished, tmp_path):
    """Before anything is there: each large step within a factor of 1.5, small ones of 2.5, all together within 1.2."""
    plan = plan_of(tmp_path / "nothing")
    expected = estimate(plan, states.resolve(plan))
    done = states.resolve(plan_of(finished[0]))
    written = {name: sum(file["bytes"] for file in done[name].record["files"].values()) for name in plan.steps}
    assert expected.keys() == written.keys()
    for name, num_bytes in written.items():
        ratio = expected[name].written_bytes / num_bytes
        most = 1.5 if num_bytes > 100_000 else 2.5
        assert 1 / most < ratio < most, f"{name}: {expected[name].written_bytes:.0f} for {num_bytes}"
        assert expected[name].cpu_hours > 0 and expected[name].gpu_hours == 0
    in_all = estimates.total(expected.values()).written_bytes
    assert 1 / 1.2 < in_all / sum(written.values()) < 1.2


@pytest.mark.ray
def test_what_was_done_before_is_gone_by(finished):
    """Another threshold, another learning rate: bytes and hours are those of the last time, for as many rows or samples."""
    plan = plan_of(finished[0], "stages.1={name: caption_stats, as: words}", "recipes.tiny.lr=2e-3", "recipes.tiny.samples_seen=600", "strategies.basic.where=[words_caption_words > 2]")  # fmt: skip
    text, statuses, expected = states.describe(plan, list(plan.steps))
    assert statuses["words"].state == "done"  # its name is no identity
    train = "no_filter/seed0/train"
    assert statuses[train].state == "todo"
    (record,) = (
        record
        for path in pathlib.Path(finished[0]).glob(f"checkpoint-*/{RECORD}")
        if (record := json.loads(path.read_text()))["facts"]["num_samples"] == 235
    )
    others = [
        json.loads(path.read_text())["facts"] for path in pathlib.Path(finished[0]).glob(f"checkpoint-*/{RECORD}")
    ]
    rates = [facts["cpu_hours"] / facts["samples_seen"] for facts in others]
    assert min(rates) * 600 <= expected[train].cpu_hours <= max(rates) * 600
    weights = next(file["bytes"] for name, file in record["files"].items() if name.endswith(".safetensors"))
    assert expected[train].written_bytes == pytest.approx(weights, rel=0.01)
    line = next(line for line in text.splitlines() if line.startswith(train))
    assert "todo" in line and "~3.3 MB" in line
    assert "?" not in next(line for line in text.splitlines() if line.startswith("to come: ")).partition(" (")[0]
    done = next(line for line in text.splitlines() if line.startswith("pool "))
    assert done.split()[:2] == ["pool", "done"] and "~" not in done


def test_a_selection_keeps_what_the_same_strategy_kept_before(tmp_path):
    """Of another pool: the share is known, half is no longer assumed."""
    settings = ("models={}", "stages=[caption_stats]", "compare=[short]", "strategies={short: {where: [caption_words <= 3]}}")  # fmt: skip
    first = plan_of(tmp_path, *settings)
    assert not run_here(first, ["short/selection"]).failures
    kept = states.resolve(first)["short/selection"].record["facts"]
    share = kept["kept_samples"] / kept["ok_rows"]
    assert share != pytest.approx(0.5, abs=0.1)
    larger = plan_of(tmp_path, *settings, "pool.source.pairs=2400")
    _, _, expected = states.describe(larger, ["short/train_set"])
    per_sample = expected["pool"].written_bytes / 2400
    assert expected["short/train_set"].written_bytes == pytest.approx(share * 2400 * per_sample, rel=0.1)


@pytest.mark.parametrize("architecture, size", [("ViT-B-32", None), ("ViT-B-16", 240), (MODEL, None)])
def test_parameters_and_flops_are_the_counted_ones(architecture, size):
    from training.flops import PairFlops

    model = clip_model.build(architecture, size).model
    cost = cost_of(architecture, size)
    assert cost.num_parameters == pytest.approx(sum(one.numel() for one in model.parameters()), rel=0.005)
    assert cost.image_size_px == model.visual.image_size[0]
    padded = 3 * (cost.image_flops + cost.text_flops(10**6))
    assert padded == pytest.approx(PairFlops(model).padded, rel=0.05)


def test_what_no_table_says_is_not_known(tmp_path):
    assert cost_of("RN50") is None and cost_of("coca_roberta-ViT-B-32") is None and cost_of("hf-hub:any/model") is None
    found = Estimate(None, None, 0.0)
    assert columns(found) == ("?", "?", "0") and columns(None) == ("", "", "")
    assert summary([found, Estimate(1.26e9, 2 / 7200, None)]) == "~1.3 GB written, ~1 s of CPUs"
    plan = plan_of(tmp_path, "recipes.tiny.model=RN50", "cluster.train={gpus: 1}", "cluster.clip={gpus: 1, cpus: 4}")
    expected = estimate(plan, states.resolve(plan))
    train = expected["no_filter/seed0/train"]
    assert (train.written_bytes, train.cpu_hours, train.gpu_hours) == (None, None, None)
    assert expected["clip"].gpu_hours is None and expected["hashes"].gpu_hours == 0


def test_a_gpu_takes_its_cpus_along(tmp_path):
    plan = plan_of(tmp_path, "train.recipe=small", "cluster.train={gpus: 1, cpus: 8}")
    train = estimate(plan, states.resolve(plan))["no_filter/seed0/train"]
    assert 2 < train.gpu_hours < 8  # DataComp says 4 hours of an A100
    assert train.cpu_hours == pytest.approx(8 * train.gpu_hours)
    assert train.written_bytes == pytest.approx(151.3e6 * 4, rel=0.02)
    assert train.passing_bytes == pytest.approx(9 * train.written_bytes, rel=0.02)


@pytest.mark.parametrize(
    "num_bytes, text",
    [(0, "0 B"), (999, "1 kB"), (1234, "1.2 kB"), (5_512_000, "5.5 MB"), (1e9, "1 GB"), (4.49e11, "450 GB"), (2e12, "2 TB"), (4.5e14, "450 TB")],
)  # fmt: skip
def test_sizes_have_two_digits(num_bytes, text):
    assert estimates.size(num_bytes) == text


def test_strategies_keep_about_as_much_as_they_say():
    types = {"score": "float32", "words": "int32"}
    definitions = {
        "all": {},
        "third": {"top": {"column": "score", "fraction": 0.3}},
        "rule": {"where": ["words > 2"]},
        "third_of_rule": {"top": {"column": "score", "fraction": 0.3, "within": "rule"}},
        "both": {"all_of": ["third", "rule"]},
        "either": {"any_of": ["third", "rule"]},
        "neither": {"none_of": ["third"]},
        "as_many": {"random": {"as_many_as": "third_of_rule"}},
        "tenth": {"random": {"fraction": 0.1}},
    }
    parsed = algebra.parse_strategies(definitions, place="x", columns=types)
    kept = {name: round(_kept(parsed, name, 1000)) for name in definitions}
    assert kept == {
        "all": 1000, "third": 300, "rule": 500, "third_of_rule": 150, "both": 300, "either": 800, "neither": 700,
        "as_many": 150, "tenth": 100,
    }  # fmt: skip


def test_rows_are_counted_without_reading_a_source(tmp_path, drawn_tars):
    """Tars by their beginning, parquet by footers, csv by its first lines, a folder by its listing."""
    tars, num_samples, image_bytes = drawn_tars
    rows, size = _measured(sources.parse(str(tars), "x")["source"])
    assert rows == pytest.approx(num_samples, rel=0.1) and size == pytest.approx(image_bytes, rel=0.2)

    tables = tmp_path / "tables"
    tables.mkdir()
    for number in range(9):
        urls = [f"https://example.org/{number}/{row}.jpg" for row in range(100)]
        pq.write_table(pa.table({"url": urls, "text": ["a word"] * 100}), tables / f"{number}.parquet")
    assert _measured(sources.parse(str(tables), "x")["source"]) == (pytest.approx(900, rel=0.02), 0.0)

    lines = "".join(f"https://example.org/{row}.jpg,a word or two\n" for row in range(70_000))
    for name in ("urls.csv", "urls.csv.gz"):
        path = tmp_path / name
        with pa.output_stream(str(path), compression="gzip" if name.endswith("gz") else None) as file:
            file.write(("url,text\n" + lines).encode())
        assert _measured(sources.parse(str(path), "x")["source"])[0] == pytest.approx(70_000, rel=0.1)

    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(7):
        (photos / f"{number}.jpg").write_bytes(bytes(5000))
        (photos / f"{number}.txt").write_text("a photo")
    assert _measured(sources.parse(str(photos), "x")["source"]) == (7, 5000)


@pytest.fixture
def drawn_tars(tmp_path):
    """(folder of tars, samples, mean size of an image): a drawn pool's, which is larger than what is read of each."""
    plan = plan_of(tmp_path / "root", "pool.source.pairs=600", "pool.shard_size=300")
    assert not run_here(plan, ["pool"]).failures
    status = states.resolve(plan)["pool"]
    (folder,) = pathlib.Path(tmp_path / "root").glob("pool-*")
    only = tmp_path / "tars"
    only.mkdir()
    for tar in folder.glob("*.tar"):
        (only / tar.name).symlink_to(tar)
    tables = [pq.read_table(path) for path in folder.glob("*.parquet")]
    sizes = [size for table in tables for size in table["image_size_bytes"].to_pylist() if size]
    return only, status.record["facts"]["ok_rows"], sum(sizes) / len(sizes)


def test_the_plan_of_the_demo_fits_a_screen(tmp_path):
    """120 columns, a figure for every step that is to be done, and a sum; without torch, Ray or PIL in the process."""
    code = (
        "import sys; from pipeline.run import main; code = main(sys.argv[1:]);"
        "print(code, [name for name in ('torch', 'open_clip', 'PIL', 'ray') if name in sys.modules])"
    )
    arguments = ["--config", str(ROOT / "configs" / "demo.yaml"), "--plan", "--set", f"root={tmp_path}/root"]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    *steps, root, sums, last = done.stdout.splitlines()
    assert last == "0 []", done.stdout + done.stderr
    assert max(map(len, steps)) <= 120
    assert steps[0].split() == ["step", "state", "writes", "CPU", "time", "artifact,", "and", "why"]
    assert all("~" in line and "?" not in line for line in steps[1:])
    assert root == f"root {tmp_path}/root: 0 done, 4 todo, 119 pending"
    assert sums.startswith("to come: ~370 MB written, ~")
    assert not (tmp_path / "root").exists()
