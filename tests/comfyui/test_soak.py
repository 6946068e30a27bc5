"""A server that works all day: mixed prompts, cancels and model switches. Its memory and its pictures stay."""

import os
import random
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from harness.graphs import custom, distil, save_image, save_latent, stock, text_to_image
from harness.reliability import note
from harness.server import ComfyServer, ServerError

pytestmark = pytest.mark.comfyui
PROMPT = "a yellow star above a doughnut"
MODELS = ("diffusers/plain", "diffusers/gamma", "diffusers/v", "embedded-student")
CONTROL_EVERY = 25
PROMPTS = int(os.environ.get("SOAK_PROMPTS", 500))
AT_REST = 20  # seconds: the host collects garbage within ten of being idle
HELPERS = Path(__file__).with_name("helper_nodes")
LORA = "soak.safetensors"  # of the pipeline "plain"


def write_lora(unet, file):
    """A random LoRA of rank 4, under kohya's names, of a UNet's file of weights."""
    torch.manual_seed(0)
    lora = {}
    for key, weight in load_file(unet).items():
        if key.endswith(("to_q.weight", "to_v.weight")):
            name = "lora_unet_" + key.removesuffix(".weight").replace(".", "_")
            lora[f"{name}.lora_down.weight"] = torch.randn(4, weight.shape[1]) / 30
            lora[f"{name}.lora_up.weight"] = torch.randn(weight.shape[0], 4) / 30
    file.parent.mkdir(parents=True)
    save_file(lora, file)


def with_lora(graph, strength):
    """The graph of "plain" with its LoRA."""
    inputs = {"model": ["model", 0], "lora_name": LORA, "strength_model": strength, "strength_clip": 0.0}
    graph["lora"] = {"class_type": "SPLAMLoraLoader", "inputs": inputs}
    graph["sampled"]["inputs"]["model"] = ["lora", 0]
    return graph


def kinds(model, rng):
    """The graphs that people queue, as functions; seeds differ, so that the host's cache answers none."""
    seed, steps = rng.randrange(2**32), rng.randrange(1, 9)
    return (
        lambda: save_latent(text_to_image(model, PROMPT, seed=seed, steps=steps, batch_size=rng.randrange(1, 4))),
        lambda: save_image(text_to_image(model, PROMPT, seed=seed, steps=steps)),
        lambda: save_latent(custom(model, PROMPT, seed=seed, steps=steps)),
        lambda: save_latent(stock(model, PROMPT, seed=seed, steps=steps, cfg=1.0, sampler="splam", scheduler="splam")),
        lambda: save_latent(stock(model, PROMPT, seed=seed, steps=steps, cfg=4.0, sampler="euler")),
        lambda: save_latent(with_lora(text_to_image(MODELS[0], PROMPT, seed=seed, steps=2), rng.random())),
        lambda: distil(MODELS[0], prompts=PROMPT, seed=seed, steps=rng.randrange(1, 30), autosave_every=5),
        lambda: text_to_image(model, PROMPT, steps=0) | {"saved": {"class_type": "SaveLatent", "inputs": {}}},
    )


def send(server, graph, cancel_after=None):
    """Queues a graph and waits for its end, which may be a refusal or, after so many seconds, a cancel."""
    try:
        prompt = server.queue(graph)
        if cancel_after is not None:
            time.sleep(cancel_after)
            server.post("/interrupt", {})
        server.wait(prompt)
    except ServerError as error:
        assert "interrupted" in str(error) or "HTTP 400" in str(error), error


def memory(process):
    """Bytes of the process alone: pages of files, of libraries and mapped weights, come and go with the system."""
    found = process.memory_info()
    return found.rss - getattr(found, "shared", 0)  # which Linux tells


def at_rest(server, process):
    """Its memory with no model loaded and no history, which the host keeps of 10,000 prompts.

    Without what the C library keeps for later use, too: 80 MB come and go with the last distillation that ended.
    """
    server.post("/free", {"unload_models": True, "free_memory": True})
    server.post("/history", {"clear": True})
    time.sleep(AT_REST)
    server.run({"trimmed": {"class_type": "TestTrimHeap", "inputs": {}}})
    return memory(process)


def soaked(server, count, seed):
    """(growth at rest since a tenth of the prompts, whether the control pictures were one, the course of memory).

    The course: MB at each of the control pictures, with whatever was loaded then. Before all, every kind runs to its
    end on every model: a heap that a first long distillation widens later would pass for growth.
    """
    rng, process, after, pictures = random.Random(seed), psutil.Process(server.process.pid), 0, set()
    course = []
    for model in MODELS:
        for kind in kinds(model, rng):
            send(server, kind())
    for number in range(count):
        graph = rng.choice(kinds(rng.choice(MODELS), rng))()
        send(server, graph, rng.random() if rng.random() < (0.8 if "distil" in graph else 0.2) else None)
        if number % CONTROL_EVERY == 0:
            control = save_image(text_to_image("diffusers/plain", PROMPT, seed=4, steps=2))
            server.run(save_latent(text_to_image("diffusers/plain", PROMPT, seed=number, steps=1)))  # not its cache
            pictures.update(server.files(server.run(control)))
            course.append(memory(process) // 10**6)
        if number == count // 10:
            after = at_rest(server, process)
    return at_rest(server, process) / after - 1, len(pictures) == 1, course


@pytest.mark.long
@pytest.mark.timeout(0)
def test_five_hundred_prompts(comfyui, pipelines, tmp_path):
    for folder in ("models", "custom_nodes"):
        (tmp_path / folder).mkdir()
    (tmp_path / "custom_nodes" / "helper_nodes").symlink_to(HELPERS, target_is_directory=True)
    (tmp_path / "models" / "diffusers").symlink_to(pipelines.folder, target_is_directory=True)
    write_lora(next((pipelines.folder / "plain" / "unet").glob("*.safetensors")), tmp_path / "models" / "loras" / LORA)
    with ComfyServer(comfyui, tmp_path) as server:
        growth, same, course = soaked(server, PROMPTS, 0)
        version = server.get("/system_stats")["system"].get("comfyui_version", "of no version")
    figures = {"soak_prompts": PROMPTS, "server_deaths": 0, "memory_growth": round(growth, 4), "memory_mb": course}
    note(
        f"soak: ComfyUI {version}",
        {**figures, "control_pictures": -(-PROMPTS // CONTROL_EVERY), "control_pictures_identical": same},
    )
    assert growth < 0.05 and same
