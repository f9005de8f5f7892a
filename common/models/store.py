"""The model store: teachers' files in one folder or bucket, as safetensors, so that workers never need the hub.

``<store>/<name>/`` holds the weights, configuration and tokenizer and, written last, ``teacher.json``: where they came
from, under which terms, and the size and sha256 of each file, which are compared on every load.
"""

from __future__ import annotations

import shutil
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from common.config import fingerprint, parse_config
from common.errors import ModelError
from common.lake import now
from common.logs import Progress, logger
from common.models.architectures import TEXT_CONFIG, text_tower
from common.models.spec import ModelSpec
from common.storage import Storage, absolute_address, without_secrets
from common.version import VERSION

CHUNK_BYTES = 8 << 20
ZIPPED = (".zip",)


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
    from common.models.files import STORE_MANIFEST

    folder = Storage(absolute_address(store.rstrip("/"))).child(name)
    return folder.uri if folder.exists(STORE_MANIFEST) else None


def stored_spec(folder: str) -> ModelSpec:
    """The entry under which a stored model was fetched, placed in the store."""
    from common.models.files import STORE_MANIFEST

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
    from common.models.files import STORE_MANIFEST

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
    from common.models.files import hub_patterns, hub_snapshot

    spec, source = plan.spec, plan.source or plan.spec.path
    if source is not None:
        return _gather_from(spec, source), {}
    if spec.hub_id is None:
        raise ModelError(
            f"Model {spec.name!r} is not on the model hub. Download {' and '.join(spec.source.files) or 'its files'} "
            f"from {spec.source.url} by hand and run `mmkd teachers fetch {spec.name} --store URI "
            f"--from {spec.name}=FILE`."
        )
    folder = hub_snapshot(spec.hub_id, hub_patterns(spec), spec.revision, spec.source.repo_type)
    # The hub library keeps each snapshot in a folder named by its commit.
    return folder, {"hub_id": spec.hub_id, "revision": folder.name}


def _gather_from(spec: ModelSpec, source: str) -> Path:
    storage = Storage(absolute_address(source))
    if storage.is_local:
        place = Path(storage.path())
        if not place.exists():
            raise ModelError(f"Model {spec.name!r}: there is nothing at {source}.")
        return _unzipped(spec, place) if place.suffix in ZIPPED else place
    folder = _downloads() / fingerprint([without_secrets(source), spec.name])
    folder.mkdir(parents=True, exist_ok=True)
    if storage.is_file():
        file = folder / urlsplit(source).path.rsplit("/", 1)[-1]
        download(storage, "", file)
        return _unzipped(spec, file) if file.suffix in ZIPPED else file
    names = storage.list_files()
    if not names:
        raise ModelError(f"Model {spec.name!r}: there is nothing at {without_secrets(source)}.")
    for name in names:
        download(storage, name, folder / name)
    return folder


def _downloads() -> Path:
    from common.models.files import cache_folder

    return cache_folder().parent / "downloads"


def download(storage: Storage, relative: str, target: Path) -> None:
    """Copy a remote file to this machine in pieces, going on where an earlier attempt stopped.

    Raises:
        ModelError: Fewer bytes arrive than the source announces.
        StorageError: The source cannot be read.
    """
    path = storage.path(relative)
    size = storage.size(relative)
    # The mark keeps pieces of a file that has changed at its source apart from those of the new one.
    version = fingerprint([storage.version(relative), size])
    partial, done = target.with_name(f"{target.name}.{version}.part"), target.with_name(f"{target.name}.version")
    if target.is_file() and done.is_file() and done.read_text(encoding="utf-8") == version:
        return
    for stale in target.parent.glob(f"{target.name}.*.part"):
        if stale != partial:
            stale.unlink()
    progress = Progress(f"download {target.name}", (size or 0) >> 20, "MB")
    start = partial.stat().st_size if partial.is_file() and size is not None else 0
    if start:
        logger.info("download %s: going on after %d MB", target.name, start >> 20)
    progress.advance(start >> 20)
    with open(partial, "ab" if start else "wb") as out:
        for piece in storage.pieces(relative, start, size, CHUNK_BYTES):
            out.write(piece)
            progress.advance(len(piece) >> 20)
    found = partial.stat().st_size
    if size is not None and found != size:
        raise ModelError(f"{without_secrets(path)} ended after {found} of {size} bytes; run the same command again.")
    partial.replace(target)
    done.write_text(version, encoding="utf-8")


def _unzipped(spec: ModelSpec, archive: Path) -> Path:
    """The wanted files of a zip archive; only plain names are written, whatever paths the archive holds."""
    folder = _downloads() / fingerprint([str(archive.absolute()), archive.stat().st_size, archive.stat().st_mtime_ns])
    wanted = set(spec.source.files)
    try:
        with zipfile.ZipFile(archive) as opened:
            members = [m for m in opened.infolist() if not m.is_dir() and Path(m.filename).name in wanted]
            if {Path(member.filename).name for member in members} != wanted:
                listing = ", ".join(opened.namelist()[:8])
                raise ModelError(
                    f"Model {spec.name!r}: {archive} lacks {', '.join(sorted(wanted))}; it holds {listing}."
                )
            folder.mkdir(parents=True, exist_ok=True)
            for member in members:
                with opened.open(member) as stream, open(folder / Path(member.filename).name, "wb") as out:
                    shutil.copyfileobj(stream, out, CHUNK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ModelError(f"Model {spec.name!r}: {archive} is not a whole zip archive ({error}).") from error
    return folder


def _clean_files(plan: FetchPlan, place: Path) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Name in the store -> local file and its facts; every checkpoint has become safetensors.

    Raises:
        ModelError: A file is missing, torn, not the pinned one, or holds more than tensors and is not trusted.
    """
    from common.models.files import CHECKPOINT_SUFFIXES, CONFIG_FILES, TOKENIZER_FILES

    spec, single = plan.spec, place.is_file()
    folder = place.parent if single else place
    kept = [] if single else [name for name in CONFIG_FILES if (folder / name).is_file()]
    found = {name: _facts(folder / name) for name in kept}
    found.update({name: _facts(file) for name, file in _tokenizer_files(plan, folder, TOKENIZER_FILES).items()})
    weights = [place] if single else _weights(spec, folder, CHECKPOINT_SUFFIXES)
    text_config = _text_config(spec, folder) if "open_clip_config.json" in found else None
    if text_config is not None:
        found[TEXT_CONFIG] = _facts(text_config)
    for file in weights:
        _check_pinned(spec, file)
        name = f"{file.stem}.safetensors"
        # A checkpoint under the name transformers looks for.
        if spec.family == "hf_clip" and file.stem == "pytorch_model":
            name = "model.safetensors"
        clean, facts = _facts(_as_safetensors(plan, file))
        found[name] = clean, {**facts, "from": {"name": file.name, "sha256": _facts(file)[1]["sha256"]}}
    return found


def _text_config(spec: ModelSpec, folder: Path) -> Path | None:
    """The configuration of a text tower that is not packaged, as a file; None where nothing is needed.

    Raises:
        ModelError: It is not beside the weights and the hub does not give it.
    """
    from common.models.files import hub_snapshot, read_model_json

    if (folder / TEXT_CONFIG).is_file():
        return folder / TEXT_CONFIG
    config = read_model_json(folder, "open_clip_config.json", spec.name)
    named = config.get("model_cfg", config).get("text_cfg", {}).get("hf_model_name")
    if named is None or Path(text_tower(named)).is_file():
        return None
    return hub_snapshot(named, ["config.json"]) / "config.json"


def _facts(file: Path) -> tuple[Path, dict[str, Any]]:
    from common.models.files import file_sha256

    return file, {"bytes": file.stat().st_size, "sha256": file_sha256(file)}


def _weights(spec: ModelSpec, folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    from common.models.files import find_weights

    if not spec.source.files:
        preferred = {"hf_clip": "common.models.hf_clip", "open_clip": "common.models.open_clip"}.get(spec.family)
        if preferred is not None:
            import importlib

            return [find_weights(folder, importlib.import_module(preferred).PREFERRED, spec.name)]
        return [find_weights(folder, (), spec.name)]
    found = []
    for name in spec.source.files:
        stem = name.rsplit(".", 1)[0]
        candidates = [folder / name, *(folder / f"{stem}{suffix}" for suffix in suffixes)]
        file = next((candidate for candidate in candidates if candidate.is_file()), None)
        if file is None:
            raise ModelError(f"Model {spec.name!r}: {folder} holds no {name}.")
        found.append(file)
    return found


def _tokenizer_files(plan: FetchPlan, folder: Path, names: tuple[str, ...]) -> dict[str, Path]:
    """The tokenizer's files by name; none for models whose tokenizer comes with open_clip, or that have no text."""
    from common.models.files import ModelFiles, tokenizer_folder

    spec = plan.spec
    if plan.tokenizer is not None:
        spec = spec.model_copy(
            update={"recipe": spec.recipe.model_copy(update={"tokenizer": absolute_address(plan.tokenizer)})}
        )
    here = {name: folder / name for name in names if (folder / name).is_file()}
    if plan.tokenizer is None and (here or spec.recipe.tokenizer is None):
        return here
    found = tokenizer_folder(spec, ModelFiles(folder))
    return {name: found / name for name in names if (found / name).is_file()}


def _check_pinned(spec: ModelSpec, file: Path) -> None:
    from common.models.files import file_sha256

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
    from common.models.files import file_sha256
    from common.models.tensors import read_checkpoint

    model = plan.spec.name
    if file.suffix == ".safetensors":
        read_checkpoint(file, model)
        return file
    target = _downloads() / f"{file_sha256(file)}.safetensors"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        content = read_checkpoint(file, model)
    except ModelError as error:
        if "holds more than tensors" not in str(error):
            raise
        if not plan.trust:
            raise ModelError(f"{error} Or fetch it with --trust {model}.") from error.__cause__
        convert_trusted(file, target)
        return target
    partial = target.with_suffix(".part")
    save_tensors(named_tensors(content, str(file)), partial)
    partial.replace(target)
    return target
