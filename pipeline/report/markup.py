"""HTML and SVG built from elements. Text is escaped unless it is an element already, so nothing can be forgotten."""

from __future__ import annotations

from html import escape


class Markup(str):
    """Text that is HTML already: made by `element` and `raw` only."""

    __slots__ = ()


def raw(text: str) -> Markup:
    """The text as it is, for markup that we wrote ourselves (the style sheet)."""
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
    if tag in ("meta", "br", "hr", "link", "img"):
        return Markup(f"<{tag}{listed}>")
    return Markup(f"<{tag}{listed}>{join(content)}</{tag}>")
