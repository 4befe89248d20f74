"""One guarded HTTP exchange, on libcurl and the running asyncio loop.

No redirect is followed and nothing is retried here. What is asked for is judged where it can't be evaded: libcurl asks
`_open_socket` for every socket, with the very address that it then connects to. Rebinding (a name that resolves to a
public address when it is checked, and to a private one when it is connected to) has no gap to work in: there is no
check of a name, only of the sockaddr of each connect. A reused connection was judged when it was opened.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import math
import re
import selectors
import socket
import urllib.request
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import certifi
import pycurl

from stages.ingest.fetch.addresses import FetchError, Network, literal_address, redacted, refusal
from stages.ingest.fetch.settings import DownloadSettings

Headers = list[tuple[str, str]]
Check = Callable[[int, Headers], Callable[[bytes], None] | None]

DNS_CACHE_S = 300.0
MAX_NAMES = 16_384  # in the DNS cache
MAX_RESOLVERS = 256  # threads
BIG_BODY_BYTES = 4 << 20  # of a body that may only grow further when few others do
MAX_BIG_BODIES = 16  # that grow at once: what all bodies under way can hold is bounded, not only what each can
DRAIN_BYTES = 16 << 10  # of a body that nobody wants, read so that its connection can be used again
DRAIN_S = 1.0
CONNECT_POLL_S = 0.25

URL = re.compile(r"(https?)://(\[[^\]]*\]|[^/?#:@\[\]]+)(?::(\d+))?(?![^/?#])")  # scheme, host, port
# libcurl's numbers of what pycurl has no name for.
OPT_SUPPRESS_CONNECT_HEADERS = 265
OPT_DISALLOW_USERNAME_IN_URL = 278
FAILURES = {
    1: "bad_url",  # unsupported protocol
    3: "bad_url",
    5: "connect_failed",  # the proxy's name
    6: "dns_unavailable",
    7: "connect_failed",
    8: "bad_response",
    18: "truncated_body",
    27: "headers_too_large",  # a header line above libcurl's own cap
    35: "tls_failed",
    45: "connect_failed",
    51: "tls_failed",
    52: "disconnected",  # without a byte
    53: "tls_failed",
    54: "tls_failed",
    55: "disconnected",
    56: "disconnected",
    58: "tls_failed",
    59: "tls_failed",
    60: "tls_failed",
    61: "bad_response",  # content encoding
    63: "body_too_large",  # a Content-Length beyond 63 bits
    64: "tls_failed",
    66: "tls_failed",
    67: "bad_url",  # a user name in the URL
    77: "tls_failed",
    80: "tls_failed",
    82: "tls_failed",
    83: "tls_failed",
    90: "tls_failed",
    91: "tls_failed",
    97: "connect_failed",  # the proxy's handshake
    98: "tls_failed",
    100: "headers_too_large",
}


@dataclass(frozen=True)
class Reply:
    """A response. `body` is empty unless the status is 200."""

    status: int
    headers: Headers  # names lower case, values stripped
    body: bytes


class Transport:
    """HTTP GETs over pooled connections. To be made and used inside one running loop.

    `timeout_s` of a get starts with the call; more gets than `settings.concurrency` wait in libcurl meanwhile.
    """

    def __init__(self, settings: DownloadSettings, user_agent: str):
        self._settings = settings
        self._user_agent = user_agent
        self._allowed = tuple(ipaddress.ip_network(network) for network in settings.allow_addresses)
        self._loop = asyncio.get_running_loop()
        self._names = _Names(self._loop, min(settings.concurrency, MAX_RESOLVERS))
        self._idle: list[_Exchange] = []
        self._running: set[_Exchange] = set()
        self._big = _BigBodies()
        # Sockets are watched by a selector of ours, itself one descriptor of the loop: libcurl adds and removes each at
        # every request, which costs 60 us with the loop's add_reader.
        self._selector = selectors.DefaultSelector()
        self._loop.add_reader(self._selector.fileno(), self._sockets_ready)
        self._timer: asyncio.TimerHandle | None = None
        self._timer_s = self._due_s = math.inf  # when the timer fires, and when libcurl wants to be called
        self._multi = pycurl.CurlMulti()
        self._multi.setopt(pycurl.M_SOCKETFUNCTION, self._watch)
        self._multi.setopt(pycurl.M_TIMERFUNCTION, self._set_timer)
        self._multi.setopt(pycurl.M_MAX_TOTAL_CONNECTIONS, settings.concurrency)
        self._multi.setopt(pycurl.M_MAXCONNECTS, settings.concurrency)
        # Connections are not shared by several requests at once, so that a host's limits are what they say.
        self._multi.setopt(pycurl.M_PIPELINING, 0)

    async def get(self, url: str, check: Check, timeout_s: float) -> Reply:
        """The response to one GET of `url`, which `checked_url` has passed.

        Args:
            check: called with the status and headers before any body is kept; what it raises ends the exchange. It
                may return a function that judges the first part of the body in the same way.
            timeout_s: for the whole exchange, name resolution included.

        Raises:
            FetchError: the exchange failed; its class says how.
        """
        deadline_s = self._loop.time() + timeout_s
        parts = URL.match(url)
        if parts is None:
            raise FetchError("bad_url", redacted(url))
        scheme, host, port = parts[1], parts[2], int(parts[3] or (443 if parts[1] == "https" else 80))
        proxy = self._proxy(scheme, host, port)
        literal = literal_address(host)
        resolved: list[str] = []
        if proxy:  # the address that is connected to is the proxy's: of the host, only what is written can be judged
            spelled = "127.0.0.1" if host.rstrip(".").rpartition(".")[2] == "localhost" else literal
            why = spelled and refusal(spelled, self._allowed)
            if why:
                raise FetchError("address_refused", f"{host} is {spelled} ({why})")
        elif literal is None:
            left_s = min(deadline_s - self._loop.time(), self._settings.connect_timeout_s)
            addresses = await self._names.addresses(host, left_s)
            resolved = [f"+{host}:{port}:{','.join(addresses)}"]
        left_s = deadline_s - self._loop.time()
        if left_s <= 0:
            raise FetchError("total_timeout", f"nothing was asked within {timeout_s:g} s")
        exchange = (
            self._idle.pop() if self._idle else _Exchange(self._settings, self._user_agent, self._allowed, self._big)
        )
        done = exchange.prepare(url, host, proxy, resolved, check, left_s, self._loop, self._finish)
        self._running.add(exchange)
        self._multi.add_handle(exchange.curl)
        try:
            return await done
        finally:
            if exchange.done is done:  # cancelled; else it was released already, and may serve another get by now
                self._release(exchange)

    def close(self) -> None:
        """Ends what is under way, and every connection."""
        for exchange in list(self._running):
            exchange.done.cancel()
            self._release(exchange)
        if self._timer is not None:
            self._timer.cancel()
        for exchange in self._idle:
            exchange.curl.close()
        self._idle.clear()
        self._multi.close()
        self._loop.remove_reader(self._selector.fileno())
        self._selector.close()
        self._names.close()

    def _proxy(self, scheme: str, host: str, port: int) -> str:
        # Read here and not by libcurl, which would do so unasked, and would not say which requests go through it.
        if self._settings.proxies != "environment" or urllib.request.proxy_bypass_environment(f"{host}:{port}"):
            return ""
        proxies = urllib.request.getproxies_environment()
        return proxies.get(scheme) or proxies.get("all") or ""

    # libcurl's callbacks. It forbids calls into the multi handle from inside of them.

    def _watch(self, event: int, fd: int, _multi: object, _data: object) -> None:
        # libcurl may close a descriptor and get the same number again without a POLL_REMOVE in between; the kernel
        # then has forgotten the first, so that a change of what is there would fail: always removed, then added.
        if fd in self._selector.get_map():
            self._selector.unregister(fd)
        if event != pycurl.POLL_REMOVE:  # POLL_IN and POLL_OUT are EVENT_READ and EVENT_WRITE
            self._selector.register(fd, event)

    def _set_timer(self, timeout_ms: int) -> None:
        # libcurl moves its timer several times a request, mostly further away: one that is early enough stays, and
        # finds out when it fires that it is not due yet.
        self._due_s = self._loop.time() + timeout_ms / 1e3 if timeout_ms >= 0 else math.inf
        if timeout_ms >= 0 and self._due_s < self._timer_s:
            if self._timer is not None:
                self._timer.cancel()
            self._timer_s = self._due_s
            self._timer = self._loop.call_at(self._due_s, self._timer_fired)

    def _timer_fired(self) -> None:
        self._timer, self._timer_s = None, math.inf
        if self._due_s <= self._loop.time():
            self._multi.socket_action(pycurl.SOCKET_TIMEOUT, 0)
            self._collect()
        elif self._due_s < math.inf:
            self._timer_s = self._due_s
            self._timer = self._loop.call_at(self._due_s, self._timer_fired)

    def _sockets_ready(self) -> None:
        for key, events in self._selector.select(0):
            self._multi.socket_action(key.fd, events)  # EVENT_READ and EVENT_WRITE are CSELECT_IN and CSELECT_OUT
        self._collect()

    def _collect(self) -> None:
        left = 1
        while left:
            left, succeeded, failed = self._multi.info_read()
            for curl in succeeded:
                self._finish(curl.exchange, pycurl.E_OK, "")
            for curl, code, message in failed:
                self._finish(curl.exchange, code, message)

    def _finish(self, exchange: _Exchange, code: int, message: str) -> None:
        """Ends an exchange that libcurl is done with, or that a timer stopped."""
        result = exchange.result(code, message)
        done = exchange.done
        self._release(exchange)
        if not done.done():
            if isinstance(result, Reply):
                done.set_result(result)
            else:
                done.set_exception(result)

    def _release(self, exchange: _Exchange) -> None:
        self._running.remove(exchange)
        self._multi.remove_handle(exchange.curl)
        exchange.clear()
        self._idle.append(exchange)
        self._big.leave(exchange)


class _BigBodies:
    """Which bodies may grow beyond BIG_BODY_BYTES: the first few; the others are paused until one of them is done."""

    def __init__(self) -> None:
        self._growing: set[_Exchange] = set()
        self._paused: deque[_Exchange] = deque()

    def may_grow(self, exchange: _Exchange) -> bool:
        """Whether it may; else it is to be paused, and is told when it is its turn."""
        if exchange not in self._growing:
            if len(self._growing) >= MAX_BIG_BODIES:
                self._paused.append(exchange)
                return False
            self._growing.add(exchange)
        return True

    def leave(self, exchange: _Exchange) -> None:
        """The exchange is over, whatever it did here; libcurl must not be inside of a callback."""
        if exchange in self._growing:
            self._growing.remove(exchange)
            if self._paused:
                following = self._paused.popleft()
                self._growing.add(following)
                following.curl.pause(pycurl.PAUSE_CONT)
        elif self._paused:
            with contextlib.suppress(ValueError):
                self._paused.remove(exchange)


class _Exchange:
    """A Curl handle with the state of the one exchange that it is used for at a time."""

    def __init__(self, settings: DownloadSettings, user_agent: str, allowed: tuple[Network, ...], big: _BigBodies):
        self._settings = settings
        self._big = big
        self._allowed = allowed
        self.curl = curl = pycurl.Curl()
        curl.exchange = self
        curl.setopt(pycurl.NOSIGNAL, 1)
        curl.setopt(pycurl.PROTOCOLS, pycurl.PROTO_HTTP | pycurl.PROTO_HTTPS)
        curl.setopt(pycurl.FOLLOWLOCATION, 0)
        curl.setopt(pycurl.HTTP_VERSION, pycurl.CURL_HTTP_VERSION_1_1)
        curl.setopt(pycurl.HTTP09_ALLOWED, 0)
        curl.setopt(pycurl.NETRC, 0)
        curl.setopt(OPT_DISALLOW_USERNAME_IN_URL, 1)
        curl.setopt(OPT_SUPPRESS_CONNECT_HEADERS, 1)
        curl.setopt(pycurl.NOPROXY, "")  # what goes through a proxy is decided in Transport._proxy
        curl.setopt(pycurl.CAINFO, certifi.where())
        curl.setopt(pycurl.SSL_VERIFYPEER, 1)
        curl.setopt(pycurl.SSL_VERIFYHOST, 2)
        curl.setopt(pycurl.USERAGENT, user_agent)
        curl.setopt(pycurl.HTTPHEADER, ["Accept: image/*,*/*;q=0.8"])
        curl.setopt(pycurl.ACCEPT_ENCODING, "identity")  # what comes encoded all the same is decoded
        curl.setopt(pycurl.CONNECTTIMEOUT_MS, max(1, int(settings.connect_timeout_s * 1e3)))
        curl.setopt(pycurl.DNS_CACHE_TIMEOUT, int(DNS_CACHE_S))
        curl.setopt(pycurl.OPENSOCKETFUNCTION, self._open_socket)
        curl.setopt(pycurl.HEADERFUNCTION, self._header_line)
        curl.setopt(pycurl.WRITEFUNCTION, self._body_part)

    def prepare(
        self,
        url: str,
        host: str,
        proxy: str,
        resolved: list[str],
        check: Check,
        timeout_s: float,
        loop: asyncio.AbstractEventLoop,
        stop: Callable[[_Exchange, int, str], None],
    ) -> asyncio.Future[Reply]:
        """The future of one GET that the handle is set up for; `stop` ends it from outside of libcurl's callbacks."""
        self.done: asyncio.Future[Reply] = loop.create_future()
        self._host, self._proxy, self._check, self._loop, self._stop = host, proxy, check, loop, stop
        self._timeout_s = timeout_s
        self._started_s = loop.time()
        self._error: BaseException | None = None  # what ended it on our side
        self._refused: str | None = None
        self._num_sockets = 0
        self._header_bytes = 0
        self._lines: list[bytes] = []
        self._status = 0
        self._headers: Headers | None = None  # of the final response, once complete
        self._check_start: Callable[[bytes], None] | None = None
        self._parts: list[bytes] = []
        self._num_bytes = 0
        self._timer = loop.call_later(self._settings.first_byte_timeout_s, self._expect_first_byte)
        self.curl.setopt(pycurl.URL, url)
        self.curl.setopt(pycurl.PROXY, proxy)
        self.curl.setopt(pycurl.RESOLVE, resolved)
        self.curl.setopt(pycurl.TIMEOUT_MS, max(1, int(timeout_s * 1e3)))
        return self.done

    def clear(self) -> None:
        """Drops what would keep memory or a caller alive while the handle waits for its next use."""
        self._timer.cancel()
        self._check = self._check_start = self._stop = self._error = self.done = None
        self._parts, self._lines, self._headers = [], [], None

    def result(self, code: int, message: str) -> Reply | BaseException:
        """The response, or what the exchange failed of, given libcurl's code and message."""
        if self._error is not None:
            return self._error
        if self._headers is not None and self._status != 200:  # however its body ended
            return Reply(self._status, self._headers, b"")
        message = redacted(message).encode("utf-8", "replace").decode()  # it may quote a header that is no text
        if code == pycurl.E_OK:
            if self._headers is None:
                return FetchError("disconnected", "the response ended within its headers")
            return Reply(self._status, self._headers, b"".join(self._parts))
        error = FAILURES.get(code, "disconnected")
        if self._refused is not None and self._num_sockets == 0:
            return FetchError("address_refused", self._refused)
        if code == pycurl.E_OPERATION_TIMEDOUT:
            error = "total_timeout" if self.curl.getinfo(pycurl.REQUEST_SIZE) else "connect_timeout"
        elif code == pycurl.E_UNSUPPORTED_PROTOCOL:  # of the response: checked_url lets only http and https pass
            error = "bad_response"
        elif code == pycurl.E_RECV_ERROR and "chunk" in message.lower():
            error = "truncated_body"
        return FetchError(error, message)

    def _expect_first_byte(self) -> None:
        connected_s = self.curl.getinfo(pycurl.PRETRANSFER_TIME)  # from the start; 0 until then
        if not connected_s:
            self._timer = self._loop.call_later(CONNECT_POLL_S, self._expect_first_byte)
            return
        due_s = self._started_s + connected_s + self._settings.first_byte_timeout_s
        if self._loop.time() < due_s:
            self._timer = self._loop.call_at(due_s, self._expect_first_byte)
            return
        self._error = FetchError("first_byte_timeout", f"no status line in {self._settings.first_byte_timeout_s:g} s")
        self._stop(self, pycurl.E_OPERATION_TIMEDOUT, "")

    def _open_socket(self, _purpose: int, target: pycurl.CurlSockAddr) -> socket.socket | int:
        try:
            if not self._proxy:
                if target.family not in (socket.AF_INET, socket.AF_INET6):
                    self._refused = f"{self._host} is of address family {target.family}"
                    return pycurl.SOCKET_BAD
                address = target.addr[0]
                why = refusal(address, self._allowed)
                if why is not None:
                    self._refused = f"{self._host} is at {address} ({why})"
                    return pycurl.SOCKET_BAD
            opened = _Socket(target.family, target.socktype, target.protocol)
        except OSError as error:  # no IPv6 here, or no descriptors left
            if error.errno != errno.EAFNOSUPPORT:
                self._error = FetchError("connect_failed", f"no socket: {error.strerror}")
            return pycurl.SOCKET_BAD
        self._num_sockets += 1
        return opened

    def _header_line(self, line: bytes) -> int | None:
        self._header_bytes += len(line)  # of 1xx responses and trailers too
        if self._header_bytes > self._settings.max_header_bytes:
            return self._refuse("headers_too_large", f"above {self._settings.max_header_bytes:,} bytes")
        if self._headers is not None:
            return None  # a trailer
        if line not in (b"\r\n", b"\n"):
            if not self._lines:
                self._timer.cancel()
            self._lines.append(line)
            return None
        try:
            self._status, headers = _parsed(self._lines)
        except ValueError as error:
            return self._refuse("bad_response", str(error))
        self._lines = []
        if self._status < 200:  # an interim response: another status line follows
            return None
        self._headers = headers
        try:
            self._check_start = self._check(self._status, headers)
        except Exception as error:  # raised again where the exchange is awaited
            self._error = error
            return 0
        declared = next((value for name, value in headers if name == "content-length"), "")
        num_declared = int(declared) if declared.isascii() and declared.isdigit() else None
        if self._status != 200:
            if num_declared is None or num_declared > DRAIN_BYTES:
                return 0
            self._timer = self._loop.call_later(DRAIN_S, self._stop, self, pycurl.E_OPERATION_TIMEDOUT, "")
        elif num_declared is not None and num_declared > self._settings.max_body_bytes:
            return self._refuse("body_too_large", f"declared as {num_declared:,} bytes")
        return None

    def _body_part(self, part: bytes) -> int | None:
        if self._num_bytes + len(part) > BIG_BODY_BYTES and not self._big.may_grow(self):
            return pycurl.WRITEFUNC_PAUSE  # the part comes again
        self._num_bytes += len(part)
        if self._status != 200:
            return None if self._num_bytes <= DRAIN_BYTES else 0
        if self._num_bytes > self._settings.max_body_bytes:
            return self._refuse("body_too_large", f"above {self._settings.max_body_bytes:,} bytes")
        if self._check_start is not None:
            check_start, self._check_start = self._check_start, None
            try:
                check_start(part)
            except Exception as error:  # raised again where the exchange is awaited
                self._error = error
                return 0
        self._parts.append(part)
        return None

    def _refuse(self, error: str, detail: str) -> int:
        self._error = FetchError(error, detail)
        return 0  # to libcurl: not taken, so that it stops


class _Socket(socket.socket):
    """A socket whose descriptor pycurl duplicates for libcurl: closed with its last reference, without a warning."""

    def __del__(self) -> None:
        self.close()


class _Names:
    """A cache of what hosts' names resolve to, and the threads that ask.

    libcurl's own resolver has 20 threads (two a name), which a few dozen names of dead name servers keep busy for ten
    seconds each, and doesn't say whether a name is missing or the name server is.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, num_threads: int):
        self._loop = loop
        self._threads = ThreadPoolExecutor(num_threads, "resolver")
        self._known: dict[str, tuple[float, asyncio.Future[list[str]]]] = {}  # the time it expires at, in order

    async def addresses(self, host: str, timeout_s: float) -> list[str]:
        """The host's addresses, or FetchError: dns_failed where there are none, else dns_unavailable."""
        expires_s, found = self._known.get(host, (0.0, None))
        if found is None or expires_s < self._loop.time():
            found = self._loop.run_in_executor(self._threads, _resolved, host)
            self._known.pop(host, None)
            self._known[host] = (self._loop.time() + DNS_CACHE_S, found)
            if len(self._known) > MAX_NAMES:
                del self._known[next(iter(self._known))]
        if not found.done():
            # Not wait_for: one caller's end must not end it for the others.
            await asyncio.wait([found], timeout=timeout_s)
        if not found.done():
            raise FetchError("dns_unavailable", f"{host} was not resolved within {timeout_s:g} s")
        result = found.result()
        if isinstance(result, list):
            return result
        error, detail = result
        if error != "dns_failed" and self._known.get(host, (0.0, None))[1] is found:
            del self._known[host]  # may heal
        raise FetchError(error, detail)

    def close(self) -> None:
        """Forgets what waits; a thread that asks goes on until the system's resolver gives up."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _resolved(host: str) -> list[str] | tuple[str, str]:
    """The host's addresses, as libcurl takes them; or the class and detail of the failure."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except UnicodeError:
        return "dns_failed", f"{host} is no domain name"
    except OSError as error:
        missing = {socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)}
        return ("dns_failed" if error.errno in missing else "dns_unavailable"), f"{host}: {error.strerror}"
    addresses = dict.fromkeys(sockaddr[0].partition("%")[0] for *_, sockaddr in found)
    return [f"[{address}]" if ":" in address else address for address in addresses]


def _parsed(lines: list[bytes]) -> tuple[int, Headers]:
    """The status and the headers of a response's lines."""
    status = int(lines[0].split(None, 2)[1]) if lines and lines[0].startswith(b"HTTP/") else 0
    if status < 100:
        raise ValueError("no status line")
    headers: Headers = []
    for line in lines[1:]:
        text = line.decode("latin-1")
        name, colon, value = text.partition(":")
        if text[0] in " \t" and headers:  # continues the line before
            headers[-1] = (headers[-1][0], f"{headers[-1][1]} {text.strip()}")
        elif colon:
            headers.append((name.strip().lower(), value.strip()))
        else:
            raise ValueError(f"a header line without a colon: {text.strip()[:80]!r}")
    return status, headers
