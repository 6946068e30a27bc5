"""Distribution matching as a stage of training: what a few-step student is finished with."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor

from splam_core import Denoiser, DistributionMatching
from splam_core.denoiser import Network

from ..models.pipeline import Conditioning, Pipeline
from ..models.sampling import teacher_function
from .config import Config
from .consistency import Consistency, KeptPaths
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
        """Each role that learns and its loss [], as `Finish.finish_losses`. Of the latents only the shape is read."""
        config = self.config
        teacher = teacher_function(self.teacher, conditioning, self.negative, config.finish_guidance)

        def net(role: str, rows: Tensor | None) -> Network:
            told = conditioning if rows is None else {key: value[rows] for key, value in conditioning.items()}
            return self.networks.net(role, told)

        return config.finish_losses(
            self.objective, net, teacher, latents.shape[1:], config.seed, indices, latents.device,
            self.networks.sharded,
        )  # fmt: skip

    def forwards(self, indices: range) -> int:
        """UNet evaluations of these samples; a backward pass counts 2."""
        config = self.config
        return sum(config.finish_places(config.seed, indices)) + len(indices) * config.finish_forwards_that_learn


def finish_of(stage: Consistency | KeptPaths) -> Finishing:
    """The finish of a method, with the networks, teacher and settings of that."""
    config, teacher = stage.config, stage.teacher
    objective = config.matching(Denoiser(teacher.schedule, teacher.prediction_type, config.conditioning))
    return Finishing(config, teacher, stage.negative, stage.networks, objective)


Stage = Consistency | KeptPaths | Finishing
