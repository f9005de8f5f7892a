import pytest
import yaml

from common.errors import ConfigError
from trainer.evaluation.prompts import load_templates


def write(tmp_path, content) -> str:
    path = tmp_path / "templates.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def test_packaged_templates_speak_of_the_modality():
    templates = load_templates(None)
    prompts = templates.prompts("pneumonia", "X-Ray")
    assert "radiograph showing pneumonia" in prompts
    assert len(prompts) == len(set(prompts)) >= 4
    assert all("{" not in text for text in prompts)


def test_packaged_templates_for_an_unlisted_modality_are_the_general_ones():
    prompts = load_templates(None).prompts("diatom", "electron microscopy")
    assert "electron microscopy showing diatom" in prompts


def test_a_normal_picture_is_not_said_to_show_normal():
    prompts = load_templates(None).prompts("Normal", "ultrasound")
    assert "normal ultrasound" in prompts
    assert not any(text.endswith("showing Normal") for text in prompts)


def test_own_templates_and_whole_prompts_replace_the_general_ones(tmp_path):
    content = {
        "general": ["{label}"],
        "modalities": [
            {"names": ["Light Microscopy"], "labels": {"tumour": ["malignant cells", "{modality} of a tumour"]}},
            {"names": ["ct"], "templates": ["slice with {label}"]},
        ],
    }
    templates = load_templates(write(tmp_path, content))
    assert templates.prompts("tumour", "light-microscopy") == ["malignant cells", "light-microscopy of a tumour"]
    assert templates.prompts("stroma", "light_microscopy") == ["stroma"]
    assert templates.prompts("cyst", "CT") == ["slice with cyst"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"general": ["a {organ} with {label}"]}, r"unknown placeholder \{organ\}"),
        ({"general": ["{label.__class__}"]}, "unknown placeholder"),
        ({"general": ["a picture"]}, r"lacks \{label\}"),
        ({"general": ["{label"]}, "expected '}'"),
        ({"general": []}, "general"),
        ({"general": ["{label}"], "templates": ["x"]}, "templates is not a setting"),
        ({"general": ["{label}"], "modalities": [{"names": ["ct"], "labels": {"cyst": []}}]}, "has no prompts"),
    ],
)
def test_unsound_templates_are_one_clear_error(tmp_path, content, message):
    with pytest.raises(ConfigError, match=message) as caught:
        load_templates(write(tmp_path, content))
    assert "templates.yaml" in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"nowhere\.yaml"):
        load_templates("nowhere.yaml")
