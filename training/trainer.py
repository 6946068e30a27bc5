"""The training loop: Algorithm 1 of the paper on accelerate, as a generator of what happened."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from splam_core import (
    Denoiser,
    Objective,
    add_noise,
    ema_update,
    gamma_embedding,
    l2,
    predict_epsilon,
    pseudo_huber,
    sample_gamma,
    subpath_for,
)

from .config import Config
from .data import SceneLatents, draws
from .generate import guided_output
from .pipeline import Pipeline

GAMMA_DIM = 256
GRID = 50  # t is uniform on the timesteps that few-step sampling picks from: 19, 39, .., 999
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


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


def make_student(teacher: UNet2DConditionModel, gamma_conditioning: str) -> UNet2DConditionModel:
    """A copy of the teacher that can be told gamma; with cond_proj at zero it *is* the teacher, to the bit."""
    if gamma_conditioning == "noise-level":
        student = copy.deepcopy(teacher)
    else:
        student = UNet2DConditionModel.from_config({**teacher.config, "time_cond_proj_dim": GAMMA_DIM})
        weights = teacher.state_dict()
        weights["time_embedding.cond_proj.weight"] = torch.zeros_like(student.time_embedding.cond_proj.weight)
        student.load_state_dict(weights)
    return student.float().to(teacher.device).requires_grad_(True)


def export_unet(student: UNet2DConditionModel, teacher: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain UNet that equals the student at gamma = 1: its embedding is zero there, so the projection just goes."""
    plain = copy.deepcopy(teacher).float()
    plain.load_state_dict({key: value for key, value in student.state_dict().items() if "cond_proj" not in key})
    return plain.eval().requires_grad_(False)


class Distillation:
    """Student, target, teacher and optimizer of one run, and the step that moves them."""

    def __init__(self, config: Config, pipeline: Pipeline, accelerator: Accelerator) -> None:
        self.config, self.pipeline, self.accelerator = config, pipeline, accelerator
        # LCM has no gamma to tell.
        conditioning = "noise-level" if config.method == "lcm" else config.gamma_conditioning
        student = make_student(pipeline.unet, conditioning)
        self.target = copy.deepcopy(student).requires_grad_(False)
        pipeline.unet.to(DTYPES[config.teacher_dtype])
        optimizer = torch.optim.AdamW(student.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay)
        self.student, self.optimizer = accelerator.prepare(student.train(), optimizer)
        subpath = subpath_for(config.method, pipeline.schedule, config.sigma_level)
        distance = l2 if config.loss_type == "l2" else partial(pseudo_huber, c=config.huber_c)
        denoiser = Denoiser(pipeline.schedule, pipeline.prediction_type, conditioning, subpath)
        self.objective = Objective(denoiser, config.method, config.skip, config.solver_skip, distance)
        self.data = SceneLatents(pipeline, config.num_scenes, config.seed + 1)
        self.negative = pipeline.encode([""])
        self.step = 0
        if config.compile:
            pipeline.unet.compile()
            self.target.compile()
            accelerator.unwrap_model(self.student).compile()

    def network(self, unet: torch.nn.Module, embeds: Tensor):
        """unet as a function of (x, t, gamma)."""
        projected = accelerator_config(unet).time_cond_proj_dim is not None

        def net(x: Tensor, t: Tensor, gamma: Tensor | None) -> Tensor:
            phi = (
                gamma_embedding(gamma.to(x), GAMMA_DIM, self.config.gamma_bandwidth)
                if projected and gamma is not None
                else None
            )
            return unet(x, t, embeds, timestep_cond=phi).sample

        return net

    def loss(self, indices: range) -> Tensor:
        """The objective's mean over the samples of these indices."""
        pipeline = self.pipeline
        schedule = pipeline.schedule
        latents, captions = self.data.batch(indices)
        embeds = pipeline.encode(captions)
        noise, u_t, u_gamma = (part.to(latents.device) for part in draws(self.config.seed, indices, latents.shape[1:]))
        spacing = schedule.num_train_timesteps // GRID
        t = ((u_t * GRID).long() + 1) * spacing - 1
        x_t = add_noise(latents, noise, t, schedule)

        def teacher(x: Tensor, t: Tensor) -> Tensor:
            output = guided_output(pipeline, x, t, embeds, self.negative, self.config.guidance_scale)
            return predict_epsilon(output, x, schedule.alpha(t), schedule.sigma(t), pipeline.prediction_type)

        student, target = self.network(self.student, embeds), self.network(self.target, embeds)
        gamma = sample_gamma(u_gamma, self.config.gamma_one_probability)
        # On a CPU the fused attention's backward pass takes longer than all the rest; the plain one does not.
        plain = sdpa_kernel(SDPBackend.MATH) if latents.device.type == "cpu" else contextlib.nullcontext()
        with self.accelerator.autocast(), plain:
            return self.objective(student, target, teacher, x_t, t, gamma).mean()

    def train(self) -> Iterator[Progress]:
        """Steps up to max_train_steps. Raises FloatingPointError, naming the last checkpoint, for a loss not finite."""
        config, accelerator = self.config, self.accelerator
        local = config.train_batch_size
        whole = local * accelerator.num_processes
        while self.step < config.max_train_steps:
            since = time.perf_counter()
            first = self.step * whole + local * accelerator.process_index
            loss = self.loss(range(first, first + local))
            if not math.isfinite(loss.item()):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {self.step + 1}. Lower --learning-rate; the last good "
                    f"checkpoint is {latest_checkpoint(config.output_dir) or 'not there yet'}."
                )
            accelerator.backward(loss)
            norm = accelerator.clip_grad_norm_(self.student.parameters(), config.max_grad_norm)
            for group in self.optimizer.param_groups:
                group["lr"] = config.learning_rate * self._schedule()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            ema_update(self.target.parameters(), accelerator.unwrap_model(self.student).parameters(), config.ema_decay)
            self.step += 1
            yield Progress(
                step=self.step,
                loss=accelerator.reduce(loss.detach(), "mean").item(),
                gradient_norm=float(norm),
                learning_rate=config.learning_rate * self._schedule(self.step - 1),
                images=whole,
                unet_forwards=whole * config.unet_forwards_per_sample,
                seconds=time.perf_counter() - since,
            )
            # After the caller has logged the step, so that a log never lacks a step that its checkpoint has.
            due = self.step % config.checkpointing_steps == 0 or self.step == config.max_train_steps
            if due and accelerator.is_main_process:
                self.save()

    def _schedule(self, step: int | None = None) -> float:
        """The learning rate of a step as a share of the configured one."""
        step = self.step if step is None else step
        warm = min(1.0, (step + 1) / max(1, self.config.lr_warmup_steps))
        if self.config.lr_scheduler == "constant":
            return warm
        return warm * 0.5 * (1 + math.cos(math.pi * step / self.config.max_train_steps))

    def save(self) -> Path:
        """OUTPUT_DIR/checkpoint-STEP, which appears under its name only when it is whole; old ones go."""
        folder = self.config.output_dir / f"checkpoint-{self.step}"
        partial_folder = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial_folder, ignore_errors=True)
        partial_folder.mkdir(parents=True)
        state = {
            "step": self.step,
            "student": self.accelerator.unwrap_model(self.student).state_dict(),
            "target": self.target.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        with open(partial_folder / "state.pt", "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(self.config).items()}
        (partial_folder / "config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial_folder, folder)
        for old in checkpoints(self.config.output_dir)[: -self.config.checkpoints_total_limit]:
            shutil.rmtree(old)
        return folder

    def resume(self, wanted: str) -> Path | None:
        """Take up a checkpoint: a folder, or "latest" (None: there is none yet). Raises ValueError for an unfit one."""
        folder = latest_checkpoint(self.config.output_dir) if wanted == "latest" else Path(wanted)
        if folder is None:
            return None
        file = folder / "state.pt"
        if not file.is_file():
            raise ValueError(
                f"{folder} is no checkpoint: expected {file.name} in it. Give a checkpoint-N folder, or 'latest'."
            )
        try:
            state = torch.load(file, map_location=self.pipeline.device, weights_only=True)
            self.accelerator.unwrap_model(self.student).load_state_dict(state["student"])
            self.target.load_state_dict(state["target"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, KeyError, ValueError) as error:
            raise ValueError(
                f"{file} does not fit this run ({str(error).splitlines()[0]}). Resume with the teacher, --method and "
                f"--gamma-conditioning it was started with, or start anew in another --output-dir."
            ) from error
        self.step = state["step"]
        return folder


def accelerator_config(unet: torch.nn.Module):
    """The diffusers config of a UNet that accelerate may have wrapped."""
    return getattr(unet, "module", unet).config


def checkpoints(output_dir: Path) -> list[Path]:
    """checkpoint-N folders, oldest first."""
    found = [folder for folder in output_dir.glob("checkpoint-*") if folder.name.removeprefix("checkpoint-").isdigit()]
    return sorted(found, key=lambda folder: int(folder.name.removeprefix("checkpoint-")))


def latest_checkpoint(output_dir: Path) -> Path | None:
    found = checkpoints(output_dir)
    return found[-1] if found else None
