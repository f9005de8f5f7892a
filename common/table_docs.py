"""docs/tables.md from the schemas: ``python -m common.table_docs`` (or ``make docs``) writes it.

What a column means is said here and not in the fields' metadata, which would go into every file.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from common.schemas import PAIRS, REJECTS, SCHEMA_VERSION, SCORES, SELECTION, TEACHERS, features_schema

PAGE = Path(__file__).resolve().parents[1] / "docs" / "tables.md"
INTRO = """\
# Tables

This page is generated from `common/schemas.py` and `common/table_docs.py` by `make docs`; change those, not this page.
It describes schema {version}; `lake.json` says which one a lake was written with.

All tables are Parquet files of plain Arrow types, which DuckDB, polars, pandas and pyarrow open without this project.
Files of one number (`shard-000007.parquet`) hold the same samples in the same order, in `pairs/`, in every `features/`
and in every `selection/`; `sample_id` joins them in any order. "Null" says whether a value may be missing.
"""


@dataclass(frozen=True)
class TableDoc:
    """A table of the lake, for people."""

    title: str
    files: str
    """Where its files lie in a lake."""
    about: str
    schema: pa.Schema
    columns: Mapping[str, str]
    """Column -> what it holds, in one sentence."""


TABLES = (
    TableDoc(
        "Pairs",
        "pairs/shard-*.parquet",
        "One row per picture. Behind these come the columns that an ingest was asked to keep, as `lake.json` lists "
        "them.",
        PAIRS,
        {
            "sample_id": "Name of the row in all tables: 32 hex digits made from its place, picture and captions.",
            "image": "The picture as an encoded file: JPEG, PNG and the like.",
            "captions": "Its captions, the main one first; empty for a picture that serves evaluation alone.",
            "modality": "Kind of picture, such as ct or fundus, as the source or the settings of ingest name it.",
            "labels": "Its classes in the order of the source, often one or none; what zero-shot evaluation asks for.",
            "dataset": "The set that the picture belongs to, where the source says so.",
            "group_id": "What must not straddle splits, such as the patient or the slide.",
            "source": "Short name of the source that ingest read.",
            "source_key": "The row's place in that source: a path, or a file and a number.",
            "source_id": "The user's own name for the row, where the source has one.",
            "license": "The picture's licence, as the source words it.",
            "width": "Pixels of the upright picture from left to right.",
            "height": "Pixels of the upright picture from top to bottom.",
            "sha256": "Of the bytes that the source gave, in hex; equal for equal files.",
            "split": "One of train, val and test.",
        },
    ),
    TableDoc(
        "Rejects",
        "rejects/ingest/*.parquet, rejects/extract/*/shard-*.parquet",
        "One row per input that did not become a pair, or that a teacher could not embed.",
        REJECTS,
        {
            "sample_id": "The pair that a teacher could not embed; null for an input that did not become one.",
            "source": "Short name of the source that ingest read.",
            "source_key": "The row's place in that source.",
            "source_id": "The user's own name for the row, where the source has one.",
            "row": "Its number in the source's file, from 1, where rows are counted.",
            "stage": "The step that rejected it: ingest, or extract:NAME for a teacher.",
            "reason": "Why, as a short category that can be counted.",
            "detail": "What happened to this one row.",
            "sha256": "Of the picture's bytes, where there were any.",
        },
    ),
    TableDoc(
        "Features",
        "features/teacher=*/*.parquet",
        "One row per pair and teacher; D is the width of the teacher's image tower, E that of its text tower. A tower "
        "that the teacher lacks is a column of nulls of width 1. The last two columns are there only where `mmkd "
        "extract` stored augmented views.",
        features_schema(8, 8, views=True),
        {
            "sample_id": "The pair.",
            "image_embedding": "The picture's vector of length 1; null where the picture could not be embedded.",
            "image_norm": "Its length before it was normalised.",
            "text_embedding": "The main caption's vector of length 1; null without captions, or where it could not be "
            "embedded.",
            "text_norm": "Its length before it was normalised.",
            "extra_text_embeddings": "The vectors of the further captions, in order; empty where there are none.",
            "view_boxes": "Where each augmented crop lies: left, top, right, bottom as shares of the upright picture.",
            "view_embeddings": "The vectors of those crops, in order.",
        },
    ),
    TableDoc(
        "Selection",
        "selection/*/teacher=*/shard-*.parquet",
        "One row per pair and teacher: whether the teacher may speak for the pair, and what that rests on. The figures "
        "are null where the pair has no caption or the teacher lacks one of the two vectors.",
        SELECTION,
        {
            "sample_id": "The pair.",
            "modality": "The pair's modality; unknown where it names none.",
            "cosine": "Between the teacher's vectors of the picture and of its main caption.",
            "cosine_quantile": "Share of the teacher's pairs of this modality that match no better, between 0 and 1.",
            "rank": "Place of the true caption among the candidates by their cosine with the picture; 1 is best.",
            "candidates": "Among how many captions of the modality the true one was ranked, itself included.",
            "admitted": "Whether stage 2 may learn from this teacher on this pair.",
        },
    ),
    TableDoc(
        "Scores",
        "scores/*.parquet",
        "One row per model, task, modality and metric. A model that was evaluated with several settings or on several "
        "splits has rows in several files: to read them together, choose one `evaluation`, or group by it.",
        SCORES,
        {
            "evaluation": "Name of the file without its ending, which follows from models, data and settings.",
            "model": "The name that the model was evaluated under.",
            "model_kind": "One of teacher and student.",
            "task": "One of zero_shot and retrieval.",
            "dataset": "Name of the lake.",
            "split": "The split of the lake that was measured on.",
            "modality": "The modality; all for figures over everything at once, mean for the unweighted mean over "
            "modalities.",
            "metric": "accuracy, auc, f1, image_to_text_recall@k or text_to_image_recall@k.",
            "value": "The figure, between 0 and 1.",
            "low": "Lower bound of its 95 % bootstrap interval.",
            "high": "Upper bound of that interval.",
            "n": "How many samples the figure is of: pictures, or for retrieval queries.",
            "classes": "Among how many classes a classification chose; null for means and for retrieval.",
            "chance": "What guessing gives: 1/classes for accuracy, 0.5 for auc, k of the candidates for recall (more "
            "where a query has several right answers); null where that is no one number.",
            "weights_sha256": "Of the model's weights: equal for the same model under another name.",
            "created_at": "When it was measured, in UTC.",
        },
    ),
    TableDoc(
        "Teachers",
        "teachers.parquet",
        "One row per teacher that has embeddings in the lake. Null is what is not known.",
        TEACHERS,
        {
            "name": "That of its folder, `features/teacher=<name>/`.",
            "image_dim": "Width of its vectors of pictures; null where it has no image tower.",
            "text_dim": "Width of its vectors of captions; null where it has no text tower.",
            "image_size": "Side of the square of pixels that it sees.",
            "context_length": "How many tokens it reads.",
            "license": "Licence of its weights.",
            "derivatives": "Whether models may be trained on its embeddings: allowed, conditional, forbidden, unknown.",
            "derivative_terms": "On what conditions.",
            "weights_sha256": "Of its weights.",
            "stored_precision": "What its vectors were rounded to before they were stored as float32.",
            "views": "Augmented crops per picture.",
            "mmkd_version": "Of the program that began the folder.",
            "created_at": "When that was, in UTC.",
        },
    ),
)
"""Every table of the lake; a further one is an entry here."""


def tables_page(tables: tuple[TableDoc, ...] = TABLES) -> str:
    """The whole page."""
    return "\n".join([INTRO.format(version=SCHEMA_VERSION), *map(_section, tables)])


def _section(table: TableDoc) -> str:
    lines = [f"## {table.title}", "", f"`{table.files}`", "", table.about, ""]
    lines += ["| column | type | null | meaning |", "| --- | --- | --- | --- |"]
    for field in table.schema:
        null = "yes" if field.nullable else "no"
        lines.append(f"| {field.name} | {type_words(field.name, field.type)} | {null} | {table.columns[field.name]} |")
    return "\n".join(lines) + "\n"


def type_words(name: str, kind: pa.DataType) -> str:
    """An Arrow type as a reader of the page needs it; the width of an embedding is the teacher's."""
    if pa.types.is_fixed_size_list(kind):
        width = "4" if name == "view_boxes" else "E" if "text" in name else "D"
        return f"{type_words(name, kind.value_type)} [{width}]"
    if pa.types.is_list(kind):
        return f"list of {type_words(name, kind.value_type)}"
    return {pa.float32(): "float32", pa.float64(): "float64"}.get(kind, str(kind))


def main() -> None:
    """Write the page."""
    PAGE.parent.mkdir(exist_ok=True)
    PAGE.write_text(tables_page(), encoding="utf-8")


if __name__ == "__main__":
    main()
