"""What the report says of choices: funnel, overlap, mix, gallery, published values; by hand and from a small real run."""

from __future__ import annotations

import csv
import datetime
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import plan as planning
from pipeline import runs
from pipeline.core import config
from pipeline.core.errors import ConfigError
from pipeline.report import build_report, read_run, samples, terminal_table
from stages.selection import gallery, thumbnails
from tests.engine_fixture import run_here
from tests.report_fixture import STRATEGIES, edit_run, write_artifact, write_run

TINY = str(Path(__file__).resolve().parent / "tiny.yaml")
FEW = {name: STRATEGIES[name] for name in ("no_filter", "random30", "clip_top30")}


class Text(HTMLParser):
    """The text of each section by its title, its tables as lists of rows, and all attributes that could fetch."""

    def __init__(self, html):
        super().__init__()
        self.sections: dict[str, str] = {}
        self.tables: dict[str, list[list[list[str]]]] = {}
        self.fetched: list[str] = []
        self.tags: set[str] = set()
        self._title, self._in_title = "", False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.fetched += [value for name, value in attrs if name.startswith("on") or name in ("src", "href", "srcset")]
        self._in_title = tag == "h2" or (self._in_title and tag != "p")
        if tag == "h2":
            self._title = ""
        elif tag == "table":
            self.tables.setdefault(self._title, []).append([])
        elif tag == "tr":
            self.tables[self._title][-1].append([])
        elif tag in ("td", "th"):
            self.tables[self._title][-1][-1].append("")

    def handle_endtag(self, tag):
        if tag == "h2":
            self._in_title = False

    def handle_data(self, data):
        if self._in_title:
            self._title += data
            return
        self.sections[self._title] = self.sections.get(self._title, "") + data + " "
        table = self.tables.get(self._title)
        if table and table[-1] and table[-1][-1]:
            table[-1][-1][-1] += data + " "


def page(run):
    return Text((run / "leaderboard.html").read_text())


def jpeg(number=0, size=(96, 64)) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, "JPEG", quality=thumbnails.JPEG_QUALITY)
    return data.getvalue()


def sample(number, side="kept", rule=1, **own):
    row = {"group": "cut" if rule is not None else "random", "rule": rule, "side": side, "uid": f"{number:032x}"}
    row |= {"value": None if rule is None else "0.281", "removed_by": None if side == "kept" else 0}
    return row | {"caption": f"caption {number}", "thumbnail": jpeg(number)} | own


def add_gallery(run: Path, strategy: str, rows, rules=("words > 2", "top 0.3 of clip_score")) -> str:
    facts = {"samples": len(rows), "pictures": 0, "rules": list(rules)}
    files = {gallery.FILE: pa.Table.from_pylist(rows, schema=gallery.SCHEMA)}
    return add_to(run, strategy, "gallery", facts, files)


def add_to(run: Path, strategy: str, key: str, facts, files) -> str:
    path = write_artifact(run.parents[1], key, {"strategy": strategy}, facts, files)

    def change(data):
        next(entry for entry in data["strategies"] if entry["name"] == strategy)[key] = path

    edit_run(run, change)
    return path


def add_shares(run: Path, strategy: str, found) -> str:
    edit_run(run, lambda data: data.update(shares=["topic", "flag"]))
    return add_to(run, strategy, "shares", {"values": {}}, {"shares.json": json.dumps(found)})


def edit_facts(run: Path, strategy: str, change) -> None:
    entries = json.loads((run / "run.json").read_text())["strategies"]
    path = run.parents[1] / next(e["selection"] for e in entries if e["name"] == strategy) / "_artifact.json"
    record = json.loads(path.read_text())
    change(record["facts"])
    path.write_text(json.dumps(record))


def section(markdown: str, title: str) -> str:
    return re.search(rf"\n## {title}\n(.*?)(?=\n## |\Z)", markdown, re.DOTALL)[1]


def test_the_funnel_is_a_table_in_each_form(tmp_path):
    run = write_run(tmp_path, seeds=(0,), strategies=FEW)

    def change(facts):
        facts["funnel"][1] |= {"alone_kept": 8000, "only_removed": 90}
        facts["funnel"][2] |= {"alone_kept": 3100, "only_removed": 5030}

    edit_facts(run, "clip_top30", change)
    build_report(str(run))
    part = section((run / "leaderboard.md").read_text(), "Funnel").partition("### clip_top30")[2]
    assert "| rule | left | removed | alone keeps | only this removes |" in part
    assert "| ok | 9,900 | 100 | - | - |" in part
    assert r"| caption_words &gt; 2 | 8,000 | 1,900 | 8,000 | 90 |" in part
    assert "| top 0.3 by clip_score | 2,970 | 5,030 | 3,100 | 5,030 |" in part
    found = page(run)
    tables = found.tables["Funnel"]
    assert [len(table) for table in tables] == [2, 4, 4]  # the whole pool has one rule
    assert [cell.strip() for cell in tables[2][2]] == ["caption_words > 2", "8,000", "1,900", "8,000", "90"]
    rows = {row["strategy"]: row for row in json.loads((run / "leaderboard.json").read_text())["rows"]}
    assert rows["clip_top30"]["funnel"][1] == {
        "rule": "caption_words > 2", "rows_in": 9900, "rows_kept": 8000, "alone_kept": 8000, "only_removed": 90
    }  # fmt: skip
    assert rows["random30"]["funnel"][1]["alone_kept"] is None  # a record from before


def test_the_overlap_is_a_table_in_each_form(tmp_path):
    run = write_run(tmp_path, seeds=(0,), strategies=FEW)
    overlap = build_report(str(run)).run.overlap
    data = json.loads((run / "leaderboard.json").read_text())
    assert data["overlap_rows"] == overlap.shared_rows.tolist()
    assert data["overlap_one_in"] == 1
    assert data["overlap"][0][1] == pytest.approx(0.3)
    shared = f"{overlap.shared_rows[1, 2]:,.0f}"
    line = f"| 2 random30 | 0.30 (2,970) | 1.00 (2,970) | {overlap.jaccard[1, 2]:.2f} ({shared}) |"
    assert line in section((run / "leaderboard.md").read_text(), "Overlap")
    (table,) = page(run).tables["Overlap"]
    assert [cell.split() for cell in table[2]][-1] == [f"{overlap.jaccard[1, 2]:.2f}", shared]


def test_the_mix_is_shown_beside_the_pool(tmp_path):
    run = write_run(tmp_path, seeds=(0,), strategies=FEW)
    build_report(str(run))
    assert "Mix" not in page(run).sections
    topics = [["cats", 6000, 30], ["", 2000, 10], [None, 1000, 0]]
    add_shares(
        run,
        "random30",
        {"topic": {"values": topics, "other": [7, 900, 60]}, "flag": {"values": [], "other": [0, 0, 0]}},
    )
    topics = [["cats", 6000, 0], ["", 2000, 0], [None, 1000, 0]]
    add_shares(
        run,
        "clip_top30",
        {"topic": {"values": topics, "other": [7, 900, 0]}, "flag": {"values": [], "other": [0, 0, 0]}},
    )
    build_report(str(run))
    part = section((run / "leaderboard.md").read_text(), "Mix")
    assert "| topic | pool | no_filter | random30 | clip_top30 |" in part
    assert "| cats | 60.6 | - | 30.0 | - |" in part  # nothing taken has no shares, nor has what was not counted
    assert "| (empty) | 20.2 | - | 10.0 | - |" in part
    assert "| (none) | 10.1 | - | 0.0 | - |" in part
    assert "| other (7 values) | 9.1 | - | 60.0 | - |" in part
    tables = page(run).tables["Mix"]
    assert [len(table) for table in tables] == [5, 1]
    assert [cell.strip() for cell in tables[0][4]] == ["other (7 values)", "9.1", "-", "60.0", "-"]
    rows = {row["strategy"]: row for row in json.loads((run / "leaderboard.json").read_text())["rows"]}
    assert rows["random30"]["shares"]["topic"] == {
        "values": [["cats", 6000, 30], ["", 2000, 10], [None, 1000, 0]], "other": [7, 900, 60]
    }  # fmt: skip
    assert rows["no_filter"]["shares"] == {}


def test_published_values_stand_beside_ours_with_their_note(tmp_path):
    run = write_run(tmp_path, seeds=(0, 1), strategies=FEW)
    build_report(str(run))
    assert not any("published" in name for name in (run / "leaderboard.md").read_text().split("\n")[4].split("|"))
    note = "older <retrieval> metric"
    edit_run(run, lambda data: data.update(published={"no_filter": 13.2, "clip_top30": 15.85}, published_note=note))
    text = terminal_table(build_report(str(run)))
    header = next(line for line in text.splitlines() if line.lstrip().startswith("#"))
    assert re.search(r"average \(4\) +± +published +vs no_filter", header)
    assert "not measured here: older <retrieval> metric." in text
    markdown = (run / "leaderboard.md").read_text()
    lines = [line.split(" | ") for line in markdown.splitlines() if line.startswith("| ")][:4]
    column = lines[0].index("published")
    assert {line[1]: line[column] for line in lines[1:]} == {
        "no_filter": "13.2", "random30": "-", "clip_top30": "15.85"
    }  # fmt: skip
    assert "older &lt;retrieval&gt; metric" in markdown
    table = page(run).tables["Leaderboard"][0]
    column = [cell.strip() for cell in table[0]].index("published")
    assert sorted(row[column].strip() for row in table[1:]) == ["-", "13.2", "15.85"]
    assert "older <retrieval> metric" in page(run).sections["Leaderboard"]
    rows = csv.DictReader(io.StringIO((run / "leaderboard.csv").read_text()))
    assert {row["strategy"]: row["published"] for row in rows} == {
        "no_filter": "0.132", "random30": "", "clip_top30": "0.1585"
    }  # fmt: skip
    data = json.loads((run / "leaderboard.json").read_text())
    assert data["published_note"] == note
    assert {row["strategy"]: row["published"] for row in data["rows"]}["no_filter"] == 0.132


def test_the_gallery_shows_pictures_and_captions_as_text(tmp_path):
    run = write_run(tmp_path, seeds=(0,), strategies=FEW)
    build_report(str(run))
    assert "Gallery" not in page(run).sections
    hostile = '<script>alert(1)</script>" onerror="x\u202e\x1b'
    path = add_gallery(run, "clip_top30", [
        sample(1), sample(2, caption=hostile), sample(3, "removed", thumbnail=None),
        sample(4, "removed", rule=None, caption=""), sample(5, caption="y" * 5000, rule=0),
    ])  # fmt: skip
    before = build_report(str(run))
    found = page(run)
    text = found.sections["Gallery"]
    assert "kept:  top 0.3 of clip_score 0.281 caption 1" in text
    assert "removed:  top 0.3 of clip_score 0.281 caption 3" in text
    assert "removed: at random words > 2 (no caption)" in text
    assert "<script>alert(1)</script>" in text
    assert len(found.fetched) == 4
    assert all(re.fullmatch(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", source) for source in found.fetched)
    html = (run / "leaderboard.html").read_text()
    assert "img-src data:" in html
    assert html.count("<script") == 1  # the page's own
    assert not {"\x1b", "\u202e"} & set(html)
    assert "y" * 302 not in html
    markdown = (run / "leaderboard.md").read_text()
    assert "caption 1" not in markdown
    assert markdown.count("leaderboard.html shows samples") == 1
    row = next(r for r in json.loads((run / "leaderboard.json").read_text())["rows"] if r["strategy"] == "clip_top30")
    assert row["gallery"] == path
    assert [(group["rule"], group["side"], len(group["samples"])) for group in row["samples"]] == [
        ("top 0.3 of clip_score", "kept", 2), ("top 0.3 of clip_score", "removed", 1), ("", "removed", 1), ("words > 2", "kept", 1)
    ]  # fmt: skip
    assert before.notes == ()


def test_a_page_with_many_pictures_stays_small(tmp_path, monkeypatch):
    run = write_run(tmp_path, seeds=(0,))
    for strategy in STRATEGIES:
        groups = [(rule, side) for rule in (0, 1, None) for side in ("kept", "removed")]
        add_gallery(run, strategy, [sample(number, side, rule) for rule, side in groups for number in range(8)])
    build_report(str(run))
    size = len((run / "leaderboard.html").read_bytes())
    assert 1_000_000 < size < samples.MAX_BYTES + 200_000
    assert len(page(run).fetched) == 6 * 6 * 8
    monkeypatch.setattr(samples, "MAX_BYTES", size // 2)
    build_report(str(run))
    assert len((run / "leaderboard.html").read_bytes()) < size // 2 + 200_000
    found = page(run)
    num = int(re.search(r"(\d) of 8 samples a side, to keep this page small", found.sections["Gallery"])[1])
    assert len(found.fetched) == 6 * 6 * num > 0
    monkeypatch.setattr(samples, "MAX_BYTES", 1000)
    build_report(str(run))
    assert "Gallery" not in page(run).sections


@pytest.mark.parametrize("key, fault", [
    ("gallery", "a thumbnail is no JPEG"), ("gallery", "missing or unfinished"), ("shares", "KeyError"), ("shares", "expected JSON"),
])  # fmt: skip
def test_what_cannot_be_read_is_a_note(tmp_path, key, fault):
    run = write_run(tmp_path, seeds=(0,), strategies=FEW)
    if fault == "a thumbnail is no JPEG":
        add_gallery(run, "random30", [sample(1, thumbnail=b"<svg onload=alert(1)>")])
    elif fault == "missing or unfinished":
        path = tmp_path / add_gallery(run, "random30", [sample(1)])
        (path / "_artifact.json").unlink()
    elif fault == "KeyError":
        add_shares(run, "random30", {"topic": {"values": []}})
    else:
        add_to(run, "random30", "shares", {}, {"shares.json": "{"})
    notes = build_report(str(run)).notes
    assert len(notes) == 1
    assert re.match(rf"random30: .*{fault}", notes[0])


@pytest.mark.parametrize(
    "override, message",
    [
        ("shares=[languag]", r"shares\.0 = languag, expected a column\. Did you mean language"),
        ("shares=[source, clip_score]", r"shares\.1 = clip_score of type float32, expected string or bool or int32"),
        ("shares=[source, source]", r"shares = source, source, expected each column once"),
        ("shares=source", r"shares = source, expected a list"),
        ("published={basic: 13.2}", r"published\.basic: expected a compared strategy"),
        ("published={oracl: 13.2}", r"published\.oracl: expected a compared strategy\. Did you mean oracle"),
        ("published={oracle: 113.2}", r"published\.oracle = 113\.2, expected a number <= 100"),
        ("published={oracle: high}", r"published\.oracle = high, expected a number"),
        ("published_note=x", r"published_note has no effect without published"),
    ],
)
def test_config_errors_are_one_line(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message) as caught:
        planning.build(config.load(TINY, [f"root={tmp_path}", override]), TINY)
    assert "\n" not in str(caught.value)


def test_a_run_makes_galleries_and_shares_and_the_report_shows_them(tmp_path):
    """Without training: what the report reads of choices is there as soon as the selections are."""
    overrides = [f"root={tmp_path}", "shares=[source, language, truth_fault]", "published={no_filter: 13.2}"]
    overrides += ["compare=[no_filter, basic, oracle, trusted_only]", "stages=[image_stats, caption_stats, language]"]
    overrides += ["models={}", "strategies.basic_and_clip={all_of: [basic]}"]
    plan = planning.build(config.load(TINY, overrides), TINY)
    strategies = ("no_filter", "basic", "oracle")
    targets = [f"{name}/{step}" for name in strategies for step in ("gallery", "shares")]
    targets += ["trusted_only/gallery", "profile"]
    assert "trusted_only/shares" not in plan.steps
    outcome = run_here(plan, targets)
    assert outcome.failures == {}
    date = datetime.datetime(2026, 11, 24, 16, 0, tzinfo=datetime.timezone.utc)
    run = tmp_path / "runs" / "here"
    (run / "run.json").write_text(json.dumps(runs.run_record(plan, outcome, "tiny", date)))
    board = build_report(str(run))
    assert board.notes == ()
    rows = {row["strategy"]: row for row in json.loads((run / "leaderboard.json").read_text())["rows"]}
    basic = rows["basic"]
    sides = {(group["rule"], group["side"]) for group in basic["samples"]}
    assert {("caption_words > 2", "kept"), ("caption_words > 2", "removed"), ("", "kept"), ("", "removed")} <= sides
    assert basic["funnel"][1]["alone_kept"] == basic["funnel"][1]["rows_kept"]
    assert sum(basic["funnel"][step]["only_removed"] for step in range(1, 5)) > 0
    for name in strategies:
        for column in ("source", "language", "truth_fault"):
            found = rows[name]["shares"][column]
            pool_rows = sum(entry[1] for entry in found["values"]) + found["other"][1]
            samples_taken = sum(entry[2] for entry in found["values"]) + found["other"][2]
            assert (pool_rows, samples_taken) == (board.run.header["pool"]["ok"], rows[name]["kept_samples"])
    faults = {value: taken for value, _, taken in rows["oracle"]["shares"]["truth_fault"]["values"]}
    assert {value for value, taken in faults.items() if taken} == {""}
    html = page(run)
    assert html.fetched
    assert html.sections["Gallery"].count("at random") >= 6
    assert (run / "leaderboard.html").stat().st_size < 3_000_000
    names = {strategy.name: strategy.gallery for strategy in read_run(str(run)).compared}
    pictures = pq.read_table(tmp_path / names["basic"] / gallery.FILE)["thumbnail"]
    assert pictures.null_count == 0
    assert max(len(picture) for picture in pictures.to_pylist()) < 6000
