"""The student's first weights: towers from different places, and the published files of UniMed-CLIP and MMKD-CLIP."""

import pytest
import torch
from safetensors.torch import save_file
from upstream import vocabulary_size, write_bert_vocabulary, write_json

from common.errors import TrainError
from trainer.architecture import load_tokenizer, resolve_architecture
from trainer.config import ModelConfig
from trainer.starting_weights import identify, load_image_tower, load_pretrained, load_start, load_text_tower
from trainer.student import Student

BIOMED_BERT = "microsoft/BiomedNLP-BiomedBERT-base-uncased-abstract"


@pytest.fixture
def vocabulary(tmp_path):
    return write_bert_vocabulary(tmp_path / "bert")


@pytest.fixture
def small_paper_student(tmp_path, vocabulary) -> Student:
    """The paper's student, made small: the same kinds of towers, pooling and projection."""
    bert = {"model_type": "bert", "vocab_size": vocabulary_size(vocabulary), "hidden_size": 32}
    bert |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
    model_cfg = {
        "embed_dim": 16,
        "quick_gelu": True,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 16},
        "text_cfg": {
            "hf_model_name": str(write_json(tmp_path / "bert-config.json", bert)),
            "hf_tokenizer_name": BIOMED_BERT,
            "hf_proj_type": "mlp",
            "hf_pooler_type": "cls_last_hidden_state_pooler",
            "context_length": 24,
        },
    }
    architecture = write_json(tmp_path / "small-mmkd.json", {"model_cfg": model_cfg})
    return Student(resolve_architecture(str(architecture), str(vocabulary)))


def fork_names(student: Student) -> dict[str, torch.Tensor]:
    """The student's tensors as UniMed-CLIP's fork saves them, all one greater than they are now."""
    tensors = {
        name.replace("text.", "text_encoder.", 1) if name.startswith("text.") else name: value + 1
        for name, value in student.model.state_dict().items()
    }
    tensors["text_encoder.transformer.embeddings.position_ids"] = torch.arange(64)[None]
    return tensors


@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "training checkpoint"])
def test_a_published_student_is_a_first_weight(small_paper_student, tmp_path, wrapped):
    before = {name: value.clone() for name, value in small_paper_student.model.state_dict().items()}
    content = fork_names(small_paper_student)
    if wrapped:
        module = {f"module.{name}": value for name, value in content.items()}
        content = {"epoch": 3, "name": "run", "state_dict": module, "optimizer": {"state": {0: torch.zeros(2)}}}
    torch.save(content, tmp_path / "MMKD_B16.pth")
    load_pretrained(small_paper_student, str(tmp_path / "MMKD_B16.pth"), "mmkd-b16")
    after = small_paper_student.model.state_dict()
    assert all(torch.equal(after[name], before[name] + 1) for name in before)


def test_the_papers_student_is_packaged_and_needs_only_a_vocabulary(vocabulary):
    architecture = resolve_architecture("mmkd-b16", str(vocabulary))
    config = architecture.config["model_cfg"]
    assert (config["embed_dim"], config["quick_gelu"], config["text_cfg"]["context_length"]) == (512, True, 256)
    tokens = load_tokenizer(architecture)(["a chest x ray", "normal " * 400])
    assert tokens.shape == (2, 256)
    assert tokens[0, 0] == 2  # [CLS]
    assert tokens[1, -1] == 3  # cut, and still ended by [SEP]
    with torch.device("meta"):
        from common.models.open_clip import build

        model = build(config)
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(195.9e6, abs=0.05e6)
    assert len(model.state_dict()) == 352


def test_without_vocabulary_and_hub_it_says_what_to_give(monkeypatch):
    with pytest.raises(
        TrainError, match=r"tokenizer of mmkd-b16 is that of microsoft/.*name a folder .*model\.tokenizer"
    ):
        resolve_architecture("mmkd-b16")


def test_a_folder_without_a_vocabulary_is_no_tokenizer(tmp_path):
    with pytest.raises(TrainError, match="holds no tokenizer files"):
        resolve_architecture("mmkd-b16", str(tmp_path))


def test_an_image_tower_of_its_own(small_paper_student, tmp_path):
    before = {name: value.clone() for name, value in small_paper_student.model.state_dict().items()}
    clip = {name: value + 1 for name, value in before.items() if name.startswith("visual.")}
    # A CLIP checkpoint brings a text tower too, in the old layout; it is left alone.
    clip |= {"positional_embedding": torch.zeros(77, 8), "text_projection": torch.zeros(8, 16)}
    clip |= {"logit_scale": torch.tensor(1.0)}
    save_file({name: value.contiguous() for name, value in clip.items()}, tmp_path / "metaclip.safetensors")
    load_image_tower(small_paper_student, str(tmp_path / "metaclip.safetensors"), "mmkd-b16")
    after = small_paper_student.model.state_dict()
    assert all(torch.equal(after[name], before[name] + 1) for name in before if name.startswith("visual."))
    assert all(torch.equal(after[name], before[name]) for name in before if name.startswith("text."))


def test_an_image_tower_must_be_whole(small_paper_student, tmp_path):
    clip = {name: value for name, value in small_paper_student.model.state_dict().items() if name != "visual.proj"}
    save_file({name: value.contiguous() for name, value in clip.items()}, tmp_path / "torn.safetensors")
    with pytest.raises(TrainError, match=r"model\.vision_weights.*do not fit.*Missing: proj"):
        load_image_tower(small_paper_student, str(tmp_path / "torn.safetensors"), "mmkd-b16")


def test_a_tag_of_another_activation_is_refused_before_anything_is_fetched(small_paper_student):
    with pytest.raises(TrainError, match="another activation"):
        load_image_tower(small_paper_student, "ViT-B-16/laion400m_e32", "mmkd-b16")


def test_a_tag_that_is_unknown_lists_the_known(small_paper_student):
    with pytest.raises(TrainError, match=r"neither a file nor a pretrained tag of ViT-B-16-quickgelu .*metaclip_400m"):
        load_image_tower(small_paper_student, "ViT-B-16-quickgelu/metaklip", "mmkd-b16")


@pytest.mark.parametrize("kind", ["masked-language model", "plain", "folder"])
def test_a_text_tower_of_its_own(small_paper_student, tmp_path, kind):
    tower = small_paper_student.model.text.transformer
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    bert = {name: value + 1 for name, value in before.items()}
    bert["embeddings.position_ids"] = torch.arange(64)[None]
    bert["pooler.dense.weight"] = torch.zeros(32, 32)
    if kind == "masked-language model":
        bert = {f"bert.{name}": value for name, value in bert.items()} | {"cls.predictions.bias": torch.zeros(3)}
    torch.save(bert, tmp_path / "pytorch_model.bin")
    load_text_tower(small_paper_student, str(tmp_path if kind == "folder" else tmp_path / "pytorch_model.bin"))
    assert all(torch.equal(value, before[name] + 1) for name, value in tower.state_dict().items())


def test_a_text_tower_that_lacks_a_layer_is_refused(small_paper_student, tmp_path):
    bert = dict(small_paper_student.model.text.transformer.state_dict())
    del bert["embeddings.word_embeddings.weight"]
    torch.save(bert, tmp_path / "bert.bin")
    with pytest.raises(TrainError, match=r"Missing: embeddings\.word_embeddings\.weight"):
        load_text_tower(small_paper_student, str(tmp_path / "bert.bin"))


def test_text_weights_need_a_bert(student_folder):
    student = Student(resolve_architecture(str(student_folder)))
    with pytest.raises(TrainError, match="fills a transformers text tower"):
        load_text_tower(student, "anything")


def test_both_towers_together_and_what_is_left_random(small_paper_student, tmp_path):
    before = {name: value.clone() for name, value in small_paper_student.model.state_dict().items()}
    visual = {name: value + 1 for name, value in before.items() if name.startswith("visual.")}
    save_file({name: value.contiguous() for name, value in visual.items()}, tmp_path / "v.safetensors")
    bert = {n: v + 2 for n, v in small_paper_student.model.text.transformer.state_dict().items()}
    torch.save(bert, tmp_path / "t.bin")
    config = ModelConfig(vision_weights=str(tmp_path / "v.safetensors"), text_weights=str(tmp_path / "t.bin"))
    towers = load_start(small_paper_student, config)
    after = small_paper_student.model.state_dict()
    assert torch.equal(after["visual.conv1.weight"], before["visual.conv1.weight"] + 1)
    name = "text.transformer.embeddings.word_embeddings.weight"
    assert torch.equal(after[name], before[name] + 2)
    assert torch.equal(after["text.proj.0.weight"], before["text.proj.0.weight"])
    assert towers.image.endswith("v.safetensors")


def test_first_weights_are_known_by_their_content_wherever_they_lie(tmp_path):
    for place, value in (("here", 1.0), ("there", 1.0), ("other", 2.0)):
        (tmp_path / place).mkdir()
        save_file({"weight": torch.full((2,), value)}, str(tmp_path / place / "model.safetensors"))

    def known(place, name="weights"):
        return identify(ModelConfig(**{name: str(tmp_path / place / "model.safetensors")}))

    assert known("here") == known("there") != known("other")
    assert str(tmp_path) not in str(known("here"))
    assert set(known("here", "text_weights")) == {"text_weights"}
    folder = identify(ModelConfig(text_weights=str(tmp_path / "there")))
    assert folder == known("here", "text_weights")
    assert identify(ModelConfig()) == {}


def test_published_weights_are_known_by_their_names():
    found = identify(ModelConfig(architecture="ViT-B-16", weights="openai", vision_weights="ViT-B-32/openai"))
    assert found == {"weights": "ViT-B-16/openai", "vision_weights": "ViT-B-32/openai"}
