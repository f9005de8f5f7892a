"""Rules about the code itself."""

import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("common", "extractor", "trainer", "cluster")
SOURCES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("package", PACKAGES)
def test_the_imported_package_is_this_projects(package):
    module = __import__(package)
    assert Path(module.__file__).resolve().parent == ROOT / package


def test_no_vague_file_names():
    assert not [p for p in SOURCES if p.stem in {"utils", "util", "helpers", "misc", "core", "manager"}]


def test_tests_are_no_packages():
    assert not list((ROOT / "tests").rglob("__init__.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_source_file_follows_the_rules(path):
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module opens with one sentence"
    assert text.isascii() or path.name in {"captions.py"}, "sources are ASCII"
    assert not re.search(r"[\"'](/home|/root|/work|/Users)/", text), "no machine's paths"
    assert not re.search(r"\b(TODO|FIXME|XXX)\b", text), "no unfinished marks"
    if path.name == "losses.py":
        assert not re.search(r"nn\.(Parameter|Module)", text), "a loss holds no state"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_no_pickle_of_files(path):
    text = path.read_text(encoding="utf-8")
    assert not re.search(r"\bpickle\.(load|loads|dump|dumps)\b", text)
    for call in re.findall(r"torch\.load\([^)]*\)", text):
        # The converter reads with an unpickler of its own that builds nothing but plain data.
        inert = path.name == "convert.py" and "pickle_module=plain" in call
        assert "weights_only=True" in call or inert, call


def test_version_is_stated_once_more_in_the_metadata():
    from common.version import VERSION

    assert f'version = "{VERSION}"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


def test_nothing_tracked_names_a_registry_host():
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    hosts = re.compile(r"pypi\.org|pythonhosted\.org|registry\.npmjs|download\.pytorch\.org")
    bad = [
        name
        for name in done.stdout.split()
        if (ROOT / name).is_file()
        and name != "tests/contract/test_sources.py"
        and hosts.search((ROOT / name).read_bytes().decode("utf-8", "ignore"))
    ]
    assert not bad
