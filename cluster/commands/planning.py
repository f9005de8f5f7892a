"""The plan command: what an extraction would cost, before it costs anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.options import Catalog, ConfigFile, Overrides, Store, Teachers, split_names
from cluster.session import ray_session
from common.config import load_config, parse_config
from common.errors import ConfigError
from common.logs import duration, size_text
from extractor.config import ExtractConfig

if TYPE_CHECKING:
    from extractor.planning.estimate import Stage
    from extractor.planning.plan import Missing, Plan, WhatIf

MISSING_HEAD = ("teacher", "files", "rows", "bytes a row", "to write")
STAGES_HEAD = ("stage", "rate of one", "how many", "rate", "busy", "")


def plan(
    lake: Annotated[str, typer.Argument(metavar="LAKE", help="Folder or address of the lake.")],
    teachers: Teachers = None,
    catalog: Catalog = None,
    store: Store = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs to plan for; default: this machine's.")] = None,
    cpus: Annotated[int | None, typer.Option(help="CPU cores to plan for; default: this machine's.")] = None,
    cluster: Annotated[
        bool, typer.Option("--cluster", help="Plan for the Ray cluster that RAY_ADDRESS names, and measure on it.")
    ] = False,
    price: Annotated[float | None, typer.Option(metavar="AMOUNT", help="Price of one GPU for one hour.")] = None,
    rates: Annotated[
        list[str] | None,
        typer.Option("--rate", metavar="NAME=NUMBER", help="Pairs a second of one GPU, instead of measuring."),
    ] = None,
    decode_rate: Annotated[
        float | None, typer.Option(metavar="NUMBER", help="Pairs a second that one core prepares, likewise.")
    ] = None,
    share: Annotated[
        bool, typer.Option("--share", help="Let small teachers share GPUs even where there are enough.")
    ] = False,
    fresh: Annotated[bool, typer.Option("--fresh", help="Measure again what is remembered.")] = False,
    micro_batch: Annotated[int | None, typer.Option(help="Pictures per forward pass.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    config: ConfigFile = None,
    overrides: Overrides = None,
) -> None:
    """Say what an extraction would take: what is missing, who should get which GPU, hours, bytes and price.

    Teachers and decoding are measured on a few pairs of the lake, once for each kind of hardware; no embedding is kept.
    --config and --set take the settings of extract.

    Example: mmkd plan ./lake --teachers plip,biomedclip --gpus 8 --cpus 96 --rate plip=2400 --rate biomedclip=900
    """
    settings = load_config(
        ExtractConfig,
        config,
        overrides or (),
        teachers=split_names(teachers),
        catalog=catalog,
        store=store,
        micro_batch=micro_batch,
    )
    values = {
        "gpus": gpus,
        "cpus": cpus,
        "cluster": cluster,
        "price": price,
        "rates": _read_rates(rates or ()),
        "decode_rate": decode_rate,
        "share": share,
        "fresh": fresh,
    }
    from extractor.planning.plan import PlanConfig, make_plan

    options = parse_config(PlanConfig, {name: value for name, value in values.items() if value is not None}, "the plan")
    from extractor.planning.survey import survey_lake

    survey = survey_lake(lake, settings)
    if cluster and survey.todo:
        from extractor.placement import read_cluster

        with ray_session():
            found = make_plan(survey, options, read_cluster())
    else:
        found = make_plan(survey, options)
    typer.echo(found.model_dump_json(indent=2) if as_json else format_plan(found, len(survey.inputs)))


def _read_rates(pairs: list[str] | tuple[()]) -> dict[str, float]:
    found = {}
    for pair in pairs:
        name, _, number = pair.rpartition("=")
        try:
            found[name] = float(number)
        except ValueError:
            name = ""
        if not name:
            raise ConfigError(
                f"--rate {pair!r} is not NAME=NUMBER; write for example --rate plip=2400 (pairs a second)."
            )
    return found


def format_plan(plan: Plan, teachers: int) -> str:
    """A plan as a person reads it.

    Args:
        plan: The plan.
        teachers: How many were named, whether or not they lack anything.
    """
    if not plan.missing:
        return f"All {plan.shards} shards of {teachers} teachers are there; nothing to do."
    files, rows = sum(item.files for item in plan.missing), sum(item.rows for item in plan.missing)
    summary = (
        f"Missing: {files} of {plan.shards * teachers} files, {rows} rows; {plan.pairs_to_prepare} of {plan.pairs} "
        f"pairs to prepare, {plan.pictures_to_decode} pictures to decode; {size_text(plan.bytes)} to write"
    )
    lines = [summary, "", *_table([MISSING_HEAD, *(_missing_cells(item) for item in plan.missing)]), ""]
    if plan.measured_on:
        lines += [f"Measured on {plan.measured_on}", ""]
    lines += _table([STAGES_HEAD, *(_stage_cells(stage) for stage in plan.stages)])
    lines += [
        "",
        f"Bottleneck: {plan.bottleneck}; {_rate(plan.pairs_per_second)} pairs/s, {duration(plan.seconds)}",
    ]
    for what, more in (("One more GPU", plan.more_gpus), ("Eight more cores", plan.more_cores)):
        if more is not None:
            lines.append(f"{what}: {_what_if(more)}")
    if plan.cost is not None:
        hours = plan.seconds / 3600
        lines.append(f"Cost: {plan.gpus} GPUs for {hours:.2f} h, {plan.cost:.2f}")
    return "\n".join([*lines, *plan.notes])


def _what_if(more: WhatIf) -> str:
    return f"{_rate(more.pairs_per_second)} pairs/s, {duration(more.seconds)}"


def _missing_cells(item: Missing) -> tuple[str, ...]:
    return item.teacher, str(item.files), str(item.rows), f"{item.bytes_per_row:.0f}", size_text(item.bytes)


def _stage_cells(stage: Stage) -> tuple[str, ...]:
    parts = round(1 / stage.count)
    is_part = stage.count < 1 and abs(stage.count * parts - 1) < 1e-6
    many = f"{f'1/{parts}' if is_part else f'{stage.count:g}'} {stage.unit}{'' if stage.count <= 1 else 's'}"
    beside = f"with {', '.join(stage.shares_with)}" if stage.shares_with else ""
    name = stage.name.removeprefix("teacher=")
    one, rate = f"{_rate(stage.rate_of_one)}/s", f"{_rate(stage.rate)}/s"
    return name, one, many, rate, f"{100 * stage.busy:.0f} %", beside


def _rate(value: float) -> str:
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def _table(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(_fit(cells, widths)).rstrip() for cells in rows]


def _fit(cells: tuple[str, ...], widths: list[int]) -> list[str]:
    """The name on the left of its column, numbers on the right, a remark on the left."""
    last = len(cells) - 1
    return [
        cell.ljust(width) if index == 0 or (index == last and last > 4) else cell.rjust(width)
        for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
    ]
