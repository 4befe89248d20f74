"""The errors that users see, as a tree.

WinnowError            exit code 1   something went wrong in this run: a file, a shard, a step
  ConfigError          exit code 2   the configuration or the command line is wrong: nothing was started
  ImageError           (a row)       an image that can't be used; `reason` is one of FAILURES
  StoreError           exit code 1   an object store failed, refused or is not there; `transient` where it may yet work
  StepError            exit code 1   a step failed; the message names its shards and their causes
  NetworkDownError     exit code 1   a download in which nothing answers any more

Both exit without a traceback. Any other exception is a bug of ours and shows its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

# What a download can fail at; `retry: failed` fetches these again.
DOWNLOAD_FAILURES = {
    "bad_url": "the URL can't be parsed, or is of another scheme than http and https",
    "address_refused": "the host is at an address that no public image is at (private, loopback, metadata, ...)",
    "dns_failed": "the host's name does not exist",
    "dns_unavailable": "the name servers did not answer",
    "connect_failed": "the host refused the connection, or can't be reached",
    "connect_timeout": "no connection within the deadline",
    "tls_failed": "no trusted TLS connection: a bad certificate, or a failed handshake",
    "first_byte_timeout": "connected, but nothing came within the deadline",
    "total_timeout": "the response was not complete within the deadline",
    "disconnected": "the host closed the connection without a whole response",
    "truncated_body": "the body is shorter than the response said",
    "bad_response": "not a valid HTTP response",
    "headers_too_large": "the response's headers are above the cap",
    "body_too_large": "the body is above the cap, as declared, received or decompressed",
    "too_many_redirects": "more redirects than the cap",
    "bad_redirect": "a redirect without a usable target",
    "not_found": "HTTP 404 or 410",
    "forbidden": "HTTP 401, 402, 403 or 451",
    "rate_limited": "HTTP 429, or 503 with Retry-After, and no success within the retries",
    "server_error": "HTTP 5xx, and no success within the retries",
    "http_error": "another HTTP status than 200",
    "host_down": "the host failed so often in a row that its other URLs were not asked for",
    "opted_out": "the response's X-Robots-Tag forbids this use",
    "robots_disallowed": "the host's robots.txt forbids this URL",
    "not_an_image": "HTML, SVG or another document where an image was expected",
    "too_many_frames": "the animation has more frames than the cap",
    "checksum_mismatch": "the bytes are not those that the metadata's sha256 names",
    "download_failed": "the download failed, as img2dataset says",
    "excluded": "the config's exclude lists name it; it was not fetched",
    "not_chosen": "the strategy in pool.only left it out; it was not fetched",
}
FAILURES = {
    "missing_image": "the sample has no image",
    "missing_caption": "the sample has no caption, or a blank one",
    "bad_caption": "the caption is not valid UTF-8, or is longer than any caption",
    "bad_metadata": "the sample's json can't be read, or a carried column has a value of another type",
    "bad_uid": "the uid column that the config names has no uid (32 hex digits) here",
    "bad_table": "the table that held the row, or a part of it, can't be read",
    "undecodable": "the image does not decode",
    "unsupported_format": "the bytes are of no image format that is read here",
    "too_many_pixels": "the image is above the pixel cap",
    "too_many_bytes": "the image file is above the size cap",
    "unsafe_file": "a link or name that leads out of the source's folder, or no regular file",
    "truncated_tar": "the archive ends inside this sample or before it",
    "repeated_uid": "an earlier row of the pool has the same uid",
    "repeated_key": "an earlier sample of the archive has the same key",
    "missing_url": "the table has no URL here",
} | DOWNLOAD_FAILURES


# A backslash ends a URL, so that JSON stays JSON. A `?` without `=` after it is a pattern's.
URL_SECRETS = re.compile(
    r"(?P<scheme>\b[a-zA-Z][a-zA-Z0-9+.-]*://)(?:[^\s/?#'\"\\]*@)?(?P<path>[^\s?#'\"\\]*)(?:[?#][^\s'\"\\]*=[^\s'\"\\]*)?"
)


class WinnowError(Exception):
    """Base of the errors that end a run with one clear line, whatever lines a file's text brings into it."""

    exit_code = 1
    transient = False  # True: nothing is wrong with the input, and the same may succeed when it is tried again later

    def __init__(self, message: str = ""):
        super().__init__(" ".join(message.splitlines()))


class ConfigError(WinnowError):
    """The configuration or the command line is wrong; nothing was started."""

    exit_code = 2


class StoreError(WinnowError):
    """An object store failed or refused; `cause` says why in plain words."""

    def __init__(self, path: str, doing: str, cause: str, transient: bool = False):
        super().__init__(without_secrets(f"{path} can't be {doing}: {cause}"))
        self.path, self.doing, self.cause, self.transient = path, doing, cause, transient

    def __reduce__(self):
        return type(self), (self.path, self.doing, self.cause, self.transient)


class StepError(WinnowError):
    """A step failed after its retries."""


class NetworkDownError(WinnowError):
    """Nothing answers any more: every further item would fail the same way, so its step stops."""


class ImageError(WinnowError):
    """An image that can't be used; `reason` is a key of FAILURES."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self):
        return type(self), (self.reason, self.detail)


def without_secrets(text: str) -> str:
    """The text without what its URLs carry beside host and path: user names, passwords, signatures, tokens."""
    return URL_SECRETS.sub(r"\g<scheme>\g<path>", text)


def suggestion(word: str, choices: Iterable[str]) -> str:
    """The tail of an error message: the nearest choice, then all of them (at most 30)."""
    names = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(word), names, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    if not names:
        return hint
    listed = ", ".join(sorted(names)[:30]) + (", ..." if len(names) > 30 else "")
    return f"{hint} Choose from: {listed}"


def one_line(error: BaseException, max_chars: int = 500) -> str:
    """The error's class and message on one line, cut to `max_chars`, without secrets; a WinnowError's message alone."""
    text = str(error).encode("utf-8", "replace").decode()  # a file's name in it may be no Unicode
    text = without_secrets(" ".join(text.split()))
    if not isinstance(error, WinnowError):
        text = f"{type(error).__name__}: {text}" if text else type(error).__name__
    return text if len(text) <= max_chars else text[: max_chars - 3] + "..."


def short(value: object, num_chars: int = 80) -> str:
    """The value as text on one line, cut where it is longer than so many characters."""
    text = " ".join(str(value).split())
    return text if len(text) <= num_chars else text[: num_chars - 3] + "..."
