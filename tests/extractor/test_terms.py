import pytest

from common.errors import ConfigError, TermsError
from common.models.load import read_catalog
from extractor.terms import check_terms


@pytest.fixture(scope="module")
def catalog():
    return read_catalog()


def test_free_teachers_need_no_consent_and_their_terms_are_shown(make_lake, catalog, tmp_path, caplog):
    caplog.set_level("INFO", logger="mmkd")
    lake = make_lake(tmp_path / "lake", rows=4)
    assert check_terms(lake, [catalog["biomedclip"], catalog["plip"]], ()) == {}
    assert "terms of biomedclip: MIT" in caplog.text
    assert "terms of plip: licence not known" in caplog.text


def test_conditions_need_consent_by_name(make_lake, catalog, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=4)
    teachers = [catalog["biomedclip"], catalog["unimed-clip"], catalog["dermlip-b-16"]]
    with pytest.raises(TermsError, match=r"unimed-clip \(CC BY-NC 4.0\).*--accept-terms unimed-clip,dermlip-b-16"):
        check_terms(lake, teachers, ())
    with pytest.raises(TermsError, match="--accept-terms dermlip-b-16;"):
        check_terms(lake, teachers, ("unimed-clip",))
    assert set(check_terms(lake, teachers, ("unimed-clip", "dermlip-b-16"))) == {"unimed-clip", "dermlip-b-16"}


@pytest.mark.parametrize("name", ["conch", "musk"])
def test_those_that_forbid_students_need_consent_too(make_lake, catalog, tmp_path, name):
    with pytest.raises(TermsError, match=name):
        check_terms(make_lake(tmp_path / "lake", rows=4), [catalog[name]], ())


def test_consent_to_a_stranger_is_a_mistake(make_lake, catalog, tmp_path):
    with pytest.raises(ConfigError, match=r"names unimed, which --teachers does not"):
        check_terms(make_lake(tmp_path / "lake", rows=4), [catalog["unimed-clip"]], ("unimed",))


def test_consent_recorded_in_the_lake_still_holds(make_lake, catalog, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=4)
    manifest = {"fingerprint": {}, "terms_accepted_at": "2026-01-02T03:04:05+00:00"}
    lake.storage.write_json("manifests/teachers/unimed-clip.json", manifest)
    assert check_terms(lake, [catalog["unimed-clip"]], ()) == {"unimed-clip": manifest["terms_accepted_at"]}
