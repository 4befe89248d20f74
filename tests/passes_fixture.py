"""Passes without a cluster: one item after the other in this process."""

from __future__ import annotations

from pipeline.core.passes import Passes


def run_here(function, items, names, on_done):
    """None; the `run` of Passes."""
    for number, item in enumerate(items):
        on_done(number, function(*item))


def passes_here(folder) -> Passes:
    """Passes in the folder."""
    return Passes(run_here, str(folder))
