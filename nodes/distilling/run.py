"""One distillation on the host's UNet: Algorithm 1, its finish, its state, and how far the student is from the end."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import torch
from torch.nn.utils import clip_grad_norm_

from ...splam_core.denoiser import Network
from ...splam_core.descent import LossWatch, learning_rate_share
from ...splam_core.finish import Finish
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
    finish: Finish | None  # what follows the steps of the method
    steps: int
    rank: int
    batch_size: int
    accumulation: int
    learning_rate: float
    seed: int


class Run:
    """The adapters, the optimizers and the samples of one run, and the step that moves them."""

    def __init__(self, host: HostUNet, samples: Samples, settings: Settings):
        self.host, self.samples, self.settings = host, samples, settings
        self.adapters = LoraAdapters(host.layers(), settings.rank, settings.seed, host.device)
        self.optimizers = {"student": self._optimizer("student", settings.learning_rate, (0.9, 0.999))}
        # Only fp16 needs its gradients scaled.
        self.scalers = {"student": self._scaler()}
        self.objective = settings.recipe.objective(host.schedule, host.prediction_type)
        self.watches, self.losses, self.step, self.skipped = {"student": LossWatch()}, list[float](), 0, 0
        self.begun: int | None = None  # the step at which the finish began
        self.fake_losses: list[float] = []  # of the finish's second network, the mean of a step

    def _optimizer(self, role: str, rate: float, betas: tuple[float, float]) -> torch.optim.AdamW:
        fused = True if self.host.device.type == "cuda" else None
        return torch.optim.AdamW(self.adapters.trainable(role), rate, betas, weight_decay=0.0, fused=fused)

    def _scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.host.device.type, enabled=self.host.autocast == torch.float16)

    @property
    def last_step(self) -> int:
        """Of the run as far as it is known: the method may have gone beyond `steps` before."""
        finish = self.settings.finish
        if finish is None:
            return self.settings.steps
        return finish.finish_steps + (max(self.settings.steps, self.step) if self.begun is None else self.begun)

    @property
    def is_done(self) -> bool:
        return self.step >= self.last_step

    @property
    def finishing(self) -> bool:
        return self.begun is not None

    @property
    def method_is_done(self) -> bool:
        """The finish is what comes next."""
        return self.settings.finish is not None and not self.finishing and self.step >= self.settings.steps

    def begin_finish(self) -> None:
        """From the method to its finish: other losses, a second LoRA that learns, and optimizers that begin anew."""
        finish = self.settings.finish
        assert finish is not None
        self.adapters.begin_finish(self.settings.recipe.release_decay > 0, finish.finish_anchor > 0)
        rates = {"student": finish.finish_learning_rate, "fake": finish.fake_learning_rate}
        self.optimizers = {role: self._optimizer(role, rate, finish.finish_betas) for role, rate in rates.items()}
        self.scalers = {role: self._scaler() for role in rates}
        self.watches = {role: LossWatch() for role in rates}
        self.matching = finish.matching(self.objective.denoiser)
        self.begun = self.step

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
        """One step, the student's loss. The UNet is loaded and differentiable, and what is to be drawn has been drawn.

        Raises FloatingPointError for a loss that is not finite or explodes. Whatever it raises, what was learned in the
        steps before it stays as it was.
        """
        settings, recipe = self.settings, self.settings.recipe
        if self.method_is_done:
            self.begin_finish()
        whole = self.next_indices()
        firsts = range(whole.start, whole.stop, settings.batch_size)
        batches = [self._losses(range(start, start + settings.batch_size)) for start in firsts]
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)
        watches = {role: watch.state_dict() for role, watch in self.watches.items()}
        losses: dict[str, list[float]] = {role: [] for role in self.optimizers}
        kept: dict[str, torch.Tensor] = {}
        finite = True
        try:
            while (update := self._backward(batches)) is not None:
                role, loss = update
                losses[role].append(loss)
                self._check(self.watches[role].fault(loss))
                if role != "student":  # which moves when nothing more can stop the step: no loss of it looks there
                    if not kept and len(losses[role]) < self._updates:
                        kept = {key: value.to("cpu", copy=True) for key, value in self._moving(role).items()}
                    finite = self._descend(role) and finite
            finite = (moved := self._descend("student")) and finite
        except BaseException:
            for role, watch in watches.items():
                self.watches[role].load_state_dict(watch)
            for optimizer in self.optimizers.values():
                optimizer.zero_grad(set_to_none=True)
            if kept:
                self._put_back("fake", kept)
            raise
        if moved:
            decays = (recipe.ema_decay, recipe.release_decay)
            if self.finishing and settings.finish:
                decays = (settings.finish.finish_ema_decay, 0.0)
            self.adapters.update_averages(self.step + 1, *decays)
        self.step += 1
        self.losses.append(losses["student"][0])
        if self.finishing:
            self.fake_losses.append(sum(losses["fake"]) / len(losses["fake"]))
        self._count(finite)
        return losses["student"][0]

    @property
    def _updates(self) -> int:
        """Of the fake network, a step of the finish."""
        return self.settings.finish.fake_updates if self.settings.finish else 0

    def _backward(self, batches: list[Iterator[tuple[str, torch.Tensor]]]) -> tuple[str, float] | None:
        """(role, loss) of one update, whose gradient is at hand then; None where the step has no further one."""
        total, role = 0.0, ""
        for batch in batches:
            found = next(batch, None)
            if found is None:
                return None
            role, loss = found[0], found[1] / len(batches)
            with self.adapters.use(role):  # a checkpointed backward pass runs the UNet again
                self.scalers[role].scale(loss).backward()
            total += loss.item()
            del found, loss
            comfy.model_management.throw_exception_if_processing_interrupted()
        return role, total

    def _losses(self, indices: range) -> Iterator[tuple[str, torch.Tensor]]:
        """Each role that learns and its loss [], in the order of the updates."""
        recipe, finish, host, samples = self.settings.recipe, self.settings.finish, self.host, self.samples
        numbers = samples.numbers(indices)
        told = samples.told_of(numbers)
        scale = recipe.guidance_scale
        if finish and self.finishing and finish.finish_guidance_scale is not None:
            scale = finish.finish_guidance_scale
        teacher = host.guided_epsilon(told, samples.nothing, scale)

        def as_teacher(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            with self.adapters.use("teacher"):
                return teacher(x, t)

        def net(role: str, rows: torch.Tensor | None) -> Network:
            return self._net(role, told if rows is None else [told[row] for row in rows.tolist()])

        if finish and self.finishing:
            yield from finish.finish_losses(
                self.matching, net, as_teacher, samples.size(numbers[0]), self.settings.seed, indices, host.device
            )
            return
        yield "student", recipe.loss(
            self.objective, net("student", None), net("target", None), as_teacher, samples.latents(numbers),
            self.settings.seed, indices,
        )  # fmt: skip

    def _net(self, role: str, told: list[Told]) -> Network:
        def net(x: torch.Tensor, t: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
            with self.adapters.use(role):
                return self.host(x, t, told)

        return net

    def _learning_rate(self, role: str) -> float:
        settings, finish = self.settings, self.settings.finish
        if self.begun is not None and finish:
            rate = finish.finish_learning_rate if role == "student" else finish.fake_learning_rate
            done = self.step - self.begun
            return rate * learning_rate_share("constant", done, finish.finish_steps, finish.finish_warmup_steps)
        share = learning_rate_share(LR_SCHEDULE, self.step, settings.steps, min(WARMUP, max(1, settings.steps // 10)))
        return settings.learning_rate * share

    def _descend(self, role: str) -> bool:
        """Step along the gradient, unless it is not finite; whether it was."""
        optimizer, scaler = self.optimizers[role], self.scalers[role]
        for group in optimizer.param_groups:
            group["lr"] = self._learning_rate(role)
        scaler.unscale_(optimizer)
        norm = float(clip_grad_norm_(self.adapters.trainable(role), MAX_GRAD_NORM))
        finite = math.isfinite(norm)
        if finite or scaler.is_enabled():
            scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return finite

    def _count(self, finite: bool) -> None:
        """Of steps whose gradients are not all finite. Raises FloatingPointError for too many in a row."""
        self.skipped = 0 if finite else self.skipped + 1
        if self.skipped >= SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"{NAME}: the gradient has not been finite for {SKIPPED_IN_A_ROW} steps, up to step {self.step}. "
                "Lower learning_rate; what was learned up to the last autosave is kept."
            )

    def _check(self, fault: str | None) -> None:
        """Raises FloatingPointError for a fault of a loss."""
        if fault is not None:
            raise FloatingPointError(
                f"{NAME}: the loss {fault} at step {self.step + 1}. Lower learning_rate; what was learned up to the "
                "last autosave is kept."
            )

    def endpoint_errors(self, roles: tuple[str, ...]) -> dict[str, float]:
        """By role, the endpoint error on held-out samples. The UNet is loaded and differentiable, all is drawn."""
        latents, told = self.samples.latents(self.judged), self.samples.told_of(self.judged)
        scale = self.settings.recipe.guidance_scale
        with self.adapters.use("teacher"):
            ends = teacher_ends(self.host, told, self.samples.nothing, scale, latents, self.settings.seed)
        errors = {}
        for role in roles:
            with self.adapters.use(role):
                errors[role] = endpoint_error(self.host, self.objective.denoiser, told, ends)
        return errors

    def _moving(self, role: str) -> dict[str, torch.Tensor]:
        """A LoRA that learns, and its optimizer's state."""
        found = {f"{role}:{key}": weight for key, weight in self.adapters.weights[role].items()}
        for key, parameter in self.adapters.weights[role].items():
            for name, value in self.optimizers[role].state.get(parameter, {}).items():
                found[f"{_mark(role)}optimizer.{name}:{key}"] = value
        return {key: value.detach() for key, value in found.items()}

    def _put_back(self, role: str, state: Mapping[str, torch.Tensor]) -> None:
        """What `_moving` gave. Raises ValueError for the state of other adapters."""
        optimizer, prefix = self.optimizers[role], f"{role}:"
        weights = {key[len(prefix) :]: one for key, one in state.items() if key.startswith(prefix)}
        self.adapters.load(role, weights)
        for key, parameter in self.adapters.weights[role].items():
            names = ("step", "exp_avg", "exp_avg_sq")
            keys = {name: f"{_mark(role)}optimizer.{name}:{key}" for name in names}
            optimizer.state.pop(parameter, None)
            if all(key in state for key in keys.values()):
                place = {name: "cpu" if name == "step" and not optimizer.defaults["fused"] else parameter.device
                         for name in names}  # fmt: skip
                # Copied: Windows replaces no file from which tensors are mapped, and autosaves replace this one.
                moments = {name: state[key].to(place[name], copy=True) for name, key in keys.items()}
                optimizer.state[parameter] = moments

    def state(self) -> dict[str, torch.Tensor]:
        """All that moves in a run, as tensors."""
        found = {f"{role}:{key}": w for role, weights in self.adapters.weights.items() for key, w in weights.items()}
        for role in self.optimizers:
            found |= self._moving(role)
        return {key: value.detach() for key, value in found.items()}

    def facts(self) -> dict[str, Any]:
        """The rest of the state, as JSON; losses are those of all steps."""
        facts = {"step": self.step, "losses": self.losses, "skipped": self.skipped}
        facts["watch"] = self.watches["student"].state_dict()
        facts["scalers"] = {role: scaler.state_dict() for role, scaler in self.scalers.items() if scaler.is_enabled()}
        if self.finishing:
            facts |= {"begun": self.begun, "fake_losses": self.fake_losses}
            facts["fake_watch"] = self.watches["fake"].state_dict()
        return facts

    def load_state(self, state: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
        """Raises ValueError or KeyError for the state of another kind of run."""
        if "begun" in facts:
            self.begin_finish()
            self.begun, self.fake_losses = facts["begun"], list(facts["fake_losses"])
            self.watches["fake"].load_state_dict(facts["fake_watch"])
        for role in self.adapters.weights:
            prefix = f"{role}:"
            weights = {key[len(prefix) :]: w for key, w in state.items() if key.startswith(prefix)}
            self.adapters.load(role, weights)
        for role in self.optimizers:
            self._put_back(role, state)
        self.step, self.losses, self.skipped = facts["step"], list(facts["losses"]), facts["skipped"]
        self.watches["student"].load_state_dict(facts["watch"])
        for role, scale in facts.get("scalers", {}).items():  # older files have none: the scale begins anew
            self.scalers[role].load_state_dict(scale)

    def identity(self, *more: object) -> str:
        """Equal for runs of which one can go on from the other's state: `steps` and the finish may differ."""
        left = ("steps", "recipe", "finish")
        settings = {key: value for key, value in vars(self.settings).items() if key not in left}
        return digest(vars(self.settings.recipe), settings, self.samples.count, self.host.fingerprint(), *more)

    def finish_identity(self, method: str) -> str | None:
        """The same within a finish, after the method's steps; None without one."""
        finish = self.settings.finish
        if finish is None:
            return None
        settings = {key: value for key, value in vars(finish).items() if key != "finish_steps"}
        return digest(method, self.settings.steps, settings)


def _mark(role: str) -> str:
    return "" if role == "student" else f"{role}-"
