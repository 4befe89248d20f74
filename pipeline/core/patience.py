"""Requests to object stores: tried again while a store stumbles, and one line of plain words when it fails for good.

The library below tries a request a few times itself (botocore: 5 times within seconds; AWS_MAX_ATTEMPTS and
AWS_RETRY_MODE set it). What outlasts that, or what it does not try again (a body that came short or damaged, a clock
that was behind, an upload whose end was lost), is done anew here, with growing pauses, for PATIENCE_S. What waiting
can't mend (no right, no bucket, no credentials) fails at once.
"""

from __future__ import annotations

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

from pipeline.core.errors import StoreError, one_line, without_secrets

PATIENCE_S = 120.0
FIRST_PATIENCE_S = 20.0  # with an endpoint that never answered this process: most likely its address is wrong
FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 20.0

Result = TypeVar("Result")
logger = logging.getLogger("winnow")
answered: set[str] = set()  # the kinds of store that have answered this process

RIGHTS = "s3:ListBucket, s3:GetObject, and below the root s3:PutObject, s3:DeleteObject and s3:AbortMultipartUpload"
ELSEWHERE = "the bucket is in another region; AWS_DEFAULT_REGION names it"
# What the codes of S3 mean where no waiting helps. https://docs.aws.amazon.com/AmazonS3/latest/API/ErrorResponses.html
PERMANENT_CODES = {
    "AccessDenied": f"these credentials may not do that; winnow needs {RIGHTS}",
    "AllAccessDisabled": "the bucket's owner has disabled all access",
    "AuthorizationHeaderMalformed": ELSEWHERE,
    "ExpiredToken": "the credentials have expired; fresh ones go where these came from (AWS_SESSION_TOKEN, ...)",
    "IllegalLocationConstraintException": ELSEWHERE,
    "InvalidAccessKeyId": "the store does not know the access key; AWS_ACCESS_KEY_ID or AWS_PROFILE sets it",
    "InvalidBucketName": "that is no bucket's name",
    "InvalidObjectState": "the object is archived; it has to be restored first",
    "InvalidRange": "the object ends before the part that was asked for",
    "InvalidToken": "the session token is not of this access key; AWS_SESSION_TOKEN sets it",
    "NoSuchBucket": "there is no such bucket at this endpoint; create it, or see AWS_ENDPOINT_URL",
    "PermanentRedirect": ELSEWHERE,
    "SignatureDoesNotMatch": "the secret is not that of the access key; AWS_SECRET_ACCESS_KEY or AWS_PROFILE sets it",
}
CODES_OF_STATUS = {301: "PermanentRedirect", 401: "AccessDenied", 403: "AccessDenied"}  # where an answer has no body
TRANSIENT_CODES = {
    "BadDigest": "what arrived there is not what was sent",
    "IncompleteBody": "not all that was sent arrived there",
    "InvalidPart": "a part of the upload is gone",
    "NoSuchUpload": "the upload is gone",  # or it was finished, and the answer was lost
    "OperationAborted": "another request for the same object is being served",
    "RequestLimitExceeded": "too many requests",
    "RequestTimeTooSkewed": "this machine's clock is not the store's",
    "RequestTimeout": "the connection was too slow",
    "SlowDown": "too many requests",
    "Throttling": "too many requests",
    "ThrottlingException": "too many requests",
    "XAmzContentSHA256Mismatch": "what arrived there is not what was sent",
}
# Names of exception classes or of their bases, as every store has its own, and none is imported for this.
PERMANENT_CLASSES = {
    "NoCredentialsError": "no credentials; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY set them, or AWS_PROFILE; on a "
    "cluster on every node",
    "PartialCredentialsError": "half of the credentials is missing; AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY go "
    "together",
    "ProfileNotFound": "AWS_PROFILE names a profile that ~/.aws/config does not have",
    "ParamValidationError": "that is no bucket's name, or no key",
    "NotImplementedError": "a store of this kind can't do that",
}
TRANSIENT_CLASSES = {
    "ClientPayloadError": "the body came short",
    "IncompleteReadError": "the body came short",
    "IncompleteRead": "the body came short",
    "ResponseStreamingError": "the body came short",
    "ShortReadError": "the body came short",
    "FlexibleChecksumError": "the body was damaged on the way",
    "ResponseParserError": "the answer makes no sense",
    "ReadTimeoutError": "no answer in time",
    "ServerTimeoutError": "no answer in time",
    "FSTimeoutError": "no answer in time",
    "TimeoutError": "no answer in time",
    "ConnectionClosedError": "the connection broke",
    "HTTPClientError": "the connection broke",
    "ServerDisconnectedError": "the connection broke",
    "ConnectionResetError": "the connection broke",
}
CHANGED = "the object changed while it was read"
CHANGED_CLASSES = {"FileExpired", "ObjectChangedError"}
UNREACHABLE_CLASSES = {"ConnectionError", "ClientConnectionError", "gaierror"}
BUGS = (TypeError, AttributeError, LookupError, AssertionError, ArithmeticError, MemoryError, RecursionError)


class ShortReadError(Exception):
    """Fewer bytes came than the object has, without any other sign of an error."""


class ObjectChangedError(Exception):
    """Another object came than the one whose first part was read."""


@dataclass(frozen=True)
class Failure:
    """What an exception of a store's library means."""

    cause: str
    transient: bool = False
    unreachable: bool = False
    is_missing: bool = False  # there is no such object; its bucket is there
    is_doubtful: bool = False  # the store said no without a reason, and yes to the probe
    is_changed: bool = False  # the same request can't succeed; reading from the beginning can


def patiently(path: str, doing: str, request: Callable[[], Result], probe: Callable[[], Any] | None = None) -> Result:
    """What the request returns, however often it had to be made.

    Args:
        doing: `read`, `written`, `listed`, `deleted`: for the message.
        request: may be made any number of times.
        probe: a request of the same kind whose failure says more, for answers that say nothing (those to HEAD).

    Raises:
        FileNotFoundError: there is no such object.
        StoreError: anything else; its `transient` is true when only patience ran out.
    """
    kind = path.partition("://")[0]
    start_s, pause_s, warned, doubted = time.monotonic(), FIRST_PAUSE_S, False, False
    while True:
        try:
            result = request()
            answered.add(kind)
            return result
        except Exception as error:  # every store has its own error classes; all mean one of a few things to the user
            failure = failure_of(error, path, probe)
            if failure is None:
                raise
            if not failure.unreachable:
                answered.add(kind)
            if failure.is_missing:
                raise FileNotFoundError(errno.ENOENT, "no such file", without_secrets(path)) from error
            if failure.is_doubtful and not doubted:
                doubted = True
                continue
            spent_s = time.monotonic() - start_s
            if not failure.transient:
                raise StoreError(path, doing, failure.cause) from error
            patience_s = PATIENCE_S if kind in answered else min(FIRST_PATIENCE_S, PATIENCE_S)
            if failure.is_changed or spent_s >= patience_s:
                cause = failure.cause if failure.is_changed else f"{failure.cause}; tried for {spent_s:.0f} s"
                raise StoreError(path, doing, cause, transient=True) from error
            if not warned:
                message = without_secrets(f"{path} can't be {doing} yet: {failure.cause}")
                logger.warning("%s; trying again for %.0f s", message, patience_s)
                warned = True
        time.sleep(pause_s * random.uniform(0.5, 1))  # many workers must not come back all at once
        pause_s = min(2 * pause_s, LONGEST_PAUSE_S)


def failure_of(error: BaseException, path: str, probe: Callable[[], Any] | None = None) -> Failure | None:
    """What the exception means for a request to the path, None for a bug; `probe` as in `patiently`."""
    chain = list(_chain(error))
    if any(type(link).__name__ in CHANGED_CLASSES for link in chain):
        return Failure(CHANGED, transient=True, is_changed=True)
    for link in chain:
        code, status = _answer(link)
        if status is None:
            continue
        failure = _failure_of_answer(code, status, path, link)
        if probe is not None and status in (400, 403) and code not in PERMANENT_CODES and code not in TRANSIENT_CODES:
            try:
                probe()
            except Exception as told:  # of the same store: see above
                return failure_of(told, path)
            return replace(failure, is_doubtful=True)
        return failure
    for link in chain:
        names = [kind.__name__ for kind in type(link).__mro__]
        if "SSLError" in names and "CERTIFICATE" in str(link).upper():
            return Failure("no trusted TLS connection; AWS_CA_BUNDLE names the certificates to trust")
        fields = getattr(link, "kwargs", None)
        inner = fields.get("error") if isinstance(fields, dict) else None  # of botocore's errors
        if isinstance(inner, ValueError):
            return Failure(f"no request can be made; see AWS_ENDPOINT_URL: {one_line(inner)}")
        for name in names:
            if name in PERMANENT_CLASSES:
                return Failure(PERMANENT_CLASSES[name])
            if name in TRANSIENT_CLASSES:
                return Failure(TRANSIENT_CLASSES[name], transient=True)
            if name in UNREACHABLE_CLASSES:
                cause = f"the endpoint{_endpoint(link)} can't be reached; see AWS_ENDPOINT_URL and the network"
                return Failure(cause, transient=True, unreachable=True)
    if isinstance(error, FileNotFoundError):
        return Failure("no such file", is_missing=True)
    if isinstance(error, PermissionError):
        return Failure(f"access denied: {one_line(error)}")
    if "Invalid endpoint" in str(error):
        return Failure("AWS_ENDPOINT_URL is no address, expected one such as https://host:9000")
    # s3fs stumbles over some errors of the network with an IndexError of its own: those are found in the chain above
    return None if isinstance(error, BUGS) else Failure(one_line(error))


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """The exception and what it came from, without what went wrong only while an upload was being given up."""
    while error is not None:
        links = (error, error.__cause__)
        context = None if error.__suppress_context__ and error.__cause__ is None else error.__context__
        given_up = any(getattr(link, "operation_name", "") == "AbortMultipartUpload" for link in links)
        if given_up and context is not None:
            error = context
            continue
        yield error
        error = error.__cause__ or context


def _answer(error: BaseException) -> tuple[str, int | None]:
    """(S3's code or "", the HTTP status) of an exception that stands for an answer; (_, None) of any other."""
    response = getattr(error, "response", None)
    if isinstance(response, dict) and "Error" in response:
        code = str(response["Error"].get("Code") or "")
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode")
        if status is None:
            status = int(code) if code.isdecimal() else 400
        return "" if code.isdecimal() else code, status
    place = {
        "ClientResponseError": "status",
        "HttpError": "code",
        "HttpResponseError": "status_code",
    }  # HTTP, GCS, Azure
    for kind in type(error).__mro__:
        if kind.__name__ in place:
            return "", getattr(error, place[kind.__name__])
    return "", None


def _failure_of_answer(code: str, status: int, path: str, error: BaseException) -> Failure:
    shown = f"HTTP {status} {code}".strip()
    if code in TRANSIENT_CODES:
        return Failure(f"{TRANSIENT_CODES[code]} ({shown})", transient=True)
    if status in (408, 429) or (status >= 500 and status not in (501, 505, 507)):
        return Failure(f"the store is busy or failing ({shown})", transient=True)
    if code == "ConditionalRequestConflict":
        return Failure(f"{TRANSIENT_CODES['OperationAborted']} ({shown})", transient=True)
    if status == 404 and code != "NoSuchBucket":
        if "/" in path.partition("://")[2].strip("/"):
            return Failure("no such file", is_missing=True)
        code = "NoSuchBucket"
    code = code or CODES_OF_STATUS.get(status, "")
    if code in PERMANENT_CODES:
        return Failure(f"{PERMANENT_CODES[code]} ({shown})")
    return Failure(f"{one_line(error)} ({shown})")


def _endpoint(error: BaseException) -> str:
    """` scheme://host:port` of what could not be reached, or ""."""
    fields = getattr(error, "kwargs", None)
    url = fields.get("endpoint_url") if isinstance(fields, dict) else None
    if not url:
        return ""
    split = urlsplit(str(url))
    return f" {split.scheme}://{split.netloc.rpartition('@')[2]}"
