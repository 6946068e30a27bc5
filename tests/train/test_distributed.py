"""Two processes are one with a batch of twice the size."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training import trainer

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.train, pytest.mark.skipif(sys.platform == "win32", reason="no gloo launcher")]
# One step of plain gradient descent: what it moves the weights by is the learning rate times the gradient.
DESCENT = """
import sys
import torch
import training.optimizers, training.trainer
def build(name, parameters, learning_rate, *_):
    return torch.optim.SGD(parameters, learning_rate)
training.trainer.build_optimizer = build
from training.config import parse
from training.distill import distill
distill(parse(sys.argv[1:]))
"""


def launch(arguments, processes, script):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port),
        str(script), *arguments,
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize("mode", [(), ("--lora", "--lora-rank", "4")])
def test_two_processes_of_n_have_the_gradient_of_one_of_2n(
    small, command_line, tiny_pipeline, tmp_path, monkeypatch, mode
):
    script, two, one = tmp_path / "descent.py", tmp_path / "two", tmp_path / "one"
    script.write_text(DESCENT)
    options = (*mode, "--learning-rate", "1", "--lr-scheduler", "constant", "--max-grad-norm", "1e9")
    launch(command_line(tiny_pipeline, two, 1, more=(*options, "--train-batch-size", "2")), 2, script)
    monkeypatch.setattr(trainer, "build_optimizer", lambda _, parameters, rate, *__: torch.optim.SGD(parameters, rate))
    small(tiny_pipeline, one, 1, *options, "--train-batch-size", 4)
    results = {}
    for name, out in (("two", two), ("one", one)):
        assert json.loads((out / "checkpoint-1" / "state.json").read_text())["samples"] == 4
        results[name] = load_file(out / "checkpoint-1" / "student.safetensors")
        (line,) = (out / "log.jsonl").read_text().splitlines()
        results[name + " loss"] = json.loads(line)["loss"]
    assert results["two loss"] == pytest.approx(results["one loss"], rel=1e-5)
    begun = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    # Sums over processes differ from sums over a batch by rounding: at most 1e-4 of the largest gradient.
    moved = {key: weight - begun[key] if key in begun else weight for key, weight in results["one"].items()}
    largest = max(weight.abs().max() for weight in moved.values())
    assert largest > 1e-3
    for key, weight in results["one"].items():
        assert (results["two"][key] - weight).abs().max() < 1e-4 * largest, key
    assert any(not torch.equal(results["two"][key], begun.get(key, torch.zeros(1))) for key in moved)
