import io
import logging

import numpy as np
import pyarrow.compute as pc
import pytest
import torch
from changed_pairs import change_rows, without_captions
from PIL import Image
from sklearn.metrics import accuracy_score, f1_score, roc_auc_score

from common.errors import ConfigError, EvaluateError, ModelError, TrainError
from common.lake import create_lake, shard_name
from common.schemas import SCORES, check_table
from trainer.config import EvaluateConfig
from trainer.evaluation.models import find_model
from trainer.evaluation.prompts import load_templates
from trainer.evaluation.retrieval import recall_by_chance
from trainer.evaluation.run import evaluate
from trainer.evaluation.samples import lake_data
from trainer.evaluation.scores import read_scores
from trainer.evaluation.tables import format_markdown, format_table, sections

CONFIG = EvaluateConfig(bootstraps=50, batch_size=32)


def value(scores, **where) -> float:
    (row,) = [row for row in scores.to_pylist() if all(row[key] == wanted for key, wanted in where.items())]
    return row["value"]


def value_of(scores, column: str, **where):
    (row,) = [row for row in scores.to_pylist() if all(row[key] == wanted for key, wanted in where.items())]
    return row[column]


@pytest.fixture
def two_models(model_folder):
    return [find_model(f"first={model_folder('a')}", {}), find_model(f"second={model_folder('b', seed=1)}", {})]


def stock_embeddings(folder, samples, texts):
    """Unit vectors as stock open_clip gives them, without any of the code under test."""
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    model.eval()
    with torch.no_grad():
        pixels = torch.stack([preprocess(Image.open(io.BytesIO(sample.image)).convert("RGB")) for sample in samples])
        images, captions = (
            model.encode_image(pixels, normalize=True),
            model.encode_text(tokenizer(texts), normalize=True),
        )
    return images.numpy(), captions.numpy(), float(model.logit_scale.detach().exp())


def test_zero_shot_scores_equal_a_computation_with_stock_open_clip_and_scikit_learn(small_lake, model_folder):
    folder = model_folder("a")
    scores = evaluate(small_lake.uri, [find_model(f"first={folder}", {})], CONFIG).scores
    samples = [s for shard in lake_data(small_lake, "test").stream() for s in shard if s.modality == "fundus"]
    labels = ["cyst", "lesion", "normal"]
    prompts = [load_templates(None).prompts(label, "fundus") for label in labels]
    images, texts, scale = stock_embeddings(folder, samples, [text for group in prompts for text in group])
    directions, start = [], 0
    for group in prompts:
        mean = texts[start : start + len(group)].mean(0)
        directions.append(mean / np.linalg.norm(mean))
        start += len(group)
    logits = torch.from_numpy(scale * images @ np.stack(directions).T)
    truth = [labels.index(*sample.labels) for sample in samples]
    expected = {
        "accuracy": accuracy_score(truth, logits.argmax(1)),
        "f1": f1_score(truth, logits.argmax(1), average="macro", zero_division=0.0),
        "auc": roc_auc_score(truth, logits.double().softmax(1), multi_class="ovr"),
    }
    for metric, reference in expected.items():
        measured = value(scores, task="zero_shot", modality="fundus", metric=metric)
        assert measured == pytest.approx(reference, abs=1e-3), metric


def fundus_logits(small_lake, folder, labels):
    """Stock open_clip's logits of the test split's fundus pictures that have labels, and the samples."""
    samples = [s for shard in lake_data(small_lake, "test").stream() for s in shard]
    samples = [s for s in samples if s.modality == "fundus" and s.labels]
    prompts = [load_templates(None).prompts(label, "fundus") for label in labels]
    images, texts, scale = stock_embeddings(folder, samples, [text for group in prompts for text in group])
    means = [part.mean(0) for part in np.split(texts, np.cumsum([len(group) for group in prompts])[:-1])]
    directions = np.stack([mean / np.linalg.norm(mean) for mean in means])
    return scale * images @ directions.T, samples


def test_several_labels_are_scored_as_scikit_learn_scores_multi_hot_truth(small_lake, model_folder, caplog):
    folder, labels = model_folder("a"), ["cyst", "lesion", "normal"]

    by_number = {1: [], 2: ["lesion", "cyst", "lesion"], 3: ["normal"]}

    def relabel(number: int, row: dict) -> dict:
        return {**row, "labels": by_number.get(number % 4, row["labels"])} if row["modality"] == "fundus" else row

    change_rows(small_lake, relabel)
    with caplog.at_level("INFO", "mmkd"):
        result = evaluate(small_lake.uri, [find_model(f"first={folder}", {})], CONFIG)
    logits, samples = fundus_logits(small_lake, folder, labels)
    truth = np.array([[label in sample.labels for label in labels] for sample in samples])
    single = truth.sum(1) == 1
    assert 0 < single.sum() < len(samples)
    answers, right = logits[single].argmax(1), truth[single].argmax(1)
    expected = {
        "auc": (roc_auc_score(truth, logits, average="macro"), len(samples)),
        "accuracy": (accuracy_score(right, answers), single.sum()),
        "f1": (f1_score(right, answers, average="macro", labels=np.unique(right), zero_division=0.0), single.sum()),
    }
    for metric, (reference, count) in expected.items():
        (row,) = [row for row in result.scores.to_pylist() if (row["modality"], row["metric"]) == ("fundus", metric)]
        assert row["value"] == pytest.approx(reference, abs=1e-3), metric
        assert (row["n"], row["classes"]) == (count, 3)
        assert row["low"] <= row["value"] <= row["high"]
    several = len(samples) - single.sum()
    (doubt,) = [doubt for doubt in result.doubts if "several labels" in doubt]
    assert doubt.startswith(f"{several} of {len(samples)} pictures of fundus have several labels")
    assert f"accuracy and F1 are of the {single.sum()} pictures with one label alone" in doubt
    assert doubt in caplog.text


def test_where_every_picture_has_several_labels_there_is_auc_alone(small_lake, two_models):
    sets = [["cyst", "lesion"], ["lesion", "normal"], ["cyst", "normal"]]
    change_rows(
        small_lake,
        lambda number, row: {**row, "labels": sets[number % 3] if row["modality"] == "fundus" else row["labels"]},
    )
    result = evaluate(small_lake.uri, two_models[:1], CONFIG)
    rows = [row for row in result.scores.to_pylist() if row["task"] == "zero_shot"]
    assert {row["metric"] for row in rows if row["modality"] == "fundus"} == {"auc"}
    assert {row["metric"] for row in rows if row["modality"] == "x-ray"} == {"accuracy", "auc", "f1"}
    counts = {row["metric"]: row["n"] for row in rows if row["modality"] == "mean"}
    assert counts["auc"] > counts["accuracy"]  # the mean of accuracy is of X-rays alone
    assert any("accuracy and F1 are not given" in doubt for doubt in result.doubts)
    columns = [section.columns for section in sections(result.scores)[:2]]
    assert columns == [["x-ray", "mean"], ["fundus", "x-ray", "mean"]]


def test_labels_that_are_the_same_for_all_tell_nothing(small_lake, two_models, caplog):
    change_rows(
        small_lake,
        lambda _, row: {**row, "labels": ["cyst", "lesion"] if row["modality"] == "fundus" else row["labels"]},
    )
    with caplog.at_level("INFO", "mmkd"):
        scores = evaluate(small_lake.uri, two_models[:1], CONFIG).scores
    assert "fundus" not in {row["modality"] for row in scores.to_pylist() if row["task"] == "zero_shot"}
    assert "fundus is skipped" in caplog.text
    assert "2 with samples, the same for all of them" in caplog.text


def test_pictures_without_captions_are_classified_and_not_retrieved(small_lake, two_models, caplog):
    full = evaluate(small_lake.uri, two_models[:1], CONFIG)
    kinds = small_lake.read_pairs(0)["modality"].to_pylist() + small_lake.read_pairs(1)["modality"].to_pylist()
    without_captions(small_lake, lambda number: number % 5 == 0 or kinds[number] == "x-ray")
    with caplog.at_level("INFO", "mmkd"):
        found = evaluate(small_lake.uri, two_models[:1], CONFIG)

    def of(scores, task):
        return {
            (row["modality"], row["metric"]): (row["value"], row["n"])
            for row in scores.to_pylist()
            if row["task"] == task
        }

    assert of(found.scores, "zero_shot") == of(full.scores, "zero_shot")
    told = [s for shard in lake_data(small_lake, "test").stream() for s in shard if s.captions]
    counts = of(found.scores, "retrieval")
    assert counts["all", "image_to_text_recall@1"][1] == len(told) < 48
    assert counts["all", "text_to_image_recall@1"][1] == len({text for s in told for text in s.captions})
    assert not any(modality == "x-ray" for modality, _ in counts)
    assert f"{48 - len(told)} pictures have no caption; retrieval leaves them out" in caplog.text
    assert "retrieval: x-ray is skipped: 0 pictures with captions" in caplog.text
    # Fewer pictures to choose from than if those without captions were among the candidates.
    chance = value_of(found.scores, "chance", modality="all", metric="text_to_image_recall@1")
    assert chance >= 1 / len(told)


def test_a_lake_without_captions_is_classified(small_lake, two_models):
    without_captions(small_lake)
    scores = evaluate(small_lake.uri, two_models[:1], CONFIG).scores
    assert set(scores["task"].to_pylist()) == {"zero_shot"}
    with pytest.raises(EvaluateError, match="Nothing can be measured on lake/test"):
        evaluate(small_lake.uri, two_models[:1], CONFIG.model_copy(update={"tasks": ("retrieval",)}))


def test_retrieval_scores_equal_a_plain_count(small_lake, model_folder):
    folder = model_folder("a")
    scores = evaluate(small_lake.uri, [find_model(f"first={folder}", {})], CONFIG).scores
    samples = [sample for shard in lake_data(small_lake, "test").stream() for sample in shard]
    texts = sorted({caption for sample in samples for caption in sample.captions})
    images, captions, _ = stock_embeddings(folder, samples, texts)
    cosines = images @ captions.T
    right = np.array([[text in sample.captions for text in texts] for sample in samples])
    for direction, grid, matches in (("image_to_text", cosines, right), ("text_to_image", cosines.T, right.T)):
        for k in (1, 5, 10):
            top = np.argsort(-grid, axis=1)[:, :k]
            expected = np.take_along_axis(matches, top, axis=1).any(1).mean()
            measured = value(scores, task="retrieval", modality="all", metric=f"{direction}_recall@{k}")
            assert measured == pytest.approx(expected, abs=0.03)


def test_scores_table_is_whole_and_written(small_lake, two_models):
    result = evaluate(small_lake.uri, two_models, CONFIG)
    check_table(result.scores, SCORES, "scores")
    assert read_scores(small_lake).equals(result.scores)
    rows = result.scores.to_pylist()
    assert {row["model"] for row in rows} == {"first", "second"}
    assert {row["modality"] for row in rows if row["task"] == "zero_shot"} == {"x-ray", "fundus", "mean"}
    assert {row["modality"] for row in rows if row["task"] == "retrieval"} == {
        "x-ray",
        "fundus",
        "specimen",
        "mean",
        "all",
    }
    assert all(0 <= row["low"] <= row["high"] <= 1 and len(row["weights_sha256"]) == 64 for row in rows)
    mean = value(result.scores, model="first", task="zero_shot", modality="mean", metric="auc")
    parts = [
        value(result.scores, model="first", task="zero_shot", modality=modality, metric="auc")
        for modality in ("x-ray", "fundus")
    ]
    assert mean == pytest.approx(np.mean(parts))


def test_scores_say_split_classes_chance_and_their_file(small_lake, two_models):
    result = evaluate(small_lake.uri, two_models, CONFIG)
    rows = result.scores.to_pylist()
    assert {(row["dataset"], row["split"]) for row in rows} == {("lake", "test")}
    assert {f"{small_lake.uri}/scores/{row['evaluation']}.parquet" for row in rows} == {result.uri}
    zero_shot = {(row["modality"], row["metric"]): row for row in rows if row["task"] == "zero_shot"}
    told = {place: (row["classes"], row["chance"]) for place, row in zero_shot.items()}
    assert told["fundus", "accuracy"] == (3, pytest.approx(1 / 3))
    assert told["x-ray", "accuracy"] == (2, 0.5)
    assert told["mean", "accuracy"] == (None, pytest.approx((1 / 3 + 1 / 2) / 2))
    assert told["fundus", "auc"] == (3, 0.5)
    assert told["mean", "auc"] == (None, 0.5)
    assert told["fundus", "f1"] == (3, None)
    assert told["mean", "f1"] == (None, None)
    assert all(row["classes"] is None for row in rows if row["task"] == "retrieval")
    assert all(0 < row["chance"] <= 1 for row in rows if row["task"] == "retrieval")


@pytest.mark.parametrize("k", [1, 3, 10])
def test_recall_by_chance_is_what_random_orders_give(k):
    assert recall_by_chance(np.ones(7, int), 20, k) == pytest.approx(k / 20)
    assert recall_by_chance(np.ones(4, int), 4, k) == pytest.approx(min(1, k / 4))
    draw, right = np.random.default_rng(0), np.array([1, 2, 5])
    hits = [[(draw.permutation(12)[:k] < count).any() for count in right] for _ in range(4000)]
    assert recall_by_chance(right, 12, k) == pytest.approx(np.mean(hits), abs=0.02)


def test_a_rerun_writes_the_same_file_and_another_setting_writes_another(small_lake, two_models):
    first = evaluate(small_lake.uri, two_models, CONFIG)
    again = evaluate(small_lake.uri, two_models, CONFIG)
    assert again.uri == first.uri
    assert again.scores.drop(["created_at"]).equals(first.scores.drop(["created_at"]))
    other = evaluate(small_lake.uri, two_models, CONFIG.model_copy(update={"limit": 20}))
    assert other.uri != first.uri
    assert len(small_lake.storage.list_files("scores")) == 2


def test_scores_do_not_depend_on_the_batch_or_on_the_other_models(small_lake, two_models):
    both = evaluate(small_lake.uri, two_models, CONFIG).scores
    alone = evaluate(small_lake.uri, two_models[1:], CONFIG.model_copy(update={"batch_size": 7})).scores
    second = both.filter(pc.equal(both["model"], "second"))
    assert alone["metric"].equals(second["metric"])
    np.testing.assert_allclose(alone["value"].to_numpy(), second["value"].to_numpy(), atol=0.03)


def test_main_captions_alone_make_fewer_candidates(small_lake, two_models):
    config = CONFIG.model_copy(update={"tasks": ("retrieval",), "captions": "main"})
    scores = evaluate(small_lake.uri, two_models[:1], config).scores
    counts = {row["metric"]: row["n"] for row in scores.to_pylist() if row["modality"] == "all"}
    assert counts["image_to_text_recall@1"] == 48
    assert counts["text_to_image_recall@1"] == 6  # one distinct main caption per modality and label


def test_a_picture_that_cannot_be_decoded_is_left_out(small_lake, two_models):
    table = small_lake.read_pairs(0).to_pylist()
    table[0]["image"] = b"not a picture"
    import pyarrow as pa

    small_lake.storage.write_table(
        f"pairs/{shard_name(0)}", pa.Table.from_pylist(table, schema=small_lake.read_pairs(0).schema)
    )
    scores = evaluate(small_lake.uri, two_models[:1], CONFIG).scores
    counts = {row["metric"]: row["n"] for row in scores.to_pylist() if row["modality"] == "all"}
    assert counts["image_to_text_recall@1"] == 47


def test_a_modality_with_one_label_is_skipped_and_said(small_lake, two_models, caplog):
    logging.getLogger("mmkd").propagate = True
    with caplog.at_level("INFO", logger="mmkd"):
        evaluate(small_lake.uri, two_models[:1], CONFIG)
    assert "specimen is skipped" in caplog.text


def test_checkpoint_run_and_export_are_students_with_equal_scores(small_lake, checkpoint, tmp_path):
    from pathlib import Path

    from trainer.export import export_checkpoint

    run = Path(small_lake.uri) / "runs" / "stage2-abc"
    checkpoint(run, step=5, seed=3)
    newest = checkpoint(run, step=10, seed=4)
    exported = export_checkpoint(str(newest), str(tmp_path / "student"))
    models = [find_model(str(run), {}), find_model(str(newest), {}), find_model(exported, {})]
    assert [model.name for model in models] == ["stage2-abc", "stage2-abc-step-00000010", "student"]
    assert {model.kind for model in models} == {"student"}
    scores = evaluate(small_lake.uri, models, CONFIG).scores
    assert len(set(scores["weights_sha256"].to_pylist())) == 1
    by_model = [scores.filter(pc.equal(scores["model"], m.name))["value"].to_pylist() for m in models]
    assert by_model[0] == by_model[1] == by_model[2]


def test_clear_errors(small_lake, two_models, model_folder, tmp_path):
    with pytest.raises(ConfigError, match="Several models are called first"):
        evaluate(small_lake.uri, [two_models[0], two_models[0]], CONFIG)
    with pytest.raises(ConfigError, match="No model"):
        evaluate(small_lake.uri, [], CONFIG)
    with pytest.raises(EvaluateError, match="no samples in split 'val'"):
        evaluate(small_lake.uri, two_models, CONFIG.model_copy(update={"split": "val"}))
    with pytest.raises(ModelError, match="Unknown model 'nobody'"):
        find_model("nobody", {})
    with pytest.raises(ModelError, match="not a model folder"):
        find_model(str(tmp_path), {})
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)  # killed before the first was whole
    with pytest.raises(TrainError, match="no checkpoint at"):
        find_model(str(tmp_path / "run"), {})


def test_broken_weights_are_an_error_and_not_a_perfect_rank(small_lake, model_folder):
    from safetensors.torch import load_file, save_file

    folder = model_folder("broken")
    tensors = load_file(folder / "open_clip_model.safetensors")
    tensors["visual.proj"] = torch.full_like(tensors["visual.proj"], float("nan"))
    save_file(tensors, folder / "open_clip_model.safetensors")
    with pytest.raises(EvaluateError, match="NaN"):
        evaluate(small_lake.uri, [find_model(str(folder), {})], CONFIG)


def test_nothing_measurable_is_an_error(tmp_path, two_models, small_lake):
    import pyarrow as pa

    lake = create_lake(str(tmp_path / "one"), shard_rows=10)
    rows = [row for row in small_lake.read_pairs(0).to_pylist() if row["split"] == "test"][:1]
    lake.storage.write_table(
        f"pairs/{shard_name(0)}", pa.Table.from_pylist(rows, schema=small_lake.read_pairs(0).schema)
    )
    with pytest.raises(EvaluateError, match="Nothing can be measured"):
        evaluate(lake.uri, two_models, CONFIG)


def test_tables_for_people(small_lake, two_models):
    scores = evaluate(small_lake.uri, two_models, CONFIG).scores
    accuracy = sections(scores)[0]
    assert accuracy.columns == ["fundus", "x-ray", "mean"]
    assert accuracy.models == ["first", "second"]
    for column in range(3):
        column_cells = [row[column] for row in accuracy.cells]
        best = max(cell.value for cell in column_cells)
        is_alone = [cell.value for cell in column_cells].count(best) == 1  # two that are level are neither the best
        assert all(cell.best == (cell.value == best and is_alone) for cell in column_cells)
    assert accuracy.footer == [["(guessing)", "33.3", "50.0", "41.7"], ["(n)", "24", "16", "40"]]
    text = format_table(scores, width=200)
    assert "Zero-shot accuracy, percent" in text
    assert "I2T R@10" in text
    assert all(len(line) <= 200 for line in text.splitlines())
    narrow = format_table(scores, width=60).split("\n\n")[0].splitlines()
    assert narrow[3].count("[") == 1  # only the mean keeps its interval
    markdown = format_markdown(scores)
    assert markdown.count("| first |") == 4
    assert "**" in markdown
