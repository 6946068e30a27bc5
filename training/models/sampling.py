"""Pictures from a pipeline: the few-step SPLAM sampler, the DDIM reference, and diffusers' fast samplers."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial

import torch
from diffusers import DPMSolverMultistepScheduler, LCMScheduler, UniPCMultistepScheduler
from torch import Tensor

from splam_core import Denoiser, ddim_step, few_step_timesteps, guided, predict_epsilon, renoise_generator, sample
from splam_core.solver import Teacher

from .pipeline import Conditioning, Pipeline, unet_arguments

SAMPLERS = ("splam", "ddim", "dpm-solver++", "unipc", "lcm")


def guided_output(
    pipeline: Pipeline, x: Tensor, t: Tensor, conditioning: Conditioning, negative: Conditioning, w: float
) -> Tensor:
    """The UNet's raw output with guidance w (eq. 18), both prompts in one batch; w = 1 takes one pass.

    negative: [1, ...] or [B, ...]; SDXL's time_ids are the prompt's on both sides.
    """
    unet = pipeline.unet
    if w == 1:
        return unet(x.to(unet.dtype), t, **unet_arguments(conditioning, unet.dtype)).sample.to(x)
    both = {
        key: torch.cat([value, value if key == "time_ids" else negative[key].expand_as(value)])
        for key, value in conditioning.items()
    }
    inputs = torch.cat([x, x]).to(unet.dtype), torch.cat([t, t])
    return guided(*unet(*inputs, **unet_arguments(both, unet.dtype)).sample.to(x).chunk(2), w)


def teacher_function(
    pipeline: Pipeline, conditioning: Conditioning, negative: Conditioning, guidance_scale: float
) -> Teacher:
    """The guided epsilon of a pipeline (eq. 18) as a function of (x [B, ...], t [B]); prompts as in `guided_output`."""
    schedule = pipeline.schedule

    def epsilon(x: Tensor, t: Tensor) -> Tensor:
        output = guided_output(pipeline, x, t, conditioning, negative, guidance_scale)
        return predict_epsilon(output, x, schedule.alpha(t), schedule.sigma(t), pipeline.prediction_type)

    return epsilon


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
    size: tuple[int, int] | None = None,
) -> Tensor:
    """Latents [len(prompts), 4, h, w], on the CPU. Image i depends on its prompt and seeds[i] alone, not on the batch.

    "splam" is the few-step sampler of splam_core on LCMScheduler's grid; "ddim" steps down {1000*i/steps - 1} to 0;
    "dpm-solver++" (2M), "unipc" and "lcm" are diffusers' schedulers with the pipeline's scheduler_config, one UNet
    evaluation a step ("lcm" draws its fresh noise from the generator that "splam" uses). size: height and width in
    pixels, None being the model's own. Raises ValueError for an unknown sampler, for a size that the VAE cannot make,
    and what `few_step_timesteps` raises for steps.
    """
    if sampler not in SAMPLERS:
        raise ValueError(f"unknown sampler {sampler!r}; expected one of {', '.join(SAMPLERS)}")
    if steps < 1:
        raise ValueError(f"steps must be 1 or more, got {steps}")
    shape = pipeline.latent_shape
    if size is not None:
        if any(side < 1 or side % pipeline.vae_scale for side in size):
            raise ValueError(
                f"height and width must be multiples of {pipeline.vae_scale} px, got {size[0]} x {size[1]}"
            )
        shape = (shape[0], *(side // pipeline.vae_scale for side in size))
    finished = []
    negative = pipeline.unconditional(size)
    for start in range(0, len(prompts), batch_size):
        conditioning = pipeline.encode(list(prompts[start : start + batch_size]), size)
        batch_seeds = list(seeds[start : start + batch_size])
        generators = [torch.Generator().manual_seed(seed) for seed in batch_seeds]
        # In float32 whatever the weights are: half precision would round every step.
        noise = torch.stack([torch.randn(shape, generator=one) for one in generators]).to(pipeline.device)
        if sampler in _DIFFUSERS:
            run = partial(_diffusers, _DIFFUSERS[sampler](pipeline.scheduler_config))
        else:
            run = _splam if sampler == "splam" else _ddim
        finished.append(run(pipeline, noise, batch_seeds, conditioning, negative, steps, guidance_scale).float().cpu())
    return torch.cat(finished)


def _splam(
    pipeline: Pipeline,
    x: Tensor,
    seeds: list[int],
    conditioning: Conditioning,
    negative: Conditioning,
    steps: int,
    w: float,
) -> Tensor:
    denoiser = Denoiser(pipeline.schedule, pipeline.prediction_type)
    generators = [renoise_generator(seed) for seed in seeds]

    def denoise(x: Tensor, t: Tensor) -> Tensor:
        return denoiser(lambda x, t, _: guided_output(pipeline, x, t, conditioning, negative, w), x, None, None, t)

    def noise(x: Tensor, _: int) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=one) for one in generators]).to(x)

    return sample(denoise, x, few_step_timesteps(steps), pipeline.schedule, noise)


def _ddim(
    pipeline: Pipeline,
    x: Tensor,
    _: list[int],
    conditioning: Conditioning,
    negative: Conditioning,
    steps: int,
    w: float,
) -> Tensor:
    teacher, schedule = teacher_function(pipeline, conditioning, negative, w), pipeline.schedule
    last = schedule.num_train_timesteps
    grid = [round(last * (steps - i) / steps) - 1 for i in range(steps)] + [0]
    for now, then in itertools.pairwise(grid):
        t, s = (torch.full((len(x),), step, device=x.device) for step in (now, then))
        x = ddim_step(x, teacher(x, t), t, s, schedule)
    return x


_DIFFUSERS = {
    "dpm-solver++": partial(DPMSolverMultistepScheduler.from_config, algorithm_type="dpmsolver++", solver_order=2),
    "unipc": UniPCMultistepScheduler.from_config,
    "lcm": LCMScheduler.from_config,
}


def _diffusers(
    scheduler,
    pipeline: Pipeline,
    x: Tensor,
    seeds: list[int],
    conditioning: Conditioning,
    negative: Conditioning,
    steps: int,
    w: float,
) -> Tensor:
    """One of diffusers' schedulers, made for this batch: they keep what they saw of the steps before."""
    fresh = {}
    if isinstance(scheduler, LCMScheduler):
        few_step_timesteps(steps)  # its error says what to do; the scheduler's own does not
        fresh = {"generator": [renoise_generator(seed) for seed in seeds]}
    scheduler.set_timesteps(steps, device=x.device)
    x = x * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = guided_output(pipeline, scaled, t.expand(len(x)), conditioning, negative, w)
        x = scheduler.step(output, t, x, **fresh, return_dict=False)[0]
    return x
