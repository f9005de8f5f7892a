import pyarrow as pa

from common.captions import captioned


def test_a_row_has_a_caption_where_its_list_is_not_empty():
    column = pa.array([["a"], [], ["b", "c"], None, []], pa.list_(pa.string()))
    assert captioned(column).tolist() == [True, False, True, False, False]
    assert captioned(pa.chunked_array([column.slice(1), column.slice(0, 1)])).tolist() == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert captioned(column.slice(0, 0)).tolist() == []
