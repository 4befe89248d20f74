"""MetaCLIP's balancing: with what probability a pair is kept so that frequent concepts do not crowd out rare ones.

Xu et al., "Demystifying CLIP Data", ICLR 2024 (arXiv 2309.16671), algorithm 1; its code is at
github.com/facebookresearch/MetaCLIP (metaclip/substr_matching.py, balancing.py, curation/curate.py).

    counts         block by block: (entry, how many rows have it), by range of entries
    totals         range by range: how many rows of the pool have each entry
    probabilities  with what probability each entry keeps a row that has it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field

from pipeline.core import exchange, storage
from pipeline.core.errors import ConfigError, one_line
from pipeline.core.passes import Pass, Passes
from stages import entry_index
from stages.base import Batch, LoadContext, Stage
from stages.compiled import Compiled
from stages.pool_blocks import Block

PROBABILITIES = "probabilities"  # the pass that load() reads
RANGE_ENTRIES = 65_536  # summed by one task
PIECE_ROWS = 100_000  # whose captions are matched at once


@dataclass(frozen=True)
class MetaClip(Stage):
    """The probability with which balancing keeps the row, and how many different entries its caption has.

    An entry is in a caption when, with a blank at both ends, it stands in the caption as stages.entry_index.spaced
    gives it: a blank at both ends and on either side of `, . ; : ? !` and the backtick. As in MetaCLIP's code capitals
    count, and an entry with such a mark inside a word (St. Louis) is never found. With count(e) rows of the pool that
    have the entry e, it keeps each with probability min(1, t / count(e)), and

        metaclip_probability = 1 - product of (1 - min(1, t / count(e))) over the caption's entries,

    0 where it has none. MetaCLIP's subset is the strategy `repeat: {column: metaclip_probability, cap: 1}`, which draws
    by a hash of uid and seed. Entries that are listed twice count once. MetaCLIP 2's matching of languages without
    blanks is not done.

    Args:
        metadata: the entries: a JSON list where the name ends in .json (MetaCLIP's metadata.json), else a text file
            with one a line.
        threshold: t; 20,000 for MetaCLIP-400M, 170,000 for its larger sets.
        tail_fraction: gives t for a pool of another size: the count, of all entries' counts in order, up to which
            entries have this share of all matches (MetaCLIP's p_to_t), but at least 1. Exactly one of both is given.
            The record's `tail_fraction` is the share of the entries below t (its t_to_p).

    Cost: captions matched twice, about 100,000 a second and core; a block exchanges at most 16 bytes an entry. Memory
    of a task: about 400 bytes an entry (200 MB for MetaCLIP's), and 100,000 captions.
    """

    metadata: str
    threshold: Annotated[int, Field(ge=1)] | None = None
    tail_fraction: Annotated[float, Field(gt=0, lt=1)] | None = None

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "caption"
    adds: ClassVar[Mapping[str, str]] = {"metaclip_probability": "float32", "metaclip_matches": "int32"}
    assets: ClassVar[Mapping[str, str]] = {
        "metadata": "metadata.json of https://github.com/facebookresearch/MetaCLIP (500,000 entries), or your own list"
    }
    whole_pool: ClassVar[bool] = True
    batch_size: ClassVar[int] = 4096

    def __post_init__(self) -> None:
        if (self.threshold is None) == (self.tail_fraction is None):
            given = f"threshold = {self.threshold}, tail_fraction = {self.tail_fraction}"
            raise ConfigError(f"metaclip: {given}, expected exactly one of both")

    def external_files(self) -> Mapping[str, str]:
        return {"metadata": self.metadata}

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """Numbers of entries and matches, t, and its share of the tail; a file of each entry's probability."""
        work = passes.work()
        num_entries = len(read_entries(self.metadata))
        counts = work.run("counts", write_counts, [(block, self.metadata) for block in blocks])
        firsts = range(0, num_entries, RANGE_ENTRIES)
        items = [
            (counts, number, first, min(RANGE_ENTRIES, num_entries - first)) for number, first in enumerate(firsts)
        ]
        totals = work.run("totals", write_totals, items)
        found = passes.run(PROBABILITIES, write_probabilities, [(totals, self.threshold, self.tail_fraction)])
        notes = exchange.read_notes(found.paths)
        tail = notes["tail_matches"] / notes["matches"] if notes["matches"] else None
        return {**notes, "tail_fraction": tail}

    def load(self, context: LoadContext) -> Any:
        """(index of the entries, [entries] float64: the probability that each does not keep a row)."""
        table = exchange.read([Pass(storage.join(context.fit_path or "", PROBABILITIES), 1).path(0)])
        assert table is not None  # there is an entry
        return entry_index.build(read_entries(self.metadata)), 1 - table["probability"].to_numpy()

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        index, lost = state
        offsets, entries = index.matches(batch.columns["caption"])
        return {
            "metaclip_probability": (1 - _products(lost, offsets, entries)).astype(np.float32),
            "metaclip_matches": np.diff(offsets).astype(np.int32),
        }


def read_entries(path: str) -> list[str]:
    """The file's different entries in their order, empty ones left out. Raises ConfigError for another file."""
    place = f"stages.metaclip.metadata = {path}"
    try:
        text = storage.read_bytes(path).decode("utf-8-sig")
        entries = json.loads(text) if path.endswith(".json") else text.replace("\r\n", "\n").split("\n")
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{place}, expected a JSON list, or a text of one entry a line: {one_line(error)}") from error
    if not isinstance(entries, list):
        raise ConfigError(f"{place} is a JSON {type(entries).__name__}, expected a list of entries")
    for entry in entries:
        if not isinstance(entry, str):
            raise ConfigError(f"{place}: entry {str(entry)[:80]}, expected text")
    found = list(dict.fromkeys(entry for entry in entries if entry))
    if not found:
        raise ConfigError(f"{place} has no entry, expected at least one")
    return found


def write_counts(block: Block, metadata: str, path: str) -> None:
    """None; writes (entry, rows of the block that have it), by range of entries."""
    entries = read_entries(metadata)
    index = entry_index.build(entries)
    counts = np.zeros(len(entries), np.int64)
    for table in block.tables(["ok", "caption"]):
        captions = table["caption"].filter(table["ok"])
        for start in range(0, len(captions), PIECE_ROWS):
            texts = captions.slice(start, PIECE_ROWS).to_pylist()
            counts += np.bincount(index.matches(texts)[1], minlength=len(entries))
    entry = np.flatnonzero(counts)
    exchange.write(path, {"entry": entry, "count": counts[entry]}, entry // RANGE_ENTRIES)


def write_totals(counts: Pass, number: int, first: int, num_entries: int, path: str) -> None:
    """None; writes (count): of each entry of a range the rows of the pool that have it."""
    total = np.zeros(num_entries, np.int64)
    for table in exchange.read_each(counts.paths, number):
        total[table["entry"].to_numpy() - first] += table["count"].to_numpy()  # each once a file
    exchange.write(path, {"count": total})


def write_probabilities(totals: Pass, threshold: int | None, tail_fraction: float | None, path: str) -> None:
    """None; writes (count, probability) of all entries in their order."""
    table = exchange.read(totals.paths)
    assert table is not None  # there is an entry
    count = table["count"].to_numpy()
    t = threshold or tail_threshold(count, tail_fraction or 0)
    notes = {
        "entries": len(count),
        "entries_found": int((count > 0).sum()),
        "matches": int(count.sum()),
        "tail_matches": int(count[count < t].sum()),
        "threshold": t,
    }
    exchange.write(path, {"count": count, "probability": t / np.maximum(count, t)}, notes=notes)


def tail_threshold(count: np.ndarray, tail_fraction: float) -> int:
    """The count t, at least 1, at which the counts in ascending order add up most nearly to this share of them all."""
    ordered = np.sort(count)
    if not ordered[-1]:
        return 1
    share = np.cumsum(ordered) / ordered.sum()
    return max(1, int(ordered[np.abs(share - tail_fraction).argmin()]))


def _multiply(values, offsets, places):
    """[n] float64: product of values[places[k]] over offsets[i] <= k < offsets[i + 1], in that order."""
    products = np.ones(len(offsets) - 1)
    for row in range(len(products)):
        for at in range(offsets[row], offsets[row + 1]):
            products[row] *= values[places[at]]
    return products


_products = Compiled(
    _multiply,
    'float64[::1](Array(float64, 1, "C", readonly=True), Array(int64, 1, "C", readonly=True), '
    'Array(int64, 1, "C", readonly=True))',
)
