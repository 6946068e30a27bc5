"""Distribution matching: a few-step student's samples are led towards what the teacher finds likely.

DMD (Yin et al., One-step Diffusion with Distribution Matching Distillation, eq. 7 and 8) with the backward simulation
of DMD2 (Yin et al., Improved Distribution Matching Distillation), without its discriminator: a second network, the
"fake" one, learns the score of the student's own samples, and the student follows the difference of the two scores.
An anchor, which is ours, holds it to the student that it was before, by as much as that one saw: alpha(t)^2 of the
picture. What it made of noise alone was the mean of many pictures, and that the finish is to leave.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .denoiser import Denoiser, Network, predict_x0
from .objective import l2
from .sampler import add_noise
from .schedule import NoiseSchedule, broadcast_to, few_step_timesteps
from .solver import Teacher

WEIGHTINGS = ("normalised", "kl")

# (x [b, ...], t [b], rows [b]: which of the batch's samples they are) -> x0 [b, ...]
Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class MatchingDraws:
    """The random numbers of a batch of B samples, with D the largest number of steps and U the uses of its samples."""

    steps: list[int]  # [B]: how many steps each sample is made in
    places: list[int]  # [B]: and in which of them, from 0, the student learns
    noise: Tensor  # [D, B, ...]: pure noise, then the fresh one before each further step
    u: Tensor  # [U, B] in [0, 1): noise level of each use, see `DistributionMatching.timesteps`
    level_noise: Tensor  # [U, B, ...]: and its noise

    @property
    def forwards(self) -> int:
        """Evaluations of the student before those that learn."""
        return sum(self.places)


def draw_places(seed: int, indices: Sequence[int], step_counts: Sequence[int]) -> tuple[list[int], list[int]]:
    """(steps, places) of `matching_draws` alone, on the CPU."""
    drawn = [_place(_generator(seed, index), step_counts) for index in indices]
    return [steps for steps, _ in drawn], [place for _, place in drawn]


def matching_draws(
    seed: int, indices: Sequence[int], shape: Sequence[int], step_counts: Sequence[int] = (1, 2, 4), uses: int = 3
) -> MatchingDraws:
    """Sample i's numbers are a function of (seed, i) alone, as in `draws`. shape: of one sample.

    The number of steps is one of `step_counts`, each as likely, and so is each of its places.
    """
    steps, places, noise, u, level_noise = [], [], [], [], []
    for index in indices:
        generator = _generator(seed, index)
        many, place = _place(generator, step_counts)
        steps.append(many)
        places.append(place)
        noise.append(torch.randn((max(step_counts), *shape), generator=generator))
        u.append(torch.rand(uses, generator=generator))
        level_noise.append(torch.randn((uses, *shape), generator=generator))
    return MatchingDraws(steps, places, torch.stack(noise, 1), torch.stack(u, 1), torch.stack(level_noise, 1))


def _generator(seed: int, index: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 0x9E3779B97F4A7C15 + 2**61 + index) % 2**63)


def _place(generator: torch.Generator, step_counts: Sequence[int]) -> tuple[int, int]:
    # On the CPU, whatever torch.device is around it: how much is computed depends on them.
    which, place = torch.rand(2, generator=generator, device="cpu").tolist()
    many = step_counts[min(int(which * len(step_counts)), len(step_counts) - 1)]
    return many, min(int(place * many), many - 1)


@torch.no_grad()
def simulate(
    student: Sampler,
    steps: Sequence[int],
    places: Sequence[int],
    noise: Tensor,
    schedule: NoiseSchedule,
    in_step: bool = False,
) -> tuple[Tensor, Tensor]:
    """(x_t [B, ...], t [B]): where each sample stands before step `places` of `steps`, by few-step sampling (eq. 19).

    student(x, t, rows) is F of those samples; noise: [D, B, ...] as in `matching_draws`. in_step: run as many passes
    whatever was drawn, where several processes must run them together.
    """
    with torch.device("cpu"):  # whatever device is around it
        last = schedule.num_train_timesteps
        grids = [few_step_timesteps(many, num_train_timesteps=last).tolist() for many in steps]
    x, device = noise[0].clone(), noise.device
    for done in range(len(noise) - 1):
        behind = [row for row, place in enumerate(places) if place > done]
        if not behind:
            if in_step:
                student(x[:1], torch.tensor([grids[0][0]], device=device), torch.tensor([0], device=device))
            continue
        rows = torch.tensor(behind, device=device)
        here, there = (torch.tensor([grids[row][at] for row in behind], device=device) for at in (done, done + 1))
        x[rows] = add_noise(student(x[rows], here, rows), noise[done + 1][rows], there, schedule).to(x.dtype)
    return x, torch.tensor([grid[place] for grid, place in zip(grids, places, strict=True)], device=device)


@dataclass(frozen=True)
class DistributionMatching:
    """The two losses. Raises ValueError for an unknown weighting, a noise range that is none, a negative anchor."""

    denoiser: Denoiser  # F of the student; its schedule and prediction_type are the fake network's and the teacher's
    noise_range: tuple[float, float] = (0.02, 0.98)  # shares of the schedule that samples are noised to
    anchor: float = 0.5  # how strongly the student is held to what it was, times alpha(t)^2
    weighting: str = "normalised"  # or "kl"

    def __post_init__(self) -> None:
        low, high = self.noise_range
        if not 0 <= low < high <= 1:
            raise ValueError(f"noise_range must be two rising numbers from 0 to 1, got {low} and {high}.")
        if self.anchor < 0:
            raise ValueError(f"anchor must be 0 or more, got {self.anchor}.")
        if self.weighting not in WEIGHTINGS:
            raise ValueError(f"weighting must be one of {WEIGHTINGS}, got {self.weighting!r}.")

    @property
    def schedule(self) -> NoiseSchedule:
        return self.denoiser.schedule

    def sample(self, student: Network, x_t: Tensor, t: Tensor) -> Tensor:
        """x0 [B, ...] of the student, as sampling makes it; gradients flow."""
        return self.denoiser(student, x_t, None, None, t)

    def timesteps(self, u: Tensor) -> Tensor:
        """Uniform u [B] in [0, 1) to timesteps [B], all within noise_range as likely."""
        many = self.schedule.num_train_timesteps
        low, high = (round(share * (many - 1)) for share in self.noise_range)
        return (low + (u * (high - low + 1)).long()).clamp(max=high)

    @torch.no_grad()
    def gradient(self, x0: Tensor, teacher: Teacher, fake: Network, t: Tensor, noise: Tensor) -> Tensor:
        """What the divergence's gradient is in each sample x0 [B, ...], noised by `noise` to t [B] (eq. 7).

        teacher(x, t) is the guided epsilon, fake's raw output is of the denoiser's prediction_type. Both scores are
        told by x0, since alpha * (fake score - teacher's) = alpha^2/sigma^2 * (fake x0 - teacher's).
        "kl": that, whose mean is the gradient of KL(student's samples || teacher's) at noise level t.
        "normalised": fake x0 - teacher's over the sample's mean |x0 - teacher's|, as their Algorithm 2 has eq. 8.
        """
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        x = add_noise(x0, noise, t, self.schedule)
        real_x0 = predict_x0(teacher(x, t), x, alpha, sigma, "epsilon")
        fake_x0 = predict_x0(fake(x, t, None), x, alpha, sigma, self.denoiser.prediction_type)
        if self.weighting == "kl":
            weight = (alpha / sigma).square()
        else:
            weight = 1 / (x0 - real_x0).abs().flatten(1).mean(1).clamp(min=1e-8)
        return broadcast_to(weight, x0) * (fake_x0 - real_x0)

    def student_loss(self, x0: Tensor, gradient: Tensor, t: Tensor, start_x0: Tensor | None = None) -> Tensor:
        """[B]: half the mean square of what the gradient would move a sample by, so that its gradient in x0 [B, ...] is
        `gradient` over the sample's size, and 2 * anchor * alpha(t)^2 * the mean square of x0 - start_x0, if given.

        t [B]: of the x_t that x0 was made of; start_x0: what the student made of it before it was finished.
        """
        loss = l2(x0 - (x0 - gradient).detach()) / 2
        if start_x0 is not None:
            loss = loss + 2 * self.anchor * self.schedule.alpha(t).square() * l2(x0 - start_x0.detach())
        return loss

    def fake_loss(self, fake: Network, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """[B]: denoising score matching on the student's samples x0 [B, ...], in what the network predicts."""
        x0 = x0.detach()
        x = add_noise(x0, noise, t, self.schedule)
        goal = noise
        if self.denoiser.prediction_type == "v_prediction":
            alpha, sigma = (broadcast_to(level, x0) for level in (self.schedule.alpha(t), self.schedule.sigma(t)))
            goal = alpha * noise - sigma * x0
        return l2(fake(x, t, None) - goal)
