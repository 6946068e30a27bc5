"""The explicit diffusers loop that hosts are compared with, and pipelines of random weights to run it on."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, LCMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}


def write_pipeline(
    folder: Path, *, cond_proj: bool = False, prediction_type: str = "epsilon", seed: int = 0, **unet
) -> Path:
    """A StableDiffusionPipeline folder in the embedded pipeline's shape, which `unet` options change.

    Weights are fp16, so that a host that keeps its text encoder in fp16 loses nothing.
    """
    torch.manual_seed(seed)
    options = {
        "sample_size": 16,
        "block_out_channels": (64, 128, 128),
        "layers_per_block": 1,
        "cross_attention_dim": 64,
        "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "time_cond_proj_dim": 256 if cond_proj else None,
    }
    _save(UNet2DConditionModel(**(options | unet)), folder / "unet")
    autoencoder = AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        norm_num_groups=8,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=128,
        scaling_factor=0.31,
    )
    _save(autoencoder, folder / "vae")
    text = CLIPTextConfig(
        vocab_size=49408,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=77,
        hidden_act="quick_gelu",
    )
    _save(CLIPTextModel(text), folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(SCHEDULER | {"prediction_type": prediction_type})
    )
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save(model, folder: Path) -> None:
    model.half().save_pretrained(folder)


class Reference:
    """diffusers' classes on one pipeline folder, in fp32 on the CPU."""

    def __init__(self, folder: Path):
        self.unet = UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()
        self.text_encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
        self.vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=torch.float32).eval()
        self.scheduler_config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())

    @torch.no_grad()
    def embed(self, token_ids: list[int]) -> torch.Tensor:
        """Prompt embeddings [1, 77, C] of CLIP token ids, padded with the end token."""
        padded = token_ids + [49407] * (77 - len(token_ids))
        return self.text_encoder(torch.tensor([padded]))[0]

    @torch.no_grad()
    def decode(self, latents) -> torch.Tensor:
        """Pictures [B, H, W, 3] in [0, 1] of latents in the pipeline's scale."""
        pictures = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        return (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)

    @torch.no_grad()
    def few_step(
        self, embeds, noise, fresh_noise, steps: int, strength: float = 1.0, image=None, guidance_scale: float = 1.0
    ):
        """LCMScheduler's loop on latents in the pipeline's scale; `fresh_noise(x)` replaces the scheduler's own draws.

        image: latents to start from; None for text-to-image. guidance_scale: what a UNet with time_cond_proj is told.
        """
        scheduler = LCMScheduler.from_config(self.scheduler_config)
        scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
        if image is None:
            x = noise * scheduler.init_noise_sigma
        else:
            x = scheduler.add_noise(image, noise, scheduler.timesteps[:1])
        condition = None
        if self.unet.config.time_cond_proj_dim:
            condition = guidance_embedding(torch.tensor([guidance_scale - 1.0]), self.unet.config.time_cond_proj_dim)
        for i, t in enumerate(scheduler.timesteps):
            output = self.unet(x, t, embeds.expand(len(x), -1, -1), timestep_cond=condition).sample
            # step() would draw the noise itself: its denoised half is taken, and the noise added by add_noise.
            x0 = scheduler.step(output, t, x, return_dict=True).denoised
            x = (
                scheduler.add_noise(x0, fresh_noise(x0), scheduler.timesteps[i + 1 : i + 2])
                if i + 1 < len(scheduler.timesteps)
                else x0
            )
        return x


def guidance_embedding(w: torch.Tensor, dim: int) -> torch.Tensor:
    """What diffusers' LCM pipeline feeds to time_cond_proj, by its formula."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * w[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
