"""Every table of the lake as an Arrow schema with a version: the contract between the packages.

Only plain Arrow types, so that DuckDB, polars, pandas and pyarrow open the files without this project.
"""

from __future__ import annotations

import pyarrow as pa

from common.errors import SchemaError

SCHEMA_VERSION = 3

PAIRS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image", pa.binary(), nullable=False),
        pa.field("captions", pa.list_(pa.string()), nullable=False),
        pa.field("modality", pa.string()),
        pa.field("labels", pa.list_(pa.string()), nullable=False),
        pa.field("dataset", pa.string()),
        pa.field("group_id", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_key", pa.string(), nullable=False),
        pa.field("source_id", pa.string()),
        pa.field("license", pa.string()),
        pa.field("width", pa.int32(), nullable=False),
        pa.field("height", pa.int32(), nullable=False),
        pa.field("sha256", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
    ]
)
"""One row per picture. The first of ``captions`` is the main one; a picture that serves evaluation alone has none.
``labels`` are its classes, in the order of the source, often one or none. ``dataset`` names the set it belongs to,
``group_id`` what must not straddle splits (a patient, a slide), ``source_id`` is the user's own name for the row.
``image`` holds an encoded file (JPEG, PNG, ...), ``sha256`` is of the bytes the source gave, ``split`` is one of
train, val, test; ``width`` and ``height`` are of the upright picture, in pixels. Behind these come the columns that an
ingest was asked to keep; they are the same in all shards of a lake, and ``lake.json`` lists them."""

REJECTS = pa.schema(
    [
        pa.field("sample_id", pa.string()),
        pa.field("source", pa.string(), nullable=False),
        pa.field("source_key", pa.string(), nullable=False),
        pa.field("source_id", pa.string()),
        pa.field("row", pa.int64()),
        pa.field("stage", pa.string(), nullable=False),
        pa.field("reason", pa.string(), nullable=False),
        pa.field("detail", pa.string()),
        pa.field("sha256", pa.string()),
    ]
)
"""One row per input that did not become a pair (stage ``ingest``) or failed later (``extract:<teacher>``).
``reason`` is a short category that can be counted; ``detail`` is what happened to this one row, ``row`` its place in
the source file, from 1."""

SELECTION = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("modality", pa.string()),
        pa.field("cosine", pa.float32()),
        pa.field("cosine_quantile", pa.float32()),
        pa.field("rank", pa.int32()),
        pa.field("candidates", pa.int32()),
        pa.field("admitted", pa.bool_(), nullable=False),
    ]
)
"""One row per pair and teacher. ``cosine`` is between the pair's image and its main caption; ``rank`` (1 is best) is
the true caption's among ``candidates`` captions of the same modality; null where the teacher has no embedding."""

SCORES = pa.schema(
    [
        pa.field("evaluation", pa.string(), nullable=False),
        pa.field("model", pa.string(), nullable=False),
        pa.field("model_kind", pa.string(), nullable=False),
        pa.field("task", pa.string(), nullable=False),
        pa.field("dataset", pa.string(), nullable=False),
        pa.field("split", pa.string(), nullable=False),
        pa.field("modality", pa.string(), nullable=False),
        pa.field("metric", pa.string(), nullable=False),
        pa.field("value", pa.float64(), nullable=False),
        pa.field("low", pa.float64()),
        pa.field("high", pa.float64()),
        pa.field("n", pa.int64(), nullable=False),
        pa.field("classes", pa.int32()),
        pa.field("chance", pa.float64()),
        pa.field("weights_sha256", pa.string()),
        pa.field("created_at", pa.string(), nullable=False),
    ]
)
"""One row per model, task, modality and metric; ``low`` and ``high`` bound the 95 % bootstrap interval. ``modality``
is "all" for figures over everything and "mean" for unweighted means over modalities. ``evaluation`` is the name of the
file: a model that was evaluated twice has rows of two. ``chance`` is what guessing gives, null where that is no one
number, and ``classes`` how many a classification chose among."""


TEACHERS = pa.schema(
    [
        pa.field("name", pa.string(), nullable=False),
        pa.field("image_dim", pa.int32()),
        pa.field("text_dim", pa.int32()),
        pa.field("image_size", pa.int32()),
        pa.field("context_length", pa.int32()),
        pa.field("license", pa.string()),
        pa.field("derivatives", pa.string()),
        pa.field("derivative_terms", pa.string()),
        pa.field("weights_sha256", pa.string()),
        pa.field("stored_precision", pa.string()),
        pa.field("views", pa.int32(), nullable=False),
        pa.field("mmkd_version", pa.string()),
        pa.field("created_at", pa.string()),
    ]
)
"""``teachers.parquet`` at the lake's root: one row per teacher that has embeddings. ``name`` is that of its folder
``features/teacher=<name>/``; ``image_dim`` and ``text_dim`` are the widths of its vectors, null for a tower that is not
there; ``image_size`` is the side of the square of pixels it sees, ``context_length`` the tokens it reads. ``license``
is that of its weights; ``derivatives`` (allowed, conditional, forbidden, unknown) and ``derivative_terms`` say whether
a model may be trained on its embeddings. ``stored_precision`` is what vectors were rounded to, ``views`` the number of
augmented crops per picture, ``created_at`` when its folder was begun. Null is what is not known."""


def vector_type(dim: int | None) -> pa.DataType:
    """Type of a vector of ``dim`` numbers, 1 for a tower that is not there: the list may be null, its numbers may not.

    That they may not makes Parquet a third faster to read.
    """
    return pa.list_(pa.field("element", pa.float32(), nullable=False), dim or 1)


def features_schema(image_dim: int | None, text_dim: int | None, views: bool = False) -> pa.Schema:
    """Schema of one teacher's embeddings; a tower the teacher lacks is stored as a null column of width 1.

    ``image_embedding`` and ``text_embedding`` (of the main caption) are L2-normalised float32 of width D;
    ``image_norm`` and ``text_norm`` are the lengths before normalisation; ``extra_text_embeddings`` holds one vector
    for each further caption, in order. A row the teacher could not embed has nulls, so row i stays pair i.
    With ``views``, ``view_boxes`` says where each augmented crop lies (left, top, right, bottom as shares of the
    upright picture) and ``view_embeddings`` holds its vectors.
    """
    fields = [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("image_embedding", vector_type(image_dim)),
        pa.field("image_norm", pa.float32()),
        pa.field("text_embedding", vector_type(text_dim)),
        pa.field("text_norm", pa.float32()),
        pa.field("extra_text_embeddings", pa.list_(vector_type(text_dim))),
    ]
    if views:
        fields.append(pa.field("view_boxes", pa.list_(vector_type(4))))
        fields.append(pa.field("view_embeddings", pa.list_(vector_type(image_dim))))
    return pa.schema(fields)


def check_table(table: pa.Table | pa.Schema, expected: pa.Schema, where: str) -> None:
    """Insist that a table has the agreed columns, in order, with the agreed types.

    Raises:
        SchemaError: Names the missing, unexpected and differently typed columns and the place.
    """
    schema = table if isinstance(table, pa.Schema) else table.schema
    have = {field.name: field.type for field in schema}
    want = {field.name: field.type for field in expected}
    missing = [name for name in want if name not in have]
    extra = [name for name in have if name not in want]
    differing = [f"{n} is {have[n]}, not {want[n]}" for n in want if n in have and have[n] != want[n]]
    if missing or extra or differing or schema.names != expected.names:
        raise SchemaError(
            f"{where} does not have the columns this program reads (schema {SCHEMA_VERSION}). "
            f"Missing: {missing or 'none'}; unexpected: {extra or 'none'}; types: {differing or 'as expected'}; "
            f"found {schema.names}. Write it again with this version of mmkd, or use the version that wrote it."
        )
