"""Where embeddings land: one whole file per teacher and shard, and the reckoning of which are there and valid."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from common.errors import LakeError
from common.lake import EXTRACT_REJECTS, Lake, shard_name
from common.listing import Place
from common.logs import logger
from common.schemas import REJECTS
from common.shard_files import CONTENT, SAMPLES, is_pack, origin_of
from extractor.tending.integrity import Expected, Fault, check_file, content_hash, samples_hash
from extractor.tending.ledger import Pairs, ValidShard, in_threads, read_valid, write_valid


def rejects_folder(teacher: str) -> str:
    """Folder of the rows a teacher could not embed, relative to the lake."""
    return f"{EXTRACT_REJECTS}/{teacher}"


def write_features(
    lake: Lake,
    teacher: str,
    index: int,
    features: pa.Table,
    rejects: list[tuple[str, str, str]],
    manifest: Mapping[str, Any],
) -> int:
    """Write one shard of one teacher: its rejects first, then the embeddings, whose presence means "done".

    Args:
        lake: The lake.
        teacher: Name of the partition.
        index: The shard.
        features: Its embeddings.
        rejects: Sample id, reason and detail of each row that could not be embedded.
        manifest: Content of the partition's manifest, read once: it is not looked at here.

    Returns:
        Bytes written.
    """
    name = f"{rejects_folder(teacher)}/{shard_name(index)}"
    if rejects:
        lake.storage.write_table(name, _rejects_table(teacher, rejects))
    else:
        lake.storage.remove(name)  # of an earlier attempt that failed where this one did not
    return write_single(lake, teacher, index, features, manifest)


def write_single(lake: Lake, teacher: str, index: int, features: pa.Table, manifest: Mapping[str, Any]) -> int:
    """Write one shard's embeddings as a file of its own, with whose they are and its hashes in the footer.

    Returns:
        Bytes written.
    """
    metadata = {
        **origin_of(teacher, manifest),
        SAMPLES: samples_hash(features["sample_id"]),
        CONTENT: content_hash(features),
    }
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


def survey_pairs(lake: Lake) -> Pairs:
    """The pairs' shards with their rows and marks: one listing, and a look into the files that are new since the last.

    Raises:
        LakeError: A pairs file cannot be read.
    """
    pairs = Pairs(lake)
    pairs.require()
    pairs.save()
    return pairs


def find_valid(lake: Lake, teacher: str, identity: dict[str, Any], pairs: Pairs | None = None) -> set[int]:
    """Shards of a teacher that need not be computed again.

    A shard counts when its file was checked in full (:func:`extractor.tending.integrity.check_file`), now or by an
    earlier run whose ledger still names the file and its pairs by their present marks. A single file that does not
    count is computed again, with a line in the log.

    Args:
        lake: The lake.
        teacher: Name of the partition.
        identity: Its producer, as its manifest records it.
        pairs: From :func:`survey_pairs`, where several teachers are looked at.

    Raises:
        LakeError: The pairs were replaced beneath existing embeddings, or a pack is damaged.
    """
    pairs = pairs or survey_pairs(lake)
    places = lake.feature_places(teacher)
    _refuse_orphans(lake, teacher, places, pairs.marks)
    known = read_valid(lake, teacher, identity)
    good = {index for index, place in places.items() if known.get(index) == ValidShard(*place, pairs.marks[index])}
    faults = check_places(lake, teacher, {i: p for i, p in places.items() if i not in good}, pairs, identity)
    good.update(index for index, fault in faults.items() if fault is None)
    pairs.save()
    if faults or known.keys() - places.keys():
        write_valid(lake, teacher, identity, good, places, pairs)
    for index, fault in faults.items():
        if fault is not None:
            _refuse_or_tell(lake, teacher, places[index], fault)
    return good


def record_valid(
    lake: Lake, teacher: str, identity: dict[str, Any], written: Mapping[int, int], pairs: Pairs | None = None
) -> None:
    """Put the files that a run wrote itself into the ledger, so that the next run need not read them.

    Args:
        lake: The lake.
        teacher: Name of the partition.
        identity: Its producer.
        written: Shard -> bytes, as :func:`write_features` returned them.
        pairs: As they were when the run began.
    """
    pairs = pairs or survey_pairs(lake)
    places = lake.feature_places(teacher)
    known = read_valid(lake, teacher, identity)
    good = {
        index
        for index, place in places.items()
        if index in pairs.marks
        and (place.mark.size == written.get(index) or known.get(index) == ValidShard(*place, pairs.marks[index]))
    }
    write_valid(lake, teacher, identity, good, places, pairs)


def check_places(
    lake: Lake, teacher: str, places: Mapping[int, Place], pairs: Pairs, identity: dict[str, Any]
) -> dict[int, Fault | None]:
    """Check shards in full, many files at a time; a file that is gone meanwhile is left out.

    Returns:
        Shard -> what is wrong with it, or None.
    """
    expected = pairs.expected(places)
    files: dict[Place, dict[int, Expected]] = {}
    for index, place in places.items():
        files.setdefault(place, {})[index] = expected[index]
    folder = lake.features_folder(teacher)

    def check(item: tuple[Place, dict[int, Expected]]) -> dict[int, Fault | None]:
        try:
            return check_file(lake.storage, folder, *item, identity)
        except FileNotFoundError:
            return {}

    return {index: fault for found in in_threads(check, files.items()) for index, fault in found.items()}


def _refuse_or_tell(lake: Lake, teacher: str, place: Place, fault: Fault) -> None:
    where = f"{lake.uri}/{lake.features_folder(teacher)}/{place.name}"
    if fault.other_samples:
        raise LakeError(
            f"{where} is whole, but {fault.sentence}. The pairs were replaced after extraction, or the file was moved; "
            f"nothing was computed. Put the pairs back, or remove such files with `mmkd verify {lake.uri} --repair` "
            "and extract again."
        )
    if is_pack(place.name):
        raise LakeError(
            f"{where} is a pack of shards and damaged: {fault.sentence}. Run `mmkd verify {lake.uri} --repair`, which "
            "takes its good shards out of it; extract then computes only the others."
        )
    logger.warning("%s will be computed again: %s", where, fault.sentence)


def _refuse_orphans(lake: Lake, teacher: str, shards: Iterable[int], known: Iterable[int]) -> None:
    orphans = sorted(set(shards) - set(known))
    if orphans:
        raise LakeError(
            f"{lake.uri}/{lake.features_folder(teacher)} has shards {orphans[:5]} that the pairs do not have. "
            "The pairs were replaced after extraction; delete that folder and run extract again."
        )
