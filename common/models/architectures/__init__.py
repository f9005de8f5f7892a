"""Architectures as data: open_clip configurations of models open_clip does not know, and configurations of text towers.

A text tower's configuration is public and tiny, but open_clip and transformers fetch it from the hub each time a model
is built; with these copies nothing is fetched, and a wrong copy cannot pass the strict loading of the weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from common.errors import ModelError
from common.models.spec import ModelSpec

FOLDER = Path(__file__).parent
TEXT_CONFIG = "text_config.json"
ARCHITECTURE = "architecture.json"
"""In a store: the user's own architecture file of a model that was fetched with one."""
TEXT_TOWERS = {  # hub name of a BERT -> file in text/
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract": "bert-base-30522.json",
    "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract-fulltext": "bert-base-30522.json",
    "microsoft/BiomedNLP-BiomedBERT-large-uncased-abstract": "bert-large-30522.json",
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract": "bert-base-30522.json",  # their names before 2023
    "microsoft/BiomedNLP-PubMedBERT-base-uncased-abstract-fulltext": "bert-base-30522.json",
    "microsoft/BiomedNLP-PubMedBERT-large-uncased-abstract": "bert-large-30522.json",
    "emilyalsentzer/Bio_ClinicalBERT": "bert-base-28996.json",
}


def packaged() -> list[str]:
    """Names of the architectures that come with this project."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def read_architecture(name: str, model: str) -> dict[str, Any] | None:
    """A packaged architecture by name, or a JSON file of the user's; None if it is neither.

    Raises:
        ModelError: The file is missing or not JSON.
    """
    file = FOLDER / f"{name}.json"
    if name.endswith(".json"):
        file = Path(name)
    elif not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ModelError(f"Model {model!r}: the architecture file {file} cannot be read ({error}).") from error


def model_architecture(spec: ModelSpec, folder: Path | None, default: str | None = None) -> dict[str, Any] | None:
    """The architecture of a model: the file its store folder keeps, else the one its entry names.

    Args:
        spec: The entry.
        folder: The model's folder.
        default: Packaged name to use when the entry names none.

    Raises:
        ModelError: The file is missing or not JSON.
    """
    if folder is not None and (folder / ARCHITECTURE).is_file():
        return read_architecture(str(folder / ARCHITECTURE), spec.name)
    name = spec.architecture or default
    return None if name is None else read_architecture(name, spec.name)


def two_towers(spec: ModelSpec, folder: Path, default: str) -> dict[str, Any]:
    """The architecture of a family that builds its towers itself: ``embed_dim``, ``vision`` and ``text``.

    Raises:
        ModelError: It is of another kind.
    """
    architecture = model_architecture(spec, folder, default)
    if architecture is None or not {"embed_dim", "vision", "text"} <= set(architecture):
        raise ModelError(
            f"Model {spec.name!r}: {spec.architecture} is no architecture of the {spec.family} family, which states "
            f"embed_dim, vision and text as the packaged {default} does."
        )
    return architecture


def bert_config(text: dict[str, Any]) -> Any:
    """The transformers configuration of a BERT whose settings an architecture states."""
    from transformers import BertConfig

    return BertConfig(**{key: value for key, value in text.items() if key != "model_type"})


def text_tower(name: str, folder: Path | None = None) -> str:
    """What transformers shall read a text tower's configuration from.

    Args:
        name: The hub repository that an open_clip configuration names.
        folder: The model's own folder; a store keeps ``text_config.json`` there for towers that are not packaged.

    Returns:
        A file where there is one, else the name itself.
    """
    if folder is not None and (folder / TEXT_CONFIG).is_file():
        return str(folder / TEXT_CONFIG)
    return str(FOLDER / "text" / TEXT_TOWERS[name]) if name in TEXT_TOWERS else name
