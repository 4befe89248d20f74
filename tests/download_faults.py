"""The catalogue of faults that a downloader meets: what a server or a URL does, and the failure class that must follow.

A fault is a coroutine that answers one request byte by byte (`serve`), or a URL that is the fault itself, or both.
`tests/image_server.py` serves them at http://HOST:PORT/fault/NAME.jpg. The classes are the keys of
pipeline.core.errors.FAILURES, or "ok", and hold for a download with SETTINGS. Where the right class is a matter of
taste (is 0177.0.0.1 a bad URL or a refused address?), several are named; no request may ever reach the secret server.

Where a URL holds {secret}, it is the port of that server: it listens at addresses that no download may touch, and it
answers with a good image, so that a downloader without guards stores it as a success.
"""

from __future__ import annotations

import gzip
import io
import struct
import zlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

# Deadlines of seconds make the catalogue finish in seconds; the caps are those of production but for the body.
SETTINGS = {
    "connect_timeout_s": 3,
    "first_byte_timeout_s": 3,
    "total_timeout_s": 5,
    "retries": 2,
    "max_redirects": 5,
    "max_body_bytes": 8 << 20,
}
HTML = b"<!doctype html><html><head><title>Not found</title></head><body>gone</body></html>"
SVG = b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><script>1</script></svg>'


@dataclass(frozen=True)
class Fault:
    """One fault. `url` is a template of {host} {port} {name} {secret} {closed} {tls_NAME} and {image} (an image's URL)."""

    name: str
    expected: tuple[str, ...]
    serve: Callable[[Any], Awaitable[None]] | None = None
    url: str | None = "http://{host}:{port}/fault/{name}.jpg"
    isolated: bool = False  # needs names or addresses that only `image_server.in_isolation` has
    size_px: tuple[int, int] | None = None  # of the stored image
    rgb: tuple[int, int, int] | None = field(default=None)  # mean colour of the stored image, to within 12


FAULTS: dict[str, Fault] = {}


def fault(expected: str, **more: Any) -> Callable:
    """A decorator that enters a coroutine in FAULTS under its own name; `expected` may name several classes."""

    def enter(serve: Callable[[Any], Awaitable[None]]) -> Callable:
        FAULTS[serve.__name__] = Fault(serve.__name__, tuple(expected.split()), serve, **more)
        return serve

    return enter


def url_fault(name: str, url: str | None, expected: str, **more: Any) -> None:
    """Nothing; enters a URL that is a fault in itself."""
    FAULTS[name] = Fault(name, tuple(expected.split()), None, url, **more)


def redirect_fault(name: str, target: str, expected: str, **more: Any) -> None:
    """Nothing; enters a redirect to `target`, a template like a fault's URL."""

    async def serve(request: Any) -> None:
        request.reply(302, Location=request.expand(target))

    FAULTS[name] = Fault(name, tuple(expected.split()), serve, **more)


# Statuses


def status_fault(name: str, status: int, expected: str, heals_after: int | None = None, **headers: str) -> None:
    """Nothing; enters a fault that answers with a status, and with an image after `heals_after` requests."""

    async def serve(request: Any) -> None:
        if heals_after is not None and request.nth > heals_after:
            request.image()
        else:
            request.reply(status, HTML, "text/html", **headers)

    FAULTS[name] = Fault(name, tuple(expected.split()), serve)


for _status, _expected in [
    *[(status, "not_found") for status in (404, 410)],
    *[(status, "forbidden") for status in (401, 402, 403, 451)],
    *[(status, "http_error") for status in (400, 405, 418, 206, 203, 999)],
]:
    status_fault(f"status_{_status}", _status, _expected)
status_fault("rate_limit_heals", 429, "ok", heals_after=1, Retry_After="1")
status_fault("rate_limit_date_heals", 429, "ok", heals_after=1, Retry_After="Wed, 21 Oct 2015 07:28:00 GMT")
status_fault("rate_limit_nonsense_heals", 429, "ok", heals_after=1, Retry_After="soon")
status_fault("rate_limit_always", 429, "rate_limited", Retry_After="3600")
status_fault("unavailable_retry_after", 503, "rate_limited", Retry_After="3600")
for _status in (500, 502, 503):
    status_fault(f"heals_{_status}", _status, "ok", heals_after=2)
status_fault("always_503", 503, "server_error")


@fault("http_error")
async def status_204(request):
    await request.send(b"HTTP/1.1 204 No Content\r\n\r\n")


@fault("http_error")
async def status_304(request):
    await request.send(b"HTTP/1.1 304 Not Modified\r\n\r\n")


@fault("http_error bad_response disconnected")
async def switching_protocols(request):
    await request.send(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: Upgrade\r\n\r\nxxxxxxxx")


# Time


@fault("first_byte_timeout")
async def stall_before_headers(request):
    await request.stall()


@fault("first_byte_timeout total_timeout")
async def stall_in_headers(request):
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nX-Slow: ")
    await request.stall()


@fault("first_byte_timeout total_timeout")
async def trickle_headers(request):
    await request.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await request.send(b"X-Slow: 1\r\n")
        await request.sleep(0.3)


@fault("total_timeout")
async def stall_in_body(request):
    body = request.image_bytes
    await request.send(request.head(200, len(body)) + body[: len(body) // 2])
    await request.stall()


@fault("total_timeout")
async def trickle_body(request):
    body = request.image_bytes
    await request.send(request.head(200, len(body)))
    for at in range(0, len(body), 64):
        await request.send(body[at : at + 64])
        await request.sleep(0.5)


@fault("ok")
async def slow_but_whole(request):
    body = request.image_bytes
    await request.send(request.head(200, len(body)))
    for at in range(0, len(body), len(body) // 4 + 1):
        await request.send(body[at : at + len(body) // 4 + 1])
        await request.sleep(0.2)


# Broken transfers


@fault("truncated_body")
async def truncated_body(request):
    body = request.image_bytes
    await request.send(request.head(200, 2 * len(body)) + body)


@fault("truncated_body disconnected")
async def truncated_chunked(request):
    body = request.image_bytes[:1000]
    await request.send(request.head(200, None, Transfer_Encoding="chunked") + b"%x\r\n" % 2000 + body)


@fault("truncated_body disconnected")
async def chunked_without_end(request):
    body = request.image_bytes
    await request.send(request.head(200, None, Transfer_Encoding="chunked") + b"%x\r\n%b\r\n" % (len(body), body))


@fault("undecodable")
async def half_jpeg_without_length(request):
    await request.send(request.head(200, None) + jpeg()[: len(jpeg()) // 2])


@fault("ok")
async def whole_without_length(request):
    await request.send(request.head(200, None) + request.image_bytes)


@fault("ok")
async def whole_chunked(request):
    body = request.image_bytes
    pieces = [body[at : at + 700] for at in range(0, len(body), 700)]
    chunks = b"".join(b"%x;x=y\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
    await request.send(request.head(200, None, Transfer_Encoding="chunked") + chunks + b"0\r\nX-Trailer: 1\r\n\r\n")


@fault("disconnected")
async def connection_reset(request):
    request.reset()


@fault("truncated_body disconnected")
async def reset_in_body(request):
    body = request.image_bytes
    await request.send(request.head(200, len(body)) + body[: len(body) // 2])
    await request.sleep(0.05)
    request.reset()


@fault("disconnected")
async def empty_reply(request):
    request.transport.close()


# Types and documents


@fault("ok")
async def image_as_text(request):
    request.reply(200, request.image_bytes, "text/plain")


@fault("ok")
async def image_as_html(request):
    request.reply(200, request.image_bytes, "text/html; charset=utf-8")


@fault("ok")
async def image_without_type(request):
    request.reply(200, request.image_bytes, None)


@fault("not_an_image")
async def html_as_jpeg(request):
    request.reply(200, HTML, "image/jpeg")


@fault("not_an_image")
async def html_page(request):
    request.reply(200, HTML, "text/html")


@fault("not_an_image")
async def svg(request):
    request.reply(200, SVG, "image/svg+xml")


@fault("not_an_image")
async def svg_as_png(request):
    request.reply(200, SVG, "image/png")


@fault("not_an_image unsupported_format")
async def json_document(request):
    request.reply(200, b'{"error": "no such image"}', "application/json")


@fault("not_an_image unsupported_format")
async def pdf_as_jpeg(request):
    request.reply(200, b"%PDF-1.4\n%\xe2\xe3\xcf\xd3\n" + bytes(2000), "image/jpeg")


@fault("undecodable not_an_image unsupported_format truncated_body")
async def empty_body(request):
    request.reply(200, b"", "image/jpeg")


@fault("unsupported_format undecodable")
async def noise_as_jpeg(request):
    request.reply(200, bytes(range(1, 256)) * 40, "image/jpeg")


# Redirects


@fault("ok")
async def redirect_once(request):
    request.reply(302, Location=request.expand("{image}"))


@fault("ok")
async def redirect_relative(request):
    request.reply(301, Location="../img/3.jpg?from=relative")


def chain_fault(name: str, length: int, expected: str) -> None:
    """Nothing; enters a chain of `length` redirects that ends at an image."""

    async def serve(request: Any) -> None:
        step = int(request.query.get("step", 0))
        if step == length:
            request.image()
        else:
            request.reply((301, 302, 303, 307, 308)[step % 5], Location=f"{request.path}?step={step + 1}")

    FAULTS[name] = Fault(name, tuple(expected.split()), serve)


chain_fault("redirect_chain_3", 3, "ok")
chain_fault("redirect_chain_5", 5, "ok")
chain_fault("redirect_chain_6", 6, "too_many_redirects")
chain_fault("redirect_chain_20", 20, "too_many_redirects")


@fault("too_many_redirects bad_redirect")
async def redirect_self(request):
    request.reply(302, Location=request.path)


@fault("too_many_redirects bad_redirect")
async def redirect_loop(request):
    request.reply(302, Location=f"{request.path}?{1 - int('1' in request.query)}=")


@fault("bad_redirect")
async def redirect_without_location(request):
    request.reply(302, HTML, "text/html")


@fault("bad_redirect headers_too_large bad_url http_error")
async def redirect_to_a_long_url(request):
    request.reply(302, Location="/" + "a" * 50_000)


redirect_fault("redirect_to_file", "file:///etc/hostname", "bad_redirect")
redirect_fault("redirect_to_ftp", "ftp://127.0.0.1:{secret}/{name}.jpg", "bad_redirect address_refused")
redirect_fault("redirect_to_gopher", "gopher://127.0.0.1:{secret}/_GET%20/{name}", "bad_redirect address_refused")
redirect_fault("redirect_to_data", "data:image/gif;base64,R0lGODlhAQABAAAAACwAAAAAAQABAAA=", "bad_redirect")
redirect_fault("redirect_to_nothing", "http://", "bad_redirect bad_url too_many_redirects")
redirect_fault("redirect_to_port_99999", "http://{host}:99999/", "bad_redirect bad_url")
redirect_fault("redirect_to_closed_port", "http://{host}:{closed}/{name}.jpg", "connect_failed")
redirect_fault("redirect_to_unicode", "/img/4.jpg?caf\u00e9 \u732b", "ok bad_redirect")

# Private addresses, as a URL and as the target of a redirect. Not isolated: those that stay on this machine anyhow.
SPELLINGS = {
    "loopback": ("127.0.0.1", False),
    "localhost": ("localhost", False),
    "localhost_dot": ("localhost.", True),
    "upper_localhost": ("LOCALHOST", False),
    "decimal": ("2130706433", False),
    "hexadecimal": ("0x7f000001", False),
    "hexadecimal_parts": ("0x7f.0x0.0x0.0x1", False),
    "octal": ("0177.0.0.1", False),
    "short": ("127.1", False),
    "overflow": ("6425673729", True),  # 2**32 + 127.0.0.1, for who wraps around
    "fullwidth": ("１２７.０.０.１", True),
    "percent": ("%31%32%37.0.0.1", True),
    "loopback_6": ("[::1]", False),
    "mapped": ("[::ffff:127.0.0.1]", False),
    "mapped_hexadecimal": ("[::ffff:7f00:1]", False),
    "nat64": ("[64:ff9b::7f00:1]", True),
    "six_to_four": ("[2002:7f00:1::1]", True),
    "unspecified": ("0.0.0.0", False),
    "unspecified_6": ("[::]", False),
    "metadata": ("169.254.169.254", True),
    "metadata_decimal": ("2852039166", True),
    "container_metadata": ("169.254.170.2", True),
    "shared": ("100.100.100.200", True),
    "private_10": ("10.0.0.1", True),
    "private_172": ("172.16.0.1", True),
    "private_192": ("192.168.0.1", True),
    "unique_local": ("[fd00::1]", True),
    "metadata_6": ("[fd00:ec2::254]", True),
    "userinfo_trick": ("good.test@127.0.0.1", False),
    "backslash_trick": ("127.0.0.1\\@good.test", True),
}
for _name, (_host, _isolated) in SPELLINGS.items():
    _target = f"http://{_host}:{{secret}}/{{name}}.jpg"
    if "trick" in _name:
        _target = f"http://{_host.replace('127.0.0.1', '127.0.0.1:{secret}')}/{{name}}.jpg"
    _either = "address_refused bad_url"
    if _name in ("overflow", "fullwidth", "percent", "backslash_trick"):
        _either += " dns_failed connect_failed not_found"
    url_fault(f"direct_{_name}", _target, _either, isolated=_isolated)
    redirect_fault(f"redirect_to_{_name}", _target, _either + " bad_redirect", isolated=_isolated)
url_fault("direct_metadata_80", "http://169.254.169.254/latest/{name}.jpg", "address_refused", isolated=True)
redirect_fault(
    "redirect_twice_to_loopback", "http://{host}:{port}/fault/redirect_to_loopback.jpg", "address_refused bad_redirect"
)

# Names, of the name server that `image_server.in_isolation` starts
for _name, _expected in {
    "good": "ok",
    "private": "address_refused",
    "metadata": "address_refused",
    "alias": "address_refused",
    "loopback6": "address_refused",
    "mapped": "address_refused",
    "nat64": "address_refused",
    "mixed": "ok address_refused",  # one public and one private address: the public one, or none
    "rebind": "ok address_refused",  # public at the first question, 127.0.0.1 at every later one
    "nxdomain": "dns_failed",
    "slowdns": "dns_unavailable connect_timeout",
    "servfail": "dns_unavailable",
    "nodata": "dns_failed",
}.items():
    _port = "{port}/img/5.jpg?" if _name in ("good", "mixed", "rebind") else "{secret}/"
    url_fault(f"name_{_name}", f"http://{_name}.test:{_port}{{name}}.jpg", _expected, isolated=True)
# The first request comes from a public address; its redirect asks for the same name again.
redirect_fault(
    "rebind_on_redirect",
    "http://rebind2.test:{secret}/{name}.jpg",
    "address_refused connect_failed bad_redirect not_found",  # the last: of the first address, kept in mind
    url="http://rebind2.test:{port}/fault/{name}.jpg",
    isolated=True,
)


@fault("ok connect_failed address_refused", url="http://rebind3.test:{port}/fault/{name}.jpg", isolated=True)
async def rebind_on_retry(request):
    if request.nth == 1:
        request.reply(503, HTML, "text/html", Connection="close")
    else:
        request.image()


# Sizes


@fault("body_too_large")
async def huge_declared_body(request):
    await request.send(request.head(200, 10 << 30))
    while True:
        await request.send(request.image_bytes)


@fault("body_too_large")
async def huge_undeclared_body(request):
    await request.send(request.head(200, None) + request.image_bytes)
    while True:
        await request.send(bytes(64 << 10))


@fault("body_too_large")
async def huge_chunked_body(request):
    await request.send(request.head(200, None, Transfer_Encoding="chunked"))
    while True:
        await request.send(b"10000\r\n" + bytes(64 << 10) + b"\r\n")


@fault("body_too_large bad_response truncated_body")
async def huge_chunk_size(request):
    await request.send(request.head(200, None, Transfer_Encoding="chunked") + b"ffffffffffffffff\r\n" + bytes(1000))


@fault("body_too_large bad_response truncated_body disconnected total_timeout headers_too_large")
async def endless_chunk_extension(request):
    await request.send(request.head(200, None, Transfer_Encoding="chunked") + b"10;")
    while True:
        await request.send(b"x" * 65536)


@fault("body_too_large bad_response truncated_body disconnected total_timeout headers_too_large")
async def endless_trailers(request):
    body = request.image_bytes
    await request.send(request.head(200, None, Transfer_Encoding="chunked") + b"%x\r\n%b\r\n0\r\n" % (len(body), body))
    while True:
        await request.send(b"X-Trailer: 0123456789\r\n" * 1000)


@fault("ok")
async def gzipped_image(request):
    request.reply(200, gzip.compress(request.image_bytes), Content_Encoding="gzip")


@fault("body_too_large")
async def gzip_bomb(request):
    request.reply(200, gzip_of_zeros(2 << 30), Content_Encoding="gzip")


@fault("body_too_large undecodable bad_response unsupported_format http_error")
async def nested_gzip_bomb(request):
    request.reply(200, gzip.compress(gzip_of_zeros(2 << 30)), Content_Encoding="gzip, gzip")


@fault("bad_response undecodable unsupported_format truncated_body")
async def false_gzip(request):
    request.reply(200, b"\x1f\x8b\x08" + bytes(range(256)) * 8, Content_Encoding="gzip")


@fault("headers_too_large")
async def header_flood(request):
    await request.send(b"HTTP/1.1 200 OK\r\n")
    while True:
        await request.send(b"X-Flood: 0123456789\r\n" * 500)


@fault("headers_too_large")
async def one_huge_header(request):
    await request.send(b"HTTP/1.1 200 OK\r\nX-Huge: " + b"x" * (1 << 20) + b"\r\nContent-Length: 0\r\n\r\n")


@fault("headers_too_large")
async def many_headers(request):
    lines = b"".join(b"X-Many-%d: 1\r\n" % number for number in range(10_000))
    await request.send(b"HTTP/1.1 200 OK\r\n" + lines + b"Content-Length: 0\r\n\r\n")


@fault("headers_too_large bad_response total_timeout")
async def endless_continue(request):
    while True:
        await request.send(b"HTTP/1.1 100 Continue\r\n\r\n" * 500)


# Not HTTP


@fault("bad_response")
async def invalid_status_line(request):
    await request.send(b"HTTP/1.1 abc WAT\r\nContent-Length: 3\r\n\r\nabc")


@fault("bad_response ok")
async def header_that_is_no_text(request):
    head = b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nTransfer-Encoding: \xe9t\xe9\r\n\r\n"
    await request.send(head + request.image_bytes)


@fault("bad_response")
async def http_0_9(request):
    await request.send(request.image_bytes)


@fault("bad_response")
async def binary_garbage(request):
    await request.send(bytes(range(256)) * 16)


@fault("bad_response")
async def another_protocol(request):
    await request.send(b"SSH-2.0-OpenSSH_9.9\r\n")


@fault("bad_response")
async def negative_length(request):
    body = request.image_bytes
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: -5\r\n\r\n" + body)


@fault("bad_response truncated_body")
async def two_lengths(request):
    body = request.image_bytes
    lengths = b"Content-Length: %d\r\nContent-Length: %d\r\n" % (len(body), len(body) + 100)
    await request.send(b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\n" + lengths + b"\r\n" + body)


@fault("ok bad_response")
async def nul_in_header(request):
    body = request.image_bytes
    await request.send(b"HTTP/1.1 200 OK\r\nX-Nul: a\0b\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


# Images


def image_fault(name: str, data: Callable[[], bytes], content_type: str, expected: str, **more: Any) -> None:
    """Nothing; enters a fault that serves the bytes that `data` makes at the first request."""
    made = cache(data)

    async def serve(request: Any) -> None:
        request.reply(200, made(), content_type)

    FAULTS[name] = Fault(name, tuple(expected.split()), serve, **more)


def png(width_px: int, height_px: int, bits: int, colour_type: int, compressed: bytes) -> bytes:
    """A PNG of zlib data that is already compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width_px, height_px, bits, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", compressed) + chunk(b"IEND", b"")


def deflate_of_zeros(num_bytes: int) -> bytes:
    """A raw deflate stream of zeros, made by repeating one compressed block: 2 GB in no time."""
    block = 1 << 20
    compressor = zlib.compressobj(9, zlib.DEFLATED, -15)
    repeated = compressor.compress(bytes(block)) + compressor.flush(zlib.Z_FULL_FLUSH)
    end = zlib.compressobj(9, zlib.DEFLATED, -15)
    return repeated * (num_bytes // block) + end.compress(bytes(num_bytes % block)) + end.flush()


def png_bomb(side_px: int = 20_000) -> bytes:
    """A valid RGB PNG of zeros."""
    num_bytes = side_px * (3 * side_px + 1)
    check = struct.pack(">I", (num_bytes % 65521) << 16 | 1)  # Adler-32 of zeros
    return png(side_px, side_px, 8, 2, b"\x78\xda" + deflate_of_zeros(num_bytes) + check)


@cache
def gzip_of_zeros(num_bytes: int) -> bytes:
    """A gzip stream of zeros with a wrong checksum, which nobody should come to."""
    return b"\x1f\x8b\x08\0\0\0\0\0\x02\xff" + deflate_of_zeros(num_bytes) + bytes(4) + struct.pack("<I", num_bytes)


def png_16_bit(colour_type: int, level: int) -> bytes:
    """A 16-bit PNG of 320 x 240, all of one level: type 0 is grey, 2 is RGB."""
    row = b"\0" + struct.pack(">H", level) * (320 * (3 if colour_type == 2 else 1))
    return png(320, 240, 16, colour_type, zlib.compress(row * 240))


def picture(mode: str = "RGB", size_px: tuple[int, int] = (400, 300), colour: Any = (200, 80, 40)) -> Any:
    """A PIL image of one colour with a corner of another one."""
    from PIL import Image

    image = Image.new("RGB", size_px, colour)
    image.paste((20, 40, 200), (0, 0, 20, 20))
    return image.convert(mode)


def encoded(image: Any, kind: str, **options: Any) -> bytes:
    """The file's bytes."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@cache
def jpeg() -> bytes:
    """A JPEG of noise that is a few kB long."""
    from PIL import Image

    return encoded(Image.effect_noise((200, 150), 80).convert("RGB"), "JPEG", quality=85)


def jpeg_with_lying_header(side_px: int = 20_000) -> bytes:
    """A JPEG of a few kB whose header says side x side pixels."""
    data = bytearray(jpeg())
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", side_px, side_px)
    return bytes(data)


def gif(num_frames: int) -> bytes:
    """An animated GIF of 64 x 64, each frame one pixel."""
    head = b"GIF89a" + struct.pack("<HHBBB", 64, 64, 0x80, 0, 0) + b"\xff\xff\xff\x20\x40\x60"
    head += b"\x21\xff\x0bNETSCAPE2.0\x03\x01\0\0\0"
    frame = b"\x21\xf9\x04\x04\x0a\0\0\0" + b"\x2c\0\0\0\0\x01\0\x01\0\0" + b"\x02\x02\x44\x01\0"
    return head + frame * num_frames + b";"


def oriented() -> bytes:
    """A JPEG of 400 x 300 that EXIF turns to 300 x 400."""
    from PIL import Image

    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(picture(), "JPEG", exif=exif)


def transparent_palette() -> bytes:
    """A palette PNG whose first colour is transparent."""
    return encoded(picture().quantize(16), "PNG", transparency=0)


def avif_like() -> bytes:
    """Bytes that begin as an AVIF file does."""
    return struct.pack(">I", 28) + b"ftypavif\0\0\0\0avifmif1miaf" + bytes(500)


image_fault("png_bomb", png_bomb, "image/png", "too_many_pixels")
image_fault("png_bomb_as_jpeg", png_bomb, "image/jpeg", "too_many_pixels")
image_fault("jpeg_with_lying_header", jpeg_with_lying_header, "image/jpeg", "too_many_pixels")
image_fault("animated_gif", lambda: gif(8), "image/gif", "ok", size_px=(64, 64))
image_fault("gif_5000_frames", lambda: gif(5_000), "image/gif", "too_many_frames")
image_fault("cmyk_jpeg", lambda: encoded(picture("CMYK"), "JPEG"), "image/jpeg", "ok", rgb=(199, 80, 41))
image_fault("gray_jpeg", lambda: encoded(picture("L"), "JPEG"), "image/jpeg", "ok", rgb=(111, 111, 111))
image_fault("png_16_bit_gray", lambda: png_16_bit(0, 0x4000), "image/png", "ok", rgb=(64, 64, 64))
image_fault("png_16_bit_rgb", lambda: png_16_bit(2, 0x4000), "image/png", "ok", rgb=(64, 64, 64))
image_fault("transparent_palette", transparent_palette, "image/png", "ok", size_px=(400, 300))
image_fault("exif_orientation", oriented, "image/jpeg", "ok", size_px=(300, 400))
image_fault("webp", lambda: encoded(picture(), "WEBP"), "image/webp", "ok", rgb=(200, 80, 40))
image_fault("ico", lambda: encoded(picture(size_px=(64, 64)), "ICO"), "image/x-icon", "unsupported_format ok")
image_fault("avif_like", avif_like, "image/avif", "unsupported_format undecodable")
image_fault(
    "jpeg_without_end", lambda: encoded(picture(), "JPEG")[:-2], "image/jpeg", "ok undecodable", size_px=(400, 300)
)
image_fault("one_pixel", lambda: encoded(picture(size_px=(1, 1)), "PNG"), "image/png", "ok", size_px=(1, 1))
image_fault("very_wide", lambda: encoded(picture(size_px=(9000, 1)), "PNG"), "image/png", "ok undecodable")


# Opt-out


def robots_tag_fault(name: str, value: str, expected: str) -> None:
    """Nothing; enters an image that comes with an X-Robots-Tag."""

    async def serve(request: Any) -> None:
        request.reply(200, request.image_bytes, request.content_type, X_Robots_Tag=value)

    FAULTS[name] = Fault(name, tuple(expected.split()), serve)


robots_tag_fault("robots_noai", "noai", "opted_out")
robots_tag_fault("robots_upper", "NoImageAI, nofollow", "opted_out")
robots_tag_fault("robots_after_colon", "max-image-preview: large, noai", "opted_out")
robots_tag_fault("robots_any_agent", "googlebot: nosnippet, noindex", "ok opted_out")
robots_tag_fault("robots_otherbot", "otherbot: noai", "ok")
robots_tag_fault("robots_nofollow", "nofollow, nosnippet", "ok")


@fault("opted_out")
async def robots_two_headers(request):
    head = request.head(200, len(request.image_bytes), X_Robots_Tag="nofollow")
    await request.send(head[:-2] + b"X-Robots-Tag: noai\r\n\r\n" + request.image_bytes)


# Disallowed by the server's /robots.txt, which only obey_robots_txt asks for.
@fault("ok")
async def robots_txt_disallows(request):
    request.image()


# TLS: `good` is signed by an authority that only `in_isolation` makes trusted.
url_fault("tls_good", "https://{host}:{tls_good}/img/6.jpg?{name}", "ok", isolated=True)
url_fault("tls_self_signed", "https://{host}:{tls_self_signed}/img/6.jpg?{name}", "tls_failed")
url_fault("tls_expired", "https://{host}:{tls_expired}/img/6.jpg?{name}", "tls_failed")
url_fault("tls_wrong_host", "https://{host}:{tls_wrong_host}/img/6.jpg?{name}", "tls_failed")
url_fault("tls_to_plain_port", "https://{host}:{port}/img/6.jpg?{name}", "tls_failed")
url_fault("plain_to_tls_port", "http://{host}:{tls_good}/img/6.jpg?{name}", "bad_response disconnected")
redirect_fault("redirect_to_self_signed", "https://{host}:{tls_self_signed}/img/6.jpg?{name}", "tls_failed")

# URLs
url_fault("url_file", "file:///etc/hostname", "bad_url")
url_fault("url_data", "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs=", "bad_url")
url_fault("url_ftp", "ftp://127.0.0.1:{secret}/{name}.jpg", "bad_url address_refused")
url_fault("url_without_scheme", "{host}/img/7.jpg", "bad_url")
url_fault("url_without_host", "http:///img/7.jpg", "bad_url")
url_fault("url_javascript", "javascript:alert(1)", "bad_url")
url_fault("url_port_0", "http://{host}:0/img/7.jpg", "bad_url connect_failed")
url_fault("url_port_99999", "http://{host}:99999/img/7.jpg", "bad_url")
url_fault("url_port_wraps", "http://127.0.0.1:{secret_wrapped}/{name}.jpg", "bad_url address_refused")
url_fault("url_port_not_a_number", "http://{host}:http/img/7.jpg", "bad_url")
url_fault("url_userinfo", "http://user:password@{host}:{port}/img/7.jpg?{name}", "ok bad_url")
url_fault("url_spaces", "http://{host}:{port}/img/7.jpg?{name}=two words and more", "ok")
url_fault("url_surrounding_blanks", " http://{host}:{port}/img/7.jpg?{name} ", "ok bad_url")
url_fault("url_unicode_path", "http://{host}:{port}/img/7.jpg?{name}=caf\u00e9-\u732b", "ok")
url_fault("url_upper_scheme", "HTTP://{host}:{port}/img/7.jpg?{name}", "ok")
url_fault("url_fragment", "http://{host}:{port}/img/7.jpg?{name}#part", "ok")
url_fault("url_line_break", "http://{host}:{port}/img/7.jpg?{name} HTTP/1.1\r\nX-Injected: 1\r\nX: ", "bad_url ok")
url_fault("url_unicode_host", "http://b\u00fccher-\u732b.invalid/7.jpg", "dns_failed", isolated=True)
url_fault("url_no_such_host", "http://no-such-host.invalid/7.jpg", "dns_failed", isolated=True)
url_fault("url_long_label", "http://" + "a" * 64 + ".test/7.jpg", "bad_url dns_failed", isolated=True)
url_fault("url_empty", "", "missing_url bad_url")
url_fault("url_null", None, "missing_url")
url_fault("url_very_long", "http://{host}:{port}/" + "a" * 20_000, "http_error bad_url")
url_fault("url_bad_brackets", "http://[::1/7.jpg", "bad_url")
url_fault("url_port_closed", "http://{host}:{closed}/7.jpg", "connect_failed")
