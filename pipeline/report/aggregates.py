"""Averages over fixed lists of tasks: DataComp's groups and averages, and one adjusted for chance.

None is ever over some of its tasks: what is missing is named in place of a value. DataComp's are those of its
aggregate_scores.py (ImageNet, 6 distribution shifts, VTAB's 13, 3 retrieval tasks, the plain mean of 38) and the 33
tasks of its paper that are not near chance (Gadre et al., arXiv 2304.14108, 2023).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from pipeline.core.datacomp import DATACOMP_TASKS
from pipeline.report.records import Task

CHANCE_ADJUSTED = "chance_adjusted"
GROUPS = {"ImageNet": "imagenet", "shifts": "shifts", "VTAB": "vtab", "retrieval": "retrieval"}


@dataclass(frozen=True)
class Aggregate:
    """An average over a fixed list of tasks, those that a run lacks included.

    `name` is the key of Row.aggregates and of JSON; `title` says how many tasks it is over.
    """

    name: str
    title: str
    tasks: tuple[str, ...]

    def missing(self, known: Collection[str]) -> tuple[str, ...]:
        """Its tasks that are not among these."""
        return tuple(task for task in self.tasks if task not in known)

    def mean(self, values: Mapping[str, float]) -> float | None:
        """The plain mean of its tasks' values, or None when one is missing."""
        if self.missing(values):
            return None
        return sum(values[task] for task in self.tasks) / len(self.tasks)


def datacomp_aggregates() -> tuple[Aggregate, ...]:
    """DataComp's six averages: ImageNet, shifts, VTAB, retrieval, all 38, the clean 33."""
    found = []
    for group, name in GROUPS.items():
        tasks = tuple(task for task, entry in DATACOMP_TASKS.items() if entry["group"] == group)
        found.append(Aggregate(name, group if len(tasks) == 1 else f"{group} ({len(tasks)})", tasks))
    counted = tuple(task for task, entry in DATACOMP_TASKS.items() if entry["counted"])
    clean = tuple(task for task, entry in DATACOMP_TASKS.items() if entry["clean"])
    found.append(Aggregate("datacomp", f"DataComp ({len(counted)})", counted))
    return (*found, Aggregate("datacomp_clean", f"clean ({len(clean)})", clean))


def aggregates_of(tasks: Sequence[Task]) -> tuple[Aggregate, ...]:
    """The averages that a run with these tasks shows: one adjusted for chance; DataComp's where it has a task of it."""
    found = [Aggregate(CHANCE_ADJUSTED, "chance-adjusted", tuple(task.name for task in tasks))] if tasks else []
    return (*found, *(datacomp_aggregates() if any(is_datacomp(task) for task in tasks) else ()))


def is_datacomp(task: Task) -> bool:
    """True for one of DataComp's counted tasks with the metric that its averages take."""
    return task.counted and task.name in DATACOMP_TASKS and task.metric == DATACOMP_TASKS[task.name]["metric"]
