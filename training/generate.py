"""Pictures from a pipeline: the few-step SPLAM sampler and the DDIM reference, with every image's noise its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from splam_core import Denoiser, ddim_step, few_step_timesteps, guided, predict_epsilon, renoise_generator, sample

from .pipeline import Pipeline

SAMPLERS = ("splam", "ddim")


def guided_output(
    pipeline: Pipeline, x: Tensor, t: Tensor, prompt_embeds: Tensor, negative: Tensor, w: float
) -> Tensor:
    """The UNet's raw output with guidance w (eq. 18), both prompts in one batch; w = 1 takes one pass."""
    unet = pipeline.unet
    if w == 1:
        return unet(x.to(unet.dtype), t, prompt_embeds.to(unet.dtype)).sample.to(x)
    embeds = torch.cat([prompt_embeds, negative.expand_as(prompt_embeds)]).to(unet.dtype)
    both = unet(torch.cat([x, x]).to(unet.dtype), torch.cat([t, t]), embeds).sample.to(x)
    return guided(*both.chunk(2), w)


def unet_evaluations(steps: int, guidance_scale: float) -> int:
    """UNet evaluations an image; a guided step counts as two."""
    return steps * (1 if guidance_scale == 1 else 2)


@torch.no_grad()
def generate(
    pipeline: Pipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    sampler: str = "splam",
    steps: int = 4,
    guidance_scale: float = 1.0,
    batch_size: int = 64,
) -> Tensor:
    """Latents [len(prompts), 4, h, w], on the CPU. Image i depends on its prompt and seeds[i] alone, not on the batch.

    "splam" is the few-step sampler of splam_core on LCMScheduler's grid; "ddim" steps down {1000*i/steps - 1} to 0.
    Raises ValueError for an unknown sampler, and what `few_step_timesteps` raises for steps.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    finished = []
    negative = pipeline.encode([""])
    for start in range(0, len(prompts), batch_size):
        embeds = pipeline.encode(list(prompts[start : start + batch_size]))
        batch_seeds = list(seeds[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed) for seed in batch_seeds]
        noise = torch.stack([torch.randn(pipeline.latent_shape, generator=one) for one in generators]).to(embeds)
        run = _splam if sampler == "splam" else _ddim
        finished.append(run(pipeline, noise, batch_seeds, embeds, negative, steps, guidance_scale).float().cpu())
    return torch.cat(finished)


def _splam(
    pipeline: Pipeline, x: Tensor, seeds: list[int], embeds: Tensor, negative: Tensor, steps: int, w: float
) -> Tensor:
    denoiser = Denoiser(pipeline.schedule, pipeline.prediction_type)
    generators = [renoise_generator(seed) for seed in seeds]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(lambda x, t, _: guided_output(pipeline, x, t, embeds, negative, w), x, None, None, t)

    def noise(x: Tensor) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=one) for one in generators]).to(x)

    return sample(denoise, x, few_step_timesteps(steps), pipeline.schedule, noise)


def _ddim(
    pipeline: Pipeline, x: Tensor, _: list[int], embeds: Tensor, negative: Tensor, steps: int, w: float
) -> Tensor:
    schedule = pipeline.schedule
    last = schedule.num_train_timesteps
    grid = [round(last * (steps - i) / steps) - 1 for i in range(steps)] + [0]
    for now, then in itertools.pairwise(grid):
        t, s = (torch.full((len(x),), step, device=x.device) for step in (now, then))
        output = guided_output(pipeline, x, t, embeds, negative, w)
        epsilon = predict_epsilon(output, x, schedule.alpha(t), schedule.sigma(t), pipeline.prediction_type)
        x = ddim_step(x, epsilon, t, s, schedule)
    return x
