"""What a source's columns become: identity, labels, sets, folders' names, and columns that are kept as they are."""

import datetime
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from common.errors import LakeError, SourceError
from common.kept_columns import kept_value, parse_kept
from common.lake import open_lake
from extractor.config import IngestConfig
from extractor.ingest import ingest
from extractor.sources import plan_sources, read_part
from tests.conftest import draw_jpeg


@pytest.fixture
def folder(tmp_path):
    for name in ("a/1.jpg", "b/1.jpg", "2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(draw_jpeg(sum(name.encode())))
    return tmp_path


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(source, **settings):
    config = IngestConfig(**settings)
    return [record for part in plan_sources([str(source)], config) for record in read_part(part, config)]


def test_pictures_of_the_same_name_are_told_apart_however_they_are_named(folder):
    names = [str(folder / "a/1.jpg"), str(folder / "b/1.jpg"), "a/1.jpg", "/absent/a/1.jpg"]
    records = read(write(folder / "p.jsonl", *({"image": name, "caption": "c"} for name in names)))
    keys = ["p.jsonl/a/1.jpg", "p.jsonl/b/1.jpg", "p.jsonl/a/1.jpg", "p.jsonl/absent/a/1.jpg"]
    assert [record.source_key for record in records] == keys
    tables = [write(folder / "tables" / name / "p.jsonl", {"image": names[0], "caption": "c"}) for name in "xy"]
    assert [record.source_key for record in read(folder / "tables")] == [
        f"{table.parent.name}/p.jsonl/{str(folder).lstrip('/')}/a/1.jpg" for table in tables
    ]


def test_keys_in_the_names_of_folders_are_columns(folder, caplog):
    write(folder / "set/split=test/lang=en/p.jsonl", {"image": str(folder / "2.jpg"), "caption": "c", "label": "x"})
    write(folder / "set/split=train/lang=de/p.jsonl", {"image": str(folder / "2.jpg"), "caption": "d", "split": "val"})
    with caplog.at_level("INFO", "mmkd"):
        first, second = read(folder / "set", keep_columns=("lang",))
    assert (first.split, first.kept) == ("test", {"lang": "en"})
    assert (second.split, second.kept) == ("val", {"lang": "de"}), "a row's own cell comes first"
    rows = pa.table({"image": [draw_jpeg(1)], "caption": ["c"]})
    (folder / "hive/dataset=mine").mkdir(parents=True)
    pq.write_table(rows, folder / "hive/dataset=mine/p.parquet")
    (record,) = read(folder / "hive")
    assert record.dataset == "mine"


def test_the_log_says_which_columns_are_read_and_which_are_not(folder, caplog):
    rows = {"image": "2.jpg", "title": "c", "view": "PA", "label": "x"}
    write(folder / "p.jsonl", rows)
    (folder / "notes.md").write_text("")
    with caplog.at_level("INFO", "mmkd"):
        read(folder, format="jsonl")
    said = caplog.text
    assert "p.jsonl: image, caption from title, label; not read: view (--keep-columns keeps them)" in said
    assert "1 files are read; 4 others" in said
    assert ".jpg 3, .md 1" in said


def test_labels_without_captions_are_pictures_to_evaluate_on_and_neither_is_a_question(folder, caplog):
    with caplog.at_level("INFO", "mmkd"):
        (record,) = read(write(folder / "p.jsonl", {"image": "2.jpg", "labels": ["x", "y"]}))
    assert (record.captions, record.labels) == ((), ("x", "y"))
    assert "there is no caption column" in caplog.text
    bare = write(folder / "q.jsonl", {"image": "2.jpg", "Befund": "Text"})
    with pytest.raises(SourceError, match=r"no caption column.*no labels either.*image, Befund.*--no-captions"):
        read(bare)
    (record,) = read(bare, no_captions=True)
    assert (record.captions, record.labels, record.reason) == ((), (), None)


def test_a_row_without_the_id_or_group_that_was_asked_for_is_a_reject(folder):
    rows = [{"image": "2.jpg", "caption": "c", "uid": "u", "patient": None}, {"image": "2.jpg", "caption": "c"}]
    source = write(folder / "p.jsonl", *rows)
    found = read(source, columns={"id": "uid", "group": "patient"})
    assert [(r.reason, r.source_id, r.row) for r in found] == [("no group", "u", 1), ("no id", None, 2)]


def test_kept_columns_are_typed_and_the_same_in_all_shards(folder):
    rows = [{"image": "2.jpg", "caption": f"{i}", "age": age} for i, age in enumerate((41, "42", None, 43.0))]
    rows += [{"image": "2.jpg", "caption": "bad", "age": age} for age in ("old", 1.5, True, 2**70)]
    source = write(folder / "p.jsonl", *({**row, "view": {"side": "L"}} for row in rows))
    lake = str(folder / "lake")
    config = IngestConfig(shard_rows=2, keep_columns=("age:int64", "view"))
    report = ingest(str(source), lake, config)
    assert (report.pairs, report.reasons) == (4, {"unfitting cell": 4})
    tables = [open_lake(lake).read_pairs(shard) for shard in (0, 1)]
    assert {str(table.schema.field("age").type) for table in tables} == {"int64"}
    assert [age for table in tables for age in table["age"].to_pylist()] == [41, 42, None, 43]
    assert tables[0]["view"][0].as_py() == '{"side": "L"}'
    with pytest.raises(LakeError, match=r"keeps the columns.*age.*int64.*say --keep-columns age:int64"):
        ingest(str(source), lake, IngestConfig(shard_rows=2))


def test_parquet_keeps_its_own_types_and_says_which_it_cannot(folder):
    day = datetime.date(2024, 5, 6)
    moment = datetime.datetime(2024, 5, 6, 7, 8, tzinfo=datetime.timezone(datetime.timedelta(hours=2)))
    table = pa.table(
        {
            "image": [draw_jpeg(1)],
            "caption": ["c"],
            "dose": pa.array([1.5], pa.float32()),
            "day": [day],
            "at": [moment],
            "flag": [True],
            "site": pa.array(["x"]).dictionary_encode(),
            "boxes": [[1, 2]],
        }
    )
    pq.write_table(table, folder / "p.parquet")
    names = ("dose", "day", "at", "flag", "site")
    (record,) = read(folder / "p.parquet", keep_columns=(*names, "boxes:string"))
    assert record.kept == {
        "dose": 1.5,
        "day": day,
        "at": datetime.datetime(2024, 5, 6, 5, 8),  # in UTC
        "flag": True,
        "site": "x",
        "boxes": "[1, 2]",
    }
    report = ingest(str(folder / "p.parquet"), str(folder / "lake"), IngestConfig(keep_columns=names))
    kinds = open_lake(str(folder / "lake")).read_pairs(0).schema
    assert [str(kinds.field(name).type) for name in names] == [
        "double",
        "date32[day]",
        "timestamp[us]",
        "bool",
        "string",
    ]
    assert report.pairs == 1
    with pytest.raises(SourceError, match=r"'boxes' holds list.*boxes:string"):
        read(folder / "p.parquet", keep_columns=("boxes",))


def test_columns_that_share_a_name_are_refused(folder):
    (folder / "p.csv").write_text("image,caption,caption\n2.jpg,a,b\n")
    with pytest.raises(SourceError, match="several columns called 'caption'"):
        read(folder / "p.csv")
    twice = pa.Table.from_arrays(
        [pa.array(["2.jpg"]), pa.array(["a"]), pa.array(["b"])], ["image", "caption", "caption"]
    )
    pq.write_table(twice, folder / "p.parquet")
    with pytest.raises(SourceError, match="several columns called 'caption'"):
        read(folder / "p.parquet")


@pytest.mark.parametrize("asked", ["image", "age:integer", "", "mmkd_row", "split", "Split"])
def test_columns_that_cannot_be_kept_are_refused_with_the_settings(asked):
    with pytest.raises(ValidationError):
        IngestConfig(keep_columns=(asked,))


def test_names_with_colons_and_cells_of_every_type():
    assert parse_kept(("a:b:string", "c:float64", "d")) == {"a:b": "string", "c": "float64", "d": None}
    with pytest.raises(ValueError, match="named twice"):
        parse_kept(("d", "D:bool"))
    with pytest.raises(ValueError, match="time of day"):
        kept_value(datetime.datetime(2024, 1, 2, 3), "date")
    good = {"string": [3, "3"], "int64": ["-7", -7], "float64": ["1e3", 1000.0], "bool": ["No", False]}
    good |= {"date": ["2024-01-02", datetime.date(2024, 1, 2)]}
    good |= {"timestamp": ["2024-01-02T03:04:05+01:00", datetime.datetime(2024, 1, 2, 2, 4, 5)]}
    for kind, (cell, value) in good.items():
        assert kept_value(cell, kind) == value
        assert kept_value("  ", kind) is kept_value(float("nan"), kind) is None
    for kind, cell in {"int64": "7.5", "float64": "x", "bool": "maybe", "date": 3, "timestamp": "noon"}.items():
        with pytest.raises((ValueError, TypeError)):
            kept_value(cell, kind)


def test_folders_that_are_named_directly_or_by_a_pattern_say_something_too(folder):
    for split in ("train", "test"):
        write(folder / f"d/split={split}/p.jsonl", {"image": str(folder / "2.jpg"), "caption": split})
    for sources in ([folder / "d/split=train", folder / "d/split=test"], [folder / "d/split=*"]):
        parts = plan_sources([str(source) for source in sources], IngestConfig())
        records = [record for part in parts for record in read_part(part, IngestConfig())]
        assert {(record.captions, record.split) for record in records} == {(("train",), "train"), (("test",), "test")}
    (record,) = read(folder / "d/split=test/p.jsonl")
    assert record.split == "test"
    empty = write(folder / "d/split=val/q.jsonl", {"image": str(folder / "2.jpg"), "caption": "c", "split": None})
    assert read(empty)[0].split == "val", "an empty cell says nothing against its folder"
    twice = write(folder / "d/split=val/x/split=test/r.jsonl", {"image": "2.jpg", "caption": "c"})
    with pytest.raises(SourceError, match="give split two values"):
        read(folder / "d/split=val")
    assert twice.exists()


def test_addresses_give_away_nothing_that_lets_their_bearer_in(folder):
    url = "http://127.0.0.1:9/a.png"
    queries = ["?api_key=CANARY", "?key=CANARY", "?jwt=CANARY", "?whatever=CANARY", "?id=5&x=CANARY", "#t=CANARY"]
    rows = [{"url": url + query, "uid": url + query, "caption": "c"} for query in queries]
    config = {"columns": {"id": "uid"}, "fetch": {"seconds": 1, "retries": 0}}
    found = read(write(folder / "p.jsonl", *rows[:3]), **config)
    assert "CANARY" not in str([(record.source_key, record.source_id, record.detail) for record in found])
    keys = [record.source_key for record in read(write(folder / "q.jsonl", *rows[3:]), **config)]
    assert "CANARY" not in str(keys)
    assert len({key for key in keys if "?" in key}) == 2, "they tell pictures apart all the same"


def test_a_cell_that_python_cannot_hold_is_a_reject(folder):
    days = pa.array([19000, 10_000_000], pa.int32()).cast(pa.date32())
    pq.write_table(pa.table({"image": [draw_jpeg(1)] * 2, "caption": ["a", "b"], "day": days}), folder / "p.parquet")
    assert [record.reason for record in read(folder / "p.parquet", keep_columns=("day",))] == [None, "malformed row"]


def test_a_table_without_rows_is_an_error_and_fixes_nothing(folder):
    (folder / "empty.csv").write_text("image,caption,age\n")
    with pytest.raises(SourceError, match="not one row"):
        ingest(str(folder / "empty.csv"), str(folder / "lake"), IngestConfig())
    assert not (folder / "lake").exists()
    bad = write(folder / "bad.jsonl", {"image": "absent.jpg", "caption": "c", "age": 4})
    with pytest.raises(SourceError, match="not one usable pair"):
        ingest(str(bad), str(folder / "lake"), IngestConfig(keep_columns=("age",)))
    good = write(folder / "good.jsonl", {"image": "2.jpg", "caption": "c", "age": 4})
    assert ingest(str(good), str(folder / "lake"), IngestConfig(keep_columns=("age:int64",))).pairs == 1
    assert open_lake(str(folder / "lake")).read_pairs(0)["age"].to_pylist() == [4]


def test_a_column_to_keep_that_no_sample_has_is_told(tmp_path, caplog):
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, data in (("1.jpg", draw_jpeg(1)), ("1.json", b'{"caption": "c", "age": 4}')):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    with caplog.at_level("WARNING", "mmkd"):
        ingest(str(tmp_path / "a.tar"), str(tmp_path / "lake"), IngestConfig(keep_columns=("agge:int64", "age:int64")))
    assert "no row has a value in 'agge'" in caplog.text
