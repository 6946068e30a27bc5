"""Whatever ends a run, it goes on as if nothing had happened, or says what did."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from training.run.checkpoints import CheckpointError, checkpoints, latest_checkpoint
from training.run.loop import EXPLOSION, WINDOW, Distillation

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train
STEPS = 14


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
@pytest.mark.parametrize("mode", [(), ("--lora", "--lora-rank", 4)])
def test_killed_at_any_moment_it_is_the_same_run(small, command_line, tiny_pipeline, tmp_path, mode):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    more = (*mode, "--checkpointing-steps", 1)
    small(tiny_pipeline, whole, STEPS, *more)
    arguments = command_line(tiny_pipeline, cut, STEPS, more=(*more, "--resume-from-checkpoint", "latest"))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "training" / "distill.py"), *arguments], stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    wanted = random.SystemRandom().randrange(1, STEPS - 2)
    while process.poll() is None and len((latest_checkpoint(cut) or Path("")).name) <= 0:
        time.sleep(0.01)
    while process.poll() is None and int(latest_checkpoint(cut).name.removeprefix("checkpoint-")) < wanted:
        time.sleep(0.003)
    time.sleep(random.SystemRandom().random() * 0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    small(tiny_pipeline, cut, STEPS, *more, "--resume-from-checkpoint", "latest")
    assert losses(cut) == losses(whole)
    finished = [folder / f"checkpoint-{STEPS}" for folder in (whole, cut)]
    for name in ("student", "target", "release"):
        one, other = ((folder / f"{name}.safetensors").read_bytes() for folder in finished)
        assert one == other
    assert not list(cut.glob("*.partial"))


def test_a_full_disk_says_so_and_keeps_the_last(small, tiny_pipeline, tmp_path, monkeypatch):
    small(tiny_pipeline, tmp_path, 1)
    before = (tmp_path / "checkpoint-1" / "optimizer.pt").read_bytes()
    real = torch.save

    def full(state, file):
        real(state, file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints.torch, "save", full)
    with pytest.raises(CheckpointError, match=r"the disk is full .* last good checkpoint is .*checkpoint-1\b"):
        small(tiny_pipeline, tmp_path, 3, "--checkpointing-steps", 2, "--resume-from-checkpoint", "latest")
    assert [folder.name for folder in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert (tmp_path / "checkpoint-1" / "optimizer.pt").read_bytes() == before
    monkeypatch.undo()
    small(tiny_pipeline, tmp_path, 3, "--resume-from-checkpoint", "latest")
    assert len(losses(tmp_path)) == 3


def test_a_loss_that_is_not_finite_names_the_last_good_checkpoint(small, tiny_pipeline, tmp_path):
    with pytest.raises(FloatingPointError, match=r"Lower --learning-rate; the last good checkpoint is .*checkpoint-1"):
        small(tiny_pipeline, tmp_path, 9, "--checkpointing-steps", 1, "--learning-rate", "1e30")


def test_an_exploding_loss_stops():
    run = SimpleNamespace(recent=[], least=None, step=0, config=SimpleNamespace(output_dir=Path("nowhere")))
    for loss in [0.1, 0.3] * WINDOW + [5.0, 0.2] * WINDOW:  # what a run does between large and small timesteps
        Distillation._watch(run, loss)
    with pytest.raises(FloatingPointError, match="has risen to"):
        for _ in range(WINDOW):
            Distillation._watch(run, 0.2 * EXPLOSION * 2)


def test_old_checkpoints_go_and_the_best_stays(small, tiny_pipeline, tmp_path):
    small(
        tiny_pipeline, tmp_path, 4, "--checkpointing-steps", 1, "--checkpoints-total-limit", 2,
        "--validation-samples", 4, "--skip", 500, "--solver-skip", 500,
    )  # fmt: skip
    assert sorted(folder.name for folder in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]
    best = json.loads((tmp_path / "best" / "state.json").read_text())
    lines = [json.loads(line) for line in (tmp_path / "validation.jsonl").read_text().splitlines()]
    lowest = min(min(line["validation/target/loss"], line["validation/release/loss"]) for line in lines)
    assert best["loss"] == lowest


def test_what_is_no_checkpoint_is_refused(small, tiny_pipeline, tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint: expected state"):
        small(tiny_pipeline, tmp_path, 1, "--resume-from-checkpoint", tmp_path)
