"""The inspect command: what is in a lake, and whether its embeddings look right."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.options import split_names

if TYPE_CHECKING:
    from extractor.inspecting.inspection import Inspection

PAGE = "inspection.html"


def inspect(
    lake: Annotated[str, typer.Argument(metavar="LAKE", help="Folder or address of the lake.")],
    teachers: Annotated[
        str | None,
        typer.Option(
            "--teachers",
            metavar="NAME,NAME",
            help="Teachers to look at; default: all. The first says which pictures are alike.",
            show_default=False,
        ),
    ] = None,
    sample: Annotated[int, typer.Option(min=1, max=50_000, help="Pairs whose vectors are looked at.")] = 2000,
    out: Annotated[
        str | None,
        typer.Option(
            "--out",
            metavar="FILE.html",
            help=f"The page; default: LAKE/{PAGE} of a local lake, else ./{PAGE}.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON.")] = False,
) -> None:
    """Look at a lake: rows, coverage, rejects, norms, cosines, near-duplicates and outliers. Reads only.

    Counts are of all rows; cosines are of a sample that is the same each time. A page with pictures is written too.

    Example: mmkd inspect ./lake --teachers plip,biomedclip
    """
    from extractor.inspecting.inspection import inspect_lake
    from extractor.inspecting.inspection_page import render_text

    found = inspect_lake(lake, split_names(teachers), sample)
    page = _write_page(found, out)
    if as_json:
        typer.echo(json.dumps({**found.to_json(), "page": page}, indent=2))
    else:
        typer.echo(f"{render_text(found)}\n\nThe page with pictures: {page}")


def _write_page(found: Inspection, out: str | None) -> str:
    """Write the page and say where it is."""
    from common.storage import Storage, absolute_address, without_secrets
    from extractor.inspecting.inspection_page import render_html

    is_local = Storage(found.lake).is_local
    target = absolute_address(out or (f"{found.lake}/{PAGE}" if is_local else PAGE))
    folder, _, name = target.rpartition("/")
    Storage(folder or "/").write_bytes(name, render_html(found).encode())
    return without_secrets(target)
