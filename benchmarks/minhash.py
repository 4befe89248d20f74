"""MinHash signatures/s of one core, beside datasketch and, where it is installed, rensa, on the same captions.

    python benchmarks/minhash.py [--captions 100000]

Two corpora: web captions (WINNOW_REAL_DATA or ../shared/data, repeated up to --captions in a new order) and synthetic
ones of 13 words from a vocabulary of 30,000 by Zipf's law. Ours starts from captions as the pool has them: normalising,
splitting and hashing are in its time, in batches of the stage's size. datasketch is given what suits it best:
MinHash.bulk over captions that were normalised, split and encoded before, 3,000 of them. rensa is given the same split
captions; its digests are its own, and getting them out as numpy arrays is shown apart. One thread, times of its CPU,
the best of ROUNDS; their values are compared with datasketch's.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[0] = str(ROOT)
os.environ.setdefault("RAYON_NUM_THREADS", "1")  # rensa's threads

import datasketch  # noqa: E402
import numpy as np  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from stages.columns.minhash import MinHash  # noqa: E402
from stages.duplicates.shingles import Shingling, python_shingles, shingle_sets  # noqa: E402
from stages.duplicates.signatures import signatures  # noqa: E402

ROUNDS = 3
SLOW_CAPTIONS = 3000
SHINGLINGS = (Shingling("word", 1), Shingling("word", 3), Shingling("character", 5))


def real_captions(num_captions: int) -> list[str]:
    """Web captions, or none where there is no real data."""
    folder = pathlib.Path(os.environ.get("WINNOW_REAL_DATA") or ROOT.parent / "shared" / "data") / "web_metadata"
    tables = [pq.read_table(path, columns=["text"]) for path in sorted(folder.glob("*.parquet"))]
    captions = [caption or "" for table in tables for caption in table["text"].to_pylist()]
    rng = np.random.default_rng(0)
    orders = [rng.permutation(len(captions)) for _ in range(-(-num_captions // max(len(captions), 1)))]
    return [captions[row] for order in orders for row in order][:num_captions]


def synthetic_captions(num_captions: int) -> list[str]:
    """Captions of 13 words of 2 to 10 letters."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = ["".join(rng.choice(letters, size=rng.integers(2, 11))) for _ in range(30_000)]
    weights = 1 / np.arange(1, len(words) + 1)
    chosen = rng.choice(len(words), size=(num_captions, 13), p=weights / weights.sum())
    return [" ".join(words[word] for word in row) for row in chosen]


def rate(function: Callable[[Sequence], Any], items: Sequence) -> float:
    """Items a second of CPU, in batches of the stage's size."""
    best_s = float("inf")
    function(items[:16])
    for _ in range(ROUNDS):
        start_s = time.process_time()
        for at in range(0, len(items), MinHash.batch_size):
            function(items[at : at + MinHash.batch_size])
        best_s = min(best_s, time.process_time() - start_s)
    return len(items) / best_s


def measured(captions: list[str], shingling: Shingling, scheme: str) -> dict[str, float]:
    """Signatures/s of each tool and ours' ratios to them; raises when ours are not datasketch's values."""
    split = [[shingle.encode() for shingle in python_shingles(caption, shingling)] for caption in captions]
    few = split[:SLOW_CAPTIONS]
    theirs = np.array([made.hashvalues for made in datasketch.MinHash.bulk(few, num_perm=128, scheme=scheme)])
    if not np.array_equal(signatures(captions[: len(few)], shingling, scheme), theirs):
        raise RuntimeError(f"{shingling}, {scheme}: values differ from datasketch's")
    found = {"ours": rate(lambda batch: signatures(batch, shingling, scheme), captions)}
    found["datasketch"] = rate(lambda batch: datasketch.MinHash.bulk(batch, num_perm=128, scheme=scheme), few)
    found["ratio_datasketch"] = found["ours"] / found["datasketch"]
    if scheme == "affine32":
        found["shingle_sets"] = rate(lambda batch: shingle_sets(batch, shingling), captions)
        try:
            from rensa import RMinHash
        except ImportError:
            return found
        digests = RMinHash.digest_matrix_from_token_sets
        found["rensa"] = rate(lambda batch: digests(batch, 128, 1), split)
        found["rensa_numpy"] = rate(lambda batch: np.array(digests(batch, 128, 1).to_rows(), np.uint32), split)
        found["ratio_rensa"] = found["ours"] / found["rensa"]
        found["ratio_rensa_numpy"] = found["ours"] / found["rensa_numpy"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=100_000)
    arguments = parser.parse_args()
    corpora = {"web": real_captions(arguments.captions), "synthetic": synthetic_captions(arguments.captions)}
    summary: dict[str, Any] = {"benchmark": "minhash", "captions": arguments.captions}
    for name, captions in corpora.items():
        for shingling in SHINGLINGS:
            for scheme in ("affine32", "legacy") if shingling == SHINGLINGS[0] else ("affine32",):
                if not captions:
                    print(f"{name}: no real data; set WINNOW_REAL_DATA", flush=True)
                    continue
                found = measured(captions, shingling, scheme)
                case = f"{name} {shingling.unit} {shingling.size} {scheme}"
                shown = ", ".join(f"{key} {value:.{2 if 'ratio' in key else 0}f}" for key, value in found.items())
                print(f"{case:28} {shown}", flush=True)
                summary[case] = found
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
