"""The training loop: Algorithm 1 of the paper on accelerate, as a generator of what happened."""

from __future__ import annotations

import contextlib
import gc
import math
import shutil
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
from ..data.phase import make_data
from ..models.pipeline import DTYPES, Pipeline
from .checkpoints import (
    RandomState,
    Stateful,
    latest_checkpoint,
    load_objects,
    read_checkpoint,
    rotate,
    write_checkpoint,
)
from .config import Config
from .consistency import Consistency, plain_attention
from .identity import changes, weights_digest
from .networks import ROLES, FullNetworks, LoraNetworks, RoleState, base_dtype, update_averages
from .optimizers import build_optimizer
from .sharding import OptimizerState, sharding_mesh
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


class Distillation:
    """The networks, data and optimizer of one run, and the step that moves them."""

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
        if data is None:  # made before there are networks; then the encoders leave
            data = make_data(
                config.data,
                pipeline,
                config.data_options,
                whole,
                config.seed + 1,
                whole * config.gradient_accumulation_steps * config.max_train_steps,
                config.validation_samples,
                Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
                DTYPES[config.teacher_dtype],
            )
        self.data = data
        # A LoRA is one on the teacher as it is computed with; whole weights begin as the teacher's own.
        dtype = base_dtype(config) if config.lora else torch.float32
        self.teacher_hash = weights_digest(pipeline.unet.state_dict(), dtype)
        self.networks = LoraNetworks(pipeline, config) if config.lora else FullNetworks(pipeline, config, mesh)
        optimizer = build_optimizer(
            config.optimizer,
            self.networks.trainable(),
            config.learning_rate,
            config.weight_decay,
            (config.adam_beta1, config.adam_beta2),
            config.adam_epsilon,
        )
        if self.networks.sharded:
            self.optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            self.networks.student, self.optimizer = accelerator.prepare(self.networks.student, optimizer)
        if objective is None:
            objective = config.objective(pipeline.schedule, pipeline.prediction_type)
        asked = pipeline if teacher is None else replace(pipeline, unet=teacher)
        self.stage = Consistency(config, asked, negative, self.networks, objective)
        self.watch = LossWatch()
        trained = [role for role in ROLES if role != "teacher" and self.networks.weights(role)]
        self.objects: dict[str, Stateful] = {
            **{role: RoleState(self.networks, role) for role in trained},
            "optimizer": OptimizerState(self.optimizer, self.networks.trainable(), self.networks.sharded),
            "random": RandomState(),
            "watch": self.watch,
        }
        if getattr(accelerator, "scaler", None):
            self.objects["scaler"] = accelerator.scaler
        self.validation: Validation | None = None
        self.step, self.samples = 0, 0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.best: dict | None = None  # step and scores of the best validation
        if config.compile:
            self.networks.compile()

    def train(self, stop: StopRequest | None = None) -> Iterator[Progress]:
        """Steps up to max_train_steps: Algorithm 1.

        Raises FloatingPointError, naming the last checkpoint, for a loss not finite or one that explodes and for
        SKIPPED_IN_A_ROW gradients that are not finite, CheckpointError for a checkpoint that cannot be written, and
        StoppedError, after a checkpoint, when any process has been asked to stop.
        """
        config = self.config
        whole = config.train_batch_size * config.gradient_accumulation_steps * self.accelerator.num_processes
        while self.step < config.max_train_steps:
            since = time.perf_counter()
            loss, stopping = self._agree(self._backward(), stop)
            self._check(self.watch.fault(loss), "the loss")
            rate = self._learning_rate(self.step)
            norm = self._clip()
            if self._descend(rate, norm):
                update_averages(self.networks, self.step + 1, config.ema_decay, config.release_decay)
            self.step += 1
            self.samples += whole
            yield Progress(
                step=self.step,
                loss=loss,
                gradient_norm=norm,
                learning_rate=rate,
                images=whole,
                unet_forwards=whole * config.unet_forwards_per_sample,
                skipped=self.skipped,
                seconds=time.perf_counter() - since,
            )
            last = self.step == config.max_train_steps
            # After the caller has logged the step, so that a log never lacks a step that its checkpoint has.
            if self.step % config.checkpointing_steps == 0 or last or stopping:
                folder = self.save()
            if stopping and not last:
                raise StoppedError(
                    f"stopped at step {self.step}. Go on with --resume-from-checkpoint latest ({folder})."
                )

    def losses(self, indices: range) -> Iterator[tuple[str, Tensor]]:
        """What the stage gives for the samples of these indices: each role that learns and its loss []."""
        stage = self.stage.losses(*self.data.batch(indices), indices)
        while True:
            with self.accelerator.autocast(), plain_attention(self.accelerator.device):  # but not while others run
                pair = next(stage, None)
            if pair is None:
                return
            yield pair

    def _backward(self) -> Tensor:
        """The gradient of one optimizer step, from --gradient-accumulation-steps batches; the loss [] of this process.

        Batch j of process p is the samples from first + (j*processes + p)*batch on: more processes, more
        accumulation or a larger batch see the same samples.
        """
        config, accelerator = self.config, self.accelerator
        batch, many = config.train_batch_size, config.gradient_accumulation_steps
        total = torch.zeros((), device=accelerator.device)
        for turn in range(many):
            start = self.samples + (turn * accelerator.num_processes + accelerator.process_index) * batch
            # Sharded gradients are summed as shards: waiting for the last batch would take them whole.
            together = turn + 1 == many or self.networks.sharded
            with contextlib.nullcontext() if together else accelerator.no_sync(self.networks.student):
                for _, loss in self.losses(range(start, start + batch)):
                    part = loss / many if many > 1 else loss
                    # A checkpointed backward pass runs forward again and must pick the same attention.
                    with plain_attention(accelerator.device):
                        accelerator.backward(part)
                    total += part.detach()
        return total

    def _agree(self, loss: Tensor, stop: StopRequest | None) -> tuple[float, bool]:
        """The mean loss of the processes, and whether any of them has been asked to stop: a step's first wait."""
        asked = torch.full_like(loss, float(bool(stop)))
        mean, stopping = self.accelerator.reduce(torch.stack([loss, asked]), "mean").tolist()
        return mean, stopping > 0

    def _clip(self) -> float:
        """Clip the gradient to --max-grad-norm; its norm before that, the same on every process: the second wait."""
        # Accelerate clips only what it has sharded itself.
        clip = clip_grad_norm_ if self.networks.sharded else self.accelerator.clip_grad_norm_
        norm = clip(self.networks.trainable(), self.config.max_grad_norm)
        return float(norm.full_tensor() if self.networks.sharded else norm)

    def _descend(self, rate: float, norm: float) -> bool:
        """Step along the gradient, unless it is not finite; whether it was. Raises FloatingPointError if too often."""
        finite = math.isfinite(norm)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if finite or "scaler" in self.objects:  # a scaler skips by itself, and lowers its scale
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.skipped += not finite
        self.skipped_in_a_row = 0 if finite else self.skipped_in_a_row + 1
        if self.skipped_in_a_row >= SKIPPED_IN_A_ROW:
            self._check(f"has not been finite for {SKIPPED_IN_A_ROW} steps", "the gradient")
        return finite

    def _check(self, fault: str | None, what: str) -> None:
        """Raises FloatingPointError for a fault. It is the same on every process."""
        if fault is None:
            return
        half = self.config.mixed_precision == "fp16"
        cure = "Lower --learning-rate" + (", or take --mixed-precision bf16 or no" if half else "")
        if self.step == 0 and self.skipped == 0:
            cure = "No step has been made yet: it comes of the teacher or the data"
        raise FloatingPointError(
            f"{what} {fault} at step {self.step + 1}. {cure}; the last good checkpoint is "
            f"{latest_checkpoint(self.config.output_dir) or 'not there yet'}."
        )

    def _learning_rate(self, step: int) -> float:
        config = self.config
        share = learning_rate_share(config.lr_scheduler, step, config.max_train_steps, config.lr_warmup_steps)
        return config.learning_rate * share

    def validate(self) -> dict[str, Score]:
        """Scores of the target and, where there is one, of the release average; keeps `best/` of the lowest loss.

        For the main process, and with sharded networks for all of them at once.
        """
        config = self.config
        if self.validation is None:
            latents, conditioning = self.data.held_out(config.validation_samples)
            self.validation = Validation(
                self.pipeline,
                self.networks,
                latents,
                conditioning,
                config.guidance_scale,
                config.skip,
                config.seed,
                config.train_batch_size,
            )
        with self.accelerator.autocast():
            scores = {role: self.validation(role) for role in ("target", "release") if self.networks.weights(role)}
        if self.networks.sharded:  # rounding must not make processes disagree on which is best
            (scores,) = broadcast_object_list([scores])
        role = min(scores, key=lambda one: scores[one].loss)
        if self.best is None or scores[role].loss < self.best["loss"]:
            self.best = {"step": self.step, "role": role, "loss": scores[role].loss}
            self._write(config.output_dir / "best", {"student": self.objects[role]}, self.best)
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
        }
        self._write(folder, self.objects, facts)
        if accelerator.is_main_process:
            rotate(config.output_dir, config.checkpoints_total_limit)
        accelerator.wait_for_everyone()
        return folder

    def free(self) -> None:
        """Let go of the networks and the optimizer: what is left is to write the result."""
        self.accelerator.free_memory()
        self.networks = self.optimizer = self.validation = self.stage = self.objects = None
        self.pipeline.unet = None
        gc.collect()

    def resume(self, wanted: str) -> tuple[Path | None, list[str]]:
        """Take up a checkpoint: a folder, or "latest". (Its folder, None if there is none yet; what has changed since.)

        Raises ValueError for one of another run: other settings than may change, another teacher's weights.
        """
        config = self.config
        folder = latest_checkpoint(config.output_dir) if wanted == "latest" else Path(wanted)
        if folder is None:
            return None, []
        # What is copied to a device or into shards may stay on the disk till then.
        copied = self.networks.sharded or self.pipeline.device.type != "cpu"
        states, facts = read_checkpoint(folder, mmap=copied)
        try:
            found = changes(config.settings(), facts["config"], frozenset(vars(config.data_options)))
            if facts["teacher_hash"] != self.teacher_hash:
                raise ValueError(
                    f"its teacher has other weights (SHA-256 {facts['teacher_hash']}) than --teacher {config.teacher} "
                    f"({self.teacher_hash}). Resume with its own teacher, or start anew in another --output-dir."
                )
            load_objects(self.objects, states, optional=("scaler",))
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(f"{folder} does not fit this run: {str(error).splitlines()[0]}") from error
        self.step, self.samples = facts["step"], facts["samples"]
        self.skipped, self.skipped_in_a_row = facts["skipped"], facts["skipped_in_a_row"]
        self.best = facts["best"] if (config.output_dir / "best").is_dir() else None
        for left in config.output_dir.glob("*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        return folder, found
