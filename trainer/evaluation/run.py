"""The evaluate step: load models, embed a split once, score every task, write one Parquet file of scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import torch

from common.config import fingerprint
from common.errors import ConfigError, EvaluateError
from common.lake import open_lake
from common.logs import logger
from trainer.config import EvaluateConfig
from trainer.evaluation.doubts import FEW_CAPTIONS, describe_classes, few_captions, several_labels
from trainer.evaluation.embed import EmbeddedData, embed_data
from trainer.evaluation.models import LoadedModel, ModelUnderTest, has_both_towers, load_under_test
from trainer.evaluation.prompts import PromptTemplates, load_templates
from trainer.evaluation.retrieval import caption_counts, retrieval
from trainer.evaluation.samples import EvaluationData, lake_data
from trainer.evaluation.scores import Measured, Provenance, scores_table
from trainer.evaluation.zero_shot import classifiable, zero_shot


@dataclass(frozen=True)
class Evaluation:
    """The scores of a run of evaluate, and the address of the file that holds them."""

    scores: pa.Table
    uri: str
    doubts: tuple[str, ...] = ()
    """Sentences about figures that do not mean what they seem to."""


def evaluate(lake_uri: str, models: Sequence[ModelUnderTest], config: EvaluateConfig) -> Evaluation:
    """Score models on a split of a lake; the same models, data and settings write the same file again.

    Args:
        lake_uri: A lake with pairs; labels for zero_shot.
        models: With distinct names, from ``find_model``.
        config: What is measured, on which samples.

    Raises:
        ConfigError: Two models share a name, or the templates are not valid.
        LakeError: There is no such lake.
        ModelError: A model cannot be loaded.
        EvaluateError: The split is empty, or none of the tasks can be measured on it.
    """
    _check_names(models)
    lake = open_lake(lake_uri)
    templates = load_templates(config.templates)
    data = lake_data(lake, config.split, config.limit)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = [load_under_test(model, device) for model in with_both_towers(models)]
    embedded = embed_data(data, loaded, config.batch_size, main_caption_only=config.captions == "main")
    classes = classifiable(embedded, data.classes) if "zero_shot" in config.tasks else {}
    if "zero_shot" in config.tasks and not data.classes:
        logger.warning("evaluate: no pair of %s has a label, so there is nothing to classify", data.words)
    doubts = several_labels(embedded, classes)
    for line in (*describe_classes(embedded, classes), *doubts):
        logger.info("evaluate: %s", line)
    if "retrieval" in config.tasks:
        _say_without_captions(embedded)
        counts = caption_counts(embedded)
        doubts += [few_captions(name, count) for name, count in counts.items() if 2 <= count < FEW_CAPTIONS]
    name = _name(loaded, config, templates, data)
    tables = []
    for model in loaded:
        logger.info("evaluate: scoring %s", model.name)
        measured = list(_measure(model, embedded, classes, templates, config, doubts))
        weights = model.description.weights_sha256
        tables.append(scores_table(measured, Provenance(name, model.name, model.kind, data.name, data.split, weights)))
    scores = pa.concat_tables(tables)
    if not scores.num_rows:
        raise EvaluateError(
            f"Nothing can be measured on {data.words} with tasks {', '.join(config.tasks)}: zero_shot takes a modality "
            "with samples of two labels, retrieval takes two samples with different captions."
        )
    path = f"scores/{name}.parquet"
    lake.storage.write_table(path, scores, {"mmkd.evaluate_config": config.model_dump_json()})
    return Evaluation(scores, f"{lake.uri}/{path}", tuple(doubts))


def _name(
    models: Sequence[LoadedModel], config: EvaluateConfig, templates: PromptTemplates, data: EvaluationData
) -> str:
    """Of the file: depends on everything that determines the scores."""
    return fingerprint(
        {
            "models": {model.name: model.description.identity() for model in models},
            "config": config.model_dump(mode="json", exclude={"templates"}),
            "templates": templates.model_dump(mode="json"),
            "data": data.identity,
        }
    )


def _say_without_captions(embedded: EmbeddedData) -> None:
    without = len(embedded.sample_ids) - len(np.unique(embedded.pairs_P2[:, 0]))
    if without:
        logger.info("evaluate: %d pictures have no caption; retrieval leaves them out", without)


def _measure(
    model: LoadedModel,
    embedded: EmbeddedData,
    classes: dict[str, tuple[str, ...]],
    templates: PromptTemplates,
    config: EvaluateConfig,
    doubts: list[str],
) -> Iterator[Measured]:
    batch_size, resamples, seed = config.batch_size, config.bootstraps, config.seed
    if "zero_shot" in config.tasks:
        settings: dict[str, int] = {"batch_size": batch_size, "resamples": resamples, "seed": seed}
        yield from zero_shot(model, embedded, classes, templates, **settings, doubts=doubts)
    if "retrieval" in config.tasks:
        yield from retrieval(model, embedded, batch_size=batch_size, resamples=resamples, seed=seed)


def with_both_towers(models: Sequence[ModelUnderTest]) -> list[ModelUnderTest]:
    """The models that these tasks can score; image encoders are left out, with a line that says so.

    Raises:
        EvaluateError: None is left.
    """
    found = []
    for model in models:
        if has_both_towers(model):
            found.append(model)
        else:
            logger.warning("evaluate: %s has no text tower, so these tasks cannot score it; left out", model.name)
    if not found:
        raise EvaluateError(
            f"Models {', '.join(model.name for model in models)} have no text tower, so nothing can be scored: "
            "zero-shot classification and retrieval compare pictures with texts."
        )
    return found


def _check_names(models: Sequence[ModelUnderTest]) -> None:
    if not models:
        raise ConfigError("No model to evaluate was given. Name teachers, exported folders, checkpoints or runs.")
    names = [model.name for model in models]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ConfigError(f"Several models are called {', '.join(repeated)}. Give each its own name with NAME=ADDRESS.")
