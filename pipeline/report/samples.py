"""The page's gallery: what strategies keep and remove, nearest to each cut and at random, with small pictures.

Pictures are in the page as data; so that it stays small, fewer samples a group are shown where there are many.
"""

from __future__ import annotations

import base64

from pipeline.report.leaderboard import Leaderboard, plain
from pipeline.report.markup import Markup, element
from pipeline.report.records import Sample, SampleGroup, Strategy

MAX_BYTES = 2_500_000  # of the whole gallery
SHOWN_CAPTION_CHARS = 90  # the rest is in the tooltip
ABOUT = (
    "Rows nearest to each cut, among those that every other rule keeps: one side is in the selection, the other would "
    "be without this rule. And rows at random of all that is kept and removed, with the first rule that removes them."
)


def gallery(board: Leaderboard) -> tuple[str, Markup | None]:
    """What the section says, and its content: None where there are no samples, or no room for one of each group."""
    strategies = [strategy for strategy in board.run.compared if strategy.samples]
    most = max((len(group.samples) for strategy in strategies for group in strategy.samples), default=0)
    for num in range(most, 0, -1):
        content = element("div", *(_strategy(strategy, num) for strategy in strategies))
        if len(content.encode("utf-8", "replace")) <= MAX_BYTES:
            return (
                ABOUT if num == most else f"{ABOUT} {num} of {most} samples a side, to keep this page small."
            ), content
    return ABOUT, None


def _strategy(strategy: Strategy, num: int) -> Markup:
    groups = [_group(group, num) for group in strategy.samples if group.samples]
    return element("details", element("summary", plain(strategy.name)), *groups)


def _group(group: SampleGroup, num: int) -> Markup:
    what = element("code", plain(group.rule)) if group.rule else "at random"
    figures = [figure(sample) for sample in group.samples[:num]]
    return element("div", element("h3", f"{group.side}: ", what), element("div", *figures, class_="samples"))


def figure(sample: Sample) -> Markup:
    """A sample: its picture, blurred where it is flagged, and its caption."""
    caption = plain(sample.caption)
    cut = len(caption) > SHOWN_CAPTION_CHARS
    shown = f"{caption[: SHOWN_CAPTION_CHARS - 1]}…" if cut else caption
    data = None if sample.jpeg is None else f"data:image/jpeg;base64,{base64.b64encode(sample.jpeg).decode()}"
    lines = [
        element("b", plain(sample.value)) if sample.value is not None else None,
        element("small", plain(sample.removed_by)) if sample.value is None and sample.removed_by else None,
        element("span", shown or "(no caption)", title=caption if cut else None),
    ]
    class_ = "blurred" if sample.flagged else None
    picture = element("img", src=data, alt="", class_=class_) if data else None
    return element("figure", picture, element("figcaption", *lines), title=f"uid {plain(sample.uid)}")
