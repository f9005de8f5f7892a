"""A teacher as a plain callable: prepared table in, embeddings out. No Ray, so it runs in a test or a notebook."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import torch

from common.config import differing_keys
from common.errors import ModelError
from common.models.load import load_model
from common.schemas import features_schema
from extractor.prepare import TeacherInput, rows_of

_AUTOCAST = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Unit vectors rounded to half precision and stored as float32 compress to half the size and open everywhere.
STORED_PRECISION = "float16"


@dataclass
class Embedded:
    """One shard through one teacher."""

    features: pa.Table
    """Schema :func:`common.schemas.features_schema`, row-aligned with the pairs."""
    rejects: list[tuple[str, str, str]] = field(default_factory=list)
    """(sample id, reason, detail) of each row that has a null where a vector should be."""
    seconds: float = 0.0
    forwards: int = 0
    """Micro-batches that went through a tower."""


class Teacher:
    """Loads one model on one device and embeds prepared tables with it.

    Args:
        teacher: Which model, and what its files say.
        device: Such as ``cpu`` or ``cuda``.
        micro_batch: Rows per forward pass. The last one is padded, so every forward has the same shape and a
            sample's embedding does not depend on its neighbours.
        threads: torch threads on a CPU; 0 leaves torch's choice.
    """

    def __init__(self, teacher: TeacherInput, device: str = "cpu", micro_batch: int = 64, threads: int = 0) -> None:
        if threads:
            torch.set_num_threads(threads)
        self.teacher = teacher
        self.device = device
        self.micro_batch = micro_batch
        self.model = load_model(teacher.spec).to(device)
        differing = differing_keys(teacher.description.identity(), self.model.description.identity())
        if differing:
            raise ModelError(
                f"Teacher {teacher.spec.name!r} on this machine is another model than the one the run was planned "
                f"with: {differing}. Pin a revision, or put the same files on every machine."
            )
        self.forwards = 0

    def describe_scale(self) -> float | None:
        """The factor on cosines that the model was trained with; None for an image encoder."""
        return self.model.logit_scale

    def embed(self, prepared: pa.Table) -> Embedded:
        """Embed every picture and caption of a prepared shard.

        A row whose picture did not decode, or whose vector is not finite or zero, gets a null and a reject.
        """
        started, before = time.monotonic(), self.forwards
        description, rows = self.teacher.description, prepared.num_rows
        result = Embedded(pa.table({}))
        ids = prepared["sample_id"].to_pylist()
        schema = features_schema(description.image_dim, description.text_dim)
        columns = {"sample_id": prepared["sample_id"].combine_chunks()}
        columns["image_embedding"], columns["image_norm"] = _absent(rows)
        columns["text_embedding"], columns["text_norm"] = _absent(rows)
        columns["extra_text_embeddings"] = pa.nulls(rows, schema.field("extra_text_embeddings").type)
        if description.image_dim:
            vectors, norms = self._images(prepared)
            errors = prepared["image_error"].to_pylist()
            good = np.isfinite(norms) & (norms > 0) & np.array([error is None for error in errors], bool)
            columns["image_embedding"], columns["image_norm"] = (
                _column(vectors, good),
                pa.array(norms, mask=~good),
            )
            for row in np.flatnonzero(~good):
                reason = "image not decodable" if errors[row] else "image embedding not finite"
                result.rejects.append((ids[row], reason, errors[row] or f"norm {norms[row]}"))
        if description.text_dim:
            main, extra = (
                rows_of(prepared[self.teacher.tokens]),
                prepared[self.teacher.extra_tokens].combine_chunks(),
            )
            vectors, norms = self._texts(np.concatenate([main, rows_of(extra.flatten())]))
            good = np.isfinite(norms) & (norms > 0)
            columns["text_embedding"] = _column(vectors[:rows], good[:rows])
            columns["text_norm"] = pa.array(norms[:rows], mask=~good[:rows])
            columns["extra_text_embeddings"] = pa.ListArray.from_arrays(
                extra.offsets, _column(vectors[rows:], good[rows:])
            )
            for row in np.flatnonzero(~good[:rows]):
                result.rejects.append((ids[row], "text embedding not finite", f"norm {norms[row]}"))
        result.features = pa.table(columns, schema=schema)
        result.seconds, result.forwards = time.monotonic() - started, self.forwards - before
        return result

    def _images(self, prepared: pa.Table) -> tuple[np.ndarray, np.ndarray]:
        geometry = self.teacher.description.geometry
        pixels = rows_of(prepared[self.teacher.pixels]).reshape(-1, geometry.size, geometry.size, geometry.channels)
        return self._run(self.model.encode_image, pixels, self.teacher.description.image_dim or 1)

    def _texts(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Generic captions repeat a lot; each distinct one goes through the tower once.
        distinct, back = np.unique(tokens, axis=0, return_inverse=True)
        vectors, norms = self._run(self.model.encode_text, distinct, self.teacher.description.text_dim or 1)
        return vectors[back], norms[back]

    @torch.inference_mode()
    def _run(
        self, tower: Callable[[torch.Tensor], torch.Tensor], inputs: np.ndarray, dim: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """Normalised float32 [N, D] rounded to half precision, and the norms [N] before normalisation."""
        vectors = np.empty((len(inputs), dim), np.float32)
        norms = np.empty(len(inputs), np.float32)
        on_gpu = self.device.startswith("cuda")
        autocast = _AUTOCAST[self.teacher.description.dtype] if on_gpu else None
        for start in range(0, len(inputs), self.micro_batch):
            chunk = inputs[start : start + self.micro_batch]
            padded = np.zeros((self.micro_batch, *inputs.shape[1:]), inputs.dtype)
            padded[: len(chunk)] = chunk
            batch = torch.from_numpy(padded)
            batch = batch.pin_memory().to(self.device, non_blocking=True) if on_gpu else batch
            with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
                out_BD = tower(batch).float()[: len(chunk)]
            norm_B = out_BD.norm(dim=1)
            unit_BD = (out_BD / norm_B.clamp_min(1e-12)[:, None]).half().float()
            vectors[start : start + len(chunk)] = unit_BD.cpu().numpy()
            norms[start : start + len(chunk)] = norm_B.cpu().numpy()
            self.forwards += 1
        return vectors, norms


def _column(vectors: np.ndarray, good: np.ndarray) -> pa.FixedSizeListArray:
    flat = np.where(good[:, None], vectors, 0).astype(np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), vectors.shape[1], mask=pa.array(~good))


def _absent(rows: int) -> tuple[pa.Array, pa.Array]:
    """Columns of a tower the teacher does not have."""
    return pa.nulls(rows, pa.list_(pa.float32(), 1)), pa.nulls(rows, pa.float32())
