"""Is the loaded model the one the catalog speaks of? Looks at what no tensor's shape can tell: heads, activation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from common.errors import ModelError
from common.models.spec import ModelDescription, ModelSpec

if TYPE_CHECKING:
    from torch import nn


def check_expectation(spec: ModelSpec, description: ModelDescription, found: dict[str, Any]) -> None:
    """Compare a loaded model with what its entry expects.

    Args:
        spec: The entry; fields of ``expect`` that are None are not compared.
        description: What its files say.
        found: What the loaded module shows, by the names of ``Expectation``; a missing name cannot be compared.

    Raises:
        ModelError: Names each difference.
    """
    seen = {
        "dim": description.image_dim,
        "image_size": description.geometry.size,
        "context_length": description.context_length,
        **found,
    }
    expected = spec.expect.model_dump(exclude_none=True)
    wrong = [f"{name} is {seen[name]}, expected {value}" for name, value in expected.items() if seen.get(name) != value]
    if wrong:
        raise ModelError(
            f"Model {spec.name!r} loads, but is not the model its catalog entry describes: {'; '.join(wrong)}. Such a "
            "difference changes no tensor's shape and poisons every embedding. Use the authors' own files, or, if "
            "these are right, state it under `expect:` in a YAML entry of your own (--catalog)."
        )


def activation_of(module: nn.Module) -> str:
    """``gelu``, ``quickgelu``, ``relu``, or the class name of another."""
    name = type(module).__name__.lower()
    known = {"gelu": "gelu", "geluactivation": "gelu", "quickgelu": "quickgelu", "quickgeluactivation": "quickgelu"}
    return known.get(name, name)
