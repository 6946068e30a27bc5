"""UNet, text encoders and autoencoder from the host's own classes, at any width.

What the host recognises it loads itself; the rest, which it refuses, differs from that only in the numbers it is built
with (widths.py).
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import comfy.model_detection
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch
from comfy.ldm.modules.diffusionmodules.model import Normalize

from ..splam_core.checkpoint import StateDict
from .host import Clip, ClipTarget, Model, ModelConfig, Vae
from .widths import Config, autoencoder_options, text_encoder_options, unet_options

# (first key's width of each text encoder) that the host builds by itself: SD1.x, SD2.x, SDXL.
HOST_TEXT_WIDTHS = ([768], [1024], [768, 1280], [1280, 768])
WIDTH_KEY = "text_model.embeddings.token_embedding.weight"


def host_knows(unet: StateDict) -> bool:
    """Whether the host has a model of these LDM weights' shapes; its own question would log an error for a no."""
    found = comfy.model_detection.detect_unet_config(unet, "")
    return found is not None and any(family.matches(found, unet) for family in comfy.supported_models.models)


def build_unet(weights: StateDict, configs: Mapping[str, Config], **loading: bool) -> Model:
    """A UNet under LDM names as a MODEL on the host's default schedule. Raises ValueError where it does not fit.

    loading: arguments of the host's own functions, here and for the text encoders.
    """
    if host_knows(weights):
        model = comfy.sd.load_diffusion_model_state_dict(dict(weights), **loading)
        check_keys(model.model.diffusion_model, weights, "UNet", missing_only=True)
        return model
    options = unet_options(weights, configs.get("unet"))
    config = _narrow(options)(options)
    management = comfy.model_management
    device, supported = management.get_torch_device(), config.supported_inference_dtypes
    parameters, stored = comfy.utils.calculate_parameters(weights), comfy.utils.weight_dtype(weights)
    dtype = management.unet_dtype(model_params=parameters, supported_dtypes=supported, weight_dtype=stored)
    config.set_inference_dtype(dtype, management.unet_manual_cast(dtype, device, supported))
    model = config.get_model({}, device=management.unet_inital_load_device(parameters, dtype))
    time_dim = (configs.get("unet") or {}).get("addition_time_embed_dim")
    if time_dim and hasattr(model, "embedder"):
        model.embedder = type(model.embedder)(time_dim)
    check_keys(model.diffusion_model, weights, "UNet")
    model.load_model_weights(dict(weights))
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=management.unet_offload_device())


def build_clip(encoders: list[StateDict], configs: Mapping[str, Config], **loading: bool) -> Clip:
    """The text encoders as a CLIP, which brings the host's own tokenizer."""
    # transformers 5 writes the names without the prefix that the host expects.
    encoders = [
        {key if key.startswith("text_") else f"text_model.{key}": weight for key, weight in encoder.items()}
        for encoder in encoders
    ]
    directories = folder_paths.get_folder_paths("embeddings")
    options = [
        text_encoder_options(encoder, configs.get(name))
        for encoder, name in zip(encoders, ("text_encoder", "text_encoder_2"), strict=False)
    ]
    for encoder, option in zip(encoders, options, strict=True):
        # A CLIPTextModel has none, and nothing here reads it; the host would warn of its absence.
        encoder.setdefault("text_projection.weight", torch.eye(option["hidden_size"]))
    if [encoder[WIDTH_KEY].shape[1] for encoder in encoders] in HOST_TEXT_WIDTHS and _has_host_depth(options):
        return comfy.sd.load_text_encoder_state_dicts(encoders, embedding_directory=directories, **loading)
    pads_with_zero = [(configs.get(name) or {}).get("pad_token") == "!" for name in ("tokenizer", "tokenizer_2")]
    target = _two_towers(encoders, options) if len(encoders) == 2 else _one_tower(options[0], pads_with_zero[0])
    state_dict = {
        f"{tower}.transformer.{key}": weight
        for tower, encoder in zip(("clip_l", "clip_g"), encoders, strict=False)
        for key, weight in encoder.items()
        if not key.endswith("position_ids")
    }
    parameters = comfy.utils.calculate_parameters(state_dict)
    clip = comfy.sd.CLIP(target, embedding_directory=directories, parameters=parameters, **loading)
    missing, unknown = clip.load_sd(state_dict, full_model=True)
    unfilled = [key for key in (*missing, *unknown) if not key.endswith("logit_scale")]
    if unfilled:
        raise ValueError(
            f"the text encoder lacks or has unknown weights, such as {unfilled[0]}; expected a CLIPTextModel."
        )
    return clip


def build_vae(weights: StateDict, configs: Mapping[str, Config]) -> Vae:
    """The autoencoder as a VAE."""
    with _groups(configs.get("vae", {}).get("norm_num_groups", 32)):  # no shape tells their number
        vae = comfy.sd.VAE(sd=dict(weights), config={"params": autoencoder_options(weights)})
    check_keys(vae.first_stage_model, weights, "VAE")
    return vae


@contextmanager
def _groups(count: int) -> Iterator[None]:
    """The host's autoencoder has norms of 32 groups whatever the width, and no option for their number: a default."""
    own = Normalize.__defaults__
    Normalize.__defaults__ = (count,)
    try:
        yield
    finally:
        Normalize.__defaults__ = own


def check_keys(module: torch.nn.Module, weights: StateDict, what: str, missing_only: bool = False) -> None:
    """Raises ValueError for weights that are missing, left over or of another shape.

    The host only logs them; a picture made without them is noise.
    """
    expected = module.state_dict()
    missing = [key for key in expected if key.endswith((".weight", ".bias")) and key not in weights]
    unknown = [] if missing_only else [key for key in weights if key not in expected]
    shapes = {} if missing_only else expected
    unfit = [key for key in shapes if key in weights and expected[key].shape != weights[key].shape]
    for problem, keys in (("lacks", missing), ("has unknown", unknown), ("has ill-fitting", unfit)):
        if keys:
            raise ValueError(
                f"the {what} {problem} {len(keys)} of {len(expected)} weights, such as {keys[0]}. Expected Stable "
                "Diffusion's architecture; the file may be cut off or belong to another model."
            )


def _narrow(options: dict[str, Any]) -> type[ModelConfig]:
    """The host's configuration of the family that these options belong to, without its fixed numbers."""
    models, edits = comfy.supported_models, options["in_channels"] == 8  # InstructPix2Pix: the picture beside the noise
    if options["adm_in_channels"] is not None:
        family = models.SDXL_instructpix2pix if edits else models.SDXL
    elif options["use_linear_in_transformer"]:
        family = models.SD20
    else:
        family = models.SD15_instructpix2pix if edits else models.SD15
    kept = {key: value for key, value in family.unet_extra_config.items() if key == "attn_precision"}

    return type("Narrow", (family,), {"unet_config": {}, "unet_extra_config": kept})


def _has_host_depth(options: list[dict[str, Any]]) -> bool:
    """Whether the towers have the layers by which the host tells them apart; SD2.x's folders leave its last one out."""
    depths = {768: (12,), 1024: (23, 24), 1280: (32,)}
    return all(option["num_hidden_layers"] in depths[option["hidden_size"]] for option in options)


def _tower(options: dict[str, Any], projection: torch.Size | None = None, **settings: Any) -> type[torch.nn.Module]:
    """The host's CLIP text model with another configuration, for which its initialisers have no argument."""

    class Tower(comfy.sd1_clip.SDClipModel):
        def __init__(
            self,
            device: torch.device | str = "cpu",
            dtype: torch.dtype | None = None,
            model_options: dict[str, Any] | None = None,
        ) -> None:
            super().__init__(
                device=device,
                dtype=dtype,
                textmodel_json_config=dict(options),
                model_options=model_options or {},
                **settings,
            )
            if projection and projection[0] != projection[1]:
                self.transformer.text_projection = self.operations.Linear(
                    projection[1], projection[0], bias=False, dtype=dtype, device=device
                )

    return Tower


def _one_tower(options: dict[str, Any], pads_with_zero: bool) -> ClipTarget:
    """SD1.x's and SD2.x's CLIP, as diffusers' folders hold them: the last layer, normalised."""
    pad = 0 if pads_with_zero else 49407
    tower = _tower(options, return_projected_pooled=False, special_tokens={"start": 49406, "end": 49407, "pad": pad})

    class Text(comfy.sd1_clip.SD1ClipModel):
        def __init__(
            self,
            device: torch.device | str = "cpu",
            dtype: torch.dtype | None = None,
            model_options: dict[str, Any] | None = None,
        ) -> None:
            super().__init__(device=device, dtype=dtype, model_options=model_options or {}, clip_model=tower)

    class Tokenizer(comfy.sd1_clip.SD1Tokenizer):
        def __init__(
            self, embedding_directory: list[str] | None = None, tokenizer_data: dict[str, Any] | None = None
        ) -> None:
            super().__init__(embedding_directory=embedding_directory, tokenizer_data=tokenizer_data or {})
            self.clip_l.pad_token, self.clip_l.pad_with_end = pad, not pads_with_zero

    return comfy.supported_models_base.ClipTarget(Tokenizer, Text)


def _two_towers(encoders: list[StateDict], options: list[dict[str, Any]]) -> ClipTarget:
    """SDXL's pair: the layer before the last of both, not normalised, and the second one's pooled projection."""
    hidden: dict[str, Any] = {"layer": "hidden", "layer_idx": -2, "layer_norm_hidden_state": False}
    first = _tower(options[0], **hidden)
    second = _tower(
        options[1],
        projection=encoders[1]["text_projection.weight"].shape,
        special_tokens={"start": 49406, "end": 49407, "pad": 0},
        **hidden,
    )

    class Text(comfy.sdxl_clip.SDXLClipModel):
        def __init__(
            self,
            device: torch.device | str = "cpu",
            dtype: torch.dtype | None = None,
            model_options: dict[str, Any] | None = None,
        ) -> None:
            torch.nn.Module.__init__(self)
            self.clip_l = first(device, dtype, model_options)
            self.clip_g = second(device, dtype, model_options)
            self.dtypes = {dtype}

    return comfy.supported_models_base.ClipTarget(comfy.sdxl_clip.SDXLTokenizer, Text)
