"""The model card of an exported student: which data, which teachers on which terms, which recipe, which scores."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from common.captions import captioned
from common.config import fingerprint
from common.lake import Lake, now
from common.models.spec import ModelSpec
from common.storage import address_within
from common.version import VERSION
from trainer.checkpoint import Checkpoint
from trainer.evaluation.scores import read_scores
from trainer.evaluation.tables import format_markdown
from trainer.starting_weights import NOT_RECORDED

TEMPLATE = Path(__file__).parent / "model_card.md"


def write_model_card(
    folder: Path,
    name: str,
    checkpoint: Checkpoint,
    weights_sha256: str,
    lake: Lake | None,
    scores: pa.Table | None,
) -> None:
    """Write ``README.md`` next to a model's files.

    Args:
        folder: Holds ``open_clip_config.json``.
        name: Title of the card.
        checkpoint: Where the weights come from; its state holds the recipe.
        weights_sha256: Of the exported weights file.
        lake: What the data and the teachers are read from; None says so in the card.
        scores: Shown as they are; None looks in the lake for scores of these very weights.
    """
    if scores is None and lake is not None:
        scores = _scores_of(lake, weights_sha256)
    state = checkpoint.state()
    terms = _terms(lake, state["identity"])
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        program=f"mmkd {VERSION}",
        date=now()[:10],
        checkpoint=address_within(checkpoint.uri, lake.uri) if lake else checkpoint.uri,
        fingerprint=fingerprint(checkpoint.manifest),
        sha256=weights_sha256,
        loading=_loading(config.get("model_cfg", config)),
        data=_data(lake) if lake else "The checkpoint was exported away from its lake.",
        teachers=_teachers(terms),
        restrictions=restrictions(
            terms, _pair_counts(lake)["license"] if lake else (), state.get("first_weights") or {}
        ),
        recipe=f"```yaml\n{yaml.safe_dump(_recipe(state), sort_keys=False, allow_unicode=True)}```",
        scores=format_markdown(scores) if scores is not None else "Not evaluated yet (`mmkd evaluate`).",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def published_card(spec: ModelSpec, weights_sha256: str) -> str:
    """README.md of a published model that was only laid out anew: whose it is, and under which terms."""
    facts = [f"- {what}: {fact}" for what, fact in spec.facts.items()]
    terms = spec.derivative_terms or "nothing is recorded"
    return f"""# {spec.title or spec.name}

The authors' published weights in stock open_clip's layout, written by mmkd {VERSION} on {now()[:10]}
(weights sha256 `{weights_sha256}`). Nothing was trained.

Licence: {spec.license or "not known"}. Models trained on its outputs: {terms}.

**Research only.** It was not tested for any clinical use, and must not be used to decide about a patient.

{chr(10).join(facts)}
"""


def _scores_of(lake: Lake, weights_sha256: str) -> pa.Table | None:
    scores = read_scores(lake)
    if scores is None or weights_sha256 not in scores["weights_sha256"].to_pylist():
        return None
    return scores


def _recipe(state: dict[str, Any]) -> dict[str, Any]:
    names = ("stage", "asked", "first_weights", "extended", "step", "total_steps", "epoch", "metrics")
    kept = {key: state[key] for key in names if state.get(key) not in (None, {}, [])}
    return {**kept, **{key: value for key, value in state["identity"].items() if key != "teachers"}}


def _loading(model_cfg: dict[str, Any]) -> str:
    tower = model_cfg.get("text_cfg", {}).get("hf_model_name")
    if tower is None:
        return "Loading needs no network."
    return f"Loading fetches the configuration (not the weights) of the text tower `{tower}` from the model hub once."


def _pair_counts(lake: Lake) -> dict[str, Counter[str]]:
    """Column -> value -> number of pairs; pictures without a caption are none, nothing was trained on them."""
    counts: dict[str, Counter[str]] = {"split": Counter(), "modality": Counter(), "license": Counter()}
    for shard in lake.shards():
        table = lake.read_pairs(shard, ["captions", "modality", "license", "split"])
        table = table.filter(captioned(table["captions"]))
        for column, counter in counts.items():
            for entry in pc.value_counts(table[column]).to_pylist():
                counter[entry["values"] or "not stated"] += entry["counts"]
    return counts


def _data(lake: Lake) -> str:
    counts = _pair_counts(lake)
    name = lake.uri.rstrip("/").rpartition("/")[2]
    lines = [
        f"Lake `{name}`: {sum(counts['split'].values()):,} image-caption pairs ({_listed(counts['split'])}).",
        "",
        f"Modalities: {_listed(counts['modality'])}.",
        "",
        f"Licences of the pairs: {_listed(counts['license'])}.",
    ]
    return "\n".join(lines)


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


@dataclass(frozen=True)
class TeacherTerms:
    """What a teacher's partition records about its terms."""

    name: str
    license: str | None
    derivatives: str
    derivative_terms: str | None
    accepted_at: str | None
    weights_sha256: str


def _terms(lake: Lake | None, identity: dict[str, Any]) -> list[TeacherTerms]:
    present = lake.recorded_teachers() if lake else []
    found = []
    for name, fingerprinted in (identity.get("teachers") or {}).items():
        facts = lake.read_teacher(name) if lake and name in present else {}
        found.append(
            TeacherTerms(
                name=name,
                license=facts.get("license"),
                derivatives=facts.get("derivatives") or "unknown",
                derivative_terms=facts.get("derivative_terms"),
                accepted_at=facts.get("terms_accepted_at"),
                weights_sha256=str(fingerprinted.get("weights_sha256", "?")),
            )
        )
    return found


def _teachers(terms: list[TeacherTerms]) -> str:
    if not terms:
        return "None: the weights come from contrastive training on the pairs alone."
    lines = [
        "| teacher | licence | terms for models trained on its outputs | accepted | weights sha256 |",
        "|---|---|---|---|---|",
    ]
    for teacher in terms:
        said = teacher.derivative_terms or "not recorded: find out before you publish"
        if teacher.derivatives == "unknown" and teacher.derivative_terms:
            said += " (nobody has said whether that allows it)"
        accepted = (teacher.accepted_at or "")[:10] or "not needed"
        lines.append(
            f"| {teacher.name} | {teacher.license or 'not recorded'} | {said} | {accepted} | "
            f"`{teacher.weights_sha256[:16]}` |"
        )
    return "\n".join(lines)


def restrictions(
    terms: Sequence[TeacherTerms], pair_licenses: Iterable[str], first_weights: Mapping[str, str] | None = None
) -> str:
    """What the terms of teachers, pairs and first weights leave of the student's freedom, strictest first, as a list.

    Args:
        terms: Of the teachers.
        pair_licenses: Those of the pairs.
        first_weights: Name -> licence of what the student was started from.
    """
    by_kind = {
        kind: [t.name for t in terms if t.derivatives == kind] for kind in ("forbidden", "conditional", "unknown")
    }
    licensed = [
        *((t.name, t.license) for t in terms),
        *((f"pairs ({name})", name) for name in sorted(pair_licenses)),
        *((f"the first weights ({name}: {given})", given) for name, given in (first_weights or {}).items()),
    ]
    lines = []
    if by_kind["forbidden"]:
        lines.append(
            f"**Not to be used or passed on without the permission of the authors of {_and(by_kind['forbidden'])}**, "
            "whose terms forbid models trained on their outputs."
        )
    if whose := [name for name, given in licensed if _is_noncommercial(given)]:
        lines.append(f"**Non-commercial use only**, after the licences of {_and(whose)}.")
    if whose := [name for name, given in licensed if _is_share_alike(given)]:
        lines.append(
            f"**Share alike**: the licences of {_and(whose)} ask that what is adapted from them is passed on under "
            "the same one."
        )
    if by_kind["conditional"]:
        lines.append(f"Under the conditions of {_and(by_kind['conditional'])}, listed above.")
    if by_kind["unknown"]:
        lines.append(f"Not cleared: nobody has recorded what {_and(by_kind['unknown'])} allow; ask their authors.")
    if unrecorded := [name for name, given in (first_weights or {}).items() if given == NOT_RECORDED]:
        lines.append(f"Not cleared: nobody has recorded the licence of the first weights ({_and(unrecorded)}).")
    if not lines:
        return "None that the records of teachers, pairs and first weights show."
    return "\n".join(f"- {line}" for line in lines)


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _is_noncommercial(license_name: str | None) -> bool:
    return license_name is not None and re.search(r"(?i)\bNC\b|non-?commercial", license_name) is not None


def _is_share_alike(license_name: str | None) -> bool:
    return license_name is not None and re.search(r"(?i)\bSA\b|share-?alike", license_name) is not None
