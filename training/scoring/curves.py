"""How far a model is from the consistency function it is to become: endpoint error, and the paper's delta(t, k).

Both take functions of (x [B, ...], t [B]) with the prompts closed over: `student` gives F(x_t, t), `teacher` the
guided epsilon. Latents and noise are [B, ...]; sample i of the results is that of latents[i] and noise[i].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from splam_core import (
    Denoiser,
    NoiseSchedule,
    add_noise,
    few_step_timesteps,
    solver_path,
)

from ..models.pipeline import Conditioning, Pipeline
from ..models.sampling import guided_output

Function = Callable[[Tensor, Tensor], Tensor]
Endpoints = dict[int, tuple[Tensor, Tensor]]  # t -> (x_t, where the teacher's path from there ends)

TIMESTEPS = (999, 759, 499, 259)  # those of 4-step sampling
SOLVER_SKIP = 20  # the 50-step grid
LOWEST = 100  # the paper leaves out smaller timesteps, where equal noise is too rough a stand-in for the path


@torch.no_grad()
def teacher_endpoints(
    teacher: Function,
    latents: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    timesteps: Iterable[int] = TIMESTEPS,
    solver_skip: int = SOLVER_SKIP,
) -> Endpoints:
    """For each t the noised latents x_t and the end, at t = 0, of the DDIM path from x_t in steps of solver_skip.

    From t = 999 that is 50 steps. The costly half of `endpoint_error`: it can be kept while a student trains.
    """
    noised = {t: add_noise(latents, noise, _full(latents, t), schedule) for t in timesteps}
    return {t: (x_t, teacher_path(teacher, x_t, t, schedule, solver_skip)[-1]) for t, x_t in noised.items()}


@torch.no_grad()
def teacher_path(
    teacher: Function, x_t: Tensor, t: int, schedule: NoiseSchedule, solver_skip: int = SOLVER_SKIP
) -> list[Tensor]:
    """The points of the DDIM path from x_t, at t, t - solver_skip, .., 0; a last step that is shorter ends at 0 too."""
    skip = -(-t // solver_skip) * solver_skip  # clamped at 0 by multiple_estimation
    return solver_path(teacher, x_t, _full(x_t, t), skip, solver_skip, schedule)


@torch.no_grad()
def endpoint_squares(student: Function, endpoints: Endpoints) -> dict[int, Tensor]:
    """For each t the squared distance of F(x_t, t) to the path's end, averaged over the components of a sample: [B]."""
    return {t: mean_squares(student(x_t, _full(x_t, t)) - end) for t, (x_t, end) in endpoints.items()}


def endpoint_error(
    student: Function,
    teacher: Function,
    latents: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    timesteps: Iterable[int] = TIMESTEPS,
    solver_skip: int = SOLVER_SKIP,
) -> dict[int, float]:
    """For each t the RMS distance, over samples and components, between F(x_t, t) and the end of the teacher's path."""
    endpoints = teacher_endpoints(teacher, latents, noise, schedule, timesteps, solver_skip)
    return {t: squares.mean().sqrt().item() for t, squares in endpoint_squares(student, endpoints).items()}


@torch.no_grad()
def delta_samples(
    student: Function,
    latents: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    skip: int = 20,
    timesteps: Iterable[int] | None = None,
) -> dict[int, Tensor]:
    """As `delta`, the distance of each sample, [B]."""
    if timesteps is None:
        last = schedule.num_train_timesteps
        timesteps = [t for t in few_step_timesteps(50, num_train_timesteps=last).tolist() if t >= max(LOWEST, skip)]
    points: dict[int, Tensor] = {}  # on a grid of `skip` each point serves two distances

    def at(t: int) -> Tensor:
        if t not in points:
            points[t] = student(add_noise(latents, noise, _full(latents, t), schedule), _full(latents, t))
        return points[t]

    return {t: mean_squares(at(t) - at(t - skip)).sqrt() for t in timesteps}


def delta(
    student: Function,
    latents: Tensor,
    noise: Tensor,
    schedule: NoiseSchedule,
    skip: int = 20,
    timesteps: Iterable[int] | None = None,
) -> dict[int, float]:
    """For each t the mean over samples of |F(x_t, t) - F(x_{t-skip}, t-skip)|, both points with the same noise.

    The paper's delta(t, k) (its Fig. 2c), with |.| the RMS over components, so that sizes of pictures compare.
    timesteps: of the 50-step grid those from 100 on, by default. Raises ValueError for a timestep below skip.
    """
    return {
        t: distances.mean().item()
        for t, distances in delta_samples(student, latents, noise, schedule, skip, timesteps).items()
    }


def student_function(
    pipeline: Pipeline, conditioning: Conditioning, negative: Conditioning, guidance_scale: float = 1.0
) -> Function:
    """F(x_t, t) of a pipeline at gamma = 1; with guidance_scale, what an undistilled model's guided x0 makes of it."""
    denoiser = Denoiser(pipeline.schedule, pipeline.prediction_type)

    def net(x: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        return guided_output(pipeline, x, t, conditioning, negative, guidance_scale)

    return lambda x, t: denoiser(net, x, None, None, t)


def mean_squares(difference: Tensor) -> Tensor:
    """The mean square over the components of each sample: [B, ...] -> [B]."""
    return float64(difference).square().flatten(1).mean(1)


def float64(x: Tensor) -> Tensor:
    """x in float64: on the CPU where its device has none (Apple's MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


def _full(x: Tensor, t: int) -> Tensor:
    return torch.full((len(x),), t, device=x.device)
