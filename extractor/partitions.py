"""Which teachers a run has, what determines their files, and which files are missing."""

from __future__ import annotations

from collections import Counter
from typing import Any

from common.errors import ConfigError, FingerprintError
from common.lake import Lake, check_partition, claim_partition, teacher_manifest
from common.models.load import describe_model, find_spec, read_catalog
from common.models.spec import ModelSpec
from common.schemas import SCHEMA_VERSION
from common.storage import absolute_address, address_within
from common.version import VERSION
from extractor.config import ExtractConfig
from extractor.prepare import TeacherInput, restrict
from extractor.sink import find_valid, survey_pairs
from extractor.tending.ledger import Pairs

Todo = dict[int, tuple[str, ...]]
"""Shard -> names of the teachers that still lack it."""


def find_teachers(config: ExtractConfig) -> list[ModelSpec]:
    """Look the teachers up, before anything is read or loaded.

    Raises:
        ConfigError: None is named, or one twice.
        ModelError: One is unknown.
    """
    if not config.teachers:
        raise ConfigError("No teacher was named. Give --teachers NAME,NAME (see `mmkd teachers list`).")
    catalog = read_catalog(config.catalog)
    specs = [find_spec(reference, catalog, config.store) for reference in config.teachers]
    repeated = [name for name, count in Counter(spec.name for spec in specs).items() if count > 1]
    if repeated:
        raise ConfigError(f"Teacher {repeated[0]!r} is named twice. Give each folder its own name: NAME=FOLDER.")
    return specs


def describe_inputs(specs: list[ModelSpec], config: ExtractConfig) -> dict[str, TeacherInput]:
    """Name of the partition -> the teacher that fills it, reduced to the towers that are asked for.

    Raises:
        ConfigError: A teacher has nothing of what is asked for, or a placement is of a teacher that is none of them.
    """
    names = [f"{spec.name}.{config.teacher_version}" if config.teacher_version else spec.name for spec in specs]
    strange = sorted(set(config.hardware.teachers) - set(names))
    if strange:
        raise ConfigError(
            f"hardware.teachers places {', '.join(strange)}, and no teacher of this run has that name (there are: "
            f"{', '.join(sorted(names))}). Correct the name, or leave it out of hardware.teachers."
        )
    inputs = {}
    for name, spec in zip(names, specs, strict=True):
        description = restrict(describe_model(spec), config.towers)
        if description.image_dim is None and description.text_dim is None:
            raise ConfigError(
                f"Teacher {spec.name!r} has no {config.towers} tower. Leave it out, or use --towers both."
            )
        inputs[name] = TeacherInput(spec, description, name, config.stored_precision)
    return inputs


def identity_of(teacher: TeacherInput, config: ExtractConfig) -> dict[str, Any]:
    """Everything that determines a teacher's files, as recorded in its manifest."""
    identity = {
        **teacher.description.identity(),
        "normalised": "l2",
        "stored_precision": config.stored_precision,
        "schema_version": SCHEMA_VERSION,
    }
    # Named only where they are not the default, so that what was extracted before they existed stays valid.
    if config.views.count and teacher.description.image_dim:
        identity["views"] = config.views.model_dump(mode="json")
    if config.decode != "exact" and teacher.description.image_dim:
        identity["decode"] = config.decode
    return identity


def check_partitions(lake: Lake, identities: dict[str, dict[str, Any]]) -> set[str]:
    """Insist that what is there was produced by what would produce it now.

    Returns:
        The teachers that have a partition.

    Raises:
        FingerprintError: Something else produced a partition; names the differing keys.
    """
    present = set(lake.partitions())
    return {
        name
        for name, identity in identities.items()
        if name in present and check_partition(lake.storage, teacher_manifest(name), identity, _remedy(name))
    }


def plan_todo(lake: Lake, identities: dict[str, dict[str, Any]]) -> tuple[Todo, Pairs]:
    """What is missing, and what there is to embed.

    Raises:
        FingerprintError: Something else produced a partition.
        LakeError: The pairs were replaced beneath existing embeddings.
    """
    pairs = survey_pairs(lake)
    present = check_partitions(lake, identities)
    missing: dict[int, list[str]] = {}
    for name, identity in identities.items():
        done = find_valid(lake, name, identity, pairs) if name in present else set()
        for index in pairs.rows:
            if index not in done:
                missing.setdefault(index, []).append(name)
    return {index: tuple(missing[index]) for index in sorted(missing)}, pairs


def record_teacher(
    lake: Lake,
    teacher: TeacherInput,
    identity: dict[str, Any],
    logit_scale: float | None,
    accepted_at: str | None,
    catalog: str | None = None,
) -> dict[str, Any]:
    """Write the manifest of a partition before its first shard; ``catalog`` is the user's own, if there is one.

    Returns:
        The manifest.
    """
    spec = teacher.spec
    facts: dict[str, Any] = {
        "logit_scale": logit_scale,
        "license": spec.license,
        "gated": spec.gated,
        "derivatives": spec.derivatives,
        "derivative_terms": spec.derivative_terms,
        "terms_accepted_at": accepted_at,
        "spec": _movable(spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True), lake),
    }
    if catalog:
        facts["catalog"] = address_within(absolute_address(catalog), lake.uri)
    recorded = claim_teacher(lake, teacher.name, identity, facts)
    if accepted_at and not recorded.get("terms_accepted_at"):  # a partition from before the terms were known
        recorded |= facts
        lake.storage.write_json(teacher_manifest(teacher.name), recorded)
    return recorded


def claim_teacher(
    lake: Lake, name: str, identity: dict[str, Any], facts: dict[str, Any], remedy: str | None = None
) -> dict[str, Any]:
    """Record what produces a teacher's files, or insist that it is what is recorded of those that are there.

    Args:
        lake: The lake.
        name: The partition's.
        identity: Its producer.
        facts: What else its manifest says.
        remedy: A sentence for the error; None: what extract says.

    Returns:
        The manifest.

    Raises:
        FingerprintError: Another producer wrote files that are there.
    """
    manifest, remedy = teacher_manifest(name), remedy or _remedy(name)
    try:
        check_partition(lake.storage, manifest, identity, remedy)
    except FingerprintError:
        if name in lake.partitions():
            raise
        lake.storage.remove(manifest)  # its files were deleted: there is nothing to mix with
    claim_partition(lake.storage, manifest, identity, remedy, {**facts, "mmkd_version": VERSION})
    return lake.read_teacher(name)


def _movable(value: Any, lake: Lake) -> Any:
    """The same with every address of something inside the lake relative to it, for lakes are moved and copied."""
    if isinstance(value, dict):
        return {key: _movable(entry, lake) for key, entry in value.items()}
    is_address = isinstance(value, str) and ("://" in value or value.startswith("/"))
    return address_within(value, lake.uri) if is_address else value


def _remedy(name: str) -> str:
    return (
        "Nothing was mixed. Keep both with --teacher-version VERSION, extract under another name (NAME=FOLDER), or "
        f"delete features/teacher={name} first."
    )
