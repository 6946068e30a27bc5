"""The true Stable Diffusion 1.5 shape, weights random: two LoRA steps on a CPU, and the result in ComfyUI.

Needs about 16 GB of memory and 10 GB of disk, and some minutes.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load
from transformers import CLIPTextModel

from harness.graphs import distil, save_latent, text_to_image
from harness.reference import few_step, node_noises, relative_error
from harness.server import ComfyServer
from splam_core.checkpoint import load_file
from training.models.architectures import ARCHITECTURES
from training.models.files import ModelFiles, write_folder, write_single_file
from training.models.load import load_pipeline
from training.run.config import parse
from training.run.plan import plan

ROOT = Path(__file__).resolve().parents[2]
PROMPT, SEED = "a red fox asleep in fresh snow", 1234
pytestmark = [pytest.mark.comfyui, pytest.mark.slow, pytest.mark.timeout(3600)]
# Runs a command and prints the peak memory of what it started.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print("peak", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def random_teacher() -> ModelFiles:
    torch.manual_seed(0)
    shape = ARCHITECTURES["sd1"]
    parts = {
        "unet": UNet2DConditionModel.from_config(shape.unet),
        "vae": AutoencoderKL.from_config(shape.vae),
        "text_encoder": CLIPTextModel(shape.clip()),
    }
    configs = {name: json.loads(part.config.to_json_string()) if name == "text_encoder" else dict(part.config)
               for name, part in parts.items()}  # fmt: skip
    states = {name: {key: w.half() for key, w in part.state_dict().items() if not key.endswith("position_ids")}
              for name, part in parts.items()}  # fmt: skip
    text = {key.removeprefix("text_model."): weight for key, weight in states["text_encoder"].items()}
    configs = {**configs, "scheduler": shape.scheduler}
    return ModelFiles(states["unet"], states["vae"], [text], "sd1", configs)


@torch.no_grad()
def test_two_lora_steps_and_the_result_in_comfyui(comfyui, tmp_path, record_property):
    teacher, out = tmp_path / "teacher", tmp_path / "run"
    model = random_teacher()
    write_folder(model, teacher)
    models = tmp_path / "server" / "models"
    for name in ("checkpoints", "loras"):
        (models / name).mkdir(parents=True)
    write_single_file(model, models / "checkpoints" / "base.safetensors", "base")
    del model
    arguments = [
        "--teacher", str(teacher), "--lora", "--output-dir", str(out), "--data", "embedded", "--num-scenes", "4",
        "--num-held-out", "1", "--no-cache-latents", "--resolution", "256", "--train-batch-size", "1",
        "--max-train-steps", "2", "--sample-every", "0", "--validation-samples", "0", "--report-to", "none",
    ]  # fmt: skip
    command = [sys.executable, "-c", MEASURED, sys.executable, str(ROOT / "training" / "distill.py"), *arguments]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    peak = int(re.search(r"peak (\d+)", result.stdout)[1])
    expected = plan(parse(arguments))
    record_property("peak_gb", peak / 1e9)
    record_property("planned_gb", expected.peak(1) / 1e9)
    print(f"peak memory {peak / 1e9:.2f} GB; arithmetic for the training itself {expected.peak(1) / 1e9:.2f} GB")
    assert peak < 24e9
    losses = [json.loads(line)["loss"] for line in (out / "log.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and all(0 < loss < 1e3 for loss in losses)

    (out / "student.splam.safetensors").unlink(missing_ok=True)
    exported = models / "checkpoints" / "student.safetensors"
    command = [sys.executable, str(ROOT / "training" / "export.py"), str(out), "--to", "single-file"]
    subprocess.run([*command, "--output", str(exported)], check=True)
    (out / "student.splam-lora.safetensors").rename(models / "loras" / "student.splam-lora.safetensors")

    pipeline = load_pipeline(out)
    noise, fresh = node_noises((1, 4, 32, 32), SEED)
    embeds = pipeline.encode([PROMPT])["encoder_hidden_states"]
    reference = few_step(pipeline.unet, pipeline.scheduler_config, embeds, noise, fresh, 1)
    del pipeline
    with ComfyServer(comfyui, tmp_path / "server") as server:

        def sample(graph):
            (file,) = server.files(server.run(save_latent(graph)))
            return load(file)["latent_tensor"] * 0.18215

        merged = text_to_image("student.safetensors", PROMPT, seed=SEED, steps=1, size=256)
        assert relative_error(sample(merged), reference) < 1e-4
        on_base = text_to_image("base.safetensors", PROMPT, seed=SEED, steps=1, size=256)
        on_base["lora"] = {
            "class_type": "LoraLoaderModelOnly",
            "inputs": {"model": ["model", 0], "lora_name": "student.splam-lora.safetensors", "strength_model": 1.0},
        }
        sampler = next(node for node in on_base.values() if node["class_type"] == "SPLAMSampler")
        sampler["inputs"]["model"] = ["lora", 0]
        # The file is fp16, and the host's merge into fp16 weights rounds once more.
        assert relative_error(sample(on_base), reference) < 2e-2
        assert "lora key not loaded" not in server.log.read_text(errors="replace")


def test_three_steps_of_splam_distil(comfyui, tmp_path):
    """fp16 weights, as users have them: finite, a layer's key for each adapted layer, the control picture unchanged."""
    models = tmp_path / "models" / "checkpoints"
    models.mkdir(parents=True)
    write_single_file(random_teacher(), models / "base.safetensors", "base")
    control = save_latent(text_to_image("base.safetensors", PROMPT, seed=SEED, steps=1, size=64))
    settings = {"steps": 3, "rank": 16, "resolution": 64, "batch_size": 1, "gradient_checkpointing": True}
    graph = distil("base.safetensors", prompts="a fox\na hut", vae=None, **settings)
    with ComfyServer(comfyui, tmp_path) as server:
        before = load(server.files(server.run(control))[0])["latent_tensor"]
        server.run(graph)
        server.post("/free", {"unload_models": True, "free_memory": True})
        again = {**control, "saved": {**control["saved"], "inputs": {**control["saved"]["inputs"]}}}
        again["saved"]["inputs"]["filename_prefix"] = "after"
        after = load(server.files(server.run(again))[0])["latent_tensor"]
    assert torch.equal(before, after)
    lora = load_file(next((tmp_path / "output" / "loras").glob("distilled*")))
    assert len(lora) == 3 * 278 and all(weight.isfinite().all() for weight in lora.values())
