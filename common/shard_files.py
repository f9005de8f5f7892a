"""Files that hold shards of embeddings: one shard each, or several side by side in a pack, a row group for each.

``shard-000012.parquet`` holds shard 12. ``shards-000000-000063.parquet`` holds shards 0 to 63; its footer carries what
the single files' footers said. Both are read here by asking the storage for exactly the bytes that are needed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa

from common.config import fingerprint
from common.errors import LakeError
from common.listing import FileMark, Place
from common.parquet_reading import read_columns, read_footer
from common.schemas import SCHEMA_VERSION
from common.storage import Storage
from common.version import VERSION

FINGERPRINT, SAMPLES, CONTENT, PACK = "mmkd.fingerprint", "mmkd.samples", "mmkd.content", "mmkd.pack"
"""Keys of a footer: the producer; hashes of the sample ids and of everything; a pack's facts about its shards. Those
that say whose the embeddings are come from :func:`origin_of`."""
UNREADABLE = (OSError, ValueError, TypeError, pa.ArrowException, MemoryError)
"""What reading raises for bytes that are not the Parquet, or the JSON in its footer, that they claim to be."""
OPEN_FILES = 512
"""Footers of packs that a process keeps; some 100 KB each."""
_SINGLE = re.compile(r"^shard-(\d{6})\.parquet$")
_PACK = re.compile(r"^shards-(\d{6})-(\d{6})\.parquet$")


def shard_name(index: int) -> str:
    """File name of shard ``index``, the same in every table."""
    return f"shard-{index:06d}.parquet"


def pack_name(first: int, last: int) -> str:
    """File name of the pack of shards ``first`` to ``last``, both included."""
    return f"shards-{first:06d}-{last:06d}.parquet"


def shards_in(name: str, packed: bool = True) -> range:
    """The shards a file holds, by its name; none for other files, and for packs unless ``packed``."""
    single, pack = _SINGLE.match(name), _PACK.match(name) if packed else None
    if single:
        return range(int(single.group(1)), int(single.group(1)) + 1)
    return range(int(pack.group(1)), int(pack.group(2)) + 1) if pack else range(0)


def is_pack(name: str) -> bool:
    """Whether a file's name is a pack's."""
    return _PACK.match(name) is not None


def origin_of(teacher: str, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What the footer of a file says of where its embeddings come from; what is not known is left out.

    ``mmkd.fingerprint`` is the producer's and ``mmkd.schema_version`` the columns'. For people: ``mmkd.teacher`` (name
    of the partition), ``mmkd.image_dim``, ``mmkd.text_dim``, ``mmkd.weights_sha256``, ``mmkd.license`` (of the
    weights), ``mmkd.derivatives`` and ``mmkd.derivative_terms`` (whether a model may be trained on these embeddings),
    ``mmkd.version`` (of the mmkd that wrote the file) and ``mmkd.created_at`` (when the partition was begun, not the
    file: one that is written again is the same byte for byte).

    Args:
        teacher: Name of the partition.
        manifest: Content of its manifest.
    """
    identity = manifest["fingerprint"]
    facts = {
        "mmkd.teacher": teacher,
        **{f"mmkd.{key}": identity.get(key) for key in ("image_dim", "text_dim", "weights_sha256")},
        **{f"mmkd.{key}": manifest.get(key) for key in ("license", "derivatives", "derivative_terms", "created_at")},
        "mmkd.version": VERSION,
    }
    said = {key: str(value) for key, value in facts.items() if value is not None}
    return {FINGERPRINT: fingerprint(identity), "mmkd.schema_version": str(SCHEMA_VERSION), **said}


def locate(marks: dict[str, FileMark], packed: bool = True) -> dict[int, Place]:
    """Shard -> the file that counts for it, ascending: its own if there is one, else the widest pack with it."""
    places: dict[int, Place] = {}
    for name in sorted(marks, key=lambda name: len(shards_in(name, packed))):
        for index in shards_in(name, packed):
            if index not in places or is_pack(places[index].name):
                places[index] = Place(name, marks[name])
    return dict(sorted(places.items()))


class DamagedFileError(LakeError):
    """A file's bytes are not what was written.

    Attributes:
        what: What is wrong, without where and what to do.
    """

    def __init__(self, storage: Storage, relative: str, what: str) -> None:
        super().__init__(
            f"{storage.uri}/{relative} is damaged: {what}. "
            f"Run `mmkd verify {storage.uri} --repair`, then extract again."
        )
        self.what = what

    def __reduce__(self) -> tuple[type[LakeError], tuple[str]]:
        return LakeError, (str(self),)  # what a worker's exception becomes on its way to the driver


class ShardFacts(NamedTuple):
    """What a footer says of one shard; the hashes are None in files from before they were kept."""

    shard: int
    rows: int
    samples: str | None
    content: str | None


class ShardFile:
    """An opened file of embeddings: its footer is parsed, its columns are not read.

    Attributes:
        name: File name.
        fingerprint: Of the producer; None if the file does not say.
        facts: Shard -> what the footer says of it.
    """

    def __init__(self, storage: Storage, relative: str, size: int) -> None:
        self.storage, self.relative, self.size = storage, relative, size
        self.name = relative.rsplit("/", 1)[-1]
        self.shards = shards_in(self.name)
        try:
            self.footer = read_footer(storage, relative, size)
            said = {key.decode(): value.decode() for key, value in (self.footer.metadata or {}).items()}
            self.fingerprint = said.get(FINGERPRINT)
            self.facts = self._facts(said)
        except FileNotFoundError:
            raise
        except UNREADABLE as error:
            what = f"it does not open as Parquet ({_first_line(error)})"
            raise DamagedFileError(storage, relative, what) from error

    def _facts(self, said: dict[str, str]) -> dict[int, ShardFacts]:
        if not is_pack(self.name):
            only = ShardFacts(self.shards[0], self.footer.num_rows, said.get(SAMPLES), said.get(CONTENT))
            return {only.shard: only}
        facts = [ShardFacts(**item) for item in json.loads(said.get(PACK, "[]"))]
        groups = [self.footer.row_group(group).num_rows for group in range(self.footer.num_row_groups)]
        if [fact.shard for fact in facts] != list(self.shards) or [fact.rows for fact in facts] != groups:
            raise ValueError("its row groups are not the shards of its name")
        return {fact.shard: fact for fact in facts}

    def read(self, index: int, columns: list[str] | None = None) -> pa.Table:
        """One shard; of a pack, only that shard's bytes are fetched.

        Raises:
            LakeError: The bytes are damaged.
            StorageError: They cannot be reached.
        """
        groups = [self.shards.index(index)] if is_pack(self.name) else None
        try:
            return read_columns(self.storage, self.relative, self.size, columns, groups, self.footer)
        except FileNotFoundError:
            raise
        except UNREADABLE as error:
            what = f"shard {index} does not read ({_first_line(error)})"
            raise DamagedFileError(self.storage, self.relative, what) from error


@lru_cache(OPEN_FILES)
def open_pack(storage: Storage, relative: str, mark: FileMark) -> ShardFile:
    """Open a pack, or give the one this process has opened already while its mark is the same.

    Raises:
        LakeError: The file is damaged.
    """
    return ShardFile(storage, relative, mark.size)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
