"""The commands of the extracting half: ingest and extract."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import (
    Catalog,
    ConfigFile,
    Overrides,
    PrintConfig,
    Store,
    Teachers,
    show_config,
    split_names,
)
from cluster.session import ray_session
from common.config import load_config
from extractor.config import ExtractConfig, IngestConfig


def ingest(
    sources: Annotated[list[str], typer.Argument(metavar="SOURCE... LAKE", help="One or more sources, then the lake.")],
    source_format: Annotated[
        str | None,
        typer.Option("--format", help="webdataset, jsonl, csv, parquet or mmkd-features; default: by extension."),
    ] = None,
    image_column: Annotated[str | None, typer.Option(help="Column with the image path, URI or bytes.")] = None,
    caption_column: Annotated[str | None, typer.Option(help="Column with the caption or captions.")] = None,
    label_column: Annotated[str | None, typer.Option(help="Column with the class or classes.")] = None,
    id_column: Annotated[
        str | None, typer.Option(help="Column with your own name of each row; kept as source_id, and unique.")
    ] = None,
    group_column: Annotated[
        str | None, typer.Option(help="Column with what never straddles splits: patient, slide, article.")
    ] = None,
    keep_columns: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME[:TYPE]", help="A further column to keep (repeatable), as string or int64, bool, ..."
        ),
    ] = None,
    dataset: Annotated[str | None, typer.Option(help="The set these rows belong to, where no column says it.")] = None,
    no_captions: Annotated[
        bool, typer.Option("--no-captions", help="Pictures without captions and labels are no mistake.")
    ] = False,
    no_quotes: Annotated[
        bool, typer.Option("--no-quotes", help="Quotes in CSV and TSV are ordinary characters: no cell is quoted.")
    ] = False,
    max_side: Annotated[int | None, typer.Option(help="Re-encode pictures larger than this many pixels.")] = None,
    retry_rejects: Annotated[
        bool, typer.Option("--retry-rejects", help="Read only those rows of the sources that were rejected before.")
    ] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Turn image-caption sources into the pairs of a lake.

    Sources are WebDataset tars (brace patterns and lists too), JSONL or CSV with image paths, or Parquet with image
    bytes, on a local disk or any fsspec address. What cannot become a pair is kept in rejects/ with its reason.

    Example: mmkd ingest pairs.jsonl ./lake
    """
    columns = {"image": image_column, "caption": caption_column, "label": label_column}
    columns |= {"id": id_column, "group": group_column}
    named = [f"columns.{what}={name}" for what, name in columns.items() if name is not None]
    settings = load_config(
        IngestConfig,
        config,
        [*named, *(overrides or ())],
        format=source_format,
        quotes=False if no_quotes else None,
        max_side=max_side,
        keep_columns=tuple(keep_columns) if keep_columns else None,
        dataset=dataset,
        no_captions=True if no_captions else None,
    )
    if print_config:
        show_config(settings)
        return
    if len(sources) < 2:
        raise typer.BadParameter("give at least one SOURCE and then the LAKE")
    from extractor.ingest import ingest as run

    run(sources[:-1], sources[-1], settings, session=ray_session, retry_rejects=retry_rejects)


def extract(
    lake: Annotated[str, typer.Argument(metavar="LAKE", help="Folder or address of the lake.")],
    teachers: Teachers = None,
    catalog: Catalog = None,
    store: Store = None,
    accept_terms: Annotated[
        str | None,
        typer.Option(
            "--accept-terms", metavar="NAME,NAME", help="Teachers whose conditions on trained models you accept."
        ),
    ] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Pictures per forward pass.")] = None,
    towers: Annotated[str | None, typer.Option(help="both, image or text: what is embedded.")] = None,
    views: Annotated[int | None, typer.Option(help="Augmented crops stored per picture, with their places.")] = None,
    teacher_version: Annotated[
        str | None, typer.Option(help="Keep what the teachers give now beside what is there, as NAME.VERSION.")
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="auto: measure the teachers and split the GPUs by what `mmkd plan` finds.")
    ] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Embed the pairs with every named teacher; computes only what is missing.

    Example: mmkd extract ./lake --teachers biomedclip,plip,mine=./my-clip-folder
    """
    nested = {"views.count": views, "hardware.gpus": gpus}
    named = [f"{key}={value}" for key, value in nested.items() if value is not None]
    settings = load_config(
        ExtractConfig,
        config,
        [*named, *(overrides or ())],
        teachers=split_names(teachers),
        catalog=catalog,
        store=store,
        accept_terms=split_names(accept_terms),
        micro_batch=micro_batch,
        towers=towers,
        teacher_version=teacher_version,
    )
    if print_config:
        show_config(settings)
        return
    from common.lake import open_lake

    open_lake(lake)  # before anything is imported, so that a wrong address is told at once
    from extractor.pipeline import extract as run

    run(lake, settings, session=ray_session)
