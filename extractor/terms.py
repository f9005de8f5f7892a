"""What teachers' authors allow: shown before anything runs, and agreed to where they set conditions on students."""

from __future__ import annotations

from common.errors import ConfigError, TermsError
from common.lake import Lake, now
from common.logs import logger
from common.models.spec import ModelSpec


def check_terms(lake: Lake, specs: list[ModelSpec], accepted: tuple[str, ...]) -> dict[str, str]:
    """Show the terms of every teacher, and insist on consent where they condition models trained on its outputs.

    Returns:
        Teacher -> when its terms were accepted, of those that need it; an acceptance in the lake still holds.

    Raises:
        TermsError: Consent is missing; names the teachers and their terms.
    """
    unknown = sorted(set(accepted) - {spec.name for spec in specs})
    if unknown:
        raise ConfigError(f"--accept-terms names {', '.join(unknown)}, which --teachers does not.")
    found: dict[str, str] = {}
    refused = []
    recorded = lake.recorded_teachers()
    for spec in specs:
        terms = spec.derivative_terms or "nothing is recorded; find out before you publish a student"
        logger.info("extract: terms of %s: %s; %s", spec.name, spec.license or "licence not known", terms)
        if not spec.needs_consent:
            continue
        earlier = lake.read_teacher(spec.name).get("terms_accepted_at") if spec.name in recorded else None
        if spec.name in accepted or earlier:
            found[spec.name] = str(earlier or now())
        else:
            refused.append(f"{spec.name} ({spec.license or 'licence not known'}): {terms}")
    if refused:
        names = ",".join(item.split(" ", 1)[0] for item in refused)
        raise TermsError(
            f"The terms of these teachers condition models trained on their outputs. {' '.join(refused)} If you may "
            f"use them, say so with --accept-terms {names}; it is recorded beside the embeddings and in the student's "
            "card."
        )
    return found
