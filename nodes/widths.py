"""Options of ComfyUI's UNet, autoencoder and text encoder classes for Stable Diffusion at any width.

Shapes tell everything but the number of attention heads, which diffusers' config.json holds.
"""

from collections.abc import Mapping
from typing import Any

import comfy.model_detection
from torch import Tensor

Config = dict[str, Any]  # a part's diffusers configuration

# What ComfyUI's UNetModel computes in one way only: (key of a diffusers UNet config, the one value that fits).
FIXED = (
    ("_class_name", "UNet2DConditionModel"),
    ("act_fn", "silu"),
    ("norm_num_groups", 32),
    ("flip_sin_to_cos", True),
    ("freq_shift", 0),
    ("center_input_sample", False),
    ("resnet_time_scale_shift", "default"),
    ("time_embedding_type", "positional"),
    ("class_embed_type", None),
    ("encoder_hid_dim", None),
    ("only_cross_attention", False),
    ("mid_block_type", "UNetMidBlock2DCrossAttn"),
)


def unet_options(weights: Mapping[str, Tensor], config: Config | None) -> dict[str, Any]:
    """Arguments of ComfyUI's UNetModel for a UNet under LDM names. Raises ValueError where it has no such UNet."""
    config = {} if config is None else config
    added = "text_time" if "label_emb.0.0.weight" in weights else None
    for key, value in (*FIXED, ("addition_embed_type", added)):
        if config.get(key, value) != value:
            raise ValueError(
                f"the UNet's config.json has {key} = {config[key]!r}, expected {value!r} as in Stable Diffusion."
            )
    # The caller's dictionary must stay whole; the host only reads it here.
    options = comfy.model_detection.detect_unet_config(weights, "")
    if options is None or options.get("context_dim") is None:
        raise ValueError(
            "the UNet has no cross-attention that ComfyUI recognises; expected Stable Diffusion's architecture."
        )
    widths = [multiple * options["model_channels"] for multiple in options["channel_mult"]]
    # diffusers calls the number of heads attention_head_dim, and keeps that name for old checkpoints.
    heads = config.get("num_attention_heads") or config.get("attention_head_dim")
    if heads is None and options["use_linear_in_transformer"] and all(width % 64 == 0 for width in widths):
        return {**options, "num_heads": -1, "num_head_channels": 64}  # SD2.x and SDXL; SD1.x has 8 heads everywhere
    heads = heads or 8
    heads = [heads] * len(widths) if isinstance(heads, int) else list(heads)
    if len(set(heads)) == 1:
        return {**options, "num_heads": heads[0], "num_head_channels": -1}
    sizes = {width // count for width, count in zip(widths, heads, strict=True)}
    if len(sizes) > 1:
        raise ValueError(
            f"the UNet has {heads} attention heads at widths {widths}: neither their number nor their size is the same "
            "everywhere, which ComfyUI's UNet needs."
        )
    return {**options, "num_heads": -1, "num_head_channels": sizes.pop()}


def autoencoder_options(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments of ComfyUI's AutoencoderKL for a VAE under LDM names. Raises ValueError for another autoencoder."""
    try:
        channels = weights["encoder.conv_in.weight"].shape[0]
        widths = [
            weights[f"encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(_count(weights, "encoder.down."))
        ]
        latent_channels, embedded = weights["post_quant_conv.weight"].shape[:2]
    except KeyError as error:
        raise ValueError(
            f"the VAE has no {error}; expected diffusers' AutoencoderKL as in Stable Diffusion."
        ) from error
    if any(width % channels for width in widths):
        raise ValueError(
            f"the VAE's widths {widths} are not multiples of its first, {channels}, which ComfyUI's VAE needs."
        )
    return {
        "embed_dim": embedded,
        "ddconfig": {
            "double_z": True,
            "z_channels": latent_channels,
            "resolution": 256,
            "in_channels": 3,
            "out_ch": 3,
            "ch": channels,
            "ch_mult": [width // channels for width in widths],
            "num_res_blocks": _count(weights, "encoder.down.0.block."),
            "attn_resolutions": [],
            "dropout": 0.0,
        },
    }


def text_encoder_options(weights: Mapping[str, Tensor], config: Config | None) -> dict[str, Any]:
    """ComfyUI's configuration for a CLIPTextModel. Raises ValueError where the heads cannot be known."""
    try:
        vocabulary, width = weights["text_model.embeddings.token_embedding.weight"].shape
        feed_forward = weights["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        positions = weights["text_model.embeddings.position_embedding.weight"].shape[0]
    except KeyError as error:
        raise ValueError(f"the text encoder has no {error}; expected a CLIPTextModel.") from error
    if vocabulary != 49408:
        raise ValueError(
            f"the text encoder has a vocabulary of {vocabulary}, expected CLIP's 49408, whose tokenizer ComfyUI uses."
        )
    if config is None and width != 768:
        raise ValueError(
            f"the text encoder is {width} wide and the file does not say how many attention heads it has. "
            "Export it with this repository's trainer, or use its diffusers folder."
        )
    config = {"num_attention_heads": 12, "hidden_act": "quick_gelu"} if config is None else config
    return {
        "hidden_size": width,
        "intermediate_size": feed_forward,
        "num_hidden_layers": _count(weights, "text_model.encoder.layers."),
        "max_position_embeddings": positions,
        "num_attention_heads": config["num_attention_heads"],
        "hidden_act": config.get("hidden_act", "quick_gelu"),
        # Not the config's: old ones name 2, which is no token of this vocabulary's end.
        "eos_token_id": 49407,
    }


def _count(weights: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbers follow the prefix among the keys."""
    return len({key.removeprefix(prefix).partition(".")[0] for key in weights if key.startswith(prefix)})
