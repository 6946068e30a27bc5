"""splam_core stands alone: torch, safetensors in one file, the standard library, and relative imports."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import splam_core

pytestmark = pytest.mark.core
FILES = sorted(Path(splam_core.__file__).parent.glob("*.py"))


def imported(path):
    """(top-level names imported absolutely, whether everything of our own is relative)."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.partition(".")[0])
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_imports_only_torch_and_the_standard_library(path):
    allowed = {"torch"} | ({"safetensors"} if path.name == "checkpoint.py" else set())
    assert imported(path) - set(sys.stdlib_module_names) <= allowed
    assert "argparse" not in imported(path)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_prints_nothing(path):
    calls = [n.func for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
    assert not [call for call in calls if isinstance(call, ast.Name) and call.id == "print"]


def test_importing_it_loads_no_pipeline_library():
    root = str(FILES[0].parents[1])
    code = (
        f"import sys; sys.path.insert(0, {root!r}); import splam_core; "
        "print([m for m in ('diffusers', 'transformers', 'huggingface_hub', 'comfy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_every_public_name_is_documented():
    for name in splam_core.__all__:
        assert getattr(splam_core, name).__doc__, name
