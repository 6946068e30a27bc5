"""Noise levels and latents that do not fit get a sentence, on every route; odd ones that fit come out right."""

import pytest
import torch
from safetensors.torch import load, save_file
from transformers import CLIPTokenizer

from harness.graphs import save_latent
from harness.reference import Reference, few_step, node_noises, relative_error, write_pipeline
from harness.server import ServerError

from .routes import PROMPT, ROUTES, SEED, STEPS, node, route

pytestmark = pytest.mark.comfyui
OTHER_KIND = r"SPLAM needs a Stable Diffusion model that predicts noise or v"


@pytest.fixture
def run(server):
    def run(graph: dict) -> torch.Tensor:
        (file,) = server.files(server.run(save_latent(graph)))
        return load(file)["latent_tensor"] * 0.31

    return run


@pytest.fixture(scope="module")
def picture(server) -> torch.Tensor:
    """The latent in the server's input folder as picture.latent."""
    image = torch.randn((1, 4, 16, 16), generator=torch.Generator().manual_seed(5))
    content = {"latent_tensor": image / 0.31, "latent_format_version_0": torch.tensor([])}
    save_file(content, server.folder / "input" / "picture.latent")
    return image


def custom(**sigmas_and_more: dict) -> dict:
    """SamplerCustom on a picture with other nodes in it."""
    graph = route("custom", "plain", {"latent": node("LoadLatent", latent="picture.latent")})
    return graph | sigmas_and_more


def test_rising_sigmas(picture, run):
    with pytest.raises(ServerError, match=r"the sigmas must fall from step to step, found \[0\.0001, .*Flip Sigmas"):
        graph = custom(flipped=node("FlipSigmas", sigmas=["sigmas", 0]))
        graph["sampled"]["inputs"]["sigmas"] = ["flipped", 0]
        run(graph)


def test_infinite_sigmas_are_not_blamed_on_the_vae(picture, run):
    with pytest.raises(ServerError, match=r"the sigmas hold NaN or infinite values: their scheduler does not fit"):
        run(custom(sigmas=node("VPScheduler", steps=4, beta_d=5000.0, beta_min=0.1, eps_s=0.001)))


@pytest.mark.parametrize("family", ["splam", "tcd"])
def test_more_noise_than_the_model_knows(family, picture, run):
    """As with another family's schedule: every picture would be noise."""
    graph = custom(sigmas=node("VPScheduler", steps=4, beta_d=19.9, beta_min=0.1, eps_s=0.001))
    graph["sampler"]["inputs"]["family"] = family
    with pytest.raises(ServerError, match=r"begin at 152\.\d, and this MODEL's largest is 14\.61"):
        run(graph)


def test_no_step_changes_nothing(picture, run):
    graph = custom(split=node("SplitSigmas", sigmas=["sigmas", 0], step=STEPS))
    graph["sampled"]["inputs"] |= {"sigmas": ["split", 1], "add_noise": False}
    assert relative_error(run(graph), picture) < 1e-5


KINDS = {
    "Flux": node("ModelSamplingFlux", model=["model", 0], max_shift=1.15, base_shift=0.5, width=128, height=128),
    "EDM": node("ModelSamplingContinuousEDM", model=["model", 0], sampling="edm", sigma_max=120.0, sigma_min=0.002),
    "Stable Cascade": node("ModelSamplingStableCascade", model=["model", 0], shift=2.0),
}


@pytest.mark.parametrize("name, sampler", [("splam", None), ("ksampler", "splam"), ("ksampler", "euler")])
@pytest.mark.parametrize("kind", KINDS)
def test_models_of_other_kinds(kind, name, sampler, run):
    graph = route(name, "plain", {"patched": KINDS[kind]})
    if sampler:
        graph["sampled"]["inputs"]["sampler_name"] = sampler  # the scheduler stays SPLAM's
    with pytest.raises(ServerError, match=OTHER_KIND):
        run(graph)


@pytest.mark.parametrize("name", ROUTES)
def test_lcm_sampling_with_zero_terminal_snr(name, run):
    zero = node("ModelSamplingDiscrete", model=["model", 0], sampling="lcm", zsnr=True)
    with pytest.raises(ServerError, match=r"50 noise levels that are not Stable Diffusion's.*'lcm' with zsnr"):
        run(route(name, "plain", {"patched": zero}))


def test_more_steps_than_the_schedule_has(run):
    """KSampler asks for int(3 / 0.05) = 60 steps and keeps the last three."""
    graph = route("ksampler", "plain")
    graph["sampled"]["inputs"]["denoise"] = 0.05
    with pytest.raises(ServerError, match=r"has 50 noise levels and was asked for 60 steps.*steps / denoise"):
        run(graph)


@pytest.mark.parametrize("name", ROUTES)
@pytest.mark.parametrize("model", ["plain", "gamma"])
def test_a_batch_of_nothing_and_a_picture(model, name, picture, run):
    """At denoise 1 the one is text-to-image and the other image-to-image, as if each were alone."""
    empty = node("EmptyLatentImage", width=128, height=128, batch_size=1)
    image = node("LoadLatent", latent="picture.latent")
    mixed = {
        "empty": empty,
        "image": image,
        "latent": node("LatentBatch", samples1=["empty", 0], samples2=["image", 0]),
    }
    alone = torch.cat([run(route(name, model, {"latent": latent})) for latent in (empty, image)])
    assert relative_error(alone[0], alone[1]) > 1e-2
    assert relative_error(run(route(name, model, mixed)), alone) < 1e-5


@torch.no_grad()
def test_instruct_pix2pix(comfyui, pipelines, server, run):
    """A UNet of 8 channels sees the encoded picture beside the noise."""
    folder = pipelines.folder / "ip2p"
    write_pipeline(folder, seed=6, in_channels=8)
    extra = {
        "pixels": node("EmptyImage", width=128, height=128, batch_size=1, color=0x336699),
        "instructed": node(
            "InstructPixToPixConditioning",
            **{"positive": ["positive", 0], "negative": ["other", 0], "vae": ["model", 2], "pixels": ["pixels", 0]},
        ),
        "conditioned": node("ConditioningCombine", conditioning_1=["instructed", 0], conditioning_2=["instructed", 0]),
    }
    encoded = route("splam", "ip2p", extra)
    encoded["sampled"] = node("VAEEncode", pixels=["pixels", 0], vae=["model", 2])
    image = run(encoded) / 0.31  # the picture stands there as the VAE gives it, not scaled
    reference = Reference(folder)

    class Beside(torch.nn.Module):
        config = reference.unet.config

        def forward(self, x, t, embeds, **options):
            return reference.unet(torch.cat([x, image], dim=1), t, embeds, **options)

    tokenizer = CLIPTokenizer.from_pretrained(comfyui / "comfy" / "sd1_tokenizer")
    embeds = reference.embed(tokenizer(PROMPT)["input_ids"])
    noises = node_noises((1, 4, 16, 16), SEED)
    expected = few_step(Beside(), reference.scheduler_config, embeds, *noises, STEPS)
    for name in ROUTES:
        assert relative_error(run(route(name, "ip2p", extra)), expected) < 1e-4, name
