"""The leaderboard as one HTML page: no script, no network, light and dark, for a screen, a phone, and paper.

Everything is built of escaped elements, and a content security policy forbids scripts and requests besides.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from pipeline.report import plots
from pipeline.report.choices import FUNNEL, MIX, funnel_cells, funnel_steps, mix_tables, overlap_about, overlap_cells
from pipeline.report.leaderboard import (
    Cleaned,
    Estimate,
    Leaderboard,
    Row,
    has_published,
    number,
    p_text,
    percent,
    plain,
    points,
    published_text,
)
from pipeline.report.markup import Markup, element, raw
from pipeline.report.records import Strategy
from pipeline.report.samples import gallery
from pipeline.report.tables import (
    CLEANED,
    SCOPE,
    choosing_hours,
    cleaned_tables,
    estimate_text,
    found_text,
    header_lines,
    hours,
    remarks,
    samples_text,
    seeds_text,
)
from pipeline.report.trainings import BUDGETS, DID, budget_cells, did_cells, warning_lines

CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"


def html_page(board: Leaderboard) -> str:
    """The whole page."""
    title = plain(board.run.header["config_name"] or board.run.name)
    style = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=CONTENT_POLICY),
        element("title", f"{title} · winnow"),
        element("style", raw(style)),
    )
    body = element(
        "main",
        _header(board, title),
        element("div", _differences(board), _kept(board), class_="pair"),
        _table(board),
        *_budgets(board),
        element("div", _per_task(board), _curves(board), class_="pair"),
        *_did(board),
        *(_cleaned(board, cleaned) for cleaned in board.cleaned),
        _funnels(board),
        element("div", _overlap(board), _tasks(board), class_="pair"),
        *_mixes(board),
        *_gallery(board),
        _cost(board),
        _provenance(board),
        element("footer", "Made by winnow from the records of this run; the same records give the same page."),
    )
    return "<!doctype html>\n" + element("html", head, element("body", body), lang="en") + "\n"


def _section(title: str, about: str, *content) -> Markup:
    return element("section", element("h2", title), element("p", about, class_="about"), *content)


def _nothing(reason: str) -> Markup:
    return element("p", reason, class_="about")


def _header(board: Leaderboard, title: str) -> Markup:
    header = board.run.header
    pool = header["pool"]
    trained = sum(len(row.checkpoints) for part in board.by_budget for row in part.rows)
    planned = sum(row.seeds_planned for part in board.by_budget for row in part.rows)
    budgets = [part.samples_seen for part in board.by_budget[::-1]]
    # numbers stay on the line of their units
    headline = re.sub(r" (?=%|±)|(?<=±) |(?<=\bp) | (?=0\.\d)", "\N{NO-BREAK SPACE}", plain(board.headline))
    facts = [
        ("pool", f"{number(pool['rows'])} pairs"),
        ("usable", f"{number(pool['ok'])} pairs"),
        ("samples seen", ", ".join(map(number, budgets))),
        ("strategies", str(len(board.rows))),
        ("trainings", f"{trained}" if trained == planned else f"{trained} of {planned}"),
        ("tasks", str(len(board.run.tasks))),
        ("date", str(header["date"] or "-")),
    ]
    return element(
        "header",
        element("h1", element("b", "winnow"), f" · {title}"),
        element("p", headline, class_="headline"),
        element("p", SCOPE, class_="scope"),
        element("dl", *(element("div", element("dt", k), element("dd", plain(v))) for k, v in facts), class_="facts"),
    )


def _differences(board: Leaderboard) -> Markup:
    about = (
        f"Average over all tasks, each strategy minus {plain(board.run.baseline)}, with 95 % intervals "
        + ("from item noise only: with one seed, how much another seed would move them is unknown."
           if board.one_seed
           else "from seeds and items. Better and worse are significant after Holm's correction; a tie is not.")
    )  # fmt: skip
    plot = plots.forest_plot(board) or _nothing(f"{plain(board.run.baseline)} or all others have no average yet.")
    return _section(f"Difference to {plain(board.run.baseline)}", about, plot)


def _table(board: Leaderboard) -> Markup:
    """The main table; what matters most comes first, for screens that can't show all of it."""
    tasks = {task.name: task for task in board.run.tasks}
    columns = []
    for column in board.columns:
        mark = "*" if any(tasks[name].in_domain for name in column.tasks) else ""
        if column.is_group:
            small = [f"mean of {len(column.tasks)}"]
        else:
            task = tasks[column.name]
            small = [plain(task.metric), *([] if task.chance is None else [f"chance {percent(task.chance)}"])]
        columns.append(element("th", _name(column.name), mark, *(element("small", line) for line in small)))
    heads = [
        element("th", "#"),
        element("th", "strategy", class_="text"),
        element("th", "average", element("small", f"of {len(tasks)}")),
        element("th", "published") if has_published(board) else None,
        element("th", f"vs {plain(board.run.baseline)}"),
        element("th", "standing", class_="text"),
        *columns,
        element("th", "kept", element("small", "of pool")),
        element("th", "seeds"),
        element("th", "samples seen", element("small", "repeats")),
        element("th", "cost", element("small", "per training")),
        element("th", "checkpoint", class_="text"),
    ]
    rows = [_table_row(board, row) for row in board.rows]
    table = element("table", element("thead", element("tr", *heads)), element("tbody", *rows))
    reasons = [
        element("li", element("b", plain(row.strategy.name)), ": ", plain(reason))
        for row in board.rows
        for reason in row.reasons
    ]
    return _section(
        "Leaderboard",
        f"{plain(board.run.baseline)} first, then by average. Percent; ± is half of the 95 % interval.",
        element("div", table, class_="scroll"),
        element("ul", *reasons, class_="reasons") if reasons else None,
        element("ul", *(element("li", plain(line)) for line in _table_notes(board)), class_="notes"),
    )


def _name(name: str, num_chars: int = 28) -> Markup:
    """The name, cut where it is long, whole in its tooltip."""
    text = plain(name)
    if len(text) <= num_chars:
        return element("span", text)
    return element("span", text[: num_chars - 1] + "…", title=text)


def _table_notes(board: Leaderboard) -> list[str]:
    shown_elsewhere = {f"{row.strategy.name}: {reason}" for row in board.rows for reason in row.reasons} | {SCOPE}
    return [line for line in remarks(board) if line not in shown_elsewhere]


def _table_row(board: Leaderboard, row: Row) -> Markup:
    strategy = row.strategy
    kept = strategy.kept_rows
    fraction = strategy.kept_fraction
    of_pool = element("small", f"{percent(fraction)} %") if fraction is not None else None
    label = element("small", plain(strategy.label)) if strategy.label and strategy.label != row.standing else None
    more = element("small", f"and {len(row.checkpoints) - 1} more") if len(row.checkpoints) > 1 else None
    repeats = "-" if row.repeats is None else f"{row.repeats:.3g} times"
    is_baseline = strategy.name == board.run.baseline
    cells = [
        element("td", "-" if row.rank is None else str(row.rank)),
        element("td", _name(strategy.name), label, class_="strategy"),
        _score(row.average, "average"),
        element("td", published_text(row)) if has_published(board) else None,
        element("td", "baseline" if is_baseline else _difference(row)),
        element("td", _standing(row.standing), class_="text"),
        *(_score(row.scores[column.name]) for column in board.columns),
        element("td", number(kept), of_pool),
        element("td", seeds_text(row)),
        element("td", samples_text(row), element("small", repeats)),
        element("td", hours(row)),
        element("td", element("code", plain(row.checkpoints[0])) if row.checkpoints else "-", more, class_="text"),
    ]
    return element("tr", *cells, class_="baseline" if is_baseline else None)


def _score(estimate: Estimate, class_: str | None = None) -> Markup:
    if estimate.value is None:
        return element("td", plain(estimate_text(estimate)) if class_ else "N/A", class_="missing")
    return element("td", percent(estimate.value), element("small", f"± {percent(estimate.half_width)}"), class_=class_)


def _difference(row: Row):
    found = row.difference
    if found is None:
        return "-"
    text = f"{points(found.value)} ± {percent(found.half_width)}"
    class_ = {"better": "good-text", "worse": "bad-text"}.get(found.verdict)
    detail = ", ".join(part for part in (found.verdict, p_text(found.p_holm)) if part)
    return [element("span", text, class_=class_), element("small", detail)]


def _standing(standing: str):
    if not standing:
        return "-"
    class_ = {"best": "good", "could be best": "good", "worse": "neutral", "oracle": "oracle", "reference": "oracle"}[
        standing
    ]
    return element("span", standing, class_=f"tag {class_}")


def _kept(board: Leaderboard) -> Markup:
    plot = plots.score_against_kept(board) or _nothing("No strategy has an average yet.")
    return _section("Score against kept fraction", "Average over all tasks, with 95 % intervals.", plot)


def _budgets(board: Leaderboard) -> list[Markup]:
    """The section on what more samples bring; none with one budget."""
    if not board.smaller:
        return []
    plot = plots.score_against_samples(board) or _nothing("No strategy has averages at two budgets yet.")
    table = _text_table(*budget_cells(board))
    content = element("div", element("div", plots.legend(board, board.rows), plot), table, class_="columns")
    return [_section("Score against samples seen", f"{BUDGETS} With 95 % intervals.", content)]


def _curves(board: Leaderboard) -> Markup:
    plot = plots.loss_curves(board)
    about = "Thick: mean over seeds. A lower loss on easier data says nothing about the tasks."
    if board.smaller:
        about = f"Trainings of {number(board.samples_seen)} samples. {about}"
    if plot is None:
        return _section("Training curves", about, _nothing("No metrics yet."))
    rows = [row for row in board.rows if row.checkpoints]
    more = [part for name, curve in plots.recall_curves(board) for part in (element("h3", name), curve)]
    return _section("Training curves", about, plots.legend(board, rows), plot, *more)


def _did(board: Leaderboard) -> list[Markup]:
    """The section on what the trainings did; none before one is finished."""
    names, body = did_cells(board)
    if not body:
        return []
    lines = [element("li", plain(line)) for line in warning_lines(board)]
    table = _text_table(names, body)
    return [_section("What the trainings did", DID, table, element("ul", *lines, class_="reasons") if lines else None)]


def _per_task(board: Leaderboard) -> Markup:
    plot = plots.task_differences(board)
    rows = [row for row in board.rows if row.task_differences]
    return _section(
        f"Per task, difference to {plain(board.run.baseline)}",
        "95 % intervals, not corrected for their number. Hover for values; leaderboard.json holds them all.",
        *(
            [plots.legend(board, rows), element("div", plot, class_="tall")]
            if plot
            else [_nothing("No task has results to compare yet.")]
        ),
    )


def _cleaned(board: Leaderboard, cleaned: Cleaned) -> Markup:
    """Images of tasks that are in the pool, and the scores without them."""
    found = plain(found_text(cleaned))
    if cleaned.found.error is not None:
        return _section("Contamination", CLEANED, _nothing(found))
    tables = [_text_table(names, body) for names, body in cleaned_tables(board, cleaned)]
    reasons = [element("li", plain(reason)) for reason in cleaned.reasons]
    return _section(
        "Contamination",
        CLEANED,
        element("p", found),
        *tables,
        element("ul", *reasons, class_="reasons") if reasons else None,
    )


def _text_table(names: list[str], body: list[list[str]]) -> Markup:
    """A table of texts whose first column names the lines."""
    head = element("tr", *(element("th", _name(name), class_=None if at else "text") for at, name in enumerate(names)))
    rows = [
        element(
            "tr",
            *(
                element("td", plain(text) if at else _name(text), class_=None if at else "strategy")
                for at, text in enumerate(line)
            ),
        )
        for line in body
    ]
    table = element("table", element("thead", head), element("tbody", *rows))
    return element("div", table, class_="scroll")


def _funnels(board: Leaderboard) -> Markup:
    classes = plots.colour_classes(board)
    pool = board.run.header["pool"]
    parts = [_funnel(strategy, pool, classes[strategy.name]) for strategy in board.run.compared]
    return _section("Funnel", f"{FUNNEL} Bars: of all rows of the pool.", element("div", *parts, class_="funnels"))


def _funnel(strategy: Strategy, pool: dict, class_: str) -> Markup:
    name = element("h3", plain(strategy.name))
    if strategy.kept_rows is None:
        return element("div", name, _nothing(plain(strategy.error or "no selection yet")))
    steps = funnel_steps(strategy, pool)
    names, body = funnel_cells(strategy, pool)
    head = element("tr", *(element("th", text, class_=None if at else "text") for at, text in enumerate(names)))
    rows = []
    for step, (rule, *texts) in zip(steps, body, strict=True):
        share = step.rows_kept / steps[0].rows_in if steps[0].rows_in else 0.0
        bar = element("div", element("i", "", style=f"width:{100 * share:.2f}%"), class_=f"track {class_}")
        cell = element("td", element("code", plain(rule)), bar, class_="text wrap")
        rows.append(element("tr", cell, *(element("td", text) for text in texts)))
    table = element("table", element("thead", head), element("tbody", *rows))
    return element("div", name, element("div", table, class_="scroll"))


def _overlap(board: Leaderboard) -> Markup:
    about = overlap_about(board.run)
    if board.run.overlap is None:
        return _section("Overlap", about, _nothing("One strategy only."))
    names, body = overlap_cells(board.run)
    head = element("tr", *(element("th", name if at else "") for at, name in enumerate(names)))
    rows = []
    for (name, *texts), values in zip(body, board.run.overlap.jaccard.tolist(), strict=True):
        line = [element("td", _name(name), class_="text")]
        for text, value in zip(texts, values, strict=True):
            jaccard, _, shared = text.partition(" ")
            # the tint stays pale enough for the text's colour in light and dark
            mix = (
                f"background:color-mix(in srgb, var(--accent) {round(8 + 42 * value)}%, var(--card))"
                if shared
                else None
            )
            line.append(element("td", jaccard, element("small", shared.strip("()")) if shared else None, style=mix))
        rows.append(element("tr", *line))
    table = element("table", element("thead", head), element("tbody", *rows), class_="overlap")
    return _section("Overlap", about, element("div", table, class_="scroll"))


def _mixes(board: Leaderboard) -> list[Markup]:
    """The section on `shares`; none without."""
    tables = mix_tables(board.run)
    return [_section("Mix", MIX, *(_text_table(names, body) for names, body in tables))] if tables else []


def _gallery(board: Leaderboard) -> list[Markup]:
    """The section with samples; none where no strategy has a gallery."""
    about, content = gallery(board)
    return [_section("Gallery", about, content)] if content is not None else []


def _cost(board: Leaderboard) -> Markup:
    heads = ["strategy", "uses beyond the pool", "cost of choosing", "cost per training", "trainings"]
    rows = []
    for row in board.rows:
        cells = [
            element("td", _name(row.strategy.name), class_="strategy"),
            element("td", plain("; ".join(row.strategy.uses)) or "nothing", class_="text wrap"),
            element("td", choosing_hours(row)),
            element("td", hours(row)),
            element("td", str(len(row.checkpoints))),
        ]
        rows.append(element("tr", *cells))
    head = element("tr", *(element("th", name, class_="text" if i < 2 else None) for i, name in enumerate(heads)))
    table = element("table", element("thead", head), element("tbody", *rows))
    about = "What a strategy needs beyond the pool's own pairs, and what it cost."
    return _section("Used and spent", about, element("div", table, class_="scroll"))


def _tasks(board: Leaderboard) -> Markup:
    has_groups = any(task.group for task in board.run.tasks)
    heads = ["task", "metric", "chance", "in-domain", *(["group"] if has_groups else [])]
    rows = [
        element(
            "tr",
            element("td", _name(task.title), class_="strategy"),
            element("td", plain(task.metric), class_="text"),
            element("td", "unknown" if task.chance is None else f"{percent(task.chance)} %"),
            element("td", "yes *" if task.in_domain else "no"),
            element("td", plain(task.group) or "-", class_="text") if has_groups else None,
        )
        for task in board.run.tasks
    ]
    left = ("task", "metric", "group")
    head = element("tr", *(element("th", name, class_="text" if name in left else None) for name in heads))
    table = element("table", element("thead", head), element("tbody", *rows))
    return _section("Tasks", "What the average is over.", element("div", table, class_="scroll"))


def _provenance(board: Leaderboard) -> Markup:
    run = board.run
    lines = [f"run            {run.name}", *(f"{label:<14} {text}" for label, text in header_lines(board))]
    for strategy in run.compared:
        lines += ["", f"{strategy.name}", f"  selection    {strategy.selection or 'the whole pool'}"]
        lines.append(f"  train set    {strategy.train_set or '-'}")
        lines += [
            f"  seed {t.seed:<7} {t.checkpoint or '-'}"
            + (f"  {number(t.samples_seen)} samples" if board.smaller else "")
            for part in board.by_budget
            for t in part.run.trainings
            if t.strategy == strategy.name
        ]
    recipe = json.dumps(run.header["recipe"], indent=1, sort_keys=True, ensure_ascii=False)
    parts = [("Fingerprints", lines), ("Recipe", recipe.splitlines())]
    if run.config_text:
        parts.append(("Config", run.config_text.splitlines()))
    results = [
        f"{r.strategy}  seed {r.seed}  {r.task}  {r.path or '-'}"
        + (f"  {number(r.samples_seen)} samples" if board.smaller else "")
        for part in board.by_budget
        for r in part.run.results
    ]
    parts.append(("Results", results))
    blocks = [
        element("details", element("summary", name), element("pre", "\n".join(plain(line) for line in block)))
        for name, block in parts
    ]
    return _section("Where it comes from", "Every artifact behind this page, by fingerprint.", *blocks)
