"""A network that learns: its optimizer, its rate, and a watch over its loss."""

from __future__ import annotations

from typing import Any

from accelerate import Accelerator
from torch.nn.utils import clip_grad_norm_

from splam_core import LossWatch, learning_rate_share

from .checkpoints import Stateful
from .config import Config
from .networks import Networks
from .sharding import OptimizerState


class Learner:
    """A role that learns. What it does between a backward pass and the averages, every process does alike."""

    def __init__(self, role: str, networks: Networks, optimizer: Any, accelerator: Accelerator) -> None:
        """optimizer: as accelerate has prepared it."""
        self.role, self.networks, self.optimizer, self.accelerator = role, networks, optimizer, accelerator
        self.watch = LossWatch()

    def average_gradient(self) -> None:
        """Over processes, where nothing has done so yet: only the student is wrapped to do so by itself."""
        if self.role == "student" or self.networks.sharded or self.accelerator.num_processes == 1:
            return
        for parameter in self.networks.trainable(self.role):
            parameter.grad = self.accelerator.reduce(parameter.grad, "mean")

    def clip(self, max_norm: float) -> float:
        """Clip the gradient; its norm before that, the same on every process, which is waited for."""
        # Accelerate clips only what it has sharded itself.
        clip = clip_grad_norm_ if self.networks.sharded else self.accelerator.clip_grad_norm_
        norm = clip(self.networks.trainable(self.role), max_norm)
        return float(norm.full_tensor() if self.networks.sharded else norm)

    def descend(self, rate: float, finite: bool) -> None:
        """Step along the gradient, unless it is not finite, and forget it."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if finite or getattr(self.accelerator, "scaler", None):  # a scaler skips by itself, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def begin_anew(self, betas: tuple[float, float]) -> None:
        """With other losses to come: nothing is remembered of those so far."""
        self.watch = LossWatch()
        self.optimizer.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            if "betas" in group:
                group["betas"] = betas

    def objects(self) -> dict[str, Stateful]:
        """What a checkpoint holds of it besides the weights."""
        mark = "" if self.role == "student" else f"{self.role}-"
        parameters = self.networks.trainable(self.role)
        return {
            f"{mark}optimizer": OptimizerState(self.optimizer, parameters, self.networks.sharded),
            f"{mark}watch": self.watch,
        }


def learning_rate(config: Config, role: str, step: int) -> float:
    """Of a role in the step after `step` others."""
    done = step - config.max_train_steps
    if done < 0:
        share = learning_rate_share(config.lr_scheduler, step, config.max_train_steps, config.lr_warmup_steps)
        return config.learning_rate * share
    rate = config.finish_learning_rate if role == "student" else config.fake_learning_rate
    return rate * learning_rate_share("constant", done, config.finish_steps, config.finish_warmup_steps)
