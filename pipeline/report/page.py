"""The leaderboard as one HTML page: no network, light and dark, for a screen, a phone, and paper.

Everything is built of escaped elements. The page says all that it has to say without its script.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.report import plots
from pipeline.report.aggregates import CHANCE_ADJUSTED, Aggregate
from pipeline.report.choices import FUNNEL, MIX, funnel_cells, funnel_steps, mix_tables, overlap_about, overlap_cells
from pipeline.report.deciles import decile_sections
from pipeline.report.elsewhere_page import beside_sections
from pipeline.report.leaderboard import (
    MANY_TASKS,
    Cleaned,
    Difference,
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
from pipeline.report.markup import Markup, document, element, nothing, section, short_name, table, text_table
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
    places_text,
    reasons_of,
    remarks,
    samples_text,
    seeds_text,
)
from pipeline.report.trainings import BUDGETS, DID, budget_cells, did_cells, version_lines, warning_lines

TABLE = "leaderboard"  # the id of the main table, for its controls


def html_page(board: Leaderboard) -> str:
    """The whole page."""
    title = plain(board.run.header["config_name"] or board.run.name)
    first, *more = [*_differences(board), *_against(board)]
    return document(
        title,
        _header(board, title),
        *_pairs([first, *more[:1]]),
        _table(board),
        *beside_sections(board),
        *_pairs(more[1:]),
        *_budgets(board),
        _heat_map(board),
        *_pairs([*_per_task(board), _tasks(board)]),
        _curves(board),
        *_did(board),
        *(_cleaned(board, cleaned) for cleaned in board.cleaned),
        _funnels(board),
        _overlap(board),
        *_mixes(board),
        *_gallery(board),
        *decile_sections(board),
        _cost(board),
        _provenance(board),
        element("footer", "Made by winnow from the records of this run; the same records give the same page."),
    )


def _pairs(sections: list[Markup]) -> list[Markup]:
    """The sections two by two, beside each other where there is room."""
    pairs = [sections[i : i + 2] for i in range(0, len(sections), 2)]
    return [element("div", *pair, class_="pair") if len(pair) == 2 else pair[0] for pair in pairs]


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


def _differences(board: Leaderboard) -> list[Markup]:
    """The sections on the differences to the baseline, and to random choices of the same size where there are any."""
    baseline = plain(board.run.baseline)
    over_baseline, over_control = plots.difference_plots(board)
    interval = (
        "95 % intervals are from item noise only: with one seed, how much another seed would move them is unknown."
        if board.one_seed
        else "95 % intervals are from seeds and items. Better and worse are significant after Holm's correction; a "
        "tie is not."
    )
    found = [
        section(
            f"Better than {baseline}?",
            f"Average over all tasks, each strategy minus {baseline}, in points. {interval}",
            over_baseline or nothing(f"{baseline} or all others have no average yet."),
        )
    ]
    if over_control is not None:
        about = (
            "The same for each strategy minus a random choice of as many rows: both see each sample as often, so what "
            "is left is the choice. Same lines, same scale."
        )
        found.append(section("Better than random rows, as many?", about, over_control))
    return found


def _against(board: Leaderboard) -> list[Markup]:
    """The sections of the score against what may explain it: the kept fraction, and repeats."""
    kept, repeats = plots.score_against_kept(board), plots.score_against_repeats(board)
    about = "Average over all tasks, with 95 % intervals."
    found = [section("Score against kept fraction", about, kept or nothing("No strategy has an average yet."))]
    if repeats is not None:
        about = f"{about} Few rows are seen often in a training of a given length, which has a cost of its own."
        found.append(section("Score against repeats", about, repeats))
    return found


@dataclass(frozen=True)
class _TableColumn:
    """A column of the main table: its head, how it sorts (number, rank or text), and the cell of a row.

    `fold` is the number of the button that shows it; None: it is always there.
    """

    head: tuple
    sort: str
    cell: Callable[[Row], Markup]
    fold: int | None = None

    def head_cell(self) -> Markup:
        return element(
            "th",
            *self.head,
            class_="text" if self.sort == "text" else None,
            scope="col",
            data_sort=self.sort,
            aria_sort="ascending" if self.head == ("#",) else None,
            **_folded(self.fold),
        )


def _folded(fold: int | None) -> dict[str, str]:
    return {} if fold is None else {"data_fold": str(fold), "hidden": ""}


def _cell(*content, value: float | str | None = None, fold: int | None = None, class_: str | None = None) -> Markup:
    """A cell; `value` is what it sorts by, None where nothing is known."""
    known = None if value is None else f"{value:.8g}" if isinstance(value, float) else str(value)
    return element("td", *content, class_=class_, data_value=known, **_folded(fold))


def _table(board: Leaderboard) -> Markup:
    """The main table; what matters most comes first, for screens that can't show all of it."""
    columns, folds = _table_columns(board)
    rows = [
        element(
            "tr",
            *(column.cell(row) for column in columns),
            class_="baseline" if row.strategy.name == board.run.baseline else None,
            data_text=plain(f"{row.strategy.name} {row.strategy.label} {row.standing}"),
            data_standing=row.standing,
        )
        for row in board.rows
    ]
    reasons = [element("li", element("b", plain(names)), ": ", plain(reason)) for names, reason in reasons_of(board)]
    return section(
        "Leaderboard",
        f"{plain(board.run.baseline)} first, then by average. Percent; ± is half of the 95 % interval.",
        _controls(board, folds),
        table([column.head_cell() for column in columns], rows, id=TABLE, class_="sortable"),
        element("ul", *reasons, class_="reasons") if reasons else None,
        element("ul", *(element("li", plain(line)) for line in _table_notes(board)), class_="notes"),
    )


def _controls(board: Leaderboard, folds: list[str]) -> Markup:
    """Filters and folds of the main table; the script shows them."""
    standings = [standing for standing in plots.STANDING_CLASSES if any(row.standing == standing for row in board.rows)]
    options = [element("option", "all", value=""), *(element("option", one, value=one) for one in standings)]
    buttons = [
        element("button", name, type="button", data_fold=str(i), aria_expanded="false", aria_controls=TABLE)
        for i, name in enumerate(folds)
    ]
    return element(
        "div",
        element("label", "Filter ", element("input", type="search", placeholder="strategy", autocomplete="off")),
        element("label", "Standing ", element("select", *options, autocomplete="off")),
        element("output", "", role="status"),
        element("div", element("span", "Single tasks: "), *buttons, class_="folds") if folds else None,
        class_="controls",
        data_table=TABLE,
        data_script="",
        hidden="",
    )


def _table_columns(board: Leaderboard) -> tuple[list[_TableColumn], list[str]]:
    """The columns, and the names of the groups of tasks that can be unfolded."""
    num_tasks, baseline = len(board.run.averaged), board.run.baseline

    def difference(found: Difference | None, none: str = "-", class_: str | None = None) -> Markup:
        return _cell(none, class_=class_) if found is None else _cell(*_difference(found), value=found.value)

    def over_baseline(row: Row) -> Markup:
        return difference(row.difference, "baseline" if row.strategy.name == baseline else "-")

    controls = {row.control for row in board.rows if row.control_difference}

    def over_control(row: Row) -> Markup:
        if row.control_difference is None:
            return _cell("-")
        of = None if len(controls) == 1 else element("small", "minus ", short_name(row.control))
        return _cell(*_difference(row.control_difference), of, value=row.control_difference.value)

    columns = [
        _TableColumn(("#",), "rank", lambda row: _cell("-" if row.rank is None else str(row.rank), value=row.rank)),
        _TableColumn(("strategy",), "text", _strategy_cell),
        _TableColumn(("average", _small(f"of {num_tasks}")), "number", lambda row: _score(row.average, "average")),
    ]
    if has_published(board):
        columns.append(
            _TableColumn(("published",), "number", lambda row: _cell(published_text(row), value=row.strategy.published))
        )
    columns.append(_TableColumn(("vs ", short_name(baseline)), "number", over_baseline))
    if controls:
        which = short_name(*controls) if len(controls) == 1 else "random"
        columns.append(_TableColumn(("vs ", which, _small("of its size")), "number", over_control))
    columns.append(_TableColumn(("standing",), "text", _standing_cell))
    if any(row.rank_interval for row in board.rows):
        columns.append(_TableColumn(("place", _small("95 %")), "rank", _place_cell))
    for aggregate in _aggregates(board)[0]:
        # by default: the loop's variable changes before the cells are made
        def cell(row: Row, name: str = aggregate.name) -> Markup:
            return _score(row.aggregates[name])

        columns.append(_TableColumn((aggregate.title,), "number", cell))
    scores, folds = _score_columns(board)
    columns += [
        *scores,
        _TableColumn(("kept", _small("of pool")), "number", _kept_cell),
        _TableColumn(("seeds",), "number", lambda row: _cell(seeds_text(row), value=len(row.seeds))),
        _TableColumn(("samples seen", _small("repeats")), "number", _seen_cell),
        _TableColumn(("cost", _small("per training")), "number", _cost_cell),
        _TableColumn(("checkpoint",), "text", _checkpoint_cell),
    ]
    return columns, folds


def _score_columns(board: Leaderboard) -> tuple[list[_TableColumn], list[str]]:
    """The columns of groups and tasks, and what can be unfolded: groups, or all tasks where they are many."""
    tasks = {task.name: task for task in board.run.tasks}

    def task_column(name: str, fold: int | None) -> _TableColumn:
        task = tasks[name]
        head = [short_name(task.name), "*" * task.in_domain, _small(plain(task.metric))]
        head += [] if task.chance is None else [_small(f"chance {percent(task.chance)}")]
        return _TableColumn(tuple(head), "number", lambda row: _score(row.task_scores[name], fold=fold), fold)

    if not any(column.is_group for column in board.columns):
        fold = 0 if len(board.columns) > MANY_TASKS else None
        return [task_column(column.name, fold) for column in board.columns], [f"all {len(tasks)}"] * (fold is not None)
    columns, folds = [], []
    others = [column.name for column in board.columns if not column.is_group]
    for group in board.columns:
        if not group.is_group:
            continue

        def cell(row: Row, name: str = group.name) -> Markup:
            return _score(row.scores[name])

        mark = "*" * any(tasks[name].in_domain for name in group.tasks)
        columns.append(
            _TableColumn((short_name(group.name), mark, _small(f"mean of {len(group.tasks)}")), "number", cell)
        )
        columns += [task_column(name, len(folds)) for name in group.tasks]
        folds.append(f"{plain(group.name)} ({len(group.tasks)})")
    many = len(board.columns) > MANY_TASKS
    columns += [task_column(name, len(folds) if many else None) for name in others]
    return columns, [*folds, *([f"others ({len(others)})"] if many and others else [])]


def _small(text: str) -> Markup:
    return element("small", text)


def _aggregates(board: Leaderboard) -> tuple[list[Aggregate], list[Aggregate]]:
    """The averages that get a column, as it says something that no other does; and those that no row has."""
    others = {frozenset(column.tasks) for column in board.columns} | {
        frozenset(task.name for task in board.run.averaged)
    }
    own = [one for one in board.aggregates if one.name == CHANCE_ADJUSTED or frozenset(one.tasks) not in others]
    known = {name for row in board.rows for name, estimate in row.aggregates.items() if estimate.value is not None}
    return [one for one in own if one.name in known], [one for one in own if one.name not in known]


def _table_notes(board: Leaderboard) -> list[str]:
    shown_elsewhere = {f"{names}: {reason}" for names, reason in reasons_of(board)} | {SCOPE}
    lines = [line for line in remarks(board) if line not in shown_elsewhere]
    if without := _aggregates(board)[1]:
        names = ", ".join(aggregate.title for aggregate in without)
        lines.append(f"No strategy has what these averages need, leaderboard.json names what is missing: {names}.")
    return lines


def _strategy_cell(row: Row) -> Markup:
    strategy = row.strategy
    label = _small(plain(strategy.label)) if strategy.label and strategy.label != row.standing else None
    return _cell(short_name(strategy.name), label, value=plain(strategy.name), class_="strategy")


def _standing_cell(row: Row) -> Markup:
    if not row.standing:
        return _cell("-", class_="text")
    tag = element("span", row.standing, class_=f"tag {plots.STANDING_CLASSES[row.standing]}")
    return _cell(tag, value=row.standing, class_="text")


def _place_cell(row: Row) -> Markup:
    if row.rank_interval is None:
        return _cell("-")
    best, worst = row.rank_interval
    return _cell(places_text(row), value=best + worst / 1000)


def _kept_cell(row: Row) -> Markup:
    fraction, kept = row.strategy.kept_fraction, row.strategy.kept_rows
    return _cell(number(kept), None if fraction is None else _small(f"{percent(fraction)} %"), value=kept)


def _seen_cell(row: Row) -> Markup:
    repeats = "-" if row.repeats is None else f"{row.repeats:.3g} times"
    return _cell(samples_text(row), _small(repeats), value=row.samples_seen)


def _cost_cell(row: Row) -> Markup:
    return _cell(hours(row), value=row.gpu_hours or row.cpu_hours)


def _checkpoint_cell(row: Row) -> Markup:
    if not row.checkpoints:
        return _cell("-", class_="text")
    more = _small(f"and {len(row.checkpoints) - 1} more") if len(row.checkpoints) > 1 else None
    first = plain(row.checkpoints[0])
    return _cell(element("code", first), more, value=first, class_="text")


def _score(estimate: Estimate, class_: str | None = None, fold: int | None = None) -> Markup:
    if estimate.value is not None:
        width = _small(f"± {percent(estimate.half_width)}")
        return _cell(percent(estimate.value), width, value=estimate.value, fold=fold, class_=class_)
    if len(estimate.missing) > MANY_TASKS:
        text = element("span", f"N/A ({len(estimate.missing)} missing)", title=plain(", ".join(estimate.missing)))
    else:
        text = (
            plain(estimate_text(estimate)) if class_ else element("span", "N/A", title=plain(estimate_text(estimate)))
        )
    return _cell(text, fold=fold, class_="missing")


def _difference(found: Difference) -> list[Markup]:
    text = f"{points(found.value)} ± {percent(found.half_width)}"
    class_ = {"better": "good-text", "worse": "bad-text"}.get(found.verdict)
    detail = ", ".join(part for part in (found.verdict, p_text(found.p_holm)) if part)
    return [element("span", text, class_=class_), _small(detail)]


def _budgets(board: Leaderboard) -> list[Markup]:
    """The section on what more samples bring; none with one budget."""
    if not board.smaller:
        return []
    plot = plots.score_against_samples(board) or nothing("No strategy has averages at two budgets yet.")
    scores = text_table(*budget_cells(board))
    content = element("div", element("div", plots.legend(board, board.rows), plot), scores, class_="plots")
    return [section("Score against samples seen", f"{BUDGETS} With 95 % intervals.", content)]


def _curves(board: Leaderboard) -> Markup:
    plot = plots.loss_curves(board)
    about = "Thick: mean over seeds. A lower loss on easier data says nothing about the tasks."
    if board.smaller:
        about = f"Trainings of {number(board.samples_seen)} samples. {about}"
    if plot is None:
        return section("Training curves", about, nothing("No metrics yet."))
    rows = [row for row in board.rows if row.checkpoints]
    named = [("Loss", plot), *plots.recall_curves(board)]
    parts = [element("div", element("h3", name), curve) for name, curve in named]
    return section("Training curves", about, plots.legend(board, rows), element("div", *parts, class_="plots"))


def _did(board: Leaderboard) -> list[Markup]:
    """The section on what the trainings did; none before one is finished."""
    names, body = did_cells(board)
    if not body:
        return []
    lines = [element("li", plain(line)) for line in warning_lines(board)]
    table = text_table(names, body)
    return [section("What the trainings did", DID, table, element("ul", *lines, class_="reasons") if lines else None)]


def _heat_map(board: Leaderboard) -> Markup:
    baseline = plain(board.run.baseline)
    tested = any(found.p is not None for row in board.rows for found in row.task_differences.values())
    sure = (
        "With one seed none can be called significant."
        if not tested
        else "Bold with a dot: significant after Holm's correction over the strategies of the task. Of many tasks some "
        "are so by luck."
    )
    return section(
        "Task by task",
        f"Points over {baseline}, whose score in percent comes first. {sure} Hover for intervals; leaderboard.json "
        "has them all.",
        plots.heat_map(board) or nothing("No task has results to compare yet."),
    )


def _per_task(board: Leaderboard) -> list[Markup]:
    """The section of the intervals of each task; none where tasks are many."""
    rows = [row for row in board.rows if row.task_differences]
    plot = plots.task_differences(board) if len(board.run.tasks) <= MANY_TASKS else None
    if plot is None:
        return []
    about = "95 % intervals, not corrected for their number."
    return [section(f"Per task, difference to {plain(board.run.baseline)}", about, plots.legend(board, rows), plot)]


def _cleaned(board: Leaderboard, cleaned: Cleaned) -> Markup:
    """Images of tasks that are in the pool, and the scores without them."""
    found = plain(found_text(cleaned))
    if cleaned.found.error is not None:
        return section("Contamination", CLEANED, nothing(found))
    tables = [text_table(names, body) for names, body in cleaned_tables(board, cleaned)]
    reasons = [element("li", plain(reason)) for reason in cleaned.reasons]
    return section(
        "Contamination",
        CLEANED,
        element("p", found),
        *tables,
        element("ul", *reasons, class_="reasons") if reasons else None,
    )


def _funnels(board: Leaderboard) -> Markup:
    classes = plots.colour_classes(board)
    pool = board.run.header["pool"]
    parts = [_funnel(strategy, pool, classes[strategy.name]) for strategy in board.run.compared]
    return section("Funnel", f"{FUNNEL} Bars: of all rows of the pool.", element("div", *parts, class_="funnels"))


def _funnel(strategy: Strategy, pool: dict, class_: str) -> Markup:
    name = element("h3", plain(strategy.name))
    if strategy.kept_rows is None:
        return element("div", name, nothing(plain(strategy.error or "no selection yet")))
    steps = funnel_steps(strategy, pool)
    names, body = funnel_cells(strategy, pool)
    heads = [element("th", text, class_=None if at else "text") for at, text in enumerate(names)]
    rows = []
    for step, (rule, *texts) in zip(steps, body, strict=True):
        share = step.rows_kept / steps[0].rows_in if steps[0].rows_in else 0.0
        bar = element("div", element("i", "", style=f"width:{100 * share:.2f}%"), class_=f"track {class_}")
        cell = element("td", element("code", plain(rule)), bar, class_="text wrap")
        rows.append(element("tr", cell, *(element("td", text) for text in texts)))
    return element("div", name, table(heads, rows))


def _overlap(board: Leaderboard) -> Markup:
    about = overlap_about(board.run)
    if board.run.overlap is None:
        return section("Overlap", about, nothing("One strategy only."))
    names, body = overlap_cells(board.run)
    heads = [element("th", name if at else "") for at, name in enumerate(names)]
    rows = []
    for (name, *texts), values in zip(body, board.run.overlap.jaccard.tolist(), strict=True):
        line = [element("td", short_name(name), class_="text")]
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
    return section("Overlap", about, table(heads, rows, class_="overlap"))


def _mixes(board: Leaderboard) -> list[Markup]:
    """The section on `shares`; none without."""
    tables = mix_tables(board.run)
    return [section("Mix", MIX, *(text_table(names, body) for names, body in tables))] if tables else []


def _gallery(board: Leaderboard) -> list[Markup]:
    """The section with samples; none where no strategy has a gallery."""
    about, content = gallery(board)
    return [section("Gallery", about, content)] if content is not None else []


def _cost(board: Leaderboard) -> Markup:
    names = ["strategy", "uses beyond the pool", "cost of choosing", "cost per training", "trainings"]
    rows = []
    for row in board.rows:
        cells = [
            element("td", short_name(row.strategy.name), class_="strategy"),
            element("td", plain("; ".join(row.strategy.uses)) or "nothing", class_="text wrap"),
            element("td", choosing_hours(row)),
            element("td", hours(row)),
            element("td", str(len(row.checkpoints))),
        ]
        rows.append(element("tr", *cells))
    heads = [element("th", name, class_="text" if i < 2 else None) for i, name in enumerate(names)]
    about = "What a strategy needs beyond the pool's own pairs, and what it cost."
    return section("Used and spent", about, table(heads, rows))


def _tasks(board: Leaderboard) -> Markup:
    has_groups = any(task.group for task in board.run.tasks)
    names = ["task", "metric", "chance", "in-domain", *(["group"] if has_groups else [])]
    rows = [
        element(
            "tr",
            element("td", short_name(task.title), class_="strategy"),
            element("td", plain(task.metric), class_="text"),
            element("td", "unknown" if task.chance is None else f"{percent(task.chance)} %"),
            element("td", "yes *" if task.in_domain else "no"),
            element("td", plain(task.group) or "-", class_="text") if has_groups else None,
        )
        for task in board.run.tasks
    ]
    left = ("task", "metric", "group")
    heads = [element("th", name, class_="text" if name in left else None) for name in names]
    return section("Tasks", "What the average is over.", table(heads, rows))


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
    parts = [("Fingerprints", lines), ("Recipe", recipe.splitlines()), ("Versions", version_lines(board))]
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
    return section("Where it comes from", "Every artifact behind this page, by fingerprint.", *blocks)
