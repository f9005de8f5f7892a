"""The commands of the training half: select, train, evaluate and export."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

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
from cluster.commands.train_recipes import TrainCommands, load_stage
from cluster.session import ray_session, set_environment
from common.config import load_config
from common.errors import ConfigError
from trainer.config import AlignConfig, EvaluateConfig, SelectConfig, Stage1Config, Stage2Config

if TYPE_CHECKING:
    from common.lake import Lake

LakeUri = Annotated[str, typer.Argument(metavar="LAKE", help="Folder or address of the lake.")]
Run = Annotated[str, typer.Option("--run", help="Name of the run; the same name resumes it.")]
Extend = Annotated[
    bool, typer.Option("--extend", help="Let the run go on, finished or not, to more epochs than before.")
]

train_app = typer.Typer(
    cls=TrainCommands,
    no_args_is_help=True,
    help="""Train the student: stage1, then stage2 from its checkpoint.

    The paper's: `stage1 LAKE --config recipes/paper-stage1.yaml` (learning rate 5e-5, 20 epochs, 2000 warm-up steps,
    weight decay 0.2), then `stage2 LAKE --init LAKE/runs/stage1 --config recipes/paper-stage2.yaml` (learning rate
    1e-6, weight 50). mmkd's own second stage is `recipes/default-stage2.yaml`, whose terms stage2 has by default.
    """,
)


def select(
    lake: LakeUri,
    teachers: Teachers = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Score every pair with every teacher and decide which teachers may speak for it.

    Example: mmkd select ./lake --set keep_fraction=0.9 --set keep_one=true
    """
    settings = load_config(SelectConfig, config, overrides or (), teachers=split_names(teachers))
    if print_config:
        show_config(settings)
        return
    from trainer.selection.select import select as run

    run(lake, settings)


def align(
    lake: LakeUri,
    recipe: Annotated[str | None, typer.Option(help="paper, standardise or none.")] = None,
    teachers: Teachers = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Fit maps that bring the teachers' vectors into spaces in which stage 2 can learn them.

    Stage 2 uses them with --set alignment=newest.

    Example: mmkd align ./lake --recipe paper
    """
    settings = load_config(AlignConfig, config, overrides or (), recipe=recipe, teachers=split_names(teachers))
    if print_config:
        show_config(settings)
        return
    from trainer.alignment.align import align as run

    typer.echo(run(lake, settings))


@train_app.command("stage1")
def stage1(
    lake: LakeUri,
    run: Run = "stage1",
    epochs: Annotated[int | None, typer.Option(help="Passes over the train split.")] = None,
    extend: Extend = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Pre-train the student contrastively on the pairs.

    Example: mmkd train stage1 ./lake --set model.architecture=ViT-B-16 --set data.batch_size=1024
    """
    settings = load_stage(Stage1Config, config, overrides, epochs=epochs)
    if print_config:
        show_config(settings)
        return
    from common.lake import open_lake

    open_lake(lake)  # before anything is imported, so that a wrong address is told at once
    set_environment()
    from trainer.stage1 import train_stage1

    typer.echo(train_stage1(lake, run, settings, extend=extend, session=ray_session).checkpoint)


@train_app.command("stage2")
def stage2(
    lake: LakeUri,
    init: Annotated[
        str | None, typer.Option("--init", metavar="CKPT", help="Stage-1 run or checkpoint folder.")
    ] = None,
    run: Run = "stage2",
    teachers: Teachers = None,
    epochs: Annotated[int | None, typer.Option(help="Passes over the admitted samples.")] = None,
    extend: Extend = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Distil the student from the stored embeddings, starting from a stage-1 checkpoint.

    Example: mmkd train stage2 ./lake --init ./lake/runs/stage1
    """
    settings = load_stage(Stage2Config, config, overrides, teachers=split_names(teachers), epochs=epochs)
    if print_config:
        show_config(settings)
        return
    from common.lake import open_lake

    # Before anything is imported, so that a wrong address is told at once.
    found = open_lake(lake)
    if init is None:
        raise ConfigError(_init_is_missing(found))
    set_environment()
    from trainer.stage2 import train_stage2

    typer.echo(train_stage2(lake, run, init, settings, extend=extend, session=ray_session).checkpoint)


def _init_is_missing(lake: Lake) -> str:
    runs = [
        f"--init {lake.uri}/runs/{run}"
        for run in lake.storage.list_folders("runs")
        if lake.storage.exists(f"runs/{run}/run.json")
        and lake.storage.read_json(f"runs/{run}/run.json")["fingerprint"].get("stage") == "stage1"
    ]
    what = "Stage 2 starts from a stage-1 student, and --init does not say which."
    if runs:
        return f"{what} This lake has: {', '.join(runs)}."
    return (
        f"{what} {lake.uri} has no stage-1 run: run `mmkd train stage1 {lake.uri}` first, then add --init "
        f"{lake.uri}/runs/stage1; or give --init a checkpoint's folder from elsewhere."
    )


def evaluate(
    lake: LakeUri,
    models: Annotated[
        str,
        typer.Option("--models", metavar="REF,REF", help="Teachers, checkpoints, runs or exported folders; NAME=REF."),
    ],
    catalog: Catalog = None,
    store: Store = None,
    split: Annotated[str | None, typer.Option(help="train, val or test.")] = None,
    templates: Annotated[str | None, typer.Option(help="YAML file of prompt templates.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Measure zero-shot classification and retrieval for any teacher or student.

    Example: mmkd evaluate ./lake --models plip,student=./student
    """
    settings = load_config(EvaluateConfig, config, overrides or (), split=split, templates=templates)
    if print_config:
        show_config(settings)
        return
    from common.lake import open_lake
    from common.models.load import read_catalog
    from trainer.evaluation.models import find_model
    from trainer.evaluation.run import evaluate as run
    from trainer.evaluation.tables import format_table

    open_lake(lake)
    known = read_catalog(catalog)
    result = run(lake, [find_model(reference, known, store=store) for reference in split_names(models) or ()], settings)
    typer.echo(format_table(result.scores))
    for doubt in result.doubts:
        typer.echo(f"Careful: {doubt}")
    typer.echo(f"Scores: {result.uri}")


def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="Run or checkpoint folder, or a published model as NAME or NAME=FILE.")
    ],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Where the model folder goes.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what is in DIR.")] = False,
    catalog: Catalog = None,
    store: Store = None,
) -> None:
    """Write a folder that stock open_clip loads, with a model card.

    Example: mmkd export ./lake/runs/stage2 ./student
    """
    from common.models.load import find_spec, read_catalog
    from common.storage import Storage
    from trainer.export import export_checkpoint, export_model

    known = read_catalog(catalog)
    if checkpoint.partition("=")[0] in known or Storage(checkpoint).is_file():
        typer.echo(export_model(find_spec(checkpoint, known, store), folder, force=force))
        return
    typer.echo(export_checkpoint(checkpoint, folder, force=force))
