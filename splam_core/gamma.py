"""Telling a UNet gamma: the embedding, the patch that feeds it in, and the fold that removes it at gamma = 1.

A UNet turns its timestep into a sinusoid tau and computes linear_1(tau). A gamma-conditioned one computes
linear_1(tau + cond_proj @ phi(gamma)), with cond_proj bias-free (diffusers: time_cond_proj_dim, timestep_cond).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.hooks import RemovableHandle


def sinusoid_frequencies(dim: int = 256, dtype: torch.dtype = torch.float32) -> Tensor:
    """[dim/2], on the CPU: from 1 to 1/10000, falling geometrically. Raises ValueError for a dim below 4."""
    if dim < 4:
        raise ValueError(f"an embedding needs 4 or more dimensions, got {dim}.")
    half = dim // 2
    # A float32 logarithm, as in diffusers' get_guidance_scale_embedding: phases reach thousands of radians,
    # so its last bit shows in the sines of released checkpoints.
    step = torch.log(torch.tensor(10000.0)) / (half - 1)
    return torch.exp(torch.arange(half, dtype=dtype) * -step)


def sinusoid(phase: Tensor, dim: int = 256, frequencies: Tensor | None = None) -> Tensor:
    """[B] phases in radians -> [B, dim] in phase's dtype: dim/2 sines, then as many cosines.

    An odd dim is padded with a zero; dim must be 4 or more. frequencies: `sinusoid_frequencies` of this dim, already on
    phase's device and in its dtype, for those who call often; None: made here.
    """
    if frequencies is None:
        # Without waiting for the device: CUDA has copied so small a source before the call returns.
        frequencies = sinusoid_frequencies(dim, phase.dtype).to(phase.device, non_blocking=phase.is_cuda)
    angles = phase[:, None] * frequencies[None, :]
    return functional.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, dim % 2))


def gamma_embedding(
    gamma: Tensor,
    dim: int = 256,
    bandwidth: float = 1000.0,
    zero_at_one: bool = True,
    frequencies: Tensor | None = None,
) -> Tensor:
    """[B] gamma in [0, 1] -> [B, dim]: phi of bandwidth*(1-gamma), less phi at gamma = 1 when zero_at_one.

    bandwidth is the fastest component's phase in radians at gamma = 0; 1000 spreads gamma as the UNet spreads its own
    timesteps, 10000 is the authors'. Zero at gamma = 1 is what lets cond_proj be dropped after training (below eq. 19).
    frequencies: as in `sinusoid`.
    """
    phi = sinusoid(bandwidth * (1 - gamma), dim, frequencies)
    return phi - sinusoid(torch.zeros_like(gamma[:1]), dim, frequencies) if zero_at_one else phi


def guidance_embedding(w: Tensor, dim: int = 256) -> Tensor:
    """[B] -> [B, dim]: what LCM checkpoints embed, w = guidance_scale - 1, at phase 1000*w."""
    return sinusoid(w * 1000.0, dim)


def authors_embedding(gamma: Tensor, dim: int = 256) -> Tensor:
    """[B] -> [B, dim]: gamma as the authors' released code embeds it, through LCM's w = 10 - 10*gamma.

    At gamma = 1 it is [0..0, 1..1], not zero: their checkpoints need the fold.
    """
    return guidance_embedding(10 - gamma * 10, dim)


def fold(linear_1: Tensor, cond_proj: Tensor, phi: Tensor) -> Tensor:
    """What a constant phi adds to linear_1's bias: linear_1 @ cond_proj @ phi, [C_out] in float64 on the CPU.

    linear_1: [C_out, C_in], the weight; cond_proj: [C_in, dim]; phi: [dim]. Exact: the patch is linear up to there.
    """
    # First to the CPU: not every device has float64 (Apple's MPS).
    return linear_1.cpu().double() @ (cond_proj.cpu().double() @ phi.cpu().double())


def patch_time_embedding(
    linear_1: nn.Linear, cond_proj: Tensor, get_embedding: Callable[[], Tensor | None]
) -> RemovableHandle:
    """Make a plain UNet gamma-conditioned: add cond_proj @ phi to what enters its first time-embedding layer.

    linear_1: diffusers' unet.time_embedding.linear_1, LDM's unet.time_embed[0]; its input is [B, C_in].
    cond_proj: [C_in, dim]; gradients reach it. get_embedding: called at every forward, returns phi [B, dim], [1, dim]
    or [dim], or None for an unpatched pass. `.remove()` on the returned handle takes the patch out.
    Raises ValueError if cond_proj does not fit linear_1.
    """
    if cond_proj.ndim != 2 or cond_proj.shape[0] != linear_1.in_features:
        raise ValueError(
            f"cond_proj must be [{linear_1.in_features}, dim] to fit this UNet's time embedding, "
            f"got {list(cond_proj.shape)}: these gamma weights belong to another model."
        )

    def add_gamma(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        phi = get_embedding()
        if phi is None:
            return None
        tau, weight = inputs[0], cond_proj.to(inputs[0])
        return (tau + functional.linear(phi.to(weight), weight), *inputs[1:])

    return linear_1.register_forward_pre_hook(add_gamma)
