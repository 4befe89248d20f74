"""Which rows of the pool have an image that is also in an evaluation set (or another reference), and which image it is.

`fit` leaves two tables beside the columns, one for each side of a match:

    fit/matches/00000.parquet ...   uid, reference, item, reference_uid, method, distance: by uid, the nearest first
    fit/items.parquet               reference, item, reference_uid, rows, uid, method, distance: of each image with a
                                    match, how many rows of the pool are like it, and the nearest of them

`item` is what eval calls the image of a task (`shard/key`), so that a task's predictions can be looked up by it; of
another reference, whose rows have no such name, it is the uid.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pydantic import Field

from pipeline.core import exchange, pool, storage
from pipeline.core.errors import ConfigError, WinnowError
from pipeline.core.passes import Pass, Passes
from pipeline.core.pool import Shard
from stages.base import Batch
from stages.ingest.samples import ORIGINAL_FILE, ORIGINAL_NAME
from stages.pool_blocks import Block
from stages.selection import uids
from stages.shard_values import SHARDS, FittedStage, shard_names, shard_starts, write_by_shard
from stages.unit_vectors import pieces, read_vectors

TASKS = "tasks"  # what `against` says for the images of all tasks
METHODS = ("sha256", "pixels_sha256", "image_phash", "embedding")  # the surest first
MATCHES, ITEMS = "matches", "items.parquet"
NEAREST = "nearest"  # the pass that load() reads
PIECE_ROWS = 250_000  # of a task, unless a shard has more
PARTITION_ROWS = 4_000_000  # of the pool, whose matches are sorted at once
RUN_ROWS = 4096  # that are compared at once
MOST_LISTED = 8  # matches of a row that are listed; those of an image are counted, however many


@dataclass(frozen=True)
class Contamination(FittedStage):
    """Whether the row's image is like one of the evaluation images; in which task or reference the nearest one is.

    Images are compared by the sha256 of their bytes, then of their pixels, then by pHash, and with `embedding` by the
    cosine of two vectors; `contamination_method` is the first of these by which the two match. The distance is 0 for
    equal hashes, a number of bits for pHash, and 1 - cosine for vectors. Exact: every row is compared with every image.
    Of equally near images the one first by its reference's name, then by uid, counts. Nothing is dropped: a strategy
    says `where: [is_contaminated == false]`. A flat picture has no pHash: only its equals are found.

    Args:
        against: tasks: the images of all tasks of `eval:`; or names of `references:`.
        phash_bits: of 64 that may differ; null: pHashes are not compared.
        hashes: the stage that the hashes come from, by its name or its `as:`.
        embedding: a column of vectors, such as clip_image; empty: none is compared.
        min_cosine: the least cosine of a match; what is right differs from model to model.

    Cost: for n rows and m images five columns read once, 60 bytes an image loaded by each task, and for 4 bits about
    3 s of a core for a million rows and 200,000 images; with vectors of d dimensions n m d multiplications in float32
    (an hour of a core for as many at 512), and 6 d bytes an image. Exchanged: about 60 bytes a match.
    """

    against: Annotated[tuple[str, ...], Field(strict=False, min_length=1)] | str = TASKS
    phash_bits: Annotated[int, Field(ge=0, le=12)] | None = 4
    hashes: str = "hashes"
    embedding: str = ""
    min_cosine: Annotated[float, Field(gt=0, le=1)] | None = None

    version: ClassVar[int] = 1
    adds: ClassVar[Mapping[str, str]] = {
        "is_contaminated": "bool",
        "contaminated_by": "string",
        "contamination_method": "string",
        "contamination_distance": "float32",
    }
    found_in: ClassVar[str] = NEAREST
    found_types: ClassVar[Mapping[str, pa.DataType]] = {
        "reference": pa.string(),
        "method": pa.string(),
        "distance": pa.float32(),
    }
    uses_references: ClassVar[bool] = True
    may_work_within: ClassVar[bool] = False  # the report tells of the pool's contaminated rows

    def __post_init__(self) -> None:
        if isinstance(self.against, str) and self.against != TASKS:
            raise ConfigError(f"contamination.against = {self.against}, expected {TASKS} or a list of references")
        if bool(self.embedding) != (self.min_cosine is not None):
            raise ConfigError("contamination: expected embedding and min_cosine together")

    @property
    def needs(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(column for method, column in self.compared().items() if method != "sha256")

    def compared(self) -> dict[str, str]:
        """{method: column} of what is compared."""
        prefix = "" if self.hashes == "hashes" else f"{self.hashes}_"
        columns = {"sha256": "sha256", "pixels_sha256": f"{prefix}pixels_sha256"}
        if self.phash_bits is not None:
            columns["image_phash"] = f"{prefix}image_phash"
        return columns | ({"embedding": self.embedding} if self.embedding else {})

    def fit_against(
        self, blocks: Sequence[Block], references: Mapping[str, Sequence[Block]], passes: Passes
    ) -> Mapping[str, Any]:
        """{contaminated_rows, rows_by_method, references: {name: counts}}; the tables are in the folder."""
        work = passes.work()
        items = [(name, block, self) for name in sorted(references) for block in references[name]]
        images = work.run("images", write_images, [(work.run("rows", write_rows, items),)])
        parts = pieces(blocks, PIECE_ROWS)
        num_partitions = max(1, -(-sum(block.rows for block in blocks) // PARTITION_ROWS))
        seen = Pass(storage.join(work.folder, "seen"), len(parts))
        matches = work.run(
            "matches",
            write_matches,
            [(block, self, images, num_partitions, seen.path(block.number)) for block in parts],
        )
        starts = shard_starts(blocks)
        nearest = passes.run(NEAREST, write_nearest, [(path, images, starts) for path in matches.paths])
        tables = [storage.join(passes.folder, MATCHES, f"{number:05d}.parquet") for number in range(num_partitions)]
        work.run("listed", write_listed, [(matches, images, number, path) for number, path in enumerate(tables)])
        found = work.run("items", write_items, [(seen, images, storage.join(passes.folder, ITEMS))])
        made = (images, matches, found)  # whose notes count, by reference, images, rows and matched images
        counts = {name: count for one in made for name, count in exchange.read_notes(one.paths).items()}
        rows = exchange.read_notes(nearest.paths)
        by_method = {method: rows.get(method, 0) for method in self.compared()}
        return {
            "contaminated_rows": sum(by_method.values()),
            "rows_by_method": by_method,
            "references": {
                name: {
                    **{what: counts.get(_note(what, name), 0) for what in ("images", "not_compared", "rows")},
                    "matched": sum(counts.get(_note(method, name), 0) for method in METHODS),
                    "matched_by_method": {method: counts.get(_note(method, name), 0) for method in self.compared()},
                }
                for name in sorted(references)
            },
            SHARDS: shard_names(blocks),
        }

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        found = state.of(batch)
        columns = (found["reference"].is_valid(), found["reference"], found["method"], found["distance"])
        return dict(zip(self.adds, columns, strict=True))


def _note(what: str, name: str) -> str:
    return f"{what} {name}"


def write_rows(name: str, block: Block, stage: Contamination, path: str) -> None:
    """None; writes (reference, item, ok, high, low, and a column a method) of a reference's rows."""
    tables = []
    for shard in block.shards:
        there = _has_names(block, shard)
        compared = stage.compared()
        columns = [column for method, column in compared.items() if method != "embedding"]
        table = block.table(shard, ["uid", "ok", *columns, *((ORIGINAL_FILE, ORIGINAL_NAME) if there else ())])
        uid = uids.parse(table["uid"], f"{name}: pool shard {shard.name}")
        found = {
            "reference": pa.array([name] * len(table), pa.string()),
            "item": _items(table) if there else table["uid"],
            "ok": table["ok"],
            "high": uid[:, 0],
            "low": uid[:, 1],
        }
        found |= {method: table[column] for method, column in compared.items() if method != "embedding"}
        if stage.embedding:
            found["embedding"] = _vectors(block, shard, stage.embedding)
        tables.append(pa.table(found))
    whole = pa.concat_tables(tables)
    exchange.write(path, {column: whole[column] for column in whole.column_names})


def _has_names(block: Block, shard: Shard) -> bool:
    """Whether the reference's rows keep the names that their images have in their tars, as a task's do."""
    with storage.open_read(storage.join(block.pool_path, f"{shard.name}.parquet")) as file:
        return {ORIGINAL_FILE, ORIGINAL_NAME} <= set(pq.read_schema(file).names)


def _items(table: pa.Table) -> list[str]:
    """`shard/key` as eval names an image: a key ends at its first dot."""
    found = []
    for file, name in zip(table[ORIGINAL_FILE].to_pylist(), table[ORIGINAL_NAME].to_pylist(), strict=True):
        folder, slash, base = (name or "").rpartition("/")
        found.append(f"{storage.name_of(file).removesuffix('.tar')}/{folder}{slash}{base.partition('.')[0]}")
    return found


def _vectors(block: Block, shard: Shard, column: str) -> pa.Array:
    """The bytes of each row's float16 vector; null where it has none that can be compared."""
    (own,) = read_vectors(replace(block, shards=(shard,), first_row=0), column)
    found: list[bytes | None] = [None] * shard.rows
    for row, vector in zip(own.row.tolist(), own.vector, strict=True):
        found[row] = vector.tobytes()
    return pa.array(found, pa.binary())


def write_images(rows: Pass, path: str) -> None:
    """None; writes the rows that are ok, one an item (several captions share an image), by reference and uid."""
    table = exchange.read(rows.paths)
    assert table is not None  # a pool has rows
    order = [("reference", "ascending"), ("high", "ascending"), ("low", "ascending")]
    names = table["reference"].unique().to_pylist()
    ok = table.filter(table["ok"]).sort_by(order)
    first = ok.append_column("place", pa.array(np.arange(len(ok)))).group_by(["reference", "item"])
    images = ok.take(np.sort(first.aggregate([("place", "min")])["place_min"].to_numpy()))
    both = table.group_by(["reference", "item"]).aggregate([])
    notes = {}
    for name in names:
        compared = pc.sum(pc.equal(images["reference"], name)).as_py() or 0
        notes[_note("images", name)] = compared
        notes[_note("not_compared", name)] = (pc.sum(pc.equal(both["reference"], name)).as_py() or 0) - compared
    columns = {column: images[column] for column in images.column_names if column != "ok"}
    exchange.write(path, columns, notes=notes)


class _Images:
    """The images of all references, by reference and uid, ready to be compared with rows."""

    def __init__(self, stage: Contamination, images: Pass):
        from stages.duplicates.nearest_reference import CloseHashes, EqualKeys, NearVectors

        table = exchange.read(images.paths)
        if table is None:
            raise WinnowError("contamination: no image of any reference can be used, expected at least one")
        self.num = len(table)
        encoded = table["reference"].combine_chunks().dictionary_encode()
        self.names: list[str] = encoded.dictionary.to_pylist()
        self.reference = encoded.indices.to_numpy().astype(np.int64)  # [num] of each image, its name's number
        self._stage = stage
        self._equal = {method: EqualKeys(table[method]) for method in stage.compared() if method.endswith("sha256")}
        self._close = None
        if stage.phash_bits is not None:
            known, hashes = _hashes(table["image_phash"])
            self._close = CloseHashes(hashes, known, stage.phash_bits)
        self._near = None
        if stage.embedding and table["embedding"].null_count < self.num:
            known = np.flatnonzero(table["embedding"].is_valid())
            vectors = table["embedding"].drop_null().to_pylist()
            if len(set(map(len, vectors))) > 1:
                raise WinnowError(
                    f"contamination: column {stage.embedding}: references have vectors of several lengths"
                )
            self._near = NearVectors(
                np.frombuffer(b"".join(vectors), np.float16).reshape(len(vectors), -1), known, stage.min_cosine
            )

    def pairs(self, block: Block, shard: Shard) -> Iterator[dict[str, np.ndarray]]:
        """Of a run of the shard's rows with any match: {row in the shard, image, method, distance}, each pair once."""
        compared = self._stage.compared()
        columns = {method: column for method, column in compared.items() if method != "embedding"}
        table = block.table(shard, ["ok", *columns.values()])
        ok = table["ok"].to_numpy()
        vectors = None
        if self._near is not None:
            (vectors,) = read_vectors(replace(block, shards=(shard,), first_row=0), compared["embedding"])
            if len(vectors) and vectors.vector.shape[1] != self._near.num_dimensions:
                raise WinnowError(
                    f"contamination: column {compared['embedding']}: vectors of {vectors.vector.shape[1]} values in "
                    f"the pool, {self._near.num_dimensions} in the references; expected one length"
                )
        for start in range(0, shard.rows, RUN_ROWS):
            run = table.slice(start, RUN_ROWS)
            rows = np.flatnonzero(ok[start : start + RUN_ROWS])
            run = run.take(rows)
            rows += start
            found = [
                (rows[row], image, METHODS.index(method), distance)
                for method, keys in self._equal.items()
                for row, image, distance in [keys.pairs(run[columns[method]].combine_chunks())]
            ]
            if self._close is not None:
                known, hashes = _hashes(run[columns["image_phash"]])
                row, image, distance = self._close.pairs(hashes)
                found.append((rows[known[row]], image, METHODS.index("image_phash"), distance))
            if vectors is not None:
                first, last = np.searchsorted(vectors.row, [start, start + RUN_ROWS])
                row, image, distance = self._near.pairs(vectors.vector[first:last])
                own = vectors.row[first:last].astype(np.int64)
                found.append((own[row], image, METHODS.index("embedding"), distance))
            if any(len(row) for row, *_ in found):
                yield _surest(found)


def _surest(found: Sequence[tuple]) -> dict[str, np.ndarray]:
    """Each pair of a row and an image once, by the surest method; of a row the nearest image first."""
    row, image, distance = (np.concatenate([pairs[at] for pairs in found]) for at in (0, 1, 3))
    method = np.concatenate([np.full(len(pairs[0]), pairs[2], np.int8) for pairs in found])
    order = np.lexsort((distance, method, image, row))
    row, image, method, distance = row[order], image[order], method[order], distance[order]
    new = np.ones(len(row), dtype=bool)
    new[1:] = (row[1:] != row[:-1]) | (image[1:] != image[:-1])
    order = np.flatnonzero(new)
    order = order[np.lexsort((image[order], distance[order], method[order], row[order]))]
    return {"row": row[order], "image": image[order], "method": method[order], "distance": distance[order]}


def _hashes(column: pa.ChunkedArray) -> tuple[np.ndarray, np.ndarray]:
    """(places that have one, [n] uint64) of a column of 16 hex digits."""
    known = np.flatnonzero(column.is_valid())
    return known, uids.parse(pc.utf8_rpad(column.drop_null(), 32, "0"), "image_phash")[:, 0].copy()


def write_matches(
    block: Block, stage: Contamination, images: Pass, num_partitions: int, seen_path: str, path: str
) -> None:
    """None; writes (row, high, low, image, method, distance, rank) of up to MOST_LISTED matches a row, by uid.

    Its notes count each reference's rows with a match. Before it, a file of (image, rows, high, low, method, distance):
    how many of the block's rows are like an image, and the nearest of them.
    """
    known = _Images(stage, images)
    parts: list[dict[str, np.ndarray]] = []
    seen: list[dict[str, np.ndarray]] = []
    notes: dict[str, int] = {}
    first_row = block.first_row
    for shard in block.shards:
        uid = None
        for pairs in known.pairs(block, shard):
            if uid is None:
                uid = uids.parse(block.table(shard, ["uid"])["uid"], f"pool shard {shard.name}")
            pairs |= {"high": uid[pairs["row"], 0], "low": uid[pairs["row"], 1]}
            by_name = np.unique(pairs["row"] * len(known.names) + known.reference[pairs["image"]])
            for number, count in zip(*np.unique(by_name % len(known.names), return_counts=True), strict=True):
                name = _note("rows", known.names[number])
                notes[name] = notes.get(name, 0) + int(count)
            new = np.flatnonzero(np.diff(pairs["row"], prepend=-1))
            rank = np.arange(len(pairs["row"])) - np.repeat(new, np.diff(new, append=len(pairs["row"])))
            seen.append(_nearest_rows(pairs | {"rows": np.ones(len(rank), np.int64)}))
            pairs |= {"row": pairs["row"].astype(np.uint64) + np.uint64(first_row), "rank": rank.astype(np.int8)}
            parts.append({name: values[rank < MOST_LISTED] for name, values in pairs.items()})
        first_row += shard.rows
    exchange.write(seen_path, _nearest_rows(_joined(seen, SEEN)))
    listed = _joined(parts, LISTED)
    exchange.write(path, listed, exchange.by_hash(listed["high"], num_partitions), notes)


LISTED = {
    "row": np.uint64,
    "high": np.uint64,
    "low": np.uint64,
    "image": np.int64,
    "method": np.int8,
    "distance": np.float32,
    "rank": np.int8,
}
SEEN = {name: kind for name, kind in LISTED.items() if name not in ("row", "rank")} | {"rows": np.int64}


def _joined(parts: Sequence[Mapping[str, np.ndarray]], columns: Mapping[str, type]) -> dict[str, np.ndarray]:
    return {
        name: np.concatenate([np.empty(0, kind), *(part[name] for part in parts)]) for name, kind in columns.items()
    }


def _nearest_rows(found: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of each image the sum of its `rows` and the nearest one; the columns of SEEN."""
    order = np.lexsort((found["low"], found["high"], found["distance"], found["method"], found["image"]))
    ordered = {name: found[name][order] for name in SEEN}
    first = np.flatnonzero(np.diff(ordered["image"], prepend=-1))
    rows = np.add.reduceat(ordered["rows"], first) if len(first) else ordered["rows"]
    return {name: values[first] for name, values in ordered.items()} | {"rows": rows}


def write_nearest(matches_path: str, images: Pass, starts: np.ndarray, path: str) -> None:
    """None; writes (row in the shard, reference, method, distance) of each row's nearest match, by shard.

    Args:
        starts: see stages.shard_values.shard_starts.
    """
    table = exchange.read([matches_path])
    if table is None:
        exchange.write(path, {})
        return
    table = table.filter(pc.equal(table["rank"], 0)).sort_by("row")
    columns = _named(table, images, ["reference"]) | {"distance": table["distance"]}
    write_by_shard(path, table["row"].to_numpy(), columns, starts, _count(columns["method"]))


def write_listed(matches: Pass, images: Pass, partition: int, table_path: str, path: str) -> None:
    """None; writes the partition's table of matches, and then an empty file that says so."""
    table = exchange.read(matches.paths, partition)
    if table is None:
        table = pa.table(_joined([], LISTED))
    table = table.sort_by([(name, "ascending") for name in ("high", "low", "rank")])
    uid = np.stack([table["high"].to_numpy(), table["low"].to_numpy()], axis=1)
    named = _named(table, images, ["reference", "item", "reference_uid"])
    columns = {"uid": uids.text(uid), **named, "distance": table["distance"]}
    storage.write_bytes(table_path, pool.table_bytes(pa.table(columns)))
    exchange.write(path, {})


def write_items(seen: Pass, images: Pass, table_path: str, path: str) -> None:
    """None; writes the table of the references' images that are in the pool, and then a file of counts."""
    table = exchange.read(seen.paths)
    found = {name: table[name].to_numpy() for name in SEEN} if table else _joined([], SEEN)
    nearest = pa.table(_nearest_rows(found))
    uid = np.stack([nearest["high"].to_numpy(), nearest["low"].to_numpy()], axis=1)
    named = _named(nearest, images, ["reference", "item", "reference_uid"])
    method = named.pop("method")
    columns = {**named, "rows": nearest["rows"], "uid": uids.text(uid), "method": method}
    whole = pa.table(columns | {"distance": nearest["distance"]})
    notes: dict[str, int] = {}
    for name, way in zip(whole["reference"].to_pylist(), whole["method"].to_pylist(), strict=True):
        notes[_note(way, name)] = notes.get(_note(way, name), 0) + 1
    storage.write_bytes(
        table_path, pool.table_bytes(whole.sort_by([("reference", "ascending"), ("item", "ascending")]))
    )
    exchange.write(path, {}, notes=notes)


def _named(table: pa.Table, images: Pass, names: Sequence[str]) -> dict[str, pa.ChunkedArray | pa.Array]:
    """{name: column} of the images that the rows are like, and the method's name."""
    known = exchange.read(images.paths)
    assert known is not None  # _Images raises before
    place = table["image"]
    found: dict[str, Any] = {}
    for name in names:
        if name == "reference_uid":
            uid = np.stack([known["high"].take(place).to_numpy(), known["low"].take(place).to_numpy()], axis=1)
            found[name] = uids.text(uid)
        else:
            found[name] = known[name].take(place)
    return found | {"method": pa.array(METHODS).take(table["method"])}


def _count(column: pa.ChunkedArray | pa.Array) -> dict[str, int]:
    return {entry["values"]: entry["counts"] for entry in pc.value_counts(column).to_pylist()}
