"""The two halves of ingest without Ray: staging a part, dropping duplicates, planning and writing shards."""

import hashlib
import io
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from common.errors import SourceError
from common.lake import create_lake, open_lake
from common.schemas import PAIRS, REJECTS, check_table
from extractor.commit import commit, plan_shards
from extractor.config import IngestConfig
from extractor.ingest import describe, ingest
from extractor.sources import addresses, plan_sources
from extractor.sources.addresses import identity_of
from extractor.staging import StagedPart, rejects_name, split_of, stage_part, staged_name
from extractor.tasks import Workers


def png(seed, size=8):
    stream = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (size, size, 3), np.uint8)
    Image.fromarray(noise).save(stream, "PNG")
    return stream.getvalue()


@pytest.fixture
def source(tmp_path):
    """Seven rows: three good, one its duplicate, one same picture with another caption, two bad."""
    for seed in range(3):
        (tmp_path / f"{seed}.png").write_bytes(png(seed))
    (tmp_path / "copy.png").write_bytes(png(0))
    (tmp_path / "cut.png").write_bytes(png(9)[:60])
    Image.new("RGB", (9, 9), "green").save(tmp_path / "blank.png")
    rows = [("0", "zero"), ("1", "one"), ("copy", "zero"), ("copy", "other words"), ("2", "two")]
    rows += [("cut", "x"), ("blank", "x")]
    listing = tmp_path / "pairs.jsonl"
    listing.write_text("".join(json.dumps({"image": f"{name}.png", "caption": text}) + "\n" for name, text in rows))
    return listing


def stage_all(lake, source, config):
    parts = plan_sources([str(source)], config)
    return [stage_part(lake, "id", i, part, config) for i, part in enumerate(parts)]


def test_staged_rows_follow_the_contract(source, tmp_path):
    lake = create_lake(str(tmp_path / "lake"), 2)
    (done,) = stage_all(lake, source, IngestConfig())
    assert (done.rows, done.rejected, done.filtered) == ([5], 2, 0)
    assert done.reasons == {"truncated": 1, "blank picture": 1}
    assert StagedPart.load(lake, "id", 0) == done

    table = lake.storage.read_table(staged_name("id", 0, 0)).select(PAIRS.names)
    check_table(table, PAIRS, "staged")
    row = table.to_pylist()[0]
    sha256 = hashlib.sha256(png(0)).hexdigest()
    expected = hashlib.sha256(f"pairs.jsonl/0.png\0{sha256}\0zero".encode()).hexdigest()[:32]
    assert (row["sample_id"], row["sha256"], row["image"]) == (expected, sha256, png(0))
    assert (row["width"], row["height"], row["captions"]) == (8, 8, ["zero"])
    assert row["source"] == f"{tmp_path.name}/pairs.jsonl"

    rejects = lake.storage.read_table(rejects_name("id", 0))
    check_table(rejects, REJECTS, "rejects")
    cut, blank = rejects.to_pylist()
    assert (cut["source_key"], cut["stage"], cut["reason"]) == ("pairs.jsonl/cut.png", "ingest", "truncated")
    assert cut["sha256"] == hashlib.sha256(png(9)[:60]).hexdigest()
    assert "min_contrast" in blank["detail"]


def test_a_part_is_staged_in_several_files_of_bounded_size(source, tmp_path, monkeypatch):
    monkeypatch.setattr("extractor.staging.FILE_ROWS", 2)
    lake = create_lake(str(tmp_path / "lake"), 2)
    assert stage_all(lake, source, IngestConfig())[0].rows == [2, 2, 1]
    monkeypatch.setattr("extractor.staging.FILE_BYTES", 1)
    assert stage_all(lake, source, IngestConfig())[0].rows == [1] * 5


def test_limits_and_settings_reach_the_decoder(source, tmp_path):
    lake = create_lake(str(tmp_path / "lake"), 2)
    (done,) = stage_all(lake, source, IngestConfig(limits={"max_pixels": 70}))
    assert done.reasons == {"too many pixels": 1, "truncated": 1}
    (done,) = stage_all(lake, source, IngestConfig(min_contrast=0, max_side=4))
    table = lake.storage.read_table(staged_name("id", 0, 0))
    assert set(table["width"].to_pylist()) == {4}
    assert table["sha256"][0].as_py() == hashlib.sha256(png(0)).hexdigest(), "of the bytes the source gave"
    assert Image.open(io.BytesIO(table["image"][0].as_py())).size == (4, 4)


def test_commit_drops_duplicates_also_of_earlier_ingests_and_starts_a_new_shard(source, tmp_path):
    lake = create_lake(str(tmp_path / "lake"), 3)
    staged = stage_all(lake, source, IngestConfig())
    done = commit(lake, "id", staged, IngestConfig(shard_rows=3), {}, HereOnly())
    assert (done.pairs, done.duplicates, done.first_shard, done.shards) == (4, 1, 0, 2)
    captions = [lake.read_pairs(index)["captions"].to_pylist() for index in lake.files("pairs")]
    assert captions == [[["zero"], ["one"], ["other words"]], [["two"]]]
    (rejects,) = lake.storage.list_files("rejects/ingest")
    assert lake.storage.read_table(f"rejects/ingest/{rejects}").num_rows == 2
    lake.storage.write_json("ingests/id.json", {"ingest_id": "id", "first_shard": 0, "shards": 2, "pairs": 4})

    again = commit(lake, "other", staged_as(lake, "other", staged), IngestConfig(shard_rows=3), {}, HereOnly())
    assert (again.pairs, again.duplicates, again.first_shard, again.shards) == (0, 5, 2, 0)


def test_shards_of_a_killed_ingest_are_removed_and_foreign_ones_stay(source, tmp_path):
    lake = create_lake(str(tmp_path / "lake"), 2)
    staged = stage_all(lake, source, IngestConfig())
    by_hand = pa.table({field.name: pa.array([], field.type) for field in PAIRS}, schema=PAIRS)
    lake.storage.write_table("pairs/shard-000000.parquet", by_hand)
    commit(lake, "id", staged, IngestConfig(shard_rows=1), {}, HereOnly())
    assert lake.files("pairs") == [0, 1, 2, 3, 4]
    # "id" never wrote its manifest, so another ingest takes its place.
    done = commit(lake, "other", staged_as(lake, "other", staged), IngestConfig(shard_rows=2), {}, HereOnly())
    assert (done.first_shard, done.shards, lake.files("pairs")) == (1, 2, [0, 1, 2])


def test_while_an_ingest_is_staged_only_its_own_shards_do_not_count(source, tmp_path):
    lake = create_lake(str(tmp_path / "lake"), 2)
    by_hand = pa.table({field.name: pa.array([], field.type) for field in PAIRS}, schema=PAIRS)
    lake.storage.write_table("pairs/shard-000000.parquet", by_hand)
    staged = stage_all(lake, source, IngestConfig())
    assert lake.storage.list_folders("ingest"), "it is still staged"
    assert lake.shards() == list(lake.pair_marks()) == [0]
    commit(lake, "id", staged, IngestConfig(shard_rows=1), {}, HereOnly())
    lake.storage.write_bytes("pairs/shard-000007.parquet", b"no Parquet: whoever reads it says so")
    assert lake.files("pairs") == [0, 1, 2, 3, 4, 7]
    assert lake.shards() == list(lake.pair_marks()) == [0, 7]
    lake.storage.write_json("ingests/id.json", {"ingest_id": "id", "first_shard": 1, "shards": 4})
    assert lake.shards() == [0, 1, 2, 3, 4, 7]


def test_a_commit_that_was_killed_goes_on_and_ends_the_same(source, tmp_path):
    lake = create_lake(str(tmp_path / "lake"), 1)
    staged = stage_all(lake, source, IngestConfig())
    whole = commit(lake, "id", staged, IngestConfig(shard_rows=1), {}, HereOnly())
    files = {name: lake.storage.read_bytes(f"pairs/{name}") for name in lake.storage.list_files("pairs")}
    lake.storage.remove("pairs/shard-000002.parquet")
    again = HereOnly()
    assert commit(lake, "id", staged, IngestConfig(shard_rows=1), {}, again) == whole
    assert [item["shard"] for item in again.items] == [2], "only the missing shard is written again"
    assert {name: lake.storage.read_bytes(f"pairs/{name}") for name in lake.storage.list_files("pairs")} == files


class HereOnly(Workers):
    """Runs all tasks in this process, however many; which ones stays in ``items``."""

    def __init__(self):
        super().__init__(refuse)
        self.items = []

    def run(self, items, task, *arguments, few=1, threads=False):
        self.items += items
        return super().run(items, task, *arguments, few=len(items))


def refuse():
    raise AssertionError("Ray was wanted")


def staged_as(lake, ingest_id, staged):
    """The same staged files under another ingest's name."""
    for name in lake.storage.list_files("ingest/id"):
        lake.storage.write_bytes(f"ingest/{ingest_id}/{name}", lake.storage.read_bytes(f"ingest/id/{name}"))
    return staged


def test_plan_cuts_kept_rows_in_order():
    files = [("a", 3), ("b", 0), ("c", 4)]
    keep = np.array([1, 0, 1, 1, 1, 0, 1], bool)
    assert plan_shards(files, keep, 2) == [[("a", 0, 1), ("a", 2, 1)], [("c", 0, 2)], [("c", 3, 1)]]
    assert plan_shards(files, keep, 4) == [[("a", 0, 1), ("a", 2, 1), ("c", 0, 2)], [("c", 3, 1)]]
    assert plan_shards(files, np.zeros(7, bool), 4) == []
    assert plan_shards([], np.zeros(0, bool), 4) == []


def test_splits_follow_the_picture_and_the_fractions():
    config = IngestConfig(val_fraction=0.1, test_fraction=0.2)
    shas = [hashlib.sha256(str(i).encode()).hexdigest() for i in range(3000)]
    splits = [split_of(sha, config) for sha in shas]
    assert splits == [split_of(sha, config) for sha in shas]
    shares = {name: splits.count(name) / len(splits) for name in ("train", "val", "test")}
    assert shares == pytest.approx({"train": 0.7, "val": 0.1, "test": 0.2}, abs=0.03)


def test_the_same_ingest_has_the_same_identity_and_a_changed_one_another(source):
    def identity(**settings):
        config = IngestConfig(**settings)
        return describe(plan_sources([str(source)], config), config)

    first = identity()
    assert identity() == first
    assert str(source.parent) not in json.dumps(first), "another machine's folder must not matter"
    assert identity(val_fraction=0.3) != first
    source.write_text(source.read_text() + "\n")
    assert identity() != first


def test_a_small_copied_source_is_the_same_and_a_large_one_goes_by_its_time(source, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    copy = Path(shutil.copy(source, tmp_path / "elsewhere"))
    os.utime(copy, ns=(0, 0))
    assert identity_of(str(copy)) == identity_of(str(source))
    text = source.read_text()
    copy.write_text(text.replace("zero", "nero"))
    assert copy.stat().st_size == source.stat().st_size
    assert identity_of(str(copy)) != identity_of(str(source))
    copy.write_text(text)
    os.utime(copy, ns=(0, 0))
    monkeypatch.setattr(addresses, "HASHED_BYTES", len(text) - 1)
    assert identity_of(str(copy)) != identity_of(str(source))


def test_a_source_is_read_again_when_asked_for(source, tmp_path):
    lake = str(tmp_path / "lake")
    first = ingest(str(source), lake, IngestConfig())
    (source.parent / "absent.png").write_bytes(png(9))
    assert ingest(str(source), lake, IngestConfig()).already_done
    again = ingest(str(source), lake, IngestConfig(reread=1))
    assert (again.already_done, again.input) == (False, first.input)
    assert again.duplicates >= first.pairs


def test_from_object_storage_to_object_storage(source, s3):
    import fsspec

    filesystem = fsspec.filesystem("s3")
    filesystem.put(str(source.parent) + "/", f"{s3}/set/images/", recursive=True)
    rows = [json.loads(line) for line in source.read_text().splitlines()]
    lines = [json.dumps({**row, "image": f"../images/{row['image']}"}) for row in [*rows, {"image": "absent.png"}]]
    filesystem.pipe(f"{s3}/set/lists/pairs.jsonl", "\n".join(lines).encode())
    report = ingest(f"{s3}/set/lists", f"{s3}/lake", IngestConfig(shard_rows=3))
    assert (report.input, report.pairs, report.rejects, report.duplicates, report.shards) == (8, 4, 3, 1, 2)
    lake = open_lake(f"{s3}/lake")
    assert lake.read_pairs(0)["image"][0].as_py() == png(0)
    assert lake.storage.list_files(f"ingest/{report.ingest_id}") == []
    assert ingest(f"{s3}/set/lists", f"{s3}/lake", IngestConfig(shard_rows=3)).already_done
    written = b"".join(filesystem.cat(filesystem.find(f"{s3}/lake")).values())
    assert b"test-secret-canary" not in written


def test_a_source_without_one_usable_pair_is_an_error_and_can_be_mended(source, tmp_path):
    lake = str(tmp_path / "lake")
    listing = tmp_path / "later.jsonl"
    listing.write_text(json.dumps({"image": "later.png", "caption": "c"}))
    with pytest.raises(SourceError, match=r"not one usable pair: 1 rows read.*image not found 1.*later\.png"):
        ingest(str(listing), lake, IngestConfig())
    (tmp_path / "later.png").write_bytes(png(5))
    assert ingest(str(listing), lake, IngestConfig()).pairs == 1
    with pytest.raises(SourceError, match="7 filtered out"):
        ingest(str(source), lake, IngestConfig(keep_labels=("nothing",)))


@pytest.mark.parametrize(
    ("case", "counts", "reasons"),
    [
        ("case-01/pairs.tsv", (4, 4, 0), {}),
        ("case-03/dots.tar", (3, 3, 0), {}),
        ("case-03/dots_only.tar", (2, 2, 0), {}),
        ("case-04/enc.tar", (7, 5, 2), {"malformed row": 2}),
    ],
)
def test_every_row_of_reported_sources_is_accounted_for(shared_data, tmp_path, case, counts, reasons):
    report = ingest(str(shared_data / "reports" / case), str(tmp_path / "lake"), IngestConfig())
    assert (report.input, report.pairs, report.rejects) == counts
    assert report.reasons == reasons
