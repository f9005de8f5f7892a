"""The commands around the steps: demo, submit and doctor."""

from __future__ import annotations

from typing import Annotated

import typer

from cluster.commands.options import Catalog, ConfigFile, Overrides, PrintConfig, Teachers, show_config, split_names
from cluster.config import DemoConfig
from common.config import load_config


def demo(
    lake: Annotated[
        str, typer.Option("--lake", metavar="DIR", help="Folder for everything the demo makes.")
    ] = "demo-lake",
    pairs: Annotated[
        str | None, typer.Option("--pairs", metavar="FILE", help="JSONL or CSV of your own instead of drawn pictures.")
    ] = None,
    teachers: Teachers = None,
    catalog: Catalog = None,
    seed: Annotated[int | None, typer.Option(help="Another seed draws other pictures and trains other models.")] = None,
    config: ConfigFile = None,
    overrides: Overrides = None,
    print_config: PrintConfig = False,
) -> None:
    """Run the whole pipeline, small, on this machine: no cluster, no hub, no GPU, no credentials.

    Example: mmkd demo --lake ./demo-lake
    """
    settings = load_config(DemoConfig, config, overrides or (), seed=seed)
    if print_config:
        show_config(settings)
        return
    from cluster.demo.run import run_demo

    run_demo(lake, pairs, split_names(teachers), catalog, settings)


def submit(
    command: Annotated[
        list[str], typer.Argument(metavar="-- COMMAND...", help="Any mmkd command, such as: extract LAKE ...")
    ],
    address: Annotated[
        str | None,
        typer.Option(help="Job server, such as http://head:8265; default: RAY_API_SERVER_ADDRESS or this machine."),
    ] = None,
    working_dir: Annotated[
        str, typer.Option(help="Folder sent to the cluster as the job's code; '' sends nothing.")
    ] = ".",
    wait: Annotated[bool, typer.Option("--wait/--no-wait", help="Follow the logs to the end.")] = True,
) -> None:
    """Run any mmkd command as a job on a Ray cluster, and show its logs and exit status.

    Example: mmkd submit --address http://head:8265 -- extract s3://bucket/lake --teachers plip
    """
    from cluster.submit import submit_job

    raise typer.Exit(submit_job(command, address, working_dir, wait))


def doctor() -> None:
    """Check this installation: Python, packages, whose code is imported, GPUs, shared memory, environment."""
    from cluster.doctor import run_doctor

    raise typer.Exit(run_doctor())
