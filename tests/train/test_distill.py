"""The student starts as the teacher, a resumed run is the same run, and what comes out is plain Stable Diffusion."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from splam_core.checkpoint import ldm_to_diffusers
from training.config import parse
from training.data import SceneLatents, draws
from training.generate import generate
from training.pipeline import load_pipeline
from training.trainer import export_unet, make_student

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train


def distill(*arguments, check=True):
    command = [sys.executable, str(ROOT / "training" / "distill.py"), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    assert not check or result.returncode == 0, result.stderr
    return result


def small(teacher, output_dir, steps, *more):
    return distill(
        "--teacher", teacher, "--output-dir", output_dir, "--max-train-steps", steps, "--train-batch-size", 2,
        "--num-scenes", 32, "--sample-every", 0, "--lr-warmup-steps", 1, *more,
    )  # fmt: skip


def losses(folder):
    return [json.loads(line)["loss"] for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("conditioning", ["embedding", "noise-level"])
def test_the_untrained_student_is_the_teacher_to_the_bit(tiny_pipeline, conditioning):
    pipeline = load_pipeline(tiny_pipeline)
    student = make_student(pipeline.unet, conditioning).eval()
    x, t, embeds = torch.randn(2, 4, 16, 16), torch.tensor([999, 19]), pipeline.encode(["a small red ring", ""])
    phi = torch.zeros(2, 256) if conditioning == "embedding" else None
    with torch.no_grad():
        told = student(x, t, embeds, timestep_cond=phi).sample
        assert torch.equal(told, pipeline.unet(x, t, embeds).sample)
        assert torch.equal(export_unet(student, pipeline.unet)(x, t, embeds).sample, told)


def test_random_numbers_belong_to_the_sample_index():
    noise, u_t, u_gamma = draws(5, range(10, 14), (4, 2, 2))
    alone = draws(5, range(12, 13), (4, 2, 2))
    assert torch.equal(noise[2:3], alone[0]) and torch.equal(u_t[2:3], alone[1]) and torch.equal(u_gamma[2:3], alone[2])
    assert not torch.equal(noise, draws(6, range(10, 14), (4, 2, 2))[0])


def test_latents_do_not_depend_on_who_asks_first(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline)
    forwards, backwards = SceneLatents(pipeline, 64, 0), SceneLatents(pipeline, 64, 0)
    backwards.batch(range(40, 64))
    latents, captions = forwards.batch(range(30, 40))
    again, same_captions = backwards.batch(range(30, 40))
    assert torch.equal(latents, again) and captions == same_captions
    assert torch.equal(forwards.batch(range(64, 66))[0], forwards.batch(range(0, 2))[0])


@pytest.mark.parametrize(
    ("method", "conditioning"),
    [("splam", "embedding"), ("splam", "noise-level"), ("lcm", "noise-level"), ("dl", "embedding")],
)
def test_every_method_ends_in_a_folder_and_a_single_file(tiny_pipeline, tmp_path, method, conditioning):
    out = tmp_path / "run"
    small(tiny_pipeline, out, 2, "--method", method, "--gamma-conditioning", conditioning, "--export-dtype", "fp32")
    assert len(losses(out)) == 2 and all(0 < loss < 100 for loss in losses(out))
    single = load_file(out / "student.splam.safetensors")
    assert not [key for key in single if "cond_proj" in key]
    unet, vae, text_encoder = ldm_to_diffusers(single, text_prefix="")
    for part, file in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        saved = load_file(out / "pipeline" / part / f"{file}.safetensors")
        converted = {"unet": unet, "vae": vae, "text_encoder": text_encoder}[part]
        assert saved.keys() == converted.keys() and all(torch.equal(saved[key], converted[key]) for key in saved)
    pipeline = load_pipeline(out)
    assert generate(pipeline, ["a small red ring"], [1], steps=2).isfinite().all()
    assert str(tiny_pipeline) not in (out / "pipeline" / "unet" / "config.json").read_text()
    before = load_file(tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors")
    assert before.keys() == unet.keys() and any(not torch.equal(before[key], unet[key]) for key in before)


def test_a_resumed_run_is_the_same_run_to_the_bit(tiny_pipeline, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    small(tiny_pipeline, whole, 6, "--checkpointing-steps", 2, "--checkpoints-total-limit", 9)
    shutil.copytree(whole / "checkpoint-2", cut / "checkpoint-2")
    (cut / "log.jsonl").write_text(
        "".join((whole / "log.jsonl").read_text().splitlines(True)[:3]) + '{"st'
    )  # died at step 4
    small(tiny_pipeline, cut, 6, "--resume-from-checkpoint", "latest")
    assert losses(cut) == losses(whole)
    results = [
        load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors") for folder in (whole, cut)
    ]
    assert all(torch.equal(results[0][key], results[1][key]) for key in results[0])


def test_a_checkpoint_of_another_run_is_refused(tiny_pipeline, tmp_path):
    small(tiny_pipeline, tmp_path, 1, "--gamma-conditioning", "embedding")
    result = distill(
        "--teacher", tiny_pipeline, "--output-dir", tmp_path, "--resume-from-checkpoint", "latest", check=False
    )
    assert result.returncode == 1
    assert "does not fit this run" in result.stderr and "Traceback" not in result.stderr


def test_a_missing_teacher_is_one_clear_error(tmp_path):
    result = distill("--teacher", tmp_path / "nothing", check=False)
    assert result.returncode == 1 and "holds no model: expected" in result.stderr and "Traceback" not in result.stderr


def test_flags_take_dashes_and_underscores_and_are_checked(capsys):
    assert parse(["--teacher", "embedded", "--max_train_steps", "7"]).max_train_steps == 7
    assert parse(["--teacher", "embedded", "--max-train-steps", "7"]).max_train_steps == 7
    assert parse(["--teacher", "embedded"]).unet_forwards_per_sample == 14
    with pytest.raises(SystemExit):
        parse(["--teacher", "embedded", "--skip", "50"])
    assert "--solver-skip must divide --skip" in capsys.readouterr().err
