"""From a name to a model: look the name up, describe its files, load its tokenizer or its weights.

To add a family, write one module with ``describe``, ``load`` and ``load_tokenizer`` and add a line to FAMILIES.
"""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import Any

from common.config import parse_config, read_yaml
from common.errors import ConfigError, ModelError
from common.models.dual_encoder import DualEncoder, Tokenize
from common.models.spec import ModelDescription, ModelSpec
from common.storage import Storage, absolute_address

FAMILIES = {  # family -> module with describe(spec), load(spec) and load_tokenizer(spec)
    "open_clip": "common.models.open_clip",
    "unimed": "common.models.unimed",
    "hf_clip": "common.models.hf_clip",
    "pmc_clip": "common.models.pmc_clip",
    "medclip": "common.models.medclip",
    "timm_image": "common.models.timm_image",
}

CATALOG_FOLDER = Path(__file__).parent / "catalog"
SOURCES = ("hub_id", "path", "pretrained", "source")
"""What an overriding entry replaces as a whole: a model lies in one place."""


def read_catalog(extra: str | None = None) -> dict[str, ModelSpec]:
    """All known models by name: the packaged catalog, then a user's YAML.

    An entry of the user's under a known name changes the fields it states and keeps the others; one that says where the
    model lies replaces all that the packaged entry says about that. Relative paths are relative to the YAML file.

    Args:
        extra: A local YAML file of the same form: ``name: {family: ..., hub_id: ...}``.

    Raises:
        ConfigError: An entry is not valid.
    """
    known: dict[str, dict[str, Any]] = {}
    for file in sorted(CATALOG_FOLDER.glob("*.yaml")):
        known.update(_entries(str(file)))
    mine = {} if extra is None else _entries(extra)
    for name, values in mine.items():
        known[name] = _merged(known.get(name, {}), _with_full_paths(values, Path(str(extra)).absolute().parent))
    return {
        name: parse_config(
            ModelSpec, {"name": name, **values}, f"model {name} in {extra if name in mine else 'the packaged catalog'}"
        )
        for name, values in known.items()
    }


def _entries(file: str) -> dict[str, dict[str, Any]]:
    entries = read_yaml(file)
    for name, values in entries.items():
        if not isinstance(values, dict):
            raise ConfigError(f"{file}: the entry {name!r} is not a mapping of settings such as family and hub_id.")
    return {str(name): values for name, values in entries.items()}


def _merged(base: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    if any(key in values for key in SOURCES):
        base = {key: value for key, value in base.items() if key not in (*SOURCES, "revision", "needs")}
    return {**base, **values}


def _with_full_paths(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Paths in full: workers have working directories of their own."""
    found = dict(values)
    path = found.get("path")
    if isinstance(path, str):
        found["path"] = path if "://" in path else str(folder / path)
    architecture = found.get("architecture")
    if isinstance(architecture, str) and architecture.endswith(".json"):
        found["architecture"] = str(folder / architecture)
    tokenizer = found.get("recipe", {}).get("tokenizer") if isinstance(found.get("recipe"), dict) else None
    if isinstance(tokenizer, str) and "://" not in tokenizer and (folder / tokenizer).is_dir():
        found["recipe"] = {**found["recipe"], "tokenizer": str(folder / tokenizer)}
    return found


def find_spec(reference: str, catalog: dict[str, ModelSpec], store: str | None = None) -> ModelSpec:
    """Resolve what a user typed: a catalog name, or ``[NAME=]PLACE``; ``NAME@RECIPE`` chooses a rival recipe.

    A place is a model folder (one with ``open_clip_config.json`` is open_clip's, one with ``config.json`` is
    transformers'), a checkpoint file of a model in the catalog (``NAME=FILE``, or a file under its published name),
    ``hf-hub:ORG/REPO`` (an open_clip repository) or ``open_clip:ARCHITECTURE/TAG`` (built in).

    Args:
        reference: What the user typed.
        catalog: The known models, from :func:`read_catalog`.
        store: A store of fetched models; a name that is there is loaded from there.

    Raises:
        ModelError: No such entry (lists those that exist), no such recipe, or one that no loader serves.
    """
    head, mark, place = reference.partition("=")
    if "/" in head:  # an address, in which the sign stands for nothing
        head, mark, place = "", "=", reference
    name, at, recipe = head.partition("@")
    if not mark and name not in catalog and Path(name).is_file():
        name, mark, place = "", "=", reference
    spec = _placed(name, place, catalog) if mark else _named(name, catalog, store)
    if spec.needs is not None:
        raise ModelError(f"Model {spec.name!r} cannot be loaded by mmkd: {spec.needs}")
    if at and recipe not in spec.recipes:
        known = ", ".join(f"{spec.name}@{other}" for other in spec.recipes) or "none"
        raise ModelError(f"Model {spec.name!r} has no recipe {recipe!r}. Rival recipes: {known}.")
    return spec.with_recipe(recipe) if at else spec


def _named(name: str, catalog: dict[str, ModelSpec], store: str | None) -> ModelSpec:
    from common.models.store import stored_folder, stored_spec

    stored = stored_folder(store, name) if store else None
    if name in catalog:
        return catalog[name].at(stored) if stored and catalog[name].needs is None else catalog[name]
    if stored:
        return stored_spec(stored)
    raise ModelError(
        f"Unknown model {name!r}. Known: {', '.join(sorted(catalog)) or 'none'}. "
        "Give one of these, NAME=FOLDER, NAME=hf-hub:ORG/REPO, NAME=open_clip:ARCHITECTURE/TAG, or add an entry in "
        "a YAML file passed with --catalog."
    )


def _placed(name: str, place: str, catalog: dict[str, ModelSpec]) -> ModelSpec:
    """A model in a place the user names; under a name of the catalog it is that model, with all its facts."""
    scheme, _, rest = place.partition(":")
    where = f"model {name or place!r}"
    if scheme == "hf-hub":
        return parse_config(ModelSpec, {"name": name or _plain_name(place), "hub_id": rest}, where)
    if scheme == "open_clip":
        architecture, _, tag = rest.partition("/")
        built_in = {"name": name or _plain_name(rest), "architecture": architecture, "pretrained": tag or None}
        return parse_config(ModelSpec, built_in, where)
    if not place:
        raise ModelError(f"{name}= names no place. Give a folder or file: {name}=FOLDER.")
    address = absolute_address(place)  # workers have working directories of their own
    # A name such as pytorch_model.bin, under which several are published, tells nothing.
    published = [spec for spec in catalog.values() if place.rsplit("/", 1)[-1] in spec.source.files]
    if name in catalog:
        return catalog[name].at(address)
    if not name and len(published) == 1:
        return published[0].at(address)
    if Storage(address).is_file():
        raise ModelError(
            f"{place} is a single file, whose architecture it does not tell. Say which model it is, NAME={place} with "
            f"one of {', '.join(sorted(catalog))}, or describe it in a YAML file passed with --catalog."
        )
    from common.models.files import family_of_folder

    values = {"name": name or _plain_name(place), "family": family_of_folder(address), "path": address}
    return parse_config(ModelSpec, values, where)


def _plain_name(path: str) -> str:
    """A name for the command line and for folders, from the last part of an address."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-._")


def family_module(spec: ModelSpec) -> Any:
    """The module that loads an entry's family.

    Raises:
        ModelError: No loader goes by that name.
    """
    if spec.family not in FAMILIES:
        raise ModelError(
            f"Model {spec.name!r} names family {spec.family!r}, which has no loader. Known: {', '.join(FAMILIES)}."
        )
    return importlib.import_module(FAMILIES[spec.family])


def describe_model(spec: ModelSpec) -> ModelDescription:
    """Read what a model's files say and hash its weights, without loading them.

    Raises:
        ModelError: The files are missing or not as the family expects.
    """
    description: ModelDescription = family_module(spec).describe(spec)
    return description


def load_model(model: ModelSpec | str, catalog: dict[str, ModelSpec] | None = None) -> DualEncoder:
    """Load a model on the CPU in eval mode, strictly: no missing and no unexpected tensors, the expected architecture.

    Args:
        model: An entry, or what one would type: a name, ``NAME=FILE``, a folder, a file under its published name
            (``MMKD_B16.pth``).
        catalog: The known models; None reads the packaged catalog.

    Raises:
        ModelError: The checkpoint does not fit the architecture.
    """
    spec = find_spec(model, read_catalog() if catalog is None else catalog) if isinstance(model, str) else model
    encoder: DualEncoder = family_module(spec).load(spec)
    return encoder


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """Load only the tokenizer, for CPU workers that prepare batches."""
    tokenize: Tokenize = family_module(spec).load_tokenizer(spec)
    return tokenize
