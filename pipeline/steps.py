"""The parts of a plan: steps, each of which makes one artifact, and how a stage's columns and inputs are named."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from eval import tasks as eval_tasks
from pipeline.core.config import Config
from stages.base import Stage
from stages.exclusion import Exclusion
from stages.selection.strategies import Comparison
from training.recipe import Recipe, Seeds


@dataclass(frozen=True)
class Step:
    """One artifact to be made. `work` is what making it needs beyond the inputs: a stage, sources, a recipe, a task."""

    name: str
    kind: str
    version: int
    values: Mapping[str, Any]  # what changes the result, without names and paths
    inputs: Mapping[str, str] = field(default_factory=dict)  # role -> step
    resources: str = ""  # its name in `cluster:`
    work: Any = None
    unavailable: str = ""  # why it can't be made here: an asset that is missing, and where to get it


@dataclass(frozen=True)
class Training:
    """What a step of the kind `checkpoint` needs beyond its inputs.

    `start` is published weights, as pipeline.core.clip_model.load takes them; a model of this run is an input.
    """

    recipe: Recipe
    seeds: Seeds
    start: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class TaskImages:
    """What a step of the kind `task_images` needs beyond its inputs: the task, and the recipe of the models to come.

    `start` is as in Training.
    """

    task: str
    recipe: Recipe
    start: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Profiling:
    """What a step of the kind `profile` needs beyond its inputs: see stages.selection.pool_profile.write_profile.

    `keeps_low` are the scores of which strategies only ever keep the low end; only the report reads that.
    """

    types: Mapping[str, str]
    scores: tuple[str, ...]
    groups: Mapping[str, Mapping[str, str]]
    exclude: Exclusion
    flagged: tuple[Comparison, ...]
    keeps_low: tuple[str, ...]


@dataclass(frozen=True)
class Plan:
    """All steps in an order in which each comes after its inputs."""

    config: Config
    steps: Mapping[str, Step]
    columns: Mapping[str, tuple[str, str]]  # column -> the step that adds it, and its name in that step's files
    recipes: Mapping[int, Recipe]  # of the comparison, by samples seen, in increasing order
    tasks: Mapping[str, eval_tasks.TaskData | None]  # None: a task of the demo world, drawn by the step `tasks`
    warnings: list[str]
    exclude: Exclusion
    run_id: str = field(default_factory=lambda: uuid.uuid4().hex)  # which run a retry belongs to

    @property
    def recipe(self) -> Recipe:
        """The recipe at its largest budget: the leaderboard's."""
        return self.recipes[max(self.recipes)]

    def ancestors(self, names: Iterable[str]) -> list[str]:
        """The named steps and all that they depend on, in order."""
        return ancestors(self.steps, names)


def ancestors(steps: Mapping[str, Step], names: Iterable[str]) -> list[str]:
    """The named steps and all that they depend on, in the order of `steps`."""
    wanted: set[str] = set()
    stack = list(names)
    while stack:
        name = stack.pop()
        if name not in wanted:
            wanted.add(name)
            stack += steps[name].inputs.values()
    return [name for name in steps if name in wanted]


def training_prefix(recipes: Mapping[int, Recipe], strategy: str, samples_seen: int, seed: int) -> str:
    """What the names of a training's steps start with: `basic/seed0`; with several budgets `basic/samples640/seed0`."""
    return f"{strategy}/samples{samples_seen}/seed{seed}" if len(recipes) > 1 else f"{strategy}/seed{seed}"


def reference_role(name: str, role: str) -> str:
    """The role of an input that is the `pool` or a `column/...` of a reference which a stage compares the pool with."""
    return f"reference/{name}/{role}"


def references_of(step: Step) -> list[str]:
    """The names of the references (and tasks) that a stage's step compares the pool with."""
    roles = (role for role in step.inputs if role.startswith("reference/") and role.endswith("/pool"))
    return [role.removeprefix("reference/").removesuffix("/pool") for role in roles]


def stage_columns(alias: str, stage: Stage) -> dict[str, str]:
    """{column: type} as the pool sees them: prefixed with the alias when it is not the stage's own name."""
    prefix = "" if alias == stage_name(stage) else f"{alias}_"
    return {prefix + column: kind for column, kind in stage.adds.items()}


def stage_name(stage: Stage) -> str:
    return type(stage).__module__.rsplit(".", 1)[-1]
