"""What is in a pool: the plan of `--until stages`, its page in a real browser, and the slider on the leaderboard's page."""

from __future__ import annotations

import dataclasses
import datetime
import html
import json
import pathlib
import re

import pytest

from pipeline import plan as planning
from pipeline import report, runs
from pipeline.core import artifact, config, storage
from pipeline.core.errors import ConfigError
from pipeline.report import deciles, pool_page
from pipeline.report.records import read_run
from stages.selection import pool_profile
from stages.selection.strategies import parse_comparisons
from tests.browser_fixture import opened
from tests.engine_fixture import run_here
from tests.report_fixture import edit_run, write_run
from tests.test_metadata_run import metadata
from tests.test_metadata_run import plan_of as plan_of_metadata
from tests.test_plan import plan_of
from tests.test_profile import ADDED, GROUPS, SCORES, World, planted_rows, ranked

HOSTILE = "<script>alert(1)</script></script>\" onerror='x' \u202e&amp;"
NOW = datetime.datetime(2026, 1, 31, tzinfo=datetime.timezone.utc)
ENTRY = {"error": None, "keeps_low": ["limit"], "flagged": ["limit >= 5"]}


def planted(root):
    """(root, name of a finished profile, its rows) of a pool with hostile captions, values and hosts."""
    rows = planted_rows(420)
    for row in rows[::2]:
        row |= {"caption": f"{HOSTILE} {row['uid'][:4]}", "url": "https://<img src=x onerror=alert(1)>.org/"}
        row["language"] = HOSTILE
    world = World(root, rows)
    made = artifact.Artifact(str(root), "profile", {"test": 1})
    flagged = parse_comparisons(ENTRY["flagged"], "flagged", ADDED)
    arguments = (world.pool_path, world.columns, world.types, SCORES, GROUPS, made.path)
    artifact.finish(made, pool_profile.write_profile(*arguments, flagged=flagged))
    return made.name, rows


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """(folder of a run that ended at its stages, the pool's rows)."""
    root = tmp_path_factory.mktemp("root")
    name, rows = planted(root)
    folder = root / "runs" / "2026-01-31T00-00-00Z_demo"
    ok = sum(row["ok"] for row in rows)
    pool = {"path": "pool-3f2a91c0d4e7", "rows": len(rows), "ok": ok, "failed": {}}
    data = {key: [] for key in ("strategies", "tasks", "trainings", "results")}
    data |= {"config_name": HOSTILE, "date": "2026-01-31T00:00:00Z", "pool": pool, "profile": {"path": name, **ENTRY}}
    storage.write_json(f"{folder}/run.json", data)
    text = report.write_report(str(folder))
    assert text.startswith(pool_page.TITLE) and text.endswith(f"{folder}/pool.html")
    return folder, rows


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """The folder of a run with a leaderboard and a profile."""
    root = tmp_path_factory.mktemp("board")
    folder = write_run(root, seeds=(0, 1), num_items=60)
    name, _ = planted(root)
    edit_run(folder, lambda data: data.update(profile={"path": name, **ENTRY}))
    report.write_report(str(folder))
    return folder


def kept_rows(rows, name, tenths, low=False):
    """The rows that the slider keeps there, by sorting."""
    order = ranked([row for row in rows if row["ok"]], name)
    if low:
        num_left = len(order) * (10 - tenths) // 10
        return order[num_left:]
    return order[: len(order) * tenths // 10]


def test_precision_and_recall_are_those_of_the_rows(run):
    folder, rows = run
    profile = read_run(str(folder)).profile
    for name, low in (("score", False), ("limit", True)):
        found = profile.scores[name][::-1] if low else profile.scores[name]
        lines = deciles.kept_lines(found, low)
        everything = kept_rows(rows, name, 10)
        good = sum(row["truth_fault"] == "" for row in everything)
        for tenths, line in enumerate(lines):
            kept = kept_rows(rows, name, tenths, low)
            kept_good = sum(row["truth_fault"] == "" for row in kept)
            assert (line.tenths, line.rows) == (tenths, len(kept))
            assert line.precision == (kept_good / len(kept) if kept else None)
            assert line.recall == kept_good / good
            if kept and (name, tenths) != ("score", 1):  # whose numbers are all infinite
                edge = max(row[name] for row in kept) if low else min(row[name] for row in kept)
                assert line.edge == pytest.approx(edge)


def test_digests_stay_out_of_the_terminal(run):
    found = read_run(str(run[0]))
    values = {**found.profile.values, "caption_sha256": found.profile.values["language"]}
    found = dataclasses.replace(found, profile=dataclasses.replace(found.profile, values=values))
    text = pool_page.pool_text(found)
    assert "language: " in text and "_sha256" not in text
    assert "caption_sha256" in pool_page.pool_json(found)


def test_the_terminal_and_json_say_what_the_page_says(run):
    folder, rows = run
    text = pool_page.pool_text(read_run(str(folder)))
    ok = sum(row["ok"] for row in rows)
    assert f"{len(rows)} rows, {ok} usable, {len(rows) - ok} failed (" in text
    assert "duplicates by image: 8 groups of 24 rows, 16 more than one of each" in text
    kept = kept_rows(rows, "limit", 3, low=True)
    precision = sum(row["truth_fault"] == "" for row in kept) / len(kept)
    assert f"limit, lowest 30 %: precision {100 * precision:.1f} %" in text
    assert text.isprintable() or not re.search(r"[\u202e\x1b]", text)
    data = json.loads((folder / "pool.json").read_text())
    assert data["profile"]["ok_rows"] == ok and data["profile"]["keeps_low"] == ["limit"]
    page = (folder / "pool.html").read_text()
    for name in ("language", "source", "url_host", "limit", "score", "duplicates: image", "failures", "planted truth"):
        assert name in page.lower()


def test_nothing_hostile_is_markup(run, board):
    for path in (run[0] / "pool.html", board / "leaderboard.html"):
        text = path.read_text()
        assert text.count("<script>") == text.count("</script>") == 1
        assert html.escape("<script>alert(1)</script>") in text and "<img src=x" not in text
        assert "\u202e" not in text


def test_the_report_is_a_pure_function_of_the_records(run, board):
    for folder, names in ((run[0], ("pool.html", "pool.json")), (board, ("pool.html", "leaderboard.html"))):
        before = [(folder / name).read_bytes() for name in names]
        assert report.write_report(str(folder)).endswith("pool.html")
        assert [(folder / name).read_bytes() for name in names] == before


def test_fewer_rows_a_tenth_are_shown_where_pictures_are_many(run, monkeypatch):
    run = read_run(str(run[0]))
    (whole,) = deciles.score_sections(run.profile)
    monkeypatch.setattr(deciles, "MAX_BYTES", len(whole) // 2)
    (small,) = deciles.score_sections(run.profile)
    assert len(small) < len(whole) and re.search(r"[1-5] of 6 rows a tenth, to keep this page small", small)
    monkeypatch.setattr(deciles, "MAX_BYTES", 10)
    (none,) = deciles.score_sections(run.profile)
    assert "<figure" not in none and "tenth 10" in none


@pytest.mark.parametrize("fault", ["missing", "broken", "cut"])
def test_a_profile_that_cannot_be_read_is_a_reason(run, tmp_path, fault):
    root = run[0].parent.parent
    name = next(root.glob("profile-*")).name
    copy = tmp_path / "runs" / "x"
    data = json.loads((run[0] / "run.json").read_text())
    storage.write_json(str(copy / "run.json"), data)
    if fault != "missing":
        (tmp_path / name).mkdir()
        for file in (root / name).iterdir():
            (tmp_path / name / file.name).write_bytes(file.read_bytes())
        file = tmp_path / name / ("profile.json" if fault == "broken" else "samples.parquet")
        content = file.read_bytes()
        file.write_bytes(b"{}" if fault == "broken" else content[: len(content) // 2])
    text = report.write_report(str(copy))
    assert text.startswith("the pool's profile: ") and "\n" not in text
    assert not (copy / "pool.html").exists()


# ---- in a browser


@pytest.mark.browser
@pytest.mark.parametrize("page", ["pool", "leaderboard"])
def test_the_slider_moves_tenths_and_says_what_is_kept(run, board, browser, page):
    path = run[0] / "pool.html" if page == "pool" else board / "leaderboard.html"
    rows = run[1]
    with opened(browser, path) as found:
        score = found.page.locator("details.score", has=found.page.locator("summary", has_text="score")).first
        slider, output = score.locator("input[type=range]"), score.locator("output")

        def state():
            return [score.locator(f".{side} .tenth h4 b").all_text_contents() for side in ("kept", "dropped")]

        names = [f"tenth {number}" for number in range(1, 11)]
        assert state() == [names[:3], names[3:]]
        slider.focus()
        found.page.keyboard.press("ArrowRight")
        for tenths, key in ((4, None), (5, "ArrowRight"), (4, "ArrowLeft"), (10, "End"), (0, "Home"), (1, "ArrowUp")):
            if key:
                found.page.keyboard.press(key)
            assert state() == [names[:tenths], names[tenths:]]
            kept = kept_rows(rows, "score", tenths)
            text = output.text_content()
            assert text == slider.get_attribute("aria-valuetext") and text.startswith(f"{10 * tenths} %: ")
            if kept:
                share = sum(row["truth_fault"] == "" for row in kept) / len(kept)
                assert f" {len(kept)} of " in text and f"precision {100 * share:.1f} %" in text
        assert "tenths of the rows kept by score" in slider.get_attribute("aria-label")
        low = found.page.locator("details.score", has=found.page.locator("summary", has_text="limit")).first
        assert "limit ≤ " in low.locator("output").text_content()


@pytest.mark.browser
def test_pictures_that_are_flagged_are_blurred_until_a_click(run, browser):
    folder, rows = run
    flagged = {row["uid"] for row in rows if row["limit"] >= 5}
    with opened(browser, folder / "pool.html") as found:
        figures = found.page.locator("details.score[open] figure:has(img)")
        blurred = 0
        for figure in figures.all():
            is_flagged = figure.get_attribute("title").removeprefix("uid ") in flagged
            filters = figure.locator("img").evaluate("image => getComputedStyle(image).filter")
            assert ("blur" in filters) == is_flagged
            blurred += is_flagged
        assert blurred
        image = found.page.locator("details.score[open] figure img.blurred").first
        handle = image.element_handle()
        image.click()
        assert "blur" not in handle.evaluate("image => getComputedStyle(image).filter")


@pytest.mark.browser
def test_without_its_script_the_page_shows_ten_groups_and_the_numbers(run, browser):
    with opened(browser, run[0] / "pool.html", java_script_enabled=False) as found:
        score = found.page.locator("details.score[open]")
        assert score.locator(".tenths > .tenth").count() == 10
        assert not score.locator("input").is_visible()
        score.locator("details > summary").click()
        assert score.locator(".cuts tbody tr").count() == 11 and score.locator(".cuts").is_visible()


@pytest.mark.browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_pool_page_fits_a_phone_and_can_be_read(run, browser, scheme):
    size = {"width": 390, "height": 844}
    with opened(browser, run[0] / "pool.html", viewport=size, color_scheme=scheme) as found:
        for details in found.page.locator("details").all():
            details.evaluate("details => { details.open = true; }")
        assert found.overflow_px() <= 0
        faint = [one for one in found.contrasts() if one[0] < 4.5]
        assert faint == []


# ---- the plan and a run


def test_until_stages_reaches_every_stage_and_the_profile(tmp_path):
    plan = plan_of(tmp_path)
    assert planning.targets(plan, "stages") == [
        "image_stats", "caption_stats", "language", "hashes", "clip", "profile"
    ]  # fmt: skip
    work = plan.steps["profile"].work
    assert work.scores == ("aspect_ratio", "caption_words", "clip_score", "language_confidence", "min_side_px")
    assert work.keeps_low == ("aspect_ratio",)
    assert {"caption_chars", "truth_fault", "width_px", "source", "url_host"} <= set(work.types)
    assert not {"uid", "url", "clip_image", "error"} & set(work.types)
    reached = plan.ancestors(planning.targets(plan, "stages"))
    assert not [name for name in reached if name.startswith(("no_filter", "oracle"))]
    without = plan_of(tmp_path, "stages=[]", "strategies={no_filter: {}}", "compare=[no_filter]", "models={}")
    assert planning.targets(without, "stages") == ["profile"]
    assert "caption_words" in without.steps["profile"].work.types


@pytest.mark.parametrize(
    "override, message",
    [
        ("stages=[{name: hashes, as: stages}]", r"stages\.0\.as = stages, expected a name"),
        ("stages=[{name: hashes, as: profile}]", r"stages\.0\.as = profile, expected a name"),
        ("strategies.stages={}", r"strategies\.stages: the name is that of a step"),
        ("flagged=[clip_scor >= 0.5]", r"flagged\.0 = clip_scor >= 0\.5: clip_scor is an unknown column\. Did you mean clip_score"),
        ("flagged=[clip_score]", r"flagged\.0 = clip_score, expected COLUMN OP LITERAL"),
        ("stages=[{name: clip, model: scorer}, {name: clusters, as: c}]\nstrategies={a: {}}\ncompare=[a]\nflagged=[c_cluster_targets > 0]",
         r"flagged uses c_cluster_targets, which has no values"),
    ],
)  # fmt: skip
def test_what_has_no_meaning_is_refused(tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        plan_of(tmp_path, *override.splitlines())


def test_flagged_is_part_of_the_identity_of_what_shows_pictures(tmp_path):
    plain, other = plan_of(tmp_path), plan_of(tmp_path, "flagged=[clip_score < 0]")
    changed = {name for name, step in other.steps.items() if step.values != plain.steps[name].values}
    assert changed == {"profile", *(f"{name}/gallery" for name in ("no_filter", "basic_and_clip", "oracle"))}
    assert other.steps["no_filter/gallery"].inputs["column/clip_score"] == "clip"
    assert other.steps["trusted_only/gallery"].work[-1] == ()
    assert any("the reference trusted has no clip_score" in warning for warning in other.warnings)


def test_a_pool_without_images_has_the_same_page_without_pictures(tmp_path):
    rows = metadata(tmp_path / "metadata")
    plan = plan_of_metadata(tmp_path)
    outcome = run_here(plan, planning.targets(plan, "stages"))
    assert outcome.failures == {}
    folder = pathlib.Path(plan.config.root, "runs", "here")
    storage.write_json(f"{folder}/run.json", runs.stages_record(plan, outcome, "metadata", NOW))
    shown = report.write_report(str(folder))
    assert f"{len(rows)} rows, {len(rows)} usable." in shown and "nothing was trained" not in shown
    assert "url_host: 0.example.org 57.4 %" in shown
    text = (folder / "pool.html").read_text()
    assert "clip_l14_similarity_score" in text and "Duplicates: embedding" in text and "<img" not in text
    assert not (folder / "selections.txt").exists() and not (folder / "leaderboard.html").exists()
    found = read_run(str(folder)).profile
    assert found.numbers["clip_l14_similarity_score"].rows == len(rows)
    assert "width_px" not in found.numbers  # not known without images
    assert found.duplicates["embedding"].largest == (4, 4)


@pytest.mark.ray
def test_a_run_until_stages_ends_with_the_page_and_report_rebuilds_it(winnow, tmp_path):
    done = winnow.run(tmp_path / "root", "--until", "stages")
    path = pathlib.Path(re.search(r"What is in the pool\? (/.*pool\.html)", done.stdout).group(1))
    before = path.read_bytes()
    assert b"clip_score" in before and b"data:image/jpeg" in before
    path.unlink()
    again = winnow.run(tmp_path / "root", "--report")
    assert path.read_bytes() == before and "240 rows" in again.stdout
    assert not list((tmp_path / "root").glob("train_set-*/00001.tar")) and not list(
        (tmp_path / "root").glob("results-*")
    )


def test_the_config_names_stages_as_a_word_of_its_own():
    assert planning.STAGES in config.RESERVED and "profile" in config.RESERVED
