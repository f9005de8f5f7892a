"""The lake: one URI, the names of what lies in it, and the rules that keep it whole.

A lake holds ``lake.json``, ``teachers.parquet``, ``pairs/``, ``rejects/``, ``features/teacher=<name>/``,
``selection/<fingerprint>/``, ``runs/<run>/`` and ``scores/``. Shard k of every table holds the same samples in the same
order. The folders of tables hold Parquet files and nothing else, so that any reader opens a folder as it is: what
explains or accounts for tables lies in ``manifests/``.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from common.config import differing_keys
from common.errors import FingerprintError, LakeError, StorageError
from common.listing import FileMark, Place, list_marks
from common.schemas import PAIRS, SCHEMA_VERSION, check_table
from common.shard_files import locate, open_pack, shards_in
from common.shard_files import shard_name as shard_name  # the whole project knows it by this module
from common.storage import Storage, absolute_address

ID_RULE = "first 32 hex digits of sha256(source key, NUL, image sha256, NUL, captions joined by NUL)"
OWNER = "mmkd.ingest"
"""Key of a shard's file metadata that names the ingest it belongs to."""
READ_THREADS = 16
FEATURES, SELECTION_FOLDER = "features", "selection"
INGEST_REJECTS, EXTRACT_REJECTS = "rejects/ingest", "rejects/extract"
"""Without ``key=value`` in their names, which readers take for a column: ``rejects/`` opens as one table."""
TEACHER_MANIFESTS, SELECTION_MANIFESTS = "manifests/teachers", "manifests/selection"
PAIRS_LEDGER = "manifests/valid/pairs.json"
"""A cache: rows and hashes of the pairs, by their files' marks."""
JOB_FOLDER = "/runtime_resources/working_dir_files/"
"""Part of the path of every submitted job's working directory (Ray's runtime environments)."""


def now() -> str:
    """The present time as an ISO 8601 string in UTC; later times sort later."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds")


def teacher_manifest(teacher: str) -> str:
    """Path of what says what produced a teacher's embeddings, relative to the lake."""
    return f"{TEACHER_MANIFESTS}/{teacher}.json"


def teacher_ledger(teacher: str) -> str:
    """Path of a cache: a teacher's shards that were checked in full, by their files' marks."""
    return f"manifests/valid/teachers/{teacher}.json"


def selection_manifest(name: str) -> str:
    """Path of what says how a selection was made; written last, so a selection without it is unfinished."""
    return f"{SELECTION_MANIFESTS}/{name}.json"


def selection_chart(name: str) -> str:
    """Path of a selection's chart, relative to the lake."""
    return f"{SELECTION_MANIFESTS}/{name}.svg"


def run_name(what: str) -> str:
    """A name for a run that nobody else has: what it does, when it began, and chance."""
    return f"{what}-{now()[:19].replace(':', '').replace('T', '-')}-{os.urandom(2).hex()}"


@dataclass(frozen=True)
class Lake:
    """A lake at a URI. Construct with :func:`open_lake` or :func:`create_lake`, which check it."""

    uri: str

    @cached_property
    def storage(self) -> Storage:
        """The lake's folder."""
        return Storage(self.uri)

    def __getstate__(self) -> dict[str, Any]:
        return {"uri": self.uri}

    def info(self) -> dict[str, Any]:
        """The content of ``lake.json``."""
        return dict(self.storage.read_json("lake.json"))

    def shards(self, folder: str = "pairs") -> list[int]:
        """Indices of the shards of a table, ascending; pairs of an ingest that has not finished do not count."""
        present = self.files(folder)
        return self._of_finished_ingests(present) if folder == "pairs" else present

    def pair_marks(self) -> dict[int, FileMark]:
        """Shard -> mark of its pairs file, ascending; the shards are those of :meth:`shards`."""
        marks = {index: place.mark for index, place in locate(list_marks(self.storage, "pairs"), packed=False).items()}
        return {index: marks[index] for index in self._of_finished_ingests(list(marks))}

    def _of_finished_ingests(self, present: list[int]) -> list[int]:
        if not self.storage.list_folders("ingest"):
            return present
        finished: set[int] = set()
        for name in self.storage.list_files("ingests", ".json"):
            manifest = self.storage.read_json(f"ingests/{name}")
            first = int(manifest["first_shard"])
            finished.update(range(first, first + int(manifest["shards"])))
        # An unfinished ingest left shards that its next attempt may cut otherwise; embeddings must not build on them.
        # What was written by hand names no ingest, and stays.
        unsure = [index for index in present if index not in finished]
        with ThreadPoolExecutor(READ_THREADS) as pool:
            left = {index for index, is_left in zip(unsure, pool.map(self._is_left, unsure), strict=True) if is_left}
        return [index for index in present if index not in left]

    def captioned_shards(self) -> set[int]:
        """Shards of pairs that all have captions, as their ingests counted them: nobody need read the captions."""
        found: set[int] = set()
        for name in self.storage.list_files("ingests", ".json"):
            manifest = self.storage.read_json(f"ingests/{name}")
            if manifest.get("without_captions") == 0:
                first = int(manifest["first_shard"])
                found.update(range(first, first + int(manifest["shards"])))
        return found

    def _is_left(self, index: int) -> bool:
        """Whether a shard of pairs belongs to an ingest, going by its footer, or has gone meanwhile."""
        try:
            return OWNER in self.storage.read_metadata(f"pairs/{shard_name(index)}")[1]
        except FileNotFoundError:  # the ingest has cleared it away
            return True
        except StorageError as error:
            if isinstance(error.__cause__, pa.ArrowInvalid):  # no Parquet: whoever reads the shard says so
                return False
            raise

    def files(self, folder: str) -> list[int]:
        """Indices of the shards whose files are in a folder, whoever wrote them; packs of features are seen through."""
        packed = folder.startswith(f"{FEATURES}/")
        return sorted({index for name in self.storage.list_files(folder) for index in shards_in(name, packed)})

    def read_pairs(self, index: int, columns: list[str] | None = None) -> pa.Table:
        """Shard ``index`` of the pairs.

        Raises:
            SchemaError: The file's columns are not those of this version.
        """
        name = f"pairs/{shard_name(index)}"
        table = self.storage.read_table(name, columns)
        check_pairs_table(table, f"{self.uri}/{name}", columns)
        return table

    def features_folder(self, teacher: str) -> str:
        """Folder of a teacher's embeddings, relative to the lake."""
        return f"{FEATURES}/teacher={teacher}"

    def selection_folder(self, name: str) -> str:
        """Folder of a selection, relative to the lake."""
        return f"{SELECTION_FOLDER}/{name}"

    def partitions(self) -> list[str]:
        """Names of the teachers that have a folder of embeddings, sorted, whether or not a manifest explains it."""
        folders = self.storage.list_folders(FEATURES)
        return [folder.partition("=")[2] for folder in folders if folder.startswith("teacher=")]

    def recorded_teachers(self) -> list[str]:
        """Names of the teachers that have a manifest, sorted, whether or not their embeddings are still there."""
        return sorted(name.removesuffix(".json") for name in self.storage.list_files(TEACHER_MANIFESTS, ".json"))

    def teachers(self) -> list[str]:
        """Names of the teachers that have a manifest and embeddings, sorted.

        A manifest alone counts for nothing: to be rid of a teacher it is enough to delete its folder of embeddings.
        """
        present = set(self.partitions())
        return [name for name in self.recorded_teachers() if name in present] if present else []

    def selections(self) -> list[str]:
        """Names of the finished selections: those that have a manifest and a folder, sorted."""
        recorded = {name.removesuffix(".json") for name in self.storage.list_files(SELECTION_MANIFESTS, ".json")}
        return [name for name in self.storage.list_folders(SELECTION_FOLDER) if name in recorded] if recorded else []

    def read_teacher(self, teacher: str) -> dict[str, Any]:
        """What produced a teacher's embeddings: the content of its manifest.

        Raises:
            LakeError: The teacher has none here.
        """
        try:
            return dict(self.storage.read_json(teacher_manifest(teacher)))
        except FileNotFoundError as error:
            raise _not_there(self, teacher, self.teachers()) from error

    def read_features(self, teacher: str, index: int, columns: list[str] | None = None) -> pa.Table:
        """Shard ``index`` of a teacher's embeddings, from its own file or else from the pack that holds it.

        Raises:
            FileNotFoundError: Neither is there.
            LakeError: The pack is damaged.
        """
        folder = self.features_folder(teacher)
        try:
            return self.storage.read_table(f"{folder}/{shard_name(index)}", columns)
        except FileNotFoundError:
            place = self.feature_places(teacher).get(index)
            if place is None:
                raise
        if place.name == shard_name(index):  # the first look was at a listing from before the file was there
            return self.storage.read_table(f"{folder}/{place.name}", columns)
        return open_pack(self.storage, f"{folder}/{place.name}", place.mark).read(index, columns)

    def feature_places(self, teacher: str) -> dict[int, Place]:
        """Shard -> the file that holds a teacher's embeddings of it, ascending; one listing."""
        return locate(list_marks(self.storage, self.features_folder(teacher)))


def check_pairs_table(table: pa.Table, where: str, columns: list[str] | None = None) -> None:
    """Insist that a table of pairs has the columns that were asked for, by default those of every lake.

    Columns that an ingest kept are the user's: they come last, and only that lake knows them.

    Raises:
        SchemaError: It has not.
    """
    wanted = [column for column in (columns or PAIRS.names) if column in PAIRS.names]
    known = table.select([column for column in table.column_names if column in PAIRS.names])
    check_table(known, pa.schema([PAIRS.field(column) for column in wanted]), where)


def open_lake(uri: str, need_pairs: bool = True) -> Lake:
    """Open an existing lake.

    Raises:
        LakeError: There is none at this address, it is of another schema version, or it holds no pairs
            although ``need_pairs``.
    """
    lake = Lake(_lake_address(uri))
    try:
        info = lake.info()
    except FileNotFoundError as error:
        raise LakeError(
            f"There is no lake at {uri} (no lake.json there). "
            f"Create it with `mmkd ingest SOURCE {uri}`, or check the address."
        ) from error
    found = info.get("schema_version")
    if found != SCHEMA_VERSION:
        raise LakeError(
            f"The lake at {uri} was written with schema {found}; this program reads schema {SCHEMA_VERSION}. "
            "Use the mmkd version that wrote it (see CHANGELOG), or ingest again into a new lake."
        )
    if need_pairs and not lake.shards():
        raise LakeError(f"The lake at {uri} holds no pairs yet. Run `mmkd ingest SOURCE {uri}` first.")
    return lake


def _lake_address(uri: str) -> str:
    """The lake's full address: workers have working directories of their own.

    Raises:
        LakeError: A relative path in a submitted job, whose working directory is thrown away.
    """
    full = absolute_address(uri.rstrip("/"))
    if "://" not in full and not os.path.isabs(uri) and JOB_FOLDER in full:
        raise LakeError(
            f"{uri!r} is a relative path in a submitted job, which runs in a copy of the working directory that is "
            "thrown away. Name the lake by its full address, a path every machine sees or s3://bucket/lake."
        )
    return full


def create_lake(uri: str, shard_rows: int, kept_columns: Mapping[str, str] | None = None, settle: bool = False) -> Lake:
    """Open the lake at an address, creating ``lake.json`` when there is none.

    Args:
        uri: The address.
        shard_rows: Rows per shard.
        kept_columns: Name -> type of the columns that its pairs have beside those of every lake.
        settle: Let a lake without pairs, which only ingests that failed have seen, have these columns instead of those
            that it was begun with; for whoever holds the lease.

    Raises:
        LakeError: A lake with another shard size, other columns or another schema version is there already.
    """
    lake = Lake(_lake_address(uri))
    try:
        info = lake.info()
    except FileNotFoundError:
        from common.version import VERSION

        lake.storage.write_json(
            "lake.json",
            {
                "schema_version": SCHEMA_VERSION,
                "shard_rows": shard_rows,
                "id_rule": ID_RULE,
                "kept_columns": dict(kept_columns or {}),
                "created_by": f"mmkd {VERSION}",
                "created_at": now(),
            },
        )
        return lake
    open_lake(uri, need_pairs=False)
    if info.get("shard_rows") != shard_rows:
        raise LakeError(
            f"The lake at {uri} has shards of {info.get('shard_rows')} rows and this run asks for {shard_rows}. "
            f"Use --set shard_rows={info.get('shard_rows')}, or ingest into a new lake."
        )
    recorded = info.get("kept_columns", {})
    if recorded != dict(kept_columns or {}) and not lake.files("pairs"):
        if settle:
            lake.storage.write_json("lake.json", {**info, "kept_columns": dict(kept_columns or {})})
        return lake
    if recorded != dict(kept_columns or {}):
        # All shards have the same columns: otherwise no reader could open the folder.
        listing = " ".join(f"--keep-columns {name}:{kind}" for name, kind in recorded.items())
        raise LakeError(
            f"The lake at {uri} keeps the columns {recorded or 'of every lake only'}, and this ingest "
            f"{dict(kept_columns or {}) or 'no further ones'}. All ingests into a lake keep the same: "
            f"{f'say {listing}' if listing else 'leave --keep-columns out'}, or ingest into a new lake."
        )
    return lake


def check_partition(storage: Storage, manifest: str, identity: dict[str, Any], remedy: str) -> bool:
    """Insist that a partition, if it exists, was produced by what would produce it now.

    Args:
        storage: The lake.
        manifest: Path of the partition's JSON file, whose ``fingerprint`` entry is compared.
        identity: Everything that determines the partition's content.
        remedy: A sentence for the error: what the user can do.

    Returns:
        Whether the partition is there.

    Raises:
        FingerprintError: Another producer wrote the partition; names the differing keys.
    """
    try:
        recorded = storage.read_json(manifest)
    except FileNotFoundError:
        return False
    differing = differing_keys(recorded["fingerprint"], identity)
    if differing:
        listing = "; ".join(f"{key}: recorded {a!r}, now {b!r}" for key, (a, b) in differing.items())
        raise FingerprintError(
            f"{storage.uri}/{manifest} records another producer than the one asked for. Differing: {listing}. {remedy}"
        )
    return True


def claim_partition(
    storage: Storage,
    manifest: str,
    identity: dict[str, Any],
    remedy: str,
    extra: dict[str, Any] | None = None,
) -> None:
    """Record what produces a partition (and ``extra`` facts beside it), or insist that it is what is recorded.

    Raises:
        FingerprintError: Another producer wrote the partition; see :func:`check_partition`.
    """
    if not check_partition(storage, manifest, identity, remedy):
        storage.write_json(manifest, {"fingerprint": identity, **(extra or {}), "created_at": now()})


def check_same_samples(left: pa.Table, right: pa.Table, where: str) -> None:
    """Insist that two shards hold the same samples in the same order.

    Raises:
        LakeError: They do not; names the place.
    """
    if not left["sample_id"].equals(right["sample_id"]):
        raise LakeError(
            f"{where} does not hold the same samples in the same order as its pairs shard "
            f"({right.num_rows} rows against {left.num_rows}). The pairs were changed after extraction: "
            "extract into a fresh lake, or delete that partition and run extract again."
        )


def require_teachers(lake: Lake, names: Iterable[str] | None) -> list[str]:
    """The teachers to use: those asked for, or all that are there.

    Raises:
        LakeError: One of them has no embeddings in the lake, or there are none at all.
    """
    present = lake.teachers()
    chosen = list(names) if names else present
    if not chosen:
        raise LakeError(
            f"{lake.uri} holds no teacher embeddings yet. Run `mmkd extract {lake.uri} --teachers NAME,...` first."
        )
    for name in chosen:
        if name not in present:
            raise _not_there(lake, name, present)
    return chosen


def _not_there(lake: Lake, teacher: str, present: list[str]) -> LakeError:
    return LakeError(
        f"{lake.uri} has no embeddings of teacher {teacher!r} (it has: {', '.join(present) or 'none'}). "
        f"Run `mmkd extract {lake.uri} --teachers {teacher}` first."
    )
