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
from common.storage import absolute_address

FAMILIES = {  # family -> module with describe(spec), load(spec) and load_tokenizer(spec)
    "open_clip": "common.models.open_clip",
    "hf_clip": "common.models.hf_clip",
}

CATALOG_FOLDER = Path(__file__).parent / "catalog"


def read_catalog(extra: str | None = None) -> dict[str, ModelSpec]:
    """All known models by name: the packaged catalog, then a user's YAML, which may override entries.

    Args:
        extra: A local YAML file of the same form: ``name: {family: ..., hub_id: ...}``.

    Raises:
        ConfigError: An entry is not valid.
    """
    entries: dict[str, ModelSpec] = {}
    files = sorted(str(path) for path in CATALOG_FOLDER.glob("*.yaml")) + ([extra] if extra else [])
    for file in files:
        for name, values in read_yaml(file).items():
            if not isinstance(values, dict):
                raise ConfigError(f"{file}: the entry {name!r} is not a mapping of settings such as family and hub_id.")
            entries[str(name)] = parse_config(ModelSpec, {"name": str(name), **values}, f"model {name} in {file}")
    return entries


def find_spec(reference: str, catalog: dict[str, ModelSpec]) -> ModelSpec:
    """Resolve what a user typed: a catalog name, or ``[NAME=]PLACE``.

    A place is a model folder (one with ``open_clip_config.json`` is open_clip's, one with ``config.json`` is
    transformers'), ``hf-hub:ORG/REPO`` (an open_clip repository) or ``open_clip:ARCHITECTURE/TAG`` (built in).

    Raises:
        ModelError: No such entry; lists those that exist.
    """
    if reference in catalog:
        return catalog[reference]
    name, mark, path = reference.partition("=")
    if not mark and ("/" in reference or "://" in reference):
        path = reference
        name = _plain_name(path)
    if not path:
        raise ModelError(
            f"Unknown model {reference!r}. Known: {', '.join(sorted(catalog)) or 'none'}. "
            "Give one of these, NAME=FOLDER, NAME=hf-hub:ORG/REPO, NAME=open_clip:ARCHITECTURE/TAG, or add an entry in "
            "a YAML file passed with --catalog."
        )
    scheme, _, rest = path.partition(":")
    if scheme == "hf-hub":
        return parse_config(ModelSpec, {"name": name, "hub_id": rest}, f"model {reference!r}")
    if scheme == "open_clip":
        architecture, _, tag = rest.partition("/")
        built_in = {"name": name, "architecture": architecture, "pretrained": tag or None}
        return parse_config(ModelSpec, built_in, f"model {reference!r}")
    from common.models.files import family_of_folder

    path = absolute_address(path)  # workers have working directories of their own
    values: dict[str, Any] = {"name": name, "family": family_of_folder(path), "path": path}
    return parse_config(ModelSpec, values, f"model {reference!r}")


def _plain_name(path: str) -> str:
    """A name for the command line and for folders, from the last part of an address."""
    return re.sub(r"[^a-z0-9._-]+", "-", path.rstrip("/").rsplit("/", 1)[-1].lower()).strip("-._")


def _family(spec: ModelSpec) -> Any:
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
    description: ModelDescription = _family(spec).describe(spec)
    return description


def load_model(spec: ModelSpec) -> DualEncoder:
    """Load a model on the CPU in eval mode, strictly: no missing and no unexpected tensors.

    Raises:
        ModelError: The checkpoint does not fit the architecture.
    """
    model: DualEncoder = _family(spec).load(spec)
    return model


def load_tokenizer(spec: ModelSpec) -> Tokenize:
    """Load only the tokenizer, for CPU workers that prepare batches."""
    tokenize: Tokenize = _family(spec).load_tokenizer(spec)
    return tokenize
