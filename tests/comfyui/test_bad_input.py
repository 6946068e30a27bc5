"""What goes wrong ends in one clear message on the node; the server lives, and the next graph comes out right."""

import json
import re
import shutil
import struct
import time
import zlib

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from transformers import CLIPTokenizer

from harness.graphs import custom, save_latent, stock, text_to_image
from harness.reference import node_noises, relative_error
from harness.server import ServerError

pytestmark = pytest.mark.comfyui
PROMPT, SEED = "a yellow star above a doughnut", 51
UNET_FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def expected(comfyui, pipelines):
    """diffusers' latents of the graph that is queued after each mishap, by seed."""
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    reference = pipelines.reference("plain")

    def latents(seed: int) -> torch.Tensor:
        noise, fresh = node_noises((1, 4, 16, 16), seed)
        return reference.few_step(reference.embed(tokenizer(PROMPT)["input_ids"]), noise, fresh, 2)

    return latents


@pytest.fixture
def then_right(server, expected, request):
    """After the test: the server is alive, and a graph that it has not cached comes out as diffusers says."""
    yield
    seed = zlib.crc32(request.node.name.encode())
    graph = save_latent(text_to_image("diffusers/plain", PROMPT, seed=seed, steps=2))
    (file,) = server.files(server.run(graph))
    assert relative_error(load(file)["latent_tensor"] * 0.31, expected(seed)) < 1e-4


@pytest.fixture(scope="module")
def bad_files(server, pipelines):
    """Puts every bad file where its name in BAD_FILES says."""
    models = server.folder / "models"
    for kind in ("checkpoints", "diffusion_models", "loras"):
        (models / kind).mkdir(exist_ok=True)
    plain = pipelines.folder / "plain"
    whole = (plain / "unet" / UNET_FILE).read_bytes()
    unet = load_file(plain / "unet" / UNET_FILE)
    (models / "diffusion_models" / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    (models / "checkpoints" / "cut-header.safetensors").write_bytes(whole[:100])
    (models / "checkpoints" / "empty.safetensors").write_bytes(b"")
    (models / "checkpoints" / "page.safetensors").write_text("<!DOCTYPE html><html>404</html>" * 40)
    header = b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]'  # no closing braces
    (models / "checkpoints" / "header.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    (models / "checkpoints" / "old.ckpt").write_bytes(b"\x80\x02}q\x00.")
    (models / "loras" / "old.pt").write_bytes(b"\x80\x02}q\x00.")
    shutil.copy(plain / "vae" / UNET_FILE, models / "diffusion_models" / "vae.safetensors")
    shutil.copy(plain / "text_encoder" / "model.safetensors", models / "checkpoints" / "text.safetensors")
    save_file({"double_blocks.0.img_attn.qkv.weight": torch.ones(2)}, models / "diffusion_models" / "flux.safetensors")
    lora = {"lora_unet_conv_in.lora_down.weight": torch.ones(1, 4, 3, 3)}
    save_file(lora, models / "checkpoints" / "lora.safetensors")
    missing = {key: weight for key, weight in unet.items() if "mid_block.resnets.1.conv2" not in key}
    save_file(missing, models / "diffusion_models" / "no-middle.safetensors")
    save_file({**unet, "surprise.weight": torch.ones(1)}, models / "diffusion_models" / "surprise.safetensors")
    save_file(
        unet | {"conv_in.bias": unet["conv_in.bias"] * torch.nan}, models / "diffusion_models" / "nan.safetensors"
    )
    for name, weight in MISSHAPEN.items():
        save_file(unet | {"conv_in.weight": weight}, models / "diffusion_models" / f"{name}.safetensors")
        bad = {"lora_unet_conv_in.lora_down.weight": weight, "lora_unet_conv_in.lora_up.weight": weight.clone()}
        save_file(bad, models / "loras" / f"{name}.safetensors")
    metadata = {"splam.scheduler": "[]"}
    save_file(unet, models / "diffusion_models" / "bad-metadata.safetensors", metadata)
    save_file({"mystery": torch.ones(1)}, models / "loras" / "mystery.safetensors")
    down = {"lora_unet_conv_in.lora_down.weight": torch.full((1, 4, 3, 3), torch.inf)}
    save_file(
        down | {"lora_unet_conv_in.lora_up.weight": torch.ones(64, 1, 1, 1)}, models / "loras" / "inf.safetensors"
    )
    (models / "loras" / "cut.safetensors").write_bytes(whole[:1000])
    pickled, no_json, bad_json = (pipelines.folder / f"bad-{name}" for name in ("pickled", "no-json", "bad-json"))
    for folder in (pickled, no_json, bad_json):
        shutil.copytree(plain, folder, dirs_exist_ok=True)
    (pickled / "unet" / UNET_FILE).rename(pickled / "unet" / "diffusion_pytorch_model.bin")
    (no_json / "scheduler" / "scheduler_config.json").unlink()
    (bad_json / "vae" / "config.json").write_text("{ not json")


MISSHAPEN = {
    "number": torch.ones(()),
    "vector": torch.ones(5),
    "nothing": torch.ones(0, 4, 3, 3),
    "cube": torch.ones(2, 3, 4),
    "integers": torch.ones(64, 4, 3, 3, dtype=torch.int64),
    "wide": torch.ones(64, 4, 5, 5),
}


BAD_FILES = {
    "absent.safetensors": r"there is no model 'absent\.safetensors'.*Put diffusers folders into",
    "old.ckpt": r"'old\.ckpt' is a pickle, which can run code when opened; expected a \.safetensors file",
    "diffusion_models/cut.safetensors": r"cut\.safetensors: expected a safetensors file, found \d+ bytes.*fetch it",
    "cut-header.safetensors": r"cut-header\.safetensors: expected a safetensors file, found 100 bytes",
    "empty.safetensors": r"empty\.safetensors: expected a safetensors file, found 0 bytes",
    "page.safetensors": r"page\.safetensors: expected a safetensors file, found \d+ bytes",
    "header.safetensors": r"header\.safetensors: expected a safetensors file, found \d+ bytes",
    "diffusion_models/vae.safetensors": r"vae\.safetensors: expected .* UNet .*found a VAE: use Load VAE",
    "text.safetensors": r"text\.safetensors: expected a Stable Diffusion UNet .*found a text encoder",
    "diffusion_models/flux.safetensors": r"flux\.safetensors: expected .* found a Flux-like transformer",
    "lora.safetensors": r"lora\.safetensors: expected .* found a LoRA: use SPLAM LoRA Loader",
    "diffusion_models/no-middle.safetensors": r"no-middle\.safetensors: the UNet lacks 2 of \d+ weights",
    "diffusion_models/surprise.safetensors": r"surprise\.safetensors: UNet: the key 'surprise\.weight' has no",
    "diffusion_models/nan.safetensors": r"diffusion_models.nan\.safetensors: .* input_blocks.* holds NaN",
    "diffusion_models/bad-metadata.safetensors": r"bad-metadata.*: its metadata splam\.scheduler: expected JSON",
    "diffusers/bad-pickled": r"bad-pickled.unet: expected diffusion_pytorch_model\.safetensors, found .*\.bin",
    "diffusers/bad-no-json": r"scheduler_config\.json: missing\. Copy the whole diffusers folder",
    "diffusers/bad-bad-json": r"vae.config\.json: expected JSON, found something else",
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_file_that_is_no_model(name, bad_files, server, pipelines, then_right):
    with pytest.raises(ServerError, match=BAD_FILES[name]) as error:
        server.run(save_latent(text_to_image(name, PROMPT)))
    assert str(server.folder) not in str(error.value) and str(pipelines.folder) not in str(error.value)
    assert "SPLAMLoader" in str(error.value) and "Traceback" not in str(error.value)


@pytest.mark.parametrize("name", MISSHAPEN)
@pytest.mark.parametrize("kind", ["diffusion_models", "loras"])
def test_misshapen_weights(kind, name, bad_files, server, then_right):
    graph = save_latent(text_to_image("diffusers/plain", PROMPT, steps=1))
    if kind == "loras":
        inputs = {
            "model": ["model", 0],
            "lora_name": f"{name}.safetensors",
            "strength_model": 1.0,
            "strength_clip": 1.0,
        }
        graph["unet"] = {"class_type": "SPLAMLoraLoader", "inputs": inputs}
    else:
        inputs = {"model_name": f"diffusion_models/{name}.safetensors"}
        graph["unet"] = {"class_type": "SPLAMLoader", "inputs": inputs}
    graph["sampled"]["inputs"]["model"] = ["unet", 0]
    if name == "integers" and kind == "diffusion_models":  # numbers all the same
        server.run(graph)
        return
    with pytest.raises(ServerError, match=rf"SPLAML\w+: {kind}.{name}\.safetensors: "):
        server.run(graph)


BAD_LORAS = {
    "absent.safetensors": r"there is no LoRA 'absent\.safetensors'",
    "old.pt": r"'old\.pt' is a pickle, which can run code when opened",
    "cut.safetensors": r"cut\.safetensors: expected a safetensors file, found 1000 bytes",
    "inf.safetensors": r"loras.inf\.safetensors: lora_unet_conv_in\.lora_down\.weight holds NaN or infinite values",
    "mystery.safetensors": r"mystery\.safetensors: expected a LoRA .*found keys like mystery",
}


@pytest.mark.parametrize("name", BAD_LORAS)
def test_a_file_that_is_no_lora(name, bad_files, server, then_right):
    graph = save_latent(text_to_image("diffusers/plain", PROMPT))
    inputs = {"model": ["model", 0], "lora_name": name, "strength_model": 1.0, "strength_clip": 1.0}
    graph["lora"] = {"class_type": "SPLAMLoraLoader", "inputs": inputs}
    graph["sampled"]["inputs"]["model"] = ["lora", 0]
    with pytest.raises(ServerError, match=BAD_LORAS[name]) as error:
        server.run(graph)
    assert str(server.folder) not in str(error.value)


BAD_NUMBERS = {
    "no steps": ({"steps": 0}, r"Value 0 smaller than min of 1: steps"),
    "a million steps": ({"steps": 10**6}, r"Value 1000000 bigger than max of 8: steps"),
    "steps that are no number": ({"steps": "four"}, r"Failed to convert .* INT.*steps, four"),
    "denoise 0": ({"denoise": 0.0}, r"4 steps do not fit denoise 0, which leaves 0 of the model's 50 timesteps"),
    "denoise too small": ({"denoise": 0.06}, r"4 steps do not fit denoise 0\.06.*Use a denoise of 0\.08 or more"),
    "negative refinements": ({"refinements": -1}, r"Value -1 smaller than min of 0: refinements"),
    "guidance 0": ({"guidance": 0.0}, r"smaller than min of 1.0: guidance"),
}


@pytest.mark.parametrize("case", BAD_NUMBERS)
def test_numbers_out_of_range(case, server, then_right):
    inputs, message = BAD_NUMBERS[case]
    with pytest.raises(ServerError, match=message):
        server.run(save_latent(text_to_image("diffusers/plain", PROMPT, **inputs)))


BAD_CHOICES = {
    "SPLAMSampler": ("family", {"positive": ["positive", 0], "latent_image": ["latent", 0], "seed": 0}),
    "SPLAMScheduler": ("family", {}),
    "SPLAMModelPatch": ("gamma_conditioning", {}),
}


@pytest.mark.parametrize("kind", BAD_CHOICES)
@pytest.mark.parametrize("value", ["absent", 7, {"a": 1}])
def test_choices_that_are_none(kind, value, server, then_right):
    """ComfyUI 0.3.75 lets every value of such a list through."""
    name, more = BAD_CHOICES[kind]
    graph = save_latent(custom("diffusers/plain", PROMPT, seed=0, steps=2))
    inputs = {"model": ["model", 0], "steps": 2, "denoise": 1.0} | more | {name: value}
    inputs = {"model": ["model", 0], name: value} if kind == "SPLAMModelPatch" else inputs
    graph["bad"] = {"class_type": kind, "inputs": inputs}
    graph["sigmas"]["inputs"]["model"] = ["bad", 0]
    if kind == "SPLAMScheduler":
        graph["sampled"]["inputs"]["sigmas"] = ["bad", 0]
    elif kind == "SPLAMSampler":
        graph["saved"]["inputs"]["samples"] = ["bad", 0]
    else:
        graph["sampled"]["inputs"]["model"] = ["bad", 0]
    with pytest.raises(ServerError, match=rf"{kind}: .*{name} is .*Choose one of|Value not in list"):
        server.run(graph)


def bad_latent(kind: str) -> torch.Tensor:
    latents = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(1))
    if kind == "nan":
        latents[0, 0, 0, 0] = float("nan")
    others = {"empty": latents[:0], "channels": latents.repeat(1, 4, 1, 1), "video": latents[:, :, None]}
    return others.get(kind, latents)


BAD_LATENTS = {
    "empty": r"latent image is empty, shape \(0, 4, 16, 16\)",
    "channels": r"this model's latents have 4 channels, the latent image has 16",
    "video": r"of a video or sound model; expected .*, found \[1, 4, 1, 16, 16\]",
    "nan": r"the latent image holds NaN or infinite values",
}


@pytest.mark.parametrize("route", ["splam", "ksampler", "custom"])
@pytest.mark.parametrize("kind", BAD_LATENTS)
def test_latents_that_are_none(kind, route, server, then_right):
    content = {"latent_tensor": bad_latent(kind), "latent_format_version_0": torch.tensor([])}
    save_file(content, server.folder / "input" / f"{kind}.latent")
    graph = {
        "splam": lambda: text_to_image("diffusers/plain", PROMPT),
        "ksampler": lambda: stock(
            "diffusers/plain", PROMPT, seed=0, steps=2, cfg=1.0, sampler="splam", scheduler="splam"
        ),
        "custom": lambda: custom("diffusers/plain", PROMPT, seed=0, steps=2),
    }[route]()
    graph["latent"] = {"class_type": "LoadLatent", "inputs": {"latent": f"{kind}.latent"}}
    with pytest.raises(ServerError, match=BAD_LATENTS[kind]):
        server.run(save_latent(graph))


def test_out_of_memory(server, then_right):
    graph = save_latent(text_to_image("diffusers/plain", PROMPT, seed=3))
    graph["full"] = {"class_type": "TestWrapper", "inputs": {"model": ["model", 0], "out_of_memory": True}}
    graph["sampled"]["inputs"]["model"] = ["full", 0]
    with pytest.raises(ServerError, match=r"SPLAMSampler: .*exceed allowed memory(.|\n)*ran out of memory"):
        server.run(graph)


@pytest.mark.parametrize("refinements", [0, 1])
def test_cancel_in_mid_step(refinements, server, then_right):
    """Also while a point inside a sub-path is asked about, which a finished call must not leave behind."""
    graph = text_to_image("diffusers/plain", PROMPT, steps=8, size=256, batch_size=8, seed=77, refinements=refinements)
    graph["patch"] = {
        "class_type": "SPLAMModelPatch",
        "inputs": {"model": ["model", 0], "gamma_conditioning": "noise-level"},
    }
    graph["sampled"]["inputs"]["model"] = ["patch", 0]
    logged = server.listen()
    prompt_id = server.queue(save_latent(graph))
    end = time.monotonic() + 120
    while not re.search(r"\b[1-7]/8 \[", logged()):
        assert time.monotonic() < end, server.log_tail()
        time.sleep(0.02)
    server.post("/interrupt", {})
    with pytest.raises(ServerError, match="interrupted"):
        server.wait(prompt_id, timeout=60)


def test_a_model_of_another_kind(server, then_right):
    graph = save_latent(text_to_image("diffusers/plain", PROMPT))
    graph["flow"] = {"class_type": "ModelSamplingSD3", "inputs": {"model": ["model", 0], "shift": 3.0}}
    graph["sampled"]["inputs"]["model"] = ["flow", 0]
    with pytest.raises(
        ServerError, match=r"SPLAMSampler: SPLAM needs a Stable Diffusion model that predicts noise or v"
    ):
        server.run(graph)


def test_noise_predicted_at_zero_terminal_snr_is_refused(server, pipelines, then_right):
    folder = pipelines.folder / "zsnr"
    shutil.copytree(pipelines.folder / "plain", folder, dirs_exist_ok=True)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"rescale_betas_zero_snr": True}))
    with pytest.raises(ServerError, match=r"diffusers.zsnr: 'rescale_betas_zero_snr' says that .* pure noise"):
        server.run(save_latent(text_to_image("diffusers/zsnr", PROMPT)))
