import re

import pytest

from common.config import parse_config, read_yaml
from common.models.architectures import packaged
from common.models.load import CATALOG_FOLDER, FAMILIES, find_spec, read_catalog
from common.models.spec import ModelSpec

DIMS = {  # widths of the paper's teachers; all but MedCLIP's show in MMKD-CLIP's published features
    "bmca-clip": 768,
    "biomedclip": 512,
    "unimed-clip": 512,
    "quiltnet-b-32": 512,
    "genmedclip": 512,
    "plip": 512,
    "pmc-clip": 768,
    "pubmedclip": 512,
    "medclip": 512,
}
GOLDEN = {
    "bmca-clip": "BMCA",
    "biomedclip": "BiomedCLIP",
    "unimed-clip": "UniMedCLIP",
    "quiltnet-b-32": "QuiltNet",
    "genmedclip": "GenMedClip",
    "plip": "PLIP",
    "pmc-clip": "PMCCLIP",
    "pubmedclip": "PUBMEDCLIP",
    "pubmedclip-original": "PUBMEDCLIP",
}
LABEL = re.compile(r"\[(code|run|hub|3p|unverified)\]")


@pytest.fixture(scope="module")
def catalog():
    return read_catalog()


def packaged_entries():
    return [
        (name, values)
        for file in sorted(CATALOG_FOLDER.glob("*.yaml"))
        for name, values in read_yaml(str(file)).items()
    ]


def test_every_entry_is_valid_and_named_once():
    entries = packaged_entries()
    for name, values in entries:
        parse_config(ModelSpec, {"name": name, **values}, name)
    assert len({name for name, _ in entries}) == len(entries)


def test_every_entry_is_served_or_says_what_is_missing(catalog):
    for name, spec in catalog.items():
        assert spec.family in FAMILIES or spec.needs, name
        assert spec.title, name
        assert spec.needs is None or spec.needs.endswith("."), name


def test_the_papers_teachers_are_all_served_and_in_its_order(catalog):
    assert [name for name in catalog if name in DIMS] == list(DIMS)
    for name in DIMS:
        assert find_spec(name, catalog).needs is None


def test_expected_widths_are_the_papers(catalog):
    assert {name: catalog[name].expect.dim for name in DIMS} == DIMS


def test_golden_names_are_those_of_the_published_features(catalog):
    assert {name: spec.golden for name, spec in catalog.items() if spec.golden} == GOLDEN


def test_every_fact_says_what_it_rests_on(catalog):
    for name, spec in catalog.items():
        assert "about" in spec.facts, name
        for what, fact in spec.facts.items():
            assert LABEL.search(fact), f"{name}: {what}"
    for name in DIMS:
        facts = set(catalog[name].facts)
        assert {"loader", "layout", "activation", "geometry", "constants", "tokenizer", "context"} <= facts, name
        assert {"pooling", "dim", "normalisation", "license", "gating"} <= facts, name


def test_terms_are_known_or_their_absence_is(catalog):
    for name, spec in catalog.items():
        assert spec.derivative_terms, name
        known = spec.license is not None and spec.derivatives != "unknown"
        assert known or any("licence" in line or "terms" in line for line in spec.unverified), name


def test_terms_that_bind_a_student_ask_for_consent(catalog):
    assert {name for name, spec in catalog.items() if spec.derivatives == "forbidden"} == {"conch", "musk"}
    bound = {name for name, spec in catalog.items() if spec.derivatives == "conditional"}
    assert {name for name in catalog if name.startswith(("unimed-", "dermlip-", "lvm-med-"))} | {"medsiglip"} == bound
    assert all(catalog[name].needs_consent for name in bound | {"conch", "musk"})


@pytest.mark.parametrize("name", ["quiltnet-b-32", "genmedclip"])
def test_where_the_activation_is_in_doubt_both_are_recipes(catalog, name):
    recipes = {key: catalog[name].with_recipe(key) for key in catalog[name].recipes}
    assert {key: spec.recipe.activation for key, spec in recipes.items()} == {"gelu": "gelu", "quickgelu": "quickgelu"}
    assert catalog[name].expect.activation is None


def test_rival_recipes_cover_the_other_doubts(catalog):
    def values(name, field):
        return {getattr(catalog[name].with_recipe(key).recipe, field) for key in catalog[name].recipes}

    heads_and_pooling = {
        (spec.recipe.pool_heads, spec.recipe.pooling)
        for spec in (catalog["pmc-clip"].with_recipe(key) for key in catalog["pmc-clip"].recipes)
    }
    assert heads_and_pooling == {(32, "cls"), (8, "pooler"), (8, "cls"), (32, "pooler")}
    assert {geometry.crop_rounding for geometry in values("plip", "geometry")} == {"round", "floor"}
    assert values("medclip", "pads") == {"dropped", "averaged"}
    for name in ("pubmedclip", "pubmedclip-original"):
        assert (0.485, 0.456, 0.406) in values(name, "mean")
        assert len(values(name, "mean")) == 2


def test_no_expectation_contradicts_a_recipe(catalog):
    # Pool heads are a recipe's choice, so an expected number of image heads would refuse the rivals.
    assert catalog["pmc-clip"].expect.image_heads is None
    for name, spec in catalog.items():
        for trial in (spec, *(spec.with_recipe(key) for key in spec.recipes)):
            recipe, expect = trial.recipe, trial.expect
            assert recipe.geometry is None or expect.image_size in (None, recipe.geometry.size), name
            assert recipe.context_length is None or expect.context_length in (None, recipe.context_length), name
            assert recipe.activation is None or expect.activation in (None, recipe.activation), name


def test_bare_files_name_their_architecture(catalog):
    import open_clip
    import timm

    for name, spec in catalog.items():
        served_bare = spec.needs is None and spec.source.files and spec.family != "hf_clip"
        if spec.architecture is None:
            assert not served_bare, name
        elif spec.family == "timm_image":
            assert timm.is_model(spec.architecture), name
        else:
            assert spec.architecture in (*packaged(), *open_clip.list_models()), name


def test_revisions_and_hashes_are_whole(catalog):
    for name, spec in catalog.items():
        assert spec.revision is None or re.fullmatch(r"[0-9a-f]{40}", spec.revision), name
        assert set(spec.source.sha256) <= set(spec.source.files), name
        assert all(re.fullmatch(r"[0-9a-f]{64}", digest) for digest in spec.source.sha256.values()), name
