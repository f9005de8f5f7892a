from pathlib import Path

import pytest

from common.models.document import PAGE, teachers_page
from common.models.load import read_catalog
from common.models.spec import ModelSpec

NINE = (
    *("bmca-clip", "biomedclip", "unimed-clip", "quiltnet-b-32", "genmedclip"),
    *("plip", "pmc-clip", "pubmedclip", "medclip"),
)


@pytest.fixture(scope="module")
def catalog():
    return read_catalog()


@pytest.fixture(scope="module")
def page(catalog):
    return teachers_page(catalog)


def section_of(page: str, name: str) -> str:
    return page.split(f"\n## {name}\n", 1)[1].split("\n## ", 1)[0]


def test_the_page_in_docs_is_the_catalogs(page):
    assert Path(__file__).resolve().parents[3] / "docs" / "teachers.md" == PAGE
    assert PAGE.read_text(encoding="utf-8") == page, "run `make docs`"


def test_every_entry_has_one_section_and_one_row(catalog, page):
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert headings == ["All models", *catalog]
    for name in catalog:
        assert page.count(f"| [{name}](#{name}) |") == 1


def test_the_papers_nine_teachers_come_first_and_in_its_order(page):
    places = [page.index(f"\n## {name}\n") for name in NINE]
    assert places == sorted(places)
    assert all(f"\n## {name}\n" in page for name in ("mmkd-clip", "unimed-clip-l14-base", "unimed-clip-l14-large"))


def test_what_is_missing_is_said_and_no_command_is_offered(catalog, page):
    unserved = {name: spec.needs for name, spec in catalog.items() if spec.needs is not None}
    assert unserved
    for name, needs in unserved.items():
        section = section_of(page, name)
        assert needs in section
        assert "mmkd teachers fetch" not in section


def test_every_served_entry_says_how_it_is_fetched(catalog, page):
    for name, spec in catalog.items():
        if spec.needs is None:
            assert f"`mmkd teachers fetch {name} --store URI" in section_of(page, name)


def test_facts_questions_and_terms_are_all_there(catalog, page):
    for name, spec in catalog.items():
        section = section_of(page, name)
        for line in (*spec.facts.values(), *spec.unverified, spec.derivative_terms):
            assert line in section


def test_rival_recipes_come_with_the_command_that_decides(catalog, page):
    section = section_of(page, "quiltnet-b-32")
    assert "`quiltnet-b-32@quickgelu`: activation `quickgelu`" in section
    assert "`mmkd teachers check quiltnet-b-32 --golden DIR`" in section
    assert "crop rounding floor" in section_of(page, "plip")
    for name, spec in catalog.items():
        for recipe in spec.recipes:
            assert f"`{name}@{recipe}`" in section_of(page, name)


def test_consent_is_announced_where_it_is_asked_for(catalog, page):
    for name, spec in catalog.items():
        asked = f"`--accept-terms {name}`" in section_of(page, name)
        assert asked == (spec.needs_consent and spec.needs is None)


def test_a_bare_entry_makes_a_section():
    page = teachers_page({"mine": ModelSpec(name="mine", path="/models/mine")})
    section = section_of(page, "mine")
    assert "Everything follows its files" in section
    assert "Nothing is recorded." in section
    assert "`mine=FILE`" in section


def test_the_page_is_plain_ascii_and_needs_no_torch(page):
    import subprocess
    import sys

    assert page.isascii()
    heavy = "{'torch', 'open_clip', 'transformers', 'ray'}"
    check = f"import sys, common.models.document; print(sorted({heavy} & {{*sys.modules}}))"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
