"""The documentation: links that lead somewhere, commands whose flags exist, messages that the code still says."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("training/embedded/*.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.M | re.S)
COMMANDS = {"distill", "evaluate", "export", "prepare"}


def anchors(page):
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://")):
            continue
        place, _, anchor = link.partition("#")
        target = (page.parent / place) if place else page
        assert target.exists(), f"{link}: no such file"
        if anchor:
            assert anchor in anchors(target), f"{link}: no such heading"


def test_every_page_is_on_the_site():
    site = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = set(re.findall(r": (\w+\.md)$", site, re.M))
    assert listed == {page.name for page in (ROOT / "docs").glob("*.md")}


def commands(page):
    """The commands of a page's code blocks: continued lines joined, comments and what follows a pipe left out."""
    for block in BLOCK.findall(page.read_text(encoding="utf-8")):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words:
                yield words


@pytest.fixture
def flags_of(capsys, monkeypatch):
    """The flags that a command's --help shows."""

    def flags(name):
        monkeypatch.setattr("sys.argv", [name, "--help"])
        with pytest.raises(SystemExit):
            importlib.import_module(f"training.{name}").main()
        return set(re.findall(r"--[a-z][a-z0-9-]*", capsys.readouterr().out))

    return flags


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_commands_are_there(page):
    for words in commands(page):
        scripts = [word for word in words if word.endswith(".py") and "/" in word]
        for script in scripts:
            assert (ROOT / script).is_file(), f"{script} of {shlex.join(words)}"
        modules = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "-m" and "." in words[i + 1]]
        for module in modules:
            assert (ROOT / (module.replace(".", "/") + ".py")).is_file(), f"{module} of {shlex.join(words)}"
        configs = [words[i + 1] for i, word in enumerate(words[:-1]) if word == "--config_file"]
        for config in configs:
            assert (ROOT / config).is_file(), f"{config} of {shlex.join(words)}"


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_flags_of_the_trainers_commands_exist(name, flags_of):
    known, seen = flags_of(name), 0
    for page in PAGES:
        for words in commands(page):
            if f"training/{name}.py" in words:
                given = words[words.index(f"training/{name}.py") :]
                seen += 1
                assert {word.split("=")[0] for word in given if word.startswith("--")} <= known, shlex.join(words)
    assert seen


def strings():
    """All text in the code, with what is filled in as {}."""
    for package in ("nodes", "splam_core", "splam_webui", "training", "harness"):
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr):
                    yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    yield node.value


def test_messages_that_troubleshooting_explains_are_in_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    messages = re.findall(r"^\| `(.+?)` \|", page[page.index("## Messages of the nodes") :], re.M)
    said = "\n".join(strings())
    assert len(messages) > 10
    assert [message for message in messages if message not in said] == []


def test_the_paper_page_names_what_is_public():
    public = set(importlib.import_module("splam_core").__all__)
    page = (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
    rows = [line.rsplit("|", 2)[1] for line in page.splitlines() if line.startswith("| ") and line.count("|") == 4]
    named = {re.match(r"\w+", name)[0] for row in rows for name in re.findall(r"`([A-Za-z_]\w*)[^`/]*`", row)}
    assert named - public <= {"function"}


def test_the_example_on_the_paper_page_is_the_file():
    example = (ROOT / "snippets" / "any_unet.py").read_text(encoding="utf-8")
    assert f"```python\n{example}```" in (ROOT / "docs" / "paper.md").read_text(encoding="utf-8")
