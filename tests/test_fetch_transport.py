"""One exchange of the downloader, against raw sockets on loopback: every failure class, every guard."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import ipaddress
import pickle
import resource
import socket
import ssl
import struct
import threading
import time
import zlib

import pytest

from pipeline.core.errors import DOWNLOAD_FAILURES
from stages.ingest.fetch import transport as transport_module
from stages.ingest.fetch.addresses import FetchError, checked_url, literal_address, redacted, refusal
from stages.ingest.fetch.settings import DownloadSettings
from stages.ingest.fetch.transport import Transport

BODY = bytes(range(256)) * 8
OK = b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY


class Server:
    """Answers each request of each connection with what `answer(connection, request)` returns; None closes it."""

    def __init__(self, answer, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1"):
        self._answer, self._tls = answer, tls
        self.num_connections = 0
        self.requests: list[bytes] = []
        self._over = threading.Event()
        self._socket = socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET)
        self.port = self._socket.getsockname()[1]
        self.url = f"http{'s' if tls else ''}://127.0.0.1:{self.port}"
        threading.Thread(target=self._accept, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._over.set()
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def stall(self) -> None:
        """Returns when the server is over: what an answer does that never comes."""
        self._over.wait(60)

    def _accept(self):
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._socket.accept()
                self.num_connections += 1
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection):
        with contextlib.suppress(OSError), connection:
            if self._tls:
                connection = self._tls.wrap_socket(connection, server_side=True)
            with connection:
                while request := self._request(connection):
                    self.requests.append(request)
                    answer = self._answer(connection, request)
                    if answer is None:
                        return
                    connection.sendall(answer)

    @staticmethod
    def _request(connection) -> bytes:
        got = b""
        while not got.endswith(b"\r\n\r\n"):
            more = connection.recv(65_536)
            if not more:
                return b""
            got += more
        return got


def closing(text: bytes):
    """An answer that is sent and followed by the connection's end."""

    def answer(connection, _request):
        connection.sendall(text)

    return answer


def settings(**changes) -> DownloadSettings:
    return DownloadSettings(**({"allow_addresses": ["127.0.0.0/8"], "concurrency": 32} | changes))


def accept(_status, _headers):
    """A check that refuses nothing."""


def run(use, **changes):
    """What the coroutine function `use` returns, called with a transport."""

    async def main():
        transport = Transport(settings(**changes), "winnow-test/1")
        try:
            return await use(transport)
        finally:
            transport.close()

    return asyncio.run(main())


def get(url, timeout_s=10.0, check=accept, **changes):
    return run(lambda transport: transport.get(url, check, timeout_s), **changes)


def failure(url, timeout_s=10.0, **changes) -> FetchError:
    with pytest.raises(FetchError) as caught:
        get(url, timeout_s, **changes)
    assert caught.value.error in DOWNLOAD_FAILURES
    return caught.value


def test_a_get_returns_status_headers_and_body():
    with Server(lambda *_: OK) as server:
        reply = get(server.url + "/a.png?w=1")
    assert (reply.status, reply.body) == (200, BODY)
    assert ("content-type", "image/png") in reply.headers
    lines = server.requests[0].decode().split("\r\n")
    assert lines[0] == "GET /a.png?w=1 HTTP/1.1"
    assert {"User-Agent: winnow-test/1", "Accept: image/*,*/*;q=0.8", "Accept-Encoding: identity"} <= set(lines)
    assert not any(line.lower().startswith(("cookie", "authorization", "referer")) for line in lines)


def test_connections_are_reused_and_handles_do_not_pile_up():
    def answer(_connection, request):
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 9\r\n\r\nnot found" if b"/gone" in request else OK

    async def use(transport):
        for i in range(300):
            assert (await transport.get(f"{server.url}/{i}", accept, 10)).body == BODY
            assert (await transport.get(f"{server.url}/gone", accept, 10)).body == b""
        await asyncio.gather(*[transport.get(f"{server.url}/{i}", accept, 10) for i in range(200)])
        assert len(transport._idle) <= 200 and not transport._running

    with Server(answer) as server:
        run(use)
    assert server.num_connections <= 33
    assert len(server.requests) == 800


REFUSED_SPELLINGS = (
    *("127.0.0.1", "localhost", "2130706433", "0x7f.1", "0x7f000001", "0177.0.0.1", "127.1"),
    *("[::ffff:127.0.0.1]", "0.0.0.0"),
)


@pytest.mark.parametrize("host", REFUSED_SPELLINGS)
def test_no_spelling_of_a_private_address_is_connected_to(host):
    with Server(lambda *_: OK) as server:
        error = failure(checked_url(f"http://{host}:{server.port}/"), allow_addresses=[])
        assert error.error == "address_refused"
        assert "loopback" in error.detail or "unspecified" in error.detail
        assert server.num_connections == 0
        if host not in ("localhost", "0.0.0.0"):
            assert get(checked_url(f"http://{host}:{server.port}/")).status == 200  # the spelling does lead there


def test_loopback_of_ipv6_is_refused():
    try:
        server = Server(lambda *_: OK, address="::1")
    except OSError:
        pytest.skip("no IPv6 here")
    with server:
        url = f"http://[::1]:{server.port}/"
        assert failure(url).error == "address_refused"
        assert server.num_connections == 0
        assert get(url, allow_addresses=["::1/128"]).status == 200


def test_a_name_is_judged_by_the_addresses_it_resolves_to(monkeypatch):
    answers = {
        "private.test": ["127.0.0.1", "10.0.0.7"],
        "metadata.test": ["169.254.169.254"],
        "ula.test": ["fd00:ec2::254"],
    }

    def getaddrinfo(host, *_args, **_kwargs):
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, 0)) for address in answers[host]]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with Server(lambda *_: OK) as server:
        for name, addresses in answers.items():
            error = failure(f"http://{name}:{server.port}/", allow_addresses=[])
            assert error.error == "address_refused"
            assert name in error.detail and any(address in error.detail for address in addresses)
        assert server.num_connections == 0
        assert get(f"http://private.test:{server.port}/").status == 200
        assert f"Host: private.test:{server.port}".encode() in server.requests[0]


@pytest.mark.parametrize(
    "code, expected",
    [(socket.EAI_NONAME, "dns_failed"), (socket.EAI_AGAIN, "dns_unavailable"), (socket.EAI_FAIL, "dns_unavailable")],
)
def test_a_missing_name_is_told_from_a_missing_name_server(monkeypatch, code, expected):
    asked = []

    def getaddrinfo(host, *_args, **_kwargs):
        asked.append(host)
        raise socket.gaierror(code, "as the system says")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def use(transport):
        for _ in range(2):
            with pytest.raises(FetchError) as caught:
                await transport.get("http://nowhere.test/", accept, 5)
            assert caught.value.error == expected
            assert "nowhere.test: as the system says" in caught.value.detail

    run(use)
    assert len(asked) == (1 if expected == "dns_failed" else 2)  # what may heal is asked again


def test_a_name_that_no_server_could_know_fails_as_dns():
    assert failure("http://" + "a" * 64 + ".test/").error == "dns_failed"


def test_slow_name_servers_hold_nobody_up(monkeypatch):
    over = threading.Event()

    def getaddrinfo(host, *_args, **_kwargs):
        if host.startswith("slow"):
            over.wait(60)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", 0))]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)

    async def use(transport):
        slow = [asyncio.ensure_future(transport.get(f"http://slow{i}.test/", accept, 300)) for i in range(30)]
        await asyncio.sleep(0.1)
        assert (await transport.get(f"http://fast.test:{server.port}/", accept, 50)).status == 200
        with pytest.raises(FetchError) as caught:
            await transport.get("http://slow.test/", accept, 0.5)
        assert caught.value.error == "dns_unavailable"
        assert not any(task.done() for task in slow)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)

    try:
        with Server(lambda *_: OK) as server:
            run(use, concurrency=64)
    finally:
        over.set()


def test_a_closed_port_fails_to_connect():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        assert failure(f"http://127.0.0.1:{unused.getsockname()[1]}/").error == "connect_failed"


def test_a_listener_that_accepts_nothing_ends_at_the_connect_deadline():
    with socket.socket() as full, contextlib.ExitStack() as stack:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        for _ in range(8):  # the queue of accepted connections is full: further SYNs are dropped
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(full.getsockname())
        time.sleep(0.1)
        url = f"http://127.0.0.1:{full.getsockname()[1]}/"
        error = failure(url, 300, connect_timeout_s=0.4, first_byte_timeout_s=0.2)
        assert error.error == "connect_timeout"


def test_a_silent_server_ends_at_the_first_byte_deadline():
    with Server(lambda *_: server.stall()) as server:
        before_s = time.monotonic()
        assert failure(server.url, 300, first_byte_timeout_s=0.3).error == "first_byte_timeout"
        assert time.monotonic() - before_s > 0.25


@pytest.mark.parametrize("start", [b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n", b"HTTP/1.1 200 OK\r\n"])
def test_a_trickle_ends_at_the_total_deadline(start):
    def trickle(connection, _request):
        connection.sendall(start)
        for _ in range(600):
            time.sleep(0.05)
            connection.sendall(b"x")

    with Server(trickle) as server:
        before_s = time.monotonic()
        assert failure(server.url, timeout_s=2.0, first_byte_timeout_s=1.5).error == "total_timeout"
        assert time.monotonic() - before_s > 1.9


CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        (b"", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n", "disconnected"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nshort", "truncated_body"),
        (CHUNKED + b"5\r\nhello\r\n", "truncated_body"),
        (CHUNKED + b"5\r\nhello\r\nzz\r\n", "truncated_body"),
        (CHUNKED + b"5\r\nhelloXX", "truncated_body"),
        (b"<html>hello</html>\r\n\r\n", "bad_response"),
        (b"HTTP/1.1 abc\r\n\r\n", "bad_response"),
        (b"HTTP/9.9 200 OK\r\n\r\n", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 5\r\n\r\nhello", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Encoding: unheard\r\nContent-Length: 5\r\n\r\nhello", "bad_response"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99999999999999999999999\r\n\r\n", "body_too_large"),
    ],
)
def test_a_broken_response_is_named(text, expected):
    with Server(closing(text)) as server:
        assert failure(server.url).error == expected


def test_a_reset_connection_is_a_disconnect():
    def reset(connection, _request):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nhello")
        time.sleep(0.1)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with Server(reset) as server:
        assert failure(server.url).error == "disconnected"


def test_interim_responses_and_trailers_are_not_the_response():
    text = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\nHTTP/1.1 100 Continue\r\n\r\n"
    text += (
        b"HTTP/1.1 200 OK\r\nX-A:  caf\xe9 \r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\nX-Late: 1\r\n\r\n"
    )
    with Server(closing(text)) as server:
        reply = get(server.url)
    assert (reply.status, reply.body) == (200, b"hello")
    assert reply.headers == [("x-a", "café"), ("transfer-encoding", "chunked")]


def flood(connection, _request):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    with contextlib.suppress(OSError):
        for i in range(1_000_000):
            connection.sendall(b"X-%d: %s\r\n" % (i, b"y" * 1_000))


def interim_flood(connection, _request):
    with contextlib.suppress(OSError):
        for _ in range(1_000_000):
            connection.sendall(b"HTTP/1.1 103 Early Hints\r\nLink: %s\r\n\r\n" % (b"y" * 1_000))


def long_line(connection, _request):
    connection.sendall(b"HTTP/1.1 200 OK\r\nX: ")
    with contextlib.suppress(OSError):
        for _ in range(100_000):
            connection.sendall(b"y" * 10_000)


@pytest.mark.parametrize("answer", [flood, interim_flood, long_line])
def test_a_header_flood_is_stopped(answer):
    with Server(answer) as server:
        assert failure(server.url, max_header_bytes=32 << 10).error == "headers_too_large"


def test_a_declared_body_above_the_cap_is_not_read():
    with Server(lambda *_: b"HTTP/1.1 200 OK\r\nContent-Length: 5000000000\r\n\r\n") as server:
        error = failure(server.url, max_body_bytes=1_000)
    assert (error.error, error.detail) == ("body_too_large", "declared as 5,000,000,000 bytes")


def endless(connection, _request):
    connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
    with contextlib.suppress(OSError):
        while True:
            connection.sendall(b"y" * 65_536)


def test_an_endless_body_is_stopped_at_the_cap():
    with Server(endless) as server:
        assert failure(server.url, max_body_bytes=1 << 20).error == "body_too_large"


def test_a_decompression_bomb_is_stopped_at_the_cap():
    squeezed = zlib.compressobj(9, wbits=31)
    bomb = b"".join(squeezed.compress(bytes(1 << 20)) for _ in range(150)) + squeezed.flush()  # 150 MiB in 150 kB
    head = b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(bomb)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with Server(lambda *_: head + bomb) as server:
        assert failure(server.url, max_body_bytes=8 << 20).error == "body_too_large"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # kB


@pytest.mark.parametrize(
    "coding, text", [("gzip", gzip.compress(BODY)), ("deflate", zlib.compress(BODY)), ("x-gzip", gzip.compress(BODY))]
)
def test_an_encoded_body_is_decoded_though_not_asked_for(coding, text):
    head = f"HTTP/1.1 200 OK\r\nContent-Encoding: {coding}\r\nContent-Length: {len(text)}\r\n\r\n".encode()
    with Server(lambda *_: head + text) as server:
        assert get(server.url).body == BODY


def test_the_check_sees_the_headers_before_any_body_and_stops_it():
    seen = []

    def check(status, headers):
        seen.append((status, dict(headers)["content-type"]))
        raise FetchError("opted_out", "X-Robots-Tag: noai")

    def answer(connection, _request):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 100000000\r\n\r\n")
        with contextlib.suppress(OSError):
            for _ in range(1_000):
                connection.sendall(bytes(100_000))
                sent.append(1)

    sent: list[int] = []
    with Server(answer) as server, pytest.raises(FetchError) as caught:
        get(server.url, check=check)
    assert (caught.value.error, seen) == ("opted_out", [(200, "image/png")])
    assert len(sent) < 900


def test_what_a_check_raises_by_mistake_comes_out():
    def check(_status, _headers):
        raise KeyError("a bug")

    with Server(lambda *_: OK) as server, pytest.raises(KeyError, match="a bug"):
        get(server.url, check=check)


@pytest.mark.parametrize(
    "body",
    [b"Content-Length: 1000000\r\n\r\nx", b"Content-Length: 1000\r\n\r\nx", b"\r\n", b"Content-Length: 10\r\n\r\nx"],
)
def test_another_status_is_a_reply_without_its_body(body):
    def stall(connection, _request):
        connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://169.254.169.254/\r\n" + body)
        server.stall()

    with Server(stall) as server:
        reply = get(server.url)
    assert (reply.status, reply.body) == (302, b"")
    assert ("location", "http://169.254.169.254/") in reply.headers
    assert len(server.requests) == 1


def test_a_cancelled_get_frees_its_handle():
    async def use(transport):
        for _ in range(20):
            task = asyncio.ensure_future(transport.get(server.url + "/slow", accept, 50))
            await asyncio.sleep(0.01)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        assert (len(transport._idle), len(transport._running)) == (1, 0)
        assert (await transport.get(server.url + "/fast", accept, 10)).body == BODY

    with Server(lambda _connection, request: server.stall() if b"/slow" in request else OK) as server:
        run(use)


def test_closing_ends_what_is_under_way():
    async def use(transport):
        task = asyncio.ensure_future(transport.get(server.url, accept, 50))
        await asyncio.sleep(0.1)
        transport.close()
        with pytest.raises(asyncio.CancelledError):
            await task
        return len(asyncio.all_tasks())

    async def main():
        return await use(Transport(settings(), "x"))

    with Server(lambda *_: server.stall()) as server:
        assert asyncio.run(main()) == 1


def test_the_environments_proxy_is_used_only_when_asked(monkeypatch):
    with Server(lambda *_: OK) as proxy, Server(lambda *_: OK) as server:
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "all_proxy"):
            monkeypatch.setenv(name, proxy.url)
        monkeypatch.delenv("no_proxy", raising=False)
        monkeypatch.delenv("NO_PROXY", raising=False)
        get(server.url)
        assert (proxy.num_connections, server.num_connections) == (0, 1)
        # The proxy's own loopback address is not refused; the host's name is left to it to resolve.
        get("http://public.test/a", allow_addresses=[], proxies="environment")
        assert proxy.requests[0].startswith(b"GET http://public.test/a HTTP/1.1\r\n")
        for host in ("127.0.0.1", "2130706433", "localhost", "[::1]", "169.254.169.254", "0xa9.0xfe.0xa9.0xfe"):
            error = failure(f"http://{host}/", allow_addresses=[], proxies="environment")
            assert error.error == "address_refused"
        assert (len(proxy.requests), server.num_connections) == (1, 1)
        monkeypatch.setenv("no_proxy", "127.0.0.1")  # and what goes around it is judged where it connects
        get(server.url, proxies="environment")
        assert failure(server.url, allow_addresses=[], proxies="environment").error == "address_refused"
        assert (len(proxy.requests), server.num_connections) == (1, 2)


def certificate(folder, name):
    """A self-signed certificate for `name`, as (its path, its server's context)."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    built = x509.CertificateBuilder().subject_name(subject).issuer_name(subject).public_key(key.public_key())
    built = built.serial_number(7).not_valid_before(now - datetime.timedelta(days=1))
    built = built.not_valid_after(now + datetime.timedelta(days=1))
    built = built.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
    built = built.add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    path = folder / f"{name}.pem"
    path.write_bytes(built.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
    key_path = folder / f"{name}.key"
    key_path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path, key_path)
    return path, context


def test_only_a_trusted_certificate_of_the_host_is_accepted(tmp_path, monkeypatch):
    path, context = certificate(tmp_path, "localhost")
    with Server(lambda *_: OK, tls=context) as server:
        url = f"https://localhost:{server.port}/"
        assert failure(url).error == "tls_failed"  # self-signed
        monkeypatch.setattr("certifi.where", lambda: str(path))
        assert get(url).body == BODY
        assert failure(f"https://127.0.0.1:{server.port}/").error == "tls_failed"  # another host's
        assert len(server.requests) == 1
    with Server(lambda *_: OK) as server:  # one that waits for the rest of a request, and never shakes hands
        url = f"https://127.0.0.1:{server.port}/"
        assert failure(url, connect_timeout_s=0.4, first_byte_timeout_s=0.2).error == "connect_timeout"
    with socket.create_server(("127.0.0.1", 0)) as plain:

        def answer():
            connection, _ = plain.accept()
            with connection:
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.recv(65_536)

        threading.Thread(target=answer, daemon=True).start()
        assert failure(f"https://127.0.0.1:{plain.getsockname()[1]}/").error == "tls_failed"


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "ftp://127.0.0.1/x", "gopher://127.0.0.1/", "http://u:p@127.0.0.1/", "http:///"]
)
def test_the_transport_itself_asks_for_http_only(url):
    assert failure(url).error == "bad_url"


PUBLIC = [
    "8.8.8.8",
    "1.1.1.1",
    "172.32.0.1",
    "100.128.0.1",
    "192.0.1.1",
    "2606:4700::1111",
    "::ffff:8.8.8.8",
    "64:ff9b::808:808",
    "2002:808:808::1",
]
REFUSED = [
    *("127.0.0.1", "10.1.2.3", "172.16.0.1", "172.31.255.255", "192.168.1.1", "169.254.169.254"),
    *("100.64.0.1", "100.100.100.200", "0.0.0.0", "0.1.2.3", "224.0.0.1", "239.255.255.255"),
    *("240.0.0.1", "255.255.255.255", "192.0.0.1", "192.0.0.192", "192.0.2.1", "198.18.0.1"),
    *("198.51.100.7", "203.0.113.9", "168.63.129.16", "192.88.99.1", "::", "::1"),
    *("fe80::1", "fe80::1%eth0", "fc00::1", "fd00:ec2::254", "ff02::1", "fec0::1"),
    *("2001:db8::1", "3fff::1", "2001::1", "2001:10::1", "::ffff:127.0.0.1", "::ffff:10.0.0.1"),
    *(
        "::ffff:169.254.169.254",
        "::127.0.0.1",
        "::ffff:0:127.0.0.1",
        "64:ff9b::7f00:1",
        "64:ff9b::a9fe:a9fe",
        "64:ff9b:1::1",
    ),
    *(
        "2002:7f00:1::1",
        "2002:a9fe:a9fe::1",
        "2002:c0a8:101::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "100::1",
        "5f00::1",
    ),
    *("4000::1", "example.com"),
]


def test_addresses_that_no_public_image_is_at_are_refused():
    assert [address for address in PUBLIC if refusal(address, []) is not None] == []
    assert [address for address in REFUSED if refusal(address, []) is None] == []
    assert refusal("168.63.129.16", []) == "cloud metadata (Azure)"


def test_allowed_networks_win():
    allowed = [ipaddress.ip_network("127.0.0.0/8"), ipaddress.ip_network("fd00::/8")]
    for address in ("127.0.0.1", "::ffff:127.0.0.1", "fd00::1", "8.8.8.8"):
        assert refusal(address, allowed) is None
    assert refusal("10.0.0.1", allowed) == "private"
    assert refusal("127.0.0.1", []) == "loopback"


def test_literal_addresses_are_known_in_every_spelling():
    for host in ("127.0.0.1", "2130706433", "0x7f.1", "0177.0.0.1", "127.1"):
        assert literal_address(host) == "127.0.0.1"
    assert literal_address("[::1]") == "::1"
    assert literal_address("example.com") is None


@pytest.mark.parametrize(
    "url, base, expected",
    [
        ("http://a.com/x%20y.jpg?q=%C3%A9&s=a+b|c", None, "http://a.com/x%20y.jpg?q=%C3%A9&s=a+b|c"),
        ("https://a.com", None, "https://a.com"),
        ("  https://a.com/x.jpg \n", None, "https://a.com/x.jpg"),
        ("HTTPS://A.Com:8443/X#frag", None, "https://a.com:8443/X"),
        ("http://a.com/my photo.jpg", None, "http://a.com/my%20photo.jpg"),
        ("http://a.com/é/日.jpg?n=ü x", None, "http://a.com/%C3%A9/%E6%97%A5.jpg?n=%C3%BC%20x"),
        ("http://a.com/100%.jpg", None, "http://a.com/100%.jpg"),
        ("http://bücher.example/é", None, "http://xn--bcher-kva.example/%C3%A9"),
        ("http://my_host.a.com/", None, "http://my_host.a.com/"),
        ("http://[2606:4700::1111]:80/", None, "http://[2606:4700::1111]:80/"),
        ("http://a.com/x?y=http://b.com/@z", None, "http://a.com/x?y=http://b.com/@z"),
        ("http://a.com?", None, "http://a.com?"),
        ("/b.jpg", "http://a.com/x/y?z", "http://a.com/b.jpg"),
        ("b.jpg", "http://a.com/x/y?z", "http://a.com/x/b.jpg"),
        ("//c.com/b", "https://a.com/x", "https://c.com/b"),
        ("?p=2", "http://a.com/x?p=1", "http://a.com/x?p=2"),
        ("https://c.com/b c", "http://a.com/x", "https://c.com/b%20c"),
        ("/\u00e9".encode().decode("latin-1"), "http://a.com/", "http://a.com/%C3%A9"),
        ("/\u00c0".encode().decode("latin-1"), "http://a.com/", "http://a.com/%C3%80"),
    ],
)
def test_urls_are_brought_into_the_form_that_is_sent(url, base, expected):
    assert checked_url(url, base) == expected
    assert checked_url(expected) == expected


@pytest.mark.parametrize(
    "url, base",
    [
        *[
            (url, None)
            for url in (
                "",
                "a.com/x",
                "//a.com/x",
                "file:///etc/passwd",
                "data:image/png;base64,AA",
                "ftp://a.com/",
                "javascript:alert(1)",
            )
        ],
        *[
            (url, None)
            for url in (
                "http://",
                "http:///x",
                "http:/a.com",
                "http://:80/",
                "http://a.com:0/",
                "http://a.com:65536/",
                "http://a.com:x/",
            )
        ],
        *[
            (url, None)
            for url in (
                "http://u:p@a.com/",
                "http://u@a.com/",
                "http://@a.com/",
                "http://good.com\\@evil.com/",
                "http://a b.com/",
                "http://a.com\\x/",
            )
        ],
        *[
            (url, None)
            for url in (
                "http://a.com/\r\nX: 1",
                "http://a.com/\x00",
                "http://a.com/a\tb",
                "http://a.com/\x7f",
                "http://a.com/\ud800",
            )
        ],
        *[
            (url, None)
            for url in (
                "http://[::1/",
                "http://[::g]/",
                "http://[fe80::1%25eth0]/",
                "http://\u2100.com/",
                "http://%61.com/",
                "http://a.com/" + "x" * 8_192,
            )
        ],
        *[
            (url, "http://a.com/")
            for url in ("file:///etc/passwd", "data:,x", "http://u:p@b.com/", "http://b.com:99999/", "//[", "/a\nb")
        ],
    ],
)
def test_what_is_no_public_web_url_is_refused(url, base):
    with pytest.raises(FetchError) as caught:
        checked_url(url, base)
    assert caught.value.error == "bad_url"
    assert "\n" not in caught.value.detail and len(caught.value.detail) < 500


@pytest.mark.parametrize(
    "text, expected",
    [
        ("https://a.com/x.jpg?w=512&fit=crop", "https://a.com/x.jpg?w=512&fit=crop"),
        ("https://b.s3.amazonaws.com/x?X-Amz-Date=1&X-Amz-Signature=S3CRET&w=1", "https://b.s3.amazonaws.com/x"),
        ("https://a.com/x?w=1&x-goog-signature=S3CRET", "https://a.com/x"),
        ("https://a.blob/x?sv=1&se=2&sp=r&sig=S3CRET", "https://a.blob/x"),
        ("https://c.net/x?Expires=1&Signature=S3CRET&Key-Pair-Id=S3CRET", "https://c.net/x"),
        ("https://c.net/x?Policy=S3CRET", "https://c.net/x"),
        ("https://a.com/x?AWSAccessKeyId=S3CRET", "https://a.com/x"),
        ("https://a.com/x?GoogleAccessId=S3CRET", "https://a.com/x"),
        ("https://a.com/x?access_token=S3CRET", "https://a.com/x"),
        ("https://a.com/x?X%2DAmz%2DSignature=S3CRET", "https://a.com/x"),
        ("https://a.com/x#token=S3CRET", "https://a.com/x"),
        ("https://user:S3CRET@a.com/x?w=1", "https://a.com/x?w=1"),
        ("https://user:S3@CRET@a.com/x", "https://a.com/x"),
        (
            "could not get 'https://a.com/x?token=S3CRET': reset; s3://k:S3CRET@b/y?w=2",
            "could not get 'https://a.com/x': reset; s3://b/y?w=2",
        ),
        ("to /path?sig=S3CRET, twice", "to /path twice"),
        ("https://a.com/x?q=a b&sig=S3CRET end", "https://a.com/x?q=a b end"),
        ("https://a.com/x?q='a'&sig=S3'CRET end", "https://a.com/x?q='a' end"),
        ("3 of 4 failed? see a=b", "3 of 4 failed? see a=b"),
    ],
)
def test_signed_urls_are_redacted_and_others_stay(text, expected):
    assert redacted(text) == expected
    assert redacted(expected) == expected


def test_a_fetch_error_survives_pickling():
    error = pickle.loads(pickle.dumps(FetchError("not_found", "HTTP 404", 404)))
    assert (error.error, error.detail, error.http_status, str(error)) == (
        "not_found",
        "HTTP 404",
        404,
        "not_found: HTTP 404",
    )


def test_only_a_few_bodies_grow_big_at_once(monkeypatch):
    monkeypatch.setattr(transport_module, "BIG_BODY_BYTES", 100_000)
    monkeypatch.setattr(transport_module, "MAX_BIG_BODIES", 2)
    big = bytes(range(256)) * 4096  # 1 MiB
    seen = []

    def answer(connection, request):
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(big))
        if b"/stalls" in request:
            connection.sendall(big[:200_000])
            return server.stall()
        return big

    async def use(transport):
        async def watch():
            while True:
                held = [exchange._num_bytes for exchange in transport._running]
                seen.append((len(transport._big._growing), sum(size > 100_000 for size in held)))
                await asyncio.sleep(0.002)

        watching = asyncio.ensure_future(watch())
        stalling = [asyncio.ensure_future(transport.get(f"{server.url}/stalls{i}", accept, 4.0)) for i in range(2)]
        while len(transport._big._growing) < 2:  # both hold a place, until their deadline
            await asyncio.sleep(0.002)
        waiting = [asyncio.ensure_future(transport.get(f"{server.url}/{i}", accept, 50)) for i in range(12)]
        given_up = asyncio.ensure_future(transport.get(f"{server.url}/late", accept, 0.4))
        replies = await asyncio.gather(*stalling, *waiting, given_up, return_exceptions=True)
        watching.cancel()
        assert not transport._big._growing and not transport._big._paused
        return replies

    with Server(answer) as server:
        replies = run(use)
    assert [reply.error for reply in (*replies[:2], replies[-1])] == ["total_timeout"] * 3
    assert [reply.body for reply in replies[2:-1]] == [big] * 12
    assert max(growing for growing, _ in seen) == 2 == max(large for _, large in seen)


def test_what_a_server_writes_is_text_in_records():
    text = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: \xe9t\xe9\r\n\r\nx"
    with Server(closing(text)) as server:
        failure(server.url + "/a").detail.encode("utf-8")
