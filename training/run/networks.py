"""The networks of one run, each of which has a role: teacher, student, target and release average.

A finish has two more, and no release average: the fake network, and the student that it began with ("start"). The
pipeline's own UNet is the teacher all the while: whatever asks the pipeline asks the teacher.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from splam_core import ema_update, gamma_embedding, release_decay_at, sinusoid_frequencies
from splam_core.denoiser import Network

from ..models.pipeline import DTYPES, Conditioning, Pipeline, unet_arguments
from .config import Config

GAMMA_DIM = 256
FINISHING = ("fake", "start")
COND_PROJ = "time_embedding.cond_proj.weight"


class Networks(ABC):
    """What whole weights (`whole.FullNetworks`) and a LoRA (`adapters.LoraNetworks`) answer alike."""

    sharded: bool  # whether weights lie in shards over the processes, which must then be asked together
    student: nn.Module  # what learns, as accelerate wraps it
    release: dict[str, Tensor]  # the slower average's weights, on the CPU; none without one, and in a finish

    def __init__(self, pipeline: Pipeline, config: Config) -> None:
        self.config, self.bandwidth = config, config.gamma_bandwidth
        projected = config.conditioning == "embedding"
        self.frequencies = sinusoid_frequencies(GAMMA_DIM).to(pipeline.device) if projected else None

    def net(self, role: str, conditioning: Conditioning) -> Network:
        """A role's UNet as a function of (x [B, ...], t [B], gamma [B] or None), told these prompts."""
        told = unet_arguments(conditioning)

        def net(x: Tensor, t: Tensor, gamma: Tensor | None) -> Tensor:
            phi = None
            if self.frequencies is not None and gamma is not None:
                phi = gamma_embedding(gamma.to(x), GAMMA_DIM, self.bandwidth, frequencies=self.frequencies)
            with self.use(role) as unet:
                return unet(x, t, **told, timestep_cond=phi).sample

        return net

    @contextlib.contextmanager
    def use(self, role: str) -> Iterator[Any]:
        """The UNet of a role. The release average lies in the target's place meanwhile."""
        if role != "release":
            yield self.unet_of(role)
            return
        exchange(self.weights("target"), self.release)
        try:
            yield self.unet_of("target")
        finally:
            exchange(self.weights("target"), self.release)

    @abstractmethod
    def unet_of(self, role: str) -> Any:
        """What is called as the UNet of a role that has one."""

    @property
    @abstractmethod
    def roles(self) -> list[str]:
        """Those with weights of their own, which a checkpoint holds."""

    @abstractmethod
    def trainable(self, role: str = "student") -> list[nn.Parameter]:
        """What an optimizer moves."""

    @abstractmethod
    def weights(self, role: str) -> dict[str, Tensor]:
        """What a checkpoint holds of a role, sharing memory with the network: this process's shards, if any."""

    def whole(self, role: str) -> dict[str, Tensor]:
        """The same without shards. Where there are, all processes must ask; the main one alone is answered."""
        return self.weights(role)

    def cut(self, whole: dict[str, Tensor]) -> dict[str, Tensor]:
        """What `weights` would be of these whole ones. Raises ValueError where a shape differs."""
        return whole

    def learning(self, role: str) -> contextlib.AbstractContextManager[None]:
        """Around a role's backward pass: a checkpointed one runs its UNet again."""
        return contextlib.nullcontext()

    @abstractmethod
    def let_teacher_go(self, pipeline: Pipeline) -> None:
        """Nobody will ask it again."""

    @abstractmethod
    def begin_finish(self) -> None:
        """Student and target go on from the slower average, where there is one; the finish's own networks begin."""

    @abstractmethod
    def compile(self) -> None:
        """By torch, in place."""

    @abstractmethod
    def export(self, role: str) -> dict[str, Tensor]:
        """The plain UNet's fp32 state dict, as `whole` gives it."""


def update_averages(networks: Networks, step: int, decay: float, release_decay: float) -> None:
    """The target after every step; the release average where `release_decay_at` says so."""
    student, target = networks.weights("student"), networks.weights("target")
    floating = [key for key, average in target.items() if average.is_floating_point()]
    ema_update([target[key] for key in floating], [student[key] for key in floating], decay)
    slower = release_decay_at(step, release_decay)
    if networks.release and slower is not None:
        ema_update(networks.release.values(), [student[key] for key in networks.release], slower)


def load_weights(networks: Networks, role: str, weights: dict[str, Tensor]) -> None:
    """Whole weights, into every process. Raises ValueError for those of another run's shape."""
    own, weights = networks.weights(role), networks.cut(weights)
    if own.keys() != weights.keys() or any(own[key].shape != weights[key].shape for key in own):
        different = sorted(own.keys() ^ weights.keys()) or ["shapes"]
        raise ValueError(f"{role}: {len(different)} weights differ, the first {different[0]}")
    copy_into(own, weights)


class RoleState:
    """A role's weights as a checkpoint holds them: whole, whatever the shards."""

    def __init__(self, networks: Networks, role: str) -> None:
        self.networks, self.role = networks, role

    def state_dict(self) -> dict[str, Tensor]:
        return self.networks.whole(self.role)

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        load_weights(self.networks, self.role, state)


def base_dtype(config: Config) -> torch.dtype:
    """Of the frozen UNet. A LoRA student's own forward passes go through it: without mixed precision it stays fp32."""
    if config.lora and config.mixed_precision == "no":
        return torch.float32
    return DTYPES[config.teacher_dtype]


def with_projection(teacher: UNet2DConditionModel, copied: bool) -> UNet2DConditionModel:
    """The teacher with a cond_proj of zeros; unless copied it takes the teacher's own tensors over."""
    dtype = teacher.dtype
    # diffusers notes which keys a config.json lacked, and would take the default for them once more.
    config = {key: value for key, value in teacher.config.items() if key != "_use_default_values"}
    with torch.device("meta" if not copied else "cpu"):
        student = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": GAMMA_DIM})
    shape = student.time_embedding.cond_proj.weight.shape
    weights = {**teacher.state_dict(), COND_PROJ: torch.zeros(shape, dtype=dtype, device=teacher.device)}
    student.load_state_dict(weights, assign=not copied)
    return student.eval().requires_grad_(False)


def on_cpu(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: weight.detach().cpu().clone() for key, weight in weights.items()}


@torch.no_grad()
def copy_into(into: dict[str, Tensor], source: dict[str, Tensor]) -> None:
    for key, weight in into.items():
        weight.copy_(source[key])


@torch.no_grad()
def exchange(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for key, weight in one.items():
        kept = weight.to(other[key].device, copy=True)
        weight.copy_(other[key])
        other[key].copy_(kept)
