"""The metrics of trainings for TensorBoard and Weights & Biases, which are asked for by `train.log_to`.

    runs/<run>/tensorboard/no_filter.seed0.train/   event files: tensorboard --logdir runs/<run>/tensorboard
               wandb/                               one W&B run a training, in the project "winnow"

What is written are the numbers of metrics.jsonl, by step. W&B is set up by its own environment (WANDB_MODE, WANDB_DIR,
WANDB_API_KEY, ...). Both packages are imported where they are used, and neither imports torch here.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.core import storage
from pipeline.core.errors import ConfigError

TENSORBOARD, WANDB = "tensorboard", "wandb"  # words of the config, packages, and folders
WANDB_PROJECT = "winnow"


def check(log_to: Sequence[str], root: str, place: str) -> None:
    """None. Raises ConfigError where a package is missing, or TensorBoard would have to write to an object store."""
    if TENSORBOARD in log_to and storage.is_url(root):
        raise ConfigError(f"{place} = {TENSORBOARD}, expected a local root for its event files, found {root}")
    for name in log_to:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(f"{place} = {name}, expected the package {name} to be installed")


def numbers(line: Mapping[str, Any]) -> dict[str, float]:
    """What is drawn of a line of metrics.jsonl: its numbers but the step."""
    return {
        name: value
        for name, value in line.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    }


class TensorBoard:
    """The event files of one training."""

    def __init__(self, run_path: str, training: str, settings: Mapping[str, Any]):
        from tensorboard.summary import Writer

        self._writer = Writer(storage.join(run_path, TENSORBOARD, training.replace("/", ".")))

    def add(self, line: Mapping[str, Any]) -> None:
        """None; writes one line of metrics.jsonl."""
        for name, value in numbers(line).items():
            self._writer.add_scalar(name, value, line["step"])

    def flush(self) -> None:
        """None; what was added can be seen."""
        self._writer.flush()

    def close(self) -> None:
        """None; nothing more is added."""
        self._writer.close()


class Wandb:
    """The W&B run of one training; several are open at once."""

    def __init__(self, run_path: str, training: str, settings: Mapping[str, Any]):
        import wandb

        own = tempfile.gettempdir() if storage.is_url(run_path) else run_path
        self._run = wandb.init(
            project=WANDB_PROJECT,
            name=training,
            group=storage.name_of(run_path),
            config=dict(settings),
            dir=os.environ.get("WANDB_DIR") or own,
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )

    def add(self, line: Mapping[str, Any]) -> None:
        """None; logs one line of metrics.jsonl."""
        self._run.log(numbers(line), step=line["step"])

    def flush(self) -> None:
        """None; W&B sends what was added by itself."""

    def close(self) -> None:
        """None; ends the run once all is sent."""
        self._run.finish()


Tracker = TensorBoard | Wandb
TRACKERS: dict[str, type[Tracker]] = {TENSORBOARD: TensorBoard, WANDB: Wandb}
