"""splam_core's few-step sampler in ComfyUI's variables: as a k-diffusion sampler, and its sigmas as a scheduler."""

import comfy.k_diffusion.sampling
import comfy.samplers
import torch
from tqdm.auto import tqdm

from ..splam_core.sampler import add_noise, cpu_noise, renoise_generator, sample
from ..splam_core.schedule import broadcast_to, few_step_timesteps
from .parametrisation import consistency, is_consistency, nearest_timesteps, schedule_of

GRID = 50  # points of the grid that distillation trains on; image-to-image keeps int(GRID * denoise) of them
NAME = "splam"  # in KSampler's lists of samplers and schedulers


def check_steps(node: str, steps: int, denoise: float) -> None:
    """Raises ValueError, in the words of the node's inputs, for steps that the grid does not hold."""
    kept = int(GRID * denoise)
    if not 1 <= steps <= kept:
        raise ValueError(
            f"{node}: {steps} steps do not fit denoise {denoise:g}, which leaves {kept} of the model's {GRID} "
            f"timesteps. Use a denoise of {steps / GRID:g} or more, or fewer steps."
        )


def splam_sigmas(sampling, steps: int, denoise: float = 1.0) -> torch.Tensor:
    """SIGMAS [steps + 1] of LCMScheduler's timesteps, ending in 0. sampling: a MODEL's model_sampling."""
    # From the model's own table: the host compares the first one with its largest to tell text-to-image.
    return torch.cat([sampling.sigma(few_step_timesteps(steps, denoise, GRID)), torch.zeros(1)])


@torch.no_grad()
def sample_splam(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Consistency sampling (eq. 19; Song et al., algorithm 1), one model evaluation a step.

    Works on any MODEL of a discrete schedule: without SPLAM's parametrisation the boundary scalings are applied here.
    The fresh noise comes from SPLAM's own generator, so that a seed means one picture on every ComfyUI version.
    """
    extra_args = {} if extra_args is None else extra_args
    sampling = model.inner_model.inner_model.model_sampling
    patched = is_consistency(sampling)
    schedule = schedule_of(sampling).to(x.device)
    timesteps = nearest_timesteps(schedule, sigmas[sigmas > 0]).cpu()
    evaluations = len(sigmas) - 1

    def denoise(z, t):
        sigma = schedule.ve_sigma(t)
        x = z / broadcast_to(schedule.alpha(t), z)
        denoised = model(x, sigma, **extra_args)
        return denoised if patched else consistency(denoised, x, sigma, t)

    progress = tqdm(total=evaluations, disable=disable)

    def report(step, t, z, x0):
        progress.update()
        if callback is not None:
            sigma = sigmas[step]
            callback({"x": z / schedule.alpha(t), "i": step, "sigma": sigma, "sigma_hat": sigma, "denoised": x0})

    fresh_noise = cpu_noise(renoise_generator(extra_args.get("seed") or 0))
    with progress:
        z = x * schedule.alpha(timesteps[0])
        x0 = sample(denoise, z, timesteps[:evaluations], schedule, fresh_noise, callback=report)
    if len(timesteps) == evaluations:
        return x0
    # The sigmas stop above zero: another sampler goes on from there.
    return add_noise(x0, fresh_noise(x0), timesteps[-1], schedule) / schedule.alpha(timesteps[-1])


def register() -> None:
    """Puts `splam` into the host's lists, from which KSampler and its kin fill their dropdowns. May be called again."""
    comfy.k_diffusion.sampling.sample_splam = sample_splam
    comfy.samplers.SCHEDULER_HANDLERS[NAME] = comfy.samplers.SchedulerHandler(splam_sigmas)
    for names in (comfy.samplers.KSAMPLER_NAMES, comfy.samplers.SAMPLER_NAMES, comfy.samplers.SCHEDULER_NAMES):
        if NAME not in names:
            names.append(NAME)
