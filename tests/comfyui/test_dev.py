"""dev.py's promises that cost no set-up."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from harness.server import ROOT

pytestmark = pytest.mark.comfyui


def load_dev(file: Path):
    spec = importlib.util.spec_from_file_location("dev", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_folder_that_is_no_comfyui_is_named_and_nothing_is_set_up(tmp_path):
    command = [sys.executable, ROOT / "dev.py", "demo", "--comfyui", tmp_path / "elsewhere"]
    run = subprocess.run(
        command, env=os.environ | {"SPLAM_CACHE": str(tmp_path / "cache")}, capture_output=True, text=True
    )
    assert run.returncode == 1
    assert f"{tmp_path / 'elsewhere'} is not a ComfyUI" in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "cache").exists()


def test_a_checkout_inside_a_comfyui_finds_it(tmp_path, monkeypatch):
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    checkout = tmp_path / "custom_nodes" / "any name"
    checkout.mkdir(parents=True)
    (tmp_path / "main.py").touch()
    shutil.copy(ROOT / "dev.py", checkout)
    assert load_dev(checkout / "dev.py").find_comfyui(None) == tmp_path


def test_a_command_runs_at_no_cost_and_hands_on_its_exit_code():
    dev = load_dev(ROOT / "dev.py")
    if not Path(sys.prefix).is_relative_to(dev.cache_folder()):
        pytest.skip("needs the environment of `python dev.py test`")
    script = "import sys; print(sys.prefix, sys.argv[1:]); sys.exit(3)"
    run = subprocess.run(
        [sys.executable, ROOT / "dev.py", "python", "-c", script, "--", "-x"],
        capture_output=True,
        text=True,
        timeout=10,
    )
    assert run.returncode == 3
    assert run.stdout.strip() == f"{sys.prefix} ['--', '-x']"


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ("tests/core", True),
        ("-x tests/core/test_gamma.py", True),
        ("tests/core/test_gamma.py::test_x -q", True),
        ("", False),
        ("-k nodes -x", False),
        ("--deselect tests/core/test_gamma.py::test_x", False),
        ("--ignore tests/train -m core", False),
        ("--ignore tests/train tests", True),
        ("--junitxml out/report.xml", False),
    ],
)
def test_only_words_that_name_tests_replace_the_whole_suite(words, names, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert load_dev(ROOT / "dev.py").names_tests(words.split()) == names


@pytest.mark.parametrize("words", ["", "-k nodes -x", "-m core", "-s", "-n 3", "-n3", "--pdb"])
def test_the_whole_suite_runs_in_a_process_for_each_core(words, monkeypatch):
    dev = load_dev(ROOT / "dev.py")
    for cores, expected in ((1, []), (2, ["-n", 2]), (64, ["-n", 4])):
        monkeypatch.setattr(dev, "usable_cores", lambda cores=cores: cores)
        *found, folder = dev.whole_suite(words.split())
        alone = bool({"-s", "--pdb"} & set(words.split())) or "-n" in words.replace("-k n", "")
        assert folder == ROOT / "tests" and found == (
            [] if alone or not expected else [*expected, "--dist", "loadfile"]
        )
