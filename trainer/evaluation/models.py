"""What is under test: a teacher, an exported student, or a checkpoint of a run, from what the user typed to weights."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from common.errors import EvaluateError
from common.models.dual_encoder import DualEncoder, Tokenize
from common.models.embed import run_tower
from common.models.load import describe_model, find_spec, load_model, load_tokenizer
from common.models.spec import ModelDescription, ModelSpec
from common.storage import Storage
from trainer.checkpoint import FOLDER, MANIFEST, Checkpoint, load_checkpoint
from trainer.export import EXPORT_MANIFEST, write_model_files

Kind = Literal["teacher", "student"]


@dataclass(frozen=True)
class ModelUnderTest:
    """A model by the name its scores carry. Exactly one of ``spec`` and ``checkpoint`` is set."""

    name: str
    kind: Kind
    spec: ModelSpec | None = None
    checkpoint: Checkpoint | None = None


def find_model(
    reference: str, catalog: dict[str, ModelSpec], kind: Kind | None = None, store: str | None = None
) -> ModelUnderTest:
    """Resolve what a user typed.

    Args:
        reference: A catalog name, or ``[NAME=]ADDRESS`` of a model folder, an exported student, a checkpoint, or
            a run (whose best checkpoint is meant, or without validation its newest).
        catalog: The known models, from ``read_catalog``.
        kind: What the scores call it; None decides by what lies there.
        store: Model store that catalog names are loaded from where it has them.

    Raises:
        ModelError: No such entry, or nothing that can be loaded lies at the address.
        TrainError: The run has no whole checkpoint.
    """
    name, mark, address = reference.partition("=")
    if "/" in name:  # the sign belongs to the address
        mark = ""
    if reference in catalog or (not mark and "/" not in reference):
        spec = find_spec(reference, catalog, store)
        return ModelUnderTest(spec.name, kind or "teacher", spec)
    if not mark:
        address, name = reference, reference.rstrip("/").rsplit("/", 1)[-1]
    storage = Storage(address.rstrip("/"))
    files = storage.list_files()
    if MANIFEST in files or FOLDER in storage.list_folders():
        run, inside, step = storage.uri.rpartition(f"/{FOLDER}/")
        if inside and not mark:  # .../runs/<run>/checkpoints/step-00000500
            name = f"{run.rsplit('/', 1)[-1]}-{step}"
        return ModelUnderTest(name, kind or "student", checkpoint=load_checkpoint(storage.uri))
    if storage.is_file():
        spec = find_spec(f"{name}={storage.uri}" if mark else storage.uri, catalog)
        return ModelUnderTest(name if mark else spec.name, kind or "teacher", spec)
    exported = EXPORT_MANIFEST in files
    spec = find_spec(f"{_slug(name)}={storage.uri}", {} if exported else catalog)
    return ModelUnderTest(name, kind or ("student" if exported else "teacher"), spec)


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-._") or "model"


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to embed. D = width."""

    name: str
    kind: str
    encoder: DualEncoder
    tokenize: Tokenize
    device: str

    @property
    def description(self) -> ModelDescription:
        """What the model's files say."""
        return self.encoder.description

    def embed_images(self, pixels_BHWC: np.ndarray, batch_size: int) -> np.ndarray:
        """Uint8 pictures of the model's geometry -> unit vectors, float32 [B, D].

        Raises:
            EvaluateError: The model returned something that is not a number.
        """
        return self._checked(run_tower(self.encoder.encode_image, pixels_BHWC, batch_size, self.device))

    def embed_texts(self, texts: list[str], batch_size: int) -> np.ndarray:
        """Texts -> unit vectors, float32 [len(texts), D].

        Raises:
            EvaluateError: The model returned something that is not a number.
        """
        if not texts:
            return np.zeros((0, self.description.text_dim or 0), np.float32)
        return self._checked(run_tower(self.encoder.encode_text, self.tokenize(texts), batch_size, self.device))

    def _checked(self, unit_BD: np.ndarray) -> np.ndarray:
        if not np.isfinite(unit_BD).all():
            # A NaN compares as false with everything, which would look like a perfect rank.
            raise EvaluateError(f"Model {self.name!r} returns NaN or infinite embeddings; its weights are broken.")
        return unit_BD


@contextmanager
def spec_of(model: ModelUnderTest) -> Iterator[ModelSpec]:
    """A loadable spec of the model; a checkpoint is laid out as a model folder for as long as the context lasts."""
    if model.spec is not None:
        yield model.spec
        return
    assert model.checkpoint is not None
    with tempfile.TemporaryDirectory(prefix="mmkd-checkpoint-") as folder:
        write_model_files(model.checkpoint, Path(folder))
        yield ModelSpec(name=_slug(model.name), family="open_clip", path=folder)


def has_both_towers(model: ModelUnderTest) -> bool:
    """Whether a model can compare pictures with texts."""
    if model.spec is None:
        return True
    description = describe_model(model.spec)
    return description.image_dim is not None and description.text_dim is not None


def load_under_test(model: ModelUnderTest, device: str) -> LoadedModel:
    """Load weights and tokenizer.

    Raises:
        ModelError: The files are missing or do not fit.
        EvaluateError: The model lacks one of its two towers.
    """
    with spec_of(model) as spec:
        description = describe_model(spec)
        if description.image_dim is None or description.text_dim is None:
            lacking = "image" if description.image_dim is None else "text"
            raise EvaluateError(f"Model {model.name!r} has no {lacking} tower, so nothing can be scored; leave it out.")
        return LoadedModel(model.name, model.kind, load_model(spec).to(device), load_tokenizer(spec), device)
