"""Soft-cap sampling: how often each row is drawn when every draw makes a row less likely to be drawn again.

Shechter and Carmon, "Filter Like You Test: Data-Driven Data Filtering for CLIP Pretraining", 2025 (arXiv 2503.08805).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
from pydantic import Field

from pipeline.core import exchange
from pipeline.core.passes import Pass, Passes
from stages.base import Stage
from stages.compiled import Compiled
from stages.pool_blocks import Block
from stages.row_scores import NUMBERS, check_type, read_scores, write_scores
from stages.selection import uids
from stages.selection.strategies import exact_count
from stages.shard_values import FOUND, SHARDS, FittedStage, shard_names, shard_starts, write_by_shard

DRAW_STREAM = 23  # of the seed: see uids.hash64
PUBLISHED_ROUNDS = 1280  # 128,000,000 draws at 100,000 a round
SCREEN_ROWS = 1 << 20  # whose screens are computed at once


@dataclass(frozen=True)
class SoftCap(FittedStage):
    """How often the row is drawn by soft-cap sampling (SCS). As a strategy: `repeat: {column: soft_cap_draws, cap: N}`.

    Round after round, `round_draws` different rows are drawn, one after the other, each with a probability in
    proportion to exp(logit) among those not yet drawn in the round; then their logits fall by `penalty`. A row's logit
    is scale x score at first. The draws of all rows sum to floor(samples_fraction x rows), counting the rows that are
    ok and have a finite score; the others are null.

    Each round gives every row noise from a hash of uid, seed and round (Gumbel's distribution) and takes the rows whose
    logit and noise are highest in sum, equal ones by uid: the same law as drawing without replacement, with the same
    rows whatever the order of rows and shards (Kool et al., "Stochastic Beams and Where to Find Them", 2019).

    Args:
        score: the column that says how good a row is.
        scale: 1, as published for M-FLYT's scores, which are logits. For cosines such as clip_score it would leave
            hardly any difference between rows: 100, the inverse of CLIP's temperature, makes logits of them.
        samples_fraction: draws in all, as a multiple of the rows with a score; published: 1.
        penalty: what a logit loses by a draw; published: 0.15.
        round_draws: rows drawn in a round; null: as many as make 1280 rounds, as published for 128 million draws.
        seed: of the noise.

    Cost: the column read once, then one task with 60 bytes of memory a row and 3 to 4 ns a row and round: a million
    rows take 4 s, 12.8 million a minute and 0.8 GB.
    """

    score: str
    scale: Annotated[float, Field(gt=0, le=1e6)] = 1.0
    samples_fraction: Annotated[float, Field(gt=0, le=1000)] = 1.0
    penalty: Annotated[float, Field(ge=0, le=1e6)] = 0.15
    round_draws: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = {"soft_cap_draws": "int32"}
    found_types: ClassVar[Mapping[str, pa.DataType]] = {"draws": pa.int32()}

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.score,)

    def check_needs(self, types: Mapping[str, str], owners: Mapping[str, Stage]) -> None:
        check_type("score", self.score, types[self.score], NUMBERS)

    def fit(self, blocks: Sequence[Block], passes: Passes) -> Mapping[str, Any]:
        """Counts of rows, rounds and draws; a file of the draws of each row."""
        scored = passes.work().run("scored", write_scored, [(block, self.score) for block in blocks])
        found = passes.run(FOUND, write_draws, [(scored, self, shard_starts(blocks))])
        return {**exchange.read_notes(found.paths), SHARDS: shard_names(blocks)}


def write_scored(block: Block, column: str, path: str) -> None:
    """None; writes (row, high, low, score) of the block's rows with a score."""
    write_scores(path, read_scores(block, column))


def write_draws(scored: Pass, stage: SoftCap, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, draws) of all rows with a score, by shard."""
    table = exchange.read(scored.paths)
    if table is None:
        exchange.write(path, {}, notes={"rows_with_scores": 0, "rounds": 0, "draws": 0})
        return
    row, high, low, score = (table[name].to_numpy() for name in ("row", "high", "low", "score"))
    by_uid = np.lexsort((low, high))  # then the first of equal ones is that of the lowest uid
    uid = np.stack([high[by_uid], low[by_uid]], axis=1)
    num_draws = exact_count(stage.samples_fraction, len(row))
    round_draws = stage.round_draws or max(1, -(-num_draws // PUBLISHED_ROUNDS))
    logits = stage.scale * score[by_uid]
    drawn, rounds = draw(logits, uids.hash64(uid, stage.seed, DRAW_STREAM), num_draws, round_draws, stage.penalty)
    draws = np.empty_like(drawn)
    draws[by_uid] = drawn
    notes = {"rows_with_scores": len(row), "rounds": rounds, "draws": num_draws}
    write_by_shard(path, row, {"draws": draws}, starts, notes)


def draw(
    logits: np.ndarray, hashes: np.ndarray, num_draws: int, round_draws: int, penalty: float
) -> tuple[np.ndarray, int]:
    """([n] int32, rounds): how often each row is drawn.

    A round finds its highest keys (logit + noise) without computing all: with a `level` that no more than a few times
    round_draws keys exceed, a row's key can exceed it only if the hash is small enough, for which one comparison of its
    high 32 bits suffices. Where too few keys exceed the level, it is lowered, and the round is done again.

    Args:
        logits: [n] float64, finite; of equal keys, the first one is higher.
        hashes: [n] uint64, the source of the rows' noise.
        num_draws, round_draws: in all, and in a round; the last round has the rest.
    """
    draws = np.zeros(len(logits), np.int32)
    round_draws = min(round_draws, len(logits))
    left, number = num_draws, 0
    level = _log_sum_exp(logits) - np.log(max(1, round_draws)) - 1
    screens = _screens(logits, draws, penalty, level)
    passing = np.empty(len(logits), np.int32)
    while left:
        wanted = min(round_draws, left)
        round_hash = uids.mix(np.array([number + 1], np.uint64))[0]
        step = 1.0
        while True:
            places = passing[: _passing(hashes, round_hash, screens, passing)]
            keys = logits[places] - penalty * draws[places] + _noise(uids.mix(hashes[places] ^ round_hash))
            certain = keys > level + 1e-6 * max(1.0, abs(level))  # beyond any rounding of the screens
            if certain.sum() >= wanted or len(places) == len(logits):
                break
            level -= step  # then e times as many keys exceed it, while they are few
            step *= 2
            screens = _screens(logits, draws, penalty, level)
        draws[places[np.lexsort((places, -keys))[:wanted]]] += 1
        left -= wanted
        number += 1
    return draws, number


def _noise(hashes: np.ndarray) -> np.ndarray:
    """[n] float64 of Gumbel's distribution, larger for smaller hashes: -log(-log(1 - v)), v uniform in (0, 1)."""
    uniform = ((hashes >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
    return -np.log(-np.log1p(-uniform))


def _screens(logits: np.ndarray, draws: np.ndarray, penalty: float, level: float) -> np.ndarray:
    """[n] uint32: the high bits that a row's hash has at most if its key is at least `level`."""
    found = np.empty(len(logits), np.uint32)
    for start in range(0, len(logits), SCREEN_ROWS):
        own = slice(start, start + SCREEN_ROWS)
        with np.errstate(over="ignore", under="ignore"):
            chance = -np.expm1(-np.exp(logits[own] - penalty * draws[own] - level))
        found[own] = np.minimum(chance * 2.0**32 + 1, 2.0**32 - 1).astype(np.uint32)
    return found


def _log_sum_exp(logits: np.ndarray) -> float:
    highest = logits.max()
    with np.errstate(under="ignore"):
        return float(highest + np.log(np.exp(logits - highest).sum()))


def _passing_loop(hashes, round_hash, screens, places):
    """How many rows pass their screens in the round; they are in `places`, ascending."""
    num = 0
    for at in range(len(hashes)):
        mixed = hashes[at] ^ round_hash  # as uids.mix does
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
        places[num] = at
        num += (mixed >> np.uint64(32)) <= screens[at]
    return num


_passing = Compiled(_passing_loop, "int64(uint64[::1], uint64, uint32[::1], int32[::1])")
