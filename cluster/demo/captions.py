"""The words of the demo's corpus: clean captions, partial ones, generic ones, and the zero-shot prompts."""

from dataclasses import dataclass

import numpy as np

from cluster.demo.modalities import MODALITIES

SIZE_WORDS = {"small": ("small", "minor"), "large": ("large", "extensive")}

FULL = (
    "{view} showing a {size} {finding} in the {place} {organ}",
    "{size} {finding} of the {place} {organ} on {view}",
    "{finding} , {size} , {place} {organ} ; {view}",
    "the {view} reveals {size} {finding} , {place} part of the {organ}",
)
PARTIAL = (
    "{view} with {finding}",
    "{finding} in the {organ} on {view}",
    "{finding} of the {place} {organ}",
    "{size} {finding} on {view}",
)
NORMAL = (
    "normal {view}",
    "{view} showing a normal {organ}",
    "{view} of a normal {organ} without any lesion",
    "unremarkable {organ} , normal {view}",
)
# What a paper prints under a figure when the reader is expected to look: it names the picture at most.
GENERIC = (
    "figure from the study",
    "representative image of one patient",
    "imaging at follow up",
    "axial view of a patient",
    "findings before treatment",
    "a case from our series",
    "{view} of a patient",
    "{view} at admission",
    "{view} from the second group",
    "{view} , see text for details",
)
PROMPTS = (
    "{view} showing a {finding} in the {organ}",
    "{view} with {finding}",
    "{finding} in the {organ} on {view}",
)
NORMAL_PROMPTS = ("normal {view}", "{view} showing a normal {organ}")


@dataclass(frozen=True)
class Scene:
    """What a picture shows. A normal picture has an empty place and size."""

    modality: str
    finding: str
    place: str = ""
    size: str = ""


def clean_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that names finding, place and size (or says that the picture is normal)."""
    return _fill(NORMAL if scene.finding == "normal" else FULL, scene, rng)


def partial_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that names the finding and leaves something out."""
    return _fill(NORMAL if scene.finding == "normal" else PARTIAL, scene, rng)


def generic_caption(scene: Scene, rng: np.random.Generator) -> str:
    """A caption that would fit any picture, or any picture of this modality."""
    return _fill(GENERIC, scene, rng)


def zero_shot_prompts(modality: str) -> dict[str, list[str]]:
    """Label -> prompts, one for every template and view of the modality; their embeddings are to be averaged."""
    known = MODALITIES[modality]
    return {
        label: [
            template.format(view=view, organ=known.organ, finding=finding.names[0])
            for template in (NORMAL_PROMPTS if finding.paint is None else PROMPTS)
            for view in known.views
        ]
        for label, finding in known.findings.items()
    }


def _fill(templates: tuple[str, ...], scene: Scene, rng: np.random.Generator) -> str:
    modality = MODALITIES[scene.modality]
    return str(rng.choice(templates)).format(
        view=rng.choice(modality.views),
        organ=modality.organ,
        finding=rng.choice(modality.findings[scene.finding].names),
        place=scene.place,
        size=rng.choice(SIZE_WORDS[scene.size]) if scene.size else "",
    )
