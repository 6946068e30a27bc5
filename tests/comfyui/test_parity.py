"""The node's latents are those of diffusers' LCMScheduler on the same weights, prompt and noises.

At most 1e-4 of their standard deviation off, in fp32. Every case, and the host's own way: benchmarks/parity.py, of
which a part runs here.
"""

import io
import json

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load, save_file
from transformers import CLIPTokenizer

from benchmarks import parity
from harness.graphs import custom, latent_to_image, save_image, save_latent, stock, text_to_image
from harness.reference import node_noises, relative_error
from harness.server import ROOT

pytestmark = pytest.mark.comfyui
PROMPT = "a yellow star above a doughnut"
SEED = 1234


@pytest.fixture(scope="module")
def embed(comfyui, pipelines):
    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    return lambda name, text=PROMPT: pipelines.reference(name).embed(tokenizer(text)["input_ids"])


@pytest.fixture
def sample(server):
    """Latents of a graph, in the pipeline's scale."""

    def run(graph: dict, scaling_factor: float = 0.31):
        (file,) = server.files(server.run(save_latent(graph)))
        return load(file)["latent_tensor"] * scaling_factor

    return run


def write_latent(server, name: str, latents) -> str:
    """Puts latents, in the pipeline's scale, into the server's input folder."""
    content = {"latent_tensor": latents / 0.31, "latent_format_version_0": torch.tensor([])}
    save_file(content, server.folder / "input" / name)
    return name


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", ["plain", "gamma", "v", "sd15-like", "deep"])
def test_text_to_image(name, steps, pipelines, embed, sample):
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    expected = pipelines.reference(name).few_step(embed(name), noise, fresh, steps)
    found = relative_error(sample(text_to_image(f"diffusers/{name}", PROMPT, seed=SEED, steps=steps)), expected)
    assert found < 1e-4


def test_the_decoded_picture(server, pipelines, embed):
    """Within one level of 255 where the host keeps the VAE in fp32: the autoencoder's groups are its config's."""
    noise, fresh = node_noises((1, 4, 16, 16), SEED)
    reference = pipelines.reference("plain")
    expected = reference.decode(reference.few_step(embed("plain"), noise, fresh, 4))[0]
    graph = save_image(text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=4))
    (file,) = server.files(server.run(graph))
    found = torch.from_numpy(np.array(Image.open(io.BytesIO(file)))) / 255
    assert (found - expected).abs().max() <= 1.01 / 255


@pytest.mark.parametrize("denoise", [0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("name", ["plain", "gamma"])
def test_image_to_image(name, denoise, server, pipelines, embed, sample):
    image = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    noise, fresh = node_noises(image.shape, SEED)
    expected = pipelines.reference(name).few_step(embed(name), noise, fresh, 4, strength=denoise, image=image)
    latent = write_latent(server, "image.latent", image)
    found = relative_error(
        sample(latent_to_image(f"diffusers/{name}", PROMPT, latent, seed=SEED, steps=4, denoise=denoise)), expected
    )
    assert found < 1e-4


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["plain", "gamma", "v"])
def test_every_route_gives_the_same_latents(name, steps, sample):
    """`plain` and `v` reach KSampler without SPLAM's parametrisation, `gamma` with it."""
    model, options = f"diffusers/{name}", {"seed": SEED, "steps": steps}
    expected = sample(text_to_image(model, PROMPT, **options))
    assert relative_error(sample(custom(model, PROMPT, **options)), expected) < 1e-5
    options |= {"cfg": 1.0, "sampler": "splam", "scheduler": "splam"}
    assert relative_error(sample(stock(model, PROMPT, **options)), expected) < 1e-5


def test_batch(pipelines, embed, sample):
    noise, fresh = node_noises((3, 4, 16, 24), SEED)
    expected = pipelines.reference("plain").few_step(embed("plain"), noise, fresh, 3)
    graph = text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=3, batch_size=3)
    graph["latent"]["inputs"]["width"] = 192
    assert relative_error(sample(graph), expected) < 1e-4


@pytest.mark.parametrize(("name", "steps", "denoise"), [("plain", 1, 1.0), ("gamma", 4, 1.0), ("v", 4, 0.5)])
def test_inpaint(name, steps, denoise, server, pipelines, embed, sample):
    """ComfyUI's mask rule on diffusers' loop, with a mask of all grey levels; nothing outside it changes."""
    image = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    levels = torch.randint(0, 256, (16, 16), generator=torch.Generator().manual_seed(6))
    levels[:, 12:] = 0
    pixels = levels.repeat_interleave(8, 0).repeat_interleave(8, 1).numpy().astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(server.folder / "input" / "mask.png")
    noise, fresh = node_noises(image.shape, SEED)
    options = {"strength": denoise, "image": image, "mask": levels[None, None] / 255}
    expected = pipelines.reference(name).few_step(embed(name), noise, fresh, steps, **options)
    latent = write_latent(server, "inpaint.latent", image)
    graph = latent_to_image(
        f"diffusers/{name}", PROMPT, latent, mask="mask.png", seed=SEED, steps=steps, denoise=denoise
    )
    found = sample(graph)
    assert relative_error(found, expected) < 1e-4
    assert torch.allclose(found[..., 12:], image[..., 12:], atol=1e-5)
    assert (found[..., :12] - image[..., :12]).abs().mean() > 0.1


@pytest.fixture(scope="module")
def rows(comfyui, tmp_path_factory):
    """The benchmark on every small shape, with all of its kinds of tasks on the last."""
    names = ("sd15", "sd15-cond_proj", "sd21", "sd21-v", "sd21-v-zero-snr", "sdxl-v-zero-snr")
    todo = {name: [parity.Task("txt2img", 2)] for name in names}
    todo["sdxl-lora"] = parity.tasks(steps=(2,), strengths=(0.5,))
    return parity.measure(comfyui, tmp_path_factory.mktemp("parity"), todo, training=True)


def test_the_benchmark_on_every_small_shape(rows):
    """SD1.5, SD2.1 and SDXL with a LoRA, at the width the host recognises by itself; the host's own way is another."""
    assert {row["route"] for row in rows} == {"splam", "stock", "trainer", "export"}
    assert max(row["error"] for row in rows if row["route"] == "splam") < 1e-4
    by_tutorial = [row for row in rows if row["route"] == "stock" and "simple" not in row["case"]]
    assert min(row["error"] for row in by_tutorial) > 1e-3


def test_a_v_model_with_zero_terminal_snr_is_trained_and_exported_as_the_formulas_say(rows):
    """Its losses at all timesteps, the last among them, and what a run writes in each form."""
    found = {route: [row for row in rows if row["route"] == route] for route in ("trainer", "export")}
    assert {route: len({row["case"] for row in some}) for route, some in found.items()} == {"trainer": 5, "export": 3}
    assert max(row["error"] for some in found.values() for row in some) < 1e-4


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15-true-size", "sd15-true-size-cond_proj"])
def test_the_true_sd15(name, comfyui, tmp_path):
    """860 M random weights; needs 8 GB of memory."""
    rows = parity.measure(comfyui, tmp_path, {name: [parity.Task("txt2img", 4)]}, routes=("splam",))
    assert rows[0]["error"] < 1e-4


def test_the_published_table_is_whole_and_within_its_limit():
    published = json.loads((ROOT / "docs" / "results" / "parity.json").read_text(encoding="utf-8"))
    ours = {(row["case"], row["steps"]): row["error"] for row in published if row["route"] == "splam"}
    wanted = {
        (f"{name} {task.name}", task.steps)
        for name, shape in parity.SHAPES.items()
        for task in (parity.true_size_tasks() if shape.true_size else parity.tasks())
    }
    assert set(ours) == wanted
    assert max(ours.values()) <= 1e-4
    trained = [row["error"] for row in published if row["route"] in ("trainer", "export")]
    assert len(trained) == 20 and max(trained) <= 1e-4


def test_the_teacher_samples_as_in_diffusers(pipelines, embed, sample):
    """A model that is no SPLAM keeps the host's own samplers exact: DDIM, guidance 3, trailing timesteps."""
    reference = pipelines.reference("plain")
    x, _ = node_noises((1, 4, 16, 16), SEED)
    scheduler = DDIMScheduler.from_config(
        reference.scheduler_config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(20)
    embeds = torch.cat([embed("plain"), embed("plain", "")])
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional, unconditional = reference.unet(torch.cat([x, x]), t, embeds).sample.chunk(2)
            x = scheduler.step(unconditional + 3 * (conditional - unconditional), t, x).prev_sample
    assert relative_error(sample(stock("diffusers/plain", PROMPT, seed=SEED, steps=20, cfg=3.0)), x) < 1e-4
