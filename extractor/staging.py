"""The first half of ingest: one part of a source becomes staged files, its pictures checked in a sandbox."""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from common.kept_columns import kept_schema
from common.lake import Lake
from common.sandbox import SandboxedDecoder
from common.schemas import REJECTS
from common.seeding import seed_of
from common.storage_errors import without_secrets
from extractor.config import IngestConfig
from extractor.sources import read_part
from extractor.sources.addresses import short_name
from extractor.sources.record import Part, Record
from extractor.tasks import insist_on_going

DIGEST_BYTES = 16
INDEX = pa.schema(
    [
        pa.field("mmkd_pair", pa.binary(DIGEST_BYTES), nullable=False),
        pa.field("mmkd_row", pa.binary(DIGEST_BYTES), nullable=False),
        pa.field("mmkd_group", pa.uint64(), nullable=False),
        pa.field("mmkd_id", pa.uint64(), nullable=False),
        pa.field("mmkd_split", pa.string()),
    ]
)
"""What tells rows apart without a picture or a text: digests of (picture, captions) and of every column that is kept,
hashes of the group and of the user's id (0 for none), and the split that the source gave."""
FILE_ROWS = 1024
FILE_BYTES = 64 << 20
"""A staged file is closed at either, so that a tar of any size passes through bounded memory."""
MAX_DETAIL_CHARS = 500
ROW = "mmkd_place"
"""Column of staged files with a row's place in its source, from 1."""
_OF_THREAD = threading.local()


@dataclass
class StagedPart:
    """What a part became; its JSON is written last and means that the part is done."""

    rows: list[int] = field(default_factory=list)
    """Rows of each staged file, in order."""
    rejected: int = 0
    filtered: int = 0
    kept: list[str] = field(default_factory=list)
    """The columns to keep of which some row has a value."""
    reasons: Counter[str] = field(default_factory=Counter)

    @property
    def records(self) -> int:
        """Rows of the source that were read."""
        return sum(self.rows) + self.rejected + self.filtered

    @staticmethod
    def file_name(part: int) -> str:
        """Base name of the JSON of a part."""
        return f"part-{part:06d}.json"

    @classmethod
    def load(cls, lake: Lake, ingest_id: str, part: int) -> StagedPart:
        """What a part holds that was staged before."""
        return cls.from_json(lake.storage.read_json(f"{staging_folder(ingest_id)}/{cls.file_name(part)}"))

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> StagedPart:
        """The inverse of ``vars``, also after a journey through JSON."""
        return cls(**{**value, "reasons": Counter(value["reasons"])})


def staging_folder(ingest_id: str) -> str:
    """Where an unfinished ingest keeps its files, relative to the lake."""
    return f"ingest/{ingest_id}"


def staged_name(ingest_id: str, part: int, file: int) -> str:
    """Name of a staged file of pairs, relative to the lake."""
    return f"{staging_folder(ingest_id)}/part-{part:06d}-{file:04d}.parquet"


def rejects_name(ingest_id: str, part: int) -> str:
    """Name of a part's staged rejects, relative to the lake; absent if there are none."""
    return f"{staging_folder(ingest_id)}/part-{part:06d}.rejects.parquet"


def staged_schema(kept: Mapping[str, str]) -> pa.Schema:
    """Pairs, the place of each in its source, and what tells rows apart."""
    return pa.schema([*kept_schema(kept), pa.field(ROW, pa.int64()), *INDEX])


def stage_part(lake: Lake, ingest_id: str, index: int, part: Part, config: IngestConfig) -> StagedPart:
    """Read one part, check its pictures, and write its staged files; the same input gives the same files.

    Raises:
        StorageError: The source or the lake cannot be reached.
    """
    done = StagedPart()
    schema = staged_schema(part.kept)
    seen = 0
    pairs: list[dict[str, Any]] = []
    rejects: list[dict[str, Any]] = []
    size = 0

    def flush() -> None:
        nonlocal size
        table = pa.Table.from_pylist(pairs, schema=schema)
        lake.storage.write_table(staged_name(ingest_id, index, len(done.rows)), table)
        done.rows.append(table.num_rows)
        pairs.clear()
        size = 0

    decoder = _decoder_of_thread(config)
    for record in read_part(part, config):
        insist_on_going()
        seen += 1
        if record.filtered:
            done.filtered += 1
            continue
        row, is_pair = judge(record, part, config, decoder)
        if is_pair:
            pairs.append(row)
            done.kept += [name for name in part.kept if name not in done.kept and row[name] is not None]
            size += len(row["image"])
            if len(pairs) >= FILE_ROWS or size >= FILE_BYTES:
                flush()
        else:
            rejects.append(row)
            done.reasons[row["reason"]] += 1
    if pairs:
        flush()
    if rejects:
        lake.storage.write_table(rejects_name(ingest_id, index), pa.Table.from_pylist(rejects, schema=REJECTS))
    done.rejected = len(rejects)
    assert done.records == seen, f"{seen} records were read, {done.records} are accounted for"
    lake.storage.write_json(f"{staging_folder(ingest_id)}/{done.file_name(index)}", vars(done))
    return done


def _decoder_of_thread(config: IngestConfig) -> SandboxedDecoder:
    """The decoder of this thread's last part if that had the same limits: a child process takes a while to start."""
    limits = config.limits
    settings = (limits.max_pixels, limits.max_seconds, limits.max_memory_mib, config.max_side, config.min_contrast)
    kept: tuple[object, SandboxedDecoder] | None = getattr(_OF_THREAD, "decoder", None)
    if kept is not None and kept[0] == settings:
        return kept[1]
    release_decoder()
    decoder = SandboxedDecoder(*settings)
    _OF_THREAD.decoder = settings, decoder
    return decoder


def release_decoder() -> None:
    """End the child process of this thread's decoder; it would end with the thread."""
    kept: tuple[object, SandboxedDecoder] | None = getattr(_OF_THREAD, "decoder", None)
    if kept is not None:
        kept[1].close()
        del _OF_THREAD.decoder


def judge(record: Record, part: Part, config: IngestConfig, decoder: SandboxedDecoder) -> tuple[dict[str, Any], bool]:
    """A record as a row of a staged file (second value true) or of ``REJECTS`` (false)."""
    source = short_name(part.uri)
    sha256 = hashlib.sha256(record.image).hexdigest() if record.image else None
    reason, detail = record.reason, record.detail
    if reason is None:
        verdict = decoder.check(record.image)
        reason, detail = verdict.reason, verdict.detail
        if verdict.ok and verdict.contrast < config.min_contrast:
            reason = "blank picture"
            detail = f"its 8-bit values differ by {verdict.contrast} at most; min_contrast is {config.min_contrast}"
    if reason is not None or sha256 is None:
        rejected = reject_row(source, record.source_key, record.source_id, record.row, str(reason), detail, sha256)
        return rejected, False
    described = {
        "captions": list(record.captions),
        "modality": record.modality,
        "labels": list(record.labels),
        "dataset": record.dataset,
        "group_id": record.group_id,
        "source_id": record.source_id,
        "license": record.license,
    }
    return {
        **described,
        **record.kept,
        "sample_id": sample_id(record.source_key, sha256, record.captions),
        "image": verdict.reencoded or record.image,
        "source": source,
        "source_key": record.source_key,
        "width": verdict.width,
        "height": verdict.height,
        "sha256": sha256,
        "split": record.split or split_of(group_key(record.group_id) if record.group_id else sha256, config),
        ROW: record.row,
        "mmkd_pair": content_digest(sha256, record.captions),
        "mmkd_row": digest_of([sha256, record.split, described, record.kept]),
        "mmkd_group": hash_of(record.group_id),
        "mmkd_id": hash_of(record.source_id),
        "mmkd_split": record.split,
    }, True


def reject_row(
    source: str,
    source_key: str,
    source_id: str | None,
    row: int | None,
    reason: str,
    detail: str,
    sha256: str | None,
) -> dict[str, Any]:
    """A row of ``REJECTS`` that ingest writes."""
    return {
        "sample_id": None,
        "source": source,
        "source_key": source_key,
        "source_id": source_id,
        "row": row,
        "stage": "ingest",
        "reason": reason,
        "detail": without_secrets(detail)[:MAX_DETAIL_CHARS],
        "sha256": sha256,
    }


def sample_id(source_key: str, sha256: str, captions: Iterable[str]) -> str:
    """A sample's name by ``common.lake.ID_RULE``."""
    return hashlib.sha256("\0".join((source_key, sha256, *captions)).encode()).hexdigest()[:32]


def another_id(name: str, row_digest: bytes) -> str:
    """The name of a sample that is alike to another by the rule, and kept all the same."""
    return hashlib.sha256(name.encode() + b"\0" + row_digest).hexdigest()[:32]


def content_digest(sha256: str, captions: tuple[str, ...]) -> bytes:
    """Equal exactly for the same image bytes with the same captions."""
    return hashlib.sha256("\0".join((sha256, *captions)).encode()).digest()[:DIGEST_BYTES]


def digest_of(values: Any) -> bytes:
    """Equal exactly for equal values: JSON-able ones, dates and times."""
    text = json.dumps(values, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode()).digest()[:DIGEST_BYTES]


def hash_of(name: str | None) -> int:
    """Never 0 for a name, and 0 for none."""
    return 0 if name is None else seed_of("name", name) or 1


def group_key(group_id: str) -> str:
    """What a group's split is drawn by."""
    return f"group {group_id}"


def split_of(key: str, config: IngestConfig) -> str:
    """The split of a picture whose source names none: by its group or, having none, by its content.

    So neither a group nor copies of a picture straddle splits.
    """
    draw = seed_of("split", key) / 2**64  # a generator for one number would take longer than everything else here
    if draw < config.test_fraction:
        return "test"
    return "val" if draw < config.test_fraction + config.val_fraction else "train"
