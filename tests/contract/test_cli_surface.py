"""The frozen command-line surface: a new command or option is a decision, made here too."""

import re
import subprocess
import sys

import click
import pytest
import typer

from cluster.cli import app

COMMON = {"--config", "--set", "--print-config"}
SURFACE = {
    "demo": {"--lake", "--pairs", "--teachers", "--catalog", "--seed"} | COMMON,
    "ingest": {"--format", "--image-column", "--caption-column", "--max-side"} | COMMON,
    "extract": {"--teachers", "--catalog", "--micro-batch"} | COMMON,
    "select": {"--teachers"} | COMMON,
    "train stage1": {"--run", "--epochs"} | COMMON,
    "train stage2": {"--init", "--run", "--teachers", "--epochs"} | COMMON,
    "evaluate": {"--models", "--catalog", "--split", "--templates"} | COMMON,
    "export": {"--force"},
    "teachers list": {"--catalog"},
    "teachers show": {"--catalog"},
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
    if path not in ("doctor", "teachers list", "teachers show"):
        assert re.search(r"Example: mmkd " + path, command.help), f"{path} shows no example"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "{tmp}/none", "--teachers", "plip"], "There is no lake at"),
        (["ingest", "{tmp}/none.jsonl", "{tmp}/lake"], "none.jsonl"),
        (["select", "{tmp}/none"], "There is no lake at"),
        (["train", "stage2", "{tmp}/none"], "There is no lake at|mmkd train stage1"),
        (["select", "{tmp}", "--set", "keep=1"], "keep is not a setting"),
        (["extract", "{tmp}", "--config", "{tmp}/none.yaml"], "No configuration file"),
        (["teachers", "show", "nobody"], "Unknown model 'nobody'"),
        (["evaluate", "{tmp}/none", "--models", "nobody"], "nobody|no lake"),
        (["export", "{tmp}/none", "{tmp}/out"], "none"),
    ],
)
def test_a_users_mistake_is_one_paragraph_and_exit_code_1(arguments, message, tmp_path):
    arguments = [argument.format(tmp=tmp_path) for argument in arguments]
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    said = " ".join(done.stderr[done.stderr.index("mmkd: ") :].split())
    assert re.search(message, said), said
