"""What training/export.py writes is, in a real ComfyUI, what diffusers makes of the same weights."""

import io
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load, load_file, save_file
from transformers import CLIPTokenizer

from harness.graphs import save_latent, text_to_image
from harness.reference import Reference, node_noises, relative_error
from harness.server import to_api
from training.distill import distill
from training.export import export, parser
from training.run.config import parse

pytestmark = pytest.mark.comfyui
PROMPT, SEED = "a yellow star above a doughnut", 1234


def converted(source, to, output, *more):
    return export(parser().parse_args([str(one) for one in (source, "--to", to, "--output", output, *more)]))


def sample(server, graph):
    (file,) = server.files(server.run(save_latent(graph)))
    return load(file)["latent_tensor"] * 0.31


def few_step(reference, comfyui, steps=4):
    tokens = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")(PROMPT)["input_ids"]
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    return reference.few_step(reference.embed(tokens), noise, fresh, steps)


@pytest.mark.parametrize("name", ["plain", "gamma", "v"])
def test_a_single_file(name, server, pipelines, comfyui):
    folder = server.folder / "models" / "checkpoints"
    folder.mkdir(exist_ok=True)
    converted(pipelines.folder / name, "single-file", folder / f"exported-{name}.safetensors")
    found = sample(server, text_to_image(f"exported-{name}.safetensors", PROMPT, seed=SEED, steps=4))
    assert relative_error(found, few_step(pipelines.reference(name), comfyui)) < 1e-4


def test_an_extracted_lora(server, pipelines, comfyui, tmp_path):
    """Every weight and bias of the UNet moved: at full rank the base with the LoRA is the moved model."""
    tuned = converted(pipelines.folder / "plain", "diffusers", tmp_path / "tuned", "--dtype", "fp32")
    file = tuned / "unet" / "diffusion_pytorch_model.safetensors"
    torch.manual_seed(0)
    save_file({key: w + 0.02 * w.abs().mean() * torch.randn_like(w) for key, w in load_file(file).items()}, file)
    loras = server.folder / "models" / "loras"
    loras.mkdir(exist_ok=True)
    converted(tuned, "lora", loras / "extracted.safetensors", "--base", pipelines.folder / "plain", "--rank", 9999,
              "--dtype", "fp32")  # fmt: skip
    graph = text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=4)
    graph["lora"] = {
        "class_type": "LoraLoaderModelOnly",
        "inputs": {"model": ["model", 0], "lora_name": "extracted.safetensors", "strength_model": 1.0},
    }
    sampler = next(node for node in graph.values() if node["class_type"] == "SPLAMSampler")
    sampler["inputs"]["model"] = ["lora", 0]
    logged = server.listen()
    moved, base = few_step(Reference(tuned), comfyui), few_step(pipelines.reference("plain"), comfyui)
    assert relative_error(base, moved) > 1e-2
    # The base's weights are fp16 in the host, which rounds them again after the merge.
    assert relative_error(sample(server, graph), moved) < 2e-2
    assert "lora key not loaded" not in logged()


@pytest.mark.parametrize("lora", [False, True])
def test_a_runs_own_workflow(server, tmp_path, lora):
    """What a run leaves behind, put where its workflow says, draws a picture."""
    distill(parse([
        "--teacher", "embedded", "--output-dir", str(tmp_path), "--max-train-steps", "1", "--train-batch-size", "1",
        "--num-scenes", "8", "--num-held-out", "1", "--no-cache-latents", "--sample-every", "0", "--report-to", "none",
        "--validation-samples", "0", "--name", f"mine-{lora}", "--lora" if lora else "--no-lora",
    ]))  # fmt: skip
    kind, file = ("loras", f"mine-{lora}.splam-lora") if lora else ("checkpoints", f"mine-{lora}.splam")
    (server.folder / "models" / kind).mkdir(exist_ok=True)
    shutil.copy(tmp_path / f"{file}.safetensors", server.folder / "models" / kind)
    workflow = json.loads((tmp_path / f"mine-{lora}.workflow.json").read_text())
    logged = server.listen()
    entry = server.run(to_api(workflow, server.get("/object_info")))
    (picture,) = server.files(entry)
    assert Image.open(io.BytesIO(picture)).size == (128, 128)
    assert "lora key not loaded" not in logged()
