"""Few-step sampling: eq. 19, iterated as in Song et al., Consistency Models, algorithm 1."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .schedule import NoiseSchedule, broadcast_to
from .solver import ddim_step
from .subpath import SubPath, SubPathLinear

# Added to the seed of a picture that is drawn outside a host, so that its fresh noise never repeats its initial noise
# or that of a neighbouring seed. Part of the pictures: never change it.
RENOISE_SEED_OFFSET = 0x53504C414D


def add_noise(x0: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_t = alpha(t)*x0 + sigma(t)*noise (eq. 1), in x0's dtype. x0, noise: [B, ...]; t: [B] or scalar []."""
    return (broadcast_to(schedule.alpha(t), x0) * x0 + broadcast_to(schedule.sigma(t), x0) * noise).to(x0.dtype)


def renoise_generator(seed: int) -> torch.Generator:
    """A generator of fresh noise for all steps of one picture, as diffusers' schedulers take it.

    On the CPU, seeded with (seed + RENOISE_SEED_OFFSET) mod 2^64.
    """
    return torch.Generator("cpu").manual_seed((seed + RENOISE_SEED_OFFSET) % 2**64)


def fresh_noise(seed: int, pictures: Sequence[int]) -> Callable[[Tensor, int], Tensor]:
    """noise(x, t) [B, ...]: what takes x0 of a seed's `pictures` [B] to timestep t; drawn in float32 on the CPU.

    Each picture's is a function of the seed, the timestep and its number in the batch alone, so that a batch is its
    pictures made one by one, and a run in pieces is the whole run.
    """

    def noise(x: Tensor, t: int) -> Tensor:
        drawn = [torch.randn(x.shape[1:], generator=_generator(seed, t, picture)) for picture in pictures]
        return torch.stack(drawn).to(x)

    return noise


def _generator(seed: int, t: int, picture: int) -> torch.Generator:
    """Seeded by a hash, since torch reads no more than 32 bits of a seed. Part of the pictures: never change it."""
    digest = hashlib.sha256(f"{seed} {t} {picture}".encode()).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))


def sample(
    denoise: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    noise: Callable[[Tensor, int], Tensor],
    callback: Callable[[int, int, Tensor, Tensor], None] | None = None,
    refinements: int = 0,
    denoise_gamma: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor] | None = None,
    subpath: SubPath | None = None,
    skip: int = 100,
) -> Tensor:
    """x0 [B, ...] from x at timesteps[0], one evaluation a step and `refinements` more where asked.

    denoise(x, t) is F at gamma = 1 (eq. 19) with t [B]; timesteps: [n] falling, see `few_step_timesteps`;
    x: pure noise, or `add_noise` of an image for image-to-image;
    noise(x, t): fresh gaussian noise like x that takes x0 to timestep t, see `fresh_noise`.
    callback(step, t, x, x0) runs after each step. refinements (experimental) go back over the sub-path to t-skip with
    denoise_gamma(x_gamma, gamma, s, t) on `subpath` (None: SubPathLinear(schedule)).
    Raises ValueError for no timesteps, and for refinements without denoise_gamma.
    """
    if len(timesteps) == 0:
        raise ValueError("timesteps is empty: sampling needs at least one, see few_step_timesteps.")
    if refinements > 0 and denoise_gamma is None:
        raise ValueError(
            "refinements need a network that is conditioned on gamma: pass denoise_gamma, or set refinements to 0."
        )
    subpath = subpath or SubPathLinear(schedule)
    grid = timesteps.tolist()
    for step, t in enumerate(grid):
        t_batch = torch.full((x.shape[0],), t, device=x.device)
        x0 = denoise(x, t_batch)
        if denoise_gamma is not None:
            for gamma in torch.linspace(1, 0, refinements + 2).tolist()[1:-1]:
                x0 = _refine(denoise_gamma, x, x0, gamma, t_batch, schedule, subpath, skip)
        if callback is not None:
            callback(step, t, x, x0)
        if step + 1 < len(grid):
            x = add_noise(x0, noise(x, grid[step + 1]), timesteps[step + 1], schedule).to(x.dtype)
    return x0.to(x.dtype)


def _refine(
    denoise_gamma: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    x: Tensor,
    x0: Tensor,
    gamma: float,
    t: Tensor,
    schedule: NoiseSchedule,
    subpath: SubPath,
    skip: int,
) -> Tensor:
    """A new x0 from the point at gamma between x = x_t and the x_s that the present x0 implies (eq. 12)."""
    s = (t - skip).clamp(min=0)
    epsilon = (x - broadcast_to(schedule.alpha(t), x) * x0) / broadcast_to(schedule.sigma(t), x)
    gammas = torch.full_like(schedule.alpha(t), gamma)
    x_s = ddim_step(x, epsilon, t, s, schedule)
    return denoise_gamma(subpath.point(x_s, x, gammas, s, t).to(x.dtype), gammas, s, t)
