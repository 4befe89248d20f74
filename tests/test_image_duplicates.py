"""Rows with the same image: the bit join against brute force, and groups over small pools."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from pipeline.core import exchange, pool
from pipeline.core.errors import ConfigError
from stages import build_stage
from stages.columns.image_duplicates import ImageDuplicates
from stages.duplicates import bit_distance, components, equal_keys, groups
from stages.pool_blocks import blocks
from tests.duplicates_fixture import run_stage
from tests.passes_fixture import passes_here
from tests.pool_fixture import drawing, even_shards, random_uids, write_columns, write_pool


def distances(hashes: np.ndarray) -> np.ndarray:
    """[n, n] how many bits differ."""
    return np.bitwise_count(hashes[:, None] ^ hashes[None, :])


def members(a, b) -> set[frozenset[int]]:
    """The components of these edges."""
    row, label = components.labels(np.asarray(a, np.uint64), np.asarray(b, np.uint64))
    found: dict[int, set[int]] = {}
    for one, name in zip(row.tolist(), label.tolist(), strict=True):
        found.setdefault(name, set()).add(one)
    return {frozenset(group) for group in found.values()}


def brute_force(hashes: np.ndarray, most_bits: int) -> set[frozenset[int]]:
    return members(*np.nonzero(np.triu(distances(hashes) <= most_bits, 1)))


def joined(hashes: np.ndarray, most_bits: int, num_blocks: int) -> set[frozenset[int]]:
    """The components of what close_pairs finds in all keys; every edge is checked."""
    found = bit_distance.Blocks(num_blocks, most_bits)
    spread = bit_distance.spread(hashes, num_blocks)
    assert (distances(spread[:50]) == distances(hashes[:50])).all()
    left, right = [], []
    for number in range(len(found.keys)):
        a, b, _ = bit_distance.close_pairs(spread, found, number, most_bits)
        left.append(a)
        right.append(b)
    a, b = np.concatenate(left), np.concatenate(right)
    assert (np.bitwise_count(hashes[a] ^ hashes[b]) <= most_bits).all()
    return members(a, b)


def flipped(rng: np.random.Generator, hashes: np.ndarray, num_bits: np.ndarray) -> np.ndarray:
    """The hashes with so many bits of each changed."""
    order = np.argsort(rng.random((len(hashes), 64)), axis=1).astype(np.uint64)
    bits = np.where(np.arange(64) < num_bits[:, None], np.uint64(1) << order, np.uint64(0))
    return hashes ^ np.bitwise_or.reduce(bits, axis=1)


def planted(rng: np.random.Generator, num: int) -> np.ndarray:
    """Random hashes, half of them others with 0 to 9 bits changed."""
    own = rng.integers(0, 2**64, num // 2, dtype=np.uint64)
    return np.unique(np.concatenate([own, flipped(rng, own, rng.integers(0, 10, len(own)))]))


def spread_bits(values: np.ndarray, places) -> np.ndarray:
    """Hashes whose bits at these places are the low bits of the values, and the rest the same in all."""
    found = np.full(len(values), 0x0123456789ABCDEF, np.uint64)
    for low, place in enumerate(places):
        found ^= ((values.astype(np.uint64) >> np.uint64(low)) & np.uint64(1)) << np.uint64(place)
    return found


def adversarial() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(5)
    code = np.array([value for value in range(1 << 14) if bin(value).count("1") % 2 == 0])  # 2 bits apart
    return {
        "random": np.unique(rng.integers(0, 2**64, 2000, dtype=np.uint64)),
        "planted": planted(rng, 2000),
        "all values of 11 bits": spread_bits(np.arange(2048), range(7, 62, 5)),
        "few bits differ, a code": spread_bits(rng.choice(code, 1500, replace=False), range(3, 59, 4)),
        "random in 24 bits": np.unique(spread_bits(rng.integers(0, 1 << 24, 2500), range(24))),
        "one bit each": np.append(np.uint64(0), np.uint64(1) << np.arange(64, dtype=np.uint64)),
        "clusters": np.unique(
            flipped(rng, np.repeat(rng.integers(0, 2**64, 4, dtype=np.uint64), 600), rng.integers(1, 12, 2400))
        ),
        "one": np.array([3], np.uint64),
        "none": np.empty(0, np.uint64),
    }


@pytest.mark.parametrize("kind", adversarial())
def test_the_bit_join_finds_what_brute_force_finds(kind):
    hashes = np.random.default_rng(1).permutation(adversarial()[kind])
    for most_bits, num_blocks in ((1, 2), (2, 3), (3, 4), (4, 5), (5, 6), (6, 7), (2, 5), (4, 6), (8, 9), (12, 13)):
        assert joined(hashes, most_bits, num_blocks) == brute_force(hashes, most_bits), (most_bits, num_blocks)


def test_a_bucket_of_many_is_cut_and_not_compared_pair_by_pair():
    """All hashes have the same key: the planted pairs are found, and twice as many hashes are not four times the work."""
    rng = np.random.default_rng(0)
    blocks_of_bits = bit_distance.Blocks(5, 4)
    compared = []
    for num in (20_000, 40_000):
        own = rng.integers(0, 2**51, num, dtype=np.uint64)  # the last 13 bits are 0 in all
        near = flipped(rng, own[:1000], rng.integers(1, 5, 1000)) & np.uint64(2**51 - 1)
        hashes = np.concatenate([own, near])
        a, b, done = bit_distance.close_pairs(hashes, blocks_of_bits, 4, 4)
        assert (np.bitwise_count(hashes[a] ^ hashes[b]) <= 4).all()
        earlier = [bit_distance.close_pairs(hashes, blocks_of_bits, number, 4)[:2] for number in range(4)]
        a, b = (np.concatenate(side) for side in zip((a, b), *earlier, strict=True))
        found = members(a, b)
        together = {one: group for group in found for one in group}
        assert all(one + num in together.get(one, ()) for one in range(1000) if near[one] != own[one])
        compared.append(done)
    assert compared[1] < 4 * compared[0]
    assert compared[1] < 0.02 * 40_000**2 / 2


def test_more_rows_get_longer_keys():
    assert [bit_distance.choose_blocks(num, 4) for num in (0, 10**8, 10**9, 12_800_000_000)] == [5, 5, 6, 7]
    assert bit_distance.choose_blocks(10**7, 8) == 9


def hash_pool(folder, hashes, shards: int, uids=None) -> tuple[str, dict]:
    """(path, columns) of a pool whose image_phash are these (None: null)."""
    image = drawing(1)
    rows = [{"image": image, "caption": "a"} for _ in hashes]
    for row, uid in zip(rows, uids or (), strict=False):
        row["uid"] = uid
    path = write_pool(folder, even_shards(rows, shards))
    texts = [None if value is None else f"{value:016x}" for value in hashes]
    return path, write_columns(folder, path, {"image_phash": pa.array(texts, pa.string())})


def groups_of(rows) -> set[frozenset[int]]:
    """The groups as sets of places among the rows."""
    found: dict[str, set[int]] = {}
    for place, row in enumerate(rows):
        if row["image_group"] is not None:
            found.setdefault(row["image_group"], set()).add(place)
    return {frozenset(group) for group in found.values()}


def phash_stage(**parameters):
    return build_stage("image_duplicates", {"by": ["image_phash"], **parameters}, "")


@pytest.mark.parametrize("most_bits", [0, 3, 4])
def test_groups_by_phash_are_those_of_brute_force(most_bits, tmp_path, monkeypatch):
    rng = np.random.default_rng(2)
    hashes = np.concatenate([planted(rng, 500), rng.choice(planted(rng, 60), 80), np.full(60, 77, np.uint64)])
    hashes = rng.permutation(hashes)
    known = [None if number % 29 == 0 else int(value) for number, value in enumerate(hashes)]
    path, columns = hash_pool(tmp_path, known, 5)
    _, rows, facts = run_stage(path, tmp_path / "a", phash_stage(phash_bits=most_bits), columns)
    places = np.array([number for number, value in enumerate(known) if value is not None])
    close = np.argwhere(np.triu(distances(hashes[places]) <= most_bits, 1))
    assert groups_of(rows) == members(places[close[:, 0]], places[close[:, 1]])
    assert facts["image_phash_rows"] == len(places)
    assert facts["image_phash_different"] == len(set(hashes[places].tolist()))

    monkeypatch.setattr(equal_keys, "PARTITION_ROWS", 100)
    monkeypatch.setattr(bit_distance, "PARTITION_ROWS", 90)
    monkeypatch.setattr(bit_distance, "MOST_BUCKET_ROWS", 20)
    monkeypatch.setattr(groups, "PARTITION_ROWS", 40)
    monkeypatch.setattr("stages.pool_blocks.blocks.__defaults__", (150,))
    _, again, more = run_stage(path, tmp_path / "b", phash_stage(phash_bits=most_bits), columns)
    assert again == rows
    assert more["image_phash_different"] == facts["image_phash_different"]


def test_a_hash_that_many_rows_share_costs_a_star(tmp_path):
    """No pairs are compared, a block sends its first row alone, and all edges end in the first row."""
    path, columns = hash_pool(tmp_path, [5] * 300, 3)
    found = blocks(path, pool.load_shards(path), columns, 100)
    edges, counts, keys = equal_keys.edges(found, passes_here(tmp_path / "p"), "image_phash", 1)
    assert counts == {"rows": 300, "different": 1}
    assert exchange.num_rows([file for made in edges for file in made.paths]) == 299
    assert len(equal_keys.keyed_rows(keys, 0)[1]) == 3
    pairs, facts = bit_distance.edges(keys, 1, passes_here(tmp_path / "p"), 300, 4)
    assert facts == {"compared": 0, "close": 0}
    assert exchange.num_rows(pairs.paths) == 0


def encoded(image: Image.Image, kind: str, **options) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def picture(number: int) -> Image.Image:
    return Image.open(io.BytesIO(drawing(number, 160, 120))).convert("RGB")


def image_entries() -> tuple[list[dict], dict[str, set[frozenset[int]]]]:
    """Rows of a pool, and the groups that each hash finds among them by itself."""
    flat = [encoded(Image.new("RGB", (40, 30), colour), "PNG") for colour in ("red", "white", "navy")]
    entries = [
        drawing(0, 160, 120),
        drawing(0, 160, 120),
        encoded(picture(0), "PNG"),
        encoded(picture(0), "JPEG", quality=75),
        drawing(12, 160, 120),
        encoded(picture(12).resize((120, 90)), "JPEG", quality=90),
        drawing(29, 160, 120),
        *flat,
        flat[1],
        None,
        None,
    ]
    same_flat = frozenset({8, 10})
    expected = {
        "sha256": {frozenset({0, 1}), same_flat},
        "pixels_sha256": {frozenset({0, 1, 2}), same_flat},
        "image_phash": {frozenset({0, 1, 2, 3}), frozenset({4, 5})},
        "all": {frozenset({0, 1, 2, 3}), frozenset({4, 5}), same_flat},
    }
    return [{"image": data, "caption": f"row {number}"} for number, data in enumerate(entries)], expected


def image_groups(folder, entries, shards=3, **parameters):
    """The stage's rows over a pool of these entries, with the hashes that the stage `hashes` gives."""
    path = write_pool(folder / "root", even_shards(entries, shards))
    columns, _, _ = run_stage(path, folder / "hashes", build_stage("hashes", {}, ""))
    return run_stage(path, folder / "duplicates", build_stage("image_duplicates", parameters, ""), columns)[1:]


@pytest.mark.parametrize("method", ["sha256", "pixels_sha256", "image_phash", "all"])
def test_images_are_grouped_by_each_hash(method, tmp_path):
    entries, expected = image_entries()
    rows, facts = image_groups(tmp_path, entries, **({} if method == "all" else {"by": [method]}))
    assert groups_of(rows) == expected[method]
    assert all(value is None for row in rows[11:] for name, value in row.items() if name != "uid")
    assert [row["image_group_size"] for row in rows[:11]] == [
        next((len(group) for group in expected[method] if number in group), 1) for number in range(11)
    ]
    assert facts["groups"] == len(expected[method])


def test_the_same_survivors_in_any_order(tmp_path):
    entries, _ = image_entries()
    rng = np.random.default_rng(4)
    for entry, uid in zip(entries, random_uids(rng, len(entries)), strict=True):
        entry["uid"] = uid
    order = rng.permutation(len(entries))
    for keep in ("", "width_px"):
        first, _ = image_groups(tmp_path / f"a{keep}", entries, keep=keep)
        again, _ = image_groups(tmp_path / f"b{keep}", [entries[at] for at in order], shards=5, keep=keep)
        assert [again[place] for place in np.argsort(order)] == first
        survivor = first[5]["image_survivor"]
        assert survivor == (entries[4]["uid"] if keep else min(entries[4]["uid"], entries[5]["uid"]))
        assert [row["image_is_duplicate"] for row in first[4:6]] == [entries[at]["uid"] != survivor for at in (4, 5)]


def test_a_resumed_fit_goes_on_from_its_files(tmp_path, monkeypatch):
    rng = np.random.default_rng(3)
    path, columns = hash_pool(tmp_path, planted(rng, 200).tolist(), 3)
    _, whole, _ = run_stage(path, tmp_path / "a", phash_stage(), columns)
    original = bit_distance.write_bit_pairs

    def failing(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(bit_distance, "write_bit_pairs", failing)
    with pytest.raises(KeyboardInterrupt):
        run_stage(path, tmp_path / "b", phash_stage(), columns)
    monkeypatch.setattr(bit_distance, "write_bit_pairs", original)
    monkeypatch.setattr(bit_distance, "write_bit_keys", None)  # must not be called again
    monkeypatch.setattr(equal_keys, "write_keys", None)
    _, again, _ = run_stage(path, tmp_path / "b", phash_stage(), columns)
    assert again == whole


def test_hashes_of_a_renamed_stage_are_found():
    assert ImageDuplicates().needs == ("sha256", "pixels_sha256", "image_phash")
    stage = build_stage("image_duplicates", {"by": ["sha256", "image_phash"], "hashes": "h2", "keep": "width_px"}, "")
    assert stage.needs == ("sha256", "h2_image_phash", "width_px")


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"by": []}, "stages.2.by = .*, expected at least 1 entry"),
        ({"by": ["phash"]}, "stages.2.by.0 = phash, expected one of 'sha256'"),
        ({"by": ["sha256", "sha256"]}, "by = sha256, sha256, expected each hash once"),
        ({"by": ["sha256"], "phash_bits": 6}, "phash_bits = 6 has no effect, expected image_phash in `by`"),
        ({"by": ["sha256"], "hashes": "h2"}, "hashes = h2 has no effect"),
        ({"phash_bits": 9}, "stages.2.phash_bits = 9, expected"),
    ],
)
def test_wrong_parameters_are_one_line(parameters, message):
    with pytest.raises(ConfigError, match=message):
        build_stage("image_duplicates", parameters, "stages.2")
