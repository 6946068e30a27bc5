"""The settings of a distillation: one dataclass, whose fields are the command's flags."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import torch

from splam_core import SOLVERS

from ..data import DataOptions
from ..models.teachers import TEACHERS, list_teachers
from .optimizers import OPTIMIZERS

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine")
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
}
# How a student is trained, by --recipe. "default" is what docs/reproduction.md found best, and stands in the fields
# below; "paper" is Algorithm 1 with the settings of the paper's section 4.1; presets add their own k and k_phi to it.
RECIPES: dict[str, dict[str, Any]] = {
    "default": {},
    "paper": {
        "skip": 100,
        "solver": "ddim",
        "solver_skip": 20,
        "gamma_conditioning": "embedding",
        "gamma_one_probability": 0.0,
        "timestep_power": 0.0,
    },
}
# A LoRA learns at a higher rate than whole weights.
LORA_LEARNING_RATE = 1e-4


def _flag(default, help: str, choices: tuple[str, ...] | None = None, also: tuple[str, ...] = ()):
    return field(default=default, metadata={"help": help, "choices": choices, "also": also})


_OUTPUT = Path("runs/distill")


@dataclass(frozen=True)
class Config:
    """Flag names are those of diffusers' training scripts where they mean the same."""

    teacher: str = field(
        metadata={
            "help": "a preset of --list-teachers, a Hub id, a diffusers folder or a single .safetensors file",
            "also": ("--pretrained-teacher-model",),
        }
    )
    output_dir: Path = _flag(_OUTPUT, "checkpoints, log, sheets and the finished student go here")  # noqa: RUF009
    data: str | None = _flag(None, "what to train on: see docs/data.md; none: what suits the teacher")
    data_options: DataOptions = field(default_factory=DataOptions)
    revision: str | None = _flag(None, "branch, tag or commit of a teacher on the Hub", also=("--teacher-revision",))
    download_teacher: bool = _flag(False, "fetch the teacher if it is not on this machine")
    method: str = _flag(
        "splam", "SLAD (eq. 17), latent consistency (eq. 7) or Direct Linking (eq. 27)", ("splam", "lcm", "dl")
    )
    recipe: str = _flag(
        "default", "what is not set otherwise is as we found it best (default) or as in the paper", tuple(RECIPES)
    )
    lora: bool = _flag(False, "train a LoRA on the teacher instead of a copy of it; one UNet serves as all three")
    lora_rank: int = _flag(64, "rank of the LoRA", also=("--rank",))
    lora_alpha: float | None = _flag(None, "its alpha, the update being alpha/rank * up @ down; none: the rank")
    lora_target_modules: str | None = _flag(
        None, "names of adapted layers, separated by commas; none: attention, feed-forward, projections, convolutions"
    )
    max_train_steps: int = _flag(2400, "optimizer steps")
    train_batch_size: int = _flag(32, "pictures a step, process and accumulation")
    gradient_accumulation_steps: int = _flag(1, "batches a step")
    learning_rate: float = _flag(3e-4, "8e-6 is the paper's for SD1.5 at batch 1024")
    optimizer: str = _flag("adamw", "all but adamw need a package: the error names it", OPTIMIZERS)
    use_8bit_adam: bool = _flag(False, "the same as --optimizer adamw-8bit")
    weight_decay: float = _flag(0.0, "the optimizer's", also=("--adam-weight-decay",))
    adam_beta1: float = _flag(0.9, "AdamW's")
    adam_beta2: float = _flag(0.999, "AdamW's")
    adam_epsilon: float = _flag(1e-8, "AdamW's")
    lr_warmup_steps: int = _flag(50, "steps over which the learning rate rises")
    lr_scheduler: str = _flag("cosine", "how the learning rate goes on", LR_SCHEDULERS)
    max_grad_norm: float = _flag(10.0, "gradients are clipped to this norm")
    guidance_scale: float = _flag(3.0, "w of eq. 18: eps = w*cond + (1-w)*uncond, so that 1 is no guidance")
    skip: int = _flag(150, "k: timesteps that one sub-path spans")
    solver: str = _flag("dpm-solver++", "the teacher's; dpm-solver++ is of second order, ddim the paper's", SOLVERS)
    solver_skip: int = _flag(
        50, "k_phi: timesteps of a teacher step, of which k/k_phi make the Multiple Estimation; if only k is set, less"
    )
    gamma_conditioning: str = _flag("noise-level", "how the student is told gamma", ("embedding", "noise-level"))
    gamma_bandwidth: float = _flag(1000.0, "of the gamma embedding; 10000 is the authors'")
    gamma_one_probability: float = _flag(
        0.75, "share of draws at exactly gamma = 1, the point that sampling uses; 0 is the paper's"
    )
    timestep_power: float = _flag(
        0.5, "timesteps are drawn in proportion to t to this power: few steps are made high up; 0 is the paper's"
    )
    sigma_level: str = _flag("linear", "noise level inside a sub-path", ("linear", "independent"))
    loss_type: str = _flag("huber", "pseudo-Huber or squared error", ("huber", "l2"))
    huber_c: float = _flag(1e-3, "where pseudo-Huber turns from quadratic to linear")
    ema_decay: float = _flag(0.95, "of the target network")
    release_decay: float = _flag(
        0.99, "of a slower average, which is exported if it scores better than the target; 0 for none"
    )
    mixed_precision: str = _flag(
        "auto",
        "forward passes in this type, weights fp32; auto: no for the embedded teacher and on a CPU, else bf16 or fp16",
        ("auto", "no", "bf16", "fp16"),
    )
    teacher_dtype: str = _flag(
        "bf16", "of the frozen teacher; a rounding in it hardly moves x_s", ("fp32", "fp16", "bf16")
    )
    gradient_checkpointing: bool = _flag(False, "compute activations again in the backward pass: less memory, slower")
    compile: bool = _flag(False, "torch.compile the UNets: a minute at the start, faster steps after it")
    checkpointing_steps: int = _flag(150, "steps between two checkpoints")
    checkpoints_total_limit: int = _flag(2, "checkpoints kept, besides the best")
    resume_from_checkpoint: str | None = _flag(None, "'latest', or a checkpoint folder")
    sample_every: int = _flag(
        150, "steps between two sheets (teacher 50 steps; student 1, 2, 4, 8) and validations; 0 for no sheets"
    )
    sample_prompts: Path | None = _flag(None, "prompts of the sheets, one a line", also=("--validation-prompts",))  # noqa: RUF009
    validation_samples: int = _flag(64, "held-out samples for validation, a quarter at each timestep; 0 for none")
    report_to: str = _flag("tensorboard", "where curves and sheets are logged", ("tensorboard", "wandb", "all", "none"))
    export_dtype: str = _flag("fp16", "of the finished student", ("fp32", "fp16", "bf16"))
    name: str = _flag("student", "the single file is OUTPUT_DIR/NAME.splam.safetensors (or .splam-lora.safetensors)")
    allow_tf32: bool = _flag(False, "TF32 matrix products on NVIDIA GPUs")
    seed: int = _flag(0, "every random number is a function of this and of the sample's index")
    plan: bool = _flag(False, "print memory, UNet evaluations, steps and images by arithmetic, and stop")
    measure: bool = _flag(False, "with --plan: time a few steps as well, and add hours")

    def __post_init__(self) -> None:
        if self.skip < 1 or self.solver_skip < 1 or self.skip % self.solver_skip:
            raise ValueError(f"--solver-skip must divide --skip, got {self.solver_skip} and {self.skip}")
        for name in (
            "max_train_steps", "train_batch_size", "gradient_accumulation_steps", "checkpointing_steps", "lora_rank"
        ):  # fmt: skip
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")
        if self.timestep_power < 0:
            raise ValueError(f"--timestep-power must be 0 or more, got {self.timestep_power}")
        for name in ("ema_decay", "release_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(
                    f"--{name.replace('_', '-')} must be at least 0 and below 1, got {getattr(self, name)}"
                )
        if self.gamma_conditioning == "noise-level" and self.sigma_level == "independent" and self.method != "lcm":
            raise ValueError(
                "--gamma-conditioning noise-level is only right with --sigma-level linear: take --gamma-conditioning "
                "embedding for the other"
            )

    @property
    def unet_forwards_per_sample(self) -> int:
        """Cost of a training sample: guided teacher steps count 2, the backward pass 2, student and target 1 each."""
        return 2 * (self.skip // self.solver_skip) + 1 + 2 + 1

    def settings(self) -> dict[str, Any]:
        """As plain JSON values."""
        values = {**vars(self), **vars(self.data_options)}
        values.pop("data_options")
        return {key: str(value) if isinstance(value, Path) else value for key, value in values.items()}


class _ListTeachers(argparse.Action):
    def __init__(self, **options) -> None:
        super().__init__(nargs=0, **{**options, "dest": argparse.SUPPRESS, "default": argparse.SUPPRESS})

    def __call__(self, parser, *_) -> None:
        print(list_teachers())
        parser.exit()


def parse(arguments: list[str] | None = None, description: str | None = None) -> Config:
    """A Config from the command line; `--some-flag` and `--some_flag` are one.

    What the user does not set comes from the teacher's preset, then from FULL_SIZE, the recipe and the fields' own
    defaults.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Defaults shown are the embedded teacher's; for others see docs/training.md, or --plan.",
    )
    parser.add_argument("--list-teachers", "--list_teachers", action=_ListTeachers, help="print the presets and stop")
    hints = get_type_hints(Config)
    for entry in fields(Config):
        if entry.name != "data_options":
            _add(parser, entry, hints[entry.name])
    data = parser.add_argument_group("training data")
    hints = get_type_hints(DataOptions)
    for entry in fields(DataOptions):
        _add(data, entry, hints[entry.name])
    given = vars(parser.parse_args(arguments))
    try:
        return complete(given)
    except ValueError as error:
        parser.error(str(error))


def complete(given: dict[str, Any]) -> Config:
    """A Config of what was given; the rest as the teacher wants it. Raises ValueError for what does not go together."""
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
            defaults["learning_rate"] = LORA_LEARNING_RATE
    if given.get("skip", 0) > 0 and "solver_skip" not in given:  # whole steps, none longer than usual
        usual = defaults.get("solver_skip", Config.solver_skip)
        given["solver_skip"] = max(step for step in range(1, usual + 1) if given["skip"] % step == 0)
    if given.get("use_8bit_adam"):
        given["optimizer"] = "adamw-8bit"
    if given.get("optimizer") == "prodigy":
        defaults["learning_rate"] = 1.0  # Prodigy finds the scale itself
    if given.get("mixed_precision", "auto") == "auto":
        cuda = torch.cuda.is_available() and not embedded
        given["mixed_precision"] = ("bf16" if torch.cuda.is_bf16_supported() else "fp16") if cuda else "no"
        if given.get("plan") and not given.get("measure") and not embedded:
            given["mixed_precision"] = "bf16"  # the plan is for the machine that will train
        if given["mixed_precision"] == "fp16":
            defaults["teacher_dtype"] = "fp16"
    return Config(**{**defaults, **given, "data_options": DataOptions(**options)})


def _add(parser, entry, hint) -> None:
    """One field as a flag that is absent unless given."""
    names = [f"--{entry.name.replace('_', '-')}", *entry.metadata.get("also", ())]
    names = sorted({*names, *(f"--{name[2:].replace('-', '_')}" for name in names)})
    required = entry.default is MISSING and entry.default_factory is MISSING
    options: dict[str, Any] = {
        "dest": entry.name,
        "default": argparse.SUPPRESS,
        "help": entry.metadata.get("help", "").replace("%", "%%"),
    }
    if hint is bool:
        options["action"] = argparse.BooleanOptionalAction
    else:
        kind = next(one for one in get_args(hint) if one is not type(None)) if get_origin(hint) else hint
        options |= {"type": kind, "required": required, "choices": entry.metadata.get("choices")}
    if entry.default is not MISSING and entry.default is not None and hint is not bool:
        options["help"] += f" (default: {entry.default})"
    parser.add_argument(*names, **options)
