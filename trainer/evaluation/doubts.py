"""Sentences about figures that do not mean what they seem to; shown below the tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from trainer.evaluation.embed import EmbeddedData

FEW_CAPTIONS = 10
"""With fewer to choose from, a recall at 5 or 10 is high whatever the model."""


def same_prompts(model: str, modality: str, groups: list[list[str]]) -> str:
    """A model reads the prompts of several classes alike."""
    listing = "; ".join(", ".join(group) for group in groups)
    return (
        f"{model} gives the prompts of different classes of {modality} one and the same vector ({listing}), so it "
        "cannot tell them apart. Often the prompts are longer than what the model reads and differ only behind that: "
        "put {label} near their beginning."
    )


def one_answer(model: str, modality: str, label: str, count: int) -> str:
    """A model says the same of every picture."""
    return (
        f"{model} takes all {count} pictures of {modality} for {label!r}: its accuracy is the share of that class, and "
        "its interval says nothing."
    )


def few_captions(modality: str, count: int) -> str:
    """Retrieval among a handful of captions."""
    return (
        f"Retrieval in {modality} chooses among {count} distinct captions, so recall is high by chance: at 5 it is "
        f"{100 * min(1.0, 5 / count):.0f} % for a model that guesses. The mean over modalities contains it."
    )


def several_labels(embedded: EmbeddedData, classes: Mapping[str, tuple[str, ...]]) -> list[str]:
    """For each modality that is classified and has pictures of several labels: which figure is of which pictures."""
    found = []
    for modality in classes:
        labels = _labels_of(embedded, modality)
        several = sum(len(one) > 1 for one in labels)
        if not several:
            continue
        single = {one[0] for one in labels if len(one) == 1}
        others = (
            f"accuracy and F1 are of the {len(labels) - several} pictures with one label alone"
            if len(single) >= 2
            else "accuracy and F1 are not given, for pictures with one label alone do not show two classes"
        )
        found.append(
            f"{several} of {len(labels)} pictures of {modality} have several labels: {others}; AUC is of all, each "
            "class against the rest by its own cosines."
        )
    return found


def describe_classes(embedded: EmbeddedData, classes: Mapping[str, tuple[str, ...]]) -> list[str]:
    """For each modality that is classified how many pictures, of what, and what guessing would give."""
    found = []
    for modality in classes:
        labels = _labels_of(embedded, modality)
        counts = Counter(label for one in labels for label in one)
        shown = ", ".join(f"{label} {count}" for label, count in counts.most_common(8))
        more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
        line = f"{modality}: {len(labels)} pictures, {len(classes[modality])} classes ({shown}{more})"
        # Only where a picture has one label is there one right answer to guess.
        singles = Counter(one[0] for one in labels if len(one) == 1)
        if singles:
            largest, most = singles.most_common(1)[0]
            line += (
                f"; guessing gives {100 / len(classes[modality]):.1f} %, always {largest!r} "
                f"{100 * most / singles.total():.1f} %"
            )
        found.append(line)
    return found


def _labels_of(embedded: EmbeddedData, modality: str) -> list[tuple[str, ...]]:
    """The labels of each picture of a modality that has some."""
    return [embedded.labels[place] for place in embedded.of_modality(modality) if embedded.labels[place]]
