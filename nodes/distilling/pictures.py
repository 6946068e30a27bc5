"""What is shown of a run: student beside teacher for the same prompts and seeds, labelled, and the loss curve."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from ...splam_core.denoiser import Denoiser
from ...splam_core.sampler import fresh_noise, sample
from ...splam_core.schedule import few_step_timesteps
from ...splam_core.solver import draw_latents
from ..host import Vae
from .host import HostUNet, Told

STUDENT_STEPS, TEACHER_STEPS = 4, 20


@torch.no_grad()
def teacher_latents(
    host: HostUNet, told: Sequence[Told], nothing: Told, shape: tuple[int, int, int], guidance: float, steps: int
) -> torch.Tensor:
    """[B, C, h, w] on the CPU, picture i from seed i, with guidance. The UNet is loaded, without adapters."""
    made = [
        draw_latents(host.guided_epsilon([one], nothing, guidance), _noise(seed, shape, host), host.schedule, steps)
        for seed, one in enumerate(told)
    ]
    return torch.cat(made).cpu()


@torch.no_grad()
def student_latents(
    host: HostUNet, denoiser: Denoiser, told: Sequence[Told], shape: tuple[int, int, int], steps: int
) -> torch.Tensor:
    """[B, C, h, w] on the CPU, picture i from seed i, as SPLAM Sampler makes it. The UNet is the student's."""
    made = []
    for seed, one in enumerate(told):

        def denoise(x: torch.Tensor, t: torch.Tensor, one: Told = one) -> torch.Tensor:
            return denoiser(lambda x, t, _: host(x, t, [one]), x, None, None, t)

        timesteps = few_step_timesteps(steps, num_train_timesteps=host.schedule.num_train_timesteps)
        start, fresh = _noise(seed, shape, host), fresh_noise(seed, [0])
        made.append(sample(denoise, start, timesteps, host.schedule, fresh))
    return torch.cat(made).cpu()


def _noise(seed: int, shape: tuple[int, int, int], host: HostUNet) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))[None].to(host.device)


def to_images(host: HostUNet, vae: Vae | None, latents: torch.Tensor, side: int = 256) -> list[Image.Image]:
    """Latents [B, C, h, w] of the UNet's scale as pictures: the VAE's, or without one the host's rough colours."""
    if vae is not None:
        pixels = vae.decode(host.base.process_latent_out(latents))[..., :3]
    else:
        form = host.base.latent_format
        factors = torch.tensor(form.latent_rgb_factors, dtype=torch.float32)
        bias = getattr(form, "latent_rgb_factors_bias", None)
        pixels = (latents.permute(0, 2, 3, 1) @ factors + (0.0 if bias is None else torch.tensor(bias)) + 1) / 2
    levels = (pixels.detach().float().cpu().clamp(0, 1) * 255).round().byte().numpy()
    pictures = [Image.fromarray(level) for level in levels]
    scale = [side / max(one.size) for one in pictures]
    return [
        one.resize((round(one.width * k), round(one.height * k)), Image.Resampling.BICUBIC)
        for one, k in zip(pictures, scale, strict=True)
    ]


def sheet(
    columns: Sequence[tuple[str, Sequence[Image.Image]]], lines: Sequence[str] = (), losses: Sequence[float] = ()
) -> Image.Image:
    """A grid with one titled column for each (title, pictures); below it lines of text, and the loss over the steps."""
    width, height = columns[0][1][0].size
    size = max(11, height // 16)
    font, row = ImageFont.load_default(size=size), int(size * 1.7)
    whole, grid = len(columns) * (width + 4) + 4, row + len(columns[0][1]) * (height + 4)
    curve = height // 2 if len(losses) > 1 else 0
    image = Image.new("RGB", (whole, grid + row * len(lines) + (curve + 12 if curve else 0) + 4), "white")
    draw = ImageDraw.Draw(image)
    for number, (title, pictures) in enumerate(columns):
        left = 4 + number * (width + 4)
        draw.text((left + width / 2, row / 2), title, "black", font, anchor="mm")
        for place, picture in enumerate(pictures):
            image.paste(picture, (left, row + place * (height + 4)))
    for number, line in enumerate(lines):
        draw.text((6, grid + row * number + row / 2), line, "black", font, anchor="lm")
    if curve:
        top = grid + row * len(lines) + 6
        points = _curve(losses, whole - 12, curve)
        draw.rectangle((6, top, whole - 6, top + curve), outline="#bbbbbb")
        draw.line([(6 + x, top + y) for x, y in points], fill="#1f5fbf", width=2)
    return image


def _curve(losses: Sequence[float], width: int, height: int) -> list[tuple[float, float]]:
    """The loss over the steps, logarithmic, each point the mean of a hundredth of the run."""
    parts = np.array_split(np.asarray(losses, dtype=float), min(100, len(losses)))
    levels = [math.log(max(1e-12, float(part.mean()))) for part in parts]
    low, high = min(levels), max(levels)
    span = (high - low) or 1.0
    return [
        (width * number / max(1, len(levels) - 1), 4 + (height - 8) * (high - level) / span)
        for number, level in enumerate(levels)
    ]


def to_tensor(image: Image.Image) -> torch.Tensor:
    """An IMAGE [1, H, W, 3] of the host's."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0)[None]
