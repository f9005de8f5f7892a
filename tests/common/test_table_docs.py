"""docs/tables.md says what every column means, and is up to date."""

import re
from pathlib import Path

import pyarrow as pa
import pytest

from common import schemas
from common.table_docs import PAGE, TABLES, tables_page, type_words


def test_the_page_in_docs_is_that_of_the_schemas():
    assert Path(__file__).resolve().parents[2] / "docs" / "tables.md" == PAGE
    assert PAGE.read_text(encoding="utf-8") == tables_page(), "run `make docs`"


@pytest.mark.parametrize("table", TABLES, ids=lambda table: table.title)
def test_every_column_has_one_sentence_and_no_sentence_lacks_its_column(table):
    assert list(table.columns) == table.schema.names
    for name, sentence in table.columns.items():
        assert re.fullmatch(r"[^|\n]+\.", sentence), name


def test_every_schema_has_its_section():
    """A schema that is added to common/schemas.py is documented too."""
    known = [value for value in vars(schemas).values() if isinstance(value, pa.Schema)]
    assert len(known) >= 4
    documented = [table.schema for table in TABLES]
    assert all(schema in documented for schema in known)
    assert schemas.features_schema(8, 8, views=True) in documented


def test_types_are_said_as_readers_need_them():
    features = schemas.features_schema(8, 12, views=True)
    words = {field.name: type_words(field.name, field.type) for field in features}
    assert words["image_embedding"] == "float32 [D]"
    assert words["extra_text_embeddings"] == "list of float32 [E]"
    assert words["view_boxes"] == "list of float32 [4]"
    assert type_words("labels", schemas.PAIRS.field("labels").type) == "list of string"


def test_the_page_says_which_columns_may_be_null():
    assert "| labels | list of string | no |" in tables_page()
    assert "| modality | string | yes |" in tables_page()
