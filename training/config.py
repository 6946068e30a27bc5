"""The settings of a distillation: one dataclass, whose fields are the command's flags."""

from __future__ import annotations

import argparse
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import get_args, get_origin, get_type_hints


def _flag(default, help: str, choices: tuple[str, ...] | None = None):
    return field(default=default, metadata={"help": help, "choices": choices})


_OUTPUT = Path("runs/distill")


@dataclass(frozen=True)
class Config:
    """Flag names are those of diffusers' training scripts where they mean the same."""

    teacher: str = field(metadata={"help": "'embedded', or a diffusers pipeline folder of its kind"})
    output_dir: Path = _flag(_OUTPUT, "checkpoints, log, sheets and the finished student go here")  # noqa: RUF009
    method: str = _flag(
        "splam", "SLAD (eq. 17), latent consistency (eq. 7) or Direct Linking (eq. 27)", ("splam", "lcm", "dl")
    )
    max_train_steps: int = _flag(1300, "optimizer steps")
    train_batch_size: int = _flag(32, "pictures a step and process")
    learning_rate: float = _flag(3e-4, "AdamW's; 8e-6 is the paper's for SD1.5 at batch 1024")
    weight_decay: float = _flag(0.0, "AdamW's")
    lr_warmup_steps: int = _flag(50, "steps over which the learning rate rises")
    lr_scheduler: str = _flag("cosine", "how the learning rate goes on", ("constant", "cosine"))
    max_grad_norm: float = _flag(10.0, "gradients are clipped to this norm")
    guidance_scale: float = _flag(3.0, "w of eq. 18: eps = w*cond + (1-w)*uncond, so that 1 is no guidance")
    skip: int = _flag(100, "k: timesteps that one sub-path spans")
    solver_skip: int = _flag(20, "k_phi: timesteps of one DDIM step; k/k_phi of them make the Multiple Estimation")
    gamma_conditioning: str = _flag("noise-level", "how the student is told gamma", ("embedding", "noise-level"))
    gamma_bandwidth: float = _flag(1000.0, "of the gamma embedding; 10000 is the authors'")
    gamma_one_probability: float = _flag(
        0.5, "share of draws at exactly gamma = 1, the point that sampling uses; 0 is the paper's"
    )
    sigma_level: str = _flag("linear", "noise level inside a sub-path", ("linear", "independent"))
    loss_type: str = _flag("huber", "pseudo-Huber or squared error", ("huber", "l2"))
    huber_c: float = _flag(1e-3, "where pseudo-Huber turns from quadratic to linear")
    ema_decay: float = _flag(0.95, "of the target network, which is what is exported")
    num_scenes: int = _flag(4096, "size of the pool of training pictures (embedded teacher)")
    mixed_precision: str = _flag("no", "forward passes in this type; weights stay fp32", ("no", "bf16", "fp16"))
    teacher_dtype: str = _flag(
        "bf16", "of the frozen teacher; a rounding in it hardly moves x_s", ("fp32", "fp16", "bf16")
    )
    compile: bool = _flag(False, "torch.compile the UNets: a minute at the start, faster steps after it")
    checkpointing_steps: int = _flag(150, "steps between two checkpoints")
    checkpoints_total_limit: int = _flag(2, "checkpoints kept")
    resume_from_checkpoint: str | None = _flag(None, "'latest', or a checkpoint folder")
    sample_every: int = _flag(150, "steps between two sheets (teacher 50 steps; student 1, 2, 4); 0 for none")
    export_dtype: str = _flag("fp16", "of the finished student", ("fp32", "fp16", "bf16"))
    name: str = _flag("student", "the single file is OUTPUT_DIR/NAME.splam.safetensors")
    seed: int = _flag(0, "every random number is a function of this and of the sample's index")

    def __post_init__(self) -> None:
        if self.solver_skip < 1 or self.skip % self.solver_skip:
            raise ValueError(f"--solver-skip must divide --skip, got {self.solver_skip} and {self.skip}")
        for name in ("max_train_steps", "train_batch_size", "checkpointing_steps", "num_scenes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} must be 1 or more, got {getattr(self, name)}")

    @property
    def unet_forwards_per_sample(self) -> int:
        """Cost of a training sample: guided teacher steps count 2, the backward pass 2, student and target 1 each."""
        return 2 * (self.skip // self.solver_skip) + 1 + 2 + 1


def parse(arguments: list[str] | None = None, description: str | None = None) -> Config:
    """A Config from the command line; `--some-flag` and `--some_flag` are one."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    hints = get_type_hints(Config)
    for entry in fields(Config):
        names = {f"--{entry.name.replace('_', '-')}", f"--{entry.name}"}
        options: dict = {"dest": entry.name, "help": entry.metadata["help"].replace("%", "%%")}
        required = entry.default is MISSING
        hint = hints[entry.name]
        if hint is bool:
            options |= {"action": argparse.BooleanOptionalAction, "default": entry.default}
        else:
            kind = next(one for one in get_args(hint) if one is not type(None)) if get_origin(hint) else hint
            options |= {"type": kind, "required": required, "choices": entry.metadata.get("choices")}
            if not required:
                options["default"] = entry.default
                options["help"] += f" (default: {entry.default})"
        parser.add_argument(*sorted(names), **options)
    parsed = vars(parser.parse_args(arguments))
    try:
        return Config(**parsed)
    except ValueError as error:
        parser.error(str(error))
