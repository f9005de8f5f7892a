import numpy as np
import pytest
import torch

from common.errors import ConfigError, ModelError
from common.models.load import describe_model, find_spec, load_model, load_tokenizer, read_catalog
from common.models.spec import Geometry, ModelSpec


def pixels_of(count: int, size: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 255, (count, size, size, 3), np.uint8))


def test_the_packaged_catalog_is_valid_and_names_a_family():
    catalog = read_catalog()
    assert {"biomedclip", "plip", "pubmedclip", "quiltnet-b-32"} <= set(catalog)


def test_a_users_file_adds_and_overrides(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("mine: {path: ./folder}\nplip: {hub_id: other/plip, family: hf_clip}\n")
    catalog = read_catalog(str(file))
    assert catalog["mine"].path == str(tmp_path / "folder")  # relative to the YAML: workers run elsewhere
    assert catalog["plip"].hub_id == "other/plip"
    assert catalog["plip"].source.sha256 == {}  # another place: the pinned hash is not that one's
    assert catalog["plip"].expect.dim == 512


def test_an_invalid_entry_is_named(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("mine: {path: ./folder, hubid: x}\n")
    with pytest.raises(ConfigError, match="model mine in .*hubid is not a setting"):
        read_catalog(str(file))


def test_an_entry_lies_in_one_place():
    with pytest.raises(ValueError, match="either path or pretrained"):
        ModelSpec(name="x", architecture="RN50", pretrained="openai", path="c")


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ModelError, match=r"Unknown model 'clipp'. Known: .*plip"):
        find_spec("clipp", read_catalog())


def test_hub_repositories_and_built_in_names_need_no_yaml():
    hub = find_spec("mine=hf-hub:org/repo", {})
    assert (hub.name, hub.family, hub.hub_id) == ("mine", "open_clip", "org/repo")
    built_in = find_spec("b=open_clip:ViT-B-32/openai", {})
    assert (built_in.architecture, built_in.pretrained) == ("ViT-B-32", "openai")
    assert find_spec("hf-hub:org/Some_Repo", {}).name == "some_repo"


def test_a_built_in_architecture_with_a_checkpoint_file(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    torch.manual_seed(0)
    model = open_clip.create_model("RN50")
    file = tmp_path / "weights.safetensors"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, str(file))
    spec = ModelSpec(name="x", architecture="RN50", pretrained=str(file))
    description, loaded = describe_model(spec), load_model(spec)
    picture = pixels_of(1, description.geometry.size)
    with torch.no_grad():
        normal = (picture.permute(0, 3, 1, 2) / 255 - torch.tensor(description.mean).view(1, 3, 1, 1)) / torch.tensor(
            description.std
        ).view(1, 3, 1, 1)
        expected = model.eval().encode_image(normal)
        torch.testing.assert_close(loaded.encode_image(picture), expected, atol=1e-3, rtol=1e-3)


def test_a_tag_open_clip_does_not_know_lists_the_known():
    with pytest.raises(ModelError, match=r"neither a file nor a pretrained tag of ViT-B-32 \(known tags: openai"):
        describe_model(find_spec("b=open_clip:ViT-B-32/openay", {}))


def test_a_folder_without_a_model_says_what_it_holds(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(ModelError, match=r"is not a model folder: .*found notes\.txt"):
        find_spec(f"mine={tmp_path}", {})


def test_an_offline_hub_is_explained():
    with pytest.raises(ModelError, match=r"vinid/plip could not be fetched.*NAME=FOLDER"):
        describe_model(read_catalog()["plip"])


def test_open_clip_folder_gives_the_numbers_of_stock_open_clip(make_clip_folder):
    import open_clip
    from PIL import Image

    folder = make_clip_folder("tiny")
    spec = find_spec(str(folder), {})
    stock, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    stock.eval()
    picture = Image.fromarray(pixels_of(1)[0].numpy())
    model = load_model(spec)
    with torch.no_grad():
        expected_image = stock.encode_image(transform(picture)[None])
        expected_text = stock.encode_text(open_clip.get_tokenizer(f"local-dir:{folder}")(["a lung"]))
        image = model.encode_image(torch.from_numpy(np.array(picture))[None])
        text = model.encode_text(torch.from_numpy(load_tokenizer(spec)(["a lung"])))
    torch.testing.assert_close(image, expected_image, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(text, expected_text, atol=1e-6, rtol=1e-5)
    assert model.logit_scale == pytest.approx(1 / 0.07, rel=1e-4)


def test_description_reads_the_folder(make_clip_folder):
    description = describe_model(find_spec(str(make_clip_folder("tiny", dim=24, size=48)), {}))
    assert (description.image_dim, description.text_dim, description.context_length) == (24, 24, 16)
    assert description.geometry == Geometry(size=48)
    assert description.mean == (0.5, 0.5, 0.5)


def test_other_weights_are_another_identity(make_clip_folder):
    first, second = (describe_model(find_spec(str(make_clip_folder("m", seed=seed)), {})) for seed in (0, 1))
    assert first.weights_sha256 != second.weights_sha256
    assert first.tokenizer_key == second.tokenizer_key


def test_a_checkpoint_of_another_shape_is_refused(make_clip_folder):
    folder, other = make_clip_folder("a", dim=16), make_clip_folder("b", dim=24)
    (folder / "open_clip_model.safetensors").write_bytes((other / "open_clip_model.safetensors").read_bytes())
    with pytest.raises(
        ModelError,
        match=r"does not fit its architecture .*of another shape: text_projection is \[32, 24\], not \[32, 16\]",
    ):
        load_model(find_spec(str(folder), {}))


def test_a_missing_tensor_is_refused(make_clip_folder):
    from safetensors.torch import load_file, save_file

    folder = make_clip_folder("a")
    file = str(folder / "open_clip_model.safetensors")
    state = load_file(file)
    del state["ln_final.weight"]
    save_file(state, file)
    with pytest.raises(ModelError, match=r"ln_final\.weight"):
        load_model(find_spec(str(folder), {}))


def test_hf_folder_gives_the_numbers_of_stock_transformers(make_hf_clip_folder):
    from PIL import Image
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    folder = make_hf_clip_folder("tiny-hf")
    spec = find_spec(str(folder), {})
    assert spec.family == "hf_clip"
    stock = CLIPModel.from_pretrained(folder).eval()
    picture = Image.fromarray(pixels_of(1)[0].numpy())
    inputs = CLIPImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt")
    tokens = AutoTokenizer.from_pretrained(folder)(
        ["a lung", "x" * 50], padding=True, truncation=True, return_tensors="pt"
    )
    model = load_model(spec)
    with torch.no_grad():
        expected_image = stock.get_image_features(**inputs).pooler_output
        expected_text = stock.get_text_features(**tokens).pooler_output
        image = model.encode_image(torch.from_numpy(np.array(picture))[None])
        text = model.encode_text(torch.from_numpy(load_tokenizer(spec)(["a lung", "x" * 50])))
    torch.testing.assert_close(image, expected_image, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(text, expected_text, atol=1e-5, rtol=1e-4)


def test_hf_description_reads_the_processor(make_hf_clip_folder):
    description = describe_model(find_spec(str(make_hf_clip_folder("tiny-hf")), {}))
    assert description.geometry == Geometry(size=32, crop_rounding="floor")
    assert (description.image_dim, description.context_length) == (24, 20)


def test_a_model_folder_on_object_storage_is_fetched(make_clip_folder, s3, tmp_path, monkeypatch):
    from common.storage import Storage

    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    folder = make_clip_folder("tiny")
    remote = Storage(f"{s3}/models/tiny")
    for file in folder.iterdir():
        remote.write_bytes(file.name, file.read_bytes())
    here, there = describe_model(find_spec(str(folder), {})), describe_model(find_spec(remote.uri, {}))
    assert here == there
    # New weights of the same architecture have the same size; they must be fetched all the same.
    other = make_clip_folder("tiny", seed=9)
    remote.write_bytes("open_clip_model.safetensors", (other / "open_clip_model.safetensors").read_bytes())
    assert describe_model(find_spec(remote.uri, {})).weights_sha256 != here.weights_sha256


def test_weights_of_another_activation_are_refused():
    with pytest.raises(ModelError, match="QuickGELU .* Name the architecture ViT-B-32-quickgelu"):
        describe_model(find_spec("b=open_clip:ViT-B-32/openai", {}))


def test_built_in_models_with_other_tokenizers_do_not_share_token_ids(tmp_path):
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"x")
    specs = [
        ModelSpec(name="x", architecture=name, pretrained=str(weights))
        for name in ("roberta-ViT-B-32", "xlm-roberta-base-ViT-B-32")
    ]
    assert len({describe_model(spec).tokenizer_key for spec in specs}) == 2
