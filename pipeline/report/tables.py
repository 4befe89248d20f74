"""The leaderboard as text: terminal, Markdown, CSV, JSON.

Names, reasons and captions are hostile: control characters never reach a terminal, Markdown and CSV are escaped.
Percent in tables for people; fractions 0..1 in CSV and JSON.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.report.choices import (
    FUNNEL,
    MIX,
    choices_record,
    funnel_cells,
    mix_tables,
    overlap_about,
    overlap_cells,
    samples_line,
)
from pipeline.report.elsewhere import Beside, ImportedRow, apart_about, imported_about, imported_cells
from pipeline.report.leaderboard import (
    MANY_TASKS,
    Cleaned,
    Column,
    Leaderboard,
    Row,
    control_remark,
    has_published,
    number,
    percent,
    plain,
    points,
    published_text,
)
from pipeline.report.records import Result, Task
from pipeline.report.scores import Difference, Estimate, item_interval
from pipeline.report.trainings import (
    BUDGETS,
    DID,
    budget_cells,
    did_cells,
    did_record,
    warning_lines,
    what_they_did,
)

# the first to go where a terminal is too narrow
EXPENDABLE = ("checkpoint", "samples seen", "cost", "of pool", "repeats", "seeds", "choosing", "place", "kept")
AVERAGES = (
    "Chance-adjusted is the mean of (score - chance) / (1 - chance) over the tasks of this run. The others are over "
    "DataComp's lists of tasks; clean are the 33 that its paper finds not near chance. None is over some of its tasks."
)
TASK_BY_TASK = "Percent; ± is half of the 95 % interval of that score. leaderboard.json has the differences, too."
SCOPE = "Claims are about this pool, recipe and task list only: the best filter changes with scale."


def hours(row: Row) -> str:
    """The mean cost of a training: GPU-hours where GPUs were used, else CPU-hours."""
    return _hours(row.cpu_hours, row.gpu_hours)


def choosing_hours(row: Row) -> str:
    """What it cost to choose: the stages that judge, and the training of the scorers that they use."""
    return _hours(row.strategy.choosing.get("cpu_hours") or None, row.strategy.choosing.get("gpu_hours"))


def _hours(cpu_hours: float | None, gpu_hours: float | None) -> str:
    if gpu_hours:
        return f"{gpu_hours:.3g} GPU-h"
    return "-" if cpu_hours is None else f"{cpu_hours:.3g} CPU-h"


def samples_text(row: Row) -> str:
    """Samples seen in a training, and those that the scorers of its choice saw before: `14,400 + 6,400`."""
    scorers = row.strategy.choosing.get("samples_seen")
    return number(row.samples_seen) + (f" + {number(int(scorers))}" if scorers else "")


def seeds_text(row: Row) -> str:
    """How many seeds count, of how many when some are missing."""
    num = len(row.seeds)
    return str(num) if num == row.seeds_planned else f"{num} of {row.seeds_planned}"


def strategy_text(row: Row) -> str:
    """The strategy's name, with its label where that adds something."""
    strategy = row.strategy
    return strategy.name + (f" ({strategy.label})" if strategy.label not in ("", strategy.name) else "")


def estimate_text(estimate: Estimate) -> str:
    """The value in percent, or what is missing."""
    if estimate.value is None:
        return f"N/A (missing: {', '.join(estimate.missing)})" if estimate.missing else "N/A"
    return percent(estimate.value)


def difference_text(difference: Difference | None) -> str:
    """The difference in points with its interval and what it means, or a dash."""
    if difference is None:
        return "-"
    return f"{points(difference.value)} ± {percent(difference.half_width)}, {difference.verdict}"


def places_text(row: Row) -> str:
    """The places that it can have among those that compete: `1 to 3`, or a dash."""
    if row.rank_interval is None:
        return "-"
    best, worst = row.rank_interval
    return str(best) if best == worst else f"{best} to {worst}"


def aggregate_cells(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts a row: averages over fixed lists of tasks, those that some row has."""
    shown = [a for a in board.aggregates if any(row.aggregates[a.name].value is not None for row in board.rows)]
    body = [
        [strategy_text(row), *(_aggregate_text(row.aggregates[a.name], len(a.tasks)) for a in shown)]
        for row in board.rows
    ]
    return ["strategy", *(aggregate.title for aggregate in shown)], body if shown else []


def _aggregate_text(estimate: Estimate, num_tasks: int) -> str:
    if estimate.value is None:
        return f"N/A ({len(estimate.missing)} of {num_tasks} missing)"
    return f"{percent(estimate.value)} ± {percent(estimate.half_width)}"


def _shown_columns(board: Leaderboard) -> list[Column]:
    """The groups, and the single tasks beside them unless that makes too many columns."""
    return [column for column in board.columns if column.is_group or len(board.columns) <= MANY_TASKS]


def task_cells(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts a task, of a run whose main table has not every task; else no texts."""
    if [column.name for column in _shown_columns(board)] == [task.name for task in board.run.tasks]:
        return [], []
    names = ["task", "metric", "chance", *(row.strategy.name for row in board.rows)]
    body = []
    for task in board.run.tasks:
        texts = [_score_text(row.task_scores[task.name]) for row in board.rows]
        chance = "-" if task.chance is None else percent(task.chance)
        body.append([f"{task.name}{'*' if task.in_domain else ''}", task.metric, chance, *texts])
    return names, body


def _score_text(estimate: Estimate) -> str:
    if estimate.value is None or estimate.half_width is None:
        return "N/A" if estimate.value is None else percent(estimate.value)
    return f"{percent(estimate.value)} ± {percent(estimate.half_width)}"


def cells(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts per row: the leaderboard's main table."""
    tasks = {task.name: task for task in board.run.tasks}
    columns = _shown_columns(board)
    names = ["#", "strategy", "kept", "of pool"]
    names += [c.name + ("" if not c.is_group else f" ({len(c.tasks)})") + _mark(c.tasks, tasks) for c in columns]
    has_column = has_published(board)
    has_control = any(row.control_difference is not None for row in board.rows)
    has_places = any(row.rank_interval is not None for row in board.rows)
    names += [
        f"average ({len(board.run.averaged)})",
        "±",
        *(["published"] if has_column else []),
        f"vs {board.run.baseline}",
        *(["vs random"] if has_control else []),
        "standing",
        *(["place"] if has_places else []),
        "seeds",
        "samples seen",
    ]
    names += ["repeats", "cost", "choosing", "checkpoint"]
    body = []
    for row in board.rows:
        fraction = row.strategy.kept_fraction
        scores = [row.scores[column.name].value for column in columns]
        more = f" +{len(row.checkpoints) - 1}" if len(row.checkpoints) > 1 else ""
        body.append(
            [
                "-" if row.rank is None else str(row.rank),
                strategy_text(row),
                number(row.strategy.kept_rows),
                "-" if fraction is None else f"{percent(fraction)} %",
                *("N/A" if score is None else percent(score) for score in scores),
                estimate_text(row.average),
                "-" if row.average.half_width is None else percent(row.average.half_width),
                *([published_text(row)] if has_column else []),
                "baseline" if row.strategy.name == board.run.baseline else difference_text(row.difference),
                *([difference_text(row.control_difference)] if has_control else []),
                row.standing or "-",
                *([places_text(row)] if has_places else []),
                seeds_text(row),
                samples_text(row),
                "-" if row.repeats is None else f"{row.repeats:.3g}",
                hours(row),
                choosing_hours(row),
                row.checkpoints[0] + more if row.checkpoints else "-",
            ]
        )
    return names, body


def _mark(names: Sequence[str], tasks: dict[str, Task]) -> str:
    return "*" if any(tasks[name].in_domain for name in names) else ""


def header_lines(board: Leaderboard) -> list[tuple[str, str]]:
    """What was compared: (label, text) for pool, recipe, tasks, metric version, date."""
    header = board.run.header
    pool, recipe = header["pool"], header["recipe"]
    failed = ", ".join(f"{reason} {number(count)}" for reason, count in sorted((pool.get("failed") or {}).items()))
    counts = f"{number(pool['rows'])} rows, {number(pool['ok'])} ok" + (f"; {failed}" if failed else "")
    if len(board.run.tasks) <= MANY_TASKS:
        tasks = "; ".join(task_text(task) for task in board.run.tasks)
    else:  # metrics and chance levels are in the table of single tasks
        names = ", ".join(f"{task.name}{'*' if task.in_domain else ''}" for task in board.run.tasks)
        tasks = f"{len(board.run.tasks)}: {names}"
    settings = ", ".join(f"{key} {value}" for key, value in recipe.items() if _is_setting(key, value))
    return [
        ("pool", f"{pool['path']}: {counts}"),
        ("recipe", f"{recipe.get('name', 'unnamed')}: {settings}" if settings else str(recipe.get("name", "unnamed"))),
        ("tasks", tasks or "none"),
        ("metric version", str(header["metric_version"])),
        ("date", f"{header['date']}, winnow {header['winnow_version']}"),
    ]


def _is_setting(key: str, value: Any) -> bool:
    return key != "name" and type(value) in (int, float, str) and value != ""


def task_text(task: Task) -> str:
    """`objects: acc1, chance 10.0 %, in-domain`."""
    chance = "chance unknown" if task.chance is None else f"chance {percent(task.chance)} %"
    return f"{task.name}{'*' if task.in_domain else ''}: {task.metric}, {chance}" + (
        ", in-domain" if task.in_domain else ""
    )


def remarks(board: Leaderboard) -> list[str]:
    """What a reader must know beside the numbers, one sentence each."""
    lines = []
    if any(row.average.half_width is not None for row in board.rows):
        lines.append(
            "± is half of the 95 % interval, from item noise only (one seed)."
            if board.one_seed
            else "± is half of the 95 % interval, from seeds (variance pooled over strategies) and items. A verdict on "
            "a difference is a t-test with Holm's correction; the standing is by multiple comparisons with the best; "
            "the place is among those that compete, 95 % for all together."
        )
    if any(row.control_difference is not None for row in board.rows):
        lines.append("vs random: against as many rows at random, which are repeated as often in a training.")
    lines += [remark for row in board.rows if (remark := control_remark(row)) and remark not in board.headline]
    if any(task.in_domain for task in board.run.tasks):
        lines.append("* in-domain: training images of the task are in the pool.")
    if len(board.run.averaged) < len(board.run.tasks):
        counted = len(board.run.averaged)
        over = "1 zero-shot task" if counted == 1 else f"{counted} zero-shot tasks"
        lines.append(f"Averages are over the {over}; linear probes and few shots stand beside them.")
    for found in board.run.contamination:
        if found.path is not None and found.path == board.run.items_left_out:
            lines.append(f"Images of tasks that {found.stage} found in the pool count in no score (eval.leave_out).")
    if has_published(board):
        note = f": {board.run.published_note}" if board.run.published_note else ""
        lines.append(f"Published averages are as the config gives them, not measured here{note}.")
    labels = {row.strategy.label for row in board.rows}
    if any(row.strategy.choosing.get("samples_seen") for row in board.rows):
        lines.append("Samples seen + those that the scorers of a strategy's choice were trained on, in this run.")
    if "oracle" in labels:
        lines.append("An oracle reads the truth that no filter has: it shows what is possible, it does not compete.")
    if "reference" in labels:
        lines.append("A reference is no choice from the pool but trusted pairs beside it: it does not compete either.")
    users: dict[tuple[str, ...], list[str]] = {}
    for row in board.rows:
        if row.strategy.uses:
            users.setdefault(row.strategy.uses, []).append(row.strategy.name)
    lines += [f"Used beyond the pool by {', '.join(names)}: {'; '.join(uses)}." for uses, names in users.items()]
    lines += [f"{names}: {reason}" for names, reason in reasons_of(board)]
    lines += warning_lines(board)
    for cleaned in board.cleaned:
        more = "; leaderboard.md has the scores without them" if cleaned.tasks else ""
        lines.append(f"{found_text(cleaned)}{more}.")
    lines += board.beside.remarks if board.beside else []
    return [*lines, *board.notes, SCOPE]


def reasons_of(board: Leaderboard) -> list[tuple[str, str]]:
    """(strategies, why something of theirs is missing): a broken task says so once, not once for each strategy."""
    names: dict[str, list[str]] = {}
    for row in board.rows:
        for reason in row.reasons:
            names.setdefault(reason, []).append(row.strategy.name)
    everyone = len(board.rows) if len(board.rows) > 1 else 0
    return [("all strategies" if len(one) == everyone else ", ".join(one), reason) for reason, one in names.items()]


CLEANED = (
    "Images of tasks that are also in the pool, and the scores without them: the questions about these images are left "
    "out, the images stay among the candidates of a retrieval. Such images may be easier or harder than others, so "
    "compare the differences of strategies that chose these rows with those of strategies that did not."
)


def found_text(cleaned: Cleaned) -> str:
    """How many rows of the pool are like an image of a task, or why that is not known."""
    found = cleaned.found
    if found.error is not None:
        return f"{found.stage}: {found.error}"
    methods = ", ".join(f"{method} {number(count)}" for method, count in found.rows_by_method.items())
    return f"{found.stage}: {number(found.rows)} rows of the pool have an image of a task ({methods})"


def cleaned_tables(board: Leaderboard, cleaned: Cleaned) -> list[tuple[list[str], list[list[str]]]]:
    """Column names and texts of the tables about one stage: its images, and the scores without them if any."""
    return [_image_cells(cleaned), *([_score_cells(board, cleaned)] if cleaned.tasks else [])]


def _image_cells(cleaned: Cleaned) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts a task: how many of its images are in the pool."""
    methods = list(cleaned.found.rows_by_method)
    body = []
    for name, task in cleaned.found.tasks.items():
        share = f"{percent(len(task.matched) / task.images)} %" if task.images else "-"
        counts = [number(task.matched_by_method.get(method, 0)) for method in methods]
        head = [name, number(task.images), number(task.not_compared), number(len(task.matched)), share]
        body.append([*head, *counts, number(task.rows)])
    return ["task", "images", "not compared", "in the pool", "share", *methods, "rows of the pool"], body


def _score_cells(board: Leaderboard, cleaned: Cleaned) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts a strategy: scores with -> without the images in the pool."""
    tasks = cleaned.tasks if len(cleaned.tasks) <= MANY_TASKS else ()  # JSON has them all
    names = ["strategy", *tasks, f"average ({len(board.run.averaged)})"]
    body = []
    for row in board.rows:
        name = row.strategy.name
        pairs = [cleaned.scores[name][task] for task in tasks] + [cleaned.averages[name]]
        body.append([strategy_text(row), *(_pair_text(*pair) for pair in pairs)])
    return names, body


def _pair_text(all_items: Estimate, left: Estimate) -> str:
    if all_items.value is None or left.value is None:
        return estimate_text(left)
    scores = " \N{RIGHTWARDS ARROW} ".join(f"{percent(e.value)} ± {percent(e.half_width)}" for e in (all_items, left))
    return f"{scores} ({points(left.value - all_items.value)})"


def terminal_table(board: Leaderboard, width: int | None = None) -> str:
    """The leaderboard for a terminal. Columns that a given width can't hold are left out, the least important first."""
    names, body = cells(board)
    rows = [[plain(text) for text in line] for line in [names, *body]]
    dropped = []
    for name in EXPENDABLE:
        if width is None or sum(_widths(rows)) + 2 * len(rows[0]) - 2 <= width:
            break
        if name not in rows[0]:
            continue
        index = rows[0].index(name)
        rows = [line[:index] + line[index + 1 :] for line in rows]
        dropped.append(name)
    widths = _widths(rows)
    lines = ["  ".join(_pad(text, widths[i], left=i == 1) for i, text in enumerate(line)).rstrip() for line in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    head = [f"{label}: {plain(text)}" for label, text in header_lines(board)]
    tail = [plain(line) for line in remarks(board)]
    if task_cells(board)[1]:
        tail.append("leaderboard.md has the scores of the single tasks.")
    if dropped:
        tail.append(f"Left out here for want of width: {', '.join(dropped)}; leaderboard.md has them.")
    return "\n".join([*head, "", *lines, "", plain(board.headline), *tail]) + "\n"


def _widths(rows: list[list[str]]) -> list[int]:
    return [max(len(line[i]) for line in rows) for i in range(len(rows[0]))]


def _pad(text: str, width: int, left: bool) -> str:
    return text.ljust(width) if left else text.rjust(width)


def markdown_text(board: Leaderboard) -> str:
    """The leaderboard as GitHub-flavoured Markdown."""
    names, body = cells(board)
    pool = board.run.header["pool"]
    title = board.run.header["config_name"] or board.run.name
    lines = [f"# {_markdown(title)}", "", f"**{_markdown(board.headline)}**", ""]
    lines += [_markdown_row(names), "|" + "|".join("---" if i == 1 else "---:" for i in range(len(names))) + "|"]
    lines += [_markdown_row(line) for line in body]
    lines += ["", *(f"- {label}: {_markdown(text)}" for label, text in header_lines(board))]
    lines += ["", *(f"- {_markdown(line)}" for line in remarks(board))]
    if line := samples_line(board):
        lines.append(f"- {line}")
    names, body = aggregate_cells(board)
    if body:
        lines += ["", "## Averages", "", AVERAGES, "", *_markdown_table(names, body)]
    if board.smaller:
        lines += ["", "## Score against samples seen", "", BUDGETS, "", *_markdown_table(*budget_cells(board))]
    names, body = task_cells(board)
    if body:
        lines += ["", "## Task by task", "", TASK_BY_TASK, "", *_markdown_table(names, body)]
    names, body = did_cells(board)
    if body:
        lines += ["", "## What the trainings did", "", DID, "", *_markdown_table(names, body)]
    lines += ["", "## Funnel", "", FUNNEL]
    for strategy in board.run.compared:
        if strategy.kept_rows is not None:
            lines += ["", f"### {_markdown(strategy.name)}", "", *_markdown_table(*funnel_cells(strategy, pool))]
    if board.run.overlap is not None:
        lines += ["", "## Overlap", "", overlap_about(board.run), "", *_markdown_table(*overlap_cells(board.run))]
    mixes = mix_tables(board.run)
    lines += ["", "## Mix", "", MIX] if mixes else []
    for table in mixes:
        lines += ["", *_markdown_table(*table)]
    for cleaned in board.cleaned:
        lines += ["", "## Contamination", "", _markdown(f"{found_text(cleaned)}. {CLEANED}")]
        if cleaned.found.error is None:
            for names, body in cleaned_tables(board, cleaned):
                lines += ["", *_markdown_table(names, body)]
            lines += ["", *(f"- {_markdown(reason)}" for reason in cleaned.reasons)]
    return "\n".join([*lines, *_markdown_beside(board.beside or Beside())]) + "\n"


def _markdown_beside(beside: Beside) -> list[str]:
    """The sections on runs that stand apart, and on imported rows."""
    lines = []
    for part in beside.apart:
        lines += ["", f"## Beside: {_markdown(part.label)}", "", _markdown(apart_about(part)), ""]
        lines += [*_markdown_table(*cells(part.board)), ""]
        lines += [f"- {label}: {_markdown(text)}" for label, text in header_lines(part.board)]
    if beside.rows:
        lines += ["", "## Results from elsewhere", "", _markdown(imported_about(beside)), ""]
        lines += _markdown_table(*imported_cells(beside))
    return lines


def _markdown_table(names: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    return [_markdown_row(names), "|---" + "|---:" * (len(names) - 1) + "|", *map(_markdown_row, body)]


def _markdown_row(texts: Sequence[str]) -> str:
    return "| " + " | ".join(_markdown(text) for text in texts) + " |"


def _markdown(text: object) -> str:
    escaped = plain(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join("\\" + c if c in "\\`*[]|" else c for c in escaped)


def csv_text(board: Leaderboard) -> str:
    """One line per strategy and budget, the largest budget first; fractions 0..1. Empty where there is no value.

    Lines of runs that stand apart and imported ones follow; `source` says whose they are.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    beside = board.beside or Beside()
    boards = [("", board), *((part.label, part.board) for part in beside.apart)]
    lines = [(source, _row_record(one, row)) for source, b in boards for one in b.by_budget for row in one.rows]
    lines += [(row.source, _imported_record(row)) for row in beside.rows]
    tasks = list(dict.fromkeys([*(task.name for _, b in boards for task in b.run.tasks), *beside.tasks]))
    names = ["rank", "strategy", "label", "kept_rows", "kept_fraction", *(_csv_text(task) for task in tasks)]
    names += [
        "average",
        "average_half_width",
        "published",
        "difference",
        "difference_half_width",
        "p",
        "p_holm",
        "verdict",
        "control",
        "control_difference",
        "control_half_width",
        "control_p",
        "control_p_holm",
        "control_verdict",
        "best_place",
        "worst_place",
    ]
    aggregates = list(dict.fromkeys(a.name for owner in (*(b for _, b in boards), beside) for a in owner.aggregates))
    names += aggregates
    names += ["standing", "num_seeds", "samples_seen", "repeats", "cpu_hours", "gpu_hours", "checkpoints", "missing"]
    writer.writerow([*names, "reasons", "source"])
    for source, record in lines:
        difference = record.get("difference") or {}
        values = [record.get(key) for key in ("rank", "strategy", "label", "kept_rows", "kept_fraction")]
        values += [record["tasks"].get(task, {}).get("value") for task in tasks]
        values += [record["average"]["value"], record["average"]["half_width"], record.get("published")]
        values += [difference.get(key) for key in ("value", "half_width", "p", "p_holm", "verdict")]
        against = record.get("control_difference") or {}
        values += [record.get("control")]
        values += [against.get(key) for key in ("value", "half_width", "p", "p_holm", "verdict")]
        values += record.get("rank_interval") or [None, None]
        values += [record["aggregates"].get(name, {}).get("value") for name in aggregates]
        num_seeds = record.get("num_seeds", len(record.get("seeds", ())))
        values += [record.get("standing"), num_seeds, record.get("samples_seen")]
        values += [record.get(key) for key in ("repeats", "cpu_hours", "gpu_hours")]
        values += [" ".join(record.get("checkpoints", ())), " ".join(record["average"]["missing"])]
        values += ["; ".join(record.get("reasons", ())), source]
        writer.writerow([_csv_text(value) if isinstance(value, str) else value for value in values])
    return out.getvalue()


def _csv_text(text: str) -> str:
    """The text such that no spreadsheet takes it for a formula."""
    text = plain(text)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text


def json_text(board: Leaderboard) -> str:
    """Everything in the leaderboard, with the value of every seed; fractions 0..1."""
    run = board.run
    value = {
        "run": run.name,
        **run.header,
        "baseline": run.baseline,
        "headline": board.headline,
        "one_seed": board.one_seed,
        "tasks": [
            {
                "name": task.name,
                "type": task.kind,
                "metric": task.metric,
                "chance": task.chance,
                "group": task.group,
                "in_domain": task.in_domain,
                "counted": task.counted,
                "clean": task.clean,
                "title": task.title,
            }
            for task in run.tasks
        ],
        "aggregates": {a.name: {"title": a.title, "tasks": list(a.tasks)} for a in board.aggregates},
        "rows": [_row_record(board, row) | choices_record(row.strategy) for row in board.rows],
        "smaller_budgets": [_budget_record(part) for part in board.smaller],
        "trainings": {did.strategy: _rounded_all(did_record(did)) for did in what_they_did(board)},
        "results": [_result_record(r) for part in board.by_budget for r in part.run.results],
        "overlap": None if run.overlap is None else _matrix(run.overlap.jaccard),
        "overlap_rows": None if run.overlap is None else _matrix(run.overlap.shared_rows),
        "overlap_one_in": None if run.overlap is None else run.overlap.one_in,
        "overlap_strategies": [strategy.name for strategy in run.compared],
        "published_note": run.published_note,
        "notes": list(board.notes),
        "contamination": [_cleaned_record(cleaned) for cleaned in board.cleaned],
        "beside": None if board.beside is None else _beside_record(board.beside),
    }
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def _row_record(board: Leaderboard, row: Row) -> dict[str, Any]:
    strategy = row.strategy
    return {
        "rank": row.rank,
        "strategy": strategy.name,
        "label": strategy.label,
        "uses": list(strategy.uses),
        "selection": strategy.selection,
        "train_set": strategy.train_set,
        "kept_rows": strategy.kept_rows,
        "kept_samples": strategy.kept_samples,
        "kept_fraction": _rounded(strategy.kept_fraction),
        "tasks": {name: _estimate_record(estimate) for name, estimate in row.task_scores.items()},
        "groups": {c.name: _estimate_record(row.scores[c.name]) for c in board.columns if c.is_group},
        "average": _estimate_record(row.average),
        "published": _rounded(strategy.published),
        "standing": row.standing,
        "difference": _difference_record(row.difference),
        "task_differences": {name: _difference_record(found) for name, found in row.task_differences.items()},
        "control": row.control,
        "control_difference": _difference_record(row.control_difference),
        "rank_interval": None if row.rank_interval is None else list(row.rank_interval),
        "aggregates": {name: _estimate_record(estimate) for name, estimate in row.aggregates.items()},
        "seeds": list(row.seeds),
        "seeds_planned": row.seeds_planned,
        "samples_seen": board.samples_seen,
        "repeats": _rounded(row.repeats),
        "cpu_hours": _rounded(row.cpu_hours),
        "gpu_hours": _rounded(row.gpu_hours),
        "choosing": {key: _rounded(value) for key, value in sorted(strategy.choosing.items())},
        "checkpoints": list(row.checkpoints),
        "reasons": list(row.reasons),
    }


def _budget_record(board: Leaderboard) -> dict[str, Any]:
    return {
        "samples_seen": board.samples_seen,
        "headline": board.headline,
        "one_seed": board.one_seed,
        "rows": [_row_record(board, row) for row in board.rows],
    }


def _beside_record(beside: Beside) -> dict[str, Any]:
    return {
        "joined": [
            {
                "run": joined.label,
                "strategies": list(joined.added),
                "same": joined.same,
                "more_seeds": joined.more_seeds,
                "left_out_samples_seen": list(joined.left_out),
            }
            for joined in beside.joined
        ],
        "apart": [
            {"run": part.label, "unlike": list(part.unlike), **part.board.run.header}
            | {"rows": [_row_record(one, row) for one in part.board.by_budget for row in one.rows]}
            for part in beside.apart
        ],
        "imported": [_imported_record(row) for row in beside.rows],
        "averages": {aggregate.name: list(aggregate.tasks) for aggregate in beside.aggregates},
        "remarks": list(beside.remarks),
    }


def _imported_record(row: ImportedRow) -> dict[str, Any]:
    return {
        "strategy": row.name,
        "source": row.source,
        "tasks": {name: _estimate_record(estimate) for name, estimate in row.scores.items()},
        "average": _estimate_record(row.average),
        "aggregates": {name: _estimate_record(estimate) for name, estimate in row.aggregates.items()},
        "noise_unknown": list(row.unknown_noise),
        "num_seeds": 1,
    }


def _result_record(result: Result) -> dict[str, Any]:
    names = ("strategy", "samples_seen", "seed", "task", "value", "path", "error")
    items = None if result.items is None or result.value is None else item_interval([result.items], result.value)
    return {name: getattr(result, name) for name in names} | {"items": _interval(items)}


def _cleaned_record(cleaned: Cleaned) -> dict[str, Any]:
    found = cleaned.found

    def pair(estimates: tuple[Estimate, Estimate]) -> dict[str, Any]:
        return dict(zip(("with", "without"), map(_estimate_record, estimates), strict=True))

    return {
        "stage": found.stage,
        "path": found.path,
        "error": found.error,
        "rows": found.rows,
        "rows_by_method": found.rows_by_method,
        "tasks": {
            name: {
                "images": task.images,
                "not_compared": task.not_compared,
                "matched": len(task.matched),
                "matched_by_method": task.matched_by_method,
                "rows": task.rows,
            }
            for name, task in found.tasks.items()
        },
        "scores": {
            name: {task: pair(both) for task, both in by_task.items()} for name, by_task in cleaned.scores.items()
        },
        "averages": {name: pair(both) for name, both in cleaned.averages.items()},
        "reasons": list(cleaned.reasons),
    }


def _estimate_record(estimate: Estimate) -> dict[str, Any]:
    return {
        "value": _rounded(estimate.value),
        "half_width": _rounded(estimate.half_width),
        "missing": list(estimate.missing),
        "items": _interval(estimate.items),
    }


def _interval(interval: tuple[float, float] | None) -> list[float | None] | None:
    return None if interval is None else [_rounded(end) for end in interval]


def _difference_record(difference: Difference | None) -> dict[str, Any] | None:
    if difference is None:
        return None
    return {
        "value": _rounded(difference.value),
        "half_width": _rounded(difference.half_width),
        "p": _rounded(difference.p),
        "p_holm": _rounded(difference.p_holm),
        "verdict": difference.verdict,
        "items": _interval(difference.items),
    }


def _matrix(values: np.ndarray) -> list[list[float | None]]:
    return [[_rounded(value) for value in line] for line in values.tolist()]


def _rounded_all(record: dict[str, Any]) -> dict[str, Any]:
    return {key: _rounded(value) if isinstance(value, float) else value for key, value in record.items()}


def _rounded(value: float | None) -> float | None:
    """Eight significant digits: what differs between linear algebra libraries does not change the file."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.8g}")
