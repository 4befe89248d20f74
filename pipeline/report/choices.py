"""What strategies chose, as tables of text: the funnel of each, what they share, and their mix.

Names are as they are: whoever renders a table escapes them. JSON has the same as numbers.
"""

from __future__ import annotations

import math
from typing import Any

from pipeline.report.leaderboard import Leaderboard, number, percent, plain
from pipeline.report.records import FunnelStep, Mix, Run, Share, Strategy

FUNNEL = (
    "What each rule left of the rows that the one before left. Of the rows that can be chosen at all: how many pass "
    "the rule alone, and how many only this rule removes, as every other one keeps them."
)
OVERLAP = "Jaccard index of the kept rows: shared by both, of those in either; in brackets the rows in both."
MIX = "Share of each value in percent: of the pool's usable rows, and of the samples that each strategy takes."
MAX_VALUE_CHARS = 60


def funnel_steps(strategy: Strategy, pool: dict[str, Any]) -> tuple[FunnelStep, ...]:
    """The strategy's funnel; without a selection it is the whole pool."""
    return strategy.funnel or (FunnelStep("ok", pool["rows"], pool["ok"]),)


def funnel_cells(strategy: Strategy, pool: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts a rule."""
    body = [
        [
            step.rule,
            number(step.rows_kept),
            number(step.rows_in - step.rows_kept),
            number(step.alone_kept),
            number(step.only_removed),
        ]
        for step in funnel_steps(strategy, pool)
    ]
    return ["rule", "left", "removed", "alone keeps", "only this removes"], body


def overlap_about(run: Run) -> str:
    """What the table of the overlap says, and on how many rows it was measured."""
    if run.overlap is None or run.overlap.one_in == 1:
        return OVERLAP
    return f"{OVERLAP} Measured on every {run.overlap.one_in:,}th uid by hash, so the rows are estimates."


def overlap_cells(run: Run) -> tuple[list[str], list[list[str]]]:
    """Column names and one list of texts a strategy; none with one strategy. Columns are numbered like the lines."""
    if run.overlap is None:
        return [], []
    body = []
    for i, strategy in enumerate(run.compared):
        pairs = zip(run.overlap.jaccard[i].tolist(), run.overlap.shared_rows[i].tolist(), strict=True)
        texts = ["-" if math.isnan(jaccard) else f"{jaccard:.2f} ({number(shared)})" for jaccard, shared in pairs]
        body.append([f"{i + 1} {strategy.name}", *texts])
    return ["strategy", *(str(i + 1) for i in range(len(body)))], body


def mix_tables(run: Run) -> list[tuple[list[str], list[list[str]]]]:
    """Column names and one list of texts a value, for each column of `shares` that any strategy has."""
    tables = []
    for column in run.shares:
        mixes = [strategy.mixes.get(column) for strategy in run.compared]
        first = next((mix for mix in mixes if mix is not None), None)
        if first is None:
            continue
        pool = [share.pool_rows for share in _shares(first)]
        counts = [None if mix is None else [share.samples for share in _shares(mix)] for mix in mixes]
        columns = [_percents(some, len(pool)) for some in [pool, *counts]]
        names = [_value_text(value) for value in first.values]
        names += [f"other ({number(first.num_other)} values)"] if first.num_other else []
        body = [[name, *(texts[line] for texts in columns)] for line, name in enumerate(names)]
        tables.append(([column, "pool", *(strategy.name for strategy in run.compared)], body))
    return tables


def _shares(mix: Mix) -> list[Share]:
    return [*mix.values.values(), *([mix.other] if mix.num_other else [])]


def _percents(counts: list[int] | None, num: int) -> list[str]:
    total = sum(counts or ())
    return [percent(count / total) for count in counts] if counts and total else ["-"] * num


def _value_text(value: str | None) -> str:
    if value is None:
        return "(none)"
    text = plain(value)
    return (text if len(text) <= MAX_VALUE_CHARS else f"{text[: MAX_VALUE_CHARS - 1]}…") or "(empty)"


def choices_record(strategy: Strategy) -> dict[str, Any]:
    """What JSON says of one strategy's choice, beside its counts."""
    return {
        "funnel": [dict(vars(step)) for step in strategy.funnel],
        "shares": {
            column: {
                "values": [[value, share.pool_rows, share.samples] for value, share in mix.values.items()],
                "other": [mix.num_other, mix.other.pool_rows, mix.other.samples],
            }
            for column, mix in strategy.mixes.items()
        },
        "gallery": strategy.gallery,
        "samples": [
            {
                "rule": group.rule,
                "side": group.side,
                "samples": [
                    {"uid": sample.uid, "value": sample.value, "removed_by": sample.removed_by}
                    for sample in group.samples
                ],
            }
            for group in strategy.samples
        ],
    }


def samples_line(board: Leaderboard) -> str:
    """One sentence on the galleries; "" where there are none."""
    shown = [strategy for strategy in board.run.compared if strategy.samples]
    return "leaderboard.html shows samples on both sides of each strategy's cuts, and at random." if shown else ""
