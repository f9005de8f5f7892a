"""Pictures given by http(s) URL: each has its time, its size and a few tries; what is wrong with one is its own fault.

The session is fsspec's, so that what a user wrote into fsspec's configuration files (headers, proxies) holds here too.
The request is not: fsspec holds a body in memory whatever its size, and waits five minutes for a silent host.
"""

from __future__ import annotations

import asyncio
import errno
import threading
from collections import Counter
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import fsspec
import tenacity
from fsspec.asyn import sync

from common.logs import logger
from common.retries import is_transient
from common.storage_errors import without_secrets
from extractor.config import FetchConfig
from extractor.sources.record import NOT_REACHABLE, RowFaultError

BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 0.2, 5.0
"""Before retry n passes a random time of up to 0.2 * 2^n seconds."""
DEAD_ROWS = 3
"""A host to which so many rows in a row found no connection gets one try for each further one."""
_TRANSIENT_STATUSES = (408, 429)
_WORDS: tuple[tuple[type[BaseException] | tuple[type[BaseException], ...], str], ...] = (
    # The first that fits is the reason, so what is special comes before what is general.
    (TimeoutError, "no answer in time"),
    (aiohttp.TooManyRedirects, "too many redirects"),
    (aiohttp.RedirectClientError, "bad redirect"),
    ((aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError), "bad address"),
    (aiohttp.ClientConnectorCertificateError, "bad certificate"),
    (aiohttp.ClientSSLError, "no secure connection"),
    (aiohttp.ClientConnectorDNSError, "unknown host"),
    (aiohttp.ClientConnectorError, "no connection"),
    (aiohttp.ClientPayloadError, "body cut short"),
    (aiohttp.ClientResponseError, "malformed answer"),
    ((aiohttp.ClientConnectionError, OSError), "connection lost"),
    (aiohttp.ClientError, "malformed answer"),
    (ValueError, "bad address"),
)


class StatusError(Exception):
    """The server answered, but not with the picture."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


class WebPictures:
    """Fetches the pictures of one part, and remembers the hosts that cost more than they give.

    Several threads may ask at once; of one host, a few pictures at a time are under way.
    """

    def __init__(self, config: FetchConfig) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._turns: dict[str, threading.Semaphore] = {}
        self._silent: Counter[str] = Counter()
        """Host -> how many rows in a row waited for it in vain."""
        self._dead: Counter[str] = Counter()
        """Host -> to how many rows in a row it gave no connection."""

    def read(self, url: str, max_bytes: int) -> bytes:
        """The body of the answer to a URL, redirects followed; never more than ``max_bytes`` of it are held.

        Raises:
            RowFaultError: There is none, or it is larger.
        """
        host = _host_of(url)
        with self._lock:
            turn = self._turns.setdefault(host, threading.Semaphore(self._config.per_host))
        with turn:
            return self._read(url, host, max_bytes)

    def _read(self, url: str, host: str, max_bytes: int) -> bytes:
        shown, seconds = without_secrets(url), self._config.seconds
        if self._silent[host] >= self._config.silent_rows:
            detail = (
                f"{shown}: not asked, because the last {self._silent[host]} rows of this host took over {seconds:g} s"
            )
            raise RowFaultError(f"{NOT_REACHABLE}: host does not answer", detail)
        tries = 1 if self._dead[host] >= DEAD_ROWS else 1 + self._config.retries
        error: Exception | None = None
        try:
            filesystem = fsspec.filesystem(url.partition(":")[0].lower())
            return sync(filesystem.loop, _fetch, filesystem, url, max_bytes, seconds, tries)
        except (StatusError, aiohttp.ClientError, OSError, ValueError) as caught:
            error = caught
            reason, said = _account(caught, seconds)
            raise RowFaultError(reason, f"{shown}: {said}") from caught
        finally:
            self._remember(host, error)

    def _remember(self, host: str, error: Exception | None) -> None:
        with self._lock:
            self._silent[host] = self._silent[host] + 1 if isinstance(error, TimeoutError) else 0
            self._dead[host] = self._dead[host] + 1 if isinstance(error, aiohttp.ClientConnectorError) else 0
            is_given_up = self._silent[host] == self._config.silent_rows
        if is_given_up:
            logger.warning(
                "ingest: %s gave no picture within %g s, %d rows in a row; its further rows in this part are rejects",
                *(host, self._config.seconds, self._silent[host]),
            )


def _host_of(url: str) -> str:
    try:
        return urlsplit(url).netloc.rpartition("@")[2].lower()
    except ValueError:  # it fails again where it is asked for, and is accounted for there
        return ""


async def _fetch(filesystem: Any, url: str, max_bytes: int, seconds: float, tries: int) -> bytes:
    """The body, tried again while the error may pass; the time is for all tries together."""
    session = await filesystem.set_session()
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(_may_pass),
        wait=tenacity.wait_random_exponential(multiplier=BACKOFF_SECONDS, max=LONGEST_BACKOFF_SECONDS),
        stop=tenacity.stop_after_attempt(tries) | tenacity.stop_before_delay(seconds),
        reraise=True,
    )
    async with asyncio.timeout(seconds):
        return await retrying(_attempt, filesystem, session, url, max_bytes)


async def _attempt(filesystem: Any, session: aiohttp.ClientSession, url: str, max_bytes: int) -> bytes:
    settings = {**filesystem.kwargs, "timeout": aiohttp.ClientTimeout(total=None)}  # the caller keeps the time
    async with session.get(filesystem.encode_url(url), **settings) as answer:
        if answer.status != 200:
            raise StatusError(answer.status)
        _insist_on_size(answer.content_length or 0, url, max_bytes)
        pieces: list[bytes] = []
        size = 0
        async for piece in answer.content.iter_any():
            pieces.append(piece)
            size += len(piece)
            _insist_on_size(size, url, max_bytes)  # leaving the block closes a connection with an unread body
    return b"".join(pieces)


def _insist_on_size(size: int, url: str, max_bytes: int) -> None:
    if size > max_bytes:
        detail = f"{without_secrets(url)}: {size} bytes or more; the limit is {max_bytes}"
        raise RowFaultError("file too large", detail)


def _may_pass(error: BaseException) -> bool:
    if isinstance(error, StatusError):
        return error.status in _TRANSIENT_STATUSES or error.status >= 500
    return is_transient(error) and not isinstance(error, aiohttp.ClientSSLError)


def _account(error: Exception, seconds: float) -> tuple[str, str]:
    """The reason for an error, and what it says of this one picture."""
    if isinstance(error, StatusError):
        return ("image not found" if error.status == 404 else f"{NOT_REACHABLE}: {error}"), str(error)
    if isinstance(error, aiohttp.ClientConnectorError) and error.os_error.errno == errno.ECONNREFUSED:
        words = "connection refused"
    else:
        words = next(words for kinds, words in _WORDS if isinstance(error, kinds))
    if isinstance(error, TimeoutError):
        return f"{NOT_REACHABLE}: {words}", f"no whole picture within {seconds:g} s"
    return f"{NOT_REACHABLE}: {words}", f"{type(error).__name__}: {without_secrets(str(error))}"
