"""The distillation losses: SLAD (eq. 17), LCM (eq. 7) and Direct Linking (eq. 27), as one algorithm (Algorithm 1)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoiser, Network
from .schedule import NoiseSchedule
from .solver import Teacher, multiple_estimation
from .subpath import DirectLinking, SubPath, SubPathLinear

METHODS = ("splam", "dl", "lcm")


def l2(difference: Tensor) -> Tensor:
    """Mean square per sample: [B, ...] -> [B]."""
    return difference.square().flatten(1).mean(1)


def pseudo_huber(difference: Tensor, c: float = 1e-3) -> Tensor:
    """Mean of sqrt(d^2 + c^2) - c per sample: [B, ...] -> [B]. Quadratic well below c, linear well above."""
    square = difference.square()
    # The same number without the cancellation that eats small d in float32.
    return (square / ((square + c**2).sqrt() + c)).flatten(1).mean(1)


def subpath_for(method: str, schedule: NoiseSchedule, sigma_level: str = "linear") -> SubPath:
    """The sub-path that "splam", "dl" or "lcm" trains on ("lcm" only visits its end, gamma = 1)."""
    if method not in METHODS:
        raise ValueError(f"method must be one of {METHODS}, got {method!r}.")
    return (DirectLinking if method == "dl" else SubPathLinear)(schedule, sigma_level)


@dataclass(frozen=True)
class Objective:
    """Algorithm 1. The sub-path of `denoiser` makes it SPLAM or Direct Linking; method "lcm" holds gamma at 1.

    Raises ValueError if method is unknown or disagrees with the denoiser's sub-path.
    """

    denoiser: Denoiser
    method: str = "splam"  # or "dl", "lcm"
    skip: int = 100  # k, timesteps a sub-path spans
    solver_skip: int = 20  # k_phi, timesteps a teacher step spans; divides skip
    distance: Callable[[Tensor], Tensor] = pseudo_huber  # difference [B, ...] -> [B]
    solver: str = "ddim"  # the teacher's, one of SOLVERS

    def __post_init__(self) -> None:
        expected = type(subpath_for(self.method, self.denoiser.schedule))
        if self.method != "lcm" and not isinstance(self.denoiser.subpath, expected):
            raise ValueError(
                f"method {self.method!r} trains on {expected.__name__}, but the denoiser has "
                f"{type(self.denoiser.subpath).__name__}: build it with subpath_for({self.method!r}, schedule)."
            )

    def __call__(
        self,
        student: Network,
        target: Network,
        teacher: Teacher,
        x_t: Tensor,
        t: Tensor,
        gamma: Tensor | None,
        return_x_s: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """d(F_student(x_gamma, gamma, t), F_target(x_s, 1, s)), [B]; with return_x_s also x_s [B, ...].

        x_t: noised latents [B, ...]; t: [B]; gamma: [B] (not read by "lcm"). Gradients flow through student alone.
        """
        s = (t - self.skip).clamp(min=0)
        with torch.no_grad():
            schedule = self.denoiser.schedule
            x_s = multiple_estimation(teacher, x_t, t, self.skip, self.solver_skip, schedule, self.solver)
            goal = self.denoiser(target, x_s, None, None, s)
        if self.method == "lcm":
            x_gamma, gamma = x_t, None
        elif gamma is None:
            raise ValueError(f"method {self.method!r} needs gamma [B]")
        else:
            x_gamma = self.denoiser.subpath.point(x_s, x_t, gamma, s, t)
        loss = self.distance(self.denoiser(student, x_gamma, gamma, s, t) - goal)
        return (loss, x_s) if return_x_s else loss
