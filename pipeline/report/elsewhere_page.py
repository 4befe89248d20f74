"""The page's sections on what is beside its run: leaderboards of other runs, and a table of imported rows."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.report.elsewhere import ApartRun, Beside, apart_about, imported_about, imported_cells
from pipeline.report.leaderboard import Leaderboard, plain
from pipeline.report.markup import Markup, element, section, table
from pipeline.report.tables import cells, header_lines

TEXTS = ("strategy", "row", "from", "standing")  # columns that start where they start


def beside_sections(board: Leaderboard) -> list[Markup]:
    """A section for each run that stands apart, then one on imported rows; none where there is nothing."""
    beside = board.beside or Beside()
    found = [_apart(part) for part in beside.apart]
    if beside.rows:
        found.append(section("Results from elsewhere", imported_about(beside), _table(*imported_cells(beside))))
    return found


def _apart(part: ApartRun) -> Markup:
    facts = [element("li", f"{label}: ", plain(text)) for label, text in header_lines(part.board)]
    notes = element("ul", *facts, class_="notes")
    return section(f"Beside: {plain(part.label)}", plain(apart_about(part)), _table(*cells(part.board)), notes)


def _table(names: Sequence[str], body: Sequence[Sequence[str]]) -> Markup:
    classes = ["text" if name in TEXTS else None for name in names]
    heads = [element("th", plain(name), class_=class_) for name, class_ in zip(names, classes, strict=True)]
    rows = [
        element("tr", *(element("td", plain(text), class_=class_) for text, class_ in zip(line, classes, strict=True)))
        for line in body
    ]
    return table(heads, rows)
