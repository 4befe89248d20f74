"""The index of a train set, as a training and its checker read it: places, captions and uids. No torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.core import storage
from pipeline.core.errors import WinnowError

INDEX_FILE = "index.parquet"


@dataclass(frozen=True)
class TrainSet:
    """Where each entry's image is, and its caption. In memory: the captions and some 30 bytes an entry."""

    path: str
    tar_names: list[str]
    tar_of_entry: np.ndarray
    offset_bytes: np.ndarray
    size_bytes: np.ndarray
    captions: pa.LargeStringArray  # one array: taking from a chunked one joins all of its chunks each time

    def __len__(self) -> int:
        return len(self.offset_bytes)


def open_train_set(path: str) -> TrainSet:
    """The train set in this folder. Raises WinnowError when it has no index, or no entries."""
    tars = _column(path, "tar").combine_chunks().dictionary_encode()
    if not len(tars):
        raise WinnowError(f"{storage.join(path, INDEX_FILE)}: no entries, expected at least one to train on")
    return TrainSet(
        path,
        tars.dictionary.to_pylist(),
        tars.indices.to_numpy(),
        _column(path, "image_offset_bytes").to_numpy(),
        _column(path, "image_size_bytes").to_numpy(),
        _column(path, "caption").cast(pa.large_string()).combine_chunks(),
    )


def index_digest(path: str) -> str:
    """sha256 of the train set's index, which lists its entries in order: what a ledger's numbers refer to.

    Raises WinnowError when it has none.
    """
    place = storage.join(path, INDEX_FILE)
    try:
        return storage.sha256_file(place)
    except FileNotFoundError as error:
        raise WinnowError(f"{place} is missing, expected the index of a train set") from error


def pairs(path: str) -> pa.DictionaryArray:
    """The uid of each entry, in order; the dictionary holds the distinct ones."""
    return _column(path, "uid").combine_chunks().dictionary_encode()


def count_repeats(path: str, times_seen: np.ndarray) -> dict[str, int]:
    """{unique_uids, max_repeats}: distinct pairs that were seen, and how often the most frequent one was."""
    counts = np.bincount(pairs(path).indices.to_numpy(), weights=times_seen)
    return {"unique_uids": int((counts > 0).sum()), "max_repeats": int(counts.max())}


def _column(path: str, name: str) -> pa.ChunkedArray:
    place = storage.join(path, INDEX_FILE)
    try:
        with storage.open_read(place) as file:
            return pq.read_table(file, columns=[name])[name]
    except FileNotFoundError as error:
        raise WinnowError(f"{place} is missing, expected the index of a train set") from error
