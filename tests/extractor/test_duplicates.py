"""Rows of one pair: exact duplicates, further labels, contradictions; within a source, and across ingests."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
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
    assert [(row["row"], row["sample_id"]) for row in rejects_of(folder)] == [(place, None) for place in range(1, 7)]
    detail = rejects_of(folder)[0]["detail"]
    assert f"(sample {before[0]['sample_id']})" in detail
    assert "split is 'test', not None; modality is 'radiograph', not None" in detail


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


def test_cells_that_are_no_number_are_equal_and_numbers_name_groups_whatever_their_type(folder):
    (folder / "p.csv").write_text("image,caption,label,age\n" + "".join(f"i1.png,c,{x},nan\n" for x in "ab"))
    settings = {"keep_columns": ("age:float64",)}
    assert account(run(folder, str(folder / "p.csv"), "csv", **settings)) == (1, 0, 0, 1)
    frames = [pa.table({"image": ["i0.png"], "caption": [c], "patient": pa.array([7], t)}) for c, t in TYPES]
    for number, frame in enumerate(frames):
        pq.write_table(frame, folder / f"{number}.parquet")
        run(folder, str(folder / f"{number}.parquet"), "numbers", columns={"group": "patient", "id": None})
    assert {row["group_id"] for row in pairs_of(folder, "numbers")} == {"7"}


TYPES = [("a", pa.int64()), ("b", pa.float64()), ("c", pa.decimal128(5, 1))]


def test_a_resumed_commit_does_not_keep_shards_of_other_rows(folder, monkeypatch):
    """A part that an outage fell on is read anew, and all but the last shard have as many rows as before."""
    import extractor.commit as commits

    monkeypatch.setattr("extractor.ingest.FEW_UNREACHABLE", 1000)
    monkeypatch.setattr("extractor.staging.FILE_ROWS", 3)
    (folder / "s").mkdir()
    table(folder, "s/a.jsonl", *({"image": f"{folder}/later{i}.png"} for i in range(4)))
    table(folder, "s/b.jsonl", *({"image": f"{folder}/i{i}.png", "caption": f"{i}"} for i in range(6)))
    # As if those of the first table had not been reachable: they are read anew when the ingest goes on.
    monkeypatch.setattr(
        "extractor.ingest.is_cut_off", lambda staged, config: staged[0].rejected > 0 and len(staged) == 1
    )
    write = commits.write_shard
    written = []

    def killed(item, *rest):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(item["shard"])
        return write(item, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(commits, "write_shard", killed)
        with pytest.raises(KeyboardInterrupt):
            run(folder, str(folder / "s"))
    assert written == [0, 1]
    for i in range(4):
        (folder / f"later{i}.png").write_bytes(png(100 + i))
    report = run(folder, str(folder / "s"))
    assert (report.input, *account(report)) == (10, 10, 0, 0, 0)
    shas = [row["sha256"] for row in pairs_of(folder)]
    assert len(shas) == len(set(shas)) == 10


def test_an_ingest_that_cannot_be_finished_leaves_nothing_of_itself(folder, monkeypatch):
    """Its shards would count as the lake's as soon as no staged files said that they do not."""
    import extractor.commit as commits

    rows = [{"image": f"i{i}.png", "uid": f"{i % 5}"} for i in range(6)]
    source = table(folder, "p.jsonl", *rows, {"image": "absent.png", "uid": "x"})
    with monkeypatch.context() as patch:  # as of a program that killed it before it looked at ids
        patch.setattr(commits, "_refuse_twins", lambda *_: None)
        patch.setattr(commits, "index_name", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, source, columns={"id": "uid"})
    lake = open_lake(str(folder / "lake"), need_pairs=False)
    assert lake.files("pairs")
    assert lake.storage.list_files("rejects/ingest")
    with pytest.raises(SourceError, match="names two rows"):
        run(folder, source, columns={"id": "uid"})
    assert lake.files("pairs") == lake.shards() == []
    assert lake.storage.list_files("rejects/ingest") == []
    assert not list((folder / "lake").glob("ingest/*"))


def test_rejects_of_an_ingest_that_never_finished_leave_with_its_shards(folder, monkeypatch):
    import extractor.commit as commits

    source = table(folder, "p.jsonl", {"image": "i0.png"}, {"image": "absent.png"})
    with monkeypatch.context() as patch:
        patch.setattr(commits, "index_name", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(folder, source)
    assert len(rejects_of_any(folder)) == 1
    assert run(folder, source, val_fraction=0.5).pairs == 1
    assert len(rejects_of_any(folder)) == 1, "of the one that finished"


def rejects_of_any(folder):
    storage = open_lake(str(folder / "lake"), need_pairs=False).storage
    return [
        row
        for name in storage.list_files("rejects/ingest")
        for row in storage.read_table(f"rejects/ingest/{name}").to_pylist()
    ]
