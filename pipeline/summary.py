"""The end of a run: whether the counts in its records reconcile, what was done and done again, and what it cost.

A pure function of records. What it prints:

    rows     240 = 235 ok + 5 failed (3 undecodable, 2 unsupported_format); references: 96 = 96 ok
    steps    36 done now (22 shards, 9 tars, 8 tasks), 2 reused, 1 failed, 3 not done
    again    3 items (its machine was lost: 2, OSError: 1)
    written  4.1MB in 36 artifacts
    time     3m
    compute  0.021 CPU-h and 0.4 GPU-h
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from pipeline.core.log import short_count, short_time
from pipeline.steps import Step
from stages.base import Stage

NAMED = 5  # reasons, causes, ... in a line


@dataclass(frozen=True)
class Spent:
    """What a run took. The hours are those for which the items that were finished in it held CPUs and GPUs."""

    seconds: float
    cpu_hours: float
    gpu_hours: float


@dataclass(frozen=True)
class Summary:
    """What became of a run. Counts of rows are of the pool and of the references, as {rows, ok_rows, failed}."""

    pool: dict[str, Any] | None
    references: dict[str, Any] | None
    made: int  # steps that were finished in this run; the others that are done were reused
    reused: int
    failed: int
    not_done: int  # as they need one that failed
    units: dict[str, float]  # finished shards, tars, ... of all steps, by unit
    retries: dict[str, int]  # items that were done again, by cause
    written_bytes: int  # the whole artifacts of the steps that were finished in this run
    spent: Spent
    problems: list[str]  # counts that do not reconcile

    def to_json(self) -> dict[str, Any]:
        """The summary as log.jsonl holds it."""
        return asdict(self)

    def lines(self) -> list[str]:
        """The summary as a run prints it."""
        rows = [] if self.pool is None else [_rows(self.pool)]
        rows += [] if self.references is None else [f"references: {_rows(self.references)}"]
        units = ", ".join(f"{short_count(count)} {unit}" for unit, count in self.units.items())
        steps = f"{self.made} done now" + (f" ({units})" if units else "") + f", {self.reused} reused"
        retries = sum(self.retries.values())
        spent = self.spent
        hours = f"{spent.cpu_hours:.3g} CPU-h" + (f" and {spent.gpu_hours:.3g} GPU-h" if spent.gpu_hours else "")
        table = {
            "rows": "; ".join(rows),
            "steps": steps
            + (f", {self.failed} failed" if self.failed else "")
            + (f", {self.not_done} not done" if self.not_done else ""),
            "again": f"{retries:,} item{'s' if retries > 1 else ''} ({_most(self.retries, '{name}: {count:,}')})"
            if retries
            else "",
            "written": f"{short_count(self.written_bytes)}B in {self.made} artifacts" if self.made else "",
            "time": short_time(spent.seconds),
            "compute": hours if self.made else "",
        }
        lines = [f"{name:<7}  {text}" for name, text in table.items() if text]
        return lines + [f"ERROR    the counts do not reconcile: {problem}" for problem in self.problems]


def summarise(
    steps: Mapping[str, Step],
    records: Mapping[str, Mapping[str, Any]],
    made: Collection[str],
    failed: Collection[str],
    units: Mapping[str, float],
    retries: Mapping[str, int],
    spent: Spent,
) -> Summary:
    """The summary of a run.

    Args:
        steps: those that the run was to reach, with all that they need.
        records: of those of them that are done.
        made: the names of those that were finished in this run.
        failed: the names of those that failed.
        units, retries: see pipeline.core.log.Progress.
        spent: what the run took.
    """
    pool = [record for name, record in records.items() if name == "pool"]  # `download: false`: of the kind `urls`
    references = [record for name, record in records.items() if name != "pool" and steps[name].kind == "pool"]
    now = {name: records[name] for name in records if name in made}
    return Summary(
        pool=_counts(pool),
        references=_counts(references),
        made=len(now),
        reused=len(records) - len(now),
        failed=len(failed),
        not_done=len(steps.keys() - records.keys() - set(failed)),
        units=dict(units),
        retries=dict(retries),
        written_bytes=sum(entry["bytes"] for record in now.values() for entry in record["files"].values()),
        spent=spent,
        problems=list(_problems(steps, records)),
    )


def _counts(records: list[Mapping[str, Any]]) -> dict[str, Any] | None:
    if not records:
        return None
    failed: Counter[str] = Counter()
    for record in records:
        failed.update(record["facts"]["failed"])
    sums = {name: sum(record["facts"][name] for record in records) for name in ("rows", "ok_rows")}
    return {**sums, "failed": dict(failed.most_common())}


def _problems(steps: Mapping[str, Step], records: Mapping[str, Mapping[str, Any]]) -> Iterable[str]:
    """A line for each count that is not what it must be by another one."""
    for name, record in records.items():
        facts, step = record["facts"], steps[name]

        def of(role: str, fact: str, step: Step = step) -> int | None:
            """A fact of the step's input, None when that is of no step of this run."""
            found = records.get(step.inputs.get(role, ""))
            return None if found is None else found["facts"].get(fact)

        sums: list[tuple[str, int, int | None]] = []  # (what, how many, how many there must be)
        if step.kind in ("pool", "urls"):
            failed = sum(facts["failed"].values())
            sums.append(
                (f"rows ({facts['ok_rows']:,} ok + {failed:,} failed)", facts["ok_rows"] + failed, facts["rows"])
            )
            sums.append(
                ("rows of its shards", sum(entry.get("rows", 0) for entry in record["files"].values()), facts["rows"])
            )
            sums.append(
                ("rows and those left out by `sample`", facts["rows"] + facts["sampled_out_rows"], facts["source_rows"])
            )
        elif isinstance(step.work, Stage):
            sums.append(("rows", facts["rows"], of("pool", "rows")))
        elif step.kind == "selection":
            sums.append(("rows that were judged", facts["pool_rows"], of("pool", "rows")))
            sums.append(("ok rows", facts["ok_rows"], of("pool", "ok_rows")))
            left = [facts["pool_rows"], *(entry["rows_kept"] for entry in facts["funnel"])]
            for entry, before in zip(facts["funnel"], left, strict=False):
                sums.append((f"rows that reach the rule {entry['rule']!r}", entry["rows_in"], before))
            sums.append(("rows that are kept", facts["kept_rows"], left[-1]))
        elif step.kind == "train_set":
            sums.append(("samples", facts["num_samples"], of("selection", "kept_samples")))
        for what, count, expected in sums:
            if expected is not None and count != expected:
                yield f"{name}: {count:,} {what}, expected {expected:,}"


def _rows(counts: Mapping[str, Any]) -> str:
    failed = sum(counts["failed"].values())
    text = f"{counts['rows']:,} = {counts['ok_rows']:,} ok"
    return text + (f" + {failed:,} failed ({_most(counts['failed'], '{count:,} {name}')})" if failed else "")


def _most(counts: Mapping[str, int], form: str) -> str:
    most = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    named = ", ".join(form.format(name=name, count=count) for name, count in most[:NAMED])
    return named + (", ..." if len(most) > NAMED else "")
