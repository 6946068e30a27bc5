"""Low-rank adapters (Hu et al., LoRA) of some layers of a network, one for each role that the network plays."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .descent import ema_update, release_decay_at
from .recipe import LORA_TARGETS

ROLES = ("student", "target", "release")


def lora_start(seed: int, layer: str, shape: tuple[int, ...]) -> Tensor:
    """The down matrix [rank, ...] with which the LoRA of a layer begins; the up matrix begins at zero.

    Uniform within 1/sqrt(inputs), as torch's own layers; a function of the seed and the layer's (diffusers') name.
    """
    key = hashlib.sha256(f"{seed} {layer}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "big") % 2**63)
    bound = 1 / math.sqrt(math.prod(shape[1:]))
    uniform: Tensor = torch.rand(shape, generator=generator)
    return (2 * uniform - 1) * bound


def is_lora_target(layer: str) -> bool:
    """Whether a layer, by diffusers' name, is one of LORA_TARGETS."""
    return any(layer == target or layer.endswith(f".{target}") for target in LORA_TARGETS)


class LoraAdapters:
    """The LoRAs of one network: the student's, which learns, its average the target, and a slower one, the release.

    weights: role -> {"<layer>.lora_A.weight" or "<layer>.lora_B.weight": fp32}; alpha is the rank. While `attached`,
    the network is that of `role`, "teacher" being the network without any. A finish has two more, and no release: the
    fake network's, which learns too, and "start", the student that it began with.
    """

    def __init__(self, layers: Mapping[str, nn.Module], rank: int, seed: int, device: torch.device | str = "cpu"):
        """layers: linear and 2D convolutional ones by their diffusers' names."""
        self.layers, self.rank, self.role, self.seed = dict(layers), rank, "student", seed
        start = self._start(seed)
        # The release average is asked for at the end alone, and waits in main memory.
        self.weights = {
            role: {key: weight.to("cpu" if role == "release" else device, copy=True) for key, weight in start.items()}
            for role in ROLES
        }
        for weight in self.weights["student"].values():
            weight.requires_grad_(True)

    def _start(self, seed: int) -> dict[str, Tensor]:
        """A LoRA that changes nothing, on the CPU."""
        start: dict[str, Tensor] = {}
        for name, layer in self.layers.items():
            down, up = _shapes(layer, self.rank)
            start[f"{name}.lora_A.weight"] = lora_start(seed, name, down)
            start[f"{name}.lora_B.weight"] = torch.zeros(up)
        return start

    def trainable(self, role: str = "student") -> list[Tensor]:
        return list(self.weights[role].values())

    @torch.no_grad()
    def begin_finish(self, release: bool, anchored: bool) -> None:
        """Student and target go on from the release average, or else the target; the fake LoRA changes nothing.

        anchored: "start" is kept, too.
        """
        better = self.weights["release" if release else "target"]
        for role in ("target", "student"):
            for key, weight in self.weights[role].items():
                weight.copy_(better[key])
        del self.weights["release"]
        like = self.weights["target"]
        self.weights["fake"] = {
            key: weight.to(like[key].device).requires_grad_(True) for key, weight in self._start(self.seed + 1).items()
        }
        if anchored:
            self.weights["start"] = {key: weight.clone() for key, weight in like.items()}

    @torch.no_grad()
    def load(self, role: str, weights: Mapping[str, Tensor]) -> None:
        """Raises ValueError for weights of other layers, or of another rank."""
        own = self.weights[role]
        different = sorted(own.keys() ^ weights.keys()) or [k for k in own if own[k].shape != weights[k].shape]
        if different:
            raise ValueError(f"{len(different)} weights of the LoRA differ, the first {different[0]}")
        for key, weight in own.items():
            weight.copy_(weights[key])

    def update_averages(self, step: int, decay: float, release_decay: float) -> None:
        """The target after every step (from 1), and the release average where `release_decay_at` says so."""
        student = self.weights["student"].values()
        ema_update(self.weights["target"].values(), student, decay)
        slower = release_decay_at(step, release_decay) if release_decay else None
        if slower is not None:
            ema_update(self.weights["release"].values(), student, slower)

    @contextlib.contextmanager
    def use(self, role: str) -> Iterator[None]:
        """The network is of this role meanwhile, and the student's again after it."""
        self.role = role
        try:
            yield
        finally:  # a checkpointed backward pass runs the student again
            self.role = "student"

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        """The layers compute with the adapters meanwhile; after it they are what they were."""
        handles = [layer.register_forward_hook(partial(self._add, name)) for name, layer in self.layers.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.role == "teacher":
            return None
        x, weights = inputs[0], self.weights[self.role]
        down, up = (weights[f"{name}.{part}.weight"].to(x.device, x.dtype) for part in ("lora_A", "lora_B"))
        if isinstance(layer, nn.Conv2d):
            padding: Any = layer.padding
            return output + F.conv2d(F.conv2d(x, down, None, layer.stride, padding, layer.dilation), up)
        return output + F.linear(F.linear(x, down), up)


def _shapes(layer: nn.Module, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if isinstance(layer, nn.Conv2d):
        return (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    if isinstance(layer, nn.Linear):
        return (rank, layer.in_features), (layer.out_features, rank)
    raise ValueError(f"a LoRA is of linear and 2D convolutional layers, got {type(layer).__name__}.")
