"""A Pipeline from a model's files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from splam_core import latent_scale, not_finite, parametrisation_of, reading, shortened

from .files import ModelFiles, read_model, tokenizer_of
from .lora import with_loras
from .pipeline import Pipeline
from .teachers import EMBEDDED, resolve

LATENT_CHANNELS = 4
_KINDS = {8: ", as InstructPix2Pix does", 9: ", as inpainting models do"}


def load_pipeline(
    model: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    download: bool = False,
    unet_dtype: torch.dtype | None = None,
    embedded: str | float = "splam",
    loras: Sequence[str] = (),
    clip_skip: int = 1,
) -> Pipeline:
    """A diffusers pipeline folder, a finished run's folder, a UNet folder, a single file, a teacher's name or a Hub id.

    What a UNet folder lacks is taken from the embedded pipeline; a cond_proj is folded (`fold_gamma`'s `embedded`).
    loras: FILE or FILE:weight each, merged into UNet and text encoders (`with_loras`); clip_skip: `clip_skipped`'s.
    Nothing is downloaded unless asked; safetensors only. Raises FileNotFoundError if there is no such model,
    ValueError for one of another kind or that lacks something.
    """
    place = resolve(str(model), revision, download)
    with reading(place):
        files = with_loras(read_teacher(place, embedded), loras).clip_skipped(clip_skip)
        pipeline = build_pipeline(files, dtype, str(place))
    pipeline.source = str(model)
    if unet_dtype is not None:  # before it goes to the device
        pipeline.unet_fingerprint()  # of what is on disk, before it is rounded
        pipeline.unet.to(unet_dtype)
    for name in ("unet", "vae", "text_encoder", "text_encoder_2"):
        part = getattr(pipeline, name)
        if part is not None:
            setattr(pipeline, name, part.to(device).eval().requires_grad_(False))
    pipeline.schedule = pipeline.schedule.to(device)
    return pipeline


def read_teacher(place: Path, embedded: str | float = "splam") -> ModelFiles:
    """The files of a model with all its parts, folded; a UNet folder has the embedded pipeline's other parts."""
    model = read_model(place).folded(embedded, str(place))
    if place.is_dir() and not model.vae and not model.texts:
        return model.with_parts_of(read_model(EMBEDDED))
    wanted = 2 if model.family == "sdxl" else 1
    lacking = ([] if model.vae else ["VAE"]) + ["text encoder"] * (wanted - len(model.texts))
    if lacking:
        raise ValueError(f"{place}: it has no {' and no '.join(lacking)}; expected a model with all its parts")
    return model


def build_pipeline(model: ModelFiles, dtype: torch.dtype = torch.float32, name: str = "the model") -> Pipeline:
    """The networks of a model with all its parts, on the CPU. name: of what errors speak.

    Raises ValueError for weights that are missing, do not fit the configuration, or are not finite, and for a UNet
    that reads more than latents.
    """
    channels = model.configs["unet"].get("in_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS:
        kind = _KINDS.get(channels, "") if isinstance(channels, int) else ""
        raise ValueError(
            f"{name}: its UNet reads {channels!r:.40} channels{kind}, expected the {LATENT_CHANNELS} of latents: "
            f"SPLAM makes few-step text-to-image models. Choose such a model."
        )
    latent_scale(model.configs["vae"])  # refuses latents that are not Stable Diffusion's
    weights = [model.unet, model.vae, *model.texts]
    networks = {
        part: _empty(model.configs[part], len(own), f"{name}: {part}")
        for part, own in zip(_BUILDERS, weights, strict=False)
    }
    for (part, network), own in zip(networks.items(), weights, strict=True):
        _fill(network, own, dtype, f"{name}: {part}")
    tokenizers = []
    for number in range(len(model.texts)):
        folder, settings = tokenizer_of(model, number)
        tokenizers.append(CLIPTokenizer.from_pretrained(folder, **settings))
    return Pipeline(
        networks["unet"],
        networks["vae"],
        networks["text_encoder"],
        tokenizers[0],
        parametrisation_of((), None, model.configs["scheduler"]).schedule,
        model.configs["scheduler"],
        networks.get("text_encoder_2"),
        tokenizers[1] if len(tokenizers) > 1 else None,
        len(tokenizers) > 1 and model.zeros_for_empty,
    )


def _empty(config: Mapping[str, Any], weights: int, part: str) -> torch.nn.Module:
    """The network of a configuration, without weights. Raises ValueError where there is none of it.

    weights: how many tensors the files hold. A configuration that asks for more layers would build for hours.
    """
    numbers = (config.get(key) for key in ("layers_per_block", "num_hidden_layers", "transformer_layers_per_block"))
    layers = [one for found in numbers for one in (found if isinstance(found, list) else [found])]
    wrong = [one for one in layers if isinstance(one, (int, float)) and not 0 <= one <= weights]
    try:
        if wrong:
            raise ValueError(f"{wrong[0]!r:.40} layers, and {weights} weights")
        with init_empty_weights():
            return _BUILDERS[part.rpartition(" ")[2]](config)
    except Exception as error:  # diffusers' and transformers' own, of many kinds
        raise ValueError(
            f"{part}: its configuration is none of Stable Diffusion's ({type(error).__name__}: "
            f"{shortened(str(error))}). Fetch its config.json again, or take another model."
        ) from error


_BUILDERS: dict[str, Callable[[Any], torch.nn.Module]] = {
    "unet": UNet2DConditionModel.from_config,
    "vae": AutoencoderKL.from_config,
    "text_encoder": lambda config: CLIPTextModel(CLIPTextConfig.from_dict(config)),
    "text_encoder_2": lambda config: CLIPTextModelWithProjection(CLIPTextConfig.from_dict(config)),
}


def _fill(network: torch.nn.Module, weights: Mapping[str, Tensor], dtype: torch.dtype, part: str) -> None:
    """Give a network without weights these. A text encoder may have layers too many: SD2.x does not read its last."""
    own = network.state_dict()
    if isinstance(network, (CLIPTextModel, CLIPTextModelWithProjection)):
        # Whether transformers' own names begin with "text_model." depends on its version.
        plain = {key.removeprefix("text_model."): key for key in own}
        weights = {plain[key]: weight for key, weight in weights.items() if key in plain}
    for problem, keys in (("lacks", own.keys() - weights.keys()), ("has no place for", weights.keys() - own.keys())):
        if keys:
            raise ValueError(
                f"{part} {problem} {len(keys)} weights ({len(own)} expected), such as {min(keys)}: its files are "
                f"incomplete, or it is no part of Stable Diffusion 1.x, 2.x or XL"
            )
    for key, weight in weights.items():
        if weight.shape != own[key].shape:
            raise ValueError(
                f"{part}: {key} is {tuple(weight.shape)}, expected {tuple(own[key].shape)} by its configuration: they "
                f"are of two models, or it is no part of Stable Diffusion 1.x, 2.x or XL"
            )
    bad = not_finite(weights)
    if bad is not None:
        raise ValueError(
            f"{part}: {bad} holds NaN or infinity. The file is damaged or was badly merged: fetch it again."
        )
    # A copy: the files' own pages would be read again whenever memory is short.
    network.load_state_dict({key: weight.to(dtype, copy=True) for key, weight in weights.items()}, assign=True)
