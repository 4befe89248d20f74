"""Runs every benchmark of this folder, one after another, and prints what each measured. No test asserts a time.

uv run benchmarks/run.py [NAME ...]
"""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    """0 when all of them ran."""
    scripts = sorted(
        path for path in FOLDER.glob("*.py") if path.name != "run.py" and (not names or path.stem in names)
    )
    failed = 0
    for script in scripts:
        print(f"== {script.stem}", flush=True)
        env = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
        failed |= subprocess.run([sys.executable, str(script)], env=env).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
