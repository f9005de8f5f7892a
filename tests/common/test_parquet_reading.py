import io
import threading

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import StorageError
from common.parquet_reading import HOLE_BYTES, RangedFile, joined, read_columns, read_footer, table_of
from common.storage import Storage

TABLE = pa.table({"a": list(range(100)), "v": [[float(i)] * 4 for i in range(100)], "s": [str(i) for i in range(100)]})


class Watched(Storage):
    """A storage that notes which thread asked for which bytes."""

    def pieces(self, relative, start, size, chunk):
        ASKED.append((threading.get_ident(), start, size))
        return super().pieces(relative, start, size, chunk)


ASKED: list[tuple[int, int, int]] = []


@pytest.fixture(params=["local", "memory"])
def storage(request, tmp_path):
    ASKED.clear()
    yield Watched(str(tmp_path) if request.param == "local" else "memory://reading")
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def size(storage):
    buffer = io.BytesIO()
    pq.write_table(TABLE, buffer, row_group_size=40)
    storage.write_bytes("t.parquet", buffer.getvalue())
    return buffer.tell()


def test_ranges_are_read_as_from_a_file(storage):
    storage.write_bytes("f", bytes(range(100)))
    file = RangedFile(storage, "f", 100)
    assert file.read(3) == bytes([0, 1, 2])
    assert file.seek(-2, io.SEEK_END) == 98
    assert file.read() == bytes([98, 99])
    assert file.read(5) == b""
    assert file.seek(10) == 10
    assert file.seek(5, io.SEEK_CUR) == 15
    assert file.read(1) == bytes([15])
    assert (file.tell(), file.readable(), file.seekable()) == (16, True, True)


def test_ranges_close_together_are_one_request():
    assert joined([(10, 20), (0, 10), (15, 18)]) == [(0, 20)]
    assert joined([(0, 1), (1 + HOLE_BYTES, 2 + HOLE_BYTES)]) == [(0, 1), (1 + HOLE_BYTES, 2 + HOLE_BYTES)]
    assert joined([]) == []


@pytest.mark.parametrize("groups", [None, [1], [2, 0]])
@pytest.mark.parametrize("columns", [None, ["a"], ["s", "v"], []])
def test_columns_of_groups(storage, size, columns, groups):
    file = pq.ParquetFile(io.BytesIO(storage.read_bytes("t.parquet")))
    expected = file.read_row_groups([0, 1, 2] if groups is None else groups, columns)
    assert read_columns(storage, "t.parquet", size, columns, groups).equals(expected)
    footer = read_footer(storage, "t.parquet", size)
    assert read_columns(storage, "t.parquet", size, columns, groups, footer).equals(expected)


def test_only_the_calling_thread_fetches_and_once(size, storage):
    footer = read_footer(storage, "t.parquet", size)
    ASKED.clear()
    read_columns(storage, "t.parquet", size, ["a", "s"], None, footer)
    assert {thread for thread, _, _ in ASKED} <= {threading.get_ident()}
    assert len(ASKED) == (0 if storage.is_local else 1)


def test_a_whole_file_in_memory(storage, size):
    assert table_of(storage.read_bytes("t.parquet")).equals(TABLE)


@pytest.mark.parametrize("kept", [0, 8, 600])
def test_a_torn_file_is_said_to_be_one(storage, size, kept):
    storage.write_bytes("t.parquet", storage.read_bytes("t.parquet")[:kept])
    with pytest.raises((OSError, pa.ArrowException)):
        read_columns(storage, "t.parquet", kept)


def test_a_column_that_is_not_there_is_named(storage, size):
    with pytest.raises(pa.ArrowInvalid, match=r"t\.parquet has no column zzz; it has a, s, v"):
        read_columns(storage, "t.parquet", size, ["a", "zzz"])


def test_what_the_disk_fails_to_give_is_no_damage(tmp_path, size, storage):
    if not storage.is_local:
        pytest.skip("the local branch only")
    footer = read_footer(storage, "t.parquet", size)
    storage.remove("t.parquet")
    (tmp_path / "t.parquet").symlink_to("t.parquet")  # too many levels of symbolic links
    with pytest.raises(StorageError):
        read_columns(storage, "t.parquet", size, footer=footer)
    with pytest.raises(FileNotFoundError):
        read_columns(storage, "none.parquet", size, footer=footer)
