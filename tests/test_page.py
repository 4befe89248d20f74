"""The leaderboard's page in a real browser: what a reader can do with it, that nothing else can run, how it is drawn."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.report import build_report
from pipeline.report.markup import document, element
from stages.selection import gallery
from tests.browser_fixture import opened
from tests.report_fixture import edit_run, write_artifact, write_run

pytestmark = pytest.mark.browser
HOSTILE = "</title></style><script>hacked('script')</script><img src=x onerror=hacked(1)>\"'><svg onload=hacked(2)>"
HOSTILE_SHORT = '"><script>hacked(3)</script>\u202egnp'
PHONE = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2, "is_mobile": True, "has_touch": True}
LETTER_PX = {"width": 966, "height": 726}  # what a landscape letter leaves between margins of 12 mm


def jpeg(number: int) -> bytes:
    data = io.BytesIO()
    noise = np.random.default_rng(number).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(data, "JPEG")
    return data.getvalue()


def add_gallery(run: Path, strategy: str, rows: list[dict]) -> None:
    """None; the strategy gets a gallery of these rows, each with a picture."""
    common = {"group": "cut", "rule": 0, "value": "0.281", "removed_by": None, "flagged": False}
    rows = [
        common | {"uid": f"{i:032x}", "thumbnail": jpeg(i), "caption": f"caption {i}"} | row
        for i, row in enumerate(rows)
    ]
    facts = {"samples": len(rows), "pictures": len(rows), "rules": ["top 0.3 of clip_score"]}
    files = {gallery.FILE: pa.Table.from_pylist(rows, schema=gallery.SCHEMA)}
    path = write_artifact(run.parents[1], "gallery", {"strategy": strategy}, facts, files)
    edit_run(run, lambda data: next(s for s in data["strategies"] if s["name"] == strategy).update(gallery=path))


def demo_run(root: Path) -> Path:
    """Six strategies, two of them with a control, one without an average, one with a gallery; four tasks."""
    run = write_run(root)

    def change(data):
        for strategy in data["strategies"]:
            if strategy["name"] in ("clip_top30", "basic_and_clip"):
                strategy["control"] = "random30"
        data["results"] = [r for r in data["results"] if (r["strategy"], r["task"]) != ("trusted_only", "colours")]

    edit_run(run, change)
    add_gallery(run, "clip_top30", [
        {"side": "kept"}, {"side": "kept", "flagged": True}, {"side": "kept", "caption": "y" * 200},
        {"side": "removed", "removed_by": 0},
    ])  # fmt: skip
    return run


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    run = demo_run(tmp_path_factory.mktemp("demo"))
    build_report(str(run))
    return run / "leaderboard.html"


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """40 tasks, 20 strategies with long names."""
    rng = np.random.default_rng(0)
    fractions, abilities = rng.uniform(0.03, 0.6, 20).round(2), rng.normal(-0.5, 0.25, 20)
    names = ["no_filter", "random30", *(f"strategy_{i}_with_a_long_name_top{i}" for i in range(2, 20))]
    strategies = {
        name: (None if name == "no_filter" else float(fraction), float(ability), "", ())
        for name, fraction, ability in zip(names, fractions, abilities, strict=True)
    }
    tasks = {f"Task number {i}": ("zeroshot_classification", "acc1", 0.1) for i in range(40)}
    run = write_run(tmp_path_factory.mktemp("large"), (0, 1), strategies, tasks, num_items=60)

    def change(data):
        for i, task in enumerate(data["tasks"]):
            task["group"] = ("ImageNet", "shifts", "VTAB", "")[min(i // 8, 3)]
        for strategy in data["strategies"][2:]:
            strategy["control"] = "random30"

    edit_run(run, change)
    build_report(str(run))
    return run / "leaderboard.html"


def shown_rows(page, table: str = "#leaderboard") -> list[str]:
    """The names of the strategies in the table, as they are now."""
    return page.eval_on_selector_all(
        f"{table} tbody tr", "rows => rows.filter(r => !r.hidden).map(r => r.cells[1].dataset.value)"
    )


def head(page, name: str):
    """The button that sorts by this column."""
    return page.locator("#leaderboard th").filter(has_text=re.compile(f"^{re.escape(name)}")).locator("button")


def column(page, name: str) -> list[float | None]:
    """What the column's cells sort by, from top to bottom."""
    script = """(heads, name) => {
      const at = heads.findIndex(h => h.textContent.startsWith(name));
      return [...document.querySelectorAll('#leaderboard tbody tr')].map(r => r.cells[at].dataset.value ?? null);
    }"""
    found = page.eval_on_selector_all("#leaderboard th", script, name)
    return [None if value is None else float(value) for value in found]


def test_a_click_sorts_by_any_column_and_what_is_missing_is_last(demo, browser):
    with opened(browser, demo) as found:
        page = found.page
        start = shown_rows(page)
        assert start[0] == "no_filter"
        for name, ascending in (("average", False), ("kept", False), ("vs no_filter", False), ("seeds", False)):
            for expected in (ascending, not ascending):
                head(page, name).click()
                values = column(page, name)
                known = [value for value in values if value is not None]
                assert known == sorted(known, reverse=not expected), name
                assert values == known + [None] * (len(values) - len(known))
                state = page.locator("#leaderboard th[aria-sort]")
                assert state.count() == 1
                assert state.get_attribute("aria-sort") == ("ascending" if expected else "descending")
        head(page, "average").click()
        assert shown_rows(page)[-1] == "trusted_only"  # it has no average
        head(page, "#").click()
        assert shown_rows(page) == start
        head(page, "strategy").click()
        assert shown_rows(page) == sorted(start)


def test_equal_values_keep_their_order(demo, browser):
    with opened(browser, demo) as found:
        head(found.page, "strategy").click()
        before = shown_rows(found.page)
        values = column(found.page, "samples seen")
        assert len(set(values)) == 1
        for _ in range(2):  # neither way
            head(found.page, "samples seen").click()
            assert shown_rows(found.page) == before


def test_the_keyboard_sorts_filters_and_unfolds(large, browser):
    with opened(browser, large) as found:
        page = found.page
        page.locator(".controls input").focus()
        page.keyboard.type("top7")
        assert shown_rows(page) == ["strategy_7_with_a_long_name_top7"]
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "SELECT"
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.textContent") == "ImageNet (8)"
        page.keyboard.press("Enter")
        assert head(page, "Task number 7").is_visible()
        head(page, "average").focus()
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        page.keyboard.press("Space")
        assert page.locator("th[aria-sort=descending]").inner_text().startswith("average")


def test_rows_are_filtered_by_text_and_standing(demo, browser):
    with opened(browser, demo) as found:
        page = found.page
        everything = shown_rows(page)
        text, standing, said = (page.locator(f".controls {tag}") for tag in ("input", "select", "output"))
        text.fill("CLIP")
        assert set(shown_rows(page)) == {"clip_top30", "basic_and_clip"}
        assert said.inner_text() == "2 of 6 strategies"
        text.fill("and clip")  # every word
        assert shown_rows(page) == ["basic_and_clip"]
        text.fill("")
        options = page.eval_on_selector_all(".controls option", "all => all.map(o => o.value)")
        assert options == ["", "could be best", "not best", "oracle"]
        standing.select_option("could be best")
        assert set(shown_rows(page)) == {"clip_top30", "basic_and_clip"}
        head(page, "average").click()  # a filter stays where rows move
        assert set(shown_rows(page)) == {"clip_top30", "basic_and_clip"}
        standing.select_option("oracle")
        text.fill("clip")
        assert shown_rows(page) == []
        assert said.inner_text() == "0 of 6 strategies"
        text.fill("")
        standing.select_option("")
        assert set(shown_rows(page)) == set(everything)
        assert said.inner_text() == ""


def test_groups_of_tasks_unfold_into_columns(large, browser):
    with opened(browser, large) as found:
        page = found.page
        buttons = page.locator(".folds button")
        assert buttons.all_inner_texts() == ["ImageNet (8)", "shifts (8)", "VTAB (8)", "others (16)"]

        def visible() -> int:
            return page.locator("#leaderboard thead th:visible").count()

        folded = visible()
        buttons.nth(1).click()
        assert buttons.nth(1).get_attribute("aria-expanded") == "true"
        assert visible() == folded + 8
        assert page.locator("#leaderboard tbody tr:first-child td:visible").count() == folded + 8
        head(page, "Task number 9").click()
        values = column(page, "Task number 9")
        assert values == sorted(values, reverse=True)
        buttons.nth(3).click()
        assert visible() == folded + 24
        buttons.nth(1).click()
        assert visible() == folded + 16
        assert not head(page, "Task number 9").is_visible()


def test_pictures_enlarge_and_blurred_ones_show_first(demo, browser):
    with opened(browser, demo) as found:
        page = found.page
        page.locator("summary", has_text="clip_top30").click()
        pictures = page.locator("button.picture")
        assert pictures.count() == 4
        first, flagged = pictures.nth(0), pictures.nth(1)
        dialog = page.locator("dialog.enlarged")
        first.click()
        assert dialog.is_visible()
        large = dialog.locator("img")
        assert large.get_attribute("src") == first.locator("img").get_attribute("src")
        assert large.bounding_box()["width"] > 3 * first.locator("img").bounding_box()["width"]
        assert "caption 0" in dialog.inner_text()
        page.keyboard.press("ArrowRight")
        assert "blur" in large.evaluate("image => getComputedStyle(image).filter")  # not by way of its neighbour either
        page.keyboard.press("ArrowRight")
        assert "y" * 200 in dialog.inner_text()  # whole where the page cuts it
        page.keyboard.press("Escape")
        assert not dialog.is_visible()
        assert page.evaluate("document.activeElement.className") == "picture"

        def blur() -> str:
            return flagged.locator("img").evaluate("image => getComputedStyle(image).filter")

        assert "blur" in blur()
        assert flagged.get_attribute("aria-label") == "Show this blurred picture"
        flagged.focus()
        page.keyboard.press("Enter")
        assert blur() == "none"
        assert not dialog.is_visible()
        assert flagged.get_attribute("aria-label") == "Enlarge this picture"
        page.keyboard.press("Enter")
        assert dialog.is_visible()
        dialog.locator("button.close").click()
        assert not dialog.is_visible()


def test_a_blurred_picture_shows_in_the_dialog(demo, browser):
    with opened(browser, demo) as found:
        page = found.page
        page.locator("summary", has_text="clip_top30").click()
        page.locator("button.picture").first.click()
        page.keyboard.press("ArrowRight")
        frame = page.locator("dialog .frame")
        frame.click()
        assert frame.locator("img").evaluate("image => getComputedStyle(image).filter") == "none"
        frame.click()
        assert not page.locator("dialog").is_visible()
        assert page.locator("img.blurred").count() == 0  # shown in the page, too


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """Every text that others wrote is an attack."""
    rename = {"clip_top30": HOSTILE, "random30": HOSTILE_SHORT, "objects": HOSTILE, "colours": HOSTILE_SHORT}
    rename |= {"trusted reference: 3000 pairs": HOSTILE}
    run = write_run(tmp_path_factory.mktemp("hostile"), (0, 1), rename=rename)

    def change(data):
        data["config_name"] = HOSTILE
        data["trainings"][-1]["error"] = HOSTILE
        data["strategies"][1]["label"] = HOSTILE_SHORT
        data["strategies"][3]["control"] = HOSTILE
        data["tasks"][1] |= {"group": HOSTILE, "metric": "mean_per_class_recall"}
        data["published"], data["published_note"] = {"no_filter": 13.2}, HOSTILE
        data["pool"]["failed"] = {HOSTILE: 100}

    edit_run(run, change)
    (run / "config.yaml").write_text(f"a: {HOSTILE}\n</pre></script>\n")
    add_gallery(run, HOSTILE, [{"side": "kept", "caption": HOSTILE}, {"side": "kept", "caption": HOSTILE_SHORT}])
    build_report(str(run))
    return run / "leaderboard.html"


def test_nothing_of_what_others_wrote_runs(hostile, browser):
    with opened(browser, hostile) as found:
        page = found.page
        page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        head(page, "strategy").click()
        page.locator(".controls input").fill("<script>")
        assert len(shown_rows(page)) == 2
        page.locator("button.picture").first.click()
        assert "<img src=x onerror=hacked(1)>" in page.locator("dialog").inner_text()
        page.keyboard.press("Escape")
        assert page.title() == f"{HOSTILE} · winnow"
        assert page.locator("script").count() == 1
        assert page.locator("[onerror], [onload]").count() == 0
        assert page.evaluate("typeof hacked") == "undefined"
        assert "\u202e" not in page.content()
        page.wait_for_timeout(200)


@pytest.mark.parametrize(
    ("attack", "complaint"),
    [
        ("const s = document.createElement('script'); s.text = 'window.hacked = 1'; document.body.append(s)", "TrustedScript"),
        ("document.body.innerHTML = '<img src=x onerror=\"window.hacked = 1\">'", "TrustedHTML"),
        ("document.body.setAttribute('onclick', 'window.hacked = 1'); document.body.click()", "TrustedScript"),
        ("setTimeout('window.hacked = 1')", "unsafe-eval|TrustedScript"),
        ("new Image().src = 'https://example.com/x.png'", "img-src"),
        ("fetch('https://example.com/x')", "connect-src"),
        ("const f = document.createElement('iframe'); f.src = 'https://example.com'; document.body.append(f)", "default-src"),
        ("const l = document.createElement('link'); l.rel = 'stylesheet'; l.href = 'https://example.com/x'; document.head.append(l)", "style-src"),
    ],
)  # fmt: skip
def test_the_policy_blocks_what_is_put_into_the_page(demo, browser, attack, complaint):
    with opened(browser, demo, quiet=False) as found:
        found.page.evaluate(f"() => {{ try {{ {attack} }} catch (error) {{ console.error(String(error)); }} }}")
        found.page.wait_for_timeout(150)
        assert found.page.evaluate("window.hacked") is None
        assert found.requests == []
        assert re.search(complaint, " ".join(found.printed)), found.printed


def test_a_script_in_the_file_does_not_run_but_the_pages_own_does(browser, tmp_path):
    """The policy itself: the same document with a second script and a handler, as a forgotten escape would leave them."""
    path = tmp_path / "page.html"
    html = document("title", element("p", "text", id="here"), element("p", "", data_script="", hidden="", id="control"))
    attack = (
        "<script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'><a href='javascript:hacked=3'>a</a>"
    )
    assert html.count('<p id="here">') == 1
    path.write_text(html.replace('<p id="here">', f'{attack}<p id="here">'))
    with opened(browser, path, quiet=False) as found:
        found.page.locator("a").click()
        assert found.page.evaluate("window.hacked") is None
        assert found.page.locator("#control").is_visible() or not found.page.evaluate(
            "document.getElementById('control').hidden"
        )
        assert sum("script-src" in line for line in found.printed) >= 2


def test_without_its_script_the_page_is_complete(demo, browser):
    with opened(browser, demo, java_script_enabled=False) as found:
        page = found.page
        assert not page.locator(".controls").is_visible()
        assert page.locator("#leaderboard tbody tr:visible").count() == 6
        assert page.locator("th button").count() == 0
        page.locator("summary", has_text="clip_top30").click()
        assert page.locator("figure img:visible").count() == 4
        assert page.locator("figure img.blurred").count() == 1


@pytest.mark.parametrize("which", ["demo", "large", "hostile"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("medium", ["screen", "print"])
def test_all_text_stands_out(which, scheme, medium, browser, request):
    """WCAG 2.1, 1.4.3: a contrast of at least 4.5."""
    with opened(browser, request.getfixturevalue(which), color_scheme=scheme) as found:
        found.page.emulate_media(media=medium, color_scheme=scheme)
        found.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        for button in found.page.locator(".folds button:visible").all():
            button.click()
        page_is_dark = scheme == "dark" and medium == "screen"
        paper = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (int(re.search(r"\d+", paper)[0]) < 64) == page_is_dark
        contrasts = found.contrasts()
        assert len(contrasts) > 200
        assert contrasts[0][0] >= 4.5, contrasts[:5]


@pytest.mark.parametrize("which", ["demo", "large", "hostile"])
def test_a_phone_scrolls_tables_and_not_the_page(which, browser, request):
    with opened(browser, request.getfixturevalue(which), **PHONE) as found:
        found.page.evaluate("document.querySelectorAll('details').forEach(one => { one.open = true; })")
        for button in found.page.locator(".folds button").all():
            button.click()
        assert found.overflow_px() == 0
        wide = found.page.eval_on_selector_all(
            "main *",
            "all => all.filter(e => !e.closest('.scroll, svg, pre') && e.scrollWidth > innerWidth).map(e => e.outerHTML.slice(0, 90))",
        )
        assert wide == []
        table = found.page.locator(".scroll", has=found.page.locator("#leaderboard"))
        assert table.evaluate("e => e.scrollWidth > e.clientWidth && getComputedStyle(e).overflowX") == "auto"
        table.evaluate("e => { e.scrollLeft = 300; }")
        name = found.page.locator("#leaderboard td.strategy").first.bounding_box()
        assert 0 <= name["x"] < 60  # names stay in sight
        small = found.page.eval_on_selector_all(
            "svg text", "all => Math.min(...all.map(e => e.getBoundingClientRect().height).filter(Boolean))"
        )
        assert small >= 9


@pytest.mark.parametrize("which", ["demo", "large"])
def test_paper_shows_everything(which, browser, request):
    with opened(browser, request.getfixturevalue(which), viewport=LETTER_PX, color_scheme="dark") as found:
        page = found.page
        page.emulate_media(media="print")
        assert not page.locator(".controls").is_visible()
        assert page.locator("details:not([open])").count() > 0
        closed = page.eval_on_selector_all(
            "details:not([open]) > :not(summary)", "all => all.map(e => e.checkVisibility())"
        )
        assert closed and all(closed)
        assert found.overflow_px() == 0
        cut = page.eval_on_selector_all(
            ".scroll",
            "all => all.filter(e => e.scrollWidth > e.clientWidth + 1).map(e => [e.scrollWidth, e.clientWidth, e.textContent.slice(0, 60)])",
        )
        assert cut == []
        pdf = page.pdf(prefer_css_page_size=True)
        assert pdf.startswith(b"%PDF")


def text_of(page, selector: str) -> list[str]:
    return [text.replace("\xa0", " ") for text in page.locator(selector).all_inner_texts()]


def test_the_first_picture_says_better_and_tie_in_words_beside_both_comparisons(demo, browser):
    with opened(browser, demo, viewport={"width": 1280, "height": 900}) as found:
        page = found.page
        titles = text_of(page, ".pair:first-of-type h2")
        assert titles == ["Better than no_filter?", "Better than random rows, as many?"]
        first, second = page.locator(".pair:first-of-type svg").all()
        assert first.bounding_box()["y"] == second.bounding_box()["y"]  # read across
        assert first.bounding_box()["y"] + 200 < 900  # without scrolling
        verdicts = [plot.locator(".verdict").all_text_contents() for plot in (first, second)]
        assert verdicts == [["better", "better", "better", "tie"], ["better", "better"]]
        names = [plot.locator("tspan.name").all_text_contents() for plot in (first, second)]
        assert names[0] == names[1]
        assert second.locator("text", has_text="random itself").count() == 1
        # the same scale: one point is as long in both, and zero is at the same place
        zeros = [plot.locator("line.zero").get_attribute("x1") for plot in (first, second)]
        assert zeros[0] == zeros[1]


def test_the_heat_map_has_each_difference_and_marks_the_significant_ones(large, browser):
    board = json.loads((large.parent / "leaderboard.json").read_text())
    rows = [row for row in board["rows"] if row["task_differences"]]
    with opened(browser, large) as found:
        page = found.page
        lines = page.eval_on_selector_all(
            ".scroll .heat tbody tr:not(.group)", "all => all.map(r => [...r.cells].map(c => c.textContent))"
        )
        assert len(lines) == 41  # and the average
        by_task = {line[0]: line[2:] for line in lines}
        tints = page.eval_on_selector_all(
            ".scroll .heat td[title]", "all => [...new Set(all.map(c => getComputedStyle(c).backgroundColor))]"
        )
        assert len(tints) > 8
        assert page.evaluate(
            "document.querySelector('.scroll:has(.heat)').scrollWidth <= document.querySelector('.scroll:has(.heat)').clientWidth"
        )
    for task in board["tasks"]:
        for row, text in zip(rows, by_task[task["title"]], strict=True):
            difference = row["task_differences"][task["name"]]
            assert float(text.rstrip("•").replace("−", "-")) == pytest.approx(100 * difference["value"], abs=0.0501)
            assert text.endswith("•") == (difference["verdict"] in ("better", "worse"))
    assert sum(text.endswith("•") for texts in by_task.values() for text in texts) > 10


def test_a_page_of_20_strategies_and_40_tasks_is_small(large):
    assert large.stat().st_size < 1_000_000
