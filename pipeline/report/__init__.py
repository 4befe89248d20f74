"""Results to leaderboard: a pure function of a run's records. No Ray, no torch, no network, no clock.

records.py     the run folder as plain values
uncertainty.py intervals, tests, multiple comparisons with the best
leaderboard.py both put together: rows, differences, the sentence on top
tables.py      terminal, Markdown, CSV, JSON
selections.py  what a run says that ends at its selections; which of the two reports a run gets
choices.py     what strategies chose as tables of text: funnel, overlap, mix
trainings.py   what trainings did: curves, a table, scores against samples seen
page.py        one self-contained HTML page, with plots.py (SVG), samples.py (the gallery), markup.py (escaping) and
               page.css
"""

from pipeline.report.leaderboard import Leaderboard, build_report, make_leaderboard
from pipeline.report.records import read_run
from pipeline.report.selections import write_report
from pipeline.report.tables import terminal_table

__all__ = ["Leaderboard", "build_report", "make_leaderboard", "read_run", "terminal_table", "write_report"]
