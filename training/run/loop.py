"""The training loop: Algorithm 1 of the paper on accelerate, and a finish, as a generator of what happened."""

from __future__ import annotations

import contextlib
import gc
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn.utils import clip_grad_norm_

from splam_core import LossWatch, Objective, learning_rate_share

from ..data import TrainingData
from ..data.base import Share
from ..data.paths import PathData
from ..data.phase import make_data
from ..models.pipeline import DTYPES, Pipeline
from .checkpoints import (
    RandomState,
    Stateful,
    find_checkpoint,
    latest_checkpoint,
    load_objects,
    read_checkpoint,
    rotate,
    write_checkpoint,
)
from .config import FINISH_SETTINGS, Config
from .consistency import KeptPaths, first_stage, plain_attention
from .finishing import Stage, finish_of
from .identity import changes, check_weights, weights_digest
from .networks import FullNetworks, LoraNetworks, RoleState, base_dtype, update_averages
from .optimizers import build_optimizer
from .processes import from_main
from .sharding import OptimizerState, sharding_mesh
from .sources import load_student, teacher_loras_digest
from .stopping import StoppedError, StopRequest
from .validation import Score, Validation

SKIPPED_IN_A_ROW = 20  # steps without a finite gradient after which a run stops


@dataclass
class Progress:
    """What one optimizer step did; `seconds` are of this step alone."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    images: int
    unet_forwards: int
    skipped: int  # steps of the run so far whose gradient was not finite, and which moved nothing
    seconds: float
    fake_loss: float | None = None  # of a finish's second network, the mean of its updates


class Distillation:
    """The networks, data and optimizers of one run, and the step that moves them.

    A stage gives a batch's losses by role, in the order of the updates that make one step.
    """

    def __init__(
        self,
        config: Config,
        pipeline: Pipeline,
        accelerator: Accelerator,
        data: TrainingData | None = None,
        objective: Objective | None = None,
        teacher: Any = None,
    ) -> None:
        """data, objective: None, those that `config` names. teacher: a UNet that is asked in the pipeline's place."""
        self.config, self.pipeline, self.accelerator = config, pipeline, accelerator
        mesh = sharding_mesh(config, accelerator)
        whole = config.train_batch_size * accelerator.num_processes
        negative = pipeline.unconditional()
        if data is None and config.paths is not None:
            data = PathData(config.paths, pipeline, config.data_options, whole, config.seed + 1)
            pipeline.encoders_to("cpu")
        elif data is None:  # made before there are networks; then the encoders leave
            data = make_data(
                config.data,
                pipeline,
                config.data_options,
                whole,
                config.seed + 1,
                whole * config.gradient_accumulation_steps * config.total_steps,
                config.validation_samples,
                Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
                DTYPES[config.teacher_dtype],
            )
        self.data = data
        # A LoRA is one on the teacher as it is computed with; whole weights begin as the teacher's own.
        dtype = base_dtype(config) if config.lora else torch.float32
        self.teacher_hash = weights_digest(pipeline.unet.state_dict(), dtype)
        self.teacher_loras = teacher_loras_digest(config)
        begun = load_student(config, pipeline)
        self.student_hash = weights_digest(begun, torch.float32) if begun else None
        self.networks = (
            LoraNetworks(pipeline, config, begun) if config.lora else FullNetworks(pipeline, config, mesh, begun)
        )
        del begun
        optimizer = build_optimizer(
            config.optimizer,
            self.networks.trainable(),
            config.learning_rate,
            config.weight_decay,
            (config.adam_beta1, config.adam_beta2),
            config.adam_epsilon,
        )
        if self.networks.sharded:
            optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            self.networks.student, optimizer = accelerator.prepare(self.networks.student, optimizer)
        self.optimizers = {"student": optimizer}
        asked = pipeline if teacher is None else replace(pipeline, unet=teacher)
        self.stage: Stage = first_stage(config, asked, negative, self.networks, objective)
        self.watches = {"student": LossWatch()}
        self.objects = self._objects()
        self.finishing = False
        self.turns: list[Iterator[tuple[str, Tensor]]] = []  # what a step's batches have yet to give
        self.role = "student"  # whose gradient is at hand
        self.validation: Validation | None = None
        self.step, self.samples = 0, 0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.best: dict | None = None  # step and scores of the best validation
        if config.compile:
            self.networks.compile()

    def _objects(self) -> dict[str, Stateful]:
        """What a checkpoint holds in this stage."""
        objects: dict[str, Stateful] = {role: RoleState(self.networks, role) for role in self.networks.roles}
        for role, optimizer in self.optimizers.items():
            mark = "" if role == "student" else f"{role}-"
            parameters = self.networks.trainable(role)
            objects[f"{mark}optimizer"] = OptimizerState(optimizer, parameters, self.networks.sharded)
            objects[f"{mark}watch"] = self.watches[role]
        objects["random"] = RandomState()
        if getattr(self.accelerator, "scaler", None):
            objects["scaler"] = self.accelerator.scaler
        return objects

    def begin_finish(self) -> None:
        """From the method to its finish: other losses, a second network that learns, and optimizers that begin anew."""
        config = self.config
        self.networks.begin_finish()
        betas = config.finish_betas
        own = self.optimizers["student"]
        own.optimizer.state.clear()
        for group in own.param_groups:
            if "betas" in group:
                group["betas"] = betas
        fake = build_optimizer(
            config.optimizer,
            self.networks.trainable("fake"),
            config.fake_learning_rate,
            config.weight_decay,
            betas,
            config.adam_epsilon,
        )
        self.optimizers["fake"] = self.accelerator.prepare_optimizer(fake)
        self.watches = {"student": LossWatch(), "fake": LossWatch()}
        self.stage = finish_of(self.stage)
        self.data.latents_alone()
        self.objects, self.finishing = self._objects(), True

    def train(self, stop: StopRequest | None = None) -> Iterator[Progress]:
        """Steps up to total_steps: Algorithm 1, then its finish.

        Raises FloatingPointError, naming the last checkpoint, for a loss not finite or one that explodes and for
        SKIPPED_IN_A_ROW gradients that are not finite, CheckpointError for a checkpoint that cannot be written, and
        StoppedError, after a checkpoint, when any process has been asked to stop.
        """
        config = self.config
        if isinstance(self.stage, KeptPaths) and config.finish == "none":
            self._let_teacher_go()
        while self.step < config.total_steps:
            if self.step >= config.max_train_steps and not self.finishing:
                self.begin_finish()
            since = time.perf_counter()
            losses: dict[str, list[float]] = {role: [] for role in self.optimizers}
            rates, norms, finite, stopping = {}, {}, True, False
            while (part := self._backward()) is not None:
                role = self.role
                loss, asked = self._agree(part, stop)
                losses[role].append(loss)
                stopping = stopping or asked
                self._check(self.watches[role].fault(loss), _named(role, "loss"))
                rates[role] = self._learning_rate(role)
                norms[role] = self._clip(role)
                moved = self._descend(role, rates[role], norms[role])
                if moved and role == "student":
                    decays = config.ema_decay, config.release_decay
                    if self.finishing:
                        decays = config.finish_ema_decay, 0.0
                    update_averages(self.networks, self.step + 1, *decays)
                finite = finite and moved
            self._count(finite)
            drawn = range(self.samples, self.samples + self._whole)
            self.step += 1
            self.samples = drawn.stop
            yield Progress(
                step=self.step,
                loss=losses["student"][0],
                gradient_norm=norms["student"],
                learning_rate=rates["student"],
                images=len(drawn),
                unet_forwards=self.stage.forwards(drawn),
                skipped=self.skipped,
                seconds=time.perf_counter() - since,
                fake_loss=sum(losses["fake"]) / len(losses["fake"]) if self.finishing else None,
            )
            last = self.step == config.total_steps
            between = self.step == config.max_train_steps
            # After the caller has logged the step, so that a log never lacks a step that its checkpoint has.
            if self.step % config.checkpointing_steps == 0 or last or between or stopping:
                folder = self.save()
            if stopping and not last:
                raise StoppedError(
                    f"stopped at step {self.step}. Go on with --resume-from-checkpoint latest ({folder})."
                )

    def _let_teacher_go(self) -> None:
        """After what it is asked besides the loss: the ends of its paths from held-out samples."""
        if self.config.validation_samples and (self.networks.sharded or self.accelerator.is_main_process):
            self.validation = Validation(self.config, self.pipeline, self.networks, self.data)
        self.networks.let_teacher_go(self.pipeline)

    @property
    def _whole(self) -> int:
        """Samples of a step, of all processes."""
        config = self.config
        return config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes

    def losses(self, indices: range) -> Iterator[tuple[str, Tensor]]:
        """What the stage gives for the samples of these indices: each role that learns and its loss []."""
        stage = self.stage.losses(*self.data.batch(indices), indices)
        while True:
            with self.accelerator.autocast(), plain_attention(self.accelerator.device):  # but not while others run
                pair = next(stage, None)
            if pair is None:
                return
            yield pair

    def _backward(self) -> Tensor | None:
        """The gradient of one update, from --gradient-accumulation-steps batches; the loss [] of this process.

        None where the step has no further one. Batch j of process p is the samples from first + (j*processes + p)*batch
        on: more processes, more accumulation or a larger batch see the same samples.
        """
        config, accelerator = self.config, self.accelerator
        batch, many = config.train_batch_size, config.gradient_accumulation_steps
        if not self.turns:
            first = [
                self.samples + (turn * accelerator.num_processes + accelerator.process_index) * batch
                for turn in range(many)
            ]
            self.turns = [self.losses(range(start, start + batch)) for start in first]
        total = torch.zeros((), device=accelerator.device)
        for turn, batches in enumerate(self.turns):
            # Sharded gradients are summed as shards: waiting for the last batch would take them whole.
            together = turn + 1 == many or self.networks.sharded
            with contextlib.nullcontext() if together else accelerator.no_sync(self.networks.student):
                pair = next(batches, None)
                if pair is None:
                    self.turns = []
                    return None
                self.role, loss = pair
                part = loss / many if many > 1 else loss
                # A checkpointed backward pass runs forward again and must pick the same attention.
                with plain_attention(accelerator.device), self.networks.learning(self.role):
                    accelerator.backward(part)
                total += part.detach()
                del pair, loss, part
        if self.role != "student" and not self.networks.sharded and accelerator.num_processes > 1:
            for parameter in self.networks.trainable(self.role):  # only the student is wrapped to do so by itself
                parameter.grad = accelerator.reduce(parameter.grad, "mean")
        return total

    def _agree(self, loss: Tensor, stop: StopRequest | None) -> tuple[float, bool]:
        """The mean loss of the processes, and whether any of them has been asked to stop: a step's first wait."""
        asked = torch.full_like(loss, float(bool(stop)))
        mean, stopping = self.accelerator.reduce(torch.stack([loss, asked]), "mean").tolist()
        return mean, stopping > 0

    def _clip(self, role: str) -> float:
        """Clip the gradient to --max-grad-norm; its norm before that, the same on every process: the second wait."""
        # Accelerate clips only what it has sharded itself.
        clip = clip_grad_norm_ if self.networks.sharded else self.accelerator.clip_grad_norm_
        norm = clip(self.networks.trainable(role), self.config.max_grad_norm)
        return float(norm.full_tensor() if self.networks.sharded else norm)

    def _descend(self, role: str, rate: float, norm: float) -> bool:
        """Step along the gradient, unless it is not finite; whether it was."""
        finite, optimizer = math.isfinite(norm), self.optimizers[role]
        for group in optimizer.param_groups:
            group["lr"] = rate
        if finite or "scaler" in self.objects:  # a scaler skips by itself, and lowers its scale
            optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return finite

    def _count(self, finite: bool) -> None:
        """Of steps whose gradients are not all finite. Raises FloatingPointError for too many in a row."""
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            self._check(f"has not been finite for {SKIPPED_IN_A_ROW} steps", "the gradient")

    def _check(self, fault: str | None, what: str) -> None:
        """Raises FloatingPointError for a fault. It is the same on every process."""
        if fault is None:
            return
        half = self.config.mixed_precision == "fp16"
        rates = "--finish-learning-rate and --fake-learning-rate" if self.finishing else "--learning-rate"
        cure = f"Lower {rates}" + (", or take --mixed-precision bf16 or no" if half else "")
        if self.step == 0 and self.skipped == 0:
            cure = "No step has been made yet: it comes of the teacher or the data"
        raise FloatingPointError(
            f"{what} {fault} at step {self.step + 1}. {cure}; the last good checkpoint is "
            f"{latest_checkpoint(self.config.output_dir) or 'not there yet'}."
        )

    def _learning_rate(self, role: str) -> float:
        config = self.config
        if self.finishing:
            rate = config.finish_learning_rate if role == "student" else config.fake_learning_rate
            done = self.step - config.max_train_steps
            return rate * learning_rate_share("constant", done, config.finish_steps, config.finish_warmup_steps)
        share = learning_rate_share(config.lr_scheduler, self.step, config.max_train_steps, config.lr_warmup_steps)
        return config.learning_rate * share

    def validate(self) -> dict[str, Score]:
        """Scores of the target and, where there is one, of the release average; keeps `best/` of the lowest loss.

        Not of a finish's, which does not seek the end of the teacher's path that the score measures.
        For the main process, and with sharded networks for all of them at once.
        """
        if self.validation is None:
            self.validation = Validation(self.config, self.pipeline, self.networks, self.data)
        with self.accelerator.autocast():
            scores = {role: self.validation(role) for role in ("target", "release") if role in self.networks.roles}
        if self.networks.sharded:  # rounding must not make processes disagree on which is best
            (scores,) = broadcast_object_list([scores])
        role = min(scores, key=lambda one: scores[one].loss)
        if not self.finishing and (self.best is None or scores[role].loss < self.best["loss"]):
            self.best = {"step": self.step, "role": role, "loss": scores[role].loss}
            self._write(self.config.output_dir / "best", {"student": self.objects[role]}, self.best)
        return scores

    def _write(self, folder: Path, objects: dict[str, Stateful], facts: dict) -> None:
        """By the main process; with sharded networks all must call it."""
        states = {name: one.state_dict() for name, one in objects.items()}
        if not self.accelerator.is_main_process:
            return
        write_checkpoint(folder, states, {**facts, "config": self.config.settings()})

    def save(self) -> Path:
        """OUTPUT_DIR/checkpoint-STEP, which appears under its name only when it is whole; old ones go."""
        config, accelerator = self.config, self.accelerator
        folder = config.output_dir / f"checkpoint-{self.step}"
        facts = {
            "step": self.step,
            "samples": self.samples,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "best": self.best,
            "processes": accelerator.num_processes,
            "teacher_hash": self.teacher_hash,
            "teacher_loras": self.teacher_loras,
            "student_hash": self.student_hash,
            "finishing": self.finishing,
        }
        self._write(folder, self.objects, facts)
        if accelerator.is_main_process:
            rotate(config.output_dir, config.checkpoints_total_limit)
        accelerator.wait_for_everyone()
        return folder

    def free(self) -> None:
        """Let go of the networks and the optimizer: what is left is to write the result."""
        self.accelerator.free_memory()
        self.networks = self.optimizers = self.validation = self.stage = self.objects = None
        self.turns = []
        self.pipeline.unet = None
        gc.collect()

    def resume(self, wanted: str) -> tuple[Path | None, list[str]]:
        """Take up a checkpoint: a folder, or "latest". (Its folder, None if there is none yet; what has changed since.)

        Raises ValueError for one of another run: other settings than may change, another teacher's weights.
        """
        config = self.config
        folder, damaged = from_main(self.accelerator, lambda: find_checkpoint(config.output_dir, wanted))
        for one in damaged:
            self.accelerator.print(one)
        if folder is None:
            return None, []
        # What is copied to a device or into shards may stay on the disk till then.
        copied = self.networks.sharded or self.pipeline.device.type != "cpu"
        states, facts = read_checkpoint(folder, mmap=copied)
        try:
            finishing = facts.get("finishing", False)
            free = frozenset(vars(config.data_options)) | (frozenset() if finishing else FINISH_SETTINGS)
            found = changes(config.settings(), facts["config"], free)
            begun = facts["config"]["max_train_steps"] if finishing else config.max_train_steps
            if begun != config.max_train_steps or (config.finish != "none" and facts["step"] > begun and not finishing):
                raise ValueError(
                    f"--max-train-steps is {config.max_train_steps}, and its finish "
                    f"{f'began at step {begun}' if finishing else 'cannot begin before step ' + str(facts['step'])}: "
                    "give that"
                )
            check_weights(config, facts, self.teacher_hash, self.teacher_loras, self.student_hash)
            if finishing:
                self.begin_finish()
            load_objects(self.objects, states, optional=("scaler",))
            self.step, self.samples = facts["step"], facts["samples"]
            self.skipped, self.skipped_in_a_row = facts["skipped"], facts["skipped_in_a_row"]
            self.best = facts["best"] if (config.output_dir / "best").is_dir() else None
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not fit this run: {str(error).splitlines()[0]}") from error
        return folder, found


def _named(role: str, what: str) -> str:
    return f"the {what}" if role == "student" else f"the {role} network's {what}"
