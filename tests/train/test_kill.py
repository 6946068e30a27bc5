"""SIGKILL at any moment, within writes too: what comes after is to the bit what it would have been."""

import contextlib
import json
import multiprocessing
import os
import random
import shutil
import time
from pathlib import Path

import pytest

from harness.reliability import note
from training.distill import distill
from training.evaluate import evaluate
from training.prepare import parse as parse_preparation
from training.prepare import prepare
from training.run.checkpoints import checkpoints, verify
from training.run.config import parse
from training.scoring.request import Request

from .conftest import small_arguments

pytestmark = [
    pytest.mark.train,
    pytest.mark.skipif(os.name == "nt", reason="no SIGKILL"),
    pytest.mark.timeout(0),
]
STEPS = 10
FINISH = ("--finish", "distribution-matching", "--finish-warmup-steps", 1, "--teacher-dtype", "fp32")
# Steps of the method, and further flags: STEPS in all.
MODES = {
    "full": (STEPS, ()),
    "LoRA": (STEPS, ("--lora", "--lora-rank", 4)),
    "finishing stage": (3, (*FINISH, "--finish-steps", STEPS - 3)),
}
LONG = {"full": 17, "LoRA": 17, "finishing stage": 16}
KILLED = -9


@pytest.fixture(scope="module")
def start():
    """Starts a function of ours in a process of its own: forked from one that has read the modules and no more."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["training.distill", "training.prepare", "training.evaluate"])

    def started(function, *arguments):
        process = context.Process(target=function, args=arguments)
        process.start()
        return process

    return started


def kill_at_some_moment(process, folder: Path, made, rng: random.Random, most: float) -> bool:
    """Whether the process was killed, rather than done: mostly after it has made something more, or while it writes.

    made: of a folder, what is there; most: seconds.
    """
    before, moment = len(made(folder)), rng.random()
    while process.is_alive() and moment > 0.2 and len(made(folder)) <= before:
        time.sleep(0.01)
    end = time.monotonic() + rng.random() * most
    while process.is_alive() and time.monotonic() < end:
        time.sleep(0.002)
    while process.is_alive() and moment > 0.6 and not any(folder.glob("*.partial")):
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode in (0, KILLED)
    return process.exitcode == KILLED


def losses(folder):
    file = folder / "log.jsonl"
    lines = file.read_text().splitlines() if file.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]  # the last may be cut off
    return [(line["loss"], line.get("fake_loss")) for line in found]


def contents(folder, *patterns):
    found = {}
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern)):
        with contextlib.suppress(FileNotFoundError, IsADirectoryError):  # one being made has moved
            found[str(file.relative_to(folder))] = file.read_bytes()
    return found


def killed_trainings(start, teacher, folder, mode, kills, rng):
    """So many kills, each of which left what an uninterrupted run has at that step; so is the end."""

    def configured(output):
        steps, flags = MODES[mode]
        arguments = (*small_arguments(teacher, output, steps), *flags, "--checkpointing-steps", 1)
        more = ("--checkpoints-total-limit", 99, "--resume-from-checkpoint", "latest")
        return parse([str(one) for one in (*arguments, *more)])

    whole, cut, since = folder / "whole", folder / "cut", time.monotonic()
    process = start(distill, configured(whole))
    process.join()
    assert process.exitcode == 0
    most, exact = time.monotonic() - since, 0
    expected = losses(whole)
    while exact < kills:
        if not kill_at_some_moment(start(distill, configured(cut)), cut, losses, rng, most / 10):
            assert same_end(whole, cut)
            shutil.rmtree(cut)
            continue
        found = checkpoints(cut)
        for one in found:
            verify(one)
        as_expected = losses(cut) == expected[: len(losses(cut))]
        if found:
            as_expected &= steps_of(found[-1]) == steps_of(whole / found[-1].name)
        assert as_expected, f"after kill {exact}"
        exact += 1
    process = start(distill, configured(cut))
    process.join()
    assert process.exitcode == 0 and same_end(whole, cut)


def steps_of(checkpoint):
    """A checkpoint's weights and optimizer; its facts name the folder that it is in."""
    return contents(checkpoint, "*.safetensors", "*.pt")


def same_end(whole, cut):
    last = f"checkpoint-{STEPS}"
    assert losses(whole) == losses(cut) and not list(cut.glob("*.partial"))
    return steps_of(whole / last) == steps_of(cut / last)


def killed_preparations(start, teacher, folder, kills, rng):
    def asked(output):
        words = ("--teacher", teacher, "--data", "embedded", "--num-scenes", 40, "--shard-size", 2, "--device", "cpu")
        return parse_preparation([str(one) for one in (*words, "--output-dir", output)])

    def made(output):
        return contents(output, "[0-9]*", "meta.json", "no-prompt.safetensors")

    killed_work(start, lambda output: (prepare, *asked(output)), folder, kills, rng, made)


def killed_evaluations(start, folder, kills, rng, **more):
    def asked(output):
        common = {"steps": 1, "num_images": 24, "batch_size": 2, "device": "cpu", **more}
        return evaluate, Request(model="embedded-student", output_dir=output, **common)

    return killed_work(start, asked, folder, kills, rng, lambda f: contents(f, "**/*.png", "**/*.jpg"))


def killed_work(start, asked, folder, kills, rng, made):
    whole, cut, since = folder / "whole", folder / "cut", time.monotonic()
    process = start(*asked(whole))
    process.join()
    assert process.exitcode == 0 and made(whole)
    most = time.monotonic() - since
    for _ in range(kills):
        kill_at_some_moment(start(*asked(cut)), cut, made, rng, most / 10)
        finished = {name: content for name, content in made(cut).items() if not name.endswith(".partial")}
        assert all(made(whole).get(name) == content for name, content in finished.items())
    process = start(*asked(cut))
    process.join()
    assert process.exitcode == 0 and made(cut) == made(whole)


@pytest.mark.parametrize("mode", MODES)
def test_killed_trainings_end_as_if_nothing_had_happened(start, tiny_pipeline, tmp_path, mode):
    killed_trainings(start, tiny_pipeline, tmp_path, mode, 2, random.Random())


def test_a_killed_preparation_and_a_killed_evaluation_go_on(start, tiny_pipeline, tmp_path):
    killed_preparations(start, tiny_pipeline, tmp_path / "prepare", 1, random.Random())
    killed_evaluations(start, tmp_path / "evaluate", 1, random.Random(), shard=(0, 1))  # drawn, not scored


@pytest.mark.long
@pytest.mark.parametrize("mode", MODES)
def test_fifty_kills_of_trainings(start, tiny_pipeline, tmp_path, mode):
    killed_trainings(start, tiny_pipeline, tmp_path, mode, LONG[mode], random.Random(mode))
    note(f"kills: training, {mode}", {"kills": LONG[mode], "kills_bit_exact": LONG[mode]})


@pytest.mark.long
def test_ten_kills_of_preparations_and_evaluations(start, tiny_pipeline, tmp_path):
    killed_preparations(start, tiny_pipeline, tmp_path / "prepare", 5, random.Random(0))
    note("kills: preparation", {"kills": 5, "kills_bit_exact": 5})
    killed_evaluations(start, tmp_path / "evaluate", 5, random.Random(0))
    note("kills: evaluation", {"kills": 5, "kills_bit_exact": 5})
