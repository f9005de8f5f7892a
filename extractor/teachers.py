"""A teacher as a plain callable: prepared table in, embeddings out. No Ray, so it runs in a test or a notebook."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pyarrow as pa

from common.config import differing_keys
from common.errors import ModelError
from common.models.load import load_model
from common.parquet_reading import single_chunk
from common.processes import usable_cores
from common.schemas import features_schema, vector_type
from extractor.events import EmbedFacts
from extractor.prepare import KILLS, SECONDS, VIEW_BOXES, TeacherInput, restrict_like, rows_of

if TYPE_CHECKING:  # the driver imports this file to place teachers elsewhere, and needs no torch for it
    import torch

LEAST_SPREAD = {"float16": 2**-10, "bfloat16": 2**-7}
"""Stored precision -> unit vectors of different inputs that differ by less in every dimension come from a broken tower.
Twice the step between the largest numbers, so that rounding alone never makes a difference."""
FEW_INPUTS = 16
"""So few inputs never prove a tower constant."""


class Embedded(NamedTuple):
    """One shard through one teacher; the two travel apart, since the facts are small."""

    facts: EmbedFacts
    features: pa.Table
    """Schema :func:`common.schemas.features_schema`, row-aligned with the pairs."""


@dataclass(frozen=True)
class CoreShare:
    """What a teacher on a CPU may use of its machine, which only its own process can see.

    Attributes:
        cpus: That Ray counts there. A local Ray counts more than there are, and a container may own fewer than it sees.
        teachers: That share them.
    """

    cpus: int
    teachers: int = 1

    def threads(self) -> int:
        """One for each core of the share.

        With more threads than cores, a matrix product waits for threads that have no core to run on: a ViT-B/32 with
        four threads on two cores was twenty times slower than with two.
        """
        return max(1, min(self.cpus, usable_cores()) // self.teachers)


class Teacher:
    """Loads one model on one device and embeds prepared tables with it.

    Args:
        teacher: Which model, and what its files say.
        device: Such as ``cpu`` or ``cuda``; ``auto`` takes the GPU that this process may see, if there is one.
        micro_batch: Rows per forward pass. The last one is padded, so every forward has the same shape and a
            sample's embedding does not depend on its neighbours.
        threads: torch threads on a CPU, or the share of the machine's cores; 0 leaves torch's choice.

    Raises:
        ModelError: The model does not load, or is another one than the run was planned with.
    """

    def __init__(
        self, teacher: TeacherInput, device: str = "auto", micro_batch: int = 64, threads: int | CoreShare = 0
    ) -> None:
        import torch

        from extractor.passes import MicroBatches

        if threads:
            torch.set_num_threads(threads.threads() if isinstance(threads, CoreShare) else threads)
        self.teacher = teacher
        self.device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.model = load_model(teacher.spec).to(self.device)
        dtype = teacher.description.dtype
        self.passes = MicroBatches(
            self.device,
            micro_batch,
            None if dtype == "float32" else getattr(torch, dtype),
            getattr(torch, teacher.stored_precision),
            torch.get_num_threads(),
        )
        found = restrict_like(teacher.description, self.model.description).identity()
        differing = differing_keys(teacher.description.identity(), found)
        if differing:
            raise ModelError(
                f"Teacher {teacher.name!r} on this machine is another model than the one the run was planned "
                f"with: {differing}. Pin a revision, or put the same files on every machine."
            )

    def describe_scale(self) -> float | None:
        """The factor on cosines that the model was trained with; None for an image encoder."""
        return self.model.logit_scale

    def where(self) -> str:
        """Node, device and process, such as ``10.0.0.7/cuda:2/4711``."""
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        device = f"cuda:{visible or 0}" if self.device.startswith("cuda") else "cpu"
        return f"{socket.gethostname()}/{device}/{os.getpid()}"

    def embed(self, prepared: pa.Table) -> Embedded:
        """Embed every picture, view and caption of a prepared shard.

        A row whose picture did not decode, that the model fails on, or whose vector is not finite or zero, gets a
        null and a reject; one without a caption gets a null for its text and no reject.

        Raises:
            ModelError: The model gives different inputs one and the same vector.
        """
        started, before = time.monotonic(), self.passes.count
        description, rows = self.teacher.description, prepared.num_rows
        found = prepared.schema.metadata or {}
        facts = EmbedFacts(
            prepared["shard"][0].as_py(),
            rows,
            started_at=time.time(),
            prepare_seconds=float(found.get(SECONDS, b"0")),
            decoder_kills=int(found.get(KILLS, b"0")),
        )
        has_views = VIEW_BOXES in prepared.column_names and bool(description.image_dim)
        schema = features_schema(description.image_dim, description.text_dim, has_views)
        columns: dict[str, pa.Array] = {"sample_id": prepared["sample_id"].combine_chunks()}
        columns["image_embedding"], columns["image_norm"] = _absent(rows)
        columns["text_embedding"], columns["text_norm"] = _absent(rows)
        columns["extra_text_embeddings"] = pa.nulls(rows, schema.field("extra_text_embeddings").type)
        if description.image_dim:
            columns.update(self._images(prepared, facts))
            if has_views:
                columns.update(self._views(prepared, facts))
        if description.text_dim:
            columns.update(self._texts(prepared, facts))
        facts.seconds, facts.forwards = time.monotonic() - started, self.passes.count - before
        facts.micro_batch, facts.device = self.passes.rows, self.where()
        return Embedded(facts, pa.table(columns, schema=schema))

    def _images(self, prepared: pa.Table, facts: EmbedFacts) -> dict[str, pa.Array]:
        errors = prepared["image_error"].to_pylist()
        decoded = np.array([error is None for error in errors], bool)
        pixels = self._square(rows_of(prepared[self.teacher.pixels]))
        vectors, norms, failures = self._run(self.model.encode_image, pixels, self.teacher.description.image_dim)
        good = _usable(norms) & decoded
        self._insist_on_spread("image", vectors, pixels, good)
        for row in np.flatnonzero(~good):
            if not decoded[row]:
                reason, detail = "image not decodable", errors[row]
            else:
                reason, detail = _why("image", norms[row], failures.get(int(row)))
            facts.rejects.append((prepared["sample_id"][row].as_py(), reason, detail))
        return {"image_embedding": _column(vectors, good), "image_norm": _norms(norms, good)}

    def _views(self, prepared: pa.Table, facts: EmbedFacts) -> dict[str, pa.Array]:
        boxes = prepared[VIEW_BOXES].combine_chunks()
        pixels = self._square(rows_of(single_chunk(prepared[self.teacher.view_pixels]).flatten()))
        vectors, norms, _ = self._run(self.model.encode_image, pixels, self.teacher.description.image_dim)
        views = len(pixels) // max(prepared.num_rows, 1)
        failed = np.array([error is not None for error in prepared["image_error"].to_pylist()], bool)
        good = _usable(norms) & ~np.repeat(failed, views)
        return {
            "view_boxes": boxes,
            "view_embeddings": pa.ListArray.from_arrays(boxes.offsets, _column(vectors, good)),
        }

    def _texts(self, prepared: pa.Table, facts: EmbedFacts) -> dict[str, pa.Array]:
        main, extra = (prepared[name].combine_chunks() for name in (self.teacher.tokens, self.teacher.extra_tokens))
        captioned = np.flatnonzero(main.is_valid().to_numpy(zero_copy_only=False))
        rows = len(captioned)
        tokens = np.concatenate([rows_of(main), rows_of(extra.flatten())])
        # Generic captions repeat a lot; each distinct one goes through the tower once.
        distinct, back = np.unique(tokens, axis=0, return_inverse=True)
        vectors, norms, failures = self._run(self.model.encode_text, distinct, self.teacher.description.text_dim)
        self._insist_on_spread("text", vectors, distinct, _usable(norms))
        vectors, norms = vectors[back], norms[back]
        good = _usable(norms)
        for row in np.flatnonzero(~good[:rows]):
            reason, detail = _why("text", norms[row], failures.get(int(back[row])))
            facts.rejects.append((prepared["sample_id"][int(captioned[row])].as_py(), reason, detail))
        return {
            "text_embedding": _column(*_spread(vectors[:rows], good[:rows], captioned, len(main))),
            "text_norm": _norms(*_spread(norms[:rows], good[:rows], captioned, len(main))),
            "extra_text_embeddings": pa.ListArray.from_arrays(extra.offsets, _column(vectors[rows:], good[rows:])),
        }

    def _square(self, flat_NK: np.ndarray) -> np.ndarray:
        geometry = self.teacher.description.geometry
        return flat_NK.reshape(-1, geometry.size, geometry.size, geometry.channels)

    def _run(
        self, tower: Callable[[torch.Tensor], torch.Tensor], inputs: np.ndarray, dim: int | None
    ) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
        assert dim is not None, "the caller looked"
        return self.passes.run(tower, inputs, dim)

    def _insist_on_spread(self, tower: str, vectors: np.ndarray, inputs: np.ndarray, good: np.ndarray) -> None:
        rows = np.flatnonzero(good)
        least = LEAST_SPREAD[self.teacher.stored_precision]
        if len(rows) < FEW_INPUTS or np.ptp(vectors[rows], axis=0).max() >= least:
            return
        # Row by row: a copy of a shard's pictures would take as much memory again.
        if any((inputs[row] != inputs[rows[0]]).any() for row in rows):
            raise ModelError(
                f"the {tower} tower gives {len(rows)} different inputs one and the same vector (no dimension "
                f"differs by {least:.1g}); its weights are broken or were loaded into the wrong architecture"
            )


def _usable(norms: np.ndarray) -> np.ndarray:
    return np.isfinite(norms) & (norms > 0)


def _why(tower: str, norm: float, failure: str | None) -> tuple[str, str]:
    if failure is not None:
        return f"{tower} tower failed", failure
    return f"{tower} embedding not finite", f"norm {norm}"


def _column(vectors: np.ndarray, good: np.ndarray) -> pa.FixedSizeListArray:
    flat = np.where(good[:, None], vectors, 0).astype(np.float32).reshape(-1)
    return pa.FixedSizeListArray.from_arrays(pa.array(flat), type=vector_type(vectors.shape[1]), mask=pa.array(~good))


def _norms(norms: np.ndarray, good: np.ndarray) -> pa.Array:
    return pa.array(norms, mask=~good)


def _spread(values: np.ndarray, good: np.ndarray, places: np.ndarray, rows: int) -> tuple[np.ndarray, np.ndarray]:
    """Values and which of them are good at their places among all rows of a shard; the others are not good."""
    if len(places) == rows:
        return values, good
    all_values, all_good = np.zeros((rows, *values.shape[1:]), values.dtype), np.zeros(rows, bool)
    all_values[places], all_good[places] = values, good
    return all_values, all_good


def _absent(rows: int) -> tuple[pa.Array, pa.Array]:
    """Columns of a tower the teacher does not have."""
    return pa.nulls(rows, vector_type(None)), pa.nulls(rows, pa.float32())
