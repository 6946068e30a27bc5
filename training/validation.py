"""How good a student is on samples that training never sees, by the teacher's own paths."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from splam_core import Denoiser, NoiseSchedule, add_noise, few_step_timesteps, multiple_estimation, predict_epsilon

from .data import draws
from .generate import guided_output
from .networks import Networks
from .pipeline import Conditioning, Pipeline, unet_arguments

STEPS = 4  # the timesteps judged are those of four-step sampling
SEED_OFFSET = 0x7A11D  # of the noise, so that it is not that of any training sample


@dataclass(frozen=True)
class Score:
    """`loss`: RMS distance between F(x_t, t) and the end of the teacher's guided DDIM path from x_t, over all samples.

    `delta`: by timestep t, the mean |F(x_t, t) - F(x_s, s)|, s = t-k on the same path: the paper's delta(t, k).
    """

    loss: float
    endpoint_error: dict[int, float]
    delta: dict[int, float]


class Validation:
    """Held-out samples, noised to the timesteps of four-step sampling in turn, with the teacher's path from each."""

    def __init__(
        self,
        pipeline: Pipeline,
        networks: Networks,
        latents: Tensor,
        conditioning: Conditioning,
        guidance_scale: float,
        skip: int,
        solver_skip: int,
        seed: int,
        batch_size: int,
    ) -> None:
        self.pipeline, self.networks, self.skip = pipeline, networks, skip
        self.groups: list[tuple[int, Tensor, Tensor, Tensor, Conditioning]] = []
        negative = pipeline.unconditional()
        grid = few_step_timesteps(STEPS, num_train_timesteps=pipeline.schedule.num_train_timesteps).tolist()
        noise = draws(seed + SEED_OFFSET, range(len(latents)), latents.shape[1:])[0].to(latents)
        for place, t in enumerate(grid):
            for chosen in torch.arange(len(latents))[place::STEPS].split(batch_size):
                if not len(chosen):  # fewer samples than timesteps
                    continue
                chosen = chosen.to(latents.device)
                one = {key: value[chosen] for key, value in conditioning.items()}
                x_t = add_noise(latents[chosen], noise[chosen], torch.tensor(t), pipeline.schedule)
                x_s, end = self._path(x_t, t, one, negative, guidance_scale, solver_skip)
                self.groups.append((t, x_t, x_s, end, one))

    @torch.no_grad()
    def _path(
        self, x_t: Tensor, t: int, conditioning: Conditioning, negative: Conditioning, w: float, solver_skip: int
    ) -> tuple[Tensor, Tensor]:
        """x at t-k and at 0 on the guided DDIM path."""
        pipeline, schedule = self.pipeline, self.pipeline.schedule

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            output = guided_output(pipeline, x, t, conditioning, negative, w)
            return predict_epsilon(output, x, schedule.alpha(t), schedule.sigma(t), pipeline.prediction_type)

        steps = -(-(t + 1) // solver_skip)
        start = torch.full((len(x_t),), t, device=x_t.device)
        with self.networks.use("teacher"):
            path = multiple_estimation(teacher, x_t, start, steps * solver_skip, solver_skip, schedule, True)
        # One more denoising at t = 0, which the path ends at, is below what a picture shows.
        return path[min(self.skip // solver_skip, steps)], path[-1]

    @torch.no_grad()
    def __call__(self, role: str) -> Score:
        squares, counts, differences = {}, {}, {}
        with self.networks.use(role) as unet:
            for t, x_t, x_s, end, conditioning in self.groups:
                F = _consistency(unet, self.pipeline.schedule, self.pipeline.prediction_type, conditioning)
                here, there = F(x_t, t), F(x_s, max(0, t - self.skip))
                squares[t] = squares.get(t, 0.0) + (here - end).double().square().sum().item()
                differences[t] = differences.get(t, 0.0) + (here - there).double().abs().sum().item()
                counts[t] = counts.get(t, 0) + here.numel()
        return Score(
            loss=(sum(squares.values()) / sum(counts.values())) ** 0.5,
            endpoint_error={t: (squares[t] / counts[t]) ** 0.5 for t in counts},
            delta={t: differences[t] / counts[t] for t in counts},
        )


def _consistency(unet: nn.Module, schedule: NoiseSchedule, prediction_type: str, conditioning: Conditioning):
    """F at gamma = 1 as a function of (x, timestep)."""
    denoiser = Denoiser(schedule, prediction_type)

    def net(x: Tensor, t: Tensor, _: Tensor | None) -> Tensor:
        return unet(x.to(unet.dtype), t, **unet_arguments(conditioning, unet.dtype)).sample.to(x)

    return lambda x, t: denoiser(net, x, None, None, torch.full((len(x),), t, device=x.device))
