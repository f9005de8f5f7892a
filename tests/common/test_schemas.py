import pyarrow as pa
import pytest

from common.errors import SchemaError
from common.schemas import PAIRS, REJECTS, SCORES, SELECTION, check_table, features_schema


def test_a_table_of_the_schema_passes():
    check_table(PAIRS.empty_table(), PAIRS, "here")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.remove(0), r"Missing: \['sample_id'\]"),
        (lambda s: s.append(pa.field("more", pa.int8())), r"unexpected: \['more'\]"),
        (lambda s: s.set(s.get_field_index("width"), pa.field("width", pa.int64())), r"width is int64, not int32"),
    ],
)
def test_a_deviation_is_named_with_its_place(change, message):
    with pytest.raises(SchemaError, match=message) as caught:
        check_table(change(PAIRS), PAIRS, "lake/pairs/shard-000000.parquet")
    assert "lake/pairs/shard-000000.parquet" in str(caught.value)


def test_column_order_is_part_of_the_contract():
    turned = pa.schema(list(PAIRS)[::-1])
    with pytest.raises(SchemaError):
        check_table(turned, PAIRS, "here")


@pytest.mark.parametrize("schema", [PAIRS, REJECTS, SELECTION, SCORES, features_schema(8, None)])
def test_only_types_every_reader_knows(schema):
    for field in schema:
        assert not isinstance(field.type, pa.BaseExtensionType), field
        assert field.type not in (pa.float16(), pa.large_string(), pa.large_binary()), field
