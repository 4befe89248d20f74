"""Which URLs and addresses are fetched from, and what of a URL may be written to a log.

The judgement that counts is `refusal`, of the address that a socket is about to connect to: no spelling of a host,
redirect or changing DNS answer gets around it. `checked_url` only brings a URL into the form that is sent.
"""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from collections.abc import Sequence
from functools import lru_cache
from urllib.parse import unquote, urljoin

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_URL_CHARS = 8_192
MAX_DETAIL_CHARS = 300


class FetchError(Exception):
    """A fetch that failed; `error` is a key of DOWNLOAD_FAILURES, `detail` one line without secrets."""

    def __init__(self, error: str, detail: str, http_status: int | None = None):
        super().__init__(f"{error}: {detail}")
        self.error = error
        self.detail = detail
        self.http_status = http_status

    def __reduce__(self):
        return type(self), (self.error, self.detail, self.http_status)


# Listed, not asked of `is_global`: its answers differ between Python 3.10 and 3.12. From IANA's special-purpose
# registries (2025), and the metadata services that have an address of their own.
REFUSED_V4 = {
    "168.63.129.16/32": "cloud metadata (Azure)",
    "192.0.0.192/32": "cloud metadata (Oracle)",
    "0.0.0.0/8": "unspecified",
    "10.0.0.0/8": "private",
    "100.64.0.0/10": "carrier-grade NAT",
    "127.0.0.0/8": "loopback",
    "169.254.0.0/16": "link-local",
    "172.16.0.0/12": "private",
    "192.0.0.0/24": "reserved",
    "192.0.2.0/24": "documentation",
    "192.88.99.0/24": "reserved",
    "192.168.0.0/16": "private",
    "198.18.0.0/15": "benchmarking",
    "198.51.100.0/24": "documentation",
    "203.0.113.0/24": "documentation",
    "224.0.0.0/4": "multicast",
    "240.0.0.0/4": "reserved",
}
REFUSED_V6 = {  # everything outside 2000::/3 is refused too
    "::/128": "unspecified",
    "::1/128": "loopback",
    "fc00::/7": "private",
    "fe80::/10": "link-local",
    "ff00::/8": "multicast",
    "2001::/23": "reserved",  # Teredo among them
    "2001:db8::/32": "documentation",
    "3fff::/20": "documentation",
}
_REFUSED_V4 = [(ipaddress.ip_network(network), why) for network, why in REFUSED_V4.items()]
_REFUSED_V6 = [(ipaddress.ip_network(network), why) for network, why in REFUSED_V6.items()]
_GLOBAL_V6 = ipaddress.ip_network("2000::/3")
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_6TO4 = ipaddress.ip_network("2002::/16")


def refusal(address: str, allowed: Sequence[Network]) -> str | None:
    """Why nothing is fetched from this IP address, the one that is really connected to; None where it may be.

    Args:
        allowed: networks that may be fetched from whatever they are; they hold for an embedded IPv4 address too.
    """
    return _refusal(address, tuple(allowed))


@lru_cache(16_384)
def _refusal(address: str, allowed: tuple[Network, ...]) -> str | None:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return "not an IP address"
    return _why(parsed, allowed)


def _why(address: Address, allowed: tuple[Network, ...]) -> str | None:
    if any(address in network for network in allowed):
        return None
    if address.version == 4:
        return next((why for network, why in _REFUSED_V4 if address in network), None)
    value = int(address)
    if address.ipv4_mapped is not None:
        return _why(address.ipv4_mapped, allowed)
    if address in _NAT64:
        return _why(ipaddress.IPv4Address(value & 0xFFFFFFFF), allowed)
    if address in _6TO4:
        return _why(ipaddress.IPv4Address(value >> 80 & 0xFFFFFFFF), allowed)
    known = next((why for network, why in _REFUSED_V6 if address in network), None)
    return known or (None if address in _GLOBAL_V6 else "not globally routable")


@lru_cache(16_384)
def literal_address(host: str) -> str | None:
    """The address that a URL's host spells (decimal, octal and hex forms included), or None where it is a name."""
    try:
        return str(ipaddress.ip_address(host.strip("[]")))
    except ValueError:
        pass
    try:
        return socket.inet_ntoa(socket.inet_aton(host))
    except (OSError, ValueError):
        return None


_URL = re.compile(r"(https?)://([^/?#]*)([^#]*)(?:#.*)?", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^:\[\]]+)(?::(\d*))?", re.ASCII)
_HOST = re.compile(r"[a-z0-9._~-]{1,255}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
_NOT_SENT = re.compile(r"[^\x21-\x7e]|[\"<>\\^`{}]")  # a lone % stays: browsers send it, and encoding it breaks others


def checked_url(url: str, base: str | None = None) -> str:
    """The URL to ask for: trimmed, percent-encoded where needed, its host in ASCII, without a fragment.

    Args:
        base: the URL that answered with `url` as its Location header; `url` is resolved against it.

    Raises:
        FetchError: bad_url, for whatever is not asked for.
    """
    if len(url) > MAX_URL_CHARS:
        raise FetchError("bad_url", f"{len(url):,} characters, expected at most {MAX_URL_CHARS:,}")
    text = url.strip(" \t\r\n\f\v\u00a0\u3000\ufeff")
    if base is not None:
        with contextlib.suppress(UnicodeError):  # a header's bytes come as latin-1; what servers mean is UTF-8
            text = text.encode("latin-1").decode("utf-8")
    if _CONTROL.search(text):  # before urljoin, which drops line ends
        raise _bad_url(url, "a control character")
    if base is not None:
        try:
            text = urljoin(base, text)
        except ValueError as error:
            raise _bad_url(url, str(error)) from error
    parts = _URL.fullmatch(text)
    if parts is None:
        raise _bad_url(url, "expected http://... or https://...")
    scheme, authority, rest = parts[1].lower(), parts[2], parts[3]
    if "@" in authority:
        raise _bad_url(url, "a user name or password")
    split = _AUTHORITY.fullmatch(authority)
    if split is None:
        raise _bad_url(url, "no usable host")
    host, port = _ascii_host(split[1], url), split[2]
    if port and not 1 <= int(port) <= 65_535:
        raise _bad_url(url, f"port {port[:20]}, expected 1 to 65535")
    try:
        rest = _NOT_SENT.sub(lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode()), rest)
    except UnicodeEncodeError as error:
        raise _bad_url(url, "not valid Unicode") from error
    checked = f"{scheme}://{host}" + (f":{int(port)}" if port else "") + rest
    if len(checked) > MAX_URL_CHARS:
        raise FetchError("bad_url", f"{len(checked):,} characters once encoded, expected at most {MAX_URL_CHARS:,}")
    return checked


def _ascii_host(host: str, url: str) -> str:
    if host.startswith("["):
        try:
            ipaddress.IPv6Address(host[1:-1])
        except ValueError as error:
            raise _bad_url(url, "no usable host") from error
        return host.lower()
    if not host.isascii():
        try:
            host = host[:256].encode("idna").decode("ascii")
        except UnicodeError as error:
            raise _bad_url(url, "a host that is no domain name") from error
    host = host.lower()
    if not _HOST.fullmatch(host):
        raise _bad_url(url, "no usable host")
    return host


def _bad_url(url: str, why: str) -> FetchError:
    return FetchError("bad_url", f"{why}: {redacted(_CONTROL.sub(' ', url))[:MAX_DETAIL_CHARS]}")


# Queries that grant access, or name who may: S3, Google, Azure, Alibaba, CloudFront, Akamai and plain tokens.
_SECRET_KEY = re.compile(
    r"(?i)x-(amz|goog|oss|obs|cos|ms)-.*|sig|expires|policy|key-pair-id|auth|authorization|jwt|hmac|hdne[at]s?|hdnts"
    r"|.*(signature|token|secret|passw|credential|api[_-]?key|access[_-]?key|access-?id).*"
)
_USERINFO = re.compile(r"(?i)(\b[a-z][a-z0-9+.-]*://)[^\s/?#]*@")
_QUERY = re.compile(r"[?#][^\s'\"<>]*")
_PAIR = re.compile(r"([?&;#])([^\s=&;?#'\"<>]+)=[^\s&;]*")


def redacted(text: str) -> str:
    """`text` without the passwords and signed queries of the URLs in it; harmless queries (?w=512) stay."""
    text = _USERINFO.sub(r"\1", text)
    text = _QUERY.sub(lambda match: "" if _any_secret(match[0]) else match[0], text)
    # What a space or quote inside a query cut off from its start.
    return _PAIR.sub(lambda match: "" if _is_secret(match[2]) else match[0], text)


def _any_secret(query: str) -> bool:
    return any(_is_secret(pair.partition("=")[0]) for pair in re.split(r"[?&;#]", query) if pair)


def _is_secret(key: str) -> bool:
    return _SECRET_KEY.fullmatch(unquote(key)) is not None
