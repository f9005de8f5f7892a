"""The ``mmkd`` command: composes the steps and is the one place where errors become messages and exit codes."""

from __future__ import annotations

import os
import sys
import textwrap
from typing import Annotated

import typer

from cluster.commands import extracting, importing, inspecting, models, operating, planning, tending, training
from common.errors import root_cause
from common.logs import configure_logs
from common.version import VERSION

app = typer.Typer(
    name="mmkd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Turn many biomedical CLIP teachers into one student: ingest, extract, select, train, evaluate, export.",
)
app.command("demo")(operating.demo)
app.command("ingest")(extracting.ingest)
app.add_typer(importing.import_app, name="import")
app.command("plan")(planning.plan)
app.command("extract")(extracting.extract)
app.command("verify")(tending.verify)
app.command("compact")(tending.compact)
app.command("inspect")(inspecting.inspect)
app.command("select")(training.select)
app.command("align")(training.align)
app.add_typer(training.train_app, name="train")
app.command("evaluate")(training.evaluate)
app.command("export")(training.export)
app.add_typer(models.teachers_app, name="teachers")
app.command("submit", context_settings={"allow_interspersed_args": False})(operating.submit)
app.command("doctor")(operating.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"mmkd {VERSION}")
        raise typer.Exit


@app.callback()
def root(
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say more.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    """Options that stand before the command."""
    configure_logs(verbose)


def main() -> None:
    """Run the command; an error of the user's to mend is one paragraph on stderr and an exit code, mostly 1."""
    try:
        app()
    except Exception as error:
        ours = root_cause(error)
        if ours is None:
            raise
        width = max(40, min(120, int(os.environ.get("COLUMNS", "100"))))
        print(textwrap.fill(f"mmkd: {ours}", width, break_long_words=False, break_on_hyphens=False), file=sys.stderr)
        sys.exit(ours.exit_code)


if __name__ == "__main__":
    main()
