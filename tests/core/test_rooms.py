"""The house: which room may know which. Arrows run one way, and no circle is left among them."""

import ast
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.core
COMMANDS = {"distill", "evaluate", "export", "prepare"}
# What each room of training/ may import besides itself and splam_core.
ROOMS: dict[str, set[str]] = {
    "files": set(),
    "flags": {"files"},
    "pictures": set(),
    "models": {"files"},
    "scenes": {"files"},
    "data": {"files", "flags", "pictures", "models", "scenes"},
    "scoring": {"files", "flags", "pictures", "models", "scenes"},
    "embedded": {"files", "pictures", "models", "scenes"},
    "run": {"files", "flags", "pictures", "models", "scenes", "data", "scoring"},
}
# What a package of the repository may import of the others.
PACKAGES: dict[str, set[str]] = {
    "splam_core": set(),
    "nodes": {"splam_core"},
    "splam_webui": {"splam_core"},
    "scripts": {"splam_webui"},
    "training": {"splam_core"},
    "harness": {"splam_core", "training"},
    "benchmarks": {"splam_core", "training", "harness"},
}


@cache
def modules(package: str) -> dict[str, Path]:
    files = sorted((ROOT / package).rglob("*.py"))
    return {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


@cache
def arrows(package: str) -> dict[str, set[str]]:
    """Every module of a package with the modules of the repository that it imports."""
    known = {name for one in PACKAGES for name in modules(one)}
    found = {}
    for name, file in modules(package).items():
        home = name if file.name == "__init__.py" else name.rpartition(".")[0]
        found[name] = set()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                above = home.split(".")[: len(home.split(".")) - node.level + 1] if node.level else []
                source = ".".join([*above, *([node.module] if node.module else [])])
                targets = [f"{source}.{alias.name}" for alias in node.names] + [source]
                if any(one in known for one in targets[:-1]):
                    targets = [one for one in targets[:-1] if one in known]
            else:
                continue
            found[name] |= {one for one in targets if one in known} - {name}
    return found


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else module


@pytest.mark.parametrize("package", PACKAGES)
def test_packages_know_only_what_lies_below_them(package):
    others = {target.split(".")[0] for targets in arrows(package).values() for target in targets}
    assert others - {package} <= PACKAGES[package]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_imports_itself_by_way_of_others(package):
    # A package's own file gathers what lies in it: it is no station on the way.
    graph = {name: {one for one in to if one in arrows(package)} for name, to in arrows(package).items()}
    graph = {name: to for name, to in graph.items() if modules(package)[name].name != "__init__.py"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(error.args[1])}")


def test_the_rooms_of_training_know_only_those_below_them():
    found: dict[str, set[str]] = {}
    for module, targets in arrows("training").items():
        found.setdefault(room(module), set()).update(
            room(one) for one in targets if one.startswith("training.") and room(one) != room(module)
        )
    assert set(found) - {"training"} == set(ROOMS) | COMMANDS
    for name, known in found.items():
        assert known <= ROOMS.get(name, set(ROOMS)), name  # a command may know every room, and no command


def test_commands_and_what_they_share_are_all_that_lies_on_trainings_floor():
    floor = [file.stem for file in (ROOT / "training").glob("*.py") if file.name != "__init__.py"]
    assert len(floor) <= 7, floor


def test_no_file_holds_two_ideas():
    """A file that wants more than about 400 lines (440 at most) wants to be two."""
    long = {
        file.relative_to(ROOT).as_posix(): count
        for package in PACKAGES
        for file in modules(package).values()
        if (count := len(file.read_text(encoding="utf-8").splitlines())) > 440
    }
    assert not long, long
