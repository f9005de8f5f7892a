"""The student: raw pixels in, unit vectors out; its weights are open_clip's own."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from common.errors import TrainError
from common.storage import Storage
from trainer.architecture import load_tokenizer, read_architecture, resolve_architecture
from trainer.starting_weights import load_pretrained
from trainer.student import Student


@pytest.fixture
def student(student_folder):
    torch.manual_seed(0)
    return Student(read_architecture(Storage(str(student_folder)))).eval()


def some_input(rows=3):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (rows, 32, 32, 3), generator=generator, dtype=torch.uint8)
    return pixels, torch.randint(2, 15, (rows, 12), generator=generator, dtype=torch.int32)


def test_features_are_unit_vectors_of_normalised_pixels(student):
    pixels, tokens = some_input()
    image, text = student(pixels, tokens)
    assert image.shape == text.shape == (3, 16)
    assert image.norm(dim=1).tolist() == pytest.approx([1, 1, 1])
    by_hand = student.model.encode_image((pixels.permute(0, 3, 1, 2) / 255 - 0.5) / 0.25, normalize=True)
    torch.testing.assert_close(image, by_hand, rtol=1e-4, atol=1e-5)


def test_the_models_own_scale_is_frozen_and_filled_in_when_saved(student):
    assert not student.model.logit_scale.requires_grad
    assert student.tensors(log_scale=1.5)["logit_scale"].item() == 1.5


def test_stock_open_clip_loads_the_saved_folder_and_agrees(student, tmp_path):
    import open_clip

    for name, data in student.architecture.files().items():
        (tmp_path / name).write_bytes(data)
    save_file(student.tensors(2.0), tmp_path / "model.safetensors")
    model = open_clip.create_model(f"local-dir:{tmp_path}").eval()
    pixels, tokens = some_input()
    expected = model.encode_image((pixels.permute(0, 3, 1, 2).float() - student.mean) / student.std, normalize=True)
    torch.testing.assert_close(student(pixels, tokens).image_BD, expected)


def test_weights_of_another_shape_are_one_clear_error(student, student_folder, tmp_path):
    tensors = student.tensors(0.0)
    tensors["text_projection"] = torch.zeros(5, 5)
    with pytest.raises(TrainError, match="do not fit .* size mismatch for text_projection"):
        student.load_tensors(tensors, "here")
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(TrainError, match="do not fit"):
        load_pretrained(student, str(tmp_path / "bad.safetensors"), str(student_folder))


def test_weights_from_a_file(student, student_folder, tmp_path):
    tensors = {name: value + 1 for name, value in student.tensors(0.0).items()}
    save_file(tensors, tmp_path / "weights.safetensors")
    load_pretrained(student, str(tmp_path / "weights.safetensors"), str(student_folder))
    assert torch.equal(student.model.positional_embedding, tensors["positional_embedding"])
    with pytest.raises(TrainError, match="neither a file nor a pretrained tag"):
        load_pretrained(student, "laion-of-nowhere", "ViT-B-32")


def test_a_built_in_architecture_needs_no_files():
    architecture = resolve_architecture("ViT-B-32")
    assert architecture.tokenizer_files == {}
    assert architecture.geometry.size == 224
    tokens = load_tokenizer(architecture)(["a chest x-ray"])
    assert (tokens.shape, tokens.dtype) == ((1, 77), np.int32)


def test_the_tokenizer_travels_with_the_architecture(student):
    tokens = load_tokenizer(student.architecture)(["red picture", "a " * 40])
    assert tokens.shape == (2, 12)
    assert tokens[0].tolist() == [6, 3, 15, *[0] * 9]
    assert tokens[1, -1] == 15  # cut, and still ended


@pytest.mark.parametrize("of_its_own", [True, False])
def test_token_ids_are_open_clips_and_take_no_torch(student_folder, of_its_own):
    import open_clip

    architecture = read_architecture(Storage(str(student_folder))) if of_its_own else resolve_architecture("ViT-B-32")
    texts = ["a Chest X-ray &amp; more", "normal " * 200, "", "na\u00efve 5 \u00b5m"]
    stock = open_clip.get_tokenizer(f"local-dir:{architecture.local_folder()}")
    np.testing.assert_array_equal(load_tokenizer(architecture)(texts), stock(texts).numpy())
    code = (
        "import sys; from common.storage import Storage; from trainer.architecture import *; "
        f"load_tokenizer(read_architecture(Storage({str(architecture.local_folder())!r})))(['a']); "
        "print([name for name in ('torch', 'open_clip') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_settings_of_byte_pairs_count(tmp_path):
    import open_clip

    model_cfg = open_clip.get_model_config("ViT-B-32")
    model_cfg["text_cfg"]["tokenizer_kwargs"] = {"clean": "canonicalize"}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": model_cfg}))
    texts = ["A lung-nodule, (CT) scan! isn't it"]
    found = load_tokenizer(read_architecture(Storage(str(tmp_path))))(texts)
    np.testing.assert_array_equal(found, open_clip.get_tokenizer(f"local-dir:{tmp_path}")(texts).numpy())
    assert (found != load_tokenizer(resolve_architecture("ViT-B-32"))(texts)).any()


def test_unknown_architectures_and_empty_folders_are_named(tmp_path):
    with pytest.raises(TrainError, match="neither an open_clip architecture nor a folder"):
        resolve_architecture("ViT-Z-99")
    with pytest.raises(TrainError, match="holds no open_clip_config.json"):
        resolve_architecture(str(tmp_path))
