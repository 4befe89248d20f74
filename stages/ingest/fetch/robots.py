"""What a host's wishes forbid: its robots.txt (RFC 9309) and its responses' X-Robots-Tag.

    User-agent: *
    Disallow: /private/
    Disallow: /*.gif$
    Allow: /private/logo.png

The longest matching rule decides, and Allow wins a tie. The standard library's parser takes the first match and knows
no wildcards, so it would fetch what `Disallow: /*.jpg$` forbids.
"""

from __future__ import annotations

import asyncio
import re
import string
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable
from urllib.parse import quote

from stages.ingest.fetch.addresses import FetchError

AGENT = "winnow"
MAX_ROBOTS_BYTES = 500_000  # the rest is not read, as RFC 9309 allows
MAX_CACHE_CHARS = 64 << 20  # of all hosts' rules; beyond, those used longest ago are asked for again
OPT_OUTS = {"noai", "noimageai", "noindex", "noimageindex", "none"}
DIRECTIVES_WITH_VALUE = {"max-snippet", "max-image-preview", "max-video-preview", "unavailable_after"}
# The host can't be reached at all: a row fails as it would have failed itself.
UNREACHABLE = {
    "address_refused",
    "connect_failed",
    "connect_timeout",
    "dns_failed",
    "dns_unavailable",
    "host_down",
    "tls_failed",
}
# A robots.txt that is not there allows everything: any 4xx but 429, and redirects that lead nowhere.
UNAVAILABLE = {"bad_redirect", "forbidden", "http_error", "not_found", "too_many_redirects"}
_BOT_NAME = re.compile(r"[A-Za-z][\w./-]*")
_ORIGIN = re.compile(r"(https?://[^/?]+)(.*)", re.DOTALL)
_UNRESERVED = set(string.ascii_letters + string.digits + "-._~")


def opt_out(headers: Iterable[tuple[str, str]]) -> str | None:
    """The directive of an X-Robots-Tag that forbids this use, None where none does.

    Args:
        headers: (lower-case name, value). A value may be meant for one bot alone: `somebot: noai, noindex`.
    """
    for name, value in headers:
        if name != "x-robots-tag":
            continue
        is_for_us = True
        for token in value.lower().split(","):
            directive, colon, rest = (part.strip() for part in token.partition(":"))
            if colon and directive not in OPT_OUTS and directive not in DIRECTIVES_WITH_VALUE:
                if not _BOT_NAME.fullmatch(directive) and directive != "*":
                    continue  # a piece of unavailable_after's date
                is_for_us = directive in (AGENT, "*")  # for the rest of this header
                directive = rest
            if is_for_us and directive in OPT_OUTS:
                return directive
    return None


def _comparable(path: str) -> str:
    """A path in which equal octets are spelled equally: RFC 9309, 2.2.2."""

    def spelled(escape: re.Match[str]) -> str:
        character = chr(int(escape[0][1:], 16))
        return character if character in _UNRESERVED else escape[0].upper()

    ascii_path = quote(path, safe=string.printable, errors="replace")
    return re.sub(r"%[0-9A-Fa-f]{2}", spelled, ascii_path)


def _matches(pattern: str, path: str) -> bool:
    """Whether a rule's pattern (`*` is any run, a last `$` the end) matches a beginning of the path.

    Each piece is taken where it comes first: no backtracking, so no pattern is slow.
    """
    is_anchored = pattern.endswith("$")
    first, *pieces = (pattern[:-1] if is_anchored else pattern).split("*")
    if not path.startswith(first):
        return False
    position = len(first)
    if not pieces:
        return not is_anchored or position == len(path)
    for piece in pieces[:-1] if is_anchored else pieces:
        found = path.find(piece, position)
        if found < 0:
            return False
        position = found + len(piece)
    return not is_anchored or (len(path) - len(pieces[-1]) >= position and path.endswith(pieces[-1]))


class Rules:
    """The rules of one robots.txt that are meant for winnow, or, where it is not named, for every bot."""

    def __init__(self, text: str, unread: str | None = None):
        """`unread`: why the file could not be read although it should be there; then nothing is allowed."""
        self._unread = unread
        groups: dict[str, list[tuple[str, bool]]] = {}
        agents: list[str] = []
        is_naming = False  # in the lines that name the bots of a group
        for line in text.removeprefix("\ufeff").splitlines():
            key, _, value = line.partition("#")[0].partition(":")
            key, value = key.strip().lower(), value.strip()
            if key == "user-agent":
                named = re.match(r"[A-Za-z_-]*", value)[0].lower()  # the product, without its version
                agents = [*(agents if is_naming else []), "*" if value.startswith("*") else named]
                groups.setdefault(agents[-1], [])
                is_naming = True
            elif key in ("allow", "disallow"):
                is_naming = False
                if value:  # an empty Disallow forbids nothing
                    for agent in dict.fromkeys(agents):
                        groups[agent].append((_comparable(value), key == "allow"))
        # The longest first, Allow before Disallow: the first that matches decides.
        rules = groups.get(AGENT, groups.get("*", []))
        self._rules = sorted(rules, key=lambda rule: (-len(rule[0]), not rule[1]))
        self.num_chars = 200 + sum(len(pattern) + 100 for pattern, _ in self._rules)

    def refusal(self, path: str) -> str | None:
        """Why `path` (with its query) may not be fetched, None where it may."""
        if self._unread is not None:
            return self._unread
        path = _comparable(path)
        for pattern, is_allowed in self._rules:
            if _matches(pattern, path):
                return None if is_allowed else f"robots.txt disallows {pattern}"
        return None


class Robots:
    """The robots.txt of every host and scheme, asked for once in a run."""

    def __init__(self, get: Callable[[str], Awaitable[bytes]]):
        """`get` returns the body of a URL, or raises FetchError."""
        self._get = get
        self._verdicts: OrderedDict[str, asyncio.Future[Rules | FetchError]] = OrderedDict()
        self._num_chars = 0

    async def check(self, url: str) -> None:
        """Returns where the URL may be asked for, else raises FetchError."""
        origin, path = _ORIGIN.fullmatch(url).groups()
        verdict = self._verdicts.get(origin)
        if verdict is None:
            # A task of its own: a row that is cancelled must not take the others' answer with it.
            verdict = self._verdicts[origin] = asyncio.ensure_future(self._read(origin))
        else:
            self._verdicts.move_to_end(origin)
        rules = await asyncio.shield(verdict)
        if isinstance(rules, FetchError):
            raise FetchError(rules.error, rules.detail)
        if (refusal := rules.refusal(path if path.startswith("/") else "/" + path)) is not None:
            raise FetchError("robots_disallowed", refusal)

    async def close(self) -> None:
        """Ends the requests that are under way."""
        pending = [verdict for verdict in self._verdicts.values() if not verdict.done()]
        for verdict in pending:
            verdict.cancel()
        await asyncio.gather(*pending, return_exceptions=True)

    async def _read(self, origin: str) -> Rules | FetchError:
        """The rules of the origin, or the error of all its URLs."""
        try:
            body = await self._get(f"{origin}/robots.txt")
            rules = Rules(body[:MAX_ROBOTS_BYTES].decode("utf-8", errors="replace"))
        except FetchError as error:
            detail = f"{origin}/robots.txt: {error.error}: {error.detail}"
            if error.error in UNREACHABLE and error.http_status is None:
                del self._verdicts[origin]  # the host's own state says when it is worth another try
                return FetchError(error.error, detail)
            # Forbidden for the run where it should be there but did not come (RFC 9309, 2.3.1.4).
            rules = Rules("") if error.error in UNAVAILABLE else Rules("", unread=detail)
        self._num_chars += rules.num_chars
        while self._num_chars > MAX_CACHE_CHARS:
            oldest = next((key for key, verdict in self._verdicts.items() if verdict.done()), None)
            if oldest is None:
                break
            self._num_chars -= self._verdicts.pop(oldest).result().num_chars
        return rules
