"""Leases: at any time at most one run writes a partition of a lake, whatever dies, stalls or wakes up again.

A lease is a small JSON file, ``leases/<name>.json``, that changes only by compare-and-swap. Its holder raises the
file's beat every sixth of a lease's length. A contender compares no clocks: it watches the file for one length, and if
nothing in it has changed by then, the holder is dead or stalled and the contender takes over. Where it can see that the
holder's process has ended (same machine), it need not wait. A holder that was stalled finds another token there, or
knows from its own clock that it was silent for too long, and is ``lost``.

A released lease stays as a file that says so: deleting it could hit a successor's.
"""

from __future__ import annotations

import json
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import Any
from urllib.parse import quote

from common.errors import LeaseError, StorageError
from common.lake import now
from common.logs import duration, logger
from common.processes import Process, this_process
from common.storage import Storage

FOLDER = "leases"
BEATS = 6
"""Renewals in the length of a lease: that many in a row must fail before it is lost."""
TRUSTED_SECONDS = 2.0
"""How long the answer of :meth:`Lease.is_held` is taken for granted."""


@dataclass(frozen=True)
class Record:
    """The content of a lease's file.

    Attributes:
        token: Tells this acquisition from all others.
        run: What the holder calls itself.
        host: The holder's machine, for people.
        process: The holder's process, as its own machine knows it.
        seconds: How long the holder may be silent.
        since: When it was acquired, for people.
        beat: Rises with every renewal.
        written_at: The holder's time of the last beat, for people; never compared.
        released: Whether the holder is done.
    """

    token: str
    run: str
    host: str
    process: Process
    seconds: float
    since: str
    beat: int = 0
    written_at: str = ""
    released: bool = False

    def to_bytes(self, beat: int = 0, released: bool = False) -> bytes:
        """The file's content at a beat."""
        content = {**asdict(self), "beat": beat, "released": released, "written_at": now()}
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> Record | None:
        """The record of a file's content; None for a file that somebody else has written."""
        try:
            content = json.loads(data)
            return cls(**{**content, "process": Process(**content["process"])})
        except (ValueError, TypeError, KeyError):
            return None


class Lease:
    """The right to write one partition, held by the process that called :func:`hold`.

    Pickled, it becomes a token with which other processes ask :meth:`is_held`; it renews and releases nothing there.
    """

    def __init__(self, storage: Storage, name: str, token: str, seconds: float) -> None:
        self.storage, self.name, self.token, self.seconds = storage, name, token, seconds
        self._renewal: _Renewal | None = None
        self._answer, self._asked = False, -TRUSTED_SECONDS

    def __getstate__(self) -> dict[str, Any]:
        own = {"_renewal": None, "_answer": False, "_asked": -TRUSTED_SECONDS}
        return {**self.__dict__, **own}

    @property
    def lost(self) -> bool:
        """Whether the holder must stop writing; False in other processes, which ask :meth:`is_held`."""
        return self._renewal is not None and self._renewal.lost

    def is_held(self) -> bool:
        """Whether the storage still says that the lease is this one's; a worker asks before it writes.

        The answer may be two seconds old.

        Raises:
            StorageError: The storage does not answer.
        """
        if self.lost:
            return False
        asked = time.monotonic()
        if asked - self._asked >= TRUSTED_SECONDS:
            record = _look(self.storage, self.name)[0]
            self._answer = record is not None and record.token == self.token and not record.released
            self._asked = asked
        return self._answer

    def release(self) -> None:
        """Let go of the lease, if it is still this one's; a second call, or one in another process, does nothing."""
        if self._renewal is not None:
            self._renewal.stop()
            self._answer, self._asked = False, time.monotonic()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class Leases:
    """Several leases as one: held while all of them are."""

    def __init__(self, leases: Iterable[Lease]) -> None:
        self.leases = list(leases)

    @property
    def lost(self) -> bool:
        """Whether any of them is lost."""
        return any(lease.lost for lease in self.leases)

    def is_held(self) -> bool:
        """Whether all of them are still held; see :meth:`Lease.is_held`."""
        return all(lease.is_held() for lease in self.leases)

    def release(self) -> None:
        """Let go of all of them, the last first."""
        for lease in reversed(self.leases):
            lease.release()

    def __enter__(self) -> Leases:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def hold(
    storage: Storage, name: str, run: str, seconds: float = 60.0, earlier: tuple[bytes, float] | None = None
) -> Lease:
    """Acquire the lease of a partition and keep renewing it from a thread until it is released.

    Args:
        storage: The lake.
        name: The partition's name; any characters.
        run: What this run calls itself, for whom it turns away.
        seconds: The lease's length: how long a holder that gives no sign of life keeps others waiting.
        earlier: What the file held at an earlier look, and when that was (``time.monotonic``): watching began then.

    Raises:
        LeaseError: Another run holds it, and is alive.
        StorageError: The storage cannot be read or written.
    """
    record = Record(uuid.uuid4().hex, run, socket.gethostname(), this_process(), seconds, now())
    watched, watched_since = earlier or (b"", 0.0)
    while True:
        looking = time.monotonic()
        present, data, version = _look(storage, name)
        gone = present is not None and (present.released or present.process.has_ended())
        patience = present.seconds if present else seconds
        if version is not None and not gone and data != watched:
            if watched:
                raise _turned_away(storage, name, present)
            # From after the look on: the holder counts from before its last write, so it gives up first.
            watched, watched_since = data, time.monotonic()
            logger.info("%s; watching for %s whether it is alive", _held(name, present), duration(patience))
        writing, taken = time.monotonic(), False
        if version is None:
            taken = storage.create(_path(name), record.to_bytes())
        elif gone or looking - watched_since >= patience:
            taken = storage.replace(_path(name), record.to_bytes(), version)
            if taken and not (present and present.released):
                logger.info("%s, which gives no sign of life; taken over", _held(name, present))
        else:
            time.sleep(min(seconds / (2 * BEATS), 1.0))
        if taken:
            lease = Lease(storage, name, record.token, seconds)
            lease._renewal = _Renewal(storage, name, record, seconds, writing)
            _doubt_conditions(storage, name, record)
            return lease


def hold_all(storage: Storage, names: Iterable[str], run: str, seconds: float = 60.0) -> Leases:
    """Acquire several leases, in the order of their names, so that two runs never wait for each other.

    Raises:
        LeaseError: Another run holds one of them; those already acquired have been released.
    """
    leases, ordered = Leases([]), sorted(set(names))
    # All are watched from now on: what a dead run held is stale at the same time, not one length after another.
    earlier = {name: (_look(storage, name)[1], time.monotonic()) for name in ordered}
    try:
        for name in ordered:
            first_look = earlier[name] if leases.leases and earlier[name][0] else None
            leases.leases.append(hold(storage, name, run, seconds, first_look))
    except BaseException:
        leases.release()
        raise
    return leases


def active_runs(storage: Storage) -> set[str]:
    """Runs that hold a lease, as far as one look can tell: not released, and no process that is known to have ended."""
    found = set()
    for name in storage.list_files(FOLDER, ".json"):
        record = Record.from_bytes(storage.read_bytes(f"{FOLDER}/{name}"))
        if record is not None and not record.released and not record.process.has_ended():
            found.add(record.run)
    return found


class _Renewal:
    """The thread that raises a lease's beat, and knows when the lease is lost."""

    def __init__(self, storage: Storage, name: str, record: Record, seconds: float, renewed: float) -> None:
        self._storage, self._name, self._record, self._seconds = storage, name, record, seconds
        self._renewed = renewed  # when the last successful write was sent: it may have taken effect as early as that
        self._taken = threading.Event()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name=f"lease {name}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> bool:
        # A contender that has watched an unchanging file for this long may have taken over, told or not.
        if not self._stopping.is_set() and time.monotonic() - self._renewed > self._seconds:
            self._taken.set()
        return self._taken.is_set()

    def _run(self) -> None:
        beat = 0
        while not self._stopping.wait(self._seconds / BEATS) and not self.lost:
            sent = time.monotonic()
            try:
                if self._write(beat + 1):
                    beat, self._renewed = beat + 1, sent
            except StorageError as error:
                logger.warning("lease %s could not be renewed: %s", self._name, error)
        if self.lost and not self._stopping.is_set():
            logger.warning("lease %s is lost: another run took over, or the storage was out of reach", self._name)

    def _write(self, beat: int, released: bool = False) -> bool:
        """Swap in the next content; False, and lost, where the present one is not this holder's."""
        present, _, version = _look(self._storage, self._name)
        if version is None or present is None or present.token != self._record.token:
            self._taken.set()
            return False
        # Refused only if someone came in between, which the next beat sees.
        return self._storage.replace(_path(self._name), self._record.to_bytes(beat, released), version)

    def stop(self) -> None:
        """End the thread and mark the file as released."""
        if self.lost or self._stopping.is_set():
            self._stopping.set()
            return
        self._stopping.set()
        self._thread.join()
        if self._taken.is_set():
            return
        try:
            self._write(0, released=True)
        except StorageError as error:
            # The work is done and safe; who comes next only has to wait.
            logger.warning("lease %s could not be released and will run out by itself: %s", self._name, error)


_DOUBTED: set[str] = set()
"""Object stores of which this process has found out whether they keep to conditions."""


def _doubt_conditions(storage: Storage, name: str, record: Record) -> None:
    """Try to write over a lease just acquired; stores that ignore conditions say nothing, they only let two runs in."""
    if storage.is_local or storage.uri in _DOUBTED:
        return
    _DOUBTED.add(storage.uri)
    # Still this holder's record, should it get through.
    probe = record.to_bytes(beat=1)
    try:
        ignored = storage.create(_path(name), probe) or storage.replace(_path(name), probe, f'"{"0" * 32}"')
    except StorageError as error:
        logger.warning("whether %s keeps to conditional writes could not be found out: %s", storage.uri, error)
        return
    if ignored:
        logger.warning(
            "%s does not keep to the conditions of writes (If-None-Match, If-Match), so a second run on the same "
            "partition would not be turned away. See to it that only one run writes to this lake at a time.",
            storage.uri,
        )


def _path(name: str) -> str:
    return f"{FOLDER}/{quote(name, safe='=@+ ')}.json"


def _look(storage: Storage, name: str) -> tuple[Record | None, bytes, str | None]:
    """A lease's record, its file's content, and its version; without a file the version is None."""
    try:
        data, version = storage.read_versioned(_path(name))
    except FileNotFoundError:
        return None, b"", None
    return Record.from_bytes(data), data, version


def _held(name: str, present: Record | None) -> str:
    if present is None:
        return f"lease {name}: its file was not written by mmkd"
    return f"lease {name} is held by run {present.run!r} ({present.host}, process {present.process.pid})"


def _turned_away(storage: Storage, name: str, present: Record | None) -> LeaseError:
    holder = "somebody unknown"
    if present:
        holder = f"run {present.run!r} on {present.host} (process {present.process.pid}) since {present.since}"
    return LeaseError(
        f"{storage.uri}: {name} is being written by {holder}, which gave a sign of life just now. Two runs on one "
        "partition would undo each other's work. Wait for that run to end, or stop it, and run this command again: it "
        "goes on where the other stopped."
    )
