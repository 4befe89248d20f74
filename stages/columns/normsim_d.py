"""NormSim-D (VAS-D): rows that are least like the others are dropped, round after round.

Wang et al., "Variance Alignment Score", 2024 (arXiv 2402.02055: VAS-D), and "CLIPLoss and Norm-Based Data Selection
Methods for Multimodal Contrastive Learning", NeurIPS 2024 (arXiv 2405.19547: NormSim_2-D); code:
ypwang61/negCLIPLoss_NormSim.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.core import exchange
from pipeline.core.errors import ConfigError, WinnowError
from pipeline.core.passes import Pass, Passes
from stages.pool_blocks import Block
from stages.second_moment import SecondMoment, quadratic_forms
from stages.selection.strategies import exact_count
from stages.shard_values import FOUND, SHARDS, FittedStage, shard_names, shard_starts, write_by_shard
from stages.unit_vectors import concatenate, packed, pieces, read_vectors, unpacked

PIECE_ROWS = 250_000  # rows whose vectors a task holds while it copies them, unless a shard has more
ROUNDS_A_TASK = 24  # after which a killed run goes on
MORE_ROWS = 4096  # whose scores are looked at together once the first ones are
SLACK = 1e-6  # of the number of rows left: far more than all rounding of scores and bounds
FRACTION = 0.5
GATHERED_ROWS = 16_384  # whose vectors are in memory at once


@dataclass(frozen=True)
class NormSimD(FittedStage):
    """Whether the row is among those left, and the round that dropped it (from 1); those left have the next number.

    A round scores each row left by f^T S f, f its vector at length 1 and S = sum f f^T over the rows left, and drops
    those with the lowest scores: ceil((N - target) / iterations) of them, in the last round only what is left to drop.
    Scores are of vectors rounded to 2^-26 and count as float32; of equal ones the higher uid goes first, as a `top`
    would keep the lower ones. A larger subset needs no second run: `where: [normsim_d_round > 100]` are the rows left
    after 100 rounds.

    The published recipe cuts by CLIP score first: give this stage `within:` the strategy that does so, and a fraction
    of its rows. Differences to the published code: its first S is of the whole pool, before that cut; its S is of a
    random tenth of the rows; and where the rounded number of rows a round leaves fewer than the target before the last
    round, it fails. Both columns are null for a row without a vector (or with one of zeros).

    Args:
        embedding: a column of vectors; published: clip_image.
        fraction: of the rows with a vector (that are chosen by `within`, where it is given) that is left.
        rows: how many are left, instead of a fraction.
        iterations: rounds, at most; published: 168 for DataComp's small scale, 500 for medium.

    Cost: the column read once and copied (2 d + 24 bytes a row in the root, while it runs). Scores only fall as rows
    are dropped, by no more than the largest eigenvalue of what was dropped: rows whose last score exceeds the cut by
    more are not scored again, which changes no result and leaves about an eighth of 2 d^2 operations a row and round:
    for a million rows at 768 and 168 rounds a quarter of an hour of a core. Rounds are one task after the other, each
    of 24, with the cores that `cluster:` gives: meant for up to some ten million rows. Memory of a task: 60 bytes a row
    and 130 d^2 bytes; on an object store its vectors as well, 2 d bytes a row. While copying: 6 d bytes a row of
    PIECE_ROWS (1.2 GB at 768).
    """

    embedding: str = "clip_image"
    fraction: Annotated[float, Field(gt=0, le=1)] = FRACTION
    rows: Annotated[int, Field(ge=1)] | None = None
    iterations: Annotated[int, Field(ge=1, le=100_000)] = 168

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = {"normsim_d_kept": "bool", "normsim_d_round": "int32"}
    found_types: ClassVar[Mapping[str, pa.DataType]] = {"kept": pa.bool_(), "round": pa.int32()}

    def __post_init__(self) -> None:
        if self.rows is not None and self.fraction != FRACTION:
            raise ConfigError(f"normsim_d.fraction = {self.fraction}, expected nothing, as rows are given")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.embedding,)

    def target(self, num_rows: int) -> int:
        """How many of the rows are left."""
        if self.rows is not None:
            return min(self.rows, num_rows)
        return exact_count(self.fraction, num_rows)

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """{rows_with_vectors, kept, rounds}; a file of the rounds that rows were dropped in."""
        work = passes.work()
        parts = pieces(blocks, PIECE_ROWS)
        copied = work.run("copied", write_copied, [(block, self.embedding) for block in parts])
        moments = work.run("moments", write_moment, [(path,) for path in copied.paths])
        done = moments
        for number in range(0, self.iterations, ROUNDS_A_TASK):
            last = min(number + ROUNDS_A_TASK, self.iterations)
            before, done = done, work.run(f"rounds_{last:06d}", write_rounds, [(copied, done, self, number, last)])
            work.drop(before)
        found = passes.run(FOUND, write_found, [(copied, done, shard_starts(blocks))])
        return {**exchange.read_notes(found.paths), SHARDS: shard_names(blocks)}


def write_copied(block: Block, column: str, path: str) -> None:
    """None; writes (row, high, low, vector) of the block's rows with a vector."""
    vectors = concatenate(list(read_vectors(block, column)))
    exchange.write(path, {**vectors.columns(), "vector": packed(vectors.vector)})


def write_moment(copied_path: str, path: str) -> None:
    """None; writes the second moment of one file's rows, or nothing where it has none."""
    rows = _Rows([copied_path])
    moment = SecondMoment(rows.num_dimensions)
    for _, vectors in rows.gathered(np.arange(len(rows))):
        moment.add(vectors)
    _write_arrays(path, {"parts": moment.parts} if len(rows) else {})


def _write_arrays(path: str, arrays: Mapping[str, np.ndarray]) -> None:
    """None; the arrays are in the file, as bytes by name."""
    data = [np.ascontiguousarray(array).tobytes() for array in arrays.values()]
    exchange.write(path, {"name": pa.array(list(arrays), pa.string()), "data": pa.array(data, pa.large_binary())})


def _read_arrays(path: str) -> dict[str, bytes]:
    table = exchange.read([path])
    return {} if table is None else dict(zip(table["name"].to_pylist(), table["data"].to_pylist(), strict=True))


class _Rows:
    """The rows of copied files, one after the other; their vectors are mapped, not read."""

    def __init__(self, paths: Sequence[str]):
        tables = list(exchange.read_each(paths))
        self._vectors = [unpacked(table["vector"]) for table in tables]
        lengths = sorted({part.shape[1] for part in self._vectors})
        if len(lengths) > 1:
            raise WinnowError(f"normsim_d: vectors of {lengths[0]} to {lengths[-1]} values, expected one length")
        self.num_dimensions = lengths[0] if lengths else 0
        none = np.empty(0, np.uint64)
        self.row, self.high, self.low = (
            np.concatenate([none, *(table[name].to_numpy() for table in tables)]) for name in ("row", "high", "low")
        )
        self._starts = np.cumsum([0, *(len(part) for part in self._vectors)])

    def __len__(self) -> int:
        return len(self.row)

    def gathered(self, places: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(places, their vectors [n, d] float16): all of `places`, which ascend, GATHERED_ROWS or fewer at a time."""
        bounds = np.searchsorted(places, self._starts)
        for part, first, start, stop in zip(self._vectors, self._starts, bounds, bounds[1:], strict=False):
            for begin in range(start, stop, GATHERED_ROWS):
                own = places[begin : min(begin + GATHERED_ROWS, stop)]
                yield own, part[own - first]


@dataclass
class _State:
    """Where the rounds have come to.

    Attributes:
        rounds: [n] int32, the round that dropped each row; 0: it is left.
        bounds: [n] float64: a row's score plus what was `fallen` when it was found; -inf for one without a score yet.
        fallen: by how much scores may have fallen since the start: no score is below its bound less this.
        moment: of the rows left.
    """

    rounds: np.ndarray
    bounds: np.ndarray
    fallen: float
    moment: SecondMoment

    def drop_lowest(self, rows: _Rows, number: int, num_dropped: int) -> None:
        """None; one round."""
        dropped = self._lowest(rows, num_dropped)
        self.rounds[dropped] = number
        moment = SecondMoment(rows.num_dimensions)
        for _, vectors in rows.gathered(np.sort(dropped)):
            moment.add(vectors)
        self.moment.subtract(moment)
        self.fallen += float(np.linalg.eigvalsh(moment.matrix)[-1])

    def _lowest(self, rows: _Rows, num: int) -> np.ndarray:
        """[num] places of the rows with the lowest scores, of equal ones those with the highest uids.

        The rows with the lowest bounds are scored first. The highest of the num lowest scores so far is a cut that only
        falls: rows whose bounds exceed it are above it, whatever their scores.
        """
        matrix = self.moment.matrix
        left = np.flatnonzero(self.rounds == 0)
        least = self.bounds[left] - self.fallen - SLACK * len(rows)
        first = np.argpartition(least, num - 1)[:num]
        places = np.sort(left[first])
        scores = self._score(rows, places, matrix)
        least[first] = np.inf
        more = np.flatnonzero(least <= scores.max())
        more = more[np.argsort(least[more], kind="stable")]
        start, chunk = 0, max(num, MORE_ROWS)
        while start < len(more) and least[more[start]] <= scores.max():
            own = np.sort(left[more[start : start + chunk]])
            places, scores = np.concatenate([places, own]), np.concatenate([scores, self._score(rows, own, matrix)])
            lowest = scores <= np.partition(scores, num - 1)[num - 1]
            places, scores = places[lowest], scores[lowest]
            start += chunk
        return places[np.lexsort((~rows.low[places], ~rows.high[places], scores))[:num]]

    def _score(self, rows: _Rows, places: np.ndarray, matrix: np.ndarray) -> np.ndarray:
        """[n] float32 scores of the rows at these places, which ascend; their bounds are set."""
        found = [np.empty(0)]
        for own, vectors in rows.gathered(places):
            found.append(quadratic_forms(vectors, matrix))
            self.bounds[own] = found[-1] + self.fallen
        return np.concatenate(found).astype(np.float32)


def write_rounds(copied: Pass, before: Pass, stage: NormSimD, first: int, last: int, path: str) -> None:
    """None; writes the state after round number `last`, as it is after `first` of them.

    Args:
        before: the pass of that state, or for first = 0 of the second moments of all rows.
    """
    rows = _Rows(copied.paths)
    if not len(rows):
        _write_arrays(path, {})
        return
    state = _read_state(before.path(0), rows) if first else _first_state(before, rows)
    target = stage.target(len(rows))
    at_once = -(-(len(rows) - target) // stage.iterations)
    left = int((state.rounds == 0).sum())
    for number in range(first + 1, last + 1):
        num_dropped = min(at_once, left - target)
        if not num_dropped:
            break
        state.drop_lowest(rows, number, num_dropped)
        left -= num_dropped
    arrays = {"rounds": state.rounds, "bounds": state.bounds, "fallen": np.array([state.fallen])}
    _write_arrays(path, {**arrays, "parts": state.moment.parts})


def _first_state(moments: Pass, rows: _Rows) -> _State:
    moment = SecondMoment(rows.num_dimensions)
    for path in moments.paths:
        if arrays := _read_arrays(path):
            moment.add_moment(_moment(arrays["parts"], rows))
    return _State(np.zeros(len(rows), np.int32), np.full(len(rows), -np.inf), 0.0, moment)


def _read_state(path: str, rows: _Rows) -> _State:
    arrays = _read_arrays(path)
    rounds, bounds = np.frombuffer(arrays["rounds"], np.int32).copy(), np.frombuffer(arrays["bounds"]).copy()
    return _State(rounds, bounds, float(np.frombuffer(arrays["fallen"])[0]), _moment(arrays["parts"], rows))


def _moment(data: bytes, rows: _Rows) -> SecondMoment:
    shape = 3, rows.num_dimensions, rows.num_dimensions
    return SecondMoment(rows.num_dimensions, np.frombuffer(data).reshape(shape))


def write_found(copied: Pass, done: Pass, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, kept, round) of all rows with a vector, by shard.

    Args:
        starts: see stages.shard_values.shard_starts.
    """
    rows = _Rows(copied.paths)
    arrays = _read_arrays(done.path(0))
    rounds = np.frombuffer(arrays["rounds"], np.int32) if arrays else np.empty(0, np.int32)
    kept = rounds == 0
    num_rounds = int(rounds.max(initial=0))
    columns = {"kept": kept, "round": np.where(kept, np.int32(num_rounds + 1), rounds)}
    notes = {"rows_with_vectors": len(rows), "kept": int(kept.sum()), "rounds": num_rounds}
    write_by_shard(path, rows.row, columns, starts, notes)
