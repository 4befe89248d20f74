"""Config -> the DAG of steps.

    pool -> stages' columns -> selection -> train_set -> train (per budget and seed) -> eval (per task)
      ^      ^ what is in both is the pool's profile, which only the report reads
      ^      ^ a stage may need a model, which is itself: reference pool -> selection -> train_set -> train
      ^      ^ and so may a training, to start from, as it may need a reference to be watched on
      ^      ^ or references: pools of their own (a task's images among them), with columns of their own
      ^      ^ or a strategy that it works within, which is a selection: rows outside are to it as failed rows are
      ^ where the source is a table of URLs: urls -> columns that need no image -> selection -> download
        with `download: false` the pool is that of `urls`, and the selections are where the plan ends

A downloaded pool is a step of its own after `urls`. What state each step is in: states.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import fields, replace
from typing import Any

from eval import tasks as eval_tasks
from pipeline import trackers
from pipeline.core import clip_model, storage
from pipeline.core.config import NAME, RESERVED, Config, ModelConfig, PoolConfig, TrainConfig, validate
from pipeline.core.errors import FAILURES, ConfigError, StoreError, WinnowError, one_line, suggestion
from pipeline.steps import (
    Plan,
    Profiling,
    Step,
    TaskImages,
    Training,
    ancestors,
    reference_role,
    stage_columns,
    stage_name,
    training_prefix,
)
from stages import build_stage, exclusion
from stages.base import Stage
from stages.column_files import ARROW_TYPES, POOL_TYPES
from stages.duplicates.groups import DuplicateStage
from stages.ingest import demo_world, download, pool_shards, sources
from stages.ingest.fetch.settings import DownloadSettings
from stages.ingest.samples import ORIGINAL_FILE, ORIGINAL_NAME
from stages.selection import choose, gallery, pool_profile, shares, train_set
from stages.selection import strategies as algebra
from training import ledger, recipe
from training.recipe import Recipe, Seeds

TRAIN_SHARD_SIZE = 10_000  # samples a tar of a train set
KNOWN_BEFORE = ("uid", "caption", "source", "url", "original_width_px", "original_height_px")  # a download
BEFORE_IMAGES = ("caption", "columns")  # what a stage may read there
DOWNLOAD_TYPES = {
    column: name for column, kind in download.COLUMNS.items() for name, known in ARROW_TYPES.items() if known == kind
}
STAGES = "stages"  # `--until stages`: all of the config's stages, and the pool's profile
WITHOUT_TASKS = (STAGES, "pool", "urls")  # an `--until` that reads no task, unless a stage is against them
TASKS = "tasks"  # what a stage is `against` that compares the pool with the images of all tasks
DEMO = "demo"  # the word for the embedded world, as a source and as the root of tasks
EVERYTHING = {"everything": algebra.Strategy("everything", ())}  # every ok row, but for what is excluded


def build(config: Config, place: str, fetch_tasks: bool = True, until: str | None = None) -> Plan:
    """The plan of an experiment. Raises ConfigError for everything that can be known before work starts.

    Args:
        place: the config file's path, for messages.
        fetch_tasks: whether tasks on the hub are fetched; else what would be is an error.
        until: the steps to reach (see targets); where these evaluate nothing, tasks may be missing and are no steps.
    """
    steps: dict[str, Step] = {}

    def add(step: Step) -> str:
        if step.name in steps:
            raise ConfigError(
                f"{place}: two steps are called {step.name}; give a stage, model or strategy another name"
            )
        steps[step.name] = step
        return step.name

    read = _read_step("pool", config.pool, f"{place}: pool")
    settings = _download_settings(read, config.pool, f"{place}: pool")
    ends_at_selections = config.pool.download is False
    trackers.check(config.train.log_to, config.root, f"{place}: train.log_to")
    exclude = exclusion.parse(config.exclude.uids, config.exclude.domains, f"{place}: exclude")
    recipes = _recipes(config, place)
    stages, limits = _stages(config, place)
    carried = sources.carried_columns(read.work)
    own_types = {**POOL_TYPES, **carried, **(DOWNLOAD_TYPES if settings else {})}  # of the pool itself
    column_types = dict(own_types)
    empty: dict[str, str] = {}  # column -> why it has no values
    for alias, stage in stages.items():
        for column, kind in stage_columns(alias, stage).items():
            if column in column_types:
                raise ConfigError(f"{place}: stages.{alias}: column {column} is there already; use `as:` to prefix it")
            column_types[column] = kind
        names = dict(zip(stage.adds, stage_columns(alias, stage), strict=True))
        empty |= {names[column]: f"stages.{alias}: {why}" for column, why in stage.empty_columns().items()}

    _check_shares(config, column_types, place)
    definitions = {name: definition or {} for name, definition in config.strategies.items()}
    on_references = _reference_strategies(config, definitions, place)
    parsed = algebra.parse_strategies(
        {name: definition for name, definition in definitions.items() if name not in on_references},
        place=f"{place}: strategies",
        columns=column_types,
    )

    flagged = algebra.parse_comparisons(config.flagged, f"{place}: flagged", column_types)
    for comparison in flagged:
        if comparison.column in empty:
            why = empty[comparison.column]
            raise ConfigError(f"{place}: flagged uses {comparison.column}, which has no values: {why}")
    for name in parsed:
        for column in sorted(algebra.used_columns(parsed, name).intersection(empty)):
            raise ConfigError(f"{place}: strategies.{name} uses {column}, which has no values: {empty[column]}")
    for alias, strategy in limits.items():
        if strategy not in parsed:
            hint = suggestion(strategy, parsed)
            raise ConfigError(f"{place}: stages.{alias}.within = {strategy}, expected a strategy.{hint}")

    # Stages and models depend on each other in turns: a stage on a model, a model on a strategy, that on columns.
    columns: dict[str, tuple[str, str]] = {}
    visiting: list[str] = []
    used_models: dict[str, Any] = {}  # what identifies each
    warnings: list[str] = []

    def owner_of(column: str) -> str | None:
        return next((alias for alias, stage in stages.items() if column in stage_columns(alias, stage)), None)

    known_without_images: dict[str, set[str]] = {}  # pool that is the rows of tables -> its columns that have values

    def add_pool(read: Step, pool_config: PoolConfig, settings: DownloadSettings | None) -> None:
        """The step that makes a pool; where its images are downloaded, after those that say which."""
        name, only = read.name, pool_config.only
        known = {*KNOWN_BEFORE, *sources.carried_columns(read.work)}
        if pool_config.download is False:
            known_without_images[name] = known
            add(replace(read, kind="urls"))  # what a download starts from: the same artifact
            return
        if settings is None:
            add(read)
            return
        urls = add(replace(read, name="urls" if name == "pool" else f"{name}/urls", kind="urls"))
        known_without_images[urls] = known
        inputs = {"urls": urls}
        if only is not None:
            inputs["selection"] = add_choice("urls/selection", only, f"{place}: pool.only = {only}", urls)
        add(Step(name, "pool", download.VERSION, {"download": settings.identity()}, inputs, "download", settings))

    def check_known(column: str, pool_step: str, where: str) -> None:
        """None. Raises ConfigError for a column of the pool itself that has no values without images."""
        if column not in known_without_images.get(pool_step, own_types):
            raise ConfigError(f"{where}: uses {column}, expected only columns that are known before the download")

    def add_stage(alias: str, pool_step: str = "pool") -> str:
        step_name = alias if pool_step == "pool" else f"{pool_step}/{alias}"
        if step_name in steps:
            return step_name
        stage = stages[alias]
        if pool_step == "urls" and (stage.reads not in BEFORE_IMAGES or stage.uses_model or stage.whole_pool):
            raise ConfigError(
                f"{place}: pool.only = {config.pool.only}: the stage {alias} needs images, a model or the whole pool, "
                "expected only columns that are known before the download"
            )
        if pool_step in known_without_images and (stage.reads not in BEFORE_IMAGES or stage.uses_model):
            raise ConfigError(
                f"{place}: {pool_step.replace('reference/', 'references.')}.download = false: the stage {alias} needs "
                "images or a model, expected only stages that read captions or columns"
            )
        _enter(visiting, f"stages.{alias}", place)
        inputs = {"pool": pool_step}
        for column in stage.needs:
            if column in own_types:
                if pool_step in ("pool", "urls"):
                    check_known(column, pool_step, f"{place}: stages.{alias}")
                continue
            owner = owner_of(column)
            if owner is None:
                raise ConfigError(f"{place}: stages.{alias} needs the column {column}, which no stage adds")
            inputs[f"column/{column}"] = add_stage(owner, pool_step)
        if stage.uses_references:
            inputs |= add_references(alias, stage)
        if alias in limits and pool_step in ("pool", "urls"):
            where = f"{place}: stages.{alias}.within = {limits[alias]}"
            inputs["within"] = add_choice(f"{step_name}/within", limits[alias], where, pool_step)
        elif stage.whole_pool and exclude and pool_step == "pool":  # what is excluded is nobody's copy or neighbour
            name = f"{step_name}/within"
            inputs["within"] = add_selection(name, EVERYTHING, "everything", {"pool": "pool"}, place)
        try:
            owners = {column: owner_of(column) for column in stage.needs}
            types = {column: column_types[column] for column in stage.needs}
            stage.check_needs(types, {column: stages[owner] for column, owner in owners.items() if owner})
        except ConfigError as error:
            raise ConfigError(f"{place}: stages.{alias}.{error}") from error
        values: dict[str, Any] = {"fields": _fields(stage)}
        missing = stage.unavailable()
        if missing:
            warnings.append(f"stages.{alias} does not run, and what needs it is N/A: {missing}")
        else:
            values["fields"] |= _external_digests(stage, f"{place}: stages.{alias}")
        if stage.uses_model:
            name = stage.model  # type: ignore[attr-defined]
            values["fields"]["model"], own_inputs = add_named_model(name, "model", f"{place}: stages.{alias}.model")
            inputs |= own_inputs
        visiting.pop()
        add(Step(step_name, stage_name(stage), stage.version, values, inputs, alias, stage, missing))
        if pool_step == "pool":
            columns.update(dict(zip(stage_columns(alias, stage), ((alias, own) for own in stage.adds), strict=True)))
        return step_name

    def add_references(alias: str, stage: Stage) -> dict[str, str]:
        """The inputs of a stage that are the pools it compares with, and their columns: see reference_role."""
        against = stage.against  # type: ignore[attr-defined]
        where = f"{place}: stages.{alias}.against"
        if against != TASKS:
            for name in against:
                if name not in config.references:
                    hint = suggestion(name, config.references)
                    raise ConfigError(f"{where}: {name}, expected {TASKS} or names of references.{hint}")
            if len(set(against)) < len(against):
                raise ConfigError(f"{where} = {', '.join(against)}, expected each reference once")
        elif config.eval.root == DEMO:
            raise ConfigError(f"{where} = {TASKS}: the demo world draws its tasks apart, so no pool has their images")
        elif ends_at_selections:
            raise ConfigError(f"{where} = {TASKS}: no task is read with pool.download = false, expected references")
        inputs = {}
        for name in tasks if against == TASKS else against:
            pool_step = add_task_images(name) if against == TASKS else f"reference/{name}"
            inputs[reference_role(name, "pool")] = pool_step
            for column in stage.needs:
                owner = owner_of(column)
                if owner:
                    inputs[reference_role(name, f"column/{column}")] = add_stage(owner, pool_step)
                elif column not in (POOL_TYPES if against == TASKS else reference_types[name]):
                    raise ConfigError(f"{place}: stages.{alias} needs the column {column}, which {name} does not have")
        return inputs

    def add_task_images(task: str) -> str:
        """The pool of a task's images, which keep the names that they have there."""
        step_name, data = f"reference/task_{task}", tasks[task]
        assert data is not None  # a task of the demo world is refused before
        if not data.shards[0].endswith(".tar"):
            raise ConfigError(
                f"{place}: eval: task {task}: {data.path} is a plain folder, expected tars in CLIP_benchmark's layout "
                f"for a stage that is `against: {TASKS}`"
            )
        if step_name not in steps:
            path = storage.join(data.path, eval_tasks.SPLIT)
            carry = {ORIGINAL_FILE: "string", ORIGINAL_NAME: "string"}
            source = PoolConfig(source={"path": path, "layout": "clip_benchmark", "carry": carry})
            add(_read_step(step_name, source, f"{place}: eval: task {task}"))
        return step_name

    def add_named_model(name: str, role: str, where: str) -> tuple[Any, dict[str, str]]:
        """(what identifies the model, inputs): of one of the config's models that a step needs in this role."""
        if name not in config.models:
            hint = suggestion(name, config.models)
            raise ConfigError(f"{where} = {name}, expected one of the models.{hint}")
        model = config.models[name]
        inputs = {role: add_model(name, model)} if model.recipe is not None else {}
        if name not in used_models:
            used_models[name] = "input" if inputs else _published_model(model, f"{place}: models.{name}")
        return used_models[name], inputs

    def add_model(name: str, model: ModelConfig) -> str:
        step_name = f"model/{name}"
        if step_name in steps:
            return step_name
        _enter(visiting, f"models.{name}", place)
        trained = _recipe(recipes, model.recipe or "", f"{place}: models.{name}.recipe")
        source = add_train_set(f"{step_name}/", model.on or "")
        seed = model.seed or 0
        made = add_training(step_name, model.recipe or "", trained, Seeds(seed, seed), {"train_set": source})
        visiting.pop()
        return made

    def add_start(name: str, where: str) -> tuple[Any, dict[str, str], dict[str, Any] | None]:
        """(what identifies it, inputs, published weights) of the model that a recipe starts from; one of the two."""
        identity, inputs = add_named_model(name, "start", where)
        return identity, inputs, None if inputs else published_source(config.models[name])

    def add_training(name: str, recipe_name: str, trained: Recipe, seeds: Seeds, inputs: dict[str, str]) -> str:
        """The step of one training, after the model that it starts from."""
        identity, start = trained.identity(), None
        if trained.start_from is not None:
            where = f"{place}: recipe {recipe_name}: start_from"
            identity["start_from"], own_inputs, start = add_start(trained.start_from, where)
            _check_start(trained, config.models[trained.start_from], recipes, where)
            inputs = inputs | own_inputs
        values = {"recipe": identity, "seeds": seeds.to_json(), "ledger": ledger.VERSION}
        work = Training(trained, seeds, start)
        return add(Step(name, "checkpoint", recipe.VERSION, values, inputs, "train", work))

    def add_images(task: str, trained: Recipe) -> str:
        """The step that decodes a task's images once, as every model of this recipe sees them."""
        data, identity, inputs = tasks[task], trained.identity(), {} if tasks[task] else {"tasks": "tasks"}
        values = {"task": data.digest if data else task}
        values |= {key: identity.get(key) for key in ("model", "image_size_px")}
        start = None
        if trained.start_from is not None:
            where = f"{place}: train.recipe = {config.train.recipe}: start_from"
            values["start_from"], own_inputs, start = add_start(trained.start_from, where)
            inputs |= own_inputs
        work = TaskImages(task, trained, start)
        return add(Step(f"images/{task}", "task_images", eval_tasks.PIXELS_VERSION, values, inputs, "eval", work))

    def add_chosen(prefix: str, choice: str) -> tuple[str, str]:
        """(pool, selection): the steps that a strategy, or a whole reference, is; `prefix` names the selection."""
        reference = choice if choice in config.references else on_references.get(choice)
        pool_step = f"reference/{reference}" if reference else "pool"
        if not reference:
            return pool_step, add_choice(f"{prefix}selection", choice, f"{place}: strategies.{choice}")
        return pool_step, add_selection(f"{prefix}selection", EVERYTHING, "everything", {"pool": pool_step}, place)

    def add_train_set(prefix: str, choice: str) -> str:
        """The steps that turn a strategy, or a whole reference, into a train set; `prefix` names them."""
        pool_step, selection = add_chosen(prefix, choice)
        if pool_step in known_without_images:
            reference = pool_step.replace("reference/", "references.")
            raise ConfigError(f"{place}: {choice}: {reference}.download = false, expected images to train on")
        return add(
            Step(
                f"{prefix}train_set",
                "train_set",
                train_set.VERSION,
                {"seed": config.seed, "shard_size": TRAIN_SHARD_SIZE},
                {"pool": pool_step, "selection": selection},
                "train_set",
            )
        )

    def add_choice(step_name: str, strategy: str, where: str, pool_step: str = "pool") -> str:
        """The selection of a strategy over the pool, after the stages whose columns it uses.

        On `urls` it is from what tables and captions tell, before anything is downloaded.
        """
        inputs = {"pool": pool_step}
        for column in sorted(algebra.used_columns(parsed, strategy)):
            owner = owner_of(column)
            if owner:
                inputs[f"column/{column}"] = add_stage(owner, pool_step)
            else:
                check_known(column, pool_step, where)
        return add_selection(step_name, parsed, strategy, inputs, f"{place}: strategies", first=pool_step == "urls")

    def add_selection(
        step_name: str, chosen: Mapping[str, Any], name: str, inputs: dict[str, str], where: str, first: bool = False
    ) -> str:
        values: dict[str, Any] = {
            "strategy": algebra.definition(chosen, name),
            "files": [_file_digest(path, f"{where}: uids") for path in algebra.used_files(chosen, name)],
        }
        left_out = exclusion.NOTHING if first else exclude  # before a download a takedown is a row's status
        if left_out:
            values["exclude"] = left_out.identity()
        return add(Step(step_name, "selection", choose.VERSION, values, inputs, "select", (chosen, name, left_out)))

    def add_views(strategy: str) -> None:
        """The steps that only the report reads: samples around the strategy's cuts, and of what its choice is made."""
        selection = steps[f"{strategy}/selection"]
        inputs = {**selection.inputs, "selection": selection.name}
        shown, flag_inputs = flags(on_references.get(strategy))
        values = {**selection.values, **flag_values(shown)}
        work = (*selection.work, shown)
        name = f"{strategy}/gallery"
        add(Step(name, "gallery", gallery.VERSION, values, inputs | flag_inputs, "select", work))
        if config.shares and strategy not in on_references:  # a reference has no columns of the pool's stages
            made, lost = made_by(config.shares)
            warnings.extend(f"shares: {column} is N/A, as what it is made of is not there" for column in sorted(lost))
            inputs = {"pool": "pool", "selection": selection.name, **made}
            values = {"columns": sorted(set(config.shares) - lost)}
            add(Step(f"{strategy}/shares", "shares", shares.VERSION, values, inputs, "select"))

    def made_by(names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
        """({role: step} of those columns that stages add, those that are N/A)."""
        owners = {column: owner_of(column) for column in names}
        made = {column: add_stage(owner) for column, owner in owners.items() if owner}
        lost = {
            column for column, name in made.items() if any(steps[one].unavailable for one in ancestors(steps, [name]))
        }
        return {f"column/{column}": name for column, name in made.items() if column not in lost}, lost

    def flags(reference: str | None) -> tuple[tuple[algebra.Comparison, ...], dict[str, str]]:
        """The comparisons of `flagged` that can be judged over the pool or a reference, and their inputs."""
        names = {comparison.column for comparison in flagged}
        if reference:  # it has no columns of the pool's stages
            made, lost = {}, {name for name in names if owner_of(name) or name not in reference_types[reference]}
        else:
            made, lost = made_by(sorted(names))
            for name in sorted(names - lost):
                if owner_of(name) is None:
                    check_known(name, "pool", f"{place}: flagged")
        where = f"the reference {reference}" if reference else "the pool"
        warnings.extend(f"flagged: {where} has no {name}, so it blurs no picture of it" for name in sorted(lost))
        return tuple(comparison for comparison in flagged if comparison.column not in lost), made

    def add_profile() -> None:
        """The step that says what is in the pool: of all columns of its own and of its stages."""
        added = {
            column: kind for alias, stage in stages.items() for column, kind in stage_columns(alias, stage).items()
        }
        inputs, lost = made_by(added)
        groups = {}
        for alias, stage in stages.items():
            found = dict(zip(stage.adds, stage_columns(alias, stage), strict=True))
            if isinstance(stage, DuplicateStage) and lost.isdisjoint(found.values()):
                roles = ("group", "group_size", "survivor")
                own = {role: column for name, column in found.items() for role in roles if name.endswith(f"_{role}")}
                prefix = own["group"].removesuffix("_group")
                groups[prefix] = {"group": own["group"], "size": own["group_size"], "survivor": own["survivor"]}
        known = known_without_images.get("pool")
        own_columns = {column: kind for column, kind in own_types.items() if known is None or column in known}
        there = {column: kind for column, kind in added.items() if column not in lost and column not in empty}
        types = pool_profile.described(own_columns, there, groups)
        sides: dict[str, set[bool]] = {}
        for strategy in parsed:  # compared or not: one profile for all
            for column, keeps_low in strategy_cuts(strategy):
                sides.setdefault(column, set()).add(keeps_low)
        scores = {column for column, kind in there.items() if kind.startswith("float")} | set(sides)
        scores = {column for column in scores if types.get(column) in algebra.NUMERIC}
        shown, flag_inputs = flags(None)
        values = {"types": types, "scores": sorted(scores), "groups": groups, **flag_values(shown)}
        if exclude:
            values["exclude"] = exclude.identity()
        names = {*types, *(column for columns in groups.values() for column in columns.values())}
        inputs = {role: step for role, step in inputs.items() if role.removeprefix("column/") in names}
        low = tuple(sorted(column for column, found in sides.items() if found == {True}))
        work = Profiling(types, tuple(sorted(scores)), groups, exclude, shown, low)
        inputs = {"pool": "pool", **inputs, **flag_inputs}
        add(Step("profile", "profile", pool_profile.VERSION, values, inputs, "select", work))

    def strategy_cuts(name: str) -> Iterator[tuple[str, bool]]:
        """(column, whether its low end is kept) of each cut that the strategy, or a part of it, makes."""
        for part in algebra.used_strategies(parsed, name, sizes=False):
            for rule in parsed[part].rules:
                if isinstance(rule, algebra.Top):
                    yield rule.column, False
                elif isinstance(rule, algebra.Comparison) and rule.operator in ("<", "<=", ">", ">="):
                    yield rule.column, rule.operator in ("<", "<=")

    against_tasks = [alias for alias, stage in stages.items() if stage.uses_references and stage.against == TASKS]
    reads_tasks = not ends_at_selections and (until not in WITHOUT_TASKS or bool(against_tasks))
    tasks = _add_tasks(config, add, place, fetch_tasks) if reads_tasks else {}
    add_pool(read, config.pool, settings)
    reference_types: dict[str, set[str]] = {}  # of their own columns
    for name, reference in config.references.items():
        where = f"{place}: references.{name}"
        reference_read = _read_step(f"reference/{name}", reference, where)
        reference_types[name] = {*POOL_TYPES, *sources.carried_columns(reference_read.work)}
        reference_settings = _download_settings(reference_read, reference, where)
        if ends_at_selections and reference_settings:
            raise ConfigError(f"{where}.download: nothing is downloaded with pool.download = false, expected false")
        add_pool(reference_read, reference, reference_settings)
    for alias in stages:
        add_stage(alias)
    add_profile()

    shared = _recipe(recipes, config.train.recipe, f"{place}: train.recipe")
    if shared.start_from is not None:
        _check_seeds(config.train, f"{place}: train")
    by_budget = _budgets(shared, config.train.budgets, f"{place}: train.budgets")
    watched = {}
    if config.train.held_out is not None and not ends_at_selections:
        watched["held_out"] = f"reference/{config.train.held_out}"
        if watched["held_out"] in known_without_images:
            reference = f"references.{config.train.held_out}"
            raise ConfigError(f"{place}: train.held_out: {reference}.download = false, expected pairs with images")
    images = {task: add_images(task, shared) for task in tasks}
    for strategy in config.compare:
        if ends_at_selections:
            add_chosen(f"{strategy}/", strategy)
            add_views(strategy)
            continue
        source = add_train_set(f"{strategy}/", strategy)
        add_views(strategy)
        if watched and on_references.get(strategy) == config.train.held_out:
            warnings.append(
                f"train.held_out = {config.train.held_out}: {strategy} trains on it, so nothing is held out"
            )
        for samples_seen, trained in by_budget.items():
            for seed in config.train.seeds:
                prefix = training_prefix(by_budget, strategy, samples_seen, seed)
                inputs = {"train_set": source, **watched}
                seeds = _seeds(config.train, seed)
                checkpoint = add_training(f"{prefix}/train", config.train.recipe, trained, seeds, inputs)
                for task, data in tasks.items():
                    inputs = {"checkpoint": checkpoint, "images": images[task]} | ({} if data else {"tasks": "tasks"})
                    values = {"task": data.digest if data else task}
                    name = f"{prefix}/eval/{task}"
                    add(Step(name, "results", eval_tasks.METRIC_VERSION, values, inputs, "eval", task))
    if config.eval.leave_out is not None and config.eval.leave_out not in against_tasks:
        hint = suggestion(config.eval.leave_out, against_tasks)
        raise ConfigError(
            f"{place}: eval.leave_out = {config.eval.leave_out}, expected a stage that is `against: {TASKS}`.{hint}"
        )
    for name in config.models:
        if name not in used_models:
            raise ConfigError(f"{place}: models.{name} has no effect, expected a stage or a recipe that names it")
    _check_cluster(config, stages, place)
    at = {num: f" at samples_seen = {num}" if len(by_budget) > 1 else "" for num in by_budget}
    in_use = [] if ends_at_selections else [(config.train.recipe + at[num], by_budget[num]) for num in by_budget]
    in_use += [(model.recipe, recipes[model.recipe]) for model in config.models.values() if model.recipe]
    warnings += [f"recipe {name}: {warning}" for name, found in in_use for warning in recipe.check(found)]
    return Plan(config, steps, columns, by_budget, tasks, list(dict.fromkeys(warnings)), exclude)


def flag_values(flagged: Iterable[algebra.Comparison]) -> dict[str, Any]:
    """What identifies the comparisons of `flagged`, of a step that shows pictures; nothing where there are none."""
    found = [
        [one.column, one.operator, list(one.literal) if isinstance(one.literal, tuple) else one.literal]
        for one in flagged
    ]
    return {"flagged": found} if found else {}


def _read_step(name: str, config: PoolConfig, place: str) -> Step:
    """The step that reads a pool's sources: their pairs, or the rows of tables of URLs."""
    try:
        parsed = sources.parse(config.source, f"{place}.source")
        digests = {source_name: sources.source_digest(source) for source_name, source in parsed.items()}
    except (StoreError, OSError) as error:
        raise ConfigError(f"{place}.source: {one_line(error)}") from error
    values = {
        "sources": digests,
        "shard_size": config.shard_size,
        "sample": config.sample,
    }
    return Step(name, "pool", pool_shards.VERSION, values, {}, "pool", parsed)


def _download_settings(read: Step, config: PoolConfig, place: str) -> DownloadSettings | None:
    """How the pool's images are downloaded; None where its sources have them, or with `download: false`."""
    if next(iter(read.work.values())).layout != sources.URLS:
        for key in ("download", "only"):
            if getattr(config, key) is not None:
                raise ConfigError(f"{place}.{key} has no effect: the source is no table of URLs; leave it out")
        return None
    if config.download is False:
        if config.only is not None:
            raise ConfigError(f"{place}.only has no effect with download: false, expected it to be left out")
        return None
    settings: DownloadSettings = validate(DownloadSettings, config.download or {}, f"{place}.download")
    for reason in settings.retry if isinstance(settings.retry, list) else ():
        if reason not in FAILURES:
            hint = suggestion(reason, FAILURES)
            raise ConfigError(f"{place}.download.retry: {reason}, expected failed or classes of failures.{hint}")
    return settings


def _seeds(train: TrainConfig, seed: int) -> Seeds:
    """Of one training: its own, but for the parts that the config gives to all."""
    return Seeds(
        initialisation=seed if train.initialisation_seed is None else train.initialisation_seed,
        order=seed if train.order_seed is None else train.order_seed,
    )


def _check_seeds(train: TrainConfig, place: str) -> None:
    """None. Raises ConfigError for seeds that mean nothing where all trainings start from the same weights."""
    if train.initialisation_seed is not None:
        raise ConfigError(
            f"{place}.initialisation_seed has no effect where the recipe starts from a model, leave it out"
        )
    if train.order_seed is not None and len(train.seeds) > 1:
        raise ConfigError(
            f"{place}.seeds = {train.seeds}, expected one seed: from one model and with order_seed given all trainings"
            " would be the same"
        )


def _budgets(shared: Recipe, budgets: list[int], place: str) -> dict[int, Recipe]:
    """{samples seen: recipe} in increasing order: the recipe itself, or one for each budget that the config gives."""
    if not budgets:
        return {shared.samples_seen: shared}
    values = shared.model_dump()
    return {num: recipe.parse({**values, "samples_seen": num}, f"{place}: {num}") for num in sorted(budgets)}


def _check_start(trained: Recipe, model: ModelConfig, recipes: Mapping[str, Recipe], place: str) -> None:
    """None. Raises ConfigError where the model to start from has other weights, as far as the config tells."""
    keys = ("model", "image_size_px", "loss")
    if model.recipe is not None:
        other = {key: getattr(recipes[model.recipe], key) for key in keys}
    else:
        other = {"model": model.architecture}
        if known := clip_model.known_config(model.architecture or ""):
            other["loss"] = "siglip" if "init_logit_bias" in known else "clip"
            if trained.image_size_px is not None:
                other["image_size_px"] = known["vision_cfg"].get("image_size")
    for key, value in other.items():
        if value != getattr(trained, key):
            texts = [one if isinstance(one, str | int) else "another one" for one in (value, getattr(trained, key))]
            raise ConfigError(f"{place} = {trained.start_from}, whose {key} is {texts[0]}, expected {texts[1]}")


def _recipes(config: Config, place: str) -> dict[str, Recipe]:
    own = {name: recipe.parse(values, f"{place}: recipes.{name}") for name, values in config.recipes.items()}
    return {**recipe.RECIPES, **own}


def _recipe(recipes: Mapping[str, Recipe], name: str, place: str) -> Recipe:
    if name not in recipes:
        raise ConfigError(f"{place} = {name}, expected a recipe.{suggestion(name, recipes)}")
    clip_model.check_architecture(recipes[name].model, f"recipe {name}: model")
    return recipes[name]


def _stages(config: Config, place: str) -> tuple[dict[str, Stage], dict[str, str]]:
    """({alias: stage} in the config's order, {alias: the strategy that it works within} of those that do)."""
    found: dict[str, Stage] = {}
    limits: dict[str, str] = {}
    for index, entry in enumerate(config.stages):
        where = f"{place}: stages.{index}"
        fields = {"name": entry} if isinstance(entry, str) else dict(entry)
        name = fields.pop("name", None)
        alias = fields.pop("as", name)
        if not isinstance(name, str):
            raise ConfigError(f"{where}.name = {name}, expected the name of a stage")
        if not isinstance(alias, str) or not NAME.match(alias) or alias in (*RESERVED, *STEPS_OF_CLUSTER):
            raise ConfigError(f"{where}.as = {alias}, expected a name of a-z, 0-9, _ that is no other step's")
        if alias in found:
            raise ConfigError(f"{where}: a second stage is called {alias}; give it another name with `as:`")
        if "within" in fields:
            limits[alias] = str(fields.pop("within"))
        stage = build_stage(name, fields, where)
        if alias in limits and not stage.may_work_within:
            raise ConfigError(f"{place}: stages.{alias}.within: it is about the whole pool, expected no within")
        try:
            given = {parameter.split(".")[0] for parameter in stage.external_files()}
        except ConfigError as error:
            raise ConfigError(f"{place}: {error}") from error
        paths = {parameter: getattr(stage, parameter) for parameter in given}
        found[alias] = replace(stage, **{parameter: _absolute(value) for parameter, value in paths.items() if value})
    return found, limits


def _absolute(paths: Any) -> Any:
    """The path, or the list or mapping of paths, made absolute."""
    if isinstance(paths, Mapping):
        return {key: storage.absolute(path) for key, path in paths.items()}
    return storage.absolute(paths) if isinstance(paths, str) else tuple(map(storage.absolute, paths))


def _external_digests(stage: Stage, place: str) -> dict[str, Any]:
    """{parameter: digest of its file, or {key: digest} of its files}: what identifies them, wherever they are."""
    found: dict[str, Any] = {}
    for parameter, path in stage.external_files().items():
        name, several, key = parameter.partition(".")
        digest = _file_digest(path, f"{place}.{parameter}")
        if several:
            found.setdefault(name, {})[key] = digest
        else:
            found[name] = digest
    return found


def _fields(stage: Stage) -> dict[str, Any]:
    return {field.name: getattr(stage, field.name) for field in fields(stage)}


def _weights_path(pretrained: str) -> str:
    """A weights file's absolute path, or the tag as it is."""
    return storage.absolute(pretrained) if storage.is_url(pretrained) or storage.exists(pretrained) else pretrained


def published_source(model: ModelConfig) -> dict[str, Any]:
    """What pipeline.core.clip_model.load takes, of a model with published weights."""
    return {"architecture": model.architecture, "pretrained": _weights_path(model.pretrained or "")}


def _published_model(model: ModelConfig, place: str) -> dict[str, Any]:
    architecture = model.architecture
    assert architecture is not None  # config checks that a model has one or a recipe
    clip_model.check_architecture(architecture, f"{place}.architecture")
    pretrained = model.pretrained or ""
    if storage.is_url(pretrained) or storage.exists(pretrained):
        return {"architecture": architecture, "weights": _file_digest(pretrained, f"{place}.pretrained")}
    clip_model.check_tag(architecture, pretrained, f"{place}.pretrained")
    return {"architecture": architecture, "pretrained": pretrained}


def _reference_strategies(config: Config, definitions: Mapping[str, Any], place: str) -> dict[str, str]:
    """{strategy: reference} of strategies that train on a whole reference: `trusted_only: {reference: trusted}`."""
    found = {}
    for name, definition in definitions.items():
        if "reference" not in definition:
            continue
        where = f"{place}: strategies.{name}"
        if len(definition) > 1:
            raise ConfigError(f"{where}: reference stands alone, expected no other key beside it")
        reference = definition["reference"]
        if not isinstance(reference, str) or reference not in config.references:
            hint = suggestion(str(reference), config.references)
            raise ConfigError(f"{where}.reference = {reference}, expected one of the references.{hint}")
        found[name] = reference
    return found


def _check_shares(config: Config, types: Mapping[str, str], place: str) -> None:
    """None. Raises ConfigError for a column of `shares` that is not there, or not of a type of few values."""
    for index, column in enumerate(config.shares):
        if column not in types:
            raise ConfigError(f"{place}: shares.{index} = {column}, expected a column.{suggestion(column, types)}")
        if types[column] not in shares.TYPES:
            expected = " or ".join(shares.TYPES)
            raise ConfigError(f"{place}: shares.{index} = {column} of type {types[column]}, expected {expected}")
    if len(set(config.shares)) < len(config.shares):
        raise ConfigError(f"{place}: shares = {', '.join(config.shares)}, expected each column once")


def _add_tasks(
    config: Config, add: Callable[[Step], str], place: str, fetch: bool
) -> dict[str, eval_tasks.TaskData | None]:
    """{name: task} in the config's order; adds the step that draws the demo world's own tasks."""
    if config.eval.root != DEMO:
        try:
            found = eval_tasks.resolve_tasks(config.eval.tasks, config.eval.root, f"{place}: eval", download=fetch)
            return {data.name: replace(data, digest=eval_tasks.task_digest(data)) for data in found}
        except StoreError as error:
            raise ConfigError(f"{place}: eval.tasks: {error}") from error
        except WinnowError:
            raise
        except Exception as error:  # the hub has error classes of its own; all mean the same to the user
            raise ConfigError(f"{place}: eval.tasks can't be read: {one_line(error)}") from error
    add(Step("tasks", "tasks", demo_world.VERSION, {"seed": config.seed}, {}, "pool"))
    for index, entry in enumerate(config.eval.tasks):
        if not isinstance(entry, str) or entry not in demo_world.TASKS:
            hint = suggestion(str(entry), demo_world.TASKS)
            raise ConfigError(f"{place}: eval.tasks.{index} = {entry}, expected a task of the demo world.{hint}")
    if len(set(config.eval.tasks)) != len(config.eval.tasks):
        raise ConfigError(f"{place}: eval.tasks = {config.eval.tasks}, expected each task once")
    return dict.fromkeys(map(str, config.eval.tasks))


# Which settings of `cluster:` mean something for which step; cpus, gpus, memory_gb and labels do for all.
STEPS_OF_CLUSTER = ("pool", "download", "select", "train_set", "train", "eval")
WORKERS_OF = ("pool", "download", "train_set", "train", "eval")
BATCH_SIZE_OF = ("train", "eval")
MIN_WORKERS_OF = ("train",)
MAX_CONCURRENT_OF = ("train",)


def _check_cluster(config: Config, stages: Mapping[str, Stage], place: str) -> None:
    names = {*STEPS_OF_CLUSTER, *stages}
    for name, resources in config.cluster.items():
        if name not in names:
            raise ConfigError(f"{place}: cluster.{name} is no step.{suggestion(name, names)}")
        for setting, steps in (
            ("workers", (*WORKERS_OF, *stages)),
            ("batch_size", (*BATCH_SIZE_OF, *stages)),
            ("min_workers", MIN_WORKERS_OF),
            ("max_concurrent", MAX_CONCURRENT_OF),
        ):
            if getattr(resources, setting) is not None and name not in steps:
                raise ConfigError(f"{place}: cluster.{name}.{setting} has no effect, expected it to be left out")
    train = config.resources("train")
    num_workers = train.workers or 1
    if train.min_workers is not None and train.min_workers >= num_workers:
        raise ConfigError(
            f"{place}: cluster.train.min_workers = {train.min_workers}, expected fewer than its workers ({num_workers})"
        )
    if num_workers > 1 and train.gpus not in (0, 1):
        raise ConfigError(f"{place}: cluster.train.gpus = {train.gpus:g}, expected 0 or 1 for each of several workers")


def _file_digest(path: str, place: str) -> str:
    """The sha256 of a file that the config names. Raises ConfigError when it can't be read."""
    try:
        return storage.sha256_file(path)
    except Exception as error:  # each store has error classes of its own; all mean the same to the user
        raise ConfigError(f"{place} = {path}, expected a file that can be read: {one_line(error)}") from error


def _enter(visiting: list[str], name: str, place: str) -> None:
    if name in visiting:
        raise ConfigError(f"{place}: {' -> '.join([*visiting, name])}: a cycle, expected none")
    visiting.append(name)


def targets(plan: Plan, until: str | None) -> list[str]:
    """The steps to reach: all of them, or those called `until` or whose path holds it (`clip`, `train`, `basic`).

    `stages` is a word for all stages of the config, and for the profile of the pool with their columns.

    Raises:
        ConfigError: no such step.
    """
    if until is None:
        return list(plan.steps)
    if until == STAGES:
        return [name for name, step in plan.steps.items() if isinstance(step.work, Stage) and "/" not in name] + [
            "profile"
        ]
    words = until.strip("/").split("/")
    found = [name for name in plan.steps if _holds(name.split("/"), words)]
    if not found:
        parts = {part for name in plan.steps for part in name.split("/")}
        raise ConfigError(f"--until {until}: no such step.{suggestion(until, parts)}")
    return found


def _holds(path: list[str], words: list[str]) -> bool:
    return any(path[start : start + len(words)] == words for start in range(len(path) - len(words) + 1))
