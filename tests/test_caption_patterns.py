"""Patterns of captions against their definitions in plain loops, on examples, and in linear time."""

from __future__ import annotations

import time
import unicodedata

import numpy as np
import pytest

from stages import build_stage
from stages.base import Batch
from stages.columns import caption_patterns
from stages.columns.caption_patterns import EMAIL, FILE_ENDING, HTML, NUMBERED_FILE, PHONE, URL, has_file_name


@pytest.fixture(scope="module")
def found():
    """{column: values} of captions."""
    stage = build_stage("caption_patterns", {}, "")
    state = stage.load(None)

    def of(captions):
        return stage.process(Batch({"caption": captions}, "00000", np.arange(len(captions))), state)

    return of


def by_definition(text):
    visible = [character for character in text if not character.isspace()]
    kinds = [unicodedata.category(character) for character in visible]
    symbols = sum(kind[0] not in "LMN" for kind in kinds)
    capitals, cased = sum(kind in ("Lu", "Lt") for kind in kinds), sum(kind in ("Lu", "Lt", "Ll") for kind in kinds)
    words = []
    for part in text.casefold().split():
        while part and part[0] in caption_patterns.PUNCTUATION:
            part = part[1:]
        while part and part[-1] in caption_patterns.PUNCTUATION:
            part = part[:-1]
        words += [part] if part else []
    return (
        symbols / len(visible) if visible else 0,
        kinds.count("Nd") / len(visible) if visible else 0,
        capitals / cased if cased else 0,
        (len(words) - len(set(words))) / len(words) if words else 0,
    )


def test_fractions_are_those_of_their_definitions(found, monkeypatch):
    rng = np.random.default_rng(0)
    alphabet = [
        *"aAzZ09 \t\n\x1f\u00a0\u3000.,-!“”éÉßǅ五هि\u0301٣½²Ⅷ\u200d\U0001f600\0\ud800𝐀🄰",
        "the ",
        "The, ",
        "red-",
    ]
    texts = ["".join(rng.choice(alphabet, rng.integers(0, 30))) for _ in range(2000)]
    texts += ["", " \n", "...", "A", "1", "the the The THE, -- the", "Straße STRASSE", "x" * 5000]
    expected = np.array([by_definition(text) for text in texts], np.float32)
    names = [f"caption_{name}_fraction" for name in ("symbol", "digit", "upper", "repeated_word")]
    values = found(texts)
    np.testing.assert_allclose(np.stack([values[name] for name in names], axis=1), expected, rtol=1e-6)
    monkeypatch.setattr(caption_patterns, "BLOCK_CHARS", 40)
    again = found(texts)
    assert all(np.array_equal(again[name], values[name]) for name in values)
    assert [len(values) for values in found([]).values()] == [0] * 9


EXAMPLES = {
    "url": (
        [
            "see http://a.b/c",
            "HTTPS://EXAMPLE.ORG",
            "ftp://files.example",
            "www.masalaherb.fr",
            "Online at johnlewis.com",
            "(EnvyLoops.com)",
            "geograph.org.uk - 626677",
            "bbc.co.uk",
            "网站example.com",
            "Frys.com Open",
        ],
        [
            "a cat.dog",
            "Woman.young Girl",
            "3.5 com",
            "U.S. Navy",
            "ASP.NET course",
            "a .com boom",
            "v1.2.3",
            "me@example.com",
            "Mac.OS.X",
            "dot.community",
            "and so on...net",
        ],
    ),
    "html": (
        [
            "<br/>x",
            "a<BR>b",
            "<a href='x'>y",
            "</p>",
            "<!--1-->",
            "Tom &amp; Jerry",
            "it&#39;s",
            "&#x27;",
            "caf&eacute;",
        ],
        ["i <3 you", "a < b > c", "<完売>", "R&B; soul", "<name>", "AT&T", "x <- y", "<b", "1 & 2;", "[b]bold[/b]"],
    ),
    "file_name": (
        [
            "IMG_1234.jpg",
            "West Acton stn look east.JPG",
            "Robertson County sign IMG 2287",
            "DSC0001",
            "_DSC0001",
            "DSC_0294",
            "P1010001",
            "image001",
            "Untitled-100",
            "PXL_20210101_101010",
            "IMG-20190101-WA0001",
            "Screen Shot 2014-01-02 at noon",
            "scan (2).tiff",
            "strawberry_beer",
            "my-sisters-prayer",
            "  VINTAGE-RUBY-RING\n",
        ],
        [
            "a cat",
            "photo 1",
            "image 100 of 200",
            "Spider-Man",
            "a well-worn, up-to-date map",
            "2015-12-31",
            "jpg",
            "the .jpg format",
            "Sam 2019",
            "DSC",
            "www.a-b-c.example/http://d-e-f",
            "MLS A1010897",
            "x.pngs",
            "_",
            "--",
            "五_五",
        ],
    ),
    "email": (
        ["me@example.com", "Write to a.b+c@mail.example.co.uk.", "<x_1@a-b.org>", "ADMIN@EXAMPLE.COM"],
        ["@handle", "me@home", "a@2x", "Photos/143546559@N02/4", "a @ b.com", "5 @ 3.50", "@b.com"],
    ),
    "phone": (
        [
            "Computer Repair Bellevue Ne 402-505-6600",
            "(212) 555-0123",
            "(212)555-0123",
            "212.555.0123",
            "call 1-800-555-0123 now",
            "+30 697 435 0179",
            "+44 (0)20 7946 0958",
            "+49-89-636-48018",
            "+15551234567",
            "020 7946 0958",
            "01632 960001",
            "(01632) 960001",
            "07794523511",
            "07700 900123",
            "Tel: 555 0123 99",
            "call us on 5550123",
            "Phone: (555) 12345",
            "Fax. 0351/123456",
        ],
        [
            "2015-2020",
            "1920x1080",
            "2019-08-22 00064",
            "978-3-16-148410-0",
            "9780822352662",
            "0330446991",
            "400-04986850",
            "20150501 1984",
            "12.12.1954",
            "165/70R14 185/65R14",
            "6065 6066 6067 6068",
            "#1155269134",
            "phone case 12",
            "iPhone 12 128 256",
            "555088 688",
            "2-26-14-40",
            "call of duty 4",
            "1+1 2222 3333 4444",
            "100-200-3000",
            "A212-555-0123",
            "212-555-01234",
            "c++ 1234567890",
        ],
    ),
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_patterns_on_examples(found, name):
    yes, no = EXAMPLES[name]
    values = found([*yes, *no])[f"caption_has_{name}"]
    assert {text for text, value in zip([*yes, *no], values, strict=True) if value} == set(yes)


def test_no_text_takes_more_than_linear_time():
    pieces = [
        "a",
        "a.",
        "a-",
        ".",
        "-",
        "<a ",
        "<a",
        "</",
        "&",
        "&#",
        "1",
        "1 ",
        "1-",
        "1.",
        "+1",
        "+1 ",
        "(2",
        "(",
        "@",
    ]
    pieces += [
        "a@",
        "a@a.",
        "a.a@",
        "_",
        "img",
        "IMG_1",
        "www.",
        "http://",
        "é",
        "\u0301",
        "a b",
        "tel",
        "tel: 1",
        "0 ",
    ]
    pieces += [
        "012 ",
        "call us ",
        "x.co.",
        "<!",
        "<br ",
        " ",
        "a\n",
        "212-555-",
        "screen shot ",
        "\0",
        "P1",
        "07",
        "scan",
    ]
    patterns = [URL, HTML, FILE_ENDING, NUMBERED_FILE, EMAIL, PHONE]
    searches = [pattern.search for pattern in patterns]
    searches += [caption_patterns.repeated_word_fraction, lambda text: has_file_name(text, 3)]
    num = 30_000  # squared, beyond the seconds below
    for piece in pieces:
        text = (piece * num)[:num] + "!"
        started_s = time.process_time()
        for search in searches:
            search(text)
        assert time.process_time() - started_s < 3, repr(piece)
