"""What hosts are compared with: an explicit loop over diffusers' UNet and LCMScheduler, on random weights."""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import diffusers
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    TCDScheduler,
    UNet2DConditionModel,
)
from peft import LoraConfig, get_peft_model_state_dict
from transformers import CLIPTextConfig, CLIPTextModel

from training.models.teachers import EMBEDDED

LORA_TARGETS = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
)

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

# A small Stable Diffusion, with attention at both lower levels and in the middle as there.
UNET = {
    "block_out_channels": [64, 128, 128],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 64,
}
TEXT_ENCODER = {"hidden_size": 64, "intermediate_size": 256, "projection_dim": 64}


def write_pipeline(
    folder: Path,
    *,
    cond_proj: bool = False,
    prediction_type: str = "epsilon",
    scheduler: dict | None = None,
    seed: int = 0,
    scaling_factor: float = 0.31,
    **unet,
) -> Path:
    """A StableDiffusionPipeline folder of UNET's shape, which `unet` options change.

    scheduler: what its scheduler_config.json says beside SCHEDULER. Weights are fp16, so that a host that keeps its
    text encoder in fp16 loses nothing.
    """
    torch.manual_seed(seed)
    shapes = UNet2DConditionModel.load_config(EMBEDDED / "unet") | UNET
    shapes |= {"time_cond_proj_dim": 256 if cond_proj else None} | unet
    _save(UNet2DConditionModel.from_config(shapes), folder / "unet")
    autoencoder = AutoencoderKL.load_config(EMBEDDED / "vae") | {"scaling_factor": scaling_factor}
    _save(AutoencoderKL.from_config(autoencoder), folder / "vae")
    text = CLIPTextConfig.from_pretrained(EMBEDDED / "text_encoder", **TEXT_ENCODER)
    _save(CLIPTextModel(text), folder / "text_encoder")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(
        json.dumps(SCHEDULER | {"prediction_type": prediction_type} | (scheduler or {}))
    )
    index = {"_class_name": "StableDiffusionPipeline", "unet": ["diffusers", "UNet2DConditionModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def _save(model, folder: Path) -> None:
    model.half().save_pretrained(folder)


class Reference:
    """diffusers' classes on one pipeline folder, in fp32 on the CPU."""

    def __init__(self, folder: Path):
        self.unet = load_unet(folder)
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

    def few_step(self, embeds, noise, fresh_noise, steps: int, **options) -> torch.Tensor:
        """`few_step` on this pipeline's UNet and schedule."""
        return few_step(self.unet, self.scheduler_config, embeds, noise, fresh_noise, steps, **options)


@torch.no_grad()
def few_step(
    unet: UNet2DConditionModel,
    scheduler_config: dict,
    embeds: torch.Tensor,
    noise: torch.Tensor,
    fresh_noise: Callable[[torch.Tensor, int], torch.Tensor],
    steps: int,
    strength: float = 1.0,
    image: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    guidance_scale: float = 1.0,
    added_cond_kwargs: dict | None = None,
) -> torch.Tensor:
    """LCMScheduler's loop on latents in the pipeline's scale; `fresh_noise(x, t)` replaces the scheduler's own draws.

    embeds: [1 or B, 77, C]; image: latents to start from, None for text-to-image; mask: [1, 1, H, W] in 0..1, 1 where
    the image may change, by ComfyUI's rule: before each evaluation the rest is the noised image, after it the image.
    guidance_scale: what a UNet with time_cond_proj is told. added_cond_kwargs: SDXL's.
    """
    scheduler = scheduler_of(LCMScheduler, scheduler_config)
    scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
    timesteps = scheduler.timesteps
    x = noise * scheduler.init_noise_sigma
    if image is not None:
        x = scheduler.add_noise(image, noise, timesteps[:1])
    condition = None
    if unet.config.time_cond_proj_dim:
        condition = guidance_embedding(torch.tensor([guidance_scale - 1.0]), unet.config.time_cond_proj_dim)
    for i, t in enumerate(timesteps):
        if mask is not None:
            x = mask * x + (1 - mask) * scheduler.add_noise(image, noise, timesteps[i : i + 1])
        output = unet(
            x,
            t,
            embeds.expand(len(x), -1, -1),
            timestep_cond=condition,
            added_cond_kwargs=added_cond_kwargs,
        ).sample
        # step() would draw the noise itself: its denoised half is taken, and the noise added by add_noise.
        x0 = scheduler.step(output, t, x, return_dict=True).denoised
        if mask is not None:
            x0 = mask * x0 + (1 - mask) * image
        last = i + 1 == len(timesteps)
        x = x0 if last else scheduler.add_noise(x0, fresh_noise(x0, int(timesteps[i + 1])), timesteps[i + 1 : i + 2])
    return x


def scheduler_of(kind: type, config: dict):
    """A diffusers scheduler; with zero terminal SNR its table ends in the host's 4.9e-8, in place of 0 or 6.0e-8."""
    scheduler = kind.from_config(config)
    if config.get("rescale_betas_zero_snr"):
        scheduler.alphas_cumprod[-1] = 4.8973451890853435e-08
    return scheduler


FAMILIES = ("dmd2", "tcd", "hyper", "lightning", "ddim")  # beside LCM's own, which is `few_step`


@torch.no_grad()
def few_step_of_family(
    family: str,
    unet: UNet2DConditionModel,
    scheduler_config: dict,
    embeds: torch.Tensor,
    noise: torch.Tensor,
    fresh_noise: Callable[[torch.Tensor, int], torch.Tensor],
    steps: int,
    strength: float = 1.0,
    image: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    eta: float = 0.3,
) -> torch.Tensor:
    """`few_step` with the scheduler that a family's publishers name, its own `step` and its own start.

    LCMScheduler with DMD2's timesteps, TCDScheduler, EulerDiscreteScheduler and DDIMScheduler with trailing ones. At a
    strength below 1 the last `steps` of int(steps / strength) trailing timesteps are run.
    """
    cut, total = image is not None and strength < 1, int(steps / strength)
    trailing = {"timestep_spacing": "trailing", "set_alpha_to_one": True}
    if family == "dmd2":
        scheduler = scheduler_of(LCMScheduler, scheduler_config)
        grid = [399] if steps == 1 and not cut else [round(1000 - i * 1000 / total) - 1 for i in range(total)][-steps:]
        scheduler.set_timesteps(timesteps=grid)
    elif family in ("tcd", "hyper"):
        scheduler = scheduler_of(TCDScheduler, scheduler_config)
        if family == "hyper" and steps == 1 and not cut:
            scheduler.set_timesteps(timesteps=[800])
        else:
            scheduler.set_timesteps(steps, strength=strength)
    else:
        kind = EulerDiscreteScheduler if family == "lightning" else DDIMScheduler
        scheduler = scheduler_of(kind, scheduler_config | trailing)
        scheduler.set_timesteps(total)
        if family == "lightning":
            scheduler.set_begin_index(total - steps)
    timesteps = scheduler.timesteps[-steps:]
    x = noise * scheduler.init_noise_sigma
    if image is not None:
        x = scheduler.add_noise(image, noise, timesteps[:1])
    options = {"eta": eta} if family in ("tcd", "hyper") else {}
    for i, t in enumerate(timesteps):
        seen = x
        if mask is not None:
            seen = mask * x + (1 - mask) * scheduler.add_noise(image, noise, timesteps[i : i + 1])
        scaled = scheduler.scale_model_input(seen, t)
        output = unet(scaled, t.long(), embeds.expand(len(x), -1, -1)).sample
        if mask is not None:
            # The host's mask is on x0, beside the scheduler: what is left of x after it is the noise of the step.
            signal = scheduler.alphas_cumprod[int(t)]
            alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
            if family == "lightning":
                alpha, sigma = torch.tensor(1.0), sigma / alpha
            x0 = mask * (seen - sigma * output) / alpha + (1 - mask) * image
            if family == "dmd2":
                c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(t)
                x0 = mask * (c_out * (seen - sigma * output) / alpha + c_skip * seen) + (1 - mask) * image
                last = i + 1 == len(timesteps)
                following = timesteps[i + 1 : i + 2]
                x = x0 if last else scheduler.add_noise(x0, fresh_noise(x0, int(following)), following)
                continue
            output = (x - alpha * x0) / sigma
        following = int(timesteps[i + 1]) if i + 1 < steps else None
        drawn = mock.patch.object(
            sys.modules[scheduler.__module__], "randn_tensor", lambda *_, t=following, x=x, **__: fresh_noise(x, t)
        )
        with drawn:
            x = scheduler.step(output, t, x, return_dict=False, **options)[0]
    return x if mask is None or family == "dmd2" else mask * x + (1 - mask) * x0


@torch.no_grad()
def whole_pipeline(
    unet: UNet2DConditionModel,
    scheduler_config: dict,
    embeds: torch.Tensor,
    noise: torch.Tensor,
    fresh_noise: Callable[[torch.Tensor, int], torch.Tensor],
    steps: int,
    strength: float = 1.0,
    image: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    added_cond_kwargs: dict | None = None,
) -> torch.Tensor | None:
    """`few_step` by the diffusers pipeline that users call for it; None where there is none.

    LatentConsistencyModelPipeline and its img2img for a UNet with time_cond_proj, StableDiffusionPipeline and
    StableDiffusionXLPipeline (text-to-image only: their img2img has a timestep grid of its own) for one without.
    """
    with_projection = unet.config.time_cond_proj_dim is not None
    if mask is not None or (image is not None and not with_projection):
        return None
    scheduler = scheduler_of(LCMScheduler, scheduler_config)
    nothing = dict.fromkeys(("vae", "text_encoder", "tokenizer"))
    call = {"prompt_embeds": embeds, "num_inference_steps": steps, "guidance_scale": 1.0, "output_type": "latent"}
    size = {"height": noise.shape[2] * 8, "width": noise.shape[3] * 8, "latents": noise}
    if added_cond_kwargs is not None:
        parts = nothing | dict.fromkeys(("text_encoder_2", "tokenizer_2"))
        pipeline = diffusers.StableDiffusionXLPipeline(unet=unet, scheduler=scheduler, add_watermarker=False, **parts)
        call |= size | {"pooled_prompt_embeds": added_cond_kwargs["text_embeds"]}
    else:
        kinds = {
            (False, False): diffusers.StableDiffusionPipeline,
            (True, False): diffusers.LatentConsistencyModelPipeline,
            (True, True): diffusers.LatentConsistencyModelImg2ImgPipeline,
        }
        safety = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        pipeline = kinds[with_projection, image is not None](unet=unet, scheduler=scheduler, **nothing, **safety)
        call |= size if image is None else {"image": image, "strength": strength}
    pipeline.set_progress_bar_config(disable=True)
    draws = iter([noise] if image is not None else [])

    def draw(shape, **_) -> torch.Tensor:
        given = next(draws, None)
        if given is not None:
            return given
        return fresh_noise(torch.empty(shape), int(scheduler.timesteps[scheduler.step_index + 1]))

    modules = [sys.modules[scheduler.__module__], sys.modules[type(pipeline).__module__]]
    with contextlib.ExitStack() as stack:
        for module in modules:
            stack.enter_context(mock.patch.object(module, "randn_tensor", draw))
        return pipeline(**call).images


def load_unet(folder: Path) -> UNet2DConditionModel:
    """The UNet of a pipeline folder, in fp32."""
    return UNet2DConditionModel.from_pretrained(folder / "unet", torch_dtype=torch.float32).eval()


def add_adapter(unet: UNet2DConditionModel) -> None:
    """A peft LoRA of rank 4 whose alpha is not its rank, and whose every factor is random."""
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=list(LORA_TARGETS)))
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.03 * torch.randn(parameter.shape, generator=generator))


def random_lora(unet: UNet2DConditionModel) -> dict[str, torch.Tensor]:
    """The adapter under kohya's names. Adds it to the UNet."""
    add_adapter(unet)
    kohya = {}
    for key, weight in get_peft_model_state_dict(unet).items():
        module, _, side = key.removesuffix(".weight").rpartition(".")
        path = "lora_unet_" + module.replace(".", "_")
        kohya[f"{path}.{ {'lora_A': 'lora_down', 'lora_B': 'lora_up'}[side] }.weight"] = weight.contiguous()
        kohya[f"{path}.alpha"] = torch.tensor(2.0)
    return kohya


def node_noises(shape: tuple[int, ...], seed: int) -> tuple[torch.Tensor, Callable[[torch.Tensor, int], torch.Tensor]]:
    """The initial noise as ComfyUI draws it for this seed, and SPLAM's fresh noise(x, t) of a batch.

    The hash is written out: the pictures of a seed must not change with the code.
    """

    def fresh(x: torch.Tensor, t: int) -> torch.Tensor:
        drawn = []
        for number in range(len(x)):
            digest = hashlib.sha256(f"{seed} {t} {number}".encode()).digest()
            generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest[:8], "little"))
            drawn.append(torch.randn(x.shape[1:], generator=generator))
        return torch.stack(drawn)

    return torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed)), fresh


def host_noises(
    shape: tuple[int, ...], seed: int, offset: int
) -> tuple[torch.Tensor, Callable[[torch.Tensor, int], torch.Tensor]]:
    """The initial noise of this seed, and the draws of one generator of seed + offset, as ComfyUI's own `lcm` takes."""
    generator = torch.Generator("cpu").manual_seed(seed + offset)
    initial = torch.randn(shape, generator=torch.Generator("cpu").manual_seed(seed))
    return initial, lambda x, _: torch.randn(x.shape, generator=generator)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest absolute difference over the standard deviation of what was expected."""
    return ((found - expected).abs().max() / expected.std()).item()


def guidance_embedding(w: torch.Tensor, dim: int) -> torch.Tensor:
    """What diffusers' LCM pipeline feeds to time_cond_proj, by its formula."""
    half = dim // 2
    frequencies = torch.exp(torch.arange(half, dtype=torch.float32) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * w[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)
