"""The student's first weights: one whole checkpoint, or an image tower and a text tower from different places."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from common.errors import ModelError, TrainError
from common.logs import logger
from common.models.files import find_weights, weights_sha256
from common.models.open_clip import todays_names
from common.models.tensors import Tensors, load_strictly, read_tensors, renamed, without
from common.models.unimed import to_stock_names
from trainer.config import ModelConfig
from trainer.student import Student

BERT_FILES = ("model.safetensors", "pytorch_model.bin")
BERT_HEADS = ("cls.", "pooler.")
"""Of masked-language modelling; the student projects the tower's own states."""


NOT_RECORDED = "not recorded"
KNOWN_LICENCES = {"metaclip": "CC-BY-NC-4.0"}
"""Part of a name -> licence. MetaCLIP's: its page on the hub and its repository's LICENSE (facts of 2026-11)."""


class Towers(NamedTuple):
    """Where each tower of a student came from."""

    image: str = "random"
    text: str = "random"


def identify(model: ModelConfig) -> dict[str, str]:
    """What a student's first weights are, for whoever asks whether they are the same: never where they lie.

    Files go by their content, published weights by their names. A file that only the workers can see goes by its
    address, for want of anything better.

    Raises:
        ModelError: A file cannot be read.
    """
    found = {}
    for name in ("weights", "vision_weights", "text_weights"):
        given = getattr(model, name)
        if given is None:
            continue
        place = Path(given)
        if place.is_dir():
            place = find_weights(place, BERT_FILES, "student")
        if place.is_file():
            found[name] = f"sha256:{weights_sha256(place, 'student')}"
        else:
            found[name] = given if "/" in given else f"{model.architecture}/{given}"  # a tag is of an architecture
    return found


def licences(model: ModelConfig) -> dict[str, str]:
    """Name of the first weights -> their licence, for whoever passes the student on; empty where it starts at random.

    The name says which tower, and the published name or the file's. What nobody has said is "not recorded".
    """
    found = {}
    for name in ("weights", "vision_weights", "text_weights"):
        given = getattr(model, name)
        if given is not None:
            known = next((licence for mark, licence in KNOWN_LICENCES.items() if mark in given.lower()), NOT_RECORDED)
            found[f"{name} {given.rstrip('/').rpartition('/')[2]}"] = model.weights_license or known
    return found


def load_start(student: Student, model: ModelConfig) -> Towers:
    """Fill a new student with the weights its configuration names; what is not named stays random.

    Raises:
        TrainError: A file or tag does not exist, or does not fit.
    """
    towers = Towers()
    if model.weights is not None:
        load_pretrained(student, model.weights, model.architecture)
        towers = Towers(image=model.weights, text=model.weights)
    if model.vision_weights is not None:
        load_image_tower(student, model.vision_weights, model.architecture)
        towers = towers._replace(image=model.vision_weights)
    if model.text_weights is not None:
        load_text_tower(student, model.text_weights)
        towers = towers._replace(text=f"{model.text_weights} (projection as before)")
    logger.info("student: image tower from %s; text tower from %s", towers.image, towers.text)
    return towers


def load_pretrained(student: Student, weights: str, name: str) -> None:
    """Start from open_clip weights: a checkpoint file, or a pretrained tag of the built-in architecture ``name``.

    Files of UniMed-CLIP's and MMKD-CLIP's fork are accepted too, wrapped by a trainer or not.

    Raises:
        TrainError: There is no such file or tag, or it does not fit.
    """
    from open_clip.model import resize_pos_embed, resize_text_pos_embed

    path = _checkpoint_file(student, weights, name)
    try:
        tensors = todays_names(student.model, to_stock_names(read_tensors(path, "student")))
        # A student may look at larger pictures, or read longer captions, than the weights did.
        resize_pos_embed(tensors, student.model)
        resize_text_pos_embed(tensors, student.model)
        load_strictly(student.model, tensors, f"The weights in {path}")
    except (ModelError, RuntimeError) as error:
        raise TrainError(f"The weights in {path} do not fit {name}: {' '.join(str(error).split())[:600]}") from error


def load_image_tower(student: Student, weights: str, name: str) -> None:
    """Take the image tower of a CLIP checkpoint (OpenAI, LAION, MetaCLIP, ...), all of it.

    Args:
        student: Filled in place.
        weights: A checkpoint file, or ``ARCHITECTURE/TAG`` of open_clip such as ``ViT-B-16-quickgelu/metaclip_400m``.
        name: The student's architecture, for messages.

    Raises:
        TrainError: There is no such file or tag, its activation is another, or the tower does not fit.
    """
    from open_clip.model import resize_pos_embed

    path = _checkpoint_file(student, weights, name)
    try:
        tensors = todays_names(student.model, to_stock_names(read_tensors(path, "student")))
        resize_pos_embed(tensors, student.model)
        load_strictly(student.model.visual, renamed(tensors, "visual."), f"The image tower in {path}")
    except (ModelError, RuntimeError) as error:
        raise TrainError(f"model.vision_weights={weights!r} do not fit {name}: {error}") from error


def load_text_tower(student: Student, weights: str) -> None:
    """Take a BERT's weights for the text tower, without its heads; the projection after it is left as it is.

    Args:
        student: Has a transformers text tower.
        weights: A checkpoint file of a BERT, or a folder with one.

    Raises:
        TrainError: There is no such file, the student has no such tower, or it does not fit.
    """
    tower = getattr(getattr(student.model, "text", None), "transformer", None)
    if tower is None or not hasattr(tower, "config"):
        raise TrainError(
            "model.text_weights fills a transformers text tower, and this student's text tower is open_clip's own. Use "
            "model.weights, or an architecture with a BERT such as mmkd-b16."
        )
    place = Path(weights)
    if not place.exists():
        raise TrainError(f"model.text_weights={weights!r}: there is no such file or folder.")
    try:
        path = find_weights(place, BERT_FILES, "student") if place.is_dir() else place
        tensors = _bert_tower(read_tensors(path, "student"))
        load_strictly(tower, tensors, f"The text tower in {path}")
    except ModelError as error:
        raise TrainError(f"model.text_weights={weights!r} do not fit the student's text tower: {error}") from error


def _bert_tower(tensors: Tensors) -> Tensors:
    # Masked-language models keep the tower under "bert."; plain BERT checkpoints do not.
    if any(name.startswith("bert.") for name in tensors):
        tensors = renamed(tensors, "bert.")
    # Before 2020, layer norms called their parameters gamma and beta.
    tensors = {
        name.replace("LayerNorm.gamma", "LayerNorm.weight").replace("LayerNorm.beta", "LayerNorm.bias"): value
        for name, value in tensors.items()
    }
    return without(tensors, BERT_HEADS, ("position_ids",))


def _checkpoint_file(student: Student, weights: str, name: str) -> Path:
    """The file behind a path, a tag of the student's architecture, or ``ARCHITECTURE/TAG``."""
    import open_clip

    path = Path(weights)
    if path.is_file():
        return path
    architecture, slash, tag_name = weights.rpartition("/")
    architecture = architecture if slash else name
    tag = open_clip.get_pretrained_cfg(architecture, tag_name)
    if not tag:
        raise TrainError(
            f"model.weights={weights!r} is neither a file nor a pretrained tag of {architecture} "
            f"(tags: {', '.join(open_clip.list_pretrained_tags_by_model(architecture)) or 'none'})."
        )
    if bool(tag.get("quick_gelu")) != bool(student.architecture.config["model_cfg"].get("quick_gelu")):
        raise TrainError(
            f"model.weights={weights!r} were trained with another activation than {name} has (QuickGELU against "
            "GELU). Use the architecture's variant with, or without, -quickgelu."
        )
    try:
        return Path(open_clip.download_pretrained(tag))
    except (OSError, RuntimeError, ValueError) as error:
        raise TrainError(
            f"The weights {architecture}/{tag_name} could not be fetched ({type(error).__name__}). Check the network, "
            "or give a file."
        ) from error
