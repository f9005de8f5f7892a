"""From the storage libraries' many exceptions to one StorageError that says what was being done, without secrets."""

from __future__ import annotations

import re
from urllib.parse import unquote

import pyarrow as pa

from common.errors import StorageError

_SIGNS = re.compile(
    r"[?&;](?:amp;)?"
    # S3 (also its older form and its imitators), Google's and Azure's; tokens of whoever else.
    r"(?:x-(?:amz|goog|oss|cos|ms)-[\w-]+|\w{0,32}accesskeyid|googleaccessid|key-pair-id"
    r"|(?:[\w-]{0,32}[-_])?(?:sig|signature|token|auth|authorization|password|passwd|pwd|secret|credential|jwt|hmac"
    r"|hdnea|hdnts|session|sessionid|(?:api|access|secret)[-_]?key)_{0,2}|key|\w{1,32}token)"
    r"=[^\s&'\"]*",
    re.IGNORECASE,
)
"""A parameter of a query that lets its bearer in."""


def without_secrets(text: str) -> str:
    """A text in which every address has lost its user, password and query, as it may be shown and written down."""
    text = re.sub(r"(\w://)[^/@\s]*@", r"\1", text)
    text = re.sub(r"(\w://[^\s?'\"]*)\?[^\s'\"]*", r"\1", text)
    # Where an address ends is a guess if there are blanks or quotes in it, and a relative one does not show.
    text = re.sub(r"\?[^\s'\"]*", lambda query: "" if _SIGNS.search(query[0]) else query[0], text)
    return _SIGNS.sub("", text)


def unsigned(address: str) -> str:
    """An address as it names a file for good: without user, password and a query that signs.

    Who signs it anew gets the same name. A query that only says which file it is (``?id=5``) stays.
    """
    address = re.sub(r"(\w://)[^/@?#\s]*@", r"\1", address)
    place, _, query = address.partition("?")
    return place if _SIGNS.search(f"?{unquote(query)}") else address


class explained:  # noqa: N801 - reads as a phrase at the call: with explained("write x")
    """Turn what a storage library raises inside into a StorageError; a missing file stays FileNotFoundError."""

    def __init__(self, doing: str) -> None:
        self.doing = without_secrets(doing)

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if error is None or isinstance(error, FileNotFoundError):
            return
        if isinstance(error, PermissionError):
            raise StorageError(
                f"Could not {self.doing}: permission denied. Check the folder's rights, or for object storage the "
                "credentials in the environment (for S3: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, "
                "AWS_PROFILE, AWS_ENDPOINT_URL)."
            ) from error
        name = type(error).__name__
        if isinstance(error, OSError | pa.ArrowInvalid) or name in _REMOTE_ERRORS:
            hint = " For S3, check the credentials and AWS_ENDPOINT_URL." if name in _REMOTE_ERRORS else ""
            # The libraries' own messages quote whole addresses.
            raise StorageError(f"Could not {self.doing}: {name}: {without_secrets(str(error))}.{hint}") from error


# Named, not imported: botocore is s3fs's affair and slow to import.
_REMOTE_ERRORS = {
    "ClientResponseError",
    "ClientPayloadError",
    "ClientConnectorError",
    "ClientConnectionError",
    "ServerDisconnectedError",
    "FSTimeoutError",
    "NoCredentialsError",
    "PartialCredentialsError",
    "ClientError",
    "EndpointConnectionError",
    "ConnectTimeoutError",
    "ConnectionClosedError",
    "HTTPClientError",
    "IncompleteReadError",
    "ReadTimeoutError",
    "ResponseParserError",
    "ResponseStreamingError",
    "ProfileNotFound",
    "ParamValidationError",
    "InvalidRegionError",
}
