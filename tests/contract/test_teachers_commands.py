"""``mmkd teachers`` as its user meets it: what is printed, and what a mistake looks like."""

import os
import re
import subprocess
import sys

import pytest
import yaml

from common.models.load import read_catalog
from common.models.spec import ModelSpec

COLUMNS = ["name", "dim", "pixels", "text tower", "licence", "derivatives", "in store", "from"]


def mmkd(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    inherited = {name: value for name, value in os.environ.items() if name != "MMKD_STORE"}
    command = [sys.executable, "-m", "cluster.cli", "teachers", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env={**inherited, "COLUMNS": "100", **environment}
    )


def printed(*arguments: str, **environment: str) -> str:
    done = mmkd(*arguments, **environment)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def mistake(*arguments: str, **environment: str) -> str:
    """The one paragraph that a mistake ends with, on one line."""
    done = mmkd(*arguments, **environment)
    assert done.returncode == 1, done.stderr
    assert done.stdout == ""
    lines = done.stderr.rstrip("\n").split("\n")
    assert lines[0].startswith("mmkd: ")
    assert all(line.strip() and len(line) <= 100 for line in lines)
    assert "Traceback" not in done.stderr
    return " ".join(done.stderr.split()).removeprefix("mmkd: ")


def table(text: str) -> dict[str, dict[str, str]]:
    """Name -> column -> cell, cut at the places where the headings begin."""
    head, *lines = text.splitlines()
    assert re.split(r"  +", head) == COLUMNS
    begins = [head.index(column) for column in COLUMNS]
    rows = [
        {
            column: line[begin:end].strip()
            for column, begin, end in zip(COLUMNS, begins, [*begins[1:], None], strict=True)
        }
        for line in lines
    ]
    return {row["name"]: row for row in rows}


# --- list


@pytest.fixture(scope="module")
def listed() -> dict[str, dict[str, str]]:
    return table(printed("list"))


def test_every_model_of_the_catalog_has_one_line(listed):
    assert list(listed) == list(read_catalog())
    assert all(all(row.values()) for row in listed.values())


def test_a_line_says_what_is_known(listed):
    assert listed["biomedclip"] == {
        "name": "biomedclip",
        "dim": "512",
        "pixels": "224",
        "text tower": "256 tokens",
        "licence": "MIT",
        "derivatives": "allowed",
        "in store": "-",
        "from": "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224",
    }
    assert listed["plip"]["licence"] == "not known"
    assert listed["lvm-med-vit-b"]["text tower"] == "none"
    assert listed["lvm-med-vit-b"]["pixels"] == "1024"
    assert listed["mmkd-clip"]["from"].startswith("http")


def test_models_that_are_not_served_say_so_in_the_list(listed):
    unserved = {name for name, spec in read_catalog().items() if spec.needs is not None}
    assert "conch" in unserved
    assert {name for name, row in listed.items() if row["from"] == "not served, see `mmkd teachers show`"} == unserved


def test_the_list_says_what_is_in_the_store_and_in_the_users_catalog(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine: {path: ./folder, license: CC0-1.0}\n")
    for name, complete in (("plip", True), ("biomedclip", False)):
        (tmp_path / "store" / name).mkdir(parents=True)
        (tmp_path / "store" / name / ("teacher.json" if complete else "model.safetensors")).write_text("{}")
    arguments = ["list", "--catalog", str(tmp_path / "mine.yaml")]
    rows = table(printed(*arguments, "--store", str(tmp_path / "store")))
    assert {name for name, row in rows.items() if row["in store"] == "yes"} == {"plip"}
    assert {row["in store"] for row in rows.values()} == {"yes", "no"}
    assert rows["mine"]["from"] == str(tmp_path / "folder")
    assert (rows["mine"]["dim"], rows["mine"]["licence"], rows["mine"]["derivatives"]) == ("?", "CC0-1.0", "unknown")
    # The variable stands for the option.
    assert table(printed(*arguments, MMKD_STORE=str(tmp_path / "store"))) == rows


# --- show


def test_show_prints_the_entry_as_yaml_that_is_an_entry_again():
    said = yaml.safe_load(printed("show", "pmc-clip"))
    assert ModelSpec.model_validate(said) == read_catalog()["pmc-clip"]
    assert said["title"] == "PMC-CLIP"
    assert said["recipe"]["pool_heads"] == 32
    assert said["recipes"]["notebook"] == {"pool_heads": 8, "pooling": "pooler"}
    assert said["source"]["repo_type"] == "dataset"
    assert "ask the authors" in said["derivative_terms"]
    assert said["golden"] == "PMCCLIP"
    assert said["facts"]["pooling"]
    assert said["unverified"]


def test_show_explains_a_model_that_is_not_served():
    said = yaml.safe_load(printed("show", "conch"))
    assert said["needs"] == read_catalog()["conch"].needs
    assert said["derivatives"] == "forbidden"
    assert said["gated"] is True


def test_show_prints_a_users_entry(tmp_path):
    (tmp_path / "mine.yaml").write_text("mine: {path: ./folder, derivatives: conditional, derivative_terms: ask me}\n")
    said = yaml.safe_load(printed("show", "mine", "--catalog", str(tmp_path / "mine.yaml")))
    assert said == {
        "name": "mine",
        "path": str(tmp_path / "folder"),
        "derivatives": "conditional",
        "derivative_terms": "ask me",
    }


def test_show_lists_the_known_names_to_one_who_mistypes():
    said = mistake("show", "pmcclip")
    assert said.startswith("Unknown model 'pmcclip'. Known: ")
    assert set(read_catalog()) <= set(re.split(r"[ ,.]+", said.split("Known: ")[1].split(" Give one")[0]))
    assert "--catalog" in said


def test_show_names_the_recipes_to_one_who_mistypes():
    said = mistake("show", "pmc-clip@notebuch")
    assert "'pmc-clip' has no recipe 'notebuch'" in said
    assert "pmc-clip@notebook" in said


# --- fetch


def test_fetch_asks_for_a_store():
    assert mistake("fetch", "plip") == "No store was named. Give --store URI, or set MMKD_STORE."


def test_fetch_refuses_what_no_loader_serves_with_its_sentence(tmp_path):
    said = mistake("fetch", "conch", "--store", str(tmp_path / "store"))
    assert said == f"Model 'conch' cannot be loaded by mmkd: {read_catalog()['conch'].needs}"
    assert "authors' package `conch`" in said
    assert not (tmp_path / "store").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [("--from", "clip=/data/x"), ("--from", "plip"), ("--from", "plip="), ("--tokenizer", "clip=/data/x")],
)
def test_fetch_refuses_a_place_for_nobody(tmp_path, option, value):
    said = mistake("fetch", "plip", "--store", str(tmp_path / "store"), option, value)
    assert said == (f"{option} names {value.partition('=')[0]}; expected NAME=VALUE with a NAME that is to be fetched.")
    assert not (tmp_path / "store").exists()


def test_fetch_says_where_to_download_what_is_not_on_the_hub(tmp_path):
    said = mistake("fetch", "mmkd-clip", "--store", str(tmp_path / "store"))
    entry = read_catalog()["mmkd-clip"]
    assert f"Download MMKD_B16.pth from {entry.source.url} by hand" in said
    assert "--from mmkd-clip=FILE" in said


def test_fetch_says_that_nothing_is_there(tmp_path):
    missing = tmp_path / "MMKD_B16.pth"
    said = mistake("fetch", "mmkd-clip", "--store", str(tmp_path / "store"), "--from", f"mmkd-clip={missing}")
    assert said == f"Model 'mmkd-clip': there is nothing at {missing}."
    assert not (tmp_path / "store").exists()


def test_fetch_refuses_a_web_page_saved_in_place_of_the_weights(tmp_path):
    file = tmp_path / "BMC_CLIP_CF.pt"
    file.write_bytes(b"<html>Google Drive cannot scan this file for viruses</html>")
    said = mistake("fetch", "bmca-clip", "--store", str(tmp_path / "store"), "--from", f"bmca-clip={file}")
    assert f"{file} (59 bytes) is not a whole checkpoint" in said
    assert not (tmp_path / "store").exists()
