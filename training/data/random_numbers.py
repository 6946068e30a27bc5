"""The random numbers of sample i: a function of the seed and of i alone."""

from __future__ import annotations

import torch
from torch import Tensor


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
    return tuple(torch.rand(2, generator=generator).tolist())
