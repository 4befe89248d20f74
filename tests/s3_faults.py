"""A proxy before a real S3 server that does to chosen requests what stores do on bad days.

    with FaultyStore(s3_endpoint) as store:                 # s3_endpoint: the fixture of tests/conftest.py
        monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)   # after the fixture s3_url; or in a subprocess's environment
        store.add(Fault("slow_down_503", times=3))                             # the next three requests
        store.add(Fault("body_cut", operation="get", key="*.tar"))             # the next read of a tar
        store.add(Fault("reset", operation="upload_part", first=2))            # the second part that is sent
        store.add(Fault("internal_500", every=5, times=None))                  # every fifth request, for good
        outage = store.add(Fault("unavailable_503", times=None))               # until it is removed
        store.remove(outage)
        assert store.injected["slow_down_503"] == 3
        assert len(store.requests("put", "*/_artifact.json")) == 2             # tries included

Everything else is passed on to the server and back as it is, byte by byte. The proxy is threads of this process: it
serves other processes as well, for as long as the `with` lasts. A rule sees the requests that match its operation and
key, in the order in which they come; the first rule that applies to a request decides. All of it may be called from
any thread.

Kinds (KINDS lists them):
    answers     slow_down_503 internal_500 bad_gateway_502 unavailable_503 gateway_timeout_504 too_many_429
                request_timeout_400 skewed_403 denied_403 wrong_key_403 wrong_signature_403 expired_400 no_bucket_404
                redirect_301 (the bucket is in another region)
    complete_200_error   200 whose body is an InternalError, as CompleteMultipartUpload may answer
    delete_200_denied    200 whose body says that no key was deleted, as a request for many may answer
    reset       the connection is reset without an answer; the server never sees the request
    close       the same, closed in an orderly way
    hang        never an answer
    answer_lost the server does what was asked, and the connection is closed without an answer
    body_cut    half of the body comes under the whole one's Content-Length, then the connection is closed
    body_reset  the same, and the connection is reset
    body_stalls half of the body comes, then nothing more, ever
    wrong_bytes a body of the right length with one other byte, under the right one's checksums

Operations: get, head, put, list, delete (one or many), copy, create_upload, upload_part, complete_upload, abort_upload,
head_bucket, list_uploads, other.
"""

from __future__ import annotations

import contextlib
import fnmatch
import http.client
import http.server
import socket
import struct
import threading
import urllib.parse
from collections import Counter
from dataclasses import dataclass

ANSWERS = {
    "slow_down_503": (503, "SlowDown", "Please reduce your request rate."),
    "internal_500": (500, "InternalError", "We encountered an internal error. Please try again."),
    "bad_gateway_502": (502, None, "<html><body>502 Bad Gateway</body></html>"),
    "unavailable_503": (503, "ServiceUnavailable", "Service is unable to handle request."),
    "gateway_timeout_504": (504, None, "<html><body>504 Gateway Time-out</body></html>"),
    "too_many_429": (429, None, "Too Many Requests"),
    "request_timeout_400": (400, "RequestTimeout", "Your socket connection was not read from or written to in time."),
    "skewed_403": (403, "RequestTimeTooSkewed", "The difference between the request time and the time is too large."),
    "denied_403": (403, "AccessDenied", "Access Denied"),
    "wrong_key_403": (403, "InvalidAccessKeyId", "The AWS Access Key Id you provided does not exist in our records."),
    "wrong_signature_403": (403, "SignatureDoesNotMatch", "The request signature we calculated does not match."),
    "expired_400": (400, "ExpiredToken", "The provided token has expired."),
    "no_bucket_404": (404, "NoSuchBucket", "The specified bucket does not exist"),
    "redirect_301": (301, "PermanentRedirect", "The bucket you are attempting to access is at another endpoint."),
    "complete_200_error": (200, "InternalError", "We encountered an internal error. Please try again."),
}
DELETE_DENIED = "<DeleteResult><Error><Key>{key}</Key><Code>AccessDenied</Code><Message>Access Denied</Message></Error></DeleteResult>"
UNANSWERED = ("reset", "close", "hang", "answer_lost")
SPOILT = ("body_cut", "body_reset", "body_stalls", "wrong_bytes")
KINDS = (*ANSWERS, "delete_200_denied", *UNANSWERED, *SPOILT)
HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "proxy-connection", "te", "upgrade", "expect"}


@dataclass(frozen=True, eq=False)
class Fault:
    """What happens to which requests. `key` is a pattern over `bucket/key`, or over the key alone."""

    kind: str
    operation: str = "*"
    key: str = "*"
    first: int = 1  # the first of the matching requests, counted from when the rule was added
    times: int | None = 1  # how many of them; None: until the rule is removed
    every: int = 1  # only each n-th from the first on

    def __post_init__(self):
        assert self.kind in KINDS, self.kind

    def matches(self, request: Request) -> bool:
        return fnmatch.fnmatchcase(request.operation, self.operation) and (
            fnmatch.fnmatchcase(request.key, self.key) or fnmatch.fnmatchcase(request.path, self.key)
        )


@dataclass(frozen=True)
class Request:
    """A request as it came; `fault` is what was done to it, or ""."""

    operation: str
    method: str
    bucket: str
    key: str
    fault: str = ""

    @property
    def path(self) -> str:
        return f"{self.bucket}/{self.key}"


class FaultyStore:
    """A running proxy; `url` is its endpoint, `injected` counts by kind what was done."""

    def __init__(self, endpoint: str):
        split = urllib.parse.urlsplit(endpoint)
        self.upstream = (split.hostname, split.port)
        self.injected: Counter[str] = Counter()
        self.over = threading.Event()
        self._lock = threading.Lock()
        self._rules: list[tuple[Fault, list[int]]] = []  # with how many requests matched, and how many were spoilt
        self._requests: list[Request] = []

    def __enter__(self) -> FaultyStore:
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.store = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self.over.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)

    def add(self, fault: Fault) -> Fault:
        """The rule, in force from now on, after those that are there."""
        with self._lock:
            self._rules.append((fault, [0, 0]))
        return fault

    def remove(self, *faults: Fault) -> None:
        """None; ends these rules, or all of them when none is named."""
        with self._lock:
            self._rules = [rule for rule in self._rules if faults and rule[0] not in faults]

    def requests(self, operation: str = "*", key: str = "*") -> list[Request]:
        """The requests so far that match, in order, those included that were spoilt."""
        wanted = Fault("reset", operation, key)
        with self._lock:
            return [request for request in self._requests if wanted.matches(request)]

    def forget(self) -> None:
        """None; removes all rules, and counts anew."""
        with self._lock:
            self._rules, self._requests = [], []
            self.injected.clear()

    def fault_of(self, request: Request) -> str:
        """What is to be done to this request, or ""; it is counted."""
        with self._lock:
            kind = ""
            for fault, counts in self._rules:
                if not fault.matches(request):
                    continue
                counts[0] += 1
                since = counts[0] - fault.first
                if not kind and since >= 0 and since % fault.every == 0 and counts[1] != fault.times:
                    counts[1] += 1
                    kind = fault.kind
                    self.injected[kind] += 1
            self._requests.append(Request(request.operation, request.method, request.bucket, request.key, kind))
            return kind


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    store: FaultyStore

    def handle_error(self, request, client_address):
        """Nothing: clients that give up are part of the tests."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_):
        """Nothing."""

    def do(self) -> None:
        body = self._body()
        request = _parse(self.command, self.path, self.headers)
        store = self.server.store
        kind = store.fault_of(request)
        if kind in ANSWERS:
            return self._answer(request, *ANSWERS[kind])
        if kind == "delete_200_denied":
            return self._answer(request, 200, None, DELETE_DENIED)
        if kind == "hang":
            store.over.wait()
            return self._drop()
        if kind in ("reset", "close"):
            return self._drop(reset=kind == "reset")
        status, reason, headers, answer = self._forward(body)
        if kind == "answer_lost":
            return self._drop()
        if kind == "wrong_bytes" and answer:
            middle = len(answer) // 2
            answer = answer[:middle] + bytes([answer[middle] ^ 1]) + answer[middle + 1 :]
        self.send_response_only(status, reason)
        length = str(len(answer))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in (*HOP_HEADERS, "content-length"):
                self.send_header(name, value)
        if status not in (204, 304):
            self.send_header("Content-Length", length)
        self.end_headers()
        if kind in ("body_cut", "body_reset", "body_stalls"):
            self.wfile.write(answer[: len(answer) // 2])
            self.wfile.flush()
            if kind == "body_stalls":
                store.over.wait()
            return self._drop(reset=kind == "body_reset")
        self.wfile.write(answer)
        return None

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do  # the names that http.server calls

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _forward(self, body: bytes) -> tuple[int, str, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(*self.server.store.upstream, timeout=120)
        with contextlib.closing(connection):
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() not in (*HOP_HEADERS, "content-length"):
                    connection.putheader(name, value)
            if body or self.command in ("PUT", "POST"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            answer = connection.getresponse()
            return answer.status, answer.reason, answer.getheaders(), answer.read()

    def _answer(self, request: Request, status: int, code: str | None, text: str) -> None:
        if code is not None:
            text = (
                f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code><Message>{text}</Message>'
                f"<Resource>/{request.path}</Resource><RequestId>00000000</RequestId></Error>"
            )
        body = b"" if self.command == "HEAD" else text.encode()
        self.send_response_only(status)
        self.send_header("Content-Type", "application/xml" if code else "text/html")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _drop(self, reset: bool = False) -> None:
        self.close_connection = True
        with contextlib.suppress(OSError):
            if reset:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.connection.close()
            else:
                self.connection.shutdown(socket.SHUT_RDWR)


def _parse(method: str, path: str, headers) -> Request:
    split = urllib.parse.urlsplit(path)
    bucket, _, key = urllib.parse.unquote(split.path).lstrip("/").partition("/")
    query = urllib.parse.parse_qs(split.query, keep_blank_values=True)
    if not key:
        named = {"HEAD": "head_bucket", "GET": "list", "POST": "delete" if "delete" in query else "other"}
        operation = "list_uploads" if "uploads" in query else named.get(method, "other")
        key = query.get("prefix", [""])[0]
    elif method == "PUT":
        operation = "upload_part" if "partNumber" in query else "copy" if "x-amz-copy-source" in headers else "put"
    elif method == "POST":
        operation = "create_upload" if "uploads" in query else "complete_upload" if "uploadId" in query else "other"
    elif method == "DELETE":
        operation = "abort_upload" if "uploadId" in query else "delete"
    else:
        operation = {"GET": "get", "HEAD": "head"}.get(method, "other")
    return Request(operation, method, bucket, key)
