"""Rows of one pair: exact duplicates, further labels, contradictions; within a source, and across ingests."""

import io
import json

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from common.errors import SourceError
from common.lake import open_lake
from common.schemas import REJECTS
from extractor.config import IngestConfig
from extractor.duplicates import Index
from extractor.ingest import ingest
from extractor.staging import INDEX


def png(seed):
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (8, 8, 3), np.uint8)).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    for seed in range(6):
        (tmp_path / f"i{seed}.png").write_bytes(png(seed))
    return tmp_path


def table(folder, name, *rows):
    (folder / name).write_text("".join(json.dumps({"caption": "c", **row}) + "\n" for row in rows))
    return str(folder / name)


def run(folder, source, lake="lake", **settings):
    return ingest(source, str(folder / lake), IngestConfig(shard_rows=2, **settings))


def account(report):
    return report.pairs, report.rejects, report.duplicates, report.merged


def pairs_of(folder, lake="lake"):
    opened = open_lake(str(folder / lake))
    return [row for shard in opened.shards() for row in opened.read_pairs(shard).to_pylist()]


def rejects_of(folder, lake="lake"):
    storage = open_lake(str(folder / lake)).storage
    names = storage.list_files("rejects/ingest")
    tables = [storage.read_table(f"rejects/ingest/{name}") for name in names]
    return pa.concat_tables(tables).to_pylist() if tables else REJECTS.empty_table().to_pylist()


def test_reported_one_row_for_each_label_makes_one_pair_with_all(shared_data, folder):
    report = run(folder, str(shared_data / "reports" / "case-07" / "multilabel.jsonl"))
    assert (report.input, *account(report)) == (6, 3, 0, 0, 3)
    assert [row["labels"] for row in pairs_of(folder)] == [["effusion", "nodule"]] * 3


def test_reported_rows_that_say_more_than_the_lake_are_contradictions(shared_data, folder):
    case = shared_data / "reports" / "case-07"
    assert account(run(folder, str(case / "nolabel.jsonl"))) == (6, 0, 0, 0)
    before = pairs_of(folder)
    report = run(folder, str(case / "withlabel.jsonl"))
    assert (report.input, *account(report)) == (6, 0, 6, 0, 0)
    assert report.reasons == {"contradicts another row: split, modality, labels": 6}
    assert pairs_of(folder) == before
    assert [(row["row"], row["sample_id"]) for row in rejects_of(folder)] == [
        (place, pair["sample_id"]) for place, pair in enumerate(before, 1)
    ]
    assert "split is 'test', not None; modality is 'radiograph', not None" in rejects_of(folder)[0]["detail"]


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("split", ("train", "test")),
        ("license", ("CC0", "CC BY")),
        ("modality", ("ct", None)),
        ("dataset", ("one", "two")),
        ("patient", ("p1", "p2")),
        ("accession", ("a", "b")),
        ("age", (40, 41)),
    ],
)
def test_each_kept_column_counts(folder, column, values):
    rows = [{"image": "i0.png", "patient": "p", "accession": "a", "age": 1, column: value} for value in values]
    named = {"group": "patient", **({"id": "accession"} if column == "accession" else {})}
    settings = {"columns": named, "keep_columns": ("age:int64",)}
    report = run(folder, table(folder, "p.jsonl", *rows, rows[0]), **settings)
    assert account(report) == (1, 1, 1, 0), "the third is an exact duplicate of the first"
    name = {"patient": "group_id", "accession": "source_id"}.get(column, column)
    assert report.reasons == {f"contradicts another row: {name}": 1}
    assert [row["source_id"] for row in rejects_of(folder)] == ["b" if column == "accession" else None]

    kept = run(folder, table(folder, "q.jsonl", *rows, rows[0]), "other", contradictions="keep", **settings)
    assert account(kept) == (2, 0, 1, 0)
    assert len({row["sample_id"] for row in pairs_of(folder, "other")}) == 2, "also where the source key is the same"


def test_labels_are_merged_in_order_and_once(folder):
    rows = [{"image": "i0.png", "label": label} for label in ("b", ["a", "b"], None, ["b", "a"], "c", "c")]
    others = [{"image": "i1.png", "label": "x"}, {"image": "i1.png", "label": "y", "split": "test"}]
    report = run(folder, table(folder, "p.jsonl", *rows, *others))
    assert (report.input, *account(report)) == (8, 2, 1, 3, 2)
    assert [row["labels"] for row in pairs_of(folder)] == [["b", "a", "c"], ["x"]]
    assert report.reasons == {"contradicts another row: split, labels": 1}


def test_a_merged_source_is_known_again_and_its_shards_stay(folder):
    rows = [{"image": f"i{i}.png", "label": label} for i in range(3) for label in ("b", "a")]
    source = table(folder, "p.jsonl", *rows)
    assert account(run(folder, source)) == (3, 0, 0, 3)
    before = {p: p.read_bytes() for p in (folder / "lake" / "pairs").iterdir()}
    again = run(folder, table(folder, "q.jsonl", *rows, {"image": "i0.png", "label": "new"}, {"image": "i4.png"}))
    assert account(again) == (1, 1, 6, 0)
    assert again.reasons == {"contradicts another row: labels": 1}
    assert [row["labels"] for row in pairs_of(folder)] == [["b", "a"]] * 3 + [[]]
    assert before.items() <= {p: p.read_bytes() for p in (folder / "lake" / "pairs").iterdir()}.items()


def test_without_captions_a_picture_is_a_pair_of_its_own(folder):
    rows = [{"image": "i0.png", "caption": None, "label": label} for label in ("a", "b")]
    report = run(folder, table(folder, "p.jsonl", *rows, {"image": "i0.png", "caption": "words", "label": "a"}))
    assert account(report) == (2, 0, 0, 1)
    assert report.without_captions == 1
    assert [(row["captions"], row["labels"]) for row in pairs_of(folder)] == [([], ["a", "b"]), (["words"], ["a"])]


def test_an_id_that_names_two_rows_is_an_error_that_names_them(folder):
    rows = [{"image": f"i{i}.png", "uid": uid} for i, uid in enumerate(("a", "b", "c", "b"))]
    config = {"columns": {"id": "uid"}}
    with pytest.raises(SourceError, match=r"id 'b' names two rows: p\.jsonl/i1\.png \(row 2 of .*i3\.png \(row 4"):
        run(folder, table(folder, "p.jsonl", *rows), **config)
    assert not list((folder / "lake").glob("ingest/*")), "a mended source is another: nobody goes on with this one"
    assert run(folder, table(folder, "p.jsonl", *rows[:3]), **config).pairs == 3
    assert [row["source_id"] for row in pairs_of(folder)] == ["a", "b", "c"]
    with pytest.raises(SourceError, match=r"id 'c' names two rows: p\.jsonl/i2\.png \(in the lake already\)"):
        run(folder, table(folder, "q.jsonl", *rows[:3], {"image": "i5.png", "uid": "c"}), **config)
    report = run(folder, table(folder, "r.jsonl", *rows[:3], {"image": "i5.png", "uid": "d"}), **config)
    assert account(report) == (1, 0, 3, 0), "a table that has grown"


def test_a_group_never_straddles_splits_that_we_make(folder):
    rows = [{"image": "i0.png", "caption": f"{i}", "patient": f"p{i % 40}"} for i in range(400)]
    settings = {"columns": {"group": "patient"}, "val_fraction": 0.2, "test_fraction": 0.3}
    run(folder, table(folder, "p.jsonl", *rows[:200]), **settings)
    run(folder, table(folder, "q.jsonl", *rows[200:]), **{**settings, "test_fraction": 0.0})
    found = {}
    for row in pairs_of(folder):
        found.setdefault(row["group_id"], set()).add(row["split"])
    assert len(found) == 40
    assert all(len(splits) == 1 for splits in found.values())
    assert {split for splits in found.values() for split in splits} == {"train", "val", "test"}


def test_rows_without_a_split_follow_what_a_source_says_of_their_group(folder):
    said = [
        {"image": "i0.png", "caption": f"said {g}", "patient": g, "split": s} for g, s in (("a", "test"), ("b", "val"))
    ]
    silent = [{"image": "i1.png", "caption": f"{g} {i}", "patient": g} for g in "ab" for i in range(20)]
    straddling = [{"image": "i2.png", "caption": "x", "patient": "a", "split": "train"}]
    source = table(folder, "p.jsonl", *silent, *said, *straddling)
    report = run(folder, source, columns={"group": "patient"}, val_fraction=0, test_fraction=0)
    assert report.straddling == 1
    pairs = [row for row in pairs_of(folder) if row["captions"] != ["x"]]
    assert {(row["group_id"], row["split"]) for row in pairs} == {("a", "test"), ("b", "val")}


def test_an_index_comes_back_as_it_was_and_may_be_empty():
    rows = [(bytes([n] * 15 + [0]), bytes(16), n, 2**64 - 1, ("val", None)[n % 2]) for n in range(3)]
    table = pa.Table.from_pylist([dict(zip(INDEX.names, row, strict=True)) for row in rows], schema=INDEX)
    assert Index.of([table.slice(0, 1), table.slice(1)]).table().combine_chunks() == table
    assert Index.of([]).table() == INDEX.empty_table()
