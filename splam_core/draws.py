"""The random numbers of training: what is drawn of sample i is a function of the seed and of i alone."""

from __future__ import annotations

import torch
from torch import Tensor

from .schedule import GRID


def draws(seed: int, indices: range, shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Noise [B, *shape], and two uniforms [B] in [0, 1) for timestep and gamma.

    Sample i's numbers are a function of (seed, i) alone: the same whatever the batch size, the number of processes or
    the step at which a run was resumed.
    """
    noise, uniforms = [], []
    for index in indices:
        generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + index) % 2**63)
        noise.append(torch.randn(shape, generator=generator))
        uniforms.append(torch.rand(2, generator=generator))
    u_t, u_gamma = torch.stack(uniforms).unbind(1)
    return torch.stack(noise), u_t, u_gamma


def decisions(seed: int, index: int) -> tuple[float, float]:
    """Two uniforms in [0, 1) that decide whether sample `index` is mirrored and whether its caption is dropped."""
    generator = torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + 2**62 + index) % 2**63)
    mirror, drop = torch.rand(2, generator=generator).tolist()
    return mirror, drop


def draw_timesteps(u: Tensor, num_train_timesteps: int, power: float) -> Tensor:
    """Uniform u [B] in [0, 1) to timesteps [B] of the grid of GRID, of a density in proportion to t**power."""
    place = (u ** (1 / (1 + power)) * GRID).long().clamp(max=GRID - 1)  # a u just below 1 may be rounded up to it
    return (place + 1) * (num_train_timesteps // GRID) - 1


def sample_gamma(u: Tensor, p_one: float = 0.0) -> Tensor:
    """Uniform u in [0, 1) -> gamma: exactly 1 with probability p_one (the point that sampling uses), else uniform.

    Raises ValueError unless 0 <= p_one <= 1.
    """
    if not 0 <= p_one <= 1:
        raise ValueError(f"p_one is a probability, got {p_one}.")
    if p_one == 1:
        return torch.ones_like(u)
    return torch.where(u < p_one, 1.0, (u - p_one) / (1 - p_one))
