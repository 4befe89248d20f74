"""Runs the catalogue of faults through an engine, and prints what became of each. Only in isolation:

    python tests/image_server.py isolated python tests/download_fault_table.py winnow > winnow.json
    python tests/image_server.py isolated python tests/download_fault_table.py img2dataset > img2dataset.json
    python tests/download_fault_table.py markdown winnow.json img2dataset.json > docs/download_faults.md

The first two print JSON: {"faults": {name: {got, detail, width_px, height_px, mean_rgb, attempts}}, "leaks": {address: requests},
"seconds", "peak_mb"}.
"""

from __future__ import annotations

import io
import json
import os
import pathlib
import resource
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline.core import pool  # noqa: E402
from stages.ingest.download import DownloadJob, DownloadWorker  # noqa: E402
from stages.ingest.fetch.settings import DownloadSettings  # noqa: E402
from tests.download_faults import FAULTS, SETTINGS  # noqa: E402
from tests.download_fixture import write_table, write_urls  # noqa: E402
from tests.image_server import ISOLATED, ImageServer  # noqa: E402
from tests.pool_fixture import drawing  # noqa: E402

# What img2dataset can be told: its timeout is of each read.
ENGINES = {
    "winnow": SETTINGS,
    "img2dataset": {"engine": "img2dataset", "first_byte_timeout_s": 2, "retries": 2, "concurrency": 128},
}


def main(engine: str) -> None:
    """None; prints the table. Raises RuntimeError outside of isolation, where requests could leave the machine."""
    if ISOLATED not in os.environ:
        raise RuntimeError("expected to run under `image_server.py isolated`")
    images = [drawing(number, 128, 128, "JPEG") for number in range(50)]
    with ImageServer(images, processes=1) as server, tempfile.TemporaryDirectory() as folder:
        faults = server.faults()
        urls = [server.fault_url(fault) for fault in faults]
        names = pa.array([fault.name for fault in faults])
        table = write_table(pathlib.Path(folder) / "faults.parquet", urls, name=names)
        made = write_urls(folder, {"path": table, "carry": {"name": "string"}}, shard_size=len(urls))
        record = made.record()
        out = f"{folder}/pool"
        job = DownloadJob(made.path, out, DownloadSettings(**ENGINES[engine]), record["facts"]["columns"], 1)
        worker = DownloadWorker(job, threads=1)
        started_s = time.monotonic()
        facts = worker.process(pool.shards(record)[0])
        seconds = time.monotonic() - started_s
        found = {}
        rows = pool.read_rows(out, "00000")
        ok = rows.filter(rows["ok"])
        stored = dict(zip(ok["uid"].to_pylist(), pool.read_images(out, "00000", ok), strict=True))
        for row in rows.to_pylist():
            values = {"got": row["error"] or "ok", "detail": row["error_detail"], "attempts": row["attempts"]}
            if row["ok"]:
                pixels = np.asarray(Image.open(io.BytesIO(stored[row["uid"]])).convert("RGB"))
                values["size_px"] = [row["width_px"], row["height_px"]]
                values["mean_rgb"] = [round(float(mean)) for mean in pixels.mean(axis=(0, 1))]
            found[row["name"]] = values
        peaks = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
        answer = {"faults": found, "leaks": server.leaks(), "seconds": seconds, "peak_mb": max(peaks) / 1024}
        assert facts["rows"] == len(urls) == facts["ok_rows"] + sum(facts["failed"].values())
    print(json.dumps(answer))


def markdown(ours: dict, theirs: dict) -> str:
    """The page docs/download_faults.md."""
    lines = [
        "# What becomes of every fault",
        "",
        "The catalogue of `tests/download_faults.py`, in a network of its own: what winnow's shard says of each row, and",
        "what img2dataset 1.47 says (its own message, cut). **Bold**: a success that is none, or a fetch from an address",
        "that no public image is at. Made by `tests/download_fault_table.py`.",
        "",
        "| | winnow | img2dataset |",
        "|---|---|---|",
        f"| rows | {len(ours['faults'])} | {len(theirs['faults'])} |",
        f"| seconds | {ours['seconds']:.0f} | {theirs['seconds']:.0f} |",
        f"| peak memory, MB | {ours['peak_mb']:.0f} | {theirs['peak_mb']:.0f} |",
        f"| requests that reached a forbidden address | {sum(ours['leaks'].values())} | {sum(theirs['leaks'].values())} |",
        "",
        "| fault | winnow | img2dataset |",
        "|---|---|---|",
    ]
    for name, row in ours["faults"].items():
        other = theirs["faults"][name]
        if other["got"] == "ok":
            as_ours = other["size_px"] == row.get("size_px", other["size_px"])
            said = "ok" if "ok" in FAULTS[name].expected and as_ours else "**ok**"
        else:
            said = " ".join((other["detail"] or other["got"]).split())[:60].replace("|", "/").replace("<", "&lt;")
            said = "".join(character if 32 <= ord(character) < 127 else "?" for character in said)
        lines.append(f"| {name} | {row['got']} | {said} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    if sys.argv[1] == "markdown":
        ours, theirs = (json.loads(pathlib.Path(path).read_text().splitlines()[-1]) for path in sys.argv[2:4])
        print(markdown(ours, theirs), end="")
    else:
        main(sys.argv[1])
