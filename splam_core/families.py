"""Few-step models by the way that they were distilled: at which timesteps each is run, and what follows a prediction.

A step goes from t to the next timestep. `fresh` noises x0 anew (consistency models); `tcd` steps back to s below the
next timestep and up again with some fresh noise (Zheng et al., Trajectory Consistency Distillation, algorithm 4); `ode`
is a DDIM step, without noise.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .sampler import add_noise
from .schedule import NoiseSchedule, broadcast_to, few_step_timesteps


@dataclass(frozen=True)
class Family:
    """name: as users choose it; title: as the field calls it."""

    name: str
    title: str
    step: str  # "fresh", "tcd" or "ode"
    trailing: bool  # timesteps 1000 - i*1000/n - 1; otherwise those of `few_step_timesteps`
    one_step: int | None = None  # where a run of one step starts, with pure noise, if not at 999
    starts_unit: bool = True  # from unit noise at the largest level; otherwise from sigma(t) of it, as Euler


FAMILIES = {
    family.name: family
    for family in (
        Family("splam", "SPLAM, LCM", "fresh", trailing=False),
        Family("dmd2", "DMD2", "fresh", trailing=True, one_step=399),
        Family("tcd", "TCD", "tcd", trailing=False),
        Family("hyper", "Hyper-SD, its LoRA for any number of steps", "tcd", trailing=False, one_step=800),
        Family("lightning", "Lightning", "ode", trailing=True, starts_unit=False),
        Family("ddim", "PCM and Hyper-SD of a fixed number of steps", "ode", trailing=True),
    )
}


def timesteps_of(family: Family, steps: int, strength: float = 1.0, num_train_timesteps: int = 1000) -> Tensor:
    """Falling timesteps [steps]. A strength below 1 keeps the last `steps` of int(steps / strength) trailing ones, or
    cuts the grid as `few_step_timesteps`.

    Raises ValueError unless 0 < strength <= 1 and the timesteps suffice.
    """
    if steps == 1 and strength == 1 and family.one_step is not None:
        return torch.tensor([family.one_step])
    if not family.trailing:
        return few_step_timesteps(steps, strength, num_train_timesteps=num_train_timesteps)
    if not 0 < strength <= 1 or not 1 <= int(steps / strength) <= num_train_timesteps:
        raise ValueError(
            f"{steps} steps do not fit: strength must be above 0, at most 1 and at least steps/{num_train_timesteps}, "
            f"got {strength}."
        )
    count = int(steps / strength)
    whole = [round(num_train_timesteps - i * (num_train_timesteps / count)) - 1 for i in range(count)]
    return torch.tensor(whole[-steps:])


def landings(family: Family, timesteps: list[int]) -> list[int | None]:
    """The timestep whose level each step leads to, None being x0 itself: the next one, and at the end none.

    diffusers' DDIMScheduler goes down by T // n from every one of its trailing timesteps, which is not the next one
    where n does not divide T (3, 6, 7 steps): so does "ddim", on such timesteps. They are the last of n, of any n.
    """
    following = [*timesteps[1:], None]
    if family.name != "ddim":
        return following
    whole = max(1, round(len(timesteps) * 1000 / (timesteps[0] + 1)))
    if whole < len(timesteps) or timesteps_of(family, whole).tolist()[-len(timesteps) :] != timesteps:
        return following
    return [None if t < 1000 // whole else t - 1000 // whole for t in timesteps]


def step_on(
    family: Family,
    x: Tensor,
    x0: Tensor,
    t: int,
    following: int | None,
    schedule: NoiseSchedule,
    noise: Callable[[Tensor, int], Tensor],
    eta: float = 0.3,
) -> Tensor:
    """x [B, ...] at the `following` timestep (see `landings`), or at the end, from x at t and its prediction x0.

    noise(x, t): fresh noise like x that leads to timestep t. eta: of TCD, 0 without noise to 1 with noise alone.
    TCD ends at timestep 0, as diffusers' TCDScheduler, and the others at x0.
    """
    if family.step == "fresh":
        if following is None:
            return x0
        return add_noise(x0, noise(x0, following), torch.tensor(following), schedule)
    at = torch.tensor(t)
    epsilon = (x - broadcast_to(schedule.alpha(at), x) * x0) / broadcast_to(schedule.sigma(at), x)
    if family.step == "ode":
        return x0 if following is None else _at(x0, epsilon, following, schedule)
    # In float32, as torch multiplies a whole number by a Python float: the floor must fall alike.
    s = int(torch.floor((1 - eta) * torch.tensor(following or 0)))
    x_s = _at(x0, epsilon, s, schedule)
    if following is None or eta == 0:
        return x_s
    ratio = schedule.alphas_cumprod[following] / schedule.alphas_cumprod[s]
    return (broadcast_to(ratio.sqrt(), x) * x_s + broadcast_to((1 - ratio).sqrt(), x) * noise(x, following)).to(x.dtype)


def _at(x0: Tensor, epsilon: Tensor, t: int, schedule: NoiseSchedule) -> Tensor:
    return add_noise(x0, epsilon, torch.tensor(t), schedule)


# What a file's metadata or name says, in the order in which it is asked: DMD2's and Hyper's files also say "4step".
_WORDS = (
    (r"dmd2?", "dmd2"),
    (r"hyper[-_. ]?sd\w*[-_. ]*(1[-_. ]?steps?|unified)", "hyper"),
    (r"hyper[-_. ]?sd", "ddim"),
    (r"lightning", "lightning"),
    (r"pcm", "ddim"),
    (r"tcd", "tcd"),
    (r"s(p)?lam|lcm", "splam"),
)
_SCHEDULERS = {"LCMScheduler": "splam", "TCDScheduler": "tcd"}


def family_told(
    name: str, metadata: Mapping[str, str], scheduler_config: Mapping[str, object] | None = None
) -> tuple[str, str] | None:
    """(family, what told it) of a model's or LoRA's file, from its metadata, scheduler configuration or name.

    None where nothing tells.
    """
    if "splam.method" in metadata:
        return "splam", "the metadata splam.method"
    scheduler = (scheduler_config or {}).get("_class_name")
    if scheduler in _SCHEDULERS:
        return _SCHEDULERS[str(scheduler)], f"its {scheduler}"
    for key in ("modelspec.title", "ss_output_name", "ss_training_comment", "modelspec.description"):
        if (found := _in_words(metadata.get(key, ""))) is not None:
            return found, f"the metadata {key}"
    found = _in_words(name)
    return None if found is None else (found, f"the file name {name}")


def _in_words(text: str) -> str | None:
    for pattern, family in _WORDS:
        if re.search(rf"(?<![a-z]){pattern}(?![a-z])", text.lower()):
            return family
    # Run together with the architecture: hyper-sd15, sdxl_lightning, pcm_sd15 and the like.
    return next((family for pattern, family in _WORDS if re.search(rf"(?<![a-z]){pattern}", text.lower())), None)
