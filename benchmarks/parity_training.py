"""Rows of benchmarks/parity.py for what training makes of a v model with zero terminal SNR: its losses and its files.

Route "trainer": the loss of a sample by the trainer, in float32, beside the formulas in float64: the paper's eq. 12-18
and 26-28, v as Salimans & Ho (2022) define it, the teacher's steps by diffusers' DDIMScheduler; as a share of the loss.
The largest of the samples, whose timesteps are TIMESTEPS. Route "export": files of a run of one step, drawn by SPLAM
Loader and SPLAM Sampler, beside diffusers on the folder that the same run wrote.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch
from diffusers import DDIMScheduler
from safetensors.torch import load

from harness.graphs import save_latent, text_to_image
from harness.reference import SCHEDULER, few_step, load_unet, node_noises, relative_error, scheduler_of, write_pipeline
from harness.server import ComfyServer
from splam_core import renoise_generator
from training.distill import distill
from training.models.load import load_pipeline
from training.models.sampling import generate
from training.run.config import Config, parse
from training.run.consistency import Consistency

PARAMETRISATION = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
CONFIG = SCHEDULER | PARAMETRISATION
NAME = "v-zero-snr"
PROMPT, SEED, W, SIZE = "a yellow star on a red background", 1234, 3.0, (4, 16, 16)
TIMESTEPS = (999, 998, 759, 499, 259, 79)
GAMMAS = (0.5, 0.25, 1.0, 0.75, 0.1, 0.0)
RECIPES = {
    "splam": ("--method", "splam"),
    "splam, gamma as a noise level": ("--method", "splam", "--gamma-conditioning", "noise-level"),
    "dl": ("--method", "dl"),
    "lcm": ("--method", "lcm"),
}
STEPS = (1, 2, 4, 8)


def write_teacher(models: Path) -> Path:
    """A narrow v model of random weights whose schedule ends in noise alone."""
    return write_pipeline(models / "diffusers" / NAME, scheduler=PARAMETRISATION, seed=3)


def _arguments(teacher: Path, *more: str) -> Config:
    return parse(["--teacher", str(teacher), "--recipe", "paper", "--guidance-scale", str(W), *more])


def trainer_rows(teacher: Path) -> Iterator[dict]:
    """The losses of the four recipes, and the pictures that the trainer draws."""
    pipeline = load_pipeline(teacher, torch.device("cpu"))
    known, nothing = (pipeline.encode([prompt] * len(TIMESTEPS)) for prompt in (PROMPT, ""))
    generator = torch.Generator().manual_seed(SEED)
    latents, noise = torch.randn((2, len(TIMESTEPS), *SIZE), generator=generator)
    t, gamma = torch.tensor(TIMESTEPS), torch.tensor(GAMMAS)
    table = scheduler_of(DDIMScheduler, CONFIG).alphas_cumprod.double()
    levels = table[t][:, None, None, None]
    x_t = (levels.sqrt() * latents + (1 - levels).sqrt() * noise).float()
    v = V(pipeline.unet, known["encoder_hidden_states"], nothing["encoder_hidden_states"])
    for name, flags in RECIPES.items():
        config = _arguments(teacher, *flags)
        found = _trained(config, pipeline, known, nothing, x_t, t, gamma)
        expected = _losses(config, table, v, x_t.double(), t, gamma.double())
        yield _row(f"{NAME} loss, {name}", 1, "trainer", ((found - expected).abs() / expected).max().item())
    for steps in STEPS:
        found = generate(pipeline, [PROMPT], [SEED], steps=steps)
        begun, _ = node_noises((1, *SIZE), SEED)
        expected = few_step(load_unet(teacher), CONFIG, known["encoder_hidden_states"][:1], begun, _fresh(), steps)
        yield _row(f"{NAME} txt2img", steps, "trainer", relative_error(found, expected))


def _row(case: str, steps: int, route: str, error: float) -> dict:
    return {"case": case, "steps": steps, "route": route, "error": error}


def _fresh():
    """The trainer's noises between its steps, from the generator that a seed names."""
    again = renoise_generator(SEED)
    return lambda x, _: torch.randn(x.shape[1:], generator=again)[None]


def _trained(config: Config, pipeline, known, nothing, x_t, t, gamma) -> torch.Tensor:
    """Losses [B] by the trainer's own stage and objective; the student and its target are the teacher's UNet."""
    objective = config.objective(pipeline.schedule, pipeline.prediction_type)

    def net(*_):
        return lambda x, t, gamma: pipeline.unet(x, t, **known).sample

    def loss(objective, student, target, teacher, *_):
        return objective(student, target, teacher, x_t, t, gamma)

    asked = SimpleNamespace(guidance_scale=W, seed=0, loss=loss)
    stage = Consistency(asked, pipeline, nothing, SimpleNamespace(net=net), objective)
    with torch.no_grad():
        ((_, found),) = stage.losses(x_t, known, range(len(t)))
    return found.double()


class V:
    """The network's raw output in float64, and with guidance."""

    def __init__(self, unet, known: torch.Tensor, nothing: torch.Tensor) -> None:
        self.unet = type(unet).from_config(unet.config).eval().double()
        self.unet.load_state_dict(unet.state_dict())
        self.known, self.nothing = known.double(), nothing.double()

    @torch.no_grad()
    def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.unet(x, t, self.known).sample

    @torch.no_grad()
    def guided(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return W * self.unet(x, t, self.known).sample + (1 - W) * self.unet(x, t, self.nothing).sample


def _losses(config: Config, table: torch.Tensor, v: V, x_t: torch.Tensor, t: torch.Tensor, gamma: torch.Tensor):
    """Losses [B] in float64, written out; table: alpha(t)^2."""
    wide = (slice(None), None, None, None)

    def level(t):
        return table[t].sqrt()[wide], (1 - table[t]).sqrt()[wide]

    def scalings(t):  # LCM's, eq. 5
        u = 10.0 * t.double()[wide]
        return 0.25 / (u**2 + 0.25), u / (u**2 + 0.25).sqrt()

    def consistent(x, alpha, sigma, t, seen):
        """F of eq. 14 and 16; v is that of x/n, on the unit circle."""
        n = (alpha**2 + sigma**2).sqrt()
        x0 = alpha / n * (x / n) - sigma / n * v(x, seen)
        c_skip, c_out = scalings(t)
        return c_skip * x + c_out * x0

    # eq. 18, by diffusers: k/k_phi steps of DDIM with the guided v.
    x_s, s = x_t, t
    scheduler = scheduler_of(DDIMScheduler, CONFIG)
    scheduler.alphas_cumprod = table
    scheduler.final_alpha_cumprod = table[0]
    scheduler.set_timesteps(1000 // config.solver_skip)
    for _ in range(config.skip // config.solver_skip):
        output = v.guided(x_s, s)
        stepped = [
            scheduler.step(output[i : i + 1], int(s[i]), x_s[i : i + 1]).prev_sample if s[i] > 0 else x_s[i : i + 1]
            for i in range(len(t))
        ]
        x_s, s = torch.cat(stepped), (s - config.solver_skip).clamp(min=0)
    goal = consistent(x_s, *level(s), s, s)
    (alpha_t, sigma_t), (alpha_s, sigma_s), g = level(t), level(s), gamma[wide]
    if config.method == "lcm":
        g = torch.ones_like(g)
    start = torch.ones_like(alpha_t) if config.method == "dl" else alpha_t / alpha_s
    x = (1 - g) * start * x_s + g * x_t  # eq. 12 and 26
    alpha = (1 - g) * start * alpha_s + g * alpha_t  # eq. 24 and 28
    sigma = (1 - g) * start * sigma_s + g * sigma_t
    seen = t.double()
    if config.conditioning == "noise-level" and config.method != "lcm":
        # Back on the path of the schedule, at the fractional timestep of this noise level.
        n = (alpha**2 + sigma**2).sqrt()
        x, alpha, sigma = x / n, alpha / n, sigma / n
        along = ((1 - table).sqrt() / table.sqrt()).log()
        seen = torch.from_numpy(np.interp((sigma / alpha).log().flatten(), along, np.arange(len(table))))
    difference = consistent(x, alpha, sigma, t, seen) - goal
    return ((difference**2 + config.huber_c**2).sqrt() - config.huber_c).flatten(1).mean(1)


def export(teacher: Path, models: Path, folder: Path) -> dict[str, Path]:
    """One step of training at a rate that shows, of whole weights and of a LoRA: files where the host looks."""
    more = "--data embedded --num-scenes 8 --num-held-out 4 --no-cache-latents --max-train-steps 1 --train-batch-size 2"
    more += " --sample-every 0 --validation-samples 0 --lr-warmup-steps 0 --report-to none --learning-rate 1e-3"
    more += " --export-dtype fp32 --release-decay 0 --ema-decay 0"
    folders = {}
    with mock.patch.dict(os.environ, {"SPLAM_CACHE": str(folder / "cache")}):
        for kind, flags in (("full", ""), ("lora", " --lora --lora-rank 4")):
            out = folders[kind] = folder / kind
            distill(_arguments(teacher, *(more + flags).split(), "--output-dir", str(out), "--name", f"{NAME}-{kind}"))
            gc.collect()
    shutil.copytree(folders["full"] / "pipeline", models / "diffusers" / f"{NAME}-student")
    for source, place in (("full", "checkpoints"), ("lora", "loras")):
        (models / place).mkdir(exist_ok=True)
        (file,) = folders[source].glob("*.safetensors")
        shutil.copy(file, models / place / f"{NAME}.safetensors")
    return {kind: out / "pipeline" for kind, out in folders.items()}


def export_rows(server: ComfyServer, teacher: Path, exported: dict[str, Path]) -> Iterator[dict]:
    """The folder, the single file and the LoRA on its teacher, by the host."""
    embeds = load_pipeline(teacher, torch.device("cpu")).encode([PROMPT])["encoder_hidden_states"]
    forms = {
        "folder": (f"diffusers/{NAME}-student", "full"),
        "single file": (f"{NAME}.safetensors", "full"),
        "LoRA": (f"diffusers/{NAME}", "lora"),
    }
    for form, (model_name, kind) in forms.items():
        unet = load_unet(exported[kind])
        for steps in STEPS:
            graph = text_to_image(model_name, PROMPT, seed=SEED, steps=steps)
            if kind == "lora":
                inputs = {"model": ["model", 0], "lora_name": f"{NAME}.safetensors", "strength_model": 1.0}
                graph["lora"] = {"class_type": "SPLAMLoraLoader", "inputs": inputs | {"strength_clip": 1.0}}
                graph["sampled"]["inputs"]["model"] = ["lora", 0]
            (file,) = server.files(server.run(save_latent(graph)))
            found = load(file)["latent_tensor"] * 0.31
            expected = few_step(unet, CONFIG, embeds, *node_noises((1, *SIZE), SEED), steps)
            yield _row(f"{NAME} exported, {form}", steps, "export", relative_error(found, expected))
