"""What the report shows of a student: a few test pictures with the captions it finds best, and a map of embeddings."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch

from common.images import decode_rgb
from common.lake import open_lake
from common.seeding import rng
from trainer.config import EvaluateConfig
from trainer.evaluation.embed import EmbeddedData, embed_data
from trainer.evaluation.models import ModelUnderTest, load_under_test
from trainer.evaluation.samples import find_samples, lake_data

THUMBNAIL = 224


@dataclass(frozen=True)
class Found:
    """A caption a model chose for a picture, its cosine, and whether the picture carries that caption."""

    caption: str
    cosine: float
    right: bool


@dataclass(frozen=True)
class GalleryItem:
    """One picture (JPEG bytes, at most 224 pixels wide and high) with its own captions and those the model found."""

    jpeg: bytes
    modality: str
    labels: tuple[str, ...]
    captions: tuple[str, ...]
    found: tuple[Found, ...]


@dataclass(frozen=True)
class EmbeddingMap:
    """Picture embeddings on the two directions in which they differ most."""

    model: str
    points_N2: np.ndarray
    modalities: tuple[str, ...]
    explained: tuple[float, float]
    """Share of the variance along each direction."""


def pictures_of(
    lake_uri: str,
    model: ModelUnderTest,
    config: EvaluateConfig,
    pictures: int = 8,
    captions: int = 3,
    points: int = 2000,
) -> tuple[list[GalleryItem], EmbeddingMap]:
    """Embed a split with one model and draw the gallery and the map from it; the same seed draws the same.

    Args:
        lake_uri: A lake with samples in ``config.split``.
        model: Usually the distilled student.
        config: The split, limit, batch size and seed are used.
        pictures: In the gallery, dealt evenly to the modalities; those without captions are not shown.
        captions: Best ones per picture, out of all distinct captions of the split.
        points: At most this many on the map.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = lake_data(open_lake(lake_uri), config.split, config.limit)
    loaded = load_under_test(model, device)
    embedded = embed_data(data, [loaded], config.batch_size)
    images_ND = embedded.images[model.name]
    chosen = _deal(embedded, pictures, config.seed)
    captions_MD = loaded.embed_texts(embedded.captions, config.batch_size)
    samples = find_samples(data, {embedded.sample_ids[i] for i in chosen})
    items = []
    for i in chosen:
        sample = samples[embedded.sample_ids[i]]
        cosines_M = captions_MD @ images_ND[i]
        best = np.argsort(-cosines_M, kind="stable")[:captions]
        texts = [embedded.captions[j] for j in best]
        found = tuple(
            Found(text, float(cosines_M[j]), text in sample.captions) for text, j in zip(texts, best, strict=True)
        )
        items.append(GalleryItem(_thumbnail(sample.image), sample.modality, sample.labels, sample.captions, found))
    kept = np.sort(rng(config.seed, "map").permutation(len(images_ND))[:points])
    points_N2, explained = principal_plane(images_ND[kept])
    return items, EmbeddingMap(model.name, points_N2, tuple(embedded.modalities[i] for i in kept), explained)


def principal_plane(vectors_ND: np.ndarray) -> tuple[np.ndarray, tuple[float, float]]:
    """Project on the first two principal directions.

    Returns:
        float64 [N, 2], and the share of the variance along each; the sign of a direction is fixed by its largest
        coordinate, so that equal input gives an equal picture on any machine.
    """
    centred_ND = vectors_ND.astype(np.float64) - vectors_ND.mean(0, dtype=np.float64)
    # Vectors of the D x D covariance, not of the N x D matrix: N is much larger than D.
    variances, directions = np.linalg.eigh(centred_ND.T @ centred_ND)
    top_D2 = directions[:, ::-1][:, :2]
    top_D2 = top_D2 * np.sign(top_D2[np.abs(top_D2).argmax(0), np.arange(top_D2.shape[1])])
    total = max(float(variances.sum()), 1e-12)
    return centred_ND @ top_D2, (float(variances[-1] / total), float(variances[-2] / total))


def _deal(embedded: EmbeddedData, pictures: int, seed: int) -> list[int]:
    """Positions of the gallery's samples, which have captions: one of each modality in turn."""
    captioned = set(embedded.pairs_P2[:, 0].tolist())
    shuffled = rng(seed, "gallery").permutation(len(embedded.sample_ids))
    by_modality: dict[str, list[int]] = {name: [] for name in sorted(set(embedded.modalities))}
    for i in shuffled:
        if int(i) in captioned:
            by_modality[embedded.modalities[i]].append(int(i))
    rounds = [[queue[turn] for queue in by_modality.values() if turn < len(queue)] for turn in range(pictures)]
    return [i for turn in rounds for i in turn][:pictures]


def _thumbnail(image: bytes) -> bytes:
    picture = decode_rgb(image)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=88)
    return buffer.getvalue()
