"""The commands about models: teachers list and teachers show."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml

from cluster.commands.options import Catalog

teachers_app = typer.Typer(no_args_is_help=True, help="Known teachers and what is known of them.")


@teachers_app.command("list")
def list_teachers(catalog: Catalog = None) -> None:
    """List the models of the catalog, and of your own YAML with --catalog."""
    from common.models.load import read_catalog

    entries = read_catalog(catalog)
    width = max(len(name) for name in entries) + 2
    typer.echo(f"{'name'.ljust(width)}{'family'.ljust(12)}{'licence'.ljust(14)}where")
    for name, spec in entries.items():
        where = spec.hub_id or spec.path or f"{spec.architecture}/{spec.pretrained}"
        typer.echo(f"{name.ljust(width)}{spec.family.ljust(12)}{(spec.license or 'unverified').ljust(14)}{where}")


@teachers_app.command("show")
def show_teacher(
    name: Annotated[str, typer.Argument(help="A catalog name, or NAME=FOLDER.")], catalog: Catalog = None
) -> None:
    """Show one entry with the source of each fact."""
    from common.models.load import find_spec, read_catalog

    spec = find_spec(name, read_catalog(catalog))
    typer.echo(yaml.safe_dump(spec.model_dump(mode="json", exclude_none=True), sort_keys=False), nl=False)
