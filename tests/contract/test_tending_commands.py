"""``mmkd verify`` and ``mmkd compact`` as their user meets them: what is printed, and the exit code."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from embedded import embed, with_a_flipped_bit

from common.lake import shard_name


def mmkd(*arguments: str, code: int = 0) -> tuple[str, str]:
    """What a command prints on stdout and stderr."""
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    environment = {**os.environ, "COLUMNS": "100"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert "Traceback" not in done.stderr
    assert done.returncode == code, (done.stdout, done.stderr)
    return done.stdout, done.stderr


@pytest.fixture
def lake(make_lake, tmp_path):
    lake = make_lake(tmp_path / "lake", rows=20, shard_rows=8)
    embed(lake, "t")
    embed(lake, "other", dim=8)
    return lake


def test_a_whole_lake_is_one_line(lake):
    out, err = mmkd("verify", lake.uri)
    amount = r"\(40 rows, 0\.0 MB, \d+ s\)"
    assert re.fullmatch(rf"verify: all 6 files of other, t are whole and belong to their pairs {amount}\n", out)
    assert err == ""
    out, _ = mmkd("verify", lake.uri, "--pairs", "--teachers", "t")
    assert re.fullmatch(r"verify: all 3 files of t are whole .*; the pairs are whole too \(.*\)\n", out)


def test_damage_is_a_table_and_a_sentence_and_repair_says_what_to_run(lake):
    folder = Path(lake.uri) / "features" / "teacher=t"
    (folder / shard_name(1)).write_bytes(with_a_flipped_bit(folder / shard_name(1)))
    (folder / shard_name(2)).unlink()
    out, _ = mmkd("verify", lake.uri, code=1)
    lines = out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["teacher", "good", "bad", "missing"],
        ["other", "3", "0", "0"],
        ["t", "1", "1", "1"],
    ]
    assert re.match(r"features/teacher=t/shard-000001\.parquet: (its values|shard 1 does not read)", lines[3])
    assert lines[4] == "rejects/extract/t/shard-000002.parquet: its shard has no embeddings"
    extract = f"mmkd extract {lake.uri} --teachers t=/models/t"
    assert lines[6:] == [
        f"To remove what is bad: mmkd verify {lake.uri} --repair",
        f"To compute what is missing: {extract}",
    ]
    out, _ = mmkd("verify", lake.uri, "--repair", code=1)  # it is still not whole
    assert out.splitlines()[-2:] == ["Removed what was bad.", f"To compute what is missing: {extract}"]
    out, _ = mmkd("verify", lake.uri, code=1)
    assert out.splitlines()[-1] == f"To compute what is missing: {extract}"


def test_compact_says_what_it_did_and_the_second_time_that_there_is_nothing_to_do(lake):
    _, err = mmkd("compact", lake.uri)
    assert re.search(r"compact: 6 files are 2 now \(0\.0 MB\)", err)
    _, err = mmkd("compact", lake.uri, "--teachers", "t")
    assert "compact: nothing to do; no two neighbouring files of t fit into one pack" in err
    assert mmkd("verify", lake.uri)[0].startswith("verify: all 2 files of other, t are whole")


def test_mistakes_are_one_paragraph(lake, tmp_path):
    for command in ("verify", "compact"):
        assert "There is no lake at" in mmkd(command, str(tmp_path / "none"), code=1)[1]
        said = mmkd(command, lake.uri, "--teachers", "nobody", code=1)[1]
        assert "has no embeddings of teacher 'nobody'" in " ".join(said.split())
    assert "--target-mib" in mmkd("compact", lake.uri, "--target-mib", "0", code=2)[1]
