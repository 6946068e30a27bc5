"""From a network's raw output to x0, and the consistency function F of eq. 14 and 16."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .schedule import NoiseSchedule, broadcast_to
from .subpath import SubPath, SubPathLinear

PREDICTION_TYPES = ("epsilon", "v_prediction")
GAMMA_CONDITIONINGS = ("embedding", "noise-level")

# (x [B, ...], timesteps [B], gamma [B] or None) -> the UNet's raw output [B, ...], the prompt being closed over.
Network = Callable[[Tensor, Tensor, "Tensor | None"], Tensor]


def predict_x0(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """x0 [B, ...] from the raw output at x = alpha*x0 + sigma*epsilon. alpha, sigma: [B] or scalar, positive.

    v is that of x/n, n = sqrt(alpha^2 + sigma^2): inside a sub-path the levels leave the unit circle, and v's
    identities (Salimans & Ho, progressive distillation) hold on it.
    Raises ValueError for a prediction_type other than "epsilon" and "v_prediction".
    """
    alpha, sigma = broadcast_to(alpha, x), broadcast_to(sigma, x)
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha
    if prediction_type == "v_prediction":
        n = (alpha**2 + sigma**2).sqrt()
        return alpha / n * (x / n) - sigma / n * output
    raise _unknown("prediction_type", prediction_type, PREDICTION_TYPES)


def predict_epsilon(output: Tensor, x: Tensor, alpha: Tensor, sigma: Tensor, prediction_type: str) -> Tensor:
    """The noise [B, ...] from the raw output; arguments and errors as in `predict_x0`."""
    if prediction_type == "epsilon":
        return output
    if prediction_type == "v_prediction":
        alpha, sigma = broadcast_to(alpha, x), broadcast_to(sigma, x)
        n = (alpha**2 + sigma**2).sqrt()
        return alpha / n * output + sigma / n * (x / n)
    raise _unknown("prediction_type", prediction_type, PREDICTION_TYPES)


def boundary_scalings(t: Tensor, sigma_data: float = 0.5, timestep_scaling: float = 10.0) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of eq. 5 and 16 at t, of t's shape: (1, 0) at t = 0. LCM's, on u = timestep_scaling * t."""
    u = t * timestep_scaling
    denominator = u**2 + sigma_data**2
    return sigma_data**2 / denominator, u / denominator**0.5


@dataclass(frozen=True)
class Denoiser:
    """F(x_gamma, gamma, t) (eq. 14, 16). It decides how the network hears of gamma, and at which levels f divides.

    "embedding": the network sees x_gamma, t and gamma (the paper's form).
    "noise-level": x_gamma is scaled back to the schedule's path, where its signal-to-noise ratio names a fractional
    timestep between s and t; the network sees that and no gamma. Only right with sigma_level "linear".
    At gamma = 1 the two are the same computation, bit for bit.
    """

    schedule: NoiseSchedule
    prediction_type: str = "epsilon"  # or "v_prediction"
    gamma_conditioning: str = "embedding"  # or "noise-level"
    subpath: SubPath = field(default=None)  # type: ignore[assignment]  # None: SubPathLinear(schedule)

    def __post_init__(self) -> None:
        if self.prediction_type not in PREDICTION_TYPES:
            raise _unknown("prediction_type", self.prediction_type, PREDICTION_TYPES)
        if self.gamma_conditioning not in GAMMA_CONDITIONINGS:
            raise _unknown("gamma_conditioning", self.gamma_conditioning, GAMMA_CONDITIONINGS)
        if self.subpath is None:
            object.__setattr__(self, "subpath", SubPathLinear(self.schedule))

    def __call__(self, net: Network, x_gamma: Tensor, gamma: Tensor | None, s: Tensor | None, t: Tensor) -> Tensor:
        """F [B, ...]. x_gamma: [B, ...]; gamma, s, t: [B]. gamma None means gamma = 1, and s is then not read."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        seen_t = t
        if gamma is None:
            gamma = torch.ones_like(alpha)
        elif s is None:
            raise ValueError("a gamma needs s, the lower end of its sub-path")
        elif self.gamma_conditioning == "embedding":
            alpha, sigma = self.subpath.alpha(gamma, s, t), self.subpath.sigma(gamma, s, t)
        else:
            end, inner_alpha, inner_sigma = gamma == 1, self.subpath.alpha(gamma, s, t), self.subpath.sigma(gamma, s, t)
            n = torch.where(end, 1.0, (inner_alpha**2 + inner_sigma**2).sqrt())
            x_gamma = x_gamma / broadcast_to(n, x_gamma)
            alpha, sigma = torch.where(end, alpha, inner_alpha / n), torch.where(end, sigma, inner_sigma / n)
            inner_t = self.schedule.timestep_at(inner_alpha, inner_sigma)
            seen_t = torch.where(end, t.to(inner_t), inner_t)
        output = net(x_gamma, seen_t, gamma if self.gamma_conditioning == "embedding" else None)
        x0 = predict_x0(output, x_gamma, alpha, sigma, self.prediction_type)
        # At t, not at the inner timestep: below it c_skip + c_out would exceed 1.
        c_skip, c_out = boundary_scalings(t.to(alpha.dtype))
        return broadcast_to(c_skip, x_gamma) * x_gamma + broadcast_to(c_out, x_gamma) * x0


def _unknown(name: str, found: str, expected: tuple[str, ...]) -> ValueError:
    return ValueError(f"{name} must be one of {expected}, got {found!r}.")
