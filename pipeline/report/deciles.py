"""A slider over the tenths of each score: what `top` would keep and drop at 0, 10, ... 100 %.

Without its script (slider.js) a page shows the tenths as ten groups and the numbers as a table; the script only moves
groups and looks numbers up. Pictures are in the page as data; so that it stays small, fewer a tenth are shown where
there are many.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pipeline.report.leaderboard import Leaderboard, number, percent, plain
from pipeline.report.markup import Markup, element, section, table
from pipeline.report.pool_profile import GOOD, Decile, Profile
from pipeline.report.samples import figure

MAX_BYTES = 2_500_000  # of all sliders of a page
FIRST_TENTHS = 3  # where a slider stands at first
ABOUT = (
    "Each score cuts the usable rows into ten tenths, from the end that is kept; ties go by uid, as in a top fraction. "
    "The rows shown are drawn by the hash of their uid."
)
ABOUT_TRUTH = " Precision: of the rows kept, those planted good. Recall: of all planted good rows, those kept."


@dataclass(frozen=True)
class Kept:
    """What the first tenths of a score are together. Precision and recall are None where truth is not known."""

    tenths: int
    rows: int
    edge: float | None  # the last number that is kept
    precision: float | None
    recall: float | None


def kept_lines(deciles: Sequence[Decile], low: bool = False) -> list[Kept]:
    """Kept of 0 to all tenths of a score, highest first; with `low` the lowest are first and are kept."""
    has_truth = any(decile.faults is not None for decile in deciles)
    all_good = sum(decile.good_rows for decile in deciles)
    found = []
    for tenths in range(len(deciles) + 1):
        kept = deciles[:tenths]
        rows, good = sum(decile.rows for decile in kept), sum(decile.good_rows for decile in kept)
        ends = [decile.highest if low else decile.lowest for decile in kept if decile.rows]
        edge = ends[-1] if ends else None
        precision = good / rows if has_truth and rows else None
        recall = good / all_good if has_truth and all_good else None
        found.append(Kept(tenths, rows, edge, precision, recall))
    return found


def decile_sections(board: Leaderboard) -> list[Markup]:
    """The section with a slider for each score; none where the run has no profile of its pool, or no score."""
    return score_sections(board.run.profile) if board.run.profile is not None else []


def score_sections(profile: Profile) -> list[Markup]:
    """The same for a profile."""
    if not profile.scores:
        return []
    about = ABOUT + (ABOUT_TRUTH if profile.truth is not None else "")
    most = max(len(decile.samples) for deciles in profile.scores.values() for decile in deciles)
    for num in range(most, -1, -1):
        parts = [_score(name, profile, num) for name in profile.scores]
        if num == 0 or sum(len(part.encode("utf-8", "replace")) for part in parts) <= MAX_BYTES:
            break
    if num < most:
        about += f" {num} of {most} rows a tenth, to keep this page small."
    return [section("What each score keeps", about, *parts)]


def _score(name: str, profile: Profile, num: int) -> Markup:
    """One score: the slider and what it says, the tenths, and the same numbers as a table."""
    low = name in profile.keeps_low
    deciles = profile.scores[name][::-1] if low else profile.scores[name]
    lines = kept_lines(deciles, low)
    sentences = [_sentence(name, line, lines[-1].rows, low) for line in lines]
    control = element(
        "div",
        element(
            "label",
            element("span", "keep"),
            element(
                "input",
                type="range",
                min=0,
                max=len(deciles),
                step=1,
                value=FIRST_TENTHS,
                aria_label=f"tenths of the rows kept by {plain(name)}",
            ),
        ),
        element("output", sentences[FIRST_TENTHS], aria_live="off"),
        class_="slider",
        data_script="",
        hidden="",
    )
    groups = [
        _tenth(number_of + 1, decile, num, low, profile.truth is not None) for number_of, decile in enumerate(deciles)
    ]
    return element(
        "details",
        element("summary", plain(name)),
        control,
        element("div", *groups, class_="tenths"),
        element("details", element("summary", "Rows kept by fraction"), _table(lines, sentences, low)),
        class_="score",
        open="" if name == next(iter(profile.scores)) else None,
    )


def _tenth(tenth: int, decile: Decile, num: int, low: bool, has_truth: bool) -> Markup:
    ends = (decile.lowest, decile.highest) if low else (decile.highest, decile.lowest)
    span = (
        "no rows" if not decile.rows else f"{number(decile.rows)} rows, {value_text(ends[0])} to {value_text(ends[1])}"
    )
    parts = [element("b", f"tenth {tenth}"), element("span", span)]
    if has_truth and decile.rows:
        good = decile.good_rows / decile.rows
        faults = sorted((decile.faults or {}).items(), key=lambda entry: (-entry[1], entry[0]))
        names = ", ".join(f"{number(count)} {plain(fault)}" for fault, count in faults if fault != GOOD)
        parts.append(element("span", f"{percent(good)} % planted good", title=names or None))
        parts.append(element("div", element("i", "", style=f"width:{100 * good:.2f}%"), class_="track c2"))
    shown = [figure(sample) for sample in decile.samples[:num]]
    head = element("h4", *parts)
    return element("div", head, element("div", *shown, class_="samples") if shown else None, class_="tenth")


def _table(lines: Sequence[Kept], sentences: Sequence[str], low: bool) -> Markup:
    has_truth = any(line.precision is not None for line in lines)
    heads = ["kept", "rows", "up to" if low else "down to", *(["precision", "recall"] if has_truth else [])]
    rows = []
    for line, sentence in zip(lines, sentences, strict=True):
        texts = [f"{10 * line.tenths} %", number(line.rows), value_text(line.edge)]
        texts += [_percent(line.precision), _percent(line.recall)] if has_truth else []
        rows.append(element("tr", *(element("td", text) for text in texts), data_text=sentence))
    return table([element("th", text) for text in heads], rows, class_="cuts")


def _sentence(name: str, line: Kept, all_rows: int, low: bool) -> str:
    """What the slider says when it stands there."""
    if not line.rows:
        return f"{10 * line.tenths} %: nothing of {number(all_rows)} rows"
    text = f"{10 * line.tenths} %: {number(line.rows)} of {number(all_rows)} rows, {plain(name)} "
    text += f"{'≤' if low else '≥'} {value_text(line.edge)}"
    if line.precision is not None and line.recall is not None:
        text += f"; precision {_percent(line.precision)}, recall {_percent(line.recall)}"
    return text


def _percent(fraction: float | None) -> str:
    return "-" if fraction is None else f"{percent(fraction)} %"


def value_text(value: float | None) -> str:
    """A number with four digits, or whole with thousands separated; a dash for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1e3 <= abs(value) < 1e15 or value == int(value) else f"{value:.4g}"
