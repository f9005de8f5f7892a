import os
import pickle
import tempfile
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import StorageError
from common.storage import Storage


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    if request.param == "local":
        return Storage(str(tmp_path / "lake with space"))
    return Storage(request.getfixturevalue("s3") + "/lake ünï=code")


def test_bytes_come_back(storage):
    storage.write_bytes("a/b=c/ü x.bin", b"payload")
    assert storage.read_bytes("a/b=c/ü x.bin") == b"payload"
    assert storage.list_files("a/b=c") == ["ü x.bin"]
    assert storage.list_folders("a") == ["b=c"]
    assert storage.exists("a/b=c/ü x.bin")
    assert not storage.exists("a/other")


def test_a_second_write_replaces_the_first(storage):
    storage.write_bytes("x", b"long first content")
    storage.write_bytes("x", b"second")
    assert storage.read_bytes("x") == b"second"


def test_a_file_written_elsewhere_is_seen_at_once(storage):
    assert storage.list_files("t") == []
    Storage(storage.uri).write_bytes("t/new", b"1")
    assert storage.list_files("t") == ["new"]


def test_missing_things(storage):
    assert storage.list_files("nothing") == []
    storage.remove("nothing")
    with pytest.raises(FileNotFoundError):
        storage.read_bytes("nothing")


def test_remove_takes_a_folder_with_all_it_holds(storage):
    storage.write_bytes("d/e/f", b"1")
    storage.remove("d")
    assert not storage.exists("d/e/f")


def test_json_and_its_errors(storage):
    storage.write_json("v.json", {"ä": [1]})
    assert storage.read_json("v.json") == {"ä": [1]}
    storage.write_bytes("bad.json", b"{")
    with pytest.raises(StorageError, match="not valid JSON"):
        storage.read_json("bad.json")


def test_tables_keep_nulls_types_and_metadata(storage):
    vectors = pa.FixedSizeListArray.from_arrays(
        pa.array(np.arange(12, dtype=np.float32)), 4, mask=pa.array([False, True, False])
    )
    table = pa.table({"sample_id": ["a", "b", "c"], "v": vectors, "s": pa.array([1.0, None, 3.0], pa.float32())})
    storage.write_table("t.parquet", table, {"who": "me"})
    assert storage.read_table("t.parquet").replace_schema_metadata(None).equals(table)
    assert storage.read_table("t.parquet", ["s"]).column_names == ["s"]
    rows, metadata = storage.read_metadata("t.parquet")
    assert (rows, metadata["who"]) == (3, "me")


def test_vectors_are_split_by_byte_without_dictionary(tmp_path):
    vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.zeros(8, np.float32)), 4)
    Storage(str(tmp_path)).write_table("t.parquet", pa.table({"v": vectors}))
    column = pq.read_metadata(tmp_path / "t.parquet").row_group(0).column(0)
    assert "BYTE_STREAM_SPLIT" in column.encodings
    assert not column.has_dictionary_page
    assert column.compression == "ZSTD"


@pytest.mark.parametrize(("picture", "expected"), [(os.urandom, "UNCOMPRESSED"), (bytes, "ZSTD")])
def test_pictures_are_compressed_where_that_makes_them_smaller(tmp_path, picture, expected):
    table = pa.table(
        {"image": [picture(5000), None, picture(5000)], "n": [1, 2, 3], "s": [{"a": 1, "b": [{"c": 2.0}]}] * 3}
    )
    Storage(str(tmp_path)).write_table("t.parquet", table)
    group = pq.read_metadata(tmp_path / "t.parquet").row_group(0)
    found = {group.column(place).path_in_schema: group.column(place).compression for place in range(group.num_columns)}
    assert found.pop("image") == expected
    assert found == dict.fromkeys(["n", "s.a", "s.b.list.element.c"], "ZSTD")
    assert pq.read_table(tmp_path / "t.parquet").equals(table)


def test_a_torn_file_is_a_storage_error(storage):
    storage.write_bytes("torn.parquet", b"PAR1 and then nothing")
    with pytest.raises(StorageError, match=r"torn\.parquet"):
        storage.read_table("torn.parquet")


def test_a_reader_never_sees_half_a_local_write(tmp_path):
    storage = Storage(str(tmp_path))
    contents = {bytes([value]) * 200_000 for value in range(8)}
    storage.write_bytes("x", next(iter(contents)))
    stop = threading.Event()

    def rewrite() -> None:
        while not stop.is_set():
            for content in contents:
                storage.write_bytes("x", content)

    writer = threading.Thread(target=rewrite)
    writer.start()
    try:
        assert all(storage.read_bytes("x") in contents for _ in range(300))
    finally:
        stop.set()
        writer.join()
    assert os.listdir(tmp_path) == ["x"]


def test_a_folder_on_a_disk_of_its_own_is_written_to(tmp_path):
    memory = Path("/dev/shm")
    if not memory.is_dir() or memory.stat().st_dev == tmp_path.stat().st_dev:
        pytest.skip("only one file system here")
    with tempfile.TemporaryDirectory(dir=memory) as elsewhere:
        (tmp_path / "features").symlink_to(elsewhere)
        Storage(str(tmp_path)).write_bytes("features/x", b"1")
        assert os.listdir(elsewhere) == ["x"]
    assert os.listdir(tmp_path) == ["features"]


def test_temporary_names_of_a_killed_writer_are_not_listed(tmp_path):
    (tmp_path / ".tmp-123").write_bytes(b"half")
    assert Storage(str(tmp_path)).list_files() == []


def test_travels_by_pickling(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_bytes("x", b"1")
    assert pickle.loads(pickle.dumps(storage)).read_bytes("x") == b"1"


def test_an_unknown_scheme_is_explained():
    with pytest.raises(StorageError, match="nope://x.* cannot be opened"):
        Storage("nope://x").list_files()


def test_wrong_credentials_are_explained_without_showing_them(s3, monkeypatch):
    import fsspec

    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", "/nonexistent")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StorageError, match="credentials") as caught:
        Storage(s3 + "/x").read_bytes("lake.json")
    assert "canary" not in str(caught.value)
