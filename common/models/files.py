"""Where a model's files lie: a local folder or file, an fsspec address (copied to a cache once), or the hub."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.config import fingerprint
from common.errors import ModelError
from common.models.spec import ModelSpec
from common.storage import Storage

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
CHECKPOINT_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".torch")
INDEX = ".index.json"
"""End of the name of a file that lists the parts of a checkpoint too large for one file, tensor by tensor."""
CONFIG_FILES = ("open_clip_config.json", "config.json", "preprocessor_config.json", "processor_config.json")
STORE_MANIFEST = "teacher.json"
"""Written last into a model's folder in a store; lists its files with their sha256."""


@dataclass(frozen=True)
class ModelFiles:
    """A model's folder on this machine, and its checkpoint where a single file was named."""

    folder: Path
    file: Path | None = None

    def weights(self, preferred: tuple[str, ...], model: str) -> Path:
        """The checkpoint: the file that was named, the first preferred name that is there, else the only candidate.

        Of a checkpoint in several files it is their index; see :func:`checkpoint_files`.

        Raises:
            ModelError: There is none, or there are several and none is preferred.
        """
        return self.file or find_weights(self.folder, preferred, model)

    def has(self, name: str) -> bool:
        """Whether the folder counts and holds this file; beside a single named file, only tokenizers are looked for."""
        return self.file is None and (self.folder / name).is_file()


def cache_folder() -> Path:
    """Where copies of remote model folders are kept; ``MMKD_CACHE`` moves it."""
    return Path(os.environ.get("MMKD_CACHE", Path.home() / ".cache" / "mmkd")) / "models"


def locate(spec: ModelSpec, weights: bool = True) -> ModelFiles:
    """The model's files on this machine, fetched first if they are elsewhere, checked where a store lists their hashes.

    Args:
        spec: The entry.
        weights: False when only configuration and tokenizer are wanted: hashing gigabytes of weights is then left out.

    Raises:
        ModelError: They are not there, cannot be fetched, or are not what the store's manifest lists.
    """
    if spec.path is not None:
        return _from_path(spec, spec.path, weights)
    if spec.hub_id is not None:
        return ModelFiles(_from_hub(spec, spec.hub_id))
    if spec.source.url is not None:
        raise ModelError(
            f"Model {spec.name!r} is not on the model hub. Download {' and '.join(spec.source.files) or 'its files'} "
            f"from {spec.source.url} and give the file: {spec.name}=FILE, or put it into a store with "
            f"`mmkd teachers fetch {spec.name} --store URI --from {spec.name}=FILE`."
        )
    raise ModelError(f"Model {spec.name!r} has no folder: it is the built-in {spec.architecture}.")


def _from_path(spec: ModelSpec, path: str, weights: bool) -> ModelFiles:
    storage = Storage(path)
    if not storage.exists():
        raise ModelError(
            f"Model {spec.name!r}: nothing at {path}. Check the path in the command line or in the catalog YAML."
        )
    here = Path(storage.path()) if storage.is_local else _from_address(storage)
    if here.is_file():
        return ModelFiles(here.parent, here)
    verify_folder(here, spec.name, weights)
    return ModelFiles(here)


def verify_folder(folder: Path, model: str, weights: bool = True) -> None:
    """Compare a store's model folder with the sizes and hashes in its manifest; a folder without one is the user's own.

    Raises:
        ModelError: A file is missing, torn, or not the one that was fetched.
    """
    if not (folder / STORE_MANIFEST).is_file():
        return
    for name, facts in read_model_json(folder, STORE_MANIFEST, model)["files"].items():
        file = folder / name
        if not weights and file.suffix in CHECKPOINT_SUFFIXES:
            continue
        found = file.stat().st_size if file.is_file() else None
        if found != facts["bytes"] or file_sha256(file) != facts["sha256"]:
            raise ModelError(
                f"Model {model!r}: {file} is not the file that was fetched ({found} bytes found, {facts['bytes']} "
                f"recorded with sha256 {facts['sha256'][:16]}). It is torn or was replaced; delete the folder and run "
                "`mmkd teachers fetch` again."
            )


def _from_address(storage: Storage) -> Path:
    """A copy of a remote folder, or of a single remote file, made once."""
    # Keyed by what the store says of each file (ETag, time of change), so that replaced files are fetched again:
    # new weights of the same architecture have the same size.
    storage.fs.invalidate_cache(storage.path())
    single = storage.fs.isfile(storage.path())
    folder, _, last = storage.uri.rpartition("/")
    source = Storage(folder) if single else storage
    names = [last] if single else source.list_files()
    marks = [[name, str(source.fs.ukey(source.path(name)))] for name in names]
    target = cache_folder() / fingerprint([storage.uri, marks])
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(dir=target.parent))
        for name in names:
            source.download(name, partial / name)
        try:
            partial.rename(target)
        except OSError:  # another worker on this machine was first; its copy is as good
            shutil.rmtree(partial)
    return target / last if single else target


def hub_snapshot(repository: str, patterns: list[str], revision: str | None = None, repo_type: str = "model") -> Path:
    """The wanted files of a hub repository, from the local cache when the hub is off; downloads resume.

    The token of a gated repository is the hub library's own affair (``HF_TOKEN``); it is never read here.

    Raises:
        ModelError: The hub, the repository or the revision cannot be reached.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repository, revision=revision, repo_type=repo_type, allow_patterns=patterns
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ModelError(
            f"{repository}{at} could not be fetched from the model hub ({type(error).__name__}). Check the network and "
            "the name; a gated repository also needs its terms accepted on the hub and HF_TOKEN in the environment. "
            "With no network, put the files in a folder and use NAME=FOLDER."
        ) from error


def hub_patterns(spec: ModelSpec) -> list[str]:
    """Which files of a model's repository are needed: its configuration, tokenizer and weights."""
    weights = [*spec.source.files] or ["*.safetensors", "open_clip*.bin", "pytorch_model.bin"]
    parts = [] if spec.source.files else [f"*{INDEX}", "pytorch_model-*.bin"]
    return [*CONFIG_FILES, *TOKENIZER_FILES, *weights, *parts]


def _from_hub(spec: ModelSpec, hub_id: str) -> Path:
    try:
        return hub_snapshot(hub_id, hub_patterns(spec), spec.revision, spec.source.repo_type)
    except ModelError as error:
        raise ModelError(f"Model {spec.name!r}: {error}") from error.__cause__


def tokenizer_folder(spec: ModelSpec, files: ModelFiles, default: str | None = None) -> Path:
    """The folder with a model's tokenizer: the one its recipe names, its own, or the hub repository its recipe names.

    Args:
        spec: The entry.
        files: Where the model lies.
        default: The hub repository to use when the recipe names none.

    Raises:
        ModelError: There is none.
    """
    named = spec.recipe.tokenizer or default
    if named is not None and (named.startswith((".", "/")) or "://" in named or Path(named).is_dir()):
        storage = Storage(named)
        if not storage.exists():
            raise ModelError(f"Model {spec.name!r}: there is no tokenizer folder at {named}.")
        folder = Path(storage.path()) if storage.is_local else _from_address(storage)
        return folder.parent if folder.is_file() else folder
    if any((files.folder / name).is_file() for name in TOKENIZER_FILES):
        return files.folder
    if named is None:
        raise ModelError(f"Model {spec.name!r}: {files.folder} holds no tokenizer files (such as tokenizer.json).")
    try:
        return hub_snapshot(named, [*TOKENIZER_FILES, "config.json"])
    except ModelError as error:
        raise ModelError(
            f"Model {spec.name!r} needs the tokenizer of {named}, which is not beside its weights. {error} Or put its "
            f"files (vocab.txt or tokenizer.json) beside the weights, or name their folder as recipe.tokenizer."
        ) from error.__cause__


def family_of_folder(path: str) -> str:
    """Which family a model folder belongs to, from the configuration file it holds.

    Raises:
        ModelError: There is no such folder, or it holds neither kind of configuration.
    """
    storage = Storage(path)
    names = storage.list_files()
    if "open_clip_config.json" in names:
        return "open_clip"
    if "config.json" in names:
        return "hf_clip"
    raise ModelError(
        f"{path} is not a model folder: expected open_clip_config.json or config.json in it, found "
        f"{', '.join(names[:8]) or 'no files'}. Give an exported student, an open_clip folder or a transformers folder."
    )


def read_model_json(folder: Path, name: str, model: str) -> dict[str, Any]:
    """Read one of a model's JSON files.

    Raises:
        ModelError: It is missing, cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise ModelError(f"Model {model!r}: {folder} holds no {name}.") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelError(f"Model {model!r}: {folder / name} is not valid JSON ({error}).") from error
    except OSError as error:
        raise unreadable(folder / name, model, error) from error
    if not isinstance(content, dict):
        raise ModelError(
            f"Model {model!r}: {folder / name} holds a JSON {type(content).__name__}; expected an object with fields."
        )
    return content


def unreadable(path: Path, model: str, error: OSError) -> ModelError:
    """Which file of a model the operating system does not give, and why."""
    return ModelError(f"Model {model!r}: {path} cannot be read: {error.strerror or error}.")


def needs_own_code(place: Path | str, model: str) -> ModelError:
    """A model that only its authors' own Python can build; nobody is asked, and nothing of it runs."""
    return ModelError(
        f"Model {model!r}: {place} needs its authors' own code (auto_map), which mmkd does not run. Convert the model "
        "to an open_clip or transformers layout that loads without trust_remote_code, and give that folder."
    )


def check_readable(path: Path, model: str) -> None:
    """Open a file, before a library does and says something else of it.

    Raises:
        ModelError: The operating system does not give it.
    """
    try:
        path.open("rb").close()
    except OSError as error:
        raise unreadable(path, model, error) from error


def find_weights(folder: Path, preferred: tuple[str, ...], model: str) -> Path:
    """The checkpoint of a folder: the first preferred name that is there, else the only candidate.

    A checkpoint in several files stands under the name of its index, in the order in which transformers looks.

    Raises:
        ModelError: There is none, or there are several and none is preferred.
    """
    for name in preferred:
        for candidate in (folder / name, folder / f"{name}{INDEX}"):
            if os.path.lexists(candidate):  # a link to nothing is not passed over: another file may hold other weights
                return candidate
    names = sorted(path.name for path in folder.iterdir())
    indexes = [name for name in names if name.endswith(tuple(f"{end}{INDEX}" for end in CHECKPOINT_SUFFIXES))]
    parts = {part for index in indexes for part in _weight_map(folder / index, model).values()}
    found = [name for name in names if Path(name).suffix in CHECKPOINT_SUFFIXES and name not in parts]
    split = re.match(r"(.+)-\d+-of-\d+(\.\w+)$", found[0]) if found else None
    if split and not indexes:
        raise ModelError(
            f"Model {model!r}: {folder} holds {len(found)} checkpoint files, {', '.join(found[:8])}; {found[0]} is a "
            f"part of a checkpoint in several files, whose index {split[1]}{split[2]}{INDEX} is not there. Fetch it "
            "from where the parts came from."
        )
    if len(found) + len(indexes) == 1:
        return folder / (found + indexes)[0]
    what = ", ".join([*found, *(f"{index} with the files it lists" for index in indexes)]) or "none"
    raise ModelError(
        f"Model {model!r}: expected one checkpoint in {folder}, found {what}. "
        + ("Keep one of them." if not indexes else f"Put the one that counts into a folder of its own: {model}=FOLDER.")
    )


def checkpoint_files(path: Path, model: str) -> list[Path]:
    """The files a checkpoint consists of: itself, or all that it lists where it is an index, by name.

    Raises:
        ModelError: The index is none, or a file that it lists is not there.
    """
    if not path.name.endswith(INDEX):
        return [path]
    names = sorted(set(_weight_map(path, model).values()))
    missing = [name for name in names if not os.path.lexists(path.parent / name)]
    if missing:
        raise ModelError(
            f"Model {model!r}: {path} lists {len(names)} files with weights, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not there. Fetch what is missing from where the others came from."
        )
    return [path.parent / name for name in names]


def _weight_map(index: Path, model: str) -> dict[str, str]:
    """Name of a tensor -> name of the file beside the index that holds it.

    Raises:
        ModelError: The file is no index.
    """
    places = read_model_json(index.parent, index.name, model).get("weight_map")
    plain = isinstance(places, dict) and all(
        isinstance(name, str) and Path(name).name == name for name in places.values()
    )
    if not plain or not places:
        raise ModelError(
            f"Model {model!r}: {index} is not the index of a checkpoint: expected a weight_map from names of tensors "
            "to names of files beside it. Fetch it again."
        )
    return places


def file_sha256(path: Path) -> str:
    """Sha256 of a file, remembered per path, size and modification time."""
    stat = path.stat()
    return _hash_file(str(path), stat.st_size, stat.st_mtime_ns)


def weights_sha256(file: Path, model: str) -> str:
    """Sha256 of a checkpoint as its authors published it, also where it lies here as safetensors made from that.

    A store's manifest and the converter's record say what a file was made from, so that the same weights have the same
    identity from the authors' file, from a conversion and from a store. Of a checkpoint in several files it is one hash
    over those of all its files.

    Raises:
        ModelError: A file is missing or cannot be read.
    """
    try:
        if file.name.endswith(INDEX):
            hashes = [_published_sha256(part) for part in checkpoint_files(file, model)]
            return hashlib.sha256("".join(hashes).encode()).hexdigest()
        return _published_sha256(file)
    except OSError as error:
        raise unreadable(Path(error.filename or file), model, error) from error


def _published_sha256(file: Path) -> str:
    manifest, record = file.parent / STORE_MANIFEST, file.with_name(f"{file.name}.json")
    if manifest.is_file():
        facts = read_model_json(file.parent, STORE_MANIFEST, file.parent.name)["files"].get(file.name, {})
        if "from" in facts and facts["sha256"] == file_sha256(file):
            return str(facts["from"]["sha256"])
    elif record.is_file():
        facts = read_model_json(file.parent, record.name, file.parent.name)
        if facts.get("sha256") == file_sha256(file):
            return str(facts["source_sha256"])
    return file_sha256(file)


@functools.lru_cache(maxsize=256)
def _hash_file(path: str, size: int, modified: int) -> str:
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def tokenizer_sha256(folder: Path, model: str, extra: Any = None) -> str:
    """One hash over a folder's tokenizer files and any settings that change the token ids.

    Raises:
        ModelError: One of them cannot be read.
    """
    try:
        hashes = {name: file_sha256(folder / name) for name in TOKENIZER_FILES if (folder / name).is_file()}
    except OSError as error:
        raise unreadable(Path(error.filename or folder), model, error) from error
    return fingerprint([hashes, extra])
