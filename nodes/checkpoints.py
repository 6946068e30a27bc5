"""A Stable Diffusion checkpoint as ComfyUI's MODEL, CLIP and VAE, with nothing of it dropped.

Pipeline folders, UNets on their own and single files become the same thing here: weights under LDM names, and what is
known of the parts. The gamma projection, for which the host has no place, is folded into the time embedding. Then the
host loads what it knows; a UNet, autoencoder or text encoder of another width is built from the host's own classes
(parts.py).
"""

import logging
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import comfy.sd
import comfy.utils
import folder_paths
import torch

from ..splam_core.checkpoint import (
    UNET_PREFIX,
    VAE_PREFIX,
    StateDict,
    diffusers_to_ldm,
    fold_gamma,
    is_safetensors,
    json_object,
    load_files,
    not_finite,
    read_metadata,
    weight_files,
)
from ..splam_core.families import family_told
from ..splam_core.parametrisation import MARKS, Parametrisation, latent_scale, parametrisation_of
from .catalogue import Location, host_names, read_json
from .families import ATTACHMENT as FAMILY
from .gamma import ATTACHMENT, GammaWeights
from .host import Clip, Model, Vae
from .parametrisation import declare, patch, prediction_type_of, schedule_of
from .parts import build_clip, build_unet, build_vae, check_keys, host_knows
from .widths import Config

# A file may bring its parts' diffusers configurations, as JSON texts in its metadata under "splam.<part>".
PARTS = ("unet", "vae", "text_encoder", "text_encoder_2", "scheduler")
DIFFUSION_WEIGHTS, TEXT_WEIGHTS = "diffusion_pytorch_model", "model"  # what their files' names begin with
CLIP_PREFIXES = ("cond_stage_model.", "conditioner.embedders.")
OPEN_CLIP = "cond_stage_model.model."  # where SD2.x keeps its text encoder, which pads with token 0


@dataclass
class Checkpoint:
    """Weights under LDM names without their prefixes, and what is known of the parts. None: there is no such part."""

    path: Path  # of the UNet's file, for messages
    unet: StateDict
    vae: StateDict | None = None
    text_encoders: list[StateDict] | None = None
    whole_file: StateDict | None = None  # a single file as the host reads it
    configs: dict[str, Config] = field(default_factory=dict)  # part -> diffusers' configuration of it
    metadata: dict[str, str] = field(default_factory=dict)
    parametrisation: Parametrisation = field(default_factory=Parametrisation)
    latent_scale: float | None = None  # the host's own where nothing says it
    gamma: GammaWeights | None = None
    is_few_step: bool = False


@dataclass
class Loaded:
    """What the loader gives out, and sentences that the user should read."""

    model: Model
    clip: Clip | None
    vae: Vae | None
    warnings: list[str]


def load(location: Location, embedded_guidance: float = 1.0, **loading: bool) -> Loaded:
    """Raises ValueError or FileNotFoundError naming the file, what was expected, what was found and what to do.

    loading: arguments of the host's own functions, from a host that asks for the model once more.
    """
    read = read_pipeline if location.is_pipeline else read_unet_or_file
    checkpoint = read(location, embedded_guidance)
    try:
        if broken := not_finite(checkpoint.unet):
            raise ValueError(
                f"the UNet's weight {broken} holds NaN or infinite values, and every picture would. The file is "
                "damaged, or a merge or training that made it went wrong: fetch it again, or take another."
            )
        model, clip, vae = build(checkpoint, **loading)
        model = with_schedule(model, checkpoint)
    except ValueError as error:
        raise ValueError(f"{checkpoint.path}: {error}") from error
    if checkpoint.gamma is not None:
        model.set_attachments(ATTACHMENT, checkpoint.gamma)
    told = family_told(checkpoint.path.name, checkpoint.metadata, checkpoint.configs.get("scheduler"))
    if told is None and checkpoint.is_few_step:
        told = "splam", "its loader knows it as a SPLAM or LCM"
    if told is not None:
        model.set_attachments(FAMILY, told)
    patchers = {"model": model, "clip": getattr(clip, "patcher", None), "vae": getattr(vae, "patcher", None)}
    for part, patcher in patchers.items():
        if patcher is not None:
            # By which ComfyUI 0.33 makes copies with weights of their own: for hooks, torch.compile, Train LoRA.
            patcher.cached_patcher_init = (load_again, (location, embedded_guidance, part))
    return Loaded(model, clip, vae, _warnings(checkpoint, clip, vae))


def load_again(location: Location, embedded_guidance: float, part: str, **loading: bool) -> Model:
    """The ModelPatcher of a model's part, "model", "clip" or "vae", with weights of its own. Errors as `load`."""
    with host_names():
        found = getattr(load(location, embedded_guidance, **loading), part)
    return found if part == "model" else found.patcher


def read_pipeline(location: Location, embedded_guidance: float) -> Checkpoint:
    """A diffusers pipeline folder."""
    unet_files, vae_files, *text_files = _weight_groups(location)
    configs = {
        "unet": read_json(unet_files[0].parent / "config.json"),
        "vae": read_json(vae_files[0].parent / "config.json"),
        "scheduler": read_json(location.path / "scheduler" / "scheduler_config.json"),
        **{files[0].parent.name: read_json(files[0].parent / "config.json") for files in text_files},
    }
    for tokenizer in ("tokenizer", "tokenizer_2"):
        file = location.path / tokenizer / "tokenizer_config.json"
        configs[tokenizer] = read_json(file) if file.is_file() else {}
    metadata, weights = read_metadata(unet_files[0]), load_files(unet_files)
    try:
        parametrisation = parametrisation_of(weights, metadata, configs["scheduler"])
        scale = latent_scale(configs["vae"])
        unet, gamma = fold(weights, metadata, embedded_guidance)
        single = diffusers_to_ldm(unet, load_files(vae_files))
    except ValueError as error:
        raise ValueError(f"{location.path}: {error}") from error
    return Checkpoint(
        path=unet_files[0].parent,
        unet=_under(single, UNET_PREFIX),
        vae=_under(single, VAE_PREFIX),
        text_encoders=[load_files(files) for files in text_files],
        configs=configs,
        metadata=metadata,
        parametrisation=parametrisation,
        latent_scale=scale,
        gamma=gamma[1],
        is_few_step=location.is_few_step or gamma[0] or _names_few_step(configs, metadata),
    )


def read_unet_or_file(location: Location, embedded_guidance: float) -> Checkpoint:
    """A UNet folder, a UNet file under either naming, or a single file with UNet, VAE and text encoder."""
    (files,) = _weight_groups(location)
    path, metadata, weights = files[0], read_metadata(files[0]), load_files(files)
    try:
        configs = _configs(metadata)
        parametrisation = parametrisation_of(weights, metadata, configs.get("scheduler"))
        scale = latent_scale(configs.get("vae", {}))
        weights, gamma = fold(weights, metadata, embedded_guidance)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    beside = path.parent / "config.json"
    if "unet" not in configs and beside.is_file() and path.name.startswith("diffusion_pytorch_model"):
        configs["unet"] = read_json(beside)
    checkpoint = Checkpoint(
        path=path,
        unet={},
        configs=configs,
        metadata=metadata,
        parametrisation=parametrisation,
        latent_scale=scale,
        gamma=gamma[1],
        is_few_step=location.is_few_step or gamma[0] or _names_few_step(configs, metadata),
    )
    if f"{UNET_PREFIX}input_blocks.0.0.weight" in weights:
        checkpoint.unet = _under(weights, UNET_PREFIX)
        checkpoint.vae = _under(weights, VAE_PREFIX) or None
        checkpoint.text_encoders = _text_encoders(weights)
        if any(key.startswith(OPEN_CLIP) for key in weights):
            configs.setdefault("tokenizer", {"pad_token": "!"})
        checkpoint.whole_file = weights
        return checkpoint
    weights = {key: weight for key, weight in weights.items() if key not in MARKS}
    if "input_blocks.0.0.weight" in weights and "out.2.weight" in weights:
        checkpoint.unet = weights
    elif "conv_in.weight" in weights and "conv_out.weight" in weights and "time_embedding.linear_1.weight" in weights:
        try:
            checkpoint.unet = _under(diffusers_to_ldm(weights), UNET_PREFIX)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    else:
        raise ValueError(
            f"{path}: expected a Stable Diffusion UNet (keys under {UNET_PREFIX}*, input_blocks.*, or diffusers' "
            f"down_blocks.*), found {_what_it_is(weights)}."
        )
    return checkpoint


def fold(
    weights: StateDict, metadata: dict[str, str], embedded_guidance: float
) -> tuple[StateDict, tuple[bool, GammaWeights | None]]:
    """`fold_gamma`, its sum kept in float32 even where the file has less: the host casts it if it must.

    Also whether there was a projection, and its weights where they embed gamma.
    """
    cond_proj = next((key for key in weights if key.endswith(".cond_proj.weight")), None)
    if cond_proj is None:
        if embedded_guidance != 1:
            logging.debug("SPLAM Loader: no time_embedding.cond_proj; embedded_guidance has nothing to set.")
        return weights, (False, None)
    # This repository's trainer embeds gamma so that it is zero at gamma = 1, and names its method in the metadata.
    ours = "splam.method" in metadata
    bandwidth = float(metadata.get("splam.gamma_bandwidth", 1000)) if ours else None
    folded, _ = fold_gamma(weights, "zero" if ours else float(embedded_guidance), torch.float32)
    is_gamma = ours or embedded_guidance == 1
    kept = GammaWeights(weights[cond_proj].float(), bandwidth) if is_gamma else None
    return folded, (True, kept)


def build(checkpoint: Checkpoint, **loading: bool) -> tuple[Model, Clip | None, Vae | None]:
    """(MODEL, CLIP or None, VAE or None). loading: as of `load`."""
    whole = checkpoint.whole_file
    bias = checkpoint.unet.get("time_embed.0.bias")
    if whole is not None and host_knows(checkpoint.unet):
        has_clip = any(key.startswith(CLIP_PREFIXES) for key in whole)
        directories = folder_paths.get_folder_paths("embeddings")
        # The host takes the weights out of the dictionary as it places them.
        model, clip, vae, *_ = comfy.sd.load_state_dict_guess_config(
            dict(whole),
            output_vae=checkpoint.vae is not None,
            output_clip=has_clip,
            embedding_directory=directories,
            metadata=checkpoint.metadata,
            **loading,
        )
        check_keys(model.model.diffusion_model, checkpoint.unet, "UNet", missing_only=True)
    else:
        model = build_unet(checkpoint.unet, checkpoint.configs, **loading)
        clip = build_clip(checkpoint.text_encoders, checkpoint.configs, **loading) if checkpoint.text_encoders else None
        vae = build_vae(checkpoint.vae, checkpoint.configs) if checkpoint.vae else None
    if checkpoint.latent_scale is not None:
        model.model.latent_format.scale_factor = checkpoint.latent_scale
    first = model.model.diffusion_model.time_embed[0]
    if bias is not None and first.bias is not None and first.bias.dtype.itemsize == 1:
        # An 8-bit float would lose the fold; the host casts biases to what it computes in anyway.
        first.bias = torch.nn.Parameter(bias.to(first.bias.device, torch.float32), requires_grad=False)
    return model, clip, vae


def with_schedule(model: Model, checkpoint: Checkpoint) -> Model:
    """The MODEL on the schedule that the checkpoint names, or else on SD's with what the host takes it to predict."""
    said, sampling = checkpoint.parametrisation, model.get_model_object("model_sampling")
    schedule = said.schedule if said.schedule is not None else schedule_of(sampling)
    # Where the file does not say, the host guesses it from a weight's size.
    prediction_type = said.prediction_type or prediction_type_of(sampling)
    declare(model, prediction_type, schedule)
    return patch(model, schedule, prediction_type, checkpoint.is_few_step)


def files_of(location: Location) -> list[Path]:
    """All that a model is read from: weights, and what says how to take them. Raises ValueError for lost weights."""
    weights = [file for group in _weight_groups(location) for file in group]
    settings = [file.parent / "config.json" for file in weights]
    settings.append(location.path / "scheduler" / "scheduler_config.json")
    settings += [location.path / tokenizer / "tokenizer_config.json" for tokenizer in ("tokenizer", "tokenizer_2")]
    return weights + [file for file in settings if file.is_file()]


def _weight_groups(location: Location) -> list[list[Path]]:
    """The files of each part: UNet, VAE, text encoders; or of the UNet alone; or the one file."""
    if is_safetensors(location.path) and not location.path.is_dir():
        return [[location.path]]
    if not location.is_pipeline:
        return [_weights_in(location.path, DIFFUSION_WEIGHTS)]
    encoders = sorted(folder for folder in location.path.glob("text_encoder*") if folder.is_dir())
    return [
        _weights_in(location.unet_folder, DIFFUSION_WEIGHTS),
        _weights_in(location.path / "vae", DIFFUSION_WEIGHTS),
        *(_weights_in(folder, TEXT_WEIGHTS) for folder in encoders or [location.path / "text_encoder"]),
    ]


def _weights_in(folder: Path, stem: str) -> list[Path]:
    files = weight_files(folder, stem)
    if files:
        return files
    found = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    raise ValueError(
        f"{folder}: expected {stem}.safetensors, found {', '.join(found) or 'nothing'}. "
        "Fetch the safetensors version of the model; pickles (.bin) are not opened."
    )


def _configs(metadata: dict[str, Any]) -> dict[str, Config]:
    """The parts' configurations in a file's metadata. Raises ValueError where one is no JSON object."""
    said = {part: f"splam.{part}" for part in PARTS if f"splam.{part}" in metadata}
    return {part: json_object(metadata[key], f"its metadata {key}") for part, key in said.items()}


def _names_few_step(configs: dict[str, Config], metadata: dict[str, str]) -> bool:
    return configs.get("scheduler", {}).get("_class_name") == "LCMScheduler" or "splam.method" in metadata


def _warnings(checkpoint: Checkpoint, clip: Clip | None, vae: Vae | None) -> list[str]:
    """What the user should know of a model that has loaded."""
    name = checkpoint.path.name
    warnings = [f"SPLAM Loader: {name}: {sentence}" for sentence in checkpoint.parametrisation.contradictions]
    if not checkpoint.is_few_step:
        warnings.append(
            f"SPLAM Loader: nothing marks {name} as a SPLAM or LCM model (no LCMScheduler, no cond_proj, no splam "
            "metadata). It loads as an ordinary Stable Diffusion model: few steps need a SPLAM or LCM LoRA on it, or a "
            "distilled checkpoint."
        )
    lacking = [part for part, found in (("CLIP (text encoder)", clip), ("VAE", vae)) if found is None]
    if lacking:
        warnings.append(
            f"SPLAM Loader: {name} has no {' and no '.join(lacking)}; take {'them' if len(lacking) > 1 else 'it'} from "
            "Load CLIP, Load VAE or Load Checkpoint."
        )
    encoders = [(f"text encoder {number}", encoder) for number, encoder in enumerate(checkpoint.text_encoders or [], 1)]
    for part, weights in (("VAE", checkpoint.vae or {}), *encoders):
        if broken := not_finite(weights):
            warnings.append(
                f"SPLAM Loader: {name}: {broken} of its {part} holds NaN or infinite values, so that its "
                f"{'pictures' if part == 'VAE' else 'prompts'} will be broken; take that part from another file."
            )
    unet_config = checkpoint.configs.get("unet", {})
    if not unet_config and checkpoint.unet["input_blocks.0.0.weight"].shape[0] != 320:
        warnings.append(
            f"SPLAM Loader: {name} does not say how many attention heads its UNet has; taken as Stable Diffusion's. "
            "If the picture is noise, give it a folder in models/diffusers, as diffusion_pytorch_model.safetensors "
            "beside its config.json."
        )
    return warnings


def _text_encoders(weights: StateDict) -> list[StateDict] | None:
    """A single file's text encoders under transformers' names; None where it has none."""
    first = _under(weights, "cond_stage_model.transformer.") or _under(weights, "conditioner.embedders.0.transformer.")
    encoders = [first] if first else []
    for prefix in (OPEN_CLIP, "conditioner.embedders.1.model."):
        encoder = _under(weights, prefix)
        if encoder:
            encoders.append(comfy.utils.clip_text_transformers_convert(encoder, "", ""))
    return encoders or None


def _what_it_is(weights: StateDict) -> str:
    """A guess at what a file without a UNet holds, for a message."""
    keys = " ".join(list(weights)[:2000])
    for mark, what in (
        ("lora", "a LoRA: use SPLAM LoRA Loader"),
        ("controlnet_cond_embedding", "a ControlNet: use Load ControlNet Model"),
        ("control_model.", "a ControlNet: use Load ControlNet Model"),
        ("double_blocks.", "a Flux-like transformer, which SPLAM does not sample"),
        ("joint_blocks.", "an SD3-like transformer, which SPLAM does not sample"),
        ("transformer_blocks.", "a transformer, which SPLAM does not sample"),
        ("decoder.up", "a VAE: use Load VAE"),
        ("token_embedding", "a text encoder: use Load CLIP"),
    ):
        if mark in keys and not (mark == "transformer_blocks." and "down_blocks." in keys):
            return what
    return f"keys like {', '.join(sorted(weights)[:3]) or 'none'}"


def _under(state_dict: StateDict, prefix: str) -> StateDict:
    return {key.removeprefix(prefix): weight for key, weight in state_dict.items() if key.startswith(prefix)}
