"""The teacher: classifier-free guidance, a DDIM step, and Multiple Estimation (eq. 18)."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from .denoiser import predict_x0
from .schedule import NoiseSchedule, broadcast_to

# (x [B, ...], timesteps [B]) -> guided epsilon [B, ...], the prompt being closed over.
Teacher = Callable[[Tensor, Tensor], Tensor]


def guided(epsilon_cond: Tensor, epsilon_uncond: Tensor, guidance_scale: float | Tensor) -> Tensor:
    """w*cond + (1-w)*uncond (eq. 18): w = 1 is no guidance. LCM and the authors' script call w-1 what w is here."""
    return guidance_scale * epsilon_cond + (1 - guidance_scale) * epsilon_uncond


def ddim_step(x: Tensor, epsilon: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule) -> Tensor:
    """x_s from x_t along a constant epsilon (Song et al., DDIM, eta = 0). x, epsilon: [B, ...]; t, s: [B]."""
    x0 = predict_x0(epsilon, x, schedule.alpha(t), schedule.sigma(t), "epsilon")
    return broadcast_to(schedule.alpha(s), x) * x0 + broadcast_to(schedule.sigma(s), x) * epsilon


def multiple_estimation(
    teacher: Teacher,
    x_t: Tensor,
    t: Tensor,
    skip: int,
    solver_skip: int,
    schedule: NoiseSchedule,
    return_path: bool = False,
) -> Tensor | list[Tensor]:
    """x_s, s = max(t-skip, 0), by skip/solver_skip DDIM steps of solver_skip timesteps (eq. 18).

    x_t: [B, ...]; t: [B]; skip is k, solver_skip is k_phi. A sample that reaches timestep 0 stays there.
    return_path: the list of all points from x_t to x_s instead. Runs in the wider of x_t's and schedule's dtypes.
    Raises ValueError unless solver_skip divides skip.
    """
    if solver_skip < 1 or skip < solver_skip or skip % solver_skip:
        raise ValueError(
            f"skip must be a multiple of solver_skip, got skip={skip}, solver_skip={solver_skip}: "
            f"a jump is made of whole teacher steps."
        )
    path = [x_t]
    for done in range(0, skip, solver_skip):
        here, there = (t - done).clamp(min=0), (t - done - solver_skip).clamp(min=0)
        path.append(ddim_step(path[-1], teacher(path[-1], here), here, there, schedule))
    return path if return_path else path[-1]
