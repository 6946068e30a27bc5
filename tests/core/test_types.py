"""The types that signatures promise, read by a type checker at its strictest."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.core


def test_what_the_hosts_import_passes_a_strict_type_check(tmp_path):
    pytest.importorskip("mypy", reason="mypy is of requirements-dev.txt")
    # As ComfyUI imports it: a package of any name, whose nodes/ reach splam_core by `..`.
    pack = tmp_path / "pack"
    for part in ("nodes", "splam_core"):
        shutil.copytree(ROOT / part, pack / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "__init__.py", pack)
    settings = ["--cache-dir", str(tmp_path / "cache"), "--config-file", str(ROOT / "pyproject.toml")]
    command = [sys.executable, "-m", "mypy", *settings, str(ROOT / "splam_core"), str(ROOT / "splam_webui"), "pack"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
