"""Two processes are one with a batch of twice the size, with whole weights or with shards of them."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from training.run import distillation
from training.run.config import parse
from training.run.processes import join_processes
from training.run.sharding import sharding_mesh

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "training" / "configs"
FSDP = "fsdp.yaml"
pytestmark = [pytest.mark.train, pytest.mark.skipif(sys.platform == "win32", reason="no gloo launcher")]
# One step of plain gradient descent: what it moves the weights by is the learning rate times the gradient.
DESCENT = """
import sys
import torch
import training.run.distillation
def build(name, parameters, learning_rate, *_):
    return torch.optim.SGD(parameters, learning_rate)
training.run.distillation.build_optimizer = build
from training.run.config import parse
from training.distill import distill
distill(parse(sys.argv[1:]))
"""


# Each process leaves how much it holds of every role.
HOLDINGS = """
import json, sys
from pathlib import Path
import training.run.loop
from training.run.config import parse
from training.distill import distill
from training.run.sharding import own_shards
config, update = parse(sys.argv[1:]), training.run.loop.update_averages
def holdings(networks, *rest):
    held = {role: networks.weights(role) for role in ("student", "target", "release")}
    held["teacher"] = own_shards(networks.teacher.state_dict())
    sizes = {role: sum(weight.numel() for weight in weights.values()) for role, weights in held.items()}
    config.output_dir.mkdir(parents=True, exist_ok=True)
    Path(config.output_dir, f"held-{torch.distributed.get_rank()}.json").write_text(json.dumps(sizes))
    update(networks, *rest)
import torch
training.run.loop.update_averages = holdings
distill(config)
"""


def descent(_, parameters, rate, *__):
    """The same for the process of the test."""
    return torch.optim.SGD(parameters, rate)


def launch(arguments, processes, script, config=None):
    """With a file of training/configs, or plainly."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = (
        [
            sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / config),
            "--num_processes", str(processes), "--main_process_port", str(port), str(script), *arguments,
        ]
        if config
        else [
            sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes),
            "--master-port", str(port), str(script), *arguments,
        ]
    )  # fmt: skip
    # accelerate launch asks a CPU to be named; torchrun does not say, and a machine may have no GPU.
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"ACCELERATE_USE_CPU": "true"} if config else {}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]


@pytest.mark.parametrize(
    ("mode", "config"),
    [
        ((), None),
        (("--lora", "--lora-rank", "4"), None),
        (("--gradient-checkpointing", "--gradient-accumulation-steps", "2"), FSDP),
    ],
)
def test_two_processes_of_n_have_the_gradient_of_one_of_2n(
    small, command_line, tiny_pipeline, tmp_path, monkeypatch, mode, config
):
    script, two, one = tmp_path / "descent.py", tmp_path / "two", tmp_path / "one"
    script.write_text(DESCENT)
    options = (*mode, "--learning-rate", "1", "--lr-scheduler", "constant", "--max-grad-norm", "1e9")
    launch(command_line(tiny_pipeline, two, 1, more=(*options, "--train-batch-size", "2")), 2, script, config)
    monkeypatch.setattr(distillation, "build_optimizer", descent)
    small(tiny_pipeline, one, 1, *options, "--train-batch-size", 4)
    results = {}
    for name, out in (("two", two), ("one", one)):
        assert json.loads((out / "checkpoint-1" / "state.json").read_text())["samples"] == (8 if "2" in mode else 4)
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


@pytest.mark.parametrize(("mode", "config"), [(("--lora", "--lora-rank", "4"), None), ((), FSDP)])
def test_two_processes_finish_as_one_with_twice_the_batch(
    small, command_line, tiny_pipeline, tmp_path, monkeypatch, mode, config
):
    """By one step of plain gradient descent of the student, and two of the fake network, at rates too low to matter."""
    script, two, one = tmp_path / "descent.py", tmp_path / "two", tmp_path / "one"
    script.write_text(DESCENT)
    options = (
        *mode, "--finish", "distribution-matching", "--finish-steps", "1", "--finish-warmup-steps", "1",
        "--finish-learning-rate", "1", "--fake-learning-rate", "1e-3", "--max-grad-norm", "1e9",
        "--teacher-dtype", "fp32", "--gradient-checkpointing",
    )  # fmt: skip
    launch(command_line(tiny_pipeline, two, 0, more=options), 2, script, config)
    monkeypatch.setattr(distillation, "build_optimizer", descent)
    small(tiny_pipeline, one, 0, *options, "--train-batch-size", 4)
    (found,), (expected,) = ((out / "log.jsonl").read_text().splitlines() for out in (two, one))
    for name in ("loss", "fake_loss", "gradient_norm", "unet_forwards"):
        assert json.loads(found)[name] == pytest.approx(json.loads(expected)[name], rel=1e-4), name
    for role in ("student", "fake"):
        wanted, got = (load_file(out / "checkpoint-1" / f"{role}.safetensors") for out in (one, two))
        begun = load_file(one / "checkpoint-1" / "start.safetensors")
        if role == "fake" and not mode:
            begun = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
        moved = [(wanted[key] - begun[key]).abs().max() for key in wanted if role == "student" or not mode]
        largest = max(moved) if moved else 1e-3 * max(weight.abs().max() for weight in wanted.values())
        assert wanted.keys() == got.keys() and largest > 0
        for key, weight in wanted.items():
            assert (got[key] - weight).abs().max() < 1e-3 * largest, f"{role}: {key}"


@pytest.fixture(scope="module")
def sharded(command_line, tiny_pipeline, tmp_path_factory):
    """A run of 12 steps in two processes' shards, with all that is shown: its folder."""
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "holdings.py").write_text(HOLDINGS)
    (folder / "prompts.txt").write_text("a soccer ball on a red background\n")  # one: a sheet takes many steps
    out, more = folder / "out", (*SHOWN, "--sample-prompts", str(folder / "prompts.txt"))
    launch(command_line(tiny_pipeline, out, 12, more=more), 2, folder / "holdings.py", FSDP)
    return out


SHOWN = (
    "--checkpointing-steps", "11", "--sample-every", "12", "--validation-samples", "4", "--lr-scheduler", "constant",
    "--skip", "40",
)  # fmt: skip


def read_lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_each_process_holds_its_share(sharded):
    held = [json.loads((sharded / f"held-{rank}.json").read_text()) for rank in range(2)]
    for role, name in (("student", "student"), ("target", "target"), ("release", "release"), ("teacher", None)):
        file = sharded / "checkpoint-12" / f"{name}.safetensors" if name else sharded / "pipeline" / "unet"
        weights = load_file(file if name else file / "diffusion_pytorch_model.safetensors")
        whole = sum(weight.numel() for weight in weights.values())
        assert sum(one[role] for one in held) == whole, role
        assert max(one[role] for one in held) < 0.6 * whole, role


def test_shards_train_show_and_export_as_one_process_does(small, tiny_pipeline, sharded, tmp_path):
    prompts = sharded.parent / "prompts.txt"
    small(tiny_pipeline, tmp_path, 12, *SHOWN, "--train-batch-size", 4, "--sample-prompts", prompts)
    for ours, theirs in zip(read_lines(sharded / "log.jsonl"), read_lines(tmp_path / "log.jsonl"), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)
    (ours,), (theirs,) = (read_lines(folder / "validation.jsonl") for folder in (sharded, tmp_path))
    assert ours == pytest.approx(theirs, rel=1e-4)
    begun = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    for role in ("student", "target", "release"):
        ours, theirs = (load_file(out / "checkpoint-12" / f"{role}.safetensors") for out in (sharded, tmp_path))
        # Adam divides gradients by their size, so that where they are near 0 rounding shows: compared in the mean.
        apart = sum((ours[key] - weight).abs().sum() for key, weight in theirs.items())
        moved = sum((theirs[key] - weight).abs().sum() for key, weight in begun.items())
        assert moved > 0 and apart < 0.01 * moved, role
    best = json.loads((sharded / "best" / "state.json").read_text())["role"]
    exported = load_file(sharded / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    finished = load_file(sharded / "checkpoint-12" / f"{best}.safetensors")
    for key, weight in exported.items():
        assert torch.equal(weight, finished[key].to(weight.dtype)), key
    assert (sharded / "sheet-000012.png").stat().st_size > 1000


@pytest.mark.parametrize("processes", [2, 1])
def test_a_checkpoint_of_shards_goes_on(small, command_line, tiny_pipeline, sharded, tmp_path, processes):
    shutil.copytree(sharded / "checkpoint-11", tmp_path / "checkpoint-11")
    more = (*SHOWN, "--validation-samples", "0", "--sample-every", "0", "--resume-from-checkpoint", "latest")
    if processes == 2:
        arguments = command_line(tiny_pipeline, tmp_path, 12, more=more)
        launch(arguments, 2, ROOT / "training" / "distill.py", FSDP)
    else:
        small(tiny_pipeline, tmp_path, 12, *more, "--train-batch-size", 4)
    loss = read_lines(tmp_path / "log.jsonl")[-1]["loss"]
    assert loss == pytest.approx(read_lines(sharded / "log.jsonl")[-1]["loss"], rel=0 if processes == 2 else 1e-5)
    for role in ("student", "target", "release"):
        ours, theirs = (load_file(out / "checkpoint-12" / f"{role}.safetensors") for out in (tmp_path, sharded))
        for key, weight in theirs.items():
            # The same processes: the same bits. Other ones: two roundings of a weight near 1.
            assert (ours[key] - weight).abs().max() <= (0 if processes == 2 else 2.4e-7), (role, key)


@pytest.mark.parametrize(
    ("arguments", "version", "expected"),
    [
        (["--lora"], "2", "ddp.yaml"),
        (["--optimizer", "adafactor"], "2", "adamw"),
        (["--compile"], "2", "--compile"),
        ([], "1", "fsdp_version: 2"),
    ],
)
def test_what_shards_do_not_go_with_is_refused(monkeypatch, tmp_path, arguments, version, expected):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", version)
    config = parse(["--teacher", "embedded", "--output-dir", str(tmp_path), "--mixed-precision", "no", *arguments])
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match=expected):
            sharding_mesh(config, None)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({"ACCELERATE_USE_DEEPSPEED": "true"}, "fsdp.yaml"), ({"WORLD_SIZE": "2"}, "form no group")],
)
def test_processes_that_form_no_group_are_refused(monkeypatch, environment, expected):
    """An accelerator for which accelerate has no way to talk, as Apple's, leaves each process alone."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    with pytest.raises(ValueError, match=expected):
        join_processes()


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="process 2 of this machine finds no GPU of its own: start 1"):
        join_processes()


# One process alone has a gradient that is not finite at step 2, under a finite loss, and is asked to stop at step 4.
ALONE = """
import os, signal, sys
from pathlib import Path
from training.distill import distill
from training.run.config import parse
from training.run.consistency import Consistency
from training.run.stopping import StoppedError, StopRequest
config, rank, losses, calls = parse(sys.argv[1:]), int(os.environ["RANK"]), Consistency.losses, []
def spoilt(stage, *batch):
    calls.append(1)
    if rank == 1 and len(calls) == 4:
        os.kill(os.getpid(), signal.SIGTERM)
    for role, loss in losses(stage, *batch):
        weight = next(stage.networks.student.parameters()).flatten()[0]
        yield role, loss + (weight * 0).sqrt() if rank == 1 and len(calls) == 2 else loss
Consistency.losses = spoilt
try:
    distill(config, StopRequest())
except StoppedError as error:
    Path(config.output_dir, f"stopped-{rank}").write_text(str(error))
"""


def test_what_happens_to_one_process_happens_to_all(command_line, tiny_pipeline, tmp_path):
    script, out = tmp_path / "alone.py", tmp_path / "out"
    script.write_text(ALONE)
    launch(command_line(tiny_pipeline, out, 9), 2, script)
    lines = read_lines(out / "log.jsonl")
    assert [line["skipped"] for line in lines] == [0, 1, 1, 1]
    assert [line["gradient_norm"] is None for line in lines] == [False, True, False, False]
    assert all(line["loss"] is not None for line in lines)
    student = load_file(out / "checkpoint-4" / "student.safetensors")
    assert all(weight.isfinite().all() for weight in student.values())
    for rank in range(2):
        assert "stopped at step 4" in (out / f"stopped-{rank}").read_text()
