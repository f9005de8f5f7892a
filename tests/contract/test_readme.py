"""The README's shape; its commands are run by tests/pipeline/test_readme.py."""

import re
import subprocess
import sys
from pathlib import Path

from embedded import embed

ROOT = Path(__file__).resolve().parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
KINDS = {"skip", "local", "paper", "python", "s3", "cluster", "teachers", "student"}


def test_every_command_block_says_how_it_is_tested():
    blocks = re.findall(r"(.*)\n```(bash|python)\n", README)
    assert blocks
    for before, _ in blocks:
        match = re.fullmatch(r"<!-- test: (\w+).* -->", before)
        assert match, f"no test mark before a code block (found {before!r})"
        assert match.group(1) in KINDS


def test_the_readers_open_folders_of_a_small_lake(make_lake, tmp_path):
    """The same blocks run on the demo's lake in tests/pipeline/test_readme.py, which takes minutes."""
    lake = make_lake(tmp_path / "lake", rows=20, shard_rows=8)
    embed(lake, "chest")
    embed(lake, "sono", dim=8)
    blocks = re.findall(r"<!-- test: python -->\n```python\n(.*?)```", README, re.DOTALL)
    readers = [block for block in blocks if "lake/features" in block]
    assert len(readers) == 5
    for block in readers:
        command = [sys.executable, "-c", block]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        # The first picture is nearest to itself; a table of all teachers names them.
        wanted = ("chest", "sono") if "teachers.parquet" in block else ("0.99", "finding 0")
        assert all(word in done.stdout for word in wanted), f"{block}\n{done.stdout}"


def test_every_linked_file_exists():
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target


def test_every_source_path_named_in_the_docs_exists():
    for file in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for path in re.findall(
            r"`((?:common|extractor|trainer|cluster)/[\w/]+\.py)`", file.read_text(encoding="utf-8")
        ):
            assert (ROOT / path).exists(), f"{file.name} names {path}"


def test_the_yaml_of_a_new_teacher_is_five_lines_and_valid(tmp_path):
    from common.models.load import read_catalog

    (block,) = re.findall(r"```yaml\n(.*?)```", README, re.DOTALL)
    assert len(block.strip().splitlines()) == 5
    file = tmp_path / "mine.yaml"
    file.write_text(block, encoding="utf-8")
    spec = read_catalog(str(file))["my-clip"]
    assert (spec.family, spec.hub_id, spec.needs_consent) == ("hf_clip", "org/my-clip", False)
