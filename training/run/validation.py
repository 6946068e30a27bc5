"""How good a student is on samples that training never sees, by the teacher's own paths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from splam_core import add_noise, draws, few_step_timesteps, solve

from ..data import TrainingData
from ..models.pipeline import Conditioning, Pipeline
from ..models.sampling import teacher_function
from ..scoring.curves import SOLVER_SKIP, float64, mean_squares, student_function
from .config import Config
from .networks import Networks

STEPS = 4  # the timesteps judged are those of four-step sampling
SEED_OFFSET = 0x7A11D  # of the noise, so that it is not that of any training sample


@dataclass(frozen=True)
class Score:
    """`loss`: RMS distance between F(x_t, t) and the end of the teacher's guided DDIM path from x_t, over all samples.

    `delta`: by timestep t, the mean |F(x_t, t) - F(x_s, s)| over all components, with x_s, s = t-k, on the same path.
    It is the paper's delta(t, k) where the student trains; evaluate.py's, of equal noise, needs no teacher.
    """

    loss: float
    endpoint_error: dict[int, float]
    delta: dict[int, float]


class Validation:
    """Held-out samples, noised to the timesteps of four-step sampling in turn, with the teacher's path from each."""

    @torch.no_grad()
    def __init__(self, config: Config, pipeline: Pipeline, networks: Networks, data: TrainingData) -> None:
        """Asks the teacher, which is not needed any more after it."""
        self.pipeline, self.networks, self.skip = pipeline, networks, config.skip
        latents, conditioning = data.held_out(config.validation_samples)
        self.groups: list[tuple[int, Tensor, Tensor, Tensor, Conditioning]] = []
        negative = pipeline.unconditional()
        grid = few_step_timesteps(STEPS, num_train_timesteps=pipeline.schedule.num_train_timesteps).tolist()
        noise = draws(config.seed + SEED_OFFSET, range(len(latents)), latents.shape[1:])[0].to(latents)
        for place, t in enumerate(grid):
            for chosen in torch.arange(len(latents))[place::STEPS].split(config.train_batch_size):
                if not len(chosen):  # fewer samples than timesteps
                    continue
                chosen = chosen.to(latents.device)
                one = {key: value[chosen] for key, value in conditioning.items()}
                x_t = add_noise(latents[chosen], noise[chosen], torch.tensor(t), pipeline.schedule)
                teacher = teacher_function(pipeline, one, negative, config.guidance_scale)
                s = max(t - self.skip, 0)
                visited = sorted({*range(t, 0, -SOLVER_SKIP), s, 0}, reverse=True)
                path = solve(teacher, x_t, [torch.full_like(chosen, u) for u in visited], pipeline.schedule)
                self.groups.append((t, x_t, path[visited.index(s)], path[-1], one))

    @torch.no_grad()
    def __call__(self, role: str) -> Score:
        squares, counts, differences = {}, {}, {}
        with self.networks.use(role) as unet:
            judged = replace(self.pipeline, unet=unet)
            for t, x_t, x_s, end, conditioning in self.groups:
                F = student_function(judged, conditioning, {})
                start = torch.full((len(x_t),), t, device=x_t.device)
                here, there = F(x_t, start), F(x_s, (start - self.skip).clamp(min=0))
                squares[t] = squares.get(t, 0.0) + mean_squares(here - end).sum().item()
                differences[t] = differences.get(t, 0.0) + float64(here - there).abs().flatten(1).mean(1).sum().item()
                counts[t] = counts.get(t, 0) + len(x_t)
        return Score(
            loss=(sum(squares.values()) / sum(counts.values())) ** 0.5,
            endpoint_error={t: (squares[t] / counts[t]) ** 0.5 for t in counts},
            delta={t: differences[t] / counts[t] for t in counts},
        )
