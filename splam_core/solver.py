"""The teacher: classifier-free guidance, its solvers' steps, and Multiple Estimation (eq. 18)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .denoiser import predict_x0
from .schedule import NoiseSchedule, broadcast_to

# (x [B, ...], timesteps [B]) -> guided epsilon [B, ...], the prompt being closed over.
Teacher = Callable[[Tensor, Tensor], Tensor]

SOLVERS = ("ddim", "dpm-solver++")


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
    solver: str = "ddim",
) -> Tensor:
    """x_s [B, ...], the lower end of `solver_path` (eq. 18)."""
    return solver_path(teacher, x_t, t, skip, solver_skip, schedule, solver)[-1]


def solver_path(
    teacher: Teacher,
    x_t: Tensor,
    t: Tensor,
    skip: int,
    solver_skip: int,
    schedule: NoiseSchedule,
    solver: str = "ddim",
) -> list[Tensor]:
    """All points from x_t to x_s, s = max(t-skip, 0), by skip/solver_skip steps of solver_skip timesteps (eq. 18).

    x_t: [B, ...]; t: [B]; skip is k, solver_skip is k_phi. A sample that reaches timestep 0 stays there.
    solver: "ddim" (the paper's), or "dpm-solver++", whose steps after the first are of second order (2M, Lu et al.).
    Runs in the wider of x_t's and schedule's dtypes.
    Raises ValueError unless solver_skip divides skip, and for an unknown solver.
    """
    if solver_skip < 1 or skip < solver_skip or skip % solver_skip:
        raise ValueError(
            f"skip must be a multiple of solver_skip, got skip={skip}, solver_skip={solver_skip}: "
            f"a jump is made of whole teacher steps."
        )
    return solve(teacher, x_t, [(t - done).clamp(min=0) for done in range(0, skip + 1, solver_skip)], schedule, solver)


def solve(
    teacher: Teacher, x: Tensor, timesteps: Sequence[Tensor], schedule: NoiseSchedule, solver: str = "ddim"
) -> list[Tensor]:
    """The points of the teacher's path at each of these timesteps, which fall; x [B, ...] is the first of them.

    timesteps: n+1 of [B]; points: n+1 of [B, ...]. Solvers, dtype and errors as in `solver_path`.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {SOLVERS}, got {solver!r}.")
    path: list[Tensor] = [x]
    before: tuple[Tensor, Tensor] | None = None  # the last step's x0 and timestep
    for here, there in itertools.pairwise(timesteps):
        x = path[-1]
        epsilon = teacher(x, here)
        if solver == "dpm-solver++":
            x0 = predict_x0(epsilon, x, schedule.alpha(here), schedule.sigma(here), "epsilon")
            if before is not None:
                epsilon = _second_order(epsilon, x0, *before, here, there, schedule)
            before = x0, here
        path.append(ddim_step(x, epsilon, here, there, schedule))
    return path


def draw_latents(teacher: Teacher, noise: Tensor, schedule: NoiseSchedule, steps: int) -> Tensor:
    """Latents [B, ...] from noise [B, ...]: `steps` of DPM-Solver++(2M) (Lu et al., 2022) down to no noise at all.

    On the trailing timesteps (1000, 900, .. of ten, less one); the first and the last step are of first order.
    """
    last = schedule.num_train_timesteps
    # In float64, and rounded: as numpy does for the schedulers of diffusers.
    grid = [round(last - i * last / steps) - 1 for i in range(steps)]
    x, before = noise, None
    for t, s in zip(grid, [*grid[1:], None], strict=True):
        here = torch.full((len(x),), t, device=x.device)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        x0 = predict_x0(teacher(x, here), x, alpha, sigma, "epsilon")
        if s is None:
            return x0
        log_snr, then = (alpha / sigma).log(), (schedule.alpha(s) / schedule.sigma(s)).log()
        h = then - log_snr
        d = x0 if before is None else x0 + (x0 - before[0]) * (h / (log_snr - before[1]) / 2)
        x = (schedule.sigma(s) / sigma) * x - schedule.alpha(s) * torch.expm1(-h) * d
        before = x0, log_snr
    return x


def _second_order(
    epsilon: Tensor, x0: Tensor, x0_before: Tensor, t_before: Tensor, t: Tensor, s: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """The epsilon with which a DDIM step from t to s is one of DPM-Solver++(2M): x0 is extrapolated along log-SNR.

    By half the ratio of this step to the one before, at most half: the last steps before t = 0 are very long in
    log-SNR, and following the line so far out costs more than it gains.
    """
    before, now, then = ((schedule.alpha(u) / schedule.sigma(u)).log() for u in (t_before, t, s))
    gap = now - before
    ratio = torch.where(gap > 0, (then - now) / gap.where(gap > 0, 1), 0).clamp(max=1)
    weight = broadcast_to(ratio / 2 * schedule.alpha(t) / schedule.sigma(t), epsilon)
    return epsilon - weight * (x0 - x0_before)
