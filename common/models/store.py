"""The model store: teachers' files in one folder or bucket, as safetensors, so that workers never need the hub.

``<store>/<name>/`` holds the weights, configuration and tokenizer and, written last, ``teacher.json``: where they came
from, under which terms, and the size and sha256 of each file, which are compared on every load.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import fingerprint, parse_config
from common.errors import ModelError, UntrustedError
from common.lake import now
from common.logs import Progress, logger
from common.models.architectures import ARCHITECTURE, TEXT_CONFIG, model_architecture, text_tower
from common.models.download import downloads_folder, gather
from common.models.files import (
    CHECKPOINT_SUFFIXES,
    CONFIG_FILES,
    INDEX,
    STORE_MANIFEST,
    TOKENIZER_FILES,
    ModelFiles,
    checkpoint_files,
    file_sha256,
    find_weights,
    hub_patterns,
    hub_snapshot,
    read_model_json,
    tokenizer_folder,
)
from common.models.load import family_module
from common.models.spec import ModelSpec
from common.storage import Storage, absolute_address, without_secrets
from common.version import VERSION

OPEN_CLIP_CONFIG = "open_clip_config.json"


@dataclass(frozen=True)
class FetchPlan:
    """What to fetch: an entry, and where from if not from the hub."""

    spec: ModelSpec
    source: str | None = None
    """A file, a folder or an address of the user's; None: the hub repository of the entry."""
    tokenizer: str | None = None
    """A folder with the tokenizer's files; None: beside the weights, else the repository the entry names."""
    trust: bool = False
    """Convert checkpoints that hold more than tensors."""


def stored_folder(store: str, name: str) -> str | None:
    """Address of a model's folder in a store; None if it has not been fetched to the end."""
    folder = Storage(absolute_address(store.rstrip("/"))).child(name)
    return folder.uri if folder.exists(STORE_MANIFEST) else None


def stored_spec(folder: str) -> ModelSpec:
    """The entry under which a stored model was fetched, placed in the store."""
    manifest = Storage(folder).read_json(STORE_MANIFEST)
    return parse_config(ModelSpec, {**manifest["spec"], "path": folder}, f"model {manifest['name']} in {folder}")


def fetch(plan: FetchPlan, store: str) -> str:
    """Bring a model into a store. What is there already, from the same source, is left as it is.

    Args:
        plan: What, and where from.
        store: A local folder or any fsspec address.

    Returns:
        The address of the model's folder.

    Raises:
        ModelError: It cannot be fetched, is torn, is not what the entry pins, or holds more than tensors.
    """
    spec = plan.spec
    if spec.needs is not None:
        raise ModelError(f"Model {spec.name!r} cannot be loaded by mmkd: {spec.needs}")
    target = Storage(absolute_address(store.rstrip("/"))).child(spec.name)
    came_from = _came_from(plan)
    if target.exists(STORE_MANIFEST):
        recorded = target.read_json(STORE_MANIFEST)
        if recorded["source"]["asked"] == came_from["asked"]:
            logger.info("fetch: %s is in the store already (%s)", spec.name, target.uri)
            return target.uri
        raise ModelError(
            f"{target.uri} holds {spec.name} from {recorded['source']['asked']}, and {came_from['asked']} was asked "
            "for. Delete that folder first, or fetch into another store."
        )
    folder, resolved = _gather(plan)
    files = _clean_files(plan, folder)
    described = [(name, file, facts) for name, (file, facts) in sorted(files.items())]
    progress = Progress(f"fetch {spec.name}", sum(facts["bytes"] for _, _, facts in described) >> 20, "MB")
    for name, file, facts in described:
        target.upload(file, name)
        progress.advance(facts["bytes"] >> 20, name)
    manifest = {
        "name": spec.name,
        "title": spec.title,
        "family": spec.family,
        "source": {**came_from, **resolved},
        "files": {name: facts for name, _, facts in described},
        "license": spec.license,
        "gated": spec.gated,
        "derivatives": spec.derivatives,
        "derivative_terms": spec.derivative_terms,
        "spec": _plain(spec.model_dump(mode="json", exclude_none=True, exclude={"path"}, exclude_defaults=True)),
        "created_by": f"mmkd {VERSION}",
        "created_at": now(),
    }
    target.write_json(STORE_MANIFEST, manifest)
    logger.info("fetch: %s is in the store (%d files, %s)", spec.name, len(described), target.uri)
    return target.uri


def _plain(value: Any) -> Any:
    """A JSON value whose strings have lost the secrets of the addresses in them."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return without_secrets(value) if isinstance(value, str) else value


def _came_from(plan: FetchPlan) -> dict[str, Any]:
    """Where a plan's files come from, without secrets; ``asked`` is what a second fetch is compared by."""
    spec = plan.spec
    if plan.source is not None:
        place = without_secrets(plan.source if "://" in plan.source else str(Path(plan.source).absolute()))
        return {"asked": place}
    if spec.path is not None:
        return {"asked": without_secrets(spec.path)}
    return {"asked": f"hub:{spec.hub_id}@{spec.revision or 'main'}"}


def _gather(plan: FetchPlan) -> tuple[Path, dict[str, Any]]:
    """A local folder with the upstream files, and what became known about their origin."""
    spec, source = plan.spec, plan.source or plan.spec.path
    if source is not None:
        return gather(spec, source), {}
    if spec.hub_id is None:
        raise ModelError(
            f"Model {spec.name!r} is not on the model hub. Download {' and '.join(spec.source.files) or 'its files'} "
            f"from {spec.source.url} by hand and run `mmkd teachers fetch {spec.name} --store URI "
            f"--from {spec.name}=FILE`."
        )
    folder = hub_snapshot(spec.hub_id, hub_patterns(spec), spec.revision, spec.source.repo_type)
    # The hub library keeps each snapshot in a folder named by its commit.
    return folder, {"hub_id": spec.hub_id, "revision": folder.name}


def _clean_files(plan: FetchPlan, place: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name in the store -> local file and its facts; every checkpoint has become safetensors.

    Raises:
        ModelError: A file is missing, torn, not the pinned one, or holds more than tensors and is not trusted.
    """
    spec, single = plan.spec, place.is_file()
    folder = place.parent if single else place
    kept = [] if single else [name for name in CONFIG_FILES if (folder / name).is_file()]
    found = {name: _facts(folder / name) for name in kept}
    found.update({name: _facts(file) for name, file in _tokenizer_files(plan, folder).items()})
    weights = [place] if single else _weights(spec, folder)
    found.update({name: _facts(file) for name, file in _architecture_files(spec, folder, found.keys()).items()})
    for file in weights:
        for part in checkpoint_files(file, spec.name):
            _check_pinned(spec, part)
            clean, facts = _facts(_as_safetensors(plan, part))
            name = _stored_name(spec, part.stem)
            found[name] = clean, {**facts, "from": {"name": part.name, "sha256": _facts(part)[1]["sha256"]}}
        if file.name.endswith(INDEX):
            name = _stored_name(spec, Path(file.name.removesuffix(INDEX)).stem) + INDEX
            found[name] = _facts(_stored_index(spec, file))
    return found


def _stored_name(spec: ModelSpec, stem: str) -> str:
    # A checkpoint under the name transformers looks for.
    return "model.safetensors" if spec.family == "hf_clip" and stem == "pytorch_model" else f"{stem}.safetensors"


def _stored_index(spec: ModelSpec, index: Path) -> Path:
    """An index that lists the files by their names in the store."""
    content = read_model_json(index.parent, index.name, spec.name)
    content["weight_map"] = {
        tensor: _stored_name(spec, Path(name).stem) for tensor, name in content["weight_map"].items()
    }
    target = downloads_folder() / f"{fingerprint([content])}{INDEX}"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    return target


def _architecture_files(spec: ModelSpec, folder: Path, kept: Iterable[str]) -> dict[str, Path]:
    """What a worker elsewhere needs to build the model: the user's architecture file, an unpackaged text tower's.

    Raises:
        ModelError: A text tower's configuration is neither beside the weights nor on the hub.
    """
    found: dict[str, Path] = {}
    if OPEN_CLIP_CONFIG in kept:
        config: Any = read_model_json(folder, OPEN_CLIP_CONFIG, spec.name)
    else:
        config = model_architecture(spec, folder)
        if config is not None and str(spec.architecture).endswith(".json"):
            found[ARCHITECTURE] = Path(str(spec.architecture))
    named = (config or {}).get("model_cfg", config or {}).get("text_cfg", {}).get("hf_model_name")
    if (folder / TEXT_CONFIG).is_file():
        found[TEXT_CONFIG] = folder / TEXT_CONFIG
    elif named is not None and Path(named).is_file():
        found[TEXT_CONFIG] = Path(named)
    elif named is not None and not Path(text_tower(named)).is_file():
        found[TEXT_CONFIG] = hub_snapshot(named, ["config.json"]) / "config.json"
    return found


def _facts(file: Path) -> tuple[Path, dict[str, Any]]:
    return file, {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _weights(spec: ModelSpec, folder: Path) -> list[Path]:
    """The checkpoint files of a folder, under their published names or as safetensors of the same stem."""
    if not spec.source.files:
        return [find_weights(folder, family_module(spec).PREFERRED, spec.name)]
    found = []
    for name in spec.source.files:
        stem = name.rsplit(".", 1)[0]
        candidates = [folder / name, *(folder / f"{stem}{suffix}" for suffix in CHECKPOINT_SUFFIXES)]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise ModelError(f"Model {spec.name!r}: {folder} holds no {name}.")
        found.append(file)
    return found


def _tokenizer_files(plan: FetchPlan, folder: Path) -> dict[str, Path]:
    """The tokenizer's files by name; none for models whose tokenizer comes with open_clip, or that have no text."""
    spec = plan.spec
    if plan.tokenizer is not None:
        spec = spec.model_copy(
            update={"recipe": spec.recipe.model_copy(update={"tokenizer": absolute_address(plan.tokenizer)})}
        )
    here = {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}
    if plan.tokenizer is None and (here or spec.recipe.tokenizer is None):
        return here
    found = tokenizer_folder(spec, ModelFiles(folder))
    return {name: found / name for name in TOKENIZER_FILES if (found / name).is_file()}


def _check_pinned(spec: ModelSpec, file: Path) -> None:
    pinned = spec.source.sha256.get(file.name)
    if pinned is not None and file_sha256(file) != pinned:
        raise ModelError(
            f"Model {spec.name!r}: {file.name} has sha256 {file_sha256(file)[:16]}..., and the catalog pins "
            f"{pinned[:16]}.... It is torn, or another version. If you want this one, state its hash as source.sha256 "
            "in a YAML entry of your own."
        )


def _as_safetensors(plan: FetchPlan, file: Path) -> Path:
    """A safetensors file with a checkpoint's tensors by their own names, made once per source file."""
    from common.models.convert import convert_trusted, named_tensors, save_tensors
    from common.models.tensors import is_safetensors, read_checkpoint

    model = plan.spec.name
    if file.suffix == ".safetensors" or is_safetensors(file):
        read_checkpoint(file, model)
        return file
    target = downloads_folder() / f"{file_sha256(file)}.safetensors"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        content = read_checkpoint(file, model)
    except UntrustedError as error:
        if not plan.trust:
            raise ModelError(f"{error} Or fetch it with --trust {model}.") from error.__cause__
        convert_trusted(file, target)
        return target
    partial = target.with_suffix(".part")
    save_tensors(named_tensors(content, str(file)), partial)
    partial.replace(target)
    return target
