"""The commands about teachers: list, show, check, fetch and convert."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from cluster.commands.options import Catalog, Store, split_names
from common.errors import ConfigError

if TYPE_CHECKING:
    from common.models.spec import ModelSpec

teachers_app = typer.Typer(no_args_is_help=True, help="Known teachers: what is known of them, and the model store.")

Names = Annotated[list[str], typer.Argument(metavar="NAME...", help="Catalog names, NAME@RECIPE, or NAME=PLACE.")]


@teachers_app.command("list")
def list_teachers(catalog: Catalog = None, store: Store = None) -> None:
    """List the models of the catalog, and of your own YAML with --catalog.

    Example: mmkd teachers list --store ./models
    """
    from common.models.load import read_catalog
    from common.models.store import stored_folder

    head = ("name", "dim", "pixels", "text tower", "licence", "derivatives", "in store", "from")
    rows: list[tuple[str, ...]] = [head]
    for name, spec in read_catalog(catalog).items():
        stored = "-" if store is None else ("yes" if stored_folder(store, name) else "no")
        cells = [name, *_sizes(spec), spec.license or "not known", spec.derivatives, stored, _place(spec)]
        rows.append(tuple(cells))
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    for row in rows:
        typer.echo("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _sizes(spec: ModelSpec) -> tuple[str, str, str]:
    """Width, pixels and text tower as the entry states them; ? where only the model's files say."""
    expect, recipe = spec.expect, spec.recipe
    pixels = recipe.geometry.size if recipe.geometry is not None else expect.image_size
    tokens = recipe.context_length or expect.context_length
    tower = recipe.tokenizer.rsplit("/", 1)[-1].split("-base")[0] if recipe.tokenizer else ""
    text = "none" if spec.family == "timm_image" else f"{tokens or '?'} tokens {tower}".rstrip()
    return str(expect.dim or "?"), str(pixels or "?"), text


def _place(spec: ModelSpec) -> str:
    if spec.needs is not None:
        return "not served, see `mmkd teachers show`"
    return spec.hub_id or spec.path or spec.source.url or f"{spec.architecture}/{spec.pretrained}"


@teachers_app.command("show")
def show_teacher(
    name: Annotated[str, typer.Argument(help="A catalog name, or NAME=PLACE.")], catalog: Catalog = None
) -> None:
    """Show one entry with its recipe, its terms and the source of each fact.

    Example: mmkd teachers show pmc-clip
    """
    from common.models.load import find_spec, read_catalog

    known = read_catalog(catalog)
    spec = known[name] if name in known else find_spec(name, known)
    stated = spec.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    typer.echo(yaml.safe_dump(stated, sort_keys=False, allow_unicode=True, width=100), nl=False)


@teachers_app.command("check")
def check_teachers(
    names: Names,
    golden: Annotated[
        str | None,
        typer.Option("--golden", metavar="DIR", help="Published features in the layout of MMKD-CLIP's demo data."),
    ] = None,
    lake: Annotated[
        str | None, typer.Option("--lake", metavar="LAKE", help="Lake whose pairs pictures and captions must match.")
    ] = None,
    catalog: Catalog = None,
    store: Store = None,
) -> None:
    """Prove teachers before they cost GPU hours: strict load, sane vectors, agreement, published features.

    Example: mmkd teachers check quiltnet-b-32 pmc-clip --store ./models --golden ./mmkd-demo
    """
    from common.models.check import check_teacher, format_findings, read_golden, read_lake_pairs
    from common.models.load import find_spec, read_catalog

    known = read_catalog(catalog)
    specs = [find_spec(name, known, store) for name in names]
    published = read_golden(golden) if golden else None
    pairs = read_lake_pairs(lake) if lake else None
    findings = [finding for spec in specs for finding in check_teacher(spec, pairs, published)]
    typer.echo(format_findings(findings))
    failed = sorted({finding.model for finding in findings if finding.verdict == "FAIL"})
    typer.echo(f"Not to be trusted: {', '.join(failed)}" if failed else "All checks that could be made have passed.")
    raise typer.Exit(1 if failed else 0)


@teachers_app.command("fetch")
def fetch_teachers(
    names: Names,
    store: Store = None,
    sources: Annotated[
        list[str] | None,
        typer.Option("--from", metavar="NAME=PLACE", help="A file, folder or address of yours instead of the hub."),
    ] = None,
    tokenizers: Annotated[
        list[str] | None,
        typer.Option("--tokenizer", metavar="NAME=FOLDER", help="Folder with the tokenizer's files."),
    ] = None,
    trust: Annotated[
        str | None,
        typer.Option(
            "--trust", metavar="NAME,NAME", help="Convert their checkpoints though they hold more than tensors."
        ),
    ] = None,
    catalog: Catalog = None,
) -> None:
    """Bring teachers into a model store, as safetensors with hashes and terms, so that workers never need the hub.

    Example: mmkd teachers fetch plip mmkd-clip --store ./models --from mmkd-clip=MMKD_B16.pth
    """
    from common.models.load import find_spec, read_catalog
    from common.models.store import FetchPlan, fetch

    if store is None:
        raise ConfigError("No store was named. Give --store URI, or set MMKD_STORE.")
    known = read_catalog(catalog)
    places, folders = _named_values(sources, names, "--from"), _named_values(tokenizers, names, "--tokenizer")
    trusted = split_names(trust) or ()
    strangers = sorted(set(trusted) - set(names))
    if strangers:
        raise ConfigError(f"--trust names {', '.join(strangers)}, which are not to be fetched.")
    for name in names:
        spec = find_spec(name, known)
        fetch(FetchPlan(spec, places.get(name), folders.get(name), spec.name in trusted), store)


def _named_values(pairs: list[str] | None, names: list[str], option: str) -> dict[str, str]:
    found = dict(pair.partition("=")[::2] for pair in pairs or ())
    strange = sorted(name for name, value in found.items() if name not in names or not value)
    if strange:
        raise ConfigError(
            f"{option} names {', '.join(strange)}; expected NAME=VALUE with a NAME that is to be fetched."
        )
    return found


@teachers_app.command("convert")
def convert_checkpoint(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A checkpoint that holds more than tensors.")],
    trust: Annotated[bool, typer.Option("--trust", help="Say that you trust whoever made the file.")] = False,
    out: Annotated[Path | None, typer.Option("--out", help="The safetensors file; default: beside FILE.")] = None,
) -> None:
    """Write a checkpoint's tensors as clean safetensors, once, in a child process, and record both hashes.

    Example: mmkd teachers convert --trust BMC_CLIP_CF.pt
    """
    from common.models.convert import convert_trusted

    if not trust:
        raise ConfigError(
            f"Reading {file} may run code that its maker put there. If you trust where it came from, say so: --trust."
        )
    target = out or file.with_suffix(".safetensors")
    record = convert_trusted(file, target)
    dropped = ", ".join(f"{count} x {name}" for name, count in record["dropped"].items()) or "nothing"
    typer.echo(f"{target}: {record['tensors']} tensors, sha256 {record['sha256']}; left out: {dropped}")
