"""Results to leaderboard: a pure function of a run's records. No Ray, no torch, no network, no clock.

records.py     the run folder as plain values
items.py       how a metric follows from a task's items, and the noise that comes from them
uncertainty.py intervals, tests, multiple comparisons
scores.py      means over seeds and tasks, and differences, each with its interval
aggregates.py  averages over fixed lists of tasks: DataComp's, and one adjusted for chance
leaderboard.py all put together: rows, standings, the sentence on top
imported.py    results of other programs, read from their files
elsewhere.py   other runs and imported results beside a run's own; elsewhere_page.py shows them on the page
tables.py      terminal, Markdown, CSV, JSON
selections.py  what a run says that ends at its selections; which of the two reports a run gets
pool_profile.py what is in the pool, as plain values; pool_page.py is its page, deciles.py the sliders of both pages
choices.py     what strategies chose as tables of text: funnel, overlap, mix
trainings.py   what trainings did: curves, a table, scores against samples seen
page.py        one self-contained HTML page, with plots.py (SVG, heat map), samples.py (the gallery), markup.py
               (escaping, document, content policy), page.css, page.js, slider.js
"""

from pipeline.report.elsewhere import check_beside
from pipeline.report.leaderboard import Leaderboard, build_report, make_leaderboard
from pipeline.report.records import read_run
from pipeline.report.selections import write_report
from pipeline.report.tables import terminal_table

__all__ = [
    "Leaderboard",
    "build_report",
    "check_beside",
    "make_leaderboard",
    "read_run",
    "terminal_table",
    "write_report",
]
