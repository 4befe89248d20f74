"""MinHash signatures and shingle sets: datasketch and plain Python are the references."""

from __future__ import annotations

import itertools
import random
import sys
import time
import unicodedata

import datasketch
import numpy as np
import pyarrow as pa
import pytest

from pipeline.core.errors import ConfigError
from stages.base import Batch, LoadContext
from stages.columns.minhash import MinHash
from stages.duplicates.shingles import Shingling, nfkc, normalised, python_shingles, shingle_sets
from stages.duplicates.signatures import EMPTY, rensa_signatures, signatures

BLANKS = [chr(code) for code in range(0x3001) if chr(code).isspace()]
HOSTILE = [
    "",
    "   \t\n",
    "a",
    "A photo of TWO dogs",
    "two dogs of a photo photo",
    "\x00",
    "a\x00b \x00 \x00\x00 c",
    "one\x1ctwo\x1dthree\x1efour\x1ffive\x0bsix\x0cseven\r\neight\x85nine\xa0ten\u2028eleven\u3000twelve",
    "👍🏽 👩\u200d👩\u200d👧 🇩🇪 🇩🇪🇫🇷",
    "שלום עולם \u202eمرحبا بالعالم\u202c",
    "İstanbul ﬁne STRASSE straße ǅ ΣΊΣΥΦΟΣ \u1e9b\u0323",
    "e\u0301 é e\u0323\u0301 e\u0301\u0323 \u0344 \u0f73\u0f75",
    "\ud800 lone \udfff surrogates \udc00\ud800",
    "\ufeffmark \u200bzero\u200bwidth",
    "\ufdfa ㋿ ½ ① ｆｕｌｌ　ｗｉｄｔｈ",
    *("x" * length for length in (54, 55, 56, 57, 63, 64, 65, 118, 119, 120, 121, 127, 128, 129, 5000)),
    " ".join("y" * length for length in (31, 32, 33, 55, 56, 64, 119, 120, 31, 55, 120)),
    "image " * 400,
]


def random_captions(seed: int, count: int) -> list[str]:
    """Texts of code points from all over Unicode, surrogates and blanks included."""
    rng = random.Random(seed)
    limits = (0x80, 0x250, 0x3000, 0x110000)
    return [
        "".join(
            rng.choice(BLANKS) if rng.random() < 0.2 else chr(rng.randrange(rng.choice(limits)))
            for _ in range(rng.randrange(70))
        )
        for _ in range(count)
    ]


def in_bytes(shingles: list[str]) -> list[bytes]:
    return [shingle.encode("utf-8", "surrogatepass") for shingle in shingles]


def datasketch_values(captions: list[str], shingling: Shingling, scheme: str, num_perm: int, seed: int) -> np.ndarray:
    sets = [in_bytes(python_shingles(caption, shingling)) for caption in captions]
    made = datasketch.MinHash.bulk(sets, num_perm=num_perm, seed=seed, scheme=scheme)
    return np.array([one.hashvalues for one in made])


def plainly_normalised(caption: str) -> bytes:
    text = " ".join(unicodedata.normalize("NFKC", caption).casefold().split())
    return text.encode("utf-8", "surrogatepass")


@pytest.mark.parametrize("scheme", ["affine32", "legacy"])
@pytest.mark.parametrize("unit", ["word", "character"])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5])
def test_signatures_are_those_of_datasketch(unit, size, scheme):
    shingling = Shingling(unit, size)
    captions = HOSTILE + random_captions(size, 40)
    found = signatures(captions, shingling, scheme)
    assert found.dtype == np.uint32
    np.testing.assert_array_equal(found, datasketch_values(captions, shingling, scheme, 128, 1))


@pytest.mark.parametrize("scheme", ["affine32", "legacy"])
@pytest.mark.parametrize("num_permutations, seed", [(16, 0), (17, 5), (256, 42), (1000, 2**32 - 1)])
def test_any_number_of_permutations_and_any_seed(scheme, num_permutations, seed):
    found = signatures(HOSTILE, Shingling(), scheme, num_permutations, seed)
    np.testing.assert_array_equal(found, datasketch_values(HOSTILE, Shingling(), scheme, num_permutations, seed))


def test_every_length_of_a_shingle_has_the_right_sha1():
    captions = ["".join(chr(97 + at % 26) for at in range(length)) for length in range(1, 260)]
    found = signatures(captions, Shingling(), num_permutations=16)
    np.testing.assert_array_equal(found, datasketch_values(captions, Shingling(), "affine32", 16, 1))


def test_a_megabyte_of_text():
    rng = random.Random(3)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randrange(2, 12))) for _ in range(20_000)]
    captions = [" ".join(rng.choices(words, k=160_000)), "z" * 1_000_000, "猫" * 300_000]
    assert len(captions[0]) > 1_000_000
    shingling = Shingling("word", 2, max_chars=2_000_000)
    found = signatures(captions, shingling, num_permutations=16)
    np.testing.assert_array_equal(found, datasketch_values(captions, shingling, "affine32", 16, 1))


def test_unknown_schemes_and_units_are_refused():
    with pytest.raises(ValueError, match="scheme = affine64, expected affine32 or legacy"):
        signatures(["a"], Shingling(), "affine64")
    with pytest.raises(ValueError, match="unit = line, expected word or character"):
        Shingling("line")
    with pytest.raises(ValueError, match="size = 0"):
        Shingling(size=0)


def test_ascii_is_normalised_as_python_does():
    codes = [chr(code) for code in range(128)]
    captions = codes + ["".join(pair) for pair in itertools.product(codes, codes)]
    captions += [f"A{one}{other}Z" for one, other in itertools.product(codes, codes)]
    assert normalised(captions).to_pylist() == [plainly_normalised(caption) for caption in captions]


def test_code_points_are_normalised_as_python_does():
    captions = [text for code in range(0x3000) for text in (chr(code), f" A{chr(code)}\t{chr(code)}B")]
    captions += HOSTILE + random_captions(7, 300)
    expected = [plainly_normalised(caption) for caption in captions]
    assert normalised(captions).to_pylist() == expected
    assert normalised([]).to_pylist() == []
    binary = [caption.encode("utf-8", "surrogatepass") for caption in captions]
    for array in (pa.array(binary, pa.binary()), pa.array([b"x", *binary, b"y"], pa.large_binary())[1:-1]):
        assert normalised(array).to_pylist() == expected
    assert normalised(pa.array(["A  b", None, "É"])).to_pylist() == [b"a b", b"", "é".encode()]


def test_long_texts_are_normalised_in_linear_time():
    rng = random.Random(11)
    marks = [chr(code) for code in range(0x3000) if unicodedata.combining(chr(code))] + ["\u0f73", "\u0344"]
    for _ in range(20):
        text = "".join(rng.choice(marks) if rng.random() < 0.9 else chr(rng.randrange(0x3100)) for _ in range(900))
        text += "".join(chr(rng.randrange(0x110000)) for _ in range(100)) + "".join(map(chr, range(0x1100, 0x1200)))
        assert nfkc(text) == unicodedata.normalize("NFKC", text)
    start_s = time.process_time()
    text = nfkc("a" + "\u0315\u0300" * 200_000)  # CPython alone would take minutes
    assert time.process_time() - start_s < 20
    assert text == "\u00e0" + "\u0300" * 199_999 + "\u0315" * 200_000


def test_captions_are_cut_before_they_are_normalised():
    short = Shingling("character", 1, max_chars=3)
    assert python_shingles("\ufb01xyz", short) == ["f", "i", "x", "y"]
    assert python_shingles("   abc", short) == []
    captions = ["abcdef", "ABCé", "éabcdef", "   abc", "a  bcd", "\ufb01xyz", "👍👍👍a", "猫b\ud800cd", "x" * 90_000]
    for unit in ("word", "character"):
        shingling = Shingling(unit, 2, max_chars=3)
        found = signatures(captions, shingling, num_permutations=16)
        np.testing.assert_array_equal(found, datasketch_values(captions, shingling, "affine32", 16, 1))
        np.testing.assert_array_equal(
            found, signatures([text[:3] for text in captions], shingling, num_permutations=16)
        )


def test_shingles_of_short_captions():
    assert python_shingles("Two  DOGS", Shingling("word", 3)) == ["two dogs"]
    assert python_shingles("a b c d", Shingling("word", 3)) == ["a b c", "b c d"]
    assert python_shingles("A\tb", Shingling("character", 2)) == ["a ", " b"]
    assert python_shingles("é", Shingling("character", 5)) == ["é"]
    assert python_shingles(" \n", Shingling("character", 5)) == []


def test_shingle_hashes_are_xxh64():
    offsets, hashes = shingle_sets(["", "a", "abc", "b a b a"], Shingling())
    assert offsets.tolist() == [0, 0, 1, 2, 4]
    assert hashes[:2].tolist() == [0xD24EC4F1A98C6E5B, 0x44BC2CF5AD770999]  # published test vectors, seed 0
    assert hashes[0] in hashes[2:] and hashes[2] < hashes[3]


@pytest.mark.parametrize(
    "shingling", [Shingling(), Shingling("word", 2), Shingling("character", 3), Shingling("character", 64)]
)
def test_shingle_sets_have_pythons_jaccard_index(shingling):
    rng = random.Random(5)
    words = ["a", "photo", "of", "two", "DOGS", "猫", "ﬁsh", "é", "x" * 70, "\ud800"]
    captions = [" ".join(rng.choices(words, k=rng.randrange(0, 60))) for _ in range(60)] + HOSTILE
    offsets, hashes = shingle_sets(captions, shingling)
    found = [hashes[start:end] for start, end in itertools.pairwise(offsets)]
    expected = [set(python_shingles(caption, shingling)) for caption in captions]
    for one, one_set in zip(found, expected, strict=True):
        assert (np.diff(one) > 0).all() if len(one) > 1 else True
        assert len(one) == len(one_set)
        for other, other_set in zip(found[::7], expected[::7], strict=True):
            assert len(np.intersect1d(one, other)) == len(one_set & other_set)


def test_different_shingles_have_different_hashes():
    captions = [" ".join(str(number) for number in range(first, first + 1000)) for first in range(0, 200_000, 1000)]
    _, hashes = shingle_sets(captions, Shingling())
    assert len(np.unique(hashes)) == len(hashes) == 200_000
    for bit in range(64):
        assert abs(np.mean((hashes >> np.uint64(bit)) & np.uint64(1)) - 0.5) < 0.006


def test_batches_do_not_matter():
    captions = (HOSTILE + random_captions(9, 300)) * 3 + [" ".join(map(str, range(at, at + 900))) for at in range(300)]
    random.Random(1).shuffle(captions)
    for scheme, shingling in (("affine32", Shingling()), ("legacy", Shingling("word", 2))):
        whole = signatures(captions, shingling, scheme, 32)
        offsets, hashes = shingle_sets(captions, shingling)
        for size in (1, 7, 256):
            batches = [captions[at : at + size] for at in range(0, len(captions), size)]
            np.testing.assert_array_equal(
                np.concatenate([signatures(b, shingling, scheme, 32) for b in batches]), whole
            )
            parts = [shingle_sets(batch, shingling) for batch in batches]
            np.testing.assert_array_equal(np.concatenate([part[1] for part in parts]), hashes)
            np.testing.assert_array_equal(np.concatenate([np.diff(part[0]) for part in parts]), np.diff(offsets))


def batch_of(captions: list[str]) -> Batch:
    columns = {"uid": [f"{row:032x}" for row in range(len(captions))], "caption": captions}
    return Batch(columns, "00000", np.arange(len(captions)))


@pytest.mark.parametrize("scheme", ["affine32", "legacy"])
def test_the_stage_gives_little_endian_bytes(scheme):
    stage = MinHash(shingle="character", shingle_size=3, num_permutations=32, seed=4, scheme=scheme)
    column = pa.array(stage.process(batch_of(HOSTILE), stage.load(LoadContext()))["minhash_signature"])
    assert column.type == pa.binary()
    expected = datasketch_values(HOSTILE, Shingling("character", 3), scheme, 32, 4)
    assert column.to_pylist() == [row.astype("<u4").tobytes() for row in expected]
    assert column[0].as_py() == b"\xff" * 128
    assert len(stage.process(batch_of([]), None)["minhash_signature"]) == 0


def test_rensa_says_how_similar_captions_are():
    captions = [
        "",
        " ".join(map(str, range(100))),
        " ".join(map(str, range(50, 150))),
        " ".join(map(str, range(500, 600))),
    ]
    stage = MinHash(num_permutations=512, scheme="rensa")
    column = stage.process(batch_of(captions), stage.load(LoadContext()))["minhash_signature"].to_pylist()
    found = np.array([np.frombuffer(row, "<u4") for row in column])
    np.testing.assert_array_equal(found, rensa_signatures(captions, Shingling(), 512))
    assert (found[0] == EMPTY).all()
    assert abs(np.mean(found[1] == found[2]) - 1 / 3) < 0.1
    assert np.mean(found[1] == found[3]) < 0.03
    assert len(stage.process(batch_of([]), None)["minhash_signature"]) == 0


def test_rensa_is_asked_for_when_the_stage_is_built(monkeypatch):
    monkeypatch.setitem(sys.modules, "rensa", None)
    with pytest.raises(ConfigError, match=r"^stages\.minhash\.scheme = rensa, expected the package rensa: pip install"):
        MinHash(scheme="rensa")


def test_another_algorithm_of_rensa_is_refused(monkeypatch):
    import rensa

    class Later:
        ALGORITHM_VERSION = 3

    monkeypatch.setattr(rensa, "RMinHash", Later)
    with pytest.raises(ConfigError, match="expected rensa's algorithm 2, not 3"):
        MinHash(scheme="rensa")
