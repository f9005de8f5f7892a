"""The recipes are settings that load, with the paper's figures where they bear its name."""

from pathlib import Path

import pytest

from common.config import load_config
from trainer.config import Stage1Config, Stage2Config

RECIPES = Path(__file__).resolve().parents[2] / "recipes"


@pytest.mark.parametrize("file", sorted(RECIPES.glob("*.yaml")), ids=lambda file: file.stem)
def test_a_recipe_loads_and_states_nothing_twice(file):
    kind = Stage1Config if "stage1" in file.stem else Stage2Config
    assert load_config(kind, str(file), ()).epochs == 20


def test_the_papers_stage_1():
    config = load_config(Stage1Config, str(RECIPES / "paper-stage1.yaml"), ())
    assert (config.optim.lr, config.optim.weight_decay, config.optim.warmup_steps) == (5e-5, 0.2, 2000)
    assert (config.model.architecture, config.loss) == ("mmkd-b16", "clip")


def test_the_papers_stage_2_and_its_mended_form_differ_in_the_defects_only():
    paper, mended = (
        load_config(Stage2Config, str(RECIPES / f"{name}-stage2.yaml"), ()) for name in ("paper", "paper-fixed")
    )
    assert paper.optim.lr == 1e-6
    terms = paper.distill
    assert (terms.contrastive, terms.feature, terms.cross) == (1, 50, 1)
    assert (terms.image_text, terms.image_image, terms.text_text, terms.heads) == (0, 0, 0, 0)
    assert (terms.cross_scale, terms.target_length, paper.optim.clip_norm) == ("constant", "stored", None)
    changed = terms.model_copy(update={"cross_scale": "learned", "target_length": "unit"})
    assert mended == paper.model_copy(update={"distill": changed})


@pytest.mark.parametrize(("stage", "kind"), [("stage1", Stage1Config), ("stage2", Stage2Config)])
def test_the_default_is_what_a_stage_does_by_itself(stage, kind):
    assert load_config(kind, str(RECIPES / f"default-{stage}.yaml"), ()) == kind()
