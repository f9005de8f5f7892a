"""Zero-shot classification per modality: a picture's class is the one whose prompts it is closest to.

N = samples of a modality, C = its classes, D = width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
from scipy.special import softmax

from common.logs import logger
from common.seeding import rng
from trainer.evaluation.doubts import one_answer, same_prompts
from trainer.evaluation.embed import EmbeddedData
from trainer.evaluation.metrics import Score, classification_scores, mean_score
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.prompts import PromptTemplates
from trainer.evaluation.scores import MEAN, Measured

TASK = "zero_shot"


def classifiable(embedded: EmbeddedData, classes: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The modalities that can be scored: at least two classes, of which at least two have samples here.

    The others are named in the log.
    """
    chosen = {}
    for modality in sorted(set(embedded.modalities)):
        known = classes.get(modality, ())
        present = {embedded.labels[i] for i in embedded.of_modality(modality)} - {None}
        if len(known) >= 2 and len(present) >= 2:
            chosen[modality] = known
        else:
            logger.info(
                "zero-shot: %s is skipped: it takes two classes with samples, and it has %d classes, %d with samples",
                modality,
                len(known),
                len(present),
            )
    return chosen


def alike_classes(directions_CD: np.ndarray) -> list[list[int]]:
    """Groups of classes whose prompts have one and the same vector."""
    _, group_C = np.unique(directions_CD.round(6), axis=0, return_inverse=True)
    groups = [np.flatnonzero(group_C.reshape(-1) == group).tolist() for group in np.unique(group_C)]
    return [group for group in groups if len(group) > 1]


def class_directions(
    model: LoadedModel, labels: tuple[str, ...], modality: str, templates: PromptTemplates, batch_size: int
) -> np.ndarray:
    """One unit vector per class: the normalised mean of its normalised prompt embeddings. float32 [C, D]."""
    prompts = [templates.prompts(label, modality) for label in labels]
    vectors = model.embed_texts([text for texts in prompts for text in texts], batch_size)
    starts = np.cumsum([0, *(len(texts) for texts in prompts[:-1])])
    sums_CD = np.add.reduceat(vectors, starts, axis=0)
    # Opposite prompts could cancel out exactly; such a class has no direction and scores zero everywhere.
    lengths_C1 = np.maximum(np.linalg.norm(sums_CD, axis=1, keepdims=True), 1e-12)
    return (sums_CD / lengths_C1).astype(np.float32)


def zero_shot(
    model: LoadedModel,
    embedded: EmbeddedData,
    classes: Mapping[str, tuple[str, ...]],
    templates: PromptTemplates,
    *,
    batch_size: int,
    resamples: int,
    seed: int,
    doubts: list[str],
) -> Iterator[Measured]:
    """Accuracy, macro one-vs-rest AUC and macro F1 of one model, per modality and on average.

    Args:
        model: The model; its pictures are in ``embedded.images``.
        embedded: The samples.
        classes: What :func:`classifiable` returned.
        templates: From label to prompts.
        batch_size: Prompts per forward pass.
        resamples: Bootstrap resamples behind each interval; all models get the same ones.
        seed: Of the bootstrap.
        doubts: Gets a sentence for each figure that does not mean what it seems to.
    """
    by_metric: dict[str, list[Score]] = {}
    for modality, labels in classes.items():
        directions_CD = class_directions(model, labels, modality, templates, batch_size)
        rows = np.array([i for i in embedded.of_modality(modality) if embedded.labels[i] is not None])
        truth_N = np.array([labels.index(str(embedded.labels[i])) for i in rows])
        logits_NC = model.encoder.logit_scale * (embedded.images[model.name][rows] @ directions_CD.T)
        alike = alike_classes(directions_CD)
        if alike:
            doubts.append(same_prompts(model.name, modality, [[labels[place] for place in group] for group in alike]))
        predicted_N = logits_NC.argmax(1)
        if np.ptp(predicted_N) == 0:
            doubts.append(one_answer(model.name, modality, labels[predicted_N[0]], len(rows)))
        scores = classification_scores(
            softmax(logits_NC.astype(np.float64), axis=1), truth_N, resamples, rng(seed, TASK, modality)
        )
        for metric, score in scores.items():
            by_metric.setdefault(metric, []).append(score)
            yield Measured(TASK, modality, metric, score)
    for metric, found in by_metric.items():
        yield Measured(TASK, MEAN, metric, mean_score(found))
