"""The examples: what they draw is what SPLAM Sampler draws in ComfyUI."""

import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import load

from harness.graphs import save_latent, text_to_image
from harness.reference import relative_error
from harness.server import ROOT
from snippets.diffusers_pipeline import embedded, latents

pytestmark = pytest.mark.comfyui
PROMPT = "a yellow star above a doughnut"


def test_a_diffusers_pipeline_draws_the_same_latents(server):
    with torch.no_grad():
        expected = latents(embedded(), PROMPT, steps=4, seed=7, batch=2)
    graph = save_latent(text_to_image("embedded-student", PROMPT, seed=7, steps=4, batch_size=2))
    (file,) = server.files(server.run(graph))
    assert relative_error(load(file)["latent_tensor"] * embedded().vae.config.scaling_factor, expected) < 1e-4


def test_the_command(tmp_path):
    command = [sys.executable, str(ROOT / "snippets" / "diffusers_pipeline.py"), PROMPT, str(tmp_path / "picture.png")]
    run = subprocess.run([*command, "--steps", "1"], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert Image.open(tmp_path / "picture.png").size == (128, 128)
