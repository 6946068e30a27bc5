"""How a student is trained: the settings of Algorithm 1, and the table of recipes."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .denoiser import Denoiser, Network
from .draws import draw_timesteps, draws, sample_gamma
from .objective import METHODS, Objective, l2, pseudo_huber, subpath_for
from .sampler import add_noise
from .schedule import NoiseSchedule
from .solver import SOLVERS, Teacher

LORA_TARGETS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2",
    "conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
# A LoRA learns at a higher rate than whole weights.
LORA_LEARNING_RATE = 1e-4
# "default" is what docs/reproduction.md found best, and stands in the fields of Recipe; "paper" is Algorithm 1 with the
# settings of the paper's section 4.1.
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


def setting(default: Any, help: str, choices: tuple[str, ...] | None = None) -> Any:
    """A dataclass field with what `training.flags` makes a flag of."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What is drawn, what is asked of the student and how it is averaged; every field's `help` says what it is.

    Raises ValueError, in the words of the command line's flags, for settings that do not go together.
    """

    method: str = setting(
        "splam", "SLAD (eq. 17), latent consistency (eq. 7) or Direct Linking (eq. 27)", ("splam", "lcm", "dl")
    )
    guidance_scale: float = setting(3.0, "w of eq. 18: eps = w*cond + (1-w)*uncond, so that 1 is no guidance")
    skip: int = setting(150, "k: timesteps that one sub-path spans")
    solver: str = setting("dpm-solver++", "the teacher's; dpm-solver++ is of second order, ddim the paper's", SOLVERS)
    solver_skip: int = setting(
        50, "k_phi: timesteps of a teacher step, of which k/k_phi make the Multiple Estimation; if only k is set, less"
    )
    gamma_conditioning: str = setting("noise-level", "how the student is told gamma", ("embedding", "noise-level"))
    gamma_bandwidth: float = setting(1000.0, "of the gamma embedding; 10000 is the authors'")
    gamma_one_probability: float = setting(
        0.75, "share of draws at exactly gamma = 1, the point that sampling uses; 0 is the paper's"
    )
    timestep_power: float = setting(
        0.5, "timesteps are drawn in proportion to t to this power: few steps are made high up; 0 is the paper's"
    )
    sigma_level: str = setting("linear", "noise level inside a sub-path", ("linear", "independent"))
    loss_type: str = setting("huber", "pseudo-Huber or squared error", ("huber", "l2"))
    huber_c: float = setting(1e-3, "where pseudo-Huber turns from quadratic to linear")
    ema_decay: float = setting(0.95, "of the target network")
    release_decay: float = setting(
        0.99, "of a slower average, which is exported if it scores better than the target; 0 for none"
    )

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"--method must be one of {', '.join(METHODS)}, got {self.method}")
        if self.skip < 1 or self.solver_skip < 1 or self.skip % self.solver_skip:
            raise ValueError(f"--solver-skip must divide --skip, got {self.solver_skip} and {self.skip}")
        if not 0 <= self.gamma_one_probability <= 1:
            raise ValueError(f"--gamma-one-probability must be between 0 and 1, got {self.gamma_one_probability}")
        if not self.huber_c > 0:
            raise ValueError(f"--huber-c must be above 0, got {self.huber_c}")
        if not self.timestep_power >= 0:
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
    def conditioning(self) -> str:
        """How the student is told gamma; LCM has none to tell."""
        return "noise-level" if self.method == "lcm" else self.gamma_conditioning

    @property
    def unet_forwards_per_sample(self) -> int:
        """Cost of a training sample: guided teacher steps count 2, the backward pass 2, student and target 1 each."""
        return (1 if self.guidance_scale == 1 else 2) * (self.skip // self.solver_skip) + 1 + 2 + 1

    def objective(self, schedule: NoiseSchedule, prediction_type: str) -> Objective:
        """The loss of this recipe for a teacher of this noise schedule and prediction type."""
        subpath = subpath_for(self.method, schedule, self.sigma_level)
        denoiser = Denoiser(schedule, prediction_type, self.conditioning, subpath)
        distance = l2 if self.loss_type == "l2" else partial(pseudo_huber, c=self.huber_c)
        return Objective(denoiser, self.method, self.skip, self.solver_skip, distance, self.solver)

    def loss(
        self,
        objective: Objective,
        student: Network,
        target: Network,
        teacher: Teacher,
        latents: Tensor,
        seed: int,
        indices: range,
    ) -> Tensor:
        """Algorithm 1's loss [], the mean over the samples of these indices, whose latents are [B, C, h, w].

        Noise, timesteps and gammas are those that `draws` gives a run of this seed for the indices.
        """
        schedule = objective.denoiser.schedule
        noise, u_t, u_gamma = (on_device(part, latents.device) for part in draws(seed, indices, latents.shape[1:]))
        t = draw_timesteps(u_t, schedule.num_train_timesteps, self.timestep_power)
        gamma = sample_gamma(u_gamma, self.gamma_one_probability)
        x_t = add_noise(latents, noise, t, schedule)
        loss = objective(student, target, teacher, x_t, t, gamma)
        assert isinstance(loss, Tensor)
        return loss.mean()


def on_device(part: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU."""
    # From pinned memory a copy is not waited for.
    return part.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else part.to(device)
