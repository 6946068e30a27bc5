"""Consistency distillation: Algorithm 1's loss of a batch, its jumps made by the teacher or read from kept paths.

A stage of training gives (role, loss) pairs of a batch, one for each network that learns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from splam_core import Objective, PathObjective, draws, sample_gamma
from splam_core.paths import draw_places
from splam_core.recipe import on_device

from ..models.pipeline import Conditioning, Pipeline
from ..models.sampling import teacher_function
from .config import Config
from .networks import Networks


@dataclass
class Consistency:
    """The student learns to be consistent along its sub-paths (SPLAM, Direct Linking) or the teacher's path (LCM)."""

    config: Config
    teacher: Pipeline  # its UNet is the teacher
    negative: Conditioning  # what guidance takes for no prompt
    networks: Networks
    objective: Objective

    def losses(self, latents: Tensor, conditioning: Conditioning, indices: range) -> Iterator[tuple[str, Tensor]]:
        """("student", its loss [], the mean over a batch of samples): latents [B, C, h, w] are those of `indices`."""
        config = self.config
        teacher = teacher_function(self.teacher, conditioning, self.negative, config.guidance_scale)
        student, target = (self.networks.net(role, conditioning) for role in ("student", "target"))
        yield "student", config.loss(self.objective, student, target, teacher, latents, config.seed, indices)

    def forwards(self, indices: range) -> int:
        """UNet evaluations of these samples; a backward pass counts 2."""
        return len(indices) * self.config.unet_forwards_per_sample


@dataclass
class KeptPaths:
    """The student learns from kept paths (`splam_core.paths`): no teacher is asked, and for their ends no target."""

    config: Config
    teacher: Pipeline  # what a finish asks
    negative: Conditioning
    networks: Networks
    objective: PathObjective

    def losses(self, points: Tensor, conditioning: Conditioning, indices: range) -> Iterator[tuple[str, Tensor]]:
        """("student", its loss [], the mean over a batch): points [B, n+1, C, h, w], as `PathData` has them."""
        config = self.config
        timesteps = conditioning.pop("timesteps")
        _, u_place, u_gamma = draws(config.seed, indices, ())
        place = draw_places(u_place, points.shape[1] - 1, config.path_first_share)
        gamma = sample_gamma(u_gamma, config.gamma_one_probability)
        place, gamma = on_device(place, points.device), on_device(gamma, points.device)
        student, target = (self.networks.net(role, conditioning) for role in ("student", "target"))
        asked = None if config.method == "lcm" else gamma
        yield "student", self.objective(student, target, points, timesteps, place, asked).mean()

    def forwards(self, indices: range) -> int:
        """UNet evaluations of these samples; a backward pass counts 2."""
        return len(indices) * self.config.unet_forwards_per_sample


def first_stage(
    config: Config, teacher: Pipeline, negative: Conditioning, networks: Networks, objective: Objective | None = None
) -> Consistency | KeptPaths:
    """The stage of the method; objective: None, the one that `config` names."""
    if objective is None:
        objective = config.objective(teacher.schedule, teacher.prediction_type)
    if config.paths is None:
        return Consistency(config, teacher, negative, networks, objective)
    kept = PathObjective(objective.denoiser, config.path_goal, objective.distance)
    return KeptPaths(config, teacher, negative, networks, kept)


def plain_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU the fused attention's backward pass takes longer than all the rest; the plain one does not."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
