import json
import logging
import os
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from embedded import embed, features_of, identity_of, with_a_flipped_bit

from common.errors import LakeError, LeaseError
from common.lake import Lake, shard_name
from common.lease import hold
from common.listing import FileMark
from common.shard_files import pack_name, shards_in
from extractor.sink import find_valid, write_features
from extractor.tending.compact import compact
from extractor.tending.packing import overlapping, plan_packs

IDENTITY = identity_of("t")
FOLDER = "features/teacher=t"
SHARDS = list(range(5))
WHOLE = pack_name(0, 4)


@pytest.fixture
def lake(make_lake, tmp_path) -> Lake:
    """A lake of five shards, the last of them shorter, with one teacher."""
    lake = make_lake(tmp_path / "lake", rows=36, shard_rows=8)
    embed(lake, "t")
    return lake


def folder_of(lake: Lake) -> Path:
    return Path(lake.uri) / FOLDER


def test_a_pack_says_whose_it_is_like_the_files_it_replaces(lake):
    def said(name: str) -> dict[bytes, bytes]:
        metadata = pq.read_metadata(folder_of(lake) / name).metadata
        return {key: value for key, value in metadata.items() if key not in (b"ARROW:schema", b"mmkd.pack")}

    single = said(shard_name(0))
    compact(lake.uri)
    assert single[b"mmkd.teacher"] == b"t"
    assert said(WHOLE) == {k: v for k, v in single.items() if k not in (b"mmkd.samples", b"mmkd.content")}


def tables_of(lake: Lake) -> list:
    return [lake.read_features("t", index) for index in lake.shards(FOLDER)]


def names_of(lake: Lake) -> list[str]:
    return [name for name in lake.storage.list_files(FOLDER) if shards_in(name)]


# --- which files go together


def marks(**sizes: int) -> dict[str, FileMark]:
    """``s3=5`` is shard 3 with 5 bytes, ``p0_9=5`` a pack of shards 0 to 9."""
    found = {}
    for key, size in sizes.items():
        first, _, last = key[1:].partition("_")
        found[pack_name(int(first), int(last)) if last else shard_name(int(first))] = FileMark(size, "1")
    return found


def test_consecutive_files_go_together_up_to_the_target():
    plan = plan_packs(marks(s0=4, s1=4, s2=4, s4=4, s5=4, s7=4), 8)
    assert plan == [[shard_name(0), shard_name(1)], [shard_name(4), shard_name(5)]]
    assert plan_packs(marks(s0=9, s1=9), 8) == []
    assert plan_packs({}, 8) == []


def test_a_small_pack_grows_with_the_files_after_it_and_a_full_one_is_left_alone():
    assert plan_packs(marks(p0_3=3, s4=2, s5=2), 8) == [[pack_name(0, 3), shard_name(4), shard_name(5)]]
    assert plan_packs(marks(p0_3=4, s4=2, s5=2), 8) == [[shard_name(4), shard_name(5)]]
    assert plan_packs(marks(p0_3=1, p4_7=1), 8) == []


def test_files_that_share_shards_are_found_the_widest_pack_first():
    found = overlapping(marks(p0_9=1, p0_3=1, s2=1, s9=1, s11=1, p20_21=1))
    assert found == {
        pack_name(0, 9): [shard_name(2), shard_name(9), pack_name(0, 3)],
        pack_name(0, 3): [shard_name(2)],
    }


# --- compaction


@pytest.mark.parametrize("where", ["local", "s3"])
def test_every_shard_reads_the_same_before_and_after(request, make_lake, tmp_path, where):
    lake = make_lake(tmp_path if where == "local" else request.getfixturevalue("s3") + "/lake", rows=20, shard_rows=8)
    embed(lake, "t")
    before = tables_of(lake)
    report = compact(lake.uri)
    assert (report.packs, report.replaced) == (1, 3)
    assert names_of(lake) == [pack_name(0, 2)]
    assert lake.shards(FOLDER) == [0, 1, 2]
    assert all(new.equals(old) for new, old in zip(tables_of(lake), before, strict=True))
    columns = ["sample_id", "text_embedding"]
    assert lake.read_features("t", 1, columns).equals(before[1].select(columns))
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 2}
    with pytest.raises(FileNotFoundError):
        lake.read_features("t", 3)


def test_a_pack_keeps_what_the_single_files_said(lake):
    said = [pq.read_schema(folder_of(lake) / shard_name(index)).metadata for index in SHARDS]
    single = pq.read_metadata(folder_of(lake) / shard_name(0)).row_group(0)
    compact(lake.uri)
    footer = pq.read_metadata(folder_of(lake) / WHOLE)
    facts = json.loads(footer.metadata[b"mmkd.pack"])
    assert [fact["shard"] for fact in facts] == SHARDS
    assert [fact["rows"] for fact in facts] == [8, 8, 8, 8, 4]
    assert [fact["content"].encode() for fact in facts] == [keys[b"mmkd.content"] for keys in said]
    assert [fact["samples"].encode() for fact in facts] == [keys[b"mmkd.samples"] for keys in said]
    assert footer.metadata[b"mmkd.fingerprint"] == said[0][b"mmkd.fingerprint"]
    assert [footer.row_group(group).num_rows for group in range(5)] == [8, 8, 8, 8, 4]
    for number in range(footer.num_columns):
        packed = footer.row_group(0).column(number)
        assert packed.encodings == single.column(number).encodings
        assert packed.compression == single.column(number).compression
        assert packed.has_offset_index


def test_duckdb_polars_and_arrow_read_packs_by_the_plain_glob(lake):
    import duckdb
    import polars as pl

    before = duckdb.sql(f"SELECT * FROM '{folder_of(lake)}/*.parquet' ORDER BY sample_id").to_arrow_table()
    compact(lake.uri)
    after = duckdb.sql(f"SELECT * FROM '{folder_of(lake)}/*.parquet' ORDER BY sample_id").to_arrow_table()
    assert after.equals(before)
    polars = pl.read_parquet(f"{folder_of(lake)}/*.parquet", hive_partitioning=False)
    assert polars["sample_id"].sort().to_list() == before["sample_id"].to_pylist()
    assert polars["image_embedding"].dtype == pl.Array(pl.Float32, 16)


def test_a_second_compaction_does_nothing_and_says_so(lake, caplog):
    compact(lake.uri)
    before = (folder_of(lake) / WHOLE).stat()
    with caplog.at_level(logging.INFO, "mmkd"):
        report = compact(lake.uri)
    assert (report.packs, report.replaced) == (0, 0)
    assert "compact: nothing to do; no two neighbouring files of t fit into one pack" in caplog.text
    assert (folder_of(lake) / WHOLE).stat() == before


def test_the_target_bounds_a_pack(lake):
    size = (folder_of(lake) / shard_name(0)).stat().st_size
    compact(lake.uri, target_bytes=size * 5 // 2)
    assert names_of(lake) == [shard_name(4), pack_name(0, 1), pack_name(2, 3)]


def test_a_lake_that_grows_is_extracted_and_packed_further(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=16, shard_rows=8)
    embed(lake, "t")
    compact(lake.uri)
    make_lake(lake.uri, rows=36, shard_rows=8)
    assert find_valid(lake, "t", IDENTITY) == {0, 1}
    embed(lake, "t", shards=[2, 3, 4])
    assert find_valid(lake, "t", IDENTITY) == set(SHARDS)
    before = tables_of(lake)
    report = compact(lake.uri)
    assert (report.packs, report.replaced) == (1, 4)
    assert names_of(lake) == [WHOLE]
    assert all(new.equals(old) for new, old in zip(tables_of(lake), before, strict=True))


def test_only_the_named_teachers_are_packed(lake):
    embed(lake, "other", dim=8)
    compact(lake.uri, ["other"])
    assert len(names_of(lake)) == 5
    assert lake.storage.list_files("features/teacher=other", ".parquet") == [WHOLE]
    with pytest.raises(LakeError, match="no embeddings of teacher 'nobody'"):
        compact(lake.uri, ["nobody"])


def test_gaps_stay_gaps(lake):
    lake.storage.remove(f"{FOLDER}/{shard_name(2)}")
    compact(lake.uri)
    assert names_of(lake) == [pack_name(0, 1), pack_name(3, 4)]
    assert find_valid(lake, "t", IDENTITY) == {0, 1, 3, 4}


def test_a_damaged_file_stops_it_before_anything_is_removed(lake):
    (folder_of(lake) / shard_name(3)).write_bytes(with_a_flipped_bit(folder_of(lake) / shard_name(3)))
    with pytest.raises(LakeError, match=r"shard-000003.parquet is .*mmkd verify"):
        compact(lake.uri)
    assert names_of(lake) == [shard_name(index) for index in SHARDS]


def test_a_teacher_that_is_being_extracted_is_left_alone(lake):
    with (
        hold(lake.storage, "teacher=t", "extract-now", seconds=2),
        pytest.raises(LeaseError, match="being written by run 'extract-now'"),
    ):
        compact(lake.uri, lease_seconds=2)
    assert len(names_of(lake)) == 5


def test_after_compaction_nothing_is_read_again(lake):
    find_valid(lake, "t", IDENTITY)
    compact(lake.uri)
    pack = folder_of(lake) / WHOLE
    before = pack.stat()
    pack.write_bytes(b"x" * before.st_size)
    os.utime(pack, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_valid(lake, "t", IDENTITY) == set(SHARDS)


# --- killed in between


@pytest.mark.parametrize("left", [SHARDS, [3, 4], [0]])
def test_files_a_killed_compaction_left_beside_its_pack_are_removed_by_the_next(lake, tmp_path, left):
    before = tables_of(lake)
    shutil.copytree(folder_of(lake), tmp_path / "before")
    compact(lake.uri)
    for index in left:
        shutil.copyfile(tmp_path / "before" / shard_name(index), folder_of(lake) / shard_name(index))
    assert lake.shards(FOLDER) == SHARDS
    assert find_valid(lake, "t", IDENTITY) == set(SHARDS)
    compact(lake.uri)
    assert names_of(lake) == [WHOLE]
    assert all(new.equals(old) for new, old in zip(tables_of(lake), before, strict=True))
    assert find_valid(lake, "t", IDENTITY) == set(SHARDS)


def test_an_old_pack_beside_the_wider_one_that_took_it_in_is_removed(lake, tmp_path):
    for index in (2, 3, 4):
        (folder_of(lake) / shard_name(index)).rename(tmp_path / shard_name(index))
    compact(lake.uri)
    shutil.copyfile(folder_of(lake) / pack_name(0, 1), tmp_path / "old")
    for index in (2, 3, 4):
        (tmp_path / shard_name(index)).rename(folder_of(lake) / shard_name(index))
    compact(lake.uri)
    shutil.copyfile(tmp_path / "old", folder_of(lake) / pack_name(0, 1))
    compact(lake.uri)
    assert names_of(lake) == [WHOLE]


def test_a_damaged_file_beside_a_good_pack_is_removed(lake):
    compact(lake.uri)
    (folder_of(lake) / shard_name(3)).write_bytes(b"torn")
    compact(lake.uri)
    assert names_of(lake) == [WHOLE]


def test_a_file_with_other_values_counts_more_than_the_pack(lake):
    before = tables_of(lake)
    compact(lake.uri)
    newer = features_of(lake, "t", 3)
    newer = newer.set_column(
        4, newer.schema.field(4), newer["text_norm"].combine_chunks().take([1, 0, 2, 3, 4, 5, 6, 7])
    )
    write_features(lake, "t", 3, newer, [], lake.read_teacher("t"))
    compact(lake.uri)
    assert names_of(lake) == [WHOLE]
    expected = [*before[:3], newer, before[4]]
    assert all(new.equals(old) for new, old in zip(tables_of(lake), expected, strict=True))


# --- damage


def test_a_damaged_pack_stops_a_resume_with_the_command_that_mends_it(lake):
    compact(lake.uri)
    pack = folder_of(lake) / WHOLE
    pack.write_bytes(with_a_flipped_bit(pack, group=2))
    with pytest.raises(LakeError, match=r"shards-000000-000004.parquet is a pack .* damaged.*mmkd verify .* --repair"):
        find_valid(lake, "t", IDENTITY)
    pack.write_bytes(pack.read_bytes()[:-100])
    with pytest.raises(LakeError, match=r"shards-000000-000004.parquet is damaged.*mmkd verify .* --repair"):
        lake.read_features("t", 0)


def test_a_packed_shard_is_read_by_its_own_bytes_only(make_lake, s3, caplog):
    lake = make_lake(f"{s3}/lake", rows=20, shard_rows=8)
    embed(lake, "t")
    compact(lake.uri)
    lake.read_features("t", 0)
    caplog.clear()
    with caplog.at_level(logging.INFO, "werkzeug"):
        lake.read_features("t", 1)
    lines = [record.getMessage() for record in caplog.records]
    ranges = [line for line in lines if "GET" in line and "shards-000000-000002.parquet" in line]
    assert len(ranges) == 1  # the footer is known by now
    assert " 206 " in ranges[0].replace("\x1b[0m", "")
