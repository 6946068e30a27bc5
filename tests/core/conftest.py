"""Shared references: a float64 schedule, Gaussian data whose PF-ODE is solved by hand, and narrow diffusers models."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from splam_core import NoiseSchedule


@pytest.fixture
def schedule() -> NoiseSchedule:
    return NoiseSchedule.scaled_linear().to(dtype=torch.float64)


@dataclass
class Gaussian:
    """Data N(mean, std^2): x_t is N(alpha*mean, spread(t)^2), and the PF-ODE keeps z = (x_t - alpha*mean)/spread."""

    acp: Tensor
    mean: float = 0.7
    std: float = 0.5

    def alpha(self, t: Tensor) -> Tensor:
        return self.acp[t].sqrt()[:, None]

    def sigma(self, t: Tensor) -> Tensor:
        return (1 - self.acp[t]).sqrt()[:, None]

    def spread(self, t: Tensor) -> Tensor:
        return (self.alpha(t) ** 2 * self.std**2 + self.sigma(t) ** 2).sqrt()

    def at(self, z: Tensor, t: Tensor) -> Tensor:
        """The point of trajectory z at t."""
        return self.alpha(t) * self.mean + self.spread(t) * z

    def epsilon(self, x: Tensor, t: Tensor) -> Tensor:
        """E[noise | x_t], what a perfect teacher predicts."""
        return self.sigma(t) * (x - self.alpha(t) * self.mean) / self.spread(t) ** 2

    def flow(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """The PF-ODE's exact solution from t to s."""
        return self.at((x - self.alpha(t) * self.mean) / self.spread(t), s)


@pytest.fixture
def gaussian(schedule: NoiseSchedule) -> Gaussian:
    return Gaussian(schedule.alphas_cumprod)


@pytest.fixture
def make_unet():
    """A narrow UNet2DConditionModel with random weights, in eval mode."""
    diffusers = pytest.importorskip("diffusers")

    def make(widths=(32, 64), layers_per_block=1, time_cond_proj_dim=None, seed=0, **config):
        torch.manual_seed(seed)
        levels = len(widths)
        defaults = {
            "sample_size": 8,
            "block_out_channels": widths,
            "layers_per_block": layers_per_block,
            "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
            "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
            "cross_attention_dim": 32,
            "attention_head_dim": 8,
            "time_cond_proj_dim": time_cond_proj_dim,
        }
        return diffusers.UNet2DConditionModel(**{**defaults, **config}).eval()

    return make
