"""Finding sources, and tables (JSONL, CSV, Parquet) as records, bad rows included."""

import json
from datetime import date

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from common.errors import SourceError
from common.storage_errors import without_secrets
from extractor.config import IngestConfig
from extractor.sources import SOURCES, lines, plan_sources, read_part
from extractor.sources.addresses import EXTENSIONS, expand_braces, image_address
from extractor.sources.record import (
    MAX_CAPTION_CHARS,
    Part,
    RowFaultError,
    clean_captions,
    clean_labels,
    clean_text,
    is_kept,
)

PIXEL = b"\x89PNG the sources never look inside"


def read(*sources, **settings):
    config = IngestConfig(**settings)
    parts = plan_sources([str(source) for source in sources], config)
    return [record for part in parts for record in read_part(part, config)]


def write_lines(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png", "with space é.png"):
        (tmp_path / "images" / name).write_bytes(PIXEL + name.encode())
    return tmp_path


def test_braces_globs_folders_and_lists_of_files(tmp_path):
    for name in ("x-000.jsonl", "x-001.jsonl", "x-002.jsonl", "deep/y.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_lines(tmp_path / name, {"image": "i", "caption": "c"})

    def names(*sources):
        return [part.name for part in plan_sources([str(tmp_path / source) for source in sources], IngestConfig())]

    assert names("x-{000..001}.jsonl") == ["x-000.jsonl", "x-001.jsonl"]
    assert names("x-{002,000}.jsonl") == ["x-002.jsonl", "x-000.jsonl"]
    assert names("x-*.jsonl") == ["x-000.jsonl", "x-001.jsonl", "x-002.jsonl"]
    assert names("x-001.jsonl", "x-000.jsonl") == ["x-001.jsonl", "x-000.jsonl"]
    assert names("") == ["deep/y.jsonl", "x-000.jsonl", "x-001.jsonl", "x-002.jsonl"]
    assert expand_braces("{a,b}{1..2}") == ["a1", "a2", "b1", "b2"]
    for bad in ("x-{000}.jsonl", "x-{5..1}.jsonl"):
        with pytest.raises(SourceError, match="neither a rising range"):
            plan_sources([str(tmp_path / bad)], IngestConfig())


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("absent.jsonl", ["nothing at", "absent.jsonl"]),
        ("x-{000..001}.jsonl", ["nothing at", "x-000.jsonl"]),
        ("*.nothing", ["No file matches"]),
        ("notes.txt", ["extension", "--format"]),
        ("mixed", ["several kinds", "csv, jsonl"]),
        ("empty", ["holds no usable source", ".txt"]),
        ("prose.jsonl", ["does not hold JSON Lines"]),
        ("columns.jsonl", ["no caption column", "image, what"]),
        ("latin.csv", ["not UTF-8"]),
        ("text.parquet", ["cannot be read as Parquet"]),
        ("cut.jsonl.gz", ["damaged or cut off"]),
    ],
)
def test_a_source_that_cannot_be_read_says_what_to_do(tmp_path, source, words):
    import gzip

    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "mixed").mkdir()
    (tmp_path / "mixed" / "a.csv").write_text("image,caption\n")
    write_lines(tmp_path / "mixed" / "b.jsonl", {"image": "i", "caption": "c"})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "readme.txt").write_text("")
    (tmp_path / "prose.jsonl").write_text("once upon\na time\n")
    write_lines(tmp_path / "columns.jsonl", {"image": "i", "what": "c"})
    (tmp_path / "latin.csv").write_bytes("Büld,caption\n".encode("latin-1"))
    (tmp_path / "text.parquet").write_text("PAR0")
    packed = gzip.compress(b'{"image": "i", "caption": "c"}\n' * 5000)
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(SourceError) as caught:
        plan_sources([str(tmp_path / source)], IngestConfig())
    for word in words:
        assert word in str(caught.value)


def test_a_configured_column_that_is_absent_lists_those_present(folder):
    manifest = write_lines(folder / "p.jsonl", {"image": "images/a.png", "caption": "c"})
    with pytest.raises(SourceError, match=r"no column 'titel'.*columns.caption.*image, caption"):
        read(manifest, columns={"caption": "titel"})


def test_jsonl_rows_become_records_and_bad_rows_have_reasons(folder):
    good = {"image": "images/a.png", "captions": [" first ", "second", "first", ""], "caption": "unused"}
    good |= {"modality": "CT", "label": 3, "licence": "CC BY 4.0", "split": "Validation"}
    manifest = write_lines(
        folder / "p.jsonl",
        good,
        "",
        "{not json",
        "[1]",
        {"image": "images/absent.png", "captions": "c"},
        {"image": "images/b.png", "captions": ["", {"text": "c"}]},
        {"image": "images/b.png", "captions": "x" * (MAX_CAPTION_CHARS + 1)},
        {"image": None, "captions": "c"},
        {"image": "images", "captions": "c"},
        {"image": "images/" + "n" * 300 + ".png", "captions": "c"},
        {"image": "odd://nowhere/x.png", "captions": "c"},
        {"image": "images/b.png", "captions": "c", "split": "holdout"},
        {"image": str(folder / "images" / "with space é.png"), "captions": "lone \ud800 surrogate"},
    )
    first, *bad, last = read(manifest)
    assert first.source_key == "p.jsonl/images/a.png"
    assert first.image == PIXEL + b"a.png"
    assert first.captions == ("first", "second")
    assert (first.modality, first.labels, first.license, first.split, first.row) == (
        "CT",
        ("3",),
        "CC BY 4.0",
        "val",
        1,
    )
    assert [record.reason for record in bad] == [
        *("malformed line", "malformed line", "image not found", "unreadable cell", "caption too long", "no image"),
        *("image not readable", "image not readable", "image not readable", "unknown split"),
    ]
    assert "row 2" in bad[0].detail
    assert [record.row for record in bad] == list(range(2, 12))
    assert last.source_key == "p.jsonl/images/with space é.png", "an absolute path would differ on another machine"
    assert last.captions == ("lone ? surrogate",)
    assert not last.reason


def test_lines_are_cut_into_parts_that_together_are_the_file(folder, monkeypatch):
    monkeypatch.setattr(lines, "ROWS_PER_PART", 3)
    rows = [{"image": "images/a.png", "caption": f"caption\n{i}"} for i in range(8)]
    jsonl = write_lines(folder / "p.jsonl", *rows)
    table = folder / "p.csv"
    table.write_text("\ufeffimage,caption\n" + "".join(f'images/a.png,"caption\n{i}"\n' for i in range(8)))
    for source in (jsonl, table):
        parts = plan_sources([str(source)], IngestConfig())
        assert [part.first_row for part in parts] == [0, 3, 6]
        again = [Part.from_json(json.loads(json.dumps(vars(p) | {"columns": vars(p.columns)}))) for p in parts]
        assert again == parts
        assert [record.captions for record in read(source)] == [(f"caption\n{i}",) for i in range(8)]


def test_a_file_without_line_ends_does_not_fill_the_memory(folder, monkeypatch):
    manifest = write_lines(folder / "p.jsonl", {"image": "images/a.png", "caption": "c"}, "x" * 5000)
    monkeypatch.setattr(lines, "MAX_LINE_BYTES", 1000)
    assert [record.reason for record in read(manifest)] == [None] + ["malformed line"] * 5


def test_open_clip_tables_and_other_delimiters_work_as_they_are(folder):
    for name, mark in (("t.csv", "\t"), ("t.tsv", "\t"), ("s.csv", ";"), ("c.csv", ",")):
        (folder / name).write_text(mark.join(["filepath", "title"]) + "\n" + mark.join(["images/a.png", "A cell."]))
        (record,) = read(folder / name)
        assert (record.image, record.captions) == (PIXEL + b"a.png", ("A cell.",))


def test_csv_rows_with_other_cells_or_encodings_are_rejected(folder):
    good = b'images/a.png,"say ""hi"", you"\n'
    (folder / "p.csv").write_bytes(b"image,caption\n" + good + b"images/a.png\nimages/a.png,\xff\xfe\n" + good)
    records = read(folder / "p.csv")
    assert [record.reason for record in records] == [None, "malformed row", "malformed row", None]
    assert records[3].captions == ('say "hi", you',)


def test_parquet_with_bytes_structs_and_paths(folder):
    images = [PIXEL, None, b"x" * (2 << 20)]
    pq.write_table(pa.table({"image": images, "text": ["one", "two", "three"]}), folder / "bytes.parquet")
    structs = [{"bytes": PIXEL, "path": "/home/me/1.png"}, {"bytes": None, "path": "images/b.png"}, None]
    pq.write_table(pa.table({"image": structs, "caption": ["one", "two", "three"]}), folder / "structs.parquet")
    pq.write_table(pa.table({"file_name": ["images/a.png"], "text": ["one"]}), folder / "paths.parquet")

    found = read(folder / "bytes.parquet", limits={"max_file_mib": 1})
    assert [(r.image, r.reason) for r in found] == [(PIXEL, None), (b"", "no image"), (b"", "file too large")]
    assert found[0].source_key == "bytes.parquet/#0"
    found = read(folder / "structs.parquet")
    assert [(r.image, r.reason) for r in found] == [(PIXEL, None), (PIXEL + b"b.png", None), (b"", "no image")]
    assert [r.source_key for r in found[:2]] == ["structs.parquet/home/me/1.png", "structs.parquet/images/b.png"]
    assert read(folder / "paths.parquet")[0].image == PIXEL + b"a.png"


def test_parquet_is_read_by_row_groups_and_a_damaged_page_is_one_reject(folder, monkeypatch):
    monkeypatch.setattr("extractor.sources.parquet.ROWS_PER_PART", 100)
    noise = [bytes([i]) * 400 for i in range(250)]
    path = folder / "p.parquet"
    pq.write_table(pa.table({"image": noise, "caption": ["c"] * 250}), path, row_group_size=50, compression="snappy")
    parts = plan_sources([str(path)], IngestConfig())
    assert [(part.begin, part.end, part.first_row) for part in parts] == [(0, 2, 0), (2, 4, 100), (4, 5, 200)]
    assert [record.source_key for record in read(path)] == [f"p.parquet/#{i}" for i in range(250)]
    where = pq.read_metadata(path).row_group(2).column(0)
    data = bytearray(path.read_bytes())
    start = where.dictionary_page_offset or where.data_page_offset
    data[start : start + 40] = b"\xff" * 40
    path.write_bytes(data)
    records = read(path)
    assert [r.reason for r in records].count("damaged parquet") == 1
    assert sum(r.reason is None for r in records) == 150


def test_filters_count_and_do_not_read_the_image(folder):
    manifest = write_lines(
        folder / "p.jsonl",
        {"image": "images/a.png", "caption": "c", "license": "CC BY 4.0", "label": "Plot"},
        {"image": "images/absent.png", "caption": "c", "license": "CC BY-NC 4.0", "label": "plot"},
        {"image": "images/absent.png", "caption": "c", "license": None, "label": "CT"},
    )
    assert [r.filtered for r in read(manifest, keep_licenses=["cc by"])] == [False, True, True]
    assert [r.filtered for r in read(manifest, keep_labels=["PLOT"])] == [False, False, True]
    assert is_kept((), None, "CC BY", IngestConfig(keep_licenses=("CC BY",)))
    assert not is_kept((), None, "CC BYX", IngestConfig(keep_licenses=("CC BY",)))


def test_cells_are_cleaned():
    assert clean_text("  a\0b ") == "a?b"
    assert [clean_text(value) for value in (None, "", "  ", float("nan"))] == [None] * 4
    assert [clean_text(value) for value in (True, 3, 2.5, date(2024, 2, 1))] == ["true", "3", "2.5", "2024-02-01"]
    assert clean_captions(["a", 5, "a"]) == ("a", "5")
    assert clean_captions(None) == clean_captions(["", None]) == ()
    for odd in ({"en": "a"}, [["a"]], ["a", {"b": 1}]):
        with pytest.raises(RowFaultError, match="the caption holds a (dict|list)"):
            clean_captions(odd)
    assert clean_labels("mass| nodule|mass|", "|") == ("mass", "nodule")
    assert clean_labels(["a|b", 3]) == ("a|b", "3")


def test_addresses_are_joined_and_shown_without_secrets():
    assert image_address("s3://b/set/p.jsonl", "../other/1.png") == "s3://b/other/1.png"
    assert image_address("/data/p.jsonl", "i/1.png") == "/data/i/1.png"
    assert image_address("s3://b/p.jsonl", "https://host/1.png") == "https://host/1.png"
    assert image_address("/data/p.jsonl", "file:///my%20data/50%25.png") == "/my data/50%.png"
    assert image_address("s3://b/p.jsonl", "file://localhost/data/1.png") == "/data/1.png"
    assert without_secrets("https://me:secret@host/1.png?X-Amz-Signature=abc") == "https://host/1.png"
    assert without_secrets("/data/odd?name@x.png") == "/data/odd?name@x.png"


def test_every_kind_has_extensions_a_module_and_a_format():
    import importlib

    kinds = set(IngestConfig.model_fields["format"].annotation.__args__) - {"auto"}
    assert set(SOURCES) == set(EXTENSIONS) == kinds
    for name in SOURCES.values():
        module = importlib.import_module(name)
        assert callable(module.parts)
        assert callable(module.read)
