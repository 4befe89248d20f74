"""Scoring images/s of score_shard with the clip stage, beside a plain open_clip loop over the same tars.

    python benchmarks/scoring.py [--pairs 1000] [--threads 1]

The plain loop is what open_clip's README and its webdataset loader amount to: webdataset decodes ("pilrgb"), the
model's own preprocessing, batches of 256, encode_image and encode_text on tokens padded to 77, normalised, their
product. The model has ViT-B-32's shape at a quarter of its width and half of its depth (224 px, patch 32, 77 tokens),
with random weights that are the same for both. Both run in this process, alternating, with as many torch threads as
--threads; ours decodes the next block on as many threads beside. CPU seconds are given for that reason.
"""

from __future__ import annotations

import argparse
import io
import json
import pathlib
import statistics
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import torch  # noqa: E402
import webdataset  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline.core import artifact, clip_model, pool, storage  # noqa: E402
from pipeline.core.tars import TarWriter  # noqa: E402
from stages import build_stage  # noqa: E402
from stages.base import LoadContext  # noqa: E402
from stages.score_shard import LoadedStage, score_shard  # noqa: E402

ARCHITECTURE = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 224, "patch_size": 32, "width": 192, "layers": 6, "head_width": 64},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 128, "heads": 2, "layers": 6},
}
BATCH = 256
ROUNDS = 3
WORDS = "a photo of two small dogs running across the wet green field behind an old house near the sea"


def write_pool(root: str, num_pairs: int) -> str:
    """The path of a pool of one shard: photographs' sizes (about 512 x 384 JPEG) and captions of 5 to 25 words."""
    rng = np.random.default_rng(0)
    made = artifact.Artifact(root, "pool", {"pairs": num_pairs})
    rows = []
    with storage.write_file(storage.join(made.path, "00000.tar")) as temporary, TarWriter(temporary) as tar:
        for number in range(num_pairs):
            coarse = rng.integers(0, 256, size=(24, 32, 3), dtype=np.uint8)
            data = io.BytesIO()
            Image.fromarray(coarse).resize((512, 384), Image.Resampling.BICUBIC).save(data, "JPEG", quality=90)
            caption = " ".join(rng.choice(WORDS.split(), size=rng.integers(5, 26)))
            key, uid = f"{number:011d}", f"{number:032x}"
            offset_bytes = tar.add(f"{key}.jpg", data.getvalue())
            tar.add(f"{key}.txt", caption.encode())
            tar.add(f"{key}.json", json.dumps({"uid": uid}).encode())
            row = {"uid": uid, "key": key, "caption": caption, "ok": True, "image_format": "jpg"}
            row |= {"width_px": 512, "height_px": 384, "image_offset_bytes": offset_bytes}
            rows.append(row | {"image_size_bytes": len(data.getvalue())})
    table = pa.Table.from_pylist(rows, schema=pool.SCHEMA)
    storage.write_bytes(storage.join(made.path, "00000.parquet"), pool.table_bytes(table))
    artifact.finish(made, {}, file_notes={"00000.parquet": {"rows": num_pairs}})
    return made.path


def plain_loop(tar: str, clip: clip_model.Clip) -> np.ndarray:
    """[n] scores."""
    loader = (
        webdataset.WebDataset([tar], shardshuffle=False)
        .decode("pilrgb")
        .rename(image="jpg;png;jpeg;webp", text="txt")
        .map_dict(image=clip.preprocess, text=lambda text: clip.tokenizer(text)[0])
        .to_tuple("image", "text")
        .batched(BATCH)
    )
    scores = []
    with torch.inference_mode():
        for image, text in loader:
            image_BD = clip.model.encode_image(image, normalize=True)
            text_BD = clip.model.encode_text(text, normalize=True)
            scores.append((image_BD * text_BD).sum(dim=-1).numpy())
    return np.concatenate(scores)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory(prefix="winnow-benchmark-") as root:
        path = write_pool(root, arguments.pairs)
        clip_model.save(clip_model.build(ARCHITECTURE).model, ARCHITECTURE, f"{root}/model")
        stage = build_stage("clip", {"model": "it"}, "clip")
        state = stage.load(LoadContext(threads=arguments.threads, model={"folder": f"{root}/model"}))
        torch.set_num_threads(arguments.threads)
        shard = pool.load_shards(path)[0]
        rates, cpu_s, scores = {"ours": [], "plain": []}, {"ours": [], "plain": []}, {}
        for number in range(-1, ROUNDS):  # the first round warms up and is not counted
            for way in ("ours", "plain"):
                start, cpu = time.perf_counter(), time.process_time()
                if way == "ours":
                    out = f"{root}/out{number}"
                    score_shard(path, shard, [LoadedStage(stage, state, out, BATCH)], arguments.threads)
                    scores[way] = pool.read_table(f"{out}/00000.parquet")["clip_score"].to_numpy()
                else:
                    scores[way] = plain_loop(f"{path}/00000.tar", state[0])
                if number < 0:
                    continue
                rates[way].append(arguments.pairs / (time.perf_counter() - start))
                cpu_s[way].append(time.process_time() - cpu)
                print(f"{way:6} {rates[way][-1]:7.1f} images/s  {cpu_s[way][-1]:6.1f} CPU s", flush=True)
        ratio = statistics.median(rates["ours"]) / statistics.median(rates["plain"])
        cpu_ratio = statistics.median(cpu_s["plain"]) / statistics.median(cpu_s["ours"])
        difference = float(np.abs(scores["ours"] - scores["plain"]).max())
        print(f"ratio {ratio:.2f} (by CPU seconds {cpu_ratio:.2f}); scores differ by at most {difference:.1e}")
        found = {"ratio": ratio, "cpu_ratio": cpu_ratio, "max_difference": difference, "images_per_s": rates}
        print(json.dumps({"benchmark": "scoring", "pairs": arguments.pairs, **found}))


if __name__ == "__main__":
    main()
