"""Pairs that are no longer what ingest wrote are found, whichever column it is."""

import json

import pyarrow as pa
import pytest

from common.lake import open_lake
from extractor.config import IngestConfig
from extractor.ingest import ingest
from extractor.tending.verify import verify
from tests.conftest import draw_jpeg


@pytest.fixture
def lake(tmp_path):
    rows = []
    for index in range(6):
        (tmp_path / f"{index}.jpg").write_bytes(draw_jpeg(index))
        rows.append({"image": f"{index}.jpg", "caption": f"c{index}", "label": ["x", "y"], "age": index, "ok": True})
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = IngestConfig(shard_rows=4, keep_columns=("age:int64", "ok:bool", "caption:string"))
    ingest(str(tmp_path / "p.jsonl"), str(tmp_path / "lake"), config)
    return open_lake(str(tmp_path / "lake"))


@pytest.mark.parametrize(
    ("column", "value"),
    [("image", draw_jpeg(99)), ("captions", ["other"]), ("labels", ["x"]), ("split", "val"), ("age", 40), ("ok", None)],
)
def test_a_cell_that_changed_is_found(lake, column, value):
    assert verify(lake.uri, pairs=True).findings == []
    name = "pairs/shard-000001.parquet"
    table = lake.storage.read_table(name)
    _, footer = lake.storage.read_metadata(name)
    place = table.schema.get_field_index(column)
    cells = [table[column][0].as_py(), value]
    table = table.set_column(place, table.schema.field(place), pa.array(cells, table.schema.field(place).type))
    lake.storage.write_table(name, table, footer)
    (finding,) = verify(lake.uri, pairs=True).findings
    assert finding.path == name
    assert "not those that ingest wrote" in finding.sentence
