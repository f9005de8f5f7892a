"""What can be known before Ray is asked: whether anybody answers at an address, and whether the home can be written.

Ray itself tries an address that nobody answers for a quarter of an hour, deaf to signals.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

PATIENCE_SECONDS = 10.0
"""A cluster that is just being started may take so long to answer."""
CONNECT_SECONDS = 5.0
CLIENT_PORT = 10001
"""Of an address that begins with ray:// and names none."""
TOKEN = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")
"""Variables by which Ray takes its token from elsewhere than the home."""


def insist_on_answer(address: str) -> None:
    """Wait, where Ctrl-C and SIGTERM are heard, until a machine accepts connections at a Ray address.

    Args:
        address: As in ``RAY_ADDRESS``: host:port, ray://host:port, or ``auto``; of several with commas between them one
            is enough. What names no port is left to Ray.

    Raises:
        ConnectionError: None does; says why.
    """
    places, deadline = list(_places(address)), time.monotonic() + PATIENCE_SECONDS
    while places:
        failures = [f"{host}:{port}: {why}" for host, port in places if (why := _why_not(host, port)) is not None]
        if len(failures) < len(places):
            return
        if time.monotonic() >= deadline:
            raise ConnectionError(f"nobody answers there ({'; '.join(failures)})")
        time.sleep(0.5)


def _places(address: str) -> Iterator[tuple[str, int]]:
    for part in address.split(","):
        name = _newest_local() if part.strip() == "auto" else part.strip()
        is_client, name = name.startswith("ray://"), name.removeprefix("ray://")
        if "://" in name:
            continue
        found = urlsplit(f"//{name}")
        port = found.port or (CLIENT_PORT if is_client else None)
        if found.hostname and port:
            yield found.hostname, port


def _newest_local() -> str:
    """What ``auto`` stands for: where the last ``ray start`` of this machine has noted its address, if it has."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108 - Ray's own place
    try:
        return (Path(folder) / "ray" / "ray_current_cluster").read_text().strip()
    except OSError:
        return ""


def _why_not(host: str, port: int) -> str | None:
    try:
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except OSError as error:
        return str(error)
    return None


def home_fault() -> str | None:
    """Why Ray cannot keep its token below the home folder; None if it can, has one there, or needs none of it."""
    if any(os.environ.get(name) for name in TOKEN) or os.environ.get("RAY_AUTH_MODE", "token").lower() != "token":
        return None
    try:
        folder = Path.home() / ".ray"
        if os.access(folder / "auth_token", os.R_OK):
            return None
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return None
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where the home is
        return f"the home folder (HOME={os.environ.get('HOME', 'not set')}) cannot be written: {error}"
