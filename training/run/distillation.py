"""The state of one run: its networks, data and learners, and how it is written, taken up again and let go."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor

from splam_core import Objective

from ..data import TrainingData
from ..models.pipeline import Pipeline
from .adapters import LoraNetworks
from .checkpoints import (
    RandomState,
    Stateful,
    find_checkpoint,
    load_objects,
    read_checkpoint,
    rotate,
    write_checkpoint,
)
from .config import Config
from .consistency import first_stage, plain_attention
from .finishing import Stage, finish_of
from .identity import Origin, changes_since, weights_digest
from .learner import Learner
from .networks import RoleState, base_dtype
from .optimizers import build_optimizer
from .processes import from_main
from .sharding import sharding_mesh
from .sources import load_student, next_batch, run_data, teacher_loras_digest
from .validation import Score, Validation
from .whole import FullNetworks


class Distillation:
    """The networks, data and learners of one run, and how far it has come.

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
        negative = pipeline.unconditional()
        # Made before there are networks; then the encoders leave.
        self.data = run_data(config, pipeline, accelerator) if data is None else data
        begun = load_student(config, pipeline)
        # A LoRA is one on the teacher as it is computed with; whole weights begin as the teacher's own.
        dtype = base_dtype(config) if config.lora else torch.float32
        self.origin = Origin(
            teacher_hash=weights_digest(pipeline.unet.state_dict(), dtype),
            teacher_loras=teacher_loras_digest(config),
            student_hash=weights_digest(begun, torch.float32) if begun else None,
        )
        self.networks = (
            LoraNetworks(pipeline, config, begun) if config.lora else FullNetworks(pipeline, config, mesh, begun)
        )
        del begun
        optimizer = self._optimizer("student", config.learning_rate, (config.adam_beta1, config.adam_beta2))
        if self.networks.sharded:
            optimizer = accelerator.prepare_optimizer(optimizer)
        else:
            self.networks.student, optimizer = accelerator.prepare(self.networks.student, optimizer)
        self.learners = {"student": Learner("student", self.networks, optimizer, accelerator)}
        asked = pipeline if teacher is None else replace(pipeline, unet=teacher)
        self.stage: Stage = first_stage(config, asked, negative, self.networks, objective)
        self.objects = self._objects()
        self.finishing = False
        self.validation: Validation | None = None
        self.step, self.samples = 0, 0
        self.skipped, self.skipped_in_a_row = 0, 0
        self.best: dict | None = None  # step and scores of the best validation
        if config.compile:
            self.networks.compile()

    def _optimizer(self, role: str, rate: float, betas: tuple[float, float]) -> torch.optim.Optimizer:
        config = self.config
        parameters = self.networks.trainable(role)
        return build_optimizer(config.optimizer, parameters, rate, config.weight_decay, betas, config.adam_epsilon)

    def _objects(self) -> dict[str, Stateful]:
        """What a checkpoint holds in this stage."""
        objects: dict[str, Stateful] = {role: RoleState(self.networks, role) for role in self.networks.roles}
        for learner in self.learners.values():
            objects |= learner.objects()
        objects["random"] = RandomState()
        if getattr(self.accelerator, "scaler", None):
            objects["scaler"] = self.accelerator.scaler
        return objects

    def begin_finish(self) -> None:
        """From the method to its finish: other losses, a second network that learns, and optimizers that begin anew."""
        config = self.config
        self.networks.begin_finish()
        self.learners["student"].begin_anew(config.finish_betas)
        optimizer = self._optimizer("fake", config.fake_learning_rate, config.finish_betas)
        prepared = self.accelerator.prepare_optimizer(optimizer)
        self.learners["fake"] = Learner("fake", self.networks, prepared, self.accelerator)
        self.stage = finish_of(self.stage)
        self.data.latents_alone()
        self.objects, self.finishing = self._objects(), True

    def let_teacher_go(self) -> None:
        """After what it is asked besides the loss: the ends of its paths from held-out samples."""
        if self.config.validation_samples and (self.networks.sharded or self.accelerator.is_main_process):
            self.validation = Validation(self.config, self.pipeline, self.networks, self.data)
        self.networks.let_teacher_go(self.pipeline)

    @property
    def samples_per_step(self) -> int:
        """Of all processes."""
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
            **vars(self.origin),
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
        self.networks = self.learners = self.validation = self.stage = self.objects = None
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
            found = changes_since(config, self.origin, facts)
            if facts.get("finishing", False):
                self.begin_finish()
            load_objects(self.objects, states, optional=("scaler",))
            self.step = facts["step"]
            self.samples = next_batch(facts["samples"], config.train_batch_size * self.accelerator.num_processes)
            self.skipped, self.skipped_in_a_row = facts["skipped"], facts["skipped_in_a_row"]
            self.best = facts["best"] if (config.output_dir / "best").is_dir() else None
        except (RuntimeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{folder} does not fit this run: {str(error).splitlines()[0]}") from error
        return folder, found
