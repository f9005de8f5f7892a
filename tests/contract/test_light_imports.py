"""`mmkd --help` and reading a configuration must not load torch, Ray or the model libraries."""

import subprocess
import sys

import pytest

HEAVY = ("torch", "ray", "open_clip", "transformers", "timm", "torchvision", "matplotlib", "pandas")
LIGHT = (
    "cluster.cli",
    "common.lake",
    "common.models.load",
    "common.schemas",
    "common.storage",
    "extractor.config",
    "trainer.config",
    "trainer.data",
)


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_loads_nothing_heavy(module):
    code = f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_command_line_does_not_even_load_arrow():
    code = "import sys, cluster.cli; print([name for name in ('pyarrow', 'fsspec', 'numpy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
