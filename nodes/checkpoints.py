"""A Stable Diffusion checkpoint of any width as ComfyUI's MODEL, CLIP and VAE, with nothing of it dropped.

A diffusers pipeline folder and a single file become the same thing here: weights under LDM names, and the parts'
diffusers configurations. The gamma projection, for which the host has no place, is folded into the time embedding.
Then the host loads what it knows; a UNet, autoencoder or text encoder of another width, which it refuses, is built from
the host's own classes.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import folder_paths
import torch

from ..splam_core.checkpoint import (
    CLIP_PREFIX,
    UNET_PREFIX,
    VAE_PREFIX,
    diffusers_to_ldm,
    fold_gamma,
    load_file,
    read_metadata,
)
from ..splam_core.schedule import NoiseSchedule
from .catalogue import Location
from .parametrisation import patch, prediction_type_of, schedule_of
from .widths import autoencoder_options, text_encoder_options, unet_options

# A single file may bring its parts' diffusers configurations, as JSON texts in its metadata under "splam.<part>".
PARTS = ("unet", "vae", "text_encoder", "scheduler")
DIFFUSION_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.fp16.safetensors")
TEXT_WEIGHTS = ("model.safetensors", "model.fp16.safetensors")
HOST_CHANNELS = 320  # the first width of SD1.x, SD2.x and SDXL, which the host recognises by itself


@dataclass
class Checkpoint:
    """Weights under LDM names without their prefixes, and what is known of the parts."""

    unet: dict
    vae: dict
    text_encoders: list[dict]
    configs: dict = field(default_factory=dict)  # part -> diffusers' configuration of it
    is_consistency_model: bool = False


def load(location: Location):
    """(MODEL, CLIP, VAE). Raises ValueError naming the file, what was expected, what was found and what to do."""
    return load_folder(location) if location.is_folder else load_single_file(location.path)


def load_folder(location: Location):
    """(MODEL, CLIP, VAE) of a diffusers pipeline folder."""
    unet_file, vae_file, *text_files = weight_files(location)
    configs = {
        "unet": read_json(unet_file.parent / "config.json"),
        "vae": read_json(vae_file.parent / "config.json"),
        "text_encoder": read_json(text_files[0].parent / "config.json"),
        "scheduler": read_json(location.path / "scheduler" / "scheduler_config.json"),
    }
    unet, had_gamma = fold(load_file(unet_file))
    try:
        single = diffusers_to_ldm(unet, load_file(vae_file))
    except ValueError as error:
        raise ValueError(f"{location.path}: {error}") from error
    checkpoint = Checkpoint(
        unet=_under(single, UNET_PREFIX),
        vae=_under(single, VAE_PREFIX),
        text_encoders=[load_file(file) for file in text_files],
        configs=configs,
        is_consistency_model=had_gamma or location.unet is not None or _names_consistency(configs),
    )
    return build(checkpoint, location.path)


def load_single_file(path: Path):
    """(MODEL, CLIP, VAE) of a file with all three under LDM names."""
    state_dict, had_gamma = fold(load_file(path))
    first = state_dict.get(f"{UNET_PREFIX}input_blocks.0.0.weight")
    if first is None:
        raise ValueError(
            f"{path}: expected a Stable Diffusion checkpoint with a UNet under {UNET_PREFIX}*, found keys like "
            f"{', '.join(sorted(state_dict)[:3]) or 'none'}. Choose a file with UNet, VAE and text encoder."
        )
    metadata = read_metadata(path)
    configs = {part: json.loads(metadata[f"splam.{part}"]) for part in PARTS if f"splam.{part}" in metadata}
    is_consistency_model = had_gamma or _names_consistency(configs)
    if first.shape[0] == HOST_CHANNELS:
        directories = folder_paths.get_folder_paths("embeddings")
        loaded = comfy.sd.load_state_dict_guess_config(state_dict, embedding_directory=directories, metadata=metadata)
        if loaded is None:
            raise ValueError(f"{path}: ComfyUI does not recognise this model. Expected SD1.x, SD2.x or SDXL.")
        model, clip, vae, *_ = loaded
        return with_schedule(model, configs, is_consistency_model), clip, vae
    checkpoint = Checkpoint(
        unet=_under(state_dict, UNET_PREFIX),
        vae=_under(state_dict, VAE_PREFIX),
        text_encoders=[_under(state_dict, CLIP_PREFIX)],
        configs=configs,
        is_consistency_model=is_consistency_model,
    )
    return build(checkpoint, path)


def fold(weights: dict) -> tuple[dict, bool]:
    """`fold_gamma`, its sum kept in float32 even where the file has half precision: the host casts it if it must."""
    fed = ("time_embedding.linear_1.bias", "time_embed.0.bias")
    return fold_gamma({key: weight.float() if key.endswith(fed) else weight for key, weight in weights.items()})


def build(checkpoint: Checkpoint, path: Path):
    """(MODEL, CLIP, VAE)."""
    try:
        model = with_schedule(build_unet(checkpoint), checkpoint.configs, checkpoint.is_consistency_model)
        return model, build_clip(checkpoint), build_vae(checkpoint)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def with_schedule(model, configs: dict, is_consistency_model: bool):
    """The MODEL on the schedule that the checkpoint names, or else on SD's with what the host takes it to predict."""
    sampling = model.get_model_object("model_sampling")
    scheduler = configs.get("scheduler")
    schedule = NoiseSchedule.from_config(scheduler) if scheduler else schedule_of(sampling)
    prediction_type = scheduler.get("prediction_type", "epsilon") if scheduler else prediction_type_of(sampling)
    return patch(model, schedule, prediction_type, is_consistency_model)


def build_unet(checkpoint: Checkpoint):
    """The UNet as a MODEL, on the host's default schedule."""
    weights = checkpoint.unet
    if weights["input_blocks.0.0.weight"].shape[0] == HOST_CHANNELS:
        model = comfy.sd.load_diffusion_model_state_dict(weights)
        if model is None:
            raise ValueError("ComfyUI does not recognise this UNet. Expected that of SD1.x, SD2.x or SDXL.")
        return model

    class NarrowSD15(comfy.supported_models.SD15):
        unet_config: ClassVar = {}
        unet_extra_config: ClassVar = {}

    management = comfy.model_management
    config = NarrowSD15(unet_options(weights, checkpoint.configs.get("unet")))
    scale = checkpoint.configs.get("vae", {}).get("scaling_factor")
    config.latent_format.scale_factor = scale or config.latent_format.scale_factor
    device, supported = management.get_torch_device(), config.supported_inference_dtypes
    parameters = sum(weight.numel() for weight in weights.values())
    stored = weights["input_blocks.0.0.weight"].dtype
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    model = config.get_model({}, device=management.unet_inital_load_device(parameters, dtype))
    _check_keys(model.diffusion_model, weights, "UNet")
    model.load_model_weights(dict(weights))
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=management.unet_offload_device())


def build_clip(checkpoint: Checkpoint):
    """The text encoders as a CLIP, which brings the host's own tokenizer."""
    # transformers 5 writes the names without the prefix that the host expects.
    encoders = [
        {key if key.startswith("text_") else f"text_model.{key}": weight for key, weight in encoder.items()}
        for encoder in checkpoint.text_encoders
    ]
    options = {}
    if len(encoders) == 1:
        config = text_encoder_options(encoders[0], checkpoint.configs.get("text_encoder"))
        options["clip_l_class"] = _clip_class(config)
        # A CLIPTextModel has none, and nothing here reads it; the host would warn of its absence.
        encoders[0].setdefault("text_projection.weight", torch.eye(config["hidden_size"]))
    directories = folder_paths.get_folder_paths("embeddings")
    return comfy.sd.load_text_encoder_state_dicts(encoders, embedding_directory=directories, model_options=options)


def build_vae(checkpoint: Checkpoint):
    """The autoencoder as a VAE."""
    vae = comfy.sd.VAE(sd=checkpoint.vae, config={"params": autoencoder_options(checkpoint.vae)})
    _check_keys(vae.first_stage_model, checkpoint.vae, "VAE")
    # The host's class has 32 groups whatever the width; no shape tells their number.
    groups = checkpoint.configs.get("vae", {}).get("norm_num_groups", 32)
    for module in vae.first_stage_model.modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.num_groups = groups
    return vae


def weight_files(location: Location) -> list[Path]:
    """The weight files of a model: UNet, VAE, text encoders. Raises ValueError where one is missing."""
    if not location.is_folder:
        return [location.path]
    encoders = sorted(folder for folder in location.path.glob("text_encoder*") if folder.is_dir())
    return [
        _weights_in(location.unet_folder, DIFFUSION_WEIGHTS),
        _weights_in(location.path / "vae", DIFFUSION_WEIGHTS),
        *(_weights_in(folder, TEXT_WEIGHTS) for folder in encoders or [location.path / "text_encoder"]),
    ]


def read_json(file: Path) -> dict:
    """Raises ValueError for a file that is missing or no JSON."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{file}: missing. Copy the whole diffusers folder, with its small .json files.") from None
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, found something else ({error}). Fetch the file again.") from error


def _clip_class(config: dict):
    """The host's SD1 text encoder with another configuration, for which its initialiser has no argument."""

    class NarrowCLIP(comfy.sd1_clip.SD1CheckpointClipModel):
        def __init__(self, device="cpu", dtype=None, model_options=None):
            comfy.sd1_clip.SDClipModel.__init__(
                self,
                device=device,
                dtype=dtype,
                return_projected_pooled=False,
                textmodel_json_config=dict(config),
                model_options=model_options or {},
            )

    return NarrowCLIP


def _weights_in(folder: Path, names: tuple[str, ...]) -> Path:
    for name in names:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file.name for file in folder.glob("*")) if folder.is_dir() else []
    raise ValueError(
        f"{folder}: expected {names[0]}, found {', '.join(found) or 'nothing'}. "
        "Fetch the safetensors version of the model; pickles (.bin) are not opened."
    )


def _names_consistency(configs: dict) -> bool:
    return configs.get("scheduler", {}).get("_class_name") == "LCMScheduler"


def _under(state_dict: dict, prefix: str) -> dict:
    return {key.removeprefix(prefix): weight for key, weight in state_dict.items() if key.startswith(prefix)}


def _check_keys(module, weights: dict, what: str) -> None:
    """The host only logs keys that are missing or left over; a picture made without them is noise."""
    expected = module.state_dict()
    missing = [key for key in expected if key not in weights]
    unknown = [key for key in weights if key not in expected]
    unfit = [key for key in expected if key in weights and expected[key].shape != weights[key].shape]
    for problem, keys in (("lacks", missing), ("has unknown", unknown), ("has ill-fitting", unfit)):
        if keys:
            raise ValueError(
                f"the {what} {problem} {len(keys)} of {len(expected)} weights, such as {keys[0]}. Expected Stable "
                "Diffusion 1.x's architecture; the file may be cut off or belong to another model."
            )
