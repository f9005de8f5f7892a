import os
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from changed_pairs import without_captions
from embedded import embed, features_of, identity_of, with_a_flipped_bit

from common.errors import LakeError, LeaseError
from common.lake import Lake, open_lake, shard_name
from common.lease import hold
from common.schemas import PAIRS
from common.shard_files import pack_name
from common.storage import Storage
from extractor.sink import find_valid
from extractor.tending.compact import compact
from extractor.tending.verify import Tally, verify

IDENTITY = identity_of("t")
FOLDER = "features/teacher=t"
MANIFEST = "manifests/teachers/t.json"
REJECTS = "rejects/extract/t"
SHARDS = {0, 1, 2, 3, 4}


@pytest.fixture
def lake(make_lake, tmp_path) -> Lake:
    """A lake of five shards with two teachers."""
    lake = make_lake(tmp_path / "lake", rows=36, shard_rows=8)
    embed(lake, "t")
    embed(lake, "u", dim=8)
    return lake


def file(lake: Lake, name: str | int) -> Path:
    return Path(lake.uri) / FOLDER / (name if isinstance(name, str) else shard_name(name))


def found(report) -> dict[str, str]:
    return {finding.path: finding.sentence for finding in report.findings}


def restore(lake: Lake) -> None:
    """What the next extraction does after a repair."""
    missing = set(lake.shards()) - find_valid(lake, "t", IDENTITY)
    embed(lake, "t", shards=sorted(missing))
    assert verify(lake.uri, pairs=True).findings == []


def test_pictures_without_captions_are_no_fault(make_lake, tmp_path):
    lake = without_captions(make_lake(tmp_path / "lake", rows=20, shard_rows=8), lambda row: row % 3 == 0 or row >= 16)
    embed(lake, "t")
    assert lake.read_features("t", 2, ["text_norm"])["text_norm"].null_count == 4  # the whole shard
    report = verify(lake.uri, pairs=True)
    assert report.findings == []
    assert report.teachers == {"t": Tally(good=3, bad=0)}


@pytest.mark.parametrize("where", ["local", "s3"])
def test_damage_is_found_and_repaired_wherever_the_lake_is(request, make_lake, tmp_path, where):
    lake = make_lake(tmp_path if where == "local" else request.getfixturevalue("s3") + "/lake", rows=20, shard_rows=8)
    embed(lake, "t")
    assert verify(lake.uri).findings == []
    name = f"{FOLDER}/{shard_name(1)}"
    lake.storage.write_bytes(name, lake.storage.read_bytes(name)[:-40])
    report = verify(lake.uri)
    assert not report.is_good
    assert report.teachers == {"t": Tally(good=2, bad=1)}
    assert list(found(report)) == [name]
    report = verify(lake.uri, repair=True)
    assert report.is_good
    assert report.incomplete == ["t"]
    assert not lake.storage.exists(name)
    assert not lake.storage.exists(f"{REJECTS}/{shard_name(1)}")
    assert find_valid(lake, "t", IDENTITY) == {0, 2}


def test_a_whole_lake_has_no_findings(lake):
    report = verify(lake.uri, pairs=True)
    assert report.is_good
    assert report.findings == report.incomplete == []
    assert report.teachers == {"t": Tally(good=5), "u": Tally(good=5)}
    assert (report.files, report.rows) == (10, 72)
    sizes = [path.stat().st_size for path in Path(lake.uri).glob("features/*/*.parquet")]
    assert report.bytes == sum(sizes)


def manifest(lake: Lake, name: str, first: int, shards: int) -> None:
    lake.storage.write_json(f"ingests/{name}.json", {"first_shard": first, "shards": shards})


def test_ingests_are_held_against_the_shards(lake):
    manifest(lake, "a", 0, 3)
    manifest(lake, "b", 3, 2)
    assert verify(lake.uri).findings == []
    manifest(lake, "c", 2, 1)
    assert found(verify(lake.uri)) == {
        "ingests/c.json": "a.json claims the same shards, so the rows of one of the two are not in the lake; ingest "
        "both into a fresh lake"
    }
    manifest(lake, "c", 5, 4)
    report = verify(lake.uri)
    assert not report.is_good
    assert found(report)["ingests/c.json"].startswith(
        "shard-000005.parquet, shard-000006.parquet, shard-000007.parquet and 1 more of its 4 shards are not in pairs/"
    )


def test_it_reads_what_ledgers_would_have_it_believe(lake):
    find_valid(lake, "t", IDENTITY)
    before = file(lake, 2).stat()
    file(lake, 2).write_bytes(with_a_flipped_bit(file(lake, 2)))
    os.utime(file(lake, 2), ns=(before.st_atime_ns, before.st_mtime_ns))
    assert find_valid(lake, "t", IDENTITY) == SHARDS
    report = verify(lake.uri, ["t"])
    assert report.teachers == {"t": Tally(good=4, bad=1)}
    assert find_valid(lake, "t", IDENTITY) == SHARDS - {2}  # the ledger knows by now


def test_missing_shards_are_not_bad(lake):
    file(lake, 1).unlink()
    lake.storage.remove(f"{REJECTS}/{shard_name(1)}")
    report = verify(lake.uri)
    assert report.is_good
    assert report.teachers["t"] == Tally(good=4, missing=1)
    assert report.incomplete == ["t"]


def test_files_of_other_samples_are_removed_only_by_repair(lake):
    file(lake, 0).rename(file(lake, "x"))
    file(lake, 1).rename(file(lake, 0))
    file(lake, "x").rename(file(lake, 1))
    report = verify(lake.uri)
    assert {path: sentence.split(" (")[0] for path, sentence in found(report).items()} == {
        f"{FOLDER}/{shard_name(0)}": "it holds other samples than its pairs shard",
        f"{FOLDER}/{shard_name(1)}": "it holds other samples than its pairs shard",
    }
    assert file(lake, 0).exists()
    verify(lake.uri, repair=True)
    restore(lake)


def test_shards_without_pairs_are_named_and_removed(lake):
    lake.storage.remove(f"pairs/{shard_name(4)}")
    report = verify(lake.uri, ["t"])
    assert found(report) == {f"{FOLDER}/{shard_name(4)}": "the pairs have no such shard"}
    verify(lake.uri, ["t"], repair=True)
    assert not file(lake, 4).exists()
    assert find_valid(lake, "t", IDENTITY) == SHARDS - {4}


def test_rejects_without_embeddings_are_removed(lake):
    file(lake, 3).unlink()
    lake.storage.write_bytes("rejects/extract/gone/shard-000000.parquet", b"x")
    report = verify(lake.uri)
    orphans = {f"{REJECTS}/{shard_name(3)}", "rejects/extract/gone/shard-000000.parquet"}
    assert set(found(report)) == orphans
    assert set(found(verify(lake.uri, ["t"]))) == {f"{REJECTS}/{shard_name(3)}"}
    assert verify(lake.uri, repair=True).is_good
    assert not any((Path(lake.uri) / path).exists() for path in orphans)
    restore(lake)


def test_what_killed_writes_left_is_removed_when_it_is_old(lake):
    old, young = file(lake, ".tmp-old"), Path(lake.uri) / "pairs" / ".tmp-young"
    for path in (old, young, Path(lake.uri) / ".tmp-lock"):
        path.write_bytes(b"x")
    for path in (old, Path(lake.uri) / ".tmp-lock"):
        os.utime(path, (time.time() - 4000,) * 2)
    assert found(verify(lake.uri)) == {f"{FOLDER}/.tmp-old": "a killed write left it"}
    verify(lake.uri, repair=True)
    assert not old.exists()
    assert young.exists()
    assert (Path(lake.uri) / ".tmp-lock").exists()


def test_parts_that_a_killed_write_left_in_a_store_are_removed(make_lake, s3, monkeypatch):
    lake = make_lake(f"{s3}/my lake", rows=8, shard_rows=8)
    embed(lake, "t")
    neighbour = Storage(f"{s3}/my lake 2")
    for storage, path in ((lake.storage, f"{FOLDER}/shards-000000-000063.parquet"), (neighbour, "features/x")):
        bucket, _, key = storage.path(path).partition("/")
        begun = storage.fs.call_s3("create_multipart_upload", Bucket=bucket, Key=key)
        part = {"Bucket": bucket, "Key": key, "UploadId": begun["UploadId"], "PartNumber": 1, "Body": b"x" * 100}
        storage.fs.call_s3("upload_part", **part)
    (upload,) = lake.storage.uploads()
    monkeypatch.setattr("time.time", lambda: upload.begun + 3000)
    assert verify(lake.uri).is_good  # it may be a write that is under way
    monkeypatch.setattr("time.time", lambda: upload.begun + 4000)
    expected = {f"{FOLDER}/shards-000000-000063.parquet": "a killed write left parts of it"}
    assert found(verify(lake.uri)) == expected
    assert verify(lake.uri, repair=True).is_good
    assert lake.storage.uploads() == []
    assert len(neighbour.uploads()) == 1
    lake.storage.abort(upload)  # ended meanwhile: no error


def test_a_partition_of_unknown_origin_is_not_touched(lake):
    (Path(lake.uri) / MANIFEST).unlink()
    report = verify(lake.uri, repair=True)
    assert not report.is_good
    assert list(found(report)) == [MANIFEST]
    assert file(lake, 0).exists()
    with pytest.raises(LakeError, match="no embeddings of teacher 'nobody'"):
        verify(lake.uri, ["nobody"])


def test_repair_waits_for_an_extraction_and_looking_does_not(lake):
    with hold(lake.storage, "teacher=t", "extract-now", seconds=2):
        assert verify(lake.uri, ["t"]).is_good
        with pytest.raises(LeaseError, match="extract-now"):
            verify(lake.uri, ["t"], repair=True, lease_seconds=2)


# --- packs


def test_a_packs_bad_shards_are_named_and_its_good_ones_survive_the_repair(lake):
    before = {index: lake.read_features("t", index) for index in SHARDS}
    compact(lake.uri)
    pack = file(lake, pack_name(0, 4))
    assert verify(lake.uri, pairs=True).findings == []
    pack.write_bytes(with_a_flipped_bit(pack, group=2))
    report = verify(lake.uri)
    assert report.teachers["t"] == Tally(good=4, bad=1)
    (sentence,) = found(report).values()
    assert sentence.startswith("1 of 5 shards are bad (shard 2: ")
    assert verify(lake.uri, repair=True).is_good
    assert not pack.exists()
    assert find_valid(lake, "t", IDENTITY) == SHARDS - {2}
    assert lake.storage.list_files(REJECTS) == [shard_name(index) for index in sorted(SHARDS - {2})]
    restore(lake)
    assert all(lake.read_features("t", index).equals(table) for index, table in before.items())
    compact(lake.uri)
    assert verify(lake.uri).findings == []


@pytest.mark.parametrize("cut", [10, 3000])
def test_a_truncated_pack_is_removed(lake, cut):
    compact(lake.uri)
    pack = file(lake, pack_name(0, 4))
    pack.write_bytes(pack.read_bytes()[:-cut])
    report = verify(lake.uri)
    assert report.teachers["t"] == Tally(bad=5)
    assert "it does not open as Parquet" in found(report)[f"{FOLDER}/{pack.name}"]
    assert verify(lake.uri, repair=True).is_good
    assert not pack.exists()
    assert find_valid(lake, "t", IDENTITY) == set()
    restore(lake)


def test_leftovers_beside_a_pack_are_named_and_settled(lake):
    compact(lake.uri)
    embed(lake, "t", shards=[0, 3])
    report = verify(lake.uri)
    assert found(report) == {
        f"{FOLDER}/{pack_name(0, 4)}": f"{shard_name(0)}, {shard_name(3)} beside it hold the same shards"
    }
    assert report.teachers["t"] == Tally(good=5)
    assert verify(lake.uri, repair=True).is_good
    assert lake.storage.list_files(FOLDER, ".parquet") == [pack_name(0, 4)]
    assert verify(lake.uri).findings == []


def test_good_files_beside_a_bad_pack_and_bad_files_beside_a_good_one_are_both_mended(lake):
    compact(lake.uri)
    pack = file(lake, pack_name(0, 4))
    embed(lake, "t", shards=[2])
    pack.write_bytes(with_a_flipped_bit(pack, group=2))
    file(lake, 3).write_bytes(b"torn")
    assert verify(lake.uri, repair=True).is_good
    assert find_valid(lake, "t", IDENTITY) == SHARDS
    restore(lake)


# --- pairs


def test_bad_pairs_are_named_and_never_touched(lake):
    path = Path(lake.uri) / "pairs" / shard_name(1)
    chunk = pq.read_metadata(path).row_group(0).column(1)
    assert chunk.path_in_schema == "image"
    whole = bytearray(path.read_bytes())
    whole[chunk.data_page_offset : chunk.data_page_offset + 100] = bytes(100)
    path.write_bytes(whole)
    assert verify(lake.uri).is_good  # ids and rows can be read; pictures are looked at on request
    report = verify(lake.uri, repair=True, pairs=True)
    assert not report.is_good
    assert list(found(report)) == [f"pairs/{shard_name(1)}"]
    assert path.read_bytes() == whole
    path.write_bytes(b"torn")
    report = verify(lake.uri, repair=True)
    assert "restore it from a copy" in found(report)[f"pairs/{shard_name(1)}"]
    assert report.teachers["t"] == Tally(good=5)  # nothing is known against the embeddings
    assert file(lake, 1).exists()


def test_pairs_with_other_columns_or_repeated_ids_are_named(lake):
    rows = lake.read_pairs(3).to_pylist()
    first = lake.read_pairs(0)["sample_id"][0].as_py()
    rows[2]["sample_id"] = first
    lake.storage.write_table(f"pairs/{shard_name(3)}", pa.Table.from_pylist(rows, schema=PAIRS))
    narrow = lake.read_pairs(4).drop_columns(["license"])
    lake.storage.write_table(f"pairs/{shard_name(4)}", narrow)
    sentences = found(verify(lake.uri, ["u"], pairs=True))
    assert f"1 of its sample ids are not unique in the lake ({first} is in shard 0 too)" in sentences.values()
    assert "Missing: ['license']" in sentences[f"pairs/{shard_name(4)}"]


def test_a_lake_without_embeddings_is_whole(make_lake, tmp_path):
    report = verify(make_lake(tmp_path / "lake").uri, pairs=True)
    assert report.is_good
    assert report.teachers == {}


def test_what_is_rescued_is_what_was_embedded(lake):
    compact(lake.uri)
    pack = file(lake, pack_name(0, 4))
    pack.write_bytes(with_a_flipped_bit(pack, "image_embedding", group=0))
    verify(lake.uri, repair=True)
    fresh = open_lake(lake.uri)
    for index in (1, 2, 3, 4):
        assert fresh.read_features("t", index).equals(features_of(lake, "t", index))
