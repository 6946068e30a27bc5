"""A loaded text-to-image model: what the trainer, the evaluation and the embedded teacher's own training share."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from splam_core import NoiseSchedule
from splam_core.order import digest

from .architectures import latent_side

Conditioning = dict[str, Tensor]
PIXELS = 512 * 512  # of the pictures that a VAE takes at once, or of one larger one: its own activations are large
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def unet_arguments(conditioning: Conditioning, dtype: torch.dtype | None = None) -> dict:
    """A flat conditioning as keyword arguments of UNet2DConditionModel; text_embeds and time_ids are SDXL's."""
    # Sizes in pixels stay as they are: bf16 would round them.
    flat = {key: v if dtype is None or key == "time_ids" else v.to(dtype) for key, v in conditioning.items()}
    embeds = flat.pop("encoder_hidden_states")
    return {"encoder_hidden_states": embeds, **({"added_cond_kwargs": flat} if flat else {})}


@dataclass
class Pipeline:
    """SD1.x and SD2.x have one text encoder, SDXL has two. The encoders may sit on another device than the UNet."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    text_encoder: CLIPTextModel
    tokenizer: CLIPTokenizer
    schedule: NoiseSchedule
    scheduler_config: dict  # diffusers' scheduler_config.json, which `schedule` was read from
    text_encoder_2: CLIPTextModelWithProjection | None = None
    tokenizer_2: CLIPTokenizer | None = None
    zeros_for_empty: bool = False  # what SDXL's guidance takes for no prompt
    source: str = ""  # what was asked for
    _fingerprint: str | None = field(default=None, repr=False)
    _unet_fingerprint: str | None = field(default=None, repr=False)

    @property
    def prediction_type(self) -> str:
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def family(self) -> str:
        """ "sd1", "sd2" or "sdxl"; narrow models count as sd1."""
        if self.text_encoder_2 is not None:
            return "sdxl"
        return "sd2" if self.unet.config.cross_attention_dim == 1024 else "sd1"

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def vae_scale(self) -> int:
        """Pixels a latent's side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        side = latent_side(self.unet.config, self.family, self.prediction_type)
        return (self.unet.config.in_channels, side, side)

    @torch.no_grad()
    def encode(self, prompts: list[str], size: tuple[int, int] | None = None) -> Conditioning:
        """Flat UNet arguments of B prompts: "encoder_hidden_states" [B, 77, C], padded as Stable Diffusion does.

        SDXL adds "text_embeds" [B, C2] and "time_ids" [B, 6]: size (height, width in pixels; None: the model's own)
        as original and target size, no crop. In the encoders' own type, whatever autocast says.
        """
        with torch.autocast(self.text_encoder.device.type, enabled=False):
            return self._encode(prompts, size)

    def _encode(self, prompts: list[str], size: tuple[int, int] | None) -> Conditioning:
        if self.text_encoder_2 is None:
            hidden = self.text_encoder(self._tokens(self.tokenizer, self.text_encoder, prompts)).last_hidden_state
            return {"encoder_hidden_states": hidden.to(self.device)}
        first = self.text_encoder(
            self._tokens(self.tokenizer, self.text_encoder, prompts), output_hidden_states=True
        ).hidden_states[-2]
        second = self.text_encoder_2(
            self._tokens(self.tokenizer_2, self.text_encoder_2, prompts), output_hidden_states=True
        )
        height, width = size or [side * self.vae_scale for side in self.latent_shape[1:]]
        ids = torch.tensor([[height, width, 0, 0, height, width]], dtype=first.dtype, device=self.device)
        return {
            "encoder_hidden_states": torch.cat([first, second.hidden_states[-2]], dim=-1).to(self.device),
            "text_embeds": second.text_embeds.to(self.device),
            "time_ids": ids.expand(len(prompts), -1),
        }

    def unconditional(self, size: tuple[int, int] | None = None) -> Conditioning:
        """What guidance calls no prompt, [1, ...]: the empty prompt, or zeros where the model says so (SDXL)."""
        empty = self.encode([""], size)
        if not self.zeros_for_empty:
            return empty
        return {key: value if key == "time_ids" else torch.zeros_like(value) for key, value in empty.items()}

    def _tokens(self, tokenizer: CLIPTokenizer, text_encoder: torch.nn.Module, prompts: list[str]) -> Tensor:
        tokens = tokenizer(
            prompts,
            padding="max_length",
            truncation=True,
            max_length=text_encoder.config.max_position_embeddings,
            return_tensors="pt",
        )
        return tokens.input_ids.to(text_encoder.device)

    def too_long(self, prompts: list[str]) -> int:
        """How many prompts the text encoder sees only the first tokens of."""
        most = self.text_encoder.config.max_position_embeddings
        if not prompts:
            return 0
        # Cut one token later: transformers warns of what is not cut at all.
        return sum(len(ids) > most for ids in self.tokenizer(prompts, truncation=True, max_length=most + 1).input_ids)

    @torch.no_grad()
    def latents(self, images: Tensor, batch_size: int = 16) -> Tensor:
        """Pictures [B, 3, H, W] in [-1, 1] to latents [B, 4, H/8, W/8] of unit scale (the posterior's mean).

        In the VAE's own type, whatever autocast says, and no more than PIXELS of pictures at once.
        """
        vae = self._vae()
        with torch.autocast(vae.device.type, enabled=False):
            parts = images.split(self._at_once(images.shape[-2] * images.shape[-1], batch_size))
            means = [vae.encode(part.to(vae.device, vae.dtype)).latent_dist.mean for part in parts]
            return (torch.cat(means) * vae.config.scaling_factor).to(self.device)

    @torch.no_grad()
    def decode(self, latents: Tensor, batch_size: int = 16) -> Tensor:
        """Latents [B, 4, h, w] of unit scale to pictures [B, 3, 8h, 8w] in [-1, 1], under `latents`'s rules."""
        vae = self._vae()
        with torch.autocast(vae.device.type, enabled=False):
            latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor
            pixels = latents.shape[-2] * latents.shape[-1] * self.vae_scale**2
            parts = latents.split(self._at_once(pixels, batch_size))
            return torch.cat([vae.decode(part).sample.clamp(-1, 1) for part in parts])

    def _vae(self) -> AutoencoderKL:
        """The VAE, from now on in fp32 if it is in fp16 and overflows there (`force_upcast`, as SDXL's)."""
        if self.vae.dtype == torch.float16 and self.vae.config.force_upcast:
            torch.nn.Module.to(self.vae, torch.float32)
        return self.vae

    def _at_once(self, pixels: int, most: int) -> int:
        return max(1, min(most, PIXELS // pixels))

    def encoders_to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> None:
        """Move VAE and text encoders, which cached data do not need, and cast them to dtype; the UNet stays."""
        if dtype is not None:
            self.fingerprint()  # of what is on disk, before it is rounded
        for part in (self.vae, self.text_encoder, self.text_encoder_2):
            if part is not None:
                torch.nn.Module.to(part, device, dtype)

    def fingerprint(self) -> str:
        """Hash of the VAE's and the text encoders' weights as they were loaded: equal ones make equal latents and
        embeddings. For that of the weights on disk, load them in fp32."""
        if self._fingerprint is None:
            self._fingerprint = weights_hash(self.vae, self.text_encoder, self.text_encoder_2)
        return self._fingerprint

    def unet_fingerprint(self) -> str:
        """A quick hash of the UNet as it was loaded: names, shapes and the first values of each tensor, in bf16."""
        if self._unet_fingerprint is None:
            self._unet_fingerprint = digest([
                (name, list(weight.shape), weight.flatten()[:16].to(torch.bfloat16).float().tolist())
                for name, weight in sorted(self.unet.state_dict().items())
            ])  # fmt: skip
        return self._unet_fingerprint


def weights_hash(*parts: torch.nn.Module | Mapping[str, Tensor] | None) -> str:
    """SHA-256 (16 digits of it) over names, shapes and values; dtypes that hold the same numbers hash alike.

    Names are without "text_model.", which not every version of transformers has.
    """
    digest = hashlib.sha256()
    for part in parts:
        weights = part.state_dict() if isinstance(part, torch.nn.Module) else part or {}
        for name, weight in sorted((key.removeprefix("text_model."), weight) for key, weight in weights.items()):
            digest.update(f"{name} {tuple(weight.shape)}".encode())
            digest.update(weight.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]
