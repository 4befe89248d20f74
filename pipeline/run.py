"""The entry point: `python pipeline/run.py --config FILE`, the same as `winnow --config FILE`. Defines no classes.

Exit codes: 0 all done, 1 a step failed (the others went on), 2 the configuration or command line is wrong, or the
machines will not do for it, and nothing was started (with --plan: nothing would be), 130 and 143 stopped by Ctrl-C and
SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
from collections.abc import Iterator

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# `python pipeline/run.py` puts pipeline/ first on the path: our packages are found from the folder above it, and
# before any package of the same name that is installed.
sys.path = [ROOT, *(path for path in sys.path if os.path.abspath(path or ".") not in (ROOT, f"{ROOT}/pipeline"))]

from pipeline.core import config, log, storage  # noqa: E402
from pipeline.core.errors import ConfigError, StoreError, WinnowError, without_secrets  # noqa: E402

STOPPED = "stopped; the same command goes on where it stopped"
DEMO = "uv run pipeline/run.py --config configs/demo.yaml"
USAGE = f"""winnow: which filter makes the better image-text dataset?

Try the demo (about 4 minutes on two cores, downloads no data):
    {DEMO}
Your own images and captions:
    uv run pipeline/run.py --config configs/folder.yaml --set pool.source=/path/to/photos \\
        --set eval.root=/path/to/tasks --set 'eval.tasks=[cifar10]'
"""


def parser() -> argparse.ArgumentParser:
    """The command line. tests/test_policy.py freezes its flags."""
    made = argparse.ArgumentParser(
        prog="winnow", description=USAGE, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    made.add_argument("--config", metavar="FILE", help="the experiment (YAML)")
    made.add_argument(
        "--set",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        dest="overrides",
        help="override, such as train.recipe=small",
    )
    made.add_argument(
        "--until",
        metavar="STEP",
        help="only the steps of this name or below it, and what they need; `stages`: what is in the pool",
    )
    made.add_argument(
        "--plan",
        action="store_true",
        help="print each step's state, why, what it will take, and what a run would stop at; start nothing",
    )
    made.add_argument("--report", action="store_true", help="rebuild the newest run's pages from its records")
    made.add_argument("--clean", action="store_true", help="list artifacts that no run refers to")
    made.add_argument("--yes", action="store_true", help="with --clean: remove them")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The exit code of one command line."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        parser().print_help()
        return 0
    options = parser().parse_args(arguments)
    log.setup()
    try:
        return run(options)
    except WinnowError as error:
        for line in getattr(error, "lines", [str(error)]):
            print(f"error: {without_secrets(line)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print(STOPPED, file=sys.stderr)
        return 130


def run(options: argparse.Namespace) -> int:
    """The exit code of parsed options. Raises WinnowError."""
    if options.config is None:
        raise ConfigError(f"--config is missing, expected a YAML file. The demo: {DEMO}")
    if options.yes and not options.clean:
        raise ConfigError("--yes has no effect without --clean")
    chosen = [name for name in ("plan", "report", "clean", "until") if getattr(options, name)]
    if len(chosen) > 1 and chosen != ["plan", "until"]:
        raise ConfigError(f"--{chosen[0]} and --{chosen[1]}: expected one of them")
    with _nothing_started():
        loaded = config.load(options.config, options.overrides)

    if options.report:
        from pipeline import report, runs

        run_path = runs.newest_run(loaded.root)
        beside = None  # as the run recorded it
        if "beside" in loaded.report.model_fields_set:
            loaded = runs.find_beside(loaded, run_path)
            report.check_beside(loaded)
            beside = loaded.report.beside
        print(report.write_report(run_path, log.screen_width(), beside))
        return 0
    if options.clean:
        from pipeline import runs

        return runs.clean(loaded.root, remove=options.yes)

    from pipeline import plan as planning

    with _nothing_started():
        if loaded.report.beside:
            from pipeline import report, runs

            loaded = runs.find_beside(loaded)
            report.check_beside(loaded)
        plan = planning.build(loaded, options.config, fetch_tasks=not options.plan, until=options.until)
    targets = planning.targets(plan, options.until)
    if options.plan:
        from pipeline import preflight

        return preflight.show(plan, targets)
    storage.check_writable(loaded.root, f"{options.config}: root")

    from pipeline import execute, runs

    signal.signal(signal.SIGTERM, _stop)
    record = {None: runs.run_record, planning.STAGES: runs.stages_record}.get(options.until)
    return execute.run(plan, options.config, targets, record)


@contextlib.contextmanager
def _nothing_started() -> Iterator[None]:
    """Makes what a store refuses an error of the config, which names it."""
    try:
        yield
    except StoreError as error:
        raise ConfigError(str(error)) from error


def _stop(number: int, frame: object) -> None:
    """SIGTERM (spot nodes): abandon what is in hand, which was never published, and leave."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(STOPPED, file=sys.stderr)
    raise SystemExit(143)


if __name__ == "__main__":
    sys.exit(main())
