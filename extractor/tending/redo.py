"""The commands that compute what a lake lacks: those that made it, as far as its manifests tell."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from typing import Any, get_args

from common.errors import MmkdError
from common.lake import open_lake
from common.models.load import read_catalog
from common.models.spec import ModelSpec
from common.storage import address_from
from extractor.config import StoredPrecision, ViewsConfig


def redo_commands(lake_uri: str, teachers: Iterable[str]) -> list[str]:
    """One command for all teachers that were extracted, or imported, in the same way.

    What changes no file (micro-batches, hardware, a model store) is left to the user.

    Args:
        lake_uri: The lake, as the user named it.
        teachers: Names of partitions.
    """
    lake = open_lake(lake_uri)
    place = shlex.quote(lake_uri)
    imported: list[str] = []
    extracted: dict[str, list[str]] = {}
    for teacher in teachers:
        manifest = _with_addresses(lake.read_teacher(teacher), lake_uri)
        identity, spec = manifest.get("fingerprint", {}), manifest.get("spec", {})
        if identity.get("family") == "imported":
            projected = " --projected" if "project" in identity.get("file", "") else ""
            precision = identity.get("stored_precision")
            rounded = f" --stored-precision {precision}" if precision in get_args(StoredPrecision)[1:] else ""
            imported.append(f"mmkd import mmkd-features DIR {place}{projected}{rounded}")
        else:
            way = " ".join(map(shlex.quote, _options(teacher, manifest)))
            extracted.setdefault(way, []).append(_reference(spec, manifest.get("catalog")) if spec else teacher)
    return [
        *dict.fromkeys(imported),
        *(
            f"mmkd extract {place} --teachers {shlex.quote(','.join(names))} {way}".rstrip()
            for way, names in extracted.items()
        ),
    ]


def _with_addresses(manifest: Mapping[str, Any], lake_uri: str) -> dict[str, Any]:
    """A manifest with the addresses that it gives relative to the lake in full."""
    found = dict(manifest)
    if found.get("catalog"):
        found["catalog"] = address_from(found["catalog"], lake_uri)
    if found.get("spec", {}).get("path"):
        found["spec"] = {**found["spec"], "path": address_from(found["spec"]["path"], lake_uri)}
    return found


def _options(teacher: str, manifest: Mapping[str, Any]) -> list[str]:
    """What a partition's files depend on beside the model."""
    identity, name = manifest.get("fingerprint", {}), manifest.get("spec", {}).get("name")
    options: list[str] = []
    if manifest.get("catalog"):
        options += ["--catalog", manifest["catalog"]]
    if name and teacher.startswith(f"{name}."):
        options += ["--teacher-version", teacher.removeprefix(f"{name}.")]
    for tower, other in (("image", "text"), ("text", "image")):
        if identity.get(f"{tower}_dim") and not identity.get(f"{other}_dim"):
            options += ["--towers", tower]
    usual = ViewsConfig().model_dump(mode="json")
    for key, value in identity.get("views", {}).items():
        if key == "count":
            options += ["--views", str(value)]
        elif value != usual.get(key):
            options += ["--set", f"views.{key}={value}"]
    if identity.get("stored_precision") in get_args(StoredPrecision)[1:]:
        options += ["--set", f"stored_precision={identity['stored_precision']}"]
    if "decode" in identity:
        options += ["--set", f"decode={identity['decode']}"]
    return options


def _reference(spec: Mapping[str, Any], own_catalog: str | None) -> str:
    """How ``--teachers`` names a model: ``NAME`` or ``NAME@RECIPE``, and ``=PLACE`` where the catalog has another."""
    try:
        catalog = read_catalog(own_catalog)
    except MmkdError:  # moved since; the extraction will say so
        catalog = read_catalog()
    known: dict[str, tuple[str, ModelSpec | None]] = {name: (name, entry) for name, entry in catalog.items()}
    for name, entry in catalog.items():
        known |= {f"{name}.{recipe}": (f"{name}@{recipe}", entry) for recipe in entry.recipes}
    name, entry = known.get(spec["name"], (spec["name"], None))
    path = spec.get("path")
    return f"{name}={path}" if path and (entry is None or entry.path != path) else name
