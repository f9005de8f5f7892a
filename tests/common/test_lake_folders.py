"""Every folder of tables opens as it is, by each reader that the README names, on a disk and on S3."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from embedded import embed

from common.lake import EXTRACT_REJECTS, INGEST_REJECTS, Lake, shard_name
from common.schemas import REJECTS, SCORES
from common.shard_files import shards_in
from extractor.tending.compact import compact
from extractor.tending.verify import verify
from trainer.config import SelectConfig
from trainer.selection.select import select

ROWS, TEACHERS = 20, ("t", "u.v2")


@pytest.fixture(params=["local", "s3"])
def lake(request, make_lake, tmp_path) -> Lake:
    """A lake as the program's own writers leave it: embeddings, rejects, ledgers, a selection, the chart and scores."""
    home = tmp_path if request.param == "local" else request.getfixturevalue("s3")
    lake = make_lake(f"{home}/lake", rows=ROWS, shard_rows=8)
    for number, teacher in enumerate(TEACHERS):
        embed(lake, teacher, dim=8 + 4 * number)
    assert verify(lake.uri, pairs=True).is_good
    select(lake.uri, SelectConfig(min_skill=0))
    reject = {"source": "s", "source_key": "k", "stage": "ingest", "reason": "truncated"}
    lake.storage.write_table(f"{INGEST_REJECTS}/some-000000.parquet", pa.Table.from_pylist([reject], schema=REJECTS))
    score = dict.fromkeys(
        ("model", "model_kind", "task", "dataset", "modality", "metric", "created_at", "split", "evaluation"), "x"
    )
    table = pa.Table.from_pylist([{**score, "value": 1.0, "n": 1}], schema=SCORES)
    lake.storage.write_table("scores/0123.parquet", table)
    return lake


def folders_of(lake: Lake) -> dict[str, tuple[int, set[str]]]:
    """Folder -> its rows, and some of the columns that it must show."""
    (selection,) = lake.selections()
    return {
        "pairs": (ROWS, {"sample_id", "captions", "labels", "modality", "split"}),
        **{f"features/teacher={name}": (ROWS, {"sample_id", "image_embedding"}) for name in TEACHERS},
        f"selection/{selection}": (ROWS * len(TEACHERS), {"sample_id", "admitted"}),
        **{f"selection/{selection}/teacher={name}": (ROWS, {"sample_id", "admitted"}) for name in TEACHERS},
        "rejects": (1 + 3 * len(TEACHERS), {"stage", "reason"}),
        EXTRACT_REJECTS: (3 * len(TEACHERS), {"stage", "reason"}),
        "scores": (1, {"model", "value"}),
    }


def arrow_of(place: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Arrow's own S3, as a user of Arrow has it, rather than fsspec's."""
    if not place.startswith("s3://"):
        return pyarrow.fs.LocalFileSystem(), place
    return pyarrow.fs.S3FileSystem(endpoint_override=os.environ["AWS_ENDPOINT_URL"]), place.removeprefix("s3://")


def for_polars(place: str) -> dict[str, Any]:
    """In an object store polars takes an address for a file's unless it ends in a slash."""
    if not place.startswith("s3://"):
        return {"source": place}
    return {"source": f"{place}/", "storage_options": {"aws_allow_http": "true"}}


def with_pyarrow(place: str) -> pa.Table:
    filesystem, path = arrow_of(place)
    return pq.read_table(path, filesystem=filesystem)


def with_dataset(place: str) -> pa.Table:
    filesystem, path = arrow_of(place)
    return ds.dataset(path, filesystem=filesystem).to_table()


READERS: dict[str, Callable[[str], Any]] = {
    "pandas": lambda place: pa.Table.from_pandas(pd.read_parquet(place)),
    "pyarrow": with_pyarrow,
    "dataset": with_dataset,
    "polars": lambda place: pl.read_parquet(**for_polars(place)).to_arrow(),
    "lazy polars": lambda place: pl.scan_parquet(**for_polars(place)).collect().to_arrow(),
    "duckdb": lambda place: duckdb.sql(f"FROM read_parquet('{place}')").to_arrow_table(),
}


def readers_for(lake: Lake) -> dict[str, Callable[[str], Any]]:
    return {name: read for name, read in READERS.items() if lake.storage.is_local or name != "duckdb"}


def test_every_folder_opens_with_every_reader(lake):
    for folder, (rows, columns) in folders_of(lake).items():
        for name, read in readers_for(lake).items():
            table = read(f"{lake.uri}/{folder}")
            assert table.num_rows == rows, (folder, name)
            assert columns <= set(table.column_names), (folder, name)


def test_folders_of_packs_open_too(lake):
    assert compact(lake.uri).packs == len(TEACHERS)
    for teacher in TEACHERS:
        for name, read in readers_for(lake).items():
            assert read(f"{lake.uri}/features/teacher={teacher}").num_rows == ROWS, name


def test_a_selections_teachers_are_a_column(lake):
    (selection,) = lake.selections()
    for name, read in readers_for(lake).items():
        if name != "dataset":  # which is told so by partitioning="hive"
            teachers = read(f"{lake.uri}/selection/{selection}")["teacher"].to_pylist()
            assert sorted(teachers) == sorted(TEACHERS * ROWS), name


def test_what_the_readers_give_is_what_was_written(lake):
    written = pa.concat_tables([lake.read_features("t", index) for index in lake.shards()])
    vectors = written["image_embedding"].to_pylist()
    for name, read in readers_for(lake).items():
        table = read(f"{lake.uri}/features/teacher=t")
        assert table["sample_id"].to_pylist() == written["sample_id"].to_pylist(), name
        assert [None if v is None else list(v) for v in table["image_embedding"].to_pylist()] == vectors, name


def test_all_teachers_at_once_where_widths_differ(lake):
    if not lake.storage.is_local:
        pytest.skip("DuckDB's httpfs is not among the packages")
    found = duckdb.sql(f"""
        SELECT teacher, count(*) AS rows, max(len(image_embedding)) AS width
        FROM read_parquet('{lake.uri}/features/*/*.parquet', hive_partitioning=true, union_by_name=true)
        GROUP BY teacher ORDER BY teacher
    """)
    assert found.fetchall() == [("t", ROWS, 8), ("u.v2", ROWS, 12)]


def test_nothing_but_tables_lies_among_tables(lake):
    strangers = [
        path
        for folder in ("pairs", "features", "selection", "rejects", "scores")
        for path in lake.storage.fs.find(lake.storage.path(folder))
        if not path.endswith(".parquet")
    ]
    assert strangers == []
    named = lake.storage.list_files("features/teacher=t")
    assert all(shards_in(name) for name in named)


def test_a_write_under_way_lies_in_no_folder_of_tables(make_lake, tmp_path, monkeypatch):
    lake = make_lake(tmp_path / "lake", rows=8, shard_rows=8)
    embed(lake, "t")
    seen: dict[str, Any] = {}
    rename = os.replace

    def look(source: str, target: str) -> None:
        seen["beside"] = pl.read_parquet(f"{lake.uri}/features/teacher=t").height
        seen["under way"] = Path(source).parent
        rename(source, target)

    monkeypatch.setattr(os, "replace", look)
    lake.storage.write_bytes(f"features/teacher=t/{shard_name(1)}", b"x")
    assert seen == {"beside": 8, "under way": Path(lake.uri)}
