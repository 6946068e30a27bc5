"""The training loop: Algorithm 1 of the paper on accelerate, as a generator of what happened."""

from __future__ import annotations

import contextlib
import gc
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils import clip_grad_norm_

from splam_core import (
    LossWatch,
    add_noise,
    draw_timesteps,
    draws,
    gamma_embedding,
    learning_rate_share,
    predict_epsilon,
    sample_gamma,
)

from ..data.base import Share
from ..data.phase import make_data
from ..models.pipeline import Conditioning, Pipeline, unet_arguments
from ..models.sampling import guided_output
from .checkpoints import (
    WRITE_ERRORS,
    RandomState,
    Stateful,
    explain_write_error,
    finish_folder,
    latest_checkpoint,
    load_objects,
    read_checkpoint,
    rotate,
    start_folder,
    write_objects,
)
from .config import Config
from .identity import changes, weights_digest
from .networks import (
    GAMMA_DIM,
    ROLES,
    FullNetworks,
    LoraNetworks,
    RoleState,
    base_dtype,
    update_averages,
)
from .optimizers import build_optimizer
from .sharding import OptimizerState, sharding_mesh
from .validation import Score, Validation


@dataclass
class Progress:
    """What one optimizer step did; `seconds` are of this step alone."""

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    images: int
    unet_forwards: int
    seconds: float


class Distillation:
    """The networks, data and optimizer of one run, and the step that moves them."""

    def __init__(self, config: Config, pipeline: Pipeline, accelerator: Accelerator) -> None:
        self.config, self.pipeline, self.accelerator = config, pipeline, accelerator
        mesh = sharding_mesh(config, accelerator)
        whole = config.train_batch_size * accelerator.num_processes
        self.negative = pipeline.unconditional()
        self.data = make_data(
            config.data,
            pipeline,
            config.data_options,
            whole,
            config.seed + 1,
            whole * config.gradient_accumulation_steps * config.max_train_steps,
            config.validation_samples,
            Share(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone),
        )  # now: with the networks, the teacher's UNet is no longer the teacher's alone
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
        trained = [role for role in ROLES if role != "teacher" and self.networks.weights(role)]
        self.objects: dict[str, Stateful] = {
            **{role: RoleState(self.networks, role) for role in trained},
            "optimizer": OptimizerState(self.optimizer, self.networks.trainable(), self.networks.sharded),
            "random": RandomState(),
        }
        if getattr(accelerator, "scaler", None):
            self.objects["scaler"] = accelerator.scaler
        self.objective = config.objective(pipeline.schedule, pipeline.prediction_type)
        self.projected = config.conditioning == "embedding"
        self.validation: Validation | None = None
        self.step, self.samples = 0, 0
        self.watch = LossWatch()
        self.best: dict | None = None  # step and scores of the best validation
        if config.compile:
            self.networks.compile()

    def network(self, role: str, conditioning: Conditioning):
        """A role's UNet as a function of (x, t, gamma)."""

        def net(x: Tensor, t: Tensor, gamma: Tensor | None) -> Tensor:
            phi = (
                gamma_embedding(gamma.to(x), GAMMA_DIM, self.config.gamma_bandwidth)
                if self.projected and gamma is not None
                else None
            )
            with self.networks.use(role) as unet:
                return unet(x, t, **unet_arguments(conditioning), timestep_cond=phi).sample

        return net

    def loss(self, indices: range) -> Tensor:
        """The objective's mean over the samples of these indices."""
        pipeline = self.pipeline
        schedule = pipeline.schedule
        latents, conditioning = self.data.batch(indices)
        noise, u_t, u_gamma = (part.to(latents.device) for part in draws(self.config.seed, indices, latents.shape[1:]))
        t = draw_timesteps(u_t, schedule.num_train_timesteps, self.config.timestep_power)
        x_t = add_noise(latents, noise, t, schedule)

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            with self.networks.use("teacher"):
                output = guided_output(pipeline, x, t, conditioning, self.negative, self.config.guidance_scale)
            return predict_epsilon(output, x, schedule.alpha(t), schedule.sigma(t), pipeline.prediction_type)

        student, target = self.network("student", conditioning), self.network("target", conditioning)
        gamma = sample_gamma(u_gamma, self.config.gamma_one_probability)
        with self.accelerator.autocast(), _attention(latents.device):
            return self.objective(student, target, teacher, x_t, t, gamma).mean()

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
            last = turn + 1 == many
            # Sharded gradients are summed as shards: waiting for the last batch would take them whole.
            together = last or self.networks.sharded
            with contextlib.nullcontext() if together else accelerator.no_sync(self.networks.student):
                loss = self.loss(range(start, start + batch))
                # A checkpointed backward pass runs forward again and must pick the same attention.
                with _attention(accelerator.device):
                    part = loss / many if many > 1 else loss
                    accelerator.backward(part)
            total += loss.detach() / many if many > 1 else loss.detach()
        return total

    def train(self) -> Iterator[Progress]:
        """Steps up to max_train_steps. Raises FloatingPointError, naming the last checkpoint, for a loss not finite
        or one that explodes, and CheckpointError for a checkpoint that cannot be written."""
        config, accelerator = self.config, self.accelerator
        whole = config.train_batch_size * config.gradient_accumulation_steps * accelerator.num_processes
        while self.step < config.max_train_steps:
            since = time.perf_counter()
            loss = accelerator.reduce(self._backward(), "mean").item()
            self._watch(loss)
            for group in self.optimizer.param_groups:
                group["lr"] = self._learning_rate(self.step)
            norm = self._descend()
            self.step += 1
            self.samples += whole
            update_averages(self.networks, self.step, config.ema_decay, config.release_decay)
            yield Progress(
                step=self.step,
                loss=loss,
                gradient_norm=float(norm),
                learning_rate=self._learning_rate(self.step - 1),
                images=whole,
                unet_forwards=whole * config.unet_forwards_per_sample,
                seconds=time.perf_counter() - since,
            )
            # After the caller has logged the step, so that a log never lacks a step that its checkpoint has.
            if self.step % config.checkpointing_steps == 0 or self.step == config.max_train_steps:
                self.save()

    def _descend(self) -> Tensor | float:
        """Step the optimizer along the gradient, clipped to --max-grad-norm; its norm [] before that."""
        clip = self.accelerator.clip_grad_norm_
        if self.networks.sharded:  # accelerate clips only what it has sharded itself
            clip = clip_grad_norm_
        norm = clip(self.networks.trainable(), self.config.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.full_tensor() if self.networks.sharded else norm

    def _watch(self, loss: float) -> None:
        """Raises FloatingPointError for a loss that is not finite or explodes. It is the same on every process."""
        fault = self.watch.fault(loss)
        if fault:
            raise FloatingPointError(
                f"the loss {fault} at step {self.step + 1}. Lower --learning-rate; the last good "
                f"checkpoint is {latest_checkpoint(self.config.output_dir) or 'not there yet'}."
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
        try:
            partial_folder = start_folder(folder)
            write_objects(partial_folder, states, {**facts, "config": self.config.settings()})
            finish_folder(partial_folder, folder)
        except WRITE_ERRORS as error:
            raise explain_write_error(error, folder) from error

    def save(self) -> Path:
        """OUTPUT_DIR/checkpoint-STEP, which appears under its name only when it is whole; old ones go."""
        config, accelerator = self.config, self.accelerator
        folder = config.output_dir / f"checkpoint-{self.step}"
        facts = {
            "step": self.step,
            "samples": self.samples,
            **self.watch.state_dict(),
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
        self.networks = self.optimizer = self.validation = self.objects = None
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
        self.watch.load_state_dict(facts)
        self.best = facts["best"] if (config.output_dir / "best").is_dir() else None
        for left in config.output_dir.glob("*.partial"):
            shutil.rmtree(left, ignore_errors=True)
        return folder, found


def _attention(device: torch.device):
    """On a CPU the fused attention's backward pass takes longer than all the rest; the plain one does not."""
    return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()
