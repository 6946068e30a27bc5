"""Straight sub-paths from x_s to x_t, s = max(t-k, 0): the sub-path linear ODE (eq. 12), Direct Linking (eq. 26).

A point at gamma has p(x_gamma | x_0) = N(alpha * x_0, sigma^2), with alpha(gamma, s, t) always exact and sigma either
  "linear":       x_s and x_t share their noise, as on the path of one solver step (main text, below eq. 15);
  "independent":  x_t is x_s plus fresh forward noise (eq. 24, 28).
The two agree at gamma = 0 and gamma = 1. Eq. 13 and 26 print dx/dgamma with a factor gamma too many: both paths are
chords of constant velocity.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from .schedule import NoiseSchedule, broadcast_to

SIGMA_LEVELS = ("linear", "independent")


class SubPath(Protocol):
    """What a denoiser and an objective ask of a sub-path. gamma, s, t: [B], gamma in [0, 1]; x_s, x_t: [B, ...]."""

    def point(self, x_s: Tensor, x_t: Tensor, gamma: Tensor, s: Tensor, t: Tensor) -> Tensor: ...

    def alpha(self, gamma: Tensor, s: Tensor, t: Tensor) -> Tensor: ...

    def sigma(self, gamma: Tensor, s: Tensor, t: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class _Chord:
    """x_gamma = (1-gamma) * start * x_s + gamma * x_t, where start(s, t) is what tells SL from DL."""

    schedule: NoiseSchedule
    sigma_level: str = "linear"

    def __post_init__(self) -> None:
        if self.sigma_level not in SIGMA_LEVELS:
            raise ValueError(f"sigma_level must be one of {SIGMA_LEVELS}, got {self.sigma_level!r}.")

    def _start(self, s: Tensor, t: Tensor) -> Tensor:
        raise NotImplementedError

    def _decay(self, s: Tensor, t: Tensor) -> Tensor:
        """r = alpha(t)/alpha(s), the signal that the forward process keeps from s to t (eq. 20)."""
        return self.schedule.alpha(t) / self.schedule.alpha(s)

    def point(self, x_s: Tensor, x_t: Tensor, gamma: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """x_gamma [B, ...]; exactly x_t at gamma = 1."""
        return broadcast_to((1 - gamma) * self._start(s, t), x_s) * x_s + broadcast_to(gamma, x_t) * x_t

    def sigma(self, gamma: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Noise level of x_gamma [B]; exactly sigma(t) at gamma = 1."""
        start, sigma_s, sigma_t = self._start(s, t), self.schedule.sigma(s), self.schedule.sigma(t)
        if self.sigma_level == "linear":
            return (1 - gamma) * start * sigma_s + gamma * sigma_t
        r = self._decay(s, t)
        kept = (1 - gamma) * start + gamma * r  # how much of x_s is in x_gamma; the rest is fresh noise
        level = (kept**2 * sigma_s**2 + gamma**2 * (1 - r**2)).sqrt()
        return torch.where(gamma == 1, sigma_t, level)


class SubPathLinear(_Chord):
    """SL-ODE: x_gamma = (1-gamma) * r * x_s + gamma * x_t (eq. 12), whose signal level never moves (eq. 24)."""

    def _start(self, s: Tensor, t: Tensor) -> Tensor:
        return self._decay(s, t)

    def alpha(self, gamma: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """alpha(t) [B], whatever gamma (eq. 24)."""
        return self.schedule.alpha(t)


class DirectLinking(_Chord):
    """DL-ODE: x_gamma = x_s + gamma * (x_t - x_s) (eq. 26), whose signal level moves with gamma (eq. 28)."""

    def _start(self, s: Tensor, t: Tensor) -> Tensor:
        return torch.ones_like(self.schedule.alpha(s))

    def alpha(self, gamma: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """gamma * alpha(t) + (1-gamma) * alpha(s) [B] (eq. 28)."""
        return gamma * self.schedule.alpha(t) + (1 - gamma) * self.schedule.alpha(s)
