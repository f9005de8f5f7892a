"""Image encoders without text: LVM-Med's two, from their published layouts."""

import pytest
import torch
import upstream_others as upstream

from common.errors import ModelError
from common.models.embed import embed_images
from common.models.load import describe_model, load_model, load_tokenizer, read_catalog
from common.models.timm_image import build, to_timm_names

PICTURES = upstream.pictures(64)


@pytest.mark.parametrize("classifier", [True, False])
def test_the_residual_network(tmp_path, classifier):
    written = upstream.write_lvm_med_resnet50(tmp_path / "up", classifier=classifier)
    spec = upstream.find(written, tmp_path)
    model = load_model(spec)
    upstream.assert_close(embed_images(model, PICTURES), written.image(PICTURES))
    assert (model.description.text_dim, model.description.tokenizer_sha256, model.logit_scale) == (None, None, None)
    with pytest.raises(ModelError, match="has no text tower"):
        model.encode_text(torch.zeros(1, 4))
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(spec)


@pytest.mark.parametrize("prefix", ["", "image_encoder."])
def test_segment_anythings_encoder(tmp_path, prefix):
    written = upstream.write_lvm_med_vit_b(tmp_path / "up", prefix=prefix)
    model = load_model(upstream.find(written, tmp_path))
    upstream.assert_close(embed_images(model, PICTURES), written.image(PICTURES))
    upstream.assert_neighbours_do_not_matter(model, PICTURES)
    assert model.description.image_dim == 16  # what leaves the neck, not the blocks' 32


def test_a_stray_tensor_is_refused(tmp_path):
    written = upstream.write_lvm_med_resnet50(tmp_path / "up")
    torch.save({**upstream.read(written.place), "neck.weight": torch.zeros(2)}, written.place)
    with pytest.raises(ModelError, match=r"unexpected: neck\.weight"):
        load_model(upstream.find(written, tmp_path))


def test_an_unknown_architecture_is_named(tmp_path):
    written = upstream.write_lvm_med_resnet50(tmp_path / "up")
    with pytest.raises(ModelError, match="timm knows no architecture 'resnet5000'"):
        describe_model(upstream.find(written, tmp_path, architecture="resnet5000"))


def test_full_size_segment_anything_names_and_width():
    spec = read_catalog()["lvm-med-vit-b"]
    with torch.device("meta"):
        model = build(spec)
        names = {name.replace(".mlp.fc", ".mlp.lin"): value for name, value in model.state_dict().items()}
        assert set(to_timm_names(model, names)) == set(model.state_dict())
        assert model.eval()(torch.empty(1, 3, 1024, 1024)).shape[-1] == spec.expect.dim == 256
