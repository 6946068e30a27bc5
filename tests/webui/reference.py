"""diffusers' LCMScheduler around a small UNet: what every host is to agree with."""

import copy
import functools
from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.schedulers import scheduling_lcm

ROOT = Path(__file__).resolve().parents[2]


def embedding(seed, tokens=5):
    return torch.randn(tokens, 32, generator=torch.Generator().manual_seed(seed))


def build_unet():
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=32,
    ).eval()


UNET = build_unet()


def tiny_network(x, t, context):
    with torch.no_grad():
        return UNET(x, t, context).sample


def lcm(z, context, steps, noises, strength=1.0, blend=None, see=None, **config):
    """diffusers' LCMScheduler around the UNet: z at the first timestep, one of `noises` after each step but the last.

    blend(x0) and see(z, t) are what a host's mask does to a prediction and to what the UNet sees.
    """
    scheduler = scheduler_of(**config)
    scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
    fresh = iter(noises)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduling_lcm, "randn_tensor", lambda *_, **__: next(fresh))
        for t in scheduler.timesteps:
            seen = see(z, t) if see else z
            output = tiny_network(seen, t, context)
            if blend:
                alpha, sigma = levels(scheduler, t)
                x0 = blend((seen - sigma * output) / alpha)
                output = (z - alpha * x0) / sigma
            z, denoised = scheduler.step(output, t, z, return_dict=False)
    return denoised


@functools.cache
def exact_unet():
    return copy.deepcopy(UNET).double()


def composed(z, pictures, negative, steps, noises, strength=1.0, edited=False):
    """Prompts composed at guidance 1, in float64, from the formulas: u + sum of w (c - u) over a picture's parts.

    z: [B, ...] at the first timestep; pictures: for every row of z its list of (embedding, weight), or with
    `edited` such a list for every step.
    """
    network = exact_unet()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    signal = torch.cumprod(1 - betas, 0)
    scheduler = scheduler_of()
    scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
    z, noises = z.double(), [noise.double() for noise in noises]
    for step, t in enumerate(scheduler.timesteps.tolist()):
        alpha, sigma = signal[t].sqrt(), (1 - signal[t]).sqrt()

        def x0(latent, embedding, t=t, alpha=alpha, sigma=sigma):
            with torch.no_grad():
                return (latent - sigma * network(latent, t, embedding.double()[None]).sample) / alpha

        sums = []
        for latent, parts in zip(z.split(1), pictures[step] if edited else pictures, strict=True):
            without = x0(latent, negative)
            sums.append(without + sum(weight * (x0(latent, embedding) - without) for embedding, weight in parts))
        u = 10 * t
        denoised = 0.25 / (u**2 + 0.25) * z + u / (u**2 + 0.25) ** 0.5 * torch.cat(sums)
        if step + 1 < len(scheduler.timesteps):
            after = signal[scheduler.timesteps[step + 1]]
            z = after.sqrt() * denoised + (1 - after).sqrt() * noises[step]
    return denoised


def scheduler_of(**config):
    """Stable Diffusion 1.x's schedule. With zero terminal SNR, the hosts' 4.9e-8 in place of the 0 at its end."""
    scheduler = LCMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", **config)
    scheduler.alphas_cumprod[-1] = scheduler.alphas_cumprod[-1].clamp(min=4.8973451890853435e-08)
    return scheduler


def levels(scheduler, t):
    signal = scheduler.alphas_cumprod[t]
    return signal.sqrt(), (1 - signal).sqrt()


def noised(image, noise, steps, strength, **config):
    """The latent from which diffusers starts image-to-image."""
    scheduler = scheduler_of(**config)
    scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
    return scheduler.add_noise(image, noise, scheduler.timesteps[:1])


def assert_same(found, expected, tolerance=1e-4):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= tolerance * expected.std()
