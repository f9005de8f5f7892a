"""Alignments of small lakes: fitted to the rows that count, kept, found again, refused when they do not fit."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from changed_pairs import without_captions

from common.errors import LakeError, TrainError
from common.lake import open_lake
from trainer.alignment.agreement import describe_agreement, format_agreement
from trainer.alignment.align import align
from trainer.alignment.maps import AffineMap, load_alignment
from trainer.config import AlignConfig, AutoencoderConfig, DistillConfig
from trainer.objectives import DistillObjective
from trainer.stage2 import insist_on_one_space, insist_on_width, teacher_dims
from trainer.student import StudentOutput
from trainer.teacher_vectors import TeacherBatch
from trainer.train_rows import TrainRows

PAPER = AlignConfig(recipe="paper", autoencoder=AutoencoderConfig(latent_dim=16, hidden_dim=24, epochs=4, lr=1e-2))
BOTH = ("alpha", "beta")


def admitted(uri, teacher, side):
    """The train rows a teacher may speak for, read by hand."""
    lake, found = open_lake(uri), []
    for shard in lake.shards():
        pairs, features = lake.read_pairs(shard).to_pylist(), lake.read_features(teacher, shard).to_pylist()
        chosen = lake.storage.read_table(f"selection/sel/teacher={teacher}/shard-{shard:06d}.parquet").to_pylist()
        for pair, feature, row in zip(pairs, features, chosen, strict=True):
            if pair["split"] == "train" and row["admitted"] and feature[f"{side}_embedding"] is not None:
                found.append(feature[f"{side}_embedding"])
    return np.array(found, np.float32)


def test_standardised_vectors_have_mean_0_and_variance_1_over_the_rows_that_count(tiny_lake):
    name = align(tiny_lake, AlignConfig())
    alignment = load_alignment(open_lake(tiny_lake), name, BOTH)
    assert alignment.recipe == "standardise"
    for teacher in BOTH:
        for side in ("image", "text"):
            mapped = alignment.maps[teacher][side](admitted(tiny_lake, teacher, side))
            np.testing.assert_allclose(mapped.mean(axis=0), 0, atol=1e-4)
            np.testing.assert_allclose(mapped.var(axis=0).mean(), 1, rtol=1e-3)


def test_rows_without_a_caption_are_left_out_whoever_may_speak(tiny_lake, caplog):
    """A selection that another tool made may admit them."""
    lake = without_captions(open_lake(tiny_lake), lambda number: number % 4 == 0)
    silent = [
        not row["captions"]
        for shard in lake.shards()
        for row in lake.read_pairs(shard).to_pylist()
        if row["split"] == "train"
    ]
    rows = TrainRows(lake, "sel", BOTH)
    read = [rows.read(shard)["alpha"]["image"] for shard in lake.shards()]
    assert sum(map(len, read)) == len(silent) - sum(silent)
    with caplog.at_level("INFO", "mmkd"):
        align(tiny_lake, AlignConfig())
    assert f"align: {sum(silent)} train rows have no caption and are left out" in caplog.text


def test_the_papers_space_is_one_for_all_teachers(tiny_lake):
    name = align(tiny_lake, PAPER)
    lake = open_lake(tiny_lake)
    alignment = load_alignment(lake, name, BOTH)
    assert {teacher: maps["image"].matrix_TW.shape for teacher, maps in alignment.maps.items()} == {
        "alpha": (8, 16),
        "beta": (12, 16),
    }
    assert teacher_dims(lake, BOTH, alignment) == {"alpha": (16, 16), "beta": (16, 16)}
    insist_on_width(teacher_dims(lake, BOTH, alignment), 16)
    manifest = lake.storage.read_json(f"alignment/{name}/alignment.json")
    assert manifest["course"][-1] < manifest["course"][0]
    before, after = manifest["agreement"]["pairs"]["alpha | beta"]["image"]["cosine"]
    assert before is None  # 8 and 12 dimensions
    assert -1 <= after <= 1
    with pytest.raises(TrainError, match=r"alpha has 8 and 8; beta has 12 and 12.*mmkd align"):
        insist_on_width(teacher_dims(lake, BOTH, None), 16)


def test_asked_again_it_is_found_and_is_the_newest(tiny_lake):
    lake = open_lake(tiny_lake)
    first, second = align(tiny_lake, AlignConfig()), align(tiny_lake, AlignConfig(teachers=("beta",)))
    assert load_alignment(lake, "newest", ("beta",)).name == second
    mark = lake.storage.read_bytes(f"alignment/{first}/maps.safetensors")
    assert align(tiny_lake, AlignConfig()) == first
    assert lake.storage.read_bytes(f"alignment/{first}/maps.safetensors") == mark
    assert load_alignment(lake, "newest", BOTH).name == first


def test_what_does_not_fit_is_refused(tiny_lake):
    lake = open_lake(tiny_lake)
    with pytest.raises(LakeError, match="has no alignment yet"):
        load_alignment(lake, "newest", BOTH)
    name = align(tiny_lake, AlignConfig(teachers=("alpha",)))
    with pytest.raises(LakeError, match=f"has no alignment 'other'; it has {name}"):
        load_alignment(lake, "other", BOTH)
    with pytest.raises(LakeError, match=r"does not cover beta"):
        load_alignment(lake, name, BOTH)
    manifest = lake.read_teacher("alpha")
    changed = {**manifest, "fingerprint": {**manifest["fingerprint"], "weights_sha256": "other"}}
    lake.storage.write_json("manifests/teachers/alpha.json", changed)
    with pytest.raises(LakeError, match="fitted to other embeddings of alpha"):
        load_alignment(lake, name, ("alpha",))


def test_an_unfinished_alignment_does_not_count(tiny_lake):
    lake = open_lake(tiny_lake)
    name = align(tiny_lake, AlignConfig())
    lake.storage.remove(f"alignment/{name}/alignment.json")
    with pytest.raises(LakeError, match="has no alignment yet"):
        load_alignment(lake, "newest", BOTH)
    assert align(tiny_lake, AlignConfig()) == name


def test_an_image_encoder_is_standardised_on_its_side_and_has_no_place_in_the_papers_space(lake_with_image_encoder):
    from trainer.config import SelectConfig
    from trainer.selection.select import select

    select(lake_with_image_encoder, SelectConfig(teachers=("alpha", "pixels"), min_skill=0.5))
    name = align(lake_with_image_encoder, AlignConfig())
    alignment = load_alignment(open_lake(lake_with_image_encoder), name, ("alpha", "pixels"))
    assert set(alignment.maps["pixels"]) == {"image"}
    with pytest.raises(TrainError, match="unlike pixels"):
        align(lake_with_image_encoder, PAPER)


def test_a_teacher_that_may_speak_nowhere_is_not_given_a_map_by_chance(tiny_lake):
    lake = open_lake(tiny_lake)
    for shard in lake.shards():
        name = f"selection/sel/teacher=beta/shard-{shard:06d}.parquet"
        rows = lake.storage.read_table(name)
        nowhere = pa.array([False] * len(rows))
        index = rows.column_names.index("admitted")
        lake.storage.write_table(name, rows.set_column(index, "admitted", nowhere))
    for recipe in ("paper", "standardise"):
        with pytest.raises(TrainError, match="beta"):
            align(tiny_lake, PAPER.model_copy(update={"recipe": recipe}))
    assert lake.storage.list_folders("alignment") == []


def test_without_maps_teachers_speak_as_they_are(tiny_lake):
    lake = open_lake(tiny_lake)
    name = align(tiny_lake, AlignConfig(recipe="none"))
    alignment = load_alignment(lake, name, BOTH)
    assert (alignment.recipe, alignment.maps) == ("none", {"alpha": {}, "beta": {}})
    assert teacher_dims(lake, BOTH, alignment) == teacher_dims(lake, BOTH, None)
    agreement = lake.storage.read_json(f"alignment/{name}/alignment.json")["agreement"]
    for before, after in agreement["retrieval"].values():
        assert before == after


def test_sides_turned_by_themselves_are_no_space_to_compare_in(tiny_lake):
    lake = open_lake(tiny_lake)
    turned = load_alignment(lake, align(tiny_lake, AlignConfig()), BOTH)
    with pytest.raises(TrainError, match=rf"alignment {turned.name} \(--recipe standardise\).*--recipe paper"):
        insist_on_one_space(turned)
    insist_on_one_space(load_alignment(lake, align(tiny_lake, PAPER), BOTH))
    insist_on_one_space(None)


def test_a_shard_that_was_never_extracted_is_told(tiny_lake):
    lake = open_lake(tiny_lake)
    lake.storage.remove("features/teacher=beta/shard-000001.parquet")
    with pytest.raises(LakeError, match=r"no embeddings of teacher 'beta' for shard 1"):
        TrainRows(lake, "sel", BOTH).read(1)


# --- What the maps change.


def test_agreement_by_hand():
    draw = np.random.default_rng(0)
    vectors = {side: draw.normal(size=(20, 6)).astype(np.float32) for side in ("image", "text")}
    rotation = np.linalg.qr(draw.normal(size=(6, 6)))[0].astype(np.float32)
    sample = {"a": vectors, "b": {side: x @ rotation for side, x in vectors.items()}}
    undo = AffineMap(rotation.T.copy(), np.zeros(6, np.float32))
    found = describe_agreement(sample, {"a": {}, "b": {"image": undo, "text": undo}})
    image = found["pairs"]["a | b"]["image"]
    assert image["correlation"] == [1.0, 1.0]  # a rotation changes no similarity
    assert image["cosine"][1] == 1.0
    assert abs(image["cosine"][0]) < 0.9
    shown = format_agreement(found)
    assert "a | b" in shown
    assert shown.splitlines()[-2].startswith("a ")


def test_a_map_onto_one_direction_loses_the_captions():
    draw = np.random.default_rng(0)
    image = draw.normal(size=(30, 6)).astype(np.float32)
    flat = AffineMap(np.outer(np.ones(6), [1, 0]).astype(np.float32), np.array([9, 0], np.float32))
    sample = {"a": {"image": image, "text": image + 0.01}}
    before, after = describe_agreement(sample, {"a": {"image": flat, "text": flat}})["retrieval"]["a"]
    assert (before, after) == (1.0, 1.0)  # all alike: none is in another's way, which is why correlations stand beside
    noise = AffineMap(draw.normal(size=(6, 2)).astype(np.float32), np.zeros(2, np.float32))
    other = AffineMap(draw.normal(size=(6, 2)).astype(np.float32), np.zeros(2, np.float32))
    lost = describe_agreement(sample, {"a": {"image": noise, "text": other}})["retrieval"]["a"]
    assert lost[1] < 0.5


# --- In the objective.


def teacher_batch(rows=6, width=5):
    draw = torch.Generator().manual_seed(0)
    image, text = (torch.nn.functional.normalize(torch.randn(rows, width, generator=draw), dim=1) for _ in range(2))
    everywhere = torch.ones(rows, dtype=torch.bool)
    return TeacherBatch(image, text, everywhere, everywhere)


def test_features_and_heads_see_the_aligned_vectors_and_similarities_the_teachers_own():
    draw = np.random.default_rng(0)
    one = AffineMap(draw.normal(size=(5, 8)).astype(np.float32), draw.normal(size=8).astype(np.float32))
    maps = {"t": {"image": one, "text": one}}
    weights = DistillConfig(feature=1, cross=1, heads=1, target_length="stored")
    objective = DistillObjective(weights, {"t": 10.0}, 10.0, 8, {"t": (8, 8)}, maps)
    batch = teacher_batch()
    generator = torch.Generator().manual_seed(1)
    student = StudentOutput(
        *(torch.nn.functional.normalize(torch.randn(6, 8, generator=generator), dim=1) for _ in range(2))
    )
    terms = objective(student, {"t": batch})
    mapped = [torch.from_numpy(one(side.numpy())) for side in (batch.image_NT, batch.text_NT)]
    expected = sum(torch.nn.functional.mse_loss(mine, theirs) for mine, theirs in zip(student, mapped, strict=True))
    torch.testing.assert_close(terms.feature, expected)
    plain = DistillObjective(DistillConfig(), {"t": 10.0}, 10.0)(student, {"t": batch})
    torch.testing.assert_close(terms.image_text, plain.image_text)
    # Constants of the lake: not learned, and in no checkpoint.
    assert not any("aligned" in name for name in objective.state_dict())
    assert not any("aligned" in name for name, _ in objective.named_parameters())
    unit = DistillObjective(
        weights.model_copy(update={"target_length": "unit"}), {"t": 1.0}, 10.0, 8, {"t": (8, 8)}, maps
    )
    normed = [torch.nn.functional.normalize(side, dim=1) for side in mapped]
    expected = sum(torch.nn.functional.mse_loss(mine, theirs) for mine, theirs in zip(student, normed, strict=True))
    torch.testing.assert_close(unit(student, {"t": batch}).feature, expected)
