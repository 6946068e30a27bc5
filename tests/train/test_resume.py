"""Whatever ends a run, it goes on as if nothing had happened, or says what did."""

import errno
import gc
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from splam_core.descent import EXPLOSION, WINDOW, LossWatch
from training.run import loop
from training.run.checkpoints import (
    CheckpointError,
    latest_checkpoint,
    latest_whole,
    load_objects,
    read_checkpoint,
    verify,
    write_checkpoint,
)
from training.run.config import complete
from training.run.identity import Origin, changes_since, only_writer, weights_digest
from training.run.report import keep_log
from training.run.sharding import OptimizerState
from training.run.stopping import StopRequest

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


def damage(file, how):
    """A byte turned, the end cut off, or nothing left."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes({"flipped": bytes(content), "cut": bytes(content[:-9]), "emptied": b""}[how])


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.pt", "state.json", "sha256sums.txt", "gone"])
def test_a_damaged_checkpoint_is_noticed_by_its_hash(tmp_path, name, how):
    states = {"student": {"weight": torch.ones(64)}, "optimizer": {"state": {1: torch.ones(64)}}}
    for step in (1, 2):
        write_checkpoint(tmp_path / f"checkpoint-{step}", states, {"step": step})
    verify(tmp_path / "checkpoint-2")
    if name == "gone":
        (tmp_path / "checkpoint-2" / "student.safetensors").unlink()
    else:
        damage(tmp_path / "checkpoint-2" / name, how)
    if (name, how) == ("sha256sums.txt", "emptied"):  # as one of an earlier version
        verify(tmp_path / "checkpoint-2")
        return
    with pytest.raises(CheckpointError, match=r"checkpoint-2 is damaged: .* has the SHA-256 .*another checkpoint"):
        verify(tmp_path / "checkpoint-2")
    found, said = latest_whole(tmp_path)
    assert found == tmp_path / "checkpoint-1" and "checkpoint-2 is damaged" in said[0] and "the one before" in said[0]
    assert sorted(one.name for one in tmp_path.iterdir()) == ["checkpoint-1", "checkpoint-2.damaged"]


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(small, tiny_pipeline, tmp_path, capsys):
    whole, hurt = tmp_path / "whole", tmp_path / "hurt"
    for folder in (whole, hurt):
        small(tiny_pipeline, folder, 4, "--checkpointing-steps", 2)
    damage(hurt / "checkpoint-4" / "target.safetensors", "flipped")
    with pytest.raises(ValueError, match="checkpoint-4 is damaged: target"):
        small(tiny_pipeline, hurt, 6, "--resume-from-checkpoint", hurt / "checkpoint-4")
    capsys.readouterr()
    small(tiny_pipeline, hurt, 6, "--resume-from-checkpoint", "latest", "--checkpoints-total-limit", 1)
    said = capsys.readouterr().out
    assert "checkpoint-4 is damaged" in said and f"resumed {hurt / 'checkpoint-2'}" in said
    small(tiny_pipeline, whole, 6, "--resume-from-checkpoint", "latest")
    assert losses(hurt) == losses(whole) and latest_checkpoint(hurt).name == "checkpoint-6"
    for name in ("student", "target", "release"):
        one, other = ((folder / "checkpoint-6" / f"{name}.safetensors").read_bytes() for folder in (whole, hurt))
        assert one == other


def test_a_folder_that_lost_its_name_gets_it_back(tmp_path):
    """Killed between the two renamings of `whole_folder`."""
    write_checkpoint(tmp_path / "best", {"student": {"weight": torch.ones(1)}}, {"step": 1})
    (tmp_path / "best").rename(tmp_path / "best.old")
    assert latest_whole(tmp_path) == (None, [])
    assert read_checkpoint(tmp_path / "best")[1] == {"step": 1}


def test_a_log_is_whole_whatever_ends_the_run(tmp_path, monkeypatch):
    """It is read and written again at every resume: killed then, it must not be empty."""
    log = tmp_path / "log.jsonl"
    log.write_text("".join(f'{{"step": {step}, "loss": 1}}\n' for step in (1, 2, 3)))

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        keep_log(log, 2)
    assert len(losses(tmp_path)) == 3
    monkeypatch.undo()
    keep_log(log, 2)
    assert len(losses(tmp_path)) == 2


def test_a_full_disk_says_so_and_keeps_the_last(small, tiny_pipeline, tmp_path, monkeypatch):
    small(tiny_pipeline, tmp_path, 1)
    before = (tmp_path / "checkpoint-1" / "optimizer.pt").read_bytes()
    real = torch.save

    def full(state, file):
        real(state, file)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
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
    watch = LossWatch()
    for loss in [0.1, 0.3] * WINDOW + [5.0, 0.2] * WINDOW:  # what a run does between large and small timesteps
        assert watch.fault(loss) is None
    assert "has risen to" in [watch.fault(0.2 * EXPLOSION * 2) for _ in range(WINDOW)][-1]


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


@pytest.fixture(scope="module")
def begun(small, tiny_pipeline, tmp_path_factory):
    """A run of one step, full and LoRA: their folders."""
    folder = tmp_path_factory.mktemp("begun")
    small(tiny_pipeline, folder / "full", 1)
    small(tiny_pipeline, folder / "lora", 1, "--lora", "--lora-rank", 4)
    return folder


def state_of(folder):
    return {file: file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file() and file.name != ".lock"}


@pytest.mark.parametrize(
    ("kind", "more", "named"),
    [
        ("full", ["--method", "lcm"], "--method splam -> lcm"),
        ("full", ["--guidance-scale", "5"], "--guidance-scale 3.0 -> 5.0"),
        ("full", ["--seed", "7"], "--seed 0 -> 7"),
        ("full", ["--skip", "100"], "--skip 150 -> 100"),
        ("full", ["--solver", "ddim"], "--solver dpm-solver"),
        ("full", ["--recipe", "paper"], "--gamma-conditioning noise-level -> embedding"),
        ("full", ["--optimizer", "adafactor"], "--optimizer adamw -> adafactor"),
        ("full", ["--lora"], "--lora False -> True"),
        ("full", ["--release-decay", "0"], "release: this run has none"),
        ("lora", ["--lora", "--lora-rank", "4", "--lora-alpha", "64"], "--lora-alpha None -> 64"),
        ("lora", ["--lora", "--lora-rank", "8"], "--lora-rank 4 -> 8"),
    ],
)
def test_another_run_is_not_taken_up(small, tiny_pipeline, begun, tmp_path, kind, more, named):
    checkpoint = begun / kind / "checkpoint-1"
    with pytest.raises(ValueError, match=f"checkpoint-1 does not fit this run: .*{named}"):
        small(tiny_pipeline, tmp_path / "out", 2, *more, "--resume-from-checkpoint", checkpoint)


def test_a_teacher_is_known_by_its_weights_not_by_its_path(small, tiny_pipeline, begun, tmp_path):
    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(tiny_pipeline, moved)
    shutil.copytree(tiny_pipeline, other)
    weights = load_file(other / "unet" / "diffusion_pytorch_model.safetensors")
    weights["conv_out.bias"][0] += 1e-3
    save_file(weights, other / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    resume = ("--resume-from-checkpoint", begun / "full" / "checkpoint-1")
    small(moved, tmp_path / "out", 2, *resume)
    with pytest.raises(ValueError, match=r"its teacher has other weights .* than --teacher .*other"):
        small(other, tmp_path / "another", 2, *resume)
    value = {"a": torch.tensor([1.0, 1.001])}
    assert weights_digest(value, torch.float32) != weights_digest({"a": value["a"].bfloat16()}, torch.float32)
    assert weights_digest(value, torch.bfloat16) == weights_digest({"a": value["a"].bfloat16()}, torch.bfloat16)


def test_what_may_change_is_taken_and_said(small, tiny_pipeline, begun, tmp_path, capsys):
    changed = ("--learning-rate", "1e-4", "--weight-decay", "0.25", "--adam-beta1", "0.5", "--checkpointing-steps", 7)
    small(tiny_pipeline, tmp_path, 2, *changed, "--resume-from-checkpoint", begun / "full" / "checkpoint-1")
    said = capsys.readouterr().out
    for text in (
        "--max-train-steps 1 -> 2", "--learning-rate 8e-06 -> 0.0001", "--weight-decay 0.0 -> 0.25",
        "--adam-beta1 0.9 -> 0.5", "--checkpointing-steps 500 -> 7",
    ):  # fmt: skip
        assert f"changed since: {text}" in said
    (group,) = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)["param_groups"]
    assert (group["weight_decay"], group["betas"]) == (0.25, (0.5, 0.999))


def test_another_batch_begins_with_one_of_one_size(small, tiny_pipeline, tmp_path):
    """Three samples were seen, and in batches of two the third and the fourth may be of two aspects."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        size = (128, 128) if number % 2 else (160, 96)
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        (folder / f"{number:02d}.txt").write_text(f"picture {number}")
    data = ("--data", folder, "--buckets", "--num-held-out", 0)
    small(tiny_pipeline, tmp_path / "run", 1, *data, "--train-batch-size", 3)
    resume = ("--train-batch-size", 2, "--resume-from-checkpoint", "latest")
    small(tiny_pipeline, tmp_path / "run", 8, *data, *resume)
    assert json.loads((tmp_path / "run" / "checkpoint-8" / "state.json").read_text())["samples"] == 4 + 7 * 2


@pytest.mark.parametrize("resume", ["latest", "checkpoint-2"])
def test_what_a_smaller_batch_has_yet_to_see_is_drawn_before_it_goes_on(small, tiny_pipeline, tmp_path, resume):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"a small red ring number {number}\n" for number in range(60)))
    data = ("--data", prompts, "--prompt-steps", 1, "--num-held-out", 0)
    small(tiny_pipeline, tmp_path / "run", 2, *data, "--train-batch-size", 12)
    resume = tmp_path / "run" / resume if resume != "latest" else resume
    small(tiny_pipeline, tmp_path / "run", 4, *data, "--train-batch-size", 4, "--resume-from-checkpoint", resume)
    assert len(losses(tmp_path / "run")) == 4


def test_a_lora_in_another_precision_is_told_which(tmp_path):
    config = complete({"teacher": "embedded", "lora": True, "mixed_precision": "fp16", "teacher_dtype": "fp16"})
    facts = {"config": config.settings() | {"mixed_precision": "bf16", "teacher_dtype": "bf16"}, "step": 1}
    facts |= {"teacher_hash": "0123456789abcdef in bfloat16", "teacher_loras": None, "student_hash": None}
    origin = Origin("fedcba9876543210 in float16", None, None)
    with pytest.raises(ValueError, match=r"in bfloat16, .* in float16: give --mixed-precision bf16 and --teacher"):
        changes_since(config, origin, facts)


def test_a_used_folder_is_left_as_it_is(small, tiny_pipeline, begun, tmp_path):
    used = tmp_path / "used"
    shutil.copytree(begun / "full", used)
    before = state_of(used)
    with pytest.raises(ValueError, match=r"holds another run \(checkpoint-1, log.jsonl, pipeline\).*another --output"):
        small(tiny_pipeline, used, 1)
    with pytest.raises(ValueError, match="holds another run"):
        small(tiny_pipeline, used, 2, "--resume-from-checkpoint", begun / "full" / "checkpoint-1")
    shutil.copytree(used / "checkpoint-1", used / "checkpoint-9")
    with pytest.raises(ValueError, match=r"later checkpoints than checkpoint-1 \(checkpoint-9\)"):
        small(tiny_pipeline, used, 2, "--resume-from-checkpoint", used / "checkpoint-1")
    shutil.rmtree(used / "checkpoint-9")
    assert state_of(used) == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="is a file: expected a folder"):
        small(tiny_pipeline, tmp_path / "file", 1)


def test_a_folder_has_one_writer_at_a_time(small, tiny_pipeline, tmp_path):
    with only_writer(tmp_path), pytest.raises(ValueError, match="another run is writing"):
        small(tiny_pipeline, tmp_path, 1, "--resume-from-checkpoint", "latest")
    with only_writer(tmp_path):
        pass


def test_a_system_that_flushes_only_what_may_be_written(tmp_path, monkeypatch):
    """As Windows, where a folder cannot be opened either."""
    fcntl = pytest.importorskip("fcntl")
    real_open = os.open

    def strict_open(path, *rest):
        if Path(path).is_dir():
            raise PermissionError(errno.EACCES, "a folder", str(path))
        return real_open(path, *rest)

    flushed = []

    def strict_fsync(handle):
        if fcntl.fcntl(handle, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
            raise OSError(errno.EBADF, "Bad file descriptor")
        flushed.append(handle)

    monkeypatch.setattr(os, "fsync", strict_fsync)
    monkeypatch.setattr(os, "open", strict_open)
    folder = tmp_path / "checkpoint-1"
    write_checkpoint(folder, {"student": {"weight": torch.ones(2)}, "optimizer": {"state": {}}}, {"step": 1})
    states, facts = read_checkpoint(folder)
    assert len(flushed) == 4 and facts == {"step": 1}
    assert torch.equal(states["student"]["weight"], torch.ones(2)) and states["optimizer"] == {"state": {}}


def test_a_resumed_adamw_counts_its_steps_on_the_cpu(tmp_path):
    """On a device each parameter's count would be waited for at every step. The meta device stands for it."""
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], 1e-3)
    weight.sum().backward()
    optimizer.step()
    write_checkpoint(tmp_path / "checkpoint-1", {"optimizer": optimizer.state_dict()}, {})
    state = read_checkpoint(tmp_path / "checkpoint-1", mmap=True)[0]["optimizer"]
    foreign = {**state, "param_groups": [{**state["param_groups"][0], "capturable": True}]}
    # Where the optimizer that goes on wants its count on the device, and there alone, it goes there.
    for saved, capturable, place in ((state, False, "cpu"), (foreign, False, "cpu"), (state, True, "meta")):
        elsewhere = [torch.nn.Parameter(torch.ones(3, device="meta"))]
        resumed = torch.optim.AdamW(elsewhere, 1e-3, capturable=capturable)
        OptimizerState(resumed, elsewhere, sharded=False).load_state_dict(saved)
        (slots,) = resumed.state.values()
        assert (slots["step"].device.type, slots["exp_avg"].device.type) == (place, "meta")


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped")
def test_what_a_resumed_run_keeps_on_the_cpu_maps_no_file(tmp_path):
    """Windows deletes no file that is mapped, and the checkpoint is to be rotated away."""

    def mapped() -> bool:
        gc.collect()
        return str(tmp_path) in Path("/proc/self/maps").read_text()

    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], 1e-3)
    weight.sum().backward()
    optimizer.step()
    write_checkpoint(tmp_path / "checkpoint-1", {"optimizer": optimizer.state_dict()}, {})
    states, _ = read_checkpoint(tmp_path / "checkpoint-1", mmap=True)
    assert mapped()
    elsewhere = [torch.nn.Parameter(torch.ones(3, device="meta"))]
    resumed = torch.optim.AdamW(elsewhere, 1e-3)
    OptimizerState(resumed, elsewhere, sharded=False).load_state_dict(states.pop("optimizer"))
    (slots,) = resumed.state.values()
    assert slots["step"] == 1 and not mapped()


def test_one_more_object_of_a_checkpoint_costs_a_word(tmp_path):
    class Counter:
        def __init__(self, count):
            self.count = count

        def state_dict(self):
            return {"count": self.count}

        def load_state_dict(self, state):
            self.count = state["count"]

    write_checkpoint(tmp_path / "checkpoint-1", {"critic": Counter(3).state_dict()}, {})
    states, _ = read_checkpoint(tmp_path / "checkpoint-1")
    critic = Counter(0)
    load_objects({"critic": critic}, states)
    assert critic.count == 3
    with pytest.raises(ValueError, match="critic: this run has none"):
        load_objects({}, states)
    with pytest.raises(ValueError, match="judge: the checkpoint has none"):
        load_objects({"critic": critic, "judge": Counter(0)}, states)


def spoil(monkeypatch, spoilt):
    """Make the gradients of these steps (from 1) not finite, with a loss that is."""
    real = loop.backward

    def backward(run):
        for role, loss in real(run):
            if run.step + 1 in spoilt:
                run.networks.trainable()[0].grad.view(-1)[0] = float("inf")
            yield role, loss

    monkeypatch.setattr(loop, "backward", backward)


def test_a_step_without_a_finite_gradient_moves_nothing(small, tiny_pipeline, tmp_path, monkeypatch, capfd):
    spoil(monkeypatch, {2})
    small(tiny_pipeline, tmp_path, 3, "--checkpointing-steps", 1, "--checkpoints-total-limit", 9)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 1, 1]
    assert [line["gradient_norm"] is None for line in lines] == [False, True, False]
    for name in ("student", "target"):
        one, two, three = (load_file(tmp_path / f"checkpoint-{step}" / f"{name}.safetensors") for step in (1, 2, 3))
        assert all(torch.equal(one[key], two[key]) for key in one)
        assert all(weight.isfinite().all() for weight in three.values())
        assert any(not torch.equal(two[key], three[key]) for key in two)
    assert "step 2: the gradient is not finite; nothing is moved (1 so far)" in "".join(capfd.readouterr())


def test_many_gradients_that_are_not_finite_stop_the_run(small, tiny_pipeline, tmp_path, monkeypatch):
    spoil(monkeypatch, range(2, 99))
    expected = r"gradient has not been finite for 20 steps at step 21. Lower --learning-rate; .*checkpoint-20"
    with pytest.raises(FloatingPointError, match=expected):
        small(tiny_pipeline, tmp_path, 30, "--checkpointing-steps", 20)
    assert all(weight.isfinite().all() for weight in load_file(tmp_path / "checkpoint-20/student.safetensors").values())


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM to another process")
def test_asked_to_stop_it_writes_a_checkpoint_and_says_how_to_go_on(small, command_line, tiny_pipeline, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    arguments = command_line(tiny_pipeline, cut, 5000)
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "training" / "distill.py"), *arguments], stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while (process.poll() is None and not (cut / "log.jsonl").is_file()) or not losses(cut):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said = process.communicate()[1]
    assert process.returncode == 128 + signal.SIGTERM, said
    step = len(losses(cut))
    assert f"stopped at step {step}. Go on with --resume-from-checkpoint latest" in said and step < 5000
    assert latest_checkpoint(cut).name == f"checkpoint-{step}"
    small(tiny_pipeline, cut, step + 1, "--resume-from-checkpoint", "latest")
    small(tiny_pipeline, whole, step + 1)
    assert losses(cut) == losses(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_is_the_systems_own(number):
    before = signal.getsignal(number)
    with StopRequest() as stop:
        assert not stop
        signal.raise_signal(number)
        assert stop and stop.exit_status == 128 + number and signal.getsignal(number) is before
    assert signal.getsignal(number) is before


@pytest.mark.parametrize(
    ("error", "more", "named", "unnamed"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), [], ["--gradient-checkpointing"], []),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), [], ["--lora instead"], ["--lora-rank"]),
        (RuntimeError("MPS backend out of memory"), ["--lora", "--gradient-checkpointing"], ["--lora-rank (it is 64)"],
         ["add --gradient-checkpointing", "--lora instead"]),
        (MemoryError(), ["--train-batch-size", "1"], ["--lora"], ["lower --train-batch-size"]),
    ],
)  # fmt: skip
def test_out_of_memory_names_the_flags_to_lower(
    small, tiny_pipeline, tmp_path, monkeypatch, error, more, named, unnamed
):
    def full(*_):
        raise error

    monkeypatch.setattr(loop, "backward", full)
    with pytest.raises(ValueError, match=r"^out of memory") as found:
        small(tiny_pipeline, tmp_path, 2, "--no-gradient-checkpointing", *more)
    said = str(found.value)
    assert all(text in said for text in [*named, "--plan"]) and not any(text in said for text in unnamed)


def test_another_error_is_not_called_one_of_memory(small, tiny_pipeline, tmp_path, monkeypatch):
    def wrong(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(loop, "backward", wrong)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        small(tiny_pipeline, tmp_path, 2)


def test_a_folder_that_cannot_take_its_name_leaves_the_older_one(tmp_path, monkeypatch):
    write_checkpoint(tmp_path / "best", {"student": {"weight": torch.ones(1)}}, {"step": 1})
    real = os.replace

    def held_open(source, name):
        if Path(source).name == "best.partial":
            raise PermissionError(errno.EACCES, "held open by another program")
        real(source, name)

    monkeypatch.setattr(os, "replace", held_open)
    with pytest.raises(CheckpointError, match="held open"):
        write_checkpoint(tmp_path / "best", {"student": {"weight": torch.zeros(1)}}, {"step": 2})
    assert read_checkpoint(tmp_path / "best")[1] == {"step": 1} and [one.name for one in tmp_path.iterdir()] == ["best"]
