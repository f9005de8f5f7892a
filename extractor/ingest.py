"""Ingest: any source becomes the pairs of a lake, in two steps that both pick up where they were killed.

1. *Stage.* Each part of the source is one task: read it, check every picture in a sandbox, and write staged files
   below ``ingest/<id>/``; the part's JSON comes last and means done.
2. *Commit.* The driver finds duplicates and contradictions (:mod:`extractor.duplicates`) and plans shards in source
   order; each shard is one task that copies staged rows and writes one file.
   ``ingests/<id>.json`` comes last and means that the ingest is part of the lake; then the staged files are removed.

``<id>`` is a fingerprint of the source files (name, size, and content or last change) and of the settings, so the same
ingest run again does nothing. Another source begins a new shard: shards that are there are never rewritten, because
embeddings may lie beside them. A lease lets one ingest at a time write to a lake; whoever comes second is told whose
turn it is.
"""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from common.config import fingerprint
from common.errors import SourceError
from common.lake import Lake, create_lake, now, open_lake, run_name
from common.lease import Lease, hold
from common.logs import Progress, duration, logger
from common.schemas import SCHEMA_VERSION
from common.storage import absolute_address, address_within
from common.storage_errors import without_secrets
from extractor.commit import Committed, commit, insist_on_lease, manifest_name, withdraw
from extractor.config import FetchConfig, IngestConfig
from extractor.duplicates import CONTRADICTS
from extractor.retrying import Retry, find_rejects, finish, finish_killed, note_read
from extractor.sources import plan_sources
from extractor.sources.addresses import identity_of
from extractor.sources.record import NOT_REACHABLE, Part
from extractor.staging import StagedPart, rejects_name, release_decoder, stage_part, staging_folder
from extractor.tasks import Workers

READ_THREADS = 16
LEASE = "ingest"
"""Name of the lease on a lake's pairs."""
HOW_ONLY = {"max_unreachable", "at_once", "per_host"}
"""Settings of fetching that change nothing in what is made."""
FEW_UNREACHABLE = 20
"""So many URLs that cannot be fetched never stop an ingest by themselves."""


@dataclass
class IngestReport:
    """What an ingest did; ``input = pairs + rejects + duplicates + merged + filtered``."""

    ingest_id: str
    input: int = 0
    pairs: int = 0
    rejects: int = 0
    duplicates: int = 0
    merged: int = 0
    """Rows whose labels were added to those of a pair with the same picture and captions."""
    filtered: int = 0
    retried: int = 0
    """Rows that were in the ledger of earlier ingests, and are in this one's account now."""
    without_captions: int = 0
    """Of the pairs."""
    straddling: int = 0
    """Groups in several splits, as their sources have it."""
    reasons: Counter[str] = field(default_factory=Counter)
    modalities: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    first_shard: int = 0
    shards: int = 0
    seconds: float = 0.0
    already_done: bool = False
    """Nothing was done: this very ingest is in the lake; the counts are those of then."""


def ingest(
    source: str | list[str],
    lake_uri: str,
    config: IngestConfig,
    session: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
    retry_rejects: bool = False,
) -> IngestReport:
    """Bring one or more sources into a lake, creating it if need be.

    Args:
        source: One or several addresses.
        lake_uri: The lake.
        config: How sources become pairs.
        session: Context in which Ray is initialised, entered when there is work for several processes; by default it
            must be already.
        retry_rejects: Read only those rows that earlier ingests rejected, see :mod:`extractor.retrying`.

    Raises:
        SourceError: A source is absent, lacks a column, gives not one usable pair, or names URLs of which more than
            the allowed share is not reachable.
        LakeError: The lake has another shard size, other kept columns, or another schema version.
        LeaseError: Another ingest is at work on the lake.
        StorageError: An address cannot be reached.
    """
    started = time.monotonic()
    sources = [source] if isinstance(source, str) else list(source)
    parts = plan_sources(sources, config)
    if not parts:
        raise SourceError(f"{', '.join(map(without_secrets, sources))} hold not one row. Check that they are complete.")
    identity = describe(parts, config)
    kept = kept_by_all(parts)
    if retry_rejects:
        open_lake(lake_uri, need_pairs=False)  # a mistyped address would be a new lake
    lake = create_lake(lake_uri, config.shard_rows, kept)
    is_unfinished = fingerprint(identity) in lake.storage.list_folders("ingest")
    earlier = None if retry_rejects or is_unfinished else find_earlier(lake, fingerprint(identity))
    if earlier is not None:
        return earlier
    with hold(lake.storage, LEASE, run_name("ingest"), config.lease_seconds) as lease:
        create_lake(lake_uri, config.shard_rows, kept, settle=True)
        finish_killed(lake)
        retry = find_rejects(lake, parts) if retry_rejects else None
        if retry is not None:
            parts, identity = retry.parts, {**identity, "retry": retry.identity}
            logger.info("ingest: %d rows of these sources are in the ledger, and are tried again", retry.rows.total())
        ingest_id = fingerprint(identity)
        if not parts:
            return IngestReport(ingest_id, already_done=True)
        earlier = find_earlier(lake, ingest_id)  # once more: another may have done it while this one waited
        if earlier is not None:
            return earlier
        report = _take_in(lake, ingest_id, parts, config, kept, sources, Workers(session), lease, retry)
        report.seconds = time.monotonic() - started
        # Relative to the lake where they lie in it, as the demo's: lakes are moved.
        where = [without_secrets(address_within(absolute_address(uri), lake_uri)) for uri in sources]
        record = {**vars(report), "sources": where, "fingerprint": identity}
        insist_on_lease(lake, lease)
        lake.storage.write_json(manifest_name(ingest_id), {**record, "created_at": now()})
        finish(lake, ingest_id)
    log_report(report)
    return report


def _take_in(
    lake: Lake,
    ingest_id: str,
    parts: list[Part],
    config: IngestConfig,
    kept: dict[str, str],
    sources: list[str],
    workers: Workers,
    lease: Lease,
    retry: Retry | None,
) -> IngestReport:
    """Stage and commit; only the manifest is missing then."""
    with workers:
        staged = stage(lake, ingest_id, parts, config, workers, lease, retry is not None)
        if retry is None:
            insist_on_pairs(lake, ingest_id, sources, staged)
            insist_on_reach(sources, staged, config.fetch)
            say_empty_columns(kept, staged)
        retried = 0 if retry is None else note_read(lake, ingest_id, staged, retry)
        try:
            committed = commit(lake, ingest_id, staged, config, kept, workers, lease)
        except SourceError:  # the mended source will be another
            withdraw(lake, ingest_id)
            raise
    report = summarise(ingest_id, staged, committed)
    report.retried = retried
    return report


def kept_by_all(parts: list[Part]) -> dict[str, str]:
    """Name -> type of the columns that are kept, the same for all parts.

    Raises:
        SourceError: Two files have different types for one.
    """
    first = parts[0] if parts else None
    for part in parts:
        if first is not None and part.kept != first.kept:
            name = next(name for name in part.kept if part.kept[name] != first.kept[name])
            raise SourceError(
                f"Column {name!r} is {first.kept[name]} in {without_secrets(first.uri)} and {part.kept[name]} in "
                f"{without_secrets(part.uri)}. Say which to keep with --keep-columns {name}:TYPE."
            )
    return dict(first.kept) if first is not None else {}


def describe(parts: list[Part], config: IngestConfig) -> dict[str, Any]:
    """Everything that determines what an ingest makes, as JSON-able values."""
    files = list(dict.fromkeys((part.kind, part.uri) for part in parts))
    with ThreadPoolExecutor(READ_THREADS) as pool:
        identities = list(pool.map(lambda file: [file[0], *identity_of(file[1])], files))
    return {
        "files": identities,
        # Staged files are named by part: a program that cuts otherwise must not go on with them.
        "parts": fingerprint([[part.name, part.begin, part.end] for part in parts]),
        "config": _settings_of(config),
        "schema_version": SCHEMA_VERSION,
    }


def _settings_of(config: IngestConfig) -> dict[str, Any]:
    """The settings that determine what an ingest makes; how many failures are borne is not among them.

    Those of fetching came later than lakes: by default they are left out, so that an earlier ingest is known again.
    """
    settings = config.model_dump(mode="json", exclude={"fetch", "lease_seconds"})
    fetch, usual = (one.model_dump(mode="json", exclude=HOW_ONLY) for one in (config.fetch, FetchConfig()))
    return settings if fetch == usual else {**settings, "fetch": fetch}


def find_earlier(lake: Lake, ingest_id: str) -> IngestReport | None:
    """The report of this very ingest if it is in the lake."""
    try:
        found = lake.storage.read_json(manifest_name(ingest_id))
    except FileNotFoundError:
        return None
    names = IngestReport.__dataclass_fields__
    report = IngestReport(**{name: value for name, value in found.items() if name in names})
    report.reasons, report.modalities, report.splits = map(Counter, (report.reasons, report.modalities, report.splits))
    report.already_done = True
    logger.info(
        "ingest: nothing to do, this source is in the lake since %s (%d pairs in %d shards). If pictures that it names "
        "changed since, run again with --set reread=1 (2 the next time): only rows that are new will be added.",
        *(found["created_at"], report.pairs, report.shards),
    )
    return report


def stage(
    lake: Lake,
    ingest_id: str,
    parts: list[Part],
    config: IngestConfig,
    workers: Workers,
    lease: Lease,
    is_retry: bool = False,
) -> list[StagedPart]:
    """Stage the parts that are not staged yet; returns what all parts hold, in order."""
    names = set(lake.storage.list_files(staging_folder(ingest_id), ".json"))
    there = [index for index in range(len(parts)) if StagedPart.file_name(index) in names]
    with ThreadPoolExecutor(READ_THREADS) as pool:
        found = pool.map(lambda index: StagedPart.load(lake, ingest_id, index), there)
        done = dict(zip(there, found, strict=True))
    # Those that an outage fell on are read anew. In a retry, most links may well be as dead as before.
    done = {index: part for index, part in done.items() if is_retry or not is_cut_off([part], config.fetch)}
    if done:
        logger.info("ingest: going on after %d of %d parts", len(done), len(parts))
    todo = [index for index in range(len(parts)) if index not in done]
    progress = Progress("ingest: reading and checking", len(parts), "parts")
    progress.advance(len(done))
    items = [{"index": index, "part": asdict(parts[index])} for index in todo]
    rows = sum(part.records for part in done.values())
    try:
        for number, answer in workers.run(items, _stage_item, lake, ingest_id, config, threads=True):
            insist_on_lease(lake, lease)
            part = done[todo[number]] = StagedPart.from_json(answer)
            rows += part.records
            progress.advance(1, f"{rows} rows")
    finally:
        release_decoder()  # in case this thread did it
    return [done[index] for index in range(len(parts))]


def _stage_item(item: dict[str, Any], lake: Lake, ingest_id: str, config: IngestConfig) -> Any:
    return vars(stage_part(lake, ingest_id, item["index"], Part.from_json(item["part"]), config))


def insist_on_pairs(lake: Lake, ingest_id: str, sources: list[str], staged: list[StagedPart]) -> None:
    """Refuse a source of which nothing is usable; its staged files are removed, so that a mended one is read anew.

    Raises:
        SourceError: Says what the rows were rejected for, with an example.
    """
    if any(part.rows for part in staged):
        return
    total, filtered = sum(part.records for part in staged), sum(part.filtered for part in staged)
    reasons = sum((part.reasons for part in staged), Counter[str]())
    example = ""
    for index, part in enumerate(staged):
        if part.rejected:
            row = lake.storage.read_table(rejects_name(ingest_id, index)).slice(0, 1).to_pylist()[0]
            example = f" The first: {row['source_key']}: {row['reason']} ({row['detail']})."
            break
    withdraw(lake, ingest_id)
    listing = ", ".join(f"{reason} {count}" for reason, count in reasons.most_common(5)) or "none"
    raise SourceError(
        f"{', '.join(map(without_secrets, sources))} gives not one usable pair: {total} rows read, {filtered} filtered "
        f"out, {sum(reasons.values())} rejected ({listing}).{example} Check the image paths (relative to the table's "
        "folder), the column names (--image-column, --caption-column), and the filters."
    )


def say_empty_columns(kept: dict[str, str], staged: list[StagedPart]) -> None:
    """Warn of columns to keep that no row has: in tars, only the rows show whether there is such a column."""
    seen = {name for part in staged for name in part.kept}
    if empty := [name for name in kept if name not in seen]:
        logger.warning(
            "ingest: no row has a value in %s, which --keep-columns names; is that how the source calls it?",
            ", ".join(map(repr, empty)),
        )


def is_cut_off(staged: list[StagedPart], config: FetchConfig) -> bool:
    """Whether a larger share of the rows is not reachable than may be."""
    rows = sum(part.records - part.filtered for part in staged)
    return _unreachable(staged).total() > config.max_unreachable * rows


def _unreachable(staged: list[StagedPart]) -> Counter[str]:
    reasons = sum((part.reasons for part in staged), Counter[str]())
    return Counter({reason: count for reason, count in reasons.items() if reason.startswith(NOT_REACHABLE)})


def insist_on_reach(sources: list[str], staged: list[StagedPart], config: FetchConfig) -> None:
    """Refuse to go on where hardly any URL could be fetched; what was read stays staged.

    Raises:
        SourceError: Says what became of the URLs, and how to go on.
    """
    found = _unreachable(staged)
    if found.total() <= FEW_UNREACHABLE or not is_cut_off(staged, config):
        return
    rows = sum(part.records - part.filtered for part in staged)
    listing = ", ".join(
        f"{reason.removeprefix(f'{NOT_REACHABLE}: ')} {count}" for reason, count in found.most_common(5)
    )
    raise SourceError(
        f"Of {rows} rows of {', '.join(map(without_secrets, sources))}, {found.total()} name pictures that are not "
        f"reachable ({listing}); fetch.max_unreachable allows {config.max_unreachable:.0%}. Check the network, and for "
        "signed links whether they have run out. What was read is kept: the same command reads only those parts anew "
        "in which more than this share failed; with --set fetch.max_unreachable=1 it goes on with what there is."
    )


def summarise(ingest_id: str, staged: list[StagedPart], committed: Committed) -> IngestReport:
    """Account for every input row."""
    counts = {name: value for name, value in vars(committed).items() if name != "contradictions"}
    report = IngestReport(ingest_id, **counts)
    report.input = sum(part.records for part in staged)
    report.rejects = sum(part.rejected for part in staged) + committed.contradictions.total()
    report.filtered = sum(part.filtered for part in staged)
    report.reasons = sum((part.reasons for part in staged), Counter[str]()) + committed.contradictions
    total = report.pairs + report.rejects + report.duplicates + report.merged + report.filtered
    assert report.input == total, f"{report.input} rows came in and {total} are accounted for: {report}"
    assert report.rejects == sum(report.reasons.values()), f"a reject has no reason: {report}"
    return report


def log_report(report: IngestReport) -> None:
    """Say what came of every input row."""
    logger.info(
        "ingest: %d rows in = %d pairs + %d rejects + %d duplicates%s + %d filtered; %d shards; %s (%.0f rows/s)",
        *(report.input, report.pairs, report.rejects, report.duplicates),
        *(f" + {report.merged} merged" if report.merged else "", report.filtered, report.shards),
        *(duration(report.seconds), report.input / max(report.seconds, 1e-9)),
    )
    for what, counts in (("rejects", report.reasons), ("modalities", report.modalities), ("splits", report.splits)):
        if counts:
            logger.info("ingest: %s: %s", what, ", ".join(f"{name} {count}" for name, count in counts.most_common(8)))
    if report.merged:
        logger.info(
            "ingest: %d rows had the picture and the captions of another, and further labels: it has them all now",
            report.merged,
        )
    if report.without_captions:
        logger.info(
            "ingest: %d pairs have no caption: image towers embed them and evaluation uses their labels; what needs a "
            "text passes over them",
            report.without_captions,
        )
    contradicting = sum(count for reason, count in report.reasons.items() if reason.startswith(CONTRADICTS))
    if contradicting:
        logger.warning(
            "ingest: %d rows have the picture and the captions of a pair and differ elsewhere; they are in rejects/, "
            "with what differs. Pairs that are in a lake never change: to give them other labels or splits, ingest "
            "into a new lake. --set contradictions=keep makes pairs of them beside the others.",
            contradicting,
        )
    if report.straddling:
        logger.warning(
            "ingest: %d groups are in several splits, because a source's own split column puts rows elsewhere than "
            "others of their group are",
            report.straddling,
        )
