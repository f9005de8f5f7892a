"""The command that brings embeddings in which others computed."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import ConfigFile, Overrides, PrintConfig, show_config, split_names
from cluster.session import ray_session
from common.config import load_config
from extractor.config import IngestConfig, StoredPrecision

import_app = typer.Typer(no_args_is_help=True, help="Bring in embeddings that others computed.")


@import_app.command("mmkd-features")
def mmkd_features(
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder with meta.jsonl and features/.")],
    lake: Annotated[str, typer.Argument(metavar="LAKE", help="Folder or address of the lake.")],
    accept_terms: Annotated[
        str | None,
        typer.Option(
            "--accept-terms", metavar="NAME,NAME", help="Teachers whose conditions on trained models you accept."
        ),
    ] = None,
    projected: Annotated[
        bool, typer.Option("--projected", help="Take the vectors that the authors projected into one space.")
    ] = False,
    stored_precision: Annotated[
        StoredPrecision, typer.Option(help="What vectors are rounded to; bfloat16 takes a fifth less.")
    ] = "float16",
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Import the pairs and teacher features that MMKD-CLIP's authors distribute, ready for training.

    Pairs go through ingest; each teacher's vectors become the partition NAME.imported, or NAME.projected with
    --projected, which the paper's recipe needs; a selection lets each teacher speak where the authors list it. Running
    it again does only what is missing.

    Example: mmkd import mmkd-features ./MMKDCLIP_DATA ./lake
    """
    settings = load_config(IngestConfig, config, overrides or ())
    if print_config:
        show_config(settings)
        return
    from extractor.importing import Version, import_features

    terms = split_names(accept_terms) or ()
    version: Version = "projected" if projected else "imported"
    import_features(folder, lake, settings, terms, version, stored_precision, session=ray_session)
