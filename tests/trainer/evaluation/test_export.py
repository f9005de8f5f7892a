import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
import yaml
from changed_pairs import without_captions
from PIL import Image
from torch.nn.functional import normalize

from common.errors import ConfigError, ModelError, TrainError
from common.images import decode_rgb, fit
from common.models.load import find_spec, load_model, load_tokenizer
from trainer.config import EvaluateConfig
from trainer.evaluation.models import find_model
from trainer.evaluation.run import evaluate
from trainer.export import export_checkpoint

TEXTS = ["radiograph showing a cyst", "Normal radiograph, 2 views!"]

# Runs without this project: its packages are refused, and the working directory is elsewhere.
STOCK = """
import json, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("common", "trainer", "extractor", "cluster"):
            raise ImportError(name + " is out of bounds")
sys.meta_path.insert(0, Refuse())
import open_clip, torch
from PIL import Image
torch.set_num_threads(1)
folder, picture, texts = "local-dir:" + sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model, _, preprocess = open_clip.create_model_and_transforms(folder)
tokenizer = open_clip.get_tokenizer(folder)
model.eval()
with torch.no_grad():
    image = model.encode_image(preprocess(Image.open(picture).convert("RGB"))[None], normalize=True)
    text = model.encode_text(tokenizer(texts), normalize=True)
print(json.dumps({"image": image.tolist(), "text": text.tolist(), "scale": model.logit_scale.exp().item()}))
"""


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "picture.png"
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (57, 81, 3), dtype=np.uint8)).save(path)
    return path


def stock_open_clip(folder: str, picture: Path) -> dict:
    command = [sys.executable, "-W", "ignore", "-c", STOCK, folder, str(picture), json.dumps(TEXTS)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=picture.parent, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_stock_open_clip_gives_the_same_embeddings(checkpoint, tmp_path, picture):
    folder = checkpoint(tmp_path / "run", scale=3.25, seed=2)
    exported = export_checkpoint(str(folder), str(tmp_path / "student"))
    stock = stock_open_clip(exported, picture)
    spec = find_spec(f"mine={exported}", {})
    model, tokenize = load_model(spec), load_tokenizer(spec)
    pixels = fit(decode_rgb(picture.read_bytes()), model.description.geometry)
    with torch.inference_mode():
        image = normalize(model.encode_image(torch.from_numpy(pixels)[None]), dim=-1)
        text = normalize(model.encode_text(torch.from_numpy(tokenize(TEXTS))), dim=-1)
    np.testing.assert_allclose(stock["image"], image.numpy(), atol=1e-6)
    np.testing.assert_allclose(stock["text"], text.numpy(), atol=1e-6)
    assert stock["scale"] == pytest.approx(np.exp(3.25), rel=1e-6)
    assert model.logit_scale == pytest.approx(np.exp(3.25), rel=1e-6)


def test_a_tokenizer_of_its_own_travels_with_the_model(checkpoint, model_cfg, tmp_path, picture):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"[PAD]": 0, "[UNK]": 1, "radiograph": 2, "normal": 3, "cyst": 4}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    own = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]")
    files = {Path(name).name: Path(name).read_bytes() for name in own.save_pretrained(tmp_path / "own")}
    model_cfg["text_cfg"]["hf_tokenizer_name"] = "own"
    folder = checkpoint(tmp_path / "run", model_cfg=model_cfg, tokenizer=files)
    exported = export_checkpoint(str(folder), str(tmp_path / "student"))
    stock = stock_open_clip(exported, picture)
    spec = find_spec(f"mine={exported}", {})
    tokens = load_tokenizer(spec)(["normal radiograph"])
    assert tokens[0, :3].tolist() == [3, 2, 0]
    with torch.inference_mode():
        text = normalize(load_model(spec).encode_text(torch.from_numpy(load_tokenizer(spec)(TEXTS))), dim=-1)
    np.testing.assert_allclose(stock["text"], text.numpy(), atol=1e-6)


def test_the_folder_holds_a_card_with_data_teachers_recipe_and_scores(checkpoint, small_lake, tmp_path):
    teacher = {"weights_sha256": "ab" * 32}
    for name, terms in (("alpha", "no restrictions known"), ("beta", None)):
        small_lake.storage.write_json(
            f"manifests/teachers/{name}.json",
            {
                "fingerprint": teacher,
                "logit_scale": 100.0,
                "license": "MIT",
                "derivatives": "allowed" if terms else "unknown",
                "derivative_terms": terms,
            },
        )
    run = Path(small_lake.uri) / "runs" / "stage2-x"
    folder = checkpoint(run, teachers=("alpha", "beta"))
    evaluate(small_lake.uri, [find_model(f"distilled={run}", {})], EvaluateConfig(bootstraps=20))
    exported = Path(export_checkpoint(str(run), str(tmp_path / "student"), name="Tiny student"))
    card = (exported / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "open_clip"
    assert "# Tiny student" in card
    assert "72 image-caption pairs" in card
    assert "CC-BY 48, not stated 24" in card
    assert "| alpha | MIT | no restrictions known | not needed | `abababababababab` |" in card
    assert "| beta | MIT | not recorded: find out before you publish" in card
    assert "epochs: 3" in card
    assert "| distilled |" in card
    assert f"from checkpoint `{folder.relative_to(small_lake.uri)}`" in card
    assert small_lake.uri not in card, "where a lake lies says nothing about a model"
    manifest = json.loads((exported / "mmkd_export.json").read_text())
    assert sorted(manifest["files"]) == sorted(path.name for path in exported.iterdir())


def test_the_card_counts_pairs_and_not_pictures_without_captions(checkpoint, small_lake, tmp_path):
    without_captions(small_lake, lambda number: number < 12)
    folder = checkpoint(tmp_path / "run", seed=3)
    card = (Path(export_checkpoint(str(folder), str(tmp_path / "student"), lake=small_lake)) / "README.md").read_text()
    assert "60 image-caption pairs" in card
    assert "specimen 10" in card


def test_scores_of_other_weights_stay_out_of_the_card(checkpoint, small_lake, tmp_path):
    run = Path(small_lake.uri) / "runs" / "stage2-x"
    checkpoint(run, step=1, seed=1)
    evaluate(small_lake.uri, [find_model(f"distilled={run}", {})], EvaluateConfig(bootstraps=20))
    checkpoint(run, step=2, seed=2)
    exported = Path(export_checkpoint(str(run), str(tmp_path / "student")))
    assert "Not evaluated yet" in (exported / "README.md").read_text()


def test_an_export_replaces_an_export_and_nothing_else(checkpoint, tmp_path):
    folder = checkpoint(tmp_path / "run")
    out = tmp_path / "out"
    export_checkpoint(str(folder), str(out))
    manifest = json.loads((out / "mmkd_export.json").read_text())
    (out / "tokenizer.json").write_text("left over from the older export")
    (out / "mmkd_export.json").write_text(json.dumps({**manifest, "files": [*manifest["files"], "tokenizer.json"]}))
    export_checkpoint(str(folder), str(out))
    assert not (out / "tokenizer.json").exists()
    thesis = tmp_path / "thesis"
    thesis.mkdir()
    (thesis / "README.md").write_text("mine")
    with pytest.raises(ConfigError, match="--force"):
        export_checkpoint(str(folder), str(thesis))
    assert (thesis / "README.md").read_text() == "mine"
    export_checkpoint(str(folder), str(thesis), force=True)
    assert "Research only" in (thesis / "README.md").read_text()


def test_any_fsspec_address_can_be_written(checkpoint, tmp_path):
    import fsspec

    folder = checkpoint(tmp_path / "run")
    uri = export_checkpoint(str(folder), "memory://exports/student")
    names = {entry.rsplit("/", 1)[-1] for entry in fsspec.filesystem("memory").ls("/exports/student", detail=False)}
    assert uri == "memory://exports/student"
    assert names == {"README.md", "mmkd_export.json", "open_clip_config.json", "open_clip_model.safetensors"}


def test_two_exports_of_a_checkpoint_have_equal_weights_files(checkpoint, tmp_path):
    folder = checkpoint(tmp_path / "run")
    files = [Path(export_checkpoint(str(folder), str(tmp_path / n))) / "open_clip_model.safetensors" for n in "ab"]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_clear_errors(checkpoint, model_cfg, tmp_path):
    with pytest.raises(TrainError, match="no checkpoint at"):
        export_checkpoint(str(tmp_path / "nowhere"), str(tmp_path / "out"))
    model_cfg["vision_cfg"]["width"] = 48
    with pytest.raises(ModelError, match="does not fit its architecture"):
        export_checkpoint(str(checkpoint(tmp_path / "other", model_cfg=model_cfg)), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
    folder = checkpoint(tmp_path / "run")
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100])
    with pytest.raises(TrainError, match="torn"):
        export_checkpoint(str(folder), str(tmp_path / "out"))


def test_card_table_is_built_from_given_scores(checkpoint, tmp_path, small_lake):
    folder = checkpoint(tmp_path / "run")
    scores = evaluate(small_lake.uri, [find_model(f"given={folder}", {})], EvaluateConfig(bootstraps=20)).scores
    assert isinstance(scores, pa.Table)
    exported = Path(export_checkpoint(str(folder), str(tmp_path / "student"), lake=small_lake, scores=scores))
    assert "| given |" in (exported / "README.md").read_text()
