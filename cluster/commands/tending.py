"""The commands that tend a lake's embeddings: verify and compact."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from cluster.commands.options import split_names

if TYPE_CHECKING:
    from extractor.tending.verify import VerifyReport

LakeAddress = Annotated[str, typer.Argument(metavar="LAKE", help="Folder or address of the lake.")]
Partitions = Annotated[
    str | None,
    typer.Option("--teachers", metavar="NAME,NAME", help="Only these teachers; default: all.", show_default=False),
]


def verify(
    lake: LakeAddress,
    teachers: Partitions = None,
    repair: Annotated[
        bool, typer.Option("--repair", help="Remove what is bad, so that extract computes it again.")
    ] = False,
    pairs: Annotated[bool, typer.Option("--pairs", help="Read all pairs in full, too.")] = False,
) -> None:
    """Read and check everything that was extracted: bytes, widths, values, producers, and that samples are the pairs'.

    Exits with 1 if anything bad is left, or if a teacher lacks shards.

    Example: mmkd verify ./lake --repair
    """
    from extractor.tending.redo import redo_commands
    from extractor.tending.verify import verify as run

    report = run(lake, split_names(teachers), repair, pairs)
    typer.echo(_format(report))
    if any(finding.mended for finding in report.findings):
        typer.echo("Removed what was bad.")
    elif not report.is_good and not repair:
        typer.echo(f"To remove what is bad: mmkd verify {lake} --repair")
    for command in redo_commands(lake, report.incomplete):
        typer.echo(f"To compute what is missing: {command}")
    raise typer.Exit(0 if report.is_good and not report.incomplete else 1)


def _format(report: VerifyReport) -> str:
    """One line for a whole lake; a table, and a line for each finding, for any other."""
    from common.logs import duration

    amount = f"{report.rows} rows, {report.bytes / 1e6:.1f} MB, {duration(report.seconds)}"
    if not report.findings and not report.incomplete:
        also = "; the pairs are whole too" if report.pairs_checked else ""
        files = f"all {report.files} files of {', '.join(report.teachers) or 'no teacher'}"
        return f"verify: {files} are whole and belong to their pairs{also} ({amount})"
    width = max(len(name) for name in ["teacher", *report.teachers]) + 2
    lines = [f"{'teacher':{width}}{'good':>8}{'bad':>8}{'missing':>8}"]
    lines += [f"{name:{width}}{t.good:>8}{t.bad:>8}{t.missing:>8}" for name, t in report.teachers.items()]
    lines += [f"{finding.path}: {finding.sentence}" for finding in report.findings]
    return "\n".join([*lines, f"verify: {amount}"])


def compact(
    lake: LakeAddress,
    teachers: Partitions = None,
    target_mib: Annotated[int, typer.Option(min=1, help="Largest size of a pack, in MiB.")] = 128,
) -> None:
    """Pack the many small files of embeddings into few large ones, for readers; run it when nothing else is running.

    Example: mmkd compact ./lake --target-mib 128
    """
    from extractor.tending.compact import compact as run

    run(lake, split_names(teachers), target_mib << 20)
