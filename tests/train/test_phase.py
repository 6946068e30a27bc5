"""Data are made before there are networks: by the teacher, and by each process its share."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.data import DataOptions, open_data
from training.data.base import Share
from training.data.latents import Encoder
from training.models.load import load_pipeline
from training.prepare import parse as prepare_flags
from training.prepare import prepare
from training.run import distillation

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train
COUNT = 40


@pytest.fixture
def prompts(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(f"picture number {number}" for number in range(COUNT)))
    return file


@pytest.fixture
def opened(tiny_pipeline, prompts, tmp_path):
    def make(cache="cache", batch_size=4, **changes):
        options = {"prompt_steps": 2, "num_held_out": 4, "cache_dtype": "fp32", "cache_dir": tmp_path / cache}
        spec = str(changes.pop("spec", prompts))
        return open_data(spec, load_pipeline(tiny_pipeline), DataOptions(**options | changes), batch_size, 1)

    return make


def flags(prompts, cache):
    words = ("--data", prompts, "--cache-latents", "--cache-dir", cache, "--cache-dtype", "fp32", "--prompt-steps", 2)
    return (*words, "--num-held-out", 4, "--seed", 0)


def test_the_teacher_draws_what_is_trained_on(small, tiny_pipeline, prompts, opened, tmp_path):
    more = ("--lora", "--lora-rank", 4, "--learning-rate", 0.05, "--validation-samples", 4)
    small(tiny_pipeline, tmp_path / "run", 10, *more, *flags(prompts, tmp_path / "cache"), "--max-grad-norm", 1e9)
    theirs, ours = opened("cache"), opened("other")
    assert theirs.folder.name == ours.folder.name and len(list(theirs.folder.glob("*.tar"))) == 4
    for start in range(0, 20, 4):
        assert torch.equal(theirs.batch(range(start, start + 4))[0], ours.batch(range(start, start + 4))[0])
    assert torch.equal(theirs.held_out(4)[0], ours.held_out(4)[0])


def test_nothing_is_encoded_once_there_are_networks(small, tiny_pipeline, prompts, tmp_path, monkeypatch):
    encode, networks = Encoder.__call__, distillation.LoraNetworks

    def build(*arguments):
        monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded beside the networks"))
        return networks(*arguments)

    monkeypatch.setattr(distillation, "LoraNetworks", build)
    for number, spec in enumerate((("--data", "embedded"), flags(prompts, tmp_path / "cache"))):
        monkeypatch.setattr(Encoder, "__call__", encode)
        more = ("--lora", "--validation-samples", 2, "--prompt-steps", 2)
        small(tiny_pipeline, tmp_path / f"run {number}", 3, *more, *spec)


def test_each_process_makes_its_share(opened, monkeypatch):
    made, encode = {0: [], 1: []}, Encoder.__call__

    def counted(self, records, sizes):
        made[data.index(next(one for one in data if one.encoder is self))] += [record.name for record in records]
        return encode(self, records, sizes)

    monkeypatch.setattr(Encoder, "__call__", counted)
    data = [opened(), opened()]

    class Reached(Exception):
        pass

    def leave():
        raise Reached

    with pytest.raises(Reached):  # the other process, up to where it waits
        data[1].make(36, 4, Share(1, 2, leave))
    data[0].make(36, 4, Share(0, 2, lambda: None))
    assert len(made[0]) == 24 and len(made[1]) == 16 and not set(made[0]) & set(made[1])
    assert not data[0].needs_encoders
    monkeypatch.setattr(Encoder, "__call__", encode)
    whole = opened("whole")
    assert torch.equal(data[0].batch(range(36))[0], whole.batch(range(36))[0])


def test_without_a_cache_the_teachers_pictures_wait_in_memory(opened, monkeypatch):
    data, whole = opened(cache_latents=False), opened(cache_latents=False)
    monkeypatch.setattr("training.data.samples.MEMORY", 1)
    data.make(8, 4, Share(1, 2, lambda: None))
    assert "made before training" in data.describe()
    assert torch.equal(data.batch(range(2, 4))[0], whole.batch(range(2, 4))[0])
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("drawn late"))
    with pytest.raises(ValueError, match="was not drawn before training"):
        data.batch(range(28, 36))
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Memory", (), {"available": 1000}))
    with pytest.raises(ValueError, match=r"more than memory can keep\. Name a --cache-dir"):
        opened(cache_latents=False).make(36, 4, Share())


def test_pictures_that_fit_nowhere_are_encoded_when_they_are_needed(opened, monkeypatch):
    monkeypatch.setattr("training.data.samples.MEMORY", 1)
    data = opened(spec="embedded", cache_latents=False, num_scenes=16)
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("encoded"))
    data.make(16, 4, Share())
    assert data.needs_encoders and "made when first needed" in data.describe()


def test_captions_that_are_cut_are_counted(opened, tiny_pipeline, prompts, tmp_path, capsys):
    prompts.write_text("\n".join("fox " * (20 * number) for number in range(1, 9)))  # from the fourth on too long
    for _ in range(2):  # made, and from the cache
        data = opened(num_held_out=0)
        data.make(8, 0, Share())
        assert "5 with captions cut at 77 tokens" in data.describe()
    words = ("--teacher", tiny_pipeline, "--data", prompts, "--output-dir", tmp_path / "set", "--prompt-steps", "2")
    prepare(*prepare_flags([str(word) for word in words]))
    assert "5 with captions cut at 77 tokens" in capsys.readouterr().out
    assert "5 with captions cut at 77 tokens" in opened(spec=tmp_path / "set").describe()


def test_a_bad_sample_has_its_stand_in_made_before_training(opened, monkeypatch):
    finite = Encoder._kept

    def kept(self, sample, name):
        number = int(name.split()[1].rstrip(","))
        return finite(self, sample | ({"latents": sample["latents"] * float("nan")} if number <= 8 else {}), name)

    monkeypatch.setattr(Encoder, "_kept", kept)
    data = opened(max_skipped_share=0.5)
    data.make(4, 0, Share())  # one group of the five, which is bad
    monkeypatch.setattr(Encoder, "__call__", lambda *_: pytest.fail("drawn late"))
    assert data.batch(range(4))[0].isfinite().all() and len(data.skipped) == 8


@pytest.mark.skipif(sys.platform == "win32", reason="no gloo launcher")
def test_sharded_networks_train_on_prompts(tiny_pipeline, prompts, command_line, opened, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    more = (*flags(prompts, tmp_path / "cache"), "--validation-samples", 4)
    launcher = ("-m", "accelerate.commands.launch", "--config_file", ROOT / "training" / "configs" / "fsdp.yaml")
    command = (sys.executable, *launcher, "--num_processes", 2, "--main_process_port", port)
    arguments = command_line(tiny_pipeline, tmp_path / "run", 4, more=more)
    result = subprocess.run(
        [str(word) for word in (*command, ROOT / "training" / "distill.py", *arguments)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    theirs, ours = opened("cache"), opened("other")
    assert torch.equal(theirs.batch(range(16))[0], ours.batch(range(16))[0])
    assert len((tmp_path / "run" / "log.jsonl").read_text().splitlines()) == 4
