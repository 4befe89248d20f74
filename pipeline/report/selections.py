"""What a run says that ends at its selections: how much each strategy keeps, and the path of its list of uids.

Such a run has a pool of rows without images (`pool.download: false`), so nothing is trained and nothing is ranked.
selections.txt holds, beside the table, each strategy's funnel and what the strategies have in common; selections.json
the same numbers. Names are hostile here as in tables.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

from pipeline.core import storage
from pipeline.core.config import BesideConfig
from pipeline.report.leaderboard import build_report, percent
from pipeline.report.pool_page import TITLE, pool_text, write_pool_page
from pipeline.report.records import Run, Strategy, read_run
from pipeline.report.tables import number, plain, terminal_table

UIDS = "uids.npy"  # of a selection: sorted pairs of u8, as DataComp's subset files
NOTHING_TRAINED = "The pool has no images (pool.download: false), so these are selections: nothing was trained."


def write_report(run_path: str, width: int | None = None, beside: Sequence[BesideConfig] | None = None) -> str:
    """What the terminal shows of the run in this folder, whose report is written beside run.json.

    Args:
        width: of the terminal in characters; None: any.
        beside: what a leaderboard shows beside the run; None: what the run recorded.
    """
    run = read_run(run_path)
    folder = storage.absolute(run_path)
    pool_line = f"\n{TITLE} {write_pool_page(run, folder)}" if run.profile is not None else ""
    if run.trainings:
        page = storage.join(folder, "leaderboard.html")
        return f"{terminal_table(build_report(run_path, beside), width)}\nleaderboard: {page}{pool_line}"
    if not run.strategies:  # a run that ends at its stages
        return (pool_text(run) if run.profile is not None else "\n".join(map(plain, run.notes))) + pool_line
    root = folder.rsplit("/", 2)[0]
    storage.write_bytes(storage.join(folder, "selections.json"), json_text(run, root).encode("utf-8", "replace"))
    path = storage.join(folder, "selections.txt")
    storage.write_bytes(path, whole_text(run, root).encode("utf-8", "replace"))
    return f"{selections_table(run, root)}\nfunnels and overlaps: {path}{pool_line}"


def selections_table(run: Run, root: str) -> str:
    """The pool, a line for each strategy, and why some are missing."""
    pool = run.header["pool"]
    failed = "".join(f"; {plain(reason)} {number(count)}" for reason, count in sorted(pool["failed"].items()))
    repeats = any(strategy.kept_samples != strategy.kept_rows for strategy in run.compared)
    rows = [["strategy", "kept", "of pool", *(["samples"] if repeats else []), UIDS]]
    for strategy in run.compared:
        share = "-" if strategy.kept_fraction is None else f"{percent(strategy.kept_fraction)} %"
        samples = [number(strategy.kept_samples)] if repeats else []
        kept = "N/A" if strategy.kept_rows is None else number(strategy.kept_rows)
        rows.append([_name(strategy), kept, share, *samples, uids_path(root, strategy) or "-"])
    lines = [f"pool: {plain(pool['path'])}: {number(pool['rows'])} rows, {number(pool['ok'])} ok{failed}"]
    lines += [NOTHING_TRAINED, "", *_aligned(rows), ""]
    lines += [
        f"Used beyond the pool by {plain(strategy.name)}: {plain('; '.join(strategy.uses))}."
        for strategy in run.compared
        if strategy.uses
    ]
    lines += [f"{plain(strategy.name)}: {plain(strategy.error)}" for strategy in run.compared if strategy.error]
    lines += [plain(note) for note in run.notes]
    return "\n".join(lines).rstrip() + "\n"


def whole_text(run: Run, root: str) -> str:
    """The table, then the funnel of each strategy, then the rows that each two have in common."""
    lines = [selections_table(run, root)]
    for strategy in run.compared:
        if strategy.funnel:
            rows = [["rule", "rows in", "kept", "kept alone", "only this removes"]]
            for step in strategy.funnel:
                counts = (step.rows_in, step.rows_kept, step.alone_kept, step.only_removed)
                rows.append([plain(step.rule), *map(number, counts)])
            lines += [f"{plain(strategy.name)}: what each rule keeps", *_aligned(rows), ""]
    if run.overlap is not None:
        names = [plain(strategy.name) for strategy in run.compared]
        rows = [["Jaccard", *names]]
        for name, values in zip(names, run.overlap.jaccard.tolist(), strict=True):
            rows.append([name, *("-" if math.isnan(value) else f"{value:.3f}" for value in values)])
        about = "" if run.overlap.one_in == 1 else f", measured on every {run.overlap.one_in}th uid"
        lines += [f"rows in both, of rows in either{about}", *_aligned(rows)]
    return "\n".join(lines).rstrip() + "\n"


def json_text(run: Run, root: str) -> str:
    """The numbers of whole_text, fractions 0..1."""
    overlap = None if run.overlap is None else run.overlap.jaccard.tolist()
    value = {
        "run": run.name,
        **{key: run.header[key] for key in ("config_name", "date", "winnow_version", "pool")},
        "strategies": [_record(strategy, root) for strategy in run.compared],
        "jaccard": overlap and [[None if math.isnan(x) else float(f"{x:.8g}") for x in line] for line in overlap],
        "notes": list(run.notes),
    }
    return json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def uids_path(root: str, strategy: Strategy) -> str | None:
    """Where the strategy's list of uids is; None where it was not made."""
    return storage.join(root, strategy.selection, UIDS) if strategy.selection else None


def _record(strategy: Strategy, root: str) -> dict[str, Any]:
    return {
        "name": strategy.name,
        "label": strategy.label,
        "uses": list(strategy.uses),
        "kept_rows": strategy.kept_rows,
        "kept_samples": strategy.kept_samples,
        "kept_fraction": strategy.kept_fraction,
        "uids": uids_path(root, strategy),
        "funnel": [vars(step) for step in strategy.funnel],
        "error": strategy.error,
    }


def _name(strategy: Strategy) -> str:
    return plain(strategy.name + (f" ({strategy.label})" if strategy.label not in ("", strategy.name) else ""))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """One line a row; the first column and paths start where they start, numbers end where they end."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = [name not in (rows[0][0], UIDS) for name in rows[0]]

    def line(row: Sequence[str]) -> str:
        cells = zip(row, widths, numbers, strict=True)
        return "  ".join(text.rjust(width) if is_number else text.ljust(width) for text, width, is_number in cells)

    return [line(row).rstrip() for row in (rows[0], ["-" * width for width in widths], *rows[1:])]
