"""What a caption is made of, and what in it is no description: addresses, markup, file names, phone numbers.

The fractions have kin among published rules: CC3M drops captions with a high rate of token repetition or of capitals
(Sharma et al. 2018, section 3.1), Gopher and C4 text by its symbols and markup (Rae et al. 2021, table A1; Raffel et
al. 2020, section 2.2). Those are rules for sentences and pages; the definitions here are winnow's own.
"""

from __future__ import annotations

import re
import string
import sys
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stages.base import Batch, LoadContext, Stage

# Kinds of characters; the order is that of the counts' columns.
OTHER, BLANK, SYMBOL, DIGIT, UPPER, LOWER = range(6)
NUM_KINDS = LOWER + 1
BLOCK_CHARS = 1 << 20  # of captions whose characters are looked up at once, unless one alone has more
PUNCTUATION = string.punctuation + "‘’“”„‚«»‹›…–—·•、。，！？：；（）「」『』【】《》"

# Each takes time linear in the text: a repetition has a bound, or it starts only where a look-behind says that its
# characters start, and what follows it is none of them.
_ENDS = r"(?:com|net|org|info|biz|edu|gov|(?:co|com|org|net|ac|gov|edu)\.[a-z]{2})"
URL = re.compile(
    r"(?<![a-z0-9])(?:https?|ftp)://[^\s/]"
    r"|(?<![\w.@-])www\.[a-z0-9-]"
    rf"|(?<![\w.@-])(?!(?:asp|vb|ado)\.net\b)(?:[a-z0-9-]+\.)+{_ENDS}(?![\w@-])",
    re.ASCII | re.IGNORECASE,
)
_TAGS = (
    "a|abbr|b|big|blockquote|br|button|center|cite|code|dd|div|dl|dt|em|embed|figcaption|figure|font|form|h[1-6]|hr|i|"
    "iframe|img|input|ins|label|li|link|meta|noscript|object|ol|p|param|picture|pre|s|script|section|small|source|span|"
    "strike|strong|style|sub|sup|svg|table|tbody|td|th|thead|tr|tt|u|ul|video"
)
HTML = re.compile(
    rf"</?(?:{_TAGS})(?:\s[^<>]*)?/?>|<!--"
    r"|&(?:amp|lt|gt|quot|apos|nbsp|[lr][sd]quo|[mn]dash|hellip|copy|reg|trade|deg|pound|euro|bull|middot|ntilde|ccedil"
    r"|szlig|[aeiou](?:acute|grave|circ|uml)|#[0-9]{1,7}|#x[0-9a-f]{1,6});",
    re.ASCII | re.IGNORECASE,
)
FILE_ENDING = re.compile(
    r"(?<=[\w)\]-])\.(?:jpe?g|jpe|png|gif|webp|bmp|tiff?|heic|svg|psd|pdf|mp4)(?!\w)", re.ASCII | re.IGNORECASE
)
LEAST_FILE_DIGITS = 3
NUMBERED_FILE = re.compile(
    r"(?<![a-z0-9])(?:"
    r"_?(?:IMG|DSC|DSCF|DSCN)[ _-]?[0-9]{3}"
    r"|(?:IMAG|DCIM|CIMG|PICT|HPIM|SAM|MVI|VID|PXL|GOPR|PANO)[_-]?[0-9]{3}"
    r"|P(?:1[0-9]{2}|[1-9a-c][0-3][0-9])[0-9]{4}(?![a-z0-9])"
    r"|(?:image|photo|picture|pic|scan|screenshot|untitled|unnamed)[_-]?[0-9]{3,}(?![a-z0-9])"
    r"|screen ?shot[ _-][0-9]{4}-[0-9]{2}-[0-9]{2}"
    r")",
    re.ASCII | re.IGNORECASE,
)
EMAIL = re.compile(
    r"(?<![a-z0-9._%+-])[a-z0-9._%+-]{1,64}@(?:[a-z0-9-]+\.)+[a-z]{2,24}(?![a-z0-9-])", re.ASCII | re.IGNORECASE
)
LEAST_PHONE_DIGITS = 7
_GAP = r"[ .\-/\u00a0\u2011]?"
PHONE = re.compile(
    # International: "+" and a country code, then groups of digits (E.123, at most the 15 digits of E.164).
    rf"(?<![\w+])\+(?=(?:[^0-9]{{0,3}}[0-9]){{8,15}}(?![0-9]))[1-9][0-9]{{0,2}}(?:{_GAP}\(?[0-9]{{1,4}}\)?){{2,6}}(?!\w)"
    # North American: (212) 555-0123, 212-555-0123, 212.555.0123, 1-800-555-0123.
    r"|(?<![\w.+/#-])(?:1[ .-])?(?:\([2-9][0-9]{2}\) ?|[2-9][0-9]{2}([.-]))[2-9][0-9]{2}(?:\1|[ .-])[0-9]{4}(?![\w-])"
    # With a trunk 0, ten or eleven digits: 020 7946 0958, 01632 960001, 07700 900123, 07700900123.
    r"|(?<![\w.+/#-])\(?0[1-9][0-9]{1,3}\)?[ -]"
    r"(?:[0-9]{3}[ -]?[0-9]{4}|[0-9]{4}[ -][0-9]{4}|[0-9]{3} ?[0-9]{3})(?![\w-])"
    r"|(?<![\w.+/#-])07[0-9]{9}(?![\w-])"
    # Said to be one: "Tel: 555 0123 99", "call us on 5550123".
    r"|(?<![a-z])(?:tel|telephone|phone|fax|call|whatsapp)(?: us)?(?: now| at| on| number| no)?[.:]{0,2} ?"
    rf"[(+]?(?:[0-9]\)?{_GAP}){{6,14}}[0-9](?!\w)",
    re.ASCII | re.IGNORECASE,
)


@dataclass(frozen=True)
class CaptionPatterns(Stage):
    """What a caption is made of (fractions, 0 where there is nothing to divide by), and what is in it.

    caption_symbol_fraction: of the characters that are no blanks, those that are neither letters, marks nor numbers
        (Unicode's categories L, M, N): punctuation, emoji, control characters.
    caption_digit_fraction: of the same characters, decimal digits (Nd).
    caption_upper_fraction: of the letters that have a case, capitals (Lu and Lt of Lu, Lt and Ll). A caption in a
        script without case has none.
    caption_repeated_word_fraction: 1 - different words / words; words are what `str.split()` gives, case folded,
        without punctuation around them; punctuation alone is no word.
    caption_has_url: http:, https:, ftp:, www., or a host's name that ends in .com, .net, .org, .co.uk and the like.
        A host's name in a country's domain alone (example.fr) is not seen, as it looks like a missing blank.
    caption_has_html: a tag of HTML, a comment, or a character reference such as &amp; or &#39;.
    caption_has_file_name: the ending of an image file, a camera's name (IMG_1234, DSC0001, P1010001), image001, or a
        caption that is one word joined by an underscore or by two hyphens (red-shoes-front).
    caption_has_email: an e-mail address.
    caption_has_phone: a phone number: with a country code, in a North American grouping, with a trunk 0 and ten or
        eleven digits, or after a word such as "tel". Bare digits are none: most are article numbers.

    The last two are signs of personal data, no proof that there is none. Time is linear in the text, whatever it is.
    Characters are as the Unicode tables of the running Python have them. Cost: 15 to 20 microseconds a row.
    """

    version: ClassVar[int] = 1
    reads: ClassVar[str] = "caption"
    adds: ClassVar[Mapping[str, str]] = {
        "caption_symbol_fraction": "float32",
        "caption_digit_fraction": "float32",
        "caption_upper_fraction": "float32",
        "caption_repeated_word_fraction": "float32",
        "caption_has_url": "bool",
        "caption_has_html": "bool",
        "caption_has_file_name": "bool",
        "caption_has_email": "bool",
        "caption_has_phone": "bool",
    }
    batch_size: ClassVar[int] = 2048

    def load(self, context: LoadContext) -> Any:
        """The kind of every character: see character_kinds."""
        return character_kinds()

    def process(self, batch: Batch, state: Any) -> Mapping[str, Sequence]:
        captions = batch.columns["caption"]
        counts = kind_counts(captions, state)
        visible = counts.sum(axis=1) - counts[:, BLANK]
        digits = counts[:, DIGIT].tolist()
        return {
            "caption_symbol_fraction": _fraction(counts[:, SYMBOL], visible),
            "caption_digit_fraction": _fraction(counts[:, DIGIT], visible),
            "caption_upper_fraction": _fraction(counts[:, UPPER], counts[:, UPPER] + counts[:, LOWER]),
            "caption_repeated_word_fraction": np.array(list(map(repeated_word_fraction, captions)), np.float32),
            "caption_has_url": [("." in text or "//" in text) and bool(URL.search(text)) for text in captions],
            "caption_has_html": [("<" in text or "&" in text) and bool(HTML.search(text)) for text in captions],
            "caption_has_file_name": list(map(has_file_name, captions, digits)),
            "caption_has_email": ["@" in text and bool(EMAIL.search(text)) for text in captions],
            "caption_has_phone": [
                number >= LEAST_PHONE_DIGITS and bool(PHONE.search(text))
                for text, number in zip(captions, digits, strict=True)
            ],
        }


def character_kinds() -> np.ndarray:
    """[code points] uint8: OTHER, BLANK, SYMBOL, DIGIT, UPPER or LOWER."""
    named = {"Nd": DIGIT, "Lu": UPPER, "Lt": UPPER, "Ll": LOWER}
    kinds = np.empty(sys.maxunicode + 1, np.uint8)
    for code in range(sys.maxunicode + 1):
        category = unicodedata.category(chr(code))
        kinds[code] = named.get(category, OTHER if category[0] in "LMN" else SYMBOL)
    for code in range(0x3001):  # the last blank is the ideographic space
        if chr(code).isspace():
            kinds[code] = BLANK
    return kinds


def kind_counts(captions: Sequence[str], kinds: np.ndarray) -> np.ndarray:
    """[n, NUM_KINDS] int64: how many characters of each kind a caption has.

    Args:
        kinds: see character_kinds.
    """
    counts = np.zeros((len(captions), NUM_KINDS), np.int64)
    for start, stop in _blocks(captions):
        lengths = np.array([len(text) for text in captions[start:stop]], np.int64)
        codes = np.frombuffer("".join(captions[start:stop]).encode("utf-32-le", "surrogatepass"), "<u4")
        rows = np.repeat(np.arange(stop - start) * NUM_KINDS, lengths)
        found = np.bincount(rows + kinds[codes], minlength=(stop - start) * NUM_KINDS)
        counts[start:stop] = found.reshape(-1, NUM_KINDS)
    return counts


def repeated_word_fraction(text: str) -> float:
    """1 - different words / words: see CaptionPatterns."""
    words = [word for word in (part.strip(PUNCTUATION) for part in text.casefold().split()) if word]
    return 1 - len(set(words)) / len(words) if words else 0.0


def has_file_name(text: str, num_digits: int) -> bool:
    """True for a caption with a file's name in it, or that is one: see CaptionPatterns.

    Args:
        num_digits: how many digits the text has, or more.
    """
    if "." in text and FILE_ENDING.search(text):
        return True
    if num_digits >= LEAST_FILE_DIGITS and NUMBERED_FILE.search(text):
        return True
    if "_" not in text and text.count("-") < 2:
        return False
    return len(text.split(None, 1)) == 1 and text.upper() != text.lower() and "://" not in text


def _blocks(captions: Sequence[str]) -> Iterator[tuple[int, int]]:
    """(start, stop) of captions in a row that have BLOCK_CHARS characters together, or of one alone."""
    start = chars = 0
    for row, text in enumerate(captions):
        if row > start and chars + len(text) > BLOCK_CHARS:
            yield start, row
            start, chars = row, 0
        chars += len(text)
    if start < len(captions):
        yield start, len(captions)


def _fraction(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return (part / np.maximum(whole, 1)).astype(np.float32)
