"""The page of versions says what was measured, and the requirements claim no older package than was tried."""

import json
import re
from datetime import date
from pathlib import Path

import pytest

from benchmarks import versions

ROOT = Path(__file__).resolve().parents[2]
ROWS = json.loads((ROOT / "docs" / "results" / "versions.json").read_text(encoding="utf-8"))
pytestmark = pytest.mark.train


def test_the_page_is_the_table_of_the_results():
    page = versions.PAGE.read_text(encoding="utf-8")
    assert page.partition(versions.BEGIN)[2].partition(versions.END)[0] == versions.table(ROWS)


def test_every_kind_was_run_and_passed():
    assert ROWS.keys() >= versions.KINDS.keys() and any(name.startswith("ComfyUI 0.3.75") for name in ROWS)
    for name, row in ROWS.items():
        date.fromisoformat(row["date"])
        results = [row.get(check) for check in versions.CHECKS]
        assert results.count(None) == (1 if name in versions.KINDS else 3) and "failed" not in results, name
        assert all(re.match(r"passed|\d+ passed", result) for result in results if result), name


def test_the_oldest_packages_are_those_that_are_claimed():
    claimed = dict(re.findall(r"^([a-z_]+)>=([\d.]+)", (ROOT / "requirements-train.txt").read_text("utf-8"), re.M))
    for package in set(versions.PACKAGES) & claimed.keys():
        found, wanted = (
            tuple(map(int, re.findall(r"\d+", text.partition("+")[0])))
            for text in (ROWS["oldest packages"][package], claimed[package])
        )
        assert found[: len(wanted)] == wanted, package
    library = re.search(r'"torch>=([\d.]+)"', (ROOT / "pyproject.toml").read_text("utf-8"))
    assert ROWS["oldest packages"]["torch"].startswith(library[1])
    claims = (ROOT / "pyproject.toml").read_text("utf-8")
    assert f'requires-python = ">={versions.PYTHONS[0]}"' in claims
    assert ROWS["oldest packages"]["python"].startswith(versions.PYTHONS[0])


def test_pytests_count_is_kept_without_its_time():
    assert versions.passed("....\n3 passed, 1 skipped, 2 warnings in 2.31s\n") == "3 passed, 1 skipped"
    assert versions.passed("== 12 passed, 2 deselected in 61.20s (0:01:01) ==") == "12 passed, 2 deselected"
