"""Embeddings that others computed become partitions of a lake: MMKD-CLIP's published layout, one ``.pt`` file a pair.

The pairs come in through ingest, like any source's. Then each shard of pairs is one task that reads its pairs' files
and writes one file for every teacher, under the same rules as extract: whole files, a lease, a ledger of what could not
be used. A teacher that a pair's file does not hold was not consulted there by the authors; the row is null. Those that
are there may speak, which is written as a selection: a lake that was imported trains as it is.

The features are the authors' word: nobody can tell with which weights and preprocessing they were made. So they stay
apart from what ``mmkd extract`` computes, as ``NAME.imported`` or, for projected ones, ``NAME.projected``.
"""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from common.captions import captioned
from common.config import fingerprint
from common.errors import SourceError
from common.lake import (
    Lake,
    claim_partition,
    create_lake,
    open_lake,
    run_name,
    selection_manifest,
    shard_name,
)
from common.lease import hold_all
from common.logs import Progress, logger
from common.models.load import read_catalog
from common.models.spec import ModelSpec
from common.parquet_reading import single_chunk
from common.schemas import SCHEMA_VERSION, SELECTION, features_schema, vector_type
from common.storage import Storage, absolute_address
from common.teachers_table import refresh_teachers
from extractor.config import IngestConfig, StoredPrecision
from extractor.ingest import IngestReport, ingest
from extractor.partitions import claim_teacher, plan_todo
from extractor.prepare import fixed_rows
from extractor.sink import record_valid, survey_pairs, write_features
from extractor.sources.addresses import base_name, short_name
from extractor.sources.columns import kept_kinds
from extractor.sources.lines import open_lines
from extractor.sources.mmkd_features import KIND, parse_line, row_key
from extractor.tasks import Workers
from extractor.terms import check_terms

META = "meta.jsonl"
FILES = {"imported": "clips_output.pt", "projected": "clips_project_output.pt"}
"""What a partition's name ends in -> a pair's file: each teacher's own vectors, or all in one space of 512 dimensions
by the authors' linear maps, with lengths of 1.1 to 2.6."""
IMAGE, TEXT = "_img", "_txt"
"""Ends of the names in a pair's file: ``BiomedCLIP_img`` and ``BiomedCLIP_txt``, vectors of one dimension."""
CATALOG_NAMES = {  # the authors' name in a file -> the catalog's
    "BMCA": "bmca-clip",
    "BiomedCLIP": "biomedclip",
    "UniMedCLIP": "unimed-clip",
    "QuiltNet": "quiltnet-b-32",
    "GenMedClip": "genmedclip",
    "PLIP": "plip",
    "PMCCLIP": "pmc-clip",
    "PUBMEDCLIP": "pubmedclip",
    "MedCLIP": "medclip",
}
Version = Literal["imported", "projected"]
MAX_FILE_BYTES = 64 << 20
READ_THREADS = 16


@dataclass
class ImportReport:
    """What an import did."""

    ingested: IngestReport
    teachers: list[str]
    """Partitions."""
    shards: int = 0
    """Files written."""
    vectors: Counter[str] = field(default_factory=Counter)
    """Partition -> rows that have vectors, of the files written now."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Reason -> rows, over all teachers."""
    selection: str = ""
    """Fingerprint of the selection by which every teacher speaks where it has vectors."""


@dataclass(frozen=True)
class Imported:
    """One teacher of the layout."""

    key: str
    """Its name in the files."""
    dim: int
    version: Version = "imported"
    precision: StoredPrecision = "float16"
    """What its vectors are rounded to."""

    @property
    def partition(self) -> str:
        """Its name in the lake."""
        return f"{CATALOG_NAMES.get(self.key, self.key.lower())}.{self.version}"

    @property
    def identity(self) -> dict[str, Any]:
        """What determines its files."""
        return {
            "family": "imported",
            "layout": KIND,
            "name": self.key,
            "file": FILES[self.version],
            "image_dim": self.dim,
            "text_dim": self.dim,
            "normalised": "l2",
            "stored_precision": self.precision,
            "schema_version": SCHEMA_VERSION,
        }


def import_features(
    place: str,
    lake_uri: str,
    config: IngestConfig,
    accept_terms: tuple[str, ...] = (),
    version: Version = "imported",
    precision: StoredPrecision = "float16",
    session: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
) -> ImportReport:
    """Bring MMKD-CLIP's published pairs and features into a lake.

    Args:
        place: The folder with ``meta.jsonl`` and ``features/``, or another table in such a folder.
        lake_uri: The lake, created if need be.
        config: How pairs are read; its format is set here.
        accept_terms: Partitions whose models' conditions on students are accepted.
        version: Which of the two files of a pair.
        precision: What vectors are rounded to.
        session: As for :func:`extractor.ingest.ingest`.

    Raises:
        TermsError: Such conditions are not accepted; nothing was read then.
        SourceError: This is not that layout, or no pair is usable, or no features are beside the pairs.
        LakeError: The lake has another shard size, or its pairs were replaced.
        LeaseError: Another run is at work on one of the partitions.
        FingerprintError: A partition of that name has another origin.
    """
    table = find_table(place)
    teachers = [replace(found, precision=precision) for found in find_teachers(table, version)]
    catalog = read_catalog()
    specs = {teacher.partition: _spec_of(teacher, catalog) for teacher in teachers}
    created = create_lake(lake_uri, config.shard_rows, kept_kinds(config))
    accepted = check_terms(created, [spec for spec in specs.values() if spec is not None], accept_terms)
    with Workers(session) as workers:
        report = ImportReport(
            ingest(table, lake_uri, config.model_copy(update={"format": KIND}), workers.share),
            [teacher.partition for teacher in teachers],
        )
        _import_features(lake_uri, table, teachers, specs, accepted, report, workers)
    _say(report)
    return report


def _import_features(
    lake_uri: str,
    table: str,
    teachers: list[Imported],
    specs: dict[str, ModelSpec | None],
    accepted: Mapping[str, str],
    report: ImportReport,
    workers: Workers,
) -> None:
    lake = open_lake(lake_uri)
    identities = {teacher.partition: teacher.identity for teacher in teachers}
    run = run_name("import")
    with hold_all(lake.storage, [f"teacher={name}" for name in identities], run):
        todo, pairs = plan_todo(lake, identities)
        manifests = {}
        for teacher in teachers:
            name = teacher.partition
            facts = _facts(specs[name], accepted.get(name))
            remedy = f"Delete features/teacher={name} first."
            manifests[name] = claim_teacher(lake, name, teacher.identity, facts, remedy)
        refresh_teachers(lake, manifests)
        progress = Progress("import: features", len(todo), "shards")
        items = [{"shard": shard, "partitions": names} for shard, names in todo.items()]
        written: dict[str, dict[int, int]] = {}
        shards = list(todo)
        for number, answer in workers.run(items, _import_item, lake.uri, table, teachers, manifests):
            for partition, file in answer.items():
                written.setdefault(partition, {})[shards[number]] = file["bytes"]
                report.shards += 1
                report.vectors[partition] += file["vectors"]
                report.rejects.update(file["reasons"])
            progress.advance(1)
        for partition, files in written.items():
            record_valid(lake, partition, identities[partition], files, pairs)
        refresh_teachers(lake)
    report.selection = select_present(lake, identities)


def find_table(place: str) -> str:
    """The address of the table of pairs.

    Raises:
        SourceError: There is none.
    """
    if place.endswith(".jsonl"):
        found, where = Storage(place).is_file(), place
    else:
        where = f"{place.rstrip('/')}/{META}"
        found = Storage(place).exists(META)
    if not found:
        raise SourceError(
            f"There is no {where}. Expected the folder that MMKD-CLIP's authors distribute, with {META} and features/, "
            "or a .jsonl file in it."
        )
    return absolute_address(where)


def find_teachers(table: str, version: Version = "imported") -> list[Imported]:
    """The teachers that the features beside a table hold, with the widths of their vectors, by name.

    Lines are read until a pair of every name in ``available_clips`` has been looked at, so that all are found however
    rare.

    Raises:
        SourceError: No pair has features.
    """
    wanted: set[str] = set()
    dims: dict[str, int] = {}
    with open_lines(table) as lines:
        for _, line in lines:
            row = parse_line(line)
            named = {name for name in row.get("available_clips") or () if isinstance(name, str)}
            wanted |= named
            key = row_key(row)
            if key is None or (named and named <= dims.keys()):
                continue
            try:
                vectors = read_vectors(table, key, version)
            except FeatureFileError:
                continue  # its turn as a row comes later, and then it is a reject
            dims.update({name: len(image) for name, (image, _) in vectors.items() if name not in dims})
    if not dims:
        raise SourceError(
            f"Beside {table} no pair has features: expected files such as features/FOLDERID/ID/{FILES[version]} with "
            f"vectors called NAME{IMAGE} and NAME{TEXT}."
        )
    if wanted - dims.keys():
        listed = ", ".join(sorted(wanted - dims.keys()))
        logger.warning("import: no readable features of %s, which the table names", listed)
    return [Imported(name, dims[name], version) for name in sorted(dims)]


class FeatureFileError(Exception):
    """A pair's file cannot be used; ``reason`` is a short category, ``detail`` is about this one."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


def read_vectors(table: str, key: str, version: Version = "imported") -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Teacher -> picture's and caption's vector of a pair, float32 [D] each, as they are in its file.

    Args:
        table: The table's address.
        key: ``FOLDERID/ID``.
        version: Which of its files.

    Raises:
        FeatureFileError: The file is missing, torn, holds more than tensors, or not two vectors of one width a teacher.
    """
    import torch

    folder, _, _ = table.rpartition("/")
    name = f"features/{key}/{FILES[version]}"
    try:
        content = Storage(folder).read_bytes(name)
    except FileNotFoundError as error:
        raise FeatureFileError("features missing", f"no {name}") from error
    if len(content) > MAX_FILE_BYTES:
        raise FeatureFileError("features not readable", f"{name} has {len(content)} bytes")
    stream = io.BytesIO(content)
    try:
        found = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - torch raises whatever a damaged archive leads it into
        said = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        if "weights_only" in str(error):
            said = "it holds more than tensors, and reading that would run code from the file"
        raise FeatureFileError("features not readable", f"{name}: {said}") from error
    if not isinstance(found, dict):
        raise FeatureFileError("features not readable", f"{name} holds a {type(found).__name__}, not named vectors")
    names = sorted(str(entry).removesuffix(IMAGE) for entry in found if str(entry).endswith(IMAGE))
    vectors = {}
    for teacher in names:
        pair = [found.get(f"{teacher}{end}") for end in (IMAGE, TEXT)]
        if not all(isinstance(one, torch.Tensor) and one.is_floating_point() and one.dim() == 1 for one in pair):
            raise FeatureFileError("features not readable", f"{name}: {teacher} is not two vectors of one dimension")
        image, text = (np.array(one.float().numpy()) for one in pair if one is not None)
        if len(image) != len(text):
            raise FeatureFileError(
                "features not readable", f"{name}: {teacher} has {len(image)} and {len(text)} values"
            )
        vectors[teacher] = image, text
    return vectors


def _import_item(
    item: dict[str, Any], lake_uri: str, table: str, teachers: list[Imported], manifests: Mapping[str, dict[str, Any]]
) -> dict[str, Any]:
    wanted = [teacher for teacher in teachers if teacher.partition in item["partitions"]]
    return import_shard(Lake(lake_uri), item["shard"], table, wanted, manifests)


def import_shard(
    lake: Lake, shard: int, table: str, teachers: list[Imported], manifests: Mapping[str, Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Write the files of one shard for some teachers of one version; rows from other sources are null.

    Args:
        lake: The lake.
        shard: Which.
        table: The table's address.
        teachers: Those whose files are wanted.
        manifests: Partition -> content of its manifest.

    Returns:
        Partition -> ``bytes`` of its file, how many rows have ``vectors``, and ``reasons`` of those that were rejected.
    """
    pairs = lake.read_pairs(shard, ["sample_id", "captions", "source", "source_key"])
    prefix, source = f"{base_name(table)}/", short_name(table)
    # Where a whole folder was ingested, the table's own folder stands before its name.
    keys = [
        key.rpartition(prefix)[2] if origin == source and prefix in key else None
        for origin, key in zip(pairs["source"].to_pylist(), pairs["source_key"].to_pylist(), strict=True)
    ]

    def read(key: str | None) -> dict[str, tuple[np.ndarray, np.ndarray]] | FeatureFileError:
        try:
            return {} if key is None else read_vectors(table, key, teachers[0].version)
        except FeatureFileError as error:
            return error

    with ThreadPoolExecutor(READ_THREADS) as pool:
        rows = list(pool.map(read, keys))
    answer = {}
    for teacher in teachers:
        features, rejects = build_features(pairs, rows, teacher)
        size = write_features(lake, teacher.partition, shard, features, rejects, manifests[teacher.partition])
        vectors = features.num_rows - features["image_embedding"].null_count
        reasons = Counter(reason for _, reason, _ in rejects)
        answer[teacher.partition] = {"bytes": size, "vectors": vectors, "reasons": reasons}
    return answer


def build_features(
    pairs: pa.Table,
    rows: list[dict[str, tuple[np.ndarray, np.ndarray]] | FeatureFileError],
    teacher: Imported,
) -> tuple[pa.Table, list[tuple[str, str, str]]]:
    """One teacher's table of a shard, and what could not be used: sample id, reason, detail."""
    count, dim = pairs.num_rows, teacher.dim
    vectors = {side: np.zeros((count, dim), np.float32) for side in ("image", "text")}
    norms = {side: np.full(count, np.nan, np.float32) for side in vectors}
    rejects: list[tuple[str, str, str]] = []
    for row, (sample_id, found) in enumerate(zip(pairs["sample_id"].to_pylist(), rows, strict=True)):
        if isinstance(found, FeatureFileError):
            rejects.append((sample_id, found.reason, found.detail))
            continue
        if teacher.key not in found:
            continue
        lengths = [float(np.linalg.norm(vector)) for vector in found[teacher.key]]
        if len(found[teacher.key][0]) != dim:
            detail = f"{len(found[teacher.key][0])} values where the others of {teacher.key} have {dim}"
            rejects.append((sample_id, "features of another width", detail))
        elif not all(np.isfinite(length) and length > 0 for length in lengths):
            rejects.append((sample_id, "features not finite", f"lengths {lengths[0]} and {lengths[1]}"))
        else:
            for side, vector, length in zip(vectors, found[teacher.key], lengths, strict=True):
                vectors[side][row] = vector / length
                norms[side][row] = length
    rounded = {side: _rounded(values, teacher.precision) for side, values in vectors.items()}
    norms["text"][~captioned(pairs["captions"])] = np.nan  # of a text that the lake does not have
    absent = {side: np.isnan(lengths) for side, lengths in norms.items()}
    schema = features_schema(dim, dim)
    extra = [[None] * len(captions[1:]) for captions in pairs["captions"].to_pylist()]
    columns = {
        "sample_id": pairs["sample_id"].combine_chunks(),
        **{f"{side}_embedding": _masked(rounded[side], absent[side]) for side in vectors},
        **{f"{side}_norm": pa.array(norms[side], mask=absent[side]) for side in vectors},
        "extra_text_embeddings": pa.array(extra, schema.field("extra_text_embeddings").type),
    }
    return pa.table({name: columns[name] for name in schema.names}, schema=schema), rejects


def _rounded(vectors: np.ndarray, precision: StoredPrecision) -> np.ndarray:
    """As extract rounds them, which halves the file; float32."""
    import torch

    return torch.from_numpy(vectors).to(getattr(torch, precision)).float().numpy()


def _masked(vectors: np.ndarray, absent: np.ndarray) -> pa.FixedSizeListArray:
    flat = fixed_rows(vectors).flatten()
    return pa.FixedSizeListArray.from_arrays(flat, type=vector_type(vectors.shape[1]), mask=pa.array(absent))


def select_present(lake: Lake, identities: Mapping[str, dict[str, Any]]) -> str:
    """Write the selection by which every imported teacher speaks where it has vectors: the authors' own filter.

    Returns:
        Its fingerprint.
    """
    pairs = survey_pairs(lake)
    identity = {
        "config": {"policy": "as published", "teachers": sorted(identities)},
        "teachers": {name: fingerprint(identity) for name, identity in identities.items()},
        "shards": list(pairs.rows),
    }
    name = fingerprint(identity)
    manifest, folder = selection_manifest(name), lake.selection_folder(name)
    if name in lake.selections():
        return name
    lake.storage.remove(manifest)  # of a selection that was deleted: it must not vouch for half of a new one
    for shard in pairs.rows:
        modality = lake.read_pairs(shard, ["modality"])["modality"].combine_chunks()
        for teacher in identities:
            features = lake.read_features(teacher, shard, ["sample_id", "image_embedding", "text_embedding"])
            file = f"{folder}/teacher={teacher}/{shard_name(shard)}"
            lake.storage.write_table(file, _present_rows(features, modality))
    claim_partition(lake.storage, manifest, identity, "", {"teachers": sorted(identities), "summary": {}})
    return name


def _present_rows(features: pa.Table, modality: pa.Array) -> pa.Table:
    """A shard of the selection: matched cosines, nothing that would take other rows to say."""
    sides = [single_chunk(features[f"{side}_embedding"]) for side in ("image", "text")]
    # A row without a caption has no text vector, and stage 2 does not train on it.
    present = pc.and_(*(side.is_valid() for side in sides))
    image_ND, text_ND = (np.asarray(side.values.fill_null(0)).reshape(len(side), -1) for side in sides)
    cosines = np.einsum("nd,nd->n", image_ND, text_ND)
    columns = {
        **{field.name: pa.nulls(len(present), field.type) for field in SELECTION},
        "sample_id": features["sample_id"].combine_chunks(),
        "modality": modality,
        "cosine": pa.array(cosines, mask=~present.to_numpy(zero_copy_only=False)),
        "admitted": present,
    }
    return pa.table(columns, schema=SELECTION)


def _spec_of(teacher: Imported, catalog: Mapping[str, ModelSpec]) -> ModelSpec | None:
    """The model whose outputs these are, under the partition's name: its terms hold whoever ran it."""
    spec = catalog.get(CATALOG_NAMES.get(teacher.key, ""))
    return None if spec is None else spec.model_copy(update={"name": teacher.partition})


def _facts(spec: ModelSpec | None, accepted_at: str | None) -> dict[str, Any]:
    """What a manifest says beside the origin; the factor on its cosines is not published with the features."""
    facts: dict[str, Any] = {"logit_scale": None, "terms_accepted_at": accepted_at}
    for name in ("license", "gated", "derivatives", "derivative_terms"):
        facts[name] = None if spec is None else getattr(spec, name)
    return facts


def _say(report: ImportReport) -> None:
    for partition in report.teachers:
        logger.info("import: %s: %d pairs with vectors", partition, report.vectors[partition])
    logger.info(
        "import: %d files; rejects: %s; selection/%s lets each teacher speak where the authors list it",
        report.shards,
        dict(report.rejects) or "none",
        report.selection,
    )
