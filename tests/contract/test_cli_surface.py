"""The frozen command-line surface: a new command or option is a decision, made here too."""

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from cluster.cli import app

COMMON = {"--config", "--set", "--print-config"}
SURFACE = {
    "demo": {"--lake", "--pairs", "--teachers", "--catalog", "--seed"} | COMMON,
    "ingest": {"--format", "--image-column", "--caption-column", "--label-column", "--id-column", "--group-column"}
    | {"--keep-columns", "--dataset", "--no-captions", "--no-quotes", "--max-side", "--retry-rejects"}
    | COMMON,
    "import mmkd-features": {"--accept-terms", "--projected", "--stored-precision"} | COMMON,
    "plan": {
        "--teachers",
        "--catalog",
        "--store",
        "--gpus",
        "--cpus",
        "--cluster",
        "--price",
        "--rate",
        "--decode-rate",
    }
    | {"--share", "--fresh", "--micro-batch", "--json", "--config", "--set"},
    "extract": {"--teachers", "--catalog", "--store", "--accept-terms", "--micro-batch", "--towers", "--views"}
    | {"--teacher-version", "--gpus"}
    | COMMON,
    "inspect": {"--teachers", "--sample", "--out", "--json"},
    "verify": {"--teachers", "--repair", "--pairs"},
    "compact": {"--teachers", "--target-mib"},
    "select": {"--teachers"} | COMMON,
    "align": {"--recipe", "--teachers"} | COMMON,
    "train stage1": {"--run", "--epochs", "--extend"} | COMMON,
    "train stage2": {"--init", "--run", "--teachers", "--epochs", "--extend"} | COMMON,
    "evaluate": {"--models", "--catalog", "--store", "--split", "--templates"} | COMMON,
    "export": {"--force", "--catalog", "--store"},
    "teachers list": {"--catalog", "--store"},
    "teachers show": {"--catalog"},
    "teachers check": {"--golden", "--lake", "--catalog", "--store"},
    "teachers fetch": {"--store", "--from", "--tokenizer", "--trust", "--catalog"},
    "teachers convert": {"--trust", "--out"},
    "submit": {"--address", "--working-dir", "--wait", "--no-wait"},
    "doctor": set(),
}


def commands(group: click.Command, prefix: str = "") -> dict[str, click.Command]:
    found: dict[str, click.Command] = {}
    for name, command in getattr(group, "commands", {}).items():
        path = f"{prefix} {name}".strip()
        found.update(commands(command, path) if hasattr(command, "commands") else {path: command})
    return found


def options_of(command: click.Command) -> set[str]:
    flags = {flag for param in command.params for flag in (*param.opts, *param.secondary_opts)}
    return {flag for flag in flags if flag.startswith("--")} - {"--help"}


def test_commands_and_options_are_those_agreed():
    assert {path: options_of(command) for path, command in commands(typer.main.get_command(app)).items()} == SURFACE


@pytest.mark.parametrize("path", SURFACE)
def test_every_command_and_option_explains_itself(path):
    command = commands(typer.main.get_command(app))[path]
    assert command.help
    assert all(getattr(param, "help", None) or isinstance(param, click.Argument) for param in command.params)
    if path != "doctor":
        assert re.search(r"Example: mmkd " + path, command.help), f"{path} shows no example"


@pytest.mark.parametrize(
    ("flags", "quotes"), [([], "null"), (["--no-quotes"], "false"), (["--set", "quotes=true"], "true")]
)
def test_quotes_are_as_the_user_says(flags, quotes):
    shown = CliRunner().invoke(app, ["ingest", "pairs.csv", "lake", *flags, "--print-config"])
    assert f"quotes: {quotes}\n" in shown.output


@pytest.fixture
def mistakes(tmp_path) -> Path:
    """A folder with what the mistakes below need."""
    (tmp_path / "captions.csv").write_text("image,words\na.png,hello\n")
    (tmp_path / "open.csv").write_text('image,"caption\na.png,hello\n')
    (tmp_path / "bad.yaml").write_text("mine: {path: x, famly: hf_clip}\n")
    old = tmp_path / "old-lake"
    old.mkdir()
    (old / "lake.json").write_text('{"schema_version": 99, "shard_rows": 8}')
    (tmp_path / "empty").mkdir()
    return tmp_path


MISTAKES = [
    (["extract", "{tmp}/none", "--teachers", "plip"], "There is no lake at"),
    (["extract", "{tmp}/old-lake", "--teachers", "plip"], "written with schema 99; this program reads schema 3"),
    (["select", "{tmp}/old-lake"], "written with schema 99"),
    (["ingest", "{tmp}/none.jsonl", "{tmp}/lake"], "none.jsonl"),
    (["ingest", "{tmp}/captions.csv", "{tmp}/lake"], "no caption column .* Its columns are: image, words"),
    (["ingest", "{tmp}/captions.csv", "{tmp}/lake", "--caption-column", "text"], "no column 'text'"),
    (["ingest", "{tmp}/open.csv", "{tmp}/lake"], "its quotes do not match .* say --no-quotes"),
    (["select", "{tmp}/none"], "There is no lake at"),
    (["train", "stage1", "{tmp}/none"], "There is no lake at"),
    (["train", "stage2", "{tmp}/none"], "There is no lake at"),
    (["select", "{tmp}", "--set", "keep=1"], "keep is not a setting"),
    (["extract", "{tmp}", "--config", "{tmp}/none.yaml"], "No configuration file"),
    (["teachers", "show", "nobody"], "Unknown model 'nobody'. Known: .*plip"),
    (["teachers", "list", "--catalog", "{tmp}/bad.yaml"], "model mine in .* famly is not a setting"),
    (["evaluate", "{tmp}/none", "--models", "nobody"], "There is no lake at"),
    (["export", "{tmp}/empty", "{tmp}/out"], "empty"),
    (["demo", "--lake", "s3://bucket/x"], "local folder"),
    (["submit", "--address", "http://127.0.0.1:9", "--", "doctor"], "No Ray job server answers at http://127.0.0.1:9"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), MISTAKES, ids=lambda value: value if isinstance(value, str) else None
)
def test_a_users_mistake_is_one_paragraph_and_exit_code_1(arguments, message, mistakes):
    assert_one_paragraph([argument.format(tmp=mistakes) for argument in arguments], message)


def test_missing_credentials_are_one_paragraph(s3):
    nobody = {"AWS_EC2_METADATA_DISABLED": "true", "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent"}
    keep = {key: value for key, value in os.environ.items() if not key.endswith(("ACCESS_KEY_ID", "SECRET_ACCESS_KEY"))}
    assert_one_paragraph(["select", f"{s3}/lake"], "credentials", {**keep, **nobody})


def test_wrong_credentials_are_one_paragraph(tmp_path, monkeypatch):
    # A closed port stands for an endpoint that refuses: nothing answers there.
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "k")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-canary")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    assert_one_paragraph(["select", "s3://bucket/lake"], "AWS_ENDPOINT_URL")


def assert_one_paragraph(arguments: list[str], message: str, environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "cluster.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "canary" not in done.stderr
    said = " ".join(done.stderr[done.stderr.index("mmkd:") :].split())
    assert re.search(message, said), said
