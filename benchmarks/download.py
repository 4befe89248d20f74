"""Downloaded images/s, CPU and peak memory of DownloadWorker, beside img2dataset on the same server.

    python benchmarks/download.py [--images 2000] [--rounds 3]

Two cases, each one shard of distinct JPEGs (quality 88, cut from 32 photos of the web) at DataComp's settings, 512 px:
`resized` 960 px images come down to 512 px; `untouched` 400 px images are stored as they came, which is
skip_reencode=True there and image.keep_original here. Both tools run in a process of their own on one core, one
worker process and 128 requests in flight; the server has another core, where there is one. Images/s count the time
within the shard, imports left out. CPU is that of the whole process and its children, imports included. Peak memory is
the largest process's. Ours also asks no host more than it wants to be asked: those limits are lifted here.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

SIDE_PX = {"resized": 960, "untouched": 400}
IN_FLIGHT = 128
TOOLS = ("winnow", "img2dataset")


def winnow_run(urls: list[str], case: str, folder: str) -> tuple[int, float]:
    """(images stored, seconds within the shard)."""
    from pipeline.core.pool import Shard
    from stages.ingest.download import DownloadJob, DownloadWorker
    from stages.ingest.fetch.settings import DownloadSettings
    from stages.ingest.shard_writer import ShardWriter

    rows_path = f"{folder}/urls"
    with ShardWriter(rows_path, "00000", {}, has_tar=False) as writer:
        for number, url in enumerate(urls):
            row = {"uid": f"{number:032x}", "key": f"{number:09d}", "caption": "a photo", "source": "web", "ok": True}
            writer.add(row | {"url": url}, None, {})
    settings = DownloadSettings(
        image={"keep_original": case == "untouched"},
        concurrency=IN_FLIGHT,
        per_host_concurrency=IN_FLIGHT,
        per_host_requests_per_s=1e6,
        allow_addresses=["127.0.0.0/8"],
    )
    job = DownloadJob(rows_path, f"{folder}/pool", settings, {}, 1)
    worker = DownloadWorker(job, threads=1)
    warm_up()  # as img2dataset's process has imported all that it needs when its shard begins
    start_s = time.perf_counter()
    done = worker.process(Shard("00000", "", len(urls)))
    return done["ok_rows"], time.perf_counter() - start_s


def warm_up() -> None:
    """Nothing; imports and compiles what stores a picture."""
    import io

    from PIL import Image

    from stages.ingest.fetch.picture import stored_picture
    from stages.ingest.fetch.settings import ImageRecipe

    sink = io.BytesIO()
    Image.new("RGB", (600, 500)).save(sink, "JPEG")
    stored_picture(sink.getvalue(), ImageRecipe(), None)


def profile(images: list[bytes], case: str) -> dict[str, float]:
    """{part: CPU ms an image} of what winnow does to the bytes; the rest of its time is network and files."""
    import io

    import numpy as np
    from PIL import Image

    from stages.ingest.fetch.area_resize import area_resize
    from stages.ingest.fetch.jpeg_check import sure_jpeg
    from stages.ingest.fetch.picture import _opencv_pixels, stored_picture
    from stages.ingest.fetch.settings import ImageRecipe

    def ms(function: Any, items: list) -> float:
        for item in items:
            function(item)
        best_s = []
        for _ in range(3):
            start_s = time.thread_time()
            for item in items:
                function(item)
            best_s.append(time.thread_time() - start_s)
        return min(best_s) / len(items) * 1000

    images = images[:64]
    recipe = ImageRecipe(keep_original=case == "untouched")
    whole = ms(lambda data: stored_picture(data, recipe, None), images)
    if case == "untouched":
        return {"check": ms(sure_jpeg, images), "picture": whole}
    decoded = [np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) for data in images]
    sizes = [[max(1, round(side * 512 / max(pixels.shape))) for side in pixels.shape[:2]] for pixels in decoded]
    pairs = list(zip(decoded, sizes, strict=True))
    return {
        "decode": ms(_opencv_pixels, images),
        "resize": ms(lambda pair: area_resize(pair[0], *pair[1]), pairs),
        "picture": whole,  # decode, resize, encode and all around them
    }


def img2dataset_run(urls: list[str], case: str, folder: str) -> tuple[int, float]:
    """(images stored, seconds within the shard)."""
    os.environ |= {"NO_ALBUMENTATIONS_UPDATE": "1", "WANDB_MODE": "disabled"}  # neither asks the network
    import pyarrow as pa
    import pyarrow.parquet as pq
    from img2dataset import download

    uids = [f"{number:032x}" for number in range(len(urls))]
    pq.write_table(pa.table({"url": urls, "text": ["a photo"] * len(urls), "uid": uids}), f"{folder}/urls.parquet")
    download(
        url_list=f"{folder}/urls.parquet",
        input_format="parquet",
        url_col="url",
        caption_col="text",
        save_additional_columns=["uid"],
        output_folder=f"{folder}/out",
        output_format="webdataset",
        image_size=512,
        resize_mode="keep_ratio_largest",
        resize_only_if_bigger=True,
        skip_reencode=case == "untouched",
        processes_count=1,
        thread_count=IN_FLIGHT,
        number_sample_per_shard=len(urls),
        retries=2,
    )
    stats = json.loads(pathlib.Path(folder, "out", "00000_stats.json").read_text())
    return stats["successes"], stats["end_time"] - stats["start_time"]


def run_tool(tool: str, case: str, urls_path: str) -> None:
    """Nothing; prints a line of JSON: what this process measured of itself and its children."""
    urls = json.loads(pathlib.Path(urls_path).read_text())
    with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as folder:
        stored, seconds = {"winnow": winnow_run, "img2dataset": img2dataset_run}[tool](urls, case, folder)
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    found = {"stored": stored, "images_per_s": stored / seconds}
    found["cpu_ms"] = sum(usage.ru_utime + usage.ru_stime for usage in usages) / stored * 1000
    found["peak_mb"] = max(usage.ru_maxrss for usage in usages) / 1024
    print(json.dumps(found), flush=True)


def measured(tool: str, case: str, urls_path: str, cores: set[int]) -> dict[str, float]:
    """What a fresh process on these cores measured."""
    command = [sys.executable, __file__, "--run", tool, case, urls_path]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    printed, complaints = process.communicate()
    if process.returncode:
        raise RuntimeError(f"{tool} failed: {complaints[-2000:]}")
    return json.loads(printed.splitlines()[-1])


def main() -> None:
    from tests.image_server import ImageServer, sized_images

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        run_tool(*arguments.run)
        return
    real_data = os.environ.get("WINNOW_REAL_DATA") or ROOT.parent / "shared" / "data"
    available = sorted(os.sched_getaffinity(0))
    server_core, tool_core = {available[0]}, {available[-1]}
    summary: dict[str, Any] = {"benchmark": "download", "images": arguments.images, "cores": len(available)}
    for case, side_px in SIDE_PX.items():
        images = sized_images(real_data, arguments.images, side_px)
        found: dict[str, list[dict[str, float]]] = {tool: [] for tool in TOOLS}
        with (
            ImageServer(images, processes=1, cores=server_core) as server,
            tempfile.NamedTemporaryFile("w", suffix=".json") as urls,
        ):
            json.dump([server.url(f"/img/{number}.jpg") for number in range(len(images))], urls)
            urls.flush()
            for _ in range(arguments.rounds):
                for tool in TOOLS:
                    one = measured(tool, case, urls.name, tool_core)
                    if one["stored"] != len(images):
                        raise RuntimeError(f"{tool} stored {one['stored']:.0f} of {len(images)} images")
                    found[tool].append(one)
                    rate = f"{one['images_per_s']:7.1f} images/s  {one['cpu_ms']:6.2f} CPU ms an image"
                    print(f"{case:10} {tool:12} {rate}  {one['peak_mb']:6.0f} MB", flush=True)
        middle = {
            tool: {key: statistics.median(one[key] for one in runs) for key in ("images_per_s", "cpu_ms", "peak_mb")}
            for tool, runs in found.items()
        }
        ours, theirs = middle["winnow"], middle["img2dataset"]
        ratios = {
            "rate": ours["images_per_s"] / theirs["images_per_s"],
            "cpu": theirs["cpu_ms"] / ours["cpu_ms"],
            "memory": ours["peak_mb"] / theirs["peak_mb"],
        }
        shown = f"rate {ratios['rate']:.2f}, by CPU {ratios['cpu']:.2f}, memory {ratios['memory']:.2f}"
        parts = profile(images, case)
        where = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
        print(f"{case}: ratio of {shown}", flush=True)
        print(f"{case}: winnow's CPU ms an image: {where}; the rest of {ours['cpu_ms']:.2f} is network, files, imports")
        summary[case] = {"ratios": ratios, "profile": parts, **middle}
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
