"""Generation is a matter of prompt and seed, and scores are what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler

from splam_core import renoise_generator
from training.evaluate import frechet_distance
from training.generate import generate
from training.pipeline import load_pipeline

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.train


def evaluate(*arguments):
    command = [sys.executable, str(ROOT / "training" / "evaluate.py"), "--protocol", "embedded", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


def test_frechet_distance_of_known_gaussians():
    torch.manual_seed(0)
    a = torch.randn(200_000, 3, dtype=torch.float64) * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 1.0, -1.0])
    b = torch.randn(200_000, 3, dtype=torch.float64) * torch.tensor([1.0, 1.0, 1.5]) + torch.tensor([2.0, 1.0, 0.0])
    expected = (2.0**2 + 1.0**2) + (
        0.0 + 1.0**2 + 1.0**2
    )  # |difference of means|^2 + squared differences of deviations
    assert frechet_distance(a, b) == pytest.approx(expected, rel=0.02)
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64))[0]
    assert frechet_distance(a @ rotation, b @ rotation) == pytest.approx(frechet_distance(a, b), rel=1e-8)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="two pictures or more"):
        frechet_distance(a[:1], b)


@torch.no_grad()
def test_a_picture_is_its_prompts_and_seeds_and_not_its_batchs(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline)
    prompts = ["a small red ring", "a large blue star", "a small green heart"]
    together = generate(pipeline, prompts, [3, 4, 5], steps=3)
    alone = generate(pipeline, prompts[1:2], [4], steps=3)
    assert (together[1:2] - alone).abs().max() < 1e-4
    assert (generate(pipeline, prompts, [3, 4, 5], steps=3, batch_size=2) - together).abs().max() < 1e-4


@torch.no_grad()
def test_splam_is_diffusers_lcm_scheduler(tiny_pipeline):
    pipeline = load_pipeline(tiny_pipeline)
    ours = generate(pipeline, ["a small red ring"], [7], steps=4)
    scheduler = LCMScheduler.from_config(DDIMScheduler.from_pretrained(tiny_pipeline, subfolder="scheduler").config)
    scheduler.set_timesteps(4)
    embeds, again = pipeline.encode(["a small red ring"]), renoise_generator(7)
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    for t in scheduler.timesteps:
        x = scheduler.step(pipeline.unet(x, t, embeds).sample, t, x, generator=again).prev_sample
    assert (ours - x).abs().max() / x.std() < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_ddim_is_diffusers(tiny_pipeline, guidance_scale):
    pipeline = load_pipeline(tiny_pipeline)
    ours = generate(pipeline, ["a small red ring"], [7], "ddim", 10, guidance_scale)
    scheduler = DDIMScheduler.from_pretrained(tiny_pipeline, subfolder="scheduler")
    scheduler.set_timesteps(10)
    embeds, nothing = pipeline.encode(["a small red ring"]), pipeline.encode([""])
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(7))
    for t in scheduler.timesteps:
        cond, uncond = pipeline.unet(x, t, embeds).sample, pipeline.unet(x, t, nothing).sample
        x = scheduler.step(uncond + guidance_scale * (cond - uncond), t, x).prev_sample
    assert (ours - x).abs().max() / x.std() < 1e-4


def test_the_command_scores_the_shipped_student(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a large red star\n\na small blue ring to the left of a large green heart\n", encoding="utf-8")
    result = evaluate(
        "--model", "embedded-student", "--sampler", "splam", "--steps", 2, "--num-images", 6, "--seed", 3,
        "--prompts", prompts, "--output-dir", tmp_path / "pictures", "--json", tmp_path / "scores.json",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["images"] == 6 and scores["seed"] == 3 and scores["unet_evaluations_per_image"] == 2
    assert 0 <= scores["attribute_accuracy"] <= 1 and scores["frechet_distance"] > 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "nowhere"], "holds no model"),
        (["--model", "embedded-student", "--steps", "51"], "do not fit"),
        (["--model", "embedded-student", "--prompts", __file__], "line 1: "),
    ],
)
def test_bad_input_is_one_clear_error(arguments, message):
    result = evaluate("--num-images", 2, *arguments)
    assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
