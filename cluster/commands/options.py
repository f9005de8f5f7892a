"""Options that several commands share, so that they read and behave the same everywhere."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import yaml

from common.config import StrictModel

ConfigFile = Annotated[
    str | None,
    typer.Option("--config", metavar="FILE", help="YAML file with settings of this step.", show_default=False),
]
Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override one setting, such as seed=1 or hardware.teachers.plip.actors=4; may be repeated.",
        show_default=False,
    ),
]
PrintConfig = Annotated[bool, typer.Option("--print-config", help="Print the resolved settings and stop.")]
Teachers = Annotated[
    str | None,
    typer.Option(
        "--teachers", metavar="NAME,NAME", help="Catalog names or NAME=FOLDER, comma-separated.", show_default=False
    ),
]
Catalog = Annotated[
    str | None, typer.Option("--catalog", metavar="FILE", help="YAML file with models of your own.", show_default=False)
]

Store = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URI",
        envvar="MMKD_STORE",
        help="Model store: a folder or address filled by `mmkd teachers fetch`.",
        show_default=False,
    ),
]


def split_names(value: str | None) -> tuple[str, ...] | None:
    """``"a,b"`` -> ``("a", "b")``; None stays None."""
    return None if value is None else tuple(part.strip() for part in value.split(",") if part.strip())


def show_config(config: StrictModel) -> None:
    """Print a configuration as YAML that ``--config`` reads back."""
    dumped: dict[str, Any] = config.model_dump(mode="json")
    typer.echo(yaml.safe_dump(dumped, sort_keys=False), nl=False)
