import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded import embed

from common.lake import Lake, teacher_manifest
from common.schemas import TEACHERS
from common.teachers_table import TEACHERS_TABLE, refresh_teachers
from common.version import VERSION
from extractor.tending.verify import verify

GEOMETRY = {"size": 224, "resize": "shortest"}


@pytest.fixture
def lake(make_lake, tmp_path) -> Lake:
    lake = make_lake(tmp_path / "lake", rows=4)
    embed(lake, "b", dim=8)
    return lake


def rows_of(lake: Lake) -> dict[str, dict]:
    table = lake.storage.read_table(TEACHERS_TABLE)
    assert table.schema.equals(TEACHERS)
    return {row["name"]: row for row in table.to_pylist()}


def record(lake: Lake, name: str, identity: dict, **facts) -> None:
    """A teacher with one file, and its manifest as some extraction wrote it."""
    lake.storage.write_json(teacher_manifest(name), {"fingerprint": identity, **facts})
    lake.storage.write_bytes(f"{lake.features_folder(name)}/shard-000000.parquet", b"x")


def test_one_row_per_teacher_says_what_its_manifest_says(lake):
    identity = {
        "image_dim": 512,
        "text_dim": None,
        "geometry": GEOMETRY,
        "context_length": None,
        "weights_sha256": "ab",
        "stored_precision": "bfloat16",
        "views": {"count": 3, "size": 0.5},
    }
    facts = {"license": "MIT", "derivatives": "conditional", "derivative_terms": "ask", "created_at": "2026"}
    record(lake, "a", identity, **facts, mmkd_version="9.9")
    assert refresh_teachers(lake)
    rows = rows_of(lake)
    assert list(rows) == ["a", "b"]
    assert rows["a"] == {
        "name": "a",
        "image_dim": 512,
        "text_dim": None,
        "image_size": 224,
        "context_length": None,
        "license": "MIT",
        "derivatives": "conditional",
        "derivative_terms": "ask",
        "weights_sha256": "ab",
        "stored_precision": "bfloat16",
        "views": 3,
        "mmkd_version": "9.9",
        "created_at": "2026",
    }
    assert (rows["b"]["image_dim"], rows["b"]["views"], rows["b"]["mmkd_version"]) == (8, 0, VERSION)
    assert rows["b"]["created_at"] == lake.read_teacher("b")["created_at"]


def test_a_text_encoder_has_no_image_size(lake):
    record(lake, "a", {"image_dim": None, "text_dim": 8, "geometry": GEOMETRY, "context_length": 77})
    refresh_teachers(lake)
    assert (rows_of(lake)["a"]["image_size"], rows_of(lake)["a"]["context_length"]) == (None, 77)


def test_it_is_written_only_when_it_would_change(lake):
    refresh_teachers(lake)
    before = os.stat(f"{lake.uri}/{TEACHERS_TABLE}").st_mtime_ns
    assert not refresh_teachers(lake)
    assert os.stat(f"{lake.uri}/{TEACHERS_TABLE}").st_mtime_ns == before


def test_a_teacher_that_is_begun_counts_before_its_first_file_and_a_deleted_one_no_more(lake):
    lake.storage.write_json(teacher_manifest("a"), {"fingerprint": {"image_dim": 4}})
    refresh_teachers(lake, begun=["a"])
    assert list(rows_of(lake)) == ["a", "b"]
    lake.storage.remove(lake.features_folder("b"))
    refresh_teachers(lake)
    assert rows_of(lake) == {}


def test_a_lake_without_teachers_gets_no_table(make_lake, tmp_path):
    lake = make_lake(tmp_path / "empty", rows=4)
    assert not refresh_teachers(lake)
    assert not lake.storage.exists(TEACHERS_TABLE)


@pytest.mark.parametrize(
    "manifest",
    [
        b"{",
        b"[]",
        b"{}",
        b'{"fingerprint": 3}',
        b'{"fingerprint": {"image_dim": "wide"}}',
        b'{"fingerprint": {"image_dim": 3, "geometry": 1}}',
    ],
)
def test_a_manifest_of_another_kind_takes_no_other_teacher_along(lake, manifest):
    lake.storage.write_bytes(teacher_manifest("a"), manifest)
    lake.storage.write_bytes(f"{lake.features_folder('a')}/shard-000000.parquet", b"x")
    refresh_teachers(lake)
    assert list(rows_of(lake)) == ["b"]


@pytest.mark.parametrize("left", [None, b"torn", "other columns"])
def test_verify_brings_it_up_to_date_whatever_is_there(lake, left, caplog):
    caplog.set_level("INFO", logger="mmkd")
    lake.storage.remove(TEACHERS_TABLE)
    if left == "other columns":
        pq.write_table(pa.table({"name": ["b"]}), f"{lake.uri}/{TEACHERS_TABLE}")
    elif left is not None:
        lake.storage.write_bytes(TEACHERS_TABLE, left)
    assert verify(lake.uri).findings == []
    assert "teachers.parquet was not what the manifests say" in caplog.text
    assert list(rows_of(lake)) == ["b"]
    caplog.clear()
    verify(lake.uri)
    assert "teachers.parquet" not in caplog.text
