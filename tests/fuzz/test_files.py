"""Hostile files through every way in: they are read, or refused in a sentence that names them. Nothing else happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("resource", reason="memory is measured where the system says it")

from harness.hostile import attack
from harness.reliability import note
from splam_core import load_file
from training.export import export
from training.export import parser as export_parser
from training.models.load import load_pipeline
from training.run.checkpoints import read_checkpoint

from . import targets as ways

pytestmark = pytest.mark.fuzz
MEMORY = 4 * 2**30  # bytes that reading small files may take
SHORT, LONG = range(8), range(10_000, 10_720)
# Seeds that found something, and what reads the file then.
FOUND = {
    "teacher folder": (10, 14, 22, 10124, 10210),
    "teacher file": (15, 19, 31),
    "teacher in shards": (2, 6, 14, 18, 24),
    "LoRA of peft": (4, 10006, 10684),
    "export of a folder": (16, 17, 20, 10030, 10120, 10127),
    "export of a LoRA": (1, 30),
    "checkpoint": (48,),
    "results": (42,),
    "statistics": (10042,),
    "captions": (10143, 10145, 10320),
    "prepared set": (11, 13, 14, 15, 17, 20, 24, 37, 10015, 10105, 10530),
    "kept paths": (10161,),
    "conversion of a file": (2, 50),
    "conversion of shards on a base": (4,),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPLAM_CACHE", str(folder / "cache"))
        found = ways.Corpus(folder / "corpus")
        patch.chdir(found.folder)
        yield found


def attacked(corpus, targets, seeds, found=()):
    """Reports of all targets. Nothing is written but where the reader was told to."""
    reports = []
    for target in targets:
        before = places(corpus)
        reports.append(attack(target, (*seeds, *dict(found).get(target.name, ()))))
        assert places(corpus) == before, f"{target.name} wrote elsewhere"
    return reports


def places(corpus):
    files = (file for file in corpus.folder.parent.rglob("*") if corpus.inside not in file.parents)
    return sorted(str(file) for file in files)


KINDS = {"trainer": ways.training_targets, "data": ways.data_targets, "conversion": ways.webui_targets}


@pytest.mark.parametrize("kind", KINDS)
def test_hostile_files_are_read_or_refused_in_a_sentence(corpus, kind):
    reports = attacked(corpus, KINDS[kind](corpus), SHORT, FOUND.items())
    assert [fault for report in reports for fault in report.faults] == []
    assert sum(report.refused for report in reports) > 0 and sum(report.read for report in reports) > 0
    assert max(report.memory for report in reports) < MEMORY


@pytest.mark.comfyui
def test_hostile_files_in_comfyui(tmp_path):
    assert [fault for report in in_comfyui(tmp_path, SHORT) for fault in report["faults"]] == []


def in_comfyui(folder, seeds):
    if not os.environ.get("COMFYUI_PATH"):
        pytest.skip("COMFYUI_PATH names no ComfyUI; `python dev.py test` sets it")
    corpus = ways.Corpus(folder / "corpus")
    script = Path(__file__).with_name("comfyui_loaders.py")
    command = [script, os.environ["COMFYUI_PATH"], folder, seeds.start, seeds.stop]
    run = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-2000:]
    assert not corpus.pickle.exists()
    return [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]


def test_a_pickle_is_opened_by_nothing(corpus):
    """Under any name: each would make a folder if its code ran."""
    for file in ways.write_pickles(corpus):
        for read in (load_file, load_pipeline, lambda f: ways.convert(f, "x", corpus.inside, corpus.inside)):
            with pytest.raises((ValueError, FileNotFoundError), match=r"expected .*safetensors"):
                read(file)
        with pytest.raises((ValueError, FileNotFoundError)):
            output = corpus.inside / "y.safetensors"
            export(export_parser().parse_args([str(file), "--to", "single-file", "--output", str(output)]))
    folder = corpus.folder / "checkpoint-1"
    if not folder.is_dir():
        ways.training_targets(corpus)
    optimizer = folder / "optimizer.pt"
    kept = optimizer.read_bytes()
    optimizer.write_bytes((corpus.folder / "a.pt").read_bytes())
    with pytest.raises(ValueError, match=r"checkpoint-1 cannot be read"):
        read_checkpoint(folder)
    optimizer.write_bytes(kept)
    assert not corpus.pickle.exists()


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.parametrize("kind", KINDS)
def test_many_hostile_files(corpus, kind):
    reports = attacked(corpus, KINDS[kind](corpus), LONG)
    faults = [fault for report in reports for fault in report.faults]
    noted(kind, [vars(report) for report in reports])
    assert not faults, "\n".join(faults)
    assert max(report.memory for report in reports) < MEMORY


@pytest.mark.long
@pytest.mark.timeout(0)
@pytest.mark.comfyui
def test_many_hostile_files_in_comfyui(tmp_path):
    reports = in_comfyui(tmp_path, LONG)
    noted("comfyui", reports)
    assert [fault for report in reports for fault in report["faults"]] == []


def noted(kind, reports):
    note(
        f"hostile files: {kind}",
        {
            "fuzz_files": sum(report["files"] for report in reports),
            "fuzz_failures": sum(len(report["faults"]) for report in reports),
            "fuzz_read": sum(report["read"] for report in reports),
            "fuzz_refused": sum(report["refused"] for report in reports),
            "fuzz_memory_mb": max(report["memory"] for report in reports) // 10**6,
        },
    )
