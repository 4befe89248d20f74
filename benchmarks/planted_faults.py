"""What published filters make of planted faults: real photos with faults, and what each filter removed of each kind.

    python benchmarks/planted_faults.py photos runs/photos
    python pipeline/run.py --config benchmarks/planted_photos.yaml [--until selection]
    python benchmarks/planted_faults.py table runs/planted_photos

`photos` writes pool/ and trusted/ (parquet files of image, caption and truth_fault), good.txt and bad.txt (captions
that the pool has not) and entries.txt (words of the trusted captions). The pictures are photos of Flickr8k, each with
one of its five captions, and of CIFAR-10, with one of PHRASES. They come from the folder that the tests have as real
data, $WINNOW_REAL_DATA or ../shared/data; all choices are hashes of its rows' keys, so the same folder gives the same
pool wherever Pillow encodes alike.

`table` reads the newest run below a root, one that ended at its selections too, of any pool with a column truth_fault.
A filter that drops repeats may keep the planted copy and drop the row that it was made from: that counts as a good row
lost and as a fault left.
"""

from __future__ import annotations

import argparse
import collections
import functools
import hashlib
import io
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)

import numpy as np  # noqa: E402
import pyarrow as pa  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from pipeline.core import artifact, config, pool, storage  # noqa: E402
from pipeline.core.errors import WinnowError  # noqa: E402
from stages.column_files import file_path  # noqa: E402
from stages.ingest.demo_world import BOILERPLATE, EDITS, FILE_NAMES  # noqa: E402

FAULTS = {
    "mismatched": 0.33,  # the caption of another row, which shows something else
    "boilerplate": 0.05,  # "click to enlarge"
    "file_name": 0.05,  # "IMG_0042.jpg"
    "other_language": 0.04,  # a translation of the photo's own caption (Multi30k: German, French, Czech)
    "rendered_text": 0.03,  # the caption of another row, and its words painted on the picture
    "exact_duplicate": 0.03,  # image bytes and caption of an earlier good row
    "near_duplicate": 0.03,  # an earlier good row, cropped, scaled back and encoded again, its caption edited
    "tiny": 0.02,  # the right picture, 8 to 16 px wide
    "extreme_aspect": 0.02,  # a strip of the right picture, more than three times as wide or high
    "corrupt": 0.01,  # bytes that do not decode: cut in the middle, or no image at all
}
PHOTOS, SMALL_PICTURES = 2000, 4000  # of the pool, before its faults
TRUSTED_PHOTOS, TRUSTED_SMALL_PICTURES = 3000, 4000
FILE_ROWS = 1000
PHRASES = (
    "a photo of a {}", "a small picture of a {} in the middle", "there is a {} here", "one {} seen from the side",
    "a {} on a plain background", "this picture shows a {}", "a blurry snapshot of a {}", "a {} outdoors in daylight",
    "what you see is a {}", "the {} that we saw that day", "an old image of a {}", "close view of some {}",
)  # fmt: skip
ENLARGED_PX = 128  # pictures have this size before a strip is cut out of them, or words are painted on them
STRIP_PX = 32, 40  # of a strip's shorter side: large enough that its shape is its only fault
CROPPED = 0.03  # of a near duplicate's sides, at most
NEAR_QUALITY = 80  # of its JPEG
SCHEMA = pa.schema([("image", pa.binary()), ("caption", pa.string()), ("truth_fault", pa.string())])


@dataclass(frozen=True)
class Pair:
    """A picture and what it shows. `names` are the classes of CIFAR-10 that it shows or that its captions name."""

    key: str
    image: bytes
    caption: str
    names: frozenset[str]
    translations: tuple[str, ...] = ()


def draw(text: str, below: int) -> int:
    """A number in [0, below) from the text's hash."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % below


def planted_fault(key: str) -> str:
    """The kind of fault of the row with this key, at the rates of FAULTS; "" for a good one."""
    left = draw(f"fault {key}", 10**6) / 10**6
    for name, rate in FAULTS.items():
        left -= rate
        if left < 0:
            return name
    return ""


def planted_rows(pairs: Sequence[Pair], translated: Sequence[Pair]) -> Iterator[dict[str, Any]]:
    """One row of SCHEMA for each pair, in order.

    Args:
        translated: pairs with translations; they take the place of those that get a caption in another language.
    """
    good: list[Pair] = []
    spare = iter(translated)
    for pair in pairs:
        fault = planted_fault(pair.key)
        if fault in ("exact_duplicate", "near_duplicate"):
            if good:
                pair = replace(good[draw(f"of {pair.key}", len(good))], key=pair.key)
            else:
                fault = ""  # nothing to repeat yet
        if fault == "other_language":
            found = next(spare, None)
            if found is None:
                raise WinnowError(f"{len(translated)} photos with translations, expected more: lower other_language")
            pair = replace(found, key=pair.key)
        if not fault:
            good.append(pair)
        image, caption = planted(pair, fault, pairs)
        yield {"image": image, "caption": caption, "truth_fault": fault}


def planted(pair: Pair, fault: str, pairs: Sequence[Pair]) -> tuple[bytes, str]:
    """(image, caption) of the pair with the fault."""
    pick = functools.partial(_pick, pair.key)
    if fault == "mismatched":
        return pair.image, other_caption(pair, pairs)
    if fault == "boilerplate":
        return pair.image, pick(BOILERPLATE)
    if fault == "file_name":
        return pair.image, pick(FILE_NAMES).format(draw(f"number {pair.key}", 10_000))
    if fault == "other_language":
        return pair.image, pick(pair.translations)
    if fault == "rendered_text":
        caption = other_caption(pair, pairs)
        return _edited(pair.image, functools.partial(_with_words, words=caption.split())), caption
    if fault == "near_duplicate":
        return _edited(pair.image, functools.partial(_cropped, key=pair.key)), pick(EDITS).format(pair.caption)
    if fault == "tiny":
        size = tuple(8 + draw(f"{side} {pair.key}", 9) for side in ("width", "height"))
        return _edited(pair.image, lambda image: image.resize(size)), pair.caption
    if fault == "extreme_aspect":
        return _edited(pair.image, functools.partial(_strip, key=pair.key)), pair.caption
    if fault == "corrupt":
        return _corrupted(pair.key, pair.image), pair.caption
    return pair.image, pair.caption


def other_caption(pair: Pair, pairs: Sequence[Pair]) -> str:
    """The caption of another pair that names no class which this one shows."""
    for attempt in range(1000):
        other = pairs[draw(f"with {attempt} {pair.key}", len(pairs))]
        if other.caption != pair.caption and not other.names & pair.names:
            return other.caption
    raise WinnowError(f"{pair.key}: no caption of another row in 1,000 draws, expected pairs of several classes")


def _pick(key: str, choices: Sequence[str]) -> str:
    return choices[draw(f"pick {key}", len(choices))]


def _edited(data: bytes, edit: Callable[[Any], Any]) -> bytes:
    from PIL import Image

    made = io.BytesIO()
    edit(Image.open(io.BytesIO(data)).convert("RGB")).save(made, "JPEG", quality=NEAR_QUALITY)
    return made.getvalue()


def _cropped(image: Any, key: str) -> Any:
    """The picture without up to CROPPED of each side, at least a pixel in all, at its size before."""
    most = [max(1, round(CROPPED * side)) for side in image.size]
    left, right = (draw(f"{side} {key}", most[0] + 1) for side in ("left", "right"))
    top, bottom = 1, draw(f"bottom {key}", most[1] + 1)
    return image.crop((left, top, image.width - right, image.height - bottom)).resize(image.size)


def _strip(image: Any, key: str) -> Any:
    image = image.resize((ENLARGED_PX, ENLARGED_PX))
    shorter = STRIP_PX[0] + draw(f"shorter {key}", STRIP_PX[1] - STRIP_PX[0])
    start = draw(f"start {key}", ENLARGED_PX - shorter)
    wide = draw(f"wide {key}", 2)
    return image.crop((0, start, ENLARGED_PX, start + shorter) if wide else (start, 0, start + shorter, ENLARGED_PX))


def _with_words(image: Any, words: Sequence[str]) -> Any:
    """The picture with the words on it, in lines of at most 18 letters, white with a black edge."""
    from PIL import ImageDraw, ImageFont

    image = image.resize((ENLARGED_PX, ENLARGED_PX))
    font = ImageFont.load_default(13)
    lines = [""]
    for word in words:
        if len(lines[-1]) + 1 + len(word) > 18:
            lines.append("")
        lines[-1] = f"{lines[-1]} {word}".strip()
    canvas = ImageDraw.Draw(image)
    for number, line in enumerate(lines[:8]):
        canvas.text((3, 2 + 15 * number), line, fill="white", font=font, stroke_width=1, stroke_fill="black")
    return image


def _corrupted(key: str, image: bytes) -> bytes:
    way = draw(f"way {key}", 2)
    return image[: len(image) // 2] if way else b"<!DOCTYPE html><html><body>404 Not Found</body></html>"


def read_pairs(data: pathlib.Path) -> tuple[list[Pair], list[Pair], list[Pair]]:
    """(photos, photos with translations, small pictures), each in the order of a hash, from real data."""
    table = pq.read_table(data / "zeroshot/cifar10/train/0.parquet", columns=["key", "classname", "image"])
    small = [
        Pair(
            f"cifar-{row['key']}",
            row["image"],
            PHRASES[draw(row["key"], len(PHRASES))].format(row["classname"]),
            frozenset([row["classname"]]),
        )
        for row in table.to_pylist()
    ]
    classes = sorted(set(table["classname"].to_pylist()))
    translations: dict[str, list[str]] = {}
    for row in pq.read_table(data / "language_id/multi30k_captions.parquet").to_pylist():
        if row["lang"] != "en":
            translations.setdefault(row["image"].partition(".")[0], []).append(row["text"])
    photos, translated = [], []
    for row in read_photos(data):
        every = " ".join(row["captions"]).lower()
        number = row["source_path"].rpartition("/")[2].partition("_")[0]
        pair = Pair(
            f"flickr-{row['key']}",
            row["image"],
            row["captions"][draw(row["key"], len(row["captions"]))],
            frozenset(name for name in classes if name in every),
            tuple(translations.get(number, ())),
        )
        (translated if pair.translations else photos).append(pair)
    for part in (photos, translated, small):
        part.sort(key=lambda pair: draw(pair.key, 2**63))
    return photos, translated, small


def read_photos(data: pathlib.Path) -> Iterator[dict[str, Any]]:
    """key, source_path, captions and image of Flickr8k's photos."""
    for path in sorted((data / "captions_pool/flickr8k/train").glob("*.parquet")):
        yield from pq.read_table(path, columns=["key", "source_path", "captions", "image"]).to_pylist()


def write_photos(out: pathlib.Path, data: pathlib.Path) -> dict[str, int]:
    """{kind of fault: rows}; the pool, the trusted pairs, and the files of captions and words are below `out`."""
    photos, translated, small = read_pairs(data)
    both = [(photos, PHOTOS, TRUSTED_PHOTOS), (small, SMALL_PICTURES, TRUSTED_SMALL_PICTURES)]
    pairs = [pair for part, count, _ in both for pair in part[:count]]
    trusted = [pair for part, start, count in both for pair in part[start : start + count]]
    for found in (pairs, trusted):
        found.sort(key=lambda pair: draw(f"order {pair.key}", 2**63))
    rows = list(planted_rows(pairs, translated))
    write_rows(out / "pool", rows)
    write_rows(out / "trusted", [{"image": p.image, "caption": p.caption, "truth_fault": ""} for p in trusted])
    write_captions(
        out, data, {pair.key for pair in photos[PHOTOS + TRUSTED_PHOTOS :]}, {row["caption"] for row in rows}
    )
    words = collections.Counter(word for pair in trusted for word in set(pair.caption.lower().split()))
    entries = sorted(word for word, count in words.items() if count > 1 and len(word) > 2)
    write_lines(out / "entries.txt", entries)
    return dict(collections.Counter(row["truth_fault"] for row in rows))


def write_captions(out: pathlib.Path, data: pathlib.Path, keys: set[str], in_pool: set[str]) -> None:
    """None; writes good.txt and bad.txt, without the pool's captions.

    Good: those of Flickr8k's photos with these keys, and Caltech-101's class names in PHRASES. Bad: alt texts of LAION.
    """
    good = [text for row in read_photos(data) if f"flickr-{row['key']}" in keys for text in row["captions"]]
    table = pq.read_table(data / "zeroshot/caltech101/train/0.parquet", columns=["classname"])
    good += [phrase.format(name) for name in sorted(set(table["classname"].to_pylist())) for phrase in PHRASES]
    bad = pq.read_table(data / "web_metadata/laion_alt_text.parquet", columns=["text"])["text"].to_pylist()
    seen = {normalised(caption) for caption in in_pool}
    for name, captions in (("good.txt", good), ("bad.txt", bad)):
        lines = dict.fromkeys(normalised(caption) for caption in captions if caption)
        write_lines(out / name, [line for line in lines if line and line not in seen])
        seen |= lines.keys()


def normalised(caption: str) -> str:
    """The caption in lower case, on one line."""
    return " ".join(caption.lower().split())


def write_lines(path: pathlib.Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def write_rows(folder: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """None; parquet files of FILE_ROWS rows each."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, start in enumerate(range(0, len(rows), FILE_ROWS)):
        table = pa.Table.from_pylist(rows[start : start + FILE_ROWS], schema=SCHEMA)
        pq.write_table(table, folder / f"{number:05d}.parquet")


def newest_steps(root: str) -> tuple[list[str], dict[str, str]]:
    """(strategies in the config's order, {step: path of its finished artifact}) of the newest run below the root."""
    runs = storage.join(root, "runs")
    for name in reversed(storage.list_folders(runs)):
        plan_path = storage.join(runs, name, "plan.json")
        if storage.exists(plan_path):
            steps = storage.read_json(plan_path)["steps"]
            text = storage.read_bytes(storage.join(runs, name, "config.yaml")).decode()
            paths = {step: storage.join(root, entry["artifact"]) for step, entry in steps.items()}
            made = {step: path for step, path in paths.items() if artifact.read_record(path) is not None}
            return list(config.parse_yaml(text, plan_path)["strategies"]), made
    raise WinnowError(f"{runs}: expected a run, found none that ended")


def read_choices(root: str) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """([rows] the pool's truth_fault, None where a row failed; {strategy: [rows] bool, whether it was chosen}).

    Strategies that choose from a reference are left out.
    """
    names, steps = newest_steps(root)
    if "pool" not in steps:
        raise WinnowError(f"{root}: the newest run has no pool, expected one that reached its selections")
    truth: list[str | None] = []
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names if f"{name}/selection" in steps}
    for shard in pool.load_shards(steps["pool"]):
        rows = pq.read_table(storage.join(steps["pool"], f"{shard.name}.parquet"), columns=["ok", "truth_fault"])
        truth += [fault if ok else None for ok, fault in zip(*(c.to_pylist() for c in rows.columns), strict=True)]
        for name in list(parts):
            path = file_path(steps[f"{name}/selection"], shard)
            table = pq.read_table(path) if storage.exists(path) else None
            if table is None or table.schema.metadata[pool.SHARD_DIGEST] != shard.digest.encode():
                del parts[name]  # of a reference
                continue
            chosen = np.zeros(shard.rows, bool)
            chosen[table["row"].to_numpy()] = True
            parts[name].append(chosen)
    return np.array(truth, object), {name: np.concatenate(found) for name, found in parts.items()}


def as_table(truth: np.ndarray, chosen: Mapping[str, np.ndarray]) -> str:
    """The Markdown table: what each strategy keeps, how much of that is good, and what it removes of each fault.

    Args:
        truth: [rows] object, "" for a good row and None for one that failed.
        chosen: {strategy: [rows] bool}.
    """
    counts = collections.Counter(truth.tolist())
    failed = counts.pop(None, 0)
    faults = [fault for fault, _ in counts.most_common() if fault]
    headers = ["strategy", "kept", "precision", "recall", *(f"{fault} ({counts[fault]:,})" for fault in faults)]
    about = (
        f"{len(truth):,} rows: {counts['']:,} good, {len(truth) - counts[''] - failed:,} with a fault, {failed:,} that "
        "failed to decode and are in no selection. Precision and recall are of good rows; then how much of each kind "
        "of fault is removed. All in percent; repeats count once."
    )
    lines = [
        about,
        "",
        "| " + " | ".join(headers) + " |",
        "| --- |" + " ---: |" * (len(headers) - 1),
    ]
    good = truth == ""
    for name, mask in chosen.items():
        kept = int(mask.sum())
        values = [
            _percent(int((mask & good).sum()), kept),
            _percent(int((mask & good).sum()), counts[""]),
            *(_percent(int((~mask & (truth == fault)).sum()), counts[fault]) for fault in faults),
        ]
        lines.append("| " + " | ".join([name, f"{kept:,}", *values]) + " |")
    return "\n".join(lines) + "\n"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.0f}" if whole else "-"


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("photos", help="write photos with planted faults").add_argument("out", type=pathlib.Path)
    commands.add_parser("table", help="what a run's strategies kept of them").add_argument("root")
    options = parser.parse_args(arguments)
    if options.command == "photos":
        data = pathlib.Path(os.environ.get("WINNOW_REAL_DATA") or ROOT.parent / "shared" / "data").resolve()
        for fault, rows in sorted(write_photos(options.out, data).items(), key=lambda item: -item[1]):
            print(f"{rows:6,}  {fault or 'good'}")
    elif options.command == "table":
        print(as_table(*read_choices(storage.absolute(options.root))), end="")
    else:  # benchmarks/run.py gives no command
        parser.print_help()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
