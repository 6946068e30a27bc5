"""What a LoRA's training step takes at Stable Diffusion's widths, and what a second process is worth.

Random weights, random latents: `benchmarks.training` asks for these rows with --only lora-memory scaling, and for the
true SD1.5's with --full-size.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn
from transformers import CLIPTextModel

from splam_core import NoiseSchedule, guided
from splam_core.recipe import LORA_TARGETS
from training.models.architectures import ARCHITECTURES
from training.models.pipeline import Conditioning, Pipeline
from training.run.config import Config, complete
from training.run.consistency import plain_attention
from training.run.counting import Living, rounded
from training.run.distillation import Distillation
from training.run.loop import train

from .parity import SHAPES
from .performance import paired_row

ROOT = Path(__file__).resolve().parents[1]
SIDE, TOKENS = 32, 77  # latents of 256x256 px


class RandomData:
    """Latents and prompt embeddings of a seed: what training data give, at no cost."""

    def __init__(self, width: int) -> None:
        self.width = width

    def batch(self, indices: range) -> tuple[Tensor, Conditioning]:
        draw = torch.Generator().manual_seed(indices.start)
        told = torch.randn(len(indices), TOKENS, self.width, generator=draw)
        return torch.randn(len(indices), 4, SIDE, SIDE, generator=draw), {"encoder_hidden_states": told}


class RandomPipeline(Pipeline):
    """One whose text encoder is not asked."""

    def unconditional(self) -> Conditioning:
        return RandomData(self.unet.config.cross_attention_dim).batch(range(1))[1]


def settings(folder: Path, **more: Any) -> Config:
    """Of an SD1.5's LoRA of rank 64 by the default recipe, fp32 on the CPU."""
    given = {"teacher": "embedded", "output_dir": folder, "lora": True, "lora_rank": 64, "teacher_dtype": "fp32"}
    plain = {"validation_samples": 0, "sample_every": 0, "checkpointing_steps": 10**9, "report_to": "none"}
    return complete({**given, **plain, "mixed_precision": "no", **more})


def random_run(shape: str, folder: Path, **more: Any) -> Distillation:
    """A run on a UNet of `benchmarks.parity`'s shapes."""
    torch.manual_seed(0)
    known = ARCHITECTURES["sd1"]
    unet = UNet2DConditionModel(**SHAPES[shape].unet).eval().requires_grad_(False)
    with torch.device("meta"):  # what training does not ask
        vae = AutoencoderKL(**known.vae)
    schedule = NoiseSchedule.from_config(known.scheduler)
    pipeline = RandomPipeline(unet, vae, None, None, schedule, known.scheduler)
    data = RandomData(unet.config.cross_attention_dim)
    return Distillation(settings(folder, **more), pipeline, Accelerator(cpu=True), data)


def bound_row(shape: str, title: str, batch: int, repeats: int, folder: Path, timed: Callable) -> dict:
    """train-bound of a LoRA's step, in turn with bare forwards of its frozen UNet; bound over ours."""
    run = random_run(shape, folder, train_batch_size=batch, max_train_steps=repeats + 2)
    steps, (latents, told) = train(run), run.data.batch(range(batch))

    @torch.no_grad()
    def bare() -> None:
        with plain_attention(latents.device), run.networks.use("teacher") as unet:
            unet(latents, torch.full((batch,), 499), **told)

    acts = [bare, lambda: next(steps)]
    for act in acts:
        act()
    found = list(zip(*([timed(act) for act in acts] for _ in range(repeats)), strict=True))
    bound = [seconds * run.config.unet_forwards_per_sample for seconds in found[0]]
    row = paired_row("train-bound", f"{title}, batch {batch}, k=150 in three", found[1], bound, "s a step")
    low, high = row["spread"]
    return {**row, "ratio": 1 / row["ratio"], "spread": [1 / high, 1 / low]}


def memory_row(shape: str, title: str, batch: int, folder: Path) -> dict:
    """lora-memory: bytes alive at the peak of two steps, ours by the presets' settings and the plain procedure's."""
    run = random_run(shape, folder, train_batch_size=batch, max_train_steps=9, gradient_checkpointing=True)
    steps = train(run)
    ours = _weights(run.networks.unet) + _peak(lambda: [next(steps) for _ in range(2)])
    config = run.config
    run.free()
    step, held = plain_lora(shape, batch, config)
    peer = _weights(*held) + _peak(lambda: [step() for _ in range(2)])
    return {
        "benchmark": "lora-memory", "shape": f"{title}, batch {batch}, fp32", "ours": ours / 1e9, "peer": peer / 1e9,
        "ratio": ours / peer, "spread": None, "unit": "GB",
    }  # fmt: skip


def _peak(work: Callable[[], Any]) -> int:
    with Living("cpu") as living:
        return living.peak_of(work)


def _weights(*modules: nn.Module) -> int:
    return sum(rounded(one.nbytes) for module in modules for one in module.parameters())


def plain_lora(shape: str, batch: int, config: Config) -> tuple[Callable[[], None], list[nn.Module]]:
    """A step of Algorithm 1 as one would write it down first, and the modules that it holds.

    Three UNets, two of them with an adapter; picture and caption encoded in the loop; nothing computed again.
    """
    torch.manual_seed(0)
    known = ARCHITECTURES["sd1"]
    teacher, student, target = (UNet2DConditionModel(**SHAPES[shape].unet).requires_grad_(False) for _ in range(3))
    for unet in (student, target):
        unet.add_adapter(LoraConfig(r=config.lora_rank, lora_alpha=config.lora_rank, target_modules=list(LORA_TARGETS)))
    target.requires_grad_(False)
    vae = AutoencoderKL(**known.vae).requires_grad_(False)
    text_encoder = CLIPTextModel(known.clip()).requires_grad_(False)
    learning = [one for one in student.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learning, config.learning_rate)
    schedule = NoiseSchedule.from_config(known.scheduler)
    objective = config.objective(schedule, "epsilon")

    def network(unet: nn.Module, told: Tensor) -> Callable:
        return lambda x, t, _: unet(x, t, encoder_hidden_states=told).sample

    def step() -> None:
        with torch.no_grad():
            latents = vae.encode(torch.randn(batch, 3, 8 * SIDE, 8 * SIDE)).latent_dist.mean
            told, empty = (text_encoder(torch.full((batch, TOKENS), token))[0] for token in (320, 49407))

        def asked(x: Tensor, t: Tensor) -> Tensor:
            with torch.no_grad():
                return guided(network(teacher, told)(x, t, None), network(teacher, empty)(x, t, None), 3.0)

        with plain_attention(latents.device):
            nets = network(student, told), network(target, told)
            loss = config.loss(objective, *nets, asked, latents, config.seed, range(batch))
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for average, own in zip(target.parameters(), student.parameters(), strict=True):
                average.lerp_(own, 1 - config.ema_decay)

    return step, [teacher, student, target, vae, text_encoder]


def scaling_rows(pairs: int, steps: int, folder: Path) -> list[dict]:
    """scaling: the embedded teacher's step of 32 by two gloo processes of a thread each over that by one, in turn."""
    seconds: dict[int, list[float]] = {1: [], 2: []}
    for pair in range(pairs):
        for processes in seconds:
            out = folder / f"scaling-{processes}-{pair}"
            flags = {
                "--teacher": "embedded", "--output-dir": out, "--train-batch-size": 32 // processes,
                "--max-train-steps": steps, "--num-scenes": 64, "--teacher-dtype": "fp32",
                "--validation-samples": 0, "--sample-every": 0, "--report-to": "none",
                "--checkpointing-steps": 10**9,
            }  # fmt: skip
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
            words = [str(word) for flag in flags.items() for word in flag]
            subprocess.run(
                [*command, str(ROOT / "training" / "distill.py"), *words], check=True, capture_output=True,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
            lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
            seconds[processes].append(median(json.loads(line)["seconds"] for line in lines[1:]))
    shape = f"embedded, whole, batch 32: two gloo processes of a thread each, medians of {steps - 1} steps"
    return [paired_row("scaling", shape, seconds[2], seconds[1], "s a step")]
