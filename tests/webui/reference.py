"""diffusers' LCMScheduler around a small UNet: what every host is to agree with."""

from pathlib import Path

import pytest
import torch
from diffusers import LCMScheduler, UNet2DConditionModel
from diffusers.schedulers import scheduling_lcm

ROOT = Path(__file__).resolve().parents[2]


def embedding(seed):
    return torch.randn(5, 32, generator=torch.Generator().manual_seed(seed))


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


def lcm(z, context, steps, noises, strength=1.0, prediction_type="epsilon", blend=None, see=None):
    """diffusers' LCMScheduler around the UNet: z at the first timestep, one of `noises` after each step but the last.

    blend(x0) and see(z, t) are what a host's mask does to a prediction and to what the UNet sees.
    """
    scheduler = scheduler_of(prediction_type)
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


def scheduler_of(prediction_type="epsilon"):
    return LCMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction_type
    )


def levels(scheduler, t):
    signal = scheduler.alphas_cumprod[t]
    return signal.sqrt(), (1 - signal).sqrt()


def noised(image, noise, steps, strength):
    """The latent from which diffusers starts image-to-image."""
    scheduler = scheduler_of()
    scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
    return scheduler.add_noise(image, noise, scheduler.timesteps[:1])


def assert_same(found, expected):
    assert found.shape == expected.shape
    assert (found - expected).abs().max() <= 1e-4 * expected.std()
