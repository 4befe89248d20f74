"""One URL to its bytes or to the class of its failure: redirects, retries, opt-outs, and when to give up.

A single exchange is transport.py's; when a host may be asked is hosts.py's. Nothing that a server or a URL does raises
out of `Fetcher.fetch`: every row ends as a `Fetched`.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import random
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from stages.ingest.fetch.addresses import MAX_DETAIL_CHARS, FetchError, checked_url, redacted
from stages.ingest.fetch.hosts import Host, Hosts
from stages.ingest.fetch.robots import Robots, opt_out
from stages.ingest.fetch.settings import DownloadSettings
from stages.ingest.fetch.transport import Reply, Transport

HOST_FAILURES = {  # of which ten in a row say that a host is down
    "dns_unavailable",
    "connect_failed",
    "connect_timeout",
    "first_byte_timeout",
    "total_timeout",
    "disconnected",
}
RETRIED = HOST_FAILURES | {"truncated_body", "server_error", "rate_limited"}  # what may heal
REDIRECTS = {301, 302, 303, 307, 308}
NOT_FOUND = {404, 410}
FORBIDDEN = {401, 402, 403, 451}
BACKOFF_S = 0.5  # doubled by every attempt, times a random share

# Declared types that are believed unless the bytes begin as an image's do. A wrong image type, text/plain and no type
# at all are common for images: there the bytes alone decide.
DOCUMENT_TYPES = {
    "application/javascript",
    "application/json",
    "application/pdf",
    "application/xhtml+xml",
    "application/xml",
    "image/svg+xml",
    "text/css",
    "text/html",
    "text/javascript",
    "text/xml",
}
DOCUMENT_KINDS = ("audio/", "video/")
DOCUMENT_STARTS = (b"<!doctype", b"<!--", b"<html", b"<head", b"<body", b"<script", b"<svg", b"<?xml", b"%pdf-", b"{")
RASTER_STARTS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"RIFF", b"GIF8", b"BM", b"II*\0", b"MM\0*")
MIN_JUDGED_BYTES = 16  # of the first part of a body; a shorter one is judged once it is whole
_MAY_NAME_SECRETS = re.compile("[?&;]")  # a checked URL has no user name and no fragment: only these start a pair
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

COLLAPSE_URLS = 300  # the last that ended
COLLAPSE_HOSTS = 20  # of which so many different hosts failed
COLLAPSE_ANSWERED = 0.02  # and less than this fraction was answered
SMALL_COLLAPSE_URLS = 20  # a table that is too short for the above, of which nothing at all was answered
SMALL_COLLAPSE_HOSTS = 5


@dataclass(frozen=True)
class Fetched:
    """What became of one URL."""

    body: bytes | None
    error: str | None  # a key of DOWNLOAD_FAILURES; None of a success
    detail: str  # of the error, redacted, at most 300 characters
    http_status: int | None  # of the exchange that ended it; None where that gave none
    final_url: str | None  # redacted; None when nothing was asked
    attempts: int  # exchanges with the first URL; 0 when none was made
    content_type: str | None  # as declared, without parameters
    body_bytes: int


@dataclass(frozen=True)
class FetchCounts:
    """What was fetched so far."""

    fetched: int  # URLs that gave a body
    received_bytes: int  # of bodies
    responses: int  # with any status; redirects, retries and robots.txt included
    errors: dict[str, int]  # URLs by class of failure


class _Row:
    """One URL on its way: what `check` saw of the response at hand."""

    __slots__ = ("attempts", "content_type", "host", "http_status", "is_image", "obeys_opt_outs", "url")

    def __init__(self, is_image: bool, obeys_opt_outs: bool):
        self.is_image = is_image  # else a robots.txt
        self.obeys_opt_outs = obeys_opt_outs
        self.attempts = 0
        self.url: str | None = None  # that was asked last
        self.host = ""  # of it
        self.http_status: int | None = None
        self.content_type: str | None = None

    def asks(self, url: str, host: str, is_first: bool) -> None:
        """Notes that an exchange begins."""
        self.attempts += is_first
        self.url, self.host = url, host
        self.http_status = self.content_type = None

    def check(self, status: int, headers: list[tuple[str, str]]) -> Callable[[bytes], None] | None:
        """What judges the first bytes of an image; raises where the headers alone say that the body is not wanted."""
        self.http_status = status
        if status != 200 or not self.is_image:
            return None
        for name, value in headers:
            if name == "content-type":
                self.content_type = value.partition(";")[0].strip().lower()[:100] or None
            elif name == "x-robots-tag" and self.obeys_opt_outs and (directive := opt_out(((name, value),))):
                raise FetchError("opted_out", f"X-Robots-Tag: {directive}")
        return self.check_body

    def check_body(self, body: bytes) -> None:
        """Raises where a body, or its first part, is a document. A declared type alone is no proof: servers err."""
        if len(body) >= MIN_JUDGED_BYTES and (reason := _not_an_image(body, self.content_type)):
            raise FetchError("not_an_image", reason)


class _Collapse:
    """Whether so little is answered that the fault must be on this side."""

    def __init__(self):
        self.cause: str | None = None
        self._last: deque[tuple[str, str | None]] = deque()  # (host, error or None where it was answered)
        self._num_answered = 0  # of the last
        self._was_answered = False  # anything, ever

    def note(self, host: str, error: str | None) -> None:
        """Counts a URL that was asked for; `error` is None where any response came."""
        self._last.append((host, error))
        if error is None:
            self._num_answered += 1
            self._was_answered = True
        if len(self._last) > COLLAPSE_URLS and self._last.popleft()[1] is None:
            self._num_answered -= 1
        if len(self._last) == COLLAPSE_URLS and self._num_answered < COLLAPSE_ANSWERED * COLLAPSE_URLS:
            self.cause = self.cause or self._told(COLLAPSE_HOSTS)

    def at_end(self) -> str | None:
        """The cause, of a table that may be too short for the rule of the last 300."""
        if self.cause is None and not self._was_answered and len(self._last) >= SMALL_COLLAPSE_URLS:
            return self._told(SMALL_COLLAPSE_HOSTS)
        return self.cause

    def _told(self, min_hosts: int) -> str | None:
        failed = [(host, error) for host, error in self._last if error is not None]
        if len({host for host, _ in failed}) < min_hosts:
            return None
        num_hosts = len({host for host, _ in self._last})
        classes = ", ".join(f"{count} {error}" for error, count in Counter(error for _, error in failed).most_common())
        return (
            f"of the last {len(self._last)} URLs (of {num_hosts} hosts) {self._num_answered or 'none'} "
            f"{'was' if self._num_answered < 2 else 'were'} answered: {classes}; "
            "is the network or its name server down?"
        )


class Fetcher:
    """Fetches URLs for one node, politely. Built in a running loop, and used from it; `counts` from any thread."""

    def __init__(
        self,
        settings: DownloadSettings,
        num_nodes: int,
        excluded_host: Callable[[str], bool] = lambda host: False,
    ):
        """The limits per host hold for the cluster: each of its `num_nodes` takes an equal share."""
        self._settings = settings
        self._excluded_host = excluded_host
        self._loop = asyncio.get_running_loop()
        self.gate = asyncio.Event()  # closed by whoever uses the bodies, where they come too fast
        self.gate.set()
        self._transport = Transport(settings, user_agent(settings.contact))
        self._hosts = Hosts(
            settings.concurrency,
            max(1, settings.per_host_concurrency // num_nodes),
            settings.per_host_requests_per_s / num_nodes,
        )
        self._robots = Robots(self._robots_txt) if settings.obey_robots_txt else None
        self._collapse = _Collapse()
        self._lock = threading.Lock()
        self._fetched = self._received_bytes = self._responses = 0
        self._errors: Counter[str] = Counter()

    @property
    def collapse(self) -> str | None:
        """Why it is of no use to go on, in one sentence, once hardly any of the last 300 URLs was answered."""
        return self._collapse.cause

    def collapse_at_end(self) -> str | None:
        """As `collapse`; also of a table of 20 URLs and more, of which none at all was answered."""
        return self._collapse.at_end()

    def counts(self) -> FetchCounts:
        """What was fetched so far; from any thread."""
        with self._lock:
            return FetchCounts(self._fetched, self._received_bytes, self._responses, dict(self._errors))

    async def close(self) -> None:
        """Closes all connections. No fetch may be under way."""
        if self._robots is not None:
            await self._robots.close()
        self._hosts.close()
        self._transport.close()

    async def fetch(self, url: str) -> Fetched:
        """What became of `url`; nothing that a server or a URL does raises."""
        row = _Row(is_image=True, obeys_opt_outs=self._settings.obey_x_robots_tag)
        body, error, detail = None, None, ""
        try:
            body = await self._with_retries(row, url)
        except FetchError as failure:
            error = failure.error
            detail = redacted(failure.detail)[:MAX_DETAIL_CHARS].encode("utf-8", "replace").decode()
        with self._lock:
            if body is not None:
                self._fetched += 1
                self._received_bytes += len(body)
            else:
                self._errors[error] += 1
        return Fetched(
            body=body,
            error=error,
            detail=detail,
            http_status=row.http_status,
            final_url=redacted(row.url) if row.url and _MAY_NAME_SECRETS.search(row.url) else row.url,
            attempts=row.attempts,
            content_type=row.content_type,
            body_bytes=0 if body is None else len(body),
        )

    async def _robots_txt(self, url: str) -> bytes:
        return await self._with_retries(_Row(is_image=False, obeys_opt_outs=False), url)

    async def _with_retries(self, row: _Row, url: str) -> bytes:
        """The body; notes for `collapse` whether anything answered."""
        url = checked_url(url)
        try:
            body = await self._attempts(row, url)
        except FetchError as failure:
            if row.url is not None:
                self._collapse.note(row.host, None if row.http_status is not None else failure.error)
            raise
        self._collapse.note(row.host, None)
        return body

    async def _attempts(self, row: _Row, url: str) -> bytes:
        """The body, after as many attempts as their failures deserve."""
        failure = None
        for attempt in range(self._settings.retries + 1):
            backoff_s = BACKOFF_S * 2**attempt * random.random()
            num_before = row.attempts
            try:
                return await self._attempt(row, url, backoff_s)
            except FetchError as error:
                if row.attempts == num_before:  # not asked: what the row saw of its host before says more
                    failure = failure or error
                    break
                failure = error
            if failure.error not in RETRIED or attempt == self._settings.retries:
                break
            if failure.error != "rate_limited":  # of such a host all rows wait, in hosts.py
                await asyncio.sleep(backoff_s)
        raise failure

    async def _attempt(self, row: _Row, url: str, backoff_s: float) -> bytes:
        """The body of `url`, or of where it redirects to. The deadline leaves out the wait for hosts' slots."""
        left_s = self._settings.total_timeout_s
        visited = []
        while True:
            key, name = _host_of(url)
            if self._excluded_host(name):
                raise FetchError("excluded", f"the host {name} is on an exclude list")
            if self._robots is not None and row.is_image:
                await self._robots.check(url)
            host = self._hosts.host(key)
            await self._hosts.enter(host)
            await self.gate.wait()
            started_s = time.monotonic()
            try:
                row.asks(url, key, is_first=not visited)
                reply = await self._transport.get(url, row.check, left_s)
                if reply.status == 200:
                    if row.is_image and (reason := _not_an_image(reply.body, row.content_type)):
                        raise FetchError("not_an_image", reason)
                    self._hosts.answered(host)
                    return reply.body
                if reply.status not in REDIRECTS:
                    raise self._status_failure(host, reply, backoff_s)
                visited.append(url)
                url = self._target(reply.headers, visited)
                self._hosts.answered(host)
            except FetchError as failure:
                if row.http_status is None:
                    row.http_status = failure.http_status
                self._learn(host, failure, row.http_status)
                raise
            finally:
                self._hosts.leave(host)
                self._responses += row.http_status is not None
            left_s -= time.monotonic() - started_s
            if left_s <= 0:
                raise FetchError("total_timeout", f"its redirects took {self._settings.total_timeout_s:g} s")

    def _learn(self, host: Host, failure: FetchError, http_status: int | None) -> None:
        """Tells the host's state how an exchange failed."""
        if failure.error in HOST_FAILURES:
            self._hosts.failed(host, f"{failure.error}: {redacted(failure.detail)[:MAX_DETAIL_CHARS]}")
        elif failure.error == "dns_failed":
            self._hosts.name_failed(host, failure.detail)
        elif http_status is not None and failure.error != "rate_limited":
            self._hosts.answered(host)

    def _status_failure(self, host: Host, reply: Reply, backoff_s: float) -> FetchError:
        """The failure that a status means; a host that limits rates is given its pause."""
        status = reply.status
        retry_after = next((value for name, value in reply.headers if name == "retry-after"), None)
        detail = f"HTTP {status}"
        if status == 429 or (status == 503 and retry_after is not None):
            error = "rate_limited"
            wait_s = _retry_after_s(retry_after)
            if wait_s is not None:
                detail += f", Retry-After {wait_s:.0f} s"
            self._hosts.limits_rate(host, max(wait_s or 0.0, backoff_s))
        elif status in NOT_FOUND:
            error = "not_found"
        elif status in FORBIDDEN:
            error = "forbidden"
        elif 500 <= status <= 599:
            error = "server_error"
        else:
            error = "http_error"
        return FetchError(error, detail)

    def _target(self, headers: list[tuple[str, str]], visited: list[str]) -> str:
        """Where a redirect leads; `visited` ends with the URL that it comes from."""
        location = next((value for name, value in headers if name == "location"), "").strip()
        if not location:
            raise FetchError("bad_redirect", "a redirect without a Location")
        try:
            target = checked_url(location, visited[-1])
        except FetchError as error:
            if error.error != "bad_url":
                raise
            scheme = _SCHEME.match(location)
            if scheme and scheme[1].lower() not in ("http", "https"):
                raise FetchError("bad_redirect", f"redirects to {scheme[1].lower()[:30]}:") from error
            raise FetchError("bad_redirect", f"redirects to what is no URL: {error.detail}") from error
        if len(visited) > self._settings.max_redirects:
            raise FetchError("too_many_redirects", f"more than {self._settings.max_redirects}")
        if target in visited:
            raise FetchError("too_many_redirects", "the redirects go round in a loop")
        return target


def user_agent(contact: str | None) -> str:
    """What winnow says it is: its name, version and purpose, and whom to write to."""
    try:
        version = importlib.metadata.version("winnow")
    except importlib.metadata.PackageNotFoundError:  # run from its source folder
        version = "source"
    return f"winnow/{version} (image-text dataset builder{f'; {contact}' if contact else ''})"


def _host_of(url: str) -> tuple[str, str]:
    """(host:port, host) of a checked URL."""
    scheme, _, rest = url.partition("://")
    authority = rest.partition("/")[0].partition("?")[0]
    name, colon, port = authority.rpartition(":")
    if not colon or authority.endswith("]"):
        name, port = authority, "443" if scheme == "https" else "80"
    name = name.rstrip(".")
    return f"{name}:{port}", name


def _retry_after_s(value: str | None) -> float | None:
    """Seconds from now that a Retry-After names, as a number or an HTTP date; None where it names none."""
    value = (value or "").strip()
    if value.isascii() and value.isdigit():
        return float(value[:15])
    try:
        then = parsedate_to_datetime(value)
        return max(0.0, then.timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError, OSError):
        return None


def _not_an_image(body: bytes, declared: str | None) -> str | None:
    """Why the bytes are a document and no image; None where they may be one."""
    if body.startswith(RASTER_STARTS):
        return None
    if not body:
        return "an empty body"
    if declared and (declared in DOCUMENT_TYPES or declared.startswith(DOCUMENT_KINDS)):
        return f"declared as {declared}"
    # Byte order marks and the zeros of UTF-16 go, so that one list of beginnings does.
    start = body[:1024].replace(b"\0", b"").lstrip(b"\xef\xbb\xbf\xff\xfe \t\r\n\f\v").lower()
    return next((f"begins with {found.decode()}" for found in DOCUMENT_STARTS if start.startswith(found)), None)
