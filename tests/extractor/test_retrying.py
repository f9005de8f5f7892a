"""Rejected rows, tried again."""

import io
import json
import tarfile

import pytest

from common.errors import LakeError
from common.lake import INGEST_REJECTS, open_lake
from extractor.config import IngestConfig
from extractor.ingest import ingest
from extractor.retrying import find_rejects
from extractor.sources import plan_sources
from tests.conftest import draw_jpeg


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A table of 40 rows in parts of 8, of which every fourth names a picture that is not there yet."""
    monkeypatch.setattr("extractor.sources.lines.ROWS_PER_PART", 8)
    for index in range(40):
        if index % 4:
            (tmp_path / f"{index}.jpg").write_bytes(draw_jpeg(index))
    rows = [json.dumps({"image": f"{index}.jpg", "caption": f"c{index}"}) for index in range(40)]
    (tmp_path / "p.jsonl").write_text("\n".join([*rows, "no JSON"]) + "\n")
    return tmp_path


def run(folder, name="p.jsonl", **settings):
    retry = settings.pop("retry_rejects", False)
    return ingest(
        str(folder / name), str(folder / "lake"), IngestConfig(shard_rows=16, **settings), retry_rejects=retry
    )


def ledger(folder):
    storage = open_lake(str(folder / "lake")).storage
    rows = [
        row
        for name in storage.list_files(INGEST_REJECTS)
        for row in storage.read_table(f"{INGEST_REJECTS}/{name}").to_pylist()
    ]
    return sorted((row["row"], row["reason"]) for row in rows)


def captions(folder):
    lake = open_lake(str(folder / "lake"))
    return [row[0] for shard in lake.shards() for row in lake.read_pairs(shard, ["captions"])["captions"].to_pylist()]


def test_only_rejected_rows_are_read_and_leave_the_ledger(folder):
    first = run(folder)
    assert (first.pairs, first.rejects) == (30, 11)
    for index in (0, 4, 20):
        (folder / f"{index}.jpg").write_bytes(draw_jpeg(index))
    again = run(folder, retry_rejects=True)
    assert (again.input, again.retried, again.pairs, again.rejects) == (11, 11, 3, 8)
    assert captions(folder)[-3:] == ["c0", "c4", "c20"]
    missing = [index + 1 for index in range(0, 40, 4) if index not in (0, 4, 20)]
    assert ledger(folder) == [(row, "image not found") for row in missing] + [(41, "malformed line")]
    third = run(folder, retry_rejects=True)
    assert (third.input, third.pairs, third.rejects) == (8, 0, 8), "a retry of others is another"
    assert len(ledger(folder)) == 8
    assert run(folder).already_done


def test_what_is_retried_is_not_read_twice_and_counts_once(folder):
    run(folder)
    parts = plan_sources([str(folder / "p.jsonl")], IngestConfig())
    found = find_rejects(open_lake(str(folder / "lake")), parts)
    assert [part.rows for part in found.parts] == [(1, 5), (9, 13), (17, 21), (25, 29), (33, 37), (41,)]
    for index in range(0, 40, 4):
        (folder / f"{index}.jpg").write_bytes(draw_jpeg(index))
    (folder / "p.jsonl").write_text((folder / "p.jsonl").read_text().replace("no JSON\n", ""))
    assert run(folder, retry_rejects=True).pairs == 10
    nothing = run(folder, retry_rejects=True)
    assert ledger(folder) == [(41, "malformed line")], "of a row that is gone nobody can say that it is well"
    assert nothing.input == 0
    assert sorted(captions(folder)) == sorted(f"c{index}" for index in range(40))


def test_a_retry_that_was_killed_before_its_last_step_is_finished_by_the_next_ingest(folder, monkeypatch):
    run(folder)
    for index in range(0, 40, 4):
        (folder / f"{index}.jpg").write_bytes(draw_jpeg(index))

    def kill(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("extractor.ingest.finish", kill)
        with pytest.raises(KeyboardInterrupt):
            run(folder, retry_rejects=True)
    assert len(ledger(folder)) == 12, "the old ones and the malformed row anew"
    (folder / "q.jsonl").write_text(json.dumps({"image": "1.jpg", "caption": "another"}) + "\n")
    assert run(folder, "q.jsonl").pairs == 1
    assert ledger(folder) == [(41, "malformed line")]
    assert not list((folder / "lake").glob("ingest/*"))
    assert sorted(captions(folder)) == sorted([*(f"c{index}" for index in range(40)), "another"])


def test_a_link_that_is_dead_once_more_can_be_tried_again(folder):
    run(folder)
    assert run(folder, retry_rejects=True).pairs == 0
    assert len(ledger(folder)) == 11
    (folder / "0.jpg").write_bytes(draw_jpeg(0))
    again = run(folder, retry_rejects=True)
    assert (again.already_done, again.pairs, again.rejects) == (False, 1, 10)
    assert len(ledger(folder)) == 10


def test_rows_that_moved_in_their_table_stay_in_the_ledger(folder, caplog):
    run(folder)
    before = ledger(folder)
    lines = (folder / "p.jsonl").read_text()
    (folder / "p.jsonl").write_text(json.dumps({"image": "1.jpg", "caption": "new"}) + "\n" + lines)
    for index in range(0, 40, 4):
        (folder / f"{index}.jpg").write_bytes(draw_jpeg(index))
    with caplog.at_level("WARNING", "mmkd"):
        report = run(folder, retry_rejects=True)
    assert report.retried == 0
    assert ledger(folder) == before
    assert "are not where they were" in caplog.text


def test_a_table_of_the_same_name_elsewhere_is_another(folder, tmp_path_factory, caplog):
    run(folder)
    elsewhere = tmp_path_factory.mktemp("other") / folder.name
    elsewhere.mkdir()
    (elsewhere / "p.jsonl").write_text((folder / "p.jsonl").read_text())
    for index in range(40):
        (elsewhere / f"{index}.jpg").write_bytes(draw_jpeg(index))
    with caplog.at_level("WARNING", "mmkd"):
        report = ingest(
            str(elsewhere / "p.jsonl"), str(folder / "lake"), IngestConfig(shard_rows=16), retry_rejects=True
        )
    assert (report.input, len(ledger(folder))) == (0, 11)
    assert "name the sources as you did then" in caplog.text


def test_a_retry_makes_no_lake_and_many_dead_links_are_no_reason_to_stop(folder):
    with pytest.raises(LakeError, match="There is no lake"):
        run(folder, retry_rejects=True)
    assert not (folder / "lake").exists()
    rows = [{"url": f"http://127.0.0.1:9/{index}.png", "caption": f"{index}"} for index in range(30)]
    (folder / "u.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    fetch = {"seconds": 5, "retries": 0, "max_unreachable": 1}
    (folder / "v.jsonl").write_text(json.dumps({"image": "1.jpg", "caption": "c"}) + "\n")
    assert run(folder, "v.jsonl").pairs == 1
    both = [str(folder / "u.jsonl"), str(folder / "v.jsonl")]
    ingest(both, str(folder / "lake"), IngestConfig(shard_rows=16, fetch=fetch))
    fetch["max_unreachable"] = 0.5
    report = ingest(both, str(folder / "lake"), IngestConfig(shard_rows=16, fetch=fetch), retry_rejects=True)
    assert (report.input, report.rejects, report.retried) == (30, 30, 30)


def test_a_limit_that_was_raised_lets_rows_of_a_tar_in(tmp_path):
    def write(name, members):
        with tarfile.open(tmp_path / name, "w") as tar:
            for member, data in members:
                info = tarfile.TarInfo(member)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))

    write(
        "a.tar",
        [m for i in range(6) for m in ((f"{i}.jpg", draw_jpeg(i, 40 + 40 * (i % 2))), (f"{i}.txt", b"c%d" % i))],
    )
    first = run(tmp_path, "a.tar", limits={"max_pixels": 2000})
    assert first.reasons == {"too many pixels": 3}
    again = run(tmp_path, "a.tar", limits={"max_pixels": 20_000}, retry_rejects=True)
    assert (again.input, again.pairs) == (3, 3)
    assert sorted(captions(tmp_path)) == [f"c{i}" for i in range(6)]
    assert ledger(tmp_path) == []
