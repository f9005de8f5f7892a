"""Rejected rows, tried again."""

import io
import json
import tarfile

import pytest

from common.lake import INGEST_REJECTS, open_lake
from extractor.config import IngestConfig
from extractor.ingest import ingest
from extractor.retrying import find_rejects, strike_out
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
    assert (nothing.already_done, nothing.input, ledger(folder)) == (True, 0, []), "a row that is gone is struck out"
    assert sorted(captions(folder)) == sorted(f"c{index}" for index in range(40))


def test_a_retry_that_was_killed_before_its_last_step_is_finished_by_the_next(folder, monkeypatch):
    run(folder)
    for index in range(0, 40, 4):
        (folder / f"{index}.jpg").write_bytes(draw_jpeg(index))
    killed = []

    def kill(*arguments):
        killed.append(arguments)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("extractor.ingest.strike_out", kill)
        with pytest.raises(KeyboardInterrupt):
            run(folder, retry_rejects=True)
    assert len(killed) == 1
    assert len(ledger(folder)) == 12, "the old ones and the malformed row anew"
    again = run(folder, retry_rejects=True)
    assert again.already_done
    assert ledger(folder) == [(41, "malformed line")]
    assert sorted(captions(folder)) == sorted(f"c{index}" for index in range(40))


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


def test_striking_out_spares_the_ledger_of_the_retry_and_other_sources(folder):
    run(folder)
    lake = open_lake(str(folder / "lake"))
    before = ledger(folder)
    (name,) = lake.storage.list_files(INGEST_REJECTS)
    rows = find_rejects(lake, plan_sources([str(folder / "p.jsonl")], IngestConfig())).rows
    strike_out(lake, rows, name.partition("-")[0])
    assert ledger(folder) == before
    strike_out(lake, frozenset((source, f"other/{key}", row) for source, key, row in rows), "x")
    assert ledger(folder) == before
    strike_out(lake, rows, "x")
    assert lake.storage.list_files(INGEST_REJECTS) == []
