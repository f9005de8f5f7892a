"""Where embeddings land: one whole file per teacher and shard, and the reckoning of which are there and valid."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa

from common.config import fingerprint
from common.errors import LakeError, SchemaError, StorageError
from common.lake import Lake, shard_name
from common.logs import logger
from common.schemas import REJECTS, SCHEMA_VERSION

# Listing is one request; footers are one small read each, so many at a time.
FOOTER_THREADS = 16


def rejects_folder(teacher: str) -> str:
    """Folder of the rows a teacher could not embed, relative to the lake."""
    return f"rejects/stage=extract/teacher={teacher}"


def write_features(
    lake: Lake,
    teacher: str,
    index: int,
    features: pa.Table,
    rejects: list[tuple[str, str, str]],
    identity: dict[str, Any],
) -> int:
    """Write one shard of one teacher: its rejects first, then the embeddings, whose presence means "done".

    Returns:
        Bytes written.
    """
    name = f"{rejects_folder(teacher)}/{shard_name(index)}"
    if rejects:
        lake.storage.write_table(name, _rejects_table(teacher, rejects))
    else:
        lake.storage.remove(name)  # of an earlier attempt that failed where this one did not
    metadata = {"mmkd.fingerprint": fingerprint(identity), "mmkd.schema_version": str(SCHEMA_VERSION)}
    return lake.storage.write_table(f"{lake.features_folder(teacher)}/{shard_name(index)}", features, metadata)


def _rejects_table(teacher: str, rejects: list[tuple[str, str, str]]) -> pa.Table:
    rows = [
        {
            "sample_id": sample_id,
            "source": "lake",
            "source_key": sample_id,
            "stage": f"extract:{teacher}",
            "reason": reason,
            "detail": detail,
            "sha256": None,
        }
        for sample_id, reason, detail in rejects
    ]
    return pa.Table.from_pylist(rows, schema=REJECTS)


def pair_rows(lake: Lake) -> dict[int, int]:
    """Shard -> number of pairs, from the files' footers."""
    shards = lake.shards()
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        counts = pool.map(lambda index: lake.storage.read_metadata(f"pairs/{shard_name(index)}")[0], shards)
        return dict(zip(shards, counts, strict=True))


def valid_shards(lake: Lake, teacher: str, rows: dict[int, int], identity: dict[str, Any]) -> set[int]:
    """Shards of a teacher that need not be computed again.

    A file counts when it opens, has as many rows as its pairs and carries the fingerprint; any other is
    computed again, with a line in the log.
    """
    folder, wanted = lake.features_folder(teacher), fingerprint(identity)

    def is_valid(index: int) -> bool:
        name = f"{folder}/{shard_name(index)}"
        try:
            found, metadata = lake.storage.read_metadata(name)
        except (StorageError, SchemaError) as error:
            logger.warning("%s is not readable and will be computed again: %s", name, error)
            return False
        if found != rows[index] or metadata.get("mmkd.fingerprint") != wanted:
            logger.warning(
                "%s has %d rows (pairs: %d) or another fingerprint; computed again", name, found, rows[index]
            )
            return False
        return True

    present = [index for index in lake.shards(folder) if index in rows]
    with ThreadPoolExecutor(FOOTER_THREADS) as pool:
        return {index for index, good in zip(present, pool.map(is_valid, present), strict=True) if good}


def check_no_orphans(lake: Lake, teachers: Iterable[str], rows: dict[int, int]) -> None:
    """Insist that no teacher has shards the pairs do not.

    Raises:
        LakeError: The pairs were ingested anew beneath existing embeddings.
    """
    for teacher in teachers:
        orphans = [index for index in lake.shards(lake.features_folder(teacher)) if index not in rows]
        if orphans:
            raise LakeError(
                f"{lake.uri}/{lake.features_folder(teacher)} has shards {orphans[:5]} that the pairs do not have. "
                "The pairs were replaced after extraction; delete that folder and run extract again."
            )
