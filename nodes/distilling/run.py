"""One distillation on the host's UNet: Algorithm 1, its state, and how far the student is from the teacher."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch.nn.utils import clip_grad_norm_

from ...splam_core.denoiser import Network
from ...splam_core.descent import LossWatch, learning_rate_share
from ...splam_core.lora import LoraAdapters
from ...splam_core.order import digest
from ...splam_core.recipe import Recipe
from .host import NAME, HostUNet, Told
from .judging import endpoint_error, teacher_ends
from .samples import Samples

MAX_GRAD_NORM = 10.0  # these four as in training/distill.py
WARMUP = 50
LR_SCHEDULE = "cosine"
SKIPPED_IN_A_ROW = 20
JUDGED = 16  # held-out samples of the endpoint error


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the node's inputs say, beside the recipe."""

    recipe: Recipe
    steps: int
    rank: int
    batch_size: int
    accumulation: int
    learning_rate: float
    seed: int


class Run:
    """The adapters, the optimizer and the samples of one run, and the step that moves them."""

    def __init__(self, host: HostUNet, samples: Samples, settings: Settings):
        self.host, self.samples, self.settings = host, samples, settings
        self.adapters = LoraAdapters(host.layers(), settings.rank, settings.seed, host.device)
        fused = True if host.device.type == "cuda" else None
        parameters = self.adapters.trainable()
        self.optimizer = torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=0.0, fused=fused)
        # Only fp16 needs its gradients scaled.
        self.scaler = torch.amp.GradScaler(host.device.type, enabled=host.autocast == torch.float16)
        self.objective = settings.recipe.objective(host.schedule, host.prediction_type)
        self.watch, self.losses, self.step, self.skipped = LossWatch(), list[float](), 0, 0

    @property
    def is_done(self) -> bool:
        return self.step >= self.settings.steps

    @property
    def judged(self) -> list[int]:
        """Numbers of the samples that the endpoint error is of."""
        return self.samples.held[:JUDGED]

    def next_indices(self) -> range:
        """Of the samples of the next step; index 0 is the run's first."""
        whole = self.settings.batch_size * self.settings.accumulation
        return range(self.step * whole, (self.step + 1) * whole)

    @torch.enable_grad()
    def advance(self) -> float:
        """One optimizer step, its loss. The UNet is loaded and differentiable, and what is to be drawn has been drawn.

        Raises FloatingPointError for a loss that is not finite or explodes; what was learned before it stays.
        """
        settings, many = self.settings, self.settings.accumulation
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        indices = self.next_indices()
        for start in range(indices.start, indices.stop, settings.batch_size):
            loss = self._loss(range(start, start + settings.batch_size)) / many
            self.scaler.scale(loss).backward()
            total += loss.item()
            comfy.model_management.throw_exception_if_processing_interrupted()
        fault = self.watch.fault(total)
        if fault is not None:
            raise FloatingPointError(
                f"{NAME}: the loss {fault} at step {self.step + 1}. Lower learning_rate; what was learned up to the "
                "last autosave is kept."
            )
        self._descend()
        self.step += 1
        self.losses.append(total)
        recipe = settings.recipe
        self.adapters.update_averages(self.step, recipe.ema_decay, recipe.release_decay)
        return total

    def _loss(self, indices: range) -> torch.Tensor:
        recipe, host, samples = self.settings.recipe, self.host, self.samples
        latents, told = samples.batch(samples.numbers(indices))
        teacher = host.guided_epsilon(told, samples.nothing, recipe.guidance_scale)

        def as_teacher(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with self.adapters.use("teacher"):
                return teacher(x, t)

        return recipe.loss(
            self.objective, self._net("student", told), self._net("target", told), as_teacher, latents,
            self.settings.seed, indices,
        )  # fmt: skip

    def _net(self, role: str, told: list[Told]) -> Network:
        def net(x: torch.Tensor, t: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            with self.adapters.use(role):
                return self.host(x, t, told)

        return net

    def _descend(self) -> None:
        settings = self.settings
        share = learning_rate_share(LR_SCHEDULE, self.step, settings.steps, min(WARMUP, max(1, settings.steps // 10)))
        for group in self.optimizer.param_groups:
            group["lr"] = settings.learning_rate * share
        self.scaler.unscale_(self.optimizer)
        norm = float(clip_grad_norm_(self.adapters.trainable(), MAX_GRAD_NORM))
        finite = math.isfinite(norm)
        self.skipped = 0 if finite else self.skipped + 1
        if finite or self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.skipped >= SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{NAME}: the gradient has not been finite for {SKIPPED_IN_A_ROW} steps, up to step {self.step + 1}. "
                "Lower learning_rate; what was learned up to the last autosave is kept."
            )

    def endpoint_errors(self, roles: tuple[str, ...]) -> dict[str, float]:
        """By role, the endpoint error on held-out samples. The UNet is loaded and differentiable, all is drawn."""
        latents, told = self.samples.batch(self.judged)
        scale = self.settings.recipe.guidance_scale
        with self.adapters.use("teacher"):
            ends = teacher_ends(self.host, told, self.samples.nothing, scale, latents, self.settings.seed)
        errors = {}
        for role in roles:
            with self.adapters.use(role):
                errors[role] = endpoint_error(self.host, self.objective.denoiser, told, ends)
        return errors

    def state(self) -> dict[str, torch.Tensor]:
        """All that moves in a run, as tensors."""
        found = {f"{role}:{key}": w for role, weights in self.adapters.weights.items() for key, w in weights.items()}
        for key, parameter in self.adapters.weights["student"].items():
            for name, value in self.optimizer.state.get(parameter, {}).items():
                found[f"optimizer.{name}:{key}"] = value
        return {key: value.detach() for key, value in found.items()}

    def facts(self) -> dict[str, Any]:
        """The rest of the state, as JSON; losses are those of all steps."""
        return {"step": self.step, "losses": self.losses, "watch": self.watch.state_dict(), "skipped": self.skipped}

    def load_state(self, state: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Raises ValueError or KeyError for the state of another kind of run."""
        for role in self.adapters.weights:
            prefix = f"{role}:"
            weights = {key[len(prefix) :]: w for key, w in state.items() if key.startswith(prefix)}
            self.adapters.load(role, weights)
        for key, parameter in self.adapters.weights["student"].items():
            names = ("step", "exp_avg", "exp_avg_sq")
            keys = {name: f"optimizer.{name}:{key}" for name in names}
            if all(key in state for key in keys.values()):
                place = {name: "cpu" if name == "step" and not self.optimizer.defaults["fused"] else parameter.device
                         for name in names}  # fmt: skip
                self.optimizer.state[parameter] = {name: state[key].to(place[name]) for name, key in keys.items()}
        self.step, self.losses, self.skipped = facts["step"], list(facts["losses"]), facts["skipped"]
        self.watch.load_state_dict(facts["watch"])

    def identity(self, *more: object) -> str:
        """Equal for runs of which one can go on from the other's state: `steps` alone may differ."""
        settings = {key: value for key, value in vars(self.settings).items() if key not in ("steps", "recipe")}
        return digest(vars(self.settings.recipe), settings, self.samples.count, self.host.fingerprint(), *more)
