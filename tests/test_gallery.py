"""Galleries: the samples around cuts against a ranking written out row by row, and their pictures."""

from __future__ import annotations

import io
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.core import pool, storage
from stages.exclusion import Exclusion
from stages.selection import gallery, thumbnails, uids
from stages.selection.choose import flat_rules, select
from stages.selection.strategies import parse_comparisons, parse_strategies
from tests.pool_fixture import drawing, random_uids, write_columns, write_pool

TYPES = {"score": "float32", "words": "int32", "weight": "float32", "flag": "bool", "language": "string"}
ARROW = {"score": pa.float32(), "words": pa.int32(), "weight": pa.float32(), "flag": pa.bool_()}
STRATEGIES = {
    "long": {"where": ["words > 2"]},
    "flagged": {"where": ["flag == true"]},
    "it": {
        "all_of": ["long"],
        "any_of": ["flagged", "long"],
        "where": ["weight <= 0.8", "flag == true"],
        "top": {"column": "score", "fraction": 0.4, "within": "long"},
    },
}


class World:
    """A random pool without pictures, cut into shards of `shard_rows`, and its rows as dicts."""

    def __init__(self, root, shard_rows=90, num_rows=500):
        rng = np.random.default_rng(0)
        self.rows = []
        for uid in random_uids(rng, num_rows):
            score = float(np.float32(round(float(rng.normal()), 1)))  # ties everywhere
            row = {"uid": uid, "ok": bool(rng.random() > 0.1), "words": int(rng.integers(0, 9))}
            row |= {"score": [score, score, score, score, math.nan, None][rng.integers(6)]}
            row |= {"weight": float(np.float32(rng.random())), "flag": bool(rng.random() < 0.8)}
            self.rows.append(row)
        entries = [{"image": None, "caption": f"row {r['uid']}", "uid": r["uid"], "ok": r["ok"]} for r in self.rows]
        self.root = str(root)
        self.pool_path = write_pool(root, [entries[i : i + shard_rows] for i in range(0, num_rows, shard_rows)])
        self.columns = {}
        for name, kind in ARROW.items():
            values = pa.array([row[name] for row in self.rows], type=kind, from_pandas=False)
            self.columns |= write_columns(root, self.pool_path, {name: values})

    def gallery(self, mapping, name="it", **options):
        """(facts, rows of the file)"""
        strategies = parse_strategies(mapping, "strategies", TYPES)
        facts = gallery.write_gallery(self.pool_path, self.columns, strategies, name, f"{self.root}/out", **options)
        table = pq.read_table(f"{self.root}/out/{gallery.FILE}")
        assert table.schema.equals(gallery.SCHEMA)
        assert facts["samples"] == table.num_rows
        return facts, table.to_pylist()

    def kept(self, mapping, name="it"):
        strategies = parse_strategies(mapping, "strategies", TYPES)
        select(self.pool_path, self.columns, strategies, name, f"{self.root}/selection")
        pairs = np.load(f"{self.root}/selection/uids.npy").tolist()
        return {f"{high:016x}{low:016x}" for high, low in pairs}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return World(tmp_path_factory.mktemp("world"))


def rank(uid):
    pair = np.array([[int(uid[:16], 16), int(uid[16:], 16)]], dtype=np.uint64)
    return int(uids.hash64(pair, 0, gallery.GALLERY_STREAM)[0]), uid


def test_samples_are_the_nearest_to_each_cut_written_out(world):
    ok = [row for row in world.rows if row["ok"]]
    longs = {row["uid"] for row in ok if row["words"] > 2}
    tops = world.kept({"long": STRATEGIES["long"], "it": {"top": STRATEGIES["it"]["top"]}})
    passes = [  # in the order of the flat rules
        lambda row: row["words"] > 2,
        lambda row: row["flag"] or row["uid"] in longs,
        lambda row: row["weight"] <= np.float32(0.8),
        lambda row: row["flag"],
        lambda row: row["uid"] in tops,
    ]
    facts, found = world.gallery(STRATEGIES)
    assert facts["rules"] == [
        "words > 2", "any_of flagged, long", "weight <= 0.8", "flag == true", "top 0.4 of score within long"
    ]  # fmt: skip
    assert facts["pictures"] == 0
    expected = []
    kept = [row for row in ok if all(rule(row) for rule in passes)]
    for number, column, sign in ((0, "words", 1), (2, "weight", -1), (4, "score", 1)):
        others = [rule for index, rule in enumerate(passes) if index != number]
        removed = [row for row in ok if all(rule(row) for rule in others) and not passes[number](row)]
        removed = [row for row in removed if row[column] is not None and not math.isnan(row[column])]
        for side, rows, direction in (("kept", kept, sign), ("removed", removed, -sign)):
            nearest = sorted(rows, key=lambda row: (direction * row[column], rank(row["uid"])))[:8]
            expected += [("cut", number, side, row["uid"], float(row[column])) for row in nearest]
    for side in ("kept", "removed"):
        rows = [row for row in ok if (row in kept) == (side == "kept")]
        nearest = sorted(rows, key=lambda row: rank(row["uid"]))[:8]
        expected += [("random", None, side, row["uid"], None) for row in nearest]
    got = [
        (row["group"], row["rule"], row["side"], row["uid"], None if row["value"] is None else float(np.float32(row["value"])))
        for row in found
    ]  # fmt: skip
    assert got == expected
    by_uid = {row["uid"]: row for row in world.rows}
    for row in found:
        assert row["caption"] == f"row {row['uid']}"
        first = [number for number, rule in enumerate(passes) if not rule(by_uid[row["uid"]])]
        assert row["removed_by"] == (first[0] if first else None)
        assert (row["side"] == "kept") == (row["removed_by"] is None)


def test_the_bytes_do_not_depend_on_shards_or_names(world, tmp_path):
    world.gallery(STRATEGIES)
    other = World(tmp_path, shard_rows=333)
    renamed = {("basic" if name == "long" else name): body for name, body in STRATEGIES.items()}
    renamed["it"] = {
        "all_of": ["basic"], "any_of": ["flagged", "basic"], "where": STRATEGIES["it"]["where"],
        "top": {**STRATEGIES["it"]["top"], "within": "basic"},
    }  # fmt: skip
    facts, _ = other.gallery(renamed)
    assert facts["rules"][-1] == "top 0.4 of score within basic"
    files = [storage.read_bytes(f"{place.root}/out/{gallery.FILE}") for place in (world, other)]
    assert files[0] == files[1]


def test_failed_and_excluded_rows_never_appear(world, tmp_path):
    excluded = {row["uid"] for row in world.rows[::2]}
    path = tmp_path / "taken_down.txt"
    path.write_text("\n".join(excluded))
    mapping = {"it": {"where": ["words > 3"]}, "all": {}, "none": {"where": ["words > 100"]}}
    bad = excluded | {row["uid"] for row in world.rows if not row["ok"]}
    for name in mapping:
        _, found = world.gallery(mapping, name, exclude=Exclusion((str(path),)))
        assert found
        assert not {row["uid"] for row in found} & bad
    sides = {name: {row["side"] for row in world.gallery(mapping, name)[1]} for name in mapping}
    assert sides == {"it": {"kept", "removed"}, "all": {"kept"}, "none": {"removed"}}


def test_repeats_count_as_the_last_rule(world):
    mapping = {"it": {"where": ["words > 3"], "repeat": {"column": "weight", "cap": 1}}}
    facts, found = world.gallery(mapping)
    assert facts["rules"] == ["words > 3", "repeat weight"]
    kept = world.kept(mapping)
    assert all((row["uid"] in kept) == (row["side"] == "kept") for row in found)
    assert {row["removed_by"] for row in found} == {None, 0, 1}


def test_tops_come_before_comparisons_and_three_at_most():
    mapping = {
        "best": {"top": {"column": "score", "fraction": 0.5}},
        "it": {
            "where": ["words > 1", "flag == true", "words != 4", "weight < 1", "words >= 2", "words in [2, 3]"],
            "all_of": ["best"],
            "random": {"fraction": 0.5},
        },
    }
    rules = list(flat_rules(parse_strategies(mapping, "s", TYPES), "it"))
    assert gallery.cut_rules(rules) == [0, 3, 6]
    assert gallery.cut_rules(rules[:2]) == [0]
    assert gallery.cut_rules([]) == []


def test_pictures_are_small_jpegs_and_what_does_not_decode_has_none(tmp_path):
    entries = [
        {"image": drawing(1, 640, 200), "caption": "wide\n<b>&"},
        {"image": drawing(2, 20, 31), "caption": "x" * 1000},
        {"image": None, "caption": "failed"},
        {"image": drawing(3), "caption": "broken later"},
        {"image": None, "caption": "never had one", "ok": True},
    ]
    path = write_pool(tmp_path, [entries[:3], entries[3:]])
    (place,) = pool.read_rows(path, "00001", ["image_offset_bytes"])["image_offset_bytes"].drop_null().to_pylist()
    with open(f"{path}/00001.tar", "r+b") as file:
        file.seek(place)
        file.write(b"\0" * 100)
    facts = gallery.write_gallery(path, {}, parse_strategies({"it": {}}, "s", {}), "it", f"{tmp_path}/out")
    assert facts == {"samples": 4, "pictures": 2, "flagged": 0, "rules": []}
    found = {row["uid"]: row for row in pq.read_table(f"{tmp_path}/out/{gallery.FILE}").to_pylist()}
    assert [f"{number:032x}" for number in (0, 1, 3, 4)] == sorted(found)
    wide, small, broken, without = (found[f"{number:032x}"] for number in (0, 1, 3, 4))
    assert wide["caption"] == "wide\n<b>&"
    assert len(small["caption"]) == thumbnails.CAPTION_CHARS + 1
    assert broken["thumbnail"] is None is without["thumbnail"]
    for row, size in ((wide, (96, 30)), (small, (20, 31))):
        image = Image.open(io.BytesIO(row["thumbnail"]))
        assert (image.format, image.size) == ("JPEG", size)
        assert len(row["thumbnail"]) < 6000


def test_rows_that_pass_any_comparison_of_flagged_are_marked(world):
    flagged = parse_comparisons(["words >= 6", "weight < 0.1"], "flagged", TYPES)
    facts, found = world.gallery(STRATEGIES, flagged=flagged)
    by_uid = {row["uid"]: row for row in world.rows}
    for row in found:
        own = by_uid[row["uid"]]
        assert row["flagged"] == (own["words"] >= 6 or own["weight"] < np.float32(0.1))
    assert 0 < facts["flagged"] == sum(row["flagged"] for row in found) < len(found)
    assert not any(row["flagged"] for row in world.gallery(STRATEGIES)[1])


def noise(width_px=320, height_px=200, orientation=None):
    """A PNG of fine stripes: what is blurred in it is grey."""
    rows, columns = np.indices((height_px, width_px))
    pixels = np.where((rows // 8 + columns // 8) % 2, 255, 0).astype(np.uint8)
    data = io.BytesIO()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    Image.fromarray(np.stack([pixels] * 3, axis=-1)).save(data, "PNG", exif=exif)
    return data.getvalue()


def spread(jpeg, box=(0.0, 0.0, 1.0, 1.0)):
    """The standard deviation of a part of the picture, whose sides are fractions."""
    image = Image.open(io.BytesIO(jpeg)).convert("L")
    left, top, right, bottom = (round(side * n) for side, n in zip(box, image.size * 2, strict=True))
    return float(np.asarray(image.crop((left, top, right, bottom)), np.float64).std())


def shown(tmp_path, image=None, boxes=None, **columns):
    """The thumbnail in the gallery of a pool whose one row has these boxes."""
    row = {"image": image or noise(), "caption": "x", "face_bboxes": boxes, **columns}
    path = write_pool(tmp_path, [[row | {"face_bboxes": row["face_bboxes"] or ""}]])
    gallery.write_gallery(path, {}, parse_strategies({"it": {}}, "s", {}), "it", f"{tmp_path}/out")
    (found,) = pq.read_table(f"{tmp_path}/out/{gallery.FILE}").to_pylist()
    return found["thumbnail"]


def test_known_faces_are_blurred_and_nothing_else(tmp_path):
    plain = shown(tmp_path / "plain")
    assert shown(tmp_path / "none", boxes="[]") == plain
    found = shown(tmp_path / "face", boxes="[[0.1,0.2,0.4,0.7]]")
    whole = spread(plain)
    assert whole > 60
    assert spread(found, (0.1, 0.2, 0.4, 0.7)) < whole / 8
    margin = (0.08, 0.16, 0.1, 0.74)  # a box grows by a tenth of its longer side
    assert spread(found, margin) < whole / 4 < spread(plain, margin)
    assert spread(found, (0.55, 0.0, 1.0, 1.0)) == pytest.approx(spread(plain, (0.55, 0.0, 1.0, 1.0)), rel=0.02)
    two = shown(tmp_path / "two", boxes="[[0.1,0.2,0.4,0.7],[0.7,0.1,0.9,0.5]]")
    assert max(spread(two, (0.1, 0.2, 0.4, 0.7)), spread(two, (0.7, 0.1, 0.9, 0.5))) < whole / 8


@pytest.mark.parametrize(
    "boxes",
    ["[[30,40,90,100]]", "[[0.5,0.5,0.4,0.9]]", "[[0.1,0.2,0.3]]", "[[NaN,0,1,1]]", "{", "[1]", '[["a",0,1,1]]', "[" * 9999,
     "[[0.1,0.2,0.4,0.7],[2,2,3,3]]"],
)  # fmt: skip
def test_a_box_that_cannot_be_placed_blurs_the_whole_picture(tmp_path, boxes):
    assert spread(shown(tmp_path, boxes=boxes)) < 15


def test_boxes_do_not_fit_a_picture_that_was_cropped_padded_or_turned(tmp_path):
    box = "[[0.1,0.2,0.4,0.7]]"
    kept = {"original_width_px": 640, "original_height_px": 401}  # halved, up to a pixel
    assert spread(shown(tmp_path / "kept", boxes=box, **kept), (0.55, 0.0, 1.0, 1.0)) > 60
    wrong = [
        {"original_width_px": 640, "original_height_px": 640},
        {"exif": '{"Image Orientation": "6"}'},
        {"exif": "["},
    ]
    for number, columns in enumerate([*wrong, {"image": noise(orientation=6)}]):
        assert spread(shown(tmp_path / str(number), boxes=box, **columns)) < 15
    upright = {"exif": '{"Image Orientation": "Horizontal (normal)", "Image Make": "x"}'}
    assert spread(shown(tmp_path / "upright", boxes=box, **upright), (0.55, 0.0, 1.0, 1.0)) > 60
    assert spread(shown(tmp_path / "no face", image=noise(orientation=6))) > 60
