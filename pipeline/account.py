"""What a strategy uses beyond the pool, and what its choice cost: for the report."""

from __future__ import annotations

from collections.abc import Mapping

from pipeline.core import storage
from pipeline.states import Status
from pipeline.steps import Plan, references_of
from stages.base import Stage
from stages.selection import strategies as algebra


def uses(plan: Plan, strategy: str, statuses: Mapping[str, Status] | None = None) -> list[str]:
    """What a strategy uses beyond the pool, as phrases for the report; [] for rules on the pool alone.

    Args:
        statuses: where the scorer's training is done, its compute is part of the phrase.
    """
    config, phrases = plan.config, []
    reference = (config.strategies[strategy] or {}).get("reference")
    if reference:
        phrases.append(f"reference {reference} instead of the pool")
    own = {alias for alias, _ in plan.columns.values()}
    for alias in sorted(own.intersection(_judging(plan, strategy))):
        stage = plan.steps[alias].work
        references = references_of(plan.steps[alias])
        if references:
            phrases.append(f"compared with {', '.join(references)}")
        phrases += _files_used(stage)
        if not stage.uses_model:
            continue
        model = config.models[stage.model]
        if model.recipe is None:
            phrases.append(f"model {stage.model}: {model.architecture} {model.pretrained}")
            continue
        phrase = f"model {stage.model}: trained on {model.on} ({model.recipe})"
        training = (statuses or {}).get(f"model/{stage.model}")
        if training is not None and training.record is not None:
            facts = training.record["facts"]
            hours = f"{facts['gpu_hours']:.2g} GPU-h" if facts["gpu_hours"] else f"{facts['cpu_hours']:.2g} CPU-h"
            phrase += f", {facts['samples_seen']:,} samples, {hours}"
        phrases.append(phrase)
    return phrases


def cost_of_choosing(plan: Plan, strategy: str, statuses: Mapping[str, Status]) -> dict[str, float]:
    """{samples_seen, cpu_hours, gpu_hours} of the stages that judge for a strategy and of the scorers trained for it.

    What several strategies share counts in full for each, as each would need it alone.
    """
    records = [status.record for name in _judging(plan, strategy) if (status := statuses.get(name)) is not None]
    facts = [record["facts"] for record in records if record is not None and "cpu_hours" in record["facts"]]
    return {key: sum(one.get(key, 0) for one in facts) for key in ("samples_seen", "cpu_hours", "gpu_hours")}


def _judging(plan: Plan, strategy: str) -> list[str]:
    """The steps whose columns decide what a strategy chooses, and all that those build on; in order."""
    chosen, name, _ = plan.steps[f"{strategy}/selection"].work
    columns = algebra.used_columns(chosen, name, sizes=False)  # a random set as large as another judges nothing
    return plan.ancestors(sorted({plan.columns[column][0] for column in columns if column in plan.columns}))


def _files_used(stage: Stage) -> list[str]:
    """A phrase for each parameter of the stage that names files of the user's."""
    phrases = []
    for parameter in sorted({key.split(".")[0] for key in stage.external_files()}):
        paths = getattr(stage, parameter)
        several = paths.values() if isinstance(paths, Mapping) else [paths] if isinstance(paths, str) else paths
        if names := ", ".join(storage.name_of(path) for path in several if path):
            phrases.append(f"{parameter} {names}")
    return phrases


def controls(plan: Plan) -> dict[str, str]:
    """{strategy: the first compared strategy that is nothing but a random set of its size}, of those that have one."""
    found: dict[str, str] = {}
    for name in plan.config.compare:
        definition = plan.config.strategies[name] or {}
        if set(definition) == {"random"} and definition["random"].get("as_many_as") in plan.config.compare:
            found.setdefault(definition["random"]["as_many_as"], name)
    return found


def label(plan: Plan, strategy: str) -> str:
    """`oracle` for a strategy that reads planted truth, `reference` for one that is no choice from the pool, or ""."""
    if "reference" in (plan.config.strategies[strategy] or {}):
        return "reference"
    chosen, name, _ = plan.steps[f"{strategy}/selection"].work
    judged_by = algebra.used_columns(chosen, name, sizes=False)
    return "oracle" if any(column.startswith("truth_") for column in judged_by) else ""
