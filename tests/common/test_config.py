from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from common.config import StrictModel, differing_keys, fingerprint, load_config, parse_config
from common.errors import ConfigError


class Inner(StrictModel):
    rate: float = Field(0.5, gt=0)
    ratio: float = 1.0
    scale: Literal["own", "fitted"] | Annotated[float, Field(gt=0)] = "own"

    @model_validator(mode="after")
    def _not_both(self):
        if self.rate == self.ratio == 7:
            raise ValueError("rate 7 and ratio 7 do not go together")
        return self


class Outer(StrictModel):
    name: str = "x"
    inner: Inner = Inner()
    more: dict[str, Inner] = Field(default_factory=dict)
    row: tuple[int, ...] = ()
    switch: bool | None = None

    @model_validator(mode="after")
    def _a_name(self):
        if self.name == "nobody":
            raise ValueError("nobody is no name")
        return self


class Labelled(StrictModel):
    labels: dict[str, str] | None = None


def test_defaults_file_overrides_and_flags_apply_in_that_order(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("name: from-file\ninner:\n  rate: 2\n")
    config = load_config(Outer, str(file), ["inner.rate=3"], name="from-flag")
    assert (config.name, config.inner.rate) == ("from-flag", 3.0)


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("more.plain.rate=3", {"plain"}),
        ("more.with.a.dot.rate=3", {"with.a.dot"}),
        ("more.rate.rate=3", {"rate"}),
    ],
)
def test_a_name_in_a_mapping_may_have_dots(override, names):
    more = load_config(Outer, None, [override]).more
    assert set(more) == names
    assert next(iter(more.values())).rate == 3


def test_a_name_that_stands_for_a_value_may_have_dots():
    assert load_config(Labelled, None, ["labels.ray.io/zone=a", "labels.pool=b"]).labels == {
        "ray.io/zone": "a",
        "pool": "b",
    }


def test_a_mistyped_setting_behind_a_name_is_told():
    with pytest.raises(ConfigError, match=r"more\.a\.rat is not a setting \(known in more\.a: rat"):
        load_config(Outer, None, ["more.a.rat=3"])


def test_a_flag_that_was_not_given_changes_nothing():
    assert load_config(Outer, None, [], name=None).name == "x"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["nam=1"], "nam is not a setting .known: name, inner, more, row, switch."),
        (["inner.rate=-1"], "inner.rate=-1: .*greater than 0"),
        (["inner.rate"], "has no '='"),
        (["name.first=x"], "name"),
    ],
)
def test_a_bad_override_is_one_clear_paragraph(overrides, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Outer, None, overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["inner.magic=1"], "inner.magic is not a setting (known in inner: rate, ratio, scale)"),
        (["inner.ratoi=1"], "inner.ratoi is not a setting (known in inner: ratio, rate, scale)"),
        (["more.a.scal=1"], "more.a.scal is not a setting (known in more.a: scale, rate, ratio)"),
        (["nothing=1", "inner.x=1"], "inner.x is not a setting (known in inner: rate, ratio, scale); nothing is not"),
        (["inner.scale=x"], "inner.scale='x': Input should be 'own' or 'fitted', or a number"),
        (["inner.scale=-1"], "inner.scale=-1: Input should be 'own' or 'fitted', or greater than 0"),
        (["inner.scale={a: 1}"], "inner.scale={'a': 1}: Input should be 'own' or 'fitted', or a number"),
        (["inner=3"], "inner=3: Input should be a group of settings (rate, ratio, scale)"),
        (["more.a=3"], "more.a=3: Input should be a group of settings (rate, ratio, scale)"),
        (["more=3"], "more=3: Input should be a mapping of setting: value"),
        (["row=3"], "row=3: Input should be a list"),
        (["row=[1, x]"], "row.1='x': Input should be a whole number"),
        (["switch=perhaps"], "switch='perhaps': Input should be true or false"),
        (["inner.rate=7", "inner.ratio=7"], "inner: rate 7 and ratio 7 do not go together"),
        (["name=nobody"], "nobody is no name"),
    ],
)
def test_an_error_says_what_to_write_in_words_of_the_file(overrides, message):
    with pytest.raises(ConfigError) as caught:
        load_config(Outer, None, overrides)
    assert f"Invalid settings for Outer: {message}" in str(caught.value)


def test_a_setting_that_must_be_given_is_named_with_its_group():
    class Needy(StrictModel):
        must: int

    class Holder(StrictModel):
        needy: Needy

    with pytest.raises(ConfigError, match="Invalid settings for the configuration: needy.must is required."):
        parse_config(Holder, {"needy": {}})


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
