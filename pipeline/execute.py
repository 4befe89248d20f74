"""Runs a plan: every ready step whose resources fit, together; finished ones are skipped; failures stay local.

The driver only submits and waits. A step that fails leaves the others running; what depends on it is not done, and
its row in the leaderboard is N/A. What runs remotely: remote.py and the stages; what is seen of it: watch.py; the run's
folder: runs.py.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import functools
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pipeline import plan as planning
from pipeline import preflight, remote, runs, states, summary, watch
from pipeline.core import artifact, log, pool, storage
from pipeline.core.config import Resources
from pipeline.core.engine import Engine, post
from pipeline.core.errors import StepError, WinnowError, one_line
from pipeline.core.passes import Passes, timed
from pipeline.core.training_metrics import METRICS_FILE
from pipeline.runs import Outcome
from pipeline.states import Status
from pipeline.steps import Plan, Profiling, Step, TaskImages, Training, reference_role, references_of
from stages.base import Stage
from stages.column_files import Column
from stages.ingest import demo_world, download, pool_shards, sources
from stages.ingest.fetch.settings import DownloadSettings
from stages.selection import choose, gallery, pool_profile, shares, train_set
from stages.stage_worker import Reference, StageJob, StageWorker, fit, fit_path

POLL_S = 0.25


class Executor:
    """Runs the steps of one plan on one engine."""

    def __init__(self, plan: Plan, engine: Engine, progress: log.Progress, run_path: str):
        self.plan = plan
        self.engine = engine
        self.progress = progress
        self.run_path = run_path
        self.versions = runs.package_versions()
        self.stopped = threading.Event()
        self.interrupted: list[str] = []  # folders that were being written when the run was stopped
        self.made: set[str] = set()  # the steps that were finished here
        self._whole: set[str] = set()  # those whose files were found to be there
        self._watch = watch.Watch(engine, progress, run_path, plan.config.train.log_to)

    def run(self, targets: Sequence[str], outcome: Outcome) -> Outcome:
        """The outcome after every step that `targets` need is done, failed, or waits for a failed one."""
        wanted = self.plan.ancestors(list(targets))
        for name in wanted:
            if self.plan.steps[name].unavailable:
                outcome.failures[name] = self.plan.steps[name].unavailable
        running: dict[concurrent.futures.Future, list[str]] = {}
        runs.write_plan(self.run_path, outcome)
        self._watch.start()
        with concurrent.futures.ThreadPoolExecutor(max_workers=256, thread_name_prefix="step") as threads:
            try:
                while True:
                    busy = {outcome.statuses[name].artifact.path for names in running.values() for name in names}  # type: ignore[union-attr]
                    ready = self._ready(wanted, outcome, running, busy)
                    for names in self._grouped(ready, running):
                        running[threads.submit(self._run_group, names, dict(outcome.statuses))] = names
                    if not running:
                        return outcome
                    done, _ = concurrent.futures.wait(running, timeout=POLL_S, return_when="FIRST_COMPLETED")
                    for future in done:
                        outcome.failures |= future.result()
                        del running[future]
                    if done:
                        outcome.statuses = states.resolve(self.plan, outcome.statuses)
                        runs.write_plan(self.run_path, outcome)
            except BaseException:
                self.interrupted = [_path(outcome.statuses, name) for names in running.values() for name in names]
                self.stopped.set()
                self.engine.cancel()
                raise
            finally:
                self._watch.stop()

    def _ready(
        self, wanted: list[str], outcome: Outcome, running: Mapping[Any, list[str]], busy: set[str]
    ) -> list[str]:
        occupied = {name for names in running.values() for name in names}
        ready, paths = [], set(busy)
        for name in wanted:
            status = outcome.statuses[name]
            if status.state != "todo" or name in occupied or name in outcome.failures:
                continue
            path = status.artifact.path  # type: ignore[union-attr]  # a todo step has one
            if path not in paths:  # two names for one artifact: it is made once
                paths.add(path)
                ready.append(name)
        return ready

    def _grouped(self, ready: list[str], running: Mapping[Any, list[str]]) -> list[list[str]]:
        """Stages of the same resources read each shard once; the tasks of one checkpoint load its model once."""
        groups: dict[Any, list[str]] = {}
        dealt: dict[Any, int] = {}  # the tasks of a checkpoint, over so many workers as the config gives to `eval`
        trainings = sum(self.plan.steps[names[0]].kind == "checkpoint" for names in running.values())
        most = self.plan.config.resources("train").max_concurrent
        for name in ready:
            step = self.plan.steps[name]
            key: Any = name
            if isinstance(step.work, Stage) and not step.work.whole_pool:
                key = ("stages", step.inputs["pool"], step.inputs.get("within"), repr(self._resources(step)))
            elif step.kind == "results":
                key = ("results", step.inputs["checkpoint"])
                dealt[key] = dealt.get(key, -1) + 1
                key = (*key, dealt[key] % (self._resources(step).workers or 1))
            elif step.kind == "checkpoint":
                if most is not None and trainings >= most:
                    continue
                trainings += 1
            groups.setdefault(key, []).append(name)
        return list(groups.values())

    def _label(self, names: list[str]) -> str:
        """What steps that are done together are called: stages by all of their names, tasks by their checkpoint's."""
        if len(names) == 1:
            return names[0]
        first = self.plan.steps[names[0]]
        if first.kind != "results":
            return "+".join(names)
        is_part = (self._resources(first).workers or 1) > 1  # each worker has some of the tasks
        return f"{names[0]}..." if is_part else names[0].rsplit("/", 1)[0]

    def _resources(self, step: Step) -> Resources:
        return self.plan.config.resources(step.resources)

    def _run_group(self, names: list[str], statuses: dict[str, Status]) -> dict[str, str]:
        """{step: cause} of the steps in the group that failed; a step is complete when its record is written."""
        steps = [self.plan.steps[name] for name in names]
        label = self._label(names)
        started = time.monotonic()
        try:
            self._check_inputs(steps, statuses)
            self._check_disk(steps[0], statuses)
            if isinstance(steps[0].work, Stage):
                failed = self._run_stages(label, steps, statuses)
            elif steps[0].kind == "results":
                failed = self._run_results(label, steps, statuses)
            else:
                facts, notes = self._runners()[steps[0].kind](label, steps[0], statuses)
                self._finish(steps[0], statuses, facts, started, **notes)
                failed = {}
        except Exception as error:  # the step boundary: recorded, and the other steps go on
            for line in [f"{label}/fit", *([label] if len(steps) > 1 else [])]:
                self.progress.drop(line)
            if len(steps) > 1 and not self.stopped.is_set():  # one of them is at fault: each for itself
                return {step: cause for name in names for step, cause in self._run_group([name], statuses).items()}
            # Of a step's items it is told what they raised; every other error of ours says all in its line.
            bug = error.__cause__ if isinstance(error, StepError) else error
            if bug is not None and not isinstance(bug, WinnowError):
                trace = getattr(bug, "remote_traceback", None) or "".join(traceback.format_exception(bug))
                self.progress.event("traceback", step=label, text=trace)
                if not self.stopped.is_set():
                    self.progress.say(trace.rstrip())
            failed = dict.fromkeys(names, one_line(error))
        for name, cause in failed.items():
            if not self.stopped.is_set():
                self.progress.end(name, f"FAILED: {cause}")
        return failed

    def _runners(self) -> Mapping[str, Callable[[str, Step, dict[str, Status]], tuple[dict, dict]]]:
        return {
            "urls": self._run_pool,
            "pool": self._run_pool,
            "tasks": self._run_tasks,
            "selection": self._run_selection,
            "gallery": self._run_gallery,
            "shares": self._run_shares,
            "profile": self._run_profile,
            "train_set": self._run_train_set,
            "checkpoint": self._run_training,
            "task_images": self._run_task_images,
        }

    def _finish(
        self, step: Step, statuses: Mapping[str, Status], facts: Mapping[str, Any], started: float, **notes: Any
    ) -> None:
        made = statuses[step.name].artifact
        assert made is not None  # only steps that are todo get here
        common = {"seconds": round(time.monotonic() - started, 3), **self.versions}
        artifact.finish(made, {**facts, **common}, **notes)
        self.made.add(step.name)

    def _one(self, label: str, function: Callable, arguments: tuple, step: Step) -> Any:
        return self.engine.map(function, [arguments], [label], self._resources(step))[0]

    # One method per kind of step. Those of single steps return (facts, further arguments of artifact.finish).

    def _run_pool(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        if isinstance(step.work, DownloadSettings):
            return self._run_download(label, step, statuses)
        out_path = _path(statuses, step.name)
        shard_size, sample = step.values["shard_size"], step.values["sample"]
        resources = self._resources(step)
        units = self._one(f"{label}/units", sources.plan_units, (step.work, shard_size), step)
        self.engine.map(
            pool_shards.read_ids,
            [(unit, number, out_path) for number, unit in enumerate(units)],
            [f"{label}/ids/{number:05d}" for number in range(len(units))],
            resources,
        )
        columns = sources.carried_columns(step.work)
        plan = self._one(f"{label}/plan", pool_shards.plan_shards, (units, shard_size, sample, columns, out_path), step)
        self.progress.start(label, len(plan.shards))
        shards = self.engine.map(
            pool_shards.write_shard,
            [(shard, out_path) for shard in plan.shards],
            [f"{label}/{shard.name}" for shard in plan.shards],
            resources,
            lambda index, done: self.progress.advance(label, 1, done["rows"], done["failed"]),
        )
        facts = pool_shards.pool_facts(plan.source_rows, plan.sampled_out_rows, shards) | {"columns": columns}
        pool_shards.forget_ids(out_path)
        notes = {
            f"{shard.name}.parquet": {"rows": done["rows"]} for shard, done in zip(plan.shards, shards, strict=True)
        }
        known = {name: entry for done in shards for name, entry in done["known"].items()}
        self.progress.end(label, _counts(facts["rows"], facts["failed"]))
        return facts, {"file_notes": notes, "known": known}

    def _run_download(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        out_path, record = _path(statuses, step.name), statuses[step.inputs["urls"]].record or {}
        artifact.reopen(out_path)  # where rows are fetched again, it is unfinished until all shards agree
        shards = pool.shards(record)
        nodes = self.engine.cpus_of_nodes() or [1]  # a cluster may start from nothing
        resources = self._resources(step)
        workers = min(resources.workers or len(nodes), -(-len(shards) // download.SHARDS_AT_ONCE))
        cpus = resources.cpus if "cpus" in resources.model_fields_set else max(1, int(nodes[0]))
        resources = resources.model_copy(update={"workers": max(1, workers), "cpus": cpus})
        job = download.DownloadJob(
            _path(statuses, step.inputs["urls"]),
            out_path,
            step.work,
            record["facts"]["columns"],
            resources.workers,
            _path(statuses, step.inputs["selection"]) if "selection" in step.inputs else None,
            self.plan.exclude,
        )
        self.progress.start(label, sum(shard.rows for shard in shards), "rows")
        with self._watch.download(label):
            done = self.engine.map_on_actors(
                download.DownloadWorker,
                (job, _threads(resources), functools.partial(remote.post_download, self.engine.board(), label)),
                [(shard,) for shard in shards],
                [f"{label}/{shard.name}" for shard in shards],
                resources,
                lambda index, facts: self.progress.advance(label, facts["kept_rows"]),
                items_at_once=download.SHARDS_AT_ONCE,
            )
        facts = pool_shards.pool_facts(record["facts"]["rows"], 0, done)
        facts |= {
            "bytes": sum(shard["bytes"] for shard in done),
            "retried_by": self.plan.run_id if step.work.retry else "",
        }
        facts["failures_by_host"] = download.worst_hosts(shard["hosts"] for shard in done)
        self.progress.end(label, _counts(facts["rows"], facts["failed"]))
        for entry in facts["failures_by_host"][:5]:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in entry["reasons"].items())
            self.progress.say(f"{label}  {entry['host']}: {entry['failed']:,} failed ({reasons})")
        names = [(shard.name, facts_of) for shard, facts_of in zip(shards, done, strict=True)]
        return facts, {
            "file_notes": {f"{name}.parquet": {"rows": shard["rows"]} for name, shard in names},
            "known": {name: entry for shard in done for name, entry in shard["known"].items()},
            "fact_files": [f"{name}_stats.json" for name, _ in names],
        }

    def _run_tasks(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        names = self._one(label, demo_world.write_tasks, (_path(statuses, step.name), step.values["seed"]), step)
        self.progress.end(label, f"{len(names)} tasks")
        return {"tasks": list(names)}, {}

    def _run_stages(self, label: str, steps: list[Step], statuses: Mapping[str, Status]) -> dict[str, str]:
        started = time.monotonic()
        first = steps[0]
        resources = self._resources(first)
        pool_path = _path(statuses, first.inputs["pool"])
        shards = pool.shards(statuses[first.inputs["pool"]].record or {})
        todo = {
            shard.name: shard
            for step in steps
            for shard in states.stale_shards(step, statuses[step.name].record, statuses)
        }
        jobs = [
            StageJob(
                step.work,
                _path(statuses, step.name),
                self._columns(step, statuses),
                self._model(step, statuses),
                resources.batch_size,
                self._references(step, statuses),
                _path(statuses, step.inputs["within"]) if "within" in step.inputs else None,
            )
            for step in steps
        ]
        seconds = dict.fromkeys((job.out_path for job in jobs), 0.0)
        fit_facts: dict[str, Any] = {}
        if jobs[0].stage.whole_pool:  # which is in a group of its own
            self.progress.start(f"{label}/fit", 0, "passes")
            spent_s: list[float] = []
            passes = self._passes(f"{label}/fit", fit_path(jobs[0]) or "", resources, spent_s)
            fit_facts = dict(fit(pool_path, jobs[0], shards, passes))
            seconds[jobs[0].out_path] += sum(spent_s)
            self.progress.end(f"{label}/fit")
        self.progress.start(label, len(todo))
        known: dict[str, dict] = {job.out_path: {} for job in jobs}
        rows = {shard.name: shard.rows for shard in shards}
        names = list(todo)

        def on_done(index: int, done: Mapping[str, Any]) -> None:
            for out_path, spent in done["seconds"].items():
                seconds[out_path] += spent
            for out_path, files in done["known"].items():
                known[out_path] |= files
            rows[names[index]] = done["rows"]
            self.progress.advance(label, 1, done["rows"])

        self.engine.map_on_actors(
            StageWorker,
            (pool_path, jobs, _device(resources), _threads(resources)),
            [(shard,) for shard in todo.values()],
            [f"{label}/{name}" for name in names],
            resources,
            on_done,
        )
        notes = {f"{shard.name}.parquet": {"pool_shard": shard.digest} for shard in shards}
        for step, job in zip(steps, jobs, strict=True):
            hours = seconds[job.out_path] / 3600  # in the stage itself; reading and decoding is shared
            facts = {"rows": sum(rows.values()), "device": _device(resources)}
            facts |= {"cpu_hours": hours * resources.cpus, "gpu_hours": hours * resources.gpus}
            facts = fit_facts | facts  # a fit may count other rows
            self._finish(step, statuses, facts, started, file_notes=notes, known=known[job.out_path])
        self.progress.end(label)
        return {}

    def _passes(self, label: str, folder: str, resources: Resources, spent_s: list[float]) -> Passes:
        """Passes over the whole pool, each item a task with these resources, whose seconds are put into `spent_s`."""

        def run(function: Callable, items: Sequence[tuple], names: Sequence[str], on_done: Callable) -> None:
            def done(index: int, found: tuple[float, Any]) -> None:
                spent_s.append(found[0])
                on_done(index, found[1])

            timed_items = [(function, *item) for item in items]
            self.engine.map(timed, timed_items, [f"{label}/{name}" for name in names], resources, done)

        return Passes(
            run,
            folder,
            lambda name, done, total: self.progress.advance(label, note=f"{name} {done}/{total}"),
        )

    def _columns(self, step: Step, statuses: Mapping[str, Status], prefix: str = "column/") -> dict[str, Column]:
        """{name in the config: where it is stored} of the stages' columns that a step reads in roles of the prefix."""
        names = {role.removeprefix(prefix): owner for role, owner in step.inputs.items() if role.startswith(prefix)}
        return {name: Column(_path(statuses, owner), self.plan.columns[name][1]) for name, owner in names.items()}

    def _references(self, step: Step, statuses: Mapping[str, Status]) -> dict[str, Reference]:
        """{name: pool and columns} of what a stage compares the pool with."""
        found = {}
        for name in references_of(step):
            source = step.inputs[reference_role(name, "pool")]
            columns = self._columns(step, statuses, reference_role(name, "column/"))
            found[name] = Reference(_path(statuses, source), pool.shards(statuses[source].record or {}), columns)
        return found

    def _model(self, step: Step, statuses: Mapping[str, Status]) -> Mapping[str, Any] | None:
        """What pipeline.core.clip_model.load takes, for a stage that names a model."""
        if not step.work.uses_model:
            return None
        if "model" in step.inputs:
            return {"folder": storage.join(_path(statuses, step.inputs["model"]), "open_clip")}
        return planning.published_source(self.plan.config.models[step.work.model])

    def _start(self, step: Step, statuses: Mapping[str, Status]) -> Mapping[str, Any] | None:
        """What pipeline.core.clip_model.load takes, of the model that a step's recipe starts from."""
        if "start" in step.inputs:
            return {"folder": storage.join(_path(statuses, step.inputs["start"]), "open_clip")}
        return step.work.start

    def _choice(self, step: Step, statuses: Mapping[str, Status]) -> tuple:
        """The arguments of choose.select, of a step that chooses or that looks at a choice."""
        chosen, name, exclude, *flagged = step.work
        columns = self._columns(step, statuses)
        return (
            _path(statuses, step.inputs["pool"]),
            columns,
            chosen,
            name,
            _path(statuses, step.name),
            exclude,
            *flagged,
        )

    def _run_selection(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        self.progress.start(label, 1, "steps")
        facts = self._one(label, choose.select, self._choice(step, statuses), step)
        self.progress.end(label, f"kept {facts['kept_rows']:,} of {facts['pool_rows']:,}")
        return facts, {}

    def _run_gallery(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        facts = self._one(label, gallery.write_gallery, self._choice(step, statuses), step)
        self.progress.end(label, f"{facts['samples']} samples")
        return facts, {}

    def _run_profile(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        work: Profiling = step.work
        arguments = (_path(statuses, step.inputs["pool"]), self._columns(step, statuses), work.types, work.scores)
        arguments += (work.groups, _path(statuses, step.name), work.exclude, work.flagged)
        self.progress.start(label, 1, "steps")
        facts = self._one(label, pool_profile.write_profile, arguments, step)
        self.progress.end(label, f"{facts['columns']} columns")
        return facts, {}

    def _run_shares(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        pool_path, selection_path = (_path(statuses, step.inputs[role]) for role in ("pool", "selection"))
        columns, names = self._columns(step, statuses), step.values["columns"]
        arguments = (pool_path, selection_path, columns, names, _path(statuses, step.name))
        facts = self._one(label, shares.write_shares, arguments, step)
        self.progress.end(label)
        return facts, {}

    def _run_train_set(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        pool_path, selection_path = (_path(statuses, step.inputs[role]) for role in ("pool", "selection"))
        out_path = _path(statuses, step.name)
        seed, shard_size = step.values["seed"], step.values["shard_size"]
        plan = self._one(
            f"{label}/plan", train_set.plan_train_set, (pool_path, selection_path, out_path, seed, shard_size), step
        )
        self.progress.start(label, plan["num_tars"], "tars")
        self.engine.map(
            train_set.write_train_tar,
            [(pool_path, out_path, index, shard_size) for index in range(plan["num_tars"])],
            [f"{label}/{index:05d}" for index in range(plan["num_tars"])],
            self._resources(step),
            lambda index, done: self.progress.advance(label, 1, done["samples"]),
        )
        facts = self._one(f"{label}/finish", train_set.finish_train_set, (out_path, plan["num_tars"]), step)
        known = facts.pop("known")
        self.progress.end(label)
        return facts, {"known": known}

    def _run_training(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        work: Training = step.work
        resources = self._resources(step)
        source, out_path = _path(statuses, step.inputs["train_set"]), _path(statuses, step.name)
        options = {
            "batch_size": resources.batch_size,
            "start": self._start(step, statuses),
            "held_out_path": _path(statuses, step.inputs["held_out"]) if "held_out" in step.inputs else None,
            "checkpoint_every_s": self.plan.config.train.checkpoint_every_s,
        }
        arguments = (source, out_path, work.recipe, work.seeds)
        report = functools.partial(post, self.engine.board(), label)
        settings = {**step.values, "train_set": storage.name_of(source)}
        with self._watch.training(label, work.recipe.samples_seen, out_path, settings):
            if (resources.workers or 1) > 1:
                arguments = (*arguments, resources, report, options)
                workers = resources, resources.num_together
                (facts,) = self.engine.map(
                    remote.train_on_several, [arguments], [label], Resources(cpus=0), waits_for=workers
                )
                self.engine.spend(facts["cpu_hours"], facts["gpu_hours"])
            else:
                arguments = (*arguments, _device(resources), _threads(resources), report, options)
                facts = self._one(label, remote.train_one, arguments, step)
        self.progress.end(label)
        return facts, {"fact_files": [METRICS_FILE]}

    def _run_task_images(self, label: str, step: Step, statuses: Mapping[str, Status]) -> tuple[dict, dict]:
        work: TaskImages = step.work
        resources = self._resources(step).model_copy(update={"gpus": 0.0, "workers": None})
        data, out_path = runs.task_data(self.plan, work.task, statuses), _path(statuses, step.name)
        arguments = (work.recipe.model, work.recipe.image_size_px, self._start(step, statuses))
        (preprocess,) = self.engine.map(remote.preprocess_of, [arguments], [f"{label}/preprocess"], resources)
        size = preprocess["size"]
        height_px, width_px = (size, size) if isinstance(size, int) else size
        # of one's own task nobody says how many images there are before its tars are read
        self._check_room(step, statuses, 3 * height_px * width_px * (data.task.images or 0))
        shards = data.shards + data.train_shards
        self.progress.start(label, len(shards), "tars")
        done = self.engine.map(
            remote.store_pixels,
            [(data, shard, preprocess, out_path, _threads(resources)) for shard in shards],
            [f"{label}/{shard}" for shard in shards],
            resources,
            lambda index, stored: self.progress.advance(label, 1, stored["images"]),
        )
        facts = {key: sum(stored[key] for stored in done) for key in ("images", "bytes")}
        self.progress.end(label, f"{facts['images']:,} images")
        return facts, {}

    def _run_results(self, label: str, steps: list[Step], statuses: Mapping[str, Status]) -> dict[str, str]:
        started = time.monotonic()
        resources = self._resources(steps[0])
        checkpoint = statuses[steps[0].inputs["checkpoint"]].artifact
        assert checkpoint is not None  # a ready step's inputs are done
        tasks = [runs.task_data(self.plan, step.work, statuses) for step in steps]
        architecture = self.plan.recipe.model
        arguments = (
            {"folder": storage.join(checkpoint.path, "open_clip")},
            architecture if isinstance(architecture, str) else "custom",
            checkpoint.name,
            tasks,
            [_path(statuses, step.inputs["images"]) for step in steps],
            [_path(statuses, step.name) for step in steps],
            _device(resources),
            resources.batch_size,
            _threads(resources),
        )
        self.progress.start(label, len(tasks), "tasks")
        failed = {}
        for step, (facts, error) in zip(steps, self._one(label, remote.evaluate_all, arguments, steps[0]), strict=True):
            if error is None:
                self._finish(step, statuses, facts | {"device": _device(resources)}, started)
            else:
                failed[step.name] = error
        self.progress.end(label)
        return failed

    def _check_inputs(self, steps: Sequence[Step], statuses: Mapping[str, Status]) -> None:
        """None. Raises WinnowError when files of what the steps read were lost or cut since; looks once a run."""
        for name in {name for step in steps for name in step.inputs.values()} - self._whole:
            artifact.check_sizes(_path(statuses, name), statuses[name].record or {"files": {}})
            self._whole.add(name)

    def _check_disk(self, step: Step, statuses: Mapping[str, Status]) -> None:
        """None. Raises StepError when the step would write more than there is room for."""
        if storage.free_bytes(self.plan.config.root) is None:
            return
        if step.kind == "pool" and not isinstance(step.work, DownloadSettings):
            real = [source for source in step.work.values() if source.layout != sources.DEMO]
            sizes = sum(entry.size_bytes for source in real for entry in sources.find(source).files.values())
            needed = int(sizes * step.values["sample"])
        elif step.kind == "train_set":
            files = (statuses[step.inputs["pool"]].record or {})["files"]
            facts = (statuses[step.inputs["selection"]].record or {})["facts"]
            tars = sum(entry["bytes"] for name, entry in files.items() if name.endswith(".tar"))
            needed = int(tars * facts["kept_samples"] / max(1, facts["ok_rows"]))
        else:
            return
        self._check_room(step, statuses, needed)

    def _check_room(self, step: Step, statuses: Mapping[str, Status], needed: int) -> None:
        """None. Raises StepError when there is no room for these bytes, less those that are there already."""
        free = storage.free_bytes(self.plan.config.root)
        if free is None:
            return
        folder = _path(statuses, step.name)
        needed -= sum(storage.size_bytes(storage.join(folder, name)) for name in storage.list_files(folder))
        if needed > free:
            sizes = f"about {log.short_count(needed)}B, {log.short_count(free)}B are free"
            raise StepError(f"{step.name}: not enough disk at {self.plan.config.root}: it will write {sizes}")


def run(plan: Plan, config_path: str, targets: Sequence[str], record: runs.MakeRecord | None) -> int:
    """The exit code of a run; its report is printed and written where it has one.

    Args:
        targets: the steps to reach.
        record: makes the run.json that the report is written from; None for an `--until` that ends before any report.

    Raises:
        PreflightError: the machines, the root or the files will not do; nothing was started.
    """
    now = datetime.datetime.now(datetime.timezone.utc)
    name = storage.name_of(config_path).rsplit(".", 1)[0]
    run_path = runs.new_run_path(plan.config.root, now, name)
    storage.write_bytes(storage.join(run_path, "config.yaml"), runs.config_text(plan.config).encode())
    progress = log.Progress(storage.join(run_path, "log.jsonl"))
    engine = executor = None
    started, wanted = time.monotonic(), plan.ancestors(list(targets))
    try:
        progress.event("run", config=config_path, root=plan.config.root, targets=list(targets))
        progress.say(f"{config_path} -> {plan.config.root}: {len(targets)} steps; log in {run_path}")
        for warning in plan.warnings:
            progress.say(f"warning: {warning}")
        outcome = Outcome(states.resolve(plan))
        if any(outcome.statuses[step].state != "done" for step in wanted):
            engine = progress.meter = Engine(progress.retry, progress.say)
            try:
                preflight.check(plan, targets, outcome.statuses, engine)
            except preflight.PreflightError:
                progress.close()
                storage.delete(run_path)  # there was no run
                raise
            executor = Executor(plan, engine, progress, run_path)
            outcome = executor.run(targets, outcome)
        runs.write_plan(run_path, outcome)
        if record is not None:
            from pipeline import report

            storage.write_json(storage.join(run_path, "run.json"), record(plan, outcome, name, now))
            text = report.write_report(run_path, log.screen_width())
            progress.close()
            print(text, flush=True)
        done = {name: status for name in wanted if (status := outcome.statuses[name]).state == "done"}
        records = {name: status.record for name, status in done.items() if status.record}
        spent = summary.Spent(time.monotonic() - started, *((engine.cpu_hours, engine.gpu_hours) if engine else (0, 0)))
        made = executor.made if executor else set()
        end = summary.summarise(
            {name: plan.steps[name] for name in wanted},
            records,
            made,
            outcome.failures,
            progress.units,
            progress.retries,
            spent,
        )
        for line in [*end.lines(), *(f"FAILED  {step}: {cause}" for step, cause in outcome.failures.items())]:
            progress.say(line)
        progress.event("run_end", failures=outcome.failures, **end.to_json())
        return 1 if outcome.failures or end.problems else 0
    finally:
        progress.close()
        if engine is not None:
            engine.close()
        for path in executor.interrupted if executor else []:  # its writers are gone now
            artifact.remove_temporaries(path)


def _path(statuses: Mapping[str, Status], name: str) -> str:
    made = statuses[name].artifact
    assert made is not None  # inputs of a ready step are done, and the step itself is todo
    return made.path


def _counts(rows: int, failed: Mapping[str, int]) -> str:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in failed.items())
    return f"{rows:,} rows = {rows - sum(failed.values()):,} ok" + (f" + failed: {reasons}" if reasons else "")


def _threads(resources: Resources) -> int:
    return max(1, int(resources.cpus))


def _device(resources: Resources) -> str:
    return "cuda" if resources.gpus > 0 else "cpu"
