"""Consistency distillation: Algorithm 1's loss of a batch.

A stage of training gives (role, loss) pairs of a batch, one for each network that learns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from splam_core import Objective, predict_epsilon

from ..models.pipeline import Conditioning, Pipeline
from ..models.sampling import guided_output
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
        config, teacher, schedule = self.config, self.teacher, self.teacher.schedule

        def guided_epsilon(x: Tensor, t: Tensor) -> Tensor:
            output = guided_output(teacher, x, t, conditioning, self.negative, config.guidance_scale)
            return predict_epsilon(output, x, schedule.alpha(t), schedule.sigma(t), teacher.prediction_type)

        student, target = (self.networks.net(role, conditioning) for role in ("student", "target"))
        yield "student", config.loss(self.objective, student, target, guided_epsilon, latents, config.seed, indices)

    def forwards(self, indices: range) -> int:
        """UNet evaluations of these samples; a backward pass counts 2."""
        return len(indices) * self.config.unet_forwards_per_sample


def plain_attention(device: torch.device) -> contextlib.AbstractContextManager:
    """On a CPU the fused attention's backward pass takes longer than all the rest; the plain one does not."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
