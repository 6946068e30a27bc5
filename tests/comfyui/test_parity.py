"""The node's latents are those of diffusers' LCMScheduler on the same weights, prompt and noises.

At most 1e-4 of their standard deviation off, in fp32.
"""

import io

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from safetensors.torch import load, save_file
from transformers import CLIPTokenizer

from benchmarks.graphs import custom, latent_to_image, save_image, save_latent, stock, text_to_image

pytestmark = pytest.mark.comfyui
PROMPT = "a large red star above a small blue ring"
SEED = 1234
RENOISE_OFFSET = 0x53504C414D  # written out: the pictures of a seed must not change with the code


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


def node_noises(shape, seed=SEED):
    """The initial noise as the stock KSampler draws it, and SPLAM's own fresh noise."""
    initial = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    generator = torch.Generator("cpu").manual_seed((seed + RENOISE_OFFSET) % 2**64)
    return initial, lambda x: torch.randn(x.shape, generator=generator)


def error(found, expected) -> float:
    return ((found - expected).abs().max() / expected.std()).item()


def write_latent(server, name: str, latents) -> str:
    """Puts latents, in the pipeline's scale, into the server's input folder."""
    content = {"latent_tensor": latents / 0.31, "latent_format_version_0": torch.tensor([])}
    save_file(content, server.folder / "input" / name)
    return name


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 6, 8])
@pytest.mark.parametrize("name", ["plain", "gamma", "v", "sd15-like", "deep"])
def test_text_to_image(name, steps, pipelines, embed, sample):
    noise, fresh = node_noises((1, 4, 16, 16))
    expected = pipelines.reference(name).few_step(embed(name), noise, fresh, steps)
    found = error(sample(text_to_image(f"diffusers/{name}", PROMPT, seed=SEED, steps=steps)), expected)
    assert found < 1e-4


def test_the_decoded_picture(server, pipelines, embed):
    """Within one level of 255 where the host keeps the VAE in fp32: the autoencoder's groups are its config's."""
    noise, fresh = node_noises((1, 4, 16, 16))
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
    noise, fresh = node_noises(image.shape)
    expected = pipelines.reference(name).few_step(embed(name), noise, fresh, 4, strength=denoise, image=image)
    latent = write_latent(server, "image.latent", image)
    found = error(
        sample(latent_to_image(f"diffusers/{name}", PROMPT, latent, seed=SEED, steps=4, denoise=denoise)), expected
    )
    assert found < 1e-4


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("name", ["plain", "gamma", "v"])
def test_every_route_gives_the_same_latents(name, steps, sample):
    """`plain` and `v` reach KSampler without SPLAM's parametrisation, `gamma` with it."""
    model, options = f"diffusers/{name}", {"seed": SEED, "steps": steps}
    expected = sample(text_to_image(model, PROMPT, **options))
    assert error(sample(custom(model, PROMPT, **options)), expected) < 1e-5
    options |= {"cfg": 1.0, "sampler": "splam", "scheduler": "splam"}
    assert error(sample(stock(model, PROMPT, **options)), expected) < 1e-5


def test_batch(pipelines, embed, sample):
    noise, fresh = node_noises((3, 4, 16, 24))
    expected = pipelines.reference("plain").few_step(embed("plain"), noise, fresh, 3)
    graph = text_to_image("diffusers/plain", PROMPT, seed=SEED, steps=3, batch_size=3)
    graph["latent"]["inputs"]["width"] = 192
    assert error(sample(graph), expected) < 1e-4


def test_inpaint_keeps_what_is_outside_the_mask(server, sample):
    image = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    mask = np.zeros((128, 128, 3), np.uint8)
    mask[:, :64] = 255
    Image.fromarray(mask).save(server.folder / "input" / "mask.png")
    latent = write_latent(server, "inpaint.latent", image)
    found = sample(latent_to_image("diffusers/plain", PROMPT, latent, mask="mask.png", seed=SEED, steps=4))
    assert torch.allclose(found[..., 8:], image[..., 8:], atol=1e-5)
    assert (found[..., :8] - image[..., :8]).abs().mean() > 0.1


def test_the_teacher_samples_as_in_diffusers(pipelines, embed, sample):
    """A model that is no SPLAM keeps the host's own samplers exact: DDIM, guidance 3, trailing timesteps."""
    reference = pipelines.reference("plain")
    x, _ = node_noises((1, 4, 16, 16))
    scheduler = DDIMScheduler.from_config(
        reference.scheduler_config, timestep_spacing="trailing", set_alpha_to_one=True
    )
    scheduler.set_timesteps(20)
    embeds = torch.cat([embed("plain"), embed("plain", "")])
    with torch.no_grad():
        for t in scheduler.timesteps:
            conditional, unconditional = reference.unet(torch.cat([x, x]), t, embeds).sample.chunk(2)
            x = scheduler.step(unconditional + 3 * (conditional - unconditional), t, x).prev_sample
    assert error(sample(stock("diffusers/plain", PROMPT, seed=SEED, steps=20, cfg=3.0)), x) < 1e-4
