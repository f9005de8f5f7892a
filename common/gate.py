"""Whoever consumes says how much may be begun; whoever produces waits for its turn.

A producer that is held back while it waits costs nothing. One whose finished products are held back may cost a core:
the scheduling loop of Ray Data (2.60) sleeps only in ``ray.wait`` for a running task. When every task has ended, and
their outputs wait for a consumer, it spins. Behind a gate a task is always running, and as long as one is, the loop
looks ten times a second.

No Ray here: a package that uses it makes the actor by ``ray.remote(Gate).options(**gate_options(node))``.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
import weakref
from typing import Any

REPEAT_SECONDS = 5.0
"""A gate whose process was replaced has forgotten its limit; so often is it told again."""
MANY = 10_000
"""More producers never wait at once."""


class Gate:
    """Lets the holders of the first so many places pass. Its methods run in the event loop of an actor."""

    def __init__(self) -> None:
        self._limit, self._closed = 0, False
        self._changed = asyncio.Condition()

    async def allow(self, limit: int) -> None:
        """Let the holders of places below ``limit`` pass; a lower limit than before changes nothing."""
        async with self._changed:
            self._limit = max(self._limit, limit)
            self._changed.notify_all()

    async def close(self, limit: int) -> None:
        """Send home whoever would have to wait.

        Args:
            limit: The last one. Ray gives an actor of this kind its calls in any order, so ``allow`` may come later.
        """
        async with self._changed:
            self._limit, self._closed = max(self._limit, limit), True
            self._changed.notify_all()

    async def passes(self, place: int) -> bool:
        """Wait for one's turn; false when it will never come.

        Who was let in once is let in again, also after the end: Ray does a task again whose product was lost.
        """
        async with self._changed:
            await self._changed.wait_for(lambda: self._closed or place < self._limit)
            return place < self._limit


class GateKeeper:
    """The consumer's end. It repeats itself, so that a gate whose process was replaced knows as much as before.

    Args:
        actor: Handle of a :class:`Gate`.
    """

    def __init__(self, actor: Any) -> None:
        self.actor = actor
        self._limit, self._closed = 0, False
        threading.Thread(target=_repeat, args=(weakref.ref(self),), name="mmkd-gate-keeper", daemon=True).start()

    def allow(self, limit: int) -> None:
        """Let so many begin, counted from the first; at once, without waiting for an answer."""
        if limit > self._limit:
            self._limit = limit
            self.actor.allow.remote(limit)

    def close(self) -> None:
        """Send home whoever would have to wait; to call it again does nothing."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(Exception):  # Ray may be gone, and whatever ended it is the error to tell of
                self.actor.close.remote(self._limit)

    def repeat(self) -> None:
        """Say once more what was said."""
        say = self.actor.close if self._closed else self.actor.allow
        say.remote(self._limit)


def _repeat(keeper: weakref.ref[GateKeeper]) -> None:
    """Repeat what a keeper said for as long as there is one, and a cluster to say it to."""
    while True:
        time.sleep(REPEAT_SECONDS)
        present = keeper()
        if present is None:
            return
        try:
            present.repeat()
        except Exception:  # noqa: BLE001 - Ray was shut down; this module knows none of its errors
            return
        del present


def gate_options(node: str) -> dict[str, Any]:
    """Ray's options for the actor of a gate: beside its keeper, and there again if its process dies.

    Args:
        node: Id of the keeper's node.
    """
    return {
        "num_cpus": 0,
        "max_concurrency": MANY,
        "max_restarts": -1,
        "max_task_retries": -1,
        "label_selector": {"ray.io/node-id": node},
    }
