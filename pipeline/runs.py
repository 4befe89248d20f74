"""The runs below a root: what a run writes into its folder, the newest run, and --clean.

    runs/2026-01-31T12-00-00Z_demo/   config.yaml  plan.json  log.jsonl  run.json  leaderboard.{md,json,csv,html}
                                      pool.{html,json}

It maps the user's names to artifacts. plan.json is written as the run goes on, run.json at its end.
"""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import re
import subprocess
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml

from eval import tasks as eval_tasks
from pipeline import account
from pipeline.core import artifact, log, machines, storage
from pipeline.core.config import Config
from pipeline.core.errors import ConfigError, WinnowError, without_secrets
from pipeline.plan import TASKS
from pipeline.states import Status
from pipeline.steps import Plan, training_prefix
from stages.base import Stage

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
ARTIFACT = re.compile(r"[a-z][a-z0-9_]*-[0-9a-f]{12}$")
RUNS = "runs"


@dataclasses.dataclass
class Outcome:
    """What became of a run: the last status of every step, and the failed ones with their causes."""

    statuses: dict[str, Status]
    failures: dict[str, str] = dataclasses.field(default_factory=dict)


MakeRecord = Callable[[Plan, Outcome, str, datetime.datetime], dict[str, Any]]


def new_run_path(root: str, now: datetime.datetime, name: str) -> str:
    """The folder of a run that starts now; it is not there yet."""
    stamp = now.strftime("%Y-%m-%dT%H-%M-%SZ")
    taken = set(storage.list_folders(storage.join(root, RUNS)))
    candidates = (f"{stamp}_{name}{suffix}" for suffix in ["", *(f"_{number}" for number in range(2, 100))])
    return storage.join(root, RUNS, next(run for run in candidates if run not in taken))


def config_text(config: Any) -> str:
    """The resolved config; what a URL carries beyond its path (signatures, tokens, passwords) stays out of records."""
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return without_secrets(text)


def _installed() -> bool:
    try:
        importlib.metadata.version("winnow")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def write_plan(run_path: str, outcome: Outcome) -> None:
    """None; the run's plan.json: every step's state and artifact, as known now."""
    steps = {
        name: {"state": status.state, "artifact": status.artifact.name, "why": status.why}
        for name, status in outcome.statuses.items()
        if status.artifact is not None
    }
    storage.write_json(storage.join(run_path, "plan.json"), {"steps": steps, "failures": outcome.failures})


def task_data(plan: Plan, name: str, statuses: Mapping[str, Status]) -> eval_tasks.TaskData:
    """The task with its files; those of the demo world are there once the step `tasks` is done."""
    data = plan.tasks[name]
    if data is not None:
        return data
    status = statuses["tasks"]
    assert status.artifact is not None and status.record is not None  # asked for only then
    drawn = eval_tasks.resolve_task(name, status.artifact.path)
    return dataclasses.replace(drawn, digest=f"{artifact.content_digest(status.record)}/{name}")


def run_record(plan: Plan, outcome: Outcome, name: str, now: datetime.datetime) -> dict[str, Any]:
    """The run.json that the report is made from: names mapped to artifacts. Read by pipeline/report/records.py."""
    statuses = outcome.statuses
    pool_status = statuses["pool"]
    pool_facts = (pool_status.record or {}).get("facts", {})

    def made(step: str) -> str | None:
        status = statuses.get(step)
        return status.artifact.name if status and status.artifact and status.state == "done" else None

    def error(step: str) -> str | None:
        if step not in statuses or statuses[step].state == "done":
            return None
        causes = [
            f"{other}: {outcome.failures[other]}" for other in plan.ancestors([step]) if other in outcome.failures
        ]
        return causes[0] if causes else "not done"

    ends_at_selections = plan.config.pool.download is False
    strategies, controls = [], account.controls(plan)
    for strategy in plan.config.compare:
        strategies.append(
            {
                "name": strategy,
                "selection": made(f"{strategy}/selection"),
                "train_set": made(f"{strategy}/train_set"),
                "gallery": made(f"{strategy}/gallery"),
                "shares": made(f"{strategy}/shares"),
                "compared": True,
                "label": account.label(plan, strategy),
                "uses": account.uses(plan, strategy, statuses),
                "control": controls.get(strategy),
                "choosing": account.cost_of_choosing(plan, strategy, statuses),
                "error": error(f"{strategy}/{'selection' if ends_at_selections else 'train_set'}"),
            }
        )
    tasks = []
    for task in plan.tasks:
        if plan.tasks[task] is None and statuses["tasks"].state != "done":
            continue  # without the world's tasks there is no result to show
        data = task_data(plan, task, statuses)
        tasks.append(
            {
                "name": data.name,
                "type": data.task.type,
                "metric": data.task.metric,
                "chance": _chance(plan, data, statuses),
                "group": data.task.group,
                "in_domain": data.task.in_domain,
                "counted": data.task.counted,
                "source": data.source,
                "clean": data.task.clean,
                "title": data.task.title,
                "digest": data.digest,
            }
        )
    contamination = [
        {"stage": alias, "path": made(alias), "error": error(alias)}
        for alias, step in plan.steps.items()
        if isinstance(step.work, Stage) and step.work.uses_references and step.work.against == TASKS
    ]
    trainings = [
        {"strategy": strategy, "samples_seen": samples_seen, "seed": seed}
        for strategy in ([] if ends_at_selections else plan.config.compare)
        for samples_seen in plan.recipes
        for seed in plan.config.train.seeds
    ]
    prefixes = [training_prefix(plan.recipes, **training) for training in trainings]
    return {
        "config_name": name,
        "date": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "winnow_version": importlib.metadata.version("winnow") if _installed() else "source",
        "metric_version": eval_tasks.METRIC_VERSION,
        "recipe": _recipe_record(plan),
        "recipe_values": _recipe_values(plan, prefixes, made),
        "pool": {
            "path": pool_status.artifact.name if pool_status.artifact else None,
            "digest": artifact.content_digest(pool_status.record) if pool_status.record else None,
            "rows": pool_facts.get("rows"),
            "ok": pool_facts.get("ok_rows"),
            "failed": pool_facts.get("failed", {}),
        },
        "strategies": strategies,
        "tasks": tasks,
        "trainings": [
            {
                **training,
                "seeds": plan.steps[f"{prefix}/train"].values["seeds"],
                "checkpoint": made(f"{prefix}/train"),
                "error": error(f"{prefix}/train"),
            }
            for training, prefix in zip(trainings, prefixes, strict=True)
        ],
        "results": [
            {
                **training,
                "task": task["name"],
                "path": made(f"{prefix}/eval/{task['name']}"),
                "error": error(f"{prefix}/eval/{task['name']}"),
            }
            for training, prefix in zip(trainings, prefixes, strict=True)
            for task in tasks
        ],
        "contamination": contamination,
        "leave_out": plan.config.eval.leave_out,
        "profile": {
            "path": made("profile"),
            "error": error("profile"),
            "keeps_low": list(plan.steps["profile"].work.keeps_low),
            "flagged": plan.config.flagged,
        },
        "shares": plan.config.shares,
        "published": plan.config.published,
        "published_note": without_secrets(plan.config.published_note),
        "beside": [
            {key: without_secrets(value) if isinstance(value, str) else value for key, value in entry.items()}
            for entry in (one.model_dump(exclude_defaults=True) for one in plan.config.report.beside)
        ],
        "baseline": plan.config.baseline or plan.config.compare[0],
    }


def stages_record(plan: Plan, outcome: Outcome, name: str, now: datetime.datetime) -> dict[str, Any]:
    """The run.json of `--until stages`: of the pool and its profile alone, as nothing was chosen or trained."""
    parts = ("strategies", "tasks", "trainings", "results", "contamination", "shares")
    return run_record(plan, outcome, name, now) | {part: [] for part in parts} | {"published": {}}


def _chance(plan: Plan, data: eval_tasks.TaskData, statuses: Mapping[str, Status]) -> float | None:
    """What guessing reaches: of some tasks it follows from their images, and is then a fact of each result."""
    if data.chance is not None:
        return data.chance
    done = (
        status.record
        for name, step in plan.steps.items()
        if step.kind == "results" and step.work == data.name and (status := statuses.get(name)) is not None
    )
    return next((record["facts"]["chance"] for record in done if record is not None), None)


def _recipe_record(plan: Plan) -> dict[str, Any]:
    """What the report says of the recipe, at the largest budget: what every recipe has, and how it is unlike most."""
    recipe = plan.recipe
    found = {
        "name": plan.config.train.recipe,
        "model": recipe.model if isinstance(recipe.model, str) else "custom",
        "samples_seen": recipe.samples_seen,
        "global_batch": recipe.global_batch_size,
        "lr": recipe.lr,
        "loss": recipe.loss,
    }
    own = {
        name: getattr(recipe, name) or None for name in ("start_from", "num_negatives", "patch_dropout", "ema_decay")
    }
    own |= {name: getattr(plan.config.train, name) for name in ("initialisation_seed", "order_seed", "held_out")}
    return found | {name: value for name, value in own.items() if value is not None}


def _recipe_values(plan: Plan, prefixes: Sequence[str], made: Callable[[str], str | None]) -> dict[str, Any]:
    """All that decides the weights at the largest budget, beside the pairs and the seed; two runs are alike in it."""
    if not prefixes:
        return {}
    step = max((plan.steps[f"{prefix}/train"] for prefix in prefixes), key=lambda step: step.work.recipe.samples_seen)
    inputs = {name: made(other) for name, other in step.inputs.items() if name != "train_set"}
    values = {**step.values["recipe"], "version": step.version, "ledger": step.values["ledger"], **inputs}
    seeds = {name: getattr(plan.config.train, name) for name in ("initialisation_seed", "order_seed")}
    return values | {name: value for name, value in seeds.items() if value is not None}


def package_versions() -> dict[str, Any]:
    """{versions, code}: of the packages that decide values, and the git commit of our own code where there is one."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        commit = "unknown"
    return {"versions": machines.versions(), "code": commit}


def unreferred(root: str) -> list[str]:
    """Sorted names of the artifact folders below the root that no run's plan.json names. Nothing else is looked at."""
    referred: set[str] = set()
    for run in storage.list_folders(storage.join(root, RUNS)):
        plan_path = storage.join(root, RUNS, run, "plan.json")
        if storage.exists(plan_path):
            referred |= {step["artifact"] for step in storage.read_json(plan_path)["steps"].values()}
    return [name for name in storage.list_folders(root) if ARTIFACT.match(name) and name not in referred]


def newest_run(root: str) -> str:
    """The folder of the newest run that got as far as a leaderboard. Raises WinnowError when there is none."""
    runs = storage.join(root, RUNS)
    for name in reversed(storage.list_folders(runs)):
        if storage.exists(storage.join(runs, name, "run.json")):
            return storage.join(runs, name)
    raise WinnowError(f"{runs}: expected a finished run to report on, found none")


def find_beside(config: Config, reported: str = "") -> Config:
    """The config with the folder of a run for each run in `report.beside`, of a root its newest with trainings.

    Args:
        reported: the folder of the run that the report is of, which is not shown beside itself.

    Raises:
        ConfigError: when there is none.
    """
    beside = []
    for index, entry in enumerate(config.report.beside):
        if entry.run is not None:
            is_run = storage.exists(storage.join(entry.run, "run.json"))
            folder = storage.join(entry.run, RUNS)
            names = [] if is_run else reversed(storage.list_folders(folder))
            candidates = [entry.run] if is_run else [storage.join(folder, name) for name in names]
            run = next((path for path in candidates if path != reported and _has_trainings(path)), None)
            if run is None:
                place = f"report.beside.{index}.run"
                raise ConfigError(f"{place} = {entry.run}, expected another run that trained, or a root with one")
            entry = entry.model_copy(update={"run": run})
        beside.append(entry)
    return config.model_copy(update={"report": config.report.model_copy(update={"beside": beside})})


def _has_trainings(run_path: str) -> bool:
    path = storage.join(run_path, "run.json")
    try:
        data = storage.read_json(path) if storage.exists(path) else {}
    except WinnowError as error:
        raise ConfigError(str(error)) from error
    return isinstance(data, dict) and bool(data.get("trainings"))


def clean(root: str, remove: bool) -> int:
    """0; prints each artifact that no run refers to with its size, and removes it when `remove`."""
    found = unreferred(root)
    for name in found:
        path = storage.join(root, name)
        record = artifact.read_record(path)
        size = sum(entry["bytes"] for entry in record["files"].values()) if record else None
        state = f"{log.short_count(size)}B" if size is not None else "unfinished"
        print(f"{'removed' if remove else 'unused'}  {name}  {state}")
        if remove:
            storage.delete(storage.join(path, artifact.RECORD))  # first: half a folder must not look finished
            storage.delete(path)
    if not found:
        print(f"{root}: every artifact is referred to by a run")
    elif not remove:
        print(f"{len(found)} artifacts of {root} are referred to by no run; --clean --yes removes them")
    return 0
