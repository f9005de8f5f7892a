import dataclasses

import numpy as np
import pyarrow as pa
import pytest
import torch
from changed_pairs import without_captions

from common.errors import ModelError
from common.images import decode_rgb, fit
from common.models.load import describe_model, find_spec
from common.schemas import check_table, features_schema
from common.views import cut_view
from extractor.config import ViewsConfig
from extractor.decoding import PictureDecoder
from extractor.prepare import Prepare, TeacherInput, fixed_rows, restrict, rows_of
from extractor.teachers import LEAST_SPREAD, Teacher


@pytest.fixture(scope="module")
def folders(make_clip_folder, make_hf_clip_folder):
    return {
        "a": make_clip_folder("a", dim=16),
        "b": make_clip_folder("b", dim=24, seed=1),
        "wide": make_clip_folder("wide", dim=16, size=48, context_length=12),
        "hf": make_hf_clip_folder("hf", dim=24),
    }


def teacher_input(folder) -> TeacherInput:
    spec = find_spec(str(folder), {})
    return TeacherInput(spec, describe_model(spec))


def prepare_shard(lake, folders, index=0) -> pa.Table:
    inputs = {name: teacher_input(folder) for name, folder in folders.items()}
    return Prepare(lake.uri, inputs, {index: tuple(inputs)})({"shard": np.array([index])})


def vectors(column: pa.ChunkedArray) -> np.ndarray:
    return np.array(column.to_pylist(), np.float32)


def test_fixed_rows_round_trip():
    array = np.arange(12, dtype=np.int32).reshape(3, 4)
    assert (rows_of(fixed_rows(array)) == array).all()
    assert rows_of(pa.chunked_array([fixed_rows(array[1:])])).tolist() == array[1:].tolist()
    column = pa.chunked_array([fixed_rows(array)])
    assert np.shares_memory(rows_of(column), array)  # a shard's pixels are not copied for each teacher
    assert rows_of(column.slice(1, 1)).tolist() == array[1:2].tolist()


def test_null_rows_are_left_out_of_the_way_back():
    array, absent = np.arange(12, dtype=np.int32).reshape(3, 4), np.array([False, True, False])
    assert fixed_rows(array, absent).is_valid().to_pylist() == [True, False, True]
    assert rows_of(fixed_rows(array, absent)).tolist() == array[~absent].tolist()


def test_equal_geometries_and_tokenizers_share_one_column(make_lake, tmp_path, folders):
    table = prepare_shard(make_lake(tmp_path / "lake"), folders)
    pixel_columns = [name for name in table.column_names if name.startswith("pixels:")]
    token_columns = [name for name in table.column_names if name.startswith("tokens:")]
    # a and b share both; wide differs in both; hf differs in crop rounding and tokenizer
    assert (len(pixel_columns), len(token_columns)) == (3, 3)


def test_each_image_is_decoded_once_whatever_the_number_of_teachers(make_lake, tmp_path, folders, monkeypatch):
    asked = []
    real = PictureDecoder.decode

    def count(self, encoded, geometries, *more):
        asked.append((len(encoded), len(geometries)))
        return real(self, encoded, geometries, *more)

    monkeypatch.setattr(PictureDecoder, "decode", count)
    prepare_shard(make_lake(tmp_path / "lake", rows=6), folders)
    assert asked == [(6, 3)]  # four teachers, three geometries


def test_only_the_missing_teachers_are_prepared_for(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake")
    inputs = {name: teacher_input(folder) for name, folder in folders.items()}
    table = Prepare(lake.uri, inputs, {0: ("wide",)})({"shard": np.array([0])})
    assert inputs["wide"].pixels in table.column_names
    assert inputs["a"].pixels not in table.column_names


@pytest.mark.parametrize("name", ["a", "hf"])
def test_embeddings_equal_a_plain_loop_over_the_stock_library(make_lake, tmp_path, folders, name):
    lake = make_lake(tmp_path / "lake", rows=7)
    embedded = Teacher(teacher_input(folders[name]), micro_batch=4).embed(prepare_shard(lake, folders))
    image_ND, text_ND = stock_embeddings(folders[name], lake.read_pairs(0))
    # 5e-4 is half precision's rounding of unit vectors
    np.testing.assert_allclose(vectors(embedded.features["image_embedding"]), image_ND, atol=5e-4)
    np.testing.assert_allclose(vectors(embedded.features["text_embedding"]), text_ND, atol=5e-4)


def stock_embeddings(folder, pairs: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    import io

    from PIL import Image

    pictures = [Image.open(io.BytesIO(image.as_py())).convert("RGB") for image in pairs["image"]]
    captions = [row[0] for row in pairs["captions"].to_pylist()]
    if (folder / "open_clip_config.json").exists():
        import open_clip

        model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
        tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
        with torch.no_grad():
            model.eval()
            image = model.encode_image(torch.stack([transform(picture) for picture in pictures]), normalize=True)
            return image.numpy(), model.encode_text(tokens, normalize=True).numpy()
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    inputs = CLIPImageProcessorPil.from_pretrained(folder)(pictures, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(captions, padding=True, truncation=True, return_tensors="pt")
    with torch.no_grad():
        image, text = model.get_image_features(**inputs).pooler_output, model.get_text_features(**tokens).pooler_output
    return torch.nn.functional.normalize(image).numpy(), torch.nn.functional.normalize(text).numpy()


@pytest.mark.parametrize("name", ["a", "hf"])
def test_a_row_without_captions_has_no_text_vector_and_no_reject(make_lake, tmp_path, folders, name):
    told = Teacher(teacher_input(folders[name]), micro_batch=4)
    whole = make_lake(tmp_path / "whole", rows=9, shard_rows=9, captions=3)
    some = without_captions(make_lake(tmp_path / "some", rows=9, shard_rows=9, captions=3), lambda row: row % 3 == 1)
    facts, before = told.embed(prepare_shard(whole, folders))
    _, after = told.embed(prepare_shard(some, folders))
    assert facts.rejects == []
    check_table(after, before.schema, "features")
    assert after["image_embedding"].equals(before["image_embedding"])
    for row, (old, new) in enumerate(zip(before.to_pylist(), after.to_pylist(), strict=True)):
        if row % 3 == 1:
            assert new["text_embedding"] is new["text_norm"] is None
            assert new["extra_text_embeddings"] == []
        else:  # as if the others were not there
            np.testing.assert_allclose(new["text_embedding"], old["text_embedding"], atol=1e-6)
            assert new["text_norm"] == pytest.approx(old["text_norm"], rel=1e-6)
            assert len(new["extra_text_embeddings"]) == row % 3


@pytest.mark.parametrize("name", ["a", "hf"])
def test_a_text_tower_alone_on_a_shard_without_captions(make_lake, tmp_path, folders, name):
    lake = without_captions(make_lake(tmp_path / "lake", rows=5, shard_rows=5))
    item = teacher_input(folders[name])
    item = dataclasses.replace(item, description=restrict(item.description, "text"))
    facts, features = Teacher(item, micro_batch=4).embed(Prepare(lake.uri, {"t": item}, {0: ("t",)}).prepare(0))
    assert facts.rejects == []
    assert facts.forwards == 0
    assert features["text_embedding"].null_count == features["text_norm"].null_count == 5
    assert features["extra_text_embeddings"].to_pylist() == [[]] * 5
    assert features["sample_id"].equals(lake.read_pairs(0)["sample_id"])


def test_a_text_that_fails_is_the_reject_of_its_own_row(make_lake, tmp_path, folders, monkeypatch):
    """Not of the row that stands at its place among those with captions."""
    lake = without_captions(make_lake(tmp_path / "lake", rows=6, shard_rows=6), lambda row: row in (0, 2))
    teacher, table = Teacher(teacher_input(folders["a"]), micro_batch=4), prepare_shard(lake, folders)
    broken = rows_of(table[teacher.teacher.tokens])[2]  # row 4, the third that has captions
    real = teacher.model.encode_text

    def encode(tokens: torch.Tensor) -> torch.Tensor:
        lost = (tokens.cpu().numpy() == broken).all(axis=1)
        return torch.where(torch.from_numpy(lost)[:, None], float("nan"), real(tokens))

    monkeypatch.setattr(teacher.model, "encode_text", encode)
    facts, features = teacher.embed(table)
    assert [sample for sample, _, _ in facts.rejects] == [table["sample_id"][4].as_py()]
    assert features["text_embedding"].is_null().to_pylist() == [True, False, True, False, True, False]


def test_rows_are_aligned_unit_and_of_the_agreed_types(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=7)
    embedded = Teacher(teacher_input(folders["a"]), micro_batch=4).embed(prepare_shard(lake, folders))
    check_table(embedded.features, features_schema(16, 16), "features")
    assert embedded.features["sample_id"].equals(lake.read_pairs(0)["sample_id"])
    np.testing.assert_allclose(np.linalg.norm(vectors(embedded.features["image_embedding"]), axis=1), 1, atol=2e-3)
    assert (np.array(embedded.features["image_norm"].to_pylist()) > 0).all()


def test_vectors_are_rounded_to_the_precision_that_is_asked_for(make_lake, tmp_path, folders):
    table = prepare_shard(make_lake(tmp_path / "lake", rows=7), folders)
    item = teacher_input(folders["a"])
    fine, coarse = (
        torch.from_numpy(vectors(Teacher(one, micro_batch=4).embed(table).features["image_embedding"]))
        for one in (item, dataclasses.replace(item, stored_precision="bfloat16"))
    )
    assert torch.equal(fine, fine.half().float())
    assert torch.equal(coarse, coarse.bfloat16().float())
    assert not torch.equal(fine, coarse)
    torch.testing.assert_close(coarse, fine, rtol=2**-8, atol=0)


def test_shards_larger_than_the_micro_batch_are_embedded_whole(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=11, shard_rows=11)
    table = prepare_shard(lake, folders)
    whole = Teacher(teacher_input(folders["a"]), micro_batch=64).embed(table)
    pieces = Teacher(teacher_input(folders["a"]), micro_batch=3).embed(table)
    assert (whole.facts.forwards, whole.features.num_rows, pieces.features.num_rows) == (2, 11, 11)
    np.testing.assert_allclose(
        vectors(whole.features["image_embedding"]), vectors(pieces.features["image_embedding"]), atol=1e-3
    )


def test_an_embedding_does_not_depend_on_its_neighbours(make_lake, tmp_path, folders):
    table = prepare_shard(make_lake(tmp_path / "lake", rows=8), folders)
    teacher = Teacher(teacher_input(folders["a"]), micro_batch=4)
    together = vectors(teacher.embed(table).features["image_embedding"])
    alone = vectors(teacher.embed(table.slice(5, 1)).features["image_embedding"])
    turned = vectors(teacher.embed(table.take(list(range(8))[::-1])).features["image_embedding"])
    assert (together[5] == alone[0]).all()
    assert (together == turned[::-1]).all()


def test_further_captions_have_vectors_of_their_own(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=4, captions=3)
    features = Teacher(teacher_input(folders["a"])).embed(prepare_shard(lake, folders)).features
    extra = features["extra_text_embeddings"].to_pylist()
    assert [len(row) for row in extra] == [len(row) - 1 for row in lake.read_pairs(0)["captions"].to_pylist()]
    assert extra[2][0] != extra[2][1]


def test_equal_captions_go_through_the_tower_once(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=8, captions=1)
    table = prepare_shard(lake, folders)
    item = teacher_input(folders["a"])
    same = rows_of(table[item.tokens])[:1].repeat(8, axis=0)
    table = table.set_column(table.column_names.index(item.tokens), item.tokens, fixed_rows(same))
    embedded = Teacher(item, micro_batch=1).embed(table)
    assert embedded.facts.forwards == 8 + 1  # pictures, and the one caption
    assert len(set(map(tuple, embedded.features["text_embedding"].to_pylist()))) == 1


def test_a_damaged_image_is_a_null_and_a_reject_and_its_text_survives(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=5, damaged=(2,))
    embedded = Teacher(teacher_input(folders["a"])).embed(prepare_shard(lake, folders))
    assert [row is None for row in embedded.features["image_embedding"].to_pylist()] == [
        False,
        False,
        True,
        False,
        False,
    ]
    assert embedded.features["text_embedding"].null_count == 0
    ((sample_id, reason, detail),) = embedded.facts.rejects
    assert (sample_id, reason) == (lake.read_pairs(0)["sample_id"][2].as_py(), "image not decodable")
    assert "not an image" in detail


def test_a_teacher_that_yields_nan_rejects_its_rows(make_lake, tmp_path, folders):
    teacher = Teacher(teacher_input(folders["a"]))
    with torch.no_grad():
        teacher.model.model.visual.proj.fill_(float("nan"))
    embedded = teacher.embed(prepare_shard(make_lake(tmp_path / "lake", rows=3), folders))
    assert [reason for _, reason, _ in embedded.facts.rejects] == ["image embedding not finite"] * 3
    assert embedded.features["image_embedding"].null_count == 3


def test_a_teacher_whose_vectors_are_all_the_same_is_refused(make_lake, tmp_path, folders):
    teacher = Teacher(teacher_input(folders["a"]))
    with torch.no_grad():
        teacher.model.model.visual.proj.zero_()
        teacher.model.model.visual.ln_post.weight.zero_()
        teacher.model.model.visual.ln_post.bias.fill_(1.0)
        teacher.model.model.visual.proj.fill_(0.5)
    table = prepare_shard(make_lake(tmp_path / "lake", rows=17, shard_rows=17), folders)
    with pytest.raises(ModelError, match="the image tower gives 17 different inputs one and the same vector"):
        teacher.embed(table)
    teacher.embed(table.slice(0, 15))  # too few to prove anything


@pytest.mark.parametrize(("precision", "least"), LEAST_SPREAD.items())
def test_rounding_alone_is_not_a_difference(make_lake, tmp_path, folders, precision, least):
    """Nearly constant vectors on both sides of where a number is rounded up."""
    table = prepare_shard(make_lake(tmp_path / "lake", rows=17, shard_rows=17), folders)
    teacher = Teacher(dataclasses.replace(teacher_input(folders["a"]), stored_precision=precision))
    middle = 0.5 + least / 4  # between two numbers that are a step apart
    rest = (1 - middle**2) ** 0.5

    def encode(pixels_BHWC):
        sign_B = pixels_BHWC.float().mean((1, 2, 3)) % 2 - 1
        vectors_BD = torch.zeros(len(pixels_BHWC), teacher.teacher.description.image_dim)
        vectors_BD[:, 0], vectors_BD[:, 1] = middle + 1e-6 * sign_B, rest
        return vectors_BD

    teacher.model.encode_image = encode
    with pytest.raises(ModelError, match="the image tower gives 17 different inputs one and the same vector"):
        teacher.embed(table)


def test_equal_pictures_may_have_equal_vectors(make_lake, tmp_path, folders):
    table = prepare_shard(make_lake(tmp_path / "lake", rows=17, shard_rows=17), folders)
    item = teacher_input(folders["a"])
    same = rows_of(table[item.pixels])[:1].repeat(17, axis=0)
    table = table.set_column(table.column_names.index(item.pixels), item.pixels, fixed_rows(same))
    assert Teacher(item).embed(table).features["image_embedding"].null_count == 0


def test_a_row_the_model_fails_on_is_a_reject_with_its_reason(make_lake, tmp_path, folders):
    table = prepare_shard(make_lake(tmp_path / "lake", rows=6), folders)
    item = teacher_input(folders["a"])
    undisturbed = Teacher(item, micro_batch=4).embed(table)
    teacher = Teacher(item, micro_batch=4)
    poison = torch.from_numpy(rows_of(table[item.pixels])[2].copy()).reshape(32, 32, 3)
    real = teacher.model.encode_image

    def fails_on_one_picture(pixels_BHWC):
        if (pixels_BHWC == poison).flatten(1).all(1).any():
            raise ValueError("this picture is not to my taste")
        return real(pixels_BHWC)

    teacher.model.encode_image = fails_on_one_picture
    embedded = teacher.embed(table)
    ((sample_id, reason, detail),) = embedded.facts.rejects
    assert (sample_id, reason) == (table["sample_id"][2].as_py(), "image tower failed")
    assert detail == "ValueError: this picture is not to my taste"
    expected = undisturbed.features["image_embedding"].to_pylist()
    assert embedded.features["image_embedding"].to_pylist() == [*expected[:2], None, *expected[3:]]
    assert embedded.features["text_embedding"].equals(undisturbed.features["text_embedding"])


@pytest.mark.parametrize(("towers", "absent"), [("image", "text_embedding"), ("text", "image_embedding")])
def test_one_tower_alone_leaves_the_other_null(make_lake, tmp_path, folders, towers, absent):
    lake = make_lake(tmp_path / "lake", rows=4, damaged=(1,))
    spec = find_spec(str(folders["a"]), {})
    item = TeacherInput(spec, restrict(describe_model(spec), towers))
    table = Prepare(lake.uri, {"a": item}, {0: ("a",)}).prepare(0)
    assert (item.pixels in table.column_names, item.tokens in table.column_names) == (
        towers == "image",
        towers == "text",
    )
    embedded = Teacher(item).embed(table)
    assert embedded.features[absent].null_count == 4
    assert embedded.features["text_embedding" if towers == "text" else "image_embedding"].null_count == (
        towers == "image"
    )
    assert len(embedded.facts.rejects) == (towers == "image")  # a damaged picture does not matter to captions


def test_views_are_the_same_crops_for_every_teacher(make_lake, tmp_path, folders):
    lake = make_lake(tmp_path / "lake", rows=4, damaged=(1,))
    inputs = {name: teacher_input(folders[name]) for name in ("a", "wide")}
    views = ViewsConfig(count=2, least_area=0.3, seed=7)
    table = Prepare(lake.uri, inputs, {0: ("a", "wide")}, views).prepare(0)
    both = {name: Teacher(item, micro_batch=4).embed(table).features for name, item in inputs.items()}
    check_table(both["a"], features_schema(16, 16, views=True), "features")
    assert both["a"]["view_boxes"].equals(both["wide"]["view_boxes"])
    boxes = np.array(both["a"]["view_boxes"].to_pylist(), np.float32)
    assert boxes.shape == (4, 2, 4)
    for row, image in enumerate(lake.read_pairs(0)["image"]):
        if row == 1:
            assert both["a"]["view_embeddings"][row].as_py() == [None, None]
            continue
        teacher = Teacher(inputs["a"], micro_batch=1)
        for view, box in enumerate(boxes[row]):
            pixels = fit(cut_view(decode_rgb(image.as_py()), box), inputs["a"].description.geometry)
            out = teacher.model.encode_image(torch.from_numpy(pixels[None])).detach()
            expected = torch.nn.functional.normalize(out)[0].numpy()
            np.testing.assert_allclose(both["a"]["view_embeddings"][row].as_py()[view], expected, atol=1e-3)
