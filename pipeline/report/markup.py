"""HTML and SVG built from elements. Text is escaped unless it is an element already, so nothing can be forgotten.

What the pages of a run have in common is here, too: the document with its style sheet and its script, sections, and
tables of text. The content security policy lets this one script run, by its hash, and nothing else; the page asks the
network for nothing.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from pathlib import Path

from pipeline.report.leaderboard import plain

SCRIPTS = ("page.js", "slider.js")
STYLES = ("page.css", "pool.css")
POLICY = (
    "default-src 'none'; script-src '{}'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
    "form-action 'none'; require-trusted-types-for 'script'"
)
NAME_CHARS = 28  # of a name in a table; the rest is in its tooltip


class Markup(str):
    """Text that is HTML already: made by `element` and `raw` only."""

    __slots__ = ()


def raw(text: str) -> Markup:
    """The text as it is, for markup that we wrote ourselves (the style sheet, the script)."""
    return Markup(text)


def join(content) -> Markup:
    """One piece of markup of strings (escaped), elements, numbers, and nested lists of these; None adds nothing."""
    if content is None:
        return Markup("")
    if isinstance(content, Markup):
        return content
    if isinstance(content, (str, int, float)):
        return Markup(escape(str(content), quote=True))
    return Markup("".join(join(part) for part in content))


def element(tag: str, *content, **attributes) -> Markup:
    """An element with escaped content and attributes.

    Attributes: a trailing underscore is dropped (`class_`), other underscores become hyphens; None leaves it out.
    """
    listed = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(str(value), quote=True)}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in ("meta", "br", "hr", "link", "img", "input"):
        return Markup(f"<{tag}{listed}>")
    return Markup(f"<{tag}{listed}>{join(content)}</{tag}>")


def document(title: str, *content) -> str:
    """A whole page with this content; it is complete without its script, which only adds what a reader can do."""
    folder = Path(__file__).parent
    style = "".join((folder / name).read_text(encoding="utf-8") for name in STYLES)
    script = "".join((folder / name).read_text(encoding="utf-8") for name in SCRIPTS)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY.format(f"sha256-{digest}")),
        element("title", f"{plain(title)} · winnow"),
        element("style", raw(style)),
    )
    body = element("body", element("main", *content), element("script", raw(script)))
    return "<!doctype html>\n" + element("html", head, body, lang="en") + "\n"


def section(title: str, about: str, *content) -> Markup:
    """A section of a page: its title, what it says in a sentence or two, and its content."""
    return element("section", element("h2", title), element("p", about, class_="about"), element("div", *content))


def nothing(reason: str) -> Markup:
    """The place of something that is not there, with the reason."""
    return element("p", reason, class_="about")


def cut(text: str, num_chars: int = NAME_CHARS) -> str:
    """The text, plain, with its middle left out where it is longer: names often differ at their ends."""
    text = plain(text)
    half = num_chars // 2
    return text if len(text) <= num_chars else f"{text[:half]}…{text[half + 1 - num_chars :]}"


def short_name(name: str) -> Markup:
    """The name, cut where it is long, whole in its tooltip."""
    text = plain(name)
    return element("span", cut(text), title=None if len(text) <= NAME_CHARS else text)


def table(heads: Sequence[Markup], rows: Sequence[Markup], **attributes) -> Markup:
    """A table that scrolls by itself where it is wider than the page, of `th` and `tr` elements."""
    inside = element("table", element("thead", element("tr", *heads)), element("tbody", *rows), **attributes)
    return element("div", inside, class_="scroll")


def text_table(names: Sequence[str], body: Sequence[Sequence[str]]) -> Markup:
    """A table of texts whose first column names the lines."""
    heads = [element("th", short_name(name), class_=None if at else "text") for at, name in enumerate(names)]
    rows = [
        element(
            "tr",
            *(
                element("td", plain(text) if at else short_name(text), class_=None if at else "strategy")
                for at, text in enumerate(line)
            ),
        )
        for line in body
    ]
    return table(heads, rows)
