"""splam_core's families of few-step models in ComfyUI's variables: one sampler and one schedule for all of them."""

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch
from tqdm.auto import tqdm

from ..splam_core.denoiser import boundary_scalings
from ..splam_core.families import FAMILIES, Family, landings, step_on, timesteps_of
from ..splam_core.sampler import fresh_noise
from ..splam_core.schedule import broadcast_to
from .announce import tell
from .few_step import NAME, _numbers_in_batch, check_latent, check_sigmas, check_steps, sample_splam, splam_sigmas
from .host import Model, ModelSampling, Sampler, WrappedModel
from .options import FAMILY_CHOICES, check_choice
from .parametrisation import is_consistency, is_empty, nearest_timesteps, schedule_of

AUTO = "auto"
ATTACHMENT = "splam_family"  # on a MODEL: (family, what told it)


def family_of(node: str, model: Model | None, name: str) -> Family:
    """The family called `name`; of "auto" the one that the MODEL's files told its loader, and a sentence says which."""
    check_choice(node, "family", name, FAMILY_CHOICES)
    if name != AUTO:
        return FAMILIES[name]
    told = model.get_attachment(ATTACHMENT) if model is not None else None
    family = FAMILIES[told[0]] if told else FAMILIES[NAME]
    reason = told[1] if told else "nothing in the MODEL's files tells; SPLAM Loader and SPLAM LoRA Loader read them"
    tell(f"{node}: family 'auto' took '{family.name}' ({family.title}): {reason}.")
    return family


def family_sigmas(node: str, sampling: ModelSampling, family: Family, steps: int, denoise: float) -> torch.Tensor:
    """SIGMAS [steps + 1] of a family, ending in 0. sampling: a MODEL's model_sampling.

    Raises ValueError in the words of the node's inputs.
    """
    if not family.trailing:
        check_steps(node, steps, denoise)
    if family.name == NAME:
        return splam_sigmas(sampling, steps, denoise)
    schedule_of(sampling)  # for its errors
    try:
        timesteps = timesteps_of(family, steps, denoise)
    except ValueError as error:
        raise ValueError(f"{node}: {str(error).replace('strength', 'denoise')}") from None
    return torch.cat([sampling.sigma(timesteps), torch.zeros(1)])


def sampler_of(family: str, refinements: int, eta: float) -> Sampler:
    """The SAMPLER of a family by its name, "auto" included. Raises ValueError for another."""
    check_choice("SPLAM Sampler Select", "family", family, FAMILY_CHOICES)
    if family == NAME:
        return comfy.samplers.KSAMPLER(sample_splam, extra_options={"refinements": refinements})
    options = {"refinements": refinements, "family": family, "eta": eta}
    return comfy.samplers.KSAMPLER(sample_family, extra_options=options)


@torch.no_grad()
def sample_family(
    model: WrappedModel,
    x: torch.Tensor,
    sigmas: torch.Tensor,
    extra_args: dict[str, Any] | None = None,
    callback: Callable[[dict[str, Any]], None] | None = None,
    disable: bool | None = None,
    refinements: int = 0,
    family: str = AUTO,
    eta: float = 0.3,
) -> torch.Tensor:
    """One model evaluation a step on any MODEL of a discrete schedule, whichever parametrisation it has."""
    extra_args = {} if extra_args is None else extra_args
    if len(sigmas) < 2:
        return x
    base = model.inner_model.inner_model
    chosen = family_of("SPLAM", base.current_patcher, family)
    if chosen.name == NAME:
        return sample_splam(model, x, sigmas, extra_args, callback, disable, refinements)
    if refinements > 0:
        raise ValueError(f"SPLAM: refinements are SPLAM's, and the family is '{chosen.name}'. Set refinements to 0.")
    sampling = base.model_sampling
    schedule = schedule_of(sampling).to(x.device)
    check_sigmas(sigmas, sampling)
    check_latent("SPLAM", x, base.latent_format.latent_channels)
    patched = is_consistency(sampling)
    timesteps = nearest_timesteps(schedule, sigmas[sigmas > 0]).tolist()
    steps = len(sigmas) - 1
    to = landings(chosen, timesteps) if len(timesteps) == steps else timesteps[1:]
    x = x + _start(model, sampling, chosen, float(sigmas[0]), timesteps[0], steps, patched)
    noise = fresh_noise(extra_args.get("seed") or 0, _numbers_in_batch(len(x)))
    z = x * schedule.alpha(timesteps[0])
    for step in tqdm(range(steps), disable=disable):
        t = torch.full((len(z),), timesteps[step], device=z.device)
        alpha, sigma = broadcast_to(schedule.alpha(t), z), schedule.ve_sigma(t)
        x0 = model(z / alpha, sigma, **extra_args)
        if patched or chosen.step == "fresh":  # F of the MODEL, or F for the consistency model that it is
            c_skip, c_out = (broadcast_to(c, z) for c in boundary_scalings(t.float()))
            if chosen.step != "fresh":
                # At timestep 0 F is z, with next to no noise in it, and tells nothing of the prediction.
                x0 = (x0 - c_skip * z) / c_out if timesteps[step] > 0 else x0
            elif not patched:
                x0 = c_skip * z + c_out * x0
        if callback is not None:
            at = {"x": z / alpha, "i": step, "denoised": x0}
            callback(at | {"sigma": sigmas[step], "sigma_hat": sigmas[step]})
        z = step_on(chosen, z, x0, timesteps[step], to[step], schedule, noise, eta)
    if len(timesteps) > steps:  # the sigmas stop above zero: another sampler goes on from there
        return z / schedule.alpha(timesteps[-1])
    mask = extra_args.get("denoise_mask")
    # TCD's end, and DDIM's at 7 steps, keeps the noise of timestep 0, which must not reach what a mask keeps.
    return z if mask is None else mask * z + (1 - mask) * x0


def _start(
    model: WrappedModel, sampling: ModelSampling, family: Family, sigma: float, t: int, steps: int, patched: bool
) -> torch.Tensor | float:
    """What to add to the host's start for the family's: of empty pictures from noise alone, of others add_noise.

    At the largest sigma the host noises all pictures (of a MODEL with SPLAM's parametrisation the empty ones) by
    sqrt(1 + sigma^2), which is unit noise in z; elsewhere by sigma.
    """
    latent, noise = getattr(model, "latent_image", None), getattr(model, "noise", None)
    if latent is None or noise is None:
        return 0.0
    unit = (1 + sigma**2) ** 0.5
    at_top = sigma > float(sampling.sigma_max) * (1 - 1e-5)
    empty = broadcast_to(is_empty(latent), noise)
    from_noise = at_top or (steps == 1 and t == family.one_step)
    wanted = torch.where(empty, unit if from_noise and family.starts_unit else sigma, sigma)
    given = torch.where(empty if patched else torch.ones_like(empty), unit if at_top else sigma, sigma)
    surplus: torch.Tensor = noise * (wanted - given)
    return surplus
