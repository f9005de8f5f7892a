import pyarrow as pa
import pytest

from common.errors import FingerprintError, LakeError
from common.lake import (
    OWNER,
    check_partition,
    check_same_samples,
    claim_partition,
    create_lake,
    open_lake,
    require_teachers,
    selection_manifest,
    shard_name,
    teacher_manifest,
)
from common.schemas import SCHEMA_VERSION


def test_create_then_open(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=20, shard_rows=8)
    assert open_lake(str(tmp_path / "lake")).shards() == [0, 1, 2]
    assert lake.read_pairs(2).num_rows == 4
    assert lake.read_pairs(0, ["sample_id", "split"]).column_names == ["sample_id", "split"]


def test_no_lake_says_what_to_run(tmp_path):
    with pytest.raises(LakeError, match=r"no lake at .*mmkd ingest SOURCE"):
        open_lake(str(tmp_path))


def test_a_lake_without_pairs_says_so(tmp_path):
    create_lake(str(tmp_path), 8)
    with pytest.raises(LakeError, match="holds no pairs yet"):
        open_lake(str(tmp_path))


def test_another_schema_version_is_refused(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake")
    lake.storage.write_json("lake.json", {**lake.info(), "schema_version": SCHEMA_VERSION + 1})
    with pytest.raises(LakeError, match=f"schema {SCHEMA_VERSION + 1}; this program reads schema {SCHEMA_VERSION}"):
        open_lake(lake.uri)


def test_another_shard_size_is_refused(make_lake, tmp_path):
    make_lake(tmp_path / "lake", shard_rows=8)
    with pytest.raises(LakeError, match="shards of 8 rows and this run asks for 16"):
        create_lake(str(tmp_path / "lake"), 16)


def test_stray_files_are_not_shards(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=4)
    for name in ("shard-1.parquet", "shard-000001.parquet.tmp", "notes.txt"):
        lake.storage.write_bytes(f"pairs/{name}", b"x")
    assert lake.shards() == [0]
    assert shard_name(7) == "shard-000007.parquet"


def test_a_teacher_is_there_with_its_manifest_and_its_embeddings(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=4)
    assert lake.teachers() == []
    for name in ("both", "both.new", "deleted"):
        lake.storage.write_json(teacher_manifest(name), {"fingerprint": {}})
    for name in ("both", "both.new", "unexplained"):
        lake.storage.write_bytes(f"{lake.features_folder(name)}/{shard_name(0)}", b"x")
    assert lake.teachers() == require_teachers(lake, None) == ["both", "both.new"]
    assert lake.partitions() == ["both", "both.new", "unexplained"]
    assert lake.recorded_teachers() == ["both", "both.new", "deleted"]
    for name in ("deleted", "unexplained"):
        with pytest.raises(LakeError, match=rf"no embeddings of teacher '{name}' \(it has: both, both.new\)"):
            require_teachers(lake, [name])


def test_a_selection_is_there_with_its_manifest_and_its_tables(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=4)
    assert lake.selections() == []
    for name in ("both", "deleted"):
        lake.storage.write_json(selection_manifest(name), {})
    for name in ("both", "unfinished"):
        lake.storage.write_bytes(f"{lake.selection_folder(name)}/teacher=t/{shard_name(0)}", b"x")
    assert lake.selections() == ["both"]


def test_packs_are_seen_through_among_embeddings_only(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=24, shard_rows=8)
    for folder in ("pairs", "features/teacher=t"):
        lake.storage.write_bytes(f"{folder}/shards-000003-000005.parquet", b"x")
    lake.storage.write_bytes("features/teacher=t/shard-000004.parquet", b"xy")
    assert lake.shards() == lake.files("pairs") == [0, 1, 2]
    assert list(lake.pair_marks()) == [0, 1, 2]
    assert lake.shards("features/teacher=t") == [3, 4, 5]
    places = lake.feature_places("t")
    assert [place.name for place in places.values()] == [
        "shards-000003-000005.parquet",
        "shard-000004.parquet",
        "shards-000003-000005.parquet",
    ]
    assert places[4].mark.size == 2


def test_embeddings_written_after_a_look_are_read(make_lake, s3):
    lake = make_lake(f"{s3}/lake", rows=4)
    with pytest.raises(FileNotFoundError):
        lake.read_features("t", 0)
    assert lake.shards("features/teacher=t") == []
    table = pa.table({"sample_id": ["a"]})
    open_lake(lake.uri).storage.write_table("features/teacher=t/shard-000000.parquet", table)
    assert lake.read_features("t", 0).equals(table)


def test_a_partition_belongs_to_its_first_producer(tmp_path):
    lake = create_lake(str(tmp_path), 8)
    first = {"weights": "aa", "size": {"side": 224}}
    assert not check_partition(lake.storage, "p/m.json", first, "")
    claim_partition(lake.storage, "p/m.json", first, "", {"licence": "MIT"})
    claim_partition(lake.storage, "p/m.json", first, "")
    assert lake.storage.read_json("p/m.json")["licence"] == "MIT"
    with pytest.raises(FingerprintError, match=r"size\.side: recorded 224, now 336.*Choose another name"):
        claim_partition(lake.storage, "p/m.json", {"weights": "aa", "size": {"side": 336}}, "Choose another name.")


def test_unequal_samples_are_refused():
    left, right = pa.table({"sample_id": ["a", "b"]}), pa.table({"sample_id": ["b", "a"]})
    check_same_samples(left, left, "here")
    with pytest.raises(LakeError, match="here does not hold the same samples"):
        check_same_samples(left, right, "here")


def test_teachers_must_have_been_extracted(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake")
    with pytest.raises(LakeError, match="no teacher embeddings yet"):
        require_teachers(lake, None)
    with pytest.raises(LakeError, match=r"no embeddings of teacher 'plip'.*mmkd extract"):
        require_teachers(lake, ["plip"])


def test_pairs_of_an_unfinished_ingest_do_not_count(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=24, shard_rows=8)
    lake.storage.write_json("ingests/first.json", {"first_shard": 0, "shards": 1})
    for index, ingest in enumerate(("first", "killed", "killed")):
        lake.storage.write_table(f"pairs/{shard_name(index)}", lake.read_pairs(index), {OWNER: ingest})
    assert lake.shards() == [0, 1, 2]
    lake.storage.write_bytes("ingest/killed/part-000000.json", b"{}")
    assert lake.shards() == [0]
    assert lake.files("pairs") == [0, 1, 2]
    assert list(lake.pair_marks()) == [0]


def test_a_relative_lake_is_made_absolute_and_refused_in_a_submitted_job(make_lake, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_lake("lake", rows=4)
    assert open_lake("lake").uri == str(tmp_path / "lake")
    job = tmp_path / "runtime_resources" / "working_dir_files" / "_ray_pkg_1"
    job.mkdir(parents=True)
    monkeypatch.chdir(job)
    with pytest.raises(LakeError, match="relative path in a submitted job"):
        create_lake("lake", 8)
