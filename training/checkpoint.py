"""Step checkpoints: what a training needs to go on after any kill, below `step_00000123/` in the checkpoint artifact.

    step_00000123/state.pt          a dict of tensors and plain containers; torch.load(weights_only=True) reads it
    step_00000123/state.pt.sha256   written after it: a state counts only with its checksum

123 is the number of finished steps. A state that is cut short or altered is passed over for the one before; the newest
two are kept. Works on local folders and object stores. The caller's state must not hold what depends on the machine.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from pipeline.core import log, storage
from pipeline.core.errors import WinnowError, one_line

KEPT = 2
STATE_FILE, DIGEST_FILE = "state.pt", "state.pt.sha256"
LOOK_EVERY_S = 1.0  # how soon it is seen that a machine will go
LEAVING_EVERY_S = 5.0  # how old a state gets from then on: what the training computed since is lost with the machine
SAVING_FACTOR = 2.0  # or as old as so many times what it takes to save one


class Schedule:
    """When the next state is due: every so often, and much more often while a machine of the training is to go."""

    def __init__(self, every_s: float, leaving: Callable[[], bool] | None = None):
        self._every_s, self._leaving, self._leaves = every_s, leaving, False
        self._saved_s = self._looked_s = time.monotonic()
        self._took_s = 0.0

    def is_due(self) -> bool:
        """True when a state should be saved now."""
        now_s, every_s = time.monotonic(), self._every_s
        if self._leaving is not None and now_s - self._looked_s >= LOOK_EVERY_S:
            left, self._leaves, self._looked_s = self._leaves, self._leaving(), now_s
            if self._leaves and not left:
                log.logger.warning("a machine of this training will go: states are saved more often until then")
        if self._leaves:
            every_s = min(every_s, max(LEAVING_EVERY_S, SAVING_FACTOR * self._took_s))
        return now_s - self._saved_s > every_s

    @contextlib.contextmanager
    def saving(self) -> Iterator[None]:
        """Counts from its end until the next state is due."""
        started_s = time.monotonic()
        yield
        self._saved_s = time.monotonic()
        self._took_s = self._saved_s - started_s


def save(out_path: str, step: int, state: Mapping[str, Any]) -> None:
    """None; the state after `step` finished steps is safe when this returns, and older ones than KEPT are gone."""
    folder = storage.join(out_path, f"step_{step:08d}")
    with written(storage.join(folder, STATE_FILE)):
        try:
            _write_with_checksum(state, folder)
        except FileNotFoundError:  # the same training ended elsewhere just now, and took the folder away
            _write_with_checksum(state, folder)
    # Newer ones were passed over at the start and will be written again; those without a checksum never count.
    older = [name for name in _step_folders(out_path) if _step_of(name) <= step]
    kept = [name for name in older if storage.exists(storage.join(out_path, name, DIGEST_FILE))][:KEPT]
    for name in set(older) - set(kept):
        _delete(out_path, name)


@contextlib.contextmanager
def written(path: str) -> Iterator[None]:
    """Turns what the system says of a file that can't be written, as on a full disk, into one line."""
    try:
        yield
    except OSError as error:
        raise WinnowError(f"{path} can't be written: {one_line(error)}") from error


def _write_with_checksum(state: Mapping[str, Any], folder: str) -> None:
    with storage.write_file(storage.join(folder, STATE_FILE)) as temporary:
        _write_state(state, temporary)
        digest = storage.sha256_file(temporary)
    storage.write_bytes(storage.join(folder, DIGEST_FILE), digest.encode())


def _write_state(state: Mapping[str, Any], path: str) -> None:
    try:
        with open(path, "wb") as file:
            torch.save(dict(state), file)
    except RuntimeError as error:  # torch's writer counts bytes, and says so where the disk took fewer
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def load_newest(out_path: str, identity: str) -> dict[str, Any] | None:
    """The newest whole state whose "identity" is the given one, on the CPU; None when there is none."""
    for name in _step_folders(out_path):
        path = storage.join(out_path, name, STATE_FILE)
        try:
            expected = storage.read_bytes(storage.join(out_path, name, DIGEST_FILE)).decode()
            state = None
            if storage.sha256_file(path) == expected:
                with storage.open_read(path) as file:
                    state = torch.load(file, map_location="cpu", weights_only=True)
        except FileNotFoundError:  # the process was killed between the state and its checksum, or while deleting
            state = None
        if state is None:
            log.logger.warning("%s is not whole: it is passed over", path)
            continue
        if state["identity"] == identity:
            return state
        log.logger.warning("%s is of another training: it is passed over", path)
    return None


def delete_all(out_path: str) -> None:
    """None; removes every step checkpoint: a finished artifact is the same however often it was interrupted."""
    for name in _step_folders(out_path):
        _delete(out_path, name)


def _delete(out_path: str, name: str) -> None:
    try:
        storage.delete(storage.join(out_path, name))
    except OSError as error:  # the same training elsewhere, or one that is being ended, deletes it or writes it now
        if error.errno not in (errno.ENOENT, errno.ENOTEMPTY):
            raise


def _step_folders(out_path: str) -> list[str]:
    """Names, the newest first."""
    found = [name for name in storage.list_folders(out_path) if name.startswith("step_")]
    return sorted(found, key=_step_of, reverse=True)


def _step_of(name: str) -> int:
    return int(name.removeprefix("step_"))
