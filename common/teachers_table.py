"""``teachers.parquet``: what a lake says of its teachers, as one small table; made from their manifests."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from common.errors import MmkdError
from common.lake import READ_THREADS, Lake
from common.schemas import TEACHERS

TEACHERS_TABLE = "teachers.parquet"


def teachers_table(lake: Lake, begun: Iterable[str] = ()) -> pa.Table:
    """One row (:data:`common.schemas.TEACHERS`) for each teacher with embeddings and each that was only begun, by name.

    A manifest that cannot be read is left out here; ``mmkd verify`` speaks of it.
    """
    names = sorted({*lake.teachers(), *begun})

    def row(name: str) -> dict[str, Any] | None:
        try:
            return _row(name, lake.read_teacher(name))
        except (MmkdError, KeyError, TypeError, ValueError, AttributeError):
            return None

    with ThreadPoolExecutor(READ_THREADS) as pool:
        rows = [found for found in pool.map(row, names) if found is not None]
    return pa.Table.from_pylist(rows, schema=TEACHERS)


def refresh_teachers(lake: Lake, begun: Iterable[str] = ()) -> bool:
    """Write the lake's table of teachers anew if it is not what the manifests say.

    Runs that end at the same time may write it one after the other; whoever is last has seen all manifests.

    Args:
        lake: The lake.
        begun: Teachers whose manifest is written, and whose first file comes soon.

    Returns:
        Whether it was written.
    """
    table = teachers_table(lake, begun)
    try:
        if lake.storage.read_table(TEACHERS_TABLE).equals(table):
            return False
    except FileNotFoundError:
        if not table.num_rows:
            return False
    except MmkdError:
        pass  # torn, or of another kind: it is replaced
    lake.storage.write_table(TEACHERS_TABLE, table)
    return True


def _row(name: str, manifest: Mapping[str, Any]) -> dict[str, Any]:
    identity = manifest["fingerprint"]
    row = {
        "name": name,
        "image_dim": identity.get("image_dim"),
        "text_dim": identity.get("text_dim"),
        "image_size": identity.get("geometry", {}).get("size") if identity.get("image_dim") else None,
        "context_length": identity.get("context_length"),
        "license": manifest.get("license"),
        "derivatives": manifest.get("derivatives"),
        "derivative_terms": manifest.get("derivative_terms"),
        "weights_sha256": identity.get("weights_sha256"),
        "stored_precision": identity.get("stored_precision"),
        "views": identity.get("views", {}).get("count", 0),
        "mmkd_version": manifest.get("mmkd_version"),
        "created_at": manifest.get("created_at"),
    }
    pa.Table.from_pylist([row], schema=TEACHERS)  # a value of another kind is this manifest's fault alone
    return row
