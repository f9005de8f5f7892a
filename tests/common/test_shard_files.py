import pickle

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import LakeError, StorageError
from common.listing import FileMark, Place, list_marks
from common.shard_files import ShardFile, is_pack, locate, pack_name, shard_name, shards_in
from common.storage import Storage


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path) -> Storage:
    return Storage(str(tmp_path / "lake") if request.param == "local" else request.getfixturevalue("s3") + "/lake")


def mark(version: str = "1") -> FileMark:
    return FileMark(9, version)


def test_names_say_which_shards_a_file_holds():
    assert shards_in(shard_name(7)) == range(7, 8)
    assert shards_in(pack_name(3, 66)) == range(3, 67)
    assert list(shards_in(pack_name(3, 66), packed=False)) == []
    for other in ("notes.json", "shard-7.parquet", "shards-000000.parquet", "shard-000001.parquet.tmp"):
        assert list(shards_in(other)) == []
    assert is_pack(pack_name(0, 1))
    assert not is_pack(shard_name(0))


def test_a_shards_own_file_counts_and_else_the_widest_pack():
    marks = {name: mark(name) for name in (pack_name(0, 3), pack_name(0, 1), shard_name(2), shard_name(9), "x.json")}
    assert {index: place.name for index, place in locate(marks).items()} == {
        0: pack_name(0, 3),
        1: pack_name(0, 3),
        2: shard_name(2),
        3: pack_name(0, 3),
        9: shard_name(9),
    }
    assert locate(marks)[9] == Place(shard_name(9), mark(shard_name(9)))


def test_a_mark_changes_with_the_bytes(storage):
    storage.write_bytes("t/a", b"one")
    storage.write_bytes("t/b", b"one")
    storage.write_bytes("t/sub/c", b"one")
    first = list_marks(storage, "t")
    assert list(first) == ["a", "b"]
    assert first == list_marks(storage, "t")
    assert all(mark.size == 3 and mark.version for mark in first.values())
    Storage(storage.uri).write_bytes("t/a", b"two")
    second = list_marks(storage, "t")
    assert second["a"] != first["a"]
    assert second["b"] == first["b"]
    assert list_marks(storage, "nothing") == {}


def test_writes_under_way_have_no_mark(tmp_path):
    (tmp_path / ".tmp-x").write_bytes(b"1")
    assert list_marks(Storage(str(tmp_path)), "") == {}


def test_a_missing_file_is_not_a_damaged_one(storage):
    with pytest.raises(FileNotFoundError):
        ShardFile(storage, f"t/{shard_name(0)}", 1000)


def test_storage_that_does_not_answer_is_not_a_damaged_file(monkeypatch):
    for name, value in {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "k"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "s")
    monkeypatch.setattr("common.retries.UNREACHABLE_SECONDS", 0.1)
    with pytest.raises(StorageError):
        ShardFile(Storage("s3://bucket/lake"), f"t/{shard_name(0)}", 1000)


@pytest.mark.parametrize("facts", ["", "{", "[]", '[{"shard": 0}]', '[{"shard": 5, "rows": 2}]'])
def test_a_pack_whose_footer_does_not_fit_its_name_is_damaged(tmp_path, facts):
    table = pa.table({"sample_id": ["a", "b"]}).replace_schema_metadata({"mmkd.pack": facts})
    pq.write_table(table, tmp_path / pack_name(0, 1))
    size = (tmp_path / pack_name(0, 1)).stat().st_size
    with pytest.raises(
        LakeError, match=r"shards-000000-000001.parquet is damaged: .*mmkd verify .* --repair"
    ) as raised:
        ShardFile(Storage(str(tmp_path)), pack_name(0, 1), size)
    # A worker's error reaches the driver by pickling.
    assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
