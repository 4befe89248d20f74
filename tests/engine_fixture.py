"""An engine without a cluster: what is asked of pipeline.core.engine, one item after the other in this process."""

from __future__ import annotations

from pipeline import execute, states
from pipeline.core import log, storage
from pipeline.core.machines import Machine
from pipeline.steps import Plan

HERE = Machine("10.0.0.1", {"CPU": 1.0}, {})


class EngineHere:
    """Runs functions and workers here and now, whatever machines it is said to have."""

    def __init__(self, there=(HERE,), local=True):
        self.there, self.local = list(there), local
        self.cpu_hours = self.gpu_hours = 0.0

    def machines(self):
        return self.there

    def on_each_machine(self, function, *arguments):
        return [(machine.name, function(*arguments)) for machine in self.there]

    def cpus_of_nodes(self):
        return [1]

    def cancel(self):
        return None

    def board(self):
        return None

    def posted(self):
        return {}

    def warned(self):
        return {}

    def map(self, function, items, names, resources, on_done=None, waits_for=None):
        results = []
        for index, item in enumerate(items):
            results.append(function(*item))
            if on_done:
                on_done(index, results[-1])
        return results

    def map_on_actors(self, worker_class, arguments, items, names, resources, on_done=None, items_at_once=1):
        worker = worker_class(*arguments)
        return self.map(worker.process, items, names, resources, on_done)


def run_here(plan: Plan, targets: list[str] | None = None) -> execute.Outcome:
    """The outcome of a run of the plan, or of what these steps need, in this process."""
    run_path = storage.join(plan.config.root, "runs", "here")
    progress = log.Progress(storage.join(run_path, "log.jsonl"))
    try:
        executor = execute.Executor(plan, EngineHere(), progress, run_path)
        return executor.run(targets or list(plan.steps), execute.Outcome(states.resolve(plan)))
    finally:
        progress.close()
