"""Task folders with planted images, and one evaluation of them."""

from __future__ import annotations

import io
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from PIL import Image

from pipeline.core.tars import TarWriter

Members = Sequence[tuple[str, bytes]]


def picture(seed: int, kind: str = "PNG") -> bytes:
    """An image of random blocks, its size not square."""
    rng = np.random.default_rng(seed)
    blocks = Image.fromarray(rng.integers(0, 256, (3, 4, 3), dtype=np.uint8)).resize((40 + seed % 5, 36), 0)
    data = io.BytesIO()
    blocks.save(data, kind)
    return data.getvalue()


def npy(values, **options) -> bytes:
    """The bytes of a .npy file."""
    data = io.BytesIO()
    np.save(data, values, **options)
    return data.getvalue()


def write_tars(folder: pathlib.Path, tars: Sequence[Members], files: Mapping[str, str]) -> str:
    """The path of a folder in CLIP_benchmark's layout: these tars, and text files by name."""
    (folder / "test").mkdir(parents=True)
    for number, members in enumerate(tars):
        with TarWriter(str(folder / "test" / f"{number}.tar")) as tar:
            for name, data in members:
                tar.add(name, data)
    for name, text in {"test/nshards.txt": f"{len(tars)}\n", **files}.items():
        (folder / name).write_text(text, encoding="utf-8")
    return str(folder)


def write_files(folder: pathlib.Path, files: Mapping[str, bytes | str]) -> str:
    """The path of a folder with these files, by relative name."""
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    return str(folder)


def scored(model_folder: str, data, out: pathlib.Path, **options: Any) -> tuple[dict, list[dict], dict]:
    """(metrics, rows of predictions.parquet, facts) of this model on a task."""
    from eval.evaluate import Checkpoint, evaluate

    checkpoint = Checkpoint({"folder": model_folder}, "tiny", "checkpoint-0")
    (found,) = evaluate([checkpoint], [data], [[str(out)]], **options)
    assert found.error is None, found.error
    metrics = json.loads((out / "result.json").read_text())["metrics"]
    return metrics, pq.read_table(out / "predictions.parquet").to_pylist(), found.facts


def failure(model_folder: str, data, out: pathlib.Path) -> str:
    """The error of this model on a task."""
    from eval.evaluate import Checkpoint, evaluate

    checkpoint = Checkpoint({"folder": model_folder}, "tiny", "checkpoint-0")
    (found,) = evaluate([checkpoint], [data], [[str(out)]])
    assert found.error, "no error"
    return found.error
