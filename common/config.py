"""Strict configuration: every step has one frozen pydantic class, filled from YAML and ``--set`` pairs."""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from common.errors import ConfigError


class StrictModel(BaseModel):
    """Base of all configuration: frozen, and an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


ConfigT = TypeVar("ConfigT", bound=StrictModel)


def fingerprint(value: Any) -> str:
    """Name any JSON-able value by its content.

    Returns:
        The first 16 hex digits of the sha256 of the value's canonical JSON.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def differing_keys(left: dict[str, Any], right: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Compare two flat or nested dictionaries.

    Returns:
        Dotted key -> (left value, right value), for each key whose values differ.
    """
    found: dict[str, tuple[Any, Any]] = {}
    for key in sorted(set(left) | set(right)):
        a, b = left.get(key), right.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found.update({f"{key}.{inner}": pair for inner, pair in differing_keys(a, b).items()})
        elif a != b:
            found[key] = (a, b)
    return found


def parse_config(kind: type[ConfigT], values: dict[str, Any], where: str = "the configuration") -> ConfigT:
    """Validate values against a configuration class.

    Raises:
        ConfigError: One paragraph naming each bad key and, for an unknown key, those that exist on its level.
    """
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise ConfigError(_explain(kind, values, error, where)) from error


def load_config(kind: type[ConfigT], path: str | None, overrides: Iterable[str] = (), **flags: Any) -> ConfigT:
    """Build a configuration from a YAML file, then ``key=value`` overrides, then explicit flags.

    Args:
        kind: The step's configuration class.
        path: A local YAML file, or None for defaults.
        overrides: ``key=value`` or ``outer.inner=value`` strings; values are read as YAML. A name in a mapping may
            have dots itself: ``teachers.pmc-clip.notebook.actors=4``.
        **flags: Command-line flags of the same names as fields; None means "not given".

    Raises:
        ConfigError: The file is missing or not a mapping, or a value is not accepted.
    """
    values: dict[str, Any] = {}
    where = f"{kind.__name__}"
    if path is not None:
        values = read_yaml(path)
        where = f"{kind.__name__} in {path}"
    for item in overrides:
        key, mark, raw = item.partition("=")
        if not mark:
            raise ConfigError(f"--set {item!r} has no '='; write --set key=value, for example --set seed=1.")
        try:
            _assign(values, _names_along(kind, key.strip()), yaml.safe_load(raw))
        except yaml.YAMLError as error:
            raise ConfigError(f"--set {item!r}: the value is not valid YAML ({error}).") from error
    values.update({key: value for key, value in flags.items() if value is not None})
    return parse_config(kind, values, where)


_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The one in C reads the catalog ten times faster, where PyYAML was built with it."""


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML mapping from a local file.

    Raises:
        ConfigError: The file is missing, not YAML, or not a mapping.
    """
    try:
        content = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_LOADER)  # noqa: S506 - a safe one
    except FileNotFoundError as error:
        raise ConfigError(f"No configuration file at {path}. Check the path given to --config.") from error
    except (yaml.YAMLError, UnicodeDecodeError, IsADirectoryError) as error:
        raise ConfigError(f"{path} could not be read as YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds a {type(content).__name__}; expected a mapping of setting: value.")
    return content


def _names_along(kind: type[BaseModel], key: str) -> list[str]:
    """Take a dotted key apart, where a name in a mapping reaches to the first part that is a setting behind it."""
    names: list[str] = []
    kinds, parts = [kind], key.split(".")
    while parts:
        names.append(parts.pop(0))
        fields = [one.model_fields[names[-1]].annotation for one in kinds if names[-1] in one.model_fields]
        kinds = [inner for annotation in fields for inner in _classes_in(annotation)]
        if parts and any(_is_mapping(annotation) for annotation in fields):
            known = {name for one in kinds for name in one.model_fields}
            # Nothing comes behind a name whose value is no group of settings. A mistyped setting ends a plain name.
            mistyped = 1 if known else len(parts)
            length = next((index for index in range(1, len(parts)) if parts[index] in known), mistyped)
            names.append(".".join(parts[:length]))
            del parts[:length]
    return names


def _is_mapping(annotation: Any) -> bool:
    return get_origin(annotation) is dict or any(_is_mapping(argument) for argument in get_args(annotation))


def _assign(values: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
        if not isinstance(values, dict):
            raise ConfigError(f"--set {'.'.join(keys)}: {key!r} is not a group of settings.")
    values[keys[-1]] = value


_EXPECTED = {  # pydantic's kind of error -> what should stand there, in words of YAML instead of Python's types
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "a mapping of setting: value",
    "float_parsing": "a number",
    "float_type": "a number",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "list_type": "a list",
    "string_type": "text",
    "tuple_type": "a list",
}
_SHOULD_BE = "Input should be "


def _explain(kind: type[BaseModel], values: dict[str, Any], error: ValidationError, where: str) -> str:
    problems: dict[str, list[str]] = {}  # by setting: each branch of a union that is not met has an error of its own
    for item in error.errors():
        path = _path_of(item["loc"], values)
        if item["type"] == "missing":
            path.append(item["loc"][-1])
        name = ".".join(map(str, path))
        kinds = _classes_at(kind, path[:-1])
        if item["type"] == "extra_forbidden":
            owner = f" in {'.'.join(map(str, path[:-1]))}" if path[:-1] else ""
            problems[name] = [f"{name} is not a setting (known{owner}: {_known(kinds, str(path[-1]))})"]
        elif item["type"] == "missing":
            problems[name] = [f"{name} is required"]
        elif item["type"] == "value_error":  # of a validator of ours: its message names the values
            problems[name] = [f"{name}: {item['ctx']['error']}" if name else str(item["ctx"]["error"])]
        else:
            said = _expectation(item["type"], item["msg"], _classes_at(kind, path))
            if name in problems:
                problems[name].append(said.removeprefix(_SHOULD_BE))
            else:
                problems[name] = [f"{name}={item['input']!r}: {said}"]
    return f"Invalid settings for {where}: " + "; ".join(", or ".join(parts) for parts in problems.values()) + "."


def _path_of(loc: tuple[int | str, ...], values: Any) -> list[int | str]:
    """The part of an error's place that the user has written: pydantic adds the branches of unions to it."""
    path: list[int | str] = []
    for part in loc:
        try:
            values = values[part]
        except (KeyError, IndexError, TypeError):
            continue
        path.append(part)
    return path


def _classes_at(kind: type[BaseModel], path: list[int | str]) -> list[type[BaseModel]]:
    """The configuration classes that a place in the values may be of; several under a union."""
    kinds = [kind]
    for part in path:
        fields = [one.model_fields[part].annotation for one in kinds if part in one.model_fields]
        # An index into a list, or a key of a mapping, is no field and stays with the classes of its values.
        if fields:
            kinds = [inner for annotation in fields for inner in _classes_in(annotation)]
    return kinds


def _classes_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [inner for argument in get_args(annotation) for inner in _classes_in(argument)]


def _known(kinds: list[type[BaseModel]], name: str) -> str:
    """The settings of classes, those spelled like a name first."""
    known = list(dict.fromkeys(field for kind in kinds for field in kind.model_fields))
    close = difflib.get_close_matches(name, known)
    return ", ".join(close + [field for field in known if field not in close])


def _expectation(error_type: str, message: str, kinds: list[type[BaseModel]]) -> str:
    if error_type == "model_type":
        return f"{_SHOULD_BE}a group of settings ({_known(kinds, '')})"
    expected = _EXPECTED.get(error_type)
    return f"{_SHOULD_BE}{expected}" if expected else message
