import io
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.parquet_reading import read_columns
from common.schemas import vector_type
from common.storage import Storage
from common.vector_pages import (
    OtherLayoutError,
    decode_vectors,
    definition_runs,
    expects,
    is_vectors,
    thrift_struct,
)

LAYOUT = {
    "compression": "zstd",
    "use_dictionary": False,
    "use_byte_stream_split": ["v.list.element"],
    "write_page_index": True,
}
"""As `Storage.write_table` writes vectors."""


def vectors(rows, width, absent=None, values=None):
    if values is None:
        values = np.random.default_rng(rows + width).normal(size=rows * width).astype(np.float32)
    mask = None if absent is None else pa.array(np.asarray(absent, bool))
    return pa.FixedSizeListArray.from_arrays(pa.array(values), type=vector_type(width), mask=mask)


def written(array, **settings):
    buffer = io.BytesIO()
    pq.write_table(pa.table({"v": array}), buffer, **{**LAYOUT, **settings})
    return buffer.getvalue()


def chunk_of(data, group=0):
    """A column's part in a row group, how Arrow describes it, and its rows."""
    footer = pq.read_metadata(io.BytesIO(data))
    chunk = footer.row_group(group).column(0)
    begin = chunk.data_page_offset
    pages = memoryview(data)[begin : begin + chunk.total_compressed_size]
    return pages, expects(footer.schema.column(0)), footer.row_group(group).num_rows


def same_bits(left, right):
    """Equal to the bit where not null, NaN included."""
    valid = left.is_valid().to_numpy(zero_copy_only=False)
    if left.type != right.type or not np.array_equal(valid, right.is_valid().to_numpy(zero_copy_only=False)):
        return False
    bits = [np.asarray(side.drop_null().flatten()).view(np.uint32) for side in (left, right)]
    return np.array_equal(*bits)


def some(rows, share, seed=0):
    return np.random.default_rng(seed).random(rows) < share


@pytest.mark.parametrize(
    ("rows", "width", "absent"),
    [
        (1, 1, None),
        (1, 1, [True]),
        (1000, 1, None),
        (1000, 1, some(1000, 0.5)),
        (999, 3, some(999, 0.01)),
        (999, 3, some(999, 0.99)),
        (300, 7, [True] * 300),
        (300, 7, [True] * 20 + [False] * 260 + [True] * 20),
        (300, 8, [False] * 20 + [True] * 260 + [False] * 20),
        (700, 768, None),
        (700, 768, some(700, 0.26)),
        (5000, 100, some(5000, 0.26)),
    ],
)
@pytest.mark.parametrize("page_bytes", [1 << 20, 1000])
def test_as_arrow_reads(rows, width, absent, page_bytes):
    array = vectors(rows, width, absent)
    pages, expected, count = chunk_of(written(array, data_page_size=page_bytes))
    assert expected
    found = decode_vectors(pages, count, array.type)
    found.validate(full=True)
    assert same_bits(found, array)


def test_beneath_a_null_lie_zeros():
    array = vectors(50, 16, some(50, 0.4))
    pages, _, rows = chunk_of(written(array))
    found = decode_vectors(pages, rows, array.type)
    dense = found.values.to_numpy().reshape(50, 16)
    assert not dense[some(50, 0.4)].any()
    assert dense[~some(50, 0.4)].all()


def test_every_bit_of_a_number_counts():
    values = np.random.default_rng(0).integers(0, 2**32, 64 * 100, np.uint32).view(np.float32)
    values[:4] = [np.nan, np.inf, -0.0, 1e-45]
    array = vectors(100, 64, values=values)
    pages, _, rows = chunk_of(written(array))
    assert same_bits(decode_vectors(pages, rows, array.type), array)


@pytest.mark.parametrize("seed", range(20))
def test_any_pattern_of_nulls(seed):
    draw = np.random.default_rng(seed)
    rows, width = int(draw.integers(1, 600)), int(draw.integers(1, 40))
    absent = np.repeat(draw.random(rows) < draw.random(), draw.integers(1, 30, rows))[:rows]
    array = vectors(rows, width, absent)
    pages, _, count = chunk_of(written(array, data_page_size=int(draw.integers(100, 5000))))
    assert same_bits(decode_vectors(pages, count, array.type), array)


@pytest.mark.parametrize(
    ("settings", "kind"),
    [
        ({"compression": "snappy"}, None),
        ({"use_byte_stream_split": False}, None),
        ({"use_byte_stream_split": False, "use_dictionary": True}, None),
        ({"data_page_version": "2.0"}, None),
        ({}, pa.list_(pa.float32(), 4)),
        ({}, pa.list_(pa.field("element", pa.float32(), nullable=False))),
        ({}, pa.list_(pa.field("element", pa.float64(), nullable=False), 4)),
    ],
)
def test_another_layout_is_left_to_arrow(tmp_path, settings, kind):
    array = vectors(20, 4, some(20, 0.3))
    if kind is not None:
        array = array.cast(kind)
    data = written(array, **settings)
    (tmp_path / "t.parquet").write_bytes(data)
    read = read_columns(Storage(str(tmp_path)), "t.parquet", len(data))
    assert read["v"].combine_chunks().equals(array)
    pages, expected, rows = chunk_of(data)
    if expected and is_vectors(array.type):
        with pytest.raises(OtherLayoutError):
            decode_vectors(pages, rows, array.type)


@pytest.mark.parametrize("rows", [19, 21])
def test_another_number_of_rows(rows):
    array = vectors(20, 4, some(20, 0.3))
    pages, _, _ = chunk_of(written(array))
    with pytest.raises(OtherLayoutError):
        decode_vectors(pages, rows, array.type)


@pytest.mark.parametrize("width", [2, 3, 8])
def test_another_width(width):
    pages, _, rows = chunk_of(written(vectors(20, 4, some(20, 0.3))))
    with pytest.raises(OtherLayoutError):
        decode_vectors(pages, rows, vector_type(width))


def test_an_empty_list_is_not_a_vector():
    array = pa.array([[1.0], [], [2.0]], pa.list_(pa.field("element", pa.float32(), nullable=False)))
    pages, expected, rows = chunk_of(written(array))
    assert expected  # the levels do not tell that the width varies
    with pytest.raises(OtherLayoutError):
        decode_vectors(pages, rows, vector_type(1))


@pytest.mark.parametrize("damage", ["flip", "cut"])
def test_damaged_bytes_are_refused_or_still_vectors(damage):
    """Each bit in turn. That numbers are other numbers, only the hash of a file's content tells (`mmkd verify`)."""
    array = vectors(40, 3, some(40, 0.3), values=np.zeros(120, np.float32))
    data = written(array)
    pages, _, rows = chunk_of(data)
    found_out = 0
    places = range(len(pages) * 8) if damage == "flip" else range(len(pages))
    for place in places:
        broken = bytearray(pages)
        if damage == "flip":
            broken[place // 8] ^= 1 << place % 8
        else:
            del broken[place:]
        try:
            read = decode_vectors(memoryview(bytes(broken)), rows, array.type)
        except OtherLayoutError:
            found_out += 1
        else:
            assert len(read) == rows
            read.validate(full=True)
    assert found_out > len(places) / 4


def test_a_damaged_file_is_arrows_to_explain(tmp_path):
    data = bytearray(written(vectors(40, 3)))
    pages, _, _ = chunk_of(bytes(data))
    begin = bytes(data).index(bytes(pages))
    data[begin : begin + 8] = b"\xff" * 8
    (tmp_path / "t.parquet").write_bytes(data)
    with pytest.raises((OSError, pa.ArrowException)):
        read_columns(Storage(str(tmp_path)), "t.parquet", len(data))


@pytest.mark.parametrize("address", ["local", "memory"])
@pytest.mark.parametrize("columns", [None, ["v"], ["a", "v"], ["v", "w"], ["a"]])
@pytest.mark.parametrize("groups", [None, [1], [1, 0]])
def test_a_table_as_arrow_gives_it(tmp_path, address, columns, groups):
    table = pa.table(
        {
            "a": list(range(50)),
            "v": vectors(50, 6, some(50, 0.2)),
            "s": [[str(i)] * (i % 3) for i in range(50)],
            "w": vectors(50, 2),
        }
    ).replace_schema_metadata({"k": "value"})
    buffer = io.BytesIO()
    pq.write_table(
        table,
        buffer,
        row_group_size=30,
        **{**LAYOUT, "use_byte_stream_split": ["v.list.element", "w.list.element"]},
    )
    storage = Storage(str(tmp_path) if address == "local" else "memory://vectors")
    storage.write_bytes("t.parquet", buffer.getvalue())
    expected = pq.ParquetFile(buffer).read_row_groups([0, 1] if groups is None else groups, columns)
    found = read_columns(storage, "t.parquet", len(buffer.getvalue()), columns, groups)
    assert found.schema.equals(expected.schema, check_metadata=True)
    assert found.equals(expected)


@pytest.mark.parametrize("address", ["local", "memory"])
def test_a_file_without_rows(tmp_path, address):
    data = written(vectors(0, 4))
    storage = Storage(str(tmp_path) if address == "local" else "memory://no-rows")
    storage.write_bytes("t.parquet", data)
    assert read_columns(storage, "t.parquet", len(data)).equals(pa.table({"v": vectors(0, 4)}))


def test_columns_come_in_the_order_asked_for(tmp_path):
    storage = Storage(str(tmp_path))
    storage.write_table("t.parquet", pa.table({"a": list(range(9)), "v": vectors(9, 2), "w": vectors(9, 3)}))
    assert storage.read_table("t.parquet", ["w", "a"]).column_names == ["w", "a"]
    assert storage.read_table("t.parquet", ["a", "w", "v"]).column_names == ["a", "w", "v"]


def test_two_columns_of_one_name_are_left_to_arrow(tmp_path):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_arrays([vectors(9, 2), vectors(9, 2)], names=["v", "v"]), buffer, **LAYOUT)
    storage = Storage(str(tmp_path))
    storage.write_bytes("t.parquet", buffer.getvalue())
    assert storage.read_table("t.parquet").column_names == ["v", "v"]


FLIP_FOOTER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))  # a footer may claim any number of rows
import numpy as np, pyarrow as pa
from common.parquet_reading import read_columns
from common.schemas import vector_type
from common.shard_files import UNREADABLE
from common.storage import Storage

storage = Storage(sys.argv[1])
absent = pa.array([row % 5 == 0 for row in range(20)])
array = pa.FixedSizeListArray.from_arrays(pa.array(np.arange(60, dtype=np.float32)), type=vector_type(3), mask=absent)
storage.write_table("t.parquet", pa.table({"v": array}))
whole = storage.read_bytes("t.parquet")
begin = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
read = refused = 0
for place in range(8 * begin, 8 * len(whole), 3):
    broken = bytearray(whole)
    broken[place // 8] ^= 1 << place % 8
    if storage.is_local:
        with open(storage.path("t.parquet"), "r+b") as file:  # a new file would wait for the disk
            file.write(broken)
    else:
        storage.write_bytes("t.parquet", bytes(broken))
    try:
        found = read_columns(storage, "t.parquet", len(broken))
    except UNREADABLE:
        refused += 1
    else:
        read += found.num_columns == 1
print(read, refused)
"""


@pytest.mark.parametrize("address", ["local", "memory"])
def test_no_damaged_footer_ends_the_process(tmp_path, address):
    """Every third bit in turn, in a process of its own: pyarrow may abort where it is asked about a column's part."""
    uri = str(tmp_path) if address == "local" else "memory://flipped"
    done = subprocess.run([sys.executable, "-c", FLIP_FOOTER, uri], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read, refused = map(int, done.stdout.split())
    assert read > 200
    assert refused > 400


def test_levels_in_runs_and_literals():
    literals = bytes([0b11]) + bytes([0b10_10_00_10, 0b10_10_10_10])  # eight levels of two bits, the first lowest
    run = bytes([20 << 1, 2])
    assert definition_runs(literals + run, 28) == [(2, 1), (0, 1), (2, 6), (2, 20)]
    assert definition_runs(literals, 3) == [(2, 1), (0, 1), (2, 1)]
    assert definition_runs(bytes([0xD0, 0x0F, 2]), 1000) == [(2, 1000)]
    assert definition_runs(bytes([0x80, 0x89, 0x7A, 0]), 1000000) == [(0, 1000000)]
    for torn in (b"", literals, run[:1], bytes([0, 2]), bytes([1]), bytes([0x80])):
        with pytest.raises((OtherLayoutError, IndexError)):
            definition_runs(torn, 28)


def test_a_struct_of_thrift():
    data = bytes([0x15, 0x03, 0x11, 0x12, 0x18, 2]) + b"ab" + bytes([0x1C, 0x15, 0x04, 0x00, 0x05, 0x28, 0x06, 0x00, 9])
    assert thrift_struct(memoryview(data), 0) == ({1: -2, 2: True, 3: False, 4: b"ab", 5: {1: 2}, 20: 3}, len(data) - 1)
    with pytest.raises(OtherLayoutError):
        thrift_struct(memoryview(bytes([0x19, 0x00])), 0)
    with pytest.raises(IndexError):
        thrift_struct(memoryview(data[:7]), 0)
