"""Text encoders' names in LDM single files: CLIP's in Stable Diffusion 1.x, OpenCLIP's in 2.x, both in XL."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# Where a family keeps each text encoder of its pipeline: (prefix, whether OpenCLIP's names follow it).
PLACES = {
    "sd1": (("cond_stage_model.transformer.text_model.", False),),
    "sd2": (("cond_stage_model.model.", True),),
    "sdxl": (("conditioner.embedders.0.transformer.text_model.", False), ("conditioner.embedders.1.model.", True)),
}
_TOP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_LAYER = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def text_family(encoders: Sequence[Mapping[str, Tensor]]) -> str:
    """ "sd1", "sd2" or "sdxl", from a pipeline's one or two text encoders: XL has two, 2.x is wider than 768."""
    if len(encoders) == 2:
        return "sdxl"
    widths = [weight.shape[0] for key, weight in encoders[0].items() if key.endswith("final_layer_norm.weight")]
    return "sd2" if widths and widths[0] > 768 else "sd1"


def text_encoders_to_ldm(encoders: Sequence[Mapping[str, Tensor]], family: str) -> dict[str, Tensor]:
    """A single file's text encoders from transformers' state dicts, with or without "text_model." in their keys.

    Raises ValueError for a number of encoders that the family does not have, and for a key without counterpart.
    """
    places = PLACES[family]
    if len(encoders) != len(places):
        raise ValueError(f"expected {len(places)} text encoder(s) of a {family} model, found {len(encoders)}.")
    single: dict[str, Tensor] = {}
    for weights, (prefix, open_clip) in zip(encoders, places, strict=True):
        plain = {key.removeprefix("text_model."): w for key, w in weights.items() if not key.endswith("position_ids")}
        single |= {prefix + key: weight for key, weight in (to_open_clip(plain) if open_clip else plain).items()}
    return single


def text_encoder_from_ldm(weights: Mapping[str, Tensor], prefix: str, open_clip: bool) -> dict[str, Tensor]:
    """A text encoder of a single file, at one of its family's PLACES, under transformers' names without "text_model.".

    Old files of SD1.x leave "text_model." out of CLIP's keys. Empty if the file has none there.
    """
    if not any(key.startswith(prefix) for key in weights):
        prefix = prefix.removesuffix("text_model.")
    found = {key.removeprefix(prefix): weight for key, weight in weights.items() if key.startswith(prefix)}
    found = {key: weight for key, weight in found.items() if not key.endswith("position_ids")}
    return from_open_clip(found) if open_clip else found


def from_open_clip(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_open_clip`; what transformers has no place for, as logit_scale, is left out."""
    top = {old: new for new, old in _TOP.items()}
    layers = {old: new for new, old in _LAYER.items()}
    result = {}
    for key, weight in weights.items():
        number, _, rest = key.removeprefix("transformer.resblocks.").partition(".")
        module, _, kind = rest.rpartition(".")
        layer = f"encoder.layers.{number}"
        if key in top:
            result[top[key]] = weight
        elif key == "text_projection":
            result["text_projection.weight"] = weight.T.contiguous()
        elif key.startswith("transformer.resblocks.") and rest.startswith("attn.in_proj_"):
            for name, part in zip("qkv", weight.chunk(3), strict=True):
                result[f"{layer}.self_attn.{name}_proj.{rest.removeprefix('attn.in_proj_')}"] = part.clone()
        elif key.startswith("transformer.resblocks."):
            result[f"{layer}.{layers[module]}.{kind}"] = weight
    return result


def to_open_clip(plain: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """transformers' names without "text_model." to OpenCLIP's: q, k, v in one matrix, the projection transposed."""
    result = {}
    for key, weight in plain.items():
        if key in _TOP:
            result[_TOP[key]] = weight
            continue
        if key == "text_projection.weight":
            result["text_projection"] = weight.T.contiguous()
            continue
        number, _, rest = key.removeprefix("encoder.layers.").partition(".")
        module, _, kind = rest.rpartition(".")
        place = f"transformer.resblocks.{number}"
        if key.startswith("encoder.layers.") and module in _LAYER:
            result[f"{place}.{_LAYER[module]}.{kind}"] = weight
        elif module == "self_attn.q_proj":
            three = [plain[key.replace("q_proj", f"{name}_proj")] for name in "qkv"]
            result[f"{place}.attn.in_proj_{kind}"] = torch.cat(three)
        elif module not in ("self_attn.k_proj", "self_attn.v_proj"):
            raise ValueError(f"text encoder: the key {key!r} has no counterpart in OpenCLIP.")
    return result
