"""UniMed-CLIP's fork of open_clip, which MMKD-CLIP shares, against the recipe written out."""

import numpy as np
import pytest
import torch
import upstream_open_clip as upstream

from common.errors import ModelError
from common.models.architectures import read_architecture
from common.models.embed import embed_images, embed_texts
from common.models.load import find_spec, load_model, read_catalog
from common.models.open_clip import build, inspect
from common.models.unimed import to_stock_names

WRITERS = [upstream.write_unimed_clip, upstream.write_mmkd_clip]


def find(written, folder, **changes):
    catalog = read_catalog(upstream.user_catalog(written, folder / "mine.yaml", **changes))
    return find_spec(f"{written.name}={written.place}", catalog)


@pytest.mark.parametrize("write", WRITERS)
def test_the_forks_vectors(write, tmp_path):
    written = write(tmp_path / "up")
    model = load_model(find(written, tmp_path))
    pictures, captions = upstream.pictures(), list(upstream.CAPTIONS)
    image, text = embed_images(model, pictures), embed_texts(model, captions)
    np.testing.assert_allclose(image, written.image(pictures), atol=1e-4)
    np.testing.assert_allclose(text, written.text(captions), atol=1e-4)
    np.testing.assert_allclose(embed_images(model, pictures[::-1])[::-1], image, atol=1e-6)
    np.testing.assert_allclose(embed_texts(model, captions[:1]), text[:1], atol=1e-6)


def test_the_wrong_activation_is_refused(tmp_path):
    written = upstream.write_unimed_clip(tmp_path / "up")
    with pytest.raises(ModelError, match="activation is gelu, expected quickgelu"):
        load_model(find(written, tmp_path, recipe={"activation": "gelu"}))


def test_stock_names_load_too_and_other_models_do_not(tmp_path):
    written = upstream.write_unimed_clip(tmp_path / "up")
    tensors = torch.load(written.place, weights_only=True)
    torch.save(to_stock_names(tensors), written.place)
    model = load_model(find(written, tmp_path))
    np.testing.assert_allclose(embed_images(model, upstream.pictures()), written.image(upstream.pictures()), atol=1e-4)
    torch.save({name: value for name, value in tensors.items() if "text_encoder" not in name}, written.place)
    with pytest.raises(ModelError, match=r"Missing: text\.proj\.0\.weight"):
        load_model(find(written, tmp_path))


def test_a_stray_tensor_is_refused(tmp_path):
    written = upstream.write_unimed_clip(tmp_path / "up")
    tensors = torch.load(written.place, weights_only=True)
    torch.save({**tensors, "text_encoder.extra": torch.zeros(1)}, written.place)
    with pytest.raises(ModelError, match=r"unexpected: text\.extra"):
        load_model(find(written, tmp_path))


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("unimed-clip", "mmkd-b16"),
        ("mmkd-clip", "mmkd-b16"),
        ("unimed-clip-l14-base", "unimed-l14-base"),
        ("unimed-clip-l14-large", "unimed-l14-large"),
    ],
)
def test_full_size_is_what_the_catalog_expects(name, architecture):
    config = read_architecture(architecture, name)["model_cfg"]
    with torch.device("meta"):
        model = build(config)
    found = {**inspect(model), "dim": config["embed_dim"], "image_size": config["vision_cfg"]["image_size"]}
    found["context_length"] = config["text_cfg"]["context_length"]
    expect = read_catalog()[name].expect.model_dump(exclude_none=True)
    assert expect
    assert {key: found[key] for key in expect} == expect


def test_full_size_names_of_the_fork_are_those_of_the_stock_model():
    import open_clip
    from transformers import BertConfig, BertModel

    with torch.device("meta"):
        model = build(read_architecture("mmkd-b16", "x")["model_cfg"])
        clip = open_clip.CLIP(**open_clip.get_model_config("ViT-B-16-quickgelu")).state_dict()
        bert = BertModel(BertConfig(), add_pooling_layer=False).state_dict()
    fork = {name: value for name, value in clip.items() if name.startswith("visual.") or name == "logit_scale"}
    fork |= {f"text_encoder.transformer.{name}": value for name, value in bert.items()}
    fork |= {"text_encoder.proj.0.weight": torch.empty(640, 768), "text_encoder.proj.2.weight": torch.empty(512, 640)}
    fork["text_encoder.transformer.embeddings.position_ids"] = torch.arange(512)[None]
    assert len(fork) == 353
    shapes = {name: value.shape for name, value in to_stock_names(fork).items()}
    assert shapes == {name: value.shape for name, value in model.state_dict().items()}
