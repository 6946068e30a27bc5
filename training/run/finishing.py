"""Distribution matching as a stage of training: what a few-step student is finished with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from splam_core import Denoiser, DistributionMatching, draw_places, matching_draws, predict_epsilon, simulate
from splam_core.recipe import on_device

from ..models.pipeline import Conditioning, Pipeline
from ..models.sampling import guided_output
from .config import Config
from .consistency import Consistency
from .networks import Networks


@dataclass
class Finishing:
    """The student's own samples follow the teacher's score against that of a fake network, which learns them."""

    config: Config
    teacher: Pipeline  # its UNet is the teacher
    negative: Conditioning  # what guidance takes for no prompt
    networks: Networks
    objective: DistributionMatching

    def losses(self, latents: Tensor, conditioning: Conditioning, indices: range) -> Iterator[tuple[str, Tensor]]:
        """("student", its loss []), then ("fake", its loss []) --fake-updates times, on the same samples.

        latents [B, C, h, w]: only their shape is read. That of the fake network comes after, since a graph of the
        student's that waited for it would be held beside its own.
        """
        config, teacher, objective = self.config, self.teacher, self.objective
        drawn = matching_draws(
            config.seed, indices, latents.shape[1:], config.finish_step_counts, 1 + config.fake_updates
        )
        noise, u, level_noise = (on_device(part, latents.device) for part in (drawn.noise, drawn.u, drawn.level_noise))
        student, fake, start = (self.networks.net(role, conditioning) for role in ("student", "fake", "start"))

        def sampled(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            asked = {key: value[rows] for key, value in conditioning.items()}
            return objective.sample(self.networks.net("student", asked), x, t)

        def guided_epsilon(x: Tensor, t: Tensor) -> Tensor:
            output = guided_output(teacher, x, t, conditioning, self.negative, config.finish_guidance)
            schedule = teacher.schedule
            return predict_epsilon(output, x, schedule.alpha(t), schedule.sigma(t), teacher.prediction_type)

        x_t, t = simulate(sampled, drawn.steps, drawn.places, noise, teacher.schedule, self.networks.sharded)
        torch.clear_autocast_cache()  # of weights cast without a gradient, which would be taken for those that learn
        x0 = objective.sample(student, x_t, t)
        start_x0 = None
        with torch.no_grad():
            if objective.anchor:
                start_x0 = objective.sample(start, x_t, t)
            gradient = objective.gradient(x0, guided_epsilon, fake, objective.timesteps(u[0]), level_noise[0])
        yield "student", objective.student_loss(x0, gradient, start_x0).mean()
        x0 = x0.detach()
        for use in range(1, 1 + config.fake_updates):
            yield "fake", objective.fake_loss(fake, x0, objective.timesteps(u[use]), level_noise[use]).mean()

    def forwards(self, indices: range) -> int:
        """UNet evaluations of these samples; a backward pass counts 2."""
        _, places = draw_places(self.config.seed, indices, self.config.finish_step_counts)
        return sum(places) + len(indices) * self.config.finish_forwards_that_learn


def finish_of(stage: Consistency) -> Finishing:
    """The finish of a method, with the networks, teacher and settings of that."""
    config, teacher = stage.config, stage.teacher
    objective = DistributionMatching(
        Denoiser(teacher.schedule, teacher.prediction_type, config.conditioning),
        (config.finish_noise_range[0], config.finish_noise_range[1]),
        config.finish_anchor,
    )
    return Finishing(config, teacher, stage.negative, stage.networks, objective)
