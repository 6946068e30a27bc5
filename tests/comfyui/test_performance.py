"""What SPLAM's nodes cost, counted, not timed; and the file that the measurements share."""

import json

import pytest

from benchmarks.performance import paired_row, write_rows
from benchmarks.sampling import Host, measure

pytestmark = pytest.mark.comfyui


def test_a_step_is_one_evaluation_of_the_unet(comfyui, tmp_path):
    found = Host(comfyui, tmp_path).ask("sampling", "embedded-student", 8, 1)
    assert found["evaluations"] == {"ours": 4, "stock": 4, "bare": 4}
    assert {len(found[name]) for name in ("ours", "stock", "bare")} == {1}


def test_the_pack_imports_nothing_of_torch_that_the_host_has_not(comfyui, tmp_path):
    ((row,),) = measure(Host(comfyui, tmp_path), ["import-time"], False, 1)  # which raises where it does
    assert row["benchmark"] == "import-time" and row["ours"] > 0 and row["peer"] > 0


def test_rows_of_other_benchmarks_stay_in_the_file(tmp_path):
    file = tmp_path / "results" / "performance.json"
    one, other = (paired_row(name, "tiny", [2.0, 3.0], [1.0, 1.0], "s") for name in ("one", "other"))
    write_rows(file, [one, other])
    write_rows(file, [one | {"ours": 5.0}])
    assert json.loads(file.read_text()) == [other, one | {"ours": 5.0}]
    assert other["ratio"] == 2.5 and other["spread"] == [2.25, 2.75]
    with pytest.raises(ValueError, match="A row has the keys"):
        write_rows(file, [{"benchmark": "one"}])
