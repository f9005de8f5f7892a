"""Zero-shot classification per modality: a picture's class is the one whose prompts it is closest to.

A picture may have several labels. AUC then takes classes one by one, each ranked by its own cosines: probabilities
that sum to one, which serve where every picture has one label, would set the labels of a picture against each other.
Accuracy and F1 ask for the one class of a picture, so they are of the pictures with one label alone.

N = samples of a modality that have labels, C = its classes, D = width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from scipy.special import softmax

from common.logs import logger
from common.seeding import rng
from trainer.evaluation.doubts import one_answer, same_prompts
from trainer.evaluation.embed import EmbeddedData
from trainer.evaluation.metrics import Score, classification_scores, multilabel_score
from trainer.evaluation.models import LoadedModel
from trainer.evaluation.prompts import PromptTemplates
from trainer.evaluation.scores import Measured, mean_over_modalities

TASK = "zero_shot"


@dataclass(frozen=True)
class Truth:
    """The samples of a modality that have labels, and which."""

    rows_N: np.ndarray
    """Their positions, ascending."""
    has_NC: np.ndarray
    """Bool."""

    @property
    def is_single(self) -> np.ndarray:
        """Bool: the samples of exactly one label."""
        return self.has_NC.sum(1) == 1

    @property
    def several(self) -> int:
        """How many samples have several labels."""
        return int((~self.is_single).sum())

    @property
    def singles_can_be_scored(self) -> bool:
        """Whether samples of exactly one label have two classes among them."""
        return int(self.has_NC[self.is_single].any(0).sum()) >= 2


def truth_of(embedded: EmbeddedData, modality: str, classes: tuple[str, ...]) -> Truth:
    """Which samples of a modality have which of its classes."""
    rows_N = np.array([i for i in embedded.of_modality(modality) if embedded.labels[i]], np.int64)
    column = {label: place for place, label in enumerate(classes)}
    has_NC = np.zeros((len(rows_N), len(classes)), bool)
    for place, row in enumerate(rows_N):
        has_NC[place, [column[label] for label in embedded.labels[row]]] = True
    return Truth(rows_N, has_NC)


def classifiable(embedded: EmbeddedData, classes: Mapping[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
    """The modalities that can be scored: at least two classes, and samples here that differ in their labels.

    The others are named in the log.
    """
    chosen = {}
    for modality in sorted(set(embedded.modalities)):
        known = classes.get(modality, ())
        present_C = truth_of(embedded, modality, known).has_NC
        if len(known) >= 2 and (present_C != present_C[:1]).any():
            chosen[modality] = known
        else:
            logger.info(
                "zero-shot: %s is skipped: it takes two classes with samples, and it has %d classes, %d with samples%s",
                modality,
                len(known),
                present_C.any(0).sum(),
                ", the same for all of them" if present_C.any(0).sum() > 1 else "",
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
    by_metric: dict[str, list[Measured]] = {}
    for modality, labels in classes.items():
        directions_CD = class_directions(model, labels, modality, templates, batch_size)
        truth = truth_of(embedded, modality, labels)
        logits_NC = model.encoder.logit_scale * (embedded.images[model.name][truth.rows_N] @ directions_CD.T)
        alike = alike_classes(directions_CD)
        if alike:
            doubts.append(same_prompts(model.name, modality, [[labels[place] for place in group] for group in alike]))
        predicted_N = logits_NC[truth.is_single].argmax(1)
        if len(predicted_N) and np.ptp(predicted_N) == 0:
            doubts.append(one_answer(model.name, modality, labels[predicted_N[0]], len(predicted_N)))
        for metric, score in _scores(logits_NC, truth, modality, resamples, seed).items():
            one = Measured(TASK, modality, metric, score, len(labels), _chance(metric, len(labels)))
            by_metric.setdefault(metric, []).append(one)
            yield one
    for found in by_metric.values():
        yield mean_over_modalities(found)


def _scores(logits_NC: np.ndarray, truth: Truth, modality: str, resamples: int, seed: int) -> dict[str, Score]:
    single_N = truth.is_single
    probabilities = softmax(logits_NC[single_N].astype(np.float64), axis=1)
    classes = truth.has_NC[single_N].argmax(1)
    if not truth.several:
        return classification_scores(probabilities, classes, resamples, rng(seed, TASK, modality))
    found = {}
    if truth.singles_can_be_scored:
        wanted = ("accuracy", "f1")
        found = classification_scores(probabilities, classes, resamples, rng(seed, TASK, modality), wanted)
    # The model's scale is one number for all classes: it does not change the order of a class's own cosines.
    draw = rng(seed, TASK, modality, "several labels")
    return {**found, "auc": multilabel_score(logits_NC, truth.has_NC, resamples, draw)}


def _chance(metric: str, classes: int) -> float | None:
    """Of a guess that gives every class alike; F1 then depends on how frequent the classes are."""
    return {"accuracy": 1 / classes, "auc": 0.5}.get(metric)
