"""docs/teachers.md from the catalog: ``python -m common.models.document`` (or ``make docs``) writes it."""

from __future__ import annotations

from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from common.models.spec import Expectation, Geometry, ModelSpec, Recipe

PAGE = Path(__file__).resolve().parents[2] / "docs" / "teachers.md"
INTRO = """\
# Teachers

This page is generated from `common/models/catalog/` by `make docs`; change the catalog, not this page.
{count} models are listed. Those that no loader here serves are listed all the same, with what is missing.

Each fact ends with what it rests on:

| label | meaning |
| --- | --- |
| [code] | read in the authors' source or README |
| [run] | seen in a run: with random weights, or in vectors that the authors published |
| [hub] | seen in a stored copy of a page of the model hub, so perhaps older than the hub today |
| [3p] | seen only in another project's code, which uses the model that way |
| [unverified] | not confirmed by anything; what is open is also listed under each model |

No published weights were at hand when this was written. Loading therefore checks what it can: every tensor must fit,
and width, heads and activation must be those listed under "checked on loading". Before a teacher costs GPU hours, run
`mmkd teachers check NAME --golden DIR`, where DIR holds MMKD-CLIP's demonstration data with the authors' vectors.

NAME stands for a model's name below, FILE and FOLDER for files of yours, and URI for a model store (a folder or a
bucket). `NAME@RECIPE` runs a model under one of its rival recipes. A model on the hub also loads by its name alone.
"?" in the table means not known.
"""
TERMS = {
    "allowed": "allowed",
    "conditional": "conditional",
    "forbidden": "forbidden without consent",
    "unknown": "not known",
}
GATING = {True: "yes", False: "no, when last seen", None: "not known"}
EXPECTED = {
    "dim": "width",
    "image_size": "pixels",
    "patch_size": "patch",
    "context_length": "tokens",
    "activation": "activation",
    "image_heads": "image heads",
    "text_heads": "text heads",
}
ARCHIVES = (".zip", ".safetensors", ".bin", ".pt", ".pth", ".torch")
"""Endings of addresses that are files, which fetch can read; others are pages for people."""


def teachers_page(catalog: dict[str, ModelSpec]) -> str:
    """The whole page.

    Args:
        catalog: The known models by name, in the order to list them.

    Returns:
        Markdown that ends with a line break.
    """
    head = [INTRO.format(count=len(catalog)), "## All models\n", _summary(catalog)]
    return "\n".join([*head, *(_section(spec) for spec in catalog.values())])


def _summary(catalog: dict[str, ModelSpec]) -> str:
    columns = ("name", "title", "family", "dim", "pixels", "context", "licence", "derivatives", "where from")
    rows = [columns, tuple("---" for _ in columns), *(_row(spec) for spec in catalog.values())]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _row(spec: ModelSpec) -> tuple[str, ...]:
    geometry = spec.recipe.geometry
    pixels = spec.expect.image_size or (geometry.size if geometry else None)
    context = spec.expect.context_length or spec.recipe.context_length
    return (
        f"[{spec.name}](#{spec.name.replace('.', '')})",
        spec.title or spec.name,
        "none yet" if spec.needs else spec.family,
        str(spec.expect.dim or "?"),
        str(pixels or "?"),
        "no text" if spec.family == "timm_image" else str(context or "?"),
        spec.license or "?",
        TERMS[spec.derivatives],
        _where(spec),
    )


def _where(spec: ModelSpec) -> str:
    if spec.hub_id is not None:
        return f"`{spec.hub_id}`"
    if spec.source.url is not None:
        return f"[{urlsplit(spec.source.url).netloc}]({spec.source.url})"
    return "?"


def _section(spec: ModelSpec) -> str:
    """One model: what it is, how to load it, how it is run, what is known and what is not."""
    about = spec.facts.get("about")
    opening = spec.title or spec.name
    parts = [
        f"## {spec.name}\n",
        f"{opening}: {about}.\n" if about else f"{opening}.\n",
        _loading(spec),
        _recipe(spec),
        _rivals(spec),
        _facts(spec),
        _list("Open questions", spec.unverified),
        _terms(spec),
    ]
    return "\n".join(part for part in parts if part)


def _loading(spec: ModelSpec) -> str:
    if spec.needs is not None:
        known = f" Known place: {_where(spec)}." if _where(spec) != "?" else ""
        return f"**Loading.** Not served here. {spec.needs}{known}\n"
    files = ", ".join(f"`{file}`" for file in spec.source.files)
    if spec.hub_id is not None:
        return _loading_from_hub(spec, files)
    url = spec.source.url or ""
    if PurePosixPath(urlsplit(url).path).suffix in ARCHIVES:
        how = f"`mmkd teachers fetch {spec.name} --store URI --from {spec.name}={url}` brings it into a store"
    else:
        how = (
            f"Download {files or 'the weights'} by hand from <{url}>; "
            f"`mmkd teachers fetch {spec.name} --store URI --from {spec.name}=FILE` brings it into a store"
        )
    return (
        f"**Loading.** Family `{spec.family}`, no hub copy known. {how}, and `{spec.name}=FILE` uses a file of yours.\n"
    )


def _loading_from_hub(spec: ModelSpec, files: str) -> str:
    kind = "data repository" if spec.source.repo_type == "dataset" else "repository"
    pin = f"revision `{spec.revision}`" if spec.revision else "no revision pinned"
    wanted = f", {files}" if files else ""
    own = "FOLDER" if spec.architecture is None or len(spec.source.files) > 1 else "FILE"
    login = " Accept its terms on the hub and set HF_TOKEN first." if spec.gated else ""
    return (
        f"**Loading.** Family `{spec.family}`, hub {kind} `{spec.hub_id}` ({pin}{wanted}). "
        f"`mmkd teachers fetch {spec.name} --store URI` brings it into a store, and `{spec.name}={own}` uses files of "
        f"yours.{login}\n"
    )


def _recipe(spec: ModelSpec) -> str:
    stated = _stated(spec.recipe)
    if spec.needs is not None:
        first = f"**Recipe.** Known of it: {stated}." if stated else "**Recipe.** Nothing is settled."
    elif stated:
        first = f"**Recipe.** The entry states {stated}; everything else follows its files and its family's defaults."
    else:
        first = "**Recipe.** Everything follows its files and its family's defaults."
    shape = f" Architecture `{spec.architecture}`." if spec.architecture else ""
    checked = _expected(spec.expect)
    label = "Expected" if spec.needs is not None else "Checked on loading"
    return f"{first}{shape}{f' {label}: {checked}.' if checked else ''}\n"


def _stated(recipe: Recipe) -> str:
    """The fields a recipe states, in words."""
    values = recipe.model_dump(exclude_unset=True)
    return ", ".join(_field(name, getattr(recipe, name)) for name in values)


def _field(name: str, value: Any) -> str:
    if isinstance(value, Geometry):
        side = f" to {value.resize_to}" if value.resize_to else ""
        crop = f", crop rounding {value.crop_rounding}" if value.resize == "shortest" else ""
        colour = ", gray" if value.colour == "gray" else ""
        return f"geometry {value.size} pixels ({value.resize}{side}, {value.interpolation}{crop}{colour})"
    if isinstance(value, tuple):
        return f"{name} {' '.join(f'{number:g}' for number in value)}"
    return f"{name} `{value}`"


def _expected(expect: Expectation) -> str:
    values = expect.model_dump(exclude_none=True)
    return ", ".join(f"{label} {values[name]}" for name, label in EXPECTED.items() if name in values)


def _rivals(spec: ModelSpec) -> str:
    if not spec.recipes:
        return ""
    lines = [f"`{spec.name}@{name}`: {_stated(recipe)}" for name, recipe in spec.recipes.items()]
    if spec.golden is not None:
        how = f"`mmkd teachers check {spec.name} --golden DIR` compares each with the authors' vectors and decides."
    else:
        how = (
            "No vectors of its authors are published, so none can be proved. To compare them on pairs of yours, run "
            f"`mmkd teachers check {spec.name}@RECIPE --lake LAKE` for each."
        )
    return f"{_list('Rival recipes', lines)}\n{how}\n"


def _facts(spec: ModelSpec) -> str:
    known = [f"{_label(name)}: {fact}" for name, fact in spec.facts.items() if name != "about"]
    if spec.golden is not None:
        known.append(f"published vectors: under the name `{spec.golden}` in MMKD-CLIP's demonstration data [run]")
    known += [f"sha256 of `{file}`: `{digest}`" for file, digest in spec.source.sha256.items()]
    return _list("Facts", known)


def _label(name: str) -> str:
    return "licence" if name == "license" else name.replace("_", " ")


def _list(title: str, items: list[str] | tuple[str, ...]) -> str:
    return f"**{title}.**\n\n" + "".join(f"- {item}\n" for item in items) if items else ""


def _terms(spec: ModelSpec) -> str:
    sentences = [f"**Terms.** Licence: {spec.license or 'not known'}."]
    if spec.hub_id is not None:
        sentences.append(f"Login on the hub: {GATING[spec.gated]}.")
    sentences.append(f"Models trained on its outputs: {TERMS[spec.derivatives]}.")
    sentences.append(spec.derivative_terms or "Nothing is recorded.")
    if spec.needs_consent and spec.needs is None:
        sentences.append(f"`mmkd extract` asks for `--accept-terms {spec.name}`.")
    return f"{' '.join(sentences)}\n"


def main() -> None:
    """Write the page."""
    from common.models.load import read_catalog  # brings torch with it, which the page itself does not need

    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(teachers_page(read_catalog()), encoding="utf-8")


if __name__ == "__main__":
    main()
