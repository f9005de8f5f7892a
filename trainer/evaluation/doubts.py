"""Sentences about figures that do not mean what they seem to; shown below the tables."""

from __future__ import annotations

from collections import Counter

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


def describe_classes(embedded: EmbeddedData, classes: dict[str, tuple[str, ...]]) -> list[str]:
    """For each modality that is classified how many pictures, of what, and what guessing would give."""
    found = []
    for modality in classes:
        labels = [embedded.labels[place] for place in embedded.of_modality(modality)]
        counts = Counter(label for label in labels if label is not None)
        known, (largest, most) = sum(counts.values()), counts.most_common(1)[0]
        shown = ", ".join(f"{label} {count}" for label, count in counts.most_common(8))
        more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
        found.append(
            f"{modality}: {known} pictures, {len(classes[modality])} classes ({shown}{more}); guessing gives "
            f"{100 / len(classes[modality]):.1f} %, always {largest!r} {100 * most / known:.1f} %"
        )
    return found
