"""Few-step sampling of any network that predicts noise, by splam_core alone."""

import torch

from splam_core import Denoiser, NoiseSchedule, few_step_timesteps, fresh_noise, sample


@torch.no_grad()
def draw(unet, shape, steps=4, seed=0):
    """x0 of `shape` [B, ...]; unet(x [B, ...], t [B]) gives the noise that x holds, as Stable Diffusion's does."""
    schedule = NoiseSchedule.scaled_linear()
    denoiser = Denoiser(schedule)
    timesteps = few_step_timesteps(steps)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return sample(
        denoise=lambda x, t: denoiser(lambda x, t, gamma: unet(x, t), x, None, None, t),
        x=x,
        timesteps=timesteps,
        schedule=schedule,
        noise=fresh_noise(seed, range(len(x))),
    )
