"""Figures that do not mean what they seem to are named, and no others."""

import logging

import pyarrow as pa
import yaml

from common.lake import create_lake, shard_name
from common.schemas import PAIRS
from trainer.config import EvaluateConfig
from trainer.evaluation.models import find_model
from trainer.evaluation.run import evaluate
from trainer.evaluation.zero_shot import alike_classes

CONFIG = EvaluateConfig(bootstraps=20)


def test_prompts_that_end_alike_are_named(small_lake, model_folder, tmp_path):
    templates = tmp_path / "long.yaml"
    words = "a picture that was taken of a patient who had come to the clinic in the morning of that day"
    templates.write_text(yaml.safe_dump({"general": [f"{words}: {{label}}"]}))
    model = find_model(f"first={model_folder('a')}", {})
    found = evaluate(small_lake.uri, [model], CONFIG.model_copy(update={"templates": str(templates)}))
    alike = [doubt for doubt in found.doubts if "one and the same vector" in doubt]
    assert len(alike) == 2, "both modalities that have classes"
    assert (
        "first gives the prompts of different classes of fundus one and the same vector (cyst, lesion, normal)"
        in alike[0]
    )
    assert any("takes all" in doubt for doubt in found.doubts)


def test_few_captions_make_recall_easy(small_lake, model_folder):
    found = evaluate(
        small_lake.uri,
        [find_model(f"first={model_folder('a')}", {})],
        CONFIG.model_copy(update={"captions": "main"}),
    )
    (fundus,) = [doubt for doubt in found.doubts if doubt.startswith("Retrieval in fundus")]
    assert "among 3 distinct captions" in fundus
    assert "at 5 it is 100 %" in fundus


def test_classes_are_counted_and_guessing_is_priced(small_lake, model_folder, caplog):
    with caplog.at_level(logging.INFO):
        evaluate(small_lake.uri, [find_model(f"first={model_folder('a')}", {})], CONFIG)
    (line,) = [record.message for record in caplog.records if "fundus: " in record.message]
    assert "3 classes (" in line
    assert "guessing gives 33.3 %" in line


def test_a_lake_without_labels_says_so(small_lake, model_folder, tmp_path, caplog):
    bare = create_lake(str(tmp_path / "bare"), 40)
    for index in small_lake.shards():
        rows = [{**row, "labels": []} for row in small_lake.read_pairs(index).to_pylist()]
        bare.storage.write_table(f"pairs/{shard_name(index)}", pa.Table.from_pylist(rows, schema=PAIRS))
    with caplog.at_level(logging.WARNING):
        evaluate(bare.uri, [find_model(f"first={model_folder('a')}", {})], CONFIG)
    assert "no pair of bare/test has a label" in caplog.text


def test_classes_that_differ_are_not_alike():
    import numpy as np

    directions = np.eye(4, dtype=np.float32)[[0, 1, 0, 2]]
    assert alike_classes(directions) == [[0, 2]]
    assert alike_classes(np.eye(3, dtype=np.float32)) == []
