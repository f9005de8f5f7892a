"""When a request is made again: which errors pass by themselves, how long to wait, when to give up, what to say."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
import botocore.exceptions
import tenacity
from botocore.parsers import ResponseParserError

from common.logs import duration, logger
from common.storage_errors import without_secrets

PATIENCE_SECONDS = 120.0
"""How long one request is tried before its error is the caller's."""
UNREACHABLE_SECONDS = 20.0
"""The same where nothing listens, or nobody knows the name: more often a wrong address than a fault."""
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.1, 15.0
"""Before retry n passes a random time of up to 0.1 * 2^n seconds, so that many workers do not return as one."""

_TRANSIENT_STATUSES = {408, 429, 500, 502, 503, 504}
_TRANSIENT_CODES = {
    "BadDigest",  # the bytes changed on their way
    "ConditionalRequestConflict",  # another conditional write of this key was under way
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestLimitExceeded",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "Throttling",
    "ThrottlingException",
    "XAmzContentSHA256Mismatch",
}
_Answer = TypeVar("_Answer")


class DamagedTransferError(OSError):
    """What arrived is not what was sent."""


_TRANSIENT_ERRORS = (
    DamagedTransferError,
    botocore.exceptions.ConnectionError,
    botocore.exceptions.HTTPClientError,  # time-outs, closed connections
    botocore.exceptions.IncompleteReadError,
    ResponseParserError,  # overloaded gateways answer with something that is no XML
    aiohttp.ClientPayloadError,
    aiohttp.ClientConnectionError,
    ConnectionError,
    TimeoutError,
)
_HOPELESS_ERRORS = (botocore.exceptions.SSLError, botocore.exceptions.InvalidProxiesConfigError)


async def retried(request: Callable[[], Awaitable[_Answer]], doing: str) -> _Answer:
    """Make a request, again and again while its error is one that passes by itself.

    Args:
        request: Makes one attempt.
        doing: What it does, for the log: a line for each retry at debug level, from the third on a warning.

    Raises:
        Exception: The last attempt's own error.
    """

    def say(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        logger.log(
            logging.WARNING if state.attempt_number >= 3 else logging.DEBUG,
            "storage: %s failed (%s), retry %d in %.1f s, %s so far",
            without_secrets(doing),
            _named(error),
            state.attempt_number,
            state.upcoming_sleep,
            duration(state.seconds_since_start or 0),
        )

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(is_transient),
        wait=tenacity.wait_random_exponential(multiplier=BACKOFF_SECONDS, max=LONGEST_BACKOFF_SECONDS),
        stop=_out_of_patience,
        before_sleep=say,
        reraise=True,
    )
    return await retrying(request)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later; missing keys, refusals and other 4xx are for good."""
    if status_of(error) is not None:
        return status_of(error) in _TRANSIENT_STATUSES or error_code(error) in _TRANSIENT_CODES
    return isinstance(error, _TRANSIENT_ERRORS) and not isinstance(error, _HOPELESS_ERRORS)


def error_code(error: BaseException | None) -> str:
    """S3's own word for an error, such as ``SlowDown``; empty where the server gave no answer."""
    return str(_answer(error).get("Error", {}).get("Code", ""))


def status_of(error: BaseException | None) -> int | None:
    """The HTTP status of the answer an error stands for; None where the server gave none."""
    status = _answer(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    return None if status is None else int(status)


def _answer(error: BaseException | None) -> dict[str, Any]:
    """What botocore says of the answer; s3fs turns its exceptions into Python's and keeps them as the cause."""
    for candidate in (error, error.__cause__ if error else None):
        if isinstance(candidate, botocore.exceptions.ClientError):
            return dict(candidate.response)
    return {}


def _out_of_patience(state: tenacity.RetryCallState) -> bool:
    error = state.outcome.exception() if state.outcome else None
    # aiobotocore calls every broken connection an EndpointConnectionError; what it wraps knows better.
    wrapped = getattr(error, "kwargs", {}).get("error")
    patience = UNREACHABLE_SECONDS if isinstance(wrapped, aiohttp.ClientConnectorError) else PATIENCE_SECONDS
    return (state.seconds_since_start or 0) + state.upcoming_sleep > patience


def _named(error: BaseException | None) -> str:
    """The kind of an error without its text, which quotes whole requests."""
    status, code = status_of(error), error_code(error)
    return f"{status} {code}".strip() if status is not None else type(error).__name__
