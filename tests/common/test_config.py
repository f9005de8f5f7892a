import pytest
from pydantic import Field

from common.config import StrictModel, differing_keys, fingerprint, load_config
from common.errors import ConfigError


class Inner(StrictModel):
    rate: float = Field(0.5, gt=0)


class Outer(StrictModel):
    name: str = "x"
    inner: Inner = Inner()


def test_defaults_file_overrides_and_flags_apply_in_that_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: from-file\ninner:\n  rate: 2\n")
    config = load_config(Outer, str(file), ["inner.rate=3"], name="from-flag")
    assert (config.name, config.inner.rate) == ("from-flag", 3.0)


def test_a_flag_that_was_not_given_changes_nothing():
    assert load_config(Outer, None, [], name=None).name == "x"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nam=1"], "nam is not a setting .known: name, inner."),
        (["inner.rate=-1"], "inner.rate=-1: .*greater than 0"),
        (["inner.rate"], "has no '='"),
        (["name.first=x"], "name"),
    ],
)
def test_a_bad_override_is_one_clear_paragraph(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, overrides)


@pytest.mark.parametrize(("text", "message"), [("- a list", "holds a list"), ("a: [", "could not be read as YAML")])
def test_a_bad_file_is_named(tmp_path, text, message):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, str(file))


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match="No configuration file at nowhere.yaml"):
        load_config(Outer, "nowhere.yaml")


def test_fingerprint_ignores_key_order_and_sees_values():
    assert fingerprint({"a": 1, "b": [2]}) == fingerprint({"b": [2], "a": 1})
    assert fingerprint({"a": 1}) != fingerprint({"a": 2})


def test_differing_keys_are_dotted():
    left, right = {"a": 1, "b": {"c": 1, "d": 2}}, {"a": 1, "b": {"c": 5, "d": 2}, "e": 0}
    assert differing_keys(left, right) == {"b.c": (1, 5), "e": (None, 0)}
