"""A comparison in plain words: how the student stands against its teachers and against itself before distillation."""

from __future__ import annotations

from typing import NamedTuple

import pyarrow as pa

from trainer.evaluation.scores import MEAN

FIGURES = (  # (task, metric, words), the first one that was measured leads
    ("zero_shot", "accuracy", "zero-shot accuracy"),
    ("zero_shot", "auc", "zero-shot AUC"),
    ("retrieval", "image_to_text_recall@1", "image-to-text R@1"),
    ("retrieval", "text_to_image_recall@1", "text-to-image R@1"),
)


class Headline(NamedTuple):
    """One large figure with its words."""

    figure: str
    words: str
    is_student: bool


class _Standing(NamedTuple):
    """Means over modalities of one figure: the last student, the first student if there are two, the best teacher."""

    words: str
    modalities: int
    ahead: int
    """In how many modalities the last student is above every teacher."""
    student: dict
    before: dict | None
    teacher: dict | None


def headlines(scores: pa.Table) -> list[Headline]:
    """The leading figure of the last student, of the first one, and of the best teacher."""
    standings = _standings(scores)
    if not standings:
        return []
    lead = standings[0]
    found = [_headline(lead.student, lead.words, True)]
    found += [_headline(lead.before, lead.words, True)] if lead.before else []
    found += [_headline(lead.teacher, f"{lead.words}, best teacher", False)] if lead.teacher else []
    return found


def _headline(row: dict, words: str, is_student: bool) -> Headline:
    return Headline(f"{100 * row['value']:.1f} %", f"{row['model']}: mean {words}", is_student)


def summarise(scores: pa.Table) -> list[str]:
    """One sentence or two per measured figure; nothing is claimed beyond the intervals.

    Args:
        scores: Of the SCORES schema. With several students, the last one is the result and the first one its start.
    """
    return [_sentence(standing) for standing in _standings(scores)]


def _sentence(standing: _Standing) -> str:
    student, before, teacher = standing.student, standing.before, standing.teacher
    over = f"on average over {standing.modalities} modalities" if standing.modalities > 1 else "on one modality"
    text = f"{student['model']} reaches {_percent(student)} {standing.words} {over}"
    if student["chance"] is not None:
        text += f" (guessing: {100 * student['chance']:.1f} %)"
    if teacher is not None:
        text += f"; the best teacher on average, {teacher['model']}, reaches {_percent(teacher)}"
        text += f" ({_difference(student, teacher)})"
    text += "."
    if teacher is not None and standing.modalities > 1:
        text += f" It is above every teacher in {standing.ahead} of {standing.modalities} modalities."
    if before is not None:
        text += f" Before distillation ({before['model']}) it was {_percent(before)} ({_difference(student, before)})."
    return text


def _percent(row: dict) -> str:
    return f"{100 * row['value']:.1f} %"


def _difference(left: dict, right: dict) -> str:
    points = 100 * (left["value"] - right["value"])
    direction = "higher" if points >= 0 else "lower"
    apart = left["low"] > right["high"] or right["low"] > left["high"]
    return f"{abs(points):.1f} points {direction}; the 95 % intervals {'do not overlap' if apart else 'overlap'}"


def _standings(scores: pa.Table) -> list[_Standing]:
    rows = scores.to_pylist()
    found = []
    for task, metric, words in FIGURES:
        mine = [row for row in rows if row["task"] == task and row["metric"] == metric]
        means = [row for row in mine if row["modality"] == MEAN]
        students = [row for row in means if row["model_kind"] == "student"]
        teachers = [row for row in means if row["model_kind"] == "teacher"]
        if not students:
            continue
        modalities = {row["modality"] for row in mine} - {MEAN, "all"}
        before = students[0] if len(students) > 1 else None
        teacher = max(teachers, key=lambda row: row["value"], default=None)
        ahead = sum(_is_ahead(mine, modality, students[-1]["model"]) for modality in modalities)
        found.append(_Standing(words, len(modalities), ahead, students[-1], before, teacher))
    return found


def _is_ahead(rows: list[dict], modality: str, student: str) -> bool:
    here = [row for row in rows if row["modality"] == modality]
    own = next(row["value"] for row in here if row["model"] == student)
    return all(own > row["value"] for row in here if row["model_kind"] == "teacher")
