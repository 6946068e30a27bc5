"""A loaded text-to-image model: what the trainer, the evaluation and the embedded teacher's own training share."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from splam_core import NoiseSchedule

ASSETS = Path(__file__).resolve().parent.parent / "assets"
EMBEDDED = ASSETS / "embedded"
NAMED = {"embedded-teacher": EMBEDDED, "embedded-student": EMBEDDED / "student"}


@dataclass
class Pipeline:
    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    scheduler_config: dict  # diffusers' scheduler_config.json, which `schedule` was read from

    @property
    def prediction_type(self) -> str:
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        size = self.unet.config.sample_size
        return (self.unet.config.in_channels, size, size)

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Tensor:
        """[B, 77, C], padded with the end token as Stable Diffusion does."""
        tokens = self.tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=self.text_encoder.config.max_position_embeddings,
            return_tensors="pt",
        )
        return self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Latents [B, 4, h, w] of unit scale to pictures [B, 3, 8h, 8w] in [-1, 1]."""
        parts = (latents / self.vae.config.scaling_factor).split(batch_size)
        return torch.cat([self.vae.decode(part).sample for part in parts]).clamp(-1, 1)


def load_pipeline(
    model: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Pipeline:
    """A diffusers pipeline folder, a finished run's folder, a UNet folder, or a name of NAMED.

    What a UNet folder lacks is taken from the embedded pipeline.

    Raises FileNotFoundError if there is no such model. Reads safetensors only.
    """
    folder = NAMED.get(str(model), Path(model))
    if (folder / "pipeline" / "unet").is_dir():  # what training/distill.py leaves
        folder = folder / "pipeline"
    unet = folder if (folder / "diffusion_pytorch_model.safetensors").is_file() else folder / "unet"
    if not (unet / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} holds no model: expected a diffusers pipeline folder (with unet/config.json), a folder in "
            f"which training/distill.py finished, a UNet folder (with config.json and "
            f"diffusion_pytorch_model.safetensors), or one of {', '.join(NAMED)}"
        )
    rest = folder if (folder / "vae").is_dir() else EMBEDDED
    options = {"torch_dtype": dtype, "use_safetensors": True}
    scheduler = json.loads((rest / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
    parts = (
        UNet2DConditionModel.from_pretrained(unet, **options),
        AutoencoderKL.from_pretrained(rest, subfolder="vae", **options),
        CLIPTextModel.from_pretrained(rest, subfolder="text_encoder", **options),
    )
    return Pipeline(
        *(part.to(device).eval().requires_grad_(False) for part in parts),
        CLIPTokenizer.from_pretrained(rest, subfolder="tokenizer"),
        NoiseSchedule.from_config(scheduler).to(device),
        scheduler,
    )
