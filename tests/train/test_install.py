"""`pip install .`: the library splam_core, and the trainer's commands as splam_training."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder with what the wheel holds: tracked files are copied first, as setuptools writes beside its sources."""
    pytest.importorskip("setuptools", minversion="77")
    place = tmp_path_factory.mktemp("install")
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if files.returncode:
        pytest.skip("not a git checkout")
    for name in filter(None, files.stdout.split("\0")):
        if (ROOT / name).is_file() and name.startswith(
            ("splam_core/", "training/", "assets/", "workflows/", "pyproject", "LICENSE", "README", "requirements")
        ):
            (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            (place / "source" / name).write_bytes((ROOT / name).read_bytes())
    build = "import sys; from setuptools.build_meta import build_wheel; build_wheel(sys.argv[1])"
    run = subprocess.run(
        [sys.executable, "-c", build, str(place)], cwd=place / "source", capture_output=True, text=True, timeout=600
    )
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = place.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "site")
    return place / "site"


def test_the_wheel_holds_every_room_and_what_comes_with_it(installed):
    packages = {child.name for child in installed.iterdir() if child.suffix != ".dist-info"}
    assert packages == {"splam_core", "splam_training"}
    for package, home in (("splam_core", "splam_core"), ("splam_training", "training")):
        for file in (ROOT / home).rglob("*"):
            if file.suffix in (".py", ".toml", ".txt", ".yaml"):
                assert (installed / package / file.relative_to(ROOT / home)).is_file(), file
    assert (installed / "splam_core" / "py.typed").is_file()
    assert (installed / "splam_training" / "workflows" / "splam_txt2img.json").is_file()
    for weights in (ROOT / "assets").rglob("*.safetensors"):
        assert (installed / "splam_training" / "assets" / weights.relative_to(ROOT / "assets")).is_file()


def test_its_commands_are_there(installed):
    (points,) = installed.glob("*.dist-info/entry_points.txt")
    commands = dict(re.findall(r"^(splam-\w+) = (splam_training\.\w+):main$", points.read_text(), re.M))
    assert set(commands) == set(PYPROJECT["project"]["scripts"])
    assert all(module == command.replace("splam-", "splam_training.") for command, module in commands.items())
    assert all((installed / f"{module.replace('.', '/')}.py").is_file() for module in commands.values())


def test_it_trains_outside_a_checkout(installed, tmp_path):
    arguments = ("--teacher", "embedded", "--max-train-steps", "1", "--train-batch-size", "2", "--max-samples", "4")
    shown = ("--sample-every", "0", "--validation-samples", "0", "--report-to", "none")
    code = (
        f"import sys; sys.path.insert(0, {str(installed)!r}); from splam_training.distill import main; "
        "from splam_training.data.samples import PROMPTS; assert PROMPTS.is_file(), PROMPTS; sys.exit(main())"
    )
    command = [sys.executable, "-c", code, *arguments, *shown]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(tmp_path.rglob("student.workflow.json"))
