"""The model card of an exported student: which data, which teachers on which terms, which recipe, which scores."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from string import Template
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import yaml

from common.config import fingerprint
from common.lake import Lake, now
from common.version import VERSION
from trainer.checkpoint import Checkpoint
from trainer.evaluation.scores import read_scores
from trainer.evaluation.tables import format_markdown

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
    config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        program=f"mmkd {VERSION}",
        date=now()[:10],
        checkpoint=checkpoint.uri,
        fingerprint=fingerprint(checkpoint.manifest),
        sha256=weights_sha256,
        loading=_loading(config.get("model_cfg", config)),
        data=_data(lake) if lake else "The checkpoint was exported away from its lake.",
        teachers=_teachers(lake, state["identity"]),
        recipe=f"```yaml\n{yaml.safe_dump(_recipe(state), sort_keys=False, allow_unicode=True)}```",
        scores=format_markdown(scores) if scores is not None else "Not evaluated yet (`mmkd evaluate`).",
    )
    (folder / "README.md").write_text(text, encoding="utf-8")


def _scores_of(lake: Lake, weights_sha256: str) -> pa.Table | None:
    scores = read_scores(lake)
    if scores is None or weights_sha256 not in scores["weights_sha256"].to_pylist():
        return None
    return scores


def _recipe(state: dict[str, Any]) -> dict[str, Any]:
    kept = {key: state[key] for key in ("stage", "step", "total_steps", "epoch", "metrics") if key in state}
    return {**kept, **{key: value for key, value in state["identity"].items() if key != "teachers"}}


def _loading(model_cfg: dict[str, Any]) -> str:
    tower = model_cfg.get("text_cfg", {}).get("hf_model_name")
    if tower is None:
        return "Loading needs no network."
    return f"Loading fetches the configuration (not the weights) of the text tower `{tower}` from the model hub once."


def _data(lake: Lake) -> str:
    splits: Counter[str] = Counter()
    modalities: Counter[str] = Counter()
    licences: Counter[str] = Counter()
    for shard in lake.shards():
        table = lake.read_pairs(shard, ["modality", "license", "split"])
        for column, counter in (("split", splits), ("modality", modalities), ("license", licences)):
            for entry in pc.value_counts(table[column]).to_pylist():
                counter[entry["values"] or "not stated"] += entry["counts"]
    lines = [
        f"Lake `{lake.uri}`: {sum(splits.values()):,} image-caption pairs ({_listed(splits)}).",
        "",
        f"Modalities: {_listed(modalities)}.",
        "",
        f"Licences of the pairs: {_listed(licences)}.",
    ]
    return "\n".join(lines)


def _listed(counter: Counter[str]) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counter.most_common())


def _teachers(lake: Lake | None, identity: dict[str, Any]) -> str:
    teachers = identity.get("teachers") or {}
    if not teachers:
        return "None: the weights come from contrastive training on the pairs alone."
    lines = ["| teacher | licence | terms for models trained on its outputs | weights sha256 |", "|---|---|---|---|"]
    present = lake.teachers() if lake else []
    for name, fingerprinted in teachers.items():
        facts = lake.read_teacher(name) if lake and name in present else {}
        weights = str(fingerprinted.get("weights_sha256", "?"))[:16]
        terms = facts.get("derivative_terms") or "not recorded: find out before you publish"
        lines.append(f"| {name} | {facts.get('license') or 'not recorded'} | {terms} | `{weights}` |")
    return "\n".join(lines)
