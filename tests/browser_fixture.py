"""A real Chromium without a window that opens pages from disk, and says what they asked for and what they printed.

`conftest.py` makes the fixture `browser` of it; a test that uses it has the marker `browser`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")

# what a text's colour is laid on: the nearest background that is not transparent, blended with those behind it
CONTRASTS = """() => {
  const numbers = (colour) => {  // [r, g, b, a] of any CSS colour, as it is drawn
    const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
    canvas.fillStyle = colour;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data].map((byte, i) => (i < 3 ? byte : byte / 255));
  };
  const known = new Map();
  const rgba = (colour) => known.get(colour) ?? known.set(colour, numbers(colour)).get(colour);
  const background = (element) => {
    const layers = [];
    for (let at = element; at; at = at.parentElement) {
      const colour = rgba(getComputedStyle(at).backgroundColor);
      if (colour[3]) layers.push(colour);
      if (colour[3] === 1) break;
    }
    return layers.reverse().reduce((below, [r, g, b, a]) => [r, g, b].map((c, i) => a * c + (1 - a) * below[i]), [255, 255, 255]);
  };
  const light = (rgb) => rgb.slice(0, 3).map((c) => c / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const found = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || element.closest("script, title")) continue;
    if (!element.checkVisibility({ visibilityProperty: true })) continue;
    const style = getComputedStyle(element);
    const ink = rgba(element.closest("svg") ? style.fill : style.color);
    const paper = background(element);
    const drawn = ink.slice(0, 3).map((c, i) => ink[3] * c + (1 - ink[3]) * paper[i]);
    const [a, b] = [light(drawn), light(paper)].sort((x, y) => y - x);
    found.push([(a + 0.05) / (b + 0.05), walker.currentNode.data.trim().slice(0, 40), element.outerHTML.slice(0, 80)]);
  }
  return found;
}"""


def browser_path() -> str | None:
    """Where this machine has a Chromium; None where it has none."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


@contextlib.contextmanager
def started_browser() -> Iterator[Any]:
    """A running browser; it downloads nothing, but takes the machine's own."""
    from playwright.sync_api import sync_playwright

    path = browser_path()
    assert path is not None, f"no browser, expected one of {', '.join(NAMES)} on the PATH"
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=path)
        try:
            yield browser
        finally:
            browser.close()


@dataclasses.dataclass
class Opened:
    """A page in the browser, what it asked for besides itself, and what it printed or raised."""

    page: Any
    requests: list[str]
    printed: list[str]

    def contrasts(self) -> list[tuple[float, str, str]]:
        """(contrast as in WCAG 2, text, its element) of all visible text, the faintest first."""
        return sorted(tuple(one) for one in self.page.evaluate(CONTRASTS))

    def overflow_px(self) -> int:
        """By how much the page is wider than its window."""
        return self.page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


@contextlib.contextmanager
def opened(browser: Any, path: Path, quiet: bool = True, **context: Any) -> Iterator[Opened]:
    """The page of this file, without a network.

    Args:
        quiet: it must ask for nothing and print nothing; checked at the end.
        context: of playwright's `new_context`: viewport, color_scheme, ...
    """
    url = path.absolute().as_uri()
    requests: list[str] = []
    printed: list[str] = []

    def judge(route: Any) -> None:
        if route.request.url.partition("#")[0] == url:
            route.continue_()
        else:
            requests.append(route.request.url)
            route.abort()

    with contextlib.closing(browser.new_context(**context)) as own:
        own.route("**/*", judge)
        page = own.new_page()
        page.set_default_timeout(10_000)
        page.on("console", lambda message: printed.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: printed.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (printed.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.goto(url)
        result = Opened(page, requests, printed)
        yield result
        if quiet:
            assert (requests, printed) == ([], [])
