"""Prompt templates: from a class label to the sentences whose mean embedding stands for the class."""

from __future__ import annotations

import re
import string
from pathlib import Path

from pydantic import Field, field_validator

from common.config import StrictModel, parse_config, read_yaml

PACKAGED = Path(__file__).parent / "templates" / "biomedical.yaml"
PLACEHOLDERS = ("label", "modality")

Prompts = tuple[str, ...]


class ModalityPrompts(StrictModel):
    """Templates for the modalities named; they replace the general ones there."""

    names: tuple[str, ...] = Field(min_length=1, description="Modalities; case, '-', '_' and spaces do not matter.")
    templates: Prompts = Field((), description="Each must hold {label}; empty means the general ones.")
    labels: dict[str, Prompts] = Field(
        default_factory=dict, description="Whole prompts for single labels, used instead of any template."
    )

    @field_validator("templates")
    @classmethod
    def _templates_are_sound(cls, templates: Prompts) -> Prompts:
        return _checked(templates, needs_label=True)

    @field_validator("labels")
    @classmethod
    def _label_prompts_are_sound(cls, labels: dict[str, Prompts]) -> dict[str, Prompts]:
        for label, prompts in labels.items():
            if not prompts:
                raise ValueError(f"the label {label!r} has no prompts")
        return {label: _checked(prompts, needs_label=False) for label, prompts in labels.items()}


class PromptTemplates(StrictModel):
    """The content of a templates file."""

    general: Prompts = Field(min_length=1, description="Templates for modalities without their own.")
    modalities: tuple[ModalityPrompts, ...] = Field((), description="Templates by modality; the first match counts.")

    @field_validator("general")
    @classmethod
    def _general_is_sound(cls, templates: Prompts) -> Prompts:
        return _checked(templates, needs_label=True)

    def prompts(self, label: str, modality: str) -> list[str]:
        """The sentences for a class of a modality, without repetition, in the order of the file."""
        own = next((e for e in self.modalities if _plain(modality) in {_plain(name) for name in e.names}), None)
        chosen = self.general
        if own is not None:
            by_label = {_plain(name): prompts for name, prompts in own.labels.items()}
            chosen = by_label.get(_plain(label)) or own.templates or self.general
        return list(dict.fromkeys(text.format(label=label, modality=modality) for text in chosen))


def load_templates(path: str | None) -> PromptTemplates:
    """Read a user's templates file, or the packaged one when ``path`` is None.

    Raises:
        ConfigError: The file is missing, or a template has an unknown placeholder or no {label}.
    """
    file = path or str(PACKAGED)
    return parse_config(PromptTemplates, read_yaml(file), f"the prompt templates in {file}")


def _checked(templates: Prompts, needs_label: bool) -> Prompts:
    for template in templates:
        found = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        unknown = [name for name in found if name not in PLACEHOLDERS]
        if unknown:
            known = ", ".join(f"{{{name}}}" for name in PLACEHOLDERS)
            raise ValueError(f"{template!r} has the unknown placeholder {{{unknown[0]}}} (known: {known})")
        if needs_label and "label" not in found:
            raise ValueError(f"{template!r} lacks {{label}}: all classes would get the same prompt")
    return templates


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]+", "", name).lower()
