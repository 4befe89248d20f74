"""The downloader above a single exchange, against real servers on loopback."""

from __future__ import annotations

import asyncio
import io
import re
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from email.utils import format_datetime

import pytest
from PIL import Image

from pipeline.core.errors import DOWNLOAD_FAILURES
from stages.ingest.fetch import fetcher as fetcher_module
from stages.ingest.fetch import hosts as hosts_module
from stages.ingest.fetch.fetcher import Fetched, Fetcher, user_agent
from stages.ingest.fetch.hosts import Hosts
from stages.ingest.fetch.robots import Rules, opt_out
from stages.ingest.fetch.settings import DownloadSettings

JPEG = io.BytesIO()
Image.new("RGB", (8, 8), (200, 30, 30)).save(JPEG, "JPEG")
JPEG = JPEG.getvalue()


def response(status: int = 200, body: bytes = b"", **headers: str) -> bytes:
    """A whole HTTP response; a header name's underscores become dashes, a value's line feeds repeat the header."""
    lines = [f"HTTP/1.1 {status} Whatever", f"Content-Length: {len(body)}"]
    for name, value in headers.items():
        lines += [f"{name.replace('_', '-')}: {one}" for one in value.split("\n")]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


IMAGE = response(200, JPEG, Content_Type="image/jpeg")


class Site:
    """A server on one address and more, that answers by `routes` (a path's response, or a function of the path)."""

    def __init__(self):
        self.port = 0
        self.requests: list[tuple[float, str, str]] = []  # (when, host header, path)
        self.agents: set[str] = set()
        self.in_flight: dict[str, int] = {}
        self.most_in_flight: dict[str, int] = {}

    def url(self, path: str, host: str = "127.0.0.1") -> str:
        return f"http://{host}:{self.port}{path}"

    def asked(self, path: str) -> int:
        return sum(asked == path for _, _, asked in self.requests)


Routes = Callable[[str], bytes | Awaitable[bytes | None] | None]


@asynccontextmanager
async def serving(routes: Routes, hosts: tuple[str, ...] = ("127.0.0.1",)):
    site, tasks = Site(), set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                path = head.split(" ")[1]
                host = re.search(r"(?im)^host: *(.*?):", head)[1]
                site.agents |= set(re.findall(r"(?im)^user-agent: *(.*?)\r$", head))
                site.requests.append((time.monotonic(), host, path))
                site.in_flight[host] = site.in_flight.get(host, 0) + 1
                site.most_in_flight[host] = max(site.in_flight[host], site.most_in_flight.get(host, 0))
                try:
                    answer = routes(path)
                    answer = await answer if isinstance(answer, Awaitable) else answer
                finally:
                    site.in_flight[host] -= 1
                if answer is None:
                    return  # hangs up
                writer.write(answer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, hosts[0], 0, backlog=512)
    servers = [server]
    site.port = server.sockets[0].getsockname()[1]
    for host in hosts[1:]:
        servers.append(await asyncio.start_server(serve, host, site.port, backlog=512))
    try:
        yield site
    finally:
        for server in servers:
            server.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@asynccontextmanager
async def fetching(num_nodes: int = 1, excluded: tuple[str, ...] = (), **settings):
    values = {
        "allow_addresses": ["127.0.0.0/8"],
        "connect_timeout_s": 20,
        "first_byte_timeout_s": 20,
        "total_timeout_s": 40,
        "per_host_requests_per_s": 10_000,
    }
    fetcher = Fetcher(DownloadSettings(**values | settings), num_nodes, lambda host: host in excluded)
    try:
        yield fetcher
    finally:
        await fetcher.close()


async def fetched(fetcher: Fetcher, urls: list[str]) -> list[Fetched]:
    rows = await asyncio.gather(*(fetcher.fetch(url) for url in urls))
    for row in rows:
        assert row.error is None or row.error in DOWNLOAD_FAILURES
        assert (row.body is None) == (row.error is not None)
        assert len(row.detail) <= 300
        assert (row.final_url is None) == (row.attempts == 0)
    return rows


@pytest.fixture(autouse=True)
def short_backoff(monkeypatch):
    monkeypatch.setattr(fetcher_module, "BACKOFF_S", 0.02)


def closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_each_status_has_its_class_and_only_what_may_heal_is_asked_again():
    expected = {
        200: (None, 1), 204: ("http_error", 1), 206: ("http_error", 1), 304: ("http_error", 1), 300: ("http_error", 1),
        400: ("http_error", 1), 401: ("forbidden", 1), 402: ("forbidden", 1), 403: ("forbidden", 1),
        404: ("not_found", 1), 410: ("not_found", 1), 418: ("http_error", 1), 451: ("forbidden", 1),
        429: ("rate_limited", 3), 500: ("server_error", 3), 502: ("server_error", 3), 503: ("server_error", 3),
        599: ("server_error", 3),
    }  # fmt: skip

    async def scenario():
        def routes(path):
            status = int(path[1:])
            return IMAGE if status == 200 else response(status, b"" if status in (204, 304) else JPEG)

        async with serving(routes) as site, fetching(contact="mailto:me@example.org") as fetcher:
            rows = await fetched(fetcher, [site.url(f"/{status}") for status in expected])
            counts = fetcher.counts()
            return site, dict(zip(expected, rows, strict=True)), counts

    site, rows, counts = asyncio.run(scenario())
    assert {status: (row.error, row.attempts) for status, row in rows.items()} == expected
    assert {status: site.asked(f"/{status}") for status in expected} == {s: n for s, (_, n) in expected.items()}
    assert all(row.http_status == status for status, row in rows.items())
    assert rows[200].body == JPEG and rows[200].content_type == "image/jpeg" and rows[200].body_bytes == len(JPEG)
    assert rows[200].final_url == site.url("/200")
    assert counts.fetched == 1 and counts.received_bytes == len(JPEG) and counts.errors["not_found"] == 2
    assert counts.responses == len(site.requests) == sum(attempts for _, attempts in expected.values())
    assert site.agents == {user_agent("mailto:me@example.org")}


def test_the_user_agent_says_who_asks():
    assert re.fullmatch(r"winnow/[\w.]+ \(image-text dataset builder; me@example\.org\)", user_agent("me@example.org"))
    assert re.fullmatch(r"winnow/[\w.]+ \(image-text dataset builder\)", user_agent(None))


def test_what_heals_is_fetched_in_the_end():
    async def scenario():
        asked: dict[str, int] = {}

        def routes(path):
            asked[path] = asked.get(path, 0) + 1
            if asked[path] > (1 if path == "/short" else 2):
                return IMAGE
            return {"/500": response(503), "/hang_up": None, "/short": IMAGE[:-20]}[path]

        # Behind /short the connection stays open: its body never ends.
        async with serving(routes) as site, fetching(total_timeout_s=2) as fetcher:
            rows = await fetched(fetcher, [site.url(path) for path in ("/500", "/hang_up", "/short")])
            asked.clear()
            async with fetching(retries=0) as other:
                return rows, await fetched(other, [site.url("/500"), site.url("/hang_up")])

    healed, given_up = asyncio.run(scenario())
    assert [(row.error, row.body) for row in healed] == [(None, JPEG)] * 3
    # libcurl itself asks once more where a connection that was used before is closed without a byte.
    assert [row.attempts for row in healed] in ([3, 3, 2], [3, 2, 2])
    assert [(row.error, row.attempts) for row in given_up] == [("server_error", 1), ("disconnected", 1)]


def test_redirects_are_followed_within_the_cap_and_to_nowhere_else():
    async def scenario():
        def routes(path):
            if path.startswith("/chain"):
                left = int(path[6:].partition("?")[0])
                status = (301, 302, 303, 307, 308)[left % 5]
                return response(status, Location=f"chain{left - 1}") if left else IMAGE
            if path.startswith("/loop"):
                return response(302, Location={"/loop_a": "/loop_b", "/loop_b": "/loop_a"}[path])
            targets = {
                "/up": "../%E4/../chain0?w=1#part",
                "/file": "file:///etc/passwd", "/data": "data:image/png;base64,AAAA", "/ftp": "FTP://127.0.0.1/x",
                "/metadata": "http://169.254.169.254/latest", "/bad": "http://[::1", "/empty": " ",
                "/excluded": f"http://127.0.0.2:{site.port}/chain0", "/secret": "/chain0?X-Amz-Signature=abcdef",
                "/port": f"//127.0.0.1:{closed_port()}/x",
            }  # fmt: skip
            if path in targets:
                return response(302, Location=targets[path])
            return response(301) if path == "/none" else IMAGE

        async with serving(routes) as site, fetching(excluded=("127.0.0.2",), retries=1) as fetcher:
            paths = [
                "/chain0", "/chain5", "/chain6", "/loop_a", "/up", "/file", "/data", "/ftp", "/metadata", "/bad", "/empty",
                "/none", "/excluded", "/secret", "/port",
            ]  # fmt: skip
            rows = await fetched(fetcher, [site.url(path) for path in paths])
            [directly] = await fetched(fetcher, [site.url("/x", "127.0.0.2")])
            return site, dict(zip(paths, rows, strict=True)), directly

    site, rows, directly = asyncio.run(scenario())
    assert {path: row.error for path, row in rows.items()} == {
        "/chain0": None, "/chain5": None, "/chain6": "too_many_redirects", "/loop_a": "too_many_redirects", "/up": None,
        "/file": "bad_redirect", "/data": "bad_redirect", "/ftp": "bad_redirect", "/metadata": "address_refused",
        "/bad": "bad_redirect", "/empty": "bad_redirect", "/none": "bad_redirect", "/excluded": "excluded",
        "/secret": None, "/port": "connect_failed",
    }  # fmt: skip
    assert rows["/chain5"].final_url == site.url("/chain0") and rows["/chain5"].attempts == 1
    assert rows["/up"].final_url == site.url("/chain0?w=1")
    assert "file:" in rows["/file"].detail and "data:" in rows["/data"].detail and "ftp:" in rows["/ftp"].detail
    assert rows["/file"].http_status == 302 and rows["/none"].http_status == 301
    assert rows["/port"].attempts == 2 and rows["/port"].http_status is None
    assert "abcdef" not in rows["/secret"].final_url and rows["/secret"].http_status == 200
    assert site.asked("/loop_a") == site.asked("/loop_b") == 1  # no cookies: once round is enough
    assert all(host == "127.0.0.1" for _, host, _ in site.requests)
    assert directly.error == "excluded" and directly.attempts == 0 and "127.0.0.2" in directly.detail


def test_a_deadline_covers_all_redirects_of_an_attempt():
    async def scenario():
        async def routes(path):
            await asyncio.sleep(0.15)
            return response(302, Location=f"/{int(path[1:]) + 1}")

        async with serving(routes) as site, fetching(total_timeout_s=0.4, max_redirects=20, retries=0) as fetcher:
            return await fetched(fetcher, [site.url("/1")])

    [row] = asyncio.run(scenario())
    assert row.error == "total_timeout" and row.attempts == 1


@pytest.mark.parametrize(
    "value, expected",
    [
        ("noai", "noai"), ("NoImageAI", "noimageai"), ("none", "none"), ("noindex, nofollow", "noindex"),
        ("nofollow, noimageindex", "noimageindex"), ("all", None), ("nofollow", None), ("noarchive,nosnippet", None),
        ("max-image-preview: large, noai", "noai"), ("noai, max-snippet: -1", "noai"), ("max-image-preview: none", None),
        ("googlebot: noindex", None), ("googlebot: nofollow, noindex", None), ("winnow: noai", "noai"),
        ("WINNOW: nofollow, noai", "noai"), ("*: noai", "noai"), ("googlebot: noai, winnow: noindex", "noindex"),
        ("winnow: nofollow, googlebot: noai", None), ("googlebot: noai\nnoindex", "noindex"), ("nofollow\nnoai", "noai"),
        ("unavailable_after: Friday, 25-Jun-10 15:00:00 PST, noai", "noai"), ("", None), (",:,::,", None),
        ("unavailable_after: 25 Jun 2010 15:00:00 PST", None),
    ],
)  # fmt: skip
def test_x_robots_tag(value, expected):
    assert opt_out([("x-robots-tag", one) for one in value.split("\n")]) == expected


def test_an_opt_out_ends_a_row_unless_the_config_says_otherwise():
    async def scenario():
        def routes(path):
            return response(200, JPEG, X_Robots_Tag="nosnippet\nmax-image-preview: large, noai")

        async with serving(routes) as site, fetching() as fetcher, fetching(obey_x_robots_tag=False) as other:
            return *await fetched(fetcher, [site.url("/a")]), *await fetched(other, [site.url("/a")])

    obeyed, ignored = asyncio.run(scenario())
    assert (obeyed.error, obeyed.detail, obeyed.attempts) == ("opted_out", "X-Robots-Tag: noai", 1)
    assert ignored.error is None and ignored.body == JPEG


def test_documents_are_told_from_images():
    html, svg = b"\xef\xbb\xbf \n<!DOCTYPE html><html>", b"<?xml version='1.0'?><svg xmlns='x'/>"
    cases = {
        "/html_as_jpeg": ("image/jpeg", html, "not_an_image"),
        "/svg_as_png": ("image/png", svg, "not_an_image"),
        "/utf16": ("image/jpeg", "<html>".encode("utf-16"), "not_an_image"),
        "/json": ("application/octet-stream", b'{"error": 1}', "not_an_image"),
        "/empty": ("image/jpeg", b"", "not_an_image"),
        "/said_html": ("text/html; charset=utf-8", JPEG, None),
        "/said_svg": ("IMAGE/SVG+XML", JPEG, None),
        "/text_html": ("text/html", b"Not found, sorry", "not_an_image"),
        "/svg": ("IMAGE/SVG+XML", b"\x1f\x8b" + b"\0" * 40, "not_an_image"),
        "/video": ("video/mp4", b"\0\0\0\x20ftypisom" + b"\0" * 40, "not_an_image"),
        "/said_text": ("text/plain", JPEG, None),
        "/said_png": ("image/png", JPEG, None),
        "/said_nothing": ("", JPEG, None),
        "/tiff": ("image/tiff", b"II*\0" + b"\0" * 60, None),
    }

    async def scenario():
        async with (
            serving(lambda path: response(200, cases[path][1], Content_Type=cases[path][0])) as site,
            fetching() as fetcher,
        ):
            return await fetched(fetcher, [site.url(path) for path in cases])

    rows = dict(zip(cases, asyncio.run(scenario()), strict=True))
    assert {path: row.error for path, row in rows.items()} == {path: case[2] for path, case in cases.items()}
    assert all(row.attempts == 1 and row.http_status == 200 for row in rows.values())
    assert rows["/empty"].detail == "an empty body" and rows["/said_html"].content_type == "text/html"


def test_a_short_retry_after_pauses_the_whole_host():
    kinds = {"127.0.0.1": "seconds", "127.0.0.2": "date", "127.0.0.3": "503"}

    async def scenario():
        begun = {}

        def routes(path):
            host = path[1:].partition("/")[0]
            if host in begun:
                return IMAGE
            begun[host] = time.monotonic()
            # A date has whole seconds: four seconds on is between three and four from now.
            date = format_datetime(datetime.now(timezone.utc) + timedelta(seconds=4), usegmt=True)
            status, wait = 503 if kinds[host] == "503" else 429, date if kinds[host] == "date" else "3"
            return response(status, Retry_After=wait)

        # A pause counts for no deadline.
        async with serving(routes, tuple(kinds)) as site, fetching(total_timeout_s=2) as fetcher:
            first = [asyncio.create_task(fetcher.fetch(site.url(f"/{host}/a", host))) for host in kinds]
            while fetcher.counts().responses < len(kinds):
                await asyncio.sleep(0.005)
            urls = [site.url(f"/{host}/{n}", host) for host in kinds for n in range(5)]
            rows = [*await fetched(fetcher, urls), *await asyncio.gather(*first)]
            waits_s = {
                host: [when - begun[host] for when, asked, _ in site.requests if asked == host] for host in kinds
            }
            return rows, waits_s

    rows, waits_s = asyncio.run(scenario())
    assert all(row.error is None for row in rows) and [row.attempts for row in rows] == [1] * 15 + [2] * 3
    for waited_s in waits_s.values():
        assert len(waited_s) == 7 and min(waited_s[1:]) > 2.9


def test_a_long_retry_after_fails_the_row_and_the_rest_of_its_host():
    async def scenario():
        limited = response(429, Retry_After="3600")
        async with (
            serving(lambda path: limited, ("127.0.0.1", "127.0.0.2")) as site,
            fetching(per_host_concurrency=1) as fetcher,
        ):
            return site, await asyncio.wait_for(fetched(fetcher, [site.url(f"/{n}") for n in range(20)]), 60)

    site, rows = asyncio.run(scenario())
    assert [row.error for row in rows] == ["rate_limited"] + ["host_down"] * 19
    assert "3600 s" in rows[0].detail and re.search(r"not asked until 20\d\d-.* UTC", rows[1].detail)
    assert (rows[0].attempts, rows[1].attempts, len(site.requests)) == (1, 0, 1)


def test_a_host_that_only_ever_asks_for_pauses_is_given_up(monkeypatch):
    monkeypatch.setattr(hosts_module, "MAX_PAUSE_S", 1.5)

    async def scenario():
        async with serving(lambda path: response(429, Retry_After="1")) as site, fetching(retries=20) as fetcher:
            return await fetched(fetcher, [site.url(f"/{n}") for n in range(40)])

    rows = asyncio.run(scenario())
    assert {row.error for row in rows} == {"rate_limited", "host_down"}


@pytest.mark.parametrize(
    "value", ["soon", "-5", "9" * 400, "Wed, 99 Foo 99999 25:61:61 GMT", "1e9", "٣", "Mon, 01 Jan 0001 00:00:00 GMT"]
)
def test_a_senseless_retry_after_breaks_nothing(value):
    seconds = fetcher_module._retry_after_s(value)
    assert seconds is None or seconds >= 0


def test_limits_per_host_hold_and_hosts_do_not_wait_for_each_other():
    hosts = tuple(f"127.0.0.{n}" for n in range(1, 6))

    def held_until(num_at_once):
        """Routes that answer nobody before so many requests are there together."""
        asked, all_there = [], asyncio.Event()

        async def routes(path):
            asked.append(path)
            if len(asked) == num_at_once:
                all_there.set()
            await asyncio.wait_for(all_there.wait(), 60)
            await asyncio.sleep(0.01)
            return IMAGE

        return routes

    async def scenario():
        # 6 a host over 2 nodes: 3 here.
        async with serving(held_until(15), hosts) as site, fetching(num_nodes=2, per_host_concurrency=6) as fetcher:
            rows = await fetched(fetcher, [site.url(f"/{n}", host) for n in range(30) for host in hosts])
        async with serving(held_until(4), hosts) as tight, fetching(concurrency=4, per_host_concurrency=3) as fetcher:
            urls = [tight.url(f"/{n}") for n in range(60)] + [tight.url("/late", host) for host in hosts[1:]]
            rows += await fetched(fetcher, urls)
            order = [host for _, host, _ in tight.requests]
        return rows, site.most_in_flight, tight.most_in_flight, order

    rows, most, tight_most, order = asyncio.run(scenario())
    assert all(row.error is None for row in rows)
    assert most == dict.fromkeys(hosts, 3)
    assert tight_most["127.0.0.1"] == 3
    assert max(order.index(host) for host in hosts[1:]) < 20  # not behind the 60 rows that came before them


class Ahead(asyncio.SelectorEventLoop):
    """A loop whose clock stands still while anything can go on, and then jumps to the next timer."""

    def __init__(self):
        super().__init__()
        self.now_s = 1000.0
        wait = self._selector.select

        def select(timeout):
            self.now_s += timeout or 0.0
            return wait(0)

        self._selector.select = select

    def time(self):
        return self.now_s


def test_a_rate_holds_at_every_moment():
    async def scenario():
        hosts = Hosts(concurrency=100, per_host_concurrency=10, per_host_requests_per_s=40)
        host, loop = hosts.host("a:80"), asyncio.get_running_loop()

        async def one():
            await hosts.enter(host)
            times.append(loop.time() - 1000)
            await asyncio.sleep(0.01)
            hosts.leave(host)

        times = []
        await asyncio.gather(*(one() for _ in range(60)))
        return times

    loop = Ahead()
    try:
        times = loop.run_until_complete(scenario())
    finally:
        loop.close()
    # A burst of the 10 slots, then one every 25 ms.
    assert times == pytest.approx([max(0, n - 9) / 40 for n in range(60)], abs=1e-3)


def test_a_rate_is_shared_by_the_nodes():
    async def scenario():
        async with (
            serving(lambda path: IMAGE) as site,
            fetching(num_nodes=2, per_host_requests_per_s=80, per_host_concurrency=20) as fetcher,
        ):
            begun_s = time.monotonic()
            rows = await fetched(fetcher, [site.url(f"/{n}") for n in range(60)])
            return rows, site.requests[-1][0] - begun_s

    rows, took_s = asyncio.run(scenario())
    assert all(row.error is None for row in rows)
    assert took_s > 1.2  # 50 at 40 a second here, after a burst of the 10 slots


def test_a_stalling_host_goes_down_while_others_go_on_and_a_probe_heals_it():
    async def scenario():
        is_stalling = True

        async def routes(path):
            if path.startswith("/slow") and is_stalling:
                await asyncio.sleep(60)
            return IMAGE

        async with (
            serving(routes, ("127.0.0.1", "127.0.0.2")) as site,
            fetching(first_byte_timeout_s=2, retries=0, per_host_concurrency=10, concurrency=12) as fetcher,
        ):
            slow = asyncio.create_task(fetched(fetcher, [site.url(f"/slow{n}") for n in range(500)]))
            good = await fetched(fetcher, [site.url(f"/{n}", "127.0.0.2") for n in range(200)])
            is_slow_done = slow.done()
            slow = await slow
            is_stalling = False
            [early] = await fetched(fetcher, [site.url("/slow_early")])
            host = fetcher._hosts.host(f"127.0.0.1:{site.port}")
            host.probe_at_s -= hosts_module.PROBE_EVERY_S  # as if a minute were over
            await fetched(fetcher, [site.url("/slow_probe")])
            late = await fetched(fetcher, [site.url(f"/slow_late{n}") for n in range(50)])
            return good, is_slow_done, slow, early, late

    good, is_slow_done, slow, early, late = asyncio.run(scenario())
    assert all(row.error is None for row in good) and not is_slow_done
    errors = [row.error for row in slow]
    num_asked = errors.count("first_byte_timeout")
    assert 10 <= num_asked <= 19 and errors.count("host_down") == 500 - num_asked
    down = next(row for row in slow if row.error == "host_down")
    assert down.attempts == 0 and re.search("failed 1[0-9] times in a row: first_byte_timeout", down.detail)
    assert early.error == "host_down"
    assert all(row.error is None for row in late)


def test_a_name_that_does_not_exist_is_looked_up_once(monkeypatch):
    lookups = []

    def no_such_name(host, *args, **kwargs):  # what the system's resolver says; nothing is sent
        lookups.append(host)
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_such_name)

    async def scenario():
        async with fetching() as fetcher:
            first = await fetched(fetcher, ["http://gone.invalid/1.jpg"])
            return first + await fetched(fetcher, [f"http://gone.invalid/{n}.jpg" for n in range(2, 9)])

    first, *others = asyncio.run(scenario())
    assert (first.error, first.attempts) == ("dns_failed", 1) and len(lookups) == 1
    assert {(row.error, row.attempts) for row in others} == {("dns_failed", 0)} and "cached" in others[0].detail


def test_what_is_no_url_fails_without_an_exchange():
    urls = [
        "",
        "file:///etc/passwd",
        "data:,x",
        "http://",
        "http://[::1",
        "javascript:1",
        "http://a b/",
        "\ud800",
        "http://\ud800/",
    ]

    async def scenario():
        async with fetching() as fetcher:
            return await fetched(fetcher, urls)

    assert {(row.error, row.attempts, row.final_url) for row in asyncio.run(scenario())} == {("bad_url", 0, None)}


def test_a_collapse_is_noticed_and_told():
    port = closed_port()

    async def scenario():
        async with serving(lambda path: response(404)) as site, fetching(retries=0) as fetcher:
            await fetched(fetcher, [site.url(f"/{n}") for n in range(100)])
            nothing_yet = []
            for start in range(0, 360, 60):
                nothing_yet.append(fetcher.collapse)
                hosts = [f"127.0.{1 + n // 6}.{start % 7}" for n in range(start, start + 60)]
                await fetched(fetcher, [f"http://{host}:{port}/x" for host in hosts])
            return nothing_yet, fetcher.collapse, fetcher.collapse_at_end()

    early, late, at_end = asyncio.run(scenario())
    assert early[:4] == [None] * 4  # 100 answers are among the last
    assert re.fullmatch(
        r"of the last 300 URLs \(of \d\d hosts\) (none was|1 was|[2-5] were) answered: 29\d connect_failed; "
        r"is the network or its name server down\?".replace(r"29\d", r"(29\d|300)"),
        late,
    )
    assert at_end == late


@pytest.mark.parametrize("num_urls, num_hosts, answers, expected", [
    (20, 5, False, True), (19, 5, False, False), (40, 4, False, False), (40, 20, True, False), (400, 19, False, True),
])  # fmt: skip
def test_a_small_table_collapses_only_where_nothing_at_all_answers(num_urls, num_hosts, answers, expected):
    port = closed_port()

    async def scenario():
        async with (
            serving(lambda path: response(404)) as site,
            fetching(retries=0, per_host_concurrency=100) as fetcher,
        ):
            if answers:
                await fetched(fetcher, [site.url("/x")])
            await fetched(fetcher, [f"http://127.0.3.{1 + n % num_hosts}:{port}/{n}" for n in range(num_urls)])
            return fetcher.collapse, fetcher.collapse_at_end()

    during, at_end = asyncio.run(scenario())
    assert during is None
    assert (at_end is not None) == expected and (not expected or "none was answered" in at_end)


ROBOTS = """\ufeffUser-Agent: *
Disallow: /
User-agent: otherbot
user-agent: Winnow/1.0  # us
Crawl-delay: 10
Disallow: /private
Allow: /private/open
Disallow: /*.gif$
Disallow: /caf\u00e9
disallow: /a%2fb
Disallow:
Sitemap: http://127.0.0.1/map
User-agent: winnow
Disallow: /also
"""


@pytest.mark.parametrize("path, is_allowed", [
    ("/", True), ("/x.jpg", True), ("/private", False), ("/privateer.jpg", False), ("/private/open/x", True),
    ("/x/y.gif", False), ("/x.gif?y", True), ("/caf%C3%A9/x", False), ("/caf%c3%a9", False), ("/a%2Fb", False),
    ("/a/b", True), ("/also/x", False), ("/%70rivate", False),
])  # fmt: skip
def test_robots_txt_rules(path, is_allowed):
    assert (Rules(ROBOTS).refusal(path) is None) == is_allowed


def test_robots_txt_of_hostile_shape_is_read():
    """With backtracking it would take longer than anyone can wait."""
    rules = Rules("User-agent: *\n" + "Disallow: /" + "*a" * 5_000 + "$\nnonsense\n:\nDisallow /x\nUser-agent\n")
    assert rules.refusal("/" + "a" * 4_000 + "b") is None and Rules("Disallow: /").refusal("/x") is None


def test_robots_txt_is_asked_for_once_a_host_and_obeyed():
    hosts = tuple(f"127.0.0.{n}" for n in range(1, 6))

    async def scenario():
        async def routes(path):
            await asyncio.sleep(0.02)
            return (
                response(200, b"User-agent: *\nDisallow: /no", Content_Type="text/plain") if "robots" in path else IMAGE
            )

        async with serving(routes, hosts[:2]) as site, fetching(obey_robots_txt=True) as fetcher:
            urls = [site.url(f"/{word}{n}", host) for host in hosts[:2] for word in ("yes", "no") for n in range(10)]
            return site, await fetched(fetcher, urls)

    site, rows = asyncio.run(scenario())
    assert [row.error for row in rows] == ([None] * 10 + ["robots_disallowed"] * 10) * 2
    assert site.asked("/robots.txt") == 2 and not any("/no" in path for _, _, path in site.requests)
    assert rows[10].attempts == 0 and "disallows /no" in rows[10].detail


@pytest.mark.parametrize("robots, expected", [
    (response(404), None), (response(403), None), (response(500), "robots_disallowed"), ("stall", "robots_disallowed"),
    (response(302, Location="/elsewhere"), "robots_disallowed"), (response(302, Location="/robots.txt"), None),
    (response(200, b"<html>no such page", Content_Type="text/html"), None),
])  # fmt: skip
def test_a_robots_txt_that_is_not_there(robots, expected):
    async def scenario():
        async def routes(path):
            if path == "/robots.txt" and robots == "stall":
                await asyncio.sleep(60)
            if path == "/elsewhere":
                return response(200, b"User-agent: *\nDisallow: /")
            return robots if path == "/robots.txt" else IMAGE

        deadline = {"first_byte_timeout_s": 0.2} if robots == "stall" else {}
        async with serving(routes) as site, fetching(obey_robots_txt=True, **deadline) as fetcher:
            rows = await fetched(fetcher, [site.url("/a"), site.url("/b")]) + await fetched(fetcher, [site.url("/c")])
            return rows, site.asked("/robots.txt")

    rows, num_asked = asyncio.run(scenario())
    assert {row.error for row in rows} == {expected} and num_asked <= 3


def test_robots_txt_of_an_unreachable_host_leaves_the_row_its_own_class():
    async def scenario():
        async with fetching(obey_robots_txt=True, retries=0) as fetcher:
            port = closed_port()
            rows = await fetched(fetcher, [f"http://127.0.4.{1 + n % 25}:{port}/x" for n in range(400)])
            return rows, fetcher.collapse

    rows, collapse = asyncio.run(scenario())
    assert {row.error for row in rows} == {"connect_failed"} and "robots.txt" in rows[0].detail
    assert {row.attempts for row in rows} == {0}
    assert collapse is None  # 25 questions only: robots.txt is asked for once by all rows that wait for it


def test_a_cancelled_row_leaves_no_slot_taken():
    async def scenario():
        async def routes(path):
            await asyncio.sleep(0.05)
            return IMAGE

        async with serving(routes) as site, fetching(per_host_concurrency=2, concurrency=2) as fetcher:
            for delay_s in (0, 0.001, 0.03, 0.05, 0.052, 0.06):
                tasks = [asyncio.create_task(fetcher.fetch(site.url(f"/{n}"))) for n in range(12)]
                await asyncio.sleep(delay_s)
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
            return await asyncio.wait_for(fetched(fetcher, [site.url(f"/{n}") for n in range(8)]), 60)

    assert all(row.error is None for row in asyncio.run(scenario()))


def test_a_row_cancelled_in_the_moment_it_is_let_in_gives_its_slot_on():
    async def scenario():
        hosts = Hosts(concurrency=1, per_host_concurrency=1, per_host_requests_per_s=1000)
        host = hosts.host("a:80")
        await hosts.enter(host)
        waiting = [asyncio.create_task(hosts.enter(host)) for _ in range(2)]
        await asyncio.sleep(0.01)
        hosts.leave(host)
        waiting[0].cancel()
        await asyncio.wait_for(waiting[1], 60)
        return waiting[0].cancelled(), host.in_flight

    assert asyncio.run(scenario()) == (True, 1)


def test_idle_hosts_are_forgotten_and_busy_ones_kept(monkeypatch):
    monkeypatch.setattr(hosts_module, "MAX_HOSTS", 100)

    async def scenario():
        hosts = Hosts(concurrency=10, per_host_concurrency=1, per_host_requests_per_s=1000)
        busy = hosts.host("busy:80")
        await hosts.enter(busy)
        for n in range(1_000):
            hosts.host(f"h{n}:80")
        return len(hosts), hosts.host("busy:80") is busy

    assert asyncio.run(scenario()) == (100, True)


@pytest.mark.parametrize("pause_s, refusals_an_answer, is_given_up", [(3, 7, True), (60, 1, True), (1, 1, False)])
def test_a_host_that_pauses_more_than_it_answers_is_given_up(pause_s, refusals_an_answer, is_given_up):
    """Its rows would else hold their shard for hours."""

    async def scenario():
        hosts = Hosts(8, 8, 100.0)
        host = hosts.host("a.test:80")
        for request in range(200):
            if request % (refusals_an_answer + 1) == refusals_an_answer:
                hosts.answered(host)
            else:  # as if the last pause had just ended
                hosts.limits_rate(host, max(0.0, host.paused_until_s - asyncio.get_running_loop().time()) + pause_s)
            if host.refused(asyncio.get_running_loop().time()) is not None:
                return request
        return None

    given_up_at = asyncio.run(scenario())
    assert (given_up_at is not None) == is_given_up
    assert given_up_at is None or given_up_at < 40
