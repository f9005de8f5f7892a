import hashlib
import json
import logging
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from embedded import embed, features_of, identity_of, vector_column, with_a_flipped_bit

from common.config import fingerprint
from common.errors import LakeError
from common.lake import Lake, open_lake, shard_name
from common.schemas import PAIRS, SCHEMA_VERSION
from common.version import VERSION
from extractor.sink import find_valid, record_valid, survey_pairs, write_features
from extractor.tending.ledger import PAIRS_LEDGER

IDENTITY = identity_of("t")


@pytest.fixture(params=["local", "s3"])
def anywhere(request, make_lake, tmp_path) -> Lake:
    """A lake of three shards with one teacher, on a disk and on S3."""
    uri = tmp_path / "lake" if request.param == "local" else request.getfixturevalue("s3") + "/lake"
    lake = make_lake(uri, rows=20, shard_rows=8)
    embed(lake, "t")
    return lake


@pytest.fixture
def lake(make_lake, tmp_path) -> Lake:
    """The same on a disk only."""
    lake = make_lake(tmp_path / "lake", rows=20, shard_rows=8)
    embed(lake, "t")
    return lake


def feature_file(lake: Lake, index: int) -> Path:
    return Path(lake.uri) / lake.features_folder("t") / shard_name(index)


def overwrite(path: Path, data: bytes) -> None:
    """Change a file in place so that no listing shows it: the time of change stays."""
    before = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def rewrite(path: Path, table: pa.Table, keep: bool = True) -> None:
    """Write a file anew by hand, with the old footer's keys or without them."""
    metadata = pq.read_schema(path).metadata if keep else None
    pq.write_table(table.replace_schema_metadata(metadata), path)


def replace_pairs(lake: Lake, index: int, change) -> None:
    rows = lake.read_pairs(index).to_pylist()
    lake.storage.write_table(f"pairs/{shard_name(index)}", pa.Table.from_pylist(change(rows), schema=PAIRS))


# --- writing


def test_the_footer_says_who_made_the_file_and_what_it_holds(lake):
    said = {key.decode(): value.decode() for key, value in pq.read_schema(feature_file(lake, 0)).metadata.items()}
    ids = lake.read_pairs(0)["sample_id"].to_pylist()
    assert said["mmkd.fingerprint"] == fingerprint(IDENTITY)
    assert said["mmkd.schema_version"] == str(SCHEMA_VERSION)
    assert said["mmkd.samples"] == hashlib.sha256("\n".join(ids).encode()).hexdigest()
    assert re.fullmatch("[0-9a-f]{64}", said["mmkd.content"])


def test_the_footer_says_whose_the_embeddings_are_and_what_is_allowed(lake):
    said = {key.decode(): value.decode() for key, value in pq.read_metadata(feature_file(lake, 0)).metadata.items()}
    assert (
        said.items()
        >= {
            "mmkd.teacher": "t",
            "mmkd.image_dim": "16",
            "mmkd.text_dim": "16",
            "mmkd.weights_sha256": "weights of t",
            "mmkd.license": "MIT",
            "mmkd.derivatives": "allowed",
            "mmkd.version": VERSION,
            "mmkd.created_at": lake.read_teacher("t")["created_at"],
        }.items()
    )
    assert "mmkd.derivative_terms" not in said, "nobody stated them"


def test_a_file_that_is_written_again_is_the_same_byte_for_byte(lake):
    before = feature_file(lake, 1).read_bytes()
    feature_file(lake, 1).unlink()
    embed(lake, "t", shards=[1])
    assert feature_file(lake, 1).read_bytes() == before


def test_rejects_are_written_first_and_an_earlier_attempts_are_removed(lake):
    rejects = "rejects/extract/t/shard-000000.parquet"
    assert lake.storage.read_table(rejects).num_rows == 1
    size = write_features(lake, "t", 0, features_of(lake, "t", 0), [], lake.read_teacher("t"))
    assert size == feature_file(lake, 0).stat().st_size
    assert not lake.storage.exists(rejects)


# --- what is there and valid


def test_whole_files_count_and_missing_ones_do_not(anywhere):
    assert find_valid(anywhere, "t", IDENTITY) == {0, 1, 2}
    anywhere.storage.remove("features/teacher=t/shard-000001.parquet")
    assert find_valid(anywhere, "t", IDENTITY) == {0, 2}
    assert find_valid(anywhere, "nobody", IDENTITY) == set()


def test_a_damaged_file_is_found_again_on_any_storage(anywhere, caplog):
    assert find_valid(anywhere, "t", IDENTITY) == {0, 1, 2}
    name = "features/teacher=t/shard-000001.parquet"
    anywhere.storage.write_bytes(name, anywhere.storage.read_bytes(name)[:-40])
    assert find_valid(anywhere, "t", IDENTITY) == {0, 2}
    assert re.search(r"shard-000001.parquet will be computed again: it does not open as Parquet", caplog.text)
    embed(anywhere, "t", shards=[1])
    assert find_valid(anywhere, "t", IDENTITY) == {0, 1, 2}


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    path.write_bytes(with_a_flipped_bit(path))


def empty(path: Path) -> None:
    path.write_bytes(b"")


def other_producer(path: Path) -> None:
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({**table.schema.metadata, b"mmkd.fingerprint": b"0" * 16}), path)


def no_footer_keys(path: Path) -> None:
    rewrite(path, pq.read_table(path), keep=False)


def other_width(path: Path) -> None:
    table = pq.read_table(path)
    wide = vector_column(np.random.default_rng(0), table.num_rows, 24)
    rewrite(path, table.set_column(1, "image_embedding", wide))


def nan_by_hand(path: Path) -> None:
    table = pq.read_table(path)
    bad = [None if row is None else [float("nan"), *row[1:]] for row in table["image_embedding"].to_pylist()]
    column = pa.array(bad, table.schema.field("image_embedding").type)
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"mmkd.content"}
    table = table.set_column(1, table.schema.field(1), column)
    pq.write_table(table.replace_schema_metadata(metadata), path)


def fewer_rows(path: Path) -> None:
    table = pq.read_table(path).slice(0, 5)
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"mmkd.content"}
    pq.write_table(table.replace_schema_metadata(metadata), path)


BREAKAGES = [
    (truncate, "does not open as Parquet"),
    (flip, "does not read|checksum in the footer differs"),
    (empty, "does not open as Parquet"),
    (other_producer, "made by another producer"),
    (no_footer_keys, "made by another producer .fingerprint None"),
    (other_width, "column image_embedding is .*24.*; this teacher's is .*16"),
    (nan_by_hand, "7 of 7 vectors of image_embedding are not finite"),
    (fewer_rows, "it has 5 rows and its pairs have 8"),
]


@pytest.mark.parametrize(("damage", "sentence"), BREAKAGES, ids=lambda value: getattr(value, "__name__", ""))
def test_only_the_broken_file_is_computed_again(lake, caplog, damage, sentence):
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}
    damage(feature_file(lake, 1))
    assert find_valid(lake, "t", IDENTITY) == {0, 2}
    (line,) = [record.getMessage() for record in caplog.records if "computed again" in record.getMessage()]
    assert re.search(rf"shard-000001\.parquet will be computed again: .*({sentence})", line), line


def test_a_file_from_before_hashes_were_kept_is_valid(lake):
    table = pq.read_table(feature_file(lake, 1))
    old = {key: table.schema.metadata[key] for key in (b"mmkd.fingerprint", b"mmkd.schema_version")}
    pq.write_table(table.replace_schema_metadata(old), feature_file(lake, 1))
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}


def test_swapped_files_stop_the_run(lake):
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}
    first, second, between = feature_file(lake, 0), feature_file(lake, 1), feature_file(lake, 0).with_suffix(".x")
    first.rename(between)
    second.rename(first)
    between.rename(second)
    with pytest.raises(LakeError, match=r"shard-000000.parquet is whole, but it holds other samples .*--repair"):
        find_valid(lake, "t", IDENTITY)


@pytest.mark.parametrize(
    "change",
    [
        lambda rows: [{**row, "sample_id": f"{number:032x}"} for number, row in enumerate(rows)],
        lambda rows: [rows[1], rows[0], *rows[2:]],
        lambda rows: rows[:-1],
    ],
    ids=["other ids", "another order", "fewer"],
)
def test_pairs_replaced_beneath_the_embeddings_stop_the_run(lake, change):
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}
    replace_pairs(lake, 1, change)
    with pytest.raises(LakeError, match=r"shard-000001.parquet is whole, but it holds other samples than its pairs"):
        find_valid(lake, "t", IDENTITY)


def test_pairs_written_again_with_the_same_samples_are_no_reason_to_stop(lake):
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}
    replace_pairs(lake, 1, lambda rows: [{**row, "license": "CC-BY-4.0"} for row in rows])
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}


def test_embeddings_without_pairs_stop_the_run(lake):
    lake.storage.remove("pairs/shard-000002.parquet")
    with pytest.raises(LakeError, match=r"has shards \[2\] that the pairs do not have"):
        find_valid(lake, "t", IDENTITY)


def test_unreadable_pairs_are_named(lake):
    lake.storage.write_bytes("pairs/shard-000001.parquet", b"torn")
    with pytest.raises(LakeError, match=r"pairs/shard-000001.parquet cannot be read: .*Restore the file from a copy"):
        survey_pairs(lake)


def test_writes_under_way_are_not_there(lake):
    feature_file(lake, 2).rename(feature_file(lake, 2).with_name(".tmp-0123"))
    assert find_valid(lake, "t", IDENTITY) == {0, 1}


# --- the ledger


def test_a_second_look_reads_no_file_that_a_listing_shows_unchanged(lake):
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}
    size = feature_file(lake, 1).stat().st_size
    overwrite(feature_file(lake, 1), b"x" * size)  # only a reader could tell
    overwrite(
        Path(lake.uri) / "pairs" / shard_name(2), b"x" * (Path(lake.uri) / "pairs" / shard_name(2)).stat().st_size
    )
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}
    assert survey_pairs(lake).rows == {0: 8, 1: 8, 2: 4}
    os.utime(feature_file(lake, 1))
    assert find_valid(lake, "t", IDENTITY) == {0, 2}


@pytest.mark.parametrize(
    "ledger",
    [b'{"fingerprint": "', b"[]", b'{"fingerprint": 3}', b'{"fingerprint": "x", "shards": {"0": ["a"]}}', b"\xff"],
)
def test_a_torn_ledger_is_ignored_and_written_anew(lake, ledger):
    find_valid(lake, "t", IDENTITY)
    name = "manifests/valid/teachers/t.json"
    whole = lake.storage.read_bytes(name)
    lake.storage.write_bytes(name, ledger)
    lake.storage.write_bytes(PAIRS_LEDGER, ledger)
    flip(feature_file(lake, 1))
    assert find_valid(lake, "t", IDENTITY) == {0, 2}
    assert set(json.loads(lake.storage.read_bytes(name))["shards"]) == {"0", "2"}
    assert set(json.loads(whole)["shards"]) == {"0", "1", "2"}


def test_the_ledger_of_a_copied_lake_is_not_believed(lake, tmp_path):
    find_valid(lake, "t", IDENTITY)
    copy = tmp_path / "copy"
    shutil.copytree(lake.uri, copy, copy_function=shutil.copyfile)  # as cp does it: the times are of the copy
    damaged = open_lake(str(copy))
    feature_file(damaged, 1).write_bytes(with_a_flipped_bit(feature_file(damaged, 1)))
    os.utime(feature_file(damaged, 1), (1e9, 1e9))
    assert find_valid(damaged, "t", IDENTITY) == {0, 2}


def test_the_ledger_of_another_producer_is_not_believed(lake):
    find_valid(lake, "t", IDENTITY)
    other = {**IDENTITY, "weights_sha256": "other weights"}
    assert find_valid(lake, "t", other) == set()


def test_a_runs_own_files_are_recorded_where_listing_and_size_agree(lake):
    pairs = survey_pairs(lake)
    written = embed(lake, "t", shards=[0, 1])
    record_valid(lake, "t", IDENTITY, {0: written[0], 1: written[1] + 1, 7: 5}, pairs)
    recorded = json.loads(lake.storage.read_bytes("manifests/valid/teachers/t.json"))["shards"]
    assert set(recorded) == {"0"}
    overwrite(feature_file(lake, 0), b"x" * feature_file(lake, 0).stat().st_size)
    assert find_valid(lake, "t", IDENTITY, pairs) == {0, 1, 2}
    record_valid(lake, "t", IDENTITY, {}, pairs)
    assert set(json.loads(lake.storage.read_bytes("manifests/valid/teachers/t.json"))["shards"]) == {"0", "1", "2"}


def test_what_may_only_be_read_can_still_be_resumed(lake):
    folder = feature_file(lake, 0).parent
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder.chmod(0o500)
    try:
        assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}
    finally:
        folder.chmod(0o700)


def test_a_resume_with_nothing_to_do_is_a_listing_and_a_ledger(make_lake, s3, caplog):
    lake = make_lake(f"{s3}/lake", rows=20, shard_rows=8)
    embed(lake, "t")
    find_valid(lake, "t", IDENTITY)
    with caplog.at_level(logging.INFO, "werkzeug"):
        pairs = survey_pairs(lake)
        caplog.clear()
        assert find_valid(lake, "t", IDENTITY, pairs) == {0, 1, 2}
    lines = [re.sub(r"\x1b\[\d*m", "", record.getMessage()) for record in caplog.records]
    asked = [re.search(r'"(\w+) (\S+)', line).groups() for line in lines]
    assert [method for method, path in asked if "list-type=2" in path] == ["GET"]
    assert {path.rsplit("/", 1)[-1] for _, path in asked if "list-type" not in path} == {"t.json"}
    assert len(asked) <= 3
