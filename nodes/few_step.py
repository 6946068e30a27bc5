"""splam_core's few-step sampler in ComfyUI's variables: as a k-diffusion sampler, and its sigmas as a scheduler."""

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..splam_core.sampler import add_noise, fresh_noise, sample
from ..splam_core.schedule import GRID, broadcast_to, few_step_timesteps
from ..splam_core.subpath import SubPathLinear
from .gamma import asking_at
from .host import ModelSampling, WrappedModel
from .parametrisation import (
    Point,
    consistency,
    is_consistency,
    is_empty,
    nearest_timesteps,
    schedule_of,
    takes_sub_paths,
)

NAME = "splam"  # in KSampler's lists of samplers and schedulers


def check_steps(node: str, steps: int, denoise: float) -> None:
    """Raises ValueError, in the words of the node's inputs, for steps that the grid does not hold."""
    kept = int(GRID * denoise)
    if not 1 <= steps <= kept:
        raise ValueError(
            f"{node}: {steps} steps do not fit denoise {denoise:g}, which leaves {kept} of the model's {GRID} "
            f"timesteps. Use a denoise of {steps / GRID:g} or more, or fewer steps."
        )


def check_latent(node: str, samples: Tensor, channels: int) -> None:
    """Raises ValueError for latents that this model cannot take."""
    if samples.is_nested or samples.ndim != 4:
        raise ValueError(
            f"{node}: the latent image is of a video or sound model; expected latents of shape [batch, {channels}, "
            f"height, width], found {list(samples.shape)}. Connect Empty Latent Image, or encode a picture with the "
            "VAE of this model's loader."
        )
    if samples.numel() == 0:
        raise ValueError(f"{node}: the latent image is empty, shape {tuple(samples.shape)}. Give at least one latent.")
    if samples.shape[1] != channels:
        raise ValueError(
            f"{node}: this model's latents have {channels} channels, the latent image has {samples.shape[1]}. "
            "Encode the picture with the VAE of this model's loader."
        )
    if not torch.isfinite(samples).all():
        raise ValueError(
            f"{node}: the latent image holds NaN or infinite values. The node that made it failed; "
            "a VAE in half precision may need ComfyUI's --fp32-vae."
        )


def check_sigmas(sigmas: Tensor, sampling: ModelSampling) -> None:
    """Raises ValueError for sigmas that this sampler cannot follow on this model_sampling."""
    if not torch.isfinite(sigmas).all():
        raise ValueError(
            "SPLAM: the sigmas hold NaN or infinite values: their scheduler does not fit this MODEL. Connect SPLAM "
            "Scheduler, or choose the scheduler 'splam'."
        )
    first, largest = float(sigmas[0]), float(sampling.sigma_max)
    if first > largest * 1.001:
        raise ValueError(
            f"SPLAM: the sigmas begin at {first:.4g}, and this MODEL's largest is {largest:.4g}: there is more noise "
            "in the latent than it can take away. Connect SPLAM Scheduler, or take out Set First Sigma and the like."
        )
    if (sigmas.diff() >= 0).any():
        raise ValueError(
            f"SPLAM: the sigmas must fall from step to step, found {[round(float(sigma), 4) for sigma in sigmas[:9]]}. "
            "SPLAM takes noise away and cannot add it step by step: take out Flip Sigmas and the like, or connect "
            "SPLAM Scheduler."
        )


def splam_sigmas(sampling: ModelSampling, steps: int, denoise: float = 1.0) -> Tensor:
    """SIGMAS [steps + 1] of LCMScheduler's timesteps, ending in 0. sampling: a MODEL's model_sampling.

    Raises ValueError as `schedule_of` and `few_step_timesteps`.
    """
    schedule_of(sampling)  # for its errors: the timesteps mean nothing to other kinds of models
    # From the model's own table: the host compares the first one with its largest to tell text-to-image.
    return torch.cat([sampling.sigma(few_step_timesteps(steps, denoise)), torch.zeros(1)])


@torch.no_grad()
def sample_splam(
    model: WrappedModel,
    x: Tensor,
    sigmas: Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    refinements: int = 0,
) -> Tensor:
    """Consistency sampling (eq. 19; Song et al., algorithm 1), one model evaluation a step (1 + `refinements`).

    Works on any MODEL of a discrete schedule: without SPLAM's parametrisation the boundary scalings are applied here.
    The fresh noise is a function of the seed, the timestep and the picture's number in its batch; without a seed (the
    host's DisableNoise) of seed 0.
    """
    extra_args = {} if extra_args is None else extra_args
    if len(sigmas) < 2:
        return x  # no step, as after Split Sigmas at the end: the host's samplers do the same
    sampling = model.inner_model.inner_model.model_sampling
    schedule = schedule_of(sampling).to(x.device)
    check_sigmas(sigmas, sampling)
    check_latent("SPLAM", x, model.inner_model.inner_model.latent_format.latent_channels)
    patched = is_consistency(sampling)
    if refinements > 0 and not takes_sub_paths(sampling):
        raise ValueError(
            f"SPLAM: refinements = {refinements} needs a MODEL that is told gamma. Put SPLAM Model Patch before the "
            "sampler with gamma_conditioning 'noise-level' or 'embedding', or set refinements to 0."
        )
    if not patched:
        x = x + _surplus_noise(model, sampling, sigmas[0])
    timesteps = nearest_timesteps(schedule, sigmas[sigmas > 0]).cpu()
    evaluations = len(sigmas) - 1

    def denoise(z: Tensor, t: Tensor) -> Tensor:
        sigma = schedule.ve_sigma(t)
        x = z / broadcast_to(schedule.alpha(t), z)
        denoised: Tensor = model(x, sigma, **extra_args)
        return denoised if patched else consistency(denoised, x, sigma, t)

    subpath = SubPathLinear(schedule)

    def denoise_gamma(z: Tensor, gamma: Tensor, s: Tensor, t: Tensor) -> Tensor:
        point = Point(gamma[0].item(), int(t[0]))
        alpha = schedule.alpha(t)
        x, sigma = z / broadcast_to(alpha, z), subpath.sigma(gamma, s, t) / alpha
        denoised: Tensor = model(x, sigma, **asking_at(point, extra_args))
        return denoised

    progress = tqdm(total=evaluations, disable=disable)

    def report(step: int, t: int, z: Tensor, x0: Tensor) -> None:
        progress.update()
        if callback is not None:
            sigma = sigmas[step]
            callback({"x": z / schedule.alpha(t), "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})

    noise = fresh_noise(extra_args.get("seed") or 0, _numbers_in_batch(len(x)))
    with progress:
        z = x * schedule.alpha(timesteps[0])
        x0 = sample(denoise, z, timesteps[:evaluations], schedule, noise, report, refinements, denoise_gamma, subpath)
    if len(timesteps) == evaluations:
        return x0
    # The sigmas stop above zero: another sampler goes on from there.
    return add_noise(x0, noise(x0, int(timesteps[-1])), timesteps[-1], schedule) / schedule.alpha(timesteps[-1])


def _numbers_in_batch(count: int) -> list[int]:
    """[count]: the number in its batch from which the host draws each picture's initial noise.

    A LATENT carries it as `batch_index`, which the host reads in the node that samples and does not pass on, at noise
    switched off not at all: so it is read where it stands, in the nearest caller that holds a LATENT of this many.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        for value in frame.f_locals.values():
            samples = value.get("samples") if isinstance(value, dict) else None
            if isinstance(samples, Tensor) and len(samples) == count:
                numbers = value.get("batch_index")
                return list(range(count)) if numbers is None or len(numbers) != count else list(numbers)
        frame = frame.f_back
    return list(range(count))


def _surplus_noise(model: WrappedModel, sampling: ModelSampling, sigma: Tensor) -> Tensor | float:
    """What to add to the host's start of a MODEL without SPLAM's parametrisation.

    At denoise 1 the host noises a picture as if it were nothing, by sqrt(1 + sigma^2) in place of sigma; image-to-image
    starts from add_noise at every strength. (The parametrisation says so to the host by itself.)
    """
    latent, noise = getattr(model, "latent_image", None), getattr(model, "noise", None)
    is_largest = float(sigma) > float(sampling.sigma_max) * (1 - 1e-5)
    if latent is None or noise is None or not is_largest:
        return 0.0
    surplus: Tensor = noise * (sigma - (1 + sigma**2) ** 0.5)
    return torch.where(broadcast_to(is_empty(latent), surplus), 0.0, surplus)


def _whole_schedule(sampling: ModelSampling, steps: int) -> Tensor:
    """The scheduler `splam` of KSampler and its kin, which ask for steps / denoise of them and cut by themselves."""
    if steps > GRID:
        raise ValueError(
            f"SPLAM: the scheduler 'splam' has {GRID} noise levels and was asked for {steps} steps: below denoise 1 "
            "KSampler asks for steps / denoise of them. Use a higher denoise or fewer steps, or SPLAM Sampler, whose "
            "denoise may go down to steps/50."
        )
    return splam_sigmas(sampling, steps)


def register() -> None:
    """Puts `splam` into the host's lists, from which KSampler and its kin fill their dropdowns. May be called again."""
    comfy.k_diffusion.sampling.sample_splam = sample_splam
    comfy.samplers.SCHEDULER_HANDLERS[NAME] = comfy.samplers.SchedulerHandler(_whole_schedule)
    for names in (comfy.samplers.KSAMPLER_NAMES, comfy.samplers.SAMPLER_NAMES, comfy.samplers.SCHEDULER_NAMES):
        if NAME not in names:
            names.append(NAME)
