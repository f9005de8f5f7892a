"""Published models laid out anew for stock open_clip, and image encoders among models to evaluate."""

import json

import numpy as np
import open_clip
import pytest
import timm
import torch
from PIL import Image
from upstream import vocabulary_size, write_bert_vocabulary, write_json

from common.errors import ConfigError, EvaluateError
from common.models.embed import embed_images, embed_texts
from common.models.load import find_spec, load_model, read_catalog
from trainer.config import EvaluateConfig
from trainer.evaluation.models import find_model
from trainer.evaluation.run import evaluate
from trainer.export import export_model

CAPTIONS = ["a chest x ray", "a slide showing tumour cells", "normal " * 60]


@pytest.fixture
def published(tmp_path):
    """A small MMKD_B16.pth in the fork's layout with BiomedBERT's vocabulary beside it, and its catalog."""
    home = write_bert_vocabulary(tmp_path / "published")
    bert = {"model_type": "bert", "vocab_size": vocabulary_size(home), "hidden_size": 32, "num_hidden_layers": 1}
    bert |= {"num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    config = str(write_json(tmp_path / "bert-config.json", bert))
    vision = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16}
    text = {"hf_model_name": config, "hf_tokenizer_name": "nobody/nothing", "hf_proj_type": "mlp"}
    text |= {"hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": 24, "hf_model_pretrained": False}
    model_cfg = {"embed_dim": 16, "quick_gelu": True, "vision_cfg": vision, "text_cfg": text}
    architecture = write_json(tmp_path / "small.json", {"model_cfg": model_cfg})
    torch.manual_seed(0)
    state = open_clip.CustomTextCLIP(**json.loads(architecture.read_text())["model_cfg"]).state_dict()
    fork = {
        f"module.{n.replace('text.', 'text_encoder.', 1) if n.startswith('text.') else n}": v for n, v in state.items()
    }
    torch.save({"epoch": 1, "state_dict": fork}, home / "MMKD_B16.pth")
    expect = {"dim": 16, "activation": "quickgelu", "image_heads": 2}
    entry = {"architecture": str(architecture), "expect": expect}
    catalog = read_catalog(str(write_json(tmp_path / "mine.yaml", {"mmkd-clip": entry})))
    return home / "MMKD_B16.pth", catalog


def pictures(count: int) -> list[bytes]:
    import io

    found = []
    for seed in range(count):
        buffer = io.BytesIO()
        pixels = np.random.default_rng(seed).integers(0, 255, (40, 53, 3), np.uint8)
        Image.fromarray(pixels).save(buffer, "PNG")
        found.append(buffer.getvalue())
    return found


def test_the_published_name_alone_tells_the_model(published):
    file, catalog = published
    spec = find_spec(str(file), catalog)
    assert (spec.name, spec.family, spec.path) == ("mmkd-clip", "unimed", str(file))
    model = load_model(str(file), catalog)
    assert embed_images(model, pictures(2)).shape == (2, 16)
    assert embed_texts(model, CAPTIONS).shape == (3, 16)


def test_stock_open_clip_opens_the_export_and_gives_the_same_vectors(published, tmp_path):
    import io

    file, catalog = published
    out = export_model(find_spec(f"mmkd-clip={file}", catalog), str(tmp_path / "out"))
    stock, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    stock.eval()
    tokens = open_clip.get_tokenizer(f"local-dir:{out}")(CAPTIONS)
    pixels = torch.stack([preprocess(Image.open(io.BytesIO(data)).convert("RGB")) for data in pictures(2)])
    with torch.no_grad():
        image, text = stock.encode_image(pixels, normalize=True), stock.encode_text(tokens, normalize=True)
    mine = load_model(str(file), catalog)
    np.testing.assert_allclose(embed_images(mine, pictures(2)), image, atol=1e-5)
    np.testing.assert_allclose(embed_texts(mine, CAPTIONS), text, atol=1e-5)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "MMKD-CLIP" in card
    assert "Licence: unclear" in card


def test_the_command_exports_it_too(published, tmp_path):
    from typer.testing import CliRunner

    from cluster.cli import app

    command = ["export", f"mmkd-clip={published[0]}", str(tmp_path / "out"), "--catalog", str(tmp_path / "mine.yaml")]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert (tmp_path / "out" / "open_clip_model.safetensors").is_file()


def test_an_export_is_a_student_like_any_other(published, tmp_path):
    file, catalog = published
    out = export_model(find_spec(f"mmkd-clip={file}", catalog), str(tmp_path / "out"))
    assert export_model(find_spec(f"mmkd-clip={file}", catalog), str(tmp_path / "out")) == out  # and twice
    assert find_model(out, catalog).kind == "student"


def test_families_that_open_clip_cannot_hold_are_refused(tmp_path):
    spec = read_catalog()["pmc-clip"].at(str(tmp_path))
    with pytest.raises(ConfigError, match="of the pmc_clip family, which stock open_clip cannot hold"):
        export_model(spec, str(tmp_path / "out"))


@pytest.fixture
def image_encoder(tmp_path) -> str:
    """A catalog file with a small timm model."""
    model = timm.create_model("resnet10t", num_classes=0)
    torch.save(model.state_dict(), tmp_path / "eye.pth")
    geometry = {"size": 32, "resize": "squash"}
    entry = {"family": "timm_image", "architecture": "resnet10t", "path": "eye.pth", "recipe": {"geometry": geometry}}
    return str(write_json(tmp_path / "eye.yaml", {"eye": entry}))


def test_evaluate_leaves_image_encoders_out_and_says_so(small_lake, model_folder, image_encoder, caplog):
    catalog = read_catalog(image_encoder)
    models = [find_model("eye", catalog), find_model(f"both={model_folder('both')}", catalog)]
    scores = evaluate(small_lake.uri, models, EvaluateConfig(bootstraps=10)).scores
    assert set(scores["model"].to_pylist()) == {"both"}
    with pytest.raises(EvaluateError, match="eye have no text tower"):
        evaluate(small_lake.uri, models[:1], EvaluateConfig(bootstraps=10))
