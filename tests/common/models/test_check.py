"""Proving a teacher: with a tiny model that has learnt its pairs, and vectors that stock open_clip made from it."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from changed_pairs import without_captions
from PIL import Image
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cluster.commands.models import teachers_app
from common.errors import LakeError, MmkdError, ModelError
from common.models.check import MIN_PAIRS, Finding, Pairs, check_teacher, format_findings, read_golden, read_lake_pairs
from common.models.load import find_spec, read_catalog
from common.models.spec import ModelSpec

COLOURS = {
    "red": (220, 30, 30),
    "green": (30, 200, 40),
    "blue": (20, 40, 220),
    "yellow": (230, 220, 30),
    "purple": (150, 30, 170),
    "cyan": (30, 210, 220),
    "black": (10, 10, 10),
    "white": (245, 245, 245),
}
CAPTIONS = [f"a picture that is {name}" for name in COLOURS]
WEIGHTS = "open_clip_model.safetensors"


def pictures() -> list[Image.Image]:
    """One colour each, with a little noise, in an odd size."""
    made = []
    for seed, colour in enumerate(COLOURS.values()):
        noise = np.random.default_rng(seed).integers(-10, 10, (40, 52, 3))
        made.append(Image.fromarray(np.clip(np.array(colour) + noise, 0, 255).astype(np.uint8)))
    return made


def stock(folder: Path, activation: str = "gelu"):
    """Model, transform and tokenizer of stock open_clip, which knows nothing of this project."""
    import open_clip

    settings = {"force_quick_gelu": activation == "quickgelu"}
    model, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}", **settings)
    return model.eval(), transform, open_clip.get_tokenizer(f"local-dir:{folder}")


@torch.no_grad()
def stock_vectors(folder: Path, activation: str = "gelu") -> tuple[torch.Tensor, torch.Tensor]:
    model, transform, tokenize = stock(folder, activation)
    images = torch.stack([transform(picture) for picture in pictures()])
    return model.encode_image(images, normalize=True), model.encode_text(tokenize(CAPTIONS), normalize=True)


@pytest.fixture(scope="module")
def untrained(make_clip_folder) -> Path:
    """Random weights, of sizes at which the two activations differ as they do in deep towers."""
    folder = make_clip_folder("untrained")
    state = load_file(folder / WEIGHTS)
    for name, value in state.items():
        if name.endswith("mlp.c_fc.bias"):
            value.fill_(-2)
        if name.endswith("mlp.c_proj.weight"):
            value.mul_(50)
    save_file(state, folder / WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def teacher(untrained, tmp_path_factory) -> Path:
    """The same model, after it has learnt which caption belongs to which colour."""
    folder = tmp_path_factory.mktemp("teacher") / "trained"
    shutil.copytree(untrained, folder)
    model, transform, tokenize = stock(folder)
    images, tokens = torch.stack([transform(picture) for picture in pictures()]), tokenize(CAPTIONS)
    optimizer, target = torch.optim.AdamW(model.parameters(), lr=3e-3), torch.arange(len(CAPTIONS))
    for _ in range(40):
        image, text = model.encode_image(images, normalize=True), model.encode_text(tokens, normalize=True)
        logits = 10 * image @ text.T
        loss = torch.nn.functional.cross_entropy(logits, target) + torch.nn.functional.cross_entropy(logits.T, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (logits.argmax(1) == target).all()
    save_file({name: value.detach().contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS)
    return folder


def plant(folder: Path, image: torch.Tensor, text: torch.Tensor, name: str = "Fake", count: int = len(CAPTIONS)) -> str:
    """Golden data in the layout of MMKD-CLIP's demonstration data."""
    rows = []
    for index, (picture, caption) in enumerate(list(zip(pictures(), CAPTIONS, strict=True))[:count]):
        place = f"features/data_1/{index:032x}"
        (folder / place).mkdir(parents=True)
        picture.save(folder / place / "figure.png")
        vectors = {f"{name}_img": image[index].clone(), f"{name}_txt": text[index].clone()}
        torch.save(
            {**vectors, "Other_img": torch.ones(3), "Other_txt": torch.ones(3)}, folder / place / "clips_output.pt"
        )
        torch.save({"unrelated": torch.ones(1)}, folder / place / "clips_project_output.pt")
        ids = {"folderid": "data_1", "id": f"{index:032x}", "metapath": f"{place}/figure.json"}
        rows.append({**ids, "imgpath": f"{place}/figure.png", "txt": caption})
    (folder / "meta.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


@pytest.fixture(scope="module")
def golden_gelu(teacher, tmp_path_factory) -> str:
    return plant(tmp_path_factory.mktemp("golden-gelu"), *stock_vectors(teacher, "gelu"))


@pytest.fixture(scope="module")
def golden_quickgelu(teacher, tmp_path_factory) -> str:
    return plant(tmp_path_factory.mktemp("golden-quickgelu"), *stock_vectors(teacher, "quickgelu"))


@pytest.fixture(scope="module")
def catalog_file(teacher, tmp_path_factory) -> str:
    """A user's YAML: one model under the golden name, with a rival recipe."""
    file = tmp_path_factory.mktemp("catalog") / "mine.yaml"
    entry = {"path": str(teacher), "golden": "Fake", "recipes": {"quick": {"activation": "quickgelu"}}}
    file.write_text(yaml.safe_dump({"mine": entry}))
    return str(file)


@pytest.fixture
def mine(catalog_file) -> ModelSpec:
    return read_catalog(catalog_file)["mine"]


@pytest.fixture
def plain(teacher) -> ModelSpec:
    """The same without a rival recipe."""
    return ModelSpec(name="mine", path=str(teacher), golden="Fake")


def verdicts(findings: list[Finding]) -> dict[str, str]:
    found = {finding.what: finding.verdict for finding in findings}
    assert len(found) == len(findings)
    return found


def detail(findings: list[Finding], what: str) -> str:
    (found,) = [finding.detail for finding in findings if finding.what == what]
    return found


def changed(teacher: Path, folder: Path, **tensors) -> Path:
    """The teacher with some tensors replaced by what a function makes of them."""
    shutil.copytree(teacher, folder)
    state = load_file(folder / WEIGHTS)
    for name, change in tensors.items():
        state[name.replace("__", ".")] = change(state[name.replace("__", ".")]).contiguous()
    save_file(state, folder / WEIGHTS)
    return folder


# --- The authors' published vectors.


def test_a_good_teacher_passes_every_check(mine, golden_gelu):
    findings = check_teacher(mine, None, read_golden(golden_gelu))
    assert verdicts(findings) == {
        "load": "pass",
        "image vectors": "pass",
        "text vectors": "pass",
        "agreement": "pass",
        "golden": "pass",
        "golden@quick": "-",
    }
    assert {finding.model for finding in findings} == {"mine"}
    assert "(8 samples)" in detail(findings, "golden")
    assert "right caption first 100%" in detail(findings, "agreement")


def test_vectors_of_another_recipe_fail_and_name_it(mine, golden_quickgelu):
    findings = check_teacher(mine, None, read_golden(golden_quickgelu))
    assert verdicts(findings)["golden"] == "FAIL"
    assert verdicts(findings)["golden@quick"] == "fits"
    assert "mine@quick comes closest" in detail(findings, "golden")


def test_the_rival_recipe_passes_under_its_own_name(catalog_file, golden_quickgelu):
    spec = find_spec("mine@quick", read_catalog(catalog_file))
    findings = check_teacher(spec, None, read_golden(golden_quickgelu))
    assert "FAIL" not in verdicts(findings).values()
    assert verdicts(findings)["golden"] == "pass"
    assert {finding.model for finding in findings} == {"mine.quick"}


def test_vectors_that_no_recipe_makes_fail_without_advice(mine, teacher, tmp_path):
    image, text = stock_vectors(teacher)
    findings = check_teacher(mine, None, read_golden(plant(tmp_path, image.flip(1), text)))
    assert verdicts(findings)["golden"] == "FAIL"
    assert verdicts(findings)["golden@quick"] == "-"


def test_wrong_captions_alone_fail(plain, teacher, tmp_path):
    image, text = stock_vectors(teacher)
    findings = check_teacher(plain, None, read_golden(plant(tmp_path, image, text.roll(1, 0))))
    assert verdicts(findings)["golden"] == "FAIL"
    assert "image 1.0000" in detail(findings, "golden")


def test_vectors_of_another_length_are_compared_by_direction(plain, teacher, tmp_path):
    image, text = stock_vectors(teacher)
    findings = check_teacher(plain, None, read_golden(plant(tmp_path, image * 7, text / 3)))
    assert verdicts(findings)["golden"] == "pass"


def test_vectors_of_another_width_fail(plain, tmp_path):
    narrow = torch.nn.functional.normalize(torch.ones(8, 12), dim=1)
    findings = check_teacher(plain, None, read_golden(plant(tmp_path, narrow, narrow)))
    assert verdicts(findings)["golden"] == "FAIL"


def test_a_teacher_without_published_vectors_is_skipped(plain, golden_gelu):
    for name in (None, "Stranger"):
        spec = plain.model_copy(update={"golden": name})
        findings = check_teacher(spec, None, read_golden(golden_gelu))
        assert verdicts(findings)["golden"] == "skip"
        assert "there are: Fake, Other" in detail(findings, "golden")


# --- Agreement of pictures and captions.


def test_a_teacher_that_learnt_nothing_does_not_agree(teacher, untrained, golden_gelu):
    pairs = read_golden(golden_gelu)
    learnt, random = (
        check_teacher(find_spec(f"it={folder}", {}), Pairs(pairs.images, pairs.captions), None)
        for folder in (teacher, untrained)
    )
    assert verdicts(learnt)["agreement"] == "pass"
    assert verdicts(random) == {**verdicts(learnt), "agreement": "FAIL"}


def test_shuffled_captions_do_not_agree(mine, golden_gelu):
    pairs = read_golden(golden_gelu)
    shuffled = Pairs(pairs.images, pairs.captions[1:] + pairs.captions[:1])
    assert verdicts(check_teacher(mine, shuffled, None))["agreement"] == "FAIL"


@pytest.mark.parametrize("count", [1, 4, 5, 6, 7])
def test_too_few_pairs_tell_nothing_and_enough_tell_all(plain, golden_gelu, count):
    pairs = read_golden(golden_gelu)
    findings = check_teacher(plain, Pairs(pairs.images[:count], pairs.captions[:count]), None)
    # A teacher that is right about every pair is never called wrong, however few there are.
    verdict = "pass" if count >= MIN_PAIRS else "skip"
    assert verdicts(findings)["agreement"] == verdict, detail(findings, "agreement")
    if verdict == "skip":
        assert f"{count} pairs are too few" in detail(findings, "agreement")


def test_without_pairs_agreement_is_skipped(mine):
    findings = check_teacher(mine, None, None)
    assert verdicts(findings) == {
        "load": "pass",
        "image vectors": "pass",
        "text vectors": "pass",
        "agreement": "skip",
    }
    assert "--lake or --golden" in detail(findings, "agreement")


def test_pairs_of_a_lake(make_lake, tmp_path):
    make_lake(tmp_path / "lake", rows=20)
    pairs = read_lake_pairs(str(tmp_path / "lake"), count=12)
    assert len(pairs.images) == len(pairs.captions) == len(set(pairs.captions)) == 12
    assert pairs.captions[:2] == ["finding 0 in picture 0", "finding 1 in picture 1"]
    make_lake(tmp_path / "small", rows=4)
    with pytest.raises(LakeError, match=rf"holds 4 pairs with distinct captions; {MIN_PAIRS} are needed"):
        read_lake_pairs(str(tmp_path / "small"))
    with pytest.raises(LakeError, match="There is no lake at"):
        read_lake_pairs(str(tmp_path / "none"))


def test_pictures_without_captions_are_passed_over(make_lake, tmp_path):
    lake = without_captions(make_lake(tmp_path / "lake", rows=20), lambda row: row in (0, 2))
    pairs = read_lake_pairs(lake.uri, count=8)
    assert pairs.captions[:2] == ["finding 1 in picture 1", "finding 3 in picture 3"]
    assert pairs.images[1] == lake.read_pairs(0)["image"][3].as_py()


# --- Models that are broken inside.


def test_weights_that_are_not_numbers_fail(teacher, golden_gelu, tmp_path):
    broken = changed(teacher, tmp_path / "nan", visual__proj=lambda value: value * float("nan"))
    spec = find_spec(f"it={broken}", {}).model_copy(update={"golden": "Fake"})
    findings = check_teacher(spec, None, read_golden(golden_gelu))
    assert verdicts(findings)["image vectors"] == "FAIL"
    assert "not finite" in detail(findings, "image vectors")
    assert verdicts(findings)["golden"] == "FAIL"
    # Nothing agrees with vectors that are no vectors.
    assert verdicts(findings)["agreement"] != "pass", detail(findings, "agreement")
    assert verdicts(findings)["text vectors"] == "pass"


def test_a_tower_that_sees_nothing_fails(teacher, tmp_path):
    blind = changed(teacher, tmp_path / "blind", visual__conv1__weight=torch.zeros_like)
    findings = check_teacher(find_spec(f"it={blind}", {}), None, None)
    assert verdicts(findings)["image vectors"] == "FAIL"
    assert "the same for every sample" in detail(findings, "image vectors")


def test_a_tower_without_length_fails(teacher, tmp_path):
    mute = changed(teacher, tmp_path / "mute", text_projection=torch.zeros_like)
    findings = check_teacher(find_spec(f"it={mute}", {}), None, None)
    assert verdicts(findings)["text vectors"] == "FAIL"
    assert "not of unit length" in detail(findings, "text vectors")


def test_a_teacher_that_does_not_load_is_one_line(teacher, golden_gelu, tmp_path):
    torn = shutil.copytree(teacher, tmp_path / "torn")
    data = (torn / WEIGHTS).read_bytes()
    (torn / WEIGHTS).write_bytes(data[: len(data) // 2])
    findings = check_teacher(find_spec(f"it={torn}", {}), None, read_golden(golden_gelu))
    assert verdicts(findings) == {"load": "FAIL"}
    assert "not a whole checkpoint" in findings[0].detail


def test_another_model_than_the_entry_says_is_one_line(mine):
    wrong = ModelSpec.model_validate({**mine.model_dump(), "expect": {"dim": 512}})
    findings = check_teacher(wrong, None, None)
    assert verdicts(findings) == {"load": "FAIL"}
    assert "dim is 16, expected 512" in findings[0].detail


def test_an_image_encoder_has_no_text_to_check(golden_gelu, tmp_path):
    import timm

    torch.manual_seed(0)
    model = timm.create_model("test_resnet", pretrained=False, num_classes=0)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, tmp_path / "w.safetensors")
    spec = ModelSpec(
        name="eye", family="timm_image", architecture="test_resnet", path=str(tmp_path / "w.safetensors"), golden="Fake"
    )
    findings = check_teacher(spec, None, read_golden(golden_gelu))
    assert verdicts(findings) == {"load": "pass", "image vectors": "pass", "agreement": "skip"}
    assert "without a text tower" in detail(findings, "agreement")
    assert "text none" in detail(findings, "load")


# --- Folders of published vectors.


def test_the_published_demonstration_data_is_read(shared_data):
    pairs = read_golden(str(shared_data / "mmkd-demo"))
    assert len(pairs.images) == len(pairs.captions) == len(pairs.golden) == 8
    assert all(image[:2] == b"\xff\xd8" for image in pairs.images)
    assert all(pairs.captions)
    for tower in ("img", "txt"):
        counts = Counter(name.removesuffix(f"_{tower}") for row in pairs.golden for name in row if name.endswith(tower))
        assert counts == {
            "BMCA": 8,
            "BiomedCLIP": 8,
            "QuiltNet": 8,
            "GenMedClip": 8,
            "UniMedCLIP": 6,
            "PLIP": 3,
            "PUBMEDCLIP": 2,
            "PMCCLIP": 1,
        }
    for row in pairs.golden:
        for name, vector in row.items():
            assert vector.shape == ((768,) if name.startswith(("BMCA", "PMCCLIP")) else (512,))
            assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-3)


def test_the_catalogs_golden_names_are_those_of_the_demonstration_data(shared_data):
    published = {name.rsplit("_", 1)[0] for row in read_golden(str(shared_data / "mmkd-demo")).golden for name in row}
    assert {spec.golden for spec in read_catalog().values() if spec.golden} == published


def test_a_folder_without_an_index_is_explained(tmp_path):
    with pytest.raises(ModelError, match=r"holds no meta\.jsonl\. Give a folder in the layout of MMKD-CLIP's"):
        read_golden(str(tmp_path))


@pytest.mark.parametrize(
    "line", ["no json", '{"imgpath": "a.png"}', '{"txt": "x"}', '{"imgpath": "none.png", "txt": "x"}', "[1]"]
)
def test_a_line_that_names_no_pair_is_pointed_at(golden_gelu, tmp_path, line):
    folder = shutil.copytree(golden_gelu, tmp_path / "golden")
    first = (folder / "meta.jsonl").read_text().splitlines()[0]
    (folder / "meta.jsonl").write_text(f"{first}\n{line}\n")
    with pytest.raises(ModelError, match=r"meta\.jsonl line 2 does not name a picture and a caption"):
        read_golden(str(folder))


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_published_vectors_that_cannot_be_read_are_pointed_at(golden_gelu, tmp_path, damage):
    folder = shutil.copytree(golden_gelu, tmp_path / "golden")
    file = next(folder.rglob("clips_output.pt"))
    file.write_bytes(file.read_bytes()[:100])
    if damage == "gone":
        file.unlink()
    with pytest.raises(ModelError, match=re.escape(str(file))):
        read_golden(str(folder))


def test_a_picture_that_cannot_be_decoded_is_an_error_for_people(mine, golden_gelu, tmp_path):
    folder = shutil.copytree(golden_gelu, tmp_path / "golden")
    next(folder.rglob("figure.png")).write_bytes(b"no picture")
    with pytest.raises(MmkdError):
        check_teacher(mine, None, read_golden(str(folder)))


# --- The command.


def test_the_command_prints_a_table_and_ends_with_0(teacher, catalog_file, golden_gelu, monkeypatch):
    monkeypatch.delenv("MMKD_STORE", raising=False)
    # In this process: another one would spend its time on imports.
    arguments = ["check", f"mine={teacher}", "--golden", golden_gelu, "--catalog", catalog_file]
    done = CliRunner().invoke(teachers_app, arguments)
    assert done.exit_code == 0, done.output
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["teacher", "check", "verdict", "detail"]
    assert [re.split(r"  +", line)[:3] for line in lines[1:-1]] == [
        ["mine", "load", "pass"],
        ["mine", "image vectors", "pass"],
        ["mine", "text vectors", "pass"],
        ["mine", "agreement", "pass"],
        ["mine", "golden", "pass"],
        ["mine", "golden@quick", "-"],
    ]
    column = lines[0].index("detail")
    assert all(line[column - 2 : column] == "  " for line in lines[:-1])
    assert all(line[column] != " " for line in lines[:-1])
    assert lines[-1] == "All checks that could be made have passed."


def test_the_command_names_the_right_recipe_and_ends_with_1(untrained, catalog_file, golden_quickgelu):
    environment = {name: value for name, value in os.environ.items() if name != "MMKD_STORE"}
    names = ["mine", f"other={untrained}"]
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "teachers", "check", *names]
        + ["--golden", golden_quickgelu, "--catalog", catalog_file],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    (golden,) = [line for line in lines if re.match(r"mine +golden +FAIL", line)]
    assert "mine@quick comes closest" in golden
    assert any(re.match(r"other +agreement +FAIL", line) for line in lines)
    assert any(re.match(r"other +golden +skip", line) for line in lines)
    assert lines[-1] == "Not to be trusted: mine, other"
    assert done.stderr == ""


def test_a_table_has_one_line_per_finding():
    findings = [Finding("a", "load", "pass", "fine"), Finding("longer-name", "image vectors", "FAIL", "not finite")]
    lines = format_findings(findings).splitlines()
    assert [line.split()[0] for line in lines] == ["teacher", "a", "longer-name"]
    assert len({line.index(word) for line, word in zip(lines, ("verdict", "pass", "FAIL"), strict=True)}) == 1
