"""The shapes of Stable Diffusion 1.x, 2.x and XL: what a single file and `--plan` cannot read from a folder."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from transformers import CLIPTextConfig

Settings = dict[str, Any]

_VAE: Settings = {
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SCHEDULER: Settings = {
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
_CLIP_L: Settings = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "projection_dim": 768,
    "hidden_act": "quick_gelu",
}


@dataclass(frozen=True)
class Architecture:
    """diffusers' and transformers' settings of the parts, what the published models' config.json files say."""

    unet: Settings
    vae: Settings
    text_encoder: Settings
    text_encoder_2: Settings | None = None
    scheduler: Settings = field(default_factory=lambda: dict(_SCHEDULER))

    def clip(self, second: bool = False) -> CLIPTextConfig:
        return CLIPTextConfig(**(self.text_encoder_2 if second else self.text_encoder))


ARCHITECTURES = {
    "sd1": Architecture(
        unet={"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        vae={**_VAE, "sample_size": 512, "scaling_factor": 0.18215},
        text_encoder=_CLIP_L,
    ),
    "sd2": Architecture(
        unet={
            "sample_size": 64,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        vae={**_VAE, "sample_size": 768, "scaling_factor": 0.18215},
        # OpenCLIP's ViT-H without its last layer: Stable Diffusion 2 reads the one before.
        text_encoder={
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 23,
            "num_attention_heads": 16,
            "projection_dim": 512,
            "hidden_act": "gelu",
        },
    ),
    "sdxl": Architecture(
        unet={
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "use_linear_projection": True,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
        },
        vae={**_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True},
        text_encoder=_CLIP_L,
        text_encoder_2={
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "projection_dim": 1280,
            "hidden_act": "gelu",
        },
    ),
}


def latent_side(unet: Settings, family: str, prediction_type: str = "epsilon") -> int:
    """The side of the square latents that a UNet's config.json names or, where it names none, of its family's.

    Raises ValueError for latents that are not square.
    """
    said = unet.get("sample_size")
    if said is None:
        if family == "sd2" and prediction_type == "v_prediction":  # Stable Diffusion 2's v models: 768 px
            return 96
        return ARCHITECTURES[family].unet["sample_size"]
    sides = set(said) if isinstance(said, (list, tuple)) else {said}
    if len(sides) != 1 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"the UNet's config.json says {said!r:.40} for sample_size; expected a number, or it twice")
    return sides.pop()
