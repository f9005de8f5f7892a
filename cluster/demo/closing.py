"""The end of the demo: the comparison, the exported student, the page, and plain words on where everything is."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import typer

from common.lake import Lake
from common.models.load import read_catalog
from common.storage import Storage
from trainer.config import EvaluateConfig
from trainer.evaluation.gallery import pictures_of
from trainer.evaluation.models import find_model
from trainer.evaluation.run import Evaluation, evaluate
from trainer.evaluation.tables import format_table
from trainer.export import export_checkpoint
from trainer.record import read_metrics
from trainer.report import ReportContent, write_report

MEASURED = "Every figure on this page was measured by this run, on the test split."
NOTES = {  # where the teachers come from -> what a reader has to know of them
    "drawn": (
        MEASURED,
        (
            "Every model was trained by this run. Of its own modality each specialist saw more pictures, with cleaner "
            "captions, than the student's pairs hold."
        ),
    ),
    "pairs": (
        MEASURED,
        (
            "Every model was trained by this run. The specialists learned from these same pairs, one modality each: "
            "they know nothing that the student could not learn from the pairs itself."
        ),
    ),
    "given": (MEASURED, "The teachers are the models named with --teachers, as they are."),
}
RUNS = {"stage 1": "stage1", "stage 2": "stage2"}
TERMS = ("total", "contrastive", "image_text", "image_image", "text_text")


def evaluate_all(lake: Lake, models: Sequence[str], catalog: str | None, config: EvaluateConfig) -> Evaluation:
    """Score every teacher and both students on the test split."""
    known = read_catalog(catalog)
    return evaluate(lake.uri, [find_model(reference, known) for reference in models], config)


def export_and_report(
    lake: Lake, home: Path, checkpoint: str, evaluation: Evaluation, config: EvaluateConfig, origin: str
) -> None:
    """Export the distilled student, write the page and print what a person wants to know now."""
    student = export_checkpoint(checkpoint, str(home / "student"), lake=lake, scores=evaluation.scores, force=True)
    gallery, embedding_map = pictures_of(lake.uri, find_model(f"student={student}", {}), config)
    places = {
        "the lake": lake.uri,
        "teachers' embeddings": f"{lake.uri}/features/teacher=*/shard-*.parquet",
        "the distilled student": student,
        "scores": evaluation.uri,
    }
    content = ReportContent(
        title="mmkd demo: many specialists, one student",
        scores=evaluation.scores,
        curves={name: list(read_metrics(Storage(f"{lake.uri}/runs/{run}"))) for name, run in RUNS.items()},
        terms=TERMS,
        gallery=gallery,
        embedding_map=embedding_map,
        notes=NOTES[origin],
        places=places,
        next_steps=NEXT_STEPS,
    )
    page = write_report(str(home), content)
    typer.echo("\n" + format_table(evaluation.scores) + "\n")
    for what, where in {**places, "the page": page}.items():
        typer.echo(f"{what.ljust(24)} {where}")
    typer.echo("\nWhat to try next:")
    for line in NEXT_STEPS:
        typer.echo(f"  {line}")


NEXT_STEPS = (
    "`mmkd demo --pairs YOUR.jsonl --lake other-lake` runs the same on pictures and captions of your own.",
    "`mmkd ingest SOURCE LAKE` starts a lake of your own; `mmkd extract LAKE --teachers NAME,...` fills it.",
    "`mmkd evaluate LAKE --models student=DIR` measures any model folder on any lake.",
)
