"""The timm_image family: LVM-Med's encoders against torchvision's ResNet and Segment Anything's encoder written out."""

import numpy as np
import pytest
import torch
from upstream import unit
from upstream_others import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    OPENAI_MEAN,
    OPENAI_STD,
    SAM_SIZE,
    assert_close,
    assert_far,
    assert_neighbours_do_not_matter,
    draw,
    encoded,
    find,
    lvm_med_resnet50_image,
    opened,
    pictures,
    read,
    scramble,
    shortest_then_centre,
    state,
    write_lvm_med_resnet50,
    write_lvm_med_vit_b,
)

from common.errors import ModelError
from common.models.embed import embed_images, embed_texts
from common.models.load import describe_model, find_spec, load_model, load_tokenizer, read_catalog
from common.models.spec import Geometry, ModelSpec
from common.models.timm_image import build, to_timm_names

PICTURES = [*pictures(224), encoded(draw(300, 90, seed=8))]
SAM_PICTURES = [*pictures(SAM_SIZE), encoded(draw(150, 40, seed=8))]
"""The last of both is far from square: cropping shows."""


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return write_lvm_med_resnet50(tmp_path_factory.mktemp("resnet"))


@pytest.fixture(scope="module")
def loaded(resnet, tmp_path_factory):
    return load_model(find(resnet, tmp_path_factory.mktemp("catalogs")))


@pytest.fixture(scope="module")
def vectors(loaded):
    return embed_images(loaded, PICTURES)


@pytest.fixture(scope="module")
def sam(tmp_path_factory):
    return write_lvm_med_vit_b(tmp_path_factory.mktemp("sam"))


# --- LVM-Med ResNet-50 ----------------------------------------------------------------------------------------------


def test_vectors_are_torchvisions(resnet, vectors):
    assert_close(vectors, resnet.image(PICTURES))


def test_neighbours_do_not_matter(loaded):
    assert not any(module.training for module in loaded.model.modules())  # batch normalisation's running statistics
    assert_neighbours_do_not_matter(loaded, PICTURES[:2])


def test_preparation_and_constants_are_the_catalogs(resnet, loaded, vectors):
    geometry = Geometry(size=224, resize="squash", interpolation="bilinear")
    assert loaded.description.geometry == geometry
    assert (loaded.description.mean, loaded.description.std) == (IMAGENET_MEAN, IMAGENET_STD)
    assert_far(vectors, lvm_med_resnet50_image(resnet.place, PICTURES, mean=OPENAI_MEAN, std=OPENAI_STD), 1e-3)
    assert_far(vectors[-1:], lvm_med_resnet50_image(resnet.place, PICTURES[-1:], prepare=shortest_then_centre), 1e-3)


def test_it_is_an_image_encoder_alone(resnet, loaded, tmp_path):
    description = loaded.description
    assert (description.image_dim, description.text_dim) == (512, None)
    assert (description.tokenizer_sha256, description.context_length) == (None, None)
    assert loaded.logit_scale is None
    with pytest.raises(ModelError, match="has no text tower"):
        loaded.encode_text(torch.zeros(1, 77, dtype=torch.int32))
    with pytest.raises(ModelError, match="has no text tower"):
        loaded.tokenize(["a lung"])
    with pytest.raises(ModelError, match="has no text tower"):
        embed_texts(loaded, ["a lung"])
    with pytest.raises(ModelError, match="without a text tower"):
        load_tokenizer(find(resnet, tmp_path))


def test_the_classifier_may_be_there_or_not(resnet, vectors, tmp_path):
    assert {"fc.weight", "fc.bias"} <= set(read(resnet.place))
    bare = write_lvm_med_resnet50(tmp_path / "bare", classifier=False)
    assert not any(name.startswith("fc.") for name in read(bare.place))
    assert np.array_equal(embed_images(load_model(find(bare, tmp_path)), PICTURES), vectors)


@pytest.mark.parametrize("extra", ["fc2.weight", "projector.weight", "layer1.0.conv9.weight", "fcx"])
def test_other_left_over_tensors_are_refused(resnet, tmp_path, extra):
    file = tmp_path / "lvmmed_resnet.torch"
    torch.save({**read(resnet.place), extra: torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=f"unexpected: {extra}"):
        load_model(find(resnet, tmp_path, place=file))


def test_a_missing_tensor_is_refused(resnet, tmp_path):
    file = tmp_path / "lvmmed_resnet.torch"
    torch.save({name: value for name, value in read(resnet.place).items() if name != "bn1.running_mean"}, file)
    with pytest.raises(ModelError, match=r"Missing: bn1\.running_mean"):
        load_model(find(resnet, tmp_path, place=file))


def test_wrappers_of_training_programs_are_taken_off(resnet, loaded, tmp_path):
    file = tmp_path / "lvmmed_resnet.torch"
    torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in read(resnet.place).items()}}, file)
    model = load_model(find(resnet, tmp_path, place=file))
    tensors = model.model.state_dict()
    assert all(torch.equal(tensors[name], value) for name, value in loaded.model.state_dict().items())
    assert model.description.weights_sha256 != loaded.description.weights_sha256


def test_the_file_is_known_by_its_published_name(resnet, sam):
    catalog = read_catalog()
    assert find_spec(str(resnet.place), catalog).name == "lvm-med-resnet50"
    assert find_spec(str(sam.place), catalog).name == "lvm-med-vit-b"


def test_another_width_than_expected_is_refused(resnet, tmp_path):
    with pytest.raises(ModelError, match="dim is 512, expected 2048"):
        load_model(find(resnet, tmp_path, expect={"dim": 2048}))


def test_an_unknown_architecture_is_refused_with_suggestions(resnet, tmp_path):
    with pytest.raises(ModelError, match="timm knows no architecture 'resnet18_of_mine'.*resnet18"):
        describe_model(find(resnet, tmp_path, architecture="resnet18_of_mine"))


def test_two_architectures_are_two_identities(resnet, tmp_path):
    first, second = (describe_model(find(resnet, tmp_path, architecture=name)) for name in ("resnet18", "resnet34"))
    assert first.architecture != second.architecture


# --- any other timm model, prepared as timm prepares it -------------------------------------------------------------


@torch.no_grad()
def test_without_a_recipe_pictures_are_prepared_as_timm_does(tmp_path):
    import timm
    from timm.data import create_transform, resolve_data_config

    stock = scramble(timm.create_model("resnet10t", num_classes=0), seed=4, gain=1.0)
    torch.save(state(stock), tmp_path / "pytorch_model.bin")
    (tmp_path / "mine.yaml").write_text("mine: {family: timm_image, architecture: resnet10t, path: .}\n")
    model = load_model(find_spec("mine", read_catalog(str(tmp_path / "mine.yaml"))))
    config = resolve_data_config({}, model=stock)
    assert config["crop_pct"] < 1  # the short side exceeds the crop
    steps = create_transform(**config)
    images = pictures(model.description.geometry.size)
    assert_close(embed_images(model, images), unit(stock(torch.stack([steps(opened(data)) for data in images]))))


# --- LVM-Med ViT-B: Segment Anything's encoder ----------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "image_encoder."])
def test_segment_anythings_encoder_gives_its_own_vectors(tmp_path, prefix):
    upstream = write_lvm_med_vit_b(tmp_path / "sam", prefix=prefix)
    names = set(read(upstream.place))
    assert f"{prefix}blocks.0.mlp.lin1.weight" in names
    assert ("mask_decoder.iou_token.weight" in names) == bool(prefix)
    model = load_model(find(upstream, tmp_path))
    assert_close(embed_images(model, SAM_PICTURES), upstream.image(SAM_PICTURES))
    assert_neighbours_do_not_matter(model, SAM_PICTURES)
    assert (model.description.image_dim, model.description.text_dim, model.logit_scale) == (16, None, None)


def test_segment_anythings_names_do_not_load_unrenamed(sam, tmp_path):
    model = build(find(sam, tmp_path))
    tensors = read(sam.place)
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert {name.replace(".fc", ".lin") for name in missing} == set(unexpected)
    assert set(to_timm_names(model, tensors)) == set(model.state_dict())


def test_the_two_layers_of_the_perceptron_are_not_swapped(sam, tmp_path):
    tensors = read(sam.place)
    renamed = to_timm_names(build(find(sam, tmp_path)), tensors)
    for layer in ("1", "2"):
        for part in ("weight", "bias"):
            lin, fc = f"blocks.1.mlp.lin{layer}.{part}", f"blocks.1.mlp.fc{layer}.{part}"
            assert torch.equal(renamed[fc], tensors[lin])


@pytest.mark.parametrize("extra", ["blocks.0.mlp.lin3.weight", "neck.4.weight"])
def test_other_left_over_tensors_of_segment_anything_are_refused(sam, tmp_path, extra):
    file = tmp_path / "lvmmed_vit.pth"
    torch.save({**read(sam.place), extra: torch.zeros(2)}, file)
    with pytest.raises(ModelError, match=f"unexpected: {extra.replace('lin', 'fc')}"):
        load_model(find(sam, tmp_path, place=file))


def test_a_decoders_tensors_without_the_prefix_are_refused(sam, tmp_path):
    """Only a whole Segment Anything checkpoint has a decoder, and its encoder's names have the prefix."""
    file = tmp_path / "lvmmed_vit.pth"
    torch.save({**read(sam.place), "mask_decoder.iou_token.weight": torch.zeros(1, 16)}, file)
    with pytest.raises(ModelError, match=r"unexpected: mask_decoder\.iou_token\.weight"):
        load_model(find(sam, tmp_path, place=file))


# --- full size ------------------------------------------------------------------------------------------------------


def built_on_meta(name):
    entry = read_catalog()[name]
    with torch.device("meta"):
        return entry, build(entry).eval()


@torch.no_grad()
def test_the_published_resnet_is_2048_wide():
    entry, model = built_on_meta("lvm-med-resnet50")
    assert entry.architecture == "resnet50"
    assert model(torch.empty(1, 3, 224, 224, device="meta")).shape == (1, entry.expect.dim) == (1, 2048)
    from torchvision.models import resnet50

    with torch.device("meta"):
        theirs = resnet50().state_dict()
    kept = to_timm_names(model, theirs)
    assert set(theirs) - set(kept) == {"fc.weight", "fc.bias"}
    mine = {key: value.shape for key, value in model.state_dict().items()}
    assert {key: value.shape for key, value in kept.items()} == mine


@torch.no_grad()
def test_the_published_segment_anything_encoder_is_256_wide():
    entry, model = built_on_meta("lvm-med-vit-b")
    size = entry.recipe.geometry.size
    assert (entry.architecture, size) == ("samvit_base_patch16", 1024)
    assert model(torch.empty(1, 3, size, size, device="meta")).shape == (1, entry.expect.dim) == (1, 256)
    # Segment Anything's ViT-B by its own names: 12 blocks, of which 4 see the whole picture.
    shapes = {
        "pos_embed": (1, 64, 64, 768),
        "patch_embed.proj.weight": (768, 3, 16, 16),
        "patch_embed.proj.bias": (768,),
    }
    layers = {"attn.qkv": (2304, 768), "attn.proj": (768, 768), "mlp.lin1": (3072, 768), "mlp.lin2": (768, 3072)}
    for block in range(12):
        positions = 127 if block in (2, 5, 8, 11) else 27
        shapes |= {f"blocks.{block}.attn.rel_pos_{axis}": (positions, 64) for axis in "hw"}
        for layer, (wide, narrow) in layers.items():
            shapes |= {f"blocks.{block}.{layer}.weight": (wide, narrow), f"blocks.{block}.{layer}.bias": (wide,)}
        shapes |= {f"blocks.{block}.norm{n}.{part}": (768,) for n in (1, 2) for part in ("weight", "bias")}
    shapes |= {"neck.0.weight": (256, 768, 1, 1), "neck.2.weight": (256, 256, 3, 3)}
    shapes |= {f"neck.{norm}.{part}": (256,) for norm in (1, 3) for part in ("weight", "bias")}
    for prefix in ("", "image_encoder."):
        theirs = {prefix + name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
        found = {name: tuple(value.shape) for name, value in to_timm_names(model, theirs).items()}
        assert found == {name: tuple(value.shape) for name, value in model.state_dict().items()}


def test_an_entry_needs_an_architecture(tmp_path):
    (tmp_path / "w.pth").write_bytes(b"x")
    with pytest.raises(ModelError, match="timm knows no architecture None. State architecture:"):
        describe_model(ModelSpec(name="x", family="timm_image", path=str(tmp_path / "w.pth")))
