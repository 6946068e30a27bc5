"""How far a student is from the teacher: the endpoint error, at the timesteps of four-step sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...splam_core.denoiser import Denoiser
from ...splam_core.draws import draws
from ...splam_core.sampler import add_noise
from ...splam_core.schedule import few_step_timesteps
from ...splam_core.solver import solver_path
from .host import HostUNet, Told

STEPS = 4
SOLVER_SKIP = 50  # timesteps of a step of the teacher's path
SEED_OFFSET = 0x7A11D  # of the noise, so that it is not that of any training sample


@dataclass(frozen=True)
class End:
    """A noised latent x_t [1, C, h, w] at t [1], and where the teacher's guided path from there ends, at t = 0."""

    t: torch.Tensor
    x_t: torch.Tensor
    end: torch.Tensor


@torch.no_grad()
def teacher_ends(
    host: HostUNet, told: Sequence[Told], nothing: Told, guidance_scale: float, latents: torch.Tensor, seed: int
) -> list[End]:
    """One for each latent of latents [B, C, h, w], the timesteps in turn. The UNet is loaded, and the teacher's."""
    schedule, found = host.schedule, []
    noise = draws(seed + SEED_OFFSET, range(len(latents)), latents.shape[1:])[0].to(latents)
    grid = few_step_timesteps(STEPS, num_train_timesteps=schedule.num_train_timesteps).tolist()
    for number, one in enumerate(told):
        timestep = grid[number % len(grid)]
        t = torch.tensor([timestep], device=latents.device)
        x_t = add_noise(latents[number : number + 1], noise[number : number + 1], t, schedule)
        teacher, whole = host.guided_epsilon([one], nothing, guidance_scale), -(-timestep // SOLVER_SKIP) * SOLVER_SKIP
        found.append(End(t, x_t, solver_path(teacher, x_t, t, whole, SOLVER_SKIP, schedule, "dpm-solver++")[-1]))
    return found


@torch.no_grad()
def endpoint_error(host: HostUNet, denoiser: Denoiser, told: Sequence[Told], ends: Sequence[End]) -> float:
    """The RMS distance from F(x_t, t) to the ends. The UNet is loaded, and the student's."""
    square = 0.0
    for one, place in zip(told, ends, strict=True):

        def net(x: torch.Tensor, t: torch.Tensor, _: torch.Tensor | None, one: Told = one) -> torch.Tensor:
            return host(x, t, [one])

        square += float((denoiser(net, place.x_t, None, None, place.t) - place.end).square().mean())
    rms: float = (square / max(1, len(ends))) ** 0.5
    return rms
