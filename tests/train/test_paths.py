"""Kept paths on disk, and a run that learns from them: whoever solved them, and however often it was interrupted."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from splam_core import add_noise, draws, solve_paths
from splam_core.paths import draw_starts
from training import distill, prepare
from training.data import DataOptions, open_data
from training.data.latents import GROUP, Made, read_sample, write_shard
from training.data.paths import PathData
from training.data.sources import Record
from training.models.load import load_pipeline
from training.models.sampling import generate, teacher_function
from training.run.config import parse
from training.run.distillation import Distillation
from training.run.loop import train
from training.run.processes import join_processes
from training.run.report import SPREAD_SEEDS, Sheets
from training.scoring.variety import TEACHER_STEPS, spread

pytestmark = pytest.mark.train
COUNT, HELD = 20, 4
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    file = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    file.write_text("".join(f"a doughnut on a red background number {n}\n" for n in range(30)))
    return file


def solve(teacher, prompts, folder, *more):
    words = ["--teacher", teacher, "--data", prompts, "--output-dir", folder, "--paths", COUNT, "--shard-size", "8"]
    words += ["--num-held-out", HELD, "--prompt-steps", "2", "--path-steps", "4", "--cache-dtype", "fp32"]
    prepare.prepare(*prepare.parse([str(word) for word in (*words, "--guidance-scale", "2", *more)]))
    return folder


@pytest.fixture(scope="module")
def kept(tiny_pipeline, prompts, tmp_path_factory):
    return solve(tiny_pipeline, prompts, tmp_path_factory.mktemp("paths") / "set")


def contents(folder):
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def words(teacher, kept, folder, *more):
    few = ["--max-train-steps", "4", "--train-batch-size", "2", "--mixed-precision", "no", "--report-to", "none"]
    few += [
        "--sample-every",
        "0",
        "--validation-samples",
        "0",
        "--teacher-dtype",
        "fp32",
        "--no-gradient-checkpointing",
    ]
    return [str(w) for w in ("--teacher", teacher, "--paths", kept, "--output-dir", folder, *few, *more)]


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


def test_what_is_kept_is_the_teachers_path(tiny_pipeline, prompts, kept):
    pipeline = load_pipeline(tiny_pipeline)
    data = PathData(kept, pipeline, DataOptions(), 2, 0)
    points, conditioning = data.batch(range(2))
    options = DataOptions(num_held_out=HELD, prompt_steps=2, cache_dtype="fp32")
    source = open_data(str(prompts), pipeline, options, GROUP, 1)
    latents, told = source.batch(range(GROUP))
    noise, u, _ = draws(0, range(GROUP), latents.shape[1:])
    t = draw_starts(u, 1000, 0.5, 0.5)
    teacher = teacher_function(pipeline, told, pipeline.unconditional(), 2.0)
    with torch.no_grad():
        x_t = add_noise(latents, noise, t, pipeline.schedule)
        expected, timesteps = solve_paths(lambda x, t: teacher(x, t), x_t, t, 4, pipeline.schedule)
    assert torch.equal(conditioning["timesteps"], timesteps[:2])
    assert torch.allclose(points, expected[:2], atol=1e-4 * expected.std())
    assert torch.allclose(conditioning["encoder_hidden_states"], told["encoder_hidden_states"][:2], atol=1e-5)


def test_shares_and_interruptions_leave_the_same_bytes(tiny_pipeline, prompts, kept, tmp_path):
    folder = solve(tiny_pipeline, prompts, tmp_path / "set", "--shard", "1/2")
    with pytest.raises(ValueError, match="is not finished: 2 of 4 parts are missing"):
        PathData(folder, load_pipeline(tiny_pipeline), DataOptions(), 2, 0)
    (folder / "000001-00000.json").unlink()  # killed before it was whole
    (folder / "000001.shards.json").unlink()
    (folder / "000001-00000.tar.7.partial").write_bytes(b"half")
    solve(tiny_pipeline, prompts, folder)
    assert contents(folder) == contents(kept)


def test_a_teacher_that_solved_in_fp16_is_the_same_teacher(tiny_pipeline, prompts, tmp_path):
    """On GPUs that only emulate bf16 it does; its weights are hashed as they lie on the disk."""
    folder = solve(tiny_pipeline, prompts, tmp_path / "set", "--teacher-dtype", "fp16", "--device", "cpu")
    assert PathData(folder, load_pipeline(tiny_pipeline), DataOptions(), 2, 0).batch(range(2))[0].isfinite().all()


def test_every_path_once_in_an_epoch_and_none_that_is_held_out(tiny_pipeline, kept):
    data = PathData(kept, load_pipeline(tiny_pipeline), DataOptions(), 2, 0)
    starts = torch.cat([data.batch(range(at, at + 2))[0][:, 0] for at in range(0, COUNT, 2)]).flatten(1)
    assert len({tuple(row[:4].tolist()) for row in starts}) == COUNT
    held, conditioning = data.held_out(10)
    assert len(held) == HELD and "timesteps" not in conditioning
    assert "20 samples, 4 held out; paths of 4 steps of dpm-solver++, w 2" in data.describe()


@pytest.mark.parametrize("goal, forwards, asked", [("end", 3, 0), ("target", 4, 1)])
def test_no_teacher_is_asked(tiny_pipeline, kept, tmp_path, goal, forwards, asked):
    config = parse(words(tiny_pipeline, kept, tmp_path / "run", "--path-goal", goal, "--validation-samples", "2"))
    assert config.guidance_scale == 2.0  # that of the paths
    pipeline = load_pipeline(config.teacher)
    run = Distillation(config, pipeline, join_processes("no"))
    calls = {"teacher": 0, "target": 0, "student": 0}

    def count(role):
        def hook(*_):
            calls[role] += 1

        return hook

    teacher = run.networks.teacher
    steps = train(run)
    first = next(steps)
    assert run.networks.teacher is run.networks.target is pipeline.unet  # its weights are gone
    for role, unet in (("teacher", teacher), ("target", run.networks.target), ("student", run.networks.student)):
        unet.register_forward_pre_hook(count(role))
    assert [first, *steps][-1].unet_forwards == 2 * forwards
    assert calls == {"teacher": 0, "target": 3 * asked, "student": 3}
    assert run.validate()["target"].loss > 0


def test_the_teachers_variety_is_still_the_teachers_when_it_has_gone(tiny_pipeline, kept, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_text("a doughnut on a red background\n")
    config = parse(words(tiny_pipeline, kept, tmp_path, "--sample-prompts", str(file), "--sample-every", "9"))
    run = Distillation(config, load_pipeline(config.teacher), join_processes("no"))
    sheets = Sheets(config, run.pipeline, run.networks)
    next(train(run))
    assert run.networks.teacher is run.networks.target
    for weight in run.networks.target.parameters():
        weight.data.mul_(0.5)
    teacher = load_pipeline(config.teacher)

    def pictures(prompts, seeds):
        return teacher.decode(generate(teacher, prompts, seeds, "ddim", TEACHER_STEPS, 2.0))

    expected = spread(pictures, ["a doughnut on a red background"], range(SPREAD_SEEDS))["spread"]
    assert sheets.spread()["spread_teacher"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("more", [(), ("--lora", "--lora-rank", "4"), ("--recipe", "paper"), ("--method", "lcm")])
def test_a_resumed_run_is_the_same(tiny_pipeline, kept, tmp_path, more):
    whole, again = tmp_path / "whole", tmp_path / "again"
    distill.distill(parse(words(tiny_pipeline, kept, whole, "--checkpointing-steps", "2", *more)))
    assert len(set(losses(whole))) == 4
    shutil.copytree(whole, again)
    shutil.rmtree(again / "checkpoint-4")
    distill.distill(parse(words(tiny_pipeline, kept, again, "--resume-from-checkpoint", "latest", *more)))
    assert losses(again) == losses(whole)


@pytest.mark.skipif(sys.platform == "win32", reason="no gloo launcher")
@pytest.mark.parametrize("launcher", ["torchrun", "fsdp"])
def test_two_processes_learn_from_them_as_one_with_twice_the_batch(tiny_pipeline, kept, tmp_path, launcher):
    more = ("--path-goal", "target", "--validation-samples", "2", "--checkpointing-steps", "2")
    distill.distill(parse(words(tiny_pipeline, kept, tmp_path / "one", "--train-batch-size", "4", *more)))
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    if launcher == "fsdp":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        start = ["-m", "accelerate.commands.launch", "--config_file", str(ROOT / "training" / "configs" / "fsdp.yaml")]
        start += ["--num_processes", "2", "--main_process_port", port]
        environment["ACCELERATE_USE_CPU"] = "true"
    command = [sys.executable, *start, str(ROOT / "training" / "distill.py")]
    done = subprocess.run(
        [*command, *words(tiny_pipeline, kept, tmp_path / "two", *more)],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), rel=1e-4)
    one, two = ((tmp_path / name / "validation.jsonl").read_text().splitlines() for name in ("one", "two"))
    assert json.loads(two[-1]) == pytest.approx(json.loads(one[-1]), rel=1e-4)


def test_a_finish_after_it(tiny_pipeline, kept, tmp_path):
    more = ("--finish", "distribution-matching", "--finish-steps", "2", "--finish-step-counts", "1", "2")
    distill.distill(parse(words(tiny_pipeline, kept, tmp_path / "run", "--max-train-steps", "2", *more)))
    lines = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [("fake_loss" in line) for line in lines] == [False, False, True, True]


def test_a_flipped_byte_is_named(tiny_pipeline, prompts, tmp_path):
    folder = solve(tiny_pipeline, prompts, tmp_path / "set")
    tar = folder / "000000-00000.tar"
    index = json.loads((folder / "000000-00000.json").read_text())
    content = bytearray(tar.read_bytes())
    content[sum(index["samples"][0]["at"]) - 3] ^= 1
    tar.write_bytes(content)
    data = PathData(folder, load_pipeline(tiny_pipeline), DataOptions(), COUNT, 0)
    with pytest.raises(ValueError, match=r"000000-00000.tar is damaged .*SHA-256"):
        data.batch(range(COUNT))


@pytest.mark.parametrize("key, value", [("timesteps", torch.tensor([999, 5000, 3, 2, 0])), ("latents", torch.zeros(2))])
def test_a_set_that_holds_something_else(tiny_pipeline, kept, tmp_path, key, value):
    folder = tmp_path / "set"
    shutil.copytree(kept, folder)
    shard = "000000-00000"
    rows = json.loads((folder / f"{shard}.json").read_text())["samples"]
    samples = [read_sample(folder, shard, row["at"]) | {key: value} for row in rows]
    good = [(number, Record(f"path {number}", "", lambda: None), one) for number, one in enumerate(samples)]
    write_shard(folder, shard, Made(good, [], 0))
    index = json.loads((folder / f"{shard}.json").read_text())
    for row, before in zip(index["samples"], rows, strict=True):
        row["shape"] = before["shape"]
    (folder / f"{shard}.json").write_text(json.dumps(index))
    data = PathData(folder, load_pipeline(tiny_pipeline), DataOptions(), COUNT, 0)
    with pytest.raises(ValueError, match=r"000000-00000.tar holds no paths of 5 points"):
        data.batch(range(COUNT))


def test_what_does_not_go_together(tiny_pipeline, prompts, kept, tmp_path, capsys):
    another = load_pipeline(tiny_pipeline)
    with torch.no_grad():
        another.unet.conv_in.bias.add_(1.0)
    with pytest.raises(ValueError, match="paths of another teacher: its UNet"):
        PathData(kept, another, DataOptions(), 2, 0)
    with pytest.raises(ValueError, match=r"begun with other settings.*path_steps 4"):
        solve(tiny_pipeline, prompts, kept, "--path-steps", "6")
    for more, said in (
        (("--data", prompts), "leave --data"),
        (("--guidance-scale", "5"), "have w 2"),
        (("--path-first-share", "2"), "--path-first-share must be between 0 and 1"),
    ):
        with pytest.raises(SystemExit):
            parse(words(tiny_pipeline, kept, tmp_path / "run", *more))
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        parse(words(tiny_pipeline, tmp_path / "nowhere", tmp_path / "run"))
    assert "found no meta.json" in capsys.readouterr().err


def test_a_prepared_set_is_no_set_of_paths(tiny_pipeline, prompts, kept, tmp_path, capsys):
    made = ["--teacher", tiny_pipeline, "--data", prompts, "--prompt-steps", "2", "--output-dir", tmp_path / "set"]
    prepare.prepare(*prepare.parse([str(word) for word in made]))
    with pytest.raises(SystemExit):
        parse(words(tiny_pipeline, tmp_path / "set", tmp_path / "run"))
    assert "Give it as --data" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Give it as --paths"):
        open_data(str(kept), load_pipeline(tiny_pipeline), DataOptions(), 2, 0)
