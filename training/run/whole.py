"""Networks of whole weights: teacher, student and target are UNets of their own."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from ..models.pipeline import Pipeline
from .config import Config
from .memory import keep_less
from .networks import COND_PROJ, FINISHING, Networks, base_dtype, copy_into, on_cpu, with_projection
from .sharding import gathered, own_shards, shard, shards_of

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def make_student(teacher: UNet2DConditionModel, gamma_conditioning: str) -> UNet2DConditionModel:
    """A copy of the teacher that can be told gamma; with cond_proj at zero it *is* the teacher, to the bit."""
    plain = gamma_conditioning == "noise-level"
    student = copy.deepcopy(teacher) if plain else with_projection(teacher, copied=True)
    return student.float().to(teacher.device).requires_grad_(True)


class FullNetworks(Networks):
    """The teacher as it was loaded, and a student and a target that are fp32 UNets of their own.

    With a mesh all three lie in shards over its processes, which must then take part in every forward pass together.
    """

    def __init__(
        self, pipeline: Pipeline, config: Config, mesh: DeviceMesh | None = None, begun: dict[str, Tensor] | None = None
    ) -> None:
        """begun: weights of a plain UNet that student and target begin with; None: the teacher's."""
        super().__init__(pipeline, config)
        self.mesh = mesh
        self.teacher, self.sharded = pipeline.unet, mesh is not None
        self.fake: nn.Module | None = None
        self.start: nn.Module | None = None
        self.student: nn.Module = make_student(pipeline.unet, config.conditioning)
        if begun is not None:
            own = self.student.state_dict()
            copy_into({key: own[key] for key in own if key != COND_PROJ}, begun)
        nn.Module.to(self.teacher, base_dtype(config))  # diffusers' own `to` warns of every cast
        if mesh is not None:
            shard(self.teacher, mesh)  # before there is a third whole UNet
        self.target = copy.deepcopy(self.student).requires_grad_(False)
        keep_less(self.student, config.gradient_checkpointing)
        keep_less(self.target, False)
        if config.mixed_precision != "no":  # else nothing makes fp32 of its 16 bits
            keep_less(self.teacher, False)
        self.student.train()
        if mesh is not None:
            shard(self.target, mesh)
            shard(self.student, mesh)
        self.release = on_cpu(self.weights("target")) if config.release_decay else {}

    def let_teacher_go(self, pipeline: Pipeline) -> None:
        """Nobody will ask it again; its place in the pipeline, whose shapes are still read, is the target's."""
        self.teacher = pipeline.unet = self.target

    def unet_of(self, role: str) -> nn.Module:
        return self._unets().get(role, self.target)

    def _unets(self) -> dict[str, nn.Module | None]:
        return {"teacher": self.teacher, "student": self.student, "fake": self.fake, "start": self.start}

    @property
    def roles(self) -> list[str]:
        unets = self._unets()
        more = ["release"] if self.release else []
        return ["student", "target", *more, *(role for role in FINISHING if unets[role] is not None)]

    def begin_finish(self) -> None:
        """Student and target go on from the slower average, where there is one; the fake network is the teacher."""
        better = self.release or self.weights("target")
        for role in ("target", "student"):
            copy_into(self.weights(role), better)
        self.release = {}
        self.fake = self._another(self.teacher).requires_grad_(True)
        keep_less(self.fake, self.config.gradient_checkpointing)
        self.fake.train()
        if self.config.finish_anchor:
            self.start = self._another(self.target)
            keep_less(self.start, False)
        if self.config.compile:
            for unet in filter(None, (self.fake, self.start)):
                unet.compile()

    def _another(self, unet: nn.Module) -> nn.Module:
        """A frozen fp32 UNet with the weights of one that lies as all do, in shards or not."""
        if not self.sharded:
            return nn.Module.to(copy.deepcopy(unet), torch.float32).requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            config = {key: value for key, value in unet.config.items() if key != "_use_default_values"}
            other = UNet2DConditionModel.from_config(config).to(unet.device).eval().requires_grad_(False)
        shard(other, self.mesh)
        copy_into(own_shards(other.state_dict()), own_shards(unet.state_dict()))
        return other

    def trainable(self, role: str = "student") -> list[nn.Parameter]:
        return list(self._unets()[role].parameters())

    def weights(self, role: str) -> dict[str, Tensor]:
        if role == "release":
            return self.release
        return own_shards(self._state(role)) if self.sharded else self._state(role)

    def whole(self, role: str) -> dict[str, Tensor]:
        if not self.sharded:
            return self.weights(role)
        with self.use(role):
            return gathered(self._state(role))

    def cut(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        return shards_of(whole, self._state("target")) if self.sharded else whole

    def _state(self, role: str) -> dict[str, Tensor]:
        return dict(_bare(self._unets().get(role, self.target)).state_dict())

    def compile(self) -> None:
        for unet in (self.teacher, self.target, _bare(self.student)):
            unet.compile()

    def export(self, role: str) -> dict[str, Tensor]:
        return {key: weight.cpu().clone() for key, weight in self.whole(role).items() if "cond_proj" not in key}


def _bare(unet: nn.Module) -> nn.Module:
    return getattr(unet, "module", unet)
