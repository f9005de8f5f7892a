"""Embed a set of samples with several models: each picture is decoded once and fitted once per distinct geometry.

N = samples, M = distinct captions, P = (sample, caption) pairs, B = batch, D = width of a model.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from common.errors import EvaluateError
from common.images import ExactResize, UndecodableImageError, decode_rgb, each_once, fit
from common.logs import Progress, logger
from common.models.spec import Geometry
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.samples import EvaluationData, Sample


@dataclass
class EmbeddedData:
    """What is left of the samples once the pictures are embedded; row i of everything is sample i."""

    sample_ids: list[str] = field(default_factory=list)
    modalities: list[str] = field(default_factory=list)
    labels: list[tuple[str, ...]] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)
    """The M distinct captions, in order of first occurrence; a picture without captions adds none."""
    pairs_P2: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))
    """int64 rows (sample, caption)."""
    images: dict[str, np.ndarray] = field(default_factory=dict)
    """Model name -> unit vectors, float32 [N, D]."""

    def of_modality(self, modality: str) -> np.ndarray:
        """Positions of the samples of a modality, ascending."""
        return np.flatnonzero(np.array(self.modalities, dtype=object) == modality)


def embed_data(
    data: EvaluationData, models: Sequence[LoadedModel], batch_size: int, main_caption_only: bool = False
) -> EmbeddedData:
    """Embed all pictures with all models; memory holds the embeddings, one shard of encoded files, two batches.

    Samples whose picture cannot be decoded are left out and counted in the log.

    Args:
        data: The samples.
        models: Loaded, with distinct names.
        batch_size: Pictures per forward pass.
        main_caption_only: Keep only the first caption of each sample.

    Raises:
        EvaluateError: Not one picture could be decoded.
    """
    done = EmbeddedData()
    vectors: dict[str, list[np.ndarray]] = {model.name: [] for model in models}
    caption_index: dict[str, int] = {}
    pairs: list[tuple[int, int]] = []
    geometries = {model.description.geometry.key: model.description.geometry for model in models}
    progress = Progress("evaluate: pictures", data.count, "pictures")
    for samples, pixels in _prepared(data, geometries, batch_size):
        for model in models:
            vectors[model.name].append(model.embed_images(pixels[model.description.geometry.key], batch_size))
        for sample in samples:
            captions = dict.fromkeys(sample.captions[:1] if main_caption_only else sample.captions)
            columns = [caption_index.setdefault(caption, len(caption_index)) for caption in captions]
            pairs += [(len(done.sample_ids), column) for column in columns]
            done.sample_ids.append(sample.sample_id)
            done.modalities.append(sample.modality)
            done.labels.append(sample.labels)
        progress.advance(len(samples))
    if not done.sample_ids:
        raise EvaluateError(f"None of the {data.count} pictures of {data.words} could be decoded.")
    if len(done.sample_ids) < data.count:
        logger.info("evaluate: %d pictures could not be decoded", data.count - len(done.sample_ids))
    done.captions = list(caption_index)
    done.pairs_P2 = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    done.images = {name: np.concatenate(parts) for name, parts in vectors.items()}
    return done


Prepared = tuple[list[Sample], dict[str, np.ndarray]]


def _prepared(data: EvaluationData, geometries: dict[str, Geometry], batch_size: int) -> Iterator[Prepared]:
    """Batches with their pixels by geometry key; threads prepare the next batch while models embed the present one."""

    def prepare(sample: Sample) -> dict[str, np.ndarray] | None:
        try:
            image = decode_rgb(sample.image)
        except UndecodableImageError as error:
            logger.debug("evaluate: sample %s: %s", sample.sample_id, error)
            return None
        resize = each_once(ExactResize())
        return {key: fit(image, geometry, resize) for key, geometry in geometries.items()}

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        waiting: deque[tuple[list[Sample], list[Future]]] = deque()
        for batch in _batches(data, batch_size):
            waiting.append((batch, [pool.submit(prepare, sample) for sample in batch]))
            if len(waiting) > 1:
                yield from _whole(*waiting.popleft(), geometries)
        while waiting:
            yield from _whole(*waiting.popleft(), geometries)


def _batches(data: EvaluationData, batch_size: int) -> Iterator[list[Sample]]:
    for samples in data.stream():
        for start in range(0, len(samples), batch_size):
            yield samples[start : start + batch_size]


def _whole(samples: list[Sample], futures: list[Future], geometries: dict[str, Geometry]) -> Iterator[Prepared]:
    """The batch without the samples that could not be decoded; nothing if none are left."""
    results = [future.result() for future in futures]
    kept = [(sample, pixels) for sample, pixels in zip(samples, results, strict=True) if pixels is not None]
    if kept:
        yield [sample for sample, _ in kept], {key: np.stack([pixels[key] for _, pixels in kept]) for key in geometries}
