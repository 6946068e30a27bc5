"""How a few-step student is finished by distribution matching: the settings, and the losses of a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoiser, Network
from .matching import DistributionMatching, draw_places, matching_draws, simulate
from .recipe import on_device, setting
from .schedule import GRID
from .solver import Teacher

FINISHES = ("none", "distribution-matching")
# Of a LoRA whose method learns at LORA_LEARNING_RATE; others in proportion.
LORA_FINISH = {"finish_learning_rate": 2e-5, "fake_learning_rate": 8e-5}

# ("student", "fake" or "start"; which rows [b] of the batch it is told of, None for all) -> that network
Roles = Callable[[str, Tensor | None], Network]


@dataclass(frozen=True, kw_only=True)
class Finish:
    """What follows the method. Raises ValueError, in the words of the flags, for settings that make no sense."""

    finish: str = setting(
        "none", "a stage after --max-train-steps of the method: its samples are led to the teacher's", FINISHES
    )
    finish_steps: int = setting(90, "its steps, each one update of the student and --fake-updates of the fake network")
    finish_learning_rate: float = setting(5e-5, "the student's in it")
    fake_learning_rate: float = setting(2e-4, "of the fake network, which learns the score of the student's samples")
    fake_updates: int = setting(2, "of it, a step of the finish")
    finish_beta1: float = setting(0.0, "AdamW's in the finish, for both")
    finish_beta2: float = setting(0.999, "AdamW's in the finish, for both")
    finish_warmup_steps: int = setting(5, "over which both rates rise; they are constant then")
    finish_ema_decay: float = setting(0.98, "of the average that the finish exports")
    finish_step_counts: tuple[int, ...] = setting((1, 2, 4), "the student's samples are made in so many steps, in turn")
    finish_guidance_scale: float | None = setting(None, "w of the teacher's score; none: --guidance-scale")
    finish_anchor: float = setting(0.5, "how strongly the student is held to what it was, times alpha(t)^2; 0: not")
    finish_noise_range: tuple[float, ...] = setting((0.02, 0.98), "shares of the schedule at which scores are compared")

    def __post_init__(self) -> None:
        for name in ("finish_steps", "fake_updates"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        if not 0 <= self.finish_ema_decay < 1:
            raise ValueError(f"--finish-ema-decay must be at least 0 and below 1, got {self.finish_ema_decay}")
        if not self.finish_step_counts or any(not 1 <= count <= GRID for count in self.finish_step_counts):
            raise ValueError(f"--finish-step-counts must be from 1 to {GRID}, got {list(self.finish_step_counts)}")
        if self.finish_anchor < 0:
            raise ValueError(f"--finish-anchor must be 0 or more, got {self.finish_anchor}")
        span = self.finish_noise_range
        if len(span) != 2 or not 0 <= span[0] < span[1] <= 1:
            raise ValueError(f"--finish-noise-range must be two rising numbers from 0 to 1, got {list(span)}")

    @property
    def finish_betas(self) -> tuple[float, float]:
        return self.finish_beta1, self.finish_beta2

    def matching(self, denoiser: Denoiser) -> DistributionMatching:
        low, high = self.finish_noise_range
        return DistributionMatching(denoiser, (low, high), self.finish_anchor)

    def finish_losses(
        self,
        objective: DistributionMatching,
        nets: Roles,
        teacher: Teacher,
        shape: Sequence[int],
        seed: int,
        indices: range,
        device: torch.device,
        in_step: bool = False,
    ) -> Iterator[tuple[str, Tensor]]:
        """("student", its loss []), then ("fake", its loss []) fake_updates times, on the same samples.

        shape: of one sample; teacher: the guided epsilon of the whole batch; in_step: see `simulate`. The loss of the
        fake network comes after, since a graph of the student's that waited for it would be held beside its own.
        """
        drawn = matching_draws(seed, indices, shape, self.finish_step_counts, 1 + self.fake_updates)
        noise, u, level_noise = (on_device(part, device) for part in (drawn.noise, drawn.u, drawn.level_noise))
        student, fake, start = (nets(role, None) for role in ("student", "fake", "start"))

        def sampled(x: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return objective.sample(nets("student", rows), x, t)

        x_t, t = simulate(sampled, drawn.steps, drawn.places, noise, objective.schedule, in_step)
        torch.clear_autocast_cache()  # of weights cast without a gradient, which would be taken for those that learn
        x0 = objective.sample(student, x_t, t)
        start_x0 = None
        with torch.no_grad():
            if objective.anchor:
                start_x0 = objective.sample(start, x_t, t)
            gradient = objective.gradient(x0, teacher, fake, objective.timesteps(u[0]), level_noise[0])
        yield "student", objective.student_loss(x0, gradient, t, start_x0).mean()
        x0 = x0.detach()
        for use in range(1, 1 + self.fake_updates):
            yield "fake", objective.fake_loss(fake, x0, objective.timesteps(u[use]), level_noise[use]).mean()

    def finish_places(self, seed: int, indices: range) -> list[int]:
        """Evaluations of the student before the one that learns, of each sample."""
        return draw_places(seed, indices, self.finish_step_counts)[1]
