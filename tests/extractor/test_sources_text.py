"""Text tables as the world writes them: quotes, line ends, encodings, keys that come late, packed files."""

import codecs
import gzip
import json
import subprocess
import sys
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import SourceError
from extractor.config import IngestConfig
from extractor.sources import lines, plan_sources, read_part
from extractor.sources.record import RowFaultError, clean_captions, decode_text

PIXEL = b"\x89PNG the sources never look inside"


def read(*sources, **settings):
    config = IngestConfig(**settings)
    parts = plan_sources([str(source) for source in sources], config)
    return [record for part in parts for record in read_part(part, config)]


def captions(records):
    return [record.reason or (record.captions[0] if record.captions else None) for record in records]


@pytest.fixture
def folder(tmp_path):
    for index in range(4):
        (tmp_path / f"i{index}.png").write_bytes(PIXEL)
    return tmp_path


def write(path, *rows, end="\n", encoding="utf-8"):
    path.write_bytes((end.join(rows) + end).encode(encoding))
    return path


def test_reported_table_with_a_leading_quote_is_read_whole(shared_data):
    records = read(shared_data / "reports" / "case-01" / "pairs.tsv")
    assert captions(records) == [
        *('"Ground glass opacity in both lungs', "Normal chest", "Pleural effusion", "Rib fracture"),
    ]


def test_quotes_between_tabs_stay_as_they_are(folder, caplog):
    table = write(
        folder / "t.tsv", "filepath\ttitle", 'i0.png\t"Bull\'s eye" lesion', 'i1.png\t"All of it."', "i2.png\tx"
    )
    with caplog.at_level("INFO", "mmkd"):
        assert captions(read(table)) == ['"Bull\'s eye" lesion', '"All of it."', "x"]
    assert "t.tsv: tabs between cells, quotes are ordinary characters" in caplog.text
    assert captions(read(table, quotes=True)) == ["malformed row", "All of it.", "x"]


@pytest.mark.parametrize("header", ["filepath\ttitle", '"filepath"\t"title"'], ids=["where needed", "everywhere"])
def test_a_table_with_tabs_whose_writer_quoted_is_read_as_quoted(folder, header, caplog):
    rows = [header, 'i0.png\t"say ""hi"" to both"', 'i1.png\t"plain"', "i2.png\t5 mm"]
    with caplog.at_level("INFO", "mmkd"):
        assert captions(read(write(folder / "t.tsv", *rows))) == ['say "hi" to both', "plain", "5 mm"]
    assert "t.tsv: tabs between cells, which may be quoted" in caplog.text
    # One cell that such a writer would have written otherwise speaks against it.
    if header.startswith("f"):
        assert captions(read(write(folder / "u.tsv", *rows, 'i3.png\t5" tube')))[1] == '"plain"'


def test_an_unclosed_quote_costs_its_own_row_only(folder):
    rows = ["image,caption", "i0.png,one", 'i1.png,"Ground glass', "i2.png,three", 'i3.png,"four, and ""five"""']
    records = read(write(folder / "p.csv", *rows))
    assert captions(records) == ["one", "malformed row", "three", 'four, and "five"']
    assert records[1].source_key == "p.csv/#1"
    assert records[1].detail.startswith("row 2: its quotes do not match")
    assert "--no-quotes" in records[1].detail
    assert captions(read(folder / "p.csv", quotes=False)) == ["one", '"Ground glass', "three", "malformed row"]


def test_an_unclosed_quote_at_the_end_of_a_part_or_before_a_huge_rest_is_one_reject(folder, monkeypatch):
    monkeypatch.setattr(lines, "ROWS_PER_PART", 3)
    rows = ["image,caption", *[f"i{i % 4}.png,c{i}" if i % 5 != 2 else f'i0.png,"open {i}' for i in range(13)]]
    table = write(folder / "p.csv", *rows)
    expected = [f"c{i}" if i % 5 != 2 else "malformed row" for i in range(13)]
    assert captions(read(table)) == expected
    assert [part.first_row for part in plan_sources([str(table)], IngestConfig())] == [0, 3, 6, 9, 12]
    rest = [f"i1.png,{'long ' * 40}{i}" for i in range(2000)]
    records = read(write(folder / "long.csv", "image,caption", 'i0.png,"open', *rest))
    assert captions(records)[0] == "malformed row"
    assert len(records) == 2001
    assert not any(record.reason for record in records[1:])


def test_text_behind_a_closing_quote_is_a_reject_and_not_glued_on(folder):
    records = read(write(folder / "p.csv", "image,caption", 'i0.png,"Bull\'s eye" lesion', "i1.png,two"))
    assert captions(records) == ["malformed row", "two"]


def test_a_header_whose_quote_is_open_is_an_error_that_says_so(folder):
    with pytest.raises(SourceError, match=r"header of .*p\.csv cannot be read.*--no-quotes"):
        read(write(folder / "p.csv", 'image,"caption', "i0.png,one"))


def test_lines_end_with_carriage_returns_too(folder, monkeypatch):
    old_mac = write(folder / "mac.csv", "image,caption", "i0.png,one", 'i1.png,"two\rlines"', "i2.png,three", end="\r")
    assert captions(read(old_mac)) == ["one", "two\rlines", "three"]
    mixed = folder / "mixed.tsv"
    mixed.write_bytes(b"image\tcaption\ni0.png\tone\ri1.png\ttwo\r\ni2.png\tthree\n")
    assert captions(read(mixed)) == ["one", "two", "three"]
    objects = [json.dumps({"image": f"i{i}.png", "caption": f"c{i}"}) for i in range(4)]
    assert captions(read(write(folder / "mac.jsonl", *objects, end="\r"))) == ["c0", "c1", "c2", "c3"]
    # Wherever a piece of the file ends, between the two characters of a line end too.
    for size in range(1, 12):
        monkeypatch.setattr(lines, "READ_BYTES", size)
        assert captions(read(mixed)) == ["one", "two", "three"]
        assert captions(read(old_mac)) == ["one", "two\rlines", "three"]


def test_rows_with_other_cells_are_rejects_and_blank_lines_in_a_caption_stay(folder):
    rows = ["image,caption", "i0.png,a,b", "i1.png", "", 'i2.png,"first\n\nsecond"', "   ", "i3.png,last"]
    records = read(write(folder / "p.csv", *rows))
    assert captions(records) == ["malformed row", "malformed row", "first\n\nsecond", "last"]
    assert "3 cells, the header has 2" in records[0].detail


def test_the_dialects_of_many_tables_are_one_line_each(folder, caplog):
    for index in range(3):
        write(folder / f"t{index}.csv", "image;caption", "i0.png;one")
    write(folder / "u.csv", "image,caption", "i0.png,one")
    with caplog.at_level("INFO", "mmkd"):
        plan_sources([str(folder / "*.csv")], IngestConfig())
    said = [record.getMessage() for record in caplog.records if "between cells" in record.getMessage()]
    hint = "which may be quoted (if quotes are ordinary characters here, say --no-quotes)"
    assert said == [
        f"ingest: t0.csv and 2 more: semicolons between cells, {hint}",
        f"ingest: u.csv: commas between cells, {hint}",
    ]


def test_reported_keys_that_come_late_are_read(shared_data, tmp_path):
    make = shared_data / "reports" / "case-02" / "make.py"
    subprocess.run([sys.executable, str(make)], cwd=tmp_path, check=True)
    records = read(tmp_path / "pairs.jsonl")
    assert len(records) == 104
    assert {(r.labels, r.split, r.modality) for r in records[:100]} == {((), None, None)}
    assert {(r.labels, r.split, r.modality) for r in records[100:]} == {(("effusion",), "test", "radiograph")}


def test_each_row_is_read_by_its_own_keys(folder):
    rows = [{"image": "i0.png", "caption": "first", "text": "not this"} for _ in range(150)]
    rows += [{"image": "i1.png", "title": "by another name"}, {"filepath": "i2.png", "caption": "c", "licence": "CC0"}]
    rows += [{"image": "i3.png", "caption": None, "split": "val"}, {"image": "i3.png"}]
    records = read(write(folder / "p.jsonl", *map(json.dumps, rows)))
    assert captions(records) == [*["first"] * 150, "by another name", "c", None, None]
    assert records[151].license == "CC0"


def test_a_column_that_is_asked_for_may_come_late_but_must_come(folder):
    rows = [json.dumps({"image": "i0.png", "caption": f"c{i}"}) for i in range(300)]
    late = write(folder / "p.jsonl", *rows, json.dumps({"image": "i1.png", "caption": "c", "finding": "edema"}))
    assert read(late, columns={"label": "finding"})[-1].labels == ("edema",)
    with pytest.raises(SourceError, match=r"no column 'findings'.*image, caption, finding"):
        read(late, columns={"label": "findings"})
    first = write(folder / "q.jsonl", *["not an object"] * 200, json.dumps({"image": "i1.png", "caption": "c"}))
    assert captions(read(first)) == ["malformed line"] * 200 + ["c"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("name", ["p.csv", "p.tsv", "p.jsonl", "p.csv.gz"])
def test_tables_are_read_in_utf8_and_in_utf16_with_a_mark(folder, name, encoding, monkeypatch):
    if name == "p.jsonl":
        rows = [f'{{"image": "i{i}.png", "caption": "\u00b5m \U0001f9b4 {i}"}}' for i in range(4)]
    else:
        mark = "\t" if "tsv" in name else ","
        rows = [f"image{mark}caption", *(f"i{i}.png{mark}\u00b5m \U0001f9b4 {i}" for i in range(4))]
    marks = {"utf-16-le": codecs.BOM_UTF16_LE, "utf-16-be": codecs.BOM_UTF16_BE}
    data = marks.get(encoding, b"") + ("\r\n".join(rows) + "\r\n").encode(encoding)
    (folder / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    for size in (3, 1 << 20):
        monkeypatch.setattr(lines, "READ_BYTES", size)
        assert captions(read(folder / name)) == [f"\u00b5m \U0001f9b4 {i}" for i in range(4)]


def test_rows_in_other_encodings_have_one_reason_in_every_table(folder):
    text = "Sj\u00f6gren".encode("latin-1")
    (folder / "p.csv").write_bytes(b"image,caption\ni0.png,good\ni1.png," + text + b"\n")
    (folder / "p.jsonl").write_bytes(
        b'{"image": "i0.png", "caption": "good"}\n{"image": "i1.png", "caption": "' + text + b'"}\n'
    )
    broken = b"\xff\xfe" + "image,caption\ni0.png,good\ni1.png,half ".encode("utf-16-le") + b"\x3e\xd8"
    (folder / "half.csv").write_bytes(broken)
    (folder / "odd.csv").write_bytes(broken[:-1])
    for name in ("p.csv", "p.jsonl", "half.csv", "odd.csv"):
        good, bad = read(folder / name)
        assert (good.captions, bad.reason) == (("good",), "malformed row"), name
        assert "row 2: not UTF-8 text" in bad.detail
    (folder / "unmarked.csv").write_bytes("image,caption\ni0.png,good\n".encode("utf-16-le"))
    with pytest.raises(SourceError, match="not UTF-8 text"):
        read(folder / "unmarked.csv")


def test_texts_of_parquet_are_checked_too(folder):
    texts = pa.array([b"good", "Sj\u00f6gren".encode("latin-1"), "\u00b5m".encode(), "\u00b5m".encode("utf-16")])
    table = pa.table({"image": ["i0.png", "i1.png", "i2.png", "i3.png"], "caption": texts})
    pq.write_table(table, folder / "bytes.parquet")
    assert captions(read(folder / "bytes.parquet")) == ["good", "malformed row", "\u00b5m", "\u00b5m"]
    unchecked = pa.StringArray.from_buffers(4, *texts.buffers()[1:])
    pq.write_table(table.set_column(1, "caption", unchecked), folder / "strings.parquet")
    found = read(folder / "strings.parquet")
    assert captions(found) == ["good", "malformed row", "\u00b5m", "malformed row"]
    assert "row 2: not UTF-8 text" in found[1].detail


def test_text_is_decoded_or_refused():
    marked = b"\xfe\xff\0a\0\xb5\0m"
    for data in (b"a\xc2\xb5m", b"\xef\xbb\xbfa\xc2\xb5m", "a\u00b5m".encode("utf-16"), marked):
        assert decode_text(data) == "a\u00b5m"
    latin = "a\u00b5m".encode("latin-1")
    half, lone = b"\xff\xfec\0a", b"\xff\xfe\0\xd8a\0"
    for data in (latin, "plain".encode("utf-16-be"), "a\u00b5m".encode("utf-32"), half, lone):
        with pytest.raises(RowFaultError, match="malformed row: not UTF"):
            decode_text(data)
    with pytest.raises(RowFaultError):
        clean_captions([latin])


@pytest.mark.parametrize("name", ["p.jsonl.gz", "p.csv.gz", "p.tsv.gz"])
def test_a_packed_table_is_unpacked_once_and_never_held_whole(folder, name, monkeypatch):
    rows, wide = 20_000, "w" * 400
    mark = "\t" if "tsv" in name else ","
    with gzip.open(folder / name, "wt", compresslevel=1) as stream:
        if "csv" in name or "tsv" in name:
            stream.write(f"image{mark}caption{mark}label\n")
            stream.writelines(f"i0.png{mark}{wide}{mark}{i}\n" for i in range(rows))
        else:
            stream.writelines(json.dumps({"image": "i0.png", "caption": wide, "label": i}) + "\n" for i in range(rows))
    monkeypatch.setattr(lines, "READ_BYTES", 1 << 16)
    config = IngestConfig(keep_labels=(str(rows - 1),))  # the others are counted without their pictures
    (part,) = plan_sources([str(folder / name)], config)
    tracemalloc.start()
    try:
        kept = [record for record in read_part(part, config) if not record.filtered]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert [record.labels for record in kept] == [(str(rows - 1),)]
    assert most < 4 << 20, "of a table of 8 MB"


def test_damage_far_into_a_packed_table_is_an_error_that_names_it(folder):
    rows = [json.dumps({"image": "i0.png", "caption": json.dumps(list(range(i, i + 90)))}) for i in range(40_000)]
    packed = gzip.compress("\n".join(rows).encode(), 1)
    (folder / "p.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    config = IngestConfig(keep_labels=("none",))
    (part,) = plan_sources([str(folder / "p.jsonl.gz")], config)
    with pytest.raises(SourceError, match="damaged or cut off"):
        list(read_part(part, config))
