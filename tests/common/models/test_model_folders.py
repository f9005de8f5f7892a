"""How model folders are read: no code of theirs runs, weights in several files, files that cannot be read."""

import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from upstream import unit, write_json
from upstream_others import HF_CONTEXT, HF_SIZE, assert_close, opened, pictures, write_byte_tokenizer

from common.errors import ModelError
from common.models.convert import save_tensors
from common.models.embed import embed_images, embed_texts
from common.models.load import describe_model, find_spec, load_model, load_tokenizer
from common.models.spec import ModelSpec
from common.models.store import FetchPlan, fetch

ROOT = Path(__file__).resolve().parents[3]
PICTURES = pictures(HF_SIZE)
OWN_CODE = (
    r"^Model 'm': .* needs its authors' own code .*which mmkd does not run\. Convert .* open_clip or transformers"
)
MARK = "mmkd-code-ran"
MARKING = f"open({MARK!r}, 'w').close()\nclass My:\n    pass\n"


@pytest.fixture
def hf(make_hf_clip_folder, tmp_path):
    return shutil.copytree(make_hf_clip_folder("hf"), tmp_path / "hf")


@pytest.fixture
def stock(make_clip_folder):
    return make_clip_folder("stock")


def change(file, **values):
    write_json(file, {**(json.loads(file.read_text()) if file.exists() else {}), **values})


# --- Code in a model's folder ---------------------------------------------------------------------------------------


@pytest.fixture
def nobody_is_asked(monkeypatch, tmp_path):
    """Neither a question nor a run of the folder's code may happen."""
    asked = []
    monkeypatch.setattr("builtins.input", lambda *text: asked.append(text) or "y")
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    start = time.monotonic()
    yield
    assert asked == []
    assert not (work / MARK).exists()
    assert time.monotonic() - start < 14  # transformers waits 15 s for an answer


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize("ask", [describe_model, load_model, load_tokenizer])
def test_the_reported_folder_with_code_is_refused_at_once(shared_data, tmp_path, ask):
    folder = shutil.copytree(shared_data / "reports" / "case-08" / "model", tmp_path / "model")
    with pytest.raises(ModelError, match=OWN_CODE):
        ask(find_spec(f"m={folder}", {}))


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize("ask", [describe_model, load_model, load_tokenizer])
@pytest.mark.parametrize("place", ["configuration_my.My", "someone/elsewhere--configuration_my.My"])
def test_a_folder_whose_model_type_only_its_code_knows_is_refused(hf, ask, place):
    (hf / "configuration_my.py").write_text(MARKING)
    change(hf / "config.json", model_type="my_clip", auto_map={"AutoConfig": place, "AutoModel": place})
    with pytest.raises(ModelError, match=OWN_CODE):
        ask(find_spec(f"m={hf}", {}))


@pytest.mark.usefixtures("nobody_is_asked")
def test_a_folder_that_transformers_loads_without_its_code_loads_as_before(hf, make_hf_clip_folder):
    """Published CLIPs carry an auto_map for older versions of transformers."""
    (hf / "modeling_my.py").write_text(MARKING)
    change(hf / "config.json", auto_map={"AutoConfig": "modeling_my.My", "AutoModel": "modeling_my.My"})
    plain = load_model(find_spec(f"m={make_hf_clip_folder('hf')}", {}))
    assert_close(embed_images(load_model(find_spec(f"m={hf}", {})), PICTURES), embed_images(plain, PICTURES))


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize("ask", [describe_model, load_model])
def test_an_image_processor_of_ones_own_code_is_refused(hf, ask):
    (hf / "processing_my.py").write_text(MARKING)
    own = {"AutoImageProcessor": "processing_my.My"}
    change(hf / "preprocessor_config.json", image_processor_type="MyImageProcessor", auto_map=own)
    with pytest.raises(ModelError, match=r"image_processor_type = 'MyImageProcessor', which is its authors' own code"):
        ask(find_spec(f"m={hf}", {}))


def write_open_tokenizer(folder, **text):
    """An open_clip folder with a transformers tokenizer that only code of the folder can build."""
    write_byte_tokenizer(folder, HF_CONTEXT)
    (folder / "tokenization_my.py").write_text(MARKING)
    own = {"AutoTokenizer": [None, "tokenization_my.My"]}
    change(folder / "tokenizer_config.json", tokenizer_class="MyTokenizer", auto_map=own)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] |= {"hf_tokenizer_name": "someone/words", **text}
    write_json(folder / "open_clip_config.json", config)


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize("text", [{}, {"tokenizer_kwargs": {"trust_remote_code": True}}], ids=["plain", "trusting"])
def test_a_tokenizer_of_ones_own_code_is_refused_before_a_worker_loads_it(stock, text):
    write_open_tokenizer(stock, **text)
    with pytest.raises(ModelError, match=OWN_CODE):
        describe_model(find_spec(f"m={stock}", {}))
    with pytest.raises((ModelError, ValueError)):
        load_tokenizer(find_spec(f"m={stock}", {}))


@pytest.mark.usefixtures("nobody_is_asked")
@pytest.mark.parametrize("ask", [describe_model, load_model])
def test_a_text_tower_of_ones_own_code_is_refused(stock, ask):
    (stock / "configuration_my.py").write_text(MARKING)
    write_json(stock / "config.json", {"model_type": "my_bert", "auto_map": {"AutoConfig": "configuration_my.My"}})
    config = json.loads((stock / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": str(stock / "config.json"), "hf_pooler_type": "cls_pooler"}
    write_json(stock / "open_clip_config.json", config)
    write_byte_tokenizer(stock, HF_CONTEXT)
    with pytest.raises(ModelError, match=OWN_CODE):
        ask(find_spec(f"m={stock}", {}))


# --- Weights in several files ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("form", ["model", "model_bin"])
def test_the_reported_folders_with_weights_in_several_files_load(shared_data, form):
    from transformers import CLIPImageProcessorPil, CLIPModel

    folder = shared_data / "reports" / "case-09" / form
    model, stock = load_model(find_spec(f"m={folder}", {})), CLIPModel.from_pretrained(folder).eval()
    rows = CLIPImageProcessorPil.from_pretrained(folder)([opened(data) for data in PICTURES], return_tensors="pt")
    assert_close(embed_images(model, PICTURES), unit(stock.get_image_features(**rows).pooler_output))


def split(folder, name, end, parts=3):
    """A checkpoint in several files as save_pretrained writes it, instead of the one that is there."""
    whole = next(folder.glob("*.safetensors"))
    tensors = load_file(whole)
    whole.unlink()
    places = {tensor: f"{name}-{at % parts + 1:05d}-of-{parts:05d}{end}" for at, tensor in enumerate(sorted(tensors))}
    for file in set(places.values()):
        content = {tensor: value for tensor, value in tensors.items() if places[tensor] == file}
        if end == ".bin":
            torch.save(content, folder / file)
        else:
            save_file(content, folder / file, metadata={"format": "pt"})
    write_json(folder / f"{name}{end}.index.json", {"metadata": {"total_size": 1}, "weight_map": places})
    return sorted(folder / file for file in set(places.values()))


@pytest.mark.parametrize(("name", "end"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_parts_give_the_vectors_of_the_whole_and_each_is_in_the_identity(hf, name, end):
    captions = ["a lung", "an eye"]
    whole = load_model(find_spec(f"m={hf}", {}))
    parts = split(hf, name, end)
    spec = find_spec(f"m={hf}", {})
    assert_close(embed_images(load_model(spec), PICTURES), embed_images(whole, PICTURES), atol=0)
    assert_close(embed_texts(load_model(spec), captions), embed_texts(whole, captions), atol=0)
    seen = {describe_model(spec).weights_sha256}
    for part in parts:
        if end == ".bin":
            torch.save({key: value + 1 for key, value in torch.load(part).items()}, part)
        else:
            save_file({key: value + 1 for key, value in load_file(part).items()}, part, metadata={"format": "pt"})
        seen.add(describe_model(spec).weights_sha256)
    assert len(seen) == len(parts) + 1


def test_an_open_clip_folder_in_several_files_loads(stock, make_clip_folder):
    split(stock, "open_clip_model", ".safetensors")
    plain = load_model(find_spec(f"m={make_clip_folder('stock')}", {}))
    assert_close(embed_images(load_model(find_spec(f"m={stock}", {})), PICTURES), embed_images(plain, PICTURES), atol=0)


@pytest.mark.parametrize("ask", [describe_model, load_model])
@pytest.mark.parametrize(("name", "end"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_a_missing_part_is_named(hf, name, end, ask):
    parts = split(hf, name, end)
    parts[1].unlink()
    with pytest.raises(
        ModelError, match=rf"{name}{end}\.index\.json lists 3 files .* and {parts[1].name} is not there"
    ):
        ask(find_spec(f"m={hf}", {}))


@pytest.mark.parametrize("left", [1, 3])
def test_parts_without_their_index_are_never_advised_away(hf, left):
    parts = split(hf, "model", ".safetensors")
    (hf / "model.safetensors.index.json").unlink()
    for part in parts[left:]:
        part.unlink()
    with pytest.raises(
        ModelError, match=r"whose index model\.safetensors\.index\.json is not there\. Fetch it"
    ) as caught:
        describe_model(find_spec(f"m={hf}", {}))
    assert "Keep one" not in str(caught.value)


def test_parts_beside_another_checkpoint_are_never_advised_away(hf):
    split(hf, "mine", ".safetensors")
    torch.save({}, hf / "other.pt")
    with pytest.raises(
        ModelError, match=r"found other\.pt, mine\.safetensors\.index\.json with the files it"
    ) as caught:
        describe_model(find_spec(f"m={hf}", {}))
    assert "Keep one" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [{}, {"weight_map": {}}, {"weight_map": {"a": "../x.safetensors"}}, [1]], ids=lambda c: json.dumps(c)
)
def test_an_index_that_is_none_is_refused(hf, content):
    split(hf, "model", ".safetensors")
    write_json(hf / "model.safetensors.index.json", content)
    with pytest.raises(ModelError, match=r"Model 'm': .*model\.safetensors\.index\.json .*expected"):
        describe_model(find_spec(f"m={hf}", {}))


def test_an_index_of_another_checkpoint_is_refused(stock):
    split(stock, "open_clip_model", ".safetensors")
    index = stock / "open_clip_model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["logit_scale"], content["weight_map"]["text_projection"] = (
        content["weight_map"]["text_projection"],
        content["weight_map"]["logit_scale"],
    )
    content["weight_map"]["more"] = content["weight_map"]["logit_scale"]
    write_json(index, content)
    with pytest.raises(ModelError, match=r"puts .*more in .*where there is no such tensor"):
        load_model(find_spec(f"m={stock}", {}))


@pytest.mark.parametrize(("name", "end"), [("model", ".safetensors"), ("pytorch_model", ".bin")])
def test_a_store_holds_the_parts_under_the_same_identity(hf, tmp_path, name, end):
    split(hf, name, end)
    spec = find_spec(f"m={hf}", {})
    fetch(FetchPlan(spec), str(tmp_path / "store"))
    stored = load_model(find_spec("m", {}, str(tmp_path / "store")))
    assert stored.description.identity() == describe_model(spec).identity()
    assert_close(embed_images(stored, PICTURES), embed_images(load_model(spec), PICTURES), atol=0)


def test_parts_that_hold_more_than_tensors_are_refused(hf, tmp_path):
    parts = split(hf, "pytorch_model", ".bin")
    torch.save({**torch.load(parts[2]), "best": Path("x")}, parts[2])
    with pytest.raises(ModelError, match="Model 'm'"):
        load_model(find_spec(f"m={hf}", {}))


# --- Files that cannot be read, and files others must be able to read -----------------------------------------------


def in_the_way(file, how):
    file.unlink()
    if how == "folder":
        file.mkdir()
        return "Is a directory"
    file.symlink_to(file.with_name("gone"))
    return "No such file or directory"


@pytest.mark.parametrize("ask", [describe_model, load_model])
@pytest.mark.parametrize("how", ["folder", "link"])
@pytest.mark.parametrize("family", ["open_clip", "hf_clip", "timm_image"])
def test_weights_that_cannot_be_read_are_named_with_the_reason(hf, stock, tmp_path, family, how, ask):
    folder = {"open_clip": stock, "hf_clip": hf, "timm_image": tmp_path / "timm"}[family]
    spec = find_spec(f"m={folder}", {}) if family != "timm_image" else timm_spec(folder)
    file = next(folder.glob("*.safetensors"))
    reason = in_the_way(file, how)
    with pytest.raises(ModelError, match=rf"^Model 'm': {file} cannot be read: {reason}\.$"):
        ask(spec)


def timm_spec(folder):
    folder.mkdir()
    (folder / "model.safetensors").touch()
    return ModelSpec(name="m", family="timm_image", architecture="resnet18", path=str(folder))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
@pytest.mark.parametrize("ask", [describe_model, load_model])
def test_weights_without_permission_are_named_with_the_reason(hf, ask):
    (hf / "model.safetensors").chmod(0)
    with pytest.raises(ModelError, match=r"^Model 'm': .*model\.safetensors cannot be read: Permission denied\.$"):
        ask(find_spec(f"m={hf}", {}))


@pytest.mark.parametrize("how", ["folder", "link"])
def test_a_part_that_cannot_be_read_is_named_with_the_reason(hf, how):
    part = split(hf, "model", ".safetensors")[1]
    reason = in_the_way(part, how)
    with pytest.raises(ModelError, match=rf"^Model 'm': {part} cannot be read: {reason}\.$"):
        load_model(find_spec(f"m={hf}", {}))


def test_a_configuration_that_cannot_be_read_is_named_with_the_reason(hf):
    (hf / "preprocessor_config.json").unlink()
    (hf / "preprocessor_config.json").mkdir()
    with pytest.raises(ModelError, match=r"preprocessor_config\.json cannot be read: Is a directory\.$"):
        describe_model(find_spec(f"m={hf}", {}))


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_files_of_tensors_get_the_umasks_mode(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        save_tensors({"weight": torch.ones(2)}, tmp_path / "w.safetensors")
        save_tensors({"weight": torch.zeros(2)}, tmp_path / "w.safetensors")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == mode
    assert load_file(tmp_path / "w.safetensors")["weight"].tolist() == [0, 0]


def test_one_place_alone_writes_safetensors():
    """safetensors' own function leaves files that only their owner can read."""
    sources = [
        file for package in ("common", "extractor", "trainer", "cluster") for file in (ROOT / package).rglob("*.py")
    ]
    assert len(sources) > 50
    assert [str(file.relative_to(ROOT)) for file in sources if "save_file" in file.read_text()] == [
        "common/models/convert.py"
    ]
