"""The settings of a distillation: one dataclass, whose fields are the command's flags."""

from __future__ import annotations

import argparse
import contextlib
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch

from splam_core.descent import LR_SCHEDULERS
from splam_core.finish import LORA_FINISH, Finish
from splam_core.paths import GOALS
from splam_core.recipe import LORA_LEARNING_RATE, RECIPES, Recipe

from ..data import DataOptions
from ..data.paths import read_path_meta
from ..flags import add_flags, flag, given_flags, read_toml, with_home
from ..models.lora import file_and_weight
from ..models.teachers import TEACHERS, list_teachers
from .optimizers import OPTIMIZERS

# What differs from the defaults below for any teacher but the embedded one: the paper's budget, except its batch of
# 1024 on eight A100s, which is scaled to one GPU. Presets (teachers.py) add w and the loss.
FULL_SIZE: dict[str, Any] = {
    "max_train_steps": 6000,
    "train_batch_size": 16,
    "learning_rate": 8e-6,
    "lr_warmup_steps": 500,
    "lr_scheduler": "constant",
    "release_decay": 0.999,
    "gradient_checkpointing": True,
    "checkpointing_steps": 500,
    "sample_every": 500,
    "validation_samples": 16,
    # The finish's are the embedded teacher's in the same proportion, a tenth of the steps.
    "finish_steps": 600,
    "finish_learning_rate": 2e-6,
    "fake_learning_rate": 8e-6,
}
LORA_HOLDS = ("speed", "both")
_OUTPUT = Path("runs/distill")
PRESETS = {file.stem: file for file in (Path(__file__).resolve().parent / "presets").glob("*.toml")}


@dataclass(frozen=True, kw_only=True)
class Paths:
    """What kept paths are read for. Raises ValueError, in the words of the flags, for settings that make no sense."""

    paths: Path | None = flag(
        None, "a folder of prepare.py --paths: learn from these in place of --data, without asking the teacher"
    )
    path_goal: str = flag(
        "end", "what F is to point at from a path's points: its end, or what the target makes of the next point", GOALS
    )
    path_first_share: float = flag(0.25, "share of draws from the first sub-path; the others are drawn evenly")

    def __post_init__(self) -> None:
        if self.path_goal not in GOALS:
            raise ValueError(f"--path-goal must be one of {', '.join(GOALS)}, got {self.path_goal}")
        if not 0 <= self.path_first_share <= 1:
            raise ValueError(f"--path-first-share must be between 0 and 1, got {self.path_first_share}")


FINISH_SETTINGS = frozenset(entry.name for entry in fields(Finish))


@dataclass(frozen=True, kw_only=True)
class Config(Recipe, Paths, Finish):
    """Flag names are those of diffusers' training scripts where they mean the same."""

    teacher: str = field(
        metadata={
            "help": "a preset of --list-teachers, a Hub id, a diffusers folder or a single .safetensors file",
            "also": ("--pretrained-teacher-model",),
        }
    )
    output_dir: Path = flag(_OUTPUT, "checkpoints, log, sheets and the finished student go here")
    data: str | None = flag(None, "what to train on: see docs/data.md; none: what suits the teacher", parse=with_home)
    data_options: DataOptions = field(default_factory=DataOptions)
    revision: str | None = flag(None, "branch, tag or commit of a teacher on the Hub", also=("--teacher-revision",))
    download_teacher: bool = flag(False, "fetch the teacher if it is not on this machine")
    recipe: str = flag(
        "default", "what is not set otherwise is as we found it best (default) or as in the paper", tuple(RECIPES)
    )
    teacher_lora: tuple[str, ...] = flag(
        (), "a LoRA merged into the teacher before all else, at this weight (1); may be given several times",
        metavar="FILE[:WEIGHT]", repeated=True,
    )  # fmt: skip
    clip_skip: int = flag(
        1, "as in A1111: 2 leaves the text encoder's last layer away, as many checkpoints of drawn styles want it"
    )
    lora_holds: str = flag(
        "speed", "what the LoRA of --lora holds: speed alone, or the --teacher-lora too (both)", LORA_HOLDS
    )
    lora: bool = flag(False, "train a LoRA on the teacher instead of a copy of it; one UNet serves as all three")
    lora_rank: int = flag(64, "rank of the LoRA", also=("--rank",))
    lora_alpha: float | None = flag(None, "its alpha, the update being alpha/rank * up @ down; none: the rank")
    lora_target_modules: str | None = flag(
        None, "names of adapted layers, separated by commas; none: attention, feed-forward, projections, convolutions"
    )
    student: str | None = flag(
        None, "begin with a few-step model or LoRA (LCM's and Hyper's, too) instead of the teacher"
    )
    max_train_steps: int = flag(2400, "optimizer steps of the method; 0: --finish alone", also=("--steps",))
    train_batch_size: int = flag(32, "pictures a step, process and accumulation")
    gradient_accumulation_steps: int = flag(1, "batches a step")
    learning_rate: float = flag(3e-4, "8e-6 is the paper's for SD1.5 at batch 1024")
    optimizer: str = flag("adamw", "all but adamw need a package: the error names it", OPTIMIZERS)
    weight_decay: float = flag(0.0, "the optimizer's", also=("--adam-weight-decay",))
    adam_beta1: float = flag(0.9, "AdamW's")
    adam_beta2: float = flag(0.999, "AdamW's")
    adam_epsilon: float = flag(1e-8, "AdamW's")
    lr_warmup_steps: int = flag(50, "steps over which the learning rate rises")
    lr_scheduler: str = flag("cosine", "how the learning rate goes on", LR_SCHEDULERS)
    max_grad_norm: float = flag(10.0, "gradients are clipped to this norm")
    mixed_precision: str = flag(
        "auto",
        "forward passes in this type, weights fp32; auto: no for the embedded teacher and on a CPU, else bf16 or fp16",
        ("auto", "no", "bf16", "fp16"),
    )
    teacher_dtype: str = flag(
        "bf16", "of the frozen teacher; a rounding in it hardly moves x_s", ("fp32", "fp16", "bf16")
    )
    gradient_checkpointing: bool = flag(False, "compute activations again in the backward pass: less memory, slower")
    compile: bool = flag(False, "torch.compile the UNets: a minute at the start, faster steps after it")
    checkpointing_steps: int = flag(150, "steps between two checkpoints")
    checkpoints_total_limit: int = flag(2, "checkpoints kept, besides the best")
    resume_from_checkpoint: str | None = flag(None, "'latest', or a checkpoint folder", parse=with_home)
    sample_every: int = flag(
        150, "steps between two sheets (teacher 50 steps; student 1, 2, 4, 8) and validations; 0 for no sheets"
    )
    sample_prompts: Path | None = flag(None, "prompts of the sheets, one a line", also=("--validation-prompts",))
    validation_samples: int = flag(64, "held-out samples for validation, a quarter at each timestep; 0 for none")
    report_to: str = flag("tensorboard", "where curves and sheets are logged", ("tensorboard", "wandb", "all", "none"))
    export_dtype: str = flag("fp16", "of the finished student", ("fp32", "fp16", "bf16"))
    name: str = flag("student", "the single file is OUTPUT_DIR/NAME.splam.safetensors (or .splam-lora.safetensors)")
    allow_tf32: bool = flag(False, "TF32 matrix products on NVIDIA GPUs")
    seed: int = flag(0, "every random number is a function of this and of the sample's index")

    def __post_init__(self) -> None:
        Recipe.__post_init__(self)
        Paths.__post_init__(self)
        Finish.__post_init__(self)
        if self.paths is not None and self.data is not None:
            raise ValueError(f"--paths holds what is trained on: leave --data {self.data} away")
        for name in ("train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "lora_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        if not self.max_grad_norm > 0:
            raise ValueError(
                f"--max-grad-norm must be above 0, got {self.max_grad_norm:g}: clipped to 0, gradients move nothing. "
                f"inf clips none"
            )
        if self.max_train_steps < (self.finish == "none"):
            raise ValueError(
                f"--max-train-steps must be 1 or more, or with --finish 0 or more, got {self.max_train_steps}"
            )
        if self.finish != "none" and self.optimizer == "prodigy":
            raise ValueError("--finish needs rates in proportion, and --optimizer prodigy sets its own: take adamw")
        for one in self.teacher_lora:
            try:
                file_and_weight(one)
            except ValueError as error:
                raise ValueError(f"--teacher-lora: {error}") from error
        if self.lora_holds == "both" and not (self.lora and self.teacher_lora):
            raise ValueError(
                "--lora-holds both is of a --lora on a teacher with --teacher-lora: give those two, or leave it away"
            )
        if self.name in ("", ".", "..") or set(self.name) & set('/\\:*?"<>|'):
            raise ValueError(f"--name must be a file's name without folders, got {self.name!r}: see --output-dir")

    @property
    def unet_forwards_per_sample(self) -> int:
        """Cost of a training sample: on kept paths no teacher's, and for their ends no target's."""
        return super().unet_forwards_per_sample if self.paths is None else 3 + (self.path_goal == "target")

    @property
    def total_steps(self) -> int:
        """Of the method and of its finish."""
        return self.max_train_steps + (self.finish_steps if self.finish != "none" else 0)

    @property
    def finish_guidance(self) -> float:
        """w of the teacher's score in the finish."""
        return self.guidance_scale if self.finish_guidance_scale is None else self.finish_guidance_scale

    @property
    def finish_forwards_per_sample(self) -> float:
        """Cost of a sample of the finish, in the mean: as `unet_forwards_per_sample` counts."""
        before = sum((count - 1) / 2 for count in self.finish_step_counts) / len(self.finish_step_counts)
        return before + self.finish_forwards_that_learn

    @property
    def finish_forwards_that_learn(self) -> int:
        """The same without the student's own steps before: both networks' backward passes count 2."""
        teacher = 1 if self.finish_guidance == 1 else 2
        return 3 + teacher + 1 + (self.finish_anchor > 0) + 3 * self.fake_updates

    def settings(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {**vars(self), **vars(self.data_options)}
        values.pop("data_options")
        plain = {Path: str, tuple: list}
        return {
            key: next((make(v) for kind, make in plain.items() if isinstance(v, kind)), v) for key, v in values.items()
        }


class _ListTeachers(argparse.Action):
    def __init__(self, **options) -> None:
        super().__init__(nargs=0, **{**options, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS})

    def __call__(self, parser, *_) -> None:
        print(list_teachers())
        parser.exit()


def parse(arguments: list[str] | None = None, description: str | None = None) -> Config:
    """A Config from the command line alone; what it does not set comes as `complete` says."""
    return parse_command(arguments, description)[0]


def parse_command(arguments: list[str] | None, description: str | None) -> tuple[Config, argparse.Namespace]:
    """(the run's settings, what else is asked: `plan`, `measure`). A file of --config gives way to the command line."""
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Defaults shown are the embedded teacher's; for others see docs/training.md, or --plan.",
    )
    parser.add_argument("--list-teachers", "--list_teachers", action=_ListTeachers, help="print the presets and stop")
    parser.add_argument(
        "--config", metavar="FILE", help=f"settings from a TOML file, or of a preset: {', '.join(sorted(PRESETS))}"
    )
    parser.add_argument(
        "--plan", action="store_true", help="print memory, UNet evaluations, steps and images, and stop"
    )
    parser.add_argument("--measure", action="store_true", help="with --plan: time a few steps as well, and add hours")
    add_flags(parser, Config)
    add_flags(parser.add_argument_group("training data"), DataOptions)
    given = given_flags(parser, arguments)
    asked = argparse.Namespace(**{name: given.pop(name) for name in ("plan", "measure")})
    file = given.pop("config")
    try:
        if file:
            given = read_toml(PRESETS.get(file, Path(file)), Config, DataOptions) | given
        if "teacher" not in given:
            parser.error("--teacher says whose student is to be trained; --list-teachers prints the presets")
        return complete(given, planned=asked.plan and not asked.measure), asked
    except (ValueError, FileNotFoundError) as error:
        parser.error(str(error))


def complete(given: dict[str, Any], planned: bool = False) -> Config:
    """A Config of what was given; the rest comes from the teacher's preset, FULL_SIZE, the recipe and the fields.

    planned: for the machine that will train, which need not be this one. Raises ValueError for what does not go
    together.
    """
    own = {entry.name for entry in fields(Config)}
    options = {key: value for key, value in given.items() if key not in own}
    given = {key: value for key, value in given.items() if key in own}
    recipe = given.get("recipe", "default")
    defaults: dict[str, Any] = {**RECIPES[recipe]}
    preset = TEACHERS.get(given["teacher"])
    embedded = given["teacher"] in ("embedded", "embedded-teacher")
    if preset and recipe == "paper":
        defaults |= {"skip": preset.skip, "solver_skip": preset.solver_skip}
    if not embedded:
        defaults |= FULL_SIZE
        if preset:
            defaults |= {"guidance_scale": preset.guidance_scale, "loss_type": preset.loss_type}
            if any(entry.name == "resolution" for entry in fields(DataOptions)):
                options = {"resolution": preset.resolution, **options}
        if given.get("lora"):
            defaults |= {"learning_rate": LORA_LEARNING_RATE, **LORA_FINISH}
    if given.get("paths") is not None:  # where they are: a plan may be made elsewhere
        with contextlib.suppress(FileNotFoundError if planned else ()):
            w = defaults["guidance_scale"] = read_path_meta(Path(given["paths"]))["guidance_scale"]
            if given.get("guidance_scale", w) != w:
                raise ValueError(
                    f"--guidance-scale {given['guidance_scale']:g}: the paths of {given['paths']} have w {w:g}. Leave "
                    "the flag away, or solve others."
                )
    if given.get("skip", 0) > 0 and "solver_skip" not in given:  # whole steps, none longer than usual
        usual = defaults.get("solver_skip", Config.solver_skip)
        given["solver_skip"] = max(step for step in range(1, usual + 1) if given["skip"] % step == 0)
    if given.get("optimizer") == "prodigy":
        defaults["learning_rate"] = 1.0  # Prodigy finds the scale itself
    if given.get("mixed_precision", "auto") == "auto":
        cuda = torch.cuda.is_available() and not embedded
        given["mixed_precision"] = ("bf16" if _computes_bf16() else "fp16") if cuda else "no"
        if planned and not embedded:
            given["mixed_precision"] = "bf16"
    if given["mixed_precision"] == "fp16":
        defaults["teacher_dtype"] = "fp16"
    return Config(**{**defaults, **given, "data_options": DataOptions(**options)})


def _computes_bf16() -> bool:
    """Whether the GPU computes in bf16 itself. Those before Ampere (T4, V100, RTX 20) emulate it, slowly."""
    return torch.cuda.is_bf16_supported(including_emulation=False)
