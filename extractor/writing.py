"""What a writer task does: store one teacher's file of one shard, if the partition is still its run's to write.

A module of its own, without torch or Ray, so that a writer's process starts quickly.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from common.errors import LeaseError
from common.lake import Lake
from common.lease import Lease
from extractor.sink import write_features


@dataclass(frozen=True)
class WriteOrder:
    """What every writer of a run needs to know."""

    lake_uri: str
    manifests: dict[str, dict[str, Any]]
    """Teacher -> content of its manifest, which each file's footer draws on."""
    leases: Mapping[str, Lease] = field(default_factory=dict)
    """``teacher=NAME`` -> whether the partition is still this run's to write."""


def write_file(
    order: WriteOrder, teacher: str, shard: int, features: pa.Table, rejects: list[tuple[str, str, str]]
) -> tuple[int, float]:
    """Store one file.

    Returns:
        Its size in bytes, and the seconds it took.
    """
    started = time.monotonic()
    lease = order.leases.get(f"teacher={teacher}")
    if lease is not None and not lease.is_held():
        raise LeaseError(
            f"Teacher {teacher!r} of {order.lake_uri} belongs to another run now; shard {shard} was not written."
        )
    size = write_features(Lake(order.lake_uri), teacher, shard, features, rejects, order.manifests[teacher])
    return size, time.monotonic() - started
