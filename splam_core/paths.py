"""Kept paths: the teacher's whole paths, solved once, from which students learn without asking it again."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoiser, Network
from .draws import draw_timesteps
from .objective import pseudo_huber
from .schedule import NoiseSchedule
from .solver import Teacher, solve

GOALS = ("end", "target")


def draw_starts(u: Tensor, num_train_timesteps: int, top_share: float, power: float) -> Tensor:
    """Uniform u [B] in [0, 1) to the timesteps [B] at which paths begin.

    `top_share` of them at the top, which is where sampling begins, the others as `draw_timesteps` says.
    """
    rest = ((u - top_share) / max(1 - top_share, 1e-9)).clamp(min=0)
    return torch.where(u < top_share, num_train_timesteps - 1, draw_timesteps(rest, num_train_timesteps, power))


def solve_paths(
    teacher: Teacher, x_t: Tensor, t: Tensor, steps: int, schedule: NoiseSchedule, solver: str = "dpm-solver++"
) -> tuple[Tensor, Tensor]:
    """The teacher's paths from x_t [B, ...] at t [B] to timestep 0: points [B, steps+1, ...], timesteps [B, steps+1].

    In steps of equal length in t, rounded to whole timesteps. Raises ValueError for steps below 1 and an unknown
    solver.
    """
    if steps < 1:
        raise ValueError(f"a path needs 1 step or more, got {steps}")
    timesteps = torch.stack([(t * (steps - step) / steps).round().long() for step in range(steps + 1)])
    return torch.stack(solve(teacher, x_t, list(timesteps), schedule, solver), 1), timesteps.T


def draw_places(u: Tensor, steps: int, first_share: float) -> Tensor:
    """Uniform u [B] in [0, 1) to a sub-path [B] of each path, of `steps`: `first_share` of them the first one."""
    rest = ((u - first_share) / max(1 - first_share, 1e-9)).clamp(min=0)
    return torch.where(u < first_share, 0, (rest * steps).long().clamp(max=steps - 1))


@dataclass(frozen=True)
class PathObjective:
    """F_student(x_gamma, gamma, t), on the sub-path (eq. 12) between two neighbouring points of a kept path, against

    "end":     the end of the path, where F of eq. 16 is to point: neither teacher nor target is asked;
    "target":  F_target(x_s, 1, s), as in eq. 17, with the teacher's jump to x_s read instead of made.
    """

    denoiser: Denoiser
    goal: str = "end"  # one of GOALS
    distance: Callable[[Tensor], Tensor] = pseudo_huber  # difference [B, ...] -> [B]

    def __post_init__(self) -> None:
        if self.goal not in GOALS:
            raise ValueError(f"goal must be one of {GOALS}, got {self.goal!r}.")

    def __call__(
        self, student: Network, target: Network, points: Tensor, timesteps: Tensor, place: Tensor, gamma: Tensor | None
    ) -> Tensor:
        """The loss [B]. points [B, n+1, ...] and timesteps [B, n+1] are `solve_paths`'; place: [B], below n.

        gamma: [B]; None stands for 1. Gradients flow through student alone.
        """
        rows = torch.arange(len(points), device=points.device)
        x_t, x_s, t, s = (
            points[rows, place],
            points[rows, place + 1],
            timesteps[rows, place],
            timesteps[rows, place + 1],
        )
        if self.goal == "end":
            goal = points[:, -1]
        else:
            with torch.no_grad():
                goal = self.denoiser(target, x_s, None, None, s)
        x_gamma = x_t if gamma is None else self.denoiser.subpath.point(x_s, x_t, gamma, s, t)
        return self.distance(self.denoiser(student, x_gamma, gamma, s, t) - goal)
