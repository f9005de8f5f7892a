"""``mmkd plan`` as its user meets it: what is printed, and what a mistake looks like."""

import json
import os
import subprocess
import sys

import pytest


@pytest.fixture(scope="module")
def teachers(make_clip_folder) -> str:
    return f"chest={make_clip_folder('chest')},sono={make_clip_folder('sono', seed=1)}"


@pytest.fixture
def lake(make_lake, tmp_path):
    return make_lake(tmp_path / "lake", rows=400, shard_rows=100)


def mmkd(*arguments: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if name not in ("MMKD_STORE", "RAY_ADDRESS")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    command = [sys.executable, "-m", "cluster.cli", "plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**environment, "COLUMNS": "100"})


GIVEN = ("--rate", "chest=1000", "--rate", "sono=250", "--decode-rate", "50")


def test_a_plan_is_a_table_with_its_bottleneck_hours_bytes_and_price(lake, teachers, monkeypatch, tmp_path):
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    done = mmkd(lake.uri, "--teachers", teachers, "--gpus", "4", "--cpus", "9", "--price", "3600", *GIVEN)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines() == [
        "Missing: 8 of 8 files, 800 rows; 400 of 400 pairs to prepare, 400 pictures to decode; 56.6 kB to write",
        "",
        "teacher  files  rows  bytes a row  to write",
        "chest        4   400           71   28.3 kB",
        "sono         4   400           71   28.3 kB",
        "",
        "stage    rate of one  how many    rate   busy",
        "prepare       50.0/s   8 cores   400/s  100 %",
        "chest         1000/s     1 GPU  1000/s   40 %",
        "sono           250/s    3 GPUs   750/s   53 %",
        "",
        "Bottleneck: prepare; 400 pairs/s, 1 s",
        "One more GPU: 400 pairs/s, 1 s",
        "Eight more cores: 750 pairs/s, 1 s",
        "Cost: 4 GPUs for 0.00 h, 4.00",
        "Loading the models, and the last shards of each teacher, come on top.",
    ]
    assert not (tmp_path / "cache").exists()  # all rates were given


def test_this_machine_is_measured_once_and_json_says_it_to_machines(lake, teachers, monkeypatch, tmp_path):
    monkeypatch.setenv("MMKD_CACHE", str(tmp_path / "cache"))
    first = mmkd(lake.uri, "--teachers", teachers, "--json")
    assert first.returncode == 0, first.stderr
    assert "plan: measuring decoding, chest, sono on " in first.stderr
    plan = json.loads(first.stdout)
    assert [stage["name"] for stage in plan["stages"]] == ["prepare", "teacher=chest", "teacher=sono"]
    assert {name: placement["gpus"] for name, placement in plan["placement"].items()} == {"chest": 0, "sono": 0}
    second = mmkd(lake.uri, "--teachers", teachers)
    assert (second.returncode, second.stderr) == (0, "")
    assert f"Measured on {plan['measured_on']}\n" in second.stdout
    assert f"Bottleneck: {plan['bottleneck']}; " in second.stdout
    assert "There is no GPU: 2 actors and the decoders share" in second.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rate", "chest"], "--rate 'chest' is not NAME=NUMBER; write for example --rate plip=2400"),
        (["--rate", "chest=fast"], "--rate 'chest=fast' is not NAME=NUMBER"),
        (["--rate", "chest=0"], "rates.chest=0.0: Input should be greater than 0"),
        (["--decode-rate", "-5"], "decode_rate=-5.0: Input should be greater than 0"),
        (["--gpus", "0"], "gpus=0: Input should be greater than 0"),
        (["--cpus", "0"], "cpus=0: Input should be greater than 0"),
        (["--price", "-1"], "price=-1.0: Input should be greater than or equal to 0"),
        (["--rate", "chest=inf"], "rates.chest=inf: Input should be a finite number"),
        (
            ["--gpus", "2", "--cluster"],
            "give either the cluster, which has the GPUs and cores it has, or their numbers",
        ),
        (["--set", "speed=3"], "speed is not a setting"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_paragraph(lake, teachers, arguments, said):
    done = mmkd(lake.uri, "--teachers", teachers, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert "Traceback" not in done.stderr
    assert said in " ".join(done.stderr.removeprefix("mmkd: ").split())


def test_where_there_is_no_lake_it_says_how_to_make_one(tmp_path, teachers):
    done = mmkd(str(tmp_path / "none"), "--teachers", teachers)
    assert done.returncode == 1
    assert "There is no lake at" in done.stderr
